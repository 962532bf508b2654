"""L-BFGS: its estimate of the inverse Hessian, its line search, its work, and what a user does with it."""

from __future__ import annotations

import pytest
import torch

import implicitly as im
from implicitly.argmin.lbfgs import _apply, _learn
from implicitly.descent import DECREASE, FLATTENING, Descent, value_and_descent, wolfe
from tests.argmin.problems import rosenbrock
from tests.problems import draw, matrix

D = torch.float64


def two_loops(pairs, g, r):
    """H r by Nocedal's recursion: the oldest pair first."""
    q, alphas = r, []
    for s, y in reversed(pairs):
        alpha = (s @ q) / (s @ y)
        q, alphas = q - alpha * y, [alpha, *alphas]
    z = g * q
    for (s, y), alpha in zip(pairs, alphas):
        z = z + (alpha - (y @ z) / (s @ y)) * s
    return z


@pytest.mark.parametrize("steps", [1, 3, 4, 5, 9])
def test_the_compact_form_is_the_two_loop_recursion_and_forgets_the_oldest(steps):
    n, slots = 6, 4
    z = torch.zeros(2, n, dtype=D)
    history = [torch.zeros(2, slots, n, dtype=D) for _ in range(2)]
    history += [torch.zeros(2, slots, slots, dtype=D), torch.zeros(2, slots, slots, dtype=D)]
    history += [torch.zeros(2, slots, dtype=D), torch.ones(2, 1, dtype=D)]
    hessian = matrix(n, 1.0, 1) @ matrix(n, 1.0, 1).mT + 0.1 * torch.eye(n, dtype=D)
    pairs = [(draw(2, n, seed=10 + k), draw(2, n, seed=10 + k) @ hessian) for k in range(steps)]
    for k, (s, y) in enumerate(pairs):
        history = _learn(tuple(history), k, s, y)
    S, Y, T, YY, diagonal, g = history
    r, count = draw(2, n, seed=2), min(steps, slots)
    actual = _apply(S[:, :count], Y[:, :count], T, YY, diagonal, g, r)
    for i in range(len(z)):
        kept = [(s[i], y[i]) for s, y in pairs[-slots:]]
        s, y = kept[-1]
        torch.testing.assert_close(actual[i], two_loops(kept, (s @ y) / (y @ y), r[i]), rtol=1e-9, atol=1e-10)


def test_pairs_without_curvature_are_skipped_one_sample_at_a_time():
    history = [torch.zeros(2, 3, 2, dtype=D) for _ in range(2)]
    history += [torch.zeros(2, 3, 3, dtype=D), torch.zeros(2, 3, 3, dtype=D)]
    history += [torch.zeros(2, 3, dtype=D), torch.full((2, 1), 7.0, dtype=D)]
    s = torch.ones(2, 2, dtype=D)
    y = torch.tensor([[-1.0, 0.0], [2.0, 0.0]], dtype=D)
    S, _, _, _, diagonal, g = _learn(tuple(history), 0, s, y)
    assert not S[0].any()
    assert diagonal[:, 0].tolist() == [0.0, 2.0]
    assert g[:, 0].tolist() == [7.0, 0.5]


@pytest.mark.parametrize("first", [1e-6, 1.0, 1e4])
def test_the_line_search_ends_where_wolfes_conditions_hold_for_each_sample(first):
    def objective(z):
        return (z**4 - 3 * z**2 + z).sum(1) + z.exp().sum(1)

    F = Descent(lambda z: value_and_descent(objective, z, ())[1], lambda z: value_and_descent(objective, z, ()))
    z = draw(16, 3, seed=5)
    with torch.no_grad():
        value, r = F.evaluate(z)
        new = wolfe(F, z, value, r, r, torch.full((16,), first, dtype=D))
    slope = -(r * r).sum(1)
    assert bool((new.length > 0).all())
    assert bool((new.value <= value + DECREASE * new.length[:, 0] * slope).all())
    assert bool((-(new.r * r).sum(1) >= FLATTENING * slope).all())
    torch.testing.assert_close(new.value, objective(new.z))


def test_rosenbrock_takes_as_many_evaluations_as_in_scipy():
    optimize = pytest.importorskip("scipy.optimize")
    a = torch.tensor([1.0], dtype=D)
    z0 = torch.tensor([[-1.2, 1.0]], dtype=D)
    solution = im.argmin(rosenbrock, z0, a)

    def both(x):
        value, r = value_and_descent(lambda z: rosenbrock(z, a), torch.tensor(x)[None], ())
        return float(value), -r[0].numpy(force=True)

    theirs = optimize.minimize(
        both, z0[0].numpy(force=True), jac=True, method="L-BFGS-B", options={"gtol": 1e-9, "ftol": 0}
    )
    assert solution.evaluations <= 1.3 * theirs.nfev + 5


def test_samples_of_scales_that_differ_a_millionfold_all_converge():
    scale = torch.tensor([1e-3, 1.0, 1e3], dtype=D)
    center = draw(3, 5, seed=6)

    def objective(z, scale, center):
        return scale * ((z - center) ** 2 * torch.arange(1, 6, dtype=D)).sum(1)

    solution = im.argmin(objective, torch.zeros(3, 5, dtype=D), scale, center)
    torch.testing.assert_close(solution.value, center, rtol=1e-8, atol=1e-8)


def test_a_start_at_the_answer_is_the_answer():
    def objective(z, x):
        return (z @ matrix(4, 2.0, 7) - x).square().sum(1) + z.exp().sum(1)

    x = draw(3, 4, seed=8).requires_grad_()
    cold = im.argmin(objective, torch.zeros(3, 4, dtype=D), x)
    warm = im.argmin(objective, cold.value.detach(), x)
    assert int(warm.steps.max()) == 0
    gradients = [torch.autograd.grad(s.value.sin().sum(), x)[0] for s in (cold, warm)]
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-9)


def test_two_calls_before_one_backward_add_up():
    x = draw(3, 2, seed=9).requires_grad_()

    def objective(z, x):
        return (z - x).square().sum(1) + z.cosh().sum(1)

    z0 = torch.zeros(3, 2, dtype=D)
    first, second = (im.argmin(objective, z0, k * x).value.sum() for k in (1.0, 2.0))
    (together,) = torch.autograd.grad(first + second, x)
    alone = [torch.autograd.grad(im.argmin(objective, z0, k * x).value.sum(), x)[0] for k in (1.0, 2.0)]
    torch.testing.assert_close(together, alone[0] + alone[1])


@pytest.mark.parametrize("history", [1.5, True, "a"])
def test_a_history_that_is_no_number_of_steps_is_refused(history):
    with pytest.raises(TypeError, match="LBFGS: history must be a whole number"):
        im.LBFGS(history=history)
