"""Step-size control: the error norm, the length of the first step, and the controller."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from implicitly.checks import NUMBERS, check_kind
from implicitly.host import Array, clamped, filled, library, maybe_any, to_host
from implicitly.ode.combine import advanced, as_length
from implicitly.ode.problem import Field

Norm = Callable[[Tensor], Tensor]

# Stored, as calling np.finfo takes longer than the computation that needs it.
_EPS = {np.dtype(kind): float(np.finfo(kind).eps) for kind in (np.float32, np.float64)}
# Bounds well within the range of float32.
TINY, HUGE = 1e-30, 1e30


def rms_norm(rows: Tensor) -> Tensor:
    """Root mean square of each row: `(B, n)` to `(B,)`; 0 for rows without entries."""
    return torch.linalg.vector_norm(rows, dim=1) / max(rows.shape[1], 1) ** 0.5


@dataclass(frozen=True, kw_only=True)
class Controller:
    """A PID step-size controller; the default is the elementary (I) controller.

    `proportional` adds the P part, `derivative` the D part. With e the norm of the local error over the tolerance,
    and e' and e'' those of the two accepted steps before, the next step is longer by the factor
    `safety * e^-(integral / q) * e'^(proportional / q) * e''^-(derivative / q)`, clamped to between `shrink` and
    `grow`; q is the order of the error estimate. A controller with the gains kI, kP and kD has
    `integral=kI + kP + kD`, `proportional=kP + 2 * kD` and `derivative=kD`. Gustafsson, ACM TOMS 17 (1991); Hairer
    and Wanner, Solving ODEs II, section IV.2; Soderlind, ACM TOMS 29 (2003).
    """

    safety: float = 0.9
    shrink: float = 0.2
    grow: float = 10.0
    integral: float = 1.0
    proportional: float = 0.0
    derivative: float = 0.0

    def __post_init__(self):
        for which in ("safety", "shrink", "grow", "integral", "proportional", "derivative"):
            value = getattr(self, which)
            check_kind("Controller", which, value, NUMBERS, "a number, got a {type}")
            if which != "grow" and not abs(value) < math.inf:
                raise ValueError(f"Controller: {which} must be finite, got {value}")
        if not self.integral > 0:
            raise ValueError(
                f"Controller: integral must be > 0, else larger errors lead to longer steps, got {self}"
            )
        if not (0 < self.safety <= 1 and 0 < self.shrink < 1 < self.grow):
            raise ValueError(f"Controller: must satisfy 0 < safety <= 1 and 0 < shrink < 1 < grow, got {self}")

    def factor(
        self, error: Array, last: Array, accepted: Array, order: int, before: tuple[Array, ...] = ()
    ) -> Array:
        """The factor `(B,)` by which the next step is longer.

        It depends on the `error` of this step, that of the accepted step before (`last`) and, for a derivative
        part, that of the one `before` that.
        """
        xp = library(error)
        error = clamped(error, TINY, None)
        factor = self.safety * error ** (-self.integral / order)
        if self.proportional:
            factor = factor * clamped(last, 1e-10, None) ** (self.proportional / order)
        if self.derivative:
            factor = factor * clamped(before[0], 1e-10, None) ** (-self.derivative / order)
        # After a rejected step, its own error tells what its length should have been; earlier errors say nothing.
        if maybe_any(~accepted):
            again = clamped(self.safety * error ** (-1 / order), None, self.safety)
            factor = xp.where(accepted, factor, again)
        return clamped(factor, self.shrink, self.grow)


def shortest_step(t: Array) -> Array:
    """The shortest length `(B,)` that changes t when added or subtracted."""
    eps = torch.finfo(t.dtype).eps if isinstance(t, Tensor) else _EPS[t.dtype]
    return eps * abs(t)


def stands_still(t: Array, length: float, end: Array) -> Array:
    """Whether steps of `length` between the times t and `end`, of any shape, would be rounded to length 0."""
    sign = library(t).sign(end - t)
    return (t + sign * length == t) | (end - sign * length == end)


def first_step(
    F: Field, t: Array, y: Tensor, k: Tensor, span: Array, order: int, scale: Tensor, norm: Norm
) -> tuple[Array, Array | float]:
    """A length `(B,)` for the first step, at the cost of one call of f; also returns d0 + d1.

    Let d0, d1 and d2 be the norms of the state, its slope and its second derivative over the tolerance. The slope
    changes at the rate r = d2 / d1, so the k-th derivative is about d1 r^(k-1), and the local error of a step h is
    about C d1 h (r h)^(q-1) with C = 1/q!. We choose the h for which that is 1, as long as the state changes by no
    more than its own size. Hairer, Norsett and Wanner, Solving ODEs I, section II.4 uses d1 in place of
    d1 r^(q-1), which is larger by many orders where r is small; the length that they find is our lower bound.

    `span` `(B,)` is the signed length of the interval, `scale` `(B, n)` the tolerance at y.
    """
    alone = isinstance(span, np.ndarray) and len(span) == 1

    def size(rows: Tensor) -> Array:
        if alone and norm is rms_norm:
            return float(torch.linalg.vector_norm(rows / scale)) / max(rows.shape[1], 1) ** 0.5
        found = to_host(norm(rows / scale))
        return float(found[0]) if alone else found

    span = float(span[0]) if alone else span
    d0, d1 = size(y), (first := size(k))
    xp, whole = library(d0), abs(span)
    short = 1e-6 * clamped(whole, None, 1.0)  # a short step, where there is no other scale
    h0 = xp.where((d0 < 1e-5) | (d1 < 1e-5), short, 0.01 * d0 / clamped(d1, TINY, None))
    # A state below the tolerance may be zero but for rounding, which says nothing about a step's length.
    h0 = xp.where(d0 < 1, xp.maximum(h0, short), h0)
    h0 = xp.minimum(h0, whole)
    # Plain Python numbers raise an error on division by 0, so h0 must not be 0.
    h0 = xp.where(xp.isfinite(h0) & (h0 > 0), h0, clamped(1e-6 * whole, TINY, None))
    dt = h0 * xp.sign(span)
    d2 = size(F.at(t + dt, advanced(y, as_length(dt), (1.0,), (k,))) - k) / h0
    d2 = clamped(xp.where(xp.isfinite(d2), d2, HUGE), TINY, HUGE)
    d1 = clamped(d1, TINY, HUGE)
    flat = xp.maximum(d1, d2) <= 1e-15
    least = xp.where(flat, clamped(1e-3 * h0, 1e-6, None), (0.01 / xp.maximum(d1, d2)) ** (1 / order))
    rate = clamped(d2 / d1, 1e-15, 1e15)
    likely = (math.factorial(order) ** (1 / order)) * (rate / d1) ** (1 / order) / rate
    length = xp.minimum(xp.minimum(100 * h0, xp.maximum(least, likely)), whole)
    return (filled(t, length) if alone else length), d0 + first
