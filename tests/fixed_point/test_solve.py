"""`fixed_point` and `root` as users call them: parameters, repeated use, transforms of whole layers."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.utils.checkpoint import checkpoint

import implicitly as im
from tests.contracts import ADJOINTS, assert_close
from tests.problems import NAMED, Cell, draw, matrix, unrolled
from tests.test_tree import CELL, GLOBAL_WAYS, WAYS, way

D = torch.float64
X = draw(4, 3, seed=31)
Z0 = torch.zeros(4, 3, dtype=D)
EXACT_ADJOINTS = [a for a in ADJOINTS if a.exact and a.needs_solver is None]


def reference(cell: nn.Module, x: torch.Tensor, inputs: tuple) -> tuple:
    """Gradients of sum(sin(z)) by recording plain iterations."""
    return torch.autograd.grad(unrolled(cell, Z0[: len(x)])(x).sin().sum(), inputs)


# ------------------------------------------------------------------------------------------- parameters


@pytest.mark.parametrize("name", WAYS)
def test_parameters_get_gradients_however_f_reaches_its_module(name):
    cell = CELL if name in GLOBAL_WAYS else Cell()
    x = X.clone().requires_grad_()
    inputs = (x, *cell.parameters())
    value = im.fixed_point(way(name, cell), Z0, x).value
    assert_close(torch.autograd.grad(value.sin().sum(), inputs), reference(cell, x, inputs), 1e-8)


def test_parameters_accumulate_into_grad_as_usual():
    cell = Cell()
    for _ in range(2):
        im.fixed_point(cell, Z0, X).value.sin().sum().backward()
    expected = reference(cell, X, tuple(cell.parameters()))
    assert_close([p.grad for p in cell.parameters()], [2 * g for g in expected], 1e-8)


def test_frozen_parameters_get_none_and_the_others_theirs():
    cell = Cell()
    cell.bias.requires_grad_(False)
    im.fixed_point(cell, Z0, X).value.sin().sum().backward()
    assert cell.bias.grad is None
    assert_close(cell.weight.grad, reference(cell, X, (cell.weight,)), 1e-8)


def test_a_parameter_shared_by_two_modules_gets_the_sum():
    first, second = Cell(), Cell()
    second.weight = first.weight

    def f(z, x):
        return 0.5 * first(z, x) + 0.5 * second(z, -x)

    value = im.fixed_point(f, Z0, X).value
    expected = torch.autograd.grad(unrolled(f, Z0)(X).sin().sum(), first.weight)
    assert_close(torch.autograd.grad(value.sin().sum(), first.weight), expected, 1e-8)


def test_the_gradient_of_shared_parameters_is_the_sum_over_samples():
    cell = Cell()
    whole = torch.autograd.grad(im.fixed_point(cell, Z0, X).value.sin().sum(), cell.weight)[0]
    parts = [
        torch.autograd.grad(im.fixed_point(cell, Z0[:1], X[i : i + 1]).value.sin().sum(), cell.weight)[0]
        for i in range(4)
    ]
    assert_close(whole, sum(parts), 1e-8)


def test_an_adam_step_trains_a_layer():
    cell, target = Cell(), 0.3 * draw(4, 3, seed=32)
    optimiser = torch.optim.Adam(cell.parameters(), lr=0.02)
    losses = []
    for _ in range(40):
        loss = (im.fixed_point(cell, Z0, 0.5 * X).value - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]


# ------------------------------------------------------------------------------------------ repeated use


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=lambda a: a.name)
def test_two_calls_of_a_layer_before_one_backward(adjoint):
    cell, x = Cell(), X.clone().requires_grad_()
    solver = im.Broyden(rtol=1e-12)
    call = functools.partial(im.fixed_point, cell, Z0, solver=solver, adjoint=adjoint.make(1e-12))
    inputs = (x, *cell.parameters())
    losses = [lambda: call(x).value.sin().sum(), lambda: call(2 * x).value.cos().sum()]
    together = torch.autograd.grad(losses[0]() + losses[1](), inputs)
    apart = [torch.autograd.grad(loss(), inputs) for loss in losses]
    assert_close(together, [a + b for a, b in zip(*apart)], 1e-10)


@pytest.mark.parametrize("adjoint", EXACT_ADJOINTS, ids=lambda a: a.name)
def test_a_layer_on_the_output_of_a_layer(adjoint):
    first, second, x = Cell(seed=1), Cell(seed=5), X.clone().requires_grad_()
    solver = im.FixedPointIteration(rtol=1e-13)
    call = functools.partial(im.fixed_point, solver=solver, adjoint=adjoint.make(1e-12))
    inputs = (x, *first.parameters(), *second.parameters())
    value = call(second, Z0, call(first, Z0, x).value).value
    exact = unrolled(second, Z0)(unrolled(first, Z0)(x))
    expected = torch.autograd.grad(exact.sin().sum(), inputs)
    assert_close(torch.autograd.grad(value.sin().sum(), inputs), expected, 1e-8)


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=lambda a: a.name)
def test_backward_twice_with_retain_graph_gives_the_same_twice(adjoint):
    cell, x = Cell(), X.clone().requires_grad_()
    value = im.fixed_point(cell, Z0, x, solver=im.Broyden(), adjoint=adjoint.make(1e-12)).value
    inputs = (x, *cell.parameters())
    once = torch.autograd.grad(value.sin().sum(), inputs, retain_graph=True)
    again = torch.autograd.grad(value.sin().sum(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(once, again))


def test_backward_twice_without_retain_graph_is_refused():
    x = X.clone().requires_grad_()
    loss = im.fixed_point(Cell(), Z0, x).value.sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_a_parameter_changed_between_forward_and_backward_is_noticed():
    cell = Cell()
    value = im.fixed_point(cell, Z0, X).value
    with torch.no_grad():
        cell.weight.mul_(0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.sum().backward()


def test_an_equilibrium_is_a_start_that_needs_no_step_and_carries_no_gradient():
    x = X.clone().requires_grad_()
    cell = Cell()
    cold = im.fixed_point(cell, Z0, x)
    warm = im.fixed_point(cell, cold.value, x)
    assert warm.steps.tolist() == [0] * 4
    assert warm.evaluations == 1
    assert torch.equal(warm.value, cold.value)
    gradients = [torch.autograd.grad(s.value.sin().sum(), x, retain_graph=True)[0] for s in (cold, warm)]
    assert torch.equal(*gradients)
    z0 = Z0.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(im.fixed_point(cell, z0, x).value.sum(), z0, allow_unused=True)
    assert gradient is None


def test_the_start_is_left_as_it_was():
    z0 = Z0.clone()
    for solver in (im.FixedPointIteration(), im.Anderson(), im.Broyden(), im.Newton(), im.NewtonKrylov()):
        value = im.fixed_point(Cell(), z0, X, solver=solver).value
        assert torch.equal(z0, Z0)
        assert value.data_ptr() != z0.data_ptr()


def test_a_tensor_passed_twice_gets_the_sum_of_both_gradients():
    x = X.clone().requires_grad_()
    value = im.fixed_point(lambda z, a, b: torch.tanh(0.5 * z + a * b), Z0, x, x).value
    expected = unrolled(lambda z, x: torch.tanh(0.5 * z + x * x), Z0)(x)
    actual, wanted = (torch.autograd.grad(v.sin().sum(), x) for v in (value, expected))
    assert_close(actual, wanted, 1e-8)


def _inner(z):
    """w = cos(w) / 2 + z, an equilibrium for every z."""
    return im.fixed_point(lambda w, z: 0.5 * w.cos() + z, torch.zeros(z.shape, dtype=z.dtype), z).value


@pytest.mark.parametrize("solver", [im.Anderson(rtol=1e-12), im.Newton()], ids=lambda s: type(s).__name__)
def test_an_equilibrium_inside_an_equilibrium(solver):
    outer = lambda z, x: 0.3 * _inner(z).sin() + x  # noqa: E731

    def flat_outer(z, x):
        w = torch.zeros_like(z)
        for _ in range(60):
            w = 0.5 * w.cos() + z
        return 0.3 * w.sin() + x

    x = X[:2].clone().requires_grad_()
    actual = im.fixed_point(outer, Z0[:2], x, solver=solver).value
    expected = unrolled(flat_outer, Z0[:2], steps=40)(x)
    for _ in range(2):
        assert_close(actual, expected, 1e-7)
        (actual,) = torch.autograd.grad(actual.sin().sum(), x, create_graph=True)
        (expected,) = torch.autograd.grad(expected.sin().sum(), x, create_graph=True)


def test_checkpointing_a_layer_gives_the_same_gradient():
    cell, x = Cell(), X.clone().requires_grad_()
    layer = lambda x: im.fixed_point(cell, Z0, x).value  # noqa: E731
    inputs = (x, *cell.parameters())
    kept = torch.autograd.grad(layer(x).sin().sum(), inputs)
    again = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).sin().sum(), inputs)
    assert_close(again, kept, 1e-12)


def test_an_f_that_returns_its_input_converges_at_once_to_the_start():
    z0 = draw(4, 3, seed=33)
    solution = im.fixed_point(lambda z: z, z0)
    assert solution.steps.tolist() == [0] * 4
    assert torch.equal(solution.value, z0)
    solution.value.zero_()
    assert bool(z0.any())


# --------------------------------------------------------------------------------- torch.func on layers


class Layer(nn.Module):
    """A module with an equilibrium inside, as users write them."""

    def __init__(self, seed: int = 0):
        super().__init__()
        self.cell = Cell(seed=seed)

    def forward(self, x):
        z0 = torch.zeros(*x.shape, dtype=x.dtype)
        return im.fixed_point(self.cell, z0, x, solver=im.Anderson(rtol=1e-12)).value


def loss_of(layer: Layer, parameters: dict, x: torch.Tensor) -> torch.Tensor:
    return functional_call(layer, parameters, (x,)).sin().sum()


def test_grad_through_functional_call_is_the_gradient_of_the_parameters():
    layer = Layer()
    parameters = {k: v.detach() for k, v in layer.named_parameters()}
    gradients = grad(functools.partial(loss_of, layer))(parameters, X)
    expected = reference(layer.cell, X, tuple(layer.parameters()))
    assert_close([gradients[k] for k, _ in layer.named_parameters()], list(expected), 1e-8)


def test_functional_call_uses_the_parameters_it_is_given():
    layer, other = Layer(0), Layer(7)
    value = functional_call(layer, dict(other.named_parameters()), (X,))
    assert_close(value, other(X), 1e-10)


def test_an_ensemble_of_layers_is_a_vmap_over_parameters():
    layers = [Layer(seed) for seed in (1, 4, 9)]
    stacked, buffers = stack_module_state(layers)
    base = copy.deepcopy(layers[0])
    values = vmap(lambda p, b: functional_call(base, (p, b), (X,)))(stacked, buffers)
    assert_close(values, torch.stack([layer(X) for layer in layers]), 1e-10)
    gradients = vmap(grad(functools.partial(loss_of, base)), in_dims=(0, None))(
        {k: v.detach() for k, v in stacked.items()}, X
    )
    for i, layer in enumerate(layers):
        expected = reference(layer.cell, X, tuple(layer.parameters()))
        assert_close([gradients[k][i] for k, _ in layer.named_parameters()], list(expected), 1e-8)


def test_per_sample_gradients_of_parameters_by_vmap_of_grad():
    layer = Layer()
    parameters = {k: v.detach() for k, v in layer.named_parameters()}
    one = lambda p, x: loss_of(layer, p, x.unsqueeze(0))  # noqa: E731
    gradients = vmap(grad(one), in_dims=(None, 0))(parameters, X)
    for i in range(len(X)):
        expected = reference(layer.cell, X[i : i + 1], tuple(layer.parameters()))
        assert_close([gradients[k][i] for k, _ in layer.named_parameters()], list(expected), 1e-8)


def test_parameters_as_a_dict_in_args_are_differentiated_too():
    cell = Cell()
    parameters = {k: v.detach().requires_grad_() for k, v in cell.named_parameters()}
    f = lambda z, p, x: functional_call(cell, p, (z, x))  # noqa: E731
    value = im.fixed_point(f, Z0, parameters, X).value
    actual = torch.autograd.grad(value.sin().sum(), tuple(parameters.values()))
    assert_close(actual, reference(cell, X, tuple(cell.parameters())), 1e-8)


def test_starts_may_be_mapped_too():
    starts, x = draw(2, 4, 3, seed=34), draw(2, 4, 3, seed=35)
    cell = Cell()
    values = vmap(lambda z0, x: im.fixed_point(cell, z0, x, solver=im.Anderson(rtol=1e-12)).value)(starts, x)
    assert_close(values, torch.stack([unrolled(cell, Z0)(x[i]) for i in range(2)]), 1e-10)
    only = vmap(lambda z0: im.fixed_point(cell, z0, X, solver=im.Anderson(rtol=1e-12)).value)(starts)
    assert_close(only, unrolled(cell, Z0)(X).expand(2, 4, 3), 1e-10)


def test_the_jacobian_of_an_equilibrium_by_jacrev_is_block_diagonal_over_samples():
    cell = Cell()
    J = torch.func.jacrev(lambda x: im.fixed_point(cell, Z0, x).value)(X)
    off = J.clone()
    off[range(4), :, range(4), :] = 0
    assert not off.any()


# --------------------------------------------------------------------------------------- kinds of states


@pytest.mark.parametrize("name", ["tanh", "image", "sequence", "tree", "cosine_0d", "complex"])
def test_an_empty_batch_gives_an_empty_solution_and_zero_gradients(name):
    problem = NAMED[name]
    index = torch.tensor([], dtype=torch.int64)
    dims = problem.in_dims
    args = [a if d is None else a.index_select(d, index) for a, d in zip(problem.args, dims)]
    args = [a.clone().requires_grad_() for a in args]
    z0 = torch.utils._pytree.tree_map(lambda t: t[index], problem.z0)
    for in_dims in (None, dims):
        for solver in (im.FixedPointIteration(), im.Anderson(), im.Broyden(), im.Newton(), im.NewtonKrylov()):
            solution = im.fixed_point(problem.f, z0, *args, solver=solver, in_dims=in_dims)
            leaves = torch.utils._pytree.tree_leaves(solution.value)
            assert [t.shape for t in leaves] == [t.shape for t in torch.utils._pytree.tree_leaves(z0)]
            assert solution.status.shape == (0,)
            gradients = torch.autograd.grad(sum(t.abs().sum() for t in leaves), args)
            assert not any(bool(g.any()) for g in gradients)


def test_an_f_that_ignores_z_converges_at_once():
    x = X.clone().requires_grad_()
    for solver in (im.FixedPointIteration(), im.Anderson(), im.Broyden(), im.Newton(), im.NewtonKrylov()):
        solution = im.fixed_point(lambda z, x: x.sin(), Z0, x, solver=solver)
        assert solution.steps.tolist() == [1] * 4
        assert bool(solution.converged.all())
        torch.testing.assert_close(solution.value, X.sin())
        torch.testing.assert_close(torch.autograd.grad(solution.value.sum(), x)[0], X.cos())


@pytest.mark.parametrize("n", [3, 48])
@pytest.mark.parametrize("inside", [False, True], ids=["backward outside", "backward inside"])
def test_under_autocast_value_and_gradient_are_as_good_as_its_arithmetic(n, inside):
    cell, x = nn.Linear(n, n), draw(4, n, seed=3).float().requires_grad_()
    nn.init.orthogonal_(cell.weight, 0.5)
    f = lambda z, x: torch.tanh(cell(z) + x).float()  # noqa: E731
    z0, inputs = torch.zeros(4, n), (x, cell.weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        solution = im.fixed_point(f, z0, x, solver=im.Anderson(rtol=1e-2, atol=0.0))
        if inside:
            gradients = torch.autograd.grad(solution.value.sum(), inputs)
    if not inside:
        gradients = torch.autograd.grad(solution.value.sum(), inputs)
    assert bool(solution.converged.all())
    assert solution.value.dtype == torch.float32
    exact = unrolled(f, z0, steps=40)(x)
    # |(I - J)^-1| <= 2, times the tolerance and two roundings (forward) or the tolerance of 0.04 (backward).
    assert_close(solution.value, exact, 2 * (0.01 + 2 * torch.finfo(torch.bfloat16).eps))
    assert_close(gradients, torch.autograd.grad(exact.sum(), inputs), 0.08)


def test_states_larger_than_newton_can_hold_are_refused_with_a_remedy():
    z0 = torch.zeros(2, 50_000)
    with pytest.raises(ValueError, match=r"2 dense 50000 x 50000 .*NewtonKrylov, Anderson or Broyden"):
        im.root(lambda z: z - 1, z0)


def test_float16_is_solved_like_bfloat16():
    W = (0.5 * matrix(3, 1.0, 1)).half()
    solution = im.fixed_point(lambda z, x: torch.tanh(z @ W + x), Z0.half(), X.half())
    assert solution.value.dtype == torch.float16
    assert bool(solution.converged.all())
