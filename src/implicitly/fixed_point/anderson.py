"""Anderson acceleration."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from implicitly.checks import DAMPING, FINITE_AND_NONNEGATIVE, check_count, check_number
from implicitly.fixed_point.rounding import square_of_rounding
from implicitly.history import (
    combine,
    empty_slots,
    filled,
    products,
    with_room,
    write_cross,
    write_kept,
    write_result,
)
from implicitly.host import maybe_any, on_host, remembered, to_host, to_tensor
from implicitly.iterate import Proposal, Residual, Solver, where_rows
from implicitly.transforms import is_cpu, records

# Weights whose absolute values add up to more are not believed: see `_weights`.
LARGEST_WEIGHTS = 1e4
# The value used for the square of a residual that is exactly 0, in multiples of the smallest normal number. That
# residual then gets all the weight.
LEAST = 1e8


@dataclass(frozen=True)
class Anderson(Solver):
    """Anderson acceleration: the combination of the last iterates that minimises the combined residual.

    z <- sum_i a_i (z_i + damping r_i), with a minimising |sum_i a_i r_i| subject to sum_i a_i = 1. The Gram matrix
    of the residuals gains one row per step. If the small linear system is too ill-conditioned to be trusted, the
    step is the plain damped one. Walker and Ni, "Anderson acceleration for fixed-point iterations", SIAM J.
    Numer. Anal. 49 (2011).

    `rtol`, `atol` and `max_steps` are described in `implicitly.iterate.Solver`.

    Args:
        history: how many iterates are combined; memory is `2 * history` states.
        damping: the mixing parameter, called beta in the literature.
        regularisation: added to the diagonal of the Gram matrix, after scaling the diagonal to 1; None: 10 eps.
    """

    history: int = 5
    damping: float = 1.0
    regularisation: float | None = None

    history_slots: ClassVar[int] = 2

    def __post_init__(self):
        super().__post_init__()
        check_count("Anderson", "history", self.history)
        check_number("Anderson", "damping", self.damping, DAMPING)
        if self.regularisation is not None:
            check_number("Anderson", "regularisation", self.regularisation, FINITE_AND_NONNEGATIVE)

    def start(self, F: Residual, z: Tensor, r: Tensor) -> tuple[Tensor, ...]:
        """The history: residuals and damped iterates `(B, m, n)`, and the residuals' Gram matrix `(B, m, m)`.

        In the Gram matrix, an empty slot has a row of the identity.
        """
        slots = min(self.history, self.max_steps)
        residuals, mixed = empty_slots(z, slots)
        gram = torch.eye(slots, dtype=z.dtype, device=z.device).expand(z.shape[0], slots, slots).clone()
        return residuals, mixed, gram

    def propose(self, F: Residual, k: int | Tensor, z: Tensor, r: Tensor, memory: tuple[Tensor, ...]) -> Proposal:
        """The combination of the iterates in the history, which now include `z`."""
        residuals, mixed, gram = memory
        m = gram.shape[1]
        slot, count = k % m, min(k + 1, m) if isinstance(k, int) else k + 1
        residuals, mixed = with_room(residuals, slot, m), with_room(mixed, slot, m)
        residuals = write_kept(residuals, slot, r)
        mixed, _ = write_result(mixed, slot, partial(torch.add, alpha=self.damping), z, r)
        row = products(r, filled(residuals, count))
        ridge = self._ridge(row.dtype)
        if isinstance(slot, int) and on_host(gram, row) and not records():
            weights = to_tensor(_weights_on_host(to_host(gram), to_host(row), slot, ridge))
        else:
            gram = write_cross(gram, slot, _with_ridge(row, slot, ridge, square_of_rounding(F, z)))
            weights = _weights(filled(filled(gram, count).mT, count), slot, count)
        return Proposal(combine(weights, filled(mixed, count)), (residuals, mixed, gram))

    def _ridge(self, dtype: torch.dtype) -> float:
        return 10 * torch.finfo(dtype).eps if self.regularisation is None else self.regularisation


def _weights_on_host(gram: np.ndarray, row: np.ndarray, slot: int, ridge: float) -> np.ndarray:
    """As `_weights`, in NumPy, in a third of the time; first writes `row` `(B, c)` to `gram` `(B, m, m)`."""
    count = row.shape[1]
    row[:, slot] = np.maximum((1 + ridge) * row[:, slot], LEAST * np.finfo(row.dtype).tiny)
    gram[:, slot, :count] = gram[:, :count, slot] = row
    known = gram[:, :count, :count]
    with np.errstate(all="ignore"):
        # Pivoting goes by size, so all residuals are scaled to length 1 first.
        scale = 1 / np.sqrt(known.diagonal(axis1=1, axis2=2))
        unit = known * scale[:, :, None] * scale[:, None]
        try:
            weights = scale * np.linalg.solve(unit, scale[:, :, None])[:, :, 0]
        except np.linalg.LinAlgError:  # one system is singular, which says nothing about the others
            weights = to_host(_eliminated(to_tensor(known), count)[0])
        total = weights.sum(1, keepdims=True)  # w'Gw, which is positive if G is positive definite
        weights /= total
        believable = (np.abs(weights).sum(1) < LARGEST_WEIGHTS) & (total[:, 0] > 0)
    if believable.all():
        return weights
    newest = np.arange(count) == slot
    return np.where(believable[:, None], weights, newest.astype(row.dtype))


def _with_ridge(row: Tensor, slot: int | Tensor, ridge: float, rounding: Tensor | None = None) -> Tensor:
    """A new `row` `(B, c)` of the Gram matrix, with its diagonal entry, at `slot`, multiplied by 1 + ridge.

    The entry is at least `rounding` `(B,)`, so that residuals below rounding count alike and get equal weights.
    """
    tiny = LEAST * torch.finfo(row.dtype).tiny
    least = tiny if rounding is None else rounding.clamp(min=tiny)
    if isinstance(slot, Tensor):
        diagonal = torch.arange(row.shape[1], device=row.device) == slot
        least = least.unsqueeze(1) if isinstance(least, Tensor) else least
        return torch.where(diagonal, ((1 + ridge) * row).clamp(min=least), row)
    diagonal = row.select(1, slot)
    diagonal.copy_((diagonal * (1 + ridge)).clamp(min=least))  # vmap does not support clamp_
    return row


def _weights(gram: Tensor, slot: int | Tensor, count: int | Tensor) -> Tensor:
    """Weights `(B, c)`, with sum 1, that minimise the combined residual; where unreliable, the newest alone."""
    weights, believable = _least(gram, count)
    if on_host(believable) and not maybe_any(~believable):
        return weights
    if records():  # again without the unreliable systems, whose NaN must not reach a derivative
        eye = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
        weights, _ = _least(torch.where(believable[:, None, None], gram, eye), count)
    newest = _newest(slot, gram.shape[1], gram.dtype, gram.device)
    return where_rows(believable, weights, newest)


def _least(gram: Tensor, count: int | Tensor) -> tuple[Tensor, Tensor]:
    """The solution `(B, c)` of G w = 1, scaled to sum 1, and for which samples `(B,)` it can be trusted.

    Residuals shrink by orders of magnitude over the history, but Cholesky and elimination without pivoting are
    both as accurate as if all had length 1.
    """
    if is_cpu(gram) and not torch.compiler.is_dynamo_compiling():
        factor, info = torch.linalg.cholesky_ex(gram)
        right = gram.new_ones(gram.shape[0], gram.shape[1], 1)
        weights, definite = torch.cholesky_solve(right, factor)[:, :, 0], info == 0
    else:
        weights, definite = _eliminated(gram, count)
    weights = weights / weights.sum(1, keepdim=True)
    # Weights this large mostly cancel each other: the history has become linearly dependent. (An iteration that
    # contracts by q needs weights of about 1 / (1 - q).) NaN compares false.
    return weights, (torch.linalg.vector_norm(weights, 1, dim=1) < LARGEST_WEIGHTS) & definite


def _eliminated(gram: Tensor, count: int | Tensor) -> tuple[Tensor, Tensor]:
    """The solution `(B, c)` of G w = 1 by elimination, and for which samples `(B,)` G is positive definite.

    Library decompositions on an accelerator make the host wait, which a CUDA graph does not allow; their rounding
    depends on the batch size; and a compiler cannot fuse them with anything.
    """
    if isinstance(count, Tensor):  # the right-hand side is 0 for empty slots
        right = (torch.arange(gram.shape[1], device=gram.device) < count).to(gram.dtype)
        upper = torch.cat([gram, right[:, None].expand(len(gram), -1, 1)], dim=2)
    else:
        upper = torch.nn.functional.pad(gram, (0, 1), value=1.0)
    # Gauss elimination on [[G, 1], [I, 0]]: the Schur complement in the corner is -G^-1 1, so no back substitution
    # is needed.
    lower = _unit_rows(gram.shape[1], gram.dtype, gram.device)
    whole, pivots = torch.cat([upper, lower.expand(len(gram), -1, -1)], dim=1), []
    for j in range(gram.shape[1]):
        row = whole.narrow(1, j, 1)
        pivots.append(row.narrow(2, j, 1))
        whole = torch.addcmul(whole, whole.narrow(2, j, 1) / pivots[-1], row, value=-1)
    return -whole[:, gram.shape[1] :, -1], (torch.cat(pivots, dim=1) > 0).flatten(1).all(1)


@remembered(64)
def _newest(slot: int | Tensor, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`(count,)`, 1 at `slot` and 0 elsewhere."""
    return (torch.arange(count, device=device) == slot).to(dtype)


@remembered(64)
def _unit_rows(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`(count, count + 1)`, the identity and a column of zeros."""
    return torch.eye(count, count + 1, dtype=dtype, device=device)
