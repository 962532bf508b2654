"""Backtracking line search on the residual norm, with one step length per sample."""

from __future__ import annotations

import torch
from torch import Tensor

from implicitly.iterate import Residual, repeat
from implicitly.tree import row_norm

# The shortest step tried is 2^-10 of the full one; where even that does not help, the direction is at fault.
HALVINGS = 10


def backtrack(F: Residual, z: Tensor, r: Tensor, d: Tensor) -> tuple[Tensor, Tensor, Tensor, int | Tensor]:
    """Halve the step d `(B, n)` from z, whose residual is r, until the residual norm falls enough.

    Returns the new iterate, its residual, the lengths `(B, 1)` and the number of calls of F. A sample for which no
    length is good enough takes the shortest. Armijo's condition on |F|: Dennis and Schnabel 1983, section 6.3.
    """
    norm = row_norm(r)

    def good(length: Tensor, trial: Tensor) -> Tensor:
        # NaN compares false, so a step to a point where f is undefined is halved, too. With 1e-4, the usual value,
        # almost any decrease is enough.
        return row_norm(trial) <= (1 - 1e-4 * length[:, 0]) * norm

    def halve(k: int | Tensor, carry: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        length, trial, calls = carry
        length = torch.where(good(length, trial)[:, None], length, length / 2)
        return length, F(torch.addcmul(z, length, d)), calls + 1

    length = torch.ones_like(z[:, :1])
    start = (length, F(z + d), torch.ones((), dtype=torch.int64, device=z.device))
    _, (length, trial, calls) = repeat(halve, start, lambda c: (~good(c[0], c[1])).any(), HALVINGS)
    return torch.addcmul(z, length, d), trial, length, calls
