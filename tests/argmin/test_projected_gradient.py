"""Minima over sets: feasible answers, second-order checks on their surface, and derivatives in either form."""

from __future__ import annotations

import pytest
import torch

import implicitly as im
from tests.argmin.problems import NAMED, bowl, mixture, nearest, on_ball, on_simplex, quadratic
from tests.problems import draw, matrix

D = torch.float64


def on_sphere(z, c, radius):
    return radius * z / z.norm(dim=1, keepdim=True)


def test_answers_are_feasible_whatever_the_start():
    problem = NAMED["simplex"]
    value = im.argmin(mixture, draw(3, 3, seed=1, scale=10.0), *problem.args, constraint=on_simplex).value
    torch.testing.assert_close(value.sum(1), torch.ones(3, dtype=D))
    assert bool((value >= 0).all())
    torch.testing.assert_close(value, problem.exact(*problem.args), rtol=1e-8, atol=1e-8)


def test_without_active_constraints_the_fixed_point_and_the_gradient_give_the_same_derivative():
    M, p = matrix(3, 2.0, 51), draw(3, 3, seed=52)
    z0 = torch.zeros(3, 3, dtype=D)
    free = lambda p: im.argmin(quadratic, z0, M, p).value  # noqa: E731
    fixed = lambda p: im.argmin(quadratic, z0, M, p, constraint=lambda z, M, p: z).value  # noqa: E731
    jacobians = [torch.func.jacrev(f)(p) for f in (free, fixed)]
    torch.testing.assert_close(*jacobians, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("step", [0.1, 1.0, 10.0])
def test_a_projection_and_equations_of_the_same_set_give_the_same_derivative(step):
    """On the circle, radius and direction enter through constraint and objective."""
    problem = NAMED["circle"]

    def solved(constraint):
        return lambda c, radius: im.argmin(problem.f, problem.z0, c, radius, constraint=constraint).value

    projection = im.Projection(lambda z, c, radius: on_sphere(z, c, radius[:, None]), step=step)
    forms = (projection, problem.constraint)
    values = [solved(f)(*problem.args) for f in forms]
    torch.testing.assert_close(*values, rtol=1e-7, atol=1e-8)
    jacobians = [torch.func.jacrev(solved(f), argnums=(0, 1))(*problem.args) for f in forms]
    torch.testing.assert_close(*jacobians, rtol=1e-6, atol=1e-7)


def test_the_curvature_of_the_set_counts_in_the_second_order():
    """On the sphere a linear objective has a minimum and a maximum, though it has no curvature of its own."""
    c = torch.tensor([[1.0, 0.0], [1.0, 0.0]], dtype=D)
    radius = torch.tensor(1.0, dtype=D)
    z0 = torch.tensor([[-1.0, 0.0], [1.0, 0.0]], dtype=D)
    slope = lambda z, c, radius: (c * z).sum(1)  # noqa: E731
    options = {"constraint": im.Projection(on_sphere, step=0.1), "on_failure": "ignore"}
    solution = im.argmin(slope, z0, c, radius, **options)
    assert solution.status.tolist() == [0, im.Status.NOT_MINIMUM]


def test_a_saddle_inside_a_box_is_found_out_and_a_minimum_on_its_face_is_not():
    saddle = lambda z: z[:, 0] ** 2 - z[:, 1] ** 2  # noqa: E731
    z0 = torch.tensor([[0.5, 0.0], [0.5, 0.1]], dtype=D)
    box = lambda z: z.clamp(-1, 1)  # noqa: E731
    solution = im.argmin(saddle, z0, constraint=box, on_failure="ignore")
    assert solution.status.tolist() == [im.Status.NOT_MINIMUM, 0]
    torch.testing.assert_close(solution.value[1], torch.tensor([0.0, 1.0], dtype=D), rtol=0, atol=1e-8)


def test_args_of_the_constraint_alone_get_their_gradient():
    x, radius = draw(3, 2, seed=91) * 3, torch.tensor(0.8, dtype=D, requires_grad=True)
    value = im.argmin(nearest, torch.zeros(3, 2, dtype=D), x, radius, constraint=on_ball).value
    (gradient,) = torch.autograd.grad(value.sum(), radius)
    torch.testing.assert_close(gradient, (x / x.norm(dim=1, keepdim=True)).sum())


@pytest.mark.parametrize("solver", [im.FixedPointIteration(max_steps=500), im.Anderson()])
def test_solvers_of_fixed_points_solve_it_too(solver):
    problem = NAMED["box"]
    constraint = im.Projection(problem.constraint, step=0.3)
    value = im.argmin(bowl, problem.z0, *problem.args, constraint=constraint, solver=solver).value
    torch.testing.assert_close(value, problem.exact(*problem.args), rtol=1e-7, atol=1e-8)


def test_modules_in_constraints_get_their_gradients():
    class Radius(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.radius = torch.nn.Parameter(torch.tensor(0.5, dtype=D))

        def forward(self, z, x):
            return on_ball(z, x, self.radius)

    constraint, x = Radius(), draw(2, 3, seed=2) * 5
    im.argmin(nearest, torch.zeros(2, 3, dtype=D), x, constraint=constraint).value.sum().backward()
    torch.testing.assert_close(constraint.radius.grad, (x / x.norm(dim=1, keepdim=True)).sum())


@pytest.mark.host  # elsewhere it is not asked whether all went well until then, and f is called once more
def test_the_last_of_a_number_of_steps_is_called_once_also_where_it_is_recorded():
    problem, calls = NAMED["box"], []

    def counted(z, *args):
        calls.append(len(z))
        return bowl(z, *args)

    solver, adjoint = im.FixedPointIteration(rtol=0, max_steps=4), im.JacobianFreeAdjoint()
    inputs = [arg.clone().requires_grad_() for arg in problem.args]
    constraint = im.Projection(problem.constraint, step=0.3)
    solution = im.argmin(counted, problem.z0, *inputs, constraint=constraint, solver=solver, adjoint=adjoint)
    assert len(calls) == solution.evaluations == 5
    with torch.enable_grad():
        z = solution.value.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(bowl(z, *inputs).sum(), z, create_graph=True)
        step = problem.constraint(z - 0.3 * gradient, *inputs)
    actual, expected = (
        torch.autograd.grad(x.sum(), inputs, allow_unused=True, materialize_grads=True)
        for x in (solution.value, step)
    )
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)


# ------------------------------------------------------------------------------- no swing ends a solve

SPECTRUM = torch.logspace(0, 4, 20, dtype=D)


def stretched(z, c):
    return (SPECTRUM * (z - c) ** 2).sum(1) / 2


@pytest.mark.parametrize("seed", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in (1, 2))])
def test_ill_conditioned_quadratics_in_a_box_converge(seed):
    """2 of the first 8 had stagnated: momentum had passed by the minimum, and took long to come back."""
    c = torch.randn(8, 20, generator=torch.Generator().manual_seed(seed), dtype=D)
    z0 = torch.zeros(8, 20, dtype=D)
    value = im.argmin(stretched, z0, c, constraint=lambda z, c: im.project.box(z, -0.5, 0.5)).value
    torch.testing.assert_close(value, c.clamp(-0.5, 0.5), rtol=1e-7, atol=1e-7)


def test_rosenbrocks_valley_in_a_box_is_followed_from_everywhere():
    z0 = 4 * torch.rand(64, 2, generator=torch.Generator().manual_seed(0), dtype=D) - 2
    objective = lambda z: 100 * (z[:, 1] - z[:, 0] ** 2) ** 2 + (1 - z[:, 0]) ** 2  # noqa: E731
    value = im.argmin(objective, z0, constraint=lambda z: im.project.box(z, -2.0, 2.0)).value
    torch.testing.assert_close(value, torch.ones(64, 2, dtype=D), rtol=0, atol=1e-5)


def test_a_tolerance_that_rounding_does_not_allow_ends_the_solve():
    M = matrix(20, 1.0, 5)
    mixed = lambda z: ((z @ M).float().double() - 1 / 3).square().sum(1)  # noqa: E731
    options = {"solver": im.ProjectedGradient(rtol=1e-15, atol=0.0, max_steps=20000), "on_failure": "ignore"}
    solution = im.argmin(mixed, torch.zeros(2, 20, dtype=D), constraint=lambda z: z.clamp(-9, 9), **options)
    assert solution.status.tolist() == [im.Status.STAGNATED] * 2
    assert solution.residual.max() < 1e-5


@pytest.mark.parametrize("scale", [1e-8, 1e-12])
def test_minima_at_a_tiny_distance_are_found(scale):
    """The first move has the length one, which 25 halvings do not make that short."""
    objective = lambda z: (z / scale - 1).square().sum(1)  # noqa: E731
    z0 = torch.zeros(1, 3, dtype=D)
    value = im.argmin(objective, z0, constraint=lambda z: im.project.box(z, 0.0, 0.5 * scale)).value
    torch.testing.assert_close(value / scale, torch.full((1, 3), 0.5, dtype=D), rtol=1e-6, atol=0)


def test_a_bounded_objective_over_a_compact_set_has_a_bottom_after_a_flat_start():
    objective = lambda z: -(-((z - 1) ** 2)).exp().sum(1)  # noqa: E731
    z0 = torch.full((2, 1), 6.0, dtype=D)
    value = im.argmin(objective, z0, constraint=lambda z: im.project.box(z, 0.0, 10.0)).value
    torch.testing.assert_close(value, torch.ones(2, 1, dtype=D), rtol=0, atol=1e-6)


def test_a_half_space_may_leave_an_objective_without_a_bottom():
    options = {"constraint": lambda z: z.clamp(max=3.0), "on_failure": "ignore"}
    solution = im.argmin(lambda z: z.sum(1), torch.zeros(1, 2, dtype=D), **options)
    assert solution.status.tolist() == [im.Status.UNBOUNDED]


@pytest.mark.parametrize("unit", [1e-9, 1e-14])
@pytest.mark.parametrize("P", [lambda z: z.clamp(-1, 1), im.project.simplex, lambda z: im.project.l2_ball(z, 1.0)])
def test_a_gradient_that_is_lost_beside_the_iterate_is_not_taken_for_none(P, unit):
    """Nor are rounding errors of the projection taken for a curvature."""
    z0, x = torch.full((4, 3), 0.3), draw(4, 3, seed=8).float()
    objective = lambda z: unit * ((z - x) * torch.tensor([1.0, 2.0, 3.0]) * (z - x)).sum(1)  # noqa: E731
    solution = im.argmin(objective, z0, constraint=P, on_failure="ignore")
    assert solution.status.tolist() == [im.Status.STAGNATED] * 4
    with pytest.raises(im.SolverError, match="a larger step"):
        im.argmin(objective, z0, constraint=P)
    value = im.argmin(objective, z0, constraint=im.Projection(P, 0.3 / unit)).value
    exact = im.argmin(lambda z: objective(z) / unit, z0, constraint=P).value
    torch.testing.assert_close(value, exact, rtol=0, atol=1e-3)


@pytest.mark.parametrize("dtype", [D, torch.float32])
@pytest.mark.parametrize("unit", [1e-9, 1e-6, 1.0, 1e6])
@pytest.mark.parametrize(
    "constraint",
    [
        lambda z, A, b: im.project.l2_ball(z, 1.0),
        lambda z, A, b: z.clamp(min=0),
        im.Projection(lambda z, A, b: z, step=0.01),
        im.Equality(lambda z, A, b: z.sum(1)),
    ],
    ids=["ball", "orthant", "everything", "plane"],
)
def test_a_start_at_a_minimum_at_zero_is_left_alone(constraint, unit, dtype):
    """There only rounding of the objective's terms is left of the gradient, and z tells nothing of its size."""
    A, b = draw(6, 20, 5, seed=1), draw(6, 20, seed=2)
    Q = torch.linalg.qr(A).Q
    b = b - (Q @ (Q.mT @ b.unsqueeze(2)))[:, :, 0]
    A, b = A.to(dtype), b.to(dtype)
    misfit = lambda z, A, b: unit * ((A @ z.unsqueeze(2))[:, :, 0] - b).square().sum(1)  # noqa: E731
    solution = im.argmin(misfit, torch.zeros(6, 5, dtype=dtype), A, b, constraint=constraint)
    assert int(solution.steps.max()) <= 3
    assert solution.value.abs().max() < 10 * torch.finfo(dtype).eps


def test_in_single_precision_a_small_objective_is_not_minimal_where_a_step_is_lost_beside_z():
    x = torch.tensor([[1.0, 2.0], [3.0, -1.0]])
    options = {"constraint": lambda z, x: z.clamp(max=0.5), "on_failure": "ignore"}
    solution = im.argmin(lambda z, x: 1e-7 * (z - x).square().sum(1), torch.zeros(2, 2), x, **options)
    error = (solution.value - x.clamp(max=0.5)).abs().amax(1)
    assert bool((~solution.converged | (error < 1e-2)).all())
