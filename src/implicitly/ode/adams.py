"""Adams methods: a polynomial through past slopes predicts the state, and the slope there corrects it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from implicitly.host import Array, filled, gauss, library, remembered, to_host, to_tensor
from implicitly.iterate import where_rows
from implicitly.ode.combine import Length, as_length, stage_times
from implicitly.ode.control import Controller
from implicitly.ode.method import Memory, Method, Step
from implicitly.ode.problem import Field
from implicitly.ode.runge_kutta import Bosh3, Dopri5, Dopri8, RungeKutta
from implicitly.transforms import unwrapped

# The methods for the first steps; their order may be lower by one, as these steps are few.
STARTERS: dict[int, type[RungeKutta]] = {2: Bosh3, 3: Bosh3, 4: Dopri5, 5: Dopri5, 6: Dopri8, 7: Dopri8, 8: Dopri8}


@dataclass(frozen=True, kw_only=True)
class Adams(Method):
    """The Adams-Bashforth-Moulton predictor-corrector method of the given order; two calls of f per step.

    The polynomial through the slopes at the state and at the p - 2 states before it is integrated to predict the
    next state; f is called there, and the polynomial that also goes through this slope is integrated to correct
    the prediction (PECE, with local extrapolation). The error estimate is the difference to the corrector of order
    p - 1. Steps may have any length: the coefficients of each sample follow from the lengths of its past steps.
    The first p - 2 steps are taken by a Runge-Kutta method.

    It pays off if f is costly, the tolerance tight and the solution smooth. If steps are often rejected, or if a
    solve takes few steps, a Runge-Kutta method needs fewer calls.

    Args:
        order: order p of the method, from 2 (which is Heun's method) to 8.
        controller: as for every method, except that lengths at most double, since past slopes predict only so far.

    The other options are those of `implicitly.ode.method.Method`.

    Source: Hairer, Norsett and Wanner, "Solving Ordinary Differential Equations I", 1993, section III.5; Shampine
    and Gordon, "Computer Solution of Ordinary Differential Equations", 1975.
    """

    order: int = 5  # pyright: ignore[reportIncompatibleMethodOverride] - here an option, elsewhere a property
    controller: Controller = Controller(grow=2.0)
    starter: RungeKutta = field(init=False, repr=False, compare=False)  # the method of the first steps

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.order, int) or isinstance(self.order, bool):
            raise TypeError(f"Adams: order must be an int, got {self.order!r}")
        if self.order not in STARTERS:
            raise ValueError(f"Adams: order must be from {min(STARTERS)} to {max(STARTERS)}, got {self.order}")
        object.__setattr__(self, "starter", STARTERS[self.order](dt=self.dt))

    @property
    def degree(self) -> int:
        """The degree in time of the dense output of a step."""
        return max(self.order, self.starter.degree)

    @property
    def adaptive(self) -> bool:
        """Whether it estimates its error: yes."""
        return True

    def start(self, F: Field, t: Array, y: Tensor, k: Tensor) -> Memory:
        """The lengths `(B, p - 2)` of past steps, 0 where there were none yet, and p - 1 slopes `(B, n)`."""
        unknown = self.order - 2
        return (y.new_zeros(y.shape[0], unknown), k, *(torch.zeros_like(k) for _ in range(unknown)))

    def slope(self, memory: Memory) -> Tensor:
        """The slope `(B, n)` at the state that goes with `memory`."""
        return memory[1]

    def step(self, F: Field, t: Array, dt: Array, y: Tensor, memory: Memory) -> Step:
        """One step from y `(B, n)` at t `(B,)`, of length dt `(B,)`."""
        lengths, *slopes = memory
        fresh = _fresh(lengths, dt)
        first, later = _shares(fresh, dt)
        steps = []
        if later is not None:
            steps.append(self._corrected(F, t, later, y, lengths, slopes))
        if first is not None:
            steps.append(self.starter.step(F, t, first, y, (slopes[0],)))
        one, *other = steps
        y1, k1, error = one.y1, one.k1, one.error
        if other:
            rows = to_tensor(fresh)
            y1, k1 = where_rows(rows, other[0].y1, y1), where_rows(rows, other[0].k1, k1)
            error = None if error is None else where_rows(rows, other[0].error, error)
        lengths1 = torch.cat([to_tensor(dt).unsqueeze(1), lengths], dim=1)[:, :-1]
        stages = (lengths, *(k for step in steps for k in step.stages))
        return Step(t, dt, y, y1, (lengths1, k1, *slopes[:-1]), slopes[0], k1, error, stages)

    def _corrected(
        self, F: Field, t: Array, dt: Array, y: Tensor, lengths: Tensor, slopes: Sequence[Tensor]
    ) -> Step:
        """A step from the past `slopes`; its stages are these, and the defect of the slope that they predicted."""
        found = integrals(_past(lengths, dt), dt, library(dt).ones_like(dt)[:, None])
        (moment,) = F.f_times(stage_times(t, dt, (1.0,)))
        predicted = y
        for i, slope in enumerate(slopes):
            predicted = _plus(predicted, as_length(found.slopes[:, i, 0]), slope)
        defect = F(moment, predicted)
        for i, slope in enumerate(slopes):
            defect = _plus(defect, as_length(-found.end[:, i, 0]), slope)
        y1 = _plus(predicted, as_length(found.defect[:, 0]), defect)
        k1 = F(moment, y1)
        error = None
        if self.dt is None:
            with torch.no_grad():  # step-size control is not differentiated
                error = defect * as_length((found.defect - found.lower)[:, 0])
        return Step(t, dt, y, y1, (), slopes[0], k1, error, (*slopes, defect))

    def dense_output(self, F: Field, step: Step, part: Tensor) -> Tensor:
        """The states `(B, W, n)` at t + part dt, for `part` `(B, W)`: the dense output.

        It is the integral of the corrector's polynomial, without calls of f; in the first steps, it is the dense
        output of the Runge-Kutta method.
        """
        lengths, *stages = step.stages
        fresh = _fresh(lengths, step.dt)
        first, later = _shares(fresh, step.dt)
        values = []
        if later is not None:
            *slopes, defect = stages[: self.order]
            stages = stages[self.order :]
            dt = to_tensor(later)
            found = integrals(_past(lengths, dt), dt, part)
            weights = torch.cat([found.slopes, found.defect.unsqueeze(1)], dim=1).transpose(1, 2)
            values.append(torch.baddbmm(step.y.unsqueeze(1), weights, torch.stack([*slopes, defect], dim=1)))
        if first is not None:
            values.append(self.starter.dense_output(F, step._replace(dt=first, stages=tuple(stages)), part))
        if len(values) == 1:
            return values[0]
        return torch.where(to_tensor(fresh)[:, None, None], values[1], values[0])


def _fresh(lengths: Tensor, dt: Array) -> Array:
    """Which samples `(B,)` have taken too few steps so far; samples that do not move are not counted."""
    if lengths.shape[1] == 0:
        return filled(dt, 0, "bool")
    oldest = lengths[:, -1].detach() if isinstance(dt, Tensor) else to_host(lengths)[:, -1]
    return (oldest == 0) & (dt != 0)


def _shares(fresh: Array, dt: Array) -> tuple[Array | None, Array | None]:
    """The step lengths of the `fresh` samples and those of the others, each 0 elsewhere; None: there are none."""
    # Waiting for an accelerator here takes less time than the calls of f that the other kind of step would make.
    seen = unwrapped(fresh) if isinstance(fresh, Tensor) else fresh
    looks = not torch.compiler.is_dynamo_compiling()
    if looks and not bool(seen.any()):
        return None, dt
    if looks and bool(seen.all()):
        return dt, None
    xp = library(dt)
    return xp.where(fresh, dt, 0.0), xp.where(fresh, 0.0, dt)


def _past(lengths: Tensor, dt: Array) -> Array:
    """How long `(B, k)` before the state each slope was, with the sign of dt; an array of the kind of `dt`."""
    xp = library(dt)
    before = lengths if isinstance(dt, Tensor) else to_host(lengths)  # differentiable if dt is
    return xp.concatenate((xp.zeros_like(dt)[:, None], xp.cumsum(before, 1)), 1)


class Integrals(NamedTuple):
    """The weights of slopes that integrate polynomials over the first `part` `(B, W)` of a step."""

    slopes: Array  # (B, k, W) the polynomial through the past slopes
    end: Array  # (B, k, W) the same polynomial, not integrated, where `part` ends
    defect: Array  # (B, W) what the one through the new slope too adds, for each unit by which the first missed it
    lower: Array  # (B, W) the same without the oldest slope


def integrals(past: Array, dt: Array, part: Array) -> Integrals:
    """The integrals over `part` `(B, W)` of steps dt `(B,)`, with slopes at times -`past` `(B, k)`, and at dt.

    Computed by Gauss quadrature, which is exact for these polynomials. The only divisors are past lengths and
    their sums with dt, so that steps of length 0 do no harm.
    """
    xp, count = library(dt), past.shape[1]
    nodes, weights = _quadrature(count, dt.dtype, dt.device if isinstance(dt, Tensor) else None)
    own = torch.eye(count, dtype=torch.bool, device=dt.device) if isinstance(dt, Tensor) else np.eye(count) > 0
    x = part[:, :, None] * nodes  # (B, W, m), as parts of the step
    shape, width, length = x.shape, part * dt[:, None], dt[:, None, None]
    x = x.reshape(shape[0], 1, shape[1] * shape[2])
    factors = x * length + past[:, :, None]  # (B, k, W m)
    # The Lagrange polynomial of a slope is the product of the factors of the others, divided by its value there.
    apart = xp.prod(_safe(past[:, None, :] - past[:, :, None]), 2)
    bases = xp.ones_like(factors)
    for i in range(count):
        bases = bases * xp.where(own[i][:, None], 1.0, factors[:, i : i + 1])
    bases = (bases / apart[:, :, None]).reshape(shape[0], count, *shape[1:])
    # The defect is weighted by the product of the factors over its value at dt; the first slope's factor is x.
    ratios = factors[:, 1:] / _safe(length + past[:, 1:, None])
    lower, product = xp.ones_like(x), x
    for i in range(count - 1):
        lower, product = product, product * ratios[:, i : i + 1]
    defect, lower = ((v.reshape(shape) @ weights) * width for v in (product, lower))
    return Integrals((bases @ weights) * width[:, None], bases[..., -1], defect, lower)


def _safe(x: Array) -> Array:
    """`x`, with 1 in place of 0, for samples without a past, which do not use the result."""
    return library(x).where(x == 0, 1.0, x)


@remembered(16)
def _quadrature(count: int, dtype: Any, device: torch.device | None) -> Array:
    """For `count` past slopes: the nodes of Gauss quadrature on [0, 1] and 1, and their weights, `(2, m)`.

    A NumPy array if there is no device.
    """
    nodes, weights = gauss(count // 2 + 1)
    both = ((*nodes, 1.0), (*weights, 0.0))
    if device is None:
        return np.array(both, dtype=dtype)
    # One number at a time: the compiler fails to declare a constant tensor inside a loop's body.
    numbers = (torch.full((), x, dtype=dtype, device=device) for row in both for x in row)
    return torch.stack(list(numbers)).reshape(2, -1)


def _plus(y: Tensor, weight: Length, slope: Tensor) -> Tensor:
    """y + weight slope."""
    if isinstance(weight, Tensor):
        return torch.addcmul(y, weight, slope)
    return torch.add(y, slope, alpha=weight)
