"""Optimality conditions of a minimum: a residual of first order, and a check of second order.

The first-order condition is a residual like any other, so the implicit function theorem gives the derivative of
the minimum. Each form of the problem (without constraints, with a projection, with equations) also says which
symmetric operator on `(B, n)` must have no negative eigenvalue for a stationary point to be a minimum.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from implicitly.adjoints import Adjoint
from implicitly.argmin.curvature import smallest_curvature
from implicitly.condition import Condition, Map, Report
from implicitly.descent import Descent, inverse_norm, value_and_descent
from implicitly.functions import open_function
from implicitly.host import maybe_any
from implicitly.implicit import push
from implicitly.iterate import Found, where_rows
from implicitly.problem import Problem, sample_dims_of
from implicitly.pullback import pullback
from implicitly.solution import Solution, Status
from implicitly.transforms import casts
from implicitly.tree import Layout, real_parts, row_norm

Function = Callable[..., Any]


@dataclass(frozen=True)
class Form(ABC):
    """Base class: a form in which an optimisation problem is stated as a condition."""

    # The name of the entry point, in messages.
    name: ClassVar[str] = "argmin"
    # What it gives solvers besides the residual, by name (`Solver.needs`) and by type (`Condition.kind`).
    offers: ClassVar[tuple[str, ...]]
    kind: ClassVar[type]
    # Whether z + residual is an iteration that inexact adjoints may differentiate.
    iterates: ClassVar[bool] = False
    # Which solvers to suggest where the user's does not fit.
    try_solver: ClassVar[str]

    def noise(self, F: Any, z: Tensor, slope: Tensor) -> Tensor:
        """How far the residual at z moves, `(B,)`, when the gradient changes by `slope` `(B,)`."""
        return slope

    @abstractmethod
    def problem(
        self, objective: Function, z0: Any, args: tuple[Any, ...], layout: Layout, in_dims: Any, recording: bool
    ) -> Problem:
        """The opened problem; raises TypeError / ValueError if its functions return what they should not."""

    @abstractmethod
    def curvature(self, F: Any, z: Tensor) -> tuple[Map, Tensor]:
        """The operator that is positive semidefinite at a minimum `z`, and a tensor like its argument `(B, n)`."""

    def condition(
        self, problem: Problem, on_failure: str, convex: bool, rounding: float, rtol: float
    ) -> Condition:
        """The condition of `problem`; the points found are checked to be minima, unless the problem is `convex`.

        A gradient that is as small as its rounding error, `rounding` relative to the terms that it is made of,
        counts as zero whatever `rtol`, also for samples that no step improves any more.
        """
        report = Report(on_failure, partial(self.solution, problem))
        plain = problem.condition(self.name, on_failure)
        scale = partial(gradient_scale, self.noise, rounding / rtol if rtol else 0.0)
        examine = partial(self._examine, plain.dtype, convex, rounding, rtol)
        return replace(plain, report=report, kind=self.kind, scale=scale, examine=examine)

    def attach(self, how: Adjoint, found: Found, condition: Condition, problem: Problem) -> Tensor:
        """The found point `(B, n)` with its derivative."""
        return how.attach(found, condition, problem)

    def solution(self, problem: Problem, found: Found, attached: Tensor | None = None) -> Solution:
        """The `Solution` for the user; `attached` `(B, n)` is the found point with its derivative."""
        return problem.solution(found, attached)

    def _examine(
        self, dtype: torch.dtype, convex: bool, rounding: float, rtol: float, F: Any, found: Found
    ) -> Found:
        """`found` with corrected statuses.

        Samples that only rounding kept from their tolerance are CONVERGED. Converged ones at which the objective
        has a direction of negative curvature are NOT_MINIMUM.
        """
        stuck = (found.status == int(Status.STAGNATED)) | (found.status == int(Status.DIVERGED))
        if rounding > 0 and found.z.shape[1] > 0 and maybe_any(stuck):
            scale = rounding_scale(self.noise, 1.0, F, found.z, F(found.z))
            settled = stuck & (found.residual <= rounding * scale)
            found = found._replace(status=torch.where(settled, int(Status.CONVERGED), found.status))
        converged = found.status == int(Status.CONVERGED)
        if convex or not maybe_any(converged) or found.z.shape[1] == 0:
            return found
        least, most = smallest_curvature(*self.curvature(F, found.z))
        # Rounding, and the distance to the exact point, may turn a zero into an eigenvalue of this size.
        falls = least < -(torch.finfo(dtype).eps ** 0.5) * most
        return found._replace(status=torch.where(converged & falls, int(Status.NOT_MINIMUM), found.status))


def gradient_scale(noise: Callable[..., Tensor], share: float, F: Any, z: Tensor, r: Tensor) -> Tensor:
    """The scale of tolerances, `(B,)`: the residual at the start, or the scale of its rounding errors if larger.

    The latter matters for a start at the solution, where the residual cannot shrink.
    """
    return torch.maximum(row_norm(r), rounding_scale(noise, share, F, z, r))


def rounding_scale(noise: Callable[..., Tensor], share: float, F: Any, z: Tensor, r: Tensor) -> Tensor:
    """The scale of rounding errors in a residual r at z, `(B,)`: how much r changes over a step of length |z|.

    Times eps, that is the effect of rounding z. At z = 0 it says nothing. But the terms that add up to an
    objective f have slopes of about (curvature * f)^(1/2): their effect on the residual, by `noise`, times
    `share`, is a lower bound of the scale.
    """
    norm, at_zero = row_norm(r), (z == 0).all(1)
    if share == 0 and not maybe_any(~at_zero):
        return torch.zeros_like(norm)
    along = where_rows(at_zero, inverse_norm(r) * r, z)

    def change_of(f: Map) -> Tensor:
        change = row_norm(push(f, (z,), (along,)))
        return torch.where(change.isfinite(), change, 0.0)

    change = change_of(lambda z: F(z))
    scale = change.masked_fill(at_zero, 0.0)
    if share == 0:
        return scale
    length = row_norm(along)
    if not isinstance(F, Descent):  # of a Descent, the residual is itself the slope
        change = change_of(lambda z: F.evaluate(z)[-1])
    curvature = change / torch.where(length == 0, 1.0, length)
    slope = (curvature * F.evaluate(z)[0].abs().to(norm.dtype)).sqrt()
    return torch.maximum(scale, share * noise(F, z, torch.where(slope.isfinite(), slope, 0.0)))


@dataclass(frozen=True)
class Unconstrained(Form):
    """Unconstrained minimisation: the gradient of the objective vanishes."""

    offers: ClassVar[tuple[str, ...]] = ("objective",)
    kind: ClassVar[type] = Descent
    try_solver: ClassVar[str] = "LBFGS, GradientDescent or Newton"

    def problem(
        self, objective: Function, z0: Any, args: tuple[Any, ...], layout: Layout, in_dims: Any, recording: bool
    ) -> Problem:
        """The problem for an objective with one value per sample."""
        opening = open_function(objective, args, layout.device)
        opened = opening.opened

        def bind(*theta: Tensor) -> Descent:
            return descent_of(rows_of(opened.at(*theta), layout), theta)

        def first(z: Tensor, *theta: Tensor) -> Tensor:
            call = opened.at(*theta)
            return descent_of(rows_of(lambda z: check_values(call(z), layout), layout), theta)(z)

        sample_dims = sample_dims_of(opening, args, layout, in_dims)
        return Problem.stated(opening, layout, z0, bind, first, sample_dims=sample_dims, recording=recording)

    def curvature(self, F: Descent, z: Tensor) -> tuple[Map, Tensor]:
        """The Hessian."""
        return hessian_at(F, z), z


@dataclass(frozen=True)
class LeastSquares(Form):
    """Nonlinear least squares: the gradient of half the sum of squares of the residuals vanishes.

    Its objective returns these residuals.
    """

    name: ClassVar[str] = "least_squares"
    offers: ClassVar[tuple[str, ...]] = ("objective", "residuals")
    kind: ClassVar[type] = Descent
    try_solver: ClassVar[str] = "LevenbergMarquardt, GaussNewton or LBFGS"

    def problem(
        self, objective: Function, z0: Any, args: tuple[Any, ...], layout: Layout, in_dims: Any, recording: bool
    ) -> Problem:
        """The problem for residuals `(B, ...)`, or a pytree of them."""
        opening = open_function(objective, args, layout.device)
        opened = opening.opened

        def squares_of(call: Function, theta: tuple[Tensor, ...]) -> Descent:
            def residuals(z: Tensor) -> Tensor:
                real = [real_parts(x) for x in pytree.tree_leaves(call(layout.unpack(z)))]
                # The slice gives the width of a sample also for an empty batch, where it is zero.
                rows = [x.reshape(len(z), x[:1].numel() if layout.batch_dims else x.numel()) for x in real]
                return torch.cat(rows, 1).to(z.dtype)

            return descent_of(lambda z: residuals(z).square().sum(1) / 2, theta, residuals)

        def bind(*theta: Tensor) -> Descent:
            return squares_of(opened.at(*theta), theta)

        def first(z: Tensor, *theta: Tensor) -> Tensor:
            call = opened.at(*theta)
            return squares_of(lambda z: check_residuals(call(z), layout), theta)(z)

        sample_dims = sample_dims_of(opening, args, layout, in_dims)
        return Problem.stated(opening, layout, z0, bind, first, sample_dims=sample_dims, recording=recording)

    def curvature(self, F: Descent, z: Tensor) -> tuple[Map, Tensor]:
        """The Hessian."""
        return hessian_at(F, z), z


def rows_of(call: Function, layout: Layout) -> Callable[[Tensor], Tensor]:
    """The objective `call` as a function of matrices `(B, n)` instead of states, with values `(B,)`."""
    return lambda z: call(layout.unpack(z)).reshape(len(z))


def descent_of(
    objective: Callable[[Tensor], Tensor],
    theta: tuple[Tensor, ...],
    residuals: Callable[[Tensor], Tensor] | None = None,
) -> Descent:
    """The `Descent` of an `objective` of matrices, which also depends on `theta`."""
    return Descent(
        lambda z: value_and_descent(objective, z, theta)[1],
        lambda z: value_and_descent(objective, z, theta),
        residuals,
    )


def hessian_at(F: Descent, z: Tensor) -> Map:
    """The map from v `(B, n)` to H v, with H the Hessian at z."""
    _, pull = pullback(F.residual, z)
    return lambda v: -pull(v)[0]


def check_values(values: Any, layout: Layout) -> Tensor:
    """The `values` that the objective returned; raises TypeError / ValueError unless there is one per sample."""
    if not isinstance(values, Tensor):
        raise TypeError(f"objective must return a tensor, one value per sample; got a {type(values).__name__}")
    expected = (layout.batch,) if layout.batch_dims else ()
    if tuple(values.shape) != expected:
        remedy = "sum the terms of each sample, as in .sum(-1)"
        if values.ndim == 0:
            remedy = "do not sum over the samples, or pass batch_dims=0 for one system"
        came = tuple(values.shape)
        raise ValueError(f"objective must return one value per sample: expected {expected}, got {came}; {remedy}")
    if not values.is_floating_point():
        raise TypeError(f"objective must return real numbers, got {values.dtype}")
    _check_kind(values, layout, "objective")
    return values


def check_residuals(residuals: Any, layout: Layout) -> Any:
    """The `residuals` that the function returned; raises TypeError / ValueError unless each sample has its own."""
    leaves = pytree.tree_leaves(residuals)
    if not leaves:
        raise ValueError("residuals must return a tensor or a pytree of tensors, but it returned no tensor")
    for x in leaves:
        if not isinstance(x, Tensor):
            raise TypeError(f"residuals must return tensors, got a {type(x).__name__}")
        if layout.batch_dims and (x.ndim == 0 or x.shape[0] != layout.batch):
            raise ValueError(
                f"residuals must return the residuals of each sample along dimension 0: expected "
                f"({layout.batch}, ...), got {tuple(x.shape)}"
            )
        _check_kind(x, layout, "residuals")
    return residuals


def _check_kind(x: Tensor, layout: Layout, name: str) -> None:
    if x.dtype.to_real() != layout.dtype and not casts(layout.device.type):
        raise ValueError(
            f"{name} must return the dtype of z0: expected {layout.dtype}, got {x.dtype}; mixed dtypes usually "
            "come from an argument or parameter of another dtype"
        )
    if x.device != layout.device:
        raise ValueError(f"{name} must return the device of z0: expected {layout.device}, got {x.device}")
