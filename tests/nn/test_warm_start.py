"""Warm starts save steps and change no answer."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

import implicitly as im
from tests.nn.cells import Dense, Tree, gradients

SOLVER = im.FixedPointIteration(rtol=1e-10, max_steps=500)


def layer_with(warm_start):
    return im.nn.DEQ(Dense(norm=0.8).double(), SOLVER, im.ImplicitAdjoint(rtol=1e-10), warm_start=warm_start)


def batch(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def test_last_batch_saves_steps_and_keeps_the_answer():
    layer, x = layer_with(im.nn.LastBatch()), batch(6, 4).requires_grad_()
    layer(x)
    near = (x.detach() + 1e-6 * batch(6, 4)).requires_grad_()
    cold = im.nn.DEQ(layer.cell, SOLVER, layer.adjoint)
    expected = cold(near)
    value = layer(near)
    assert (layer.solution.steps < 0.6 * cold.solution.steps).all()
    assert_close(value, expected, rtol=1e-8, atol=1e-8)
    inputs = (near, *layer.parameters())
    assert_close(gradients(value, *inputs), gradients(expected, *inputs), rtol=1e-7, atol=1e-7)


def test_the_same_batch_again_takes_no_step():
    layer, x = layer_with(im.nn.LastBatch()), batch(6, 4)
    first = layer(x)
    assert_close(layer(x), first, rtol=0, atol=0)
    assert layer.solution.steps.max() == 0


def test_last_batch_starts_cold_where_shapes_change():
    layer = layer_with(im.nn.LastBatch())
    cold = im.nn.DEQ(layer.cell, SOLVER)
    for size in (6, 2, 6):
        x = batch(size, 4)
        assert_close(layer(x), cold(x), rtol=1e-8, atol=1e-8)
        assert torch.equal(layer.solution.steps, cold.solution.steps)
    layer.float()
    x = torch.randn(6, 4)
    layer.solver, layer.adjoint = im.FixedPointIteration(max_steps=500), im.ImplicitAdjoint()
    assert layer(x).dtype == torch.float32
    assert layer.solution.converged.all()


def test_last_epoch_saves_steps_in_any_order_and_batch_size():
    data = batch(10, 4)
    layer = layer_with(im.nn.LastEpoch(10))
    steps = []
    for epoch, size in enumerate((4, 3, 10)):
        order = torch.randperm(10)
        for index in order.split(size):
            value = layer(data[index], index=index)
            assert_close(value, im.nn.DEQ(layer.cell, SOLVER)(data[index]), rtol=1e-8, atol=1e-8)
            if epoch:
                steps.append(layer.solution.steps.max().item())
            else:
                assert layer.solution.steps.min() > 5
    assert max(steps) <= 1


def test_last_epoch_starts_unseen_samples_cold():
    data, layer = batch(6, 4), layer_with(im.nn.LastEpoch(6))
    layer(data[:3], index=torch.arange(3))
    layer(data, index=torch.arange(6))
    steps = layer.solution.steps
    assert steps[:3].max() <= 1
    cold = im.nn.DEQ(layer.cell, SOLVER)
    cold(data[3:])
    assert torch.equal(steps[3:], cold.solution.steps)


def test_last_epoch_forgets_where_states_change_shape():
    layer = im.nn.DEQ(Dense().double(), SOLVER, warm_start=im.nn.LastEpoch(4))
    index = torch.arange(4)
    layer(batch(4, 4), index=index)
    x = batch(4, 3, 4)
    layer(x, index=index)
    assert layer.solution.steps.min() > 5
    layer(x, index=index)
    assert layer.solution.steps.max() <= 1


def test_last_epoch_of_pytrees():
    layer = im.nn.DEQ(
        Tree().double(),
        SOLVER,
        init=lambda x: {"p": torch.zeros_like(x[0]), "q": torch.zeros_like(x[1])},
        warm_start=im.nn.LastEpoch(5),
    )
    x, index = (batch(3, 3), batch(3, 2)), torch.tensor([4, 1, 0])
    layer(x, index=index)
    back = torch.tensor([2, 0, 1])
    layer(tuple(t[back] for t in x), index=index[back])
    assert layer.solution.steps.max() <= 1


@pytest.mark.parametrize("index", [None, [0, 1, 5], [-1, 0, 1], [0, 1], [[0, 1, 2]]])
def test_last_epoch_refuses_a_wrong_index(index):
    layer = layer_with(im.nn.LastEpoch(5))
    index = None if index is None else torch.tensor(index)
    with pytest.raises(ValueError, match="LastEpoch"):
        layer(batch(3, 4), index=index)


def test_last_epoch_refuses_fractions():
    with pytest.raises(TypeError, match="int64"):
        layer_with(im.nn.LastEpoch(5))(batch(3, 4), index=torch.tensor([0.0, 1.0, 2.0]))


def test_last_epoch_refuses_a_list():
    with pytest.raises(TypeError, match=r"int64, got a list: torch.tensor\(index\)"):
        layer_with(im.nn.LastEpoch(5))(batch(3, 4), index=[0, 1, 2])


@pytest.mark.parametrize("size", [2.5, "3", True])
def test_last_epoch_refuses_what_is_no_count(size):
    with pytest.raises(TypeError, match="size must be an int"):
        im.nn.LastEpoch(size)


@pytest.mark.parametrize("size", [0, -3])
def test_last_epoch_refuses_no_samples(size):
    with pytest.raises(ValueError, match="size"):
        im.nn.LastEpoch(size)


@pytest.mark.parametrize("make", [im.nn.LastBatch, lambda: im.nn.LastEpoch(3)])
def test_it_is_no_state_and_unused_in_evaluation(make):
    layer, x = layer_with(make()), batch(3, 4)
    index = torch.arange(3)
    layer(x, index=index)
    assert set(layer.state_dict()) == {"cell.linear.weight", "cell.linear.bias"}
    layer.eval()
    cold = im.nn.DEQ(layer.cell, SOLVER)
    cold(x)
    layer(x)
    assert torch.equal(layer.solution.steps, cold.solution.steps)
    layer(10 * x)
    layer.train()
    layer(x, index=index)
    assert layer.solution.steps.max() <= 1


@pytest.mark.parametrize("make", [im.nn.LastBatch, lambda: im.nn.LastEpoch(3)])
def test_a_start_that_is_given_wins(make):
    layer, x = layer_with(make()), batch(3, 4)
    layer(x, index=torch.arange(3))
    cold = im.nn.DEQ(layer.cell, SOLVER)
    cold(x)
    layer(x, torch.zeros_like(x), index=torch.arange(3))
    assert torch.equal(layer.solution.steps, cold.solution.steps)


def test_a_failed_sample_does_not_poison_the_next_solve():
    for warm_start in (im.nn.LastBatch(), im.nn.LastEpoch(3)):
        layer, x = layer_with(warm_start), batch(3, 4)
        layer.on_failure = "ignore"
        bad = x.clone()
        bad[1] = float("nan")
        index = torch.arange(3)
        layer(bad, index=index)
        assert layer.solution.status.tolist() == [0, int(im.Status.NON_FINITE), 0]
        layer(x, index=index)
        assert layer.solution.converged.all()


@pytest.mark.parametrize("make", [im.nn.LastBatch, lambda: im.nn.LastEpoch(6)], ids=["LastBatch", "LastEpoch"])
def test_a_state_dict_brings_back_every_start(make):
    layer, x, index = layer_with(make()), batch(6, 4), torch.arange(6)
    again = layer_with(make())
    again.warm_start.load_state_dict(layer.warm_start.state_dict())  # of nothing
    assert again.warm_start.start(x, index) is None
    layer(x, index=index)
    again.warm_start.load_state_dict(layer.warm_start.state_dict())
    assert torch.equal(again.warm_start.start(x, index), layer.warm_start.start(x, index))


def test_equilibria_of_another_data_set_are_refused():
    with pytest.raises(ValueError, match=r"LastEpoch\(size=5\) cannot load the equilibria of 6 samples"):
        im.nn.LastEpoch(5).load_state_dict(im.nn.LastEpoch(6).state_dict())


@pytest.mark.parametrize("make", [im.nn.LastBatch, lambda: im.nn.LastEpoch(6)], ids=["LastBatch", "LastEpoch"])
def test_what_vmap_maps_starts_cold_and_is_not_remembered(make):
    layer, x, index = layer_with(make()), batch(6, 4), torch.arange(6)
    layer.warm_start = None
    expected, parameters = layer(x), dict(layer.named_parameters())
    layer.warm_start = make()
    index = index if isinstance(layer.warm_start, im.nn.LastEpoch) else None

    def loss(parameters, x, *index):  # of one sample
        options = {"index": index[0][None]} if index else {}
        return torch.func.functional_call(layer, parameters, (x[None],), options).sum()

    args = (x,) if index is None else (x, index)
    of_samples = torch.func.vmap(torch.func.grad(loss), in_dims=(None, *(0 for _ in args)))
    total = {name: g.sum(0) for name, g in of_samples(parameters, *args).items()}
    assert_close(tuple(total.values()), torch.autograd.grad(expected.sum(), tuple(parameters.values())))
    models = {name: torch.stack([p, p]) for name, p in parameters.items()}
    values = torch.func.vmap(lambda p: torch.func.functional_call(layer, p, (x,), {"index": index}))(models)
    assert_close(values, torch.stack([expected, expected]))
    assert layer.warm_start.start(x, torch.arange(6)) is None
