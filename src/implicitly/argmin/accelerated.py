"""The accelerated proximal gradient step that `GradientDescent` and `ProjectedGradient` share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from implicitly.descent import TRIALS, bottom, inverse_norm, noise_of
from implicitly.iterate import Proposal, Residual, Status, repeat, where_rows
from implicitly.tree import row_norm

# How much longer the next step may be than the last, and how much where the last says nothing of the curvature.
GROWTH, LEAP = 1.1, 4.0

Evaluate = Callable[[Tensor], tuple[Tensor, Tensor]]


class Accelerated(NamedTuple):
    """Where momentum leads `(B, n)`, the objective `(B,)` and minus its gradient `(B, n)` there; the momentum's
    age, the step length, the least objective yet and the one below which it is unbounded, `(B,)` each."""

    y: Tensor
    value: Tensor
    r: Tensor
    age: Tensor
    step: Tensor
    least: Tensor
    lowest: Tensor

    @classmethod
    def start(cls, evaluate: Evaluate, z: Tensor, step: float | None) -> Accelerated:
        """At rest at z."""
        value, r = evaluate(z)
        length = inverse_norm(r)[:, 0] if step is None else torch.full_like(r[:, 0], step)
        return cls(z, value, r, torch.ones_like(r[:, 0]), length, value, bottom(value, z, r))


def check_step(solver: Any, step: float | None) -> None:
    """Raise ValueError unless `step` is None or a positive number."""
    if step is not None and not 0 < step < float("inf"):
        raise ValueError(f"{type(solver).__name__}: step must be a positive number or None, got {step}")


class _Trial(NamedTuple):
    step: Tensor
    z: Tensor
    value: Tensor
    r: Tensor
    curvature: Tensor
    squared: Tensor
    good: Tensor
    calls: Any


@dataclass(frozen=True)
class ProximalStep:
    """Steps down the gradient, projected, with momentum.

    Beck and Teboulle, "A fast iterative shrinkage-thresholding algorithm", SIAM J. Imaging Sci. 2 (2009), with
    steps that shrink until the quadratic model bounds the objective, and grow again; momentum is dropped where it
    leads uphill (O'Donoghue and Candes, "Adaptive restart for accelerated gradient schemes", Found. Comput. Math.
    15, 2015, the gradient scheme).

    Attributes:
        evaluate: z to the objective and minus its gradient.
        project: onto the feasible set.
        residual: from z and minus the gradient there.
        fixed: whether steps keep their length.
        momentum: whether there is any.
    """

    evaluate: Evaluate
    project: Residual
    residual: Callable[[Tensor, Tensor], Tensor]
    fixed: bool
    momentum: bool = True

    def take(self, k: int | Tensor, z: Tensor, r: Tensor, m: Accelerated) -> Proposal:
        """The step from z, whose residual is `r`: zero for samples that have finished."""
        calls = torch.ones((), dtype=torch.int64, device=z.device) if torch.compiler.is_dynamo_compiling() else 1
        trial = self._attempt(m, m.step, calls)
        if not self.fixed:
            idle = ~(m.value.isfinite() & m.r.isfinite().all(1)) | (row_norm(r) == 0)

            def halve(_: Any, t: _Trial) -> _Trial:
                return self._attempt(m, torch.where(t.good, t.step, t.step / 2), t.calls + 1)

            _, trial = repeat(halve, trial, lambda t: (~(t.good | idle)).any(), TRIALS)
        moves = torch.ones_like(trial.good) if self.fixed else trial.good
        new = where_rows(moves, trial.z, z)
        y, age = self._extrapolated(m, moves, z, new)
        # At rest y is z, so what is known there is known at z.
        value, minus_g, calls = (
            torch.where(moves, trial.value, m.value),
            where_rows(moves, trial.r, m.r),
            trial.calls,
        )
        if self.momentum:
            value, minus_g = self.evaluate(y)
            calls = calls + 1
        residual = where_rows(moves, self.residual(trial.z, trial.r), r)
        progress = moves & (trial.value < m.least)
        least = torch.where(progress, trial.value, m.least)
        memory = Accelerated(y, value, minus_g, age, self._next_step(m, trial), least, m.lowest)
        return Proposal(new, memory, residual, calls + (k == 0), None, _verdict(m, moves, trial), progress)

    def _attempt(self, m: Accelerated, step: Tensor, calls: Any) -> _Trial:
        to = self.project(torch.addcmul(m.y, step[:, None], m.r))
        value, r = self.evaluate(to)
        move = to - m.y
        squared = torch.linalg.vecdot(move, move)
        bound = m.value - torch.linalg.vecdot(m.r, move) + squared / (2 * step)
        # Where the difference drowns in rounding, which must not decide, the curvature along the move does.
        flat = (value - m.value).abs() <= noise_of(m.value)
        curvature = torch.linalg.vecdot(m.r - r, move)
        good = torch.where(flat, step * curvature <= squared, value <= bound)
        return _Trial(step, to, value, r, curvature, squared, good & value.isfinite() & r.isfinite().all(1), calls)

    def _extrapolated(self, m: Accelerated, moves: Tensor, z: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
        """Where momentum leads from `new`, and its age."""
        if not self.momentum:
            return new, m.age
        age = (1 + (1 + 4 * m.age**2).sqrt()) / 2
        uphill = torch.linalg.vecdot(m.y - new, new - z) > 0
        age = torch.where(uphill | ~moves, 1.0, age)
        share = torch.where(age > 1, (m.age - 1) / age, 0.0)
        return torch.addcmul(new, share[:, None], new - z), age

    def _next_step(self, m: Accelerated, trial: _Trial) -> Tensor:
        if self.fixed:
            return m.step
        # Far less curvature than the step allows for: it was a guess.
        guess = trial.step * LEAP * trial.curvature < trial.squared / LEAP
        return torch.where(trial.good, trial.step * torch.where(guess, LEAP, GROWTH), m.step)


def _verdict(m: Accelerated, moves: Tensor, trial: _Trial) -> Tensor:
    """How samples `(B,)` end: at rest and without a good step, or fallen too far; RUNNING: they go on."""
    status = torch.where(trial.value.isfinite(), int(Status.STAGNATED), int(Status.NON_FINITE))
    status = torch.where(moves | (m.age > 1), int(Status.RUNNING), status)
    return torch.where(moves & (trial.value < m.lowest), int(Status.UNBOUNDED), status)
