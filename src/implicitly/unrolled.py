"""The one adjoint that all families of solvers share: differentiating through the solver itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class UnrolledAdjoint:
    """The exact derivative of the operations that the solver performed, all of them recorded by autograd.

    Memory grows with the number of iterations or steps. Choices (when to stop, which iterate was best, how long a
    step is) are not differentiated. For a fixed point, gradients flow to z0 too.

    A solve raises ValueError with `compile=True`, and with solvers whose operations have no derivative everywhere,
    such as `NewtonKKT`.
    """

    recording: ClassVar[bool] = True
