"""Entropic optimal transport: Sinkhorn's fixed point in the log domain."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from implicitly.argmin.sets.rows import (
    POSITIVE,
    as_parameter,
    check_broadcast,
    check_state,
    check_values,
    in_full_precision,
    outside,
    per_row,
)
from implicitly.checks import POSITIVE_OR_INFINITE, check_number
from implicitly.condition import REMEDY, Condition, Map, Report, explain, is_usable
from implicitly.host import maybe_any
from implicitly.implicit import Backward, attach, find
from implicitly.iterate import Found, Proposal, Solver, coded
from implicitly.linear import Affine, LinearSolver, dense
from implicitly.solution import Status
from implicitly.tree import row_norm

# The temperature starts at the size of the costs and is halved, at most this often, down to the one asked for.
HALVINGS = 60
# The most Newton steps at each temperature; they start from the solution at twice that temperature.
NEWTON_STEPS = 50
TOO_COLD = (
    "raise epsilon, or use a wider dtype: epsilon is so small compared with the costs that rounding errors of the "
    "dual potentials are visible in the plan"
)
FORBIDDEN = (
    "more finite costs, or other marginals: for {} of them every plan has infinite cost, as some rows have more "
    "mass than all columns that they may be sent to"
)
# Bounds on the change along an eigenvector of the Hessian that are tried, in units of the temperature: where parts
# of the plan hardly touch, Newton's step is far too long, and the right one is of the size of the costs.
STEP_LENGTHS = (0.5, 2.0, 8.0, 32.0, 128.0)


@dataclass(frozen=True, kw_only=True)
class Sinkhorn(Solver):
    """Sinkhorn's sweeps: update the potential of the columns, then that of the rows, to fit their sums.

    `max_steps` counts the sweeps after the start, which uses decreasing temperatures and Newton's method.
    """

    max_steps: int = 1000

    def start(self, F: Any, z: Tensor, r: Tensor) -> tuple[Tensor, ...]:
        """No memory is needed."""
        return ()

    def propose(self, F: Any, k: int | Tensor, z: Tensor, r: Tensor, memory: Any) -> Proposal:
        """One sweep."""
        return Proposal(z + r)


@dataclass(frozen=True, kw_only=True)
class MinimumNorm(LinearSolver):
    """The minimum-norm least-squares solution, by a singular value decomposition of the dense matrix.

    Where a plan at a low temperature falls into parts that hardly touch, moving mass between them would take
    potentials too large to represent, and would change nothing. So directions that the matrix maps to 0, up to
    rounding, are left out of the solution and of the residual. The residual is a backward error, |b - M u|
    relative to |b| + |u| (Rigal and Gaches, J. ACM 14, 1967).
    """

    recurrent: ClassVar[bool] = False
    label: ClassVar[str | None] = "the dense least-squares solver"
    limit_gib: float = 4.0
    max_steps: int = 5

    def __post_init__(self):
        super().__post_init__()
        check_number("MinimumNorm", "limit_gib", self.limit_gib, POSITIVE_OR_INFINITE)

    def start(self, F: Affine, z: Tensor, r: Tensor) -> tuple[Tensor, ...]:
        """The decomposition, without small singular values, and the matrix."""
        M = dense(F.operator, z, self.limit_gib)
        U, S, V = torch.linalg.svd(M)
        keep = S.shape[1] * torch.finfo(S.dtype).eps * S[:, :1] < S
        return U * keep.unsqueeze(1), torch.where(keep, 1 / S, 0.0).unsqueeze(2) * V, M

    def propose(self, F: Affine, k: int | Tensor, z: Tensor, r: Tensor, memory: Any) -> Proposal:
        """The solution; a further step removes the residual that rounding left."""
        U, scaled, M = memory
        z = z + (scaled.mT @ (U.mT @ r.unsqueeze(2))).squeeze(2)
        left = F.b.unsqueeze(2) - M @ z.unsqueeze(2)
        left = (U @ (U.mT @ left)).squeeze(2)
        # The largest singular value is about 1, so rounding errors are relative to |z|.
        b_norm = row_norm(F.b).unsqueeze(1)
        size = b_norm + row_norm(z).unsqueeze(1)
        return Proposal(z, memory, left * (b_norm / torch.where(size > 0, size, 1.0)), 1)


@in_full_precision
def sinkhorn(
    cost: Tensor,
    row: Tensor,
    column: Tensor,
    epsilon: float | Tensor = 0.1,
    solver: Solver = Sinkhorn(),
    linear_solver: Solver = MinimumNorm(),
    on_failure: str = "raise",
) -> Tensor:
    """The entropy-regularised optimal transport plan with the row sums `row` and column sums `column`.

    X >= 0 minimises <cost, X> + epsilon * sum X (log X - 1). It is the projection, in the Kullback-Leibler
    divergence, of exp(-cost / epsilon) onto the transport polytope: X_ij = exp((f_i + g_j - cost_ij) / epsilon).
    Cuturi, "Sinkhorn Distances", NeurIPS 2013. Potentials are found in the log domain. The derivative follows from
    the condition that they are a fixed point of the sweep, which holds however they were found: any order, both
    modes, in the memory of one sweep.

    Args:
        cost: `(..., n, m)`.
        row: `(..., n)`, positive. Leading dimensions of the three broadcast.
        column: `(..., m)`, positive, with the same sum as `row` up to the rounding of their dtypes; `row` is
            rescaled to remove the difference, and only its proportions have a derivative.
        epsilon: > 0, in the unit of the cost; a number or a tensor that broadcasts with `(...)`.
        solver: its tolerances are relative to the potentials (in units of epsilon).
        linear_solver: for the linear systems of the derivative, (n, n) per plan: `MinimumNorm`, O(n^3), or a
            matrix-free one such as `im.GMRES()` for large plans, if epsilon is not too small. Fewer rows than
            columns is cheaper.
        on_failure: "raise", "warn" or "ignore" plans that do not converge; ignored ones have zero gradient.

    Raises:
        TypeError: `cost` is not of a floating dtype.
        ValueError: marginals that are not positive, or whose sums differ; epsilon <= 0; shapes that do not fit.
        SolverError: a plan did not converge, or misses its marginals by more than eps^0.4, relative to them, and
            `on_failure="raise"`.
    """
    check_state("sinkhorn", cost, dims=2)
    row, column = _marginals(cost, row, column)
    epsilon = per_row("sinkhorn", "epsilon", epsilon, cost, dims=2, must=POSITIVE)
    n, m = cost.shape[-2:]
    batch = torch.broadcast_shapes(cost.shape[:-2], row.shape[:-1], column.shape[:-1], epsilon.shape[:-2])
    K = _in_units_of(epsilon, cost).expand(*batch, n, m).reshape(-1, n, m)
    q = column.log()
    p = row.log() + (q.logsumexp(-1, keepdim=True) - row.log().logsumexp(-1, keepdim=True))
    p, q = p.expand(*batch, n).reshape(-1, n), q.expand(*batch, m).reshape(-1, m)
    theta = (K, p, q)
    condition = _condition(cost.dtype, on_failure)
    # This message is about plans only: the systems solved for their derivatives are linear.
    said = replace(condition.report, message=partial(_explained, *(t.detach() for t in theta)))
    found = find(solver, replace(condition, report=said), outside(_potentials, *theta), theta)
    usable = is_usable(found.status)
    if not maybe_any(~usable):
        return _plan(attach(condition, found.z, theta, Backward(linear_solver)), *theta).reshape(*batch, n, m)
    # A failed plan has no derivative; a problem whose answer is 0 stands in for it.
    failed = _plan(found.z, *(t.detach() for t in theta))
    usable = usable[:, None]
    theta = (torch.where(usable[:, None], K, 0.0), torch.where(usable, p, 0.0), torch.where(usable, q, 0.0))
    phi = attach(condition, torch.where(usable, found.z, 0.0), theta, Backward(linear_solver))
    return torch.where(usable[:, None], _plan(phi, *theta), failed).reshape(*batch, n, m)


def _in_units_of(epsilon: Tensor, cost: Tensor) -> Tensor:
    """cost / epsilon; where the cost is infinite it does not depend on epsilon, and its derivative is 0."""
    finite = cost.detach().isfinite()
    return torch.where(finite, torch.where(finite, cost, 0.0) / epsilon, cost)


def _condition(dtype: torch.dtype, on_failure: str) -> Condition:
    """The condition on the potentials of the rows."""
    how = {"relative_to_iterate": True, "sample_dims": (0, 0, 0), "examine": _examined}
    return Condition(_sweep, "sinkhorn", dtype, Report(on_failure), **how)


def _marginals(cost: Tensor, row: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
    """Both marginals in the dtype of `cost`; raises TypeError / ValueError unless some plan has them."""
    marginals = []
    precision = max(torch.finfo(t.dtype).eps for t in (cost, row, column) if t.is_floating_point())
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
    limit = precision**0.75 * (first + second)  # sums that the user rounded may differ by more than eps
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
    """The residual of the sweep; as a constant may move between the potentials, the mean of phi is fixed at 0."""

    def residual(phi: Tensor) -> Tensor:
        moved = _rows(_columns(phi, K, q), K, p) - phi
        # Without the means the Jacobian would be singular; with -mean(phi) it is regular, and the mean stays at 0.
        return moved - moved.mean(1, keepdim=True) - phi.mean(1, keepdim=True)

    return residual


def _examined(F: Map, found: Found) -> Found:
    """Mark plans whose residual passed the test but is too large for the plan to be right.

    The residual is the error in the logarithms of the row sums. It may be a mere rounding error of large
    potentials, and still show in the plan.
    """
    # 5e-7 in float64, 2e-3 in float32, for each row.
    limit = torch.finfo(found.z.dtype).eps ** 0.4 * found.z.shape[1] ** 0.5
    off = found.residual > limit
    return found._replace(
        status=coded(off & (found.status == int(Status.CONVERGED)), Status.STAGNATED, found.status)
    )


def _explained(K: Tensor, p: Tensor, q: Tensor, name: str, solver: Solver, found: Found, failed: Tensor) -> str:
    """The message about plans that `failed`."""
    remedy = REMEDY | {Status.STAGNATED: TOO_COLD}
    if len(K) == len(found.z):  # not so under `vmap`
        count = int(_is_impossible(found.z[failed], *(t[failed] for t in (K, p, q))).sum())
        if count:
            remedy |= {status: FORBIDDEN.format(count) for status in (Status.STAGNATED, Status.NON_FINITE)}
    return explain(name, solver, found, failed, remedy)


def _is_impossible(phi: Tensor, K: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """Which plans `(B,)` provably do not exist, as some rows hold more mass than the columns they may go to.

    (Hall's condition.) Candidates are the rows whose potentials have grown beyond all others.
    """
    allowed = ~K.isposinf()
    order = phi.masked_fill(~allowed.any(2), torch.inf).argsort(1, descending=True)
    reached = allowed.gather(1, order.unsqueeze(2).expand_as(K)).cumsum(1) > 0
    mass = p.exp().gather(1, order).cumsum(1)
    room = (reached.to(q.dtype) @ q.exp().unsqueeze(2))[:, :, 0]
    return (mass > room * (1 + torch.finfo(q.dtype).eps ** 0.5)).any(1)


def _plan(phi: Tensor, K: Tensor, p: Tensor, q: Tensor) -> Tensor:
    psi = _columns(phi, K, q)
    return (phi.unsqueeze(2) + psi.unsqueeze(1) - K).exp()


def _potentials(K: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """Potentials of the rows, by Newton's method on the dual at temperatures decreasing to the one asked for."""
    lead, (n, m) = K.shape[:-2], K.shape[-2:]
    K, p, q = K.reshape(-1, n, m), p.reshape(-1, n), q.reshape(-1, m)
    phi = torch.zeros_like(p)
    if phi.numel() == 0:
        return phi.reshape(*lead, n)
    finite = torch.where(K.isfinite(), K, 0.0)
    spread = (finite.amax((1, 2)) - finite.amin((1, 2))).clamp(min=1)[:, None]
    for halving in range(HALVINGS):
        heat = (spread * 0.5**halving).clamp(min=1)  # the temperature in units of epsilon
        last = bool((heat <= 1).all())
        accuracy = (n + m) * torch.finfo(phi.dtype).eps if last else 0.1
        phi = heat * _newton(phi / heat, K / heat.unsqueeze(2), p, q, accuracy)
        if last:
            break
    return phi.reshape(*lead, n)


def _newton(phi: Tensor, K: Tensor, p: Tensor, q: Tensor, accuracy: float) -> Tensor:
    """Newton's method on the dual, until the error of the row sums, relative to all mass, is below `accuracy`.

    The Hessian is diag(X 1) - X diag(1 / q) X'. A step that does not halve the error is replaced by the best of a
    sweep and of shortened steps.
    """
    row, n = p.exp(), phi.shape[1]
    ones = torch.full((n, n), 1 / n, dtype=phi.dtype, device=phi.device)  # a constant in phi changes nothing
    for _ in range(NEWTON_STEPS):
        X = _plan(phi, K, p, q)
        surplus = row - X.sum(2)
        error = surplus.abs().sum(1)
        done = error <= accuracy * row.sum(1)
        if bool((done | ~error.isfinite()).all()):
            break
        H = torch.diag_embed(X.sum(2)) - (X / q.exp().unsqueeze(1)) @ X.mT + row.mean(1)[:, None, None] * ones
        values, vectors = torch.linalg.eigh(torch.where(error.isfinite()[:, None, None], H, ones))
        tiny = torch.finfo(phi.dtype).eps ** 2
        along = (vectors.mT @ surplus.unsqueeze(2)).squeeze(2) / values.clamp(min=tiny)
        step = (vectors @ along.unsqueeze(2)).squeeze(2)
        swept = _rows(_columns(phi, K, q), K, p)
        cut = ((vectors @ along.clamp(-most, most).unsqueeze(2)).squeeze(2) for most in STEP_LENGTHS)
        tries = [swept, *(phi + shorter for shorter in cut)]
        gains = torch.stack([_dual(new, K, row, q) for new in tries]).nan_to_num(-float("inf"))
        gains[0] += 16 * torch.finfo(phi.dtype).eps * (row * phi.abs()).sum(1)  # no long step for mere rounding
        best = torch.stack(tries)[gains.argmax(0), torch.arange(len(phi), device=phi.device)]
        left = (row - _plan(phi + step, K, p, q).sum(2)).abs().sum(1)
        new = torch.where((left < 0.5 * error)[:, None], phi + step, best)
        phi = torch.where(done[:, None], phi, new - new.mean(1, keepdim=True))
    return phi - phi.mean(1, keepdim=True)


def _dual(phi: Tensor, K: Tensor, row: Tensor, q: Tensor) -> Tensor:
    """The dual objective `(B,)`, which the potentials maximise."""
    return (row * phi).sum(1) + (q.exp() * _columns(phi, K, q)).sum(1)
