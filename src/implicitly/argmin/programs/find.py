"""Finds the solution of a program in one step that is opaque to autograd, and where to attach its derivative."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from implicitly.argmin.programs.derivative import Jacobian, KKTAdjoint, Place
from implicitly.argmin.programs.polish import Polished, System
from implicitly.argmin.programs.program import DIMS, Point, QuadraticProgram, equilibrate, failed
from implicitly.argmin.programs.smoothing import central_point
from implicitly.argmin.programs.solver import ProgramSolver
from implicitly.condition import Report
from implicitly.host import maybe_any
from implicitly.implicit import Opaque
from implicitly.iterate import Found, Solver
from implicitly.solution import Status
from implicitly.transforms import merge_rows

# Makes the report on a program in which the dimensions that `vmap` maps have become part of the batch.
ReportOn = Callable[[QuadraticProgram, Tensor], Report]


def find(
    solver: ProgramSolver,
    adjoint: KKTAdjoint,
    program: QuadraticProgram,
    bounds: Tensor,
    start: tuple[Tensor, Tensor] | None,
    report_on: ReportOn,
    compile: bool = False,
    name: str = "qp",
) -> tuple[Found, Place]:
    """What `solver` finds, with w = (z, ν, λ) `(B, N)` as its `z`, and where to attach the derivative.

    For reports, `bounds` is h as the user passed it, and `name` is the name of the entry point.
    """
    known: list[Jacobian] = []
    run = partial(_run, solver, adjoint.smoothing, known, report_on, start, compile, name)
    w, alpha, near, scale, *rest = _Find.apply(run, *program.tensors, bounds)
    return Found(w, *rest), Place(alpha, near, scale, known)


def _run(
    solver: ProgramSolver,
    smoothing: float,
    known: list[Jacobian],
    report_on: ReportOn,
    start: tuple[Tensor, Tensor] | None,
    compile: bool,
    name: str,
    *tensors: Tensor,
) -> tuple[Tensor, ...]:
    """Solve: (w, alpha, near, scale, status, residual, steps, evaluations); `known` receives the Jacobian."""
    *six, bounds = tensors
    program = given = QuadraticProgram(*six)
    finite = program.finite()
    if maybe_any(~finite):
        program = program.without(~finite)
    system = System.of(*equilibrate(program))
    if system.condensed is None:  # a condensed system implies that Q is positive definite
        refuse_indefinite(program.Q)
    scaling = system.scaling
    polished = solver.solve(system, None if start is None else _scaled(system, *start), compile)
    polished = polished._replace(status=torch.where(finite, polished.status, int(Status.NON_FINITE)))
    none = failed(polished.status)
    if maybe_any(none):
        polished = _without(polished, none)
    w = polished.w * scaling.w
    converged = polished.status == Status.CONVERGED
    status = torch.where(converged & polished.degenerate, int(Status.DEGENERATE), polished.status)
    residual = polished.residual.masked_fill(~finite, float("nan"))
    report = report_on(given, bounds)
    report(name, solver, Found(w, status, residual, polished.steps, polished.evaluations))  # pyright: ignore[reportArgumentType]
    near, factors, degenerate = w, polished.factors, polished.degenerate
    alpha, beta = polished.alpha, (1 - polished.alpha) * scaling.F**2
    if smoothing and program.sizes[2]:
        system = system.with_vectors_of(program)  # whose inequalities 0'z <= h keep their slack
        near, slack, factors, done = central_point(system, polished.w * scaling.U, smoothing, none)
        near = near * system.scaling.w
        short = Found(
            near, torch.where(done, 0, int(Status.MAX_STEPS)), residual, polished.steps, polished.evaluations
        )
        replace(report, unpack=None, message=_off_the_path)(f"the relaxed {name}", solver, short)  # pyright: ignore[reportArgumentType]
        alpha, beta, degenerate = near[:, -slack.shape[1] :], -slack * scaling.F, torch.zeros_like(degenerate)
    known.append(Jacobian(factors, system.program, alpha, beta, degenerate))
    scale = scaling.of_matrices.expand_as(w).clone()
    return w, polished.alpha, near.clone(), scale, status, residual, polished.steps, polished.evaluations


def _off_the_path(name: str, solver: Solver, found: Found, lost: Tensor) -> str:
    """The message about the samples `lost`, for which no point on the central path was found."""
    return (
        f"{name}: no point where λ (h - Gz) is smoothing was found for {len(lost)} of {len(found.status)} samples "
        f"(first number {int(lost[0])}); their derivative may be wrong. Try: less smoothing, and A z = b in place "
        "of inequalities that leave no room between them"
    )


def _scaled(system: System, w: Tensor, slack: Tensor) -> Point:
    """A warm start in the units of `system`."""
    batch = system.program.batch
    origin = system.origin()
    if len(w) != batch:  # vmap has put its own batch dimension in front of ours
        w, slack = (t.repeat(batch // len(w), 1) for t in (w, slack))
    scaling = system.scaling
    w, slack = w / scaling.w, slack * (scaling.F / scaling.U)
    none = ~(w.isfinite().all(1, keepdim=True))
    w, slack = torch.where(none, 0.0, w), torch.where(none | slack.isinf(), 1.0, slack)
    binding = w[:, w.shape[1] - slack.shape[1] :] > slack
    return origin._replace(w=w, slack=slack, binding=binding)


def _without(polished: Polished, none: Tensor) -> Polished:
    """`polished` with harmless numbers for the samples that have no solution, `none` `(B,)`."""
    column = none.unsqueeze(1)
    return polished._replace(
        w=torch.where(column, 0.0, polished.w),
        alpha=torch.where(column, 0.0, polished.alpha),
        degenerate=polished.degenerate & ~none,
        factors=polished.factors.without(none),
    )


def refuse_indefinite(Q: Tensor) -> None:
    """Raise ValueError unless Q, `(n, n)` or `(B, n, n)`, is positive semidefinite, as far as rounding tells."""
    Q = Q if Q.ndim == 3 else Q.unsqueeze(0)
    if Q.shape[1] == 0:
        return
    # Eigenvalues that should be 0 may come out negative by more than eps, as Q = L L' is itself rounded: 4e-10 in
    # float64 and 7e-5 in float32 of the largest diagonal entry are let pass.
    small = torch.finfo(Q.dtype).eps ** 0.6
    size = Q.diagonal(dim1=1, dim2=2).abs().amax(1)
    shifted = Q.clone()
    shifted.diagonal(dim1=1, dim2=2).add_((small * size).clamp(min=1e-30).unsqueeze(1))
    suspects = (torch.linalg.cholesky_ex(shifted).info != 0).nonzero()[:, 0]
    if len(suspects) == 0:
        return
    eigenvalues = torch.linalg.eigvalsh(Q[suspects])
    least, largest = eigenvalues[:, 0], eigenvalues.abs().amax(1)
    wrong = least < -small * largest
    if bool(wrong.any()):
        worst = int(torch.where(wrong, least / largest, 0.0).argmin())
        sample = f" of sample {int(suspects[worst])}" if len(Q) > 1 else ""
        raise ValueError(
            f"Q must be positive semidefinite, else the program is not convex; the smallest eigenvalue{sample} is "
            f"{float(least[worst]):.3g} (the largest in size {float(largest[worst]):.3g}); {int(wrong.sum())} of "
            f"{len(Q)} samples have a negative one. Add a multiple of the identity, or write Q as L L', "
            "multiplied outside of torch.autocast, which would round it"
        )


class _Find(Opaque):
    """A solve as one operation that is opaque to autograd; `vmap` merges its dimension into the batch."""

    @staticmethod
    def forward(run: Callable[..., tuple[Tensor, ...]], *tensors: Tensor):
        return run(*(t.detach() for t in tensors))

    @staticmethod
    def vmap(info, in_dims, *args):
        run, *tensors = args
        size = info.batch_size
        shapes = [t.shape if d is None else t.movedim(d, 0).shape[1:] for t, d in zip(tensors, in_dims[1:])]
        own = [len(shape) > dims for shape, dims in zip(shapes, (*DIMS, 1))]
        batch = next((shape[0] for shape, batched in zip(shapes, own) if batched), 1)
        merged = []
        for t, dim, batched in zip(tensors, in_dims[1:], own):
            if dim is not None and not batched:  # shared by all samples, but not by those that vmap maps
                t = t.movedim(dim, 0).unsqueeze(1)
                t, dim, batched = t.expand(size, batch, *t.shape[2:]), 0, True
            merged.append(merge_rows(t, dim, size) if batched else t)
        output = _Find.apply(run, *merged)
        outputs = [t.unflatten(0, (size, len(t) // size)) if t.ndim else t for t in output]
        return tuple(outputs), tuple(0 if t.ndim else None for t in output)
