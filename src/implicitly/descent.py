"""What solvers that descend an objective share: access to the objective, and a line search on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from implicitly.iterate import Residual, repeat
from implicitly.pullback import pullback
from implicitly.solution import Status, is_running
from implicitly.transforms import is_plain
from implicitly.tree import row_norm

# How many lengths a line search tries at most, and after how many of them secants are taken to mislead.
TRIALS, SECANTS = 25, 5
# Wolfe's conditions: the objective falls by at least the first share of what the slope promises, and the slope
# shrinks to at most the second share.
DECREASE, FLATTENING = 1e-4, 0.9
# Relative changes of an objective below this may be rounding: only slopes tell whether it falls (Hager and Zhang
# 2005).
NOISE = 1e-6
# An objective counts as unbounded if it fell by BOTTOMLESS times its size at the start (of its value, slope and
# argument), and its argument grew RUNAWAY times: after a flat start a fall alone says little, unless ABYSMAL.
BOTTOMLESS, RUNAWAY, ABYSMAL = 1e8, 1e12, 1e32


@dataclass(frozen=True)
class Descent:
    """The residual R(z) = -(gradient of an objective), together with the objective itself.

    Attributes:
        residual: maps z `(B, n)` to R(z).
        evaluate: maps z to the objective `(B,)`, in the dtype the user computes it in, and R(z), in one call.
        residuals: maps z to the vectors `(B, m)` whose half squared norm is the objective, if it has that form.
    """

    residual: Residual
    evaluate: Callable[[Tensor], tuple[Tensor, Tensor]]
    residuals: Callable[[Tensor], Tensor] | None = None

    def __call__(self, z: Tensor) -> Tensor:
        """R at `z` `(B, n)`: NaN where the objective is not finite, whatever its gradient."""
        value, r = self.evaluate(z)
        return within_domain(value, r)


def value_and_descent(
    objective: Callable[[Tensor], Tensor], z: Tensor, theta: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """The `objective`, one value per row of `z`, and minus its gradient; `theta` is what else it depends on."""
    if torch.compiler.is_dynamo_compiling() or not is_plain(z, *theta):
        value, pull = pullback(objective, z)
        return value, -pull(torch.ones_like(value))[0]
    # Nobody differentiates the result, and autograd takes a third of the time of torch.func.
    leaf = z.detach().requires_grad_()
    with torch.enable_grad():
        value = objective(leaf)
    if not value.requires_grad:
        return value, torch.zeros_like(z)
    return value.detach(), -torch.autograd.grad(value, leaf, torch.ones_like(value), materialize_grads=True)[0]


def within_domain(value: Tensor, r: Tensor) -> Tensor:
    """The residual `r` `(B, n)`, which is NaN where the objective `value` `(B,)` is not finite.

    The formula of a gradient may give numbers outside the domain of its objective, as 1 / z does outside that of
    log z.
    """
    value = value.detach()
    return r + (value - value).to(r.dtype).unsqueeze(1)


def noise_of(value: Tensor) -> Tensor:
    """Roughly how far rounding may move the objectives `value` `(B,)`."""
    return max(NOISE, 10 * torch.finfo(value.dtype).eps) * value.abs()


def bottom(value: Tensor, z: Tensor, r: Tensor) -> Tensor:
    """Thresholds that no bounded objective passes if it starts with `value` and residual `r` at `z`, `(B, 2)`.

    The objective below which, and the distance beyond which it counts as unbounded; see `is_bottomless`.
    """
    reach = 1 + row_norm(z)
    lowest = value - BOTTOMLESS * (value.abs() + row_norm(r) * reach)
    return torch.stack([lowest, (RUNAWAY * reach).to(lowest.dtype)], 1)


def is_bottomless(value: Tensor, z: Tensor, lowest: Tensor) -> Tensor:
    """Whether the objective, with `value` `(B,)` at `z`, is unbounded below; `lowest` is what `bottom` gave."""
    fallen, far = value < lowest[:, 0], row_norm(z) > lowest[:, 1]
    # Some overflow long before their argument is far away, as -exp z does.
    return (fallen & far) | (value < ABYSMAL / BOTTOMLESS * lowest[:, 0])


class Moved(NamedTuple):
    """Where a line search led.

    The iterate, its objective and residual, the lengths `(B, 1)`, 0 where no step was good enough, the number of
    evaluations, and the `Status` of samples that cannot go on.
    """

    z: Tensor
    value: Tensor
    r: Tensor
    length: Tensor
    calls: Any
    verdict: Tensor


class _Bracket(NamedTuple):
    """The lengths `(B,)` tried last and what was found there; a good length lies between `low` and `high`."""

    length: Tensor
    value: Tensor
    r: Tensor
    slope: Tensor
    low: Tensor
    low_value: Tensor
    low_r: Tensor
    low_slope: Tensor
    high: Tensor
    high_slope: Tensor
    done: Tensor
    calls: Any


@dataclass(frozen=True)
class _Line:
    """The objective along `z + length * d`, one line per sample."""

    F: Descent
    z: Tensor
    d: Tensor
    value: Tensor  # what the objective must fall below
    slope: Tensor
    flattens: bool  # whether the slope must shrink as well

    def at(self, length: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        value, r = self.F.evaluate(torch.addcmul(self.z, length[:, None], self.d))
        return value, r, -torch.linalg.vecdot(r, self.d)

    def judge(self, b: _Bracket) -> _Bracket:
        """The bracket after taking account of what was found at `length`."""
        falls = b.value <= self.value + DECREASE * b.length * self.slope
        # Near a minimum the objective is all rounding; there the test is a slope that does not turn steeply.
        falls = falls | ((b.value <= self.value + noise_of(self.value)) & (b.slope <= -0.8 * self.slope))
        falls = falls & b.slope.isfinite() & b.value.isfinite()
        steep = (b.slope < FLATTENING * self.slope) & self.flattens
        right, left = falls & steep & ~b.done, ~falls & ~b.done
        return b._replace(
            low=torch.where(right, b.length, b.low),
            low_value=torch.where(right, b.value, b.low_value),
            low_r=torch.where(right[:, None], b.r, b.low_r),
            low_slope=torch.where(right, b.slope, b.low_slope),
            high=torch.where(left, b.length, b.high),
            high_slope=torch.where(left, b.slope, b.high_slope),
            done=b.done | (falls & ~steep),
        )

    def try_next(self, k: Any, b: _Bracket) -> _Bracket:
        """Try a length inside the bracket, by the secant of the slopes at its ends where that makes sense."""
        width = b.high - b.low
        share = b.low_slope / (b.low_slope - b.high_slope)
        # If the upper end is not finite, or its slope does not point back, all that is known is that it is too far
        # away.
        blind = ~(b.high_slope > 0) | ~share.isfinite() | (k >= SECANTS)
        late = k - SECANTS + 1
        shrink = 0.1 ** (late.clamp(min=1) if isinstance(late, Tensor) else max(late, 1))
        share = share.clamp(0.1, 0.9).masked_fill(blind, 0.5)
        share = torch.where(b.high_slope.isfinite(), share, shrink).to(width.dtype)
        length = torch.where(b.high.isinf(), 4 * b.length, b.low + share * width)
        length = torch.where(b.done, b.length, length)
        value, r, slope = self.at(length)
        return self.judge(b._replace(length=length, value=value, r=r, slope=slope, calls=b.calls + 1))


def wolfe(
    F: Descent, z: Tensor, value: Tensor, r: Tensor, d: Tensor, length: Tensor, below: Tensor | None = None
) -> Moved:
    """Step along d `(B, n)` from z, whose objective is `value` and residual `r`, to where Wolfe's conditions hold.

    It bisects (Lewis and Overton, "Nonsmooth optimization via quasi-Newton methods", 2013), helped by secants;
    where decreases drown in rounding, it goes by the slopes alone (Hager and Zhang, "A new conjugate gradient
    method with guaranteed descent and an efficient line search", 2005, section 2.1). Every sample has its own
    length.

    Args:
        length: `(B,)`, the first to try.
        below: `(B,)`, what the objective must fall below instead of `value`; the slope then need not shrink.
    """
    slope = -torch.linalg.vecdot(r, d)
    line = _Line(F, z, d, value if below is None else below, slope, flattens=below is None)
    zero = torch.zeros_like(slope)
    first, first_r, first_slope = line.at(length)
    calls = torch.ones((), dtype=torch.int64, device=z.device) if torch.compiler.is_dynamo_compiling() else 1
    # There is nothing to gain where the objective does not fall at first, as for samples that have finished.
    done = ~((slope < 0) & value.isfinite())
    b = _Bracket(
        *(length, first, first_r, first_slope),
        *(zero, value, r, slope),
        *(zero + float("inf"), zero, done, calls),
    )
    _, b = repeat(line.try_next, line.judge(b), lambda b: (~b.done).any(), TRIALS)
    moves = b.done & (slope < 0)
    length = torch.where(moves, b.length, b.low)
    value = torch.where(moves, b.value, b.low_value)
    r = torch.where(moves[:, None], b.r, b.low_r)
    status = torch.full_like(length, int(Status.RUNNING), dtype=torch.int64)
    broken = ~b.done & (length == 0) & ~b.value.isfinite()
    status = torch.where(broken | ~value.isfinite(), int(Status.NON_FINITE), status)
    return Moved(torch.addcmul(z, length[:, None], d), value, r, length[:, None], b.calls, status)


def stopped(new: Moved, stuck: Tensor, lowest: Tensor | None) -> Tensor:
    """The `Status` `(B,)` of samples that are `stuck` or unbounded, or whose line search failed; else RUNNING.

    `lowest` is what `bottom` gave at the start; None: the objective is bounded below.
    """
    status = new.verdict
    if lowest is not None:
        status = torch.where(is_bottomless(new.value, new.z, lowest), int(Status.UNBOUNDED), status)
    return torch.where(is_running(status) & stuck, int(Status.STAGNATED), status)


def inverse_norm(r: Tensor) -> Tensor:
    """1 / |r| `(B, 1)`: the factor that gives a first step along r the length one."""
    norm = row_norm(r)[:, None]
    return 1 / torch.where(norm == 0, 1.0, norm)
