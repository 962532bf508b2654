"""Inexact derivatives of a fixed point, which differentiate iterations from the solution."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from implicitly.adjoints import Adjoint
from implicitly.host import happens
from implicitly.implicit import Condition, constant, is_usable, without_failed
from implicitly.iterate import Found, Solver
from implicitly.problem import Problem


def _needs_iterations(adjoint: Adjoint, iterates: bool) -> None:
    if not iterates:
        raise ValueError(
            f"{type(adjoint).__name__} differentiates iterations z = f(z), and a root has none; use "
            "ImplicitAdjoint, or state the problem as a fixed point"
        )


@dataclass(frozen=True)
class PhantomAdjoint(Adjoint):
    """An inexact gradient: through `steps` damped iterations of f from the solution.

    Biased but cheap, with memory of `steps` calls of f. Geng et al., "On Training Implicit Models", NeurIPS 2021.
    """

    steps: int = 5
    damping: float = 1.0

    def __post_init__(self):
        if self.steps < 1 or not 0 < self.damping <= 1:
            raise ValueError(f"PhantomAdjoint: steps >= 1 and 0 < damping <= 1, got {self.steps}, {self.damping}")

    def check(self, solver: Solver, dtype: torch.dtype, iterates: bool) -> None:
        """Raise ValueError for a root."""
        _needs_iterations(self, iterates)

    def attach(self, found: Found, condition: Condition, problem: Problem) -> Tensor:
        """The found point, with the derivative of the iterations that would follow."""
        usable = is_usable(found.status)
        z, theta = found.z.detach(), problem.theta
        if not happens(usable):
            return constant(z, theta)
        if happens(~usable):
            z, theta = without_failed(usable, z, theta, condition)
        iterate = z
        residual = condition.at(*theta)
        for _ in range(self.steps):
            iterate = torch.add(iterate, residual(iterate), alpha=self.damping)
        # The value stays the solution; only the derivative is that of the iterations.
        derivative = torch.where(usable[:, None], iterate - iterate.detach(), 0.0)
        return found.z.detach() + derivative


@dataclass(frozen=True)
class JacobianFreeAdjoint(Adjoint):
    """An inexact gradient: through one iteration of f, as if (I - J)^-1 were I.

    Fung et al., "JFB: Jacobian-Free Backpropagation for Implicit Networks", AAAI 2022.
    """

    def check(self, solver: Solver, dtype: torch.dtype, iterates: bool) -> None:
        """Raise ValueError for a root."""
        _needs_iterations(self, iterates)

    def attach(self, found: Found, condition: Condition, problem: Problem) -> Tensor:
        """The found point, with the derivative of one iteration."""
        return PhantomAdjoint(steps=1).attach(found, condition, problem)
