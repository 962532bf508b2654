"""The backward solve of a fixed point as one graph: its answers, when it is made anew, and when it is not used."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.func import vjp
from torch.testing import assert_close

import implicitly as im
from implicitly import compiled
from implicitly.linearised import CannotSplitError, split_pullback
from implicitly.recipes.deq_image import Cell as ImageCell

D = torch.float64
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
BACKWARD = "the backward solve of "
PICARD = im.FixedPointIteration(rtol=1e-11)


class Cell(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 6, dtype=D), nn.Linear(6, 4, dtype=D)
        self.register_buffer("shift", torch.zeros(4, dtype=D))
        self.scale, self.shifted = 0.6, False

    def forward(self, z, x):
        z = z + self.shift if self.shifted else z
        return self.scale * torch.tanh(self.outer(torch.tanh(self.inner(z)))) + x


def gradients(cell, x, compile, linear_solver=None, parameters=None, **options):
    adjoint = im.ImplicitAdjoint(linear_solver=linear_solver or im.GMRES(rtol=1e-10), **options)
    value = im.fixed_point(cell, torch.zeros_like(x), x, solver=PICARD, adjoint=adjoint, compile=compile).value
    weights = torch.linspace(-1, 2, x.numel(), dtype=D).view_as(x)
    return torch.autograd.grad((value * weights).sum(), [x, *(parameters or cell.parameters())])


def backward_graphs():
    return [graph for graph in im.compile_statistics() if graph.name.startswith(BACKWARD)]


def assert_same(cell, x, **options):
    for one, other in zip(gradients(cell, x, True, **options), gradients(cell, x, False, **options)):
        assert_close(one, other, rtol=1e-8, atol=1e-9)


SOLVERS = (
    im.GMRES(rtol=1e-10),
    im.GMRES(rtol=1e-10, restart=2),
    im.BiCGStab(rtol=1e-10),
    im.Neumann(rtol=1e-10),
    im.Neumann(rtol=0, max_steps=4),
    im.Anderson(rtol=1e-10),
    im.DenseLU(rtol=1e-10),
)


@pytest.fixture
def x():
    return torch.randn(5, 4, dtype=D, requires_grad=True)


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
def test_gives_the_gradient_of_the_eager_solve(traced, solver, x):
    cell = Cell()
    for _ in range(2):
        assert_same(cell, x, linear_solver=solver)
    (graph,) = backward_graphs()
    assert (graph.calls, graph.fallback) == (2, None)


def test_counts_products_and_tells_who_listens(traced, x):
    found = []
    for compile in (True, False):
        gradients(Cell(), x, compile, listen=found.append)
    assert found[0].evaluations > 3
    assert all(bool((f.status == im.Status.CONVERGED).all()) for f in found)


@pytest.mark.slow
def test_a_setting_of_f_that_changed_makes_another_graph(traced, x):
    cell = Cell()
    for scale in (0.6, 0.2):
        cell.scale = scale
        for _ in range(2):
            assert_same(cell, x)
    (graph,) = backward_graphs()
    assert (graph.calls, graph.fallback) == (2, None)


@pytest.mark.slow
def test_settings_that_change_from_solve_to_solve_are_told_of(traced, x):
    cell = Cell()
    assert_same(cell, x)
    cell.scale = 0.2
    with pytest.warns(im.CompileWarning, match="backward.*what f computes has changed"):
        assert_same(cell, x)
    assert_same(cell, x)
    (graph,) = backward_graphs()
    assert graph.fallback is not None


def test_parameters_that_train_do_not(traced, x):
    cell = Cell()
    assert_same(cell, x)
    with torch.no_grad():
        for p in cell.parameters():
            p.add_(0.1)
    assert_same(cell, x)
    (graph,) = backward_graphs()
    assert graph.calls == 2


def test_buffers_and_tensors_that_f_closes_over_are_seen_to_change(traced, x):
    cell, factor = Cell(), torch.full((4,), 0.5, dtype=D)
    cell.shifted = True

    def f(z, x):
        return factor * cell(z, x)

    found = []
    for _ in range(3):
        assert_same(f, x, parameters=tuple(cell.parameters()))
        found.append(gradients(f, x, True, parameters=tuple(cell.parameters())))
        with torch.no_grad():
            cell.shift.add_(0.5)
            factor.mul_(1.2)
    assert not torch.allclose(found[0][0], found[2][0])
    (graph,) = backward_graphs()
    assert (graph.calls, graph.fallback) == (6, None)


def test_a_graph_that_is_wrong_is_given_up(traced, x, monkeypatch):
    right = compiled.split_pullback
    monkeypatch.setattr(compiled, "split_pullback", lambda f, *of: right(lambda *a: 0.5 * f(*a), *of))
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        with pytest.warns(im.CompileWarning, match="the result of the graph is wrong"):
            assert_same(Cell(), x)


def test_large_states_are_solved_eagerly(traced, x, monkeypatch):
    monkeypatch.setattr(compiled, "LARGE", x.nbytes - 1)
    assert_same(Cell(), x)
    assert not backward_graphs()


def test_derivatives_of_other_orders_and_modes(traced, x):
    cell = Cell()

    def f(x, compile):
        adjoint = im.ImplicitAdjoint(rtol=1e-11)
        return im.fixed_point(cell, torch.zeros_like(x), x, solver=PICARD, adjoint=adjoint, compile=compile).value

    second = []
    for compile in (True, False):
        (g,) = torch.autograd.grad(f(x, compile).square().sum(), x, create_graph=True)
        second.append(torch.autograd.grad(g.square().sum(), [x, cell.inner.weight]))
    assert_close(second[0], second[1], rtol=1e-7, atol=1e-8)
    forward = [
        torch.func.jvp(lambda x, c=c: f(x, c), (x.detach(),), (torch.ones_like(x),))[1] for c in (True, False)
    ]
    assert_close(forward[0], forward[1], rtol=1e-8, atol=1e-8)
    jacobians = [torch.func.jacrev(lambda x, c=c: f(x, c))(x.detach()) for c in (True, False)]
    assert_close(jacobians[0], jacobians[1], rtol=1e-8, atol=1e-8)


def test_samples_that_failed_have_no_part_in_it(traced):
    cell, x = Cell(), torch.randn(5, 4, dtype=D)
    x[1] = float("nan")
    x.requires_grad_()
    found = []
    for compile in (True, False):
        value = im.fixed_point(
            cell,
            torch.zeros_like(x),
            x,
            solver=PICARD,
            in_dims=0,
            on_failure="ignore",
            compile=compile,
        ).value
        found.append(torch.autograd.grad(value.nan_to_num().square().sum(), [x, *cell.parameters()]))
    assert bool(found[0][1].isfinite().all())
    assert_close(found[0], found[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "entry", [im.root, pytest.param(im.argmin, marks=pytest.mark.slow)], ids=lambda f: f.__name__
)
def test_roots_and_minima(traced, entry):
    W, x = torch.randn(4, 4, dtype=D), torch.randn(3, 4, dtype=D, requires_grad=True)

    def f(z, x):
        if entry is im.root:
            return z + z**3 + 0.1 * torch.tanh(z @ W) - x
        return ((z - x) ** 2).sum(-1) + 0.1 * (z**4).sum(-1) + 0.1 * ((z @ W) ** 2).sum(-1)

    solver = im.Broyden(rtol=1e-11) if entry is im.root else im.Newton(rtol=1e-11, line_search=False)
    found = [
        torch.autograd.grad(entry(f, torch.zeros_like(x), x, solver=solver, compile=c).value.square().sum(), x)
        for c in (True, False)
    ]
    assert_close(found[0], found[1], rtol=1e-8, atol=1e-8)
    assert [graph.fallback for graph in backward_graphs()] == [None]


def test_a_function_that_looks_at_numbers_has_no_such_parts():
    def f(z):
        return z * 2 if float(z.sum()) > 0 else z

    with pytest.raises(CannotSplitError, match="looks at a number"):
        split_pullback(f, torch.ones(2, 3), ())


def test_a_pullback_in_two_parts():
    cell = ImageCell(8, 16, 4)
    theta = (torch.randn(2, 8, 5, 5), *(p.detach() for p in cell.parameters()))
    names = [name for name, _ in cell.named_parameters()]

    def f(z, x, *parameters):
        return torch.func.functional_call(cell, dict(zip(names, parameters)), (z, x))

    z, u = torch.randn(2, 8, 5, 5), torch.randn(2, 8, 5, 5)
    prepare, pull = split_pullback(f, z, theta)
    assert_close(pull(u, *prepare(z, *theta)), vjp(lambda z: f(z, *theta), z)[1](u)[0])
    forward = {"convolution", "native_group_norm"}  # none of which is left to each product
    assert not forward & {
        str(node.target).split(".")[1]
        for node in pull.graph.nodes
        if node.op == "call_function" and "aten" in str(node.target)
    }


def test_a_pullback_of_any_batch():
    cell = ImageCell(8, 16, 4)
    names, parameters = zip(*((name, p.detach()) for name, p in cell.named_parameters()))

    def f(z, x, *parameters):
        z = z.unflatten(1, (8, 5, 5))
        return torch.func.functional_call(cell, dict(zip(names, parameters)), (z, x)).flatten(1)

    def inputs(batch):
        return torch.randn(batch, 200), torch.randn(batch, 200), (torch.randn(batch, 8, 5, 5), *parameters)

    _, z, theta = inputs(3)
    prepare, pull = split_pullback(f, z, theta, varying=[(0, 0), (1, 0)])
    for batch in (3, 7, 2):
        u, z, theta = inputs(batch)
        assert_close(pull(u, *prepare(z, *theta)), vjp(lambda z, theta=theta: f(z, *theta), z)[1](u)[0])


@pytest.mark.parametrize(
    "f",
    [
        lambda z, x: 0.3 * torch.tanh(z) * (0.5 if len(z) > 4 else 1) + x,
        lambda z, x: 0.3 * torch.tanh(z) * (0.5 if z.shape[0] > 4 else 1) + x,
        lambda z, x: 0.3 * torch.tanh(z) * torch.ones(3, 1, dtype=D) + x,
    ],
    ids=["its length", "a branch", "a tensor"],
)
def test_a_pullback_of_one_size_of_the_batch_is_none_of_any(f):
    z, x = torch.ones(3, 2, dtype=D), torch.ones(3, 2, dtype=D)
    with pytest.raises(CannotSplitError, match="size of the batch"):
        split_pullback(f, z, (x,), varying=[(0, 0), (1, 0)])
    split_pullback(f, z, (x,))


def test_what_varies_must_be_the_batch():
    x = torch.ones(5, dtype=D)
    with pytest.raises(CannotSplitError, match="not the batch"):
        split_pullback(lambda z, x: z * x.sum(), torch.ones(3, 2, dtype=D), (x,), varying=[(1, 0)])


@pytest.mark.slow
def test_a_function_that_looks_at_the_size_of_the_batch_has_a_graph_for_each(traced):
    cell = Cell()

    def f(z, x):
        return cell(z, x) * (0.5 if len(z) > 4 else 1)

    for batch in (5, 3, 7):
        x = torch.randn(batch, 4, dtype=D, requires_grad=True)
        assert_same(f, x, parameters=tuple(cell.parameters()))
    assert [graph.shapes[0][0] for graph in backward_graphs()] == [(5, 4), (3, 4), (7, 4)]
    assert all(graph.calls == 1 and graph.fallback is None for graph in backward_graphs())
