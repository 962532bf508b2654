"""The derivative of a quadratic program, from the condition at its solution and the factors found there."""

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
from implicitly.condition import Condition, Graphs, Map, Report
from implicitly.host import maybe_any
from implicitly.implicit import Backward, attach, search
from implicitly.iterate import Found, Proposal
from implicitly.linear import Affine, DenseLU, LinearSolver
from implicitly.pullback import Pull
from implicitly.transforms import full_precision
from implicitly.tree import row_norm

# What a step with the inverse of the right matrix leaves of a residual, at most; and what tells it from another.
CLOSE_ENOUGH = 0.5
PLAIN = 1e-3
# A refinement that leaves more is one with another matrix.
CREEP = 0.05


@dataclass(frozen=True, eq=False)
class Jacobian:
    """The factorised Jacobian of an optimality condition at a point, in equilibrated units.

    Attributes:
        factors: their beta is kept away from zero, so a solve leaves a small residual.
        program: the scaled one.
        alpha, beta: `(B, m)` of the Jacobian, exact.
        degenerate: `(B,)` bool, where it is singular, as far as can be told in floating point.
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
    """The Jacobian J of an optimality condition, factorised; `Jacobian` is one."""

    @property
    def degenerate(self) -> Tensor:
        """`(B,)`, where it is singular, in a way that matters."""
        ...

    def solve(self, r: Tensor, transposed: bool = False) -> Tensor:
        """w with J w ≈ r, or J' w ≈ r, for `r` `(k * B, N)` of which row i belongs to sample i % B."""
        ...

    def dense(self, rows: Tensor) -> Tensor:
        """The matrices `(len(rows), N, N)` of some samples."""
        ...


@dataclass(frozen=True, eq=False)
class StructuredSolver(LinearSolver):
    """Solves the linear systems of derivatives by the factors that the solution left: one step, and refinement.

    `known` receives the `Linearised` condition once the solution is found. Systems that are neither it nor its
    transpose, as a first step, or else a test vector, tells, are solved by dense LU. A first step may tell wrong,
    as a right-hand side may be one that the two hardly differ on: steps that bring little say so. At degenerate
    samples the answer is that of least squares and, of all of them, the one of minimal norm; what no answer can
    reduce does not count as residual.
    """

    recurrent: ClassVar[bool] = False
    max_steps: int = 10
    known: Sequence[Linearised] = field(default_factory=list)

    def start(self, F: Affine, z: Tensor, r: Tensor) -> tuple[Any, ...]:
        """The inverse to apply; where the first step by it is all that tells so, also what is enough, and that."""
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
        """The solution; once more for the residual that rounding, and the factors, left."""
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
    """An approximate inverse of -J or -J', for k right-hand sides a sample.

    Rows are (V, k, `inner`), with V * `inner` samples: which samples `vmap` maps outside of the right-hand sides,
    and which are inside.
    """

    jacobian: Linearised
    transposed: bool
    inner: int
    # Of samples where J is singular, or nearly: their rows, the pseudoinverse, and the projection on the range.
    rows: Tensor | None
    pseudoinverse: Tensor
    onto_range: Tensor

    @classmethod
    def recognised(cls, jacobian: Linearised, F: Affine, r: Tensor) -> _Inverse | None:
        """The inverse for the system of `F`, which a vector without meaning tells; None where it is not of J."""
        batch = len(jacobian.degenerate)
        if len(r) % batch:
            return None
        wave = torch.cos(torch.arange(1.0, r.numel() + 1, dtype=r.dtype, device=r.device) ** 2).reshape(r.shape)
        inners = [batch] if len(r) == batch else [n for n in range(batch, 0, -1) if batch % n == 0]
        best, found, left = (len(r) + 1, 0.0), None, wave
        for inner, transposed in itertools.product(inners, (True, False)):
            inverse = cls.of(jacobian, transposed, inner, len(r))
            remains = row_norm(inverse(F, wave)[1]) / row_norm(wave)
            # Under a wrong order of the rows some may still be right.
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
        # Ill-conditioned samples, for which the factors are too rough.
        chosen = stubborn[found._order(len(r))].reshape(-1, batch).any(0)
        return cls.of(jacobian, found.transposed, found.inner, len(r), chosen)

    @classmethod
    def of(
        cls, jacobian: Linearised, transposed: bool, inner: int, count: int, stubborn: Tensor | None = None
    ) -> _Inverse:
        """For `count` rows; samples that are `stubborn` `(B,)` are solved by their dense matrices."""
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
        """The `count` rows in the order (k, V, inner)."""
        batch = len(self.jacobian.degenerate)
        index = torch.arange(count, device=self.jacobian.degenerate.device)
        return index.reshape(batch // self.inner, -1, self.inner).transpose(0, 1).reshape(-1)

    def __call__(self, F: Affine, r: Tensor) -> tuple[Tensor, Tensor]:
        """The step -J^-1 r, and the residual that it leaves; F maps a step to r of a zero step less its image."""
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
    """Where a derivative is attached: which inequalities bind, `alpha` `(B, m)`; or, with smoothing, the point
    `near` `(B, N)` the solution. `known` holds the Jacobian there, in the units of `scale` `(B, N)`."""

    alpha: Tensor
    near: Tensor
    scale: Tensor
    known: list[Jacobian]


@dataclass(frozen=True, kw_only=True)
class KKTAdjoint:
    """The exact derivative at the solution, from the optimality conditions: any order, both modes.

    Where an inequality binds with a zero multiplier, the derivative is that of the side on which it does not bind.
    Where multipliers are not unique, it is that of least norm. Such samples have `Status.DEGENERATE`.

    With `smoothing` it is the derivative of another point: that where λ (h - Gz) = `smoothing` for every
    inequality, on the central path of interior-point methods. It tells of inequalities that do not bind, and has
    no jumps, but is not exact. The solution itself stays exact, and its slack is h - Gz in value and derivative:
    of the exact z, with the derivative of the other.

    Args:
        smoothing: in units of the objective; 0: the exact derivative.
        rtol: relative tolerance of the linear solves; None means eps^(2/3) of the dtype.
        max_steps: of their iterative refinement.
    """

    smoothing: float = 0.0
    rtol: float | None = None
    max_steps: int = 10

    def __post_init__(self):
        if not isinstance(self.smoothing, numbers.Real):
            raise TypeError(f"KKTAdjoint: smoothing must be a number, got a {type(self.smoothing).__name__}")
        if not 0 <= self.smoothing < float("inf"):
            raise ValueError(f"KKTAdjoint: smoothing must be a finite number >= 0, got {self.smoothing}")
        self._solver([])  # its own checks

    def check(self, dtype: torch.dtype) -> None:
        """Raise ValueError where `dtype` cannot reach rtol."""
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
        """`w` = (z, ν, λ) `(B, N)` with its derivative; `pullback` solves in place of `search` what reverse mode
        asks for. `name` is that of the entry point, in messages."""
        graphs = None if pullback is None else Graphs(search, pullback)
        how, report, scale = Backward(self._solver(place.known)), Report(on_failure), place.scale
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
    """The residual of `conditions` in equilibrated units, in which the norm of its linear systems means something.

    The Jacobian D J D with D = diag(`scale`) is symmetric where J is. A backward pass may run under autocast.
    """
    residual = conditions.bind(*theta)

    def scaled(w: Tensor) -> Tensor:
        with full_precision(w.device.type):
            return scale * residual(scale * w)

    return scaled


def _pull(conditions: Conditions, primals: tuple[Tensor, ...], wanted: list[int]) -> Pull:
    """What `pullback.recorded` gives of the residual that is `_bound`, at `primals` (w, scale, own, ...)."""
    w, scale, *theta = primals
    pulled = conditions.pull(scale * w, *theta)

    def pull(u: Tensor, places: list[int]) -> tuple[Tensor, ...]:
        u = scale * u
        # Behind w come its scale and what is the conditions' own, which are known without a derivative.
        return tuple(pulled(u, i - 2) if i else scale * pulled(u, 0) for i in places)

    return pull
