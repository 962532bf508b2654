"""Solvers for nonlinear least squares, which use the residuals whose squares add up to the objective."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from implicitly.checks import POSITIVE, POSITIVE_OR_INFINITE, check_number
from implicitly.condition import Map
from implicitly.descent import Descent, stopped, wolfe
from implicitly.iterate import Proposal, Solver, where_rows
from implicitly.pullback import at_once, pullback
from implicitly.solution import Status
from implicitly.tree import row_norm


def jacobian_of(residuals: Map, z: Tensor) -> tuple[Tensor, Tensor, int]:
    """The residuals `(B, m)` at z `(B, n)`, their Jacobian `(B, m, n)`, and the number of calls for that.

    The Jacobian is computed by rows or by columns, whichever are fewer, all in one batched product.
    """
    value, pull = pullback(residuals, z)
    (batch, m), n = value.shape, z.shape[1]
    if m <= n:
        eye = torch.eye(m, dtype=z.dtype, device=z.device).unsqueeze(1).expand(m, batch, m)
        return value, at_once(lambda u: pull(u)[0], eye).movedim(0, 1), m
    # Jacobian-vector products from two reverse passes: forward mode cannot be nested under dual numbers.
    _, push = pullback(lambda u: pull(u)[0], torch.zeros_like(value))
    eye = torch.eye(n, dtype=z.dtype, device=z.device).unsqueeze(1).expand(n, batch, n)
    return value, at_once(lambda v: push(v)[0], eye).movedim(0, 2), n


def _check_size(solver: Solver, limit_gib: float, z: Tensor, m: int) -> None:
    size_gib = z.numel() * max(m, z.shape[1]) * z.element_size() / 2**30
    if size_gib > limit_gib:
        raise ValueError(
            f"{type(solver).__name__}: dense Jacobians of {len(z)} x {m} x {z.shape[1]} take {size_gib:.1f} GiB "
            f"(limit {limit_gib:g} GiB); use im.LBFGS(), which needs no Jacobian"
        )


@dataclass(frozen=True)
class GaussNewton(Solver):
    """The Gauss-Newton method, which uses J'J in place of the Hessian, with a line search.

    Fast if the residuals are small or nearly linear at the solution and J has full column rank; otherwise see
    `LevenbergMarquardt`. Nocedal and Wright, "Numerical Optimization", section 10.3.

    Args:
        limit_gib: the most memory that the Jacobians may take, in GiB; more raises ValueError.
        rtol, atol, max_steps: as in `implicitly.iterate.Solver`.
    """

    limit_gib: float = 4.0
    max_steps: int = 200

    needs: ClassVar[str | None] = "residuals"

    def __post_init__(self):
        super().__post_init__()
        check_number("GaussNewton", "limit_gib", self.limit_gib, POSITIVE_OR_INFINITE)

    @property
    def nests(self) -> bool:
        """True, for its line search."""
        return True

    def start(self, F: Descent, z: Tensor, r: Tensor) -> tuple[Tensor, ...]:
        """The memory: the objective `(B,)`."""
        value, _ = F.evaluate(z)
        return (value,)

    def propose(self, F: Descent, k: int | Tensor, z: Tensor, r: Tensor, memory: tuple[Tensor, ...]) -> Proposal:
        """The point that the line search finds along the step to the minimum of the linearised residuals."""
        assert F.residuals is not None
        (value,) = memory
        _, J, products = jacobian_of(F.residuals, z)
        _check_size(self, self.limit_gib, z, J.shape[1])
        normal = J.mT @ J
        # A rank-deficient J still gives a step, which cannot be infinitely long.
        floor = torch.finfo(z.dtype).eps * normal.diagonal(dim1=-2, dim2=-1).amax(1)
        d = _solved(normal, floor[:, None], r)
        d = torch.where((torch.linalg.vecdot(d, r) > 0)[:, None], d, r)
        new = wolfe(F, z, value, r, d, torch.ones_like(value, dtype=z.dtype))
        status = stopped(new, new.length[:, 0] == 0, None)  # squares are never below zero
        calls = new.calls + products + (k == 0)
        return Proposal(new.z, (new.value,), new.r, calls, None, status, new.value < value)


@dataclass(frozen=True)
class LevenbergMarquardt(Solver):
    """The Levenberg-Marquardt method: Gauss-Newton steps, damped where the linearised residuals prove wrong.

    The damping mu of (J'J + mu D) d = -J'r, with D the largest diagonal of J'J so far (Moré, "The
    Levenberg-Marquardt algorithm", 1978), follows Nielsen's rule: Madsen, Nielsen and Tingleff, "Methods for
    non-linear least squares problems", 2004, algorithm 3.16. A step that does not decrease the objective is
    rejected, but still counts as a step.

    Args:
        damping: the initial mu, relative to J'J.
        limit_gib: the most memory that the Jacobians may take, in GiB; more raises ValueError.
        rtol, atol, max_steps: as in `implicitly.iterate.Solver`.
    """

    damping: float = 1e-3
    limit_gib: float = 4.0
    max_steps: int = 200

    needs: ClassVar[str | None] = "residuals"

    def __post_init__(self):
        super().__post_init__()
        check_number("LevenbergMarquardt", "damping", self.damping, POSITIVE)
        check_number("LevenbergMarquardt", "limit_gib", self.limit_gib, POSITIVE_OR_INFINITE)

    def start(self, F: Descent, z: Tensor, r: Tensor) -> tuple[Tensor, ...]:
        """The memory: the objective, mu and its growth factor, `(B,)` each, and D `(B, n)`."""
        value, _ = F.evaluate(z)
        one = torch.ones_like(value, dtype=r.dtype)
        return value, self.damping * one, 2 * one, torch.zeros_like(z)

    def propose(self, F: Descent, k: int | Tensor, z: Tensor, r: Tensor, memory: tuple[Tensor, ...]) -> Proposal:
        """The point reached by the damped step; the old point where that leads uphill."""
        assert F.residuals is not None
        value, mu, growth, D = memory
        _, J, products = jacobian_of(F.residuals, z)
        _check_size(self, self.limit_gib, z, J.shape[1])
        normal = J.mT @ J
        D = torch.maximum(D, normal.diagonal(dim1=-2, dim2=-1))
        D = torch.maximum(D, torch.finfo(z.dtype).eps * D.amax(1, keepdim=True))
        d = _solved(normal, mu[:, None] * D, r)
        trial = z + d
        trial_value, trial_r = F.evaluate(trial)
        # The decrease that the linearised residuals promise: half of d'(mu D d - g), with the gradient g = -r.
        promised = torch.linalg.vecdot(d, mu[:, None] * D * d + r) / 2
        gain = (value - trial_value) / torch.where(promised > 0, promised, 1.0)
        # Where rounding errors hide the decrease of the objective, a smaller gradient counts instead.
        flat = (promised <= torch.finfo(value.dtype).eps * 100 * value) & (row_norm(trial_r) < row_norm(r))
        good = ((gain > 1e-4) | flat) & (promised > 0) & trial_value.isfinite() & trial_r.isfinite().all(1)
        gain = torch.where(flat, 1.0, gain)
        shrunk = mu * (1 - (2 * gain - 1) ** 3).clamp(min=1 / 3)
        mu = torch.where(good, shrunk, mu * growth).clamp(torch.finfo(z.dtype).tiny, torch.finfo(z.dtype).max)
        growth = torch.where(good, 2.0, 2 * growth)
        status = torch.full_like(growth, int(Status.RUNNING), dtype=torch.int64)
        # With this much damping, a step is too short to change z.
        stuck = ~good & (row_norm(d) <= torch.finfo(z.dtype).eps * row_norm(z)) | ~value.isfinite()
        ending = torch.where(
            trial_value.isfinite() & value.isfinite(), int(Status.STAGNATED), int(Status.NON_FINITE)
        )
        status = torch.where(stuck, ending, status)
        new, new_r = where_rows(good, trial, z), where_rows(good, trial_r, r)
        memory = (torch.where(good, trial_value, value), mu, growth, D)
        # A step that is rejected makes progress too: it raises the damping.
        return Proposal(new, memory, new_r, products + 1 + (k == 0), None, status, torch.ones_like(good))


def _solved(normal: Tensor, ridge: Tensor, r: Tensor) -> Tensor:
    """(N + diag(ridge))^-1 r for N `(B, n, n)`; zero where that is not positive definite."""
    factor, info = torch.linalg.cholesky_ex(normal + torch.diag_embed(ridge.expand_as(r)))
    d = torch.cholesky_solve(r.unsqueeze(2), factor)[:, :, 0]
    return torch.where(((info == 0) & d.isfinite().all(1))[:, None], d, 0.0)
