"""`ConvexLayer`: values against cvxpy, derivatives against differences and cvxpylayers, what is refused."""

import builtins
import copy
import pickle
import sys
import warnings

import pytest
import torch
import torch.utils.checkpoint
from torch.autograd import gradcheck, gradgradcheck

import implicitly as im
from implicitly import compiled
from implicitly.nn import ConvexLayer
from tests.problems import draw

cp = pytest.importorskip("cvxpy")
pytest.importorskip("clarabel")

D = torch.float64


def normal(*shape):
    return torch.randn(*shape, dtype=D)


# ----------------------------------------------------------------------------------------------- problems
# Each gives a problem, its parameters, variables, and values of which some have a batch of 2.


def least_squares():
    A, b, x = cp.Parameter((5, 3)), cp.Parameter(5), cp.Variable(3)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(A @ x - b) + 0.1 * cp.norm1(x)), [x >= -1])
    return problem, [A, b], [x], [normal(2, 5, 3), normal(5)]


def relu():
    x, y = cp.Parameter(4), cp.Variable(4)
    return cp.Problem(cp.Minimize(cp.sum_squares(y - x)), [y >= 0]), [x], [y], [normal(2, 4)]


def optnet():
    P, q, G, h = cp.Parameter((3, 3), PSD=True), cp.Parameter(3), cp.Parameter((4, 3)), cp.Parameter(4)
    A, b, z = cp.Parameter((1, 3)), cp.Parameter(1), cp.Variable(3)
    problem = cp.Problem(cp.Minimize(0.5 * cp.quad_form(z, P) + q @ z), [G @ z <= h, A @ z == b])
    L, G_, z0, A_ = normal(2, 3, 3), normal(4, 3), normal(3), normal(1, 3)
    values = [L @ L.mT + torch.eye(3, dtype=D), normal(2, 3), G_, G_ @ z0 + 0.3, A_, A_ @ z0]
    return problem, [P, q, G, h, A, b], [z], values


def linear_program():
    c, x, t = cp.Parameter(3), cp.Variable(3), cp.Variable()
    problem = cp.Problem(cp.Maximize(c @ x - 2 * t), [cp.sum(x) <= t, cp.abs(x) <= 1, t >= 0.5, x >= 0])
    return problem, [c], [x, t], [torch.tensor([[3.0, 1.0, 0.2], [0.5, 4.0, 5.0]], dtype=D)]


def robust():
    c, A, r, x = cp.Parameter(3), cp.Parameter((3, 3)), cp.Parameter(nonneg=True), cp.Variable(3)
    problem = cp.Problem(cp.Minimize(c @ x), [cp.norm(A @ x - 1) <= r, x[0] >= 0.1])
    values = [normal(2, 3), normal(2, 3, 3) + 3 * torch.eye(3, dtype=D), torch.tensor(1.3, dtype=D)]
    return problem, [c, A, r], [x], values


def semidefinite():
    C, b, X = cp.Parameter((3, 3), symmetric=True), cp.Parameter(), cp.Variable((3, 3), PSD=True)
    problem = cp.Problem(cp.Minimize(cp.trace(C @ X) + 0.5 * cp.sum_squares(X)), [cp.trace(X) == b])
    return problem, [C, b], [X], [normal(2, 3, 3) + normal(3, 3).mT, torch.tensor(1.5, dtype=D)]


def entropy():
    c, x = cp.Parameter(4), cp.Variable(4)
    return cp.Problem(cp.Maximize(c @ x + cp.sum(cp.entr(x))), [cp.sum(x) == 1]), [c], [x], [normal(2, 4)]


def logistic():
    X, y = normal(6, 2), torch.tensor([1.0, -1, 1, 1, -1, -1], dtype=D)
    W, lam, beta = cp.Parameter((6, 2)), cp.Parameter(nonneg=True), cp.Variable(2)
    problem = cp.Problem(
        cp.Minimize(cp.sum(cp.logistic(-cp.multiply(y.numpy(force=True), W @ beta))) + lam * cp.sum_squares(beta))
    )
    return problem, [W, lam], [beta], [X, torch.tensor([0.5, 1.5], dtype=D)]


def power():
    p, w = cp.Parameter(3, pos=True), cp.Variable(3)
    problem = cp.Problem(
        cp.Maximize(cp.geo_mean(w, [1, 2, 3], approx=False)), [p @ w <= 1, cp.sum_squares(w) <= 4]
    )
    return problem, [p], [w], [torch.rand(2, 3, dtype=D) + 0.5]


def control():
    n, m, T = 2, 1, 3
    A, B, x0, P_sqrt = cp.Parameter((n, n)), cp.Parameter((n, m)), cp.Parameter(n), cp.Parameter((n, n))
    x, u = cp.Variable((n, T + 1)), cp.Variable((m, T))
    cost = cp.sum_squares(P_sqrt @ x[:, T]) + cp.sum_squares(u) + 0.1 * cp.sum_squares(x)
    limits = [cp.norm(u[:, t]) <= 0.4 for t in range(T)]
    moves = [x[:, t + 1] == A @ x[:, t] + B @ u[:, t] for t in range(T)]
    values = [torch.eye(n, dtype=D) + 0.3 * normal(n, n), normal(n, m), normal(2, n), normal(n, n)]
    return cp.Problem(cp.Minimize(cost), [x[:, 0] == x0, *moves, *limits]), [A, B, x0, P_sqrt], [u, x], values


QUADRATIC = [least_squares, relu, optnet, linear_program]
CONIC = [robust, semidefinite, entropy, logistic, power, control]
ALL = QUADRATIC + CONIC


def symmetric_in(parameters, values):
    """Values of which symmetric parameters get their symmetric part."""
    kinds = ("symmetric", "PSD")
    return [
        (v + v.mT) / 2 if any(p.attributes[k] for k in kinds) else v
        for p, v in zip(parameters, values, strict=True)
    ]


def solved_by_cvxpy(problem, parameters, variables, values, sample, **options):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Solution may be inaccurate")  # 1e-11 is a lot to ask for
        warnings.filterwarnings("ignore", message=".*a sparse CVXPY expression")
        for p, v in zip(parameters, values, strict=True):
            p.value = (v[sample] if v.ndim > len(p.shape) else v).numpy(force=True)
        problem.solve(solver="CLARABEL", tol_gap_abs=1e-11, tol_gap_rel=1e-11, tol_feas=1e-11, **options)
    dense = [v.value.toarray() if hasattr(v.value, "toarray") else v.value for v in variables]
    return [torch.as_tensor(v, dtype=D) for v in dense]


# ------------------------------------------------------------------------------------ values, derivatives


@pytest.mark.parametrize("make", ALL)
def test_values_are_those_of_cvxpy(make):
    problem, parameters, variables, values = make()
    values = symmetric_in(parameters, values)
    layer = ConvexLayer(problem, parameters, variables)
    found = layer(*values)
    assert layer.solution.converged.all()
    assert (layer.solution.residual < 1e-9).all()
    for sample in range(2):
        expected = solved_by_cvxpy(problem, parameters, variables, values, sample)
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.shape[1:] == theirs.shape
            torch.testing.assert_close(ours[sample], theirs, atol=3e-6, rtol=3e-6)


@pytest.mark.parametrize("make", ALL)
def test_first_and_second_derivatives_are_those_of_differences(make):
    problem, parameters, variables, values = make()
    layer = ConvexLayer(problem, parameters, variables)
    values = tuple(v.requires_grad_() for v in values)

    def f(*values):
        return layer(*symmetric_in(parameters, values))

    assert gradcheck(f, values, eps=1e-5, atol=1e-6, rtol=1e-6, fast_mode=make in (control, logistic))
    assert gradgradcheck(f, values, eps=1e-5, atol=1e-5, rtol=1e-5, fast_mode=True)


@pytest.mark.parametrize("make", [least_squares, optnet, linear_program])
def test_clarabel_and_qp_agree(make):
    problem, parameters, variables, values = make()
    values = [v.requires_grad_() for v in values]
    results = []
    for solver in (im.InteriorPoint(), im.Clarabel()):
        found = ConvexLayer(problem, parameters, variables, solver=solver)(*values)
        results.append((*found, *torch.autograd.grad(sum(v.square().sum() for v in found), values)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-7)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # theirs
@pytest.mark.parametrize("make", [least_squares, robust, entropy, semidefinite, control])
def test_gradients_are_those_of_cvxpylayers(make):
    peer = pytest.importorskip("cvxpylayers.torch")
    problem, parameters, variables, values = make()
    values = [v.requires_grad_() for v in symmetric_in(parameters, values)]
    gradients = []
    accurate = {"eps": 1e-10, "max_iters": 100_000, "acceleration_lookback": 0}
    for layer in (
        ConvexLayer(problem, parameters, variables),
        peer.CvxpyLayer(problem, parameters, variables, solver_args=accurate),
    ):
        found = layer(*values)
        gradients.append(torch.autograd.grad(sum((v**2).sum() + v.sum() for v in found), values))
    for p, ours, theirs in zip(parameters, *gradients, strict=True):
        if p.attributes["symmetric"]:  # they read the upper triangle, which counts twice
            theirs = (theirs + theirs.mT) / 2
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)


def test_transforms_of_torch_func():
    problem, parameters, variables, _ = robust()
    layer = ConvexLayer(problem, parameters, variables)
    c, A, r = normal(3, 3), normal(3, 3, 3) + 3 * torch.eye(3, dtype=D), torch.tensor(1.3, dtype=D)

    def f(c, A):
        return layer(c, A, r)[0]

    exact = torch.stack([torch.autograd.functional.jacobian(f, (c[i], A[i]))[1] for i in range(3)])
    torch.testing.assert_close(torch.stack([torch.func.jacrev(f, 1)(c[i], A[i]) for i in range(3)]), exact)
    torch.testing.assert_close(torch.func.vmap(torch.func.jacrev(f, 1))(c, A), exact, atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(torch.func.vmap(torch.func.jacfwd(f, 1))(c, A), exact, atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(torch.func.vmap(f, in_dims=(0, None))(c, A[0]), layer(c, A[0], r)[0])
    tangent = normal(3, 3, 3)
    moved = torch.func.jvp(lambda A: f(c, A), (A,), (tangent,))[1]
    torch.testing.assert_close(moved, torch.einsum("boij,bij->bo", exact, tangent))


def test_a_first_call_under_a_transform_leaves_a_layer_that_can_be_copied():
    problem, parameters, variables, _ = robust()
    layer = ConvexLayer(problem, parameters, variables)
    c, A, r = normal(3), normal(3, 3) + 3 * torch.eye(3, dtype=D), torch.tensor(1.3, dtype=D)
    torch.func.grad(lambda c: layer(c, A, r)[0].sum())(c)
    torch.testing.assert_close(copy.deepcopy(layer)(c, A, r), layer(c, A, r))


def test_checkpointing_around_it():
    problem, parameters, variables, _ = robust()
    layer = ConvexLayer(problem, parameters, variables)
    c, A, r = normal(3).requires_grad_(), normal(3, 3) + 3 * torch.eye(3, dtype=D), torch.tensor(1.3, dtype=D)
    plain, (again,) = layer(c, A, r)[0], torch.utils.checkpoint.checkpoint(layer, c, A, r, use_reentrant=False)
    torch.testing.assert_close(*(torch.autograd.grad(z.sum(), c)[0] for z in (again, plain)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")
def test_the_solve_as_one_graph(monkeypatch):
    made, kept = torch.compile, type(compiled._graphs)()
    monkeypatch.setattr(torch, "compile", lambda f, options, **how: made(f, backend="eager", **how))
    monkeypatch.setattr(compiled, "_graphs", kept)
    problem, parameters, variables, values = optnet()
    values = [v.requires_grad_() for v in values]
    results = []
    for compile in (True, False):
        (z,) = ConvexLayer(problem, parameters, variables, compile=compile)(*values)
        results.append((z, *torch.autograd.grad(z.square().sum(), values)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)
    assert len(kept) == 2  # forwards and backwards
    with pytest.warns(im.CompileWarning, match="Clarabel"):
        ConvexLayer(problem, parameters, variables, solver=im.Clarabel(), compile=True)


def test_gradients_of_shared_values_are_sums():
    for make in (optnet, robust):
        problem, parameters, variables, values = make()
        layer = ConvexLayer(problem, parameters, variables)
        shared = [v[:1].clone().squeeze(0) if v.ndim > len(p.shape) else v for p, v in zip(parameters, values)]
        weights = normal(3, 3)
        first = parameters[1 if make is optnet else 0]
        moving = normal(3, 3)
        shared = [moving if p is first else v.requires_grad_() for p, v in zip(parameters, shared)]
        batched = [
            v if p is first else v.detach().expand(3, *v.shape).clone().requires_grad_()
            for p, v in zip(parameters, shared)
        ]
        (a,), (b,) = layer(*shared), layer(*batched)
        torch.testing.assert_close(a, b)
        others = [i for i, p in enumerate(parameters) if p is not first]
        sums = torch.autograd.grad((a * weights).sum(), [shared[i] for i in others])
        each = torch.autograd.grad((b * weights).sum(), [batched[i] for i in others])
        for s, e in zip(sums, each):
            torch.testing.assert_close(s, e.sum(0), atol=1e-8, rtol=1e-8)


def test_samples_do_not_depend_on_their_neighbours():
    problem, parameters, variables, _ = robust()
    layer = ConvexLayer(problem, parameters, variables, solver=im.Clarabel(threads=2))
    c, A, r = normal(7, 3), normal(3, 3) + 3 * torch.eye(3, dtype=D), torch.tensor(1.3, dtype=D)
    together = layer(c, A, r)[0]
    torch.testing.assert_close(layer(c.flip(0), A, r)[0].flip(0), together, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(torch.stack([layer(row, A, r)[0] for row in c]), together, atol=1e-12, rtol=1e-12)


def test_multipliers_are_those_of_cvxpy_with_gradients():
    c, r, x = cp.Parameter(3), cp.Parameter(), cp.Variable(3)
    constraints = [cp.sum(x) <= r, x >= 0, x[0] == 0.2]
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - c)), constraints)
    duals = [k.dual_variables[0] for k in constraints]
    values = (
        torch.tensor([0.1, 2.0, 1.0], dtype=D, requires_grad=True),
        torch.tensor(0.7, dtype=D, requires_grad=True),
    )
    expected = solved_by_cvxpy(problem, [c, r], duals, [v.detach() for v in values], 0)
    for solver in (None, im.Clarabel()):
        layer = ConvexLayer(problem, [c, r], [*duals, x], solver=solver)
        for ours, theirs in zip(layer(*values), expected):
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
        assert gradcheck(layer, values, eps=1e-5, atol=1e-6, fast_mode=True)


def test_geometric_programs():
    z, a, b = cp.Variable(3, pos=True), cp.Parameter(pos=True), cp.Parameter(pos=True)
    limits = [a * (z[0] * z[1] + z[0] * z[2] + z[1] * z[2]) <= b, z[0] >= z[1] ** b]
    problem = cp.Problem(cp.Minimize(1 / (z[0] * z[1] * z[2])), limits)
    values = [torch.tensor([2.0, 1.5], dtype=D), torch.tensor([0.9, 0.7], dtype=D)]
    layer = ConvexLayer(problem, [a, b], [z], gp=True)
    found = layer(*values)[0]
    for sample in range(2):
        expected = solved_by_cvxpy(problem, [a, b], [z], values, sample, gp=True)[0]
        torch.testing.assert_close(found[sample], expected, atol=1e-5, rtol=1e-5)
    assert gradcheck(layer, [v.requires_grad_() for v in values], eps=1e-5, atol=1e-6)


@pytest.mark.parametrize("attribute", ["diag", "sparsity", "symmetric", "PSD", "NSD", "nonneg"])
def test_attributes_of_parameters(attribute):
    given = {"sparsity": [(0, 1, 2), (1, 1, 0)]}.get(attribute, True)
    M, x = cp.Parameter((3, 3), **{attribute: given}), cp.Variable(3)
    base = normal(3, 3)
    value = {
        "diag": torch.diag(normal(3)),
        "sparsity": torch.zeros(3, 3, dtype=D).index_put(
            (torch.tensor([0, 1, 2]), torch.tensor([1, 1, 0])), normal(3)
        ),
        "symmetric": base + base.mT,
        "PSD": base @ base.mT,
        "NSD": -base @ base.mT,
        "nonneg": base.abs(),
    }[attribute]
    problem = cp.Problem(cp.Minimize(cp.sum_squares(M @ x - 1) + cp.norm(x)))
    layer = ConvexLayer(problem, [M], [x])
    expected = solved_by_cvxpy(problem, [M], [x], [value], 0)[0]
    torch.testing.assert_close(layer(value)[0], expected, atol=1e-6, rtol=1e-6)
    value.requires_grad_()
    gradient = torch.autograd.grad(layer(value)[0].sum(), value)[0]
    step = torch.where(value.detach() != 0, normal(3, 3), 0.0)
    step = step + step.mT if attribute in ("symmetric", "PSD", "NSD") else step
    ends = [layer(value.detach() + e * step)[0].sum() for e in (1e-5, -1e-5)]
    torch.testing.assert_close((gradient * step).sum(), (ends[0] - ends[1]) / 2e-5, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("attributes", [{"diag": True}, {"symmetric": True}, {"nonneg": True}, {"NSD": True}])
def test_attributes_of_variables(attributes):
    X, C = cp.Variable((3, 3), **attributes), cp.Parameter((3, 3))
    problem = cp.Problem(cp.Minimize(cp.sum_squares(X - C) + cp.norm(X, "fro")))
    value = normal(3, 3)
    found = ConvexLayer(problem, [C], [X])(value)[0]
    expected = solved_by_cvxpy(problem, [C], [X], [value], 0)[0]
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


def test_an_auxiliary_variable_that_is_not_unique_harms_nothing():
    # While the second constraint does not bind, what bounds |x|^2 in cvxpy's form is any number up to 9.
    c, x = cp.Parameter(2), cp.Variable(2)
    problem = cp.Problem(cp.Minimize(cp.norm(x - c) + 0.5 * cp.sum(x)), [x <= 1, cp.sum_squares(x) <= 9])
    layer = ConvexLayer(problem, [c], [x])
    value = torch.tensor([[2.0, 0.3], [1.5, 2.5]], dtype=D, requires_grad=True)
    layer(value)
    assert (layer.solution.status == im.Status.CONVERGED).all()
    assert gradcheck(layer, value, eps=1e-5, atol=1e-6)
    assert gradgradcheck(layer, value, eps=1e-5, atol=1e-5)


def test_a_solution_that_is_not_unique_is_degenerate():
    c, x = cp.Parameter(2), cp.Variable(2)
    problem = cp.Problem(cp.Minimize(cp.norm(cp.sum(x) - c[0]) + 0 * c[1]), [cp.norm(x) <= 5])
    layer = ConvexLayer(problem, [c], [x], solver=im.Clarabel())
    value = torch.tensor([1.0, 0.0], dtype=D, requires_grad=True)
    (found,) = layer(value)
    assert layer.solution.status == im.Status.DEGENERATE
    gradient = torch.autograd.grad(found.sum(), value)[0]  # the sum is unique
    torch.testing.assert_close(gradient, torch.tensor([1.0, 0.0], dtype=D), atol=1e-5, rtol=1e-5)
    assert torch.autograd.grad(layer(value)[0][0], value)[0].isfinite().all()


@pytest.mark.parametrize("scale", [1e-8, 1e-6, 1e-5, 1.0, 1e5, 1e8])
def test_solutions_of_conic_programs_do_not_depend_on_the_units(scale):
    x, c, r = cp.Variable(3), cp.Parameter(3), cp.Parameter(nonneg=True)
    X, C = cp.Variable((2, 2), symmetric=True), cp.Parameter((2, 2))
    ball = ConvexLayer(cp.Problem(cp.Minimize(cp.sum_squares(x - c)), [cp.norm(x) <= r]), [c, r], [x])
    cone = ConvexLayer(cp.Problem(cp.Minimize(cp.sum_squares(X - C)), [X >> 0]), [C], [X])
    linear = cp.Problem(cp.Minimize(c @ x), [cp.norm(x) <= r])
    for layer, exact, values in (
        (ball, lambda c, r: im.project.l2_ball(c, r), (torch.tensor([1.0, 2, 3]), torch.tensor(1.0))),
        (cone, im.project.psd_cone, (torch.tensor([[1.0, 2.0], [2.0, -1.0]]),)),
        (ConvexLayer(linear, [c, r], [x]), lambda c, r: -r * c / c.norm(), (torch.ones(3), torch.tensor(2.0))),
    ):
        values = [(scale * v.double()).requires_grad_() for v in values]
        (found,), expected = layer(*values), exact(*values)
        assert layer.solution.status == im.Status.CONVERGED
        torch.testing.assert_close(found / scale, expected / scale, atol=1e-9, rtol=1e-9)
        weights = normal(*found.shape)
        for ours, theirs in zip(
            torch.autograd.grad((found * weights).sum(), values),
            torch.autograd.grad((expected * weights).sum(), values),
        ):
            torch.testing.assert_close(ours, theirs, atol=1e-7, rtol=1e-7)


def test_samples_of_all_sizes_in_one_batch():
    x, c, r = cp.Variable(3), cp.Parameter(3), cp.Parameter()
    layer = ConvexLayer(
        cp.Problem(cp.Minimize(cp.sum_squares(x - c)), [cp.norm(x) <= r]), [c, r], [x], on_failure="ignore"
    )
    sizes = torch.tensor([1e-9, 1.0, 1e6, 1e9], dtype=D)
    radii = torch.cat([sizes, -sizes])
    (found,) = layer(torch.cat([sizes, sizes]).unsqueeze(1) * torch.tensor([1.0, 2, 3], dtype=D), radii)
    assert layer.solution.status.tolist() == [im.Status.CONVERGED] * 4 + [im.Status.INFEASIBLE] * 4
    expected = torch.tensor([1.0, 2, 3], dtype=D).expand(4, 3) / 14**0.5
    torch.testing.assert_close(found[:4] / sizes.unsqueeze(1), expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("size", [1e4, 1e5, 1e7])
def test_a_constraint_much_smaller_than_the_objective_is_kept(size):
    x, c = cp.Variable(3), cp.Parameter(3)
    layer = ConvexLayer(cp.Problem(cp.Minimize(cp.sum_squares(x - c)), [cp.norm(x) <= 1]), [c], [x])
    value = torch.tensor([1.0, 2, 3], dtype=D, requires_grad=True)
    (found,) = layer(size * value)
    torch.testing.assert_close(found, value / value.norm(), atol=1e-7, rtol=1e-7)
    gradient = torch.autograd.grad(found[0], value)[0]
    torch.testing.assert_close(
        gradient, torch.autograd.grad((value / value.norm())[0], value)[0], atol=1e-6, rtol=0
    )


def test_weak_curvature_and_tiny_constraints():
    x, q = cp.Variable(3), cp.Parameter(3)
    value = torch.tensor([-5.0, 0.3, -4.0], dtype=D)
    for objective, limit, exact in (
        (1e-9 * cp.sum_squares(x) + q @ x, cp.norm(x) <= 1, -value / value.norm()),
        (cp.sum_squares(x) + q @ x, cp.norm(x) <= 1e-8, -1e-8 * value / value.norm()),
    ):
        (found,) = ConvexLayer(cp.Problem(cp.Minimize(objective), [limit]), [q], [x])(value)
        torch.testing.assert_close(found, exact, atol=0, rtol=1e-7)


def test_where_only_one_point_is_feasible_there_is_no_derivative():
    x, c, k = cp.Variable(3), cp.Parameter(3), cp.Parameter()
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - c)), [cp.norm(x) <= 1, x[0] >= k])
    layer = ConvexLayer(problem, [c, k], [x])
    (found,) = layer(torch.tensor([0.3, 0.5, -0.2], dtype=D), torch.tensor([1.0, 0.9], dtype=D))
    assert layer.solution.status.tolist() == [im.Status.DEGENERATE, im.Status.CONVERGED]
    torch.testing.assert_close(found[0], torch.tensor([1.0, 0, 0], dtype=D), atol=3e-7, rtol=0)


@pytest.mark.parametrize("solver", [None, im.Clarabel()])
def test_problems_without_constraints(solver):
    x, c, P = cp.Variable(3), cp.Parameter(3), cp.Parameter((3, 3), PSD=True)
    matrix, value = torch.diag(torch.tensor([1.0, 2.0, 4.0], dtype=D)), normal(2, 3)
    for objective, M in ((cp.sum_squares(x) + c @ x, None), (cp.quad_form(x, P) + c @ x, matrix)):
        parameters, values = ([c], [value]) if M is None else ([c, P], [value, M])
        layer = ConvexLayer(cp.Problem(cp.Minimize(objective)), parameters, [x], solver=solver)
        inverse = torch.eye(3, dtype=D) if M is None else torch.linalg.inv(M)
        torch.testing.assert_close(layer(*values)[0], -value @ inverse / 2)
        assert gradcheck(lambda c: layer(c, *values[1:])[0], value.clone().requires_grad_())
    layer = ConvexLayer(
        cp.Problem(cp.Minimize(cp.quad_form(x, P) + c @ x)), [c, P], [x], solver=solver, on_failure="ignore"
    )
    layer(value[0], torch.zeros(3, 3, dtype=D))
    assert layer.solution.status == im.Status.UNBOUNDED


@pytest.mark.parametrize("solver", [None, im.Clarabel()])
def test_problems_whose_equations_fix_everything(solver):
    x, c = cp.Variable(3), cp.Parameter(3)
    layer = ConvexLayer(cp.Problem(cp.Minimize(cp.sum_squares(x)), [x == c]), [c], [x], solver=solver)
    value = normal(2, 3).requires_grad_()
    (found,) = layer(value)
    torch.testing.assert_close(found, value)
    torch.testing.assert_close(torch.autograd.grad(found[:, 0].sum(), value)[0][:, 0], torch.ones(2, dtype=D))


@pytest.mark.parametrize("limits", [[], [10.0]])
@pytest.mark.parametrize("first", [True, False])
def test_infinite_bounds_are_none(limits, first):
    """On both paths, and in whichever parameter comes first: zero times infinity is no number."""
    x, c, u, inf = cp.Variable(3), cp.Parameter(3), cp.Parameter(3), float("inf")
    constraints = [x <= u, *(cp.norm(x) <= r for r in limits)]
    order = [u, c] if first else [c, u]
    layer = ConvexLayer(
        cp.Problem(cp.Minimize(cp.sum_squares(x - c)), constraints), order, [x], on_failure="ignore"
    )
    value = torch.ones(3, dtype=D, requires_grad=True)
    bound = torch.tensor([[inf, 0.5, 2.0], [-inf, 0.0, 0.0]], dtype=D, requires_grad=True)
    (found,) = layer(*((bound, value) if first else (value, bound)))
    assert layer.solution.status.tolist() == [im.Status.CONVERGED, im.Status.INFEASIBLE]
    torch.testing.assert_close(found[0], torch.tensor([1.0, 0.5, 1.0], dtype=D))
    of_value, of_bound = torch.autograd.grad(found[0].sum(), [value, bound])
    torch.testing.assert_close(of_value, torch.tensor([1.0, 0.0, 1.0], dtype=D), atol=1e-9, rtol=0)
    torch.testing.assert_close(of_bound, torch.tensor([[0.0, 1, 0], [0, 0, 0]], dtype=D), atol=1e-9, rtol=0)


@pytest.mark.parametrize("limits", [[], [10.0]])
def test_an_empty_batch_and_an_empty_parameter(limits):
    x, c, u, e = cp.Variable((2, 3)), cp.Parameter((2, 3)), cp.Parameter(), cp.Parameter((0,))
    constraints = [x <= u, *(cp.norm(x, "fro") <= r for r in limits)]
    layer = ConvexLayer(cp.Problem(cp.Minimize(cp.sum_squares(x - c)), constraints), [c, u], [x])
    shared = torch.tensor(1.0, dtype=D, requires_grad=True)
    (found,) = layer(torch.zeros(0, 2, 3, dtype=D, requires_grad=True), shared)
    assert found.shape == (0, 2, 3)
    assert layer.solution.status.shape == (0,)
    assert torch.autograd.grad(found.sum(), shared)[0] == 0
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - 1) + cp.sum(e)), [x <= 0.5, *constraints[1:]])
    for lead in ((), (2,)):
        (found,) = ConvexLayer(problem, [e], [x])(torch.zeros(*lead, 0, dtype=D))
        torch.testing.assert_close(found, torch.full((*lead, 2, 3), 0.5, dtype=D))


@pytest.mark.parametrize("limits", [[], [10.0]])
def test_the_last_solution_under_vmap_is_of_the_whole_batch(limits):
    x, c = cp.Variable(3), cp.Parameter(3)
    constraints = [x <= 1, *(cp.norm(x) <= r for r in limits)]
    layer = ConvexLayer(cp.Problem(cp.Minimize(cp.sum_squares(x - c)), constraints), [c], [x])
    torch.func.vmap(layer)(normal(4, 3))
    assert layer.solution.status.tolist() == [0] * 4
    assert layer.solution.value[0].shape == (4, 3)
    assert layer.solution.residual.max() < 1e-8


def test_smoothing_and_settings_of_the_adjoint():
    x, c = cp.Variable(2), cp.Parameter(2)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - c)), [x <= 1])
    value = torch.tensor([2.0, 0.5], dtype=D, requires_grad=True)
    gradients = []
    for adjoint in (im.KKTAdjoint(), im.KKTAdjoint(smoothing=1e-2)):
        (found,) = ConvexLayer(problem, [c], [x], adjoint=adjoint)(value)
        gradients.append(torch.autograd.grad(found.sum(), value)[0])
        eye = torch.eye(2, dtype=D)
        z = im.qp(2 * eye, -2 * value, eye, torch.ones(2, dtype=D), adjoint=adjoint).value
        torch.testing.assert_close(gradients[-1], torch.autograd.grad(z.sum(), value)[0])
    assert (gradients[0] - gradients[1]).abs().min() > 1e-4
    conic = cp.Problem(cp.Minimize(cp.sum_squares(x - c)), [cp.norm(x) <= 1])
    with pytest.raises(ValueError, match="smoothing"):
        ConvexLayer(conic, [c], [x], adjoint=im.KKTAdjoint(smoothing=1e-2))
    with pytest.raises(TypeError, match="KKTAdjoint, got 'exact'"):
        ConvexLayer(conic, [c], [x], adjoint="exact")
    layer = ConvexLayer(conic, [c], [x], adjoint=im.KKTAdjoint(rtol=1e-300))
    with pytest.raises(ValueError, match="cannot reach rtol=1e-300"):
        torch.autograd.grad(layer(value)[0].sum(), value)


# ------------------------------------------------------------------------------------------------ failures


@pytest.mark.parametrize("solver", [im.InteriorPoint(), im.Clarabel()])
def test_one_infeasible_sample_harms_no_other(solver):
    c, r, x = cp.Parameter(3), cp.Parameter(), cp.Variable(3)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - c)), [cp.sum(x) <= r, x >= 0])
    layer = ConvexLayer(problem, [c, r], [x], solver=solver, on_failure="ignore")
    value = torch.tensor([[1.0, 1.7, -1.0]] * 3, dtype=D, requires_grad=True)
    bound = torch.tensor([1.0, -1.0, 2.0], dtype=D, requires_grad=True)
    (found,) = layer(value, bound)
    assert layer.solution.status.tolist() == [im.Status.CONVERGED, im.Status.INFEASIBLE, im.Status.CONVERGED]
    assert found[1].isnan().all()
    good = torch.tensor([0, 2])
    (alone,) = layer(value[good], bound[good])
    torch.testing.assert_close(found[good], alone)
    gradients = torch.autograd.grad(found.nan_to_num().square().sum(), [value, bound])
    exact = torch.autograd.grad(alone.square().sum(), [value, bound])
    for ours, theirs in zip(gradients, exact):
        torch.testing.assert_close(ours, theirs)
        assert (ours[1] == 0).all()


@pytest.mark.parametrize("solver", [im.InteriorPoint(), im.Clarabel()])
@pytest.mark.parametrize("broken", ["bound", "target", "weight"])
def test_a_sample_without_a_solution_leaves_what_the_batch_shares_its_derivative(solver, broken):
    A, b, w = cp.Parameter((5, 3)), cp.Parameter(5), cp.Parameter(nonneg=True)
    r, x = cp.Parameter(), cp.Variable(3)
    objective = cp.Minimize(cp.sum_squares(A @ x - b) + w * cp.sum_squares(x - 1))
    problem = cp.Problem(objective, [cp.sum(x) <= r, x >= 0])
    layer = ConvexLayer(problem, [A, b, w, r], [x], solver=solver, on_failure="ignore")
    matrix, target = normal(5, 3).requires_grad_(), normal(3, 5)
    weight, bound = torch.rand(3, dtype=D), torch.tensor([1.0, 1.5, 2.0], dtype=D)
    if broken == "bound":
        bound[1] = -1.0  # infeasible
    else:
        (target if broken == "target" else weight)[1] = float("nan")
    (found,) = layer(matrix, target, weight, bound)
    good = torch.tensor([0, 2])
    (alone,) = layer(matrix, target[good], weight[good], bound[good])
    ours, theirs = (torch.autograd.grad(z.square().sum(), matrix)[0] for z in (found[good], alone))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("solver", [None, im.Clarabel()])
def test_values_that_are_no_numbers_are_found_where_equations_fix_everything(solver):
    x, c = cp.Variable(2), cp.Parameter(2)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x)), [x == c])
    layer = ConvexLayer(problem, [c], [x], solver=solver, on_failure="ignore")
    for place in range(2):
        value = normal(2, 2)
        value[1, place] = float("nan")
        (found,) = layer(value)
        assert layer.solution.status.tolist() == [im.Status.CONVERGED, im.Status.NON_FINITE]
        torch.testing.assert_close(found[0], value[0])
        assert found[1].isnan().all()


def test_equations_that_contradict_each_other_are_infeasible():
    x, b = cp.Variable(2), cp.Parameter(3)
    constraints = [cp.norm(x) <= 3, x[1] == b[0], -x[1] == b[1], x[1] == b[2]]
    layer = ConvexLayer(cp.Problem(cp.Minimize(cp.sum_squares(x)), constraints), [b], [x], on_failure="ignore")
    layer(torch.tensor([[1.0, -1, 4], [1, -4, -2], [1, -1, 1]], dtype=D))
    assert layer.solution.status.tolist()[:2] == [im.Status.INFEASIBLE] * 2
    assert layer.solution.status[2] in (im.Status.CONVERGED, im.Status.DEGENERATE)


def test_failures_are_raised_with_the_variables_or_warned_of():
    problem, parameters, variables, (c, A, _) = robust()
    radius = torch.tensor([1.3, 0.0], dtype=D)
    A = torch.stack([A[0], torch.zeros(3, 3, dtype=D)])
    for make, solver in ((robust, None),):
        layer = ConvexLayer(problem, parameters, variables, solver=solver)
        with pytest.raises(im.SolverError, match=r"1 of 2 samples \(1 INFEASIBLE\).*sample 1") as caught:
            layer(c, A, radius)
        assert caught.value.solution.value[0].shape == (2, 3), make
    layer = ConvexLayer(problem, parameters, variables, on_failure="warn")
    with pytest.warns(im.ConvergenceWarning, match="INFEASIBLE"):
        layer(c, A, radius)


def test_failures_of_quadratic_programs_carry_the_variables():
    x, r = cp.Variable((2, 2)), cp.Parameter()
    layer = ConvexLayer(cp.Problem(cp.Minimize(cp.sum_squares(x)), [cp.sum(x) <= r, x >= 0]), [r], [x])
    with pytest.raises(im.SolverError, match="INFEASIBLE") as caught:
        layer(torch.tensor([1.0, -1.0], dtype=D))
    assert caught.value.solution.value[0].shape == (2, 2, 2)


def test_unbounded_and_broken_samples():
    c, x = cp.Parameter(3), cp.Variable(3)
    layer = ConvexLayer(cp.Problem(cp.Minimize(c @ x + cp.norm(x - 1))), [c], [x], on_failure="ignore")
    nan = float("nan")
    value = torch.tensor([[0.1, 0.2, 0.3], [2.0, 0.0, 0.0], [nan, 0.0, 0.0]], dtype=D, requires_grad=True)
    (found,) = layer(value)
    assert layer.solution.status[1:].tolist() == [im.Status.UNBOUNDED, im.Status.NON_FINITE]
    torch.testing.assert_close(found[0], torch.ones(3, dtype=D))
    assert found[1:].isnan().all()
    assert torch.autograd.grad(found[0].sum(), value)[0].isfinite().all()
    layer.on_failure = "raise"
    with pytest.raises(im.SolverError, match=r"sample 0: NON_FINITE.*NaN or inf is in a parameter's value"):
        layer(value[2:])


def test_too_few_steps_are_reported():
    problem, parameters, variables, values = entropy()
    solver = im.Clarabel(max_steps=2, polish=0)
    layer = ConvexLayer(problem, parameters, variables, solver=solver, on_failure="ignore")
    layer(*values)
    assert (layer.solution.status == im.Status.MAX_STEPS).all()
    assert (layer.solution.steps == 2).all()


def test_too_little_time_says_what_to_try():
    problem, parameters, variables, values = entropy()
    layer = ConvexLayer(problem, parameters, variables, solver=im.Clarabel(time_limit_s=1e-9))
    with pytest.raises(im.SolverError, match=r"MAX_STEPS.*raise max_steps and time_limit_s"):
        layer(*values)


# -------------------------------------------------------------------------------------------- the module


def test_shapes_dtypes_and_the_last_solution():
    problem, parameters, variables, values = control()
    layer = ConvexLayer(problem, parameters, variables)
    u, x = layer(*values)
    assert u.shape == (2, 1, 3)
    assert x.shape == (2, 2, 4)
    single = [v[0] if v.ndim > len(p.shape) else v for p, v in zip(parameters, values)]
    torch.testing.assert_close(layer(*single)[0], u[0], atol=1e-9, rtol=1e-9)
    assert layer.solution.status.shape == ()
    assert not layer.solution.value[0].requires_grad
    single = [v.float().requires_grad_() for v in single]
    u32, _ = layer(*single)
    assert u32.dtype == torch.float32
    torch.testing.assert_close(u32.double(), u[0], atol=1e-5, rtol=1e-5)
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(u32.sum(), single))
    assert not list(layer.parameters())


def test_layers_are_copied_and_pickled():
    problem, parameters, variables, values = robust()
    layer = ConvexLayer(problem, parameters, variables)
    (expected,) = layer(*values)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(other(*values)[0], expected, atol=1e-12, rtol=1e-12)


# ------------------------------------------------------------------------------------------ what is refused


def small():
    A, b, x = cp.Parameter((2, 3)), cp.Parameter(2, nonneg=True), cp.Variable(3)
    return cp.Problem(cp.Minimize(cp.sum_squares(A @ x - b) + cp.norm(x))), A, b, x


def test_problems_that_are_refused():
    problem, A, b, x = small()
    p, q = cp.Parameter(name="p", nonneg=True), cp.Parameter(name="q", nonneg=True)
    i, constrained = cp.Variable(integer=True), cp.Problem(problem.objective, [x >= 0])
    cases = [
        (cp.Problem(cp.Minimize(p * q * cp.norm(x)), []), [p, q], [x], "DPP"),
        (cp.Problem(cp.Minimize(-cp.norm(x) * p)), [p], [x], "rules of convex programming"),
        (cp.Problem(cp.Minimize(p * i + cp.square(i))), [p], [i], "integer"),
        (problem, [A], [x], "missing"),
        (problem, [A, b, p], [x], r"parameters\[2\], p of shape \(\), is not a Parameter"),
        (problem, [A, b, A], [x], "twice"),
        (problem, [A, b], [i], r"variables\[0\].*is not a Variable"),
        (constrained, [A, b], [i], rf"has: {x} of shape \(3,\); and the dual_variables"),
        (problem, [A, b], [], "variables is empty"),
        (cp.Problem(cp.Minimize(cp.norm(x))), [], [x], "no parameters"),
    ]
    for given, parameters, variables, says in cases:
        with pytest.raises(ValueError, match=says):
            ConvexLayer(given, parameters, variables)
    z, p = cp.Variable(pos=True), cp.Parameter(pos=True)
    geometric = cp.Problem(cp.Minimize(1 / z + p * z**0.5), [z * z**0.5 <= 2])
    with pytest.raises(ValueError, match="pass gp=True"):
        ConvexLayer(geometric, [p], [z])
    with pytest.raises(TypeError, match=r"cvxpy\.Problem, got a str"):
        ConvexLayer("problem", [A, b], [x])
    with pytest.raises(TypeError, match="parameters must be a list or tuple"):
        ConvexLayer(problem, A, [x])
    w = cp.Variable(2, complex=True)
    with pytest.raises(NotImplementedError, match="complex"):
        ConvexLayer(cp.Problem(cp.Minimize(cp.norm(w - b))), [b], [w])
    cone = cp.SOC(b[0], x)
    with pytest.raises(NotImplementedError, match="dual variable"):
        ConvexLayer(cp.Problem(cp.Minimize(cp.sum(x)), [cone]), [b], [cone.dual_variables[0]])


def test_solvers_that_are_refused():
    problem, A, b, x = small()
    with pytest.raises(ValueError, match=r"InteriorPoint.*1 second-order.*Clarabel"):
        ConvexLayer(problem, [A, b], [x], solver=im.InteriorPoint())
    with pytest.raises(TypeError, match="'CLARABEL'"):
        ConvexLayer(problem, [A, b], [x], solver="CLARABEL")
    with pytest.raises(ValueError, match="on_failure"):
        ConvexLayer(problem, [A, b], [x], on_failure="shout")
    with pytest.raises(TypeError, match="no setting 'eps'"):
        ConvexLayer(problem, [A, b], [x], solver=im.Clarabel(settings={"eps": 1e-3}))


def test_values_that_are_refused():
    problem, A, b, x = small()
    layer = ConvexLayer(problem, [A, b], [x])
    a, c = torch.ones(2, 3), torch.ones(2)
    cases = [
        ((a,), ValueError, "expected 2 values.*got 1"),
        ((a, c, c), ValueError, "got 3"),
        ((a.mT, c), ValueError, r"shape \(2, 3\), or \(B, 2, 3\).*got \(3, 2\)"),
        ((a, torch.ones(1, 4, 2)), ValueError, r"\(2,\), or \(B, 2\)"),
        ((a.expand(2, 2, 3), c.expand(3, 2)), ValueError, "disagree on the batch"),
        ((a.long(), c), TypeError, "int64"),
        ((a, c.double()), ValueError, "mix dtypes"),
        ((a, c.to("meta")), ValueError, "mix devices"),
        ((a.numpy(force=True), c), TypeError, "must be a tensor, got a ndarray"),
        ((a, -c), ValueError, "declared not to be negative; its value has -1"),
    ]
    for values, error, says in cases:
        with pytest.raises(error, match=says):
            layer(*values)
    with pytest.raises(TypeError, match="solver_args"):
        layer(a, c, solver_args={"eps": 1e-3})


@pytest.mark.parametrize(
    ("attributes", "good", "bad", "says"),
    [
        ({"symmetric": True}, 1e6 * torch.eye(2), torch.tensor([[1.0, 1.0], [0.0, 1.0]]), "its transpose by 1"),
        ({"PSD": True}, 1e12 * torch.eye(2), -torch.eye(2), "positive semidefinite; an eigenvalue.*-1"),
        ({"diag": True}, torch.eye(2), torch.ones(2, 2), "declared diagonal; off its pattern it has 1"),
        (
            {"sparsity": [(0, 1), (1, 1)]},
            torch.tensor([[0.0, 1], [0, 2]]),
            torch.eye(2),
            "sparse; off its pattern",
        ),
        ({"bounds": [0, 1]}, torch.eye(2), 3 * torch.eye(2), "out of them by 2"),
        ({"bounds": [None, 1]}, -torch.eye(2), 3 * torch.eye(2), "out of them by 2"),
        ({"pos": True}, torch.ones(2, 2), torch.eye(2), "declared positive; its value has 0"),
        ({"nonpos": True}, -torch.ones(2, 2), torch.eye(2), "not to be positive; its value has 1"),
    ],
)
def test_what_a_parameter_declares_holds_for_every_sample(attributes, good, bad, says):
    M, x = cp.Parameter((2, 2), **attributes), cp.Variable(2)
    layer = ConvexLayer(cp.Problem(cp.Minimize(cp.sum_squares(M @ x - 1) + cp.norm(x))), [M], [x])
    both = torch.stack([good, bad]).double()
    with pytest.raises(ValueError, match=f"{says}.* in sample 1"):
        layer(both)
    with pytest.raises(ValueError, match=f"{says}.* in sample 1"):  # whichever dimension it is that is mapped
        torch.func.vmap(lambda M: layer(M)[0], in_dims=2)(both.permute(1, 2, 0))
    assert layer(both[:1])[0].isfinite().all()


def test_values_that_break_what_their_parameter_declares():
    for attribute, value, says in (
        ("symmetric", torch.tensor([[1.0, 2.0], [0.0, 1.0]]), "symmetric; it differs from its transpose by 2"),
        ("PSD", torch.tensor([[1.0, 0.0], [0.0, -2.0]]), "positive semidefinite; an eigenvalue.*-2"),
        ("NSD", torch.tensor([[-1.0, 0.0], [0.0, 3.0]]), "negative semidefinite; an eigenvalue.*3"),
    ):
        M, x = cp.Parameter((2, 2), **{attribute: True}), cp.Variable(2)
        layer = ConvexLayer(cp.Problem(cp.Minimize(cp.sum_squares(M @ x - 1))), [M], [x])
        with pytest.raises(ValueError, match=says):
            layer(value)


@pytest.mark.parametrize("package", ["cvxpy", "clarabel"])
def test_a_missing_package_says_what_to_install(package, monkeypatch):
    problem, A, b, x = small()
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.partition(".")[0] == package:
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf'needs the package {package}: pip install "implicitly\[convex\]"'):
        ConvexLayer(problem, [A, b], [x])


def test_programs_of_the_same_matrices_may_be_split():
    z, q, h = cp.Variable(5), cp.Parameter(5), cp.Parameter(6)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(z) + q @ z), [normal(6, 5).numpy(force=True) @ z <= h])
    values = [normal(8, 5).requires_grad_(), torch.rand(8, 6, dtype=D, requires_grad=True)]
    results = []
    for solver in (im.ADMM(), im.InteriorPoint()):
        (found,) = ConvexLayer(problem, [q, h], [z], solver=solver)(*values)
        results.append((found, *torch.autograd.grad(found.square().sum(), values)))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, atol=1e-8, rtol=1e-8)


def test_larger_programs_are_factorised_sparse():
    from implicitly.argmin.convex.conic_jacobian import DENSE_UP_TO

    n, m = 40, 60
    x, A, b = cp.Variable(n), cp.Parameter((m, n)), cp.Parameter(m)
    problem = cp.Problem(cp.Minimize(cp.norm(A @ x - b) + 0.1 * cp.norm1(x)), [cp.norm(x) <= 1])
    layer = ConvexLayer(problem, [A, b], [x])
    pattern = layer._program.program.pattern
    assert pattern.n + pattern.m > DENSE_UP_TO
    values = [normal(2, m, n), normal(m)]
    steps = [normal(2, m, n), normal(m)]

    def f(t):
        return layer(*(v + t * s for v, s in zip(values, steps)))[0].square().sum()

    t = torch.zeros((), dtype=D, requires_grad=True)
    (gradient,) = torch.autograd.grad(f(t), t)
    difference = (f(t.detach() + 1e-5) - f(t.detach() - 1e-5)) / 2e-5
    torch.testing.assert_close(gradient, difference, atol=1e-6, rtol=1e-6)


def test_autocast_changes_nothing():
    x, center, rows = cp.Variable(5), cp.Parameter(5), cp.Parameter((3, 5))
    values = draw(4, 5, seed=0).float().requires_grad_(), draw(3, 5, seed=1).float().requires_grad_()
    for near in ([x >= 0, cp.sum(x) == 1], [cp.norm(x) <= 1]):
        problem = cp.Problem(cp.Minimize(cp.sum_squares(x - center)), [*near, rows @ x <= 1])
        layer = im.nn.ConvexLayer(problem, [center, rows], [x])
        exact = layer(*values)[0]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = layer(*values)[0]
        torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-6)
        gradients = [torch.autograd.grad(y.square().sum(), values) for y in (found, exact)]
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["quadratic", "conic", "definition"])
@pytest.mark.parametrize("batch", [(), (2,), (0,)])
def test_what_depends_on_no_parameter_has_a_graph_and_zero_gradients(kind, batch):
    """As results of operations of torch have."""
    b, x, y = cp.Parameter(2), cp.Variable(2), cp.Variable(2)
    objective = {
        "quadratic": cp.sum_squares(x),
        "conic": cp.norm(x - 1),
        "definition": cp.sum_squares(x) + cp.sum(y),
    }
    rows = [y >= 1] if kind == "definition" else []
    layer = ConvexLayer(cp.Problem(cp.Minimize(objective[kind] + cp.sum(b)), [x >= 1, *rows]), [b], [x])
    value = torch.tensor([1.0, 2.0], dtype=D).expand(*batch, 2).clone().requires_grad_()
    (found,) = layer(value)
    assert found.requires_grad
    assert found.shape == value.shape
    torch.testing.assert_close(found, torch.ones_like(found))
    found.square().sum().backward()
    assert value.grad is not None
    assert not value.grad.any()
    with torch.no_grad():
        assert not layer(value)[0].requires_grad
    assert not layer(value.detach())[0].requires_grad
    assert not torch.func.jacrev(lambda v: layer(v)[0])(value.detach()).any()


def test_errors_of_quadratic_programs_name_the_layer_and_its_parameters():
    b, low, x = cp.Parameter(2), cp.Parameter(), cp.Variable(2)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - b)), [x <= 1, x >= low])
    layer = ConvexLayer(problem, [b, low], [x])
    zero = torch.zeros(2, dtype=D)
    with pytest.raises(im.SolverError, match=r"^ConvexLayer: InteriorPoint did not converge for 1 of 1 samples"):
        layer(zero, torch.tensor(2.0, dtype=D))
    with pytest.raises(im.SolverError, match=r"^ConvexLayer: .*NaN or inf is in a parameter's value"):
        layer(zero + float("nan"), torch.tensor(0.0, dtype=D))
    layer = ConvexLayer(problem, [b, low], [x], adjoint=im.KKTAdjoint(max_steps=1, rtol=1e-15))
    (found,) = layer(torch.rand(2, dtype=D).requires_grad_(), torch.tensor(0.1, dtype=D))
    with pytest.raises(im.SolverError, match=r"^the backward solve of ConvexLayer: "):
        found.sum().backward()
    G = cp.Parameter((1, 2))
    layer = ConvexLayer(cp.Problem(cp.Minimize(cp.sum_squares(x)), [G @ x <= 1]), [G], [x], solver=im.ADMM())
    with pytest.raises(ValueError, match="of a ConvexLayer the parameters"):
        layer(torch.ones(2, 1, 2, dtype=D))
    adjoint = im.KKTAdjoint(rtol=1e-20)
    for objective in (cp.sum_squares(x - b), cp.norm(x - b)):
        layer = ConvexLayer(cp.Problem(cp.Minimize(objective), [x <= 1]), [b], [x], adjoint=adjoint)
        with pytest.raises(ValueError, match=r"KKTAdjoint: torch.float64 cannot reach"):
            layer(zero)
