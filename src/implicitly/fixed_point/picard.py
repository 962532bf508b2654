"""Plain or damped fixed-point iteration."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from implicitly.checks import DAMPING, check_number
from implicitly.iterate import Proposal, Residual, Solver


@dataclass(frozen=True)
class FixedPointIteration(Solver):
    """Fixed-point iteration, z <- (1 - damping) z + damping f(z) (Banach, Picard; damped: Krasnoselskii-Mann).

    It converges if f is a contraction; `damping < 1` helps if its Jacobian has large negative eigenvalues.
    `rtol`, `atol` and `max_steps` are described in `implicitly.iterate.Solver`.

    Args:
        damping: in (0, 1].

    Raises:
        TypeError, ValueError: for invalid options.
    """

    damping: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        check_number("FixedPointIteration", "damping", self.damping, DAMPING)

    def start(self, F: Residual, z: Tensor, r: Tensor) -> tuple[Tensor, ...]:
        """Nothing: it has no memory."""
        return ()

    def propose(self, F: Residual, k: int | Tensor, z: Tensor, r: Tensor, memory: tuple[Tensor, ...]) -> Proposal:
        """A damped step along the residual."""
        return Proposal(torch.add(z, r, alpha=self.damping))
