"""Conditions that a solution must satisfy, and the reports on samples for which no solver met them."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Hashable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from implicitly.checks import check_on_failure
from implicitly.host import maybe_any
from implicitly.iterate import Found, Solver
from implicitly.linear import Affine
from implicitly.pullback import Pull
from implicitly.solution import ConvergenceWarning, Solution, SolverError, Status, is_success

Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Condition:
    """The condition R(z, *theta) = 0 for z `(B, n)`, with R such that z + R(z) is the plain iteration.

    Attributes:
        bind: maps `theta` to the function z -> R(z), which shares the work that does not depend on z. For a
            linear condition it maps `theta[1:]` to the operator M, and R(u) = b - M u with b = `theta[0]`.
        name: its name in messages.
        dtype: the user's dtype, which decides what tolerances can be reached; solvers may compute in a wider one.
        linear: whether it is M u = b.
        relative_to_iterate: whether tolerances are relative to |z|; else to |R(z0)|, or to |b| if linear.
        sample_dims: for each of `theta` the dimension that holds the samples, or None where it is shared; None in
            place of the tuple: unknown.
        report: announces solves that fell short, see `Report`.
        kind: the dataclass that `bind` returns when solvers need more than R (`Descent`, `Lagrangian`): calling
            it gives R, and its fields are further maps of tensors with one row per sample.
        scale: maps the result of `bind`, z0 and R(z0) to what tolerances are relative to, `(B,)`; None: |R(z0)|.
        examine: checks what a solver found, given the result of `bind`, and may correct how samples ended.
        graphs: how to solve it other than by `search`.
        snapshot: records the state of f besides theta (train/eval modes, constants); what it returns restores that
            state while a derivative calls f. See `Opened.snapshot`.
        pull: for (z, *theta) and places, the map that `pullback.recorded` would give of R, where a formula for it
            is known and cheaper than recording R; None: use `pullback.recorded`.
    """

    bind: Callable[..., Map]
    name: str
    dtype: torch.dtype
    report: Report
    linear: bool = False
    relative_to_iterate: bool = False
    sample_dims: tuple[int | None, ...] | None = None
    kind: type | None = None
    scale: Callable[[Any, Tensor, Tensor], Tensor] | None = None
    examine: Callable[[Any, Found], Found] | None = None
    graphs: Graphs | None = None
    snapshot: Callable[[], Callable[[], AbstractContextManager[None]]] | None = None
    pull: Callable[[tuple[Tensor, ...], list[int]], Pull] | None = None

    def at(self, *theta: Tensor) -> Map:
        """The map z -> R(z) at `theta`."""
        return Affine(self.bind(*theta[1:]), theta[0]) if self.linear else self.bind(*theta)

    def residual(self, z: Tensor, *theta: Tensor) -> Tensor:
        """R(z, *theta) `(B, n)`."""
        return self.at(*theta)(z)

    def bare(self) -> Condition:
        """The condition that a compiled graph may keep.

        It has nothing that reports, examines, or keeps this call's tensors alive.
        """
        return replace(self, report=Report("ignore"), sample_dims=None, examine=None, graphs=None, snapshot=None)

    def examined(self, found: Found, theta: tuple[Tensor, ...]) -> Found:
        """`found` with statuses corrected by `examine`."""
        return found if self.examine is None else self.examine(self.at(*theta), found)

    def announce(self, solver: Solver, found: Found, theta: tuple[Tensor, ...]) -> None:
        """Report the samples of `found` that fell short.

        Where the cotangent that comes in is NaN or inf, a derivative warns at most: as any other layer does, it
        passes that on, which the gradient scaler of mixed precision looks for, to leave out the step.
        """
        report, status = self.report, found.status
        if report.of_derivative and report.on_failure == "raise" and not all_converged(status):
            lost = ~theta[0].isfinite().all(1)
            of_lost = status.masked_fill(~lost, int(Status.CONVERGED))
            replace(report, on_failure="warn")(self.name, solver, found._replace(status=of_lost))
            found = found._replace(status=status.masked_fill(lost, int(Status.CONVERGED)))
        report(self.name, solver, found)


@dataclass(frozen=True)
class Graphs:
    """What runs in place of `search`: for the condition itself, and for the linear system of reverse mode."""

    search: Callable[..., Found]
    pullback: Callable[..., Found] | None = None


@dataclass(frozen=True)
class Report:
    """What to do when a solve falls short ("raise" a SolverError, "warn", or "ignore"), and what to say then."""

    on_failure: str = "warn"
    unpack: Callable[[Found], Solution] | None = None
    message: Callable[[str, Solver, Found, Tensor], str] | None = None  # instead of `explain`
    patient: bool = False  # whether another solver will be tried on the samples that fail here
    of_derivative: bool = False  # whether the solve is the linear one of a derivative

    def __post_init__(self):
        check_on_failure(self.on_failure)

    def __call__(self, name: str, solver: Solver, found: Found) -> None:
        """Announce the samples of `found` that did not converge."""
        if self.on_failure == "ignore" or all_converged(found.status):
            return
        short = ~is_success(found.status)
        if solver.fixed_steps:  # steps were asked for, not convergence
            short = short & (found.status != Status.MAX_STEPS) & (found.status != Status.STAGNATED)
        if self.patient:
            short = short & ~is_for_another(found.status)
        failed = short.nonzero()[:, 0]
        if len(failed) == 0:
            return
        message = (self.message or explain)(name, solver, found, failed)
        if self.on_failure == "raise":
            solution = self.unpack(found) if self.unpack is not None else as_solution(found)
            raise SolverError(message, solution)
        # By the gravest status, as what they end with changes from batch to batch.
        warn_of_failure(message, name, repr(solver), int(found.status[failed].max()))


def warn_of_failure(message: str, *kind: Hashable) -> None:
    """A `ConvergenceWarning` at the user's line, by default once for that line and `kind`."""
    level = users_line()
    # Cells of a notebook are one module whose lines all begin at 1, and files of their own.
    file = sys._getframe(level - 1).f_code.co_filename
    warnings.warn(ConvergenceWarning(message, (file, *kind)), stacklevel=level)


def all_converged(status: Tensor) -> bool:
    """Whether all samples `(B,)` have converged, where looking is cheap; False where it is not."""
    return not maybe_any(status)  # CONVERGED is 0


def users_line() -> int:
    """The stacklevel for a warning to point at the nearest frame outside of this package and torch."""
    inside = (
        os.path.join(os.path.dirname(__file__), ""),
        os.path.join(os.path.dirname(torch.__file__), ""),
        contextlib.__file__,
    )
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(inside):
        frame, level = frame.f_back, level + 1
    return level


def as_solution(found: Found) -> Solution:
    """`found` as a `Solution`, its value still a detached matrix `(B, n)`."""
    z, status, residual, steps = (t.detach() for t in found[:4])
    return Solution(z, status, residual, steps, int(found.evaluations))


REMEDY = {
    Status.MAX_STEPS: "raise max_steps, loosen rtol, or use another solver",
    Status.STAGNATED: "loosen rtol, use a wider dtype, or use another solver: the residual has stopped decreasing",
    Status.DIVERGED: "lower damping, or use Anderson, Broyden or Newton, which need no contraction",
    Status.SINGULAR: "start elsewhere (z0), or change f: the Jacobian is singular there, so the solution is "
    "not locally unique or does not exist",
    Status.NON_FINITE: "check the inputs of f, which returned NaN or inf, or start closer (z0)",
    Status.INFEASIBLE: "check the signs of the constraints, or relax them: no point satisfies all of them",
    Status.UNBOUNDED: "add constraints: the objective is unbounded below on the feasible set",
    Status.NOT_MINIMUM: "start elsewhere (z0): the stationary point found is not a local minimum",
}


# Remedies for the linear solve of a derivative.
LINEAR_REMEDY = {
    **REMEDY,
    Status.MAX_STEPS: "raise max_steps of the adjoint or its linear_solver, loosen its rtol, or use another one, "
    "such as im.DenseLU() for up to a few thousand unknowns",
    Status.DIVERGED: "lower damping, or use GMRES, which needs no contraction",
    Status.SINGULAR: "use GMRES if CG was used, as the Jacobian may not be positive definite; else it is singular "
    "at the solution, which is not locally unique",
    Status.NON_FINITE: "check the loss, and f at the solution: the incoming gradient, or the derivative of f "
    "there, contains NaN or inf",
}


def explain(name: str, solver: Solver, found: Found, failed: Tensor, remedy: Mapping[Status, str] = REMEDY) -> str:
    """The message about the samples that `failed`, with the `remedy` for the worst one."""
    counts = {s: int((found.status[failed] == s).sum()) for s in REMEDY}
    summary = ", ".join(f"{count} {s.name}" for s, count in counts.items() if count)
    residual = found.residual[failed]
    worst = failed[torch.where(residual.isfinite(), residual, float("inf")).argmax()]
    status = Status(int(found.status[worst]))
    return (
        f"{name}: {solver.label or type(solver).__name__} did not converge for {len(failed)} of "
        f"{len(found.status)} samples ({summary}). Worst is sample {int(worst)}: {status.name} after "
        f"{int(found.steps[worst])} steps with residual norm {float(found.residual[worst]):.3g}. "
        f"Try: {remedy[status]}"
    )


def is_for_another(status: Tensor) -> Tensor:
    """Which systems, by their codes `(B,)`, another solver may be able to solve.

    A system that seemed singular may only have had products whose squares left the range of the dtype.
    """
    return (status == int(Status.MAX_STEPS)) | (status == int(Status.STAGNATED)) | (status == int(Status.SINGULAR))


def is_usable(status: Tensor) -> Tensor:
    """Which samples, by their codes `(B,)`, ended where a derivative is meaningful: at a solution or near one."""
    # Compared as numbers, since to the tracer a tensor and a member of an enumeration are never equal.
    return is_success(status) | (status == int(Status.MAX_STEPS)) | (status == int(Status.STAGNATED))
