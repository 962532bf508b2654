"""The point on the central path with a given complementarity, near a solution."""

from __future__ import annotations

import torch
from torch import Tensor

from implicitly.argmin.programs.condensed import CondensedFactors, step_length
from implicitly.argmin.programs.kkt import Factors
from implicitly.argmin.programs.polish import System
from implicitly.argmin.programs.program import times, times_transposed
from implicitly.host import maybe_any
from implicitly.tree import row_norm

# The most Newton steps; samples that need more count as not found.
MAX_STEPS = 50
# How far a step goes, as a share of the way to the boundary, so that multipliers and slacks stay positive.
TO_BOUNDARY = 0.99


def central_point(
    system: System, w: Tensor, kappa: float, none: Tensor
) -> tuple[Tensor, Tensor, Factors | CondensedFactors, Tensor]:
    """The point on the central path, where λ s = `kappa` instead of 0, in equilibrated units.

    Returns (z, ν, λ) `(B, N)`, the slack `(B, m)`, the factors of the Jacobian of that condition, and for which
    samples `(B,)` the point was found. It runs Newton's method from the solution `w`, moved onto λ s = kappa;
    `none` says which samples have no solution.
    """
    program, root = system.program, kappa**0.5
    n, q, m = program.sizes
    tolerance = 1e3 * torch.finfo(w.dtype).eps  # rounding errors of residuals and solves add up to many eps
    lam, s = w[:, n + q :].clamp(min=0), (program.h - times(program.G, w[:, :n])).clamp(min=0)
    binds = lam > s
    lam, s = torch.where(binds, lam, kappa / s.clamp(min=root)), torch.where(binds, s, s.clamp(min=root))
    lam = torch.where(binds, lam.clamp(min=root), lam)
    s = torch.where(binds, kappa / lam, s)
    w = torch.cat([w[:, : n + q], lam], 1)
    done = none
    for _ in range(MAX_STEPS):
        z, nu, lam = w.split([n, q, m], dim=1)
        Qz, dual = times(program.Q, z), times_transposed(program.G, lam) + times_transposed(program.A, nu)
        aim = (kappa - lam * s) / lam
        lower = torch.cat([times(program.A, z) - program.b, times(program.G, z) + s - program.h], 1)
        r = -torch.cat([Qz + dual + program.p, lower], 1)
        # `root` sets the units. Each bound has a scale of its own: one far away says nothing about the others.
        sizes = root + row_norm(z).unsqueeze(1) + torch.cat([program.b, program.h], 1).abs()
        size = root + row_norm(Qz) + row_norm(dual)
        off = torch.maximum(row_norm(r[:, :n]) / size, row_norm(r[:, n:] / sizes))
        if m:
            off = torch.maximum(off, (aim * lam / kappa).abs().amax(1))
        done = none | (off <= tolerance)
        if not maybe_any(~done):
            break
        factors = system.factorise(torch.ones_like(s), -s / lam)
        right = torch.cat([r[:, : n + q], r[:, n + q :] - aim], 1)
        d = factors.solve(right.unsqueeze(1)).squeeze(1)
        d_s = aim - s / lam * d[:, n + q :]
        length = TO_BOUNDARY * step_length(lam, s, d[:, n + q :], d_s) if m else torch.ones_like(off)
        length = torch.where(length >= TO_BOUNDARY, 1.0, length)  # no boundary within a full step
        length = torch.where(done, 0.0, length).unsqueeze(1)
        w, s = w + length * d, s + length * d_s
    lam, F = w[:, n + q :], system.scaling.F
    alpha = torch.where(none.unsqueeze(1), 0.0, lam * F)
    factors = system.factorise(alpha, torch.where(none.unsqueeze(1), 1.0, -s * F))
    return w, s, factors, done
