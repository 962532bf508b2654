"""A primal-dual interior-point method for quadratic programs, batched.

The homogeneous embedding combines the program and its dual into one problem that always has a solution, and that
shows whether either of the two has none: Goulart and Chen, "Clarabel: An interior-point solver for conic programs
with quadratic objectives", 2024; Andersen, Dahl and Vandenberghe, "Interior-point methods for large-scale cone
programming", 2011. In x, y, λ, s, τ and κ, with λ, s, τ, κ >= 0,

    Qx + A'y + G'λ + pτ = 0,   Ax = bτ,   Gx + s = hτ,   κ + x'Qx/τ + p'x + b'y + h'λ = 0,   λs = 0,   τκ = 0.

If τ > 0, x/τ solves the program; if κ > 0, (λ, y) or x certifies that it has no solution. The steps are those of
Mehrotra: a predictor determines how much to centre and the second-order term of the corrector, with one
factorisation for both. Programs that have a solution need fewer and cheaper steps with τ = 1 and without κ, so
these are tried first.

This does not use the loop of `iterate.iterate`: the stopping test is not one residual norm but three, or a
certificate, and the iterates are homogeneous. It does share how a loop runs, freezes samples and drops them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from implicitly.argmin.programs.condensed import (
    FAR,
    CondensedFactors,
    CondensedLoop,
    State,
    inside,
    seem_binding,
    step_length,
)
from implicitly.argmin.programs.kkt import Factors, jacobian_product
from implicitly.argmin.programs.polish import Polished, System, polish
from implicitly.argmin.programs.program import (
    Point,
    QuadraticProgram,
    dot,
    times,
    times_transposed,
)
from implicitly.argmin.programs.solver import ProgramSolver
from implicitly.compiled import run_as_graph
from implicitly.host import maybe_any, views
from implicitly.iterate import DROP_BELOW, repeat, where_rows
from implicitly.solution import Status, is_running
from implicitly.transforms import is_cpu
from implicitly.tree import row_norm

# How far a step goes, as a share of the way to the boundary.
TO_BOUNDARY = 0.995
# The tolerance at which the active set takes over, over the square root of the tolerance asked for.
LOOSE = 10.0
# Steps without a new best point after which rounding errors dominate; on the embedding τ may have to grow first.
PATIENCE, PATIENCE_EMBEDDED = 5, 15
# The least multiplier and slack of a warm start, relative to the largest of them: a solver that starts on the
# boundary does not get away from it (Yildirim and Wright, "Warm-start strategies in interior-point methods for
# linear programming", SIAM J. Optim. 12, 2002). A tenth took the fewest steps on five kinds of programs.
AWAY = 0.1
# Bounds further away than this, relative to the closest bounds, mean "no bound".
ENDLESS = 1e20


class _State(NamedTuple):
    w: Tensor  # (x, y, λ) `(B, N)`
    s: Tensor
    tau: Tensor  # `(B,)`, like all below
    kappa: Tensor
    residual: Tensor  # (ρx, ρy, ρλ) `(B, N)`
    gap: Tensor  # ρτ
    Qx: Tensor
    best: Tensor  # the best w / τ and s / τ
    best_slack: Tensor
    binding: Tensor  # bool: which inequalities seem to bind, by the last step, and by the step to the best point
    best_binding: Tensor
    merit: Tensor  # of the best
    proof: Tensor  # how far the best candidate is from being a certificate
    stale: Tensor
    status: Tensor
    steps: Tensor


@dataclass(frozen=True, kw_only=True)
class InteriorPoint(ProgramSolver):
    """Mehrotra's predictor-corrector method on the homogeneous embedding, one Cholesky factorisation per step.

    For dense programs with up to a few hundred unknowns. It takes about ten steps whatever the data, recognises
    infeasible and unbounded samples by certificates, and needs no starting point. `rtol` and `max_steps` are
    described in `implicitly.argmin.programs.solver.ProgramSolver`.

    Source: Mehrotra, "On the implementation of a primal-dual interior point method", SIAM J. Optim. 2 (1992).
    """

    max_steps: int = 50

    def solve(self, system: System, start: Point | None = None, compile: bool = False) -> Polished:
        """The solution of every sample: plain steps lead near it, its active set then gives it exactly.

        Bounds far beyond the solution would distort the length of the steps, so they are left out at first; for
        samples that this does not solve, fewer of them. Samples that still fail take steps on the embedding, which
        also tell if there is no solution. A `start` helps if its active set is that of the solution, so that is
        tried first.
        """
        tolerance = self.tolerance(system.program.Q.dtype)
        found = polish(system, start, tolerance) if start is not None else None
        return self._solved(system, found, None, compile)

    def solve_from(self, system: System, near: Point) -> Polished:
        """As `solve`, but the first steps start at a point near the solution, moved into the interior."""
        return self._solved(system, None, near, False)

    def _solved(self, system: System, found: Polished | None, near: Point | None, compile: bool) -> Polished:
        """The solution of all samples that are not yet among those `found`; the first steps start at `near`."""
        close, far = system.reach()
        for embedded, most in ((False, close), (False, far), (True, torch.full_like(far, ENDLESS))):
            rows = None
            if found is not None:
                left = found.status != int(Status.CONVERGED)
                left = left & system.is_between(close, far) if most is far else left
                rows = left.nonzero()[:, 0]
                if not len(rows):
                    continue
            whole = system.plain() if embedded else system
            part = self._attempt(whole, whole.up_to(most), rows, embedded, compile, near)
            found, near = part if found is None or rows is None else found.with_rows(rows, part, system), None
        assert found is not None
        return found

    def _attempt(
        self,
        system: System,
        seen: System,
        rows: Tensor | None,
        embedded: bool,
        compile: bool,
        begin: Point | None = None,
    ) -> Polished:
        """The solution of the samples `rows` (None: all), by steps in which the inequalities of `seen` count.

        The steps are those on the embedding if `embedded`; else plain ones, which may start at `begin`.
        """
        near, part, ahead = None, system, seen
        if rows is not None:
            part, ahead = system.take_rows(rows), seen.take_rows(rows)
        if compile and (embedded or system.program.sizes[2]):  # otherwise there is no loop to compile
            near = self._near_as_graph(seen, rows, embedded)
        near = self._near(ahead, embedded, begin=begin) if near is None else near
        tolerance = self.tolerance(system.program.Q.dtype)
        found = polish(part, near, tolerance, trusted=embedded)
        if embedded or not system.program.sizes[2]:
            return found
        untold = (found.status != int(Status.CONVERGED)) & (near.status == int(Status.CONVERGED))
        if maybe_any(untold):  # only nearer to the solution does it show which inequalities bind
            rows = untold.nonzero()[:, 0]
            left = part.take_rows(rows)
            start = near.take_rows(rows)
            near = self._near(ahead.take_rows(rows), False, start)
            near = near._replace(steps=start.steps + near.steps)
            found = found.with_rows(rows, polish(left, near, tolerance), part)
        return found

    def _near(
        self, system: System, embedded: bool, start: Point | None = None, begin: Point | None = None
    ) -> Point:
        """A point near the solution of every sample, by the steps that suit the system.

        They go on from `start`, to which earlier steps of this kind led, or start at `begin`, a point that another
        solver found.
        """
        if not embedded and not system.program.sizes[2]:
            return system.origin()
        loop = self._loop(system, embedded, start is None)
        start = start if begin is None else _moved_inside(system.program, begin)
        return self._finished(loop, *self._begun(loop, loop.start(start)))

    def _loop(self, system: System, embedded: bool, first: bool = True) -> _Loop | CondensedLoop:
        """The loop for a system; the `first` steps need not meet the full tolerance."""
        tolerance = self.tolerance(system.program.Q.dtype)
        if embedded:
            return _Loop(system, tolerance, homogeneous=True)
        if first:
            tolerance = max(tolerance, LOOSE * tolerance**0.5)
        if system.condensed is not None:
            return CondensedLoop.of(system.condensed, tolerance, PATIENCE, TO_BOUNDARY)
        return _Loop(system, tolerance, homogeneous=False)

    def _near_as_graph(self, system: System, rows: Tensor | None, embedded: bool) -> Point | None:
        """`_near` of the samples `rows` (None: all) as one graph, except the last steps of the last few samples.

        Returns None where no graph can be made. How many samples are left for an attempt changes from call to
        call, but each number of them would take a graph of its own. So there is one graph for few samples and one
        for all, padded with copies of the last sample.
        """
        count = whole = system.program.batch
        filled = system
        if rows is not None:
            count, few = len(rows), math.ceil((1 - DROP_BELOW) * whole)
            places = torch.arange(few if count <= few else whole, device=rows.device).clamp(max=count - 1)
            system, filled = system.take_rows(rows), system.take_rows(rows[places])

        def begun(*tensors: Tensor) -> tuple[int | Tensor, _State | State]:
            loop = self._loop(System.of_tensors(*tensors), embedded)
            return self._begun(loop, loop.start())

        key = ("qp", self, embedded, system.program.sizes)
        found = run_as_graph("qp with InteriorPoint", key, begun, *filled.tensors, varies=True)
        if found is None:
            return None
        (k, state), loop = found, self._loop(system, embedded)
        return self._finished(loop, int(k), type(state)(*(t[:count] for t in state)))

    def _begun(self, loop: _Loop | CondensedLoop, state: Any) -> tuple[int | Tensor, Any]:
        """The number of steps until finished samples may be dropped, and the state then."""
        return repeat(loop.step, state, _worth_a_step, self.max_steps)

    def _finished(self, loop: _Loop | CondensedLoop, k: int | Tensor, state: Any) -> Point:
        """The point of every sample, after further steps for those that are still running."""
        part, whole, rows = loop, state, torch.arange(len(state.s), device=state.s.device)
        while k < self.max_steps and bool((running := is_running(state.status)).any()):
            keep = running.nonzero()[:, 0]
            rows = rows[keep]
            state, part = type(state)(*(t[keep] for t in state)), part.take_rows(keep)
            k, state = repeat(part.step, state, _worth_a_step, self.max_steps, k)
            whole = type(whole)(*(w.index_copy(0, rows, t) for w, t in zip(whole, state)))
        return loop.outcome(k, whole)


def _moved_inside(program: QuadraticProgram, near: Point) -> Point:
    """The point of another solver, moved away from the boundary, where interior-point steps cannot start."""
    n, q, _ = program.sizes
    w = near.w.nan_to_num(0.0, 0.0, 0.0)
    lam, slack = (_away(v) for v in (w[:, n + q :], program.h - times(program.G, w[:, :n])))
    return near._replace(w=torch.cat([w[:, : n + q], lam], 1), slack=slack)


def _away(v: Tensor) -> Tensor:
    """`v` `(B, m)` with its entries raised to at least a share of the largest one, or of a fixed minimum."""
    return v.maximum(AWAY * v.amax(1, keepdim=True).clamp(min=AWAY))


def _worth_a_step(state: _State | State) -> Any:
    """Whether to take another step with all samples, which pays as long as most of them are running.

    A graph on an accelerator runs until all samples have finished: that takes less time than eager steps for the
    last few.
    """
    running = is_running(state.status)
    if torch.compiler.is_dynamo_compiling() and not is_cpu(running):
        return running.any()
    count = running.sum() if torch.compiler.is_dynamo_compiling() else int(running.sum())
    return (count == len(running)) | (count > DROP_BELOW * len(running))


@dataclass(frozen=True, eq=False)
class _Loop:
    system: System
    tolerance: float
    homogeneous: bool  # whether τ changes; if not, it stays 1

    @property
    def program(self) -> QuadraticProgram:
        return self.system.program

    @property
    def patience(self) -> int:
        return PATIENCE_EMBEDDED if self.homogeneous else PATIENCE

    def take_rows(self, rows: Tensor) -> _Loop:
        return replace(self, system=self.system.take_rows(rows))

    @property
    def least(self) -> float:
        """The least s / λ in the factors: with smaller ones, rounding loses the other terms of H.

        1e-11 in float64 and 1e-5 in float32, which leave terms of size one about 5 and 2 correct digits.
        """
        return torch.finfo(self.program.Q.dtype).eps ** 0.7

    @property
    def right(self) -> Tensor:
        """(-p, b, h) `(B, N)`."""
        program = self.program
        return torch.cat([-program.p, program.b, program.h], dim=1)

    def start(self, near: Point | None = None) -> _State:
        """The least-squares solution of all equations, moved into the interior; or the point `near`."""
        if near is not None:
            return self.begun(near.w, near.slack)
        program = self.program
        n, q, _ = program.sizes
        beyond = (program.h - FAR).clamp(min=0)  # distant bounds must not pull the start towards them
        right = torch.cat([-program.p, program.b, program.h - beyond], dim=1)
        ones = torch.ones_like(beyond)
        factors = self.system.factorise(ones, -ones)
        w = factors.solve(right.unsqueeze(1)).squeeze(1)
        lam = w[:, n + q :]
        return self.begun(torch.cat([w[:, : n + q], inside(lam)], dim=1), inside(-lam) + beyond)

    def begun(self, w: Tensor, slack: Tensor) -> _State:
        """The state before the first step, judged."""
        one = torch.ones_like(w[:, 0])
        zeros = torch.zeros_like(one, dtype=torch.int64)
        far = torch.full_like(one, float("inf"))
        binding = w[:, w.shape[1] - slack.shape[1] :] > slack
        bests = (w, slack, binding, binding, far, far)
        bare = _State(w, slack, one, one, w, one, w, *bests, zeros, zeros - 1, zeros)
        return self.judged(0, bare)

    def judged(self, k: int | Tensor, c: _State) -> _State:
        """The state `c` with its residuals, and with what they say about each sample that is still running."""
        program, tau = self.program, c.tau.unsqueeze(1)
        n, q, m = program.sizes
        x, y, lam = c.w.split([n, q, m], dim=1)
        Qx, dual = times(program.Q, x), times_transposed(program.G, lam) + times_transposed(program.A, y)
        Ax, Gx_s = times(program.A, x), times(program.G, x) + c.s
        p, bh = program.p * tau, torch.cat([program.b, program.h], 1) * tau
        primal = torch.cat([Ax, Gx_s], 1)
        residual = torch.cat([Qx + dual + p, primal - bh], dim=1)
        slope, below, xQx = dot(p, x) / c.tau, dot(bh, c.w[:, n:]) / c.tau, dot(x, Qx) / c.tau
        gap = c.kappa + xQx + slope + below
        # Not relative to the terms: far away from the origin these would hide that there is no solution.
        feasible = row_norm(residual[:, n:]) / (c.tau + row_norm(bh))
        size = torch.stack([row_norm(t) for t in (Qx, dual, p)]).amax(0)
        merit = torch.maximum(feasible, row_norm(residual[:, :n]) / (c.tau + size))
        value, bound = xQx / 2 + slope, -xQx / 2 - below
        sizes = torch.minimum(value.abs(), bound.abs())
        merit = torch.maximum(merit, (value - bound).abs() / (c.tau + sizes))
        # How far (λ, y) and x are from certificates that the program is infeasible or unbounded.
        no_point = no_least = torch.full_like(merit, float("inf"))
        suspect = (c.stale > 0) | self.homogeneous  # otherwise a certificate is unlikely
        if maybe_any(suspect):
            error = torch.maximum(row_norm(Qx), row_norm(primal))
            no_point = torch.where(suspect, _distance(row_norm(dual), c.w[:, n:], bh), no_point)
            no_least = torch.where(suspect, _distance(error, x, p), no_least)
        proof = torch.minimum(no_point, no_least)
        # Where nothing improves any more, the best certificate so far has to do. It must hold to 9e-8 in
        # float64 and 8e-4 in float32: with a looser limit a feasible program may be called infeasible, and
        # rounding prevents a tighter one.
        enough = torch.finfo(tau.dtype).eps ** 0.45
        certain = proof <= torch.where(c.stale >= self.patience, min(100 * enough, 1e-3), enough)

        running = is_running(c.status)
        better, proven = (merit < c.merit) & running, proof < c.proof
        stale = torch.where(better | (proven & self.homogeneous), 0, c.stale + 1)
        status = torch.where(stale > self.patience, int(Status.STAGNATED), int(Status.RUNNING))
        reason = torch.where(no_point <= no_least, int(Status.INFEASIBLE), int(Status.UNBOUNDED))
        status = torch.where(certain, reason, status)
        status = torch.where(merit <= self.tolerance, int(Status.CONVERGED), status)
        return c._replace(
            residual=residual,
            gap=gap,
            Qx=Qx,
            best=where_rows(better, c.w / tau, c.best),
            best_slack=where_rows(better, c.s / tau, c.best_slack),
            best_binding=where_rows(better, c.binding, c.best_binding),
            merit=torch.where(better, merit, c.merit),
            proof=torch.minimum(proof, c.proof),
            stale=stale,
            status=torch.where(running, status, c.status),
            steps=torch.where(running, k, c.steps),
        )

    def step(self, k: int | Tensor, c: _State) -> _State:
        """The state after a predictor step and a corrector step, whose centring the predictor determines."""
        if torch.compiler.is_dynamo_compiling():
            self = replace(self, system=System.of_tensors(*views(*self.system.tensors)))
        program, tau = self.program, c.tau
        n, q, m = program.sizes
        s, lam = c.s, c.w[:, n + q :]
        beta = -s / lam
        factors = self.system.factorise(torch.ones_like(s), torch.clamp(beta, max=-self.least))
        free = 1.0 if self.homogeneous else 0.0
        count = m + free
        mu = (dot(s, lam) + free * tau * c.kappa) / count
        right = (_pad(-c.residual, s), self.right) if self.homogeneous else (_pad(-c.residual, s),)
        affine, *rest = self.solve(factors, beta, torch.stack(right, 1)).unbind(1)
        second = rest[0] if rest else None
        d = _direction(program, c, affine, second, 1.0, -s * lam, -tau * c.kappa)
        length = _step_length(c, lam, d).unsqueeze(1)
        after = dot(s + length * d.s, lam + length * d.w[:, n + q :])
        length = length[:, 0]
        after = (after + free * (tau + length * d.tau) * (c.kappa + length * d.kappa)) / count
        centring = (after / mu) ** 3
        target = (centring * mu).unsqueeze(1)
        keep = 1 - centring if self.homogeneous else torch.ones_like(centring)
        # The second-order term belongs to a full step, and may make the iterates cycle where such a step leads far
        # outside. On the embedding, the last resort, it is therefore scaled by the length of the predictor step;
        # the plain method needs fewer steps without that (Colombo and Gondzio, "Further development of multiple
        # centrality correctors for interior point methods", Comput. Optim. Appl. 41, 2008).
        share = length if self.homogeneous else torch.ones_like(length)
        r_s = target - s * lam - share.unsqueeze(1) * d.s * d.w[:, n + q :]
        r_tau = target[:, 0] - tau * c.kappa - share * d.tau * d.kappa
        first = self.solve(factors, beta, _pad(-keep[:, None] * c.residual, -r_s / lam).unsqueeze(1)).squeeze(1)
        d = _direction(program, c, first, second, keep, r_s, r_tau)
        length = TO_BOUNDARY * _step_length(c, lam, d)
        finite = (d.w.sum(1) + d.s.sum(1) + d.tau + d.kappa).isfinite()
        good = is_running(c.status) & factors.usable & finite
        column = length.unsqueeze(1)
        moved = c._replace(
            w=where_rows(good, c.w + column * d.w, c.w),
            s=where_rows(good, s + column * d.s, s),
            binding=where_rows(good, seem_binding(lam, s, d.w[:, n + q :], d.s), c.binding),
            tau=torch.where(good, tau + length * d.tau, tau),
            kappa=torch.where(good, c.kappa + length * d.kappa, c.kappa),
            # A sample that takes no step will not change any more.
            stale=torch.where(good, c.stale, self.patience),
        )
        return self.judged(k + 1, moved)

    def solve(self, factors: Factors | CondensedFactors, beta: Tensor, right: Tensor) -> Tensor:
        """The Newton step for `right` `(B, k, N)`, refined on the embedding, where steps should be exact."""
        w = factors.solve(right)
        if not self.homogeneous:
            return w
        left = right - jacobian_product(self.program, torch.ones_like(beta), beta, w)
        return w + factors.solve(left)

    def outcome(self, k: int | Tensor, c: _State) -> Point:
        """The best point of every sample."""
        status = torch.where(is_running(c.status), int(Status.MAX_STEPS), c.status)
        count = torch.as_tensor(k, dtype=torch.int64, device=c.w.device) + 1
        return Point(c.best, c.best_slack, c.best_binding, status, c.steps, count)


class _Direction(NamedTuple):
    w: Tensor
    s: Tensor
    tau: Tensor
    kappa: Tensor


def _direction(
    program: QuadraticProgram,
    c: _State,
    first: Tensor,
    second: Tensor | None,
    keep: float | Tensor,
    r_s: Tensor,
    r_tau: Tensor,
) -> _Direction:
    """The step from its part `first` for a fixed τ and its change `second` per unit of τ (None: τ stays fixed).

    `r_s` and `r_tau` are the right-hand sides of λ ds + s dλ and τ dκ + κ dτ.
    """
    n, q, _ = program.sizes
    lam, tau = c.w[:, n + q :], c.tau
    if second is None:
        zero = torch.zeros_like(tau)
        return _Direction(first, (r_s - c.s * first[:, n + q :]) / lam, zero, zero)
    xi, Qxi = c.w[:, :n] / tau.unsqueeze(1), c.Qx / tau.unsqueeze(1)
    gradient = torch.cat([2 * Qxi + program.p, program.b, program.h], 1)
    above = keep * c.gap + r_tau / tau + dot(gradient, first)
    below = c.kappa / tau + dot(xi, Qxi) - dot(gradient, second)
    d_tau = above / below
    w = first + d_tau.unsqueeze(1) * second
    return _Direction(w, (r_s - c.s * w[:, n + q :]) / lam, d_tau, (r_tau - c.kappa * d_tau) / tau)


def _distance(error: Tensor, direction: Tensor, slope: Tensor) -> Tensor:
    """How far `direction` `(B, ·)` is from a certificate, independent of units.

    That is its `error` relative to its length, over its decrease along `slope` relative to the terms of that
    product; inf where it does not decrease.

    For a program that has a solution, this stays above the size of the data over that of the solution: -p'x, for
    instance, is at most the size of the multipliers times that of (Qx, Ax, Gx + s).
    """
    terms = slope * direction
    fall = -terms.sum(1)
    size = error * terms.abs().sum(1) / row_norm(direction)
    return torch.where(fall > 0, size / fall, float("inf"))


def _pad(r: Tensor, extra: Tensor) -> Tensor:
    """`r` `(B, N)` with `extra` `(B, m)` added to its last columns."""
    m = extra.shape[1]
    return torch.cat([r[:, : r.shape[1] - m], r[:, r.shape[1] - m :] + extra], dim=1)


def _step_length(c: _State, lam: Tensor, d: _Direction) -> Tensor:
    """The longest step `(B,)`, at most 1, that keeps λ, s, τ and κ positive."""
    d_lam = d.w[:, d.w.shape[1] - lam.shape[1] :]
    lam, s, d_lam, d_s = (
        torch.cat([v, t.unsqueeze(1)], 1)
        for v, t in ((lam, c.tau), (c.s, c.kappa), (d_lam, d.tau), (d.s, d.kappa))
    )
    return step_length(lam, s, d_lam, d_s)
