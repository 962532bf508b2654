"""What a solve returns: the solution, how each sample ended, and what is raised or warned of."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from torch import Tensor


class Status(IntEnum):
    """How the solve of one sample ended; `Status(int(solution.status[0])).name` is in words.

    Attributes:
        RUNNING: not finished; never returned.
        CONVERGED: met its tolerances.
        MAX_STEPS: the limit of steps was reached, or the steps that were asked for with `rtol=0` were taken.
        STAGNATED: no better residual for so many steps, or no step left that helps.
        DIVERGED: the residual grew beyond all hope.
        SINGULAR: a linear system had no solution.
        NON_FINITE: f gave NaN or inf.
        STEP_UNDERFLOW: of a trajectory: its steps became too short to go on.
        EVENT: of a trajectory: an event ended it.
        INFEASIBLE: no point satisfies the constraints.
        UNBOUNDED: the objective falls without end.
        NOT_MINIMUM: a stationary point that is no minimum.
        DEGENERATE: solved, but the derivative of the solution is not unique.
    """

    RUNNING = -1
    CONVERGED = 0
    MAX_STEPS = 1
    STAGNATED = 2
    DIVERGED = 3
    SINGULAR = 4
    NON_FINITE = 5
    STEP_UNDERFLOW = 6
    EVENT = 7
    INFEASIBLE = 8
    UNBOUNDED = 9
    NOT_MINIMUM = 10
    DEGENERATE = 11


def is_running(status: Any) -> Any:
    """Which of `(B,)` codes, a tensor or an array, are still running: the only negative one."""
    return status < 0


def is_success(status: Any) -> Any:
    """Which of `(B,)` codes, a tensor or an array, ended as they should: converged (to a solution that may have no
    unique derivative, `DEGENERATE`), or at an event."""
    good = (status == int(Status.CONVERGED)) | (status == int(Status.EVENT))
    return good | (status == int(Status.DEGENERATE))


@dataclass(frozen=True)
class Solution:
    """What a solve returns.

    Attributes:
        value: what was asked for, gradients attached; the pytree, dtype and device of `z0`.
        status: `(B,)` int64 codes of `Status`, one a sample; 0-d where the whole state is one system.
        residual: `(B,)` final residual 2-norms (of the best iterate, which is the one returned).
        steps: `(B,)` int64, iterations each sample took.
        evaluations: calls of f (for linear solves: products with the operator).
    """

    value: Any
    status: Tensor
    residual: Tensor
    steps: Tensor
    evaluations: int

    @property
    def converged(self) -> Tensor:
        """`(B,)` bool, which samples converged; of a trajectory, which reached the end or an event."""
        return is_success(self.status)


class SolverError(RuntimeError):
    """A solve failed; `error.solution` is the `Solution` it got to."""

    def __init__(self, message: str, solution: Solution):
        super().__init__(message)
        self.solution = solution

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.solution)


class ConvergenceWarning(UserWarning):
    """A solve or a backward solve fell short for some samples."""
