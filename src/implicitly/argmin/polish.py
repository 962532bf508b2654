"""From a point near the solution to the solution: Newton's method with the inequalities that bind as equations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from implicitly.argmin.kkt import Factors, base_matrix, is_singular, jacobian_product
from implicitly.argmin.program import Point, QuadraticProgram, Scaling, natural_residual, times
from implicitly.host import happens
from implicitly.iterate import Status
from implicitly.tree import row_norm

# Rounds in which inequalities may change sides, and Newton steps in each.
ROUNDS = 4
NEWTON_STEPS = 4


@dataclass(frozen=True, eq=False)
class System:
    """An equilibrated program, its scaling, and what of its linear systems stays the same."""

    program: QuadraticProgram
    scaling: Scaling
    base: Tensor

    @classmethod
    def of(cls, program: QuadraticProgram, scaling: Scaling) -> System:
        """That of a program."""
        return cls(program, scaling, base_matrix(program))

    def factorise(self, alpha: Tensor, beta: Tensor) -> Factors:
        """The factors of its Jacobian with those `(B, m)`."""
        return Factors.of(self.program, self.base, alpha, beta)

    def take_rows(self, rows: Tensor) -> System:
        """The system of some samples."""
        base = self.base if self.base.ndim == 2 else self.base[rows]
        return System(self.program.take_rows(rows), self.scaling.take_rows(rows), base)

    def origin(self) -> Point:
        """w = 0."""
        program = self.program
        w = program.Q.new_zeros(program.batch, sum(program.sizes))
        status = torch.zeros(len(w), dtype=torch.int64, device=w.device)
        slack = w[:, : program.sizes[2]]
        return Point(w, slack, status, status, status.sum())


class Polished(NamedTuple):
    """The solution in equilibrated units, and what its derivative needs.

    `alpha` `(B, m)` is 1 where an inequality binds; `degenerate` `(B,)` tells where the derivative is not unique.
    """

    w: Tensor
    alpha: Tensor
    factors: Factors
    degenerate: Tensor
    status: Tensor
    steps: Tensor
    evaluations: Tensor

    def with_rows(self, rows: Tensor, part: Polished) -> Polished:
        """This with `part` in place of its `rows`."""
        merged = {
            name: getattr(self, name).index_copy(0, rows, getattr(part, name))
            for name in ("w", "alpha", "degenerate", "status", "steps")
        }
        factors = self.factors.with_rows(rows, part.factors)
        return Polished(**merged, factors=factors, evaluations=self.evaluations + part.evaluations)


def polish(system: System, found: Point, tolerance: float) -> Polished:
    """The solution near what was `found`; a sample has converged if its residual then meets `tolerance`.

    Where the active set cannot be told, or gives no better point, the point stays as it was found.
    """
    program = system.program
    n, q, _ = program.sizes
    dtype = found.w.dtype
    small = torch.finfo(dtype).eps ** 0.6
    w, residual = found.w, torch.full_like(found.w[:, 0], float("inf"))
    alpha = (w[:, n + q :] > found.slack).to(dtype)
    size = torch.ones_like(residual)
    evaluations = found.evaluations
    while True:
        factors, beta = _factorise(system, alpha)
        w = torch.where(w.isfinite().all(1, keepdim=True), w, 0.0)
        w, residual, size = _newton(system, factors, beta, w, tolerance)
        evaluations = evaluations + 1
        rounds = evaluations - found.evaluations
        lam, slack = w[:, n + q :], program.h - times(program.G, w[:, :n])
        wrong = torch.where(alpha > 0, lam, slack) < -small * size.unsqueeze(1)
        if int(rounds) >= ROUNDS or not happens(wrong):
            break
        alpha = torch.where(wrong, 1 - alpha, alpha)
        w = torch.cat([w[:, : n + q], lam.clamp(min=0)], 1)
    # The weakest of those that bind might as well not: their multipliers are zero, so nothing else changes.
    weak = torch.where(alpha > 0, lam, slack).abs() <= small * size.unsqueeze(1)
    if happens(weak & (alpha > 0)):
        alpha = torch.where(weak, 0.0, alpha)
        factors, beta = _factorise(system, alpha)
        evaluations = evaluations + 1
    degenerate = weak.any(1) | is_singular(factors, beta)
    good = residual <= tolerance * size
    # What the solver found may be better than what its active set leads to.
    before, size = natural_residual(program, found.w)
    keep = ~(residual <= before) & before.isfinite()
    w = torch.where(keep.unsqueeze(1), found.w, w)
    good = good | (keep & (before <= tolerance * size))
    failed = found.status >= int(Status.INFEASIBLE)
    status = torch.where(good, int(Status.CONVERGED), found.status)
    status = torch.where(~good & ~failed & (found.status == 0), int(Status.STAGNATED), status)
    return Polished(w, alpha, factors, degenerate, status, found.steps, evaluations)


def _factorise(system: System, alpha: Tensor) -> tuple[Factors, Tensor]:
    """The factors of the Jacobian of an active set, and its exact `beta`."""
    beta = (1 - alpha) * system.scaling.F**2
    away = 8 * torch.finfo(alpha.dtype).eps ** 0.5
    return system.factorise(alpha, beta - away * alpha), beta


def _newton(
    system: System, factors: Factors, beta: Tensor, w: Tensor, tolerance: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The point where the inequalities of the factors' `alpha` hold as equations, its residual and its size."""
    program, alpha = system.program, factors.alpha
    right = torch.cat([-program.p, program.b, alpha * program.h], 1)
    for _ in range(NEWTON_STEPS):
        left = right - jacobian_product(program, alpha, beta, w.unsqueeze(1)).squeeze(1)
        step = factors.solve(left.unsqueeze(1)).squeeze(1)
        w = w + step.nan_to_num(0.0, 0.0, 0.0)
        if not happens(row_norm(step) > 1e3 * tolerance**1.5 * row_norm(w)):
            break
    return w, *natural_residual(program, w)
