"""The smallest eigenvalue of a symmetric operator, which says whether a stationary point is a minimum."""

from __future__ import annotations

import torch
from torch import Tensor

from implicitly.condition import Map
from implicitly.host import maybe_any
from implicitly.linear import dense
from implicitly.tree import row_norm

# Up to this many dimensions, products give the whole matrix; beyond, the Lanczos method takes at most so many.
PRODUCTS = 48
# The products of one round; after it the method checks what it knows and keeps no more directions than that.
ROUND = 12


def smallest_curvature(operator: Map, like: Tensor, products: int = PRODUCTS) -> tuple[Tensor, Tensor]:
    """The smallest eigenvalue and the largest in size, `(B,)` each, of a symmetric operator on `like` `(B, n)`.

    The smallest is given as 0 where it is known to be at most as negative as a rounded zero. NaN where the
    operator is not finite. In more than `products` dimensions these are Ritz values, which lie between the
    eigenvalues. So a negative one is certain, but a negative eigenvalue may go unnoticed if it is small beside the
    largest: if it is r times its size, k products from a random vector, without restarts, miss it with a
    probability below 1.65 n^(1/2) exp(-(2 k - 1) r^(1/2)).

    Source: Kuczyński and Woźniakowski, "Estimating the largest eigenvalue by the power and Lanczos algorithms with
    a random start", SIAM J. Matrix Anal. Appl. 13 (1992), theorem 4.2. After `2 * ROUND` products the method goes
    on from the lowest Ritz vectors: Wu and Simon, "Thick-restart Lanczos method for large symmetric eigenvalue
    problems", SIAM J. Matrix Anal. Appl. 22 (2000).
    """
    if like.shape[1] > products:
        return _lanczos(operator, like, products)
    matrix = dense(operator, like, limit_gib=float("inf"))
    matrix, nan = _finite((matrix + matrix.mT) / 2)
    # A Cholesky factorisation tells in a tenth of the time whether a matrix is positive definite.
    most = matrix.diagonal(dim1=1, dim2=2).abs().amax(1)
    shift = torch.finfo(matrix.dtype).eps ** 0.5 * most
    _, info = torch.linalg.cholesky_ex(matrix + torch.diag_embed(shift[:, None].expand_as(like)))
    if not maybe_any(info != 0):
        return nan, most + nan
    values = torch.linalg.eigvalsh(matrix)
    return torch.where(info == 0, 0.0, values[:, 0]) + nan, values.abs().amax(1) + nan


def _finite(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """`matrix` `(B, k, k)` with zeros for samples that are not finite, and `(B,)` NaN for those, 0 for others."""
    finite = matrix.isfinite().all(-1).all(-1)
    nan = torch.zeros_like(matrix[:, 0, 0]).masked_fill(~finite, torch.nan)
    return torch.where(finite[:, None, None], matrix, 0.0), nan


def _lanczos(operator: Map, like: Tensor, products: int) -> tuple[Tensor, Tensor]:
    """The least Ritz value and the largest in size, from at most `products` products.

    It stops earlier once the sign of the least eigenvalue is known for all samples.
    """
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(like.shape[1], generator=generator, dtype=like.dtype, device="cpu").to(like.device)
    v = (first / first.norm()).expand_as(like)
    basis = images = like[:, None, :][:, :0]
    least = most = nan = torch.zeros_like(like[:, 0])
    for k in range(0, products, ROUND):
        basis, images, v = _extended(operator, basis, images, v, min(ROUND, products - k))
        matrix = basis @ images.mT
        matrix, nan = _finite((matrix + matrix.mT) / 2)
        values, vectors = torch.linalg.eigh(matrix)
        least, most = values[:, 0], torch.maximum(most, values.abs().amax(1))
        lowest = vectors[:, :, :ROUND].mT
        error = row_norm((lowest[:, :1] @ images - least[:, None, None] * (lowest[:, :1] @ basis))[:, 0])
        rounding = torch.finfo(like.dtype).eps ** 0.5 * most
        known = (least < -rounding) | (error <= least / 2) | (error <= rounding) | nan.isnan()
        if not maybe_any(~known):
            break
        if basis.shape[1] > ROUND:
            basis, images = lowest @ basis, lowest @ images
    return least + nan, most + nan


def _extended(
    operator: Map, basis: Tensor, images: Tensor, v: Tensor, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The orthonormal `basis` `(B, k, n)` and its images, extended by `count` Lanczos directions; the next one.

    The first of them is v `(B, n)`.
    """
    rows, products = list(basis.unbind(1)), list(images.unbind(1))
    for _ in range(count):
        rows.append(v)
        products.append(operator(v))
        left, basis = products[-1], torch.stack(rows, 1)
        for _ in range(2):
            left = left - torch.einsum("bkn,bk->bn", basis, torch.einsum("bkn,bn->bk", basis, left))
        norm = row_norm(left)
        # In an invariant subspace what is left is rounding error and no direction. The zero vector in its place
        # adds a zero eigenvalue.
        alive = norm > 100 * torch.finfo(left.dtype).eps * row_norm(products[-1])
        v = torch.where(alive[:, None], left / torch.where(alive, norm, 1.0)[:, None], 0.0)
    return basis, torch.stack(products, 1), v
