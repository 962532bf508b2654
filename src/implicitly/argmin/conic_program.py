"""Conic programs: state the program, find its solution, attach the derivative."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.func import vjp

from implicitly.argmin.conic import Cones, Pattern, product
from implicitly.argmin.conic_solver import Clarabel, Numbers, Workers
from implicitly.argmin.derivative import KKTAdjoint, StructuredSolver
from implicitly.argmin.optional import require
from implicitly.host import happens
from implicitly.implicit import Backward, Condition, Map, Report, attach
from implicitly.iterate import Found, Status, is_success
from implicitly.tree import columns_of, merge_rows, row_norm

# Up to so many unknowns the systems of a batch are solved as dense matrices; beyond, sparse ones sample by sample.
DENSE_UP_TO = 150
# Numbers of a batch of dense matrices, at most.
DENSE_LIMIT = 2**27
# How much a Jacobian is regularised before it is factorised; refinement takes that out of what is solved with it.
PROXIMAL = 1e-10
# A factorised Jacobian that leaves less of a vector serves another one near it: each refinement gains as much.
GOOD = 5e-3
# Where the exact Jacobian leaves more, after so many refinements, no solution has it. Of a probe of N entries that
# is less than the difference of any two, for N up to 1000.
MISSING = 1e-5
REFINEMENTS = 2
GOLDEN = (5**0.5 - 1) / 2
# A residual relative to the numbers of a program, for which rounding errors are to blame.
POLISHED = 1e-14
TINY = torch.finfo(torch.float64).tiny
# Times that residual, from which on Newton's method is tried again with another Jacobian, and how often it is.
LATE = 1e3
ROUNDS = 3
# A Newton step, relative to the solution, that is no rounding error.
LONG = 1e-8
# Multipliers that cancel each other to one over that have no bounds.
CANCELLED = 1e6
# The exponents that units, powers of two, may have.
UNITS = (-400.0, 400.0)
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


def solve_conic(
    family: ConicFamily, theta: tuple[Tensor, ...], report: Report, adjoint: KKTAdjoint = KKTAdjoint()
) -> Found:
    """The solutions of programs with the numbers `theta` = (P, q, A, b), each `(B or 1, ·)`, float64 on the CPU.

    Inequalities whose b is inf are no constraints. `adjoint` has the settings of the derivative's linear solves.

    Returns:
        `Found`: z = (x, y) `(B, n + m)`, y the multipliers, with its derivative; NaN, without one, for samples
        without a solution.

    Raises:
        SolverError: a sample has no solution and `report` is to raise.
    """
    theta = without_infinite_bounds(family, theta)
    known: list[Jacobian] = []
    run = partial(_find, family, known, report)
    z, primal, dual, status, residual, steps, evaluations = _Find.apply(run, *theta)
    bad = ~_has_derivative(status)
    if happens(bad):
        # Their numbers count for nothing, and may not be finite.
        stand_in = bad.unsqueeze(1)
        theta = tuple(torch.where(stand_in, torch.nan_to_num(t.detach()), t) for t in theta)
    units = Units(primal, dual)
    condition = Condition(family.bind, "ConvexLayer", torch.float64, report)
    solver = StructuredSolver(rtol=adjoint.rtol, max_steps=adjoint.max_steps, known=known)  # pyright: ignore
    attached = units.taken_off(family, attach(condition, z, units.put_on(theta), Backward(solver)))
    if happens(bad):
        attached = torch.where(bad.unsqueeze(1), float("nan"), attached)
    return Found(attached, status, residual, steps, evaluations)


def without_infinite_bounds(family: ConicFamily, theta: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """With 0 <= 1 for inequalities with a b of inf, which say nothing, and 0 <= -1 for those of -inf."""
    P, q, A, b = theta
    if not happens(b.isinf()):
        return theta
    inequality = torch.zeros(family.pattern.m, dtype=torch.bool, device="cpu")
    inequality[family.cones.zero : family.cones.linear] = True
    infinite = b.isinf() & inequality
    A = torch.where(columns_of(infinite, family.pattern.A_rows), 0.0, A)
    return P, q, A, torch.where(infinite, b.detach().sign(), b)


def _has_derivative(status: Tensor) -> Tensor:
    return is_success(status) | (status == Status.MAX_STEPS) | (status == Status.STAGNATED)


# ----------------------------------------------------------------------------------------------------- units


@dataclass(frozen=True, eq=False)
class Units:
    """What x and the slack are measured in, `primal` `(B,)`, and what the multipliers are, `dual` `(B,)`.

    Tolerances of Clarabel are absolute for numbers below one, and its tests of infeasibility want numbers of about
    one. Cones are the same in all units: with x = t x', s = t s' and y = u y' the program of (x', s', y') has
    the numbers P t / u, q / u, A and b / t. Units are powers of two, so that this rounds nothing.
    """

    primal: Tensor
    dual: Tensor

    @classmethod
    def of(cls, theta: tuple[Tensor, ...], batch: int) -> Units:
        """By the numbers of the programs alone.

        Constraints are of the size of b, and the objective without them has its minimum at |q| / |P|: between the
        two lies the solution, and where they differ, nobody knows where.
        """
        P, q, _, b = (_largest(t).expand(batch) for t in theta)
        free = torch.where(P > 0, q / torch.where(P > 0, P, 1.0), 0.0)
        primal = torch.where((b > 0) & (free > 0), (b * free).sqrt(), torch.maximum(b, free))
        return cls._rounded(primal, q, P)

    @classmethod
    def of_solution(cls, theta: tuple[Tensor, ...], s: Tensor) -> Units:
        """By the numbers of the programs and their slacks `s` `(B, m)`."""
        P, q, _, b = (_largest(t).expand(len(s)) for t in theta)
        return cls._rounded(torch.maximum(b, _largest(s)), q, P)

    @classmethod
    def _rounded(cls, primal: Tensor, q: Tensor, P: Tensor) -> Units:
        primal = _power_of_two(primal)
        return cls(primal, _power_of_two(torch.maximum(q, P * primal)))

    def put_on(self, theta: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The numbers of the programs in these units."""
        P, q, A, b = theta
        primal, dual = self.primal.unsqueeze(-1), self.dual.unsqueeze(-1)
        return P * (primal / dual), q / dual, A, b / primal

    def taken_off(self, family: ConicFamily, z: Tensor) -> Tensor:
        """(x, y) in the user's units, of z = (x, y - s) in these."""
        x, v = z.split([family.pattern.n, family.pattern.m], dim=1)
        y = family.cones.project_dual(v)
        return torch.cat([x * self.primal.unsqueeze(-1), y * self.dual.unsqueeze(-1)], dim=1)

    def with_rows(self, mask: Tensor, other: Units) -> Units:
        """Those of `other` where `mask` `(B,)`."""
        return Units(torch.where(mask, other.primal, self.primal), torch.where(mask, other.dual, self.dual))


def _largest(x: Tensor) -> Tensor:
    """The size of the largest entry of each row, 0 of rows without any, `(B,)`."""
    return x.abs().amax(1) if x.shape[1] else x.new_zeros(len(x))


def _power_of_two(x: Tensor) -> Tensor:
    """The nearest, of sizes `(B,)`; 1 for those that are 0 or not finite."""
    fine = (x > 0) & x.isfinite()
    return torch.where(fine, torch.where(fine, x, 1.0).log2().round().clamp(*UNITS).exp2(), 1.0)


# --------------------------------------------------------------------------------------------------- finding


class Tried(NamedTuple):
    """What Clarabel says of every sample, in `units`: x, y and s, its status and iterations."""

    units: Units
    x: Tensor
    y: Tensor
    s: Tensor
    status: Tensor
    steps: Tensor

    @classmethod
    def by(
        cls, family: ConicFamily, theta: tuple[Tensor, ...], units: Units, todo: Tensor, tight: bool = False
    ) -> Tried:
        """For the samples `todo` `(B,)`; `tight`: to rounding errors, if it can."""
        numbers = Numbers(*(t.numpy() for t in units.put_on(theta)))
        return cls(units, *(torch.from_numpy(a) for a in family.workers.solve(numbers, todo.numpy(), tight)))

    def with_rows(self, mask: Tensor, other: Tried) -> Tried:
        """What `other` says where `mask` `(B,)`, after the steps of both."""
        column = mask.unsqueeze(1)
        x, y, s = (torch.where(column, new, old) for new, old in zip(other[1:4], self[1:4]))
        units, status = self.units.with_rows(mask, other.units), torch.where(mask, other.status, self.status)
        return Tried(units, x, y, s, status, self.steps + torch.where(mask, other.steps, 0))


def _find(family: ConicFamily, known: list[Jacobian], report: Report, *theta: Tensor) -> tuple[Tensor, ...]:
    """(z, units, status, residual, steps, evaluations) for plain tensors, z in these units; `known` gets the
    Jacobian."""
    batch = max(len(t) for t in theta)
    finite = torch.stack([t.isfinite().all(1).expand(batch) for t in theta]).all(0)
    tried = Tried.by(family, theta, Units.of(theta, batch), finite)
    found = _examined(family, theta, tried)
    if happens(found.doubtful):
        tried, found = _tried_again(family, theta, tried, found)
    jacobian, z, status = found.jacobian, found.z, found.status
    if family.solver.polish:
        weak = family.cones.least_eigenvalue(z[:, family.pattern.n :]) <= WEAK * (1 + _largest(z))
        # Where Newton's method does not get on, the Jacobian is singular at the solution.
        degenerate = jacobian.degenerate | weak | (found.norm > family.solver.rtol)
        if happens(_largest(z) > CANCELLED):
            degenerate |= _has_no_interior(jacobian, z)
        status = torch.where((status == Status.CONVERGED) & degenerate, int(Status.DEGENERATE), status)
    known.append(jacobian)
    stationarity, feasibility = found.r.split([family.pattern.n, family.pattern.m], dim=1)
    units, none = tried.units, jacobian.left_out
    residual = torch.hypot(row_norm(stationarity) * units.dual, row_norm(feasibility) * units.primal)
    ends = (status, residual.masked_fill(none, float("nan")), tried.steps, tried.steps.sum())
    unpack = report.unpack and (lambda f: report.unpack(f._replace(z=units.taken_off(family, f.z))))  # pyright: ignore
    replace(report, unpack=unpack)("ConvexLayer", family.solver, Found(z, *ends))  # pyright: ignore
    return z, units.primal, units.dual, *ends


def _tried_again(
    family: ConicFamily, theta: tuple[Tensor, ...], tried: Tried, found: Examined
) -> tuple[Tried, Examined]:
    """`tried` and `found` with, for samples that are doubtful, what Clarabel says to tolerances and in units that
    suit their solutions, where it is better."""
    units = Units.of_solution(theta, tried.s * tried.units.primal.unsqueeze(1))
    other = Tried.by(family, theta, units, found.doubtful, tight=True)
    # What it does not reach to rounding errors, but did before to the tolerance, is still solved, if it is better.
    solved = (tried.status == Status.CONVERGED) & _has_derivative(other.status)
    other = other._replace(status=torch.where(solved, tried.status, other.status))
    both = tried.with_rows(found.doubtful, other)
    new = _examined(family, theta, both)
    worse = found.doubtful & ~(new.norm < found.norm) & _has_derivative(both.status)
    if happens(worse):
        both = both.with_rows(worse, tried)
        new = _examined(family, theta, both)
    return both, new


class Examined(NamedTuple):
    """What there is to what Clarabel said: z polished, its Jacobian and residual, the status, the residual norm
    relative to what it is made of; and which samples are worth another try."""

    jacobian: Jacobian
    z: Tensor
    r: Tensor
    status: Tensor
    norm: Tensor
    doubtful: Tensor


def _examined(family: ConicFamily, theta: tuple[Tensor, ...], tried: Tried) -> Examined:
    """Take no word for what the residual does not confirm."""
    bad = ~_has_derivative(tried.status)
    column = bad.unsqueeze(1)
    theta = tried.units.put_on(theta)
    theta = tuple(torch.where(column, torch.nan_to_num(t), t) for t in theta) if happens(bad) else theta
    z = torch.where(column, 0.0, torch.cat([tried.x, tried.y - tried.s], dim=1))
    jacobian, residual = Jacobian(family, z, theta, bad), family.bind(*theta)
    sizes = row_norm(theta[1]), row_norm(theta[3])
    z, r, late = _polished_to_the_end(residual, jacobian, family.solver, POLISHED * (1 + sizes[0] + sizes[1]))
    p = family.pattern
    (x, v), parts = z.split([p.n, p.m], dim=1), r.split([p.n, p.m], dim=1)
    s = parts[1] + theta[3] - product(theta[2], p.A_rows, p.A_columns, x, p.m)
    # Beside what it is relative to, rounding errors of everything that there is.
    least = POLISHED / family.solver.rtol
    relative = (row_norm(r) / (size + row_norm(own) + least) for r, size, own in zip(parts, sizes, (v + s, s)))
    norm = torch.maximum(*relative)
    fine, wrong = norm <= family.solver.rtol, ~(norm <= family.solver.rtol**0.5)
    status = torch.where(fine & ~bad, int(Status.CONVERGED), tried.status)
    status = torch.where(wrong & (status == Status.CONVERGED), int(Status.STAGNATED), status)
    doubtful = (late | (status == Status.STAGNATED)) & (status != Status.MAX_STEPS) & ~bad
    return Examined(jacobian, z, r, status, norm, doubtful)


def _polished_to_the_end(
    residual: Map, jacobian: Jacobian, solver: Clarabel, target: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`polished`, once more with another Jacobian where one did not serve, and for which samples none did;
    `jacobian` moves along, and learns where there is no derivative."""
    late = torch.zeros_like(jacobian.left_out)
    z, r = polished(residual, jacobian, jacobian.z, solver.polish, target)
    for _ in range(ROUNDS if solver.polish else 0):
        if happens(late):
            z, r = polished(residual, jacobian, z, solver.polish, target)
        jacobian.move_to(z)
        late = (row_norm(r) > LATE * target) & ~jacobian.left_out
        if not happens(late):
            break
    if happens(late):
        # Newton's method does not get on where the Jacobian is singular at the solution; then its steps are long.
        wanted = jacobian.family.wanted
        step, size = row_norm(jacobian.solve(r) * wanted), row_norm(z * wanted)
        jacobian.degenerate |= late & (step > LONG * (1 + size))
    return z, r, late


def _has_no_interior(jacobian: Jacobian, z: Tensor) -> Tensor:
    """Whether `(B,)` multipliers grow beyond bounds against each other, as they do where no point is strictly
    feasible: then the solution has no derivative by b, which may not move everywhere."""
    pattern, (P, q, A, _) = jacobian.family.pattern, jacobian.theta
    x, v = z.split([pattern.n, pattern.m], dim=1)
    y = jacobian.family.cones.project_dual(v)
    index, rows, columns = pattern.full
    left = row_norm(q) + row_norm(product(P[:, index], rows, columns, x, pattern.n))
    terms = product(A.abs(), pattern.A_columns, pattern.A_rows, y.abs(), pattern.n)
    return row_norm(terms) > CANCELLED * left.clamp(min=1)


def polished(residual: Map, jacobian: Jacobian, z: Tensor, steps: int, target: Tensor) -> tuple[Tensor, Tensor]:
    """`z` after Newton steps with the inverse of one Jacobian, while they help, and its residual.

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
    return z, r


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
        return (None,) * 7

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
        """That of some samples, at `z` `(B, n + m)`."""
        theta = tuple(t if len(t) == 1 else t[rows] for t in self.theta)
        return Jacobian(self.family, z[rows], theta, self.left_out[rows])

    def _probe(self) -> Tensor:
        """A gradient `(1, n + m)` without a meaning, of which no two entries, nor their sums, are nearly the same
        as other ones: multiples of the golden ratio are spread as evenly as can be."""
        k = torch.arange(1.0, self.z.shape[1] + 1, dtype=self.z.dtype, device=self.z.device)
        return (1 + (k * GOLDEN).frac()).unsqueeze(0)

    def _left_of(self, z: Tensor, refinements: int = 0) -> list[Tensor]:
        """Which part `(B,)` the inverse leaves of a meaningless gradient at `z`, and of one by what is wanted:
        what no solution has, or what an inverse of another matrix misses. Refinements, for which the latter is
        all that matters, take away what another misses."""
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

    def take(self, rows: Tensor) -> DenseFactors:
        """Those of some samples."""
        return DenseFactors(self.lu[rows], self.pivots[rows])

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

    def take(self, rows: Tensor) -> SparseFactors:
        """Those of some samples."""
        return SparseFactors([self.factors[row] for row in rows.tolist()], self.n, self.m)

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
