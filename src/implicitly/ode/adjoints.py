"""How a trajectory is differentiated: exactly, step by step, or by unrolling every operation."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from implicitly.checks import check_count
from implicitly.ode.derivative import pull_back, push_forward, saved_as
from implicitly.ode.integrate import USUAL, Ended, Integrated
from implicitly.ode.kept import Meter
from implicitly.ode.method import Method
from implicitly.ode.problem import Problem
from implicitly.ode.record import Record
from implicitly.ode.work import EVENTS, REACHED, Report, Work
from implicitly.transforms import (
    Operation,
    asked,
    is_batched,
    is_recorded,
    is_tracked,
    is_wrapped,
    merge_rows,
    one_by_one,
    records_plainly,
    split_rows,
    unhooked,
    unwrapped,
)


class TrajectoryAdjoint(ABC):
    """Base class: solves a trajectory in the way its derivative needs, and attaches that derivative."""

    recording = False
    hybrid = False  # whether it supports events and `tstops`

    @abstractmethod
    def solve(self, method: Method, problem: Problem, report: Report) -> tuple[Integrated, int]:
        """The trajectory, with differentiable `values`, and the number of calls of f."""


@dataclass(frozen=True)
class RecursiveCheckpointAdjoint(TrajectoryAdjoint):
    """The exact derivative of the discrete solution (discretise-then-optimise), with checkpointing.

    The forward solve keeps the lengths of its steps, and its state before some of them: memory grows with the
    square root of the number of steps. The backward pass recomputes the states in between from the last one kept
    and backpropagates through each step separately, or through up to four at once if states take at most two
    kilobytes. Step lengths are constants for the derivative; the derivative with respect to a time moves the start
    of the first or the end of the last step. Griewank and Walther, "Evaluating Derivatives", chapter 12.

    With step lengths held fixed, this is the exact derivative of that sequence of steps. Where the solution jumps
    and a parameter moves the jump (stiff relaxation oscillators), it can be wrong by a factor although the
    solution is accurate, because a neighbouring solution would jump inside a long step. `arc_length=True` fixes
    the arc lengths of the steps instead, so that the steps move with the jump.

    For a short solve with an explicit method, autograd records the steps while they are taken, as long as the
    recording needs at most `keep_bytes`. The backward pass then repeats no step. Second derivatives and
    `torch.func` transforms do not use such a recording, and none is made under hooks on saved tensors, such as
    those of `torch.utils.checkpoint`.

    The backward pass is itself differentiable, and forward mode goes through the recorded sequence of steps. First
    derivatives by `torch.func` take the steps again one by one, too, outside of the transform, so their memory
    does not grow with the graph of all steps. (For tangents this excludes solves with events, `tstops`, arc length
    or failed samples.) The time of an event is differentiated by the implicit function theorem, with respect to
    all that it depends on.

    Where `compile=True` made one graph of a solve, the backward pass is a graph, too. Second derivatives, forward
    mode and mapped transforms (`vmap`, `jacrev`) run eagerly.

    Args:
        arc_length: whether derivatives hold the arc lengths of adaptive steps fixed, instead of their lengths in
            time.
        listen: a function that receives the number of calls of f in a compiled backward pass, where f cannot count
            them itself.
        keep_bytes: the most bytes of recorded steps that are kept for the backward pass, beside the states that a
            longer solve keeps; 0: none are.
    """

    arc_length: bool = False
    listen: Callable[[int], None] | None = None
    keep_bytes: int = 2**22

    hybrid = True

    def __post_init__(self):
        name = type(self).__name__
        if not isinstance(self.arc_length, bool):
            raise TypeError(f"{name}: arc_length must be True or False, got {self.arc_length!r}")
        if self.listen is not None and not callable(self.listen):
            raise TypeError(f"{name}: listen must be a function of one number, got {self.listen!r}")
        check_count(name, "keep_bytes", self.keep_bytes, least=0)

    def solve(self, method: Method, problem: Problem, report: Report) -> tuple[Integrated, int]:
        """The trajectory, with differentiable `values`, and the number of calls of f."""
        return self.attached(self.work(method, problem, report), problem)

    def work(self, method: Method, problem: Problem, report: Report) -> Work:
        """The `Work` that solves and differentiates a `problem` in this way."""
        return Work(
            method,
            problem.field,
            problem.sample_dims,
            report,
            Record(),
            events=problem.events,
            key=problem.key,
            check=problem.check,
            listen=self.listen,
            arc_length=self.arc_length and method.dt is None,
            snapshot=problem.opened.snapshot,
            warns=problem.warns,
        )

    def attached(self, work: Work, problem: Problem) -> tuple[Integrated, int]:
        """The result of `work`, with differentiable `values`, and the number of calls of f."""
        k0 = None if problem.k0 is None else problem.k0.detach()
        inputs = (problem.rows(problem.times), problem.y0, k0, *problem.theta)
        if not any(x is not None and is_recorded(x) for x in inputs):
            work.record = None
            with torch.no_grad():
                return work.run(*inputs), work.calls
        if self.keep_bytes and work.can_be_kept and records_plainly(*inputs) and not is_tracked(inputs[0]):
            # Whether f uses one of the suspects is only seen where nothing else is recorded.
            work.meter = None if problem.opened.suspects else Meter(self.keep_bytes)
        output = _Trajectory.apply(work, *inputs)
        return Integrated(*output[:USUAL], *output[EVENTS:]), work.calls


class _Trajectory(Operation):
    """A solve and its derivative as one autograd operation, which under `vmap` receives the whole batch.

    The steps are outputs too, so that each level of nested transforms has those of its own samples.
    """

    @staticmethod
    @unhooked()
    def forward(work: Work, times: Tensor, y0: Tensor, k0: Tensor | None, *theta: Tensor) -> Any:
        # Parameters are passed as they are: detached ones would have to be swapped into modules at every call.
        if work.meter is None or k0 is None:
            found = work.run(times.detach(), y0.detach(), k0, *theta)
        else:
            found = work.run_kept(times, y0, k0, *theta)
        # Forward mode writes a tangent of the same strides, so that an output cannot be an expanded tensor.
        found = found._replace(t=found.t.contiguous())
        events = () if found.event_times is None else found[USUAL:]
        return *found.usual, *(work.record or Record()).stacked(times), *events

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.work, times, y0, _, *theta = inputs
        ctx.restored = ctx.work.snapshot()
        status, t, steps = output[1], output[REACHED], output[USUAL:EVENTS]
        ctx.save_for_backward(status, *steps, t, times, y0, *theta)
        ctx.save_for_forward(status, *steps, t, times, y0, *theta)
        ctx.mark_non_differentiable(*(x for i, x in enumerate(output) if i not in ctx.work.places))
        ctx.set_materialize_grads(False)

    @staticmethod
    @one_by_one
    @unhooked()
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        _, times, y0, _, *theta = asked(ctx)
        wanted = [i for i, needed in enumerate((times, y0, *theta)) if needed]
        gradients: list[Tensor | None] = [None] * (2 + len(theta))
        bars, saved = [cotangents[i] for i in ctx.work.places], ctx.saved_tensors
        ended, _, inputs = saved_as(saved)
        if any(g is not None for g in bars):
            shapes = ctx.work.shapes(*inputs[:2])
            # A failed sample has no derivative; NaN in its outputs must not reach tensors that samples share.
            bars = tuple(_bar(g, shape, ended.finished, inputs[1]) for g, shape in zip(bars, shapes))
            found = pull_back(ctx.work, ctx.restored, saved, wanted, bars)
            ctx.work.tell_of_nan(ended.finished, found)
            for i, gradient in zip(wanted, found):
                gradients[i] = gradient
        times, y0, *theta = gradients
        return None, times, y0, None, *theta

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        moves = tangents[1:3] + tangents[4:]
        moving = [i for i, d in enumerate(moves) if d is not None]
        saved = tuple(forward_ad.unpack_dual(x).primal for x in ctx.saved_tensors)
        directions = tuple(d for d in moves if d is not None)
        with forward_ad._set_fwd_grad_enabled(True):  # autograd switches it off here; an enclosing jvp needs it
            moved = push_forward(ctx.work, ctx.restored, saved, moving, directions)
        out: list[Tensor | None] = [None] * (EVENTS + (2 if ctx.work.events else 0))
        shapes = ctx.work.shapes(*saved_as(saved)[2][:2])
        for i, shape, part in zip(ctx.work.places, shapes, moved.split([math.prod(shape) for shape in shapes])):
            out[i] = part.reshape(shape)
        return tuple(out)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        work, *inputs = args
        size, dims = info.batch_size, in_dims[1:]
        start = (merge_rows(x, d, size) for x, d in zip(inputs[:3], dims))
        mapped = work.mapped(size, dims[3:])
        output = _Trajectory.apply(mapped, *start, *inputs[3:])
        work.calls, work.failed, work.most, work.record = mapped.calls, mapped.failed, mapped.most, mapped.record
        return tuple(split_rows(x, size) for x in output), (0,) * len(output)


def _bar(g: Tensor | None, shape: tuple[int, ...], finished: Tensor, like: Tensor) -> Tensor:
    """The cotangent `g` of an output (None: zeros), set to 0 for samples that failed."""
    if g is None:
        return like.new_zeros(shape)
    return torch.where(finished.reshape(-1, *(1,) * (len(shape) - 1)), g, 0.0)


def solve_unrolled(method: Method, problem: Problem, report: Report) -> tuple[Integrated, int]:
    """The trajectory, with autograd recording every operation of the accepted steps."""
    work = Work(
        method, problem.field, problem.sample_dims, report, Record(), events=problem.events, warns=problem.warns
    )
    times = problem.rows(problem.times)
    assert problem.k0 is not None  # only a solve as one graph leaves it out
    assert work.record is not None
    start = (times, problem.y0, problem.k0, *problem.theta)
    if any(is_batched(x) for x in start):
        # Under vmap no step can be judged here, so the mapped samples are solved as one batch first.
        output = _Trajectory.apply(work, *(x.detach() for x in start))
        found, steps = Integrated(*output[:USUAL], *output[EVENTS:]), output[USUAL:EVENTS]
        ended = Ended(found.status, found.t.detach())
    else:
        # The search for an event is not recorded, only the steps that it leads to.
        found = work.run(*(x.detach() for x in start) if work.hybrid else start)
        ended = Ended(found.status, found.t.detach())
        finished, samples = unwrapped(ended.finished), len(problem.y0) > 0  # of none, nothing would have a graph
        if work.record.clean and samples and bool(finished.all()) and not work.hybrid:
            return found, work.calls
        # NaN that a rejected step or a failed sample left in the graph could turn zero cotangents into NaN.
        steps = work.record.stacked(times.detach())
    theta = (_listened(x, partial(work.tell_of_nan, ended.finished)) for x in problem.theta)
    values, *t = work.outputs(steps, ended, times, problem.y0, *theta)
    values = torch.where(ended.finished[:, None, None], values, found.values.detach())
    reached = torch.where(ended.finished, t[0], ended.t) if t else found.t
    found = found._replace(values=values, t=reached)
    if found.event_times is not None and found.event_indices is not None:
        known = ended.finished[:, None] & (found.event_indices >= 0)
        found = found._replace(event_times=torch.where(known, t[1], found.event_times.detach()))
    return found, work.calls


def _listened(x: Tensor, tell: Callable[[Sequence[Tensor]], None]) -> Tensor:
    """`x`, with a hook that passes its gradient to `tell`."""
    if not x.requires_grad or is_wrapped(x):
        return x
    seen = x.view_as(x)
    if not seen.requires_grad:  # a transform of torch.func takes x for a constant
        return x
    seen.register_hook(lambda gradient: tell([gradient]))
    return seen
