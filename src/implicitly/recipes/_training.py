"""What every recipe needs around Lightning's Trainer: batches, checkpoints that survive, one progress bar."""

from __future__ import annotations

import logging
import os
import pickle
import re
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

LAST, BEST = "last.ckpt", "best.ckpt"
# What torch.load raises for files that are cut short, overwritten, or no checkpoints at all.
UNREADABLE = (OSError, EOFError, RuntimeError, KeyError, ValueError, pickle.UnpicklingError)


class CheckpointError(RuntimeError):
    """A checkpoint is missing, damaged, or another recipe's. The message says which, where, and what to try."""


# Of PyTorch's, met by Lightning 2.6 in its own code.
LIGHTNING_DEPRECATIONS = [r"`isinstance\(treespec, LeafSpec\)` is deprecated"]


def previous_of(path: Path) -> Path:
    """Where the checkpoint is kept that the one at `path` replaced."""
    return path.with_suffix(".previous.ckpt")


class Batches:
    """Batches of some rows of a data set that lies in memory, shuffled where a seed is given.

    A `DataLoader` would fetch the rows one by one and stack them again; here one indexing makes a batch.
    """

    def __init__(
        self, dataset: TensorDataset, rows: torch.Tensor, batch_size: int, seed: int | None = None
    ) -> None:
        self.dataset = dataset
        self.rows = rows
        self.batch_size = batch_size
        self.seed = seed

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, ...]]:
        rows = self.rows
        if self.seed is not None:
            generator = torch.Generator().manual_seed(self.seed)
            rows = rows[torch.randperm(len(rows), generator=generator)]
        for chunk in rows.split(self.batch_size):
            yield tuple(tensor[chunk] for tensor in self.dataset.tensors)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its final name, and renames it when all bytes are on the disk.

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
            raise TypeError(f"a local checkpoint has no storage options; got {storage_options!r}")
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
    """After each epoch, saves `last.ckpt`, and `best.ckpt` where `monitor` is higher than ever before."""

    def __init__(self, folder: Path, monitor: str) -> None:
        super().__init__()
        self.folder = folder
        self.monitor = monitor
        self.best = float("-inf")

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Lightning's hook, called after validation."""
        value = trainer.callback_metrics.get(self.monitor)  # absent where `max_steps` cut the epoch short
        improved = value is not None and float(value) > self.best
        if value is not None and improved:
            self.best = float(value)
        trainer.save_checkpoint(self.folder / LAST)
        if improved:
            trainer.save_checkpoint(self.folder / BEST)

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Lightning's hook: say what an interrupted run can go on from."""
        if isinstance(exception, KeyboardInterrupt):
            last = self.folder / LAST
            kept = f"{last} is kept: continue with --resume" if last.exists() else "no epoch was finished"
            Console(stderr=True).print(f"interrupted in epoch {trainer.current_epoch + 1}; {kept}")

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of this callback."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what a checkpoint kept."""
        self.best = state_dict["best"]


def read_checkpoint(path: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """Read a checkpoint, and make sure that it belongs to what is being trained.

    Args:
        path: a file written by the Trainer.
        identity: plain values which `checkpoint["identity"]` must equal: the recipe, the model, its shape.

    Returns:
        The checkpoint, its tensors on the CPU.

    Raises:
        CheckpointError: there is no such file, it is damaged, or its identity is another. Where an intact
            checkpoint lies beside it, the message names it.
    """
    try:
        checkpoint = _load(path)
    except UNREADABLE as error:
        size = f"{path.stat().st_size:,} bytes" if path.is_file() else "no such file"
        raise CheckpointError(
            f"cannot read the checkpoint {path} ({size}): {_first_line(error)}. {_remedy(path, identity)}"
        ) from error
    differences = _differences(checkpoint, identity)
    if differences:
        raise CheckpointError(
            f"the checkpoint {path} is not this run's: {'; '.join(differences)}. "
            "Resume with the options it was trained with, or start anew in another folder (--out FOLDER)."
        )
    return checkpoint


def _load(path: Path) -> dict[str, Any]:
    return torch.load(path, map_location="cpu", weights_only=True)


def _differences(checkpoint: dict[str, Any], identity: dict[str, Any]) -> list[str]:
    found = checkpoint.get("identity")
    if not isinstance(found, dict):
        return [f"it does not say what it belongs to, and this is {identity['recipe']}"]
    keys = ["recipe"] if found.get("recipe") != identity["recipe"] else list(identity)
    return [
        f"its {key} is {found.get(key)}, here it is {identity[key]}"
        for key in keys
        if found.get(key) != identity[key]
    ]


def _remedy(path: Path, identity: dict[str, Any]) -> str:
    """Name the newest checkpoint beside `path` that can be read and belongs to the run."""
    for candidate in (previous_of(path), path.with_name(BEST)):
        try:
            checkpoint = _load(candidate)
        except UNREADABLE:
            continue  # as unusable as `path`: the next may be better, and the message below covers none
        if not _differences(checkpoint, identity):
            return (
                f"The checkpoint {candidate}, of epoch {checkpoint['epoch'] + 1}, is intact: "
                f"to continue from it, copy it to {path} and resume again."
            )
    return "There is no intact checkpoint beside it: start anew in another folder (--out FOLDER)."


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0] or 'the file ends too early'}"


def run_folder(parent: Path, name: str, out: Path | None, resume: bool) -> Path:
    """The folder of a run: `out`, else `parent/name-N`, the newest one to resume or else the next free one.

    Raises:
        CheckpointError: there is nothing to resume, or a new run would overwrite the checkpoints in `out`.
    """
    if out is not None:
        found = any(out.glob(f"*/{LAST}")) or any(out.glob(f"*/{previous_of(Path(LAST))}"))
        if resume and not found:
            raise CheckpointError(
                f"nothing to resume: {out.absolute()} holds no MODEL/{LAST}. Leave out --resume to start anew."
            )
        if found and not resume:
            raise CheckpointError(
                f"{out.absolute()} holds the checkpoints of another run: continue it with --resume, "
                "or name another folder (--out FOLDER)."
            )
        return out
    pattern = re.compile(re.escape(name) + r"-(\d+)")
    numbers = [int(m[1]) for p in parent.glob(f"{name}-*") if (m := pattern.fullmatch(p.name))]
    if resume and not numbers:
        raise CheckpointError(
            f"nothing to resume: there is no {parent.absolute() / name}-N. "
            "Leave out --resume to start anew, or name the run's folder (--out FOLDER)."
        )
    return parent / f"{name}-{max(numbers, default=0) + (not resume)}"


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Keep from the screen what a user can do nothing about; warnings about the training still appear.

    These are Lightning's informational messages (devices found, products to try), and the deprecations that
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
    """One bar for a whole training: steps done, time left, and the metrics that are logged for it."""

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

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Lightning's hook: leave the terminal usable."""
        self._stop()

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
