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


@pytest.mark.parametrize("dtype", [D, torch.float32])
@pytest.mark.parametrize("shape", ["planes", "sphere"])
@pytest.mark.parametrize(
    ("of_f", "of_h"), [(1e12, 1.0), (1e-4, 1.0), (1e-12, 1.0), (1.0, 1e6), (1.0, 1e-6), (1e6, 1e-6), (1e-6, 1e6)]
)
def test_derivatives_do_not_depend_on_the_units_of_objective_and_equations(of_f, of_h, shape, dtype):
    """In double precision only one of the two planes is in other units."""
    other = [of_h, 1.0 if dtype == D else of_h] if shape == "planes" else [of_h]
    start = 0.6 + draw(3, 5, seed=8).to(dtype) * 0.1
    results = []
    for f, units in ((1.0, [1.0] * len(other)), (of_f, other)):
        p, A_, b = (t.to(dtype).requires_grad_() for t in (P, A, B.abs() + 1))
        unit = torch.tensor(units, dtype=dtype)

        def constraint(z, p, A, b, unit=unit):
            planes = (A @ z.unsqueeze(2))[:, :, 0] - b
            return unit * (planes if shape == "planes" else z.square().sum(1, keepdim=True) - b[:, :1])

        def objective(*args, f=f):
            return f * energy(*args)

        solution = im.argmin(objective, start, p, A_, b, constraint=im.Equality(constraint))
        duals = solution.dual_equality * unit / f
        gradients = torch.autograd.grad(
            solution.value.sin().sum() + duals.sum(), (p, A_, b), materialize_grads=True
        )
        results.append((solution.value, duals, *gradients))
    tolerance = 1e-6 if dtype == D else 2e-3
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [D, torch.float32])
@pytest.mark.parametrize("unit", [1e-9, 1e-6, 1e6])
def test_a_straight_objective_on_a_small_sphere_has_its_minimum(unit, dtype):
    """No curvature tells how far a step along the sphere may lead: in another unit of z it led far off."""
    slopes = draw(4, 3, seed=5).to(dtype)
    length = torch.tensor(unit, dtype=dtype, requires_grad=True)
    sphere = im.Equality(lambda z, length: z.square().sum(1) - length**2)
    start = torch.full_like(slopes, 0.5 * unit)
    z = im.argmin(lambda z, length: (slopes * z).sum(1), start, length, constraint=sphere).value
    expected = -slopes / slopes.norm(dim=1, keepdim=True)
    torch.testing.assert_close(z / unit, expected, rtol=1e-4, atol=1e-4)
    (slope,) = torch.autograd.grad(z.sum(), length)
    torch.testing.assert_close(slope, expected.sum(), rtol=1e-3, atol=1e-3)


def curved_pair(z, unit):
    return unit * torch.stack([z.square().sum(1) - 8, z[:, 0] - 2 * z[:, 1] + z[:, 2] - 0.1], 1)


@pytest.mark.parametrize("dtype", [D, torch.float32])
@pytest.mark.parametrize("of_h", [(2.0**20, 1.0), (1.0, 2.0**-20), (2.0**-20, 2.0**20), (2.0**33, 2.0**-10)])
@pytest.mark.parametrize("of_f", [1.0, 2.0**-40, 2.0**40])
def test_equations_times_powers_of_two_have_the_same_answer(of_f, of_h, dtype):
    z0, p = 0.5 + 0.2 * draw(3, 5, seed=4).to(dtype), P.to(dtype)
    results = []
    for f, h in ((1.0, (1.0, 1.0)), (of_f, of_h)):
        unit = torch.tensor(h, dtype=dtype)
        objective = lambda z, p, f=f: f * (z.cosh() + p * z).sum(1)  # noqa: E731
        constraint = im.Equality(lambda z, p, unit=unit: curved_pair(z, unit))
        solution = im.argmin(objective, z0, p, constraint=constraint)
        results.append((solution.value, solution.dual_equality * unit / f))
        far = curved_pair(solution.value, torch.ones_like(unit)).abs().max()
        assert far < (1e-8 if dtype == D else 1e-3)
    torch.testing.assert_close(*results)


def test_an_absolute_tolerance_holds_in_the_units_of_the_equations():
    """Beside an objective of 1e-12 equations count for as little, in units that balance them."""
    sphere = im.Equality(lambda z: z.square().sum(1) - 1)
    objective = lambda z: 1e-12 * (z.square().sum(1) + z[:, 0])  # noqa: E731
    z0 = torch.full((1, 3), 0.1, dtype=D)
    solver = im.NewtonKKT(rtol=0, atol=1e-8)
    solution = im.argmin(objective, z0, constraint=sphere, solver=solver)
    assert (solution.value.norm(dim=1) - 1).abs() < 1e-8
    assert solution.residual < 1e-8


@pytest.mark.parametrize("dtype", [D, torch.float32])
def test_equations_that_are_nearly_flat_at_the_start_do_not_slow_the_search(dtype):
    """The multipliers there, a hundred times their values at the answer, ask for as much weight of |h|."""
    both = im.Equality(lambda z, t: torch.stack([z[:, :2].square().sum(1) - 1, z.sum(1) - 1.5], 1))
    target = torch.tensor([[1.0, 2.0, 2.0]], dtype=dtype)
    objective = lambda z, t: (z - t).square().sum(1)  # noqa: E731
    z0 = torch.tensor([[1.5e-3, 1e-3, 1e-3]], dtype=dtype)
    solution = im.argmin(objective, z0, target, constraint=both)
    exact = torch.tensor([[-0.2566643489, 0.9665006011, 0.7901637478]], dtype=dtype)
    assert int(solution.steps) < 50
    torch.testing.assert_close(solution.value, exact, rtol=0, atol=1e-8 if dtype == D else 1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_curved_equations_are_met_from_near_and_far(seed):
    start, p, a = draw(8, 5, seed=seed), draw(8, 5, seed=10 + seed), draw(8, 5, seed=20 + seed)
    both = im.Equality(lambda z, p, a: torch.stack([z.square().sum(1) - 4, (a * z).sum(1) - 0.1], 1))
    objectives = [
        lambda z, p, a: (z.cosh() + p * z).sum(1),
        lambda z, p, a: (100 * (z[:, 1:] - z[:, :-1] ** 2) ** 2 + (1 - z[:, :-1]) ** 2).sum(1),
    ]
    for scale in (1e-3, 0.1, 1.0, 5.0):
        for objective in objectives:
            im.argmin(objective, scale * start, p, a, constraint=both)  # raises where it fails


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


CENTRES = [im.NewtonKKT(), im.Newton()]


@pytest.mark.parametrize("solver", CENTRES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("weight", [[1.0, 1.0, 1.0], [1.0, 10.0, 100.0]])
def test_an_analytic_centre_is_found_within_the_domain_of_the_logarithm(solver, weight):
    """Its gradient 1 / z is finite beyond the domain too, where the objective is NaN."""
    weight = torch.tensor(weight, dtype=D)
    z0 = torch.tensor([[1.0, 2.0, 30.0], [0.01, 5.0, 1.0], [0.5, 0.5, 0.5], [1.0, 10.0, 100.0]], dtype=D)
    constraint = im.Equality(lambda z: z.sum(1, keepdim=True) - 1)
    solution = im.argmin(lambda z: -(weight * z.log()).sum(1), z0, constraint=constraint, solver=solver)
    torch.testing.assert_close(solution.value, (weight / weight.sum()).expand(4, 3), rtol=1e-7, atol=1e-8)


def test_no_solver_of_roots_stops_where_the_objective_is_not_defined():
    """The gradient of z^2 / 2 + 3 z - log z vanishes at -3.3 too, where Newton's step leads from 10."""
    objective = lambda z: (z**2 / 2 + 3 * z - z.log()).sum(1)  # noqa: E731
    value = im.argmin(objective, torch.full((2, 1), 10.0, dtype=D), solver=im.NewtonKrylov()).value
    torch.testing.assert_close(value, torch.full((2, 1), (13**0.5 - 3) / 2, dtype=D), rtol=1e-8, atol=1e-9)


def circle_apart(z):
    return torch.stack([z.square().sum(1) - 1, (z - 3).square().sum(1) - 1], 1)


def check_least_in_some_units(h, z):
    """Less of one violation is more of the other, to first order; where between depends on the units."""
    slopes = torch.func.vmap(torch.func.jacrev(lambda z: h(z[None])[0]))(z)
    falls = slopes * h(z).unsqueeze(2)
    torch.testing.assert_close(torch.cosine_similarity(falls[:, 0], falls[:, 1]), -torch.ones(len(z), dtype=D))


CONTRADICTIONS = {
    # equations, the starts, the point that violates them least, None where that depends on their units
    "no real root": (lambda z: z**2 + 1, [[2.0], [-0.3]], [0.0]),
    "circles apart": (circle_apart, [[2.0, 1.0, 0.3], [0.1, 0.2, 0.3], [3.0, -3.0, 5.0]], None),
    "parabolas apart": (
        lambda z: (z[:, :1] + z[:, 1:] ** 2) + torch.tensor([-1.0, 1.0], dtype=D),
        [[2.0, 1.0], [0.1, 0.2]],
        None,
    ),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_nonlinear_equations_that_contradict_each_other_end_where_they_are_violated_least(name):
    h, starts, least = CONTRADICTIONS[name]
    objective = lambda z: (z - 1).square().sum(1)  # noqa: E731
    z0 = torch.tensor(starts, dtype=D)
    solution = im.argmin(objective, z0, constraint=im.Equality(h), on_failure="ignore")
    assert solution.status.tolist() == [im.Status.INFEASIBLE] * len(starts)
    violation = h(solution.value).norm(dim=1)
    torch.testing.assert_close(solution.residual, violation)
    if least is None:
        check_least_in_some_units(h, solution.value)
    else:
        torch.testing.assert_close(solution.value, torch.tensor([least] * len(starts), dtype=D), rtol=0, atol=1e-4)


def test_feasible_equations_of_steep_and_flat_places_are_no_contradiction():
    """Their gradients are 1e8 times as large at the start as at the answer, or are small throughout."""
    objective = lambda z: (z - 1).square().sum(1)  # noqa: E731
    z0 = torch.tensor([[9.0, 1.0]], dtype=D)
    for h in (lambda z: z[:, 0].exp() - 1, lambda z: z[:, 0] ** 8 - 1e-3, lambda z: z[:, 0] / 1e6 - 1):
        solution = im.argmin(objective, z0, constraint=im.Equality(h))
        assert h(solution.value).abs().max() < 1e-3


def test_a_start_where_the_equations_have_no_slope_is_told_to_be_moved():
    sphere = im.Equality(lambda z: z.square().sum(1) - 1)
    with pytest.raises(im.SolverError, match=r"SINGULAR.*start elsewhere \(z0\)"):
        im.argmin(lambda z: z.sum(1), torch.zeros(1, 3, dtype=D), constraint=sphere)
    value = im.argmin(lambda z: z.sum(1), torch.full((1, 3), 0.1, dtype=D), constraint=sphere).value
    torch.testing.assert_close(value, torch.full((1, 3), -(3**-0.5), dtype=D), rtol=1e-8, atol=1e-9)


def test_no_equations_at_all_are_no_constraint():
    p = P.clone().requires_grad_()
    options = {"constraint": im.Equality(lambda z, p: z[:, :0])}
    solution = im.argmin(lambda z, p: z.cosh().sum(1) + (p * z).sum(1), Z0, p, **options)
    free = im.argmin(lambda z, p: z.cosh().sum(1) + (p * z).sum(1), Z0, p)
    torch.testing.assert_close(solution.value, free.value, rtol=1e-8, atol=1e-9)
    assert solution.dual_equality.shape == (3, 0)
    gradients = [torch.autograd.grad(s.value.sin().sum(), p)[0] for s in (solution, free)]
    torch.testing.assert_close(*gradients, rtol=1e-7, atol=1e-8)


def test_equations_that_say_the_same_leave_the_derivative_of_the_minimum():
    b = torch.ones(1, 1, dtype=D, requires_grad=True)
    constraint = im.Equality(lambda z, b: (z.sum(1, keepdim=True) - b).expand(-1, 2))
    z0 = torch.zeros(1, 2, dtype=D)
    solution = im.argmin(lambda z, b: z.square().sum(1) / 2, z0, b, constraint=constraint, on_failure="warn")
    gradients = [torch.autograd.grad(x, b, retain_graph=True)[0] for x in (solution.value[0, 0],)]
    gradients += [torch.autograd.grad(solution.dual_equality.sum(), b, retain_graph=True)[0]]
    torch.testing.assert_close(torch.cat(gradients, 1), torch.tensor([[0.5, -0.5]], dtype=D))
    with pytest.warns(im.ConvergenceWarning, match="SINGULAR"):  # one alone has no derivative
        (gradient,) = torch.autograd.grad(solution.dual_equality[0, 0], b)
    assert gradient == 0
