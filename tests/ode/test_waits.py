"""How often the host would wait for an accelerator, as which the CPU is taken here."""

from __future__ import annotations

import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import implicitly as im
from implicitly.ode import integrate

D = torch.float64


@pytest.fixture(autouse=True)
def _as_an_accelerator(monkeypatch):
    for name, module in list(sys.modules.items()):
        if name.startswith("implicitly.") and hasattr(module, "is_cpu"):
            monkeypatch.setattr(module, "is_cpu", lambda x: False)


class Waits(TorchDispatchMode):
    """Counts what needs numbers of a tensor: whether it is true, how large it is, where it is not 0."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func._opname in ("_local_scalar_dense", "nonzero", "is_nonzero", "equal")
        return func(*args, **kwargs or {})


def waits(times, **options):
    y0 = torch.linspace(0, 1, 6, dtype=D).reshape(3, 2).requires_grad_()
    rate = torch.ones(1, dtype=D, requires_grad=True)
    with Waits() as waits:
        solution = im.odeint(lambda t, y, r: -r * y**3, y0, times, rate, batch_dims=1, **options)
        forward = waits.count
        found = torch.autograd.grad(solution.value.sin().sum(), (y0, rate))
    return forward, waits.count - forward, found, solution


@pytest.mark.parametrize("adjoint", [im.RecursiveCheckpointAdjoint(), im.UnrolledAdjoint()], ids=str)
def test_outputs_on_the_way_are_not_waited_for(adjoint, monkeypatch):
    options = {"adjoint": adjoint, "solver": im.Dopri5(rtol=1e-9)}
    forward, backward, _, solution = waits((0.0, 9.0), **options)
    assert solution.steps.max() > 20
    many = torch.linspace(0, 9, 12, dtype=D)
    *counts, found, solution = waits(many, **options)
    assert counts == [forward, backward]
    monkeypatch.setattr(integrate, "FEW_OUTPUTS", 0)  # of so many, those that a step passes alone
    more, _, right, other = waits(many, **options)
    assert more > forward + int(solution.steps.max())
    torch.testing.assert_close(solution.value, other.value, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-12)


def test_a_backward_pass_of_a_solve_without_failures_waits_for_nothing():
    assert waits((0.0, 0.5, 2.0), solver=im.Dopri5())[1] == 0
