"""What solvers of quadratic programs have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch

from implicitly.argmin.programs.polish import Polished, System
from implicitly.argmin.programs.program import Point
from implicitly.checks import BELOW_ONE, check_count, check_number


@dataclass(frozen=True, kw_only=True)
class ProgramSolver(ABC):
    """Finds the solution of quadratic programs, of every sample.

    Args:
        rtol: relative tolerance of the optimality conditions; None means eps^(2/3) of the dtype (4e-11 in float64,
            2e-5 in float32).
        max_steps: iterations after which a sample ends as `Status.MAX_STEPS`.
    """

    rtol: float | None = None
    max_steps: int = 50

    # What `Report` asks: a number of steps is never all that is wanted.
    fixed_steps: ClassVar[bool] = False

    def __post_init__(self):
        if self.rtol is not None:
            check_number(type(self).__name__, "rtol", self.rtol, BELOW_ONE)
        check_count(type(self).__name__, "max_steps", self.max_steps)

    def tolerance(self, dtype: torch.dtype) -> float:
        """The relative tolerance for `dtype`; raises ValueError where the dtype cannot reach it."""
        eps = torch.finfo(dtype).eps
        if self.rtol is not None and self.rtol < 10 * eps:
            raise ValueError(
                f"{type(self).__name__}: {dtype} cannot reach rtol={self.rtol:g}; the smallest it can is "
                f"{10 * eps:.2g}. Loosen rtol, or pass a wider dtype"
            )
        return eps ** (2 / 3) if self.rtol is None else self.rtol

    @abstractmethod
    def solve(self, system: System, start: Point | None = None, compile: bool = False) -> Polished:
        """The solution of every sample of a system of finite numbers, whose Q is positive semidefinite.

        `start` is near the solution, if one is known. `compile`: as one graph of `torch.compile`; where none can
        be had, a `CompileWarning` says so.
        """

    def solve_from(self, system: System, near: Point) -> Polished:
        """As `solve`, from a point near the solution, though its active set is not that of the solution."""
        return self.solve(system)
