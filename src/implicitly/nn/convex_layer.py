"""Convex programs written in cvxpy, as layers."""

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

    The program is written in cvxpy, which canonicalises it once, in the constructor. Each call then maps the
    values of the parameters to the coefficients of the program with one sparse product, solves all samples, and
    attaches the derivative of the solution, of any order and in both modes, from the optimality condition.
    Quadratic and linear programs are solved in PyTorch by `qp`, on the device of the values; conic programs
    (second-order, semidefinite, exponential, power) by Clarabel, in float64 on the CPU. Constructor and call are
    those of `cvxpylayers.torch.CvxpyLayer`, except that the options of a solver are arguments of `solver`.

    Args:
        problem: a `cvxpy.Problem` that follows disciplined parametrised programming (DPP): convex, with
            coefficients that are affine in the parameters. In the objective, `quad_form(x, P)` with a parameter P
            is allowed.
        parameters: all `cvxpy.Parameter`s of the problem, in the order in which calls pass their values.
        variables: the `cvxpy.Variable`s whose values to return, or dual variables of equalities and inequalities.
        solver: `InteriorPoint` or `ADMM` (quadratic and linear programs) or `Clarabel` (any); None:
            `InteriorPoint` for quadratic and linear programs, else `Clarabel`. The first two use dense matrices:
            for sparse programs with hundreds of unknowns, as in control, `Clarabel` may be ten times faster.
        gp: whether it is a geometric program (log-log convex, `problem.is_dgp()`).
        on_failure: "raise", "warn" or "ignore" when samples have no solution. Their values are NaN and their
            gradients zero; the other samples are solved.
        compile: as in `implicitly.qp`; with `Clarabel` a `CompileWarning` says that there is no graph for it.
        adjoint: as in `implicitly.qp`; `Clarabel` does not support smoothing.

    Attributes:
        solution: the `Solution` of the last call, detached: `value` (the tuple), `status`, `residual`, `steps`;
            under `vmap` that of the whole batch.

    Raises:
        ImportError: cvxpy, Clarabel or SciPy are not installed.
        TypeError, ValueError: the problem is not DPP or has integer variables; parameters or variables that are
            not the problem's; a solver that does not fit.
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
        Report(on_failure)  # checks on_failure
        self.on_failure = on_failure
        self.solution: Solution | None = None
        self._program = ConvexProgram.of(problem, parameters, variables, solver, gp, adjoint, compile)

    @one_break
    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        """Solve the program and return the variables' values, `(B, *shape)` each, or `shape` without a batch.

        Args:
            values: for each parameter a tensor of its shape, or with a batch dimension in front; float32 or
                float64. Values without a batch dimension are shared by the batch: their gradients are sums over
                it. If no value has one, neither do the results.

        Raises:
            TypeError, ValueError: for values that do not fit, or violate what a parameter declares (sign, bounds,
                symmetry, definiteness, diagonal or sparse).
            SolverError: a sample has no solution and `on_failure="raise"`.
        """
        solution = self._program(values, self.on_failure)
        ends = {name: unwrapped(getattr(solution, name).detach()) for name in ("status", "residual", "steps")}
        self.solution = replace(solution, value=tuple(unwrapped(v.detach()) for v in solution.value), **ends)
        return solution.value
