"""What solvers are not to learn from where autograd records them: differences of mere rounding.

What a solver makes of those are arbitrary numbers. That harms no iterate, but their derivatives are of the size of
the inverse of what they were made of, and the next steps multiply them: the gradient of an unrolled solve would be
lost a few steps after its iterates have settled.
"""

from __future__ import annotations

import torch
from torch import Tensor

from implicitly.iterate import Coarse, Residual
from implicitly.transforms import records
from implicitly.tree import row_norm

# What rounding makes of a residual, or a step, relative to the iterate, in multiples of eps.
ROUNDED = 10


def square_of_rounding(F: Residual, z: Tensor) -> Tensor | None:
    """The square `(B,)` of what length is mere rounding of F at `z` `(B, n)`; None where nothing is recorded."""
    recorded = torch.is_grad_enabled() if torch.compiler.is_dynamo_compiling() else records()
    if not recorded:
        return None
    eps = F.eps if isinstance(F, Coarse) else torch.finfo(z.dtype).eps
    return (ROUNDED * eps * row_norm(z.detach())).square()
