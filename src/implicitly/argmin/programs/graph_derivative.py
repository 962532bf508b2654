"""The backward pass of a quadratic program as one graph, which reuses the factors of the forward solve."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor

from implicitly.argmin.programs.derivative import Jacobian, StructuredSolver
from implicitly.argmin.programs.kkt import jacobian_product
from implicitly.compiled import Make, is_as_claimed, run_as_graph
from implicitly.condition import Condition
from implicitly.host import maybe_any
from implicitly.implicit import search
from implicitly.iterate import Found, Proposal, Solver
from implicitly.linear import Affine, LinearSolver
from implicitly.solution import is_success

# The number of steps in a graph, which always takes all of them.
STEPS = 2


@dataclass(frozen=True, eq=False)
class _ByFactors(LinearSolver):
    """Iterative refinement with the inverse of the transposed `jacobian`: the first step is the solution."""

    recurrent: ClassVar[bool] = False
    jacobian: Jacobian

    def start(self, F: Affine, z: Tensor, r: Tensor) -> tuple[Tensor, ...]:
        """The memory: nothing."""
        return ()

    def propose(self, F: Affine, k: int | Tensor, z: Tensor, r: Tensor, memory: Any) -> Proposal:
        """The solution; in a further step, its correction for the errors of rounding and of the factors."""
        step = -self.jacobian.solve(r, transposed=True)
        return Proposal(z + step, (), r - F.operator(step), calls=1)


def solve_as_graph(
    solver: Solver, condition: Condition, u0: Tensor, theta: tuple[Tensor, ...], b: Tensor
) -> Found:
    """As `implicit.search`, for the linear system of reverse mode at the solution of a program.

    One step applies the factors, a second one refines. Where that is not enough, at degenerate samples, and for
    several right-hand sides per sample, everything is solved eagerly.
    """
    assert isinstance(solver, StructuredSolver)
    jacobian, found = solver.known[0], None
    assert isinstance(jacobian, Jacobian)
    if len(b) == len(jacobian.alpha) and not maybe_any(jacobian.degenerate):
        tensors: list[Tensor] = []
        form = taken_apart(jacobian, tensors)
        # The graph outlives the solve: with its `bind` it would keep all that the solve recorded alive.
        blank = replace(condition.bare(), bind=_unbound)
        settings = {"rtol": solver.rtol, "atol": solver.atol, "max_steps": min(STEPS, solver.max_steps)}

        def make(_: object) -> Callable[..., Found]:
            return lambda b, *tensors: _solve(
                _ByFactors(jacobian=put_together(form, tensors), **settings), blank, b
            )

        right = lambda found: is_as_claimed(solver, condition, theta, found)  # noqa: E731
        name = f"{condition.name} with {solver.label or type(solver).__name__}"
        found = run_as_graph(
            name, (condition.name, form, *settings.values()), Make(make), b, *tensors, varies=True, is_right=right
        )
    if found is None or not bool(is_success(found[1]).all()):
        return search(solver, condition, u0, theta, b)
    found = Found(*found)
    return found._replace(evaluations=torch.tensor(int(found.evaluations) + 1, device="cpu"))  # to verify it


def _unbound(*theta: Tensor) -> NoReturn:
    raise RuntimeError("the operator is known where the graph is made")


def _solve(solver: _ByFactors, condition: Condition, b: Tensor) -> Found:
    """Solve -J'u = b for u."""
    J = solver.jacobian

    def operator(u: Tensor) -> Tensor:
        return -jacobian_product(J.program, J.alpha, J.beta, u.unsqueeze(1), transposed=True).squeeze(1)

    condition = replace(condition, bind=lambda: operator)
    return search(solver, condition, torch.zeros_like(b), (b,), b, unrolled=True)


def taken_apart(part: Any, tensors: list[Tensor]) -> Hashable:
    """The structure of a dataclass of tensors and of such dataclasses; its tensors are appended to `tensors`."""
    if isinstance(part, Tensor):
        tensors.append(part)
        return len(tensors) - 1
    return type(part), *(taken_apart(getattr(part, f.name), tensors) for f in fields(part))


def put_together(form: Any, tensors: tuple[Tensor, ...]) -> Any:
    """Rebuild the dataclass whose `form` and `tensors` `taken_apart` gave."""
    if isinstance(form, int):
        return tensors[form]
    kind, *parts = form
    return kind(*(put_together(p, tensors) for p in parts))
