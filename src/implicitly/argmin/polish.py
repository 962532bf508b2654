"""From a point near the solution to the solution: Newton's method with the inequalities that bind as equations."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from implicitly.argmin.condensed import Condensed, CondensedFactors
from implicitly.argmin.kkt import Factors, base_matrix, is_singular, jacobian_product
from implicitly.argmin.program import Point, QuadraticProgram, Scaling, natural_residual, times
from implicitly.host import happens
from implicitly.iterate import Status
from implicitly.tree import row_norm

# With up to so many inequalities for each unknown they are better made the unknowns.
CONDENSED_UP_TO = 1.5
# Rounds in which inequalities may change sides, and Newton steps in each.
ROUNDS = 4
NEWTON_STEPS = 4


@dataclass(frozen=True, eq=False)
class System:
    """An equilibrated program, its scaling, and what of its linear systems stays the same."""

    program: QuadraticProgram
    scaling: Scaling
    condensed: Condensed | None  # where that is the better way

    @classmethod
    def of(cls, program: QuadraticProgram, scaling: Scaling) -> System:
        """That of a program."""
        n, _, m = program.sizes
        return cls(program, scaling, Condensed.of(program) if m <= CONDENSED_UP_TO * n else None)

    @functools.cached_property
    def base(self) -> Tensor:
        """What of the matrix H of `Factors` stays the same."""
        return base_matrix(self.program)

    def factorise(self, alpha: Tensor, beta: Tensor) -> Factors | CondensedFactors:
        """The factors of its Jacobian with those `(B, m)`."""
        if self.condensed is not None:
            return self.condensed.factorise(alpha, beta)
        return Factors.of(self.program, self.base, alpha, beta)

    def active(self, alpha: Tensor) -> tuple[Factors | CondensedFactors, Tensor]:
        """The factors of the Jacobian of an active set, and its exact `beta`."""
        beta = (1 - alpha) * self.scaling.F**2
        away = 8 * torch.finfo(alpha.dtype).eps ** 0.5
        return self.factorise(alpha, beta - away * alpha), beta

    def take_rows(self, rows: Tensor) -> System:
        """The system of some samples."""
        condensed = None if self.condensed is None else self.condensed.take_rows(rows)
        return System(self.program.take_rows(rows), self.scaling.take_rows(rows), condensed)

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
    factors: Factors | CondensedFactors
    degenerate: Tensor
    status: Tensor
    steps: Tensor
    evaluations: Tensor

    def factorised(self, system: System) -> Polished:
        """This with factors as `system` makes them."""
        return self._replace(factors=system.active(self.alpha)[0])

    def with_rows(self, rows: Tensor, part: Polished) -> Polished:
        """This with `part` in place of its `rows`; the factors of both are of the same kind, `Factors`."""
        assert isinstance(self.factors, Factors) and isinstance(part.factors, Factors)  # noqa: PT018
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
    w = found.w
    alpha = (w[:, n + q :] > found.slack).to(dtype)
    for rounds in range(1, ROUNDS + 1):
        factors, beta = system.active(alpha)
        w = torch.where(w.isfinite().all(1, keepdim=True), w, 0.0)
        w = newton_step(program, factors, beta, w)
        lam, slack = w[:, n + q :], program.h - times(program.G, w[:, :n])
        size = 1 + torch.maximum(row_norm(lam), row_norm(slack)).unsqueeze(1)
        wrong = torch.where(alpha > 0, lam, slack) < -small * size
        if rounds == ROUNDS or not happens(wrong):
            break
        alpha = torch.where(wrong, 1 - alpha, alpha)
        w = torch.cat([w[:, : n + q], lam.clamp(min=0)], 1)
    # The weakest of those that bind might as well not: their multipliers are zero, so nothing else changes.
    weak = torch.where(alpha > 0, lam, slack).abs() <= small * size
    if happens(weak & (alpha > 0)):
        alpha = torch.where(weak, 0.0, alpha)
        factors, beta = system.active(alpha)
        rounds += 1
    for _ in range(NEWTON_STEPS):
        w = newton_step(program, factors, beta, w)
        residual, size = natural_residual(program, w)
        good = residual <= 1e-3 * tolerance * size
        if not happens(~good):
            break
    good = residual <= tolerance * size
    if happens(~good):  # what the solver found may be better than what its active set leads to
        before, size = natural_residual(program, found.w)
        keep = ~(residual <= before) & before.isfinite()
        w = torch.where(keep.unsqueeze(1), found.w, w)
        good = good | (keep & (before <= tolerance * size))
    none = found.status >= int(Status.INFEASIBLE)
    short = torch.where(found.status == 0, int(Status.STAGNATED), found.status)
    status = torch.where(good & ~none, int(Status.CONVERGED), short)
    degenerate = weak.any(1) | is_singular(factors, beta)
    return Polished(w, alpha, factors, degenerate, status, found.steps, found.evaluations + rounds)


def newton_step(program: QuadraticProgram, factors: Factors | CondensedFactors, beta: Tensor, w: Tensor) -> Tensor:
    """`w` `(B, N)` nearer to where the inequalities of the factors' `alpha` hold as equations."""
    right = torch.cat([-program.p, program.b, factors.alpha * program.h], 1).unsqueeze(1)
    left = right - jacobian_product(program, factors.alpha, beta, w.unsqueeze(1))
    return w + factors.solve(left).squeeze(1).nan_to_num(0.0, 0.0, 0.0)
