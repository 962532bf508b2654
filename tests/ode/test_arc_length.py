"""`RecursiveCheckpointAdjoint(arc_length=True)`: steps that move with the solution."""

from __future__ import annotations

import gc
import math

import pytest
import torch
from torch import func

import implicitly as im
from tests.leaks import bytes_of, living_tensors

D = torch.float64
MOVING, FROZEN = im.RecursiveCheckpointAdjoint(arc_length=True), im.RecursiveCheckpointAdjoint()


def oscillator(t, y, mu):
    x, v = y.unbind(-1)
    return torch.stack([v, mu * (1 - x * x) * v - x], -1)


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values if len(values) > 1 else values[0], dtype=D)


def end(mu, y0=(2.0, 0.0), t=(0.0, 60.0), solver=im.Kvaerno5(rtol=1e-5, atol=1e-5), **options):
    y0 = y0 if isinstance(y0, torch.Tensor) else tensor(*y0)
    return im.odeint(oscillator, y0, t, mu, solver=solver, **options)


def slope(mu: float, adjoint, **options) -> float:
    at = tensor(mu).requires_grad_()
    return float(torch.autograd.grad(end(at, adjoint=adjoint, **options).value[-1, 0], at)[0])


def exact_slope(mu: float, t) -> float:
    tight, h = im.Kvaerno5(rtol=1e-8, atol=1e-10), 1e-3
    both, y0 = tensor(mu - h, mu + h), tensor(2.0, 0.0).repeat(2, 1)
    low, high = end(both, y0, t=t, solver=tight, batch_dims=1).value[-1, :, 0].tolist()
    return (high - low) / (2 * h)


@pytest.mark.slow
def test_the_gradient_through_a_jump_is_that_of_the_solution():
    """x leaves 2 slowly and jumps to -2 and back; when, depends on mu."""
    exact = exact_slope(30.0, (0.0, 60.0))
    assert slope(30.0, MOVING) == pytest.approx(exact, rel=5e-3)
    assert abs(slope(30.0, FROZEN) - exact) > 0.02 * abs(exact)  # why this is an option
    back = exact_slope(30.0, (0.0, -1e-3))
    assert slope(30.0, MOVING, t=(0.0, -1e-3)) == pytest.approx(back, rel=1e-4)


METHODS = [im.Dopri5, im.Bosh3, im.Kvaerno3, im.Adams, im.ReversibleHeun]


@pytest.mark.parametrize("method", METHODS)
def test_it_comes_closer_as_tolerances_tighten(method):
    """Where nothing jumps it converges as the other derivative does: to y0, to all times, to mu."""
    loose, tight = 1e-4 if method is im.ReversibleHeun else 1e-3, 1e-5

    def gradients(tolerance, adjoint, method=method):
        given = [tensor(2.0, 0.0), torch.tensor([0.0, 0.5, 1.1], dtype=D), tensor(2.0)]
        y0, t, mu = (x.requires_grad_() for x in given)
        solver = method(rtol=tolerance, atol=tolerance)
        value = im.odeint(oscillator, y0, t, mu, solver=solver, adjoint=adjoint).value
        found = torch.autograd.grad(value[1, 0] + 2 * value[2, 1], (y0, t, mu))
        return torch.cat([g.reshape(-1) for g in found])

    exact = gradients(1e-10, FROZEN, im.Dopri8)
    off = [float((gradients(tolerance, MOVING) - exact).norm() / exact.norm()) for tolerance in (loose, tight)]
    assert off[0] < 5e-2
    assert off[1] < max(off[0] / 3, 1e-6)


@pytest.mark.parametrize("order", [3, 5, 8])
def test_the_lengths_that_adams_method_remembers_move_too(order):
    """Else it is off by some 1e-4, whatever the tolerances."""
    a = tensor(1.3).requires_grad_()
    solver = im.Adams(order=order, rtol=1e-8, atol=1e-10)
    value = im.odeint(lambda t, y, a: -a * y, tensor(1.0), (0.0, 2.0), a, solver=solver, adjoint=MOVING).value[-1]
    (found,) = torch.autograd.grad(value, a)
    assert float(found) == pytest.approx(-2 * math.exp(-2.6), abs=1e-6)


def test_forward_mode_transforms_and_second_derivatives_agree():
    options = {"solver": im.Dopri5(rtol=1e-6, atol=1e-7), "t": (0.0, 1.0), "adjoint": MOVING}

    def f(y0, mu):
        return end(mu, y0, **options).value[-1].square().sum()

    y0, mu = tensor(2.0, 0.5), tensor(1.5)
    reverse = func.grad(f, argnums=(0, 1))(y0, mu)
    leaves = (y0.clone().requires_grad_(), mu.clone().requires_grad_())
    for a, b in zip(reverse, torch.autograd.grad(f(*leaves), leaves)):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    pushed = func.jvp(f, (y0, mu), (tensor(1.0, -1.0), tensor(2.0)))[1]
    torch.testing.assert_close(pushed, reverse[0] @ tensor(1.0, -1.0) + 2 * reverse[1], rtol=1e-10, atol=1e-12)
    h = 1e-5
    numeric = (func.grad(f, 1)(y0, mu + h) - func.grad(f, 1)(y0, mu - h)) / (2 * h)
    torch.testing.assert_close(func.hessian(f, 1)(y0, mu), numeric, rtol=1e-4, atol=1e-6)
    starts = torch.stack([y0, 1.2 * y0])
    mapped = func.vmap(func.grad(f), in_dims=(0, None))(starts, mu)
    torch.testing.assert_close(mapped[0], reverse[0], rtol=1e-8, atol=1e-10)


@pytest.mark.slow
def test_samples_have_their_own_lengths():
    mu, y0 = tensor(0.5, 20.0, 3.0), tensor(2.0, 0.0).repeat(3, 1)
    at = mu[:, None].clone().requires_grad_()

    def f(t, y, mu):
        return oscillator(t, y, mu[:, 0])

    options = {"solver": im.Kvaerno5(rtol=1e-5, atol=1e-5), "adjoint": MOVING, "batch_dims": 1, "in_dims": 0}
    value = im.odeint(f, y0, (0.0, 20.0), at, **options).value[-1, :, 0]
    (found,) = torch.autograd.grad(value.sum(), at)
    alone = [slope(float(m), MOVING, t=(0.0, 20.0)) for m in mu]
    torch.testing.assert_close(found[:, 0], torch.tensor(alone, dtype=D), rtol=1e-3, atol=1e-6)


@pytest.mark.usefixtures("only_what_the_test_makes")
def test_a_long_trajectory_keeps_few_states():
    """Of some 400 steps at most twice 32 states with their slopes, and some numbers of each."""
    y0 = torch.linspace(1, 2, 2000, dtype=D).requires_grad_()
    gc.collect()
    before = bytes_of(living_tensors())
    options = {"solver": im.Bosh3(rtol=1e-7, atol=1e-7), "adjoint": MOVING}
    found = im.odeint(lambda t, y: -y + torch.sin(5 * t), y0, (0.0, 10.0), **options)
    gc.collect()
    steps, state = int(found.steps), y0.nbytes
    assert steps > 300
    assert bytes_of(living_tensors()) - before < 2 * 66 * state + 4 * state + 60 * steps


def test_an_event_ends_a_moving_trajectory_where_it_happens():
    """The time at which x first passes zero, against differences."""
    event, solver = im.Event(lambda t, y, mu: y[..., 0]), im.Kvaerno5(rtol=1e-7, atol=1e-7)

    def time(mu, adjoint):
        return end(mu, event=event, solver=solver, adjoint=adjoint).t

    at, h = tensor(20.0).requires_grad_(), 1e-2
    (found,) = torch.autograd.grad(time(at, MOVING), at)
    with torch.no_grad():
        numeric = (time(tensor(20.0 + h), MOVING) - time(tensor(20.0 - h), MOVING)) / (2 * h)
    torch.testing.assert_close(found, numeric, rtol=1e-3, atol=0)


@pytest.mark.parametrize("method", [im.Dopri5(dt=0.01), im.RK4(dt=0.01), im.Kvaerno3(dt=0.01)])
def test_constant_steps_stay_as_they_are(method):
    options = {"t": (0.0, 1.0), "solver": method}
    assert slope(2.0, MOVING, **options) == slope(2.0, FROZEN, **options)


def test_a_state_at_rest_has_finite_gradients():
    y0 = torch.zeros(2, dtype=D, requires_grad=True)
    (found,) = torch.autograd.grad(end(tensor(2.0), y0, t=(0.0, 1.0), adjoint=MOVING).value[-1, 0], y0)
    (exact,) = torch.autograd.grad(end(tensor(2.0), y0, t=(0.0, 1.0), adjoint=FROZEN).value[-1, 0], y0)
    torch.testing.assert_close(found, exact)


@pytest.mark.parametrize("rtol", [0.0, torch.tensor([0.0, 1e-6])])
def test_absolute_tolerances_alone_will_do(rtol):
    options = {"t": (0.0, 1.0), "solver": im.Dopri5(rtol=rtol, atol=1e-7)}
    assert slope(2.0, MOVING, **options) == pytest.approx(slope(2.0, FROZEN, **options), rel=1e-3)


def test_steps_are_taken_again_with_harder_newton_iterations_where_they_must():
    """In a stiff jump the Jacobian of an earlier step led to stages at first, and that of the step may not."""
    assert slope(1000.0, MOVING, t=(0.0, 2000.0)) == pytest.approx(1.7848e-3, rel=5e-3)


def speed_of(y, k, span, rtol, atol):
    """As the doc of `HybridStepper._speed` has it, written once more."""
    size = y.abs() + atol / rtol if rtol else torch.full_like(y, atol / 1e-3)
    moved = (k / size.detach()).square().mean().sqrt()
    return torch.sqrt((2.0 * moved) ** 2 + 1 / span**2)


@pytest.mark.parametrize(("rtol", "atol"), [(0.2, 0.1), (0.0, 2e-3), (0.4, 0.0)])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_step_takes_the_longer_the_slower_its_start_is(sign, rtol, atol):
    """Two steps, the first of which keeps its arc length, against the same written out: to rounding."""
    y0, mu, h, T = tensor(1.2, 0.7), tensor(1.5), 0.2, 0.37
    solver = im.Bosh3(rtol=rtol, atol=atol, dt0=h, dt_max=h)

    def kept(y0, mu):
        found = end(mu, y0, (0.0, sign * T), solver, adjoint=MOVING)
        assert int(found.steps) == 2
        return found.value[-1]

    def written(y0, mu):
        fixed, speed = {"solver": im.Bosh3(dt=1.0)}, speed_of(y0, oscillator(0, y0, mu), T, rtol, atol)
        times = torch.stack([tensor(0.0), sign * h * speed.detach() / speed, tensor(sign * T)])
        middle = end(mu, y0, times[:2], **fixed).value[-1]
        return end(mu, middle, times[1:], **fixed).value[-1]

    torch.testing.assert_close(kept(y0, mu), written(y0, mu), rtol=1e-13, atol=0)
    jacobians = zip(*(func.jacrev(f, argnums=(0, 1))(y0, mu) for f in (kept, written)))
    for found, exact in jacobians:
        torch.testing.assert_close(found, exact, rtol=1e-11, atol=1e-12)
    stays = func.jacrev(lambda y: end(mu, y, (0.0, sign * T), solver).value[-1])(y0)  # to see anything
    assert (func.jacrev(kept)(y0, mu) - stays).abs().max() > 1e-5
