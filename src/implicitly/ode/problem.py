"""The user's input to `odeint`, checked and flattened: initial state, times, and the vector field on `(B, n)`."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from implicitly.changing import told_of_draws
from implicitly.compiled import Check
from implicitly.functions import Opened, Opening, like, open_function, refuse_captured, watched
from implicitly.host import Array, all_now, captured, library, on_host, to_host, to_tensor
from implicitly.ode.combine import stage_times
from implicitly.ode.events import Event, check_number
from implicitly.ode.ragged import told_apart
from implicitly.problem import sample_dims_of
from implicitly.transforms import is_batched, is_wrapped, loses, unhooked, unwrapped
from implicitly.tree import Layout

# Up to this many times are checked one by one, in Python.
FEW = 64


@dataclass
class Field:
    """The vector field: slopes `(B, n)` of states `(B, n)`.

    It is called as `F(moment, y)`, where a moment is a time in the form that f sees, from `F.f_times(times)`.

    Attributes:
        show: turns times `(S, B)` into S moments, each in the form that f sees.
        slope: f at a moment and a state `(B, n)`.
        bind: returns the field for other theta.
        theta: the tensors that it depends on.
        calls: how often f was called, not counting calls in the loops of a traced graph.
        loops: the numbers of calls in such loops, as tensors.
        notes: what a method stores only to save work, such as a Jacobian.
        once: whether the result is differentiated only once, in reverse mode, by this library itself.
        again: whether the steps were accepted before and are taken again, so they cannot be made shorter.
        found: known slopes `(B, n)` of all stages of the current step, which then only has to be differentiated.
        last: for which samples the current step, if accepted, reaches the end.
        before: the number of calls before the current step.
        watch: the value `(B,)` of g of an event, given its index, at times `(B,)` and states `(B, n)`.
        jump: the states `(B, n)` from which samples continue after an event.
    """

    show: Callable[[Tensor], Sequence[Tensor]]
    slope: Callable[..., Tensor]
    bind: Callable[..., Field]
    theta: tuple[Tensor, ...]
    calls: int = 0
    loops: list[Tensor] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)
    once: bool = False
    again: bool = False
    found: tuple[Tensor, ...] = ()
    last: Array | None = None
    before: int = 0
    watch: Callable[[int, Tensor, Tensor], Tensor] | None = None
    jump: Callable[[int, Tensor, Tensor], Tensor] | None = None

    def begin(self, last: Array) -> None:
        """Note that a step begins, and for which samples it is the `last`."""
        self.last, self.before = last, self.calls

    def f_times(self, times: Array) -> Sequence[Tensor]:
        """Times `(S, B)`, one row per call, as f sees them."""
        return self.show(to_tensor(times))

    def stages(self, t: Array | Sequence[Tensor], dt: Array, nodes: tuple[float, ...]) -> Sequence[Tensor]:
        """The times t + c dt, for the nodes c, as f sees them; t itself if it already is a tuple of those."""
        return t if isinstance(t, tuple) else self.f_times(stage_times(t, dt, nodes))

    def __call__(self, moment: Tensor, y: Tensor) -> Tensor:
        """The slopes at a moment."""
        self.calls += 1
        return self.slope(moment, y)

    def at(self, t: Array, y: Tensor) -> Tensor:
        """The slopes at times `(B,)`."""
        return self(self.f_times(t[None])[0], y)


@dataclass(frozen=True)
class Problem:
    """The initial value problem dy/dt = f(t, y, *args), y(t[0]) = y0, with the times at which y is wanted.

    Attributes:
        y0: the initial state `(B, n)`.
        k0: its slope `(B, n)`, evaluated once to check what f returns; None if a graph evaluates it, which calls
            `check` before its first use.
        times: `(B, T)`, or `(1, T)` if all samples share them.
        theta: the tensors that f depends on besides t and y.
        sample_dims: for each of theta the dimension that holds the samples, None where shared; None: not known.
        calls: the number of calls of f that checking took.
        events: the events; theta includes the tensors that their functions depend on.
        check: evaluates k0, and raises TypeError / ValueError if f returns or depends on something it must not.
        key: for a solve as one graph, the cache key: all that determines the graph besides tensors and the method.
        warns: whether to warn about failed samples that make a gradient NaN.
        places: `(B, T)` for each of the user's times its index in `times`, if series repeat their last time; None:
            they are the same.
    """

    opened: Opened
    layout: Layout
    y0: Tensor
    k0: Tensor | None
    times: Tensor
    theta: tuple[Tensor, ...]
    sample_dims: tuple[int | None, ...] | None
    check: Check
    calls: int = 1
    events: tuple[Event, ...] = ()
    key: Hashable | None = None
    warns: bool = False
    places: Tensor | None = None

    @classmethod
    def of(
        cls,
        f: Callable[..., Any],
        y0: Any,
        t: Any,
        args: tuple[Any, ...],
        *,
        batch_dims: int,
        in_dims: Any,
        recording: bool,
        events: tuple[Event, ...] = (),
        as_graph: bool = False,
    ) -> Problem:
        """Check the arguments, and that f returns the structure of y0; raises TypeError / ValueError.

        A solve `as_graph` needs args that can be compared (for the cache), and checks f when the graph is made.
        """
        if not callable(f):
            raise TypeError(f"f must be callable, got a {type(f).__name__}")
        layout = Layout.of(y0, batch_dims, "y0")
        times, places = series_of(t, layout)
        every = _at_once(f, events)
        opened, theta, _ = opening = open_function(every, args, layout.device, every if events else f)
        sample_dims = sample_dims_of(opening, args, layout, in_dims)
        start, checking = layout.pack(y0), loses(recording)

        def known() -> tuple[Tensor, ...]:
            probe, moment = start, times[:, 0].expand(layout.batch)
            if not recording:
                probe, moment = start.detach().clone(), moment.detach()
            return probe, moment, *((x.detach() for x in theta) if checking else theta)

        def slope() -> Tensor:
            probe, moment, *given = inputs = known()
            show = _shown(layout)
            # While checking, no input requires a gradient, so the result must not require one either.
            with (
                torch.set_grad_enabled(checking or (recording and torch.is_grad_enabled())),
                told_of_draws(f, () if recording else opened.parts, layout.device),
                nullcontext() if recording else unhooked(),
            ):
                value = watched(lambda y: opened((0, show(moment[None])[0], layout.unpack(y)), *given), probe)
            cast = opened.autocast
            with nullcontext() if cast is None else torch.autocast(layout.device.type, cast):  # off in a solve
                layout.check(value, "y0")
            k0 = layout.pack(value)
            if checking:
                refuse_captured(opening, k0, inputs, inputs=2)
            return k0

        later = as_graph and not any(is_wrapped(x) for x in (start, times, *theta))
        k0 = None if later else slope()
        if events:
            _check_events(events, opening, layout, known(), checking)
        key, check = opened.key(f, layout) if as_graph else None, Check(slope, checking)
        found = cls(opened, layout, start, k0, times, theta, sample_dims, check, int(not later), events, key)
        return found if places is None else replace(found, places=places)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that f computes in, which limits the errors that can be resolved."""
        return self.opened.autocast or self.layout.dtype

    @property
    def evaluated(self) -> Problem:
        """This problem, with k0 evaluated."""
        return self if self.k0 is not None else replace(self, k0=self.check.of(), calls=1)

    def rows(self, times: Tensor) -> Tensor:
        """`times`, expanded to `(B, T)`."""
        return times.expand(self.y0.shape[0], -1)

    def asked(self, values: Tensor) -> Any:
        """Outputs `(B, T, n)` at `times` as outputs at the user's times, in the form of `stacked`."""
        if self.places is not None:
            values = values.gather(1, self.places.unsqueeze(2).expand(-1, -1, values.shape[2]))
        return self.stacked(values)

    def stacked(self, values: Tensor) -> Any:
        """Outputs `(B, T, n)` as the user's pytree, each tensor `(T, *y0.shape)`."""
        batch, count, n = values.shape
        plain, rows = self.layout.plain, values.transpose(0, 1)
        if plain is not None:
            return rows.reshape((count, batch, *plain) if self.layout.batch_dims else (count, *plain))
        layout = replace(self.layout, batch=batch * count, batch_dims=1)
        value = layout.unpack(rows.reshape(count * batch, n))
        if self.layout.batch_dims == 0:
            return value
        return pytree.tree_map(lambda x: x.reshape(count, batch, *x.shape[1:]), value)

    @property
    def field(self) -> Callable[..., Field]:
        """The function that maps theta to the `Field`, usable by objects that outlive this problem."""
        return partial(field_of, self.opened, self.layout, bool(self.events))


def _at_once(f: Callable[..., Any], events: tuple[Event, ...]) -> Callable[..., Any]:
    """f and the g and restart of all events as one function, selected by the first entry of its state.

    As one function, so that modules which only an event uses are found, too.
    """
    if not events:
        return lambda call, *args: f(call[1], call[2], *args)
    maps = (f, *(m for e in events for m in (e.g, e.restart)))

    def at_once(call: tuple[int, Tensor, Any], *args: Any) -> Any:
        which, *moment = call
        call_of = maps[which]
        assert call_of is not None
        return call_of(*moment, *args)

    return at_once


def field_of(opened: Opened, layout: Layout, has_events: bool, *theta: Tensor) -> Field:
    """The `Field` of f at `theta`; with events, it includes their g and restart."""
    call, show = opened.at(*theta), _shown(layout)
    bind = partial(field_of, opened, layout, has_events)

    def slope(moment: Tensor, y: Tensor) -> Tensor:
        return like(layout.pack(call((0, moment, layout.unpack(y)))), y)

    if not has_events:
        return Field(show, slope, bind, theta)

    def watch(i: int, t: Tensor, y: Tensor) -> Tensor:
        value = call((1 + 2 * i, show(t[None])[0], layout.unpack(y)))
        return value.reshape(y.shape[0]).to(layout.work_dtype)

    def jump(i: int, t: Tensor, y: Tensor) -> Tensor:
        return layout.pack(call((2 + 2 * i, show(t[None])[0], layout.unpack(y))))

    return Field(show, slope, bind, theta, watch=watch, jump=jump)


def _check_events(
    events: tuple[Event, ...], opening: Opening, layout: Layout, known: tuple[Tensor, ...], checking: bool
) -> None:
    """Raise TypeError / ValueError if g or restart returns something invalid at the start, or captures tensors."""
    (probe, moment, *theta), opened = known, opening.opened
    for i, event in enumerate(events):
        for which, name in ((1 + 2 * i, "g"), (2 + 2 * i, "restart"))[: 1 if event.restart is None else 2]:
            with torch.enable_grad(), unhooked():
                call = (which, _shown(layout)(moment[None])[0])
                value = watched(lambda y, call=call: opened((*call, layout.unpack(y)), *theta), probe)
            if name == "g":
                check_number(value, i, layout)
            try:
                if name == "restart":
                    layout.check(value, "y0")
                rows = value if name == "g" else layout.pack(value)
                if checking:
                    refuse_captured(opening, rows, known, inputs=2)
            except (TypeError, ValueError) as error:
                raise type(error)(f"{name} of event {i}, in place of f: {error}") from error


def _shown(layout: Layout) -> Callable[[Tensor], Sequence[Tensor]]:
    """Turns times into the form that f sees.

    This is 0-d for one system, otherwise `(B, 1, ..., 1)` with as many dimensions as the first tensor of y.
    """
    if layout.batch_dims == 0:
        return lambda times: times[:, 0].unbind()
    ones = (1,) * len(layout.leaves[0].shape)
    return lambda times: times.reshape(len(times), -1, *ones).unbind()


def times_of(t: Any, layout: Layout) -> Tensor:
    """`t` as `(B, T)` or `(1, T)`; raises TypeError / ValueError for invalid times."""
    rows = _rows_of(t, layout)
    seen = to_host(rows) if on_host(rows) else rows.detach()
    if not captured() and not all_now(library(seen).isfinite(seen)):
        raise ValueError("t holds NaN or inf")
    return rows


def series_of(t: Any, layout: Layout) -> tuple[Tensor, Tensor | None]:
    """The start and later times as `(B, T)` or `(1, T)`, and `Problem.places` if some samples have fewer times.

    Raises TypeError / ValueError for invalid times.
    """
    rows = _rows_of(t, layout)
    of_samples = len(rows) > 1 or _is_nested(t)
    if of_samples and rows.shape[1] == 1 and not captured():  # all series consist of one time
        rows = rows.expand(-1, 2)
        return rows, torch.zeros(len(rows), 1, dtype=torch.int64, device=rows.device)
    if rows.shape[1] < 2:
        raise ValueError(f"t must contain the start and at least one other time, got {rows.shape[1]} times")
    if captured():  # then they are numbers, which `unroll.plan` has checked
        return rows, None
    host = on_host(rows)
    if host and rows.numel() <= FEW and all(map(_in_order, rows.tolist())):
        return rows, None  # the usual case
    seen = to_host(rows) if host else rows.detach()
    gaps = seen[:, 1:] - seen[:, :-1]
    if all_now(gaps > 0) and all_now(library(seen).isfinite(seen[:, -1] - seen[:, 0])):
        return rows, None
    if not all_now(library(seen).isfinite(seen)):
        raise ValueError("t holds NaN or inf")
    if all_now((gaps > 0).all(1) | (gaps < 0).all(1)):
        return rows, None
    mapped = is_batched(rows)
    told = told_apart(rows) if of_samples and not mapped else None
    if told is None:
        raise ValueError(_MAPPED if mapped else _disorder(unwrapped(rows.detach())))
    return told


def _is_nested(t: Any) -> bool:
    """Whether times have a row for each sample."""
    if isinstance(t, Tensor | np.ndarray):
        return t.ndim == 2
    first = t[0]
    return first.ndim == 1 if isinstance(first, Tensor | np.ndarray) else isinstance(first, Sequence)


def _in_order(row: list[float]) -> bool:
    """Whether the numbers are finite and strictly increase, or strictly decrease."""
    which = operator.lt if row[0] < row[1] else operator.gt
    return all(map(which, row, row[1:])) and math.isfinite(row[-1] - row[0])


def _rows_of(t: Any, layout: Layout) -> Tensor:
    """`t` as `(B, T)` or `(1, T)`."""
    if not isinstance(t, Tensor):
        if not isinstance(t, Sequence | np.ndarray) or isinstance(t, str):
            raise TypeError(f"t must be a tensor, an array or a sequence of times, got a {type(t).__name__}")
        try:
            like = {"dtype": layout.work_dtype, "device": layout.device}
            if any(isinstance(x, Tensor) for x in t):  # each with its derivative
                t = torch.stack([torch.as_tensor(x, **like) for x in t])
            elif torch.compiler.is_dynamo_compiling() or not captured():
                t = torch.as_tensor(t, **like)
            else:  # a CUDA graph holds no copy from the host
                t = torch.stack([torch.full((), x, **like) for x in t])
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"t must hold numbers only, got {t!r}: {error}") from error
    if t.dtype != layout.work_dtype or t.device != layout.device:
        # For y0 in bfloat16 or a complex dtype, times have another dtype.
        wanted = "y0" if layout.leaves[0].dtype == layout.work_dtype else f'"{layout.device}", {layout.work_dtype}'
        raise ValueError(
            f"t is {t.dtype} on {t.device}, but y0 needs times in {layout.work_dtype} on {layout.device}; "
            f"pass t.to({wanted}), or an array or a tuple of numbers, which is converted"
        )
    allowed = "(T,) or (B, T)" if layout.batch_dims else "(T,)"
    if t.ndim not in (1, 1 + layout.batch_dims) or (t.ndim == 2 and t.shape[0] != layout.batch):
        size = f" with B = {layout.batch}" if layout.batch_dims else " (times of each sample need batch_dims=1)"
        raise ValueError(f"t must have the shape {allowed}{size}, got {tuple(t.shape)}")
    return t if t.ndim == 2 else t.unsqueeze(0)


_MAPPED = (
    "t must increase throughout or decrease throughout, without repeated times, in each entry that torch.vmap "
    "maps; for series of different lengths, use batch_dims=1 with t of shape (B, T) instead of torch.vmap"
)


def _disorder(seen: Tensor) -> str:
    """The error message for times `(B, T)` that neither increase nor decrease throughout."""
    gaps = seen.diff()
    row = int((~((gaps > 0).all(1) | (gaps < 0).all(1))).nonzero()[0])
    of_sample = f" of sample {row}" if len(seen) > 1 else ""
    same = (gaps[row] == 0).nonzero().flatten().tolist()
    if not same:
        return f"t{of_sample} must increase throughout, or decrease throughout"
    i = same[0]
    wider = "" if seen.dtype == torch.float64 else ", or pass y0, t and the arguments in float64"
    shorter = " (a shorter series repeats its last time alone)" if of_sample else ""
    return (
        f"t[{i}] and t[{i + 1}]{of_sample} are the same in {seen.dtype}, {float(seen[row, i]):.9g}, but times "
        f"must increase throughout, or decrease throughout{shorter}. If rounding made them so, measure times from "
        f"the start{wider}"
    )
