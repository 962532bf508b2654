"""The continuous adjoint: the derivative of a trajectory from a second ODE, solved backwards in time."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor

from implicitly.checks import NUMBERS, check_kind
from implicitly.compiled import CompileWarning, run_as_graph
from implicitly.condition import users_line, warn_of_failure
from implicitly.host import Array, on_host, to_host, to_tensor
from implicitly.ode.adjoints import TrajectoryAdjoint
from implicitly.ode.augmented import Packed, QuadratureNodes, augmented, integrated
from implicitly.ode.graph_backsolve import Arrived, Back
from implicitly.ode.integrate import USUAL, Bound, Ended, Integrated, Stepper, march
from implicitly.ode.method import Method, Step
from implicitly.ode.problem import Problem
from implicitly.ode.record import Record, Taken
from implicitly.ode.replay import finite_start, stand_ins
from implicitly.ode.work import Report, Work, silent, stays
from implicitly.pullback import pulled
from implicitly.solution import Status
from implicitly.transforms import Operation, asked, full_precision, is_wrapped, one_by_one, unhooked
from implicitly.tree import real_parts

# With the forward method, a backward solve may try LEAST_TRIES steps plus TRIES for each that the forward solve
# tried. If it needs more, the reverse system is stiff, and taking the forward steps again costs less. LEAST_TRIES
# leaves room where the forward solve took a few steps only.
LEAST_TRIES, TRIES = 100, 10


@dataclass(frozen=True)
class BacksolveAdjoint(TrajectoryAdjoint):
    """The continuous adjoint (optimise-then-discretise): constant memory, a gradient accurate to the tolerances.

    With a = dL/dy, the system (y, a)' = (f, -a df/dy) is solved backwards, from the last output time to the first;
    the gradient with respect to the tensors that f depends on is the integral of a df/dtheta. At every output time
    the cotangent of that output is added to a, and y is reset to the output that the forward solve found. That
    costs no memory beyond the outputs, and keeps the error of y from growing. a is divided by its largest entry,
    so the tolerances mean the same whatever the scale of the loss.

    Components that decay forwards grow backwards. So at each output time but the last, y is compared with the
    output there; if only the end points are asked for, that is y0. If y is too far off, or if the backward solve
    fails or takes many times the steps of the forward one, a `ConvergenceWarning` says so, and the gradient is
    that of `RecursiveCheckpointAdjoint(arc_length=True)`, from a second forward solve.

    First derivatives in reverse mode only: second derivatives, forward mode and `torch.func` transforms raise
    NotImplementedError.

    Args:
        solver: the method, with its tolerances, of the backward solve; None: that of the forward one.
        seminorm: True: the gradients with respect to args and parameters are left out of the error control. They
            are integrals that no other component depends on. They are computed over every accepted step: for one
            system and an explicit Runge-Kutta method with its own weights, otherwise by Gauss' rule on the dense
            output. False: they are components of the state and take part in the error control, so all samples
            take the same backward steps and cannot have times of their own.
        check: by how many tolerances (in the root mean square, or the `norm` of the solver) the y solved
            backwards may be off at an output time; inf: any. The tolerances are the solver's `rtol` and `atol`,
            also when it has `dt`. Errors of many steps add up to more than one tolerance, while an unstable
            reverse system soon exceeds any bound; a smaller value detects it earlier, but falls back to the
            second forward solve more often.
        listen: a function that receives the number of calls of f in a compiled backward solve, where f cannot
            count them itself.

    Raises:
        TypeError, ValueError: for invalid options.

    Source: Pontryagin et al., "The Mathematical Theory of Optimal Processes", 1962; Chen et al., "Neural Ordinary
    Differential Equations", NeurIPS 2018, algorithms 1 and 2; Kidger, Chen and Lyons, "Hey, that's not an ODE",
    ICML 2021, for the seminorm.
    """

    solver: Method | None = None
    seminorm: bool = True
    check: float = 1e3
    listen: Callable[[int], None] | None = None

    def __post_init__(self):
        if self.solver is not None and not isinstance(self.solver, Method):
            raise TypeError(
                f"BacksolveAdjoint: solver must be a method such as im.Dopri5(), or None, got {self.solver!r}"
            )
        if not isinstance(self.seminorm, bool):
            raise TypeError(f"BacksolveAdjoint: seminorm must be True or False, got {self.seminorm!r}")
        check_kind("BacksolveAdjoint", "check", self.check, NUMBERS, "a number, got {value!r}")
        if self.listen is not None and not callable(self.listen):
            raise TypeError(f"BacksolveAdjoint: listen must be a function of one number, got {self.listen!r}")
        if not self.check > 0:
            raise ValueError(f"BacksolveAdjoint: check must be > 0 (inf: no check), got {self.check}")

    def solve(self, method: Method, problem: Problem, report: Report) -> tuple[Integrated, int]:
        """The trajectory, with differentiable `values`, and the number of calls of f."""
        if self.solver is not None:
            self.solver.check(problem)
            problem = self.solver.checked(problem)
        if (self.solver or method).splits and not self.seminorm:
            raise ValueError(
                "BacksolveAdjoint(seminorm=False) adds gradients to the state, so it is no longer a pair (q, "
                f"p), which {type(self.solver or method).__name__} needs; pass seminorm=True, or another solver"
            )
        times = problem.rows(problem.times)
        k0 = None if problem.k0 is None else problem.k0.detach()
        inputs = (times, problem.y0, k0, *problem.theta)
        if any(x is not None and is_wrapped(x) for x in inputs):
            _refuse("a transform of torch.func")
        if not self.seminorm and not bool((times == times[:1]).all()):
            raise ValueError(
                "BacksolveAdjoint(seminorm=False) takes the same backward steps for all samples, so the samples "
                "cannot have different times; pass t of shape (T,), or seminorm=True"
            )
        work = Work(
            method,
            problem.field,
            problem.sample_dims,
            report,
            None,
            key=problem.key,
            check=problem.check,
            snapshot=problem.opened.snapshot,
            warns=problem.warns,
        )
        return Integrated(*_Backsolve.apply(self, work, *inputs)), work.calls


def _refuse(what: str) -> NoReturn:
    raise NotImplementedError(
        f"BacksolveAdjoint gives first derivatives in reverse mode only, not {what}; use "
        "RecursiveCheckpointAdjoint, which has derivatives of any order in both modes"
    )


class _Backsolve(Operation):
    """A solve that keeps only its outputs, and its derivative, as one autograd operation."""

    @staticmethod
    @unhooked()
    def forward(
        adjoint: BacksolveAdjoint, work: Work, times: Tensor, y0: Tensor, k0: Tensor | None, *theta: Tensor
    ):
        # Parameters are passed as they are: detached ones would have to be swapped into modules at every call.
        return work.run(times.detach(), y0.detach(), k0, *theta).usual

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.adjoint, ctx.work, times, y0, _, *theta = inputs
        ctx.restored = ctx.work.snapshot()
        ctx.save_for_backward(*output, times, y0, *theta)
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    @one_by_one
    @unhooked()
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        _, _, times, y0, _, *theta = asked(ctx)
        wanted = [i for i, needed in enumerate((times, y0, *theta)) if needed]
        gradients: list[Tensor | None] = [None] * (2 + len(theta))
        g = cotangents[0]
        if g is not None:
            saved = ctx.saved_tensors  # only once, as activation checkpointing allows no second access
            found, inputs = Integrated(*saved[:USUAL]), list(saved[USUAL:])
            if any(is_wrapped(x) for x in (g, *inputs)):
                _refuse("a transform of torch.func")
            with torch.no_grad(), ctx.restored(), full_precision(g.device.type):
                computed = _of_finished(ctx.adjoint, ctx.work, found, inputs, wanted, g)
            if ctx.work.failed:
                ctx.work.tell_of_nan(found.status == int(Status.CONVERGED), computed)
            if torch.is_grad_enabled():
                computed = _FirstOrder.apply(len(computed), *computed, g, *inputs)
            for i, gradient in zip(wanted, computed):
                gradients[i] = gradient
        times, y0, *theta = gradients
        return None, None, times, y0, None, *theta

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        _refuse("forward mode")

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        _refuse("a transform of torch.func")


class _FirstOrder(Operation):
    """The first `count` tensors, tied to the others so that differentiating them again raises an error."""

    @staticmethod
    def forward(count: int, *tensors: Tensor):
        return tuple(x.clone() for x in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing is saved."""

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        _refuse("second derivatives")

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        _refuse("second derivatives")

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        _refuse("a transform of torch.func")


# -------------------------------------------------------------------------------------- the backward solve


class _Unstable(Exception):
    """Raised if the backward solve cannot be trusted; the message says why."""


def _of_finished(
    adjoint: BacksolveAdjoint, work: Work, found: Integrated, inputs: list[Tensor], wanted: list[int], g: Tensor
) -> list[Tensor]:
    """The gradients of the `wanted` inputs (times, y0, theta), given cotangents `g` `(B, T, n)` of the outputs."""
    if not work.failed:
        return _gradients(adjoint, work, found, None, inputs, wanted, g)
    finished = found.status == int(Status.CONVERGED)
    if work.sample_dims is None:
        g = torch.where(finished[:, None, None], g, 0.0)
        return _gradients(adjoint, work, found, finished, inputs, wanted, g)
    # f may have no derivative where samples failed, but can be evaluated for the others alone.
    (rows,) = finished.nonzero(as_tuple=True)
    dims = (0, 0, *work.sample_dims)
    part = [x if d is None else x.index_select(d, rows) for x, d in zip(inputs, dims)]
    # Eagerly, since otherwise each number of failed samples would need a graph of its own.
    eager = replace(work, key=None, as_graph=False)
    alone = _gradients(adjoint, eager, Integrated(*(x[rows] for x in found.usual)), None, part, wanted, g[rows])
    for place, i in enumerate(wanted):
        if (d := dims[i]) is not None:
            alone[place] = torch.zeros_like(inputs[i]).index_copy(d, rows, alone[place])
    return alone


def _gradients(
    adjoint: BacksolveAdjoint,
    work: Work,
    found: Integrated,
    finished: Tensor | None,
    inputs: list[Tensor],
    wanted: list[int],
    g: Tensor,
) -> list[Tensor]:
    """As `_of_finished`, with the samples that count given as `finished` `(B,)`; None: all."""
    counts = g.any(2).any(0).tolist()  # which outputs the loss depends on
    if not any(counts):
        return [torch.zeros_like(inputs[i]) for i in wanted]
    # Parameters are used directly, which saves swapping them at every call, unless a hook of theirs would notice.
    inputs = [x if i > 1 and stays(x, inputs) else x.detach() for i, x in enumerate(inputs)]
    try:
        return Backwards(adjoint, work, found, finished, inputs, wanted).gradients(g, counts)
    except _Unstable as reason:
        message = (
            f"odeint: BacksolveAdjoint stopped, {reason}. The gradient is that of "
            "RecursiveCheckpointAdjoint(arc_length=True), from a second forward solve. Try: that adjoint from the "
            "start, which saves this attempt; tighter tolerances or BacksolveAdjoint(solver=...); more output "
            "times, at each of which y is reset"
        )
        warn_of_failure(message, "odeint", repr(adjoint))
    return checkpointed(work, inputs, wanted, g)


class Backwards:
    """The backward solve, from each output time to the one before it."""

    def __init__(
        self,
        adjoint: BacksolveAdjoint,
        work: Work,
        found: Integrated,
        finished: Tensor | None,
        inputs: list[Tensor],
        wanted: list[int],
    ):
        self.adjoint, self.work, self.inputs, self.wanted = adjoint, work, inputs, wanted
        self.times, y0, *theta = inputs
        self.start, self.values, self.finished = found.length, found.values.detach(), finished
        if self.finished is not None:
            self.start = torch.where(self.finished, self.start, 1.0)  # that of a failed sample may be NaN
            # A failed sample takes steps of length 0, without effect, from its initial state, or from that of
            # another sample if f has no slope there.
            rows = stand_ins(self.finished, self.finished | (found.steps > 0))
            values = torch.where(self.finished[:, None, None], self.values, y0[rows].unsqueeze(1))
            self.values, self.times = finite_start(values, self.finished), self.times[rows]
        if bool((alone := self.times[:, :1] == self.times[:, -1:]).any()):  # one time only: no step gave outputs
            self.values = torch.where(alone.unsqueeze(2), self.values[:, :1], self.values)
        self.shared = shared = [i - 2 for i in wanted if i > 1]
        self.sums: list[Tensor] = []  # the gradients with respect to the shared theta, once there are some
        joint = bool(shared) and not adjoint.seminorm
        self.widths = [real_parts(theta[i], alone=True).numel() for i in shared] if joint else []
        columns = sum(self.widths) if joint else None
        self.method = work.method if adjoint.solver is None else adjoint.solver
        # For one system, the theta part of the pullback at each stage can be kept and weighted by the method's own
        # quadrature weights. With many samples, each would need weights for its own step length.
        own_weights = len(y0) == 1 and bool(shared) and not joint and self.method.weights is not None
        kept, weights = (len(self.method.nodes or ()), self.method.weights or ()) if own_weights else (0, ())
        self.packed = Packed(len(y0), y0.shape[1], columns, self.method.splits, kept, weights)
        self.first: list[Tensor] = []  # the theta part kept from the slope that the next step begins with
        self.as_graph = work.as_graph and not joint and not self.method.differentiates
        if work.as_graph and not self.as_graph:
            what, remedy = "an implicit method", "pass BacksolveAdjoint(solver=...) an explicit one"
            if joint:
                what, remedy = "seminorm=False", "leave it at True"
            message = (
                f"the continuous adjoint of odeint with {type(self.method).__name__}: compile=True has no graph "
                f"for {what} there; the eager loop runs instead. Try: {remedy}, or RecursiveCheckpointAdjoint()"
            )
            warnings.warn(message, CompileWarning, stacklevel=users_line())
        self.limit = self.method.max_steps
        if adjoint.solver is None:
            self.limit = min(self.limit, LEAST_TRIES + TRIES * int(to_host(found.tries).max()))
        of = partial(augmented, work.field, self.packed, shared, self.finished)
        self.bound = Bound(of, tuple(theta), None if joint else work.sample_dims)
        # The progress callback of the forward solve must not start over.
        progress = None if adjoint.solver is None else adjoint.solver.progress
        self.method_of_z = self.packed.method(self.method, max_steps=self.limit, progress=progress)

    def gradients(self, g: Tensor, counts: list[bool]) -> list[Tensor]:
        """The gradients of the wanted inputs, given cotangents `g` `(B, T, n)` that are not all zero.

        `counts` says for which outputs they are not. Raises _Unstable.
        """
        # The step length with which the forward solve would have gone on is a good guess for the way back.
        own, joint = self.adjoint.solver is None, self.packed.columns is not None
        length = self._host(self.start) if own and not joint else None
        of_times, count = 0 in self.wanted, self.times.shape[1]
        a, times_bar = g[:, count - 1], torch.zeros_like(self.times)
        for i in reversed(range(1, count)):
            if any(counts[i:]):
                a, slope, length = self._to_output_before(i, a, length)
                if of_times:
                    slope = self._known(self.packed.split(slope)[0])
                    times_bar[:, i] = (g[:, i] * slope).sum(1)
            a = a + g[:, i - 1] if i > 1 else a
        if of_times:
            F: Any = self.bound.F
            times_bar[:, 0] = -(a * self._known(F.base.at(self.times[:, 0], self.values[:, 0]).detach())).sum(1)
        theta = self.inputs[2:]
        sums = dict(zip(self.shared, self.sums or [torch.zeros_like(theta[i]) for i in self.shared]))
        return [(times_bar, a + g[:, 0])[i] if i < 2 else sums[i - 2] for i in self.wanted]

    def _add(self, parts: Sequence[Tensor]) -> None:
        """Add `parts`, which nobody else holds, to the gradients with respect to theta."""
        if self.sums:
            for total, part in zip(self.sums, parts):
                total += part
        else:
            self.sums = list(parts)

    def _host(self, length: Tensor) -> Array:
        """`length` `(B,)`, moved to where steps are decided (host or device)."""
        return to_host(length) if on_host(self.times) else length

    def _known(self, slope: Tensor) -> Tensor:
        """`slope` `(B, n)`, with 0 for failed samples."""
        return slope if self.finished is None else torch.where(self.finished.unsqueeze(1), slope, 0.0)

    def _to_output_before(self, i: int, a: Tensor, length: Array | None) -> tuple[Tensor, Tensor, Array]:
        """Solve from output i to the output before it.

        Returns a there, the slope of z at output i, and the length of a next step. The gradients with respect to
        theta are accumulated on the way.
        """
        joint = self.packed.columns is not None
        ends = torch.stack([self.times[:, i], self.times[:, i - 1]], dim=1)
        if self.finished is not None:
            ends = torch.where(self.finished.unsqueeze(1), ends, self.times[:, :1])
        if joint:
            ends = (ends if self.finished is None else ends[self.finished])[:1]
        # a is solved for divided by its largest entry, so that tolerances do not depend on the scale of the loss.
        scale = a.abs().amax() if joint else a.abs().amax(1, keepdim=True)
        scale = scale.masked_fill(scale == 0, 1.0)
        others = [a.new_zeros(sum(self.widths))] if joint else []
        z = self.packed.pack(self.values[:, i], a / scale, others)
        arrived = self._as_graph(ends, z, scale, length)
        if arrived is None:
            arrived = self._eagerly(ends, z, scale, length)
        self._check_status(i, arrived)
        y, a, others = self.packed.split(arrived.z)
        self._check_state(i - 1, y)
        if others is not None:
            self._add_columns(others[0] * scale)
        return self._known(a * scale), arrived.slope, self._host(arrived.length)

    def _eagerly(self, ends: Tensor, z: Tensor, scale: Tensor, length: Array | None) -> Arrived:
        """Solve from `z` at the first of the `ends` `(B, 2)` to the last, by the eager loop."""
        stepper = Stepper(self.method_of_z, self.bound, ends, on_host(ends))
        F: Any = self.bound.F
        slope, listen = F.at(stepper.begin, z), None
        if self.packed.kept:
            self.first, listen = F.pulled[-1], partial(self._add_kept, scale)
        elif self.shared and self.packed.columns is None:
            listen = partial(self._integrate_theta, scale)
        run, ended = march(stepper, z, slope, listen=listen, length=length)
        assert ended.status is not None
        status, t, tries, length = map(to_tensor, (ended.status, ended.t, ended.tries, ended.length))
        return Arrived(ended.y, slope, status, t, tries, length, (), run.called)

    def _as_graph(self, ends: Tensor, z: Tensor, scale: Tensor, length: Array | None) -> Arrived | None:
        """The same as one graph; None if there can be no graph, or if the forward solve was not one."""
        if not self.as_graph:
            return None
        work, method = self.work, self.method
        packed, places = self.packed, tuple(self.shared)
        of = partial(augmented, work.field, packed, places, None)

        def stepper(ends: Tensor, *theta: Tensor) -> Stepper:
            return Stepper(packed.method(method), Bound(of, theta), ends, host=False, moving=False)

        back = Back(stepper, work.field, packed, places, length is not None)
        limit = torch.tensor(self.limit, device=z.device)
        first = torch.zeros_like(scale[:, 0]) if length is None else to_tensor(length)
        key = (work.key, method, places, packed.kept, back.guessed, "backsolve")
        name = f"the continuous adjoint of odeint with {type(method).__name__}"
        tensors = (limit, *(x.contiguous() for x in (ends, z, scale, first, *self.bound.theta)))
        found = run_as_graph(name, key, back.run, *tensors, varies=True)
        if found is None:
            return None
        arrived = Arrived(*found)
        self._add(arrived.sums)
        if self.adjoint.listen is not None:
            self.adjoint.listen(int(arrived.calls))
        return arrived

    def _add_columns(self, columns: Tensor) -> None:
        theta, parts = self.inputs[2:], columns.split(self.widths, dim=-1)
        found = [torch.empty_like(theta[i]) for i in self.shared]
        for total, part in zip(found, parts):
            numbers = real_parts(total, alone=True)
            numbers.copy_(part.view_as(numbers))
        self._add(found)

    def _integrate_theta(
        self, scale: Tensor, stepper: Stepper, step: Step, taken: Taken, rows: Tensor | None
    ) -> None:
        """Add the integral of a df/dtheta over a step of samples `rows` (None: all), where they accepted it."""
        F: Any = stepper.bound.F
        nodes = QuadratureNodes.of(self.packed, stepper, step, taken, scale if rows is None else scale[rows])
        with torch.enable_grad():
            slopes = [F.base(m, y) for m, y in zip(nodes.moments, nodes.states)]
        found = pulled(slopes, list(nodes.bars), [F.theta[i] for i in self.shared])
        self.sums = self.sums or [torch.zeros_like(self.inputs[2 + i]) for i in self.shared]
        for i, total, gradient in zip(self.shared, self.sums, found):
            if rows is None or self.work.sample_dims is None or (d := self.work.sample_dims[i]) is None:
                total += gradient
            else:
                total.index_add_(d, rows, gradient)

    def _add_kept(self, scale: Tensor, stepper: Stepper, step: Step, taken: Taken, rows: Tensor | None) -> None:
        """The same for one system, from the theta parts kept at its stages; the step begins with `first`."""
        F: Any = stepper.bound.F
        added = integrated(self.method, (to_tensor(step.dt) * scale).reshape(()), [self.first, *F.pulled])
        self.first = F.pulled[-1]
        self._add(added)

    def _check_status(self, i: int, found: Arrived) -> None:
        if not bool(to_host(found.status).any()):  # all CONVERGED, which is 0
            return
        failed = found.status != int(Status.CONVERGED)
        if self.packed.columns is None and self.finished is not None:
            failed = failed & self.finished
        if not bool(failed.any()):
            return
        j = int(failed.nonzero()[0, 0])
        raise _Unstable(
            f"as it did not get from output {i} to {i - 1} for {int(failed.sum())} of {len(failed)} samples. "
            f"Sample {j}: {Status(int(found.status[j])).name} at t = {float(found.t[j]):.6g} after "
            f"{int(found.tries[j])} steps tried (at most {self.limit}): the reverse system is stiff or "
            "blows up"
        )

    def _check_state(self, i: int, y: Tensor) -> None:
        """Raise _Unstable if y `(B, n)`, solved backwards, is too far from output i."""
        truth, forward = self.values[:, i], self.work.method
        tolerance = forward.tolerance(truth)
        if self.method is not forward:
            tolerance = torch.maximum(self.method.tolerance(truth), tolerance)
        off = forward.norm((y - truth) / tolerance)
        if bool((to_host(off) <= self.adjoint.check).all()):
            return
        wrong = ~(off <= self.adjoint.check)
        wrong = wrong if self.finished is None else wrong & self.finished
        if not bool(wrong.any()):
            return
        j = int(torch.where(wrong, off.nan_to_num(nan=float("inf")), -1.0).argmax())
        raise _Unstable(
            f"as y solved backwards misses output {i} for {int(wrong.sum())} of {len(wrong)} samples. Sample {j} "
            f"misses it by {float(off[j]):.3g} times its tolerance at t = {float(self.times[j, i]):.6g} "
            f"(check={self.adjoint.check:g}): the reverse system is unstable"
        )


def checkpointed(work: Work, inputs: list[Tensor], wanted: list[int], g: Tensor) -> list[Tensor]:
    """The gradients that `RecursiveCheckpointAdjoint(arc_length=True)` gives, from a new forward solve.

    With `arc_length` they are close to those of the true solution, also where it jumps.
    """
    again = replace(
        work, report=silent, record=Record(), key=None, as_graph=False, arc_length=work.method.dt is None
    )
    times, y0, *theta = (x.detach() for x in inputs)
    k0 = again.stepper(False, times, *theta).bound.F.at(times[:, 0], y0)
    found = again.run(times, y0, k0, *theta)
    ended = Ended(found.status, found.t)
    assert again.record is not None
    steps = again.record.stacked(times)
    return again.swept(steps, ended, tuple(inputs), wanted, torch.where(ended.finished[:, None, None], g, 0.0))
