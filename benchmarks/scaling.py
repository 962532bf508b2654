"""How costs grow with the batch, the dimension and the number of steps, next to the obvious peer for each."""

from __future__ import annotations

import copy
import importlib.metadata
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import implicitly as im
from benchmarks.cells import DenseCell, counted, relative_error, unrolled_gradient
from benchmarks.harness import Effort, Row, Spread, alternate, outcomes, peak_mib, ratios
from benchmarks.ode import VectorField, kept_bytes, ours, theirs
from benchmarks.peers import TORCHDEQ, TorchDEQ
from benchmarks.programs import draw
from benchmarks.qp import gradient, gradient_error, qpth
from implicitly.viz import saved_bytes

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torchdiffeq

PEER = "peer"
PACKAGES = ("implicitly", "torch", "torchdiffeq", "torchdeq", "qpth")
TORCHDIFFEQ, QPTH = (f"{name} {importlib.metadata.version(name)}" for name in ("torchdiffeq", "qpth"))
RTOL, MAX_STEPS = 1e-3, 50

CAPTION = """\
A solve and its exact gradient, ms: eager, and as graphs by compile=True. Calls of f are those of both passes.
Peak: the most MiB of tensors alive at once in both passes. ODE by batch and dimension: network, but for its
width, and tolerances of the table of differential equations; by steps: that network, batch 32, Euler from 0 to
1, beside torchdiffeq's direct gradient, with the MiB kept between the passes. Fixed point: tanh(linear(z) + x)
by Anderson to relative 1e-3. QP: as many inequalities as unknowns, float64. Errors: of the gradient, as in the
family's own table; by steps, against float64 with the same steps. Medians of at most {rounds} rounds in
alternation (least to greatest)."""


@dataclass(frozen=True)
class Point:
    """One size of one problem.

    Attributes:
        what: the problem and its size.
        runs: by name, both passes: ours ("eager" and others) and the peer's; each returns the gradient.
        error: maps a gradient to its error.
        f: the module whose calls are counted in eager runs.
        memory: what is measured, "peak" or "kept", and the function that returns it for one of the runs, in MiB.
    """

    what: str
    peer: str
    runs: Mapping[str, Callable[[], Sequence[Tensor]]]
    error: Callable[[Sequence[Tensor]], float]
    memory: tuple[str, Callable[[str], float]]
    f: nn.Module | None = None

    def row(self, rounds: int) -> Row:
        """The row of the table with all measurements."""
        mine = [who for who in self.runs if who != self.peer]
        numbers: dict[str, dict[str, Any]] = {who: {} for who in self.runs}
        values, failed = outcomes({who: partial(self._first, who, numbers[who]) for who in self.runs}, mine)
        runs = {who: run for who, run in self.runs.items() if who in values}
        seconds = alternate(runs, rounds, warm=True)
        for who in runs:
            numbers[who] |= {"error": self.error(values[who]), "seconds": seconds[who]}
        return _row(self.what, self.peer, numbers, failed)

    def _first(self, who: str, numbers: dict[str, Any]) -> Sequence[Tensor]:
        """The gradient; outside of graphs, also measures what it needs besides time."""
        if who in ("eager", self.peer):
            kind, memory = self.memory
            numbers[f"{kind}_MiB"] = memory(who)
            if self.f is not None:
                with counted(self.f) as count:
                    gradient = self.runs[who]()
                numbers["calls"] = count()
                return gradient
        return self.runs[who]()


def _row(what: str, peer: str, numbers: dict[str, dict[str, Any]], failed: Mapping[str, str]) -> Row:
    """The row of medians and spreads."""
    shown = {who: _show(found) for who, found in numbers.items() if who not in failed} | failed
    texts = []
    for who in numbers:
        if who != peer:
            faster = ""
            if not failed:
                ratio = ratios(numbers[peer]["seconds"], numbers[who]["seconds"])
                faster = f", {ratio.median:.2g} times faster"
            texts.append(f"{who} {shown[who]}{faster}")
    return Row(what, "; ".join(texts), f"{peer} {shown[peer]}", numbers=numbers)


def _show(found: Mapping[str, Any]) -> str:
    text = f"{Spread.of(found['seconds']).show(1e3, 1)}, error {found['error']:.0e}"
    if "calls" in found:
        text += f", {found['calls']} calls"
    for kind in ("peak", "kept"):
        if f"{kind}_MiB" in found:
            text += f", {kind} {found[f'{kind}_MiB']:.3g} MiB"
    return text


def run(effort: Effort) -> list[Row]:
    """All rows of this benchmark."""
    rows = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecation warnings inside the peers
        for points in (trajectories, steps, fixed_points, programs):
            print(f"{points.__name__.replace('_', ' ')} ...", flush=True)
            rows += points(effort)
    return rows


def peak(runs: Mapping[str, Callable[[], object]]) -> tuple[str, Callable[[str], float]]:
    """Peak memory while one of `runs` runs."""
    return "peak", lambda who: peak_mib(runs[who])


# --- Differential equations -------------------------------------------------------------------------------


def trajectories(effort: Effort) -> list[Row]:
    """By batch size, in 2 dimensions (both treat the batch as one system); by dimension, in a batch of 32."""
    shapes = [(batch, 2) for batch in sizes(effort, (1, 16, 256, 4096))]
    shapes += [(32, width) for width in sizes(effort, (2, 16, 128, 1024))]
    return [trajectory(*shape, effort).row(min(effort.rounds, 5)) for shape in shapes]


def trajectory(batch: int, width: int, effort: Effort) -> Point:
    """A trajectory with adaptive steps."""
    torch.manual_seed(0)
    f, y0, t = VectorField(width), torch.randn(batch, width), torch.tensor([0.0, 1.0])
    parameters = list(f.parameters())
    wide = copy.deepcopy(f).double()
    options: dict[str, Any] = {"solver": im.Dopri8(rtol=1e-12, atol=1e-13), "adjoint": im.UnrolledAdjoint()}
    exact = im.odeint(wide, y0.double(), t.double(), **options).value[-1].square().sum()
    by_parameters = list(torch.autograd.grad(exact, list(wide.parameters())))

    def both(solve: Callable[..., Tensor], **options: Any) -> Callable[[], Sequence[Tensor]]:
        return lambda: torch.autograd.grad(solve(f, y0, t, **options).square().sum(), parameters)

    runs = {"eager": both(ours), TORCHDIFFEQ: both(theirs)}
    if effort.full:
        runs["compile=True"] = both(ours, compile=True)
    error = partial(relative_error, exact=by_parameters)
    what = f"ODE, batch {batch}, {width} dimensions"
    return Point(what, TORCHDIFFEQ, runs, error, peak(runs), f)


def steps(effort: Effort) -> list[Row]:
    """By the number of constant steps."""
    return [
        constant_steps(count, effort).row(min(effort.rounds, 5 if count < 1000 else 1))
        for count in sizes(effort, (10, 100, 1000, 10_000))
    ]


def constant_steps(count: int, effort: Effort) -> Point:
    """Euler's method; unrolled, ours keeps as much as torchdiffeq."""
    torch.manual_seed(0)
    f, y0, t = VectorField(), torch.randn(32, 2), torch.tensor([0.0, 1.0])

    def mine(
        f: nn.Module, y0: Tensor, t: Tensor, adjoint: Any = im.RecursiveCheckpointAdjoint(), **options: Any
    ) -> Tensor:
        return im.odeint(f, y0, t, solver=im.Euler(dt=1 / count), adjoint=adjoint, **options).value[-1]

    def direct(f: nn.Module, y0: Tensor, t: Tensor) -> Tensor:
        return torchdiffeq.odeint(f, y0, t, method="euler", options={"step_size": 1 / count})[-1]

    def by_parameters(solve: Callable[..., Tensor], f: nn.Module, y0: Tensor, t: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(solve(f, y0, t).square().sum(), list(f.parameters())))

    solves: dict[str, Callable[..., Tensor]] = {
        "eager": mine,
        "unrolled": partial(mine, adjoint=im.UnrolledAdjoint()),
        TORCHDIFFEQ: direct,
    }
    if effort.full:
        solves["compile=True"] = partial(mine, compile=True)
    runs = {who: partial(by_parameters, solve, f, y0, t) for who, solve in solves.items()}
    exact = by_parameters(mine, copy.deepcopy(f).double(), y0.double(), t.double())

    def kept(who: str) -> float:
        measure = kept_bytes if who == "eager" else saved_bytes
        return measure(lambda: solves[who](f, y0, t)) / 2**20

    return Point(f"ODE, {count} steps", TORCHDIFFEQ, runs, partial(relative_error, exact=exact), ("kept", kept), f)


# --- Fixed points -----------------------------------------------------------------------------------------


def fixed_points(effort: Effort) -> list[Row]:
    """By batch size, with 64 units; by dimension, in a batch of 32."""
    shapes = [(batch, 64) for batch in sizes(effort, (1, 16, 256, 4096))]
    shapes += [(32, width) for width in sizes(effort, (2, 16, 128, 1024))]
    return [fixed_point(*shape, effort).row(min(effort.rounds, 5)) for shape in shapes]


def fixed_point(batch: int, width: int, effort: Effort) -> Point:
    """A dense cell, by Anderson acceleration."""
    torch.manual_seed(0)
    cell, x, cotangent = DenseCell(width), torch.randn(batch, width), torch.randn(batch, width)
    wide = (t.double() for t in (x, cotangent))
    _, exact = unrolled_gradient(copy.deepcopy(cell).double(), *wide)
    x.requires_grad_()
    inputs, z0 = [x, *cell.parameters()], torch.zeros_like(x)
    peer = TorchDEQ("anderson", RTOL, MAX_STEPS)

    def mine(compile: bool = False) -> Tensor:
        solver, adjoint = im.Anderson(rtol=RTOL, max_steps=MAX_STEPS), im.ImplicitAdjoint(rtol=RTOL)
        options: dict[str, Any] = {"solver": solver, "adjoint": adjoint, "on_failure": "raise", "compile": compile}
        return im.fixed_point(cell, z0, x, **options).value

    def both(solve: Callable[[], Tensor]) -> Callable[[], Sequence[Tensor]]:
        return lambda: torch.autograd.grad(solve(), inputs, cotangent)

    runs = {"eager": both(mine), TORCHDEQ: both(lambda: peer(lambda z: cell(z, x), z0))}
    if effort.full:
        runs["compile=True"] = both(partial(mine, compile=True))
    what = f"fixed point, batch {batch}, {width} units"
    return Point(what, TORCHDEQ, runs, partial(relative_error, exact=exact), peak(runs), cell)


# --- Quadratic programs -----------------------------------------------------------------------------------


def programs(effort: Effort) -> list[Row]:
    """By batch size, with 10 unknowns; by dimension, in a batch of 8."""
    shapes = [(batch, 10) for batch in sizes(effort, (1, 16, 256, 4096))]
    shapes += [(8, n) for n in sizes(effort, (2, 16, 128, 1024))]
    return [program(*shape, effort).row(min(effort.rounds, 3)) for shape in shapes]


def program(batch: int, n: int, effort: Effort) -> Point:
    """Quadratic programs, each sample with its own matrices."""
    args = draw(batch, n, n, 0)
    weights = torch.randn(batch, n, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def mine(*args: Tensor, **options: Any) -> Tensor:
        return im.qp(*args, **options).value

    solves: dict[str, Callable[..., Tensor]] = {"eager": mine, QPTH: qpth}
    if effort.full:
        solves["compile=True"] = partial(mine, compile=True)
    runs = {who: partial(gradient, solve, args, weights) for who, solve in solves.items()}

    def error(found: Sequence[Tensor]) -> float:
        return gradient_error(found, args, weights)

    return Point(f"QP, batch {batch}, {n} unknowns", QPTH, runs, error, peak(runs))


def sizes(effort: Effort, whole: tuple[int, ...]) -> tuple[int, ...]:
    """All sizes, or the smallest in a smoke test."""
    return whole if effort.full else whole[:1]
