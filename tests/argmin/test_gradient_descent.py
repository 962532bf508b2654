"""Gradient descent: constant steps, line searches and acceleration, at the rates that theory gives."""

from __future__ import annotations

import pytest
import torch

import implicitly as im

D = torch.float64
SPECTRUM = torch.logspace(0, 3, 20, dtype=D)  # condition number 1000


def ill_conditioned(z, x):
    return 0.5 * (SPECTRUM * (z - x) ** 2).sum(1)


X = torch.ones(2, 20, dtype=D)
Z0 = torch.zeros(2, 20, dtype=D)


def steps_of(solver):
    solution = im.argmin(ill_conditioned, Z0, X, solver=solver, on_failure="ignore")
    assert bool(solution.converged.all())
    torch.testing.assert_close(solution.value, X, rtol=0, atol=2e-3)
    return int(solution.steps.max())


def test_acceleration_takes_the_square_root_of_the_steps():
    plain = steps_of(im.GradientDescent(step=1e-3, rtol=1e-6, max_steps=20000))
    accelerated = steps_of(im.GradientDescent(step=1e-3, rtol=1e-6, accelerated=True))
    searched = steps_of(im.GradientDescent(rtol=1e-6))
    backtracked = steps_of(im.GradientDescent(rtol=1e-6, accelerated=True))
    assert plain > 5000
    assert max(accelerated, searched, backtracked) < 1000


def test_constant_steps_are_those_of_the_formula():
    solver = im.GradientDescent(step=1e-3, rtol=0, max_steps=7)
    z = im.argmin(ill_conditioned, Z0, X, solver=solver, on_failure="ignore").value
    torch.testing.assert_close(z, X * (1 - (1 - 1e-3 * SPECTRUM) ** 7))


@pytest.mark.parametrize("scale", [1e-6, 1e6])
@pytest.mark.parametrize("accelerated", [False, True])
def test_the_scale_of_the_objective_does_not_matter(scale, accelerated):
    solver = im.GradientDescent(accelerated=accelerated)
    value = im.argmin(lambda z, x: scale * (z - x).square().sum(1), Z0, X, solver=solver).value
    torch.testing.assert_close(value, X, rtol=1e-8, atol=1e-8)


def test_acceleration_follows_rosenbrocks_valley_from_everywhere():
    """27 of these 64 had stagnated, on the way back after they had passed by the minimum."""
    z0 = 4 * torch.rand(64, 2, generator=torch.Generator().manual_seed(0), dtype=D) - 2
    objective = lambda z: 100 * (z[:, 1] - z[:, 0] ** 2) ** 2 + (1 - z[:, 0]) ** 2  # noqa: E731
    value = im.argmin(objective, z0, solver=im.GradientDescent(accelerated=True)).value
    torch.testing.assert_close(value, torch.ones(64, 2, dtype=D), rtol=0, atol=1e-3)


@pytest.mark.parametrize("accelerated", [False, True])
def test_a_step_that_is_too_long_is_told_to_be_shortened(accelerated):
    solver = im.GradientDescent(step=10.0, accelerated=accelerated)
    with pytest.raises(im.SolverError, match=r"DIVERGED.*a smaller step, or step=None"):
        im.argmin(ill_conditioned, Z0, X, solver=solver)


def test_steps_must_be_numbers():
    for step in ("a", True):
        with pytest.raises(TypeError, match="GradientDescent: step must be a positive number"):
            im.GradientDescent(step=step)


@pytest.mark.parametrize(("dtype", "unit"), [(torch.float32, 1e-7), (torch.float32, 1e-10), (D, 1e-16)])
@pytest.mark.parametrize("accelerated", [False, True])
def test_steps_that_lead_away_diverge_however_small_the_objective(dtype, unit, accelerated):
    """Nothing is small but in units: a gradient less than rounding of 1 may be all there is of it."""
    x = torch.tensor([[1.0, 2.0], [3.0, -1.0]], dtype=dtype)
    solver = im.GradientDescent(step=10 / unit, accelerated=accelerated)
    objective = lambda z, x: unit * (z - x).square().sum(1)  # noqa: E731
    solution = im.argmin(objective, torch.zeros_like(x), x, solver=solver, on_failure="ignore")
    assert solution.status.tolist() == [im.Status.DIVERGED] * 2
