"""`TaylorPenalty`: exact integrals, gradients, cost, and what it refuses."""

import math

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.testing import assert_close

import implicitly as im

D = torch.float64
TIGHT = im.Dopri5(rtol=1e-10, atol=1e-12)
WIDTH = 3


class Decay(nn.Module):
    """dy/dt = -rates y."""

    def __init__(self, rates):
        super().__init__()
        self.rates = nn.Parameter(rates)

    def forward(self, t, y):
        return -self.rates * y


class Clock(nn.Module):
    """dy/dt = t^3, whatever y."""

    def forward(self, t, y):
        return (t**3).expand_as(y)


def mlp():
    return nn.Sequential(nn.Linear(WIDTH + 1, 4), nn.Tanh(), nn.Linear(4, WIDTH))


@pytest.mark.parametrize("batch_dims", [0, 1])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_penalty_of_a_decay(order, batch_dims):
    rates = torch.tensor([0.5, 1.0, 2.0], dtype=D)
    layer = im.nn.NeuralODE(
        Decay(rates), solver=TIGHT, batch_dims=batch_dims, regularisers=[im.nn.TaylorPenalty(order)]
    )
    x = torch.randn(4, WIDTH, dtype=D)
    value, (penalty,) = layer(x)
    assert_close(value, x * (-rates).exp())
    # d^K y/dt^K = (-r)^K x e^(-r t)
    exact = (x**2 * rates ** (2 * order - 1) * (1 - (-2 * rates).exp()) / 2).mean(1)
    assert_close(penalty, exact)
    assert penalty.requires_grad


@pytest.mark.parametrize("batch_dims", [0, 1])
def test_time_is_differentiated_too(batch_dims):
    regularisers = [im.nn.TaylorPenalty(k) for k in (2, 3, 4, 5)]
    layer = im.nn.NeuralODE(Clock(), (0.0, 2.0), TIGHT, batch_dims=batch_dims, regularisers=regularisers)
    _, penalties = layer(torch.zeros(2, WIDTH, dtype=D))
    # Squares of 3 t^2, 6 t, 6 and 0, integrated from 0 to 2.
    for penalty, exact in zip(penalties, (9 * 2**5 / 5, 36 * 2**3 / 3, 72.0, 0.0)):
        assert_close(penalty, torch.full((2,), exact, dtype=D))


@pytest.mark.parametrize("batch_dims", [0, 1])
def test_penalty_is_differentiable(batch_dims):
    layer = im.nn.NeuralODE(
        im.nn.ConcatTime(mlp()),
        solver=im.RK4(dt=0.5),
        batch_dims=batch_dims,
        regularisers=[im.nn.TaylorPenalty(3)],
    ).to(D)
    names, values = zip(*layer.named_parameters())
    x = torch.randn(2, WIDTH, dtype=D, requires_grad=True)

    def call(x, *values):
        value, (penalty,) = functional_call(layer, dict(zip(names, values)), (x,))
        return value, penalty

    assert torch.autograd.gradcheck(call, (x, *values))


def test_penalty_costs_one_more_call_of_f():
    layer = im.nn.NeuralODE(im.nn.ConcatTime(mlp()), regularisers=[im.nn.TaylorPenalty(4)])
    layer(torch.randn(5, WIDTH))
    assert layer.evaluations == 2 * layer.solution.evaluations


def test_images_and_complex_states():
    net = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.SiLU(), nn.Conv2d(3, 2, 3, padding=1))
    layer = im.nn.NeuralODE(
        im.nn.Autonomous(net), solver=im.RK4(dt=0.5), regularisers=[im.nn.TaylorPenalty(2), im.nn.TaylorPenalty(1)]
    )
    _, penalties = layer(torch.randn(3, 2, 5, 5))
    assert all(p.shape == (3,) and (p > 0).all() for p in penalties)

    class Turning(nn.Module):
        def forward(self, t, y):
            return 2j * y

    layer = im.nn.NeuralODE(Turning(), solver=TIGHT, regularisers=[im.nn.TaylorPenalty(3)])
    _, (penalty,) = layer(torch.tensor([[1.0 + 1j, 0.0]], dtype=torch.complex128))
    assert_close(penalty, torch.tensor([64.0], dtype=D))  # |(2i)^3 (1 + i)|^2 / 2


def test_training_with_it_lowers_the_derivative():
    torch.manual_seed(0)
    layer = im.nn.NeuralODE(im.nn.ConcatTime(mlp()), solver=im.RK4(dt=0.25), regularisers=[im.nn.TaylorPenalty(2)])
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    x = torch.randn(16, WIDTH)
    penalties = []
    for _ in range(30):
        penalty = layer(x)[1][0].mean()
        optimizer.zero_grad()
        penalty.backward()
        optimizer.step()
        penalties.append(penalty.item())
    assert penalties[-1] < 0.3 * penalties[0]


@pytest.mark.parametrize("order", [0, -1, 2.0, True, math.nan])
def test_bad_orders_are_refused(order):
    with pytest.raises(ValueError, match="order must be a whole number >= 1, got"):
        im.nn.TaylorPenalty(order)


def test_field_without_rule_is_named():
    class Field(nn.Module):
        def forward(self, t, y):
            return torch.lgamma(y)

    layer = im.nn.NeuralODE(Field(), regularisers=[im.nn.TaylorPenalty(2)])
    with pytest.raises(NotImplementedError, match="no rule for lgamma"):
        layer(torch.ones(2, 3))
