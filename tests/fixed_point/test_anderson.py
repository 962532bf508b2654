"""Anderson acceleration."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import implicitly as im
from implicitly.fixed_point.anderson import _weights, _weights_on_host, _with_ridge
from tests.problems import draw, matrix

D = torch.float64


def _affine(n, norm=0.95, seed=1, batch=3):
    W, x = matrix(n, norm, seed), draw(batch, n, seed=seed + 1)
    return lambda z: z @ W + x, x @ torch.linalg.inv(torch.eye(n, dtype=D) - W)


def textbook(f, z, steps: int, history: int, damping: float) -> torch.Tensor:
    """Walker and Ni's algorithm for one sample, the mix found by least squares."""
    zs, fs = [], []
    for _ in range(steps):
        zs, fs = [*zs, z][-history:], [*fs, f(z)][-history:]
        G = torch.stack([b - a for a, b in zip(zs, fs)], 1)
        differences = G[:, :-1] - G[:, -1:]
        gamma = torch.linalg.lstsq(differences, -G[:, -1:]).solution[:, 0] if len(zs) > 1 else G.new_zeros(0)
        weights = torch.cat([gamma, 1 - gamma.sum().reshape(1)])
        mixed_z, mixed_f = torch.stack(zs, 1) @ weights, torch.stack(fs, 1) @ weights
        z = mixed_z + damping * (mixed_f - mixed_z)
    return z


@pytest.mark.parametrize("history", [1, 2, 4])
@pytest.mark.parametrize("damping", [1.0, 0.6])
def test_it_is_the_textbook_algorithm(history, damping):
    W, x = matrix(8, 0.9, 3), draw(8, seed=4)
    f = lambda z: torch.tanh(z @ W + x)  # noqa: E731
    for steps in (1, 2, 3, 6, 9):
        solver = im.Anderson(rtol=0, max_steps=steps, history=history, damping=damping, regularisation=0.0)
        actual = im.fixed_point(f, torch.zeros(8, dtype=D), solver=solver, batch_dims=0).value
        expected = textbook(f, torch.zeros(8, dtype=D), steps, history, damping)
        torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-9)


def test_on_a_linear_problem_it_needs_no_more_steps_than_dimensions_and_one():
    f, exact = _affine(6)
    solution = im.fixed_point(f, torch.zeros(3, 6, dtype=D), solver=im.Anderson(history=7, rtol=1e-10))
    assert int(solution.steps.max()) <= 7
    torch.testing.assert_close(solution.value, exact, rtol=1e-8, atol=1e-8)


def test_it_needs_far_fewer_steps_than_plain_iteration():
    rates, x = torch.linspace(0, 0.99, 20, dtype=D), draw(3, 20, seed=2)
    f = lambda z: z * rates + x  # noqa: E731
    plain = im.fixed_point(f, torch.zeros(3, 20, dtype=D), solver=im.FixedPointIteration(max_steps=5000))
    mixed = im.fixed_point(f, torch.zeros(3, 20, dtype=D), solver=im.Anderson(max_steps=500))
    assert int(mixed.steps.max()) * 3 < int(plain.steps.max())


def test_a_history_of_one_is_plain_iteration():
    f, _ = _affine(5)
    z0 = torch.zeros(3, 5, dtype=D)
    one = im.fixed_point(f, z0, solver=im.Anderson(history=1, rtol=0, max_steps=7))
    plain = im.fixed_point(f, z0, solver=im.FixedPointIteration(rtol=0, max_steps=7))
    torch.testing.assert_close(one.value, plain.value, rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_history_larger_than_the_dimension_is_harmless(dtype):
    """More residuals than dimensions are linearly dependent; the step must stay sane."""
    x = draw(64, 1, seed=5).to(dtype)
    solution = im.fixed_point(lambda z: torch.cos(z) + x, torch.zeros_like(x), solver=im.Anderson(history=10))
    assert bool(solution.converged.all())
    assert int(solution.steps.max()) <= 30


def test_repeated_residuals_fall_back_to_the_damped_step():
    """f(z) = z + 1 gives the same residual again and again: which mix is best is not defined."""
    z0 = torch.zeros(1, 2, dtype=D)
    solver = im.Anderson(rtol=0, max_steps=6, regularisation=0.0)
    value = im.fixed_point(lambda z: z + 1, z0, solver=solver).value
    assert bool(value.isfinite().all())
    torch.testing.assert_close(value, torch.full((1, 2), 6.0, dtype=D))


@pytest.mark.parametrize(("contraction", "believed"), [(0.999, True), (0.999999, False)])
def test_weights_that_would_leap_a_million_residuals_are_not_believed(contraction, believed):
    """In one dimension the weights are 1 / (1 - q): what rounding makes of 1e6 of them once drove a solve away."""
    z0 = torch.zeros(1, 1, dtype=D)
    solver = im.Anderson(rtol=0, max_steps=5, history=2)
    value = im.fixed_point(lambda z: contraction * z + 1, z0, solver=solver).value
    expected = 1 / (1 - contraction) if believed else sum(contraction**k for k in range(5))
    torch.testing.assert_close(value, torch.full((1, 1), expected, dtype=D), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, D])
def test_weights_found_on_the_host_are_those_that_are_recorded(dtype):
    """Of residuals that shrink by orders of magnitude, of which one sample has one that is zero, and one a NaN."""
    shrunk = draw(5, 6, 40, seed=20) * 10.0 ** -torch.arange(6.0, dtype=D)[:, None]
    shrunk[2, 4], shrunk[3, 2] = 0.0, float("nan")
    shrunk = shrunk.to(dtype)
    gram, ridge = shrunk @ shrunk.mT, 10 * torch.finfo(dtype).eps
    for slot in range(6):
        gram[:, slot] = _with_ridge(gram[:, slot].clone(), slot, ridge)
    slot = 5
    row = (shrunk @ shrunk.mT)[:, slot]
    found = _weights_on_host(gram.numpy().copy(), row.numpy().copy(), slot, ridge)
    expected = _weights(gram, slot, 6)
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=0, atol=100 * torch.finfo(dtype).eps)
    assert found[3].tolist() == [0, 0, 0, 0, 0, 1]


def test_a_singular_system_says_nothing_of_the_others():
    gram = np.stack([np.eye(3), np.ones((3, 3)), np.diag([1.0, 4.0, 2.0])])
    row = gram[:, 2].copy()
    found = _weights_on_host(gram, row, 2, 0.0)
    np.testing.assert_allclose(found, [[1 / 3] * 3, [0, 0, 1], np.array([4, 1, 2]) / 7], rtol=1e-12)


def test_regularisation_pulls_the_mix_towards_equal_weights():
    f, exact = _affine(6)
    z0 = torch.zeros(3, 6, dtype=D)
    errors = []
    for regularisation in (0.0, 1e-2, 1e4):
        solver = im.Anderson(rtol=0, max_steps=6, history=6, regularisation=regularisation)
        errors.append(float((im.fixed_point(f, z0, solver=solver).value - exact).norm()))
    assert errors == sorted(errors)


def test_bfloat16_forms_its_inner_products_in_float32():
    W, x = matrix(64, 0.9, 6).bfloat16(), draw(4, 64, seed=7).bfloat16()
    f = lambda z: torch.tanh(z @ W + x)  # noqa: E731
    solution = im.fixed_point(f, torch.zeros_like(x), solver=im.Anderson(rtol=1e-2))
    assert bool(solution.converged.all())
    assert int(solution.steps.max()) <= 15
