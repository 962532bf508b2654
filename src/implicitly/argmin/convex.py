"""Convex programs of cvxpy as functions of their parameters: canonical form, solver, variables."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from implicitly.argmin.canonical import CanonicalProgram, ParameterSlot, canonicalise
from implicitly.argmin.conic_program import ConicFamily, solve_conic
from implicitly.argmin.conic_solver import Clarabel, Workers
from implicitly.argmin.interior_point import InteriorPoint
from implicitly.argmin.quadratic import QuadraticForm
from implicitly.argmin.solver import ProgramSolver
from implicitly.compiled import CompileWarning
from implicitly.implicit import Report, users_line
from implicitly.iterate import Found, Solution, SolverError
from implicitly.tree import is_wrapped, unwrapped


@dataclass(frozen=True, eq=False)
class ConvexProgram:
    """A cvxpy problem as a function from values of its parameters to those of its variables."""

    program: CanonicalProgram
    solver: ProgramSolver | Clarabel
    family: ConicFamily | None = None
    quadratic: QuadraticForm | None = None
    compile: bool = False

    @classmethod
    def of(
        cls,
        problem: Any,
        parameters: Sequence[Any],
        variables: Sequence[Any],
        solver: ProgramSolver | Clarabel | None,
        gp: bool,
        compile: bool = False,
    ) -> ConvexProgram:
        """Canonicalise `problem`; raises ImportError, TypeError, ValueError, NotImplementedError."""
        if solver is not None and not isinstance(solver, ProgramSolver | Clarabel):
            raise TypeError(
                "solver must be im.InteriorPoint() or im.ADMM(), for quadratic and linear programs, or "
                f"im.Clarabel(); got {solver!r}"
            )
        program = canonicalise(problem, parameters, variables, gp)
        quadratic = program.cones.size == program.cones.linear
        if solver is None:
            solver = InteriorPoint() if quadratic else Clarabel()
        if isinstance(solver, Clarabel):
            if compile:
                warnings.warn(
                    "ConvexLayer: compile=True is for quadratic and linear programs solved by InteriorPoint; "
                    "Clarabel is no code of PyTorch and runs as it is",
                    CompileWarning,
                    stacklevel=users_line(),
                )
            workers = Workers(program.pattern, program.cones, solver)
            family = ConicFamily(program.pattern, program.cones, solver, workers, program.wanted())
            return cls(program, solver, family=family)
        if not quadratic:
            raise ValueError(
                f"{type(solver).__name__} solves quadratic and linear programs; this problem has other cones "
                f"({_described(program)}): use im.Clarabel()"
            )
        form = QuadraticForm.of(program)
        return cls(program, solver, quadratic=form, compile=compile)

    def __call__(self, values: Sequence[Tensor], on_failure: str) -> Solution:
        """The solution at `values`, one tensor a parameter, of the parameter's shape or with one entry a sample in
        front; its `value` is a tuple of the variables' values."""
        batch = checked_batch(values, self.program.parameters)
        try:
            solution = self._solve(values, batch or 1, on_failure)
        except SolverError as error:
            raise SolverError(str(error), self._unpacked(error.solution, batch)) from error
        return self._unpacked(solution, batch)

    def _solve(self, values: Sequence[Tensor], batch: int, on_failure: str) -> Solution:
        if self.quadratic is None:
            return self._by_clarabel(self.program.numbers(values, batch), values[0], on_failure)
        assert isinstance(self.solver, ProgramSolver)
        return self.quadratic.solve(values, batch, self.solver, on_failure=on_failure, compile=self.compile)

    def _unpacked(self, solution: Solution, batch: int | None) -> Solution:
        x, y = solution.value
        found = tuple(v.take(y if v.dual else x) for v in self.program.variables)
        if batch is not None:
            return replace(solution, value=found)
        first = {name: getattr(solution, name)[0] for name in ("status", "residual", "steps")}
        return replace(solution, value=tuple(v[0] for v in found), **first)

    def _by_clarabel(self, numbers: list[Tensor], like: Tensor, on_failure: str) -> Solution:
        assert self.family is not None
        theta = tuple(t.to("cpu", torch.float64) for t in numbers)

        def unpack(found: Found) -> Solution:
            x, v = found.z.split([self.program.pattern.n, self.program.pattern.m], dim=1)
            value = x.to(like), self.program.cones.project_dual(v).to(like)
            status, residual, steps = (t.to(like.device) for t in (found.status, found.residual, found.steps))
            return Solution(value, status, residual, steps, int(found.evaluations))

        return unpack(solve_conic(self.family, theta, Report(on_failure, unpack)))


def _described(program: CanonicalProgram) -> str:
    cones = program.cones
    counts = {
        "second-order": len(cones.second_order),
        "semidefinite": len(cones.semidefinite),
        "exponential": cones.exponential,
        "power": len(cones.powers),
    }
    return ", ".join(f"{count} {name}" for name, count in counts.items() if count)


# ---------------------------------------------------------------------------------------------- what came in


def checked_batch(values: Sequence[Any], slots: Sequence[ParameterSlot]) -> int | None:
    """The number of samples, None where no value has a batch; raises TypeError / ValueError for misfits."""
    if len(values) != len(slots):
        names = ", ".join(s.name for s in slots)
        raise ValueError(
            f"expected {len(slots)} values, one for each of the parameters {names}; got {len(values)}"
        )
    batches: dict[str, int] = {}
    for value, slot in zip(values, slots):
        if not isinstance(value, Tensor):
            raise TypeError(f"the value of parameter {slot.name} must be a tensor, got a {type(value).__name__}")
        if value.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"the value of parameter {slot.name} has dtype {value.dtype}: programs are solved in float32 or "
                "float64; convert it"
            )
        shape = tuple(value.shape)
        if shape[-len(slot.shape) or len(shape) :] != slot.shape or len(shape) > len(slot.shape) + 1:
            batched = str(("B", *slot.shape)).replace("'", "")
            raise ValueError(
                f"the value of parameter {slot.name} must have shape {slot.shape}, or {batched} with one entry a "
                f"sample; got {shape}"
            )
        if len(shape) > len(slot.shape):
            batches[slot.name] = shape[0]
    for what in ("dtype", "device"):
        if len({getattr(v, what) for v in values}) > 1:
            kinds = ", ".join(f"{s.name} {getattr(v, what)}" for s, v in zip(slots, values))
            raise ValueError(f"the values mix {what}s: {kinds}; convert them to one")
    if len(set(batches.values())) > 1:
        counts = ", ".join(f"{name} {count}" for name, count in batches.items())
        raise ValueError(f"the values disagree on the batch (dimension 0): {counts}")
    if 0 in batches.values():
        raise ValueError("the batch is empty: dimension 0 of the values is 0")
    for value, slot in zip(values, slots):
        _check_attributes(value, slot)
    return next(iter(batches.values()), None)


def _check_attributes(value: Tensor, slot: ParameterSlot) -> None:
    """Raise ValueError where a value breaks what its parameter promises, on which convexity may rest."""
    wrapped = is_wrapped(value)
    value = unwrapped(value.detach())
    if slot.sign and bool((slot.sign * value < 0).any()):
        kind, extreme = ("negative", value.min()) if slot.sign > 0 else ("positive", value.max())
        raise ValueError(f"parameter {slot.name} is declared not to be {kind}; its value has {float(extreme):.3g}")
    if slot.is_log and bool((value <= 0).any()):
        raise ValueError(
            f"parameter {slot.name} of a geometric program must be positive; it has {float(value.min()):.3g}"
        )
    if wrapped or not slot.symmetric:  # which dimensions are the matrix's is known outside of transforms only
        return
    size = value.abs().amax()
    gap = (value - value.mT).abs().amax()
    if bool(gap > 1e-4 * size):
        raise ValueError(
            f"parameter {slot.name} is declared symmetric; it differs from its transpose by {float(gap):.3g}"
        )
    if slot.definite:
        shifted = slot.definite * (value + value.mT) / 2
        slack = torch.finfo(value.dtype).eps ** 0.6 * size.clamp(min=torch.finfo(value.dtype).tiny)
        shifted = shifted + slack * torch.eye(value.shape[-1], dtype=value.dtype, device=value.device)
        if bool((torch.linalg.cholesky_ex(shifted).info != 0).any() & value.isfinite().all()):
            least = float(torch.linalg.eigvalsh(slot.definite * (value + value.mT) / 2).min())
            word = "positive" if slot.definite > 0 else "negative"
            raise ValueError(
                f"parameter {slot.name} is declared {word} semidefinite; an eigenvalue of its value is "
                f"{slot.definite * least:.3g}"
            )
