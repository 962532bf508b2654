"""From a point near the solution to the solution: Newton's method with the binding inequalities as equations."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from implicitly.argmin.programs.active_set import settle, signs
from implicitly.argmin.programs.condensed import Condensed, CondensedFactors
from implicitly.argmin.programs.kkt import Factors, base_matrix, jacobian_product
from implicitly.argmin.programs.program import Point, QuadraticProgram, Scaling, largest, natural_residual, times
from implicitly.host import maybe_any
from implicitly.iterate import where_rows
from implicitly.solution import Status
from implicitly.tree import row_norm

# With at most this many inequalities per unknown, it is better to solve for their multipliers (`Condensed`).
CONDENSED_UP_TO = 1.5
# Bounds further away than this times the number of unknowns, where solutions have size one, are left out at first.
DISTANT = 1e4
# Rounds in which inequalities may change sides, and Newton steps in each.
ROUNDS = 4
NEWTON_STEPS = 4


@dataclass(frozen=True, eq=False)
class System:
    """An equilibrated program, its scaling, and the part of its linear systems that stays fixed.

    The `fixed` part is a `Condensed` program where that is the better way, else a tensor, the `base_matrix`.
    """

    program: QuadraticProgram
    scaling: Scaling
    fixed: Condensed | Tensor

    @classmethod
    def of(cls, program: QuadraticProgram, scaling: Scaling) -> System:
        """The system of a program."""
        n, _, m = program.sizes
        condensed = Condensed.of(program) if m <= CONDENSED_UP_TO * n else None
        return cls(program, scaling, base_matrix(program) if condensed is None else condensed)

    @cached_property
    def sizes_of_G(self) -> Tensor:
        """The absolute values of the entries of G."""
        return self.program.G.abs()

    @property
    def condensed(self) -> Condensed | None:
        """The condensed program where that is the better way, else None."""
        return self.fixed if isinstance(self.fixed, Condensed) else None

    def plain(self) -> System:
        """The system without `condensed`."""
        return replace(self, fixed=base_matrix(self.program)) if isinstance(self.fixed, Condensed) else self

    def factorise(self, alpha: Tensor, beta: Tensor) -> Factors | CondensedFactors:
        """The factors of its Jacobian with this `alpha` and `beta`, `(B, m)`."""
        if isinstance(self.fixed, Condensed):
            return self.fixed.factorise(alpha, beta)
        return Factors.of(self.program, self.fixed, alpha, beta)

    def active(self, alpha: Tensor) -> tuple[Factors | CondensedFactors, Tensor]:
        """The factors of the Jacobian of the active set `alpha` `(B, m)`, and its exact `beta`."""
        beta = self.beta(alpha)
        return self.factorise(alpha, beta - self.away * alpha), beta

    def beta(self, alpha: Tensor) -> Tensor:
        """The beta of the Jacobian of an active set, `(B, m)`."""
        return (1 - alpha) * self.scaling.F**2

    @property
    def away(self) -> float:
        """How far the `beta` of factors is kept from zero: far enough for rounding errors to matter less.

        With the multipliers as unknowns, this can be small: 3e-13 in float64 and 3e-6 in float32, otherwise 1e-7
        and 9e-4. A larger value keeps rounding errors smaller, but the factors further from the exact Jacobian.
        """
        return torch.finfo(self.program.Q.dtype).eps ** (0.44 if self.condensed is None else 0.8)

    def with_vectors_of(self, given: QuadraticProgram) -> System:
        """The system of the `given` program with only its matrices scaled; its factors stay valid."""
        program, scaling = self.program, self.scaling
        scaled = (given.p * scaling.E, given.h * scaling.F, given.b * scaling.K)
        p, h, b = (t.expand(program.batch, -1) for t in scaled)
        return System(replace(program, p=p, h=h, b=b), replace(scaling, U=torch.ones_like(scaling.U)), self.fixed)

    def reach(self) -> tuple[Tensor, Tensor]:
        """Two estimates `(B, 1)`, made before the solve, of how far away bounds can matter for the solution.

        The first is relative to the closest bounds, which set the units. The second is relative to the distance of
        the minimum of the objective, if that is further away.
        """
        program = self.program
        steep, curved = largest(program.p.abs()), largest(program.Q.diagonal(dim1=-2, dim2=-1))
        close = torch.full_like(steep, DISTANT * program.sizes[0])
        return close, close * torch.where(curved > 0, steep / curved, 1.0).clamp(min=1.0)

    def is_between(self, close: Tensor, far: Tensor) -> Tensor:
        """Whether there are bounds further away than `close`, but no further than `far`, `(B,)`."""
        return ((self.program.h > close) & (self.program.h <= far)).any(1)

    def up_to(self, most: Tensor) -> System:
        """The system without the bounds further away than `most` `(B, 1)`, which become 0'z <= 1."""
        program, fixed = self.program, self.fixed
        kept = program.h <= most
        # On an accelerator this makes the host wait, but saves making a copy of shared matrices for every sample.
        if bool(kept.all()):
            return self
        if program.G.ndim == 2 and bool((kept == kept[:1]).all()):
            kept = kept[0]
        G, h = torch.where(kept.unsqueeze(-1), program.G, 0.0), torch.where(kept, program.h, 1.0)
        program = replace(program, G=G, h=h)
        fixed = fixed.up_to(program, kept) if isinstance(fixed, Condensed) else fixed
        return System(program, self.scaling, fixed)

    def take_rows(self, rows: Tensor) -> System:
        """The system of those samples."""
        if isinstance(self.fixed, Condensed):
            fixed = self.fixed.take_rows(rows)
        else:
            fixed = self.fixed[rows] if self.fixed.ndim == 3 else self.fixed
        return System(self.program.take_rows(rows), self.scaling.take_rows(rows), fixed)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All its tensors, from which `of_tensors` rebuilds it."""
        fixed = self.fixed.tensors if isinstance(self.fixed, Condensed) else (self.fixed,)
        return (*self.program.tensors, *self.scaling.tensors, *fixed)

    @classmethod
    def of_tensors(cls, *tensors: Tensor) -> System:
        """The system with these `tensors`."""
        program, fixed = QuadraticProgram(*tensors[:6]), tensors[10:]
        return cls(program, Scaling(*tensors[6:10]), fixed[0] if len(fixed) == 1 else Condensed(program, *fixed))

    def origin(self) -> Point:
        """The point w = 0."""
        program = self.program
        w = program.Q.new_zeros(program.batch, sum(program.sizes))
        status = torch.zeros(len(w), dtype=torch.int64, device=w.device)
        slack = w[:, : program.sizes[2]]
        return Point(w, slack, slack > 0, status, status, status.sum())


class Polished(NamedTuple):
    """The solution in equilibrated units, and what its derivative needs.

    `alpha` `(B, m)` is 1 where an inequality binds; `degenerate` `(B,)` says where the derivative is not unique.
    """

    w: Tensor
    alpha: Tensor
    factors: Factors | CondensedFactors
    degenerate: Tensor
    status: Tensor
    residual: Tensor  # in the user's units
    steps: Tensor
    evaluations: Tensor

    def factorised(self, system: System) -> Polished:
        """This solution with the kind of factors that `system` makes."""
        return self._replace(factors=system.active(self.alpha)[0])

    def with_rows(self, rows: Tensor, part: Polished, system: System) -> Polished:
        """This solution of all of `system`, with `part` in place of its `rows`."""
        if type(self.factors) is not type(part.factors):  # some samples could be solved in one of the ways only
            plain = system.plain()
            return self.factorised(plain).with_rows(rows, part.factorised(plain.take_rows(rows)), plain)
        merged = {
            name: getattr(self, name).index_copy(0, rows, getattr(part, name))
            for name in ("w", "alpha", "degenerate", "status", "residual", "steps")
        }
        factors = self.factors.with_rows(rows, part.factors)  # pyright: ignore[reportArgumentType]
        return Polished(**merged, factors=factors, evaluations=self.evaluations + part.evaluations)


class _Active(NamedTuple):
    """The point `w` `(B, N)` at which the inequalities of `alpha` hold as equations, up to rounding.

    With the factors and the exact beta of its Jacobian, and the number of rounds that led there.
    """

    w: Tensor
    alpha: Tensor
    factors: Factors | CondensedFactors
    beta: Tensor
    rounds: int

    def with_rows(self, rows: Tensor, part: _Active) -> _Active:
        factors = self.factors.with_rows(rows, part.factors)  # pyright: ignore[reportArgumentType]
        w, alpha, beta = (
            getattr(self, name).index_copy(0, rows, getattr(part, name)) for name in ("w", "alpha", "beta")
        )
        return _Active(w, alpha, factors, beta, self.rounds + part.rounds)

    def take_rows(self, rows: Tensor) -> _Active:
        parts = (self.w[rows], self.alpha[rows], self.factors.take_rows(rows), self.beta[rows])
        return _Active(*parts, self.rounds)

    def signs(self, system: System) -> tuple[Tensor, Tensor, Tensor]:
        """What must not be negative, the multipliers, and the size that counts as zero, `(B, m)` each.

        The first are the multipliers of inequalities that bind, and the slacks of the others. A multiplier is
        compared with the other multipliers, a slack with the terms of its own row, since a bound far away from the
        solution says nothing about the rest.
        """
        program, condensed = system.program, system.condensed
        n, q, _ = program.sizes
        z, lam = self.w[:, :n], self.w[:, n + q :]
        if condensed is not None:
            slack = condensed.c + times(condensed.M, lam)
            signed, small = signs(condensed.sizes, self.alpha, lam, slack)
            return signed, lam, small
        slack, binds = program.h - times(program.G, z), self.alpha > 0
        terms = torch.maximum(program.h.abs(), times(system.sizes_of_G, z.abs()))
        size = 1 + torch.where(binds, row_norm(lam).unsqueeze(1), terms)
        # As in `signs`.
        return torch.where(binds, lam, slack), lam, torch.finfo(lam.dtype).eps ** 0.6 * size


def _settle(
    system: System, alpha: Tensor, w: Tensor, patient: bool, rounds: int = ROUNDS, before: Tensor | None = None
) -> _Active:
    """Find an active set near `alpha`, starting from `w`, and its point, in a number of `rounds`.

    In each round, inequalities whose multiplier or slack turns out negative change sides. Samples in which their
    number is not below that of the round `before` `(B,)` are given up, unless `patient`: few of those ever settle.
    """
    if system.condensed is not None:
        return _settle_condensed(system, system.condensed, alpha, w, patient)
    factors, beta = system.active(alpha)
    w = newton_step(system.program, factors, beta, w)
    at = _Active(w, alpha, factors, beta, 1)
    signed, lam, small = at.signs(system)
    wrong = signed < -small
    if rounds == 1 or not maybe_any(wrong):
        return at
    count = wrong.sum(1)
    rows = ((count > 0) if patient or before is None else (count > 0) & (count < before)).nonzero()[:, 0]
    if not len(rows):
        return at
    flipped = torch.where(wrong, 1 - alpha, alpha)[rows]
    start = torch.cat([at.w[:, : at.w.shape[1] - lam.shape[1]], lam.clamp(min=0)], 1)[rows]
    return at.with_rows(rows, _settle(system.take_rows(rows), flipped, start, patient, rounds - 1, count[rows]))


def _settle_condensed(system: System, condensed: Condensed, alpha: Tensor, w: Tensor, patient: bool) -> _Active:
    """As `_settle`, with the multipliers as the only unknowns, from which the rest follows."""
    lam, away = w[:, w.shape[1] - alpha.shape[1] :], system.away
    sides, rounds = settle(condensed, alpha, lam, away, patient, ROUNDS)
    beta = system.beta(sides.alpha)
    factors = CondensedFactors(condensed, sides.alpha, beta - away * sides.alpha, sides.N, sides.usable)
    return _Active(condensed.point(sides.lam), sides.alpha, factors, beta, rounds)


def _refined(system: System, at: _Active) -> tuple[_Active, Tensor, Tensor]:
    """`at`, refined to rounding errors, with its `natural_residual`."""
    program, w = system.program, at.w
    if system.condensed is None:  # these factors are less accurate than condensed ones
        w = newton_step(program, at.factors, at.beta, w)
    error, residual = natural_residual(program, system.scaling, w)
    enough = max(50, 2 * w.shape[1]) * torch.finfo(w.dtype).eps  # the rounding error of a sum of so many terms
    wanting = ~(error <= enough)
    if maybe_any(wanting):
        rows = wanting.nonzero()[:, 0]
        parts = (t[rows] for t in (w, error, residual))
        parts = _better(system.take_rows(rows), at.take_rows(rows), enough, *parts)
        w, error, residual = (t.index_copy(0, rows, part) for t, part in zip((w, error, residual), parts))
    return at._replace(w=w), error, residual


def _better(
    system: System, at: _Active, enough: float, w: Tensor, error: Tensor, residual: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`w` after a few more Newton steps, its error and its residual."""
    for _ in range(NEWTON_STEPS):
        new = newton_step(system.program, at.factors, at.beta, w)
        left, remains = natural_residual(system.program, system.scaling, new)
        # An error that does not fall any more is down to rounding.
        going = (left > enough) & (left <= 0.5 * error)
        better = (left < error) | ~error.isfinite()
        w = where_rows(better, new, w)
        error, residual = torch.where(better, left, error), torch.where(better, remains, residual)
        if not maybe_any(going):
            break
    return w, error, residual


def polish(system: System, found: Point, tolerance: float, trusted: bool = False) -> Polished:
    """The solution near the point `found`, on its active set; samples have converged if they meet `tolerance`.

    Where the active set cannot be determined, or gives no better point, the point stays as it was found. If the
    solver says that this is a solution and is `trusted`, it counts as one, but as degenerate, since its derivative
    means little. The trusted solver is the last one to be tried, so for its points the search for an active set is
    more patient.
    """
    program = system.program
    n, q, _ = program.sizes
    # Far from a solution, the point itself says more about the active set than the last step does.
    near = (found.status == int(Status.CONVERGED)).unsqueeze(1)
    alpha = torch.where(near, found.binding, found.w[:, n + q :] > found.slack).to(found.w.dtype)
    start = found.w.nan_to_num(0.0, 0.0, 0.0)
    at, error, residual = _refined(system, _settle(system, alpha, start, trusted))
    signed, _, small = at.signs(system)
    weak = signed.abs() <= small
    # Inequalities that bind with a zero multiplier count as not binding: that only changes the derivative.
    rows = (weak & (at.alpha > 0)).any(1).nonzero()[:, 0]
    if len(rows):
        alpha = torch.where(weak, 0.0, at.alpha)[rows]
        at = at.with_rows(rows, _Active(at.w[rows], alpha, *system.take_rows(rows).active(alpha), 1))
    w = at.w
    good = error <= tolerance
    if maybe_any(~good):  # the solver's point may be better than the point of its active set
        given = found.w
        if found.in_duals and system.condensed is not None:
            given = system.condensed.point(found.w[:, n + q :])
        before, remains = natural_residual(program, system.scaling, given)
        keep = ~good & ~(error <= before) & before.isfinite()
        residual = torch.where(keep, remains, residual)
        w = torch.where(keep.unsqueeze(1), given, w)
        good = good | (keep & (before <= tolerance))
    short = torch.where(found.status == 0, int(Status.STAGNATED), found.status)
    status = torch.where(good, int(Status.CONVERGED), short)  # a solution refutes a certificate that there is none
    degenerate = weak.any(1) | at.factors.is_singular(at.beta)
    if trusted:
        untold = (found.status == int(Status.CONVERGED)) & ~good
        status, degenerate = torch.where(untold, int(Status.CONVERGED), status), degenerate | untold
    count = found.evaluations + at.rounds
    return Polished(w, at.alpha, at.factors, degenerate, status, residual, found.steps, count)


def newton_step(program: QuadraticProgram, factors: Factors | CondensedFactors, beta: Tensor, w: Tensor) -> Tensor:
    """A Newton step from `w` `(B, N)` to where the inequalities of the factors' `alpha` hold as equations."""
    right = torch.cat([-program.p, program.b, factors.alpha * program.h], 1).unsqueeze(1)
    left = right - jacobian_product(program, factors.alpha, beta, w.unsqueeze(1))
    return w + factors.solve(left).squeeze(1).nan_to_num(0.0, 0.0, 0.0)
