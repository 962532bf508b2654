"""The integration loop: every sample takes its own steps, accepts or rejects them, and ends on its own.

Accepted steps are recorded, so that a derivative can take the same steps again (`replay`). Outputs come from the
dense output of the step that passes their time; no step is shortened to hit one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from dataclasses import field as given
from functools import partial
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from implicitly.host import Array, all_now, clamped, filled, finite_rows, library, maybe_any, to_host, to_tensor
from implicitly.iterate import DROP_BELOW, repeat, some_dropped, where_rows
from implicitly.ode.control import first_step, rms_norm, shortest_step
from implicitly.ode.method import Memory, Method, Step
from implicitly.ode.problem import Field
from implicitly.ode.record import Happened, Record, State, Taken, told
from implicitly.solution import Status, is_running, is_success
from implicitly.transforms import is_cpu, is_tracked

# A step that falls short of the end by at most this fraction is stretched to it; otherwise rounding would decide
# about the tiny rest.
STRETCH = 1e-3


# On an accelerator, finding out which outputs a step passes would make the host wait. So up to this many numbers,
# all outputs are evaluated in each step.
FEW_OUTPUTS = 2**20


class Piece(NamedTuple):
    """Outputs inside a step: `values` `(P, n)` of samples `rows` `(P,)` at output times `columns` `(P,)`.

    If the host must not look which ones there are: values `(B, T - 2, n)` of rows `(B, 1)` at columns `(T - 2,)`,
    0 where they are not `inside` `(B, T - 2)`.
    """

    rows: Tensor
    columns: Tensor
    values: Tensor
    inside: Tensor | None = None


class Carry(NamedTuple):
    """The loop's state: where each sample is."""

    y: Tensor  # (B, n)
    memory: Memory
    t: Array  # (B,)
    length: Array  # (B,) of the step to try
    error: Array  # (B,) of the last accepted step, over the tolerance
    status: Array | None  # None: every sample is running (known only where looking is cheap)
    steps: Array  # (B,) accepted
    tries: Array  # (B,)
    watch: tuple[Array, ...] = ()  # further state of a stepper, such as what it knows of events
    before: tuple[Array, ...] = ()  # (B,) the error of the accepted step before that, if the controller needs it


class Integrated(NamedTuple):
    """The result of a solve: outputs `(B, T, n)`, and how each sample ended `(B,)`.

    `event` is the index of the event that happened last, -1 for none, and `event_count` how many did. If there are
    events, `event_times` and `event_indices` `(B, K)` list all that happened, with NaN and -1 after the last one.
    """

    values: Tensor
    status: Tensor
    error: Tensor
    steps: Tensor
    tries: Tensor
    t: Tensor
    length: Tensor
    event: Tensor
    event_count: Tensor
    event_times: Tensor | None = None
    event_indices: Tensor | None = None

    @property
    def usual(self) -> tuple[Tensor, ...]:
        """The fields that a solve without events has, too."""
        return tuple(x for x in self[:USUAL] if x is not None)


# The number of fields that a solve without events has.
USUAL = Integrated._fields.index("event_times")


@dataclass
class Bound:
    """The vector field at `theta`, for all samples or some of them.

    Attributes:
        field: maps theta to the `Field`.
        sample_dims: for each of theta the dimension that holds the samples, None where shared; None: not known.
        once: see `Field`.
        F: the field.
    """

    field: Callable[..., Field]
    theta: tuple[Tensor, ...]
    sample_dims: tuple[int | None, ...] | None = None
    once: bool = False

    F: Field = given(init=False)

    def __post_init__(self):
        self.F = self.field(*self.theta)
        self.F.once = self.once

    def take(self, rows: Tensor) -> Bound:
        """The field for the samples `rows` only."""
        assert self.sample_dims is not None
        theta = tuple(x if d is None else x.index_select(d, rows) for x, d in zip(self.theta, self.sample_dims))
        return replace(self, theta=theta)


@dataclass
class Stepper:
    """Takes the steps of one solve through `times` `(B, T)`, by a `method` along a vector field.

    Attributes:
        host: whether per-sample numbers, such as times and step lengths, are NumPy arrays on the host.
        moving: whether a derivative may reach the times; None: detected.
        seen: the times as numbers, without derivatives.
        begin: the first time `(B,)`.
        end: the last time `(B,)`.
        plain: `Taken.ends` of a step that ends at no event and none of `tstops`.
    """

    method: Method
    bound: Bound
    times: Tensor
    host: bool
    moving: bool | None = None
    seen: Array = given(init=False)
    begin: Array = given(init=False)
    end: Array = given(init=False)
    plain: Array = given(init=False)

    def __post_init__(self):
        self.seen = to_host(self.times) if self.host else self.times.detach()
        if self.moving is None:  # while tracing, this cannot be detected
            self.moving = not torch.compiler.is_dynamo_compiling() and is_tracked(self.times)
        self.begin, self.end = self.seen[:, 0], self.seen[:, -1]
        self.plain = filled(self.begin, 0, "int8") if isinstance(self.begin, Tensor) else _plain(len(self.begin))

    def clock(self, t: Array) -> Memory:
        """What states carry of their time `(B,)`, besides the method's memory.

        Here nothing, as derivatives with respect to times follow from the first and the last time.
        """
        return ()

    def take(self, rows: Tensor) -> Self:
        """The stepper for the samples `rows` only."""
        return replace(self, bound=self.bound.take(rows), times=self.times.index_select(0, rows))

    def located(self, t: Array, dt: Array, last: Array) -> tuple[Array, Array]:
        """Time and length of a step, made differentiable: they move with the first and the last time."""
        if not self.moving:
            return t, dt
        t = self.times[:, 0] + to_tensor(t - self.begin)
        return t, torch.where(to_tensor(last), self.times[:, -1] - t, to_tensor(dt))

    def start(self, y: Tensor, k: Tensor, length: Array | None = None) -> Carry:
        """The state before the first step, which is tried with `length` `(B,)` if that is known."""
        method, t = self.method, self.begin
        xp, span = library(t), self.end - self.begin
        given, seen_finite = method.dt if method.dt0 is None else method.dt0, False
        if length is None and given is not None:
            length = filled(span, given)
        elif length is None:
            length, seen_finite = self.first_length(y.detach(), k.detach())
        length = clamped(length, None, method.dt_max)
        zeros, status = filled(span, 0, "int64"), None
        finite = None if seen_finite else finite_rows(y.detach(), k.detach())
        ones = filled(length, 1.0)
        if finite is not None and (maybe_any(~finite) or len(y) == 0):  # without samples, none is running
            status = xp.where(finite, int(Status.RUNNING), filled(zeros, int(Status.NON_FINITE)))
        if maybe_any(there := span == 0):  # samples with a single time have nothing to solve
            status = filled(zeros, int(Status.RUNNING)) if status is None else status
            status = xp.where(there & is_running(status), int(Status.CONVERGED), status)
        memory = method.start(self.bound.F, t, y, k)
        before = (ones,) if method.dt is None and method.controller.derivative else ()
        return Carry(y, memory, t, length, ones, status, zeros, zeros, before=before)

    def first_length(self, y: Tensor, k: Tensor) -> tuple[Array, bool]:
        """The length `(B,)` of the first step from y `(B, n)`, whose slope is k.

        Also whether y and k were found to be finite on the way.
        """
        method, t = self.method, self.begin
        with torch.no_grad():
            given = (self.bound.F, t, y, k, self.end - t, method.order, method.tolerance(y), method.norm)
            if isinstance(t, Tensor):
                return first_step(*given)[0], False
            with np.errstate(all="ignore"):
                length, sizes = first_step(*given)
        # Other norms may ignore entries that are not finite.
        return length, method.norm is rms_norm and len(y) > 0 and all_now(np.isfinite(sizes))

    def try_step(self, c: Carry) -> tuple[Step, Taken, Array]:
        """The step from `c`, its `Taken` for the record, and the ratio `(B,)` of its error to the tolerance."""
        last, dt = step_length(c.t, c.length, self.end)
        self.bound.F.begin(last)
        step = self.method.step(self.bound.F, *self.located(c.t, dt, last), c.y, c.memory)
        with torch.no_grad():
            error = self._error(step)
        accepted = error <= 1
        if c.status is not None:
            accepted = accepted & is_running(c.status)
        return step, Taken(c.t, dt, last, accepted, self.plain), error

    def tell(self, c: Carry) -> None:
        """Tell the method's `progress` how far the slowest running sample has come."""
        if self.method.progress is None:
            return
        span = abs(self.end - self.begin)
        part = abs(c.t - self.begin) / library(span).where(span == 0, 1.0, span)
        if c.status is not None:
            part = library(part).where(is_running(c.status), part, 1.0)
        self.method.progress(float(part.min()) if len(part) else 1.0)

    def after(self, t: Array) -> Array:
        """The times `(B,)` at which f is evaluated for the slopes at the start of steps from t."""
        return t

    def reached(self, state: State) -> Tensor | None:
        """The times `(B,)` at which a solve ended, differentiable; None: at the last of the times."""
        return None

    def happened(self, c: Carry) -> tuple[Array, Array]:
        """The index `(B,)` of the event that happened last, -1 for none, and how many did."""
        return filled(c.steps, -1), filled(c.steps, 0)

    def advance(self, c: Carry) -> tuple[Step, Taken, Array, Carry]:
        """Try one step from `c`: the step, its `Taken` for the record, its error, the new state of the loop."""
        step, taken, error = self.try_step(c)
        return step, taken, error, self.judge(c, step, taken, error)

    def retaken(self, taken: Taken, y: Tensor, memory: Memory) -> tuple[Step, Tensor, Memory]:
        """Take a recorded step again: the step, and the state and memory from which the next one starts."""
        dt = library(taken.dt).where(taken.accepted, taken.dt, 0.0)
        place = self.located(taken.t, dt, taken.last & taken.accepted)
        self.bound.F.again = True
        step = self.method.step(self.bound.F, *place, y, memory)
        return step, step.y1, step.memory

    def resolved(self, t: Array, other: Array | None = None) -> Array:
        """The shortest length `(B,)` of a step from t, or between t and another time, that the dtype resolves.

        The end may be far away, so it only sets the scale for times near 0.
        """
        xp, eps = library(t), torch.finfo(self.times.dtype).eps
        size = xp.maximum(abs(t), eps * eps * abs(self.end) if other is None else abs(other))
        return 4 * eps * size

    def _error(self, step: Step) -> Array:
        """The ratio `(B,)` of the error of a step to the tolerance; inf where it met NaN or inf."""
        method, y1 = self.method, step.y1.detach()
        if method.dt is not None:
            finite = finite_rows(y1)
            return library(finite).where(finite, filled(self.begin, 0.0), float("inf"))
        error = to_host(method.error_ratio(step, method.tolerance(step.y.detach(), y1)))
        xp = library(error)
        bad = xp.isnan(error)
        if not method.sees_end:
            bad = bad | ~finite_rows(step.k1.detach())
        return xp.where(bad, float("inf"), error)

    def judge(self, c: Carry, step: Step, taken: Taken, error: Array) -> Carry:
        """The state of the loop after a step: which samples accept it, go on, or end."""
        accepted, last, method = taken.accepted, taken.last, self.method
        xp, length = library(error), c.length
        if method.dt is None:
            factor = method.controller.factor(error, c.error, accepted, method.order, c.before)
            length = clamped(abs(taken.dt) * factor, None, method.dt_max)
        if c.status is None and not maybe_any(~accepted):  # the usual case: all samples go on, or all end
            steps, tries, before = c.steps + 1, c.tries + 1, (c.error,) if c.before else ()
            if not maybe_any(last):
                t = c.t + taken.dt
                return Carry(step.y1, step.memory, t, length, error, None, steps, tries, c.watch, before)
            if all_now(last):
                status = filled(steps, int(Status.CONVERGED))
                return Carry(step.y1, step.memory, self.end, length, error, status, steps, tries, c.watch, before)
        status = filled(c.steps, int(Status.RUNNING)) if c.status is None else c.status
        running = is_running(status)
        length = xp.where(running, length, c.length)  # a sample that ended keeps the length to continue with
        if maybe_any(rejected := running & ~accepted):
            dead, length, reason = self._given_up(c, rejected, length, error)
            status = xp.where(dead, reason, status)
        status = xp.where(accepted & last, int(Status.CONVERGED), status)
        t = xp.where(accepted, xp.where(last, self.end, c.t + taken.dt), c.t)
        y, memory = kept(accepted, (step.y1, step.memory), (c.y, c.memory))
        before = tuple(xp.where(accepted, c.error, b) for b in c.before)
        error = xp.where(accepted, error, c.error)
        steps, tries = c.steps + accepted, c.tries + running
        return Carry(y, memory, t, length, error, status, steps, tries, c.watch, before)

    def _given_up(self, c: Carry, rejected: Array, length: Array, error: Array) -> tuple[Array, Array, Array]:
        """Which samples `(B,)` cannot go on with a step of `length`, the lengths for the others, the reasons."""
        xp = library(length)
        reason = filled(c.steps, int(Status.NON_FINITE))
        if self.method.dt is not None:  # constant steps cannot be made shorter
            return rejected, length, reason
        shortest = clamped(self.resolved(c.t), self.method.dt_min, None)
        reason = xp.where(xp.isfinite(error), int(Status.STEP_UNDERFLOW), reason)
        return rejected & (length < shortest), xp.maximum(length, shortest), reason

    def passed(self, taken: Taken) -> Array:
        """Which outputs `(B, T - 2)` strictly between start and end a step passes."""
        xp = library(taken.dt)
        sign = xp.sign(taken.dt)[:, None]
        begin, end = taken.t[:, None], (taken.t + taken.dt)[:, None]
        inner = self.seen[:, 1:-1]
        return (sign * (inner - begin) > 0) & (sign * (inner - end) <= 0) & taken.accepted[:, None]

    def outputs(self, step: Step, taken: Taken, mapped: bool = False) -> Iterator[Piece]:
        """The outputs that a step passes; under `vmap` (`mapped`) it is impossible to look which ones."""
        if self.times.shape[1] == 2:
            return
        passed = self.passed(taken)
        if not maybe_any(passed):
            return
        inside = to_tensor(passed)
        few = inside.numel() * step.y.shape[1] <= FEW_OUTPUTS
        if mapped or (few and not is_cpu(step.y)):
            yield self._all_outputs(step, inside)
            return
        count = inside.sum(1)
        width = int(count.max())
        if width == 0:
            return
        first = inside.to(torch.int8).argmax(1)
        place = torch.arange(width, device=first.device)
        columns = (first.unsqueeze(1) + place).clamp(max=inside.shape[1] - 1)
        rows, at = (place < count.unsqueeze(1)).nonzero(as_tuple=True)
        values = self.method.dense_output(self.bound.F, step, self.part(step, columns + 1))
        yield Piece(rows, columns[rows, at] + 1, values[rows, at])

    def _all_outputs(self, step: Step, inside: Tensor) -> Piece:
        """The outputs that are `inside` `(B, T - 2)` a step, by operations that work under `vmap`."""
        rows = torch.arange(len(self.times), device=self.times.device).unsqueeze(1)
        columns = torch.arange(1, self.times.shape[1] - 1, device=self.times.device)
        part = torch.where(inside, self.part(step, columns.expand(len(rows), -1)), 0.0)
        values = self.method.dense_output(self.bound.F, step, part)
        return Piece(rows, columns, torch.where(inside.unsqueeze(2), values, 0.0), inside)

    def part(self, step: Step, columns: Tensor) -> Tensor:
        """The relative positions `(B, W)` in the step, from 0 to 1, of the times in `columns` `(B, W)`."""
        t, dt = to_tensor(step.t), to_tensor(step.dt)
        return (self.times.gather(1, columns) - t.unsqueeze(1)) / torch.where(dt == 0, 1.0, dt).unsqueeze(1)


@functools.lru_cache(maxsize=16)
def _plain(batch: int) -> np.ndarray:
    return np.zeros(batch, dtype=np.int8)


def step_length(t: Array, length: Array, end: Array) -> tuple[Array, Array]:
    """Which samples `(B,)` reach the `end` in a step of `length` from t, and its signed length.

    The length is at least what the dtype resolves at t; a step of length 0 would have no error and repeat forever.
    """
    xp, left = library(t), end - t
    length = xp.maximum(length, shortest_step(t))
    last = length * (1 + STRETCH) >= abs(left)
    if not isinstance(last, Tensor) and last.all():
        return last, left
    # The difference of the rounded times; otherwise dt and the times would drift apart far from 0.
    return last, xp.where(last, left, (t + length * xp.sign(left)) - t)


def kept(mask: Array, new: tuple[Tensor, Memory], old: tuple[Tensor, Memory]) -> tuple[Tensor, Memory]:
    """The `new` state and memory where `mask` `(B,)`, otherwise the `old` ones."""
    if not isinstance(mask, Tensor):
        if mask.all():
            return new
        if not mask.any():
            return old
    rows = to_tensor(mask)
    (y, memory), (y_old, memory_old) = new, old
    return where_rows(rows, y, y_old), tuple(where_rows(rows, m, o) for m, o in zip(memory, memory_old))


# Called with the stepper after each step that any of the samples `rows` (None: all) accepted.
Listen = Callable[[Stepper, Step, Taken, Tensor | None], None]


@dataclass
class Outputs:
    """Collects the outputs between the ends of a solve, `(B, T - 2, n)` like `y0` `(B, n)`, as steps pass them."""

    times: Tensor
    y0: Tensor
    pieces: list[Piece] = given(default_factory=list)
    inner: Tensor | None = None

    def add(self, pieces: Iterable[Piece]) -> None:
        """Add the outputs of a step."""
        for piece in pieces:
            if piece.inside is None:
                self.pieces.append(piece)
            else:
                inner, rows = self._unknown if self.inner is None else self.inner, piece.rows[:, 0]
                few = len(rows) < len(inner)
                inside = piece.inside.reshape(*piece.inside.shape, *(1,) * (inner.ndim - 2))
                new = torch.where(inside, piece.values, inner[rows] if few else inner)
                self.inner = inner.index_copy(0, rows, new) if few else new

    @property
    def found(self) -> Tensor:
        """All outputs; NaN at times that the solve did not reach."""
        if self.inner is not None:
            return self.inner
        if not self.pieces:
            return self._unknown
        rows, columns, values, _ = zip(*self.pieces)
        return self._unknown.index_put((torch.cat(rows), torch.cat(columns) - 1), torch.cat(values))

    @property
    def _unknown(self) -> Tensor:
        batch, *shape = self.y0.shape
        return self.y0.new_full((batch, self.times.shape[1] - 2, *shape), float("nan"))


@dataclass
class Run:
    """A solve in progress: its stepper, and what its steps have left."""

    stepper: Stepper
    record: Record | None
    batch: int
    outputs: Outputs
    listen: Listen | None = None
    rows: Tensor | None = None  # the samples that still take part; None: all
    calls: int = 0
    happened: list[Happened] = given(default_factory=list)

    @property
    def called(self) -> int:
        """How often f was called."""
        return self.calls + self.stepper.bound.F.calls

    def body(self, i: int | Tensor, c: Carry) -> Carry:
        """One step of the loop."""
        step, taken, error, new = self.stepper.advance(c)
        self.stepper.tell(new)
        if not maybe_any(taken.accepted):
            return new
        self.outputs.add(of_all(piece, self.rows) for piece in self.stepper.outputs(step, taken))
        if new.watch and maybe_any(now := taken.ends > 0):
            self.happened.append(Happened(now, taken.ends - 1, new.t).of_all(self.rows, self.batch))
        if self.record is not None:
            memory = (*(m.detach() for m in c.memory), *self.stepper.clock(c.t))
            state = State(c.y.detach(), memory, self.rows)
            self.record.note(taken.of_all(self.rows, self.batch), state)
            self.record.clean &= not maybe_any(~library(error).isfinite(error))
        if self.listen is not None:
            self.listen(self.stepper, step, taken, self.rows)
        return new

    def drop(self, carry: Carry) -> Carry:
        """Drop finished samples, and go on with those that are running."""
        assert carry.status is not None
        keep = torch.from_numpy(is_running(carry.status).nonzero()[0])
        self.calls += self.stepper.bound.F.calls
        self.rows = keep if self.rows is None else self.rows[keep]
        self.stepper = self.stepper.take(keep)
        return Carry(*pytree.tree_map(lambda x: x[keep if isinstance(x, Tensor) else to_host(keep)], tuple(carry)))


def of_all(piece: Piece, rows: Tensor | None) -> Piece:
    """A piece of the samples `rows` (None: all), with its rows renumbered to those of all samples."""
    return piece if rows is None else piece._replace(rows=rows[piece.rows])


def integrate(
    stepper: Stepper,
    y0: Tensor,
    k0: Tensor,
    record: Record | None = None,
    listen: Listen | None = None,
) -> tuple[Integrated, Tensor, int]:
    """Solve from `y0` `(B, n)`, whose slope is `k0`, by `march`.

    Returns the result, the states `(B, n)` reached and the number of calls of f.
    """
    run, ended = march(stepper, y0, k0, record, listen)
    assert ended.status is not None
    numbers = (ended.status, ended.error, ended.steps, ended.tries, ended.t, ended.length)
    status, *others = (to_tensor(x) for x in (*numbers, *stepper.happened(ended)))
    events = told(run.happened, others[3]) if ended.watch else ()
    usual = not maybe_any(ended.status)  # all are 0, CONVERGED
    values = assemble(run.outputs, ended.y, None if usual else Ended(status, to_tensor(ended.t)))
    return Integrated(values, status, *others, *events), ended.y, run.called


def march(
    stepper: Stepper,
    y0: Tensor,
    k0: Tensor,
    record: Record | None = None,
    listen: Listen | None = None,
    length: Array | None = None,
) -> tuple[Run, Carry]:
    """Take all steps from `y0` `(B, n)`, whose slope is `k0`.

    Returns what they left, and the final state of the loop with a status for every sample. Accepted steps are
    noted in `record` and passed to `listen`. Finished samples are dropped from the calls of f where the stepper
    knows how. The first step is tried with `length` `(B,)` if that is known.
    """
    carry = stepper.start(y0, k0, length)
    run = Run(stepper, record, len(y0), Outputs(stepper.times, y0), listen)
    droppable = stepper.bound.sample_dims is not None and isinstance(carry.t, np.ndarray)
    limit = stepper.method.max_steps
    count, carry = repeat(run.body, carry, partial(_worth_a_step, droppable), limit)
    ended = carry
    while droppable and count < limit and _unfinished(carry):
        carry = run.drop(carry)
        with some_dropped():
            count, carry = repeat(run.body, carry, partial(_worth_a_step, True), limit, count)
        ended = _with_rows(ended, run.rows, carry)
    status = filled(ended.steps, int(Status.MAX_STEPS))
    if ended.status is not None:
        status = library(ended.t).where(is_running(ended.status), status, ended.status)
    return run, ended._replace(status=status)


def _unfinished(c: Carry) -> bool:
    return c.status is None or bool(is_running(c.status).any())


def _worth_a_step(droppable: bool, c: Carry) -> bool | Tensor:
    """Whether any sample is running and, if finished ones can be dropped, whether most are."""
    if c.status is None:
        return True
    running = is_running(c.status)
    if isinstance(running, Tensor):
        return running.any()
    return bool(running.sum() > DROP_BELOW * len(running)) if droppable else bool(running.any())


def _with_rows(full: Carry, rows: Tensor | None, part: Carry) -> Carry:
    """`full` with `part` in its `rows`; the method's memory is left out, as it is no longer needed."""
    assert rows is not None
    if part.status is None:
        part = part._replace(status=filled(part.steps, int(Status.RUNNING)))

    def placed(whole: np.ndarray, part: np.ndarray) -> np.ndarray:
        whole = np.array(whole)
        whole[to_host(rows)] = part
        return whole

    return Carry(full.y.index_copy(0, rows, part.y), (), *pytree.tree_map(placed, full[2:], part[2:]))


class Ended(NamedTuple):
    """How a solve ended: the codes `(B,)` of `Status`, and the times `(B,)` reached."""

    status: Tensor
    t: Tensor

    @property
    def finished(self) -> Tensor:
        """Which samples `(B,)` ended successfully."""
        return is_success(self.status)

    def late(self, times: Tensor) -> Tensor:
        """Which outputs `(B, T - 2)` between the ends are after the event that ended a sample."""
        times = times.detach()
        sign = (times[:, -1:] - times[:, :1]).sign()
        after = sign * (times[:, 1:-1] - self.t.detach().unsqueeze(1)) > 0
        return after & (self.status == int(Status.EVENT)).unsqueeze(1)


def assemble(outputs: Outputs, y1: Tensor, ended: Ended | None) -> Tensor:
    """All outputs `(B, T, n)`, the last of which is y1 `(B, n)`, with NaN at times that were not reached.

    `ended` is None if all were reached.
    """
    times, y0 = outputs.times, outputs.y0
    inner = None if times.shape[1] == 2 else outputs.found
    if ended is not None and inner is not None and maybe_any(late := ended.late(times)):
        inner = torch.where(late.unsqueeze(2), y1.unsqueeze(1), inner)
    if ended is not None and maybe_any(~is_success(to_host(ended.status))):
        y1 = torch.where(ended.finished.unsqueeze(1), y1, float("nan"))
    if inner is None:
        return torch.stack([y0, y1], dim=1)
    return torch.cat([y0.unsqueeze(1), inner, y1.unsqueeze(1)], dim=1)
