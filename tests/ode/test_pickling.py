"""What other processes get: a `Trajectory`, and the error of one that did not reach the end."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import implicitly as im

Y0 = torch.ones(2, requires_grad=True)


def solved(kind):
    if kind == "ddeint":
        return im.ddeint(lambda t, y, delayed: -delayed[0], Y0, (0.0, 0.5, 1.0), lags=(0.4,))
    return im.odeint(lambda t, y: (-y[0], y[0]), (Y0, Y0), (0.0, 0.5, 1.0))


@pytest.mark.parametrize("kind", ["odeint", "ddeint"])
def test_a_trajectory_keeps_its_numbers(kind):
    solution = solved(kind)
    found = pickle.loads(pickle.dumps(solution))
    torch.testing.assert_close(found.value, solution.value)
    for name in ("status", "residual", "steps", "evaluations", "t", "rejected", "event", "event_count"):
        assert torch.equal(torch.as_tensor(getattr(found, name)), torch.as_tensor(getattr(solution, name)))
    assert found.converged
    assert not any(x.requires_grad for x in torch.utils._pytree.tree_leaves(found.value))
    with pytest.raises(RuntimeError, match="call interpolate before pickling, or pass these times in t"):
        found.interpolate((0.3,))


def test_a_copy_here_interpolates():
    solution = solved("odeint")
    found = copy.copy(solution)
    assert found.value is solution.value
    assert torch.equal(found.interpolate((0.3,))[0], solution.interpolate((0.3,))[0])


def test_an_error_keeps_its_solution():
    for solve in (
        lambda solver: im.odeint(lambda t, y: -y, Y0, (0.0, 1.0), solver=solver),
        lambda solver: im.ddeint(lambda t, y, d: -y, Y0, (0.0, 1.0), lags=(0.5,), solver=solver),
    ):
        with pytest.raises(im.SolverError) as caught:
            solve(im.Dopri5(rtol=1e-6, max_steps=2))
        error = pickle.loads(pickle.dumps(caught.value))
        assert str(error) == str(caught.value)
        assert error.solution.status == im.Status.MAX_STEPS
