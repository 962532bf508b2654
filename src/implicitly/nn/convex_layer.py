"""Convex programs, written in cvxpy, as layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from implicitly.argmin.convex.conic_solver import Clarabel
from implicitly.argmin.convex.solve import ConvexProgram
from implicitly.argmin.programs.derivative import KKTAdjoint
from implicitly.argmin.programs.solver import ProgramSolver
from implicitly.condition import Report
from implicitly.graph_break import one_break
from implicitly.solution import Solution
from implicitly.transforms import unwrapped


class ConvexLayer(nn.Module):
    """The solution of a convex program as a differentiable function of its parameters.

    The program is written in cvxpy, which canonicalises it once, here. Calls then take values of the parameters to
    the program's numbers by a sparse product, solve all samples, and give the solution its derivative, of any
    order and both modes, from the optimality condition. Quadratic and linear programs are solved in PyTorch, by
    `qp`, where the values are; conic ones (second-order, semidefinite, exponential, power) by Clarabel in float64
    on the CPU. Constructor and call are those of `cvxpylayers.torch.CvxpyLayer`, but that options of solvers are
    arguments of `solver`.

    Args:
        problem: a `cvxpy.Problem` that is DPP: convex, and affine in the parameters where it matters. With a
            matrix P that is a parameter, `quad_form(x, P)` is fine in the objective.
        parameters: the problem's `cvxpy.Parameter`s, all of them, in the order of the values to come.
        variables: the `cvxpy.Variable`s whose values are wanted, or dual variables of equalities and inequalities.
        solver: `InteriorPoint` or `ADMM` (quadratic and linear programs) or `Clarabel` (any); None: the
            first for quadratic and linear programs, else the last. The first two have dense matrices: for programs
            of hundreds of unknowns and mostly zeros, as in control, `Clarabel` may be ten times faster.
        gp: whether it is a geometric program (log-log convex, `problem.is_dgp()`).
        on_failure: "raise", "warn" or "ignore" when samples have no solution. Their values are NaN, their
            gradients zero; the others are solved.
        compile: as in `implicitly.qp`; with `Clarabel` a `CompileWarning` says that it has no graph.
        adjoint: as in `implicitly.qp`; with `Clarabel` without smoothing.

    Attributes:
        solution: the `Solution` of the last call, detached: `value` (the tuple), `status`, `residual`, `steps`;
            under `vmap` that of the whole batch.

    Raises:
        ImportError: cvxpy, Clarabel or SciPy are not installed.
        TypeError, ValueError: the problem is not DPP or has integer variables; parameters or variables are not its
            own; a solver that does not fit.
        NotImplementedError: complex parameters or variables; dual variables of conic constraints.

    Source: Agrawal, Amos, Barratt, Boyd, Diamond and Kolter, "Differentiable Convex Optimization Layers", NeurIPS
    2019.
    """

    def __init__(
        self,
        problem: Any,
        parameters: Sequence[Any],
        variables: Sequence[Any],
        solver: ProgramSolver | Clarabel | None = None,
        gp: bool = False,
        on_failure: str = "raise",
        compile: bool = False,
        adjoint: KKTAdjoint = KKTAdjoint(),
    ):
        super().__init__()
        Report(on_failure)  # its own check
        self.on_failure = on_failure
        self.solution: Solution | None = None
        self._program = ConvexProgram.of(problem, parameters, variables, solver, gp, adjoint, compile)

    @one_break
    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        """The variables' values, `(B, *shape)` each, or `shape` where no parameter has a batch.

        Args:
            values: for each parameter a tensor of its shape, or with one entry a sample in front; float32 or
                float64. Those without are shared by the batch, and their gradients are sums.

        Raises:
            TypeError, ValueError: for values that do not fit, or break what a parameter declares (sign, bounds,
                symmetry, definiteness, diagonal or sparse).
            SolverError: a sample has no solution and `on_failure="raise"`.
        """
        solution = self._program(values, self.on_failure)
        ends = {name: unwrapped(getattr(solution, name).detach()) for name in ("status", "residual", "steps")}
        self.solution = replace(solution, value=tuple(unwrapped(v.detach()) for v in solution.value), **ends)
        return solution.value
