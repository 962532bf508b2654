"""`argmin` and `least_squares`: state the optimality condition, find the minimum, attach its derivative."""

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
from implicitly.argmin.refused import explaining_refusals
from implicitly.compiled import as_graphs
from implicitly.condition import LINEAR_REMEDY, REMEDY, explain
from implicitly.graph_break import one_break
from implicitly.iterate import Found, Solver
from implicitly.keys import exact
from implicitly.solution import Solution, Status
from implicitly.tree import Layout
from implicitly.unrolled import UnrolledAdjoint

# The default solver of `argmin`; where there is a constraint, its default solver replaces this one.
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

    The derivative comes from the optimality condition: without a constraint, the gradient vanishes; with a
    projection P, z = P(z - gradient), the fixed point of projected gradient descent; with `Equality(h)`, the
    Karush-Kuhn-Tucker (KKT) equations. A set that can be stated as a projection and as equations has the same
    derivative in both. Gradients reach `args` also through the constraint.

    Args:
        objective: `objective(z, *args)` returns one value per sample, `(B,)`; with `batch_dims=0`, a single value.
            Twice differentiable near the minimum. A module, a method or a function, as in `fixed_point`.
        z0: the starting point: a tensor or a pytree of tensors `(B, ...)` of one floating (or complex) dtype.
        args: further arguments of the objective and of the constraint.
        constraint: a projection `P(z, *args)` onto the feasible set, or `Projection(P, step)` (P gets all args: a
            bare `im.project.simplex` takes the first as its radius); `Equality(h)` for h(z, *args) = 0; or None.
        solver: without a constraint `LBFGS`, `GradientDescent`, `Newton` or `NewtonKrylov`; with a projection
            `ProjectedGradient()` (the default there), or any fixed-point solver; with equations `NewtonKKT()`
            (the default there), or any root finder. `NewtonKrylov` may find saddle points: prefer `LBFGS`.
        adjoint: `ImplicitAdjoint` or `UnrolledAdjoint`; with a projection also `PhantomAdjoint` and
            `JacobianFreeAdjoint`. The backward systems of unconstrained problems are symmetric positive definite,
            which suits `ImplicitAdjoint(CG())`.
        batch_dims, in_dims: as in `fixed_point`.
        convex: whether every stationary point is known to be a minimum. If not, a second-order check (on the
            tangent space of the active constraints) marks points that are not minima as NOT_MINIMUM. Beyond 48
            dimensions it may miss a negative eigenvalue that is a hundredth the size of the largest one.
        on_failure: "raise", "warn" or "ignore" when samples do not converge. Samples that diverged, met NaN, have
            no minimum, or whose objective falls without end (UNBOUNDED) get a zero gradient. An objective such as
            -log z, whose gradient vanishes at infinity, seems to have a minimum: it ends as CONVERGED, far away.
        compile: run the solve, and the linear solve of `ImplicitAdjoint`, as one graph each, as in `fixed_point`.

    Returns:
        `Solution`: `value` like z0; `status`, `residual` (the norm of the condition's residual) and `steps`
        `(B,)`; `evaluations` of the objective with its gradient. With `Equality` a `ConstrainedSolution`, which
        also has the multipliers. `rtol` is relative to the residual at z0, or to |J z0|, with J its Jacobian
        there, if that is larger; `atol=None` is relative to (|J| objective)^(1/2). See also `NewtonKKT`.

    Raises:
        TypeError, ValueError: for invalid arguments, before any work.
        SolverError: a sample did not converge and `on_failure="raise"`; carries the `Solution`.

    Source: Gould et al., "Deep declarative networks", IEEE TPAMI 44 (2022); Blondel et al., "Efficient and modular
    implicit differentiation", NeurIPS 2022.
    """
    form = _form(constraint)
    options = {"batch_dims": batch_dims, "in_dims": in_dims, "convex": convex}
    solve = partial(_minimum, form, objective, z0, args, solver, adjoint, on_failure, compile, **options)
    return explaining_refusals(form.name, objective, solve)


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
    """Solve a nonlinear least-squares problem and differentiate the minimum, exactly.

    Minimises half the sum of squares of residuals(z, *args) over z. `residuals` returns a tensor `(B, ...)` or a
    pytree of them, of the dtype of z0. `solver` is `LevenbergMarquardt`, `GaussNewton`, or one for general
    objectives, such as `LBFGS`. The derivative uses the full Hessian, not the Gauss-Newton approximation J'J.

    With more than 1024 unknowns per sample and an ill-conditioned Hessian, as in bundle adjustment,
    `ImplicitAdjoint(im.DenseLU())` solves the backward systems on which `GMRES` falls short. Rescale unknowns
    whose units differ by a factor of a million or more: the test of convergence takes the norm of the whole
    gradient. Arguments, result and errors are otherwise as in `argmin`, without `constraint`.
    """
    options = {"batch_dims": batch_dims, "in_dims": in_dims, "convex": convex}
    solve = partial(_minimum, LeastSquares(), residuals, z0, args, solver, adjoint, on_failure, compile, **options)
    return explaining_refusals(LeastSquares.name, residuals, solve)


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
    """The solution of a minimisation, whose optimality condition takes the given `form`."""
    if not callable(objective):
        raise TypeError(f"the function to minimise must be callable, got a {type(objective).__name__}")
    if solver is _UNCONSTRAINED and isinstance(form, Equality | Projection):
        solver = NewtonKKT() if isinstance(form, Equality) else ProjectedGradient()
    layout = Layout.of(z0, batch_dims)
    how = check_choices(solver, adjoint, layout.computed_dtype, form.iterates, form.offers, form.try_solver)
    problem = form.problem(objective, z0, args, layout, in_dims, how.recording)
    # Objectives come in any units, so only the user can say which absolute size of a gradient is small. The
    # default tolerance is therefore relative to the error in the gradient from rounding of the objective at z0.
    rtol, rounding = solver.tolerances(layout.computed_dtype)
    rounding, solver = (rounding, replace(solver, atol=0.0)) if solver.atol is None else (0.0, solver)
    condition = form.condition(problem, on_failure, convex, rounding, rtol)
    condition = replace(condition, report=replace(condition.report, message=partial(_explained, form)))
    # The key of the graph includes the form's numbers, such as the step of a projection.
    condition = as_graphs(condition, (problem.key, rounding, exact(form))) if compile else condition
    found = how.find(solver, condition, problem)
    return form.solution(problem, found, form.attach(how, found, condition, problem))


def _explained(form: Form, name: str, solver: Solver, found: Found, failed: Tensor) -> str:
    """The message about the samples that `failed`, in the minimisation or the linear solve of its derivative."""
    if name != form.name:
        return explain(name, solver, found, failed, LINEAR_REMEDY)
    remedy = {**REMEDY, Status.DIVERGED: "start closer to the solution (z0), or use another solver"}
    if isinstance(solver, GradientDescent | ProjectedGradient):
        remedy[Status.DIVERGED] = "a smaller step, or step=None, which chooses one automatically"
    elif isinstance(form, Projection):
        remedy[Status.DIVERGED] = "a smaller step in im.Projection, or im.ProjectedGradient, which chooses its own"
    if isinstance(form, Projection):
        remedy[Status.STAGNATED] = (
            "a larger step in im.Projection if step * gradient is below the rounding error of z (the best step is "
            "about 1 / curvature of the objective); im.FixedPointIteration or im.Anderson if P is a proximal map, "
            "such as im.prox.l1, and not a projection; else loosen rtol, use a wider dtype, or use another solver"
        )
    if isinstance(form, Equality):
        remedy[Status.SINGULAR] = (
            "start elsewhere (z0): the Jacobian of the constraints is zero or rank-deficient there"
        )
    return explain(name, solver, found, failed, remedy)
