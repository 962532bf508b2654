"""What every method, adjoint and dtype must keep for trajectories: tables of rows, and checks on combinations.

A new method is one row of `METHODS`, a new adjoint one of `ADJOINTS`, a new equation one of `problems.EQUATIONS`.

Rates and lengths of time of the equations are of size 1, so constant steps of a method of order p are to be off by
no more than dt^p, adaptive ones by a small multiple of rtol. Derivatives are those of the discrete solution (or as
accurate as that); of output times between the ends they are the slopes of the dense output, whose error is larger.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import implicitly as im
from tests.contracts import Function, assert_close, wide
from tests.ode.problems import Equation
from tests.problems import draw, flat, unflat

# Steps over a length of time of 1 with which a method of a given order is accurate.
STEPS = {1: 60, 2: 30, 4: 16}
# What the tolerance of adaptive steps may be for few steps of a method of a given order.
RTOL = {2: 1e-4, 3: 1e-6, 5: 1e-8, 8: 1e-10}
ROUNDINGS = {torch.float64: 1e-13, torch.float32: 2e-5}


@dataclass(frozen=True)
class MethodRow:
    name: str
    kind: Callable[..., Any]
    order: int
    adaptive: bool = True
    needs_pair: bool = False
    stiff: bool = False  # whether it is for stiff equations
    rtol: float | None = None  # where that of its order is not for it
    # Samples share how often Newton's method goes on, so they differ by what it leaves, a part of the tolerance.
    apart: bool = True
    few: int = 2  # steps over a length of time of 1 that show all there is of the method

    def fits(self, equation: Equation) -> bool:
        return (equation.separable or not self.needs_pair) and (self.stiff or not equation.stiff)

    def make(self, dtype: torch.dtype = torch.float64) -> im.Dopri5:
        """The method as it is used: adaptive where it can be."""
        if not self.adaptive:
            return self.kind(dt=1 / STEPS[self.order], rtol=1e-4)
        rtol = max(self.rtol or RTOL[self.order], 2e-6 if dtype == torch.float32 else 0.0)
        return self.kind(rtol=rtol, atol=1e-2 * rtol)

    def constant(self) -> Any:
        """A few constant steps, so that a solution is a smooth function of all its inputs."""
        return self.kind(dt=1 / self.few, rtol=1e-10)

    def accuracy(self, dtype: torch.dtype = torch.float64) -> float:
        """The relative error that `make` may have."""
        method = self.make(dtype)
        error = 50 * float(method.rtol) if self.adaptive else method.dt**self.order
        return error + ROUNDINGS[dtype]

    def alike(self, adjoint: AdjointRow) -> float:
        """By how much the same sample may differ beside other samples, and its gradient."""
        return 1e-9 if self.apart and adjoint.exact else self.accuracy()


METHODS = (
    MethodRow("Euler", im.Euler, 1, adaptive=False),
    MethodRow("Midpoint", im.Midpoint, 2),
    MethodRow("Heun", im.Heun, 2),
    MethodRow("Ralston", im.Ralston, 2),
    MethodRow("RK4", im.RK4, 4, adaptive=False),
    MethodRow("Bosh3", im.Bosh3, 3),
    MethodRow("Dopri5", im.Dopri5, 5),
    MethodRow("Tsit5", im.Tsit5, 5),
    MethodRow("Dopri8", im.Dopri8, 8, few=1),
    MethodRow("Adams", im.Adams, 5, few=5),
    MethodRow("ReversibleHeun", im.ReversibleHeun, 2),
    MethodRow("ImplicitEuler", im.ImplicitEuler, 1, adaptive=False, stiff=True, apart=False),
    MethodRow("ImplicitMidpoint", im.ImplicitMidpoint, 2, adaptive=False, apart=False),
    MethodRow("Trapezoid", im.Trapezoid, 2, stiff=True, apart=False),
    MethodRow("Kvaerno3", im.Kvaerno3, 3, stiff=True, rtol=1e-5, apart=False, few=1),
    MethodRow("Kvaerno5", im.Kvaerno5, 5, stiff=True, rtol=1e-6, apart=False, few=1),
    MethodRow("Leapfrog", im.Leapfrog, 2, adaptive=False, needs_pair=True),
    MethodRow("Yoshida4", im.Yoshida4, 4, adaptive=False, needs_pair=True),
    MethodRow("BlanesMoan4", im.BlanesMoan4, 4, adaptive=False, needs_pair=True, few=1),
)


@dataclass(frozen=True)
class AdjointRow:
    name: str
    kind: Callable[[], Any]
    exact: bool = True  # whether its derivative is that of the discrete solution, of any order, in both modes

    def fits(self, equation: Equation) -> bool:
        return self.exact or not equation.stiff  # backwards, what is stiff blows up


ADJOINTS = (
    AdjointRow("RecursiveCheckpoint", im.RecursiveCheckpointAdjoint),
    AdjointRow("Backsolve", im.BacksolveAdjoint, exact=False),
    AdjointRow("Unrolled", im.UnrolledAdjoint),
)


# ------------------------------------------------------------------------------------------------- checks


def check_value(equation: Equation, method: MethodRow, dtype: torch.dtype) -> None:
    """Arrived, near the exact solution at all times, and of the kind of y0."""
    cast = equation.to(dtype)
    solution = cast.solve(solver=method.make(dtype))
    assert bool(solution.converged.all())
    assert tuple(solution.status.shape) == ((equation.batch,) if equation.batch_dims else ())
    assert solution.t.shape == solution.steps.shape == solution.status.shape
    assert_close(solution.t, cast.times[..., -1].expand(solution.t.shape), 0.0)
    leaves, spec = pytree.tree_flatten(solution.value)
    starts, start_spec = pytree.tree_flatten(cast.y0)
    assert spec == start_spec
    count = cast.times.shape[-1]
    for leaf, start in zip(leaves, starts):
        assert (leaf.shape, leaf.dtype, leaf.device) == ((count, *start.shape), start.dtype, start.device)
        assert torch.equal(leaf[0], start)
    exact = equation.exact(*wide((cast.y0, cast.times, *cast.args, *cast.parameters)))
    assert_close(solution.value, exact, method.accuracy(dtype))
    last = pytree.tree_map(lambda v: v[-1], (solution.value, exact))
    assert_close(*last, method.accuracy(dtype))
    between = solution.interpolate(cast.times[..., 1:-1])
    inner = pytree.tree_map(lambda v: v[1:-1], solution.value)
    assert_close(between, inner, ROUNDINGS[dtype])


def _leaves(inputs: Any) -> tuple[Any, list[Tensor]]:
    """`inputs` of their own that require gradients, and their tensors."""
    own = pytree.tree_map(lambda t: t.detach().clone().requires_grad_(), inputs)
    return own, pytree.tree_leaves(own)


def weighted(value: Any) -> Tensor:
    """The inner product of a pytree with a fixed vector."""
    return flat(value) @ draw(flat(value).numel(), seed=99).to(flat(value).dtype)


def check_gradient(equation: Equation, method: MethodRow, adjoint: AdjointRow, dtype: torch.dtype) -> None:
    """The gradients by y0, args, parameters and times are those of the exact solution in float64."""
    cast = equation.to(dtype)
    given, leaves = _leaves(cast.inputs)
    solution = cast.solve(*given, solver=method.make(dtype), adjoint=adjoint.kind())
    actual = torch.autograd.grad(weighted(solution.value), [*leaves, *cast.parameters])
    assert [g.dtype for g in actual] == [x.dtype for x in (*leaves, *cast.parameters)]
    given, leaves = _leaves(wide((cast.inputs, cast.parameters)))
    value = equation.exact(*given[0], *given[1])
    expected = torch.autograd.grad(weighted(value), leaves)
    place = len(pytree.tree_leaves(cast.y0))  # of the times
    accuracy = 10 * method.accuracy(dtype)
    assert_close(
        [g for i, g in enumerate(actual) if i != place],
        [g for i, g in enumerate(expected) if i != place],
        accuracy,
    )
    assert_close(actual[place], expected[place], accuracy**0.5)


def as_vector(equation: Equation) -> Tensor:
    """y0, times and args as one real vector."""
    return flat(equation.inputs)


def library(equation: Equation, solver: Any, adjoint: Any) -> Function:
    """The library's solution as a function between real vectors, of y0, times and args."""
    options = {"solver": solver, "adjoint": adjoint}
    return lambda v: flat(equation.solve(*unflat(v, equation.inputs), **options).value)


def discrete(equation: Equation, dt: float) -> Function:
    """As `library`, for RK4 with steps of length dt: its formulas, and the cubic through the ends of a step."""

    def solution(y: Tensor, t: Tensor, *args: Tensor) -> Tensor:
        f = lambda t, y: equation.f(t, y, *args)  # noqa: E731
        sign = 1.0 if times[1] > times[0] else -1.0
        count = math.ceil(abs(times[-1] - times[0]) / dt)
        out, s = [y], t[0]
        for i in range(count):
            h = sign * dt if i < count - 1 else t[-1] - s
            k1 = f(s, y)
            k2 = f(s + h / 2, y + h / 2 * k1)
            k3 = f(s + h / 2, y + h / 2 * k2)
            k4 = f(s + h, y + h * k3)
            y1 = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
            for x in (t[j] for j, known in enumerate(times[1:-1], 1) if i == (abs(known - times[0]) // dt)):
                u = (x - s) / h
                bend = (1 - 2 * u) * (y1 - y) + (u - 1) * h * k1 + u * h * f(s + h, y1)
                out.append((1 - u) * y + u * y1 + u * (u - 1) * bend)
            s, y = s + h, y1
        return torch.stack([*out, y])

    times = equation.times.tolist()
    whole = replace(equation, solution=solution)
    return lambda v: flat(whole.exact(*unflat(v, equation.inputs)))


def check_by_differences(equation: Equation, method: MethodRow, adjoint: AdjointRow) -> None:
    """First and second derivatives of the discrete solution in both modes, against finite differences."""
    f = library(equation, method.constant(), adjoint.kind())
    v = as_vector(equation).requires_grad_()
    assert torch.autograd.gradcheck(f, v, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(f, v, check_fwd_over_rev=True, fast_mode=True)


# ------------------------------------------------------------------------------------ samples on their own


def differentiated(equation: Equation, **options: Any) -> tuple[im.Trajectory, list[Tensor]]:
    """A solution, and the gradients of a sum over samples that arrived, the same function of each."""
    given, leaves = _leaves((equation.y0, *equation.args))
    solution = equation.solve(given[0], None, *given[1:], on_failure="ignore", **options)
    value = pytree.tree_map(lambda v: v.movedim(1, 0) if equation.batch_dims else v[None], solution.value)
    good = solution.converged.reshape(-1)
    total = sum(
        ((x.abs().square() * 0.5 + x.real).reshape(len(good), -1).sum(1) * good).nansum()
        for x in pytree.tree_leaves(value)
    )
    return solution, list(torch.autograd.grad(total, [*leaves, *equation.parameters]))


def _dims(equation: Equation) -> list[int | None]:
    """Which dimension of each tensor in `differentiated` holds the samples."""
    starts = [0] * len(pytree.tree_leaves(equation.y0))
    return [*starts, *(equation.in_dims or ()), *(None for _ in equation.parameters)]


def check_independence(
    equation: Equation, method: MethodRow, adjoint: AdjointRow, rows: list[int], give_in_dims: bool
) -> None:
    """Permuting, splitting or repeating samples changes nothing about any of them."""
    options: dict[str, Any] = {"solver": method.make(), "adjoint": adjoint.kind()}
    options["in_dims"] = equation.in_dims if give_in_dims and equation.args else None
    together, gradients_together = differentiated(equation, **options)
    chosen, gradients_chosen = differentiated(equation.of_rows(rows), **options)
    index = torch.tensor(rows)
    assert chosen.steps.tolist() == together.steps[index].tolist()
    assert_close(
        chosen.value,
        pytree.tree_map(lambda t: t[:, index], together.value),
        1e-12 if method.apart else method.accuracy(),
    )
    for whole, part, dim in zip(gradients_together, gradients_chosen, _dims(equation)):
        if dim is not None:
            assert_close(part, whole[index], method.alike(adjoint))


def check_a_loop_over_samples(
    equation: Equation, method: MethodRow, adjoint: AdjointRow, give_in_dims: bool
) -> None:
    """A batch takes the steps, and has the values and gradients, of its samples as systems of their own."""
    options = {"solver": method.make(), "adjoint": adjoint.kind()}
    together, gradients = differentiated(equation, **options, in_dims=equation.in_dims if give_in_dims else None)
    shared = [0.0 for _ in gradients]
    for i in range(equation.batch):
        alone, gradients_alone = differentiated(equation.of_one(i), **options)
        assert int(alone.steps) == int(together.steps[i])
        assert_close(
            pytree.tree_map(lambda v, i=i: v[:, i], together.value),
            alone.value,
            1e-12 if method.apart else method.accuracy(),
        )
        for j, (whole, part, dim) in enumerate(zip(gradients, gradients_alone, _dims(equation))):
            if dim is None:
                shared[j] = shared[j] + part
            else:
                assert_close(whole.select(dim, i), part, method.alike(adjoint))
    for whole, total, dim in zip(gradients, shared, _dims(equation)):
        if dim is None:
            assert_close(whole, total, method.alike(adjoint))


def check_a_bad_sample(
    equation: Equation, method: MethodRow, adjoint: AdjointRow, bad: int, give_in_dims: bool
) -> None:
    """A sample of NaN is reported, has zero gradient, and the others are what they are without it."""
    rest = [i for i in range(equation.batch) if i != bad]
    start, spec = pytree.tree_flatten(equation.y0)
    poisoned = [t.clone() for t in start]
    poisoned[0][bad] = torch.nan
    options: dict[str, Any] = {"solver": method.make(), "adjoint": adjoint.kind()}
    options["in_dims"] = equation.in_dims if give_in_dims and equation.args else None
    whole = replace(equation, y0=pytree.tree_unflatten(poisoned, spec))
    with_bad, gradients_with = differentiated(whole, **options)
    without, gradients_without = differentiated(equation.of_rows(rest), **options)
    assert with_bad.converged.tolist() == [i != bad for i in range(equation.batch)]
    assert int(with_bad.status[bad]) == im.Status.NON_FINITE
    assert_close(
        pytree.tree_map(lambda t: t[:, rest], with_bad.value),
        without.value,
        1e-12 if method.apart else method.accuracy(),
    )
    for with_, without_, dim in zip(gradients_with, gradients_without, _dims(equation)):
        if dim is None:
            assert_close(with_, without_, method.alike(adjoint))
        else:
            assert bool((with_[bad] == 0).all())
            assert_close(with_[rest], without_, method.alike(adjoint))
