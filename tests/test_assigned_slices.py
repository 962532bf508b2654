"""`compile=True` for an f that assigns to slices of a tensor, by code that is really generated."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import implicitly as im
from tests.problems import seeded

D = torch.float64
# PyTorch's compiler imports and calls its own deprecated parts; nothing of ours is meant.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def assigned(y: Tensor, W: Tensor) -> Tensor:
    d = torch.zeros_like(y)
    d[:, 0] = (y @ W)[:, 0].tanh()
    d[:, 1:] = (y @ W)[:, 1:].sin()
    d[:, 0] += 0.1
    d[:, 1] = d[:, 1] * 0.5
    return d


def by_odeint(y0: Tensor, W: Tensor, compile: bool) -> Tensor:
    solver = im.Euler(dt=0.5)
    return im.odeint(lambda t, y, W: assigned(y, W), y0, (0.0, 1.0), W, solver=solver, compile=compile).value


def by_implicit_steps(y0: Tensor, W: Tensor, compile: bool) -> Tensor:
    solver = im.ImplicitEuler(dt=0.5, rtol=1e-12, atol=1e-12)
    return im.odeint(lambda t, y, W: assigned(y, W), y0, (0.0, 1.0), W, solver=solver, compile=compile).value


def by_fixed_point(y0: Tensor, W: Tensor, compile: bool) -> Tensor:
    def f(z: Tensor, y0: Tensor, W: Tensor) -> Tensor:
        return 0.3 * assigned(z, W) + y0

    return im.fixed_point(f, y0, y0, W, solver=im.Newton(rtol=1e-12), compile=compile).value


def by_argmin(y0: Tensor, W: Tensor, compile: bool) -> Tensor:
    def cost(z: Tensor, y0: Tensor, W: Tensor) -> Tensor:
        return (z - y0).square().sum(-1) + 0.1 * assigned(z, W).square().sum(-1)

    return im.argmin(cost, y0, y0, W, solver=im.Newton(rtol=1e-10), compile=compile).value


@pytest.mark.parametrize("solved", [by_odeint, by_implicit_steps, by_fixed_point, by_argmin])
def test_gradients_are_those_without_a_graph(solved):
    y0, W = torch.randn(5, 3, generator=seeded(0), dtype=D), 0.5 * torch.randn(3, 3, generator=seeded(1), dtype=D)
    values, gradients = [], []
    for compile in (False, True):
        leaves = y0.clone().requires_grad_(), W.clone().requires_grad_()
        value = solved(*leaves, compile)
        values.append(value)
        gradients.append(torch.autograd.grad(value.square().sum(), leaves))
    torch.testing.assert_close(values[1], values[0], rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-8, atol=1e-9)
