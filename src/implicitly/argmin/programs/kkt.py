"""The optimality conditions of a quadratic program, their structured linear systems, and their derivative.

At the solution some inequalities bind and the others do not, and for nearby programs it is the same ones. So the
solution (z, ν, λ) satisfies

    Qz + p + G'λ + A'ν = 0,     Az - b = 0,     α (Gz - h) + (1 - α) λ = 0

with α = 1 where the inequality binds, else 0 (`ACTIVE_SET`). Wherever the solution has a derivative, of any order,
this condition gives it. Its Jacobian

    [ Q   A'  G' ]
    [ A   0   0  ]
    [ αG  0   β  ],     β = 1 - α,

has a structure that it shares with the Newton steps of interior-point methods and with the relaxed complementarity
λ (h - Gz) = κ (`RELAXED`, with α = λ and β = Gz - h). So one class, `Factors`, solves the linear systems of all of
these, and the transposed ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from implicitly.argmin.programs.program import QuadraticProgram, times, times_transposed
from implicitly.condition import Map
from implicitly.host import maybe_any, on_host
from implicitly.tree import row_norm

# The products of the columns of a matrix that all samples share are formed if they fit into so many numbers, and
# if there are so many times more samples than columns. Otherwise one product for each sample takes less time.
SHARED_GRAM_LIMIT, SHARED_GRAM_SAMPLES = 2**20, 2


@dataclass(frozen=True)
class Conditions:
    """Optimality conditions for w = (z, ν, λ), whose last m rows have a derivative of the form [αG 0 β].

    Attributes:
        last: `last(own, program, z, λ)` returns those rows, `(B, m)`.
        coefficients: `coefficients(own, program, z, λ)` returns α and β there, `(B, m)`.
    """

    last: Callable[[Tensor, QuadraticProgram, Tensor, Tensor], Tensor]
    coefficients: Callable[[Tensor, QuadraticProgram, Tensor, Tensor], tuple[Tensor, Tensor]]

    def bind(self, own: Tensor, *tensors: Tensor) -> Map:
        """The residual `(B, n + q + m)` of a program as a function of w."""
        program = QuadraticProgram(*tensors)

        def residual(w: Tensor) -> Tensor:
            z, nu, lam = w.split(program.sizes, dim=1)
            slope = times(program.Q, z) + program.p + times_transposed(program.G, lam)
            upper = [slope + times_transposed(program.A, nu), times(program.A, z) - program.b]
            return torch.cat([*upper, self.last(own, program, z, lam)], dim=1)

        return residual

    def pull(self, w: Tensor, own: Tensor, *tensors: Tensor) -> Callable[[Tensor, int], Tensor]:
        """The vector-Jacobian product of the residual at w, as a function of the cotangent and a place.

        Place 0 is with respect to w, places 1 to 6 with respect to the tensors of the program. Autograd finds the
        same, but more slowly: it transposes matrices, and adds them to others that it does not transpose.
        """
        program = QuadraticProgram(*tensors)
        z, nu, lam = w.split(program.sizes, dim=1)
        alpha, beta = self.coefficients(own, program, z, lam)

        def pulled(u: Tensor, place: int) -> Tensor:
            if place == 0:
                return jacobian_product(program, alpha, beta, u.unsqueeze(1), transposed=True).squeeze(1)
            first, second, third = u.split(program.sizes, dim=1)
            last = alpha * third
            if place in (1, 3, 5):
                pairs = {1: [(first, z)], 3: [(lam, first), (last, z)], 5: [(nu, first), (second, z)]}[place]
                return _outer(pairs, shared=tensors[place - 1].ndim == 2)
            each = {2: first, 4: -last, 6: -second}[place]
            return each.sum(0) if tensors[place - 1].ndim == 1 else each

        return pulled


# Inequalities bind where `own` `(B, m)` is 1, and do not where it is 0.
ACTIVE_SET = Conditions(
    lambda alpha, program, z, lam: alpha * (times(program.G, z) - program.h) + (1 - alpha) * lam,
    lambda alpha, program, z, lam: (alpha, 1 - alpha),
)
# The relaxed complementarity λ (h - Gz) = `own`, 0-d.
RELAXED = Conditions(
    lambda kappa, program, z, lam: lam * (times(program.G, z) - program.h) + kappa,
    lambda kappa, program, z, lam: (lam, times(program.G, z) - program.h),
)


def _outer(pairs: list[tuple[Tensor, Tensor]], shared: bool) -> Tensor:
    """The sum of x y' over pairs of vectors `(B, ·)`, for each sample, or summed over the batch if `shared`."""
    (x, y), *others = pairs
    if shared:
        return sum((x.mT @ y for x, y in others), start=x.mT @ y)
    product = x.unsqueeze(2) * y.unsqueeze(1)
    for x, y in others:
        product.addcmul_(x.unsqueeze(2), y.unsqueeze(1))
    return product


# ------------------------------------------------------------------------------------------ linear systems


@dataclass(frozen=True, eq=False)
class Factors:
    """The factorised Jacobian [Q A' G'; A 0 0; αG 0 β] of a program, `alpha` and `beta` `(B, m)`.

    Eliminating λ = (r3 - αGz) / β leaves [H A'; A 0] with H = Q - G'(α/β)G. Then c A'A is added to H, and c A'
    times the second row to the right-hand side: this does not change the solution, and makes H positive definite
    wherever the Jacobian is nonsingular. H is then factorised, and S = A H^-1 A'. Small multiples of the identity
    on both make this a proximal step where the Jacobian is singular.

    L is the Cholesky factor of H `(B, n, n)`, V = H^-1 A' `(B, n, q)`, S that of A V `(B, q, q)`.
    """

    program: QuadraticProgram
    alpha: Tensor
    beta: Tensor
    L: Tensor
    V: Tensor
    S: Tensor
    usable: Tensor  # (B,) whether H was positive definite

    @classmethod
    def of(cls, program: QuadraticProgram, base: Tensor, alpha: Tensor, beta: Tensor) -> Factors:
        """Factorise the Jacobian with this `alpha` and `beta`; `base` is the program's `base_matrix`."""
        L, info = _factor(plus_gram(base, program.G, -alpha / beta))
        V = program.A.mT.expand(len(L), -1, -1)
        if not V.shape[2]:
            return cls(program, alpha, beta, L, V, V.mT[:, :, :0], info == 0)
        V = torch.cholesky_solve(V, L)
        S = program.A @ V
        S.diagonal(dim1=1, dim2=2).add_(proximal(S.dtype))
        S, info_S = torch.linalg.cholesky_ex(S)
        return cls(program, alpha, beta, L, V, S, (info == 0) & (info_S == 0))

    def solve(self, r: Tensor, transposed: bool = False) -> Tensor:
        """Solve J w = r, or J' w = r, for w, with k right-hand sides per sample: `r` `(B, k, n + q + m)`."""
        G, A = self.program.G, self.program.A
        r1, r2, r3 = r.split(self.program.sizes, dim=2)
        alpha, beta = self.alpha.unsqueeze(1), self.beta.unsqueeze(1)
        d = r3 / beta
        t = r1 - times_transposed(G, d * alpha if transposed else d)
        if r2.shape[2]:
            t = t + times_transposed(A, r2)
        z = torch.cholesky_solve(t.mT, self.L)
        if r2.shape[2]:
            nu = torch.cholesky_solve(A @ z - r2.mT, self.S)
            z, nu = (z - self.V @ nu).mT, nu.mT
        else:
            z, nu = z.mT, r2
        Gz = times(G, z)
        lam = (r3 - (Gz if transposed else alpha * Gz)) / beta
        return torch.cat([z, nu, lam], dim=2)

    def is_singular(self, beta: Tensor) -> Tensor:
        """Whether the Jacobian with the exact `beta` is singular, `(B,)`, as far as can be told.

        The regularised inverse is applied to an arbitrary vector. If the Jacobian is singular, a residual remains
        that no combination of its columns gives, and it stays when the inverse is applied again. Otherwise next to
        nothing remains.
        """
        width = sum(self.program.sizes)
        g = torch.cos(torch.arange(1.0, width + 1, dtype=beta.dtype, device=beta.device) ** 2)
        g = g.expand(len(beta), 1, width)
        left = self._left(g, beta)
        singular = ~left.isfinite().all(2)[:, 0]
        # 5e-7 in float64, 2e-3 in float32: far above rounding, far below what a singular system leaves.
        doubtful = ~(row_norm(left[:, 0]) <= torch.finfo(beta.dtype).eps ** 0.4 * row_norm(g[:, 0]))
        if maybe_any(doubtful):  # for two equal rows, the entries of the vector may be nearly equal, too
            rows = doubtful.nonzero()[:, 0]
            part, beta = self.take_rows(rows), beta[rows]
            before = part._left(left[rows], beta)
            after = part._left(before, beta)
            singular = singular.index_copy(0, rows, ~(row_norm(after[:, 0]) <= 0.25 * row_norm(before[:, 0])))
        return singular

    def _left(self, g: Tensor, beta: Tensor) -> Tensor:
        """The residual of the transposed solve for `g` `(B, k, n + q + m)`, with the exact `beta`."""
        u = self.solve(g, transposed=True)
        return g - jacobian_product(self.program, self.alpha, beta, u, transposed=True)

    def without(self, bad: Tensor) -> Factors:
        """These factors, made harmless for `bad` samples `(B,)`: a solve maps zero to zero."""
        column = bad[:, None, None]
        eye = [torch.eye(t.shape[1], dtype=t.dtype, device=t.device) for t in (self.L, self.S)]
        L, S = (torch.where(column, e, t) for e, t in zip(eye, (self.L, self.S)))
        V = torch.where(column, 0.0, self.V)
        return replace(self, beta=torch.where(bad[:, None], 1.0, self.beta), L=L, V=V, S=S)

    def take_rows(self, rows: Tensor) -> Factors:
        """The factors of those samples."""
        parts = (t[rows] for t in (self.alpha, self.beta, self.L, self.V, self.S, self.usable))
        return Factors(self.program.take_rows(rows), *parts)

    def with_rows(self, rows: Tensor, part: Factors) -> Factors:
        """These factors with `part` in place of those of some samples."""
        # Matrices are column-major in memory, and stay so.
        own, new = ((f.alpha, f.beta, f.L.mT, f.V.mT, f.S.mT, f.usable) for f in (self, part))
        alpha, beta, L, V, S, usable = (t.index_copy(0, rows, p) for t, p in zip(own, new))
        return Factors(self.program, alpha, beta, L.mT, V.mT, S.mT, usable)


def jacobian_product(
    program: QuadraticProgram, alpha: Tensor, beta: Tensor, w: Tensor, transposed: bool = False
) -> Tensor:
    """[Q A' G'; A 0 0; αG 0 β] w, or its transpose, for `w` `(B, k, n + q + m)`; `alpha` and `beta` `(B, m)`."""
    G, A, alpha = program.G, program.A, alpha.unsqueeze(1)
    z, nu, lam = w.split(program.sizes, dim=2)
    Gz = times(G, z) if transposed else alpha * times(G, z)
    upper = times(program.Q, z) + times_transposed(G, alpha * lam if transposed else lam)
    return torch.cat([upper + times_transposed(A, nu), times(A, z), Gz + beta.unsqueeze(1) * lam], dim=2)


def proximal(dtype: torch.dtype) -> float:
    """The multiple of the identity that regularises an equilibrated system: 1e-10 in float64, 4e-5 in float32."""
    return torch.finfo(dtype).eps ** 0.64


def base_matrix(program: QuadraticProgram) -> Tensor:
    """The part of H that does not depend on α and β: Q + A'A, plus a small multiple of the identity."""
    Q, A = program.Q, program.A
    base = Q + A.mT @ A
    base.diagonal(dim1=-2, dim2=-1).add_(proximal(Q.dtype))
    return base


def _factor(H: Tensor) -> tuple[Tensor, Tensor]:
    """The Cholesky factors of `H` `(B, n, n)`, and where the factorisation failed.

    Inequalities can weigh so much that rounding loses the base matrix in directions that they leave free. Then a
    small multiple of the diagonal is added; on accelerators always, since looking first would make the host wait.
    """
    looks = on_host(H)
    if not looks:
        H.diagonal(dim1=1, dim2=2).mul_(1 + 2 * torch.finfo(H.dtype).eps)
    L, info = torch.linalg.cholesky_ex(H)
    if looks and bool(info.any()):
        rows = info.nonzero()[:, 0]
        part = H[rows]
        part.diagonal(dim1=1, dim2=2).mul_(1 + H.shape[1] * torch.finfo(H.dtype).eps)
        again, still = torch.linalg.cholesky_ex(part)
        L, info = L.mT.index_copy(0, rows, again.mT).mT, info.index_copy(0, rows, still)  # L is column-major
    return L, info


def plus_gram(base: Tensor, G: Tensor, d: Tensor) -> Tensor:
    """base + G' diag(d) G `(B, n, n)` for d `(B, m)`."""
    m, n = G.shape[-2:]
    many = len(d) >= SHARED_GRAM_SAMPLES * n
    if G.ndim == 2 and many and m * n * n <= SHARED_GRAM_LIMIT:  # one product for all samples
        outer = (G.unsqueeze(2) * G.unsqueeze(1)).reshape(m, n * n)
        return (d @ outer).reshape(len(d), n, n) + base
    G = G.expand(len(d), -1, -1)
    return torch.baddbmm(base.expand(len(d), -1, -1), G.mT, d.unsqueeze(2) * G)
