"""Models with solves in them under `torch.compile`: right values and gradients, and one graph break a solve, or
none where the number of steps is known."""

from __future__ import annotations

import copy
import inspect
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters
from torch._functorch.aot_autograd import make_boxed_func

import implicitly as im
from implicitly.graph_break import LONGEST, one_break
from implicitly.ode.unroll import steps_of

SIZE = 4

# The compiler's own, of graphs that go on after a break, and of what it imports.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:`torch.jit"),
    pytest.mark.filterwarnings("ignore:.* should not be instantiated. Methods on autograd functions"),
    pytest.mark.filterwarnings("ignore::FutureWarning:torch.*"),
]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


class Cell(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.utils.parametrizations.spectral_norm(nn.Linear(SIZE, SIZE)).eval()

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(0.5 * self.linear(z) + x)


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(SIZE, SIZE)
        nn.init.orthogonal_(self.linear.weight, 0.4)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(z) + x)


class Field(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(SIZE, SIZE)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(self.linear(y))


BUDGET = im.FixedPointIteration(max_steps=12, rtol=0)
RK4 = im.RK4(dt=0.25)


class FixedPoint(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.cell, self.options = Plain(), options

    def forward(self, x: Tensor) -> Tensor:
        return im.fixed_point(self.cell, torch.zeros_like(x), x, **self.options).value


class Weighted(nn.Module):
    """Something solved for x and a weight."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, SIZE))


class Root(Weighted):
    def forward(self, x: Tensor) -> Tensor:
        return im.root(lambda z, x, w: z**3 + z * w - x, torch.zeros_like(x), x, self.weight).value


class Trajectory(Weighted):
    def forward(self, x: Tensor) -> Tensor:
        return im.odeint(lambda t, y, w: -w * y, x, (0.0, 0.5, 1.0), self.weight).value[-1]


class Quadratic(Weighted):
    def forward(self, x: Tensor) -> Tensor:
        bound = torch.ones(SIZE)
        return im.qp(torch.diag(self.weight), x, torch.eye(SIZE), 0.1 * bound).value


class Minimum(Weighted):
    def forward(self, x: Tensor) -> Tensor:
        def objective(z: Tensor, x: Tensor, w: Tensor) -> Tensor:
            return ((z - x * w) ** 2 + 0.1 * z**4).sum(-1)

        return im.argmin(objective, torch.zeros_like(x), x, self.weight).value


class Squares(Weighted):
    def forward(self, x: Tensor) -> Tensor:
        return im.least_squares(lambda z, x, w: z * w - x, torch.zeros_like(x), x, self.weight).value


class LinearSystem(Weighted):
    def forward(self, x: Tensor) -> Tensor:
        return im.linear_solve(lambda v, w: w * v, x, self.weight).value


class Trained(Weighted):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            best = x.mean(0) / self.weight
        return x + im.implicit_gradient(lambda z, x, w: ((w * z - x.mean(0)) ** 2).sum(), best, x, self.weight)


class Simplex(Weighted):
    def forward(self, x: Tensor) -> Tensor:
        return im.project.simplex(x * self.weight)


class Ranked(Weighted):
    def forward(self, x: Tensor) -> Tensor:
        return im.soft_rank(x * self.weight)


def warm() -> nn.Module:
    return im.nn.DEQ(Plain(), warm_start=im.nn.LastBatch())


SOLVES: dict[str, Callable[[], nn.Module]] = {
    "DEQ": lambda: im.nn.DEQ(Plain()),
    "DEQ, parametrised": lambda: im.nn.DEQ(Cell()),
    "DEQ, budget": lambda: im.nn.DEQ(Plain(), BUDGET, on_failure="ignore"),
    "DEQ, warm": warm,
    "NeuralODE": lambda: im.nn.NeuralODE(Field()),
    "fixed_point": FixedPoint,
    "root": Root,
    "odeint": Trajectory,
    "qp": Quadratic,
    "argmin": Minimum,
    "least_squares": Squares,
    "linear_solve": LinearSystem,
    "implicit_gradient": Trained,
}
TRACED: dict[str, Callable[[], nn.Module]] = {"simplex": Simplex, "soft_rank": Ranked}


class Around(nn.Module):
    """Layers before and after a solve.

    Not an `nn.Sequential`: of that the tracer gives up the whole loop at the first break.
    """

    def __init__(self, solve: nn.Module):
        super().__init__()
        self.first, self.solve, self.last = nn.Linear(SIZE, SIZE), solve, nn.Linear(SIZE, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.solve(self.first(x)))


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.between, self.second = im.nn.DEQ(Plain()), nn.Linear(SIZE, SIZE), im.nn.NeuralODE(Field())

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.first(x))) * 2


def model_of(name: str) -> nn.Module:
    """A layer of `im.nn` between others; the rest as they are: a break in a call in a call counts for each."""
    solve = SOLVES[name]()
    return Around(solve) if isinstance(solve, im.nn.DEQ | im.nn.NeuralODE) else solve


def breaks() -> int:
    return sum(counters["graph_break"].values())


def gradients(model: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    y = model(x)
    return y.detach(), *torch.autograd.grad(y.square().sum(), tuple(model.parameters()))


def check_equal(model: nn.Module, backend: str = "aot_eager") -> None:
    x, eager = torch.randn(3, SIZE), copy.deepcopy(model)
    compiled = torch.compile(model, backend=backend)
    torch.testing.assert_close(gradients(compiled, x), gradients(eager, x))


@pytest.mark.parametrize("name", SOLVES)
def test_one_break_a_solve_and_the_gradients_of_eager(name):
    check_equal(model_of(name))
    assert breaks() == 1, dict(counters["graph_break"])


@pytest.mark.parametrize("name", TRACED)
def test_projections_are_traced_without_a_break(name):
    check_equal(Around(TRACED[name]()))
    assert breaks() == 0


def test_two_solves_in_a_model_are_two_breaks():
    check_equal(Two())
    assert breaks() == 2


class Program(nn.Module):
    def __init__(self):
        super().__init__()
        cvxpy = pytest.importorskip("cvxpy")
        x, p = cvxpy.Variable(SIZE), cvxpy.Parameter(SIZE)
        problem = cvxpy.Problem(cvxpy.Minimize(cvxpy.sum_squares(x - p)), [x >= 0])
        self.first, self.last = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE)
        self.layer = im.nn.ConvexLayer(problem, [p], [x])

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.layer(self.first(x))[0])


def test_a_convex_layer_is_one_break():
    model, x = Program(), torch.randn(3, SIZE)
    torch.testing.assert_close(gradients(torch.compile(model, backend="aot_eager"), x), gradients(model, x))
    assert breaks() == 1


def test_inductor():
    check_equal(Around(im.nn.DEQ(Plain())), backend="inductor")
    assert breaks() == 1


@pytest.mark.parametrize("name", ["DEQ", "DEQ, warm", "NeuralODE", "fixed_point", "qp"])
def test_training_compiles_once(name):
    model, x = model_of(name), torch.randn(3, SIZE)
    eager, counter = copy.deepcopy(model), CompileCounter()
    compiled = torch.compile(model, backend=counter)
    ways = [(m, torch.optim.SGD(m.parameters(), 0.05)) for m in (compiled, eager)]
    counts = []
    for _ in range(4):
        losses = []
        for way, optimiser in ways:
            optimiser.zero_grad()
            losses.append(way(x).square().mean())
            losses[-1].backward()
            optimiser.step()
        torch.testing.assert_close(*losses)
        counts.append((counter.frame_count, breaks()))
    assert counts[0] == counts[-1]
    assert counts[0][1] == 1
    assert counter.frame_count >= 1


@pytest.mark.parametrize("name", ["DEQ", "NeuralODE"])
def test_no_grad_and_what_is_logged(name):
    model, x = model_of(name), torch.randn(3, SIZE)
    eager = copy.deepcopy(model)
    with torch.no_grad():
        compiled = torch.compile(model, backend="aot_eager")(x)
        torch.testing.assert_close(compiled, eager(x))
    assert not compiled.requires_grad
    assert breaks() == 1
    assert bool(model.solve.solution.converged.all())
    torch.testing.assert_close(model.solve.solution.steps, eager.solve.solution.steps)


def test_a_warm_start_is_used():
    model, x = Around(warm()), torch.randn(3, SIZE)
    compiled = torch.compile(model, backend="aot_eager")
    compiled(x)
    cold = model.solve.solution.steps
    compiled(x)
    assert bool((model.solve.solution.steps < cold).all())
    assert breaks() == 1


@pytest.mark.parametrize("layer", ["function", "module"])
def test_a_compiled_cell_is_compiled_once_and_trains(layer):
    cell, counter, x = Plain(), CompileCounter(), torch.randn(3, SIZE, requires_grad=True)
    compiled = torch.compile(cell, backend=counter)

    def solve(f: nn.Module) -> Tensor:
        return im.fixed_point(f, torch.zeros(3, SIZE), x).value if layer == "function" else im.nn.DEQ(f)(x)

    wanted = torch.autograd.grad(solve(cell).square().sum(), (x, *cell.parameters()))
    counts = []
    for _ in range(3):
        found = torch.autograd.grad(solve(compiled).square().sum(), (x, *cell.parameters()))
        torch.testing.assert_close(found, wanted)
        counts.append(counter.frame_count)
    assert counts[0] >= 1
    assert counts[1] == counts[2], counts


def test_the_entries_keep_their_names_and_signatures():
    assert im.fixed_point.__name__ == "fixed_point"
    assert "Anderson" in str(im.fixed_point.__doc__)
    assert list(inspect.signature(im.odeint).parameters)[:3] == ["f", "y0", "t"]


# ------------------------------------------------------------------------ steps whose number is known


class Steps(Weighted):
    """Constant steps, which pass outputs on the way; the method is made here."""

    def __init__(
        self, method: Callable[..., Any] = im.RK4, times=(0.0, 0.3, 0.4, 1.0), dt: float = 0.5, **options
    ):
        super().__init__()
        self.field, self.method, self.times, self.dt, self.options = Field(), method, times, dt, options

    def forward(self, x: Tensor) -> Tensor:
        def slope(t: Tensor, y: Tensor, w: Tensor) -> Tensor:
            return self.field(t, y) - w * y * torch.cos(t)

        solution = im.odeint(slope, x, self.times, self.weight, solver=self.method(dt=self.dt), **self.options)
        weights = torch.arange(1.0, 1.0 + len(self.times), dtype=x.dtype)
        return torch.einsum("t...,t->...", solution.value, weights)


class Pair(nn.Module):
    """A state of two tensors, and a start that unrolling differentiates."""

    def __init__(self, **options):
        super().__init__()
        self.cell, self.options = Plain(), options

    def forward(self, x: Tensor) -> Tensor:
        def f(z: tuple[Tensor, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
            return self.cell(z[1], x), 0.5 * z[0].sin()

        return sum(im.fixed_point(f, (0.1 * x, 0.2 * x), x, **self.options).value)


class Balance(Weighted):
    def __init__(self, **options):
        super().__init__()
        self.options = options

    def forward(self, x: Tensor) -> Tensor:
        def residual(z: Tensor, x: Tensor, w: Tensor) -> Tensor:
            return 0.2 * z**3 + z * w - x

        return im.root(residual, torch.zeros_like(x), x, self.weight, **self.options).value


class Deciding(nn.Module):
    """Decides a mask and a norm once a solve."""

    def __init__(self):
        super().__init__()
        self.linear, self.dropout = im.nn.SpectralNorm(nn.Linear(SIZE, SIZE)), im.nn.Dropout(0.3)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return self.dropout(torch.tanh(0.7 * self.linear(z) + x))


TWO, FEW = (im.FixedPointIteration(max_steps=n, rtol=0) for n in (2, 5))
# As few as show all that there is: histories are full, and the compiler traces each step.
ANDERSON = im.Anderson(max_steps=3, rtol=0, history=2)
BROYDEN = im.Broyden(max_steps=3, rtol=0)
FREE, PHANTOM, UNROLLED = im.JacobianFreeAdjoint(), im.PhantomAdjoint(2, damping=0.7), im.UnrolledAdjoint()
NEUMANN, KRYLOV = (im.ImplicitAdjoint(s(max_steps=2, rtol=0)) for s in (im.Neumann, im.GMRES))
ONCE = im.ImplicitAdjoint(im.GMRES(max_steps=1, rtol=0))
WHOLE: dict[str, Callable[[], nn.Module]] = {
    "plain, free": lambda: Pair(solver=FEW, adjoint=FREE),
    "plain, Neumann": lambda: Pair(solver=FEW, adjoint=NEUMANN),
    "Anderson, phantom": lambda: Pair(solver=ANDERSON, adjoint=PHANTOM),
    "Anderson, unrolled": lambda: Pair(solver=ANDERSON, adjoint=UNROLLED),
    "one system": lambda: Pair(solver=replace(ANDERSON, max_steps=2), adjoint=ONCE, batch_dims=0),
    "root, implicit": lambda: Balance(solver=BROYDEN, adjoint=KRYLOV),
    "DEQ, free": lambda: im.nn.DEQ(Plain(), FEW, FREE),
    "DEQ, few": lambda: im.nn.DEQ(Plain(), replace(ANDERSON, max_steps=2), ONCE),
    "DEQ, implicit": lambda: im.nn.DEQ(Plain(), ANDERSON, KRYLOV),
    "DEQ, decides": lambda: im.nn.DEQ(Deciding(), TWO, UNROLLED),
    "DEQ, warm": lambda: im.nn.DEQ(Plain(), FEW, PHANTOM, warm_start=im.nn.LastBatch()),
    "RK4": lambda: Steps(im.RK4, batch_dims=1),
    "Dopri8": lambda: Steps(im.Dopri8, dt=1.0, batch_dims=1),
    "ReversibleHeun": lambda: Steps(im.ReversibleHeun),
    "backwards in time": lambda: Steps(im.Heun, (1.0, 0.5, -1.0), dt=1.0),
    "odeint, unrolled": lambda: Steps(im.Heun, adjoint=UNROLLED),
    "NeuralODE": lambda: im.nn.NeuralODE(Field(), solver=im.Euler(dt=0.5)),
    "NeuralODE, times": lambda: im.nn.NeuralODE(Field(), (0.0, 0.2, 0.3), im.Heun(dt=0.1), batch_dims=1),
}


def with_input(model: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    """The value, and the gradients of the input and of all parameters."""
    torch.manual_seed(1)
    y = model(x)
    return y.detach(), *torch.autograd.grad(y.square().sum(), (x, *model.parameters()))


def batch(size: int = 3) -> Tensor:
    return torch.randn(size, SIZE, dtype=torch.float64, requires_grad=True)


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


BY_INDUCTOR = ["DEQ, free", "NeuralODE"]


LONG = {
    "Dopri8",
    "DEQ, warm",
    "backwards in time",
    "Anderson, unrolled",
    "root, implicit",
    "DEQ, few",
    "plain, Neumann",
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name in LONG))
        for name in sorted(WHOLE.keys() - set(BY_INDUCTOR))
    ],
)
def test_known_numbers_of_steps_are_no_break(name):
    model, x = Around(WHOLE[name]()).double(), batch()
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(3):
        torch.testing.assert_close(with_input(compiled, x), with_input(eager, x))
        with torch.no_grad():
            for mine, other in zip(model.parameters(), eager.parameters()):
                mine.mul_(0.9), other.mul_(0.9)
    assert breaks() == 0
    assert graphs() == (2 if name == "DEQ, warm" else 1)  # the first time it is cold


@pytest.mark.slow
def test_a_batch_without_samples_is_traced_too():
    model = Around(WHOLE["DEQ, implicit"]()).double()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(with_input(compiled, batch(0)), with_input(model, batch(0)))


@pytest.mark.parametrize("name", BY_INDUCTOR)
def test_known_numbers_of_steps_by_inductor(name):
    model, x = WHOLE[name]().double(), batch()
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(with_input(compiled, x), with_input(copy.deepcopy(model), x))
    assert (breaks(), graphs()) == (0, 1)


@pytest.mark.slow
def test_what_is_logged_of_a_solve_in_a_graph():
    for layer in (
        im.nn.DEQ(Plain(), replace(ANDERSON, max_steps=2), FREE),
        im.nn.NeuralODE(Field(), (0.0, 0.2, 1.0), im.Heun(dt=0.5)),
    ):
        x, eager = torch.randn(3, SIZE), copy.deepcopy(layer)
        torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
        eager(x)
        for name in ("value", "status", "residual", "steps"):
            torch.testing.assert_close(getattr(layer.solution, name), getattr(eager.solution, name), msg=name)
        assert layer.solution.evaluations == eager.solution.evaluations


@pytest.mark.parametrize(
    "model",
    [
        lambda: im.nn.DEQ(Plain(), TWO, FREE),
        lambda: Pair(solver=TWO, adjoint=FREE, in_dims=0),
        lambda: im.nn.NeuralODE(Field(), solver=im.Euler(dt=1.0), batch_dims=1),
    ],
    ids=["DEQ", "fixed_point", "NeuralODE"],
)
def test_a_second_number_of_samples_leaves_it_open(model):
    model = model()
    pairs = [(x, model(x)) for x in (torch.randn(size, SIZE) for size in (3, 5, 6, 7))]
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for x, eager in pairs:
        torch.testing.assert_close(compiled(x), eager)
    assert graphs() == 2


@pytest.mark.slow
@torch._dynamo.config.patch(recompile_limit=20)
def test_other_lengths_times_and_batches_make_graphs_of_their_own():
    model = Around(im.nn.NeuralODE(Field(), (0.0, 1.0), im.Euler(dt=1.0))).double()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)

    def check(size: int = 3) -> None:
        x = batch(size)
        torch.testing.assert_close(with_input(compiled, x), with_input(copy.deepcopy(model), x))

    for size in (3, 4, 6):
        check(size)
    assert graphs() == 2  # the second leaves the size open
    model.solve.solver = replace(model.solve.solver, dt=0.5)
    check()
    model.solve.t = (0.0, 0.5, 0.6)
    check()
    model.solve.solver = im.Midpoint(dt=0.6)
    check()
    assert breaks() == 0


@pytest.mark.slow
def test_samples_that_fail_are_told_by_their_status_and_have_no_gradient():
    class Logarithm(Plain):
        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return 0.5 * torch.tanh(self.linear(z)) + x.log()

    class Model(nn.Module):
        def __init__(self, adjoint):
            super().__init__()
            self.cell, self.adjoint = Logarithm(), adjoint

        def forward(self, x: Tensor) -> Tensor:
            z0 = torch.zeros_like(x)
            solution = im.fixed_point(
                self.cell, z0, x, solver=TWO, adjoint=self.adjoint, in_dims=0, on_failure="ignore"
            )
            self.status = solution.status
            return torch.where(solution.residual.isfinite()[:, None], solution.value, 0.0)

    x = batch().detach().abs() + 0.1
    x[1, 2] = -1
    for adjoint in (FREE, UNROLLED, ONCE):
        model = Model(adjoint).double()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        found = with_input(compiled, x.requires_grad_())
        status = model.status
        torch.testing.assert_close(found, with_input(model, x))
        assert all(bool(g.isfinite().all()) for g in found)
        assert status.tolist() == [im.Status.MAX_STEPS, im.Status.NON_FINITE, im.Status.MAX_STEPS]


def test_a_trajectory_in_a_graph_that_fails_says_so():
    def solve(y: Tensor) -> Any:
        return im.odeint(lambda t, y: y**2, y, (0.0, 3.0), solver=im.Euler(dt=0.1 * 3), batch_dims=1)

    found = torch.compile(solve, backend="aot_eager", fullgraph=True)(torch.tensor([[0.1], [1e30]]))
    assert found.converged.tolist() == [True, False]
    assert found.status[1] == im.Status.NON_FINITE
    with pytest.raises(ValueError, match="pass these times in t"):
        found.interpolate((1.0,))


def test_the_steps_of_a_graph_are_those_of_eager():
    for dtype in (torch.float32, torch.float64):
        for times, dt in (((0.0, 1.0), 0.1), ((1e3, 1e3 + 1), 0.1), ((2.0, 0.7, -1.0), 0.3), ((0.0, 0.2999), 0.1)):
            seen = []

            def f(t: Tensor, y: Tensor, seen: list[float] = seen) -> Tensor:
                seen.append(float(t))
                return -y

            solution = im.odeint(f, torch.ones(1, dtype=dtype), times, solver=im.Euler(dt=dt))
            steps = steps_of(times, dt, 100, dtype == torch.float32)
            assert len(steps) == solution.steps
            assert [t for t, *_ in steps] == seen[:-1]
    assert steps_of((0.0, 1.0), 0.1, 9, False) == steps_of((0.0, 1.0, 0.5), 0.1, 100, False) == ()
    assert steps_of((0.0, float("nan")), 0.1, 100, False) == steps_of((0.0,), 0.1, 100, False) == ()


@pytest.mark.slow
def test_checkpoints_are_kept_in_a_graph_too():
    def saved(adjoint) -> int:
        torch._dynamo.reset()
        kept = []

        def count(module: torch.fx.GraphModule, inputs: Any) -> Any:
            kept.append(len(module.graph.output_node().args[0]))
            return make_boxed_func(module.forward)

        backend = aot_autograd(fw_compiler=count, bw_compiler=lambda m, _: make_boxed_func(m.forward))
        options = {"solver": im.Euler(dt=1 / 16), "adjoint": adjoint}
        solve = lambda y: im.odeint(lambda t, y: -y.sin(), y, (0.0, 1.0), **options).value[-1]  # noqa: E731
        torch.compile(solve, backend=backend, fullgraph=True)(batch())
        return kept[0]

    # Of 16 steps: a state and a slope after every fourth, and what is there in any case.
    assert saved(im.RecursiveCheckpointAdjoint()) < 12
    assert saved(im.UnrolledAdjoint()) > 16


def test_f_may_write_into_the_copy_that_it_gets():
    def f(z: Tensor, x: Tensor) -> Tensor:
        return z.mul_(0.5).add_(x)

    def solve(x: Tensor) -> Tensor:
        return im.fixed_point(f, torch.zeros_like(x), x, solver=FEW, adjoint=FREE).value

    x = batch()
    torch.testing.assert_close(torch.compile(solve, backend="aot_eager", fullgraph=True)(x), x * (2 - 0.5**4))


BROKEN: dict[str, Callable[[], nn.Module]] = {
    "adaptive": lambda: FixedPoint(solver=im.Anderson(rtol=1e-4), adjoint=FREE),
    "adaptive backwards": lambda: FixedPoint(solver=FEW),
    "long": lambda: FixedPoint(solver=im.FixedPointIteration(max_steps=LONGEST + 1, rtol=0), adjoint=FREE),
    "listens": lambda: FixedPoint(solver=FEW, adjoint=replace(KRYLOV, listen=lambda found: None)),
    "Newton": lambda: FixedPoint(solver=im.Newton(max_steps=2, rtol=0), adjoint=KRYLOV),
    "long trajectory": lambda: Steps(im.Euler, dt=1 / (LONGEST + 1)),
    "implicit method": lambda: Around(im.nn.NeuralODE(Field(), solver=im.ImplicitEuler(dt=0.25))),
    "backsolve": lambda: Steps(adjoint=im.BacksolveAdjoint()),
    "times": lambda: Steps(times=torch.tensor([0.0, 1.0])),
    "event": lambda: Steps(event=im.Event(lambda t, y, w: y.sum() + 100)),
}


@pytest.mark.parametrize("name", BROKEN)
def test_other_solves_still_are_one_break(name):
    check_equal(BROKEN[name]())
    assert breaks() == 1, dict(counters["graph_break"])


def test_interpolation_in_a_compiled_model():
    class Model(Weighted):
        def forward(self, x: Tensor) -> Tensor:
            solution = im.odeint(lambda t, y, w: -w * y, x, (0.0, 1.0), self.weight, solver=self.solver)
            return solution.interpolate((0.5,))[0]

    for solver in (im.Dopri5(), RK4):
        model = Model()
        model.solver = solver
        check_equal(model)


def test_fullgraph_says_what_to_do():
    compiled = torch.compile(Around(im.nn.DEQ(Plain())), backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="compile=True or a compiled f"):
        compiled(torch.randn(3, SIZE))


@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")  # what a layer remembers
def test_export_says_what_can_be_exported():
    x = torch.randn(3, SIZE)
    with pytest.raises(RuntimeError, match=r"DEQ\.forward: torch\.export cannot export .* strict=True"):
        torch.export.export(im.nn.DEQ(Plain()), (x,), strict=False)
    model, sizes = im.nn.DEQ(Plain(), TWO, FREE), {0: torch.export.Dim("B")}
    with torch.no_grad():
        exported = torch.export.export(model, (x,), strict=True, dynamic_shapes=(sizes,)).module()
        for other in (2 * x, torch.randn(5, SIZE)):
            torch.testing.assert_close(exported(other), model(other))


def test_functions_called_in_it_are_not_traced_either():
    seen = []

    def inner(x: Tensor) -> Tensor:
        seen.append(torch.compiler.is_dynamo_compiling())
        return x + 1

    @one_break
    def outer(x: Tensor) -> Tensor:
        return inner(x)

    counter = CompileCounter()
    compiled = torch.compile(lambda x: outer(x * 2) * 3, backend=counter)
    assert compiled(torch.ones(())).item() == 9
    assert seen == [False]
    assert counter.frame_count == 2
    assert breaks() == 1


@pytest.mark.slow
def test_the_compiler_is_not_imported_for_it():
    code = (
        "import sys, torch, implicitly as im\n"
        "im.fixed_point(lambda z, x: 0.5 * z + x, torch.zeros(2, 2), torch.ones(2, 2))\n"
        "assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_records_without_values_are_refused_with_what_to_use_instead():
    from torch._subclasses import FakeTensorMode

    W, x = 0.3 * torch.ones(3, 3), torch.ones(2, 3)
    solves = {
        "fixed_point": lambda W: im.fixed_point(lambda z, x, W: torch.tanh(z @ W + x), torch.zeros(2, 3), x, W),
        "odeint": lambda W: im.odeint(lambda t, y, W: torch.tanh(y @ W), x, torch.tensor([0.0, 1.0]), W),
        "qp": lambda W: im.qp(torch.eye(3), x @ W, torch.eye(3), torch.ones(3)),
    }
    for name, solve in solves.items():
        with pytest.raises(NotImplementedError, match=rf"{name}: .*torch\.func\.jvp"):
            torch.func.linearize(lambda W, solve=solve: solve(W).value, W)
        with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(NotImplementedError, match=name):
            solve(W)
    x, W = x.to("meta"), W.to("meta")
    with torch.device("meta"), pytest.raises(NotImplementedError, match=r"fixed_point: .*'meta'"):
        solves["fixed_point"](W)


def test_an_error_of_f_stays_what_it_is_where_operations_are_recorded():
    def f(z, x, W):
        return torch.tanh(z @ W + x[:, :2])

    with pytest.raises(RuntimeError, match="size") as caught:
        torch.func.linearize(
            lambda W: im.fixed_point(f, torch.zeros(2, 3), torch.ones(2, 3), W).value, torch.eye(3)
        )
    assert not isinstance(caught.value, NotImplementedError)
