"""One solve that will be differentiated: how it is done, and its backward pass through the recorded steps."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.func import vmap

from implicitly.compiled import Check
from implicitly.condition import users_line
from implicitly.host import maybe_any, on_host, to_host
from implicitly.implicit import constant
from implicitly.ode.events import Event
from implicitly.ode.graph import integrate_as_graph
from implicitly.ode.graph_adjoint import sweep_as_graph
from implicitly.ode.hybrid import HybridStepper
from implicitly.ode.integrate import (
    USUAL,
    Bound,
    Ended,
    Integrated,
    Outputs,
    Piece,
    Stepper,
    assemble,
    integrate,
)
from implicitly.ode.kept import Kept, Meter
from implicitly.ode.method import Method, Step
from implicitly.ode.planned import integrate_planned, planned
from implicitly.ode.problem import Field
from implicitly.ode.record import Record, State, Taken, unstacked
from implicitly.ode.replay import again, finite_start, replay, restart, stand_ins, states_before
from implicitly.ode.stiffness import Halt
from implicitly.pullback import pulled_each, pushed
from implicitly.solution import ConvergenceWarning, Status, is_success
from implicitly.transforms import is_cpu, keeps_graph, unwrapped

# The index in `Integrated` of the times that samples reached, and that of the times of events in the outputs of
# `adjoints._Trajectory`, which are those of `Integrated.usual`, the steps, and the last two of `Integrated`.
REACHED = Integrated._fields.index("t")
EVENTS = USUAL + len(Taken._fields)

# One call of autograd pulls back through at most this many steps, from states of at most this many bytes together.
# Fewer calls save overhead, which matters for small states only; the limits keep the memory small.
AT_ONCE = 4
AT_ONCE_BYTES = 2**13

# Called after a solve where some sample did not reach the end, with the method, the result, a `Halt` that helps to
# explain it, and the number of calls of f.
Report = Callable[[Method, Integrated, Halt, int], None]


def _unnoted() -> Callable[[], AbstractContextManager[None]]:
    """The default `snapshot`: restores nothing, for solves after which f is not called again."""
    return nullcontext


@dataclass
class Work:
    """A solve that will be differentiated: how it is done, and what it leaves for its derivative.

    With a `key` it should run as one graph (see `Problem` for the key and for `check`); `as_graph` says whether it
    did. `snapshot` is that of `Condition`. `known` holds the result, the final states and the number of calls if
    the solve has been done before. `failed` says whether any sample failed, and `warns` whether to warn about
    those that make a gradient NaN. `most` is the largest number of events that any sample had. With a `meter`,
    autograd records the steps while they are taken, and `kept` is that recording.
    """

    method: Method
    field: Callable[..., Field]
    sample_dims: tuple[int | None, ...] | None
    report: Report
    record: Record | None
    calls: int = 0
    events: tuple[Event, ...] = ()
    key: Hashable | None = None
    check: Check | None = None
    listen: Callable[[int], None] | None = None
    arc_length: bool = False
    as_graph: bool = False
    known: tuple[Integrated, Tensor, int] | None = None
    snapshot: Callable[[], Callable[[], AbstractContextManager[None]]] = _unnoted
    failed: bool = False
    warns: bool = False
    most: int = 0
    meter: Meter | None = None
    kept: Kept | None = None

    @property
    def can_be_kept(self) -> bool:
        """Whether autograd may record the steps of this solve while they are taken."""
        return self.method.nodes is not None and self.key is None and not self.hybrid

    @property
    def hybrid(self) -> bool:
        """Whether steps may end at times not known in advance; the times reached are then differentiable."""
        return bool(self.events or self.method.tstops or self.arc_length)

    @property
    def places(self) -> tuple[int, ...]:
        """The indices of those outputs of `_Trajectory` that have a derivative, in the order of `outputs`."""
        return (0, REACHED, EVENTS)[: 3 if self.events else 2 if self.hybrid else 1]

    @property
    def graphs(self) -> tuple[Hashable, Callable[..., Stepper]]:
        """The key that graphs are cached under, and the function that makes their stepper.

        Graphs may outlive a solve, so the stepper holds nothing that belongs to this one. The graph of the solve
        does not depend on what its derivative holds constant.
        """
        bare = replace(self, record=None, check=None, listen=None, report=silent, known=None, snapshot=_unnoted)
        return (self.key, self.method), partial(bare.stepper, False)

    def run(self, times: Tensor, y0: Tensor, k0: Tensor | None, *theta: Tensor) -> Integrated:
        """Solve through `times` `(B, T)`; `k0`, the slope at `y0`, is None if the graph evaluates it."""
        found = None
        if self.key is not None:
            key, stepper = self.graphs
            found = integrate_as_graph(key, stepper, times, y0, theta, self.record, self.check)
            if found is None and self.record is not None:
                self.record = Record()  # drops what the graph recorded before it had to give up
        self.as_graph = found is not None
        known, self.known = self.known, None  # a reference cycle otherwise: an output of autograd refers to this
        found, y, calls = found or known or self._stepwise(times, y0, k0, *theta)
        self.calls += calls
        if found.event_times is not None:
            self.most = found.event_times.shape[1]
        # Checked here, where the host has waited for the accelerator anyway, so that the derivative need not wait.
        usual = not bool(to_host(found.status).any())  # all CONVERGED, which is 0
        self.failed = not usual and not bool(is_success(found.status).all())
        if not usual:
            halt = Halt(self.field, theta, found.t, y, partial(self._tried, times, theta, found, y))
            self.report(self.method, found, halt, self.calls)
        return found

    def run_kept(self, times: Tensor, y0: Tensor, k0: Tensor, *theta: Tensor) -> Integrated:
        """Like `run`, but records the steps for the first backward pass, unless the recording gets too large."""
        inputs = (times, y0, *theta)
        start, slope = y0.detach().requires_grad_(), k0.detach().requires_grad_()
        leaves = tuple(_leaves(inputs, [i for i, x in enumerate(inputs) if x.requires_grad])[2:])
        with torch.enable_grad():
            found = self.run(times, start, slope, *leaves)
        meter, self.meter, record = self.meter, None, self.record
        assert meter is not None
        assert record is not None
        # As in `solve_unrolled`, a graph that contains NaN is of no use.
        if not (meter.full or self.failed) and record.clean and found.values.requires_grad:
            self.kept = Kept(found.values, start, slope, leaves, meter.spent)
        return found._replace(values=found.values.detach())

    def _tried(self, times: Tensor, theta: tuple[Tensor, ...], found: Integrated, y: Tensor) -> Step:
        """One more step, tried from the states `y` `(B, n)` where a solve through `times` ended."""
        host = is_cpu(times)
        stepper = self.stepper(host, torch.stack([found.t, times[:, -1]], dim=1), *theta)
        slope, length = stepper.bound.F.at(stepper.begin, y), found.length
        if self.method.dt is None:  # the last try, which met NaN or inf, was at most this much longer
            met = found.status == int(Status.NON_FINITE)
            length = torch.where(met, length / self.method.controller.shrink, length)
        start = stepper.start(y, slope, to_host(length) if host else length)
        return stepper.try_step(start)[0]

    def _stepwise(
        self, times: Tensor, y0: Tensor, k0: Tensor | None, *theta: Tensor
    ) -> tuple[Integrated, Tensor, int]:
        """The solve in a Python loop."""
        if k0 is None:
            assert self.check is not None
            k0 = self.check.of().detach()
            self.calls += 1
        if (found := self._planned(times, y0, k0, *theta)) is not None:
            return found
        host = not torch.compiler.is_dynamo_compiling() and is_cpu(times)
        return integrate(self.stepper(host, times, *theta), y0, k0, self.record)

    def _planned(
        self, times: Tensor, y0: Tensor, k0: Tensor, *theta: Tensor
    ) -> tuple[Integrated, Tensor, int] | None:
        """The solve with steps that are planned in advance; None if that is impossible, or if a sample fails.

        Which sample failed, and when, is then found by the loop that checks after each step.
        """
        plan = None if self.hybrid else planned(self.method, times)
        if plan is None:
            return None
        record = None if self.record is None else Record()
        F = self.metered(*theta)
        found = integrate_planned(plan, self.method, F, times, y0, k0, record)
        if found is None:
            self.calls += F.calls
            return None
        self.record = record
        return *found, F.calls

    @property
    def metered(self) -> Callable[..., Field]:
        """The field, with its calls measured by the `meter` if there is one."""
        return self.field if self.meter is None else self.meter.of(self.field)

    def stepper(
        self, host: bool, times: Tensor, *theta: Tensor, once: bool = False, moving: bool | None = None
    ) -> Stepper:
        """The stepper for these inputs; see `Field` for `once`, and `Stepper` for `moving`."""
        bound = Bound(self.metered, theta, self.sample_dims, once)
        if self.hybrid:
            return HybridStepper(
                self.method, bound, times, host, moving, events=self.events, arc_length=self.arc_length
            )
        return Stepper(self.method, bound, times, host, moving)

    def swept(
        self, steps: tuple[Tensor, ...], ended: Ended, inputs: tuple[Tensor, ...], wanted: list[int], *bars: Tensor
    ) -> list[Tensor]:
        """The result of `sweep`, or zeros if no sample finished."""
        if (kept := self.kept) is not None:
            retain = keeps_graph()
            self.kept = kept if retain else None
            return kept.pull(self.field, inputs[0][:, 0], bars[0], wanted, retain)
        if not self.failed:
            return self._swept(steps, ended, inputs, wanted, *bars)
        if not bool(ended.finished.any()):
            return [torch.zeros_like(inputs[i]) for i in wanted]
        work, steps, good, inputs = self._of_good(steps, ended, inputs)
        return work._swept(steps, good, inputs, wanted, *bars)

    def _swept(
        self, steps: tuple[Tensor, ...], ended: Ended, inputs: tuple[Tensor, ...], wanted: list[int], *bars: Tensor
    ) -> list[Tensor]:
        """The result of `sweep`, computed as one graph if the solve was one."""
        record = self.record
        assert record is not None
        if self.as_graph and steps[0].numel() and bars[0].ndim == 3:
            key, stepper = self.graphs
            key = (key, self.arc_length)
            found = sweep_as_graph(key, self.method, stepper, record, steps, ended, inputs, wanted, *bars)
            if found is not None:
                gradients, calls = found
                if self.listen is not None:
                    self.listen(int(calls))
                return gradients
        return sweep(self, steps, ended, inputs, wanted, *bars)

    def outputs(
        self, steps: tuple[Tensor, ...], ended: Ended, times: Tensor, y0: Tensor, *theta: Tensor
    ) -> tuple[Tensor, ...]:
        """The outputs of the recorded steps, computed again by plain differentiable operations.

        These are the values `(B, T, n)`; if `hybrid`, the times `(B,)` reached; and if there are events, their
        times `(B, K)`, with 0 after the last. All are 0 for failed samples.
        """
        inputs = (times, y0, *theta)
        if (self.failed or len(y0) == 0) and not maybe_any(ended.finished):
            values, *others = self.shapes(times, y0)
            return tuple(constant(x, inputs) for x in (y0.new_zeros(values), *map(times.new_zeros, others)))
        work, steps, good, (times, y0, *rest) = self._of_good(steps, ended, inputs)
        host = on_host(times, *steps)
        stepper, most = work.stepper(host, times, *rest), self.most
        values, t, events = replay(stepper, unstacked(steps, host), y0, good, most)
        values = torch.where(ended.finished[:, None, None], values, 0.0)
        if t is None:
            return (values,)
        t = torch.where(ended.finished, t, 0.0)
        return (values, t, torch.where(ended.finished[:, None], events, 0.0)) if self.events else (values, t)

    def shapes(self, times: Tensor, y0: Tensor) -> tuple[tuple[int, ...], ...]:
        """The shapes of `outputs`."""
        batch, count = len(y0), 3 if self.events else 2 if self.hybrid else 1
        return ((batch, times.shape[1], y0.shape[1]), (batch,), (batch, self.most))[:count]

    def joined(self, steps: tuple[Tensor, ...], ended: Ended, times: Tensor, y0: Tensor, *theta: Tensor) -> Tensor:
        """`outputs`, flattened and concatenated to one tensor."""
        return torch.cat([x.flatten() for x in self.outputs(steps, ended, times, y0, *theta)])

    def _of_good(
        self, steps: tuple[Tensor, ...], ended: Ended, inputs: tuple[Tensor, ...]
    ) -> tuple[Work, tuple[Tensor, ...], Ended, tuple[Tensor, ...]]:
        """The same solve, with each failed sample replaced by one that finished (its steps, states and inputs).

        If it is not known which args have one entry per sample, the args cannot be replaced. Then only samples
        that took no step are replaced: f has no slope at their states, while it had one at those of the others.
        """
        if not self.failed:
            return self, steps, ended, inputs
        finished, accepted = ended.finished, steps[Taken._fields.index("accepted")]
        rows = stand_ins(finished, finished if self.sample_dims is not None else finished | accepted.any(1))
        dims = (0, 0, *(self.sample_dims or (None,) * (len(inputs) - 2)))
        inputs = tuple(x if d is None else x.index_select(d, rows) for x, d in zip(inputs, dims))
        steps, ended = tuple(x[rows] for x in steps), Ended(*(x[rows] for x in ended))
        record = None if self.record is None else replace(self.record, stand_ins=rows)
        return replace(self, record=record), steps, ended, inputs

    def mapped(self, size: int, dims: Sequence[int | None]) -> Work:
        """This solve for `size` times as many samples, those that `vmap` maps; `dims` are those of theta."""

        def field(*theta: Tensor) -> Field:
            def over(call: Callable[..., Tensor], t: Tensor, y: Tensor) -> Tensor:
                each = vmap(
                    lambda t, y, *th: call(self.field(*th), t, y),
                    in_dims=(0, 0, *dims),
                    randomness="different",
                )
                found = each(t.reshape(size, -1), y.reshape(size, -1, y.shape[1]), *theta)
                return found.flatten(0, 1)

            return Field(
                torch.unbind,
                lambda t, y: over(lambda F, t, y: F.at(t, y), t, y),
                field,
                theta,
                watch=lambda i, t, y: over(lambda F, t, y: F.watch(i, t, y), t, y),
                jump=lambda i, t, y: over(lambda F, t, y: F.jump(i, t, y), t, y),
            )

        return replace(self, field=field, sample_dims=None, key=None)  # graphs are of f, not of the mapped field

    def tell_of_nan(self, finished: Tensor, gradients: Sequence[Tensor]) -> None:
        """Warn if failed samples that could not be left out made any of the `gradients` NaN."""
        if not (self.warns and self.failed) or self.sample_dims is not None or not maybe_any(finished):
            return
        for x in gradients:
            if not bool(unwrapped(x).isfinite().all()):
                warnings.warn(
                    f"the gradient of a tensor of shape {tuple(x.shape)} is NaN, because f has no finite "
                    "derivative at samples that did not reach the end. Use in_dims to say which args have one "
                    "entry per sample: then such samples are left out",
                    ConvergenceWarning,
                    stacklevel=users_line(),
                )


def silent(method: Method, found: Integrated, halt: Halt, calls: int) -> None:
    """The report that says nothing, for a solve that has been reported on before."""


def sweep(
    work: Work,
    stacked: tuple[Tensor, ...],
    ended: Ended,
    inputs: tuple[Tensor, ...],
    wanted: list[int],
    g: Tensor,
    *reached: Tensor,
) -> list[Tensor]:
    """The backward sweep over the steps: the cotangents of the `wanted` inputs (times, y0, theta).

    `g` `(B, T, n)` are the cotangents of the outputs; `reached` are those of the times reached `(B,)` if states
    carry these, and those of the times of events `(B, K)` if there are events. Where g has further last
    dimensions, so has the result.
    """
    (times, y0, *theta), failed = inputs, work.failed and maybe_any(~ended.finished)
    # y0 enters through the first state only; its cotangent is what is left at the end.
    shared = [i for i in wanted if i != 1]
    sums = {i: _zeros_of(inputs[i], g.shape[3:]) for i in shared}
    leaves, record, host = _leaves(inputs, shared), work.record, on_host(times)
    assert record is not None
    reached, clocks = reached[:1], None if len(reached) < 2 else _clock_bars(stacked, reached[1])
    steps, plain = unstacked(stacked, host), work.stepper(host, times, *theta)
    stepper = work.stepper(host, leaves[0], *leaves[2:], once=True)
    y_bar, memory_bar = g[:, -1], None
    if reached and times.shape[1] > 2:  # outputs after the end of a sample repeat its last state
        late = ended.late(times)
        y_bar = y_bar + torch.where(late.reshape(*late.shape, *(1,) * (g.ndim - 2)), g[:, 1:-1], 0.0).sum(1)
    size = 1 if failed else _at_once(y0)
    starts: list[tuple[int, State]] = []
    stop = len(steps)
    while stop:
        if not starts:
            starts = states_before(plain, record, steps, stop, size)
        begin, state = starts.pop()
        start = (state.y, *state.memory)
        start = (finite_start(x, ended.finished) for x in start) if failed else start
        y, *memory = (x.detach().requires_grad_() for x in start)
        after, pieces, shown = _recorded(stepper, steps[begin:stop], State(y, tuple(memory)))
        ticks = [] if clocks is None else list(zip(shown, clocks[:, begin:stop].split(1, dim=1)))
        stop = begin
        if memory_bar is None:
            memory_bar = [_zeros_of(m, g.shape[3:]) for m in after.memory]
            memory_bar[len(memory_bar) - len(reached) :] = [x.unsqueeze(1) for x in reached]
        outputs = [after.y, *after.memory, *(p.values for p in pieces), *(t for t, _ in ticks)]
        bars = [y_bar, *memory_bar, *(g[p.rows, p.columns] for p in pieces), *(bar for _, bar in ticks)]
        y_bar, *found = pulled_each(outputs, bars, [y, *memory, *(leaves[i] for i in shared)])
        memory_bar, found = found[: len(memory)], found[len(memory) :]
        for j, gradient in zip(shared, found):
            sums[j] += gradient
    y = finite_start(y0, ended.finished).detach().requires_grad_()
    with torch.enable_grad():
        memory = restart(stepper, y).memory
    first, *found = pulled_each(list(memory), memory_bar or [], [y, *(leaves[i] for i in shared)])
    for j, gradient in zip(shared, found):
        sums[j] += gradient
    return [y_bar + first + g[:, 0] if i == 1 else sums[i] for i in wanted]


def push_steps(
    work: Work,
    stacked: tuple[Tensor, ...],
    inputs: tuple[Tensor, ...],
    moving: list[int],
    tangents: Sequence[Tensor],
) -> Tensor:
    """The forward sweep over the steps: the tangent `(B, T, n)` of the outputs.

    `tangents` are those of the `moving` inputs (times, y0, theta). Where these have further last dimensions, so
    has the result. Memory does not grow with the number of steps. For solves that reached the last of the `times`
    in all samples.
    """
    times, y0, *_ = inputs
    shared = [i for i in moving if i != 1]
    leaves, host, size = _leaves(inputs, shared), on_host(times), _at_once(y0)
    stepper = work.stepper(host, leaves[0], *leaves[2:], once=True)
    given = dict(zip(moving, tangents))
    several = tangents[0].shape[inputs[moving[0]].ndim :]
    dy, along = given.get(1, _zeros_of(y0, several)), [given[i] for i in shared]
    y, parameters = y0.detach().requires_grad_(), [leaves[i] for i in shared]
    with torch.enable_grad():
        state = restart(stepper, y)
    change = (dy, *pushed(state.memory, [y, *parameters], [dy, *along]))
    steps, outputs = unstacked(stacked, host), Outputs(times, dy)
    for begin in range(0, len(steps), size):
        y, *memory = (x.detach().requires_grad_() for x in (state.y, *state.memory))
        state, pieces, _ = _recorded(stepper, steps[begin : begin + size], State(y, tuple(memory)))
        results = [state.y, *state.memory, *(p.values for p in pieces)]
        moved = pushed(results, [y, *memory, *parameters], [*change, *along])
        change, inner = moved[: 1 + len(memory)], moved[1 + len(memory) :]
        outputs.add(piece._replace(values=value) for piece, value in zip(pieces, inner))
    return assemble(outputs, change[0], None)


def _zeros_of(x: Tensor, several: Sequence[int]) -> Tensor:
    """Zeros like x; if there are `several`, in further last dimensions."""
    return x.new_zeros((*x.shape, *several)) if several else torch.zeros_like(x)


def _leaves(inputs: tuple[Tensor, ...], shared: list[int]) -> list[Tensor]:
    """Leaf tensors in place of the inputs (times, y0, theta), for derivatives with respect to the `shared` ones.

    Parameters are used directly, which saves swapping them at every call, unless a hook of theirs would notice.
    A tensor that was computed from others is replaced, since autograd would go on to those. So is a tensor that
    occurs twice, as an arg and as a parameter, since each would get the gradient of both.
    """
    return [
        x
        if i > 1 and stays(x, inputs) and (x.requires_grad or i not in shared)
        else x.detach().requires_grad_(i in shared)
        for i, x in enumerate(inputs)
    ]


@torch.enable_grad()
def _recorded(stepper: Stepper, steps: list[Taken], state: State) -> tuple[State, list[Piece], list[Tensor]]:
    """Take recorded `steps` from `state` again, with an autograd graph.

    Returns the state after them, the outputs that they pass, and the last tensor of the memory (of the method or
    clock) after each step.
    """
    pieces: list[Piece] = []
    carried: list[Tensor] = []
    for taken in steps:
        _, state, passed = again(stepper, taken, state)
        pieces += passed
        carried += state.memory[-1:]
    return state, pieces, carried


def _clock_bars(stacked: tuple[Tensor, ...], g: Tensor) -> Tensor:
    """The cotangents `(B, N)` of the times at the ends of recorded steps, given those `g` `(B, K)` of events."""
    happens = Taken(*stacked).ends > 0
    if not g.shape[1]:
        return g.new_zeros(happens.shape)
    place = (happens.cumsum(1) - 1).clamp(min=0, max=g.shape[1] - 1)
    return torch.where(happens, g.gather(1, place), 0.0)


def _at_once(y0: Tensor) -> int:
    """How many steps from `y0` `(B, n)` one call of autograd pulls back through.

    For small states, the overhead of calling autograd would exceed the cost of a step; for large ones, memory
    matters more.
    """
    return min(AT_ONCE, max(1, AT_ONCE_BYTES // max(1, y0.numel() * y0.element_size())))


def stays(x: Tensor, inputs: Sequence[Tensor]) -> bool:
    """Whether derivatives may be taken with respect to `x`, one of the `inputs`, without replacing it."""
    return x.is_leaf and not x._backward_hooks and sum(x is other for other in inputs) == 1
