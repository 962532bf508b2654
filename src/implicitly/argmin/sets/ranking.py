"""Sparsemax, soft sorting and soft ranking: projections onto the simplex and the permutahedron."""

from __future__ import annotations

import torch
from torch import Tensor

from implicitly.argmin.sets.order import nearest_permuted
from implicitly.argmin.sets.project import simplex
from implicitly.argmin.sets.rows import POSITIVE, Number, check_state, in_full_precision, per_row, without_bad_rows


@in_full_precision
def sparsemax(z: Tensor, dim: int = -1) -> Tensor:
    """Probabilities, some of them exactly 0: the projection of `z` onto the probability simplex along `dim`.

    Martins and Astudillo, "From Softmax to Sparsemax", ICML 2016. Entries of -inf get probability 0.

    Raises:
        TypeError: `z` is not of a floating dtype.
        IndexError: `z` has no such dimension.
        ValueError: nothing along `dim`.
    """
    check_state("sparsemax", z, least=0)
    if z.movedim(dim, -1).shape[-1] == 0:
        raise ValueError(f"sparsemax: z must have entries along dim={dim}, got {tuple(z.shape)}")
    return simplex(z.movedim(dim, -1)).movedim(-1, dim)


@in_full_precision
def soft_sort(z: Tensor, strength: Number = 1.0, descending: bool = False) -> Tensor:
    """The entries of `z` `(..., n)` sorted, but pulled towards their mean so that they have a useful derivative.

    The projection of (1, ..., n) / strength onto the hull of the permutations of z: Blondel, Teboul, Berthet and
    Djolonga, "Fast Differentiable Sorting and Ranking", ICML 2020, with the quadratic regulariser. O(n log^2 n).

    Args:
        z: `(..., n)`, n >= 1.
        strength: > 0, in one over the unit of z; a number or a tensor that broadcasts with `(...)`. As it falls to
            0 the result becomes the sorted z (at a positive strength already, where gaps are below 1 / strength).
        descending: largest first.

    Raises:
        TypeError: `z` is not of a floating dtype.
        ValueError: a strength that is not positive, n = 0, or shapes that do not broadcast.
    """
    check_state("soft_sort", z)
    strength = _strength("soft_sort", strength, z)
    places = _ranks(z)
    # Beyond some 1 / strength every gap of z is smaller, the result is sorted z, and nothing need overflow.
    hardest = 4 * z.shape[-1] ** 2 * torch.finfo(z.dtype).tiny
    places = (places.flip(-1) if descending else places) / strength.clamp(min=hardest)
    return without_bad_rows(lambda z: nearest_permuted(places, z), z, infinite=True)


@in_full_precision
def soft_rank(z: Tensor, strength: Number = 1.0, descending: bool = False) -> Tensor:
    """The rank, 1 of the smallest to n of the largest, of each entry of `z` `(..., n)`, as a piecewise linear map.

    The projection of z / strength onto the hull of the permutations of (1, ..., n). Args and errors as of
    `soft_sort`, but that `strength` is in the unit of z: ranks are exact where gaps are larger than it.
    `descending`: rank 1 is that of the largest.
    """
    check_state("soft_rank", z)
    strength = _strength("soft_rank", strength, z)
    sign = -1.0 if descending else 1.0
    # In the unit of z, as z / strength may be beyond all numbers.
    return without_bad_rows(
        lambda z: nearest_permuted(sign * z, strength * _ranks(z)) / strength, z, infinite=True
    )


def _strength(name: str, strength: Number, z: Tensor) -> Tensor:
    return per_row(name, "strength", strength, z, must=POSITIVE)


def _ranks(z: Tensor) -> Tensor:
    return torch.arange(1, z.shape[-1] + 1, dtype=z.dtype, device=z.device)
