"""What a cell decides once a solve: once, exactly differentiated, and like torch.nn elsewhere."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn.utils import parametrizations
from torch.testing import assert_close

import implicitly as im
from implicitly.nn.per_solve import PerSolve, decide_once
from tests.nn.cells import PER_SOLVE, Around, contracting, gradients, iterated

EACH = pytest.mark.parametrize("name", PER_SOLVE)
DOUBLE = torch.float64


def layer_of(name, **kwargs):
    kwargs = {"solver": im.Anderson(rtol=1e-12), "adjoint": im.ImplicitAdjoint(rtol=1e-12), **kwargs}
    return im.nn.DEQ(PER_SOLVE[name]().double(), **kwargs)


def module_of(layer):
    return next(m for m in layer.modules() if isinstance(m, PerSolve))


def count_decisions(module):
    decided, decide = [], module.decide

    def counting(x):
        decided.append(decide(x))
        return decided[-1]

    module.decide = counting
    return decided


# In evaluation dropout decides nothing.
@pytest.mark.parametrize(
    ("name", "training"), [(n, t) for n in PER_SOLVE for t in (True, False) if t or n != "dropout"]
)
def test_it_decides_once_a_solve_and_anew_in_the_next(name, training):
    layer = layer_of(name).train(training)
    decided = count_decisions(module_of(layer))
    x = torch.randn(3, 4, dtype=DOUBLE, requires_grad=True)
    layer(x).sum().backward()
    assert len(decided) == 1
    assert layer.solution.evaluations > 5
    layer(2 * x).sum().backward()
    assert len(decided) == 2
    layer.iterates(x, (2, 4))[0].sum().backward()
    assert len(decided) == 3
    if training and name in ("dropout", "batch_norm"):
        assert not torch.equal(decided[0], decided[1])


@EACH
def test_nothing_is_held_between_solves(name):
    layer = layer_of(name)
    x = torch.randn(3, 4, dtype=DOUBLE)
    layer(x)
    module = module_of(layer)
    assert module.held.numel() == 0
    assert module.recorded is None
    assert not [k for k in layer.state_dict() if k.endswith("held")]
    copy.deepcopy(layer)


def test_an_exception_in_the_cell_leaves_nothing_recorded():
    layer = layer_of("dropout")
    with pytest.raises(RuntimeError):
        layer(torch.randn(3, 5, dtype=DOUBLE), torch.zeros(3, 4, dtype=DOUBLE))
    assert module_of(layer).recorded is None


@EACH
def test_the_seed_decides(name):
    layer = layer_of(name)
    x = torch.randn(3, 4, dtype=DOUBLE)
    state = copy.deepcopy(layer.state_dict())
    values = []
    for seed in (1, 1, 2):
        layer.load_state_dict(state)
        torch.manual_seed(seed)
        values.append(layer(x).detach())
    assert torch.equal(values[0], values[1])
    assert torch.equal(values[0], values[2]) == (name != "dropout")


@EACH
@pytest.mark.parametrize("training", [True, False])
def test_the_gradient_is_that_of_unrolling_what_was_decided(name, training):
    layer = layer_of(name).train(training)
    twin = copy.deepcopy(layer)
    x = torch.randn(3, 4, dtype=DOUBLE, requires_grad=True)
    torch.manual_seed(3)
    value = layer(x)
    torch.manual_seed(3)
    held, _ = decide_once(twin.cell, torch.zeros_like(x), x)
    reference = iterated(lambda z: functional_call(twin.cell, held, (z, x)), torch.zeros_like(x))
    assert_close(value, reference)
    got = gradients(value, x, *layer.parameters())
    expected = gradients(reference, x, *twin.parameters())
    for a, b in zip(got, expected):
        assert_close(a, b, rtol=1e-8, atol=1e-10)
    # Batch normalisation takes away the mean, and with it what the bias before it does.
    unused = sum(float(b.abs().max()) < 1e-12 for b in expected)
    assert unused == (name == "batch_norm" and training)


@pytest.mark.parametrize("name", PER_SOLVE)
def test_the_gradient_is_that_of_finite_differences(name):
    layer = layer_of(name)
    x = torch.randn(3, 4, dtype=DOUBLE, requires_grad=True)
    names, values = zip(*layer.named_parameters())
    start = copy.deepcopy(dict(layer.named_buffers()))

    def call(x, *values):
        torch.manual_seed(5)
        buffers = {k: v.clone() for k, v in start.items()}
        return functional_call(layer, {**dict(zip(names, values)), **buffers}, (x,))

    if name == "spectral_norm":
        # u and v are constants of the derivative, so only at the converged u are differences comparable.
        module_of(layer).eval().u.copy_(torch.linalg.svd(module_of(layer).raw.detach()).U[:, 0])
        start = copy.deepcopy(dict(layer.named_buffers()))
        assert torch.autograd.gradcheck(lambda x: call(x, *values), (x,))
    else:
        assert torch.autograd.gradcheck(call, (x, *values))


@EACH
def test_finished_samples_are_dropped_and_keep_their_own_decision(name):
    layer = layer_of(name, solver=im.FixedPointIteration(rtol=1e-12, max_steps=300))
    batches = []
    layer.cell.register_forward_pre_hook(lambda module, args: batches.append(len(args[0])))
    x = torch.randn(16, 4, dtype=DOUBLE)
    x[:12] *= 20
    layer(x)
    assert layer.solution.converged.all()
    assert min(batches) < 16
    state = copy.deepcopy(layer.state_dict())
    values = []
    for batch_dims in (0, 1):
        layer.load_state_dict(state)
        torch.manual_seed(0)
        values.append(im.nn.DEQ(layer.cell, layer.solver, batch_dims=batch_dims)(x))
    assert_close(*values, rtol=1e-9, atol=1e-9)


def test_dropout_is_that_of_torch():
    x = torch.ones(1000, 20)
    ours, theirs = im.nn.Dropout(0.3), nn.Dropout(0.3)
    assert torch.equal(ours.eval()(x), theirs.eval()(x))
    out = ours.train()(x)
    kept = out != 0
    assert_close(out[kept], torch.full_like(out[kept], 1 / 0.7))
    assert abs(kept.double().mean().item() - 0.7) < 0.02
    assert im.nn.Dropout(0.0)(x) is x


@pytest.mark.parametrize(
    ("shape", "dims"), [((4, 7, 5), (1,)), ((4, 3, 6, 6), (2, 3)), ((4, 3, 6, 6), (-1, -2)), ((4, 5), ())]
)
def test_shared_dims_have_one_mask(shape, dims):
    torch.manual_seed(1)
    out = im.nn.Dropout(0.5, dims)(torch.ones(shape))
    for d in dims:
        assert torch.equal(out, out.narrow(d, 0, 1).expand_as(out))
    assert 0 < (out != 0).double().mean() < 1
    assert not torch.equal(out[0], out[1])


def test_shared_dims_in_a_solve():
    layer = im.nn.DEQ(Around(im.nn.Dropout(0.5, (1,))))
    x = torch.randn(3, 5, 4, requires_grad=True)
    layer(x).sum().backward()
    assert layer.solution.converged.all()


@pytest.mark.parametrize("p", [-0.1, 1.0, 2.0])
def test_dropout_refuses_what_is_no_probability(p):
    with pytest.raises(ValueError, match="p must be"):
        im.nn.Dropout(p)


@pytest.mark.parametrize("dim", [2, -2, -3])
def test_dropout_refuses_dimensions_that_the_input_has_not(dim):
    with pytest.raises(ValueError, match=r"shared_dims=.* the input has shape \(3, 4\)"):
        im.nn.Dropout(0.5, (dim,))(torch.ones(3, 4))


def test_dropout_refuses_to_share_a_mask_between_samples():
    with pytest.raises(ValueError, match="samples"):
        im.nn.Dropout(0.5, (0,))


@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 5), (6, 3, 4, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_batch_norm_is_that_of_torch(shape, dtype):
    ours = im.nn.BatchNorm(3, momentum=0.3).to(dtype)
    theirs = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}[len(shape)](3, momentum=0.3).to(dtype)
    with torch.no_grad():
        for module in (ours, theirs):
            module.weight.copy_(torch.tensor([1.0, 2.0, -0.5]))
            module.bias.copy_(torch.tensor([0.1, 0.2, 0.3]))
    x = (3 * torch.randn(shape, dtype=dtype) + 1).requires_grad_()
    for training in (True, False):
        ours.train(training)
        theirs.train(training)
        a, b = ours(x), theirs(x)
        assert a.dtype == dtype
        assert_close(a, b)
        assert_close(gradients(a, x, ours.weight, ours.bias), gradients(b, x, theirs.weight, theirs.bias))
        assert_close(ours.running_mean, theirs.running_mean)
        assert_close(ours.running_var, theirs.running_var)


def test_batch_norm_updates_its_running_statistics_once_a_solve():
    layer = layer_of("batch_norm")
    x = torch.randn(8, 4, dtype=DOUBLE)
    reference = nn.BatchNorm1d(4).double()
    reference(layer.cell.linear(torch.zeros_like(x)) + x)
    layer(x).sum().backward()
    assert_close(layer.cell.module.running_mean, reference.running_mean)
    assert_close(layer.cell.module.running_var, reference.running_var)
    before = copy.deepcopy(layer.cell.module.state_dict())
    layer.eval()(x)
    assert_close(layer.cell.module.state_dict(), before, rtol=0, atol=0)


def test_batch_norm_loads_what_torch_saved():
    theirs = nn.BatchNorm1d(4)
    theirs(torch.randn(8, 4))
    ours = im.nn.BatchNorm(4)
    keys = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert not keys.missing_keys
    assert keys.unexpected_keys == ["num_batches_tracked"]
    x = torch.randn(3, 4)
    assert_close(ours.eval()(x), theirs.eval()(x))


@EACH
def test_under_autocast(name):
    layer = im.nn.DEQ(PER_SOLVE[name](), im.Anderson(rtol=2e-2))
    x = torch.randn(4, 4, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        value = layer(x)
    value.sum().backward()
    assert value.dtype == torch.float32
    torch.manual_seed(0)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("make", [lambda: nn.Linear(5, 3), lambda: nn.Conv2d(2, 3, 3), lambda: nn.Conv1d(2, 3, 2)])
def test_weight_norm_is_that_of_torch(make):
    layer = make()
    x = torch.randn(2, *((5,) if isinstance(layer, nn.Linear) else (2,) + (6,) * (layer.weight.ndim - 2)))
    plain = layer(x)
    theirs = parametrizations.weight_norm(copy.deepcopy(layer))
    ours = im.nn.WeightNorm(layer)
    assert_close(ours(x), plain)
    assert_close(theirs(x), plain)
    with torch.no_grad():
        ours.gain.mul_(1.7)
        ours.direction.add_(0.1)
        theirs.parametrizations.weight.original0.mul_(1.7)
        theirs.parametrizations.weight.original1.add_(0.1)
    assert_close(ours(x), theirs(x))
    a = gradients(ours(x), ours.direction, ours.gain)
    b = gradients(theirs(x), theirs.parametrizations.weight.original1, theirs.parametrizations.weight.original0)
    assert_close(a, (b[0], b[1].flatten()))
    assert {n for n, _ in ours.named_parameters()} == {"direction", "gain", "layer.bias"}


@pytest.mark.parametrize("make", [lambda: nn.Linear(5, 3), lambda: nn.Conv2d(2, 3, 3)])
def test_spectral_norm_is_that_of_torch_once_converged(make):
    layer = make()
    x = torch.randn(2, *((5,) if isinstance(layer, nn.Linear) else (2, 6, 6)))
    theirs = parametrizations.spectral_norm(copy.deepcopy(layer), n_power_iterations=200)
    ours = im.nn.SpectralNorm(layer, power_iterations=200)
    for training in (True, False):
        ours.train(training)
        theirs.train(training)
        assert_close(ours(x), theirs(x))
        assert_close(gradients(ours(x), ours.raw), gradients(theirs(x), theirs.parametrizations.weight.original))
    weight = ours.decide(x)
    assert_close(torch.linalg.matrix_norm(weight.flatten(1), 2), torch.tensor(1.0))


def test_spectral_norm_bounds_and_goes_on_from_solve_to_solve():
    module = im.nn.SpectralNorm(nn.Linear(30, 30), bound=0.8)
    errors = []
    for _ in range(60):
        weight = module.decide(torch.empty(0))
        errors.append(abs(torch.linalg.matrix_norm(weight, 2).item() - 0.8))
    assert errors[-1] < 1e-3
    assert errors[-1] < errors[0]
    module.eval()
    before = module.u.clone()
    module(torch.randn(2, 30))
    assert torch.equal(module.u, before)
    assert "u" in module.state_dict()


@pytest.mark.parametrize(
    "weight", [[[1.0, -1.0], [-1.0, 1.0]], [[1.0, 2.0], [-1.0, -2.0]], [[0.0, 1.0], [0.0, -1.0]]]
)
def test_spectral_norm_of_weights_whose_columns_sum_to_zero(weight):
    layer = nn.Linear(2, 2)
    layer.weight.data = torch.tensor(weight)
    module = im.nn.SpectralNorm(layer)
    assert_close(torch.linalg.matrix_norm(module.decide(torch.empty(0)), 2), torch.tensor(1.0))


def test_spectral_norm_takes_nothing_from_the_global_generator():
    layer = nn.Linear(4, 4)
    torch.manual_seed(7)
    expected = torch.randn(3)
    torch.manual_seed(7)
    im.nn.SpectralNorm(layer)
    assert torch.equal(torch.randn(3), expected)


@pytest.mark.parametrize("arguments", [{"bound": 0.0}, {"power_iterations": 0}])
def test_spectral_norm_refuses_bad_arguments_and_leaves_the_layer_as_it_was(arguments):
    layer = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="bound"):
        im.nn.SpectralNorm(layer, **arguments)
    assert isinstance(layer.weight, nn.Parameter)


@pytest.mark.parametrize("wrap", [im.nn.WeightNorm, im.nn.SpectralNorm])
def test_a_layer_without_weight_is_refused(wrap):
    with pytest.raises(TypeError, match="weight"):
        wrap(nn.ReLU())


@pytest.mark.parametrize("wrap", [im.nn.WeightNorm, im.nn.SpectralNorm])
def test_a_weight_that_is_no_matrix_is_refused(wrap):
    layer = nn.LayerNorm(4)
    with pytest.raises(ValueError, match=r"LayerNorm has shape \(4,\)"):
        wrap(layer)
    assert isinstance(layer.weight, nn.Parameter)


@pytest.mark.parametrize("wrap", [im.nn.WeightNorm, im.nn.SpectralNorm])
def test_a_reparametrised_layer_round_trips(wrap):
    x = torch.randn(2, 4)
    module = wrap(nn.Linear(4, 4)).eval()
    other = wrap(nn.Linear(4, 4)).eval()
    other.load_state_dict(module.state_dict())
    assert torch.equal(module(x), other(x))
    assert torch.equal(copy.deepcopy(module)(x), module(x))
    assert module.double()(x.double()).dtype == DOUBLE
    assert not [k for k in module.state_dict() if k in ("layer.weight", "held")]


def test_a_module_used_twice_in_a_cell_decides_once():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = im.nn.WeightNorm(contracting(nn.Linear(4, 4)))

        def forward(self, z, x):
            return torch.tanh(self.layer(torch.relu(self.layer(z))) + x)

    layer = im.nn.DEQ(Twice())
    decided = count_decisions(layer.cell.layer)
    x = torch.randn(3, 4)
    layer(x).sum().backward()
    assert len(decided) == 1
    assert layer.solution.converged.all()


class AtTwoPlaces(nn.Module):
    def __init__(self, module, width):
        super().__init__()
        self.module, self.a, self.b = module, nn.Linear(4, width), nn.Linear(width, 4)

    def forward(self, z, x):
        return 0.3 * torch.tanh(self.module(self.b(self.module(self.a(z)))) + x)


def test_a_statistic_serves_one_place_of_a_cell():
    layer, x = im.nn.DEQ(AtTwoPlaces(im.nn.BatchNorm(4), 4)), torch.randn(6, 4)
    with pytest.raises(ValueError, match="BatchNorm is used twice in a cell"):
        layer(x)
    assert layer.eval()(x).shape == (6, 4)  # by the running statistics, which are of both


def test_a_mask_serves_places_of_one_shape():
    x = torch.randn(6, 4)
    with pytest.raises(ValueError, match=r"mask for this solve has shape \(6, 8\), .* shape \(6, 4\)"):
        im.nn.DEQ(AtTwoPlaces(im.nn.Dropout(0.5), 8))(x)
    assert im.nn.DEQ(AtTwoPlaces(im.nn.Dropout(0.5), 8)).eval()(x).shape == (6, 4)
    assert im.nn.DEQ(AtTwoPlaces(im.nn.Dropout(0.5), 4))(x).shape == (6, 4)


def test_a_module_held_under_two_names_is_left_as_it_was():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = Around(im.nn.Dropout(0.5))
            self.b = self.a

        def forward(self, z, x):
            return self.b(self.a(z, x), x)

    layer = im.nn.DEQ(Two())
    x = torch.randn(3, 4)
    layer(x).sum().backward()
    assert layer.cell.a.module.held.numel() == 0
    assert layer.cell.a.linear.weight.grad.abs().sum() > 0


def test_a_cell_that_is_itself_such_a_module():
    class Bare(PerSolve):
        sample_dim = 0

        def decide(self, z):
            return torch.rand_like(z)

        def use(self, z, held):
            return 0.5 * z * held

        def forward(self, z, x):
            return super().forward(z) + x

    layer = im.nn.DEQ(Bare())
    x = torch.randn(3, 4)
    value = layer(x)
    assert layer.solution.converged.all()
    assert not torch.equal(value, layer(x))


def test_only_what_is_reached_is_decided():
    class Sometimes(Around):
        def forward(self, z, x):
            return super().forward(z, x) if self.training else 0.5 * z + x

    layer = im.nn.DEQ(Sometimes(im.nn.Dropout(0.5)))
    decided = count_decisions(layer.cell.module)
    x = torch.randn(3, 4)
    layer.eval()
    assert_close(layer(x), 2 * x, atol=1e-4, rtol=1e-4)
    assert decided == []


@EACH
def test_an_empty_batch(name):
    layer = im.nn.DEQ(PER_SOLVE[name]())
    before = {k: b.clone() for k, b in layer.named_buffers() if k.partition("running")[1]}
    assert layer(torch.zeros(0, 4)).shape == (0, 4)
    for key, b in before.items():
        assert torch.equal(layer.get_buffer(key), b)


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_dropout_in_an_ensemble(randomness):
    layers = [im.nn.DEQ(PER_SOLVE["dropout"]()) for _ in range(2)]
    parameters, _ = stack_module_state(layers)
    same = {k: v[:1].expand(3, *v.shape[1:]) for k, v in parameters.items()}
    base, x = layers[0], torch.randn(5, 4)

    def call(p):
        return functional_call(base, p, (x,))

    out = vmap(call, randomness=randomness)(same)
    assert torch.equal(out[0], out[1]) == (randomness == "same")
    assert module_of(base).held.numel() == 0


def test_batch_norm_in_an_ensemble():
    layers = [layer_of("batch_norm") for _ in range(2)]
    parameters, buffers = stack_module_state(layers)
    base, x = copy.deepcopy(layers[0]), torch.randn(5, 4, dtype=DOUBLE)
    out = vmap(lambda p, b: functional_call(base, (p, b), (x,)))(parameters, buffers)  # warnings are errors
    for i, layer in enumerate(layers):
        assert_close(out[i], layer(x))
        for key, b in layer.named_buffers():
            assert_close(buffers[key][i], b)


@pytest.mark.parametrize("name", ["dropout", "weight_norm"])
def test_under_func_grad(name):
    layer = layer_of(name)
    x = torch.randn(3, 4, dtype=DOUBLE)
    torch.manual_seed(2)
    got = grad(lambda p: functional_call(layer, p, (x,)).sin().sum())(dict(layer.named_parameters()))
    torch.manual_seed(2)
    layer(x).sin().sum().backward()
    for key, p in layer.named_parameters():
        assert_close(got[key], p.grad)


@pytest.mark.parametrize("name", ["batch_norm", "spectral_norm"])
def test_under_func_grad_with_the_buffers_given(name):
    layer = layer_of(name)
    x = torch.randn(3, 4, dtype=DOUBLE)
    buffers = {k: v.clone() for k, v in layer.named_buffers()}

    def loss(p, b):
        b = {k: v.clone() for k, v in b.items()}
        return functional_call(layer, {**p, **b}, (x,)).sin().sum(), b

    got, moved = grad(loss, has_aux=True)(dict(layer.named_parameters()), buffers)
    layer(x).sin().sum().backward()
    for key, p in layer.named_parameters():
        assert_close(got[key], p.grad)
    for key, b in layer.named_buffers():
        if "weight" not in key:
            assert_close(moved[key], b)
