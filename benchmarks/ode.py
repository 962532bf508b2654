"""Non-stiff differential equations: solutions and gradients compared with torchdiffeq, torchode and diffrax."""

from __future__ import annotations

import copy
import importlib.metadata
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import implicitly as im
from benchmarks.cells import counted, relative_error
from benchmarks.elsewhere import Line, beside
from benchmarks.harness import Effort, Row, Spread, alternate, outcomes, peak_mib, ratios
from implicitly.viz import saved_bytes

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torchdiffeq

PEER = f"torchdiffeq {importlib.metadata.version('torchdiffeq')}, or the one named"
PACKAGES = ("implicitly", "torch", "torchdiffeq", "torchode")
TOLERANCE = 1e-5

CAPTION = """\
A network of 2, 64, 64 and 2 units with tanh, batch 128, t from 0 to 1, Dopri5 with relative and absolute tolerance
1e-5, float32, eager where nothing else is said. Errors: of the state, and relative of the gradient by the
parameters, against Dopri8 at 1e-12 in float64. By default the recording of so short a solve is kept; where it says
checkpointed, the steps are taken again. Peak: most of tensors alive at once, forward and backward. Medians of 3 x
{rounds} rounds in alternation (least to greatest)."""
# Takes the steps of any solve again.
CHECKPOINTED = im.RecursiveCheckpointAdjoint(keep_bytes=0)


class VectorField(nn.Module):
    """f(t, y) of a small network, `(B, width)` like y."""

    def __init__(self, width: int = 2) -> None:
        super().__init__()
        layers = nn.Linear(width, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, width)
        self.net = nn.Sequential(*layers)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.net(y)


def run(effort: Effort) -> list[Row]:
    """All rows of this benchmark."""
    print("trajectories ...", flush=True)
    torch.manual_seed(0)
    f, y0, t = VectorField(), torch.randn(128, 2), torch.tensor([0.0, 1.0])
    wide = copy.deepcopy(f).double()
    options = {"solver": im.Dopri8(rtol=1e-12, atol=1e-13), "adjoint": im.UnrolledAdjoint()}
    exact = im.odeint(wide, y0.double(), t.double(), **options).value[-1]
    gradient = list(torch.autograd.grad(exact.square().sum(), list(wide.parameters())))
    return [
        *forward(effort, f, y0, t, exact.detach()),
        *gradients(effort, f, y0, t, gradient),
        *beside_torchode(effort, f, y0, t, exact.detach(), gradient),
        *beside_diffrax(effort, f, y0, t, exact.detach(), gradient),
        *samples(effort),
        *memory(effort),
    ]


def ours(
    f: nn.Module, y0: Tensor, t: Tensor, adjoint: Any = im.RecursiveCheckpointAdjoint(), **options: Any
) -> Tensor:
    solver = im.Dopri5(rtol=TOLERANCE, atol=TOLERANCE)
    return im.odeint(f, y0, t, solver=solver, adjoint=adjoint, **options).value[-1]


def theirs(f: nn.Module, y0: Tensor, t: Tensor) -> Tensor:
    return torchdiffeq.odeint(f, y0, t, rtol=TOLERANCE, atol=TOLERANCE, method="dopri5")[-1]


def theirs_continuous(f: nn.Module, y0: Tensor, t: Tensor, **options: str) -> Tensor:
    return torchdiffeq.odeint_adjoint(
        f, y0, t, rtol=TOLERANCE, atol=TOLERANCE, method="dopri5", adjoint_options=options
    )[-1]


@torch.no_grad()
def forward(effort: Effort, f: nn.Module, y0: Tensor, t: Tensor, exact: Tensor) -> list[Row]:
    """A solve without gradients."""
    solves = {
        "ours": lambda: ours(f, y0, t),
        "compiled": lambda: ours(f, y0, t, compile=True),
        "theirs": lambda: theirs(f, y0, t),
    }
    texts, numbers = {}, {}
    calls = {}
    for who in ("ours", "theirs"):
        with counted(f) as count:
            solves[who]()
        calls[who] = count()
    calls["compiled"] = calls["ours"]  # of the same steps; a hook that counts would break the graph
    for who, solve in solves.items():
        error = float((solve().double() - exact).abs().max())
        numbers[who] = {"calls": calls[who], "error": error}

    def calls_alone() -> None:
        for _ in range(calls["ours"]):
            f(t[0], y0)

    times = alternate({"calls": calls_alone, **solves}, 3 * effort.rounds)
    faster = {who: ratios(times["theirs"], times[who]) for who in ("ours", "compiled")}
    for who in solves:
        numbers[who]["seconds"] = times[who]
        texts[who] = f"{Spread.of(times[who]).show(1e3, 1)}; {calls[who]} calls, error {numbers[who]['error']:.0e}"
    alone = Spread.of(times["calls"])
    return [
        Row("calls of f alone, ms", f"{alone.show(1e3, 1)}; {calls['ours']} calls", ""),
        Row(
            "forward, ms",
            f"{texts['ours']}; {faster['ours'].show()} times faster",
            texts["theirs"],
            "2.5 times faster",
            faster["ours"].median >= 2.5,
            numbers,
        ),
        Row(
            "forward, compile=True, ms",
            f"{texts['compiled']}; {faster['compiled'].show()} times faster",
            "",
            "8 times faster",
            faster["compiled"].median >= 8,
        ),
    ]


def gradients(effort: Effort, f: nn.Module, y0: Tensor, t: Tensor, exact: list[Tensor]) -> list[Row]:
    """A solve and the gradient by the parameters."""
    parameters = list(f.parameters())

    def gradient(solve: Callable[[], Tensor]) -> Callable[[], list[Tensor]]:
        return lambda: list(torch.autograd.grad(solve().square().sum(), parameters))

    runs = {
        "theirs": gradient(lambda: theirs(f, y0, t)),
        "by default": gradient(lambda: ours(f, y0, t)),
        "checkpointed": gradient(lambda: ours(f, y0, t, CHECKPOINTED)),
        "unrolled": gradient(lambda: ours(f, y0, t, im.UnrolledAdjoint())),
        "their adjoint": gradient(lambda: theirs_continuous(f, y0, t)),
        "their adjoint, seminorm": gradient(lambda: theirs_continuous(f, y0, t, norm="seminorm")),
        "backsolve": gradient(lambda: ours(f, y0, t, im.BacksolveAdjoint())),
    }
    errors, calls = {}, {}
    for who, compute in runs.items():
        with counted(f) as count:
            errors[who] = relative_error(compute(), exact)
        calls[who] = count()
    if effort.full:
        adjoints = {"checkpointed": CHECKPOINTED, "backsolve": im.BacksolveAdjoint()}
        for who, adjoint in adjoints.items():
            runs[graph := f"{who}, compile=True"] = gradient(partial(ours, f, y0, t, adjoint, compile=True))
            errors[graph] = relative_error(runs[graph](), exact)
            calls[graph] = calls[who]  # a hook that counts would break the graph
    peaks = {who: peak_mib(compute) for who, compute in runs.items() if "compile" not in who}  # seen eagerly only
    times = alternate(runs, 3 * effort.rounds)
    shown = {
        who: f"{Spread.of(times[who]).show(1e3, 1)}; {calls[who]} calls, error {errors[who]:.0e}"
        + (f", peak {peaks[who]:.1f} MiB" if who in peaks else "")
        for who in runs
    }
    rows = []
    goals = (
        ("by default", "theirs", 1.6),
        ("checkpointed", "theirs", 1.6),
        ("unrolled", "theirs", 2.0),
        *([("checkpointed, compile=True", "theirs", 5.0)] if effort.full else []),
        ("backsolve", "their adjoint", 4.0),
        *([("backsolve, compile=True", "their adjoint", None)] if effort.full else []),
        ("backsolve", "their adjoint, seminorm", None),
    )
    for who, peer, goal in goals:
        faster = ratios(times[peer], times[who])
        numbers = {
            name: {
                "error": errors[name],
                "calls": calls[name],
                "peak_MiB": peaks.get(name),
                "seconds": times[name],
            }
            for name in (who, peer)
        }
        what = f"exact gradient, {who}, ms".replace("exact gradient, backsolve", "continuous adjoint")
        text = f"{shown[who]}; {faster.show()} times faster"
        theirs_shown = shown[peer] + (", seminorm" if "seminorm" in peer else "")
        told = {} if goal is None else {"goal": f"{goal:g} times faster", "met": faster.median >= goal}
        rows.append(Row(what, text, theirs_shown, numbers=numbers, **told))
    return rows


def torchode_solve(f: nn.Module, y0: Tensor, t: Tensor) -> Tensor:
    """Solve with separate steps for each sample; the gradient is that of the steps, as autograd records them."""
    import torchode  # here, so that benchmarks.gpu, which borrows from this file, does without it

    term = torchode.ODETerm(f)
    control = torchode.IntegralController(atol=TOLERANCE, rtol=TOLERANCE, term=term)
    solver = torchode.AutoDiffAdjoint(torchode.Dopri5(term=term), control)
    problem = torchode.InitialValueProblem(y0=y0, t_eval=t.expand(len(y0), -1))
    return solver.solve(problem).ys[:, -1]


def beside_torchode(
    effort: Effort, f: nn.Module, y0: Tensor, t: Tensor, exact: Tensor, gradient: list[Tensor]
) -> list[Row]:
    """Compare with torchode: samples with their own steps, as in torchode, and as one system, as above."""
    parameters, name = list(f.parameters()), f"torchode {importlib.metadata.version('torchode')}"
    solves = {
        "by samples": lambda: ours(f, y0, t, batch_dims=1),
        "one system": lambda: ours(f, y0, t),
        "torchode": lambda: torchode_solve(f, y0, t),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        values, failed = outcomes(solves, ("by samples", "one system"))
    solves = {who: solves[who] for who in values}
    calls, errors = {}, {}
    for who, solve in solves.items():
        with counted(f) as count, torch.no_grad():
            errors["forward", who] = float((solve().double() - exact).abs().max())
            calls[who] = count()
    gradients = {
        who: lambda solve=solve: list(torch.autograd.grad(solve().square().sum(), parameters))
        for who, solve in solves.items()
    }
    for who, compute in gradients.items():
        errors["exact gradient", who] = relative_error(compute(), gradient)
    rows = []
    for part, runs in (
        ("forward", {who: torch.no_grad()(solve) for who, solve in solves.items()}),
        ("exact gradient", gradients),
    ):
        times = alternate(runs, 3 * effort.rounds)
        shown = {
            who: f"{Spread.of(times[who]).show(1e3, 1)}; {calls[who]} calls forward, error {errors[part, who]:.0e}"
            for who in solves
        }
        faster = {who: ratios(times["torchode"], times[who]) for who in times if "torchode" in times}
        for who in ("by samples", "one system"):
            text = shown[who] + (f"; {faster[who].show()} times faster" if faster else "")
            numbers = {w: {"seconds": times[w], "error": errors[part, w], "calls": calls[w]} for w in times}
            rows.append(
                Row(f"{part}, {who}, ms", text, f"{name}: {(shown | failed)['torchode']}", numbers=numbers)
            )
    return rows


def beside_diffrax(
    effort: Effort, f: nn.Module, y0: Tensor, t: Tensor, exact: Tensor, gradient: list[Tensor]
) -> list[Row]:
    """Compare with diffrax: both as one compiled program, in PyTorch and in JAX."""
    if not effort.full:
        return []
    parameters = list(f.parameters())
    problem = {"y0": y0, "t": t, "tolerance": TOLERANCE}
    problem |= {f"parameter{i}": p for i, p in enumerate(parameters)}

    def forward() -> list[Tensor]:
        with torch.no_grad():
            return [ours(f, y0, t, compile=True)]

    def by_parameters(adjoint: Any) -> Callable[[], list[Tensor]]:
        solve = partial(ours, f, y0, t, adjoint, compile=True)
        return lambda: list(torch.autograd.grad(solve().square().sum(), parameters))

    def off(found: Sequence[Tensor]) -> float:
        return float((found[0].double() - exact).abs().max())

    def wrong(found: Sequence[Tensor]) -> float:
        return relative_error(found[-len(gradient) :], gradient)

    exactly, backwards = (by_parameters(a) for a in (im.RecursiveCheckpointAdjoint(), im.BacksolveAdjoint()))
    lines = [
        Line("forward, compile=True, ms", "forward", forward, off, "not slower", 1.0),
        Line("exact gradient, compile=True, ms", "checkpointed", exactly, wrong, "not slower", 1.0),
        Line("continuous adjoint, compile=True, ms", "backsolve", backwards, wrong),
    ]
    return beside("jax_ode", "diffrax", problem, lines, 3 * effort.rounds, digits=1)


def samples(effort: Effort) -> list[Row]:
    """A batch with one sample 100 times as stiff: calls of f, weighted by the number of samples in each."""
    torch.manual_seed(0)
    rates = torch.ones(64, 1)
    rates[0] = 100.0
    y0, sizes = torch.randn(64, 2), []

    def f(t: Tensor, y: Tensor, rates: Tensor) -> Tensor:
        sizes.append(len(y))
        return torch.tanh(y) @ y.new_tensor([[-1.0, 1.0], [-1.0, -1.0]]) * rates

    def weighted(**options: Any) -> int:
        sizes.clear()
        im.odeint(f, y0, (0.0, 3.0), rates, solver=im.Dopri5(), **options)
        return sum(sizes)

    each, together = weighted(batch_dims=1, in_dims=0), weighted(batch_dims=0)
    text = f"{each} by samples, {together} as one system: {together / each:.1f} times fewer"
    numbers = {"each": each, "together": together}
    return [Row("calls of f, weighted by samples", text, "", "5 times fewer", together >= 5 * each, numbers)]


def memory(effort: Effort) -> list[Row]:
    """Bytes that a forward pass leaves for the backward pass, after few and after many steps."""
    y0 = torch.ones(10_000, requires_grad=True)
    counts = [10, 100, 1000, 10_000] if effort.full else [10, 100]

    def solve(steps: int) -> Tensor:
        return im.odeint(lambda t, y: -y, y0, (0.0, 1.0), solver=im.Euler(dt=1 / steps)).value[-1]

    sizes = {steps: kept_bytes(lambda steps=steps: solve(steps)) for steps in counts}
    text = ", ".join(f"{steps}: {size / 2**20:.2f}" for steps, size in sizes.items())
    first, last = counts[0], counts[-1]
    met = sizes[last] <= sizes[first] * (last / first) ** 0.5
    return [Row("MiB kept for backward, by steps", text, "", "as the square root", met, {"bytes": sizes})]


def kept_bytes(solve: Callable[[], Tensor]) -> int:
    """What autograd saves while `solve` runs, and what `RecursiveCheckpointAdjoint` keeps besides.

    That is the states before some steps, and the recording of a short solve.
    """
    saved = saved_bytes(solve)
    node = solve().grad_fn  # without the hooks of `saved_bytes`, under which nothing is recorded
    while node is not None and not hasattr(node, "work"):
        node = node.next_functions[0][0]
    assert node is not None
    states = sum(x.nbytes for state in node.work.record.states.values() for x in (state.y, *state.memory))
    return saved + states + (0 if node.work.kept is None else node.work.kept.nbytes)
