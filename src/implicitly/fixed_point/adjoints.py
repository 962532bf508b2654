"""Inexact derivatives of a fixed point, by differentiating a few iterations that start at the solution."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from implicitly.adjoints import Adjoint
from implicitly.checks import INTEGERS, NUMBERS, check_kind
from implicitly.condition import Condition, is_usable
from implicitly.implicit import any_ended, arrive, constant, find, without_failed
from implicitly.iterate import Found, Solver, where_rows
from implicitly.problem import Problem
from implicitly.transforms import is_cpu, is_recorded, unwrapped


def _needs_iterations(adjoint: Adjoint, iterates: bool) -> None:
    if not iterates:
        raise ValueError(
            f"{type(adjoint).__name__} differentiates iterations z = f(z), which a root does not have; use "
            "ImplicitAdjoint, or state the problem as a fixed point"
        )


@dataclass(frozen=True)
class PhantomAdjoint(Adjoint):
    """The phantom gradient, which is inexact: it goes through `steps` damped iterations of f from the solution.

    It is biased but cheap, with the memory of `steps` calls of f. If the solver takes a fixed number of steps
    (`rtol=0`), its last call of f is the first of these iterations, on a CPU and without `compile`; otherwise they
    are additional calls, which `Solution.evaluations` does not count. Geng et al., "On Training Implicit Models",
    NeurIPS 2021.

    Args:
        steps: number of iterations, at least 1.
        damping: each iteration is z <- (1 - damping) z + damping f(z); in (0, 1].

    Raises:
        TypeError, ValueError: for invalid options; ValueError from a solve with `root`, which has no iterations.
    """

    steps: int = 5
    damping: float = 1.0

    def __post_init__(self):
        check_kind("PhantomAdjoint", "steps", self.steps, INTEGERS, "an int, got {value!r}")
        check_kind("PhantomAdjoint", "damping", self.damping, NUMBERS, "a number, got {value!r}")
        if self.steps < 1 or not 0 < self.damping <= 1:
            raise ValueError(
                f"PhantomAdjoint: steps must be at least 1 and damping in (0, 1], got {self.steps}, {self.damping}"
            )

    def check(self, solver: Solver, dtype: torch.dtype, iterates: bool) -> None:
        """Raise ValueError for a root."""
        _needs_iterations(self, iterates)

    def find(self, solver: Solver, condition: Condition, problem: Problem) -> Found:
        """The solver's result, with the derivative of the iterations that follow it."""
        theta, r = problem.theta, None
        wanted = any(is_recorded(t) for t in theta)
        if wanted and condition.graphs is None:
            found = find(solver, condition, problem.z0, theta, problem.r0, leave_last=True)
        else:
            found = super().find(solver, condition, problem)
        if found.ahead:  # f is recorded at the last iterate anyway, and that call also shows how the solve ended
            r = condition.residual(*found.ahead, *theta)
            found = arrive(found, r, solver, condition, theta)
        return found._replace(z=self._followed(found, r, condition, theta)) if wanted else found

    def _followed(self, found: Found, r: Tensor | None, condition: Condition, theta: tuple[Tensor, ...]) -> Tensor:
        """The found point `(B, n)` with its derivative; `r` is the residual there, if it has been recorded."""
        usable, z = is_usable(found.status), found.z.detach()
        while any_ended(found, usable):
            failed = any_ended(found, ~usable)
            start, kept = without_failed(usable, z, theta, condition) if failed else (z, theta)
            iterate, residual = start, condition.at(*kept)
            for k in range(self.steps):
                step = residual(iterate) if k or failed or r is None else r
                moved = torch.add(iterate, step, alpha=self.damping)
                # Failed samples stay where they are, since iterations from there may lead to NaN.
                iterate = where_rows(usable, moved, start) if failed else moved
            # Iterations may also reach NaN from samples that fell short; then repeat without those samples.
            arrived = iterate.detach().isfinite().all(1)
            if not _sees_any(usable & ~arrived, found):
                # The value stays the solution; only the derivative is that of the iterations.
                derivative = iterate - iterate.detach()
                return z + (torch.where(usable[:, None], derivative, 0.0) if failed else derivative)
            usable = usable & arrived
        return constant(z, theta)

    def attach(self, found: Found, condition: Condition, problem: Problem) -> Tensor:
        """The found point, which already has its derivative."""
        return found.z


def _sees_any(mask: Tensor, found: Found) -> bool:
    """Whether any entry of `mask` `(B,)` is true; on an accelerator, checked only if the host waited before."""
    if torch.compiler.is_dynamo_compiling():
        return False
    mask = unwrapped(mask)
    return (found.looked_at or is_cpu(mask)) and bool(mask.any())


@dataclass(frozen=True)
class JacobianFreeAdjoint(Adjoint):
    """The Jacobian-free gradient, which is inexact: it goes through one iteration of f, as if (I - J)^-1 were I.

    It is `PhantomAdjoint(steps=1)`, whose call of f may be the solver's last.
    Fung et al., "JFB: Jacobian-Free Backpropagation for Implicit Networks", AAAI 2022.

    Raises:
        ValueError: from a solve with `root`, which has no iterations.
    """

    def check(self, solver: Solver, dtype: torch.dtype, iterates: bool) -> None:
        """Raise ValueError for a root."""
        _needs_iterations(self, iterates)

    def find(self, solver: Solver, condition: Condition, problem: Problem) -> Found:
        """The solver's result, with the derivative of one iteration."""
        return PhantomAdjoint(steps=1).find(solver, condition, problem)

    def attach(self, found: Found, condition: Condition, problem: Problem) -> Tensor:
        """The found point, which already has its derivative."""
        return found.z
