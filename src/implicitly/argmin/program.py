"""A convex quadratic program as six tensors, each shared by the batch or with one entry a sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from implicitly.iterate import Status
from implicitly.tree import row_norm, unwrapped

# Columns whose largest entries differ by less than the square of that are left as they are.
EVEN = 16.0
# Dimensions of each tensor of a program that is shared by the batch.
DIMS = (2, 1, 2, 1, 2, 1)


def times(M: Tensor, x: Tensor) -> Tensor:
    """M x for `M` `(r, c)` or `(B, r, c)` and `x` `(B, c)`, or `(B, k, c)` for k vectors a sample."""
    if M.ndim == 3 and x.ndim == 2:  # as a row times the transpose: a quarter of the time of a column
        return _rows_times(x.unsqueeze(1), M.mT).squeeze(1)
    return x @ M.mT if M.ndim == 2 else _rows_times(x, M.mT)


def _rows_times(x: Tensor, M: Tensor) -> Tensor:
    """x M for `x` `(B, k, c)` and `M` `(B, c, r)`, either of which may be of one sample."""
    if torch.compiler.is_dynamo_compiling():  # it makes loops of `bmm` with one row, twenty times as slow
        batch = max(len(x), len(M))
        return torch.baddbmm(M.new_zeros(1, 1, 1), x.expand(batch, -1, -1), M.expand(batch, -1, -1), beta=0)
    return torch.bmm(x, M) if len(x) == len(M) else x @ M


def times_transposed(M: Tensor, x: Tensor) -> Tensor:
    """M' x for `M` `(r, c)` or `(B, r, c)` and `x` `(B, r)` or `(B, k, r)`."""
    return times(M.mT, x)


def dot(x: Tensor, y: Tensor) -> Tensor:
    """x'y of each sample, for a vector of either that is shared, too: `(B,)`."""
    return (x * y).sum(-1)


@dataclass(frozen=True, eq=False)
class QuadraticProgram:
    """min 1/2 z'Qz + p'z subject to Gz <= h, Az = b; Q is symmetric.

    Shapes `(n, n)`, `(n,)`, `(m, n)`, `(m,)`, `(q, n)`, `(q,)`, each with or without `B` in front; m and
    q may be 0.
    """

    Q: Tensor
    p: Tensor
    G: Tensor
    h: Tensor
    A: Tensor
    b: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The six."""
        return self.Q, self.p, self.G, self.h, self.A, self.b

    @property
    def sizes(self) -> tuple[int, int, int]:
        """`(n, q, m)`: unknowns, equalities, inequalities; the widths of (z, dual of Az = b, dual of Gz <= h)."""
        return self.Q.shape[-1], self.A.shape[-2], self.G.shape[-2]

    @property
    def batched(self) -> bool:
        """Whether any of the six has one entry a sample."""
        return any(t.ndim > d for t, d in zip(self.tensors, DIMS))

    @property
    def batch(self) -> int:
        """How many samples; 1 where everything is shared."""
        return next((len(t) for t, d in zip(self.tensors, DIMS) if t.ndim > d), 1)

    def take_rows(self, rows: Tensor) -> QuadraticProgram:
        """The program of those samples."""
        return QuadraticProgram(*(t[rows] if t.ndim > d else t for t, d in zip(self.tensors, DIMS)))

    def finite(self) -> Tensor:
        """`(B,)`, which samples hold neither NaN nor inf."""
        finite = torch.ones(self.batch, dtype=torch.bool, device=self.Q.device)
        for t, d in zip(self.tensors, DIMS):
            # A sum is finite only if all of its terms are; that of finite ones may overflow, then look at each.
            total = t.sum(tuple(range(-d, 0)))
            if not bool(total.isfinite().all()):
                total = t.isfinite().all(-1) if d == 1 else t.isfinite().all(-1).all(-1)
                finite = finite & total
        return finite

    def without(self, bad: Tensor) -> QuadraticProgram:
        """This program with nothing of the `bad` `(B,)` samples: what is solved by z = 0 stands in for them.

        What the batch shares stays, unless all samples are bad.
        """
        n = self.Q.shape[-1]
        stand_in = (torch.eye(n, dtype=self.Q.dtype, device=self.Q.device), 0.0, 0.0, 1.0, 0.0, 0.0)
        everything = bool(unwrapped(bad).all())
        rows = [bad[:, None, None] if d == 2 else bad[:, None] for d in DIMS]
        tensors = []
        for t, d, row, s in zip(self.tensors, DIMS, rows, stand_in):
            if t.ndim > d:
                t = torch.where(row, s, t)
            elif everything:
                t = torch.where(torch.ones_like(t, dtype=torch.bool), s, t)
            tensors.append(t)
        return QuadraticProgram(*tensors)


class Point(NamedTuple):
    """What a solver found: `w` = (z, dual of Az = b, dual of Gz <= h) `(B, n + q + m)`, `slack` `(B, m)` and which
    inequalities seem to be `binding` `(B, m)` bool; `status` and `steps` `(B,)` int64, `evaluations` 0-d, of
    factorisations."""

    w: Tensor
    slack: Tensor
    binding: Tensor
    status: Tensor
    steps: Tensor
    evaluations: Tensor

    def take_rows(self, rows: Tensor) -> Point:
        """That of some samples."""
        w, slack, binding, status, steps = (t[rows] for t in self[:-1])
        return Point(w, slack, binding, status, steps, self.evaluations)


# ------------------------------------------------------------------------------------------- equilibration


@dataclass(frozen=True, eq=False)
class Scaling:
    """z = E ẑ, dual of Az = b = K ν̂, dual of Gz <= h = F λ̂, slack = ŝ / F; each `(1 or B, ·)`."""

    E: Tensor
    K: Tensor
    F: Tensor

    @property
    def w(self) -> Tensor:
        """The factors of (z, ν, λ), one row."""
        rows = max(len(self.E), len(self.K), len(self.F))
        return torch.cat([t.expand(rows, -1) for t in (self.E, self.K, self.F)], dim=1)

    def take_rows(self, rows: Tensor) -> Scaling:
        """The scaling of those samples."""
        return Scaling(*(t if len(t) == 1 else t[rows] for t in (self.E, self.K, self.F)))


def equilibrate(program: QuadraticProgram, rounds: int = 10) -> tuple[QuadraticProgram, Scaling]:
    """The program with rows and columns of its KKT matrix of like size, and how it was scaled.

    Its vectors are `(B, ·)`; its matrices are shared if all of them were, else `(B, ·, ·)`.

    As Ruiz, "A scaling algorithm to equilibrate both rows and columns norms in matrices", 2001, but with the rows
    of constraints normalised at once, and the diagonal of Q in place of its rows.
    """
    Q, G, A = (t if t.ndim == 3 else t.unsqueeze(0) for t in (program.Q, program.G, program.A))
    rows = max(len(Q), len(G), len(A))
    E, K, F = (torch.ones(rows, k, dtype=Q.dtype, device=Q.device) for k in program.sizes)
    diagonal = Q.diagonal(dim1=1, dim2=2).clamp(min=0)  # the largest entries of a semidefinite matrix
    for _ in range(rounds):
        column = diagonal * E**2
        sizes = []
        for matrix, scale in ((G, F), (A, K)):
            if matrix.shape[1]:
                size = (matrix * E.unsqueeze(1)).abs_()
                scale = _reciprocal(size.amax(2))
                column = torch.maximum(column, size.mul_(scale.unsqueeze(2)).amax(1))
            sizes.append(scale)
        F, K = sizes
        E = E * _reciprocal(column).sqrt()
        # Looked at on accelerators, too: a round takes longer to launch than to wait for.
        uneven = (column > EVEN) | (column < 1 / EVEN)
        if not torch.compiler.is_dynamo_compiling() and not bool(unwrapped(uneven).any()):
            break
    # Powers of two scale without rounding.
    E, K, F = (torch.exp2(torch.log2(t).round()) for t in (E, K, F))
    Q, G, A = ((t * E.unsqueeze(1)).mul_(scale.unsqueeze(2)) for t, scale in ((Q, E), (G, F), (A, K)))
    shared, batch = rows == 1 and program.Q.ndim == program.G.ndim == program.A.ndim == 2, program.batch
    Q, G, A = (t.squeeze(0) if shared else t.expand(batch, -1, -1) for t in (Q, G, A))
    p, h, b = (t.expand(batch, -1) for t in (program.p * E, program.h * F, program.b * K))
    return QuadraticProgram(Q, p, G, h, A, b), Scaling(E, K, F)


def _reciprocal(norm: Tensor) -> Tensor:
    """1 / norm, kept within what is sane; 1 for empty rows."""
    return 1 / torch.where(norm > 0, norm, 1.0).clamp(1e-12, 1e12)


def natural_residual(program: QuadraticProgram, scaling: Scaling, w: Tensor) -> tuple[Tensor, Tensor]:
    """The norm `(B,)` of (stationarity, Az - b, min(dual, slack)), which vanishes at solutions alone, and what
    it is to be compared with; both in the user's units, for a scaled program and point.

    Stationarity and feasibility are each compared with the size of the vectors given, and a little of that of the
    terms of which they are differences, as rounding is. Apart, since multipliers that grow without end would hide
    that there is no feasible point; a little, since so would a point far away from the origin.
    """
    z, nu, lam = w.split(program.sizes, dim=1)
    Qz, Gl, An = times(program.Q, z), times_transposed(program.G, lam), times_transposed(program.A, nu)
    Gz, Az = times(program.G, z), times(program.A, z)
    lam, slack = lam * scaling.F, (program.h - Gz) / scaling.F
    E, K, F = scaling.E, scaling.K, scaling.F
    binding = (lam > slack).to(z.dtype)
    slope = row_norm((Qz + program.p + Gl + An) / E)
    distance = row_norm(torch.cat([(Az - program.b) / K, torch.minimum(lam, slack)], dim=1))
    worst = torch.maximum(
        slope / _size([program.p / E], [Qz / E, Gl / E, An / E]),
        distance / _size([program.b / K, binding * program.h / F], [Az / K, binding * Gz / F]),
    )
    residual = torch.hypot(slope, distance)
    return residual, torch.where(worst > 0, residual / worst, 1.0)


def _size(given: list[Tensor], terms: list[Tensor]) -> Tensor:
    """What an error `(B,)` is to be compared with."""
    most, part = (torch.stack([row_norm(t) for t in of]).amax(0) for of in (given, terms))
    return 1 + most + torch.finfo(most.dtype).eps ** 0.3 * part


def failed(status: Tensor) -> Tensor:
    """Which samples `(B,)` have no solution, or none that means anything."""
    return (status == Status.INFEASIBLE) | (status == Status.UNBOUNDED) | (status == Status.NON_FINITE)
