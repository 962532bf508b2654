"""The size of rounding errors, which solvers must not learn from while autograd records them.

From differences that are mere rounding, a solver computes arbitrary coefficients. That harms no iterate, but the
derivatives of the coefficients are as large as the inverse of these differences, and further steps multiply them:
the gradient of an unrolled solve would be lost a few steps after its iterates have settled.
"""

from __future__ import annotations

import torch
from torch import Tensor

from implicitly.iterate import Coarse, Residual
from implicitly.transforms import records
from implicitly.tree import row_norm

# The rounding error of a residual or a step, relative to the iterate, in multiples of eps.
ROUNDED = 10


def square_of_rounding(F: Residual, z: Tensor) -> Tensor | None:
    """The square `(B,)` of the rounding error of F at `z` `(B, n)`; None if autograd records nothing."""
    recorded = torch.is_grad_enabled() if torch.compiler.is_dynamo_compiling() else records()
    if not recorded:
        return None
    eps = F.eps if isinstance(F, Coarse) else torch.finfo(z.dtype).eps
    return (ROUNDED * eps * row_norm(z.detach())).square()
