"""Stiff differential equations: solutions and gradients, next to torchdiffeq's bridge to SciPy and to diffrax."""

from __future__ import annotations

import importlib.metadata
import time
import warnings
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import implicitly as im
from benchmarks.elsewhere import Line, beside
from benchmarks.harness import Effort, Row, Spread, alternate, ratios

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torchdiffeq

PEER = f"torchdiffeq {importlib.metadata.version('torchdiffeq')} with SciPy {importlib.metadata.version('scipy')}"
PACKAGES = ("implicitly", "torch", "torchdiffeq", "scipy")
D = torch.float64

CAPTION = """\
One system, float64, Kvaerno5. Robertson: three reactions to t = 1e5, relative tolerance 1e-6, absolute 1e-11;
errors relative to 1, 1e-5 and 1. Van der Pol: mu = 1000 to t = 2000, both tolerances 1e-6. Against 1e-11; errors
of gradients against central differences of that. LSODA and Radau have the loosest tolerances, by powers of ten,
at which they are as accurate as ours. The one implicit method of torchdiffeq's own, implicit_adams, has constant
steps, here 1000, and iterates without derivatives of f, which diverges where f is stiff: nan. Medians of {rounds}
rounds in alternation (least to greatest)."""
# The number of steps of the method without step control.
STEPS = 1000
# Factors of the tolerances, in search of those at which a peer is as accurate.
PARTS = tuple(10.0**k for k in range(2, -5, -1))


class Robertson(nn.Module):
    """Robertson's problem: three reactions `(3,)`, with rates from 0.04 to 3e7."""

    def __init__(self) -> None:
        super().__init__()
        self.k = nn.Parameter(torch.tensor([0.04, 3e7, 1e4], dtype=D))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        (a, b, c), (k1, k2, k3) = y.unbind(-1), self.k
        slow, fast, back = k1 * a, k2 * b * b, k3 * b * c
        return torch.stack([back - slow, slow - fast - back, fast], dim=-1)


class VanDerPol(nn.Module):
    """The Van der Pol oscillator `(2,)`, which relaxes slowly and jumps fast."""

    def __init__(self) -> None:
        super().__init__()
        self.k = nn.Parameter(torch.tensor([1000.0], dtype=D))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        x, v = y.unbind(-1)
        return torch.stack([v, self.k[0] * (1 - x * x) * v - x], dim=-1)


def run(effort: Effort) -> list[Row]:
    """All rows of this benchmark."""
    full = effort.full
    one = torch.ones((), dtype=D)
    reactions = Case("Robertson", Robertson(), (1.0, 0.0, 0.0), 1e5 if full else 1.0, 1e-6, 1e-11, (1, 1e-5, 1), 2)
    jumps = Case("Van der Pol", VanDerPol(), (2.0, 0.0), 2000.0 if full else 1.0, 1e-6, 1e-6, (one, 1e3), 0)
    return [
        *reactions.forward(effort),
        *reactions.gradient(effort),
        *beside_diffrax(reactions, effort),
        *(jumps.forward(effort) if full else []),  # compiling another graph takes too long for a smoke test
        *jumps.gradient(effort),
    ]


class Case:
    """A system to be solved to `end`; gradients are those of its component `watched`."""

    def __init__(
        self,
        name: str,
        f: nn.Module,
        y0: tuple[float, ...],
        end: float,
        rtol: float,
        atol: float,
        scale: Any,
        watched: int,
    ):
        self.name, self.f, self.watched = name, f, watched
        self.rtol, self.atol = rtol, atol
        self.y0, self.t = torch.tensor(y0, dtype=D), torch.tensor([0.0, end], dtype=D)
        self.scale = torch.tensor([float(s) for s in scale], dtype=D)
        with torch.no_grad():
            self.exact = self.tight()

    def tight(self) -> Tensor:
        """The state at the end, nearly exact."""
        return im.odeint(self.f, self.y0, self.t, solver=im.Kvaerno5(rtol=1e-11, atol=1e-15)).value[-1]

    def ours(self, compile: bool = False, part: float = 1.0, arc_length: bool = False) -> Tensor:
        """The state at the end, with `part` of the tolerances."""
        solver = im.Kvaerno5(rtol=part * self.rtol, atol=part * self.atol)
        adjoint = im.RecursiveCheckpointAdjoint(arc_length=arc_length)
        return im.odeint(self.f, self.y0, self.t, solver=solver, adjoint=adjoint, compile=compile).value[-1]

    def theirs(self, name: str, solve: Any = torchdiffeq.odeint, part: float = 1.0) -> Tensor:
        """The state at the end, by a solver of SciPy, with `part` of the tolerances."""
        how = {"method": "scipy_solver", "options": {"solver": name}}
        return solve(self.f, self.y0, self.t, rtol=part * self.rtol, atol=part * self.atol, **how)[-1]

    def as_accurate(self, name: str, error: float) -> float:
        """The largest power of ten as `part` of the tolerances at which a SciPy solver has no larger error."""
        return next((p for p in PARTS if self.error(self.theirs(name, part=p)) <= error), PARTS[-1])

    def by_adams(self) -> Tensor:
        """The state at the end, by torchdiffeq's own implicit method."""
        how = {"method": "implicit_adams", "options": {"step_size": float(self.t[-1]) / STEPS}}
        return torchdiffeq.odeint(self.f, self.y0, self.t, **how)[-1]

    def error(self, y: Tensor) -> float:
        """The error of a state at the end."""
        return float(((y - self.exact) / self.scale).abs().max())

    @torch.no_grad()
    def forward(self, effort: Effort) -> list[Row]:
        """Solves without gradients."""
        start = time.perf_counter()
        self.ours(compile=True)
        cold = time.perf_counter() - start
        accuracy = self.error(self.ours())
        parts = {name: self.as_accurate(name, accuracy) for name in ("LSODA", "Radau")}
        runs = {
            "eager": self.ours,
            "compile=True": lambda: self.ours(compile=True),
            **{name: partial(self.theirs, name, part=part) for name, part in parts.items()},
            "implicit_adams": self.by_adams,
        }
        errors = {who: self.error(solve()) for who, solve in runs.items()}
        times = alternate(runs, effort.rounds)
        shown = {who: f"{Spread.of(times[who]).show(1e3, 0)}, error {errors[who]:.0e}" for who in runs}
        for name, part in parts.items():
            shown[name] += f" at rtol {part * self.rtol:.0e}"
        peers = "; ".join(f"{who} {shown[who]}" for who in ("LSODA", "Radau", "implicit_adams"))
        rows = []
        for who in ("eager", "compile=True"):
            faster = {peer: ratios(times[peer], times[who]) for peer in ("LSODA", "Radau")}
            text = f"{shown[who]}; {faster['LSODA'].median:.2f} and {faster['Radau'].median:.2f} times faster"
            text += f"; first call {cold:.0f} s" if who == "compile=True" else ""
            numbers = {name: {"error": errors[name], "seconds": times[name]} for name in (who, "LSODA", "Radau")}
            met = min(ratio.median for ratio in faster.values()) >= 1
            rows.append(Row(f"{self.name}, {who}, ms", text, peers, "faster", met, numbers))
        return rows

    def gradient(self, effort: Effort) -> list[Row]:
        """Solves and the gradient of one component by the parameters."""
        k = self.f.k

        def grad(solve: Any) -> Tensor:
            return torch.autograd.grad(solve()[self.watched], k)[0]

        exact = self.differences()

        def timed(solve: Any) -> tuple[float, float]:
            """Seconds and error of the gradient."""
            start = time.perf_counter()
            found = grad(solve)
            return time.perf_counter() - start, float(((found - exact) / exact).abs().max())

        ways = {
            "arc_length=True": {"arc_length": True},
            "by default": {},
            "that to a thousandth of the tolerances": {"part": 1e-3},
        }
        if effort.full:  # compiling another graph takes too long for a smoke test
            ways["arc_length=True, compile=True"] = compiled = {"arc_length": True, "compile": True}
            grad(partial(self.ours, **compiled))
        found = {name: timed(partial(self.ours, **options)) for name, options in ways.items()}
        error = found["arc_length=True"][1]
        theirs = []
        for name in ("LSODA", "Radau"):
            start = time.perf_counter()
            try:
                off = f"error {timed(partial(self.theirs, name, torchdiffeq.odeint_adjoint))[1]:.0e}"
            except (ValueError, RuntimeError) as failure:
                off = f"{type(failure).__name__}"
            theirs.append(f"{name} {time.perf_counter() - start:.1f}, {off}")
        text = "; ".join(f"{name} {seconds:.2f}, error {off:.0e}" for name, (seconds, off) in found.items())
        peers = "continuous adjoint: " + "; ".join(theirs)
        return [Row(f"{self.name}, gradient, s", text, peers, "error at most 1e-3", error <= 1e-3)]

    @torch.no_grad()
    def differences(self) -> Tensor:
        """The gradient, by central differences."""
        k, found = self.f.k, []
        for i, value in enumerate(k.tolist()):
            ends = []
            for factor in (1 + 1e-4, 1 - 1e-4):
                k[i] = value * factor
                ends.append(self.tight()[self.watched])
            k[i] = value
            found.append((ends[0] - ends[1]) / (2e-4 * value))
        return torch.stack(found)


@torch.no_grad()
def beside_diffrax(case: Case, effort: Effort) -> list[Row]:
    """Compare with diffrax: the same method in a compiled JAX program, in a separate process."""
    if not effort.full:
        return []
    problem = {"y0": case.y0, "t": case.t, "k": case.f.k, "rtol": case.rtol, "atol": case.atol}
    line = Line(
        f"{case.name}, compile=True, ms",
        "forward",
        lambda: [case.ours(compile=True)],
        lambda found: case.error(found[0]),
        "5 times their time",
        1 / 5,
    )
    return beside("jax_stiff", "diffrax", problem, [line], effort.rounds, digits=0)
