"""A solve as one graph: the steps of `integrate`, in a loop that `torch.compile` sees as a whole.

What a solve leaves (the lengths of its steps, its outputs) goes into buffers that the loop writes in place; all
else is carried. A graph takes at most `CHUNK` steps, and is run again from where it got to.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from implicitly import iterate
from implicitly.compiled import run_as_graph
from implicitly.host import views
from implicitly.iterate import Status, is_running, is_success, repeat
from implicitly.ode.integrate import Carry, Integrated, Stepper
from implicitly.ode.record import Record, State, Taken

# Tried steps of one run of the graph, between whose ends no state is kept.
CHUNK = 128
# Outputs that a step passes at once; a step that passes more of them is taken again for the others.
WINDOW = 32


class Looping(NamedTuple):
    """What the loop carries."""

    carry: Carry
    noted: Tensor  # () steps in the buffers
    column: Tensor  # (B,) the first output that is not known yet
    calls: Tensor  # () of f


class Buffers(NamedTuple):
    """What the loop writes: its steps, as the fields of `Taken` `(CHUNK, B)`, and outputs `(B, T - 2 + W, n)`."""

    t: Tensor
    dt: Tensor
    last: Tensor
    accepted: Tensor
    inner: Tensor

    @classmethod
    def empty(cls, times: Tensor, y: Tensor) -> Buffers:
        """For times `(B, T)` and states like `y` `(B, n)`."""
        batch, between = len(times), times.shape[1] - 2
        # Each with memory of its own: a loop refuses two inputs of which one might be changed by way of the other.
        t, dt = (times.new_empty(CHUNK, batch) for _ in range(2))
        last, accepted = (times.new_empty(CHUNK, batch, dtype=torch.bool) for _ in range(2))
        return cls(t, dt, last, accepted, y.new_empty(batch, between + window_of(times), y.shape[1]))

    def steps(self, count: int) -> Taken:
        """The first `count` steps, each field `(count, B)`."""
        t, dt, last, accepted = (x[:count] for x in self[:4])
        return Taken(t, dt, last, accepted, torch.zeros_like(t, dtype=torch.int8))


def window_of(times: Tensor) -> int:
    """Of `(B, T)` output times, how many a step may pass at once."""
    return min(times.shape[1] - 2, WINDOW)


@dataclass(frozen=True)
class Loop:
    """What the graph computes.

    Attributes:
        stepper: `stepper(times, *theta)` takes the steps.
        spec: of `Looping`.
        in_place: whether buffers are written in place. The compiler cannot do that in a loop which differentiates,
            nor before PyTorch 2.13; there they are carried, and copied for each step.
    """

    stepper: Callable[..., Stepper]
    spec: pytree.TreeSpec
    in_place: bool

    def run(self, first: Tensor, times: Tensor, y0: Tensor, k0: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        """Up to `CHUNK` steps from what is carried, or from the start at the `first` run; the buffers follow."""
        count, slots = self.spec.num_leaves, len(Buffers._fields)
        flat, buffers, theta = rest[:count], Buffers(*rest[count : count + slots]), rest[count + slots :]
        given = pytree.tree_unflatten(list(flat), self.spec)
        stepper = self.stepper(times, *theta)
        fresh = stepper.start(y0, k0)
        carry = pytree.tree_map(partial(torch.where, first), fresh, given.carry)
        calls = given.calls + torch.where(first, stepper.bound.F.calls, 0)
        looping = given._replace(carry=carry, calls=calls, noted=torch.zeros_like(given.noted))
        carried = (looping, () if self.in_place else buffers)

        def step(k: int | Tensor, carried: Any) -> Any:
            looping, written = carried
            looping, written = self.step(times, theta, looping, written or buffers)
            return looping, () if self.in_place else written

        _, (looping, written) = repeat(step, carried, lambda c: is_running(c[0].carry.status).any(), CHUNK)
        return *pytree.tree_leaves(looping), *written

    def step(
        self, times: Tensor, theta: tuple[Tensor, ...], L: Looping, buffers: Buffers
    ) -> tuple[Looping, Buffers]:
        """One step of the loop."""
        # Made here, as a loop may change nothing that lies outside of it.
        stepper = self.stepper(times, *views(*theta))
        step, taken, _, new = stepper.advance(L.carry)
        accepted, column, inner = taken.accepted, L.column, buffers.inner
        if width := window_of(times):
            columns = column.unsqueeze(1) + torch.arange(width, device=times.device)
            part = stepper.part(step, columns.clamp(max=times.shape[1] - 3) + 1).clamp(0, 1)
            values = stepper.method.between(stepper.bound.F, step, part)
            # What is beyond the end of the step is written again by a later one.
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
    """`torch.where` for `(B,)` and rows of whatever shape."""
    return torch.where(mask.reshape(-1, *(1,) * (new.ndim - 1)), new, old)


def integrate_as_graph(
    key: Hashable,
    stepper: Callable[..., Stepper],
    times: Tensor,
    y0: Tensor,
    k0: Tensor,
    theta: tuple[Tensor, ...],
    record: Record | None,
) -> tuple[Integrated, Tensor, int] | None:
    """As `integrate`; None where no graph can be had. `key` names all that decides about `stepper`."""
    times = times.contiguous()
    taker = stepper(times, *theta)
    looping = _begin(taker, y0, k0)
    buffers = Buffers.empty(times, y0)
    flat, spec = pytree.tree_flatten(looping)
    # As a graph returns them: other strides would make a second graph for the second run.
    flat = [x.clone(memory_format=torch.contiguous_format) for x in flat]
    method = taker.method
    loop = Loop(stepper, spec, in_place=iterate.LOOPS_WRITE and not method.differentiates)
    first = torch.ones((), dtype=torch.bool, device=times.device)
    running = True
    while running:
        before, inputs = looping.carry, (first, times, y0, k0, *flat, *buffers, *theta)
        out = run_as_graph(f"odeint with {type(method).__name__}", key, loop.run, *inputs)
        if out is None:
            return None
        flat, written = out[: spec.num_leaves], out[spec.num_leaves :]
        looping, buffers = pytree.tree_unflatten(list(flat), spec), Buffers(*written) if written else buffers
        if record is not None:
            record.note_many(buffers.steps(int(looping.noted)), State(before.y, before.memory))
        running = bool(is_running(looping.carry.status).any())
        first = torch.zeros_like(first)
    return _result(times, y0, looping, buffers), looping.carry.y, int(looping.calls)


def _begin(stepper: Stepper, y0: Tensor, k0: Tensor) -> Looping:
    """What is carried into the first run: of the right shapes, and for the record the first state."""
    zeros = torch.zeros(len(y0), dtype=torch.int64, device=y0.device)
    number = torch.zeros_like(stepper.begin)
    memory = stepper.method.start(stepper.bound.F, stepper.begin, y0, k0)
    none = torch.zeros((), dtype=torch.int64, device=y0.device)
    carry = Carry(y0, memory, stepper.begin, number, number, zeros, zeros, zeros, zeros)
    return Looping(carry, none, zeros, none)


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
    return Integrated(values, c.status, c.error, c.steps, c.tries, c.t, c.length, c.worst, none - 1, none)
