"""States without entries, and batches without samples."""

from __future__ import annotations

import pytest
import torch

import implicitly as im

D = torch.float64
METHODS = [
    im.RK4(dt=0.1),
    im.Dopri5(),
    im.Adams(),
    im.ReversibleHeun(),
    im.ImplicitEuler(dt=0.1),
    im.Kvaerno5(),
    im.Kvaerno3(stage_solver=im.NewtonKrylov()),
    im.Leapfrog(dt=0.1),
]
ADJOINTS = [
    im.RecursiveCheckpointAdjoint(),
    im.RecursiveCheckpointAdjoint(arc_length=True),
    im.UnrolledAdjoint(),
    im.BacksolveAdjoint(),
]


def decay(t, y, rate):
    return -rate * y


def turning(t, y, rate):
    q, p = y
    return rate * p, -rate * q


@pytest.mark.parametrize("shape", [(2, 0), (0, 3)])
@pytest.mark.parametrize("adjoint", ADJOINTS, ids=str)
@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_every_method_and_adjoint_has_zero_gradients(method, adjoint, shape):
    """None is not zero: a fixed point has zeros, too."""
    rate, y = torch.ones(1, dtype=D, requires_grad=True), torch.ones(shape, dtype=D, requires_grad=True)
    f, y0 = (turning, (y, y)) if method.splits else (decay, y)
    for options in ({}, {"batch_dims": 1}, {"batch_dims": 1, "in_dims": (None,)}):
        solution = im.odeint(f, y0, (0.0, 0.5, 1.0), rate, solver=method, adjoint=adjoint, **options)
        value = solution.value[0] if method.splits else solution.value
        assert value.shape == (3, *shape)
        by_y, by_rate = torch.autograd.grad(value.sum(), (y, rate))
        assert by_y.shape == shape
        assert by_rate.tolist() == [0.0]
