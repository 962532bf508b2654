"""Checks of options. They raise TypeError or ValueError, naming the option, its owner and the value it got."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

# The types that count as numbers.
INTEGERS = (int, np.integer)
NUMBERS = (float, int, np.floating, np.integer)


class Must(NamedTuple):
    """A requirement on a number: in words, and as a test of a number or of each entry of a tensor."""

    words: str
    holds: Callable[[Any], Any]


NONNEGATIVE = Must("a finite number >= 0", lambda x: (x >= 0) & (x < math.inf))
FINITE_AND_NONNEGATIVE = Must("finite and >= 0", NONNEGATIVE.holds)
POSITIVE = Must("a positive number", lambda x: (x > 0) & (x < math.inf))
POSITIVE_OR_INFINITE = Must("positive", lambda x: x > 0)
DAMPING = Must("in (0, 1]", lambda x: (x > 0) & (x <= 1))
BELOW_ONE = Must("between 0 and 1", lambda x: (x > 0) & (x < 1))


def check_kind(owner: str, name: str, value: Any, kinds: tuple[type, ...], words: str) -> None:
    """Raise TypeError unless `value` is of one of the `kinds` of numbers; a bool is not.

    `words` say in the message what it must be; they may contain {value} and {type}.
    """
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise TypeError(f"{owner}: {name} must be {words.format(value=value, type=type(value).__name__)}")


def check_number(owner: str, name: str, value: Any, must: Must) -> None:
    """Raise TypeError / ValueError unless `value` is a number that meets `must`."""
    check_kind(owner, name, value, NUMBERS, "a number, got a {type}")
    if not must.holds(value):
        raise ValueError(f"{owner}: {name} must be {must.words}, got {value}")


def check_count(owner: str, name: str, value: Any, least: int = 1, kind: str = "an int") -> None:
    """Raise TypeError / ValueError unless `value` is a whole number >= `least`."""
    check_kind(owner, name, value, INTEGERS, kind + ", got {value!r}")
    if value < least:
        raise ValueError(f"{owner}: {name} must be at least {least}, got {value}")


def check_listener(owner: str, listen: Any) -> None:
    """Raise TypeError unless `listen` is callable or None."""
    if listen is not None and not callable(listen):
        raise TypeError(f"{owner}: listen must be callable or None, got a {type(listen).__name__}")


def check_on_failure(on_failure: Any) -> None:
    """Raise ValueError unless `on_failure` is "raise", "warn" or "ignore"."""
    if on_failure not in ("raise", "warn", "ignore"):
        raise ValueError(f'on_failure must be "raise", "warn" or "ignore", got {on_failure!r}')
