"""Gradients by some inputs of a solve: those by the others are not computed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import implicitly as im
from tests.problems import Watched, seeded

D = torch.float64


Solve = Callable[[list[int], Tensor, Tensor], Tensor]


def equilibrium(notes: list[int], x: Tensor, weight: Tensor) -> Tensor:
    def f(z, x, weight):
        return 0.5 * torch.tanh(z @ Watched.apply(weight, notes)) + x

    return im.fixed_point(f, torch.zeros_like(x), x, weight).value


def trajectory(adjoint: object) -> Solve:
    def solve(notes: list[int], x: Tensor, weight: Tensor) -> Tensor:
        def f(t, y, weight):
            return torch.tanh(y @ Watched.apply(weight, notes))

        return im.odeint(f, x, (0.0, 1.0), weight, adjoint=adjoint).value[-1]  # pyright: ignore[reportArgumentType]

    return solve


SOLVES = {
    "fixed_point": equilibrium,
    "checkpoints": trajectory(im.RecursiveCheckpointAdjoint()),
    "backsolve": trajectory(im.BacksolveAdjoint()),
}


@pytest.mark.parametrize("name", SOLVES)
@pytest.mark.parametrize("leaves", [True, False])
def test_what_is_not_asked_for_is_not_computed(name, leaves):
    x, weight = (torch.randn(n, 3, generator=seeded(n), dtype=D) / 3 for n in (2, 3))
    inputs = [t.requires_grad_() for t in (x, weight)]
    x, weight = inputs if leaves else [2 * t for t in inputs]
    notes: list[int] = []
    loss = SOLVES[name](notes, x, weight).square().sum()
    notes.clear()
    both = torch.autograd.grad(loss, inputs, retain_graph=True)
    assert notes
    notes.clear()
    (alone,) = torch.autograd.grad(loss, inputs[:1], retain_graph=True)
    assert not notes
    torch.testing.assert_close(alone, both[0], rtol=1e-5, atol=1e-7)
    (other,) = torch.autograd.grad(loss, inputs[1:], retain_graph=True)
    torch.testing.assert_close(other, both[1], rtol=1e-5, atol=1e-7)
    loss.backward()
    for t, exact in zip(inputs, both):
        torch.testing.assert_close(t.grad, exact)


def test_second_derivatives_by_some():
    x, weight = (torch.randn(n, 3, generator=seeded(n), dtype=D) / 3 for n in (2, 3))
    inputs = [t.requires_grad_() for t in (x, weight)]
    loss = equilibrium([], *inputs).square().sum()
    (by_x,) = torch.autograd.grad(loss, inputs[:1], create_graph=True)
    (mixed,) = torch.autograd.grad(by_x.square().sum(), inputs[1:])

    def of_both(x: Tensor, weight: Tensor) -> Tensor:
        return equilibrium([], x, weight).square().sum()

    def squares(weight: Tensor) -> Tensor:
        return torch.func.grad(of_both)(x.detach(), weight).square().sum()

    torch.testing.assert_close(mixed, torch.func.grad(squares)(weight.detach()))


@pytest.mark.parametrize("place", range(6))
def test_a_program_by_one_argument(place):
    args = [torch.randn(2, *shape, generator=seeded(i), dtype=D) for i, shape in enumerate([(4, 4), (4,), (3, 4)])]
    Q = args[0] @ args[0].mT + torch.eye(4, dtype=D)
    A = torch.randn(2, 1, 4, generator=seeded(7), dtype=D)
    given = [Q, args[1], args[2], torch.full((2, 3), 0.5, dtype=D), A, torch.zeros(2, 1, dtype=D)]
    given = [t.requires_grad_() for t in given]
    loss = im.qp(*given).value.square().sum()
    every = torch.autograd.grad(loss, given, retain_graph=True)
    (alone,) = torch.autograd.grad(loss, given[place])
    torch.testing.assert_close(alone, every[place])
