"""Projections onto cones: second-order, positive semidefinite, exponential."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from implicitly.argmin.sets.rows import check_state, in_full_precision, mapped_first, outside, without_bad_rows
from implicitly.transforms import Operation


@in_full_precision
def second_order_cone(z: Tensor) -> Tensor:
    """Project onto the second-order cone |x| <= t; t is the first entry, as in SCS and Clarabel.

    For z = (t, x) outside of the cone and of its polar the nearest point is (t + |x|) / 2 * (1, x / |x|) (Boyd and
    Vandenberghe, Convex Optimization, exercise 8.3). At kinks, where |x| = t or |x| = -t, and at 0, the derivative
    is that of the inside of the cone (the identity) or of the polar (zero).

    Args:
        z: `(..., n)` with n >= 1; n = 1 is the half-line t >= 0.

    Raises:
        TypeError: `z` is not of a floating dtype.
        ValueError: n = 0.
    """
    check_state("second_order_cone", z)
    return without_bad_rows(_second_order, z, infinite=True)


def _second_order(z: Tensor) -> Tensor:
    if z.shape[-1] == 1:
        return torch.where(z.detach() >= 0, z, 0.0)
    t, x = z[..., :1], z[..., 1:]
    # Scaled so that the norm cannot overflow; scaling by a constant commutes with the projection onto a cone.
    scale = z.detach().abs().amax(-1, keepdim=True)
    scale = torch.where((scale > 0) & scale.isfinite(), scale, 1.0)
    t, x = t / scale, x / scale
    length = x.detach().square().sum(-1, keepdim=True).sqrt()
    inside, polar = length <= t.detach(), length <= -t.detach()
    between = ~(inside | polar)
    x_safe = torch.where(between, x, 1.0)
    norm = x_safe.square().sum(-1, keepdim=True).sqrt()
    half = (t + norm) / 2
    edge = torch.cat([half, half * (x_safe / norm)], dim=-1) * scale
    return torch.where(between, edge, torch.where(inside, z, 0.0))


# ------------------------------------------------------------------------------- positive semidefinite cone


@in_full_precision
def psd_cone(Z: Tensor) -> Tensor:
    """Project the symmetric part of Z onto the positive semidefinite matrices, in the Frobenius norm.

    With the eigenvalues l and eigenvectors V of Z the projection is X = V max(l, 0) V'. X and X - Z are
    complementary, X (X - Z) = 0, and differentiating that gives a Lyapunov equation,

        |Z| dX + dX |Z| = X dZ + dZ X,       |Z| = 2 X - Z,

    whose solution has the coefficients (l_i^+ + l_j^+) / (|l_i| + |l_j|) of Daleckii and Krein's formula (Higham,
    Functions of Matrices, theorem 3.11). It does not need distinct eigenvalues, and it can itself be
    differentiated as the solution of its equation, which gives derivatives of every order. Where two eigenvalues
    are zero up to rounding, there is no derivative, and their block gets 0.

    Args:
        Z: `(..., n, n)`, n >= 1. One eigenvalue decomposition, O(n^3), serves the value and the derivatives.

    Raises:
        TypeError: `Z` is not of a floating dtype.
        ValueError: `Z` is not square.
    """
    check_state("psd_cone", Z, dims=2)
    if Z.shape[-1] != Z.shape[-2]:
        raise ValueError(f"psd_cone: Z must be square matrices (..., n, n), got {tuple(Z.shape)}")
    return without_bad_rows(positive_part, Z, dims=2, infinite=True)


def positive_part(Z: Tensor) -> Tensor:
    """`psd_cone` of finite matrices."""
    return _PositivePart.apply(_symmetric(Z))[0]


def _symmetric(Z: Tensor) -> Tensor:
    return (Z + Z.mT) / 2


class _PositivePart(Operation):
    @staticmethod
    def forward(Z):
        values, vectors = torch.linalg.eigh(Z)
        X = (vectors * values.clamp(min=0).unsqueeze(-2)) @ vectors.mT
        return _symmetric(X), vectors, values.abs()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*inputs, *output)
        ctx.save_for_forward(*inputs, *output)

    @staticmethod
    def backward(ctx, *cotangents):
        Z, X, vectors, sizes = ctx.saved_tensors
        U = _Lyapunov.apply(2 * X - Z, _symmetric(cotangents[0]), vectors, sizes)
        return X @ U + U @ X

    @staticmethod
    def jvp(ctx, *tangents):
        Z, X, vectors, sizes = (forward_ad.unpack_dual(t).primal for t in ctx.saved_tensors)
        dZ = _symmetric(tangents[0])
        with forward_ad._set_fwd_grad_enabled(True):  # an enclosing jvp of torch.func needs it
            return _Lyapunov.apply(2 * X - Z, X @ dZ + dZ @ X, vectors, sizes), None, None

    @staticmethod
    def vmap(info, in_dims, *args):
        return _PositivePart.apply(*mapped_first(info.batch_size, in_dims, args)), (0, 0, 0)


class _Lyapunov(Operation):
    """Y with S Y + Y S = C, for symmetric C and S >= 0; the eigenvectors and eigenvalues of S are known."""

    @staticmethod
    def forward(S, C, vectors, sizes):
        sums = sizes.unsqueeze(-1) + sizes.unsqueeze(-2)
        none = sums <= sizes.shape[-1] * torch.finfo(S.dtype).eps * sizes.amax(-1)[..., None, None]
        scaled = (vectors.mT @ C @ vectors) / torch.where(none, float("inf"), sums)
        return _symmetric(vectors @ scaled @ vectors.mT)

    @staticmethod
    def setup_context(ctx, inputs, output):
        S, _, vectors, sizes = inputs
        ctx.save_for_backward(S, output, vectors, sizes)
        ctx.save_for_forward(S, output, vectors, sizes)

    @staticmethod
    def backward(ctx, *cotangents):
        S, Y, vectors, sizes = ctx.saved_tensors
        U = _Lyapunov.apply(S, _symmetric(cotangents[0]), vectors, sizes)
        return -(U @ Y + Y @ U), U, None, None

    @staticmethod
    def jvp(ctx, *tangents):
        S, Y, vectors, sizes = (forward_ad.unpack_dual(t).primal for t in ctx.saved_tensors)
        dS, dC = tangents[:2]
        with forward_ad._set_fwd_grad_enabled(True):
            right = torch.zeros_like(Y) if dC is None else _symmetric(dC)
            if dS is not None:
                dS = _symmetric(dS)
                right = right - dS @ Y - Y @ dS
            return _Lyapunov.apply(S, right, vectors, sizes)

    @staticmethod
    def vmap(info, in_dims, *args):
        return _Lyapunov.apply(*mapped_first(info.batch_size, in_dims, args)), 0


# ----------------------------------------------------------------------------------------- exponential cone

# Newton steps that carry the derivatives; these are exact up to order 1, 3, 7 after one, two, three steps.
CARRYING_STEPS = 3
# The most steps of the search; a few rows take 25, and bisection alone would take 60.
SEARCH_STEPS = 100


@in_full_precision
def exponential_cone(z: Tensor) -> Tensor:
    """Project onto the exponential cone, the closure of {(x, y, z): y > 0, y exp(x / y) <= z}.

    The order of x, y and z is that of SCS, Clarabel and cvxpy.

    Outside of the cone, its polar and the flat face, the nearest point lies on the curved surface. Its slope
    rho = x / y solves one equation in one unknown (Friberg, "Projection onto the exponential cone: a univariate
    root-finding problem", Optimization Methods and Software 38, 2023). A safeguarded Newton iteration finds rho in
    double precision; three more Newton steps at the root, recorded by autograd, carry derivatives up to order 7.

    Args:
        z: `(..., 3)`.

    Raises:
        TypeError: `z` is not of a floating dtype.
        ValueError: the last dimension is not 3.
    """
    _check_triples("exponential_cone", z)
    return without_bad_rows(_exponential, z, infinite=True)


@in_full_precision
def dual_exponential_cone(z: Tensor) -> Tensor:
    """Project onto the dual of the exponential cone, the closure of {(u, v, w): u < 0, -u exp(v / u) <= e w}.

    By Moreau's decomposition the nearest point is z + P(-z), with the projection P onto the exponential cone.
    Arguments and errors are those of `exponential_cone`.
    """
    _check_triples("dual_exponential_cone", z)
    return without_bad_rows(lambda z: z + _exponential(-z), z, infinite=True)


def _check_triples(name: str, z: Tensor) -> None:
    check_state(name, z)
    if z.shape[-1] != 3:
        raise ValueError(f"{name}: z must be (..., 3), got {tuple(z.shape)}")


INSIDE, POLAR, FLAT, CURVED = range(4)


def _exponential(z: Tensor) -> Tensor:
    dtype = z.dtype
    z = z.double()
    size = z.detach().abs().amax(-1, keepdim=True)
    size = torch.where((size > 0) & size.isfinite(), size, 1.0)  # a cone: scaling commutes with the projection
    r, s, t = (z / size).unbind(-1)
    kind, slope = outside(_slope, r, s, t)
    curved = kind == CURVED
    safe = [torch.where(curved, v, c) for v, c in zip((r, s, t), _ON_THE_CURVE)]
    surface = _on_surface(slope, *safe) * size
    flat = torch.stack([r, torch.zeros_like(s), torch.where(t.detach() > 0, t, 0.0)], dim=-1) * size
    kind = kind.unsqueeze(-1)
    other = torch.where(kind == INSIDE, z, torch.where(kind == FLAT, flat, 0.0))
    return torch.where(kind == CURVED, surface, other).to(dtype)


# A point whose projection has the slope 0; it stands in for rows without a slope.
_ON_THE_CURVE = (1.0, 1.0, 0.0)


def _parts(rho: Tensor, r: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """y of the projection at slope rho, and -x of the dual point; both are positive at the solution."""
    q = rho * (rho - 1) + 1
    return ((rho - 1) * r + s) / q, (r - rho * s) / q


def _height(rho: Tensor, scale: Tensor, r: Tensor, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """exp(-scale) h(rho), increasing and zero at the solution (Friberg's theorem 2), and its derivative."""
    q = rho * (rho - 1) + 1
    y, u = _parts(rho, r, s)
    dy, du = (r - (2 * rho - 1) * y) / q, (-s - (2 * rho - 1) * u) / q
    up, down = (rho - scale).exp(), (-rho - scale).exp()
    return up * y - down * u - (-scale).exp() * t, up * (y + dy) + down * (u - du)


def _on_surface(slope: Tensor, r: Tensor, s: Tensor, t: Tensor) -> Tensor:
    """The projection at the detached slope rho, whose derivatives the Newton steps carry."""
    scale, rho = slope.abs(), slope
    for _ in range(CARRYING_STEPS):
        value, derivative = _height(rho, scale, r, s, t)
        rho = rho - value / derivative
    rho = torch.where(slope.isfinite() & rho.detach().isfinite(), rho, slope)
    y, u = _parts(rho, r, s)
    # Two expressions for the same number; the one without a large exponential keeps its digits.
    steep = slope > 0
    lowered = torch.where(steep, -rho, rho)
    z = torch.where(steep, t + lowered.exp() * u, lowered.exp() * y)
    return torch.stack([rho * y, y, z], dim=-1)


def _slope(r: Tensor, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """The case `(...)` that each projection is in, and its slope rho on the curved surface (else 0)."""
    ratio = r / torch.where(s > 0, s, 1.0)
    inside = ((s > 0) & (s * ratio.exp() <= t)) | ((s == 0) & (r <= 0) & (t >= 0))
    against = s / torch.where(r > 0, r, 1.0)
    polar = ((r > 0) & (r * (against - 1).exp() <= -t)) | ((r == 0) & (s <= 0) & (t <= 0))
    kind = torch.full_like(r, CURVED, dtype=torch.int64)
    kind = torch.where((r <= 0) & (s <= 0), FLAT, kind)
    kind = torch.where(polar, POLAR, kind)
    kind = torch.where(inside, INSIDE, kind)
    curved = kind == CURVED
    r, s, t = (torch.where(curved, v, c) for v, c in zip((r, s, t), _ON_THE_CURVE))
    low, high = _bracket(r, s, t)
    return kind, torch.where(curved, _root(low, high, r, s, t), 0.0)


def _bracket(r: Tensor, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds on the root: the slopes where both parts are positive, narrowed to where h changes its sign."""
    low = torch.where(r > 0, 1 - s / torch.where(r > 0, r, 1.0), -float("inf"))
    high = torch.where(s > 0, r / torch.where(s > 0, s, 1.0), float("inf"))
    reach = torch.ones_like(r)
    for _ in range(12):  # 2^12 is beyond the range of the exponential
        if bool((high - low <= reach).all()):
            break
        from_low, from_high = low + reach, high - reach
        h_up = _height(from_low, from_low.abs(), r, s, t)[0]
        h_down = _height(from_high, from_high.abs(), r, s, t)[0]
        high, low = (
            torch.where((from_low < high) & (h_up > 0), from_low, high),
            torch.where((from_high > low) & (h_down < 0), from_high, low),
        )
        reach = 2 * reach
    return torch.where(low.isinf(), high - reach, low), torch.where(high.isinf(), low + reach, high)


def _root(low: Tensor, high: Tensor, r: Tensor, s: Tensor, t: Tensor) -> Tensor:
    """The root of h between `low` and `high`: by Newton's steps where they stay inside, else by bisection."""
    rho, change = (low + high) / 2, high - low
    for _ in range(SEARCH_STEPS):
        value, derivative = _height(rho, rho.abs(), r, s, t)
        low, high = torch.where(value < 0, rho, low), torch.where(value > 0, rho, high)
        newton = rho - value / derivative
        # Far from the root Newton's steps have length one, and the midpoint is better.
        fits = (newton >= low) & (newton <= high) & (2 * (newton - rho).abs() <= change)
        new = torch.where(fits, newton, (low + high) / 2)
        found = value.abs() <= 8 * torch.finfo(r.dtype).eps * _size_of_terms(rho, r, s, t)
        if bool(found.all()):
            break
        new = torch.where(found, rho, new)
        change, rho = (new - rho).abs(), new
    return rho


def _size_of_terms(rho: Tensor, r: Tensor, s: Tensor, t: Tensor) -> Tensor:
    """The size that rounding errors of `_height` are relative to."""
    scale, r, s = rho.abs(), r.abs(), s.abs()
    y, u = (rho - 1).abs() * r + s, r + scale * s
    return ((rho - scale).exp() * y + (-rho - scale).exp() * u) / (rho * (rho - 1) + 1) + (-scale).exp() * t.abs()
