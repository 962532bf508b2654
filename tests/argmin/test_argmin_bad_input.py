"""Bad input is refused at the door; failures are told sample by sample, and harm no other."""

from __future__ import annotations

import pytest
import torch

import implicitly as im
from tests.problems import draw

D = torch.float64
Z0 = torch.zeros(4, 3, dtype=D)
X = draw(4, 3, seed=41)


def bowl(z, x):
    return 0.5 * (z - x).square().sum(1)


def refused(error, *parts, f=bowl, z0=Z0, args=(X,), entry=im.argmin, **options):
    with pytest.raises(error) as caught:
        entry(f, z0, *args, **options)
    for part in parts:
        assert part in str(caught.value)


def test_an_objective_of_another_shape_is_refused_with_what_came_and_what_is_expected():
    refused(ValueError, "one value per sample", "(4,)", "(4, 3)", ".sum(-1)", f=lambda z, x: (z - x).square())
    refused(ValueError, "expected (4,), got ()", "batch_dims=0", f=lambda z, x: bowl(z, x).sum())
    refused(ValueError, "expected (), got (4,)", batch_dims=0)


def test_an_objective_of_another_kind_is_refused():
    refused(TypeError, "got a float", f=lambda z, x: 1.0)
    refused(ValueError, "dtype of z0", "torch.float64", "torch.float32", f=lambda z, x: bowl(z, x).float())
    refused(TypeError, "real numbers", "torch.int64", f=lambda z, x: bowl(z, x).long())
    refused(TypeError, "real numbers", "complex", f=lambda z, x: bowl(z, x).to(torch.complex128))
    refused(ValueError, "device of z0", "meta", f=lambda z, x: bowl(z, x).to("meta"))
    refused(TypeError, "must be callable", f=X)


def test_residuals_of_another_shape_are_refused():
    refused(ValueError, "(4, ...)", "()", f=lambda z, x: (z - x).sum(), entry=im.least_squares)
    refused(TypeError, "got a float", f=lambda z, x: 1.0, entry=im.least_squares)
    refused(ValueError, "dtype of z0", f=lambda z, x: (z - x).float(), entry=im.least_squares)


def test_constraints_of_another_shape_are_refused():
    refused(ValueError, "the projection must return the shape of z0", constraint=lambda z, x: z[:, :2])
    refused(TypeError, "constraint must be", constraint=3)
    with pytest.raises(TypeError, match="h must be callable"):
        im.Equality(3)
    with pytest.raises(TypeError, match="P must be callable"):
        im.Projection(3)
    with pytest.raises(ValueError, match="step must be a positive number"):
        im.Projection(lambda z: z, step=0.0)
    refused(
        ValueError,
        "more than the",
        "4 numbers",
        constraint=im.Equality(lambda z, x: torch.cat([z, z[:, :1]], 1)),
    )
    refused(ValueError, "one row per sample", constraint=im.Equality(lambda z, x: z[:2]))
    refused(ValueError, "dtype and device", constraint=im.Equality(lambda z, x: z.float()))


@pytest.mark.parametrize(
    ("solver", "constraint", "needs"),
    [
        (im.LBFGS(), lambda z, x: z, "im.argmin without a constraint"),
        (im.GradientDescent(), im.Equality(lambda z, x: z[:, 0]), "im.argmin without a constraint"),
        (im.ProjectedGradient(), None, "constraint=P"),
        (im.NewtonKKT(), None, "im.Equality"),
        (im.NewtonKKT(), lambda z, x: z, "im.Equality"),
        (im.LevenbergMarquardt(), None, "im.least_squares"),
        (im.GMRES(), None, "linear systems"),
    ],
)
def test_a_solver_that_lacks_what_it_needs_is_refused_with_where_to_find_it(solver, constraint, needs):
    refused(TypeError, type(solver).__name__, needs, solver=solver, constraint=constraint)


def test_solvers_of_objectives_are_refused_by_roots_and_fixed_points():
    for entry in (im.root, im.fixed_point):
        refused(TypeError, "LBFGS needs an objective", entry=entry, f=lambda z, x: z - x, solver=im.LBFGS())
    refused(TypeError, "solver must be a solver", solver="lbfgs")


@pytest.mark.parametrize("adjoint", [im.PhantomAdjoint(), im.JacobianFreeAdjoint()])
def test_inexact_adjoints_need_iterations_and_only_projections_have_them(adjoint):
    refused(ValueError, "does not have", adjoint=adjoint)
    refused(ValueError, "does not have", adjoint=adjoint, constraint=im.Equality(lambda z, x: z[:, 0]))
    value = im.argmin(
        bowl, Z0, X.clone().requires_grad_(), constraint=lambda z, x: z.clamp(min=0), adjoint=adjoint
    )
    assert value.value.requires_grad


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: im.LBFGS(history=0), "LBFGS: history must be at least 1, got 0"),
        (lambda: im.GradientDescent(step=0.0), "GradientDescent: step must be a positive number or None, got 0.0"),
        (lambda: im.ProjectedGradient(step=-1.0), "ProjectedGradient: step must be a positive number"),
        (lambda: im.LevenbergMarquardt(damping=0.0), "damping must be a positive number, got 0.0"),
        (lambda: im.LBFGS(rtol=-1.0), "rtol must be a finite number"),
        (lambda: im.NewtonKKT(max_steps=0), "max_steps must be at least 1"),
    ],
)
def test_wrong_options_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_captured_tensor_is_refused_and_one_that_only_adds_is_not():
    scale = torch.ones(3, dtype=D, requires_grad=True)
    refused(ValueError, "(3,)", "Pass it in args", f=lambda z, x: (scale * (z - x) ** 2).sum(1))
    refused(ValueError, "(3,)", "Pass it in args", constraint=lambda z, x: z.clamp(min=0) * scale)
    refused(ValueError, "(3,)", "Pass it in args", constraint=im.Equality(lambda z, x: (z * scale).sum(1) - 1))
    im.argmin(lambda z, x: bowl(z, x) + scale.sum(), Z0, X)


def test_an_objective_that_writes_into_z_is_refused():
    refused((ValueError, RuntimeError), "in", "place", f=lambda z, x: z.sub_(x).square().sum(1))


# ------------------------------------------------------------------------------------------- failures

TROUBLES = {
    # objective of z and a: what happens where a < 0
    "unbounded": (lambda z, a: a * z.square().sum(1) + 0.5 * z.sum(1), im.Status.UNBOUNDED),
    "linear": (lambda z, a: a.clamp(min=0) * z.square().sum(1) + z.sum(1), im.Status.UNBOUNDED),
    "nan": (lambda z, a: (z - a.sqrt()[:, None]).square().sum(1), im.Status.NON_FINITE),
    "saddle": (lambda z, a: z[:, 0] ** 2 + a * z[:, 1] ** 2, im.Status.NOT_MINIMUM),
}
SOLVERS = [
    im.LBFGS(),
    im.GradientDescent(),
    im.GradientDescent(accelerated=True),
    im.Newton(),
]


@pytest.mark.parametrize("trouble", TROUBLES)
@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
def test_a_sample_in_trouble_says_which_and_harms_no_other(solver, trouble):
    objective, status = TROUBLES[trouble]
    a = torch.tensor([1.0, -1.0, 2.0], dtype=D, requires_grad=True)
    z0 = torch.zeros(3, 2, dtype=D) if trouble == "saddle" else torch.full((3, 2), 0.3, dtype=D)
    solution = im.argmin(objective, z0, a, solver=solver, in_dims=0, on_failure="ignore")
    assert solution.status.tolist() == [0, status, 0]
    alone = im.argmin(objective, z0[[0, 2]], a[[0, 2]], solver=solver)
    torch.testing.assert_close(solution.value[[0, 2]], alone.value, rtol=1e-8, atol=1e-8)
    (gradient,) = torch.autograd.grad(solution.value[[0, 2]].sum(), a)
    (expected,) = torch.autograd.grad(alone.value.sum(), a)
    assert gradient[1] == 0
    torch.testing.assert_close(gradient, expected, rtol=1e-7, atol=1e-8)


def test_failures_raise_with_the_solution_and_what_to_try():
    a = torch.tensor([1.0, -1.0], dtype=D)
    with pytest.raises(im.SolverError, match=r"1 UNBOUNDED.*Worst is sample 1.*add constraints") as caught:
        im.argmin(TROUBLES["unbounded"][0], torch.full((2, 2), 0.3, dtype=D), a)
    assert caught.value.solution.status.tolist() == [0, im.Status.UNBOUNDED]
    with pytest.raises(im.SolverError, match=r"NOT_MINIMUM.*start elsewhere"):
        im.argmin(TROUBLES["saddle"][0], torch.zeros(2, 2, dtype=D), a)


def test_a_constant_step_that_is_too_long_diverges():
    solver = im.GradientDescent(step=10.0)
    solution = im.argmin(bowl, Z0, X, solver=solver, on_failure="ignore")
    assert solution.status.tolist() == [im.Status.DIVERGED] * 4


def test_maxima_in_many_dimensions_are_found_out_by_products_alone():
    z0 = torch.zeros(2, 200, dtype=D)
    signs = torch.ones(2, 200, dtype=D)
    signs[1, 17] = -5.0
    options = {"on_failure": "ignore"}
    solution = im.argmin(lambda z, s: (s * (1 + z.square()).log()).sum(1), z0, signs, **options)
    assert solution.status.tolist() == [0, im.Status.NOT_MINIMUM]
    trusted = im.argmin(lambda z, s: (s * (1 + z.square()).log()).sum(1), z0, signs, convex=True, **options)
    assert trusted.status.tolist() == [0, 0]


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
def test_an_empty_batch_comes_back_empty(solver):
    x = torch.zeros(0, 3, dtype=D, requires_grad=True)
    value = im.argmin(bowl, Z0[:0], x, solver=solver).value
    assert value.shape == (0, 3)
    (gradient,) = torch.autograd.grad(value.sum(), x)
    assert gradient.shape == (0, 3)


def test_empty_batches_over_sets_and_of_residuals_come_back_empty():
    x = torch.zeros(0, 3, dtype=D)
    assert im.argmin(bowl, Z0[:0], x, constraint=lambda z, x: z.clamp(min=0)).value.shape == (0, 3)
    assert im.argmin(bowl, Z0[:0], x, constraint=im.Equality(lambda z, x: z[:, 0])).value.shape == (0, 3)
    assert im.least_squares(lambda z, x: z - x, Z0[:0], x).value.shape == (0, 3)


# ------------------------------------------------------------------------------- bounded, and unbounded

DESCENDING = [*SOLVERS, im.LBFGS(history=1)]
FALLS = {"exponential": lambda z: -z.exp(), "line": lambda z: z, "square": lambda z: -(z**2) - z}


@pytest.mark.parametrize("solver", DESCENDING, ids=repr)
def test_a_flat_start_makes_no_bounded_objective_unbounded(solver):
    """What falls by 1e8 times what it and its gradient were at first may still have a minimum."""
    start = torch.tensor([[1e-9]], dtype=D)
    double = im.argmin(lambda z: (z**4 / 4 - z**2 / 2).sum(1), start, solver=solver).value
    torch.testing.assert_close(double.abs(), torch.ones(1, 1, dtype=D), rtol=1e-7, atol=0)
    hollow = lambda z: -(-((z - 1) ** 2)).exp().sum(1)  # noqa: E731
    value = im.argmin(hollow, torch.full((2, 1), 4.0, dtype=D), solver=solver).value
    torch.testing.assert_close(value, torch.ones(2, 1, dtype=D), rtol=0, atol=1e-6)


@pytest.mark.parametrize("solver", DESCENDING, ids=repr)
@pytest.mark.parametrize(
    "fall", [lambda z: -z.exp(), lambda z: z, lambda z: -(z**2) - z], ids=["exp", "line", "square"]
)
def test_objectives_that_fall_for_ever_are_unbounded_also_where_they_overflow_first(solver, fall):
    solution = im.argmin(lambda z: fall(z).sum(1), torch.ones(2, 1, dtype=D), solver=solver, on_failure="ignore")
    assert solution.status.tolist() == [im.Status.UNBOUNDED] * 2


def test_a_flat_start_under_equations_makes_nothing_unbounded():
    last = im.Equality(lambda z: z[:, 2])
    z0 = torch.tensor([[1e-9, 1e-9, 0.0]], dtype=D)
    value = im.argmin(lambda z: (z**4 / 4 - z**2 / 2).sum(1), z0, constraint=last).value
    torch.testing.assert_close(value.abs(), torch.tensor([[1.0, 1.0, 0.0]], dtype=D), rtol=1e-7, atol=1e-9)
    for fall in (lambda z: z.sum(1), lambda z: -z.exp().sum(1)):
        solution = im.argmin(
            fall,
            torch.ones(1, 3, dtype=D) * torch.tensor([4.0, 4, 0], dtype=D),
            constraint=last,
            on_failure="ignore",
        )
        assert solution.status.tolist() == [im.Status.UNBOUNDED]


# ------------------------------------------------------------------------------- saddles


@pytest.mark.parametrize("least", [-0.5, -0.05])
def test_a_slightly_negative_eigenvalue_among_hundreds_is_found(least):
    d = torch.linspace(1, 100, 200, dtype=D)
    d[3] = least
    options = {"on_failure": "ignore"}
    solution = im.argmin(lambda z: (d * z * z).sum(1) / 2, torch.zeros(1, 200, dtype=D), **options)
    assert solution.status.tolist() == [im.Status.NOT_MINIMUM]


@pytest.mark.parametrize("least", [-1e-3, 1e-3])
def test_up_to_48_dimensions_every_eigenvalue_counts(least):
    d = torch.linspace(1, 100, 48, dtype=D)
    d[3] = least
    options = {"on_failure": "ignore"}
    solution = im.argmin(lambda z: (d * z * z).sum(1) / 2, torch.zeros(2, 48, dtype=D), **options)
    assert solution.status.tolist() == [0 if least > 0 else im.Status.NOT_MINIMUM] * 2


# ------------------------------------------------------------------------------- states of no width


@pytest.mark.parametrize("solver", [*SOLVERS, im.GradientDescent(step=0.1)], ids=repr)
def test_states_without_entries_come_back(solver):
    z0 = torch.zeros(3, 0, dtype=D)
    assert im.argmin(lambda z: z.sum(1) ** 2, z0, solver=solver).value.shape == (3, 0)


def test_states_without_entries_come_back_from_sets_equations_and_residuals():
    z0 = torch.zeros(3, 0, dtype=D)
    square = lambda z: z.sum(1) ** 2  # noqa: E731
    for constraint in (lambda z: z, im.Equality(lambda z: z)):
        assert im.argmin(square, z0, constraint=constraint).value.shape == (3, 0)
    for solver in (im.LevenbergMarquardt(), im.GaussNewton(), im.LBFGS()):
        assert im.least_squares(lambda z: z, z0, solver=solver).value.shape == (3, 0)


class WithContext(torch.autograd.Function):
    """Written as torch.func cannot have it."""

    @staticmethod
    def forward(ctx, z):
        ctx.save_for_backward(z)
        return z.square().sum(1)

    @staticmethod
    def backward(ctx, *bars):
        return 2 * ctx.saved_tensors[0] * bars[0][:, None]


SEEN = torch.zeros((), dtype=D)


def counting(z, x):
    SEEN.add_((z - x).detach().sum())
    return bowl(z, x)


def branching(z, x):
    return torch.vmap(lambda z, x: (z - x).square().sum() if z.sum() > -1 else z.sum())(z, x)


@pytest.mark.parametrize(
    ("f", "does", "instead"),
    [
        (counting, "changes in place a tensor that it did not create", "do not modify it"),
        (lambda z, x: bowl(z.sub_(x), 0 * x), "changes z or a parameter in place", "z.clone()"),
        (lambda z, x: bowl(z.requires_grad_(), x), "calls requires_grad_()", "leave out requires_grad_()"),
        (lambda z, x: torch.from_numpy((z - x).detach().numpy()).square().sum(1), "leaves torch", "operations of"),
        (lambda z, x: WithContext.apply(z - x), "torch.autograd.Function", "setup_context(ctx, inputs, output)"),
        (lambda z, x: torch.cdist(z, x).diagonal(), "has no second derivative", "torch.cdist(x, y) as"),
        (branching, "branches on the values", "torch.where"),
    ],
    ids=["captured", "in-place", "requires-grad", "numpy", "function", "second", "branch"],
)
def test_what_torch_cannot_differentiate_is_told_with_the_remedy(f, does, instead):
    for entry in (im.argmin, im.least_squares):
        with pytest.raises(ValueError, match="differentiates the function that it is given twice") as caught:
            entry(f, Z0, X.clone().requires_grad_())
        for part in (does, instead, "torch says: "):
            assert part in str(caught.value)
        assert isinstance(caught.value.__cause__, RuntimeError)


def test_of_an_inner_loss_too():
    with pytest.raises(ValueError, match=r"implicit_gradient differentiates the function.*in place"):
        im.implicit_gradient(lambda w, x: counting(w, x).sum(), X, X.clone().requires_grad_())


def test_other_errors_of_an_objective_pass():
    with pytest.raises(RuntimeError, match="size of tensor a"):
        im.argmin(lambda z, x: bowl(z, x[:3]), Z0, X)


def test_a_proximal_map_in_place_of_a_projection_is_told_which_solvers_take_it():
    """It finds the lasso's solution with those."""
    A, y, weight, step = draw(6, 3, seed=5), draw(6, seed=6), 0.5, 0.05
    constraint = im.Projection(lambda z: im.prox.l1(z, step * weight), step=step)
    lasso = lambda z: 0.5 * (z @ A.mT - y).square().sum(1)  # noqa: E731
    refused(im.SolverError, "im.Anderson", "im.prox.l1", f=lasso, args=(), constraint=constraint)
    z = im.argmin(lasso, Z0[:1], constraint=constraint, solver=im.Anderson()).value[0]
    slope = A.mT @ (A @ z - y)
    torch.testing.assert_close(slope[z != 0], -weight * z[z != 0].sign())
    assert (slope.abs() <= weight + 1e-9).all()
