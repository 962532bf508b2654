"""The autograd recording of a short solve, kept so that its first derivative need not take the steps again."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from implicitly.ode.problem import Field
from implicitly.pullback import pulled_each


class Kept(NamedTuple):
    """The `values` `(B, T, n)` of a solve, with their autograd graph from the leaves `y0`, `k0` and `theta`.

    The slope `k0` `(B, n)` at `y0` is a leaf of its own, since it was computed before the solve, without a graph.
    `nbytes` is the approximate size of the graph.
    """

    values: Tensor
    y0: Tensor
    k0: Tensor
    theta: tuple[Tensor, ...]
    nbytes: int

    def pull(
        self, field: Callable[..., Field], begin: Tensor, bar: Tensor, wanted: list[int], retain: bool
    ) -> list[Tensor]:
        """The cotangents of the `wanted` inputs, given the cotangent `bar` of the values, as in `pulled_each`.

        `wanted` are indices into (times, y0, *theta), never that of the times; `retain` keeps the graph.
        """
        shared = [self.theta[i - 2] for i in wanted if i > 1]
        y_bar, k_bar, *sums = pulled_each([self.values], [bar], [self.y0, self.k0, *shared], retain)
        with torch.enable_grad():
            slope = field(*self.theta).at(begin, self.y0)
        first, *more = pulled_each([slope], [k_bar], [self.y0, *shared])
        found = iter([a + b for a, b in zip(sums, more)])
        return [y_bar + first if i == 1 else next(found) for i in wanted]


@dataclass
class Meter:
    """Lets autograd record calls of f as long as it saves at most `budget` bytes for them.

    The first call is measured, and all others are assumed to need the same. Beyond the budget nothing is recorded.
    """

    budget: int
    spent: int = 0
    _each: int | None = None
    _own: set[int] = field(default_factory=set)

    @property
    def full(self) -> bool:
        """Whether the calls need more than the budget."""
        return self.spent > self.budget

    def of(self, field: Callable[..., Field]) -> Callable[..., Field]:
        """`field`, with the memory of its calls of f counted."""

        def metered(*theta: Tensor) -> Field:
            self._own.update(x.data_ptr() for x in theta)
            F = field(*theta)
            F.slope = self._counted(F.slope)
            return F

        return metered

    def _counted(self, slope: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def counted(moment: Tensor, y: Tensor) -> Tensor:
            value = slope(moment, y)
            if torch.is_grad_enabled():
                if self._each is None:
                    self._each = y.nbytes + saved_bytes(value, self._own)
                self.spent += self._each
                if self.full:
                    torch.set_grad_enabled(False)  # up to the end of the solve, which restores it
            return value

        return counted


def saved_bytes(x: Tensor, own: set[int]) -> int:
    """Bytes of the tensors that autograd saved on the way to `x`, without those at the addresses `own`.

    This walks the graph itself, since hooks on saved tensors would break uses of `torch.func` within f.
    """
    found, nodes, seen = {}, [x.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        found.update((t.data_ptr(), t.nbytes) for t in _saved(node))
        nodes += [parent for parent, _ in node.next_functions]
    return sum(size for address, size in found.items() if address not in own)


def _saved(node: Any) -> Iterator[Tensor]:
    """The tensors that a node of an autograd graph has saved."""
    for name in _names(type(node)):
        value = getattr(node, name)
        for x in value if isinstance(value, tuple | list) else (value,):
            if isinstance(x, Tensor):
                yield x


@functools.lru_cache(maxsize=256)
def _names(kind: type) -> tuple[str, ...]:
    """The attributes in which nodes of this kind save tensors; those of `autograd.Function` have a single one."""
    names = tuple(name for name in dir(kind) if name.startswith("_saved_"))
    return (*names, "saved_tensors") if hasattr(kind, "saved_tensors") else names
