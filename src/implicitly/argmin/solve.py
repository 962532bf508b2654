"""`argmin` and `least_squares`: state the condition, find the point, attach the derivative."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from implicitly.adjoints import Adjoint, ImplicitAdjoint, check_choices
from implicitly.argmin.conditions import Form, LeastSquares, Unconstrained
from implicitly.argmin.equality import Equality, NewtonKKT
from implicitly.argmin.gradient_descent import GradientDescent
from implicitly.argmin.lbfgs import LBFGS
from implicitly.argmin.least_squares import LevenbergMarquardt
from implicitly.argmin.projection import ProjectedGradient, Projection
from implicitly.argmin.refused import explained
from implicitly.compiled import as_graphs
from implicitly.condition import LINEAR_REMEDY, REMEDY, explain
from implicitly.graph_break import one_break
from implicitly.iterate import Found, Solver
from implicitly.keys import exact
from implicitly.solution import Solution, Status
from implicitly.tree import Layout
from implicitly.unrolled import UnrolledAdjoint

# The default of `argmin`, which gives way to that of the constraint.
_UNCONSTRAINED = LBFGS()


@one_break
def argmin(
    objective: Callable[..., Any],
    z0: Any,
    *args: Any,
    constraint: Callable[..., Any] | Projection | Equality | None = None,
    solver: Solver = _UNCONSTRAINED,
    adjoint: Adjoint | UnrolledAdjoint = ImplicitAdjoint(),
    batch_dims: int = 1,
    in_dims: Any = None,
    convex: bool = False,
    on_failure: str = "raise",
    compile: bool = False,
) -> Solution:
    """Minimise objective(z, *args) over z and differentiate the minimum with respect to `args` and parameters.

    The derivative comes from a condition that the minimum satisfies, and the constraint decides which: without
    one, that the gradient vanishes; of a projection P, the projected-gradient fixed point z = P(z - gradient); of
    `Equality(h)`, the equations of Karush, Kuhn and Tucker. Sets that can be stated in two of these ways have the
    same derivative in both. Args that enter through the constraint get theirs, too.

    Args:
        objective: `objective(z, *args)` gives one value a sample, `(B,)`; with `batch_dims=0` a single one. It is
            twice differentiable near the answer. A module, a method or a function, as in `fixed_point`.
        z0: where to start: a tensor or a pytree of tensors `(B, ...)` of one floating (or complex) dtype.
        args: what else the objective and the constraint take.
        constraint: a projection `P(z, *args)` to the nearest feasible z, or `Projection(P, step)` (a bare
            `im.project.simplex` gets args, too: for its radius); `Equality(h)` for h(z, *args) = 0; None: any z.
        solver: without a constraint `LBFGS`, `GradientDescent`, `Newton` or `NewtonKrylov`; with a projection
            `ProjectedGradient()` (the default there), or any solver of fixed points; with equations `NewtonKKT()`
            (the default there), or any solver of roots. `NewtonKrylov` may find saddles: prefer `LBFGS`.
        adjoint: `ImplicitAdjoint` or `UnrolledAdjoint`; with a projection also `PhantomAdjoint` and
            `JacobianFreeAdjoint`. The backward systems of unconstrained problems are symmetric positive definite:
            `ImplicitAdjoint(CG())` fits them.
        batch_dims, in_dims: as in `fixed_point`.
        convex: whether every stationary point is known to be a minimum. Else the points found are checked in
            second order (on the tangent space of the active constraints); those that are not end as NOT_MINIMUM.
            Beyond 48 dimensions a negative eigenvalue a hundredth the size of the largest may go unnoticed.
        on_failure: "raise", "warn" or "ignore" when samples do not converge. Samples that diverged, met NaN, have
            no minimum, or fall without end (UNBOUNDED) have zero gradient. An objective such as -log z, whose
            gradient vanishes at infinity, cannot be told from one with a minimum: it ends as CONVERGED, far away.
        compile: run the solve as one graph, and the linear solve of `ImplicitAdjoint`, as in `fixed_point`.

    Returns:
        `Solution`: `value` like z0; `status`, `residual` (the norm of the condition's residual) and `steps`
        `(B,)`; `evaluations` of the objective with its gradient. With `Equality` a `ConstrainedSolution`, which
        has the multipliers too. Tolerances are relative to the residual at z0, or to |J z0| with its Jacobian J
        there if that is larger; `atol=None` is relative, too, to (|J| objective)^(1/2). See also `NewtonKKT`.

    Raises:
        TypeError, ValueError: for input that cannot be meant, before any work.
        SolverError: a sample did not converge and `on_failure="raise"`; carries the `Solution`.

    Source: Gould et al., "Deep declarative networks", IEEE TPAMI 44 (2022); Blondel et al., "Efficient and modular
    implicit differentiation", NeurIPS 2022.
    """
    form = _form(constraint)
    options = {"batch_dims": batch_dims, "in_dims": in_dims, "convex": convex}
    solve = partial(_minimum, form, objective, z0, args, solver, adjoint, on_failure, compile, **options)
    return explained(form.name, objective, solve)


@one_break
def least_squares(
    residuals: Callable[..., Any],
    z0: Any,
    *args: Any,
    solver: Solver = LevenbergMarquardt(),
    adjoint: Adjoint | UnrolledAdjoint = ImplicitAdjoint(),
    batch_dims: int = 1,
    in_dims: Any = None,
    convex: bool = False,
    on_failure: str = "raise",
    compile: bool = False,
) -> Solution:
    """Minimise half the sum of squares of residuals(z, *args) over z and differentiate the minimum, exactly.

    `residuals` returns a tensor `(B, ...)` or a pytree of them, of the dtype of z0. `solver` is
    `LevenbergMarquardt`, `GaussNewton` or one for any objective, such as `LBFGS`. The derivative is that of the
    minimum, with the whole Hessian, not that of the linearised residuals. Beyond 256 unknowns a sample, and where
    that is ill-conditioned, as in bundle adjustment, `ImplicitAdjoint(im.DenseLU())` finds what `GMRES` does not.
    Unknowns in units that differ by a million or more are to be scaled: a gradient counts as one vector.
    All else is as in `argmin`.
    """
    options = {"batch_dims": batch_dims, "in_dims": in_dims, "convex": convex}
    solve = partial(_minimum, LeastSquares(), residuals, z0, args, solver, adjoint, on_failure, compile, **options)
    return explained(LeastSquares.name, residuals, solve)


def _form(constraint: Any) -> Form:
    if constraint is None:
        return Unconstrained()
    if isinstance(constraint, Projection | Equality):
        return constraint
    if callable(constraint):
        return Projection(constraint)
    raise TypeError(
        "constraint must be a projection P(z, *args), im.Projection(P), im.Equality(h) or None, got a "
        f"{type(constraint).__name__}"
    )


def _minimum(
    form: Form,
    objective: Callable[..., Any],
    z0: Any,
    args: tuple[Any, ...],
    solver: Solver,
    adjoint: Adjoint | UnrolledAdjoint,
    on_failure: str,
    compile: bool,
    *,
    batch_dims: int,
    in_dims: Any,
    convex: bool,
) -> Solution:
    """The minimum of an `objective` in a form of the condition."""
    if not callable(objective):
        raise TypeError(f"the function to minimise must be callable, got a {type(objective).__name__}")
    if solver is _UNCONSTRAINED and isinstance(form, Equality | Projection):
        solver = NewtonKKT() if isinstance(form, Equality) else ProjectedGradient()
    layout = Layout.of(z0, batch_dims)
    how = check_choices(solver, adjoint, layout.computed_dtype, form.iterates, form.offers, form.try_solver)
    problem = form.problem(objective, z0, args, layout, in_dims, how.recording)
    # Objectives come in any units, so that no absolute tolerance but the user's says when a gradient is small: the
    # default one is relative, to what rounding of the objective at z0 makes of its gradient.
    rtol, rounding = solver.tolerances(layout.computed_dtype)
    rounding, solver = (rounding, replace(solver, atol=0.0)) if solver.atol is None else (0.0, solver)
    condition = form.condition(problem, on_failure, convex, rounding, rtol)
    condition = replace(condition, report=replace(condition.report, message=partial(_explained, form)))
    # With what the form has besides functions, such as the step of a projection.
    condition = as_graphs(condition, (problem.key, rounding, exact(form))) if compile else condition
    found = how.find(solver, condition, problem)
    return form.solution(problem, found, form.attach(how, found, condition, problem))


def _explained(form: Form, name: str, solver: Solver, found: Found, failed: Tensor) -> str:
    """What is said of samples that `failed`, of the minimum or of its derivative."""
    if name != form.name:
        return explain(name, solver, found, failed, LINEAR_REMEDY)
    remedy = {**REMEDY, Status.DIVERGED: "start closer (z0), or try another solver"}
    if isinstance(solver, GradientDescent | ProjectedGradient):
        remedy[Status.DIVERGED] = "a smaller step, or step=None, which finds its own"
    elif isinstance(form, Projection):
        remedy[Status.DIVERGED] = "a smaller step of im.Projection, or ProjectedGradient, which finds its own"
    if isinstance(form, Projection):
        remedy[Status.STAGNATED] = (
            "a larger step of im.Projection if step * gradient is lost beside z (best is one over the objective's "
            "curvature); im.FixedPointIteration or im.Anderson if P is a proximal map, such as im.prox.l1, and no "
            "projection; else loosen rtol, use a wider dtype, or try another solver"
        )
    if isinstance(form, Equality):
        remedy[Status.SINGULAR] = (
            "the derivative of the constraints vanishes or is singular there, so that it leads nowhere: start "
            "elsewhere (z0)"
        )
    return explain(name, solver, found, failed, remedy)
