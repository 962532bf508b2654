"""Broyden's method with limited memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from implicitly.fixed_point.line_search import backtrack
from implicitly.history import (
    add_combined,
    combine,
    empty_slots,
    filled,
    products,
    with_room,
    write,
    write_cross,
    write_result,
)
from implicitly.iterate import Proposal, Residual, Solver


@dataclass(frozen=True)
class Broyden(Solver):
    """Broyden's good method: a quasi-Newton step with an estimate H of the inverse Jacobian, one call of f a step.

    H is the product of rank-one updates (I + p_i s_i') with s_i the last steps, on top of the identity. It is
    applied as H r = r + P' M S r, where M = (I - L)^-1 with L_ij = s_i . p_j for j older than i gains one row a
    step; so a step reads the history three times whatever its length. Since H y = s - H r for the last step, p
    needs no product of its own. When the history is full the oldest update goes. Kelley, "Iterative Methods for
    Linear and Nonlinear Equations", SIAM 1995, section 7.3; updates of Broyden 1965.

    Args:
        history: rank-one updates kept; memory is `2 * history` states.
        line_search: backtrack along the step until the residual falls.
    """

    history: int = 10
    line_search: bool = False

    estimates_inverse: ClassVar[bool] = True
    kept: ClassVar[int] = 2

    @property
    def nests(self) -> bool:
        """Its line search."""
        return self.line_search

    def __post_init__(self):
        super().__post_init__()
        if self.history < 1:
            raise ValueError(f"Broyden: history must be at least 1, got {self.history}")

    def start(self, F: Residual, z: Tensor, r: Tensor) -> tuple[Tensor, ...]:
        """S and P `(B, m, n)`, M `(B, m, m)`, the last iterate `(B, n)` and step length `(B, 1)`."""
        slots = min(self.history, self.max_steps)
        M = z.new_zeros(z.shape[0], slots, slots)
        return *empty_slots(z, slots), M, z, torch.ones_like(z[:, :1])

    def propose(self, F: Residual, k: int | Tensor, z: Tensor, r: Tensor, memory: tuple[Tensor, ...]) -> Proposal:
        """The quasi-Newton step from `z`."""
        S, P, M, last, length = memory
        if isinstance(k, int) and k == 0:  # nothing to learn from yet
            return self._step(F, z, r, torch.ones_like(length), r, (S, P, M))
        slots = M.shape[1]
        slot, count = (k - 1) % slots, min(k - 1, slots) if isinstance(k, int) else k
        if isinstance(k, Tensor) or k > slots:  # the oldest update goes: M of the others is what is left of M
            M = write_cross(M, slot, torch.zeros_like(M[:, 0]))
        S, P = with_room(S, slot, slots), with_room(P, slot, slots)
        # None for a finished sample, whose z stays. M has nothing in this place yet, so that H is the one before;
        # written before all else is read, S needs no copy in a graph.
        S, s = write_result(S, slot, torch.sub, z, last)
        S_k, P_k, M_k = (filled(x, count) for x in (S, P, M))
        w = add_combined(r, products(products(r, S_k), filled(M_k.mT, count).mT), P_k)
        M = write(M, slot, _with_one(combine(products(s, P_k), M_k), slot))
        along, squared = _dot(s, w), _dot(s, s)
        denominator = squared / length - along
        # s'Hy = 0 makes the update infinite: skip it.
        skip = denominator.abs() <= 1e-8 * squared
        inverse = torch.where(skip, 0.0, 1 / torch.where(skip, 1.0, denominator))
        p = w if not self.line_search else torch.addcmul(w, 1 - 1 / length, s)
        P, _ = write_result(P, slot, torch.mul, p, inverse)
        if not self.line_search:
            return self._step(F, z, r, 1 + along * inverse, w, (S, P, M))
        return self._step(F, z, r, torch.ones_like(length), torch.addcmul(w, along * inverse, p), (S, P, M))

    def _step(self, F: Residual, z: Tensor, r: Tensor, length: Tensor, d: Tensor, history: Any) -> Proposal:
        """To z + length * d, or part of the way."""
        if not self.line_search:
            return Proposal(torch.addcmul(z, length, d), (*history, z, torch.ones_like(length)))
        moved, r, length, calls = backtrack(F, z, r, d)
        return Proposal(moved, (*history, z, length), r, calls)

    def estimate(self, k: int | Tensor, memory: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """`(S, P, M, c)` of H = I + P' M S, of which the first c `(B,)` slots count."""
        S, P, M, last, _ = memory
        count = (torch.as_tensor(k, device=last.device) - 1).clamp(0, M.shape[1])
        return S, P, M, count.expand(last.shape[0])


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return torch.linalg.vecdot(x, y)[:, None]


def _with_one(row: Tensor, slot: int | Tensor) -> Tensor:
    """A new `row` `(B, m)` with 1 in place `slot`."""
    if isinstance(slot, Tensor):
        return row.index_fill(1, slot.reshape(1), 1.0)
    row.select(1, slot).fill_(1.0)
    return row
