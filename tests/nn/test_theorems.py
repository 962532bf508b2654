"""Any feed-forward network is one equilibrium layer, and two equilibrium layers are one."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.func import functional_call, jacfwd, jacrev, vmap
from torch.testing import assert_close

import implicitly as im
from tests.nn.cells import Conv, Dense, Tree, gradients

DOUBLE = torch.float64
TIGHT = {"solver": im.Anderson(rtol=1e-12), "adjoint": im.ImplicitAdjoint(rtol=1e-12)}

NETWORKS = {
    "one layer": lambda: (nn.Sequential(nn.Linear(4, 4)), (3, 4)),
    "widths": lambda: (nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 1), nn.Softplus()), (3, 4)),
    "convolutions": lambda: (
        nn.Sequential(
            nn.Conv2d(1, 3, 3, padding=1, bias=False),
            nn.GroupNorm(3, 3),
            nn.GELU(),
            nn.AvgPool2d(2),
            nn.Conv2d(3, 2, 3),
            nn.Flatten(),
            nn.Linear(8, 5),
        ),
        (2, 1, 8, 8),
    ),
    "nested": lambda: (nn.Sequential(nn.Sequential(nn.Linear(4, 3), nn.SiLU()), nn.Linear(3, 2)), (3, 4)),
    "no parameters": lambda: (nn.Sequential(nn.Tanh(), nn.Flatten()), (3, 2, 2)),
    "batch norm in evaluation": lambda: (
        nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh()).eval(),
        (3, 4),
    ),
    "vanishing gradients": lambda: (
        nn.Sequential(*[m for _ in range(12) for m in (nn.Linear(3, 3), nn.Sigmoid())]),
        (3, 3),
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_as_deq_is_the_network(name, dtype):
    network, shape = NETWORKS[name]()
    network = network.to(dtype)
    layer = im.nn.as_deq(network)
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    value, expected = layer(x), network(x)
    assert_close(value, expected)
    assert (layer.solution.steps == len(network)).all()
    inputs = (x, *network.parameters())
    for a, b in zip(gradients(value, *inputs), gradients(expected, *inputs)):
        # Relative to each gradient's own size, however small.
        assert (a - b).norm() <= 1e-5 * b.norm()


def test_as_deq_has_the_networks_parameters():
    network = NETWORKS["convolutions"]()[0]
    layer = im.nn.as_deq(network)
    assert [id(p) for p in layer.parameters()] == [id(p) for p in network.parameters()]
    assert [id(b) for b in layer.buffers()] == [id(b) for b in network.buffers()]


def test_as_deq_is_right_from_any_start():
    network, shape = NETWORKS["widths"]()
    layer = im.nn.as_deq(network)
    x = torch.randn(shape)
    z0 = tuple(100 * torch.randn_like(z) for z in layer.init(x))
    assert_close(layer(x, z0), network(x))


def test_a_small_output_of_a_large_state_is_right():
    network = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2, bias=False))
    with torch.no_grad():
        network[0].weight.mul_(1e3)
        network[2].weight.mul_(1e-8)
    x = torch.randn(3, 4)
    assert_close(im.nn.as_deq(network)(x), network(x), rtol=1e-5, atol=0)


def test_depth_is_no_obstacle():
    network = nn.Sequential(*[nn.Linear(2, 2, bias=False) for _ in range(50)])
    for layer in network:
        layer.weight.data = 1.1 * torch.linalg.qr(torch.randn(2, 2)).Q
    x = torch.randn(3, 2)
    assert_close(im.nn.as_deq(network)(x), network(x))


def test_growing_activations_are_no_obstacle():
    network = nn.Sequential(*[nn.Linear(2, 2, bias=False) for _ in range(4)])
    for layer in network:
        layer.weight.data = 1e4 * torch.eye(2)
    x = torch.ones(1, 2)
    assert_close(im.nn.as_deq(network)(x), network(x))


def test_whole_numbers_as_input():
    network = nn.Sequential(nn.Embedding(7, 3), nn.Flatten(), nn.Linear(12, 2))
    layer = im.nn.as_deq(network)
    x = torch.randint(7, (5, 4))
    value = layer(x)
    assert_close(value, network(x))
    weights = tuple(network.parameters())
    assert_close(gradients(value, *weights), gradients(network(x), *weights))


def test_as_deq_of_a_network_with_held_dropout():
    network = nn.Sequential(nn.Linear(4, 8), im.nn.Dropout(0.5), nn.Linear(8, 2))
    layer, x = im.nn.as_deq(network), torch.randn(3, 4)
    torch.manual_seed(1)
    value = layer(x)
    torch.manual_seed(1)
    assert_close(value, network(x))


class Apply(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def normalised(width):
    return nn.Sequential(nn.Linear(4, 8), im.nn.BatchNorm(8), nn.Tanh(), nn.Linear(8, width))


DECIDING = {
    "batch norm": lambda: normalised(2),
    "dropout and batch norm": lambda: nn.Sequential(
        nn.Linear(4, 8), im.nn.Dropout(0.5), nn.Tanh(), im.nn.BatchNorm(8), nn.Linear(8, 2)
    ),
    "weight norm": lambda: nn.Sequential(im.nn.WeightNorm(nn.Linear(4, 4)), nn.Tanh(), nn.Linear(4, 3)),
}


@pytest.mark.parametrize("name", DECIDING)
@pytest.mark.parametrize("z0", [None, 100.0])
def test_as_deq_decides_what_the_network_decides(name, z0):
    network = DECIDING[name]().double()
    own = copy.deepcopy(network)
    layer, x = im.nn.as_deq(network), input_of(6, 4)
    start = None if z0 is None else tuple(torch.full_like(z, z0) for z in layer.eval().init(x))
    layer.train()
    torch.manual_seed(1)
    value = layer(x, start)
    torch.manual_seed(1)
    expected = own(x)
    assert_close(value, expected)
    for a, b in zip(gradients(value, x, *network.parameters()), gradients(expected, x, *own.parameters())):
        assert_close(a, b)
    for (key, a), b in zip(network.named_buffers(), own.buffers()):
        assert_close(a, b, msg=key)  # running statistics: updated once


@pytest.mark.parametrize(
    "network",
    [
        nn.Sequential(nn.Linear(4, 4), nn.Softplus(), Apply(torch.log), nn.Linear(4, 2)),
        nn.Sequential(nn.Softmax(1), Apply(torch.reciprocal), nn.Linear(4, 2)),
    ],
)
def test_layers_that_are_undefined_at_zero(network):
    layer, x = im.nn.as_deq(network.double()), input_of(5, 4)
    value = layer(x)
    assert_close(value, network(x))
    assert (layer.solution.status == int(im.Status.MAX_STEPS)).all()
    inputs = (x, *network.parameters())
    assert_close(gradients(value, *inputs), gradients(network(x), *inputs))
    expected = jacfwd(network)(x)
    assert_close(jacfwd(layer)(x), expected)
    assert_close(jacrev(layer)(x), expected)


def test_the_start_of_as_deq_is_one_pass_that_is_not_recorded():
    class Seen(nn.Module):
        def __init__(self):
            super().__init__()
            self.recorded = []

        def forward(self, x):
            self.recorded.append(torch.is_grad_enabled())
            return x + 1

    seen = Seen()
    layer = im.nn.as_deq(nn.Sequential(nn.Linear(4, 4), seen, nn.Tanh()))
    layer(torch.randn(2, 4))
    first, *others = seen.recorded
    assert not first
    assert len(others) == 4  # at the start and after each of three steps
    seen.recorded.clear()
    layer(torch.randn(2, 4), layer.solution.value)
    assert len(seen.recorded) == 4


def test_as_deq_under_vmap():
    network, shape = NETWORKS["widths"]()
    layer = im.nn.as_deq(network)
    x = torch.randn(2, *shape)
    assert_close(vmap(layer)(x), network(x))
    w = torch.stack([network[0].weight.detach(), 2 * network[0].weight.detach()])
    got = vmap(lambda w: functional_call(layer, {"cell.layers.0.weight": w}, (x[0],)))(w)
    expected = [functional_call(network, {"0.weight": each}, (x[0],)) for each in w]
    assert_close(got, torch.stack(expected))


def test_as_deq_under_autocast():
    network, shape = NETWORKS["widths"]()
    x = torch.randn(shape)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(im.nn.as_deq(network)(x).float(), network(x).float(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("wrong", [nn.Linear(2, 2), nn.Sequential(), [nn.Tanh()]])
def test_as_deq_refuses_what_is_no_network(wrong):
    with pytest.raises(TypeError, match="Sequential"):
        im.nn.as_deq(wrong)


def deq(cell, **kwargs):
    return im.nn.DEQ(cell.double(), **{**TIGHT, **kwargs})


def assert_stacked(composed, stacked, x):
    value, expected = composed(x), stacked(x)
    assert_close(value, expected)
    inputs = (x, *stacked.parameters())
    for a, b in zip(gradients(value, *inputs), gradients(expected, *inputs)):
        assert_close(a, b, rtol=1e-7, atol=1e-10)
    assert {id(p) for p in composed.parameters()} == {id(p) for p in stacked.parameters()}


def input_of(*shape):
    return torch.randn(shape, dtype=DOUBLE, requires_grad=True)


def test_compose_is_stacking():
    first, second = deq(Dense()), deq(Dense())
    composed = im.nn.compose(first, second)
    assert_stacked(composed, nn.Sequential(first, second), input_of(3, 4))
    assert composed.solution.converged.all()
    assert isinstance(composed.solver, im.Anderson)


def test_compose_of_images():
    first, second = deq(Conv()), deq(Conv())
    assert_stacked(im.nn.compose(first, second), nn.Sequential(first, second), input_of(2, 4, 5, 5))


def test_compose_of_composed_layers():
    a, b, c = deq(Dense()), deq(Dense()), deq(Dense())
    stacked = nn.Sequential(a, b, c)
    x = input_of(3, 4)
    assert_stacked(im.nn.compose(im.nn.compose(a, b), c), stacked, x)
    assert_stacked(im.nn.compose(a, im.nn.compose(b, c)), stacked, x)


def test_compose_with_readouts_and_inits():
    first = deq(Dense(6), init=lambda x: x.new_zeros(len(x), 6), readout=lambda z: z[:, :3])
    second = deq(Dense(5), init=lambda x: x.new_zeros(len(x), 5), readout=lambda z: z.sum(1, keepdim=True))
    second.cell.linear.weight.data *= 0.5
    x = input_of(3, 1)
    stacked = nn.Sequential(first, nn.Identity())
    assert stacked(x).shape == (3, 3)

    class Widen(Dense):
        def forward(self, z, x):
            return super().forward(z, x.mean(1, keepdim=True))

    second.cell.__class__ = Widen
    assert_stacked(im.nn.compose(first, second), nn.Sequential(first, second), x)


def test_compose_of_pytrees():
    def zeros(x):
        return {"p": torch.zeros_like(x[0]), "q": torch.zeros_like(x[1])}

    first = deq(Tree(), init=zeros, readout=lambda z: (z["p"], z["q"]))
    second = deq(Tree(), init=zeros, readout=lambda z: z["q"])
    x = (input_of(2, 3), input_of(2, 2))
    composed = im.nn.compose(first, second)
    value, expected = composed(x), second(first(x))
    assert_close(value, expected)
    inputs = (*x, *first.parameters(), *second.parameters())
    assert_close(gradients(value, *inputs), gradients(expected, *inputs), rtol=1e-7, atol=1e-10)


def test_a_layer_composed_with_itself():
    layer = deq(Dense())
    assert_stacked(im.nn.compose(layer, layer), nn.Sequential(layer, layer), input_of(3, 4))


def test_compose_of_as_deq_layers():
    first = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3), nn.Tanh()).double()
    second = nn.Sequential(nn.Linear(3, 2)).double()
    composed = im.nn.compose(im.nn.as_deq(first), im.nn.as_deq(second))
    assert_stacked(composed, nn.Sequential(first, second), input_of(3, 4))
    thrice = im.nn.compose(composed, im.nn.as_deq(nn.Sequential(nn.Linear(2, 2), nn.Tanh()).double()))
    x = input_of(3, 4)
    assert_close(thrice(x), thrice.cell.second.layers(second(first(x))))


@pytest.mark.parametrize("order", ["network first", "network last"])
def test_compose_of_an_as_deq_layer_with_another(order):
    network = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    pair = [im.nn.as_deq(network), deq(Dense())]
    if order == "network last":
        pair.reverse()
    composed = im.nn.compose(*pair)
    assert_stacked(composed, nn.Sequential(*pair), input_of(3, 4))
    assert composed.solution.converged.all()


def test_compose_with_what_is_decided_once_a_solve():
    class Masked(Dense):
        def __init__(self):
            super().__init__()
            self.dropout = im.nn.Dropout(0.5)

        def forward(self, z, x):
            return self.dropout(super().forward(z, x))

    first, second = deq(Masked()), deq(Masked())
    x = input_of(3, 4)
    torch.manual_seed(4)
    value = im.nn.compose(first, second)(x)
    torch.manual_seed(4)
    assert_close(value, second(first(x)))


class Normalised(Dense):
    def __init__(self):
        super().__init__()
        self.norm = im.nn.BatchNorm(4)

    def forward(self, z, x):
        return 0.3 * torch.tanh(self.norm(super().forward(z, x)))


@pytest.mark.parametrize("second", [lambda: im.nn.as_deq(normalised(2).double()), lambda: deq(Normalised())])
def test_a_statistic_of_what_a_network_puts_out(second):
    first = im.nn.as_deq(nn.Sequential(nn.Linear(4, 4), nn.Softplus(), Apply(torch.log)).double())
    second = second()
    assert_stacked(im.nn.compose(first, second), nn.Sequential(first, second), input_of(6, 4))


def test_a_statistic_in_the_first_layer():
    first, second = deq(Normalised()), deq(Dense())
    assert_stacked(im.nn.compose(first, second), nn.Sequential(first, second), input_of(6, 4))


def test_a_statistic_of_an_equilibrium_that_is_not_known_yet_is_refused():
    first, second = deq(Dense()), deq(Normalised())
    composed, x = im.nn.compose(first, second), input_of(6, 4)
    with pytest.raises(ValueError, match="second layer computes batch statistics"):
        composed(x)
    composed.eval()
    assert_close(composed(x), second(first(x)))


@pytest.mark.parametrize("pair", [(nn.Linear(4, 4), None), (None, nn.Linear(4, 4))])
def test_compose_refuses_what_is_no_deq(pair):
    with pytest.raises(TypeError, match=r"must be a DEQ, got a Linear; as_deq"):
        im.nn.compose(*(deq(Dense()) if layer is None else layer for layer in pair))


def test_the_start_is_part_of_what_is_unrolled():
    def layer():
        once = im.FixedPointIteration(rtol=0, max_steps=1)
        return deq(Dense(), solver=once, adjoint=im.UnrolledAdjoint(), init=torch.tanh)

    composed, x = im.nn.compose(layer(), layer()), input_of(3, 4)
    z = (x.tanh(), x.tanh().tanh())
    for _ in range(2):
        z = composed.cell(z, x)
    value = composed(x)
    assert_close(value, z[1])
    assert_close(gradients(value, x), gradients(z[1], x))


def test_batch_dims_of_either():
    one_system = deq(Dense(), batch_dims=0)
    assert im.nn.compose(one_system, deq(Dense())).batch_dims == 0
    assert im.nn.compose(deq(Dense()), one_system).batch_dims == 0
    assert im.nn.compose(deq(Dense()), deq(Dense())).batch_dims == 1


@pytest.mark.parametrize(
    "make",
    [
        lambda: im.nn.as_deq(nn.Sequential(nn.Linear(4, 4), nn.Tanh())),
        lambda: im.nn.compose(im.nn.DEQ(Dense()), im.nn.DEQ(Dense())),
    ],
)
def test_they_can_be_copied_and_pickled(make):
    layer, x = make(), torch.randn(3, 4)
    expected = layer(x).detach()
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), expected)
        with torch.no_grad():
            next(other.parameters()).mul_(0.5)
        assert torch.equal(layer(x), expected)
        assert not torch.equal(other(x), expected)
