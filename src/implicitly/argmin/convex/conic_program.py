"""Conic programs: state the program, find its solution, attach its derivative."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from implicitly.argmin.convex.canonical import NOT_FINITE
from implicitly.argmin.convex.conic import product
from implicitly.argmin.convex.conic_jacobian import ConicFamily, Jacobian
from implicitly.argmin.convex.conic_solver import Clarabel, Numbers
from implicitly.argmin.programs.derivative import KKTAdjoint, StructuredSolver, told
from implicitly.condition import REMEDY, Condition, Map, Report, explain
from implicitly.host import maybe_any
from implicitly.implicit import Backward, attach
from implicitly.iterate import Found
from implicitly.solution import Status, is_success
from implicitly.transforms import Operation, merge_rows, unhooked
from implicitly.tree import columns_of, row_norm

# The remedies to suggest for programs without a solution.
OF_NUMBERS = {
    **REMEDY,
    Status.MAX_STEPS: "raise max_steps and time_limit_s, or loosen rtol, of Clarabel",
    Status.STAGNATED: "Clarabel gets no further: loosen its rtol, or state the problem in numbers of like sizes",
    Status.NON_FINITE: f"{NOT_FINITE}; see where that comes from",
}
# The size of a residual, relative to the numbers of a program, that is due to rounding errors.
POLISHED = 1e-14
TINY = torch.finfo(torch.float64).tiny  # keeps divisors away from 0
# Above this many times that residual, Newton's method is tried again with a new Jacobian, at most ROUNDS times.
LATE = 1e3
ROUNDS = 3
# A Newton step longer than this, relative to the solution, is more than a rounding error.
LONG = 1e-8
# Multipliers whose terms cancel to less than one over this are unbounded.
CANCELLED = 1e6
# The range of exponents of the units, which are powers of two.
UNITS = (-400.0, 400.0)
# An eigenvalue of v so much smaller than v counts as zero: it is then not determined which face is active.
WEAK = 1e-9


def solve_conic(
    family: ConicFamily, theta: tuple[Tensor, ...], report: Report, adjoint: KKTAdjoint = KKTAdjoint()
) -> Found:
    """The solutions of programs with the numbers `theta` = (P, q, A, b), each `(B or 1, ·)`, float64 on the CPU.

    Inequalities with b = inf are ignored. `adjoint` holds the settings of the derivative's linear solves.

    Returns:
        `Found`: z = (x, y) `(B, n + m)`, y the multipliers, with its derivative; NaN, without one, for samples
        without a solution.

    Raises:
        SolverError: a sample has no solution and `report` says to raise.
    """
    adjoint.check(torch.float64)
    theta = without_infinite_bounds(family, theta)
    known: list[Jacobian] = []
    run = partial(_find, family, known, report)
    z, primal, dual, status, residual, steps, evaluations = _Find.apply(run, *theta)
    bad = ~_has_derivative(status)
    if maybe_any(bad):
        # The numbers of these samples do not matter, and may not be finite.
        stand_in = bad.unsqueeze(1)
        theta = tuple(torch.where(stand_in, torch.nan_to_num(t.detach()), t) for t in theta)
    units = Units(primal, dual)
    report = replace(report, message=told)  # from here on it reports only the solves of derivatives
    condition = Condition(family.bind, "ConvexLayer", torch.float64, report)
    solver = StructuredSolver(rtol=adjoint.rtol, max_steps=adjoint.max_steps, known=known)  # pyright: ignore
    attached = units.taken_off(family, attach(condition, z, units.put_on(theta), Backward(solver)))
    if maybe_any(bad):
        attached = torch.where(bad.unsqueeze(1), float("nan"), attached)
    return Found(attached, status, residual, steps, evaluations)


def without_infinite_bounds(family: ConicFamily, theta: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """`theta` with 0 <= 1 in place of inequalities with b = inf, which say nothing, and 0 <= -1 for b = -inf."""
    P, q, A, b = theta
    if not maybe_any(b.isinf()):
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
    """The units `primal` `(B,)` of x and the slack, and `dual` `(B,)` of the multipliers.

    Clarabel's tolerances are absolute for numbers below one, and its tests of infeasibility expect numbers of
    about one. Cones are invariant under positive scaling: with x = t x', s = t s' and y = u y', the program of
    (x', s', y') has the numbers P t / u, q / u, A and b / t. Units are powers of two, so nothing is rounded.
    """

    primal: Tensor
    dual: Tensor

    @classmethod
    def of(cls, theta: tuple[Tensor, ...], batch: int) -> Units:
        """The units by the numbers of the programs alone.

        Constraints have the size of b, and the unconstrained minimum of the objective is at |q| / |P|. The
        solution lies between the two, but nobody knows where, so the unit is their geometric mean.
        """
        P, q, _, b = (_largest(t).expand(batch) for t in theta)
        free = torch.where(P > 0, q / torch.where(P > 0, P, 1.0), 0.0)
        primal = torch.where((b > 0) & (free > 0), (b * free).sqrt(), torch.maximum(b, free))
        return cls._rounded(primal, q, P)

    @classmethod
    def of_solution(cls, theta: tuple[Tensor, ...], s: Tensor) -> Units:
        """The units by the numbers of the programs and their slacks `s` `(B, m)`."""
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
        """(x, y) in the user's units, from z = (x, y - s) in these."""
        x, v = z.split([family.pattern.n, family.pattern.m], dim=1)
        y = family.cones.project_dual(v)
        return torch.cat([x * self.primal.unsqueeze(-1), y * self.dual.unsqueeze(-1)], dim=1)

    def with_rows(self, mask: Tensor, other: Units) -> Units:
        """These units, with those of `other` where `mask` `(B,)`."""
        return Units(torch.where(mask, other.primal, self.primal), torch.where(mask, other.dual, self.dual))


def _largest(x: Tensor) -> Tensor:
    """The size of the largest entry of each row `(B,)`, 0 for rows without entries."""
    return x.abs().amax(1) if x.shape[1] else x.new_zeros(len(x))


def _power_of_two(x: Tensor) -> Tensor:
    """The powers of two nearest to sizes `(B,)`; 1 for sizes that are 0 or not finite."""
    fine = (x > 0) & x.isfinite()
    return torch.where(fine, torch.where(fine, x, 1.0).log2().round().clamp(*UNITS).exp2(), 1.0)


# --------------------------------------------------------------------------------------------------- finding


class Tried(NamedTuple):
    """What Clarabel found for each sample, in `units`: x, y and s, its status and number of iterations."""

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
        """Run Clarabel on the samples `todo` `(B,)`; with `tight` to rounding errors, if possible."""
        numbers = Numbers(*(t.numpy() for t in units.put_on(theta)))
        return cls(units, *(torch.from_numpy(a) for a in family.workers.solve(numbers, todo.numpy(), tight)))

    def with_rows(self, mask: Tensor, other: Tried) -> Tried:
        """This result, with that of `other` where `mask` `(B,)`; there the steps of both are added."""
        column = mask.unsqueeze(1)
        x, y, s = (torch.where(column, new, old) for new, old in zip(other[1:4], self[1:4]))
        units, status = self.units.with_rows(mask, other.units), torch.where(mask, other.status, self.status)
        return Tried(units, x, y, s, status, self.steps + torch.where(mask, other.steps, 0))


def _find(family: ConicFamily, known: list[Jacobian], report: Report, *theta: Tensor) -> tuple[Tensor, ...]:
    """Solve: (z, primal and dual units, status, residual, steps, evaluations) for plain tensors.

    z is in these units; `known` receives the Jacobian.
    """
    batch = max(len(t) for t in theta)
    finite = torch.stack([t.isfinite().all(1).expand(batch) for t in theta]).all(0)
    tried = Tried.by(family, theta, Units.of(theta, batch), finite)
    found = _examined(family, theta, tried)
    if maybe_any(found.doubtful):
        tried, found = _tried_again(family, theta, tried, found)
    jacobian, z, status = found.jacobian, found.z, found.status
    if family.solver.polish:
        weak = family.cones.least_eigenvalue(z[:, family.pattern.n :]) <= WEAK * (1 + _largest(z))
        # Where Newton's method makes no progress, the Jacobian is singular at the solution.
        degenerate = jacobian.degenerate | weak | (found.norm > family.solver.rtol)
        if maybe_any(_largest(z) > CANCELLED):
            degenerate |= _has_no_interior(jacobian, z)
        status = torch.where((status == Status.CONVERGED) & degenerate, int(Status.DEGENERATE), status)
    known.append(jacobian)
    stationarity, feasibility = found.r.split([family.pattern.n, family.pattern.m], dim=1)
    units, none = tried.units, jacobian.left_out
    residual = torch.hypot(row_norm(stationarity) * units.dual, row_norm(feasibility) * units.primal)
    ends = (status, residual.masked_fill(none, float("nan")), tried.steps, tried.steps.sum())
    unpack = report.unpack and (lambda f: report.unpack(f._replace(z=units.taken_off(family, f.z))))  # pyright: ignore
    said = replace(report, unpack=unpack, message=partial(explain, remedy=OF_NUMBERS))
    said("ConvexLayer", family.solver, Found(z, *ends))  # pyright: ignore
    return z, units.primal, units.dual, *ends


def _tried_again(
    family: ConicFamily, theta: tuple[Tensor, ...], tried: Tried, found: Examined
) -> tuple[Tried, Examined]:
    """`tried` and `found`, after another run of Clarabel on the doubtful samples.

    It runs to rounding errors, in units that suit the solutions; its results are used where they are better.
    """
    units = Units.of_solution(theta, tried.s * tried.units.primal.unsqueeze(1))
    other = Tried.by(family, theta, units, found.doubtful, tight=True)
    # A sample that met the tolerance before stays solved if the new run is better, but ends above rounding errors.
    solved = (tried.status == Status.CONVERGED) & _has_derivative(other.status)
    other = other._replace(status=torch.where(solved, tried.status, other.status))
    both = tried.with_rows(found.doubtful, other)
    new = _examined(family, theta, both)
    worse = found.doubtful & ~(new.norm < found.norm) & _has_derivative(both.status)
    if maybe_any(worse):
        both = both.with_rows(worse, tried)
        new = _examined(family, theta, both)
    return both, new


class Examined(NamedTuple):
    """Clarabel's results, polished and verified.

    The polished z, its Jacobian and residual, the status, the residual norm relative to the terms that it is made
    of; and which samples are worth another try.
    """

    jacobian: Jacobian
    z: Tensor
    r: Tensor
    status: Tensor
    norm: Tensor
    doubtful: Tensor


def _examined(family: ConicFamily, theta: tuple[Tensor, ...], tried: Tried) -> Examined:
    """Polish Clarabel's results, and correct every status that the residual does not confirm."""
    bad = ~_has_derivative(tried.status)
    column = bad.unsqueeze(1)
    theta = tried.units.put_on(theta)
    theta = tuple(torch.where(column, torch.nan_to_num(t), t) for t in theta) if maybe_any(bad) else theta
    z = torch.where(column, 0.0, torch.cat([tried.x, tried.y - tried.s], dim=1))
    jacobian, residual = Jacobian(family, z, theta, bad), family.bind(*theta)
    sizes = row_norm(theta[1]), row_norm(theta[3])
    z, r, late = _polished_to_the_end(residual, jacobian, family.solver, POLISHED * (1 + sizes[0] + sizes[1]))
    p = family.pattern
    (x, v), parts = z.split([p.n, p.m], dim=1), r.split([p.n, p.m], dim=1)
    s = parts[1] + theta[3] - product(theta[2], p.A_rows, p.A_columns, x, p.m)
    # A residual of the size of rounding errors passes the test below, however small the scale is.
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
    """`polished`, repeated with a new Jacobian where the old one did not serve.

    Returns also the samples for which none did. `jacobian` moves along, and learns where there is no derivative.
    """
    late = torch.zeros_like(jacobian.left_out)
    z, r = polished(residual, jacobian, jacobian.z, solver.polish, target)
    for _ in range(ROUNDS if solver.polish else 0):
        if maybe_any(late):
            z, r = polished(residual, jacobian, z, solver.polish, target)
        jacobian.move_to(z)
        late = (row_norm(r) > LATE * target) & ~jacobian.left_out
        if not maybe_any(late):
            break
    if maybe_any(late):
        # Where the Jacobian is singular at the solution, Newton's method makes no progress,
        # though its steps are long.
        wanted = jacobian.family.wanted
        step, size = row_norm(jacobian.solve(r) * wanted), row_norm(z * wanted)
        jacobian.degenerate |= late & (step > LONG * (1 + size))
    return z, r, late


def _has_no_interior(jacobian: Jacobian, z: Tensor) -> Tensor:
    """Whether no point seems to be strictly feasible, `(B,)`: multipliers then grow without bound and cancel.

    In that case the solution has no derivative with respect to b, since some changes of b make it infeasible.
    """
    pattern, (P, q, A, _) = jacobian.family.pattern, jacobian.theta
    x, v = z.split([pattern.n, pattern.m], dim=1)
    y = jacobian.family.cones.project_dual(v)
    index, rows, columns = pattern.full
    left = row_norm(q) + row_norm(product(P[:, index], rows, columns, x, pattern.n))
    terms = product(A.abs(), pattern.A_columns, pattern.A_rows, y.abs(), pattern.n)
    return row_norm(terms) > CANCELLED * left.clamp(min=1)


def polished(residual: Map, jacobian: Jacobian, z: Tensor, steps: int, target: Tensor) -> tuple[Tensor, Tensor]:
    """`z` after Newton steps with the inverse of a single Jacobian, as long as they help, and its residual.

    Steps end once all residuals have the size `target` `(B,)`.
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


class _Find(Operation):
    """A solve as one operation that is opaque to autograd; `vmap` merges its dimension into the batch."""

    @staticmethod
    @unhooked()
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
