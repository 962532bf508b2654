"""Modules and tensors that f reaches as globals, also inside of lambdas, comprehensions and generators."""

from __future__ import annotations

import copy
import functools
import math

import pytest
import torch
from torch import nn

import implicitly as im
from tests.problems import draw

D = torch.float64
X = draw(3, 4, seed=1)
NET = nn.Linear(4, 4).double()
with torch.no_grad():
    NET.weight.mul_(0.3)
HELD = [NET]
THEIRS = {"net": NET}


class Namespace:
    net = NET


def plain(z, x):
    return 0.5 * torch.tanh(NET(z)) + x


def in_a_lambda(z, x):
    return (lambda y: 0.5 * torch.tanh(NET(y)) + x)(z)


def in_a_comprehension(z, x):
    return 0.5 * sum([torch.tanh(NET(y)) for y in (z,)]) + x


def in_a_generator(z, x):
    return 0.5 * sum(torch.tanh(NET(y)) for y in (z,)) + x


def in_a_function_within(z, x):
    def outer(y):
        def inner(y):
            return torch.tanh(NET(y))

        return next(inner(v) for v in (y,))

    return 0.5 * outer(z) + x


def by_map(z, x):
    return torch.stack(list(map(lambda y: in_a_lambda(y, x), (z,))))[0]  # noqa: C417


FOUND = [in_a_lambda, in_a_comprehension, in_a_generator, in_a_function_within, by_map,
         functools.partial(in_a_generator)]  # fmt: skip


@pytest.mark.parametrize("f", FOUND, ids=lambda f: getattr(f, "__name__", "partial"))
def test_parameters_of_a_global_module_get_their_gradients(f):
    def gradients(f):
        value = im.fixed_point(f, torch.zeros_like(X), X).value
        return torch.autograd.grad(value.sin().sum(), list(NET.parameters()))

    torch.testing.assert_close(gradients(f), gradients(plain), rtol=1e-6, atol=1e-8)


def in_a_list(z, x):
    return 0.5 * torch.tanh(HELD[0](z)) + x


def in_a_dict(z, x):
    return 0.5 * sum(torch.tanh(THEIRS["net"](y)) for y in (z,)) + x


def in_a_class(z, x):
    return 0.5 * torch.tanh(Namespace.net(z)) + x


@pytest.mark.parametrize("f", [in_a_list, in_a_dict, in_a_class])
def test_what_other_globals_hold_is_refused(f):
    with pytest.raises(
        ValueError, match=r"a tensor of shape \(4, 4\).*Pass it in args.*not lists or other objects"
    ):
        im.fixed_point(f, torch.zeros_like(X), X)
    with torch.no_grad():
        expected = im.fixed_point(plain, torch.zeros_like(X), X).value
        torch.testing.assert_close(im.fixed_point(f, torch.zeros_like(X), X).value, expected)


def test_a_tensor_that_is_seen_is_named():
    w = torch.ones(4, dtype=torch.float64, requires_grad=True)
    with pytest.raises(ValueError, match=r"'w' of shape \(4,\)") as caught:
        im.fixed_point(lambda z, x: 0.1 * sum(w * y for y in (z,)) + x, torch.zeros_like(X), X)
    assert "globals" not in str(caught.value)


def test_a_plain_attribute_of_a_module_is_named():
    net = nn.Linear(4, 4).double()
    net.shift = torch.ones(4, dtype=torch.float64, requires_grad=True)
    with pytest.raises(ValueError, match=r"'Linear.shift' of shape \(4,\)"):
        im.fixed_point(lambda z, x: 0.1 * net(z) + net.shift + x, torch.zeros_like(X), X)


@pytest.mark.parametrize("w", ["a leaf", "a product"])
def test_a_tensor_that_f_only_reaches_later_is_refused_then(w):
    leaf = torch.full((4,), 0.1, dtype=torch.float64, requires_grad=True)
    w = leaf if w == "a leaf" else 2 * leaf
    cell = lambda z, x: 0.1 * z + x if z.abs().max() < 0.5 else w * z + x  # noqa: E731
    field = lambda t, y, x: x if t < 0.5 else w * y + x  # noqa: E731
    for solve in (
        lambda x: im.fixed_point(cell, torch.zeros_like(x), x).value,
        lambda x: im.odeint(field, torch.zeros_like(x), (0.0, 1.0), x).value,
    ):
        for x in (X, X.clone().requires_grad_()):
            with pytest.raises(ValueError, match=r"f uses 'w' of shape \(4,\).*Pass it in args"):
                solve(x)
        with torch.no_grad():
            solve(X)


def test_lazy_modules_are_to_be_called_first():
    x = torch.ones(2, 3)
    for layer, f in ((im.nn.DEQ, nn.LazyLinear(3)), (im.nn.NeuralODE, nn.LazyLinear(3))):
        cell = Takes(f)
        with pytest.raises(ValueError, match=r"LazyLinear whose parameters have no .*call f"):
            layer(cell)(x)
        cell(x, x)
        layer(cell)(x)


class Takes(nn.Module):
    """A cell, and a field of a differential equation, of one layer."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, *inputs):
        return 0.1 * self.layer(inputs[0] + inputs[-1]).tanh()


def test_what_f_reaches_but_never_uses_changes_nothing():
    w, x = torch.ones(4, dtype=torch.float64, requires_grad=True), X.clone().requires_grad_()
    unused = lambda z, x: 0.1 * z + x if x.numel() else w * z + x  # noqa: E731
    value = im.fixed_point(unused, torch.zeros_like(x), x).value
    torch.testing.assert_close(value, x / 0.9)
    torch.testing.assert_close(*torch.autograd.grad(value.sum(), x), torch.full_like(x, 1 / 0.9))
    y = im.odeint(lambda t, y, x: -y if t >= 0 else w * y, x, (0.0, 1.0), x).value[-1]
    torch.testing.assert_close(y, x * math.exp(-1), rtol=1e-5, atol=1e-6)
    assert y.requires_grad


def test_the_derivative_is_of_the_module_as_it_was():
    net = copy.deepcopy(NET)
    value = im.fixed_point(in_a_generator, torch.zeros_like(X), X).value
    with torch.no_grad():
        NET.weight.mul_(1.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.sum().backward()
    NET.load_state_dict(net.state_dict())


class Cell(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 4).double()
        self.register_buffer("scale", draw(4, seed=2))

    def forward(self, z, x):
        return 0.3 * self.scale * torch.tanh(self.net(z)) + x


class Solve(nn.Module):
    def __init__(self, cell, entry):
        super().__init__()
        self.cell, self.entry = cell, entry

    def forward(self, x):
        if self.entry == "fixed_point":
            options = {"solver": im.Anderson(rtol=1e-11), "adjoint": im.ImplicitAdjoint(rtol=1e-12)}
            return im.fixed_point(self.cell, torch.zeros_like(x), x, **options).value
        field = lambda t, y: self.cell(y, -y)  # noqa: E731
        return im.odeint(field, x, (0.0, 1.0), solver=im.Heun(dt=0.25)).value


@pytest.mark.parametrize("tracked", [True, False])
@pytest.mark.parametrize("entry", ["fixed_point", "odeint"])
def test_the_derivative_is_of_the_tensors_that_modules_held(entry, tracked):
    model, other = Solve(Cell(), entry), Solve(Cell(), entry)
    other.cell.scale = 2 * model.cell.scale
    tensors = {k: v.detach().clone() for k, v in other.state_dict().items()}
    chosen = [tensors[name].requires_grad_() for name, _ in other.named_parameters()] if tracked else []
    x = X.clone().requires_grad_()
    right = torch.autograd.grad(other(x).square().sum(), [x, *other.parameters()][: 1 + len(chosen)])
    value = torch.func.functional_call(model, tensors, (x,))
    was = copy.deepcopy(model.state_dict())
    torch.testing.assert_close(torch.autograd.grad(value.square().sum(), [x, *chosen]), right)
    torch.testing.assert_close(model.state_dict(), was)
    value, chosen = other(x), list(other.parameters())[: len(chosen)]
    other.cell.net.weight, other.cell.scale = nn.Parameter(torch.randn(4, 4).double()), X[0]
    torch.testing.assert_close(torch.autograd.grad(value.square().sum(), [x, *chosen]), right)
    assert other.cell.scale.data_ptr() == X[0].data_ptr()


class Energy(nn.Module):
    """The gradient of a learnt energy by its own input, as autograd or as torch.func takes it."""

    def __init__(self, functional):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)).double()
        self.functional = functional

    def forward(self, t, y):
        if self.functional:
            return torch.func.vmap(torch.func.grad(lambda y: self.net(y)[0]))(y)
        with torch.enable_grad():
            y = y.requires_grad_()
            return torch.autograd.grad(self.net(y).sum(), y, create_graph=True)[0]


@pytest.mark.parametrize("adjoint", [im.RecursiveCheckpointAdjoint(), im.BacksolveAdjoint(), im.UnrolledAdjoint()])
def test_f_may_differentiate_by_its_own_input(adjoint):
    torch.manual_seed(0)
    f, peer = Energy(False), Energy(True)
    peer.load_state_dict(f.state_dict())
    results = []
    for field in (f, peer):
        y0 = torch.linspace(-1, 1, 6, dtype=D).reshape(3, 2).requires_grad_()
        end = im.odeint(field, y0, (0.0, 1.0), adjoint=adjoint, batch_dims=1).value[-1]
        results.append((end, *torch.autograd.grad(end.square().sum(), [y0, field.net[0].weight])))
        with torch.no_grad():
            torch.testing.assert_close(im.odeint(field, y0, (0.0, 1.0), batch_dims=1).value[-1], end)
    torch.testing.assert_close(*results)


def test_what_f_differentiates_by_does_not_hide_what_it_reaches_besides():
    scale = torch.ones(2, dtype=D, requires_grad=True)

    def f(t, y):
        with torch.enable_grad():
            y = y.requires_grad_()
            return torch.autograd.grad((scale * y**2).sum(), y, create_graph=True)[0]

    with pytest.raises(ValueError, match="'scale' of shape"):
        im.odeint(f, torch.ones(3, 2, dtype=D), (0.0, 1.0), batch_dims=1)
