"""The contract of trajectories: equation x method x adjoint x dtype."""

from __future__ import annotations

import gc
import random
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import implicitly as im
from implicitly.ode.adjoints import TrajectoryAdjoint
from implicitly.ode.method import Method
from tests.contracts import RECORDABLE, TRANSFORMS, compare_dual_numbers, compare_third_order, compare_transform
from tests.leaks import bytes_of, living_tensors, saved_tensors
from tests.ode.contracts import (
    ADJOINTS,
    METHODS,
    as_vector,
    check_a_bad_sample,
    check_a_loop_over_samples,
    check_by_differences,
    check_gradient,
    check_independence,
    check_value,
    discrete,
    library,
)
from tests.ode.problems import EQUATIONS, NAMED, Mixing
from tests.problems import draw, matrix

DTYPES = (torch.float64, torch.float32)


def _id(row):
    if isinstance(row, bool):
        return "in_dims_given" if row else "in_dims_unknown"
    return str(row).removeprefix("torch.") if isinstance(row, torch.dtype) else row.name


def exported(kinds):
    return {v for v in (getattr(im, name) for name in im.__all__) if isinstance(v, type) and issubclass(v, kinds)}


def test_every_exported_method_and_adjoint_has_a_row():
    assert {row.kind for row in METHODS} == exported(Method)
    assert {row.kind for row in ADJOINTS} == exported(TrajectoryAdjoint) | {im.UnrolledAdjoint}


FITTING = [(e, m) for e in EQUATIONS for m in METHODS if m.fits(e)]


VALUES = [(e, m, DTYPES[i % 2]) for i, (e, m) in enumerate(FITTING)]
VALUES += [
    (e, m, DTYPES[1 - i % 2]) for i, (e, m) in enumerate(FITTING) if m.name in ("RK4", "Dopri5", "Kvaerno5")
]


@pytest.mark.parametrize(("equation", "method", "dtype"), VALUES, ids=_id)
def test_the_value_is_the_exact_solution_and_of_the_kind_of_y0(equation, method, dtype):
    check_value(equation, method, dtype)


def _paired():
    """Every method with every adjoint and every other equation, the adjoints taking turns."""
    for j, method in enumerate(METHODS):
        for i, equation in enumerate(e for e in EQUATIONS if method.fits(e)):
            fitting = [a for a in ADJOINTS if a.fits(equation)]
            if (i + j) % 2 and not method.needs_pair:
                continue
            yield equation, method, fitting[(i + j) % len(fitting)]
            if method.needs_pair:  # which few equations have
                yield equation, method, fitting[(i + j + 1) % len(fitting)]


@pytest.mark.parametrize(("equation", "method", "adjoint"), list(_paired()), ids=_id)
def test_the_gradient_is_that_of_the_exact_solution(equation, method, adjoint):
    check_gradient(equation, method, adjoint, torch.float64)


def test_every_method_meets_every_adjoint():
    met = {(method.name, adjoint.name) for _, method, adjoint in _paired()}
    assert met == {(m.name, a.name) for m in METHODS for a in ADJOINTS}


CHECKPOINT, BACKSOLVE, UNROLLED = ADJOINTS
METHOD = {row.name: row for row in METHODS}
SMALL = [(NAMED["driven" if m.needs_pair else "number"], m, CHECKPOINT) for m in METHODS]
SMALL += [(e, m, UNROLLED) for e, m, _ in SMALL if m.name in ("Dopri5", "Adams", "ImplicitMidpoint", "Leapfrog")]
SMALL += [(NAMED["complex"], METHOD["RK4"], CHECKPOINT), (NAMED["own_times"], METHOD["Bosh3"], CHECKPOINT)]


@pytest.mark.parametrize(("equation", "method", "adjoint"), SMALL, ids=_id)
def test_derivatives_agree_with_finite_differences(equation, method, adjoint):
    check_by_differences(equation, method, adjoint)


BATCHED = [(NAMED["oscillators" if m.needs_pair else "samples"], m) for m in METHODS]
TURNS = [(e, m, ADJOINTS[i % 3], i // 3 % 2 == 0) for i, (e, m) in enumerate(BATCHED)]
TURNS += [(e, m, a, d) for e, m in BATCHED if m.name == "Dopri5" for a in ADJOINTS for d in (False, True)]
TURNS = list(dict.fromkeys(TURNS))


@pytest.mark.parametrize(("equation", "method", "adjoint", "give_in_dims"), TURNS, ids=_id)
def test_a_batch_is_a_loop_over_samples(equation, method, adjoint, give_in_dims):
    check_a_loop_over_samples(equation, method, adjoint, give_in_dims)


@pytest.mark.parametrize(("equation", "method", "adjoint", "give_in_dims"), TURNS, ids=_id)
def test_a_sample_of_nan_harms_no_other(equation, method, adjoint, give_in_dims):
    check_a_bad_sample(equation, method, adjoint, bad=1, give_in_dims=give_in_dims)


# ------------------------------------------------------------------------ transforms, in the orders they compose


DT = 0.4


@pytest.mark.parametrize("transform", TRANSFORMS, ids=_id)
@pytest.mark.parametrize("equation", [NAMED[name] for name in ("number", "short", "complex")], ids=_id)
def test_torch_func_transforms_are_exact(equation, transform):
    f = library(equation, im.RK4(dt=DT), im.RecursiveCheckpointAdjoint())
    compare_transform(transform, f, discrete(equation, DT), as_vector(equation))


@pytest.mark.parametrize("transform", [t for t in TRANSFORMS if t.name in RECORDABLE], ids=_id)
def test_transforms_go_through_a_recorded_solve(transform):
    equation = NAMED["number"]
    f = library(equation, im.RK4(dt=DT), im.UnrolledAdjoint())
    compare_transform(transform, f, discrete(equation, DT), as_vector(equation))


@pytest.mark.parametrize("adjoint", [CHECKPOINT, UNROLLED], ids=_id)
@pytest.mark.parametrize("equation", [NAMED[name] for name in ("number", "short")], ids=_id)
def test_third_derivatives_and_dual_numbers_are_exact(equation, adjoint):
    f, v = library(equation, im.RK4(dt=DT), adjoint.kind()), as_vector(equation)
    compare_third_order(f, discrete(equation, DT), v)
    compare_dual_numbers(f, discrete(equation, DT), v)


@pytest.mark.parametrize("adjoint", [BACKSOLVE], ids=_id)
def test_first_derivatives_only_are_said_to_be(adjoint):
    f, v = library(NAMED["number"], im.RK4(dt=DT), adjoint.kind()), as_vector(NAMED["number"])
    for transform in TRANSFORMS:
        with pytest.raises(NotImplementedError, match="RecursiveCheckpointAdjoint"):
            transform.apply(f)(transform.point(v))


# ----------------------------------------------------------------------------------------- samples, determinism


@pytest.mark.parametrize("adjoint", [CHECKPOINT, UNROLLED], ids=_id)
@pytest.mark.parametrize("name", ["samples", "own_times", "tree", "image", "oscillators"])
@settings(max_examples=4)
@given(data=st.data(), give_in_dims=st.booleans())
def test_samples_do_not_depend_on_each_other(name, adjoint, data, give_in_dims):
    equation = NAMED[name]
    rows = data.draw(st.lists(st.integers(0, equation.batch - 1), min_size=1, max_size=4))
    check_independence(equation, METHOD["Dopri5"], adjoint, rows, give_in_dims)


@pytest.mark.parametrize(("equation", "method"), BATCHED, ids=_id)
def test_a_solve_is_deterministic_and_draws_no_random_numbers(equation, method):
    def states():
        return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()

    def run():
        given = [x.clone().requires_grad_() for x in equation.args]
        value = equation.solve(None, None, *given, solver=method.make()).value
        leaves = torch.utils._pytree.tree_leaves(value)
        return [*leaves, *torch.autograd.grad(sum(x.sum() for x in leaves), given)]

    before = states()
    first, second = run(), run()
    assert states() == before
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("method", [m for m in METHODS if m.adaptive], ids=_id)
@settings(max_examples=3)
@given(seed=st.integers(0, 2**16), span=st.floats(0.2, 1.5))
def test_the_way_back_of_a_linear_system_ends_where_it_began(method, seed, span):
    A, y0 = matrix(3, 1.0, seed), draw(3, seed=seed + 1)
    there = im.odeint(lambda t, y: y @ A, y0, (0.0, span), solver=method.make()).value[-1]
    back = im.odeint(lambda t, y: y @ A, there, (span, 0.0), solver=method.make()).value[-1]
    scale = float(torch.linalg.matrix_exp(span * A.abs()).norm()) ** 2
    assert float((back - y0).norm()) <= scale * method.accuracy() * float(y0.norm())


# ------------------------------------------------------------------------------------------------------ memory


WIDE = (draw(64, 8, seed=31), draw(64, 8, seed=32))


class Wide(nn.Module):
    """A separable field of a pair, with a parameter."""

    def __init__(self):
        super().__init__()
        self.rate = nn.Parameter(torch.ones(8, dtype=torch.float64))

    def forward(self, t, y):
        q, p = y
        return p * self.rate, -q * self.rate


def saved_bytes(kind, adjoint, steps):
    """Bytes that autograd keeps, and the tensors that are alive, beside those before."""
    f = Wide()
    gc.collect()
    before = bytes_of(living_tensors())
    with saved_tensors() as saved:
        value = im.odeint(f, WIDE, (0.0, 1.0), solver=kind(dt=1 / steps), adjoint=adjoint, batch_dims=1).value
    gc.collect()
    assert value[0].requires_grad
    return bytes_of(saved), bytes_of(living_tensors()) - before


@pytest.mark.usefixtures("only_what_the_test_makes")
@pytest.mark.parametrize("method", METHODS, ids=_id)
def test_memory_does_not_grow_with_the_steps_or_with_their_root(method):
    few, many = (saved_bytes(method.kind, im.BacksolveAdjoint(), steps) for steps in (5, 20))
    assert few == many
    # Every fourth or every eighth state, and of every step some numbers a sample.
    few, many = (saved_bytes(method.kind, im.RecursiveCheckpointAdjoint(), steps) for steps in (80, 160))
    numbers = len(WIDE[0]) * 26 * (160 - 80)
    assert many[0] - few[0] <= numbers
    assert many[1] - few[1] <= numbers


@pytest.mark.usefixtures("only_what_the_test_makes")
@pytest.mark.parametrize(("method", "adjoint"), list(dict.fromkeys((m, a) for _, m, a, _ in TURNS)), ids=_id)
def test_no_reference_cycle_keeps_anything_of_a_solve_alive(method, adjoint):
    options = {"solver": method.kind(dt=0.25, rtol=0.1), "adjoint": adjoint.kind(), "batch_dims": 1}

    def what_a_solve_leaves() -> list[Any]:
        f, y0 = Wide(), tuple(y.clone().requires_grad_() for y in WIDE)
        solution = im.odeint(f, y0, (0.0, 0.3, 1.0), **options)
        kept = [weakref.ref(x) for x in (f, *y0, solution.value[0])]
        between = solution.interpolate((0.5,))[0]
        (solution.value[0].sum() + between.sum()).backward()
        del solution, between, f, y0
        return [r() for r in kept]

    what_a_solve_leaves()  # coefficients of methods are kept, and some numbers by PyTorch
    gc.collect()
    gc.disable()
    try:
        before = len(living_tensors())
        assert set(what_a_solve_leaves()) == {None}
        assert len(living_tensors()) == before
    finally:
        gc.enable()


def test_a_failed_solve_frees_everything_once_its_error_is_gone():
    gc.collect()
    before = len(living_tensors())
    for _ in range(3):
        with pytest.raises(im.SolverError):
            im.odeint(Wide(), WIDE, (0.0, 1.0), solver=im.Dopri5(max_steps=2, dt_max=0.1))
    gc.collect()
    assert len(living_tensors()) == before


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=_id)
@pytest.mark.parametrize("method", [METHOD[name] for name in ("Dopri5", "ImplicitEuler", "Adams")], ids=_id)
def test_a_parameter_changed_in_place_before_backward_is_noticed(method, adjoint):
    f = Wide()
    value = im.odeint(f, WIDE, (0.0, 1.0), solver=method.kind(dt=0.25), adjoint=adjoint.kind()).value
    with torch.no_grad():
        f.rate.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value[0].sum().backward()


def test_memory_formats_come_out_as_they_went_in():
    y0 = NAMED["image"].y0.to(memory_format=torch.channels_last)
    value = im.odeint(Mixing(), y0, (0.0, 0.5, 1.0), batch_dims=1).value
    assert value[1].is_contiguous(memory_format=torch.channels_last)
