"""`python -m benchmarks.gpu`: every family on an NVIDIA device: times, FLOP/s beside the device's own, waits.

With `--device cpu --smoke` the same runs, briefly, where there is no such device; its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import implicitly as im
from benchmarks.harness import environment
from benchmarks.ode import VectorField
from benchmarks.qp import draw
from implicitly.recipes.deq_image import Cell

HERE = Path(__file__).parent
NO_DEVICE = 2  # exit code
DRIVER = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]


@dataclass(frozen=True)
class Case:
    """Something to be measured; `flops` counts its matrix products and convolutions."""

    name: str
    run: Callable[[], object]
    graph: bool = False  # whether it takes a fixed number of steps, so that a CUDA graph can hold it


@dataclass(frozen=True)
class Measured:
    """What was found about a case."""

    name: str
    ms: list[float] = field(default_factory=list)
    flops: int = 0
    waits: int = 0
    graph_ms: list[float] | None = None
    graph_error: str | None = None  # why no CUDA graph could be had

    @property
    def median(self) -> float:
        """Of the times, ms."""
        return statistics.median(self.ms)


@dataclass(frozen=True)
class Machine:
    """A device, and how things are timed on it."""

    device: torch.device
    smoke: bool

    @property
    def is_cuda(self) -> bool:
        """Whether it is one of NVIDIA's."""
        return self.device.type == "cuda"

    def size(self, whole: int, brief: int) -> int:
        """`whole`, or `brief` in a smoke test."""
        return brief if self.smoke else whole

    def times(self, run: Callable[[], object], budget_s: float) -> list[float]:
        """Milliseconds that `run` takes, again and again for `budget_s` seconds; two runs before do not count."""
        for _ in range(2):
            run()
        found, end = [], time.perf_counter() + budget_s
        while len(found) < 3 or (time.perf_counter() < end and len(found) < 200):
            found.append(self.once(run))
        return found

    def once(self, run: Callable[[], object]) -> float:
        """Milliseconds of one run, by the device's own events where it has them."""
        if not self.is_cuda:
            start = time.perf_counter()
            run()
            return 1e3 * (time.perf_counter() - start)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end)

    def waits(self, run: Callable[[], object]) -> int:
        """How often the host waits for the device in a run; 0 on a CPU, where there is nothing to wait for."""
        if not self.is_cuda:
            return 0
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                run()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sum("synchronizing CUDA operation" in str(w.message) for w in caught)

    def captured(self, run: Callable[[], object]) -> Callable[[], object]:
        """`run` as a CUDA graph."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # what is set up once must not be captured
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay

    def limits(self) -> dict[str, float]:
        """What it reaches in plain copies (GB/s) and matrix products (TFLOP/s, by dtype)."""
        n = self.size(8192, 256)
        source = torch.randn(n, n, device=self.device)
        target = torch.empty_like(source)
        copy = min(self.times(lambda: target.copy_(source), 0.5))
        found = {"copy_GB_per_s": 2e-6 * source.nbytes / copy}
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            a = torch.randn(n // 2, n // 2, device=self.device).to(dtype)
            product = min(self.times(lambda a=a: a @ a, 0.5))
            found[f"matmul_{str(dtype)[6:]}_TFLOP_per_s"] = 2e-9 * (n // 2) ** 3 / product
        return found

    def measure(self, case: Case, budget_s: float) -> Measured:
        """All about one case."""
        case.run()
        with FlopCounterMode(display=False) as counter:
            case.run()
        waits = self.waits(case.run)
        ms = self.times(case.run, budget_s)
        replays = error = None
        if case.graph and self.is_cuda:
            try:
                replays = self.times(self.captured(case.run), budget_s / 2)
            except RuntimeError as caught:  # one that cannot be captured is to be known of, with all the others
                error = str(caught).splitlines()[0]
        return Measured(case.name, ms, counter.get_total_flops(), waits, replays, error)


def gradient(solve: Callable[[], Tensor], inputs: Sequence[Tensor]) -> Callable[[], object]:
    """The solve and its derivative by `inputs`."""
    return lambda: torch.autograd.grad(solve().square().mean(), inputs)


def without(solve: Callable[[], Tensor]) -> Callable[[], object]:
    """The solve alone."""
    return torch.no_grad()(solve)


def fixed_points(machine: Machine) -> Iterator[Case]:
    """The convolutional cell of `deq-image`, in float32 and under autocast, and a number of steps."""
    batch, device = machine.size(256, 2), machine.device
    torch.manual_seed(0)
    cell, x = Cell(48, 64, 8).to(device), torch.randn(batch, 48, 16, 16, device=device)
    parameters, zero = list(cell.parameters()), torch.zeros_like(x)
    for name, dtype, rtol in (("float32", None, 1e-3), ("bfloat16", torch.bfloat16, 5e-2)):

        def solve(dtype: torch.dtype | None = dtype, rtol: float = rtol) -> Tensor:
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                solver = im.Anderson(rtol=rtol)
                return im.fixed_point(cell, zero, x, solver=solver, in_dims=0, on_failure="ignore").value

        yield Case(f"DEQ cell, Anderson, {name}, forward", without(solve))
        yield Case(f"DEQ cell, Anderson, {name}, gradient", gradient(solve, parameters))

    def budget(adjoint: Any = im.JacobianFreeAdjoint()) -> Tensor:
        solver = im.Anderson(rtol=0, max_steps=10)
        return im.fixed_point(cell, zero, x, solver=solver, adjoint=adjoint, on_failure="ignore").value

    yield Case("DEQ cell, 10 Anderson steps, forward", without(budget), graph=True)


def trajectories(machine: Machine) -> Iterator[Case]:
    """The network of the `ode` benchmark, at its size and a larger one."""
    for batch in (machine.size(128, 4), machine.size(8192, 8)):
        torch.manual_seed(0)
        f = VectorField().to(machine.device)
        y0, t = torch.randn(batch, 2, device=machine.device), torch.tensor([0.0, 1.0], device=machine.device)
        for name, solver in (("Dopri5", im.Dopri5(rtol=1e-5, atol=1e-5)), ("RK4, 20 steps", im.RK4(dt=0.05))):

            def solve(f=f, y0=y0, t=t, solver=solver) -> Tensor:
                return im.odeint(f, y0, t, solver=solver).value[-1]

            yield Case(f"ODE, batch {batch}, {name}, forward", without(solve))
            yield Case(f"ODE, batch {batch}, {name}, gradient", gradient(solve, list(f.parameters())))


def programs(machine: Machine) -> Iterator[Case]:
    """Those of the `qp` benchmark, and projections."""
    batch, many = machine.size(128, 2), machine.size(4096, 4)
    args = [
        t.to(machine.device).requires_grad_()
        for t in draw(batch, *((50, 50, 10) if not machine.smoke else (5, 4, 2)))
    ]
    shared = [t.to(machine.device).requires_grad_() for t in draw(many, 20, 40, 0, shared=True)[:4]]
    for name, solve, inputs in (
        ("QP, InteriorPoint", lambda: im.qp(*args).value, args),
        ("QP of shared matrices, ADMM", lambda: im.qp(*shared, solver=im.ADMM()).value, shared),
    ):
        yield Case(f"{name}, forward", without(solve))
        yield Case(f"{name}, gradient", gradient(solve, inputs))
    x = torch.randn(machine.size(65536, 8), 100, device=machine.device, requires_grad=True)
    for name, project in (("simplex", im.project.simplex), ("l1 ball", im.project.l1_ball)):
        yield Case(f"projection, {name}, forward", without(lambda project=project: project(x)))
        yield Case(f"projection, {name}, gradient", gradient(lambda project=project: project(x), [x]))


def table(found: list[Measured], limits: dict[str, float]) -> str:
    """Everything measured, for people."""
    peak = limits["matmul_float32_TFLOP_per_s"]
    rows = []
    for m in found:
        rate = 1e-9 * m.flops / m.median
        graph = m.graph_error or ("" if m.graph_ms is None else f"{statistics.median(m.graph_ms):.2f}")
        times = f"{m.median:.2f} ({min(m.ms):.2f} to {max(m.ms):.2f})"
        rows.append((m.name, times, graph, m.waits, f"{rate:.3f}", f"{100 * rate / peak:.1f}"))
    headers = ["measured", "ms", "CUDA graph, ms", "waits", "TFLOP/s", "% of a float32 product's"]
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)


def surroundings(machine: Machine) -> dict[str, Any]:
    """Device, driver, versions, date."""
    told = {**environment(("implicitly", "torch")), "device": str(machine.device), "smoke": machine.smoke}
    if machine.is_cuda:
        properties = torch.cuda.get_device_properties(machine.device)
        told |= {
            "device": properties.name,
            "memory_GiB": properties.total_memory / 2**30,
            "processors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
            "driver": subprocess.run(DRIVER, capture_output=True, text=True, check=True).stdout.strip(),
        }
    return told


def main(arguments: list[str] | None = None) -> int:
    """Run it; the exit code is 2 where there is no such device."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes; only errors count")
    parser.add_argument("--seconds", type=float, default=400, help="how long all of the timings may take")
    parser.add_argument("--out", type=Path, help="default: results/gpu.json; a smoke test writes none")
    chosen = parser.parse_args(arguments)
    if chosen.device.startswith("cuda") and not torch.cuda.is_available():
        print("benchmarks.gpu: no NVIDIA device here; --device cpu --smoke shows that it runs", file=sys.stderr)
        return NO_DEVICE
    machine = Machine(torch.device(chosen.device), chosen.smoke)
    limits = machine.limits()
    cases = [*fixed_points(machine), *trajectories(machine), *programs(machine)]
    each = 0.0 if chosen.smoke else chosen.seconds / (1.5 * len(cases))
    found = []
    for case in cases:
        print(case.name, "...", flush=True)
        found.append(machine.measure(case, each))
    print(f"\n{table(found, limits)}\n\n{limits}")
    out = chosen.out or (None if chosen.smoke else HERE / "results" / "gpu.json")
    if out is not None:
        content = {**surroundings(machine), "limits": limits, "cases": [asdict(m) for m in found]}
        out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        print(f"Numbers: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
