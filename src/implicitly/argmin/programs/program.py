"""A convex quadratic program as six tensors, each shared by the batch or with one entry per sample."""

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

# Columns whose largest entries differ by less than the square of this factor are left as they are.
EVEN = 16.0
# The largest factor, as a power of two, by which scaling balances primal and dual.
MOST = 40.0
# The number of dimensions of each tensor of a program if it is shared by the batch.
DIMS = (2, 1, 2, 1, 2, 1)


def times(M: Tensor, x: Tensor) -> Tensor:
    """M x for `M` `(r, c)` or `(B, r, c)` and `x` `(B, c)`, or `(B, k, c)` for k vectors per sample."""
    if M.ndim == 3 and x.ndim == 2:  # a row times the transpose takes a quarter of the time of M times a column
        return _rows_times(x.unsqueeze(1), M.mT).squeeze(1)
    return x @ M.mT if M.ndim == 2 else _rows_times(x, M.mT)


def _rows_times(x: Tensor, M: Tensor) -> Tensor:
    """x M for `x` `(B, k, c)` and `M` `(B, c, r)`, either of which may have one sample only."""
    if torch.compiler.is_dynamo_compiling():  # which turns a `bmm` with one row into loops, twenty times as slow
        batch = max(len(x), len(M))
        return torch.baddbmm(M.new_zeros(1, 1, 1), x.expand(batch, -1, -1), M.expand(batch, -1, -1), beta=0)
    return torch.bmm(x, M) if len(x) == len(M) else x @ M


def times_transposed(M: Tensor, x: Tensor) -> Tensor:
    """M' x for `M` `(r, c)` or `(B, r, c)` and `x` `(B, r)` or `(B, k, r)`."""
    return times(M.mT, x)


def dot(x: Tensor, y: Tensor) -> Tensor:
    """x'y for each sample, `(B,)`; either vector may be shared by the batch."""
    return (x * y).sum(-1)


@dataclass(frozen=True, eq=False)
class QuadraticProgram:
    """The quadratic program min 1/2 z'Qz + p'z subject to Gz <= h, Az = b, with a symmetric Q.

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
        """The six tensors."""
        return self.Q, self.p, self.G, self.h, self.A, self.b

    @property
    def sizes(self) -> tuple[int, int, int]:
        """The numbers `(n, q, m)` of unknowns, equalities and inequalities: the widths of z, ν and λ."""
        return self.Q.shape[-1], self.A.shape[-2], self.G.shape[-2]

    @property
    def batched(self) -> bool:
        """Whether any of the six has a batch dimension."""
        return any(t.ndim > d for t, d in zip(self.tensors, DIMS))

    @property
    def batch(self) -> int:
        """The number of samples; 1 if everything is shared."""
        return next((len(t) for t, d in zip(self.tensors, DIMS) if t.ndim > d), 1)

    def take_rows(self, rows: Tensor) -> QuadraticProgram:
        """The program of those samples."""
        return QuadraticProgram(*(t[rows] if t.ndim > d else t for t, d in zip(self.tensors, DIMS)))

    def finite(self) -> Tensor:
        """Which samples `(B,)` hold neither NaN nor inf."""
        finite = torch.ones(self.batch, dtype=torch.bool, device=self.Q.device)
        # A finite sum has finite terms only. An infinite one may also be an overflow: then look at each entry.
        first, *others = (t.sum(tuple(range(-d, 0))) for t, d in zip(self.tensors, DIMS))
        if not bool(sum(others, start=first).isfinite().all()):
            for t, d in zip(self.tensors, DIMS):
                finite = finite & t.isfinite().flatten(t.ndim - d).all(-1)
        return finite

    def without(self, bad: Tensor) -> QuadraticProgram:
        """This program with the `bad` `(B,)` samples replaced by a program whose solution is z = 0.

        Shared tensors stay as they are, unless all samples are bad.
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
    """What a solver found.

    `w` = (z, dual of Az = b, dual of Gz <= h) `(B, n + q + m)`, `slack` `(B, m)`, and which inequalities seem to
    be `binding`, `(B, m)` bool; `status` and `steps` `(B,)` int64; `evaluations` 0-d, the number of
    factorisations. `in_duals` says that only the last part of `w` is known, from which the rest follows: see
    `Condensed.point`.
    """

    w: Tensor
    slack: Tensor
    binding: Tensor
    status: Tensor
    steps: Tensor
    evaluations: Tensor
    in_duals: bool = False

    def take_rows(self, rows: Tensor) -> Point:
        """The point of those samples."""
        w, slack, binding, status, steps = (t[rows] for t in self[:5])
        return Point(w, slack, binding, status, steps, self.evaluations, self.in_duals)


# ------------------------------------------------------------------------------------------- equilibration


@dataclass(frozen=True, eq=False)
class Scaling:
    """How a program was scaled: z = U E ẑ, ν = U K ν̂, λ = U F λ̂, slack = U ŝ / F; each `(1 or B, ·)`.

    ν and λ are the duals of Az = b and Gz <= h. E, K and F scale the matrices from both sides. U `(1 or B, 1)`
    divides the vectors, and with them the solution, so that both have size one.
    """

    E: Tensor
    K: Tensor
    F: Tensor
    U: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The four tensors."""
        return self.E, self.K, self.F, self.U

    @property
    def of_matrices(self) -> Tensor:
        """The factors of the rows and columns of the KKT matrix."""
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
    """Equilibrate: the program with rows and columns of its KKT matrix of similar size, and its `Scaling`.

    Its vectors are `(B, ·)`; its matrices are shared if all of them were, else `(B, ·, ·)`.

    This is the method of Ruiz, "A scaling algorithm to equilibrate both rows and columns norms in matrices", 2001,
    except that rows of constraints are normalised at once, and that the diagonal of Q stands in for its rows. A
    row with a single entry, a bound on an unknown, then always becomes 1 and says nothing about the units of that
    unknown; the value of the bound does.
    """
    Q, G, A = (t if t.ndim == 3 else t.unsqueeze(0) for t in (program.Q, program.G, program.A))
    E, K, F, empty = _ruiz(Q, G, program.h, A, program.b, rounds)
    shared, batch = len(E) == 1 and program.Q.ndim == program.G.ndim == program.A.ndim == 2, program.batch
    p, h, b = (t.expand(batch, -1) for t in (program.p * E, program.h * F, program.b * K))
    t, U = _units((Q.diagonal(dim1=1, dim2=2) * E**2).clamp(min=0), p, torch.where(empty, float("inf"), h), b)
    own = E * t if len(t) in (1, len(E)) else E  # a shared Q of samples that each have their own t is zero
    Q, G, A = ((M * E.unsqueeze(1)).mul_(D.unsqueeze(2)) for M, E, D in ((Q, own, own), (G, E, F), (A, E, K)))
    Q, G, A = (M.squeeze(0) if shared else M.expand(batch, -1, -1) for M in (Q, G, A))
    p, b = p * (t / U), b / (t * U)
    # 0'z <= h either holds for every z, and gets no multiplier, or for none.
    one = torch.ones_like(h)
    h = torch.where(empty, torch.where(h < 0, -one, one), h / (t * U))
    return QuadraticProgram(Q, p, G, h, A, b), Scaling(E * t, K / t, F / t, U)


def _ruiz(
    Q: Tensor, G: Tensor, h: Tensor, A: Tensor, b: Tensor, rounds: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Factors `(1 or B, ·)` for the columns, the rows of A and the rows of G; and which rows of G are empty."""
    rows = max(len(Q), len(G), len(A))
    E, K, F = (torch.ones(rows, k, dtype=Q.dtype, device=Q.device) for k in (Q.shape[1], A.shape[1], G.shape[1]))
    empty = torch.ones_like(F, dtype=torch.bool)
    if not E.shape[1]:
        return E, K, F, empty
    diagonal = Q.diagonal(dim1=1, dim2=2).clamp(min=0)  # the largest entries of a semidefinite matrix
    most: list[Tensor | None] = [None, None]  # the largest weights of rows
    for k in range(rounds):
        column = diagonal * E**2
        norms = []
        for i, (matrix, norm) in enumerate(((G, F), (A, K))):
            if matrix.shape[1]:
                size = (matrix * E.unsqueeze(1)).abs_() if k else matrix.abs()
                norm = size.amax(2)
                weight = _reciprocal(norm)
                # Without zeros in the first two columns no row has a single entry.
                if not k and (size.shape[2] == 1 or maybe_any(size[:, :, :2].amin(2) == 0)):
                    most[i] = _most((h, b)[i], single=size.sum(2) == norm)
                if (limit := most[i]) is not None:
                    weight = torch.minimum(weight, limit)
                column = torch.maximum(column, size.mul_(weight.unsqueeze(2)).amax(1))
            norms.append(norm)
        column = torch.where(column > 0, column, 1.0)  # nothing is known about an empty column
        F, K = (_reciprocal(norm) for norm in norms)
        empty = norms[0] == 0
        E = E * _reciprocal(column).sqrt()
        # Checked on accelerators, too: launching a round takes longer than waiting for the answer.
        uneven = (column > EVEN) | (column < 1 / EVEN)
        if not torch.compiler.is_dynamo_compiling() and not bool(unwrapped(uneven).any()):
            break
    # Powers of two scale without rounding.
    E, K, F = (torch.exp2(torch.log2(t).round()) for t in (E, K, F))
    return E, K, F, empty


def _most(bound: Tensor, single: Tensor) -> Tensor:
    """The largest weight of a row with this right-hand side for the size of its columns, `(1 or B, ·)`.

    It limits rows with a `single` entry only: a bound that is not zero counts at most as if at a distance of one.
    """
    distance = bound.abs()
    distance = torch.where(distance > 0, distance, float("inf"))
    if distance.ndim == 2 and len(single) == 1:
        distance = distance.amin(0, keepdim=True)
    return torch.where(single, distance.reciprocal(), float("inf"))


def _units(diagonal: Tensor, p: Tensor, h: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """t and U, `(1 or B, 1)`, that bring a solution x = t U x̂ and its multipliers U λ̂ / t to size one.

    This is an estimate made before the solve: x is at least as far from the origin as constraints that exclude the
    origin; otherwise as near as the closest constraint or, if there is one, the minimum of the objective. Bounds
    far away say nothing. Q must not become so small beside the constraints that rounding loses it in the factors;
    where that limits t, U suits the smaller of x and the multipliers.
    """
    steep, curved = largest(p.abs()), largest(diagonal)
    needed = torch.maximum(largest(b.abs()), largest(-h))
    allowed = torch.where(h > 0, h, float("inf"))
    near = allowed.amin(1, keepdim=True) if h.shape[1] else torch.full_like(needed, float("inf"))
    free = torch.where((curved > 0) & (steep > 0), steep / curved, float("inf"))
    least = torch.finfo(p.dtype).eps ** 0.75 * free  # a bound that is closer is lost in rounding
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
    terms = math.log2(max(p.shape[1], 1))  # the number of terms in each entry of a product, as a power of two
    return torch.exp2(t), torch.exp2((torch.minimum(x - t, dual + t) - terms).round())


def largest(x: Tensor) -> Tensor:
    """The largest entry of each row `(..., 1)`, at least zero."""
    return x.amax(-1, keepdim=True).clamp(min=0) if x.shape[-1] else x.new_zeros(*x.shape[:-1], 1)


def _reciprocal(norm: Tensor) -> Tensor:
    """1 / norm, clamped so that scaling neither overflows nor amplifies noise without limit; 1 for empty rows."""
    return norm.masked_fill(~(norm > 0), 1.0).clamp_(1e-12, 1e12).reciprocal_()


def natural_residual(program: QuadraticProgram, scaling: Scaling, w: Tensor) -> tuple[Tensor, Tensor]:
    """The relative error of a scaled point of a scaled program `(B,)`, and its residual in the user's units.

    The residual is the norm of (stationarity, Az - b, min(dual, slack)), which vanishes only at solutions. The
    error, in scaled units, compares stationarity and feasibility each with the size of the given vectors, plus a
    small part of the size of the terms that are subtracted, and of `w`, since rounding errors are relative to
    these. The two are compared separately, as multipliers that grow without end would hide that there is no
    feasible point; and it is only a small part, as a point far away from the origin would hide that, too.
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
    """The scale of an error `(B,)`, in units in which solutions have size one.

    Of the `terms` only the share eps^0.3 counts: at the default tolerance eps^(2/3), the error allowed for them is
    a few eps of their size, which is their rounding error.
    """
    most, part = (torch.stack([row_norm(t) for t in of]).amax(0) for of in (given, terms))
    return 1 + most + torch.finfo(most.dtype).eps ** 0.3 * part


def failed(status: Tensor) -> Tensor:
    """Which samples `(B,)` have no solution, or no meaningful one."""
    return (status == Status.INFEASIBLE) | (status == Status.UNBOUNDED) | (status == Status.NON_FINITE)
