"""Diagonally implicit Runge-Kutta methods, for stiff systems: each stage solves an equation.

A stage Y of a step with length dt satisfies Y = base + g dt f(t, Y), where base is known from the stages before.
Newton's method finds it, with one matrix I - g dt J for all stages and, while that converges, for several steps.
The implicit function theorem differentiates it, whatever path Newton's method took.

Hairer and Wanner, "Solving Ordinary Differential Equations II", section IV.8; Kvaerno, "Singly diagonally implicit
Runge-Kutta methods with an explicit first stage", BIT 44 (2004).
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from implicitly.checks import BELOW_ONE, check_number
from implicitly.condition import Condition, Report
from implicitly.host import (
    Array,
    all_now,
    clamped,
    library,
    maybe_any,
    remembered,
    surely_all,
    to_host,
    to_tensor,
    views,
)
from implicitly.implicit import Backward, attach, find
from implicitly.iterate import Solver, repeat
from implicitly.linear import GMRES, DenseLU, dense
from implicitly.ode import tableaus
from implicitly.ode.combine import Length, advanced, as_length, stage_times, weighted
from implicitly.ode.control import TINY, Controller
from implicitly.ode.method import Memory, Step
from implicitly.ode.problem import Field, Problem
from implicitly.ode.runge_kutta import RungeKutta
from implicitly.ode.tableaus import Tableau
from implicitly.pullback import pullback, pulled
from implicitly.solution import Status
from implicitly.transforms import is_batched, is_plain, records

# Newton's method gives up a stage at the first rate of convergence, and asks for a new Jacobian beyond the second.
TOO_SLOW, SLOW = 0.9, 0.03
# Full Newton steps may lead away at first. Where they show no convergence yet, the error is taken to be this many
# times the last change.
FAR = 1e3
# With constant steps, this many iterations use one Jacobian; after that each iteration computes its own. Adaptive
# steps are made shorter instead.
PATIENT = 4
# The tolerance of a stage, relative to the tolerance of the step.
STAGE_TOLERANCE = 3e-2
# The number of earlier slopes from which that of a stage is predicted.
PREDICT = 3


class Stage(NamedTuple):
    """The equation of a stage, Y = base + length f(moment, Y)."""

    moment: Tensor
    base: Tensor
    length: Length


@dataclass(frozen=True, kw_only=True)
class ImplicitRungeKutta(RungeKutta):
    """Base class of diagonally implicit Runge-Kutta methods. With `dt`, the tolerances apply to the stages.

    Args:
        stage_solver: the solver for the stages, with its own tolerances, such as `NewtonKrylov()` if Jacobians are
            too large to be stored; None: Newton's method with a Jacobian `(n, n)` per sample, which is reused as
            long as it converges.
        stage_tolerance: the tolerance of that Newton's method, relative to the tolerance of the step; None: 0.03.
            The derivative assumes exact stages: across jumps at a loose rtol it may need 1e-4.
        limit_gib: the most memory that the Jacobians of all samples may take, in GiB; a solve that needs more
            raises ValueError.
    """

    stage_solver: Solver | None = None
    stage_tolerance: float | None = None
    limit_gib: float = 4.0
    # A step is often rejected only because Newton's method did not converge.
    controller: Controller = Controller(shrink=0.5)

    stage_steps: ClassVar[int] = 10

    @property
    def stability(self) -> float:
        """inf: decay is stable for steps of every length."""
        return float("inf")

    def __post_init__(self):
        super().__post_init__()
        name, solver, tolerance = type(self).__name__, self.stage_solver, self.stage_tolerance
        finds_roots = isinstance(solver, Solver) and not solver.linear and solver.needs is None
        if solver is not None and not finds_roots:
            raise TypeError(
                f"{name}: stage_solver must be a solver of equations such as im.NewtonKrylov() or im.Newton(), "
                f"got {solver!r}"
            )
        if tolerance is None:
            return
        check_number(name, "stage_tolerance", tolerance, BELOW_ONE)
        if solver is not None:
            raise ValueError(
                f"{name}: a stage_solver has its own tolerances, so stage_tolerance={tolerance:g} would have no "
                f"effect; pass only stage_solver=im.{type(solver).__name__}(rtol=..., atol=...)"
            )

    def check(self, problem: Problem) -> None:
        """As in `Method`; also raises ValueError if the dtype cannot resolve the tolerance of stages."""
        super().check(problem)
        if self.stage_solver is not None:
            self.stage_solver.tolerances(problem.y0.dtype)

    @property
    def sees_end(self) -> bool:
        """True, as NaN in any stage shows up in the state."""
        return True

    @property
    def differentiates(self) -> bool:
        """True: its stages need Jacobians."""
        return True

    @property
    def found_slopes(self) -> int:
        """The number of stages: their slopes need not be solved for if they are given."""
        return self.tableau.stages

    @property
    def ungraphed(self) -> str | None:
        """The feature of this method that `torch.compile` cannot have in a graph; None if there is none."""
        # The tracer refuses Newton's loop there, since it counts calls of f, and takes minutes for Broyden's.
        return super().ungraphed or (None if self.stage_solver is None else "a stage_solver")

    def step(self, F: Field, t: Array, dt: Array, y: Tensor, memory: Memory) -> Step:
        """One step from y `(B, n)` at t `(B,)`, of length dt `(B,)`."""
        newton = StageNewton.at(self, F, t, dt, y)
        y1, slopes = self._stages(F, t, dt, y, memory, newton)
        while newton.failed is not None and (harder := newton.harder(F, t, dt, y)):
            newton = harder
            y1, slopes = self._stages(F, t, dt, y, memory, newton)
        newton.keep(F)
        error = None
        if self.tableau.error is not None and self.dt is None:
            with torch.no_grad():
                error = newton.filtered(weighted(as_length(dt), self.tableau.error, slopes))
        if newton.failed is not None:
            y1 = torch.where(newton.failed.unsqueeze(1), float("nan"), y1)
        if self.tableau.stiffly_accurate:
            k1 = slopes[-1]
        else:
            k1 = F(F.f_times((t + dt)[None])[0], y1)
        return Step(t, dt, y, y1, (k1,), memory[0], k1, error, tuple(slopes))

    def _stages(
        self, F: Field, t: Array, dt: Array, y: Tensor, memory: Memory, newton: StageNewton
    ) -> tuple[Tensor, list[Tensor]]:
        """The new state and the slopes of the stages."""
        tableau, length = self.tableau, as_length(dt)
        y1, slopes = y, []
        for row, moment in zip(tableau.a, F.f_times(stage_times(t, dt, tableau.c))):
            base = advanced(y, length, row[:-1], slopes)
            if row[-1] == 0:
                y1, k = base, memory[0] if not slopes else F(moment, base)
            else:
                own = length * row[-1]
                weights, near = predictor(tableau.c, len(slopes)), slopes or memory
                if F.found:
                    weights, near = (1.0,), (F.found[len(slopes)],)
                y1 = newton.solve(F, Stage(moment, base, own), advanced(base, own, weights, near))
                k = (y1 - base) / _never_zero(own)
            slopes.append(k)
            if newton.failed is not None and surely_all(newton.failed):
                return y1, slopes + [k] * (tableau.stages - len(slopes))
        return (y1 if tableau.stiffly_accurate else advanced(y, length, tableau.b, slopes)), slopes


@remembered(256)
def predictor(nodes: tuple[float, ...], i: int) -> tuple[float, ...]:
    """The weights of earlier slopes that predict that of stage `i`, by the polynomial through the nearest ones."""
    near: dict[float, int] = {}
    for j in sorted(range(i), key=lambda j: abs(nodes[j] - nodes[i])):
        if nodes[j] not in near and len(near) < PREDICT:
            near[nodes[j]] = j
    weights = [0.0] * max(i, 1)
    if not near:
        return (1.0,)
    for c, j in near.items():
        weights[j] = math.prod([(nodes[i] - other) / (c - other) for other in near if other != c])
    return tuple(weights)


def _never_zero(length: Length) -> Length:
    if isinstance(length, Tensor):
        return torch.where(length == 0, 1.0, length)
    return length or 1.0


class StageIterate(NamedTuple):
    """An iterate of Newton's method, with its convergence data for each sample `(B,)`."""

    z: Tensor
    size: Array  # the size of the last change, over the tolerance
    gain: Array  # the estimated remaining error, relative to the last change
    going: Array  # whether it has not converged yet, but still may
    slow: Array  # whether it converges slower than with a new Jacobian
    converged: Array


@dataclass
class StageNewton:
    """Finds the stages of one step: Newton's method with one matrix, or the user's solver.

    Attributes:
        inverse: of I - g dt J, `(B, n, n)`; None where the user's solver finds the stages, or they are known.
        scale: the tolerance of each component `(B, n)`.
        least: `(B,)` the change, relative to that, which rounding may cause.
        fresh: whether J was computed in this step.
        full: whether every iteration computes its own Jacobian.
        gain: that of the last `StageIterate` of the stage before.
        slow: whether a new Jacobian would help.
        failed: `(B,)` the samples for which some stage was not found; None: none.
    """

    method: ImplicitRungeKutta
    inverse: Tensor | None
    scale: Tensor
    least: Array
    fresh: bool
    full: bool = False
    gain: Any = 1.0
    slow: bool = False
    failed: Tensor | None = None

    @classmethod
    def at(
        cls, method: ImplicitRungeKutta, F: Field, t: Array, dt: Array, y: Tensor, fresh: bool = False
    ) -> StageNewton:
        """The solver for a step from y `(B, n)` at t, with the Jacobian of an earlier step unless `fresh`."""
        with torch.no_grad():
            y = y.detach()
            scale = method.tolerance(y)
            least = to_host(8 * torch.finfo(y.dtype).eps * method.norm(y / scale))
            if method.stage_solver is not None or F.found:
                return cls(method, None, scale, least, True)
            J = None if fresh or torch.compiler.is_dynamo_compiling() else F.notes.get("jacobian")
            if fresh := J is None:
                J = jacobian(F, F.f_times(t[None])[0], y, method.limit_gib)
                F.notes["jacobian"] = J
            own = as_length(dt.detach() if isinstance(dt, Tensor) else dt)
            return cls(method, inverse_of(J, own * method.tableau.a[-1][-1]), scale, least, fresh)

    def harder(self, F: Field, t: Array, dt: Array, y: Tensor) -> StageNewton | None:
        """A solver that may find stages that this one did not; None: none, or a shorter step takes less work."""
        if not self.fresh:
            return StageNewton.at(self.method, F, t, dt, y, fresh=True)
        # A step that is taken again starts from a checkpoint, so not always with the earlier Jacobian that led to
        # its stages the first time; and the Jacobian at its own start may not lead there.
        # A graph always uses the Jacobian at the step's own start.
        traced = torch.compiler.is_dynamo_compiling()
        if self.full or traced or not F.again or self.method.stage_solver is not None:
            return None
        if self.failed is None or all_now(~self.failed):  # waiting for an accelerator costs less than a step
            return None
        return replace(StageNewton.at(self.method, F, t, dt, y, fresh=True), full=True)

    def keep(self, F: Field) -> None:
        """Drop the Jacobian if it has served its time, so that the next step computes its own."""
        if self.slow or self.failed is not None:
            F.notes.pop("jacobian", None)

    def filtered(self, error: Tensor) -> Tensor:
        """An error estimate that does not overrate stiff components (Hairer and Wanner, equation IV.8.19)."""
        return error if self.inverse is None else _times(self.inverse, error)

    def solve(self, F: Field, stage: Stage, guess: Tensor) -> Tensor:
        """The solution `(B, n)` of a stage, differentiable."""
        if F.found:
            return _attached_once(F, stage, guess.detach(), self.method.limit_gib)
        with torch.no_grad():
            if self.method.stage_solver is not None:
                z, failed = self._search(self.method.stage_solver, F, stage, guess)
            else:
                z, failed = self._iterate(F, stage, guess)
        # Failures are noted also in steps that autograd records, where nobody has checked yet, and in steps taken
        # again, as these may have begun with another Jacobian. Under `vmap` nobody can check.
        if not (is_batched(z) or (F.once and torch.compiler.is_dynamo_compiling())):
            self._note(failed)
        if not _attaches(F):
            return z
        if F.once and self.method.stage_solver is None:
            return _attached_once(F, stage, z, self.method.limit_gib)
        condition, theta = _condition(F, stage)
        # For very stiff systems, rounding leaves a larger residual than the default tolerance allows.
        by_lu = DenseLU(limit_gib=self.method.limit_gib, rtol=torch.finfo(z.dtype).eps ** 0.5)
        solver = by_lu if self.method.stage_solver is None else GMRES()
        return attach(condition, z, theta, Backward(solver))

    def _iterate(self, F: Field, stage: Stage, z: Tensor) -> tuple[Tensor, Array]:
        """Run Newton's method from z: the last iterate, and for which samples `(B,)` it did not converge."""
        xp, traced = library(self.least), torch.compiler.is_dynamo_compiling()
        ones = xp.ones_like(self.least)
        # Begin with the rate of the last stage (Hairer and Wanner, equation IV.8.10 and after).
        gain = clamped(self.gain * ones, 1e-16, 1.0) ** 0.8
        begin = StageIterate(z, ones, gain, ones > 0, ones < 0, ones < 0)
        if traced:
            found = self._traced(F, stage, begin)
        else:
            with np.errstate(all="ignore"):
                _, found = repeat(partial(self._change, F, stage), begin, _goes_on, self.method.stage_steps)
        self.slow |= maybe_any(found.slow)
        # If the matrix changes with the iterates, the rate says nothing about the next stage.
        self.gain = found.gain if self.method.dt is None and not self.full else 1.0
        return found.z, ~found.converged

    def _traced(self, F: Field, stage: Stage, begin: StageIterate) -> StageIterate:
        """The iterates in a traced graph, where the loop may change nothing outside of it.

        As `begin` has all samples going, it takes a step, so that C++ may be around it, see `run_as_graph`.
        """

        def change(i: int | Tensor, state: tuple[StageIterate, Tensor]) -> tuple[StageIterate, Tensor]:
            G = F.bind(*views(*F.theta))
            return self._change(G, stage, i, state[0]), state[1] + G.calls

        none = torch.zeros((), dtype=torch.int64, device=begin.z.device)
        _, (found, calls) = repeat(change, (begin, none), lambda s: _goes_on(s[0]), self.method.stage_steps)
        F.loops.append(calls)
        return found

    def _change(self, F: Field, stage: Stage, i: int | Tensor, it: StageIterate) -> StageIterate:
        """Iterate number i + 1."""
        inverse = self.inverse
        # A step that cannot be made shorter finally gets a new matrix for each iteration; in a graph, right away.
        if self.full or (self.method.dt is not None and (isinstance(i, Tensor) or i >= PATIENT)):
            inverse = inverse_of(jacobian(F, stage.moment.detach(), it.z, self.method.limit_gib), stage.length)
            if not isinstance(i, Tensor):  # a loop of a graph may change nothing outside of it
                self.inverse = inverse
        d = _times(inverse, _residual(F, stage, it.z))
        size, gain, slow = to_host(self.method.norm(d / self.scale)), it.gain, it.slow
        xp = library(size)
        if isinstance(i, Tensor) or i > 0:
            rate = size / clamped(it.size, TINY, None)
            shown = xp.where(rate < TOO_SLOW, rate / (1 - rate), FAR if self.full else float("inf"))
            gain = torch.where(i > 0, shown, gain) if isinstance(i, Tensor) else shown
            slow = slow | ((rate > SLOW) & (size > self.least) & (i > 0))
        # NaN counts as not converged. Changes of the size of rounding say nothing about the rate.
        converged = (gain * size <= (self.method.stage_tolerance or STAGE_TOLERANCE)) | (size <= self.least)
        hopeful = xp.isfinite(size) & xp.isfinite(gain)
        return StageIterate(it.z + d, size, gain, hopeful & ~converged, slow, converged)

    def _search(self, solver: Solver, F: Field, stage: Stage, guess: Tensor) -> tuple[Tensor, Array]:
        """The stage as the user's solver finds it, and which samples `(B,)` it did not find."""
        bound: list[Field] = []
        condition, theta = _condition(F, stage, bound)
        # No report: a step whose stage is not found is repeated with a shorter length, or ends the sample.
        found = find(solver, replace(condition, report=Report("ignore")), guess, theta)
        F.calls += sum(G.calls for G in bound)
        right = found.status == int(Status.CONVERGED)
        if solver.fixed_steps:  # steps were asked for, not convergence
            right = right | (found.status == int(Status.MAX_STEPS))
        return found.z, to_host(~right)

    def _note(self, failed: Array) -> None:
        if maybe_any(failed):
            failed = to_tensor(failed)
            self.failed = failed if self.failed is None else self.failed | failed


def _attaches(F: Field) -> bool:
    """Whether a step is, or may be, taken for its derivative; in a graph, `once` says so."""
    return F.once or (records() and not torch.compiler.is_dynamo_compiling())


def _goes_on(it: StageIterate) -> bool | Tensor:
    going = it.going.any()
    return going if isinstance(going, Tensor) else bool(going)


# Up to this many columns, one product after the other is faster than all at once.
FEW = 16


def jacobian(F: Field, moment: Tensor, y: Tensor, limit_gib: float) -> Tensor:
    """The Jacobian df/dy `(B, n, n)`, one matrix per sample."""
    if y.shape[1] <= FEW and not torch.compiler.is_dynamo_compiling() and is_plain(y, moment, *F.theta):
        leaf = y.detach().requires_grad_()
        with torch.enable_grad():
            return _rows(F(moment, leaf), leaf)
    _, pull = pullback(lambda y: F(moment, y), y)
    return dense(lambda u: pull(u)[0], y, limit_gib).mT


def _rows(slope: Tensor, y: Tensor) -> Tensor:
    """The derivative of `slope` by y `(B, n, n)`, from the graph that autograd recorded."""
    if not slope.requires_grad:
        return slope.new_zeros(*slope.shape, slope.shape[1])
    if slope.shape[1] == 0:  # states without entries
        return slope.new_zeros(len(slope), 0, 0)
    units = torch.eye(slope.shape[1], dtype=slope.dtype, device=slope.device)
    return torch.stack([pulled([slope], [unit.expand_as(slope)], [y], retain=True)[0] for unit in units], dim=1)


def inverse_of(J: Tensor, length: Length) -> Tensor:
    """(I - length J)^-1 `(B, n, n)`."""
    length = length.unsqueeze(2) if isinstance(length, Tensor) else length
    eye = torch.eye(J.shape[1], dtype=J.dtype, device=J.device)
    return torch.linalg.inv_ex(eye - length * J)[0]


def _times(matrices: Tensor | None, rows: Tensor) -> Tensor:
    assert matrices is not None
    return torch.bmm(matrices, rows.unsqueeze(2)).squeeze(2)


def _residual(F: Field, stage: Stage, z: Tensor) -> Tensor:
    return stage.base + stage.length * F(stage.moment, z) - z


def _condition(F: Field, stage: Stage, bound: list[Field] | None = None) -> tuple[Condition, tuple[Tensor, ...]]:
    """The equation of a stage as a `Condition`, and the tensors that it depends on.

    The fields that it calls, which count their calls, are added to `bound`.
    """
    length = (stage.length,) if isinstance(stage.length, Tensor) else ()

    def bind(moment: Tensor, base: Tensor, *rest: Tensor) -> Any:
        own, theta = (rest[0], rest[1:]) if length else (stage.length, rest)
        G = F.bind(*theta)
        if bound is not None:
            bound.append(G)
        return lambda z: _residual(G, Stage(moment, base, own), z)

    theta = (stage.moment, stage.base, *length, *F.theta)
    # Its derivative always warns if a linear solve fails, since samples that failed have no part in it.
    return Condition(bind, "a stage", stage.base.dtype, Report("warn"), relative_to_iterate=True), theta


def _attached_once(F: Field, stage: Stage, z: Tensor, limit_gib: float) -> Tensor:
    """`z` `(B, n)` with its first derivative: one more Newton step, with the Jacobian there held fixed."""
    rows = z.shape[1] <= FEW and not torch.compiler.is_dynamo_compiling()
    leaf = z.requires_grad_() if rows else z
    slope = F(stage.moment, leaf)
    length = stage.length.detach() if isinstance(stage.length, Tensor) else stage.length
    moment = stage.moment.detach()
    if rows:
        J = _rows(slope, leaf)
    else:
        # Without a derivative no transform is needed, under which some operations fail, such as sparse products.
        with nullcontext() if torch.compiler.is_dynamo_compiling() else torch.no_grad():
            J = jacobian(F, moment, z.detach(), limit_gib).detach()
    return z.detach() + _times(inverse_of(J, length), stage.base + stage.length * slope - z.detach())


@dataclass(frozen=True, kw_only=True)
class ImplicitEuler(ImplicitRungeKutta):
    """The implicit Euler method, of order 1, L-stable; constant steps.

    The options are those of `implicitly.ode.implicit_runge_kutta.ImplicitRungeKutta` and of
    `implicitly.ode.method.Method`.
    """

    tableau: ClassVar[Tableau] = tableaus.IMPLICIT_EULER


@dataclass(frozen=True, kw_only=True)
class ImplicitMidpoint(ImplicitRungeKutta):
    """The implicit midpoint method, of order 2, symplectic; constant steps.

    The options are those of `implicitly.ode.implicit_runge_kutta.ImplicitRungeKutta` and of
    `implicitly.ode.method.Method`.
    """

    tableau: ClassVar[Tableau] = tableaus.IMPLICIT_MIDPOINT


@dataclass(frozen=True, kw_only=True)
class Trapezoid(ImplicitRungeKutta):
    """The trapezoidal rule (Crank-Nicolson), of order 2, A-stable.

    The options are those of `implicitly.ode.implicit_runge_kutta.ImplicitRungeKutta` and of
    `implicitly.ode.method.Method`.
    """

    tableau: ClassVar[Tableau] = tableaus.TRAPEZOID


@dataclass(frozen=True, kw_only=True)
class Kvaerno3(ImplicitRungeKutta):
    """Kvaerno's pair 3(2), L-stable.

    "Singly diagonally implicit Runge-Kutta methods with an explicit first stage", BIT 44 (2004).
    The options are those of `implicitly.ode.implicit_runge_kutta.ImplicitRungeKutta` and of
    `implicitly.ode.method.Method`.
    """

    tableau: ClassVar[Tableau] = tableaus.KVAERNO3


@dataclass(frozen=True, kw_only=True)
class Kvaerno5(ImplicitRungeKutta):
    """Kvaerno's pair 5(4), L-stable: the method to try first for stiff systems.

    The dense output is a quartic of order 4. Along the slow manifold of a very stiff system, the ends of steps are
    far more accurate than rtol demands, and outputs inside steps may be less accurate; where that matters, use
    `dt_max` or `tstops`.

    "Singly diagonally implicit Runge-Kutta methods with an explicit first stage", BIT 44 (2004).
    The options are those of `implicitly.ode.implicit_runge_kutta.ImplicitRungeKutta` and of
    `implicitly.ode.method.Method`.
    """

    tableau: ClassVar[Tableau] = tableaus.KVAERNO5
    # Of order 5, one step rejected costs more than all being a little shorter: a tenth of the calls of f in
    # oscillators that relax (Van der Pol, Oregonator). Beyond that, steps that only rounding keeps short suffer.
    controller: Controller = Controller(safety=0.85, shrink=0.5)
