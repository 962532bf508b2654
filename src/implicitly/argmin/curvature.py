"""Is a stationary point a minimum? The smallest eigenvalue of a symmetric operator, a sample each."""

from __future__ import annotations

import torch
from torch import Tensor

from implicitly.implicit import Map
from implicitly.linear import dense
from implicitly.tree import row_norm

# Up to so many dimensions all eigenvalues are computed; beyond, Lanczos' method takes so many products.
DENSE = 16
PRODUCTS = 12


def smallest_curvature(operator: Map, like: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest eigenvalue and the largest in size, `(B,)` each, of a symmetric operator on `like` `(B, n)`.

    For more than `DENSE` dimensions these are Ritz values, which lie between the eigenvalues: a negative one is
    certain, while a slightly negative eigenvalue may go unnoticed. NaN where the operator is not finite.
    """
    if like.shape[1] <= DENSE:
        matrix = dense(operator, like, limit_gib=float("inf"))
    else:
        matrix = _lanczos(operator, like)
    matrix = (matrix + matrix.mT) / 2
    finite = matrix.isfinite().all(-1).all(-1)
    values = torch.linalg.eigvalsh(torch.where(finite[:, None, None], matrix, 0.0))
    nan = torch.where(finite, 0.0, torch.nan)
    return values[:, 0] + nan, values.abs().amax(1) + nan


def _lanczos(operator: Map, like: Tensor) -> Tensor:
    """The operator's matrix `(B, k, k)` on the Krylov space of a random vector, orthogonalised in full."""
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(like.shape[1], generator=generator, dtype=like.dtype, device="cpu").to(like.device)
    v = (first / first.norm()).expand_as(like)
    basis, images = [], []
    for _ in range(PRODUCTS):
        basis.append(v)
        images.append(operator(v))
        left, rows = images[-1], torch.stack(basis, 1)
        for _ in range(2):
            left = left - torch.einsum("bkn,bk->bn", rows, torch.einsum("bkn,bn->bk", rows, left))
        norm = row_norm(left)
        # An invariant space: what rounding leaves is no direction, and a zero vector adds a zero eigenvalue.
        alive = norm > 100 * torch.finfo(like.dtype).eps * row_norm(images[-1])
        v = torch.where(alive[:, None], left / torch.where(alive, norm, 1.0)[:, None], 0.0)
    return torch.einsum("bin,bjn->bij", torch.stack(basis, 1), torch.stack(images, 1))
