"""Conic programs: projections, optimality condition, Jacobian, Clarabel."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import implicitly as im
from implicitly.argmin.convex.conic import Cones, Pattern
from implicitly.argmin.convex.conic_solver import Numbers, Workers
from implicitly.argmin.sets.power_cone import dual_power_cone, power_cone
from implicitly.solution import Status

pytestmark = pytest.mark.host  # as Clarabel is

D = torch.float64
CONES = Cones(2, 3, (3, 3, 4), (2,), 2, ((0.3, 0.7), (0.2, 0.3, 0.5)))


def random_program(n=6, cones=CONES, batch=3):
    """A pattern with everything in it, numbers, and a point."""
    m = cones.size
    dense = np.random.default_rng(0).random((m, n)) < 0.5
    A_columns, A_rows = np.nonzero(dense.T)
    P_columns, P_rows = np.nonzero(np.triu(np.ones((n, n))).T)
    pattern = Pattern.of(n, m, (P_rows, P_columns), (A_rows, A_columns))
    L = torch.randn(batch, n, n, dtype=D)
    P = (L @ L.mT)[:, pattern.P_rows, pattern.P_columns]
    A = torch.randn(batch, len(A_rows), dtype=D)
    theta = (P, torch.randn(1, n, dtype=D), A, torch.randn(batch, m, dtype=D))
    return pattern, theta, torch.randn(batch, n + m, dtype=D)


# ------------------------------------------------------------------------------------------- power cones


@pytest.mark.parametrize("exponents", [(0.5, 0.5), (0.9, 0.1), (0.2, 0.3, 0.5)])
def test_projection_onto_the_power_cone_and_its_dual(exponents):
    a = torch.tensor(exponents, dtype=D)
    z = (
        torch.randn(500, len(exponents) + 1, dtype=D)
        * torch.tensor([0.01, 1.0, 100.0], dtype=D).repeat(500)[:500, None]
    )
    p, d = power_cone(z, exponents), dual_power_cone(-z, exponents)
    size = z.norm(dim=1)
    assert (p[:, :-1] >= 0).all()
    assert ((p[:, :-1] ** a).prod(1) - p[:, -1].abs() >= -1e-12 * size).all()
    x = torch.rand(400, len(exponents), dtype=D) ** 4  # (x, ± what bounds it) span the cone
    bound = (x**a).prod(1, keepdim=True) * torch.tensor([1.0, -1.0], dtype=D).repeat(200)[:, None]
    assert (d @ torch.cat([x, bound], dim=1).T >= -1e-12 * size[:, None]).all()
    assert (p - d - z).abs().max() <= 1e-12 * size.max()  # Moreau: z = P(z) - P*(-z), and these are orthogonal
    assert ((p * d).sum(1).abs() <= 1e-12 * size**2).all()
    kinds = [(p == z).all(1), (p == 0).all(1)]
    assert all(bool(k.any()) for k in kinds)
    assert not bool((kinds[0] | kinds[1]).all())


@pytest.mark.slow
def test_projection_onto_the_power_cone_has_every_derivative():
    z = torch.randn(8, 3, dtype=D, requires_grad=True)
    assert gradcheck(lambda z: power_cone(z, (0.3, 0.7)), z)
    assert gradgradcheck(lambda z: power_cone(z, (0.3, 0.7)), z)
    assert gradcheck(lambda z: power_cone(z, (0.3, 0.7)), z, check_forward_ad=True, check_backward_ad=False)
    mapped = torch.func.vmap(lambda z: power_cone(z, (0.3, 0.7)))(z)
    torch.testing.assert_close(mapped, power_cone(z, (0.3, 0.7)))


def test_projection_onto_the_power_cone_keeps_its_dtype_and_survives_extremes():
    assert power_cone(torch.randn(4, 3), (0.5, 0.5)).dtype == torch.float32
    z = torch.tensor([[0.0, 0.0, 1.0], [1e-200, 1.0, 1e200], [-1.0, 2.0, 0.0], [0.0, 0.0, 0.0]], dtype=D)
    z.requires_grad_()
    p = power_cone(z, (0.5, 0.5))
    assert p.isfinite().all()
    torch.testing.assert_close(p[0], torch.tensor([1.0, 1.0, 1.0], dtype=D) / 3)  # on the ray (1, 1, 1)
    torch.testing.assert_close(p[2], torch.tensor([0.0, 2.0, 0.0], dtype=D))
    assert torch.autograd.grad(p.sum(), z)[0].isfinite().all()
    assert power_cone(torch.tensor([float("nan"), 1.0, 1.0]), (0.5, 0.5)).isnan().all()


@pytest.mark.parametrize("exponents", [(0.5, 0.5), (0.3, 0.7), (0.01, 0.99), (0.2, 0.3, 0.5)])
def test_points_on_the_edge_of_the_power_cone_and_of_its_polar_stay_with_a_derivative(exponents):
    a = torch.tensor(exponents, dtype=D)
    x = 10 ** (8 * torch.rand(1000, len(a), dtype=D) - 4)
    for cone, dual, edge in (
        (power_cone, dual_power_cone, (a * x.log()).sum(1).exp()),
        (dual_power_cone, power_cone, (a * (x / a).log()).sum(1).exp()),
    ):
        z = torch.cat([x, edge.unsqueeze(1)], dim=1).requires_grad_()
        size = z.norm(dim=1, keepdim=True).detach()
        kept, gone = cone(z, exponents), dual(-z, exponents)
        assert ((kept - z).abs() <= 1e-13 * size).all()
        assert (gone.abs() <= 1e-13 * size).all()
        for y in (kept, gone):
            slope = torch.autograd.grad(y.sum(), z)[0]
            assert (slope.norm(dim=1) <= (1 + 1e-6) * len(z[0]) ** 0.5).all()  # a projection is nonexpansive


@pytest.mark.parametrize(
    ("z", "exponents", "error", "says"),
    [
        (torch.ones(3), (0.5, 0.6), ValueError, "sum to one"),
        (torch.ones(3), (1.5, -0.5), ValueError, "positive"),
        (torch.ones(4), (0.5, 0.5), ValueError, r"\(\.\.\., 3\)"),
        (torch.ones(3, dtype=torch.int64), (0.5, 0.5), TypeError, "floating"),
    ],
)
def test_power_cone_refuses_what_is_none(z, exponents, error, says):
    with pytest.raises(error, match=says):
        power_cone(z, exponents)


# ------------------------------------------------------------------------------------- cones and condition


def test_the_projection_onto_the_dual_is_one():
    v = torch.randn(50, CONES.size, dtype=D)
    y = CONES.project_dual(v)
    torch.testing.assert_close(CONES.project_dual(y), y, atol=1e-9, rtol=1e-9)
    assert ((y * (y - v)).sum(1).abs() <= 1e-9 * (v * v).sum(1)).all()
    torch.testing.assert_close(CONES.project_dual(3 * v), 3 * y)


def test_jacobian_of_the_projection():
    v = torch.randn(4, CONES.size, dtype=D)
    exact = torch.stack([torch.func.jacrev(lambda x: CONES.project_dual(x[None])[0])(row) for row in v])
    torch.testing.assert_close(CONES.jacobian(v), exact)


def test_kinks_are_told():
    v = torch.randn(4, CONES.size, dtype=D)
    assert (CONES.least_eigenvalue(v) > 1e-6).all()
    v[0, 3] = 0.0  # an inequality
    v[1, 5:8] = torch.tensor([5.0, 3.0, 4.0], dtype=D)  # the boundary of a second-order cone
    v[2, 15:18] = torch.tensor([1.0, 2**0.5, 1.0], dtype=D)  # a singular matrix
    assert (CONES.least_eigenvalue(v)[:3] < 1e-12).all()
    assert CONES.least_eigenvalue(v)[3] > 1e-6


def test_condition_and_its_derivatives():
    pattern, theta, z = random_program()
    theta = tuple(t.requires_grad_() for t in theta)
    z.requires_grad_()

    def residual(z, *theta):
        return pattern.bind(CONES, *theta)(z)

    assert gradcheck(residual, (z, *theta), fast_mode=True)
    assert gradgradcheck(residual, (z, *theta), fast_mode=True)


def test_factors_dense_and_sparse_invert_the_jacobian():
    pytest.importorskip("scipy")
    from implicitly.argmin.convex.conic_jacobian import ConicFamily, DenseFactors, Jacobian, SparseFactors

    pattern, theta, z = random_program(n=40)  # as many as rows, so that the Jacobian is regular
    wanted = torch.ones(z.shape[1], dtype=D)
    out = torch.tensor([False, True, False])
    jacobian = Jacobian(ConicFamily(pattern, CONES, None, None, wanted), z, theta, out)
    exact = torch.stack(
        [
            torch.func.jacrev(
                lambda x: pattern.bind(CONES, *(t[i : i + 1] if len(t) > 1 else t for t in theta))(x[None])[0]
            )(z[i])
            for i in range(3)
        ]
    )
    exact[1] = torch.eye(z.shape[1], dtype=D)
    torch.testing.assert_close(jacobian.dense(torch.arange(3)), exact)
    r = torch.randn(2 * 3, z.shape[1], dtype=D)
    for transposed in (False, True):
        M = exact.mT if transposed else exact
        for factors in (DenseFactors.of(jacobian), SparseFactors.of(jacobian)):
            right = r.reshape(2, 3, -1).permute(1, 2, 0)
            found = factors.solve(right, transposed)
            torch.testing.assert_close(M @ found, right, atol=1e-6, rtol=1e-6)
        w = jacobian.solve(r, transposed)
        torch.testing.assert_close(
            torch.einsum("bij,kbj->kbi", M, w.reshape(2, 3, -1)).reshape(6, -1), r, atol=1e-6, rtol=1e-6
        )


# ------------------------------------------------------------------------------------------------ Clarabel


def test_clarabel_refuses_options_out_of_range():

    for bad in (
        {"rtol": 0.0},
        {"rtol": 2.0},
        {"max_steps": 0},
        {"polish": -1},
        {"threads": 0},
        {"time_limit_s": 0.0},
    ):
        with pytest.raises(ValueError, match=next(iter(bad))):
            im.Clarabel(**bad)
    with pytest.raises(ValueError, match="presolve_enable"):
        im.Clarabel(settings={"presolve_enable": True})
    pytest.importorskip("clarabel")
    with pytest.raises(TypeError, match="no setting 'eps'"):
        im.Clarabel(settings={"eps": 1e-3}).native_settings()
    with pytest.raises(TypeError, match="max_step_fraction"):
        im.Clarabel(settings={"max_step_fraction": "much"}).native_settings()
    assert im.Clarabel(settings={"equilibrate_enable": False}).native_settings().equilibrate_enable is False


def test_solvers_refine_their_steps_unless_solutions_are_polished():
    pytest.importorskip("clarabel")

    def refines(quick, **options):
        return im.Clarabel(**options).native_settings(quick).iterative_refinement_enable

    assert refines(quick=False)
    assert not refines(quick=True)
    assert refines(quick=True, polish=0)
    assert refines(quick=True, settings={"iterative_refinement_enable": True})


def test_a_sample_that_a_quick_solver_fails_at_is_solved_with_care():
    pytest.importorskip("clarabel")
    pattern = Pattern.of(1, 1, (np.array([0]), np.array([0])), (np.array([0]), np.array([0])))
    workers = Workers(pattern, Cones(0, 1, (), (), 0, ()), im.Clarabel())
    made, make = [], workers._make

    def counted(numbers, settings):
        made.append(settings.iterative_refinement_enable)
        solver = make(numbers, settings)
        return solver if len(made) > 1 else SimpleNamespace(update=solver.update, solve=failing)

    def failing():
        return SimpleNamespace(status="NumericalError", x=[0.0], z=[0.0], s=[0.0])

    workers._make = counted
    numbers = Numbers(*(np.array([[v]]) for v in (2.0, -2.0, -1.0, -3.0)))  # x^2 - 2x where x >= 3
    found = workers.solve(numbers, np.array([True]))
    assert made == [False, True]
    assert found.status.tolist() == [int(Status.CONVERGED)]
    assert found.x[0, 0] == pytest.approx(3.0, abs=1e-6)


@pytest.mark.parametrize("says", ["PrimalInfeasible", "DualInfeasible"])
def test_a_certificate_that_is_none_does_not_count(says):
    pytest.importorskip("clarabel")
    pattern = Pattern.of(1, 1, (np.array([0]), np.array([0])), (np.array([0]), np.array([0])))
    workers = Workers(pattern, Cones(0, 1, (), (), 0, ()), im.Clarabel())
    false = SimpleNamespace(status=says, x=[-1.0], z=[1.0], s=[1.0], iterations=1)
    made, make = [], workers._make

    def lying(numbers, settings):
        made.append(settings.iterative_refinement_enable)
        solver = make(numbers, settings)
        return solver if len(made) > 1 else SimpleNamespace(update=solver.update, solve=lambda: false)

    workers._make = lying
    numbers = Numbers(*(np.array([[v]]) for v in (2.0, -2.0, -1.0, -3.0)))  # x^2 - 2x where x >= 3
    found = workers.solve(numbers, np.array([True]))
    assert made == [False, True]
    assert found.status.tolist() == [int(Status.CONVERGED)]


def test_certificates_are_told_from_others():
    pytest.importorskip("clarabel")
    pattern = Pattern.of(1, 2, (np.array([0]), np.array([0])), (np.array([0, 1]), np.array([0, 0])))
    workers = Workers(pattern, Cones(0, 2, (), (), 0, ()), im.Clarabel())
    infeasible = [np.array(t) for t in ([0.0], [1.0], [1.0, -1.0], [-1.0, 0.0])]  # x <= -1 and -x <= 0
    assert workers._no_point(infeasible, np.array([1.0, 1.0]))
    assert not workers._no_point(infeasible, np.array([1.0, 0.9]))
    assert not workers._no_point([*infeasible[:3], np.array([1.0, 0.0])], np.array([1.0, 1.0]))
    unbounded = [np.array(t) for t in ([0.0], [1.0], [1.0, 1.0], [1.0, 1.0])]  # x where x <= 1
    assert workers._no_limit(unbounded, np.array([-1.0]), np.array([1.0, 1.0]))
    assert not workers._no_limit(unbounded, np.array([1.0]), np.array([-1.0, -1.0]))
    assert not workers._no_limit([np.array([1.0]), *unbounded[1:]], np.array([-1.0]), np.array([1.0, 1.0]))


def test_no_word_of_clarabel_counts_that_the_residual_does_not_confirm():
    pytest.importorskip("clarabel")
    from implicitly.argmin.convex.conic_jacobian import ConicFamily
    from implicitly.argmin.convex.conic_program import Tried, Units, _examined

    cones = Cones(0, 0, (3,), (), 0, ())
    pattern = Pattern.of(2, 3, ([np.arange(2)] * 2), (np.array([1, 2]), np.array([0, 1])))
    theta = tuple(torch.tensor([t], dtype=D) for t in ([1.0, 1.0], [-3.0, -4.0], [-1.0, -1.0], [1.0, 0.0, 0.0]))
    exact = torch.tensor([[0.6, 0.8]], dtype=D)  # of |x - (3, 4)|^2 / 2 where |x| <= 1
    y, s = 4 * torch.tensor([[1.0, -0.6, -0.8]], dtype=D), torch.tensor([[1.0, 0.6, 0.8]], dtype=D)
    one = torch.ones(1, dtype=D)
    for error, status in ((0.0, Status.CONVERGED), (1e-3, Status.STAGNATED)):
        family = ConicFamily(pattern, cones, im.Clarabel(polish=0), None, torch.ones(5, dtype=D))
        word = torch.zeros(1, dtype=torch.int64)
        tried = Tried(Units(one, one), exact + error, y, s, word, word)
        assert _examined(family, theta, tried).status.tolist() == [int(status)]


def test_every_pair_of_repeated_rows_is_seen():
    """Whatever two entries of the probe they have: multipliers of such rows are not unique."""
    from implicitly.argmin.convex.conic_jacobian import ConicFamily, Jacobian

    m = 24
    pairs = [(i, j) for i in range(m) for j in range(i)]
    A_columns, A_rows = np.nonzero(np.ones((m - 1, m)))
    pattern = Pattern.of(m - 1, m, ([np.arange(m - 1)] * 2), (A_rows, A_columns))
    A = torch.zeros(len(pairs), m, m - 1, dtype=D)
    for k, (i, j) in enumerate(pairs):
        A[k, [r for r in range(m) if r != i]] = torch.eye(m - 1, dtype=D)
        A[k, i] = A[k, j]
    cones = Cones(m, 0, (), (), 0, ())
    theta = (
        torch.ones(1, m - 1, dtype=D),
        torch.zeros(1, m - 1, dtype=D),
        A.mT.flatten(1),
        torch.zeros(1, m, dtype=D),
    )
    z = torch.zeros(len(A), 2 * m - 1, dtype=D)
    family = ConicFamily(pattern, cones, im.Clarabel(), None, torch.ones(2 * m - 1, dtype=D))
    jacobian = Jacobian(family, z, theta, torch.zeros(len(A), dtype=torch.bool))
    jacobian.move_to(z)
    assert jacobian.degenerate.all()


@pytest.mark.parametrize(
    ("numbers", "told"),
    [
        ((2.0, -2.0, -1.0, -3.0), Status.STAGNATED),  # x^2 - 2x where x >= 3: no certificate
        ((2.0, 0.0, 0.0, -1.0), Status.INFEASIBLE),  # 0 x <= -1
        ((0.0, -2.0, -1.0, 0.0), Status.UNBOUNDED),  # -2x where x >= 0
    ],
)
def test_clarabel_is_believed_where_it_has_solved_or_run_out_and_certificates_else(numbers, told):
    pattern = Pattern.of(1, 1, (np.array([0]), np.array([0])), (np.array([0]), np.array([0])))
    workers = Workers(pattern, Cones(0, 1, (), (), 0, ()), im.Clarabel())
    believed = {"Solved": Status.CONVERGED, "MaxIterations": Status.MAX_STEPS, "MaxTime": Status.MAX_STEPS}
    broken = "AlmostSolved", "NumericalError", "InsufficientProgress"
    found = "PrimalInfeasible", "DualInfeasible", "AlmostPrimalInfeasible", "AlmostDualInfeasible"
    for name in (*believed, *broken, *found):
        solution = SimpleNamespace(status=name, x=[1.0], z=[1.0], s=[1.0])
        own = tuple(np.array([v]) for v in numbers)
        assert workers._judged(own, solution) == believed.get(name, told)


def test_the_probe_for_degenerate_samples_pairs_with_no_simple_direction():
    """A system whose null space is e1 - e2, or e1 + e4 - e2 - e3, is told by what it leaves of the probe."""
    from implicitly.argmin.convex.conic_jacobian import MISSING, Jacobian

    probe = Jacobian._probe(SimpleNamespace(z=torch.zeros(1, 1000, dtype=D)))[0]
    assert probe.sort().values.diff().min() > MISSING * probe.norm()
    four = probe.unfold(0, 4, 1)
    assert ((four[:, 0] + four[:, 3] - four[:, 1] - four[:, 2]).abs() / 2 > MISSING * probe.norm()).all()
