"""A solve that runs out of steps says whether stability, rather than accuracy, kept them short."""

from __future__ import annotations

import math
import re

import pytest
import torch

import implicitly as im
from implicitly.ode.problem import Field
from implicitly.ode.stiffness import Halt, real_limit
from tests.problems import seeded

D = torch.float64
ONE = torch.ones(1, dtype=D)


def robertson(t, y):
    a, b, c = y.unbind(-1)
    slow, fast, back = 0.04 * a, 3e7 * b * b, 1e4 * b * c
    return torch.stack([back - slow, slow - fast - back, fast], dim=-1)


# Hairer and Wanner, "Solving Ordinary Differential Equations II", figure IV.2.1, and the roots of |R(-x)| = 1.
LIMITS = {im.Euler: 2.0, im.Midpoint: 2.0, im.Heun: 2.0, im.RK4: 2.785, im.Bosh3: 2.513, im.Dopri5: 3.307}


@pytest.mark.parametrize("kind", LIMITS, ids=lambda kind: kind.__name__)
def test_the_limit_of_stability_is_that_of_the_literature(kind):
    assert real_limit(kind.tableau) == pytest.approx(LIMITS[kind], abs=2e-3)


@pytest.mark.parametrize("kind", [*LIMITS, im.Ralston, im.Tsit5, im.Dopri8], ids=lambda kind: kind.__name__)
def test_constant_steps_decay_up_to_the_limit_and_grow_beyond(kind):
    def end(factor):
        method = kind(dt=factor * kind(dt=1.0).stability, max_steps=10_000)
        return float(im.odeint(lambda t, y: -y, ONE, (0.0, 2000 * method.dt), solver=method).value[-1].abs())

    assert end(0.99) < 1e-3
    assert end(1.02) > 1e3


@pytest.mark.parametrize("solver", [im.Bosh3, im.Dopri5, im.Tsit5, im.Dopri8], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("batch_dims", [0, 1])
def test_explicit_steps_on_a_stiff_system_are_told_to_be_implicit(solver, batch_dims):
    y0 = torch.tensor([1.0, 0.0, 0.0], dtype=D).expand(*(2,) * batch_dims, 3)
    with pytest.raises(im.SolverError, match=r"Try: im\.Kvaerno5\(\)\. The system is stiff there") as caught:
        im.odeint(robertson, y0, (0.0, 1e5), solver=solver(max_steps=2000), batch_dims=batch_dims)
    told = re.search(r"the step is (\S+), and \w+ is stable up to (\S+) only", str(caught.value))
    assert told is not None
    found, limit = float(told[1]), float(told[2])
    assert 0.5 * limit < found < 2 * limit


@pytest.mark.parametrize(
    "adjoint", [im.RecursiveCheckpointAdjoint(), im.BacksolveAdjoint(), im.UnrolledAdjoint()], ids=type
)
def test_stiffness_is_told_where_gradients_are_wanted(adjoint):
    y0 = torch.tensor([1.0, 0.0, 0.0], dtype=D, requires_grad=True)
    with pytest.raises(im.SolverError, match="The system is stiff there"):
        im.odeint(robertson, y0, (0.0, 1e5), solver=im.Dopri5(max_steps=2000), adjoint=adjoint)


def test_a_system_that_is_not_stiff_is_not_called_stiff():
    def fast(t, y):
        return (20 * t).sin() + 0 * y

    with pytest.raises(im.SolverError) as caught:
        im.odeint(fast, ONE, (0.0, 1e5), solver=im.Dopri5(max_steps=200))
    assert str(caught.value).endswith("Try: raise max_steps, or loosen rtol and atol")


def test_an_implicit_method_is_not_told_to_be_implicit():
    with pytest.raises(im.SolverError) as caught:
        im.odeint(lambda t, y: -1e3 * (y - t.cos()), ONE, (0.0, 1e5), solver=im.Kvaerno5(max_steps=3))
    assert str(caught.value).endswith("Try: raise max_steps, or loosen rtol and atol")


def test_what_cannot_be_found_out_is_left_open():
    def f(t, y):
        return -1e4 * (y - t.cos())

    with pytest.raises(im.SolverError, match=r"where the system is stiff, use im\.Kvaerno5\(\)"):
        im.odeint(f, ONE, (0.0, 1e3), solver=im.Adams(max_steps=200))


def test_constant_steps_that_blow_up_name_a_length_that_does_not():
    def f(t, y):
        return -1e3 * y

    with pytest.raises(im.SolverError, match=r"im\.Kvaerno5\(\), or dt below 0\.0028\.") as caught:
        im.odeint(f, ONE, (0.0, 100.0), solver=im.RK4(dt=0.01))
    assert int(caught.value.solution.status) == im.Status.NON_FINITE
    im.odeint(f, ONE, (0.0, 1.0), solver=im.RK4(dt=0.0027))


@pytest.mark.parametrize("eigenvalue", [-7.0, complex(-1.0, 30.0)], ids=str)
def test_the_rate_is_the_largest_modulus_of_an_eigenvalue(eigenvalue):
    if isinstance(eigenvalue, complex):
        block = torch.tensor([[eigenvalue.real, -eigenvalue.imag], [eigenvalue.imag, eigenvalue.real]], dtype=D)
    else:
        block = torch.tensor([[eigenvalue]], dtype=D)
    basis = torch.randn(4, 4, dtype=D, generator=seeded(1))
    blocks = [block, *(torch.tensor([[-0.1 * k]], dtype=D) for k in range(4 - len(block)))]
    A = basis @ torch.block_diag(*blocks) @ basis.inverse()

    def field(A):
        return Field(torch.unbind, lambda t, y: y @ A.T, field, (A,))

    halt = Halt(field, (A,), torch.zeros(3, dtype=D), torch.randn(3, 4, dtype=D), tried=pytest.fail)
    rate = halt.rate(1)
    assert rate is not None
    assert math.isclose(rate, abs(eigenvalue), rel_tol=0.1)
