"""Explicit Runge-Kutta methods, and the base class of all Runge-Kutta methods: one step and its dense output."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from implicitly.host import Array, remembered, to_tensor
from implicitly.ode import tableaus
from implicitly.ode.combine import advanced, as_length, stage_times, weighted
from implicitly.ode.method import Memory, Method, Step, hermite
from implicitly.ode.problem import Field
from implicitly.ode.stiffness import real_limit
from implicitly.ode.tableaus import Tableau


@dataclass(frozen=True, kw_only=True)
class RungeKutta(Method):
    """Base class of Runge-Kutta methods, each given by its tableau; the memory is the slope at the state."""

    tableau: ClassVar[Tableau]

    @property
    def order(self) -> int:
        """The order p of the method; its error estimate is O(dt^p)."""
        return self.tableau.order

    @property
    def adaptive(self) -> bool:
        """Whether it has an embedded method."""
        return self.tableau.error is not None

    @property
    def degree(self) -> int:
        """The degree in time of the dense output of a step."""
        return 3 if self.tableau.dense is None else len(self.tableau.dense[0])

    def start(self, F: Field, t: Array, y: Tensor, k: Tensor) -> Memory:
        """The slope."""
        return (k,)

    def dense_output(self, F: Field, step: Step, part: Tensor) -> Tensor:
        """The states `(B, W, n)` at t + part dt, for `part` `(B, W)`: the dense output."""
        tableau = self.tableau
        if tableau.dense is None:
            return hermite(step, part)
        slopes = self._dense_slopes(F, step)
        used = tuple(i for i, row in enumerate(tableau.dense) if any(row))
        weights = dense_weights(tableau, used, part) * to_tensor(step.dt)[:, None, None]
        slope = torch.stack([slopes[i] for i in used], dim=1)
        return torch.baddbmm(step.y.unsqueeze(1), weights, slope)

    def dense_output_at(self, F: Field, step: Step, parts: tuple[float, ...]) -> Sequence[Tensor]:
        """The states `(B, n)` at t + part dt for each of `parts`, which all samples share."""
        if self.tableau.dense is None:
            return super().dense_output_at(F, step, parts)
        slopes, length = self._dense_slopes(F, step), as_length(step.dt)
        return [advanced(step.y, length, dense_weights_at(self.tableau, part), slopes) for part in parts]

    def _dense_slopes(self, F: Field, step: Step) -> list[Tensor]:
        """The slopes `(B, n)` of all stages of the dense output."""
        tableau, slopes, length = self.tableau, list(step.stages), as_length(step.dt)
        if tableau.extra:
            for row, moment in zip(tableau.extra, F.f_times(stage_times(step.t, step.dt, tableau.extra_c))):
                slopes.append(F(moment, advanced(step.y, length, row, slopes)))
        return slopes


@dataclass(frozen=True, kw_only=True)
class ExplicitRungeKutta(RungeKutta):
    """Base class of explicit Runge-Kutta methods: each stage follows from those before."""

    @property
    def sees_end(self) -> bool:
        """Whether the error estimate uses the slope at the end of a step."""
        return self.tableau.fsal and self.tableau.error is not None and self.tableau.error[-1] != 0

    @property
    def nodes(self) -> tuple[float, ...]:
        """The nodes of all stages but the first, and of the end."""
        return self.tableau.call_nodes

    @property
    def weights(self) -> tuple[float, ...]:
        """The weights b of the tableau."""
        return self.tableau.b

    @property
    def stability(self) -> float:
        """The stability limit on the negative real axis: the largest step times decay rate that is stable."""
        return real_limit(self.tableau)

    @property
    def output_calls(self) -> int:
        """One call for each extra stage that only the dense output needs."""
        return len(self.tableau.extra)

    def step(self, F: Field, t: Array, dt: Array, y: Tensor, memory: Memory) -> Step:
        """One step from y `(B, n)` at t `(B,)`, of length dt `(B,)`."""
        tableau, length = self.tableau, as_length(dt)
        slopes, y1 = list(memory), y
        moments = F.stages(t, dt, self.nodes)
        for row, moment in zip(tableau.a[1:], moments):
            y1 = advanced(y, length, row, slopes)
            slopes.append(F(moment, y1))
        if tableau.fsal:
            k1 = slopes[-1]
        else:
            y1 = advanced(y, length, tableau.b, slopes)
            k1 = F(moments[-1], y1)
        error = low = None
        if tableau.error is not None and self.dt is None:
            with torch.no_grad():  # step-size control is not differentiated
                error = weighted(length, tableau.error, slopes)
                low = None if tableau.error_low is None else weighted(length, tableau.error_low, slopes)
        return Step(t, dt, y, y1, (k1,), slopes[0], k1, error, tuple(slopes), low)

    def error_ratio(self, step: Step, tolerance: Tensor) -> Tensor:
        """The local error of a step over the tolerance `(B, n)`, as a norm `(B,)`."""
        high = super().error_ratio(step, tolerance)
        if step.error_low is None:
            return high
        # Hairer, Norsett and Wanner, section II.10: the estimate of order 3 corrects that of order 5.
        low = self.norm(step.error_low / tolerance)
        return high**2 / (high**2 + 0.01 * low**2).sqrt().clamp(min=torch.finfo(high.dtype).tiny)


def dense_weights(tableau: Tableau, used: tuple[int, ...], part: Tensor) -> Tensor:
    """The weights `(B, W, len(used))` of the stages `used` in the dense output at `part` `(B, W)` of a step."""
    assert tableau.dense is not None
    if torch.compiler.is_dynamo_compiling():
        # One number at a time: the compiler fails to declare a constant tensor inside a loop's body.
        rows = [tableau.dense[i] for i in used]
        return torch.stack(
            [functools.reduce(lambda p, c: (p + c) * part, row[::-1], 0.0 * part) for row in rows], 2
        )
    coefficients = dense_matrix(tableau, used, part.dtype, part.device)
    # Not `part ** exponents`: its derivatives have logarithms, of positions that may be 0 or, unused, negative.
    powers = list(itertools.accumulate([part] * coefficients.shape[1], torch.mul))
    return torch.stack(powers, 2) @ coefficients.T


@remembered(256)
def dense_weights_at(tableau: Tableau, part: float) -> tuple[float, ...]:
    """The weight of each stage in the dense output at `part` of a step."""
    assert tableau.dense is not None
    return tuple(sum(c * part ** (power + 1) for power, c in enumerate(row)) for row in tableau.dense)


@remembered(64)
def dense_matrix(tableau: Tableau, used: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The coefficients `(len(used), p)` of the dense output: a row per stage, a column per power."""
    assert tableau.dense is not None
    return torch.tensor([tableau.dense[i] for i in used], dtype=dtype, device=device)


@dataclass(frozen=True, kw_only=True)
class Euler(ExplicitRungeKutta):
    """The forward Euler method, of order 1; constant steps.

    The options are those of `implicitly.ode.method.Method`.
    """

    tableau: ClassVar[Tableau] = tableaus.EULER


@dataclass(frozen=True, kw_only=True)
class Midpoint(ExplicitRungeKutta):
    """The midpoint method, of order 2.

    The options are those of `implicitly.ode.method.Method`.
    """

    tableau: ClassVar[Tableau] = tableaus.MIDPOINT


@dataclass(frozen=True, kw_only=True)
class Heun(ExplicitRungeKutta):
    """Heun's method (the explicit trapezoidal rule), of order 2.

    The options are those of `implicitly.ode.method.Method`.
    """

    tableau: ClassVar[Tableau] = tableaus.HEUN


@dataclass(frozen=True, kw_only=True)
class Ralston(ExplicitRungeKutta):
    """Ralston's method, of order 2 with the smallest error bound.

    "Runge-Kutta methods with minimum error bounds", Mathematics of Computation 16 (1962).
    The options are those of `implicitly.ode.method.Method`.
    """

    tableau: ClassVar[Tableau] = tableaus.RALSTON


@dataclass(frozen=True, kw_only=True)
class RK4(ExplicitRungeKutta):
    """The classical Runge-Kutta method of order 4; constant steps.

    Kutta, "Beitrag zur näherungsweisen Integration totaler Differentialgleichungen", 1901.
    The options are those of `implicitly.ode.method.Method`.
    """

    tableau: ClassVar[Tableau] = tableaus.RK4


@dataclass(frozen=True, kw_only=True)
class Bosh3(ExplicitRungeKutta):
    """Bogacki and Shampine's pair 3(2).

    "A 3(2) pair of Runge-Kutta formulas", Applied Mathematics Letters 2 (1989).
    The options are those of `implicitly.ode.method.Method`.
    """

    tableau: ClassVar[Tableau] = tableaus.BOSH3


@dataclass(frozen=True, kw_only=True)
class Dopri5(ExplicitRungeKutta):
    """Dormand and Prince's pair 5(4).

    "A family of embedded Runge-Kutta formulae", Journal of Computational and Applied Mathematics 6 (1980).
    The options are those of `implicitly.ode.method.Method`.
    """

    tableau: ClassVar[Tableau] = tableaus.DOPRI5


@dataclass(frozen=True, kw_only=True)
class Tsit5(ExplicitRungeKutta):
    """Tsitouras' pair 5(4).

    "Runge-Kutta pairs of order 5(4) satisfying only the first column simplifying assumption", Computers and
    Mathematics with Applications 62 (2011).
    The options are those of `implicitly.ode.method.Method`.
    """

    tableau: ClassVar[Tableau] = tableaus.TSIT5


@dataclass(frozen=True, kw_only=True)
class Dopri8(ExplicitRungeKutta):
    """Dormand and Prince's method of order 8 with Hairer's estimates of orders 5 and 3 (DOP853).

    Hairer, Norsett and Wanner, "Solving Ordinary Differential Equations I", 1993, section II.5.
    The options are those of `implicitly.ode.method.Method`.
    """

    tableau: ClassVar[Tableau] = tableaus.DOPRI8
