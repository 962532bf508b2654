"""The implicit function theorem, and what is said when a solve falls short."""

from __future__ import annotations

import warnings

import pytest
import torch

import implicitly as im
from implicitly.condition import Condition, Report
from implicitly.implicit import Backward, attach
from tests.problems import Cell, draw, matrix

D = torch.float64


def _half(z, x):
    return 0.5 * z + x


# -------------------------------------------------------------------------------------------- the theorem


def _circle(on_failure: str = "raise") -> Condition:
    """z^2 + theta^2 = 1: dz/dtheta = -theta / z whoever found z, by whatever means."""
    bind = lambda theta: lambda z: 1 - z**2 - theta**2  # noqa: E731
    return Condition(bind=bind, name="circle", dtype=D, report=Report(on_failure))


def test_the_derivative_is_that_of_the_condition_not_of_how_the_point_was_found():
    theta = torch.tensor([[0.6], [-0.8]], dtype=D, requires_grad=True)
    point = torch.tensor([[0.8], [-0.6]], dtype=D)  # given, not solved for
    z = attach(_circle(), point, (theta,), Backward(im.GMRES()))
    assert torch.equal(z, point)
    first, *_ = torch.autograd.grad(z.sum(), theta, create_graph=True)
    torch.testing.assert_close(first, -theta.detach() / point)
    second, *_ = torch.autograd.grad(first.sum(), theta, create_graph=True)
    torch.testing.assert_close(second, -1 / point**3)  # z'' = -(1 + z'^2) / z
    third, *_ = torch.autograd.grad(second.sum(), theta)
    torch.testing.assert_close(third, -3 * theta.detach() / point**5)


def test_both_branches_of_a_condition_get_their_own_derivative():
    theta = torch.tensor([[0.6], [0.6]], dtype=D, requires_grad=True)
    z0 = torch.tensor([[1.0], [-1.0]], dtype=D)
    z = im.root(lambda z, t: z**2 + t**2 - 1, z0, theta).value
    (gradient,) = torch.autograd.grad(z.sum(), theta)
    torch.testing.assert_close(gradient, torch.tensor([[-0.75], [0.75]], dtype=D))


def test_the_derivative_of_an_underdetermined_direction_is_zero_for_args_that_do_not_matter():
    x, unused = (draw(3, 2, seed=i).requires_grad_() for i in (1, 2))
    z = im.fixed_point(lambda z, x, unused: 0.5 * z + x + 0 * unused, torch.zeros(3, 2, dtype=D), x, unused).value
    gradients = torch.autograd.grad(z.sum(), (x, unused))
    torch.testing.assert_close(gradients[0], torch.full((3, 2), 2.0, dtype=D))
    assert not gradients[1].any()


def test_an_arg_that_f_ignores_gets_a_zero_gradient_or_none():
    x, ignored = (draw(3, 2, seed=i).requires_grad_() for i in (1, 2))
    z = im.fixed_point(lambda z, x, ignored: 0.5 * z + x, torch.zeros(3, 2, dtype=D), x, ignored).value
    _, gradient = torch.autograd.grad(z.sum(), (x, ignored), allow_unused=True)
    assert gradient is None or not gradient.any()


def test_integer_and_boolean_args_pass_through_beside_differentiable_ones():
    x, index = draw(3, 2, seed=1).requires_grad_(), torch.tensor([0, 1, 1])
    f = lambda z, x, index, mask: torch.where(mask, 0.5 * z + x[index], x)  # noqa: E731
    mask = torch.tensor([[True, False]] * 3)
    z = im.fixed_point(f, torch.zeros(3, 2, dtype=D), x, index, mask).value
    (gradient,) = torch.autograd.grad(z.sum(), x)
    torch.testing.assert_close(gradient, torch.tensor([[2.0, 1.0], [4.0, 1.0], [0.0, 1.0]], dtype=D))


def test_nothing_is_recorded_where_nothing_requires_a_gradient():
    x = draw(3, 2, seed=1)
    assert not im.fixed_point(_half, torch.zeros(3, 2, dtype=D), x).value.requires_grad
    x.requires_grad_()
    with torch.no_grad():
        assert not im.fixed_point(_half, torch.zeros(3, 2, dtype=D), x).value.requires_grad
    with torch.inference_mode():
        value = im.fixed_point(_half, torch.zeros(3, 2, dtype=D), x).value
        torch.testing.assert_close(value, 2 * x)


def test_status_residual_and_steps_hold_no_graph():
    x = draw(3, 2, seed=1).requires_grad_()
    solution = im.fixed_point(_half, torch.zeros(3, 2, dtype=D), x)
    assert solution.value.requires_grad
    assert not any(t.requires_grad for t in (solution.status, solution.residual, solution.steps))


def test_solves_are_deterministic_and_leave_the_random_state_alone():
    x = draw(4, 3, seed=1).requires_grad_()
    cell = Cell()
    before = torch.get_rng_state()

    def run(solver):
        value = im.fixed_point(cell, torch.zeros(4, 3, dtype=D), x, solver=solver).value
        return value, *torch.autograd.grad(value.sin().sum(), (x, *cell.parameters()))

    for solver in (im.Anderson(), im.Broyden(), im.Newton(), im.NewtonKrylov()):
        assert all(torch.equal(a, b) for a, b in zip(run(solver), run(solver)))
    assert torch.equal(torch.get_rng_state(), before)


def test_samples_out_of_steps_keep_the_gradient_at_their_best_iterate():
    x = torch.ones(2, 1, dtype=D, requires_grad=True)
    solver = im.FixedPointIteration(max_steps=3)
    value = im.fixed_point(
        lambda z, x: torch.sin(z) + x, torch.zeros(2, 1, dtype=D), x, solver=solver, on_failure="ignore"
    ).value
    (gradient,) = torch.autograd.grad(value.sum(), x)
    torch.testing.assert_close(gradient, 1 / (1 - value.detach().cos()))


# -------------------------------------------------------------------------------------------- the report


def _mixed_failures(on_failure: str) -> im.Solution:
    """Sample 0 converges, 1 diverges, 2 is NaN and 3 needs more steps."""
    slope = torch.tensor([[0.1], [10.0], [float("nan")], [0.99]], dtype=D)
    return im.fixed_point(
        lambda z, s: s * z + 1,
        torch.zeros(4, 1, dtype=D),
        slope,
        solver=im.FixedPointIteration(max_steps=40),
        on_failure=on_failure,
    )


def test_a_failure_says_what_happened_where_and_what_to_try():
    with pytest.raises(im.SolverError) as caught:
        _mixed_failures("raise")
    message = str(caught.value)
    assert message.startswith("fixed_point: FixedPointIteration did not converge for 3 of 4 samples")
    assert "1 MAX_STEPS, 1 DIVERGED, 1 NON_FINITE" in message
    assert "Worst is sample 2: NON_FINITE after 0 steps with residual norm nan" in message
    assert "Try: check the inputs of f, which returned NaN or inf" in message


def test_the_error_carries_the_solution():
    with pytest.raises(im.SolverError) as caught:
        _mixed_failures("raise")
    solution = caught.value.solution
    assert isinstance(solution, im.Solution)
    assert [im.Status(int(s)).name for s in solution.status] == [
        "CONVERGED",
        "DIVERGED",
        "NON_FINITE",
        "MAX_STEPS",
    ]
    torch.testing.assert_close(solution.value[0], torch.tensor([1 / 0.9], dtype=D))
    assert solution.value.shape == (4, 1)
    assert solution.residual.shape == solution.steps.shape == (4,)


def test_the_value_of_an_error_has_the_structure_of_the_start():
    with pytest.raises(im.SolverError) as caught:
        im.root(lambda z: {"a": z["a"] ** 2 + 1}, {"a": torch.zeros(2, 3)})
    assert caught.value.solution.value["a"].shape == (2, 3)


def test_warn_warns_and_ignore_is_silent():
    with pytest.warns(im.ConvergenceWarning, match="did not converge for 3 of 4 samples"):
        _mixed_failures("warn")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _mixed_failures("ignore").converged.tolist() == [True, False, False, False]


def test_a_warning_points_at_the_line_of_the_user():
    with pytest.warns(im.ConvergenceWarning) as caught:
        im.fixed_point(lambda z: z + 1, torch.zeros(1, 1), solver=im.FixedPointIteration(max_steps=2))
    assert caught[0].filename == __file__


REMEDIES = [
    (lambda z: 0.99 * z + 1, im.FixedPointIteration(max_steps=5), "MAX_STEPS", "raise max_steps"),
    (lambda z: 9.0 * z + 1, im.FixedPointIteration(), "DIVERGED", "use Anderson, Broyden or Newton"),
    (lambda z: -z + 1, im.FixedPointIteration(), "STAGNATED", "the residual has stopped decreasing"),
    (lambda z: z + 1, im.Newton(), "SINGULAR", "the Jacobian is singular there"),
    (
        lambda z: torch.log(z - 1),
        im.Anderson(),
        "NON_FINITE",
        "check the inputs of f, which returned NaN or inf, or start closer",
    ),
]


@pytest.mark.parametrize(("f", "solver", "status", "remedy"), REMEDIES, ids=[r[2] for r in REMEDIES])
def test_every_way_to_fail_has_its_remedy(f, solver, status, remedy):
    with pytest.raises(im.SolverError, match=remedy) as caught:
        im.fixed_point(f, torch.zeros(1, 1, dtype=D), solver=solver, on_failure="raise")
    assert f"1 {status}" in str(caught.value)


# --------------------------------------------------------------------------------- the backward solve


def _hard_backward(on_failure: str, linear_solver=im.Neumann(max_steps=2), batch: int = 1) -> torch.Tensor:
    x = torch.ones(batch, 2, dtype=D, requires_grad=True)
    W = matrix(2, 0.9, 1)
    value = im.fixed_point(
        lambda z, x: z @ W + x,
        torch.zeros(batch, 2, dtype=D),
        x,
        solver=im.Newton(),
        adjoint=im.ImplicitAdjoint(linear_solver=linear_solver),
        on_failure=on_failure,
    ).value
    (gradient,) = torch.autograd.grad(value.sum(), x)
    return gradient


def test_a_backward_solve_that_falls_short_warns():
    with pytest.warns(im.ConvergenceWarning, match="the backward solve of fixed_point: Neumann did not converge"):
        _hard_backward("warn")


def test_a_backward_solve_that_falls_short_raises_with_its_solution():
    with pytest.raises(im.SolverError, match="the backward solve of fixed_point") as caught:
        _hard_backward("raise")
    assert caught.value.solution.steps.tolist() == [2]
    assert not caught.value.solution.value.requires_grad


def test_a_forward_mode_solve_that_falls_short_says_so():
    W, x = matrix(2, 0.9, 1), torch.ones(1, 2, dtype=D)
    adjoint = im.ImplicitAdjoint(linear_solver=im.Neumann(max_steps=2))

    def value(x):
        z0 = torch.zeros(1, 2, dtype=D)
        return im.fixed_point(lambda z, x: z @ W + x, z0, x, solver=im.Newton(), adjoint=adjoint).value

    with pytest.warns(im.ConvergenceWarning, match="the forward-mode solve of fixed_point"):
        torch.func.jvp(value, (x,), (x,))


def test_a_singular_jacobian_gives_a_reported_zero_gradient_and_leaves_the_others_alone():
    """(z - a)^2 (z - 3): the root a is double for sample 0, where dF/dz = 0."""
    a = torch.tensor([[1.0], [2.0]], dtype=D, requires_grad=True)
    z0 = torch.tensor([[1.0], [3.0]], dtype=D)
    value = im.root(lambda z, a: (z - a) ** 2 * (z - 1.5 * a), z0, a, on_failure="warn").value
    with pytest.warns(im.ConvergenceWarning, match="the backward solve of root: .* for 1 of 2"):
        (gradient,) = torch.autograd.grad(value.sum(), a)
    torch.testing.assert_close(gradient, torch.tensor([[0.0], [1.5]], dtype=D))


@pytest.mark.parametrize(
    "linear_solver",
    [im.GMRES(), im.BiCGStab(), im.CG(), im.DenseLU(), im.Neumann(), im.Anderson(), im.Broyden()],
    ids=lambda s: type(s).__name__,
)
def test_a_singular_jacobian_is_reported_whatever_solves_the_backward_system(linear_solver):
    x = torch.zeros(1, 2, dtype=D, requires_grad=True)
    # f(z) = z * (1, 1/2) + x: any z_0 is a solution where x_0 = 0, and none has a derivative.
    scale = torch.tensor([1.0, 0.5], dtype=D)
    adjoint = im.ImplicitAdjoint(linear_solver=linear_solver)
    value = im.fixed_point(lambda z, x: z * scale + x, torch.zeros(1, 2, dtype=D), x, adjoint=adjoint).value
    with pytest.warns(im.ConvergenceWarning, match="the backward solve"):
        (gradient,) = torch.autograd.grad(value.sum(), x)
    assert bool(gradient.isfinite().all())
    assert not gradient.any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-3, 1e-9, 1e9])
@pytest.mark.parametrize("linear_solver", [im.GMRES(), im.BiCGStab(), im.DenseLU(), im.Neumann(), im.Anderson()])
def test_the_gradient_of_a_scaled_loss_is_the_scaled_gradient(linear_solver, scale, dtype):
    x = torch.ones(2, 3, dtype=dtype, requires_grad=True)
    adjoint = im.ImplicitAdjoint(linear_solver=linear_solver)
    value = im.fixed_point(_half, torch.zeros(2, 3, dtype=dtype), x, adjoint=adjoint).value
    (gradient,) = torch.autograd.grad(value, x, torch.full_like(value, scale))
    torch.testing.assert_close(gradient / scale, torch.full_like(value, 2.0), rtol=0.05, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_tangent_of_a_small_direction_is_as_small(dtype):
    x = torch.ones(2, 3, dtype=dtype)
    solve = lambda x: im.fixed_point(_half, torch.zeros(2, 3, dtype=dtype), x).value  # noqa: E731
    _, tangent = torch.func.jvp(solve, (x,), (torch.full_like(x, 1e-9),))
    torch.testing.assert_close(tangent * 1e9, torch.full_like(x, 2.0), rtol=0.05, atol=0)


def test_listen_hears_every_backward_solve():
    heard = []
    x = draw(3, 2, seed=1).requires_grad_()
    adjoint = im.ImplicitAdjoint(listen=heard.append)
    value = im.fixed_point(_half, torch.zeros(3, 2, dtype=D), x, adjoint=adjoint).value
    assert not heard
    value.sum().backward()
    assert len(heard) == 1
    assert heard[0].z.shape == (3, 2)
    torch.testing.assert_close(heard[0].z, torch.full((3, 2), 2.0, dtype=D))
    assert heard[0].status.tolist() == [0, 0, 0]


def test_a_failed_sample_beside_an_arg_that_is_a_lazy_conjugate():
    c = torch.tensor([[0.3 + 0.2j], [5e200]], dtype=torch.complex128, requires_grad=True)
    start, solver = torch.ones(2, 2, dtype=torch.complex128), im.FixedPointIteration(max_steps=50)
    gradients = []
    for given in (c.conj(), c.conj().resolve_conj()):
        solution = im.fixed_point(lambda z, c: c * z * z + 1, start, given, solver=solver, on_failure="ignore")
        assert solution.status.tolist() == [int(im.Status.MAX_STEPS), int(im.Status.NON_FINITE)]
        gradients += torch.autograd.grad(solution.value.real.sum(), c)
    assert torch.equal(*gradients)
    assert gradients[0][1] == 0


def test_where_the_default_falls_short_some_hundred_unknowns_have_a_dense_matrix():
    """A Jacobian for which GMRES would take more steps than it has by default."""
    n = 400
    A = torch.logspace(0, 6, n, dtype=D).diag() + 0.01 * matrix(n, 1.0, 3)
    b = draw(1, n, seed=4).requires_grad_()
    z = im.root(lambda z, b: z @ A.T - b, torch.zeros_like(b), b, solver=im.Newton()).value
    (found,) = torch.autograd.grad(z.sum(), b)
    torch.testing.assert_close(found[0], torch.linalg.solve(A.T, torch.ones(n, dtype=D)), rtol=1e-8, atol=1e-12)


def _qp(p):
    eye = torch.eye(3, dtype=D)
    return im.qp(eye, p, torch.cat([eye, -eye]), torch.ones(6, dtype=D)).value


OVERFLOWING = {
    "root": lambda p: im.root(lambda z, p: z**3 + z - p, torch.zeros_like(p), p).value,
    "argmin": lambda p: im.argmin(lambda z, p: ((z - p) ** 2 + z**4).sum(-1), torch.zeros_like(p), p).value,
    "qp": _qp,
    "linear_solve": lambda p: im.linear_solve(lambda u: 3 * u, p).value,
}


@pytest.mark.parametrize("name", OVERFLOWING)
def test_the_gradient_scaler_leaves_out_a_step_that_overflows(name):
    """Only a warning: an error would end the training, where the scaler goes on with a smaller scale."""
    parameter = torch.nn.Parameter(0.3 * torch.ones(2, 3, dtype=D))
    optimizer, scaler = torch.optim.SGD([parameter], 0.1), torch.amp.GradScaler("cpu")
    loss = OVERFLOWING[name](parameter).sum()
    with pytest.warns(im.ConvergenceWarning, match=f"backward solve of {name}.*the incoming gradient"):
        scaler.scale(loss * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(parameter.detach(), torch.full_like(parameter, 0.3))
    assert scaler.get_scale() == 2.0**15
    with pytest.warns(im.ConvergenceWarning, match="backward solve"):  # only that of the good sample is finite
        (OVERFLOWING[name](parameter) * torch.tensor([[1.0], [float("nan")]])).sum().backward()
