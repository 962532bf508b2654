"""Explicit Runge-Kutta methods: one step, and what is known between its ends."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from implicitly.ode import tableaus
from implicitly.ode.control import Controller, Norm, rms_norm
from implicitly.ode.problem import Field
from implicitly.ode.tableaus import Tableau


class Step(NamedTuple):
    """One step from y `(B, n)` at t `(B,)`, of length dt `(B,)`."""

    t: Tensor
    dt: Tensor
    y: Tensor
    y1: Tensor  # the state it ends with
    k1: Tensor  # the slope there
    error: Tensor | None  # the local error estimate `(B, n)`
    stages: tuple[Tensor, ...]  # slopes `(B, n)`
    error_low: Tensor | None = None  # a second estimate, of lower order


@dataclass(frozen=True, kw_only=True)
class RungeKutta:
    """A method for trajectories, with its tolerances.

    A step is accepted where the norm of (error / (atol + rtol * max(|y|, |y1|))) is at most 1, sample by sample.

    Args:
        rtol, atol: relative and absolute tolerance of the local error; numbers, or tensors that broadcast over one
            flattened sample.
        dt: a length makes all steps that long but the last, and tolerances count for nothing.
        dt0: the length of the first step; None: found from f, for one more call.
        dt_min: a sample whose steps would have to be shorter ends as `Status.STEP_UNDERFLOW`; 0: as short as the
            dtype resolves.
        dt_max: steps are at most that long.
        max_steps: attempted steps after which a sample ends as `Status.MAX_STEPS`.
        controller: how the next length follows from the error.
        norm: maps `(B, n)` to `(B,)`; the root mean square unless given.
    """

    rtol: float | Tensor = 1e-5
    atol: float | Tensor = 1e-7
    dt: float | None = None
    dt0: float | None = None
    dt_min: float = 0.0
    dt_max: float = float("inf")
    max_steps: int = 100_000
    controller: Controller = Controller()
    norm: Norm = rms_norm

    tableau: ClassVar[Tableau]

    def __post_init__(self):
        name = type(self).__name__
        if self.dt is None and self.tableau.error is None:
            raise ValueError(f"{name} does not estimate its error, so its steps cannot adapt: pass {name}(dt=...)")
        for field in ("dt", "dt0"):
            value = getattr(self, field)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(
                    f"{name}: {field} must be a finite number > 0 (t says the direction), got {value}"
                )
        if self.dt is not None and self.dt0 is not None:
            raise ValueError(f"{name}: dt makes all steps equally long, so dt0 would count for nothing; pass one")
        if not 0 <= self.dt_min <= self.dt_max:
            raise ValueError(f"{name}: 0 <= dt_min <= dt_max, got {self.dt_min} and {self.dt_max}")
        if self.max_steps < 1:
            raise ValueError(f"{name}: max_steps must be at least 1, got {self.max_steps}")
        for field in ("rtol", "atol"):
            value = torch.as_tensor(getattr(self, field))
            if not bool((value.isfinite() & (value >= 0)).all()):
                raise ValueError(f"{name}: {field} must be finite and >= 0, got {getattr(self, field)}")

    def check(self, dtype: torch.dtype) -> None:
        """Raise ValueError for tolerances that `dtype` cannot resolve."""
        eps = torch.finfo(dtype).eps
        rtol, atol = torch.as_tensor(self.rtol), torch.as_tensor(self.atol)
        if self.dt is None and bool(((rtol < 2 * eps) & ((rtol > 0) | (atol == 0))).any()):
            raise ValueError(
                f"{type(self).__name__}: {dtype} cannot resolve rtol={float(rtol.min()):g}; the smallest it can "
                f"is {2 * eps:.2g}. Loosen rtol, or pass y0, t and the arguments in a wider dtype"
            )

    def step(self, field: Field, t: Tensor, dt: Tensor, y: Tensor, k: Tensor) -> Step:
        """One step from y `(B, n)`, whose slope is k, at t `(B,)`, of length dt `(B,)`."""
        tableau, column = self.tableau, dt.unsqueeze(1)
        slopes = [k]
        y1 = y
        for row, c in zip(tableau.a[1:], tableau.c[1:]):
            y1 = torch.addcmul(y, column, weighted(row, slopes))
            slopes.append(field(torch.add(t, dt, alpha=c), y1))
        if not tableau.fsal:
            y1 = torch.addcmul(y, column, weighted(tableau.b, slopes))
            k1 = field(t + dt, y1)
        else:
            k1 = slopes[-1]
        error = None if tableau.error is None else column * weighted(tableau.error, slopes)
        low = None if tableau.error_low is None else column * weighted(tableau.error_low, slopes)
        return Step(t, dt, y, y1, k1, error, tuple(slopes), low)

    def error_ratio(self, step: Step, tolerance: Tensor) -> Tensor:
        """The local error of a step over the tolerance `(B, n)`, as a norm `(B,)`."""
        assert step.error is not None
        if step.error_low is None:
            return self.norm(step.error / tolerance)
        # Hairer, Norsett and Wanner, section II.10: the estimate of order 3 corrects that of order 5.
        high, low = self.norm(step.error / tolerance), self.norm(step.error_low / tolerance)
        return high**2 / (high**2 + 0.01 * low**2).sqrt().clamp(min=torch.finfo(high.dtype).tiny)

    def tolerance(self, y: Tensor, y1: Tensor | None = None) -> Tensor:
        """What the error of each component may be, `(B, n)`."""
        size = y.abs() if y1 is None else torch.maximum(y.abs(), y1.abs())
        return self.atol + self.rtol * size

    def between(self, field: Field, step: Step, theta: Tensor) -> Tensor:
        """The states `(B, W, n)` at t + theta dt, for `theta` `(B, W)`: the dense output."""
        tableau = self.tableau
        if tableau.dense is None:
            return _hermite(step, theta)
        slopes, column = list(step.stages), step.dt.unsqueeze(1)
        for row, c in zip(tableau.extra, tableau.extra_c):
            y = torch.addcmul(step.y, column, weighted(row, slopes))
            slopes.append(field(torch.add(step.t, step.dt, alpha=c), y))
        coefficients = dense_matrix(tableau, step.y.dtype, step.y.device)
        powers = theta.unsqueeze(2) ** torch.arange(1, coefficients.shape[1] + 1, device=theta.device)
        weights = powers @ coefficients.T * column.unsqueeze(2)
        used = [i for i, row in enumerate(tableau.dense) if any(row)]
        slope = torch.stack([slopes[i] for i in used], dim=1)
        return torch.baddbmm(step.y.unsqueeze(1), weights[:, :, used], slope)


def weighted(weights: tuple[float, ...], slopes: list[Tensor]) -> Tensor:
    """sum_i weights_i slopes_i over the weights that are not 0, each slope read once."""
    (i, w), *others = _terms(weights)
    total = slopes[i] if w == 1 else w * slopes[i]
    for i, w in others:
        total = torch.add(total, slopes[i], alpha=w)
    return total


@functools.lru_cache(maxsize=256)
def _terms(weights: tuple[float, ...]) -> tuple[tuple[int, float], ...]:
    return tuple((i, w) for i, w in enumerate(weights) if w != 0)


@functools.lru_cache(maxsize=64)
def dense_matrix(tableau: Tableau, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The coefficients `(s, p)` of the dense output."""
    return torch.tensor(tableau.dense, dtype=dtype, device=device)


def _hermite(step: Step, theta: Tensor) -> Tensor:
    """The cubic through both ends and both slopes."""
    x, dt = theta.unsqueeze(2), step.dt[:, None, None]
    y, y1, k, k1 = (v.unsqueeze(1) for v in (step.y, step.y1, step.stages[0], step.k1))
    bend = (1 - 2 * x) * (y1 - y) + (x - 1) * dt * k + x * dt * k1
    return (1 - x) * y + x * y1 + x * (x - 1) * bend


@dataclass(frozen=True, kw_only=True)
class Euler(RungeKutta):
    """Euler's method, of order 1; constant steps."""

    tableau: ClassVar[Tableau] = tableaus.EULER


@dataclass(frozen=True, kw_only=True)
class Midpoint(RungeKutta):
    """The midpoint method, of order 2."""

    tableau: ClassVar[Tableau] = tableaus.MIDPOINT


@dataclass(frozen=True, kw_only=True)
class Heun(RungeKutta):
    """Heun's method (the trapezoid, predicted by Euler), of order 2."""

    tableau: ClassVar[Tableau] = tableaus.HEUN


@dataclass(frozen=True, kw_only=True)
class Ralston(RungeKutta):
    """Ralston's method, of order 2 with the least error bound."""

    tableau: ClassVar[Tableau] = tableaus.RALSTON


@dataclass(frozen=True, kw_only=True)
class RK4(RungeKutta):
    """The classical method of order 4; constant steps."""

    tableau: ClassVar[Tableau] = tableaus.RK4


@dataclass(frozen=True, kw_only=True)
class Bosh3(RungeKutta):
    """Bogacki and Shampine's pair 3(2)."""

    tableau: ClassVar[Tableau] = tableaus.BOSH3


@dataclass(frozen=True, kw_only=True)
class Dopri5(RungeKutta):
    """Dormand and Prince's pair 5(4)."""

    tableau: ClassVar[Tableau] = tableaus.DOPRI5


@dataclass(frozen=True, kw_only=True)
class Tsit5(RungeKutta):
    """Tsitouras' pair 5(4)."""

    tableau: ClassVar[Tableau] = tableaus.TSIT5


@dataclass(frozen=True, kw_only=True)
class Dopri8(RungeKutta):
    """Dormand and Prince's method of order 8 with Hairer's estimates of orders 5 and 3 (DOP853)."""

    tableau: ClassVar[Tableau] = tableaus.DOPRI8
