"""Where a graph that began a solve cannot go on, the eager loop does it all, and notes it once."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import implicitly as im
from implicitly.ode import work
from implicitly.ode.integrate import integrate
from implicitly.ode.record import Record, State, Taken

D = torch.float64


def turning(t, y, w):
    return torch.stack([y[1], -y[0]]) * w


def began(key, stepper, times, y0, theta, record, check):
    """Notes the first two steps, as a graph does, and has no graph for more."""
    taker, eager = partial(stepper.func, True)(times, *theta), Record()
    slope = taker.bound.F.at(taker.begin, y0)
    integrate(taker, y0, slope, eager)
    steps = (torch.stack([torch.as_tensor(step[i]) for step in eager.steps[:2]]) for i in range(5))
    record.note_many(Taken(*steps), State(y0, (slope,)))


@pytest.mark.parametrize("arc_length", [False, True])
def test_what_the_graph_noted_is_forgotten(arc_length, monkeypatch):
    adjoint = im.RecursiveCheckpointAdjoint(arc_length=arc_length, keep_bytes=0)

    def gradients(**options):
        inputs = [torch.tensor(x, dtype=D, requires_grad=True) for x in ([1.0, 0.5], [0.7])]
        value = im.odeint(turning, inputs[0], (0.0, 1.5, 3.0), inputs[1], adjoint=adjoint, **options).value
        return torch.autograd.grad(value.sin().sum(), inputs)

    right = gradients()
    monkeypatch.setattr(work, "integrate_as_graph", began)
    torch.testing.assert_close(gradients(compile=True), right, rtol=0, atol=0)
