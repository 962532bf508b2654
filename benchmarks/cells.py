"""The cells to be solved, and an exact gradient to compare with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class DenseCell(nn.Module):
    """f(z, x) = tanh(linear(z) + x), which is a contraction at initialisation."""

    def __init__(self, width: int = 64):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """f(z, x) `(batch, width)`, like z and x."""
        return torch.tanh(self.linear(z) + x)


@contextmanager
def counted(module: nn.Module):
    """A context that yields a function returning the number of calls of `module` since its start."""
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    handle = module.register_forward_pre_hook(count)
    try:
        yield lambda: calls
    finally:
        handle.remove()


def unrolled_gradient(
    cell: nn.Module, x: Tensor, cotangent: Tensor, tolerance: float = 1e-10, limit: int = 1000
) -> tuple[Tensor, list[Tensor]]:
    """The solution, and its gradient by x and the parameters, of plain iteration unrolled to convergence.

    The iteration first converges, and then continues for as long as its reverse pass needs. All further steps are
    at the same point, so their reverse pass, u <- g + J'u, needs the graph of only one of them.
    """
    z = torch.zeros_like(x)
    with torch.no_grad():
        z = _repeat(lambda z: cell(z, x), z, tolerance, limit)
    z.requires_grad_()
    inputs = [x.detach().requires_grad_(), *cell.parameters()]
    fz = cell(z, inputs[0])

    def reverse_step(u: Tensor) -> Tensor:
        return cotangent + torch.autograd.grad(fz, z, u, retain_graph=True)[0]

    u = _repeat(reverse_step, cotangent, tolerance, limit)
    return z.detach(), list(torch.autograd.grad(fz, inputs, u))


def _repeat(step: Callable[[Tensor], Tensor], z: Tensor, tolerance: float, limit: int) -> Tensor:
    for _ in range(limit):
        new = step(z)
        change = (new - z).flatten(1).norm(dim=1) / new.flatten(1).norm(dim=1)
        z = new
        if float(change.max()) <= tolerance:
            return z
    raise RuntimeError(f"the reference did not converge in {limit} plain iterations: {float(change.max()):.3g}")


def relative_error(tensors: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """|tensors - exact| / |exact|, with all tensors as one vector."""
    difference = sum(float((t.double() - e).square().sum()) for t, e in zip(tensors, exact))
    return (difference / sum(float(e.square().sum()) for e in exact)) ** 0.5
