"""L-BFGS, a quasi-Newton method with limited memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from implicitly.checks import check_count
from implicitly.descent import Descent, bottom, inverse_norm, stopped, wolfe
from implicitly.history import (
    add_combined,
    combine,
    empty_slots,
    filled,
    products,
    with_room,
    write,
    write_cross,
)
from implicitly.iterate import Proposal, Solver
from implicitly.tree import row_norm


@dataclass(frozen=True)
class LBFGS(Solver):
    """L-BFGS with a line search for each sample, for smooth objectives of any size.

    The inverse Hessian H is estimated from the last steps s_i and gradient differences y_i in compact form,

        H = g I + [S', g Y'] [[T'(D + g Y Y')T, -T'], [-T, 0]] [S; g Y],   T^-1 the upper triangle of S Y'.

    At each step T gains one column and loses its oldest row and column, so a step reads the history only twice,
    however long it is. Nocedal, "Updating quasi-Newton matrices with limited storage", 1980; Byrd, Nocedal and
    Schnabel, "Representations of quasi-Newton matrices", Math. Programming 63 (1994), theorem 2.2.

    A sample has converged when the norm of its gradient is at most atol + rtol |gradient at z0|.

    Args:
        history: number of steps kept; they take the memory of `2 * history` states.
        rtol, atol, max_steps: as in `implicitly.iterate.Solver`.
    """

    history: int = 10
    max_steps: int = 500

    needs: ClassVar[str | None] = "objective"

    @property
    def nests(self) -> bool:
        """True, for its line search."""
        return True

    def __post_init__(self):
        super().__post_init__()
        check_count("LBFGS", "history", self.history, kind="a whole number")

    def start(self, F: Descent, z: Tensor, r: Tensor) -> tuple[Tensor, ...]:
        """S and Y `(B, m, n)`, T and Y Y' `(B, m, m)`, D `(B, m)`, g `(B, 1)`, the objective and its `bottom`."""
        slots = min(self.history, self.max_steps)
        T = z.new_zeros(z.shape[0], slots, slots)
        D = z.new_zeros(z.shape[0], slots)  # a copy of T[:, 0] would have the strides of T where B is 1
        value, _ = F.evaluate(z)
        return *empty_slots(z, slots), T, T.clone(), D, inverse_norm(r), value, bottom(value, z, r)

    def propose(self, F: Descent, k: int | Tensor, z: Tensor, r: Tensor, memory: tuple[Tensor, ...]) -> Proposal:
        """The point that the line search finds along H r."""
        S, Y, T, YY, D, g, value, lowest = memory
        slots = T.shape[1]
        count = k if isinstance(k, Tensor) else min(k, slots)
        d = _apply(filled(S, count), filled(Y, count), T, YY, D, g, r)
        descends = torch.linalg.vecdot(r, d) > 0
        d = torch.where(descends[:, None], d, g * r)
        new = wolfe(F, z, value, r, d, torch.ones_like(value, dtype=z.dtype))
        failed = new.length[:, 0] == 0
        # An estimate along which the line search failed is forgotten; without one, there is nothing left to try.
        keep = (descends & ~failed)[:, None]
        status = stopped(new, failed & (D == 0).all(1), lowest)
        T, YY, D = T * keep[:, :, None], YY * keep[:, :, None], D * keep
        g = torch.where(keep, g, inverse_norm(r))
        history = _learn((S, Y, T, YY, D, g), k, new.z - z, r - new.r)
        return Proposal(
            new.z, (*history, new.value, lowest), new.r, new.calls + (k == 0), None, status, new.value < value
        )


def _apply(S: Tensor, Y: Tensor, T: Tensor, YY: Tensor, D: Tensor, g: Tensor, r: Tensor) -> Tensor:
    """H r."""
    count = S.shape[1]
    if count == 0:
        return g * r
    T, YY, D = T[:, :count, :count], YY[:, :count, :count], D[:, :count]
    p = combine(products(r, S), T.mT)
    top = combine(D * p + g * (combine(p, YY) - products(r, Y)), T)
    return add_combined(add_combined(g * r, top, S), g * p, Y, alpha=-1)


def _learn(history: tuple[Tensor, ...], k: int | Tensor, s: Tensor, y: Tensor) -> Any:
    """The history after step s with gradient difference y, which replace the oldest."""
    S, Y, T, YY, D, g = history
    slots = T.shape[1]
    slot, count = k % slots, k + 1 if isinstance(k, Tensor) else min(k + 1, slots)
    along, squared = torch.linalg.vecdot(s, y), torch.linalg.vecdot(y, y)
    # Without positive curvature along s no update keeps H positive definite; finished samples have s = 0.
    curved = along > 10 * torch.finfo(s.dtype).eps * row_norm(s) * row_norm(y)
    s, y = s * curved[:, None], y * curved[:, None]
    along, inverse = torch.where(curved, along, 0.0), 1 / torch.where(curved, along, 1.0) * curved
    S, Y = with_room(S, slot, slots), with_room(Y, slot, slots)
    S, Y = write(S, slot, s), write(Y, slot, y)
    T = write_cross(T, slot, torch.zeros_like(T[:, 0]))  # drops the oldest; the rest is the T of the others
    known = T.shape[1] if isinstance(count, Tensor) else count
    S_y = torch.nn.functional.pad(products(y, filled(S, count)), (0, slots - known))
    column = -combine(S_y, T.mT) * inverse[:, None]
    T = write(T, slot, column + _one_hot(slot, slots, column) * inverse[:, None], dim=2)
    YY = write_cross(YY, slot, products(y, filled(Y, count)))
    D = write(D.unsqueeze(2), slot, along[:, None]).squeeze(2)
    g = torch.where(curved[:, None], (along / torch.where(curved, squared, 1.0))[:, None], g)
    return S, Y, T, YY, D, g


def _one_hot(slot: int | Tensor, slots: int, like: Tensor) -> Tensor:
    return (torch.arange(slots, device=like.device) == slot).to(like.dtype)
