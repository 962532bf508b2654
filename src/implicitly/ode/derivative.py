"""The derivative of a solve, in reverse and in forward mode, from what `adjoints._Trajectory` saved."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.func import vjp

from implicitly.implicit import push
from implicitly.ode.integrate import Ended
from implicitly.ode.record import Taken
from implicitly.ode.shortcut import Linear, Shortcut, Split
from implicitly.ode.work import Work, push_steps
from implicitly.pullback import of_places, pull_within
from implicitly.transforms import full_precision, is_batched, is_plain, is_wrapped, merge_rows, split_rows

# Restores what f holds besides tensors, such as random masks, to what it was in the solve.
Restored = Callable[[], AbstractContextManager[None]]


def saved_as(saved: tuple[Tensor, ...]) -> tuple[Ended, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The saved tensors as: how the samples ended, the stacked steps, and the inputs (times, y0, theta)."""
    count = 1 + len(Taken._fields)
    return Ended(saved[0], saved[count]), tuple(saved[1:count]), tuple(saved[count + 1 :])


def pull_back(
    work: Work, restored: Restored, saved: tuple[Tensor, ...], wanted: list[int], bars: tuple[Tensor, ...]
) -> Sequence[Tensor]:
    """The cotangents of the `wanted` inputs, given the cotangents `bars` of the outputs of the recorded steps."""
    pullback = _Pullback(len(saved), work, restored, wanted)
    if is_plain(*bars, *saved):
        return pullback.fast(*saved, *bars)
    transformed = any(is_wrapped(x) for x in (*bars, *saved))
    if not transformed or (work.hybrid and any(is_batched(x) for x in bars)):
        return pullback.exact(*saved, *bars)
    return Shortcut.apply(pullback, *saved, *bars)


def push_forward(
    work: Work, restored: Restored, saved: tuple[Tensor, ...], moving: list[int], tangents: tuple[Tensor, ...]
) -> Tensor:
    """The tangents of the outputs of the recorded steps, as one vector, given those of the `moving` inputs."""
    pushforward = _Pushforward(len(saved), work, restored, moving)
    if work.failed or work.hybrid:
        return pushforward.exact(*saved, *tangents)[0]
    return Shortcut.apply(pushforward, *saved, *tangents)[0]


@dataclass(frozen=True)
class _Derivative(Linear):
    """A derivative of the outputs of a solve by its inputs `places`, as a map of what is `given`."""

    work: Work
    restored: Restored
    places: list[int]

    def fast(self, *tensors: Tensor) -> Sequence[Tensor]:
        """By a sweep over the steps."""
        ended, steps, inputs = saved_as(tensors[: self.count])
        with self.restored(), full_precision(inputs[1].device.type):
            return self.swept(ended, steps, inputs, tensors[self.count :])

    def exact(self, *tensors: Tensor) -> Sequence[Tensor]:
        """From all steps at once."""
        ended, steps, inputs = saved_as(tensors[: self.count])
        outputs = of_places(partial(self.work.joined, steps, ended), inputs, self.places)
        at = tuple(inputs[i] for i in self.places)
        with self.restored(), full_precision(inputs[1].device.type):
            return self.through(outputs, at, tensors[self.count :])

    def mapped(
        self, size: int, dims: Sequence[int | None], tensors: Sequence[Tensor]
    ) -> tuple[Linear, list[Tensor], Split]:
        """The same of a solve of all samples that `vmap` maps."""
        work, saved = _merged(self.work, size, dims[: self.count], tensors[: self.count], self.places)
        given = self.merged(size, dims[self.count :], tensors[self.count :])
        return replace(self, work=work), [*saved, *given], partial(self.split, size)

    @abstractmethod
    def swept(
        self, ended: Ended, steps: tuple[Tensor, ...], inputs: tuple[Tensor, ...], given: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        """The values for `given`, by a sweep over the `steps`."""

    @abstractmethod
    def through(
        self, outputs: Callable[..., Tensor], at: tuple[Tensor, ...], given: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        """The values for `given`, by the derivative of all `outputs` at once, a function of the inputs `at`."""

    @abstractmethod
    def merged(self, size: int, dims: Sequence[int | None], given: Sequence[Tensor]) -> list[Tensor]:
        """What is `given` for each of `size` solves, for the solve of all samples."""

    @abstractmethod
    def split(self, size: int, values: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The values for the solve of all samples, as those for each of `size` solves."""


class _Pullback(_Derivative):
    """The cotangents of inputs, given those of the outputs."""

    def swept(
        self, ended: Ended, steps: tuple[Tensor, ...], inputs: tuple[Tensor, ...], given: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        return self.work.swept(steps, ended, inputs, self.places, *given)

    def through(
        self, outputs: Callable[..., Tensor], at: tuple[Tensor, ...], given: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        bar = torch.cat([x.flatten() for x in given])
        transformed = any(is_wrapped(x) for x in (bar, *at))
        return pull_within(outputs, at, bar) if transformed else vjp(outputs, *at)[1](bar)

    def merged(self, size: int, dims: Sequence[int | None], given: Sequence[Tensor]) -> list[Tensor]:
        return [merge_rows(x, d, size) for x, d in zip(given, dims)]

    def split(self, size: int, values: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(x if i > 1 else split_rows(x, size) for i, x in zip(self.places, values))


class _Pushforward(_Derivative):
    """The tangents of the outputs, as one vector, given those of inputs."""

    def swept(
        self, ended: Ended, steps: tuple[Tensor, ...], inputs: tuple[Tensor, ...], given: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        return [push_steps(self.work, steps, inputs, self.places, given).flatten(0, 2)]

    def through(
        self, outputs: Callable[..., Tensor], at: tuple[Tensor, ...], given: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        return [push(outputs, at, tuple(given))]

    def merged(self, size: int, dims: Sequence[int | None], given: Sequence[Tensor]) -> list[Tensor]:
        return [
            _in_front(x, d, size) if i > 1 else merge_rows(x, d, size) for i, x, d in zip(self.places, given, dims)
        ]

    def split(self, size: int, values: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(split_rows(x, size) for x in values)


def _merged(
    work: Work, size: int, dims: Sequence[int | None], saved: Sequence[Tensor], own: list[int]
) -> tuple[Work, list[Tensor]]:
    """A solve under `vmap`, and what it saved, as a solve of all samples.

    Each of those that `vmap` maps has its own copy of the inputs `own`, as indices into (times, y0, *theta).
    """
    first = len(Taken._fields) + 2  # the place of the times
    merged, of_theta = [merge_rows(x, d, size) for x, d in zip(saved[: first + 2], dims)], []
    for i, (x, d) in enumerate(zip(saved[first + 2 :], dims[first + 2 :]), 2):
        shared = d is None and i not in own
        merged.append(x if shared else _in_front(x, d, size))
        of_theta.append(None if shared else 0)
    return work.mapped(size, of_theta), merged


def _in_front(x: Tensor, dim: int | None, size: int) -> Tensor:
    """`x` with the dimension `dim` of `size` entries in front; None: the same for each."""
    return x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
