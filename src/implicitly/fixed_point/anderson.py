"""Anderson acceleration."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from implicitly.iterate import Proposal, Residual, Solver, write


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
        """Residuals `(B, m, n)`, mixed iterates `(B, m, n)` and the Gram matrix `(B, m, m)`."""
        slots = min(self.history, self.max_steps)
        residuals = z.new_zeros(z.shape[0], slots, z.shape[1])
        return residuals, torch.zeros_like(residuals), z.new_zeros(z.shape[0], slots, slots)

    def propose(self, F: Residual, k: int | Tensor, z: Tensor, r: Tensor, memory: tuple[Tensor, ...]) -> Proposal:
        """The mix of the iterates remembered, `z` among them."""
        residuals, mixed, gram = memory
        slots = gram.shape[1]
        slot = k % slots
        residuals = write(residuals, slot, r)
        mixed = write(mixed, slot, torch.add(z, r, alpha=self.damping))
        row = torch.bmm(r.unsqueeze(1), residuals.mT)[:, 0]
        gram = write(write(gram, slot, row), slot, row, dim=2)
        place = torch.arange(slots, device=z.device)
        weights = self._weights(gram, (place <= k), place == slot)
        return Proposal(torch.bmm(weights.unsqueeze(1), mixed)[:, 0], (residuals, mixed, gram))

    def _weights(self, gram: Tensor, filled: Tensor, newest: Tensor) -> Tensor:
        """The weights `(B, m)` that sum to 1 and make the mixed residual least, 0 where nothing is `filled`."""
        eps = torch.finfo(gram.dtype).eps
        extra = 10 * eps if self.regularisation is None else self.regularisation
        size = gram.diagonal(dim1=1, dim2=2)
        # Scaled to unit diagonal: residuals shrink by orders of magnitude over the history.
        scale = torch.where(filled & (size > 0), size.rsqrt(), 0.0)
        scaled = scale.unsqueeze(2) * gram * scale.unsqueeze(1)
        scaled = scaled + torch.diag_embed(extra + (scale == 0).to(gram.dtype))
        solved, info = torch.linalg.solve_ex(scaled, scale)
        weights = scale * solved
        total = weights.sum(1, keepdim=True)
        weights = weights / total
        # Weights this large only cancel each other: the history has become linearly dependent.
        believable = (info == 0) & (weights.abs().sum(1) < eps**-0.5)
        return torch.where(believable.unsqueeze(1), weights, newest.to(gram.dtype))
