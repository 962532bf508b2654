"""Constant steps that are known before the solve lead to what steps do that look after themselves."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import jvp, vmap
from torch.utils._python_dispatch import TorchDispatchMode

import implicitly as im
from implicitly.ode import work
from implicitly.ode.record import CHECKPOINTS, Record

F64 = torch.float64
METHODS = (im.Euler, im.Midpoint, im.Heun, im.RK4, im.Dopri5, im.Tsit5, im.Dopri8, im.ReversibleHeun)
TIMES = {
    "ends": (0.0, 1.0),
    "outputs": (0.0, 0.1, 0.13, 0.14, 0.3, 0.77, 1.0),
    "backwards": (1.0, 0.6, 0.55, -0.2),
    "far from 0": (1000.0, 1000.2, 1000.5),
}


class Net(torch.nn.Module):
    def __init__(self, dtype: torch.dtype = F64) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([[-0.3, 1.0], [-1.0, -0.2]], dtype=dtype))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(y @ self.weight) * (1 + 0.1 * torch.sin(t))


def start(dtype: torch.dtype = F64, samples: int = 3) -> Tensor:
    return torch.linspace(-1.0, 1.5, 2 * samples, dtype=dtype).reshape(samples, 2)


@pytest.fixture
def judged(monkeypatch) -> Callable[[Callable[[], Any]], Any]:
    """Runs a solve by steps that look after themselves."""

    def run(solve: Callable[[], Any]) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(work, "planned", lambda *_: None)
            return solve()

    return run


@pytest.fixture
def only_planned(monkeypatch) -> None:
    """No step may look after itself."""

    def refuse(*_: Any) -> None:
        raise AssertionError("not by the plan")

    monkeypatch.setattr(work, "integrate", refuse)


def assert_same(one: im.Trajectory, other: im.Trajectory, exactly: bool) -> None:
    tolerance = {"rtol": 0, "atol": 0, "equal_nan": True} if exactly else {"equal_nan": True}
    torch.testing.assert_close(one.value, other.value, **tolerance)
    for name in ("status", "residual", "steps", "t", "rejected", "event", "event_count"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=0, atol=0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("times", TIMES.values(), ids=TIMES)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("batch_dims", [0, 1])
def test_all_that_a_solve_tells_is_the_same(method, times, dtype, batch_dims, judged, monkeypatch, only_planned):
    f, y0 = Net(dtype), start(dtype)
    options = {"solver": method(dt=0.03, dt_max=0.025), "batch_dims": batch_dims}
    found = im.odeint(f, y0, times, **options)
    monkeypatch.undo()
    expected = judged(lambda: im.odeint(f, y0, times, **options))
    # One length for all samples is a number, several are multiplied in another order.
    assert_same(found, expected, exactly=batch_dims == 0)
    assert found.evaluations == expected.evaluations
    tensor = torch.tensor(times, dtype=dtype)
    assert_same(im.odeint(f, y0, tensor, **options), found, exactly=True)


@pytest.mark.parametrize("method", [im.Leapfrog, im.Yoshida4, im.BlanesMoan4])
def test_symplectic_steps_are_the_same(method, judged, only_planned, monkeypatch):
    def solve() -> im.Trajectory:
        pair = (start()[:, 0], start()[:, 1])
        return im.odeint(lambda t, y: (y[1], -torch.sin(y[0]) + t), pair, TIMES["outputs"], solver=method(dt=0.07))

    found = solve()
    monkeypatch.undo()
    expected = judged(solve)
    assert found.evaluations == expected.evaluations
    for one, other in zip(found.value, expected.value):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def gradients(adjoint: Any, method: Any, batch_dims: int, moving: bool) -> list[Tensor]:
    """Of a loss of a pytree's trajectory, by the start, an argument, a parameter, and the times if `moving`."""
    net, x = Net(), torch.tensor(0.4, dtype=F64, requires_grad=True)
    y0 = {"a": start().requires_grad_(), "b": start()[:, :1].clone().requires_grad_()}
    t = torch.tensor(TIMES["outputs"], dtype=F64, requires_grad=moving)

    def f(t: Tensor, y: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
        return {"a": net(t, y["a"]) * x, "b": y["a"][:, :1] - y["b"] * x}

    value = im.odeint(f, y0, t, x, solver=method, adjoint=adjoint, batch_dims=batch_dims).value
    loss = (value["a"].square() * torch.arange(7, dtype=F64)[:, None, None]).sum() + value["b"].sin().sum()
    inputs = [y0["a"], y0["b"], x, net.weight, *([t] if moving else [])]
    return list(torch.autograd.grad(loss, inputs))


@pytest.mark.parametrize("method", [im.Euler(dt=0.04), im.RK4(dt=0.04), im.ReversibleHeun(dt=0.04)])
@pytest.mark.parametrize("batch_dims", [0, 1])
@pytest.mark.parametrize("moving", [False, True])
@pytest.mark.parametrize(
    "adjoint", [im.RecursiveCheckpointAdjoint(), im.BacksolveAdjoint(check=1e9), im.UnrolledAdjoint()]
)
def test_gradients_are_the_same(adjoint, method, batch_dims, moving, judged):
    expected = judged(lambda: gradients(adjoint, method, batch_dims, moving))
    for one, other in zip(gradients(adjoint, method, batch_dims, moving), expected):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


def test_interpolation_derivatives_of_any_kind_and_transforms_are_the_same(judged):
    net, y0, x = Net(), start(), torch.tensor([0.4, 0.9], dtype=F64)

    def solve(y: Tensor, x: Tensor) -> Tensor:
        return im.odeint(lambda t, y, x: net(t, y) * x, y, (0.0, 0.4, 1.0), x, solver=im.RK4(dt=0.09)).value

    def run() -> list[Tensor]:
        _, moved = jvp(solve, (y0, x[0]), (torch.ones_like(y0), torch.ones_like(x[0])))
        mapped = vmap(solve, in_dims=(None, 0))(y0, x)
        hessian = torch.autograd.functional.hessian(lambda x: solve(y0, x).square().sum(), x[0])
        asked = torch.tensor([0.77, 0.0, 0.31, 1.0], dtype=F64, requires_grad=True)
        between = im.odeint(net, y0, (0.0, 1.0), solver=im.RK4(dt=0.09)).interpolate(asked)
        slope, weight = torch.autograd.grad(between.square().sum(), [asked, net.weight])
        return [moved, mapped, hessian, between.detach(), slope, weight]

    for one, other in zip(run(), judged(run)):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


def test_states_are_kept_as_ever(judged, monkeypatch):
    records: list[Record] = []

    stacked = Record.stacked

    def noted(self: Record, like: Tensor) -> tuple[Tensor, ...]:
        records.append(self)
        return stacked(self, like)

    monkeypatch.setattr(Record, "stacked", noted)

    def solve() -> None:
        im.odeint(Net(), start(), (0.0, 1.0), solver=im.Euler(dt=1 / 500))

    solve()
    judged(solve)
    planned, expected = records
    assert list(planned.states) == list(expected.states)
    assert planned.spacing == expected.spacing
    assert len(planned.states) <= CHECKPOINTS
    for i, state in planned.states.items():
        torch.testing.assert_close(state.y, expected.states[i].y, rtol=0, atol=0)


@pytest.mark.parametrize("method", [im.Euler(dt=0.01), im.Midpoint(dt=0.01), im.ReversibleHeun(dt=0.01)])
@pytest.mark.parametrize("adjoint", [im.RecursiveCheckpointAdjoint(), im.UnrolledAdjoint()])
@pytest.mark.parametrize("near", [True, False])
@pytest.mark.parametrize("when", [0.0, 0.5, 1.0])
def test_a_sample_that_fails_says_so_where_it_does(method, adjoint, near, when, judged, monkeypatch):
    if not near:
        far(monkeypatch)

    def run() -> tuple[im.Trajectory, Tensor]:
        y0 = start().requires_grad_()

        def f(t: Tensor, y: Tensor) -> Tensor:  # infinite for a moment only, for the first sample
            bad = ((t - when).abs() < 1e-4) & (y[:, :1] < -0.1)
            return torch.where(bad, float("inf"), -y)

        found = im.odeint(
            f, y0, (0.0, 0.2, 1.0), solver=method, adjoint=adjoint, batch_dims=1, on_failure="ignore"
        )
        return found, torch.autograd.grad(found.value.sum(), y0)[0]

    (found, gradient), (expected, wanted) = run(), judged(run)
    assert_same(found, expected, exactly=True)
    torch.testing.assert_close(gradient, wanted, rtol=1e-12, atol=1e-13)
    if when == 0.5:
        assert found.status.tolist() == [im.Status.NON_FINITE, im.Status.CONVERGED, im.Status.CONVERGED]


def test_more_steps_than_allowed_are_reported():
    solver = im.Euler(dt=0.1, max_steps=9)
    found = im.odeint(Net(), start(), (0.0, 1.0), solver=solver, on_failure="ignore")
    assert (found.status, found.steps) == (im.Status.MAX_STEPS, 9)
    assert im.odeint(Net(), start(), (0.0, 0.9), solver=solver).steps == 9


@pytest.mark.parametrize(
    "options",
    [
        {"solver": im.RK4(dt=0.1, tstops=(0.55,))},
        {"solver": im.RK4(dt=0.1), "event": im.Event(lambda t, y: y.sum() - 50.0)},
        {"solver": im.Dopri5()},
        {"solver": im.ImplicitEuler(dt=0.1)},
        {
            "solver": im.RK4(dt=0.1),
            "batch_dims": 1,
            "t": torch.tensor([[0.0, 1.0], [0.0, 2.0], [0.5, 1.0]], dtype=F64),
        },
    ],
)
def test_other_solves_look_after_their_steps(options, monkeypatch):
    def refuse(*_: Any) -> None:
        raise AssertionError("by a plan")

    monkeypatch.setattr(work, "integrate_planned", refuse)
    im.odeint(Net(), start(), **{"t": (0.0, 1.0)} | options)


def far(monkeypatch) -> None:
    """Take the CPU for an accelerator, whose numbers are not to be looked at."""
    for name, module in list(sys.modules.items()):
        if name.startswith("implicitly.") and hasattr(module, "is_cpu"):
            monkeypatch.setattr(module, "is_cpu", lambda x: False)


class Counted(TorchDispatchMode):
    """Counts operations, and among them those that wait for an accelerator."""

    def __init__(self) -> None:
        super().__init__()
        self.operations, self.questions = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        self.questions += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("grad", [False, True])
def test_a_step_is_little_more_than_calls_of_f_and_never_waits(grad, monkeypatch):
    far(monkeypatch)
    net, y0 = Net(), start()
    with Counted() as alone, torch.no_grad():
        net(torch.zeros((), dtype=F64), y0)

    def counted(steps: int, solver: Any) -> Counted:
        with Counted() as count, torch.set_grad_enabled(grad):
            im.odeint(net, y0, (0.0, 1.0), solver=solver(dt=1 / steps))
        return count

    for solver, calls, sums in ((im.Euler, 1, 1), (im.RK4, 4, 7)):
        few, many = counted(16, solver), counted(32, solver)
        assert few.questions == many.questions
        # As f is called, the state is taken apart and its slope put together; the times of a block are views.
        assert many.operations - few.operations <= 16 * (calls * (alone.operations + 2) + sums + 2 * grad) + 4 + 8
