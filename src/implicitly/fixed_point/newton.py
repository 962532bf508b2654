"""Newton's method, with dense Jacobians or matrix-free."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from implicitly.fixed_point.line_search import backtrack
from implicitly.iterate import Proposal, Residual, Solver, iterate
from implicitly.linear import GMRES, Affine, dense
from implicitly.tree import pullback, row_norm


@dataclass(frozen=True)
class Newton(Solver):
    """Newton's method with a dense Jacobian a sample, all samples and columns in one batched product.

    For small n (the Jacobians `(B, n, n)` must fit `limit_gib`). With `line_search` the residual norm falls at
    every step, so it converges from further away.
    """

    line_search: bool = True
    limit_gib: float = 4.0
    max_steps: int = 50

    def start(self, F: Residual, z: Tensor, r: Tensor) -> tuple[Tensor, ...]:
        """It remembers nothing."""
        return ()

    def propose(self, F: Residual, k: int | Tensor, z: Tensor, r: Tensor, memory: tuple[Tensor, ...]) -> Proposal:
        """The Newton step, shortened where the residual would grow."""
        _, pull = pullback(F, z)
        # Rows of the Jacobian, one vector-Jacobian product for all samples each.
        transposed = dense(lambda u: -pull(u)[0], z, self.limit_gib)
        d, info = torch.linalg.solve_ex(transposed.mT, r)
        singular = (info != 0) | ~d.isfinite().all(1)
        d = torch.where(singular[:, None], 0.0, d)
        z, r, calls = _move(F, z, r, d, self.line_search)
        return Proposal(z, (), r, calls + z.shape[1], singular)


@dataclass(frozen=True)
class NewtonKrylov(Solver):
    """Newton's method with matrix-free linear solves, each only as accurate as the outer step deserves.

    The relative tolerance of the linear solve is Eisenstat and Walker's second choice, 0.9 (|F| / |F_last|)^2
    with their safeguard ("Choosing the forcing terms in an inexact Newton method", SIAM J. Sci. Comput. 17, 1996).

    Args:
        linear_solver: solves for the step; its tolerances are replaced by the forcing term.
    """

    linear_solver: Solver = GMRES(max_steps=60)
    line_search: bool = True
    max_steps: int = 50

    def start(self, F: Residual, z: Tensor, r: Tensor) -> tuple[Tensor, ...]:
        """The last forcing term and the last residual norm, `(B,)` each."""
        norm = row_norm(r)
        return torch.full_like(norm, 0.5), norm

    def propose(self, F: Residual, k: int | Tensor, z: Tensor, r: Tensor, memory: tuple[Tensor, ...]) -> Proposal:
        """The inexact Newton step, shortened where the residual would grow."""
        forcing, last = memory
        norm = row_norm(r)
        chosen = 0.9 * (norm / last) ** 2
        floor = 0.9 * forcing**2
        chosen = torch.where(floor > 0.1, torch.maximum(chosen, floor), chosen).clamp(1e-6, 0.9)
        forcing = torch.where(k > 0, chosen, forcing) if isinstance(k, Tensor) else (chosen if k else forcing)
        _, pull = pullback(F, z)
        # Jacobian-vector products from two reverse passes: forward mode cannot be nested under dual numbers.
        _, push = pullback(lambda u: pull(u)[0], torch.zeros_like(r))
        found = iterate(
            self.linear_solver,
            lambda b: Affine(lambda v: -push(v)[0], b),
            (r,),
            torch.zeros_like(r),
            r,
            rtol=forcing,
            atol=0.0,
            scale=norm,
        )
        d = torch.where(found.z.isfinite(), found.z, 0.0)
        z, r, calls = _move(F, z, r, d, self.line_search)
        return Proposal(z, (forcing, norm), r, calls + found.evaluations)


def _move(F: Residual, z: Tensor, r: Tensor, d: Tensor, line_search: bool) -> tuple[Tensor, Tensor, int | Tensor]:
    """The iterate along d, its residual, and the calls that took."""
    if line_search:
        z, r, _, calls = backtrack(F, z, r, d)
        return z, r, calls
    return z + d, F(z + d), 1
