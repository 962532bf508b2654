"""Where the time goes for each speed goal: f, other operations by kind, the graph, and Python."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity

import implicitly as im
from benchmarks import fixed_point, ode, qp
from benchmarks.cells import counted
from benchmarks.harness import Effort, Row, Spread, alternate
from benchmarks.programs import Programs, draw

PEER = "the goal leaves"
PACKAGES = ("implicitly", "torch", "torchdeq", "torchdiffeq", "qpth", "cvxpylayers")

CAPTION = """\
The cases of the other tables that have a goal of speed. f: its calls alone, as many of them; with a gradient,
its products, too. The rest: what the solve takes besides, by the processor time that torch.profiler gives to
operations; what no operation takes is Python's, and that of calling them. The goal leaves: what all of it may
take by the goal, beside f or the peer in the same run. What stands in the way of diffrax's times for the ODE is
in the rows of the same solves, which are held against torchdiffeq's. Medians of {rounds} rounds in alternation
(least to greatest)."""

# Parts of the names of operations for each kind, in the order in which they are looked up.
KINDS = {
    "graph": ("Compiled", "inductor"),
    "factorisations": ("cholesky", "triangular", "lu_", "solve"),
    "products": ("mm", "linear", "dot", "matmul"),
    "convolutions": ("conv",),
    "copies": ("copy", "clone", "cat", "stack", "index", "pad", "fill", "zero"),
}
Run = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """A solve, the calls of f `alone` that it contains, and its `goal`.

    The goal is how many times faster than the `peer` it should be or, without a peer, how many times as long as f
    alone it may take.
    """

    name: str
    run: Run
    alone: Run | None
    peer: Run | None
    goal: float

    def row(self, effort: Effort) -> Row:
        """The row of the table that shows where its time goes."""
        runs = {"run": self.run, "alone": self.alone, "peer": self.peer}
        times = alternate({name: run for name, run in runs.items() if run is not None}, effort.rounds)
        spreads = {name: Spread.of(seconds) for name, seconds in times.items()}
        whole = spreads["run"].median
        of_f = spreads["alone"].median if self.alone else 0.0
        left = spreads["peer"].median / self.goal if self.peer else of_f * self.goal
        spent, inside = by_kind(self.run), by_kind(self.alone) if self.alone else Counter()
        rest = {kind: max(seconds - inside[kind], 0.0) for kind, seconds in spent.items()}
        total = sum(rest.values()) or 1.0
        parts = {kind: seconds / total * max(whole - of_f, 0.0) for kind, seconds in rest.items()}
        parts = dict(sorted(parts.items(), key=lambda part: -part[1]))
        parts = {"f": of_f, **parts} if self.alone else parts
        shown = ", ".join(
            f"{kind} {1e3 * seconds:.3g}" for kind, seconds in parts.items() if seconds >= whole / 100
        )
        of = f"{self.goal:g} x f" if self.peer is None else f"peer / {self.goal:g}"
        numbers = {"seconds": times, "parts": parts, "left": left}
        met = whole <= left
        return Row(
            f"{self.name}, ms", f"{spreads['run'].show(1e3, 1)}: {shown}", f"{1e3 * left:.3g}", of, met, numbers
        )


def by_kind(run: Run) -> Counter[str]:
    """Seconds by kind of operation, and in Python."""
    for _ in range(3):
        run()
    with torch.profiler.profile(activities=[ProfilerActivity.CPU], acc_events=True) as seen:
        begin = time.perf_counter()
        run()
        whole = time.perf_counter() - begin
    spent: Counter[str] = Counter()
    for event in seen.key_averages():
        spent[kind_of(event.key)] += 1e-6 * event.self_cpu_time_total
    return spent + Counter({"Python": max(whole - spent.total(), 0.0)})


def kind_of(operation: str) -> str:
    """The kind of an operation that the profiler names."""
    fits = (kind for kind, names in KINDS.items() if any(name in operation for name in names))
    if not operation.startswith("aten::") and "Compiled" not in operation:
        return "Python"  # for example an autograd function
    return next(fits, "other operations")


def run(effort: Effort) -> list[Row]:
    """All rows of this benchmark."""
    print("profiles ...", flush=True)
    families = (fixed_points, compiled_cells, trajectories, programs)
    return [case.row(effort) for family in families for case in family(effort)]


def gradient_of(parameters: list[Tensor], solve: Callable[[], Tensor]) -> Run:
    """A run of a solve and its gradient by the parameters."""
    return lambda: torch.autograd.grad(solve().square().sum(), parameters)


def fixed_points(effort: Effort) -> Iterator[Case]:
    """The convolutional cell."""
    cell, z0, x = fixed_point.problem(32 if effort.full else 2)
    parameters = list(cell.parameters())
    gradient = partial(gradient_of, parameters)
    at = cell(cell(z0, x), x).detach()
    for name, most, faster in (("Anderson", 1.15, 1.25), ("Broyden", 1.3, 2.0)):
        solver, peer = fixed_point.SOLVERS[name], fixed_point.PEERS[name]
        products: list[int] = []
        adjoint = im.ImplicitAdjoint(
            rtol=fixed_point.RTOL, listen=lambda found, products=products: products.append(int(found.evaluations))
        )
        solve = partial(im.fixed_point, cell, z0, x, solver=solver, adjoint=adjoint)

        with counted(cell) as count:
            gradient(lambda solve=solve: solve().value)()
        forward = count() - 1

        def alone(backward: int, calls: int) -> None:
            with torch.no_grad():
                for _ in range(calls):
                    cell(at, x)
            if backward:
                z = at.requires_grad_()
                value = cell(z, x)
                for _ in range(backward):
                    torch.autograd.grad(value, z, at, retain_graph=True)
                torch.autograd.grad(value, parameters, at)

        ours = torch.no_grad()(lambda solve=solve: solve().value)
        yield Case(f"{name}: forward", ours, partial(alone, 0, forward), None, most)
        theirs = gradient(partial(fixed_point.theirs, peer, cell, z0, x))
        whole = gradient(lambda solve=solve: solve().value)
        yield Case(f"{name}: exact gradient", whole, partial(alone, products[0], forward), theirs, faster)


def compiled_cells(effort: Effort) -> Iterator[Case]:
    """The same cell compiled: in the eager loop, and in one graph of the whole solve."""
    if not effort.full:
        return
    cell, z0, x = fixed_point.problem(32)
    plain, fast = torch.no_grad(), torch.compile(cell)
    at = plain(lambda: fast(fast(z0, x), x))()

    def alone(calls: int) -> None:
        for _ in range(calls):
            fast(at, x)

    for name, most in (("Anderson", 1.1), ("Broyden", 1.2)):
        for how, f, compile in (("f compiled", fast, False), ("f compiled, one graph", cell, True)):
            solver = fixed_point.SOLVERS[name]
            solve = plain(partial(im.fixed_point, f, z0, x, solver=solver, compile=compile))
            yield Case(f"{name}: forward, {how}", solve, plain(partial(alone, solve().evaluations)), None, most)


def trajectories(effort: Effort) -> Iterator[Case]:
    """The network of the `ode` benchmark."""
    torch.manual_seed(0)
    f, y0, t = ode.VectorField(), torch.randn(128, 2), torch.tensor([0.0, 1.0])
    parameters = list(f.parameters())
    with counted(f) as count, torch.no_grad():
        ode.ours(f, y0, t)
    calls = count()

    def alone() -> None:
        for _ in range(calls):
            f(t[0], y0)

    gradient = partial(gradient_of, parameters)
    plain = torch.no_grad()
    theirs = partial(ode.theirs, f, y0, t)
    yield Case("ODE: forward", plain(partial(ode.ours, f, y0, t)), plain(alone), plain(theirs), 2.5)
    backsolve = partial(ode.ours, f, y0, t, im.BacksolveAdjoint())
    continuous = gradient(partial(ode.theirs_continuous, f, y0, t))
    yield Case("ODE: continuous adjoint", gradient(backsolve), None, continuous, 4.0)
    if effort.full:
        compiled = partial(ode.ours, f, y0, t, compile=True)
        yield Case("ODE: forward, compile=True", plain(compiled), None, plain(theirs), 8.0)
        yield Case("ODE: exact gradient, compile=True", gradient(compiled), None, gradient(theirs), 5.0)


def programs(effort: Effort) -> Iterator[Case]:
    """The programs of the `qp` benchmark."""
    sizes = (128, 50, 50, 10) if effort.full else (4, 6, 6, 2)
    yield from quadratic("QP", draw(*sizes), {}, 5.0)
    if effort.full:
        yield from quadratic("QP, compile=True", draw(*sizes), {"compile": True}, 8.0)
        args, layer = draw(*sizes), qp.layer_of(*sizes[1:])
        weights = weights_of(args)
        both = partial(qp.gradient, qp.ours, args, weights)
        peer = partial(qp.gradient, layer, args, weights)
        yield Case("QP beside cvxpylayers: forward and gradient", both, None, peer, 30.0)
    shared = draw(4096 if effort.full else 8, 20, 40, 0, shared=True)[:4]
    yield from quadratic("QP of shared matrices", shared, {"solver": im.ADMM()}, 20.0)


def quadratic(name: str, args: Programs, options: dict[str, Any], goal: float) -> Iterator[Case]:
    """Both passes of a batch of quadratic programs, compared with qpth."""
    plain, weights = torch.no_grad(), weights_of(args)
    ours = partial(qp.ours, **options)
    yield Case(f"{name}: forward", plain(partial(ours, *args)), None, plain(partial(qp.qpth, *args)), goal)
    runs = (partial(qp.gradient, solve, args, weights) for solve in (ours, qp.qpth))
    yield Case(f"{name}: forward and gradient", next(runs), None, next(runs), goal)


def weights_of(args: Programs) -> Tensor:
    """Random weights for the solutions."""
    p = args[1]
    return torch.randn(p.shape, generator=torch.Generator().manual_seed(2), dtype=p.dtype)
