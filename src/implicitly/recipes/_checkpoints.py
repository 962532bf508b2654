"""Checkpoint files: where a run keeps them, which may be resumed, and what to say if one may not."""

from __future__ import annotations

import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch

LAST, BEST = "last.ckpt", "best.ckpt"
# What Lightning's Trainer needs to resume.
PARTS = ("state_dict", "optimizer_states", "lr_schedulers", "loops", "callbacks", "epoch", "global_step")
# What `_load` raises for files that are missing, truncated, or not checkpoints at all.
UNREADABLE = (OSError, RuntimeError, pickle.UnpicklingError, zipfile.BadZipFile)


class CheckpointError(RuntimeError):
    """A checkpoint is missing, damaged, or of another run; the message says where, and what to try."""


def previous_of(path: Path) -> Path:
    """Where the predecessor of the checkpoint at `path` is kept."""
    return path.with_suffix(".previous.ckpt")


def read_checkpoint(path: Path, identity: dict[str, Any], parts: tuple[str, ...] = ()) -> dict[str, Any]:
    """Read a checkpoint, and make sure that it belongs to what is being trained.

    Args:
        path: a file written by the Trainer.
        identity: plain values that `checkpoint["identity"]` must equal: the recipe, the model, its shape.
        parts: what it must hold besides what the Trainer writes.

    Returns:
        The checkpoint, its tensors on the CPU.

    Raises:
        CheckpointError: there is no such file, it is damaged or incomplete, or it has another identity. If there
            is an intact checkpoint next to it, the message names that one.
    """
    try:
        checkpoint = _load(path)
    except UNREADABLE as error:
        size = f"{path.stat().st_size:,} bytes" if path.is_file() else "no such file"
        raise CheckpointError(
            f"cannot read the checkpoint {path} ({size}): {_first_line(error)}. {_remedy(path, identity, parts)}"
        ) from error
    differences = _differences(checkpoint, identity)
    if differences:
        raise CheckpointError(
            f"the checkpoint {path} belongs to another run: {'; '.join(differences)}. "
            "Resume with the options it was trained with, or start a new run in another folder (--out FOLDER)."
        )
    missing = _missing(checkpoint, parts)
    if missing:
        raise CheckpointError(f"the checkpoint {path} lacks {missing}. {_remedy(path, identity, parts)}")
    return checkpoint


def refuse_shorter(path: Path, checkpoint: dict[str, Any], epochs: int, max_steps: int | None = None) -> None:
    """Raise CheckpointError if a run that should end after so many epochs, or steps, has had more already."""
    had = {"epochs": checkpoint["epoch"] + 1, "max_steps": checkpoint["global_step"]}
    for name, least in (("epochs", epochs), ("max_steps", max_steps)):
        if least is not None and least < had[name]:
            raise CheckpointError(
                f"the checkpoint {path} is from a run of {had[name]} {name.removeprefix('max_')}, which is "
                f"more than {least}: resume with --{name.replace('_', '-')} {had[name]} or more, or start a new "
                "run in another folder (--out FOLDER)."
            )


def _load(path: Path) -> dict[str, Any]:
    # zipfile raises if the end is missing, which torch.load reports less clearly, and compares checksums, which
    # torch.load does not.
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise zipfile.BadZipFile(f"the checksum of {damaged} in the file is wrong")
    return torch.load(path, map_location="cpu", weights_only=True)


def _missing(checkpoint: dict[str, Any], parts: tuple[str, ...]) -> str:
    return ", ".join(part for part in (*PARTS, *parts) if part not in checkpoint)


def _differences(checkpoint: object, identity: dict[str, Any]) -> list[str]:
    found = checkpoint.get("identity") if isinstance(checkpoint, dict) else None
    if not isinstance(found, dict):
        return [f"it does not name a recipe, and this is {identity['recipe']}"]
    keys = ["recipe"] if found.get("recipe") != identity["recipe"] else list(identity)
    return [
        f"its {key} is {found.get(key)}, this run's is {identity[key]}"
        for key in keys
        if found.get(key) != identity[key]
    ]


def _remedy(path: Path, identity: dict[str, Any], parts: tuple[str, ...]) -> str:
    """Name the newest checkpoint next to `path` that can be read and belongs to the run."""
    for candidate in (previous_of(path), path.with_name(BEST)):
        try:
            checkpoint = _load(candidate)
        except UNREADABLE:
            continue  # as unusable as `path`; the next may be better, and if none is, the last line says so
        if not (_differences(checkpoint, identity) or _missing(checkpoint, parts)):
            return (
                f"The checkpoint {candidate}, of epoch {checkpoint['epoch'] + 1}, is intact: "
                f"to continue from it, copy it to {path} and resume again."
            )
    return "There is no other intact checkpoint in its folder: start a new run in another folder (--out FOLDER)."


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def run_folder(parent: Path, name: str, out: Path | None, resume: bool) -> Path:
    """The folder of a run: `out`, or else `parent/name-N`, the newest one to resume or the next free one.

    Raises:
        CheckpointError: there is nothing to resume, or a new run would overwrite the checkpoints in `out`.
    """
    if out is not None:
        found = any(out.glob(f"*/{LAST}")) or any(out.glob(f"*/{previous_of(Path(LAST))}"))
        if resume and not found:
            raise CheckpointError(
                f"nothing to resume: {out.absolute()} contains no MODEL/{LAST}. "
                "Leave out --resume to start a new run."
            )
        if found and not resume:
            raise CheckpointError(
                f"{out.absolute()} contains the checkpoints of another run: continue it with --resume, "
                "or choose another folder (--out FOLDER)."
            )
        return out
    pattern = re.compile(re.escape(name) + r"-(\d+)")
    numbers = [int(m[1]) for p in parent.glob(f"{name}-*") if (m := pattern.fullmatch(p.name))]
    if resume and not numbers:
        raise CheckpointError(
            f"nothing to resume: there is no {parent.absolute() / name}-N. "
            "Leave out --resume to start a new run, or give the folder of the run (--out FOLDER)."
        )
    return parent / f"{name}-{max(numbers, default=0) + (not resume)}"
