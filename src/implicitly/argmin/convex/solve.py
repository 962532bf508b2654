"""Convex programs of cvxpy as functions of their parameters: canonical form, solver, variables."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from implicitly.argmin.convex.canonical import CanonicalProgram, ParameterSlot, canonicalise
from implicitly.argmin.convex.conic_jacobian import ConicFamily
from implicitly.argmin.convex.conic_program import solve_conic
from implicitly.argmin.convex.conic_solver import Clarabel, Workers
from implicitly.argmin.convex.quadratic import QuadraticForm
from implicitly.argmin.programs.derivative import KKTAdjoint
from implicitly.argmin.programs.interior_point import InteriorPoint
from implicitly.argmin.programs.solver import ProgramSolver
from implicitly.argmin.sets.rows import outside
from implicitly.compiled import CompileWarning
from implicitly.condition import Report, users_line
from implicitly.iterate import Found
from implicitly.solution import Solution, SolverError
from implicitly.transforms import full_precision, is_wrapped
from implicitly.tree import columns_of


@dataclass(frozen=True, eq=False)
class ConvexProgram:
    """A cvxpy problem as a function from values of its parameters to those of its variables."""

    program: CanonicalProgram
    solver: ProgramSolver | Clarabel
    adjoint: KKTAdjoint
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
        adjoint: KKTAdjoint = KKTAdjoint(),
        compile: bool = False,
    ) -> ConvexProgram:
        """Canonicalise `problem`; raises ImportError, TypeError, ValueError, NotImplementedError."""
        if solver is not None and not isinstance(solver, ProgramSolver | Clarabel):
            raise TypeError(
                "solver must be im.InteriorPoint() or im.ADMM() (for quadratic and linear programs), or "
                f"im.Clarabel(); got {solver!r}"
            )
        if not isinstance(adjoint, KKTAdjoint):
            raise TypeError(f"adjoint must be a KKTAdjoint, got {adjoint!r}")
        program = canonicalise(problem, parameters, variables, gp)
        quadratic = program.cones.size == program.cones.linear
        if solver is None:
            solver = InteriorPoint() if quadratic else Clarabel()
        if isinstance(solver, Clarabel):
            if adjoint.smoothing:
                raise ValueError(
                    "KKTAdjoint(smoothing=...) is for quadratic and linear programs solved by InteriorPoint or "
                    "ADMM; for Clarabel there is only the exact derivative: leave smoothing at 0"
                )
            if compile:
                warnings.warn(
                    "ConvexLayer: compile=True is for quadratic and linear programs solved by InteriorPoint; "
                    "Clarabel is not written in PyTorch and runs without compilation",
                    CompileWarning,
                    stacklevel=users_line(),
                )
            workers = Workers(program.pattern, program.cones, solver)
            family = ConicFamily(program.pattern, program.cones, solver, workers, program.wanted())
            return cls(program, solver, adjoint, family=family)
        if not quadratic:
            raise ValueError(
                f"{type(solver).__name__} solves quadratic and linear programs; this problem has other cones "
                f"({_described(program)}): use im.Clarabel()"
            )
        form = QuadraticForm.of(program)
        return cls(program, solver, adjoint, quadratic=form, compile=compile)

    def __call__(self, values: Sequence[Tensor], on_failure: str) -> Solution:
        """The solution at `values`; its `value` is a tuple of the variables' values.

        `values` has one tensor per parameter, of the parameter's shape or with a batch dimension in front.
        """
        batch = checked_batch(values, self.program.parameters)
        if batch == 0:
            return self._of_nobody(values)
        with full_precision(values[0].device.type):
            try:
                solution = self._solve(values, batch or 1, on_failure)
            except SolverError as error:
                raise SolverError(str(error), self._unpacked(error.solution, batch)) from error
            unpacked = self._unpacked(solution, batch)
            return replace(unpacked, value=tuple(recorded_by(values, v) for v in unpacked.value))

    def _solve(self, values: Sequence[Tensor], batch: int, on_failure: str) -> Solution:
        if self.quadratic is None:
            return self._by_clarabel(self.program.numbers(values, batch), values[0], on_failure)
        assert isinstance(self.solver, ProgramSolver)
        options = {"adjoint": self.adjoint, "on_failure": on_failure, "compile": self.compile}
        return self.quadratic.solve(values, batch, self.solver, **options)

    def _of_nobody(self, values: Sequence[Tensor]) -> Solution:
        """The solution of an empty batch, whose derivatives are zeros."""
        empty = (values[0].new_zeros(0, *v.shape) for v in self.program.variables)
        found = tuple(recorded_by(values, v) for v in empty)
        codes = torch.zeros(0, dtype=torch.int64, device=values[0].device)
        return Solution(found, codes, values[0].new_zeros(0), codes, 0)

    def _unpacked(self, solution: Solution, batch: int | None) -> Solution:
        x, y = solution.value
        found = tuple(v.take(y if v.dual else x) for v in self.program.variables)
        if batch is not None:
            if len(solution.status) != batch:  # the program does not depend on the values that have a batch
                found = tuple(v.expand(batch, *v.shape[1:]) for v in found)
                ends = {name: getattr(solution, name).expand(batch) for name in ("status", "residual", "steps")}
                return replace(solution, value=found, **ends)
            return replace(solution, value=found)
        first = {name: getattr(solution, name)[0] for name in ("status", "residual", "steps")}
        return replace(solution, value=tuple(v[0] for v in found), **first)

    def _by_clarabel(self, numbers: list[Tensor], like: Tensor, on_failure: str) -> Solution:
        assert self.family is not None
        theta = tuple(t.to("cpu", torch.float64) for t in numbers)

        def unpack(found: Found) -> Solution:
            value = found.z.to(like).split([self.program.pattern.n, self.program.pattern.m], dim=1)
            status, residual, steps = (t.to(like.device) for t in (found.status, found.residual, found.steps))
            return Solution(value, status, residual, steps, int(found.evaluations))

        return unpack(solve_conic(self.family, theta, Report(on_failure, unpack), self.adjoint))


def recorded_by(values: Sequence[Tensor], found: Tensor) -> Tensor:
    """`found`, connected to `values` in autograd's graph; gradients are zero if it does not depend on them."""
    if found.requires_grad or not torch.is_grad_enabled():
        return found
    wanted = [v for v in values if v.requires_grad]
    # Sums over empty slices: zero times an entry, which may be infinite, could be NaN.
    return found + sum(v.reshape(-1)[:0].sum() for v in wanted) if wanted else found


def _described(program: CanonicalProgram) -> str:
    cones = program.cones
    counts = {
        "second-order": len(cones.second_order),
        "semidefinite": len(cones.semidefinite),
        "exponential": cones.exponential,
        "power": len(cones.powers),
    }
    return ", ".join(f"{count} {name}" for name, count in counts.items() if count)


# ------------------------------------------------------------------------------------------- checks of values


def checked_batch(values: Sequence[Any], slots: Sequence[ParameterSlot]) -> int | None:
    """The number of samples, None if no value has a batch; raises TypeError / ValueError for invalid values."""
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
    for value, slot in zip(values, slots):
        if slot.promises:
            _check_attributes(value, slot)
    return next(iter(batches.values()), None)


def _check_attributes(value: Tensor, slot: ParameterSlot) -> None:
    """Raise ValueError if a sample violates what its parameter declares, since convexity may depend on that."""
    if is_wrapped(value):  # step out of the transforms, so that all samples that they map are checked
        outside(partial(_checked, slot), value)
    else:
        _checked(slot, value.detach())


def _checked(slot: ParameterSlot, value: Tensor) -> Tensor:
    """One zero per sample; raises ValueError as `_check_attributes`."""
    lead = value.shape[: value.ndim - len(slot.shape)]
    samples = value.reshape(math.prod(lead), *slot.shape)
    for wrong, says in _broken(slot, samples):
        if bool(wrong.any()):
            i = int(wrong.nonzero()[0, 0])
            where = f" in sample {i}" if lead else ""
            raise ValueError(f"parameter {slot.name} {says(samples[i])}{where}")
    return value.new_zeros(lead)


def _broken(slot: ParameterSlot, samples: Tensor) -> Iterator[tuple[Tensor, Callable[[Tensor], str]]]:
    """For each declared property, which `samples` `(N, *shape)` violate it, and a function to describe one."""
    rows = samples.flatten(1) if slot.shape else samples.unsqueeze(1)
    if slot.sign:
        signed = slot.sign * rows
        kinds = ("positive", "negative")[:: slot.sign]
        kind = kinds[0] if slot.strict else f"not to be {kinds[1]}"
        wrong = signed <= 0 if slot.strict else signed < 0
        yield (
            wrong.any(1),
            lambda x: f"is declared {kind}; its value has {slot.sign * float((slot.sign * x).min()):.3g}",
        )
    if slot.is_log:
        yield (rows <= 0).any(1), lambda x: f"of a geometric program must be positive; it has {float(x.min()):.3g}"
    if slot.bounds is not None:
        low, high = (bound.to(rows) for bound in slot.bounds)
        yield (
            ((rows < low) | (rows > high)).any(1),
            lambda x: f"is declared to have bounds; its value is out of them by {_beyond(x, low, high):.3g}",
        )
    if slot.absent is not None:
        off = columns_of(rows, slot.absent.to(rows.device))
        yield (
            (off != 0).any(1),
            lambda x: f"is declared {slot.kind}; off its pattern it has {_largest(x.flatten()[slot.absent]):.3g}",
        )
    if slot.symmetric:
        size, gap = samples.abs().amax((1, 2)), (samples - samples.mT).abs().amax((1, 2))
        yield (
            gap > 1e-4 * size,
            lambda x: f"is declared symmetric; it differs from its transpose by {_largest(x - x.mT):.3g}",
        )
    if slot.definite:
        word = "positive" if slot.definite > 0 else "negative"
        yield (
            _indefinite(slot.definite * (samples + samples.mT) / 2),
            lambda x: f"is declared {word} semidefinite; an eigenvalue of its value is {_extreme(slot, x):.3g}",
        )


def _indefinite(samples: Tensor) -> Tensor:
    """Which of the symmetric matrices `(N, n, n)` are finite, but not positive semidefinite up to rounding."""
    size = samples.abs().amax((1, 2)).clamp(min=torch.finfo(samples.dtype).tiny)
    slack = torch.finfo(samples.dtype).eps ** 0.6 * size
    shifted = samples + slack[:, None, None] * torch.eye(
        samples.shape[1], dtype=samples.dtype, device=samples.device
    )
    return (torch.linalg.cholesky_ex(shifted).info != 0) & samples.isfinite().all(2).all(1)


def _extreme(slot: ParameterSlot, x: Tensor) -> float:
    return slot.definite * float(torch.linalg.eigvalsh(slot.definite * (x + x.mT) / 2)[0])


def _beyond(x: Tensor, low: Tensor, high: Tensor) -> float:
    return float(torch.maximum(low - x.flatten(), x.flatten() - high).max())


def _largest(x: Tensor) -> float:
    """The entry of largest size."""
    return float(x.flatten()[x.abs().argmax()])
