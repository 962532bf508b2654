"""The alternating direction method of multipliers, for many programs with the same matrices.

OSQP's splitting: Stellato, Banjac, Goulart, Bemporad and Boyd, "OSQP: an operator splitting solver for quadratic
programs", Mathematical Programming Computation 12 (2020). With C = [A; G] and per-row weights ρ,

    (Q + σI + C'ρC) x = σ x - p + C'(ρ u - y),    u <- project(v + y / ρ),    y <- y + ρ (v - u),

where v = 1.6 Cx - 0.6 u, and the projection is on the right-hand sides of equalities and below those of
inequalities. The matrix is the same for all samples, so one inverse serves the whole batch and a step is a few
products of matrices.

This is not `iterate.iterate`: a point counts as found once its active set solves the program, see `polish`, and
not by the residual of the splitting, which falls slowly.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from implicitly.argmin.polish import Polished, System, polish
from implicitly.argmin.program import Point, QuadraticProgram, dot
from implicitly.argmin.solver import ProgramSolver
from implicitly.iterate import Status, is_running
from implicitly.tree import row_norm

# Steps between two looks at the residuals.
STRIDE = 10
# Residuals at which the active set is tried, and how much smaller they must be before it is tried again.
FIRST_TRY, NEXT_TRY = 1e-3, 1e-2
# Equalities weigh so much more than inequalities.
EQUALITIES = 1e3
# A new weight is worth a factorisation if it differs by that.
NEW_WEIGHT = 5.0


@dataclass(frozen=True, kw_only=True)
class ADMM(ProgramSolver):
    """OSQP's splitting with one factorisation for the whole batch, then the solution on its active set.

    For programs whose Q, G and A the batch shares, such as steps of model-predictive control and safety filters;
    others are refused with ValueError. Raises none of its own for samples without a solution: those are recognised
    by certificates in the differences of the iterates.

    Args:
        rho: weight of the constraints at the start; it adapts.
        sigma: weight of the last iterate.
        relaxation: between 0 and 2.
    """

    max_steps: int = 4000
    rho: float = 0.1
    sigma: float = 1e-6
    relaxation: float = 1.6

    def __post_init__(self):
        super().__post_init__()
        if not (self.rho > 0 and self.sigma > 0 and 0 < self.relaxation < 2):
            raise ValueError(
                "ADMM: rho and sigma must be positive and relaxation between 0 and 2, got "
                f"rho={self.rho}, sigma={self.sigma}, relaxation={self.relaxation}"
            )

    def solve(self, system: System, start: Point | None = None) -> Polished:
        """The solution of every sample."""
        program = system.program
        if program.Q.ndim == 3:
            raise ValueError(
                "ADMM factorises one matrix for all samples, so Q, G and A must be shared by the batch: "
                "pass them without a batch dimension, or use InteriorPoint()"
            )
        tolerance = self.tolerance(program.Q.dtype)
        state = _State.of(program, start)
        result = None if start is None else polish(system, start, tolerance)
        rows = torch.arange(program.batch, device=state.x.device)
        if result is not None:
            rows = (result.status != int(Status.CONVERGED)).nonzero()[:, 0]
            state, system = state.take_rows(rows), system.take_rows(rows)
        whole, k = system, 0
        splitting = _Splitting.of(system.program, self.sigma, self.rho, self.relaxation)
        while len(rows) and k < self.max_steps:
            steps = min(STRIDE, self.max_steps - k)
            k += steps
            state = splitting.advance(state, steps, k)
            running = is_running(state.status)
            ready = (state.error <= state.goal) | ~running
            last = k >= self.max_steps
            if last or 2 * ready.sum() >= len(rows):
                trial = polish(system, splitting.point(state, k), tolerance)
                result = trial if result is None else result.with_rows(rows, trial)
                failed = trial.status >= int(Status.INFEASIBLE)
                left = ((trial.status != int(Status.CONVERGED)) & ~failed).nonzero()[:, 0]
                state = state._replace(goal=torch.where(ready, NEXT_TRY * state.goal, state.goal)).take_rows(left)
                rows, system = rows[left], system.take_rows(left)
            splitting = splitting.adapted(system.program, state)
        if result is None:  # an empty batch
            result = polish(whole, splitting.point(state, k), tolerance)
        return result


class _State(NamedTuple):
    x: Tensor
    u: Tensor  # (B, q + m)
    y: Tensor
    error: Tensor  # `(B,)`, like all below: the larger of the relative residuals
    balance: Tensor  # primal over dual
    goal: Tensor  # the error at which the active set is tried
    status: Tensor
    steps: Tensor

    @classmethod
    def of(cls, program: QuadraticProgram, start: Point | None) -> _State:
        n, q, m = program.sizes
        batch = program.batch
        w = program.Q.new_zeros(batch, n + q + m) if start is None else start.w
        u = torch.cat([program.b, program.h if start is None else program.h - start.slack], 1)
        one = torch.ones_like(w[:, :1].sum(1))
        count = torch.zeros_like(one, dtype=torch.int64)
        far = torch.full_like(one, float("inf"))
        return cls(w[:, :n], u.clamp(max=1e6), w[:, n:], far, one, FIRST_TRY * one, count - 1, count)

    def take_rows(self, rows: Tensor) -> _State:
        return _State(*(t[rows] for t in self))


@dataclass(frozen=True, eq=False)
class _Splitting:
    program: QuadraticProgram
    C: Tensor
    inverse: Tensor  # of Q + σI + C'ρC
    weights: Tensor  # ρ of each row of C
    rho: float
    sigma: float
    relaxation: float

    @classmethod
    def of(cls, program: QuadraticProgram, sigma: float, rho: float, relaxation: float) -> _Splitting:
        _, q, m = program.sizes
        C = torch.cat([program.A, program.G])
        weights = torch.full((q + m,), rho, dtype=C.dtype, device=C.device)
        weights[:q] *= EQUALITIES
        matrix = program.Q + C.mT @ (weights.unsqueeze(1) * C)
        matrix.diagonal().add_(sigma)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(matrix))
        return cls(program, C, inverse, weights, rho, sigma, relaxation)

    def adapted(self, program: QuadraticProgram, state: _State) -> _Splitting:
        """For the samples that are left, with weights that bring primal and dual residuals closer together."""
        if len(state.x) == 0:
            return self
        change = float(state.balance.median().sqrt())
        if 1 / NEW_WEIGHT < change < NEW_WEIGHT:
            return replace(self, program=program)
        rho = min(max(self.rho * change, 1e-6), 1e6)
        return _Splitting.of(program, self.sigma, rho, self.relaxation)

    def advance(self, at: _State, steps: int, k: int) -> _State:
        """So many steps; `k` are made by then. Then how far the iterates are from being a solution, or a proof."""
        program, q = self.program, self.program.sizes[1]
        x, u, y, last_x, last_y = at.x, at.u, at.y, at.x, at.y
        for _ in range(steps):
            last_x, last_y = x, y
            x_next = (self.sigma * x - program.p + (self.weights * u - y) @ self.C) @ self.inverse
            v = self.relaxation * (x_next @ self.C.mT) + (1 - self.relaxation) * u
            x = self.relaxation * x_next + (1 - self.relaxation) * x
            raised = v + y / self.weights
            u = torch.cat([program.b, torch.minimum(raised[:, q:], program.h)], 1)
            y = self.weights * (raised - u)
        Cx, Cy, Qx = x @ self.C.mT, y @ self.C, x @ program.Q
        primal = row_norm(Cx - u) / (1 + torch.maximum(row_norm(Cx), row_norm(u)))
        size = torch.stack([row_norm(t) for t in (Qx, Cy, program.p)]).amax(0)
        dual = row_norm(Qx + program.p + Cy) / (1 + size)
        tiny = torch.finfo(x.dtype).tiny
        moved = at._replace(x=x, u=u, y=y, error=torch.maximum(primal, dual), balance=primal / (dual + tiny))
        status = torch.where(is_running(at.status), self.proofs(x, y, x - last_x, y - last_y), at.status)
        return moved._replace(status=status, steps=torch.full_like(at.steps, k))

    def proofs(self, x: Tensor, y: Tensor, dx: Tensor, dy: Tensor) -> Tensor:
        """The status `(B,)` that the last step alone shows: that there is no solution, or nothing."""
        program, q = self.program, self.program.sizes[1]
        small = torch.finfo(x.dtype).eps ** 0.38
        size_x, size_y = row_norm(dx), row_norm(dy)
        no_point = row_norm(dy @ self.C) + row_norm(dy[:, q:].clamp(max=0)) <= small * size_y
        height = dot(program.b, dy[:, :q]) + dot(program.h, dy[:, q:].clamp(min=0))
        no_point = no_point & (height < -small * size_y) & (size_y > small * (1 + row_norm(y)))
        ray = row_norm(dx @ program.Q) + row_norm(dx @ program.A.mT) + row_norm((dx @ program.G.mT).clamp(min=0))
        no_least = (ray <= small * size_x) & (dot(program.p, dx) < -small * size_x)
        no_least = no_least & (size_x > small * (1 + row_norm(x)))
        status = torch.where(no_least, int(Status.UNBOUNDED), int(Status.RUNNING))
        return torch.where(no_point, int(Status.INFEASIBLE), status)

    def point(self, at: _State, k: int) -> Point:
        """What was found."""
        status = torch.where(is_running(at.status), int(Status.MAX_STEPS), at.status)
        q = self.program.sizes[1]
        slack = self.program.h - at.u[:, q:]
        return Point(torch.cat([at.x, at.y], 1), slack, status, at.steps, torch.ones_like(status.sum()))
