"""deq-image: classify images by the equilibrium of one convolutional cell.

A residual network stacks blocks. Let all blocks be the same one, and stack infinitely many: if the
activations settle, they settle at a point z with z = f(z, x). A deep equilibrium model (Bai, Kolter and
Koltun, 2019, arXiv:1909.01377) asks a solver for that point, and the implicit function theorem for its
derivative, so it stores the activations of one block where the stack stores those of all.

Three networks of equal size are trained side by side, and one table compares them:

    deq       the equilibrium of one cell
    unrolled  the same cell applied a fixed number of times, differentiated by plain autograd
    resnet    blocks of the same shape as the cell, each with weights of its own, and fewer channels
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import implicitly as im
from implicitly.data import ImageData, ImageSet, load_images
from implicitly.recipes._checkpoints import LAST, previous_of, read_checkpoint, run_folder
from implicitly.recipes._training import (
    AtomicCheckpointIO,
    Batches,
    LastAndBest,
    TrainingBar,
    quiet_lightning,
)
from implicitly.viz import peak_bytes

ModelName = Literal["deq", "unrolled", "resnet"]
Precision = Literal["32-true", "64-true", "bf16-mixed", "16-mixed"]


@dataclass(frozen=True)
class Config:
    """Image classification by the equilibrium of one convolutional cell, beside a ResNet of equal size."""

    dataset: ImageSet = "digits"
    """What to classify. The digits come with scikit-learn; the others from a folder or the hub."""
    data: Path | None = None
    """Folder that holds mnist/ or cifar10/. Default: what IMPLICITLY_DATA names, else the hub."""
    cache: Path = Path("runs/cache")
    """Folder for decoded images."""
    out: Path | None = None
    """Folder of the run: checkpoints and logs. Default: runs/deq-image/DATASET-N, the next N."""
    resume: bool = False
    """Continue the run in --out, or else the newest one, from its last checkpoints."""
    models: tuple[ModelName, ...] = ("deq", "unrolled", "resnet")
    """Which networks to train."""

    epochs: int = 12
    """Passes over the training set."""
    max_steps: int | None = None
    """Stop each training after so many steps, even within an epoch."""
    batch_size: int = 64
    """Images in a training step."""
    learning_rate: float = 1e-3
    """Of Adam at the start; it falls to 0 along a cosine."""
    validation: float = 0.1
    """Share of the training set that is held out to choose the best checkpoint."""
    seed: int = 0
    """Fixes the weights, the held-out images and the order of the batches (exactly so on a CPU)."""
    precision: Precision = "32-true"
    """Of Lightning's Trainer."""
    accelerator: str = "auto"
    """Of Lightning's Trainer: auto, cpu, gpu, ..."""
    progress: bool = True
    """Show a progress bar."""

    channels: int = 48
    """Channels of the equilibrium z."""
    inner_channels: int = 64
    """Channels between the two convolutions of the cell."""
    groups: int = 8
    """Groups of the group norms; divides both numbers of channels."""
    stem_stride: int = 1
    """2 halves height and width before the cell, which makes everything about four times cheaper."""
    pooled_size: int = 4
    """Height and width that average pooling leaves to the last, linear layer."""
    rtol: float = 1e-2
    """The solver stops at |f(z) - z| <= rtol |f(z)|."""
    solver_steps: int = 25
    """Most steps of the solver."""
    history: int = 5
    """Iterates that Anderson acceleration combines."""
    unroll: int = 10
    """Applications of the cell in the unrolled net."""
    blocks: int = 4
    """Residual blocks of the ResNet."""

    def __post_init__(self) -> None:
        least = {"epochs": 1, "batch_size": 1, "channels": 1, "stem_stride": 1, "unroll": 1, "blocks": 1}
        for name, minimum in least.items():
            if getattr(self, name) < minimum:
                raise ValueError(f"{name} must be at least {minimum}; got {getattr(self, name)}")
        if self.max_steps is not None and self.max_steps < 1:
            raise ValueError(f"max_steps must be at least 1; got {self.max_steps}")
        if not 0 < self.validation < 1:
            raise ValueError(f"validation must lie between 0 and 1; got {self.validation}")
        if self.groups < 1 or self.channels % self.groups or self.inner_channels % self.groups:
            raise ValueError(
                f"groups must divide channels and inner_channels; got {self.groups}, {self.channels} and "
                f"{self.inner_channels}"
            )
        if not self.models or len(set(self.models)) < len(self.models):
            raise ValueError(f"models must name at least one, and each once; got {self.models}")


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
    """Blocks of the cell's shape, each with weights of its own."""

    def __init__(self, blocks: list[Cell]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        """The output of the last block, of the shape of `x`."""
        for block in self.blocks:
            x = block(x, 0.0)
        return x


class Classifier(nn.Module):
    """Stem, body, head: images `(batch, data.channels, height, width)` to logits `(batch, data.classes)`."""

    def __init__(self, body: nn.Module, channels: int, config: Config, data: ImageData) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(data.channels, channels, 3, stride=config.stem_stride, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )
        self.body = body
        self.head = nn.Sequential(
            nn.BatchNorm2d(channels),
            nn.AdaptiveAvgPool2d(config.pooled_size),
            nn.Flatten(),
            nn.Linear(channels * config.pooled_size**2, data.classes),
        )

    def forward(self, images: Tensor) -> Tensor:
        """The logits."""
        x = self.stem(images)
        # Under mixed precision the convolutions run in 16 bits; the solver measures its residuals in 32.
        return self.head(self.body(x.to(self.head[-1].weight.dtype)))


def build(name: ModelName, config: Config, data: ImageData) -> Classifier:
    """The network called `name`, with fresh weights."""
    if name == "resnet":
        return _build_resnet(*_resnet_widths(config, data), config, data)
    cell = Cell(config.channels, config.inner_channels, config.groups)
    if name == "deq":
        solver = im.Anderson(history=config.history, rtol=config.rtol, max_steps=config.solver_steps)
        # A short Krylov basis saves memory, and at this tolerance some ten products are enough. The gradient
        # of a mean is small for each sample, so no absolute tolerance may decide what is small enough.
        linear_solver = im.GMRES(restart=10, rtol=config.rtol, atol=0.0, max_steps=config.solver_steps)
        adjoint = im.ImplicitAdjoint(linear_solver=linear_solver)
        # Samples that run out of steps are counted in the logs; a warning at each step would say no more.
        body = im.nn.DEQ(cell, solver=solver, adjoint=adjoint, on_failure="ignore")
    else:
        body = Unrolled(cell, config.unroll)
    return Classifier(body, config.channels, config, data)


def _build_resnet(channels: int, inner_channels: int, config: Config, data: ImageData) -> Classifier:
    blocks = [Cell(channels, inner_channels, config.groups) for _ in range(config.blocks)]
    return Classifier(Residual(blocks), channels, config, data)


def _resnet_widths(config: Config, data: ImageData) -> tuple[int, int]:
    """Channels and inner channels with which the ResNet has as many parameters as the others.

    Among the widths that come within 3 %, those closest to the proportions of the cell.
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


def count_parameters(module: nn.Module) -> int:
    """Trained numbers in `module`."""
    return sum(parameter.numel() for parameter in module.parameters())


# --- The training -----------------------------------------------------------------------------------------


@dataclass
class Costs:
    """What training one network has cost so far; checkpoints keep it, so that a resumed run knows it all."""

    steps: int = 0
    forward_calls: int = 0  # of the cell, or a block
    backward_calls: int = 0  # products with the transposed Jacobian of the cell, or a block
    seconds: float = 0.0
    timed_steps: int = 0
    peak_bytes: int = 0  # of one training step, beyond weights and optimiser state


class Training(L.LightningModule):
    """Trains one network, logs how its solver fares, and takes note of the costs."""

    def __init__(self, name: ModelName, config: Config, data: ImageData) -> None:
        super().__init__()
        self.name = name
        self.config = config
        self.data = data
        self.model = build(name, config, data)
        self.costs = Costs()
        order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(config.seed))
        held_out = max(1, round(config.validation * len(order)))
        self.validation_rows, self.training_rows = order[:held_out], order[held_out:]
        self.batches_per_epoch = -(-len(self.training_rows) // config.batch_size)

    @property
    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree with to be resumed: all but where, how long and on what it runs."""
        free = {"data", "cache", "out", "resume", "models", "epochs", "max_steps", "accelerator", "progress"}
        fields = {key: value for key, value in dataclasses.asdict(self.config).items() if key not in free}
        return {"recipe": "deq-image", "model": self.name} | fields

    def train_dataloader(self) -> Batches:
        """Made anew for each epoch: its order depends on seed and epoch alone, in a resumed run too."""
        seed = 1_000_003 * self.config.seed + self.current_epoch
        return Batches(self.data.train, self.training_rows, self.config.batch_size, seed)

    def val_dataloader(self) -> Batches:
        """The images that were held out of the training set."""
        return Batches(self.data.train, self.validation_rows, 4 * self.config.batch_size)

    def test_dataloader(self) -> Batches:
        """The test set."""
        return Batches(self.data.test, torch.arange(len(self.data.test)), 4 * self.config.batch_size)

    def configure_optimizers(self) -> Any:
        """Adam, its learning rate falling to zero along a cosine."""
        optimizer = torch.optim.Adam(self.model.parameters(), lr=self.config.learning_rate)
        steps = self.config.epochs * self.batches_per_epoch
        steps = min(steps, self.config.max_steps or steps)
        cosine = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * min(step / steps, 1)))
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cosine, "interval": "step"}}

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of one batch."""
        return self._evaluate(batch, "train")

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log how the held-out images fare."""
        self._evaluate(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log how the test images fare."""
        self._evaluate(batch, "test")

    def _evaluate(self, batch: tuple[Tensor, Tensor], split: str) -> Tensor:
        images, labels = batch
        logits = self.model(images)
        loss = F.cross_entropy(logits, labels)
        accuracy = (logits.argmax(dim=1) == labels).float().mean()
        self.log(f"{split}/loss", loss, batch_size=len(labels), prog_bar=split == "train")
        self.log(f"{split}/accuracy", accuracy, batch_size=len(labels), prog_bar=split == "val")
        if isinstance(self.model.body, im.nn.DEQ):
            self._log_solver(self.model.body, split)
        return loss

    def _log_solver(self, layer: im.nn.DEQ, split: str) -> None:
        solution = layer.solution
        assert solution is not None  # the layer has just run
        samples = len(solution.status)
        relative = solution.residual / solution.value.flatten(start_dim=1).norm(dim=1)
        self.log(f"{split}/solver_steps", solution.steps.float().mean(), batch_size=samples)
        self.log(f"{split}/relative_residual", relative.mean(), batch_size=samples)
        for status in im.Status:
            if status is im.Status.RUNNING:
                continue
            count = (solution.status == status).sum().float()
            self.log(f"{split}/status_{status.name.lower()}", count, batch_size=samples, reduce_fx="sum")

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """One training step (the closure runs forward and backward), timed; of the second, the memory."""
        step = functools.partial(super().optimizer_step, epoch, batch_idx, optimizer, optimizer_closure)
        match self.costs.steps:
            case 0:  # allocates Adam's state and warms up: tells nothing about the others
                step()
            case 1:
                self.costs.peak_bytes = peak_bytes(step, self.device)
            case _:
                self._wait_for_device()
                start = time.perf_counter()
                step()
                self._wait_for_device()
                self.costs.seconds += time.perf_counter() - start
                self.costs.timed_steps += 1

    def _wait_for_device(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count the calls of f."""
        forward, backward = calls_of_f(self.model.body)
        self.costs.steps += 1
        self.costs.forward_calls += forward
        self.costs.backward_calls += backward

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say whose checkpoint it is, and what it has cost."""
        checkpoint["identity"] = self.identity
        checkpoint["costs"] = dataclasses.asdict(self.costs)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take back what it has cost."""
        self.costs = Costs(**checkpoint["costs"])


def calls_of_f(body: nn.Module) -> tuple[int, int]:
    """Calls of the cell (or of a block) in the last training step: forward, and backward."""
    match body:
        case im.nn.DEQ(solution=im.Solution() as forward, backward_solution=im.Solution() as backward):
            return forward.evaluations, backward.evaluations
        case Unrolled():
            return body.times, body.times
        case Residual():
            return len(body.blocks), len(body.blocks)
        case _:
            raise TypeError(f"no body of this recipe that has been trained: {type(body).__name__}")


@dataclass(frozen=True)
class Result:
    """One row of the table, and the trained network."""

    name: ModelName
    training: Training
    folder: Path
    test_accuracy: float  # of the last weights, so that no choice was made on the test set
    parameters: int
    costs: Costs

    @property
    def seconds_per_epoch(self) -> float:
        """Of training alone, without validation; NaN for a run of fewer than three steps."""
        if self.costs.timed_steps == 0:
            return math.nan
        return self.costs.seconds / self.costs.timed_steps * self.training.batches_per_epoch


def fit(name: ModelName, config: Config, data: ImageData, folder: Path) -> Result:
    """Train one network, or finish its training where `config.resume` and a checkpoint say so; then test it.

    `folder` receives `last.ckpt`, `best.ckpt` (by accuracy on the held-out images) and TensorBoard's logs.

    Raises:
        CheckpointError: the checkpoint to resume from is damaged, or was made with other options.
    """
    L.seed_everything(config.seed, verbose=False)  # for each network, so that none depends on the others
    training = Training(name, config, data)
    last = folder / LAST
    resume = config.resume and (last.exists() or previous_of(last).exists())
    if resume:
        read_checkpoint(last, training.identity)
    callbacks: list[L.Callback] = [LastAndBest(folder, monitor="val/accuracy")]
    if config.progress:
        callbacks.append(TrainingBar(name))
    with quiet_lightning():
        trainer = L.Trainer(
            accelerator=config.accelerator,
            devices=1,
            precision=config.precision,
            max_epochs=config.epochs,
            max_steps=config.max_steps or -1,
            reload_dataloaders_every_n_epochs=1,
            num_sanity_val_steps=0,
            log_every_n_steps=max(1, min(50, training.batches_per_epoch // 10)),
            callbacks=callbacks,
            plugins=[AtomicCheckpointIO()],
            logger=TensorBoardLogger(folder, name="", version="logs"),
            default_root_dir=folder,
            enable_progress_bar=config.progress,
            enable_model_summary=False,
        )
        trainer.fit(training, ckpt_path=last if resume else None, weights_only=True)
        accuracy = trainer.test(training, verbose=False)[0]["test/accuracy"]
    return Result(name, training, folder, accuracy, count_parameters(training.model), training.costs)


def results_table(results: list[Result], config: Config, data: ImageData) -> Table:
    """The comparison, for `rich` to print."""
    table = Table(title=f"deq-image on {data.name}", caption=_caption(results, config, data))
    table.add_column("network\n", no_wrap=True)
    for heading in (
        "test\naccuracy",
        "\nparameters",
        "peak memory\nof a step",
        "calls of f\na step",
        "seconds\nan epoch",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for result in results:
        costs = result.costs
        table.add_row(
            result.name,
            f"{100 * result.test_accuracy:.2f} %",
            f"{result.parameters:,}",
            f"{costs.peak_bytes / 2**20:.1f} MiB",
            f"{costs.forward_calls / costs.steps:.1f} + {costs.backward_calls / costs.steps:.1f}",
            f"{result.seconds_per_epoch:.1f}",
        )
    return table


def _caption(results: list[Result], config: Config, data: ImageData) -> str:
    parts = [f"epochs: {config.epochs}", f"batch: {config.batch_size}", f"seed: {config.seed}"]
    if config.max_steps is not None:
        parts.append(f"stopped after {config.max_steps} steps")
    parts.append(f"on {results[0].training.device}")
    lines = [", ".join(parts), "calls of f: forward + backward (products with its transposed Jacobian)"]
    if data.note:
        lines.append(f"Note: {data.note}")
    return "\n".join(lines)


def main(config: Config) -> list[Result]:
    """Train the networks that `config` names, one after the other, and print how they compare."""
    console = Console()
    data = load_images(config.dataset, config.data, config.cache)
    run = run_folder(Path("runs") / "deq-image", config.dataset, config.out, config.resume)
    console.print(f"{data.name}: {len(data.train):,} images to train, {len(data.test):,} to test; run in {run}")
    results = [fit(name, config, data, run / name) for name in config.models]
    console.print(results_table(results, config, data))
    return results
