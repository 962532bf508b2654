"""Linear solves against `torch.linalg.solve`, and what they say of systems they cannot solve."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import implicitly as im
from implicitly.condition import Condition, Report
from implicitly.implicit import find, transposed
from implicitly.iterate import Found
from tests.problems import draw, matrix

EYE = torch.eye(6, dtype=torch.float64)
GENERAL = EYE + matrix(6, 0.8, 1, 4)  # (4, 6, 6), not symmetric, and |1 - eig| < 1
POSITIVE = EYE + 3 * GENERAL @ GENERAL.mT
INDEFINITE = torch.diag_embed(torch.tensor([3.0, -2.0, 1.0, -1.0, 0.5, 4.0], dtype=torch.float64))
ROTATION = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)
SHIFT = EYE.roll(1, 0)  # Krylov spaces see nothing of the solution before they are full

GMRES = im.GMRES(rtol=1e-12)
SOLVERS = {
    "GMRES": (GMRES, {"general", "positive", "indefinite"}),
    "GMRES(3)": (im.GMRES(rtol=1e-12, restart=3, max_steps=500), {"general", "positive"}),
    "BiCGStab": (im.BiCGStab(rtol=1e-12), {"general", "positive", "indefinite"}),
    "CG": (im.CG(rtol=1e-12), {"positive"}),
    "Neumann": (im.Neumann(rtol=1e-12, max_steps=500), {"general"}),
    "Neumann-damped": (im.Neumann(rtol=1e-12, damping=0.04, max_steps=5000), {"positive"}),
    "DenseLU": (im.DenseLU(rtol=1e-12), {"general", "positive", "indefinite"}),
    "Anderson": (im.Anderson(rtol=1e-12, history=8), {"general"}),
}
SYSTEMS = {"general": GENERAL, "positive": POSITIVE, "indefinite": INDEFINITE.expand(4, 6, 6)}
CASES = [(solver, system) for solver, (_, systems) in SOLVERS.items() for system in sorted(systems)]


def system(bind=lambda M: lambda u: (M @ u.unsqueeze(2)).squeeze(2)) -> Condition:
    return Condition(bind=bind, name="a system", dtype=torch.float64, report=Report("ignore"), linear=True)


def solve(solver: im.GMRES, M: Tensor, b: Tensor) -> Found:
    """M u = b for M `(B, n, n)` and b `(B, n)`, from zero."""
    return find(solver, replace(system(), dtype=b.dtype), torch.zeros_like(b), (b, M))


def true_residual(M: Tensor, u: Tensor, b: Tensor) -> Tensor:
    return (b - (M @ u.unsqueeze(2)).squeeze(2)).norm(dim=1)


def statuses(found: Found) -> list[str]:
    return [im.Status(int(s)).name for s in found.status]


@pytest.mark.parametrize(("solver", "kind"), CASES)
def test_every_solver_agrees_with_a_direct_one(solver, kind):
    M, b = SYSTEMS[kind], draw(4, 6, seed=2)
    found = solve(SOLVERS[solver][0], M, b)
    assert statuses(found) == ["CONVERGED"] * 4
    torch.testing.assert_close(found.z, torch.linalg.solve(M, b), rtol=0, atol=1e-10)
    assert bool((true_residual(M, found.z, b) <= 1e-11 * b.norm(dim=1)).all())


@pytest.mark.parametrize(("solver", "kind"), CASES)
def test_the_transposed_system_is_solved_from_products_with_the_first(solver, kind):
    M, g = SYSTEMS[kind], draw(4, 6, seed=3)
    # R(u) = -M u, so that A' = -M' and A' u + g = 0 says M' u = g.
    products = system(lambda M: lambda u: -(M @ u.unsqueeze(2)).squeeze(2))
    condition = transposed(replace(products, linear=False))
    found = find(SOLVERS[solver][0], condition, torch.zeros_like(g), (g, torch.zeros_like(g), M))
    assert statuses(found) == ["CONVERGED"] * 4
    torch.testing.assert_close(found.z, torch.linalg.solve(M.mT, g), rtol=0, atol=1e-10)


@pytest.mark.parametrize("solver", SOLVERS)
def test_float32_reaches_what_float32_can(solver):
    M, b = POSITIVE.float() / 12, draw(4, 6, seed=2).float()
    kind = SOLVERS[solver][0]
    if isinstance(kind, im.Neumann):
        kind = im.Neumann(max_steps=2000)
    found = solve(type(kind)(max_steps=kind.max_steps), M, b)
    assert statuses(found) == ["CONVERGED"] * 4
    assert found.z.dtype == torch.float32
    assert bool((true_residual(M, found.z, b) <= 5e-5 * b.norm(dim=1)).all())


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_right_hand_side_of_zero_needs_no_step(solver):
    found = solve(SOLVERS[solver][0], GENERAL, torch.zeros(4, 6, dtype=torch.float64))
    assert statuses(found) == ["CONVERGED"] * 4
    assert found.steps.tolist() == [0] * 4
    assert not found.z.any()


@pytest.mark.parametrize("solver", [name for name, (_, systems) in SOLVERS.items() if "general" in systems])
def test_each_system_converges_on_its_own(solver):
    M, b = GENERAL.clone(), draw(4, 6, seed=5)
    M[1], M[2] = EYE, EYE + 0.01 * GENERAL[2]
    together = solve(SOLVERS[solver][0], M, b)
    assert statuses(together) == ["CONVERGED"] * 4
    assert int(together.steps[1]) == 1
    for i in range(4):
        alone = solve(SOLVERS[solver][0], M[i : i + 1], b[i : i + 1])
        assert int(alone.steps) == int(together.steps[i])
        torch.testing.assert_close(alone.z[0], together.z[i], rtol=1e-10, atol=1e-12)


# ------------------------------------------------------------------------------------------- hard systems


def test_gmres_needs_the_whole_space_for_a_shift_and_no_more():
    b = EYE[:1]
    found = solve(GMRES, SHIFT.unsqueeze(0), b)
    assert statuses(found) == ["CONVERGED"]
    assert found.steps.tolist() == [6]
    torch.testing.assert_close(found.z, b @ SHIFT)


def test_the_basis_of_gmres_stays_orthogonal_on_ill_conditioned_systems():
    n = 40
    U, _, V = torch.linalg.svd(draw(2, n, n, seed=3))
    M, b = U @ torch.diag(torch.logspace(0, -6, n, dtype=torch.float64)) @ V, draw(2, n, seed=4)
    found = solve(im.GMRES(rtol=1e-9, restart=50), M, b)
    assert statuses(found) == ["CONVERGED"] * 2
    assert int(found.steps.max()) <= n  # the space is full; a basis that is not orthogonal needs another round


def test_gmres_solves_a_rotation_and_restarted_after_one_step_says_that_it_cannot():
    b = torch.ones(1, 2, dtype=torch.float64)
    found = solve(GMRES, ROTATION.unsqueeze(0), b)
    assert statuses(found) == ["CONVERGED"]
    torch.testing.assert_close(found.z, b @ ROTATION)
    # u = c r can do nothing for r, which every M u is orthogonal to.
    stuck = solve(im.GMRES(restart=1, max_steps=200), ROTATION.unsqueeze(0), b)
    assert statuses(stuck) == ["STAGNATED"]
    assert float(stuck.residual) == pytest.approx(float(b.norm()))


@pytest.mark.parametrize("solver", ["GMRES", "BiCGStab", "DenseLU"])
def test_rotations_are_solved(solver):
    angles = torch.tensor([0.3, 1.2, 1.6, 3.0], dtype=torch.float64)
    rows = torch.stack([angles.cos(), -angles.sin(), angles.sin(), angles.cos()], 1)
    M, b = rows.reshape(4, 2, 2), draw(4, 2, seed=7)
    found = solve(SOLVERS[solver][0], M, b)
    assert statuses(found) == ["CONVERGED"] * 4
    torch.testing.assert_close(found.z, torch.linalg.solve(M, b), rtol=0, atol=1e-11)


def test_cg_on_an_indefinite_system_says_singular():
    b = torch.tensor([[0.0, 1.0, 0.0, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    found = solve(im.CG(), INDEFINITE.expand(2, 6, 6), b)
    assert statuses(found) == ["SINGULAR", "CONVERGED"]  # along the second b all curvature is positive


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_cg_may_be_asked_for_more_steps_than_there_is_to_solve(dtype):
    M, b = POSITIVE.to(dtype), draw(4, 6, seed=9).to(dtype)
    M[0], b[1] = torch.eye(6), 0
    found = solve(im.CG(rtol=0, max_steps=90), M, b)
    assert statuses(found) == ["MAX_STEPS"] * 4
    torch.testing.assert_close(found.z, torch.linalg.solve(M, b), rtol=0, atol=100 * torch.finfo(dtype).eps)


SINGULAR = torch.diag(torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64)).unsqueeze(0)
NILPOTENT = torch.tensor([[[0.0, 1.0], [0.0, 0.0]]], dtype=torch.float64)


@pytest.mark.parametrize("solver", ["GMRES", "BiCGStab", "CG"])
def test_a_singular_system_that_has_solutions_is_solved(solver):
    b = torch.tensor([[1.0, 1.0, 0.0]], dtype=torch.float64)
    found = solve(SOLVERS[solver][0], SINGULAR, b)
    assert statuses(found) == ["CONVERGED"]
    torch.testing.assert_close(found.z, torch.tensor([[1.0, 0.5, 0.0]], dtype=torch.float64))


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_singular_system_without_solutions_is_never_called_converged(solver):
    b = torch.tensor([[1.0, 1.0, 1.0]], dtype=torch.float64)
    found = solve(SOLVERS[solver][0], SINGULAR, b)
    assert statuses(found) != ["CONVERGED"]
    assert float(found.residual) >= 1 - 1e-9
    assert bool(found.z.isfinite().all())
    nilpotent = solve(SOLVERS[solver][0], NILPOTENT, torch.tensor([[0.0, 1.0]], dtype=torch.float64))
    assert statuses(nilpotent) != ["CONVERGED"]


@pytest.mark.parametrize("solver", ["GMRES", "DenseLU"])
def test_a_singular_system_without_solutions_is_called_singular(solver):
    b = torch.tensor([[1.0, 1.0, 1.0]], dtype=torch.float64)
    assert statuses(solve(SOLVERS[solver][0], SINGULAR, b)) == ["SINGULAR"]


@pytest.mark.parametrize("rows", [0.0, 8.0])
@pytest.mark.parametrize("columns", [0.0, 8.0])
def test_units_of_equations_and_unknowns_decide_nothing_about_dense_matrices(rows, columns):
    left, right = torch.logspace(-rows / 2, rows / 2, 6), torch.logspace(columns / 2, -columns / 2, 6)
    good, flat = GENERAL.float(), GENERAL.float()
    flat[:, 5] = flat[:, 0] + flat[:, 1]
    b = draw(4, 6, seed=9).float()
    found = solve(im.DenseLU(), left[:, None] * good * right, left * b)
    assert statuses(found) == ["CONVERGED"] * 4
    torch.testing.assert_close(found.z * right, torch.linalg.solve(good, b), rtol=1e-3, atol=1e-4)
    assert statuses(solve(im.DenseLU(), left[:, None] * flat * right, left * b)) == ["SINGULAR"] * 4


@pytest.mark.parametrize("solver", [name for name in SOLVERS if not name.startswith("Neumann")])
def test_a_singular_system_beside_good_ones_harms_none(solver):
    M, b = POSITIVE.clone() / 12, draw(4, 6, seed=8)
    M[2, :, 0] = M[2, 0, :] = 0
    found = solve(SOLVERS[solver][0], M, b)
    good = [0, 1, 3]
    assert [statuses(found)[i] for i in good] == ["CONVERGED"] * 3
    assert statuses(found)[2] != "CONVERGED"
    torch.testing.assert_close(found.z[good], torch.linalg.solve(M[good], b[good]), rtol=0, atol=1e-9)


@pytest.mark.parametrize("solver", SOLVERS)
@given(seed=st.integers(0, 10**6), decades=st.integers(0, 14), symmetric=st.booleans())
def test_converged_means_that_the_true_residual_is_small(solver, seed, decades, symmetric):
    U, _, V = torch.linalg.svd(draw(3, 5, 5, seed=seed))
    sizes = torch.logspace(0, -decades, 5, dtype=torch.float64)
    M, b = U @ torch.diag(sizes) @ (U.mT if symmetric else V), draw(3, 5, seed=seed + 1)
    kind = SOLVERS[solver][0]
    found = solve(type(kind)(rtol=1e-6, max_steps=200), M, b)
    residual = true_residual(M, found.z, b)
    torch.testing.assert_close(residual, found.residual, rtol=1e-3, atol=1e-9)
    # Recurrences may drift from the true residual, by an order of magnitude at the very most.
    assert bool((residual <= 1e-5 * b.norm(dim=1))[found.status == im.Status.CONVERGED].all())


def test_nan_in_one_system_is_reported_and_harms_no_other():
    for name, (solver, _) in SOLVERS.items():
        if name.startswith("Neumann"):
            solver = im.Neumann(damping=0.5)
        M, b = POSITIVE.clone() / 12, draw(4, 6, seed=9)
        M[1, 0, 0] = torch.nan
        found = solve(solver, M, b)
        assert statuses(found)[1] in ("NON_FINITE", "SINGULAR")
        assert bool(found.z.isfinite().all())


# ---------------------------------------------------------------------------------------------- the rest


def test_the_truncated_neumann_series_has_exactly_as_many_terms_as_asked_for():
    M, b = GENERAL, draw(4, 6, seed=10)
    found = solve(im.Neumann(rtol=0, max_steps=3), M, b)
    J = EYE - M
    series = sum((torch.linalg.matrix_power(J, j) @ b.unsqueeze(2)).squeeze(2) for j in range(3))
    torch.testing.assert_close(found.z, series)
    assert found.steps.tolist() == [3] * 4


def test_dense_matrices_that_do_not_fit_are_refused_with_their_size_and_a_remedy():
    with pytest.raises(
        ValueError, match=r"4 dense 6 x 6 matrices take .* GiB \(limit 1e-09 GiB\); use a matrix-free"
    ):
        solve(im.DenseLU(limit_gib=1e-9), GENERAL, draw(4, 6, seed=2))


def test_gmres_counts_one_product_a_step():
    products = []

    def bind(M):
        def operator(u):
            products.append(len(u))
            return (M @ u.unsqueeze(2)).squeeze(2)

        return operator

    b = draw(4, 6, seed=2)
    found = find(GMRES, system(bind), torch.zeros_like(b), (b, GENERAL))
    assert int(found.evaluations) == len(products)
    assert int(found.steps.max()) <= len(products) <= int(found.steps.max()) + 2  # one before, one to verify


@pytest.mark.parametrize(
    ("dtype", "condition"), [(torch.float32, 1e-5), (torch.float64, 1e-8), (torch.float64, 1e-12)]
)
def test_a_direction_in_which_all_but_cancels_is_not_called_solved(dtype, condition):
    """The one product is wrong by eps |M|, which is more than the tolerance of what is left of it."""
    U = torch.linalg.qr(matrix(12, 1.0, 5))[0]
    scales = torch.ones(12, dtype=torch.float64)
    scales[-1] = condition
    M, found = ((U * scales) @ U.mT).to(dtype), []
    b = torch.zeros(1, 12, dtype=dtype, requires_grad=True)
    adjoint = im.ImplicitAdjoint(max_steps=100, listen=found.append)  # GMRES alone, as that is asked for
    z = im.root(
        lambda z, b: z @ M.mT - b, torch.zeros_like(b), b, solver=im.Newton(), adjoint=adjoint, on_failure="ignore"
    ).value
    g = U[:, -1].to(dtype)
    (u,) = torch.autograd.grad((z * g).sum(), b)
    true = float((u.double() @ M.double() - g.double()).norm())
    (backward,) = found
    assert statuses(backward) == ["STAGNATED"]
    assert 0.3 < float(backward.residual) / true < 3  # rounding has its part in both


@pytest.mark.parametrize("scale", [1e-20, 1e18])
def test_operators_of_scales_whose_squares_float32_does_not_hold(scale):
    M, b = (torch.eye(4) + matrix(4, 0.2, 7).float()) * scale, torch.ones(1, 4)
    solution = im.linear_solve(lambda u, M: u @ M.mT, b, M)
    assert bool(solution.converged.all())
    torch.testing.assert_close(solution.value @ M.mT, b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "solver",
    [im.GMRES(), im.CG(), im.BiCGStab(), im.Neumann(damping=0.5), im.DenseLU(), im.Anderson(), im.Broyden()],
)
def test_sides_of_sizes_whose_squares_float32_does_not_hold(solver):
    M = torch.eye(6) + 0.2 * torch.ones(6, 6).tril().cos()
    M = (M + M.mT) / 2
    sizes = torch.tensor([1.0, 1e-21, 1e-25, 1e-36, 1e21, 1e36, 0.0])[:, None]
    b = torch.linspace(-1, 2, 6) * sizes
    solution = im.linear_solve(lambda u, M: u @ M.mT, b, M, solver=solver)
    assert solution.status.tolist() == [0] * 7
    found = solution.value.double() / torch.where(sizes == 0, 1.0, sizes)
    expected = torch.linalg.solve(M.double(), torch.linspace(-1, 2, 6).double()) * (sizes != 0)
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-4)
    assert bool((solution.residual.double() <= 1e-4 * b.double().norm(dim=1)).all())


def test_an_absolute_tolerance_holds_for_sides_of_any_size():
    b = torch.tensor([1e-25, 1e-30, 0.0, 1.0])[:, None] * torch.tensor([1.0, 2.0])
    solution = im.linear_solve(lambda u: 2 * u + u.flip(1), b, solver=im.GMRES(atol=1e-28))
    assert solution.status.tolist() == [0] * 4
    assert solution.steps.tolist() == [2, 0, 0, 2]  # less than the tolerance is nothing


@pytest.mark.parametrize("size", [1e-25, 1e-36, 1e25])
def test_gradients_of_tiny_and_huge_cotangents_in_float32(size):
    W, x = matrix(5, 0.4, 3).float(), draw(3, 5, seed=4).float()

    def gradients(dtype: torch.dtype, size: float) -> list[Tensor]:
        args = [t.to(dtype).requires_grad_() for t in (x, W)]
        z = im.fixed_point(lambda z, x, W: torch.tanh(z @ W.mT + x), torch.zeros(3, 5, dtype=dtype), *args).value
        return [g.double() / size for g in torch.autograd.grad(z.sum() * size, args)]

    for found, expected in zip(gradients(torch.float32, size), gradients(torch.float64, 1.0)):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: im.GMRES(restart=0), "GMRES: restart must be at least 1, got 0"),
        (lambda: im.GMRES(rtol=-1.0), "GMRES: rtol must be a finite number >= 0, got -1.0"),
        (lambda: im.CG(atol=float("nan")), "CG: atol must be a finite number >= 0, got nan"),
        (lambda: im.BiCGStab(max_steps=0), "BiCGStab: max_steps must be at least 1, got 0"),
    ],
)
def test_wrong_options_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("restart", [20, 2])
def test_units_of_an_operator_decide_nothing_about_gmres(restart):
    """In float32 squares of 1e20 are inf, those of 1e-30 zero; each sample has units of its own."""
    units = torch.tensor([1e20, 1e-30, 1.0, 3e30])[:, None]
    M, b = (GENERAL + 2 * EYE).float(), draw(4, 6, seed=2).float()
    solver = im.GMRES(rtol=1e-5, restart=restart, max_steps=200)
    found = im.linear_solve(
        lambda u, M, units: units * torch.einsum("bij,bj->bi", M, u), b, M, units, solver=solver
    )
    assert not found.status.any()
    torch.testing.assert_close(found.value * units, torch.linalg.solve(M, b), rtol=1e-4, atol=1e-5)
