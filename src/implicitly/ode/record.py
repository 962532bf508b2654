"""The record that a solve leaves for its derivative: its steps, and the states before some of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from implicitly.host import Array, to_host, to_tensor
from implicitly.ode.method import Memory

# The value of `Taken.ends` for a step that ends at one of `tstops`.
STOP = -1

# This many states are always kept; beyond that, every other one is dropped once there are more than twice as many
# as their spacing.
CHECKPOINTS = 32


def spread(x: np.ndarray, rows: Tensor, batch: int) -> np.ndarray:
    """Values `(R,)` of the samples `rows` as values of all `batch` samples, 0 for the others."""
    full = np.zeros(batch, dtype=x.dtype)
    full[to_host(rows)] = x
    return full


class Taken(NamedTuple):
    """A step that some samples accepted, each field `(B,)`: from t, of length dt, or up to the end where `last`.

    `ends` is int8: `STOP` where the step ends at one of `tstops`, i + 1 where event i ends it, otherwise 0.
    """

    t: Array
    dt: Array
    last: Array
    accepted: Array
    ends: Array

    def of_all(self, rows: Tensor | None, batch: int) -> Taken:
        """The step of the samples `rows` as a step of all samples, which the others did not accept."""
        return self if rows is None else Taken(*(spread(x, rows, batch) for x in self))


class Happened(NamedTuple):
    """Events that ended a step, each field `(B,)`: for which samples, with which indices, and when."""

    now: Array
    index: Array
    t: Array

    def of_all(self, rows: Tensor | None, batch: int) -> Happened:
        """The events of the samples `rows`, spread to all samples."""
        return self if rows is None else Happened(*(spread(x, rows, batch) for x in self))


def told(happened: list[Happened], like: Tensor) -> tuple[Tensor, Tensor]:
    """The times, in the dtype of `like` `(B,)`, and the indices of all events, `(B, K)` each, in order."""
    if not happened:
        return like.new_zeros(len(like), 0), like.new_zeros(len(like), 0, dtype=torch.int64)
    now, index, t = (torch.stack([to_tensor(x) for x in part], dim=1) for part in zip(*happened))
    place, known = in_turn(now, int(now.sum(1).max()))
    return torch.where(known, t.gather(1, place), float("nan")), torch.where(
        known, index.gather(1, place).long(), -1
    )


def in_turn(now: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The places `(B, K)` of the first `count` true entries in each row of `now` `(B, M)`.

    Also which of these places `(B, K)` really hold one, as rows may have fewer.
    """
    place = now.logical_not().to(torch.int8).argsort(dim=1, stable=True)[:, :count]
    return place, torch.arange(place.shape[1], device=now.device) < now.sum(1, keepdim=True)


class State(NamedTuple):
    """The state and memory of the samples `rows` (None: all)."""

    y: Tensor
    memory: Memory
    rows: Tensor | None = None

    def full(self, batch: int) -> State:
        """This state with a row for each of `batch` samples; 0 for those that take no further step."""
        if (rows := self.rows) is None:
            return self

        def spread(x: Tensor) -> Tensor:
            return x.new_zeros(batch, *x.shape[1:]).index_copy(0, rows, x)

        return State(spread(self.y), tuple(spread(x) for x in self.memory))


@dataclass
class Record:
    """All steps of a solve, and the states before O(sqrt(steps)) of them.

    `states[i]` is the state before step i, for every i that `spacing` divides. Steps that are noted in `blocks`,
    with only the first state of each block known, count as one step per block for the spacing.
    """

    steps: list[Taken] = field(default_factory=list)
    blocks: list[Taken] = field(default_factory=list)
    states: dict[int, State] = field(default_factory=dict)
    spacing: int = 1
    clean: bool = True  # whether no sample met NaN or inf in a step that others accepted
    stand_ins: Tensor | None = None  # `(B,)` the sample whose states replace those of each sample; None: its own

    def note(self, taken: Taken, state: State) -> None:
        """Note a step from `state`."""
        self.keep(len(self.steps), state)
        self.steps.append(taken)

    def note_many(self, taken: Taken, state: State) -> None:
        """Note a block of steps, each field `(N, B)`, the first of them from `state`."""
        self._keep(len(self.blocks), sum(len(block.t) for block in self.blocks), state)
        self.note_all(Taken(*(x.clone() for x in taken)))

    def note_all(self, taken: Taken) -> None:
        """Note a block of steps, each field `(N, B)`, whose states were passed to `keep` separately."""
        self.blocks.append(taken)

    def wants(self, step: int) -> bool:
        """Whether `keep` would keep the state before this step (counted from 0)."""
        return step % self.spacing == 0

    def keep(self, step: int, state: State) -> None:
        """Keep the state before a step, if it is one of those to be kept."""
        self._keep(step, step, state)

    def _keep(self, count: int, step: int, state: State) -> None:
        """Keep the state before a `step`, after `count` calls of this."""
        if count % self.spacing == 0:
            self.states[step] = state
        if len(self.states) > max(CHECKPOINTS, 2 * self.spacing):
            self.spacing *= 2
            self.states = dict(list(self.states.items())[::2])

    def before(self, step: int, batch: int) -> State:
        """The state of all `batch` samples before a step, which must be one that is kept."""
        state, rows = self.states[step].full(batch), self.stand_ins
        if rows is None:
            return state
        return State(state.y[rows], tuple(m[rows] for m in state.memory))

    def kept_before(self, stop: int) -> int:
        """The last step below `stop` whose initial state is kept."""
        return max(i for i in self.states if i < stop)

    def stacked(self, like: Tensor) -> tuple[Tensor, ...]:
        """The steps as the fields of `Taken`, tensors `(B, N)` on the device of `like` `(B, ...)`.

        They are removed from this record.
        """
        if self.blocks:
            blocks, self.blocks = self.blocks, []
            return tuple(torch.cat(parts).T for parts in zip(*blocks))
        if not self.steps:
            empty = like.new_zeros(like.shape[0], 0)
            return empty, empty.clone(), empty.bool(), empty.bool(), empty.to(torch.int8)
        steps, self.steps = self.steps, []  # stacked to a few tensors, they take a hundredth of the memory
        parts = zip(*steps)
        if isinstance(steps[0].t, Tensor):
            return tuple(torch.stack(part, dim=1) for part in parts)
        return tuple(torch.from_numpy(np.stack(part, axis=1)) for part in parts)


def unstacked(parts: tuple[Tensor, ...], host: bool) -> list[Taken]:
    """The steps that `Record.stacked` returned, one by one; as arrays if `host`."""
    if host:
        return [Taken(*step) for step in zip(*(np.ascontiguousarray(to_host(x).T) for x in parts))]
    return [Taken(*step) for step in zip(*(x.unbind(1) for x in parts))]
