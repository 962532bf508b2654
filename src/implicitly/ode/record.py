"""What a solve leaves for its derivative: its steps, and its state before some of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from implicitly.host import Array, to_host
from implicitly.ode.method import Memory

# Of `Taken.ends`.
STOP = -1

# States kept at first; beyond twice as many as their spacing every other is forgotten.
CHECKPOINTS = 32


def spread(x: np.ndarray, rows: Tensor, batch: int) -> np.ndarray:
    """What is known `(R,)` of the samples `rows`, as of all of `batch`: 0 for others."""
    full = np.zeros(batch, dtype=x.dtype)
    full[to_host(rows)] = x
    return full


class Taken(NamedTuple):
    """A step that some samples accepted, each `(B,)`: from t, dt long, or up to the end where `last`.

    `ends` is int8: 0; `STOP` where the step ends at a time that must be hit; i + 1 where event i ends it.
    """

    t: Array
    dt: Array
    last: Array
    accepted: Array
    ends: Array

    def of_all(self, rows: Tensor | None, batch: int) -> Taken:
        """The step of the samples `rows` as one of all, which others did not accept."""
        return self if rows is None else Taken(*(spread(x, rows, batch) for x in self))


class State(NamedTuple):
    """Where the samples `rows` are (None: all)."""

    y: Tensor
    memory: Memory
    rows: Tensor | None = None

    def full(self, batch: int) -> State:
        """With a row for each of `batch` samples; 0 for those that take no further step."""
        if (rows := self.rows) is None:
            return self

        def spread(x: Tensor) -> Tensor:
            return x.new_zeros(batch, *x.shape[1:]).index_copy(0, rows, x)

        return State(spread(self.y), tuple(spread(x) for x in self.memory))


@dataclass
class Record:
    """All steps, and states at O(sqrt(steps)) of them.

    `states[i]` is the state before step i, for every i that `spacing` divides. Steps noted many at a time, of each
    of whose `blocks` only the first state is kept, count as one there.
    """

    steps: list[Taken] = field(default_factory=list)
    blocks: list[Taken] = field(default_factory=list)
    states: dict[int, State] = field(default_factory=dict)
    spacing: int = 1
    clean: bool = True  # whether no sample met NaN or inf in a step that others accepted
    stand_ins: Tensor | None = None  # `(B,)` whose states are to be in the place of each sample's; None: its own

    def note(self, taken: Taken, state: State) -> None:
        """Note a step from `state`."""
        self.keep(len(self.steps), state)
        self.steps.append(taken)

    def note_many(self, taken: Taken, state: State) -> None:
        """Note steps, each field `(N, B)`, the first of them from `state`."""
        self._keep(len(self.blocks), sum(len(block.t) for block in self.blocks), state)
        self.note_all(Taken(*(x.clone() for x in taken)))

    def note_all(self, taken: Taken) -> None:
        """Note steps, each field `(N, B)`, the states before which came to `keep`."""
        self.blocks.append(taken)

    def wants(self, step: int) -> bool:
        """Whether the state before a step, which are counted from 0, is one to `keep`."""
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
        """The state of all of `batch` samples before a step, which is kept."""
        state, rows = self.states[step].full(batch), self.stand_ins
        if rows is None:
            return state
        return State(state.y[rows], tuple(m[rows] for m in state.memory))

    def kept_before(self, stop: int) -> int:
        """The last step before `stop` the state before which is kept."""
        return max(i for i in self.states if i < stop)

    def stacked(self, like: Tensor) -> tuple[Tensor, ...]:
        """The steps as the fields of `Taken`, tensors `(B, N)` beside `like` `(B, ...)`, and forgotten here."""
        if self.blocks:
            blocks, self.blocks = self.blocks, []
            return tuple(torch.cat(parts).T for parts in zip(*blocks))
        if not self.steps:
            empty = like.new_zeros(like.shape[0], 0)
            return empty, empty.clone(), empty.bool(), empty.bool(), empty.to(torch.int8)
        steps, self.steps = self.steps, []  # as a few tensors they take a hundredth of the memory
        parts = zip(*steps)
        if isinstance(steps[0].t, Tensor):
            return tuple(torch.stack(part, dim=1) for part in parts)
        return tuple(torch.from_numpy(np.stack(part, axis=1)) for part in parts)


def unstacked(parts: tuple[Tensor, ...], host: bool) -> list[Taken]:
    """The steps that `Record.stacked` gave; for the `host` where they may be looked at."""
    if host:
        return [Taken(*step) for step in zip(*(np.ascontiguousarray(to_host(x).T) for x in parts))]
    return [Taken(*step) for step in zip(*(x.unbind(1) for x in parts))]
