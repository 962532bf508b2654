"""A solve as one graph: the steps of `integrate`, in a loop that `torch.compile` sees as a whole.

The results of a solve (the lengths of its steps, its outputs) go into buffers that the loop writes in place;
everything else is carried. A graph takes at most `CHUNK` steps, and is run again from where it stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from implicitly.compiled import Check, run_as_graph
from implicitly.host import LOOPS, views
from implicitly.iterate import repeat
from implicitly.ode.integrate import Carry, Integrated, Stepper
from implicitly.ode.method import Memory
from implicitly.ode.record import Record, State, Taken
from implicitly.solution import Status, is_running, is_success

# The number of attempted steps in one run of the graph; no state is kept in between.
CHUNK = 128
# The number of outputs that a step can pass at once; a step that passes more is taken again for the others.
WINDOW = 32


class Looping(NamedTuple):
    """The state that the loop carries."""

    carry: Carry
    noted: Tensor  # () the number of steps in the buffers
    column: Tensor  # (B,) the first output that is not known yet
    calls: Tensor  # () the number of calls of f


class Buffers(NamedTuple):
    """The buffers of the loop: its steps, as fields of `Taken` `(CHUNK, B)`, and outputs `(B, T - 2 + W, n)`."""

    t: Tensor
    dt: Tensor
    last: Tensor
    accepted: Tensor
    inner: Tensor

    @classmethod
    def empty(cls, times: Tensor, y: Tensor) -> Buffers:
        """Empty buffers for times `(B, T)` and states like `y` `(B, n)`."""
        batch, between = len(times), times.shape[1] - 2
        # Each with memory of its own, as a loop refuses inputs that may alias each other.
        t, dt = (times.new_empty(CHUNK, batch) for _ in range(2))
        last, accepted = (times.new_empty(CHUNK, batch, dtype=torch.bool) for _ in range(2))
        return cls(t, dt, last, accepted, y.new_empty(batch, between + window_of(times), y.shape[1]))

    def steps(self, count: int) -> Taken:
        """The first `count` steps, each field `(count, B)`."""
        t, dt, last, accepted = (x[:count] for x in self[:4])
        return Taken(t, dt, last, accepted, torch.zeros_like(t, dtype=torch.int8))


def window_of(times: Tensor) -> int:
    """How many of the output times `(B, T)` a step may pass at once."""
    return min(times.shape[1] - 2, WINDOW)


class Left(NamedTuple):
    """The result of one run of a graph.

    The solve so far, and whether it goes on; what the loop carried and wrote; and the method's memory before the
    first step of the whole solve, if that is among the steps.
    """

    found: Integrated
    running: Tensor  # () bool
    looping: Looping
    buffers: Buffers
    first: Memory = ()


@dataclass(frozen=True)
class Loop:
    """The functions that the graphs compute.

    Attributes:
        stepper: `stepper(times, *theta)` returns the stepper.
        differentiates: whether the steps need derivatives of f.
    """

    stepper: Callable[..., Stepper]
    differentiates: bool

    @property
    def in_place(self) -> bool:
        """Whether buffers are written in place; otherwise they are carried, and copied at each step."""
        return LOOPS.writes and not self.differentiates

    def begin(self, times: Tensor, y0: Tensor, *theta: Tensor) -> Left:
        """The first `CHUNK` steps, more than most solves need."""
        stepper = self.stepper(times, *theta)
        carry = stepper.start(y0, stepper.bound.F.at(stepper.begin, y0))
        none = torch.zeros((), dtype=torch.int64, device=y0.device)
        looping = Looping(carry, none, torch.zeros_like(carry.steps), none + stepper.bound.F.calls)
        left = self.steps(times, y0, theta, looping, Buffers.empty(times, y0))
        return left._replace(first=carry.memory)

    def go_on(self, spec: pytree.TreeSpec, times: Tensor, y0: Tensor, *rest: Tensor) -> Left:
        """`CHUNK` more steps; `rest` holds the carry and buffers (the leaves of `spec`), then theta."""
        count = spec.num_leaves
        looping, buffers = pytree.tree_unflatten(list(rest[:count]), spec)
        looping = looping._replace(noted=torch.zeros_like(looping.noted))
        return self.steps(times, y0, rest[count:], looping, buffers)

    def steps(
        self, times: Tensor, y0: Tensor, theta: tuple[Tensor, ...], looping: Looping, buffers: Buffers
    ) -> Left:
        """Up to `CHUNK` steps."""

        def step(k: int | Tensor, carried: Any) -> Any:
            looping, written = carried
            looping, written = self.step(times, theta, looping, written or buffers)
            return looping, () if self.in_place else written

        carried = (looping, () if self.in_place else buffers)
        _, (looping, written) = repeat(step, carried, lambda c: is_running(c[0].carry.status).any(), CHUNK)
        buffers = written or buffers
        running = is_running(looping.carry.status).any()
        return Left(_result(times, y0, looping, buffers), running, looping, buffers)

    def step(
        self, times: Tensor, theta: tuple[Tensor, ...], L: Looping, buffers: Buffers
    ) -> tuple[Looping, Buffers]:
        """One step of the loop."""
        # Made here, since a loop may change nothing outside of it.
        stepper = self.stepper(times, *views(*theta))
        step, taken, _, new = stepper.advance(L.carry)
        accepted, column, inner = taken.accepted, L.column, buffers.inner
        if width := window_of(times):
            columns = column.unsqueeze(1) + torch.arange(width, device=times.device)
            part = stepper.part(step, columns.clamp(max=times.shape[1] - 3) + 1).clamp(0, 1)
            values = stepper.method.dense_output(stepper.bound.F, step, part)
            # Outputs beyond the end of the step are overwritten by a later one.
            inner = self.put(inner, 1, columns.unsqueeze(2).expand_as(values), values)
            place = torch.arange(times.shape[1] - 2, device=times.device)
            left = (stepper.passed(taken) & (place >= column.unsqueeze(1))).sum(1)
            more = left > width
            accepted, column = accepted & ~more, column + torch.where(more, width, left)
            new = Carry(*pytree.tree_map(partial(where, more), tuple(L.carry), tuple(new)))
        slot = L.noted.reshape(1, 1).expand(1, len(times))
        values = (taken.t, taken.dt, taken.last, accepted)
        t, dt, last, took = (self.put(buffer, 0, slot, v.unsqueeze(0)) for buffer, v in zip(buffers, values))
        assert new.status is not None
        late = is_running(new.status) & (new.tries >= stepper.method.max_steps)
        new = new._replace(status=torch.where(late, int(Status.MAX_STEPS), new.status))
        F = stepper.bound.F
        looping = Looping(new, L.noted + accepted.any(), column, sum(F.loops, start=L.calls + F.calls))
        return looping, Buffers(t, dt, last, took, inner)

    def put(self, buffer: Tensor, dim: int, index: Tensor, value: Tensor) -> Tensor:
        """`buffer` with `value` at `index` of `dim`."""
        return buffer.scatter_(dim, index, value) if self.in_place else buffer.scatter(dim, index, value)


def where(mask: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """`torch.where` for a mask `(B,)` and rows of any shape."""
    return torch.where(mask.reshape(-1, *(1,) * (new.ndim - 1)), new, old)


def integrate_as_graph(
    key: Hashable,
    stepper: Callable[..., Stepper],
    times: Tensor,
    y0: Tensor,
    theta: tuple[Tensor, ...],
    record: Record | None,
    check: Check | None,
) -> tuple[Integrated, Tensor, int] | None:
    """As `integrate`, by a graph; None if there can be none. `key` identifies all that determines `stepper`."""
    times = times.contiguous()
    taker = stepper(times, *theta)
    method, start = taker.method, State(y0, taker.clock(taker.begin))
    name = f"odeint with {type(method).__name__}"
    loop = Loop(stepper, method.differentiates)
    left = run_as_graph(name, (key, "begin"), loop.begin, times, y0, *theta, check=check, varies=True)
    if left is not None:
        start = State(y0, (*left.first, *start.memory))
    while left is not None:
        if record is not None:
            record.note_many(left.buffers.steps(int(left.looping.noted)), start)
        if not bool(left.running):
            return left.found, left.looping.carry.y, int(left.looping.calls)
        carry = left.looping.carry
        start = State(carry.y, (*carry.memory, *taker.clock(carry.t)))
        flat, spec = pytree.tree_flatten((left.looping, left.buffers))
        # Made contiguous, as other strides would make another graph.
        flat = [x.clone(memory_format=torch.contiguous_format) for x in flat]
        go_on = partial(loop.go_on, spec)
        left = run_as_graph(name, (key, "go on"), go_on, times, y0, *flat, *theta, varies=True)
    return None


def _result(times: Tensor, y0: Tensor, looping: Looping, buffers: Buffers) -> Integrated:
    c, between = looping.carry, times.shape[1] - 2
    assert c.status is not None
    reached, inner = is_success(c.status), buffers.inner[:, :between]
    if between:
        known = torch.arange(between, device=times.device) < looping.column.unsqueeze(1)
        inner = torch.where(known.unsqueeze(2), inner, float("nan"))
    end = torch.where(reached.unsqueeze(1), c.y, float("nan"))
    values = torch.cat([y0.unsqueeze(1), inner, end.unsqueeze(1)], dim=1)
    none = torch.zeros_like(c.steps)
    return Integrated(values, c.status, c.error, c.steps, c.tries, c.t, c.length, none - 1, none)
