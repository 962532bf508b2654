"""Projection onto power cones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from implicitly.argmin.sets.cones import CARRYING_STEPS
from implicitly.argmin.sets.rows import check_state, outside, without_bad_rows
from implicitly.checks import NUMBERS, check_kind

# The search is for a theta with |theta| below this: at its ends r is 1e-43 of its bound, and derivatives of theta,
# which grow as much, do not overflow in any order.
REACH = 100.0
# Bisections of that range, down to rounding errors.
SEARCH_STEPS = 58
# A bounded entry so much smaller than the others counts as zero: products with it underflow.
NOTHING = 1e-120


def power_cone(z: Tensor, exponents: tuple[float, ...]) -> Tensor:
    """Project onto the power cone {(x, t): x >= 0, x_1^a_1 ... x_k^a_k >= |t|}.

    The exponents a are positive and sum to one.

    Outside of the cone and its polar the nearest point is x_i = (z_i + sqrt(z_i^2 + 4 a_i r (|t| - r))) / 2, where
    r, the absolute value of its last entry, solves one equation in one unknown (Hien, "Differential properties of
    Euclidean projection onto power cone", Mathematical Methods of Operations Research 82, 2015, proposition 2.2).
    A search finds r in double precision; three Newton steps there, recorded by autograd, carry derivatives up to
    order 7. These steps do not move r: near the cone and near its polar, rounding errors would make them long.

    Args:
        z: `(..., k + 1)`, the bounded entry t last.
        exponents: a_1, ..., a_k.

    Raises:
        TypeError: `z` is not of a floating dtype, or exponents are not numbers.
        ValueError: exponents that are not positive or don't sum to one, or don't fit z.
    """
    _check("power_cone", z, exponents)
    return without_bad_rows(lambda z: _power(z, exponents), z, infinite=True)


def dual_power_cone(z: Tensor, exponents: tuple[float, ...]) -> Tensor:
    """Project onto the dual of the power cone.

    By Moreau's decomposition the nearest point is z + P(-z), with the projection P onto the power cone. Arguments
    and errors are those of `power_cone`.
    """
    _check("dual_power_cone", z, exponents)
    return without_bad_rows(lambda z: z + _power(-z, exponents), z, infinite=True)


def _check(name: str, z: Tensor, exponents: tuple[float, ...]) -> None:
    check_state(name, z)
    if not isinstance(exponents, Sequence) or not exponents:
        raise TypeError(f"{name}: exponents must be a tuple of numbers, one at least, got {exponents!r}")
    for exponent in exponents:
        check_kind(name, "exponents", exponent, NUMBERS, "numbers, got {value!r}")
    if not (min(exponents) > 0 and abs(sum(exponents) - 1) <= 1e-9):
        raise ValueError(f"{name}: exponents must be positive and sum to one, got {exponents}")
    if z.shape[-1] != len(exponents) + 1:
        raise ValueError(
            f"{name}: with {len(exponents)} exponents z must be (..., {len(exponents) + 1}), got {tuple(z.shape)}"
        )


INSIDE, POLAR, FLAT, CURVED = range(4)


def _power(z: Tensor, exponents: tuple[float, ...]) -> Tensor:
    dtype = z.dtype
    z = z.double()
    a = torch.tensor(exponents, dtype=torch.float64, device=z.device)
    a = a / a.sum()
    size = z.detach().abs().amax(-1, keepdim=True)
    size = torch.where((size > 0) & size.isfinite(), size, 1.0)  # a cone: scaling commutes with the projection
    scaled = z / size
    kind, theta, rounding = outside(lambda v: _search(v, a), scaled)
    kind = kind.unsqueeze(-1)
    curved = kind == CURVED
    safe = torch.where(curved, scaled, _on_the_curve(scaled))
    surface = _on_surface(theta, rounding, safe, a) * size
    flat = torch.cat(
        [torch.where(z[..., :-1].detach() > 0, z[..., :-1], 0.0), torch.zeros_like(z[..., -1:])], dim=-1
    )
    other = torch.where(kind == INSIDE, z, torch.where(kind == FLAT, flat, 0.0))
    return torch.where(curved, surface, other).to(dtype)


def _on_the_curve(v: Tensor) -> Tensor:
    """A point whose projection has theta = 0; it stands in for rows without a theta."""
    stand_in = torch.zeros_like(v)
    stand_in[..., -1] = 1.0
    return stand_in


def _parts(theta: Tensor, v: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x `(..., k)`, r `(...)` and log(x / r) of the point at theta, and the derivative of log(x / r), negative.

    r = |t| sigmoid(theta), so that both r and |t| - r keep their digits where they are small. Near the polar the
    logarithms of x and of r have nearly the same derivatives, so for x < 0 the factor r is cancelled from x / r.
    """
    x, t = v[..., :-1], v[..., -1:].abs()
    theta = theta.unsqueeze(-1)
    low = theta.detach() < 0
    small = torch.where(low, theta, -theta).sigmoid()  # near 1 the derivative s (1 - s) would lose its digits
    share, other = torch.where(low, small, 1 - small), torch.where(low, 1 - small, small)
    g = a * share * other * t.square()
    root = (x.square() + 4 * g).sqrt()
    negative = x.detach() < 0
    far = root + torch.where(negative, -x, x)
    part = 2 * g / (root * far)  # at most a half, so that the derivative loses no digits
    slope = torch.where(negative, -share - (other - share) * part, -other + (other - share) * part)
    ratio = torch.where(negative, (2 * a * t * other).log() - far.log(), (far / 2).log() - (t * share).log())
    return torch.where(negative, 2 * g / far, far / 2), (t * share).squeeze(-1), ratio, slope


def _excess(theta: Tensor, v: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """log(x_1^a_1 ... x_k^a_k / r), which decreases and is zero at the solution, and its derivative."""
    _, _, ratio, slope = _parts(theta, v, a)
    return (a * ratio).sum(-1), (a * slope).sum(-1)


def _on_surface(theta: Tensor, rounding: Tensor, v: Tensor, a: Tensor) -> Tensor:
    """The projection at the detached theta, where the excess is `rounding`; Newton steps carry the derivatives."""
    for _ in range(CARRYING_STEPS):
        value, derivative = _excess(theta, v, a)
        theta = theta - (value - rounding) / derivative
    x, r, _, _ = _parts(theta, v, a)
    return torch.cat([x, (r * torch.where(v[..., -1].detach() < 0, -1.0, 1.0)).unsqueeze(-1)], dim=-1)


def _search(v: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The case `(...)` that each projection is in, theta on the curved surface (else 0), and the excess there."""
    x, t = v[..., :-1], v[..., -1].abs()
    log_t = t.log()
    inside = (x >= 0).all(-1) & ((a * x.clamp(min=0).log()).sum(-1) >= log_t)
    polar = (x <= 0).all(-1) & ((a * ((-x).clamp(min=0) / a).log()).sum(-1) >= log_t)
    kind = torch.where(t < NOTHING, FLAT, torch.full_like(t, CURVED, dtype=torch.int64))
    kind = torch.where(inside, INSIDE, torch.where(polar, POLAR, kind))
    curved = kind == CURVED
    v = torch.where(curved.unsqueeze(-1), v, _on_the_curve(v))
    low, high = torch.full_like(t, -REACH), torch.full_like(t, REACH)
    for _ in range(SEARCH_STEPS):
        theta = (low + high) / 2
        above = _excess(theta, v, a)[0] > 0
        low, high = torch.where(above, theta, low), torch.where(above, high, theta)
    theta = torch.where(curved, (low + high) / 2, 0.0)
    return kind, theta, _excess(theta, v, a)[0]
