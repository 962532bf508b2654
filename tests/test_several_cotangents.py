"""What `torch.autograd.grad(is_grads_batched=True)`, and `torch.autograd.functional` by it, ask for at once."""

from __future__ import annotations

import pytest
import torch
from torch.autograd.functional import hessian, jacobian

import implicitly as im

D = torch.float64
W = torch.tensor([[0.2, -0.3, 0.1], [0.1, 0.2, -0.2], [0.3, 0.1, 0.1]], dtype=D)
TIMES = torch.tensor([0.0, 0.5, 1.0], dtype=D)


def fixed_point(x):
    # The second term has what a transform of several cotangents refuses.
    f = lambda z, x: torch.tanh(z @ W + x) + 0 * torch.rand_like(z)  # noqa: E731
    return im.fixed_point(f, torch.zeros_like(x), x).value


def trajectory(adjoint):
    return lambda x: im.odeint(lambda t, y: torch.sin(y @ W), x, TIMES, adjoint=adjoint).value


def program(x):
    return im.qp(torch.eye(3, dtype=D), x, torch.eye(3, dtype=D), torch.ones(3, dtype=D)).value


def minimum(x):
    return im.argmin(lambda z, x: ((z - x) ** 4 + z**2).sum(-1), torch.zeros_like(x), x).value


@pytest.mark.parametrize(
    "solve",
    [
        fixed_point,
        trajectory(im.RecursiveCheckpointAdjoint()),
        trajectory(im.BacksolveAdjoint()),
        trajectory(im.UnrolledAdjoint()),
        program,
        minimum,
    ],
)
def test_each_gets_its_own_gradient(solve):
    x = torch.tensor([[0.5, -1.0, 2.0], [1.5, 0.2, -0.7]], dtype=D)
    torch.testing.assert_close(jacobian(solve, x, vectorize=True), jacobian(solve, x), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("solve", [fixed_point, trajectory(im.RecursiveCheckpointAdjoint()), minimum])
def test_second_derivatives_too(solve):
    x = torch.tensor([[0.5, -1.0, 2.0]], dtype=D)
    loss = lambda x: solve(x).square().sum()  # noqa: E731
    torch.testing.assert_close(hessian(loss, x, vectorize=True), hessian(loss, x), rtol=1e-10, atol=1e-12)


def test_several_of_several_are_refused():
    x = torch.tensor([[0.5, -1.0, 2.0]], dtype=D, requires_grad=True)
    value = fixed_point(x).sum()

    def gradients(weight):
        return torch.autograd.grad(value, x, weight, is_grads_batched=True, retain_graph=True)[0]

    with pytest.raises(NotImplementedError, match="jacrev"):
        torch._vmap_internals._vmap(gradients)(torch.ones(2, 2, dtype=D))
