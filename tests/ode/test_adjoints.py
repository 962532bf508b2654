"""Derivatives of trajectories: against finite differences, unrolling, each other; any order; memory."""

from __future__ import annotations

import math

import pytest
import torch
from torch import func, nn

import implicitly as im
from implicitly.ode import work
from implicitly.ode.adjoints import _Trajectory
from implicitly.ode.work import _at_once
from tests.problems import draw, matrix

D = torch.float64
ADJOINTS = [im.RecursiveCheckpointAdjoint(), im.UnrolledAdjoint()]
METHODS = [im.Dopri5(rtol=1e-9, atol=1e-11), im.Dopri8(rtol=1e-9, atol=1e-11), im.RK4(dt=0.05), im.Heun(dt=0.1)]
W = matrix(3, 0.8, 1)
Y0 = draw(4, 3, seed=2)
TIMES = {
    "ends": torch.tensor([0.0, 1.0], dtype=D),
    "many": torch.tensor([0.0, 0.1, 0.13, 0.7, 1.1], dtype=D),
    "backwards": torch.tensor([1.0, 0.4, -0.5], dtype=D),
}
MOVING = im.RecursiveCheckpointAdjoint(arc_length=True)
each_adjoint = pytest.mark.parametrize("adjoint", [*ADJOINTS, MOVING], ids=["checkpointed", "unrolled", "moving"])


def field(t, y, W):
    return torch.tanh(y @ W + t)


def inputs(times):
    return Y0.clone().requires_grad_(), TIMES[times].clone().requires_grad_(), W.clone().requires_grad_()


@pytest.mark.parametrize("batch_dims", [0, 1])
@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize("solver", METHODS, ids=lambda s: type(s).__name__)
@each_adjoint
def test_gradients_to_start_times_and_args_are_finite_differences(adjoint, solver, times, batch_dims):
    given = inputs(times)

    def loss(y0, t, W):
        value = im.odeint(field, y0, t, W, solver=solver, adjoint=adjoint, batch_dims=batch_dims).value
        return (value * weights).sum()

    weights = draw(len(TIMES[times]), 4, 3, seed=3)
    gradients = torch.autograd.grad(loss(*given), given)
    h = 1e-5
    for i, gradient in enumerate(gradients):
        direction = draw(*gradient.shape, seed=4 + i)
        ahead, behind = [x.detach() for x in given], [x.detach() for x in given]
        ahead[i], behind[i] = ahead[i] + h * direction, behind[i] - h * direction
        numeric = float(loss(*ahead) - loss(*behind)) / (2 * h)
        # Of times, the discrete and the exact derivative differ by the error of the solution.
        assert math.isclose(float((gradient * direction).sum()), numeric, rel_tol=1e-3 if i == 1 else 1e-4)


@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize("solver", METHODS, ids=lambda s: type(s).__name__)
def test_both_adjoints_give_the_gradient_of_the_discrete_solution(solver, times):
    found = []
    for adjoint in ADJOINTS:
        given = inputs(times)
        value = im.odeint(field, *given, solver=solver, adjoint=adjoint, batch_dims=1).value
        found.append(torch.autograd.grad(value.sin().sum(), given))
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("steps", [1, 31, 33, 200, 1000])
def test_states_forgotten_on_the_way_are_computed_again(steps):
    """Constant steps of a rotation, against autograd through the same steps written out."""
    A = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=D, requires_grad=True)
    y0 = torch.tensor([1.0, 0.3], dtype=D, requires_grad=True)
    solver = im.Midpoint(dt=3 / steps)
    value = im.odeint(lambda t, y, A: A @ y, y0, (0.0, 3.0), A, solver=solver).value[-1]
    y, h = y0, 3 / steps
    for _ in range(steps):
        y = y + h * (A @ (y + h / 2 * (A @ y)))
    torch.testing.assert_close(value, y, rtol=1e-10, atol=0)
    expected = torch.autograd.grad(y.sum(), (y0, A))
    for a, b in zip(torch.autograd.grad(value.sum(), (y0, A)), expected):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("steps", [1, 3, 30, 150])
@pytest.mark.parametrize("adaptive", [False, True])
def test_steps_pulled_back_through_at_once_give_what_each_by_itself_gives(monkeypatch, steps, adaptive):
    given, found = inputs("many"), []
    span = float(TIMES["many"][-1] - TIMES["many"][0])
    method = im.Dopri5(dt_max=1.01 * span / steps, rtol=1e-2) if adaptive else im.RK4(dt=1.01 * span / steps)
    for size in (1, 4, 7):
        calls = []

        def counted(t, y, W, calls=calls):
            calls.append(1)
            return field(t, y, W)

        monkeypatch.setattr(work, "AT_ONCE", size)
        value = im.odeint(counted, given[0], given[1], given[2], solver=method, batch_dims=1).value
        calls.clear()
        found.append((*torch.autograd.grad(value.sin().sum(), given), len(calls)))
    (*each, calls), *others = found
    for *gradients, fewer in others:
        torch.testing.assert_close(gradients, each, rtol=1e-12, atol=1e-13)
        # The states at which 30 steps begin are all kept, of 150 every fourth.
        assert fewer < calls if steps == 150 else fewer == calls
    large = torch.ones(2, 2**13, dtype=D)
    assert (_at_once(Y0), _at_once(large), _at_once(Y0[:0])) == (7, 1, 7)


def test_what_is_kept_grows_with_the_square_root_of_the_steps():
    def kept(steps):
        y0 = torch.ones(1000, dtype=D, requires_grad=True)
        value = im.odeint(lambda t, y: -y, y0, (0.0, 1.0), solver=im.Euler(dt=1 / steps)).value
        node = value.grad_fn
        while not isinstance(node, _Trajectory._backward_cls):
            node = node.next_functions[0][0]
        assert node.saved_tensors[1].shape == (1, steps)
        return len(node.work.record.states)

    counts = {steps: kept(steps) for steps in (10, 100, 1000, 10_000)}
    for steps, count in counts.items():
        assert count <= 3 * math.sqrt(steps) + 33
    assert counts[10_000] <= 10 * counts[100]


def test_without_anything_to_differentiate_nothing_is_kept():
    value = im.odeint(lambda t, y: -y, torch.ones(3, dtype=D), (0.0, 1.0)).value
    assert not value.requires_grad


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 5, dtype=D)
        self.outer = nn.Linear(5, 3, dtype=D)

    def forward(self, t, y):
        return self.outer(torch.tanh(self.inner(y)))


@each_adjoint
def test_parameters_of_modules_get_their_gradients(adjoint):
    torch.manual_seed(0)
    net = Net()
    value = im.odeint(net, Y0, (0.0, 1.0), solver=im.RK4(dt=0.1), adjoint=adjoint).value[-1]
    y = Y0
    for _ in range(10):
        k1 = net(0, y)
        k2 = net(0, y + 0.05 * k1)
        k3 = net(0, y + 0.05 * k2)
        k4 = net(0, y + 0.1 * k3)
        y = y + 0.1 / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    parameters = tuple(net.parameters())
    for a, b in zip(torch.autograd.grad(value.sum(), parameters), torch.autograd.grad(y.sum(), parameters)):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    bound = im.odeint(net.forward, Y0, (0.0, 1.0), solver=im.RK4(dt=0.1), adjoint=adjoint).value[-1]
    bound.sum().backward()
    assert all(p.grad is not None for p in parameters)


def test_a_hook_on_a_parameter_sees_one_gradient():
    net, seen = Net(), []
    net.inner.weight.register_hook(lambda g: seen.append(g.clone()))
    im.odeint(net, Y0, (0.0, 1.0), solver=im.RK4(dt=0.1)).value.sum().backward()
    assert len(seen) == 1
    torch.testing.assert_close(seen[0], net.inner.weight.grad)


def test_two_solves_before_one_backward_and_one_backward_twice():
    given = inputs("many")
    run = lambda: im.odeint(field, *given, solver=im.Dopri5()).value  # noqa: E731
    a, b = run(), run()
    once = torch.autograd.grad(a.sum(), given, retain_graph=True)
    both = torch.autograd.grad(a.sum() + b.sum(), given, retain_graph=True)
    for x, y in zip(once, both):
        torch.testing.assert_close(2 * x, y)
    for x, y in zip(once, torch.autograd.grad(a.sum(), given)):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


# ----------------------------------------------------------------------------------- any order, both modes


@pytest.mark.parametrize("batch_dims", [0, 1])
@each_adjoint
def test_gradcheck_gradgradcheck_and_forward_mode(adjoint, batch_dims):
    t = torch.tensor([0.0, 0.3, 0.8], dtype=D, requires_grad=True)
    options = {"solver": im.RK4(dt=0.25), "adjoint": adjoint, "batch_dims": batch_dims}
    run = lambda y, W, t: im.odeint(field, y, t, W, **options).value  # noqa: E731
    given = (Y0[:2].clone().requires_grad_(), W.clone().requires_grad_(), t)
    assert torch.autograd.gradcheck(run, given, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(run, given)


@each_adjoint
def test_a_third_derivative(adjoint):
    """y' = a y: the third derivative by a of exp(a) y0 is y0 exp(a)."""
    a = torch.tensor(0.5, dtype=D, requires_grad=True)
    y0 = torch.ones(1, dtype=D)
    solver = im.Dopri8(rtol=1e-11, atol=1e-13)
    d = im.odeint(lambda t, y, a: a * y, y0, (0.0, 1.0), a, solver=solver, adjoint=adjoint).value[-1].sum()
    for _ in range(3):
        (d,) = torch.autograd.grad(d, a, create_graph=True)
    assert math.isclose(float(d.detach()), math.exp(0.5), rel_tol=1e-8)


@each_adjoint
def test_transforms_of_torch_func_agree(adjoint):
    y0, t = Y0[0], TIMES["many"]
    options = {"solver": im.Dopri5(rtol=1e-10, atol=1e-12), "adjoint": adjoint}

    def f(y, W):
        return im.odeint(lambda t, y, W: torch.tanh(W @ y + t), y, t, W, **options).value

    reverse = func.jacrev(f)(y0, W)
    torch.testing.assert_close(func.jacfwd(f)(y0, W), reverse, rtol=1e-8, atol=1e-10)
    pushed = func.jvp(lambda y: f(y, W), (y0,), (torch.ones_like(y0),))[1]
    torch.testing.assert_close(pushed, reverse.sum(-1), rtol=1e-8, atol=1e-10)
    single = func.grad(lambda y: f(y, W)[2, 1])(y0)
    torch.testing.assert_close(single, reverse[2, 1], rtol=1e-8, atol=1e-10)
    h = 1e-5
    hessian = func.hessian(lambda y: f(y, W)[-1].sum())(y0)
    slope = lambda y: func.grad(lambda y: f(y, W)[-1].sum())(y)  # noqa: E731
    numeric = torch.stack([(slope(y0 + h * e) - slope(y0 - h * e)) / (2 * h) for e in torch.eye(3, dtype=D)])
    torch.testing.assert_close(hessian, numeric, rtol=1e-5, atol=1e-7)


def test_vmap_maps_states_arguments_and_times():
    t = torch.tensor([[0.0, 0.4, 1.0], [0.0, 0.7, 2.0]], dtype=D)
    Ws = torch.stack([W, -W])
    options = {"solver": im.Dopri5(rtol=1e-9, atol=1e-11)}

    def f(y, t, W):
        return im.odeint(field, y, t, W, **options).value

    for dims in ((0, None, None), (None, 0, None), (None, None, 0), (0, 0, 0)):
        given = [x if d == 0 else x[0] for x, d in zip((Y0[:2], t, Ws), dims)]
        mapped = func.vmap(f, in_dims=dims)(*given)
        for i in range(2):
            alone = f(*(x[i] if d == 0 else x for x, d in zip(given, dims)))
            torch.testing.assert_close(mapped[i], alone, rtol=1e-9, atol=1e-11)
    per_sample = func.vmap(func.grad(lambda y: f(y, t[0], W)[-1].sum()))(Y0)
    whole = Y0.clone().requires_grad_()
    value = im.odeint(field, whole, t[0], W, batch_dims=1, **options).value[-1].sum()
    torch.testing.assert_close(per_sample, torch.autograd.grad(value, whole)[0], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    "solver", [im.Dopri5(rtol=1e-4), im.RK4(dt=0.25), im.Kvaerno3(dt=0.5, rtol=1e-11, atol=1e-13)]
)
def test_unrolled_solves_are_mapped_by_vmap(solver):
    given = Y0[:2]

    def end(y, w):
        adjoint = im.UnrolledAdjoint()
        return im.odeint(field, y, (0.0, 0.4, 1.0), w * W, solver=solver, adjoint=adjoint).value[1:].sin().sum()

    one = torch.tensor(1.0, dtype=D)
    for transformed in (end, func.grad(end), func.grad(end, argnums=1), func.hessian(end)):
        right = torch.stack([transformed(y, one) for y in given])
        torch.testing.assert_close(
            func.vmap(transformed, in_dims=(0, None))(given, one), right, rtol=1e-9, atol=1e-11
        )
    weights = torch.tensor([0.5, 1.5], dtype=D, requires_grad=True)
    found, right = (
        torch.autograd.grad(values.sum(), weights)[0]
        for values in (func.vmap(end)(given, weights), torch.stack([end(y, w) for y, w in zip(given, weights)]))
    )
    torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-11)


# --------------------------------------------------------------------------------------- failed samples


@each_adjoint
def test_a_failed_sample_has_zero_gradient_and_spoils_no_other(adjoint):
    def f(t, y, a):
        return torch.where((t > 0.5) & (y > 0), float("nan"), a * y)

    a = torch.tensor(-1.0, dtype=D, requires_grad=True)
    y0 = torch.tensor([[1.0], [-1.0]], dtype=D, requires_grad=True)
    options = {"solver": im.Dopri5(rtol=1e-8, atol=1e-10), "adjoint": adjoint, "batch_dims": 1}
    with pytest.warns(im.ConvergenceWarning, match="NON_FINITE"):
        solution = im.odeint(f, y0, (0.0, 1.0), a, on_failure="warn", **options)
    gradients = torch.autograd.grad(solution.value[-1].sum(), (y0, a))
    torch.testing.assert_close(gradients[0], torch.tensor([[0.0], [math.exp(-1)]], dtype=D), rtol=1e-5, atol=0)
    torch.testing.assert_close(gradients[1], torch.tensor(-math.exp(-1), dtype=D), rtol=1e-5, atol=0)


@each_adjoint
def test_a_sample_that_starts_at_nan_spoils_no_other(adjoint):
    a = torch.tensor(-1.0, dtype=D, requires_grad=True)
    y0 = torch.tensor([[float("nan")], [1.0]], dtype=D, requires_grad=True)
    options = {"solver": im.Dopri5(rtol=1e-8, atol=1e-10), "adjoint": adjoint, "batch_dims": 1}
    solution = im.odeint(lambda t, y, a: a * y, y0, (0.0, 0.5, 1.0), a, on_failure="ignore", **options)
    assert solution.status.tolist() == [im.Status.NON_FINITE, im.Status.CONVERGED]
    gradients = torch.autograd.grad(solution.value[-1].sum(), (y0, a))
    torch.testing.assert_close(gradients[0], torch.tensor([[0.0], [math.exp(-1)]], dtype=D), rtol=1e-6, atol=0)
    torch.testing.assert_close(gradients[1], torch.tensor(math.exp(-1), dtype=D), rtol=1e-6, atol=0)


@each_adjoint
def test_dropped_samples_have_the_gradient_of_all(adjoint):
    """Also where f cannot be asked for a failed sample at all: its gradient is NaN at the start already."""
    rate = torch.tensor([[1.0], [40.0], [2.0], [3.0]], dtype=D, requires_grad=True)
    y0 = torch.tensor([[1.0], [1.0], [-1.0], [0.5]], dtype=D, requires_grad=True)
    shared = torch.tensor(0.5, dtype=D, requires_grad=True)

    def f(t, y, rate, shared):
        return -rate * (y - shared * torch.cos(t)) + 0 * torch.log(y + 0.6)

    options = {"solver": im.Dopri5(rtol=1e-8, atol=1e-10), "adjoint": adjoint, "batch_dims": 1}
    t = torch.linspace(0, 2, 4, dtype=D)
    solution = im.odeint(f, y0, t, rate, shared, in_dims=(0, None), on_failure="ignore", **options)
    assert solution.status.tolist() == [0, 0, im.Status.NON_FINITE, 0]
    found = torch.autograd.grad(solution.value[1:, [0, 1, 3]].sin().sum(), (y0, rate, shared))
    assert float(found[0][2]) == float(found[1][2]) == 0
    few = [y0.detach()[[0, 1, 3]].requires_grad_(), rate.detach()[[0, 1, 3]].requires_grad_()]
    alone = im.odeint(f, few[0], t, few[1], shared, **options).value[1:].sin().sum()
    expected = torch.autograd.grad(alone, (*few, shared))
    for x, y in zip((found[0][[0, 1, 3]], found[1][[0, 1, 3]], found[2]), expected):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12)


@each_adjoint
def test_a_rejected_step_into_nan_leaves_the_gradient_exact(adjoint):
    y0 = torch.ones(2, 1, dtype=D, requires_grad=True)
    rate = torch.tensor([[1.0], [0.1]], dtype=D)
    solver = im.Dopri5(rtol=1e-9, atol=1e-11, dt0=1.9)
    solution = im.odeint(
        lambda t, y, r: -r * torch.sqrt(y), y0, (0.0, 1.9), rate, solver=solver, adjoint=adjoint, batch_dims=1
    )
    assert int(solution.rejected[0]) > 0
    # sqrt(y) = 1 - r t / 2, so dy/dy0 = 1 - r t / 2.
    (gradient,) = torch.autograd.grad(solution.value[-1].sum(), y0)
    torch.testing.assert_close(gradient, 1 - rate * 1.9 / 2, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "options",
    [{"event": im.Event(lambda t, y: y.sum() - 1.5)}, {"solver": im.RK4(dt=0.3, tstops=(0.5,))}],
    ids=["event", "tstops"],
)
def test_parameters_of_an_unrolled_solve_may_want_gradients_under_transforms(options):
    linear = nn.Linear(2, 2).double()
    y0 = torch.tensor([1.0, 2.0], dtype=torch.float64)

    def loss(y0, adjoint):
        f = lambda t, y: -y + 0.1 * linear(y)  # noqa: E731
        return im.odeint(f, y0, (0.0, 1.0), adjoint=adjoint, **options).value[-1].square().sum()

    wanted = func.grad(loss)(y0, im.RecursiveCheckpointAdjoint())
    torch.testing.assert_close(func.grad(loss)(y0, im.UnrolledAdjoint()), wanted, rtol=1e-8, atol=1e-10)
    _, pushed = func.jvp(lambda y: loss(y, im.UnrolledAdjoint()), (y0,), (torch.ones_like(y0),))
    torch.testing.assert_close(pushed, wanted.sum(), rtol=1e-8, atol=1e-10)
