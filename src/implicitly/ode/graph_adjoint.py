"""The derivative of a solve as one graph: its recorded steps are taken again and pulled back through.

A graph handles up to `BLOCK` recorded steps. One loop recomputes the states between them, without derivatives,
into buffers. A second loop goes backwards through the steps, and pulls the cotangents of the state and of the
method's memory back through each, accumulating those of shared inputs. For a method that solves for the slopes of
its stages, the first loop keeps these too, so that the second one has nothing to solve. If a solve kept states
further apart than a block, the same graph, with no step to pull back through, gives the state after a block.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import vjp
from torch.nn.functional import pad

from implicitly.compiled import run_as_graph
from implicitly.host import LOOPS, views
from implicitly.iterate import repeat
from implicitly.ode.graph import window_of
from implicitly.ode.integrate import Ended, Stepper, kept
from implicitly.ode.method import Memory, Method, Step
from implicitly.ode.record import Record, State, Taken
from implicitly.ode.replay import again, finite_start, restart

# The number of steps in one run of the graph; the states before all of them are in memory.
BLOCK = 32


class Rows(NamedTuple):
    """Steps in the order in which they were taken, where a step that passes many outputs takes several rows.

    All rows of a step pass outputs, and the last one moves on. Of the outputs between the ends of the solve, a row
    passes those from `first` up to `stop` (exclusive).

    Attributes:
        lengths: `(2, N, B)`: t and dt.
        flags: `(3, N, B)`: whether the step is the last one of a sample, whether a sample accepted it, and whether
            it moves on.
        first, stop: `(N, B)`.
    """

    lengths: Tensor
    flags: Tensor
    first: Tensor
    stop: Tensor

    @classmethod
    def of(cls, steps: Taken, times: Tensor) -> tuple[Rows, list[int]]:
        """The rows of steps, each field `(N, B)`, for times `(B, T)`; also the first row of each step."""
        t, dt, last, accepted, _ = steps
        lengths, flags, count = torch.stack([t, dt]), torch.stack([last, accepted, accepted]), len(t)
        width = window_of(times)
        if not width:
            none = torch.zeros_like(accepted, dtype=torch.int64)
            return cls(lengths, flags, none, none), list(range(count + 1))
        sign = (times[:, -1:] - times[:, :1]).sign()
        inner = (sign * times[:, 1:-1]).contiguous()
        first, stop = (torch.searchsorted(inner, (sign * x.T).contiguous(), right=True).T for x in (t, t + dt))
        stop = torch.where(accepted, stop, first)
        repeats = (((stop - first).amax(1) + width - 1) // width).clamp(min=1)
        begins = torch.cat([repeats.new_zeros(1), repeats.cumsum(0)])
        index = torch.repeat_interleave(torch.arange(count, device=t.device), repeats)
        place = torch.arange(len(index), device=t.device) - begins[index]
        flags, moving = flags[:, index], (place == repeats[index] - 1).unsqueeze(1)
        flags[2] &= moving
        first, stop = first[index] + width * place.unsqueeze(1), stop[index]
        first = torch.minimum(first, stop)
        return cls(lengths[:, index], flags, first, torch.minimum(first + width, stop)), begins.tolist()

    def block(self, begin: int, stop: int) -> Rows:
        """The rows from `begin` up to `stop` (exclusive), padded to `BLOCK` rows."""
        return Rows(*(pad(x[..., begin:stop, :], (0, 0, 0, BLOCK - (stop - begin))) for x in self))

    def row(self, k: Tensor) -> tuple[Taken, Tensor, Tensor, Tensor]:
        """Row `k` `(1,)`: the step, which samples move on `(B,)`, and `first` and `stop` `(B,)`."""
        lengths, flags, first, stop = (x.index_select(-2, k).squeeze(-2) for x in self)
        (t, dt), (last, accepted, moves) = lengths.unbind(), flags.unbind()
        return Taken(t, dt, last, accepted, torch.zeros_like(t, dtype=torch.int8)), moves, first, stop


@dataclass(frozen=True)
class Pull:
    """The function that the graph computes.

    Attributes:
        stepper: `stepper(times, *theta, moving=...)` returns the stepper, see `Stepper`.
        shared: the indices of the inputs (times, y0, theta), except y0, by which derivatives are wanted.
        width: the number of tensors in a state with the method's memory.
        found: the number of slopes of a step that the first loop keeps for the second.
        differentiates: whether the steps need derivatives of f.
    """

    stepper: Callable[..., Stepper]
    shared: tuple[int, ...]
    width: int
    found: int
    differentiates: bool

    @property
    def in_place(self) -> bool:
        """Whether buffers are written in place; otherwise they are carried, and copied at each step."""
        return LOOPS.writes and not self.differentiates

    def run(self, counts: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Up to `BLOCK` rows.

        Args:
            counts: `(3,)` int64: how many rows to advance, from the state before the first; through how many of
                these, from the first, to pull back; and whether the first row is the first of the solve. Slopes
                are kept for the rows advanced.
            tensors: the rows; buffers `(BLOCK + 1, B, ...)` of states (with the method's memory), the first of
                which is that before the first row; the cotangents of the state after the last row; which samples
                `(B,)` finished; the cotangents of the outputs between the ends `(B, T - 2, n)`; and the inputs.

        Returns:
            The number of calls of f; the state after the rows advanced; the cotangents of the state before the
            rows pulled back through; and those of the shared inputs.
        """
        count, width = len(Rows._fields), self.width
        rows, given = Rows(*tensors[:count]), tensors[count:]
        buffers, bars, (finished, g, *inputs) = given[:width], given[width : 2 * width], given[2 * width :]
        on, back, first = counts.unbind()
        slopes = tuple(inputs[1].new_zeros(BLOCK, *inputs[1].shape) for _ in range(self.found))

        def forward(k: Any, carry: Any) -> Any:
            calls, state, states, slopes = carry
            times, _, *theta = views(*inputs)
            stepper = self.stepper(times, *theta, moving=False)
            step, after = moved(stepper, *rows.row(k.reshape(1))[:2], state)
            put = Tensor.index_copy_ if self.in_place else Tensor.index_copy
            written = tuple(
                put(buffer, 0, (k + 1).reshape(1), x.unsqueeze(0)) for buffer, x in zip(states or buffers, after)
            )
            calls = sum(stepper.bound.F.loops, start=calls + stepper.bound.F.calls)
            slopes = tuple(put(b, 0, k.reshape(1), x.unsqueeze(0)) for b, x in zip(slopes, step.stages))
            return calls, after, () if self.in_place else written, slopes

        def backward(k: Any, carried: Any) -> Any:
            calls, carry = carried
            at, places = (back - 1 - k).reshape(1), views(*inputs)
            state = tuple(finite_start(x.index_select(0, at).squeeze(0), finished) for x in states or buffers)
            taken, moves, *of = rows.row(at)
            columns, inside = window(places[0], *of)
            bars = carry[:width]
            if columns.shape[1]:
                shown = g.gather(1, columns.unsqueeze(2).expand(-1, -1, g.shape[2]))
                bars = (*bars, torch.where(inside.unsqueeze(2), shown, 0.0))
            known = tuple(finite_start(x.index_select(0, at).squeeze(0), finished) for x in slopes)
            f = partial(self.passed, taken, moves, columns, inside, known)
            found, took = self.pulled(f, places, state, bars)
            sums = (s + x for s, x in zip(carry[width:], found[width:]))
            return calls + took, (*(x.contiguous() for x in found[:width]), *sums)

        none = torch.zeros((), dtype=torch.int64, device=on.device)
        begin = none, tuple(x[0] for x in buffers), () if self.in_place else buffers, slopes
        _, (calls, state, states, slopes) = repeat(forward, begin, _always, on)
        sums = (torch.zeros_like(inputs[i]) for i in self.shared)
        _, (calls, carry) = repeat(backward, (calls, (*bars, *sums)), _always, back)
        # The memory before the first step follows from y0.
        bars = tuple(torch.where(first > 0, x, 0.0) for x in carry[1:width])
        (by_y0, *found), took = self.pulled(self.begun, tuple(inputs), (finite_start(inputs[1], finished),), bars)
        sums = (s + x for s, x in zip(carry[width:], found))
        return calls + took, *state, carry[0] + by_y0, *carry[1:width], *sums

    def passed(
        self,
        taken: Taken,
        moves: Tensor,
        columns: Tensor,
        inside: Tensor,
        known: tuple[Tensor, ...],
        inputs: Any,
        *state: Tensor,
    ) -> tuple[tuple[Tensor, ...], int]:
        """The state after a row, the outputs `(B, W, n)` that it passes, if any may be, and the calls of f."""
        times, _, *theta = inputs
        stepper = self.stepper(times, *theta, moving=0 in self.shared)
        stepper.bound.F.found = known
        step, after = moved(stepper, taken, moves, state)
        if columns.shape[1]:
            part = torch.where(inside, stepper.part(step, columns + 1), 0.0)
            after = (*after, stepper.method.dense_output(stepper.bound.F, step, part))
        return after, stepper.bound.F.calls

    def begun(self, inputs: Any, y0: Tensor) -> tuple[Memory, int]:
        """The method's memory before the first step from `y0`, and the number of calls of f."""
        times, _, *theta = inputs
        stepper = self.stepper(times, *theta, moving=0 in self.shared)
        return restart(stepper, y0).memory, stepper.bound.F.calls

    def pulled(
        self,
        f: Callable[..., tuple[tuple[Tensor, ...], int]],
        inputs: Any,
        state: tuple[Tensor, ...],
        bars: tuple[Tensor, ...],
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """The cotangents of `state` and of the shared inputs, and the number of calls of the user's f.

        `bars` are the cotangents of what `f(inputs, *state)` returns besides that number.
        """
        chosen = [inputs[i] for i in self.shared]

        def of(*given: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
            full = list(inputs)
            for i, x in zip(self.shared, given[len(state) :]):
                full[i] = x
            value, calls = f(full, *given[: len(state)])
            return value, torch.full((), calls, device=state[0].device)

        traced: Any = vjp(of, *state, *chosen, has_aux=True)
        _, pull, calls = traced
        return pull(bars), calls


def moved(
    stepper: Stepper, taken: Taken, moves: Tensor, state: tuple[Tensor, ...]
) -> tuple[Step, tuple[Tensor, ...]]:
    """Take a recorded step again from `state`: the step, and the state after it of the samples that move on."""
    y, *memory = state
    step, after, _ = again(stepper, taken, State(y, tuple(memory)), outputs=False)
    y, memory = kept(moves, (after.y, after.memory), (y, tuple(memory)))
    return step, (y, *memory)


def window(times: Tensor, first: Tensor, stop: Tensor) -> tuple[Tensor, Tensor]:
    """Columns `(B, W)` from `first` on, among the outputs between the ends, and which of them are below `stop`."""
    columns = first.unsqueeze(1) + torch.arange(window_of(times), device=times.device)
    return columns.clamp(max=max(times.shape[1] - 3, 0)), columns < stop.unsqueeze(1)


def _always(carry: Any) -> bool:
    return True


def _bars(g: Tensor, reached: tuple[Tensor, ...], state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The cotangents of the last state and its memory, given those of the outputs and of the times reached."""
    carried = [torch.zeros_like(x) for x in state[1 : len(state) - len(reached)]]
    bars = (g[:, -1], *carried, *(x.unsqueeze(1) for x in reached))
    # Cloned, so that the strides for a single sample are the usual ones.
    return tuple(x.clone(memory_format=torch.contiguous_format) for x in bars)


def sweep_as_graph(
    key: Hashable,
    method: Method,
    stepper: Callable[..., Stepper],
    record: Record,
    stacked: tuple[Tensor, ...],
    ended: Ended,
    inputs: tuple[Tensor, ...],
    wanted: list[int],
    g: Tensor,
    *reached: Tensor,
) -> tuple[list[Tensor], Tensor] | None:
    """`sweep` by a graph: the cotangents of the `wanted` inputs (times, y0, theta), and the number of calls of f.

    They are for cotangents `g` `(B, T, n)` of the outputs of a solve whose states `record` holds and, if states
    carry their time, `(B,)` of the times reached. None if there can be no graph. The solve has at least one step
    and one sample. `key` identifies all that determines the graph and `stepper`.
    """
    inputs = tuple(x.contiguous() for x in inputs)
    (times, *_), shared = inputs, [i for i in wanted if i != 1]
    rows, begins = Rows.of(Taken(*(x.T for x in stacked)), times)
    places = sorted(record.states)
    before = [record.before(i, len(times)) for i in places]
    states: list[tuple[Tensor, ...]] = [(state.y, *state.memory) for state in before]
    pull = Pull(stepper, tuple(shared), len(states[0]), method.found_slopes, method.differentiates)
    inner = g[:, 1:-1].clone(memory_format=torch.contiguous_format)
    fixed, key = (ended.finished, inner, *inputs), (key, "derivative", pull.shared)
    bars = _bars(g, reached, states[0])
    sums: list[Tensor] = []
    name, calls = f"the derivative of odeint with {type(method).__name__}", torch.zeros((), dtype=torch.int64)

    def run(begin: int, on: int, back: int, state: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        nonlocal calls
        buffers = [x.new_empty(BLOCK + 1, *x.shape) for x in state]
        for buffer, x in zip(buffers, state):
            buffer[0] = x
        counts = torch.tensor([on, back, begin == 0 and back > 0], device=times.device)
        block = rows.block(begin, begin + max(on, back))
        out = run_as_graph(name, key, pull.run, counts, *block, *buffers, *bars, *fixed, varies=True)
        if out is None:
            return None
        calls = calls + out[0]
        return out[1:]

    segments = zip(states, pairwise([*(begins[i] for i in places), begins[-1]]))
    for state, (begin, end) in reversed(list(segments)):
        cuts, before = range(begin, end, BLOCK), [state]
        for cut in cuts[:-1]:
            if (out := run(cut, BLOCK, 0, before[-1])) is None:
                return None
            before.append(out[: pull.width])
        for cut in reversed(cuts):
            count = min(BLOCK, end - cut)
            on = count if pull.found else count - 1
            if (out := run(cut, on, count, before.pop())) is None:
                return None
            bars, found = out[pull.width : 2 * pull.width], out[2 * pull.width :]
            sums = [s + x for s, x in zip(sums, found)] if sums else list(found)
    by = {1: bars[0] + g[:, 0], **dict(zip(shared, sums))}
    return [by[i] for i in wanted], calls
