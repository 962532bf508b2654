"""`qp`: state the quadratic program, find its solution, attach the derivative."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from implicitly.argmin.programs.derivative import KKTAdjoint
from implicitly.argmin.programs.find import find
from implicitly.argmin.programs.graph_derivative import solve_as_graph
from implicitly.argmin.programs.interior_point import InteriorPoint
from implicitly.argmin.programs.program import DIMS, QuadraticProgram, failed, times
from implicitly.argmin.programs.solver import ProgramSolver
from implicitly.condition import REMEDY, Report, explain
from implicitly.graph_break import one_break
from implicitly.host import maybe_any
from implicitly.iterate import Found, Solver
from implicitly.solution import Solution, Status
from implicitly.transforms import full_precision, unwrapped

NAMES = ("Q", "p", "G", "h", "A", "b")


@dataclass(frozen=True)
class ProgramSolution(Solution):
    """What `qp` returns: a `Solution` whose `value` is z.

    Its `residual` is the norm of (Qz + p + G'λ + A'ν, Az - b, min(λ, h - Gz)); its `evaluations` count the
    factorisations.

    Attributes:
        dual_inequality: λ >= 0 `(B, m)`, differentiable like `value`.
        dual_equality: ν `(B, q)`, differentiable.
        slack: h - Gz `(B, m)`, differentiable.
    """

    dual_inequality: Tensor
    dual_equality: Tensor
    slack: Tensor


@one_break
def qp(
    Q: Tensor,
    p: Tensor,
    G: Tensor | None = None,
    h: Tensor | None = None,
    A: Tensor | None = None,
    b: Tensor | None = None,
    *,
    solver: ProgramSolver = InteriorPoint(),
    adjoint: KKTAdjoint = KKTAdjoint(),
    start: ProgramSolution | None = None,
    on_failure: str = "raise",
    compile: bool = False,
) -> ProgramSolution:
    """Solve the quadratic program min 1/2 z'Qz + p'z subject to Gz <= h, Az = b, and differentiate the solution.

    Each argument may have a batch dimension in front, or be shared by the batch. If none has one, there is a
    single program, and the results have no batch dimension either. Gradients reach every argument; those of shared
    arguments are sums over the batch. Autocast changes nothing.

    Args:
        Q: `(n, n)` or `(B, n, n)`, positive semidefinite (0: a linear program); only its symmetric part is used.
        p: `(n,)` or `(B, n)`.
        G, h: `(m, n)` and `(m,)`, or with `B` in front; None: no inequalities. Rows with h = inf are ignored.
        A, b: `(q, n)` and `(q,)`, or with `B` in front; None: no equalities. Equations may be repeated.
        solver: `InteriorPoint`, or `ADMM` if the batch shares Q, G and A.
        adjoint: `KKTAdjoint`.
        start: warm start: the solution of a similar program of the same sizes, such as the last control step. If
            the same inequalities bind, one factorisation finds the new solution.
        on_failure: "raise", "warn" or "ignore" when samples have no solution. Their results are NaN and their
            gradients zero. Samples that ran out of steps keep their best point and the derivative of its active
            set.
        compile: run the loop of `InteriorPoint` (on a CPU, as long as most samples are running), or ten steps of
            `ADMM` at a time, as one graph of `torch.compile`, and the solve of the backward pass as another; a
            `CompileWarning` says where there is no graph.

    Returns:
        `ProgramSolution`: `value` `(B, n)`, `dual_inequality`, `dual_equality`, `slack`; `status`, `residual` and
        `steps` `(B,)`. Samples whose solution has no unique derivative have `Status.DEGENERATE`.

    Raises:
        TypeError, ValueError: for invalid arguments, such as an indefinite Q.
        SolverError: a sample has no solution and `on_failure="raise"`; carries the `ProgramSolution`.

    Source: Amos and Kolter, "OptNet: Differentiable Optimization as a Layer in Neural Networks", ICML 2017.
    """
    if not isinstance(solver, ProgramSolver):
        raise TypeError(f"solver must be InteriorPoint() or ADMM(), got {solver!r}")
    if not isinstance(adjoint, KKTAdjoint):
        raise TypeError(f"adjoint must be a KKTAdjoint, got {adjoint!r}")
    return solve_program(checked(Q, p, G, h, A, b), solver, adjoint, start, on_failure, compile)


def solve_program(
    given: QuadraticProgram,
    solver: ProgramSolver,
    adjoint: KKTAdjoint,
    start: ProgramSolution | None = None,
    on_failure: str = "raise",
    compile: bool = False,
    name: str = "qp",
    not_finite: str | None = None,
) -> ProgramSolution:
    """Solve and differentiate a program whose arguments have been `checked`; `qp` without the checks.

    `name` is the name of the entry point in messages. `not_finite` is the message about NaN and inf for entry
    points whose users have not passed the tensors of the program themselves; None names the tensors.
    """
    solver.tolerance(given.Q.dtype)
    adjoint.check(given.Q.dtype)
    near = None if start is None else start_of(start, given)
    with full_precision(given.Q.device.type):
        program = without_infinite_bounds(given)
        report = partial(_report, Report(on_failure), not_finite)
        found, place = find(solver, adjoint, program, given.h, near, report, compile, name)
        known = program.without(bad) if maybe_any(bad := found.status == Status.NON_FINITE) else program
        pull = solve_as_graph if compile else None
        return _solution(given, found, adjoint.attach(found.z, place, known, on_failure, pull, name))


def _report(report: Report, not_finite: str | None, program: QuadraticProgram, bounds: Tensor) -> Report:
    """The report on a `program` for which the user passed `bounds` as h."""

    def message(name: str, solver: Solver, found: Found, failed: Tensor) -> str:
        remedy = REMEDY
        if bool((found.status == Status.NON_FINITE).any()):
            remedy = {
                **REMEDY,
                Status.NON_FINITE: f"{not_finite or _not_finite(program)}; see where that comes from",
            }
        return explain(name, solver, found, failed, remedy)

    return replace(report, unpack=partial(_solution, replace(program, h=bounds)), message=message)


def _not_finite(program: QuadraticProgram) -> str:
    """Which arguments, and which of their samples, hold NaN or inf."""
    places = []
    for name, t, dims in zip(NAMES, program.tensors, DIMS):
        bad = ~t.isfinite().flatten(t.ndim - dims).all(-1)
        if bool(bad.any()):
            places.append(name if t.ndim == dims else f"{name} of sample {int(bad.int().argmax())}")
    return f"NaN or inf is in {', '.join(places)}"


def _solution(program: QuadraticProgram, found: Found, attached: Tensor | None = None) -> ProgramSolution:
    """The solution as the user gets it."""
    w = found.z if attached is None else attached
    z, nu, lam = w.split(program.sizes, dim=1)
    parts = (z, lam, nu, program.h - times(program.G, z))
    if maybe_any(none := failed(found.status)):
        parts = tuple(torch.where(none.unsqueeze(1), float("nan"), t) for t in parts)
    results = (parts[0], found.status, found.residual, found.steps, *parts[1:])
    if not program.batched:
        results = tuple(t[0] for t in results)
    z, status, residual, steps, *rest = results
    return ProgramSolution(z, status, residual, steps, int(found.evaluations), *rest)


# ------------------------------------------------------------------------------------------- checks of arguments


def checked(Q: Any, p: Any, G: Any, h: Any, A: Any, b: Any) -> QuadraticProgram:
    """The program, with Q symmetrised; raises TypeError / ValueError for arguments that do not fit together."""
    for first, second, x, y in (("G", "h", G, h), ("A", "b", A, b)):
        if (x is None) != (y is None):
            raise ValueError(
                f"{first} and {second} must be passed together: got only {second if x is None else first}"
            )
        if isinstance(x, Tensor) and x.shape == (0,):  # as qpth wants it
            raise ValueError(
                f"{first} is an empty vector, not a matrix: leave {first} and {second} out, or pass None, where "
                f"there are no {'inequalities' if first == 'G' else 'equalities'}"
            )
    given: dict[str, Any] = {
        name: t for name, t in zip(NAMES, (Q, p, G, h, A, b)) if t is not None or name in ("Q", "p")
    }
    for name, t in given.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a tensor, got a {type(t).__name__}")
        if t.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{name} has dtype {t.dtype}: a program is solved in float32 or float64; convert it")
        if t.layout is not torch.strided:
            raise TypeError(f"{name} is a tensor of {t.layout}, but programs are dense: pass {name}.to_dense()")
    for what in ("dtype", "device"):
        if len({getattr(t, what) for t in given.values()}) > 1:
            kinds = ", ".join(f"{name} {getattr(t, what)}" for name, t in given.items())
            raise ValueError(f"the arguments mix {what}s: {kinds}; convert them to one")
    if Q.ndim not in (2, 3) or Q.shape[-1] != Q.shape[-2]:
        raise ValueError(f"Q must be (n, n) or (B, n, n), got {tuple(Q.shape)}")
    n = Q.shape[-1]
    for name, width in (("G", "m"), ("A", "q")):
        if name not in given:
            given[name], given["h" if name == "G" else "b"] = Q.new_zeros(0, n), Q.new_zeros(0)
        elif given[name].ndim not in (2, 3):
            shape = tuple(given[name].shape)
            raise ValueError(f"{name} must be ({width}, {n}) or (B, {width}, {n}), got {shape}")
    expected = {"Q": (n, n), "p": (n,)}
    for matrix, vector in (("G", "h"), ("A", "b")):
        expected[matrix] = (given[matrix].shape[-2], n)
        expected[vector] = expected[matrix][:1]
    _check_shapes({name: tuple(given[name].shape) for name in NAMES}, expected)
    return QuadraticProgram((Q + Q.mT).mul_(0.5), *(given[name] for name in NAMES[1:]))


def _check_shapes(shapes: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]) -> None:
    batches = {}
    for name, shape in shapes.items():
        own = expected[name]
        lead = shape[: len(shape) - len(own)]
        if len(lead) > 1 or shape[len(lead) :] != own:
            text = ", ".join(map(str, own)) + ("," if len(own) == 1 else "")
            fits = ", ".join(f"{k} {s}" for k, s in shapes.items() if k in ("Q", "G", "A") and k != name)
            raise ValueError(
                f"{name} must be ({text}), or (B, {text.rstrip(',')}) with one entry a sample, beside {fits}; "
                f"got {shape}"
            )
        if lead:
            batches[name] = lead[0]
    if len(set(batches.values())) > 1:
        counts = ", ".join(f"{name} {count}" for name, count in batches.items())
        raise ValueError(f"the arguments disagree on the batch (dimension 0): {counts}")


def without_infinite_bounds(program: QuadraticProgram) -> QuadraticProgram:
    """The program with 0 <= 1 in place of rows Gz <= inf, which say nothing, and 0 <= -1 for rows Gz <= -inf."""
    infinite = program.h.isinf()
    # On an accelerator this makes the host wait, but saves making a copy of shared matrices for every sample.
    if not bool(unwrapped(infinite).any()):
        return program
    h = torch.where(infinite, program.h.sign(), program.h)
    G = torch.where(infinite.unsqueeze(-1), 0.0, program.G)
    return QuadraticProgram(program.Q, program.p, G, h, program.A, program.b)


def start_of(solution: ProgramSolution, program: QuadraticProgram) -> tuple[Tensor, Tensor]:
    """w and the slack of a warm start; raises TypeError / ValueError if it does not fit `program`."""
    if not isinstance(solution, ProgramSolution):
        raise TypeError(
            f"start must be a ProgramSolution that an earlier im.qp returned, got a {type(solution).__name__}"
        )
    parts = (solution.value, solution.dual_equality, solution.dual_inequality, solution.slack)
    lead = (program.batch,) if program.batched else ()
    expected = [(*lead, k) for k in (*program.sizes, program.sizes[2])]
    came = [tuple(t.shape) for t in parts]
    if came != expected:
        raise ValueError(
            f"start must have (value, dual_equality, dual_inequality, slack) of the shapes {expected}; got {came}"
        )
    for what in ("dtype", "device"):
        came, wanted = getattr(solution.value, what), getattr(program.Q, what)
        if came != wanted:
            raise ValueError(
                f"start has {what} {came}, but the program has {wanted}; pass a start of the same {what}, or none"
            )
    z, nu, lam, slack = (t.detach().reshape(program.batch, t.shape[-1]) for t in parts)
    return torch.cat([z, nu, lam], 1), slack
