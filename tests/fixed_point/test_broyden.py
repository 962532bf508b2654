"""Broyden's method."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

import implicitly as im
from implicitly.fixed_point.broyden import Broyden
from tests.problems import draw, matrix

D = torch.float64


def textbook(F, z, steps: int) -> torch.Tensor:
    """Broyden's good method for one sample, with a dense estimate H of the inverse of -dF/dz."""
    H, r = torch.eye(len(z), dtype=z.dtype), F(z)
    for _ in range(steps):
        s = H @ r
        z, old = z + s, r
        r = F(z)
        y = old - r
        H = H + torch.outer(s - H @ y, s @ H) / (s @ H @ y)
    return z


def test_it_is_the_textbook_algorithm():
    W, x = matrix(8, 0.9, 3), draw(8, seed=4)
    f = lambda z: torch.tanh(z @ W + x)  # noqa: E731
    for steps in (1, 2, 3, 6, 9):
        solver = im.Broyden(rtol=0, max_steps=steps, history=10)
        actual = im.fixed_point(f, torch.zeros(8, dtype=D), solver=solver, batch_dims=0).value
        expected = textbook(lambda z: f(z) - z, torch.zeros(8, dtype=D), steps)
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


def test_on_a_linear_problem_it_needs_at_most_twice_as_many_steps_as_dimensions():
    n = 6
    W, x = matrix(n, 2.0, 1), draw(5, n, seed=2)  # plain iteration diverges
    solution = im.fixed_point(
        lambda z: z @ W + x, torch.zeros(5, n, dtype=D), solver=im.Broyden(rtol=1e-9, history=20)
    )
    assert bool(solution.converged.all())
    assert int(solution.steps.max()) <= 2 * n + 1  # Gay 1979


def test_it_goes_on_when_its_history_is_full():
    W, x = matrix(12, 0.9, 5), draw(3, 12, seed=6)
    f = lambda z: torch.tanh(z @ W + x)  # noqa: E731
    short = im.fixed_point(f, torch.zeros(3, 12, dtype=D), solver=im.Broyden(history=3))
    long = im.fixed_point(f, torch.zeros(3, 12, dtype=D), solver=im.Broyden(history=50))
    assert bool(short.converged.all())
    assert int(short.steps.max()) > 6  # it did forget
    torch.testing.assert_close(short.value, long.value, rtol=1e-8, atol=1e-8)


def test_it_converges_faster_than_linearly():
    x = draw(16, 1, seed=7)
    steps = []
    for rtol in (1e-3, 1e-6, 1e-12):
        solver = im.Broyden(rtol=rtol, atol=0.0)
        solution = im.fixed_point(lambda z: torch.cos(z) + x, torch.zeros_like(x), solver=solver)
        steps.append(int(solution.steps.max()))
    assert steps[2] - steps[1] <= steps[1] - steps[0] + 1


def test_line_search_converges_from_where_full_steps_run_away():
    f = lambda z: torch.atan(z)  # noqa: E731
    z0 = torch.tensor([[30.0]], dtype=D)
    search = im.root(lambda z: 10 * f(z), z0, solver=im.Broyden(line_search=True), on_failure="ignore")
    full = im.root(lambda z: 10 * f(z), z0, solver=im.Broyden(), on_failure="ignore")
    assert bool(search.converged.all())
    assert float(search.residual) <= float(full.residual) or not bool(full.converged.all())


class Peek(im.ImplicitAdjoint):
    """Keeps the estimate with which the solve ended."""

    def attach(self, found, condition, problem):
        self.listen(found.estimate)
        return super().attach(found, condition, problem)


def update(D, N, count):
    """H - I, of the matrices that the estimate stands for."""
    known = (torch.arange(D.shape[1]) < count[:, None])[:, :, None]
    D = torch.where(known, D, 0.0)
    return D.mT @ N[:, : D.shape[1], : D.shape[1]] @ D


def outer(u, v):
    return u.unsqueeze(2) * v.unsqueeze(1)


def square(d):
    return d.square().sum(1)[:, None, None]


@pytest.mark.parametrize("history", [30, 5])
def test_its_estimate_of_the_inverse_maps_the_last_change_of_residual_to_the_last_step(history):
    """The secant equation, H y = s, for the matrix that (D, N) stand for, until an update is forgotten; and the
    product of those that are known, as Kelley writes it."""
    n, x = 6, draw(4, 6, seed=8)
    W = matrix(n, 0.9, 9)
    iterates, estimates = [], []

    def f(z):
        iterates.append(z.clone())
        return torch.tanh(z @ W + x)

    solver = Broyden(rtol=0, max_steps=9, history=history)
    im.fixed_point(f, torch.zeros(4, n, dtype=D), solver=solver, adjoint=Peek(listen=estimates.append))
    H = torch.eye(n, dtype=D) + update(*estimates[0])
    residuals = [torch.tanh(z @ W + x) - z for z in iterates]
    known = min(9, history)
    expected = torch.eye(n, dtype=D).expand(4, n, n)
    steps = [after - before for before, after in pairwise(iterates)][-known:]
    for step, following in pairwise(steps):
        expected = expected + outer(following, (step.unsqueeze(1) @ expected).squeeze(1)) / square(step)
    torch.testing.assert_close(H, expected, rtol=1e-8, atol=1e-10)
    if history > 9:
        # It gave the last step, and its last update was made from the step before that.
        step = (H @ residuals[-2].unsqueeze(2)).squeeze(2)
        torch.testing.assert_close(step, iterates[-1] - iterates[-2], rtol=1e-8, atol=1e-12)
        s, y = iterates[-2] - iterates[-3], residuals[-3] - residuals[-2]
        torch.testing.assert_close((H @ y.unsqueeze(2)).squeeze(2), s, rtol=1e-8, atol=1e-10)


def test_the_estimate_of_a_sample_that_finished_early_stays_as_good_as_it_was():
    W = matrix(3, 0.9, 10)
    x = draw(3, 3, seed=11)
    x[0] *= 20  # saturates, so finishes early
    estimates = []

    def error(rows):
        f = lambda z: torch.tanh(z @ W + x[rows])  # noqa: E731
        adjoint = Peek(listen=estimates.append)
        solution = im.fixed_point(f, torch.zeros(len(rows), 3, dtype=D), solver=im.Broyden(), adjoint=adjoint)
        H = update(*estimates.pop())
        slopes = 1 - solution.value**2
        A = torch.eye(3, dtype=D) - slopes.unsqueeze(2) * W.mT
        return solution.steps, ((torch.eye(3, dtype=D) + H) @ A - torch.eye(3, dtype=D)).norm(dim=(1, 2))

    steps, together = error([0, 1, 2])
    assert int(steps[0]) + 2 < int(steps.max())
    for i in range(3):
        assert float(together[i]) <= 2 * float(error([i])[1])


@pytest.mark.parametrize("line_search", [False, True])
@pytest.mark.parametrize("history", [1, 10, 40])
def test_a_start_that_is_the_solution_is_kept_and_has_its_derivative(history, line_search):
    """However much room the history is to have, no step writes into it."""
    x = torch.zeros(3, 4, dtype=D, requires_grad=True)
    solver = im.Broyden(history=history, line_search=line_search)
    f, adjoint = lambda z, x: 0.5 * torch.sin(z) + x, im.ImplicitAdjoint(inverse="start")
    solution = im.fixed_point(f, torch.zeros(3, 4, dtype=D), x, solver=solver, adjoint=adjoint)
    assert solution.steps.tolist() == [0, 0, 0]
    (gradient,) = torch.autograd.grad(solution.value.sum(), x)
    torch.testing.assert_close(gradient, torch.full((3, 4), 2.0, dtype=D))
