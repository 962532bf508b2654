"""`im.prox`: proximal maps, with exact derivatives.

    prox(z) = argmin 1/2 |x - z|^2 + weight * g(x)

Shapes, broadcasting, derivatives of every order and rows with NaN are as in `im.project`. Weights are >= 0 and
differentiable. If P is the projection onto a set, the proximal map of the set's support function is z - P(z)
(Moreau).
"""

from __future__ import annotations

import torch
from torch import Tensor

from implicitly.argmin.sets.chain import blocks_of, jumps, pulled
from implicitly.argmin.sets.cones import positive_part
from implicitly.argmin.sets.project import l1_ball, norm
from implicitly.argmin.sets.rows import (
    NOT_NEGATIVE,
    NOT_NEGATIVE_AND_FINITE,
    Number,
    block_means,
    check_state,
    in_full_precision,
    outside,
    per_entry,
    per_row,
    without_bad_rows,
)

__all__ = ["l1", "l2", "linf", "nuclear", "total_variation"]


@in_full_precision
def l1(z: Tensor, weight: Number = 1.0) -> Tensor:
    """The proximal map of g = sum |x|: soft thresholding, sign(z) * max(|z| - weight, 0).

    Args:
        z: `(..., n)`.
        weight: >= 0; a number, or a tensor that broadcasts with z, one per entry.

    Raises:
        TypeError: `z` is not of a floating dtype.
        ValueError: a negative weight, or shapes that do not broadcast.
    """
    check_state("prox.l1", z, least=0)
    weight = per_entry("prox.l1", "weight", weight, z, must=NOT_NEGATIVE)

    def core(z: Tensor) -> Tensor:
        small = torch.where(weight > 0, 0.0, z)  # for a weight of 0 it is the identity, also at z = 0
        return torch.where(z > weight, z - weight, torch.where(z < -weight, z + weight, small))

    return without_bad_rows(core, z)


@in_full_precision
def l2(z: Tensor, weight: Number = 1.0) -> Tensor:
    """The proximal map of g = |x|, the 2-norm (not squared) of each row: z * max(1 - weight / |z|, 0).

    Also called group soft thresholding.

    Args:
        z: `(..., n)`, n >= 1.
        weight: >= 0; a number, or a tensor that broadcasts with `(...)`, one per row.

    Raises:
        TypeError: `z` is not of a floating dtype.
        ValueError: a negative weight, n = 0, or shapes that do not broadcast.
    """
    check_state("prox.l2", z)
    weight = per_row("prox.l2", "weight", weight, z, must=NOT_NEGATIVE)

    def core(z: Tensor) -> Tensor:
        beyond = norm(z.detach()) > weight
        finite = torch.where(beyond, weight, 0.0)  # an infinite weight, never exceeded, has no derivative
        small = torch.where(weight > 0, 0.0, z)  # for a weight of 0 it is the identity, also at z = 0
        return torch.where(beyond, z * (1 - finite / norm(torch.where(beyond, z, 1.0))), small)

    return without_bad_rows(core, z, infinite=True)


@in_full_precision
def linf(z: Tensor, weight: Number = 1.0) -> Tensor:
    """The proximal map of g = max |x| of each row: z minus its projection onto the l1 ball of radius `weight`.

    Arguments are those of `l2`.
    """
    check_state("prox.linf", z)
    per_row("prox.linf", "weight", weight, z, must=NOT_NEGATIVE)
    return without_bad_rows(lambda z: z - l1_ball(z, weight), z, infinite=True)


@in_full_precision
def nuclear(Z: Tensor, weight: Number = 1.0) -> Tensor:
    """The proximal map of the nuclear norm: each singular value is lowered by `weight`, at most to 0.

    The symmetric matrix [[0, Z], [Z', 0]] has the eigenvalues +s and -s for each singular value s. Thresholding
    them by two positive parts gives derivatives that do not need distinct singular values. O((n + m)^3).

    Args:
        Z: `(..., n, m)`, n, m >= 1.
        weight: >= 0; a number, or a tensor that broadcasts with `(...)`, one per matrix.

    Raises:
        TypeError: `Z` is not of a floating dtype.
        ValueError: a negative weight, an empty matrix, or shapes that do not broadcast.
    """
    check_state("prox.nuclear", Z, dims=2)
    weight = per_row("prox.nuclear", "weight", weight, Z, dims=2, must=NOT_NEGATIVE)
    n, m = Z.shape[-2:]
    eye = torch.eye(n + m, dtype=Z.dtype, device=Z.device)

    def core(Z: Tensor) -> Tensor:
        most = 2 * Z.detach().abs().sum((-2, -1), keepdim=True)  # at least twice any singular value
        shift = torch.where(weight < most, weight, most) * eye
        padded = torch.nn.functional.pad(Z, (n, 0, 0, m))
        both = padded + padded.mT
        return (positive_part(both - shift) - positive_part(-both - shift))[..., :n, n:]

    def whole(Z: Tensor) -> Tensor:
        # For a weight of 0 it is the identity, also where singular values are 0 and `core` has no derivative.
        free = weight == 0
        return core(torch.where(free, Z.detach(), Z)) + torch.where(free, Z - Z.detach(), 0.0)

    return without_bad_rows(whole, Z, dims=2, infinite=True)


@in_full_precision
def total_variation(z: Tensor, weight: Number | Tensor = 1.0) -> Tensor:
    """The proximal map of g = sum |x_(i+1) - x_i|, each edge with its weight ("taut string"); it is exact.

    Which edges jump, and in which direction, is found exactly (see `chain.py`: usually about 2 log2(n) rounds of
    O(n log n), all rows at once). On each constant part, x is then the mean of z plus or minus the weights of the
    edges that jump at its ends, divided by its length: a linear map of z and the weights.

    Args:
        z: `(..., n)`, along the chain.
        weight: >= 0 and finite; a number, or a tensor that broadcasts with `(..., n - 1)`, one per edge:
            weight[i] belongs to the edge between entries i and i + 1. One number per row is `(..., 1)`.

    Raises:
        TypeError: `z` is not of a floating dtype.
        ValueError: weights that are negative or not finite, or shapes that do not broadcast.
    """
    check_state("prox.total_variation", z)
    n = z.shape[-1]
    must = NOT_NEGATIVE_AND_FINITE
    weight = per_entry("prox.total_variation", "weight", weight, z, entries=(n - 1,), must=must)
    if n == 1:
        return z
    lead = torch.broadcast_shapes(z.shape[:-1], weight.shape[:-1] if weight.ndim else ())
    w = weight.expand(*lead, n - 1)

    def core(z: Tensor) -> Tensor:
        z = z.expand(*lead, n)
        sign = outside(jumps, z, w)
        parts = torch.where(w.detach() > 0, sign, 1.0)  # an edge of weight 0 ties nothing, not even equal entries
        return block_means(pulled(z, w, sign), None, blocks_of(parts))

    return without_bad_rows(core, z, infinite=True)
