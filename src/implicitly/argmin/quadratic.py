"""Canonical programs without cones, as dense quadratic programs, without the auxiliary variables of cvxpy.

For an objective |Mx|^2 cvxpy has a variable w with the equation w = Mx. A variable that stands in one row of A
alone, an equation, with a coefficient that is no parameter's, is its right-hand side: with e for such variables
and k for the others,

    x_e = r - R x_k,    R = A_ek / a,  r = b_e / a,

which leaves a program in x_k without those rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from implicitly.argmin.conic import Pattern
from implicitly.argmin.qp import ProgramSolution, qp
from implicitly.argmin.solver import ProgramSolver
from implicitly.iterate import Solution, SolverError


@dataclass(frozen=True, eq=False)
class Part:
    """Some rows and columns of a sparse matrix: which of its numbers, and their places in the dense part."""

    numbers: Tensor
    places: Tensor
    shape: tuple[int, int]

    @classmethod
    def of(cls, rows: Tensor, columns: Tensor, numbers: Tensor, wanted: tuple[Tensor, Tensor], size: int) -> Part:
        """From the places of `numbers` in a matrix of at most `size` rows and columns, and what is wanted of both."""
        new_row, new_column = (torch.full((size,), -1).index_copy(0, w, torch.arange(len(w))) for w in wanted)
        i, j = new_row[rows], new_column[columns]
        inside = (i >= 0) & (j >= 0)
        shape = (len(wanted[0]), len(wanted[1]))
        return cls(numbers[inside], (i * shape[1] + j)[inside], shape)

    def dense(self, numbers: Tensor) -> Tensor:
        """The part `(·, rows, columns)` for numbers `(·, nnz)`."""
        flat = numbers.new_zeros(len(numbers), self.shape[0] * self.shape[1])
        chosen = numbers.index_select(1, self.numbers.to(numbers.device))
        return flat.index_copy(1, self.places.to(numbers.device), chosen).reshape(len(numbers), *self.shape)


@dataclass(frozen=True, eq=False)
class QuadraticForm:
    """How P, q, A and b become a quadratic program, and its solution that of theirs.

    Attributes:
        kept, out: columns of A; the variables of `out` are right-hand sides.
        equations, definitions, inequalities: rows of A; `definitions` belong to `out`, in its order.
        coefficients: the a of the definitions, in A.
    """

    kept: Tensor
    out: Tensor
    equations: Tensor
    definitions: Tensor
    inequalities: Tensor
    coefficients: Tensor
    P_kk: Part
    P_ke: Part
    P_ee: Part
    A_equations: Part
    A_definitions: Part
    A_inequalities: Part

    @classmethod
    def of(cls, pattern: Pattern, zero: int, constant: Tensor) -> QuadraticForm:
        """For programs whose first `zero` rows are equations; `constant`: which numbers of A have no parameters."""
        n, m, size = pattern.n, pattern.m, max(pattern.n, pattern.m)
        alone = torch.bincount(pattern.A_columns, minlength=n)[pattern.A_columns] == 1
        usable = (alone & constant & (pattern.A_rows < zero)).nonzero()[:, 0].tolist()
        chosen = list({int(pattern.A_rows[i]): i for i in usable}.values())  # one for each row
        coefficients = torch.tensor(chosen, dtype=torch.int64)
        definitions, out = pattern.A_rows[coefficients], pattern.A_columns[coefficients]
        kept, equations = _others(n, out), _others(zero, definitions)
        inequalities = torch.arange(zero, m)
        index, rows, columns = pattern.full
        of_A = (pattern.A_rows, pattern.A_columns, torch.arange(len(pattern.A_rows)))
        return cls(
            kept,
            out,
            equations,
            definitions,
            inequalities,
            coefficients,
            Part.of(rows, columns, index, (kept, kept), size),
            Part.of(rows, columns, index, (kept, out), size),
            Part.of(rows, columns, index, (out, out), size),
            Part.of(*of_A, (equations, kept), size),
            Part.of(*of_A, (definitions, kept), size),
            Part.of(*of_A, (inequalities, kept), size),
        )

    def solve(self, numbers: tuple[Tensor, ...], solver: ProgramSolver, on_failure: str) -> Solution:
        """The solution for P, q, A and b, each `(B or 1, ·)`; `value` is x `(B, n)` and the multipliers `(B, m)`."""
        P, q, A, b = numbers
        M, G = self.A_equations.dense(A), self.A_inequalities.dense(A)
        b_M, h = _entries(b, self.equations), _entries(b, self.inequalities)
        Q, p = self.P_kk.dense(P), _entries(q, self.kept)
        a = _entries(A, self.coefficients)
        R, r = self.A_definitions.dense(A) / a.unsqueeze(2), _entries(b, self.definitions) / a
        P_ee, P_ke, q_e = self.P_ee.dense(P), self.P_ke.dense(P), _entries(q, self.out)
        if len(self.out):
            curved = P_ee @ R
            Q = Q + R.mT @ curved
            p = p - _times(R.mT, q_e + _times(P_ee, r))
            if len(self.P_ke.numbers):
                mixed = P_ke @ R
                Q, p = Q - mixed - mixed.mT, p + _times(P_ke, r)
        tensors = (Q, p, G, h, M, b_M)
        shared = [t[0] if len(t) == 1 else t for t in tensors]
        single = all(len(t) == 1 for t in tensors)

        def lifted(found: ProgramSolution) -> Solution:
            x, lam, nu, status, residual, steps = (
                t.unsqueeze(0) if single else t
                for t in (
                    found.value,
                    found.dual_inequality,
                    found.dual_equality,
                    found.status,
                    found.residual,
                    found.steps,
                )
            )
            x_e = r - _times(R, x)
            multiplier = -(_times(P_ee, x_e) + _times(P_ke.mT, x) + q_e) / a
            batch = max(len(x), len(x_e))
            columns = torch.cat([self.kept, self.out]).argsort().to(q.device)
            rows = torch.cat([self.inequalities, self.equations, self.definitions]).argsort().to(q.device)
            value = (
                torch.cat([t.expand(batch, -1) for t in (x, x_e)], dim=1).index_select(1, columns),
                torch.cat([t.expand(batch, -1) for t in (lam, nu, multiplier)], dim=1).index_select(1, rows),
            )
            status, residual, steps = (t.expand(batch) for t in (status, residual, steps))
            return Solution(value, status, residual, steps, found.evaluations)

        try:
            return lifted(qp(*shared, solver=solver, on_failure=on_failure))
        except SolverError as error:
            assert isinstance(error.solution, ProgramSolution)
            raise SolverError(str(error), lifted(error.solution)) from error


def _others(count: int, some: Tensor) -> Tensor:
    """The numbers below `count` that are not among `some`."""
    return torch.ones(count, dtype=torch.bool).index_fill(0, some, False).nonzero()[:, 0]


def _entries(x: Tensor, index: Tensor) -> Tensor:
    return x.index_select(1, index.to(x.device))


def _times(M: Tensor, x: Tensor) -> Tensor:
    """M x, where either may be shared by the batch: `(1, ·)`."""
    return (M @ x.unsqueeze(2)).squeeze(2)
