"""Constant steps inside a graph that the user compiles: `torch.compile(model)`.

Their times are known before the solve, so nothing has to be decided in it: the steps become plain operations of
the graph, one after the other, and autograd differentiates them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from implicitly.graph_break import LONGEST
from implicitly.ode.adjoints import RecursiveCheckpointAdjoint
from implicitly.ode.integrate import Integrated
from implicitly.ode.method import Memory, Method
from implicitly.ode.planned import Planned, arrived, plan, take
from implicitly.ode.problem import Problem
from implicitly.ode.reversible_heun import ReversibleHeun
from implicitly.ode.runge_kutta import ExplicitRungeKutta
from implicitly.solution import Status
from implicitly.unrolled import UnrolledAdjoint


def steps_of(times: tuple[float, ...], length: float, limit: int, single: bool) -> tuple[tuple[Any, ...], ...]:
    """The steps of `plan`, each as the fields of `Planned`; empty if it is None."""
    found = plan(times, length, limit, single)
    return () if found is None else tuple(tuple(step) for step in found.steps())


# This is what `torch.compiler.assume_constant_result` does, but that would import the whole compiler.
steps_of._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def _constant(x: float) -> float:
    """`x` as a constant of the graph: the tracer makes numbers that vary symbolic, but never the keys of a set."""
    return next(iter({float(x)}))


def _steps(method: Method, times: Any, single: bool) -> tuple[Planned, ...]:
    assert method.dt is not None
    length, limit = _constant(min(method.dt, method.dt_max)), int(_constant(min(LONGEST, method.max_steps)))
    steps = steps_of(tuple(_constant(t) for t in times), length, limit, single)
    return tuple(Planned(*step) for step in steps)


def is_unrollable(method: Any, adjoint: Any, t: Any) -> bool:
    """Whether a solve through times t takes plain steps whose number is known in advance."""
    return (
        isinstance(method, ExplicitRungeKutta | ReversibleHeun)
        and method.dt is not None
        and not method.tstops
        and method.progress is None
        and isinstance(adjoint, RecursiveCheckpointAdjoint | UnrolledAdjoint)
        and isinstance(t, list | tuple)
        and all(isinstance(x, float | int) for x in t)
        and all(len(_steps(method, t, single)) > 0 for single in (True, False))
    )


def solve_in_graph(method: Method, problem: Problem, times: Any, forget: bool) -> tuple[Integrated, int]:
    """The trajectory through the numbers `times`, recorded by autograd, and the number of calls of f.

    With `forget`, intermediate results are recomputed in the backward pass: of N steps, only the states after
    every sqrt(N) are kept.
    """
    steps = _steps(method, times, problem.layout.work_dtype == torch.float32)
    t = problem.rows(problem.times)
    F = problem.field(*problem.theta)
    assert problem.k0 is not None  # as the graph that this becomes part of is not ours
    y, memory = problem.y0, method.start(F, t[:, 0], problem.y0, problem.k0)
    size = math.ceil(len(steps) ** 0.5) if forget and torch.is_grad_enabled() else len(steps)
    outputs, calls = [y.unsqueeze(1)], F.calls
    for i in range(0, len(steps), size):
        block = partial(_advance, method, problem, steps[i : i + size])
        if size < len(steps):
            y, memory, passed, count = checkpoint(block, y, memory, use_reentrant=False)
        else:
            y, memory, passed, count = block(y, memory)
        outputs, calls = [*outputs, *passed], calls + count
    # Laid out with the times first, as users get it, since the compiler does not copy everywhere it should.
    values = torch.cat([x.transpose(0, 1) for x in (*outputs, y.unsqueeze(1))]).transpose(0, 1)
    status = torch.where(y.detach().isfinite().all(1), int(Status.CONVERGED), int(Status.NON_FINITE))
    return arrived(values, t[:, -1], status, len(steps), steps[-1].dt), calls


def _advance(
    method: Method, problem: Problem, steps: Sequence[Planned], y: Tensor, memory: Memory
) -> tuple[Tensor, Memory, list[Tensor], int]:
    """Take some steps: the state and memory after them, the outputs `(B, W, n)`, and the number of calls of f."""
    F, nodes = problem.field(*problem.theta), method.nodes
    assert nodes is not None
    outputs: list[Tensor] = []
    for step in steps:
        stages = torch.stack([problem.times.new_full((y.shape[0],), step.t + c * step.dt) for c in nodes])
        y, memory, passed = take(method, F, problem.times, step, F.f_times(stages), y, memory)
        outputs += passed
    return y, memory, outputs, F.calls
