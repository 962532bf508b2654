"""How a trajectory is differentiated: exactly, step by step, or through every operation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import vjp, vmap

from implicitly.implicit import push
from implicitly.iterate import Status
from implicitly.ode.host import on_host
from implicitly.ode.integrate import (
    Bound,
    Integrated,
    Stepper,
    again,
    finite_start,
    integrate,
    replay,
    restart,
    states_before,
)
from implicitly.ode.method import Method
from implicitly.ode.problem import Field, Problem
from implicitly.ode.record import Record, State, Taken, unstacked
from implicitly.tree import is_batched, is_plain, is_tracked, merge_rows, of_places, unwrapped

# Announces how a solve ended: the method, what it found, the calls of f.
Report = Callable[[Method, Integrated, int], None]


class TrajectoryAdjoint(ABC):
    """Solves in the way its derivative needs, and attaches that derivative."""

    recording = False

    @abstractmethod
    def solve(self, method: Method, problem: Problem, report: Report) -> tuple[Integrated, int]:
        """The trajectory, its `values` differentiable, and the calls of f."""


@dataclass(frozen=True)
class RecursiveCheckpointAdjoint(TrajectoryAdjoint):
    """The exact derivative of the discrete solution, from its steps taken once more, one at a time.

    A solve keeps the lengths of its steps, and its state before some of them: memory grows with the square root
    of their number. Backwards, the states between are computed again from the last one kept, and each step is
    pulled back through by itself. Step lengths are constants of the derivative; that of a time moves the ends of
    the first and the last step. Griewank and Walther, "Evaluating Derivatives", chapter 12.

    The backward pass is differentiable again, and forward mode goes through the noted steps.
    """

    def solve(self, method: Method, problem: Problem, report: Report) -> tuple[Integrated, int]:
        """The trajectory, its `values` differentiable, and the calls of f."""
        tracked = any(is_tracked(x) for x in (problem.times, problem.y0, *problem.theta))
        work = Work(method, problem.field, problem.carries, report, Record() if tracked else None)
        inputs = (problem.rows(problem.times), problem.y0, problem.k0.detach(), *problem.theta)
        output = _Trajectory.apply(work, *inputs)
        return Integrated(*output[: len(Integrated._fields)]), work.calls


@dataclass
class Work:
    """A solve to be differentiated: how it is done, and what it leaves."""

    method: Method
    field: Callable[..., Field]
    carries: tuple[int | None, ...] | None
    report: Report
    record: Record | None
    calls: int = 0

    def run(self, times: Tensor, y0: Tensor, k0: Tensor, *theta: Tensor) -> Integrated:
        """Solve through `times` `(B, T)`."""
        host = not torch.compiler.is_compiling() and times.device.type == "cpu"
        found, self.calls = integrate(self.stepper(host, times, *theta), y0, k0, self.record)
        self.report(self.method, found, self.calls)
        return found

    def stepper(self, host: bool, times: Tensor, *theta: Tensor, once: bool = False) -> Stepper:
        """What takes the steps at these inputs; see `Field` for `once`."""
        return Stepper(self.method, Bound(self.field, theta, self.carries, once), times, host)

    def values(
        self, steps: tuple[Tensor, ...], finished: Tensor, times: Tensor, y0: Tensor, *theta: Tensor
    ) -> Tensor:
        """The outputs `(B, T, n)` of noted steps, by plain differentiable operations; 0 for failed samples."""
        host = on_host(times, *steps)
        values = replay(self.stepper(host, times, *theta), unstacked(steps, host), y0, finished)
        return torch.where(finished[:, None, None], values, 0.0)


class _Trajectory(torch.autograd.Function):
    """A solve and its derivative as one operation, so that `vmap` hands it the whole batch.

    The steps are outputs too: each level of nested transforms then has those of its own samples.
    """

    @staticmethod
    def forward(work: Work, times: Tensor, y0: Tensor, k0: Tensor, *theta: Tensor) -> Any:
        found = work.run(*(x.detach() for x in (times, y0, k0, *theta)))
        return *found, *(work.record or Record()).stacked(times)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.work, times, y0, _, *theta = inputs
        status, steps = output[1], output[len(Integrated._fields) :]
        ctx.save_for_backward(status, *steps, times, y0, *theta)
        ctx.save_for_forward(status, *steps, times, y0, *theta)
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        needs = ctx.needs_input_grad[1:3] + ctx.needs_input_grad[4:]
        wanted = [i for i, needed in enumerate(needs) if needed]
        gradients: list[Tensor | None] = [None] * len(needs)
        g, (finished, steps, inputs) = cotangents[0], _saved(ctx.saved_tensors)
        if g is not None:
            # A failed sample has no derivative; what NaN its outputs are must not reach shared ones.
            g = torch.where(finished[:, None, None], g, 0.0)
            if is_plain(g, *inputs):
                found = sweep(ctx.work, steps, finished, inputs, wanted, g)
            else:
                of_wanted = of_places(partial(ctx.work.values, steps, finished), inputs, wanted)
                found = vjp(of_wanted, *(inputs[i] for i in wanted))[1](g)
            for i, gradient in zip(wanted, found):
                gradients[i] = gradient
        times, y0, *theta = gradients
        return None, times, y0, None, *theta

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        moves = tangents[1:3] + tangents[4:]
        moving = [i for i, d in enumerate(moves) if d is not None]
        saved = tuple(forward_ad.unpack_dual(x).primal for x in ctx.saved_tensors)
        finished, steps, inputs = _saved(saved)
        with forward_ad._set_fwd_grad_enabled(True):  # autograd switches it off here; an enclosing jvp needs it
            directions = tuple(d for d in moves if d is not None)
            of_moving = of_places(partial(ctx.work.values, steps, finished), inputs, moving)
            dvalues = push(of_moving, tuple(inputs[i] for i in moving), directions)
        return dvalues, *(None for _ in (*Integrated._fields[1:], *Taken._fields))

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        work, *inputs = args
        size, dims = info.batch_size, in_dims[1:]
        start = (merge_rows(x, d, size) for x, d in zip(inputs[:3], dims))

        def field(*theta: Tensor) -> Field:
            over = vmap(
                lambda t, y, *th: work.field(*th).at(t, y), in_dims=(0, 0, *dims[3:]), randomness="different"
            )

            def slope(t: Tensor, y: Tensor) -> Tensor:
                return over(t.reshape(size, -1), y.reshape(size, -1, y.shape[1]), *theta).reshape(y.shape)

            return Field(torch.unbind, slope, field, theta)

        mapped = replace(work, field=field, carries=None)
        output = _Trajectory.apply(mapped, *start, *inputs[3:])
        work.calls = mapped.calls
        return tuple(x.reshape(size, -1, *x.shape[1:]) for x in output), (0,) * len(output)


def _saved(saved: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Which samples finished, the steps as stacked, and the inputs (times, y0, theta)."""
    count = 1 + len(Taken._fields)
    return saved[0] == int(Status.CONVERGED), tuple(saved[1:count]), tuple(saved[count:])


def sweep(
    work: Work,
    stacked: tuple[Tensor, ...],
    finished: Tensor,
    inputs: tuple[Tensor, ...],
    wanted: list[int],
    g: Tensor,
) -> list[Tensor]:
    """The cotangents of the `wanted` inputs (times, y0, theta) for those `g` `(B, T, n)` of the outputs."""
    times, y0, *theta = inputs
    # y0 enters through the first state only; its cotangent is what is left at the end.
    shared = [i for i in wanted if i != 1]
    sums = {i: torch.zeros_like(inputs[i]) for i in shared}
    # Parameters stay in place, which saves exchanging them in every call, unless a hook of theirs would notice.
    # What was computed from others does not: autograd would go on to those.
    leaves = [
        x if i > 1 and x.is_leaf and not x._backward_hooks else x.detach().requires_grad_(i in shared)
        for i, x in enumerate(inputs)
    ]
    record = work.record
    assert record is not None
    host = on_host(times)
    steps, plain = unstacked(stacked, host), work.stepper(host, times, *theta)
    stepper = work.stepper(host, leaves[0], *leaves[2:], once=True)
    y_bar, memory_bar = g[:, -1], None
    states: list[State] = []
    for i in reversed(range(len(steps))):
        if not states:
            states = states_before(plain, record, steps, i + 1)
        state = states.pop()
        y, *memory = (finite_start(x, finished).detach().requires_grad_() for x in (state.y, *state.memory))
        with torch.enable_grad():
            _, after, pieces = again(stepper, steps[i], State(y, tuple(memory)))
        memory_bar = memory_bar or [torch.zeros_like(m) for m in after.memory]
        outputs = [after.y, *after.memory, *(p.values for p in pieces)]
        bars = [y_bar, *memory_bar, *(g[p.rows, p.columns] for p in pieces)]
        y_bar, *found = pulled(outputs, bars, [y, *memory, *(leaves[i] for i in shared)])
        memory_bar, found = found[: len(memory)], found[len(memory) :]
        for j, gradient in zip(shared, found):
            sums[j] += gradient
    start = finite_start(y0, finished).detach().requires_grad_()
    with torch.enable_grad():
        memory = restart(stepper, start).memory
    first, *found = pulled(list(memory), memory_bar or [], [start, *(leaves[i] for i in shared)])
    for j, gradient in zip(shared, found):
        sums[j] += gradient
    return [y_bar + first + g[:, 0] if i == 1 else sums[i] for i in wanted]


def pulled(outputs: list[Tensor], bars: list[Tensor], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """The cotangents of `inputs` for those `bars` of `outputs`; 0 where no output depends on them."""
    pairs = [(o, b) for o, b in zip(outputs, bars) if o.requires_grad]
    if not pairs:
        return tuple(torch.zeros_like(x) for x in inputs)
    return torch.autograd.grad([o for o, _ in pairs], inputs, [b for _, b in pairs], materialize_grads=True)


def solve_unrolled(method: Method, problem: Problem, report: Report) -> tuple[Integrated, int]:
    """The trajectory with autograd recording every operation of the accepted steps."""
    inputs = (problem.times, problem.y0, *problem.theta)
    if any(is_batched(x) for x in inputs):
        raise ValueError(
            "UnrolledAdjoint cannot decide under torch.func.vmap when a sample has arrived; use "
            "RecursiveCheckpointAdjoint, or batch_dims=1 instead of vmap"
        )
    work = Work(method, problem.field, problem.carries, report, Record())
    times = problem.rows(problem.times)
    found = work.run(times, problem.y0, problem.k0, *problem.theta)
    assert work.record is not None
    finished = found.status == int(Status.CONVERGED)
    if work.record.clean and bool(unwrapped(finished).all()):
        return found, work.calls
    # What a rejected step or a failed sample left in the graph could turn zero cotangents into NaN.
    values = work.values(work.record.stacked(times.detach()), finished, times, problem.y0, *problem.theta)
    return found._replace(values=torch.where(finished[:, None, None], values, found.values.detach())), work.calls
