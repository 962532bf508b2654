"""Finds out whether stability, rather than accuracy, keeps the steps of a solve short."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from implicitly.ode.method import Method, Step
from implicitly.ode.problem import Field
from implicitly.ode.tableaus import Tableau
from implicitly.pullback import recorded
from implicitly.solution import Status
from implicitly.transforms import records

# The component that counts most is searched for among this many of the largest errors.
LARGEST = 64
# An upper bound on the stability limits of explicit methods of these orders, and the accuracy of the limit found.
FURTHEST, FINENESS = 100.0, 1e-3


@functools.lru_cache(maxsize=64)
def real_limit(tableau: Tableau) -> float:
    """The largest x such that an explicit method is stable for y' = lambda y wherever -x <= dt lambda <= 0.

    One step multiplies y by R(z) = 1 + z b' (I - z A)^-1 1, a polynomial of z = dt lambda, and |R| must be <= 1.

    Source: Hairer and Wanner, "Solving Ordinary Differential Equations II", section IV.2.
    """
    k, last = np.ones(tableau.stages), np.asarray(tableau.b)
    a = np.zeros((tableau.stages, tableau.stages))
    for i, row in enumerate(tableau.a):
        a[i, : len(row)] = row
    z, grown = -np.arange(FINENESS, FURTHEST, FINENESS), 1.0
    for power in range(tableau.stages):
        grown = grown + (last @ k) * z ** (power + 1)
        k = a @ k
    beyond = np.abs(grown) > 1 + 1e-9
    return float(-z[max(int(beyond.argmax()) - 1, 0)]) if beyond.any() else FURTHEST


@dataclass(frozen=True)
class Halt:
    """Where a solve ended: states `(B, n)` at times `(B,)` along a `field` at `theta`.

    `tried` is a function that takes one more step from there.
    """

    field: Callable[..., Field]
    theta: tuple[Tensor, ...]
    t: Tensor
    y: Tensor
    tried: Callable[[], Step]

    def component(self, method: Method, row: int, status: Status) -> str | None:
        """A description of what is wrong in which component of a sample; None if one more step shows nothing."""
        with torch.no_grad():
            if records():
                return None
            step = self.tried()
            # In the order in which they are computed, as all may be NaN after the first one.
            for rows in (step.y, step.k, *step.stages, step.y1, step.k1, step.error):
                if rows is None or rows.shape != step.y.shape:
                    continue
                places = (~rows[row].isfinite()).nonzero()[:, 0].tolist()
                if places:
                    others = f" and {len(places) - 1} more" if len(places) > 1 else ""
                    return f"NaN or inf in component {places[0]}{others}"
            if status is Status.NON_FINITE or step.error is None or step.y.shape[1] == 0:
                return None
            over = (step.error / method.tolerance(step.y, step.y1)).abs()
            sizes = {}
            # Each by itself, as a norm may count some of them only.
            for i in over[row].topk(min(LARGEST, over.shape[1])).indices.tolist():
                alone = torch.zeros_like(over)
                alone[row, i] = over[row, i]
                sizes[i] = float(method.norm(alone)[row])
            most = max(sizes, key=sizes.__getitem__)
            return f"largest error in component {most}" if sizes[most] > 0 else None

    def rate(self, row: int, steps: int = 40) -> float | None:
        """The spectral radius of df/dy of a sample there, by power iteration with the transposed Jacobian.

        It is the mean growth over the second half of the steps, as complex pairs make the growth fluctuate. None
        if it cannot be computed: under transforms of torch.func, or if df/dy is NaN.
        """
        with torch.no_grad():
            if records():
                return None
        field = self.field(*(x.detach() for x in self.theta))
        pull = recorded(partial(field.at, self.t.detach()), (self.y.detach(),), [0])
        generator = torch.Generator().manual_seed(0)  # leaves the user's random state alone
        v, logs = torch.zeros_like(self.y), []
        v[row] = torch.randn(self.y.shape[1:], generator=generator, dtype=torch.float64, device="cpu").to(v)
        with torch.no_grad():
            for _ in range(steps):
                (v,) = pull(v / v.norm().clamp(min=torch.finfo(v.real.dtype).tiny), [0])
                logs.append(float(v.norm().log()))
        rate = math.exp(sum(logs[steps // 2 :]) / (steps - steps // 2))
        return None if math.isnan(rate) else rate
