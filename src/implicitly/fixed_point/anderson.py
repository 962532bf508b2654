"""Anderson acceleration."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from implicitly.history import combine, empty_slots, products, write, write_sum
from implicitly.iterate import Proposal, Residual, Solver, happens, where_rows

LARGEST_WEIGHTS = 1e4


@dataclass(frozen=True)
class Anderson(Solver):
    """Anderson acceleration: the mix of the last iterates whose mixed residual is least.

    z <- sum_i a_i (z_i + damping r_i), with a minimising |sum_i a_i r_i| subject to sum_i a_i = 1. The Gram
    matrix of the residuals gains one row a step. Where the small system is too ill-conditioned to be believed,
    the step is the plain damped one. Walker and Ni, "Anderson acceleration for fixed-point iterations", SIAM J.
    Numer. Anal. 49 (2011).

    Args:
        history: how many iterates are mixed; memory is `2 * history` states.
        damping: the beta of the literature.
        regularisation: added to the diagonal of the Gram matrix, whose diagonal is scaled to 1; None: 10 eps.
    """

    history: int = 5
    damping: float = 1.0
    regularisation: float | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.history < 1:
            raise ValueError(f"Anderson: history must be at least 1, got {self.history}")
        if not 0 < self.damping <= 1:
            raise ValueError(f"Anderson: damping must be in (0, 1], got {self.damping}")
        if self.regularisation is not None and self.regularisation < 0:
            raise ValueError(f"Anderson: regularisation must be >= 0, got {self.regularisation}")

    def start(self, F: Residual, z: Tensor, r: Tensor) -> tuple[Tensor, ...]:
        """Residuals and mixed iterates `(B, m, n)`, the Gram matrix of the residuals scaled to unit length
        `(B, m, m)` and these scales `(B, m)`; an empty slot has scale 0 and a row of the identity."""
        slots = min(self.history, self.max_steps)
        residuals, mixed = empty_slots(z, slots)
        gram = torch.eye(slots, dtype=z.dtype, device=z.device).expand(z.shape[0], slots, slots).clone()
        return residuals, mixed, gram, z.new_zeros(z.shape[0], slots)

    def propose(self, F: Residual, k: int | Tensor, z: Tensor, r: Tensor, memory: tuple[Tensor, ...]) -> Proposal:
        """The mix of the iterates remembered, `z` among them."""
        residuals, mixed, gram, scale = memory
        slot = k % gram.shape[1]
        residuals = write(residuals, slot, r)
        mixed = write_sum(mixed, slot, z, r, self.damping)
        row = products(r, residuals)
        # Residuals shrink by orders of magnitude over the history: the system is solved for unit vectors.
        newest = torch.zeros_like(row).index_fill(1, _index(slot, row), 1.0)
        size = (row * newest).sum(1)
        length = torch.where(size > 0, torch.where(size > 0, size, 1.0).rsqrt(), 0.0)
        scale = write(scale, slot, length)
        row = torch.addcmul(row * scale * length.unsqueeze(1), newest, newest, value=self._ridge(row.dtype))
        gram = write(write(gram, slot, row), slot, row, dim=2)
        weights = _weights(gram, scale, newest)
        return Proposal(combine(weights, mixed), (residuals, mixed, gram, scale))

    def _ridge(self, dtype: torch.dtype) -> float:
        return 10 * torch.finfo(dtype).eps if self.regularisation is None else self.regularisation


def _index(slot: int | Tensor, like: Tensor) -> Tensor:
    return slot.reshape(1) if isinstance(slot, Tensor) else torch.full((1,), slot, device=like.device)


def _weights(gram: Tensor, scale: Tensor, newest: Tensor) -> Tensor:
    """The weights `(B, m)`, of sum 1, that make the mixed residual least; `newest` where they mean nothing."""
    solved, info = torch.linalg.solve_ex(gram, scale)
    weights = scale * solved
    total = weights.sum(1, keepdim=True)
    weights = weights / torch.where(total == 0, 1.0, total)
    # Weights this large only cancel each other: the history has become linearly dependent. (An iteration that
    # contracts by q needs weights of about 1 / (1 - q).)
    believable = (weights.abs().sum(1) < LARGEST_WEIGHTS) & (info == 0) & (total[:, 0] != 0)
    if not happens(~believable):
        return weights
    return where_rows(believable, weights, newest)
