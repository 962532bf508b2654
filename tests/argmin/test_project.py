"""Projections: what each must keep (the table), known answers, kinks, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import func
from torch.autograd import gradcheck, gradgradcheck

import implicitly as im
from tests.argmin import projections as rows
from tests.argmin.projections import DERIVED, PROJECTIONS, PROXIMAL, SINKHORN, Row
from tests.problems import seeded

project = im.project
EVERY = (*PROJECTIONS, *PROXIMAL, *DERIVED)
D = torch.float64


@pytest.mark.parametrize("row", PROJECTIONS, ids=repr)
@given(seed=st.integers(0, 10**6), scale=st.sampled_from([1e-3, 0.3, 1.0, 10.0, 1e4]))
@settings(max_examples=12, deadline=None, derandomize=True)
def test_it_is_the_nearest_point_of_the_set(row: Row, seed: int, scale: float):
    rows.check_projection(row, seed, scale)


@pytest.mark.parametrize("row", PROJECTIONS, ids=repr)
def test_it_is_the_nearest_point_in_single_precision(row: Row):
    for seed in range(3):
        rows.check_projection(row, seed, 3.0, torch.float32)


@pytest.mark.parametrize("row", EVERY, ids=repr)
def test_derivatives_agree_with_differences(row: Row):
    rows.check_by_differences(row, 0)


@pytest.mark.parametrize("row", EVERY, ids=repr)
def test_third_derivatives_agree_with_differences(row: Row):
    rows.check_third_order(row, 3)


@pytest.mark.parametrize("row", EVERY, ids=repr)
def test_transforms(row: Row):
    rows.check_transforms(row, 5)


@pytest.mark.parametrize("row", EVERY, ids=repr)
def test_leading_dimensions(row: Row):
    rows.check_shapes(row)


@pytest.mark.parametrize("row", EVERY, ids=repr)
def test_dtype(row: Row):
    rows.check_dtype(row)


@pytest.mark.parametrize("row", EVERY, ids=repr)
def test_shared_parameters_sum_their_gradients(row: Row):
    rows.check_shared_parameters(row)


@pytest.mark.parametrize("row", [row for row in EVERY if row is not SINKHORN], ids=repr)
def test_a_bad_row_harms_no_other(row: Row):
    rows.check_bad_rows(row)


@pytest.mark.parametrize("row", EVERY, ids=repr)
def test_integers_are_refused(row: Row):
    z, parameters = row.draw((2,))
    with pytest.raises(TypeError, match="floating"):
        row.f(z.long(), *parameters)
    with pytest.raises(TypeError, match="floating"):
        row.f(z.tolist(), *parameters)


# ------------------------------------------------------------------------------------------ what is known


def test_cones_and_their_duals_take_the_point_apart():
    """Moreau: z = P(z) - P*(-z), and the two parts are orthogonal."""
    z = torch.randn(200, 3, dtype=D, generator=seeded(0)) * torch.tensor([1e-3, 1, 50])
    for cone, dual in (
        (project.exponential_cone, project.dual_exponential_cone),
        (project.second_order_cone, project.second_order_cone),
    ):
        part, rest = cone(z), dual(-z)
        torch.testing.assert_close(part - rest, z)
        assert float(((part * rest).sum(-1).abs() / z.square().sum(-1)).max()) < 1e-14
    Z = torch.randn(5, 4, 4, dtype=D, generator=seeded(1))
    part, rest = project.psd_cone(Z), project.psd_cone(-Z)
    torch.testing.assert_close(part - rest, (Z + Z.mT) / 2)
    assert float((part @ rest).abs().max()) < 1e-12


@pytest.mark.parametrize("r", [1e-10, 1e-13, 1e-17, 1e-25, 1e-300])
def test_a_rounding_error_moves_no_projection_onto_the_exponential_cone(r: float):
    z = torch.tensor([[0.0, 1.0, 0.1], [0.0, 2.0, -1.0], [0.0, 0.5, -3.0]], dtype=D)
    moved = project.exponential_cone(z + torch.tensor([r, 0.0, 0.0], dtype=D))
    torch.testing.assert_close(moved, project.exponential_cone(z), rtol=0, atol=2 * r + 1e-14)


@pytest.mark.parametrize(
    ("z", "expected"),
    [
        ([1.0, 0.0, 0.0], None),
        ([-1.0, 0.0, 0.0], [-1.0, 0.0, 0.0]),
        ([-2.0, -3.0, 4.0], [-2.0, 0.0, 4.0]),
        ([-2.0, -3.0, -4.0], [-2.0, 0.0, 0.0]),
        ([0.0, 0.0, -1.0], [0.0, 0.0, 0.0]),
        ([0.0, 1.0, math.e], [0.0, 1.0, math.e]),
        ([1.0, 1.0, 3.0], [1.0, 1.0, 3.0]),
        ([1.0, -100.0, 1.0], [0.0, 0.0, 1.0]),  # at a slope of 101, whose exponential is beyond float32
        ([1e-200, 1e-200, 0.0], None),
        ([1e150, 1e150, 0.0], None),
        ([1.0, 1.0, -1.0], [0.0, 0.0, 0.0]),  # on the edge of the polar
    ],
)
def test_the_exponential_cone_in_its_corners(z: list[float], expected: list[float] | None):
    point = torch.tensor(z, dtype=D)
    x = project.exponential_cone(point)
    if expected is None:  # on the curve
        size = max(map(abs, z))
        first, second, third = x.tolist()
        assert math.isclose(second * math.exp(first / second), third, rel_tol=1e-12)
        assert abs(float((x / size * ((x - point) / size)).sum())) < 1e-14
    else:
        torch.testing.assert_close(x, torch.tensor(expected, dtype=D))
    assert bool(func.jacrev(project.exponential_cone)(point).isfinite().all())
    if max(map(abs, z)) < 1e30:
        torch.testing.assert_close(project.exponential_cone(point.float()).double(), x, rtol=1e-5, atol=1e-6)


def test_repeated_eigenvalues_have_derivatives_of_every_order():
    rotation = torch.linalg.qr(torch.randn(4, 4, dtype=D, generator=seeded(2))).Q
    for values in ([1, 1, 1, 1], [1, 1, -1, -1], [2, 2, 2, -1], [-1, -1, -1, -1]):
        Z = ((rotation * torch.tensor(values, dtype=D)) @ rotation.T).requires_grad_()
        assert gradcheck(project.psd_cone, Z, check_forward_ad=True)
        assert gradgradcheck(project.psd_cone, Z)
        third = func.jacfwd(func.jacrev(func.jacfwd(lambda Z: project.psd_cone(Z).sin().sum())))(Z.detach())
        assert bool(third.isfinite().all())


@pytest.mark.parametrize(
    ("f", "z"),
    [
        (project.second_order_cone, torch.zeros(4)),
        (project.second_order_cone, torch.tensor([1.0, 1.0, 0.0])),
        (project.second_order_cone, torch.tensor([-1.0, 1.0, 0.0])),
        (project.second_order_cone, torch.tensor([-1.0, 0.0, 0.0])),
        (project.l2_ball, torch.zeros(3)),
        (project.l1_ball, torch.zeros(3)),
        (lambda z: project.l2_ball(z, 0.0), torch.ones(3)),
        (lambda z: project.simplex(z, 0.0), torch.ones(3)),
        (lambda z: project.l1_ball(z, 0.0), torch.ones(3)),
        (project.simplex, torch.ones(3)),
        (project.psd_cone, torch.zeros(3, 3)),
        (project.psd_cone, torch.diag(torch.tensor([1.0, 0.0, 0.0]))),
        (project.exponential_cone, torch.zeros(3)),
        (project.isotonic, torch.ones(5)),
        (im.prox.l2, torch.zeros(3)),
        (im.prox.l2, torch.tensor([1.0, 0.0])),
        (im.prox.linf, torch.zeros(3)),
        (im.prox.nuclear, torch.zeros(2, 3)),
        (im.prox.nuclear, torch.eye(2)),
        (im.prox.total_variation, torch.ones(6)),
        (lambda z: im.prox.total_variation(z, 0.0), torch.arange(6.0)),
        (im.soft_sort, torch.ones(4)),
        (im.soft_rank, torch.zeros(4)),
    ],
)
def test_where_there_is_no_derivative_one_is_taken_that_is_nonexpansive(f, z: torch.Tensor):
    """An element of Clarke's Jacobian of a projection is symmetric with eigenvalues between 0 and 1."""
    z = z.double()
    J = func.jacrev(f)(z).reshape(z.numel(), -1)
    torch.testing.assert_close(J, func.jacfwd(f)(z).reshape(z.numel(), -1))
    torch.testing.assert_close(J, J.T)
    values = torch.linalg.eigvalsh(J)
    assert bool(((values > -1e-9) & (values < 1 + 1e-9)).all()) or f is im.soft_sort
    assert bool(func.hessian(lambda z: f(z).square().sum())(z).isfinite().all())


@pytest.mark.parametrize(
    ("f", "z"),
    [
        (lambda z: project.box(z, 0.0, z.new_tensor([0.0, 2.0, 0.5])), [0.0, 3.0, 0.7]),
        (lambda z: project.l1_ball(z, 0.0), [0.0, 0.0, 0.0]),
        (lambda z: project.l2_ball(z, 0.0), [0.0, 0.0, 0.0]),
        (lambda z: project.linf_ball(z, 0.0), [0.0, 1.0, -0.0]),
        (lambda z: project.simplex(z, 0.0), [0.0, 0.0, 1.0]),
        (lambda z: project.permutahedron(z, z.new_tensor([1.0, 0.0, 1.0, 0.0, 0.0])), [0.0, 5.0, 0.0, 5.0, 0.0]),
        (lambda z: project.permutahedron(z, z.new_tensor([2.0, 2.0, 2.0])), [1.0, 0.0, 1.0]),
    ],
)
def test_a_set_that_is_one_point_near_the_answer_has_no_slope(f, z: list[float]):
    """The projection is constant around z, which is in the set, or has equal entries."""
    z = torch.tensor(z, dtype=D)
    for step in rows.normal(seeded(1), 4, len(z)):
        moved = z + 1e-3 * step
        torch.testing.assert_close(f(moved), f(z), rtol=0, atol=0)
    for jacobian in (func.jacrev(f)(z), func.jacfwd(f)(z)):
        assert bool((jacobian == 0).all())


@pytest.mark.parametrize("f", [project.simplex, project.l1_ball, project.l2_ball, project.linf_ball])
def test_a_radius_of_zero_has_the_slope_of_one_that_grows(f):
    z, radius = torch.tensor([0.3, 2.0, -1.0], dtype=D), torch.zeros((), dtype=D)
    slope = func.jacrev(lambda r: f(z, r))(radius)
    torch.testing.assert_close(slope, (f(z, radius + 1e-3) - f(z, radius)) / 1e-3)


def test_equals_beside_what_is_pooled_are_apart():
    """The first two stand at equals of w, alone; the last two are pooled with each other."""
    z, w = torch.tensor([9.0, 9.0, 0.1, 0.0], dtype=D), torch.tensor([5.0, 5.0, 2.0, 1.0], dtype=D)
    jacobian = torch.zeros(4, 4, dtype=D)
    jacobian[2:, 2:] = torch.tensor([[0.5, -0.5], [-0.5, 0.5]])
    torch.testing.assert_close(func.jacrev(project.permutahedron)(z, w), jacobian)


def test_dependent_equations_are_solved_and_contradicting_ones_refused():
    A = torch.tensor([[1.0, 1.0, 0.0], [2.0, 2.0, 0.0]], dtype=D)
    z = torch.tensor([[3.0, 1.0, 5.0]], dtype=D, requires_grad=True)
    x = project.affine(z, A, torch.tensor([2.0, 4.0], dtype=D))
    torch.testing.assert_close(x, torch.tensor([[2.0, 0.0, 5.0]], dtype=D))
    torch.testing.assert_close(
        func.jacrev(lambda z: project.affine(z, A, x.new_tensor([2, 4])))(z[0])[2, 2], x.new_ones(())
    )
    with pytest.raises(ValueError, match=r"contradict each other; the best x misses one by, got 0.25"):
        project.affine(z, A, torch.tensor([2.0, 5.0], dtype=D))


def test_entries_of_minus_infinity_have_no_share():
    z = torch.tensor([1.0, -math.inf, 0.5], dtype=D, requires_grad=True)
    x = project.simplex(z)
    torch.testing.assert_close(x, torch.tensor([0.75, 0.0, 0.25], dtype=D))
    torch.testing.assert_close(torch.autograd.grad(x[0], z)[0], torch.tensor([0.5, 0.0, -0.5], dtype=D))


def test_large_numbers_keep_the_digits_of_small_differences():
    z = torch.tensor([1e7, 1e7 + 1, 1e7 - 5])
    torch.testing.assert_close(project.simplex(z), torch.tensor([0.0, 1.0, 0.0]))
    assert float(project.l2_ball(torch.full((2,), 1e30), 1.0).norm()) == pytest.approx(1)
    cone = project.second_order_cone(torch.tensor([0.0, 1e30]))
    torch.testing.assert_close(cone, torch.tensor([5e29, 5e29]))


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize(
    ("f", "weight"),
    [
        (project.l1_ball, 1.0),
        (project.l2_ball, 1.0),
        (im.prox.l2, 0.5),
        (im.prox.linf, 0.5),
        (lambda z, a: project.halfspace(z, a * torch.ones(3, dtype=D), 0.3), 1.0),
        (lambda z, a: project.affine(z, a * torch.ones(1, 3, dtype=D), z.new_ones(1)), 1.0),
        (lambda z, a: project.isotonic(z, a * torch.ones(3, dtype=D)), 1.0),
        (lambda z, a: project.permutahedron(z, a * torch.arange(3.0, dtype=D)), 1.0),
        (lambda z, a: project.second_order_cone(a * z), 1.0),
        (lambda z, a: project.exponential_cone(a * z), 1.0),
        (lambda z, a: project.dual_exponential_cone(a * z), 1.0),
        (lambda z, a: project.power_cone(a * z, (0.3, 0.7)), 1.0),
        (lambda z, a: project.dual_power_cone(a * z, (0.3, 0.7)), 1.0),
    ],
)
def test_a_row_with_an_infinity_has_no_nearest_point_and_harms_no_other(f, weight, bad):
    good = torch.tensor([[3.0, -1.0, 0.5]], dtype=D)
    z = torch.cat([torch.tensor([[bad, 1.0, 2.0]], dtype=D), good]).requires_grad_()
    shared = torch.tensor(weight, dtype=D, requires_grad=True)
    x = f(z, shared)
    assert bool(x[0].isnan().all())
    alone = f(good.requires_grad_(), shared)
    torch.testing.assert_close(x[1:], alone)
    of_z, of_shared = torch.autograd.grad(x[1].sin().sum() + x[0].nansum(), [z, shared])
    if f in (project.l1_ball, project.l2_ball, im.prox.l2, im.prox.linf):  # z is nobody else's factor
        assert bool((of_z[0] == 0).all())
        torch.testing.assert_close(of_shared, torch.autograd.grad(alone.sin().sum(), shared)[0])
    torch.testing.assert_close(of_z[1:], torch.autograd.grad(f(good, shared).sin().sum(), good)[0])


@pytest.mark.parametrize("f", [project.simplex, im.sparsemax])
def test_a_row_without_a_finite_largest_entry_has_no_distribution(f):
    inf = math.inf
    z = torch.tensor([[inf, 1.0], [-inf, -inf], [-inf, 2.0], [0.3, 0.1]], dtype=D, requires_grad=True)
    x = f(z)
    assert bool(x[:2].isnan().all())
    torch.testing.assert_close(x[2:], torch.tensor([[0.0, 1.0], [0.6, 0.4]], dtype=D))
    gradient = torch.autograd.grad(x.nan_to_num().square().sum(), z)[0]
    assert bool((gradient[:3] == 0).all())


def test_infinite_bounds_of_boxes_and_balls_are_none():
    inf = math.inf
    z = torch.tensor([-inf, 2.0, inf], dtype=D)
    torch.testing.assert_close(project.linf_ball(z, 3.0), torch.tensor([-3.0, 2.0, 3.0], dtype=D))
    torch.testing.assert_close(project.box(z, -inf, 1.0), torch.tensor([-inf, 1.0, 1.0], dtype=D))
    for f in (project.l1_ball, project.l2_ball, project.linf_ball):
        z, radius = z.new_tensor([1.0, 5.0]).requires_grad_(), z.new_tensor(inf).requires_grad_()
        x = f(z, radius)
        torch.testing.assert_close(x, z)
        slopes = torch.autograd.grad(x.sum(), [z, radius])
        torch.testing.assert_close(slopes, (torch.ones(2, dtype=D), z.new_tensor(0.0)))


@pytest.mark.parametrize(
    ("size", "dtype"), [(1e200, D), (1e-200, D), (1e-170, D), (1e20, torch.float32), (1e-23, torch.float32)]
)
def test_halfspaces_of_every_size(size, dtype):
    a = torch.tensor([size, 0.0], dtype=dtype, requires_grad=True)
    x = project.halfspace(torch.ones(2, dtype=dtype), a, 0.5 * a.detach()[0])
    torch.testing.assert_close(x, torch.tensor([0.5, 1.0], dtype=dtype))
    slope = torch.autograd.grad(x[0], a)[0] * size  # x = b / a, and the other entry tilts
    torch.testing.assert_close(slope, torch.tensor([-0.5, -1.0], dtype=dtype))


def test_halfspaces_without_a_point_are_refused():
    z, a = torch.ones(2, dtype=D), torch.tensor([1.0, 0.0], dtype=D)
    torch.testing.assert_close(project.halfspace(z, a, math.inf), z)
    with pytest.raises(ValueError, match="no point"):
        project.halfspace(z, a, -math.inf)


def test_equations_of_every_size_are_solved():
    A = torch.tensor([[1e-8, 0.0, 0.0], [0.0, 1e8, 0.0], [0.0, 0.0, 1e-200]], dtype=D)
    b = A.sum(1)
    torch.testing.assert_close(project.affine(torch.full((3,), 5.0, dtype=D), A, b), torch.ones(3, dtype=D))
    A = torch.tensor([[1.0, 0.0], [0.0, 1e-16]], dtype=D, requires_grad=True)
    x = project.affine(torch.full((2,), 5.0, dtype=D), A, torch.tensor([1.0, 1e-16], dtype=D))
    torch.testing.assert_close(x, torch.ones(2, dtype=D))
    slope = torch.autograd.grad(x.sum(), A)[0] * A.detach().sum(1, keepdim=True)
    torch.testing.assert_close(slope, -torch.ones(2, 2, dtype=D))
    small = torch.tensor([[1.0, 0.0], [0.0, 1e-18], [0.0, 1e-18]], dtype=D)
    with pytest.raises(ValueError, match="contradict"):  # however small the numbers are
        project.affine(x, small, torch.tensor([1.0, 1e-18, 2e-18], dtype=D))
    torch.testing.assert_close(project.affine(x, small, small.sum(1)), torch.ones(2, dtype=D))


@pytest.mark.parametrize("n", [8, 10, 12, 14])
def test_ill_conditioned_equations_are_satisfied(n):
    """Hilbert's matrix: from n = 12 on its pseudoinverse has no digit that is right."""
    k = torch.arange(n, dtype=D)
    H = 1 / (k.unsqueeze(1) + k + 1)
    for z in (torch.zeros(n, dtype=D), 3 * torch.randn(2, n, dtype=D, generator=seeded(n))):
        x = project.affine(z, H, H.sum(1))
        assert float((x @ H - H.sum(1)).abs().max()) < 1e-13


def test_no_equations_leave_everything():
    z = torch.ones(2, 3, dtype=D)
    torch.testing.assert_close(project.affine(z, z.new_zeros(0, 3), z.new_zeros(0)), z)


@pytest.mark.parametrize("increasing", [True, False])
def test_isotonic_is_that_of_scipy(increasing: bool):
    optimize = pytest.importorskip("scipy.optimize")
    g = seeded(3)
    for n in range(1, 70):
        z = 10 * torch.randn(n, dtype=D, generator=g).cumsum(0)
        z = z.round() if n % 2 else z  # ties
        w = 0.1 + torch.rand(n, dtype=D, generator=g)
        expected = optimize.isotonic_regression(
            z.numpy(force=True), weights=w.numpy(force=True), increasing=increasing
        ).x
        torch.testing.assert_close(project.isotonic(z, w, increasing), torch.tensor(expected.copy()))


def test_isotonic_keeps_what_is_in_order_whatever_its_sizes():
    z = torch.tensor([-16860308.0, -787000.0, 26.0, 72.5, 5125228.0, 4.6e11])
    torch.testing.assert_close(project.isotonic(z), z, rtol=1e-6, atol=0)
    weights = torch.tensor([520.0, 278.0, 8.0, 8e-4, 1e-3, 0.05])  # sums of products with these hide the last
    mixed = torch.tensor([-4.6e12, -700.0, -3.5e11, -3e4, 1e7, 1e11])
    expected = project.isotonic(mixed.double(), weights.double())
    torch.testing.assert_close(project.isotonic(mixed, weights).double(), expected, rtol=1e-5, atol=0)


# ------------------------------------------------------------------------------------------------ transport


def _problem(n: int = 5, m: int = 4, batch: tuple[int, ...] = (3,)) -> tuple[torch.Tensor, ...]:
    g = seeded(0)
    cost = torch.rand(*batch, n, m, dtype=D, generator=g)
    return cost, torch.rand(n, dtype=D, generator=g).softmax(0), torch.rand(m, dtype=D, generator=g).softmax(0)


@pytest.mark.parametrize("epsilon", [10.0, 0.1, 1e-3])
def test_the_plan_has_its_marginals_and_the_form_of_sinkhorn(epsilon: float):
    cost, row, column = _problem()
    X = project.sinkhorn(cost, row, column, epsilon)
    torch.testing.assert_close(X.sum(-1), row.expand(3, 5))
    torch.testing.assert_close(X.sum(-2), column.expand(3, 4))
    potentials = epsilon * X.clamp(min=1e-300).log() + cost  # f_i + g_j
    mixed = potentials - potentials[:, :1] - potentials[:, :, :1] + potentials[:, :1, :1]
    large = (X > 1e-200).all(-1).all(-1)
    assert float(mixed[large].abs().max() if bool(large.any()) else 0.0) < 1e-8


def test_a_cold_plan_is_that_of_the_linear_program():
    optimize = pytest.importorskip("scipy.optimize")
    cost = torch.rand(6, 6, dtype=D, generator=seeded(4))
    even = torch.full((6,), 1 / 6, dtype=D)
    X = project.sinkhorn(cost, even, even, 1e-3)
    rows_, columns = optimize.linear_sum_assignment(cost.numpy(force=True))
    torch.testing.assert_close(X.argmax(1), torch.tensor(columns))
    torch.testing.assert_close((X * cost).sum(), cost[rows_, columns].sum() / 6, rtol=1e-3, atol=0)


@pytest.mark.parametrize("epsilon", [0.1, 3e-3])
def test_cold_plans_converge_and_have_derivatives(epsilon: float):
    """Also where the plan falls into parts that hardly touch, as it does with even marginals."""
    g = seeded(5)
    cost = torch.randn(16, 4, 4, dtype=D, generator=g).requires_grad_()
    row = torch.rand(16, 4, dtype=D, generator=g).softmax(-1)
    row[::2] = 0.25
    even = torch.full((4,), 0.25, dtype=D)

    def total(cost: torch.Tensor) -> torch.Tensor:
        return project.sinkhorn(cost, row, even, epsilon).sin().sum((-1, -2))

    direction = torch.randn(16, 4, 4, dtype=D, generator=g)
    slope = (torch.autograd.grad(total(cost).sum(), cost)[0] * direction).sum((-1, -2))
    h = 1e-5 * epsilon
    with torch.no_grad():
        expected = (total(cost + h * direction) - total(cost - h * direction)) / (2 * h)
    torch.testing.assert_close(slope, expected, rtol=1e-5, atol=1e-6)


def test_the_derivative_of_a_plan_does_not_see_who_found_it():
    cost, row, column = _problem(batch=())
    cost = cost.requires_grad_()

    def unrolled(cost: torch.Tensor) -> torch.Tensor:
        f = torch.zeros(5, dtype=D)
        for _ in range(400):
            g = column.log() - torch.logsumexp(f[:, None] - cost / 0.1, 0)
            f = row.log() - torch.logsumexp(g - cost / 0.1, 1)
        return (f[:, None] + g - cost / 0.1).exp()

    expected = torch.autograd.grad(unrolled(cost).sin().sum(), cost)[0]
    ours = torch.autograd.grad(project.sinkhorn(cost, row, column, 0.1).sin().sum(), cost)[0]
    torch.testing.assert_close(ours, expected, rtol=1e-7, atol=1e-9)


def test_a_plan_so_cold_that_its_marginals_are_lost_is_told():
    cost, row, column = _problem(3, 4, batch=())
    X = project.sinkhorn(cost, row, column, 1e-6)
    torch.testing.assert_close(X.sum(-1), row, atol=0, rtol=1e-8)
    with pytest.raises(im.SolverError, match=r"STAGNATED.*epsilon is so small"):
        project.sinkhorn(cost, row, column, 1e-13)
    with pytest.warns(im.ConvergenceWarning, match="epsilon is so small"):
        project.sinkhorn(cost, row, column, 1e-13, on_failure="warn")


@pytest.mark.parametrize("dtype", [D, torch.float32])
@pytest.mark.parametrize(
    ("cost", "row"),
    [
        ([[0.0, math.inf], [0.0, math.inf]], [0.5, 0.5]),  # a column that nobody may go to
        ([[math.inf, math.inf], [0.0, 1.0]], [0.5, 0.5]),
        ([[0.0, math.inf], [1.0, 0.0]], [0.6, 0.4]),
    ],
)
def test_infinite_costs_that_leave_no_plan_are_named(cost, row, dtype):
    cost = torch.tensor([cost, [[0.0, 1.0], [1.0, 0.0]]], dtype=dtype)
    row, column = torch.tensor(row, dtype=dtype), torch.tensor([0.5, 0.5], dtype=dtype)
    with pytest.raises(im.SolverError, match="for 1 of them every plan has infinite cost"):
        project.sinkhorn(cost, row, column)


def test_plans_that_fail_are_told_and_harm_no_other():
    cost, row, column = _problem()
    cost[1, 0, 0] = math.nan
    cost = cost.requires_grad_()
    with pytest.raises(im.SolverError, match=r"sinkhorn.*1 of 3 samples"):
        project.sinkhorn(cost, row, column)
    with pytest.warns(im.ConvergenceWarning, match="sinkhorn"):
        X = project.sinkhorn(cost, row, column, on_failure="warn")
    gradient = torch.autograd.grad(X[[0, 2]].sin().sum() + X[1].nansum(), cost)[0]
    assert bool((gradient[1] == 0).all())
    expected = project.sinkhorn(cost[[0, 2]], row, column)
    torch.testing.assert_close(X[[0, 2]], expected)
    torch.testing.assert_close(gradient[[0, 2]], torch.autograd.grad(expected.sin().sum(), cost)[0][[0, 2]])


def test_a_plan_whose_gradient_is_nan_says_where_that_comes_from():
    cost, row = torch.rand(1, 3, 3, requires_grad=True), torch.ones(3)
    X = project.sinkhorn(cost, row, row)
    with pytest.warns(im.ConvergenceWarning, match=r"backward solve of sinkhorn.*the incoming gradient"):
        (X * float("nan")).sum().backward()


def test_only_the_proportions_of_the_rows_matter():
    cost, row, column = _problem()
    X = project.sinkhorn(cost, row.bfloat16(), column.bfloat16())  # whose sums differ by roundings
    torch.testing.assert_close(X.sum(-2), column.bfloat16().to(D).expand(3, 4))
    row.requires_grad_()
    slope = torch.autograd.grad(project.sinkhorn(cost, row, column).sin().sum(), row)[0]
    assert abs(float((slope * row.detach()).sum())) < 1e-12


def test_forbidden_pairs_get_nothing():
    cost, row, column = _problem(batch=())
    cost[0, 1] = math.inf
    cost.requires_grad_()
    epsilon = torch.tensor(0.1, dtype=D, requires_grad=True)
    X = project.sinkhorn(cost, row, column, epsilon)
    assert float(X[0, 1].detach()) == 0
    torch.testing.assert_close(X.sum(1), row)
    slopes = torch.autograd.grad(X.sin().sum(), (cost, epsilon))
    assert bool(slopes[0].isfinite().all())
    at = [project.sinkhorn(cost.detach(), row, column, 0.1 + h).sin().sum() for h in (1e-5, -1e-5)]
    torch.testing.assert_close(slopes[1], (at[0] - at[1]) / 2e-5, rtol=1e-6, atol=1e-8)


# ------------------------------------------------------------------------------------- precision, compiling


@pytest.mark.parametrize("row", EVERY, ids=repr)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(row: Row, dtype: torch.dtype):
    z, parameters = row.draw((3,))
    z, parameters = z.to(dtype), tuple(p.to(dtype) for p in parameters)
    expected = row.f(z.float(), *(p.float() for p in parameters)).to(dtype)
    if row is not SINKHORN:  # whose marginals are rounded on the way
        assert torch.equal(row.f(z, *parameters), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x = row.f(z.float(), *(p.float() for p in parameters))
    assert x.dtype == torch.float32
    torch.testing.assert_close(x, row.f(z.float(), *(p.float() for p in parameters)))


@pytest.mark.parametrize("f", [project.simplex, project.second_order_cone, project.isotonic, im.soft_rank])
def test_maps_that_need_no_search_compile_into_one_graph(f):
    z = torch.randn(3, 5, dtype=D, generator=seeded(0)).requires_grad_()
    x = torch.compile(f, fullgraph=True, backend="aot_eager")(z)
    torch.testing.assert_close(x, f(z))
    expected = torch.autograd.grad(f(z).sin().sum(), z)
    torch.testing.assert_close(torch.autograd.grad(x.sin().sum(), z), expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of the compiler
def test_rows_that_a_compiled_model_makes_have_code_for_their_units():
    """Arithmetic on integer exponents had none, where the compiler fused it with what the rows are made of."""

    def onto(z):
        rows = torch.arange(10.0, dtype=z.dtype).reshape(2, 5)
        return project.affine(z, rows, torch.ones(2, dtype=z.dtype))

    z = torch.randn(4, 5, dtype=D, generator=seeded(0))
    torch.testing.assert_close(torch.compile(onto)(z), onto(z))


# ------------------------------------------------------------------------------------------------ refusals

Z = torch.zeros(3, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: project.box(Z, 1.0, 0.0), r"lower must be <= upper everywhere; lower - upper, got 1"),
        (lambda: project.box(Z, torch.zeros(3)), r"lower of shape \(3,\) must broadcast with \(3, 4\)"),
        (lambda: project.box(Z, math.nan), "lower must be <= upper"),
        (lambda: project.box(Z[:, :1], torch.zeros(4)), "does not fit"),
        (lambda: project.simplex(Z, -1.0), "simplex: radius must be >= 0, got -1"),
        (lambda: project.simplex(Z, math.nan), "radius must be >= 0, got nan"),
        (lambda: project.simplex(Z, torch.tensor([1.0, -2.0, 1.0])), "got -2"),
        (lambda: project.simplex(Z, torch.ones(4)), r"radius of shape \(4,\) must broadcast with \(3,\)"),
        (lambda: project.simplex(torch.zeros(3, 0)), r"with n >= 1, got \(3, 0\)"),
        (lambda: project.simplex(torch.zeros(())), "with n >= 1"),
        (lambda: project.l1_ball(Z, -1), "l1_ball: radius"),
        (lambda: project.l2_ball(Z, -1), "l2_ball: radius"),
        (lambda: project.linf_ball(Z, -1), "linf_ball: radius"),
        (lambda: project.halfspace(Z, torch.zeros(4), -1.0), "no point satisfies"),
        (lambda: project.halfspace(Z, torch.full((4,), math.nan), 1.0), "a must be finite"),
        (lambda: project.halfspace(Z, torch.ones(3), 1.0), "a of shape"),
        (lambda: project.affine(Z, torch.ones(2, 3), torch.ones(2)), r"A must be \(..., m, 4\)"),
        (lambda: project.affine(Z, torch.ones(2, 4), torch.ones(3)), r"and b \(..., m\)"),
        (lambda: project.affine(Z, torch.full((1, 4), math.inf), torch.ones(1)), "A must be finite"),
        (lambda: project.psd_cone(Z), "must be square"),
        (lambda: project.exponential_cone(Z), r"must be \(..., 3\), got \(3, 4\)"),
        (lambda: project.dual_exponential_cone(Z), "dual_exponential_cone"),
        (lambda: project.isotonic(Z, torch.zeros(4)), "weights must be positive"),
        (lambda: project.permutahedron(Z, torch.zeros(3)), "w of shape"),
        (lambda: project.sinkhorn(Z, torch.ones(3), torch.ones(4)), "same sum.*got -1"),
        (lambda: project.sinkhorn(Z, torch.ones(4), torch.ones(3)), "row must be"),
        (lambda: project.sinkhorn(Z, torch.tensor([3.0, 1.0, 0.0]), torch.ones(4)), "row must be positive"),
        (lambda: project.sinkhorn(Z, torch.ones(3), torch.full((4,), 0.75), 0.0), "epsilon must be positive"),
        (lambda: project.sinkhorn(Z, torch.ones(3), torch.full((4,), 0.75), on_failure="no"), "on_failure"),
        (lambda: im.prox.l1(Z, -1.0), "prox.l1: weight"),
        (lambda: im.prox.total_variation(Z, torch.ones(4)), r"must broadcast with \(3, 3\)"),
        (lambda: im.prox.total_variation(Z, math.inf), "finite"),
        (lambda: im.soft_sort(Z, 0.0), "strength must be positive"),
        (lambda: im.soft_rank(Z, -1.0), "strength must be positive"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused(call, message: str):
    with pytest.raises(ValueError, match=message):
        call()


def test_parameters_of_other_kinds_are_refused():
    for wrong in ("1", None, True, torch.ones(3, dtype=torch.bool), torch.ones(3, dtype=torch.complex64)):
        with pytest.raises(TypeError, match="simplex: radius must"):
            project.simplex(Z, wrong)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="radius is on meta"):
        project.simplex(Z, torch.ones(3, device="meta"))
    assert project.simplex(Z, torch.ones(3, dtype=D)).dtype == torch.float32


def test_a_number_a_row_that_has_the_dimension_of_the_row_is_refused():
    z = torch.zeros(3, 2, dtype=D)
    for f in (project.simplex, project.l1_ball, project.l2_ball, im.prox.l2, im.soft_rank):
        with pytest.raises(
            ValueError, match=r"must have one number per row of z \(3, 2\), so the shape \(3,\).*got \(3, 1\)"
        ):
            f(z, torch.ones(3, 1, dtype=D))
        assert f(z, torch.ones(3, dtype=D)).shape == (3, 2)
    assert project.simplex(z[0], torch.ones(4, dtype=D)).shape == (4, 2)  # many radii for one row


def test_refused_values_are_told_with_their_place():
    with pytest.raises(ValueError, match=r"radius must be >= 0, got -2 at index \[1, 0\]"):
        project.simplex(torch.zeros(3, 2, dtype=D), torch.tensor([1.0, -2.0, -3.0], dtype=D))
    with pytest.raises(ValueError, match=r"weight must be >= 0, got -1$"):
        im.prox.l1(torch.zeros(2, dtype=D), -1.0)
