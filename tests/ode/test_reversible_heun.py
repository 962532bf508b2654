"""The reversible Heun method: order, exact reversal, what it costs, derivatives."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import func

import implicitly as im
from implicitly.ode.problem import Field
from tests.problems import draw, matrix

D = torch.float64
ADJOINTS = [im.RecursiveCheckpointAdjoint(), im.UnrolledAdjoint()]
each_adjoint = pytest.mark.parametrize("adjoint", ADJOINTS, ids=lambda a: type(a).__name__)
W = matrix(3, 0.8, 1)
Y0 = draw(4, 3, seed=2)


def field(t, y, W=W):
    return torch.tanh(y @ W + t)


@pytest.mark.parametrize("direction", [1, -1])
def test_halving_the_steps_shows_order_2_at_the_ends_and_between(direction):
    t = direction * torch.linspace(0, 1, 39, dtype=D)
    exact = im.odeint(field, Y0, t, solver=im.Dopri8(rtol=1e-13, atol=1e-14)).value
    errors = []
    for steps in (32, 128):
        error = (im.odeint(field, Y0, t, solver=im.ReversibleHeun(dt=1 / steps)).value - exact).abs()
        errors.append((float(error[-1].max()), float(error[1:-1].max())))
    for coarse, fine in zip(*errors):
        assert 1.8 < math.log2(coarse / fine) / 2 < 2.3


def test_the_order_holds_where_steps_vary():
    errors = []
    for rtol in (1e-4, 1e-6):
        solution = im.odeint(field, Y0, (0.0, 1.0), solver=im.ReversibleHeun(rtol=rtol, atol=rtol))
        exact = im.odeint(field, Y0, (0.0, 1.0), solver=im.Dopri8(rtol=1e-13, atol=1e-14)).value
        errors.append((int(solution.steps), float((solution.value - exact).abs().max())))
    (few, coarse), (many, fine) = errors
    assert 1.7 < math.log(coarse / fine) / math.log(many / few) < 2.3


@pytest.mark.parametrize("batch", [1, 4])
def test_a_thousand_steps_of_any_length_are_undone_but_for_rounding(batch):
    """Forwards, then the same steps with their signs changed, from what is carried at the end."""

    def oscillator(t, y):
        return torch.stack([y[:, 1], -torch.sin(y[:, 0]) + 0.3 * torch.cos(t[:, 0])], dim=1)

    def field():
        return Field(lambda times: times.reshape(len(times), -1, 1).unbind(), oscillator, field, ())

    F = field()
    method, lengths = (
        im.ReversibleHeun(dt=0.1),
        np.random.default_rng(0).uniform(1, 64, (1000, batch)).round() / 512,
    )
    t, y = np.zeros(batch), Y0[:batch, :2]
    memory, begin = method.start(F, t, y, F.at(t, y)), y
    path = [y]
    for dt in lengths:
        step = method.step(F, t, dt, y, memory)
        t, y, memory = t + dt, step.y1, step.memory
        path.append(y)
    assert float((y - begin).abs().max()) > 0.1
    for dt, before in zip(lengths[::-1], path[-2::-1]):
        step = method.step(F, t, -dt, y, memory)
        t, y, memory = t - dt, step.y1, step.memory
        torch.testing.assert_close(y, before, rtol=0, atol=1e-10)
    torch.testing.assert_close(memory[0], begin, rtol=0, atol=1e-10)
    torch.testing.assert_close(memory[1], F.at(np.zeros(batch), begin), rtol=0, atol=1e-10)


@pytest.mark.host  # elsewhere outputs between the ends are computed whether or not a step has any
def test_a_step_calls_f_once():
    assert im.odeint(field, Y0, (0.0, 1.0), solver=im.ReversibleHeun(dt=0.1)).evaluations == 1 + 10
    solution = im.odeint(field, Y0, torch.linspace(0, 1, 9, dtype=D), solver=im.ReversibleHeun(rtol=1e-4))
    # Two more: what f returns, and the length of the first step.
    assert solution.evaluations == 2 + int(solution.steps) + int(solution.rejected)


def test_the_error_follows_the_tolerance_and_costs_half_of_heuns():
    def oscillator(t, y):
        return torch.stack([y[1], -y[0]])

    y0, exact = torch.tensor([0.0, 1.0], dtype=D), torch.tensor([math.sin(20), math.cos(20)], dtype=D)
    reached = []
    for rtol in (1e-3, 1e-4):
        solution = im.odeint(oscillator, y0, (0.0, 20.0), solver=im.ReversibleHeun(rtol=rtol, atol=rtol / 100))
        other = im.odeint(oscillator, y0, (0.0, 20.0), solver=im.Heun(rtol=rtol, atol=rtol / 100))
        assert solution.evaluations < 0.6 * other.evaluations
        reached.append(float((solution.value[-1] - exact).abs().max()))
        assert reached[-1] < 10 * rtol
    assert reached == sorted(reached, reverse=True)


def test_where_solutions_attract_each_other_a_long_solve_fails_aloud():
    solver = im.ReversibleHeun(rtol=1e-3, max_steps=2000)
    with pytest.raises(im.SolverError, match="ReversibleHeun did not reach the end"):
        im.odeint(lambda t, y: -y, torch.ones(1, dtype=D), (0.0, 20.0), solver=solver)


# ------------------------------------------------------------------------------------------ derivatives


@pytest.mark.parametrize("batch_dims", [0, 1])
@each_adjoint
def test_gradients_are_finite_differences(adjoint, batch_dims):
    t = torch.tensor([0.5, 0.3, -0.1], dtype=D, requires_grad=True)
    options = {"solver": im.ReversibleHeun(dt=0.25), "adjoint": adjoint, "batch_dims": batch_dims}
    run = lambda y, W, t: im.odeint(field, y, t, W, **options).value  # noqa: E731
    given = (Y0[:2].clone().requires_grad_(), W.clone().requires_grad_(), t)
    assert torch.autograd.gradcheck(run, given, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(run, given, fast_mode=True)


def test_both_adjoints_give_the_gradient_of_the_discrete_solution_of_adaptive_steps():
    found = []
    for adjoint in ADJOINTS:
        given = Y0.clone().requires_grad_(), W.clone().requires_grad_()
        t = torch.linspace(0, 1, 7, dtype=D).outer(torch.tensor([1.0, 2.0, -1.0, 0.1], dtype=D)).T
        options = {"solver": im.ReversibleHeun(rtol=1e-4, atol=1e-6), "adjoint": adjoint, "batch_dims": 1}
        solution = im.odeint(field, given[0], t, given[1], **options)
        assert len(set(solution.steps.tolist())) > 2
        found.append(torch.autograd.grad(solution.value.sin().sum(), given))
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_vmap_of_a_gradient_is_that_of_each_sample():
    def loss(y):
        return im.odeint(field, y, (0.0, 0.3, 1.0), solver=im.ReversibleHeun(dt=0.1)).value.sin().sum()

    alone = torch.stack([func.grad(loss)(y) for y in Y0])
    torch.testing.assert_close(func.vmap(func.grad(loss))(Y0), alone, rtol=1e-12, atol=1e-13)


def test_samples_are_those_of_single_solves_and_the_last_time_is_reached():
    t = torch.tensor([[0.0, 0.7, 1.0], [3.0, 2.9, 2.0], [0.0, 0.05, 0.1], [-1.0, 0.0, 2.0]], dtype=D)
    solver = im.ReversibleHeun(rtol=1e-4, atol=1e-6)
    together = im.odeint(field, Y0, t, solver=solver, batch_dims=1)
    assert torch.equal(together.t, t[:, -1])
    for i in range(4):
        alone = im.odeint(field, Y0[i : i + 1], t[i], solver=solver, batch_dims=1)
        assert int(alone.steps) == int(together.steps[i])
        torch.testing.assert_close(alone.value[:, 0], together.value[:, i], rtol=0, atol=1e-12)


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="ReversibleHeun: dt must be"):
        im.ReversibleHeun(dt=-1.0)
    with pytest.raises(ValueError, match="float32 cannot resolve"):
        im.odeint(lambda t, y: -y, torch.ones(2), (0.0, 1.0), solver=im.ReversibleHeun(rtol=1e-9))
