"""Sparsemax, soft sorting and soft ranking: projections onto the simplex and the permutahedron."""

from __future__ import annotations

import torch
from torch import Tensor

from implicitly.argmin.sets.order import nearest_permuted
from implicitly.argmin.sets.project import simplex
from implicitly.argmin.sets.rows import POSITIVE, Number, check_state, in_full_precision, per_row, without_bad_rows


@in_full_precision
def sparsemax(z: Tensor, dim: int = -1) -> Tensor:
    """Sparsemax: probabilities, some exactly 0, by projecting `z` onto the probability simplex along `dim`.

    Martins and Astudillo, "From Softmax to Sparsemax", ICML 2016. Entries of -inf get probability 0.

    Raises:
        TypeError: `z` is not of a floating dtype.
        IndexError: `z` has no such dimension.
        ValueError: `z` has no entries along `dim`.
    """
    check_state("sparsemax", z, least=0)
    if z.movedim(dim, -1).shape[-1] == 0:
        raise ValueError(f"sparsemax: z must have entries along dim={dim}, got {tuple(z.shape)}")
    return simplex(z.movedim(dim, -1)).movedim(-1, dim)


@in_full_precision
def soft_sort(z: Tensor, strength: Number = 1.0, descending: bool = False) -> Tensor:
    """Soft sorting: the sorted entries of `z` `(..., n)`, pulled towards their mean for a useful derivative.

    It is the projection of (1, ..., n) / strength onto the convex hull of the permutations of z: Blondel, Teboul,
    Berthet and Djolonga, "Fast Differentiable Sorting and Ranking", ICML 2020, with the quadratic regulariser.
    O(n log^2 n).

    Args:
        z: `(..., n)`, n >= 1.
        strength: > 0, in the inverse of the unit of z; a number or a tensor that broadcasts with `(...)`. As it
            falls to 0, the result becomes the sorted z (already at a positive strength if all gaps are below
            1 / strength).
        descending: largest first.

    Raises:
        TypeError: `z` is not of a floating dtype.
        ValueError: a strength that is not positive, n = 0, or shapes that do not broadcast.
    """
    check_state("soft_sort", z)
    strength = _strength("soft_sort", strength, z)
    places = _ranks(z)
    # From some 1 / strength on, every gap of z is smaller and the result is the sorted z: clamp, to avoid
    # overflow.
    hardest = 4 * z.shape[-1] ** 2 * torch.finfo(z.dtype).tiny
    places = (places.flip(-1) if descending else places) / strength.clamp(min=hardest)
    return without_bad_rows(lambda z: nearest_permuted(places, z), z, infinite=True)


@in_full_precision
def soft_rank(z: Tensor, strength: Number = 1.0, descending: bool = False) -> Tensor:
    """Soft ranking: the rank of each entry of `z` `(..., n)`, 1 for the smallest, as a piecewise linear map.

    It is the projection of z / strength onto the convex hull of the permutations of (1, ..., n). Arguments and
    errors are those of `soft_sort`, except that `strength` is in the unit of z: ranks are exact where gaps are
    larger than it. With `descending`, rank 1 is that of the largest entry.
    """
    check_state("soft_rank", z)
    strength = _strength("soft_rank", strength, z)
    sign = -1.0 if descending else 1.0
    # In the unit of z, as z / strength may overflow.
    return without_bad_rows(
        lambda z: nearest_permuted(sign * z, strength * _ranks(z)) / strength, z, infinite=True
    )


def _strength(name: str, strength: Number, z: Tensor) -> Tensor:
    return per_row(name, "strength", strength, z, must=POSITIVE)


def _ranks(z: Tensor) -> Tensor:
    return torch.arange(1, z.shape[-1] + 1, dtype=z.dtype, device=z.device)
