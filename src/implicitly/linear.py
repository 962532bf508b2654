"""Linear solvers for M u = b, batched and matrix-free: what derivatives of implicit layers need.

Each solver here proposes iterates to the one loop of `iterate.py`. So each tests convergence per sample, reports a
status, keeps the best iterate and freezes finished samples. The transpose of a system is another system, whose
operator is the pullback of the first: see `transposed` in `implicit.py`.

Inside the loop the residual is r = b - M u, so that u + r is the step of the Neumann series.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from implicitly.checks import POSITIVE, POSITIVE_OR_INFINITE, check_count, check_number
from implicitly.history import add_combined, empty_slots, filled, products, with_room, write, write_result
from implicitly.host import maybe_any, on_host
from implicitly.iterate import Affine, Proposal, Solver, where_rows
from implicitly.pullback import at_once
from implicitly.tree import row_norm


@dataclass(frozen=True, kw_only=True)
class LinearSolver(Solver):
    """A solver that needs the operator M itself, not only residuals."""

    linear: ClassVar[bool] = True
    recurrent: ClassVar[bool] = True


def check_linear_solver(solver: Any) -> None:
    """Raise TypeError for a `solver` that cannot solve linear systems."""
    if not isinstance(solver, Solver):
        raise TypeError(f"linear_solver must be a solver such as im.GMRES(), got {solver!r}")
    if solver.needs is not None:
        raise TypeError(
            f"{type(solver).__name__} minimises, and a linear system has nothing to minimise: pass im.GMRES(), "
            "im.BiCGStab(), im.CG(), im.Neumann(), im.DenseLU(), or a solver of fixed points, as linear_solver"
        )


@dataclass(frozen=True)
class GMRES(LinearSolver):
    """Restarted GMRES, matrix-free, with one product with M per step.

    It minimises the residual over the Krylov space by means of an orthogonal basis `W` of the space's image under
    M. This updates iterate and residual at every step, without a Hessenberg matrix. The space grows by the last
    residual while that shrinks well, else by the last image: Jiránek and Rozložník, "Adaptive version of simpler
    GMRES", Numerical Algorithms 53 (2010). This choice gives their bound on the conditioning of the basis.

    Args:
        restart: dimension of the Krylov space at which it is started anew; memory is `2 * restart` states.

    `rtol`, `atol` and `max_steps` are described in `implicitly.iterate.Solver`.
    """

    restart: int = 20

    history_slots: ClassVar[int] = 2

    def __post_init__(self):
        super().__post_init__()
        check_count("GMRES", "restart", self.restart)

    def start(self, F: Affine, z: Tensor, r: Tensor) -> tuple[Tensor, ...]:
        """The basis of the image and its preimages `(B, m, n)`, 1 / |w| of the basis `(B, m)`, the last image,
        the last residual norm, and the size of M."""
        slots = self._slots(z)
        inverses = z.new_zeros(z.shape[0], slots)
        none = torch.zeros_like(r[:, 0])
        return *empty_slots(z, slots), inverses, torch.zeros_like(z), none, none + 1

    def propose(self, F: Affine, k: int | Tensor, z: Tensor, r: Tensor, memory: Any) -> Proposal:
        """The minimiser of the residual over a space one dimension larger."""
        W, P, inverses, last, last_norm, size = memory
        slots = self._slots(z)
        slot = k % slots
        norm = row_norm(r)
        v, lengths = r, norm
        if isinstance(slot, Tensor) or slot > 0:
            slow = norm > 0.9 * last_norm
            if isinstance(slot, Tensor):
                slow = slow & (slot > 0)
            if maybe_any(slow):
                v, lengths = where_rows(slow, last, r), torch.where(slow, row_norm(last), norm)
        v = v / _nonzero(lengths * size)
        image = F.operator(v)
        if (isinstance(k, Tensor) or k == 0) and z.shape[1]:
            image, v, size = _measured(k, image, v, size)
        W_k, P_k, weights = filled(W, slot), filled(P, slot), filled(inverses, slot)
        if isinstance(slot, Tensor):
            weights = weights * (torch.arange(W.shape[1], device=z.device) < slot).to(z.dtype)
        W, P = with_room(W, slot, slots), with_room(P, slot, slots)
        W, w, coefficients, length, full = _orthogonalised(image, W_k, weights, W, slot)
        P, p = write_result(P, slot, partial(add_combined, alpha=-1), v, coefficients, P_k)
        # If the new image lies in the space already spanned while a residual remains, M is singular there. With a
        # fixed number of steps, the residual that remains may be mere rounding of products of n numbers at the
        # solution.
        least = 10 * torch.finfo(z.dtype).eps
        spanned = length <= full * least
        singular = spanned
        if maybe_any(spanned):
            singular = spanned & (norm > row_norm(F.b) * (least * z.shape[1] ** 0.5))
        inverse = (1 / (length + spanned)).masked_fill(spanned, 0.0)
        inverses = write(inverses, slot, inverse)
        inverse = inverse[:, None]
        column = products(r, w.unsqueeze(1)) * inverse * inverse
        z, r = torch.addcmul(z, column, p), torch.addcmul(r, column, w, value=-1)
        return Proposal(z, (W, P, inverses, w, norm, size), r, 1, singular)

    def _slots(self, z: Tensor) -> int:
        # A space of all n dimensions contains the answer; a new one takes care of what rounding left.
        return min(self.restart, self.max_steps, max(z.shape[1], 1))


def _orthogonalised(
    x: Tensor, basis: Tensor, weights: Tensor, buffer: Tensor, slot: int | Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Orthogonalise `x` against the rows of `basis` `(B, m, n)` and write the result into `buffer` at `slot`.

    Returns (buffer, the result, coefficients `(B, m)`, the norm of the result, |x|). `weights` `(B, m)` are
    1 / |row|: rows are orthogonal but not normalised, which saves writing each one again. The weights are not
    squared beforehand because their squares would overflow.
    """
    take_away = partial(add_combined, alpha=-1)
    full = row_norm(x)
    coefficients = products(x, basis) * weights * weights
    buffer, left = write_result(buffer, slot, take_away, x, coefficients, basis)
    length = row_norm(left)
    # Orthogonalising twice is enough, and once where little was taken away (Daniel, Gragg, Kaufman and Stewart
    # 1976).
    if basis.shape[1] and (not on_host(length) or maybe_any(length < 0.7 * full)):
        again = products(left, basis) * weights * weights
        buffer, left = write_result(buffer, slot, take_away, left, again, basis)
        coefficients, length = coefficients + again, row_norm(left)
    return buffer, left, coefficients, length, full


def _measured(k: int | Tensor, image: Tensor, v: Tensor, size: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scale `image` and `v` where products of images would leave the range of the dtype.

    Both are divided by the largest entry of the first image where that entry is so large, or so small; it becomes
    the `size` `(B,)` of M.
    """
    largest = torch.linalg.vector_norm(image.detach(), math.inf, dim=1)
    far = torch.finfo(image.dtype).max ** 0.25
    extreme = ((largest > far) | (largest < 1 / far)) & (largest > 0) & (k == 0)
    if not maybe_any(extreme):
        return image, v, size
    factor = torch.where(extreme, largest, 1.0)
    column = factor.unsqueeze(1)
    return image / column, v / column, size * factor


def _nonzero(norm: Tensor) -> Tensor:
    """The norm as a column to divide by; dividing leaves a vector of norm 0 as it is."""
    return norm.clamp(min=torch.finfo(norm.dtype).tiny).unsqueeze(1)


@dataclass(frozen=True)
class CG(LinearSolver):
    """Conjugate gradients for symmetric positive definite M (Hestenes and Stiefel 1952).

    Where it finds M not positive definite, the sample ends as `Status.SINGULAR`.
    `rtol`, `atol` and `max_steps` are described in `implicitly.iterate.Solver`.
    """

    def start(self, F: Affine, z: Tensor, r: Tensor) -> tuple[Tensor, ...]:
        """The search direction."""
        return (r.clone(),)

    def propose(self, F: Affine, k: int | Tensor, z: Tensor, r: Tensor, memory: Any) -> Proposal:
        """The minimiser along a direction that is conjugate to the last one."""
        (p,) = memory
        image = F.operator(p)
        rr, curvature = torch.linalg.vecdot(r, r), torch.linalg.vecdot(p, image)
        # Without positive curvature M is not positive definite and the recurrence is meaningless, unless (with a
        # fixed number of steps) nothing is left to solve.
        singular = (curvature <= 0) & (rr > torch.finfo(r.dtype).tiny)
        step = (rr / torch.where(curvature <= 0, 1.0, curvature))[:, None]
        z, r = torch.addcmul(z, step, p), torch.addcmul(r, step, image, value=-1)
        p = torch.addcmul(r, _ratio(torch.linalg.vecdot(r, r), rr), p)
        return Proposal(z, (p,), r, 1, singular)


@dataclass(frozen=True)
class BiCGStab(LinearSolver):
    """BiCGStab: two products with M per step and a memory of five states (van der Vorst 1992).

    `rtol`, `atol` and `max_steps` are described in `implicitly.iterate.Solver`.
    """

    def start(self, F: Affine, z: Tensor, r: Tensor) -> tuple[Tensor, ...]:
        """The shadow residual, the search direction, and the inner product of both."""
        return r.clone(), r.clone(), torch.linalg.vecdot(r, r)

    def propose(self, F: Affine, k: int | Tensor, z: Tensor, r: Tensor, memory: Any) -> Proposal:
        """A BiCG step, then a step along its residual that minimises the residual."""
        shadow, p, rho = memory
        v = F.operator(p)
        denominator = torch.linalg.vecdot(shadow, v)
        alpha = _ratio(rho, denominator)
        s = torch.addcmul(r, alpha, v, value=-1)
        t = F.operator(s)
        omega = _ratio(torch.linalg.vecdot(t, s), torch.linalg.vecdot(t, t))
        z = torch.addcmul(torch.addcmul(z, alpha, p), omega, s)
        r = torch.addcmul(s, omega, t, value=-1)
        rho_next = torch.linalg.vecdot(shadow, r)
        beta = _ratio(rho_next, rho) * _ratio(alpha[:, 0], omega[:, 0])
        p_next = torch.addcmul(r, beta, torch.addcmul(p, omega, v, value=-1))
        # Where the shadow residual has become orthogonal to everything, restart from the current residual.
        stuck = rho_next.abs() <= torch.finfo(z.dtype).eps * row_norm(shadow) * row_norm(r)
        stuck = (stuck | (denominator == 0) | (omega[:, 0] == 0))[:, None]
        shadow, p = torch.where(stuck, r, shadow), torch.where(stuck, r, p_next)
        rho = torch.where(stuck[:, 0], torch.linalg.vecdot(r, r), rho_next)
        return Proposal(z, (shadow, p, rho), r, 2)


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """The ratio a / b as a column, 0 where b is 0; its derivatives are finite there, too, for unrolling."""
    zero = b == 0
    return torch.where(zero, 0.0, a / torch.where(zero, 1.0, b))[:, None]


@dataclass(frozen=True)
class Neumann(LinearSolver):
    """The Neumann series u <- u + damping * (b - M u); it converges where |1 - damping * eig(M)| < 1.

    With `rtol=0` it is the series truncated after exactly `max_steps` terms.
    `rtol`, `atol` and `max_steps` are described in `implicitly.iterate.Solver`.

    Args:
        damping: a positive number; 1 is the plain series.
    """

    recurrent: ClassVar[bool] = False
    damping: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        check_number("Neumann", "damping", self.damping, POSITIVE)

    def start(self, F: Affine, z: Tensor, r: Tensor) -> tuple[Tensor, ...]:
        """An empty memory."""
        return ()

    def propose(self, F: Affine, k: int | Tensor, z: Tensor, r: Tensor, memory: Any) -> Proposal:
        """The sum of the series with one more term."""
        return Proposal(torch.add(z, r, alpha=self.damping))


@dataclass(frozen=True)
class DenseLU(LinearSolver):
    """Batched dense LU: n products form the matrix, one factorisation solves, and further steps refine.

    Meant for small n. Raises ValueError where the matrices would take more than `limit_gib` GiB.
    `rtol`, `atol` and `max_steps` are described in `implicitly.iterate.Solver`.
    """

    recurrent: ClassVar[bool] = False
    limit_gib: float = 4.0
    max_steps: int = 5

    def __post_init__(self):
        super().__post_init__()
        check_number("DenseLU", "limit_gib", self.limit_gib, POSITIVE_OR_INFINITE)

    def start(self, F: Affine, z: Tensor, r: Tensor) -> tuple[Tensor, ...]:
        """The LU factors, the pivots, and which samples are singular."""
        matrix = dense(F.operator, z, self.limit_gib)
        lu, pivots, info = torch.linalg.lu_factor_ex(matrix)
        # A pivot counts as zero, up to rounding, if it is tiny compared with the terms that it is the sum of: the
        # diagonal of |L| |U|. Compared with other pivots it may be small only because of the units.
        pivot_sizes, size = lu.diagonal(dim1=-2, dim2=-1).abs(), lu.abs()
        terms = pivot_sizes + (size.tril(-1) * size.triu(1).mT).sum(2)
        singular = (info != 0) | (pivot_sizes <= z.shape[1] * torch.finfo(z.dtype).eps * terms).any(1)
        return lu, pivots, singular

    def propose(self, F: Affine, k: int | Tensor, z: Tensor, r: Tensor, memory: Any) -> Proposal:
        """The solution; in further steps, a correction for the residual that rounding left."""
        lu, pivots, singular = memory
        step = torch.linalg.lu_solve(lu, pivots, r.unsqueeze(2))[:, :, 0]
        z = z + torch.where(singular[:, None], 0.0, step)
        return Proposal(z, memory, singular=singular)


def dense(operator: Callable[[Tensor], Tensor], like: Tensor, limit_gib: float) -> Tensor:
    """The matrices `(B, n, n)` of a linear map on `(B, n)` whose samples are independent, from n products at once.

    Raises ValueError where the matrices would take more than `limit_gib` GiB.
    """
    batch, n = like.shape
    size_gib = batch * n * n * like.element_size() / 2**30
    if size_gib > limit_gib:
        raise ValueError(
            f"{batch} dense {n} x {n} matrices take {size_gib:.1f} GiB (limit {limit_gib:g} GiB); use a "
            "matrix-free solver: NewtonKrylov, Anderson or Broyden to solve, GMRES or BiCGStab for linear "
            "systems"
        )
    eye = torch.eye(n, dtype=like.dtype, device=like.device)
    columns = at_once(operator, eye.unsqueeze(1).expand(n, batch, n))
    return columns.permute(1, 2, 0)
