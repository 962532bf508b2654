"""A regulariser that makes a vector field easy for solvers of high order."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from implicitly.nn.ode_regularisers import Regulariser, Slopes
from implicitly.taylor.jet import trajectory_derivatives


@dataclass(frozen=True)
class TaylorPenalty(Regulariser):
    """|d^K y/dt^K|^2 / n, the mean square of the K-th total derivative over the n entries of a sample.

    The error of a step grows with the high derivatives along the trajectory; where they are small, solvers take
    long steps. Taylor mode computes them in one more call of f with K coefficients for each intermediate value:
    products with weights cost K times as much, elementwise operations of the order of K^2 times.

    Kelly, Bettencourt, Johnson and Duvenaud, "Learning Differential Equations that are Easy to Solve", NeurIPS
    2020, equation 1 (there without the n, which makes the weight in a loss independent of the size of y).

    Args:
        order: K >= 1; 1 is the kinetic energy over n. `implicitly fit ode-easy` shows what 3 saves.

    Raises:
        ValueError: `order` is not a whole number >= 1.
        NotImplementedError: from the solve, if f uses an operation that `implicitly.jet` has no rule for.
    """

    order: int

    def __post_init__(self):
        if not isinstance(self.order, int) or isinstance(self.order, bool) or self.order < 1:
            raise ValueError(f"TaylorPenalty: order must be a whole number >= 1, got {self.order!r}")

    def rate(self, f: Slopes, t: Tensor, y: Tensor, dy: Tensor, drawn: Tensor | None) -> Tensor:
        """The mean square `(B,)`."""
        highest = dy if self.order == 1 else trajectory_derivatives(f, t, y, self.order)[-1]
        squares = highest.abs().square().unsqueeze(-1).flatten(1)
        return squares.sum(1) / max(squares.shape[1], 1)
