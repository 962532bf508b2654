"""Minima under equality constraints: the Karush-Kuhn-Tucker (KKT) equations, and `NewtonKKT`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from implicitly.adjoints import Adjoint
from implicitly.argmin.conditions import Form, Function, check_values
from implicitly.compiled import as_graphs
from implicitly.condition import Condition, Map
from implicitly.descent import TRIALS, bottom, is_bottomless, within_domain
from implicitly.functions import open_function
from implicitly.implicit import push
from implicitly.iterate import Found, Proposal, Residual, Solver, repeat, where_rows
from implicitly.linear import dense
from implicitly.problem import Problem, sample_dims_of
from implicitly.pullback import pullback
from implicitly.solution import Solution, Status
from implicitly.transforms import is_recorded
from implicitly.tree import Layout, row_norm

# A Newton step may be at most 1 / FAR times the scale of z.
FAR = 0.01
# Where at most the share SHORT of a step is of use, the next step is damped; later ones keep LASTING of that.
SHORT, LASTING = 1e-4, 1 / 16


@dataclass(frozen=True)
class Lagrangian:
    """The KKT residual at w = (z, y), `(B, n + m)`, minus the gradient of f + y' h, and what it is made of.

    Attributes:
        residual: maps w to (-(gradient of f + y' h by z), -h).
        evaluate: maps w to f `(B,)`, h `(B, m)` and the residual, in one call.
        given: maps w to the residual in the units of the user's f and h.
    """

    residual: Residual
    evaluate: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
    given: Residual

    def __call__(self, w: Tensor) -> Tensor:
        """The residual at `w`."""
        return self.residual(w)

    def in_units(self, units: Tensor, n: int) -> Lagrangian:
        """The Lagrangian of c f and c u h, as a function of w / `units`, with `units` = (1, u) `(B, n + m)`.

        Its residual is that of w times c (1, u). The factor c makes the least of c (1, u) equal to 1, so that to
        an absolute tolerance no residual looks smaller than it is.
        """
        factors = _factors(units)

        def evaluate(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            value, h, r = self.evaluate(w * units)
            return value * factors[:, 0].to(value.dtype), h * factors[:, n:], r * factors

        return Lagrangian(lambda w: self(w * units) * factors, evaluate, lambda w: self.given(w * units))


@dataclass(frozen=True)
class ConstrainedSolution(Solution):
    """The result of a minimisation under equality constraints: a `Solution` with the multipliers.

    Attributes:
        dual_equality: the multipliers y, with which the gradient of f + y' h vanishes; structured like the result
            of h, and differentiable like `value`.
    """

    dual_equality: Any


@dataclass(frozen=True)
class _Both:
    """Objective and constraints as one function, so that `open_function` opens both at once."""

    objective: Function
    h: Function

    def __call__(self, z: Any, *args: Any) -> tuple[Any, Any]:
        return self.objective(z, *args), self.h(z, *args)


@dataclass(frozen=True)
class Equality(Form):
    """A feasible set given by equations h(z, *args) = 0; at a minimum the gradient of f + y' h vanishes, too.

    The derivatives of the minimum and of the multipliers y follow from these equations. Nocedal and Wright,
    "Numerical Optimization", theorems 12.1 and 12.6.

    Args:
        h: `h(z, *args)` returns a tensor `(B, ...)` (of any shape with `batch_dims=0`) or a pytree of them, of the
            dtype of z0 and with at most as many numbers per sample as z.

    Raises:
        TypeError: h is not callable.
        ValueError: from a solve, if what h returns does not fit z0.
    """

    h: Function

    offers: ClassVar[tuple[str, ...]] = ("equality",)
    kind: ClassVar[type] = Lagrangian
    try_solver: ClassVar[str] = "NewtonKKT or Newton"

    def __post_init__(self):
        if not callable(self.h):
            raise TypeError(f"Equality: h must be callable, got a {type(self.h).__name__}")

    def problem(
        self, objective: Function, z0: Any, args: tuple[Any, ...], layout: Layout, in_dims: Any, recording: bool
    ) -> Problem:
        """The problem for an objective with one value per sample; its state is (z, y), starting at y = 0."""
        y0 = pytree.tree_map(torch.zeros_like, self._first_constraints(z0, args, layout))
        opening = open_function(_Both(objective, self.h), args, layout.device)
        pair, duals = Layout.of((z0, y0), layout.batch_dims), Layout.of(y0, layout.batch_dims)

        def lagrangian(call: Function) -> Lagrangian:
            def parts(w: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
                z, y = pair.unpack(w)
                value, constraints = call(z)
                value, h = value.reshape(len(w)), duals.pack(constraints)
                return value + (h * duals.pack(y)).sum(1), (value, h)

            def evaluate(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
                value, h = parts(w)[1]
                return value, h, residual(w)

            def residual(w: Tensor) -> Tensor:
                total, pull = pullback(lambda w: parts(w)[0], w)
                return within_domain(total, -pull(torch.ones_like(total))[0])

            return Lagrangian(residual, evaluate, residual)

        def first(w: Tensor, *theta: Tensor) -> Tensor:
            call = opening.opened.at(*theta)

            def checked(z: Any) -> tuple[Tensor, Any]:
                value, constraints = call(z)
                return check_values(value, layout), constraints

            return lagrangian(checked)(w)

        sample_dims, opened = sample_dims_of(opening, args, layout, in_dims), opening.opened
        bind = lambda *theta: lagrangian(opened.at(*theta))  # noqa: E731
        options = {"sample_dims": sample_dims, "recording": recording}
        problem = Problem.stated(opening, pair, (z0, y0), bind, first, **options)
        return _in_units(problem, problem.bind, problem.z0)

    def _first_constraints(self, z0: Any, args: tuple[Any, ...], layout: Layout) -> Any:
        with torch.no_grad():
            h0 = self.h(z0, *args)
        size = Layout.of(h0, layout.batch_dims, "what h returns")
        if size.batch != layout.batch:
            raise ValueError(
                f"h must return one row per sample: expected {layout.batch} rows, as in z0, got {size.batch}"
            )
        if size.dtype != layout.dtype or size.device != layout.device:
            raise ValueError(
                f"h must return the dtype and device of z0: expected {layout.dtype} on {layout.device}, got "
                f"{size.dtype} on {size.device}"
            )
        n, m = (sum(leaf.width for leaf in x.leaves) for x in (layout, size))
        if m > n:
            raise ValueError(
                f"h returns {m} numbers per sample, more than the {n} unknowns in z0; leave out redundant "
                "equations"
            )
        return h0

    def curvature(self, F: Lagrangian, z: Tensor) -> tuple[Map, Tensor]:
        """The Hessian of the Lagrangian, restricted to the tangent space of the constraints; zero elsewhere."""
        w = z
        _, h, _ = F.evaluate(w)
        m = h.shape[1]
        _, pull = pullback(F.residual, w)
        matrix = dense(lambda u: -pull(u)[0], w, limit_gib=4.0)
        hessian, jacobian = _blocks(matrix, m)
        tangent = _Split.of(jacobian).tangent
        reduced = tangent @ hessian @ tangent
        return lambda u: (reduced @ u.unsqueeze(2))[:, :, 0], w[:, : w.shape[1] - m]

    def attach(self, how: Adjoint, found: Found, condition: Condition, problem: Problem) -> Tensor:
        """The found (z, y) with its derivative, from the same condition in the units that balance it there.

        In other units a backward solve might be exact by the norm of the residual, and yet ignore the constraints.
        """
        tracked = any(is_recorded(t) for t in problem.theta) and not torch.compiler.is_dynamo_compiling()
        if not tracked or how.recording or found.estimate:  # an estimate is in the problem's units only
            return how.attach(found, condition, problem)
        balanced = _in_units(problem, condition.bind, found.z)
        restated = replace(
            condition, bind=balanced.bind, sample_dims=balanced.sample_dims, kind=None, scale=None, examine=None
        )
        if condition.graphs is not None:
            restated = as_graphs(replace(restated, graphs=None), (problem.key, "in other units"))
        units = balanced.theta[0]
        return how.attach(found._replace(z=found.z / units), restated, balanced) * units

    def solution(self, problem: Problem, found: Found, attached: Tensor | None = None) -> Solution:
        """The `ConstrainedSolution`: the z part of the state as its value, with the multipliers."""
        pair = problem.solution(found, (found.z if attached is None else attached) * problem.theta[0])
        z, y = pair.value
        rest = {f.name: getattr(pair, f.name) for f in fields(pair) if f.name != "value"}
        return ConstrainedSolution(z, **rest, dual_equality=y)

    def _examine(
        self, dtype: torch.dtype, convex: bool, rounding: float, rtol: float, F: Lagrangian, found: Found
    ) -> Found:
        """As for any form, with the residual in the user's units; for INFEASIBLE samples that of the equations."""
        found = super()._examine(dtype, convex, rounding, rtol, F, found)
        if found.z.shape[1] == 0:
            return found
        h, r = F.evaluate(found.z)[1], F.given(found.z)
        equations = row_norm(r[:, r.shape[1] - h.shape[1] :])
        infeasible = found.status == int(Status.INFEASIBLE)
        return found._replace(residual=torch.where(infeasible, equations, row_norm(r)))


def _in_units(problem: Problem, bind: Callable[..., Any], w: Tensor) -> Problem:
    """`problem` with the Lagrangian from `bind`, restated in the `_units` at `w`.

    Its state is divided by the units, which become the first of its theta.
    """
    n = sum(leaf.width for leaf in Layout.of(problem.layout.unpack(w)[0], problem.layout.batch_dims).leaves)
    units = _units(bind(*(t.detach() for t in problem.theta)), w.detach(), n)
    dims = None if problem.sample_dims is None else (0, *problem.sample_dims)
    return replace(
        problem,
        bind=lambda units, *theta: bind(*theta).in_units(units, n),
        z0=problem.z0 / units,
        r0=problem.r0 * _factors(units),
        theta=(units, *problem.theta),
        sample_dims=dims,
    )


def _factors(units: Tensor) -> Tensor:
    """c (1, u) `(B, n + m)`, with c as in `Lagrangian.in_units`."""
    return units / units.amin(1, keepdim=True) if units.shape[1] else units


def _units(residual: Map, w: Tensor, n: int) -> Tensor:
    """The units `(B, n + m)` of (z, y), powers of two: 1 for the `n` entries of z, and one for each multiplier.

    The unit of a multiplier makes its equation about as steep as the Lagrangian is curved, so that both determine
    z to the same accuracy. Two fixed directions, to which a derivative is orthogonal only by accident, give the
    size of the derivatives. An equation h with second derivative b has a slope of about (h b)^(1/2), if not here,
    then where it vanishes. Its multiplier may still be far from its value; it is estimated as what makes the slope
    of the equation equal to that of the objective.
    """
    if w.shape[1] == n or len(w) == 0:
        return torch.ones_like(w)
    image = lambda w, v: pullback(residual, w)[1](v)[0]  # noqa: E731
    angles = torch.arange(1, n + 1, dtype=w.dtype, device=w.device).square()
    slopes, bends = [], []
    for along in (angles.cos(), angles.sin()):
        v = torch.nn.functional.pad(along / torch.linalg.vector_norm(along), (0, w.shape[1] - n)).expand_as(w)
        slopes.append(image(w, v))
        bends.append(push(lambda w, v=v: image(w, v)[:, n:], (w,), (v,)))
    slope, bend, r = (x.abs().nan_to_num(0.0) for x in (torch.stack(slopes), torch.stack(bends), residual(w)))
    slope, bend, steepness = slope.amax(0), bend.amax(0), row_norm(r[:, :n])[:, None]
    steep = torch.hypot(slope[:, n:], r[:, n:].sqrt() * bend.sqrt())
    known = steep > 0
    multipliers = torch.where(known, steepness / torch.where(known, steep, 1.0), 0.0)
    size = row_norm(slope[:, :n])[:, None] + (multipliers * bend).sum(1, keepdim=True)
    size = torch.where(size > 0, size, steepness / (1 + row_norm(w[:, :n])[:, None]))
    size = torch.where(size > 0, size, 1.0)
    exponent = torch.where(known, size.log2() - torch.where(known, steep, 1.0).log2(), 0.0).round()
    most = 0.75 * math.log2(torch.finfo(w.dtype).max)
    return torch.cat([torch.ones_like(w[:, :n]), exponent.nan_to_num(0.0).clamp(-most, most).exp2()], 1)


def _blocks(matrix: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """The Hessian `(B, n, n)` and the constraints' Jacobian `(B, m, n)` in a KKT matrix, made finite by zeros."""
    n = matrix.shape[1] - m
    matrix = torch.where(matrix.isfinite(), matrix, 0.0)
    matrix = (matrix + matrix.mT) / 2
    return matrix[:, :n, :n], matrix[:, n:, :n]


class _Split(NamedTuple):
    """The singular value decomposition of a Jacobian J `(B, m, n)`.

    Singular vectors `(B, m, m)` and `(B, m, n)`; reciprocals of the singular values `(B, m)`, 0 where these
    vanish; the projector onto the kernel of J `(B, n, n)`; whether J has full rank `(B,)`.
    """

    left: Tensor
    right: Tensor
    inverse: Tensor
    tangent: Tensor
    full: Tensor

    @classmethod
    def of(cls, jacobian: Tensor) -> _Split:
        U, S, Vh = torch.linalg.svd(jacobian, full_matrices=False)
        known = max(jacobian.shape[1:]) * torch.finfo(S.dtype).eps * S[:, :1] < S  # they come in order
        inverse = torch.where(known, 1 / torch.where(known, S, 1.0), 0.0)
        rows = Vh * known.unsqueeze(2)
        eye = torch.eye(jacobian.shape[2], dtype=S.dtype, device=S.device)
        return cls(U, rows, inverse, eye - rows.mT @ rows, known.all(1))

    def solve(self, h: Tensor, damping: Tensor) -> Tensor:
        """J' (J J' + damping)^-1 h `(B, n)`, for h `(B, m)`.

        Without damping this is the shortest x with J x = h, in the sense of least squares.
        """
        share = 1 / (1 + damping[:, None] * self.inverse**2)
        return _times(self.right.mT, share * self.inverse * _times(self.left.mT, h))

    def is_damped(self, damping: Tensor) -> Tensor:
        """Whether `damping` `(B,)` matters beside the smallest singular value."""
        return damping * row_norm(self.inverse) ** 2 > 0.1

    def next_damping(self, damping: Tensor, length: Tensor) -> Tensor:
        """The damping `(B,)` after a step of which only the share `length` was of use.

        Where J is nearly singular, one direction would take up the whole step, and the line search would get stuck
        although the other directions lead on (Powell, "A hybrid method for nonlinear equations", 1970, section 5).
        The new damping raises the smallest singular value until the step is about as long as its useful part was.
        """
        return torch.where(length < SHORT, (damping + row_norm(self.inverse) ** -2) / length, LASTING * damping)

    def solve_transposed(self, g: Tensor) -> Tensor:
        """The shortest y `(B, m)` with J' y = g `(B, n)`, in the sense of least squares."""
        return _times(self.left, self.inverse * _times(self.right, g))


@dataclass(frozen=True)
class NewtonKKT(Solver):
    """Newton's method on the KKT equations (sequential quadratic programming) with dense matrices and line search.

    Each step takes the shortest way onto the linearised constraints, and minimises a quadratic model, with the
    absolute values of its eigenvalues, on their tangent space. It is halved until the merit function f + nu |h|
    decreases, or, where the model needed no change, until the KKT residual does (which keeps full steps near the
    solution). Nocedal and Wright, "Numerical Optimization", sections 18.1 to 18.4.

    A sample has converged when |(gradient of f + y' h, h)| is at most atol + rtol |the same at z0|. Each equation
    is measured in the unit in which it is about as steep at z0 as the Lagrangian is curved, so the user's units do
    not matter, except that atol holds in them, too.

    Dependent constraints get the shortest multipliers. Their combination J'y is differentiable like z, but a
    single multiplier has no derivative: its gradient is zero, and reported as SINGULAR. So leave out equations
    that others imply. If the constraints contradict each other, a sample ends as INFEASIBLE, at a point where, to
    first order, no direction reduces their violation in those units; and as SINGULAR if their Jacobian vanishes at
    the start: take another z0.

    Args:
        limit_gib: the most memory that the KKT matrices may take, in GiB; more raises ValueError.
        rtol, atol, max_steps: as in `implicitly.iterate.Solver`.
    """

    limit_gib: float = 4.0
    max_steps: int = 100

    needs: ClassVar[str | None] = "equality"
    recordable: ClassVar[bool] = False

    @property
    def nests(self) -> bool:
        """True, for its line search."""
        return True

    def start(self, F: Lagrangian, z: Tensor, r: Tensor) -> Any:
        """The initial `_Memory`."""
        value, h, _ = F.evaluate(z)
        one = torch.ones_like(value, dtype=r.dtype)
        rtol, atol = self.tolerances(z.dtype)
        lowest = bottom(value, z[:, : z.shape[1] - h.shape[1]], r)
        limit = rtol * row_norm(r) + atol
        return _Memory(value, h, 0 * one, one, 0 * one, one, torch.zeros_like(h), limit, lowest)

    def propose(self, F: Lagrangian, k: int | Tensor, z: Tensor, r: Tensor, memory: Any) -> Proposal:
        """The point reached by the step, halved until it makes progress."""
        last = _Memory(*memory)
        h = last.h
        n = z.shape[1] - h.shape[1]
        _, pull = pullback(F.residual, z)
        hessian, jacobian = _blocks(dense(lambda u: -pull(u)[0], z, self.limit_gib), h.shape[1])
        split = _Split.of(jacobian)
        d, slope, unchanged, led_astray = _step(hessian, jacobian, split, z, r, last)
        # nu is large enough for the merit function to fall along d: Nocedal and Wright, equation 18.36. Where
        # equations depend on each other, a full step removes only a part of |h|. The weight that a step needed is
        # forgotten over time: one from where the equations were nearly flat would keep all later steps short.
        violation = row_norm(h)
        relief = -torch.linalg.vecdot(h, _times(jacobian, d[:, :n])) / torch.where(violation > 0, violation, 1.0)
        enough = 2 * slope / torch.where(relief > 0, relief, 1.0)
        nu = torch.where(relief > 0, torch.maximum(last.nu / 2, enough), last.nu / 2)
        nu = torch.maximum(nu, row_norm((z + d)[:, n:]))  # so that the merit function is least at the solution
        merit = _Merit(last.value + nu * violation, slope - nu * relief, nu, row_norm(r), unchanged)
        trial = merit.search(F, z, d, last.length, row_norm(r) > 0)
        steep = torch.maximum(last.steep, torch.linalg.vector_norm(jacobian, dim=2))
        status = _verdict(trial, split, jacobian, z, d, last._replace(steep=steep))
        infeasible = status == int(Status.INFEASIBLE)
        moves = trial.good & ~infeasible
        new, residual = where_rows(moves, trial.z, z), where_rows(moves, trial.r, r)
        # Infeasible points differ only in how much they violate the constraints.
        residual = where_rows(infeasible, torch.nn.functional.pad(-h, (n, 0)), residual)
        memory = _Memory(
            torch.where(moves, trial.value, last.value),
            where_rows(moves, trial.h, h),
            nu,
            torch.where(trial.good, 1.0, trial.length / 2),  # the next search goes on where this one stopped
            torch.where(led_astray, LASTING * last.damping, split.next_damping(last.damping, trial.length)),
            torch.where(led_astray & (trial.length < SHORT), trial.length, 2.0)
            .mul(last.within)
            .clamp(torch.finfo(z.dtype).eps ** 2, 1.0),
            steep,
            last.limit,
            last.lowest,
        )
        progress = moves & (trial.value + nu * row_norm(trial.h) < merit.value)
        calls = trial.calls + z.shape[1] + (k == 0)
        return Proposal(new, memory, residual, calls, None, status, progress)


class _Memory(NamedTuple):
    """The memory of `NewtonKKT`.

    f `(B,)` and h `(B, m)`; the weight nu of |h| in the merit function, the share of a step to try first, the
    damping of the step onto the constraints, and the limit of a step along them, relative to the scale of z,
    `(B,)` each; the largest gradients of h so far `(B, m)`; the tolerance of |h| `(B,)`; the `bottom` of f.
    """

    value: Tensor
    h: Tensor
    nu: Tensor
    length: Tensor
    damping: Tensor
    within: Tensor
    steep: Tensor
    limit: Tensor
    lowest: Tensor


def _step(
    hessian: Tensor, jacobian: Tensor, split: _Split, z: Tensor, r: Tensor, last: _Memory
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The step of (z, y), the slope of f along it, and two masks `(B,)`.

    The first says where neither the step nor the model was modified. The second says where most of the step is
    along the constraints and, for lack of curvature, as long as the scale of z allowed.
    """
    n = hessian.shape[1]
    y, finite = z[:, n:], r.isfinite().all(1, keepdim=True)
    r, h = torch.where(finite, r, 0.0), torch.where(finite, last.h, 0.0)
    gradient = -r[:, :n] - _times(jacobian.mT, y)
    normal = -split.solve(h, last.damping)
    eye = torch.eye(n, dtype=z.dtype, device=z.device)
    normal_space = eye - split.tangent
    # The normal space gets an eigenvalue of the scale of the tangent space's, but takes no part in the step.
    reduced = split.tangent @ hessian @ split.tangent
    right = -_times(split.tangent, gradient + _times(hessian, normal))
    # Curvature that would not keep the step within the scale of z does not count as curvature.
    reach = row_norm(right) / (last.within * (1 + row_norm(z[:, :n])))
    scale = torch.linalg.matrix_norm(reduced)
    scale = torch.where(scale > 0, scale, torch.where(reach > 0, reach, 1.0))
    values, vectors = torch.linalg.eigh(reduced + scale[:, None, None] * normal_space)
    least = torch.finfo(z.dtype).eps ** 0.5 * scale + FAR * reach
    unchanged = (values > least[:, None]).all(1)
    bold = torch.maximum(values.abs(), (least + reach)[:, None])
    values = torch.where(unchanged[:, None], values, bold)
    tangential = _times(split.tangent, _times(vectors, _times(vectors.mT, right) / values))
    d = normal + tangential
    y_new = -split.solve_transposed(gradient + _times(hessian, d))
    led_astray = ~unchanged & (row_norm(tangential) > row_norm(normal))
    unchanged = unchanged & ~split.is_damped(last.damping)
    return torch.cat([d, y_new - y], 1), torch.linalg.vecdot(gradient, d), unchanged, led_astray


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector.unsqueeze(2))[:, :, 0]


class _Trial(NamedTuple):
    length: Tensor
    z: Tensor
    value: Tensor
    h: Tensor
    r: Tensor
    good: Tensor
    calls: Any


@dataclass(frozen=True)
class _Merit:
    """The test that a step must pass: the merit function or the norm of the residual decreases."""

    value: Tensor
    slope: Tensor
    nu: Tensor
    norm: Tensor
    by_residual: Tensor  # where a decrease of the residual is enough

    def search(self, F: Lagrangian, z: Tensor, d: Tensor, length: Tensor, running: Tensor) -> _Trial:
        """Backtracking along d: the trial at the first good one of `length`, its half, its quarter, and so on.

        The search goes on while samples that are `running` have no good one.
        """

        def attempt(length: Tensor, calls: Any) -> _Trial:
            to = torch.addcmul(z, length[:, None], d)
            value, h, r = F.evaluate(to)
            merit = value + self.nu * row_norm(h)
            falls = merit <= self.value + 1e-4 * length * self.slope
            norm = row_norm(r)
            closer = self.by_residual & (norm <= (1 - 0.1 * length) * self.norm)
            return _Trial(length, to, value, h, r, (falls | closer) & norm.isfinite(), calls)

        def halve(_: Any, t: _Trial) -> _Trial:
            return attempt(torch.where(t.good, t.length, t.length / 2), t.calls + 1)

        calls = torch.ones((), dtype=torch.int64, device=z.device) if torch.compiler.is_dynamo_compiling() else 1
        trial = attempt(length, calls)
        return repeat(halve, trial, lambda t: (~t.good & running).any(), TRIALS)[1]


def _verdict(trial: _Trial, split: _Split, jacobian: Tensor, z: Tensor, d: Tensor, m: _Memory) -> Tensor:
    """How samples at z end, `(B,)`; RUNNING if they can go on."""
    n = jacobian.shape[2]
    size, violation = torch.linalg.matrix_norm(jacobian), row_norm(m.h)
    eps = torch.finfo(z.dtype).eps
    violated = (violation > eps**0.5 * size * (1 + row_norm(z[:, :n]))) & (violation > m.limit)
    # The slope of |h|^2 / 2 tells whether, to first order, a direction reduces the violation of the constraints.
    # For linear constraints the answer is exact. For others the slope vanishes only as z approaches the point of
    # least violation: steps fall short, and the slope is small beside what the largest gradients so far would give
    # and beside what would matter at the scale of z.
    slope = row_norm(_times(jacobian.mT, m.h))
    stuck = ~split.full & (slope <= eps**0.5 * size * violation)
    short = ~trial.good | (trial.length < 1) | split.is_damped(m.damping)
    matters = torch.minimum(torch.linalg.vecdot(m.steep, m.h.abs()), violation**2 / (1 + row_norm(z[:, :n])))
    stuck = stuck | (short & (slope <= eps**0.375 * matters))
    stays = row_norm(trial.length[:, None] * d[:, :n]) <= eps * row_norm(z[:, :n])
    ends = ~trial.good & (stays | ~m.value.isfinite())
    status = torch.where(trial.value.isfinite(), int(Status.STAGNATED), int(Status.NON_FINITE))
    status = torch.where(ends, status, int(Status.RUNNING))
    never_sloped = (m.steep == 0).all(1)
    blind = torch.where(never_sloped, int(Status.SINGULAR), int(Status.INFEASIBLE))
    status = torch.where(stuck & violated, blind, status)
    bottomless = is_bottomless(trial.value, trial.z[:, :n], m.lowest)
    return torch.where(trial.good & bottomless & ~violated, int(Status.UNBOUNDED), status)
