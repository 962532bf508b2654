"""Events: where they happen, what follows, and how their times move; and times that steps must hit."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import func, nn

import implicitly as im

D = torch.float64
SOLVER = im.Dopri5(rtol=1e-9, atol=1e-11)
ADJOINTS = [im.RecursiveCheckpointAdjoint(), im.UnrolledAdjoint()]
each_adjoint = pytest.mark.parametrize("adjoint", ADJOINTS, ids=lambda a: type(a).__name__)


def tensor(*numbers, grad=False):
    return torch.tensor(numbers[0] if len(numbers) == 1 else numbers, dtype=D, requires_grad=grad)


def fall(t, y, gravity, *rest):
    return torch.stack([y[..., 1], -gravity + 0 * y[..., 1]], -1)


def height(t, y, gravity, *rest):
    return y[..., 0]


def bounced(t, y, gravity, restitution):
    return torch.stack([y[..., 0], -restitution * y[..., 1]], -1)


def hit(y0, gravity):
    """When and how fast a ball hits the floor."""
    speed = torch.sqrt(y0[..., 1] ** 2 + 2 * gravity * y0[..., 0])
    return (y0[..., 1] + speed) / gravity, speed


def assert_same_derivatives(both, given):
    """First and second derivatives of two numbers by the tensors `given`."""
    first = [torch.autograd.grad(x, given, create_graph=True) for x in both]
    torch.testing.assert_close(*first, rtol=1e-8, atol=1e-9)
    second = [torch.autograd.grad(sum(x.sum() for x in g), given) for g in first]
    torch.testing.assert_close(*second, rtol=1e-7, atol=1e-7)


def bouncing(y0, gravity, restitution, end):
    """The state at `end` of a ball that bounces, and its times of bounces."""
    t, speed = hit(y0, gravity)
    times = [t]
    while True:
        speed = restitution * speed
        if bool((times[-1] + 2 * speed / gravity).detach() > end):
            break
        times.append(times[-1] + 2 * speed / gravity)
    s = end - times[-1]
    return torch.stack([speed * s - gravity * s**2 / 2, speed - gravity * s]), times


FLOOR = im.Event(height, direction=-1)
BOUNCE = im.Event(height, direction=-1, restart=bounced)


# ------------------------------------------------------------------------------------------ an event ends


@pytest.mark.parametrize(
    "solver",
    [SOLVER, im.Dopri8(), im.Tsit5(), im.Bosh3(), im.Heun(rtol=1e-4), im.RK4(dt=0.3), im.Midpoint(dt=0.11)],
    ids=lambda s: type(s).__name__,
)
@each_adjoint
def test_a_ball_hits_the_floor_at_a_differentiable_time(adjoint, solver):
    """The methods are exact for a parabola, so time, state and derivatives are those of the closed form."""
    y0, gravity = tensor(2.0, 1.0, grad=True), tensor(9.81, grad=True)
    solution = im.odeint(fall, y0, (0.0, 0.3, 5.0), gravity, solver=solver, adjoint=adjoint, event=FLOOR)
    time, speed = hit(y0, gravity)
    assert int(solution.status) == im.Status.EVENT
    assert bool(solution.converged)
    assert int(solution.event) == 0
    assert int(solution.event_count) == 1
    torch.testing.assert_close(solution.t, time, rtol=0, atol=1e-13)
    assert abs(float(solution.value[-1, 0].detach())) < 1e-13
    torch.testing.assert_close(solution.value[-1, 1], -speed, rtol=1e-12, atol=0)
    for found, expected in ((solution.t, time), (solution.value[-1].sum(), -speed)):
        found = torch.autograd.grad(found, (y0, gravity), retain_graph=True)
        for a, b in zip(found, torch.autograd.grad(expected, (y0, gravity), retain_graph=True)):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@each_adjoint
def test_outputs_after_an_event_are_the_state_at_it(adjoint):
    y0, gravity = tensor(2.0, 1.0, grad=True), tensor(9.81, grad=True)
    t = torch.linspace(0, 2, 9, dtype=D)
    solution = im.odeint(fall, y0, t, gravity, solver=SOLVER, adjoint=adjoint, event=FLOOR)
    time, _ = hit(y0, gravity)
    s = torch.minimum(t, time)
    expected = torch.stack([y0[0] + y0[1] * s - gravity * s**2 / 2, y0[1] - gravity * s], 1)
    torch.testing.assert_close(solution.value, expected, rtol=0, atol=1e-12)
    weights = torch.arange(18, dtype=D).reshape(9, 2).sin()
    found = torch.autograd.grad((solution.value * weights).sum(), (y0, gravity))
    for a, b in zip(found, torch.autograd.grad((expected * weights).sum(), (y0, gravity))):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    between = solution.interpolate(tensor(0.1, 1.9, 0.7))
    torch.testing.assert_close(between[1], solution.value[-1], rtol=0, atol=1e-12)


def pendulum(t, y, length):
    return torch.stack([y[..., 1], -9.81 / length * torch.sin(y[..., 0])], -1)


def test_a_pendulum_crosses_its_rest_after_a_quarter_of_its_period():
    length, angle = tensor(0.7), 1.2
    y0 = tensor(angle, 0.0)
    # The period is 4 sqrt(l/g) K(sin(angle/2)), and K is pi over 2 times the arithmetic-geometric mean.
    a, b = 1.0, math.cos(angle / 2)
    for _ in range(10):
        a, b = (a + b) / 2, math.sqrt(a * b)
    quarter = math.sqrt(0.7 / 9.81) * math.pi / (2 * a)
    swing = im.Event(lambda t, y, length: y[0])
    solution = im.odeint(pendulum, y0, (0.0, 3.0), length, solver=SOLVER, event=swing)
    assert math.isclose(float(solution.t), quarter, rel_tol=1e-8)
    back = im.Event(lambda t, y, length: y[0], direction=1)
    solution = im.odeint(pendulum, y0, (0.0, 3.0), length, solver=SOLVER, event=back)
    assert math.isclose(float(solution.t), 3 * quarter, rel_tol=1e-8)


def swing_time(y0, length, adjoint, solver=im.RK4(dt=0.1), batch_dims=0):
    event = im.Event(lambda t, y, length: y[..., 0] - 0.1 * t)
    options = {"solver": solver, "adjoint": adjoint, "event": event, "batch_dims": batch_dims}
    return im.odeint(pendulum, y0, (0.0, 0.3, 3.0), length, **options)


@each_adjoint
def test_first_and_second_derivatives_are_finite_differences_in_both_modes(adjoint):
    y0, length = tensor(1.2, 0.1, grad=True), tensor(0.7, grad=True)

    def both(y0, length):
        solution = swing_time(y0, length, adjoint)
        return solution.t, solution.value[1:]

    assert torch.autograd.gradcheck(both, (y0, length), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(both, (y0, length))


@pytest.mark.slow
def test_transforms_of_torch_func_agree():
    y0, length = tensor(1.2, 0.1), tensor(0.7)
    adjoint = im.RecursiveCheckpointAdjoint()

    def time(y0, length):
        return swing_time(y0, length, adjoint, SOLVER).t

    reverse = func.grad(time)(y0, length)
    y = y0.clone().requires_grad_()
    torch.testing.assert_close(reverse, torch.autograd.grad(time(y, length), y)[0], rtol=1e-10, atol=0)
    torch.testing.assert_close(func.jacfwd(time)(y0, length), reverse, rtol=1e-8, atol=0)
    pushed = func.jvp(lambda y: time(y, length), (y0,), (tensor(1.0, 2.0),))[1]
    torch.testing.assert_close(pushed, reverse @ tensor(1.0, 2.0), rtol=1e-8, atol=0)
    h = 1e-4
    slope = func.grad(time)
    numeric = torch.stack(
        [(slope(y0 + h * e, length) - slope(y0 - h * e, length)) / (2 * h) for e in torch.eye(2, dtype=D)]
    )
    torch.testing.assert_close(func.hessian(time)(y0, length), numeric, rtol=1e-5, atol=1e-6)
    starts = torch.stack([y0, 1.1 * y0, y0 - 0.2])
    mapped = func.vmap(time, in_dims=(0, None))(starts, length)
    torch.testing.assert_close(mapped, torch.stack([time(y, length) for y in starts]), rtol=1e-9, atol=0)
    gradients = func.vmap(func.grad(time), in_dims=(0, None))(starts, length)
    torch.testing.assert_close(gradients[0], reverse, rtol=1e-8, atol=0)
    across = func.vmap(lambda y: swing_time(y, length, adjoint, SOLVER).value[-1])(starts)
    torch.testing.assert_close(across[0], swing_time(y0, length, adjoint, SOLVER).value[-1], rtol=0, atol=1e-9)


def test_a_third_derivative_of_a_time():
    """y = exp(a t) reaches 2 at log(2)/a, whose third derivative is -6 log(2)/a^4."""
    a = tensor(0.5, grad=True)
    event = im.Event(lambda t, y, a: y[0] - 2)
    solver = im.Dopri8(rtol=1e-11, atol=1e-13)
    d = im.odeint(lambda t, y, a: a * y, torch.ones(1, dtype=D), (0.0, 9.0), a, solver=solver, event=event).t
    assert math.isclose(float(d.detach()), math.log(2) / 0.5, rel_tol=1e-10)
    for _ in range(3):
        (d,) = torch.autograd.grad(d, a, create_graph=True)
    assert math.isclose(float(d.detach()), -6 * math.log(2) / 0.5**4, rel_tol=1e-7)


# ------------------------------------------------------------------------------------------------ samples


@pytest.mark.parametrize("in_dims", [None, (0, None)])
@each_adjoint
def test_every_sample_has_its_own_event(adjoint, in_dims):
    y0 = tensor([[2.0, 1.0], [0.5, 0.0], [100.0, 0.0], [1.0, -3.0], [0.7, 0.1]], grad=True)
    gravity, other = tensor([9.81, 1.62, 9.81, 3.7, 24.8], grad=True), tensor(1.0, grad=True)
    t = tensor([[0.0, 0.3, 2.0], [0.0, 0.5, 2.0], [0.0, 0.7, 2.0], [0.0, 0.2, 2.5], [0.0, 0.9, 1.5]])
    options = {"solver": im.Dopri5(), "adjoint": adjoint, "event": FLOOR, "batch_dims": 1, "in_dims": in_dims}
    solution = im.odeint(fall, y0, t, gravity, other, **options)
    event, end = im.Status.EVENT, im.Status.CONVERGED
    assert solution.status.tolist() == [event, event, end, event, event]
    assert solution.event.tolist() == [0, 0, -1, 0, 0]
    time = torch.minimum(hit(y0, gravity)[0], t[:, -1])
    torch.testing.assert_close(solution.t, time, rtol=0, atol=1e-12)
    s = torch.minimum(t, time[:, None]).T
    expected = torch.stack([y0[:, 0] + y0[:, 1] * s - gravity * s**2 / 2, y0[:, 1] - gravity * s], 2)
    torch.testing.assert_close(solution.value, expected, rtol=0, atol=1e-11)
    found = torch.autograd.grad(solution.t.sin().sum() + solution.value.cos().sum(), (y0, gravity))
    for a, b in zip(found, torch.autograd.grad(time.sin().sum() + expected.cos().sum(), (y0, gravity))):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


class Level(nn.Module):
    def __init__(self):
        super().__init__()
        self.height = nn.Parameter(tensor(0.5))

    def forward(self, t, y, gravity):
        return y[0] - self.height


class Bounce(nn.Module):
    def __init__(self):
        super().__init__()
        self.restitution = nn.Parameter(tensor(0.6))

    def forward(self, t, y, gravity):
        return torch.stack([y[0], -self.restitution * y[1]])


@each_adjoint
def test_parameters_that_only_an_event_uses_get_their_gradients(adjoint):
    level, bounce, y0, gravity = Level(), Bounce(), tensor(2.0, 1.0), tensor(9.81)
    options = {"solver": SOLVER, "adjoint": adjoint}
    t = im.odeint(fall, y0, (0.0, 5.0), gravity, event=im.Event(level), **options).t
    time = hit(torch.stack([y0[0] - level.height, y0[1]]), gravity)[0]
    torch.testing.assert_close(t, time, rtol=1e-13, atol=0)
    given = (level.height,)
    torch.testing.assert_close(torch.autograd.grad(t, given), torch.autograd.grad(time, given))
    event = im.Event(height, -1, restart=bounce)
    value = im.odeint(fall, y0, (0.0, 1.2), gravity, event=event, **options).value[-1]
    expected = bouncing(y0, gravity, bounce.restitution, 1.2)[0]
    torch.testing.assert_close(value, expected, rtol=0, atol=1e-12)
    given = (bounce.restitution,)
    found = torch.autograd.grad(value.sum(), given)
    torch.testing.assert_close(found, torch.autograd.grad(expected.sum(), given), rtol=1e-10, atol=0)


# ----------------------------------------------------------------------------------------------- restarts


@pytest.mark.parametrize(
    "solver", [SOLVER, im.Dopri8(), im.RK4(dt=0.17), im.Heun(rtol=1e-2)], ids=lambda s: type(s).__name__
)
@each_adjoint
def test_a_ball_bounces_with_the_gradient_of_the_closed_form(adjoint, solver):
    given = tensor(2.0, 1.0, grad=True), tensor(9.81, grad=True), tensor(0.7, grad=True)
    options = {"solver": solver, "adjoint": adjoint, "event": BOUNCE}
    solution = im.odeint(fall, given[0], (0.0, 1.0, 3.0), *given[1:], **options)
    expected, times = bouncing(*given, 3.0)
    assert int(solution.status) == im.Status.CONVERGED
    assert int(solution.event_count) == len(times) == 4
    assert float(solution.t.detach()) == 3.0
    torch.testing.assert_close(solution.value[-1], expected, rtol=0, atol=1e-11)
    torch.testing.assert_close(solution.value[1], bouncing(*given, 1.0)[0], rtol=0, atol=1e-11)
    middle = bouncing(*given, 1.0)[0]
    both = solution.value[1:].sin().sum(), torch.stack([middle, expected]).sin().sum()
    assert_same_derivatives(both, given)


@pytest.mark.parametrize("in_dims", [None, (0, None)])
@each_adjoint
def test_samples_bounce_on_their_own(adjoint, in_dims):
    y0 = tensor([[2.0, 1.0], [0.5, 0.0], [100.0, 0.0], [1.0, -3.0]], grad=True)
    gravity, restitution = tensor([9.81, 1.62, 9.81, 3.7], grad=True), tensor(0.6, grad=True)
    given = (y0, gravity, restitution)
    options = {"solver": im.Dopri5(), "adjoint": adjoint, "event": BOUNCE, "batch_dims": 1, "in_dims": in_dims}
    t = tensor([[0.0, 1.9], [0.0, 2.0], [0.0, 2.1], [0.0, 1.2]])
    solution = im.odeint(fall, y0, t, gravity, restitution, **options)
    expected = []
    for y, g, end in zip(y0, gravity, t[:, -1].tolist()):
        falls = float(hit(y, g)[0].detach()) > end
        whole = torch.stack([y[0] + y[1] * end - g * end**2 / 2, y[1] - g * end])
        expected.append(whole if falls else bouncing(y, g, restitution, end)[0])
    expected = torch.stack(expected)
    torch.testing.assert_close(solution.value[-1], expected, rtol=0, atol=1e-10)
    found = torch.autograd.grad(solution.value[-1].sin().sum(), given)
    for a, b in zip(found, torch.autograd.grad(expected.sin().sum(), given)):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def test_bounces_under_transforms_and_forward_mode():
    y0, gravity, restitution = tensor(2.0, 1.0), tensor(9.81), tensor(0.7)

    def end(y0, restitution):
        options = {"solver": SOLVER, "event": BOUNCE}
        return im.odeint(fall, y0, (0.0, 3.0), gravity, restitution, **options).value[-1]

    exact = func.jacrev(lambda y, r: bouncing(y, gravity, r, 3.0)[0], argnums=(0, 1))(y0, restitution)
    for transform in (func.jacrev, func.jacfwd):
        for a, b in zip(transform(end, argnums=(0, 1))(y0, restitution), exact):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    given = (y0.clone().requires_grad_(), restitution.clone().requires_grad_())
    assert torch.autograd.gradcheck(end, given, check_forward_ad=True)
    starts = torch.stack([y0, 0.9 * y0])
    mapped = func.vmap(end, in_dims=(0, None))(starts, restitution)
    torch.testing.assert_close(mapped[1], end(starts[1], restitution), rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, D])
@pytest.mark.parametrize("direction", [-1, 0])
@pytest.mark.parametrize(("floor", "restitution"), [(0.0, 0.3), (0.0, 0.5), (0.0, 0.7), (1.0, 0.5)])
def test_bounces_that_accumulate_never_lead_through_the_floor(floor, restitution, direction, dtype):
    """From many heights, as rounding decides what becomes of the last bounce that it resolves."""
    heights = 0.3 + 0.1 * torch.arange(28, dtype=dtype)
    y0 = torch.stack([heights + floor, 0 * heights], 1)

    def f(t, y):
        return torch.stack([y[:, 1], torch.full_like(y[:, 1], -9.81)], 1)

    event = im.Event(
        lambda t, y: y[:, 0] - floor,
        direction,
        restart=lambda t, y: torch.stack([y[:, 0], -restitution * y[:, 1]], 1),
    )
    options = {"event": event, "solver": im.Dopri5(max_steps=150), "batch_dims": 1, "on_failure": "ignore"}
    solution = im.odeint(f, y0, (0.0, 10.0), **options)
    # Where rounding of g lets a ball bounce on for a while, steps may run out first.
    allowed = {im.Status.STEP_UNDERFLOW} | ({im.Status.MAX_STEPS} if floor else set())
    assert set(solution.status.tolist()) <= allowed
    landed = torch.sqrt(2 * heights / 9.81)
    accumulates = landed * (1 + 2 * restitution / (1 - restitution))
    torch.testing.assert_close(solution.t, accumulates, rtol=3e-3 if dtype == torch.float32 else 1e-4, atol=0)


def test_a_restart_may_let_g_pass_on():
    """The restart of this event does not change what g watches: it counts how often that passes 0 downwards."""
    event = im.Event(lambda t, y: y[0], -1, lambda t, y: torch.stack([y[0], y[1], y[2] + 1]))

    def swing(t, y):
        return torch.stack([y[1], -y[0], 0 * y[2]])

    solution = im.odeint(swing, tensor(1.0, 0.0, 0.0), (0.0, 20.0), event=event, solver=SOLVER)
    expected = tensor(math.cos(20.0), -math.sin(20.0), 3.0)
    torch.testing.assert_close(solution.value[-1], expected, rtol=0, atol=1e-6)


def test_bounces_that_accumulate_name_the_event():
    y0, gravity, restitution = tensor(2.0, 1.0), tensor(9.81), tensor(0.5)
    with pytest.raises(
        im.SolverError, match=r"STEP_UNDERFLOW at t = 2\.0418.*events happened.* event 0"
    ) as caught:
        im.odeint(fall, y0, (0.0, 5.0), gravity, restitution, event=BOUNCE)
    time, speed = hit(y0, gravity)
    accumulates = time + 2 * speed / gravity * 0.5 / (1 - 0.5)
    torch.testing.assert_close(caught.value.solution.t, accumulates, rtol=1e-12, atol=0)
    with pytest.raises(im.SolverError, match=r"MAX_STEPS .*8 events happened.* event 0"):
        im.odeint(fall, y0, (0.0, 5.0), gravity, restitution, event=BOUNCE, solver=im.Dopri5(dt0=4.0, max_steps=8))


def test_a_restart_may_lead_far_away():
    """A neuron: its potential grows up to 1 and is then set to 0."""
    fire = im.Event(lambda t, y, i: y[0] - 1, 1, restart=lambda t, y, i: 0 * y)
    current = tensor(1.5, grad=True)
    solution = im.odeint(
        lambda t, y, i: i - y, torch.zeros(1, dtype=D), (0.0, 10.0), current, event=fire, solver=SOLVER
    )
    period = -torch.log(1 - 1 / current)
    rest = 10.0 - 9 * period
    assert int(solution.event_count) == 9
    expected = current * (1 - torch.exp(-rest))
    torch.testing.assert_close(solution.value[-1, 0], expected, rtol=1e-7, atol=0)
    (a,), (b,) = (torch.autograd.grad(x, current) for x in (solution.value[-1, 0], expected))
    torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


def box(index):
    def flipped(t, y):
        return torch.cat([y[:2], y[2:] * torch.where(torch.arange(2) == index, -1.0, 1.0).to(D)])

    return [
        im.Event(lambda t, y: y[index], -1, restart=flipped),
        im.Event(lambda t, y: y[index] - 1, 1, restart=flipped),
    ]


@pytest.mark.parametrize("start", [(0.5, 0.5), (0.3, 0.4)])
def test_several_events_also_at_once(start):
    """A billiard; from the middle and at 45 degrees it goes into the corners, where two events happen at once."""
    y0 = tensor(*start, 1.0, 1.0)
    events = (*box(0), *box(1))
    end = 4.3
    solution = im.odeint(
        lambda t, y: torch.cat([y[2:], 0 * y[2:]]), y0, (0.0, 1.0, end), event=events, solver=im.Dopri5()
    )
    for column, t in ((1, 1.0), (2, end)):
        folded = (y0[:2] + t + 1) % 2 - 1
        torch.testing.assert_close(solution.value[column, :2], folded.abs(), rtol=0, atol=1e-12)
    assert int(solution.event_count) == 8
    assert int(solution.status) == im.Status.CONVERGED


@pytest.mark.parametrize(
    "solver", [im.Dopri5(), im.Kvaerno3(), im.Kvaerno5(), im.Adams()], ids=lambda s: type(s).__name__
)
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_events_at_once_may_restart_each_its_own_part(solver, order):
    """The second of the two steps has length 0, from which implicit methods cannot tell a slope."""
    limits, lights = tensor(1.0, 2.0), tensor([[0.0, 1.0], [1.0, 0.0]])
    events = [im.Event(lambda t, y, i=i: y[i] - limits[i], restart=lambda t, y, i=i: y * lights[i]) for i in order]
    rise = lambda t, y: limits + 0 * y  # noqa: E731
    solution = im.odeint(rise, tensor(0.0, 0.0), (0.0, 2.5), event=tuple(events), solver=solver)
    assert solution.event_indices.sort().values.tolist() == [0, 0, 1, 1]
    torch.testing.assert_close(solution.event_times, tensor(1.0, 1.0, 2.0, 2.0), rtol=0, atol=1e-9)
    torch.testing.assert_close(solution.value[-1], tensor(0.5, 1.0), rtol=0, atol=1e-9)


def test_an_event_whose_g_jumps_may_happen_again():
    event = im.Event(lambda t, y: torch.where(y > 0.75, 1.0, -1.0).to(y), restart=lambda t, y: y - 1)
    solution = im.odeint(lambda t, y: torch.ones_like(y), tensor(-1.0), (0.0, 4.25), event=event)
    assert int(solution.event_count) == 3
    torch.testing.assert_close(solution.event_times, tensor(1.75, 2.75, 3.75), rtol=0, atol=1e-4)
    torch.testing.assert_close(solution.value[-1], tensor(0.25), rtol=0, atol=1e-4)


def test_the_index_tells_which_event_ended_a_sample():
    events = [im.Event(lambda t, y, level=level: y[..., 0] - level, 1) for level in (3.0, 2.0, 4.0)]
    options = {"batch_dims": 1, "event": tuple(events), "solver": im.Dopri5(dt0=5.0)}
    y0 = tensor([[1.0], [2.5], [3.5], [5.0]])
    solution = im.odeint(lambda t, y: torch.ones_like(y), y0, (0.0, 5.0), **options)
    assert solution.event.tolist() == [1, 0, 2, -1]
    torch.testing.assert_close(solution.t, tensor(1.0, 0.5, 0.5, 5.0), rtol=0, atol=1e-14)


# ------------------------------------------------------------------------------------------- corner cases


@each_adjoint
def test_an_event_that_never_happens_changes_nothing(adjoint):
    given = tensor(2.0, 1.0, grad=True), tensor(0.0, 0.4, 0.6, grad=True), tensor(9.81, grad=True)
    options = {"solver": SOLVER, "adjoint": adjoint}
    plain = im.odeint(fall, *given, **options)
    watched = im.odeint(fall, *given, event=FLOOR, **options)
    assert int(watched.status) == im.Status.CONVERGED
    assert int(watched.event) == -1
    assert watched.evaluations == plain.evaluations
    torch.testing.assert_close(watched.value, plain.value, rtol=0, atol=1e-14)
    both = [torch.autograd.grad(x.value.sin().sum() + x.t * 2, given, retain_graph=True) for x in (plain, watched)]
    for a, b in zip(*both):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert math.isclose(float(torch.autograd.grad(plain.t, given[1])[0][-1]), 1.0)


@pytest.mark.parametrize("direction", [-1, 0])
def test_a_ball_that_leaves_the_floor_has_not_hit_it(direction):
    event = im.Event(height, direction)
    gravity = tensor(10.0)
    up = im.odeint(fall, tensor(0.0, 1.0), (0.0, 5.0), gravity, event=event)
    assert math.isclose(float(up.t), 0.2, rel_tol=1e-12)
    down = im.odeint(fall, tensor(0.0, -1.0), (0.0, 0.5), gravity, event=event)
    assert int(down.status) == im.Status.CONVERGED
    rest = im.odeint(fall, tensor(0.0, 0.0), (0.0, 0.5), -gravity, event=event)
    assert int(rest.status) == im.Status.CONVERGED


def test_two_changes_within_a_step_count_and_the_first_is_taken():
    """A parabola that is below 0 from 1 to 3, in one step from 0 to 5."""
    event = im.Event(lambda t, y: y[0])
    solver = im.Dopri5(dt=5.0)
    slope = lambda t, y: (2 * t - 4) * torch.ones_like(y)  # noqa: E731
    solution = im.odeint(slope, tensor([3.0]), (0.0, 5.0), event=event, solver=solver)
    assert math.isclose(float(solution.t), 1.0, rel_tol=1e-13)
    up = im.odeint(slope, tensor([3.0]), (0.0, 5.0), event=im.Event(event.g, 1), solver=solver)
    assert math.isclose(float(up.t), 3.0, rel_tol=1e-13)


def test_an_event_at_an_output_time_and_at_the_end():
    event = im.Event(lambda t, y: y[0] - 1)
    one = lambda t, y: torch.ones_like(y)  # noqa: E731
    solution = im.odeint(one, tensor([0.0]), (0.0, 0.5, 1.0, 2.0), event=event)
    torch.testing.assert_close(solution.value[:, 0], tensor(0.0, 0.5, 1.0, 1.0), rtol=0, atol=1e-14)
    end = im.odeint(one, tensor([0.0]), (0.0, 1.0), event=event)
    assert int(end.status) in (im.Status.EVENT, im.Status.CONVERGED)  # rounding decides
    torch.testing.assert_close(end.value[-1], tensor([1.0]), rtol=0, atol=1e-14)
    # Of a time that comes out exactly, the state before the restart is put out.
    again = im.Event(lambda t, y: t - 1, restart=lambda t, y: 0 * y)
    end = im.odeint(one, tensor([0.0]), (0.0, 1.0, 2.0), event=again)
    assert int(end.status) == im.Status.CONVERGED
    torch.testing.assert_close(end.value[1:], tensor([[1.0], [1.0]]), rtol=0, atol=1e-13)


@each_adjoint
def test_times_may_decrease(adjoint):
    y0, a = tensor([2.0], grad=True), tensor(0.5, grad=True)
    event = im.Event(lambda t, y, a: y[0] - 1, -1)
    options = {"event": event, "solver": SOLVER, "adjoint": adjoint}
    solution = im.odeint(lambda t, y, a: a * y, y0, (0.0, -1.0, -5.0), a, **options)
    time = -torch.log(y0[0]) / a
    torch.testing.assert_close(solution.t, time, rtol=1e-9, atol=0)
    torch.testing.assert_close(solution.value[-1], tensor([1.0]), rtol=0, atol=1e-12)
    for x, y in zip(torch.autograd.grad(solution.t, (y0, a)), torch.autograd.grad(time, (y0, a))):
        torch.testing.assert_close(x, y, rtol=1e-7, atol=1e-9)


def test_the_time_moves_with_the_first_time():
    """f and g do not know the time, so the event is moved by as much."""
    t = tensor(0.3, 1.0, 9.0, grad=True)
    solution = im.odeint(fall, tensor(20.0, 1.0), t, tensor(9.81), event=FLOOR)
    torch.testing.assert_close(torch.autograd.grad(solution.t, t)[0], tensor(1.0, 0.0, 0.0), rtol=0, atol=1e-9)


def test_a_rejected_step_has_no_event():
    """The first step is far too long, and passes the floor that the true solution never meets."""
    event = im.Event(lambda t, y: y[0] - 0.5, -1)
    solver = im.Dopri5(dt0=2.0)
    f = lambda t, y: -30 * (y - 1)  # noqa: E731
    solution = im.odeint(f, tensor([2.0]), (0.0, 2.0), event=event, solver=solver)
    assert int(solution.rejected) > 0
    assert int(solution.status) == im.Status.CONVERGED


def test_g_that_becomes_nan_ends_that_sample_alone():
    event = im.Event(lambda t, y, r: torch.sqrt(y[:, 0] - 0.3) + 1)
    y0, rate = tensor([[1.0], [1.0]]), tensor([[1.0], [0.1]], grad=True)
    options = {"event": event, "batch_dims": 1, "in_dims": 0}
    with pytest.warns(im.ConvergenceWarning, match=r"NON_FINITE at t = 1\.20"):
        solution = im.odeint(lambda t, y, r: -r * y, y0, (0.0, 2.0), rate, on_failure="warn", **options)
    assert solution.status.tolist() == [im.Status.NON_FINITE, im.Status.CONVERGED]
    (gradient,) = torch.autograd.grad(solution.value[-1].sum() + solution.t.sum(), rate)
    torch.testing.assert_close(gradient, tensor([[0.0], [-2 * math.exp(-0.2)]]), rtol=1e-5, atol=0)
    begins = im.odeint(lambda t, y, r: y, y0 - 1, (0.0, 2.0), rate, on_failure="ignore", **options)
    assert begins.status.tolist() == [im.Status.NON_FINITE] * 2


def test_float32_events_are_found_to_its_rounding():
    solution = im.odeint(fall, torch.tensor([2.0, 1.0]), (0.0, 5.0), torch.tensor(9.81), event=FLOOR)
    time, _ = hit(tensor(2.0, 1.0), tensor(9.81))
    assert solution.t.dtype == torch.float32
    assert abs(float(solution.t) - float(time)) < 1e-6


def decay(t, y):
    return -y


Y = torch.ones(2, 3, dtype=D)


@pytest.mark.parametrize(
    ("event", "options", "error", "message"),
    [
        (lambda: im.Event(lambda t, y: y), {}, ValueError, r"g of event 0.*of shape \(\), got \(2, 3\)"),
        (lambda: im.Event(lambda t, y: y), {"batch_dims": 1}, ValueError, r"of shape \(2,\), got \(2, 3\)"),
        (
            lambda: im.Event(lambda t, y: y[0, 0].float()),
            {},
            ValueError,
            "expected torch.float64, got torch.float32",
        ),
        (
            lambda: im.Event(lambda t, y: y[0, 0] > 1),
            {},
            ValueError,
            "torch.bool: for example y - 1 instead of y > 1",
        ),
        (lambda: im.Event(lambda t, y: 1.0), {}, TypeError, "got a float"),
        (lambda: im.Event(lambda t, y: y.sum(), restart=lambda t, y: y[0]), {}, ValueError, r"restart of event 0"),
        (lambda: im.Event(lambda t, y: y.mul_(2).sum()), {}, ValueError, "in place"),
        (lambda: im.Event(1.0), {}, TypeError, "g must be callable"),
        (lambda: im.Event(decay, 2), {}, ValueError, "direction must be -1, 0 or 1, got 2"),
        (lambda: im.Event(decay, 1, 3.0), {}, TypeError, "restart must be None or callable"),
        (lambda: decay, {}, TypeError, "event must be an im.Event"),
        (lambda: (FLOOR, decay), {}, TypeError, "event must be an im.Event"),
    ],
)
def test_events_that_cannot_be_meant_are_refused(event, options, error, message):
    with pytest.raises(error, match=message):
        im.odeint(decay, Y, (0.0, 1.0), event=event(), **options)


def test_a_captured_tensor_of_an_event_is_refused():
    level = tensor(0.5, grad=True)
    with pytest.raises(ValueError, match=r"g of event 0.*'level'"):
        im.odeint(decay, Y, (0.0, 1.0), event=im.Event(lambda t, y: y.sum() - level))


# --------------------------------------------------------------------------------------- times to be hit


def switched(convention):
    """dy/dt = -a y, and from t = 0.7 on b - a y: the solution is continuous, its slope jumps."""

    def f(t, y, a, b):
        late = t >= 0.7 if convention == "from" else t > 0.7
        return torch.where(late, b, 0 * b) - a * y

    return f


def switched_solution(t, y0, a, b):
    s = torch.clamp(t - 0.7, min=0)
    return y0 * torch.exp(-a * t) + b / a * (1 - torch.exp(-a * s))


@pytest.mark.parametrize("convention", ["from", "after"])
@pytest.mark.parametrize(
    "method", [im.Midpoint, im.RK4, im.Bosh3, im.Dopri5, im.Tsit5, im.Dopri8], ids=lambda m: m.__name__
)
def test_the_order_is_kept_across_a_jump_in_f(method, convention):
    order = method.tableau.order
    coarse = {2: 20, 3: 14, 4: 8, 5: 6, 8: 2}[order]
    a, b, y0 = tensor(1.3, grad=True), tensor(4.0, grad=True), tensor(1.0, grad=True)

    def errors(steps, tstops):
        t = torch.linspace(0, 2, 23, dtype=D)
        solver = method(dt=2 / steps, tstops=tstops)
        value = im.odeint(switched(convention), y0, t, a, b, solver=solver).value
        expected = switched_solution(t, y0, a, b)
        gradients = [
            torch.cat([g.reshape(1) for g in torch.autograd.grad(x[-1], (a, b, y0))]) for x in (value, expected)
        ]
        return [float((x - y).detach().abs().max()) for x, y in ((value, expected), gradients)]

    few, many = errors(coarse, (0.7,)), errors(4 * coarse, (0.7,))
    for i in range(2):
        assert math.log2(few[i] / many[i]) / 2 > order - 0.6
    if order > 2:
        assert errors(4 * coarse, ())[0] > 100 * many[0]


@pytest.mark.parametrize("backwards", [False, True])
@each_adjoint
def test_adaptive_steps_do_not_collapse_at_a_jump(adjoint, backwards):
    a, b, y0 = tensor(1.3, grad=True), tensor(4.0, grad=True), tensor([1.0], grad=True)
    t = tensor(0.0, 0.5, 0.7, 0.9, 2.0)
    expected = switched_solution(t, y0, a, b)[:, None]
    f, start = switched("from"), y0
    if backwards:
        t, expected, start = t.flip(0), expected.flip(0), expected[-1]
    runs = {}
    for tstops in ((), (0.7, 5.0)):
        solver = im.Dopri5(rtol=1e-9, atol=1e-11, tstops=tstops)
        runs[tstops] = im.odeint(f, start, t, a, b, solver=solver, adjoint=adjoint)
        torch.testing.assert_close(runs[tstops].value, expected, rtol=0, atol=1e-7)
    blind, told = runs.values()
    assert int(told.rejected) <= 3 < int(blind.rejected)
    assert told.evaluations < 0.8 * blind.evaluations
    found = torch.autograd.grad(told.value.sin().sum(), (y0, a, b), retain_graph=True)
    for x, y in zip(found, torch.autograd.grad(expected.sin().sum(), (y0, a, b))):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7)


def test_the_slope_after_a_jump_counts_for_the_step_after():
    """f is a step function: with the jump hit, Euler's method is exact, in few steps."""
    seen = []

    def f(t, y):
        seen.append(float(t))
        return torch.where(t < 0.3, 1.0, -2.0) * torch.ones_like(y)

    solution = im.odeint(f, tensor([0.0]), (0.0, 1.0), solver=im.Euler(dt=0.5, tstops=(0.3,)))
    torch.testing.assert_close(solution.value[-1], tensor([0.3 - 1.4]), rtol=0, atol=1e-15)
    assert int(solution.steps) == 3
    assert 0.3 not in seen


def test_samples_hit_the_times_within_their_own():
    """One does not get there, one ends there, one begins there."""
    a, b, y0 = tensor(1.3), tensor(4.0), tensor([[1.0], [2.0], [3.0], [4.0]])
    t = tensor([[0.0, 0.4], [0.0, 2.0], [0.0, 0.7], [0.7, 1.5]])
    solver = im.Dopri5(rtol=1e-9, atol=1e-11, tstops=(0.7,))
    options = {"solver": solver, "batch_dims": 1}
    f = switched("after")
    solution = im.odeint(f, y0, t, a, b, in_dims=None, **options)
    expected = switched_solution(t[:, 1:], y0, a, b)
    expected[3] = (4.0 - b / a) * torch.exp(-a * 0.8) + b / a
    torch.testing.assert_close(solution.value[-1], expected, rtol=0, atol=1e-8)
    assert int(solution.rejected.max()) <= 2
    dropped = im.odeint(lambda t, y: f(t, y, a, b), y0, t, **options)
    torch.testing.assert_close(dropped.value, solution.value, rtol=0, atol=1e-12)


def test_times_to_be_hit_and_events_go_together():
    """Thrust upwards from 0.5 on; the ball hits the floor before or after it, and bounces."""

    def f(t, y, gravity, restitution, thrust):
        return torch.stack([y[1], -gravity + torch.where(t >= 0.5, thrust, 0 * thrust)])

    y0, gravity, restitution, thrust = tensor(1.0, 0.0), tensor(10.0), tensor(0.5), tensor(4.0)
    solver = im.Dopri5(tstops=(0.5,))
    event = im.Event(lambda t, y, *rest: y[0], -1, restart=lambda t, y, g, r, h: torch.stack([y[0], -r * y[1]]))

    def end(y0, gravity, restitution, thrust):
        return im.odeint(f, y0, (0.0, 1.0), gravity, restitution, thrust, solver=solver, event=event).value[-1]

    def exact(y0, gravity, restitution, thrust):
        time, speed = hit(y0, gravity)  # 0.447
        s, up = 0.5 - time, restitution * speed
        y, v = up * s - gravity * s**2 / 2, up - gravity * s
        pull, s = gravity - thrust, 0.5
        return torch.stack([y + v * s - pull * s**2 / 2, v - pull * s])

    given = (y0, gravity, restitution, thrust)
    torch.testing.assert_close(end(*given), exact(*given), rtol=0, atol=1e-12)
    for transform in (func.jacrev, func.jacfwd):
        found, expected = (transform(x, argnums=(0, 1, 2, 3))(*given) for x in (end, exact))
        for x, y in zip(found, expected):
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-11)


def test_times_that_cannot_be_hit_are_refused():
    with pytest.raises(ValueError, match="tstops must hold finite numbers"):
        im.Dopri5(tstops=(0.5, float("nan")))


def test_events_are_found_in_inference_mode():
    with torch.inference_mode():
        solution = im.odeint(fall, tensor(0.0, 1.0), (0.0, 5.0), tensor(10.0), event=FLOOR)
    assert math.isclose(float(solution.t), 0.2, rel_tol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, D])
def test_a_far_last_time_leaves_events_as_they_are(dtype):
    """To solve until it happens, one gives a time far away."""
    y0, stop = torch.tensor([1.0, 0.0], dtype=dtype), im.Event(lambda t, y: 0 * y[0] + t - 4)
    bounce = im.Event(lambda t, y: y[0], -1, restart=lambda t, y: torch.stack([y[0], -y[1]]))

    def f(t, y):
        return torch.stack([y[1], -9.81 - 0.1 * y[1] * y[1].abs()])

    def solve(end):
        return im.odeint(f, y0, (0.0, end), event=(bounce, stop), solver=im.Dopri5(rtol=1e-6, atol=1e-6))

    near = solve(5.0)
    assert int(near.event_count) > 3
    for end in (1e9, 1e15):
        far = solve(end)
        assert (int(far.event), int(far.event_count)) == (1, int(near.event_count))
        torch.testing.assert_close(far.t, near.t, rtol=4 * torch.finfo(dtype).eps, atol=0)
        torch.testing.assert_close(far.value[-1], near.value[-1], rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------- when they all happened


@each_adjoint
def test_the_times_of_all_bounces_have_the_derivatives_of_the_closed_form(adjoint):
    given = tensor(2.0, 1.0, grad=True), tensor(9.81, grad=True), tensor(0.7, grad=True)

    def solved(*given):
        return im.odeint(fall, given[0], (0.0, 1.0, 3.0), *given[1:], solver=SOLVER, adjoint=adjoint, event=BOUNCE)

    solution, (value, times) = solved(*given), bouncing(*given, 3.0)
    torch.testing.assert_close(solution.event_times, torch.stack(times), rtol=1e-12, atol=0)
    assert solution.event_indices.tolist() == [0] * 4
    weights = tensor(1.0, -2.0, 0.5, 3.0)
    both = [
        (weights * t.sin()).sum() + y.cos().sum()
        for t, y in ((solution.event_times, solution.value[-1]), (torch.stack(times), value))
    ]
    assert_same_derivatives(both, given)
    assert torch.autograd.gradcheck(lambda *given: solved(*given).event_times, given, check_forward_ad=True)
    mapped = func.vmap(lambda e: solved(*given[:2], e).event_times)(tensor(0.7, 0.9))
    torch.testing.assert_close(mapped[0], torch.stack(times), rtol=1e-9, atol=0)
    fewer = torch.stack(bouncing(*given[:2], tensor(0.9), 3.0)[1])
    torch.testing.assert_close(mapped[1, : len(fewer)], fewer, rtol=1e-9, atol=0)
    assert len(fewer) < 4
    assert mapped[1, len(fewer) :].isnan().all()


@pytest.mark.parametrize("in_dims", [None, (0, None)])
@each_adjoint
def test_each_sample_has_times_of_its_own_events(adjoint, in_dims):
    y0 = tensor([[2.0, 1.0], [0.5, 0.0], [100.0, 0.0], [1.0, -3.0], [0.4, 0.0]], grad=True)
    gravity, restitution = tensor([9.81, 1.62, 9.81, 3.7, 9.81], grad=True), tensor(0.6, grad=True)
    ends = [1.9, 2.0, 2.1, 1.2, 0.5]
    t = tensor([[0.0, end] for end in ends])
    options = {"adjoint": adjoint, "event": BOUNCE, "batch_dims": 1, "in_dims": in_dims}
    solution = im.odeint(fall, y0, t, gravity, restitution, **options)
    alone = [bouncing(y, g, restitution, end)[1] for y, g, end in zip(y0, gravity, ends) if y[0] < 100]
    alone.insert(2, [])
    assert solution.event_count.tolist() == [len(times) for times in alone]
    assert solution.event_times.shape == solution.event_indices.shape == (max(map(len, alone)), 5)
    for i, times in enumerate(alone):
        for time, expected in zip(solution.event_times[:, i], times):
            torch.testing.assert_close(time, expected, rtol=1e-12, atol=0)
        assert solution.event_times[len(times) :, i].isnan().all()
        assert solution.event_indices[:, i].eq(0).sum() == len(times)
        assert solution.event_indices[len(times) :, i].eq(-1).all()
    given = (y0, gravity, restitution)
    found = torch.autograd.grad(solution.event_times.nansum(), given)
    for a, b in zip(found, torch.autograd.grad(torch.stack([*itertools.chain(*alone)]).sum(), given)):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@each_adjoint
def test_times_of_events_before_a_sample_failed_are_known_and_have_no_derivative(adjoint):
    """The second ball's bounces accumulate."""
    y0, restitution = tensor([[2.0, 1.0], [0.1, 0.0]], grad=True), tensor(0.5)
    options = {"adjoint": adjoint, "event": BOUNCE, "batch_dims": 1, "on_failure": "ignore"}
    solution = im.odeint(fall, y0, (0.0, 1.0), tensor([1.0, 9.81]), restitution, **options)
    assert solution.status.tolist() == [im.Status.CONVERGED, im.Status.STEP_UNDERFLOW]
    first, speed = hit(y0[1].detach(), tensor(9.81))
    expected = torch.stack([first, first + speed / 9.81, first + 1.5 * speed / 9.81])
    torch.testing.assert_close(solution.event_times[:3, 1], expected, rtol=1e-10, atol=0)
    assert len(solution.event_times) == int(solution.event_count[1]) > 10
    (gradient,) = torch.autograd.grad(solution.event_times.nansum(), y0)
    assert torch.equal(gradient, torch.zeros_like(y0))


def test_times_of_several_events_and_the_states_there():
    y0 = tensor(0.5, 0.3, 1.0, 0.4)
    solution = im.odeint(lambda t, y: torch.cat([y[2:], 0 * y[2:]]), y0, (0.0, 2.0), event=(*box(0), *box(1)))
    torch.testing.assert_close(solution.event_times, tensor(0.5, 1.5, 1.75), rtol=1e-12, atol=0)
    assert solution.event_indices.tolist() == [1, 0, 3]
    there = solution.interpolate(solution.event_times)
    torch.testing.assert_close(there[[0, 1, 2], [0, 0, 1]], tensor(1.0, 0.0, 1.0), rtol=0, atol=1e-12)
    torch.testing.assert_close(there[0, 2:], y0[2:])  # before it turns around


@pytest.mark.parametrize("batch_dims", [0, 1])
def test_without_events_there_are_no_times_of_them(batch_dims):
    y0 = torch.ones(3, 2, dtype=D)
    for event in (None, im.Event(lambda t, y: y.sum(-1) + 1 if batch_dims else y.sum() + 1)):
        solution = im.odeint(lambda t, y: -y, y0, (0.0, 1.0), batch_dims=batch_dims, event=event)
        shape = (0, 3) if batch_dims else (0,)
        assert solution.event_times.shape == solution.event_indices.shape == shape
        assert (solution.event_times.dtype, solution.event_indices.dtype) == (D, torch.int64)


def test_a_count_in_the_state_stops_after_so_many_events():
    def turned(t, y):
        return torch.stack([y[0], -0.8 * y[1], y[2] + 1])

    bounce = im.Event(lambda t, y: torch.where(y[2] < 3, y[0], 1.0), -1, restart=turned)
    stop = im.Event(lambda t, y: torch.where(y[2] < 3, 1.0, y[0]), -1)
    y0 = tensor(1.0, 0.0, 0.0, grad=True)
    f = lambda t, y: torch.stack([y[1], 0 * y[0] - 9.81, 0 * y[0]])  # noqa: E731
    solution = im.odeint(f, y0, (0.0, 30.0), event=(bounce, stop))
    expected = torch.stack(bouncing(y0[:2], tensor(9.81), 0.8, 2.3)[1])
    assert solution.event_indices.tolist() == [0, 0, 0, 1]
    assert solution.status == im.Status.EVENT
    torch.testing.assert_close(solution.event_times, expected, rtol=1e-12, atol=0)
    found, wanted = (torch.autograd.grad(x.sum(), y0)[0] for x in (solution.event_times, expected))
    torch.testing.assert_close(found, wanted)


def test_what_g_returns_is_named_once():
    event = im.Event(lambda t, y: y)
    with pytest.raises(ValueError, match=r"^g of event 0 must return one number per sample"):
        im.odeint(lambda t, y: -y, torch.ones(2, dtype=D), (0.0, 1.0), event=event)
