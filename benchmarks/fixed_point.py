"""Fixed points: the solver's overhead over f, exact gradients, memory, uneven batches, long training."""

from __future__ import annotations

import copy
import gc
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor  # pyright: ignore[reportMissingImports]
from torch._subclasses.fake_tensor import FakeTensor

import implicitly as im
from benchmarks.cells import DenseCell, counted, relative_error, unrolled_gradient
from benchmarks.elsewhere import Line, beside
from benchmarks.harness import Effort, Row, Spread, alternate, peak_mib, ratios, resident_mib
from benchmarks.peers import TORCHDEQ, TorchDEQ
from implicitly.history import combine, empty_slots, products
from implicitly.recipes.deq_image import Cell
from implicitly.viz import saved_bytes

PEER = f"{TORCHDEQ}, or the one named"
PACKAGES = ("implicitly", "torch", "numpy", "torchdeq")

RTOL = 1e-3
MAX_STEPS = 25
# Each keeps its default history: ours 5 and 10 states, torchdeq's Anderson 6 and its Broyden all.
SOLVERS = {
    "Anderson": im.Anderson(rtol=RTOL, max_steps=MAX_STEPS),
    "Broyden": im.Broyden(rtol=RTOL, max_steps=MAX_STEPS),
}
PEERS = {name: TorchDEQ(name.lower(), RTOL, MAX_STEPS) for name in SOLVERS}
ADJOINT = im.ImplicitAdjoint(rtol=RTOL)

CAPTION = """\
Where nothing else is said: the convolutional cell of `deq-image` (48 and 64 channels, 16x16, batch 32,
float32); relative tolerance 1e-3 forward and backward; solvers as they are by default, torchdeq with
`ift=True`, its exact gradient. Overhead: time of a forward solve / (calls of f x time of one call). Of moving its
history: calls of f, writing what is new of the history, and reading it for inner products and a combination.
Gradient error: relative, against float64 unrolled until converged to 1e-10. Rows evaluated: calls of f
weighted by batch size. Peak: most of tensors alive at once, forward and backward. Medians of {rounds} rounds
in alternation (least to greatest)."""

Solve = Callable[[nn.Module, Tensor, Tensor], Tensor]


def run(effort: Effort) -> list[Row]:
    """All rows of this benchmark."""
    rows = []
    for measure in (
        overhead,
        compiled_overhead,
        exact_gradient,
        beside_jax,
        saved_for_backward,
        one_slow_sample,
        long_training,
    ):
        print(f"{measure.__name__.replace('_', ' ')} ...", flush=True)
        rows += measure(effort)
    return rows


# --- The two ways to solve --------------------------------------------------------------------------------


def ours(solver: im.Anderson | im.Broyden, cell: nn.Module, z0: Tensor, x: Tensor) -> Tensor:
    return im.fixed_point(cell, z0, x, solver=solver, adjoint=ADJOINT, on_failure="raise").value


def theirs(solver: TorchDEQ, cell: nn.Module, z0: Tensor, x: Tensor) -> Tensor:
    return solver(lambda z: cell(z, x), z0)


def problem(batch: int) -> tuple[nn.Module, Tensor, Tensor]:
    """The convolutional cell, the start z0 of its solve, and x."""
    torch.manual_seed(0)
    cell = Cell(channels=48, inner_channels=64, groups=8)
    x = torch.randn(batch, 48, 16, 16)
    return cell, torch.zeros_like(x), x


# --- What the solver costs beside f -----------------------------------------------------------------------


@torch.no_grad()
def overhead(effort: Effort) -> list[Row]:
    """Time of a forward solve over that of its calls of f alone."""
    cell, z0, x = problem(32 if effort.full else 2)
    at = cell(cell(z0, x), x)
    calls_at_once = 12  # about as many as in a solve

    def calls_alone() -> None:
        for _ in range(calls_at_once):
            cell(at, x)

    solves: dict[str, Callable[[], Tensor]] = {}
    for name in SOLVERS:
        solves[name] = partial(ours, SOLVERS[name], cell, z0, x)
        solves[f"torchdeq {name}"] = partial(theirs, PEERS[name], cell, z0, x)
    calls = {}
    for name, solve in solves.items():
        with counted(cell) as count:
            solve()
        calls[name] = count()

    rows, seconds = [], []
    for name, goal in (("Anderson", 1.15), ("Broyden", 1.3)):
        pair = (name, f"torchdeq {name}")
        bare = partial(history_moved, SOLVERS[name], cell, z0, x, calls[name])
        # One pair at a time, since what a solve does to the memory of the process affects the next one.
        runs = {"calls": calls_alone, **{who: solves[who] for who in pair}, "history moved": bare}
        times = alternate(runs, effort.rounds)
        seconds += times["calls"]
        found = {who: ratios(times[who], times["calls"], calls_at_once / calls[who]) for who in pair}
        texts = [
            f"{spread.show()}; {1e3 * Spread.of(times[who]).median:.0f} ms, {calls[who]} calls"
            for who, spread in found.items()
        ]
        numbers = {who: {"calls": calls[who], "seconds": times[who]} for who in found}
        numbers["calls alone"] = {"calls": calls_at_once, "seconds": times["calls"]}
        met = found[name].median <= goal
        rows.append(Row(f"{name}: overhead of the forward solve", *texts, f"at most {goal:g}", met, numbers))
        least = ratios(times["history moved"], times["calls"], calls_at_once / calls[name])
        numbers = {"history moved": {"calls": calls[name], "seconds": times["history moved"]}}
        rows.append(Row(f"{name}: the same of f, and of moving its history", least.show(), "", numbers=numbers))
    alone = Spread.of([t / calls_at_once for t in seconds])
    return [Row("one call of f, ms", alone.show(1e3, 1), "the same", numbers={"seconds": seconds}), *rows]


def history_moved(solver: im.Anderson | im.Broyden, cell: nn.Module, z: Tensor, x: Tensor, calls: int) -> None:
    """Calls of f, and only the memory traffic that the solver cannot avoid.

    It writes what is new in its history, and reads all of its history for inner products with the residual and for
    a linear combination.
    """
    batch, n, m = len(z), z[0].numel(), solver.history
    memories = empty_slots(z.reshape(batch, n), m, 2 if isinstance(solver, im.Anderson) else 1)
    weights = torch.full((batch, m), 1 / m)
    at = z.reshape(batch, n)
    for k in range(calls):
        new = cell(at.view_as(z), x).reshape(batch, n)
        count = min(k + 1, m)
        r = torch.sub(new, at, out=memories[0].select(1, k % m))
        if len(memories) > 1:
            memories[1].select(1, k % m).copy_(new)
        products(r, memories[0][:, :count])
        at = combine(weights[:, :count], memories[-1][:, :count])


@torch.no_grad()
def compiled_overhead(effort: Effort) -> list[Row]:
    """The same with f compiled: a whole solve as one graph, and the eager loop around a compiled f."""
    if not effort.full:
        return []
    cell, z0, x = problem(32)
    fast = torch.compile(cell)
    at = fast(fast(z0, x), x)
    calls_at_once = 12

    def calls_alone() -> None:
        for _ in range(calls_at_once):
            fast(at, x)

    rows = []
    for name, goal in (("Anderson", 1.1), ("Broyden", 1.2)):
        solver = SOLVERS[name]

        def solve(f: nn.Module, compile: bool, solver: im.Anderson | im.Broyden = solver) -> im.Solution:
            how = {"solver": solver, "on_failure": "raise", "compile": compile}
            return im.fixed_point(f, z0, x, **how)

        solves = {"one graph": partial(solve, cell, True), "eager loop": partial(solve, fast, False)}
        calls = {who: solve().evaluations for who, solve in solves.items()}
        times = alternate({"calls": calls_alone, **solves}, effort.rounds, warm=True)
        found = {who: ratios(times[who], times["calls"], calls_at_once / calls[who]) for who in solves}
        texts = [
            f"{who} {spread.show()}; {1e3 * Spread.of(times[who]).median:.0f} ms, {calls[who]} calls"
            for who, spread in found.items()
        ]
        numbers = {who: {"calls": calls[who], "seconds": times[who]} for who in solves}
        numbers["calls alone"] = {"calls": calls_at_once, "seconds": times["calls"]}
        met = min(spread.median for spread in found.values()) <= goal
        what = f"{name}: overhead of the forward solve, f compiled"
        rows.append(Row(what, "; ".join(texts), "", f"at most {goal:g}", met, numbers))
    return rows


# --- Exact gradients --------------------------------------------------------------------------------------


def exact_gradient(effort: Effort) -> list[Row]:
    """Time of a forward and a backward pass, and how far the gradient is from the exact one."""
    cell, z0, x = problem(32 if effort.full else 2)
    cotangent = torch.randn_like(x)
    x.requires_grad_()
    inputs = [x, *cell.parameters()]
    wide = (t.detach().double() for t in (x, cotangent))
    _, exact = unrolled_gradient(copy.deepcopy(cell).double(), *wide)

    def gradient(solve: Solve) -> list[Tensor]:
        return list(torch.autograd.grad(solve(cell, z0, x), inputs, cotangent))

    runs, errors, calls, peaks = {}, {}, {}, {}
    for name in SOLVERS:
        runs[name] = partial(gradient, partial(ours, SOLVERS[name]))
        runs[f"torchdeq {name}"] = partial(gradient, partial(theirs, PEERS[name]))
    for name, compute in runs.items():
        with counted(cell) as count:
            errors[name] = relative_error(compute(), exact)
        calls[name], peaks[name] = count(), peak_mib(compute)

    rows = []
    for name, goal in (("Anderson", 1.25), ("Broyden", 2.0)):
        peer = f"torchdeq {name}"
        times = alternate({who: runs[who] for who in (name, peer)}, effort.rounds)
        faster = ratios(times[peer], times[name])
        numbers = {
            who: {"error": errors[who], "calls": calls[who], "peak_MiB": peaks[who], "seconds": times[who]}
            for who in (name, peer)
        }
        texts = [
            f"{Spread.of(times[who]).show(1e3, 0)}; {calls[who]} calls, peak {peaks[who]:.0f} MiB"
            for who in (name, peer)
        ]
        texts[0] += f"; {faster.show()} times faster"
        met = faster.median >= goal
        rows.append(Row(f"{name}: exact gradient, ms", *texts, f"{goal:g} times faster", met, numbers))
        texts = [f"{errors[who]:.1e}" for who in (name, peer)]
        rows.append(Row(f"{name}: gradient error", *texts, "no greater", errors[name] <= errors[peer]))
    return rows


def beside_jax(effort: Effort) -> list[Row]:
    """Compare with compiled JAX programs in a separate process; in few rounds, as they are slow."""
    if not effort.full:
        return []
    cell, z0, x = problem(32)
    cotangent = torch.randn_like(x)
    x.requires_grad_()
    inputs = [x, *cell.parameters()]
    solvers = {**SOLVERS, "FixedPointIteration": im.FixedPointIteration(rtol=RTOL, max_steps=MAX_STEPS)}
    wide = (t.detach().double() for t in (x, cotangent))
    z, exact = unrolled_gradient(copy.deepcopy(cell).double(), *wide)
    handed = dict(cell.named_parameters())
    handed |= {"x": x, "cotangent": cotangent, "groups": cell.norm_sum.num_groups}
    # Their tolerances are absolute, and for the batch as a whole.
    handed |= {"atol": RTOL * float(z.norm()), "rtol": RTOL, "max_steps": MAX_STEPS}
    handed |= {"history": SOLVERS["Anderson"].history}
    lines = []
    for name, package in (("Anderson", None), ("FixedPointIteration", "optimistix")):
        solve = partial(ours, solvers[name], cell, z0, x)

        def forward(solve: Callable[[], Tensor] = solve) -> list[Tensor]:
            with torch.no_grad():
                return [solve()]

        def gradient(solve: Callable[[], Tensor] = solve) -> list[Tensor]:
            return list(torch.autograd.grad(solve(), inputs, cotangent))

        of_z, of_gradient = (partial(relative_error, exact=right) for right in ([z], exact))
        lines += [
            Line(f"{name}: forward, ms", name, forward, of_z, package=package),
            Line(f"{name}: exact gradient, ms", f"{name}, gradient", gradient, of_gradient, package=package),
        ]
    return beside("jax_deq", "jaxopt", handed, lines, min(effort.rounds, 2), digits=0)


# --- Memory -----------------------------------------------------------------------------------------------


def saved_for_backward(effort: Effort) -> list[Row]:
    """Bytes that a forward pass leaves for the backward pass, after few and after many iterations."""
    cell, z0, x = problem(2)
    x.requires_grad_()
    few, many = 5, effort.iterations

    def unrolled(steps: int) -> Tensor:
        z = z0
        for _ in range(steps):
            z = cell(z, x)
        return z

    def implicit(steps: int) -> Tensor:
        solver = im.FixedPointIteration(rtol=0, max_steps=steps)
        return im.fixed_point(cell, z0, x, solver=solver, adjoint=ADJOINT).value

    def peer(steps: int) -> Tensor:
        return TorchDEQ("anderson", 0.0, steps)(lambda z: cell(z, x), z0)

    found = {
        name: [saved_bytes(partial(solve, steps)) for steps in (few, many)]
        for name, solve in (("implicit", implicit), ("unrolled", unrolled), ("torchdeq", peer))
    }
    text = {name: " and ".join(f"{size / 2**20:.2f}" for size in sizes) for name, sizes in found.items()}
    what = f"MiB saved for backward after {few} and {many} iterations, batch 2"
    met = found["implicit"][0] == found["implicit"][1]
    return [
        Row(what, text["implicit"], text["torchdeq"], "equal", met, found),
        Row("the same, iterations unrolled by autograd", text["unrolled"], ""),
    ]


# --- One slow sample --------------------------------------------------------------------------------------


class Uneven:
    """f(z, rate, x, W) = rate W z + x with W orthogonal; `rate` `(B, 1)` sets how slowly a sample converges.

    It counts the rows that it is evaluated on: calls weighted by batch size.
    """

    def __init__(self, samples: int, width: int = 32):
        generator = torch.Generator().manual_seed(0)
        self.W = torch.linalg.qr(torch.randn(width, width, generator=generator))[0]
        self.x = torch.randn(samples, width, generator=generator)
        self.rate = torch.full((samples, 1), 0.3)
        self.rows = 0

    def __call__(self, z: Tensor, rate: Tensor, x: Tensor, W: Tensor) -> Tensor:
        self.rows += len(z)
        return rate * (z @ W.T) + x

    def rows_of(self, solve: SolveUneven, which: slice = slice(None)) -> int:
        """Rows evaluated to solve the samples `which` in one batch."""
        before = self.rows
        with torch.no_grad():
            solve(self, self.rate[which], self.x[which])
        return self.rows - before

    def make_last_slow(self, solve: SolveUneven, times: float) -> float:
        """Make the last sample take `times` the calls of the first, as nearly as possible; returns the factor."""
        last, usual = slice(len(self.x) - 1, None), self.rows_of(solve, slice(0, 1))
        reached = {}
        low, high = 0.3, 0.98
        for _ in range(14):
            rate = 1 - math.sqrt((1 - low) * (1 - high))
            self.rate[last] = rate
            reached[rate] = self.rows_of(solve, last) / usual
            low, high = (rate, high) if reached[rate] < times else (low, rate)
        best = min(reached, key=lambda rate: abs(reached[rate] - times))
        self.rate[last] = best
        return reached[best]

    def together_over_apart(self, solve: SolveUneven) -> float:
        """Rows evaluated for one batch of all samples, over those for each sample alone."""
        apart = sum(self.rows_of(solve, slice(i, i + 1)) for i in range(len(self.x)))
        return self.rows_of(solve) / apart


SolveUneven = Callable[[Uneven, Tensor, Tensor], object]


def one_slow_sample(effort: Effort) -> list[Row]:
    """Work for a batch in which one sample takes ten times the steps, over that for every sample alone."""

    def with_solver(solver: im.FixedPointIteration | im.Anderson) -> SolveUneven:
        options = {"solver": solver, "in_dims": (0, 0, None), "on_failure": "raise"}
        return lambda f, rate, x: im.fixed_point(f, torch.zeros_like(x), rate, x, f.W, **options)

    def peer(f: Uneven, rate: Tensor, x: Tensor) -> Tensor:
        return TorchDEQ("anderson", RTOL, 1000)(lambda z: f(z, rate, x, f.W), torch.zeros_like(x))

    cases: dict[str, tuple[SolveUneven, SolveUneven | None]] = {
        "FixedPointIteration": (with_solver(im.FixedPointIteration(rtol=RTOL, max_steps=1000)), None),
        "Anderson": (with_solver(im.Anderson(rtol=RTOL, max_steps=1000, history=6)), peer),
    }
    rows = []
    for name, solves in cases.items():
        texts, numbers = [], {}
        for who, solve in zip(("implicitly", "torchdeq"), solves):
            if solve is None:
                texts.append("")
                continue
            f = Uneven(effort.slow_samples)
            slower = f.make_last_slow(solve, 10)
            ratio = f.together_over_apart(solve)
            texts.append(f"{ratio:.2f} (slow: {slower:.1f} times)")
            numbers[who] = {"ratio": ratio, "slower": slower}
        what = f"{name}: rows evaluated / solving apart; 1 sample of {effort.slow_samples} is slow"
        rows.append(Row(what, *texts, "at most 1.3", numbers["implicitly"]["ratio"] <= 1.3, numbers))
    return rows


# --- Long training ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Alive:
    """What a process holds: tensors that Python sees, their bytes, and the memory of the whole process in MiB."""

    tensors: int
    bytes: int
    process: float

    @classmethod
    def now(cls) -> Alive:
        gc.collect()
        found = [t for t in gc.get_objects() if issubclass(type(t), Tensor)]
        # For compiled functions the tracer keeps fake tensors, which have no memory.
        found = [t for t in found if not (isinstance(t, FakeTensor) or is_functorch_wrapped_tensor(t))]
        storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in found}
        return cls(len(found), sum(storages.values()), resident_mib())


def long_training(effort: Effort) -> list[Row]:
    """Memory growth: what is alive after many training steps but not after a few."""
    first = effort.training_steps // 10

    def growth(solve: Solve) -> Alive:
        torch.manual_seed(0)
        cell = DenseCell()
        optimizer = torch.optim.Adam(cell.parameters(), lr=1e-3)
        measured = []
        for step in range(effort.training_steps + 1):
            if step in (first, effort.training_steps):
                measured.append(Alive.now())
            x = torch.randn(32, 64)
            loss = (solve(cell, torch.zeros_like(x), x) - x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            del x, loss
        early, late = measured
        return Alive(late.tensors - early.tensors, late.bytes - early.bytes, late.process - early.process)

    found = {
        "implicitly": growth(partial(ours, SOLVERS["Anderson"])),
        "torchdeq": growth(partial(theirs, PEERS["Anderson"])),
    }
    texts = [f"{g.tensors} tensors, {g.bytes} bytes; process {g.process:+.1f} MiB" for g in found.values()]
    what = f"growth from training step {first} to {effort.training_steps}, dense cell, batch 32"
    # A leaked graph of one step would hold four states of 8 KiB or more.
    leak = 32 * (effort.training_steps - first) / 1024
    grown = found["implicitly"]
    met = grown.tensors == grown.bytes == 0 and not grown.process >= leak / 4  # NaN: not known
    return [Row(what, *texts, "none", met, {who: vars(g) for who, g in found.items()})]
