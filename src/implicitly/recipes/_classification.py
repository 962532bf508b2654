"""Recipes that train image classifiers side by side: their common options, training, costs and table."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from implicitly.data import ImageData, ImageSet, load_images
from implicitly.recipes._checkpoints import LAST, previous_of, read_checkpoint, refuse_shorter, run_folder
from implicitly.recipes._options import (
    OptionError,
    check_at_least,
    check_each_once,
    check_positive,
    check_seed,
    check_unused,
)
from implicitly.recipes._training import AtomicCheckpointIO, Batches, LastAndBest, TrainingBar, quiet_lightning
from implicitly.viz import peak_bytes

Precision = Literal["32-true", "64-true", "bf16-mixed", "16-mixed"]
Accelerator = Literal["auto", "cpu", "gpu", "cuda", "mps"]
# The dtype that f computes in.
DTYPES = {
    "32-true": torch.float32,
    "64-true": torch.float64,
    "bf16-mixed": torch.bfloat16,
    "16-mixed": torch.float16,
}


@dataclass(frozen=True)
class ImageConfig:
    """The options that all image recipes share."""

    dataset: ImageSet = "digits"
    """Data set. The digits come with scikit-learn; the others are read from --data or the Hugging Face hub."""
    data: Path | None = None
    """Folder that contains mnist/ or cifar10/. Default: the folder in the environment variable IMPLICITLY_DATA;
    if that is not set, the Hugging Face hub."""
    cache: Path = Path("runs/cache")
    """Folder in which decoded images are cached."""
    out: Path | None = None
    """Output folder for checkpoints and logs. Default: runs/RECIPE/DATASET-N, with the next free number N."""
    resume: bool = False
    """Continue the run in --out, or the newest run if --out is not given, from its last checkpoints."""
    models: tuple[str, ...] = ()
    """Which networks to train."""

    epochs: int = 12
    """Passes over the training set."""
    max_steps: int | None = None
    """Stop each training after this many steps, even in the middle of an epoch."""
    batch_size: int = 64
    """Images per training step."""
    learning_rate: float = 1e-3
    """Initial learning rate of Adam; a cosine schedule lowers it to 0."""
    validation: float = 0.1
    """Fraction of the training set that is held out to choose the best checkpoint."""
    seed: int = 0
    """Random seed of the initial weights, the held-out images and the order of the batches; runs on a CPU are
    exactly reproducible."""
    precision: Precision = "32-true"
    """Floating-point precision, as in Lightning's Trainer."""
    accelerator: Accelerator = "auto"
    """Device to train on, as in Lightning's Trainer."""
    progress: bool = True
    """Show a progress bar."""

    def __post_init__(self) -> None:
        check_at_least(self, 1, "epochs", "batch_size")
        if self.max_steps is not None:
            check_at_least(self, 1, "max_steps")
        check_positive(self, "learning_rate")
        if not 0 < self.validation < 1:
            raise ValueError(f"validation must lie between 0 and 1; got {self.validation}")
        check_each_once(self, "models")
        check_seed(self)
        if self.dataset == "digits":
            check_unused(self, "the digits come with scikit-learn", "data", "cache")
        check_accelerator(self.accelerator, self.precision)


def check_accelerator(accelerator: str, precision: str) -> None:
    """Raise ValueError if the accelerator is not available, or does not compute in the precision."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    available = {"auto": True, "cpu": True, "gpu": cuda or mps, "cuda": cuda, "mps": mps}
    if accelerator not in available:
        raise ValueError(f"accelerator must be one of {', '.join(available)}; got {accelerator}")
    if not available[accelerator]:
        there = ", ".join(name for name, is_there in available.items() if is_there)
        raise ValueError(f"accelerator must be one that PyTorch finds on this machine: {there}; got {accelerator}")
    on_cpu = accelerator == "cpu" or not (cuda or mps)
    if precision == "16-mixed" and on_cpu:
        raise ValueError(f"precision must be one that a CPU supports, such as bf16-mixed; got {precision}")


class Classifier(nn.Module):
    """Stem, body, head: images `(batch, channels, height, width)` to logits `(batch, classes)`."""

    def __init__(self, stem: nn.Module, body: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.stem = stem
        self.body = body
        self.head = head

    def forward(self, images: Tensor, index: Tensor | None = None) -> Tensor:
        """The logits; `index` `(batch,)` is for bodies that need to know which images these are."""
        x = self.stem(images)
        # Under mixed precision the convolutions run in 16 bits; the solver measures its errors in 32.
        x = x.to(next(self.head.parameters()).dtype)
        return self.head(self.body(x) if index is None else self.body(x, index=index))


def count_parameters(module: nn.Module) -> int:
    """The number of trainable parameters in `module`."""
    return sum(parameter.numel() for parameter in module.parameters())


@dataclass
class Costs:
    """What training one network has cost so far; part of checkpoints, so that a resumed run knows all of it."""

    steps: int = 0
    forward_calls: int = 0  # of f: the body's cell, vector field or block
    backward_calls: int = 0
    seconds: float = 0.0
    timed_steps: int = 0
    peak_bytes: int = 0  # of one training step, beyond weights and optimiser state


class ImageTraining(L.LightningModule, ABC):
    """Trains one classifier, and records the costs.

    Args:
        name: the name of the network, among those of the recipe.
        model: the network, with fresh weights.
    """

    recipe: ClassVar[str]
    # What its checkpoints hold besides what the Trainer writes.
    kept: ClassVar[tuple[str, ...]] = ("costs",)
    # Options that a resumed run may change: where, how long and on what it runs, and what is measured later.
    free: ClassVar[frozenset[str]] = frozenset(
        {"data", "cache", "out", "resume", "models", "epochs", "max_steps", "accelerator", "progress"}
    )

    def __init__(self, name: str, config: ImageConfig, data: ImageData, model: Classifier) -> None:
        super().__init__()
        self.name = name
        self.config = config
        self.data = data
        self.model = model
        self.costs = Costs()
        order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(config.seed))
        held_out = max(1, round(config.validation * len(order)))
        if held_out >= len(order):
            raise OptionError(
                f"validation={config.validation:g} holds out all {len(order):,} images and leaves none for "
                "training; try a smaller fraction"
            )
        self.validation_rows, self.training_rows = order[:held_out], order[held_out:]
        self.batches_per_epoch = -(-len(self.training_rows) // config.batch_size)

    @abstractmethod
    def calls_of_f(self) -> tuple[int, int]:
        """The calls of f in the last training step, forward and backward."""

    def log_body(self, split: str, samples: int) -> None:
        """Log further quantities of the batch that the network has just seen."""

    @property
    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree with to be resumed."""
        fields = dataclasses.asdict(self.config).items()
        return {"recipe": self.recipe, "model": self.name} | {k: v for k, v in fields if k not in self.free}

    def train_dataloader(self) -> Batches:
        """The batches of one epoch; their order depends on seed and epoch alone, in a resumed run too."""
        seed = 1_000_003 * self.config.seed + self.current_epoch
        return Batches(self.data.train, self.training_rows, self.config.batch_size, seed)

    def val_dataloader(self) -> Batches:
        """The images that were held out of the training set."""
        return Batches(self.data.train, self.validation_rows, 4 * self.config.batch_size)

    def test_dataloader(self) -> Batches:
        """The test set."""
        return Batches(self.data.test, torch.arange(len(self.data.test)), 4 * self.config.batch_size)

    def configure_optimizers(self) -> Any:
        """Adam, with a cosine schedule that lowers the learning rate to zero."""
        optimizer = torch.optim.Adam(self.model.parameters(), lr=self.config.learning_rate)
        steps = self.config.epochs * self.batches_per_epoch
        steps = min(steps, self.config.max_steps or steps)
        cosine = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * min(step / steps, 1)))
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cosine, "interval": "step"}}

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        """The loss of one batch."""
        return self._evaluate(batch, "train")

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the loss and accuracy on held-out images."""
        self._evaluate(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the loss and accuracy on test images."""
        self._evaluate(batch, "test")

    def _evaluate(self, batch: tuple[Tensor, ...], split: str) -> Tensor:
        images, labels, *index = batch
        logits = self.model(images, *index)
        loss = F.cross_entropy(logits, labels)
        accuracy = (logits.argmax(dim=1) == labels).float().mean()
        self.log(f"{split}/loss", loss, batch_size=len(labels), prog_bar=split == "train")
        self.log(f"{split}/accuracy", accuracy, batch_size=len(labels), prog_bar=split == "val")
        self.log_body(split, len(labels))
        return loss

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """Time one training step (the closure runs forward and backward); of the second, measure the memory."""
        step = functools.partial(super().optimizer_step, epoch, batch_idx, optimizer, optimizer_closure)
        match self.costs.steps:
            case 0:  # allocates Adam's state and warms up, so it is no measure of the others
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
        # Not in on_train_batch_end: a run that stops within an epoch has written its checkpoint before that.
        self.count_calls(*self.calls_of_f())

    def count_calls(self, forward: int, backward: int) -> None:
        """Record the calls of f in the step that has just been taken."""
        self.costs.steps += 1
        self.costs.forward_calls += forward
        self.costs.backward_calls += backward

    def _wait_for_device(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the identity of the run and its costs."""
        checkpoint["identity"] = self.identity
        checkpoint["costs"] = dataclasses.asdict(self.costs)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the costs."""
        self.costs = Costs(**checkpoint["costs"])


@dataclass(frozen=True)
class Result:
    """One row of the table, and the trained network."""

    name: str
    training: ImageTraining
    folder: Path
    test_accuracy: float  # of the last weights, so that nothing is chosen by the test set
    parameters: int
    costs: Costs
    device: str  # that it was trained on; afterwards it is back on the CPU

    @property
    def seconds_per_epoch(self) -> float:
        """Seconds of training alone, without validation; NaN for a run of fewer than three steps."""
        if self.costs.timed_steps == 0:
            return math.nan
        return self.costs.seconds / self.costs.timed_steps * self.training.batches_per_epoch


def seeded(config: ImageConfig) -> None:
    """Seed torch; called anew for each network, so that none depends on the others."""
    L.seed_everything(config.seed, verbose=False)


def finish(training: ImageTraining, folder: Path) -> Result:
    """Train, or with `config.resume` continue from the checkpoint, if there is one; then test.

    `folder` receives `last.ckpt`, `best.ckpt` (by accuracy on the held-out images) and TensorBoard's logs.

    Raises:
        CheckpointError: the checkpoint to resume from is damaged, or was made with other options.
    """
    config = training.config
    last = folder / LAST
    resume = config.resume and (last.exists() or previous_of(last).exists())
    if resume:
        checkpoint = read_checkpoint(last, training.identity, training.kept)
        refuse_shorter(last, checkpoint, config.epochs, config.max_steps)
    callbacks: list[L.Callback] = [LastAndBest(folder, monitor="val/accuracy")]
    if config.progress:
        callbacks.append(TrainingBar(training.name))
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
    parameters, device = count_parameters(training.model), str(trainer.strategy.root_device)
    return Result(training.name, training, folder, accuracy, parameters, training.costs, device)


def evaluate(training: ImageTraining) -> dict[str, float]:
    """Test a trained network once more, and return what it logs; no files are changed."""
    config = training.config
    with quiet_lightning():
        trainer = L.Trainer(
            accelerator=config.accelerator,
            devices=1,
            precision=config.precision,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        return dict(trainer.test(training, verbose=False)[0])


def begin(recipe: str, config: ImageConfig, console: Console) -> tuple[ImageData, Path]:
    """The images, and the folder of the run.

    Raises:
        CheckpointError: there is nothing to resume, or checkpoints would be overwritten.
        FileNotFoundError, DataError: of the images.
    """
    data = load_images(config.dataset, config.data, config.cache)
    run = run_folder(Path("runs") / recipe, config.dataset, config.out, config.resume)
    console.print(
        f"{data.name}: {len(data.train):,} training images, {len(data.test):,} test images; output in {run}"
    )
    return data, run


def results_table(
    results: Sequence[Result], quality: Literal["accuracy", "error"], notes: Iterable[str] = ()
) -> Table:
    """The comparison, as a table for `rich` to print, with `notes` under it."""
    training = results[0].training
    config, data = training.config, training.data
    settings = [f"epochs: {config.epochs}", f"batch: {config.batch_size}", f"seed: {config.seed}"]
    if config.max_steps is not None:
        settings.append(f"stopped after {config.max_steps} steps")
    settings.append(f"on {results[0].device}")
    lines = [", ".join(settings), *notes, *([f"Note: {data.note}"] if data.note else [])]
    table = Table(title=f"{training.recipe} on {data.name}", caption="\n".join(lines))
    table.add_column("network\n", no_wrap=True)
    headings = "\nparameters", "peak memory\nper step", "calls of f\nper step", "seconds\nper epoch"
    for heading in (f"test\n{quality}", *headings):
        table.add_column(heading, justify="right", no_wrap=True)
    for result in results:
        costs, right = result.costs, result.test_accuracy
        table.add_row(
            result.name,
            percent(right if quality == "accuracy" else 1 - right),
            f"{result.parameters:,}",
            f"{costs.peak_bytes / 2**20:.1f} MiB",
            f"{costs.forward_calls / costs.steps:.1f} + {costs.backward_calls / costs.steps:.1f}",
            f"{result.seconds_per_epoch:.1f}",
        )
    return table


def percent(share: float) -> str:
    """Format a share: 0.5 becomes "50.00 %"."""
    return f"{100 * share:.2f} %"
