"""The active set of a condensed program, whose only unknowns are the multipliers of its inequalities."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from implicitly.argmin.programs.condensed import Condensed, factor_active, solve_active
from implicitly.argmin.programs.program import times
from implicitly.host import maybe_any
from implicitly.tree import row_norm


class Sides(NamedTuple):
    """Multipliers and slacks `(B, m)` if the inequalities with `alpha` = 1 bind, up to rounding.

    `N` `(B, m, m)` holds the factors used to compute them, `usable` `(B,)` whether these exist.
    """

    lam: Tensor
    slack: Tensor
    alpha: Tensor
    N: Tensor
    usable: Tensor

    @classmethod
    def of(cls, M: Tensor, c: Tensor, alpha: Tensor, lam: Tensor, away: float) -> Sides:
        """Solve s = M λ + c from λ near `lam`; N factorises a matrix that is kept `away` from singular."""
        N, usable = factor_active(M, alpha, 1 - (1 - away) * alpha)
        lam = lam * alpha
        step = solve_active(N, (c + times(M, lam)) * alpha)
        lam = lam - step.nan_to_num(0.0, 0.0, 0.0)
        return cls(lam, c + times(M, lam), alpha, N, usable)

    def put(self, rows: Tensor, part: Sides) -> None:
        """Overwrite some samples with `part`."""
        for own, new in zip(self._by_rows(), part._by_rows()):
            own.index_copy_(0, rows, new)

    def _by_rows(self) -> tuple[Tensor, ...]:
        """Its tensors, with N transposed, since it lies in memory column by column."""
        return self.lam, self.slack, self.alpha, self.N.mT, self.usable


def signs(sizes: tuple[Tensor, Tensor], alpha: Tensor, lam: Tensor, slack: Tensor) -> tuple[Tensor, Tensor]:
    """What must not be negative `(B, m)`, and the size that counts as zero there.

    That is the multipliers where `alpha` is 1, and the slacks elsewhere. A multiplier is compared with the other
    multipliers, a slack with the terms of its own row. `Condensed.sizes` gives these terms: those without
    multipliers, and a bound on those of M λ, since the diagonal of a Gram matrix bounds its entries.
    """
    (reach, root), binds = sizes, alpha > 0
    terms = torch.maximum(reach, root * (root * lam.abs()).sum(1, keepdim=True))
    size = 1 + torch.where(binds, row_norm(lam).unsqueeze(1), terms)
    # 4e-10 in float64, 7e-5 in float32: above the rounding errors of a solve with moderate condition numbers.
    return torch.where(binds, lam, slack), torch.finfo(size.dtype).eps ** 0.6 * size


def settle(
    condensed: Condensed, alpha: Tensor, lam: Tensor, away: float, patient: bool, rounds: int
) -> tuple[Sides, int]:
    """Find an active set near `alpha` `(B, m)`, starting from `lam`; returns its sides and the number of rounds.

    In each round, inequalities whose multiplier or slack turns out negative change sides. Samples in which their
    number does not fall are given up, unless `patient`: few of those ever settle.
    """
    M, c, reach, root = condensed.M, condensed.c, *condensed.sizes
    at = whole = Sides.of(M, c, alpha.clone(), lam, away)
    rows = before = None
    for k in range(1, rounds):
        signed, small = signs((reach, root), at.alpha, at.lam, at.slack)
        wrong = signed < -small
        if not maybe_any(wrong):
            return whole, k
        count = wrong.sum(1)
        falls = (count > 0) if patient or before is None else (count > 0) & (count < before)
        keep = falls.nonzero()[:, 0]
        if not len(keep):
            return whole, k
        rows, before = keep if rows is None else rows[keep], count[keep]
        c, reach = c[keep], reach[keep]
        M, root = (M[keep], root[keep]) if M.ndim == 3 else (M, root)
        flipped = torch.where(wrong, 1 - at.alpha, at.alpha)[keep]
        at = Sides.of(M, c, flipped, at.lam[keep].clamp(min=0), away)
        whole.put(rows, at)
    return whole, rounds
