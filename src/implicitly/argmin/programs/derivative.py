"""The derivative of a quadratic program, from the optimality condition and the factors at its solution."""

from __future__ import annotations

import itertools
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from implicitly.argmin.programs.condensed import CondensedFactors
from implicitly.argmin.programs.kkt import ACTIVE_SET, RELAXED, Conditions, Factors, proximal
from implicitly.argmin.programs.program import QuadraticProgram
from implicitly.condition import LINEAR_REMEDY, Condition, Graphs, Map, Report, explain
from implicitly.host import maybe_any
from implicitly.implicit import Backward, attach, search
from implicitly.iterate import Found, Proposal
from implicitly.linear import Affine, DenseLU, LinearSolver
from implicitly.pullback import Pull
from implicitly.solution import Status
from implicitly.transforms import full_precision
from implicitly.tree import row_norm

# The share of a residual that a step with the inverse of the right matrix leaves at most, and the share that shows
# beyond doubt that it is the right one.
CLOSE_ENOUGH = 0.5
PLAIN = 1e-3
# A refinement step that leaves a larger share must have used the inverse of another matrix.
CREEP = 0.05

# The message about samples whose linear system was not solved: what to try with the options of `KKTAdjoint`.
told = partial(
    explain,
    remedy={
        **LINEAR_REMEDY,
        Status.MAX_STEPS: "raise max_steps of KKTAdjoint, or loosen its rtol",
        Status.STAGNATED: "loosen rtol of KKTAdjoint, or use a wider dtype: the residual has stopped decreasing",
        Status.SINGULAR: "leave out redundant constraints, or add a multiple of the identity to Q: the Jacobian "
        "of the optimality conditions is singular",
    },
)


@dataclass(frozen=True, eq=False)
class Jacobian:
    """The factorised Jacobian of an optimality condition at a point, in equilibrated units.

    Attributes:
        factors: their beta is kept away from zero, so a solve with them leaves a small residual.
        program: the scaled program.
        alpha, beta: `(B, m)`, the exact ones of the Jacobian.
        degenerate: `(B,)` bool, where the Jacobian is singular, as far as can be told in floating point.
    """

    factors: Factors | CondensedFactors
    program: QuadraticProgram
    alpha: Tensor
    beta: Tensor
    degenerate: Tensor

    def solve(self, r: Tensor, transposed: bool = False) -> Tensor:
        """w with J w ≈ r, or J' w ≈ r, for `r` `(k * B, n + q + m)` of which row i belongs to sample i % B."""
        batch = len(self.alpha)
        r = r.unflatten(0, (len(r) // max(batch, 1), batch)).transpose(0, 1)
        return self.factors.solve(r, transposed).transpose(0, 1).flatten(0, 1)

    def dense(self, rows: Tensor) -> Tensor:
        """The matrices `(len(rows), N, N)` of some samples."""
        program = self.program.take_rows(rows)
        Q, G, A = (t.expand(len(rows), -1, -1) for t in (program.Q, program.G, program.A))
        n, q, m = program.sizes
        J = Q.new_zeros(len(rows), n + q + m, n + q + m)
        J[:, :n, :n], J[:, :n, n : n + q], J[:, :n, n + q :] = Q, A.mT, G.mT
        J[:, n : n + q, :n] = A
        J[:, n + q :, :n] = self.alpha[rows].unsqueeze(2) * G
        J[:, n + q :, n + q :] = torch.diag_embed(self.beta[rows])
        return J


class Linearised(Protocol):
    """Protocol of the factorised Jacobian J of an optimality condition; `Jacobian` is one."""

    @property
    def degenerate(self) -> Tensor:
        """Where J is singular in a way that matters, `(B,)`."""
        ...

    def solve(self, r: Tensor, transposed: bool = False) -> Tensor:
        """w with J w ≈ r, or J' w ≈ r, for `r` `(k * B, N)` of which row i belongs to sample i % B."""
        ...

    def dense(self, rows: Tensor) -> Tensor:
        """The matrices `(len(rows), N, N)` of some samples."""
        ...


@dataclass(frozen=True, eq=False)
class StructuredSolver(LinearSolver):
    """Solves the linear systems of derivatives with the factors of the forward solve: one step, and refinement.

    `known` receives the `Linearised` condition once the solution is found. A first step, or if need be a test
    vector, shows whether a system is that condition, its transpose, or neither; the last kind is solved by dense
    LU. A first step can mislead, for a right-hand side on which the two matrices hardly differ: then later steps
    gain little, which gives it away. At degenerate samples the solution is that of least squares with minimal
    norm; the part of the residual that no solution can reduce does not count.
    """

    recurrent: ClassVar[bool] = False
    label: ClassVar[str | None] = "the linear solver of KKTAdjoint"
    max_steps: int = 10
    known: Sequence[Linearised] = field(default_factory=list)

    def start(self, F: Affine, z: Tensor, r: Tensor) -> tuple[Any, ...]:
        """The memory: the inverse to apply; if a first step alone identified it, the tolerance and the step."""
        jacobian = self.known[0]
        batch = len(jacobian.degenerate)
        for transposed in (True, False) if len(r) == batch else ():
            inverse = _Inverse.of(jacobian, transposed, batch, batch)
            (step, left), size = inverse(F, r), row_norm(r)
            if bool((row_norm(left) <= PLAIN * size).all()):
                return inverse, self.tolerances(r.dtype)[0] * size, r, step, left
        return self._recognised(F, z, r)

    def _recognised(self, F: Affine, z: Tensor, r: Tensor) -> tuple[Any, ...]:
        inverse = _Inverse.recognised(self.known[0], F, r)
        return DenseLU(limit_gib=8.0).start(F, z, r) if inverse is None else (inverse,)

    def propose(self, F: Affine, k: int | Tensor, z: Tensor, r: Tensor, memory: Any) -> Proposal:
        """The solution; in further steps, its correction for the errors of rounding and of the factors."""
        if not isinstance(memory[0], _Inverse):
            return DenseLU().propose(F, k, z, r, memory)
        inverse, *guess = memory
        if len(guess) > 1 and guess[1] is r:
            step, left = guess[2:]
            return Proposal(z + step, (inverse, guess[0]), left, calls=1)
        step, left = inverse(F, r)
        if guess and bool((row_norm(left) > torch.maximum(CREEP * row_norm(r), guess[0])).any()):
            return self.propose(F, k, z, r, self._recognised(F, z, r))
        return Proposal(z + step, (inverse, *guess[:1]), left, calls=1)


@dataclass(frozen=True, eq=False)
class _Inverse:
    """An approximate inverse of -J or -J', for k right-hand sides per sample.

    Rows are ordered (V, k, `inner`), with V * `inner` samples: `vmap` may have put a part V of the samples in
    front of the right-hand sides.
    """

    jacobian: Linearised
    transposed: bool
    inner: int
    # For samples where J is singular, or nearly: their rows, the pseudoinverse, and the projection onto the range.
    rows: Tensor | None
    pseudoinverse: Tensor
    onto_range: Tensor

    @classmethod
    def recognised(cls, jacobian: Linearised, F: Affine, r: Tensor) -> _Inverse | None:
        """The inverse for the system of `F`, found with an arbitrary test vector; None if it is not of J or J'."""
        batch = len(jacobian.degenerate)
        if len(r) % batch:
            return None
        wave = torch.cos(torch.arange(1.0, r.numel() + 1, dtype=r.dtype, device=r.device) ** 2).reshape(r.shape)
        inners = [batch] if len(r) == batch else [n for n in range(batch, 0, -1) if batch % n == 0]
        best, found, left = (len(r) + 1, 0.0), None, wave
        for inner, transposed in itertools.product(inners, (True, False)):
            inverse = cls.of(jacobian, transposed, inner, len(r))
            remains = row_norm(inverse(F, wave)[1]) / row_norm(wave)
            # Even with a wrong order of the rows, some rows may come out right, so they are counted.
            score = int((~(remains < PLAIN)).sum()), float(remains.median())
            if score < best:
                best, found, left = score, inverse, remains
            if best[0] == 0:
                break
        if found is None or not best[1] < CLOSE_ENOUGH:
            return None
        stubborn = ~(left <= CLOSE_ENOUGH)
        if not maybe_any(stubborn):
            return found
        # The remaining samples are ill-conditioned, and the factors too inaccurate for them.
        chosen = stubborn[found._order(len(r))].reshape(-1, batch).any(0)
        return cls.of(jacobian, found.transposed, found.inner, len(r), chosen)

    @classmethod
    def of(
        cls, jacobian: Linearised, transposed: bool, inner: int, count: int, stubborn: Tensor | None = None
    ) -> _Inverse:
        """The inverse for `count` rows; degenerate and `stubborn` samples `(B,)` use their dense pseudoinverse."""
        empty, chosen = torch.zeros(0), jacobian.degenerate
        chosen = chosen if stubborn is None else chosen | stubborn
        plain = cls(jacobian, transposed, inner, None, empty, empty)
        if not maybe_any(chosen):
            return plain
        samples = chosen.nonzero()[:, 0]
        J = jacobian.dense(samples)
        J = J.mT if transposed else J
        rtol = torch.where(jacobian.degenerate[samples], proximal(J.dtype), J.shape[1] * torch.finfo(J.dtype).eps)
        pseudoinverse = torch.linalg.pinv(J, rtol=rtol.to(J.dtype))
        rows = plain._order(count).reshape(-1, len(chosen))[:, samples]
        return replace(plain, rows=rows, pseudoinverse=pseudoinverse, onto_range=J @ pseudoinverse)

    def _order(self, count: int) -> Tensor:
        """The indices that put `count` rows into the order (k, V, inner)."""
        batch = len(self.jacobian.degenerate)
        index = torch.arange(count, device=self.jacobian.degenerate.device)
        return index.reshape(batch // self.inner, -1, self.inner).transpose(0, 1).reshape(-1)

    def __call__(self, F: Affine, r: Tensor) -> tuple[Tensor, Tensor]:
        """The step -J^-1 r (or with J'), and the residual r - M step that it leaves, with M the operator of F."""
        if self.inner == len(self.jacobian.degenerate):
            step = -self.jacobian.solve(r, self.transposed)
        else:
            order = self._order(len(r))
            step = torch.empty_like(r).index_copy(0, order, -self.jacobian.solve(r[order], self.transposed))
        if self.rows is not None:
            exact = -torch.einsum("bij,kbj->kbi", self.pseudoinverse, r[self.rows])
            step = step.index_put((self.rows,), exact)
        left = r - F.operator(step)
        if self.rows is not None:
            reducible = torch.einsum("bij,kbj->kbi", self.onto_range, left[self.rows])
            left = left.index_put((self.rows,), reducible)
        return step, left


@dataclass(frozen=True, eq=False)
class Place:
    """Where a derivative is attached.

    Without smoothing, at the solution with the active set `alpha` `(B, m)`; with smoothing, at the point `near`
    `(B, N)`, which is close to the solution. `known` holds the Jacobian there, in the units of `scale` `(B, N)`.
    """

    alpha: Tensor
    near: Tensor
    scale: Tensor
    known: list[Jacobian]


@dataclass(frozen=True, kw_only=True)
class KKTAdjoint:
    """The exact derivative at the solution, from the optimality conditions, of any order and in both modes.

    Where an inequality binds with a zero multiplier, the derivative is that of the side on which it does not bind.
    Where multipliers are not unique, it is the one of least norm. Such samples have `Status.DEGENERATE`.

    With `smoothing` it is the derivative of a nearby point, on the central path of interior-point methods, where
    λ (h - Gz) = `smoothing` for every inequality. It also reflects inequalities that do not bind, and has no
    jumps, but it is not exact. The values stay those of the exact solution; z, the multipliers and the slack h -
    Gz get their derivatives from the nearby point.

    Args:
        smoothing: in units of the objective; 0: the exact derivative.
        rtol: relative tolerance of the linear solves; None means eps^(2/3) of the dtype.
        max_steps: maximal number of steps of their iterative refinement.

    Raises:
        TypeError, ValueError: for invalid options; ValueError from a solve whose dtype cannot reach `rtol`.
    """

    smoothing: float = 0.0
    rtol: float | None = None
    max_steps: int = 10

    def __post_init__(self):
        if not isinstance(self.smoothing, numbers.Real):
            raise TypeError(f"KKTAdjoint: smoothing must be a number, got a {type(self.smoothing).__name__}")
        if not 0 <= self.smoothing < float("inf"):
            raise ValueError(f"KKTAdjoint: smoothing must be a finite number >= 0, got {self.smoothing}")
        self._solver([])  # checks rtol and max_steps

    def check(self, dtype: torch.dtype) -> None:
        """Raise ValueError if `dtype` cannot reach rtol."""
        eps = torch.finfo(dtype).eps
        if self.rtol is not None and 0 < self.rtol < eps:
            raise ValueError(
                f"KKTAdjoint: {dtype} cannot reach rtol={self.rtol:g}; the smallest it can is {eps:.2g}. Loosen "
                "rtol, or pass a wider dtype"
            )

    def _solver(self, known: list[Jacobian]) -> StructuredSolver:
        return StructuredSolver(rtol=self.rtol, max_steps=self.max_steps, known=known)

    def attach(
        self,
        w: Tensor,
        place: Place,
        program: QuadraticProgram,
        on_failure: str,
        pullback: Callable[..., Found] | None = None,
        name: str = "qp",
    ) -> Tensor:
        """Attach the derivative to `w` = (z, ν, λ) `(B, N)`.

        `pullback` solves the linear systems of reverse mode, in place of `search`. `name` is the name of the entry
        point, in messages.
        """
        graphs = None if pullback is None else Graphs(search, pullback)
        how, report, scale = Backward(self._solver(place.known)), Report(on_failure, message=told), place.scale
        conditions = RELAXED if self.smoothing else ACTIVE_SET
        condition = Condition(
            partial(_bound, conditions),
            f"the relaxed {name}" if self.smoothing else name,
            w.dtype,
            report,
            graphs=graphs,
            pull=partial(_pull, conditions),
        )
        if not self.smoothing:
            return scale * attach(condition, w / scale, (scale, place.alpha, *program.tensors), how)
        kappa = torch.full((), self.smoothing, dtype=w.dtype, device=w.device)
        near = place.near.detach() / scale
        moved = attach(condition, near, (scale, kappa, *program.tensors), how)
        return w.detach() + scale * (moved - near)


def _bound(conditions: Conditions, scale: Tensor, *theta: Tensor) -> Map:
    """The residual of `conditions` in equilibrated units, in which the norms of its linear systems are meaningful.

    With D = diag(`scale`), the Jacobian D J D is symmetric where J is. It turns off autocast, under which a
    backward pass may run.
    """
    residual = conditions.bind(*theta)

    def scaled(w: Tensor) -> Tensor:
        with full_precision(w.device.type):
            return scale * residual(scale * w)

    return scaled


def _pull(conditions: Conditions, primals: tuple[Tensor, ...], wanted: list[int]) -> Pull:
    """What `pullback.recorded` would return for the residual of `_bound`, at `primals` (w, scale, own, ...)."""
    w, scale, *theta = primals
    pulled = conditions.pull(scale * w, *theta)

    def pull(u: Tensor, places: list[int]) -> tuple[Tensor, ...]:
        u = scale * u
        # After w come its scale and the conditions' own parameter, which need no derivative.
        return tuple(pulled(u, i - 2) if i else scale * pulled(u, 0) for i in places)

    return pull
