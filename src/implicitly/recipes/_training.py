"""What a recipe needs around Lightning's Trainer: batches, checkpoints that survive, one progress bar."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.data import TensorDataset

from implicitly.recipes._checkpoints import BEST, LAST, previous_of

# Deprecations of PyTorch that Lightning 2.6 meets in its own code.
LIGHTNING_DEPRECATIONS = [r"`isinstance\(treespec, LeafSpec\)` is deprecated"]


class Batches:
    """Batches of some rows of a data set in memory, shuffled if a seed is given.

    A `DataLoader` would fetch the rows one by one and stack them again; here a single indexing operation makes a
    batch. The position is part of a checkpoint, so a run that stopped within an epoch resumes with the next batch.
    """

    def __init__(
        self, dataset: TensorDataset, rows: torch.Tensor, batch_size: int, seed: int | None = None
    ) -> None:
        self.dataset = dataset
        self.rows = rows
        self.batch_size = batch_size
        self.seed = seed
        self._begin = 0
        self._done = 0

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, ...]]:
        rows = self.rows
        if self.seed is not None:
            generator = torch.Generator().manual_seed(self.seed)
            rows = rows[torch.randperm(len(rows), generator=generator)]
        begin, self._begin = self._begin, 0
        for number, chunk in enumerate(rows.split(self.batch_size)):
            if number >= begin:
                self._done = number + 1
                yield tuple(tensor[chunk] for tensor in self.dataset.tensors)

    def state_dict(self) -> dict[str, int]:
        """The number of batches of this epoch that are done."""
        return {"done": self._done}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Begin the next pass after the batches that were done, or at 0 if those were all."""
        self._begin = state_dict["done"] % len(self)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint under a temporary name, and renames it once all bytes are on the disk.

    An interrupted write thus leaves the old file as it was. The file that a complete write replaces is kept
    under `NAME.previous.ckpt`.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: object = None
    ) -> None:
        """Write `checkpoint` to the local file `path`.

        Raises:
            TypeError: `storage_options` are given, which local files do not have.
        """
        if storage_options is not None:
            raise TypeError(
                f"storage_options must be None, as checkpoints are local files; got {storage_options!r}"
            )
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".part")
        with partial.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            path.replace(previous_of(path))
        partial.replace(path)


class LastAndBest(Checkpoint):
    """Saves `last.ckpt` after each epoch, and `best.ckpt` when `monitor` is higher than ever before.

    If `max_steps` ends the training within an epoch, `last.ckpt` holds the state at that step.
    """

    def __init__(self, folder: Path, monitor: str) -> None:
        super().__init__()
        self.folder = folder
        self.monitor = monitor
        self.best = float("-inf")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Lightning's hook; only here does Lightning count the epoch as unfinished."""
        if trainer.global_step == trainer.max_steps and not trainer.is_last_batch:
            trainer.save_checkpoint(self.folder / LAST)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Lightning's hook, called after validation."""
        if not trainer.is_last_batch:
            return
        value = float(trainer.callback_metrics[self.monitor])
        improved = value > self.best
        self.best = max(value, self.best)
        trainer.save_checkpoint(self.folder / LAST)
        if improved:
            trainer.save_checkpoint(self.folder / BEST)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Lightning's hook: say what an interrupted run can be resumed from."""
        if isinstance(exception, KeyboardInterrupt):
            last = self.folder / LAST
            kept = (
                f"{last} is saved: continue with --resume" if last.exists() else "no checkpoint has been saved yet"
            )
            message = f"interrupted in epoch {trainer.current_epoch + 1}; {kept}"
            Console(stderr=True).print(message, soft_wrap=True, highlight=False)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of this callback."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what a checkpoint kept."""
        self.best = state_dict["best"]


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Hide messages that a user can do nothing about; warnings about the training still appear.

    Hidden are Lightning's informational messages (devices found, products to try), and the deprecations that
    it runs into itself.
    """
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            for message in LIGHTNING_DEPRECATIONS:
                warnings.filterwarnings("ignore", message, FutureWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


class TrainingBar(ProgressBar):
    """One progress bar for a whole training: steps done, time left, and the metrics logged for it."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self._progress: Progress | None = None

    def disable(self) -> None:
        """Show nothing, as Lightning asks on all but the first of several processes."""
        self._progress = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Lightning's hook."""
        self._progress = Progress(
            TextColumn("[bold]{task.fields[name]:<8}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.fields[metrics]}"),
        )
        self._task = self._progress.add_task(
            "", name=self.name, metrics="", total=trainer.estimated_stepping_batches
        )
        self._progress.start()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Lightning's hook."""
        if self._progress is not None:
            self._progress.update(self._task, completed=trainer.global_step)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Lightning's hook."""
        if self._progress is not None:
            shown = self.get_metrics(trainer, pl_module)
            shown.pop("v_num", None)
            metrics = "  ".join(f"{name.rpartition('/')[2]} {value:.3f}" for name, value in shown.items())
            self._progress.update(self._task, metrics=metrics)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Lightning's hook."""
        self._stop()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Lightning's hook: leave the terminal usable."""
        self._stop()

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
