"""Total variation along a chain: find the edges at which the solution jumps, by divide and conquer on levels.

    min  1/2 sum_i (x_i - z_i)^2 + sum_i w_i |x_(i+1) - x_i|

For a number v, the entries where x is above v solve a problem with two labels, exactly, by dynamic programming
along the chain. Once they are known, each part is a problem of its own, in which an edge between an upper and a
lower part pulls with its full weight. The first v is the mean of the row. A part that the labels do not divide is
constant, and equals the mean of what it sees; the other parts are divided further. Chambolle and Darbon, "On total
variation minimization and surface evolution using parametric maximum flows", IJCV 84 (2009); Hochbaum, "An
efficient algorithm for image segmentation", J. ACM 48 (2001).

The dynamic program is a chain of clipped lines, m -> a + clip(m, l, u), which are closed under composition, so
log2(n) rounds of pairwise composition give all prefixes. Everything therefore runs in parallel over the batch, the
parts and the chain. A round of divisions costs O(n log n); a row of n random numbers needs about 2 log2(n) rounds,
and the worst row needs n.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def jumps(z: Tensor, w: Tensor) -> Tensor:
    """The sign of the jump of x at each edge: 1 where x rises, -1 where it falls, else 0, `(..., n - 1)`.

    The result has z's dtype. `z` is `(..., n)`, the weights `w` of the edges are `(..., n - 1)`.
    """
    n = z.shape[-1]
    sign = torch.zeros_like(w).reshape(-1, max(n - 1, 0))
    rows_z, rows_w = z.reshape(-1, n), w.reshape(sign.shape)
    rows = torch.arange(len(sign), device=z.device)
    while len(rows) and n > 1:
        divided = _divided(rows_z, rows_w, sign[rows])
        going = (divided != sign[rows]).any(-1)
        sign[rows] = divided
        rows, rows_z, rows_w = rows[going], rows_z[going], rows_w[going]
    return sign.reshape(w.shape)


def pulled(z: Tensor, w: Tensor, sign: Tensor) -> Tensor:
    """What each entry sees: its z, plus the pull of the jumping edges next to it."""
    pull = sign * w
    return z + F.pad(pull, (0, 1)) - F.pad(pull, (1, 0))


def blocks_of(sign: Tensor) -> Tensor:
    """The number of the part that each entry belongs to, `(..., n)` int64."""
    return F.pad((sign != 0).cumsum(-1), (1, 0))


def _divided(z: Tensor, w: Tensor, sign: Tensor) -> Tensor:
    """`sign` with the further jumps between entries above and below the mean of their part."""
    seen, blocks = pulled(z, w, sign), blocks_of(sign)
    total = torch.zeros_like(z).scatter_add(-1, blocks, seen)
    count = torch.zeros_like(z).scatter_add(-1, blocks, torch.ones_like(z))
    mean = (total / count.clamp(min=1)).gather(-1, blocks)
    whole = sign == 0
    limit = torch.where(whole, w, 0.0)
    # M: how much more it costs to be above than below, for the chain so far.
    M = _prefixes(mean - seen, limit)
    left = M[..., :-1]
    decided = F.pad((left.abs() > limit) | ~whole, (0, 1), value=True)
    n = z.shape[-1]
    place = torch.where(decided, torch.arange(n, device=z.device), n)
    follows = place.flip(-1).cummin(-1).values.flip(-1)  # undecided entries follow the next decided one
    above = (M < 0).gather(-1, follows).to(z.dtype)
    return torch.where(whole, above[..., 1:] - above[..., :-1], sign)


def _prefixes(a: Tensor, limit: Tensor) -> Tensor:
    """m_i = a_i + clip(m_(i-1), -limit, limit) along the last dimension, starting from m = 0."""
    high = F.pad(limit, (1, 0))
    low = -high
    shift, n = 1, a.shape[-1]
    while shift < n:
        a0, low0, high0 = a[..., :-shift], low[..., :-shift], high[..., :-shift]
        floor, ceiling = low[..., shift:] - a0, high[..., shift:] - a0
        low = torch.cat([low[..., :shift], low0.clamp(floor, ceiling)], dim=-1)
        high = torch.cat([high[..., :shift], high0.clamp(floor, ceiling)], dim=-1)
        a = torch.cat([a[..., :shift], a[..., shift:] + a0], dim=-1)
        shift *= 2
    return a + low  # the first link lets nothing through: low = high
