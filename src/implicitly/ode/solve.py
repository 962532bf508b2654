"""`odeint`: the differentiable solution of an ordinary differential equation."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from implicitly.checks import check_on_failure
from implicitly.compiled import CompileWarning
from implicitly.condition import users_line, warn_of_failure
from implicitly.graph_break import LONGEST, one_break, one_break_unless
from implicitly.host import captured, maybe_any
from implicitly.ode.adjoints import RecursiveCheckpointAdjoint, TrajectoryAdjoint, solve_unrolled
from implicitly.ode.events import Event, events_of
from implicitly.ode.integrate import Integrated
from implicitly.ode.method import Method
from implicitly.ode.problem import Problem, times_of
from implicitly.ode.runge_kutta import Dopri5
from implicitly.ode.stiffness import Halt
from implicitly.ode.unroll import is_unrollable, solve_in_graph
from implicitly.ode.work import silent
from implicitly.solution import Solution, SolverError, Status, is_success
from implicitly.transforms import full_precision, is_tracked, unwrapped, version
from implicitly.tree import Layout
from implicitly.unrolled import UnrolledAdjoint


@dataclass(frozen=True)
class Trajectory(Solution):
    """The result of `odeint`: a `Solution` with what is specific to trajectories.

    Its `residual` is the local error of the last accepted step over the tolerance, in the norm of the method; its
    `steps` are the accepted ones.

    In a model under `torch.compile`, a solve becomes part of the model's graph if it takes at most 100 steps of an
    explicit Runge-Kutta method or `ReversibleHeun` with `dt`, through times given as a tuple of numbers, with
    `RecursiveCheckpointAdjoint` or `UnrolledAdjoint`, and without events. Such a solve has no `interpolate` and
    does not announce failures: `status` shows them, and their gradients are NaN. Other times or another dt make
    another graph. Every other solve is one graph break. A CUDA graph (`torch.cuda.graph`), captured after a solve
    as warm-up, can hold the same solves with the same restrictions; others raise RuntimeError.

    Attributes:
        t: `(B,)` the time that each sample reached, differentiable: that of the event that ended it, or the last.
        rejected: `(B,)` the number of steps that were tried and rejected as too long.
        interpolate: `interpolate(times)` is the solution at other times between the first and the last, in any
            order: of shape `(K, *y0.shape)` for times `(K,)`, or `(B, K)` with `batch_dims=1`. It is
            differentiable like `value`, also with respect to the times. Nothing is stored for it: the steps are
            taken again. A pickled trajectory has no `interpolate` and no gradients.
            f is called in the state it had during the solve: a module that was in training mode is again.
            Raises ValueError if parameters, args, y0, t or other tensors that f uses were changed in place since.
        event: `(B,)` int64, the index of the event that happened last; -1: none.
        event_count: `(B,)` int64, how many events happened.
        event_times: `(K, B)`, or `(K,)` for one system, the times of all events in order, differentiable; K is
            the largest `event_count`, and NaN follows the last event of a sample. For one system,
            `interpolate(event_times)` gives the states at the events, before restarts.
        event_indices: `(K, B)` or `(K,)` int64, the indices of these events; -1: none.
    """

    t: Tensor
    rejected: Tensor
    interpolate: Callable[[Any], Any] = field(repr=False)
    event: Tensor
    event_count: Tensor
    event_times: Tensor
    event_indices: Tensor

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled: the numbers, without their autograd graph and without the f of `interpolate`."""
        state = pytree.tree_map_only(Tensor, torch.detach, dict(vars(self)))
        return state | {"interpolate": _left_behind}

    def __copy__(self) -> Trajectory:
        return replace(self)  # otherwise copy.copy would use __getstate__, which drops graph and interpolate


def is_traceable(
    f: Any,
    y0: Any,
    t: Any,
    *args: Any,
    solver: Any = None,
    adjoint: Any = RecursiveCheckpointAdjoint(),
    event: Any = None,
    compile: bool = False,
    **options: Any,
) -> bool:
    """Whether the solve consists of plain operations, so that a compiled model can include it in its graph."""
    return event is None and not compile and is_unrollable(solver, adjoint, t)


@one_break_unless(is_traceable)
def odeint(
    f: Callable[..., Any],
    y0: Any,
    t: Any,
    *args: Any,
    solver: Method = Dopri5(),
    adjoint: TrajectoryAdjoint | UnrolledAdjoint = RecursiveCheckpointAdjoint(),
    batch_dims: int = 0,
    in_dims: Any = None,
    event: Event | tuple[Event, ...] | None = None,
    on_failure: str = "raise",
    compile: bool = False,
) -> Trajectory:
    """Solve dy/dt = f(t, y, *args), y(t[0]) = y0, and differentiate the solution.

    Args:
        f: `f(t, y, *args)` returns dy/dt, like y. Gradients reach tensors in `args` and parameters of all modules
            that f is, is bound to or closes over. f itself may differentiate by y (`torch.func` or autograd).
        y0: the initial state: a tensor or a pytree of tensors.
        t: the output times, strictly increasing or strictly decreasing: a tensor `(T,)`, an array, or numbers;
            y0 is the state at `t[0]`. With `batch_dims=1` also `(B, T)`: shorter series repeat their last time,
            whose first copy gets the derivatives. In a series of a single time, all outputs are y0.
        solver: a method such as `Dopri5(rtol=1e-5, atol=1e-7)`; `dt=h` makes constant steps.
        adjoint: `RecursiveCheckpointAdjoint`, `BacksolveAdjoint` or `UnrolledAdjoint`.
        batch_dims: 0: y0 is one system, and t reaches f as a 0-d tensor. 1: dimension 0 holds independent
            samples, each with its own steps, and t reaches f with the shape `(B, 1, ..., 1)`.
        in_dims: which of `args` have one entry per sample, as in `torch.vmap`: an int or None for all, or a tuple
            with one (or a pytree of them) for each. If given, finished samples are dropped from the calls of f.
        event: an `Event` or several; each ends a sample, at `t` of the result, or restarts it. Outputs after the
            end are the state there; an output at the time of a restart, up to rounding, is the state before it.
        on_failure: "raise", "warn" or "ignore" when samples do not reach the end. Their outputs beyond the time
            they reached are NaN, their gradients zero. Without `in_dims`, gradients by args at which f is NaN for
            a failed sample can become NaN; a `ConvergenceWarning` says so unless "ignore".
        compile: run the solve as one graph of `torch.compile`, and its backward pass as another; a
            `CompileWarning` says where that is not possible, as with events.

    Returns:
        `Trajectory`: `value` of shape `(T, *y0.shape)`; `status`, `residual`, `steps`, `t`, `rejected` of shape
        `(B,)`, or 0-d for one system. A sample that an event ended has `Status.EVENT`.

    Raises:
        TypeError, ValueError: for invalid input, before any step.
        SolverError: a sample did not reach the end and `on_failure="raise"`; carries the `Trajectory`.

    Source: Hairer, Norsett and Wanner, "Solving ODEs I", 1993; Chen et al., "Neural ODEs", NeurIPS 2018.
    """
    events = events_of(event)
    check_choices(solver, adjoint, on_failure, events, compile)
    inside = captured() and _fits(solver, adjoint, t, bool(events) or compile)
    as_graph = compile and _ungraphed(solver, events) is None
    how = {"batch_dims": batch_dims, "in_dims": in_dims, "recording": inside or adjoint.recording}
    problem = Problem.of(f, y0, t, args, **how, events=events, as_graph=as_graph)
    solver.check(problem)
    problem = solver.checked(problem)
    with full_precision(problem.layout.device.type):  # f itself keeps the autocast it was called under
        if inside:
            # Recomputing operations needs the state of the random number generator, which CUDA graphs ignore.
            forget = torch.compiler.is_dynamo_compiling() and not isinstance(adjoint, UnrolledAdjoint)
            return _trajectory(problem, _not_again, *solve_in_graph(solver, problem, t, forget))
        return _solved(solver, adjoint, problem, on_failure)


def _fits(solver: Method, adjoint: object, t: Any, more: bool) -> bool:
    """True; raises RuntimeError if a CUDA graph cannot hold the steps, or if `more` than steps is asked for."""
    if more or not is_unrollable(solver, adjoint, t):
        raise RuntimeError(
            "odeint: a CUDA graph can hold a trajectory whose steps are known before: of an explicit method or "
            f"ReversibleHeun with dt, at most {LONGEST} of them, through times that are a tuple of numbers, "
            "without events or compile, by RecursiveCheckpointAdjoint or UnrolledAdjoint"
        )
    return True


def _solved(
    solver: Method, adjoint: TrajectoryAdjoint | UnrolledAdjoint, problem: Problem, on_failure: str
) -> Trajectory:
    problem = replace(problem, warns=True) if on_failure == "warn" else problem
    solve = solve_unrolled if isinstance(adjoint, UnrolledAdjoint) else adjoint.solve
    again = partial(_interpolated, problem, lambda problem: solve(solver, problem, silent)[0].values)

    def solution(found: Integrated, calls: int) -> Trajectory:
        # The snapshot of f is taken after the solve, so changes that f itself makes during a solve don't matter.
        interpolate = partial(again, _used(problem), problem.opened.snapshot())
        return _trajectory(problem, interpolate, found, calls)

    def report(method: Method, found: Integrated, halt: Halt, calls: int) -> None:
        tell("odeint", on_failure, method, found, halt, lambda: solution(found, calls))

    return solution(*solve(solver, problem, report))


def _trajectory(problem: Problem, interpolate: Callable[[Any], Any], found: Integrated, calls: int) -> Trajectory:
    many = len(found.status) != problem.layout.batch
    problem = _of_mapped(problem, len(found.status)) if many else problem
    each = problem.layout.per_sample
    reached = found.t if problem.events else found.t.detach()
    moving = not many and (torch.compiler.is_dynamo_compiling() or is_tracked(problem.times))
    if moving and not problem.events:  # where the end was reached, this time moves with the end
        whole = found.status.detach() == int(Status.CONVERGED)
        reached = torch.where(whole, problem.rows(problem.times)[:, -1], reached)
    event_times, event_indices = each_in_turn(found, problem.layout)
    return Trajectory(
        problem.asked(found.values),
        each(found.status),
        each(found.error),
        each(found.steps),
        calls + problem.calls,
        t=each(reached),
        rejected=each(found.tries - found.steps),
        interpolate=interpolate,
        event=each(found.event),
        event_count=each(found.event_count),
        event_times=event_times,
        event_indices=event_indices,
    )


def _of_mapped(problem: Problem, rows: int) -> Problem:
    """The `problem` with all `rows` that `vmap` makes of it, for the solution that an error carries."""
    layout, places = problem.layout, problem.places
    times = rows // max(1, layout.batch)
    places = None if places is None else places.repeat(times, 1)
    return replace(problem, layout=replace(layout, batch=rows, batch_dims=1), places=places)


def each_in_turn(found: Integrated, layout: Layout) -> tuple[Tensor, Tensor]:
    """The times and indices of events as users see them: `(K, B)`, or `(K,)` of one system."""
    times, indices = found.event_times, found.event_indices
    if times is None or indices is None:
        shape = (0, len(found.t)) if layout.batch_dims else (0,)
        return found.t.new_empty(shape), found.event.new_empty(shape)
    return (times.T, indices.T) if layout.batch_dims else (times[0], indices[0])


# A tensor that a solve depends on: its description, the tensor, and its version (counts in-place changes).
Used = tuple[str, Tensor, int]


@one_break
def _interpolated(
    problem: Problem,
    solve: Callable[[Problem], Tensor],
    used: list[Used],
    as_then: Callable[[], AbstractContextManager[None]],
    t: Any,
) -> Any:
    """The solution at times t, found by taking the steps of the solve again with outputs there."""
    _check_unchanged(used)
    wanted = times_of(t, problem.layout)
    begin, end = problem.times[:, :1], problem.times[:, -1:]
    sign = (end - begin).detach().sign()
    outside = (wanted < torch.minimum(begin, end)) | (wanted > torch.maximum(begin, end))
    if maybe_any(outside.any(1)) and bool(unwrapped(outside).any()):
        raise ValueError("interpolate: times must lie between the first and the last one of the solve")
    order = (sign * wanted.detach()).argsort(dim=1)
    times = wanted.expand(order.shape[0], -1).gather(1, order)
    rows = max(len(times), len(begin))
    # No step covers the start itself; an output right behind it supplies the derivatives of the solution there.
    at_start, behind = times == begin, torch.where(times == begin, _behind(begin, end), 0.0)
    asked = torch.cat([begin.expand(rows, 1), (times + behind).expand(rows, -1), end.expand(rows, 1)], dim=1)
    # Eagerly, since otherwise each number of times would need a graph of its own.
    with as_then(), full_precision(problem.layout.device.type):
        values = solve(replace(problem, times=asked, key=None))[:, 1:-1]
    if maybe_any(at_start):
        values = torch.where(at_start.unsqueeze(2), _moved_to(problem.y0.unsqueeze(1), values), values)
    back = order.argsort(dim=1).expand(len(values), -1).unsqueeze(2).expand_as(values)
    return problem.stacked(values.gather(1, back))


def _used(problem: Problem) -> list[Used]:
    """The tensors that a solve depended on, except those that f itself changes."""
    opened, theta = problem.opened, problem.theta
    kinds = ["a tensor of args"] * (len(theta) - len(opened.parameters)) + ["a parameter"] * len(opened.parameters)
    given = zip(("t", "y0", *kinds), (problem.times, problem.y0, *theta))
    own = [(f"'{name}'", x, was) for name, x, was in opened.constants if version(x) == was]
    return [*((kind, x, version(x)) for kind, x in given), *own]


def _check_unchanged(used: list[Used]) -> None:
    """Raise ValueError if a tensor that the solve depends on has changed since."""
    for name, x, was in used:
        if version(x) != was:
            which = name if name in ("t", "y0") else f"{name} of shape {tuple(x.shape)}"
            raise ValueError(
                f"interpolate recomputes the steps of the solve, but {which} was changed in place since the "
                "solve. Call interpolate before the change, such as the step of an optimiser, or solve again"
            )


def _behind(begin: Tensor, end: Tensor) -> Tensor:
    """The signed distance `(B, 1)` from `begin` to a time right behind it, about the next representable one."""
    begin, span, known = begin.detach(), (end - begin).detach(), torch.finfo(begin.dtype)
    return span.sign() * torch.minimum((known.eps * begin.abs()).clamp(min=known.tiny), span.abs())


def _moved_to(y0: Tensor, values: Tensor) -> Tensor:
    """`y0` `(B, 1, n)` with the derivative of `values` `(B, K, n)`; plain `y0` where those are not finite."""
    return torch.where(values.isfinite(), y0.detach() + (values - values.detach()), y0)


def _left_behind(t: Any) -> Any:
    """The `interpolate` of a trajectory that was pickled."""
    raise RuntimeError(
        "interpolate recomputes the steps of the solve, but f is not pickled with a Trajectory; call interpolate "
        "before pickling, or pass these times in t"
    )


def _not_again(t: Any) -> Any:
    """The `interpolate` of a solve inside a graph, which leaves nothing but its outputs."""
    raise ValueError(
        "interpolate recomputes the steps of the solve, which is not possible inside torch.compile; pass these "
        "times in t"
    )


_REMEDY = {
    Status.MAX_STEPS: "raise max_steps, or loosen rtol and atol",
    Status.STEP_UNDERFLOW: "loosen the tolerances or use a wider dtype; the solution may blow up there, or f "
    "may be discontinuous",
    Status.NON_FINITE: "check f, or g of an event, there: it returned NaN or inf, however short the step",
}


# Steps longer than this fraction of the stability limit count as limited by stability.
NEAR = 0.5
# The relative error that a length in float32 may have.
ROUNDING = 1e-6


def _remedy(method: Method, status: Status, length: float, halt: Halt, row: int) -> str:
    """What to suggest to the user, given where sample `row` ended."""
    remedy, limit = _REMEDY[status], method.stability
    if status is Status.STEP_UNDERFLOW and length <= method.dt_min * (1 + ROUNDING):
        return (
            f"a dt_min below {method.dt_min:g}, as the tolerances need shorter steps there; or looser tolerances"
        )
    constant = status is Status.NON_FINITE and method.dt is not None
    if constant:
        remedy = "a shorter dt, or no dt if the method has adaptive steps; f may also be NaN or inf there"
    if not (status is Status.MAX_STEPS or constant) or limit == float("inf"):
        return remedy
    rate = None if limit is None else halt.rate(row)
    if limit is None or rate is None:
        return f"{remedy}; where the system is stiff, use im.Kvaerno5()"
    if length * rate < NEAR * limit:
        return remedy
    shorter = f", or dt below {limit / rate:.2g}" if constant else ""
    return (
        f"im.Kvaerno5(){shorter}. The system is stiff there: its fastest rate times the step is "
        f"{length * rate:.3g}, and {type(method).__name__} is stable up to {limit:.3g} only. Else: {remedy}"
    )


def tell(
    solve: str,
    on_failure: str,
    method: Method,
    found: Integrated,
    halt: Halt,
    solution: Callable[[], Trajectory],
) -> None:
    """Announce samples that did not reach the end of a `solve`: raise with the `solution`, warn, or do nothing."""
    if on_failure == "ignore" or not maybe_any(found.status != int(Status.CONVERGED)):  # one operation, usually
        return
    found = Integrated(*(unwrapped(x.detach()) for x in found.usual))
    failed = (~is_success(found.status)).nonzero()[:, 0]
    if len(failed) == 0:
        return
    counts = {s: int((found.status[failed] == s).sum()) for s in _REMEDY}
    i = int(failed[0])
    status = Status(int(found.status[i]))
    remedy, events = _remedy(method, status, float(found.length[i]), halt, i), int(found.event_count[i])
    if events:
        remedy = (
            f"{events} events happened before, the last one event {int(found.event[i])}; where their times "
            f"accumulate, end the sample with an event without restart. Or {remedy}"
        )
    elif status is Status.STEP_UNDERFLOW and int(found.steps[i]) == 0 and float(found.t[i]) != 0:
        remedy += (
            f". In {found.t.dtype}, times there resolve no steps shorter than {float(found.length[i]):.2g}: where "
            "that is too long, measure times from the start"
        )
    component = halt.component(method, i, status)
    message = (
        f"{solve}: {type(method).__name__} did not reach the end for {len(failed)} of {len(found.status)} samples "
        f"({', '.join(f'{count} {s.name}' for s, count in counts.items() if count)}). Sample {i}: {status.name} "
        f"at t = {float(found.t[i]):.6g} after {int(found.steps[i])} steps ({int(found.tries[i])} tried), next "
        f"step {float(found.length[i]):.3g}{', ' + component if component else ''}. Try: {remedy}"
    )
    if on_failure == "raise":
        raise SolverError(message, solution())
    warn_of_failure(message, solve, repr(method), int(status))


def check_choices(solver: Any, adjoint: Any, on_failure: str, events: tuple[Event, ...], compile: bool) -> None:
    """Raise TypeError / ValueError for invalid options, or options that do not go together."""
    if not isinstance(solver, Method):
        raise TypeError(f"solver must be a method such as im.Dopri5(), got {solver!r}")
    if not isinstance(adjoint, TrajectoryAdjoint | UnrolledAdjoint):
        raise TypeError(
            f"adjoint must be one for trajectories, such as im.RecursiveCheckpointAdjoint(), got {adjoint!r}"
        )
    if (events or solver.tstops) and not (isinstance(adjoint, UnrolledAdjoint) or adjoint.hybrid):
        raise ValueError(
            f"{type(adjoint).__name__} does not support events or tstops; use im.RecursiveCheckpointAdjoint()"
        )
    if compile and isinstance(adjoint, UnrolledAdjoint):
        raise ValueError(
            "UnrolledAdjoint needs autograd to record the solve, which compile=True does not allow: use "
            "im.RecursiveCheckpointAdjoint(), or compile=False"
        )
    if compile and (what := _ungraphed(solver, events)) is not None:
        message = f"odeint: compile=True is not supported for {what}; the eager loop runs instead"
        warnings.warn(message, CompileWarning, stacklevel=users_line())
    check_on_failure(on_failure)


def _ungraphed(solver: Method, events: tuple[Event, ...]) -> str | None:
    """The feature of this solve that cannot be compiled into a graph; None if there is none."""
    return "events" if events else solver.ungraphed
