"""`linear_solve`: a linear system as an implicit layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from implicitly.condition import LINEAR_REMEDY, REMEDY, Map, explain
from implicitly.graph_break import one_break
from implicitly.implicit import Backward, attach_usable, find
from implicitly.iterate import Solver
from implicitly.linear import GMRES, check_linear_solver
from implicitly.problem import Problem
from implicitly.pullback import pullback
from implicitly.solution import Solution, Status
from implicitly.transforms import is_cpu, unwrapped
from implicitly.tree import Layout


@one_break
def linear_solve(
    operator: Callable[..., Any],
    b: Any,
    *args: Any,
    solver: Solver = GMRES(),
    transpose: bool = False,
    batch_dims: int = 1,
    in_dims: Any = None,
    on_failure: str = "raise",
) -> Solution:
    """Solve operator(u, *args) = b for u, where the operator is linear in u; differentiable in `b` and `args`.

    Args:
        operator: `operator(u, *args)` returns a value like `u`: a tensor `(B, ...)` or a pytree of them.
        b: the right-hand side, like u.
        solver: `GMRES`, `BiCGStab`, `CG`, `Neumann`, `DenseLU`, or a fixed-point solver such as `Anderson`.
        transpose: solve with the transposed operator (as a real map), found by reverse-mode differentiation.
        batch_dims, in_dims, on_failure: as in `fixed_point`.

    Returns:
        `Solution`: `residual` is |b - operator(u)|, relative to |b| in the tolerances.

    Raises:
        TypeError, ValueError: for invalid input; on a CPU also for an operator that does not map 0 to 0.
        SolverError: a sample did not converge and `on_failure="raise"`; carries the `Solution`.
    """
    check_linear_solver(solver)
    layout = Layout.of(b, batch_dims, "b")
    solver.tolerances(layout.computed_dtype)
    start = pytree.tree_map(torch.zeros_like, b)
    problem = Problem.of(operator, start, args, lambda u, Mu: Mu, layout=layout, in_dims=in_dims, recording=False)
    zero = problem.z0
    _check_at_zero(problem.r0)

    def bind(zero: Tensor, *theta: Tensor) -> Map:
        apply = problem.bind(*theta)
        if not transpose:
            return apply
        pull = pullback(apply, zero)[1]
        return lambda u: pull(u)[0]

    sample_dims = None if problem.sample_dims is None else (0, 0, *problem.sample_dims)
    plain = problem.condition("linear_solve", on_failure)
    report = replace(plain.report, message=partial(explain, remedy=_REMEDY))
    condition = replace(plain, bind=bind, linear=True, sample_dims=sample_dims, report=report)
    theta = (layout.pack(b), zero, *problem.theta)
    found = find(solver, condition, zero, theta)
    return problem.solution(found, attach_usable(found, condition, theta, Backward(solver)))


def _check_at_zero(image: Tensor) -> None:
    """Raise ValueError if the operator's value at 0 `(B, n)` is not exactly 0, as that of a linear operator is."""
    if torch.compiler.is_dynamo_compiling() or not is_cpu(image):
        return
    image = unwrapped(image)
    constant = image[(image != 0) & image.isfinite()]  # NaN and inf come from an operator that contains them
    if constant.numel():
        raise ValueError(
            f"the operator is not linear: it maps u = 0 to {float(constant[0]):.3g}, not 0. Leave the constant "
            "term out of the operator, and subtract it from b"
        )


_REMEDY = {
    **LINEAR_REMEDY,
    Status.MAX_STEPS: REMEDY[Status.MAX_STEPS],
    Status.STAGNATED: "check that the operator is linear in u, loosen rtol, use a wider dtype, or use another "
    "solver: the residual has stopped decreasing",
    Status.SINGULAR: "use GMRES if CG was used, as the operator may not be positive definite; otherwise "
    "it is singular",
    Status.NON_FINITE: "check b (for a derivative, the incoming gradient) and what the operator returns, for NaN "
    "or inf",
}
