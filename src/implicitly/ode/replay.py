"""The recorded steps of a solve, taken once more for its derivative."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from implicitly.host import maybe_any, to_host, to_tensor
from implicitly.iterate import DROP_BELOW
from implicitly.ode.integrate import Ended, Outputs, Piece, Stepper, assemble, kept, of_all
from implicitly.ode.method import Step
from implicitly.ode.record import Record, State, Taken, in_turn
from implicitly.transforms import is_batched


class Again(NamedTuple):
    """A recorded step taken again: the step, the state of all samples after it, and the outputs it passed."""

    step: Step
    state: State
    pieces: list[Piece]


def again(stepper: Stepper, taken: Taken, state: State, outputs: bool = True, mapped: bool = False) -> Again:
    """Take a recorded step again from `state`, if possible only for the samples that accepted it.

    Step lengths are constants; only the last step of a sample ends, differentiably, where its times end.
    """
    rows = _few(stepper, taken)
    if rows is None:
        step, y, memory = stepper.retaken(taken, state.y, state.memory)
        y, memory = kept(taken.accepted, (y, memory), (state.y, state.memory))
        pieces = list(stepper.outputs(step, taken, mapped)) if outputs else []
        return Again(step, State(y, memory), pieces)
    part, mine = stepper.take(rows), Taken(*(x[to_host(rows)] for x in taken))
    step, y, memory = part.retaken(mine, state.y[rows], tuple(m[rows] for m in state.memory))
    pieces = [of_all(piece, rows) for piece in part.outputs(step, mine, mapped)] if outputs else []
    memory = tuple(m.index_copy(0, rows, new) for m, new in zip(state.memory, memory))
    return Again(step, State(state.y.index_copy(0, rows, y), memory), pieces)


def _few(stepper: Stepper, taken: Taken) -> Tensor | None:
    """The samples that accepted a step, if only those are to take it again; None: all."""
    if stepper.bound.sample_dims is None or isinstance(taken.accepted, Tensor):
        return None
    (rows,) = taken.accepted.nonzero()
    return None if len(rows) > DROP_BELOW * len(taken.accepted) else torch.from_numpy(rows)


def restart(stepper: Stepper, y0: Tensor) -> State:
    """The state before the first step, computed again from `y0` `(B, n)`."""
    t = stepper.times[:, 0] if stepper.moving else stepper.begin
    F = stepper.bound.F
    clock, t = stepper.clock(t), stepper.after(t)
    return State(y0, (*stepper.method.start(F, t, y0, F.at(t, y0)), *clock))


def stand_ins(finished: Tensor, stays: Tensor) -> Tensor:
    """The sample `(B,)` that replaces each: itself where it `stays` `(B,)`, otherwise one that `finished`.

    A sample that failed has cotangent 0, but where f has no derivative, 0 times that is NaN, not 0.
    """
    index = torch.arange(len(finished), device=finished.device)
    return torch.where(stays, index, finished.to(torch.int64).argmax())


def finite_start(y: Tensor, finished: Tensor) -> Tensor:
    """`y` `(B, n)` with 0 in place of NaN and inf, from samples that failed before their first step.

    These samples take no step, and 0 times their derivative must be 0.
    """
    return y.nan_to_num(0.0, 0.0, 0.0) if maybe_any(~finished) else y


def replay(
    stepper: Stepper, steps: list[Taken], y: Tensor, ended: Ended, events: int = 0
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Take the recorded steps again from `y`, by plain differentiable operations.

    Returns the outputs `(B, T, n)`, the times `(B,)` reached (None unless states carry their time), and the times
    `(B, K)` of K = `events` events, with 0 after a sample's last.
    """
    y0 = finite_start(y, ended.finished)
    state = restart(stepper, y0)
    outputs = Outputs(stepper.times, y0)
    mapped = any(is_batched(x) for x in (*state.memory, y0, stepper.times, *ended))
    happened: list[tuple[Tensor, Tensor]] = []
    for taken in steps:
        _, state, passed = again(stepper, taken, state, mapped=mapped)
        outputs.add(passed)
        if events and (reached := stepper.reached(state)) is not None:
            happened.append((to_tensor(taken.ends > 0), reached))
    return assemble(outputs, state.y, ended), stepper.reached(state), _times_of(happened, events, stepper.times)


def _times_of(happened: list[tuple[Tensor, Tensor]], count: int, times: Tensor) -> Tensor:
    """The times `(B, K)` of up to `count` events of each sample.

    `happened` has, for each step, which samples `(B,)` an event ended, and when.
    """
    if len(happened) < count:  # events that only failed samples had are left out
        none = torch.zeros_like(times[:, 0], dtype=torch.bool), times[:, 0]
        happened = [*happened, *[none] * (count - len(happened))]
    if not count:
        return times[:, :0]
    now, t = (torch.stack(part, dim=1) for part in zip(*happened))
    place, known = in_turn(now, count)
    return torch.where(known, t.gather(1, place), 0.0)


def states_before(
    stepper: Stepper, record: Record, steps: list[Taken], stop: int, size: int = 1
) -> list[tuple[int, State]]:
    """Recompute states from a checkpoint: every `size`-th step up to `stop`, with the state before it.

    The checkpoint is the last kept state that leaves at least `size` steps up to `stop`.
    """
    first = record.kept_before(max(1, stop - size + 1))
    states = [(first, record.before(first, len(stepper.times)))]
    for i in range(first + size, stop, size):
        state = states[-1][1]
        for taken in steps[i - size : i]:
            state = again(stepper, taken, state, outputs=False).state
        states.append((i, state))
    return states
