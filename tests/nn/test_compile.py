"""A whole solve as one graph: the same answers, compiled once.

Most of these trace graphs and run them by PyTorch's own operations.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.testing import assert_close

import implicitly as im
from implicitly.nn.per_solve import PerSolve
from tests.nn.cells import Around, Dense, gradients

# PyTorch's compiler imports and calls its own deprecated parts; nothing of ours is meant.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*"),
    pytest.mark.filterwarnings("ignore::FutureWarning:torch.*"),
]


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)


def assert_one_graph(backward=0):
    assert counters["stats"]["unique_graphs"] == 1 + backward
    assert not counters["graph_break"]


def assert_same_solution(a, b):
    assert_close(a.value, b.value, rtol=1e-5, atol=1e-6)
    assert torch.equal(a.status, b.status)
    assert torch.equal(a.steps, b.steps)
    assert_close(a.residual, b.residual, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize(
    "solver",
    [
        im.FixedPointIteration(rtol=1e-4),
        im.Anderson(rtol=1e-5, history=2),  # histories that fill up on the way
        im.Broyden(rtol=1e-5, history=2),
    ],
)
def test_a_layer_is_one_graph_with_the_eager_answers(traced, solver):
    check_a_layer(solver)


@pytest.mark.slow
def test_code_is_generated_for_a_layer():
    check_a_layer(im.Broyden(rtol=1e-4))


def check_a_layer(solver):
    eager = im.nn.DEQ(Dense(), solver)
    compiled = im.nn.DEQ(eager.cell, solver, compile=True)
    x = torch.randn(5, 4, requires_grad=True)
    value = compiled(x)
    assert_one_graph()
    expected = eager(x)
    assert_same_solution(compiled.solution, eager.solution)
    inputs = (x, *eager.parameters())
    for a, b in zip(gradients(value, *inputs), gradients(expected, *inputs)):
        assert_close(a, b, rtol=1e-3, atol=1e-4)
    # Other values and other parameters need no other graph; the result is not that of the first call.
    with torch.no_grad():
        eager.cell.linear.weight.mul_(0.5)
    y = torch.randn(5, 4)
    assert_close(compiled(y), eager(y), rtol=1e-5, atol=1e-5)
    assert_same_solution(compiled.solution, eager.solution)
    assert_one_graph(backward=1)


@pytest.mark.slow
def test_what_is_decided_once_a_solve_is_an_input_of_the_graph():
    layer = im.nn.DEQ(Around(im.nn.Dropout(0.5)), im.FixedPointIteration(rtol=1e-5), compile=True)
    twin = im.nn.DEQ(layer.cell, layer.solver)
    x = torch.randn(3, 4)
    values = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        values.append(layer(x))
        torch.manual_seed(seed)
        assert_close(values[-1], twin(x), rtol=1e-5, atol=1e-6)
    assert_one_graph()
    assert not torch.equal(*values)
    assert all(m.held.numel() == 0 for m in layer.modules() if isinstance(m, PerSolve))


def depends_on_data(z, x):
    return torch.tanh(0.3 * z + x) if float(z.detach().sum()) < 1e9 else z


def test_what_cannot_be_one_graph_runs_eagerly_and_says_so():
    f, solver = depends_on_data, im.FixedPointIteration()
    x = torch.randn(3, 4, requires_grad=True)
    with pytest.warns(im.CompileWarning, match="eager"):
        compiled = im.fixed_point(f, torch.zeros(3, 4), x, solver=solver, compile=True)
    eager = im.fixed_point(f, torch.zeros(3, 4), x, solver=solver)
    assert torch.equal(compiled.value, eager.value)
    assert torch.equal(compiled.steps, eager.steps)
    assert_close(gradients(compiled.value, x), gradients(eager.value, x))


def test_an_error_of_f_is_not_taken_for_the_compilers():
    class Wrong(nn.Module):
        def forward(self, z, x):
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        im.nn.DEQ(Wrong(), compile=True)(torch.randn(2, 2))


def test_unrolling_a_graph_is_refused():
    with pytest.raises(ValueError, match="UnrolledAdjoint"):
        im.nn.DEQ(Dense(), adjoint=im.UnrolledAdjoint(), compile=True)(torch.randn(2, 4))
