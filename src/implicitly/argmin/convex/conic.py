"""Conic programs: their optimality condition, and its linear systems.

    minimise 1/2 x'Px + q'x  subject to  Ax + s = b,  s in K

With y the multiplier of the equality, x and v = y - s determine everything: y is the projection of v onto the dual
cone K*, and s is y - v (Moreau). So the condition is, for z = (x, v),

    Px + q + A'y = 0,      Ax + y - v - b = 0,      y = proj_K*(v),

without any inequality. Busseti, Moursi and Boyd, "Solution refinement at regular points of conic problems", 2019,
state it for linear objectives, in homogeneous form. Here the solution is known to exist, so the scale variable of
the homogeneous form is not needed, and a quadratic objective is no harder than a linear one. With D the Jacobian
of the projection, that of the condition is

    [ P   A'D   ]
    [ A   D - I ].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import vjp, vmap

from implicitly.argmin.sets.cones import dual_exponential_cone, psd_cone, second_order_cone
from implicitly.argmin.sets.power_cone import dual_power_cone
from implicitly.condition import Map
from implicitly.host import remembered
from implicitly.tree import columns_of, row_norm


@dataclass(frozen=True, eq=False)
class Block:
    """Cones of one kind and size: the rows of A that each takes, `(count, d)`, and the projection onto their dual.

    The projection acts on `(..., d)`.
    """

    rows: Tensor
    project_dual: Callable[[Tensor], Tensor]

    def take(self, v: Tensor) -> Tensor:
        """The parts of `v` `(B, m)` in these cones, `(B, count, d)`."""
        return columns_of(v, self.rows.reshape(-1)).reshape(len(v), *self.rows.shape)


@dataclass(frozen=True, eq=False)
class Cones:
    """The product K of cones, in the order of Clarabel and cvxpy.

    The order is zero, nonnegative, second-order, positive semidefinite (the upper triangle by columns, with
    entries off the diagonal times sqrt 2), exponential, power.

    Attributes:
        powers: the exponents of each power cone; the last entry of a vector in it is the bounded one.
    """

    zero: int
    nonnegative: int
    second_order: tuple[int, ...]
    semidefinite: tuple[int, ...]
    exponential: int
    powers: tuple[tuple[float, ...], ...]

    @classmethod
    def of(cls, dims: Any) -> Cones:
        """The cones from cvxpy's `ConeDims`."""
        powers = [(float(a), 1 - float(a)) for a in dims.p3d] + [tuple(float(a) for a in p) for p in dims.pnd]
        return cls(dims.zero, dims.nonneg, tuple(dims.soc), tuple(dims.psd), dims.exp, tuple(powers))

    @property
    def size(self) -> int:
        """The number of rows of A."""
        semidefinite = sum(k * (k + 1) // 2 for k in self.semidefinite)
        powers = sum(len(p) + 1 for p in self.powers)
        return self.linear + sum(self.second_order) + semidefinite + 3 * self.exponential + powers

    @property
    def linear(self) -> int:
        """The number of rows that are equalities or inequalities; these come first."""
        return self.zero + self.nonnegative

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """All cones except the linear ones, grouped by kind and size."""
        found: dict[Any, list[int]] = {}
        row = self.linear
        for kind, width in self._each():
            found.setdefault((kind, width), []).append(row)
            row += width
        projections = {"second_order": second_order_cone, "exponential": dual_exponential_cone}
        blocks = []
        for (kind, width), starts in found.items():
            rows = torch.tensor(starts, device="cpu").unsqueeze(1) + torch.arange(width, device="cpu")
            if isinstance(kind, tuple):
                project = partial(dual_power_cone, exponents=kind)
            else:
                project = projections.get(kind, _project_triangle)
            blocks.append(Block(rows, project))
        return tuple(blocks)

    def _each(self) -> list[tuple[Any, int]]:
        """Kind and width of the cones that are not linear."""
        return [
            *(("second_order", d) for d in self.second_order),
            *(("semidefinite", k * (k + 1) // 2) for k in self.semidefinite),
            *(("exponential", 3) for _ in range(self.exponential)),
            *((p, len(p) + 1) for p in self.powers),
        ]

    def project_dual(self, v: Tensor) -> Tensor:
        """The nearest points in the dual cone to `v` `(B, m)`."""
        multipliers = v[:, self.zero : self.linear]
        positive = torch.where(multipliers.detach() > 0, multipliers, 0.0)
        parts = [v[:, : self.zero], positive]
        if not self.blocks:
            return torch.cat(parts, dim=1)
        parts += [block.project_dual(block.take(v)).flatten(1) for block in self.blocks]
        return columns_of(torch.cat(parts, dim=1), self._order)

    @cached_property
    def _order(self) -> Tensor:
        """The position of each row when the blocks follow one another."""
        rows = [torch.arange(self.linear, device="cpu"), *(block.rows.reshape(-1) for block in self.blocks)]
        return torch.cat(rows).argsort()

    def jacobians(self, v: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The derivative of the dual projection at `v` `(B, m)`, block by block.

        The diagonal `(B, linear)` for the linear rows, and `(B, count, d, d)` for each block.
        """
        diagonal = torch.ones_like(v[:, : self.linear])
        diagonal[:, self.zero :] = (v[:, self.zero : self.linear] > 0).to(v.dtype)
        found = []
        for block in self.blocks:
            x = block.take(v)
            if block.project_dual is _project_triangle:
                found.append(_triangle_derivative(x))
                continue
            pull = vjp(block.project_dual, x)[1]
            d = x.shape[-1]
            eye = torch.eye(d, dtype=v.dtype, device="cpu").reshape(d, 1, 1, d).expand(d, *x.shape)
            found.append(vmap(lambda g, pull=pull: pull(g)[0])(eye).permute(1, 2, 0, 3))
        return diagonal, found

    def jacobian(self, v: Tensor) -> Tensor:
        """The derivative of the dual projection at `v` `(B, m)` as matrices `(B, m, m)`."""
        diagonal, blocks = self.jacobians(v)
        D = v.new_zeros(len(v), self.size, self.size)
        index = torch.arange(self.linear, device="cpu")
        D[:, index, index] = diagonal
        for block, part in zip(self.blocks, blocks):
            D[:, block.rows.unsqueeze(2), block.rows.unsqueeze(1)] = part
        return D

    def least_eigenvalue(self, v: Tensor) -> Tensor:
        """How near `v` `(B, m)` is to a kink of the projection, `(B,)`.

        That is the eigenvalue of least size of its parts in linear, second-order and semidefinite cones.
        """
        sizes = [v.new_full((len(v), 1), float("inf")), v[:, self.zero : self.linear].abs()]
        row = self.linear
        for kind, width in self._each():
            part = v[:, row : row + width]
            row += width
            if kind == "second_order":
                length = row_norm(part[:, 1:]).unsqueeze(1)
                sizes += [(part[:, :1] - length).abs(), (part[:, :1] + length).abs()]
            elif kind == "semidefinite":
                sizes.append(torch.linalg.eigvalsh(_matrix(part)).abs())
        return torch.cat(sizes, dim=1).amin(1)


def _project_triangle(v: Tensor) -> Tensor:
    """The nearest positive semidefinite matrices to scaled upper triangles `(..., k (k + 1) / 2)`."""
    _, weight, places = _triangle(v.shape[-1])
    return psd_cone(_matrix(v)).flatten(-2)[..., places] * weight


def _triangle_derivative(v: Tensor) -> Tensor:
    """The derivative of `_project_triangle`, `(..., d, d)`.

    It is T' diag(w) T with T the change to the basis of eigenvectors, and w_kl = (l_k^+ + l_l^+) / (|l_k| + |l_l|)
    for eigenvalues l, as in `psd_cone`; this is faster than d vector-Jacobian products.
    """
    _, weight, places = _triangle(v.shape[-1])
    values, V = torch.linalg.eigh(_matrix(v))
    k = values.shape[-1]
    row, column = places // k, places % k
    V_row, V_column = V[..., row, :], V[..., column, :]
    T = V_row[..., row] * V_column[..., column] + V_column[..., row] * V_row[..., column]
    T = T * torch.where(row == column, 0.5, 0.5**0.5).unsqueeze(1) * weight  # rows: the triangle; columns: pairs
    sizes, positive = values.abs(), values.clamp(min=0)
    sums = sizes[..., row] + sizes[..., column]
    zero = sums <= k * torch.finfo(v.dtype).eps * sizes.amax(-1, keepdim=True)
    w = (positive[..., row] + positive[..., column]) / torch.where(zero, float("inf"), sums)
    return (T * w.unsqueeze(-2)) @ T.mT


def _matrix(v: Tensor) -> Tensor:
    """The symmetric matrices `(..., k, k)` of scaled upper triangles."""
    index, weight, _ = _triangle(v.shape[-1])
    return (v / weight)[..., index]


@remembered(64)
def _triangle(width: int) -> tuple[Tensor, Tensor, Tensor]:
    """For a triangle of `width` entries: the place of each matrix entry in it, its weights, its flat positions."""
    k = int((2 * width + 0.25) ** 0.5)
    columns, rows = np.tril_indices(k)  # the upper triangle, column by column
    index = np.zeros((k, k), dtype=np.int64)
    index[rows, columns] = index[columns, rows] = np.arange(len(rows))
    weight = torch.from_numpy(np.where(rows == columns, 1.0, 2**0.5))
    return torch.from_numpy(index), weight, torch.from_numpy(rows * k + columns)


# ------------------------------------------------------------------------------------------- the condition


@dataclass(frozen=True, eq=False)
class Pattern:
    """The sparsity pattern of P (its upper triangle) and A, both column by column; `n` unknowns, `m` rows.

    Attributes:
        P_rows, P_columns, A_rows, A_columns: int64, one per entry.
        mirror: which entries of P are off the diagonal.
    """

    n: int
    m: int
    P_rows: Tensor
    P_columns: Tensor
    A_rows: Tensor
    A_columns: Tensor
    mirror: Tensor

    @classmethod
    def of(cls, n: int, m: int, P: tuple[Any, Any], A: tuple[Any, Any]) -> Pattern:
        """The pattern from NumPy arrays of rows and columns."""
        P_rows, P_columns, A_rows, A_columns = (torch.from_numpy(np.ascontiguousarray(x)) for x in (*P, *A))
        return cls(n, m, P_rows, P_columns, A_rows, A_columns, (P_rows != P_columns).nonzero()[:, 0])

    @cached_property
    def full(self) -> tuple[Tensor, Tensor, Tensor]:
        """All entries of the symmetric P: the index of its number, its row and its column."""
        index = torch.cat([torch.arange(len(self.P_rows), device="cpu"), self.mirror])
        rows = torch.cat([self.P_rows, self.P_columns[self.mirror]])
        return index, rows, torch.cat([self.P_columns, self.P_rows[self.mirror]])

    def bind(self, cones: Cones, P: Tensor, q: Tensor, A: Tensor, b: Tensor) -> Map:
        """The residual `(B, n + m)` as a function of z = (x, v), for numbers `(B or 1, ·)`."""
        index, rows, columns = self.full
        whole = columns_of(P, index)

        def residual(z: Tensor) -> Tensor:
            x, v = z.split([self.n, self.m], dim=1)
            y = cones.project_dual(v)
            stationarity = q + product(A, self.A_columns, self.A_rows, y, self.n)
            if len(rows):
                stationarity = stationarity + product(whole, rows, columns, x, self.n)
            feasibility = product(A, self.A_rows, self.A_columns, x, self.m) + y - v - b
            return torch.cat([stationarity, feasibility], dim=1)

        return residual

    def dense(self, P: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
        """P `(·, n, n)` and A `(·, m, n)` as matrices."""
        index, rows, columns = self.full
        whole = P.new_zeros(len(P), self.n * self.n).index_copy(1, rows * self.n + columns, P[:, index])
        flat = A.new_zeros(len(A), self.m * self.n).index_copy(1, self.A_rows * self.n + self.A_columns, A)
        return whole.reshape(len(P), self.n, self.n), flat.reshape(len(A), self.m, self.n)


def product(M: Tensor, rows: Tensor, columns: Tensor, x: Tensor, size: int) -> Tensor:
    """M x `(B, size)`, for sparse matrices with the numbers `M` `(B or 1, nnz)`, and `x` `(B, ·)`."""
    terms = M * columns_of(x, columns)
    return torch.zeros(len(x), size, dtype=terms.dtype, device="cpu").index_add(1, rows, terms)
