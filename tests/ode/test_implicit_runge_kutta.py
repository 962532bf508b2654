"""Implicit methods: order, stiff problems with known solutions, derivatives of every kind, failures of a stage."""

from __future__ import annotations

import math

import pytest
import torch
from torch import func

import implicitly as im

D = torch.float64
METHODS = [im.ImplicitEuler, im.ImplicitMidpoint, im.Trapezoid, im.Kvaerno3, im.Kvaerno5]
TIGHT = {"rtol": 1e-11, "atol": 1e-13}


def logistic(t, y):
    return y * (1 - y) * (1 + 0.5 * torch.cos(3 * t))


def logistic_solution(t, y0):
    s = t + 0.5 * torch.sin(3 * t) / 3
    return 1 / (1 + (1 / y0 - 1) * torch.exp(-s))


def robertson(t, y, k):
    a, b, c = y.unbind(-1)
    da, dc = -k[0] * a + k[2] * b * c, k[1] * b * b
    return torch.stack([da, -da - dc, dc], -1)


K = torch.tensor([0.04, 3e7, 1e4], dtype=D)
START = torch.tensor([1.0, 0.0, 0.0], dtype=D)


def van_der_pol(t, y, mu):
    return torch.stack([y[1], mu * (1 - y[0] ** 2) * y[1] - y[0]])


@pytest.mark.parametrize("method", METHODS)
def test_halving_the_steps_shows_the_order_at_the_ends_and_between(method):
    order = method.tableau.order
    y0, t = torch.tensor([0.2, 0.7], dtype=D), torch.linspace(0, 1, 20, dtype=D)

    def errors(steps):
        value = im.odeint(logistic, y0, t, solver=method(dt=1 / steps, **TIGHT)).value
        error = (value - logistic_solution(t[:, None], y0)).abs().amax(1)
        return float(error[-1]), float(error[1:-1].max())

    coarse = {1: 64, 2: 32, 3: 16, 5: 8}[order]
    (end, between), (end_4, between_4) = errors(coarse), errors(4 * coarse)
    assert end_4 > 1e-14
    assert order - 0.5 < math.log2(end / end_4) / 2 < order + 1
    assert math.log2(between / between_4) / 2 > order - 0.5


def test_outputs_of_kvaerno5_between_steps_are_a_quartic():
    """Which a cubic through the ends of the step would not be."""
    t = torch.tensor([0.0, 0.3, 0.7, 1.0], dtype=D)
    solver = im.Kvaerno5(dt=1, **TIGHT)
    solution = im.odeint(lambda t, y: t**3 * torch.ones_like(y), torch.zeros(1, dtype=D), t, solver=solver)
    assert int(solution.steps) == 1
    torch.testing.assert_close(solution.value[:, 0], t**4 / 4, rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", [im.Kvaerno3, im.Kvaerno5])
@pytest.mark.parametrize("batch_dims", [0, 1])
def test_stiff_relaxation_takes_few_steps(method, batch_dims):
    """y' = -1e6 (y - cos t) - sin t stays at cos t; an explicit method would need about 1e6 steps."""
    y0 = torch.tensor([[1.5], [1.0]], dtype=D)
    rate = torch.tensor([[1e6], [1e3]], dtype=D)
    t = torch.tensor([0.0, 0.3, 2.0], dtype=D)
    solution = im.odeint(
        lambda t, y, r: -r * (y - torch.cos(t)) - torch.sin(t),
        y0,
        t,
        rate,
        solver=method(rtol=1e-4, atol=1e-6),
        batch_dims=batch_dims,
    )
    torch.testing.assert_close(solution.value[1:, :, 0], torch.cos(t[1:, None]).expand(2, 2), rtol=0, atol=1e-3)
    assert int(solution.steps.max()) < 200


@pytest.mark.parametrize(("method", "rtol"), [(im.Kvaerno3, 1e-5), (im.Kvaerno5, 1e-7)])
def test_robertsons_problem_to_a_hundred_thousand(method, rtol):
    integrate = pytest.importorskip("scipy.integrate")
    peer = integrate.solve_ivp(
        lambda t, y: robertson(t, torch.as_tensor(y), K).numpy(),
        (0, 1e5),
        START.numpy(),
        method="Radau",
        rtol=1e-10,
        atol=1e-14,
    )
    expected = torch.as_tensor(peer.y[:, -1])
    solution = im.odeint(robertson, START, (0.0, 1e5), K, solver=method(rtol=rtol, atol=rtol * 1e-4))
    torch.testing.assert_close(solution.value[-1], expected, rtol=100 * rtol, atol=0)
    torch.testing.assert_close(solution.value[-1].sum(), torch.tensor(1.0, dtype=D), rtol=1e-9, atol=0)
    assert int(solution.steps) < 400


@pytest.mark.parametrize("adjoint", [im.RecursiveCheckpointAdjoint(), im.UnrolledAdjoint()])
def test_the_gradient_of_robertsons_problem_is_that_of_differences(adjoint):
    solver = im.Kvaerno5(rtol=1e-9, atol=1e-13)
    k, y0 = K.clone().requires_grad_(), START.clone().requires_grad_()

    def last(k, y0):
        return im.odeint(robertson, y0, (0.0, 4.0), k, solver=solver, adjoint=adjoint).value[-1][0]

    by_k, by_y0 = torch.autograd.grad(last(k, y0), (k, y0))
    for i in range(3):
        move = torch.zeros(3, dtype=D)
        move[i] = 1e-4 * K[i]
        with torch.no_grad():
            difference = (last(K + move, START) - last(K - move, START)) / (2 * move[i])
        torch.testing.assert_close(by_k[i], difference, rtol=1e-4, atol=0)
    step = torch.tensor([1e-4, 0.0, 0.0], dtype=D)
    with torch.no_grad():
        difference = (last(K, START + step) - last(K, START - step)) / 2e-4
    torch.testing.assert_close(by_y0[0], difference, rtol=1e-4, atol=0)


def test_van_der_pol_with_mu_a_thousand_and_its_gradient():
    mu = torch.tensor(1e3, dtype=D, requires_grad=True)
    y0, solver = torch.tensor([2.0, 0.0], dtype=D), im.Kvaerno5(rtol=1e-8, atol=1e-10)

    def end(mu):
        return im.odeint(van_der_pol, y0, (0.0, 500.0), mu, solver=solver).value[-1][0]

    (gradient,) = torch.autograd.grad(end(mu), mu)
    with torch.no_grad():
        difference = (end(mu + 0.1) - end(mu - 0.1)) / 0.2
    torch.testing.assert_close(gradient, difference, rtol=1e-4, atol=0)


# -------------------------------------------------------------------------------------------- derivatives

W = torch.tensor([[-3.0, 1.0], [-1.0, -2.0]], dtype=D)
Y0 = torch.tensor([[0.3, -0.4], [0.9, 0.1]], dtype=D)


def field(t, y, W):
    return torch.tanh(y @ W.mT) * (1 + 0.3 * t)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("batch_dims", [0, 1])
def test_gradients_are_those_of_differences(method, batch_dims):
    t = torch.tensor([0.0, 0.35, 1.0], dtype=D, requires_grad=True)
    y0, w = Y0.clone().requires_grad_(), W.clone().requires_grad_()
    solver = method(dt=0.25, **TIGHT)

    def f(y0, t, w):
        return im.odeint(field, y0, t, w, solver=solver, batch_dims=batch_dims).value

    # Steps do not move with t but for the last, so the derivative of t[1] is that of the dense output.
    assert torch.autograd.gradcheck(f, (y0, t, w), atol=1e-6, fast_mode=True)


@pytest.mark.parametrize("method", [im.ImplicitEuler, im.Kvaerno3])
@pytest.mark.parametrize("adjoint", [im.RecursiveCheckpointAdjoint(), im.UnrolledAdjoint()])
def test_second_derivatives(method, adjoint):
    y0, w = Y0[:1].clone().requires_grad_(), W.clone().requires_grad_()
    solver = method(dt=0.5, **TIGHT)

    def f(y0, w):
        return im.odeint(field, y0, (0.0, 1.0), w, solver=solver, adjoint=adjoint, batch_dims=1).value[-1]

    assert torch.autograd.gradgradcheck(f, (y0, w), atol=1e-5, fast_mode=True)


def test_transforms_of_torch_func_agree():
    solver = im.Kvaerno3(dt=0.5, **TIGHT)

    def f(w):
        return im.odeint(field, Y0, (0.0, 1.0), w, solver=solver, batch_dims=1).value[-1]

    reverse, forward = func.jacrev(f)(W), func.jacfwd(f)(W)
    torch.testing.assert_close(reverse, forward, rtol=1e-6, atol=1e-9)
    mapped = func.vmap(f)(torch.stack([W, 2 * W]))
    torch.testing.assert_close(mapped[1], f(2 * W), rtol=1e-6, atol=1e-9)
    per_sample = func.vmap(func.grad(lambda w: f(w).sum()))(torch.stack([W, 2 * W]))
    torch.testing.assert_close(per_sample[0], func.grad(lambda w: f(w).sum())(W), rtol=1e-6, atol=1e-9)


# ------------------------------------------------------------------------------------------------- stages


def test_newton_krylov_finds_the_stages_of_a_large_system():
    """The heat equation on 100 points: no Jacobian is ever made."""
    n = 100
    x = torch.linspace(0, 1, n + 2, dtype=D)[1:-1]

    def heat(t, y):
        padded = torch.nn.functional.pad(y, (1, 1))
        return (padded[2:] - 2 * y + padded[:-2]) * (n + 1) ** 2

    solver = im.Kvaerno3(
        rtol=1e-5, atol=1e-7, stage_solver=im.NewtonKrylov(rtol=1e-8, linear_solver=im.GMRES(max_steps=100))
    )
    start = torch.sin(math.pi * x)
    solution = im.odeint(heat, start, (0.0, 0.1), solver=solver)
    rate = 4 * (n + 1) ** 2 * math.sin(math.pi / (2 * (n + 1))) ** 2
    torch.testing.assert_close(solution.value[-1], start * math.exp(-0.1 * rate), rtol=1e-3, atol=0)


def test_jacobians_that_are_too_large_are_refused():
    with pytest.raises(ValueError, match="NewtonKrylov"):
        im.odeint(lambda t, y: -y, torch.ones(2000, dtype=D), (0.0, 1.0), solver=im.Kvaerno5(limit_gib=0.01))


def test_a_jacobian_serves_several_steps():
    """Of a linear system with constant coefficients one Jacobian serves all: the calls do not pay for others."""
    calls = []

    def f(t, y):
        calls.append(torch.is_grad_enabled())
        return y @ W.mT

    solution = im.odeint(f, Y0[0], (0.0, 5.0), solver=im.Kvaerno5(rtol=1e-8, atol=1e-10))
    assert int(solution.steps) > 10
    assert sum(calls) == 2  # the call that looks at f's answer, and one Jacobian
    assert solution.evaluations == len(calls)


def gradient_of_an_oscillator(solver, adjoint):
    """The trajectory of van der Pol's oscillator, and the gradient of its end by mu."""
    mu = torch.tensor(10.0, dtype=D, requires_grad=True)
    y0 = torch.tensor([2.0, 0.0], dtype=D)
    solution = im.odeint(van_der_pol, y0, (0.0, 20.0), mu, solver=solver, adjoint=adjoint, on_failure="ignore")
    return solution, torch.autograd.grad(solution.value[-1].sum(), mu)[0]


def test_stages_of_a_step_taken_again_are_found_whatever_jacobian_led_to_them():
    """Else the gradient of a solve that converged would be NaN."""
    solver = im.Kvaerno5(rtol=1e-4, atol=1e-7)
    solution, by_mu = gradient_of_an_oscillator(solver, im.RecursiveCheckpointAdjoint())
    recorded, expected = gradient_of_an_oscillator(solver, im.UnrolledAdjoint())
    assert solution.status == im.Status.CONVERGED
    torch.testing.assert_close(recorded.value, solution.value, rtol=1e-9, atol=0)
    torch.testing.assert_close(by_mu, expected, rtol=2e-3, atol=0)


@pytest.mark.parametrize(
    ("solver", "status"),
    [
        (im.Kvaerno5(rtol=1e-4, atol=1e-7), im.Status.CONVERGED),
        (im.Kvaerno3(dt=0.1), im.Status.NON_FINITE),
    ],
)
def test_a_stage_that_is_not_found_rejects_a_step_that_autograd_records(solver, status):
    given = gradient_of_an_oscillator(solver, im.RecursiveCheckpointAdjoint())[0]
    recorded = gradient_of_an_oscillator(solver, im.UnrolledAdjoint())[0]
    assert given.status == recorded.status == status
    assert recorded.steps == given.steps
    assert recorded.rejected == given.rejected


def test_stages_of_what_is_very_stiff_have_their_derivative_without_a_warning():
    """Rounding leaves more of their linear systems than others are asked for."""
    k = K.clone().requires_grad_()
    solver, by_k = im.Kvaerno5(rtol=1e-3, atol=1e-6), []
    for adjoint in (im.UnrolledAdjoint(), im.RecursiveCheckpointAdjoint()):
        solution = im.odeint(robertson, START, (0.0, 1e4), k, solver=solver, adjoint=adjoint)
        by_k += torch.autograd.grad(solution.value[-1, 0], k)
    torch.testing.assert_close(*by_k, rtol=1e-3, atol=0)


def test_a_sample_without_a_solution_ends_and_no_other():
    def f(t, y):
        return torch.where((t > 0.5) & (y > 0), float("nan"), -y)

    y0 = torch.tensor([[1.0], [-1.0]], dtype=D)
    solution = im.odeint(f, y0, (0.0, 1.0), solver=im.Kvaerno5(), batch_dims=1, on_failure="ignore")
    assert solution.status.tolist() == [im.Status.NON_FINITE, im.Status.CONVERGED]
    torch.testing.assert_close(solution.value[-1, 1], torch.tensor([-math.exp(-1)], dtype=D), rtol=1e-4, atol=0)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")
@pytest.mark.parametrize("kind", ["to_sparse_csr", "to_sparse_coo", "to_dense"])
def test_gradients_of_slopes_by_a_sparse_matrix(kind):
    """Of a string of 20 masses, whose Jacobian takes the derivative of a product with the matrix."""
    dense = torch.diag(torch.full((20,), -2.0)) + torch.diag(torch.ones(19), 1) + torch.diag(torch.ones(19), -1)
    dense = dense.double()
    A, y0, rate = getattr(dense, kind)(), torch.linspace(0, 1, 20, dtype=D), torch.tensor(0.7, dtype=D)
    rate.requires_grad_()
    solver = im.Kvaerno5(rtol=1e-9, atol=1e-11)
    value = im.odeint(lambda t, y, rate: rate * (A @ y), y0, (0.0, 1.0), rate, solver=solver).value[-1]
    expected = torch.linalg.matrix_exp(rate * dense) @ y0
    found, wanted = (torch.autograd.grad(x.square().sum(), rate)[0] for x in (value, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-7, atol=0)


def test_bad_options():
    with pytest.raises(ValueError, match="stage_tolerance"):
        im.Kvaerno5(stage_tolerance=2.0)
    with pytest.raises(ValueError, match="does not estimate its error"):
        im.ImplicitEuler()
