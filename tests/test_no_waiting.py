"""On an accelerator the host runs ahead. Tensors on `meta` stand for one that must not be waited for: they have
shapes and no numbers, so whatever asks for a number raises."""

from __future__ import annotations

import itertools

import pytest
import torch

import implicitly as im
from implicitly.iterate import LATE, _may_go_on

SOLVERS = (
    im.FixedPointIteration(max_steps=8, rtol=0),
    im.Anderson(max_steps=8, rtol=0),
    im.Broyden(max_steps=8, rtol=0),
    im.Newton(max_steps=3, rtol=0, line_search=False),
)
ADJOINTS = (im.JacobianFreeAdjoint(), im.PhantomAdjoint(steps=3), im.UnrolledAdjoint())


def solve(device: str, solver: im.Solver, adjoint: object) -> tuple[im.Solution, torch.Tensor]:
    W = torch.full((8, 8), 0.05, device=device, requires_grad=True)
    x = torch.ones(4, 8, device=device)
    return im.fixed_point(
        lambda z, x, W: torch.tanh(z @ W + x),
        torch.zeros_like(x),
        x,
        W,
        solver=solver,
        adjoint=adjoint,
        on_failure="ignore",
    ), W


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=lambda a: type(a).__name__)
@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
def test_a_number_of_steps_is_taken_and_differentiated_without_waiting(solver, adjoint):
    solution, W = solve("meta", solver, adjoint)
    solution.value.sum().backward()
    assert W.grad is not None
    assert W.grad.device.type == "meta"
    # The same calls as where the numbers can be looked at.
    assert solution.evaluations == solve("cpu", solver, adjoint)[0].evaluations


def test_whether_all_have_converged_is_asked():
    with pytest.raises(RuntimeError, match="meta"):
        solve("meta", im.Anderson(), im.JacobianFreeAdjoint())


def test_the_question_comes_less_often_the_longer_the_solve():
    asked = []
    for k in range(200):
        try:
            assert _may_go_on(k, torch.ones((), dtype=torch.bool, device="meta"))
        except RuntimeError:
            asked.append(k)
    assert asked[:8] == list(range(8))
    assert len(asked) < 40
    for before, after in itertools.pairwise(asked):
        assert after - before <= max(1, LATE * after)


def test_on_a_host_it_is_asked_at_each_step():
    assert not any(_may_go_on(k, torch.zeros((), dtype=torch.bool)) for k in range(200))
