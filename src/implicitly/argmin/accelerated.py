"""The accelerated proximal gradient step that `GradientDescent` and `ProjectedGradient` share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from implicitly.descent import TRIALS, bottom, inverse_norm, is_bottomless, noise_of
from implicitly.iterate import PATIENCE, Proposal, Residual, repeat, where_rows
from implicitly.solution import Status
from implicitly.tree import row_norm

# By which factor a step may grow, in general, and where the last step was far from the limit set by the curvature.
GROWTH, LEAP = 1.1, 4.0

Evaluate = Callable[[Tensor], tuple[Tensor, Tensor]]


class Accelerated(NamedTuple):
    """The memory of accelerated steps.

    The extrapolated point `(B, n)`, the objective `(B,)` and minus its gradient `(B, n)` there; the momentum's
    age, the step size, the first objective, the least objective and residual norm so far and the number of steps
    that led there, `(B,)` each; the objective's `bottom`.
    """

    y: Tensor
    value: Tensor
    r: Tensor
    age: Tensor
    step: Tensor
    first: Tensor
    least: Tensor
    closest: Tensor
    last: Tensor
    lowest: Tensor

    @classmethod
    def start(cls, evaluate: Evaluate, z: Tensor, step: float | None) -> Accelerated:
        """The memory at z, without momentum."""
        value, r = evaluate(z)
        one = torch.ones_like(value, dtype=r.dtype)
        length = step * one if step is not None else inverse_norm(r)[:, 0]
        none = torch.zeros_like(one, dtype=torch.int64)
        return cls(z, value, r, one, length, value, value, one + float("inf"), none, bottom(value, z, r))


def check_step(solver: Any, step: Any) -> None:
    """Raise TypeError / ValueError unless `step` is None or a positive number."""
    if step is not None and (isinstance(step, bool) or not isinstance(step, int | float)):
        raise TypeError(f"{type(solver).__name__}: step must be a positive number or None, got {step!r}")
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
    """Projected gradient steps with momentum (FISTA).

    Beck and Teboulle, "A fast iterative shrinkage-thresholding algorithm", SIAM J. Imaging Sci. 2 (2009). The step
    size shrinks until the quadratic model bounds the objective, and grows again afterwards. Momentum is reset
    where it leads uphill (O'Donoghue and Candes, "Adaptive restart for accelerated gradient schemes", Found.
    Comput. Math. 15, 2015, the gradient scheme).

    Attributes:
        evaluate: maps z to the objective and minus its gradient.
        project: the projection onto the feasible set.
        residual: maps z and minus the gradient there to the residual.
        fixed: whether the step size is fixed.
        momentum: whether to use momentum.
    """

    evaluate: Evaluate
    project: Residual
    residual: Callable[[Tensor, Tensor], Tensor]
    fixed: bool
    momentum: bool = True

    def take(self, k: int | Tensor, z: Tensor, r: Tensor, m: Accelerated) -> Proposal:
        """The step from z, whose residual `r` is zero for samples that have finished."""
        calls = torch.ones((), dtype=torch.int64, device=z.device) if torch.compiler.is_dynamo_compiling() else 1
        trial = self._attempt(m, m.step, calls)
        idle = ~(m.value.isfinite() & m.r.isfinite().all(1)) | (row_norm(r) == 0)
        if not self.fixed:

            def halve(_: Any, t: _Trial) -> _Trial:
                return self._attempt(m, torch.where(t.good, t.step, t.step / 2), t.calls + 1)

            _, trial = repeat(halve, trial, lambda t: (~(t.good | idle)).any(), TRIALS)
        moves = torch.ones_like(trial.good) if self.fixed else trial.good
        new = where_rows(moves, trial.z, z)
        y, age = self._extrapolated(m, moves, z, new)
        # Without momentum y is z, so the values at y are those at z.
        value, minus_g, calls = (
            torch.where(moves, trial.value, m.value),
            where_rows(moves, trial.r, m.r),
            trial.calls,
        )
        if self.momentum:
            value, minus_g = self.evaluate(y)
            calls = calls + 1
        residual = where_rows(moves, self.residual(trial.z, trial.r), r)
        memory, progress = _best(m, k, moves, trial, row_norm(residual))
        memory = memory._replace(y=y, value=value, r=minus_g, age=age, step=self._next_step(m, trial))
        return Proposal(new, memory, residual, calls + (k == 0), None, _verdict(m, moves, idle, trial), progress)

    def _attempt(self, m: Accelerated, step: Tensor, calls: Any) -> _Trial:
        to = self.project(torch.addcmul(m.y, step[:, None], m.r))
        value, r = self.evaluate(to)
        move = to - m.y
        squared = torch.linalg.vecdot(move, move)
        bound = m.value - torch.linalg.vecdot(m.r, move) + squared / (2 * step)
        # Where rounding errors hide the difference of the objectives, the curvature along the move decides.
        flat = (value - m.value).abs() <= noise_of(m.value)
        curvature = torch.linalg.vecdot(m.r - r, move)
        good = torch.where(flat, step * curvature <= squared, value <= bound)
        return _Trial(step, to, value, r, curvature, squared, good & value.isfinite() & r.isfinite().all(1), calls)

    def _extrapolated(self, m: Accelerated, moves: Tensor, z: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
        """The point extrapolated from `new` by momentum, and the momentum's age."""
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
        # The curvature is far less than the step allows for: the step was only a guess.
        guess = trial.step * LEAP * trial.curvature < trial.squared / LEAP
        longer = torch.where(guess, LEAP * trial.step, GROWTH * trial.step)
        # Without momentum the search for a step goes on where it stopped. With momentum, the extrapolated point
        # was too far; that says nothing about the step from another point.
        return torch.where(trial.good, longer, torch.where(m.age > 1, m.step, trial.step))


def _best(
    m: Accelerated, k: int | Tensor, moves: Tensor, trial: _Trial, norm: Tensor
) -> tuple[Accelerated, Tensor]:
    """The best objective and residual so far, after step `k` with residual `norm` `(B,)`; which samples progress.

    Momentum makes the iterates swing through the valley: in passing they may come closer to the minimum, with a
    smaller residual, than in many steps that follow. A swing takes about as many steps as all before it, so a
    sample may go on for as many steps again without a new best point; unless the objective is above its first
    value, which no descending sequence exceeds.
    """
    better = moves & ((trial.value < m.least) | (norm < m.closest))
    last = torch.where(better, k + 1, m.last)
    below = ~moves | (trial.value <= m.first + noise_of(m.first))
    least = torch.where(better, torch.minimum(trial.value, m.least), m.least)
    closest = torch.where(better, torch.minimum(norm, m.closest), m.closest)
    memory = m._replace(least=least, closest=closest, last=last)
    return memory, better | (below & (k < last + last.clamp(min=PATIENCE)))


def _verdict(m: Accelerated, moves: Tensor, idle: Tensor, trial: _Trial) -> Tensor:
    """How samples end, `(B,)`: without a good step and at rest, or falling for ever; RUNNING if they go on."""
    # Steps may be halved until they no longer change z.
    nowhere = ~(trial.squared > (torch.finfo(trial.z.dtype).eps * row_norm(m.y)) ** 2)
    status = torch.where(trial.value.isfinite(), int(Status.STAGNATED), int(Status.NON_FINITE))
    status = torch.where(~moves & (m.age == 1) & (idle | nowhere), status, int(Status.RUNNING))
    return torch.where(moves & is_bottomless(trial.value, trial.z, m.lowest), int(Status.UNBOUNDED), status)
