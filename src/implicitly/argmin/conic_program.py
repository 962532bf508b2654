"""Conic programs: state the program, find its solution, attach the derivative."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import vjp

from implicitly.argmin.conic import Cones, Pattern
from implicitly.argmin.conic_solver import Clarabel, Numbers, Workers
from implicitly.argmin.derivative import StructuredSolver
from implicitly.argmin.optional import require
from implicitly.host import happens
from implicitly.implicit import Backward, Condition, Map, Report, attach
from implicitly.iterate import Found, Status, is_success
from implicitly.tree import merge_rows, row_norm

# Up to so many unknowns the systems of a batch are solved as dense matrices; beyond, sparse ones sample by sample.
DENSE_UP_TO = 150
# Numbers of a batch of dense matrices, at most.
DENSE_LIMIT = 2**27
# How much a Jacobian is regularised before it is factorised; refinement takes that out of what is solved with it.
PROXIMAL = 1e-10
# A factorised Jacobian that leaves less of a vector serves another one near it: each refinement gains as much.
GOOD = 5e-3
# Where the exact Jacobian leaves more, no solution has it.
MISSING = 0.01
# A residual relative to the numbers of a program, for which rounding errors are to blame.
POLISHED = 1e-14
TINY = torch.finfo(torch.float64).tiny
# An eigenvalue of v so much smaller than v is zero: which face of the cone counts is then not determined.
WEAK = 1e-9


@dataclass(frozen=True, eq=False)
class ConicFamily:
    """Programs of one pattern and cone, how they are solved, and the solvers that wait for the next of them."""

    pattern: Pattern
    cones: Cones
    solver: Clarabel
    workers: Workers
    wanted: Tensor  # `(n + m,)`, 1 for the entries of z on which what the user wants depends, else 0

    @cached_property
    def layout(self) -> SparseLayout:
        """Of the matrix that `SparseFactors` factorise."""
        return _sparse_layout(self.pattern, self.cones)

    def bind(self, *theta: Tensor) -> Map:
        """The residual of the optimality condition."""
        return self.pattern.bind(self.cones, *theta)


def solve_conic(family: ConicFamily, theta: tuple[Tensor, ...], report: Report) -> Found:
    """The solutions of programs with the numbers `theta` = (P, q, A, b), each `(B or 1, ·)`, float64 on the CPU.

    Returns:
        `Found`: z = (x, v) `(B, n + m)` with its derivative; NaN, without one, for samples without a solution.
        The multipliers are `family.cones.project_dual(v)`.

    Raises:
        SolverError: a sample has no solution and `report` is to raise.
    """
    known: list[Jacobian] = []
    run = partial(_find, family, known, report)
    z, status, residual, steps, evaluations = _Find.apply(run, *theta)
    bad = ~_has_derivative(status)
    if happens(bad):
        # Their numbers count for nothing, and may not be finite.
        stand_in = bad.unsqueeze(1)
        theta = tuple(torch.where(stand_in, torch.nan_to_num(t.detach()), t) for t in theta)
    condition = Condition(family.bind, "ConvexLayer", torch.float64, report)
    attached = attach(condition, z, theta, Backward(StructuredSolver(known=known)))  # pyright: ignore
    if happens(bad):
        attached = torch.where(bad.unsqueeze(1), float("nan"), attached)
    return Found(attached, status, residual, steps, evaluations)


def _has_derivative(status: Tensor) -> Tensor:
    return is_success(status) | (status == Status.MAX_STEPS) | (status == Status.STAGNATED)


# --------------------------------------------------------------------------------------------------- finding


def _find(family: ConicFamily, known: list[Jacobian], report: Report, *theta: Tensor) -> tuple[Tensor, ...]:
    """(z, status, residual, steps, evaluations) for plain tensors; `known` gets the Jacobian."""
    batch = max(len(t) for t in theta)
    finite = torch.stack([t.isfinite().all(1).expand(batch) for t in theta]).all(0)
    solved = family.workers.solve(Numbers(*(t.numpy() for t in theta)), finite.numpy())
    x, y, s, status, steps = (torch.from_numpy(a) for a in solved)
    bad = ~_has_derivative(status).unsqueeze(1)
    z = torch.where(bad, 0.0, torch.cat([x, y - s], dim=1))
    theta = tuple(torch.where(bad, torch.nan_to_num(t), t) if happens(bad) else t for t in theta)
    bad = bad.squeeze(1)
    jacobian, residual = Jacobian(family, z, theta, bad), family.bind(*theta)
    size = 1 + row_norm(theta[1]) + row_norm(theta[3])
    z, norm = polished(residual, jacobian, z, family.solver.polish, POLISHED * size)
    limit = family.solver.rtol * size
    status = torch.where((norm <= limit) & ~bad, int(Status.CONVERGED), status)
    if family.solver.polish:
        jacobian.move_to(z)
        weak = family.cones.least_eigenvalue(z[:, family.pattern.n :]) <= WEAK * (1 + z.abs().amax(1))
        degenerate = (status == Status.CONVERGED) & (jacobian.degenerate | weak)
        status = torch.where(degenerate, int(Status.DEGENERATE), status)
    known.append(jacobian)
    norm = norm.masked_fill(bad, float("nan"))
    found = (z, status, norm, steps, steps.sum())
    report("ConvexLayer", family.solver, Found(*found))  # pyright: ignore[reportArgumentType]
    return found


def polished(residual: Map, jacobian: Jacobian, z: Tensor, steps: int, target: Tensor) -> tuple[Tensor, Tensor]:
    """`z` after Newton steps with the inverse of one Jacobian, while they help, and its residual norms.

    A residual of `target` `(B,)` needs no more steps.
    """
    r = residual(z)
    norm = row_norm(r)
    for _ in range(steps):
        if bool((norm <= target).all()):
            break
        new = z - jacobian.solve(r)
        r_new = residual(new)
        norm_new = row_norm(r_new)
        better = norm_new < norm
        if not bool(better.any()):
            break
        column = better.unsqueeze(1)
        enough = bool((norm_new[better] > 0.1 * norm[better]).all())
        z, r, norm = (
            torch.where(column, new, z),
            torch.where(column, r_new, r),
            torch.where(better, norm_new, norm),
        )
        if enough:
            break
    return z, norm


class _Find(torch.autograd.Function):
    """A solve as one opaque step, so that `vmap` hands it the whole batch."""

    @staticmethod
    def forward(run, *theta):
        return run(*(t.detach() for t in theta))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(*output)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *gradients):
        return (None,) * len(ctx.needs_input_grad)

    @staticmethod
    def jvp(ctx, *tangents):
        return (None,) * 5

    @staticmethod
    def vmap(info, in_dims, *args):
        run, *theta = args
        size, dims = info.batch_size, in_dims[1:]
        moved = [t if d is None else t.movedim(d, 0) for t, d in zip(theta, dims)]
        rows = max(t.shape[0 if d is None else 1] for t, d in zip(moved, dims))
        merged = []
        for t, d in zip(moved, dims):
            if d is None and len(t) == 1:
                merged.append(t)
            else:
                t = t if d is None else t.expand(size, rows, t.shape[-1])
                merged.append(merge_rows(t, None if d is None else 0, size))
        output = _Find.apply(run, *merged)
        outputs = [t.reshape(size, -1, *t.shape[1:]) if t.ndim else t for t in output]
        return tuple(outputs), tuple(0 if t.ndim else None for t in output)


# --------------------------------------------------------------------------------------------- the Jacobian


@dataclass(eq=False)
class Jacobian:
    """J of the optimality condition at `z` `(B, n + m)`, factorised when it is first needed.

    What is factorised has P + cI for P, and D - cD for the D of the second row, with a small c. That is regular
    whatever J is: where it maps (dx, dv) to zero, dx'(P + cI)dx + dv'D(I - D + cD)dv = 0, so that dx, D dv and dv
    vanish.

    Attributes:
        left_out: `(B,)`, samples that have the identity instead.
        degenerate: `(B,)`, where what is wanted is not unique near the solution, as far as has been found out.
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
        """Become the Jacobian at `z`, but for samples where this one is good enough for refinement, and find out
        what is degenerate.

        cvxpy's auxiliary variables often are not unique, and do no harm: then the system for a gradient by the
        others has many solutions, and all of them give the same gradient.
        """
        everything, wanted = self._left_of(z)
        # Where it has moved, or is singular, only the exact one will do.
        rows = (torch.maximum(everything, wanted) > GOOD).nonzero()[:, 0]
        if len(rows):
            own = tuple(t if len(t) == 1 else t[rows] for t in self.theta)
            part = Jacobian(self.family, z[rows], own, self.left_out[rows])
            part._factors = type(self._factors).of(part)
            self._factors.put(rows, part._factors)
            self.z = self.z.index_copy(0, rows, part.z)
            wanted[rows] = part._left_of(part.z)[1]
        self.degenerate = wanted > MISSING

    def _left_of(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Which part `(B,)` the inverse leaves of a meaningless gradient at `z`, and of one by what is wanted:
        what no solution has, or what an inverse of another matrix misses."""
        every = torch.cos(torch.arange(1.0, z.shape[1] + 1, dtype=z.dtype, device=z.device) ** 2)
        g = torch.stack([every, every * self.family.wanted]).unsqueeze(1).expand(2, *z.shape)
        g = torch.where(self.left_out.unsqueeze(1), 0.0, g)
        u = self.solve(g.flatten(0, 1), transposed=True).reshape(g.shape)
        pull = vjp(self.family.bind(*self.theta), z)[1]
        left = [row_norm(g[i] - pull(u[i])[0]) / row_norm(g[i]).clamp(min=TINY) for i in (0, 1)]
        return left[0], left[1]

    def solve(self, r: Tensor, transposed: bool = False) -> Tensor:
        """w with J w ≈ r, or J' w ≈ r, for `r` `(k * B, n + m)` of which row i belongs to sample i % B."""
        batch, size = self.z.shape
        right = r.reshape(-1, batch, size).permute(1, 2, 0)
        return self._factors.solve(right, transposed).permute(2, 0, 1).reshape(-1, size)

    def dense(self, rows: Tensor, proximal: float = 0.0) -> Tensor:
        """The matrices `(len(rows), n + m, n + m)` of some samples; `proximal` times (I, -D) on the diagonal."""
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
        if happens(left_out):
            J[left_out] = torch.eye(n + m, dtype=z.dtype, device=z.device)
        return J


@dataclass(eq=False)
class DenseFactors:
    """LU factors of a batch of matrices."""

    lu: Tensor
    pivots: Tensor

    @classmethod
    def of(cls, jacobian: Jacobian) -> DenseFactors:
        """Factorise."""
        J = jacobian.dense(torch.arange(len(jacobian.z), device="cpu"), PROXIMAL)
        return cls(*torch.linalg.lu_factor_ex(J)[:2])

    def put(self, rows: Tensor, part: DenseFactors) -> None:
        """Have `part` instead of those of some samples."""
        self.lu, self.pivots = self.lu.index_copy(0, rows, part.lu), self.pivots.index_copy(0, rows, part.pivots)

    def solve(self, right: Tensor, transposed: bool) -> Tensor:
        """For right-hand sides `(B, N, k)`."""
        return torch.linalg.lu_solve(self.lu, self.pivots, right, adjoint=transposed)


@dataclass(frozen=True, eq=False)
class SparseFactors:
    """Sparse LU factors, one a sample, of a larger matrix that has D in one place only:

    [ P  A'  0 ]               [ P   A'D   ]
    [ A  I  -I ]   instead of  [ A   D - I ],    in the unknowns (x, y, v) with y = D v.
    [ 0  I  -D ]

    To be regular it has P + cI for P, and (1 - c)I for the second I of the second row.
    """

    factors: list[Any]
    n: int
    m: int

    @classmethod
    def of(cls, jacobian: Jacobian) -> SparseFactors:
        """Factorise."""
        pattern, batch = jacobian.family.pattern, len(jacobian.z)
        layout, numbers = jacobian.family.layout, _sparse_numbers(jacobian)
        splu = require("scipy.sparse.linalg").splu
        out = jacobian.left_out.tolist()
        return cls(
            [None if out[i] else splu(layout.matrix(numbers[i])) for i in range(batch)], pattern.n, pattern.m
        )

    def put(self, rows: Tensor, part: SparseFactors) -> None:
        """Have `part` instead of those of some samples."""
        for row, factor in zip(rows.tolist(), part.factors):
            self.factors[row] = factor

    def solve(self, right: Tensor, transposed: bool) -> Tensor:
        """For right-hand sides `(B, N, k)`; those of left out samples stay as they are."""
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
    """A compressed sparse matrix whose numbers come in another order; those at one place are added."""

    order: Any
    first: Any
    rows: Any
    starts: Any
    size: int

    @classmethod
    def of(cls, rows: Any, columns: Any, size: int) -> SparseLayout:
        """From the places of the numbers."""
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
    """Where the entries of the larger matrix stand."""
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
    """The entries of the larger matrix `(B, entries)`, in that order."""
    pattern, n, m = jacobian.family.pattern, jacobian.family.pattern.n, jacobian.family.pattern.m
    diagonal, blocks = jacobian.family.cones.jacobians(jacobian.z[:, n:])
    one, little = diagonal.new_ones(1, m), diagonal.new_full((1, n), PROXIMAL)
    P, A = jacobian.theta[0][:, pattern.full[0]], jacobian.theta[2]
    numbers = [P, little, A, A, (1 - PROXIMAL) * one, -one, one, -diagonal, *(-D.flatten(1) for D in blocks)]
    return torch.cat([t.expand(len(jacobian.z), -1) for t in numbers], dim=1).numpy()
