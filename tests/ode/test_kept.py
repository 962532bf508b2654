"""A short solve keeps the recording of its steps, so that its derivative need not take them again."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import implicitly as im
from implicitly.viz import saved_bytes
from tests.problems import draw

D = torch.float64
NEVER = im.RecursiveCheckpointAdjoint(keep_bytes=0)
TIMES = (0.0, 0.3, 1.0)
SOLVERS = [im.Dopri5(), im.Tsit5(rtol=1e-3), im.RK4(dt=0.1), im.Euler(dt=0.25), im.Dopri8()]


class Counted(nn.Module):
    """A network that counts how often it is called."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 3)).double()
        self.calls = 0

    def forward(self, t, y, scale=None):
        self.calls += 1
        return self.net(y) if scale is None else scale * self.net(y)


def solve(f, y0, *args, adjoint, solver=im.Dopri5(), **options):
    return im.odeint(f, y0, TIMES, *args, solver=solver, adjoint=adjoint, **options)


def node_of(x):
    """The node of the solve, which holds what is kept."""
    nodes = [x.grad_fn]
    while not hasattr(nodes[0], "work"):
        nodes = [*nodes[1:], *(parent for parent, _ in nodes[0].next_functions if parent is not None)]
    return nodes[0]


@pytest.mark.parametrize("batch", [{"batch_dims": 0}, {"batch_dims": 1}, {"batch_dims": 1, "in_dims": 0}], ids=str)
@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
def test_gradients_are_those_of_steps_taken_again(solver, batch):
    f, y0 = Counted(), draw(4, 3, seed=1).requires_grad_()
    scale = (1 + draw(4, 1, seed=2).abs()).requires_grad_()
    wanted = [y0, scale, *f.parameters()]

    def gradients(adjoint):
        value = solve(f, y0, scale.sin(), adjoint=adjoint, solver=solver, **batch).value
        assert (node_of(value).work.kept is None) == (adjoint is NEVER)
        return torch.autograd.grad(value.sin().sum(), wanted)

    torch.testing.assert_close(
        gradients(im.RecursiveCheckpointAdjoint()), gradients(NEVER), rtol=1e-12, atol=1e-14
    )


def test_the_backward_pass_calls_f_once():
    f, y0 = Counted(), draw(4, 3, seed=1).requires_grad_()
    found = solve(f, y0, adjoint=im.RecursiveCheckpointAdjoint())
    assert f.calls == found.evaluations
    found.value.sum().backward()
    assert f.calls == found.evaluations + 1  # for the slope at the start
    assert node_of(found.value).work.kept is None  # and nothing is held any more


def test_a_recording_beyond_the_budget_is_not_kept():
    f, y0 = Counted(), draw(4, 3, seed=1).requires_grad_()
    bytes_of_all = node_of(solve(f, y0, adjoint=im.RecursiveCheckpointAdjoint()).value).work.kept.nbytes
    right = torch.autograd.grad(solve(f, y0, adjoint=NEVER).value.sum(), y0)
    for budget, kept in ((bytes_of_all, True), (bytes_of_all - 1, False), (1, False)):
        value = solve(f, y0, adjoint=im.RecursiveCheckpointAdjoint(keep_bytes=budget)).value
        assert (node_of(value).work.kept is not None) == kept
        assert torch.is_grad_enabled()
        torch.testing.assert_close(torch.autograd.grad(value.sum(), y0), right, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("solver", SOLVERS[2:4], ids=lambda s: type(s).__name__)
def test_the_bytes_are_about_those_that_autograd_saves(solver):
    f, y0 = Counted(), draw(64, 3, seed=1).requires_grad_()
    kept = node_of(solve(f, y0, adjoint=im.RecursiveCheckpointAdjoint(), solver=solver).value).work.kept
    saved = saved_bytes(lambda: solve(f, y0, adjoint=im.UnrolledAdjoint(), solver=solver))
    assert 0.7 * saved <= kept.nbytes <= 1.5 * saved


def test_several_backward_passes_give_the_same():
    f, y0 = Counted(), draw(4, 3, seed=1).requires_grad_()
    loss = solve(f, y0, adjoint=im.RecursiveCheckpointAdjoint()).value.sin().sum()
    first = torch.autograd.grad(loss, y0, retain_graph=True)
    again = torch.autograd.grad(loss, [y0, *f.parameters()])
    torch.testing.assert_close(again[:1], first, rtol=0, atol=0)


@pytest.mark.parametrize("solver", [im.RK4(dt=0.1), im.Dopri5()], ids=lambda s: type(s).__name__)
def test_cotangents_may_be_mapped(solver):
    f, y0 = Counted(), draw(2, 3, seed=1).requires_grad_()
    wanted = [y0, *f.parameters()]

    def rows(adjoint):
        value = solve(f, y0, adjoint=adjoint, solver=solver).value
        one = lambda bar: torch.autograd.grad(value, wanted, bar, retain_graph=True)  # noqa: E731
        bars = torch.eye(value.numel(), dtype=D).unflatten(1, value.shape)
        return torch.vmap(one)(bars), [torch.stack(x) for x in zip(*map(one, bars))]

    mapped, each = rows(im.RecursiveCheckpointAdjoint())
    torch.testing.assert_close(list(mapped), each, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(mapped, rows(NEVER)[0], rtol=1e-12, atol=1e-14)


def test_jacobians_of_a_solve_within_a_solve():
    def outer(t, y, w):
        kept = im.RecursiveCheckpointAdjoint()
        return solve(lambda t, z, w: w * z - z**3, y, w, adjoint=kept).value[-1] - y

    def end(w):
        return solve(outer, draw(2, seed=3), w, adjoint=NEVER, solver=im.RK4(dt=0.25)).value[-1]

    w = draw(2, seed=4)
    torch.testing.assert_close(torch.func.jacrev(end)(w), torch.func.jacfwd(end)(w), rtol=1e-10, atol=1e-12)


def test_second_derivatives_are_right():
    f, y0 = Counted(), draw(2, 3, seed=1).requires_grad_()
    solver = im.RK4(dt=0.25)
    assert torch.autograd.gradgradcheck(
        lambda y: solve(f, y, adjoint=im.RecursiveCheckpointAdjoint(), solver=solver).value[-1], y0
    )


def test_a_field_that_differentiates_within_is_recorded():
    def f(t, y, a):
        return -torch.func.grad(lambda y: (a * y**4).sum())(y)

    y0, a = draw(4, 3, seed=1).requires_grad_(), torch.tensor(0.3, dtype=D, requires_grad=True)

    def gradients(adjoint):
        return torch.autograd.grad(solve(f, y0, a, adjoint=adjoint).value.sum(), [y0, a])

    torch.testing.assert_close(
        gradients(im.RecursiveCheckpointAdjoint()), gradients(NEVER), rtol=1e-12, atol=1e-14
    )


def test_failed_samples_leave_the_gradient_of_others_alone():
    y0 = torch.tensor([[0.5], [4.0], [0.1]], dtype=D, requires_grad=True)

    def gradients(adjoint):
        found = solve(lambda t, y: y**2, y0, adjoint=adjoint, batch_dims=1, on_failure="ignore")
        assert found.status[1] != 0
        return torch.autograd.grad(found.value[-1].nan_to_num(0.0).sum(), y0)

    found = gradients(im.RecursiveCheckpointAdjoint())
    torch.testing.assert_close(found, gradients(NEVER), rtol=1e-12, atol=1e-14)
    assert found[0][1] == 0


def test_nothing_is_kept_where_memory_is_asked_to_be_saved_or_nobody_would_use_it():
    f, y0 = Counted(), draw(4, 3, seed=1).requires_grad_()
    adjoint, seen = im.RecursiveCheckpointAdjoint(), []

    def noted(y0, **options):
        value = solve(f, y0, adjoint=adjoint, **options).value
        seen.append(node_of(value).work)
        return value

    right = torch.autograd.grad(solve(f, y0, adjoint=NEVER).value.sum(), y0)
    found = torch.autograd.grad(checkpoint(noted, y0, use_reentrant=False).sum(), y0)
    torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-14)
    noted(y0, solver=im.Kvaerno5())
    noted(y0, event=im.Event(lambda t, y: y.sum() - 100))
    assert seen
    assert all(work.kept is None for work in seen)


@pytest.mark.parametrize(("value", "error"), [(-1, ValueError), (1.5, TypeError), ("4 MiB", TypeError)])
def test_bad_budgets_are_refused(value, error):
    with pytest.raises(error, match="RecursiveCheckpointAdjoint: keep_bytes"):
        im.RecursiveCheckpointAdjoint(keep_bytes=value)
