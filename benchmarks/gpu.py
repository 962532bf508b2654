"""`python -m benchmarks.gpu`: every family on an NVIDIA device: times, FLOP/s and bytes/s beside the device's own
limits, how often the host waits, and two peers.

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
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import implicitly as im
from benchmarks.harness import environment, write_between_markers
from benchmarks.ode import TOLERANCE, VectorField, ours, theirs
from benchmarks.peers import TorchDEQ
from benchmarks.programs import draw
from implicitly.recipes.deq_image import Cell

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "gpu.json"
NO_DEVICE = 2  # exit code
LEGEND = """\
% of products: floating-point operations of matrix products and convolutions a second, beside those of one
large matrix product of the dtype. % of copies: bytes that the operations read and write, each by itself, a
second, beside those of one large copy (more than 100: they stayed in a cache). Waits: how often the host
waited for the device."""
DRIVER = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]


@dataclass(frozen=True)
class Case:
    """A computation to measure; `flops` counts its matrix products and convolutions."""

    name: str
    run: Callable[[], object]
    graph: bool = False  # whether it takes a fixed number of steps, so that a CUDA graph can hold it
    dtype: torch.dtype = torch.float32  # that its products are computed in
    eager: Callable[[], object] | None = None  # if it is compiled: the same computation run eagerly, for counting


@dataclass(frozen=True)
class Measured:
    """What was measured of a case."""

    name: str
    dtype: str
    ms: list[float] = field(default_factory=list)
    flops: int = 0
    bytes: int = 0  # that the operations read and write, each counted separately
    waits: int = 0
    peak_MiB: float | None = None  # memory taken on top of what was there before
    graph_ms: list[float] | None = None
    graph_error: str | None = None  # why no CUDA graph could be captured

    @property
    def median(self) -> float:
        """The median of the times, in ms."""
        return statistics.median(self.ms)


class Work(TorchDispatchMode):
    """Counts what operations do: `flops` of matrix products and convolutions, and `bytes` read and written.

    PyTorch's own `FlopCounterMode` also tracks modules, which does not work for a backward pass inside another.
    """

    def __init__(self):
        super().__init__()
        self.flops = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func._overloadpacket in flop_registry:
            self.flops += flop_registry[func._overloadpacket](*args, **kwargs, out_val=out)
        if not func.is_view:
            read = {t.data_ptr(): t.nbytes for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
            written = [t.nbytes for t in pytree.tree_leaves(out) if isinstance(t, Tensor)]
            self.bytes += sum(read.values()) + sum(written)
        return out


@dataclass(frozen=True)
class Machine:
    """A device, and how things are timed on it."""

    device: torch.device
    smoke: bool

    @property
    def is_cuda(self) -> bool:
        """Whether it is an NVIDIA device."""
        return self.device.type == "cuda"

    def size(self, whole: int, brief: int) -> int:
        """`whole`, or `brief` in a smoke test."""
        return brief if self.smoke else whole

    def times(self, run: Callable[[], object], budget_s: float) -> list[float]:
        """The times of `run` in ms, repeated for `budget_s` seconds after two warm-up runs."""
        for _ in range(2):
            run()
        found, end = [], time.perf_counter() + budget_s
        while len(found) < 3 or (time.perf_counter() < end and len(found) < 200):
            found.append(self.once(run))
        return found

    def once(self, run: Callable[[], object]) -> float:
        """The time of one run in ms, by the device's own events if it has them."""
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
        with torch.cuda.stream(stream):  # one-time setup must not be captured
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay

    def limits(self) -> dict[str, float]:
        """The speed that the device reaches in plain copies (GB/s) and matrix products (TFLOP/s, by dtype)."""
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

    def peak(self, run: Callable[[], object]) -> float | None:
        """The peak memory of a run in MiB, beyond what was allocated before; None on a CPU."""
        if not self.is_cuda:
            return None
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    def measure(self, case: Case, budget_s: float) -> Measured:
        """Measure everything about one case."""
        case.run()
        with Work() as work:
            (case.eager or case.run)()
        waits, peak = self.waits(case.run), self.peak(case.run)
        ms = self.times(case.run, budget_s)
        replays = error = None
        if case.graph and self.is_cuda:
            try:
                replays = self.times(self.captured(case.run), budget_s / 2)
            except RuntimeError as caught:  # report what cannot be captured, along with all the others
                error = str(caught).splitlines()[0]
        dtype = str(case.dtype)[6:]
        return Measured(case.name, dtype, ms, work.flops, work.bytes, waits, peak, replays, error)


def both(case: Case, inputs: Sequence[Tensor]) -> Iterator[Case]:
    """The two cases of a differentiable tensor: its value alone, and with the derivative by `inputs`."""
    yield change(case, "forward", torch.no_grad())
    yield change(case, "gradient", lambda run: lambda: torch.autograd.grad(run().square().mean(), inputs))


def change(case: Case, what: str, by: Callable[[Any], Any]) -> Case:
    """The case with the function that it runs wrapped."""
    eager = None if case.eager is None else by(case.eager)
    return replace(case, name=f"{case.name}, {what}", run=by(case.run), eager=eager)


def fixed_points(machine: Machine) -> Iterator[Case]:
    """The convolutional cell of `deq-image`: in float32, under autocast, compiled, and with a number of steps."""
    batch, device = machine.size(256, 2), machine.device
    torch.manual_seed(0)
    cell, x = Cell(48, 64, 8).to(device), torch.randn(batch, 48, 16, 16, device=device)
    parameters, zero = list(cell.parameters()), torch.zeros_like(x)

    def solve(
        solver: im.Anderson = im.Anderson(rtol=1e-3), adjoint: Any = im.ImplicitAdjoint(rtol=1e-3), **options: Any
    ) -> Tensor:
        return im.fixed_point(cell, zero, x, solver=solver, adjoint=adjoint, on_failure="ignore", **options).value

    def low_precision() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return solve(im.Anderson(rtol=5e-2), im.ImplicitAdjoint(rtol=5e-2))

    peer = TorchDEQ("anderson", 1e-3, 25)
    budget = partial(solve, im.Anderson(rtol=0, max_steps=10), adjoint=im.JacobianFreeAdjoint())
    compiled = Case("DEQ cell, Anderson, compile=True", partial(solve, compile=True), eager=solve)
    yield from both(Case("DEQ cell, Anderson", solve), parameters)
    yield from both(compiled, parameters)
    yield from both(Case("DEQ cell, Anderson, torchdeq", lambda: peer(lambda z: cell(z, x), zero)), parameters)
    yield from both(Case("DEQ cell, Anderson, bfloat16", low_precision, dtype=torch.bfloat16), parameters)
    yield from both(Case("DEQ cell, 10 Anderson steps, JFB", budget, graph=True), parameters)


def trajectories(machine: Machine) -> Iterator[Case]:
    """The network of the `ode` benchmark, at its size and a larger one."""
    rk4 = im.RK4(dt=0.05)
    for batch in (4,) if machine.smoke else (128, 8192):
        torch.manual_seed(0)
        f = VectorField().to(machine.device)
        y0, t = torch.randn(batch, 2, device=machine.device), torch.tensor([0.0, 1.0], device=machine.device)
        name, parameters = f"ODE, batch {batch}", list(f.parameters())
        solve, compiled = partial(ours, f, y0, t), partial(dopri5_as_graph, f, y0, t)
        yield from both(Case(f"{name}, Dopri5", solve), parameters)
        yield from both(Case(f"{name}, Dopri5, compile=True", compiled, eager=solve), parameters)
        yield from both(Case(f"{name}, Dopri5, torchdiffeq", partial(theirs, f, y0, t)), parameters)
        fixed = partial(im.odeint, f, y0, (0.0, 1.0), solver=rk4)
        run = lambda fixed=fixed: fixed().value[-1]  # noqa: E731
        yield from both(Case(f"{name}, RK4, 20 steps", run, graph=True), parameters)


def dopri5_as_graph(f: VectorField, y0: Tensor, t: Tensor) -> Tensor:
    """Like `ours`, compiled."""
    return im.odeint(f, y0, t, solver=im.Dopri5(rtol=TOLERANCE, atol=TOLERANCE), compile=True).value[-1]


def programs(machine: Machine) -> Iterator[Case]:
    """The programs of the `qp` benchmark, and projections."""
    batch, many = machine.size(128, 2), machine.size(4096, 4)
    args = [
        t.to(machine.device).requires_grad_()
        for t in draw(batch, *((50, 50, 10) if not machine.smoke else (5, 4, 2)))
    ]
    shared = [t.to(machine.device).requires_grad_() for t in draw(many, 20, 40, 0, shared=True)[:4]]
    for name, options, inputs in (
        ("QP, InteriorPoint", {}, args),
        ("QP, InteriorPoint, compile=True", {"compile": True}, args),
        ("QP of shared matrices, ADMM", {"solver": im.ADMM()}, shared),
        ("QP of shared matrices, ADMM, compile=True", {"solver": im.ADMM(), "compile": True}, shared),
    ):
        solve = partial(solution, *inputs, **options)
        yield from both(Case(name, solve, dtype=inputs[0].dtype, eager=partial(solve, compile=False)), inputs)
    x = torch.randn(machine.size(65536, 8), 100, device=machine.device, requires_grad=True)
    for project in (im.project.simplex, im.project.l1_ball):
        yield from both(Case(f"projection, {project.__name__}", partial(project, x)), [x])


def solution(*args: Tensor, **options: Any) -> Tensor:
    """The solution of a quadratic program."""
    return im.qp(*args, **options).value


def table(found: list[Measured], limits: dict[str, float]) -> str:
    """Everything measured, as a readable table."""
    rows = []
    for m in found:
        products = 1e-9 * m.flops / m.median / limits[f"matmul_{m.dtype}_TFLOP_per_s"]
        moved = 1e-6 * m.bytes / m.median / limits["copy_GB_per_s"]
        graph = m.graph_error or ("" if m.graph_ms is None else f"{statistics.median(m.graph_ms):.2f}")
        times = f"{m.median:.2f} ({min(m.ms):.2f} to {max(m.ms):.2f})"
        peak = "" if m.peak_MiB is None else f"{m.peak_MiB:.0f}"
        rows.append((m.name, times, graph, m.waits, f"{100 * products:.1f}", f"{100 * moved:.1f}", peak))
    headers = ["measured", "ms", "CUDA graph, ms", "waits", "% of products", "% of copies", "peak, MiB"]
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)


def shown(results: dict[str, Any]) -> str:
    """The table of an earlier run, and where it ran."""
    where = f"{results['device']}, driver {results['driver']}, PyTorch {results['versions']['torch']}"
    of = f"`benchmarks/results/{RESULTS.name}`: {where}, {results['date'][:10]}."
    return f"{table([Measured(**m) for m in results['cases']], results['limits'])}\n\n{LEGEND} {of}"


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
    """Run the benchmark; the exit code is 2 if there is no such device."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes; only errors count")
    parser.add_argument("--seconds", type=float, default=420, help="no case is begun after so many seconds")
    parser.add_argument("--out", type=Path, help="default: results/gpu.json; a smoke test writes none")
    parser.add_argument("--write-tables", action="store_true", help="only put results/gpu.json into TABLES.md")
    chosen = parser.parse_args(arguments)
    if chosen.write_tables:
        write_between_markers(HERE / "TABLES.md", "gpu", shown(json.loads(RESULTS.read_text())))
        return 0
    if chosen.device.startswith("cuda") and not torch.cuda.is_available():
        print("benchmarks.gpu: no NVIDIA device here; --device cpu --smoke shows that it runs", file=sys.stderr)
        return NO_DEVICE
    begin, machine = time.perf_counter(), Machine(torch.device(chosen.device), chosen.smoke)
    limits = machine.limits()
    cases = [*fixed_points(machine), *trajectories(machine), *programs(machine)]
    each = 0.0 if chosen.smoke else chosen.seconds / (3 * len(cases))
    found, left_out = [], []
    for case in cases:
        if time.perf_counter() - begin > chosen.seconds:
            left_out.append(case.name)
            continue
        print(case.name, "...", flush=True)
        found.append(machine.measure(case, each))
    print(f"\n{table(found, limits)}\n\n{LEGEND}\n{limits}")
    if left_out:
        print(f"No time was left for: {'; '.join(left_out)}")
    out = chosen.out or (None if chosen.smoke else RESULTS)
    if out is not None:
        content = {
            **surroundings(machine),
            "limits": limits,
            "cases": [asdict(m) for m in found],
            "left_out": left_out,
        }
        out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        print(f"Numbers: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
