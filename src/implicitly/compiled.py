"""A whole solve as one graph of `torch.compile`."""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from implicitly.implicit import Condition, search, users_line
from implicitly.iterate import Found, Solver

# Graphs kept; each keeps its function, and so its parameters, alive.
CAPACITY = 16

_graphs: OrderedDict[Hashable, Callable[..., Found]] = OrderedDict()
_lock = threading.Lock()


class CompileWarning(UserWarning):
    """A solve could not be compiled and runs eagerly."""


def compiled_search(key: Hashable) -> Callable[..., Found]:
    """`search` as one graph, kept under `key`, the solver, and the shapes and dtypes of what it is called with.

    `key` must name everything else that decides what the graph computes: the function, its layout, its static
    arguments. Where no graph can be made, a `CompileWarning` says why and the eager loop runs.
    """

    def run(
        solver: Solver, condition: Condition, z0: Tensor, theta: tuple[Tensor, ...], r0: Tensor | None = None
    ) -> Found:
        # Imported on first use: the compiler takes as long to import as all of torch.
        from torch._dynamo.exc import TorchDynamoException
        from torch._inductor.exc import InductorError

        r0 = condition.residual(z0, *theta) if r0 is None else r0
        shapes = tuple((tuple(t.shape), t.stride(), t.dtype, t.device) for t in (z0, *theta))
        full_key = (key, solver, shapes)
        with _lock:
            graph = _graphs.get(full_key)
            if graph is None:
                graph = _graphs[full_key] = _compile(solver, condition)
            _graphs.move_to_end(full_key)
            while len(_graphs) > CAPACITY:
                _graphs.popitem(last=False)
        try:
            # Detached: whether a gradient is wanted is no reason to compile again.
            return Found(*graph(*(t.detach() for t in (z0, r0, *theta))))
        except (TorchDynamoException, InductorError, AssertionError) as error:
            # Nested loops end in a bare AssertionError of the compiler. If f is wrong, the eager loop says so.
            reason = (str(error).strip() or "no reason given").splitlines()[0]
            warnings.warn(
                f"{condition.name} with {type(solver).__name__}: compile=True could not make one graph "
                f"({type(error).__name__}: {reason}); the eager loop runs instead",
                CompileWarning,
                stacklevel=users_line(),
            )
            _graphs[full_key] = lambda z0, r0, *theta: search(solver, condition, z0, theta, r0)
            return search(solver, condition, z0, theta, r0)

    return run


def _compile(solver: Solver, condition: Condition) -> Callable[..., Found]:
    def solve(z0: Tensor, r0: Tensor, *theta: Tensor) -> Found:
        return search(solver, condition, z0, theta, r0)

    # The compiler keeps its graphs on the code object: one of its own for each condition.
    solve.__code__ = solve.__code__.replace(co_name=f"solve_{condition.name}")
    return torch.compile(solve, fullgraph=True, options={"cpp_wrapper": True})
