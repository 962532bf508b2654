"""What is integrated along a trajectory to keep its field easy to solve.

A rate r(t, y) beside dy/dt = f(t, y) is one more component of the state, dp/dt = r, p(t0) = 0. Its integral p is
differentiable as the state is, and added to a loss.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.func import vjp

# The vector field with its further arguments filled in: slopes, of y's shape, from t and y.
Slopes = Callable[[Tensor, Tensor], Tensor]


class Regulariser(ABC):
    """A rate that `NeuralODE` integrates along its trajectory, one number a sample."""

    # The dimension of what is drawn that holds the samples, or None where it is shared.
    sample_dim: ClassVar[int | None] = 0

    def draw(self, y: Tensor) -> Tensor | None:
        """What is random in the rate, for a start `y` `(B, ...)`; drawn before each solve and constant in it.

        Its dimension `sample_dim` (0 unless a subclass sets another, or None) holds one entry a sample.
        """
        return None

    @abstractmethod
    def rate(self, f: Slopes, t: Tensor, y: Tensor, dy: Tensor, drawn: Tensor | None) -> Tensor:
        """The rate `(B,)`, in the dtype of y.

        It is called wherever the solver calls f, with `dy = f(t, y)` already known. It must be differentiable
        through operations of PyTorch; derivatives of f inside of it come from `torch.func`, since the solver runs
        without recording gradients.

        Args:
            f: further calls of the field; each costs as much as one of the solver's.
            t: 0-d, or `(B, 1, ..., 1)` with `batch_dims=1`.
            y, dy: `(B, ...)`, with the augmented entries.
            drawn: what `draw` gave, of the samples in y: those that are not finished.
        """


@dataclass(frozen=True)
class KineticEnergy(Regulariser):
    """|f|^2, the sum of squares over the entries of a sample; its integral is least for straight paths.

    Finlay, Jacobsen, Nurbekyan and Oberman, "How to train your neural ODE", ICML 2020, equation 7.
    """

    def rate(self, f: Slopes, t: Tensor, y: Tensor, dy: Tensor, drawn: Tensor | None) -> Tensor:
        """|dy|^2 `(B,)`."""
        return _squares(dy)


@dataclass(frozen=True)
class JacobianFrobenius(Regulariser):
    """|eps' df/dy|^2, Hutchinson's estimate of the sum of squares of the Jacobian of f by y.

    eps has entries +1 and -1, drawn once a solve. Unbiased where samples do not depend on each other. Costs one
    more call of f, and one product with its transposed Jacobian. Finlay et al. 2020, equation 10.

    Args:
        generator: draws eps; pass `torch.default_generator` to use PyTorch's global one.
    """

    generator: torch.Generator

    def __post_init__(self):
        if not isinstance(self.generator, torch.Generator):
            raise TypeError(
                f"JacobianFrobenius needs a torch.Generator, got a {type(self.generator).__name__}; pass "
                "torch.Generator().manual_seed(0), or torch.default_generator for PyTorch's global one"
            )

    def draw(self, y: Tensor) -> Tensor:
        """eps, of y's shape."""
        signs = torch.randint(2, y.shape, generator=self.generator, device=self.generator.device)
        return (2 * signs - 1).to(y)

    def rate(self, f: Slopes, t: Tensor, y: Tensor, dy: Tensor, drawn: Tensor | None) -> Tensor:
        """|eps' df/dy|^2 `(B,)`."""
        _, pull, *_ = vjp(lambda y: f(t, y), y)
        return _squares(pull(drawn)[0])


def _squares(x: Tensor) -> Tensor:
    return (x * x.conj()).real.unsqueeze(-1).flatten(1).sum(1)
