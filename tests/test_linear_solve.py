"""Linear systems as layers: value and derivatives against `torch.linalg`, transposed systems, failures."""

from __future__ import annotations

import pytest
import torch

import implicitly as im
from tests.problems import draw, matrix

D = torch.float64
EYE = torch.eye(4, dtype=D)
M = EYE + matrix(4, 0.8, 1)
POSITIVE = EYE + matrix(4, 0.8, 1) @ matrix(4, 0.8, 1).mT
B = draw(3, 4, seed=2)
SOLVERS = [im.GMRES(rtol=1e-13), im.BiCGStab(rtol=1e-13), im.CG(rtol=1e-13), im.DenseLU(rtol=1e-13),
           im.Neumann(rtol=1e-13, damping=0.5, max_steps=1000), im.Anderson(rtol=1e-13)]  # fmt: skip


def apply(u, M):
    return u @ M.mT


def exact(M, b):
    return b @ torch.linalg.inv(M).mT


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
def test_the_value_is_the_solution_whatever_the_solver(solver):
    solution = im.linear_solve(apply, B, POSITIVE, solver=solver)
    torch.testing.assert_close(solution.value, exact(POSITIVE, B), rtol=0, atol=1e-11)
    assert bool(solution.converged.all())
    assert solution.status.shape == solution.residual.shape == solution.steps.shape == (3,)


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
def test_gradients_of_operator_and_right_hand_side_are_exact(solver):
    b, A = B.clone().requires_grad_(), POSITIVE.clone().requires_grad_()
    halves = lambda: 0.5 * (A + A.mT)  # noqa: E731  # cg needs a symmetric operator
    value = im.linear_solve(apply, b, halves(), solver=solver).value
    actual = torch.autograd.grad(value.sin().sum(), (b, A))
    expected = torch.autograd.grad(exact(halves(), b).sin().sum(), (b, A))
    for a, e in zip(actual, expected):
        torch.testing.assert_close(a, e, rtol=0, atol=1e-10)


def test_the_transposed_system_needs_no_other_operator():
    value = im.linear_solve(apply, B, M, transpose=True, solver=im.GMRES(rtol=1e-13)).value
    torch.testing.assert_close(value, exact(M.mT, B), rtol=0, atol=1e-11)


def test_a_complex_operator_is_transposed_as_a_real_map():
    A = torch.eye(3, dtype=torch.complex128) + matrix(3, 0.7, 3, dtype=torch.complex128)
    b = draw(2, 3, seed=4, dtype=torch.complex128)
    torch.testing.assert_close(im.linear_solve(apply, b, A).value, exact(A, b), rtol=1e-9, atol=1e-9)
    adjoint = im.linear_solve(apply, b, A, transpose=True).value
    torch.testing.assert_close(adjoint, exact(A.mH, b), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("transpose", [False, True])
def test_derivatives_of_every_order_and_both_modes(transpose):
    def solve(b, A):
        return im.linear_solve(apply, b, A, transpose=transpose, solver=im.GMRES(rtol=1e-13)).value

    inputs = (B[:2].clone().requires_grad_(), M.clone().requires_grad_())
    assert torch.autograd.gradcheck(solve, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(solve, inputs, fast_mode=True, check_fwd_over_rev=True)


def test_transforms_of_torch_func():
    solve = lambda b: im.linear_solve(apply, b, M, solver=im.GMRES(rtol=1e-13)).value  # noqa: E731
    inverse = torch.linalg.inv(M)
    for jacobian in (torch.func.jacrev, torch.func.jacfwd):
        J = jacobian(lambda b: solve(b.unsqueeze(0))[0])(B[0])
        torch.testing.assert_close(J, inverse, rtol=0, atol=1e-11)
    stacked = draw(5, 3, 4, seed=5)
    torch.testing.assert_close(torch.func.vmap(solve)(stacked), stacked @ inverse.mT, rtol=0, atol=1e-11)


def test_a_right_hand_side_may_be_a_pytree_or_one_system():
    b = {"x": B[:, :2], "y": B[:, 2:]}
    operator = lambda u, A: dict(zip("xy", (torch.cat([u["x"], u["y"]], 1) @ A.mT).split(2, 1)))  # noqa: E731
    value = im.linear_solve(operator, b, M).value
    torch.testing.assert_close(torch.cat([value["x"], value["y"]], 1), exact(M, B), rtol=1e-8, atol=1e-9)
    one = im.linear_solve(lambda u, A: A @ u, B.T, M, batch_dims=0)
    torch.testing.assert_close(one.value, torch.linalg.solve(M, B.T), rtol=1e-8, atol=1e-9)
    assert one.status.shape == ()


def test_parameters_of_an_operator_that_is_a_module_get_gradients():
    layer = torch.nn.Linear(4, 4, bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(M)
    value = im.linear_solve(layer, B, solver=im.GMRES(rtol=1e-13)).value
    (actual,) = torch.autograd.grad(value.sin().sum(), layer.weight)
    A = M.clone().requires_grad_()
    (expected,) = torch.autograd.grad(exact(A, B).sin().sum(), A)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


def test_a_singular_system_raises_with_what_it_got_to():
    scale = torch.tensor([[1.0, 1.0], [1.0, 0.0]], dtype=D)
    b = torch.ones(2, 2, dtype=D)
    with pytest.raises(
        im.SolverError, match=r"linear_solve: GMRES did not converge for 1 of 2 .*1 SINGULAR"
    ) as caught:
        im.linear_solve(lambda u, s: s * u, b, scale)
    assert [im.Status(int(s)).name for s in caught.value.solution.status] == ["CONVERGED", "SINGULAR"]


def test_a_singular_sample_has_zero_gradient_and_harms_no_other():
    scale = torch.tensor([[2.0, 2.0], [1.0, 0.0]], dtype=D, requires_grad=True)
    b = torch.ones(2, 2, dtype=D, requires_grad=True)
    value = im.linear_solve(lambda u, s: s * u, b, scale, on_failure="ignore").value
    gradients = torch.autograd.grad(value.sum(), (scale, b))
    torch.testing.assert_close(gradients[0], torch.tensor([[-0.25, -0.25], [0.0, 0.0]], dtype=D))
    torch.testing.assert_close(gradients[1], torch.tensor([[0.5, 0.5], [0.0, 0.0]], dtype=D))


def test_bad_input_is_refused():
    with pytest.raises(TypeError, match=r"b has dtype torch\.int64"):
        im.linear_solve(apply, torch.ones(2, 4, dtype=torch.int64), M)
    with pytest.raises(ValueError, match=r"expected \(3, 4\), got \(3, 2\)"):
        im.linear_solve(lambda u: u[:, :2], B)
    A = M.clone().requires_grad_()
    with pytest.raises(ValueError, match="Pass it in args"):
        im.linear_solve(lambda u: u @ A, B)
    with pytest.raises(ValueError, match="cannot reach rtol"):
        im.linear_solve(apply, B, M, solver=im.GMRES(rtol=1e-17))
    with pytest.raises(ValueError, match="on_failure"):
        im.linear_solve(apply, B, M, on_failure="never")


def test_an_operator_that_is_not_linear_is_refused_or_never_called_converged():
    for operator in (lambda u: u + 1, lambda u: u + u**3):
        try:
            solution = im.linear_solve(operator, B, on_failure="ignore")
        except ValueError as error:
            assert "linear" in str(error)  # noqa: PT017
            continue
        good = (operator(solution.value) - B).norm(dim=1) <= 1e-6 * B.norm(dim=1)
        assert bool((good | ~solution.converged).all())


def test_the_residual_reported_is_that_of_the_value():
    """Of a singular system GMRES may get to less than nothing; then 0 is the answer, and |b| its residual."""
    torch.manual_seed(2)
    A = torch.eye(5, dtype=torch.float64) + 0.1 * torch.randn(5, 5, dtype=torch.float64)
    A[:, 0] = A[:, 1]
    b = torch.randn(1, 5, dtype=torch.float64)
    solution = im.linear_solve(lambda u, A: u @ A.T, b, A, on_failure="ignore")
    assert solution.residual[0].item() == pytest.approx((b - solution.value @ A.T).norm().item(), rel=1e-6)


REMEDIES = [
    (3 * EYE, im.Neumann(), "DIVERGED", "lower damping, or use GMRES"),
    (-EYE, im.CG(), "SINGULAR", "use GMRES if CG was used, as the operator may not be positive definite"),
    (float("nan") * EYE, im.GMRES(), "NON_FINITE", "what the operator returns, for NaN or inf"),
    (M, im.GMRES(max_steps=1), "MAX_STEPS", "raise max_steps, loosen rtol"),
]


@pytest.mark.parametrize("constant", [1.0, torch.tensor([0.0, 0, 0, 1e-30], dtype=D), 1j], ids=str)
def test_an_operator_with_a_constant_term_is_refused(constant):
    b = B.to(torch.result_type(B, constant))
    refused = pytest.raises(ValueError, match=r"not linear: it maps u = 0 to 1.*subtract it from b")
    with refused:
        im.linear_solve(lambda u: 2 * u + constant, b, on_failure="ignore")
    with refused:
        torch.func.vmap(lambda b: im.linear_solve(lambda u: 2 * u + constant, b, batch_dims=0).value)(b)


def test_where_no_residual_falls_the_operator_is_asked_after():
    with pytest.raises(im.SolverError, match=r"STAGNATED.*Try: .*check that the operator is linear in u"):
        im.linear_solve(lambda u: u**2, torch.ones(2, 3))


@pytest.mark.parametrize(("A", "solver", "status", "remedy"), REMEDIES, ids=[r[2] for r in REMEDIES])
def test_what_to_try_is_said_of_linear_systems(A, solver, status, remedy):
    with pytest.raises(im.SolverError, match=f"{status}.*Try: .*{remedy}"):
        im.linear_solve(apply, B, A, solver=solver)


def test_what_to_try_is_said_of_their_derivatives():
    b = B.clone().requires_grad_()
    value = im.linear_solve(apply, b, M, on_failure="warn").value
    with pytest.warns(im.ConvergenceWarning, match="backward solve.*the incoming gradient"):
        (value * float("nan")).sum().backward()
