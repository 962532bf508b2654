"""Quadratic programs: solutions and gradients compared with qpth and cvxpylayers."""

from __future__ import annotations

import importlib.metadata
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import implicitly as im
from benchmarks import elsewhere
from benchmarks.elsewhere import Line
from benchmarks.harness import Effort, Row, Spread, alternate, outcomes, peak_mib, ratios
from benchmarks.programs import D, Programs, draw

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import cvxpy
    from cvxpylayers.torch import CvxpyLayer
    from qpth.qp import QPFunction

PEER = f"qpth {importlib.metadata.version('qpth')}, cvxpylayers {importlib.metadata.version('cvxpylayers')}"
PACKAGES = ("implicitly", "torch", "qpth", "cvxpylayers", "cvxpy")

CAPTION = """\
Float64, eager where nothing else is said. As in qpth's own examples: Q = LL' + I/10 with L uniform, G and A
normal, h = G z0 + s, b = A z0. Residual: the norm of the optimality conditions of the worst sample. Error of
z: the largest entry against ours (whose residual bounds it). Error of the gradient: of its product with a
random direction in p, G, h, A and b, relative, against central differences. Peak: most of tensors alive at
once, forward and backward. Medians of {rounds} rounds in alternation (least to greatest)."""

Solve = Callable[..., Tensor]


def ours(*args: Tensor, **options: Any) -> Tensor:
    return im.qp(*args, **options).value


def qpth(*args: Tensor) -> Tensor:
    none = torch.empty(0, dtype=D)
    return QPFunction(verbose=-1)(*args, *((none, none) if len(args) == 4 else ()))


def layer_of(n: int, m: int, q: int) -> Solve:
    """The same program as a layer of cvxpylayers, which takes a square root of Q."""
    z, p = cvxpy.Variable(n), cvxpy.Parameter(n)
    root, G, A = cvxpy.Parameter((n, n)), cvxpy.Parameter((m, n)), cvxpy.Parameter((q, n))
    h, b = cvxpy.Parameter(m), cvxpy.Parameter(q)
    objective = cvxpy.Minimize(cvxpy.sum_squares(root @ z) / 2 + p @ z)
    problem = cvxpy.Problem(objective, [G @ z <= h, A @ z == b])
    layer = CvxpyLayer(problem, parameters=[root, p, G, h, A, b], variables=[z])

    def solve(Q: Tensor, *others: Tensor) -> Tensor:
        return layer(torch.linalg.cholesky(Q.detach()).mT, *others)[0]

    return solve


def gradient(solve: Solve, args: Programs, weights: Tensor) -> list[Tensor]:
    """The gradient of a weighted sum of z by all arguments but Q, of which cvxpylayers takes a square root."""
    return list(torch.autograd.grad((weights * solve(*args)).sum(), args[1:]))


def gradient_error(found: Sequence[Tensor], args: Programs, weights: Tensor) -> float:
    """The relative error of a gradient along a random direction, against central differences."""
    generator = torch.Generator().manual_seed(1)
    direction = [torch.randn(t.shape, generator=generator, dtype=D) for t in args[1:]]
    ends = []
    with torch.no_grad():
        for step in (1e-6, -1e-6):
            moved = [t + step * d for t, d in zip(args[1:], direction)]
            ends.append((weights * ours(args[0], *moved)).sum())
    exact = float(ends[0] - ends[1]) / 2e-6
    return abs(float(sum((g * d).sum() for g, d in zip(found, direction))) - exact) / abs(exact)


def run(effort: Effort) -> list[Row]:
    """All rows of this benchmark."""
    full = effort.full
    print("quadratic programs ...", flush=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecation warnings inside the peers
        return [*dense(effort, 128 if full else 4), *shared(effort, 4096 if full else 16)]


def dense(effort: Effort, batch: int) -> list[Row]:
    """Programs that each have their own matrices."""
    n, m, q = 50, 50, 10
    args = draw(batch, n, m, q)
    weights = torch.randn(batch, n, generator=torch.Generator().manual_seed(2), dtype=D)
    solves = {"ours": ours, "qpth": qpth, "cvxpylayers": layer_of(n, m, q)}
    what = f"batch {batch}, {n} unknowns, {m} inequalities, {q} equalities"
    rows = beside(effort, what, args, weights, solves, {"qpth": 5.0, "cvxpylayers": 30.0})
    if effort.full:
        solves = {"ours": lambda *a: ours(*a, compile=True), "qpth": qpth}
        rows += beside(effort, f"{what}, compile=True", args, weights, solves, {"qpth": 8.0})
    return rows + beside_qpax(effort, what, args, weights)


def shared(effort: Effort, batch: int) -> list[Row]:
    """Programs that share their matrices, as in a safety filter or a step of model-predictive control."""
    n, m = 20, 40
    args = draw(batch, n, m, 0, shared=True)
    weights = torch.randn(batch, n, generator=torch.Generator().manual_seed(2), dtype=D)
    solves = {"ours": lambda *a: ours(*a, solver=im.ADMM()), "InteriorPoint": ours, "qpth": qpth}
    if effort.full:
        solves["compile=True"] = lambda *a: ours(*a, solver=im.ADMM(), compile=True)
    what = f"batch {batch} of the same matrices, {n} unknowns, {m} inequalities"
    return beside(effort, what, args, weights, solves, {"qpth": 20.0})


def beside(
    effort: Effort, what: str, args: Programs, weights: Tensor, solves: dict[str, Solve], goals: dict[str, float]
) -> list[Row]:
    """Rows for solutions and for gradients."""
    runs = {who: lambda solve=solve: gradient(solve, args, weights) for who, solve in solves.items()}
    gradients, failed = outcomes(runs, ("ours", "InteriorPoint", "compile=True"))
    solves, runs = ({who: named[who] for who in gradients} for named in (solves, runs))
    errors = {who: gradient_error(found, args, weights) for who, found in gradients.items()}
    # cvxpylayers works in NumPy, whose memory is not seen.
    peaks = {who: peak_mib(run) for who, run in runs.items() if who != "cvxpylayers"}
    with torch.no_grad():
        exact = im.qp(*args)
        off = {who: float((solve(*args) - exact.value).abs().max()) for who, solve in solves.items()}

    def forward(solve: Solve) -> Tensor:
        with torch.no_grad():
            return solve(*args)

    times = {
        "forward": alternate({w: lambda s=s: forward(s) for w, s in solves.items()}, effort.rounds),
        "forward and gradient": alternate(runs, effort.rounds),
    }
    rows = []
    for part, seconds in times.items():
        # The goal against cvxpylayers is for both passes together.
        aims = {who: goal for who, goal in goals.items() if part != "forward" or who != "cvxpylayers"}
        faster = {who: ratios(seconds[who], seconds["ours"]) for who in goals if who in solves}
        accuracy = off if part == "forward" else errors
        shown = {w: f"{Spread.of(seconds[w]).show(1e3, 0)}, error {accuracy[w]:.0e}" for w in solves} | failed
        if part != "forward":
            shown |= {w: f"{shown[w]}, peak {mib:.0f} MiB" for w, mib in peaks.items()}
        mine = [shown["ours"], *(f"{ratio.show(1, 1)} times faster than {who}" for who, ratio in faster.items())]
        mine += [f"{who} {shown[who]}" for who in solves if who not in goals and who != "ours"]
        if part == "forward":
            mine.append(f"residual {float(exact.residual.max()):.0e}")
        peers = "; ".join(f"{who} {shown[who]}" for who in goals)
        goal = ", ".join(f"{aim:.0f} times faster than {who}" for who, aim in aims.items())
        met = all(ratio.median >= aims[who] for who, ratio in faster.items() if who in aims) if faster else None
        numbers = {w: {"seconds": seconds[w], "error": accuracy[w], "peak_MiB": peaks.get(w)} for w in solves}
        rows.append(Row(f"{what}: {part}, ms", "; ".join(mine), peers, goal, met, numbers))
    return rows


def beside_qpax(effort: Effort, what: str, args: Programs, weights: Tensor) -> list[Row]:
    """Compare with qpax: the same programs in a compiled JAX program, in a separate process."""
    if not effort.full:
        return []
    Q, p, G, h, A, b = args
    problem = {"Q": Q, "p": p, "G": G, "h": h, "A": A, "b": b, "weights": weights}

    with torch.no_grad():
        z = ours(*args)

    def forward(compile: bool) -> list[Tensor]:
        with torch.no_grad():
            return [ours(*args, compile=compile)]

    def lines(compile: bool) -> list[Line]:
        case = f"{what}, compile=True" if compile else what
        return [
            Line(
                f"{case}: forward, ms",
                "forward",
                lambda: forward(compile),
                lambda found: float((found[0] - z).abs().max()),
                "faster",
                1.0,
            ),
            Line(
                f"{case}: forward and gradient, ms",
                "forward and gradient",
                lambda: gradient(lambda *a: ours(*a, compile=compile), args, weights),
                lambda found: gradient_error(found[-5:], args, weights),
                "faster",
                1.0,
            ),
        ]

    return elsewhere.beside("jax_qp", "qpax", problem, lines(False) + lines(True), effort.rounds, digits=0)
