"""The quadratic programs to be solved."""

from __future__ import annotations

import torch
from torch import Tensor

D = torch.float64

Programs = tuple[Tensor, ...]


def draw(batch: int, n: int, m: int, q: int, shared: bool = False) -> Programs:
    """Random feasible programs; if `shared`, all have the same matrices."""
    generator = torch.Generator().manual_seed(0)
    lead = () if shared else (batch,)
    L = torch.rand(*lead, n, n, generator=generator, dtype=D)
    G, A = (torch.randn(*lead, k, n, generator=generator, dtype=D) for k in (m, q))
    z0, p = (torch.randn(batch, n, generator=generator, dtype=D) for _ in range(2))
    h = (G @ z0.unsqueeze(2)).squeeze(2) + torch.rand(batch, m, generator=generator, dtype=D)
    Q = L @ L.mT + 0.1 * torch.eye(n, dtype=D)
    args = (Q, p, G, h, *((A, (A @ z0.unsqueeze(2)).squeeze(2)) if q else ()))
    return tuple(t.requires_grad_() for t in args)
