"""Weighted sums of slopes: the increments that a step adds to a state."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from implicitly.host import Array, remembered
from implicitly.transforms import records

# A step length: a number if all samples have the same, otherwise `(B, 1)`.
Length = float | Tensor


def as_length(dt: Array) -> Length:
    """Step lengths `(B,)`, or one for all samples, in a form that multiplies slopes `(B, n)`."""
    if isinstance(dt, float):
        return dt
    if isinstance(dt, Tensor):
        return dt.unsqueeze(1)
    return float(dt[0]) if len(dt) == 1 else torch.from_numpy(dt).unsqueeze(1)


def advanced(y: Tensor, dt: Length, weights: tuple[float, ...], slopes: Sequence[Tensor]) -> Tensor:
    """y + dt sum_i weights_i slopes_i `(B, n)`."""
    terms = nonzero(weights)
    if isinstance(dt, Tensor):
        return torch.addcmul(y, dt, _sum(terms, slopes, 1.0)) if terms else y
    for i, w in terms[:1]:
        y = torch.add(y, slopes[i], alpha=dt * w)
    return _added(y, terms[1:], slopes, dt)


def weighted(dt: Length, weights: tuple[float, ...], slopes: Sequence[Tensor]) -> Tensor:
    """dt sum_i weights_i slopes_i `(B, n)`; at least one weight must not be 0."""
    terms = nonzero(weights)
    return dt * _sum(terms, slopes, 1.0) if isinstance(dt, Tensor) else _sum(terms, slopes, dt)


def _sum(terms: tuple[tuple[int, float], ...], slopes: Sequence[Tensor], factor: float) -> Tensor:
    (i, w), *others = terms
    first = slopes[i] if w * factor == 1 and not others else slopes[i] * (w * factor)
    return _added(first, others, slopes, factor)


def _added(total: Tensor, terms: Sequence[tuple[int, float]], slopes: Sequence[Tensor], factor: float) -> Tensor:
    """`total`, which may be overwritten, plus the terms `factor * w * slopes[i]`."""
    if records():
        for i, w in terms:
            total = torch.add(total, slopes[i], alpha=factor * w)
        return total
    for i, w in terms:  # in place, as fresh memory costs more than the addition
        total.add_(slopes[i], alpha=factor * w)
    return total


@remembered(256)
def nonzero(weights: tuple[float, ...]) -> tuple[tuple[int, float], ...]:
    """The weights that are not 0, each with its index."""
    return tuple((i, w) for i, w in enumerate(weights) if w != 0)


@remembered(64)
def _nodes(nodes: tuple[float, ...], dtype: np.dtype) -> np.ndarray:
    return np.array(nodes, dtype=dtype)[:, None]


def stage_times(t: Array, dt: Array, nodes: tuple[float, ...]) -> Array:
    """t + c dt `(S, B)` for the S nodes c."""
    if isinstance(t, Tensor):
        return torch.stack([torch.add(t, dt, alpha=c) for c in nodes])
    return t + _nodes(nodes, dt.dtype) * dt
