"""The loop of trajectories: every sample takes its own steps, accepts or rejects them, and ends on its own.

A step that is accepted is noted, so that a derivative can take the same steps again: `replay`. Output times are
read off the dense output of the step that passes them; no step is shortened for one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from implicitly.iterate import Status, happens, is_running, repeat, where_rows
from implicitly.ode.control import first_step
from implicitly.ode.problem import Field
from implicitly.ode.runge_kutta import RungeKutta, Step
from implicitly.tree import is_batched, unwrapped

# A step this much too short for the rest is stretched, rather than leaving a rest that rounding decides about.
STRETCH = 1e-3
# States kept at first; beyond twice as many as their spacing every other is forgotten.
CHECKPOINTS = 32


class Taken(NamedTuple):
    """A step that some samples accepted, each `(B,)`: from t0 + offset, dt long, or up to the end where `last`."""

    offset: Tensor
    dt: Tensor
    last: Tensor
    accepted: Tensor


class Piece(NamedTuple):
    """Outputs inside of a step: `values` `(P, n)` of samples `rows` `(P,)` at output times `columns` `(P,)`."""

    rows: Tensor
    columns: Tensor
    values: Tensor


@dataclass
class Record:
    """What a solve leaves for its derivative: all steps, and states at O(sqrt(steps)) of them.

    `states[i]` are y and its slope before `steps[i]`, for every i that `spacing` divides.
    """

    steps: list[Taken] = field(default_factory=list)
    states: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    spacing: int = 1
    clean: bool = True  # whether no sample met NaN or inf in a step that others accepted

    def note(self, taken: Taken, y: Tensor, k: Tensor) -> None:
        """Note a step from the state `y` with slope `k`."""
        i = len(self.steps)
        self.steps.append(taken)
        if i % self.spacing == 0:
            self.states[i] = y, k
        if len(self.states) > max(CHECKPOINTS, 2 * self.spacing):
            self.spacing *= 2
            self.states = {i: state for i, state in self.states.items() if i % self.spacing == 0}


class Carry(NamedTuple):
    """Where the samples are."""

    t: Tensor  # (B,)
    length: Tensor  # (B,) of the step to try
    y: Tensor
    k: Tensor  # the slope at y
    error: Tensor  # (B,) of the last accepted step, over the tolerance
    status: Tensor | None  # None: every sample is running (known only where looking is cheap)
    steps: Tensor  # (B,) accepted
    tries: Tensor  # (B,)
    worst: Tensor  # (B,) the component with the largest error in the last step tried


class Integrated(NamedTuple):
    """The result of a solve: outputs `(B, T, n)`, and how each sample ended `(B,)`."""

    values: Tensor
    status: Tensor
    error: Tensor
    steps: Tensor
    tries: Tensor
    t: Tensor
    length: Tensor
    worst: Tensor


@dataclass(frozen=True)
class Stepper:
    """Takes the steps of one solve: `times` `(B, T)` by a `method` along the vector field `F`."""

    method: RungeKutta
    F: Field
    times: Tensor

    @property
    def end(self) -> Tensor:
        """The last output time `(B,)`."""
        return self.times[:, -1]

    def start(self, y: Tensor, k: Tensor) -> tuple[Carry, int]:
        """The state before the first step, and the calls of f that took."""
        method, t = self.method, self.times[:, 0]
        span = (self.end - t).detach()
        calls = 0
        given = method.dt if method.dt0 is None else method.dt0
        if given is not None:
            length = torch.full_like(span, given)
        else:
            order = method.tableau.order  # all pairs here estimate an error of that order
            with torch.no_grad():
                scale = method.tolerance(y.detach())
                length = first_step(self.F, t.detach(), y.detach(), k.detach(), span, order, scale, method.norm)
            calls = 1
        length = length.clamp(max=method.dt_max)
        zeros = torch.zeros_like(span, dtype=torch.int64)
        finite = k.detach().isfinite().all(1) & y.detach().isfinite().all(1)
        status = torch.where(finite, int(Status.RUNNING), torch.full_like(zeros, int(Status.NON_FINITE)))
        status = status if happens(~is_running(status)) else None
        return Carry(t, length, y, k, torch.ones_like(length), status, zeros, zeros, zeros), calls

    def try_step(self, c: Carry) -> tuple[Step, Tensor, Tensor]:
        """The step from `c`, where it is the last one, and `(B,)` the error over the tolerance."""
        left = self.end - c.t
        last = c.length * (1 + STRETCH) >= left.abs()
        # As long as the times it lies between resolve: far from 0, dt and t would part otherwise.
        t = c.t.detach()
        dt = torch.where(last, left, (t + c.length * left.detach().sign()) - t)
        step = self.method.step(self.F, c.t, dt, c.y, c.k)
        if self.method.dt is not None:
            ratio = torch.where(step.y1.detach().isfinite().all(1), 0.0, float("inf")).to(c.error)
            return step, last, ratio
        seen = step
        if torch.is_grad_enabled():
            seen = step._replace(**{n: v.detach() for n, v in zip(step._fields, step) if isinstance(v, Tensor)})
        ratio = self.method.error_ratio(seen, self.method.tolerance(seen.y, seen.y1))
        ratio = torch.where(ratio.isnan(), float("inf"), ratio)
        error = self.method.tableau.error
        if error is not None and error[-1] == 0:  # of the slope at the end the error knows nothing
            ratio = torch.where(seen.k1.isfinite().all(1), ratio, float("inf"))
        return step, last, ratio

    def judge(self, c: Carry, step: Step, last: Tensor, ratio: Tensor) -> tuple[Tensor, Carry]:
        """Which samples `(B,)` accept the step, and what follows for all."""
        accepted, length = ratio <= 1, c.length
        if c.status is not None:
            accepted = accepted & is_running(c.status)
        if self.method.dt is None:
            factor = self.method.controller.factor(ratio, c.error, accepted, self.method.tableau.order)
            length = (step.dt.detach().abs() * factor).clamp(max=self.method.dt_max)
        if c.status is None and not happens(~accepted | last):  # the usual step: all go on
            t, counts = c.t + step.dt, (c.steps + 1, c.tries + 1)
            return accepted, Carry(t, length, step.y1, step.k1, ratio, None, *counts, c.worst)
        status = torch.full_like(c.steps, int(Status.RUNNING)) if c.status is None else c.status
        running = is_running(status)
        dead, length, reason = self._given_up(c, running & ~accepted, length, ratio)
        status = torch.where(dead, reason, status)
        status = torch.where(accepted & last, int(Status.CONVERGED), status)
        worst = c.worst
        if step.error is not None and happens(dead):
            largest = (step.error / self.method.tolerance(step.y)).abs().nan_to_num(nan=float("inf")).argmax(1)
            worst = torch.where(dead, largest, worst)
        t = torch.where(accepted, torch.where(last, self.end, c.t + step.dt), c.t)
        y, k = where_rows(accepted, step.y1, c.y), where_rows(accepted, step.k1, c.k)
        error = torch.where(accepted, ratio, c.error)
        return accepted, Carry(t, length, y, k, error, status, c.steps + accepted, c.tries + running, worst)

    def _given_up(
        self, c: Carry, rejected: Tensor, length: Tensor, ratio: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Which samples `(B,)` cannot go on with a step of `length`, what lengths others have, and the reasons."""
        reason = torch.full_like(c.steps, int(Status.NON_FINITE))
        if self.method.dt is not None:  # of constant steps, nothing can be made shorter
            return rejected, length, reason
        eps = torch.finfo(length.dtype).eps
        resolved = 4 * eps * torch.maximum(c.t.detach().abs(), self.end.detach().abs())
        shortest = resolved.clamp(min=self.method.dt_min)
        reason = torch.where(ratio.isfinite(), int(Status.STEP_UNDERFLOW), reason)
        return rejected & (length < shortest), torch.maximum(length, shortest), reason

    def passed(self, step: Step, accepted: Tensor) -> Tensor:
        """Which outputs `(B, T - 2)` strictly between start and end a step passes."""
        sign = step.dt.detach().sign().unsqueeze(1)
        begin, end = step.t.detach().unsqueeze(1), (step.t + step.dt).detach().unsqueeze(1)
        inner = self.times[:, 1:-1].detach()
        return (sign * (inner - begin) > 0) & (sign * (inner - end) <= 0) & accepted.unsqueeze(1)

    def outputs(self, step: Step, accepted: Tensor) -> Iterator[Piece]:
        """The outputs that a step passes."""
        inner = self.times[:, 1:-1]
        if inner.shape[1] == 0:
            return
        inside = self.passed(step, accepted)
        count = inside.sum(1)
        width = int(unwrapped(count).max()) if len(count) else 0
        if width == 0:
            return
        first = inside.to(torch.int8).argmax(1)
        place = torch.arange(width, device=first.device)
        columns = (first.unsqueeze(1) + place).clamp(max=inner.shape[1] - 1)
        rows, at = unwrapped(place < count.unsqueeze(1)).nonzero(as_tuple=True)
        values = self.method.between(self.F, step, _part(step, inner.gather(1, columns)))
        yield Piece(rows, columns[rows, at] + 1, values[rows, at])

    def fill(self, inner: Tensor, step: Step, accepted: Tensor) -> Tensor:
        """`inner` `(B, T - 2, n)` with the outputs that a step passes, by operations that `vmap` maps."""
        theta = _part(step, self.times[:, 1:-1]).clamp(0, 1)
        values = self.method.between(self.F, step, theta)
        return torch.where(self.passed(step, accepted).unsqueeze(2), values, inner)


def _part(step: Step, times: Tensor) -> Tensor:
    """Where `(B, W)` in the step, from 0 to 1, times `(B, W)` are."""
    return (times - step.t.unsqueeze(1)) / torch.where(step.dt == 0, 1.0, step.dt).unsqueeze(1)


def integrate(
    method: RungeKutta, F: Field, times: Tensor, y: Tensor, k: Tensor, record: Record | None = None
) -> tuple[Integrated, int]:
    """Solve from `y` `(B, n)`, whose slope is `k`, through `times` `(B, T)`; also gives the calls of f it took.

    The steps that were accepted are noted in `record`.
    """
    stepper = Stepper(method, F, times)
    carry, calls = stepper.start(y, k)
    pieces: list[Piece] = []
    per_step = method.tableau.stages - 1 + (0 if method.tableau.fsal else 1)

    def body(i: int | Tensor, c: Carry) -> Carry:
        step, last, ratio = stepper.try_step(c)
        accepted, new = stepper.judge(c, step, last, ratio)
        if not happens(accepted):  # nothing of a step that nobody accepts stays
            return new._replace(t=c.t, y=c.y, k=c.k)
        pieces.extend(stepper.outputs(step, accepted))
        if record is not None:
            start = times[:, 0].detach()
            taken = Taken(c.t.detach() - start, step.dt.detach(), last, accepted)
            record.note(taken, c.y.detach(), c.k.detach())
            record.clean &= not happens(~ratio.isfinite())
        return new

    tries, carry = repeat(body, carry, _any_running, method.max_steps)
    status = torch.full_like(carry.steps, int(Status.MAX_STEPS))
    if carry.status is not None:
        status = torch.where(is_running(carry.status), status, carry.status)
    values = assemble(times, y, carry.y, status == int(Status.CONVERGED), pieces)
    extra = len(pieces) * len(method.tableau.extra)
    found = Integrated(values, status, carry.error, carry.steps, carry.tries, carry.t, carry.length, carry.worst)
    return found, calls + int(tries) * per_step + extra


def _any_running(c: Carry) -> bool | Tensor:
    return True if c.status is None else is_running(c.status).any()


def assemble(times: Tensor, y0: Tensor, y1: Tensor, finished: Tensor, pieces: list[Piece]) -> Tensor:
    """All outputs `(B, T, n)`; NaN where a solve did not get to."""
    inner = y0.new_full((y0.shape[0], times.shape[1] - 2, y0.shape[1]), float("nan"))
    if pieces:
        rows, columns, values = (torch.cat(parts) for parts in zip(*pieces))
        inner = inner.index_put((rows, columns - 1), values)
    return _joined(y0, inner, y1, finished)


def _joined(y0: Tensor, inner: Tensor, y1: Tensor, finished: Tensor) -> Tensor:
    end = torch.where(finished.unsqueeze(1), y1, float("nan"))
    return torch.cat([y0.unsqueeze(1), inner, end.unsqueeze(1)], dim=1)


def again(stepper: Stepper, taken: Taken, y: Tensor, k: Tensor) -> tuple[Step, Tensor, Tensor]:
    """A noted step once more, from `y` with slope `k`, and the state and slope after it.

    Lengths are constants; only the last step of a sample ends where its times end.
    """
    t = stepper.times[:, 0] + taken.offset
    dt = torch.where(taken.last, stepper.end - t, taken.dt)
    step = stepper.method.step(stepper.F, t, torch.where(taken.accepted, dt, 0.0), y, k)
    return step, where_rows(taken.accepted, step.y1, y), where_rows(taken.accepted, step.k1, k)


def finite_start(y: Tensor, finished: Tensor) -> Tensor:
    """`y` `(B, n)` without the NaN and inf of samples that failed before their first step.

    They are never stepped, and 0 times their derivative must be 0.
    """
    return y.nan_to_num(0.0, 0.0, 0.0) if happens(~finished) else y


def replay(stepper: Stepper, steps: list[Taken], y: Tensor, finished: Tensor) -> Tensor:
    """The outputs `(B, T, n)` of the noted steps from `y`, as a plain differentiable program."""
    y = finite_start(y, finished)
    y0, k = y, stepper.F(stepper.times[:, 0], y)
    pieces: list[Piece] = []
    inner = torch.zeros_like(k).unsqueeze(1).expand(-1, stepper.times.shape[1] - 2, -1)
    mapped = any(is_batched(x) for x in (k, stepper.times, finished))
    for taken in steps:
        step, y, k = again(stepper, taken, y, k)
        if mapped:
            inner = stepper.fill(inner, step, taken.accepted)
        else:
            pieces.extend(stepper.outputs(step, taken.accepted))
    if mapped:
        return _joined(y0, inner, y, finished)
    return assemble(stepper.times, y0, y, finished, pieces)


def states_before(stepper: Stepper, record: Record, steps: list[Taken], stop: int) -> list[tuple[Tensor, Tensor]]:
    """y and its slope before each step from the last one kept before `stop` up to it."""
    i = (stop - 1) // record.spacing * record.spacing
    states = [record.states[i]]
    for taken in steps[i : stop - 1]:
        states.append(again(stepper, taken, *states[-1])[1:])
    return states
