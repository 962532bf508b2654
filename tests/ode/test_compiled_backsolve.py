"""The continuous adjoint as a graph: the gradients of the eager backward solve, and its fallbacks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import implicitly as im

D = torch.float64
# PyTorch's compiler imports and calls its own deprecated parts; nothing of ours is meant.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
METHOD = im.Bosh3(rtol=1e-4, atol=1e-6)


def turning(t, y, w):
    A = torch.tensor([[-0.1, 2.0], [-2.0, -0.1]], dtype=y.dtype)
    return torch.tanh(y) @ A * w + 0.1 * torch.sin(t)


def derivatives(f, y0, t, w, *, compile, adjoint, **options):
    """By the start, the times and w, of a random sum of all outputs."""
    inputs = [x.detach().clone().requires_grad_() for x in (y0, t, w)]
    y0, t, w = inputs
    options = {"solver": METHOD, "on_failure": "ignore", **options}
    value = im.odeint(f, y0, t, w, adjoint=adjoint, compile=compile, **options).value
    torch.manual_seed(1)
    return torch.autograd.grad((value.nan_to_num() * torch.randn_like(value)).sum(), inputs)


def assert_same(f, y0, t, w, adjoint=im.BacksolveAdjoint(), **options):
    found, right = (derivatives(f, y0, t, w, compile=c, adjoint=adjoint, **options) for c in (True, False))
    torch.testing.assert_close(found, right, rtol=1e-10, atol=1e-10)
    return found


def names(traced):
    return sorted(graph.name.partition(" ")[0] for graph in traced.values())


def test_outputs_between_and_times_of_each_sample(traced):
    y0, w = torch.randn(3, 2, dtype=D), torch.tensor(0.8, dtype=D)
    t = torch.tensor([[0.0, 1, 2], [1.5, 1, 0.5], [0, 0.1, 1]], dtype=D)
    assert_same(turning, y0, t, w, batch_dims=1)
    assert names(traced) == ["odeint", "the"]


@pytest.mark.slow
def test_a_solver_of_its_own_and_args_of_each_sample(traced):
    y0, w, t = (
        torch.randn(3, 2, dtype=D),
        torch.rand(3, 1, dtype=D),
        torch.tensor([0.0, 1.0, 0.5], dtype=D).sort()[0],
    )
    adjoint = im.BacksolveAdjoint(solver=im.Heun(rtol=1e-3))
    assert_same(turning, y0, t, w, adjoint, batch_dims=1, in_dims=0)
    assert len(traced) == 3  # of two backward graphs the first looks for the length of its first step


@pytest.mark.slow
def test_samples_that_failed_have_no_part_in_it(traced):
    def squared(t, y, w):
        return y**2 * w

    y0, w = torch.tensor([[0.3], [float("nan")], [0.2]], dtype=D), torch.full((3, 1), 1.1, dtype=D)
    by_y0, _, by_w = assert_same(squared, y0, torch.tensor([0.0, 1.0], dtype=D), w, batch_dims=1)
    assert not torch.cat([by_w[1], by_y0[1]]).any()
    assert by_w[[0, 2]].all()
    assert names(traced) == ["odeint", "the"]


@pytest.mark.slow
def test_an_unstable_way_back_is_told_of_and_checkpointed(traced):
    y0, w, t = torch.ones(1, 1, dtype=D), torch.tensor(30.0, dtype=D), torch.tensor([0.0, 2.0], dtype=D)
    with pytest.warns(im.ConvergenceWarning, match="BacksolveAdjoint stopped"):
        found = derivatives(lambda t, y, w: -w * y, y0, t, w, compile=True, adjoint=im.BacksolveAdjoint())
    exact = im.RecursiveCheckpointAdjoint(arc_length=True)
    right = derivatives(lambda t, y, w: -w * y, y0, t, w, compile=False, adjoint=exact)
    torch.testing.assert_close(found, right)
    assert names(traced)[:2] == ["odeint", "the"]


@pytest.mark.parametrize(
    "adjoint", [im.BacksolveAdjoint(seminorm=False), im.BacksolveAdjoint(im.Kvaerno3(rtol=1e-5), check=1e6)]
)
def test_a_way_back_that_cannot_be_a_graph_is_solved_eagerly_and_a_warning_says_why(traced, adjoint):
    y0, w, t = torch.randn(2, dtype=D), torch.tensor(0.8, dtype=D), torch.tensor([0.0, 1.0], dtype=D)
    why = "an implicit method" if adjoint.seminorm else "seminorm=False"
    with pytest.warns(im.CompileWarning, match=f"continuous adjoint .* no graph for {why} there; .* Try: "):
        assert_same(turning, y0, t, w, adjoint)
    assert names(traced) == ["odeint"]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2))

    def forward(self, t, y):
        return self.net(y)


@pytest.mark.slow
def test_a_layer_counts_the_calls_of_its_graph_and_trains(traced):
    told, net, y0 = [], Net(), torch.randn(5, 2)
    adjoint = im.BacksolveAdjoint(listen=told.append)
    layer = im.nn.NeuralODE(net, solver=METHOD, adjoint=adjoint, compile=True)
    eager = im.nn.NeuralODE(net, solver=METHOD, adjoint=im.BacksolveAdjoint())
    for _ in range(2):  # with other parameters the graphs serve again
        found, right = (torch.autograd.grad(m(y0).square().sum(), tuple(net.parameters())) for m in (layer, eager))
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)
        assert layer.backward_evaluations == sum(told) > 0
        told.clear()
        with torch.no_grad():
            net.net[0].weight.mul_(0.9)
    assert layer.backward_evaluations == eager.backward_evaluations
    assert len(traced) == 2
