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


def ill_conditioned_root(adjoint, on_failure="raise"):
    """A, and the gradient of the sum of A^-1 b by b: 60 unknowns, of the condition 1e4."""
    U, V = (torch.linalg.qr(draw(60, 60, seed=seed)).Q for seed in (3, 4))
    A = U @ torch.diag(torch.logspace(0, -4, 60, dtype=D)) @ V
    b = draw(1, 60, seed=5).requires_grad_()
    z = im.root(lambda z, b: z @ A.mT - b, torch.zeros(1, 60, dtype=D), b, adjoint=adjoint, on_failure=on_failure)
    return A, torch.autograd.grad(z.value.sum(), b)[0]


def test_what_the_default_leaves_of_a_small_system_is_solved_by_its_matrix():
    heard = []
    A, by_b = ill_conditioned_root(im.ImplicitAdjoint(listen=heard.append))
    exact = torch.linalg.solve(A.mT, torch.ones(60, dtype=D))[None]
    torch.testing.assert_close(by_b, exact, rtol=1e-6, atol=0)
    assert heard[0].evaluations > 100


@pytest.mark.parametrize("options", [{"max_steps": 20}, {"linear_solver": im.GMRES(restart=10)}])
def test_what_somebody_has_chosen_is_all_there_is(options):
    with pytest.warns(im.ConvergenceWarning, match="GMRES did not converge"):
        ill_conditioned_root(im.ImplicitAdjoint(**options), on_failure="warn")


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


# ------------------------------------------------------------- the call of f that solve and gradient share

BUDGETS = [
    im.FixedPointIteration(rtol=0, max_steps=1),
    im.FixedPointIteration(rtol=0, max_steps=4),
    im.Anderson(rtol=0, max_steps=3),
    im.Broyden(rtol=0, max_steps=3),
    im.Broyden(rtol=0, max_steps=3, line_search=True),
    im.Newton(rtol=0, max_steps=2),
]
INEXACT = [im.JacobianFreeAdjoint(), im.PhantomAdjoint(steps=3, damping=0.7)]


def counted(f):
    """f, and the list that gets an entry for each call."""
    calls = []

    def call(z, *args):
        calls.append(len(z))
        return f(z, *args)

    return call, calls


def iterations(adjoint):
    return getattr(adjoint, "steps", 1), getattr(adjoint, "damping", 1.0)


@pytest.mark.host  # elsewhere it is not asked whether all went well until then, and f is called once more
@pytest.mark.parametrize("adjoint", INEXACT, ids=repr)
@pytest.mark.parametrize("solver", BUDGETS, ids=repr)
def test_the_last_call_of_a_number_of_steps_is_the_first_that_is_recorded(solver, adjoint):
    (f, calls), W = counted(_tanh), matrix(3, 0.8, 52)
    with torch.no_grad():
        expected = im.fixed_point(f, Z0, W, X, solver=solver, adjoint=adjoint)
    assert len(calls) == expected.evaluations or isinstance(solver, im.Newton)  # which also calls it for Jacobians
    alone = len(calls)
    z, inputs = expected.value, (W.clone().requires_grad_(), X.clone().requires_grad_())
    steps, damping = iterations(adjoint)
    for _ in range(steps):
        z = z + damping * (_tanh(z, *inputs) - z)

    calls.clear()
    solution = im.fixed_point(f, Z0, *inputs, solver=solver, adjoint=adjoint)
    nested = isinstance(solver, im.Newton) or solver.nests  # their last call is made to choose the step
    assert len(calls) == alone + steps - (not nested)
    for name in ("value", "status", "residual", "steps"):
        assert torch.equal(getattr(solution, name), getattr(expected, name)), name
    assert solution.evaluations == expected.evaluations
    assert not solution.residual.requires_grad
    weights = draw(4, 3, seed=58)
    actual = torch.autograd.grad(solution.value, inputs, weights, create_graph=True)
    wanted = torch.autograd.grad(z, inputs, weights, create_graph=True)
    assert_close(actual, wanted, 1e-14)
    second = [torch.autograd.grad(sum(g.sin().sum() for g in group), inputs) for group in (actual, wanted)]
    assert_close(*second, 1e-13)


@pytest.mark.parametrize("adjoint", INEXACT, ids=repr)
@pytest.mark.parametrize("solver", [im.Anderson(), im.Anderson(rtol=0, max_steps=3)], ids=repr)
def test_f_is_not_called_for_a_gradient_that_nobody_can_ask_for(solver, adjoint):
    (f, calls), W = counted(_tanh), matrix(3, 0.8, 52)
    solution = im.fixed_point(f, Z0, W, X, solver=solver, adjoint=adjoint)
    assert len(calls) == solution.evaluations
    assert not solution.value.requires_grad
    calls.clear()
    with torch.no_grad():
        solution = im.fixed_point(f, Z0, W.requires_grad_(), X, solver=solver, adjoint=adjoint)
    assert len(calls) == solution.evaluations


def _fails_at(call, sample=1):
    """Calls of an f like `_tanh` that is NaN for one sample from its `call`, counted from 1."""
    calls = []

    def f(z, W, x, name):
        calls.append(len(z))
        failing = (name == sample) & (len(calls) >= call) & (call > 0)
        return torch.where(failing[:, None], torch.nan, _tanh(z, W, x))

    return f, calls


@pytest.mark.host
@pytest.mark.parametrize("adjoint", INEXACT, ids=repr)
@pytest.mark.parametrize("in_dims", [None, (None, 0, 0)])
@pytest.mark.parametrize("call", [1, 3, 4])
def test_a_sample_that_fails_at_the_shared_call_keeps_its_best_iterate_and_harms_no_other(call, in_dims, adjoint):
    """Four calls of three steps: the first of all, one on the way, and the last, which is the shared one."""
    solver, names = im.Anderson(rtol=0, max_steps=3), torch.arange(4)
    options = {"solver": solver, "adjoint": adjoint, "in_dims": in_dims, "on_failure": "ignore"}
    with torch.no_grad():
        expected = im.fixed_point(_fails_at(call)[0], Z0, matrix(3, 0.8, 52), X, names, **options)
    assert expected.status.tolist() == [im.Status.MAX_STEPS, im.Status.NON_FINITE, *[im.Status.MAX_STEPS] * 2]

    W, x = matrix(3, 0.8, 52).requires_grad_(), X.clone().requires_grad_()
    f, calls = _fails_at(call)
    solution = im.fixed_point(f, Z0, W, x, names, **options)
    for name in ("value", "status", "residual", "steps"):
        torch.testing.assert_close(
            getattr(solution, name), getattr(expected, name), rtol=1e-14, atol=0, equal_nan=True
        )
    assert solution.evaluations == expected.evaluations
    assert len(calls) == solution.evaluations + iterations(adjoint)[0]  # what failed is recorded again, without it

    W_good, x_good = W.detach().requires_grad_(), x.detach().requires_grad_()
    good = torch.tensor([0, 2, 3])
    f, _ = _fails_at(0)
    value = im.fixed_point(f, Z0[good], W_good, x_good[good], names[good], solver=solver, adjoint=adjoint).value
    if in_dims is not None:  # else f is still NaN where it is recorded again, and the gradient says so
        assert_close(
            torch.autograd.grad(solution.value.sum(), (W, x)),
            torch.autograd.grad(value.sum(), (W_good, x_good)),
            1e-13,
        )


def test_a_failure_at_the_shared_call_is_reported():
    for on_failure in ("warn", "raise"):
        W = matrix(3, 0.8, 52).requires_grad_()
        context = pytest.warns(im.ConvergenceWarning, match="sample 1: NON_FINITE after 3 steps")
        if on_failure == "raise":
            context = pytest.raises(im.SolverError, match="sample 1: NON_FINITE after 3 steps")
        with context:
            im.fixed_point(
                _fails_at(4)[0],
                Z0,
                W,
                X,
                torch.arange(4),
                solver=im.Anderson(rtol=0, max_steps=3),
                adjoint=im.JacobianFreeAdjoint(),
                in_dims=(None, 0, 0),
                on_failure=on_failure,
            )


@pytest.mark.host
@pytest.mark.parametrize("adjoint", INEXACT, ids=repr)
def test_transforms_share_the_call_too(adjoint):
    solver, W = im.Anderson(rtol=0, max_steps=3), matrix(3, 0.8, 52)
    steps, damping = iterations(adjoint)

    def solve(W, x, f=_tanh):
        return im.fixed_point(f, torch.zeros_like(x), W, x, solver=solver, adjoint=adjoint)

    def followed(W, x):
        z = solve(W.detach(), x.detach()).value
        for _ in range(steps):
            z = z + damping * (_tanh(z, W, x) - z)
        return z

    f, calls = counted(_tanh)
    jacobian = torch.func.jacrev(lambda W: solve(W, X, f).value)(W)
    assert len(calls) == 4 + steps - 1
    expected = torch.autograd.functional.jacobian(lambda W: followed(W, X), W)
    assert_close(jacobian, expected, 1e-13)
    assert_close(torch.func.jacfwd(lambda W: solve(W, X).value)(W), expected, 1e-13)
    xs = torch.stack([X, 2 * X, -X])
    batched = torch.func.vmap(torch.func.jacrev(lambda W, x: solve(W, x).value), in_dims=(None, 0))(W, xs)
    assert_close(batched[0], expected, 1e-13)
    # Reports of the solve are no functions of anything, at any level.
    of_residual = torch.func.jacrev(lambda W: torch.func.jacrev(lambda x: solve(W, x).residual)(X))(W)
    assert not bool(of_residual.any())


def test_samples_that_fail_at_the_shared_call_under_vmap_are_reported_as_one_batch():
    def solve(W, x, name):
        f = lambda z, W, x, name: _tanh(z, W, torch.where((z.abs() > 0).all() & (name > 4), torch.nan, x))  # noqa: E731
        solver, adjoint = im.FixedPointIteration(rtol=0, max_steps=1), im.JacobianFreeAdjoint()
        return im.fixed_point(
            f, torch.zeros_like(x), W, x, name, solver=solver, adjoint=adjoint, in_dims=(None, 0, 0)
        )

    W, xs = matrix(3, 0.8, 52).requires_grad_(), torch.stack([X, 2 * X])
    names = torch.arange(8).reshape(2, 4, 1)
    with pytest.warns(im.ConvergenceWarning, match="3 of 8 samples .3 NON_FINITE.*sample 5"):
        value, status = torch.func.vmap(lambda x, name: (lambda s: (s.value, s.status))(solve(W, x, name)))(
            xs, names
        )
    assert (status == im.Status.NON_FINITE).flatten().tolist() == [False] * 5 + [True] * 3
    assert not bool(value[1, 1:].any())  # the start
    (gradient,) = torch.autograd.grad(value.sum(), W)
    assert bool(gradient.isfinite().all())


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


# ---------------------------------------------------------------------------------- systems without an answer


def singular_system(n: int) -> torch.Tensor:
    """A Jacobian J `(n, n)` with one direction v in which I - J vanishes."""
    J, v = 0.5 * draw(n, n, seed=n) / n**0.5, draw(n, seed=n + 1)
    v = v / v.norm()
    return J + torch.outer(v - J @ v, v)


@pytest.mark.parametrize("n", [40, 400])
@pytest.mark.parametrize(
    "linear_solver",
    [im.GMRES(), im.BiCGStab(), im.Broyden(), im.Anderson(), im.DenseLU()],
    ids=lambda s: type(s).__name__,
)
def test_a_singular_jacobian_of_many_dimensions_gives_no_arbitrary_gradient(linear_solver, n):
    """One direction of many without an answer hardly shows in the residual."""
    J, x, g = singular_system(n), torch.zeros(1, n, dtype=D, requires_grad=True), draw(n, seed=n + 2)
    value = im.fixed_point(
        lambda z, x: z @ J.T - z**3 + x,
        torch.zeros(1, n, dtype=D),
        x,
        adjoint=im.ImplicitAdjoint(linear_solver),
    ).value
    with pytest.warns(im.ConvergenceWarning, match="backward solve"):
        (gradient,) = torch.autograd.grad((value @ g).sum(), x)
    assert gradient.norm() <= 5 * g.norm()


def test_a_gradient_that_is_nan_comes_out_as_nan_and_is_blamed_on_who_sent_it():
    """As a scaler of mixed precision waits for it, it must not become zero."""
    x = X.clone().requires_grad_()
    value = im.fixed_point(_tanh, Z0, matrix(3, 0.8, 52), x, on_failure="ignore").value
    g = torch.ones_like(value)
    g[1, 0], g[2, 1] = float("nan"), float("inf")
    (gradient,) = torch.autograd.grad(value, x, g)
    assert gradient.isfinite().all(1).tolist() == [True, False, False, True]
    warned = im.fixed_point(_tanh, Z0, matrix(3, 0.8, 52), x).value
    with pytest.warns(im.ConvergenceWarning, match="the incoming gradient"):
        torch.autograd.grad(warned, x, g)


@pytest.mark.parametrize("linear_solver", [im.Newton(), im.NewtonKrylov()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("create_graph", [False, True])
def test_newtons_methods_may_solve_the_backward_system(linear_solver, create_graph):
    x = X.clone().requires_grad_()
    W = matrix(3, 0.8, 52)
    adjoints = (im.ImplicitAdjoint(linear_solver), im.ImplicitAdjoint(rtol=1e-14))
    found = []
    for adjoint in adjoints:
        value = im.fixed_point(_tanh, Z0, W, x, adjoint=adjoint, on_failure="raise").value
        found.append(torch.autograd.grad(value.sin().sum(), x, create_graph=create_graph)[0])
    assert_close(found[0], found[1], 1e-8)


# -------------------------------------------------------------------------------- starts that are solutions


def test_unrolling_a_start_that_has_converged_differentiates_one_step():
    W, x = matrix(3, 0.8, 52), X.clone().requires_grad_()
    there = im.fixed_point(_tanh, Z0, W, x.detach(), solver=im.Anderson(rtol=1e-9)).value
    start = torch.cat([there[:2], Z0[2:]])
    options = {"solver": im.Anderson(rtol=1e-6), "adjoint": im.UnrolledAdjoint()}
    solution = im.fixed_point(_tanh, start, W, x, **options)
    assert solution.steps[:2].tolist() == [0, 0]
    (gradient,) = torch.autograd.grad(solution.value.sum(), x)
    once = torch.autograd.grad(_tanh(there[:2], W, x[:2]).sum(), x)[0]
    assert_close(gradient[:2], once[:2], 1e-9)
    assert (gradient[2:].abs().sum(1) > 0).all()
    assert_close(solution.value[:2].detach(), there[:2], 1e-6)


def test_a_root_that_starts_at_its_solution_has_no_step_to_unroll_and_says_so():
    x = X.clone().requires_grad_()
    with pytest.warns(im.ConvergenceWarning, match="4 of 4 samples start at a solution"):
        value = im.root(lambda z, x: z - x, X, x, adjoint=im.UnrolledAdjoint()).value
    assert torch.autograd.grad(value.sum(), x)[0].abs().max() == 0


def test_without_samples_unrolling_has_gradients_of_zero():
    W = matrix(3, 0.8, 52).requires_grad_()
    value = im.fixed_point(_tanh, Z0[:0], W, X[:0], adjoint=im.UnrolledAdjoint()).value
    assert torch.autograd.grad(value.sum(), W)[0].abs().max() == 0


@pytest.mark.parametrize("linear_solver", [im.GMRES(), im.DenseLU()], ids=lambda s: type(s).__name__)
def test_states_without_entries_have_gradients_without_entries(linear_solver):
    x = torch.zeros(3, 0, requires_grad=True)
    value = im.fixed_point(
        lambda z, x: 0.5 * z + x, torch.zeros(3, 0), x, adjoint=im.ImplicitAdjoint(linear_solver)
    ).value
    assert torch.autograd.grad(value.sum(), x)[0].shape == (3, 0)


def test_unrolling_under_vmap_with_in_dims():
    W, x = matrix(3, 0.8, 52), draw(2, 4, 3, seed=53)

    def run(x):
        options = {"adjoint": im.UnrolledAdjoint(), "in_dims": (None, 0), "solver": im.Anderson(rtol=1e-10)}
        return im.fixed_point(_tanh, Z0, W, x, **options).value

    assert_close(torch.func.vmap(run)(x), torch.stack([run(x[0]), run(x[1])]), 1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("solver", [im.Anderson, im.Broyden])
def test_unrolled_gradients_stay_right_long_after_the_iterates_have_settled(solver, dtype):
    W, x = matrix(3, 0.6, 5), draw(40, 3, seed=6)

    def gradient(how, adjoint, dtype):
        inputs = x.to(dtype).requires_grad_()
        z = im.fixed_point(
            lambda z, x, W: torch.tanh(z @ W.mT + x), inputs * 0, inputs, W.to(dtype), solver=how, adjoint=adjoint
        ).value
        return torch.autograd.grad(z.sum(), inputs)[0].double()

    expected = gradient(im.Newton(rtol=1e-13), im.ImplicitAdjoint(im.DenseLU(rtol=1e-13)), torch.float64)
    tolerance = {torch.bfloat16: 3e-2, torch.float32: 1e-5, torch.float64: 1e-10}[dtype]
    for steps in (25, 60):
        how = solver(rtol=0, max_steps=steps)
        found = gradient(how, im.UnrolledAdjoint(), dtype)
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
        if dtype == torch.bfloat16:  # f computes in it, whatever the state is kept in
            with torch.autocast("cpu", torch.bfloat16):
                found = gradient(how, im.UnrolledAdjoint(), torch.float32)
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("solver", "ended"),
    [
        (im.FixedPointIteration(rtol=0, max_steps=60), "NON_FINITE"),
        (im.FixedPointIteration(rtol=0, max_steps=4), "MAX_STEPS"),
        (im.FixedPointIteration(rtol=1e-5), "DIVERGED"),
    ],
)
@pytest.mark.parametrize("in_dims", [None, (0, 0, None)])
def test_phantom_iterations_that_leave_all_numbers_harm_no_other_sample(solver, ended, in_dims):
    """From wherever the solver ended, z <- z^2 + 5 overflows within the ten iterations."""

    def f(z, x, square, W):
        return torch.tanh(z @ W.mT + x) + square * (z * z + 5)

    def gradients(rows):
        x, W = X.float()[rows].requires_grad_(), matrix(3, 0.5, 7).float().requires_grad_()
        square = torch.tensor([[0.0], [1.0], [0.0], [0.0]])[rows]
        z0, how = torch.zeros_like(x), im.PhantomAdjoint(10)
        args = (x, square, W)
        solution = im.fixed_point(f, z0, *args, solver=solver, adjoint=how, in_dims=in_dims, on_failure="ignore")
        # A loss over all samples, of which the bad one has no say.
        return solution, torch.autograd.grad(solution.value.sum(), (x, W))

    solution, (dx, dW) = gradients([0, 1, 2, 3])
    _, (dx_alone, dW_alone) = gradients([0, 2, 3])
    assert im.Status(int(solution.status[1])).name == ended
    torch.testing.assert_close(dx[[0, 2, 3]], dx_alone)
    torch.testing.assert_close(dW, dW_alone)
    assert dx[1].tolist() == [0, 0, 0]
