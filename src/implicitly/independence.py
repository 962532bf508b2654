"""Do the samples of a batch depend on each other?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from implicitly.tree import Layout, open_function, row_norm


def check_independence(f: Callable[..., Any], z: Any, *args: Any, samples: int = 16) -> list[tuple[int, int]]:
    """The pairs (i, j) of different samples for which sample i of f(z, *args) depends on sample j of z.

    An empty list means that `batch_dims=1` is right for f; anything else (batch statistics, attention across the
    batch) needs `batch_dims=0`. Found from derivatives in a random direction, for the first `samples` outputs.
    Buffers of f, such as running statistics, are afterwards what they were.

    Args:
        z: a state at which f is differentiable, `(B, ...)` or a pytree of them.
    """
    layout = Layout.of(z, 1, "z")
    buffers = list(open_function(f, args, layout.device).opened.buffers())
    before = [b.clone() for b in buffers]
    try:
        return _coupled(f, layout, layout.pack(z).detach(), args, samples)
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, before):
                buffer.copy_(value)


def _coupled(
    f: Callable[..., Any], layout: Layout, matrix: Tensor, args: tuple[Any, ...], samples: int
) -> list[tuple[int, int]]:
    with torch.enable_grad():
        matrix.requires_grad_()
        value = f(layout.unpack(matrix), *args)
        layout.check(value, "z")
        value = layout.pack(value)
        if not value.requires_grad:
            return []
        generator = torch.Generator(value.device).manual_seed(0)
        direction = torch.randn(value.shape[1], dtype=value.dtype, device=value.device, generator=generator)
        coupled = []
        for i in range(min(samples, layout.batch)):
            (gradient,) = torch.autograd.grad(
                value[i] @ direction, matrix, retain_graph=True, materialize_grads=True
            )
            reached = row_norm(gradient).nonzero()[:, 0].tolist()
            coupled += [(i, j) for j in reached if j != i]
    return coupled
