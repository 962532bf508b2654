"""The result of a solve: the solution, the status of each sample, and the error and warning classes."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from torch import Tensor


class Status(IntEnum):
    """How the solve of one sample ended; `Status(int(solution.status[0])).name` gives it in words.

    Attributes:
        RUNNING: not finished; never returned.
        CONVERGED: met its tolerances.
        MAX_STEPS: reached the limit of steps, or took the number of steps that `rtol=0` asks for.
        STAGNATED: no better residual for many steps in a row, or no step left that improves it.
        DIVERGED: the residual grew far beyond its first value.
        SINGULAR: a linear system had no solution.
        NON_FINITE: f gave NaN or inf.
        STEP_UNDERFLOW: the steps of a trajectory became too short to go on.
        EVENT: an event ended the trajectory.
        INFEASIBLE: no point satisfies the constraints.
        UNBOUNDED: the objective is unbounded below.
        NOT_MINIMUM: a stationary point that is not a minimum.
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
    """Which samples are still running, from their codes `(B,)` (tensor or array); only RUNNING is negative."""
    return status < 0


def is_success(status: Any) -> Any:
    """Which samples ended as they should, from their codes `(B,)` (tensor or array).

    They converged (`DEGENERATE`: to a solution whose derivative is not unique), or ended at an event.
    """
    good = (status == int(Status.CONVERGED)) | (status == int(Status.EVENT))
    return good | (status == int(Status.DEGENERATE))


@dataclass(frozen=True)
class Solution:
    """The result of a solve.

    Attributes:
        value: the solution, with gradients attached; the pytree, dtype and device are those of `z0`.
        status: `(B,)` int64 codes of `Status`, one per sample; 0-d where the whole state is one system.
        residual: `(B,)` final residual 2-norms (of the best iterate, which is the one returned).
        steps: `(B,)` int64, the number of iterations of each sample.
        evaluations: number of calls of f (for linear solves, of products with the operator).
    """

    value: Any
    status: Tensor
    residual: Tensor
    steps: Tensor
    evaluations: int

    @property
    def converged(self) -> Tensor:
        """`(B,)` bool: which samples converged or, for a trajectory, reached the end or an event."""
        return is_success(self.status)


class SolverError(RuntimeError):
    """A solve failed; `error.solution` is the `Solution` it had reached."""

    def __init__(self, message: str, solution: Solution):
        super().__init__(message)
        self.solution = solution

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.solution)


class ConvergenceWarning(UserWarning):
    """A solve or a backward solve fell short for some samples.

    By default each line of a program shows it once for each `kind` of failure (the solver with its tolerances, and
    the gravest status), with the numbers of the first such failure. `warnings.simplefilter("always",
    im.ConvergenceWarning)` shows all of them.
    """

    def __init__(self, message: str, kind: Hashable = None):
        super().__init__(message)
        self.kind = kind

    def __str__(self) -> str:
        return super().__str__() if self.kind is None else _OfAKind(super().__str__(), self.kind)


class _OfAKind(str):
    """The text of a warning that equals all others of its kind, whatever numbers they hold.

    Python's default filter shows a text once for each line, so that it then shows a kind once.
    """

    __slots__ = ("kind",)

    def __new__(cls, text: str, kind: Hashable) -> _OfAKind:
        self = super().__new__(cls, text)
        self.kind = kind
        return self

    def __eq__(self, other: object) -> bool:
        return self.kind == other.kind if isinstance(other, _OfAKind) else super().__eq__(other)

    def __ne__(self, other: object) -> bool:  # str has one of its own
        return not self == other

    def __hash__(self) -> int:
        return hash(self.kind)
