"""deq-image: classify images by the equilibrium of one convolutional cell.

A residual network stacks blocks. Let all blocks be the same, and stack infinitely many of them: if the
activations settle, they settle at a point z with z = f(z, x). A deep equilibrium model (Bai, Kolter and
Koltun, 2019, arXiv:1909.01377) finds that point with a solver, and its derivative by the implicit function
theorem. So it stores the activations of one block, where the stack stores those of all.

Networks of equal size are trained side by side, and one table compares them:

    deq       the equilibrium of one cell
    quick     the same, but in training the equilibrium is only approached, by a few steps from where the image
              was left in the last epoch, with the gradient of one call of the cell (Fung et al., 2022,
              arXiv:2103.12803)
    unrolled  the same cell applied a fixed number of times, differentiated by plain autograd
    resnet    blocks of the same shape as the cell, each with weights of its own, and fewer channels
"""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import implicitly as im
from implicitly.data import ImageData
from implicitly.recipes._classification import (
    DTYPES,
    Classifier,
    ImageConfig,
    ImageTraining,
    Result,
    begin,
    finish,
    results_table,
    seeded,
)
from implicitly.recipes._options import check_at_least
from implicitly.recipes._training import Batches

ModelName = Literal["deq", "quick", "unrolled", "resnet"]

# Checkpoints include equilibria up to this many bytes: those of CIFAR-10 in float32 take 9.8 GB.
KEPT = 2**28


@dataclass(frozen=True)
class Config(ImageConfig):
    """Image classification with a deep equilibrium model, compared with a ResNet of equal size."""

    models: tuple[ModelName, ...] = ("deq", "quick", "unrolled", "resnet")
    """Networks to train."""

    channels: int = 48
    """Channels of the equilibrium z."""
    inner_channels: int = 64
    """Channels between the two convolutions of the cell."""
    groups: int = 8
    """Groups in the group norms; must divide --channels and --inner-channels."""
    stem_stride: int = 1
    """Stride of the first convolution; 2 halves height and width and makes training about four times cheaper."""
    pooled_size: int = 4
    """Height and width after average pooling, before the final linear layer."""
    rtol: float = 1e-2
    """Relative tolerance: the solver stops when |f(z) - z| <= rtol |f(z)|."""
    solver_steps: int = 25
    """Maximum number of solver steps."""
    history: int = 5
    """Number of past iterates that Anderson acceleration combines."""
    quick_steps: int = 3
    """Solver steps per image and epoch when the network "quick" is trained."""
    unroll: int = 10
    """How many times the network "unrolled" applies the cell."""
    blocks: int = 4
    """Number of residual blocks in the ResNet."""

    def __post_init__(self) -> None:
        super().__post_init__()
        counts = "channels", "inner_channels", "stem_stride", "pooled_size", "history", "solver_steps"
        check_at_least(self, 1, *counts, "quick_steps", "unroll", "blocks")
        if self.groups < 1 or self.channels % self.groups or self.inner_channels % self.groups:
            raise ValueError(
                f"groups must divide channels and inner_channels; got {self.groups}, {self.channels} and "
                f"{self.inner_channels}"
            )
        # These know best what they can reach.
        self.solver.tolerances(DTYPES[self.precision])
        self.linear_solver.tolerances(DTYPES[self.precision])

    @property
    def solver(self) -> im.Anderson:
        """Of the equilibrium."""
        return im.Anderson(history=self.history, rtol=self.rtol, max_steps=self.solver_steps)

    @property
    def linear_solver(self) -> im.GMRES:
        """Of the gradient."""
        # A short Krylov basis saves memory, and at this tolerance some ten products are enough. The gradient
        # of a mean is small for each sample, so no absolute tolerance may decide what is small enough.
        return im.GMRES(restart=10, rtol=self.rtol, atol=0.0, max_steps=self.solver_steps)


# --- The networks -----------------------------------------------------------------------------------------


class Cell(nn.Module):
    """y = norm(relu(conv(z))); f(z, x) = norm(relu(z + norm(x + conv(y)))).

    `z` and `x`: `(batch, channels, height, width)`. With x = 0 it is one block of a residual network.
    """

    def __init__(self, channels: int, inner_channels: int, groups: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(channels, inner_channels, 3, padding=1, bias=False)
        self.conv_out = nn.Conv2d(inner_channels, channels, 3, padding=1, bias=False)
        self.norm_inner = nn.GroupNorm(groups, inner_channels)
        self.norm_branch = nn.GroupNorm(groups, channels)
        self.norm_sum = nn.GroupNorm(groups, channels)
        for conv in (self.conv_in, self.conv_out):
            nn.init.normal_(conv.weight, std=0.01)  # small, so that f starts close to a contraction

    def forward(self, z: Tensor, x: Tensor | float) -> Tensor:
        """f(z, x), of the shape of `z`."""
        y = self.norm_inner(F.relu(self.conv_in(z)))
        return self.norm_sum(F.relu(z + self.norm_branch(x + self.conv_out(y))))


class Quick(im.nn.DEQ):
    """An equilibrium that in training is only approached, in `steps` steps from where the last epoch left it.

    The gradient is that of one call of the cell. In evaluation mode, `solver` finds the equilibrium itself.
    """

    def __init__(self, cell: Cell, solver: im.Anderson, steps: int, images: int) -> None:
        last = im.nn.LastEpoch(max(1, images))
        super().__init__(cell, adjoint=im.JacobianFreeAdjoint(), on_failure="ignore", warm_start=last)
        self.last = last
        self.accurate, self.approaching = solver, dataclasses.replace(solver, rtol=0, max_steps=steps)

    def forward(self, x: Tensor, z0: Tensor | None = None, *, index: Tensor | None = None) -> Tensor:
        """The equilibrium for `x` or, in training, a state near that of the images `index`."""
        self.solver = self.approaching if self.training else self.accurate
        return super().forward(x, z0, index=index)


class Unrolled(nn.Module):
    """The cell applied `times` times, from z = 0."""

    def __init__(self, cell: Cell, times: int) -> None:
        super().__init__()
        self.cell = cell
        self.times = times

    def forward(self, x: Tensor) -> Tensor:
        """The last iterate, of the shape of `x`."""
        z = torch.zeros_like(x)
        for _ in range(self.times):
            z = self.cell(z, x)
        return z


class Residual(nn.Module):
    """Blocks of the cell's shape, each with its own weights."""

    def __init__(self, blocks: list[Cell]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        """The output of the last block, of the shape of `x`."""
        for block in self.blocks:
            x = block(x, 0.0)
        return x


def classifier(body: nn.Module, channels: int, config: Config, data: ImageData) -> Classifier:
    """The body between its stem and its head."""
    stem = nn.Sequential(
        nn.Conv2d(data.channels, channels, 3, stride=config.stem_stride, padding=1, bias=False),
        nn.BatchNorm2d(channels),
    )
    head = nn.Sequential(
        nn.BatchNorm2d(channels),
        nn.AdaptiveAvgPool2d(config.pooled_size),
        nn.Flatten(),
        nn.Linear(channels * config.pooled_size**2, data.classes),
    )
    return Classifier(stem, body, head)


def build(name: ModelName, config: Config, data: ImageData) -> Classifier:
    """The network called `name`, with fresh weights."""
    if name == "resnet":
        return _build_resnet(*_resnet_widths(config, data), config, data)
    cell = Cell(config.channels, config.inner_channels, config.groups)
    if name == "deq":
        adjoint = im.ImplicitAdjoint(linear_solver=config.linear_solver)
        # Samples that run out of steps are counted in the logs; a warning at each step would say no more.
        body = im.nn.DEQ(cell, solver=config.solver, adjoint=adjoint, on_failure="ignore")
    elif name == "quick":
        body = Quick(cell, config.solver, config.quick_steps, len(data.train))
    else:
        body = Unrolled(cell, config.unroll)
    return classifier(body, config.channels, config, data)


def _build_resnet(channels: int, inner_channels: int, config: Config, data: ImageData) -> Classifier:
    blocks = [Cell(channels, inner_channels, config.groups) for _ in range(config.blocks)]
    return classifier(Residual(blocks), channels, config, data)


def _resnet_widths(config: Config, data: ImageData) -> tuple[int, int]:
    """The channels and inner channels that give the ResNet as many parameters as the others.

    Among the widths that come within 3 %, the ones closest to the proportions of the cell.
    """

    def parameters(channels: int, inner_channels: int, blocks: int) -> int:
        ends = channels * (9 * data.channels + 4 + config.pooled_size**2 * data.classes) + data.classes
        return ends + blocks * (18 * channels * inner_channels + 2 * inner_channels + 4 * channels)

    def rank(widths: tuple[int, int]) -> tuple[float, float]:
        mismatch = abs(parameters(*widths, config.blocks) / target - 1)
        distortion = abs(widths[1] / widths[0] - config.inner_channels / config.channels)
        return max(mismatch, 0.03), distortion

    target = parameters(config.channels, config.inner_channels, 1)
    widths = range(config.groups, 2 * max(config.channels, config.inner_channels), config.groups)
    return min(itertools.product(widths, widths), key=rank)


# --- The training -----------------------------------------------------------------------------------------


class Training(ImageTraining):
    """Trains one network, and logs how its solver does."""

    recipe = "deq-image"

    def __init__(self, name: ModelName, config: Config, data: ImageData) -> None:
        super().__init__(name, config, data, build(name, config, data))

    def train_dataloader(self) -> Batches:
        """The batches of one epoch, as in every recipe; the quick network is also told which images these are."""
        batches = super().train_dataloader()
        if isinstance(self.model.body, Quick):
            images = batches.dataset.tensors
            batches.dataset = TensorDataset(*images, torch.arange(len(images[0])))
        return batches

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the equilibria that the quick network continues from, unless they take more than `KEPT` bytes."""
        super().on_save_checkpoint(checkpoint)
        if isinstance(self.model.body, Quick):
            equilibria = self.model.body.last.state_dict()
            if sum(x.nbytes for x in equilibria["leaves"] or ()) <= KEPT:
                checkpoint["equilibria"] = equilibria

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Continue from the same equilibria or, if these were not kept, from zero, as in the first epoch."""
        super().on_load_checkpoint(checkpoint)
        if not isinstance(self.model.body, Quick):
            return
        if "equilibria" in checkpoint:
            self.model.body.last.load_state_dict(checkpoint["equilibria"])
        else:
            warnings.warn(
                f"the checkpoint does not contain the equilibria of the {len(self.data.train):,} images, as they "
                f"take more than {KEPT >> 20} MiB: the network 'quick' starts the next epoch from zero",
                stacklevel=2,
            )

    def calls_of_f(self) -> tuple[int, int]:
        """Calls of the cell (or of a block), and products with its transposed Jacobian."""
        match self.model.body:
            case im.nn.DEQ(solution=im.Solution() as forward, backward_solution=im.Solution() as backward):
                return forward.evaluations, backward.evaluations
            case Quick(solution=im.Solution() as forward):
                # The recorded call is the last of the solve. An accelerator is not asked before it whether all
                # went well, so there it is one more call.
                shared = forward.status.device.type == "cpu"
                return forward.evaluations + (not shared), 1
            case Unrolled() as body:
                return body.times, body.times
            case Residual() as body:
                return len(body.blocks), len(body.blocks)
            case body:
                raise TypeError(f"no body of this recipe that has been trained: {type(body).__name__}")

    def log_body(self, split: str, samples: int) -> None:
        """Log steps, residuals and statuses of an equilibrium."""
        if not isinstance(self.model.body, im.nn.DEQ):
            return
        solution = self.model.body.solution
        assert solution is not None  # the layer has just run
        relative = solution.residual / solution.value.flatten(start_dim=1).norm(dim=1)
        self.log(f"{split}/solver_steps", solution.steps.float().mean(), batch_size=samples)
        self.log(f"{split}/relative_residual", relative.mean(), batch_size=samples)
        for status in im.Status:
            if status is im.Status.RUNNING:
                continue
            count = (solution.status == status).sum().float()
            self.log(f"{split}/status_{status.name.lower()}", count, batch_size=samples, reduce_fx="sum")


def fit(name: ModelName, config: Config, data: ImageData, folder: Path) -> Result:
    """Train one network, or with `config.resume` continue from its checkpoint, if there is one; then test it.

    `folder` receives `last.ckpt`, `best.ckpt` (by accuracy on the held-out images) and TensorBoard's logs.

    Raises:
        CheckpointError: the checkpoint to resume from is damaged, or was made with other options.
    """
    seeded(config)
    return finish(Training(name, config, data), folder)


def main(config: Config) -> list[Result]:
    """Train the networks that `config` names, one after the other, and print how they compare."""
    console = Console()
    data, run = begin("deq-image", config, console)
    results = [fit(name, config, data, run / name) for name in config.models]
    note = "calls of f: forward + backward (vector-Jacobian products)"
    console.print(results_table(results, "accuracy", [note]))
    return results
