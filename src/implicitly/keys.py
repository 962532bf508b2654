"""Keys under which graphs are cached: everything that determines a graph, in a form that can be compared."""

from __future__ import annotations

import operator
from collections.abc import Hashable
from dataclasses import fields, is_dataclass
from typing import Any

hooks_of = operator.attrgetter("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def exact(x: Any) -> Hashable:
    """A key of `x` that also differs for things that are equal but do not compute the same.

    Such are 2, 2.0 and True, and zeros of opposite signs, alone or inside dataclasses, tuples and frozensets.
    """
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
    """A tuple whose hash is computed once; raises TypeError if it is not hashable."""

    __slots__ = ("_hash", "parts")

    def __init__(self, *parts: Any):
        self.parts, self._hash = parts, hash(parts)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Key) and self.parts == other.parts)
