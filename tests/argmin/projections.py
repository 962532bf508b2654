"""What every projection and proximal map must keep: a table of rows, and checks on a row.

A new projection is one row. `points` gives points of the set that the projection had no part in; the variational
inequality <z - P z, y - P z> <= 0 for them, with feasibility, is what a projection is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, func
from torch.autograd import gradcheck, gradgradcheck

import implicitly as im
from tests.problems import seeded

Tensors = tuple[Tensor, ...]
Generator = torch.Generator


def normal(g: Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=g, dtype=torch.float64)


def positive(g: Generator, *shape: int) -> Tensor:
    return 0.3 + torch.rand(shape, generator=g, dtype=torch.float64)


@dataclass(frozen=True)
class Row:
    """A map of z `(*lead, *entries)` and parameters.

    `parameters(g, lead)` draws them; `violation(x, *parameters)` is positive where x is outside of the set;
    `points(g, z, *parameters)` draws points of it.
    """

    name: str
    f: Callable[..., Tensor]
    entries: tuple[int, ...]
    parameters: Callable[[Generator, tuple[int, ...]], Tensors] = lambda g, lead: ()
    violation: Callable[..., Tensor] | None = None
    points: Callable[..., Tensor] | None = None
    objective: Callable[..., Tensor] | None = None  # g of a proximal map, `(*lead,)`

    def draw(self, lead: tuple[int, ...], seed: int = 0, scale: float = 1.0) -> tuple[Tensor, Tensors]:
        g = seeded(seed)
        z = scale * normal(g, *lead, *self.entries)
        return z, self.parameters(g, lead)

    def __repr__(self) -> str:
        return self.name


def _radius(g: Generator, lead: tuple[int, ...]) -> Tensors:
    return (positive(g, *lead),)


def _in_ball(order: float) -> dict[str, Callable[..., Tensor]]:
    def points(g: Generator, z: Tensor, radius: Tensor) -> Tensor:
        y = normal(g, *z.shape)
        y = y / torch.linalg.vector_norm(y, order, -1, keepdim=True)
        return y * (radius * torch.rand(radius.shape, generator=g)).unsqueeze(-1)

    return {"violation": lambda x, r: torch.linalg.vector_norm(x, order, -1) - r, "points": points}


def _box(g: Generator, lead: tuple[int, ...]) -> Tensors:
    return normal(g, *lead, 5) - 1, normal(g, 5).abs() + 3


def _between(g: Generator, z: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    return lower + (upper - lower) * torch.rand(z.shape, generator=g)


def _on_simplex(g: Generator, z: Tensor, radius: Tensor) -> Tensor:
    return (3 * normal(g, *z.shape)).softmax(-1) * radius.unsqueeze(-1)


def _off_simplex(x: Tensor, radius: Tensor) -> Tensor:
    return torch.maximum((x.sum(-1) - radius).abs(), -x.amin(-1))


def _in_halfspace(g: Generator, z: Tensor, a: Tensor, b: Tensor) -> Tensor:
    y = normal(g, *z.shape)
    beyond = (a * y).sum(-1) - b + torch.rand(b.shape, generator=g)
    return y - a * (beyond / a.square().sum(-1)).unsqueeze(-1)


def _equations(g: Generator, lead: tuple[int, ...]) -> Tensors:
    return normal(g, *lead, 2, 5), normal(g, *lead, 2)


def _on_affine(g: Generator, z: Tensor, A: Tensor, b: Tensor) -> Tensor:
    y = normal(g, *z.shape)
    return y - torch.linalg.lstsq(A, (A @ y.unsqueeze(-1)) - b.unsqueeze(-1)).solution.squeeze(-1)


def _in_second_order(g: Generator, z: Tensor) -> Tensor:
    y = normal(g, *z.shape)
    t = y[..., 1:].norm(dim=-1, keepdim=True) + torch.rand(*z.shape[:-1], 1, generator=g)
    return torch.cat([t, y[..., 1:]], -1)


def _gram(g: Generator, Z: Tensor) -> Tensor:
    y = normal(g, *Z.shape[:-1], 2)
    return y @ y.mT


def _not_semidefinite(X: Tensor) -> Tensor:
    return torch.maximum(-torch.linalg.eigvalsh(X)[..., 0], (X - X.mT).abs().amax((-1, -2)))


def _in_exponential(g: Generator, z: Tensor) -> Tensor:
    x, y = normal(g, *z.shape[:-1]), positive(g, *z.shape[:-1])
    return torch.stack([x, y, y * (x / y).exp() + torch.rand(x.shape, generator=g)], -1)


def _rays(first: Tensor, second: Tensor, third: Tensor, limits: list[list[float]]) -> Tensor:
    rays = torch.stack([first, second, third], -1)
    return torch.nn.functional.normalize(torch.cat([rays, torch.tensor(limits, dtype=rays.dtype)]), dim=-1)


_SLOPES = torch.linspace(-8, 8, 2001, dtype=torch.float64).sinh()
_ONE = torch.ones_like(_SLOPES)
# Extreme rays of the exponential cone and of its dual; a point is in a cone where its product with every ray of
# the dual is nonnegative, and the least product is minus its distance.
PRIMAL_RAYS = _rays(_SLOPES, _ONE, _SLOPES.clamp(max=700).exp(), [[-1, 0, 0], [0, 0, 1]])
DUAL_RAYS = _rays(-_ONE, _SLOPES, (-_SLOPES - 1).clamp(max=700).exp(), [[0, 1, 0], [0, 0, 1]])


def _not_exponential(x: Tensor) -> Tensor:
    return -(x @ DUAL_RAYS.T).amin(-1)


def _in_dual_exponential(g: Generator, z: Tensor) -> Tensor:
    u, v = -positive(g, *z.shape[:-1]), normal(g, *z.shape[:-1])
    return torch.stack([u, v, -u * (v / u - 1).exp() + torch.rand(u.shape, generator=g)], -1)


def _not_dual_exponential(x: Tensor) -> Tensor:
    return -(x @ PRIMAL_RAYS.T).amin(-1)


def _hull_point(g: Generator, z: Tensor, w: Tensor) -> Tensor:
    share = torch.rand(4, *z.shape[:-1], 1, generator=g, dtype=z.dtype)
    shuffled = [w.gather(-1, torch.rand(w.shape, generator=g).argsort(-1)) for _ in range(4)]
    return (share / share.sum(0) * torch.stack(shuffled)).sum(0)


def _outside_hull(x: Tensor, w: Tensor) -> Tensor:
    """Rado: x is in the hull where its largest k add up to no more than those of w, and all to the same."""
    excess = x.sort(-1, descending=True).values.cumsum(-1) - w.sort(-1, descending=True).values.cumsum(-1)
    return torch.maximum(excess.amax(-1), excess[..., -1].abs())


PROJECTIONS = (
    Row(
        "box", im.project.box, (5,), _box,
        lambda x, low, up: torch.maximum(low - x, x - up).amax(-1), _between,
    ),
    Row("simplex", im.project.simplex, (6,), _radius, _off_simplex, _on_simplex),
    Row("l1_ball", im.project.l1_ball, (5,), _radius, **_in_ball(1)),
    Row("l2_ball", im.project.l2_ball, (5,), _radius, **_in_ball(2)),
    Row("linf_ball", im.project.linf_ball, (5,), _radius, **_in_ball(float("inf"))),
    Row(
        "halfspace", im.project.halfspace, (5,), lambda g, lead: (normal(g, *lead, 5), normal(g, *lead)),
        lambda x, a, b: (a * x).sum(-1) - b, _in_halfspace,
    ),
    Row(
        "affine", im.project.affine, (5,), _equations,
        lambda x, A, b: ((A @ x.unsqueeze(-1)).squeeze(-1) - b).abs().amax(-1), _on_affine,
    ),
    Row(
        "second_order_cone", im.project.second_order_cone, (4,),
        violation=lambda x: x[..., 1:].norm(dim=-1) - x[..., 0], points=_in_second_order,
    ),
    Row("psd_cone", im.project.psd_cone, (4, 4), violation=_not_semidefinite, points=_gram),
    Row(
        "exponential_cone", im.project.exponential_cone, (3,),
        violation=_not_exponential, points=_in_exponential,
    ),
    Row(
        "dual_exponential_cone", im.project.dual_exponential_cone, (3,),
        violation=_not_dual_exponential, points=_in_dual_exponential,
    ),
    Row(
        "isotonic", im.project.isotonic, (7,),
        violation=lambda x: -x.diff(dim=-1).amin(-1), points=lambda g, z: normal(g, *z.shape).sort(-1).values,
    ),
    Row(
        "permutahedron", im.project.permutahedron, (5,), lambda g, lead: (normal(g, *lead, 5),),
        _outside_hull, _hull_point,
    ),
)  # fmt: skip

PROXIMAL = (
    Row(
        "l1", im.prox.l1, (5,), lambda g, lead: (positive(g, *lead, 5),),
        objective=lambda x, w: (w * x.abs()).sum(-1),
    ),
    Row("l2", im.prox.l2, (4,), _radius, objective=lambda x, w: w * x.norm(dim=-1)),
    Row("linf", im.prox.linf, (5,), _radius, objective=lambda x, w: w * x.abs().amax(-1)),
    Row(
        "nuclear", im.prox.nuclear, (3, 2), _radius,
        objective=lambda X, w: w * torch.linalg.matrix_norm(X, "nuc"),
    ),
    Row(
        "total_variation", im.prox.total_variation, (9,), lambda g, lead: (positive(g, *lead, 8),),
        objective=lambda x, w: (w * x.diff(dim=-1).abs()).sum(-1),
    ),
)  # fmt: skip

SINKHORN = Row(
    "sinkhorn", lambda c, p, q, e: im.project.sinkhorn(c, p.softmax(-1), q.softmax(-1), e), (3, 4),
    lambda g, lead: (normal(g, *lead, 3), normal(g, *lead, 4), positive(g, *lead)),
)  # fmt: skip

# Maps whose derivatives are checked as those of the others, and whose values have tests of their own.
DERIVED = (
    SINKHORN,
    Row(
        "weighted-isotonic", lambda z, w: im.project.isotonic(z, w, increasing=False), (7,),
        lambda g, lead: (positive(g, *lead, 7),),
    ),
    Row("sparsemax", im.sparsemax, (5,)),
    Row("soft_sort", im.soft_sort, (5,), _radius),
    Row("soft_rank", im.soft_rank, (5,), _radius),
)  # fmt: skip


# ------------------------------------------------------------------------------------------------ geometry


def tolerance(dtype: torch.dtype, size: Any) -> float:
    """Roundings of numbers of this size."""
    return 100 * torch.finfo(dtype).eps * max(1.0, float(size))


def inner(a: Tensor, b: Tensor, row: Row) -> Tensor:
    return (a * b).flatten(-len(row.entries)).sum(-1)


def check_projection(row: Row, seed: int, scale: float, dtype: torch.dtype = torch.float64) -> None:
    """Feasible, nearest (variational inequality), idempotent and nonexpansive."""
    z, parameters = row.draw((6,), seed, scale)
    z, parameters = z.to(dtype), tuple(p.to(dtype) for p in parameters)
    g = seeded(seed + 1)
    x = row.f(z, *parameters)
    size = max(float(t.abs().max()) for t in (z, *parameters))
    near = tolerance(dtype, size)
    wide = tuple(p.double() for p in parameters)
    assert row.violation is not None
    assert row.points is not None
    assert float(row.violation(x.double(), *wide).max()) <= near
    for _ in range(3):
        y = row.points(g, z.double(), *wide)
        assert float(row.violation(y, *wide).max()) <= 1e-9
        gap = inner(z - x, y - x, row)
        assert float(gap.max()) <= near * max(size, float(y.abs().max()))
    assert float((row.f(x, *parameters) - x).abs().max()) <= near
    other = (z + scale * normal(g, *z.shape)).to(dtype)
    moved = row.f(other, *parameters) - x
    assert bool((inner(moved, moved, row) <= inner(other - z, other - z, row) + near * size).all())


def check_proximal(row: Row, seed: int, scale: float, dtype: torch.dtype = torch.float64) -> None:
    """The objective, strongly convex, is larger by at least 1/2 |y - x|^2 at every other point y."""
    z, parameters = row.draw((6,), seed, scale)
    z, parameters = z.to(dtype), tuple(p.to(dtype) for p in parameters)
    g = seeded(seed + 1)
    x = row.f(z, *parameters)
    assert row.objective is not None

    def total(y: Tensor) -> Tensor:
        assert row.objective is not None
        y, wide = y.double(), tuple(p.double() for p in parameters)
        return inner(y - z, y - z, row) / 2 + row.objective(y, *wide)

    near = tolerance(dtype, max(1.0, float(z.abs().max())) ** 2)
    for distance in (1e-3, 0.1, 1.0):
        for direction in (normal(g, *z.shape), z - x, -x):
            step = (distance * direction).double()
            assert bool((total(x + step) >= total(x) + inner(step, step, row) / 2 - near).all())


# --------------------------------------------------------------------------------------------- derivatives


def tracked(row: Row, lead: tuple[int, ...], seed: int = 0) -> Tensors:
    z, parameters = row.draw(lead, seed)
    return tuple(t.requires_grad_() for t in (z, *parameters))


def check_by_differences(row: Row, seed: int) -> None:
    """First and second derivatives for z and every parameter, both modes, against finite differences."""
    inputs = tracked(row, (3,), seed)
    assert gradcheck(row.f, inputs, check_forward_ad=True)
    assert gradgradcheck(row.f, inputs, check_fwd_over_rev=True, fast_mode=True)


def _curved(row: Row) -> Callable[..., Tensor]:
    """A number, whose derivatives of every order involve those of the map."""

    def value(*inputs: Tensor) -> Tensor:
        x = row.f(*inputs)
        return (x + x.sin() + x.square()).sum()

    return value


def check_third_order(row: Row, seed: int) -> None:
    """Third derivatives: the second along a direction, checked by differences."""
    inputs = tracked(row, (2,), seed)
    g = seeded(7)
    directions = [normal(g, *t.shape) for t in inputs]

    def second(*inputs: Tensor) -> Tensor:
        value = _curved(row)(*inputs)
        for _ in range(2):
            slopes = torch.autograd.grad(value, inputs, create_graph=True)
            value = sum((s * d).sum() for s, d in zip(slopes, directions))
        return value

    assert gradcheck(second, inputs, fast_mode=True, check_forward_ad=False)


def check_transforms(row: Row, seed: int) -> None:
    """Forward equals reverse, of first and second order, and `vmap` equals a loop."""
    z, parameters = row.draw((2,), seed)
    value = _curved(row)

    def of_z(z: Tensor) -> Tensor:
        return row.f(z, *parameters)

    def total(z: Tensor) -> Tensor:
        return value(z, *parameters)

    close = torch.testing.assert_close
    close(func.jacfwd(of_z)(z), func.jacrev(of_z)(z))
    hessian = func.jacrev(func.grad(total))(z)
    close(func.hessian(total)(z), hessian)
    close(func.jacfwd(func.jacfwd(total))(z), hessian, rtol=1e-6, atol=1e-7)
    direction = torch.ones_like(z)

    def along(z: Tensor) -> Tensor:
        return func.jvp(total, (z,), (direction,))[1]

    slope = func.jvp(along, (z,), (direction,))[1]
    pairs = len(row.entries) + 1
    close(slope, hessian.sum(tuple(range(2 * pairs))))

    many = torch.stack([z, z + 0.1, z - 0.2], dim=1)
    mapped = func.vmap(row.f, in_dims=(1, *(None,) * len(parameters)), out_dims=1)(many, *parameters)
    close(mapped, torch.stack([of_z(many[:, i]) for i in range(3)], dim=1))
    shifted = tuple(torch.stack([p, p * 1.1]) for p in parameters)
    over = func.vmap(func.grad(value), in_dims=(None, *(0,) * len(shifted)))
    if shifted:
        expected = [func.grad(value)(z, *(p[i] for p in shifted)) for i in range(2)]
        close(over(z, *shifted), torch.stack(expected))


def check_shapes(row: Row) -> None:
    """Any leading dimensions, also none and empty ones, and memory in any order, give the same rows."""
    z, parameters = row.draw((2, 3))
    x = row.f(z, *parameters)
    assert x.shape == z.shape
    for i in range(2):
        torch.testing.assert_close(row.f(z[i, 1], *(_row_of(p, (2, 3), i, 1) for p in parameters)), x[i, 1])
    transposed = z.mT.contiguous().mT if z.ndim > 1 else z
    assert not transposed.is_contiguous()
    torch.testing.assert_close(row.f(transposed, *parameters), x)
    empty, none = row.draw((0,))
    assert row.f(empty.requires_grad_(), *none).shape == empty.shape
    row.f(empty, *none).sum().backward()
    assert empty.grad is not None


def _row_of(p: Tensor, lead: tuple[int, ...], i: int, j: int) -> Tensor:
    return p[i, j] if p.shape[: len(lead)] == lead else p


def check_dtype(row: Row) -> None:
    """float32 in, float32 out, for value and gradients, near those in float64."""
    wide = tracked(row, (4,))
    narrow = tuple(t.detach().float().requires_grad_() for t in wide)
    expected, actual = row.f(*wide), row.f(*narrow)
    assert actual.dtype == torch.float32
    assert actual.device == narrow[0].device
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=2e-5)
    of_wide = torch.autograd.grad(_curved(row)(*wide), wide)
    for ours, theirs in zip(torch.autograd.grad(_curved(row)(*narrow), narrow), of_wide):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), theirs, rtol=2e-4, atol=2e-4)


def check_shared_parameters(row: Row) -> None:
    """The gradient of a parameter that all rows share is the sum of theirs."""
    z, _ = row.draw((3,))
    _, shared = row.draw(())
    shared = tuple(p.requires_grad_() for p in shared)
    copies = tuple(p.detach().expand(3, *p.shape).clone().requires_grad_() for p in shared)
    torch.testing.assert_close(row.f(z, *shared), row.f(z, *copies))
    if shared:
        each = torch.autograd.grad(_curved(row)(z, *copies), copies)
        for one, many in zip(torch.autograd.grad(_curved(row)(z, *shared), shared), each):
            torch.testing.assert_close(one, many.sum(0))


def check_bad_rows(row: Row) -> None:
    """NaN in a row makes that row NaN, with zero gradient, and no other."""
    inputs = tracked(row, (3,))
    good = row.f(*inputs)
    spoilt = inputs[0].detach().clone()
    spoilt[(1, *(0,) * len(row.entries))] = float("nan")
    spoilt.requires_grad_()
    x = row.f(spoilt, *inputs[1:])
    assert bool(x[1].isnan().all())
    torch.testing.assert_close(x[[0, 2]], good[[0, 2]])
    gradients = torch.autograd.grad(x[[0, 2]].sin().sum() + x[1].sum(), (spoilt, *inputs[1:]))
    assert all(bool(t.isfinite().all()) for t in gradients)
    assert bool((gradients[0][1] == 0).all())
