"""What graphs are kept under: everything that decides about them, in forms that can be compared."""

from __future__ import annotations

import operator
from collections.abc import Hashable
from dataclasses import fields, is_dataclass
from typing import Any

hooks_of = operator.attrgetter("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def exact(x: Any) -> Hashable:
    """What tells `x` also from what is equal to it but does not compute the same: 2, 2.0 and True, and zeros of
    other signs; by itself, or in dataclasses, tuples and frozensets."""
    if isinstance(x, float | complex):
        return type(x), x, repr(x)
    if isinstance(x, tuple | frozenset):
        parts = map(exact, x)
        return type(x), x, frozenset(parts) if isinstance(x, frozenset) else tuple(parts)
    if not is_dataclass(x) or type(x).__eq__ is object.__eq__:
        return type(x), x
    compared = (f for f in fields(x) if (f.compare if f.hash is None else f.hash))
    return type(x), x, *(exact(getattr(x, f.name)) for f in compared)


class Key:
    """A tuple that is hashed once; raises TypeError where it cannot be."""

    __slots__ = ("_hash", "parts")

    def __init__(self, *parts: Any):
        self.parts, self._hash = parts, hash(parts)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Key) and self.parts == other.parts)
