"""The layer: equilibria, gradients, state, transforms."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jacrev, jvp, stack_module_state, vmap
from torch.testing import assert_close

import implicitly as im
from tests.nn.cells import Conv, Dense, Tree, gradients, iterated

TIGHT = im.Anderson(rtol=1e-12)


def is_plain(t):
    return not (t.requires_grad or t.grad_fn or torch._C._functorch.is_functorch_wrapped_tensor(t))


def assert_plain(solution):
    for t in (
        *torch.utils._pytree.tree_leaves(solution.value),
        solution.status,
        solution.residual,
        solution.steps,
    ):
        assert is_plain(t)


class Counting(nn.Module):
    def __init__(self, cell):
        super().__init__()
        self.cell = cell
        self.batches = []

    def forward(self, z, x):
        self.batches.append(len(z))
        return self.cell(z, x)


@pytest.mark.parametrize("adjoint", [im.ImplicitAdjoint(), im.PhantomAdjoint(), im.UnrolledAdjoint()])
def test_it_is_fixed_point_of_its_cell(adjoint):
    cell, x = Dense(), torch.randn(3, 4, requires_grad=True)
    layer = im.nn.DEQ(cell, im.Broyden(), adjoint)
    value = layer(x)
    reference = im.fixed_point(cell, torch.zeros(3, 4), x, solver=im.Broyden(), adjoint=adjoint, in_dims=0)
    assert torch.equal(value, reference.value)
    assert torch.equal(layer.solution.status, reference.status)
    assert torch.equal(layer.solution.steps, reference.steps)
    assert layer.solution.evaluations == reference.evaluations
    inputs = (x, *cell.parameters())
    for a, b in zip(gradients(value, *inputs), gradients(reference.value, *inputs)):
        assert torch.equal(a, b)


def test_a_cell_that_was_traced_has_the_same_gradients():
    cell, x = Dense(), torch.randn(3, 4, requires_grad=True)
    with pytest.warns(DeprecationWarning, match=r"torch\.jit\.trace"):
        traced = torch.jit.trace(cell, (x.detach(), x.detach()), check_trace=False)
    for got, expected in zip(*(gradients(im.nn.DEQ(f)(x), x, *cell.parameters()) for f in (traced, cell))):
        assert_close(got, expected)
    assert_close(grad(lambda x: im.nn.DEQ(traced)(x).sum())(x), grad(lambda x: im.nn.DEQ(cell)(x).sum())(x))


def test_gradcheck_of_input_and_parameters():
    layer = im.nn.DEQ(Dense(2).double(), TIGHT, im.ImplicitAdjoint(rtol=1e-12))
    x = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    names, values = zip(*layer.named_parameters())

    def call(x, *values):
        return functional_call(layer, dict(zip(names, values)), (x,))

    assert torch.autograd.gradcheck(call, (x, *values), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, (x, *values))


def test_the_start_is_used_and_gets_no_gradient():
    layer, x = im.nn.DEQ(Dense()), torch.randn(3, 4)
    answer = layer(x).detach()
    cold = layer.solution.steps
    z0 = answer.clone().requires_grad_()
    value = layer(x, z0)
    assert (layer.solution.steps < cold).all()
    assert torch.autograd.grad(value.sum(), z0, allow_unused=True) == (None,)


def test_init_and_readout():
    layer = im.nn.DEQ(
        Dense(6),
        init=lambda x: x.new_zeros(len(x), 6),
        readout=lambda z: z[:, :2],
    )
    x = torch.randn(3, 1)
    value = layer(x)
    assert value.shape == (3, 2)
    assert layer.solution.value.shape == (3, 6)
    assert_close(layer.cell(layer.solution.value, x)[:, :2], value, atol=1e-4, rtol=1e-4)


def test_its_parameters_and_state_are_the_cells():
    cell = Dense()
    layer = im.nn.DEQ(cell, warm_start=im.nn.LastBatch())
    layer(torch.randn(3, 4)).sum().backward()
    assert [id(p) for p in layer.parameters()] == [id(p) for p in cell.parameters()]
    assert set(layer.state_dict()) == {"cell." + k for k in cell.state_dict()}


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save", "state_dict"])
@pytest.mark.parametrize("adjoint", [im.ImplicitAdjoint(), im.UnrolledAdjoint()])
def test_copies_compute_the_same_and_share_nothing(how, adjoint):
    layer = im.nn.DEQ(Dense(), adjoint=adjoint, warm_start=im.nn.LastBatch())
    x = torch.randn(3, 4)
    layer(x).sum().backward()
    if how == "deepcopy":
        other = copy.deepcopy(layer)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(layer))
    elif how == "torch.save":
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    else:
        other = im.nn.DEQ(Dense(), adjoint=adjoint)
        other.load_state_dict(layer.state_dict())
    layer.eval()
    other.eval()
    expected = layer(x).detach()
    assert torch.equal(other(x), expected)
    with torch.no_grad():
        other.cell.linear.weight.mul_(0.5)
    assert torch.equal(layer(x), expected)
    assert not torch.equal(other(x), expected)


def test_another_cell_can_be_put_in():
    layer = im.nn.DEQ(nn.ModuleList())
    layer.cell = Dense()
    x = torch.randn(2, 4)
    assert_close(layer.cell(layer(x), x), layer(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_to_a_dtype(dtype):
    layer = im.nn.DEQ(Dense()).to(dtype)
    x = torch.randn(3, 4).to(dtype).requires_grad_()
    value = layer(x)
    value.sum().backward()
    assert value.dtype == x.grad.dtype == layer.cell.linear.weight.grad.dtype == dtype
    reference = copy.deepcopy(layer).double()
    assert_close(
        value.double(), reference(x.detach().double()), atol=20 * torch.finfo(dtype).eps ** (2 / 3), rtol=0
    )


def test_train_and_eval_reach_the_cell():
    layer = im.nn.DEQ(Dense())
    assert not layer.eval().cell.training
    assert layer.train().cell.training


@pytest.mark.parametrize("adjoint", [im.ImplicitAdjoint(), im.PhantomAdjoint(), im.UnrolledAdjoint()])
def test_what_it_remembers_holds_no_graph(adjoint):
    layer = im.nn.DEQ(Dense(), adjoint=adjoint)
    x = torch.randn(3, 4, requires_grad=True)
    layer(x).sum().backward()
    assert_plain(layer.solution)
    if isinstance(adjoint, im.ImplicitAdjoint):
        assert_plain(layer.backward_solution)
        assert layer.backward_solution.converged.all()
    else:
        assert layer.backward_solution is None


@pytest.mark.parametrize("adjoint", [im.ImplicitAdjoint(), im.UnrolledAdjoint()])
def test_nothing_of_a_step_outlives_it(adjoint):
    layer = im.nn.DEQ(Dense(), adjoint=adjoint, warm_start=im.nn.LastBatch())
    gone = []
    for step in range(6):
        x = torch.randn(3, 4, requires_grad=True)
        value = layer(x)
        if step % 2:
            value.sum().backward()
        layer.zero_grad()
        gone += [weakref.ref(x), weakref.ref(value)]
        del x, value
    gc.collect()
    assert not [r for r in gone if r() is not None]


@pytest.mark.usefixtures("only_what_the_test_makes")
def test_the_number_of_live_tensors_does_not_grow():
    layer = im.nn.DEQ(Dense(), warm_start=im.nn.LastBatch())
    counts = []
    for _ in range(5):
        for _ in range(10):
            layer.zero_grad()
            layer(torch.randn(3, 4)).sum().backward()
        gc.collect()
        counts.append(sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects()))
    assert counts[-1] == counts[1]


def test_listening_to_the_backward_solve_keeps_the_users_listener():
    heard = []
    layer = im.nn.DEQ(Dense(), adjoint=im.ImplicitAdjoint(listen=heard.append))
    layer(torch.randn(3, 4)).sum().backward()
    assert len(heard) == 1
    assert torch.equal(heard[0].residual, layer.backward_solution.residual)
    layer(torch.randn(3, 4))
    assert layer.backward_solution is None


def test_two_calls_before_one_backward():
    layer = im.nn.DEQ(Dense().double(), TIGHT)
    a, b = torch.randn(2, 3, 4, dtype=torch.float64)
    (layer(a).sin().sum() + layer(b).cos().sum()).backward()
    together = [p.grad for p in layer.parameters()]
    layer.zero_grad()
    layer(a).sin().sum().backward()
    layer(b).cos().sum().backward()
    for p, expected in zip(layer.parameters(), together):
        assert_close(p.grad, expected)


def test_a_layer_used_twice_in_a_row_is_differentiated_through_both():
    layer = im.nn.DEQ(Dense().double(), TIGHT, im.ImplicitAdjoint(rtol=1e-12))
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: layer(layer(x)), (x,))


def test_backward_twice():
    layer, x = im.nn.DEQ(Dense()), torch.randn(3, 4, requires_grad=True)
    loss = layer(x).sin().sum()
    first = torch.autograd.grad(loss, (x, *layer.parameters()), retain_graph=True)
    second = torch.autograd.grad(loss, (x, *layer.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_under_func_grad():
    layer, x = im.nn.DEQ(Dense()), torch.randn(3, 4)
    parameters = dict(layer.named_parameters())
    got = grad(lambda p: functional_call(layer, p, (x,)).sin().sum())(parameters)
    assert_plain(layer.solution)
    assert layer.backward_solution is None or all(is_plain(t) for t in (layer.backward_solution.value,))
    layer(x).sin().sum().backward()
    for name, p in layer.named_parameters():
        assert_close(got[name], p.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("transform", ["grad_grad", "jacrev", "jvp", "vmap_grad"])
def test_nothing_of_a_transform_leaks(transform):
    layer = im.nn.DEQ(Dense(), warm_start=im.nn.LastBatch())
    x = torch.randn(3, 4, requires_grad=True)

    def loss(x):
        return layer(x).sin().sum()

    if transform == "grad_grad":
        grad(lambda x: grad(loss)(x).sum())(x)
    elif transform == "jacrev":
        jacrev(layer)(x)
    elif transform == "jvp":
        jvp(layer, (x,), (x,))
    else:
        vmap(grad(loss))(torch.randn(2, 3, 4))
    assert_plain(layer.solution)
    if transform == "vmap_grad":
        assert layer.warm_start.value is None  # as no single start is
    else:
        assert_plain(im.Solution(layer.warm_start.value, *(torch.zeros(1),) * 3, 0))
    if layer.backward_solution is not None:
        assert_plain(layer.backward_solution)
    assert_close(layer(x.detach()), im.nn.DEQ(layer.cell)(x.detach()), atol=1e-4, rtol=1e-4)


class WithBuffer(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("shift", torch.randn(4))

    def forward(self, z, x):
        return torch.tanh(0.3 * self.linear(z) + x + self.shift)


def test_gradients_of_an_ensemble_whose_buffers_are_mapped():
    layers = [im.nn.DEQ(WithBuffer()) for _ in range(3)]
    parameters, buffers = stack_module_state(layers)
    base, x = copy.deepcopy(layers[0]), torch.randn(5, 4)
    each = vmap(grad(lambda p, b: functional_call(base, (p, b), (x,)).sin().sum()))(parameters, buffers)
    for i, layer in enumerate(layers):
        layer(x).sin().sum().backward()
        assert_close(each["cell.linear.weight"][i], layer.cell.linear.weight.grad, atol=1e-4, rtol=1e-4)


def test_an_ensemble_by_vmap():
    layers = [im.nn.DEQ(Dense()) for _ in range(3)]
    parameters, buffers = stack_module_state(layers)
    base, x = copy.deepcopy(layers[0]), torch.randn(5, 4)

    def call(p, b):
        return functional_call(base, (p, b), (x,))

    together = vmap(call)(parameters, buffers)
    assert_close(together, torch.stack([layer(x) for layer in layers]), atol=1e-5, rtol=1e-4)
    assert_plain(base.solution)
    assert base.solution.value.shape == (3, 5, 4)
    assert base.solution.status.shape == (3, 5)
    each = vmap(grad(lambda p, b: call(p, b).sin().sum()))(parameters, buffers)
    for i, layer in enumerate(layers):
        layer(x).sin().sum().backward()
        assert_close(each["cell.linear.weight"][i], layer.cell.linear.weight.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("outside", [True, False])
def test_autocast(outside):
    norm, rtol = 0.6, 1e-2
    layer = im.nn.DEQ(Dense(16, norm), im.Anderson(rtol=rtol), im.ImplicitAdjoint(rtol=rtol))
    x = torch.randn(3, 16, requires_grad=True)
    inputs = (x, layer.cell.linear.weight)
    exact = gradients(im.nn.DEQ(layer.cell)(x), *inputs)
    seen = []
    handle = layer.cell.linear.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        value = layer(x)
    assert value.dtype == torch.float32
    forward = len(seen)
    with torch.autocast("cpu", torch.bfloat16, enabled=not outside):
        got = gradients(value, *inputs)
    handle.remove()
    assert len(seen) > forward
    assert set(seen) == {torch.bfloat16}
    for a, b in zip(got, exact):
        assert a.dtype == torch.float32
        # A residual of rtol is an error of rtol / (1 - norm): once in the value, once in the backward solve.
        assert (a - b).norm() < 2 * rtol / (1 - norm) * b.norm()


def test_pytrees():
    layer = im.nn.DEQ(
        Tree().double(),
        TIGHT,
        im.ImplicitAdjoint(rtol=1e-12),
        init=lambda x: {"p": torch.zeros_like(x[0]), "q": torch.zeros_like(x[1])},
    )
    x = (torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 2, dtype=torch.float64))
    x = tuple(t.requires_grad_() for t in x)
    value = layer(x)
    assert set(value) == {"p", "q"}
    assert_plain(layer.solution)

    def both(*x):
        value = layer(x)
        return value["p"], value["q"]

    assert torch.autograd.gradcheck(both, x)


@pytest.mark.parametrize("size", [(5, 6), (1, 6)])
def test_channels_last(size):
    layer = im.nn.DEQ(Conv()).to(memory_format=torch.channels_last)
    x = torch.randn(2, 4, *size).to(memory_format=torch.channels_last).requires_grad_()
    value = layer(x)
    assert value.is_contiguous(memory_format=torch.channels_last)
    assert layer.solution.value.is_contiguous(memory_format=torch.channels_last)
    value.sum().backward()
    plain = im.nn.DEQ(copy.deepcopy(layer.cell).to(memory_format=torch.contiguous_format))
    y = x.detach().contiguous().requires_grad_()
    expected = plain(y)
    assert_close(value, expected, atol=1e-4, rtol=1e-4)
    expected.sum().backward()
    assert_close(x.grad, y.grad, atol=1e-4, rtol=1e-3)


def test_a_layer_inside_a_cell():
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = im.nn.DEQ(Dense(2), im.Anderson(rtol=1e-14), im.ImplicitAdjoint(rtol=1e-13))
            self.linear = nn.Linear(2, 2)

        def forward(self, z, x):
            return 0.4 * torch.tanh(self.linear(z)) + 0.3 * self.inner(0.3 * z + x)

    layer = im.nn.DEQ(Nested().double(), TIGHT, im.ImplicitAdjoint(rtol=1e-12))
    x = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))
    weight = layer.cell.inner.cell.linear.weight
    value = layer(x)
    reference = iterated(lambda z: layer.cell(z, x), torch.zeros_like(x), 40)
    for a, b in zip(gradients(value, x, weight), gradients(reference, x, weight)):
        assert_close(a, b, rtol=1e-7, atol=1e-9)
    assert_plain(layer.solution)
    assert_plain(layer.cell.inner.solution)


def test_iterates():
    layer = im.nn.DEQ(Dense().double(), im.FixedPointIteration(rtol=1e-12, max_steps=200))
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    states = layer.iterates(x, (1, 2, 5))
    assert len(states) == 4
    z, plain = torch.zeros_like(x), []
    with torch.no_grad():
        for _ in range(5):
            z = layer.cell(z, x)
            plain.append(z)
    inputs = (x, *layer.parameters())
    for state, k in zip(states, (1, 2, 5)):
        assert_close(state, plain[k - 1])
    assert_close(states[-1], layer(x))
    assert_close(gradients(states[-1], *inputs), gradients(layer(x), *inputs))
    assert layer.solution.converged.all()
    assert_plain(layer.solution)


def test_the_gradient_of_an_iterate_is_that_of_one_application():
    layer = im.nn.DEQ(Dense().double(), im.FixedPointIteration(rtol=1e-12, max_steps=200))
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    inputs = (x, *layer.parameters())
    state, _ = layer.iterates(x, (3,))
    weight = torch.randn_like(state)
    once = layer.cell(state.detach(), x)
    assert_close(
        torch.autograd.grad((state * weight).sum(), inputs), torch.autograd.grad((once * weight).sum(), inputs)
    )


@pytest.mark.parametrize("at", [(0, 2), (2, 2), (3, 1), (-1,)])
def test_iterates_refuses_counts_that_do_not_increase(at):
    with pytest.raises(ValueError, match="increasing"):
        im.nn.DEQ(Dense()).iterates(torch.randn(2, 4), at)


def test_iterates_with_a_warm_start():
    layer = im.nn.DEQ(Dense(), warm_start=im.nn.LastEpoch(5))
    x, index = torch.randn(3, 4), torch.tensor([4, 0, 2])
    layer.iterates(x, (2,), index=index)
    cold = layer.solution.steps
    layer.iterates(x, (2,), index=index)
    assert (layer.solution.steps <= cold).all()
    assert_close(layer.warm_start.start(torch.zeros_like(x), index), layer.solution.value)


def test_finished_samples_are_not_computed_again():
    cell = Counting(Dense(norm=0.95))
    layer = im.nn.DEQ(cell, im.FixedPointIteration(rtol=1e-5, max_steps=500))
    x = torch.cat([10 * torch.ones(15, 4), torch.full((1, 4), 1e-3) - cell.cell.linear.bias.detach()])
    value = layer(x)
    assert layer.solution.converged.all()
    steps = layer.solution.steps
    assert steps[-1] > 3 * steps[:-1].max()
    assert cell.batches[0] == 16
    assert cell.batches[-1] == 1
    assert cell.batches == sorted(cell.batches, reverse=True)
    assert sum(cell.batches) <= 1.3 * float((steps + 1).sum()) + 16
    alone = im.fixed_point(cell, torch.zeros(1, 4), x[-1:], solver=layer.solver).value
    assert_close(value[-1:], alone, atol=1e-5, rtol=1e-5)


def test_one_system_is_one_sample():
    cell = Counting(Dense())
    layer = im.nn.DEQ(cell, batch_dims=0)
    layer(torch.randn(3, 4))
    assert layer.solution.status.shape == ()
    assert set(cell.batches) == {3}


def test_an_empty_batch():
    layer = im.nn.DEQ(Dense())
    value = layer(torch.zeros(0, 4))
    assert value.shape == (0, 4)
    value.sum().backward()
    assert layer.cell.linear.weight.grad.abs().sum() == 0


class Coupled(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 4), norm

    def forward(self, z, x):
        return 0.3 * torch.tanh(self.norm(x + 0.3 * self.linear(z)))


def test_torch_batch_norm_in_training_as_one_system():
    norm = nn.BatchNorm1d(4)
    layer = im.nn.DEQ(
        Coupled(norm).double(), im.Anderson(rtol=1e-12), im.ImplicitAdjoint(rtol=1e-12), batch_dims=0
    )
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    value = layer(x)
    assert layer.solution.converged
    inputs = (x, *layer.parameters())
    reference = iterated(lambda z: layer.cell(z, x), torch.zeros_like(x), 60)
    for a, b in zip(gradients(value, *inputs), gradients(reference, *inputs)):
        assert_close(a, b, rtol=1e-7, atol=1e-9)
    assert norm.num_batches_tracked > 0
    assert norm.running_mean.isfinite().all()
    assert is_plain(norm.running_mean)


def test_torch_batch_norm_in_evaluation_is_a_cell_like_any_other():
    layer = im.nn.DEQ(Coupled(nn.BatchNorm1d(4))).eval()
    x = torch.randn(6, 4)
    value = layer(x)
    before = layer.cell.norm.running_mean.clone()
    value.sum().backward()
    assert torch.equal(layer.cell.norm.running_mean, before)
    assert_close(layer(x[:2]), value[:2], atol=1e-4, rtol=1e-4)


def test_a_cell_that_changes_z_in_place_is_refused():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.relu, self.linear = nn.ReLU(inplace=True), nn.Linear(4, 4)

        def forward(self, z, x):
            return self.linear(self.relu(z)) + x

    with pytest.raises(ValueError, match="in place"):
        im.nn.DEQ(InPlace())(torch.randn(2, 4))


def test_a_cell_that_changes_its_own_intermediates_in_place_is_fine():
    class InPlace(Dense):
        def forward(self, z, x):
            return 0.9 * torch.relu_(self.linear(z) + x)

    cell = InPlace().double()
    layer = im.nn.DEQ(cell, TIGHT, im.ImplicitAdjoint(rtol=1e-12))
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    reference = iterated(lambda z: cell(z, x), torch.zeros_like(x))
    assert_close(gradients(layer(x), x, cell.linear.weight), gradients(reference, x, cell.linear.weight))


def test_buffers():
    class Buffered(Dense):
        def __init__(self):
            super().__init__()
            self.register_buffer("shift", torch.arange(4.0))

        def forward(self, z, x):
            return super().forward(z, x) + 0.1 * self.shift

    layer = im.nn.DEQ(Buffered())
    x = torch.randn(3, 4)
    value = layer(x)
    assert "cell.shift" in layer.state_dict()
    moved = functional_call(layer, {"cell.shift": torch.zeros(4)}, (x,))
    assert (value - moved).abs().max() > 0.1
    shift = torch.arange(4.0, requires_grad=True)
    functional_call(layer, {"cell.shift": shift}, (x,)).sum().backward()
    assert shift.grad.abs().min() > 0


def test_failure_is_reported_as_asked():
    class Grows(Dense):
        def forward(self, z, x):
            return 2 * z + x + 1

    x = torch.randn(2, 4)
    with pytest.raises(im.SolverError):
        im.nn.DEQ(Grows(), im.FixedPointIteration(), on_failure="raise")(x)
    with pytest.warns(im.ConvergenceWarning):
        im.nn.DEQ(Grows(), im.FixedPointIteration())(x)
    with pytest.raises(ValueError, match="on_failure"):
        im.nn.DEQ(Dense(), on_failure="explode")(x)


def test_its_repr_says_how_it_is_solved():
    assert "Broyden" in repr(im.nn.DEQ(Dense(), im.Broyden()))


def test_training_lowers_a_loss():
    layer = im.nn.DEQ(Dense(norm=0.5), warm_start=im.nn.LastBatch())
    x, target = torch.randn(16, 4), 0.3 * torch.randn(16, 4).tanh()
    optimizer = torch.optim.Adam(layer.parameters(), 0.02)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = (layer(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("wrong", [5, im.nn.LastBatch, "last"])
def test_what_is_no_warm_start_is_refused_at_the_door(wrong):
    with pytest.raises(TypeError, match=r"warm_start must be None or an object such as LastBatch\(\)"):
        im.nn.DEQ(Dense(), warm_start=wrong)


def test_a_function_is_no_cell():
    with pytest.raises(TypeError, match=r"cell must be an nn\.Module"):
        im.nn.DEQ(lambda z, x: z)


def test_an_index_without_a_warm_start_is_refused():
    layer, x, index = im.nn.DEQ(Dense()), torch.randn(3, 4), torch.arange(3)
    for call in (lambda: layer(x, index=index), lambda: layer.iterates(x, (2,), index=index)):
        with pytest.raises(ValueError, match=r"index .* which this layer does not have"):
            call()


class Scaled(Dense):
    def forward(self, z, x):
        return super().forward(z, x[0] * x[1])


def start_of_first(x):
    return torch.zeros_like(x[0])


def test_a_number_is_for_all_samples():
    layer = im.nn.DEQ(Scaled().double(), TIGHT, im.ImplicitAdjoint(rtol=1e-12), init=start_of_first)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    value = layer((x, scale))
    expected = iterated(lambda z: layer.cell(z, (x, scale)), torch.zeros_like(x))
    assert_close(value, expected)
    assert_close(gradients(value, x, scale), gradients(expected, x, scale))


def test_other_shared_tensors_in_x_are_refused_by_their_shape():
    layer = im.nn.DEQ(Scaled(), init=start_of_first)
    with pytest.raises(ValueError, match=r"x has a tensor of shape \(4,\), but z0 has 3 samples"):
        layer((torch.randn(3, 4), torch.ones(4)))


class Wider(nn.Module):
    """z of 8 numbers for x of 3."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(8, 8), nn.Linear(3, 8)

    def forward(self, z, x):
        return 0.1 * torch.tanh(self.inner(z)) + self.outer(x)


def test_a_state_unlike_x_is_told_how_to_start():
    x = torch.randn(2, 3)
    with pytest.raises(RuntimeError, match="mat1 and mat2") as caught:
        im.nn.DEQ(Wider())(x)
    assert "init=lambda x: x.new_zeros(len(x), size), or z0" in caught.value.__notes__[-1]
    assert im.nn.DEQ(Wider(), init=lambda x: x.new_zeros(len(x), 8))(x).shape == (2, 8)
    assert im.nn.DEQ(Wider())(x, torch.zeros(2, 8)).shape == (2, 8)
    with pytest.raises(RuntimeError, match="mat1 and mat2") as caught:
        im.nn.DEQ(Wider())(x, torch.zeros(2, 7))
    assert not hasattr(caught.value, "__notes__")


@pytest.mark.parametrize(
    "second", [torch.ones(2, 1), torch.ones(2, 1, dtype=torch.bool)], ids=["of numbers", "a mask"]
)
def test_a_state_of_another_structure_than_x_is_told_how_to_start(second):
    x = torch.randn(2, 4), second
    with pytest.raises(TypeError) as caught:
        im.nn.DEQ(Scaled())(x)
    assert "init=lambda x: torch.zeros_like(x[0]), or z0" in caught.value.__notes__[-1]
    with pytest.raises(TypeError) as caught:
        im.nn.DEQ(Scaled())({1: x[0], 0: second})
    assert "init=lambda x: torch.zeros_like(x[1]), or z0" in caught.value.__notes__[-1]
    assert im.nn.DEQ(Scaled(), init=start_of_first)(x).shape == (2, 4)


@pytest.mark.parametrize(
    ("state", "x", "error"),
    [
        (lambda z, x: {"h": 0.5 * torch.tanh(z["h"]) + x}, torch.ones(3, 4), TypeError),
        (lambda z, x: {"h": 0.5 * torch.tanh(z["h"]) + x["image"]}, {"image": torch.ones(3, 4)}, KeyError),
        (lambda z, x: (0.5 * z[1] + x, z[0]), torch.ones(1, 4), IndexError),
        (lambda z, x: torch.stack([z[:, 5], x[:, 0]], 1), torch.ones(3, 4), IndexError),
        (lambda z, x: z.fine + x, torch.ones(3, 4), AttributeError),
    ],
    ids=["a dict", "a dict of other keys", "a tuple", "wider", "an object"],
)
def test_whatever_of_z_the_cell_does_not_find_the_start_is_told_of(state, x, error):
    class Cell(nn.Module):
        def forward(self, z, x):
            return state(z, x)

    with pytest.raises(error) as caught:
        im.nn.DEQ(Cell())(x)
    assert "pass init=lambda x: " in caught.value.__notes__[-1]


@pytest.mark.parametrize("second", [None, 3], ids=str)
def test_an_x_of_more_than_tensors_is_told_how_to_start(second):
    with pytest.raises(TypeError, match="zeros_like") as caught:
        im.nn.DEQ(Scaled())((torch.ones(3, 4), second))
    assert "init=lambda x: torch.zeros_like(x[0]), or z0" in caught.value.__notes__[-1]
    assert im.nn.DEQ(Scaled(), init=start_of_first)((torch.ones(3, 4), 0.5)).shape == (3, 4)


def test_iterates_tell_of_the_start_as_forward_does():
    with pytest.raises(RuntimeError, match="mat1 and mat2") as caught:
        im.nn.DEQ(Wider()).iterates(torch.randn(2, 3), (2,))
    assert "pass init=lambda x: " in caught.value.__notes__[-1]


@pytest.mark.parametrize("index", [torch.arange(6), [0, 1, 2, 3, 4, 5]], ids=["beyond the size", "a list"])
def test_a_wrong_index_is_no_matter_of_the_start(index):
    layer = im.nn.DEQ(Dense(), warm_start=im.nn.LastEpoch(3))
    with pytest.raises((ValueError, TypeError), match="LastEpoch") as caught:
        layer(torch.randn(6, 4), index=index)
    assert not hasattr(caught.value, "__notes__")


class OfNeighbours(Dense):
    """Of each node of a graph, from those that it has edges to."""

    def __init__(self, count):
        super().__init__()
        self.register_buffer("edges", 0.1 * torch.ones(count, count).triu())

    def forward(self, z, x):
        return self.edges @ super().forward(z, x)


def test_a_cell_that_couples_samples_is_told_of_batch_dims():
    layer, x = im.nn.DEQ(OfNeighbours(12)), torch.randn(12, 4)
    with pytest.raises(RuntimeError, match="mat1 and mat2") as caught:
        layer(x)
    (note,) = caught.value.__notes__  # and none of the start, which fitted
    assert "Where f couples samples, pass batch_dims=0" in note
    assert im.nn.DEQ(OfNeighbours(12), batch_dims=0)(x).shape == x.shape
