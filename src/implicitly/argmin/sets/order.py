"""Isotonic regression, and the projection onto the permutahedron that follows from it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from implicitly.argmin.sets.rows import (
    FINITE,
    POSITIVE,
    block_means,
    check_state,
    in_full_precision,
    outside,
    per_entry,
    without_bad_rows,
)


@in_full_precision
def isotonic(z: Tensor, weights: Tensor | None = None, increasing: bool = True) -> Tensor:
    """Isotonic regression: the x with x_1 <= x_2 <= ... <= x_n that minimises the sum of weights * (x - z)^2.

    x is constant on blocks, where it is the (weighted) mean of z. The blocks are found by merging neighbouring
    parts of the row, as in merge sort. Two parts that are sorted already meet at one level v: x = min(x, v) on the
    left and max(x, v) on the right, with v the root of a piecewise linear function that one sort gives. This costs
    O(n log^2 n) per row, and treats all rows and all pairs of parts at once. (Parts may be pooled first, in any
    order: Barlow, Bartholomew, Bremner and Brunk, Statistical Inference under Order Restrictions, 1972.)

    Args:
        z: `(..., n)`.
        weights: positive, broadcast with z; None: all one.
        increasing: if False, x_1 >= x_2 >= ... instead.

    Raises:
        TypeError: `z` is not of a floating dtype.
        ValueError: weights that are not positive and finite, or shapes that do not broadcast.
    """
    check_state("isotonic", z, least=0)
    if weights is not None:
        weights = per_entry("isotonic", "weights", weights, z, must=POSITIVE)
        z, weights = torch.broadcast_tensors(z, weights)

    def core(z: Tensor) -> Tensor:
        return _isotonic(z, weights) if increasing else -_isotonic(-z, weights)

    return without_bad_rows(core, z, infinite=True)


def _isotonic(z: Tensor, weights: Tensor | None) -> Tensor:
    if z.shape[-1] < 2:
        return z
    blocks = outside(_blocks, z) if weights is None else outside(_blocks, z, weights)
    return block_means(z, weights, blocks)


def _blocks(z: Tensor, weights: Tensor | None = None, apart: Tensor | None = None) -> Tensor:
    """The block `(..., n)` int64, counted from 0, that each entry of the isotonic regression is in.

    Equal neighbours share a block, unless they are `apart` `(..., n - 1)` and nothing has moved them.
    """
    n = z.shape[-1]
    if z.numel() == 0:
        return torch.zeros_like(z, dtype=torch.int64)
    levels = (n - 1).bit_length()
    z = z * 0.5 ** (levels + 1)  # no sum of differences overflows
    weights = torch.ones_like(z) if weights is None else weights
    missing = 2**levels - n  # filled with copies of the largest entry, which no block has a reason to join
    x = torch.cat([z, z.amax(-1, keepdim=True).expand(*z.shape[:-1], missing)], dim=-1)
    w = F.pad(weights, (0, missing), value=1.0)
    for level in range(levels):
        half = 2**level
        x = _merged(x.unflatten(-1, (-1, 2 * half)), w.unflatten(-1, (-1, 2 * half)), half).flatten(-2)
    rises = x[..., 1:n] > x[..., : n - 1]
    if apart is not None:
        own = x[..., :n] == z
        rises = rises | (apart & own[..., 1:] & own[..., :-1])
    return F.pad(rises.cumsum(-1), (1, 0))


def _merged(x: Tensor, w: Tensor, half: int) -> Tensor:
    """The isotonic regression of `x` `(..., 2 half)`, of which each half is increasing already."""
    t, order = x.sort(dim=-1, stable=True)
    w = w.gather(-1, order)
    of_left = order < half
    left, right = torch.where(of_left, w, 0.0), torch.where(of_left, 0.0, w)
    # Between t_k and t_(k+1): the weight of the left half that is above, and of the right half at or below.
    above, below = F.pad(_summed_from_behind(left)[..., 1:], (0, 1)), right.cumsum(-1)
    # Sums of gaps, none of which is negative, keep the digits of small numbers next to large ones.
    gaps = F.pad(t.diff(dim=-1), (0, 1))
    above_sum, below_sum = _summed_from_behind(gaps * above), F.pad((gaps * below).cumsum(-1)[..., :-1], (1, 0))
    surplus = above_sum - below_sum  # at the level v = t_k; decreases with k, and ends <= 0
    k = ((surplus >= 0).sum(-1, keepdim=True) - 1).clamp(min=0)
    size = (above + below).gather(-1, k)
    low, high = t.gather(-1, k), t.gather(-1, (k + 1).clamp(max=2 * half - 1))
    level = low + surplus.gather(-1, k) / torch.where(size > 0, size, 1.0)
    level = torch.where(size > 0, torch.minimum(level, high), low)
    return torch.cat([torch.minimum(x[..., :half], level), torch.maximum(x[..., half:], level)], dim=-1)


def _summed_from_behind(x: Tensor) -> Tensor:
    """The sum of each entry and all that follow it."""
    return x.flip(-1).cumsum(-1).flip(-1)


@in_full_precision
def permutahedron(z: Tensor, w: Tensor) -> Tensor:
    """Project onto the permutahedron, the convex hull of all permutations of w.

    Let sigma sort z, and let w be sorted, both in descending order. Then the nearest point is z_sigma - v, put
    back into the order of z, where v is the decreasing isotonic regression of z_sigma - w: Blondel, Teboul,
    Berthet and Djolonga, "Fast Differentiable Sorting and Ranking", ICML 2020, proposition 3.

    Args:
        z: `(..., n)`.
        w: broadcasts with z; differentiable.

    Raises:
        TypeError: `z` is not of a floating dtype.
        ValueError: shapes that do not broadcast, or w is not finite.
    """
    check_state("permutahedron", z)
    w = per_entry("permutahedron", "w", w, z, must=FINITE)
    w = w.expand(*w.shape[:-1], z.shape[-1])
    return without_bad_rows(lambda z: nearest_permuted(z, w), z, infinite=True)


def nearest_permuted(z: Tensor, w: Tensor) -> Tensor:
    """`permutahedron` of finite rows."""
    z, w = torch.broadcast_tensors(z, w.sort(-1, descending=True).values)
    order = z.detach().argsort(
        dim=-1, descending=True, stable=True
    )  # ties alike in every derivative, on any device
    descending = z.gather(-1, order)
    # No block spans a gap of z larger than the range of w; cut short, such a gap hides no digits of the others.
    gaps = descending.detach()[..., :-1] - descending.detach()[..., 1:]
    reach = (w[..., :1] - w[..., -1:]).detach()
    falls = F.pad(torch.minimum(gaps, 2 * reach).cumsum(-1), (1, 0))
    # Equal entries of z that meet equal entries of w get these, and still do when they separate: they form no
    # block.
    apart = (gaps == 0) & (w[..., :-1] == w[..., 1:]).detach()
    begins = outside(lambda s, apart: _blocks(s, None, apart), w - w[..., :1] + falls, apart).diff(dim=-1) > 0
    begins = F.pad(begins | (gaps > reach), (1, 0), value=False)
    blocks = begins.cumsum(-1)
    # A block keeps its differences, which would lose digits next to large numbers, and takes the mean of w.
    index = torch.arange(z.shape[-1], device=z.device).expand_as(blocks)
    first = torch.where(begins, index, 0).cummax(-1).values
    own = descending - descending.detach().gather(-1, first)
    nearest = block_means(w, None, blocks) + (own - block_means(own, None, blocks))
    return nearest.gather(-1, order.argsort(-1))
