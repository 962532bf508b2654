"""`fixed_point` and `root`: state the condition, find the point, attach the derivative."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from implicitly.adjoints import Adjoint, ImplicitAdjoint, check_choices
from implicitly.compiled import as_graphs
from implicitly.condition import Condition
from implicitly.fixed_point.adjoints import JacobianFreeAdjoint, PhantomAdjoint
from implicitly.fixed_point.anderson import Anderson
from implicitly.fixed_point.broyden import Broyden
from implicitly.fixed_point.newton import Newton
from implicitly.fixed_point.picard import FixedPointIteration
from implicitly.fixed_point.remedies import explained
from implicitly.graph_break import LONGEST, one_break_unless
from implicitly.iterate import Solver
from implicitly.problem import Problem
from implicitly.solution import Solution
from implicitly.tree import Layout
from implicitly.unrolled import UnrolledAdjoint


def is_traceable(
    *args: Any, solver: Any = None, adjoint: Any = ImplicitAdjoint(), compile: bool = False, **options: Any
) -> bool:
    """Whether the numbers of steps, forwards and backwards, are known in advance and so fit into a graph."""
    if compile or not (isinstance(solver, FixedPointIteration | Anderson | Broyden) and _is_short(solver)):
        return False
    if isinstance(adjoint, ImplicitAdjoint):
        return adjoint.listen is None and _is_short(adjoint.backward_solver)
    return isinstance(adjoint, PhantomAdjoint | JacobianFreeAdjoint | UnrolledAdjoint)


def _is_short(solver: Solver) -> bool:
    return solver.fixed_steps and solver.max_steps <= LONGEST and not solver.nests


@one_break_unless(is_traceable)
def fixed_point(
    f: Callable[..., Any],
    z0: Any,
    *args: Any,
    solver: Solver = Anderson(),
    adjoint: Adjoint | UnrolledAdjoint = ImplicitAdjoint(),
    batch_dims: int = 1,
    in_dims: Any = None,
    on_failure: str = "warn",
    compile: bool = False,
) -> Solution:
    """Solve z = f(z, *args) and differentiate the solution with respect to `args` and the parameters of f.

    Args:
        f: `f(z, *args)` returns the next z: same structure, shapes, dtype and device. A module, a method or a
            function; the parameters of modules that it is, is bound to or closes over get gradients.
        z0: the initial state: a tensor or a pytree of tensors of one floating (or complex) dtype, each `(B, ...)`.
            No gradient flows to it, since the solution does not depend on it.
        args: further arguments of f: tensors, pytrees of them, or anything else.
        solver: `FixedPointIteration`, `Anderson`, `Broyden`, `Newton` or `NewtonKrylov`. All solvers have `rtol`,
            relative to |z| of a sample (None: eps^(2/3) of the dtype, 2e-5 in float32; 0 without `atol`: exactly
            `max_steps` steps, without a test of convergence), `atol` and `max_steps`.
        adjoint: `ImplicitAdjoint`, `PhantomAdjoint`, `JacobianFreeAdjoint` or `UnrolledAdjoint`.
        batch_dims: 1: dimension 0 holds independent samples, each with its own convergence. 0: the whole state
            is one system.
        in_dims: which of `args` have one entry per sample, as in `torch.vmap`: an int or None for all, or a tuple
            with one (or a pytree of them) for each. If given, finished samples are dropped from the calls of f.
        on_failure: "warn", "raise" or "ignore" when samples do not converge. Samples that diverged or met NaN
            get zero gradient (if f is undefined at finite arguments, only with `in_dims`); others that fell short
            get the gradient at their best iterate. In the graph of a compiled model (see Note) nothing is
            announced; check `status`.
        compile: run the whole solve as one graph of `torch.compile`, and the linear solve of `ImplicitAdjoint` as
            another; a `CompileWarning` says where that is not possible. Backward solves of large states on a CPU,
            which spend nearly all their time in f, run eagerly.

    Returns:
        `Solution`: `value` like z0; `status`, `residual` (|f(z) - z|) and `steps` of shape `(B,)`.

    Raises:
        TypeError, ValueError: for invalid input, before any work.
        SolverError: a sample did not converge and `on_failure="raise"`; carries the `Solution`.

    Note:
        In a model under `torch.compile`, `FixedPointIteration`, `Anderson` and `Broyden` with `rtol=0` and at most
        100 steps become part of the graph, with any adjoint (`ImplicitAdjoint` if its linear solver also takes a
        fixed number of steps, such as `im.Neumann(max_steps=5, rtol=0)`, and it has no `listen`). Any other solve
        is one graph break.

    Source: Bai, Kolter and Koltun, "Deep Equilibrium Models", NeurIPS 2019.
    """
    layout = Layout.of(z0, batch_dims)
    how = check_choices(solver, adjoint, layout.computed_dtype, iterates=True)
    problem = Problem.of(
        f, z0, args, lambda z, fz: fz - z, layout=layout, in_dims=in_dims, recording=how.recording
    )
    condition = _telling(problem.condition("fixed_point", on_failure, relative_to_iterate=True))
    condition = as_graphs(condition, problem.key) if compile else condition
    found = how.find(solver, condition, problem)
    return problem.solution(found, how.attach(found, condition, problem))


@one_break_unless(is_traceable)
def root(
    residual: Callable[..., Any],
    z0: Any,
    *args: Any,
    solver: Solver = Newton(),
    adjoint: Adjoint | UnrolledAdjoint = ImplicitAdjoint(),
    batch_dims: int = 1,
    in_dims: Any = None,
    on_failure: str = "raise",
    compile: bool = False,
) -> Solution:
    """Solve residual(z, *args) = 0 and differentiate the solution.

    Tolerances are relative to the norm of the residual at `z0`. `FixedPointIteration` here iterates
    z <- z - damping * residual(z), and `Anderson` and `Broyden` start with that step, so they need a residual
    whose sign and size lead to the root: for a steady state of dz/dt = F(z), pass them -F. `Newton` and
    `NewtonKrylov` accept any residual. Adjoints that differentiate iterations of f (`PhantomAdjoint`,
    `JacobianFreeAdjoint`) raise ValueError, as there are none. Arguments, result and errors are otherwise as in
    `fixed_point`, except that `on_failure="raise"` is the default.
    """
    layout = Layout.of(z0, batch_dims)
    how = check_choices(solver, adjoint, layout.computed_dtype, iterates=False)
    problem = Problem.of(
        residual,
        z0,
        args,
        lambda z, Fz: -Fz,
        layout=layout,
        in_dims=in_dims,
        recording=how.recording,
    )
    condition = _telling(problem.condition("root", on_failure))
    condition = as_graphs(condition, problem.key) if compile else condition
    found = how.find(solver, condition, problem)
    return problem.solution(found, how.attach(found, condition, problem))


def _telling(condition: Condition) -> Condition:
    """`condition` with a report that says what to try with the solvers of this folder."""
    return replace(condition, report=replace(condition.report, message=explained))
