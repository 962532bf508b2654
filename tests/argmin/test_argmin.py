"""The contract of minima: objective x solver x adjoint x dtype, as of fixed points."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import implicitly as im
from tests.argmin.problems import EQUALITIES, LEAST_SQUARES, NAMED, OVER_SETS, PROBLEMS
from tests.contracts import (
    ADJOINTS,
    RECORDABLE,
    TRANSFORMS,
    AdjointRow,
    SolverRow,
    as_vector,
    check_a_bad_sample,
    check_by_differences,
    check_dual_numbers,
    check_gradient,
    check_independence,
    check_third_order,
    check_transform,
    check_value,
    library,
)
from tests.problems import draw

D = torch.float64

UNCONSTRAINED = (
    SolverRow("LBFGS", im.LBFGS),
    SolverRow("LBFGS-short", functools.partial(im.LBFGS, history=2)),
    SolverRow("GradientDescent", im.GradientDescent),
    SolverRow("GradientDescent-accelerated", functools.partial(im.GradientDescent, accelerated=True)),
    SolverRow("Newton", im.Newton),
    SolverRow("NewtonKrylov", im.NewtonKrylov),
)
PROJECTING = (
    SolverRow("ProjectedGradient", im.ProjectedGradient),
    SolverRow("ProjectedGradient-plain", functools.partial(im.ProjectedGradient, accelerated=False)),
)
OF_EQUATIONS = (SolverRow("NewtonKKT", im.NewtonKKT),)
SQUARING = (
    SolverRow("LevenbergMarquardt", im.LevenbergMarquardt),
    SolverRow("GaussNewton", im.GaussNewton),
    SolverRow("LBFGS", im.LBFGS),
)
SOLVERS = UNCONSTRAINED + PROJECTING + OF_EQUATIONS + SQUARING[:2]
SOLVER = {row.name: row for row in SOLVERS}
TABLE = [(p, s) for p in PROBLEMS for s in UNCONSTRAINED]
TABLE += [(p, s) for p in OVER_SETS for s in PROJECTING]
TABLE += [(p, s) for p in EQUALITIES for s in OF_EQUATIONS]
TABLE += [(p, s) for p in LEAST_SQUARES for s in SQUARING]
# Rosenbrock's valley is for methods that learn its curvature.
SLOW = ("GradientDescent", "GradientDescent-accelerated", "NewtonKrylov")
TABLE = [(p, s) for p, s in TABLE if p.name != "rosenbrock" or s.name not in SLOW]
# Derivatives do not know how the point was found: each condition meets one solver, each solver one condition.
FIRST = {p.name: s for p, s in reversed(TABLE)}
CONDITIONS = [(p, FIRST[p.name]) for p in NAMED.values()]
BY_SOLVER = [(NAMED["quartic_0d"], s) for s in UNCONSTRAINED[1:]]
BY_SOLVER += [(NAMED["ball"], PROJECTING[1]), (NAMED["valley"], SQUARING[1])]


def _id(row):
    return str(row).removeprefix("torch.") if isinstance(row, torch.dtype) else row.name


VALUES = [(p, s, d) for p, s in TABLE for d in p.dtypes]
ADJOINT = {row.name: row for row in ADJOINTS}
GMRES = ADJOINT["GMRES"]
SYMMETRIC = AdjointRow("CG", lambda rtol: im.ImplicitAdjoint(linear_solver=im.CG(rtol=rtol, atol=0.0)))
EXACT = [SYMMETRIC, *(ADJOINT[name] for name in ("GMRES", "BiCGStab", "DenseLU", "by-Broyden"))]
ORDERS = [(p, s, GMRES) for p, s in CONDITIONS + BY_SOLVER]
# Where there are few numbers to differentiate by: each takes two solves.
DIFFERENCED = ("quartic_0d", "one_system", "ball", "plane")
ORDERS += [(NAMED["one_system"], SOLVER["Newton"], SYMMETRIC)]


@pytest.mark.parametrize(("problem", "solver", "dtype"), VALUES, ids=_id)
def test_the_value_is_the_exact_answer_and_keeps_the_kind_of_z0(problem, solver, dtype):
    check_value(problem, solver, dtype)


GRADIENTS = [(p, s, GMRES, d) for p, s in TABLE for d in p.dtypes]
GRADIENTS += [(p, SOLVER["LBFGS"], a, D) for p in PROBLEMS for a in EXACT if a is not GMRES]


@pytest.mark.parametrize(("problem", "solver", "adjoint", "dtype"), GRADIENTS, ids=_id)
def test_the_gradient_is_that_of_the_exact_answer(problem, solver, adjoint, dtype):
    check_gradient(problem, solver, adjoint, dtype)


@pytest.mark.parametrize(
    ("problem", "solver", "adjoint"), [row for row in ORDERS if row[0].name in DIFFERENCED], ids=_id
)
def test_derivatives_agree_with_finite_differences(problem, solver, adjoint):
    check_by_differences(problem, solver, adjoint)


@pytest.mark.parametrize(
    ("problem", "solver"), [row for row in CONDITIONS if row[0].name not in DIFFERENCED], ids=_id
)
def test_second_derivatives_agree_with_finite_differences(problem, solver):
    """Along random directions, in reverse mode."""
    f, v = library(problem, solver, GMRES), as_vector(problem).requires_grad_()
    assert torch.autograd.gradgradcheck(f, v, fast_mode=True)


@pytest.mark.parametrize(("problem", "solver", "adjoint"), ORDERS, ids=_id)
def test_third_derivatives_are_exact(problem, solver, adjoint):
    check_third_order(problem, solver, adjoint)


@pytest.mark.parametrize(("problem", "solver", "adjoint"), ORDERS, ids=_id)
def test_dual_numbers_are_exact_and_reverse_mode_goes_over_them(problem, solver, adjoint):
    check_dual_numbers(problem, solver, adjoint)


TRANSFORMED = [(NAMED[name], FIRST[name], t) for name in ("one_system",) for t in TRANSFORMS]
NESTED = ("vmap", "jvp", "hessian")
BRIEF = ("quadratic", "ball", "circle", "decay", "quartic_0d", "valley")
TRANSFORMED += [
    (p, s, t) for p, s in BY_SOLVER + CONDITIONS if p.name in BRIEF for t in TRANSFORMS if t.name in NESTED
]


# Their exact answers look at numbers, which vmap cannot.
TRANSFORMED = [(p, s, t) for p, s, t in TRANSFORMED if p.name not in ("box", "simplex") or t.name != "vmap"]


@pytest.mark.parametrize(("problem", "solver", "transform"), TRANSFORMED, ids=_id)
def test_torch_func_transforms_are_exact(problem, solver, transform):
    check_transform(problem, solver, GMRES, transform)


@pytest.mark.parametrize("transform", [t for t in TRANSFORMS if t.name in RECORDABLE], ids=_id)
def test_transforms_go_through_a_recorded_solve(transform):
    check_transform(NAMED["quadratic"], SOLVER["LBFGS"], ADJOINT["Unrolled"], transform)


RECORDED = [(NAMED["logistic"], s) for s in UNCONSTRAINED]
RECORDED += [(NAMED["ball"], PROJECTING[0]), (NAMED["decay"], SQUARING[0])]


@pytest.mark.parametrize(("problem", "solver"), RECORDED, ids=_id)
def test_a_recorded_solve_has_the_derivative_that_the_theorem_gives(problem, solver):
    check_gradient(problem, solver, ADJOINT["Unrolled"], torch.float64)


# Elementwise, or small: sums of other lengths round otherwise, and searches notice.
BATCHED = [(p, s) for p, s in CONDITIONS if p.in_dims] + BY_SOLVER


@pytest.mark.parametrize(("problem", "solver"), BATCHED, ids=_id)
@settings(max_examples=2)
@given(data=st.data(), give_in_dims=st.booleans())
def test_samples_do_not_depend_on_each_other(problem, solver, data, give_in_dims):
    rows = data.draw(st.lists(st.integers(0, problem.batch - 1), min_size=1, max_size=5))
    check_independence(problem, solver, rows, give_in_dims)


@pytest.mark.parametrize("give_in_dims", [False, True], ids=["in_dims unknown", "in_dims given"])
@pytest.mark.parametrize(("problem", "solver"), BATCHED, ids=_id)
def test_a_sample_of_nan_harms_no_other(problem, solver, give_in_dims):
    check_a_bad_sample(problem, solver, GMRES, bad=1, give_in_dims=give_in_dims)


NARROW = (torch.float32, torch.bfloat16, torch.float16, torch.complex64)


@pytest.fixture
def wide_default():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def far_from_quadratic(z, x):
    e = (z - x).abs().square()
    return (e * torch.arange(1, 5, dtype=e.dtype)).sum(1) + e.square().sum(1)


@pytest.mark.usefixtures("wide_default")
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("solver", [*UNCONSTRAINED, *PROJECTING, *OF_EQUATIONS, *SQUARING], ids=_id)
def test_states_keep_their_dtype_whatever_the_default_is(solver, dtype):
    x = (0.1 * draw(3, 4, seed=61)).to(dtype)
    z0 = torch.ones(3, 4, dtype=dtype)
    f, entry, options = far_from_quadratic, im.argmin, {}
    if solver in PROJECTING:
        options = {"constraint": lambda z, x: z / z.abs().norm(dim=1, keepdim=True).clamp(min=1)}
    elif solver in OF_EQUATIONS:
        options = {"constraint": im.Equality(lambda z, x: (z - x).abs().square().sum(1) - 1)}
    elif solver in SQUARING:
        f, entry = lambda z, x: torch.cat([z - x, (z - x) ** 3], 1), im.least_squares
    solution = entry(f, z0, x, solver=solver.kind(), on_failure="ignore", **options)
    assert solution.value.dtype == dtype
    assert bool(solution.converged.all())


@pytest.mark.usefixtures("wide_default")
@pytest.mark.parametrize("solver", UNCONSTRAINED[:5], ids=_id)
def test_autocast_does_not_mind_the_default_dtype(solver):
    W, z0 = draw(4, 4, seed=62).float(), torch.zeros(3, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        objective = lambda z, W: ((z @ W - 1) ** 2).sum(1) + z.square().sum(1)  # noqa: E731
        solution = im.argmin(objective, z0.float(), W, solver=solver.kind(), on_failure="ignore")
    assert solution.value.dtype == torch.float32


@pytest.mark.parametrize("dtype", [D, torch.float32], ids=str)
@pytest.mark.parametrize("solver", [*UNCONSTRAINED[:5], *SQUARING], ids=_id)
def test_objectives_in_small_units_are_not_taken_for_solved(solver, dtype):
    x, z0 = draw(3, 4, seed=63).to(dtype), torch.zeros(3, 4, dtype=dtype)
    f, entry, unit = far_from_quadratic, im.argmin, 1e-12 if dtype == D else 1e-8
    if solver in SQUARING:
        f, entry, unit = lambda z, x: torch.cat([z - x, (z - x) ** 3], 1), im.least_squares, unit**0.5
    value = entry(lambda z, x: unit * f(z, x), z0, x, solver=solver.kind()).value
    expected = entry(f, z0, x, solver=solver.kind()).value
    torch.testing.assert_close(value, expected, rtol=0, atol=1e-6 if dtype == D else 1e-2)


@pytest.mark.parametrize("dtype", [D, torch.float32], ids=str)
@pytest.mark.parametrize("unit", [1e-8, 1.0, 1e8])
@pytest.mark.parametrize("solver", UNCONSTRAINED[:5], ids=_id)
def test_a_start_at_zero_that_is_the_minimum_but_for_rounding_is_one_in_any_units(solver, unit, dtype):
    x = draw(16, 50, 4, seed=64).to(dtype)
    X = torch.cat([x, -x], 1)

    def logistic(z, X):
        return unit * torch.nn.functional.softplus(torch.einsum("bij,bj->bi", X, z)).mean(1)

    slope = torch.func.grad(lambda z: logistic(z, X).sum())(torch.zeros(16, 4, dtype=dtype))
    assert slope.abs().max() > 0
    solution = im.argmin(logistic, torch.zeros(16, 4, dtype=dtype), X, solver=solver.kind())
    assert solution.steps.max() == 0


def test_the_gradient_in_units_whose_curvature_has_no_square():
    c, unit = torch.randn(4, 3, requires_grad=True), 1e-11  # curvatures are 1e22, in float32

    def objective(z, c):
        return (z / unit - c).square().sum(1)

    value = im.argmin(objective, torch.zeros(4, 3), c).value / unit
    torch.testing.assert_close(value, c)
    torch.testing.assert_close(torch.autograd.grad(value.sum(), c)[0], torch.ones(4, 3))
