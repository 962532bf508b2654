"""Symplectic methods: order, the geometry they keep, what they cost, derivatives, and what they refuse."""

from __future__ import annotations

import math
from collections import namedtuple

import pytest
import torch
from torch import func

import implicitly as im
from tests.problems import draw

D = torch.float64
METHODS = [im.Leapfrog, im.Yoshida4, im.BlanesMoan4]
ADJOINTS = [im.RecursiveCheckpointAdjoint(), im.UnrolledAdjoint()]
each_method = pytest.mark.parametrize("method", METHODS)
each_adjoint = pytest.mark.parametrize("adjoint", ADJOINTS, ids=lambda a: type(a).__name__)
Y0 = (draw(3, 2, seed=1), draw(3, 2, seed=2))


def pendulum(t, y):
    q, p = y
    return p, -torch.sin(q)


def energy(y):
    q, p = y
    return p**2 / 2 - torch.cos(q)


def driven(t, y, a=1.0):
    """Both halves depend on time, each coordinate on the other."""
    q, p = y
    velocity = torch.tanh(p) * (1 + 0.5 * torch.cos(3 * t))
    return velocity, -a * torch.sin(q + 0.3 * q.flip(-1)) + 0.3 * torch.sin(2 * t)


# ---------------------------------------------------------------------------------------------- accuracy


@pytest.mark.parametrize("direction", [1, -1])
@each_method
def test_halving_the_steps_shows_the_order_at_the_ends_and_between(method, direction):
    t = direction * torch.linspace(0, 2, 38, dtype=D)
    exact = im.odeint(driven, Y0, t, solver=im.Dopri8(rtol=1e-13, atol=1e-14)).value
    order, ends, between = method(dt=1.0).order, [], []
    for steps in (16, 32, 64):
        value = im.odeint(driven, Y0, t, solver=method(dt=2 / steps)).value
        error = torch.stack([(a - b).abs().flatten(1).amax(1) for a, b in zip(value, exact)]).amax(0)
        ends.append(float(error[-1]))
        between.append(float(error[1:-1].max()))
    assert ends[-1] > 1e-12
    for found in (ends, between):
        assert order - 0.3 < math.log2(found[0] / found[-1]) / 2 < order + 0.5


def test_blanes_and_moan_are_more_accurate_at_equal_cost():
    exact = im.odeint(pendulum, Y0, (0.0, 6.0), solver=im.Dopri8(rtol=1e-13, atol=1e-14)).value
    errors = []
    for solver in (im.BlanesMoan4(dt=0.3), im.Yoshida4(dt=0.15)):
        solution = im.odeint(pendulum, Y0, (0.0, 6.0), solver=solver)
        errors.append(float((solution.value[0][-1] - exact[0][-1]).abs().max()))
    assert errors[0] < errors[1] / 20


@each_method
def test_a_step_calls_f_twice_for_each_drift(method):
    calls = []

    def f(t, y):
        calls.append(1)
        return pendulum(t, y)

    solution = im.odeint(f, Y0, (0.0, 1.0), solver=method(dt=0.1))
    # One call to see what f returns, two to see that it is separable.
    assert solution.evaluations == len(calls) == 3 + 10 * 2 * len(method.splitting.drifts)
    calls.clear()
    few = im.odeint(f, Y0, (0.0, 0.55, 0.57, 1.0), solver=method(dt=0.1))
    assert few.evaluations == len(calls) == solution.evaluations + 2
    torch.testing.assert_close(few.value[0][-1], solution.value[0][-1], rtol=0, atol=0)


# ---------------------------------------------------------------------------------------------- geometry


@each_method
def test_the_energy_error_does_not_grow(method):
    q, p = torch.tensor([0.5, 1.5, 2.5], dtype=D), torch.zeros(3, dtype=D)
    t = torch.linspace(0, 200, 201, dtype=D)
    solution = im.odeint(pendulum, (q, p), t, solver=method(dt=0.25), batch_dims=0)
    error = (energy(solution.value) - energy((q, p))).abs()
    early, late = error[:41].amax(0), error[160:].amax(0)
    assert bool((late < 1.2 * early).all())
    assert float(error.max()) < {2: 0.03, 4: 4e-3}[method.splitting.order]


def test_the_energy_error_of_a_runge_kutta_method_grows():
    q, p = torch.tensor([2.5], dtype=D), torch.zeros(1, dtype=D)
    t = torch.linspace(0, 200, 201, dtype=D)
    solution = im.odeint(pendulum, (q, p), t, solver=im.RK4(dt=0.25))
    error = (energy(solution.value) - energy((q, p))).abs()
    assert float(error[160:].max()) > 3 * float(error[:41].max())


@each_method
def test_the_way_back_ends_where_it_began(method):
    solver = method(dt=2**-5)
    there = im.odeint(driven, Y0, (0.0, 8.0), solver=solver).value
    back = im.odeint(driven, (there[0][-1], there[1][-1]), (8.0, 0.0), solver=solver).value
    assert float((there[0][-1] - Y0[0]).abs().max()) > 0.1
    for end, start in zip(back, Y0):
        torch.testing.assert_close(end[-1], start, rtol=0, atol=1e-12)


@pytest.mark.parametrize("solver", [*(m(dt=0.3) for m in METHODS), im.RK4(dt=0.3)], ids=lambda s: type(s).__name__)
def test_the_flow_is_symplectic(solver):
    """J^T Omega J = Omega for the Jacobian J of the map from the start to the end; not so for Runge-Kutta."""
    dims = 4

    def force(q):
        return -func.grad(lambda q: torch.cos(q).prod() + 0.1 * (q**4).sum())(q)

    def flow(z):
        value = im.odeint(
            lambda t, y: (torch.sinh(y[1]), force(y[0])), z.chunk(2), (0.0, 3.0), solver=solver
        ).value
        return torch.cat([x[-1] for x in value])

    J = func.jacrev(flow)(0.7 * draw(dims, seed=3))
    omega = torch.zeros(dims, dims, dtype=D)
    omega[:2, 2:], omega[2:, :2] = torch.eye(2), -torch.eye(2)
    defect = float((J.T @ omega @ J - omega).abs().max())
    assert defect > 1e-5 if isinstance(solver, im.RK4) else defect < 1e-12


# ------------------------------------------------------------------------------------------ derivatives


@pytest.mark.parametrize("batch_dims", [0, 1])
@each_adjoint
@each_method
def test_gradients_are_finite_differences(method, adjoint, batch_dims):
    t = torch.tensor([0.0, 0.3, 0.45, 0.9], dtype=D, requires_grad=True)
    given = (*(x[:2].clone().requires_grad_() for x in Y0), torch.tensor([0.8], dtype=D, requires_grad=True), t)

    def run(q, p, a, t):
        options = {"solver": method(dt=0.4), "adjoint": adjoint, "batch_dims": batch_dims}
        return im.odeint(driven, (q, p), t, a, **options).value

    assert torch.autograd.gradcheck(run, given, check_forward_ad=True, fast_mode=True)


@each_adjoint
def test_second_derivatives_are_finite_differences(adjoint):
    given = (*(x[:1].clone().requires_grad_() for x in Y0), torch.tensor([0.8], dtype=D, requires_grad=True))
    options = {"solver": im.Leapfrog(dt=0.25), "adjoint": adjoint}
    assert torch.autograd.gradgradcheck(
        lambda q, p, a: im.odeint(driven, (q, p), (0.0, 0.7), a, **options).value, given, fast_mode=True
    )


@each_method
def test_both_adjoints_give_the_gradient_of_the_discrete_solution_over_many_steps(method):
    found = []
    for adjoint in ADJOINTS:
        given = (*(x.clone().requires_grad_() for x in Y0), torch.tensor(0.8, dtype=D, requires_grad=True))
        options = {"solver": method(dt=0.03), "adjoint": adjoint, "batch_dims": 1}
        value = im.odeint(driven, given[:2], torch.linspace(2, -1, 9, dtype=D), given[2], **options).value
        found.append(torch.autograd.grad(value[0].sin().sum() + value[1].cos().sum(), given))
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_vmap_of_a_gradient_is_that_of_each_sample():
    def loss(q, p):
        return im.odeint(pendulum, (q, p), (0.0, 0.6, 1.0), solver=im.Leapfrog(dt=0.1)).value[0].sin().sum()

    mapped = func.vmap(func.grad(loss))(*Y0)
    alone = torch.stack([func.grad(loss)(q, p) for q, p in zip(*Y0)])
    torch.testing.assert_close(mapped, alone, rtol=1e-12, atol=1e-13)


# ------------------------------------------------------------------------------- samples, times, dtypes


def test_samples_have_their_own_times():
    t = torch.tensor([[0.0, 0.5, 1.0], [3.0, 2.9, 2.0], [0.0, 0.05, 0.1]], dtype=D)
    together = im.odeint(driven, Y0, t, solver=im.BlanesMoan4(dt=0.1), batch_dims=1)
    assert together.steps.tolist() == [10, 10, 1]
    assert torch.equal(together.t, t[:, -1])
    for i in range(3):
        start = tuple(x[i : i + 1] for x in Y0)
        alone = im.odeint(driven, start, t[i], solver=im.BlanesMoan4(dt=0.1), batch_dims=1)
        for a, b in zip(alone.value, together.value):
            torch.testing.assert_close(a[:, 0], b[:, i], rtol=0, atol=1e-13)


def test_the_last_time_is_reached_exactly_and_dtypes_are_kept():
    y0 = tuple(x.float() for x in Y0)
    solution = im.odeint(pendulum, y0, torch.linspace(1000, 1000.75, 4), solver=im.Leapfrog(dt=0.1))
    assert float(solution.t) == 1000.75
    assert int(solution.steps) == 8
    assert all(x.dtype == torch.float32 and x.shape == (4, 3, 2) for x in solution.value)


def test_the_pair_may_be_a_list_or_a_named_tuple_and_q_complex():
    State = namedtuple("State", ["q", "p"])
    value = im.odeint(
        lambda t, y: State(*pendulum(t, y)), State(*Y0), (0.0, 1.0), solver=im.Leapfrog(dt=0.1)
    ).value
    assert isinstance(value, State)
    value_of_list = im.odeint(
        lambda t, y: list(pendulum(t, y)), list(Y0), (0.0, 1.0), solver=im.Leapfrog(dt=0.1)
    ).value
    torch.testing.assert_close(value_of_list[0], value.q)
    ones = torch.ones(2, dtype=torch.complex128)
    q, _ = im.odeint(
        lambda t, y: (y[1], -y[0]), (ones, 1j * ones), (0.0, math.pi), solver=im.Yoshida4(dt=0.1)
    ).value
    torch.testing.assert_close(q[-1], -ones, rtol=0, atol=1e-4)


# ----------------------------------------------------------------------------------------------- bad input


def test_states_that_are_no_pair_are_refused():
    solver, q = im.Leapfrog(dt=0.1), torch.ones(4, dtype=D)
    for y0, held in (
        (q, "a tensor"),
        ((q, q, q), "a tuple of 3 tensors"),
        ((q,), "a tuple of 1 tensors"),
        ({"q": q, "p": q}, "a dict of 2 tensors"),
    ):
        with pytest.raises(
            TypeError, match=rf"Leapfrog: the state must be a pair \(q, p\) of tensors, got {held};"
        ):
            im.odeint(lambda t, y: y, y0, (0.0, 1.0), solver=solver)
    with pytest.raises(ValueError, match=r"same shape and dtype, got \(4,\) and \(2,\)"):
        im.odeint(lambda t, y: y, (q, q[:2]), (0.0, 1.0), solver=solver)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fields_that_are_not_separable_are_refused(dtype):
    y0 = tuple(x.to(dtype) for x in Y0)
    solver = im.Yoshida4(dt=0.1)
    with pytest.raises(ValueError, match=r"Yoshida4 needs a separable field.*dq/dt changed by .* when q did"):
        im.odeint(lambda t, y: (y[1] * (1 + 0.1 * y[0] ** 2), -y[0]), y0, (0.0, 1.0), solver=solver)
    with pytest.raises(ValueError, match=r"dp/dt changed by .* when p did"):
        im.odeint(lambda t, y: (y[1], -y[0] - 0.01 * y[1]), y0, (0.0, 1.0), solver=solver, batch_dims=1)
    with pytest.raises(ValueError, match=r"dp/dt changed by .* when p did"):
        func.vmap(
            lambda q, p: (
                im.odeint(lambda t, y: (y[1], -y[0] - 0.01 * y[1]), (q, p), (0.0, 1.0), solver=solver).value
            )
        )(*y0)


def test_steps_must_be_given():
    with pytest.raises(ValueError, match=r"pass Leapfrog\(dt=...\)"):
        im.Leapfrog()


def test_a_sample_that_meets_nan_ends_alone():
    def f(t, y):
        q, p = y
        return p, torch.where((t > 0.5) & (q > 0), float("nan"), -q)

    q = torch.tensor([[1.0], [-1.0]], dtype=D, requires_grad=True)
    options = {"solver": im.Leapfrog(dt=0.01), "batch_dims": 1, "on_failure": "ignore"}
    solution = im.odeint(f, (q, torch.zeros(2, 1, dtype=D)), (0.0, 1.0), **options)
    assert solution.status.tolist() == [im.Status.NON_FINITE, im.Status.CONVERGED]
    (gradient,) = torch.autograd.grad(solution.value[0][-1].sum(), q)
    torch.testing.assert_close(gradient, torch.tensor([[0.0], [math.cos(1)]], dtype=D), rtol=1e-4, atol=0)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.__name__)
def test_the_continuous_adjoint_keeps_the_order(method):
    """The pair that is solved backwards, (q, dL/dp) and (p, dL/dq), is separable, too."""
    order = method(dt=1.0).order
    q = torch.tensor([0.7], dtype=D, requires_grad=True)

    def error(steps):
        adjoint = im.BacksolveAdjoint(check=float("inf"))
        options = {"solver": method(dt=1 / steps), "adjoint": adjoint}
        value = im.odeint(lambda t, y: (y[1], -y[0]), (q, torch.zeros_like(q)), (0.0, 1.0), **options).value
        return abs(float(torch.autograd.grad(value[1][-1], q)[0]) + math.sin(1.0))

    assert math.log2(error(4) / error(16)) / 2 > order - 0.3


def test_the_continuous_adjoint_by_a_symplectic_method_needs_a_pair_too():
    y0 = torch.ones(2, 2, dtype=D, requires_grad=True)
    with pytest.raises(TypeError, match="must be a pair"):
        im.odeint(lambda t, y: -y, y0, (0.0, 1.0), adjoint=im.BacksolveAdjoint(solver=im.Leapfrog(dt=0.1)))
    adjoint = im.BacksolveAdjoint(seminorm=False)
    with pytest.raises(ValueError, match="seminorm=True"):
        im.odeint(lambda t, y: (y[1], -y[0]), (y0, y0), (0.0, 1.0), solver=im.Leapfrog(dt=0.1), adjoint=adjoint)
