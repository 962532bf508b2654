"""A convex quadratic program as six tensors, each shared by the batch or with one entry a sample."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from implicitly.host import maybe_any
from implicitly.solution import Status
from implicitly.transforms import unwrapped
from implicitly.tree import row_norm

# Columns whose largest entries differ by less than the square of that are left as they are.
EVEN = 16.0
# The largest factor, as a power of two, that brings primal and dual closer together.
MOST = 40.0
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
        # A sum is finite only if all of its terms are; that of finite ones may overflow, then look at each.
        first, *others = (t.sum(tuple(range(-d, 0))) for t, d in zip(self.tensors, DIMS))
        if not bool(sum(others, start=first).isfinite().all()):
            for t, d in zip(self.tensors, DIMS):
                finite = finite & t.isfinite().flatten(t.ndim - d).all(-1)
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
    factorisations; whether only the last part of `w` is there, and the rest follows, see `Condensed.point`."""

    w: Tensor
    slack: Tensor
    binding: Tensor
    status: Tensor
    steps: Tensor
    evaluations: Tensor
    in_duals: bool = False

    def take_rows(self, rows: Tensor) -> Point:
        """That of some samples."""
        w, slack, binding, status, steps = (t[rows] for t in self[:5])
        return Point(w, slack, binding, status, steps, self.evaluations, self.in_duals)


# ------------------------------------------------------------------------------------------- equilibration


@dataclass(frozen=True, eq=False)
class Scaling:
    """z = U E ẑ, dual of Az = b = U K ν̂, dual of Gz <= h = U F λ̂, slack = U ŝ / F; each `(1 or B, ·)`.

    E, K and F scale the matrices, on both sides; U `(1 or B, 1)` divides the vectors, and with them the solution,
    for both to be of size one.
    """

    E: Tensor
    K: Tensor
    F: Tensor
    U: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The four."""
        return self.E, self.K, self.F, self.U

    @property
    def of_matrices(self) -> Tensor:
        """The factors of the rows and columns of KKT matrices."""
        rows = max(len(self.E), len(self.K), len(self.F))
        return torch.cat([t.expand(rows, -1) for t in (self.E, self.K, self.F)], dim=1)

    @property
    def w(self) -> Tensor:
        """The factors of (z, ν, λ)."""
        return self.of_matrices * self.U

    def take_rows(self, rows: Tensor) -> Scaling:
        """The scaling of those samples."""
        return Scaling(*(t if len(t) == 1 else t[rows] for t in self.tensors))


def equilibrate(program: QuadraticProgram, rounds: int = 10) -> tuple[QuadraticProgram, Scaling]:
    """The program with rows and columns of its KKT matrix of like size, and how it was scaled.

    Its vectors are `(B, ·)`; its matrices are shared if all of them were, else `(B, ·, ·)`.

    As Ruiz, "A scaling algorithm to equilibrate both rows and columns norms in matrices", 2001, but with the rows
    of constraints normalised at once, and the diagonal of Q in place of its rows. The entry of a row that has but
    one, a bound on an unknown, is then always 1, and tells nothing of that unknown's units: the bound itself does.
    """
    Q, G, A = (t if t.ndim == 3 else t.unsqueeze(0) for t in (program.Q, program.G, program.A))
    E, K, F, empty = _ruiz(Q, G, program.h, A, program.b, rounds)
    shared, batch = len(E) == 1 and program.Q.ndim == program.G.ndim == program.A.ndim == 2, program.batch
    p, h, b = (t.expand(batch, -1) for t in (program.p * E, program.h * F, program.b * K))
    t, U = _units((Q.diagonal(dim1=1, dim2=2) * E**2).clamp(min=0), p, torch.where(empty, float("inf"), h), b)
    own = E * t if len(t) in (1, len(E)) else E  # a Q that samples share, of which each has its own t, is zero
    Q, G, A = ((M * E.unsqueeze(1)).mul_(D.unsqueeze(2)) for M, E, D in ((Q, own, own), (G, E, F), (A, E, K)))
    Q, G, A = (M.squeeze(0) if shared else M.expand(batch, -1, -1) for M in (Q, G, A))
    p, b = p * (t / U), b / (t * U)
    # 0'z <= h either says nothing, and has no force then, or excludes all.
    one = torch.ones_like(h)
    h = torch.where(empty, torch.where(h < 0, -one, one), h / (t * U))
    return QuadraticProgram(Q, p, G, h, A, b), Scaling(E * t, K / t, F / t, U)


def _ruiz(
    Q: Tensor, G: Tensor, h: Tensor, A: Tensor, b: Tensor, rounds: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Factors `(1 or B, ·)` of columns, and rows of A and of G, and which rows of G are empty."""
    rows = max(len(Q), len(G), len(A))
    E, K, F = (torch.ones(rows, k, dtype=Q.dtype, device=Q.device) for k in (Q.shape[1], A.shape[1], G.shape[1]))
    empty = torch.ones_like(F, dtype=torch.bool)
    if not E.shape[1]:
        return E, K, F, empty
    diagonal = Q.diagonal(dim1=1, dim2=2).clamp(min=0)  # the largest entries of a semidefinite matrix
    most = [torch.ones_like(F), torch.ones_like(K)]
    for k in range(rounds):
        column = diagonal * E**2
        norms = []
        for i, (matrix, norm) in enumerate(((G, F), (A, K))):
            if matrix.shape[1]:
                size = (matrix * E.unsqueeze(1)).abs_() if k else matrix.abs()
                norm = size.amax(2)
                if not k:
                    most[i] = _most((h, b)[i], single=size.sum(2) == norm)
                weight = torch.minimum(_reciprocal(norm), most[i])
                column = torch.maximum(column, size.mul_(weight.unsqueeze(2)).amax(1))
            norms.append(norm)
        column = torch.where(column > 0, column, 1.0)  # of which nothing is known
        F, K = (_reciprocal(norm) for norm in norms)
        empty = norms[0] == 0
        E = E * _reciprocal(column).sqrt()
        # Looked at on accelerators, too: a round takes longer to launch than to wait for.
        uneven = (column > EVEN) | (column < 1 / EVEN)
        if not torch.compiler.is_dynamo_compiling() and not bool(unwrapped(uneven).any()):
            break
    # Powers of two scale without rounding.
    E, K, F = (torch.exp2(torch.log2(t).round()) for t in (E, K, F))
    return E, K, F, empty


def _most(bound: Tensor, single: Tensor) -> Tensor:
    """What a column's entries in rows with this right-hand side may count at most, `(1 or B, ·)`: in those of a
    `single` entry no more than puts the bound, where it is not zero, at a distance of one."""
    distance = bound.abs()
    distance = torch.where(distance > 0, distance, float("inf"))
    if distance.ndim == 2 and len(single) == 1:
        distance = distance.amin(0, keepdim=True)
    return torch.where(single, distance.reciprocal(), float("inf"))


def _units(diagonal: Tensor, p: Tensor, h: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """t and U, `(1 or B, 1)`, that bring a solution x and its multipliers to size one: t U x̂ and U λ̂ / t.

    As far as can be told beforehand: x is no nearer to the origin than constraints that exclude it, and else as
    near as the closest one, or the least of the objective where there is one. Bounds far away say nothing. Q is
    not to become so small beside the constraints that its factors lose it; then U is for the smaller of both.
    """
    steep, curved = largest(p.abs()), largest(diagonal)
    needed = torch.maximum(largest(b.abs()), largest(-h))
    allowed = torch.where(h > 0, h, float("inf"))
    near = allowed.amin(1, keepdim=True) if h.shape[1] else torch.full_like(needed, float("inf"))
    free = torch.where((curved > 0) & (steep > 0), steep / curved, float("inf"))
    least = torch.finfo(p.dtype).eps ** 0.75 * free  # of a bound that is closer, rounding leaves nothing
    reach = torch.minimum(free, torch.where(least.isfinite(), torch.maximum(near, least), near))
    x = torch.maximum(needed, torch.where(reach.isfinite(), reach, 0.0))
    x = torch.where(x > 0, x, 1.0)
    dual = torch.maximum(steep, curved * x)
    x, dual = torch.log2(x), torch.log2(torch.where(dual > 0, dual, x))
    t = torch.maximum(x - dual, -torch.log2(EVEN * curved)) / 2
    t = torch.where(curved > 0, t, (x - dual) / 2)
    if len(diagonal) == 1 < len(t) and maybe_any(diagonal > 0):  # one matrix has one t
        t = t.median(0, keepdim=True).values
    t = torch.where(t.abs() > math.log2(EVEN) / 2, t.clamp(-MOST, MOST), 0.0).round()
    terms = math.log2(max(p.shape[1], 1))  # of each entry of a product
    return torch.exp2(t), torch.exp2((torch.minimum(x - t, dual + t) - terms).round())


def largest(x: Tensor) -> Tensor:
    """The largest entry of each row `(..., 1)`, no less than zero."""
    return x.amax(-1, keepdim=True).clamp(min=0) if x.shape[-1] else x.new_zeros(*x.shape[:-1], 1)


def _reciprocal(norm: Tensor) -> Tensor:
    """1 / norm, kept within what is sane; 1 for empty rows."""
    return norm.masked_fill(~(norm > 0), 1.0).clamp_(1e-12, 1e12).reciprocal_()


def natural_residual(program: QuadraticProgram, scaling: Scaling, w: Tensor) -> tuple[Tensor, Tensor]:
    """How far a scaled point is from solving a scaled program `(B,)`, relative; and its residual in user's units.

    The residual is the norm of (stationarity, Az - b, min(dual, slack)), which vanishes at solutions alone. In the
    first, in scaled units, stationarity and feasibility are each compared with the size of the vectors given, and
    a little of that of the terms of which they are differences, and of `w`, as rounding is. Apart, since
    multipliers that grow without end would hide that there is no feasible point; a little, since so would a point
    far away from the origin.
    """
    z, nu, lam = w.split(program.sizes, dim=1)
    Qz, Gl, An = times(program.Q, z), times_transposed(program.G, lam), times_transposed(program.A, nu)
    Gz, Az = times(program.G, z), times(program.A, z)
    slack = program.h - Gz
    E, K, F, U = scaling.tensors
    binding = (lam > slack).to(z.dtype)
    slope, off, gap = Qz + program.p + Gl + An, Az - program.b, torch.minimum(lam, slack)
    worst = torch.maximum(
        row_norm(slope) / _size([program.p], [Qz, Gl, An, w]),
        row_norm(torch.cat([off, gap], 1)) / _size([program.b, binding * program.h], [Az, binding * Gz, z]),
    )
    gap = torch.minimum(lam * F, slack / F)
    return worst, row_norm(torch.cat([slope / E, off / K, gap], 1) * U)


def _size(given: list[Tensor], terms: list[Tensor]) -> Tensor:
    """What an error `(B,)` is to be compared with, where solutions have size one."""
    most, part = (torch.stack([row_norm(t) for t in of]).amax(0) for of in (given, terms))
    return 1 + most + torch.finfo(most.dtype).eps ** 0.3 * part


def failed(status: Tensor) -> Tensor:
    """Which samples `(B,)` have no solution, or none that means anything."""
    return (status == Status.INFEASIBLE) | (status == Status.UNBOUNDED) | (status == Status.NON_FINITE)
