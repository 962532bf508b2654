"""Broyden's method with limited memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from implicitly.fixed_point.line_search import backtrack
from implicitly.history import combine, empty_slots, filled, products, write
from implicitly.iterate import Proposal, Residual, Solver


@dataclass(frozen=True)
class Broyden(Solver):
    """Broyden's good method: a quasi-Newton step with an estimate H of the inverse Jacobian, one call of f a step.

    H is a product of rank-one updates (I + p_i s_i') with s_i the last steps, starting from the identity;
    it is applied as H r = r + P' (I - L)^-1 S r with L_ij = s_i . p_j below the diagonal, so that a step reads
    the history three times whatever its length. Since H y = s - H r for the last step, p needs no product of
    its own. When the history is full it starts afresh. Kelley, "Iterative Methods for Linear and Nonlinear
    Equations", SIAM 1995, section 7.3; updates of Broyden 1965.

    Args:
        history: rank-one updates kept; memory is `2 * history` states.
        line_search: backtrack along the step until the residual falls.
    """

    history: int = 20
    line_search: bool = False

    estimates_inverse: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        if self.history < 1:
            raise ValueError(f"Broyden: history must be at least 1, got {self.history}")

    def start(self, F: Residual, z: Tensor, r: Tensor) -> tuple[Tensor, ...]:
        """S and P `(B, m, n)`, L `(B, m, m)`, the last iterate `(B, n)` and step length `(B, 1)`."""
        slots = min(self.history, self.max_steps)
        S, P = empty_slots(z, slots)
        L = z.new_zeros(z.shape[0], slots, slots)
        return S, P, L, z, torch.ones_like(z[:, :1])

    def propose(self, F: Residual, k: int | Tensor, z: Tensor, r: Tensor, memory: tuple[Tensor, ...]) -> Proposal:
        """The quasi-Newton step from `z`."""
        S, P, L, last, length = memory
        s = z - last  # none for a finished sample, whose z stays
        slot = k % S.shape[1]
        # Slots from before the last fresh start count for nothing, here and in the estimate.
        if isinstance(slot, Tensor):
            P = torch.where(slot == 0, 0.0, P)
        elif slot == 0 and k:
            P = torch.zeros_like(P)
        S_k, P_k = filled(S, slot), filled(P, slot)
        known = (torch.arange(S_k.shape[1], device=z.device) < slot).to(z.dtype)
        w = r + combine(_chain(L, known, products(r, S_k)), P_k)
        along = torch.linalg.vecdot(s, w)[:, None]
        squared = torch.linalg.vecdot(s, s)[:, None]
        denominator = squared / length - along
        # s'Hy = 0 makes the update infinite: skip it.
        skip = denominator.abs() <= 1e-8 * squared
        p = w if not self.line_search else torch.addcmul(w, 1 - 1 / length, s)
        p = torch.where(skip, 0.0, p / torch.where(skip, 1.0, denominator))
        row = torch.nn.functional.pad(products(s, P_k) * known, (0, S.shape[1] - S_k.shape[1]))
        S, P, L = write(S, slot, s), write(P, slot, p), write(L, slot, row)
        d = torch.addcmul(w, along, p)
        if not self.line_search:
            return Proposal(z + d, (S, P, L, z, length))
        moved, r, length, calls = backtrack(F, z, r, d)
        return Proposal(moved, (S, P, L, z, length), r, calls)

    def estimate(self, memory: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """`(S, P, L)` of H = I + P' (I - L)^-1 S."""
        return memory[:3]


def _chain(L: Tensor, known: Tensor, inner: Tensor) -> Tensor:
    """(I - L)^-1 inner on the `known` slots, 0 elsewhere: the product of rank-one updates, multiplied out."""
    m = inner.shape[1]
    unit = torch.eye(m, dtype=L.dtype, device=L.device) - L[:, :m, :m] * known.unsqueeze(1)
    solved = torch.linalg.solve_triangular(unit, (inner * known).unsqueeze(2), upper=False, unitriangular=True)
    return solved[:, :, 0]
