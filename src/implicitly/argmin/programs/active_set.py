"""Which inequalities of a condensed program bind: with its multipliers as the only unknowns."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from implicitly.argmin.programs.condensed import Condensed, factor_active, solve_active
from implicitly.argmin.programs.program import times
from implicitly.host import maybe_any
from implicitly.tree import row_norm


class Sides(NamedTuple):
    """Multipliers and slacks `(B, m)` of samples whose inequalities bind where `alpha` is 1, up to rounding.

    `N` `(B, m, m)` holds the factors that they were found by, `usable` `(B,)` where those exist.
    """

    lam: Tensor
    slack: Tensor
    alpha: Tensor
    N: Tensor
    usable: Tensor

    @classmethod
    def of(cls, M: Tensor, c: Tensor, alpha: Tensor, lam: Tensor, away: float) -> Sides:
        """Those of s = M λ + c where λ is near `lam`; N is of a matrix that is `away` from singular."""
        N, usable = factor_active(M, alpha, 1 - (1 - away) * alpha)
        lam = lam * alpha
        step = solve_active(N, (c + times(M, lam)) * alpha)
        lam = lam - step.nan_to_num(0.0, 0.0, 0.0)
        return cls(lam, c + times(M, lam), alpha, N, usable)

    def put(self, rows: Tensor, part: Sides) -> None:
        """Write `part` in place of some samples."""
        for own, new in zip(self._by_rows(), part._by_rows()):
            own.index_copy_(0, rows, new)

    def _by_rows(self) -> tuple[Tensor, ...]:
        """What it consists of, with N as it lies in memory, by columns."""
        return self.lam, self.slack, self.alpha, self.N.mT, self.usable


def signs(sizes: tuple[Tensor, Tensor], alpha: Tensor, lam: Tensor, slack: Tensor) -> tuple[Tensor, Tensor]:
    """What must not be negative `(B, m)`, the multipliers where `alpha` is 1 and else the slacks, and what counts
    as zero there.

    A multiplier is small beside the others, a slack beside the terms of its own row: by `Condensed.sizes` those
    without multipliers, and of M λ, as no entry of a Gram matrix is larger than its diagonal allows.
    """
    (reach, root), binds = sizes, alpha > 0
    terms = torch.maximum(reach, root * (root * lam.abs()).sum(1, keepdim=True))
    size = 1 + torch.where(binds, row_norm(lam).unsqueeze(1), terms)
    return torch.where(binds, lam, slack), torch.finfo(size.dtype).eps ** 0.6 * size


def settle(
    condensed: Condensed, alpha: Tensor, lam: Tensor, away: float, patient: bool, rounds: int
) -> tuple[Sides, int]:
    """The sides near `alpha` `(B, m)`, from `lam`, and after how many rounds; in each of them what turns out
    negative changes sides.

    Samples of which as much is negative as before are given up: few of them get anywhere, for which only who is
    `patient` waits.
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
