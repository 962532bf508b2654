"""`NeuralODE`: what it solves, differentiates, counts, remembers, regularises and refuses."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import warnings
import weakref
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call, grad
from torch.testing import assert_close

import implicitly as im
from tests.problems import seeded

D = torch.float64
TIGHT = im.Dopri5(rtol=1e-10, atol=1e-12)
WIDTH = 3


def mlp(width=WIDTH, extra=0):
    return nn.Sequential(nn.Linear(width + extra, 4), nn.Tanh(), nn.Linear(4, width))


def fields():
    return {
        "autonomous": im.nn.Autonomous(mlp()),
        "concatenated": im.nn.ConcatTime(mlp(extra=1)),
        "gated": im.nn.TimeSequential(
            im.nn.GatedTime(nn.Linear(WIDTH, 4)), nn.Tanh(), im.nn.GatedTime(nn.Linear(4, WIDTH))
        ),
    }


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Linear(nn.Module):
    """dy/dt = A y."""

    def __init__(self, matrix):
        super().__init__()
        self.matrix = nn.Parameter(matrix)

    def forward(self, t, y):
        return y @ self.matrix.T


# -------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("batch_dims", [0, 1])
@pytest.mark.parametrize("name", fields())
def test_it_is_odeint(name, batch_dims):
    f, x = fields()[name], torch.randn(5, WIDTH)
    layer = im.nn.NeuralODE(f, (0.0, 0.7), batch_dims=batch_dims)
    expected = im.odeint(f, x, (0.0, 0.7), batch_dims=batch_dims)
    assert torch.equal(layer(x), expected.value[-1])
    assert torch.equal(layer.solution.steps, expected.steps)
    assert torch.equal(layer.solution.value, expected.value)
    times = (0.7, 0.3, 0.1)
    assert torch.equal(layer(x, t=times), im.odeint(f, x, times, batch_dims=batch_dims).value)
    assert layer(x).shape == x.shape  # the layer's own times were left as they were


@pytest.mark.parametrize("batch_dims", [0, 1])
@pytest.mark.parametrize("name", fields())
def test_gradients_against_finite_differences(name, batch_dims):
    layer = im.nn.NeuralODE(fields()[name], solver=im.Heun(dt=0.5), batch_dims=batch_dims).to(D)
    names, values = zip(*layer.named_parameters())
    x = torch.randn(2, WIDTH, dtype=D, requires_grad=True)

    def call(x, *values):
        return functional_call(layer, dict(zip(names, values)), (x,))

    assert torch.autograd.gradcheck(call, (x, *values), fast_mode=True, check_forward_ad=True)


def test_times_a_sample_and_learned_times():
    t = torch.tensor([[0.0, 1.0], [0.5, 2.0]], dtype=D, requires_grad=True)
    layer = im.nn.NeuralODE(Linear(-torch.eye(1, dtype=D)), t, TIGHT, batch_dims=1)
    x = torch.ones(2, 1, dtype=D)
    value = layer(x)
    assert_close(value[:, 0], torch.tensor([-1.0, -1.5], dtype=D).exp())
    value.sum().backward()
    assert_close(t.grad[:, 1], -value.detach()[:, 0])


@pytest.mark.parametrize("kind", [np.array, list, lambda rows: [torch.tensor(row, dtype=D) for row in rows]])
@pytest.mark.parametrize("regularisers", [[], [im.nn.KineticEnergy()]], ids=["", "regularised"])
def test_series_of_different_lengths_in_one_batch(kind, regularisers):
    rows = [[0.0, 0.5, 1.0, 2.0], [0.2, 0.3, 0.9, 0.9]]  # the second one is shorter
    t = kind(rows)
    layer = im.nn.NeuralODE(Linear(-torch.eye(2, dtype=D)), t, TIGHT, batch_dims=1, regularisers=regularisers)
    x = torch.tensor([[1.0, 2.0], [3.0, -1.0]], dtype=D)
    value, integrals = layer(x) if regularisers else (layer(x), ())
    times = torch.tensor(rows, dtype=D)
    assert_close(value, x * torch.exp(times[:, 0] - times.T).unsqueeze(2))
    for energy in integrals:
        assert_close(energy, x.square().sum(1) * (1 - torch.exp(2 * (times[:, 0] - times[:, -1]))) / 2)


def test_times_follow_the_dtype_of_x():
    layer = im.nn.NeuralODE(im.nn.Autonomous(mlp()), torch.tensor([0.0, 0.5, 1.0])).to(D)
    value = layer(torch.randn(2, WIDTH, dtype=D))
    assert (value.dtype, value.shape) == (D, (3, 2, WIDTH))
    low = layer.to(torch.bfloat16)
    low.solver = im.Dopri5(rtol=3e-2, atol=1e-2)
    assert low(torch.randn(2, WIDTH).bfloat16()).dtype == torch.bfloat16


def test_further_arguments_and_pytrees():
    class Oscillator(nn.Module):
        def forward(self, t, y, stiffness):
            return {"x": y["v"], "v": -stiffness * y["x"]}

    layer = im.nn.NeuralODE(Oscillator(), (0.0, math.pi / 2), TIGHT)
    stiffness = torch.tensor(4.0, dtype=D, requires_grad=True)
    end = layer({"x": torch.ones(1, dtype=D), "v": torch.zeros(1, dtype=D)}, stiffness)
    assert_close(end["x"], torch.full((1,), -1.0, dtype=D))
    (slope,) = torch.autograd.grad(end["v"].sum(), stiffness)  # v = -sqrt(k) sin(sqrt(k) t)
    assert_close(slope, torch.tensor(math.pi / 4, dtype=D))


# -------------------------------------------------------------------------------------------- augmentation


@pytest.mark.parametrize("batch_dims", [0, 1])
def test_augmented_entries_start_at_zero_and_stay_in_the_output(batch_dims):
    matrix = torch.randn(WIDTH + 2, WIDTH + 2, dtype=D)
    layer = im.nn.NeuralODE(Linear(matrix), solver=TIGHT, augment=2, batch_dims=batch_dims)
    x = torch.randn(4, WIDTH, dtype=D)
    expected = torch.cat([x, x.new_zeros(4, 2)], dim=1) @ torch.linalg.matrix_exp(matrix).T
    assert_close(layer(x), expected, rtol=1e-7, atol=1e-8)
    assert torch.equal(layer.solution.value[0, :, WIDTH:], x.new_zeros(4, 2))


@pytest.mark.parametrize("batch_dims", [0, 1])
def test_augmented_channels_of_images(batch_dims):
    f = im.nn.TimeSequential(
        im.nn.ConcatTime(nn.Conv2d(6, 4, 3, padding=1)),
        nn.Softplus(),
        im.nn.GatedTime(nn.Conv2d(4, 5, 1)),
    )
    layer = im.nn.NeuralODE(f, augment=2, batch_dims=batch_dims)
    assert layer(torch.randn(2, 3, 4, 6)).shape == (2, 5, 4, 6)


# ------------------------------------------------------------------------------------ times in vector fields


def test_concatenated_time_is_the_last_input():
    net = nn.Linear(WIDTH + 1, WIDTH)
    y, t = torch.randn(4, WIDTH), torch.tensor([0.0, 1.0, 2.0, 3.0])
    expected = y @ net.weight[:, :WIDTH].T + net.bias + t[:, None] * net.weight[:, WIDTH]
    assert_close(im.nn.ConcatTime(net)(t[:, None], y), expected)
    assert_close(im.nn.ConcatTime(net)(t[2], y)[2], expected[2])
    sequences = torch.randn(2, 5, WIDTH)
    assert im.nn.ConcatTime(net, dim=-1)(torch.tensor(0.5), sequences).shape == sequences.shape


def test_gated_time_is_the_formula():
    layer = im.nn.GatedTime(nn.Linear(WIDTH, 2))
    y, t = torch.randn(4, WIDTH), torch.tensor([0.0, 1.0, 2.0, 3.0])
    gate = torch.sigmoid(t[:, None] * layer.gate.weight[:, 0] + layer.gate.bias)
    expected = layer.layer(y) * gate + t[:, None] * layer.bias.weight[:, 0]
    assert_close(layer(t[:, None], y), expected)
    assert_close(layer(t[2], y)[2], expected[2])
    assert_close(layer(t[2], y[2]), expected[2])
    image = im.nn.GatedTime(nn.Conv2d(1, 2, 1))
    x = torch.randn(3, 1, 4, 5)
    each = [image(s, x[i : i + 1]) for i, s in enumerate(t[:3])]
    assert_close(image(t[:3].reshape(3, 1, 1, 1), x), torch.cat(each))
    with pytest.raises(TypeError, match="out_features or out_channels, got a Tanh"):
        im.nn.GatedTime(nn.Tanh())


# ------------------------------------------------------------------------------------------------ counting


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = mlp()
        self.calls = 0

    def forward(self, t, y):
        self.calls += 1
        return self.net(y)


@pytest.mark.parametrize("batch_dims", [0, 1])
def test_calls_of_f_are_counted(batch_dims):
    f = Counting()
    layer, x = im.nn.NeuralODE(f, batch_dims=batch_dims), torch.randn(4, WIDTH)
    value = layer(x)
    assert layer.evaluations == f.calls == layer.solution.evaluations > 0
    assert layer.backward_evaluations == 0
    forward, f.calls = f.calls, 0
    value.sum().backward()
    assert layer.backward_evaluations == f.calls > 0
    assert layer.evaluations == forward
    with torch.no_grad():
        layer(x)
    assert layer.backward_evaluations == 0


def test_counts_are_of_the_last_forward_pass():
    layer, x = im.nn.NeuralODE(Counting()), torch.randn(4, WIDTH)
    early = layer(x)
    layer(x).sum().backward()
    counted = layer.backward_evaluations
    early.sum().backward()
    assert layer.backward_evaluations == counted > 0


def test_an_unrolled_backward_pass_calls_nothing():
    layer = im.nn.NeuralODE(Counting(), adjoint=im.UnrolledAdjoint())
    layer(torch.randn(4, WIDTH)).sum().backward()
    assert layer.backward_evaluations == 0 < layer.evaluations


def test_tolerances_may_change_after_training():
    exact = im.nn.NeuralODE(Linear(torch.tensor([[0.0, 9.0], [-9.0, 0.0]], dtype=D)), solver=TIGHT)
    x = torch.tensor([[1.0, 0.0]], dtype=D)
    best, calls = exact(x).detach(), exact.evaluations
    exact.solver = replace(exact.solver, rtol=1e-3, atol=1e-5)
    loose = exact(x).detach()
    assert exact.evaluations < calls / 5
    assert 1e-6 < (loose - best).abs().max() < 1e-1
    exact.solver = im.Euler(dt=0.01)
    exact(x)
    assert exact.evaluations == 101


# ------------------------------------------------------------------------------------------- as a module


def test_its_parameters_and_state_are_those_of_f():
    f = im.nn.Autonomous(mlp())
    layer = im.nn.NeuralODE(f, torch.tensor([0.0, 1.0]), regularisers=[im.nn.KineticEnergy()])
    layer(torch.randn(2, WIDTH))[0].sum().backward()
    assert [id(p) for p in layer.parameters()] == [id(p) for p in f.parameters()]
    assert set(layer.state_dict()) == {"f." + k for k in f.state_dict()}
    assert not layer.eval().f.net.training
    assert layer.train().f.net.training


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_compute_the_same_and_share_nothing(copied):
    generator = seeded(4)
    layer = im.nn.NeuralODE(im.nn.Autonomous(mlp()), regularisers=[im.nn.JacobianFrobenius(generator)])
    x = torch.randn(3, WIDTH)
    sum(v.sum() for v in layer(x)[1]).backward()
    other = copied(layer)
    assert (other.evaluations, other.backward_evaluations) == (layer.evaluations, layer.backward_evaluations)
    (value, penalties), (expected, expected_penalties) = other(x), layer(x)
    assert torch.equal(value, expected)
    assert torch.equal(penalties[0], expected_penalties[0])
    with torch.no_grad():
        other.f.net[0].weight.mul_(0.5)
    assert torch.equal(layer(x)[0], expected)
    assert not torch.equal(other(x)[0], expected)


def test_nothing_of_a_step_outlives_it():
    layer = im.nn.NeuralODE(im.nn.Autonomous(mlp()), regularisers=[im.nn.KineticEnergy()])
    gone = []
    for step in range(4):
        x = torch.randn(3, WIDTH, requires_grad=True)
        value, (energy,) = layer(x)
        if step % 2:
            (value.sum() + energy.sum()).backward()
        layer.zero_grad()
        gone += [weakref.ref(t) for t in (x, value, energy)]
        del x, value, energy
    gc.collect()
    assert not [r for r in gone if r() is not None]
    assert not layer.solution.value.requires_grad


def test_under_func_grad():
    layer, x = (
        im.nn.NeuralODE(im.nn.Autonomous(mlp()), regularisers=[im.nn.KineticEnergy()]),
        torch.randn(3, WIDTH),
    )

    def loss(parameters):
        value, (energy,) = functional_call(layer, parameters, (x,))
        return value.sin().sum() + energy.sum()

    got = grad(loss)(dict(layer.named_parameters()))
    assert not torch._C._functorch.is_functorch_wrapped_tensor(layer.solution.value)
    loss(dict(layer.named_parameters())).backward()
    for name, p in layer.named_parameters():
        assert_close(got[name], p.grad, atol=1e-5, rtol=1e-4)


def test_failures_are_reported_as_asked():
    class Blowing(nn.Module):
        def forward(self, t, y):
            return y**2

    x = torch.tensor([[0.1], [2.0]])
    with pytest.raises(im.SolverError, match="1 of 2 samples"):
        im.nn.NeuralODE(Blowing(), batch_dims=1)(x)
    with pytest.warns(im.ConvergenceWarning):
        im.nn.NeuralODE(Blowing(), batch_dims=1, on_failure="warn")(x)
    layer = im.nn.NeuralODE(Blowing(), batch_dims=1, on_failure="ignore")
    assert layer(x).isnan().tolist() == [[False], [True]]
    assert layer.solution.converged.tolist() == [True, False]


# ------------------------------------------------------------------------------------- finished samples dropped


class Fading(nn.Module):
    """dy/dt = -a y, counting the samples that it is called for."""

    def __init__(self):
        super().__init__()
        self.rows = 0

    def forward(self, t, y, a=1.0):
        self.rows += len(y)
        return -a * y


class OneLong:
    """Fifteen samples that soon end and one that does not, and how many rows f is asked for."""

    def __init__(self, **options):
        self.counted = Fading()
        ends = torch.full((16,), 1e-3, dtype=D)
        ends[5] = 20.0
        times = torch.stack([torch.zeros_like(ends), ends], 1)
        self.layer = im.nn.NeuralODE(self.counted, times, TIGHT, batch_dims=1, **options)
        self.x = torch.linspace(1, 2, 48, dtype=D).reshape(16, 3)

    def rows(self, *args):
        self.counted.rows = 0
        self.layer(self.x, *args)
        return self.counted.rows


RATES = torch.linspace(1, 2, 16, dtype=D)[:, None]


def test_finished_samples_are_dropped_where_it_is_said_which_args_hold_them():
    alone = OneLong().rows()
    unknown = OneLong().rows(RATES)
    assert unknown > 10 * alone
    for in_dims in (0, (0,), [0]):
        told = OneLong(in_dims=in_dims)
        assert told.rows(RATES) < 2 * alone
        assert_close(told.layer(told.x, RATES), told.x * (-RATES * told.layer.t[:, 1:]).exp())
    assert OneLong(in_dims=(None,)).rows(RATES[:1]) < 2 * alone
    assert OneLong().rows(1.5) < 2 * alone  # a number holds no sample


def test_the_noise_of_regularisers_is_dropped_with_its_samples():
    alone = OneLong(regularisers=[im.nn.KineticEnergy()]).rows()
    for in_dims, args in ((None, ()), (0, (RATES,))):
        noisy = OneLong(regularisers=both(), in_dims=in_dims)
        assert noisy.rows(*args) < 3 * alone  # the estimate calls f once more each time
        _, (energy, squares) = noisy.layer(noisy.x, *args)
        rate, time = (args[0] if args else torch.ones_like(RATES)), noisy.layer.t[:, 1:]
        assert_close(squares, (3 * rate.square() * time).squeeze(1))
        assert_close(energy, (noisy.x.square() * rate * (1 - (-2 * rate * time).exp()) / 2).sum(1))


def test_what_is_drawn_may_be_shared():
    @dataclass(frozen=True)
    class Shared(im.nn.Regulariser):
        sample_dim = None

        def draw(self, y):
            return torch.arange(3.0, dtype=D)

        def rate(self, f, t, y, dy, drawn):
            return (0 * y + drawn).sum(1)

    shared = OneLong(regularisers=[Shared()])
    assert shared.rows() < 2 * OneLong(regularisers=[im.nn.KineticEnergy()]).rows()
    assert_close(shared.layer(shared.x)[1][0], 3 * shared.layer.t[:, 1])


def test_what_is_decided_once_is_dropped_with_its_samples():
    dropout = im.nn.Dropout(0.5)

    class Masked(Fading):
        def __init__(self):
            super().__init__()
            self.dropout = dropout

        def forward(self, t, y, a=1.0):
            return self.dropout(super().forward(t, y, a))

    for args, options in (((), {}), ((RATES,), {"in_dims": 0})):
        masked = OneLong(**options)
        masked.layer.f = masked.counted = Masked()
        torch.manual_seed(5)
        assert masked.rows(*args) < 2 * OneLong().rows() + 16
        torch.manual_seed(5)
        mask = dropout.decide(masked.x)
        torch.manual_seed(5)
        value = masked.layer(masked.x, *args)
        rate = args[0] if args else 1.0
        assert_close(value, masked.x * (-rate * mask * masked.layer.t[:, 1:]).exp())


def test_a_buffer_of_f_may_hold_the_samples():
    class Buffered(Fading):
        def __init__(self):
            super().__init__()
            self.register_buffer("rates", RATES)

        def forward(self, t, y):
            return super().forward(t, y, self.rates)

    for regularisers in ((), both()):
        own = OneLong(regularisers=regularisers)
        own.layer.f = own.counted = Buffered()
        value = own.layer(own.x)
        value = value[0] if regularisers else value
        assert_close(value, own.x * (-RATES * own.layer.t[:, 1:]).exp())


def test_in_dims_that_cannot_be_meant_are_refused():
    with pytest.raises(ValueError, match="batch_dims=0 means one system"):
        im.nn.NeuralODE(Fading(), in_dims=0)
    with pytest.raises(ValueError, match=r"in_dims=\(0, None\) has 2 entries, but f gets 1 args"):
        OneLong(in_dims=(0, None)).rows(RATES)
    with pytest.raises(ValueError, match="which must have 16 entries there"):
        OneLong(in_dims=0).rows(RATES[:3])


# --------------------------------------------------------------------------------------- decided once a solve


@pytest.mark.parametrize("batch_dims", [0, 1])
def test_one_dropout_mask_a_solve(batch_dims):
    dropout = im.nn.Dropout(0.5)
    layer = im.nn.NeuralODE(im.nn.Autonomous(nn.Sequential(mlp(), dropout)), solver=TIGHT, batch_dims=batch_dims)
    layer.to(D)
    x = torch.randn(6, WIDTH, dtype=D, requires_grad=True)
    moved = (layer(x) - x) != 0  # a masked slope moves nothing, all the way
    assert 0 < int(moved.sum()) < moved.numel()
    assert int(layer.evaluations) == layer.solution.evaluations + 1
    assert not torch.equal((layer(x) - x) != 0, moved)
    layer.eval()
    assert bool(((layer(x) - x) != 0).all())
    assert int(layer.evaluations) == layer.solution.evaluations + 1

    # The gradient knows the mask that was used.
    layer.train()
    torch.manual_seed(5)
    (got,) = torch.autograd.grad(layer(x).sum(), x)
    torch.manual_seed(5)
    mask = dropout.decide(x)
    (expected,) = torch.autograd.grad(
        im.odeint(lambda t, y: mask * layer.f.net[0](y), x, (0.0, 1.0)).value[-1].sum(), x
    )
    assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("batch_dims", [0, 1])
def test_batch_norm_has_the_statistics_of_the_start(batch_dims):
    norm = im.nn.BatchNorm(WIDTH)
    layer = im.nn.NeuralODE(im.nn.Autonomous(norm), (0.0, 1.0), TIGHT, batch_dims=batch_dims).to(D)
    x = torch.randn(6, WIDTH, dtype=D, requires_grad=True)
    value = layer(x)
    # dy/dt = s (y - m) with m and s of x.
    variance, mean = torch.var_mean(x, 0, correction=0)
    exact = mean + (x - mean) * ((variance + norm.eps).rsqrt()).exp()
    assert_close(value, exact)
    weight = torch.randn_like(x)
    got, expected = (torch.autograd.grad((weight * v).sum(), x, retain_graph=True)[0] for v in (value, exact))
    assert_close(got, expected)
    assert_close(norm.running_mean, 0.1 * mean.detach())  # updated once


# ------------------------------------------------------------------------------------------------ regularisers


@pytest.mark.parametrize("batch_dims", [0, 1])
def test_kinetic_energy_of_a_decay(batch_dims):
    rates = torch.tensor([0.5, 1.0, 2.0], dtype=D)
    layer = im.nn.NeuralODE(
        Linear(-rates.diag()), solver=TIGHT, batch_dims=batch_dims, regularisers=[im.nn.KineticEnergy()]
    )
    x = torch.randn(4, WIDTH, dtype=D)
    value, (energy,) = layer(x)
    assert_close(value, x * (-rates).exp())
    # |f|^2 = sum (r x)^2 e^(-2 r t)
    assert_close(energy, (x**2 * rates * (1 - (-2 * rates).exp()) / 2).sum(1))


@pytest.mark.parametrize("batch_dims", [0, 1])
def test_jacobian_of_a_diagonal_field_is_known_from_any_signs(batch_dims):
    rates = torch.tensor([0.5, 1.0, 2.0], dtype=D)
    regulariser = im.nn.JacobianFrobenius(seeded(0))
    layer = im.nn.NeuralODE(
        Linear(-rates.diag()), (0.0, 2.0), TIGHT, batch_dims=batch_dims, regularisers=[regulariser]
    )
    state = torch.get_rng_state()
    _, (squares,) = layer(torch.randn(4, WIDTH, dtype=D, generator=seeded(1)))
    assert_close(squares, torch.full((4,), 2 * float(rates.square().sum()), dtype=D))
    assert torch.equal(torch.get_rng_state(), state)  # PyTorch's global generator was left alone
    assert layer.evaluations == 2 * layer.solution.evaluations


def test_the_jacobian_is_estimated_without_bias():
    matrix = torch.randn(WIDTH, WIDTH, dtype=D)
    regulariser = im.nn.JacobianFrobenius(seeded(0))
    layer = im.nn.NeuralODE(Linear(matrix), solver=im.RK4(dt=0.5), regularisers=[regulariser])
    _, (squares,) = layer(torch.randn(20_000, WIDTH, dtype=D))
    exact = float(matrix.square().sum())
    assert squares.std() > 0.1 * exact
    squares = squares.detach()
    assert abs(float(squares.mean()) - exact) < 4 * float(squares.std()) / 20_000**0.5


def both():
    return (im.nn.KineticEnergy(), im.nn.JacobianFrobenius(seeded(0)))


@pytest.mark.parametrize("batch_dims", [0, 1])
def test_penalties_are_differentiable(batch_dims):
    f = im.nn.ConcatTime(mlp(extra=1))
    layer = im.nn.NeuralODE(f, solver=im.RK4(dt=0.5), augment=1, batch_dims=batch_dims).to(D)
    layer.f = im.nn.ConcatTime(mlp(WIDTH + 1, extra=1)).to(D)
    names, values = zip(*layer.named_parameters())
    x = torch.randn(2, WIDTH, dtype=D, requires_grad=True)

    def call(x, *values):
        layer.regularisers = both()
        value, penalties = functional_call(layer, dict(zip(names, values)), (x,))
        assert [p.shape for p in penalties] == [(2,), (2,)]
        return value, *penalties

    assert torch.autograd.gradcheck(call, (x, *values), fast_mode=True)


@pytest.mark.parametrize("batch_dims", [0, 1])
def test_regularisers_change_neither_steps_nor_states(batch_dims):
    @dataclass(frozen=True)
    class Wild(im.nn.Regulariser):
        def rate(self, f, t, y, dy, drawn):
            return 1e6 * torch.sin(200 * y).sum(1)

    layer = im.nn.NeuralODE(im.nn.Autonomous(mlp()), (0.0, 0.5, 3.0), batch_dims=batch_dims).to(D)
    x = torch.randn(5, WIDTH, dtype=D)
    plain, steps = layer(x), layer.solution.steps
    layer.regularisers = (Wild(),)
    value, (integral,) = layer(x)
    assert torch.equal(layer.solution.steps, steps)
    assert_close(value, plain, rtol=1e-13, atol=1e-13)
    assert integral.abs().max() > 1e3
    assert layer.solution.value.shape == value.shape == (3, 5, WIDTH)


def test_penalties_of_states_without_features_and_of_complex_ones():
    class Turning(nn.Module):
        def forward(self, t, y):
            return 2j * y if y.is_complex() else -y

    layer = im.nn.NeuralODE(Turning(), solver=TIGHT, batch_dims=1, regularisers=[im.nn.KineticEnergy()])
    _, (energy,) = layer(torch.tensor([1.0, 2.0], dtype=D))
    assert_close(energy, torch.tensor([1.0, 4.0], dtype=D) * (1 - math.exp(-2)) / 2)
    _, (energy,) = layer(torch.tensor([[1.0 + 1j, 0.0]], dtype=torch.complex128))
    assert_close(energy, torch.tensor([8.0], dtype=D))


@pytest.mark.parametrize("batch_dims", [0, 1])
@pytest.mark.parametrize("shape", [(0, WIDTH), (3, 0), (0, 0)])
def test_penalties_without_samples_or_features_are_zero(batch_dims, shape):
    drawn = [im.nn.Divergence(seeded(0)), im.nn.JacobianFrobenius(seeded(0))]
    regularisers = [im.nn.KineticEnergy(), im.nn.Divergence(), im.nn.TaylorPenalty(2), *drawn]
    f = im.nn.Autonomous(nn.Tanh())
    layer = im.nn.NeuralODE(f, batch_dims=batch_dims, regularisers=regularisers)
    x = torch.zeros(shape, dtype=D, requires_grad=True)
    value, integrals = layer(x)
    (value.sum() + sum(integrals).sum()).backward()
    assert x.grad.shape == value.shape == shape
    assert all(torch.equal(p, torch.zeros(shape[0], dtype=D)) for p in integrals)


# ------------------------------------------------------------------------------------------------ divergence


@pytest.mark.parametrize("batch_dims", [0, 1])
@pytest.mark.parametrize("augment", [0, 1])
def test_the_divergence_integrates_to_the_log_determinant_of_the_flow(batch_dims, augment):
    torch.manual_seed(3)
    f = im.nn.ConcatTime(mlp(WIDTH + augment, extra=1)).to(D)
    options = {"batch_dims": batch_dims, "regularisers": [im.nn.Divergence()]}
    layer = im.nn.NeuralODE(f, (1.0, 0.0), TIGHT, augment=augment, **options)
    x = torch.randn(4, WIDTH, dtype=D)
    value, (log_det,) = layer(x)

    def flow(start):
        return im.odeint(f, start[None], (1.0, 0.0), solver=TIGHT).value[-1, 0]

    starts = torch.cat([x, x.new_zeros(4, augment)], dim=1)
    expected = torch.stack([torch.linalg.slogdet(torch.func.jacrev(flow)(s)).logabsdet for s in starts])
    assert value.shape == starts.shape
    assert_close(log_det, expected, rtol=0, atol=1e-7)
    assert expected.abs().max() > 1e-2


def test_the_trace_of_a_state_of_channels_is_estimated_without_bias():
    matrix = torch.randn(6, 6, dtype=D)

    class Mixed(nn.Module):
        def forward(self, t, y):
            return (y.flatten(1) @ matrix.T).view_as(y)

    x = torch.randn(20_000, 2, 3, dtype=D)
    exact, estimate = im.nn.Divergence(), im.nn.Divergence(seeded(0))
    layer = im.nn.NeuralODE(Mixed(), solver=im.RK4(dt=0.5), regularisers=[exact, estimate])
    state = torch.get_rng_state()
    _, (trace, noisy) = layer(x)
    assert torch.equal(torch.get_rng_state(), state)  # PyTorch's global generator was left alone
    assert_close(trace, matrix.trace().expand(20_000))
    assert noisy.std() > 0.1
    assert abs(float(noisy.mean() - matrix.trace())) < 4 * float(noisy.std()) / 20_000**0.5


@pytest.mark.parametrize("batch_dims", [0, 1])
@pytest.mark.parametrize("drawn", [False, True])
def test_the_divergence_is_differentiable(batch_dims, drawn):
    f = im.nn.ConcatTime(mlp(extra=1)).to(D)
    layer = im.nn.NeuralODE(f, solver=im.RK4(dt=0.5), batch_dims=batch_dims)
    names, values = zip(*layer.named_parameters())
    x = torch.randn(2, WIDTH, dtype=D, requires_grad=True)

    def call(x, *values):
        layer.regularisers = (im.nn.Divergence(seeded(0) if drawn else None),)
        value, (log_det,) = functional_call(layer, dict(zip(names, values)), (x,))
        return value, log_det

    assert torch.autograd.gradcheck(call, (x, *values), fast_mode=True)


def test_what_has_no_divergence_is_refused():
    with pytest.raises(TypeError, match=r"Divergence needs a torch\.Generator, or None .*, got 0"):
        im.nn.Divergence(0)
    layer = im.nn.NeuralODE(im.nn.Autonomous(nn.Identity()), regularisers=[im.nn.Divergence()])
    with pytest.raises(TypeError, match="Divergence: y is complex"):
        layer(torch.ones(2, 3, dtype=torch.complex64))


# ------------------------------------------------------------------------------------------------ warnings


@pytest.mark.parametrize("kinked", [nn.ReLU(), nn.LeakyReLU(), nn.PReLU(), nn.ReLU6(), nn.Hardtanh(), nn.SELU()])
def test_kinked_activations_are_named(kinked):
    with pytest.warns(im.nn.SmoothnessWarning, match=rf"{type(kinked).__name__} \(net\.1\).*nn\.Softplus") as seen:
        im.nn.NeuralODE(im.nn.Autonomous(nn.Sequential(nn.Linear(2, 2), kinked)))
    assert len(seen) == 1
    assert seen[0].filename == __file__


@pytest.mark.parametrize("smooth", [nn.Softplus(), nn.Tanh(), nn.SiLU(), nn.GELU(), nn.ELU()])
def test_smooth_activations_are_not(smooth):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        im.nn.NeuralODE(im.nn.Autonomous(nn.Sequential(nn.Linear(2, 2), smooth)))


@pytest.mark.parametrize("batch_dims", [0, 1])
@pytest.mark.parametrize("kinked", [torch.relu, nn.functional.leaky_relu, nn.functional.hardtanh])
def test_kinked_functions_are_named_once(kinked, batch_dims):
    class Field(nn.Module):
        def forward(self, t, y):
            return -kinked(y)

    layer, x = im.nn.NeuralODE(Field(), batch_dims=batch_dims), torch.randn(3, 2, requires_grad=True)
    with pytest.warns(im.nn.SmoothnessWarning, match=f"f calls {kinked.__name__}, whose") as seen:
        layer(x).sum().backward()
    assert len(seen) == 1
    assert seen[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(x).sum().backward()
        im.nn.NeuralODE(im.nn.Autonomous(nn.Sequential(nn.Linear(2, 2), nn.GELU())))(x).sum().backward()


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"f": torch.sin}, TypeError, "nn.Module"),
        ({"augment": -1}, ValueError, "augment"),
        ({"augment": 1.5}, ValueError, "augment"),
        ({"t": (0.0,)}, ValueError, r"\(T,\) with T >= 2"),
        ({"t": 1.0}, TypeError, "got a float"),
        ({"t": (0.0, 1.0, 0.5)}, ValueError, "increase throughout"),
        ({"t": (0.0, math.nan)}, ValueError, "finite"),
        ({"t": torch.zeros(2, 2)}, ValueError, "shape"),
        ({"batch_dims": 2}, ValueError, "batch_dims"),
        ({"on_failure": "shout"}, ValueError, "on_failure"),
        ({"regularisers": (1.0,)}, TypeError, "KineticEnergy"),
    ],
)
def test_what_cannot_be_meant_is_refused_at_construction(wrong, error, message):
    with pytest.raises(error, match=message):
        im.nn.NeuralODE(**{"f": im.nn.Autonomous(mlp()), **wrong})


def test_what_only_x_shows_is_refused_at_the_call():
    f = im.nn.Autonomous(mlp())
    with pytest.raises(ValueError, match=r"augment needs x to be one tensor \(B, n, \.\.\.\), got shape \(3,\)"):
        im.nn.NeuralODE(f, augment=1)(torch.randn(3))
    with pytest.raises(ValueError, match="regularisers needs x to be one tensor"):
        im.nn.NeuralODE(f, regularisers=both())((torch.randn(3),))
    solver = im.Dopri5(rtol=torch.full((WIDTH,), 1e-3))
    with pytest.raises(ValueError, match="rtol must be a single number"):
        im.nn.NeuralODE(f, solver=solver, regularisers=both())(torch.randn(2, WIDTH))
    with pytest.raises(TypeError, match="t must be a tensor, an array or a sequence of times, got a float"):
        im.nn.NeuralODE(f)(torch.randn(2, WIDTH), t=1.0)
    with pytest.raises(TypeError, match="y0 must hold tensors only, got a float"):
        im.nn.NeuralODE(f)([1.0])
    with pytest.raises(TypeError, match="solver must be a method"):
        im.nn.NeuralODE(f, solver=im.Anderson())(torch.randn(2, WIDTH))
    with pytest.raises(TypeError, match="solver must be a method"):
        im.nn.NeuralODE(f, solver=im.Anderson(), regularisers=both())(torch.randn(2, WIDTH))
    with pytest.raises(ValueError, match=r"no longer a pair \(q, p\), which Leapfrog needs"):
        im.nn.NeuralODE(f, solver=im.Leapfrog(dt=0.1), regularisers=both())(torch.randn(2, WIDTH))
    with pytest.raises(ValueError, match=r"y of shape \(2,\) has no dimension 1 to which time .*dim=-1"):
        im.nn.NeuralODE(im.nn.ConcatTime(nn.Linear(3, 2)))(torch.randn(2))
    with pytest.raises(TypeError, match=r"torch\.Generator, got a int"):
        im.nn.JacobianFrobenius(0)
