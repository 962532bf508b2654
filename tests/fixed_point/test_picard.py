"""Plain damped iteration."""

from __future__ import annotations

import math

import torch

import implicitly as im
from tests.problems import draw, matrix

D = torch.float64


def test_it_is_the_textbook_iteration():
    W, x = matrix(3, 0.9, 1), draw(2, 3, seed=2)
    f = lambda z: torch.tanh(z @ W + x)  # noqa: E731
    z = torch.zeros(2, 3, dtype=D)
    for steps in range(1, 6):
        z = z + 0.6 * (f(z) - z)
        solver = im.FixedPointIteration(damping=0.6, rtol=0, max_steps=steps)
        torch.testing.assert_close(
            im.fixed_point(f, torch.zeros_like(z), solver=solver).value, z, rtol=0, atol=1e-15
        )


def test_damping_makes_a_large_negative_slope_converge():
    f = lambda z: 1 - 1.5 * z  # noqa: E731
    z0 = torch.zeros(1, 1, dtype=D)
    plain = im.fixed_point(f, z0, solver=im.FixedPointIteration(), on_failure="ignore")
    damped = im.fixed_point(f, z0, solver=im.FixedPointIteration(damping=0.5))
    assert not bool(plain.converged)
    torch.testing.assert_close(damped.value, torch.full((1, 1), 0.4, dtype=D))


def test_it_converges_linearly_at_the_rate_of_the_contraction():
    rate, rtol = 0.5, 1e-8
    solver = im.FixedPointIteration(rtol=rtol, atol=0.0)
    solution = im.fixed_point(lambda z: rate * z + 1, torch.zeros(1, 1, dtype=D), solver=solver)
    assert abs(int(solution.steps) - math.log(rtol) / math.log(rate)) <= 1.5


def test_on_a_root_it_descends_the_residual():
    A = torch.tensor([1.5, 0.5], dtype=D)
    b = torch.tensor([[3.0, 1.0]], dtype=D)
    solution = im.root(lambda z: A * z - b, torch.zeros(1, 2, dtype=D), solver=im.FixedPointIteration())
    torch.testing.assert_close(solution.value, torch.full((1, 2), 2.0, dtype=D))
