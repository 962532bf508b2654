"""Quadratic programs to try things on."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.problems import seeded

D = torch.float64
NAMES = ("Q", "p", "G", "h", "A", "b")


def program(batch=3, n=4, m=5, q=1, shared=(), seed=0, ridge=0.3, dtype=D) -> tuple[Tensor, ...]:
    """A feasible strictly convex program, `shared` the arguments without a batch; batch None: none has one."""
    g = seeded(seed)

    def draw(name: str, *shape: int) -> Tensor:
        lead = () if batch is None or name in shared else (batch,)
        return torch.randn(*lead, *shape, generator=g, dtype=D)

    L = draw("Q", n, n)
    Q = L @ L.mT + ridge * torch.eye(n, dtype=D)
    p, G, A = 8 * draw("p", n), draw("G", m, n), draw("A", q, n)
    # z = 0 satisfies all of them, and some will bind.
    h = 0.3 * draw("h", m).abs() + 0.05
    b = torch.zeros_like(draw("b", q))
    return tuple(t.to(dtype) for t in (Q, p, G, h, A, b))


def sample(args: tuple[Tensor, ...], i: int) -> tuple[Tensor, ...]:
    """Program i of a batch."""
    return tuple(t[i] if t.ndim > d else t for t, d in zip(args, (2, 1, 2, 1, 2, 1)))
