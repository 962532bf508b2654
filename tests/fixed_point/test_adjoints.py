"""How each adjoint differentiates: options, identities between them, and what is refused."""

from __future__ import annotations

import warnings

import pytest
import torch

import implicitly as im
from tests.contracts import assert_close
from tests.problems import Cell, draw, matrix, unrolled

D = torch.float64
X = draw(4, 3, seed=51)
Z0 = torch.zeros(4, 3, dtype=D)


def _tanh(z, W, x):
    return torch.tanh(z @ W + x)


def gradients(adjoint, solver=None, on_failure="raise", weight=0.8):
    """Gradients for W and x of sum(sin(z)), and the solution."""
    W, x = matrix(3, weight, 52).requires_grad_(), X.clone().requires_grad_()
    solver = im.Broyden(rtol=1e-13) if solver is None else solver
    solution = im.fixed_point(_tanh, Z0, W, x, solver=solver, adjoint=adjoint, on_failure=on_failure)
    return torch.autograd.grad(solution.value.sin().sum(), (W, x)), solution


EXACT = gradients(im.ImplicitAdjoint(rtol=1e-14))[0]


# ------------------------------------------------------------------------------------- the implicit one


def test_rtol_and_max_steps_replace_those_of_the_linear_solver():
    heard = []
    for rtol in (1e-3, 1e-12):
        solver = im.Neumann(rtol=0.5, max_steps=1)
        gradients(im.ImplicitAdjoint(solver, rtol=rtol, max_steps=500, listen=heard.append))
    loose, tight = (int(found.steps.max()) for found in heard)
    assert loose < tight
    with pytest.warns(im.ConvergenceWarning, match="MAX_STEPS after 1 steps"):
        gradients(im.ImplicitAdjoint(max_steps=1), on_failure="warn")


def test_a_looser_tolerance_gives_a_gradient_as_good_as_it_says():
    for rtol in (1e-2, 1e-5, 1e-9):
        actual, _ = gradients(im.ImplicitAdjoint(rtol=rtol))
        assert_close(actual, EXACT, 10 * rtol)


def test_the_truncated_neumann_series_is_the_phantom_gradient_of_as_many_steps():
    for terms in (1, 2, 5):
        series = im.ImplicitAdjoint(linear_solver=im.Neumann(rtol=0, max_steps=terms))
        actual, _ = gradients(series, on_failure="raise")
        expected, _ = gradients(im.PhantomAdjoint(steps=terms))
        assert_close(actual, expected, 1e-12)


def test_a_symmetric_system_may_be_solved_by_cg():
    S = matrix(3, 0.6, 53)
    S, x = S + S.mT, X.clone().requires_grad_()
    S = 0.6 * S / torch.linalg.matrix_norm(S, 2)
    adjoint = im.ImplicitAdjoint(linear_solver=im.CG(rtol=1e-13))
    value = im.fixed_point(lambda z, x: z @ S + x, Z0, x, adjoint=adjoint).value
    (actual,) = torch.autograd.grad(value.sum(), x)
    assert_close(actual, torch.ones(4, 3, dtype=D) @ torch.linalg.inv(torch.eye(3, dtype=D) - S), 1e-11)


@pytest.mark.parametrize("inverse", ["start", "precondition"])
def test_broydens_estimate_of_the_inverse_saves_steps_of_the_backward_solve(inverse):
    torch.manual_seed(0)
    n = 40
    W, x = matrix(n, 0.95, 54), draw(8, n, seed=55).requires_grad_()
    steps = {}
    for how in ("ignore", inverse):
        heard = []
        adjoint = im.ImplicitAdjoint(rtol=1e-2, inverse=how, listen=heard.append)
        z0, solver = torch.zeros(8, n, dtype=D), im.Broyden(history=40)
        value = im.fixed_point(_tanh, z0, W, x, solver=solver, adjoint=adjoint).value
        torch.autograd.grad(value.sin().sum(), x)
        steps[how] = int(heard[0].steps.sum())
    assert steps[inverse] < steps["ignore"]


def test_samples_backward_solves_are_their_own():
    heard = []
    W = torch.diag(torch.tensor([0.9, 0.1, 0.5], dtype=D))
    x = torch.tensor([[0.0, 9.0, 0.0], [9.0, 9.0, 9.0], [0.1, 0.1, 0.1]], dtype=D, requires_grad=True)
    adjoint = im.ImplicitAdjoint(linear_solver=im.Neumann(max_steps=1000), listen=heard.append)
    im.fixed_point(
        lambda z, x: torch.tanh(z @ W + x), torch.zeros(3, 3, dtype=D), x, adjoint=adjoint
    ).value.sum().backward()
    steps = heard[0].steps.tolist()
    assert steps[1] < steps[2]
    assert steps[1] < 5


# ----------------------------------------------------------------------------------- the recorded one


def recorded(steps: int, damping: float = 1.0):
    """Plain damped iterations, and what they depend on."""
    W, x, z0 = (
        matrix(3, 0.8, 52).requires_grad_(),
        X.clone().requires_grad_(),
        draw(4, 3, seed=56).requires_grad_(),
    )
    z = z0
    for _ in range(steps):
        z = z + damping * (_tanh(z, W, x) - z)
    return z, (W, x, z0)


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("damping", [1.0, 0.7])
def test_unrolling_a_budget_of_plain_iterations_is_recording_them(steps, damping):
    expected, inputs = recorded(steps, damping)
    W, x, z0 = inputs
    solver = im.FixedPointIteration(rtol=0, max_steps=steps, damping=damping)
    value = im.fixed_point(_tanh, z0, W, x, solver=solver, adjoint=im.UnrolledAdjoint()).value
    torch.testing.assert_close(value, expected, rtol=0, atol=1e-15)
    for _ in range(2):
        actual = torch.autograd.grad(value.sin().sum(), inputs, create_graph=True)
        wanted = torch.autograd.grad(expected.sin().sum(), inputs, create_graph=True)
        assert_close(actual, wanted, 1e-13)
        value, expected = (sum(g.sin().sum() for g in group).reshape(1) for group in (actual, wanted))


def test_unrolling_differentiates_parameters_and_captured_tensors_like_any_recorded_code():
    cell, shift = Cell(), draw(3, seed=57).requires_grad_()
    f = lambda z: cell(z, X) + 0.1 * shift  # noqa: E731
    inputs = (*cell.parameters(), shift)
    solver = im.FixedPointIteration(rtol=1e-14)
    value = im.fixed_point(f, Z0, solver=solver, adjoint=im.UnrolledAdjoint()).value
    expected = torch.autograd.grad(unrolled(f, Z0)().sin().sum(), inputs)
    assert_close(torch.autograd.grad(value.sin().sum(), inputs), expected, 1e-10)


def test_unrolling_reports_failures_like_every_other_adjoint():
    solver = im.FixedPointIteration(max_steps=2)
    with pytest.warns(im.ConvergenceWarning, match="MAX_STEPS after 2 steps"):
        gradients(im.UnrolledAdjoint(), solver, on_failure="warn")
    with pytest.raises(im.SolverError, match="MAX_STEPS after 2 steps"):
        gradients(im.UnrolledAdjoint(), solver, on_failure="raise")


# ---------------------------------------------------------------------------------- the inexact ones


def test_inexact_adjoints_leave_the_value_alone():
    _, exact = gradients(im.ImplicitAdjoint())
    for adjoint in (im.PhantomAdjoint(steps=7, damping=0.5), im.JacobianFreeAdjoint()):
        _, solution = gradients(adjoint)
        assert torch.equal(solution.value, exact.value)
        assert solution.evaluations == exact.evaluations


def test_the_phantom_gradient_tends_to_the_exact_one():
    errors = []
    for steps in (1, 4, 16, 64):
        actual, _ = gradients(im.PhantomAdjoint(steps=steps))
        errors.append(max(float((a - e).abs().max()) for a, e in zip(actual, EXACT)))
    assert errors[0] > 0.01
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-7


def test_one_phantom_step_is_the_jacobian_free_gradient():
    assert_close(gradients(im.JacobianFreeAdjoint())[0], gradients(im.PhantomAdjoint(steps=1))[0], 1e-15)


def test_the_jacobian_free_gradient_is_a_descent_direction_of_a_contraction():
    actual, _ = gradients(im.JacobianFreeAdjoint())
    for a, e in zip(actual, EXACT):
        assert float(torch.nn.functional.cosine_similarity(a.flatten(), e.flatten(), dim=0)) > 0.8


# ------------------------------------------------------------------------------------------- samples


@pytest.mark.parametrize(
    "adjoint",
    [im.ImplicitAdjoint(), im.PhantomAdjoint(), im.JacobianFreeAdjoint()],
    ids=lambda a: type(a).__name__,
)
def test_a_diverged_sample_has_zero_gradient(adjoint):
    slope = torch.tensor([[0.5], [3.0]], dtype=D, requires_grad=True)
    value = im.fixed_point(
        lambda z, s: s * z + 1,
        torch.zeros(2, 1, dtype=D),
        slope,
        solver=im.FixedPointIteration(),
        adjoint=adjoint,
        on_failure="ignore",
    ).value
    (gradient,) = torch.autograd.grad(value.sum(), slope)
    assert float(gradient[1]) == 0
    assert float(gradient[0]) > 1


@pytest.mark.parametrize("adjoint", [im.ImplicitAdjoint(), im.PhantomAdjoint(), im.UnrolledAdjoint()], ids=repr)
def test_an_f_undefined_at_a_sample_names_in_dims_where_it_spoils_the_gradient_of_others(adjoint):
    """0 * inf: only who knows which args hold the samples can leave the one without a solution out."""
    W = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    x = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    f = lambda z, x, W: W * torch.log(x) + 0.1 * z  # noqa: E731

    def gradient(**options):
        solution = im.fixed_point(f, torch.ones_like(x), x, W, adjoint=adjoint, **options)
        return torch.autograd.grad(solution.value[0].sum(), W)[0]

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        spoilt = gradient()
    assert spoilt.isnan()
    assert any("in_dims" in str(w.message) for w in caught)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert gradient(in_dims=(0, None)).isfinite()
