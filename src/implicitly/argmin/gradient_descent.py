"""Gradient descent: plain, with a line search, or accelerated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from implicitly.argmin.accelerated import Accelerated, ProximalStep, check_step
from implicitly.descent import Descent, bottom, inverse_norm, stopped, wolfe
from implicitly.iterate import Proposal, Solver

# How much weight the average of the last values keeps with each step.
FORGETTING = 0.85


@dataclass(frozen=True)
class GradientDescent(Solver):
    """Gradient descent, for smooth objectives.

    Args:
        step: the step size, which multiplies the gradient. None: the Barzilai-Borwein step, from the curvature
            along the last step ("Two-point step size gradient methods", IMA J. Numer. Anal. 8, 1988), shortened
            until the objective falls below an average of its last values (Zhang and Hager, "A nonmonotone line
            search technique", SIAM J. Optim. 14, 2004); chosen at each step and for each sample.
        accelerated: whether to use Nesterov's momentum, restarted where it leads uphill; see `ProjectedGradient`.
        rtol, atol, max_steps: as in `implicitly.iterate.Solver`.
    """

    step: float | None = None
    accelerated: bool = False
    max_steps: int = 2000

    needs: ClassVar[str | None] = "objective"

    @property
    def nests(self) -> bool:
        """Whether it runs a line search."""
        return self.step is None

    def __post_init__(self):
        super().__post_init__()
        check_step(self, self.step)

    def start(self, F: Descent, z: Tensor, r: Tensor) -> tuple[Tensor, ...]:
        """The memory: nothing with a fixed step; with momentum that of `Accelerated`.

        With a line search, the step size, the objective, its average and that average's weight, `(B,)` each, and
        the objective's `bottom`.
        """
        if self.accelerated:
            return Accelerated.start(F.evaluate, z, self.step)
        if self.step is not None:
            return ()
        value, _ = F.evaluate(z)
        return inverse_norm(r)[:, 0], value, value, torch.ones_like(value, dtype=r.dtype), bottom(value, z, r)

    def propose(self, F: Descent, k: int | Tensor, z: Tensor, r: Tensor, memory: tuple[Tensor, ...]) -> Proposal:
        """The point reached by a step down the gradient."""
        if self.accelerated:
            step = ProximalStep(F.evaluate, lambda z: z, lambda z, r: r, fixed=self.step is not None)
            return step.take(k, z, r, Accelerated(*memory))
        if self.step is not None:
            return Proposal(torch.add(z, r, alpha=self.step))
        length, value, average, weight, lowest = memory
        new = wolfe(F, z, value, r, r, length, below=average)
        s, y = new.z - z, r - new.r
        along, squared = torch.linalg.vecdot(s, y), torch.linalg.vecdot(s, s)
        longer = torch.where(new.length[:, 0] > 0, 4 * new.length[:, 0], length / 4)
        length = torch.where(along > 0, squared / torch.where(along > 0, along, 1.0), longer)
        verdict = stopped(new, new.length[:, 0] == 0, lowest)
        weight_now = FORGETTING * weight + 1
        average_now = ((FORGETTING * weight * average + new.value) / weight_now).to(average.dtype)
        memory = (length, new.value, average_now, weight_now, lowest)
        return Proposal(new.z, memory, new.r, new.calls + (k == 0), None, verdict, average_now < average)
