"""How long a step may be: the error norm, the first step, and the controller."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from implicitly.iterate import happens
from implicitly.ode.problem import Field

Norm = Callable[[Tensor], Tensor]


def rms_norm(rows: Tensor) -> Tensor:
    """Root mean square of each row: `(B, n)` to `(B,)`; 0 for rows without entries."""
    return torch.linalg.vector_norm(rows, dim=1) / max(rows.shape[1], 1) ** 0.5


@dataclass(frozen=True, kw_only=True)
class Controller:
    """A PI step-size controller; without a proportional part, as by default, the elementary one.

    With e the norm of the local error over the tolerance, and e' that of the step before, the next step is
    `safety * e^-(integral / q) * e'^(proportional / q)` times as long, within `shrink` and `grow`; q is the order
    of the error estimate. Gustafsson, ACM TOMS 17 (1991); Hairer and Wanner, Solving ODEs II, section IV.2.
    """

    safety: float = 0.9
    shrink: float = 0.2
    grow: float = 10.0
    integral: float = 1.0
    proportional: float = 0.0

    def __post_init__(self):
        if not (0 < self.safety <= 1 and 0 < self.shrink < 1 < self.grow):
            raise ValueError(f"Controller: 0 < safety <= 1 and 0 < shrink < 1 < grow, got {self}")

    def factor(self, error: Tensor, last: Tensor, accepted: Tensor, order: int) -> Tensor:
        """By how much `(B,)` the next step is longer, after a step with `error` and one before with `last`."""
        factor = self.safety * error ** (-self.integral / order)
        if self.proportional:
            factor = factor * last.clamp(min=1e-10) ** (self.proportional / order)
        # A rejected step says what its length should have been; the one before says nothing about that.
        if happens(~accepted):
            again = (self.safety * error ** (-1 / order)).clamp(max=self.safety)
            factor = torch.where(accepted, factor, again)
        return factor.clamp(self.shrink, self.grow)


def first_step(
    field: Field, t: Tensor, y: Tensor, k: Tensor, span: Tensor, order: int, scale: Tensor, norm: Norm
) -> Tensor:
    """A length `(B,)` for the first step, for one more call of f.

    Hairer, Norsett and Wanner, Solving ODEs I, section II.4. `span` `(B,)` is the signed length of the interval,
    `scale` `(B, n)` the tolerance at y.
    """
    d0, d1 = norm(y / scale), norm(k / scale)
    h0 = torch.where((d0 < 1e-5) | (d1 < 1e-5), 1e-6, 0.01 * d0 / d1.clamp(min=1e-30))
    h0 = torch.minimum(h0, span.abs())
    h0 = torch.where(h0.isfinite(), h0, 1e-6 * span.abs())
    dt = h0 * span.sign()
    d2 = norm((field(t + dt, torch.addcmul(y, dt[:, None], k)) - k) / scale) / h0
    steepest = torch.maximum(d1, d2)
    h1 = torch.where(steepest <= 1e-15, (1e-3 * h0).clamp(min=1e-6), (0.01 / steepest) ** (1 / order))
    h = torch.minimum(100 * h0, torch.where(h1.isfinite(), h1, h0))
    return torch.minimum(h, span.abs())
