"""The contract of fixed points and roots: condition x solver x adjoint x dtype."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.contracts import (
    ADJOINTS,
    RECORDABLE,
    SOLVERS,
    TRANSFORMS,
    assert_close,
    check_a_bad_sample,
    check_by_differences,
    check_dual_numbers,
    check_gradient,
    check_independence,
    check_third_order,
    check_transform,
    check_value,
)
from tests.problems import NAMED, PROBLEMS


def _id(row):
    return str(row).removeprefix("torch.") if isinstance(row, torch.dtype) else row.name


VALUES = [(p, s, d) for p in PROBLEMS for s in SOLVERS for d in p.dtypes if s.fits(p)]


def _paired():
    """Every condition with every adjoint, in every dtype, the solvers taking turns so that every pair meets."""
    for i, problem in enumerate(PROBLEMS):
        for j, adjoint in enumerate(ADJOINTS):
            fitting = [s for s in SOLVERS if s.fits(problem) and adjoint.fits(problem, s)]
            for k, dtype in enumerate(problem.dtypes):
                if fitting:
                    yield problem, fitting[(i + j + k) % len(fitting)], adjoint, dtype


GRADIENTS = list(_paired())
SOLVER = {row.name: row for row in SOLVERS}
ADJOINT = {row.name: row for row in ADJOINTS}
EXACT = [row for row in ADJOINTS if row.exact and not row.recorded]
# Derivatives do not know how the point was found: each condition meets one solver, each solver one condition.
ORDERS = [(p, SOLVER["Newton"], ADJOINT["GMRES"]) for p in PROBLEMS]
ORDERS += [(NAMED["tanh_root"], SOLVER["Broyden"], a) for a in EXACT]
NESTED = ("vjp", "jvp", "hessian", "vmap", "vmap-grad", "grad-vmap")
# All transforms of one condition; of the others, and of the other adjoints, the rarer ones take turns.
TRANSFORMED = [
    (*row, t)
    for i, row in enumerate(ORDERS)
    for j, t in enumerate(TRANSFORMS)
    if t.name in NESTED or row[0].name == "tanh" or (i + j) % 3 == 0
]
BY_SOLVER = [(NAMED["tanh_root"], s, ADJOINT["GMRES"]) for s in SOLVERS if s.name not in ("Newton", "Broyden")]
TRANSFORMED += [(*row, t) for row in BY_SOLVER for t in TRANSFORMS if t.name in NESTED]
ORDERS += BY_SOLVER


@pytest.mark.parametrize(("problem", "solver", "dtype"), VALUES, ids=_id)
def test_the_value_is_the_exact_answer_and_keeps_the_kind_of_z0(problem, solver, dtype):
    check_value(problem, solver, dtype)


@pytest.mark.parametrize(("problem", "solver", "adjoint", "dtype"), GRADIENTS, ids=_id)
def test_the_gradient_is_what_the_adjoint_promises(problem, solver, adjoint, dtype):
    check_gradient(problem, solver, adjoint, dtype)


@pytest.mark.parametrize(("problem", "solver", "adjoint"), ORDERS, ids=_id)
def test_derivatives_agree_with_finite_differences(problem, solver, adjoint):
    check_by_differences(problem, solver, adjoint)


@pytest.mark.parametrize(("problem", "solver", "adjoint"), ORDERS, ids=_id)
def test_third_derivatives_are_exact(problem, solver, adjoint):
    check_third_order(problem, solver, adjoint)


@pytest.mark.parametrize(("problem", "solver", "adjoint"), ORDERS, ids=_id)
def test_dual_numbers_are_exact_and_reverse_mode_goes_over_them(problem, solver, adjoint):
    check_dual_numbers(problem, solver, adjoint)


@pytest.mark.parametrize(("problem", "solver", "adjoint", "transform"), TRANSFORMED, ids=_id)
def test_torch_func_transforms_are_exact(problem, solver, adjoint, transform):
    check_transform(problem, solver, adjoint, transform)


@pytest.mark.parametrize("transform", [t for t in TRANSFORMS if t.name in RECORDABLE], ids=_id)
def test_transforms_go_through_a_recorded_solve(transform):
    check_transform(NAMED["tanh"], SOLVER["FixedPointIteration"], ADJOINT["Unrolled"], transform)


BATCHED = [(p, SOLVER["Anderson"]) for p in PROBLEMS if p.in_dims]
BATCHED += [(NAMED["tanh"], s) for s in SOLVERS if s.name != "Anderson"]


@pytest.mark.parametrize(("problem", "solver"), BATCHED, ids=_id)
@settings(max_examples=6)
@given(data=st.data(), give_in_dims=st.booleans())
def test_samples_do_not_depend_on_each_other(problem, solver, data, give_in_dims):
    rows = data.draw(st.lists(st.integers(0, problem.batch - 1), min_size=1, max_size=5))
    check_independence(problem, solver, rows, give_in_dims)


BAD = [(p, s, ADJOINT["GMRES"]) for p, s in BATCHED]
BAD += [(NAMED["tanh"], SOLVER["Broyden"], a) for a in ADJOINTS]


@pytest.mark.parametrize("give_in_dims", [False, True], ids=["in_dims unknown", "in_dims given"])
@pytest.mark.parametrize(("problem", "solver", "adjoint"), BAD, ids=_id)
def test_a_sample_of_nan_harms_no_other(problem, solver, adjoint, give_in_dims):
    check_a_bad_sample(problem, solver, adjoint, bad=1, give_in_dims=give_in_dims)


@pytest.mark.parametrize("solver", SOLVERS, ids=_id)
def test_channels_last_comes_out_as_it_went_in(solver):
    problem = NAMED["image"]
    z0 = problem.z0.to(memory_format=torch.channels_last)
    value = problem.solve(z0=z0, solver=solver.make(rtol=1e-10)).value
    assert value.is_contiguous(memory_format=torch.channels_last)
    assert_close(value, problem.exact(*problem.args), 1e-9)
