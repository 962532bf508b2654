"""Minima under equations: Newton on the KKT system, its multipliers, and systems with no or too many answers."""

from __future__ import annotations

import pytest
import torch

import implicitly as im
from tests.argmin.problems import NAMED, circle, plane, plane_exact, slope
from tests.problems import draw

D = torch.float64
A, B = draw(3, 2, 5, seed=1), draw(3, 2, seed=2)
P = draw(3, 5, seed=3)
Z0 = torch.zeros(3, 5, dtype=D)


def energy(z, p, A, b):
    return 0.5 * z.square().sum(1) + (p * z).sum(1)


LINEAR = im.Equality(lambda z, p, A, b: (A @ z.unsqueeze(2))[:, :, 0] - b)


def kkt(p, A, b):
    """Minimum and multipliers by a dense inverse."""
    n, m = p.shape[1], b.shape[1]
    eye, zero = torch.eye(n, dtype=D).expand(len(p), n, n), torch.zeros(len(p), m, m, dtype=D)
    matrix = torch.cat([torch.cat([eye, A.mT], 2), torch.cat([A, zero], 2)], 1)
    w = (torch.linalg.inv(matrix) @ torch.cat([-p, b], 1).unsqueeze(2))[:, :, 0]
    return w[:, :n], w[:, n:]


def test_a_quadratic_under_linear_equations_takes_one_step_and_has_its_multipliers():
    solution = im.argmin(energy, Z0, P, A, B, constraint=LINEAR)
    assert int(solution.steps.max()) == 1
    assert isinstance(solution, im.ConstrainedSolution)
    torch.testing.assert_close((solution.value, solution.dual_equality), kkt(P, A, B), rtol=1e-9, atol=1e-10)


def test_gradients_flow_from_the_multipliers_too():
    ours, theirs = [t.clone().requires_grad_() for t in (P, A, B)], [t.clone().requires_grad_() for t in (P, A, B)]
    solution = im.argmin(energy, Z0, *ours, constraint=LINEAR)
    z, y = kkt(*theirs)
    actual = torch.autograd.grad((solution.value.sin().sum() + solution.dual_equality.square().sum()), ours)
    expected = torch.autograd.grad(z.sin().sum() + y.square().sum(), theirs)
    torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("start", [[0.3, 0.2], [2.0, -1.0], [0.1, 5.0], [-3.0, -4.0]])
def test_a_linear_objective_on_a_circle_is_minimised_from_anywhere(start):
    """Without curvature of the objective, only the multiplier holds it; the maximum is as stationary."""
    problem = NAMED["circle"]
    z0 = torch.tensor([start] * 3, dtype=D)
    value = im.argmin(slope, z0, *problem.args, constraint=im.Equality(circle)).value
    torch.testing.assert_close(value, problem.exact(*problem.args), rtol=1e-7, atol=1e-8)


def test_the_maximum_is_found_out():
    """-|z|^2 on a plane, from the point of the plane that is nearest to 0."""
    b = torch.tensor([[1.0], [2.0]], dtype=D)
    nothing = torch.zeros(2, 3, dtype=D)
    solution = im.argmin(
        lambda z, p, b: -z.square().sum(1),
        plane_exact(nothing, b),
        nothing,
        b,
        constraint=im.Equality(plane),
        on_failure="ignore",
    )
    assert solution.status.tolist() == [im.Status.NOT_MINIMUM] * 2


def test_equations_that_say_the_same_twice_are_no_trouble_and_contradictions_are_infeasible():
    twice = torch.cat([A, A[:, :1]], 1)
    right = torch.cat([B, B[:, :1]], 1)
    wrong = right.clone()
    wrong[1, 2] += 1.0
    options = {"constraint": LINEAR, "on_failure": "ignore"}
    same = im.argmin(energy, Z0, P, twice, right, **options)
    torch.testing.assert_close(same.value, kkt(P, A, B)[0], rtol=1e-8, atol=1e-9)
    solution = im.argmin(energy, Z0, P, twice, wrong, **options)
    assert solution.status.tolist() == [0, im.Status.INFEASIBLE, 0]


def test_an_objective_without_a_bottom_on_the_plane_is_unbounded():
    solution = im.argmin(lambda z, *args: -energy(z, *args), Z0, P, A, B, constraint=LINEAR, on_failure="ignore")
    assert solution.status.tolist() == [im.Status.UNBOUNDED] * 3


def test_equations_may_be_pytrees_and_one_system():
    target = draw(4, seed=4)
    constraint = im.Equality(lambda z, t: {"sum": z.sum(), "first": z[:1] - 0.5})
    value = im.argmin(
        lambda z, t: (z - t).square().sum(), torch.zeros(4, dtype=D), target, constraint=constraint, batch_dims=0
    ).value
    assert abs(float(value.sum())) < 1e-9
    assert abs(float(value[0]) - 0.5) < 1e-9


def test_recording_it_is_refused():
    with pytest.raises(ValueError, match="NewtonKKT decomposes matrices"):
        im.argmin(energy, Z0, P, A, B, constraint=LINEAR, adjoint=im.UnrolledAdjoint())
