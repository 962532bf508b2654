"""`odeint`: values against exact solutions, orders of convergence, samples, states, times, failures."""

from __future__ import annotations

import math
import warnings
from functools import partial

import numpy as np
import pytest
import torch

import implicitly as im
from implicitly.ode.runge_kutta import RungeKutta

D = torch.float64
METHODS = [im.Euler, im.Midpoint, im.Heun, im.Ralston, im.RK4, im.Bosh3, im.Dopri5, im.Tsit5, im.Dopri8]
ADAPTIVE = [m for m in METHODS if m.tableau.error is not None]


def relax(t, y):
    """Solved by y = 1.5 exp(-t) + (sin t - cos t) / 2 from y = 1."""
    return -y + torch.sin(t)


def relaxed(t):
    return 1.5 * torch.exp(-t) + 0.5 * (torch.sin(t) - torch.cos(t))


def logistic(t, y):
    return y * (1 - y) * (1 + 0.5 * torch.cos(3 * t))


def logistic_solution(t, y0):
    s = t + 0.5 * torch.sin(3 * t) / 3
    return 1 / (1 + (1 / y0 - 1) * torch.exp(-s))


# ------------------------------------------------------------------------------------------------- orders


def errors(method: type[RungeKutta], steps: int, inner: int) -> tuple[float, float]:
    """The error at the end, and the largest at `inner` times between, of a nonlinear problem."""
    t = torch.linspace(0, 1, inner + 2, dtype=D)
    y0 = torch.tensor([0.2, 0.7], dtype=D)
    value = im.odeint(logistic, y0, t, solver=method(dt=1 / steps)).value
    error = (value - logistic_solution(t[:, None], y0)).abs().amax(1)
    return float(error[-1]), float(error[1:-1].max())


@pytest.mark.parametrize("method", METHODS)
def test_halving_the_steps_shows_the_order_at_the_ends_and_between(method):
    order = method.tableau.order
    # Steps short enough for the leading term, and long enough to stay above rounding.
    coarse = {1: 256, 2: 64, 3: 32, 4: 16, 5: 10, 8: 3}[order]
    (end, between), (end_4, between_4) = errors(method, coarse, 37), errors(method, 4 * coarse, 37)
    assert end_4 > 1e-14
    assert order - 0.5 < math.log2(end / end_4) / 2 < order + 1
    assert math.log2(between / between_4) / 2 > order - 0.5


@pytest.mark.parametrize("method", ADAPTIVE)
def test_the_error_follows_the_tolerance(method):
    t, y0 = torch.linspace(0, 3, 5, dtype=D), torch.tensor([0.1, 0.9], dtype=D)
    reached = []
    for rtol in (1e-3, 1e-5, 1e-7) if method.tableau.order > 2 else (1e-3, 1e-5):
        solution = im.odeint(logistic, y0, t, solver=method(rtol=rtol, atol=rtol * 1e-2))
        reached.append(float((solution.value - logistic_solution(t[:, None], y0)).abs().max()))
        assert reached[-1] < 50 * rtol
    assert reached == sorted(reached, reverse=True)


# ------------------------------------------------------------------------------------- states and times


@pytest.mark.parametrize("reverse", [False, True])
def test_times_may_increase_or_decrease_and_be_any_number(reverse):
    t = torch.linspace(-1, 2, 50, dtype=D)
    t = t.flip(0) if reverse else t
    start = relaxed(t[0]).reshape(1)
    solution = im.odeint(relax, start, t, solver=im.Dopri5(rtol=1e-9, atol=1e-11))
    torch.testing.assert_close(solution.value[:, 0], relaxed(t), rtol=0, atol=1e-7)
    assert torch.equal(solution.value[0], start)
    few = im.odeint(relax, start, (float(t[0]), float(t[-1])), solver=im.Dopri5(rtol=1e-9, atol=1e-11))
    assert int(few.steps) == int(solution.steps)  # no step is shortened for an output
    assert few.evaluations == solution.evaluations
    torch.testing.assert_close(few.value[-1], solution.value[-1], rtol=0, atol=0)


def test_the_state_may_be_a_pytree_of_several_shapes():
    def f(t, y):
        return {"a": -y["a"], "b": (y["b"][1], -y["b"][0])}

    y0 = {"a": torch.ones(2, 3, dtype=D), "b": (torch.zeros(1, dtype=D), torch.ones(1, dtype=D))}
    value = im.odeint(f, y0, (0.0, 1.0), solver=im.Dopri5(rtol=1e-9, atol=1e-11)).value
    torch.testing.assert_close(value["a"][-1], torch.full((2, 3), math.exp(-1), dtype=D))
    torch.testing.assert_close(value["b"][0][-1], torch.tensor([math.sin(1)], dtype=D))
    assert value["a"].shape == (2, 2, 3)


def test_complex_states_rotate():
    value = im.odeint(lambda t, y: 1j * y, torch.ones(2, dtype=torch.complex128), (0.0, math.pi)).value
    torch.testing.assert_close(value[-1], torch.full((2,), -1.0 + 0j, dtype=torch.complex128), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtypes_are_kept_and_the_last_time_is_reached(dtype):
    seen = set()

    def f(t, y):
        seen.update((t.dtype, y.dtype))
        return -y

    t = torch.linspace(1000, 1000.7, 4, dtype=dtype)
    solution = im.odeint(f, torch.ones(3, dtype=dtype), t, solver=im.RK4(dt=0.01))
    assert seen == {dtype}
    assert solution.value.dtype == dtype
    assert float(solution.t) == float(t[-1])
    assert int(solution.steps) == 70
    torch.testing.assert_close(
        solution.value[-1], torch.full((3,), math.exp(-0.7), dtype=dtype), rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("adjoint", [im.RecursiveCheckpointAdjoint(), im.BacksolveAdjoint(), im.UnrolledAdjoint()])
@pytest.mark.parametrize(
    "solver",
    [im.Dopri5(rtol=2e-2, atol=1e-2), im.Tsit5(dt=0.1), im.Kvaerno3(rtol=2e-2, atol=1e-2), im.Adams(dt=0.1)],
)
def test_autocast_is_for_f_alone(solver, adjoint):
    """What a solver adds to f is computed as without: outputs between steps are sums of products, too."""

    def found(cast: bool):
        y0 = torch.tensor([0.7, 1.3], requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            solution = im.odeint(relax, y0, (0.0, 0.53, 1.0), solver=solver, adjoint=adjoint)
            between = solution.interpolate((0.21,)).detach()
        own = not isinstance(adjoint, im.UnrolledAdjoint)  # whose backward pass is autograd's
        with torch.autocast("cpu", torch.bfloat16, enabled=cast and own):
            (gradient,) = torch.autograd.grad(solution.value[1].sum(), y0)
        return solution.value.detach(), between, gradient

    for a, b in zip(found(True), found(False)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_bfloat16_is_computed_in_float32():
    y0 = torch.ones(4, dtype=torch.bfloat16)
    solution = im.odeint(lambda t, y: -y, y0, (0.0, 1.0), solver=im.Dopri5(rtol=3e-2, atol=1e-2))
    assert solution.value.dtype == torch.bfloat16
    torch.testing.assert_close(solution.value[-1].float(), torch.full((4,), math.exp(-1)), rtol=3e-2, atol=0)


def test_memory_formats_come_through():
    y0 = torch.randn(2, 3, 4, 5, dtype=D).contiguous(memory_format=torch.channels_last)
    seen = []

    def f(t, y):
        seen.append(y.is_contiguous(memory_format=torch.channels_last))
        return -y

    im.odeint(f, y0, (0.0, 1.0), batch_dims=1)
    assert all(seen)


def test_an_empty_batch_gives_an_empty_answer():
    value = im.odeint(lambda t, y: -y, torch.zeros(0, 3, dtype=D), (0.0, 1.0), batch_dims=1).value
    assert value.shape == (2, 0, 3)


@pytest.mark.parametrize("reverse", [False, True])
def test_interpolate_gives_the_solution_between_by_the_same_steps(reverse):
    t = (2.0, 0.0) if reverse else (0.0, 2.0)
    start = relaxed(torch.tensor(t[0], dtype=D)).reshape(1).requires_grad_()
    calls = []

    def f(t, y):
        calls.append(float(t.detach()))
        return relax(t, y)

    solution = im.odeint(f, start, t, solver=im.Dopri5(rtol=1e-8, atol=1e-10))
    first, calls[:] = list(calls), []
    times = torch.tensor([1.3, 0.0, 2.0, 0.7, 1.3], dtype=D, requires_grad=True)
    value = solution.interpolate(times)
    assert calls == first[1:]  # but for the call that looks at f's answer
    torch.testing.assert_close(value[:, 0], relaxed(times.detach()), rtol=0, atol=1e-7)
    torch.testing.assert_close(value[2 if not reverse else 1], solution.value[-1], rtol=0, atol=1e-15)
    # Its derivative by a time is f there; by the start, exp(-(t - t0)).
    by_time, by_start = torch.autograd.grad(value[[0, 3]].sum(), (times, start))
    slope = relax(times.detach(), relaxed(times.detach()))
    torch.testing.assert_close(by_time, slope * torch.tensor([1, 0, 0, 1, 0]), rtol=0, atol=1e-4)
    expected = sum(math.exp(t[0] - s) for s in (1.3, 0.7))
    torch.testing.assert_close(by_start, torch.tensor([expected], dtype=D), rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match="between"):
        solution.interpolate((2.5,))


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize(
    "adjoint", [im.RecursiveCheckpointAdjoint(), im.UnrolledAdjoint()], ids=["exact", "plain"]
)
def test_interpolate_has_the_derivatives_of_the_solution_at_the_start(adjoint, backwards):
    """y = y0 exp(-a (t - t0)), whose derivatives are known."""
    y0, a = (torch.tensor(x, dtype=D, requires_grad=True) for x in ([3.0], 0.7))
    times = torch.tensor([0.3, -1.0 if backwards else 2.0], dtype=D, requires_grad=True)
    solver = im.Dopri5(rtol=1e-9, atol=1e-11)
    solution = im.odeint(lambda t, y, a: -a * y, y0, times, a, solver=solver, adjoint=adjoint)
    t = torch.tensor([0.3, 0.3 + 0.5 * float(times[1].detach() - 0.3), 0.3], dtype=D, requires_grad=True)
    value = solution.interpolate(t)
    exact = y0 * torch.exp(-a * (t[:, None] - times[0]))
    assert torch.equal(value[[0, 2]], exact[[0, 2]])
    torch.testing.assert_close(value, exact, rtol=1e-8, atol=0)
    given = (t, y0, a, times)
    first = [torch.autograd.grad(x[0, 0], given, create_graph=True) for x in (value, exact)]
    torch.testing.assert_close(*first, rtol=1e-12, atol=1e-14)
    second = [torch.autograd.grad(g[0][0], given) for g in first]
    torch.testing.assert_close(*second, rtol=1e-4, atol=1e-10)


@pytest.mark.parametrize("solver", [im.Kvaerno5(), im.Adams(), im.RK4(dt=0.1), im.ReversibleHeun(dt=0.1)])
@pytest.mark.parametrize(
    "adjoint", [im.RecursiveCheckpointAdjoint(), im.BacksolveAdjoint()], ids=["exact", "back"]
)
def test_interpolate_moves_with_the_time_at_the_start_by_every_method(adjoint, solver):
    y0, t = torch.tensor([[3.0], [1.0]], dtype=D), torch.tensor([[0.0, 0.5], [0.2, 0.5]], dtype=D)
    times = torch.tensor([[0.0, 1.0], [0.2, 2.0]], dtype=D)
    solution = im.odeint(lambda t, y: -0.7 * y, y0, times, solver=solver, adjoint=adjoint, batch_dims=1)
    slopes = torch.autograd.grad(solution.interpolate(t.requires_grad_())[0].sum(), t)[0]
    torch.testing.assert_close(slopes, torch.tensor([[-2.1, 0.0], [-0.7, 0.0]], dtype=D), rtol=1e-12, atol=1e-12)


def test_interpolate_at_the_start_of_a_sample_that_failed_is_its_start():
    def f(t, y):
        return torch.where(y > 2, float("nan"), -y)

    y0 = torch.tensor([[3.0], [1.0]], dtype=D, requires_grad=True)
    solution = im.odeint(f, y0, (0.0, 1.0), batch_dims=1, on_failure="ignore")
    value = solution.interpolate((0.0, 0.5))
    assert torch.equal(value[0], y0)
    assert value[1].isnan().flatten().tolist() == [True, False]
    torch.testing.assert_close(torch.autograd.grad(value[0].sum(), y0)[0], torch.ones(2, 1, dtype=D))


@pytest.mark.parametrize(
    "adjoint", [im.RecursiveCheckpointAdjoint(), im.UnrolledAdjoint()], ids=["exact", "plain"]
)
def test_interpolate_refuses_what_was_changed_since_the_solve(adjoint):
    net = torch.nn.Linear(3, 3).double()
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1)
    y0, t, a = torch.ones(3, dtype=D), torch.tensor([0.0, 1.0], dtype=D), torch.tensor(0.5, dtype=D)

    def solved():
        return im.odeint(lambda t, y, a: a * net(y), y0, t, a, adjoint=adjoint)

    solution = solved()
    before = solution.interpolate((0.0, 0.5))
    before.sum().backward()
    assert torch.equal(solution.interpolate((0.0, 0.5)), before)
    optimiser.step()
    with pytest.raises(ValueError, match=r"but a parameter of shape \(3, 3\) was changed in place.*solve again"):
        solution.interpolate((0.5,))
    for changed, name in ((y0, "y0"), (t, "t"), (a, r"a tensor of args of shape \(\)")):
        solution = solved()
        with torch.no_grad():
            changed.mul_(1.1)
        with pytest.raises(ValueError, match=f"but {name} was changed in place"):
            solution.interpolate((0.5,))
    with torch.inference_mode():
        solution = im.odeint(lambda t, y: -y, torch.ones(3, dtype=D), (0.0, 1.0))
    assert solution.interpolate((0.5,)).shape == (1, 3)
    grad = torch.func.grad(lambda y: im.odeint(lambda t, y: -y, y, (0.0, 1.0)).interpolate((0.5,)).sum())
    torch.testing.assert_close(torch.func.vmap(grad)(torch.ones(2, 3, dtype=D)), grad(y0).expand(2, 3))


def test_interpolate_takes_times_of_each_sample():
    t = torch.tensor([[0.0, 1.0], [0.0, 4.0]], dtype=D)
    y0 = torch.ones(2, 1, dtype=D)
    solution = im.odeint(lambda t, y: -y, y0, t, batch_dims=1, solver=im.Dopri5(rtol=1e-8, atol=1e-10))
    times = torch.tensor([[0.9, 0.2, 0.0], [0.3, 3.0, 4.0]], dtype=D)
    torch.testing.assert_close(solution.interpolate(times)[:, :, 0], torch.exp(-times).T, rtol=0, atol=1e-7)


# ------------------------------------------------------------------------------------------------ samples


def test_every_sample_has_its_own_steps_times_and_answer():
    rate = torch.tensor([[1.0], [30.0], [200.0]], dtype=D)
    t = torch.tensor([[0.0, 0.5, 1.0], [0.0, 0.1, 0.2], [1.0, 0.99, 0.98]], dtype=D)
    solver = im.Dopri5(rtol=1e-8, atol=1e-10)
    shapes = set()

    def f(t, y, rate):
        shapes.add(tuple(t.shape))
        return -rate * torch.sin(rate * t) * torch.ones_like(y)

    y0 = torch.cos(rate * t[:, :1]).expand(3, 2).clone()
    together = im.odeint(f, y0, t, rate, solver=solver, batch_dims=1)
    assert shapes == {(3, 1)}
    exact = torch.cos(rate * t).T[:, :, None].expand(3, 3, 2)
    torch.testing.assert_close(together.value, exact, rtol=0, atol=1e-6)
    assert len(set(together.steps.tolist())) == 3
    for i in range(3):
        alone = im.odeint(f, y0[i : i + 1], t[i], rate[i], solver=solver, batch_dims=1)
        torch.testing.assert_close(alone.value[:, 0], together.value[:, i], rtol=0, atol=1e-12)
        assert int(alone.steps) == int(together.steps[i])


def test_finished_samples_cost_nothing_more():
    """One of 64 samples is 100 times as stiff: only it goes on."""
    rate = torch.ones(64, 1, dtype=D)
    rate[17] = 100.0
    rows = []

    def f(t, y, rate):
        rows.append(y.shape[0] if y.ndim > 1 else 64)
        return -rate * (y - torch.cos(t))

    y0, solver = torch.zeros(64, 1, dtype=D), im.Dopri5(rtol=1e-6, atol=1e-8)
    t = torch.linspace(0, 5, 7, dtype=D)
    each = im.odeint(f, y0, t, rate, solver=solver, batch_dims=1, in_dims=0)
    weighted, rows[:] = sum(rows), []
    whole = im.odeint(lambda t, y: f(t, y, rate), y0, t, solver=solver, batch_dims=0)
    assert sum(rows) > 5 * weighted
    assert int(each.steps.max()) > 10 * int(each.steps.median())
    torch.testing.assert_close(each.value, whole.value, rtol=0, atol=1e-4)
    never_dropped = im.odeint(f, y0, t, rate, solver=solver, batch_dims=1)
    torch.testing.assert_close(each.value, never_dropped.value, rtol=0, atol=1e-12)
    assert torch.equal(each.steps, never_dropped.steps)


def test_one_system_shares_its_steps():
    y0 = torch.tensor([1.0, 2.0], dtype=D)
    solution = im.odeint(lambda t, y: -y, y0, (0.0, 1.0))
    assert solution.steps.ndim == 0
    assert solution.status.ndim == 0


# ----------------------------------------------------------------------------------------- step control


def test_statistics_count_calls_of_f():
    calls = []

    def f(t, y):
        calls.append(1)
        return -50 * (y - torch.cos(t))

    solution = im.odeint(f, torch.zeros(1, dtype=D), torch.linspace(0, 1, 9, dtype=D), solver=im.Dopri8(dt0=1.0))
    assert solution.evaluations == len(calls)
    assert int(solution.rejected) > 0
    assert int(solution.steps) > 3


def test_steps_stay_within_their_bounds():
    times = []

    def f(t, y):
        times.append(float(t))
        return 0 * y

    im.odeint(f, torch.ones(1, dtype=D), (0.0, 1.0), solver=im.Heun(dt_max=0.05))
    steps = torch.tensor(times[1:]).unique().diff()
    assert float(steps.max()) <= 0.05 + 1e-7


@pytest.mark.parametrize(
    "solver", [im.Dopri5, partial(im.RK4, dt=0.1), im.Kvaerno3], ids=["Dopri5", "RK4", "Kvaerno3"]
)
@pytest.mark.parametrize("batch_dims", [0, 1])
@pytest.mark.parametrize("end", [2.0, -2.0])
def test_progress_is_told_from_step_to_step(solver, batch_dims, end):
    parts = []
    y0 = torch.tensor([[0.5], [1.0], [2.0]], dtype=D, requires_grad=True)
    rates = torch.tensor([[1.0], [5.0], [0.1]], dtype=D)
    args, options = (rates,), {"batch_dims": batch_dims, "in_dims": 0 if batch_dims else None}
    f = lambda t, y, a: -a * y  # noqa: E731
    solution = im.odeint(f, y0, (0.0, end / 2, end), *args, solver=solver(progress=parts.append), **options)
    plain = im.odeint(f, y0, (0.0, end / 2, end), *args, solver=solver(), **options)
    torch.testing.assert_close(solution.value, plain.value, rtol=1e-12, atol=1e-12)
    assert len(parts) == int((solution.steps + solution.rejected).max())
    assert parts == sorted(parts)
    assert 0 <= parts[0] < 1
    assert parts[-1] == 1
    count = len(parts)
    torch.autograd.grad(solution.value.sum(), y0)
    assert len(parts) == count


def test_progress_of_a_sample_that_an_event_ended_counts_no_more():
    parts = []
    event = im.Event(lambda t, y: y[:, 0] - 0.9)
    y0 = torch.tensor([[1.0], [0.5]], dtype=D)
    solver = im.Dopri5(progress=parts.append)
    im.odeint(lambda t, y: -y, y0, (0.0, 3.0), event=event, batch_dims=1, solver=solver)
    assert parts[-1] == 1


def test_progress_and_backward_solves():
    forward, backward = [], []
    y0 = torch.tensor([1.0], dtype=D, requires_grad=True)
    for adjoint in (im.BacksolveAdjoint(), im.BacksolveAdjoint(solver=im.Dopri5(progress=backward.append))):
        solver = im.Dopri5(progress=forward.append)
        value = im.odeint(lambda t, y: -y, y0, (0.0, 1.0), solver=solver, adjoint=adjoint).value
        count = len(forward)
        value[-1].sum().backward()
        assert len(forward) == count
    assert backward[-1] == 1
    with pytest.warns(im.CompileWarning, match="compile=True is not supported for progress"):
        im.odeint(lambda t, y: -y, y0.detach(), (0.0, 1.0), solver=solver, compile=True)


def test_tolerances_may_differ_by_component():
    def f(t, y):
        return torch.stack([y[1], -y[0]])

    y0 = torch.tensor([0.0, 1.0], dtype=D)
    loose = im.odeint(f, y0, (0.0, 3.0), solver=im.Dopri5(rtol=0.0, atol=1e-3))
    tight = im.odeint(f, y0, (0.0, 3.0), solver=im.Dopri5(rtol=0.0, atol=torch.tensor([1e-9, 1e-3], dtype=D)))
    assert int(tight.steps) > 2 * int(loose.steps)


def test_the_norm_may_be_the_users():
    norms = []

    def largest(rows):
        norms.append(rows.shape)
        return rows.abs().amax(1)

    im.odeint(lambda t, y: -y, torch.ones(5, dtype=D), (0.0, 1.0), solver=im.Dopri5(norm=largest))
    assert set(norms) == {(1, 5)}


@pytest.mark.parametrize("batch_dims", [0, 1])
@pytest.mark.parametrize("parts", [(1.0, 0.0, 0.0), (0.7, 0.4, 0.0), (0.6, 0.3, 0.2), (0.5, 0.0, -0.1)])
def test_the_parts_of_a_controller_make_the_lengths_that_follow_by_hand(parts, batch_dims):
    """Heun's method integrates cos t with the error dt / 2 |cos(t + dt) - cos t|, of which 1e-3 is allowed."""
    integral, proportional, derivative = parts
    t, dt, errors, expected, rejected = 0.1, 0.05, [1.0, 1.0], [], 0
    while t < 6.0:
        dt = min(dt, 6.0 - t)
        error = dt / 2 * abs(math.cos(t + dt) - math.cos(t)) / 1e-3
        if error <= 1:
            t += dt
            expected.append(t)
            power = error**-integral * errors[-1] ** proportional * errors[-2] ** -derivative
            factor, errors = 0.9 * power**0.5, [errors[-1], error]
        else:
            rejected += 1
            factor = min(0.9, 0.9 * error**-0.5)
        dt *= min(max(factor, 0.2), 10.0)
    found = []

    def f(t, y):
        found.append(float(t.flatten()[0]))
        return torch.cos(t) * torch.ones_like(y)

    controller = im.Controller(integral=integral, proportional=proportional, derivative=derivative)
    solver = im.Heun(rtol=0.0, atol=1e-3, dt0=0.05, controller=controller)
    y0 = torch.ones(1 + 2 * batch_dims, 1, dtype=D)
    solution = im.odeint(f, y0, (0.1, 6.0), solver=solver, batch_dims=batch_dims)
    assert solution.steps.flatten().tolist() == [len(expected)] * len(solution.steps.flatten())
    assert int(solution.rejected.flatten()[0]) == rejected
    assert len(expected) > 15
    ends = [s for s in found if min(abs(s - e) for e in expected) < 1e-9]
    assert len(ends) >= len(expected)


def test_a_proportional_part_rejects_fewer_steps_of_a_stiff_problem():
    def f(t, y):
        return torch.stack([y[1], 20 * (1 - y[0] ** 2) * y[1] - y[0]])

    y0, span = torch.tensor([2.0, 0.0], dtype=D), (0.0, 15.0)
    rejected = [
        int(im.odeint(f, y0, span, solver=im.Dopri5(rtol=1e-4, controller=controller)).rejected)
        for controller in (im.Controller(), im.Controller(integral=0.7, proportional=0.4))
    ]
    assert rejected[1] < rejected[0]


FAR = {
    "grow": lambda t, y: torch.ones_like(y),
    "rest": lambda t, y: -y,
    "wave": lambda t, y: torch.cos(t) * torch.ones_like(y),
}


@pytest.mark.parametrize("f", FAR.values(), ids=FAR.keys())
@pytest.mark.parametrize("t", [(1e4, 1e4 + 1), (1e4 + 1, 1e4), (-1e4, -1e4 + 1)], ids=["up", "down", "before 0"])
@pytest.mark.parametrize(
    "solver",
    [
        im.Dopri5(max_steps=100),
        im.Dopri5(max_steps=100, dt0=1e-5),
        im.Dopri5(max_steps=100, tstops=(10000.5, -9999.5)),
        im.Kvaerno5(max_steps=100),
        im.Adams(max_steps=100),
        im.ReversibleHeun(max_steps=100, rtol=1e-3, atol=1e-3),
    ],
    ids=["Dopri5", "dt0", "tstops", "Kvaerno5", "Adams", "ReversibleHeun"],
)
def test_steps_are_as_long_as_times_resolve_however_far_from_0_they_are(solver, t, f):
    """In float32, times beside 1e4 are a thousandth apart, and the first step wants to be shorter."""
    alone = im.odeint(f, torch.zeros(1), t, solver=solver)
    several = im.odeint(f, torch.zeros(3, 1), t, solver=solver, batch_dims=1)
    exact = {"grow": t[1] - t[0], "rest": 0.0, "wave": math.sin(t[1]) - math.sin(t[0])}
    name = next(name for name, other in FAR.items() if other is f)
    torch.testing.assert_close(alone.value[-1], torch.tensor([exact[name]]), rtol=0, atol=2e-3)
    torch.testing.assert_close(several.value[-1], alone.value[-1].expand(3, 1), rtol=0, atol=1e-4)


def test_steps_grow_with_the_distance_of_times_from_0():
    """Where the slope suits steps of length 1, which times beyond 2**24 do not resolve."""
    solver = im.Dopri5(dt0=1.0, dt_max=1.0, max_steps=100)
    t = (2.0**24 - 8, 2.0**24 + 64)
    solution = im.odeint(lambda t, y: torch.ones_like(y), torch.zeros(1), t, solver=solver)
    torch.testing.assert_close(solution.value[-1], torch.tensor([72.0]))


def test_a_step_that_times_do_not_resolve_ends_in_underflow():
    with pytest.raises(im.SolverError, match=r"STEP_UNDERFLOW at t = 0\.1 after 0 steps \(1 tried\)"):
        im.odeint(lambda t, y: 1e20 * y, torch.ones(1, dtype=D), (0.1, 1.0))


@pytest.mark.parametrize("t", [(1e6, 1e6 + 1), (1e6 - 1, -1e6), (0.0, 1e6)])
@pytest.mark.parametrize("compile", [False, True])
def test_constant_steps_that_times_do_not_resolve_are_refused(t, compile):
    solver, f = im.Euler(dt=0.01), lambda t, y: -y
    with pytest.raises(ValueError, match=r"float32 does not resolve .*dt=0\.01 at t = 1e\+06; .* is 0\.12\. Pass"):
        im.odeint(f, torch.ones(1), t, solver=solver, compile=compile)
    with pytest.raises(ValueError, match="does not resolve"):
        im.odeint(f, torch.ones(2, 1), torch.tensor([[0.0, 1.0], t]), solver=im.Adams(dt=0.01), batch_dims=1)
    solution = im.odeint(f, torch.ones(1, dtype=D), (1e6, 1e6 + 1), solver=solver)
    assert int(solution.steps) == 100


# ------------------------------------------------------------------------------------------------ failures


def test_nan_at_some_time_ends_that_sample_and_no_other():
    def f(t, y):
        return torch.where((t > 0.5) & (y > 0), float("nan"), -y)

    y0 = torch.tensor([[1.0], [-1.0]], dtype=D)
    with pytest.warns(im.ConvergenceWarning, match=r"1 of 2 samples .*t = 0\.[45]"):
        solution = im.odeint(f, y0, (0.0, 0.25, 1.0), batch_dims=1, on_failure="warn")
    assert solution.status.tolist() == [im.Status.NON_FINITE, im.Status.CONVERGED]
    torch.testing.assert_close(solution.value[1, 0], torch.tensor([math.exp(-0.25)], dtype=D), rtol=1e-5, atol=0)
    assert bool(solution.value[2, 0].isnan())
    assert 0.4 < float(solution.t[0]) <= 0.5
    torch.testing.assert_close(solution.value[2, 1], torch.tensor([-math.exp(-1)], dtype=D), rtol=1e-5, atol=0)


def test_a_step_into_nan_is_shortened_where_that_helps():
    """The square root is undefined beyond the end; a long first step gets there."""
    solution = im.odeint(
        lambda t, y: -torch.sqrt(y), torch.ones(1, dtype=D), (0.0, 1.9), solver=im.Dopri5(dt0=1.9)
    )
    assert int(solution.rejected) > 0
    torch.testing.assert_close(solution.value[-1], torch.tensor([0.05**2], dtype=D), rtol=0, atol=1e-5)


def test_a_solution_that_blows_up_says_where():
    with pytest.raises(im.SolverError, match=r"t = 0\.9999|t = 1 ") as caught:
        im.odeint(lambda t, y: y**2, torch.ones(1, dtype=D), (0.0, 2.0))
    solution = caught.value.solution
    assert int(solution.status) in (im.Status.STEP_UNDERFLOW, im.Status.NON_FINITE)
    assert abs(float(solution.t) - 1) < 1e-3


def test_running_out_of_steps_says_how_far_it_got():
    with pytest.raises(im.SolverError, match=r"MAX_STEPS at t = 0\.1 after 10 steps"):
        im.odeint(lambda t, y: -y, torch.ones(1, dtype=D), (0.0, 1.0), solver=im.RK4(dt=0.01, max_steps=10))


RATES = torch.tensor([0.0, 0.0, -50.0], dtype=D)


def late_nan(t, y):
    return torch.where((t > 0.5) & (torch.arange(3) == 2), float("nan"), -y)


@pytest.mark.parametrize(
    ("f", "solver", "words"),
    [
        (lambda t, y: RATES * y, im.Dopri5(max_steps=20), r"MAX_STEPS .*, largest error in component 2\. Try"),
        (
            lambda t, y: RATES * y + torch.sin(99 * t),
            im.Dopri5(max_steps=9, norm=lambda rows: rows[:, :2].norm(dim=1)),  # which looks at two of three
            r"MAX_STEPS .*, largest error in component 0\. Try",
        ),
        (lambda t, y: RATES * y, im.Adams(max_steps=20), r"MAX_STEPS .*, largest error in component 2\. Try"),
        (lambda t, y: RATES * y, im.Kvaerno5(max_steps=3), r"MAX_STEPS .*, largest error in component 2\. Try"),
        (lambda t, y: RATES * y, im.RK4(dt=0.01, max_steps=5), r"MAX_STEPS .*, next step 0\.01\. Try"),
        (lambda t, y: -RATES * y**2, im.Bosh3(), r"STEP_UNDERFLOW .*, largest error in component 2\. Try"),
        (late_nan, im.RK4(dt=0.1), r"NON_FINITE .*, NaN or inf in component 2\. Try"),
        (late_nan, im.Dopri5(), r"NON_FINITE .*, NaN or inf in component 2\. Try"),
        (late_nan, im.Dopri5(tstops=(0.5,)), r"NON_FINITE at t = 0\.5 .*, NaN or inf in component 2\. Try"),
    ],
)
def test_a_failure_names_the_component_that_is_to_blame_or_none(f, solver, words):
    y0 = torch.ones(2, 3, dtype=D)
    with pytest.raises(im.SolverError, match=words):
        im.odeint(f, y0[0], (0.0, 10.0), solver=solver)
    with pytest.raises(im.SolverError, match=words):
        im.odeint(f, y0, (0.0, 10.0), solver=solver, batch_dims=1, in_dims=())


@pytest.mark.parametrize("component", [0, 1])
def test_a_failure_names_the_component_by_the_norm_of_its_sample(component):
    counts = torch.eye(3, dtype=D)[[component, 1 - component]]
    solver = im.Dopri5(max_steps=9, norm=lambda rows: (rows * counts).norm(dim=1))
    with pytest.raises(im.SolverError, match=rf"Sample 0: .*, largest error in component {component}\. Try"):
        im.odeint(lambda t, y: torch.sin(99 * t) - y, 0 * counts, (0, 9), solver=solver, batch_dims=1)


@pytest.mark.parametrize("dtype", [torch.float32, D])
def test_a_step_that_dt_min_forbids_names_it(dtype):
    words = r"STEP_UNDERFLOW .*, next step 0\.3, .*Try: a dt_min below 0\.3, as the tolerances need shorter steps"
    y0, solver = torch.ones(2, dtype=dtype), im.Dopri5(dt_min=0.3)
    with pytest.raises(im.SolverError, match=words):
        im.odeint(lambda t, y: torch.sin(9 * t) * y, y0, (0.0, 10.0), solver=solver)


@pytest.mark.parametrize("solver", [im.Dopri5(), im.RK4(dt=0.1), im.Kvaerno5()])
def test_a_start_that_is_nan_names_the_component(solver):
    y0 = torch.tensor([[1.0, 1.0, 1.0], [1.0, float("nan"), 1.0]], dtype=D)
    with pytest.raises(im.SolverError, match=r"Sample 1: NON_FINITE at t = 0 .*NaN or inf in component 1\. Try"):
        im.odeint(lambda t, y: -y, y0, (0.0, 1.0), solver=solver, batch_dims=1)
    with pytest.raises(im.SolverError, match=r"NaN or inf in component 1 and 1 more\. Try"):
        im.odeint(lambda t, y: torch.cat([y[:1] / 1, y[1:] / 0]), y0[0], (0.0, 1.0), solver=solver)


def test_a_failure_that_no_component_is_to_blame_for_names_none():
    event = im.Event(lambda t, y: torch.sqrt(y[0] - 0.5) + 1)
    with pytest.raises(im.SolverError, match=r"NON_FINITE at t = 0\.69.*, next step [-.e0-9]+\. Try"):
        im.odeint(lambda t, y: -y, torch.ones(3, dtype=D), (0.0, 1.0), event=event)


def test_constant_steps_into_nan_end_there():
    def f(t, y):
        return torch.where(t > 0.5, float("nan"), -y)

    with pytest.raises(im.SolverError, match=r"NON_FINITE at t = 0\.[45]"):
        im.odeint(f, torch.ones(1, dtype=D), (0.0, 1.0), solver=im.RK4(dt=0.1))


def test_failures_may_be_ignored():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solution = im.odeint(lambda t, y: y**2, torch.ones(1, dtype=D), (0.0, 2.0), on_failure="ignore")
    assert bool(solution.value[-1].isnan())


# ----------------------------------------------------------------------------------------------- bad input

Y = torch.ones(2, 3, dtype=D)


def decay(t, y):
    return -y


@pytest.mark.parametrize(
    ("f", "y0", "t", "options", "error", "message"),
    [
        (decay, Y, (0.0, 1.0, 0.5), {}, ValueError, "increase throughout"),
        (decay, Y, (0.0, 0.0), {}, ValueError, "increase throughout"),
        (decay, Y, (0.0,), {}, ValueError, "at least one other time"),
        (decay, Y, (0.0, float("nan")), {}, ValueError, "NaN"),
        (decay, Y, torch.tensor([0.0, 1.0]), {}, ValueError, "float32"),
        (decay, Y, torch.tensor([0, 1]), {}, ValueError, "int64"),
        (decay, Y, torch.zeros(3, 2, dtype=D), {"batch_dims": 1}, ValueError, "B = 2"),
        (decay, Y, torch.zeros(2, 2, dtype=D), {}, ValueError, "shape"),
        (decay, Y, 1.0, {}, TypeError, "sequence of times"),
        (decay, Y, "ab", {}, TypeError, "sequence of times, got a str"),
        (decay, Y, (0.0, "b"), {}, TypeError, r"t must hold numbers only, got \(0.0, 'b'\)"),
        (decay, Y, (0.0, None), {}, TypeError, "t must hold numbers only"),
        (decay, torch.ones(2, dtype=torch.int64), (0.0, 1.0), {}, TypeError, "y0 has dtype torch.int64"),
        (decay, {}, (0.0, 1.0), {}, ValueError, "y0 holds no tensor"),
        (lambda t, y: y[:1], Y, (0.0, 1.0), {}, ValueError, r"expected \(2, 3\), got \(1, 3\)"),
        (lambda t, y: y.float(), Y, (0.0, 1.0), {}, ValueError, "dtype of y0"),
        (lambda t, y: (y,), Y, (0.0, 1.0), {}, ValueError, "structure of y0"),
        (lambda t, y: y.mul_(2), Y, (0.0, 1.0), {}, ValueError, "in place"),
        (None, Y, (0.0, 1.0), {}, TypeError, "callable"),
        (decay, Y, (0.0, 1.0), {"solver": im.Anderson()}, TypeError, "Dopri5"),
        (decay, Y, (0.0, 1.0), {"adjoint": im.ImplicitAdjoint()}, TypeError, "RecursiveCheckpointAdjoint"),
        (decay, Y, (0.0, 1.0), {"on_failure": "stop"}, ValueError, "on_failure"),
        (decay, Y, (0.0, 1.0), {"batch_dims": 2}, ValueError, "batch_dims"),
        (decay, Y.float(), (0.0, 1.0), {"solver": im.Dopri5(rtol=1e-9)}, ValueError, "float32 cannot resolve"),
        (decay, Y.bfloat16(), (0.0, 1.0), {}, ValueError, "bfloat16 cannot resolve"),
        (decay, Y.float(), (0.0, 1.0), {"solver": im.Dopri5(rtol=0.0, atol=1e-35)}, ValueError, "with atol=1e-35"),
        (
            decay,
            Y,
            (0.0, 1.0),
            {"solver": im.Dopri5(atol=torch.ones(3)), "batch_dims": 0},
            ValueError,
            r"atol must be .* each of the 6 components .* got the shape \(3,\)",
        ),
        (
            decay,
            Y,
            (0.0, 1.0),
            {"solver": im.Kvaerno5(rtol=torch.full((2, 1), 1e-3)), "batch_dims": 1},
            ValueError,
            r"Kvaerno5: rtol must be .* of shape \(3,\), got the shape \(2, 1\)",
        ),
        (
            decay,
            Y,
            (0.0, 1.0),
            {"solver": im.Dopri5(norm=lambda r: r.norm()), "batch_dims": 1},
            ValueError,
            r"one number a sample, but maps \(2, 3\) to \(\); reduce dimension 1",
        ),
        (
            decay,
            Y,
            (0.0, 1.0),
            {"solver": im.Adams(norm=lambda r: float(r.norm()))},
            TypeError,
            "Adams: norm must return a tensor .* got a float",
        ),
    ],
)
def test_input_that_cannot_be_meant_is_refused(f, y0, t, options, error, message):
    with pytest.raises(error, match=message):
        im.odeint(f, y0, t, **options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: im.RK4(), r"pass RK4\(dt=...\)"),
        (lambda: im.Dopri5(dt=-0.1), "dt must be"),
        (lambda: im.Dopri5(dt0=0.0), "dt0 must be"),
        (lambda: im.Dopri5(dt=0.1, dt0=0.1), "pass only one"),
        (lambda: im.Dopri5(dt_min=1.0, dt_max=0.5), "dt_min <= dt_max"),
        (lambda: im.Dopri5(dt=0.1, dt_min=0.2), "dt_min would have no effect"),
        (lambda: im.Dopri5(dt=0.1, dt0=0.2), "dt0 would have no effect"),
        (lambda: im.Dopri5(max_steps=0), "max_steps"),
        (lambda: im.Dopri5(rtol=-1.0), "rtol"),
        (lambda: im.Controller(shrink=2.0), "shrink"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: im.RK4(dt=torch.tensor(0.1)), r"RK4: dt must be a number, got a Tensor; .*float\(...\)"),
        (lambda: im.Dopri5(dt0="a"), "dt0 must be a number, got a str"),
        (lambda: im.Dopri5(dt_max=torch.tensor(0.1)), "dt_max must be a number"),
        (lambda: im.Dopri5(norm=2.0), "norm must map .* got a float"),
    ],
)
def test_options_of_a_wrong_type_are_refused(make, message):
    with pytest.raises(TypeError, match=message):
        make()


def test_a_length_may_be_a_number_of_numpy():
    values = [
        im.odeint(lambda t, y: -y, Y, (0.0, 1.0), solver=solver).value
        for solver in (im.RK4(dt=0.25), im.RK4(dt=np.float32(0.25)), im.RK4(dt=np.float64(0.25)))
    ]
    assert torch.equal(values[0], values[1])
    assert torch.equal(values[0], values[2])


def test_a_captured_tensor_is_refused_with_the_remedy():
    w = torch.ones(3, dtype=D, requires_grad=True)
    with pytest.raises(ValueError, match=r"'w' of shape \(3,\).*Pass it in args"):
        im.odeint(lambda t, y: -w * y, Y, (0.0, 1.0))


@pytest.mark.parametrize("length", [1.0, 1e-300, 5e-324])
@pytest.mark.parametrize("batch_dims", [0, 1])
def test_a_slope_that_is_infinite_at_the_start_ends_in_a_status_however_short_the_interval(length, batch_dims):
    y0, t = torch.ones(1, 3, dtype=torch.float64), (0.0, length)
    solution = im.odeint(lambda t, y: y / 0, y0, t, batch_dims=batch_dims, on_failure="ignore")
    assert solution.status.flatten().tolist() == [im.Status.NON_FINITE]


def test_f_may_make_its_time_a_tracked_one():
    def f(t, y):
        with torch.enable_grad():
            t.requires_grad_(True)
            (slope,) = torch.autograd.grad(t**3, t)
        return slope.detach() + 0 * y

    for adjoint in (im.RecursiveCheckpointAdjoint(), im.BacksolveAdjoint(), im.UnrolledAdjoint()):
        y0 = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        value = im.odeint(f, y0, (0.0, 2.0), adjoint=adjoint).value[-1]
        torch.testing.assert_close(value, torch.full_like(value, 8.0))
        torch.testing.assert_close(*torch.autograd.grad(value.sum(), y0), torch.ones_like(y0))


def test_a_trajectory_is_written_without_the_function_it_holds():
    assert "interpolate" not in repr(im.odeint(decay, Y, (0.0, 1.0)))


@pytest.mark.parametrize("batch_dims", [0, 1])
def test_a_failure_under_vmap_carries_all_that_is_mapped(batch_dims):
    y0, t = torch.ones(2, 3, dtype=D), torch.tensor([[0.0, 1.0, 1.0], [0.0, 0.5, 1.0]], dtype=D)
    t, ones = (t, 4) if batch_dims else (t[1], 2)

    def solve(rate):
        solver = im.Dopri5(max_steps=3)
        return im.odeint(lambda t, y, rate: rate * y, y0, t, rate, batch_dims=batch_dims, solver=solver).value

    with pytest.raises(im.SolverError, match="MAX_STEPS") as caught:
        torch.func.vmap(solve)(torch.tensor([1e-3, 100.0], dtype=D))
    solution = caught.value.solution
    assert solution.value.shape == ((3, ones, 3) if batch_dims else (3, ones, 2, 3))
    assert solution.status.tolist() == [0] * (ones // 2) + [im.Status.MAX_STEPS] * (ones // 2)
    assert solution.value[:, : ones // 2].isfinite().all()
    assert solution.value[-1, ones // 2 :].isnan().all()


@pytest.mark.parametrize("batch_dims", [0, 1])
def test_a_start_below_the_tolerance_is_as_good_as_zero(batch_dims):
    """Rounding, which is what it usually is, says nothing about the length of the first step."""

    def evaluations(start):
        y0, solver = torch.full((1, 1), start, dtype=D), im.Dopri8(rtol=1e-10, atol=1e-11)
        f = lambda t, y: torch.cos(t) + 0 * y  # noqa: E731
        return im.odeint(f, y0, (1.0, 2.0), solver=solver, batch_dims=batch_dims).evaluations

    assert evaluations(3e-16) == evaluations(1e-12) == evaluations(0.0)


def test_a_first_step_that_times_do_not_resolve_is_named():
    t = (1e6, 1e6 + 10.0)
    with pytest.raises(
        im.SolverError, match=r"float32, times there resolve no steps shorter than 0\.48.*from the start"
    ):
        im.odeint(lambda t, y: torch.sin(t) - y, torch.zeros(1), t)


@pytest.mark.parametrize(("dtype", "real"), [(torch.bfloat16, torch.float32), (torch.complex128, D), (D, D)])
def test_what_times_are_to_be_converted_to_can_be_passed(dtype, real):
    """`t.to(y0)` would be bfloat16 or complex numbers again."""
    y0, t, solver = torch.ones(2, dtype=dtype), torch.tensor([0.0, 1.0]).half(), im.Dopri5(rtol=0.02, atol=0.02)
    with pytest.raises(ValueError, match=r"pass t\.to\(") as caught:
        im.odeint(lambda t, y: -y, y0, t, solver=solver)
    passed = str(caught.value).split("pass t.to(")[1].split(")")[0]
    converted = t.to(y0) if passed == "y0" else t.to("cpu", getattr(torch, passed.split("torch.")[1]))
    assert converted.dtype == real
    assert im.odeint(lambda t, y: -y, y0, converted, solver=solver).value.dtype == dtype
