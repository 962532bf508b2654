"""`ProgramSolver`, the base class of the solvers of quadratic programs."""

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
    """Base class of the solvers of batches of quadratic programs.

    Args:
        rtol: relative tolerance of the optimality conditions; None means eps^(2/3) of the dtype (4e-11 in float64,
            2e-5 in float32).
        max_steps: number of iterations after which a sample ends as `Status.MAX_STEPS`.
    """

    rtol: float | None = None
    max_steps: int = 50

    # For `Report`: these solvers are never asked for a fixed number of steps alone, and messages name its class.
    fixed_steps: ClassVar[bool] = False
    label: ClassVar[str | None] = None

    def __post_init__(self):
        if self.rtol is not None:
            check_number(type(self).__name__, "rtol", self.rtol, BELOW_ONE)
        check_count(type(self).__name__, "max_steps", self.max_steps)

    def tolerance(self, dtype: torch.dtype) -> float:
        """The relative tolerance for `dtype`; raises ValueError if the dtype cannot reach it."""
        eps = torch.finfo(dtype).eps
        if self.rtol is not None and self.rtol < 10 * eps:
            raise ValueError(
                f"{type(self).__name__}: {dtype} cannot reach rtol={self.rtol:g}; the smallest it can is "
                f"{10 * eps:.2g}. Loosen rtol, or pass a wider dtype"
            )
        return eps ** (2 / 3) if self.rtol is None else self.rtol

    @abstractmethod
    def solve(self, system: System, start: Point | None = None, compile: bool = False) -> Polished:
        """The solution of every sample of a system with finite numbers and a positive semidefinite Q.

        `start` is a point near the solution, if one is known. With `compile` it runs as one graph of
        `torch.compile`; where that is not possible, a `CompileWarning` says so.
        """

    def solve_from(self, system: System, near: Point) -> Polished:
        """As `solve`, from a point that is near the solution, but has another active set."""
        return self.solve(system)
