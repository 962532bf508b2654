"""Adjoints of algebraic conditions: the exact implicit derivative, or unrolling every iteration."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from implicitly.checks import check_listener
from implicitly.condition import Condition, is_usable, warn_of_failure
from implicitly.history import add_combined, combine, products
from implicitly.host import maybe_any
from implicitly.implicit import (
    Backward,
    any_ended,
    attach_usable,
    constant,
    find,
    has_waited,
    search,
    without_failed,
)
from implicitly.iterate import Found, Solver, where_rows
from implicitly.linear import GMRES, DenseLU, check_linear_solver
from implicitly.problem import Problem
from implicitly.solution import Status
from implicitly.transforms import is_recorded, is_wrapped, unwrapped
from implicitly.unrolled import UnrolledAdjoint


@dataclass(frozen=True)
class Adjoint(ABC):
    """A way to differentiate a solution: finds the point as its derivative needs, and attaches that derivative."""

    # Whether autograd records the solve itself.
    recording: ClassVar[bool] = False

    def check(self, solver: Solver, dtype: torch.dtype, iterates: bool) -> None:  # noqa: B027
        """Raise ValueError for choices that do not fit each other or `dtype`; by default, accept everything.

        `iterates`: whether the problem is a fixed point, so that there are iterations to differentiate.
        """

    def find(self, solver: Solver, condition: Condition, problem: Problem) -> Found:
        """The solver's result, without gradients."""
        return find(solver, condition, problem.z0, problem.theta, problem.r0)

    @abstractmethod
    def attach(self, found: Found, condition: Condition, problem: Problem) -> Tensor:
        """The found point `(B, n)` with its derivative."""


# What a solver may need of the problem, and which entry point provides it.
_NEEDS = {
    "objective": "an objective to descend: im.argmin without a constraint, or im.least_squares",
    "residuals": "residuals whose squares add up to the objective: im.least_squares",
    "projection": "an objective and a projection: im.argmin(..., constraint=P)",
    "equality": "an objective and equality constraints: im.argmin(..., constraint=im.Equality(h))",
}


def check_choices(
    solver: Solver,
    adjoint: Adjoint | UnrolledAdjoint,
    dtype: torch.dtype,
    iterates: bool,
    offers: tuple[str, ...] = (),
    try_solver: str = "Anderson, Broyden, Newton or NewtonKrylov",
) -> Adjoint:
    """`adjoint` as an `Adjoint`; raises TypeError / ValueError unless it, `solver` and `dtype` fit together.

    `offers` lists what the problem provides of what solvers may need (`_NEEDS`). `try_solver` is what error
    messages suggest in place of a solver that does not fit.
    """
    if not isinstance(solver, Solver):
        raise TypeError(f"solver must be a solver such as {try_solver}, got {solver!r}")
    if isinstance(adjoint, UnrolledAdjoint):
        adjoint = _Unrolled()
    if not isinstance(adjoint, Adjoint):
        raise TypeError(f"adjoint must be an adjoint such as im.ImplicitAdjoint(), got {adjoint!r}")
    if solver.linear:
        raise TypeError(
            f"{type(solver).__name__} solves linear systems only: pass {try_solver} as solver, and "
            f"{type(solver).__name__} as ImplicitAdjoint(linear_solver=...)"
        )
    if solver.needs is not None and solver.needs not in offers:
        raise TypeError(f"{type(solver).__name__} needs {_NEEDS[solver.needs]}. Pass {try_solver} as solver here")
    solver.tolerances(dtype)
    adjoint.check(solver, dtype, iterates)
    return adjoint


def _gmres() -> Solver:
    """The default solver; a function, as the tracer of `torch.compile` can call one but not embed an object."""
    return GMRES()


@dataclass(frozen=True)
class ImplicitAdjoint(Adjoint):
    """The exact derivative at the solution, by the implicit function theorem: any order, reverse and forward mode.

    It takes the memory of one call of f, however many iterations found the point or solve the backward system.

    Args:
        linear_solver: solves the backward system; `GMRES`, `BiCGStab`, `CG`, `Neumann`, `DenseLU`, or any solver
            of fixed points such as `Anderson`. The default is `GMRES()`, followed by `DenseLU()` where that falls
            short for states of up to 1024 numbers.
        rtol, max_steps: replace those of `linear_solver`.
        inverse: what to do with the estimate of the inverse Jacobian that `Broyden` ends with: "ignore" it,
            "start" the backward solve from it, or "precondition" the backward solve by it.
        listen: called with the `Found` of every backward solve, for logging; not under `torch.func`.

    A sample whose backward solve breaks down (because its Jacobian is singular) gets a zero gradient and is
    reported as `on_failure` says.

    Raises:
        TypeError, ValueError: for invalid options; ValueError from a solve if `inverse` needs an estimate that its
            solver does not have.
    """

    linear_solver: Solver = field(default_factory=_gmres)
    rtol: float | None = None
    max_steps: int | None = None
    inverse: str = "ignore"
    listen: Callable[[Found], None] | None = None

    def __post_init__(self):
        if self.inverse not in ("ignore", "start", "precondition"):
            raise ValueError(f'inverse must be "ignore", "start" or "precondition", got {self.inverse!r}')
        check_linear_solver(self.linear_solver)
        check_listener("ImplicitAdjoint", self.listen)

    @property
    def backward_solver(self) -> Solver:
        """`linear_solver` with the tolerances given here."""
        changes = {k: v for k in ("rtol", "max_steps") if (v := getattr(self, k)) is not None}
        return replace(self.linear_solver, **changes)

    @property
    def _otherwise(self) -> DenseLU | None:
        """The solver to try after the default one, unless another or a number of steps was chosen."""
        return DenseLU(rtol=self.rtol) if self.linear_solver == _gmres() and self.max_steps is None else None

    def check(self, solver: Solver, dtype: torch.dtype, iterates: bool) -> None:
        """Raise ValueError for a tolerance that `dtype` cannot reach, or if `solver` estimates no inverse."""
        self.backward_solver.tolerances(dtype)
        if self.inverse != "ignore" and not solver.estimates_inverse:
            raise ValueError(
                f"inverse={self.inverse!r} needs a solver that estimates the inverse Jacobian: Broyden, not "
                f"{type(solver).__name__}"
            )

    def attach(self, found: Found, condition: Condition, problem: Problem) -> Tensor:
        """The found point `(B, n)` with the theorem's derivative; zero for samples without one."""
        traced = torch.compiler.is_dynamo_compiling()  # then theta does not hold all that f depends on
        if not (traced or any(is_recorded(t) for t in problem.theta)):
            return found.z
        estimate = None
        # The estimate only saves time. Under torch.func it would outlive the transform that it belongs to.
        if self.inverse != "ignore" and found.estimate and not is_wrapped(found.z):
            estimate = _transposed_inverse(*found.estimate)
        how = Backward(self.backward_solver, estimate, self.inverse, self.listen, self._otherwise)
        return attach_usable(found, condition, problem.theta, how)


def _transposed_inverse(D: Tensor, N: Tensor, count: Tensor) -> Callable[[Tensor], Tensor]:
    """The map g -> H' g for Broyden's H = I + D' N D, using only the first `count` `(B,)` slots."""
    slots = D.shape[1]  # room for all slots may never have been needed
    N, known = N[:, :slots, :slots], torch.arange(slots, device=D.device) < count.unsqueeze(1)
    D = torch.where(known.unsqueeze(2), D, 0.0)
    return lambda g: add_combined(g, combine(products(g, D), N), D)


@dataclass(frozen=True)
class _Unrolled(Adjoint):
    """`UnrolledAdjoint` for algebraic conditions: the gradient of the recorded iterations."""

    recording: ClassVar[bool] = True

    def check(self, solver: Solver, dtype: torch.dtype, iterates: bool) -> None:
        """Raise ValueError for a solver that cannot be recorded."""
        if not solver.recordable:
            raise ValueError(
                f"UnrolledAdjoint differentiates the operations of the solver, but {type(solver).__name__} "
                "decomposes matrices, which has no derivative where eigenvalues coincide; use ImplicitAdjoint"
            )

    def find(self, solver: Solver, condition: Condition, problem: Problem) -> Found:
        """The solver's result, with autograd recording."""
        if condition.graphs is not None:
            raise ValueError(
                "UnrolledAdjoint needs autograd to record the solve, which compile=True does not allow: use "
                "ImplicitAdjoint, or compile=False"
            )
        if torch.compiler.is_dynamo_compiling():
            return search(solver, condition, problem.z0, problem.theta, problem.r0, unrolled=True)
        found = search(solver, condition, problem.z0, problem.theta, problem.r0)
        found = condition.examined(found, problem.theta)
        found = _with_a_step(found, condition, problem)
        z, status, residual, steps = (unwrapped(t.detach()) for t in found[:4])
        condition.report(condition.name, solver, Found(z, status, residual, steps, found.evaluations))
        found = found._replace(looked_at=has_waited(solver, condition))
        usable = is_usable(found.status)
        if not any_ended(found, ~usable):
            return found
        # The graph of a failed sample turns zero cotangents into NaN: record again, without the values that made
        # it fail.
        if not any_ended(found, usable):
            return found._replace(z=constant(found.z, problem.theta))
        z0, theta = without_failed(usable, problem.z0, problem.theta, condition)
        again = search(solver, condition, z0, theta)
        return found._replace(z=torch.where(usable[:, None], again.z, found.z.detach()))

    def attach(self, found: Found, condition: Condition, problem: Problem) -> Tensor:
        """The found point; its autograd graph is the solve itself."""
        return found.z


def _with_a_step(found: Found, condition: Condition, problem: Problem) -> Found:
    """`found` with one plain step for samples that had converged at their start, so that there is one to unroll.

    Only for fixed points. The plain steps of other conditions lead nowhere: there such samples get a zero
    gradient, and a warning.
    """
    if not any(is_recorded(t) for t in problem.theta):
        return found
    if found.z.shape[1] == 0:
        return _tied(found, problem)
    at_once = (found.steps == 0) & (found.status == int(Status.CONVERGED))
    if not maybe_any(at_once):
        return found if found.z.requires_grad or is_wrapped(found.z) else _tied(found, problem)
    if condition.relative_to_iterate:
        return found._replace(z=where_rows(at_once, problem.z0 + problem.r0, found.z))
    if condition.report.on_failure != "ignore":
        warn_of_failure(
            f"{condition.name}: {int(unwrapped(at_once).sum())} of {len(at_once)} samples start at a solution, so "
            "that there is no step to unroll, and their gradient is zero: use im.ImplicitAdjoint()",
            condition.name,
        )
    return _tied(found, problem)


def _tied(found: Found, problem: Problem) -> Found:
    """`found` whose value has a derivative, even if zero, for example with no samples or no entries."""
    return found._replace(z=found.z + (constant(found.z, problem.theta) - found.z.detach()))
