"""A solution as piecewise polynomials, from which later slopes of a delay equation read past states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from implicitly.host import on_host, remembered
from implicitly.ode.integrate import Stepper
from implicitly.ode.method import Step
from implicitly.ode.record import STOP, Taken
from implicitly.transforms import is_tracked


class Piecewise(NamedTuple):
    """N consecutive polynomials of degree p, each given by its values at p + 1 `places`.

    The last place of one is the first of the next, so there are K = N p + 1 times.
    """

    times: Tensor  # (K,), or (K, B) of samples with steps of their own
    values: Any  # the pytree of a state, each tensor (K, *shape)

    def at(self, t: Tensor, degree: int) -> Any:
        """The states at times t, `(W,)` or `(W, B)`: each tensor `(W, *shape)`."""
        near = on_host(t, self.times) and not (is_tracked(t) or is_tracked(self.times))
        place, weights = (self._on_host if near else self._weighed)(t, degree)

        def between(values: Tensor) -> Tensor:
            around = _rows(values, place)
            share = weights.reshape(*weights.shape, *(1,) * (around.ndim - weights.ndim))
            return (share * around).sum(1).to(values.dtype)

        return pytree.tree_map(between, self.values)

    def _weighed(self, t: Tensor, degree: int) -> tuple[Tensor, Tensor]:
        """The indices of values around t and their differentiable weights, `(W, p + 1)` or `(W, p + 1, B)`."""
        begins, ends = self.times[:-1:degree].detach(), self.times[degree::degree].detach()
        ones = (1,) * (t.ndim - 1)
        # Pieces of length 0, which samples with fewer steps have, define no slope, so they are never chosen.
        long = begins != ends
        number = _range(len(begins), t.device).view(-1, *ones)
        behind = torch.where(long & (begins <= t.detach().unsqueeze(1)), number, -1).amax(1)
        piece = torch.where(behind < 0, long.int().argmax(0), behind)
        place = piece.unsqueeze(1) * degree + _range(degree + 1, t.device).view(-1, *ones)
        begin, *_, end = _rows(self.times, place).unbind(1)
        part = (t - begin) / torch.where(end == begin, 1.0, end - begin)
        x, same, scale = _lagrange(degree, part.dtype, part.device)
        factors = torch.where(same, 1.0, (part.unsqueeze(-1) - x).unsqueeze(-2))
        return place, (factors.prod(-1) * scale).movedim(-1, 1)

    def _on_host(self, t: Tensor, degree: int) -> tuple[Tensor, Tensor]:
        """As `_weighed`, in NumPy, which is faster for small sizes."""
        seen, times = t.numpy(), self.times.numpy()
        begins = times[:-1:degree]
        if t.ndim == 1:
            first = np.maximum(begins.searchsorted(seen, side="right") - 1, 0) * degree
            begin, end = times[first], times[first + degree]
        else:
            first = np.maximum((begins <= seen[:, None]).sum(1) - 1, 0) * degree
            columns = np.arange(seen.shape[1])
            begin, end = times[first, columns], times[first + degree, columns]
        part = (seen - begin) / np.where(end == begin, 1, end - begin)
        x, same, scale, order = _lagrange_on_host(degree, t.ndim, part.dtype)
        weights = np.where(same, 1, part[:, None, None] - x).prod(2) * scale
        return torch.from_numpy(first[:, None] + order), torch.from_numpy(weights)

    @classmethod
    def joined(cls, parts: Sequence[Piecewise]) -> Piecewise:
        """Several solutions as one, where each begins where the one before ends."""
        if len(parts) == 1:
            return parts[0]
        first, *others = parts
        return pytree.tree_map(lambda x, *rest: torch.cat([x, *(y[1:] for y in rest)]), first, *others)


def _rows(x: Tensor, place: Tensor) -> Tensor:
    """The rows of x `(K, ...)` at `place` `(W, p + 1)`, or those of x `(K, B, ...)` at `(W, p + 1, B)`."""
    return x[place] if place.ndim == 2 else x[place, _range(place.shape[-1], x.device)]


@remembered(64)
def _range(count: int, device: torch.device) -> Tensor:
    return torch.arange(count, device=device)


@remembered(32)
def places(degree: int) -> np.ndarray:
    """The relative positions `(p + 1,)`, from 0 to 1, of the known values in a piece: Chebyshev points."""
    return (1 - np.cos(np.pi * np.arange(degree + 1) / degree)) / 2


@remembered(32)
def _lagrange(degree: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """For the Lagrange polynomials, 1 at one of the `places` and 0 at the others: places, a mask, and factors."""
    x, same = torch.from_numpy(places(degree)), torch.eye(degree + 1, dtype=torch.bool)
    scale = 1 / torch.where(same, 1.0, x.unsqueeze(1) - x).prod(1)
    return x.to(device, dtype), same.to(device), scale.to(device, dtype)


@remembered(32)
def _lagrange_on_host(degree: int, ndim: int, dtype: np.dtype) -> tuple[np.ndarray, ...]:
    """As `_lagrange`, shaped to broadcast with an array of `ndim` dimensions; and the indices of the places."""
    count, ones = degree + 1, (1,) * (ndim - 1)
    x, same, scale = (c.numpy() for c in _lagrange(degree, torch.float64, torch.device("cpu")))
    x, scale = x.astype(dtype).reshape(count, *ones), scale.astype(dtype).reshape(count, *ones)
    return x, same.reshape(count, count, *ones), scale, np.arange(count).reshape(count, *ones)


@dataclass
class KnotRecorder:
    """Records the dense output of a solve of `batch` samples at the `places` of each step.

    A delayed y(t - lag) is later interpolated between these values. `listen` is called by the solve after each
    step. `degree` is that of the dense output, so the polynomials through the places reproduce it exactly.
    """

    degree: int
    batch: int
    values: list[Tensor] = field(default_factory=list)  # (B, p, n)

    def listen(self, stepper: Stepper, step: Step, taken: Taken, rows: Tensor | None) -> None:
        """Record a step, without its end point, which is the start of the next one."""
        inner = torch.from_numpy(places(self.degree)[1:-1]).to(step.y).expand(len(step.y), -1)
        begin = step.y.unsqueeze(1)
        values = torch.cat([begin, stepper.method.dense_output(stepper.bound.F, step, inner)], dim=1)
        if rows is not None:
            values = values.new_zeros(self.batch, *values.shape[1:]).index_copy(0, rows, values)
        self.values.append(values)

    def at_knots(self, accepted: np.ndarray, end: Tensor, finished: Tensor) -> Tensor:
        """The values `(B, K, n)` at `knots` of the steps that samples `accepted` `(B, N)`, up to `end` `(B, n)`.

        A sample that has not `finished` has one more piece, with NaN, beyond the time it reached.
        """
        end = torch.where(finished.unsqueeze(1), end, float("nan"))
        count = max(1, int((accepted.sum(1) + ~finished.cpu().numpy()).max(initial=0)))
        own = torch.from_numpy(np.argsort(~accepted, axis=1, kind="stable")[:, :count])
        beyond = torch.arange(count) >= torch.from_numpy(accepted.sum(1)).unsqueeze(1)
        inner = end[:, None, None].expand(-1, count, self.degree, -1)
        if own.shape[1]:
            own = torch.nn.functional.pad(own, (0, count - own.shape[1]))
            steps = torch.stack(self.values, dim=1).take_along_dim(own[:, :, None, None].to(end.device), 1)
            inner = torch.where(beyond[:, :, None, None].to(end.device), inner, steps)
        return torch.cat([inner.flatten(1, 2), end.unsqueeze(1)], dim=1)


def knots(steps: Taken, span: np.ndarray, degree: int) -> np.ndarray:
    """The knots of `steps`, each field `(B, N)`, through the `span` `(B, 2)`: the `places` in all steps.

    For each, `(B, K, 3)` holds its time, and its derivatives by the first and by the last time. Samples with fewer
    steps than others have additional pieces of length 0 at the end.
    """
    edges = [_edges(Taken(*step), ends) for *step, ends in zip(*steps, span)]
    count = max((len(e) for e in edges), default=2)
    whole = [np.concatenate([e, np.repeat(e[-1:], count - len(e), axis=0)]) for e in edges]
    rows = np.array(whole, dtype=span.dtype).reshape(-1, count, 1, 3)
    inner = rows[:, :-1] + np.diff(rows, axis=1) * places(degree)[:-1, None].astype(span.dtype)
    return np.concatenate([inner.reshape(len(span), (count - 1) * degree, 3), rows[:, -1]], axis=1)


def _edges(steps: Taken, span: np.ndarray) -> np.ndarray:
    """The start and end times of a sample's steps, `(N + 1, 3)`, as in `knots`; without any step, the `span`."""
    t, dt, last, _, ends = (x[steps.accepted] for x in steps)
    begins, stops = (t, ends == STOP) if len(t) else (span[:1], np.zeros(1, dtype=bool))
    if len(t) and not last[-1]:  # a sample that failed
        begins, stops = np.append(t, t[-1] + dt[-1]), np.append(stops, False)
    # All steps move with the first time, up to one that ends at one of `tstops`.
    moving = np.cumsum(stops) - stops == 0
    rows = np.stack([begins, moving.astype(t.dtype), np.zeros_like(begins)], axis=1)
    return np.concatenate([rows, np.array([[span[1], 0, 1]], dtype=t.dtype)])
