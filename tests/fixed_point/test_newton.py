"""Newton's method, dense and matrix-free."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

import implicitly as im
from tests.problems import draw, matrix

D = torch.float64
BOTH = [im.Newton, im.NewtonKrylov]


def _cubic(z, a):
    return z**3 + z - a


def test_it_is_the_textbook_iteration():
    a, z = torch.tensor([[3.0]], dtype=D), torch.tensor([[1.0]], dtype=D)
    for steps in range(1, 5):
        z = z - _cubic(z, a) / (3 * z**2 + 1)
        solver = im.Newton(rtol=0, max_steps=steps, line_search=False)
        actual = im.root(_cubic, torch.ones(1, 1, dtype=D), a, solver=solver).value
        torch.testing.assert_close(actual, z, rtol=0, atol=1e-15)


@pytest.mark.parametrize("make", BOTH)
def test_a_linear_system_takes_one_step_of_newton_and_few_of_newton_krylov(make):
    A, b = torch.eye(5, dtype=D) + matrix(5, 2.0, 1), draw(3, 5, seed=2)
    solution = im.root(lambda z, b: z @ A.mT - b, torch.zeros(3, 5, dtype=D), b, solver=make())
    assert int(solution.steps.max()) <= (1 if make is im.Newton else 6)
    torch.testing.assert_close(solution.value, torch.linalg.solve(A, b.mT).mT, rtol=1e-8, atol=1e-8)


def test_convergence_is_quadratic():
    a = torch.tensor([[2.0]], dtype=D)
    exact = im.root(_cubic, torch.ones(1, 1, dtype=D), a, solver=im.Newton(rtol=1e-15)).value
    errors = []
    for steps in (1, 2, 3, 4):
        solver = im.Newton(rtol=0, max_steps=steps)
        value = im.root(_cubic, torch.full((1, 1), 1.3, dtype=D), a, solver=solver).value
        errors.append(float((value - exact).abs()))
    for before, after in pairwise(errors):
        assert after <= 1.5 * before**2 + 1e-15


@pytest.mark.parametrize("make", BOTH)
def test_line_search_converges_from_where_full_steps_run_away(make):
    """atan(z) = 0: full Newton steps diverge from |z| > 1.39."""
    z0 = torch.tensor([[3.0], [0.5]], dtype=D)
    full = im.root(torch.atan, z0, solver=make(line_search=False), on_failure="ignore")
    assert full.converged.tolist() == [False, True]
    search = im.root(torch.atan, z0, solver=make())
    assert search.converged.tolist() == [True, True]
    torch.testing.assert_close(search.value, torch.zeros_like(z0), rtol=0, atol=1e-8)


@pytest.mark.parametrize("make", BOTH)
def test_line_search_steps_back_from_where_f_is_undefined(make):
    """log(z) + 1: the full step from 10 lands at a negative z, where F is NaN."""
    solution = im.root(lambda z: torch.log(z) + 1, torch.full((1, 1), 10.0, dtype=D), solver=make())
    torch.testing.assert_close(solution.value, torch.full((1, 1), -1.0, dtype=D).exp())


@pytest.mark.parametrize("make", BOTH)
def test_a_residual_without_a_root_is_never_called_converged(make):
    solution = im.root(lambda z: z**2 + 1, torch.full((2, 1), 0.7, dtype=D), solver=make(), on_failure="ignore")
    assert not bool(solution.converged.any())
    assert bool((solution.residual >= 1 - 1e-12).all())


def test_a_singular_jacobian_on_the_way_is_reported_and_harms_no_other_sample():
    z0 = torch.tensor([[0.0], [1.0]], dtype=D)  # F' = 2 z is 0 at the first
    solution = im.root(lambda z: z**2 - 4, z0, on_failure="ignore")
    assert [im.Status(int(s)).name for s in solution.status] == ["SINGULAR", "CONVERGED"]
    torch.testing.assert_close(solution.value[1], torch.tensor([2.0], dtype=D))


@pytest.mark.parametrize("make", BOTH)
def test_a_double_root_is_found_though_slowly(make):
    solution = im.root(lambda z: (z - 1) ** 2, torch.full((1, 1), 2.0, dtype=D), solver=make(rtol=1e-6))
    torch.testing.assert_close(solution.value, torch.ones(1, 1, dtype=D), rtol=0, atol=2e-3)


def test_newton_krylov_never_forms_a_matrix():
    """20,000 unknowns: dense Jacobians would take 3 GiB a sample."""
    n = 20_000
    target = torch.linspace(0.1, 1.0, n, dtype=D).expand(2, n)

    def residual(z):
        return 3 * z - 0.5 * (z.roll(1, 1) + z.roll(-1, 1)) + z**3 - target

    solution = im.root(residual, torch.zeros(2, n, dtype=D), solver=im.NewtonKrylov())
    assert bool(solution.converged.all())
    assert float(residual(solution.value).abs().max()) < 1e-8


def test_forcing_terms_make_early_linear_solves_cheap():
    """Solving every step to full accuracy takes more products for the same answer."""
    A, x = torch.eye(30, dtype=D) + matrix(30, 0.9, 3), draw(4, 30, seed=4)
    residual = lambda z, x: z @ A.mT + 0.3 * z**3 - x  # noqa: E731
    adaptive = im.root(residual, torch.zeros(4, 30, dtype=D), x, solver=im.NewtonKrylov())
    dense = im.root(residual, torch.zeros(4, 30, dtype=D), x, solver=im.Newton())
    torch.testing.assert_close(adaptive.value, dense.value, rtol=1e-8, atol=1e-8)
    exact_every_time = int(dense.steps.max()) * 30
    assert adaptive.evaluations < exact_every_time


def test_a_jacobian_with_nan_is_told_from_a_singular_one():
    """|z|^1.5 has a derivative of NaN where it is written as a power of a square."""

    def residual(z):
        return (z**2) ** 0.75 + torch.where(z == 0, z.abs().sqrt(), 0.0) + 1.0

    z0 = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    status = im.root(residual, z0, on_failure="ignore", solver=im.Newton(max_steps=1)).status
    assert status[0] == im.Status.NON_FINITE
    assert status[1] != im.Status.NON_FINITE
