"""Minima over a set given by its projection: the optimality condition, and `ProjectedGradient`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from implicitly.argmin.accelerated import Accelerated, ProximalStep, check_step
from implicitly.argmin.conditions import Form, Function, check_values, descent_of, rows_of
from implicitly.condition import Map
from implicitly.functions import open_function
from implicitly.host import maybe_any
from implicitly.implicit import push
from implicitly.iterate import Found, Proposal, Residual, Solver
from implicitly.problem import Problem, sample_dims_of
from implicitly.pullback import pullback
from implicitly.solution import Status
from implicitly.tree import Layout, row_norm


@dataclass(frozen=True)
class Projected:
    """The residual R(z) = P(z - t gradient) - z, and the functions it is made of.

    Attributes:
        residual: maps z `(B, n)` to R(z).
        evaluate: maps z to the objective `(B,)` and minus its gradient `(B, n)`, in one call.
        project: the projection P.
        from_descent: maps z and minus the gradient there to R(z).
    """

    residual: Residual
    evaluate: Callable[[Tensor], tuple[Tensor, Tensor]]
    project: Residual
    from_descent: Callable[[Tensor, Tensor], Tensor]

    def __call__(self, z: Tensor) -> Tensor:
        """R at `z` `(B, n)`."""
        return self.residual(z)


@dataclass(frozen=True)
class _Pair:
    """Objective and constraint as one function, so that `open_function` opens both at once."""

    objective: Function
    constraint: Function

    def __call__(self, z: Any, *args: Any) -> tuple[Any, Any]:
        return self.objective(z, *args), self.constraint(z, *args)


@dataclass(frozen=True)
class Projection(Form):
    """A feasible set given by its Euclidean projection P; at a minimum z = P(z - step * gradient).

    A bare function P as `constraint` means `Projection(P)`. The derivative of the minimum is that of this fixed
    point, so P must be differentiable there with respect to z and to the `args` it uses (it is, except where a
    constraint is active with a multiplier of zero). Every `step` states the same condition. But `step` decides how
    well conditioned the backward solve is (best near one over the curvature of the objective), and it is the step
    size of `FixedPointIteration` and `PhantomAdjoint`. If the step is so short that rounding loses it beside z,
    the sample ends as STAGNATED.

    Args:
        P: `P(z, *args)` returns the nearest point of the set, like z; for example
            `lambda z, x, radius: im.project.l2_ball(z, radius)`.
            A proximal map adds a term to the objective instead: `im.prox.l1(z, step * weight)` adds
            weight * |z|_1, as in a lasso. `ProjectedGradient` cannot minimise such a sum, but
            `FixedPointIteration` and `Anderson` find z = P(...).
        step: the factor of the gradient.
    """

    P: Function
    step: float = 1.0

    offers: ClassVar[tuple[str, ...]] = ("projection",)
    kind: ClassVar[type] = Projected
    iterates: ClassVar[bool] = True
    try_solver: ClassVar[str] = "ProjectedGradient, Anderson or FixedPointIteration"

    def __post_init__(self):
        if not callable(self.P):
            raise TypeError(f"Projection: P must be callable, got a {type(self.P).__name__}")
        check_step(self, self.step)

    def noise(self, F: Projected, z: Tensor, slope: Tensor) -> Tensor:
        """How far the residual moves when the gradient changes by `slope`; zero where the set leaves no room.

        The change is along a fixed direction, to which nothing is orthogonal except by accident.
        """
        angles = torch.arange(1, z.shape[1] + 1, dtype=z.dtype, device=z.device).square()
        along = (angles.cos() / torch.linalg.vector_norm(angles.cos())).expand_as(z)
        moved = push(lambda r: F.from_descent(z, r), (F.evaluate(z)[1],), (slope[:, None] * along,))
        return row_norm(moved)

    def problem(
        self, objective: Function, z0: Any, args: tuple[Any, ...], layout: Layout, in_dims: Any, recording: bool
    ) -> Problem:
        """The problem for an objective with one value per sample."""
        opening = open_function(_Pair(objective, self.P), args, layout.device)
        of_objective, of_P = (replace(opening.opened, f=f) for f in (objective, self.P))

        def projected(value: Function, point: Function, theta: tuple[Tensor, ...]) -> Projected:
            descent = descent_of(rows_of(value, layout), theta)
            project = lambda z: layout.pack(point(layout.unpack(z)))  # noqa: E731
            moved = lambda z, r: project(torch.add(z, r, alpha=self.step)) - z  # noqa: E731
            return Projected(lambda z: moved(z, descent(z)), descent.evaluate, project, moved)

        def bind(*theta: Tensor) -> Projected:
            return projected(of_objective.at(*theta), of_P.at(*theta), theta)

        def first(z: Tensor, *theta: Tensor) -> Tensor:
            value, point = of_objective.at(*theta), of_P.at(*theta)

            def checked(z: Any) -> Any:
                nearest = point(z)
                layout.check(nearest, "z0", "the projection")
                return nearest

            return projected(lambda z: check_values(value(z), layout), checked, theta)(z)

        sample_dims = sample_dims_of(opening, args, layout, in_dims)
        return Problem.stated(opening, layout, z0, bind, first, sample_dims=sample_dims, recording=recording)

    def curvature(self, F: Projected, z: Tensor) -> tuple[Map, Tensor]:
        """D - D (I - t H) D, with H the Hessian of the objective and D the (symmetric) derivative of P.

        On the range of D, the tangent space of the active constraints, D = (I + t K)^-1 with K the curvature of
        the set times the multiplier; so the operator is t D (H + K) D there, and zero elsewhere. The possible
        rounding error of the difference is added, since t H may be smaller than that.
        """
        rounding = 10 * torch.finfo(z.dtype).eps
        _, hessian = pullback(lambda z: F.evaluate(z)[1], z)
        _, tangent = pullback(F.project, torch.add(z, F.evaluate(z)[1], alpha=self.step))

        def operator(u: Tensor) -> Tensor:
            w = tangent(u)[0]
            return torch.add(w - tangent(torch.add(w, hessian(w)[0], alpha=self.step))[0], u, alpha=rounding)

        return operator, z

    def _examine(
        self, dtype: torch.dtype, convex: bool, rounding: float, rtol: float, F: Projected, found: Found
    ) -> Found:
        """As for any form, with another test where the gradient step is tiny beside z.

        There a small residual says little: samples that a longer step moves about as far as it is long have
        STAGNATED.
        """
        found = super()._examine(dtype, convex, rounding, rtol, F, found)
        converged = found.status == int(Status.CONVERGED)
        if not maybe_any(converged) or found.z.shape[1] == 0:
            return found
        z, small = found.z, torch.finfo(dtype).eps ** 0.5
        _, r = F.evaluate(z)
        length, size = row_norm(r), row_norm(z)
        doubtful = converged & (self.step * length <= small * size) & (length > 0)
        if not maybe_any(doubtful):
            return found
        longer = small * size / torch.where(length > 0, length, 1.0)
        slope = row_norm(F.project(torch.addcmul(z, longer[:, None], r)) - z) / torch.where(doubtful, longer, 1.0)
        change = row_norm(pullback(lambda z: F.evaluate(z)[1], z)[1](z)[0])
        # Rounding of z turns a share `small` of the gradient into a slope along the set.
        lost = doubtful & (slope > max(10 * small, 10 * rtol) * torch.maximum(change, length))
        residual = torch.where(lost, self.step * slope, found.residual)
        return found._replace(status=torch.where(lost, int(Status.STAGNATED), found.status), residual=residual)


@dataclass(frozen=True)
class ProjectedGradient(Solver):
    """Projected gradient descent with momentum and backtracking (FISTA), for any projection: see `ProximalStep`.

    A sample has converged when |P(z - gradient) - z|, with the step of `Projection`, is at most
    atol + rtol |the same at z0|. z0 need not be feasible; the solution is.

    Args:
        step: the step size, which multiplies the gradient. None: found by backtracking for each sample.
        accelerated: whether to use momentum, restarted where it leads uphill.
        rtol, atol, max_steps: as in `implicitly.iterate.Solver`.
    """

    step: float | None = None
    accelerated: bool = True
    max_steps: int = 2000

    needs: ClassVar[str | None] = "projection"

    @property
    def nests(self) -> bool:
        """Whether it backtracks."""
        return self.step is None

    def __post_init__(self):
        super().__post_init__()
        check_step(self, self.step)

    def start(self, F: Projected, z: Tensor, r: Tensor) -> tuple[Tensor, ...]:
        """The memory `Accelerated` at the nearest feasible point, without momentum."""
        return Accelerated.start(F.evaluate, F.project(z), self.step)

    def propose(self, F: Projected, k: int | Tensor, z: Tensor, r: Tensor, memory: tuple[Tensor, ...]) -> Proposal:
        """The point reached by a projected gradient step."""
        step = ProximalStep(F.evaluate, F.project, F.from_descent, self.step is not None, self.accelerated)
        return step.take(k, z, r, Accelerated(*memory))
