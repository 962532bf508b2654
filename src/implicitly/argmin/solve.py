"""`argmin`: state the condition, find the point, attach the derivative."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from implicitly.adjoints import Adjoint, ImplicitAdjoint, check_choices
from implicitly.argmin.conditions import condition_of, unconstrained
from implicitly.argmin.lbfgs import LBFGS
from implicitly.iterate import Solution, Solver
from implicitly.tree import Layout
from implicitly.unrolled import UnrolledAdjoint


def argmin(
    objective: Callable[..., Any],
    z0: Any,
    *args: Any,
    solver: Solver = LBFGS(),
    adjoint: Adjoint | UnrolledAdjoint = ImplicitAdjoint(),
    batch_dims: int = 1,
    in_dims: Any = None,
    convex: bool = False,
    on_failure: str = "raise",
    compile: bool = False,
) -> Solution:
    """Minimise objective(z, *args) over z, from z0, and differentiate the minimum."""
    layout = Layout.of(z0, batch_dims)
    how = check_choices(
        solver, adjoint, layout.dtype, iterates=False, offers=("objective",), try_solver="LBFGS or GradientDescent"
    )
    problem = unconstrained(objective, z0, args, layout, in_dims, how.recording)
    condition = condition_of(problem, "argmin", on_failure, convex)
    found = how.find(solver, condition, problem, compile)
    return problem.solution(found, how.attach(found, condition, problem))
