"""`ddeint`: delay differential equations, solved by the method of steps.

Over an interval no longer than the shortest lag, all past states that f needs are already known, so the delay
equation is an ordinary one there. The solve is a chain of such ordinary solves. Each link takes the dense output
of earlier links as an argument, so that derivatives pass back along the chain automatically, with any adjoint.

Bellen and Zennaro, "Numerical Methods for Delay Differential Equations", 2003, chapters 2 to 4.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from implicitly.checks import NUMBERS
from implicitly.graph_break import one_break
from implicitly.host import to_host
from implicitly.implicit import Opaque
from implicitly.ode.adjoints import RecursiveCheckpointAdjoint, TrajectoryAdjoint, solve_unrolled
from implicitly.ode.integrate import Integrated, integrate
from implicitly.ode.method import Method
from implicitly.ode.piecewise import KnotRecorder, Piecewise, knots
from implicitly.ode.problem import Problem, series_of, times_of
from implicitly.ode.record import Taken
from implicitly.ode.runge_kutta import Dopri5
from implicitly.ode.solve import Trajectory, check_choices, each_in_turn, tell
from implicitly.ode.stiffness import Halt
from implicitly.ode.work import Report, Work
from implicitly.solution import Status, is_success
from implicitly.transforms import full_precision, is_cpu, unhooked
from implicitly.tree import Layout
from implicitly.unrolled import UnrolledAdjoint

# Times that differ by no more than this many units of rounding count as equal.
SAME = 64
# At most this many jumps of derivatives are tracked, those of the lowest derivatives first.
JUMPS = 1000


@one_break
def ddeint(
    f: Callable[..., Any],
    history: Any,
    t: Any,
    *args: Any,
    lags: Any,
    solver: Method = Dopri5(),
    adjoint: TrajectoryAdjoint | UnrolledAdjoint = RecursiveCheckpointAdjoint(),
    batch_dims: int = 0,
    in_dims: Any = None,
    on_failure: str = "raise",
) -> Trajectory:
    """Solve the delay equation dy/dt = f(t, y(t), (y(t - lag) for each lag), *args), differentiably.

    Derivatives of the solution jump where a lag, or a sum of lags, has passed since `t[0]`. Steps end at these
    times, as far as the jumps matter for a method of this order. Past states come from the dense output of earlier
    steps. Steps adapt to the tolerances as in `odeint`, and none is longer than the shortest lag.

    Args:
        f: `f(t, y, delayed, *args)` returns dy/dt: the pytree, shapes and dtypes of y. `delayed` is a tuple with a
            state like y for each lag. Gradients reach the tensors of `args` and the parameters of every module
            that f or history is, is bound to or closes over.
        history: y up to `t[0]`: a tensor or pytree of tensors if it was constant, otherwise a function
            `history(t, *args)`. With `batch_dims=1` its t is 0-d for the start, else of shape `(B, 1, ..., 1)`.
        t: the output times `(T,)`, increasing: a tensor, an array or numbers. `t[0]` is where history ends.
        lags: a tuple of positive numbers or of 0-d tensors, or a tensor `(m,)`; gradients reach tensors.
        solver: a method such as `Dopri5(rtol=1e-5, atol=1e-7)`; `dt=h` makes constant steps, except those that
            end where a lag ends. `max_steps` applies to each stretch of one lag.
        adjoint: `RecursiveCheckpointAdjoint`, `BacksolveAdjoint` or `UnrolledAdjoint`. Later slopes depend on all
            earlier steps, so with any adjoint memory grows with the number of steps.
        batch_dims: 0: y is one system, and t reaches f as a 0-d tensor. 1: dimension 0 holds independent samples,
            each with its own steps, and t reaches f with the shape `(B, 1, ..., 1)`. Samples share the lags.
        in_dims: which of `args` have one entry per sample, as in `torch.vmap`: an int or None for all, or a tuple
            with one (or a pytree of them) for each. If given, finished samples are dropped from the calls of f.
        on_failure: "raise", "warn" or "ignore" when samples do not reach the end. Their outputs beyond the time
            they reached are NaN, their gradients zero. Without `in_dims`, gradients by args at which f is NaN for
            a failed sample can become NaN; a `ConvergenceWarning` says so unless "ignore".

    Returns:
        `Trajectory`, as from `odeint`; `interpolate` reads the stored dense output, without calling f.

    Raises:
        TypeError, ValueError: for invalid input, before any step; also under `torch.vmap`: use `batch_dims=1`
            instead, which gives each sample its own steps.
        SolverError: a sample did not reach the end and `on_failure="raise"`; carries the `Trajectory`.

    Source: Bellen and Zennaro, "Numerical Methods for Delay Differential Equations", 2003; Hairer, Norsett and
    Wanner, "Solving ODEs I", 1993, section II.17.
    """
    check_choices(solver, adjoint, on_failure, (), False)
    delayed = Delayed.of(f, history, t, args, lags, batch_dims, in_dims, solver)
    chain = Chain(delayed, solver, adjoint, on_failure)
    for begin, end in itertools.pairwise(delayed.bounds(solver)):
        chain.go_on(begin, end)
    return chain.trajectory()


class Link(NamedTuple):
    """One link of the chain: the solution from `begin` to `end`."""

    begin: float
    end: float
    states: Piecewise


@dataclass(frozen=True)
class Delayed:
    """A delay equation whose input has been checked.

    Attributes:
        history: the history as a function; None if it is the constant `before`.
        times: `(T,)`.
        lags: `(m,)`.
        dims: which of `args` have one entry per sample; None: not known.
        y0: the initial state.
        degree: the degree of the dense output.
    """

    f: Callable[..., Any]
    history: Callable[..., Any] | None
    before: Any
    times: Tensor
    lags: Tensor
    args: tuple[Any, ...]
    dims: tuple[Any, ...] | None
    y0: Any
    layout: Layout
    degree: int

    @classmethod
    def of(
        cls,
        f: Any,
        history: Any,
        t: Any,
        args: tuple[Any, ...],
        lags: Any,
        batch_dims: int,
        in_dims: Any,
        solver: Method,
    ) -> Delayed:
        """Check the arguments of `ddeint`; raises TypeError / ValueError."""
        if not callable(f):
            raise TypeError(f"f must be callable, got a {type(f).__name__}")
        given = callable(history)
        first = _first(t) if given else None
        y0 = history if first is None else history(first, *args)
        layout = Layout.of(y0, batch_dims, "history")
        rows, _ = series_of(t, layout)
        if first is not None and first.dtype != rows.dtype:  # evaluate at t[0] as rounded to the right dtype
            y0 = history(rows[0, 0], *args)
            layout = Layout.of(y0, batch_dims, "history")
        if isinstance(t, Tensor) and t.ndim != 1:
            raise ValueError(f"t must have the shape (T,), as samples share the lags, got {tuple(t.shape)}")
        if _number(rows[0, 1] - rows[0, 0]) < 0:
            raise ValueError(
                "t must increase: history gives y before t[0], so the solve goes forward in time only"
            )
        moves, before, dims = (history, None, None) if given else (None, history, None)
        if batch_dims:
            dims = _dims_of(in_dims, args)
        elif in_dims is not None:
            raise ValueError(
                "in_dims says which args have one entry per sample, but batch_dims=0 means one system; leave "
                "in_dims out"
            )
        found = cls(f, moves, before, rows[0], _lags_of(lags, layout), args, dims, y0, layout, solver.degree)
        if given:
            ones = (layout.batch, *(1,) * len(layout.leaves[0].shape)) if batch_dims else ()
            layout.check(history((rows[0, 0] - found.lags[0]).expand(ones), *args), "its start", "history")
        return found

    @property
    def same(self) -> float:
        """The distance up to which two times count as equal."""
        most = max(abs(_number(x)) for x in (self.times[0], self.times[-1]))
        return SAME * torch.finfo(self.times.dtype).eps * most

    def stated(self, y: Any, begin: Tensor, end: Tensor, links: Sequence[Link], recording: bool) -> Problem:
        """The ordinary differential equation from y at `begin` to the `end`, where the needed past is known."""
        first, a, b = (_number(x) for x in (self.times[0], begin, end))
        windows = []
        for lag in map(_number, self.lags):
            known = [x.states for x in links if x.end > a - lag + self.same and x.begin < b - lag - self.same]
            windows.append(Piecewise.joined(known) if b - lag > first + self.same else None)
        f = partial(_slope, self.f, self.history, self.degree)
        args = (self.lags, self.before, tuple(windows), *self.args)
        dims = None if self.dims is None else (None, 0, 1, *self.dims)
        span, batch_dims = torch.stack([begin, end]), self.layout.batch_dims
        return Problem.of(f, y, span, args, batch_dims=batch_dims, in_dims=dims, recording=recording)

    def bounds(self, solver: Method) -> list[Tensor]:
        """The times, 0-d, at which links begin and end: all jumps of derivatives, at most the shortest lag apart.

        Raises ValueError if there would be too many.
        """
        span = _number(self.times[-1] - self.times[0])
        lags = np.array([_number(x) for x in self.lags])
        shortest, unit = lags.min(), np.eye(len(lags), dtype=int)[lags.argmin()]
        if shortest <= self.same:
            far = max(abs(_number(x)) for x in (self.times[0], self.times[-1]))
            raise ValueError(
                f"a lag of {shortest:g} is too short: for times up to {far:g}, {self.times.dtype} resolves only "
                f"differences above {self.same:.2g}. Measure times from the start, or "
                "pass history, t, lags and the arguments in float64"
            )
        if span / shortest > solver.max_steps:
            raise ValueError(
                f"a lag of {shortest:g} is too short for a solve over {span:g}: no step is longer than the lag, "
                f"so more than max_steps={solver.max_steps} steps are needed. Leave out such short lags, or "
                "raise max_steps"
            )
        counts = [0 * unit]
        for jump in (*_jumps(lags, span - self.same, solver.order), None):
            until = span if jump is None else jump @ lags
            while until - counts[-1] @ lags > shortest + self.same:  # a longer link would need unknown past states
                counts.append(counts[-1] + unit)
            if jump is not None and until - counts[-1] @ lags > self.same:
                counts.append(jump)
        # Sums of products rather than `@`, whose result autocast would round.
        sums = [self.times[0] + (torch.as_tensor(count).to(self.lags) * self.lags).sum() for count in counts[1:]]
        return [self.times[0], *sums, self.times[-1]]


def _first(t: Any) -> Tensor:
    """The time `t[0]`, 0-d, before the dtype of y is known; raises TypeError if `t` holds no times."""
    if isinstance(t, Tensor) and t.ndim and t.numel():
        return t.flatten()[0]
    if isinstance(t, Sequence | np.ndarray) and len(t) and isinstance(t[0], NUMBERS):
        return torch.tensor(float(t[0]), dtype=torch.get_default_dtype())
    if isinstance(t, Sequence) and t and isinstance(t[0], Tensor) and t[0].ndim == 0:
        return t[0]
    raise TypeError(f"t must be a tensor (T,) or a sequence of times, got {t!r}")


def _seen(x: Tensor) -> np.ndarray:
    """The numbers of `x` as an array; waits for the accelerator."""
    seen = to_host(x.cpu())
    assert isinstance(seen, np.ndarray)
    return seen


def _number(x: Tensor) -> float:
    return float(_seen(x))


def _lags_of(lags: Any, layout: Layout) -> Tensor:
    """`lags` as a tensor `(m,)`; raises TypeError / ValueError for invalid lags."""
    if not isinstance(lags, Tensor | tuple | list):
        raise TypeError(f"lags must be a tuple of numbers or a tensor (m,), got a {type(lags).__name__}")
    if not isinstance(lags, Tensor):
        wrong = [x for x in lags if not isinstance(x, (*NUMBERS, Tensor))]
        if wrong:
            raise TypeError(f"lags must hold numbers or 0-d tensors, got a {type(wrong[0]).__name__}")
        like = {"dtype": layout.work_dtype, "device": layout.device}
        each = [x if isinstance(x, Tensor) else torch.tensor(x, **like) for x in lags]
        if any(x.ndim for x in each):
            raise ValueError(
                f"each lag must be a number or a 0-d tensor, got the shapes {[tuple(x.shape) for x in each]}"
            )
        lags = torch.stack(each) if each else torch.zeros(0, **like)
    if lags.ndim != 1 or len(lags) == 0:
        raise ValueError(f"lags must be a tensor of shape (m,) with m >= 1, got the shape {tuple(lags.shape)}")
    if lags.dtype != layout.work_dtype or lags.device != layout.device:
        raise ValueError(
            f"lags are {lags.dtype} on {lags.device}, but history needs {layout.work_dtype} on {layout.device}"
        )
    seen = _seen(lags)
    if not ((seen > 0) & np.isfinite(seen)).all():
        raise ValueError(f"lags must be finite and > 0, got {seen.tolist()}")
    return lags


def _dims_of(in_dims: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """`in_dims` as one entry for each of `args`; None if they are not known."""
    if in_dims is None and any(isinstance(x, Tensor) for x in pytree.tree_leaves(args)):
        return None
    dims = tuple(in_dims) if isinstance(in_dims, tuple | list) else (in_dims,) * len(args)
    if len(dims) != len(args):
        raise ValueError(f"in_dims={in_dims!r} has {len(dims)} entries, but f gets {len(args)} args after delayed")
    return dims


def _jumps(lags: np.ndarray, span: float, order: int) -> Iterator[np.ndarray]:
    """The times within `span` at which a derivative up to the `order` jumps, as multiples `(m,)` of the `lags`.

    After k lags, the derivative of order k + 1 jumps; jumps beyond the order do not affect the method.
    """
    m = len(lags)
    levels = [k for k in range(1, order + 1) if math.comb(m + k, k) <= JUMPS]
    found = []
    for level in levels or [1]:
        for chosen in itertools.combinations_with_replacement(range(m), level):
            count = np.bincount(chosen, minlength=m)
            if count @ lags < span:
                found.append(count)
    return iter(sorted(found, key=lambda count: count @ lags))


def _slope(
    f: Callable[..., Any],
    history: Callable[..., Any] | None,
    degree: int,
    t: Tensor,
    y: Any,
    lags: Tensor,
    before: Any,
    windows: tuple[Piecewise | None, ...],
    *args: Any,
) -> Any:
    """dy/dt of the ordinary equation on one link.

    The delayed state for each lag comes from a window of the solution, or from the history if there is none yet.
    """
    delayed = []
    for lag, window in zip(lags.unbind(), windows):
        if window is not None:
            past = window.at((t - lag).reshape(1, *window.times.shape[1:]), degree)
            delayed.append(pytree.tree_map(lambda x: x[0], past))
        else:
            delayed.append(before if history is None else history(t - lag, *args))
    return f(t, y, tuple(delayed), *args)


@dataclass
class Chain:
    """A solve of a delay equation, link by link."""

    delayed: Delayed
    solver: Method
    adjoint: TrajectoryAdjoint | UnrolledAdjoint
    on_failure: str
    links: list[Link] = field(default_factory=list)
    found: Integrated | None = None  # the result over all links, with the outputs of the last one
    calls: int = 0
    y: Any = None

    def go_on(self, begin: Tensor, end: Tensor) -> None:
        """Solve the link from `begin` to `end`, unless all samples have failed."""
        delayed = self.delayed
        if self.found is not None and not _seen(self.ended).any():
            return
        recording = self.adjoint.recording
        y = delayed.y0 if self.found is None else self.y
        problem = delayed.stated(y, begin, end, self.links, recording)
        problem = replace(problem, warns=self.on_failure == "warn")
        with full_precision(delayed.layout.device.type):  # f itself keeps the autocast it was called under
            self._solve(problem, begin, end)

    def _solve(self, problem: Problem, begin: Tensor, end: Tensor) -> None:
        """Solve the `problem` of the link from `begin` to `end`, and store the result."""
        solver = self._method(begin, end)
        solver.check(problem)
        problem = solver.checked(problem)
        heard: list[Halt] = []  # emptied below, to break the reference cycle: a `Halt` refers to its solve
        problem, found, calls = self._solved(solver, problem, lambda *ended: heard.append(ended[2]))
        self.calls += calls + problem.calls
        told = self._noted(found)
        self._go_from(problem, found.values, begin, end)
        if heard:
            tell("ddeint", self.on_failure, self.solver, told, heard.pop(), self.trajectory)

    @property
    def ended(self) -> Tensor:
        """Which samples `(B,)` have not failed so far."""
        assert self.found is not None
        return self.found.status == int(Status.CONVERGED)

    def _method(self, begin: Tensor, end: Tensor) -> Method:
        """The solver of one link; its progress is that of the whole solve, and only the first link uses `dt0`."""
        solver, told = self.solver, self.solver.progress
        if told is not None:
            first, last = (_number(x) for x in (self.delayed.times[0], self.delayed.times[-1]))
            base, share = (_number(begin) - first) / (last - first), _number(end - begin) / (last - first)
            solver = replace(solver, progress=lambda part: told(base + share * part))
        return solver if not self.links or solver.dt0 is None else replace(solver, dt0=None)

    def _solved(self, solver: Method, problem: Problem, report: Report) -> tuple[Problem, Integrated, int]:
        """The `problem` with output times at the knots of its steps, the result there, and the calls of f.

        The steps, and so the knots, are known only after a solve. `RecursiveCheckpointAdjoint`, which replays
        recorded steps, takes its values from that solve; the other adjoints solve once more.
        """
        adjoint, span, degree = self.adjoint, problem.rows(problem.times), self.delayed.degree
        exact = isinstance(adjoint, RecursiveCheckpointAdjoint)
        work = (adjoint if exact else RecursiveCheckpointAdjoint()).work(solver, problem, report)
        nodes = KnotRecorder(degree, len(problem.y0))
        steps = _Steps.apply(work, nodes, span, problem.y0, problem.k0, *problem.theta)
        begin, end = span[:, :1], span[:, -1:]
        known = torch.from_numpy(knots(Taken(*map(_seen, steps)), _seen(span), degree)).to(span)
        seen, with_begin, with_end = known.unbind(2)
        moved = with_begin * (begin - begin.detach()) + with_end * (end - end.detach())
        problem = replace(problem, times=seen + moved)
        if exact:
            return problem, *adjoint.attached(work, problem)
        solve = solve_unrolled if isinstance(adjoint, UnrolledAdjoint) else adjoint.solve
        found, calls = solve(replace(solver, progress=None), problem, report)
        assert work.known is not None
        return problem, found, calls + work.known[2]

    def _noted(self, found: Integrated) -> Integrated:
        """Merge the result of a link into `found`.

        Returns the state of all samples so far, where those that failed in earlier links (and have been reported)
        count as converged.
        """
        if (before := self.found) is None:
            self.found = found
            return found
        alive = self.ended
        new = {name: torch.where(alive, getattr(found, name), getattr(before, name)) for name in _LAST}
        sums = {name: getattr(before, name) + getattr(found, name) * alive for name in _SUMS}
        self.found = found._replace(**new, **sums)
        return self.found._replace(status=torch.where(alive, found.status, int(Status.CONVERGED)))

    def _go_from(self, problem: Problem, values: Tensor, begin: Tensor, end: Tensor) -> None:
        """Add a link with `values` `(B, K, n)`; the next link starts from the last of them."""
        self.y = pytree.tree_map(lambda x: x[-1], problem.stacked(values))
        at_start = problem.times == problem.times[:, :1]  # no step has outputs at its own start
        if _seen(at_start[:, 1:]).any():
            values = torch.where(at_start.unsqueeze(2), problem.y0.unsqueeze(1), values)
        # NaN in a failed sample must not turn zero cotangents of shared tensors into NaN.
        values = torch.where(self.ended[:, None, None], values, values.detach().nan_to_num(0.0))
        times = problem.times.T if self.delayed.layout.batch_dims else problem.times[0]
        states = Piecewise(times, problem.stacked(values))
        self.links.append(Link(_number(begin), _number(end), states))

    def trajectory(self) -> Trajectory:
        """The `Trajectory` found so far."""
        found, layout = self.found, self.delayed.layout
        assert found is not None
        each, times = layout.per_sample, self.delayed.times
        event_times, event_indices = each_in_turn(found, layout)
        return Trajectory(
            self.at(times),
            each(found.status),
            each(found.error),
            each(found.steps),
            self.calls,
            t=each(torch.where(self.ended, times[-1], found.t.detach())),
            rejected=each(found.tries - found.steps),
            interpolate=self.interpolate,
            event=each(found.event),
            event_count=each(found.event_count),
            event_times=event_times,
            event_indices=event_indices,
        )

    def at(self, t: Tensor) -> Any:
        """The solution at times `(W,)` or `(W, B)`; NaN at times that a sample did not reach."""
        found, layout = self.found, self.delayed.layout
        assert found is not None
        states = Piecewise.joined([link.states for link in self.links])
        rows = t.unsqueeze(1) if t.ndim == 1 else t
        beyond = (rows.detach() > found.t.detach()) & ~self.ended
        shape = (len(t), layout.batch) if layout.batch_dims else (len(t),)
        values = states.at(rows.expand(shape) if layout.batch_dims else t, self.delayed.degree)
        if not _seen(beyond).any():
            return values
        lost = beyond.reshape(shape)
        blank = float("nan")
        return pytree.tree_map(
            lambda x: torch.where(lost.reshape(*shape, *(1,) * (x.ndim - len(shape))), blank, x), values
        )

    def interpolate(self, t: Any) -> Any:
        """The solution at other times, see `Trajectory.interpolate`."""
        delayed = self.delayed
        wanted = times_of(t, delayed.layout)
        seen, first, last = (_seen(x) for x in (wanted, delayed.times[0], delayed.times[-1]))
        if ((seen < first) | (seen > last)).any():
            raise ValueError("interpolate: times must lie between the first and the last one of the solve")
        return self.at(wanted.T if delayed.layout.batch_dims else wanted[0])


# Fields of `Integrated` taken from the last link that a sample reached, and those summed over links.
_LAST = ("status", "error", "t", "length")
_SUMS = ("steps", "tries")


class _Steps(Opaque):
    """The steps of a solve, as `Record.stacked` returns them, without derivatives; the rest is left in `work`."""

    @staticmethod
    @unhooked()
    def forward(work: Work, nodes: KnotRecorder, times: Tensor, y0: Tensor, k0: Tensor, *theta: Tensor) -> Any:
        assert work.record is not None
        stepper = work.stepper(is_cpu(times), times.detach(), *theta)
        found, y, calls = integrate(stepper, y0.detach(), k0, work.record, nodes.listen)
        steps = work.record.stacked(times)
        work.record.note_all(Taken(*(x.T for x in steps)))  # put back, as `stacked` removes them
        accepted = Taken(*steps).accepted.cpu().numpy()
        values = nodes.at_knots(accepted, y, is_success(found.status))
        work.known = found._replace(values=values), y, calls
        return steps

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> Any:
        raise ValueError(
            "ddeint under torch.vmap: the number of steps may differ between the mapped samples. Stack them along "
            "dimension 0, and pass batch_dims=1"
        )
