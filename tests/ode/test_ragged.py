"""Series of different lengths in one batch: shorter ones repeat their last time."""

import numpy as np
import pytest
import torch
from torch import nn

import implicitly as im

# Of four samples: all times, fewer, two alone, and backwards.
SERIES = [[0.0, 0.3, 0.5, 1.1, 2.0], [0.2, 0.9, 1.0], [0.0, 1.5], [1.0, 0.4, -0.5]]
PADDED = torch.tensor([s + s[-1:] * (5 - len(s)) for s in SERIES], dtype=torch.float64)
Y0 = torch.tensor([[1.0, 0.0], [0.5, -1.0], [2.0, 1.0], [0.1, 0.3]], dtype=torch.float64)
RATES = torch.tensor([0.5, 1.0, 2.0, 0.7], dtype=torch.float64)
WEIGHTS = torch.randn(5, 4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
CHOICES = {
    "checkpointed": {},
    "unrolled": {"adjoint": im.UnrolledAdjoint()},
    "backsolve": {"solver": im.Dopri5(rtol=1e-9, atol=1e-11), "adjoint": im.BacksolveAdjoint()},
    "implicit": {"solver": im.Kvaerno3(rtol=1e-6, atol=1e-8)},
    "constant": {"solver": im.RK4(dt=0.05)},
}


def swing(t, y, rate):
    """A damped oscillator whose rate, one a sample, is driven by time."""
    x, v = y.unbind(-1)
    rate, t = rate.reshape(x.shape), t.reshape(x.shape)
    return torch.stack([v, -rate * x - 0.1 * v + torch.sin(t)], -1)


def solved(t, y0, rate, **options):
    return im.odeint(swing, y0, t, rate, batch_dims=1, in_dims=0, **options)


def loss(value, counts):
    """Of the times that were asked for alone, as a mask would leave them."""
    return sum((WEIGHTS[:n, i] * value[:n, i]).sum() for i, n in enumerate(counts))


@pytest.mark.parametrize("name", CHOICES)
def test_samples_of_fewer_times_have_the_values_and_gradients_of_solves_alone(name):
    options, counts = CHOICES[name], [len(s) for s in SERIES]
    leaves = [x.clone().requires_grad_() for x in (PADDED, Y0, RATES)]
    value = solved(*leaves, **options).value
    found = torch.autograd.grad(loss(value, counts), leaves)
    for i, (n, weights) in enumerate(zip(counts, WEIGHTS.unbind(1))):
        alone = [x[i : i + 1].detach().clone().requires_grad_() for x in leaves]
        one = solved(alone[0][:, :n], *alone[1:], **options).value
        wanted = torch.autograd.grad((weights[:n] * one[:, 0]).sum(), alone)
        torch.testing.assert_close(value[:n, i], one[:, 0], rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(value[n:, i], one[-1:, 0].expand(5 - n, -1), rtol=1e-8, atol=1e-10)
        near = {"rtol": 1e-4, "atol": 1e-6} if name == "backsolve" else {"rtol": 1e-8, "atol": 1e-9}
        for gradient, alike in zip(found, wanted):
            torch.testing.assert_close(gradient[i], alike[0], **near)


@pytest.mark.parametrize("in_dims", [0, None])
@pytest.mark.parametrize("name", CHOICES)
def test_a_series_of_one_time_is_its_start(name, in_dims):
    options, counts = CHOICES[name], [5, 1, 2, 1]
    t = torch.tensor([SERIES[0], [0.7] * 5, [0.0] + [1.5] * 4, [-0.3] * 5], dtype=torch.float64)
    leaves = [x.clone().requires_grad_() for x in (t, Y0, RATES)]
    sol = im.odeint(swing, leaves[1], leaves[0], leaves[2], batch_dims=1, in_dims=in_dims, **options)
    assert torch.equal(sol.value[:, 1::2], Y0[1::2].expand(5, -1, -1))
    assert sol.converged.all()
    assert sol.steps[1::2].tolist() == [0, 0]
    torch.testing.assert_close(sol.t, t[:, -1], rtol=0, atol=0)
    gradients = torch.autograd.grad((WEIGHTS * sol.value).sum(), leaves)
    torch.testing.assert_close(gradients[1][1::2], WEIGHTS.sum(0)[1::2])
    assert not gradients[0][1::2].any()
    assert not gradients[2][1::2].any()
    others = [x[::2].detach().clone().requires_grad_() for x in leaves]
    value = solved(*others, **options).value
    near = {"rtol": 1e-5, "atol": 1e-7} if name == "backsolve" else {"rtol": 1e-9, "atol": 1e-11}
    torch.testing.assert_close(sol.value[:, ::2], value, **near)
    wanted = torch.autograd.grad((WEIGHTS[:, ::2] * value).sum(), others)
    for gradient, alike in zip(gradients, wanted):
        torch.testing.assert_close(gradient[::2], alike, **near)
    assert counts == [len(row.unique()) for row in t]


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("count", [1, 3])
def test_all_series_may_be_of_one_time(name, count):
    t, y0 = torch.arange(4.0).double()[:, None].repeat(1, count).requires_grad_(), Y0.clone().requires_grad_()
    sol = solved(t, y0, RATES.clone().requires_grad_(), **CHOICES[name])
    assert torch.equal(sol.value, Y0.expand(count, -1, -1))
    assert torch.equal(torch.autograd.grad(sol.value.sum(), y0, retain_graph=True)[0], torch.ones_like(Y0) * count)
    assert torch.equal(sol.t, t[:, 0])
    assert sol.evaluations <= 3
    assert torch.equal(sol.interpolate(t[:, :1].detach()), Y0[None])
    with pytest.raises(ValueError, match="between the first and the last"):
        sol.interpolate(t[:, :1].detach() + 0.1)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_series_of_one_time_as_one_graph(traced):
    t, y0 = PADDED.clone(), Y0.clone().requires_grad_()
    t[1] = 0.7
    found, wanted = (solved(t, y0, RATES, compile=compile).value for compile in (True, False))
    torch.testing.assert_close(found, wanted)
    gradients = [torch.autograd.grad((WEIGHTS * value).sum(), y0)[0] for value in (found, wanted)]
    torch.testing.assert_close(*gradients)


def test_series_of_one_time_with_events_and_times_to_be_hit():
    seen, t, y0 = [], PADDED.clone().requires_grad_(), Y0.clone().requires_grad_()
    with torch.no_grad():
        t[1] = 0.5
    solver = im.Dopri5(tstops=(0.5,), progress=seen.append)
    sol = solved(t, y0, RATES, event=im.Event(lambda t, y, rate: y[:, 0]), solver=solver)
    assert torch.equal(sol.value[:, 1], Y0[1].expand(5, -1))
    assert sol.event_count[1] == 0
    assert sol.status[1] == im.Status.CONVERGED
    assert max(seen) == 1
    by_t, by_y0 = torch.autograd.grad(sol.value[:, 1].sum() + sol.t[1], (t, y0))
    assert by_t[1].tolist() == [1, 0, 0, 0, 0]
    assert by_y0[1].tolist() == [5, 5]


def test_a_layer_takes_series_of_one_time():
    layer = im.nn.NeuralODE(im.nn.Autonomous(nn.Linear(2, 2).double()), batch_dims=1)
    assert torch.equal(layer(Y0, t=PADDED[:, :1]), Y0[None])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_as_one_graph(traced):
    torch.testing.assert_close(solved(PADDED, Y0, RATES, compile=True).value, solved(PADDED, Y0, RATES).value)


def test_what_is_repeated_has_the_derivative_of_the_last_time():
    t = PADDED.clone().requires_grad_()
    value = solved(t, Y0, RATES).value
    (moved,) = torch.autograd.grad(value[-1, 2, 0], t)
    torch.testing.assert_close(moved[2, 1], value[-1, 2, 1], rtol=1e-5, atol=1e-6)  # its slope there
    assert torch.equal(moved[2, 2:], torch.zeros(3, dtype=torch.float64))


def test_interpolate_and_the_end_of_each_sample():
    sol = solved(PADDED, Y0, RATES)
    torch.testing.assert_close(sol.t, PADDED[:, -1])
    torch.testing.assert_close(sol.interpolate(PADDED), sol.value)


def test_many_repetitions_of_a_last_time_in_float32():
    t = torch.cat([torch.linspace(0, 1, 3), torch.ones(300)]).expand(2, -1).clone()
    t[1] = torch.linspace(0, 1, 303)
    value = im.odeint(lambda t, y: -y, torch.ones(2, 1), t, batch_dims=1).value
    torch.testing.assert_close(value[:3, 0, 0], torch.exp(-t[0, :3]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(value[3:, 0], value[2:3, 0].expand(300, 1))


@pytest.mark.parametrize(
    ("t", "message"),
    [
        ([[0.0, 1.0, 2.0], [0.0, 0.0, 2.0]], r"t\[0\] and t\[1\] of sample 1 are the same .* repeats its last"),
        ([[0.0, 1.0, 2.0], [0.0, 2.0, 1.0]], "t of sample 1 must increase throughout"),
        ([[1.0, 1.0 + 1e-7, 1.0 + 1e-7], [0.0, 1.0, 2.0]], r"t\[0\] repeats its last time 1 times, but .*float32"),
    ],
)
def test_what_is_no_series_is_refused(t, message):
    with pytest.raises(ValueError, match=message):
        im.odeint(lambda t, y: -y, torch.ones(2, 1), torch.tensor(t), batch_dims=1)


def test_times_that_all_samples_share_are_not_repeated():
    with pytest.raises(ValueError, match=r"t\[1\] and t\[2\] are the same"):
        im.odeint(lambda t, y: -y, torch.ones(1, 1), torch.tensor([0.0, 1.0, 1.0]), batch_dims=1)


def test_times_may_be_an_array():
    t = np.linspace(0, 1, 3)
    value = im.odeint(lambda t, y: -y, torch.ones(1), t).value
    torch.testing.assert_close(value, im.odeint(lambda t, y: -y, torch.ones(1), tuple(t)).value)


def test_transforms_of_torch_func():
    def ends(t):
        return (solved(t, Y0, RATES).value * WEIGHTS).sum()

    t = PADDED.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(ends(t), t)
    torch.testing.assert_close(torch.func.grad(ends)(PADDED), gradient)
    _, moved = torch.func.jvp(ends, (PADDED,), (torch.ones_like(PADDED),))
    torch.testing.assert_close(moved, gradient.sum())


@pytest.mark.parametrize("times", [[0.0, 1.0, 1.0], [0.0, 1.0, 0.5]])
def test_times_in_disorder_are_refused_under_vmap(times):
    t = torch.tensor([[0.0, 0.5, 1.0], times])
    with pytest.raises(ValueError, match=r"in each entry that torch\.vmap maps.*batch_dims=1"):
        torch.vmap(lambda t: im.odeint(lambda t, y: -y, torch.ones(2), t).value)(t)


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_a_lone_sample_may_repeat_its_last_time(kind):
    value = im.odeint(lambda t, y: -y, torch.ones(1, 1), kind([[0.0, 1.0, 1.0]]), batch_dims=1).value
    torch.testing.assert_close(
        value[:, 0, 0], torch.tensor([1.0, 1.0, 1.0]).mul(torch.tensor([0.0, -1, -1]).exp())
    )
    assert im.odeint(lambda t, y: -y, torch.ones(1, 1), kind([[0.5]]), batch_dims=1).value.tolist() == [[[1.0]]]
