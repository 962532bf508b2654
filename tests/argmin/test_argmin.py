"""The contract of minima: objective x solver x adjoint x dtype, as of fixed points."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import implicitly as im
from tests.argmin.problems import NAMED, PROBLEMS
from tests.contracts import (
    ADJOINTS,
    RECORDABLE,
    TRANSFORMS,
    SolverRow,
    check_a_bad_sample,
    check_by_differences,
    check_dual_numbers,
    check_gradient,
    check_independence,
    check_third_order,
    check_transform,
    check_value,
)

SOLVERS = (
    SolverRow("LBFGS", im.LBFGS),
    SolverRow("LBFGS-short", functools.partial(im.LBFGS, history=2)),
    SolverRow("GradientDescent", im.GradientDescent),
    SolverRow("GradientDescent-accelerated", functools.partial(im.GradientDescent, accelerated=True)),
    SolverRow("Newton", im.Newton),
    SolverRow("NewtonKrylov", im.NewtonKrylov),
)
FIRST_ORDER = ("GradientDescent", "GradientDescent-accelerated")


def _id(row):
    return str(row).removeprefix("torch.") if isinstance(row, torch.dtype) else row.name


def _fits(problem, solver):
    """Rosenbrock's valley is for methods that learn its curvature."""
    return problem.name != "rosenbrock" or solver.name in ("LBFGS", "LBFGS-short", "Newton")


VALUES = [(p, s, d) for p in PROBLEMS for s in SOLVERS for d in p.dtypes if _fits(p, s)]
SOLVER = {row.name: row for row in SOLVERS}
ADJOINT = {row.name: row for row in ADJOINTS}
EXACT = [row for row in ADJOINTS if row.name in ("GMRES", "BiCGStab", "DenseLU", "by-Broyden")]
ORDERS = [(p, SOLVER["LBFGS"], ADJOINT["GMRES"]) for p in PROBLEMS]
ORDERS += [(NAMED["logistic"], s, ADJOINT["GMRES"]) for s in SOLVERS if s.name != "LBFGS"]
ORDERS += [(NAMED["logistic"], SOLVER["Newton"], a) for a in EXACT if a.name != "GMRES"]


@pytest.mark.parametrize(("problem", "solver", "dtype"), VALUES, ids=_id)
def test_the_value_is_the_exact_answer_and_keeps_the_kind_of_z0(problem, solver, dtype):
    check_value(problem, solver, dtype)


GRADIENTS = [(p, a, d) for p in PROBLEMS for a in EXACT for d in p.dtypes]


@pytest.mark.parametrize(("problem", "adjoint", "dtype"), GRADIENTS, ids=_id)
def test_the_gradient_is_that_of_the_exact_answer(problem, adjoint, dtype):
    check_gradient(problem, SOLVER["LBFGS"], adjoint, dtype)


@pytest.mark.parametrize(("problem", "solver", "adjoint"), ORDERS, ids=_id)
def test_derivatives_agree_with_finite_differences(problem, solver, adjoint):
    check_by_differences(problem, solver, adjoint)


@pytest.mark.parametrize(("problem", "solver", "adjoint"), ORDERS, ids=_id)
def test_third_derivatives_are_exact(problem, solver, adjoint):
    check_third_order(problem, solver, adjoint)


@pytest.mark.parametrize(("problem", "solver", "adjoint"), ORDERS, ids=_id)
def test_dual_numbers_are_exact_and_reverse_mode_goes_over_them(problem, solver, adjoint):
    check_dual_numbers(problem, solver, adjoint)


@pytest.mark.parametrize("transform", TRANSFORMS, ids=_id)
@pytest.mark.parametrize("problem", [NAMED["logistic"], NAMED["one_system"]], ids=_id)
def test_torch_func_transforms_are_exact(problem, transform):
    check_transform(problem, SOLVER["LBFGS"], ADJOINT["GMRES"], transform)


@pytest.mark.parametrize("transform", [t for t in TRANSFORMS if t.name in ("vmap", "grad", "jvp")], ids=_id)
@pytest.mark.parametrize("solver", SOLVERS, ids=_id)
def test_every_solver_runs_under_transforms(solver, transform):
    check_transform(NAMED["quadratic"], solver, ADJOINT["GMRES"], transform)


@pytest.mark.parametrize("transform", [t for t in TRANSFORMS if t.name in RECORDABLE], ids=_id)
def test_transforms_go_through_a_recorded_solve(transform):
    check_transform(NAMED["quadratic"], SOLVER["LBFGS"], ADJOINT["Unrolled"], transform)


@pytest.mark.parametrize("solver", SOLVERS, ids=_id)
def test_a_recorded_solve_has_the_derivative_that_the_theorem_gives(solver):
    check_gradient(NAMED["logistic"], solver, ADJOINT["Unrolled"], torch.float64)


BATCHED = [(p, SOLVER["LBFGS"]) for p in PROBLEMS if p.in_dims]
BATCHED += [(NAMED["quartic_0d"], s) for s in SOLVERS if s.name != "LBFGS"]


@pytest.mark.parametrize(("problem", "solver"), BATCHED, ids=_id)
@settings(max_examples=4)
@given(data=st.data(), give_in_dims=st.booleans())
def test_samples_do_not_depend_on_each_other(problem, solver, data, give_in_dims):
    rows = data.draw(st.lists(st.integers(0, problem.batch - 1), min_size=1, max_size=5))
    check_independence(problem, solver, rows, give_in_dims)


@pytest.mark.parametrize("give_in_dims", [False, True], ids=["in_dims unknown", "in_dims given"])
@pytest.mark.parametrize(("problem", "solver"), BATCHED, ids=_id)
def test_a_sample_of_nan_harms_no_other(problem, solver, give_in_dims):
    check_a_bad_sample(problem, solver, ADJOINT["GMRES"], bad=1, give_in_dims=give_in_dims)
