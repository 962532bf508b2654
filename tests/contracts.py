"""What every condition, solver, adjoint and dtype must keep: tables of rows, and checks on a combination of them.

A new solver is one row of `SOLVERS`, a new adjoint one of `ADJOINTS`, a new condition one of `problems.PROBLEMS`.

Tolerances follow from the dtype. Solves are asked for `rtol = eps^0.8`, some ten roundings, and `atol = 0`. A
solution whose residual is below rtol * |z| is off by at most |A^-1| rtol |z|, with A the Jacobian; its derivative,
which solves one more system with A at a point that is off by as much, by a multiple of |A^-1|^2 rtol.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, func
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

import implicitly as im
from tests.problems import COMPLEX, Problem, draw, flat, unflat

DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def rtol_of(dtype: torch.dtype) -> float:
    """3e-13, 3e-6 and 2e-2 in float64, float32 and bfloat16."""
    return torch.finfo(dtype).eps ** 0.8


@dataclass(frozen=True)
class SolverRow:
    name: str
    kind: Callable[..., Any]
    needs_contraction: bool = False

    def make(self, rtol: float) -> Any:
        return self.kind(rtol=rtol, atol=0.0)

    def fits(self, problem: Problem) -> bool:
        return problem.contracts or not self.needs_contraction


SOLVERS = (
    SolverRow("FixedPointIteration", im.FixedPointIteration, needs_contraction=True),
    SolverRow("Anderson", im.Anderson),
    SolverRow("Broyden", im.Broyden),
    SolverRow("Broyden-line-search", functools.partial(im.Broyden, line_search=True)),
    SolverRow("Newton", im.Newton),
    SolverRow("Newton-full-steps", functools.partial(im.Newton, line_search=False)),
    SolverRow("NewtonKrylov", im.NewtonKrylov),
)


def _truth(problem: Problem, *args: Tensor) -> Any:
    return problem.exact(*args)


def _iterations(problem: Problem, *args: Tensor, steps: int, damping: float) -> Any:
    """The derivative that inexact adjoints promise: through `steps` damped iterations from the answer."""
    z = pytree.tree_map(Tensor.detach, problem.exact(*args))
    for _ in range(steps):
        z = pytree.tree_map(lambda z, fz: z + damping * (fz - z), z, problem.f(z, *args))
    return z


@dataclass(frozen=True)
class AdjointRow:
    name: str
    make: Callable[[float], Any]  # an adjoint of a given rtol
    needs_contraction: bool = False
    needs_solver: str | None = None  # prefix of the solvers it works with
    reference: Callable[..., Any] = _truth  # what carries the derivative it promises
    exact: bool = True
    # Autograd records the solve: the derivative of the last iterate is as good as the last iterate but one, whose
    # error is the square root of the last where a solver converges quadratically.
    recorded: bool = False

    def fits(self, problem: Problem, solver: SolverRow) -> bool:
        return (
            (problem.contracts or not self.needs_contraction)
            and (self.exact or problem.entry is im.fixed_point)
            and (self.needs_solver is None or solver.name.startswith(self.needs_solver))
        )

    def tolerance(self, rtol: float) -> float:
        return rtol**0.5 if self.recorded else rtol


def _implicit(make: Callable[..., Any], **options: Any) -> Callable[[float], im.ImplicitAdjoint]:
    return lambda rtol: im.ImplicitAdjoint(linear_solver=make(rtol=rtol, atol=0.0), **options)


ADJOINTS = (
    AdjointRow("GMRES", _implicit(im.GMRES)),
    AdjointRow("BiCGStab", _implicit(im.BiCGStab)),
    AdjointRow("DenseLU", _implicit(im.DenseLU)),
    AdjointRow("Neumann", _implicit(im.Neumann), needs_contraction=True),
    AdjointRow("by-Anderson", _implicit(im.Anderson)),
    AdjointRow("by-Broyden", _implicit(im.Broyden)),
    AdjointRow("start", _implicit(im.GMRES, inverse="start"), needs_solver="Broyden"),
    AdjointRow("precondition", _implicit(im.GMRES, inverse="precondition"), needs_solver="Broyden"),
    AdjointRow("Unrolled", lambda rtol: im.UnrolledAdjoint(), recorded=True),
    AdjointRow(
        "Phantom",
        lambda rtol: im.PhantomAdjoint(steps=3, damping=0.8),
        reference=functools.partial(_iterations, steps=3, damping=0.8),
        exact=False,
    ),
    AdjointRow(
        "JacobianFree",
        lambda rtol: im.JacobianFreeAdjoint(),
        reference=functools.partial(_iterations, steps=1, damping=1.0),
        exact=False,
    ),
)


# ------------------------------------------------------------------------------------------------- checks


def wide(tensors: Any) -> Any:
    """A pytree of tensors in float64 (complex128)."""
    return pytree.tree_map(lambda t: t.to(COMPLEX[torch.float64] if t.is_complex() else torch.float64), tensors)


_amplifications: dict[Any, float] = {}  # families have problems of the same name


def amplification(problem: Problem) -> float:
    """|A^-1| of a problem in float64, at least 1."""
    key = (problem.entry, problem.name)
    if key not in _amplifications:
        _amplifications[key] = max(1.0, problem.to(torch.float64).amplification())
    return _amplifications[key]


def assert_close(actual: Any, expected: Any, relative: float) -> None:
    """|actual - expected| <= relative * |expected| as whole vectors."""
    a, e = flat(wide(actual)).detach(), flat(wide(expected)).detach()
    error, size = float((a - e).norm()), float(e.norm())
    assert error <= relative * size, f"relative error {error / size:.3g} exceeds {relative:.3g}"


def check_value(problem: Problem, solver: SolverRow, dtype: torch.dtype) -> None:
    """Converged, near the exact answer, and of the kind of z0."""
    cast, rtol = problem.to(dtype), rtol_of(dtype)
    solution = cast.solve(solver=solver.make(rtol=rtol))
    assert bool(solution.converged.all())
    assert tuple(solution.status.shape) == ((problem.batch,) if problem.batch_dims else ())
    assert solution.residual.shape == solution.steps.shape == solution.status.shape
    leaves, spec = pytree.tree_flatten(solution.value)
    expected, expected_spec = pytree.tree_flatten(cast.z0)
    assert spec == expected_spec
    for leaf, like in zip(leaves, expected):
        assert (leaf.shape, leaf.dtype, leaf.device) == (like.shape, like.dtype, like.device)
    # Rounding of one call of f, besides what the solver left.
    bound = amplification(problem) * (rtol + 4 * torch.finfo(dtype).eps)
    exact = problem.exact(*wide(cast.args))
    scale = 1.0
    if problem.entry is not im.fixed_point:  # there rtol is relative to the residual at z0
        first = problem.displacement(problem.z0, *problem.args).detach()
        scale = max(1.0, float(first.norm() / flat(exact).detach().norm()))
    assert_close(solution.value, exact, bound * scale)


def gradients(value: Any, inputs: tuple[Tensor, ...], cotangent: Tensor) -> list[Tensor]:
    """Gradients of the inner product of `value`, a pytree, with `cotangent`, a real vector."""
    return list(torch.autograd.grad(flat(value) @ cotangent.to(flat(value).dtype), inputs))


def check_gradient(problem: Problem, solver: SolverRow, adjoint: AdjointRow, dtype: torch.dtype) -> None:
    """The gradient for every arg is that of the exact answer (or of what the adjoint promises) in float64."""
    cast, rtol = problem.to(dtype), rtol_of(dtype)
    args = tuple(a.clone().requires_grad_() for a in cast.args)
    value = cast.solve(*args, solver=solver.make(rtol=rtol), adjoint=adjoint.make(rtol)).value
    cotangent = draw(flat(value).numel(), seed=99)
    actual = gradients(value, args, cotangent)
    assert [g.dtype for g in actual] == [a.dtype for a in args]
    exact_args = tuple(wide(a.detach()).requires_grad_() for a in args)
    expected = gradients(adjoint.reference(problem, *exact_args), exact_args, cotangent)
    assert_close(actual, expected, 10 * amplification(problem) ** 2 * adjoint.tolerance(rtol))


# ----------------------------------------------------------------------------- derivatives of every order


Function = Callable[[Tensor], Tensor]


def as_vector(problem: Problem) -> Tensor:
    """All args as one real vector."""
    return flat(problem.args)


def library(problem: Problem, solver: SolverRow, adjoint: AdjointRow) -> Function:
    """The library's answer as a function between real vectors, from args to value."""
    rtol = rtol_of(torch.float64)
    options = {"solver": solver.make(rtol=rtol), "adjoint": adjoint.make(rtol)}
    return lambda v: flat(problem.solve(*unflat(v, problem.args), **options).value)


def truth(problem: Problem) -> Function:
    """The exact answer as a function between real vectors."""
    return lambda v: flat(problem.exact(*unflat(v, problem.args)))


def scalar(f: Function) -> Function:
    """A function to numbers whose derivatives of every order involve those of f."""

    def value(v: Tensor) -> Tensor:
        out = f(v)
        return (draw(out.numel(), seed=98) * (out + out.sin())).sum()

    return value


@dataclass(frozen=True)
class Transform:
    """A composition of `torch.func` transforms of a function between vectors."""

    name: str
    apply: Callable[[Function], Callable[[Tensor], Any]]
    mapped: tuple[int, ...] = ()  # leading dimensions of the vectors that it maps over

    def point(self, v: Tensor) -> Tensor:
        """Where to evaluate it, near `v`."""
        return v + draw(*self.mapped, v.numel(), seed=97, scale=0.01) if self.mapped else v


def _push(f: Function) -> Function:
    return lambda v: func.jvp(f, (v,), (draw(*v.shape, seed=96),))[1]


def _pull(f: Function) -> Function:
    def apply(v: Tensor) -> Tensor:
        out, pull = func.vjp(f, v)
        return pull(draw(*out.shape, seed=95))[0]

    return apply


TRANSFORMS = (
    Transform("vjp", _pull),
    Transform("jvp", _push),
    Transform("grad", lambda f: func.grad(scalar(f))),
    Transform("jacrev", func.jacrev),
    Transform("jacfwd", func.jacfwd),
    Transform("hessian", lambda f: func.hessian(scalar(f))),
    Transform("jacrev-jacrev", lambda f: func.jacrev(func.jacrev(scalar(f)))),
    Transform("jacrev-jacfwd", lambda f: func.jacrev(func.jacfwd(scalar(f)))),
    Transform("jacfwd-jacfwd", lambda f: func.jacfwd(func.jacfwd(scalar(f)))),
    Transform("jvp-jvp-jvp", lambda f: _push(_push(_push(f)))),
    Transform("grad-grad-grad", lambda f: _pull(_pull(func.grad(scalar(f))))),
    Transform("jvp-grad-jvp", lambda f: _push(_pull(_push(f)))),
    Transform("vmap", func.vmap, (2,)),
    Transform("vmap-vmap", lambda f: func.vmap(func.vmap(f)), (2, 2)),
    Transform("vmap-grad", lambda f: func.vmap(func.grad(scalar(f))), (2,)),
    Transform("vmap-jacfwd", lambda f: func.vmap(func.jacfwd(f)), (2,)),
    Transform("vmap-hessian-vp", lambda f: func.vmap(_push(func.grad(scalar(f)))), (2,)),
    Transform("grad-vmap", lambda f: _pull(func.vmap(f)), (2,)),
    Transform("jvp-vmap", lambda f: _push(func.vmap(f)), (2,)),
)
# Transforms through which a recorded solve goes too: its loop asks "converged?", which `vmap` cannot.
RECORDABLE = ("vjp", "grad", "jvp")


def compare_transform(
    transform: Transform, f: Function, exact: Function, v: Tensor, relative: float = 1e-8
) -> None:
    """A transform of f is that of the exact function."""
    point = transform.point(v)
    assert_close(transform.apply(f)(point), transform.apply(exact)(point), relative)


def compare_third_order(f: Function, exact: Function, v: Tensor, relative: float = 1e-8) -> None:
    """Three reverse passes by `torch.autograd.grad`, along a direction each time."""

    def third(f: Function) -> list[Tensor]:
        x = v.clone().requires_grad_()
        derivatives = [scalar(f)(x)]
        for order in range(3):
            direction = draw(x.numel(), seed=order)
            along = derivatives[-1] if order == 0 else derivatives[-1] @ direction
            derivatives += torch.autograd.grad(along, x, create_graph=True)
        return derivatives

    for actual, expected in zip(third(f), third(exact)):
        assert_close(actual, expected, relative)


def compare_dual_numbers(f: Function, exact: Function, v: Tensor, relative: float = 1e-8) -> None:
    """Forward mode by dual numbers, and reverse mode over it."""

    def forward_then_reverse(f: Function) -> list[Tensor]:
        x = v.clone().requires_grad_()
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, draw(x.numel(), seed=94))
            tangent = forward_ad.unpack_dual(f(dual)).tangent
        return [tangent, *torch.autograd.grad(tangent.sin().sum(), x)]

    for actual, expected in zip(forward_then_reverse(f), forward_then_reverse(exact)):
        assert_close(actual, expected, relative)


def check_transform(problem: Problem, solver: SolverRow, adjoint: AdjointRow, transform: Transform) -> None:
    """A transform of the library's answer is that transform of the exact answer."""
    compare_transform(transform, library(problem, solver, adjoint), truth(problem), as_vector(problem))


def check_by_differences(problem: Problem, solver: SolverRow, adjoint: AdjointRow) -> None:
    """First and second derivatives in reverse mode, and first in forward mode, against finite differences.

    Of random combinations; every entry is compared with that of the exact answer by `compare_transform`.
    """
    f, v = library(problem, solver, adjoint), as_vector(problem).requires_grad_()
    assert torch.autograd.gradcheck(f, v, fast_mode=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(f, v, fast_mode=True, check_fwd_over_rev=True)


def check_third_order(problem: Problem, solver: SolverRow, adjoint: AdjointRow) -> None:
    """Third derivatives are those of the exact answer."""
    compare_third_order(library(problem, solver, adjoint), truth(problem), as_vector(problem))


def check_dual_numbers(problem: Problem, solver: SolverRow, adjoint: AdjointRow) -> None:
    """Dual numbers, and reverse mode over them, are those of the exact answer."""
    compare_dual_numbers(library(problem, solver, adjoint), truth(problem), as_vector(problem))


# ------------------------------------------------------------------------------------ samples on their own


def rows_of(problem: Problem, rows: list[int]) -> tuple[Any, tuple[Tensor, ...]]:
    """z0 and args of the problem that has these samples, in this order."""
    index = torch.tensor(rows)
    args = tuple(a if d is None else a.index_select(d, index) for a, d in zip(problem.args, problem.in_dims or ()))
    return pytree.tree_map(lambda t: t[index], problem.z0), args


def parameters_of(problem: Problem) -> tuple[Tensor, ...]:
    """Parameters of a cell that is a module."""
    return tuple(problem.f.parameters()) if isinstance(problem.f, torch.nn.Module) else ()


def _differentiated(problem: Problem, rows: list[int], **options: Any) -> tuple[im.Solution, list[Tensor]]:
    z0, args = rows_of(problem, rows)
    args = tuple(a.clone().requires_grad_() for a in args)
    solution = problem.solve(*args, z0=z0, on_failure="ignore", **options)
    # The same weights for every sample, so that a sample's gradient does not tell where it sat.
    leaves = [t.abs().square() * 0.5 + t.real for t in pytree.tree_leaves(solution.value)]
    good = solution.converged
    total = sum((t.reshape(len(rows), -1).sum(1) * good).nansum() for t in leaves)
    return solution, list(torch.autograd.grad(total, args + parameters_of(problem)))


def _rounds_alike(problem: Problem, rows: list[int], z: Any) -> bool:
    """Whether f rounds these samples of a batch like `z` as it does without the others, at some points near it."""
    index, args = torch.tensor(rows), rows_of(problem, rows)[1]
    for i in range(20):
        near = pytree.tree_map(lambda t, i=i: t + math.sin(i) * (1 + t), z)
        with torch.no_grad():
            together = pytree.tree_leaves(problem.f(near, *problem.args))
            chosen = pytree.tree_leaves(problem.f(pytree.tree_map(lambda t: t[index], near), *args))
        if not all(torch.equal(part, whole[index]) for part, whole in zip(chosen, together)):
            return False
    return True


def check_independence(problem: Problem, solver: SolverRow, rows: list[int], give_in_dims: bool) -> None:
    """Permuting, splitting or repeating samples changes nothing about any of them."""
    options = {"solver": solver.make(rtol=1e-10), "in_dims": problem.in_dims if give_in_dims else None}
    together, gradients_together = _differentiated(problem, list(range(problem.batch)), **options)
    chosen, gradients_chosen = _differentiated(problem, rows, **options)
    index = torch.tensor(rows)
    # An accelerator decomposes many matrices otherwise than one, which rounds otherwise; so do products on some
    # processors. A solver may amplify that up to its tolerance.
    alike = index.device.type == "cpu" and _rounds_alike(problem, rows, together.value)
    rounding = 1e-12 if alike else 1e-9
    assert chosen.steps.tolist() == together.steps[index].tolist()
    assert_close(chosen.value, pytree.tree_map(lambda t: t[index], together.value), rounding)
    for whole, part, dim in zip(gradients_together, gradients_chosen, problem.in_dims or ()):
        if dim is not None:
            assert_close(part, whole[index], 1e-9)


def check_a_bad_sample(
    problem: Problem, solver: SolverRow, adjoint: AdjointRow, bad: int, give_in_dims: bool
) -> None:
    """A sample of NaN is reported, has zero gradient, and the others are what they are without it."""
    rest = [i for i in range(problem.batch) if i != bad]
    carried = [i for i, d in enumerate(problem.in_dims or ()) if d is not None][-1]
    rtol = rtol_of(torch.float64)
    options = {
        "solver": solver.make(rtol=rtol),
        "adjoint": adjoint.make(rtol),
        "in_dims": problem.in_dims if give_in_dims else None,
    }
    args = list(problem.args)
    args[carried] = args[carried].clone()
    args[carried][bad] = torch.nan
    poisoned = replace(problem, args=tuple(args))
    with_bad, gradients_with = _differentiated(poisoned, list(range(problem.batch)), **options)
    without, gradients_without = _differentiated(problem, rest, **options)
    assert with_bad.converged.tolist() == [i != bad for i in range(problem.batch)]
    assert int(with_bad.status[bad]) == im.Status.NON_FINITE
    assert_close(pytree.tree_map(lambda t: t[rest], with_bad.value), without.value, 1e-10)
    dims = (*(problem.in_dims or ()), *(None for _ in parameters_of(problem)))
    for whole, part, dim in zip(gradients_with, gradients_without, dims):
        if dim is None:
            assert_close(whole, part, 1e-9)
        else:
            assert bool((whole[bad] == 0).all())
            assert_close(whole[rest], part, 1e-9)
