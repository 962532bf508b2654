"""Models with solves in them under `torch.compile`: right values and gradients, one graph break a solve."""

from __future__ import annotations

import copy
import inspect
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

import implicitly as im
from implicitly.graph_break import one_break

SIZE = 4

# The compiler's own, of graphs that go on after a break, and of what it imports.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:`torch.jit"),
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


class Steps(Weighted):
    def forward(self, x: Tensor) -> Tensor:
        return im.odeint(lambda t, y, w: -w * y, x, (0.0, 1.0), self.weight, solver=RK4).value[-1]


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


def unrolled() -> nn.Module:
    return FixedPoint(solver=BUDGET, adjoint=im.UnrolledAdjoint(), on_failure="ignore")


SOLVES: dict[str, Callable[[], nn.Module]] = {
    "DEQ": lambda: im.nn.DEQ(Plain()),
    "DEQ, parametrised": lambda: im.nn.DEQ(Cell()),
    "DEQ, budget": lambda: im.nn.DEQ(Plain(), BUDGET, on_failure="ignore"),
    "DEQ, warm": warm,
    "NeuralODE": lambda: im.nn.NeuralODE(Field()),
    "NeuralODE, RK4": lambda: im.nn.NeuralODE(Field(), solver=RK4),
    "fixed_point": FixedPoint,
    "fixed_point, unrolled": unrolled,
    "root": Root,
    "odeint": Trajectory,
    "odeint, RK4": Steps,
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


def test_fullgraph_says_what_to_do():
    compiled = torch.compile(Around(im.nn.DEQ(Plain())), backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="compile=True or a compiled f"):
        compiled(torch.randn(3, SIZE))


def test_functions_called_in_it_are_not_traced_either():
    seen = []

    def inner(x: Tensor) -> Tensor:
        seen.append(torch.compiler.is_compiling())
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


def test_the_compiler_is_not_imported_for_it():
    code = (
        "import sys, torch, implicitly as im\n"
        "im.fixed_point(lambda z, x: 0.5 * z + x, torch.zeros(2, 2), torch.ones(2, 2))\n"
        "assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
