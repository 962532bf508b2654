"""Checks of the options of recipes, whose messages the command line shows.

All but the last take a `Config` and names of its fields, and raise ValueError for a field that makes no sense.
"""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path
from typing import Any

LARGEST_SEED = 2**32 - 1  # of numpy, which Lightning seeds with torch


class OptionError(ValueError):
    """Options that do not fit the data or the disk; the message says which, and what to try."""


def check_at_least(config: Any, minimum: int, *names: str) -> None:
    """Check that fields are at least `minimum`."""
    for name in names:
        if getattr(config, name) < minimum:
            raise ValueError(f"{name} must be at least {minimum}; got {getattr(config, name)}")


def check_positive(config: Any, *names: str) -> None:
    """Check that fields are positive and finite."""
    for name in names:
        value = getattr(config, name)
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be {'finite' if value == math.inf else 'positive'}; got {value}")


def check_not_negative(config: Any, *names: str) -> None:
    """Check that fields are at least 0 and finite."""
    for name in names:
        value = getattr(config, name)
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be {'finite' if value == math.inf else 'at least 0'}; got {value}")


def check_tolerance(config: Any, eps: float, *names: str) -> None:
    """Check relative tolerances of trajectories in a dtype with this `eps`, which resolves two `eps`."""
    for name in names:
        if not 2 * eps <= getattr(config, name) < math.inf:
            raise ValueError(
                f"{name} must be finite and at least {2 * eps:.2g}, the smallest that this precision resolves; "
                f"got {getattr(config, name)}"
            )


def check_each_once(config: Any, *names: str) -> None:
    """Check that fields are tuples of at least one name, and none twice."""
    for name in names:
        chosen = getattr(config, name)
        if not chosen or len(set(chosen)) < len(chosen):
            raise ValueError(f"{name} must contain at least one name, and none twice; got {chosen}")


def check_seed(config: Any) -> None:
    """Check the seed, which all recipes have."""
    if not 0 <= config.seed <= LARGEST_SEED:
        raise ValueError(f"seed must lie between 0 and {LARGEST_SEED}; got {config.seed}")


def check_unused(config: Any, why: str, *names: str) -> None:
    """Check that fields without effect are left at their defaults; `why` says why they have none."""
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    for name in names:
        if getattr(config, name) != defaults[name]:
            raise ValueError(f"{name} has no effect: {why}; leave it out; got {getattr(config, name)}")


def check_folder(path: Path) -> None:
    """Raise OptionError unless the folder exists, or can be made."""
    # The first that exists of the folder and its parents.
    there = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    if not there.is_dir():
        raise OptionError(f"out={path} must be a folder, but {there} is a file; choose another")
    if not os.access(there, os.W_OK):
        raise OptionError(f"out={path} must be a writable folder, but {there} is read-only; choose another")
