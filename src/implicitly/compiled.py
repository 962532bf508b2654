"""A whole solve as one graph of `torch.compile`."""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from implicitly.implicit import Condition, search, users_line
from implicitly.iterate import Found, Solver

# Graphs kept; each keeps its function, and so its parameters, alive.
CAPACITY = 16

_graphs: OrderedDict[Hashable, Callable[..., Any] | None] = OrderedDict()
_lock = threading.Lock()


class CompileWarning(UserWarning):
    """A solve could not be compiled and runs eagerly."""


def run_as_graph(name: str, key: Hashable, function: Callable[..., Any], *tensors: Tensor) -> Any:
    """`function(*tensors)` as one graph, kept under `key` and the shapes and dtypes of `tensors`; None where no
    graph can be had, which a `CompileWarning` that begins with `name` tells once.

    `key` must name everything else that decides what the graph computes: the user's function, its layout, its
    static arguments, the solver. A graph in the cache runs in place of another `function` of the same key.
    """
    shapes = tuple((tuple(t.shape), t.stride(), t.dtype, t.device) for t in tensors)
    full_key = (key, shapes)
    with _lock:
        if full_key not in _graphs:
            _graphs[full_key] = _compile(function)
        graph = _graphs[full_key]
        _graphs.move_to_end(full_key)
        while len(_graphs) > CAPACITY:
            _graphs.popitem(last=False)
    if graph is None:
        return None
    # Imported on first use: the compiler takes as long to import as all of torch.
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import InductorError

    try:
        # Detached: whether a gradient is wanted is no reason to compile again.
        return graph(*(t.detach() for t in tensors))
    except (TorchDynamoException, InductorError, AssertionError) as error:
        # Loops that it cannot nest end in a bare AssertionError of the compiler. If f is wrong, the eager loop
        # says so.
        warnings.warn(
            f"{name}: compile=True could not make one graph ({type(error).__name__}: {_reason(error)}); the eager "
            "loop runs instead",
            CompileWarning,
            stacklevel=users_line(),
        )
        _graphs[full_key] = None
        return None


def _reason(error: BaseException) -> str:
    """What an error says first: its first line, and the next one where that only announces it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no reason given"]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])


def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    def solve(*tensors: Tensor) -> Any:
        return function(*tensors)

    # The compiler keeps its graphs on the code object: one of its own for each function.
    solve.__code__ = solve.__code__.replace(co_name="solve_as_graph")
    return torch.compile(solve, fullgraph=True, dynamic=False, options={"cpp_wrapper": True})


def compiled_search(key: Hashable) -> Callable[..., Found]:
    """`search` as one graph, kept under `key`, the solver, and the shapes and dtypes of what it is called with.

    Where no graph can be made, or none that is right, a `CompileWarning` says why and the eager loop runs.
    """

    def run(
        solver: Solver, condition: Condition, z0: Tensor, theta: tuple[Tensor, ...], r0: Tensor | None = None
    ) -> Found:
        r0 = condition.residual(z0, *theta) if r0 is None else r0
        name = f"{condition.name} with {type(solver).__name__}"
        if solver.nests:
            warnings.warn(
                f"{name}: compile=True is for solvers whose steps have no loop of their own; graphs of loops in "
                "loops compute wrong numbers in PyTorch 2.13. The eager loop runs instead",
                CompileWarning,
                stacklevel=users_line(),
            )
            return search(solver, condition, z0, theta, r0)

        def solve(z0: Tensor, r0: Tensor, *theta: Tensor) -> Found:
            return search(solver, condition, z0, theta, r0)

        found = run_as_graph(name, (key, solver), solve, z0, r0, *theta)
        return search(solver, condition, z0, theta, r0) if found is None else Found(*found)

    return run
