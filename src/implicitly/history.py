"""The memory of solvers: vectors `(B, m, n)` in m slots, one of them written a step."""

from __future__ import annotations

import torch
from torch import Tensor

from implicitly.tree import is_wrapped


def empty_slots(like: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """Two memories of zeros `(B, slots, n)` for vectors `like` `(B, n)`.

    In one allocation: twice as large a block is one that the C library keeps between solves, and fresh pages cost
    more than everything else a solver does.
    """
    first, second = like.new_zeros(2, like.shape[0], slots, like.shape[1]).unbind(0)
    return first, second


def write(buffer: Tensor, slot: int | Tensor, value: Tensor, dim: int = 1) -> Tensor:
    """`buffer` with `value` in place `slot` of dimension `dim`; in place where nothing can notice."""
    if isinstance(slot, Tensor):
        return buffer.index_copy(dim, slot.reshape(1), value.unsqueeze(dim))
    if not _unseen(buffer, value):
        return torch.select_scatter(buffer, value, dim, slot)
    buffer.select(dim, slot).copy_(value)
    return buffer


def write_sum(buffer: Tensor, slot: int | Tensor, x: Tensor, y: Tensor, alpha: float) -> Tensor:
    """`buffer` with `x + alpha * y` in place `slot` of dimension 1, in one pass where nothing can notice."""
    if isinstance(slot, Tensor) or not _unseen(buffer, x, y):
        return write(buffer, slot, torch.add(x, y, alpha=alpha))
    torch.add(x, y, alpha=alpha, out=buffer.select(1, slot))
    return buffer


def _unseen(*tensors: Tensor) -> bool:
    """Whether neither autograd nor a transform looks on."""
    return not torch.is_grad_enabled() and not any(is_wrapped(t) for t in tensors)


def filled(buffer: Tensor, count: int | Tensor) -> Tensor:
    """The first `count` slots of `buffer` `(B, m, ...)` where that is a number; all of them in a traced loop."""
    return buffer[:, :count] if isinstance(count, int) else buffer


def products(x: Tensor, rows: Tensor) -> Tensor:
    """Inner products of x `(B, n)` with each of `rows` `(B, m, n)`: `(B, m)`."""
    # This order of factors is ten times faster than rows @ x on a CPU.
    return torch.bmm(x.unsqueeze(1), rows.mT)[:, 0]


def combine(coefficients: Tensor, rows: Tensor) -> Tensor:
    """The linear combination of `rows` `(B, m, n)` with `coefficients` `(B, m)`: `(B, n)`."""
    return torch.bmm(coefficients.unsqueeze(1), rows)[:, 0]
