"""The implicit function theorem, written once: any residual, solver and order, in reverse and forward mode.

A `Condition` states which residual vanishes at the solution: R(z, theta) = 0. `find` runs a solver, outside of
autograd, to find such a point. `attach` gives that point its derivative. With A = dR/dz at the point,

    reverse mode   A' u + g = 0,            then  dL/dtheta = (dR/dtheta)' u
    forward mode   A v + (dR/dtheta) dtheta = 0,  then  dz = v

Both u and v satisfy conditions again, linear ones, to which the same `find` and `attach` apply. This recursion
gives derivatives of every order. (Griewank and Walther, Evaluating Derivatives, chapter 15.)

States are matrices `(B, n)`, one sample per row, and samples do not depend on each other; so `vmap` can merge its
own batch into the rows.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch._functorch import eager_transforms
from torch.autograd import forward_ad
from torch.func import jvp, vjp, vmap
from torch.utils import _pytree as pytree

from implicitly.condition import (
    LINEAR_REMEDY,
    Condition,
    Graphs,
    Map,
    all_converged,
    explain,
    is_for_another,
    is_usable,
    users_line,
)
from implicitly.host import maybe_any
from implicitly.iterate import Coarse, Found, Residual, Solver, iterate, last_step
from implicitly.linear import LinearSolver
from implicitly.pullback import Pull, of_places, pullback, recorded
from implicitly.solution import ConvergenceWarning, Status, is_success
from implicitly.transforms import (
    Operation,
    asked,
    full_precision,
    is_plain,
    is_wrapped,
    merge_rows,
    one_by_one,
    records,
    split_rows,
    unhooked,
    unwrapped,
)
from implicitly.tree import real_parts, row_norm

# The result of an unconverged linear solve is still used, and reported, if its relative residual is below
# GOOD_ENOUGH and its error estimate, that residual times |M||u|/|b|, is below HOPELESS: near a singular system a
# small residual says little about the error.
GOOD_ENOUGH = 0.1
HOPELESS = 0.5
# Where the first solver falls short, dense matrices are formed for systems with up to so many unknowns and bytes.
FEW, SMALL = 1024, 2**26


# ------------------------------------------------------------------------------------------ finding a point


def find(
    solver: Solver,
    condition: Condition,
    z0: Tensor,
    theta: tuple[Tensor, ...],
    r0: Tensor | None = None,
    *,
    leave_last: bool = False,
) -> Found:
    """Find a point that satisfies `condition`, starting from `z0` `(B, n)`, without recording gradients.

    `r0` is the residual at z0 where it is known. `leave_last` is as in `iterate`; where `Found.ahead` shows that
    the last call was left to the caller, `arrive` ends the solve.
    """
    if torch.compiler.is_dynamo_compiling():  # a trace of everything needs no opaque step
        with torch.no_grad():
            return search(solver, condition, z0, theta, r0, unrolled=True)
    start = (z0,) if r0 is None else (z0, r0)
    starts = (t.detach() for t in start)
    run = search if condition.graphs is None or z0.shape[1] == 0 else condition.graphs.search
    run = partial(search, leave_last=True) if leave_last else run
    opaque = _Find.apply if records() else _Find.forward
    z, status, residual, steps, evaluations, *rest = opaque(solver, condition, run, len(start), *starts, *theta)
    known = {"ahead" if leave_last else "estimate": tuple(rest), "looked_at": has_waited(solver, condition)}
    return Found(z, status, residual, steps, evaluations, **known)


def has_waited(solver: Solver, condition: Condition) -> bool:
    """Whether the host has already waited for the result of a solve, in the solver or in the report."""
    return not solver.fixed_steps or condition.report.on_failure != "ignore"


def arrive(found: Found, r: Tensor, solver: Solver, condition: Condition, theta: tuple[Tensor, ...]) -> Found:
    """End the solve `found` with the last residual `r` `(B, n)`, at `found.ahead`, that the caller computed."""
    starts = [t.detach() for t in (*found.ahead, r, found.z, found.residual)]
    z, status, residual, steps, _ = _Find.apply(solver, condition, _last_step, len(starts), *starts, *theta)
    return Found(z, status, residual, steps, found.evaluations + 1, looked_at=has_waited(solver, condition))


def _last_step(
    solver: Solver, condition: Condition, z: Tensor, theta: tuple[Tensor, ...], *known: Tensor
) -> Found:
    with full_precision(z.device.type):
        return last_step(solver, z, *known)


def search(
    solver: Solver,
    condition: Condition,
    z0: Tensor,
    theta: tuple[Tensor, ...],
    r0: Tensor | None = None,
    *,
    leave_last: bool = False,
    unrolled: bool = False,
    verify: bool = True,
) -> Found:
    """Run `solver` on `condition`: plain tensor code, differentiable by unrolling where autograd records.

    `leave_last`: as in `iterate`, and then without an estimate. `unrolled`: exactly `max_steps` steps, one after
    the other, in a traced graph. `verify`: evaluate the true residual of an answer that a recurrence calls right.
    """
    if z0.shape[1] == 0:
        return _without_entries(z0, unrolled)
    rtol, atol = solver.tolerances(condition.dtype)
    if condition.linear:
        scale = row_norm(theta[0])
        # Gradients may be arbitrarily small, so only an explicit absolute tolerance counts.
        atol = solver.atol or 0.0
    elif condition.relative_to_iterate:
        scale = None
    else:
        r0 = condition.residual(z0, *theta) if r0 is None else r0
        scale = row_norm(r0) if condition.scale is None else condition.scale(condition.at(*theta), z0, r0)
    eps = torch.finfo(condition.dtype).eps
    coarse = eps > torch.finfo(z0.dtype).eps and not condition.linear and solver.needs is None
    with full_precision(z0.device.type):  # f itself keeps the autocast it was called under
        found = iterate(
            solver,
            partial(_coarse, condition.at, eps) if coarse else condition.at,
            theta,
            z0,
            r0,
            rtol=rtol,
            atol=atol,
            floor=min(rtol, 4 * eps),
            scale=scale,
            sample_dims=condition.sample_dims,
            verify=verify and solver.recurrent,
            leave_last=leave_last,
            unrolled=unrolled,
        )
    return found._replace(estimate=()) if leave_last else found


def _coarse(bind: Callable[..., Residual], eps: float, *theta: Tensor) -> Coarse:
    return Coarse(bind(*theta), eps)


def _without_entries(z: Tensor, unrolled: bool) -> Found:
    """The result for states `(B, 0)`, which satisfy every condition."""
    status = torch.full((len(z),), int(Status.CONVERGED), dtype=torch.int64, device=z.device)
    residual, zeros = z.new_zeros(len(z)), torch.zeros_like(status)
    return Found(z, status, residual, zeros, 0 if unrolled else zeros.new_zeros(()))


class Opaque(Operation):
    """An operation without a derivative; subclasses add `forward`, and a `vmap` that passes it the whole batch."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        """Mark all outputs as not differentiable."""
        outputs = output if isinstance(output, tuple) else (output,)
        ctx.mark_non_differentiable(*outputs)
        ctx.set_materialize_grads(False)
        ctx.tangents = (None,) * len(outputs) if isinstance(output, tuple) else None

    @staticmethod
    def backward(ctx, *gradients):
        """None for every input."""
        return (None,) * len(ctx.needs_input_grad)

    @staticmethod
    def jvp(ctx, *tangents):
        """None for every output."""
        return ctx.tangents


class _Find(Opaque):
    """A solve as one opaque step, so that `vmap` passes it the whole batch."""

    @staticmethod
    @unhooked()
    def forward(solver, condition, run, starts, *tensors):
        start, theta = tensors[:starts], tensors[starts:]
        found = run(solver, condition, start[0], theta, *start[1:])
        if not found.ahead:
            found = condition.examined(found, theta)
            condition.announce(solver, found, theta)
        # Outputs must not alias inputs: a converged start is its own answer.
        z = found.z.clone() if found.z is start[0] else found.z
        return z, *found[1:5], *found.estimate, *found.ahead

    @staticmethod
    def vmap(info, in_dims, *args):
        solver, condition, run, starts, *tensors = args
        dims, size = in_dims[4:], info.batch_size
        start = [merge_rows(t, d, size) for t, d in zip(tensors[:starts], dims)]
        condition, theta = _mapped(condition, dims[starts:], size, tuple(tensors[starts:]))
        output = _Find.apply(solver, condition, run, starts, *start, *theta)
        outputs = [split_rows(t, size) if t.ndim else t for t in output]
        return tuple(outputs), tuple(0 if t.ndim else None for t in output)


# ------------------------------------------------------------------------------------- its derivative


def attach(condition: Condition, z: Tensor, theta: tuple[Tensor, ...], backward: Backward) -> Tensor:
    """The point `z` `(B, n)`, which satisfies `condition`, with the derivative that the theorem gives it."""
    if torch.compiler.is_dynamo_compiling():
        z = z.detach()
        return _Answered.apply(condition.residual(z, *theta), z, partial(backward.answer, condition, theta))
    if not records():  # as in the solve of a derivative
        return z.detach()
    return _Attach.apply(condition, backward, z.detach(), *theta)


@dataclass(frozen=True)
class Backward:
    """How the linear systems M u = b of a derivative are solved.

    Attributes:
        solver: a linear solver, or any other solver, since a linear condition is a condition.
        inverse: an estimate of M^-1, a map on `(B, n)`, for first-order reverse mode.
        use: "start" the solve from `inverse(b)`, or "precondition" it by `inverse`.
        listen: called with the result of the first-order solve.
        otherwise: the solver for systems of few unknowns where `solver` falls short; None: there is none.
    """

    solver: Solver
    inverse: Map | None = None
    use: str = "start"
    listen: Callable[[Found], None] | None = None
    otherwise: LinearSolver | None = None

    def answer(self, condition: Condition, theta: tuple[Tensor, ...], g: Tensor, z: Tensor) -> Tensor:
        """The u with A' u + g = 0 at `z`, in a traced graph, which is not differentiated again."""
        theta = (g, z, *(t.detach() for t in theta))
        system = transposed(condition)
        found = find(self.solver, system, torch.zeros_like(g), theta, g)
        return self.usable(found, system, theta)

    def usable(self, found: Found, condition: Condition, theta: tuple[Tensor, ...]) -> Tensor:
        """The result for M u = b, with 0 where the solve broke down: no derivative rather than an arbitrary one.

        It is NaN where b has NaN or inf, because the gradient scaler of mixed precision looks for those.
        """
        if all_converged(found.status) or not any_ended(found, ~is_success(found.status)):
            return found.z
        b, usable = theta[0], is_usable(found.status)
        if not self.solver.fixed_steps:
            size = row_norm(b)
            with torch.no_grad():
                growth = row_norm(b - condition.residual(b, *theta)) / size  # |M b| / |b|
            certain = found.residual / size * growth * row_norm(found.z) <= HOPELESS * size
            halfway = (found.residual <= GOOD_ENOUGH * size) & certain
            usable = usable & ((found.status == int(Status.CONVERGED)) | halfway)
        nothing = torch.where(b.isfinite().all(1), 0.0, float("nan"))
        return torch.where(usable[:, None], found.z, nothing[:, None])

    def solve(self, condition: Condition, theta: tuple[Tensor, ...], inverse: Map | None = None) -> Tensor:
        """The u with M u = b, itself differentiable; `theta` is `(b, ...)`."""
        b = theta[0]
        if inverse is None:
            found = self._found(condition, theta)
        elif self.use == "start":
            found = find(self.solver, condition, inverse(b), theta)
        else:
            found = find(self.solver, _preconditioned(condition, inverse), torch.zeros_like(b), theta, b)
            found = found._replace(z=inverse(found.z))
        if self.listen is not None and not is_wrapped(b):
            self.listen(found)
        usable = self.usable(found, condition, theta)
        return attach(condition, usable, theta, Backward(self.solver, otherwise=self.otherwise))

    def _found(self, condition: Condition, theta: tuple[Tensor, ...]) -> Found:
        """The solution, starting from zero; by `otherwise` where `solver` falls short and matrices are small."""
        b, second = theta[0], self.otherwise
        if second is None or not 0 < b.shape[1] <= FEW or b.nbytes * b.shape[1] > SMALL:
            return find(self.solver, condition, torch.zeros_like(b), theta, b)
        patient = replace(condition, report=replace(condition.report, patient=True))
        found = find(self.solver, patient, torch.zeros_like(b), theta, b)
        if all_converged(found.status) or not any_ended(found, is_for_another(found.status)):
            return found
        count = found.evaluations
        found = find(second, replace(condition, graphs=None), torch.zeros_like(b), theta, b)
        return found._replace(evaluations=count + found.evaluations)


def any_ended(found: Found, mask: Tensor) -> bool:
    """Whether any entry of `mask` `(B,)`, on how samples of `found` ended, is true; see `maybe_any`."""
    looks = found.looked_at and not torch.compiler.is_dynamo_compiling()
    return bool(unwrapped(mask).any()) if looks else maybe_any(mask)


def attach_usable(found: Found, condition: Condition, theta: tuple[Tensor, ...], backward: Backward) -> Tensor:
    """The found point `(B, n)` with the theorem's derivative; zero for samples that ended without one."""
    if all_converged(found.status) or not any_ended(found, ~is_usable(found.status)):
        return attach(condition, found.z, theta, backward)
    usable = is_usable(found.status)
    if not any_ended(found, usable):
        return constant(found.z, theta)
    z, theta = without_failed(usable, found.z, theta, condition)
    return torch.where(usable[:, None], attach(condition, z, theta, backward), found.z.detach())


def constant(z: Tensor, theta: tuple[Tensor, ...]) -> Tensor:
    """`z` with derivatives that are zero (autograd tells that apart from none)."""
    real = (real_parts(_reshapable(t)) for t in theta if t.is_floating_point() or t.is_complex())
    return z.detach() + sum(t.flatten()[:0].sum().to(z.dtype) for t in real)


def _reshapable(t: Tensor) -> Tensor:
    """`t`; if sparse, its dense form where it needs a gradient, and else a zero, which is as good."""
    if t.layout is torch.strided:
        return t
    return t.to_dense() if t.requires_grad else torch.zeros((), dtype=t.dtype, device=t.device)


def without_failed(
    usable: Tensor, z: Tensor, theta: tuple[Tensor, ...], condition: Condition
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """`z` and `theta` without the values of failed samples, where 0 * NaN would make the gradient NaN.

    A failed sample has a zero cotangent, but its Jacobian may be NaN, and gradients of parameters are sums over
    all samples. Where it is known which tensors hold the samples, a good sample takes the place of each failed
    one. Else NaN and inf are replaced by zeros, which is enough unless f is undefined at finite arguments; then
    the gradient is NaN, and a warning says so.
    """
    if condition.sample_dims is None:
        return torch.nan_to_num(z, 0.0, 0.0, 0.0), tuple(_finite(t, condition) for t in theta)
    if len(usable) == 0:  # argmax needs an entry; a traced graph gets here without knowing who failed
        return z, theta
    index = torch.arange(len(usable), device=usable.device)
    rows = torch.where(usable, index, usable.to(torch.int64).argmax())
    theta = tuple(t if d is None else t.index_select(d, rows) for t, d in zip(theta, condition.sample_dims))
    return z.index_select(0, rows), theta


def _finite(t: Tensor, condition: Condition) -> Tensor:
    if t.layout not in (torch.strided, torch.sparse_coo):  # other layouts lack this operation
        return t
    if t.is_complex():
        t = torch.complex(*torch.nan_to_num(real_parts(t), 0.0, 0.0, 0.0).unbind(-1))
    elif t.is_floating_point():
        t = torch.nan_to_num(t, 0.0, 0.0, 0.0)
    else:
        return t
    shape = tuple(t.shape)  # a hook that held its own tensor would keep it, and its graph, alive for ever

    def tell(gradient: Tensor) -> None:
        if condition.report.on_failure != "ignore" and not bool(unwrapped(gradient).isfinite().all()):
            warnings.warn(
                f"{condition.name}: the gradient of a tensor of shape {shape} is NaN, because f has no finite "
                "derivative at samples without a solution. Use in_dims to say which args have one entry per "
                "sample: then failed samples are left out",
                ConvergenceWarning,
                stacklevel=users_line(),
            )

    if t.requires_grad and not is_wrapped(t) and not torch.compiler.is_dynamo_compiling():
        t.register_hook(tell)
    return t


def _preconditioned(condition: Condition, inverse: Map) -> Condition:
    """The condition M inverse(w) = b for w. Samples are not dropped, as the estimate has one matrix per sample."""

    def bind(*theta: Tensor) -> Map:
        operator = condition.bind(*theta)
        return lambda w: operator(inverse(w))

    return replace(condition, bind=bind, sample_dims=None, graphs=None)


class _Attach(Operation):
    @staticmethod
    def forward(condition, backward, z, *theta):
        return z.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.condition, ctx.how = inputs[:2]
        snapshot = ctx.condition.snapshot
        ctx.restored = nullcontext if snapshot is None else snapshot()
        # The output is saved, not the input, as higher derivatives go through it.
        ctx.save_for_backward(output, *inputs[3:])
        ctx.save_for_forward(output, *inputs[3:])

    @staticmethod
    @one_by_one
    @unhooked()
    def backward(ctx, *cotangents):
        (g,) = cotangents
        z, *theta = ctx.saved_tensors
        needed = [i for i, needs in enumerate(asked(ctx)[3:]) if needs]
        gradients: list[Tensor | None] = [None] * len(theta)
        with ctx.restored(), full_precision(z.device.type):  # f has the autocast of the forward pass
            for i, gradient in zip(needed, _cotangents(ctx.condition, ctx.how, g, z, theta, needed)):
                gradients[i] = gradient
        return None, None, None, *gradients

    @staticmethod
    def jvp(ctx, *tangents):
        dtheta = tangents[3:]
        z, *theta = (forward_ad.unpack_dual(t).primal for t in ctx.saved_tensors)
        moving = [i for i, d in enumerate(dtheta) if d is not None]

        of_moving = of_places(partial(ctx.condition.residual, z), theta, moving)
        # autograd switches forward mode off inside `jvp`, but an enclosing jvp of torch.func still needs it.
        with forward_ad._set_fwd_grad_enabled(True):
            b = push(of_moving, tuple(theta[i] for i in moving), tuple(dtheta[i] for i in moving))
            return ctx.how.solve(pushed(ctx.condition), (b, z, *theta))

    @staticmethod
    def vmap(info, in_dims, *args):
        condition, backward, z, *theta = args
        size = info.batch_size
        condition, theta = _mapped(condition, in_dims[3:], size, tuple(theta))
        out = _Attach.apply(condition, backward, merge_rows(z, in_dims[2], size), *theta)
        return split_rows(out, size), 0


def _cotangents(
    condition: Condition, how: Backward, g: Tensor, z: Tensor, theta: list[Tensor], needed: list[int]
) -> tuple[Tensor, ...]:
    """The cotangents of the `needed` tensors of theta, by the theorem, for the cotangent g of z."""
    if is_plain(g, z, *theta):
        record = condition.pull or partial(recorded, condition.residual)
        pull = record((z, *theta), [0, *(i + 1 for i in needed)])
        u = how.solve(transposed(condition, len(z), pull), (g, z, *theta), how.inverse)
        return pull(u, [i + 1 for i in needed])
    u = how.solve(transposed(condition), (g, z, *theta), how.inverse)
    of_needed = of_places(partial(condition.residual, z), theta, needed)
    return pullback(of_needed, *(theta[i] for i in needed))[1](u)


class _Answered(Operation):
    """The point z with the theorem's derivative, in a traced graph: the cotangent g of z gives u for the residual.

    All else that the condition depends on is differentiated through the residual, by plain operations.
    """

    @staticmethod
    def forward(ctx, residual, z, answer):
        ctx.save_for_backward(z)
        ctx.answer = answer
        return z.clone()

    @staticmethod
    def backward(ctx, *gradients):
        (z,) = ctx.saved_tensors
        return ctx.answer(*gradients, z), None, None


def push(f: Callable[..., Tensor], primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> Tensor:
    """The product J v, by forward mode or by two reverse passes.

    Forward mode is used inside of torch.func, whose levels nest. Elsewhere two reverse passes are needed, as dual
    numbers do not nest.
    """
    dual_level = forward_ad._current_level >= 0 and eager_transforms.JVP_NESTING == 0
    if not dual_level and any(is_wrapped(t) for t in (*primals, *tangents)):
        # A dual number is written to, so it cannot be an expanded tensor.
        dense = tuple(t.contiguous() for t in primals), tuple(t.contiguous() for t in tangents)
        return jvp(f, *dense)[1]
    with nullcontext() if torch.compiler.is_dynamo_compiling() else unhooked():
        value, pull = vjp(f, *primals)[:2]
        return vjp(pull, torch.zeros_like(value))[1](tangents)[0]


def transposed(
    condition: Condition,
    rows: int = 0,
    recorded_pull: Pull | None = None,
) -> Condition:
    """The condition A(z, theta)' u + g = 0 for u, with theta' = (g, z, *theta), that reverse mode solves.

    `recorded_pull` is the pullback of R, `recorded` at all the `rows` samples, where the caller has it.
    """

    def bind(z: Tensor, *theta: Tensor) -> Map:
        if (known := recorded_pull) is not None and len(z) == rows:
            return lambda u: -known(u, [0])[0]
        _, pull = pullback(condition.at(*theta), z)
        return lambda u: -pull(u)[0]

    linear = _linear(condition, bind, "the backward solve of " + condition.name)
    if recorded_pull is None or condition.graphs is None or condition.graphs.pullback is None:
        return linear
    return replace(linear, graphs=Graphs(condition.graphs.pullback))


def pushed(condition: Condition) -> Condition:
    """The condition A(z, theta) v + b = 0 for v, with theta' = (b, z, *theta), that forward mode solves."""

    def bind(z: Tensor, *theta: Tensor) -> Map:
        residual = condition.at(*theta)
        return lambda v: -push(residual, (z,), (v,))

    return _linear(condition, bind, "the forward-mode solve of " + condition.name)


def _linear(condition: Condition, bind: Callable[..., Map], name: str) -> Condition:
    sample_dims = None if condition.sample_dims is None else (0, 0, *condition.sample_dims)
    message = condition.report.message or partial(explain, remedy=LINEAR_REMEDY)
    report = replace(condition.report, unpack=None, message=message, of_derivative=True)
    snapshot = condition.snapshot
    return Condition(bind, name, condition.dtype, report, linear=True, sample_dims=sample_dims, snapshot=snapshot)


def _mapped(
    condition: Condition, in_dims: tuple[int | None, ...], size: int, theta: tuple[Tensor, ...]
) -> tuple[Condition, tuple[Tensor, ...]]:
    """The condition on `(size * B, n)` that states `condition` for each of `size` thetas, and its theta."""
    if condition.linear:  # b has one row a sample, like the unknown
        theta, in_dims = (merge_rows(theta[0], in_dims[0], size), *theta[1:]), in_dims[1:]

    def bind(*theta: Tensor) -> Map:
        def mapped(part: Callable[[Any], Map]) -> Map:
            def one(rows: tuple[Tensor, ...], *theta: Tensor) -> Any:
                return part(condition.bind(*theta))(*rows)

            over = vmap(one, in_dims=(0, *in_dims), randomness="different")

            def call(*rows: Tensor) -> Any:
                value = over(tuple(split_rows(x, size) for x in rows), *theta)
                return pytree.tree_map(lambda v: v.flatten(0, 1), value)

            return call

        if condition.kind is None:
            return mapped(lambda residual: residual)
        return condition.kind(**{part.name: mapped(attrgetter(part.name)) for part in fields(condition.kind)})

    report = replace(condition.report, unpack=None)
    return replace(condition, bind=bind, report=report, sample_dims=None, graphs=None, pull=None), theta
