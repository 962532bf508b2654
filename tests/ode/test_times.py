"""Times that are a tuple with tensors in it, and times that rounding makes the same."""

from __future__ import annotations

import math

import pytest
import torch
from torch import func, nn

import implicitly as im

D = torch.float64
Y0 = torch.ones(1, dtype=D)


class Decay(nn.Module):
    def forward(self, t, y, *delayed):
        return -y


def layer(end):
    return im.nn.NeuralODE(Decay(), t=(0.0, end))(Y0.unsqueeze(0))


SOLVES = {
    "odeint": lambda end: im.odeint(Decay(), Y0, (0.0, end)).value[-1],
    "backsolve": lambda end: im.odeint(Decay(), Y0, (0.0, end), adjoint=im.BacksolveAdjoint()).value[-1],
    "ddeint": lambda end: im.ddeint(Decay(), Y0, [0.0, end], lags=(0.4,)).value[-1],
    "interpolate": lambda end: im.odeint(Decay(), Y0, (0.0, 2.0)).interpolate([0.5, end])[1],
    "NeuralODE": layer,
}


@pytest.mark.parametrize("solve", SOLVES.values(), ids=SOLVES)
@pytest.mark.parametrize("dtype", [D, torch.float32])
def test_a_tensor_among_numbers_keeps_its_derivative(solve, dtype):
    end = torch.tensor(1.0, dtype=dtype, requires_grad=True)
    (found,) = torch.autograd.grad(solve(end).sum(), end)
    assert found.dtype == dtype
    assert float(found) == pytest.approx(-math.exp(-1), rel=1e-4)


def test_the_start_too():
    begin = torch.tensor(0.0, dtype=D, requires_grad=True)
    end = (begin, torch.tensor(1.0, dtype=D))
    for value in (
        im.odeint(Decay(), Y0, end).value,
        im.ddeint(Decay(), lambda t: torch.ones(1, dtype=D), end, lags=(0.4,)).value,
    ):
        (found,) = torch.autograd.grad(value[-1].sum(), begin)
        assert float(found) == pytest.approx(math.exp(-1), rel=1e-4)


def test_transforms():
    ends = torch.tensor([1.0, 2.0], dtype=D)
    found = func.vmap(func.grad(lambda end: SOLVES["odeint"](end).sum()))(ends)
    torch.testing.assert_close(found, -torch.exp(-ends), rtol=1e-4, atol=0)


@pytest.mark.parametrize("t", [(0.0, torch.ones(2)), ("a", torch.ones(()))])
def test_what_are_no_times(t):
    with pytest.raises(TypeError, match="t must hold numbers only"):
        im.odeint(Decay(), torch.ones(1), t)


@pytest.mark.parametrize(
    ("t", "where"), [((1e8, 1e8 + 1), (0, 1)), ((0.0, 1e8, 1e8 + 1), (1, 2)), ((5.0, 1e8 + 1, 1e8), (1, 2))]
)
def test_times_that_rounding_makes_the_same(t, where):
    i, j = where
    message = (
        rf"t\[{i}\] and t\[{j}\] are the same in torch.float32, 100000000, .*measure times from the start, or"
    )
    with pytest.raises(ValueError, match=message):
        im.odeint(Decay(), torch.ones(1), t)
    with pytest.raises(ValueError, match=message):
        im.odeint(Decay(), torch.ones(1), torch.tensor(t))
    if where == (0, 1):
        assert im.odeint(Decay(), Y0, t).converged


def robertson(t, y):
    a, b, c = y.unbind(-1)
    left, right = -0.04 * a + 1e4 * b * c, 3e7 * b * b
    return torch.stack([left, -left - right, right], -1)


@pytest.mark.parametrize(("dtype", "end", "exact"), [(torch.float32, 1e4, 1.073e-1), (D, 1e11, 2.0834e-8)])
def test_first_steps_may_be_shorter_than_the_last_time_resolves(dtype, end, exact):
    """Near 0, times are as fine as they come, however far the last one is."""
    solver = im.Kvaerno3(rtol=1e-4, atol=1e-12 if dtype == D else 1e-9)
    found = im.odeint(robertson, torch.tensor([1.0, 0.0, 0.0], dtype=dtype), (0.0, end), solver=solver)
    assert float(found.value[-1, 0]) == pytest.approx(exact, rel=5e-3)


@pytest.mark.parametrize("unit", [1.0, 1e-6, 1e-9])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_late_push_is_seen_in_any_unit_of_time(unit, sign):
    """From rest, what is to come cannot be known; steps grow alike in microseconds and in seconds."""
    unit = sign * unit

    def f(t, y):
        return torch.exp(-50 * (t / unit - 1.5) ** 2) / unit * torch.ones_like(y)

    found = im.odeint(f, torch.zeros(2, dtype=D), (0.0, 3.0 * unit))
    exact = torch.full((2,), (torch.pi / 50) ** 0.5, dtype=D)
    torch.testing.assert_close(found.value[-1], exact, rtol=1e-3, atol=0)
