"""Bilevel problems: how the parameters of a trained model depend on its hyperparameters.

Any training loop may solve the inner problem, w* = argmin_w inner(w, lambda). At its solution the gradient
vanishes, so by the implicit function theorem dw*/dlambda = -H^-1 d(grad inner)/dlambda, with H the Hessian of
the inner loss. One linear solve, by products with H, gives the gradient of any outer loss, however many
hyperparameters there are::

    def inner_loss(w, decay):                              # one weight decay per parameter
        data = cross_entropy(functional_call(model, w, (x,)), y)
        return data + sum((decay[name] * w[name] ** 2).sum() for name in w)

    train(model, decay)                                    # the usual loop
    w = im.implicit_gradient(inner_loss, dict(model.named_parameters()), decay)
    cross_entropy(functional_call(model, w, (x_val,)), y_val).backward()

Sources: Pedregosa, "Hyperparameter optimization with approximate gradient", ICML 2016 (conjugate gradients);
Lorraine, Vicol and Duvenaud, "Optimizing Millions of Hyperparameters by Implicit Differentiation", AISTATS 2020
(the Neumann series); Rajeswaran, Finn, Kakade and Levine, "Meta-Learning with Implicit Gradients", NeurIPS 2019.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, grad
from torch.utils import _pytree as pytree

from implicitly.argmin.refused import explaining_refusals
from implicitly.checks import check_listener
from implicitly.condition import REMEDY, Condition, Map, explain
from implicitly.functions import open_function
from implicitly.graph_break import one_break
from implicitly.implicit import Backward, attach_usable, find
from implicitly.iterate import Found, Proposal, Solver
from implicitly.linear import CG, check_linear_solver
from implicitly.problem import Problem
from implicitly.pullback import pullback
from implicitly.solution import Status
from implicitly.transforms import records, under_transform
from implicitly.tree import Layout, row_norm


@one_break
def implicit_gradient(
    inner_loss: Callable[..., Any],
    params: Any,
    *hyper: Any,
    linear_solver: Solver = CG(),
    damping: float = 0.0,
    tolerance: float | None = 1e-2,
    batch_dims: int = 0,
    in_dims: Any = None,
    on_failure: str = "warn",
    listen: Callable[[Found], None] | None = None,
) -> Any:
    """The trained `params`, with their derivative with respect to `hyper`, as the minimum of inner_loss::

        w = im.implicit_gradient(inner_loss, dict(model.named_parameters()), decay)
        validation_loss(functional_call(model, w, (x,)), y).backward()      # fills decay.grad

    The training is neither recorded nor repeated. At a stationary point the derivative is exact, of any order and
    in both modes. One gradient of the loss is recorded, and each step of `linear_solver` takes one Hessian-vector
    product through it: memory does not grow with the steps.

    Args:
        inner_loss: `inner_loss(params, *hyper)`, the whole training loss, deterministic and 0-d; `(B,)` with
            `batch_dims=1`. Parameters of modules that it uses are hyperparameters too, unless they are among
            `params`. For a stochastic loss, pass a closure over a large batch.
        params: the result of the training: a tensor or a pytree of tensors of one dtype. They get no gradient.
        hyper: tensors, pytrees of them, or anything else. Hyperparameters that are not used get a zero gradient.
        linear_solver: `CG` for a minimum; it reports SINGULAR if it meets a direction without positive curvature.
            `Neumann(damping=step)`, with a step below 2 / (largest eigenvalue). `GMRES` for any stationary point;
            `DenseLU` for few parameters. `rtol=0`: a truncated solve of exactly `max_steps` steps, no report.
        damping: added to a Hessian that is singular, ill-conditioned or slightly indefinite. It biases the
            gradient: the result is that of an inner loss with the extra term damping / 2 * |w - params|^2.
        tolerance: how far `params` may be from stationary, as the length, relative to |params|, of the best step
            along the gradient: a lower bound of the distance. None skips this test and its Hessian product.
        batch_dims: 0: one problem. 1: dimension 0 of every tensor of params holds independent problems.
        in_dims: with `batch_dims=1`, which of `hyper` have one entry per problem, as in `torch.vmap`.
        on_failure: "warn", "raise" or "ignore" if params are not stationary or a linear solve falls short. The
            derivative is zero where params or gradients are NaN, and where a linear solve breaks down or ends
            (as after `max_steps`, except with `rtol=0`) with a relative residual above 0.1.
        listen: called with the `Found` (residual, steps) of every backward solve, for logging.

    Returns `params`: same values, structure, dtype and device.

    Raises:
        TypeError, ValueError: for a loss that is not a scalar or ignores params, invalid options, or a tensor that
            requires gradients and is neither in `hyper` nor a parameter of a module.
        SolverError: with `on_failure="raise"`.
    """
    layout = Layout.of(params, batch_dims, "params")
    _check_options(linear_solver, damping, tolerance, listen, layout)
    gradient = _gradient(inner_loss, batch_dims)
    options = {"layout": layout, "in_dims": in_dims, "recording": False}
    state = partial(Problem.of, gradient, params, hyper, lambda w, dw: -dw, **options)
    tolerance = tolerance if records() else None  # without a derivative the test would serve nothing
    look = partial(_looked_at, state, inner_loss, params, tolerance, on_failure)
    problem, theta, found = explaining_refusals("implicit_gradient", inner_loss, look)
    condition = _condition(problem, damping, on_failure)
    attached = attach_usable(found, condition, (found.z, *theta), Backward(linear_solver, listen=listen))
    return layout.unpack(attached)


def proximal(loss: Callable[..., Any], batch_dims: int = 0) -> Callable[..., Any]:
    """The inner objective of implicit meta-learning, loss(w, *args) + weight / 2 * |w - w0|^2.

    Returns the function `objective(w, w0, weight, *args)`. The parameters w that are adapted to a task, but kept
    near the shared w0, depend on w0 and `weight`, however they were adapted::

        objective = im.proximal(task_loss, batch_dims=1)          # task_loss(w, x, y) gives (B,), one a task
        w = adapt(objective, w0, weight, x, y)                    # any loop; every tensor of w is (B, ...)
        w = im.implicit_gradient(objective, w, w0, weight, x, y, batch_dims=1, in_dims=(None, None, 0, 0))
        task_loss(w, x_test, y_test).sum().backward()             # fills the gradients of w0, and of weight

    Args:
        loss: `loss(w, *args)`, 0-d; with `batch_dims=1` `(B,)`.
        batch_dims: 1: dimension 0 of every tensor of w is over tasks; tensors of w0 may have it or be shared.

    In the objective `weight` is a number, a 0-d tensor, or `(B,)`. For the adapted parameters to be a minimum, it
    must be larger than minus the smallest eigenvalue of the loss's Hessian.

    Source: Rajeswaran et al. 2019, equation 3; the meta-gradient of w0 is weight * (H + weight)^-1 g.
    """
    if not callable(loss):
        raise TypeError(f"loss must be callable, got a {type(loss).__name__}")
    if batch_dims not in (0, 1):
        raise ValueError(f"batch_dims must be 0 (one task) or 1 (a batch of tasks), got {batch_dims}")

    def objective(w: Any, w0: Any, weight: Any, *args: Any) -> Tensor:
        flat, spec = pytree.tree_flatten(w)
        flat0, spec0 = pytree.tree_flatten(w0)
        if spec != spec0:
            raise ValueError(f"w and w0 must have the same structure: w has {spec}, w0 {spec0}")
        for x, x0 in zip(flat, flat0):
            if tuple(x0.shape) not in (tuple(x.shape), tuple(x.shape[batch_dims:])):
                shared = f", or {tuple(x.shape[1:])} where the tasks share it" if batch_dims else ""
                raise ValueError(
                    f"w0 must have the shapes of w: expected {tuple(x.shape)}{shared}, got {tuple(x0.shape)}"
                )
        value = _checked(loss(w, *args), flat[0], batch_dims, "loss")
        apart = [(x - x0).reshape(*x.shape[:batch_dims], -1) for x, x0 in zip(flat, flat0)]
        squares = [torch.linalg.vecdot(d, d).real for d in apart]
        return value + weight / 2 * sum(squares)

    return objective


# ------------------------------------------------------------------------------------------- the condition


def _gradient(inner_loss: Callable[..., Any], batch_dims: int) -> Callable[..., Any]:
    """The function (w, *hyper) -> gradient of the inner loss by w, which checks what the loss returns."""
    if not callable(inner_loss):
        raise TypeError(f"inner_loss must be callable, got a {type(inner_loss).__name__}")

    def gradient(w: Any, *hyper: Any) -> Any:
        def total(w: Any) -> Tensor:
            value = _without_side_effects(inner_loss, w, hyper)
            return _checked(value, pytree.tree_leaves(w)[0], batch_dims, "inner_loss").sum()

        return grad(total)(w)

    return gradient


def _checked(value: Any, like: Tensor, batch_dims: int, name: str) -> Tensor:
    """The `value` that the loss returned.

    Raises TypeError / ValueError unless it is one real number for each problem of the parameters `like`.
    """
    shape = tuple(like.shape[:batch_dims])
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must return a tensor, got a {type(value).__name__}")
    if tuple(value.shape) != shape or not value.is_floating_point():
        raise ValueError(
            f"{name} must return one real value{' per problem' if batch_dims else ''}: expected shape {shape}, "
            f"got {value.dtype} of shape {tuple(value.shape)}; "
            + ("sum over everything but dimension 0" if batch_dims else "take its .mean() or .sum()")
        )
    return value


def _without_side_effects(inner_loss: Callable[..., Any], w: Any, hyper: tuple[Any, ...]) -> Any:
    """inner_loss(w, *hyper), without changing buffers of modules, such as running statistics."""
    host = open_function(inner_loss, hyper, pytree.tree_leaves(w)[0].device).opened.host
    buffers = {name: b.clone() for name, b in host.named_buffers()}
    if not buffers:
        return inner_loss(w, *hyper)
    return functional_call(host, buffers, (inner_loss, w, *hyper), tie_weights=False)


def _condition(problem: Problem, damping: float, on_failure: str) -> Condition:
    """The condition -grad inner(z) - damping (z - anchor) = 0, with theta = (anchor, ...).

    Its signs make the matrix of its linear systems the damped Hessian, which is positive definite at a minimum.
    """
    plain = problem.condition("implicit_gradient", on_failure)

    def bind(anchor: Tensor, *theta: Tensor) -> Map:
        residual = plain.at(*theta)
        return (lambda z: residual(z) - damping * (z - anchor)) if damping else residual

    sample_dims = None if plain.sample_dims is None else (0, *plain.sample_dims)
    report = replace(plain.report, message=_solve_fell_short)
    return replace(plain, bind=bind, sample_dims=sample_dims, report=report)


_HESSIAN_REMEDY = {
    **REMEDY,
    Status.MAX_STEPS: "more max_steps, a looser rtol, or rtol=0 for a truncated solve of exactly max_steps steps; "
    "damping makes the system better conditioned (and biases the gradient)",
    Status.STAGNATED: "damping, which makes the system better conditioned (and biases the gradient); float64; or "
    "rtol=0 for a truncated solve of exactly max_steps steps",
    Status.DIVERGED: "a damping of Neumann below 2 / (largest eigenvalue of the Hessian), or CG",
    Status.SINGULAR: "(the Hessian is singular, or has no positive curvature along a direction that CG met: "
    "params are no strict minimum) train on, regularise inner_loss, add damping (which biases the "
    "gradient), or use GMRES, which takes any stationary point",
    Status.NON_FINITE: "finite params, data and outer gradients: a second derivative of inner_loss, or the "
    "gradient of the outer loss, is NaN or inf",
}


def _solve_fell_short(name: str, solver: Solver, found: Found, failed: Tensor) -> str:
    return explain(name, solver, found, failed, _HESSIAN_REMEDY)


def _looked_at(
    state: Callable[[], Problem],
    inner_loss: Callable[..., Any],
    params: Any,
    tolerance: float | None,
    on_failure: str,
) -> tuple[Problem, tuple[Tensor, ...], Found]:
    """The problem, its theta as `_wanted`, and the params as the point that a solver would have found."""
    problem = state()
    theta = _wanted(problem, inner_loss, params)
    return problem, theta, _as_given(problem, theta, tolerance, on_failure)


def _wanted(problem: Problem, inner_loss: Callable[..., Any], params: Any) -> tuple[Tensor, ...]:
    """The theta of `problem`, with module parameters detached that are no hyperparameters.

    Those are parameters that `inner_loss` does not use, or that are the `params`: the loss closes over a module
    whose parameters it replaces by w, but these are not hyperparameters.

    Raises ValueError if the loss does not depend on params.
    """
    inner = pytree.tree_leaves(params)
    first = len(problem.theta) - len(problem.opened.parameters)
    own = [i for i in range(first, len(problem.theta)) if not any(problem.theta[i] is w for w in inner)]
    unused = set(range(first, len(problem.theta))) - set(own)
    if records() and not under_transform():
        opened = replace(problem.opened, f=lambda w, *hyper: _without_side_effects(inner_loss, w, hyper))
        leaves = [w.detach().requires_grad_() for w in inner]
        theta = [t.detach().requires_grad_() if i in own else t.detach() for i, t in enumerate(problem.theta)]
        with torch.enable_grad():
            value = opened(pytree.tree_unflatten(leaves, problem.layout.spec), *theta).sum()
        wanted = [*leaves, *(theta[i] for i in own)]
        gradients: Any = [None] * len(wanted)
        if value.requires_grad:
            gradients = torch.autograd.grad(value, wanted, allow_unused=True)
        if all(g is None for g in gradients[: len(leaves)]):
            raise ValueError(
                "inner_loss does not depend on its first argument, the params: call the model with them, as in "
                "torch.func.functional_call(model, w, (x,)), not model(x)"
            )
        unused |= {i for i, g in zip(own, gradients[len(leaves) :]) if g is None}
    return tuple(t.detach() if i in unused else t for i, t in enumerate(problem.theta))


# --------------------------------------------------------------------------- the trained params as a solution


@dataclass(frozen=True, kw_only=True)
class _AsGiven(Solver):
    """Stands in for a solver, as the user has already solved: keeps the point, and lets the loop test it."""

    max_steps: int = 1

    def start(self, F: Any, z: Tensor, r: Tensor) -> tuple[Tensor, ...]:
        """The memory: nothing."""
        return ()

    def propose(self, F: Any, k: int | Tensor, z: Tensor, r: Tensor, memory: Any) -> Proposal:
        """The same point."""
        return Proposal(z, residual=r)


def _as_given(problem: Problem, theta: tuple[Tensor, ...], tolerance: float | None, on_failure: str) -> Found:
    """The params as a found point: MAX_STEPS if they are not stationary, NON_FINITE if the test gives NaN."""
    plain = problem.condition("implicit_gradient", on_failure, relative_to_iterate=True)
    plain = replace(plain, report=replace(plain.report, message=_not_stationary))
    if tolerance is None:
        return find(_AsGiven(rtol=0), plain, problem.z0, theta, problem.r0)
    condition = replace(plain, bind=lambda *theta: _cauchy_step(plain.at(*theta)))
    return find(_AsGiven(rtol=tolerance, atol=0), condition, problem.z0, theta)


def _cauchy_step(residual: Map) -> Map:
    """The Cauchy step z -> -g / (curvature along g), to the minimum of the quadratic model along the gradient."""

    def step(z: Tensor) -> Tensor:
        r, pull = pullback(residual, z)
        size = row_norm(r)[:, None]
        along = r / torch.where(size == 0, 1.0, size)
        curvature = torch.linalg.vecdot(along, pull(along)[0]).abs()[:, None]
        return r / curvature.clamp(min=torch.finfo(z.dtype).eps ** 2)

    return step


def _not_stationary(name: str, solver: Solver, found: Found, failed: Tensor) -> str:
    far = (found.residual / row_norm(found.z))[failed]
    worst = torch.where(far.isfinite(), far, math.inf).argmax()
    count = f"{len(failed)} of {len(found.status)} problems, worst number {int(failed[worst])}"
    if found.status[failed[worst]] == int(Status.NON_FINITE):
        return (
            f"{name}: params, or first or second derivatives of inner_loss at them, are NaN or inf ({count}); "
            "their derivative is zero. Check the training, and the data of inner_loss"
        )
    return (
        f"{name}: params are not stationary for inner_loss ({count}): the best step along its gradient would move "
        f"them by {float(far[worst]):.2g} of their norm (tolerance {solver.rtol:g}), so the derivative is only "
        "approximate. Try: train longer (with a smaller learning rate, or L-BFGS); pass exactly the loss that was "
        "trained as inner_loss; or raise tolerance, if that is close enough"
    )


def _check_options(solver: Solver, damping: Any, tolerance: float | None, listen: Any, layout: Layout) -> None:
    check_linear_solver(solver)
    solver.tolerances(layout.dtype)
    if not (isinstance(damping, int | float) and not isinstance(damping, bool) and 0 <= damping < math.inf):
        raise ValueError(f"damping must be a finite number >= 0, got {damping!r}")
    check_listener("implicit_gradient", listen)
    if tolerance is not None and not 0 < tolerance < math.inf:
        raise ValueError(f"tolerance must be a positive number, or None for no test, got {tolerance!r}")
