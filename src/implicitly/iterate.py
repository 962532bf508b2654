"""The one loop of all solvers: samples converge, fail and are reported one by one.

A solver is a rule that proposes the next iterate. Everything else about iterating is here, once: when a sample
has converged, stagnated or blown up, which iterate was its best, and how finished samples stop costing
anything. States are matrices `(B, n)`, one sample per row.

The body of the loop is a pure function from tensors to tensors of fixed shape. Eagerly it runs in a Python
loop; traced by `torch.compile`, the same body becomes one `while_loop` graph.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch._higher_order_ops.while_loop import while_loop
from torch.utils import _pytree as pytree

from implicitly.checks import NONNEGATIVE, check_count, check_number
from implicitly.host import LOOPS, maybe_any, on_host, remembered, to_host, views
from implicitly.solution import Status, is_running
from implicitly.transforms import is_batched, is_cpu, is_wrapped, unwrapped
from implicitly.tree import row_norm

Residual = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Affine:
    """The residual u -> b - M u of a linear system, with M and b accessible."""

    operator: Callable[[Tensor], Tensor]
    b: Tensor

    def __call__(self, u: Tensor) -> Tensor:
        """The residual at `u` `(B, n)`."""
        return self.b - self.operator(u)


@dataclass(frozen=True)
class Coarse:
    """A residual that f computes in a narrower dtype than the state's; `eps` is that of the narrower dtype."""

    residual: Residual
    eps: float

    def __call__(self, z: Tensor) -> Tensor:
        """The residual at `z` `(B, n)`."""
        return self.residual(z)


# A residual this many times its first value is not expected to come back: the sample has diverged.
BLOW_UP = 1e8
# Steps without a new best residual after which a sample has stagnated.
PATIENCE = 30
# On an accelerator, asking "has everything converged?" makes the host wait. The longer the solve, the less often
# it is asked, such that at most this share of the steps is taken needlessly, after convergence.
LATE = 1 / 4
# Where a recurrence says that a residual is within tolerance, the true one may be this many times the tolerance.
DRIFTED = 10
# Finished samples are dropped from the calls of f once at most this share of the rows is still running.
DROP_BELOW = 7 / 8


class Proposal(NamedTuple):
    """The next iterate, as a solver proposes it.

    `residual` is given where the solver had to evaluate it anyway (line searches, recurrences); else the loop
    evaluates it. `calls` counts the evaluations made. `singular` `(B,)` marks samples that cannot go on because a
    linear system has no solution; `verdict` `(B,)` int64 holds another `Status` for which samples cannot go on, or
    RUNNING where they can. `progress` `(B,)` marks samples that came closer by a measure other than the residual.
    """

    z: Tensor
    memory: tuple[Tensor, ...] = ()
    residual: Tensor | None = None
    calls: int | Tensor = 0
    singular: Tensor | None = None
    verdict: Tensor | None = None
    progress: Tensor | None = None

    @property
    def fails_nowhere(self) -> bool:
        """Whether no sample is marked as unable to go on."""
        return self.singular is None and self.verdict is None

    @property
    def is_plain(self) -> bool:
        """Whether it is only the point at which to evaluate the residual next."""
        return all(x is None for x in (self.residual, self.singular, self.verdict, self.progress))


@dataclass(frozen=True, kw_only=True)
class Solver(ABC):
    """Base class of solvers: a rule for the next iterate, with its tolerances.

    A sample has converged when |r| <= atol + rtol * scale in the 2-norm, where r is its residual and the scale
    is |z| for a fixed point, |F(z0)| for a root and |b| for a linear system. For a fixed point the tolerance
    bounds the error |z - z*|: if the last step was g > 1 times as long as the residual it started from, the error
    is about g |r|, so |r| must be g times smaller.

    Args:
        rtol: relative tolerance; None means eps^(2/3) of the state's dtype (4e-11 in float64, 2e-5 in float32,
            0.04 in bfloat16), or of autocast's dtype where autocast is on. `rtol=0` without `atol` asks for
            exactly `max_steps` steps, without a test of convergence.
        atol: absolute tolerance; None means 10 eps of the dtype, or 0 with `rtol=0` and for linear systems. Where
            the units of states or residuals are so small that this is not negligible, pass `atol=0`, or scale
            them.
        max_steps: number of steps after which a sample ends with `Status.MAX_STEPS`.
    """

    rtol: float | None = None
    atol: float | None = None
    max_steps: int = 100

    # Whether it needs the operator of a linear condition, not only residuals.
    linear: ClassVar[bool] = False
    # Whether it updates the residual by a recurrence, which can drift from the true one.
    recurrent: ClassVar[bool] = False
    # How many of the first tensors of its memory are buffers of slots, of which a step writes one (`write_kept`).
    history_slots: ClassVar[int] = 0
    # Whether `estimate` describes the inverse Jacobian.
    estimates_inverse: ClassVar[bool] = False
    # Whether its operations are differentiable wherever they are applied, so that autograd may record them.
    recordable: ClassVar[bool] = True
    # What it needs besides a residual: see `Descent`.
    needs: ClassVar[str | None] = None
    # What messages call it, where users do not know its class; by default they name the class.
    label: ClassVar[str | None] = None

    def __post_init__(self):
        for name in ("rtol", "atol"):
            if (value := getattr(self, name)) is not None:
                check_number(type(self).__name__, name, value, NONNEGATIVE)
        check_count(type(self).__name__, "max_steps", self.max_steps)

    @property
    def fixed_steps(self) -> bool:
        """Whether exactly `max_steps` steps are asked for, without a test of convergence."""
        return self.rtol == 0 and not self.atol

    @property
    def nests(self) -> bool:
        """Whether a step may contain a loop of its own, by `repeat` or `iterate`."""
        return False

    @abstractmethod
    def start(self, F: Any, z: Tensor, r: Tensor) -> tuple[Tensor, ...]:
        """The solver's memory before the first step; each of its tensors has one row per sample.

        `F` maps z to its residual; a linear solver gets an `Affine`, which has the operator.
        """

    @abstractmethod
    def propose(self, F: Any, k: int | Tensor, z: Tensor, r: Tensor, memory: Any) -> Proposal:
        """The iterate that follows `z` `(B, n)`, whose residual is `r` `(B, n)`, at step `k` (counted from 0)."""

    def estimate(self, k: int | Tensor, z: Tensor, memory: Any) -> tuple[Tensor, ...]:
        """Tensors that describe the inverse of the residual's Jacobian, after `k` steps that ended at `z`."""
        return ()

    def tolerances(self, dtype: torch.dtype) -> tuple[float, float]:
        """The tolerances `(rtol, atol)` for states of `dtype`; raises ValueError if it cannot reach rtol."""
        eps = torch.finfo(dtype).eps
        rtol = eps ** (2 / 3) if self.rtol is None else self.rtol
        if 0 < rtol < eps:
            raise ValueError(
                f"{type(self).__name__}: {dtype} cannot reach rtol={rtol:g}; the smallest it can is {eps:.2g}. "
                "Loosen rtol, or pass the state and the arguments in a wider dtype"
            )
        return rtol, (10 * eps if rtol > 0 else 0.0) if self.atol is None else self.atol


class Found(NamedTuple):
    """The raw result of a solve, as tensors.

    `z` is `(B, n)`; `status`, `residual` and `steps` are `(B,)`; `evaluations` is a 0-d count (a plain number
    where steps are unrolled into a graph); `estimate` is what the solver knows of the inverse Jacobian.

    Where the last call of f is left to the caller, `ahead` holds the last iterate `(B, n)`, at which f is yet to
    be called; then `z` and `residual` are those of the best iterate before it, and every sample is RUNNING.
    `looked_at` says that the host has already waited for the solve, if it had to, so that looking at how the
    samples ended costs nothing more.
    """

    z: Tensor
    status: Tensor
    residual: Tensor
    steps: Tensor
    evaluations: Tensor | int
    estimate: tuple[Tensor, ...] = ()
    ahead: tuple[Tensor, ...] = ()
    looked_at: bool = False


class _Carry(NamedTuple):
    z: Tensor
    r: Tensor
    best: Tensor
    best_norm: Tensor
    stale: Tensor  # steps since the best iterate
    status: Tensor | None  # None: every sample is running (known only where looking is cheap)
    steps: Tensor
    scale: Tensor
    blow_up: Tensor
    calls: int | Tensor
    memory: tuple[Tensor, ...]

    def with_kept(self, kept: tuple[Tensor, ...]) -> _Carry:
        """This carry with the tensors that were `set_aside` put back."""
        return self._replace(memory=(*kept, *self.memory))


def iterate(
    solver: Solver,
    bind: Callable[..., Residual],
    theta: tuple[Tensor, ...],
    z: Tensor,
    r: Tensor | None = None,
    *,
    rtol: float | Tensor,
    atol: float,
    scale: Tensor | None = None,
    floor: float = 0.0,
    sample_dims: tuple[int | None, ...] | None = None,
    verify: bool = False,
    leave_last: bool = False,
    unrolled: bool = False,
) -> Found:
    """Iterate `solver` on the residual `bind(*theta)` from `z` `(B, n)` until every sample is done.

    The residual of a linear system is an `Affine`, whose b is `theta[0]`, with `scale` |b|; b may be as small or
    large as it likes.

    Args:
        r: the residual at `z`, where the caller has it already.
        rtol: a number, or `(B,)`, one per sample.
        scale: `(B,)`, what `rtol` is relative to; None: the norm of the current iterate.
        floor: the smallest residual, relative to the iterate, that f can reach because of rounding.
        sample_dims: for each of `theta` the dimension that holds the samples, or None where it is shared. Finished
            samples are then dropped from the calls of f. None in place of the tuple: never drop.
        verify: evaluate the residual of the answer once more, for solvers that update it by a recurrence.
        leave_last: with a fixed number of steps, leave the last call of f to the caller, who needs it anyway,
            if nothing has failed until then (known only where looking is cheap): see `Found.ahead`.
        unrolled: see `repeat`.
    """
    F, unit = bind(*theta), None
    if isinstance(F, Affine) and scale is not None and (unit := _unit(F.b, scale)) is not None:
        F, theta, z, r, rtol, scale = _in_units(unit, F, theta, z, r, rtol, atol)
        atol = 0.0
    loop = _Loop(solver, rtol, atol, floor, relative_to_iterate=scale is None, unrolled=unrolled)
    carry = loop.start(F, z, r, scale)
    droppable = sample_dims is not None and not torch.compiler.is_dynamo_compiling()
    droppable = droppable and not any(is_batched(x) for x in (z, *theta))  # vmap hides who has finished
    k, carry, ahead = _stepped(loop, F, carry, droppable, leave_last)
    if ahead is not None:
        return ahead
    found = loop.outcome(k, carry)
    if droppable and k < solver.max_steps and bool(_running(carry).any()):
        assert sample_dims is not None
        with some_dropped():
            found = _without_finished(loop, bind, theta, sample_dims, k, carry, found)
    if verify and scale is not None and maybe_any(found.steps > 0):
        found = _verified(found, row_norm(bind(*theta)(found.z)), DRIFTED * (atol + rtol * scale), scale)
    return found if unit is None else found._replace(z=found.z * unit, residual=found.residual * unit[:, 0])


def _stepped(
    loop: _Loop, F: Residual, carry: _Carry, droppable: bool, leave_last: bool
) -> tuple[int | Tensor, _Carry, Found | None]:
    """The number of steps taken and the carry after them; or the `Found` of a last call left to the caller."""
    k, going, max_steps = 0, partial(loop.worth_a_step, droppable), loop.solver.max_steps
    kept, carry = loop.set_aside(carry)

    def step(k: int | Tensor, carry: _Carry) -> _Carry:
        if not kept:
            return loop.step(F, k, carry)
        return loop.set_aside(loop.step(F, k, carry.with_kept(views(*kept))))[1]

    if leave_last and loop.fixed_steps and not loop.is_blind(carry.z):
        k, carry = repeat(step, carry, going, max_steps - 1)
        if carry.status is None:
            new = loop.solver.propose(F, k, carry.z, carry.r, carry.memory)
            if new.is_plain:
                return k, carry, loop.ahead(carry, new)
            k, carry = k + 1, loop.judge(F, k, carry, new)
    k, carry = repeat(step, carry, going, max_steps, k, unrolled=loop.unrolled)
    return k, carry.with_kept(kept), None


def _unit(b: Tensor, size: Tensor) -> Tensor | None:
    """Units `(B, 1)`, powers of two, for rows of `b` with norms `size`; None where all of them are seen to be 1.

    The solution is proportional to b, but squares on the way to it would underflow or overflow.
    """
    least, most = torch.finfo(b.dtype).tiny ** 0.25, torch.finfo(b.dtype).max ** 0.25
    if on_host(size):
        known = to_host(size)
        if ((known > least) & (known < most)).all():
            return None
    largest = b.detach().abs().amax(1, keepdim=True)
    needed = (largest > 0) & (largest < math.inf) & ((largest < least) | (largest > most))
    if not maybe_any(needed):
        return None
    power = largest / (2 * torch.frexp(largest).mantissa)
    return torch.where(needed, power.clamp(min=torch.finfo(b.dtype).tiny), 1.0)


def _in_units(
    unit: Tensor,
    F: Affine,
    theta: tuple[Tensor, ...],
    z: Tensor,
    r: Tensor | None,
    rtol: float | Tensor,
    atol: float,
) -> tuple[Affine, tuple[Tensor, ...], Tensor, Tensor | None, float | Tensor, Tensor]:
    """The linear system of `iterate`, each sample in its `unit` `(B, 1)`, and its new `scale`.

    The absolute tolerance becomes a part of the relative one, since |b| is known.
    """
    b = F.b / unit
    scale = row_norm(b)
    if atol:
        rtol = rtol + atol / (unit[:, 0] * torch.where(scale == 0, math.inf, scale))
    return replace(F, b=b), (b, *theta[1:]), z / unit, None if r is None else r / unit, rtol, scale


@contextmanager
def some_dropped() -> Iterator[None]:
    """A context that adds a note to errors of f: some samples had been dropped from its calls."""
    try:
        yield
    except RuntimeError as error:
        error.add_note(
            "Samples that were done had been dropped from this call of f. Where f couples samples, pass "
            "batch_dims=0. Where a tensor holds one entry a sample, f has to be called with it, in args, with "
            "in_dims saying so: parameters and buffers of f are taken to be shared"
        )
        raise


def _without_finished(
    loop: _Loop,
    bind: Callable[..., Residual],
    theta: tuple[Tensor, ...],
    sample_dims: tuple[int | None, ...],
    k: int | Tensor,
    carry: _Carry,
    found: Found,
) -> Found:
    """Continue from `found`, the outcome after step `k`, with the unfinished samples only, until none is left."""
    max_steps = loop.solver.max_steps
    rows = torch.arange(len(found.z), device=found.z.device)
    while k < max_steps and bool((running := _running(carry)).any()):
        keep = unwrapped(running).nonzero()[:, 0]
        rows = rows[keep]
        carry, loop = _take_rows(carry, keep), loop.take_rows(keep)
        F = bind(*(t if d is None else t.index_select(d, rows) for t, d in zip(theta, sample_dims)))
        k, carry = repeat(partial(loop.step, F), carry, partial(loop.worth_a_step, True), max_steps, k)
        found = _with_rows(found, rows, loop.outcome(k, carry))
    return found


@dataclass(frozen=True)
class _Loop:
    """One step of the loop, for one solver and its tolerances."""

    solver: Solver
    rtol: float | Tensor
    atol: float
    floor: float
    relative_to_iterate: bool
    unrolled: bool = False

    @property
    def fixed_steps(self) -> bool:
        """Whether exactly `max_steps` steps are asked for, without a test of convergence."""
        return not isinstance(self.rtol, Tensor) and self.rtol == 0 and self.atol == 0

    def start(self, F: Residual, z: Tensor, r: Tensor | None, scale: Tensor | None) -> _Carry:
        calls: int | Tensor = int(r is None)
        if torch.compiler.is_dynamo_compiling() and not self.unrolled:
            calls = torch.full((), calls, dtype=torch.int64, device=z.device)
        r = F(z) if r is None else r
        norm = row_norm(r)
        scale = row_norm(z) if scale is None else scale
        zeros = torch.zeros_like(norm, dtype=torch.int64)
        status = zeros + int(Status.RUNNING)
        if not self.fixed_steps:
            status = coded(norm <= self._limit(scale), Status.CONVERGED, status)
        status = coded(norm < math.inf, status, Status.NON_FINITE)
        memory = self.solver.start(F, z, r)
        status = None if self.is_blind(z) or self._all(is_running(status), 0) else status
        return _Carry(z, r, z, norm, zeros, status, zeros, scale, BLOW_UP * norm, calls, memory)

    def step(self, F: Residual, k: int | Tensor, c: _Carry) -> _Carry:
        return self.judge(F, k, c, self.solver.propose(F, k, c.z, c.r, c.memory))

    def judge(self, F: Residual, k: int | Tensor, c: _Carry, new: Proposal) -> _Carry:
        """The carry after step `k` to the proposal `new`: which samples converged, failed or improved."""
        new = _without_idle(new)
        running = None if c.status is None else is_running(c.status)
        z = new.z if running is None else where_rows(running, new.z, c.z)
        if new.residual is None:
            r = F(z)
        else:
            r = new.residual if running is None else where_rows(running, new.residual, c.r)
        calls = c.calls + new.calls + int(new.residual is None)
        norm = row_norm(r)
        scale = row_norm(z) if self.relative_to_iterate and not self.fixed_steps else c.scale
        if running is None and self._uneventful(k, c, new, norm, scale):
            return c._replace(z=z, r=r, best=z, best_norm=norm, stale=c.steps, calls=calls, memory=new.memory)
        better = norm < c.best_norm
        if running is None and new.fails_nowhere and new.progress is None and self.is_blind(norm):
            # Samples that end in NaN are told apart at the end, by `last_step`.
            best, best_norm = where_rows(better, z, c.best), torch.where(better, norm, c.best_norm)
            return c._replace(z=z, r=r, best=best, best_norm=best_norm, calls=calls, memory=new.memory)
        # NaN stops, too. A fixed number of steps is taken however the residual grows on the way.
        stop = ~(norm < math.inf) if self.fixed_steps else ~(norm <= c.blow_up)
        if new.progress is not None:
            better_otherwise = new.progress & (norm < math.inf)
            stop = stop & ~better_otherwise
        converged = self._converged(c, z, norm, scale)
        if converged is not None:
            better, stop = better | converged, stop | converged
        if new.singular is not None:
            stop = stop | new.singular
        if new.verdict is not None:
            stop = stop | ~is_running(new.verdict)
        stale = (c.stale + 1).masked_fill(better if new.progress is None else better | new.progress, 0)
        if not self.fixed_steps:
            stop = stop | (stale >= PATIENCE)
        if running is not None:
            better, stop = better & running, stop & running
        status, steps = c.status, c.steps
        if maybe_any(stop):
            reason = _reason(norm, converged, c.blow_up, new)
            status = coded(stop, reason, Status.RUNNING if status is None else status)
            steps = torch.where(stop, k + 1, steps)
            if new.progress is not None:  # a line search must not go on for finished samples
                r = torch.where(is_running(status).unsqueeze(1), r, 0.0)
        best, best_norm = where_rows(better, z, c.best), torch.where(better, norm, c.best_norm)
        return _Carry(z, r, best, best_norm, stale, status, steps, c.scale, c.blow_up, calls, new.memory)

    def set_aside(self, c: _Carry) -> tuple[tuple[Tensor, ...], _Carry]:
        """The part of the memory that a traced loop writes in place rather than carries, and `c` with the rest."""
        traced = torch.compiler.is_dynamo_compiling() and not self.unrolled and LOOPS.writes
        count = self.solver.history_slots if traced else 0
        return c.memory[:count], c._replace(memory=c.memory[count:])

    def is_blind(self, x: Tensor) -> bool:
        """Whether no value is looked at: with a fixed number of steps, where the host would wait for `x`."""
        return self.fixed_steps and not is_cpu(x) and not torch.compiler.is_dynamo_compiling()

    def _all(self, mask: Tensor, k: int) -> bool:
        """Whether `mask` `(B,)` is seen to be true for every sample after `k` steps; False where nobody looks."""
        looks = not torch.compiler.is_dynamo_compiling() and _is_due(k, mask)
        return looks and bool(unwrapped(mask).all())

    def _limit(self, scale: Tensor) -> Tensor:
        """The residual norm `(B,)` below which a sample has converged."""
        limit = self.rtol * scale
        return limit + self.atol if self.atol else limit

    def _uneventful(self, k: int | Tensor, c: _Carry, new: Proposal, norm: Tensor, scale: Tensor) -> bool:
        """Whether a cheap look shows that every sample improved and none ends: the fast path."""
        if torch.compiler.is_dynamo_compiling() or is_wrapped(norm) or self.is_blind(norm):
            return False
        if new.progress is not None:
            return False
        if is_cpu(norm):
            return new.fails_nowhere and self._all_come_closer(norm, c.best_norm, scale)
        if not _is_due(k + 1, norm):  # then nobody looks: it would make the host wait twice per step
            return False
        going_on = norm < c.best_norm
        if not self.fixed_steps:
            going_on &= norm > self._limit(scale)
        if new.singular is not None:
            going_on &= ~new.singular
        if new.verdict is not None:
            going_on &= is_running(new.verdict)
        return bool(going_on.all())

    def _all_come_closer(self, norm: Tensor, best_norm: Tensor, scale: Tensor) -> bool:
        """Whether all residuals are the smallest so far and above their limits, computed by NumPy."""
        size = to_host(norm)
        going_on = size < to_host(best_norm)
        if not self.fixed_steps:
            rtol = to_host(self.rtol) if isinstance(self.rtol, Tensor) else self.rtol
            going_on &= size > self.atol + rtol * to_host(scale)
        return bool(going_on.all())

    def _converged(self, c: _Carry, z: Tensor, norm: Tensor, scale: Tensor) -> Tensor | None:
        """Which samples have converged at `z`, with residual norm `norm`, after the step from `c`."""
        if self.fixed_steps:
            return None
        converged = norm <= self._limit(scale)
        if not self.relative_to_iterate or not maybe_any(converged):
            return converged
        assert not isinstance(self.rtol, Tensor)
        # The step was the solver's estimate of the error of `c.z`; `gain` is how many times longer it was than the
        # residual there.
        gain = row_norm(z - c.z) / row_norm(c.r)
        return norm <= self.atol + torch.clamp(self.rtol / gain, self.floor, self.rtol) * scale

    def worth_a_step(self, droppable: bool, c: _Carry) -> bool | Tensor:
        """Whether to take another step, until enough samples are done to be dropped, or all of them are."""
        if c.status is None:
            return c.steps.shape[0] > 0
        if self.fixed_steps and not (on_host(c.status) or torch.compiler.is_dynamo_compiling()):
            return True  # the number of steps is known; no need to wait for an accelerator
        running = is_running(c.status)
        if not droppable:
            return running.any()
        count = running.sum()
        return (count == len(running)) | (count > DROP_BELOW * len(running))

    def outcome(self, k: int | Tensor, c: _Carry) -> Found:
        calls = c.calls if self.unrolled else _count(c.calls)
        estimate = self.solver.estimate(k, c.z, c.memory)
        if c.status is None and self.is_blind(c.z):
            found = last_step(self.solver, c.z, c.r, c.best, c.best_norm)
            return found._replace(evaluations=calls, estimate=estimate)
        running = _running(c)
        status = coded(running, Status.MAX_STEPS, Status.MAX_STEPS if c.status is None else c.status)
        z, residual, steps = c.best, c.best_norm, torch.where(running, k, c.steps)
        if self.fixed_steps:  # convergence was not tested, so the answer is the last iterate
            z, residual = where_rows(running, c.z, z), torch.where(running, row_norm(c.r), residual)
        return Found(z, status, residual, steps, calls, estimate)

    def ahead(self, c: _Carry, new: Proposal) -> Found:
        """The state before the last call of f, at the proposed iterate; all samples are running."""
        status = torch.full_like(c.steps, int(Status.RUNNING))
        steps = torch.full_like(c.steps, self.solver.max_steps)
        return Found(c.best, status, c.best_norm, steps, _count(c.calls + new.calls), ahead=(new.z,))

    def take_rows(self, rows: Tensor) -> _Loop:
        return replace(self, rtol=self.rtol[rows]) if isinstance(self.rtol, Tensor) else self


def _count(calls: int | Tensor) -> Tensor:
    """The number of `calls` as a 0-d tensor, on the CPU unless a graph counts them."""
    return calls if isinstance(calls, Tensor) else torch.tensor(calls, device="cpu")


def last_step(solver: Solver, z: Tensor, r: Tensor, best: Tensor, best_norm: Tensor) -> Found:
    """The result of a fixed number of steps that ended at `z` `(B, n)`, whose residual is `r`.

    Where the residual is not finite, the answer is the `best` iterate before it, whose residual has the norm
    `best_norm` `(B,)`.
    """
    norm = row_norm(r)
    finite = norm < math.inf
    if maybe_any(~finite):
        z, norm = where_rows(finite, z, best), torch.where(finite, norm, best_norm)
    status = coded(finite, Status.MAX_STEPS, Status.NON_FINITE)
    steps = torch.full_like(status, solver.max_steps)
    return Found(z, status, norm, steps, steps.new_zeros(()))


def _without_idle(new: Proposal) -> Proposal:
    """`new` without masks that are seen to be false for all samples, as they are in most steps."""
    if new.singular is not None and on_host(new.singular) and not maybe_any(new.singular):
        new = new._replace(singular=None)
    if new.verdict is not None and on_host(new.verdict) and not maybe_any(~is_running(new.verdict)):
        new = new._replace(verdict=None)
    return new


def _verified(found: Found, residual: Tensor, limit: Tensor, scale: Tensor) -> Found:
    """`found` with its true residual; where the recurrence has drifted away from it, it has not converged."""
    drifted = (found.status == int(Status.CONVERGED)) & ~(residual <= limit)
    status = torch.where(drifted, int(Status.STAGNATED), found.status)
    # An answer worse than the zero vector is no solution at all: zero replaces it.
    hopeless = residual > 2 * scale
    z, residual = where_rows(hopeless, torch.zeros_like(found.z), found.z), torch.where(hopeless, scale, residual)
    return found._replace(z=z, status=status, residual=residual, evaluations=found.evaluations + 1)


def _reason(norm: Tensor, converged: Tensor | None, blow_up: Tensor, new: Proposal) -> Tensor:
    """Why samples stop, as `(B,)` codes of `Status`."""
    reason = coded(norm > blow_up, Status.DIVERGED, Status.STAGNATED)
    if new.singular is not None:
        reason = coded(new.singular, Status.SINGULAR, reason)
    reason = coded(norm < math.inf, reason, Status.NON_FINITE)
    if new.verdict is not None:
        reason = torch.where(is_running(new.verdict), reason, new.verdict)
    return reason if converged is None else coded(converged, Status.CONVERGED, reason)


def coded(mask: Tensor, yes: Tensor | Status, no: Tensor | Status) -> Tensor:
    """`torch.where` of codes `(B,)` int64, kept as tensors: numbers would be sent to an accelerator anew."""
    here: Callable[[Status], Any] = int if torch.compiler.is_dynamo_compiling() else partial(_code, mask.device)
    first, second = (here(x) if isinstance(x, Status) else x for x in (yes, no))
    return torch.where(mask, first, second)


@remembered(64)
def _code(device: torch.device, status: Status) -> Tensor:
    return torch.tensor(int(status), device=device)


def repeat(
    body: Callable[[int | Tensor, Any], Any],
    carry: Any,
    going: Callable[[Any], bool | Tensor],
    limit: int | Tensor,
    k: int | Tensor = 0,
    unrolled: bool = False,
) -> tuple[int | Tensor, Any]:
    """Repeat `carry = body(k, carry)` while `going(carry)` (0-d bool) and `k < limit`; returns `(k, carry)`.

    Traced by `torch.compile` this is one `while_loop` graph or, if `unrolled`, `limit` steps one after the other,
    through which autograd can differentiate; otherwise it is a Python loop.
    """
    if unrolled:
        for k in range(limit):
            carry = body(k, carry)
        return limit, carry
    if torch.compiler.is_dynamo_compiling():
        flat, spec = pytree.tree_flatten(carry)
        start = torch.full((), 0, dtype=torch.int64, device=flat[0].device) + k

        def go_on(k: Tensor, *flat: Tensor) -> Any:
            return (k < limit) & going(pytree.tree_unflatten(list(flat), spec))

        def step(k: Tensor, *flat: Tensor) -> tuple[Tensor, ...]:
            new = pytree.tree_leaves(body(k, pytree.tree_unflatten(list(flat), spec)))
            # Outputs may not alias inputs, and must keep their strides and dtypes.
            return (k + 1, *[n.clone() if any([n is o for o in flat]) else n for n in new])  # noqa: C419

        k, *flat = while_loop(go_on, step, (start, *(t.clone() for t in flat)))
        return k, pytree.tree_unflatten(flat, spec)
    while k < limit and _may_go_on(k, going(carry)):
        carry = body(k, carry)
        k += 1
    return k, carry


def _may_go_on(k: int | Tensor, answer: bool | Tensor) -> bool:
    """Whether to take step `k`: the `answer`, or True where asking an accelerator is not due."""
    if isinstance(answer, bool):
        return answer
    return not _is_due(k, answer) or bool(unwrapped(answer).any())


def _is_due(k: int | Tensor, answer: Tensor) -> bool:
    """Whether to look at an `answer` after `k` steps: always on a CPU, less and less often on an accelerator."""
    return is_cpu(answer) or bool(k % 2 ** int(math.log2(max(1, LATE * k))) == 0)


def where_rows(mask: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """Rows of `new` where `mask` `(B,)`, else rows of `old`."""
    return torch.where(mask.unsqueeze(1), new, old)


def _running(carry: _Carry) -> Tensor:
    if carry.status is None:
        return torch.ones_like(carry.steps, dtype=torch.bool)
    return is_running(carry.status)


def _take_rows(carry: _Carry, rows: Tensor) -> _Carry:
    return pytree.tree_map_only(Tensor, lambda t: t.index_select(0, rows) if t.ndim else t, carry)


def _with_rows(whole: Found, rows: Tensor, part: Found) -> Found:
    """`whole` with `part` in place of its `rows`; counts, which are 0-d, are those of `part`."""

    def put(w: Any, p: Any) -> Any:
        return _as_wide(w, p).index_copy(0, rows, p) if isinstance(w, Tensor) and w.ndim else p

    return pytree.tree_map(put, whole, part)


def _as_wide(whole: Tensor, part: Tensor) -> Tensor:
    """`whole` padded with zeros to the size of `part`, whose history may have grown."""
    missing = [p - w for w, p in zip(whole.shape[1:], part.shape[1:])]
    return (
        torch.nn.functional.pad(whole, [n for m in reversed(missing) for n in (0, m)]) if any(missing) else whole
    )
