"""Adams' methods: coefficients, order, cost, samples that start and reject at different times, derivatives."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import func

import implicitly as im
from implicitly.ode.adams import STARTERS, integrals
from tests.problems import draw, matrix

D = torch.float64
ORDERS = sorted(STARTERS)
ADJOINTS = [im.RecursiveCheckpointAdjoint(), im.UnrolledAdjoint()]
each_order = pytest.mark.parametrize("order", ORDERS)
each_adjoint = pytest.mark.parametrize("adjoint", ADJOINTS, ids=lambda a: type(a).__name__)
W = matrix(3, 0.8, 1)
Y0 = draw(4, 3, seed=2)


def field(t, y, W=W):
    return torch.tanh(y @ W + t)


def swing(t, y):
    return torch.stack([y[1], -torch.sin(y[0])])


# ------------------------------------------------------------------------------------------ coefficients


def test_constant_steps_have_the_published_coefficients():
    """Adams-Bashforth of order 3, Adams-Moulton of orders 4 and 3, which differ in the error estimate."""
    found = integrals(np.array([[0.0, 1.0, 2.0]]), np.array([1.0]), np.array([[1.0]]))
    new, lower = float(found.defect[0, 0]), float(found.lower[0, 0])
    np.testing.assert_allclose(12 * found.slopes[0, :, 0], [23, -16, 5], rtol=1e-14)
    np.testing.assert_allclose([24 * new, 12 * lower], [9, 5], rtol=1e-14)
    np.testing.assert_allclose(24 * (found.slopes - new * found.end)[0, :, 0], [19, -5, 1], rtol=1e-13)


@each_order
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("as_array", [np.asarray, torch.as_tensor])
def test_polynomials_are_integrated_exactly_whatever_the_lengths(order, sign, as_array):
    random, count = np.random.default_rng(order), order - 1
    past = np.concatenate([np.zeros((5, 1)), random.uniform(0.2, 1, (5, count - 1)).cumsum(1)], axis=1)
    past, dt = sign * past, sign * random.uniform(0.2, 1, 5)
    part = np.array([[0.0, 0.3, 1.0]] * 5)
    found = integrals(*(as_array(x) for x in (past, dt, part)))
    slopes, defect, end = (
        torch.as_tensor(x).numpy(force=True) for x in (found.slopes, found.defect, found.end[..., -1])
    )
    polynomial = np.polynomial.Polynomial(random.normal(size=count + 1))  # of degree p - 1
    missed = polynomial(dt) - (end * polynomial(-past)).sum(1)
    total = (slopes * polynomial(-past)[:, :, None]).sum(1) + defect * missed[:, None]
    exact = polynomial.integ()(part * dt[:, None])
    np.testing.assert_allclose(total, exact, rtol=0, atol=1e-12 * np.abs(slopes).max())
    assert np.abs(missed).min() > 1e-6  # so the defect counts


def test_steps_of_length_0_and_an_unknown_past_are_harmless():
    past, dt = torch.zeros(2, 4, dtype=D), torch.zeros(2, dtype=D, requires_grad=True)
    past[1] = torch.tensor([0.0, 1.0, 2.0, 3.0])
    found = integrals(past, dt, torch.ones(2, 1, dtype=D))
    assert all(bool(x.isfinite().all()) for x in found)
    (gradient,) = torch.autograd.grad(sum(x.sum() for x in found), dt)
    assert bool(gradient.isfinite().all())


# ------------------------------------------------------------------------------------ accuracy and cost


@each_order
@pytest.mark.parametrize("direction", [1, -1])
def test_halving_the_steps_shows_the_order_at_the_ends_and_between(order, direction):
    t = direction * torch.linspace(0, 2, 38, dtype=D)
    exact = im.odeint(field, Y0, t, solver=im.Dopri8(dt=0.01)).value
    errors = []
    for steps in (64, 128):
        error = (im.odeint(field, Y0, t, solver=im.Adams(order=order, dt=2 / steps)).value - exact).abs()
        errors.append((float(error[-1].max()), float(error[1:-1].max())))
    for coarse, fine in zip(*errors):
        assert fine > 5e-14
        assert order - 0.7 < math.log2(coarse / fine) < order + 0.7


@pytest.mark.parametrize("order", [3, 4, 6])
def test_the_error_follows_the_tolerance_with_the_order(order):
    y0, found = torch.tensor([1.5, 0.0], dtype=D), []
    exact = im.odeint(swing, y0, (0.0, 20.0), solver=im.Dopri8(rtol=1e-13, atol=1e-14)).value[-1]
    for rtol in (1e-4, 1e-6) if order == 3 else (1e-5, 1e-8):
        solution = im.odeint(swing, y0, (0.0, 20.0), solver=im.Adams(order=order, rtol=rtol, atol=rtol / 100))
        found.append((int(solution.steps), float((solution.value[-1] - exact).abs().max())))
        assert found[-1][1] < 200 * rtol
    (few, coarse), (many, fine) = found
    assert math.log(coarse / fine) / math.log(many / few) > order - 0.8


@each_order
def test_a_step_calls_f_twice(order):
    starter = STARTERS[order].tableau
    first = (order - 2) * (starter.stages - 1)
    solution = im.odeint(field, Y0, (0.0, 1.0), solver=im.Adams(order=order, dt=0.05))
    assert solution.evaluations == 1 + first + 2 * (20 - (order - 2))


def test_outputs_cost_nothing_and_interpolate_agrees():
    solver, t = im.Adams(rtol=1e-7, atol=1e-9), torch.linspace(0, 3, 40, dtype=D)
    many, few = (im.odeint(field, Y0, x, solver=solver) for x in (t, t[[0, -1]]))
    assert many.evaluations == few.evaluations
    torch.testing.assert_close(few.interpolate(t), many.value, rtol=0, atol=1e-14)


def test_tight_tolerances_need_fewer_calls_than_a_runge_kutta_method():
    y0, calls = torch.tensor([1.5, 0.0], dtype=D), {}
    for solver in (im.Dopri5(rtol=1e-8, atol=1e-10), im.Adams(order=6, rtol=1e-8, atol=1e-10)):
        calls[type(solver).__name__] = im.odeint(swing, y0, (0.0, 20.0), solver=solver).evaluations
    assert calls["Adams"] < 0.7 * calls["Dopri5"]


# ------------------------------------------------------------------------------------------------ samples


@pytest.mark.parametrize("in_dims", [None, (0,)])
def test_each_sample_has_the_steps_it_has_alone(in_dims):
    """Also where some are still starting, rejecting, or done."""
    rate = torch.tensor([[1.0], [30.0], [4.0], [0.1]], dtype=D)
    t = torch.tensor([[0.0, 0.5, 2.0], [0.0, 0.1, 0.4], [1.0, 0.2, 0.1], [0.0, 1e-3, 2e-3]], dtype=D)

    def f(t, y, rate):
        return -rate * torch.sin(rate * t) * y

    solver = im.Adams(rtol=1e-7, atol=1e-9, dt0=0.3)
    together = im.odeint(f, Y0, t, rate, solver=solver, batch_dims=1, in_dims=in_dims)
    assert torch.equal(together.t, t[:, -1])
    assert int(together.rejected[1]) > 3
    exact = Y0 * torch.exp(torch.cos(rate * t) - torch.cos(rate * t[:, :1])).T[:, :, None]
    torch.testing.assert_close(together.value, exact, rtol=0, atol=1e-5)
    for i in range(4):
        alone = im.odeint(f, Y0[i : i + 1], t[i], rate[i], solver=solver, batch_dims=1)
        assert int(alone.steps) == int(together.steps[i])
        torch.testing.assert_close(alone.value[:, 0], together.value[:, i], rtol=0, atol=1e-12)


def test_a_sample_that_meets_nan_ends_alone():
    def f(t, y):
        return torch.where((t > 0.5) & (y > 0), float("nan"), -y)

    y0 = torch.tensor([[1.0], [-1.0]], dtype=D, requires_grad=True)
    options = {"solver": im.Adams(rtol=1e-8, atol=1e-10), "batch_dims": 1, "on_failure": "ignore"}
    for adjoint in ADJOINTS:
        solution = im.odeint(f, y0, (0.0, 0.3, 1.0), adjoint=adjoint, **options)
        assert solution.status.tolist() == [im.Status.NON_FINITE, im.Status.CONVERGED]
        (gradient,) = torch.autograd.grad(solution.value[-1].sum(), y0)
        torch.testing.assert_close(gradient, torch.tensor([[0.0], [math.exp(-1)]], dtype=D), rtol=1e-6, atol=0)


def test_float32_and_the_exact_last_time():
    t = torch.linspace(1000, 1000.7, 4)
    solution = im.odeint(lambda t, y: -y, torch.ones(3), t, solver=im.Adams(rtol=1e-5))
    assert solution.value.dtype == torch.float32
    assert float(solution.t) == float(t[-1])
    torch.testing.assert_close(solution.value[-1], torch.full((3,), math.exp(-0.7)), rtol=1e-4, atol=0)


# ------------------------------------------------------------------------------------------ derivatives


@pytest.mark.parametrize("batch_dims", [0, 1])
@pytest.mark.parametrize("order", [2, 3, 5])
@each_adjoint
def test_gradients_are_finite_differences(adjoint, order, batch_dims):
    # None on the border of two steps, where the slope of the dense output jumps.
    t = torch.tensor([0.9, 0.87, 0.31, -0.1], dtype=D, requires_grad=True)
    options = {"solver": im.Adams(order=order, dt=0.15), "adjoint": adjoint, "batch_dims": batch_dims}
    run = lambda y, W, t: im.odeint(field, y, t, W, **options).value  # noqa: E731
    given = (Y0[:2].clone().requires_grad_(), W.clone().requires_grad_(), t)
    assert torch.autograd.gradcheck(run, given, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, given, fast_mode=True)


@pytest.mark.parametrize("in_dims", [None, (0, None)])
def test_both_adjoints_give_the_gradient_of_the_discrete_solution_of_adaptive_steps(in_dims):
    rate, found = torch.tensor([[1.0], [20.0], [4.0], [0.1]], dtype=D), []
    t = torch.linspace(0, 1, 7, dtype=D).outer(torch.tensor([1.0, 2.0, -1.0, 0.1], dtype=D)).T
    for adjoint in ADJOINTS:
        given = Y0.clone().requires_grad_(), rate.clone().requires_grad_(), W.clone().requires_grad_()
        options = {"solver": im.Adams(rtol=1e-5, atol=1e-7, dt0=0.3), "adjoint": adjoint, "batch_dims": 1}

        def f(t, y, rate, W):
            return rate * torch.tanh(torch.cos(rate * t) * y @ W)

        solution = im.odeint(f, given[0], t, *given[1:], in_dims=in_dims, **options)
        assert int(solution.rejected.max()) > 0
        found.append(torch.autograd.grad(solution.value.sin().sum(), given))
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


def test_many_steps_are_taken_again_from_the_states_kept():
    found = []
    for adjoint in ADJOINTS:
        y0 = Y0.clone().requires_grad_()
        value = im.odeint(field, y0, (0.0, 2.0), solver=im.Adams(order=4, dt=0.01), adjoint=adjoint).value
        found.append(torch.autograd.grad(value.sin().sum(), y0)[0])
    torch.testing.assert_close(*found, rtol=1e-11, atol=1e-12)


def test_vmap_of_a_gradient_is_that_of_each_sample():
    def loss(y, t):
        return im.odeint(field, y, t, solver=im.Adams(rtol=1e-6, atol=1e-8)).value.sin().sum()

    t = torch.tensor([[0.0, 0.3, 1.0], [0.0, 1.3, 2.0], [0.0, -0.3, -1.0], [0.0, 0.01, 0.02]], dtype=D)
    alone = [func.grad(loss, argnums=(0, 1))(y, row) for y, row in zip(Y0, t)]
    mapped = func.vmap(func.grad(loss, argnums=(0, 1)))(Y0, t)
    for a, b in zip(mapped, zip(*alone)):
        torch.testing.assert_close(a, torch.stack(b), rtol=1e-9, atol=1e-11)


# ----------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("order", [0, 1, 9, 2.5, "4", True])
def test_orders_that_cannot_be_meant_are_refused(order):
    error, message = (ValueError, "from 2 to 8, got") if type(order) is int else (TypeError, "must be an int, got")
    with pytest.raises(error, match=message):
        im.Adams(order=order)


def test_other_options_are_checked_too():
    with pytest.raises(ValueError, match="Adams: dt must be"):
        im.Adams(dt=-1.0)
    with pytest.raises(ValueError, match="float32 cannot resolve"):
        im.odeint(lambda t, y: -y, torch.ones(2), (0.0, 1.0), solver=im.Adams(rtol=1e-9))
