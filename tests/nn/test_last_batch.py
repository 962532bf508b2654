"""What a warm start remembers is its own: what is done to a layer's output does not reach the next solve."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import implicitly as im
from tests.nn.cells import Dense, Tree

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("spoil", [lambda z: z.fill_(1e6), lambda z: z.zero_()])
def test_changes_of_the_output_do_not_reach_the_next_start(spoil):
    layer = im.nn.DEQ(Dense(), warm_start=im.nn.LastBatch())
    value = layer(X)
    cold, expected = layer.solution.steps, value.detach().clone()
    with torch.no_grad():
        spoil(value)
    again = layer(X)
    assert bool((layer.solution.steps < cold).all())
    torch.testing.assert_close(again.detach(), expected, rtol=1e-3, atol=1e-3)


def test_states_of_several_tensors():
    layer = im.nn.DEQ(
        Tree(),
        warm_start=im.nn.LastBatch(),
        init=lambda x: {"p": torch.zeros_like(x[0]), "q": torch.zeros_like(x[1])},
    )
    value = layer((X[:, :3], X[:, :2]))
    kept = {name: z.detach().clone() for name, z in value.items()}
    with torch.no_grad():
        value["p"].add_(5.0)
    torch.testing.assert_close(layer.warm_start.value, kept)


def test_in_a_compiled_model():
    solver, adjoint = im.FixedPointIteration(rtol=0, max_steps=20), im.JacobianFreeAdjoint()
    layer = im.nn.DEQ(Dense(), solver, adjoint, warm_start=im.nn.LastBatch())
    model = torch.compile(nn.Sequential(layer), backend="eager")
    value = model(X)
    kept = value.detach().clone()
    with torch.no_grad():
        value.zero_()
    torch.testing.assert_close(layer.warm_start.value, kept)


@pytest.mark.parametrize("make", [im.nn.LastBatch, lambda: im.nn.LastEpoch(3)])
@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev, torch.func.hessian])
def test_what_is_remembered_outlives_a_transform(make, transform):
    layer = im.nn.DEQ(Dense(), warm_start=make())
    index = torch.arange(3) if isinstance(layer.warm_start, im.nn.LastEpoch) else None
    transform(lambda x: layer(x, index=index).sum())(X)
    for x in torch.utils._pytree.tree_leaves(layer.warm_start.state_dict()):
        assert not torch._C._functorch.is_functorch_wrapped_tensor(x)
    plain = layer(X, index=index)
    torch.testing.assert_close(plain, im.nn.DEQ(layer.cell)(X), rtol=1e-3, atol=1e-3)
