"""Nonlinear least squares: curve fits, and derivatives that know the whole Hessian."""

from __future__ import annotations

import pytest
import torch

import implicitly as im
from tests.argmin.problems import NAMED, decay
from tests.problems import draw

D = torch.float64
SOLVERS = [im.LevenbergMarquardt(), im.GaussNewton(), im.LBFGS()]


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
def test_a_fit_is_the_minimum_of_the_sum_of_squares_with_its_derivative(solver):
    problem = NAMED["decay"]
    y, weight = (a.clone().requires_grad_() for a in problem.args)
    fit = im.least_squares(decay, problem.z0, y, weight, solver=solver)
    energy = im.argmin(lambda z, *a: decay(z, *a).square().sum(1) / 2, problem.z0, y, weight)
    torch.testing.assert_close(fit.value, energy.value, rtol=1e-7, atol=1e-8)
    ours, theirs = (torch.autograd.grad(s.value.sin().sum(), (y, weight)) for s in (fit, energy))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("solver", SOLVERS[:2], ids=lambda s: type(s).__name__)
def test_linear_residuals_are_solved_by_the_normal_equations(solver):
    A, b = draw(3, 7, 4, seed=1), draw(3, 7, seed=2)
    value = im.least_squares(
        lambda z, A, b: (A @ z.unsqueeze(2))[:, :, 0] - b, torch.zeros(3, 4, dtype=D), A, b, solver=solver
    ).value
    torch.testing.assert_close(value, torch.linalg.lstsq(A, b).solution, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("wide", [False, True], ids=["more residuals", "more unknowns"])
def test_residuals_may_be_a_pytree_and_more_or_fewer_than_the_unknowns(wide):
    x = draw(2, 3, seed=3)

    def residuals(z, x):
        return {"a": z[:, :1] - x[:, :1], "b": (z[:, 1:] - x[:, 1:])[:, None]} if not wide else z[:, :1] - x[:, :1]

    value = im.least_squares(residuals, torch.zeros(2, 3, dtype=D), x).value
    expected = x if not wide else torch.cat([x[:, :1], torch.zeros(2, 2, dtype=D)], 1)
    torch.testing.assert_close(value, expected, rtol=1e-8, atol=1e-8)


def test_levenberg_marquardt_survives_a_start_where_gauss_newton_overshoots():
    def residuals(z, x):
        return torch.atan(10 * (z - x))

    x = torch.tensor([[0.3], [-2.0]], dtype=D)
    z0 = torch.tensor([[4.0], [9.0]], dtype=D)
    torch.testing.assert_close(im.least_squares(residuals, z0, x).value, x, rtol=1e-7, atol=1e-8)


def test_jacobians_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"dense Jacobians.*limit 1e-09.*LBFGS"):
        im.least_squares(lambda z: z - 1, torch.zeros(2, 9, dtype=D), solver=im.LevenbergMarquardt(limit_gib=1e-9))
