"""Arithmetic of a few numbers a sample, where that is quickest.

Times, lengths and errors are arrays `(B,)`. On a CPU they are NumPy's, whose operations take a fifth of the time
of torch's; on an accelerator, under transforms and in a traced graph they are tensors. The functions used on both
have the same names there (`where`, `minimum`, `maximum`, `sign`), and in `Numbers` for a single sample's floats.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from implicitly.transforms import is_cpu, is_wrapped, under_transform, unwrapped, written_down

# A NumPy array or a tensor, `(B,)` or `(B, T)`.
Array = Any

P = ParamSpec("P")
R = TypeVar("R")


class Loops:
    """Whether the body of a traced loop `writes` into tensors that lie outside of it, rather than carries them.

    PyTorch can do that from 2.13 on, but not where what the body calls differentiates.
    """

    known = torch.__version__ >= "2.13"
    writes = known


LOOPS = Loops()


def carrying(function: Callable[..., R]) -> Callable[..., R]:
    """`function` with loops that write nowhere, for a trace."""

    def call(*args: Any) -> R:
        before, LOOPS.writes = LOOPS.writes, False
        value = function(*args)
        LOOPS.writes = before
        return value

    return call


def remembered(size: int) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A function whose last `size` results are kept; a traced graph has them as constants, and calls it itself."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.lru_cache(maxsize=size)
        def kept(*args: Any) -> R:
            # Tensors that are kept have to serve autograd, too, and who comes after a transform of torch.func.
            with torch.inference_mode(False), torch._C._DisableFuncTorch():  # pyright: ignore[reportPrivateUsage]
                return function(*args)  # pyright: ignore[reportCallIssue]

        @functools.wraps(function)
        def call(*args: Any) -> R:
            traced = torch.compiler.is_dynamo_compiling()
            return function(*args) if traced else kept(*args)  # pyright: ignore[reportCallIssue]

        return cast(Callable[P, R], call)

    return decorate


@functools.lru_cache(maxsize=64)
def _gauss(count: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    nodes, weights = np.polynomial.legendre.leggauss(count)
    return tuple(((nodes + 1) / 2).tolist()), tuple((weights / 2).tolist())


def gauss(count: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Nodes and weights on [0, 1] of Gauss' rule with so many points."""
    return _gauss(count)


# What `torch.compiler.assume_constant_result` does; that imports the whole compiler.
gauss._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def views(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The same tensors for the body of a loop.

    Of a tensor that was taken apart before, the tracer would hand the parts to the loop, and then refuse them as
    they share memory.
    """
    return tuple(x.view_as(x) for x in tensors)


class Numbers:
    """The functions for plain numbers, which take a tenth of the time of arrays with one entry."""

    minimum, maximum, isfinite = min, max, math.isfinite

    @staticmethod
    def where(condition: bool, yes: float, no: float) -> float:
        """One of two."""
        return yes if condition else no

    @staticmethod
    def sign(x: float) -> float:
        """1, -1 or 0."""
        return math.copysign(1.0, x) if x else 0.0


def library(x: Array) -> Any:
    """What has the functions that work on `x`: numpy, torch, or `Numbers` for a float."""
    if isinstance(x, Tensor):
        return torch
    return Numbers if type(x) is float else np


def on_host(*tensors: Tensor) -> bool:
    """Whether the numbers of all `tensors` can be looked at without waiting."""
    return not written_down() and all(is_cpu(x) and not is_wrapped(x) for x in tensors)


def to_host(x: Tensor) -> Array:
    """`x`, detached, as an array of the kind to be used where it lies."""
    if written_down() or not is_cpu(x):
        return x.detach()
    if not under_transform():
        return x.detach().numpy()
    x = unwrapped(x)
    with torch._C._DisableFuncTorch():  # pyright: ignore[reportPrivateUsage] - else a transform wraps it again
        return x.detach().numpy()


def clamped(x: Array, least: float | None, most: float | None) -> Array:
    """`x`, but no less than `least` and no more than `most`."""
    if isinstance(x, Tensor):
        return x.clamp(least, most)
    xp = library(x)
    if least is not None:  # NumPy's own clip takes four times as long
        x = xp.maximum(x, least)
    return x if most is None else xp.minimum(x, most)


def filled(x: Array, value: float, dtype: str | None = None) -> Array:
    """An array like `x`, of a `dtype` by its name where that is given, with `value` everywhere."""
    if isinstance(x, Tensor):
        return torch.full_like(x, value, dtype=None if dtype is None else getattr(torch, dtype))
    whole = np.empty(x.shape, x.dtype if dtype is None else dtype)  # NumPy's full takes three times as long
    whole.fill(value)
    return whole


def finite_rows(*matrices: Tensor) -> Array:
    """Which rows `(B,)` of all the `(B, n)` hold finite numbers only."""
    sizes = to_host(functools.reduce(torch.add, (torch.linalg.vector_norm(x, dim=1) for x in matrices)))
    if isinstance(sizes, np.ndarray):
        finite = np.isfinite(sizes)
        if finite.all():
            return finite
    rows = (x.isfinite().all(1) for x in matrices)
    return to_host(functools.reduce(torch.logical_and, rows))  # squares of finite numbers may be inf, too


def to_tensor(x: Array) -> Tensor:
    """`x` as a tensor."""
    return x if isinstance(x, Tensor) else torch.from_numpy(x)


def captured() -> bool:
    """Whether operations become part of a graph of the caller's, in which no number can be looked at: that of
    `torch.compile(model)`, or a CUDA graph."""
    if torch.compiler.is_dynamo_compiling():
        return True
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def maybe_any(mask: Array) -> bool:
    """Whether any entry is true where looking is cheap; True where it is not (tracing, an accelerator)."""
    if not isinstance(mask, Tensor):
        return bool(mask.any())
    if written_down():
        return True
    mask = unwrapped(mask)
    return mask.numel() > 0 and (not is_cpu(mask) or bool(mask.any()))


def all_now(mask: Array) -> bool:
    """Whether all entries are true; an accelerator is waited for."""
    return bool((unwrapped(mask) if isinstance(mask, Tensor) else mask).all())


def surely_all(mask: Tensor) -> bool:
    """Whether all entries are true where looking is cheap; False where it is not (tracing, an accelerator)."""
    return not maybe_any(~mask)
