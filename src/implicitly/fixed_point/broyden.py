"""Broyden's method with limited memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from implicitly.checks import check_count
from implicitly.fixed_point.line_search import backtrack
from implicitly.fixed_point.rounding import square_of_rounding
from implicitly.history import (
    added,
    empty_slots,
    filled,
    products,
    read,
    with_room,
    write,
    write_cross,
    write_result,
)
from implicitly.host import Array, library, on_host, to_host, to_tensor
from implicitly.iterate import Proposal, Residual, Solver
from implicitly.transforms import records

# The secant equation has no solution where s'Hy = 0; below this value, relative to |s|^2, the update is skipped.
UNDEFINED = 1e-8


@dataclass(frozen=True)
class Broyden(Solver):
    """Broyden's good method: quasi-Newton steps with an estimate H of the inverse Jacobian, one call of f each.

    H follows from the last steps alone. For step i let d_i be the direction and s_i = (1 - e_i) d_i the step,
    where e_i is the fraction that a line search removed (0 without one). Then

        H_{i+1} = (I + p_i d_i' / |d_i|^2) H_i,    p_i = d_{i+1} - e_i d_i,    d_{i+1} = H_{i+1} r_{i+1},

    starting from H_0 = I. As d_{i+1} is on both sides, we solve for it: it is (w - t e_i d_i) / (1 - t) with
    w = H_i r_{i+1} and t = d_i'w / |d_i|^2. Kelley, "Iterative Methods for Linear and Nonlinear Equations", SIAM
    1995, section 7.3; updates of Broyden 1965. The directions are stored as the rows of D, and the rest of
    H = I + D' N D as a small matrix that gains one row per step; so a step reads the history three times, whatever
    its length.

    `rtol`, `atol` and `max_steps` are described in `implicitly.iterate.Solver`.

    Args:
        history: steps kept, each a rank-one update; memory is `history` states. When full, the oldest is dropped.
        line_search: backtrack along the step until the residual falls.
    """

    history: int = 10
    line_search: bool = False

    estimates_inverse: ClassVar[bool] = True
    history_slots: ClassVar[int] = 1

    @property
    def nests(self) -> bool:
        """Whether it has a line search."""
        return self.line_search

    def __post_init__(self):
        super().__post_init__()
        check_count("Broyden", "history", self.history)

    def start(self, F: Residual, z: Tensor, r: Tensor) -> tuple[Tensor, ...]:
        """The memory: D, T, and the iterate `(B, n)` at which the last step began.

        D `(B, m, n)` holds the directions; row i of T D, with T `(B, m, m)`, is d_i' H_i / |d_i|^2. With a line
        search also the length `(B, 1)` of the last step, and all e_i `(B, m)`.
        """
        slots = min(self.history, self.max_steps)
        T, e = z.new_zeros(z.shape[0], slots, slots), z.new_zeros(z.shape[0], slots)
        return *empty_slots(z, slots, 1), T, z, *((torch.ones_like(z[:, :1]), e) if self.line_search else ())

    def propose(self, F: Residual, k: int | Tensor, z: Tensor, r: Tensor, memory: tuple[Tensor, ...]) -> Proposal:
        """The quasi-Newton step from `z`."""
        if isinstance(k, int) and k == 0:  # nothing to learn from yet
            return self._searched(F, z, r, r, memory) if self.line_search else Proposal(z + r, (*memory[:2], z))
        D, T, *searched = self._with_last(k, z, memory)
        slots = T.shape[1]
        slot, count = (k - 1) % slots, min(k, slots) if isinstance(k, int) else k
        known, d = filled(D, count), read(D, slot)
        small = (products(d, known), products(r, known), *(filled(x, count) for x in searched[1:]))
        if on_host(*small) and not records():
            with np.errstate(all="ignore"):
                newest, scale, weights = _learned(to_host(T)[:, :count, :count], slot, *map(to_host, small))
            to_host(T)[:, slot, :count] = newest
            scale, weights = to_tensor(scale), to_tensor(weights)
        else:
            rounding = square_of_rounding(F, z)
            least = 0.0 if rounding is None else rounding.unsqueeze(1)
            newest, scale, weights = _learned(filled(filled(T, count).mT, count).mT, slot, *small, least=least)
            T = write(T, slot, torch.nn.functional.pad(newest, (0, slots - newest.shape[1])))
        if not self.line_search:
            return Proposal(added(torch.addcmul(z, scale, r), weights, known), (D, T, z))
        direction = torch.addcmul(added(scale * r, weights, known), (scale - 1) * (searched[0] - 1), d)
        return self._searched(F, z, r, direction, (D, T, z, *searched))

    def _with_last(self, k: int | Tensor, z: Tensor, memory: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """D with its oldest direction replaced by that of step `k - 1`, which led to `z`; T without the oldest.

        With a line search also the length of that step, and all e_i.
        """
        D, T, begun, *searched = memory
        slots = T.shape[1]
        slot = (k - 1) % slots
        if isinstance(k, Tensor) or k > slots:
            T = write_cross(T, slot, torch.zeros_like(T[:, 0]))
        D = with_room(D, slot, slots)
        # D is written before anything else is read, so a graph needs no copy of it.
        if not self.line_search:
            return write_result(D, slot, torch.sub, z, begun)[0], T
        length, e = searched
        D, _ = write_result(D, slot, _direction, z, begun, length)
        return D, T, length, write(e, slot, 1 - length[:, 0])

    def _searched(self, F: Residual, z: Tensor, r: Tensor, d: Tensor, memory: tuple[Tensor, ...]) -> Proposal:
        """The step to z + d, shortened by the line search."""
        D, T, *_, e = memory
        moved, r, length, calls = backtrack(F, z, r, d)
        return Proposal(moved, (D, T, z, length, e), r, calls)

    def estimate(self, k: int | Tensor, z: Tensor, memory: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """`(D, N, c)` with H = I + D' N D, where only the first c `(B,)` slots are in use."""
        count = torch.as_tensor(k, device=z.device).clamp(0, memory[1].shape[1]).expand(z.shape[0])
        if isinstance(k, int) and k == 0:  # no step was taken
            return *memory[:2], count
        D, T, *searched = self._with_last(k, z, memory)
        return D, _to_next(T, *(e[:, :, None] for e in searched[1:])), count


def _learned(
    T: Array, slot: int | Tensor, row: Array, Dr: Array, e: Array | None = None, least: Array = 0.0
) -> tuple[Array, ...]:
    """The update from the products D d and D r `(B, c)`, where d is the last direction, stored at `slot`.

    Returns the new row of T; 1 / (1 - t) `(B, 1)`; and that times w - r, as coefficients `(B, c)` of the
    directions. There is no update where |d|^2 is at most `least` `(B, 1)`; it is 0 for a finished sample, whose z
    stays.
    """
    xp = library(row)
    squared = read(row, slot)[:, None]
    still = squared <= least
    inverse = xp.where(still, 0.0, 1 / xp.where(still, 1.0, squared))
    newest = inverse * _with_one((_from_next(row, e)[:, :, None] * T).sum(1), slot)
    t = (newest * Dr).sum(1)[:, None]
    skip = abs(1 - t) <= UNDEFINED
    newest, scale = xp.where(skip, 0.0, newest), 1 / xp.where(skip, 1.0, 1 - t)
    return newest, scale, scale * _to_next((T * Dr[:, None]).sum(2), e)


def _to_next(t: Array, e: Array | None = None) -> Array:
    """The coefficients `(B, m, ...)` of the directions in sum_i t_i p_i."""
    moved = _joined(t[:, -1:], t[:, :-1])
    return moved if e is None else moved - e * t


def _from_next(row: Array, e: Array | None = None) -> Array:
    """The products `(B, m)` with each p_i, where `row` holds those with each d_i."""
    moved = _joined(row[:, 1:], row[:, :1])
    return moved if e is None else moved - e * row


def _direction(z: Tensor, begun: Tensor, length: Tensor, out: Tensor | None = None) -> Tensor:
    return torch.div(z - begun, length, out=out)


def _with_one(row: Array, slot: int | Tensor) -> Array:
    """A new `row` `(B, m)` with 1 at `slot`."""
    if isinstance(slot, Tensor):
        return row.index_fill(1, slot.reshape(1), 1.0)
    row[:, slot] = 1.0
    return row


def _joined(*parts: Array) -> Array:
    return library(parts[0]).concatenate(parts, 1)
