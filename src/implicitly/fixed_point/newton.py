"""Newton's method, with dense Jacobians or matrix-free."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from implicitly.checks import POSITIVE_OR_INFINITE, check_number
from implicitly.descent import Descent, bottom, stopped, wolfe
from implicitly.fixed_point.line_search import backtrack
from implicitly.host import maybe_any
from implicitly.iterate import Proposal, Residual, Solver, coded, iterate, where_rows
from implicitly.linear import GMRES, Affine, check_linear_solver, dense
from implicitly.pullback import pullback
from implicitly.solution import Status
from implicitly.tree import row_norm


@dataclass(frozen=True)
class Newton(Solver):
    """Newton's method with a dense Jacobian per sample, computed for all samples by batched products.

    It is meant for small n (the Jacobians `(B, n, n)` must fit into `limit_gib`). With `line_search` the residual
    norm falls at every step, so that it converges from further away.

    For an objective (`argmin`), the line search makes the objective fall, by Wolfe's conditions. Where the Hessian
    is not positive definite, its eigenvalues are replaced by their absolute values, so that steps lead away from
    saddles and maxima (Nocedal and Wright, "Numerical Optimization", section 3.4). Without `line_search` it takes
    plain Newton steps, which lead to any stationary point.

    `rtol`, `atol` and `max_steps` are described in `implicitly.iterate.Solver`.

    Args:
        line_search: whether steps are shortened until the residual norm, or the objective, falls.
        limit_gib: the most memory that the Jacobians of all samples may take, in GiB; a solve that needs more
            raises ValueError.
    """

    line_search: bool = True
    limit_gib: float = 4.0
    max_steps: int = 50

    def __post_init__(self):
        super().__post_init__()
        check_number("Newton", "limit_gib", self.limit_gib, POSITIVE_OR_INFINITE)

    @property
    def nests(self) -> bool:
        """Whether it has a line search."""
        return self.line_search

    def start(self, F: Residual, z: Tensor, r: Tensor) -> tuple[Tensor, ...]:
        """Nothing; for an objective its values `(B,)`, and the thresholds `(B, 2)` of `bottom`."""
        if not (isinstance(F, Descent) and self.line_search):
            return ()
        value, _ = F.evaluate(z)
        return value, bottom(value, z, r)

    def propose(self, F: Residual, k: int | Tensor, z: Tensor, r: Tensor, memory: tuple[Tensor, ...]) -> Proposal:
        """The Newton step, shortened where the residual would otherwise grow."""
        if isinstance(F, Descent) and self.line_search:
            return self._descend(F, k, z, r, memory)
        _, pull = pullback(F, z)
        # Rows of the Jacobian: one vector-Jacobian product each, for all samples at once.
        transposed = dense(lambda u: -pull(u)[0], z, self.limit_gib)
        d, info = torch.linalg.solve_ex(transposed.mT, r)
        singular, verdict = (info != 0) | ~d.isfinite().all(1), None
        if maybe_any(singular):  # a Jacobian with NaN in it has no inverse either, but is not singular
            verdict = coded(transposed.isfinite().flatten(1).all(1), Status.RUNNING, Status.NON_FINITE)
        d = torch.where(singular[:, None], 0.0, d)
        z, r, calls = _move(F, z, r, d, self.line_search)
        return Proposal(z, (), r, calls + z.shape[1], singular, verdict)

    def _descend(self, F: Descent, k: int | Tensor, z: Tensor, r: Tensor, memory: tuple[Tensor, ...]) -> Proposal:
        """The step along a descent direction of the objective, with a length from the line search."""
        value, lowest = memory
        _, pull = pullback(F.residual, z)
        d = _downhill(dense(lambda u: -pull(u)[0], z, self.limit_gib), r)
        new = wolfe(F, z, value, r, d, torch.ones_like(r[:, 0]))
        verdict = stopped(new, new.length[:, 0] == 0, lowest)
        calls = new.calls + z.shape[1] + (k == 0)
        return Proposal(new.z, (new.value, lowest), new.r, calls, None, verdict, new.value < value)


def _downhill(hessian: Tensor, r: Tensor) -> Tensor:
    """|H|^-1 r, where |H| has the absolute eigenvalues of H `(B, n, n)`, bounded below relative to the largest."""
    finite = hessian.isfinite().all(-1).all(-1) & r.isfinite().all(1)
    hessian = torch.where(finite[:, None, None], (hessian + hessian.mT) / 2, 0.0)
    factor, info = torch.linalg.cholesky_ex(hessian)
    d = torch.cholesky_solve(r.unsqueeze(2), factor)[:, :, 0]
    # The Cholesky factor of a nearly singular matrix is unreliable.
    size = factor.diagonal(dim1=-2, dim2=-1)
    least = torch.finfo(r.dtype).eps ** 0.5
    good = (info == 0) & (size.amin(1) > least * size.amax(1)) & d.isfinite().all(1)
    if not maybe_any(~good):
        return d
    values, vectors = torch.linalg.eigh(hessian)
    size = values.abs()
    size = torch.maximum(size, least * size.amax(1, keepdim=True))
    along = (vectors.mT @ torch.where(finite[:, None], r, 0.0).unsqueeze(2))[:, :, 0]
    along = along / torch.where(size == 0, 1.0, size)
    return where_rows(good, d, (vectors @ along.unsqueeze(2))[:, :, 0])


@dataclass(frozen=True)
class NewtonKrylov(Solver):
    """The Newton-Krylov method: matrix-free linear solves, each only as accurate as the outer step deserves.

    The relative tolerance of the linear solve is Eisenstat and Walker's second choice, 0.9 (|F| / |F_last|)^2
    with their safeguard ("Choosing the forcing terms in an inexact Newton method", SIAM J. Sci. Comput. 17, 1996).

    Args:
        linear_solver: the solver of the linear system for each step; the forcing term replaces its tolerances.
        line_search: whether steps are shortened until the residual norm falls.

    `rtol`, `atol` and `max_steps` are described in `implicitly.iterate.Solver`.
    """

    linear_solver: Solver = GMRES(max_steps=60)
    line_search: bool = True
    max_steps: int = 50

    def __post_init__(self):
        super().__post_init__()
        check_linear_solver(self.linear_solver)

    @property
    def nests(self) -> bool:
        """True, because of its linear solves."""
        return True

    def start(self, F: Residual, z: Tensor, r: Tensor) -> tuple[Tensor, ...]:
        """The last forcing term and the last residual norm, `(B,)` each."""
        norm = row_norm(r)
        return torch.full_like(norm, 0.5), norm

    def propose(self, F: Residual, k: int | Tensor, z: Tensor, r: Tensor, memory: tuple[Tensor, ...]) -> Proposal:
        """The inexact Newton step, shortened where the residual would otherwise grow."""
        forcing, last = memory
        norm = row_norm(r)
        chosen = 0.9 * (norm / last) ** 2
        floor = 0.9 * forcing**2
        chosen = torch.where(floor > 0.1, torch.maximum(chosen, floor), chosen).clamp(1e-6, 0.9)
        forcing = torch.where(k > 0, chosen, forcing) if isinstance(k, Tensor) else (chosen if k else forcing)
        push = _pushforward(F, z)
        found = iterate(
            self.linear_solver,
            lambda b: Affine(lambda v: -push(v), b),
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


def _pushforward(F: Residual, z: Tensor) -> Callable[[Tensor], Tensor]:
    """Jacobian-vector products of F at z, by two reverse passes.

    Forward mode would not do, as it cannot be nested under dual numbers.
    """

    def make() -> Callable[..., Any]:
        _, pull = pullback(F, z)
        return pullback(lambda u: pull(u)[0], torch.zeros_like(z))[1]

    if torch.compiler.is_dynamo_compiling():  # a loop in a graph cannot use autograd state from outside the loop
        return lambda v: make()(v)[0]
    push = make()
    return lambda v: push(v)[0]


def _move(F: Residual, z: Tensor, r: Tensor, d: Tensor, line_search: bool) -> tuple[Tensor, Tensor, int | Tensor]:
    """The iterate after a step along d, its residual, and the number of calls of F."""
    if line_search:
        z, r, _, calls = backtrack(F, z, r, d)
        return z, r, calls
    return z + d, F(z + d), 1
