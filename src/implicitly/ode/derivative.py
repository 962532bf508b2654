"""The derivative of a solve, in reverse and in forward mode, from what `adjoints._Trajectory` saved."""

from __future__ import annotations

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
class _Pullback(Linear):
    """The cotangents of the `wanted` inputs, from what a solve saved and the cotangents of its outputs."""

    work: Work
    restored: Restored
    wanted: list[int]

    def fast(self, *tensors: Tensor) -> Sequence[Tensor]:
        """By a sweep back over the steps."""
        ended, steps, inputs = saved_as(tensors[: self.count])
        with self.restored(), full_precision(inputs[1].device.type):
            return self.work.swept(steps, ended, inputs, self.wanted, *tensors[self.count :])

    def exact(self, *tensors: Tensor) -> Sequence[Tensor]:
        """From all steps at once."""
        ended, steps, inputs = saved_as(tensors[: self.count])
        of_wanted = of_places(partial(self.work.joined, steps, ended), inputs, self.wanted)
        chosen = tuple(inputs[i] for i in self.wanted)
        bar = torch.cat([x.flatten() for x in tensors[self.count :]])
        transformed = any(is_wrapped(x) for x in (bar, *chosen))
        with self.restored(), full_precision(inputs[1].device.type):
            return pull_within(of_wanted, chosen, bar) if transformed else vjp(of_wanted, *chosen)[1](bar)

    def mapped(
        self, size: int, dims: Sequence[int | None], tensors: Sequence[Tensor]
    ) -> tuple[Linear, list[Tensor], Split]:
        """The same of a solve of all samples that `vmap` maps."""
        work, saved = _merged(self.work, size, dims[: self.count], tensors[: self.count], self.wanted)
        bars = [merge_rows(x, d, size) for x, d in zip(tensors[self.count :], dims[self.count :])]

        def split(found: Sequence[Tensor]) -> tuple[Tensor, ...]:
            return tuple(x if i > 1 else split_rows(x, size) for i, x in zip(self.wanted, found))

        return replace(self, work=work), [*saved, *bars], split


@dataclass(frozen=True)
class _Pushforward(Linear):
    """The tangents of the outputs, as one vector, from what a solve saved and the tangents of `moving` inputs."""

    work: Work
    restored: Restored
    moving: list[int]

    def fast(self, *tensors: Tensor) -> Sequence[Tensor]:
        """By a sweep over the steps."""
        _, steps, inputs = saved_as(tensors[: self.count])
        with self.restored(), full_precision(inputs[1].device.type):
            return [push_steps(self.work, steps, inputs, self.moving, tensors[self.count :]).flatten(0, 2)]

    def exact(self, *tensors: Tensor) -> Sequence[Tensor]:
        """From all steps at once."""
        ended, steps, inputs = saved_as(tensors[: self.count])
        of_moving = of_places(partial(self.work.joined, steps, ended), inputs, self.moving)
        with self.restored(), full_precision(inputs[1].device.type):
            return [push(of_moving, tuple(inputs[i] for i in self.moving), tensors[self.count :])]

    def mapped(
        self, size: int, dims: Sequence[int | None], tensors: Sequence[Tensor]
    ) -> tuple[Linear, list[Tensor], Split]:
        """The same of a solve of all samples that `vmap` maps."""
        work, saved = _merged(self.work, size, dims[: self.count], tensors[: self.count], self.moving)
        directions = [
            _in_front(x, d, size) if i > 1 else merge_rows(x, d, size)
            for i, x, d in zip(self.moving, tensors[self.count :], dims[self.count :])
        ]
        linear = replace(self, work=work)
        return linear, [*saved, *directions], lambda found: tuple(split_rows(x, size) for x in found)


def _merged(
    work: Work, size: int, dims: Sequence[int | None], saved: Sequence[Tensor], own: list[int]
) -> tuple[Work, list[Tensor]]:
    """A solve under `vmap`, and what it saved, as a solve of all samples.

    Each of those that `vmap` maps has its own copy of the inputs `own`, counted as `wanted` and `moving` are.
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
