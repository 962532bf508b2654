"""Arithmetic on a few numbers per sample, done where it is fastest.

Times, step lengths and errors are arrays `(B,)`. On a CPU they are NumPy arrays, whose operations take a fifth of
the time of torch's; on an accelerator, under transforms and in a traced graph they are tensors. The functions
used on both have the same names in NumPy and torch (`where`, `minimum`, `maximum`, `sign`), and in `Numbers` for
the floats of a single sample.
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
    """Whether the body of a traced loop `writes` into tensors outside of the loop, rather than carrying them.

    PyTorch supports that from 2.13 on, but not where a function that the body calls differentiates.
    """

    known = torch.__version__ >= "2.13"
    writes = known


LOOPS = Loops()


def carrying(function: Callable[..., R]) -> Callable[..., R]:
    """`function`, to be traced with loops that write to no tensor outside (see `Loops`)."""

    def call(*args: Any) -> R:
        before, LOOPS.writes = LOOPS.writes, False
        value = function(*args)
        LOOPS.writes = before
        return value

    return call


def remembered(size: int) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator that keeps a function's last `size` results; a trace calls the function itself instead."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.lru_cache(maxsize=size)
        def kept(*args: Any) -> R:
            # Tensors that are kept must also work with autograd, and after a transform of torch.func has ended.
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
    """Nodes and weights of the Gauss-Legendre rule with `count` points on [0, 1]."""
    return _gauss(count)


# Same effect as `torch.compiler.assume_constant_result`, which imports the whole compiler.
gauss._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def views(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Views of the same tensors, for the body of a loop.

    If a tensor was split before, the tracer would pass its parts to the loop, and then refuse them because they
    share memory.
    """
    return tuple(x.view_as(x) for x in tensors)


class Numbers:
    """The functions for plain floats, which take a tenth of the time that arrays with one entry take."""

    minimum, maximum, isfinite = min, max, math.isfinite

    @staticmethod
    def where(condition: bool, yes: float, no: float) -> float:
        """`yes` or `no`."""
        return yes if condition else no

    @staticmethod
    def sign(x: float) -> float:
        """1, -1 or 0."""
        return math.copysign(1.0, x) if x else 0.0


def library(x: Array) -> Any:
    """The module or class whose functions work on `x`: numpy, torch, or `Numbers` for a float."""
    if isinstance(x, Tensor):
        return torch
    return Numbers if type(x) is float else np


def on_host(*tensors: Tensor) -> bool:
    """Whether the values of all `tensors` can be read without waiting for a device."""
    return not written_down() and all(is_cpu(x) and not is_wrapped(x) for x in tensors)


def to_host(x: Tensor) -> Array:
    """`x`, detached, as the kind of array that is used on its device: NumPy on a CPU, else a tensor."""
    if written_down() or not is_cpu(x):
        return x.detach()
    if not under_transform():
        return x.detach().numpy()
    x = unwrapped(x)
    with torch._C._DisableFuncTorch():  # pyright: ignore[reportPrivateUsage] - else a transform wraps it again
        return x.detach().numpy()


def clamped(x: Array, least: float | None, most: float | None) -> Array:
    """`x` clamped to be no less than `least` and no more than `most`."""
    if isinstance(x, Tensor):
        return x.clamp(least, most)
    xp = library(x)
    if least is not None:  # NumPy's own clip takes four times as long
        x = xp.maximum(x, least)
    return x if most is None else xp.minimum(x, most)


def filled(x: Array, value: float, dtype: str | None = None) -> Array:
    """An array like `x` filled with `value`, of the `dtype` of that name if given."""
    if isinstance(x, Tensor):
        return torch.full_like(x, value, dtype=None if dtype is None else getattr(torch, dtype))
    whole = np.empty(x.shape, x.dtype if dtype is None else dtype)  # NumPy's full takes three times as long
    whole.fill(value)
    return whole


def finite_rows(*matrices: Tensor) -> Array:
    """Which rows `(B,)` hold only finite numbers in all the `matrices` `(B, n)`."""
    sizes = to_host(functools.reduce(torch.add, (torch.linalg.vector_norm(x, dim=1) for x in matrices)))
    if isinstance(sizes, np.ndarray):
        finite = np.isfinite(sizes)
        if finite.all():
            return finite
    rows = (x.isfinite().all(1) for x in matrices)
    return to_host(functools.reduce(torch.logical_and, rows))  # a norm may be inf for finite numbers, by overflow


def to_tensor(x: Array) -> Tensor:
    """`x` as a tensor."""
    return x if isinstance(x, Tensor) else torch.from_numpy(x)


def captured() -> bool:
    """Whether operations become part of a graph of the caller, in which no value can be read.

    That is the graph of `torch.compile(model)`, or a CUDA graph.
    """
    if torch.compiler.is_dynamo_compiling():
        return True
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def maybe_any(mask: Array) -> bool:
    """Whether any entry is true, where looking is cheap; True where it is not (tracing, an accelerator)."""
    if not isinstance(mask, Tensor):
        return bool(mask.any())
    if written_down():
        return True
    mask = unwrapped(mask)
    return mask.numel() > 0 and (not is_cpu(mask) or bool(mask.any()))


def all_now(mask: Array) -> bool:
    """Whether all entries are true; waits for an accelerator."""
    return bool((unwrapped(mask) if isinstance(mask, Tensor) else mask).all())


def surely_all(mask: Tensor) -> bool:
    """Whether all entries are true, where looking is cheap; False where it is not (tracing, an accelerator)."""
    return not maybe_any(~mask)
