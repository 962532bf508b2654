"""`rtol=0` asks for a number of steps: those that come after the exact solution are no failure."""

from __future__ import annotations

import warnings

import pytest
import torch

import implicitly as im
from tests.problems import draw, matrix

D = torch.float64
X = draw(3, 4, seed=1)
LINEAR = (im.GMRES, im.BiCGStab, im.CG, im.DenseLU, im.Anderson)
ADJOINTS = [im.ImplicitAdjoint(kind(rtol=0, max_steps=12)) for kind in LINEAR]
ADJOINTS += [im.ImplicitAdjoint(im.GMRES(rtol=0, max_steps=12), inverse=use) for use in ("start", "precondition")]
each_adjoint = pytest.mark.parametrize(
    "adjoint", ADJOINTS, ids=lambda a: f"{type(a.linear_solver).__name__}-{a.inverse}"
)


@each_adjoint
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("n", [1, 4, 200])
def test_a_backward_solve_that_is_exact_at_once(adjoint, dtype, n):
    x = draw(3, n, seed=2).to(dtype).requires_grad_()
    value = im.fixed_point(
        lambda z, x: 2 * x + 0 * z, torch.zeros_like(x), x, solver=im.Broyden(), adjoint=adjoint
    )
    (gradient,) = torch.autograd.grad(value.value.sum(), x)
    torch.testing.assert_close(gradient, torch.full_like(x, 2.0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_what_long_products_round_is_no_sign_of_a_singular_system(dtype):
    x = draw(3, 20_000, seed=2).to(dtype)
    solution = im.linear_solve(lambda u: 2 * u, x, solver=im.GMRES(rtol=0, max_steps=12))
    torch.testing.assert_close(solution.value, x / 2)


@each_adjoint
def test_a_masked_loss(adjoint):
    W = matrix(4, 0.5, 3)
    W, x = W @ W.mT, X.clone().requires_grad_()  # symmetric, for conjugate gradients
    f = lambda z, x: z @ W + x  # noqa: E731
    value = im.fixed_point(f, torch.zeros_like(X), x, solver=im.Broyden(rtol=1e-13), adjoint=adjoint).value
    (gradient,) = torch.autograd.grad(value[0].sum(), x)
    exact = torch.linalg.inv(torch.eye(4, dtype=D) - W).sum(1)
    torch.testing.assert_close(gradient, torch.stack([exact, 0 * exact, 0 * exact]), rtol=0, atol=1e-10)


@pytest.mark.parametrize("steps", [5, 40])
def test_a_singular_system_is_told_all_the_same(steps):
    M = torch.diag(torch.tensor([1.0, 2.0, 3.0, 0.0], dtype=D))
    solution = im.linear_solve(
        lambda u: u @ M, torch.ones(1, 4, dtype=D), solver=im.GMRES(rtol=0, max_steps=steps), on_failure="ignore"
    )
    assert solution.status.tolist() == [im.Status.SINGULAR]


def test_as_one_graph(traced):
    x = X.clone().requires_grad_()
    adjoint = im.ImplicitAdjoint(im.GMRES(rtol=0, max_steps=12))
    value = im.fixed_point(lambda z, x: 2 * x + 0 * z, torch.zeros_like(X), x, adjoint=adjoint, compile=True).value
    (gradient,) = torch.autograd.grad(value.sum(), x)
    torch.testing.assert_close(gradient, torch.full_like(X, 2.0))


def bowl(z, x):
    return ((z - x) ** 2).sum(1)


def least_squares(z, x, solver):
    return im.least_squares(lambda z, x: z - x, z, x, solver=solver)


def argmin(z, x, solver, **options):
    return im.argmin(bowl, z, x, solver=solver, **options)


def on_simplex(z, x, solver):
    return argmin(z, x, solver, constraint=lambda z, x: im.project.simplex(z))


def on_plane(z, x, solver):
    return argmin(z, x, solver, constraint=im.Equality(lambda z, x: z.sum(1) - 1))


MINIMISERS = [
    (argmin, im.LBFGS), (argmin, im.Newton), (argmin, im.GradientDescent), (least_squares, im.LBFGS),
    (least_squares, im.LevenbergMarquardt), (least_squares, im.GaussNewton), (on_simplex, im.ProjectedGradient),
    (on_plane, im.NewtonKKT),
]  # fmt: skip


@pytest.mark.parametrize("at_the_minimum", [True, False])
@pytest.mark.parametrize(("solve", "kind"), MINIMISERS, ids=lambda x: x.__name__)
def test_a_minimiser_that_has_arrived(solve, kind, at_the_minimum):
    minimum = {on_simplex: im.project.simplex(X), on_plane: X - (X.sum(1, keepdim=True) - 1) / 4}.get(solve, X)
    start = minimum if at_the_minimum else torch.zeros_like(X)
    x = X.clone().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solution = solve(start, x, kind(rtol=0, max_steps=30))  # on_failure="raise"
    torch.testing.assert_close(solution.value, minimum, rtol=0, atol=1e-9)
    assert set(solution.status.tolist()) <= {im.Status.MAX_STEPS, im.Status.STAGNATED}
    (gradient,) = torch.autograd.grad(solution.value[:, 0].sum(), x)
    assert bool(gradient.isfinite().all())
    assert solve is not argmin or torch.allclose(gradient[:, 0], torch.ones(3, dtype=D))
