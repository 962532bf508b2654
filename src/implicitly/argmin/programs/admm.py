"""The alternating direction method of multipliers (ADMM), for many programs with the same matrices.

OSQP's splitting: Stellato, Banjac, Goulart, Bemporad and Boyd, "OSQP: an operator splitting solver for quadratic
programs", Mathematical Programming Computation 12 (2020). With C = [A; G] and per-row weights ρ,

    (Q + σI + C'ρC) x = σ x - p + C'ρ (u - y),    u <- project(v + y),    y <- y + v - u,

where v = 1.6 Cx - 0.6 u (over-relaxation), the projection sets equalities to their right-hand sides and clips
inequalities at theirs, and ρy are the multipliers. The matrix is the same for all samples, so one inverse serves
the whole batch and a step is three matrix products.

This does not use the loop of `iterate.iterate`: a point counts as found once its active set solves the program,
see `polish`, rather than when the residual of the splitting is small, since that falls slowly.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from implicitly.argmin.programs.interior_point import InteriorPoint
from implicitly.argmin.programs.kkt import proximal
from implicitly.argmin.programs.polish import Polished, System, polish
from implicitly.argmin.programs.program import Point, QuadraticProgram, dot
from implicitly.argmin.programs.solver import ProgramSolver
from implicitly.checks import NUMBERS, check_kind
from implicitly.compiled import run_as_graph
from implicitly.solution import Status, is_running
from implicitly.tree import row_norm

# Steps between two checks of the residuals.
STRIDE = 10
# Residuals at which the active set is tried, and how much smaller they must be before it is tried again.
FIRST_TRY, NEXT_TRY = 1e-3, 1e-2
# How much larger the weights of equalities are than those of inequalities.
EQUALITIES = 1e3
# A new weight is worth a factorisation if it differs by more than this factor.
NEW_WEIGHT = 5.0
# The least number of steps between two changes of the weights.
PAUSE = 20
# The share of samples that is left to another solver.
REST = 1 / 4
# Without equalities, whose weight would amplify rounding errors, this many first steps run in float32, whatever
# the dtype: in half the time they lead most samples to their active set, on which `polish` then solves exactly.
EARLY = 100


@dataclass(frozen=True, kw_only=True)
class ADMM(ProgramSolver):
    """ADMM as in OSQP, with one factorisation for the whole batch, then an exact solve on the active set.

    For programs whose Q, G and A are shared by the batch, as in model-predictive control and safety filters; other
    programs raise a ValueError. Most samples finish soon; the last ones can take thousands of steps.

    Args:
        rho: the initial weight of the constraints; it adapts.
        sigma: weight of the proximal term; raised where rounding would lose it beside the matrix.
        relaxation: the over-relaxation factor, between 0 and 2.
        finish: the solver for the samples that remain when most are done, or at `max_steps`. None: they go on with
            ADMM, and are recognised as infeasible or unbounded by certificates in the differences of iterates.
        rtol, max_steps: as in `implicitly.argmin.programs.solver.ProgramSolver`.

    Raises:
        TypeError, ValueError: for invalid options.

    Source: Stellato, Banjac, Goulart, Bemporad and Boyd, "OSQP: an operator splitting solver for quadratic
    programs", Math. Programming Computation 12 (2020).
    """

    max_steps: int = 4000
    rho: float = 1.0
    sigma: float = 1e-6
    relaxation: float = 1.6
    finish: ProgramSolver | None = InteriorPoint()

    def __post_init__(self):
        super().__post_init__()
        if not (self.finish is None or isinstance(self.finish, ProgramSolver)):
            raise TypeError(
                f"ADMM: finish must be a solver of programs such as InteriorPoint(), got {self.finish!r}"
            )
        for name in ("rho", "sigma", "relaxation"):
            value = getattr(self, name)
            check_kind("ADMM", name, value, NUMBERS, "a number, got a {type}")
        if not (self.rho > 0 and self.sigma > 0 and 0 < self.relaxation < 2):
            raise ValueError(
                "ADMM: rho and sigma must be positive and relaxation between 0 and 2, got "
                f"rho={self.rho}, sigma={self.sigma}, relaxation={self.relaxation}"
            )

    def solve(self, system: System, start: Point | None = None, compile: bool = False) -> Polished:
        """The solution of every sample."""
        program = system.program
        if program.Q.ndim == 3:
            raise ValueError(
                "ADMM factorises one matrix for all samples, so Q, G and A must be shared by the batch: "
                "pass them (of a ConvexLayer the parameters in them) without a batch dimension, or use "
                "InteriorPoint()"
            )
        tolerance = self.tolerance(program.Q.dtype)
        result, k = None, 0
        rows = torch.arange(program.batch, device=program.Q.device)
        early = program.Q.dtype if program.sizes[1] else torch.float32
        splitting = _Splitting.of(program, early, self.sigma, self.rho, self.relaxation)
        state = _State.of(program, start, self.rho).to(early)
        if start is not None:
            result = polish(system, start, tolerance)
            rows = (result.status != int(Status.CONVERGED)).nonzero()[:, 0]
            state, splitting = state.take_rows(rows), splitting.take_rows(rows)
        rest = 0 if self.finish is None else int(REST * program.batch)
        while len(rows) > rest and k < self.max_steps:
            if k >= EARLY and splitting.early:
                state, splitting = state.to(program.Q.dtype), splitting.exact()
            steps = min(STRIDE, self.max_steps - k)
            k += steps
            state = splitting.advanced(state, steps, compile)._replace(steps=torch.full_like(state.steps, k))
            ready = (state.error <= state.goal) | ~is_running(state.status)
            if k < self.max_steps and 2 * ready.sum() < len(rows):
                state, splitting = splitting.adapted(state, k)
                continue
            part = polish(system.take_rows(rows), splitting.point(state), tolerance)
            result = part if result is None else result.with_rows(rows, part, system)
            left = ((part.status != int(Status.CONVERGED)) & (part.status < int(Status.INFEASIBLE))).nonzero()[
                :, 0
            ]
            state = state._replace(goal=torch.where(ready, NEXT_TRY * state.goal, state.goal)).take_rows(left)
            rows, splitting = rows[left], splitting.take_rows(left)
        if self.finish is not None and (result is None or len(rows)):
            part = self.finish.solve_from(system.take_rows(rows), splitting.point(state))
            result = part if result is None else result.with_rows(rows, part, system)
        return polish(system, splitting.point(state), tolerance) if result is None else result


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
    def of(cls, program: QuadraticProgram, start: Point | None, rho: float) -> _State:
        n, q, m = program.sizes
        w = program.Q.new_zeros(program.batch, n + q + m) if start is None else start.w
        y = torch.cat([w[:, n : n + q] / EQUALITIES, w[:, n + q :]], 1) / rho
        right = torch.zeros_like(program.h) if start is None else program.h - start.slack
        one = torch.ones_like(w[:, :1].sum(1))
        count = torch.zeros_like(one, dtype=torch.int64)
        far = torch.full_like(one, float("inf"))
        u = torch.cat([program.b, torch.minimum(right, program.h)], 1)
        return cls(w[:, :n], u, y, far, one, FIRST_TRY * one, count - 1, count)

    def to(self, dtype: torch.dtype) -> _State:
        """The same in `dtype`; samples that overflowed start again from the origin."""
        if dtype == self.x.dtype:
            return self
        lost = ~(self.x.isfinite().all(1) & self.u.isfinite().all(1) & self.y.isfinite().all(1)).unsqueeze(1)
        x, u, y = (torch.where(lost, 0.0, t) for t in (self.x, self.u, self.y))
        return _State(*(t.to(dtype) if t.is_floating_point() else t for t in self._replace(x=x, u=u, y=y)))

    def take_rows(self, rows: Tensor) -> _State:
        return _State(*(t[rows] for t in self))


@dataclass(frozen=True, eq=False)
class _Splitting:
    given: QuadraticProgram
    program: QuadraticProgram  # in the dtype of the steps, as all below
    C: Tensor
    weights: Tensor  # ρ of each row of C
    of_x: Tensor  # σ times the inverse of Q + σI + C'ρC
    of_u: Tensor  # ρC times that inverse
    shift: Tensor  # -p times that inverse
    rho: float
    sigma: float
    relaxation: float

    @classmethod
    def of(
        cls, program: QuadraticProgram, dtype: torch.dtype, sigma: float, rho: float, relaxation: float
    ) -> _Splitting:
        """The splitting for steps in `dtype`; its matrices are computed in the dtype of the program."""
        _, q, m = program.sizes
        C = torch.cat([program.A, program.G])
        weights = torch.full((q + m,), rho, dtype=C.dtype, device=C.device)
        weights[:q] *= EQUALITIES
        weighted = weights.unsqueeze(1) * C
        matrix = program.Q + C.mT @ weighted
        resolved = proximal(C.dtype) * float(matrix.diagonal().amax()) if len(matrix) else 0.0
        own = max(sigma, resolved)
        matrix.diagonal().add_(own)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(matrix))
        same = QuadraticProgram(*(t.to(dtype) for t in program.tensors))
        parts = (C, weights, own * inverse, weighted @ inverse, -program.p @ inverse)
        C, weights, of_x, of_u, shift = (t.to(dtype) for t in parts)
        return cls(program, same, C, weights, of_x, of_u, shift, rho, sigma, relaxation)

    @property
    def early(self) -> bool:
        """Whether its steps run in a narrower dtype than the program's."""
        return self.C.dtype != self.given.Q.dtype

    def exact(self) -> _Splitting:
        """The splitting with steps in the dtype of the program."""
        return _Splitting.of(self.given, self.given.Q.dtype, self.sigma, self.rho, self.relaxation)

    def take_rows(self, rows: Tensor) -> _Splitting:
        given, program = self.given.take_rows(rows), self.program.take_rows(rows)
        return replace(self, given=given, program=program, shift=self.shift[rows])

    def adapted(self, at: _State, k: int) -> tuple[_State, _Splitting]:
        """State and splitting with weights that balance primal and dual residuals better, if it is time."""
        change = float(at.balance.median().sqrt())
        if k % PAUSE or 1 / NEW_WEIGHT < change < NEW_WEIGHT or not 1e-6 < self.rho * change < 1e6:
            return at, self
        again = _Splitting.of(self.given, self.C.dtype, self.sigma, self.rho * change, self.relaxation)
        return at._replace(y=at.y / change), again

    def advanced(self, at: _State, steps: int, compile: bool) -> _State:
        """The state after so many `steps`; with `compile` as one graph, where possible."""
        proves = not self.early  # rounding errors of float32 would look like proofs
        if not compile:
            return self.advance(at, steps, proves)
        # The graph outlives this solve, so it must not keep any of its tensors, only numbers.
        numbers, count, known = (self.rho, self.sigma, self.relaxation), len(at), len(self.program.tensors)

        def advance(*tensors: Tensor) -> _State:
            same = QuadraticProgram(*tensors[count : count + known])
            C, weights, of_x, of_u, shift = tensors[count + known :]
            again = _Splitting(same, same, C, weights, of_x, of_u, shift, *numbers)
            return again.advance(_State(*tensors[:count]), steps, proves)

        key = ("qp with ADMM", self.program.sizes, steps, proves, self.relaxation)
        parts = (*self.program.tensors, self.C, self.weights, self.of_x, self.of_u, self.shift)
        found = run_as_graph("qp with ADMM", key, advance, *at, *parts, varies=True)
        return self.advance(at, steps, proves) if found is None else found

    def advance(self, at: _State, steps: int, proves: bool) -> _State:
        """The state after so many `steps`, with its residuals.

        With `proves` the last step is also checked for a proof that there is no solution.
        """
        program, q, relax = self.program, self.program.sizes[1], self.relaxation
        x, u, y, last_x, last_y = at.x, at.u, at.y, at.x, at.y
        for _ in range(steps):
            last_x, last_y = x, y
            x_next = torch.addmm(torch.addmm(self.shift, x, self.of_x), u - y, self.of_u)
            raised = torch.addmm(y.add(u, alpha=1 - relax), x_next, self.C.mT, alpha=relax)
            x = torch.lerp(x, x_next, relax)
            u = torch.minimum(raised[:, q:], program.h)
            u = torch.cat([program.b, u], 1) if q else u
            y = raised - u
        duals = self.weights * y
        Cx, Cy, Qx = x @ self.C.mT, duals @ self.C, x @ program.Q
        primal = row_norm(Cx - u) / (1 + torch.maximum(row_norm(Cx), row_norm(u)))
        size = torch.stack([row_norm(t) for t in (Qx, Cy, program.p)]).amax(0)
        dual = row_norm(Qx + program.p + Cy) / (1 + size)
        tiny = torch.finfo(x.dtype).tiny
        moved = at._replace(x=x, u=u, y=y, error=torch.maximum(primal, dual), balance=primal / (dual + tiny))
        if not proves:
            return moved
        return moved._replace(status=self.proofs(x, duals, x - last_x, self.weights * (y - last_y)))

    def proofs(self, x: Tensor, y: Tensor, dx: Tensor, dy: Tensor) -> Tensor:
        """The status `(B,)` by the last step alone: INFEASIBLE or UNBOUNDED where it is a certificate."""
        program, q = self.program, self.program.sizes[1]
        # 1e-6 in float64, 2e-3 in float32: looser, and a feasible program may be called infeasible; tighter, and
        # ADMM needs many more steps to prove it.
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

    def point(self, at: _State) -> Point:
        """The current iterate as a `Point`."""
        status = torch.where(is_running(at.status), int(Status.MAX_STEPS), at.status)
        q, dtype = self.given.sizes[1], self.given.Q.dtype
        slack = self.given.h - at.u[:, q:].to(dtype)
        duals = (self.weights * at.y).to(dtype)
        w = torch.cat([at.x.to(dtype), duals], 1)
        return Point(w, slack, duals[:, q:] > slack, status, at.steps, torch.ones_like(status.sum()))
