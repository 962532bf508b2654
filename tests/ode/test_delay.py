"""Delay equations: against exact solutions, by halving steps, and their derivatives."""

from __future__ import annotations

import gc
import math
import warnings
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import implicitly as im
from tests.leaks import living_tensors

ADJOINTS = (im.RecursiveCheckpointAdjoint(), im.UnrolledAdjoint(), im.BacksolveAdjoint())
FINE = im.Dopri5(rtol=1e-9, atol=1e-11)


def steps_exact(t: float) -> float:
    """y' = -y(t - 1), y = 1 up to 0: a polynomial of one degree more after each lag."""
    return sum((-1) ** k * (t - (k - 1)) ** k / math.factorial(k) for k in range(int(t) + 2))


def fall(t, y, delayed):
    return -delayed[0]


def two_lags(t, y, delayed, a):
    return a[0] * delayed[0] / (1 + delayed[0] ** 2) - a[1] * torch.sin(delayed[1]) * y


def inputs(*, requires_grad: bool = True) -> tuple[Tensor, ...]:
    """Lags, args, history and times of `two_lags`; no time is a sum of lags."""
    given = ([1.0, 0.71], [2.0, 0.5], [0.5, 1.2], [0.0, 0.8, 2.35])
    return tuple(torch.tensor(x, dtype=torch.float64, requires_grad=requires_grad) for x in given)


def values(lags, a, history, t, solver=FINE, **options) -> Tensor:
    return im.ddeint(two_lags, history, t, a, lags=lags, solver=solver, **options).value


@pytest.mark.parametrize(
    ("solver", "error"),
    [
        (im.Dopri5(rtol=1e-8, atol=1e-10), 1e-7),
        (im.Tsit5(rtol=1e-8, atol=1e-10), 1e-7),
        (im.Dopri8(rtol=1e-9, atol=1e-11), 1e-8),
        (im.Bosh3(rtol=1e-7, atol=1e-9), 1e-6),
        (im.Adams(rtol=1e-8, atol=1e-10), 1e-7),
        (im.RK4(dt=0.05), 1e-7),
        (im.Kvaerno5(rtol=1e-8, atol=1e-10, dt_max=0.05), 1e-7),
        (im.ReversibleHeun(dt=0.005), 1e-4),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, object) and not isinstance(x, float) else "",
)
def test_values_are_those_of_the_exact_solution(solver, error):
    t = torch.linspace(0, 5, 21, dtype=torch.float64)
    sol = im.ddeint(fall, torch.ones(1, dtype=torch.float64), t, lags=(1.0,), solver=solver)
    exact = torch.tensor([steps_exact(x) for x in t.tolist()], dtype=torch.float64)
    assert sol.status == im.Status.CONVERGED
    assert (sol.value[:, 0] - exact).abs().max() < error


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=lambda a: type(a).__name__)
def test_derivatives_where_the_solution_is_zero_at_the_end_of_a_lag(adjoint):
    """The output is on the first step of the next stretch, which must not be so short that it has no slope."""
    t, lag = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in ([0.0, 1.0, 1.7], [1.0]))
    history, solver = torch.tensor(1.0, dtype=torch.float64), im.Dopri8(rtol=1e-10, atol=1e-11)
    value = im.ddeint(fall, history, t, lags=lag, solver=solver, adjoint=adjoint).value[1]
    found = torch.autograd.grad(value, (t, lag))
    expected = (t.new_tensor([1.0, -1.0, 0.0]), t.new_zeros(1))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-8)


def strongly_delayed(solver) -> Tensor:
    lags, a = (torch.tensor(x, dtype=torch.float64) for x in ((1.0, 0.75), (8.0, 4.0)))
    t = torch.linspace(0, 2.9, 13, dtype=torch.float64)
    return values(lags, a, torch.tensor([0.5, 1.2], dtype=torch.float64), t, solver)


@cache
def exact_values() -> Tensor:
    return strongly_delayed(im.Dopri8(rtol=1e-13, atol=1e-14))


@pytest.mark.parametrize(
    ("method", "order"),
    [
        (im.Euler, 1),
        (im.Midpoint, 2),
        (im.Heun, 2),
        (im.Trapezoid, 2),
        (im.Bosh3, 3),
        (im.Kvaerno3, 3),
        (im.RK4, 4),
        (im.Adams, 5),
        (im.Dopri5, 5),
        (im.Tsit5, 5),
        (im.Kvaerno5, 4),  # as that of its dense output
    ],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_the_order_is_the_methods_though_derivatives_jump(method, order):
    errors = [(strongly_delayed(method(dt=h)) - exact_values()).abs().max() for h in (1 / 16, 1 / 64)]
    found = math.log2(errors[0] / errors[1]) / 2
    assert order - 0.5 < found < order + 1


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=lambda a: type(a).__name__)
@pytest.mark.parametrize("solver", [im.Dopri5(), im.RK4(dt=0.1), im.Kvaerno3()], ids=lambda s: type(s).__name__)
def test_every_call_of_f_is_counted(adjoint, solver):
    calls = []

    def f(t, y, delayed):
        calls.append(t)
        return -delayed[0]

    y = torch.ones(2, requires_grad=True)
    sol = im.ddeint(f, y, (0.0, 0.3, 2.5), lags=(1.0,), adjoint=adjoint, solver=solver)
    assert sol.evaluations == len(calls)


def test_a_history_that_moves_goes_on_as_it_was():
    """cos' = -cos(t - pi/2): nothing jumps where history ends."""
    t = torch.linspace(0, 4, 9, dtype=torch.float64)
    sol = im.ddeint(lambda t, y, d: -d[0], torch.cos, t, lags=(math.pi / 2,), solver=FINE)
    assert (sol.value - t.cos()).abs().max() < 1e-8
    at = torch.tensor([3.3, 0.1, 4.0, 0.0], dtype=torch.float64)
    assert (sol.interpolate(at) - at.cos()).abs().max() < 1e-7


def weighted(*given: Tensor, **options) -> Tensor:
    weights = torch.linspace(-1, 2, 6, dtype=torch.float64).view(3, 2)
    return (values(*given, im.Dopri5(rtol=1e-10, atol=1e-12), **options) * weights).sum()


@cache
def differences() -> list[list[float]]:
    """Of `weighted`, by each number of each input."""
    given, found = inputs(requires_grad=False), []
    for i, x in enumerate(given):
        steps = 1e-4 * torch.eye(len(x), dtype=torch.float64)
        moved = [[weighted(*given[:i], x + s * step, *given[i + 1 :]) for s in (1, -1)] for step in steps]
        found.append([(ahead - behind).item() / 2e-4 for ahead, behind in moved])
    return found


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=lambda a: type(a).__name__)
def test_gradients_are_those_of_finite_differences(adjoint):
    given = inputs()
    found = torch.autograd.grad(weighted(*given, adjoint=adjoint), given)
    for gradient, numeric in zip(found, differences()):
        assert gradient.tolist() == pytest.approx(numeric, rel=2e-5, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("adjoint", ADJOINTS[:2], ids=lambda a: type(a).__name__)
def test_derivatives_are_exact_for_the_steps_taken(adjoint):
    def run(*given):
        return values(*given, im.RK4(dt=0.5), adjoint=adjoint)[1:, :1]

    lags, a, history, _ = inputs()
    given = lags, a, history, torch.tensor([0.0, 0.8, 1.9], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, given, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(run, given, fast_mode=True)


def test_adaptive_steps_move_with_the_lags():
    """Between two lags so close that the steps are the same in number, the discrete solution is differentiable."""
    given = inputs()

    def run(lags):
        return values(lags, *(x.detach() for x in given[1:]), im.Dopri5(dt0=0.1, dt_max=0.1, rtol=1e-2, atol=1e-2))

    assert torch.autograd.gradcheck(run, given[:1], rtol=1e-6, atol=1e-8)


def test_derivatives_with_times_to_be_hit():
    """Steps up to such a time do not move with the lag, those that begin there do not either."""
    given = inputs()

    def run(*given):
        return values(*given, im.RK4(dt=0.3, tstops=(0.5, 1.15, 1.8)))

    assert torch.autograd.gradcheck(run, given)


def test_transforms_of_torch_func():
    lags, a, history, t = inputs(requires_grad=False)

    def run(a):
        return values(lags, a, history, t, im.RK4(dt=0.3))[-1]

    b = a.clone().requires_grad_()
    expected = torch.stack([torch.autograd.grad(run(b)[i], b)[0] for i in range(2)])
    torch.testing.assert_close(torch.func.jacrev(run)(a), expected)
    torch.testing.assert_close(torch.func.jacfwd(run)(a), expected)
    second = torch.func.hessian(lambda a: run(a).sum())(a)
    torch.testing.assert_close(second, torch.autograd.functional.hessian(lambda a: run(a).sum(), a))
    with pytest.raises(ValueError, match="batch_dims=1"):
        torch.vmap(run)(torch.stack([a, a]))


class Past(nn.Module):
    def __init__(self):
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def forward(self, t):
        return torch.exp(self.rate * t)


class Slope(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(-0.8, dtype=torch.float64))

    def forward(self, t, y, delayed):
        return self.weight * torch.tanh(delayed[0]) + 0.1 * torch.sin(t)


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=lambda a: type(a).__name__)
def test_parameters_of_f_and_of_the_history_get_gradients(adjoint):
    f, past = Slope(), Past()
    parameters = (f.weight, past.rate)

    def loss():
        return im.ddeint(f, past, (0.0, 2.5), lags=(1.0,), solver=FINE, adjoint=adjoint).value[-1]

    found = torch.autograd.grad(loss(), parameters)
    for parameter, gradient in zip(parameters, found):
        moved = []
        for step in (1e-5, -2e-5):
            with torch.no_grad():
                parameter += step
                moved.append(loss())
        with torch.no_grad():
            parameter += 1e-5
        assert gradient.item() == pytest.approx((moved[0] - moved[1]).item() / 2e-5, rel=1e-4)


def test_a_captured_tensor_is_refused():
    hidden = torch.tensor(0.5, requires_grad=True)
    with pytest.raises(ValueError, match="args"):
        im.ddeint(lambda t, y, d: hidden * d[0], torch.ones(1), (0.0, 2.0), lags=(1.0,))


def relax(t, y, delayed, rate, a):
    return rate * (a * delayed[0] / (1 + delayed[0] ** 4) - y)


@pytest.mark.parametrize("in_dims", [None, (0, None)])
def test_samples_have_steps_of_their_own(in_dims):
    rate = torch.tensor([[1.0], [2.0], [40.0], [0.1]], dtype=torch.float64, requires_grad=True)
    lag = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    a, history = torch.tensor(2.0, dtype=torch.float64), torch.linspace(0.2, 1, 8, dtype=torch.float64).view(4, 2)
    options = {"lags": (lag,), "solver": im.Dopri5(rtol=1e-6, atol=1e-8)}
    t = (0.0, 1.0, 3.0)
    whole = im.ddeint(relax, history, t, rate, a, batch_dims=1, in_dims=in_dims, **options)
    assert whole.value.shape == (3, 4, 2)
    assert whole.steps[2] > 3 * whole.steps[3]
    gradients = torch.autograd.grad(whole.value.sin().sum(), (rate, lag))
    of_lag = torch.zeros_like(lag)
    for i in range(4):
        alone = im.ddeint(relax, history[i], t, rate[i], a, **options)
        assert (alone.value - whole.value[:, i]).abs().max() < 1e-12
        assert alone.steps == whole.steps[i]
        of_rate, part = torch.autograd.grad(alone.value.sin().sum(), (rate, lag))
        assert (of_rate[i] - gradients[0][i]).abs().max() < 1e-12
        of_lag += part
    assert gradients[1].item() == pytest.approx(of_lag.item(), rel=1e-10)
    assert (whole.interpolate((1.0, 3.0)) - whole.value[1:]).abs().max() == 0
    each = torch.rand(4, 5, dtype=torch.float64) * 3
    assert torch.equal(whole.interpolate(each)[2, 1], whole.interpolate(each[1, 2:3])[0, 1])


@pytest.mark.parametrize("adjoint", ADJOINTS[:2], ids=lambda a: type(a).__name__)
def test_samples_of_fewer_steps_know_the_slope_where_a_lag_ends(adjoint):
    """The last stage of a step asks for the past right at the end of an earlier stretch."""
    rate = torch.tensor([[1.0], [8.0]], dtype=torch.float64)
    lags = torch.tensor([0.3, 1.1], dtype=torch.float64, requires_grad=True)
    history = torch.tensor([[0.2], [1.0]], dtype=torch.float64)
    f = lambda t, y, d, rate: d[0].tanh() + rate * (d[1].sin() - y)  # noqa: E731
    options = {"lags": lags, "solver": im.Dopri5(rtol=1e-7, atol=1e-9), "adjoint": adjoint, "batch_dims": 1}
    whole = im.ddeint(f, history, (0.0, 2.0), rate, in_dims=0, **options)
    assert whole.steps[0] != whole.steps[1]
    for i in range(2):
        alone = im.ddeint(f, history[i : i + 1], (0.0, 2.0), rate[i : i + 1], in_dims=0, **options)
        (found,) = torch.autograd.grad(whole.value[1, i].sum(), lags, retain_graph=True)
        (wanted,) = torch.autograd.grad(alone.value[1].sum(), lags)
        assert found.tolist() == pytest.approx(wanted.tolist(), rel=1e-6)


def test_a_history_that_moves_in_a_batch():
    phase = torch.tensor([[0.0], [1.0], [2.0]], dtype=torch.float64)
    sol = im.ddeint(
        lambda t, y, d, p: -d[0],
        lambda t, p: torch.cos(t + p),
        (0.0, 1.0, 4.0),
        phase,
        lags=(math.pi / 2,),
        solver=FINE,
        batch_dims=1,
        in_dims=0,
    )
    assert (sol.value[2] - torch.cos(4 + phase)).abs().max() < 1e-8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_the_dtype_that_comes_in_goes_out(dtype):
    history = {"a": torch.ones(2, dtype=dtype), "b": torch.ones((), dtype=dtype)}
    solver = im.Dopri5(rtol=0.02, atol=1e-3) if dtype is torch.bfloat16 else im.Dopri5()
    f = lambda t, y, d: {k: -x for k, x in d[0].items()}  # noqa: E731
    sol = im.ddeint(f, history, (0.0, 0.5, 2.5), lags=(1.0,), solver=solver)
    assert sol.value["a"].dtype == sol.value["b"].dtype == dtype
    assert sol.value["a"].shape == (3, 2)
    off = (sol.value["b"] - torch.tensor([1.0, 0.5, steps_exact(2.5)])).abs().max()
    assert off < (0.02 if dtype is torch.bfloat16 else 1e-4)


def test_autocast_is_for_f_alone():
    """Where links begin and end is a sum of lags, which bfloat16 does not resolve."""

    def found(cast: bool):
        history = torch.tensor([0.7, 1.3], requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            solver = im.Dopri5(rtol=2e-2, atol=1e-2)
            solution = im.ddeint(fall, history, (0.0, 0.53, 1.0), lags=(0.3, 0.71), solver=solver)
            between = solution.interpolate((0.21,)).detach()
            (gradient,) = torch.autograd.grad(solution.value[1].sum(), history)
        return solution.value.detach(), between, gradient

    for a, b in zip(found(True), found(False)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_autocast_reaches_f():
    seen = []

    def f(t, y, delayed):
        seen.append((delayed[0] @ torch.eye(2)).dtype)
        return -delayed[0]

    with torch.autocast("cpu", torch.bfloat16):
        value = im.ddeint(f, torch.ones(2), (0.0, 1.0), lags=(0.3,), solver=im.RK4(dt=0.1)).value
    assert set(seen) == {torch.bfloat16}
    assert value.dtype == torch.float32


@pytest.mark.parametrize("t", [(0.1, 1.0), np.array([0.1, 1.0])], ids=["numbers", "array"])
def test_a_history_that_moves_is_asked_for_the_first_time_in_the_dtype_of_y(t):
    """The start of a float64 solve is not where float32 has it."""
    a = torch.ones(1, dtype=torch.float64)
    options = {"lags": (0.3,), "solver": FINE}
    value = im.ddeint(lambda t, y, d, a: -a * d[0], lambda t, a: a * t.sin(), t, a, **options).value
    torch.testing.assert_close(value[0], torch.tensor([math.sin(0.1)], dtype=torch.float64), rtol=0, atol=1e-16)
    t = torch.tensor(t, dtype=torch.float64)
    same = im.ddeint(lambda t, y, d, a: -a * d[0], lambda t, a: a * t.sin(), t, a, **options).value
    torch.testing.assert_close(value, same, rtol=0, atol=1e-15)


def test_without_samples_nothing_is_solved():
    sol = im.ddeint(fall, torch.ones(0, 2), (0.0, 2.5), lags=(1.0,), batch_dims=1)
    assert sol.value.shape == (2, 0, 2)


def test_a_sample_that_fails_harms_no_other():
    rate = torch.tensor([[0.1], [5.0]], dtype=torch.float64, requires_grad=True)
    shared = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    lag = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)

    def run(rate, history):
        return im.ddeint(
            lambda t, y, d, r, s: s * r * y**2 + 0.1 * d[0],
            history,
            (0.0, 0.1, 1.0, 2.0),
            rate,
            shared,
            lags=(lag,),
            batch_dims=1,
            on_failure="warn",
        )

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        both = run(rate, torch.ones(2, 1, dtype=torch.float64))
    assert len(caught) == 1, "told of once, not in every link"
    assert "ddeint: Dopri5 did not reach the end for 1 of 2 samples" in str(caught[0].message)
    assert both.status.tolist() == [im.Status.CONVERGED, im.Status.STEP_UNDERFLOW]
    assert both.t[1].item() == pytest.approx(0.1987, abs=1e-3)
    assert both.value[:, 1, 0].isfinite().tolist() == [True, True, False, False]
    alone = run(rate[:1], torch.ones(1, 1, dtype=torch.float64))
    assert (both.value[:, 0] - alone.value[:, 0]).abs().max() < 1e-12
    assert both.value[1, 1].item() == pytest.approx(1 / (1 / 1 - 0.5), rel=0.05)  # of y' = 5 y^2, without the past
    found = torch.autograd.grad(both.value.nan_to_num().sum(), (rate, shared, lag))
    wanted = torch.autograd.grad(alone.value.sum(), (rate, shared, lag))
    for x, y in zip(found, wanted):
        torch.testing.assert_close(x, y)


def test_failures_are_raised_with_what_was_found():
    with pytest.raises(im.SolverError, match=r"ddeint: Dopri5 did not reach the end.* at t = 1 ") as raised:
        im.ddeint(lambda t, y, d: y**2, torch.ones(1, dtype=torch.float64), (0.0, 0.5, 3.0), lags=(0.3,))
    value = raised.value.solution.value
    assert value[1].item() == pytest.approx(2, rel=1e-4)
    assert value[2].isnan().all()


def test_progress_goes_from_the_start_to_the_end_once():
    told: list[float] = []
    solver = im.Dopri5(progress=told.append)
    im.ddeint(fall, torch.ones(1), (0.0, 2.5), lags=(1.0,), solver=solver)
    assert told == sorted(told)
    assert told[-1] == pytest.approx(1)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"lags": 1.0}, TypeError, "tuple of numbers"),
        ({"lags": ()}, ValueError, "with m >= 1"),
        ({"lags": (0.0,)}, ValueError, "> 0"),
        ({"lags": (-1.0,)}, ValueError, "> 0"),
        ({"lags": (float("nan"),)}, ValueError, "finite"),
        ({"lags": ("1",)}, TypeError, "numbers or 0-d tensors"),
        ({"lags": (torch.ones(2),)}, ValueError, "a number or a 0-d tensor"),
        ({"lags": torch.ones(1, dtype=torch.float64)}, ValueError, "float64"),
        ({"lags": (1e-9,)}, ValueError, "too short"),
        ({"t": (1.0, 0.0)}, ValueError, "t must increase"),
        ({"t": (0.0,)}, ValueError, "at least one other"),
        ({"t": torch.zeros(3, 2)}, ValueError, r"\(T,\)"),
        ({"t": "now"}, TypeError, "sequence of times"),
        ({"f": 3}, TypeError, "f must be callable"),
        ({"history": 3.0}, TypeError, "history must hold tensors"),
        ({"history": torch.ones(2, dtype=torch.int64)}, TypeError, "history has dtype"),
        ({"history": lambda t: torch.ones(2) if t >= 0 else torch.ones(3)}, ValueError, "history must return"),
        ({"f": lambda t, y, d: d[0][:1]}, ValueError, "shape"),
        ({"t": (1e5, 1e5 + 2), "lags": (0.4,)}, ValueError, "for times up to 100002, .* Measure times from"),
        ({"in_dims": 0}, ValueError, "batch_dims=0"),
        ({"in_dims": (0, None), "batch_dims": 1}, ValueError, "2 entries, but f gets 0 args"),
        ({"solver": "dopri5"}, TypeError, "solver must be"),
        ({"adjoint": im.ImplicitAdjoint()}, TypeError, "adjoint must be"),
        ({"on_failure": "panic"}, ValueError, "on_failure"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else getattr(x, "__name__", ""),
)
def test_bad_input_is_refused_at_the_door(change, error, message):
    given = {"f": fall, "history": torch.ones(2), "t": (0.0, 2.5), "lags": (1.0,)} | change
    with pytest.raises(error, match=message):
        im.ddeint(given.pop("f"), given.pop("history"), given.pop("t"), **given)


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=lambda a: type(a).__name__)
def test_nothing_is_kept_of_a_solve_that_is_done(adjoint):
    """Links refer to earlier ones; a cycle in each would be collected one link at a time."""

    def train():
        a = torch.tensor(1.0, requires_grad=True)
        sol = im.ddeint(lambda t, y, d, a: -a * d[0], torch.ones(3), (0.0, 4.5), a, lags=(1.0,), adjoint=adjoint)
        sol.value.sum().backward()

    counts = []
    for _ in range(3):
        train()
        gc.collect()
        counts.append(len(living_tensors()))
    assert counts[1] == counts[2]
