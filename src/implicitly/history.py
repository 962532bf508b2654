"""Buffers for the memory of solvers: vectors `(B, m, n)` in m slots, one of which is written per step."""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from implicitly.host import LOOPS, Array
from implicitly.transforms import is_cpu, is_wrapped

# The number of slots allocated at first. Many solves need no more.
ROOM = 10
# Most bytes of memory that a thread keeps for its next solve.
KEPT = 2**28
# Bytes of the largest block that glibc learns from (its DEFAULT_MMAP_THRESHOLD_MAX is 2**25).
MAPPED = 2**25 - 2**16


def empty_slots(like: Tensor, slots: int, count: int = 2) -> tuple[Tensor, ...]:
    """Allocate `count` buffers `(B, m, n)` for vectors `like` `(B, n)`, with room for the first of `slots` slots.

    `with_room` makes more room. Slots that were never written are never read (see `filled`), except in a traced
    loop, where all slots exist and are zero.
    """
    batch, n = like.shape
    if torch.compiler.is_dynamo_compiling():
        # Each has its own memory: a loop refuses two inputs where changing one might change the other.
        return tuple(like.new_zeros(batch, slots, n) for _ in range(count))
    # The slot is the slowest dimension in memory.
    return _empty(like, count, min(slots, ROOM), batch, n).transpose(1, 2).unbind(0)


def _empty(like: Tensor, *shape: int) -> Tensor:
    if not is_cpu(like):
        return like.new_empty(shape)
    dtype = np.dtype(str(like.dtype).removeprefix("torch."))  # asking a tensor is not possible under torch.func
    return torch.from_numpy(_workspace.take(math.prod(shape) * dtype.itemsize).view(dtype).reshape(shape))


class _Workspace(threading.local):
    """A thread's memory, reused from solve to solve: fresh pages cost more than all else that a solver does."""

    def __init__(self):
        # Released at once. From then on glibc keeps memory of up to twice this size that f and the solver free.
        # Otherwise it would return that to the system after every call, and fetch it again page by page.
        self.block = np.empty(MAPPED, dtype=np.uint8)
        self.block = np.empty(0, dtype=np.uint8)

    def take(self, size: int) -> np.ndarray:
        """An array of `size` bytes that nobody else uses for as long as the caller holds it."""
        # Arrays that were handed out refer to the block. Two references are the attribute and the argument.
        if self.block.nbytes < size or sys.getrefcount(self.block) > 2:
            # NumPy asks the system for huge pages, from which long vectors are read faster.
            block = np.empty(size, dtype=np.uint8)
            if size > KEPT:
                return block
            self.block = block
        return self.block[:size]


_workspace = _Workspace()


def with_room(buffer: Tensor, slot: int | Tensor, slots: int) -> Tensor:
    """`buffer`, or a copy with twice the slots (at most `slots`) if it has no room for `slot`."""
    batch, room, n = buffer.shape
    if isinstance(slot, Tensor) or slot < room:
        return buffer
    more = min(2 * room, slots)
    if not _unseen(buffer):
        return torch.nn.functional.pad(buffer, (0, 0, 0, more - room))
    larger = _empty(buffer, more, batch, n).transpose(0, 1)
    larger[:, :room] = buffer
    return larger


def write(buffer: Tensor, slot: int | Tensor, value: Tensor, dim: int = 1) -> Tensor:
    """`buffer` with `value` at `slot` of dimension `dim`; written in place where nothing can notice."""
    if isinstance(slot, Tensor):
        return buffer.index_copy(dim, slot.reshape(1), value.unsqueeze(dim))
    if not _unseen(buffer, value):
        return torch.select_scatter(buffer, value, dim, slot)
    buffer.select(dim, slot).copy_(value)
    return buffer


def write_kept(buffer: Tensor, slot: int | Tensor, value: Tensor) -> Tensor:
    """Like `write`, for a buffer counted in `Solver.history_slots`, which traced loops write in place."""
    if isinstance(slot, Tensor) and LOOPS.writes:
        return buffer.index_copy_(1, slot.reshape(1), value.unsqueeze(1))
    return write(buffer, slot, value)


def write_result(
    buffer: Tensor, slot: int | Tensor, op: Callable[..., Tensor], *operands: Tensor
) -> tuple[Tensor, Tensor]:
    """Like `write_kept` with the value `op(*operands)`, also returned; no copy where nothing can notice."""
    if isinstance(slot, Tensor) or not _unseen(buffer, *operands):
        value = op(*operands)
        return write_kept(buffer, slot, value), value
    return buffer, op(*operands, out=buffer.select(1, slot))


def write_cross(buffer: Tensor, slot: int | Tensor, values: Tensor) -> Tensor:
    """The symmetric `buffer` `(B, m, m)` with `values` `(B, c)`, c <= m, in row `slot` and column `slot`."""
    missing = buffer.shape[1] - values.shape[1]
    if isinstance(slot, Tensor) or not _unseen(buffer, values):
        values = torch.nn.functional.pad(values, (0, missing))
        return write(write(buffer, slot, values), slot, values, dim=2)
    buffer[:, slot, : values.shape[1]] = values
    buffer[:, : values.shape[1], slot] = values
    return buffer


def read(buffer: Array, slot: int | Tensor) -> Array:
    """The entry at `slot` of dimension 1."""
    return buffer.index_select(1, slot.reshape(1))[:, 0] if isinstance(slot, Tensor) else buffer[:, slot]


def _unseen(*tensors: Tensor) -> bool:
    """Whether no autograd, transform or tracer records what happens to `tensors`."""
    if torch.compiler.is_dynamo_compiling() or torch.is_grad_enabled():
        return False
    return not any(is_wrapped(t) for t in tensors)


def filled(buffer: Tensor, count: int | Tensor) -> Tensor:
    """The first `count` slots of `buffer` `(B, m, ...)` if `count` is an int; all of them in a traced loop."""
    return buffer[:, :count] if isinstance(count, int) else buffer


def products(x: Tensor, rows: Tensor) -> Tensor:
    """Inner products of x `(B, n)` with each of `rows` `(B, m, n)`: `(B, m)`."""
    # This order of factors is ten times faster than rows @ x on a CPU.
    return torch.bmm(x.unsqueeze(1), rows.mT)[:, 0]


def combine(coefficients: Tensor, rows: Tensor) -> Tensor:
    """The linear combination of `rows` `(B, m, n)` with `coefficients` `(B, m)`: `(B, n)`."""
    return torch.bmm(coefficients.unsqueeze(1), rows)[:, 0]


def add_combined(
    x: Tensor, coefficients: Tensor, rows: Tensor, alpha: float = 1.0, out: Tensor | None = None
) -> Tensor:
    """x `(B, n)` plus alpha times the linear combination of `rows` `(B, m, n)`, in one pass."""
    place = None if out is None else out.unsqueeze(1)
    return torch.baddbmm(x.unsqueeze(1), coefficients.unsqueeze(1), rows, alpha=alpha, out=place)[:, 0]


def added(x: Tensor, coefficients: Tensor, rows: Tensor) -> Tensor:
    """Like `add_combined`, but in place, for an `x` that nobody else holds."""
    return x.unsqueeze(1).baddbmm_(coefficients.unsqueeze(1), rows)[:, 0]
