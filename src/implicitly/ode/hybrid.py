"""Steps that end at an event, or at one of the method's `tstops`.

A step in which an event happens is taken again, up to the event. When it is replayed for a derivative, its length
is differentiated by the implicit function theorem, as the length for which g vanishes at its end. Therefore states
carry their time. The lengths of all other steps are constants for the derivative, in time or in arc length.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from implicitly.condition import Condition, Map, Report
from implicitly.host import Array, filled, library, to_host, to_tensor
from implicitly.implicit import Backward, attach
from implicitly.iterate import where_rows
from implicitly.linear import DenseLU
from implicitly.ode.crossings import (
    ROUNDING,
    Scan,
    Watch,
    any_now,
    chosen,
    correct,
    first_root,
    scan,
    slopes_of,
    values,
)
from implicitly.ode.events import Event
from implicitly.ode.integrate import Carry, Stepper, step_length
from implicitly.ode.method import Memory, Step
from implicitly.ode.problem import Field
from implicitly.ode.record import STOP, State, Taken
from implicitly.solution import Status, is_running

# The weight of the state's relative change in the arc length, where time over the whole interval has weight 1.
# With a larger weight, gradients are better where the solution jumps; with a smaller one, where it settles.
MOTION = 2.0
# The relative tolerance assumed if only absolute tolerances are given: a moderate one. It
# sets the size, atol / rtol, below which components hardly count in the arc length.
LOOSE = 1e-3
# The direction in which g moves at an event is checked if the step up to it is at most this many times as long as
# times resolve, and if the same event had a restart right before it.
UNSURE = 4.0


@dataclass
class HybridStepper(Stepper):
    """A stepper whose steps end at events and at the method's `tstops`.

    Attributes:
        events: the events to watch for.
        arc_length: whether derivatives hold the arc length of a step fixed, instead of its length in time.
    """

    events: tuple[Event, ...] = ()
    arc_length: bool = False

    # ------------------------------------------------------------------------------------ times to be hit

    @cached_property
    def stops(self) -> Array:
        """The `tstops` `(K,)` of the method."""
        stops = self.method.tstops
        return np.array(stops, dtype=self.seen.dtype) if self.host else self.seen.new_tensor(stops)

    @cached_property
    def sign(self) -> Array:
        """The direction `(B,)` of time, +1 or -1; +1 where the interval has length 0."""
        return library(self.end).where(self.end >= self.begin, filled(self.end, 1.0), -1.0)

    def ahead(self, t: Array) -> tuple[Array, Array]:
        """The time `(B,)` at which the next step from t must end at the latest, and whether it is a `tstop`."""
        xp, sign = library(t), self.sign[:, None]
        ordered = sign * self.stops
        passed = (ordered <= sign * t[:, None]) | (ordered >= sign * self.end[:, None])
        ordered = xp.where(passed, float("inf"), ordered)
        nearest = ordered.min(1) if xp is np else ordered.amin(1)
        stop = xp.isfinite(nearest)
        return xp.where(stop, self.sign * nearest, self.end), stop

    def bounds(self, t: Array) -> tuple[Tensor, Tensor] | None:
        """The times `(B,)` between which a step from t may evaluate f, which may jump at both ends; None: any."""
        if not self.method.tstops:
            return None
        xp, far, limit = library(t), self.sign * float("inf"), self.ahead(t)[0]
        begin = xp.where(self._jumps(t), xp.nextafter(t, far), -far)
        end = xp.where(self._jumps(limit), xp.nextafter(limit, -far), far)
        return to_tensor(xp.minimum(begin, end)), to_tensor(xp.maximum(begin, end))

    def _jumps(self, t: Array) -> Array:
        """Which of the times t `(B,)` are `tstops`, where f may jump."""
        return (self.stops == t[:, None]).any(1)

    def after(self, t: Array) -> Array:
        """The times `(B,)` at which f is evaluated for slopes at the start of steps from t: behind its jumps."""
        if not self.method.tstops:
            return t
        seen = to_host(t) if self.host and isinstance(t, Tensor) else t
        xp = library(seen)
        now = seen.detach() if isinstance(seen, Tensor) else seen
        jumps = self._jumps(now)
        if not any_now(jumps):
            return t
        behind = xp.nextafter(now, self.sign * float("inf"))
        return torch.where(to_tensor(jumps), to_tensor(behind), to_tensor(t))

    def try_step(self, c: Carry) -> tuple[Step, Taken, Array]:
        """The step from `c`, its `Taken` for the record, and the ratio `(B,)` of its error to the tolerance."""
        if not self.method.tstops:
            return super().try_step(c)
        xp, (limit, stop) = library(c.t), self.ahead(c.t)
        reach, dt = step_length(c.t, c.length, limit)
        ends = xp.where(reach & stop, self.plain + STOP, self.plain)
        F = with_times_clamped(self.bound.F, self.bounds(c.t))
        step = self.method.step(F, c.t, dt, c.y, c.memory)
        error = self._error(step)
        accepted = error <= 1
        if c.status is not None:
            accepted = accepted & is_running(c.status)
        return step, Taken(c.t, dt, reach & ~stop, accepted, ends), error

    # --------------------------------------------------------------------------------------- the way there

    def clock(self, t: Array) -> Memory:
        """The time `(B, 1)`."""
        return (to_tensor(t).unsqueeze(1),)

    def reached(self, state: State) -> Tensor:
        """The times `(B,)` at which a solve ended, differentiable."""
        return state.memory[-1][:, 0]

    def happened(self, c: Carry) -> tuple[Array, Array]:
        """The index `(B,)` of the event that happened last, -1 for none, and how many did."""
        return (c.watch[3], c.watch[4]) if self.events else super().happened(c)

    def start(self, y: Tensor, k: Tensor, length: Array | None = None) -> Carry:
        """The state before the first step, which is tried with `length` `(B,)` if that is known."""
        begin = self.begin
        t = self.after(begin)
        if t is not begin:  # f jumps right there
            k = self.bound.F.at(t, y)
        c = super().start(y, k, length)
        if not self.events:
            return c
        with torch.no_grad():
            value = to_host(values(self.bound.F, to_tensor(c.t), y, len(self.events)))
        xp = library(value)
        status = filled(c.steps, int(Status.RUNNING)) if c.status is None else c.status
        status = xp.where(xp.isfinite(value).all(1), status, int(Status.NON_FINITE))
        fresh = filled(value, 1, "bool")
        with np.errstate(invalid="ignore"):
            watch = Watch(value, xp.sign(value), fresh, c.steps - 1, c.steps, c.steps)
        return c._replace(watch=watch, status=status if any_now(~is_running(status)) else None)

    @property
    def cuts(self) -> bool:
        """Whether anything but the last time may end a step."""
        return bool(self.events or self.method.tstops)

    def advance(self, c: Carry) -> tuple[Step, Taken, Array, Carry]:
        """Try one step from `c`: the step, its `Taken` for the record, its error, the new state of the loop."""
        if not self.cuts:
            return super().advance(c)
        with torch.no_grad(), np.errstate(all="ignore") if self.host else nullcontext():
            step, taken, error = self.try_step(c)
            watch = c.watch
            if self.events and any_now(taken.accepted):
                step, taken, error, watch = self._cut(c, step, taken, error)
            taken = taken._replace(ends=library(error).where(taken.accepted, taken.ends, self.plain))
            new = self.judge(c, step, taken, error)._replace(watch=watch)
            return step, taken, error, self._settled(c, new, taken) if any_now(taken.ends != 0) else new

    def _cut(self, c: Carry, step: Step, taken: Taken, error: Array) -> tuple[Step, Taken, Array, Watch]:
        """The step tried from `c`, cut at the first event in it, and what is known of events then."""
        old, tried = Watch(*c.watch), taken.dt
        xp, found = library(error), scan(self.method, self.bound.F, step, old, self.events)
        error = xp.where(found.sick & taken.accepted, float("inf"), error)
        taken = taken._replace(accepted=taken.accepted & ~found.sick)
        first, part, seen = filled(c.steps, -1), filled(error, float("inf")), found.numbers[:, -1]
        hits = (found.hit > 0).any(1) & taken.accepted
        if any_now(hits):
            first, part, dt = self._first_event(step, c.memory, found, hits)
            ends = xp.where(first >= 0, self.plain + first, taken.ends - 1) + 1
            ends = ends.astype(np.int8) if xp is np else ends.to(torch.int8)
            dt = xp.where(first >= 0, dt, taken.dt)
            taken = taken._replace(dt=dt, last=taken.last & (first < 0), ends=ends)
            step = self.method.step(with_times_clamped(self.bound.F, self.bounds(c.t)), c.t, dt, c.y, c.memory)
            there = to_host(values(self.bound.F, to_tensor(c.t + dt), step.y1, len(self.events)))
            seen = xp.where((first >= 0)[:, None], there, seen)
        happens = first >= 0
        resolved, sign = self.resolved(c.t, c.t + tried), found.sign_before(part)
        stays = happens & (abs(taken.dt) <= resolved)
        stuck = xp.where(stays, old.stuck + 1, 0)
        again = old.fresh.any(1) & (first == old.event)
        if any_now(unsure := happens & (again | (abs(taken.dt) <= UNSURE * resolved))):
            turned = self._turned(step, c.t + taken.dt, first, sign)
            stuck = xp.where(unsure & turned, len(self.events) + 1, stuck)
        new = Watch(
            seen,
            sign,
            old.fresh & False,
            xp.where(happens, first, old.event),
            old.event_count + happens,
            stuck,
        )
        rows = taken.accepted
        pairs = ((rows[:, None] if n.ndim == 2 else rows, n, o) for n, o in zip(new, old))
        return step, taken, error, Watch(*(xp.where(*pair) for pair in pairs))

    def _turned(self, step: Step, t: Array, first: Array, sign: Array) -> Array:
        """Where `(B,)` g of event `first` (-1: none) moves away from 0 at the end t of a step.

        Then it does not change its `sign` `(B, E)`. This happens in a bounce that rounding does not resolve: the
        ball is still rising when it seems to hit the floor, and a restart would send it through.
        """
        slopes = to_host(
            slopes_of(self.bound.F, to_tensor(t), to_tensor(self.sign), step.y1, step.k1, len(self.events))
        )
        xp, turned = library(slopes), first < -1
        for i in range(len(self.events)):
            turned = xp.where(first == i, sign[:, i] * slopes[:, i] > 0, turned)
        return turned

    def _first_event(self, step: Step, memory: Memory, found: Scan, hits: Array) -> tuple[Array, Array, Array]:
        """The first event in a step that was taken with `memory`.

        Returns its index `(B,)` (-1: none), its relative position in the step from 0 to 1, and the length of the
        step up to it.
        """
        stepper, mask, rows = self, to_tensor(hits), None
        if self.bound.sample_dims is not None and self.host:  # only for the samples with an event
            rows = mask.nonzero()[:, 0]

            def some_of(x: Any) -> Any:
                return x[rows] if isinstance(x, Tensor) else x if x is None else x[to_host(rows)]

            stepper, mask = self.take(rows), mask[rows]
            step, memory = Step(*pytree.tree_map(some_of, tuple(step))), tuple(m[rows] for m in memory)
            found = Scan(*map(some_of, found))
        method, t, dt = self.method, to_tensor(step.t), to_tensor(step.dt)
        F = stepper.bound.F
        first, part = first_root(method, F, step, found)
        first = torch.where(mask, first, -1)
        inside = with_times_clamped(F, stepper.bounds(step.t))

        def retake(length: Tensor) -> tuple[Tensor, Tensor]:
            again = method.step(inside, t, length, step.y, memory)
            return again.y1, again.k1

        resolved = to_tensor(stepper.resolved(step.t, step.t + step.dt))
        length = correct(retake, F, first, t, dt, torch.where(first >= 0, part * dt, dt), resolved / 2)
        # A sample that would restart at the last time has arrived.
        arrived = (t + length - to_tensor(stepper.end)).abs() <= resolved
        for i, event in enumerate(self.events):
            if event.restart is not None:
                first = torch.where((first == i) & arrived, -1, first)
        answer = to_host(first), to_host(torch.where(first >= 0, part, float("inf"))), to_host(length)
        if rows is None:
            return answer
        self.bound.F.calls += F.calls
        spread = np.full(hits.shape, -1), np.full(hits.shape, np.inf, answer[2].dtype), self.seen[:, 0] * 0
        for whole, x in zip(spread, answer):
            whole[to_host(rows)] = x
        return spread

    def _settled(self, c: Carry, new: Carry, taken: Taken) -> Carry:
        """The state of the loop for samples whose step ended at an event or a `tstop`."""
        xp, ends, t = library(taken.dt), taken.ends, new.t
        if self.method.tstops:
            t = xp.where(ends == STOP, self.ahead(c.t)[0], t)
        over = ends < STOP  # none yet
        for i, event in enumerate(self.events):
            if event.restart is None:
                over = over | (ends == i + 1)
        status = filled(c.steps, int(Status.RUNNING)) if new.status is None else new.status
        status = xp.where(over, int(Status.EVENT), status)
        y, memory = self._begun(to_tensor(ends), to_tensor(t), new.y, new.memory)
        watch, restarted = new.watch, (ends > 0) & ~over
        if any_now(restarted):
            watch = self._watch_anew(Watch(*c.watch), Watch(*watch), restarted, ends, to_tensor(t), y)
            status = xp.where(restarted & (watch.stuck > len(self.events)), int(Status.STEP_UNDERFLOW), status)
        # A step that was cut short says nothing against the length that was planned.
        length = xp.where(ends != 0, c.length, new.length)
        return new._replace(y=y, memory=memory, t=t, length=length, status=status, watch=watch)

    def _watch_anew(self, c: Watch, new: Watch, restarted: Array, ends: Array, t: Tensor, y: Tensor) -> Watch:
        """What is known of events after restarts."""
        after = to_host(values(self.bound.F, t, y, len(self.events)))
        xp, before = library(after), new.value
        index = np.arange(len(self.events)) if xp is np else torch.arange(len(self.events), device=t.device)
        fired = ends[:, None] == index + 1
        # A g that a restart does not change keeps its sign, since two events may happen at once.
        same = abs(after - before) <= ROUNDING * torch.finfo(t.dtype).eps * abs(c.value)
        after = xp.where(fired & (abs(after) <= 4 * abs(before)), 0.0, after)
        fresh = (fired | ~same) & restarted[:, None]
        return new._replace(
            value=xp.where(restarted[:, None], after, new.value),
            sign=xp.where(fresh, xp.sign(after), new.sign),
            fresh=new.fresh | fresh,
        )

    def _begun(self, ends: Tensor, t: Tensor, y: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """State and memory from which samples continue at t `(B,)`, after steps that ended by `ends` `(B,)`."""
        F, anew = self.bound.F, ends == STOP
        for i, event in enumerate(self.events):
            mask = ends == i + 1
            if event.restart is not None and any_now(mask):
                assert F.jump is not None
                y, anew = where_rows(mask, F.jump(i, t, y), y), anew | mask
        if not any_now(anew):
            return y, memory
        t = to_tensor(self.after(t))
        fresh = self.method.start(F, t, y, F.at(t, y))
        return y, tuple(where_rows(anew, m, o) for m, o in zip(fresh, memory))

    # -------------------------------------------------------------------------------------- and once more

    def retaken(self, taken: Taken, y: Tensor, memory: Memory) -> tuple[Step, Tensor, Memory]:
        """Take a recorded step again: the step, and the state and memory from which the next one starts."""
        *carried, clock = memory
        carried, t, accepted = tuple(carried), clock[:, 0], to_tensor(taken.accepted)
        ends = torch.where(accepted, to_tensor(taken.ends), 0)
        last = accepted & to_tensor(taken.last)
        dt = torch.where(accepted, to_tensor(taken.dt), 0.0)
        if self.arc_length:  # a failed sample's slope may be NaN; and at slope 0, norms have no second derivative
            dt = dt / self._speed(y, torch.where(accepted.unsqueeze(1), self.method.slope(carried), 1.0))
        dt = torch.where(last, self.times[:, -1] - t, dt)
        bounds = self.bounds(taken.t)
        if self.method.tstops:
            dt = torch.where(ends == STOP, to_tensor(self.ahead(taken.t)[0]) - t, dt)
        if self.events and any_now(ends > 0):
            known = to_tensor(taken.t + taken.dt)
            dt = torch.where(ends > 0, self._event_time(ends, known, bounds, t, y, carried) - t, dt)
        self.bound.F.again = True
        step = self.method.step(with_times_clamped(self.bound.F, bounds), t, dt, y, carried)
        t = torch.where(last, self.times[:, -1], t + dt)
        y, carried = step.y1, step.memory
        if self.cuts:
            y, carried = self._begun(ends, t, y, carried)
        return step, y, (*carried, t.unsqueeze(1))

    def _speed(self, y: Tensor, k: Tensor) -> Tensor:
        """1 `(B,)`, with the derivative of log(d arc length / dt), at y `(B, n)` with slope k.

        The arc length is that of the curve (t / span, MOTION y / size), where the size of a component is
        |y| + atol / rtol. So motion that is small relative to the size over the whole interval, or that errors
        cause, counts for little compared with time.
        """
        method, rtol = self.method, self.method.rtol
        loose = torch.where(rtol > 0, rtol, LOOSE) if isinstance(rtol, Tensor) else rtol or LOOSE
        rate = method.norm(k * (loose / method.tolerance(y.detach())))
        span = to_tensor(self.end - self.begin).abs()
        speed = torch.hypot(MOTION * rate, 1 / torch.where(span == 0, 1.0, span))
        return speed / speed.detach()

    def _event_time(
        self,
        ends: Tensor,
        known: Tensor,
        bounds: tuple[Tensor, Tensor] | None,
        t: Tensor,
        y: Tensor,
        memory: Memory,
    ) -> Tensor:
        """The `known` times `(B,)` at which events end a step, differentiable by the state where it began."""
        method, field, count = self.method, self.bound.field, len(memory)
        limits = bounds or ()

        def bind(*theta: Tensor) -> Map:
            y, t, code, known, *rest = theta
            low_high, memory = rest[: len(limits)], rest[len(limits) :][:count]
            bounds = (low_high[0], low_high[1]) if low_high else None
            F = with_times_clamped(field(*rest[len(limits) + count :]), bounds)

            def g(z: Tensor) -> Tensor:
                end = z[:, 0]
                y1 = method.step(F, t, end - t, y, tuple(memory)).y1
                return torch.where(code > 0, chosen(F, code.long() - 1, end, y1), end - known).unsqueeze(1)

            return g

        # This condition exists only for its derivative, which always warns if a solve fails: g may only touch 0.
        condition = Condition(bind, "the time of an event", y.dtype, Report("warn"))
        theta = (y, t, ends.to(y.dtype), known, *limits, *memory, *self.bound.theta)
        return attach(condition, known.unsqueeze(1), theta, Backward(DenseLU()))[:, 0]


def with_times_clamped(F: Field, bounds: tuple[Tensor, Tensor] | None) -> Field:
    """F with times clamped to `bounds`, each `(B,)`; None: F itself."""
    if bounds is None:
        return F
    return replace(
        F,
        show=lambda times: F.show(torch.clamp(times, *bounds)),
        slope=F,
        bind=lambda *theta: with_times_clamped(F.bind(*theta), bounds),
        calls=0,
    )
