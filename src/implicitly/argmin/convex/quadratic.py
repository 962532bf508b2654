"""Canonical programs without cones as dense quadratic programs, without the auxiliary variables of cvxpy.

For an objective |Mx|^2 cvxpy introduces a variable w with the equation w = Mx. A variable like this, which stands
in only one row of A, in an equation, with a coefficient a that does not depend on parameters, can be eliminated.
With e for such variables and k for the others,

    x_e = r - R x_k,    R = A_ek / a,  r = b_e / a,

which leaves a program in x_k without those rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from implicitly.argmin.convex.canonical import NOT_FINITE, Assembly, CanonicalProgram
from implicitly.argmin.convex.optional import require
from implicitly.argmin.programs.program import failed
from implicitly.argmin.programs.qp import ProgramSolution, checked, solve_program
from implicitly.argmin.programs.solver import ProgramSolver
from implicitly.host import maybe_any
from implicitly.solution import Solution, SolverError
from implicitly.tree import columns_of


@dataclass(frozen=True, eq=False)
class QuadraticForm:
    """Maps parameters to a quadratic program, and its solution to that of the canonical program.

    Attributes:
        kept, out: columns of A, for the variables that are kept and those that are eliminated.
        equations, definitions, inequalities: rows of A; `definitions` define the variables of `out`, in its order.
        numbers: P_kk, P_ke, P_ee, q_k, q_e, the three parts of A and of b, and the a of the definitions, flat.
        mixed: whether P_ke has entries that are not zero.
    """

    kept: Tensor
    out: Tensor
    equations: Tensor
    definitions: Tensor
    inequalities: Tensor
    numbers: Assembly
    mixed: bool

    @classmethod
    def of(cls, program: CanonicalProgram) -> QuadraticForm:
        """The form of a program without cones."""
        pattern, zero = program.pattern, program.cones.zero
        P, q, A, b = program.numbers.matrices
        constant = torch.from_numpy(np.asarray(abs(A.tocsc()[:, :-1]).sum(1)).reshape(-1) == 0)
        alone = torch.bincount(pattern.A_columns, minlength=pattern.n)[pattern.A_columns] == 1
        usable = (alone & constant & (pattern.A_rows < zero)).nonzero()[:, 0].tolist()
        chosen = list({int(pattern.A_rows[i]): i for i in usable}.values())  # one for each row
        chosen = chosen[: pattern.n - 1]  # at least one variable has to stay, for `qp` to report NaN
        definitions, out = pattern.A_rows[chosen], pattern.A_columns[chosen]
        kept, equations = _others(pattern.n, out), _others(zero, definitions)
        inequalities = torch.arange(zero, pattern.m, device="cpu")
        index, rows, columns = pattern.full
        whole, of_A = P[index.numpy()], (A, pattern.A_rows, pattern.A_columns)
        matrices = (
            *(_dense(whole, rows, columns, *wanted) for wanted in ((kept, kept), (kept, out), (out, out))),
            *(q[part.numpy()] for part in (kept, out)),
            *(_dense(*of_A, part, kept) for part in (equations, definitions, inequalities)),
            *(b[part.numpy()] for part in (equations, definitions, inequalities)),
            A[np.asarray(chosen, dtype=np.int64)],
        )
        numbers, mixed = Assembly(matrices, program.parameters), bool(matrices[1].count_nonzero())
        return cls(kept, out, equations, definitions, inequalities, numbers, mixed)

    def solve(self, values: Sequence[Tensor], batch: int, solver: ProgramSolver, **options: Any) -> Solution:
        """The solution at the parameters' `values`; its `value` is x `(B, n)` and the multipliers `(B, m)`.

        `options` are those of `solve_program`.
        """
        k, e = len(self.kept), len(self.out)
        P_kk, P_ke, P_ee, q_k, q_e, M, R, G, b_M, r, h, a = self.numbers(values, batch)
        Q, P_ke, P_ee = P_kk.reshape(len(P_kk), k, k), P_ke.reshape(len(P_ke), k, e), P_ee.reshape(len(P_ee), e, e)
        M, G = (t.reshape(len(t), len(rows), k) for t, rows in ((M, self.equations), (G, self.inequalities)))
        R = R.reshape(len(R), e, k) / a.unsqueeze(2)
        p, r, broken = q_k, r / a, None
        if e:
            (P_ke, P_ee, q_e, R, r), broken = _finite(P_ke, P_ee, q_e, R, r)
            curved = P_ee @ R
            Q = Q + R.mT @ curved
            p = p - _times(R.mT, q_e + _times(P_ee, r))
        if self.mixed:
            mixed = P_ke @ R
            Q, p = Q - mixed - mixed.mT, p + _times(P_ke, r)
        if broken is not None:
            p = torch.where(broken, float("nan"), p)  # which `qp` reports
        tensors = (Q, p, G, h, M, b_M)
        shared = [t[0] if len(t) == 1 else t for t in tensors]
        single = all(len(t) == 1 for t in tensors)
        lifted = partial(self._lifted, single, P_ke, P_ee, q_e, R, r, a)
        try:
            found = solve_program(checked(*shared), solver, **options, name="ConvexLayer", not_finite=NOT_FINITE)
            return lifted(found)
        except SolverError as error:
            raise SolverError(str(error), lifted(error.solution)) from error  # pyright: ignore

    def _lifted(
        self,
        single: bool,
        P_ke: Tensor,
        P_ee: Tensor,
        q_e: Tensor,
        R: Tensor,
        r: Tensor,
        a: Tensor,
        found: ProgramSolution,
    ) -> Solution:
        """The solution of the canonical program from that of the quadratic program; `single`: without a batch."""
        names = ("value", "dual_inequality", "dual_equality", "status", "residual", "steps")
        parts = [getattr(found, name) for name in names]
        x, lam, nu, status, residual, steps = (t.unsqueeze(0) for t in parts) if single else parts
        none = failed(status).unsqueeze(1)
        known = torch.where(none, 0.0, x)  # else zero times NaN would spoil gradients of shared values
        x_e = r - _times(R, known)
        slope = _times(P_ee, x_e) + q_e
        multiplier = -(slope + _times(P_ke.mT, known) if self.mixed else slope) / a
        x_e, multiplier = (torch.where(none, float("nan"), t) for t in (x_e, multiplier))
        batch = max(len(x), len(x_e))
        columns = torch.cat([self.kept, self.out]).argsort().to(x.device)
        rows = torch.cat([self.inequalities, self.equations, self.definitions]).argsort().to(x.device)
        value = (
            columns_of(torch.cat([t.expand(batch, -1) for t in (x, x_e)], dim=1), columns),
            columns_of(torch.cat([t.expand(batch, -1) for t in (lam, nu, multiplier)], dim=1), rows),
        )
        status, residual, steps = (t.expand(batch) for t in (status, residual, steps))
        return Solution(value, status, residual, steps, found.evaluations)


def _finite(*numbers: Tensor) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """`numbers` `(B or 1, ...)` with zeros for samples that hold NaN or inf, and which those are.

    Without the zeros, such samples would spoil the derivatives of shared values. The samples come as a mask
    `(B or 1, 1)`, or None if there are none.
    """
    own = [~t.flatten(1).isfinite().all(1) for t in numbers]
    broken = torch.stack(torch.broadcast_tensors(*own)).any(0)
    if not maybe_any(broken):
        return numbers, None
    masks = [(broken if len(t) > 1 else o).reshape(-1, *(1,) * (t.ndim - 1)) for t, o in zip(numbers, own)]
    return tuple(torch.where(mask, 0.0, t) for mask, t in zip(masks, numbers)), broken.unsqueeze(1)


def _others(count: int, some: Tensor) -> Tensor:
    """The indices below `count` that are not among `some`."""
    return torch.ones(count, dtype=torch.bool, device="cpu").index_fill(0, some, False).nonzero()[:, 0]


def _dense(matrix: Any, rows: Tensor, columns: Tensor, *wanted: Tensor) -> Any:
    """The map to the entries of a dense matrix, from the map `matrix` to the entries of a sparse one.

    The entries of the sparse matrix stand at `rows` and `columns`; the dense matrix has only the `wanted` rows and
    columns.
    """
    size = 1 + max(int(t.max()) if len(t) else 0 for t in (rows, columns, *wanted))
    new_row, new_column = (
        torch.full((size,), -1, device="cpu").index_copy(0, w, torch.arange(len(w), device="cpu")) for w in wanted
    )
    i, j = new_row[rows], new_column[columns]
    inside = (i >= 0) & (j >= 0)
    places = (i * len(wanted[1]) + j)[inside].numpy()
    shape = (len(wanted[0]) * len(wanted[1]), int(inside.sum()))
    lift = require("scipy.sparse").csr_array((np.ones(shape[1]), (places, np.arange(shape[1]))), shape=shape)
    return lift @ matrix[inside.numpy()]


def _times(M: Tensor, x: Tensor) -> Tensor:
    """M x, where either may be shared by the batch, with a first dimension of 1."""
    return (M @ x.unsqueeze(2)).squeeze(2)
