"""Rates to integrate along a trajectory: to keep the vector field easy to solve, or to follow a density.

Next to dy/dt = f(t, y), a rate r(t, y) is one more component of the state, dp/dt = r, p(t0) = 0. Its integral p is
as differentiable as the state, and is added to a loss.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.func import vjp

# The vector field with its further arguments filled in: maps t and y to slopes of y's shape.
Slopes = Callable[[Tensor, Tensor], Tensor]


class Regulariser(ABC):
    """A rate that `NeuralODE` integrates along its trajectory, one number per sample."""

    # The dimension of what is drawn that holds the samples, or None if all samples share it.
    sample_dim: ClassVar[int | None] = 0

    def draw(self, y: Tensor) -> Tensor | None:
        """Draw what is random in the rate, for a start `y` `(B, ...)`; before each solve, and constant during it.

        Its dimension `sample_dim` (0 unless a subclass sets another, or None) holds one entry per sample.
        """
        return None

    @abstractmethod
    def rate(self, f: Slopes, t: Tensor, y: Tensor, dy: Tensor, drawn: Tensor | None) -> Tensor:
        """The rate `(B,)`, in the dtype of y.

        It is called wherever the solver calls f, with `dy = f(t, y)` already known. It must consist of
        differentiable PyTorch operations; inside it, take derivatives of f by `torch.func`, since the solver runs
        without recording gradients.

        Args:
            f: the field, for further calls; each costs as much as one of the solver's.
            t: 0-d, or `(B, 1, ..., 1)` with `batch_dims=1`.
            y, dy: `(B, ...)`, with the augmented entries.
            drawn: what `draw` returned, for the samples in y: those that are not finished.
        """


@dataclass(frozen=True)
class KineticEnergy(Regulariser):
    """Kinetic energy: the sum |f|^2 over the entries of a sample, whose integral is least for straight paths.

    Finlay, Jacobsen, Nurbekyan and Oberman, "How to train your neural ODE", ICML 2020, equation 7.
    """

    def rate(self, f: Slopes, t: Tensor, y: Tensor, dy: Tensor, drawn: Tensor | None) -> Tensor:
        """|dy|^2 `(B,)`."""
        return _squares(dy)


@dataclass(frozen=True)
class JacobianFrobenius(Regulariser):
    """Hutchinson's estimate |eps' df/dy|^2 of the squared Frobenius norm of the Jacobian of f by y.

    The entries of eps are +1 and -1, drawn once per solve. The estimate is unbiased if samples do not depend on
    each other. It costs one more call of f, and one product with its transposed Jacobian. Finlay et al. 2020,
    equation 10.

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
        return _signs(y, self.generator)

    def rate(self, f: Slopes, t: Tensor, y: Tensor, dy: Tensor, drawn: Tensor | None) -> Tensor:
        """|eps' df/dy|^2 `(B,)`."""
        _, pull, *_ = vjp(lambda y: f(t, y), y)
        return _squares(pull(drawn)[0])


@dataclass(frozen=True)
class Divergence(Regulariser):
    """The trace of df/dy, whose integral is log |det dy(t[-1])/dx|, for densities of continuous normalizing flows.

    With `t=(1.0, 0.0)` the flow leads from data x back to a base distribution. The log-density of x is then that
    of the end point plus the integral::

        flow = im.nn.NeuralODE(field, (1.0, 0.0), regularisers=[im.nn.Divergence()])
        z, (log_det,) = flow(x)
        log_p = Normal(0, 1).log_prob(z).sum(1) + log_det                # (B,)

    Samples may not depend on each other. This costs one more call of f and, for samples with n entries, n products
    with its transposed Jacobian, or one product for the estimate.

    Args:
        generator: None gives the exact trace. Otherwise the rate is Hutchinson's unbiased estimate eps' (df/dy)
            eps, where eps has entries +1 and -1, drawn once per solve by this generator; `torch.default_generator`
            is PyTorch's global one.

    Raises:
        TypeError: `generator` is neither a generator nor None; in a forward pass, y is complex.

    Source: Chen et al., "Neural ODEs", NeurIPS 2018, theorem 1; Grathwohl et al., "FFJORD", ICLR 2019.
    """

    generator: torch.Generator | None = None

    def __post_init__(self):
        if not isinstance(self.generator, torch.Generator | None):
            raise TypeError(
                f"Divergence needs a torch.Generator, or None for the exact trace, got {self.generator!r}"
            )

    def draw(self, y: Tensor) -> Tensor | None:
        """eps, of y's shape; None for the exact trace."""
        if y.is_complex():
            raise TypeError("Divergence: y is complex; use its real and imaginary parts, torch.view_as_real(y)")
        return None if self.generator is None else _signs(y, self.generator)

    def rate(self, f: Slopes, t: Tensor, y: Tensor, dy: Tensor, drawn: Tensor | None) -> Tensor:
        """The trace of df/dy `(B,)`, or its estimate."""
        _, pull, *_ = vjp(lambda y: f(t, y), y)
        if drawn is not None:
            return (drawn * pull(drawn)[0]).unsqueeze(-1).flatten(1).sum(1)
        shape = y.shape[1:]
        unit = torch.eye(shape.numel(), dtype=y.dtype, device=y.device)
        rows = (pull(e.view(shape).expand_as(y))[0].unsqueeze(-1).flatten(1) for e in unit)
        none = y.new_zeros(len(y))  # for states without entries
        return torch.stack([none, *(row[:, i] for i, row in enumerate(rows))]).sum(0)


def _signs(y: Tensor, generator: torch.Generator) -> Tensor:
    """Entries +1 and -1 with equal probability, of the shape, dtype and device of y."""
    signs = torch.randint(2, y.shape, generator=generator, device=generator.device)
    return (2 * signs - 1).to(y)


def _squares(x: Tensor) -> Tensor:
    return (x * x.conj()).real.unsqueeze(-1).flatten(1).sum(1)
