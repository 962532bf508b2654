"""Derivatives by `torch.func`: those of autograd, and from the recorded steps as cheaply."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, func, nn

import implicitly as im
from implicitly.transforms import is_wrapped
from implicitly.viz import peak_bytes
from tests.problems import seeded

D = torch.float64


def field(t: Tensor, y: Tensor, W: Tensor, speed: Tensor) -> Tensor:
    return (y @ W.mT).tanh() * speed - 0.3 * y + t.sin()


def given() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A state of three samples, times, a matrix, and a speed for each sample."""
    draws = (torch.randn(shape, generator=seeded(i), dtype=D) for i, shape in enumerate([(3, 2), (2, 2), (3, 1)]))
    y0, W, speed = draws
    return y0, torch.tensor([0.1, 0.5, 1.3], dtype=D), W, 1 + speed.abs()


def fallen(t: Tensor, y: Tensor, *theta: Tensor) -> Tensor:
    return y[..., 0] + y[..., 1] - 0.2


AGAIN = im.RecursiveCheckpointAdjoint(keep_bytes=0)  # which takes steps again
OPTIONS: dict[str, dict[str, Any]] = {
    "adaptive": {"solver": im.Dopri5(rtol=1e-6, atol=1e-8), "adjoint": AGAIN},
    "of a multistep method": {"solver": im.Adams(dt=0.1)},
    "constant steps": {"solver": im.RK4(dt=0.07)},
    "implicit": {"solver": im.Kvaerno3(rtol=1e-6, atol=1e-9, stage_tolerance=1e-6)},
    "implicit, large": {"solver": im.ImplicitMidpoint(dt=0.1, rtol=1e-10, atol=1e-12)},
    "reversible": {"solver": im.ReversibleHeun(dt=0.05)},
    "an event": {"solver": im.Dopri5(rtol=1e-9, atol=1e-9), "event": im.Event(fallen)},
    "arc length": {"solver": im.Dopri5(rtol=1e-6), "adjoint": im.RecursiveCheckpointAdjoint(arc_length=True)},
    "arc length, few steps": {
        "solver": im.Tsit5(rtol=1e-2, atol=1e-2),
        "adjoint": im.RecursiveCheckpointAdjoint(arc_length=True),
    },
    "an event that restarts": {
        "solver": im.Dopri5(rtol=1e-9, atol=1e-9),
        "event": im.Event(fallen, restart=lambda t, y, *theta: 1.0 + 0.5 * y),
    },
    "samples known": {"solver": im.Dopri5(rtol=1e-6), "in_dims": (None, 0)},
}


def solved(name: str, f: Callable[..., Tensor] = field) -> Callable[..., Tensor]:
    def values(*inputs: Tensor) -> Tensor:
        return im.odeint(f, inputs[0], inputs[1], *inputs[2:], batch_dims=1, **OPTIONS[name]).value

    return values


def flattened(J: Any) -> Tensor:
    return torch.cat([x.flatten(3) for x in J], dim=3)


@pytest.mark.parametrize("name", OPTIONS)
def test_jacobians_are_those_of_autograd(name):
    values, inputs = solved(name), given()
    leaves = [x.clone().requires_grad_() for x in inputs]
    value = values(*leaves)
    rows = [torch.autograd.grad(x, leaves, retain_graph=True) for x in value.flatten()]
    expected = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    every = tuple(range(4))
    tolerance = {"rtol": 1e-6, "atol": 1e-8} if "implicit" in name else {"rtol": 1e-9, "atol": 1e-10}
    for jacobian in (func.jacrev, func.jacfwd):
        found = flattened(jacobian(values, every)(*inputs)).flatten(0, 2)
        torch.testing.assert_close(found, expected, **tolerance)
    moved = func.jvp(values, inputs, tuple(torch.ones_like(x) for x in inputs))[1]
    torch.testing.assert_close(moved.flatten(), expected.sum(1), **tolerance)


@pytest.mark.parametrize("name", OPTIONS)
def test_gradients_of_each_sample_are_those_of_autograd(name):
    def loss(y0: Tensor, t: Tensor, W: Tensor, speed: Tensor) -> Tensor:
        return solved(name)(y0, t, W, speed).sin().sum()

    y0, t, W, speed = given()
    many = torch.stack([y0, 0.9 * y0]), torch.stack([speed, 1.1 * speed])
    found = func.vmap(func.grad(loss, (0, 1, 2, 3)), in_dims=(0, None, None, 0))(many[0], t, W, many[1])
    pushed = func.vmap(
        lambda *x: func.jvp(loss, x, tuple(torch.ones_like(a) for a in x))[1], in_dims=(0, None, None, 0)
    )(many[0], t, W, many[1])
    tolerance = {"rtol": 1e-6, "atol": 1e-8} if "implicit" in name else {"rtol": 1e-7, "atol": 1e-9}
    for i, (y, s) in enumerate(zip(*many)):
        leaves = [x.clone().requires_grad_() for x in (y, t, W, s)]
        expected = torch.autograd.grad(loss(*leaves), leaves)
        torch.testing.assert_close(tuple(g[i] for g in found), expected, **tolerance)
        torch.testing.assert_close(pushed[i], sum(g.sum() for g in expected), **tolerance)


@pytest.mark.parametrize("name", ["adaptive", "constant steps", "implicit"])
def test_directions_may_be_mapped_twice(name):
    y0, t, W, speed = given()

    def values(W: Tensor) -> Tensor:
        return solved(name)(y0, t, W, speed)

    jacobian = func.jacrev(values)(W)
    value, pull = func.vjp(values, W)
    bars = torch.randn(2, 3, *value.shape, generator=seeded(4), dtype=D)
    (found,) = func.vmap(func.vmap(pull))(bars)
    torch.testing.assert_close(found, torch.einsum("jktbi,tbimn->jkmn", bars, jacobian))
    directions = torch.randn(2, 3, *W.shape, generator=seeded(5), dtype=D)
    moved = func.vmap(func.vmap(lambda v: func.jvp(values, (W,), (v,))[1]))(directions)
    torch.testing.assert_close(moved, torch.einsum("tbimn,jkmn->jktbi", jacobian, directions))


@pytest.mark.parametrize("name", ["adaptive", "implicit", "an event", "an event that restarts", "arc length"])
def test_second_derivatives_are_those_of_autograd(name):
    y0, t, W, speed = given()

    def loss(W: Tensor) -> Tensor:
        return solved(name)(y0, t, W, speed).sin().sum()

    expected = torch.autograd.functional.hessian(loss, W)
    for outer, inner in itertools.product((func.jacrev, func.jacfwd), repeat=2):
        torch.testing.assert_close(outer(inner(loss))(W), expected, rtol=1e-5, atol=1e-6)
    _, along = func.jvp(func.grad(loss), (W,), (torch.ones_like(W),))
    torch.testing.assert_close(along, expected.sum((2, 3)), rtol=1e-5, atol=1e-6)
    leaf = W.clone().requires_grad_()
    (through,) = torch.autograd.grad(func.grad(loss)(leaf).sum(), leaf)
    torch.testing.assert_close(through, expected.sum((0, 1)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("transform", ["grad", "jacrev", "jvp", "jacfwd", "per sample"])
@pytest.mark.parametrize("name", ["adaptive", "implicit"])
def test_steps_are_taken_again_outside_of_the_transform(name, transform):
    """Each operation takes many times as long under a transform, and its graph would hold all steps at once."""
    wrapped = []

    def watched(t: Tensor, y: Tensor, *theta: Tensor) -> Tensor:
        wrapped.append(any(is_wrapped(x) for x in (y, *theta)))
        return field(t, y, *theta)

    y0, t, W, speed = given()

    def loss(W: Tensor) -> Tensor:
        return solved(name, watched)(y0, t, W, speed).sin().sum()

    {
        "grad": lambda: func.grad(loss)(W),
        "jacrev": lambda: func.jacrev(lambda W: solved(name, watched)(y0, t, W, speed))(W),
        "jvp": lambda: func.jvp(loss, (W,), (W,)),
        "jacfwd": lambda: func.jacfwd(loss)(W),
        "per sample": lambda: func.vmap(func.grad(loss))(torch.stack([W, W])),
    }[transform]()
    if transform == "per sample":  # f itself is mapped; it is called as often as by autograd
        calls, leaf = len(wrapped), W.clone().requires_grad_()
        wrapped.clear()
        torch.autograd.grad(loss(leaf), leaf)
        assert calls <= 1.2 * len(wrapped)
    else:  # the call that checks what f returns, and the products for a Jacobian of the implicit method
        assert sum(wrapped) <= 3 < 0.1 * len(wrapped)


@pytest.mark.parametrize("name", OPTIONS)
def test_forward_mode_with_constant_times(name):
    y0, t, W, speed = given()

    def values(*inputs: Tensor) -> Tensor:
        return solved(name)(inputs[0], t, *inputs[1:])

    inputs = y0, W, speed
    moved = func.jvp(values, inputs, tuple(torch.ones_like(x) for x in inputs))[1]
    leaves = [x.clone().requires_grad_() for x in inputs]
    rows = [torch.autograd.grad(x, leaves, retain_graph=True) for x in values(*leaves).flatten()]
    expected = torch.stack([sum(g.sum() for g in row) for row in rows])
    torch.testing.assert_close(moved.flatten(), expected, rtol=1e-6, atol=1e-8)


def test_second_derivatives_of_mapped_complex_states():
    """Complex numbers start at even places of memory only, where an odd number of others may precede them."""
    _, t, W, speed = given()
    y0 = torch.randn(2, 3, 2, generator=seeded(8), dtype=D)

    def loss(y0: Tensor, W: Tensor, speed: Tensor) -> Tensor:
        def turns(t: Tensor, y: Tensor, W: Tensor, speed: Tensor) -> Tensor:
            return (y @ W.mT.to(y.dtype)) * (0.3 + 0.5j) * speed - 0.1 * y * y.conj() * y

        start = torch.complex(y0, 0.3 * y0)
        value = im.odeint(turns, start, t, W, speed, batch_dims=1, solver=im.ReversibleHeun(dt=0.1)).value
        return (value.real.sin() + value.imag).sum()

    hessians = func.vmap(func.hessian(loss, (0, 1, 2)), in_dims=(0, None, None))(y0, W, speed)
    for i in range(2):
        expected = torch.autograd.functional.hessian(loss, (y0[i], W, speed))
        found = tuple(tuple(block[i] for block in row) for row in hessians)
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)


def test_memory_does_not_hold_all_steps_at_once():
    W, y0 = 0.3 * torch.randn(16, 16, generator=seeded(6)), torch.randn(64, 16, generator=seeded(7))

    def loss(W: Tensor) -> Tensor:
        solver = im.RK4(dt=1 / 300)
        return im.odeint(lambda t, y, W: (y @ W).tanh(), y0, (0.0, 1.0), W, solver=solver).value[-1].sum()

    def by_autograd() -> None:
        leaf = W.clone().requires_grad_()
        torch.autograd.grad(loss(leaf), leaf)

    least = peak_bytes(by_autograd)
    for transformed in (lambda: func.grad(loss)(W), lambda: func.jvp(loss, (W,), (W,))):
        assert peak_bytes(transformed) < 1.5 * least


def test_samples_that_fail_have_zero_gradients():
    def blows_up(t: Tensor, y: Tensor, speed: Tensor) -> Tensor:
        return speed * y * y

    y0, speed = torch.tensor([[1.0], [0.3]], dtype=D), torch.tensor([[2.0], [0.5]], dtype=D)

    def loss(y0: Tensor, speed: Tensor) -> Tensor:
        solution = im.odeint(
            blows_up, y0, (0.0, 1.0), speed, batch_dims=1, in_dims=0, solver=im.Dopri5(), on_failure="ignore"
        )
        return solution.value[-1].nan_to_num().sum()

    leaves = y0.clone().requires_grad_(), speed.clone().requires_grad_()
    expected = torch.autograd.grad(loss(*leaves), leaves)
    assert expected[0][0] == 0
    assert expected[0][1] != 0
    torch.testing.assert_close(func.grad(loss, (0, 1))(y0, speed), expected)
    moved = func.jvp(loss, (y0, speed), (torch.ones_like(y0), torch.ones_like(speed)))[1]
    torch.testing.assert_close(moved, sum(g.sum() for g in expected))


def test_parameters_may_be_complex_or_of_another_dtype():
    def rotates(t: Tensor, y: Tensor, rate: Tensor, scale: Tensor) -> Tensor:
        return rate * y * scale.to(y.real.dtype)

    y0 = torch.randn(2, 1, generator=seeded(3), dtype=torch.complex128)
    rate, scale = torch.tensor(0.3 + 1.1j, dtype=torch.complex128), torch.tensor(0.7)

    def loss(y0: Tensor, rate: Tensor, scale: Tensor) -> Tensor:
        value = im.odeint(rotates, y0, (0.0, 1.0), rate, scale, solver=im.Dopri5()).value[-1]
        return (value.real.sin() + value.imag).sum()

    leaves = [x.clone().requires_grad_() for x in (y0, rate, scale)]
    expected = torch.autograd.grad(loss(*leaves), leaves, create_graph=True)
    found = func.grad(loss, (0, 1, 2))(y0, rate, scale)
    torch.testing.assert_close(found, tuple(g.detach() for g in expected))
    second = torch.autograd.grad(sum((g * g.conj()).real.sum() for g in expected), leaves)

    def squares(*inputs: Tensor) -> Tensor:
        return sum((g * g.conj()).real.sum() for g in func.grad(loss, (0, 1, 2))(*inputs))

    torch.testing.assert_close(func.grad(squares, (0, 1, 2))(y0, rate, scale), second)


class Net(nn.Module):
    """A network that is faster in training."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2).double()

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.linear(y).tanh() * (2.0 if self.training else 1.0)


@pytest.mark.parametrize("transform", ["grad", "jvp"])
def test_second_derivatives_are_of_the_layer_as_it_was_in_the_solve(transform):
    y0, net = given()[0], Net()

    def loss(y0: Tensor) -> Tensor:
        return im.odeint(net, y0, (0.0, 1.0), solver=im.Dopri5(), batch_dims=1).value[-1].sin().sum()

    def second(evaluated: bool) -> Tensor:
        net.train()
        leaf = y0.clone().requires_grad_()
        if transform == "grad":
            first = func.grad(loss)(leaf).square().sum()
        else:
            first = func.jvp(loss, (leaf,), (torch.ones_like(y0),))[1].square()
        net.train(not evaluated)
        return torch.autograd.grad(first, leaf)[0]

    torch.testing.assert_close(second(True), second(False), rtol=0, atol=0)
