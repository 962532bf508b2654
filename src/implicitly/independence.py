"""Do the samples of a batch depend on each other?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from implicitly.checks import check_count
from implicitly.functions import open_function
from implicitly.inference import normal
from implicitly.transforms import out_of_inference_mode
from implicitly.tree import Layout, row_norm

# How far from z, relative to its size, f is examined a second time: derivatives that vanish at z itself (those of
# z * mean(z) at z = 0, a common start) do not vanish nearby.
BESIDE = 1e-2


def check_independence(f: Callable[..., Any], z: Any, *args: Any, samples: int = 16) -> list[tuple[int, int]]:
    """Find the pairs (i, j) of different samples for which sample i of f(z, *args) depends on sample j of z.

    An empty list means that `batch_dims=1` is right for f; anything else (batch statistics, attention across the
    batch) needs `batch_dims=0`. The test uses derivatives in random directions, at z and at a point near z. It
    misses a dependence without a derivative there (on an order of the samples from `argsort`, on a detached
    statistic). It costs two calls of f and 4 log2(B) backward passes; where samples are coupled, at most 2 B more.
    Buffers of f, such as running statistics, are restored afterwards.

    Args:
        z: a state near which f is differentiable, `(B, ...)` or a pytree of them.
        samples: report pairs for at most this many coupled outputs i, the first ones; all outputs are searched.

    Returns:
        The pairs (i, j), sorted.

    Raises:
        ValueError: a derivative is not finite, and so tells nothing.
    """
    check_count("check_independence", "samples", samples)
    layout = Layout.of(z, 1, "z")
    buffers = list(open_function(f, args, layout.device).opened.buffers())
    before = [b.clone() for b in buffers]
    try:
        with out_of_inference_mode((z, args)) as (z, args), normal(f, args):
            coupled = _coupled_near(f, layout, layout.pack(z).detach(), args, samples)
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, before):
                buffer.copy_(value)
    named = sorted({i for i, _ in coupled})[:samples]
    return sorted(pair for pair in coupled if pair[0] in named)


def _coupled_near(
    f: Callable[..., Any], layout: Layout, matrix: Tensor, args: tuple[Any, ...], samples: int
) -> set[tuple[int, int]]:
    """The pairs that are coupled at `matrix` or at a point near it."""
    generator = torch.Generator(matrix.device).manual_seed(0)

    def draw() -> Tensor:
        return torch.randn(matrix.shape, dtype=matrix.dtype, device=matrix.device, generator=generator)

    typical = matrix.square().mean().sqrt()
    beside = matrix + BESIDE * torch.where(typical > 0, typical, 1.0) * draw()
    found: set[tuple[int, int]] = set()
    for point in (matrix, beside):
        found |= _coupled(_pullback(f, layout, point, args), draw(), samples)
    return found


def _pullback(
    f: Callable[..., Any], layout: Layout, matrix: Tensor, args: tuple[Any, ...]
) -> Callable[[Tensor], Tensor] | None:
    """The map v -> J' v at `matrix`, for v of its shape; None if f ignores z."""
    with torch.enable_grad():
        matrix = matrix.clone().requires_grad_()
        value = f(layout.unpack(matrix), *args)
        layout.check(value, "z")
        value = layout.pack(value)
    if not value.requires_grad:
        return None

    def pull(v: Tensor) -> Tensor:
        (gradient,) = torch.autograd.grad(value, matrix, v, retain_graph=True, materialize_grads=True)
        if not gradient.isfinite().all():
            row = int((~gradient.isfinite().all(1)).nonzero()[0])
            raise ValueError(
                f"check_independence: f has no finite derivative by sample {row} of z, at z or beside it; pass "
                "a z where it has one"
            )
        return gradient

    return pull


def _coupled(pull: Callable[[Tensor], Tensor] | None, v: Tensor, samples: int) -> set[tuple[int, int]]:
    """Pairs (i, j) of an output and a sample that it depends on, for the first `samples` outputs that have any."""
    found: set[tuple[int, int]] = set()
    if pull is None or not any(_reached(pull, v, outputs) for outputs in _separating(len(v))):
        return found
    for i in range(len(v)):
        found |= {(i, j) for j in _reached(pull, v, [i])}
        if len({i for i, _ in found}) == samples:
            break
    return found


def _reached(pull: Callable[[Tensor], Tensor], v: Tensor, outputs: list[int]) -> list[int]:
    """The samples outside of `outputs` on which some of the `outputs` depend."""
    chosen = torch.zeros(len(v), dtype=torch.bool, device=v.device)
    chosen[outputs] = True
    gradient = pull(torch.where(chosen[:, None], v, 0.0))
    return ((row_norm(gradient) > 0) & ~chosen).nonzero()[:, 0].tolist()


def _separating(count: int) -> list[list[int]]:
    """Sets of numbers below `count` such that for any two numbers one set has the first and not the second."""
    bits = range(max(count - 1, 0).bit_length())
    return [[i for i in range(count) if i >> bit & 1 == value] for bit in bits for value in (0, 1)]
