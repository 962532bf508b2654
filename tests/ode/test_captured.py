"""Constant steps in a CUDA graph of the user's: nothing is looked at, and nothing comes from the host."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import implicitly as im

METHODS = [im.Euler(dt=0.1), im.RK4(dt=0.1), im.Dopri5(dt=0.3), im.Dopri8(dt=0.5), im.ReversibleHeun(dt=0.1)]
ADJOINTS = [im.RecursiveCheckpointAdjoint(), im.UnrolledAdjoint()]
TIMES = (0.0, 0.33, 1.0)


def by_name(value):
    return type(value).__name__


@pytest.fixture
def capturing(monkeypatch):
    for name in ("is_initialized", "is_current_stream_capturing"):
        monkeypatch.setattr(torch.cuda, name, lambda: True)


class NoNumbers(TorchFunctionMode):
    """Refuses to make tensors of the host's numbers elsewhere."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        assert func not in (torch.tensor, torch.as_tensor, torch.asarray) or out.device.type == "cpu"
        return out


class OneDevice(TorchDispatchMode):
    """Refuses what moves tensors between devices."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        found = {x.device for x in pytree.tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)}
        assert len(found) < 2, func
        return out


def solve(device, batch_dims, warm=False, **options):
    torch.manual_seed(0)
    f, y0 = nn.Linear(2, 2).to(device), torch.randn(3, 2).to(device).requires_grad_()
    with OneDevice(), NoNumbers() if warm else nullcontext():
        solution = im.odeint(lambda t, y: torch.tanh(f(y) + t), y0, TIMES, batch_dims=batch_dims, **options)
        return solution, torch.autograd.grad(solution.value.square().sum(), (y0, *f.parameters()))


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=by_name)
@pytest.mark.parametrize("batch_dims", [0, 1])
@pytest.mark.parametrize("solver", METHODS, ids=by_name)
def test_a_solve_of_known_steps_looks_at_nothing_and_is_the_same(solver, batch_dims, adjoint, request):
    how = {"batch_dims": batch_dims, "solver": solver, "adjoint": adjoint}
    solution, gradients = solve("cpu", **how)
    request.getfixturevalue("capturing")
    inside, found = solve("cpu", **how)
    torch.testing.assert_close((inside.value, inside.status, found), (solution.value, solution.status, gradients))
    solve("meta", **how)  # what is kept for later solves, such as tableaus
    inside, found = solve("meta", warm=True, **how)  # there tensors have no numbers
    assert [x.shape for x in found] == [x.shape for x in gradients]


@pytest.mark.parametrize(
    "how",
    [{}, {"solver": im.Dopri5(dt=1e-3)}, {"solver": im.RK4(dt=0.1), "event": im.Event(lambda t, y: y.sum())}],
)
def test_other_solves_are_refused(capturing, how):
    with pytest.raises(RuntimeError, match="CUDA graph can hold a trajectory whose steps are known"):
        solve("meta", 0, **how)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA device here")
@pytest.mark.parametrize("kind", ["trajectory", "fixed point"])
def test_a_cuda_graph_replays_a_solve_of_known_steps_and_its_gradient(kind):
    f, y0 = nn.Linear(2, 2).cuda(), torch.randn(3, 2).cuda().requires_grad_()

    def run():
        if kind == "trajectory":
            value = im.odeint(lambda t, y: torch.tanh(f(y)), y0, TIMES, solver=im.RK4(dt=0.1)).value
        else:
            how = {"solver": im.Anderson(rtol=0, max_steps=5), "adjoint": im.JacobianFreeAdjoint()}
            value = im.fixed_point(lambda z, x: torch.tanh(0.3 * f(z)) + x, torch.zeros_like(y0), y0, **how).value
        return value, torch.autograd.grad(value.square().sum(), (y0, *f.parameters()))

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    with torch.no_grad():
        y0.mul_(0.5)
    graph.replay()
    torch.testing.assert_close(captured, run())
