"""ode-mnist: classify images by following a differential equation for one unit of time.

A residual block adds f(y) to its input: one step of Euler's method along dy/dt = f(t, y). An ODE-Net (Chen,
Rubanova, Bettencourt and Duvenaud, "Neural Ordinary Differential Equations", NeurIPS 2018, section 3) replaces the
blocks by the equation itself, and leaves it to a solver how many steps are worth taking. Two networks with the
same stem and head are trained side by side:

    odenet     the flow of one convolutional field from time 0 to 1
    resnet     residual blocks of the same convolutions, each with its own weights

The table and the pictures show the test errors of both, how many calls of f the flow takes in training, whether it
may be solved less accurately once it is trained, and how much memory a training step takes.

Results with seed 0 on a CPU: on the digits, with the defaults (75 s on one core), the odenet with 36,458
parameters gets 9 of 360 test images wrong, the resnet with 128,938 parameters 8. On MNIST, with `--dataset mnist
--max-steps 600`, which is less than one pass over the images, the odenet with 208,266 parameters gets 2.89 %
wrong, the resnet with 577,546 parameters 2.19 %; the calls of f in a forward pass rise from 14 to 26. If the
trained flow is solved at a tolerance of 0.1 or 1 instead of 1e-3, it takes 14 calls instead of 26, and the error
stays at 2.86 %. That is two steps of Dopri5, the fewest possible here, as the rule for the first step chooses a
short one at any tolerance: on the digits even a tolerance of 1000 changes nothing more.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import implicitly as im
from implicitly import viz
from implicitly.data import ImageData
from implicitly.recipes._classification import (
    Classifier,
    ImageConfig,
    ImageTraining,
    Result,
    begin,
    evaluate,
    finish,
    percent,
    results_table,
    seeded,
)
from implicitly.recipes._options import OptionError, check_at_least

ModelName = Literal["odenet", "resnet"]
Dataset = Literal["digits", "mnist"]
# The tolerances that the dtype of f can resolve.
LEAST_TOLERANCE = {"32-true": 1e-6, "64-true": 1e-12, "16-mixed": 2e-3, "bf16-mixed": 0.016}
DEPTH_IMAGES = 32  # of the batch whose memory is measured


@dataclass(frozen=True)
class Config(ImageConfig):
    """Image classification with a neural ODE in place of residual blocks, compared with a ResNet."""

    dataset: Dataset = "digits"
    """Data set. The digits come with scikit-learn; MNIST is read from --data or the Hugging Face hub."""
    models: tuple[ModelName, ...] = ("odenet", "resnet")
    """Networks to train."""

    channels: int | None = None
    """Channels of the state. Default: 64, as in the paper, or 32 for the digits."""
    downsamplings: int | None = None
    """Convolutions in the stem that halve height and width. Default: 2, as in the paper, or 1 for the digits."""
    groups: int = 8
    """Groups in the group norms; must divide --channels."""
    blocks: int = 6
    """Number of residual blocks in the ResNet."""
    tolerance: float = 1e-3
    """Relative and absolute tolerance of the ODE solver during training."""

    tolerances: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
    """Solver tolerances at which the trained neural ODE is tested."""
    depths: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    """Numbers of solver steps, and of residual blocks, for which memory is measured."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dataset not in ("digits", "mnist"):
            raise ValueError(f'dataset must be "digits" or "mnist"; got {self.dataset!r}')
        small = self.dataset == "digits"
        for name, default in (("channels", 32 if small else 64), ("downsamplings", 1 if small else 2)):
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
        check_at_least(self, 1, "channels", "downsamplings", "groups", "blocks")
        if self.width % self.groups:
            raise ValueError(f"groups must divide channels; got {self.groups} and {self.width}")
        for name in ("tolerances", "depths"):
            values = getattr(self, name)
            if not values or list(values) != sorted(set(values)):
                raise ValueError(f"{name} must be one or more numbers in increasing order; got {values}")
        least = LEAST_TOLERANCE[self.precision]
        for tolerance in (self.tolerance, *self.tolerances):
            if not least <= tolerance < float("inf"):
                raise ValueError(
                    f"tolerance and tolerances must be finite and at least {least:g}, for the precision "
                    f"{self.precision}; got {tolerance}"
                )
        if self.depths[0] < 1:
            raise ValueError(f"depths must be at least 1; got {self.depths}")

    @property
    def width(self) -> int:
        """Channels of the state, the default filled in."""
        assert self.channels is not None  # since __post_init__
        return self.channels


# --- The networks -----------------------------------------------------------------------------------------


def field(channels: int, groups: int) -> nn.Module:
    """f(t, y) for y `(batch, channels, height, width)`: two convolutions that see the time as an extra channel.

    Unlike the field of the paper it is smooth: a solver of high order loses its order at the kinks of ReLU.
    """

    def convolution() -> nn.Module:
        return im.nn.ConcatTime(nn.Conv2d(channels + 1, channels, 3, padding=1))

    def norm() -> nn.Module:
        return nn.GroupNorm(groups, channels)

    return im.nn.TimeSequential(norm(), nn.SiLU(), convolution(), norm(), nn.SiLU(), convolution(), norm())


class Residual(nn.Module):
    """y <- y + f_k(y), `blocks` times."""

    def __init__(self, channels: int, groups: int, blocks: int) -> None:
        super().__init__()

        def half() -> tuple[nn.Module, ...]:
            conv = nn.Conv2d(channels, channels, 3, padding=1)
            return nn.GroupNorm(groups, channels), nn.SiLU(), conv

        self.blocks = nn.ModuleList(nn.Sequential(*half(), *half()) for _ in range(blocks))

    def forward(self, y: Tensor) -> Tensor:
        """The output of the last block, of the shape of `y` `(batch, channels, height, width)`."""
        for f in self.blocks:
            y = y + f(y)
        return y


def build(name: ModelName, config: Config, data: ImageData) -> Classifier:
    """The network called `name`, with fresh weights."""
    width, groups = config.width, config.groups
    assert config.downsamplings is not None
    smallest = min(data.height, data.width) >> config.downsamplings
    if smallest < 1:
        raise OptionError(
            f"downsamplings={config.downsamplings} is too many for images of {data.height}x{data.width} pixels; "
            "try fewer"
        )
    stem: list[nn.Module] = [nn.Conv2d(data.channels, width, 3, padding=1)]
    for _ in range(config.downsamplings):
        stem += nn.GroupNorm(groups, width), nn.SiLU(), nn.Conv2d(width, width, 4, stride=2, padding=1)
    if name == "odenet":
        solver = im.Dopri5(rtol=config.tolerance, atol=config.tolerance)
        body = im.nn.NeuralODE(field(width, groups), solver=solver)
    else:
        body = Residual(width, groups, config.blocks)
    pool = nn.AdaptiveAvgPool2d(1), nn.Flatten()
    head = nn.Sequential(nn.GroupNorm(groups, width), nn.SiLU(), *pool, nn.Linear(width, data.classes))
    return Classifier(nn.Sequential(*stem), body, head)


# --- The training -----------------------------------------------------------------------------------------


class Training(ImageTraining):
    """Trains one network, and records the calls of f in every step."""

    recipe = "ode-mnist"
    kept: ClassVar[tuple[str, ...]] = (*ImageTraining.kept, "calls")
    free: ClassVar[frozenset[str]] = ImageTraining.free | {"tolerances", "depths"}

    def __init__(self, name: ModelName, config: Config, data: ImageData) -> None:
        super().__init__(name, config, data, build(name, config, data))
        self.calls: list[tuple[int, int]] = []  # of each training step, forward and backward

    def calls_of_f(self) -> tuple[int, int]:
        """Calls of f, forward and to recompute the steps; blocks keep what they need and are not called again."""
        match self.model.body:
            case im.nn.NeuralODE() as body:
                return body.evaluations, body.backward_evaluations
            case Residual() as body:
                return len(body.blocks), 0
            case body:
                raise TypeError(f"no body of this recipe: {type(body).__name__}")

    def count_calls(self, forward: int, backward: int) -> None:
        """Also record the calls of f in this step."""
        super().count_calls(forward, backward)
        self.calls.append((forward, backward))

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log the calls of f."""
        for direction, count in zip(("forward", "backward"), self.calls[-1]):
            self.log(f"train/calls_{direction}", float(count))

    def log_body(self, split: str, samples: int) -> None:
        """Log the calls of f in a forward pass without a backward pass."""
        if split != "train":
            self.log(f"{split}/calls", float(self.calls_of_f()[0]), batch_size=samples)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Also keep the calls of f."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["calls"] = self.calls

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the calls of f, too."""
        super().on_load_checkpoint(checkpoint)
        self.calls = checkpoint["calls"]


def fit(name: ModelName, config: Config, data: ImageData, folder: Path) -> Result:
    """Train one network, or with `config.resume` continue from its checkpoint, if there is one; then test it.

    `folder` receives `last.ckpt`, `best.ckpt` (by accuracy on the held-out images) and TensorBoard's logs.

    Raises:
        CheckpointError: the checkpoint to resume from is damaged, or was made with other options.
    """
    seeded(config)
    return finish(Training(name, config, data), folder)


# --- What is measured afterwards --------------------------------------------------------------------------


class Loosened(NamedTuple):
    """The test result of a trained flow at another tolerance."""

    tolerance: float
    error: float  # share of the test images
    calls: float  # of f in a forward pass, mean


def loosen(training: ImageTraining, tolerances: Sequence[float]) -> list[Loosened]:
    """Test a trained ODE-Net with other tolerances of its solver, and then restore its own."""
    layer = training.model.body
    assert isinstance(layer, im.nn.NeuralODE)  # the ResNet has no solver
    own, found = layer.solver, []
    for tolerance in tolerances:
        layer.solver = dataclasses.replace(own, rtol=tolerance, atol=tolerance)
        logged = evaluate(training)
        found.append(Loosened(tolerance, 1 - logged["test/accuracy"], logged["test/calls"]))
    layer.solver = own
    return found


def memory_against_depth(config: Config, data: ImageData) -> tuple[dict[str, list[int]], int]:
    """Peak bytes of a training step at each of `config.depths`, by network, and those of a forward pass alone.

    Weights and gradients, which exist before, are not counted. The steps have a constant length, so that their
    number is known. Measured on the CPU, for networks with fresh weights.
    """
    images, labels = (tensor[:DEPTH_IMAGES] for tensor in data.train.tensors)
    measured: dict[str, list[int]] = {"ODE, unrolled": [], "ODE, steps recomputed": [], "residual blocks": []}
    odenet = build("odenet", config, data)
    layer = odenet.body
    assert isinstance(layer, im.nn.NeuralODE)

    def measure(network: Classifier) -> int:
        def step() -> None:
            F.cross_entropy(network(images), labels).backward()

        step()  # makes the gradients
        return viz.peak_bytes(step)

    again = im.RecursiveCheckpointAdjoint(keep_bytes=0)  # so that small solves are no exception
    for depth in config.depths:
        layer.solver = im.Dopri5(dt=1 / depth)
        for name, adjoint in zip(measured, (im.UnrolledAdjoint(), again)):
            layer.adjoint = adjoint
            measured[name].append(measure(odenet))
        resnet = build("resnet", dataclasses.replace(config, blocks=depth), data)
        measured["residual blocks"].append(measure(resnet))
    with torch.no_grad():
        return measured, viz.peak_bytes(lambda: odenet(images))


# --- Pictures and table -----------------------------------------------------------------------------------


def table_of(results: Sequence[Result], loosened: Sequence[Loosened]) -> Table:
    """The comparison, and the flow at other tolerances under it, as a table for `rich` to print."""
    notes = [
        "calls of f: forward + backward, which computes the steps again",
        "resnet: each block is one call; autograd stores what it needs, so none is repeated",
    ]
    if loosened:
        notes.append("at TOLERANCE: the trained odenet, tested with this solver tolerance")
    table = results_table(results, "error", notes)
    table.add_section()
    for row in loosened:
        table.add_row(f"at {row.tolerance:g}", percent(row.error), "", "", f"{row.calls:.1f}", "")
    return table


def draw(
    results: Sequence[Result], loosened: Sequence[Loosened], config: Config, data: ImageData, run: Path
) -> None:
    """Write the pictures into the folder of the run."""
    measured, forward = memory_against_depth(config, data)
    memory = viz.plot_memory(
        config.depths,
        measured,
        forward,
        "a forward pass of the ODE",
        f"{DEPTH_IMAGES} images; a step of Dopri5 calls f six times, a residual block once",
        "steps of the solver, or residual blocks",
    )
    memory.savefig(run / "memory.png")
    for result in results:
        training = result.training
        if result.name == "odenet" and isinstance(training, Training):
            forward_calls, backward_calls = zip(*training.calls)
            counts = {"forward": forward_calls, "backward": backward_calls}
            viz.plot_calls(counts, 20, "each step, and the mean of the last 20").savefig(run / "calls.png")
    if loosened:
        tolerances, errors, calls = zip(*loosened)
        viz.plot_tolerances(tolerances, errors, calls, config.tolerance).savefig(run / "tolerances.png")


def main(config: Config) -> list[Result]:
    """Train the networks that `config` names, measure and draw what they cost, and print how they compare."""
    console = Console()
    data, run = begin("ode-mnist", config, console)
    results = [fit(name, config, data, run / name) for name in config.models]
    flows = [result.training for result in results if result.name == "odenet"]
    loosened = [row for training in flows for row in loosen(training, config.tolerances)]
    draw(results, loosened, config, data, run)
    table = table_of(results, loosened)
    with (run / "table.txt").open("w", encoding="utf-8") as file:
        Console(file=file, width=100).print(table)
    console.print(table)
    console.print(f"pictures, table and checkpoints are in {run.absolute()}", highlight=False, soft_wrap=True)
    return results
