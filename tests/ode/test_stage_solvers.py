"""Stages that a solver of the user's finds."""

from __future__ import annotations

import warnings

import pytest
import torch

import implicitly as im

D = torch.float64


def driven(t, y):
    return -50 * (y - torch.cos(t)) ** 3


@pytest.mark.parametrize("solver", [im.Newton(), im.NewtonKrylov(), im.Broyden(max_steps=8)])
def test_its_calls_of_f_are_counted(solver):
    calls = []

    def f(t, y):
        calls.append(t)
        return driven(t, y)

    solution = im.odeint(f, torch.zeros(3, dtype=D), (0.0, 0.2), solver=im.Kvaerno3(stage_solver=solver))
    assert solution.evaluations == len(calls) > 100


def test_a_stage_that_is_not_found_shortens_the_step_and_says_nothing():
    options = {"solver": im.Kvaerno3(stage_solver=im.FixedPointIteration(max_steps=4))}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solution = im.odeint(driven, torch.zeros(3, dtype=D), (0.0, 0.2), **options)
    assert solution.rejected > 20
    right = im.odeint(driven, torch.zeros(3, dtype=D), (0.0, 0.2), solver=im.Kvaerno3(rtol=1e-7, atol=1e-8)).value
    torch.testing.assert_close(solution.value, right, rtol=1e-4, atol=1e-5)


def test_a_number_of_iterations_without_a_tolerance():
    solver = im.Kvaerno3(stage_solver=im.Newton(rtol=0, max_steps=4))
    solution = im.odeint(driven, torch.zeros(1, dtype=D), (0.0, 0.1), solver=solver)
    right = im.odeint(driven, torch.zeros(1, dtype=D), (0.0, 0.1), solver=im.Kvaerno3())
    torch.testing.assert_close(solution.value, right.value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "adjoint",
    [im.RecursiveCheckpointAdjoint(), im.UnrolledAdjoint(), im.BacksolveAdjoint()],
    ids=lambda a: type(a).__name__,
)
def test_the_backward_pass_makes_no_jacobian(adjoint):
    def f(t, y, w):
        return -w * y**3

    # One Jacobian of 100 numbers takes more than this.
    solver = im.Kvaerno3(stage_solver=im.NewtonKrylov(), limit_gib=1e-6)
    y0, w = torch.linspace(0, 1, 100, dtype=D), torch.ones(1, dtype=D, requires_grad=True)
    value = im.odeint(f, y0, (0.0, 1.0), w, solver=solver, adjoint=adjoint).value
    (found,) = torch.autograd.grad(value[-1].sum(), w)
    right = -(y0**3) * (1 + 2 * y0**2) ** -1.5  # of y0 / sqrt(1 + 2 w t y0^2)
    torch.testing.assert_close(found, right.sum(0, keepdim=True), rtol=1e-3, atol=0)


@pytest.mark.parametrize("solver", ["newton", im.Newton, im.GMRES(), im.LBFGS()], ids=str)
def test_what_solves_no_equations_is_refused(solver):
    with pytest.raises(TypeError, match="stage_solver must be a solver of equations such as"):
        im.Kvaerno5(stage_solver=solver)


def test_tolerances_are_those_of_the_solver():
    with pytest.raises(ValueError, match=r"pass only stage_solver=im.Newton\(rtol=..., atol=...\)"):
        im.Kvaerno5(stage_solver=im.Newton(), stage_tolerance=0.1)
    with pytest.raises(TypeError, match="stage_tolerance must be a number, got a str"):
        im.Kvaerno5(stage_tolerance="tight")
    with pytest.raises(ValueError, match="float32 cannot reach rtol=1e-09"):
        im.odeint(
            lambda t, y: pytest.fail("a step was taken") if t > 0 else -y,
            torch.ones(1),
            (0.0, 1.0),
            solver=im.Kvaerno3(stage_solver=im.Newton(rtol=1e-9)),
        )
