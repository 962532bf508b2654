"""What to try, where nothing was found, is something that this solver has not, and that helps."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

import implicitly as im
from tests.problems import draw, matrix

D = torch.float64
Z0, X, W = torch.zeros(4, 30, dtype=D), draw(4, 30, seed=41), matrix(30, 0.8, 42)
STEPPING = [im.FixedPointIteration(), im.Anderson(), im.Broyden()]


def slope(z, x):
    """The right side of dz/dt: of a steady state that attracts, steps along -slope lead away."""
    return torch.tanh(z @ W.mT + x) - z


@pytest.mark.parametrize("solver", STEPPING, ids=lambda s: type(s).__name__)
def test_of_a_steady_state_the_sign_is_said_and_changing_it_helps(solver):
    with pytest.raises(im.SolverError, match=r"change the sign of F or scale it: this solver steps along -F\(z\)"):
        im.root(slope, Z0, X, solver=solver)
    value = im.root(lambda z, x: -slope(z, x), Z0, X, solver=solver).value
    assert_close(value, im.root(slope, Z0, X).value, rtol=0, atol=1e-8)


def test_of_a_residual_in_other_units_the_scale_is_said_and_changing_it_helps():
    with pytest.raises(im.SolverError, match=r"or scale it: .*along -F\(z\).*; or use Newton or NewtonKrylov$"):
        im.root(lambda z, x: -1e9 * slope(z, x), Z0, X, solver=im.Broyden())
    assert im.root(lambda z, x: -slope(z, x), Z0, X, solver=im.Broyden()).converged.all()


@pytest.mark.parametrize(
    ("entry", "f"),
    [(im.root, lambda z: z**2 + 1), (im.fixed_point, lambda z: z**2 + z + 1)],
    ids=["root", "point"],
)
@pytest.mark.parametrize("solver", [im.Newton(), im.NewtonKrylov()], ids=lambda s: type(s).__name__)
def test_newton_is_told_to_start_elsewhere(entry, f, solver):
    with pytest.raises(im.SolverError, match=r"start closer to a solution \(z0\), if there is one"):
        entry(f, torch.full((2, 1), 0.7, dtype=D), solver=solver, on_failure="raise")


def test_newton_without_a_line_search_is_told_of_it():
    start = torch.full((2, 1), 1e-6, dtype=D)
    with pytest.raises(im.SolverError, match=r"DIVERGED.*or use line_search=True"):
        im.root(lambda z: z**2 - 1, start, solver=im.Newton(line_search=False))
    assert im.root(lambda z: z**2 - 1, start).converged.all()


@pytest.mark.parametrize("solver", STEPPING, ids=lambda s: type(s).__name__)
def test_no_solver_that_diverged_is_told_to_use_itself(solver):
    with pytest.warns(im.ConvergenceWarning, match="DIVERGED") as seen:
        im.fixed_point(lambda z: 10 * z**3, torch.arange(3.0, 11, dtype=D).view(2, 4), solver=solver)
    remedy = str(seen[0].message).split("Try: ")[1]
    assert type(solver).__name__ not in remedy
    assert "Newton" in remedy


def test_of_a_derivative_it_is_said_what_to_try_there():
    x = X.clone().requires_grad_()
    value = im.root(slope, Z0, x, adjoint=im.ImplicitAdjoint(max_steps=1), on_failure="warn").value
    with pytest.warns(im.ConvergenceWarning, match="the backward solve of root.*raise max_steps of the adjoint"):
        value.sum().backward()
