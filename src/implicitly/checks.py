"""What options may be. A check raises TypeError or ValueError, which say whose option it is, and what came."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

# What numbers may be given as.
INTEGERS = (int, np.integer)
NUMBERS = (float, int, np.floating, np.integer)


class Must(NamedTuple):
    """What a number must be: in words, and as a test of a number, or of each entry of a tensor."""

    words: str
    holds: Callable[[Any], Any]


NONNEGATIVE = Must("a finite number >= 0", lambda x: (x >= 0) & (x < math.inf))
FINITE_AND_NONNEGATIVE = Must("finite and >= 0", NONNEGATIVE.holds)
POSITIVE = Must("a positive number", lambda x: (x > 0) & (x < math.inf))
POSITIVE_OR_INFINITE = Must("positive", lambda x: x > 0)
DAMPING = Must("in (0, 1]", lambda x: (x > 0) & (x <= 1))
BELOW_ONE = Must("between 0 and 1", lambda x: (x > 0) & (x < 1))


def check_kind(owner: str, name: str, value: Any, kinds: tuple[type, ...], words: str) -> None:
    """Raise TypeError unless `value` is of one of the `kinds` of numbers, which a bool is not.

    What it must be is said in `words`, with its {value} and {type} where they are asked for.
    """
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise TypeError(f"{owner}: {name} must be {words.format(value=value, type=type(value).__name__)}")


def check_number(owner: str, name: str, value: Any, must: Must) -> None:
    """Raise TypeError / ValueError unless `value` is a number that is what it `must` be."""
    check_kind(owner, name, value, NUMBERS, "a number, got a {type}")
    if not must.holds(value):
        raise ValueError(f"{owner}: {name} must be {must.words}, got {value}")


def check_count(owner: str, name: str, value: Any, least: int = 1, kind: str = "an int") -> None:
    """Raise TypeError / ValueError unless `value` is a whole number from `least` on."""
    check_kind(owner, name, value, INTEGERS, kind + ", got {value!r}")
    if value < least:
        raise ValueError(f"{owner}: {name} must be at least {least}, got {value}")


def check_listener(owner: str, listen: Any) -> None:
    """Raise TypeError unless `listen` can be called, or is None."""
    if listen is not None and not callable(listen):
        raise TypeError(f"{owner}: listen must be callable or None, got a {type(listen).__name__}")


def check_on_failure(on_failure: Any) -> None:
    """Raise ValueError unless it is known what `on_failure` asks for."""
    if on_failure not in ("raise", "warn", "ignore"):
        raise ValueError(f'on_failure must be "raise", "warn" or "ignore", got {on_failure!r}')
