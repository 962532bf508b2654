"""`BacksolveAdjoint`: against exact gradients and the exact discrete ones; stability; memory; what it refuses."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import func, nn

import implicitly as im
from implicitly.ode.augmented import Packed, augmented
from implicitly.ode.problem import Field
from implicitly.viz import saved_bytes
from tests.problems import Watched, draw, matrix

D = torch.float64
TIGHT = im.Dopri5(rtol=1e-10, atol=1e-12)
METHODS = [TIGHT, im.Dopri8(rtol=1e-11, atol=1e-13), im.Bosh3(rtol=1e-8, atol=1e-10), im.RK4(dt=0.01)]
BACK = [im.BacksolveAdjoint(), im.BacksolveAdjoint(seminorm=False)]
W = matrix(3, 0.8, 1)
Y0 = draw(4, 3, seed=2)
TIMES = {
    "ends": torch.tensor([0.0, 1.0], dtype=D),
    "many": torch.tensor([0.0, 0.1, 0.13, 0.7, 1.1], dtype=D),
    "backwards": torch.tensor([1.0, 0.4, -0.5], dtype=D),
}
both_norms = pytest.mark.parametrize("adjoint", BACK, ids=["seminorm", "norm"])
both_dims = pytest.mark.parametrize("batch_dims", [0, 1])


def field(t, y, W):
    return torch.tanh(y @ W + t)


def compare(run, inputs, solver=TIGHT, adjoint=BACK[0], rtol=1e-6, atol=1e-8):
    """The gradients of `run(adjoint)` by `inputs`, with `adjoint` and with the exact discrete one."""
    found = torch.autograd.grad(run(solver, adjoint), inputs)
    exact = torch.autograd.grad(run(solver, im.RecursiveCheckpointAdjoint()), inputs)
    for a, b in zip(found, exact):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)
    return found


# ------------------------------------------------------------------------------------------------ gradients


# Every pair of a norm, a method, times and a number of batch dimensions.
ROWS = [
    pytest.param(*row, (i + j + k) % 2, id="-".join((name, type(row[1]).__name__, row[2])))
    for i, name in enumerate(("seminorm", "norm"))
    for j, solver in enumerate(METHODS)
    for k, times in enumerate(TIMES)
    for row in [(BACK[i], solver, times)]
]


@pytest.mark.parametrize(("adjoint", "solver", "times", "batch_dims"), ROWS)
def test_gradients_to_start_times_and_args_are_those_of_the_checkpointed_adjoint(
    adjoint, solver, times, batch_dims
):
    given = [x.clone().requires_grad_() for x in (Y0, TIMES[times], W)]
    weights = draw(len(TIMES[times]), 4, 3, seed=3)

    def run(solver, adjoint):
        value = im.odeint(field, *given, solver=solver, adjoint=adjoint, batch_dims=batch_dims).value
        return (value * weights).sum()

    compare(run, given, solver, adjoint)


@both_dims
@both_norms
def test_gradients_are_exact_where_the_solution_is_known(adjoint, batch_dims):
    """y' = a y + sin(t), by y0, both times and a."""
    given = [
        torch.tensor([[0.7], [-0.2]], dtype=D),
        torch.tensor([0.3, 1.4], dtype=D),
        torch.tensor(-0.6, dtype=D),
    ]
    y0, t, a = (x.requires_grad_() for x in given)
    solver = im.Dopri8(rtol=1e-11, atol=1e-13)
    f = lambda t, y, a: a * y + torch.sin(t)  # noqa: E731
    found = im.odeint(f, y0, t, a, solver=solver, adjoint=adjoint, batch_dims=batch_dims).value[-1]
    particular = lambda t: -(a * torch.sin(t) + torch.cos(t)) / (1 + a**2)  # noqa: E731
    exact = torch.exp(a * (t[1] - t[0])) * (y0 - particular(t[0])) + particular(t[1])
    torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-11)
    expected = torch.autograd.grad(exact.sin().sum(), (y0, t, a))
    for x, y in zip(torch.autograd.grad(found.sin().sum(), (y0, t, a)), expected):
        torch.testing.assert_close(x, y, rtol=1e-8, atol=1e-10)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 5, dtype=D)
        self.outer = nn.Linear(5, 3, dtype=D)
        self.unused = nn.Linear(2, 2, dtype=D)

    def forward(self, t, y):
        return self.outer(torch.tanh(self.inner(y)))


@both_dims
@both_norms
def test_parameters_of_modules_get_their_gradients(adjoint, batch_dims):
    torch.manual_seed(0)
    net = Net()
    used = [*net.inner.parameters(), *net.outer.parameters()]

    def run(solver, adjoint):
        value = im.odeint(net, Y0, (0.0, 0.4, 1.0), solver=solver, adjoint=adjoint, batch_dims=batch_dims).value
        return value.square().sum()

    compare(run, used, adjoint=adjoint)
    run(TIGHT, adjoint).backward()
    assert all(p.grad is not None and p.grad.any() for p in used)


def test_a_hook_on_a_parameter_sees_one_gradient():
    net, seen = Net(), []
    net.inner.weight.register_hook(lambda g: seen.append(g.clone()))
    im.odeint(net, Y0, (0.0, 1.0), adjoint=BACK[0]).value.sum().backward()
    assert len(seen) == 1


@pytest.mark.parametrize("adjoint", [*BACK, im.RecursiveCheckpointAdjoint()], ids=lambda a: str(a)[:12])
def test_an_argument_computed_from_another_counts_once(adjoint):
    """y' = (a + b) y with b = 2 a, so dy/da = 3 y."""
    a = torch.tensor(0.3, dtype=D, requires_grad=True)
    y0 = torch.ones(1, dtype=D)
    value = im.odeint(
        lambda t, y, a, b: (a + b) * y, y0, (0.0, 1.0), a, 2 * a, solver=TIGHT, adjoint=adjoint
    ).value
    (gradient,) = torch.autograd.grad(value[-1].sum(), a)
    assert math.isclose(float(gradient), 3 * math.exp(0.9), rel_tol=1e-8)


@both_norms
def test_samples_of_different_speeds_weigh_their_own_steps(adjoint):
    """Steps that only some accept, and samples that end early, count for their own samples in shared gradients."""
    rate = torch.tensor([[0.1], [30.0], [2.0], [5.0]], dtype=D, requires_grad=True)
    shared = torch.tensor(0.5, dtype=D, requires_grad=True)

    def run(in_dims):
        def solve(solver, adjoint):
            f = lambda t, y, rate, c: torch.sin(rate * t) * y - c * y**2  # noqa: E731
            value = im.odeint(
                f, Y0[:, :1].abs(), (0.0, 1.0, 2.0), rate, shared,
                solver=solver, adjoint=adjoint, batch_dims=1, in_dims=in_dims,
            ).value  # fmt: skip
            return value.sin().sum()

        return solve

    for in_dims in (None, (0, None)):
        compare(run(in_dims), (rate, shared), im.Dopri5(rtol=1e-9, atol=1e-11), adjoint)


def test_each_sample_may_have_times_of_its_own():
    t = torch.tensor([[0.0, 0.4, 1.0], [0.5, 0.7, 3.0], [1.0, 0.5, -1.0], [0.0, 0.1, 0.2]], dtype=D)
    given = [x.clone().requires_grad_() for x in (Y0, t, W)]

    def run(solver, adjoint):
        value = im.odeint(field, *given, solver=solver, adjoint=adjoint, batch_dims=1).value
        return value.sin().sum()

    compare(run, given)
    with pytest.raises(ValueError, match="cannot have different times"):
        run(TIGHT, BACK[1])


@both_dims
@both_norms
def test_states_may_be_pytrees_and_complex(adjoint, batch_dims):
    c = torch.tensor(0.3 + 0.2j, dtype=torch.complex128, requires_grad=True)
    y0 = {
        "z": torch.complex(draw(2, 2, seed=5), draw(2, 2, seed=6)).requires_grad_(),
        "x": (draw(2, 3, seed=7).requires_grad_(),),
    }

    def f(t, y, c):
        return {
            "z": 1j * y["z"] * c * y["x"][0][..., :1],
            "x": (-y["x"][0] * y["z"].abs().sum(-1, True) * c.real,),
        }

    def run(solver, adjoint):
        value = im.odeint(f, y0, (0.0, 0.5, 1.0), c, solver=solver, adjoint=adjoint, batch_dims=batch_dims).value
        return value["z"].abs().sum() + value["x"][0].sin().sum() + value["z"].real.sum()

    compare(run, (c, y0["z"], y0["x"][0]), adjoint=adjoint)


@both_norms
def test_the_accuracy_is_that_of_the_backward_solver_whatever_the_scale_of_the_loss(adjoint):
    given = (Y0.clone().requires_grad_(), W.clone().requires_grad_())

    def gradient(solver, adjoint, scale=1.0):
        value = im.odeint(field, given[0], (0.0, 2.0), given[1], solver=solver, adjoint=adjoint).value[-1]
        return torch.cat([g.flatten() / scale for g in torch.autograd.grad(scale * value.sin().sum(), given)])

    exact = gradient(TIGHT, im.RecursiveCheckpointAdjoint())
    errors = [
        float(
            (
                gradient(TIGHT, im.BacksolveAdjoint(im.Dopri5(rtol=rtol, atol=rtol), adjoint.seminorm)) - exact
            ).norm()
        )
        for rtol in (1e-3, 1e-5, 1e-7)
    ]
    assert errors[2] < 1e-6
    assert errors[0] > 3 * errors[1] > 9 * errors[2]
    loose = im.BacksolveAdjoint(im.Dopri5(rtol=1e-5, atol=1e-5), adjoint.seminorm)
    torch.testing.assert_close(gradient(TIGHT, loose, 2.0**-30), gradient(TIGHT, loose), rtol=1e-12, atol=0)


@pytest.mark.parametrize("shape", [(2,), (2, 1)])
@pytest.mark.parametrize("solver", [im.Kvaerno3(rtol=1e-7, atol=1e-9), im.Dopri5(rtol=1e-8, atol=1e-10)])
def test_an_odd_number_of_gradients_beside_complex_states(shape, solver):
    """Where those take part in the control of the error, they lie beside the states in one row."""
    y0 = torch.tensor([0.5 + 1.0j, -1.0 + 0.2j], dtype=torch.complex128).reshape(shape).requires_grad_()
    rate = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    options = {"solver": solver, "adjoint": im.BacksolveAdjoint(seminorm=False), "batch_dims": len(shape) - 1}
    end = im.odeint(lambda t, y, rate: (0.3j - rate) * y, y0, (0.0, 1.0), rate, **options).value[-1]
    found = torch.autograd.grad(end.real.sum(), (y0, rate))
    wanted = torch.autograd.grad((y0 * torch.exp(0.3j - rate)).real.sum(), (y0, rate))
    for gradient, exact in zip(found, wanted):
        torch.testing.assert_close(gradient, exact, rtol=1e-5, atol=1e-6)


def test_tolerances_may_be_tensors_and_the_norm_any():
    given = (Y0.clone().requires_grad_(), W.clone().requires_grad_())
    atol = torch.tensor([1e-10, 1e-11, 1e-12], dtype=D)
    solver = im.Dopri5(rtol=1e-9, atol=atol, norm=lambda rows: rows.abs().amax(1))

    def run(solver, adjoint):
        return im.odeint(
            field, given[0], (0.0, 1.0), given[1], solver=solver, adjoint=adjoint, batch_dims=1
        ).value.sum()

    for adjoint in BACK:
        compare(run, given, solver, adjoint)


@both_dims
@pytest.mark.parametrize("kind", [im.Midpoint, im.Bosh3, im.RK4, im.Dopri5], ids=lambda k: k.__name__)
def test_the_integrals_are_of_the_order_of_the_method(kind, batch_dims):
    """Those of one system, by the weights of the method, and those of a batch, by Gauss' rule."""
    given = W.clone().requires_grad_()

    def gradient(backward):
        adjoint = im.BacksolveAdjoint(solver=backward, check=float("inf"))
        given_as = {"solver": TIGHT, "adjoint": adjoint, "batch_dims": batch_dims}
        end = im.odeint(field, Y0, (0.0, 2.0), given, **given_as).value[-1]
        return torch.autograd.grad(end.sin().sum(), given)[0]

    exact = gradient(im.Dopri8(rtol=1e-12, atol=1e-13))
    coarse, fine = (float((gradient(kind(dt=dt)) - exact).norm()) for dt in (0.2, 0.1))
    assert math.log2(coarse / fine) > kind(dt=0.1).order - 0.35
    assert fine > 1e-9  # it is not rounding that is measured


def test_the_seminorm_takes_fewer_calls():
    """A parameter whose gradient alone is hard to integrate."""
    c = torch.zeros(1, dtype=D, requires_grad=True)
    calls = []

    def f(t, y, c):
        calls.append(1)
        return -y + c * torch.sin(60 * t)

    counts = {}
    for adjoint in BACK:
        value = im.odeint(f, torch.ones(1, dtype=D), (0.0, 3.0), c, adjoint=adjoint).value
        calls.clear()
        torch.autograd.grad(value[-1].sum(), c)
        counts[adjoint.seminorm] = len(calls)
    assert counts[True] < counts[False] / 2


def test_the_augmented_system_is_differentiable_for_implicit_methods():

    def plain(W):
        return Field(torch.unbind, lambda t, y: torch.tanh(y @ W), plain, (W,))

    finished = torch.ones(4, dtype=torch.bool)
    for columns, count in ((None, 6), (9, 33)):
        F = augmented(plain, Packed(4, 3, columns), [0], finished, W.clone())
        z = draw(4 if columns is None else 1, count, seed=9)
        moment = torch.zeros(())
        with torch.no_grad():
            value = F(moment, z)
            h, direction = 1e-6, draw(*z.shape, seed=10)
            numeric = (F(moment, z + h * direction) - F(moment, z - h * direction)) / (2 * h)
        tangent = func.jvp(lambda z: F(moment, z), (z,), (direction,))
        torch.testing.assert_close(tangent[0], value)
        torch.testing.assert_close(tangent[1], numeric, rtol=1e-6, atol=1e-8)


# ------------------------------------------------------------------------------------------------ stability


@pytest.mark.parametrize("adjoint", BACK, ids=["seminorm", "norm"])
def test_an_unstable_reverse_system_is_told_of_and_checkpointed(adjoint):
    """y' = -50 y over [0, 5]: backwards, an error grows by exp(250)."""
    given = [
        torch.tensor([1.0, 2.0], dtype=D, requires_grad=True),
        torch.tensor(50.0, dtype=D, requires_grad=True),
    ]

    def run(adjoint):
        value = im.odeint(
            lambda t, y, r: -r * (y - torch.cos(t)), given[0], (0.0, 5.0), given[1], adjoint=adjoint
        ).value
        return torch.autograd.grad(value[-1].sum(), given)

    with pytest.warns(im.ConvergenceWarning, match=r"(?s)Sample 0.*RecursiveCheckpointAdjoint"):
        found = run(adjoint)
    for a, b in zip(found, run(im.RecursiveCheckpointAdjoint(arc_length=True))):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_the_warning_says_how_far_off_which_sample_is():
    y0 = torch.tensor([[1.0], [1.0]], dtype=D, requires_grad=True)
    rate = torch.tensor([[1.0], [12.0]], dtype=D)
    f = lambda t, y, r: -r * (y - torch.sin(t))  # noqa: E731
    run = lambda check: im.odeint(  # noqa: E731
        f, y0, (0.0, 2.0), rate, batch_dims=1, adjoint=im.BacksolveAdjoint(check=check)
    ).value[-1].sum()  # fmt: skip
    with pytest.warns(
        im.ConvergenceWarning, match=r"misses output 0 for 1 of 2 samples. Sample 1 .*check=1000"
    ) as seen:
        run(1e3).backward()
    assert len(seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(float("inf")).backward()


def test_outputs_between_keep_the_reverse_system_stable():
    y0 = torch.tensor([1.0], dtype=D, requires_grad=True)
    solver = im.Dopri5(rtol=1e-7, atol=1e-9)
    f = lambda t, y: -10 * (y - torch.sin(t))  # noqa: E731
    few = im.odeint(f, y0, (0.0, 3.0), solver=solver, adjoint=BACK[0]).value[-1]
    with pytest.warns(im.ConvergenceWarning, match="unstable"):
        few.sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        value = im.odeint(f, y0, torch.linspace(0, 3, 31, dtype=D), solver=solver, adjoint=BACK[0]).value
        (gradient,) = torch.autograd.grad(value.sum(), y0)
    exact = torch.exp(-10 * torch.linspace(0, 3, 31, dtype=D)).sum()
    torch.testing.assert_close(gradient, exact.reshape(1), rtol=1e-5, atol=0)


def test_a_backward_solve_that_takes_too_long_is_stopped():
    calls = []

    def f(t, y, r):
        calls.append(1)
        return -r * y**3

    y0 = torch.ones(1, dtype=D, requires_grad=True)
    rate = torch.tensor(1.0, dtype=D, requires_grad=True)
    adjoint = im.BacksolveAdjoint(im.Euler(dt=1e-3, max_steps=20))
    value = im.odeint(f, y0, (0.0, 1.0), rate, solver=TIGHT, adjoint=adjoint).value[-1]
    calls.clear()
    with pytest.warns(im.ConvergenceWarning, match="MAX_STEPS .*at most 20"):
        (gradient,) = torch.autograd.grad(value.sum(), y0)
    assert math.isclose(float(gradient), 3**-1.5, rel_tol=1e-8)  # y = (1 / y0^2 + 2 t)^(-1/2)
    assert len(calls) < 1000  # as many as it would have taken backwards


@both_dims
def test_a_state_that_blows_up_backwards_is_checkpointed(batch_dims):
    """Backwards, y' = y - y^3 leaves [-1, 1] and reaches infinity in finite time, from errors alone."""
    y0 = torch.tensor([[3.0], [-2.0]], dtype=D, requires_grad=True)
    run = lambda adjoint: im.odeint(  # noqa: E731
        lambda t, y: y - y**3, y0, (0.0, 12.0), adjoint=adjoint, batch_dims=batch_dims
    ).value[-1].sum()  # fmt: skip
    with pytest.warns(im.ConvergenceWarning):
        (found,) = torch.autograd.grad(run(BACK[0]), y0)
    (exact,) = torch.autograd.grad(run(im.RecursiveCheckpointAdjoint(arc_length=True)), y0)
    torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-300)


# --------------------------------------------------------------------------------------- failures, memory


@both_norms
def test_a_failed_sample_has_zero_gradient_and_spoils_no_other(adjoint):
    def f(t, y, a):
        return torch.where((t > 0.5) & (y > 0), float("nan"), a * y)

    a = torch.tensor(-1.0, dtype=D, requires_grad=True)
    for first in (1.0, float("nan")):
        y0 = torch.tensor([[first], [-1.0]], dtype=D, requires_grad=True)
        t = torch.tensor([0.0, 0.2, 1.0], dtype=D, requires_grad=True)
        solution = im.odeint(f, y0, t, a, solver=TIGHT, adjoint=adjoint, batch_dims=1, on_failure="ignore")
        assert solution.status.tolist() == [im.Status.NON_FINITE, im.Status.CONVERGED]
        found = torch.autograd.grad(solution.value[-1].sum(), (y0, a, t))
        e = math.exp(-1)
        torch.testing.assert_close(found[0], torch.tensor([[0.0], [e]], dtype=D), rtol=1e-7, atol=0)
        torch.testing.assert_close(found[1], torch.tensor(-e, dtype=D), rtol=1e-7, atol=0)
        torch.testing.assert_close(found[2], torch.tensor([-e, 0.0, e], dtype=D), rtol=1e-7, atol=1e-12)


@both_norms
def test_a_sample_that_f_cannot_be_asked_for_is_left_out(adjoint):
    """Of which there is no derivative even at the start."""
    rate = torch.tensor([[1.0], [4.0], [2.0], [3.0]], dtype=D, requires_grad=True)
    y0 = torch.tensor([[1.0], [1.0], [-1.0], [0.5]], dtype=D, requires_grad=True)
    shared = torch.tensor(0.5, dtype=D, requires_grad=True)

    def f(t, y, rate, shared):
        return -rate * (y - shared * torch.cos(t)) + 0 * torch.log(y + 0.6)

    options = {"solver": TIGHT, "batch_dims": 1, "in_dims": (0, None)}
    t = torch.linspace(0, 1, 4, dtype=D)
    good = [0, 1, 3]
    solution = im.odeint(f, y0, t, rate, shared, on_failure="ignore", adjoint=adjoint, **options)
    assert solution.status.tolist() == [0, 0, im.Status.NON_FINITE, 0]
    found = torch.autograd.grad(solution.value[1:, good].sin().sum(), (y0, rate, shared))
    assert float(found[0][2]) == float(found[1][2]) == 0
    few = [y0.detach()[good].requires_grad_(), rate.detach()[good].requires_grad_()]
    alone = im.odeint(f, few[0], t, few[1], shared, **options).value[1:].sin().sum()
    expected = torch.autograd.grad(alone, (*few, shared))
    for x, y in zip((found[0][good], found[1][good], found[2]), expected):
        torch.testing.assert_close(x, y, rtol=1e-7, atol=1e-9)


def test_when_all_samples_failed_all_gradients_are_zero():
    y0 = torch.tensor([[float("nan")]], dtype=D, requires_grad=True)
    a = torch.ones(1, dtype=D, requires_grad=True)
    for in_dims in (None, (None,)):
        value = im.odeint(
            lambda t, y, a: a * y, y0, (0.0, 1.0), a,
            adjoint=BACK[0], batch_dims=1, on_failure="ignore", in_dims=in_dims,
        ).value  # fmt: skip
        assert [g.tolist() for g in torch.autograd.grad(value.sum(), (y0, a))] == [[[0.0]], [0.0]]


def test_memory_is_that_of_the_outputs_however_many_the_steps():
    y0 = torch.ones(1000, dtype=D, requires_grad=True)

    def solve(steps):
        return im.odeint(lambda t, y: -y, y0, (0.0, 1.0), solver=im.Midpoint(dt=1 / steps), adjoint=BACK[0]).value

    sizes = {steps: saved_bytes(lambda steps=steps: solve(steps)) for steps in (10, 1000)}
    assert sizes[10] == sizes[1000]
    node = solve(1000).grad_fn
    while not hasattr(node, "work"):
        node = node.next_functions[0][0]
    assert node.work.record is None


def test_two_backward_passes_and_interpolation():
    given = [x.clone().requires_grad_() for x in (Y0, W)]
    solution = im.odeint(field, given[0], (0.0, 1.0), given[1], solver=TIGHT, adjoint=BACK[0])
    loss = solution.value.sum()
    once = torch.autograd.grad(loss, given, retain_graph=True)
    for a, b in zip(once, torch.autograd.grad(loss, given)):
        torch.testing.assert_close(a, b, rtol=0, atol=0)

    def run(solver, adjoint):
        solution = im.odeint(field, given[0], (0.0, 1.0), given[1], solver=solver, adjoint=adjoint)
        return solution.interpolate((0.2, 0.7)).sum()

    compare(run, given)


def test_without_anything_to_differentiate_nothing_is_kept():
    assert not im.odeint(lambda t, y: -y, torch.ones(3, dtype=D), (0.0, 1.0), adjoint=BACK[0]).value.requires_grad


# ------------------------------------------------------------------------------------------------- refusals


def test_second_derivatives_are_refused_and_first_ones_may_be_recorded():
    given = [x.clone().requires_grad_() for x in (Y0, W)]
    value = im.odeint(field, given[0], (0.0, 1.0), given[1], solver=TIGHT, adjoint=BACK[0]).value
    first = torch.autograd.grad(value.sum(), given, create_graph=True)
    plain = torch.autograd.grad(im.odeint(field, given[0], (0.0, 1.0), given[1], solver=TIGHT).value.sum(), given)
    for a, b in zip(first, plain):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)
    for gradient in first:
        with pytest.raises(NotImplementedError, match="RecursiveCheckpointAdjoint"):
            torch.autograd.grad(gradient.sum(), given, retain_graph=True)


@pytest.mark.parametrize("transform", [func.grad, func.vmap, func.jacrev, func.jacfwd, func.hessian])
def test_transforms_are_refused(transform):
    def run(y):
        return im.odeint(lambda t, y: -y, y, (0.0, 1.0), adjoint=BACK[0]).value[-1].sum()

    with pytest.raises(NotImplementedError, match="RecursiveCheckpointAdjoint"):
        transform(run)(torch.ones(3, 2, dtype=D))


def test_forward_mode_is_refused():
    y0 = torch.ones(3, dtype=D)
    run = lambda y: im.odeint(lambda t, y: -y, y, (0.0, 1.0), adjoint=BACK[0]).value  # noqa: E731
    with pytest.raises(NotImplementedError, match="forward mode"), torch.autograd.forward_ad.dual_level():
        run(torch.autograd.forward_ad.make_dual(y0, y0))
    with pytest.raises(NotImplementedError, match=r"torch\.func"):
        func.jvp(run, (y0,), (y0,))


def test_options_that_cannot_be_meant_are_refused():
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"solver": "dopri5"}, "solver must be a method"),
        ({"seminorm": 1}, "seminorm must be True or False"),
    ]
    for options, message in wrong:
        with pytest.raises(TypeError, match=message):
            im.BacksolveAdjoint(**options)
    for check in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="check must be > 0"):
            im.BacksolveAdjoint(check=check)
    with pytest.raises(ValueError, match="cannot resolve"):
        im.odeint(lambda t, y: -y, torch.ones(1), (0.0, 1.0), adjoint=im.BacksolveAdjoint(im.Dopri5(rtol=1e-12)))


def test_samples_that_end_early_begin_the_next_stretch_with_steps_of_their_own():
    class Field(torch.nn.Module):
        calls = 0

        def forward(self, t, y, w):
            self.calls += 1
            return torch.tanh(y) * w

    f, y0, w = Field(), torch.randn(4, 2, dtype=D), torch.tensor([[1.0], [3.0], [-10.0], [5.0]], dtype=D)
    counts = []
    for in_dims in (None, 0):  # all are stepped on until the last has ended, or those that ended are left out
        inputs = [x.clone().requires_grad_() for x in (y0, w)]
        adjoint = im.BacksolveAdjoint(check=float("inf"))
        t = torch.linspace(0, 1, 5, dtype=D)
        options = {"solver": im.Dopri5(rtol=1e-4, atol=1e-4), "batch_dims": 1, "adjoint": adjoint}
        value = im.odeint(f, inputs[0], t, inputs[1], in_dims=in_dims, **options).value
        f.calls = 0
        value.sum().backward()
        counts.append(f.calls)
    assert counts[0] == counts[1]


@pytest.mark.parametrize(("method", "weigh"), [(im.Dopri5, 5), (im.RK4, 4), (im.Bosh3, 3)])
def test_of_slopes_that_weigh_nothing_no_gradients_by_theta_are_found(method, weigh):
    notes: list[int] = []
    calls: list[int] = []
    own, y0 = W.clone().requires_grad_(), Y0[0]

    def f(t, y, W):
        calls.append(1)
        return torch.tanh(Watched.apply(W, notes) @ y)

    steps = 4
    solver = method(dt=1 / steps)
    value = im.odeint(f, y0, (0.0, 1.0), own, solver=solver, adjoint=im.BacksolveAdjoint(check=1e6)).value[-1]
    calls.clear(), notes.clear()
    (found,) = torch.autograd.grad(value.sum(), own)
    assert len(notes) == weigh * steps < len(calls)
    value = im.odeint(f, y0, (0.0, 1.0), own, solver=im.Dopri8(rtol=1e-12, atol=1e-12)).value[-1]
    torch.testing.assert_close(found, torch.autograd.grad(value.sum(), own)[0], rtol=1e-2, atol=1e-3)
