"""A tensor that a solve depends on twice has the gradient of both, once."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import implicitly as im

D = torch.float64
ADJOINTS = [
    im.RecursiveCheckpointAdjoint(),
    im.BacksolveAdjoint(),
    im.BacksolveAdjoint(seminorm=False),
    im.UnrolledAdjoint(),
]


@pytest.mark.parametrize("batch_dims", [0, 1])
@pytest.mark.parametrize("adjoint", ADJOINTS, ids=str)
def test_two_args_and_a_parameter_that_is_an_arg(adjoint, batch_dims):
    net = nn.Linear(1, 1, bias=False, dtype=D)
    w = net.weight
    with torch.no_grad():
        w.fill_(-1.0)
    y0 = torch.ones(2 if batch_dims else 1, 1, dtype=D)
    options = {"adjoint": adjoint, "batch_dims": batch_dims, "solver": im.Dopri5(rtol=1e-8, atol=1e-9)}
    for f, args in (
        (lambda t, y, a, b: a[0] * y + 0.5 * b[0] * y, (w, w)),
        (lambda t, y, b: net(y) + 0.5 * b[0] * y, (w,)),
    ):
        value = im.odeint(f, y0, (0.0, 1.0), *args, **options).value
        (found,) = torch.autograd.grad(value[-1].sum(), w)
        assert float(found) == pytest.approx(len(y0) * 1.5 * math.exp(-1.5), rel=1e-6)
