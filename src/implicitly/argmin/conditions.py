"""What a minimum must satisfy, in its forms: the condition, the objective for solvers, and the check of its order.

The first-order condition is a residual like any other, so the theorem differentiates it. Each form says too
which operator, symmetric on `(B, n)`, must be positive (semi)definite for a stationary point to be a minimum.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from implicitly.argmin.curvature import smallest_curvature
from implicitly.descent import Descent, value_and_descent
from implicitly.implicit import Condition, Map
from implicitly.iterate import Found, Status
from implicitly.problem import Problem, carries_of
from implicitly.tree import Layout, open_function, pullback


@dataclass(frozen=True)
class Form:
    """How an optimisation problem is stated as a condition, and to whom.

    Attributes:
        name: of the entry point, in messages.
        offers: what of it solvers may need, see `Solver.needs`.
        try_solver: what to name where a solver does not fit.
    """

    name: str
    offers: tuple[str, ...]
    try_solver: str


def check_values(values: Any, layout: Layout, name: str = "objective") -> Tensor:
    """`values`, which the objective returned; raises TypeError / ValueError unless it is one a sample."""
    if not isinstance(values, Tensor):
        raise TypeError(f"{name} must return a tensor, one value a sample; got a {type(values).__name__}")
    expected = (layout.batch,) if layout.batch_dims else ()
    if tuple(values.shape) != expected:
        remedy = "add up each sample's own terms, as in .sum(-1)"
        if values.ndim == 0:
            remedy = "do not add up over the samples; batch_dims=0 is for one system"
        came = tuple(values.shape)
        raise ValueError(f"{name} must return one value a sample: expected {expected}, got {came}; {remedy}")
    if not values.is_floating_point():
        raise TypeError(f"{name} must return real numbers, got {values.dtype}")
    if values.dtype != layout.dtype and not torch.is_autocast_enabled(layout.device.type):
        raise ValueError(
            f"{name} must return the dtype of z0: expected {layout.dtype}, got {values.dtype}; mixed dtypes "
            "usually come from an argument or parameter of another dtype"
        )
    if values.device != layout.device:
        raise ValueError(f"{name} must return the device of z0: expected {layout.device}, got {values.device}")
    return values


def unconstrained(
    objective: Callable[..., Any], z0: Any, args: tuple[Any, ...], layout: Layout, in_dims: Any, recording: bool
) -> Problem:
    """The gradient of the objective vanishes."""
    opened = open_function(objective, args, layout.device)

    def bind(*theta: Tensor) -> Descent:
        call = opened.at(*theta)
        return descent_of(lambda z: call(layout.unpack(z)).reshape(len(z)), theta)

    def first(z: Tensor, *theta: Tensor) -> Tensor:
        call = opened.at(*theta)
        return descent_of(lambda z: check_values(call(layout.unpack(z)), layout).reshape(len(z)), theta)(z)

    carries = carries_of(opened, args, layout, in_dims)
    return Problem.stated(opened, layout, z0, bind, first, carries=carries, recording=recording)


def descent_of(
    objective: Callable[[Tensor], Tensor],
    theta: tuple[Tensor, ...],
    residuals: Callable[[Tensor], Tensor] | None = None,
) -> Descent:
    """The descent of an `objective` of matrices, which depends on `theta` besides."""
    return Descent(
        lambda z: value_and_descent(objective, z, theta)[1],
        lambda z: value_and_descent(objective, z, theta),
        residuals,
    )


def condition_of(problem: Problem, name: str, on_failure: str, convex: bool) -> Condition:
    """The condition that `problem` states; unless `convex`, its stationary points are checked to be minima."""
    condition = replace(problem.condition(name, on_failure), kind=Descent)
    return condition if convex else replace(condition, examine=partial(_examine, condition.dtype))


def _examine(dtype: torch.dtype, F: Descent, found: Found) -> Found:
    """`found`, in which points that the objective falls from, in second order, are told from minima."""
    return refused_unless_positive(found, lambda: hessian_at(F, found.z), found.z, dtype)


def hessian_at(F: Descent, z: Tensor) -> Map:
    """v `(B, n)` to H v, with H the Hessian at z."""
    _, pull = pullback(F.residual, z)
    return lambda v: -pull(v)[0]


def refused_unless_positive(found: Found, operator: Callable[[], Map], like: Tensor, dtype: torch.dtype) -> Found:
    """`found`, where converged samples whose symmetric `operator` has a negative eigenvalue are NOT_MINIMUM."""
    converged = found.status == int(Status.CONVERGED)
    if not bool(converged.any()) or like.shape[1] == 0:
        return found
    least, most = smallest_curvature(operator(), like)
    # Less than this is what rounding, and the distance to the exact point, leave of a zero.
    falls = least < -(torch.finfo(dtype).eps ** 0.5) * most
    return found._replace(status=torch.where(converged & falls, int(Status.NOT_MINIMUM), found.status))
