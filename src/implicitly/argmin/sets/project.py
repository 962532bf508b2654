"""`im.project`: Euclidean projections onto convex sets, with exact derivatives.

    P(z) = argmin 1/2 |x - z|^2  over x in the set

Each function acts on the last dimension of `z` `(..., n)` (for matrices, on the last two); leading dimensions are
a batch of any shape, which may be empty. Every parameter may be a number or a tensor and is differentiable: a
number per row (a radius) broadcasts with the leading dimensions of z, a vector with z itself. The result has the
dtype and device of z; half precision is computed in float32 internally, also under autocast.

P is found outside of autograd, by whatever is best (a sort, a Newton iteration, an eigenvalue decomposition). That
tells which face or case the nearest point is in, and on that face P is a smooth map of z and the parameters,
written in operations that are differentiable to any order, in both modes and under `vmap`. On the boundary between
two faces P has no derivative; that of the face that was found is used, which is an element of Clarke's generalised
Jacobian. Rows that hold NaN, or an infinity that has no nearest point, give NaN with zero gradient, and do not
affect other rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from implicitly.argmin.sets.cones import dual_exponential_cone, exponential_cone, psd_cone, second_order_cone
from implicitly.argmin.sets.order import isotonic, permutahedron
from implicitly.argmin.sets.power_cone import dual_power_cone, power_cone
from implicitly.argmin.sets.rows import (
    FINITE,
    NOT_NEGATIVE,
    Must,
    Number,
    as_parameter,
    check_all,
    check_state,
    check_values,
    in_full_precision,
    in_view,
    per_entry,
    per_row,
    without_bad_rows,
)
from implicitly.argmin.sets.transport import sinkhorn
from implicitly.host import maybe_any

A_NUMBER = Must("a number", lambda x: ~x.isnan())
# How often a projection onto an affine set is refined at most, and how many rounding errors may be left.
REFINEMENTS = 6
ROUNDINGS = 32

__all__ = [
    "affine",
    "box",
    "dual_exponential_cone",
    "dual_power_cone",
    "exponential_cone",
    "halfspace",
    "isotonic",
    "l1_ball",
    "l2_ball",
    "linf_ball",
    "permutahedron",
    "power_cone",
    "psd_cone",
    "second_order_cone",
    "simplex",
    "sinkhorn",
]


@in_full_precision
def box(z: Tensor, lower: Number = -float("inf"), upper: Number = float("inf")) -> Tensor:
    """Project onto the box lower <= x <= upper, entry by entry.

    Args:
        z: `(..., n)`.
        lower, upper: numbers, or tensors that broadcast with z; infinite where there is no bound.

    Raises:
        TypeError: `z` is not of a floating dtype.
        ValueError: lower > upper somewhere, or shapes that do not broadcast.
    """
    check_state("box", z, least=0)
    low, high = per_entry("box", "lower", lower, z), per_entry("box", "upper", upper, z)
    least, most = in_view(lower, low), in_view(upper, high)
    check_values(least <= most, least - most, "box: lower must be <= upper everywhere; lower - upper")

    def core(z: Tensor) -> Tensor:
        inside = torch.where(low == high, low, z)  # a single point does not move with z, even if z is that point
        return torch.where(z < low, low, torch.where(z > high, high, inside))

    return without_bad_rows(core, z)


@in_full_precision
def simplex(z: Tensor, radius: Number = 1.0) -> Tensor:
    """Project onto the simplex x >= 0, sum(x) = radius.

    x = max(z - tau, 0), with the tau that makes the sum right, which sorting finds in O(n log n). Held, Wolfe and
    Crowder, "Validation of subgradient optimization", Mathematical Programming 6 (1974); Duchi et al., ICML 2008.

    Args:
        z: `(..., n)` with n >= 1; entries may be -inf, which gives 0.
        radius: >= 0 and finite, a number or a tensor that broadcasts with `(...)`. 0 is the single point 0.

    Raises:
        TypeError: `z` is not of a floating dtype.
        ValueError: a radius that is negative or infinite, n = 0, or shapes that do not broadcast.
    """
    check_state("simplex", z)
    given, radius = radius, per_row("simplex", "radius", radius, z, must=NOT_NEGATIVE)
    check_all("simplex", "radius", given, radius, FINITE)
    shareless = ~z.detach().amax(-1, keepdim=True).isfinite()
    if maybe_any(shareless):  # rows with an entry of inf, or without a finite one, have no nearest point
        z = torch.where(shareless, float("nan"), z)
    return without_bad_rows(lambda z: _simplex(z, radius), z)


def _simplex(z: Tensor, radius: Tensor) -> Tensor:
    z = z - z.detach().amax(-1, keepdim=True)  # does not change x, and keeps its digits
    sorted_z, order = z.detach().sort(-1, descending=True)
    counts = torch.arange(1, z.shape[-1] + 1, dtype=z.dtype, device=z.device)
    levels = (sorted_z.cumsum(-1) - radius.detach()) / counts
    count = (sorted_z > levels).sum(-1, keepdim=True)
    support = z.detach() > levels.gather(-1, (count - 1).clamp(min=0))
    # For a radius of 0, the largest entry is the one that grows with it.
    support = support | ((count == 0) & (torch.arange(z.shape[-1], device=z.device) == order[..., :1]))
    z, support = torch.broadcast_tensors(z, support)
    total = torch.where(support, z, 0.0).sum(-1, keepdim=True)
    level = (total - radius) / support.sum(-1, keepdim=True).clamp(min=1)
    return torch.where(support, z - level, 0.0)


@in_full_precision
def l1_ball(z: Tensor, radius: Number = 1.0) -> Tensor:
    """Project onto the l1 ball sum |x| <= radius: z if inside, else |z| projected to the simplex, with z's signs.

    Arguments and errors are those of `simplex`, except that the radius may be infinite.
    """
    check_state("l1_ball", z)
    radius = per_row("l1_ball", "radius", radius, z, must=NOT_NEGATIVE)
    return without_bad_rows(lambda z: _l1_ball(z, radius), z, infinite=True)


def _l1_ball(z: Tensor, radius: Tensor) -> Tensor:
    sign = z.detach().sign()
    inside = z.detach().abs().sum(-1, keepdim=True) <= radius
    inner = torch.where(radius > 0, z, 0.0)  # the one point of a ball of radius 0 does not move with z
    return torch.where(inside, inner, sign * _simplex(sign * z, radius))


@in_full_precision
def l2_ball(z: Tensor, radius: Number = 1.0) -> Tensor:
    """Project onto the ball |x| <= radius in the 2-norm: z if inside, else radius * z / |z|.

    Arguments and errors are those of `simplex`, except that the radius may be infinite.
    """
    check_state("l2_ball", z)
    radius = per_row("l2_ball", "radius", radius, z, must=NOT_NEGATIVE)

    def core(z: Tensor) -> Tensor:
        beyond = norm(z.detach()) > radius
        finite = torch.where(beyond, radius, 1.0)  # keeps an infinite radius, never reached, out of the derivative
        inner = torch.where(radius > 0, z, 0.0)  # the one point of a ball of radius 0 does not move with z
        return torch.where(beyond, z * (finite / norm(torch.where(beyond, z, 1.0))), inner)

    return without_bad_rows(core, z, infinite=True)


def norm(x: Tensor) -> Tensor:
    """The 2-norm `(..., 1)` of each row, without overflow; a row of zeros has no finite derivative."""
    scale = x.detach().abs().amax(-1, keepdim=True)
    scale = torch.where(scale > 0, scale, 1.0)
    return scale * (x / scale).square().sum(-1, keepdim=True).sqrt()


@in_full_precision
def linf_ball(z: Tensor, radius: Number = 1.0) -> Tensor:
    """Project onto |x_i| <= radius for every i; arguments and errors are those of `l2_ball`."""
    check_state("linf_ball", z)
    radius = per_row("linf_ball", "radius", radius, z, must=NOT_NEGATIVE)

    def core(z: Tensor) -> Tensor:
        inner = torch.where(radius > 0, z, 0.0)  # the one point of a ball of radius 0 does not move with z
        return torch.where(z < -radius, -radius, torch.where(z > radius, radius, inner))

    return without_bad_rows(core, z)


@in_full_precision
def halfspace(z: Tensor, a: Tensor, b: Number) -> Tensor:
    """Project onto the halfspace a'x <= b: z - a * max(a'z - b, 0) / a'a.

    Args:
        z: `(..., n)`.
        a: the normal, broadcasts with z; it may be 0 only where b >= 0, so that every point is feasible.
        b: a number or a tensor that broadcasts with `(...)`.

    Raises:
        TypeError: `z` is not of a floating dtype.
        ValueError: no point is feasible, numbers that are not finite, or shapes that do not broadcast.
    """
    check_state("halfspace", z)
    a = per_entry("halfspace", "a", a, z, must=FINITE)
    b = per_row("halfspace", "b", b, z, must=A_NUMBER)
    size = _power_of_two(a)
    a, b = a / size, b / size
    length = a.square().sum(-1, keepdim=True)
    empty = (length == 0) & ~(b >= 0)
    check_values(~empty, b, "halfspace: no point satisfies a'x <= b with a = 0; b must be >= 0 there")
    check_values(b > -float("inf"), b, "halfspace: no point satisfies a'x <= b / |a|")
    length = torch.where(length.detach() == 0, 1.0, length)

    def core(z: Tensor) -> Tensor:
        excess = (a * z).sum(-1, keepdim=True) - b
        return z - a * (torch.where(excess.detach() > 0, excess, 0.0) / length)

    return without_bad_rows(core, z, infinite=True)


def _power_of_two(rows: Tensor) -> Tensor:
    """The size of the largest entry of each row, as a power of two, `(..., 1)`; 1 for rows of zeros.

    Dividing by a power of two does not round.
    """
    size = rows.detach().abs().amax(-1, keepdim=True)
    size = torch.where(size > 0, size, 1.0)
    # By the mantissa, since `torch.compile` may fail to generate code for arithmetic on integer exponents.
    return size / (2 * torch.frexp(size).mantissa)


@in_full_precision
def affine(z: Tensor, A: Tensor, b: Tensor) -> Tensor:
    """Project onto the affine set A x = b: z - A^+ (A z - b), with the pseudoinverse A^+.

    The rows of A may be linearly dependent, as long as the equations are consistent; the derivative with respect
    to A is then the one along matrices of the same rank (Golub and Pereyra, SIAM J. Numer. Anal. 10, 1973). This
    takes one singular value decomposition of A, O(n m^2).

    Args:
        z: `(..., n)`.
        A: `(m, n)` or `(..., m, n)`.
        b: `(m,)` or `(..., m)`.

    Raises:
        TypeError: `z` is not of a floating dtype.
        ValueError: the equations contradict each other, numbers that are not finite, or shapes that do not fit.
    """
    check_state("affine", z)
    A, b = as_parameter("affine", "A", A, z), as_parameter("affine", "b", b, z)
    n = z.shape[-1]
    if A.ndim < 2 or A.shape[-1] != n or b.ndim < 1 or b.shape[-1] != A.shape[-2]:
        raise ValueError(
            f"affine: for z {tuple(z.shape)} A must be (..., m, {n}) and b (..., m); got A {tuple(A.shape)} and "
            f"b {tuple(b.shape)}"
        )
    for name, value in (("A", A), ("b", b)):
        check_values(value.isfinite(), value, f"affine: {name} must be finite")
    # Scaling an equation does not change it, but it does change the cutoff of singular values.
    unit = _power_of_two(A)
    A, b = A / unit, b / unit.squeeze(-1)
    inverse = torch.linalg.pinv(A)
    origin = _nearest(A.new_zeros(n), *(t.detach() for t in (A, b, inverse)))
    _check_consistent(A, b, origin, unit.squeeze(-1))
    return without_bad_rows(lambda z: _nearest(z, A, b, inverse), z, infinite=True)


def _nearest(z: Tensor, A: Tensor, b: Tensor, inverse: Tensor) -> Tensor:
    """z - A^+ (A z - b), refined.

    Repeating the step would change nothing in exact arithmetic. It removes what the rounding errors of the
    pseudoinverse left, which grow with the condition number of A.
    """
    left = _apply(A, z) - b
    for _ in range(REFINEMENTS):
        z = z - _apply(inverse, left)
        left = _apply(A, z) - b
        if not maybe_any(left.detach().abs() > ROUNDINGS * torch.finfo(z.dtype).eps * _terms(A, z, b)):
            break
    return z


def _terms(A: Tensor, x: Tensor, b: Tensor) -> Tensor:
    """The size that rounding errors of A x - b are relative to."""
    return (_apply(A.abs(), x.abs()) + b.abs()).detach()


def _apply(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def _check_consistent(A: Tensor, b: Tensor, x: Tensor, unit: Tensor) -> None:
    """Raise ValueError if A x = b fails at its least-squares solution `x`, where each equation has its `unit`."""
    left = (_apply(A, x) - b).detach().abs()
    # 2e-12 in float64, 6e-6 in float32: room for rounding errors of the pseudoinverse beyond those of the terms.
    limit = torch.finfo(A.dtype).eps ** 0.75 * _terms(A, x, b)
    check_values(
        left <= limit, left * unit, "affine: the equations A x = b contradict each other; the best x misses one by"
    )
