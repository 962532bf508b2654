"""The Jacobian of a conic program's optimality condition, dense or sparse, and where it is singular."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import vjp

from implicitly.argmin.convex.conic import Cones, Pattern
from implicitly.argmin.convex.conic_solver import Clarabel, Workers
from implicitly.argmin.convex.optional import require
from implicitly.condition import Map
from implicitly.host import maybe_any
from implicitly.tree import row_norm

# Up to this many unknowns, the systems of a batch are dense matrices; beyond, sparse ones that are solved in turn.
DENSE_UP_TO = 150
# The largest number of entries in a batch of dense matrices.
DENSE_LIMIT = 2**27
# How much a Jacobian is regularised before it is factorised; refinement removes the effect on its solutions.
PROXIMAL = 1e-10
# A factorised Jacobian that leaves less than this share of a vector can serve at a nearby point: each refinement
# reduces the residual by as much.
GOOD = 5e-3
# If the exact Jacobian leaves more than this share of a vector after so many refinements, the system has no
# solution. For a probe of up to 1000 entries, this is less than the difference of any two of its entries.
MISSING = 1e-5
REFINEMENTS = 2
GOLDEN = (5**0.5 - 1) / 2  # the golden ratio minus one; see `_probe`
TINY = torch.finfo(torch.float64).tiny  # keeps divisors away from 0


@dataclass(frozen=True, eq=False)
class ConicFamily:
    """Programs with the same pattern and cone, how they are solved, and the solvers that are kept for them."""

    pattern: Pattern
    cones: Cones
    solver: Clarabel
    workers: Workers
    wanted: Tensor  # `(n + m,)`, 1 for the entries of z on which the user's variables depend, else 0

    @cached_property
    def layout(self) -> SparseLayout:
        """The layout of the matrix that `SparseFactors` factorises."""
        return _sparse_layout(self.pattern, self.cones)

    def bind(self, *theta: Tensor) -> Map:
        """The residual of the optimality condition at `theta`, as a function of z."""
        return self.pattern.bind(self.cones, *theta)


@dataclass(eq=False)
class Jacobian:
    """The Jacobian J of the optimality condition at `z` `(B, n + m)`, factorised when it is first needed.

    The factorised matrix has P + cI in place of P, and D - cD in place of the D of the second row, with a small c.
    It is regular whatever J is: if it maps (dx, dv) to zero, dx'(P + cI)dx + dv'D(I - D + cD)dv = 0, so dx, D dv
    and dv vanish.

    Attributes:
        left_out: `(B,)`, samples that have the identity instead.
        degenerate: `(B,)`, where the wanted entries are not unique near the solution, as far as is known.
    """

    family: ConicFamily
    z: Tensor
    theta: tuple[Tensor, ...]
    left_out: Tensor
    degenerate: Tensor = field(init=False)

    def __post_init__(self):
        self.degenerate = torch.zeros_like(self.left_out)

    @cached_property
    def _factors(self) -> Any:
        batch, size = self.z.shape
        is_small = size <= DENSE_UP_TO and batch * size * size <= DENSE_LIMIT
        return (DenseFactors if is_small else SparseFactors).of(self)

    def move_to(self, z: Tensor) -> None:
        """Become the Jacobian at `z`, except for samples where this one still serves, and find degenerate samples.

        cvxpy's auxiliary variables are often not unique. That does no harm: the system for a gradient with respect
        to the other variables then has many solutions, but all of them give the same gradient.
        """
        everything, wanted = self._left_of(z)
        # Where J has changed too much, or is singular, only the exact one will do.
        rows = (torch.maximum(everything, wanted) > GOOD).nonzero()[:, 0]
        if len(rows):
            part = self._of_rows(rows, z)
            part._factors = type(self._factors).of(part)
            self._factors.put(rows, part._factors)
            self.z = self.z.index_copy(0, rows, part.z)
        self.degenerate = wanted > MISSING
        rows = self.degenerate.nonzero()[:, 0]
        if len(rows):
            part = self._of_rows(rows, self.z)
            part._factors = self._factors.take(rows)
            left = part._left_of(z[rows], refinements=REFINEMENTS)[-1]
            self.degenerate = self.degenerate.index_copy(0, rows, left > MISSING)

    def _of_rows(self, rows: Tensor, z: Tensor) -> Jacobian:
        """The Jacobian of those samples, at `z` `(B, n + m)`."""
        theta = tuple(t if len(t) == 1 else t[rows] for t in self.theta)
        return Jacobian(self.family, z[rows], theta, self.left_out[rows])

    def _probe(self) -> Tensor:
        """An arbitrary gradient `(1, n + m)` of which no two entries, or sums of entries, are nearly the same.

        The fractional parts of multiples of the golden ratio are spread as evenly as possible. Many of them add up
        to the same; squares do not.
        """
        k = torch.arange(1.0, self.z.shape[1] + 1, dtype=self.z.dtype, device=self.z.device)
        return (1 + (k * GOLDEN).frac()).square().unsqueeze(0)

    def _left_of(self, z: Tensor, refinements: int = 0) -> list[Tensor]:
        """The shares `(B,)` that the inverse leaves of two arbitrary gradients at `z`.

        The first gradient is by all of z, the second only by what is wanted. What is left is a part for which the
        system has no solution, or an error from the inverse of another matrix. `refinements` remove the latter;
        with them, only the second gradient is looked at.
        """
        every = self._probe()
        every, wanted = (
            torch.where(self.left_out.unsqueeze(1), 0.0, x) for x in (every, every * self.family.wanted)
        )
        g = torch.stack([wanted] if refinements else [every, wanted])
        pull = vjp(self.family.bind(*self.theta), z)[1]
        left = g
        for _ in range(1 + refinements):
            u = self.solve(left.flatten(0, 1), transposed=True).reshape(g.shape)
            left = torch.stack([r - pull(w)[0] for r, w in zip(left, u)])
        return [row_norm(r) / row_norm(whole).clamp(min=TINY) for r, whole in zip(left, g)]

    def solve(self, r: Tensor, transposed: bool = False) -> Tensor:
        """w with J w ≈ r, or J' w ≈ r, for `r` `(k * B, n + m)` of which row i belongs to sample i % B."""
        batch, size = self.z.shape
        right = r.reshape(-1, batch, size).permute(1, 2, 0)
        return self._factors.solve(right, transposed).permute(2, 0, 1).reshape(-1, size)

    def dense(self, rows: Tensor, proximal: float = 0.0) -> Tensor:
        """The matrices `(len(rows), n + m, n + m)` of some samples, plus `proximal` times diag(I, -D)."""
        P, A, z = (t if len(t) == 1 else t[rows] for t in (self.theta[0], self.theta[2], self.z))
        z = z.expand(len(rows), -1)
        pattern, n, m = self.family.pattern, self.family.pattern.n, self.family.pattern.m
        P, A = pattern.dense(P, A)
        D = self.family.cones.jacobian(z[:, n:])
        J = z.new_zeros(len(rows), n + m, n + m)
        J[:, :n, :n], J[:, n:, :n] = P, A
        J[:, :n, n:] = A.mT @ D
        J[:, n:, n:] = (1 - proximal) * D
        J[:, :n, :n].diagonal(dim1=1, dim2=2).add_(proximal)
        J[:, n:, n:].diagonal(dim1=1, dim2=2).sub_(1.0)
        left_out = self.left_out[rows]
        if maybe_any(left_out):
            J[left_out] = torch.eye(n + m, dtype=z.dtype, device=z.device)
        return J


@dataclass(eq=False)
class DenseFactors:
    """LU factors of a batch of dense matrices."""

    lu: Tensor
    pivots: Tensor

    @classmethod
    def of(cls, jacobian: Jacobian) -> DenseFactors:
        """Factorise the Jacobian, regularised."""
        J = jacobian.dense(torch.arange(len(jacobian.z), device="cpu"), PROXIMAL)
        return cls(*torch.linalg.lu_factor_ex(J)[:2])

    def take(self, rows: Tensor) -> DenseFactors:
        """The factors of those samples."""
        return DenseFactors(self.lu[rows], self.pivots[rows])

    def put(self, rows: Tensor, part: DenseFactors) -> None:
        """Replace the factors of some samples by `part`."""
        self.lu, self.pivots = self.lu.index_copy(0, rows, part.lu), self.pivots.index_copy(0, rows, part.pivots)

    def solve(self, right: Tensor, transposed: bool) -> Tensor:
        """The solutions for right-hand sides `(B, N, k)`."""
        return torch.linalg.lu_solve(self.lu, self.pivots, right, adjoint=transposed)


@dataclass(frozen=True, eq=False)
class SparseFactors:
    """Sparse LU factors for each sample, of a larger matrix that has D in one place only:

    [ P  A'  0 ]               [ P   A'D   ]
    [ A  I  -I ]   instead of  [ A   D - I ],    in the unknowns (x, y, v) with y = D v.
    [ 0  I  -D ]

    To be regular it has P + cI in place of P, and (1 - c)I in place of the I in the middle.
    """

    factors: list[Any]
    n: int
    m: int

    @classmethod
    def of(cls, jacobian: Jacobian) -> SparseFactors:
        """Factorise the Jacobian, regularised."""
        pattern, batch = jacobian.family.pattern, len(jacobian.z)
        layout, numbers = jacobian.family.layout, _sparse_numbers(jacobian)
        splu = require("scipy.sparse.linalg").splu
        out = jacobian.left_out.tolist()
        return cls(
            [None if out[i] else splu(layout.matrix(numbers[i])) for i in range(batch)], pattern.n, pattern.m
        )

    def take(self, rows: Tensor) -> SparseFactors:
        """The factors of those samples."""
        return SparseFactors([self.factors[row] for row in rows.tolist()], self.n, self.m)

    def put(self, rows: Tensor, part: SparseFactors) -> None:
        """Replace the factors of some samples by `part`."""
        for row, factor in zip(rows.tolist(), part.factors):
            self.factors[row] = factor

    def solve(self, right: Tensor, transposed: bool) -> Tensor:
        """The solutions for right-hand sides `(B, N, k)`; those of left out samples stay as they are."""
        n, m = self.n, self.m
        found = right.clone()
        for i, factor in enumerate(self.factors):
            if factor is None:
                continue
            wide = np.zeros((n + 2 * m, right.shape[2]))
            # Rows are (first, second, y = D v); unknowns are (x, y, v).
            rows, unknowns = np.arange(n + m), np.concatenate([np.arange(n), np.arange(n + m, n + 2 * m)])
            given, wanted = (unknowns, rows) if transposed else (rows, unknowns)
            wide[given] = right[i].numpy()
            found[i] = torch.from_numpy(factor.solve(wide, trans="T" if transposed else "N")[wanted])
        return found


@dataclass(frozen=True, eq=False)
class SparseLayout:
    """The layout of a compressed sparse matrix, for numbers in another order; those at one place are added."""

    order: Any
    first: Any
    rows: Any
    starts: Any
    size: int

    @classmethod
    def of(cls, rows: Any, columns: Any, size: int) -> SparseLayout:
        """The layout for numbers at these places."""
        order = np.lexsort((rows, columns))
        rows, columns = rows[order], columns[order]
        new = np.concatenate([[True], (np.diff(rows) != 0) | (np.diff(columns) != 0)])
        rows, columns = rows[new], columns[new]
        starts = np.concatenate([[0], np.cumsum(np.bincount(columns, minlength=size))])
        return cls(order, np.flatnonzero(new), rows.astype(np.int32), starts.astype(np.int32), size)

    def matrix(self, numbers: Any) -> Any:
        """The matrix with those numbers."""
        shape = (self.size, self.size)
        entries = np.add.reduceat(numbers[self.order], self.first)
        return require("scipy.sparse").csc_matrix((entries, self.rows, self.starts), shape=shape)


def _sparse_layout(pattern: Pattern, cones: Cones) -> SparseLayout:
    """The layout of the larger matrix of `SparseFactors`."""
    n, m = pattern.n, pattern.m
    _, P_rows, P_columns = (t.numpy() for t in pattern.full)
    A_rows, A_columns = pattern.A_rows.numpy(), pattern.A_columns.numpy()
    x, own, D_rows, D_columns = np.arange(n), np.arange(m), [np.arange(cones.linear)], [np.arange(cones.linear)]
    for block in cones.blocks:
        rows = block.rows.numpy()
        D_rows.append(np.repeat(rows, rows.shape[1], axis=1).reshape(-1))
        D_columns.append(np.tile(rows, (1, rows.shape[1])).reshape(-1))
    rows = [P_rows, x, A_columns, n + A_rows, n + own, n + own, n + m + own, *(n + m + r for r in D_rows)]
    columns = [P_columns, x, n + A_rows, A_columns, n + own, n + m + own, n + own, *(n + m + c for c in D_columns)]
    return SparseLayout.of(np.concatenate(rows), np.concatenate(columns), n + 2 * m)


def _sparse_numbers(jacobian: Jacobian) -> Any:
    """The entries `(B, entries)` of the larger matrix of `SparseFactors`, in the order of `_sparse_layout`."""
    pattern, n, m = jacobian.family.pattern, jacobian.family.pattern.n, jacobian.family.pattern.m
    diagonal, blocks = jacobian.family.cones.jacobians(jacobian.z[:, n:])
    one, little = diagonal.new_ones(1, m), diagonal.new_full((1, n), PROXIMAL)
    P, A = jacobian.theta[0][:, pattern.full[0]], jacobian.theta[2]
    numbers = [P, little, A, A, (1 - PROXIMAL) * one, -one, one, -diagonal, *(-D.flatten(1) for D in blocks)]
    return torch.cat([t.expand(len(jacobian.z), -1) for t in numbers], dim=1).numpy()
