"""A strictly convex program with the multipliers of its inequalities as the only unknowns.

If Q is positive definite, z and ν follow from λ: with P the inverse of Q on the null space of A, and z0 the
solution without inequalities, z = z0 - P G'λ, and the slack is

    s = M λ + c,    M = G P G',  c = h - G z0,    λ >= 0, s >= 0, λs = 0,

a linear complementarity problem with one matrix `(m, m)`, which is computed once. A step of an interior-point
method then takes one Cholesky factorisation of M plus a diagonal, without any matrix product; so do the linear
systems of derivatives.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from implicitly.argmin.programs.program import Point, QuadraticProgram, dot, times, times_transposed
from implicitly.solution import Status, is_running
from implicitly.tree import row_norm

# The smallest pivot of Q, relative to its largest, for which its inverse is accurate enough.
LEAST_PIVOT = 1e-8
# The start ignores the distance of bounds beyond FAR, in units in which solutions have size one, or beyond FURTHER
# times the largest violation at the point without inequalities, if that is more.
FAR, FURTHER = 100.0, 3.0

Inner = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Condensed:
    """A program condensed to the multipliers of its inequalities.

    Its matrices are `(B, ·, ·)`, or without B where the batch shares them, and its vectors `(B, ·)`.

    With Q = L L', Y_A = L^-1 A' `(n, q)`, S the Cholesky factor of Y_A'Y_A, and X `(q, m)` with ν = ν0 - X λ,
    Y_G = L^-1 G' - Y_A X `(n, m)` is orthogonal to Y_A, and M = Y_G'Y_G; L^-T y0 and ν0 are the solution
    without inequalities, c its slack.
    """

    program: QuadraticProgram
    L: Tensor
    S: Tensor
    X: Tensor
    Y_A: Tensor
    Y_G: Tensor
    M: Tensor
    y0: Tensor
    nu0: Tensor
    c: Tensor

    @classmethod
    def of(cls, program: QuadraticProgram) -> Condensed | None:
        """Condense a program; None if Q, or A Q^-1 A', of any sample is not safely positive definite."""
        q = program.sizes[1]
        L = program.Q.clone(memory_format=torch.contiguous_format).mT  # symmetric; transposed for LAPACK's order
        info = torch.empty(L.shape[:-2], dtype=torch.int32, device=L.device)
        torch.linalg.cholesky_ex(L, out=(L, info))
        if not bool(_safe(L, info)):
            return None
        Y = torch.cat([program.A, program.G], dim=-2).mT
        torch.linalg.solve_triangular(L, Y, upper=False, out=Y)
        Y_A, Y_G = Y[..., :q], Y[..., q:]
        S, info = torch.linalg.cholesky_ex(Y_A.mT @ Y_A)
        if not bool(_safe(S, info)):
            return None
        X = torch.cholesky_inverse(S) @ (Y_A.mT @ Y_G)  # S is small
        if q:
            Y_G = torch.baddbmm(Y_G.mT, X.mT, Y_A.mT, alpha=-1).mT if Y.ndim == 3 else Y_G - Y_A @ X
        t = triangular(L, -program.p.unsqueeze(1))
        nu0 = _solve(S, times_transposed(Y_A, t) - program.b.unsqueeze(1)) if q else t[:, :, :0]
        y0 = t - times(Y_A, nu0)
        c = program.h - times(program.G, triangular(L, y0, transposed=True).squeeze(1))
        return cls(program, L, S, X, Y_A, Y_G, Y_G.mT @ Y_G, y0.squeeze(1), nu0.squeeze(1), c)

    def up_to(self, program: QuadraticProgram, kept: Tensor) -> Condensed:
        """Condense `program`, which is this one with only the inequalities that are `kept`, `(m,)` or `(B, m)`."""
        part = kept.to(self.c.dtype).unsqueeze(-2)
        X, Y_G, M = self.X * part, self.Y_G * part, self.M * part * part.mT
        return replace(self, program=program, X=X, Y_G=Y_G, M=M, c=torch.where(kept, self.c, 1.0))

    def point(self, lam: Tensor) -> Tensor:
        """(z, ν, λ) `(B, n + q + m)` with the z and ν that follow from λ `(B, m)`."""
        y = self.y0 - times(self.Y_G, lam)
        z = triangular(self.L, y.unsqueeze(1), transposed=True).squeeze(1)
        return torch.cat([z, self.nu0 - times(self.X, lam), lam], dim=1)

    def solve(self, r1: Tensor, r2: Tensor, inner: Inner | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Solve Qz + A'ν + G'v = r1, Az = r2 for z `(B, k, n)`, ν `(B, k, q)` and v `(B, k, m)`.

        `inner` maps the Gz of the solution with v = 0 to v; None: v = 0.
        """
        t = triangular(self.L, r1)
        nu = _solve(self.S, times_transposed(self.Y_A, t) - r2) if r2.shape[2] else r2
        y = t - times(self.Y_A, nu) if r2.shape[2] else t
        v = r1.new_zeros(*r1.shape[:2], self.X.shape[-1])
        if inner is not None:
            v = inner(times_transposed(self.Y_G, t) + times_transposed(self.X, r2))
            y, nu = y - times(self.Y_G, v), nu - times(self.X, v)
        return triangular(self.L, y, transposed=True), nu, v

    def factorise(self, alpha: Tensor, beta: Tensor) -> CondensedFactors:
        """The factors of the Jacobian with this `alpha` and `beta`, `(B, m)`."""
        on = alpha != 0
        diagonal = torch.where(on, -beta / alpha.masked_fill(~on, 1.0), 1.0)
        N, usable = factor_active(self.M, on.to(alpha.dtype), diagonal)
        return CondensedFactors(self, alpha, beta, N, usable)

    @functools.cached_property
    def sizes(self) -> tuple[Tensor, Tensor]:
        """The terms of the slacks without multipliers `(B, m)`, and the square roots of the diagonal of M."""
        reach = torch.maximum(self.program.h.abs(), self.c.abs())
        return reach, self.M.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors except those of the program."""
        return self.L, self.S, self.X, self.Y_A, self.Y_G, self.M, self.y0, self.nu0, self.c

    def take_rows(self, rows: Tensor) -> Condensed:
        """The condensed program of those samples."""
        *matrices, y0, nu0, c = self.tensors
        L, S, X, Y_A, Y_G, M = (t[rows] if t.ndim == 3 else t for t in matrices)
        return Condensed(self.program.take_rows(rows), L, S, X, Y_A, Y_G, M, y0[rows], nu0[rows], c[rows])


def factor_active(M: Tensor, on: Tensor, diagonal: Tensor) -> tuple[Tensor, Tensor]:
    """The N of `CondensedFactors`, for M plus a `diagonal`, and whether it exists `(B,)`.

    `on` `(B, m)` is 1 for the rows and columns of M that take part, else 0.
    """
    N = (M * on.unsqueeze(1)).mul_(on.unsqueeze(2)).mT  # symmetric; transposed for LAPACK's order
    N.diagonal(dim1=1, dim2=2).add_(diagonal)
    info = torch.empty(len(N), dtype=torch.int32, device=N.device)
    torch.linalg.cholesky_ex(N, upper=True, out=(N, info))
    return N, info == 0


def solve_active(N: Tensor, r: Tensor) -> Tensor:
    """Solve N'N x = r for x, with `r` `(B, m)` or `(B, k, m)`."""
    columns = r.unsqueeze(2) if r.ndim == 2 else r.mT
    first = torch.linalg.solve_triangular(N.mT, columns, upper=False)
    return torch.linalg.solve_triangular(N, first, upper=True).mT.reshape(r.shape)


def _safe(L: Tensor, info: Tensor) -> Tensor:
    """Whether all Cholesky factorisations succeeded with pivots of similar size, 0-d."""
    pivots = L.diagonal(dim1=-2, dim2=-1) ** 2
    if pivots.numel() == 0:
        return torch.ones((), dtype=torch.bool, device=L.device)
    return (info == 0).all() & (pivots.amin(-1) >= LEAST_PIVOT * pivots.amax(-1)).all()


def triangular(L: Tensor, r: Tensor, transposed: bool = False) -> Tensor:
    """Solve L x = r, or L'x = r, for x `(B, k, n)`, with L lower triangular, `(B, n, n)` or `(n, n)`."""
    matrix = L.mT if transposed else L
    columns = r.mT if L.ndim == 3 else r.flatten(0, 1).mT
    return torch.linalg.solve_triangular(matrix, columns, upper=transposed).mT.reshape(r.shape)


def _solve(L: Tensor, r: Tensor) -> Tensor:
    """Solve L L' x = r for x `(B, k, n)`."""
    return triangular(L, triangular(L, r), transposed=True)


@dataclass(frozen=True, eq=False)
class CondensedFactors:
    """The factorised Jacobian [Q A' G'; A 0 0; αG 0 β], where α is zero or has the sign of -β.

    N `(B, m, m)` is the Cholesky factor, N'N, of M - β/α in the rows and columns where α is not zero, and of the
    identity in the others. It is the upper factor, which LAPACK finds a little faster.
    """

    condensed: Condensed
    alpha: Tensor
    beta: Tensor
    N: Tensor
    usable: Tensor

    @property
    def program(self) -> QuadraticProgram:
        """The program whose Jacobian this is."""
        return self.condensed.program

    def solve(self, r: Tensor, transposed: bool = False) -> Tensor:
        """Solve J w = r, or J' w = r, for w, with k right-hand sides per sample: `r` `(B, k, n + q + m)`."""
        G = self.program.G
        r1, r2, r3 = r.split(self.program.sizes, dim=2)
        alpha, beta = self.alpha.unsqueeze(1), self.beta.unsqueeze(1)
        on = alpha != 0
        safe = torch.where(on, alpha, 1.0)
        fixed = torch.where(on, 0.0, r3 / torch.where(on, 1.0, beta))  # multipliers that need no linear system
        if not transposed:
            r1, r3 = r1 - times_transposed(G, fixed), r3 / safe
        z, nu, v = self.condensed.solve(r1, r2, lambda Gz: solve_active(self.N, torch.where(on, Gz - r3, 0.0)))
        if transposed:
            lam = torch.where(on, v / safe, fixed - times(G, z) / torch.where(on, 1.0, beta))
        else:
            lam = torch.where(on, v, fixed)
        return torch.cat([z, nu, lam], dim=2)

    def is_singular(self, beta: Tensor) -> Tensor:
        """Whether the Jacobian with the exact `beta` is singular, `(B,)`, as far as can be told.

        A pivot is the squared distance, in the metric of P, of a row of G from the span of the rows before it. It
        counts as zero below sqrt(eps) of the row's own squared norm, where cancellation has cost half of the
        digits.
        """
        pivots = self.N.diagonal(dim1=1, dim2=2) ** 2
        least = torch.finfo(beta.dtype).eps ** 0.5 * self.condensed.M.diagonal(dim1=-2, dim2=-1)
        return ((self.alpha != 0) & ~(pivots > least)).any(1)

    def take_rows(self, rows: Tensor) -> CondensedFactors:
        """The factors of those samples."""
        parts = (t[rows] for t in (self.alpha, self.beta, self.N, self.usable))
        return CondensedFactors(self.condensed.take_rows(rows), *parts)

    def with_rows(self, rows: Tensor, part: CondensedFactors) -> CondensedFactors:
        """These factors with `part` in place of those of some samples."""
        own, new = ((f.alpha, f.beta, f.N.mT, f.usable) for f in (self, part))  # N stays in column-major order
        alpha, beta, N, usable = (t.index_copy(0, rows, p) for t, p in zip(own, new))
        return CondensedFactors(self.condensed, alpha, beta, N.mT, usable)

    def without(self, bad: Tensor) -> CondensedFactors:
        """These factors, made harmless for `bad` samples `(B,)`: a solve maps zero to zero."""
        eye = torch.eye(self.N.shape[1], dtype=self.N.dtype, device=self.N.device)
        beta = torch.where(bad.unsqueeze(1), 1.0, self.beta)
        return replace(self, beta=beta, N=torch.where(bad[:, None, None], eye, self.N))


# ------------------------------------------------------------------------------------------ interior point


class State(NamedTuple):
    """The state of the steps below; the first four tensors are `(B, m)`, the others `(B,)`."""

    lam: Tensor
    s: Tensor
    binding: Tensor  # bool: which inequalities seem to bind, by the last step
    residual: Tensor  # s - M λ - c
    off: Tensor  # the relative size of the residual
    merit: Tensor  # the best relative residual and gap so far
    stale: Tensor
    status: Tensor
    steps: Tensor


@dataclass(frozen=True, eq=False)
class CondensedLoop:
    """Mehrotra's predictor-corrector steps on s = M λ + c.

    It keeps no best point: where these steps fail, those on the homogeneous embedding take over.
    """

    whole: Condensed  # of all samples; the tensors below are of those that are still running
    M: Tensor
    c: Tensor
    tolerance: float
    patience: int
    to_boundary: float

    @classmethod
    def of(cls, whole: Condensed, tolerance: float, patience: int, to_boundary: float) -> CondensedLoop:
        """The loop for a condensed program."""
        return cls(whole, whole.M, whole.c, tolerance, patience, to_boundary)

    def take_rows(self, rows: Tensor) -> CondensedLoop:
        """The loop for those samples."""
        return replace(self, M=self.M[rows] if self.M.ndim == 3 else self.M, c=self.c[rows])

    @functools.cached_property
    def work(self) -> tuple[Tensor, Tensor]:
        """Memory for a factor, in LAPACK's column-major order, and for whether the factorisation failed.

        No step needs the factor of the last, and allocating memory takes a quarter of the time of a factorisation.
        """
        batch, m = self.c.shape
        return self.c.new_empty(batch, m, m).mT, torch.empty(batch, dtype=torch.int32, device=self.c.device)

    def factor(self, diagonal: Tensor) -> tuple[Tensor, Tensor]:
        """The upper Cholesky factor of M + diagonal `(B, m, m)`, and its info; valid until the next call."""
        if torch.compiler.is_dynamo_compiling():  # the graph plans its own memory
            return torch.linalg.cholesky_ex(self.M + torch.diag_embed(diagonal), upper=True)
        N, info = self.work
        N.copy_(self.M.mT)
        N.diagonal(dim1=1, dim2=2).add_(diagonal)
        torch.linalg.cholesky_ex(N, upper=True, out=(N, info))
        return N, info

    def start(self, near: Point | None = None) -> State:
        """The start: weighted least squares as if M were diagonal, moved into the interior; or the point `near`.

        Least squares with all of M would not save any steps. The weight, between one and the size of M, was found
        by experiment.
        """
        if near is not None:
            return self.begun(near.w[:, near.w.shape[1] - near.slack.shape[1] :], near.slack)
        diagonal = self.M.diagonal(dim1=-2, dim2=-1).expand_as(self.c)
        weight = diagonal.mean(1, keepdim=True).clamp(min=1e-12) ** 0.25
        violated = (-self.c).amax(1, keepdim=True)
        beyond = (self.c - (FURTHER * violated).clamp(min=FAR)).clamp(min=0)
        lam = (beyond - self.c) * weight / (weight**2 + diagonal)
        return self.begun(inside(lam) / weight, inside(-lam) * weight + beyond)

    def begun(self, lam: Tensor, s: Tensor) -> State:
        """The state before the first step, judged."""
        residual = s - times(self.M, lam) - self.c
        off = row_norm(residual) / (1 + row_norm(self.c))
        count = torch.zeros_like(off, dtype=torch.int64)
        far = torch.full_like(off, float("inf"))
        return self.judged(0, State(lam, s, lam > s, residual, off, far, count, count - 1, count))

    def judged(self, k: int | Tensor, at: State) -> State:
        """The state `at` with what its residuals say about each sample that is still running."""
        gap, slope = dot(at.lam, at.s), dot(at.lam, self.c)
        curvature = gap - slope - dot(at.lam, at.residual)  # λ'Mλ
        merit = torch.maximum(at.off, gap / (1 + curvature + slope.abs()))
        stale = (at.stale + 1).masked_fill(merit < at.merit, 0)
        running = is_running(at.status)
        status = at.status.masked_fill(running & (stale > self.patience), int(Status.STAGNATED))
        return at._replace(
            merit=torch.minimum(merit, at.merit),
            stale=stale,
            status=status.masked_fill(running & (merit <= self.tolerance), int(Status.CONVERGED)),
            steps=at.steps.masked_fill(running, k),
        )

    def step(self, k: int | Tensor, at: State) -> State:
        """The state after a predictor step and a corrector step, whose centring the predictor determines."""
        lam, s, residual = at.lam, at.s, at.residual
        ratio, products = s / lam, s * lam
        N, info = self.factor(ratio)
        d = solve_active(N, residual - s)
        # The slacks change by e = -s (1 + d / λ).
        u = d / lam
        v = -1 - u
        length, gap, bent = _until(u, v), products.sum(1), d * s * v
        left = 1 + length * (length * (bent.sum(1) / gap) - 1)  # the share of the gap that the predictor leaves
        target = left**3 * gap / lam.shape[1]
        aim = (target.unsqueeze(1) - products - bent) / lam
        d = solve_active(N, residual + aim)
        e = torch.addcmul(aim, ratio, d, value=-1)
        u, v = d / lam, e / s
        going = is_running(at.status) & (info == 0)
        length = self.to_boundary * _until(u, v) * going
        column, going = length.unsqueeze(1), going.unsqueeze(1)
        moved = at._replace(
            lam=torch.where(going, torch.addcmul(lam, column, d), lam),  # d may be NaN, and so zero times d
            s=torch.where(going, torch.addcmul(s, column, e), s),
            binding=torch.where(going, u > v, at.binding),  # see `seem_binding`
            residual=torch.addcmul(residual, column, residual, value=-1),  # it shrinks linearly, as does its size
            off=torch.addcmul(at.off, length, at.off, value=-1),
        )
        return self.judged(k + 1, moved)

    def outcome(self, k: int | Tensor, at: State) -> Point:
        """The point of every sample; to be called on the loop of all samples."""
        status = torch.where(is_running(at.status), int(Status.MAX_STEPS), at.status)
        count = torch.as_tensor(k, dtype=torch.int64, device=status.device) + 1
        w = torch.cat([at.lam.new_zeros(len(at.lam), sum(self.whole.program.sizes[:2])), at.lam], 1)
        return Point(w, at.s, at.binding, status, at.steps, count, in_duals=True)


def inside(v: Tensor) -> Tensor:
    """`v` `(B, m)`, shifted along (1, ..., 1) where that is needed to make it positive."""
    if v.shape[1] == 0:
        return v
    least = v.amin(1, keepdim=True)
    # Positive, and not so small that the first step would be lost to rounding.
    return torch.where(least > 1e-8 * (1 + v.abs().amax(1, keepdim=True)), v, v + 1 - least)


def seem_binding(lam: Tensor, s: Tensor, d_lam: Tensor, d_s: Tensor) -> Tensor:
    """Which inequalities seem to bind after a step `(B, m)`: their slacks fall faster than their multipliers.

    This does not depend on units, and is right far more often than λ > s: El-Bakry, Tapia and Zhang, "A study of
    indicators for identifying zero variables in interior-point methods", SIAM Review 36 (1994).
    """
    return d_lam / lam > d_s / s


def step_length(lam: Tensor, s: Tensor, d_lam: Tensor, d_s: Tensor) -> Tensor:
    """The longest step `(B,)`, at most 1, that keeps λ and s positive."""
    return _until(d_lam / lam, d_s / s)


def _until(u: Tensor, v: Tensor) -> Tensor:
    """The longest step `(B,)`, at most 1, that keeps every relative change, `u` and `v` `(B, m)`, above -1."""
    steepest = torch.minimum(u.amin(1), v.amin(1))
    return steepest.neg().clamp(min=1.0).reciprocal().nan_to_num(0.0)
