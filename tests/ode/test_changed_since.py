"""`interpolate` takes the steps again, with f as it was when they were taken first."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import implicitly as im


class Training(nn.Module):
    """Decays while it trains, grows else; counts its calls."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.rate = nn.Parameter(torch.ones(1))
        self.fixed = nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(self, t, y):
        with torch.no_grad():
            self.calls += 1
        return (-y if self.training else y) * self.rate * self.fixed


def test_f_is_in_the_mode_that_it_was_in():
    f = Training()
    solution = im.odeint(f, torch.ones(1), (0.0, 1.0))
    before = solution.interpolate((0.5,))
    f.eval()
    assert torch.equal(solution.interpolate((0.5,)), before)
    assert not f.training


@pytest.mark.parametrize("name", ["rate", "fixed"])
def test_a_parameter_that_changed(name):
    f = Training()
    solution = im.odeint(f, torch.ones(1), (0.0, 1.0))
    with torch.no_grad():
        getattr(f, name).mul_(2)
    with pytest.raises(
        ValueError, match=rf"{'a parameter' if name == 'rate' else name}.* was changed in place since"
    ):
        solution.interpolate((0.5,))


def test_a_tensor_without_a_derivative_that_changed():
    W = torch.tensor([-1.0])
    solution = im.odeint(lambda t, y: W * y, torch.ones(1), (0.0, 1.0))
    solution.interpolate((0.5,))
    W.fill_(1.0)
    with pytest.raises(ValueError, match=r"'W' of shape \(1,\) was changed in place since the solve"):
        solution.interpolate((0.5,))
