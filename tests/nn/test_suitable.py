"""What cannot be a cell or a vector field is told apart where it can be seen."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.testing import assert_close

import implicitly as im


class Around(nn.Module):
    """A contraction of z by way of `inner`; as a vector field, of y."""

    def __init__(self, inner):
        super().__init__()
        self.linear, self.inner = nn.Linear(4, 4), inner

    def forward(self, z, x):
        return 0.2 * torch.tanh(self.inner(self.linear(z))) + 0.1 * x


class Field(Around):
    def forward(self, t, y):
        return super().forward(y, 0.0 * y)


def called(layer):
    """A forward pass whose solve may fall short: that is not what is looked at."""
    layer.on_failure = "ignore"
    return layer(torch.randn(6, 4))


class Attention(nn.MultiheadAttention):
    def forward(self, z):
        return super().forward(z[:, None], z[:, None], z[:, None], need_weights=False)[0][:, 0]


@pytest.mark.parametrize(("layer", "module"), [(im.nn.DEQ, Around), (im.nn.NeuralODE, Field)])
@pytest.mark.parametrize(
    ("inner", "named"),
    [
        (lambda: nn.Dropout(0.1), r"Dropout \(inner\)"),
        (lambda: nn.Sequential(nn.Tanh(), nn.AlphaDropout(0.1)), r"AlphaDropout \(inner\.1\)"),
        (lambda: Attention(4, 2, dropout=0.1, batch_first=True), r"Attention \(inner\)"),
        (lambda: spectral_norm(nn.Linear(4, 4)), r"_SpectralNorm \(inner\.parametrizations\.weight\.0\)"),
        (lambda: nn.utils.spectral_norm(nn.Linear(4, 4)), r"spectral_norm of Linear \(inner\)"),
    ],
)
def test_what_draws_or_iterates_in_every_call_is_told_of_once(layer, module, inner, named):
    layer = layer(module(inner()))
    if isinstance(layer, im.nn.NeuralODE):  # adaptive steps would become ever smaller
        layer.solver = im.RK4(dt=0.5)
    with pytest.warns(
        im.nn.PerCallWarning, match=f"in training mode, {named} changes the function .* implicitly.nn"
    ) as seen:
        called(layer)
    assert len(seen) == 1
    assert seen[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        called(layer)


def test_slopes_that_are_drawn_in_every_call_are_told_of():
    with pytest.warns(im.nn.PerCallWarning, match=r"in training mode, RReLU \(inner\) changes the function"):
        called(im.nn.DEQ(Around(nn.RReLU())))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        called(im.nn.DEQ(Around(nn.RReLU(0.2, 0.2))))


@pytest.mark.parametrize(("layer", "module"), [(im.nn.DEQ, Around), (im.nn.NeuralODE, Field)])
def test_batch_norm_in_training_is_told_of_where_samples_are_solved_one_by_one(layer, module):
    few = im.FixedPointIteration(rtol=0, max_steps=3) if layer is im.nn.DEQ else im.RK4(dt=0.5)
    with pytest.warns(im.nn.PerCallWarning, match=r"BatchNorm1d \(inner\)"):
        called(layer(module(nn.BatchNorm1d(4)), solver=few, batch_dims=1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        called(layer(module(nn.BatchNorm1d(4)), batch_dims=0))


@pytest.mark.parametrize(("layer", "module"), [(im.nn.DEQ, Around), (im.nn.NeuralODE, Field)])
@pytest.mark.parametrize(
    "inner",
    [
        lambda: nn.Dropout(0.0),
        lambda: nn.Dropout(0.5).eval(),
        lambda: nn.BatchNorm1d(4).eval(),
        lambda: Attention(4, 2, batch_first=True),
        lambda: im.nn.Dropout(0.1),
        lambda: im.nn.BatchNorm(4),
        lambda: im.nn.SpectralNorm(nn.Linear(4, 4)),
        lambda: nn.utils.spectral_norm(nn.Linear(4, 4)).eval(),
    ],
)
def test_what_is_one_function_through_a_solve_is_not(layer, module, inner):
    layer = layer(module(inner()), batch_dims=1)
    called(layer)
    called(layer.eval())


def test_a_layer_that_begins_in_evaluation_is_looked_at_when_it_trains():
    layer = im.nn.NeuralODE(Field(nn.Dropout(0.1))).eval()
    called(layer)
    with pytest.warns(im.nn.PerCallWarning, match="Dropout"):
        called(layer.train())


@pytest.mark.parametrize("plain", [nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Tanh())])
def test_a_network_of_one_input_is_refused_with_the_way_to_wrap_it(plain):
    does_not = r"but \w+\.forward\(input\) does not take two\. "
    with pytest.raises(TypeError, match=r"NeuralODE calls f\(t, y\), " + does_not + "Autonomous"):
        im.nn.NeuralODE(plain)
    with pytest.raises(TypeError, match=r"DEQ calls cell\(z, x\), " + does_not + "Write a module"):
        im.nn.DEQ(plain)


def test_a_cell_that_is_not_written_in_python_has_no_signature_to_look_at():
    class Cell(nn.Module):
        forward = staticmethod(torch.atan2)

    x = torch.full((3, 2), 2.0)
    assert_close(im.nn.DEQ(Cell())(x, torch.ones(3, 2)), torch.zeros(3, 2), rtol=0, atol=1e-4)


@pytest.mark.parametrize("solver", ["anderson", im.Anderson, im.Dopri5()])
def test_what_is_no_solver_is_refused_at_construction(solver):
    with pytest.raises(TypeError, match=r"DEQ: solver must be a solver such as im\.Anderson\(\), got"):
        im.nn.DEQ(Around(nn.Tanh()), solver=solver)


def equilibrium(f, **how):
    return im.fixed_point(lambda z, x: 0.1 * f(z) + x, torch.zeros(3, 4), torch.ones(3, 4), **how)


def trajectory(f, **how):
    return im.odeint(lambda t, y: f(y), torch.ones(3, 4), (0.0, 0.1), **how)


@pytest.mark.parametrize(
    ("solve", "few"),
    [
        (equilibrium, {"solver": im.FixedPointIteration(rtol=0, max_steps=3)}),
        (trajectory, {"solver": im.RK4(dt=0.05)}),
    ],
)
@pytest.mark.parametrize("drop", [nn.Dropout(0.2), im.nn.Dropout(0.2)], ids=["torch", "ours"])
def test_dropout_in_a_bare_solve_is_told_of(solve, few, drop):
    f = nn.Sequential(nn.Linear(4, 4), drop)
    with pytest.warns(
        im.nn.PerCallWarning, match=r"f draws new random numbers in every call \(Dropout\).*UnrolledAdjoint"
    ) as seen:
        solve(f, **few)
    assert seen[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solve(f, **few, adjoint=im.UnrolledAdjoint())  # whose derivative is of what was drawn
        solve(f.eval(), **few)
        solve(nn.Sequential(nn.Linear(4, 4), type(drop)(0.0)), **few)
        layer = im.nn.NeuralODE(im.nn.Autonomous(f.train()), (0.0, 0.1), im.RK4(dt=0.05))
        if type(drop) is im.nn.Dropout:
            layer(torch.ones(3, 4))
        solve(lambda y: f[0](y), **few)  # what it does not call, it may reach
