"""Entropic projection onto the transport polytope: Sinkhorn's fixed point in the log domain."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from implicitly.argmin.rows import as_parameter, check_broadcast, check_state, check_values, outside, per_row
from implicitly.host import happens
from implicitly.implicit import Backward, Condition, Map, Report, attach, find, is_usable
from implicitly.iterate import Proposal, Solver
from implicitly.linear import GMRES

# From a temperature of the size of the costs down to the one asked for, by halves.
HALVINGS = 40
SWEEPS_EACH = 4
NEWTON_STEPS = 30


@dataclass(frozen=True, kw_only=True)
class Sinkhorn(Solver):
    """Sinkhorn's sweeps: the potential of the rows that fits them, given that of the columns, and so on.

    `max_steps` counts sweeps after the start, which is by falling temperatures and then Newton's method.
    """

    max_steps: int = 1000

    def start(self, F: Any, z: Tensor, r: Tensor) -> tuple[Tensor, ...]:
        """It remembers nothing."""
        return ()

    def propose(self, F: Any, k: int | Tensor, z: Tensor, r: Tensor, memory: Any) -> Proposal:
        """One sweep."""
        return Proposal(z + r)


def sinkhorn(
    cost: Tensor,
    row: Tensor,
    column: Tensor,
    epsilon: float | Tensor = 0.1,
    solver: Solver = Sinkhorn(),
    linear_solver: Solver = GMRES(),
    on_failure: str = "raise",
) -> Tensor:
    """The plan with the row sums `row` and column sums `column` that costs least, less its entropy.

    X >= 0 minimises <cost, X> + epsilon * sum X (log X - 1). It is the projection, in the Kullback-Leibler
    divergence, of exp(-cost / epsilon) onto the transport polytope: X_ij = exp((f_i + g_j - cost_ij) / epsilon).
    Cuturi, "Sinkhorn Distances", NeurIPS 2013. Potentials are found in the log domain, and differentiated through
    the condition that they are a fixed point of the sweep, which holds whatever found them: any order, both modes,
    memory of one sweep.

    Args:
        cost: `(..., n, m)`.
        row: `(..., n)`, positive. Leading dimensions of the three broadcast.
        column: `(..., m)`, positive, with the same sum as `row`.
        epsilon: > 0 in the unit of the cost; a number or a tensor that broadcasts with `(...)`.
        solver: its tolerances are relative to the potentials (in units of epsilon).
        linear_solver: of the derivative's systems, which are (n, n) for each plan, matrix-free.
        on_failure: "raise", "warn" or "ignore" plans that do not converge; ignored ones have zero gradient.

    Raises:
        TypeError: `cost` is not of a floating dtype.
        ValueError: marginals that are not positive, or whose sums differ; epsilon <= 0; shapes that do not fit.
        SolverError: a plan did not converge and `on_failure="raise"`.
    """
    check_state("sinkhorn", cost, dims=2)
    row, column = _marginals(cost, row, column)
    epsilon = per_row("sinkhorn", "epsilon", epsilon, cost, dims=2)
    check_values((epsilon > 0) & epsilon.isfinite(), epsilon, "sinkhorn: epsilon must be positive and finite")
    report = Report(on_failure)
    n, m = cost.shape[-2:]
    batch = torch.broadcast_shapes(cost.shape[:-2], row.shape[:-1], column.shape[:-1], epsilon.shape[:-2])
    K = (cost / epsilon).expand(*batch, n, m).reshape(-1, n, m)
    p = row.log().expand(*batch, n).reshape(-1, n)
    q = column.log().expand(*batch, m).reshape(-1, m)
    condition = Condition(_sweep, "sinkhorn", cost.dtype, report, relative_to_iterate=True, carries=(0, 0, 0))
    theta = (K, p, q)
    found = find(solver, condition, outside(_potentials, *theta), theta)
    usable = is_usable(found.status)
    if happens(~usable):
        theta = tuple(torch.where(usable.view(-1, *(1,) * (t.ndim - 1)), t, t.detach()) for t in theta)
    phi = attach(condition, found.z, theta, Backward(linear_solver))
    return _plan(phi, *theta).reshape(*batch, n, m)


def _marginals(cost: Tensor, row: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
    """Both with the dtype of `cost`; raises TypeError / ValueError unless some plan has them."""
    marginals = []
    for name, value, size in (("row", row, cost.shape[-2]), ("column", column, cost.shape[-1])):
        value = as_parameter("sinkhorn", name, value, cost)
        if value.ndim < 1 or value.shape[-1] != size:
            raise ValueError(
                f"sinkhorn: {name} must be (..., {size}) for a cost {tuple(cost.shape)}, got {tuple(value.shape)}"
            )
        check_broadcast("sinkhorn", name, value.shape[:-1], cost.shape[:-2], "leading dimensions")
        fine = (value > 0) & value.isfinite()
        check_values(fine, value, f"sinkhorn: {name} must be positive (leave out rows and columns of no mass)")
        marginals.append(value)
    first, second = (value.detach().sum(-1) for value in marginals)
    check_broadcast("sinkhorn", "row", first.shape, second.shape, "leading dimensions of column")
    gap = first - second
    limit = torch.finfo(cost.dtype).eps ** 0.75 * (first + second)
    check_values(
        gap.abs() <= limit, gap, "sinkhorn: row and column must have the same sum; the first minus the second"
    )
    return marginals[0], marginals[1]


def _columns(phi: Tensor, K: Tensor, q: Tensor) -> Tensor:
    """The potential `(B, m)` of the columns that makes their sums right."""
    return q - (phi.unsqueeze(2) - K).logsumexp(1)


def _rows(psi: Tensor, K: Tensor, p: Tensor) -> Tensor:
    return p - (psi.unsqueeze(1) - K).logsumexp(2)


def _sweep(K: Tensor, p: Tensor, q: Tensor) -> Map:
    """The residual of the sweep. A constant may be moved from one potential to the other: the mean of phi is 0."""

    def residual(phi: Tensor) -> Tensor:
        moved = _rows(_columns(phi, K, q), K, p) - phi
        # Without the means A would be singular; with -mean(phi) it is regular, and holds the mean at 0.
        return moved - moved.mean(1, keepdim=True) - phi.mean(1, keepdim=True)

    return residual


def _plan(phi: Tensor, K: Tensor, p: Tensor, q: Tensor) -> Tensor:
    psi = _columns(phi, K, q)
    return (phi.unsqueeze(2) + psi.unsqueeze(1) - K).exp()


def _potentials(K: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """Potentials of the rows, by sweeps at falling temperatures and Newton's method on the dual."""
    lead, (n, m) = K.shape[:-2], K.shape[-2:]
    K, p, q = K.reshape(-1, n, m), p.reshape(-1, n), q.reshape(-1, m)
    phi = torch.zeros_like(p)
    spread = (K.amax((1, 2)) - K.amin((1, 2))).clamp(min=1).nan_to_num(1.0, 1.0)[:, None] if len(K) else p[:, :1]
    for halving in range(HALVINGS):
        heat = (spread * 0.5**halving).clamp(min=1)  # the temperature in units of epsilon
        sharp = K / heat.unsqueeze(2)
        for _ in range(SWEEPS_EACH):
            phi = heat * _rows(_columns(phi / heat, sharp, q), sharp, p)
        if bool((heat <= 1).all()):
            break
    phi = _newton(phi - phi.mean(1, keepdim=True), K, p, q)
    return phi.reshape(*lead, n)


def _newton(phi: Tensor, K: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """Newton's method on the dual, with the Hessian diag(X 1) - X diag(1 / q) X'; a sweep where that fails."""
    residual = partial(_surplus, K=K, p=p, q=q)
    ones = torch.ones(phi.shape[1], phi.shape[1], dtype=phi.dtype, device=phi.device) / phi.shape[1]
    for _ in range(NEWTON_STEPS):
        X, surplus = residual(phi)
        error = surplus.abs().sum(1)
        scale = p.exp().mean(1)[:, None, None]
        H = torch.diag_embed(X.sum(2)) - (X / q.exp().unsqueeze(1)) @ X.mT + scale * ones
        factor, info = torch.linalg.cholesky_ex(H)
        step = torch.cholesky_solve(surplus.unsqueeze(2), factor).squeeze(2)
        new = phi + step
        better = (residual(new)[1].abs().sum(1) < 0.5 * error) & (info == 0) & new.isfinite().all(1)
        swept = _rows(_columns(phi, K, q), K, p)
        new = torch.where(better[:, None], new, swept - swept.mean(1, keepdim=True))
        done = error <= 2 * torch.finfo(phi.dtype).eps * p.exp().sum(1)
        phi = torch.where(done[:, None], phi, new)
        if bool(done.all()):
            break
    return phi - phi.mean(1, keepdim=True)


def _surplus(phi: Tensor, K: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    X = _plan(phi, K, p, q)
    return X, p.exp() - X.sum(2)
