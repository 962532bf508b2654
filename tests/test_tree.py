"""States as matrices, and what a function depends on."""

from __future__ import annotations

import functools
import re
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import grad, hessian, jvp, vmap
from torch.utils import _pytree as pytree

import implicitly as im
from implicitly.functions import open_function
from implicitly.tree import Layout
from tests.problems import Cell, draw

CPU = torch.device("cpu")


# ------------------------------------------------------------------------------------------------ states


@pytest.mark.parametrize(
    "state",
    [
        torch.randn(4, 3),
        torch.randn(4, 3, 5),
        torch.randn(4, 2, 3, 5).to(memory_format=torch.channels_last),
        torch.randn(4, 2, 3, 5, 2).to(memory_format=torch.channels_last_3d),
        torch.randn(4, 5, 3).mT,
        torch.randn(4, 3, dtype=torch.complex64),
    ],
    ids=["vectors", "sequence", "channels_last", "channels_last_3d", "transposed", "complex"],
)
def test_one_dense_tensor_becomes_a_matrix_and_back_without_a_copy(state):
    layout = Layout.of(state, 1)
    matrix = layout.pack(state)
    assert matrix.shape == (4, state[0].numel() * (2 if state.is_complex() else 1))
    assert matrix.data_ptr() == state.data_ptr()
    back = layout.unpack(matrix)
    assert back.data_ptr() == state.data_ptr()
    assert back.stride() == state.stride()
    assert torch.equal(back, state)


def test_samples_of_shape_zero_d_and_whole_systems_are_matrices_too():
    assert Layout.of(torch.zeros(7), 1).pack(torch.zeros(7)).shape == (7, 1)
    assert Layout.of(torch.zeros(2, 3), 0).pack(torch.zeros(2, 3)).shape == (1, 6)
    assert Layout.of(torch.zeros(()), 0).pack(torch.zeros(())).shape == (1, 1)


@pytest.mark.parametrize(
    ("dtype", "work"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.complex64, torch.float32),
        (torch.complex128, torch.float64),
    ],
)
def test_low_precision_is_computed_with_in_float32_and_complex_numbers_as_pairs(dtype, work):
    state = torch.ones(2, 3, dtype=dtype)
    layout = Layout.of(state, 1)
    assert layout.pack(state).dtype == layout.work_dtype == work
    assert layout.unpack(layout.pack(state)).dtype == dtype


def _states(batch_dims: int):
    sizes = st.lists(st.integers(1, 3), max_size=3).map(tuple)
    kinds = st.sampled_from([torch.float64, torch.complex128])
    leaves = st.tuples(sizes, kinds, st.booleans())
    trees = st.recursive(
        leaves.map(lambda leaf: ("leaf", leaf)),
        lambda inner: st.one_of(
            st.lists(inner, min_size=1, max_size=3),
            st.dictionaries(st.sampled_from("abc"), inner, min_size=1, max_size=3),
            st.tuples(inner, inner),
        ),
        max_leaves=5,
    )
    return trees, ((3,) if batch_dims else ())


def _build(tree, lead):
    if isinstance(tree, tuple) and tree[0] == "leaf":
        sizes, dtype, flip = tree[1]
        leaf = torch.randn((*lead, *sizes), dtype=dtype)
        return leaf.movedim(-1, len(lead)) if flip and sizes else leaf
    if isinstance(tree, dict):
        return {k: _build(v, lead) for k, v in tree.items()}
    return type(tree)(_build(v, lead) for v in tree)


@pytest.mark.parametrize("batch_dims", [0, 1])
@given(data=st.data())
def test_unpack_is_the_inverse_of_pack_for_any_pytree(batch_dims, data):
    trees, lead = _states(batch_dims)
    state = _build(data.draw(trees), lead)
    layout = Layout.of(state, batch_dims)
    matrix = layout.pack(state)
    assert matrix.shape[0] == (3 if batch_dims else 1)
    back = layout.unpack(matrix)
    assert pytree.tree_structure(back) == pytree.tree_structure(state)
    for a, b in zip(pytree.tree_leaves(back), pytree.tree_leaves(state)):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    assert torch.equal(layout.pack(back), matrix)


def test_unpack_takes_any_number_of_rows():
    layout = Layout.of({"a": torch.zeros(4, 2), "b": torch.zeros(4, 3, 1)}, 1)
    part = layout.unpack(torch.arange(10.0).reshape(2, 5))
    assert part["a"].tolist() == [[0, 1], [5, 6]]
    assert part["b"].tolist() == [[[2], [3], [4]], [[7], [8], [9]]]


# Real numbers before complex ones, which so begin at an odd place of a row, and rows of an odd length.


def _mixed(*lead: int) -> tuple[Tensor, Tensor]:
    return torch.ones(*lead, 1, dtype=torch.float64), torch.ones(*lead, 2, dtype=torch.complex128)


def _number(state: tuple[Tensor, Tensor]) -> Tensor:
    return state[0].sum() + state[1].real.sum() + state[1].imag.square().sum()


def _turned(z, a):
    return 2 - z[0], 1 + 1j * a * z[1]


def _apart(z, a):
    return (z[0] - 1).square().sum(-1) / 2 + ((1 - 1j * a) * z[1] - 1).abs().square().sum(-1) / 2


def _residuals(z, a):
    return z[0] - 1, (1 - 1j * a) * z[1] - 1


def _mixed_solution(a: Tensor) -> Tensor:
    """Of the three above, with z = 1 and 1 / (1 - ia)."""
    w = 1 / (1 + a.square())
    return 1 + 2 * w + 2 * (a * w).square()


def _mixed_trajectory(a: Tensor) -> Tensor:
    """Of y' = -ay and y' = iay from 1 at t = 1."""
    return torch.exp(-a) + 2 * torch.cos(a) + 2 * torch.sin(a).square()


def _trajectory(**options):
    def field(t, y, a):
        return -a * y[0], 1j * a * y[1]

    def solve(a: Tensor, lead: tuple[int, ...]) -> Tensor:
        y = im.odeint(field, _mixed(*lead), (0.0, 1.0), a, batch_dims=len(lead), **options).value
        return _number((y[0][-1], y[1][-1]))

    return solve


def _state(entry: Any, f: Any, **options):
    def solve(a: Tensor, lead: tuple[int, ...]) -> Tensor:
        return _number(entry(f, _mixed(*lead), a, batch_dims=len(lead), **options).value)

    return solve


MIXED = {
    "explicit": (_trajectory(solver=im.RK4(dt=0.1)), _mixed_trajectory),
    "implicit": (_trajectory(solver=im.Kvaerno5(dt=0.25, rtol=1e-9, atol=1e-9)), _mixed_trajectory),
    "fixed_point": (_state(im.fixed_point, _turned, solver=im.Newton(rtol=1e-11)), _mixed_solution),
    "argmin": (_state(im.argmin, _apart), _mixed_solution),
    "least_squares": (_state(im.least_squares, _residuals), _mixed_solution),
}


@pytest.mark.slow
@pytest.mark.parametrize("lead", [(), (3,)], ids=["system", "samples"])
@pytest.mark.parametrize("name", MIXED)
def test_states_with_real_and_complex_leaves_have_all_derivatives(name, lead):
    solve, exact = MIXED[name]
    samples = 3 if lead else 1
    a = torch.tensor([0.3, 0.4], dtype=torch.float64)

    def close(found: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(found, samples * expected, rtol=1e-5, atol=1e-5)

    def value(a: Tensor) -> Tensor:
        return solve(a, lead)

    leaf = a[0].clone().requires_grad_()
    close(torch.autograd.grad(value(leaf), leaf)[0], grad(exact)(a[0]))
    close(jvp(value, (a[0],), (torch.ones_like(a[0]),))[1], grad(exact)(a[0]))
    close(hessian(value)(a[0]), hessian(exact)(a[0]))
    close(grad(grad(value))(a[0]), hessian(exact)(a[0]))
    close(vmap(grad(value))(a), vmap(grad(exact))(a))
    close(vmap(hessian(value))(a), vmap(hessian(exact))(a))


@pytest.mark.parametrize("adjoint", [im.RecursiveCheckpointAdjoint(), im.UnrolledAdjoint(), im.BacksolveAdjoint()])
def test_every_adjoint_takes_states_with_real_and_complex_leaves(adjoint):
    a = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    found = torch.autograd.grad(_trajectory(adjoint=adjoint, solver=im.Dopri5(rtol=1e-7))(a, ()), a)[0]
    torch.testing.assert_close(found, grad(_mixed_trajectory)(a.detach()), rtol=1e-5, atol=1e-5)


def test_f_may_return_a_conjugate_that_is_none_in_memory():
    a = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    z = im.fixed_point(lambda z, a: (a * z + 1j).conj(), draw(2, seed=1, dtype=torch.complex128), a).value
    torch.testing.assert_close(z, torch.full_like(z, -1j / 1.5), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.autograd.grad(z.imag.sum(), a)[0].item(), 2 / 1.5**2, rtol=1e-4, atol=0.0)


class Pair(NamedTuple):
    x: Any
    y: Any


class Opaque:
    """A pytree whose parts have no names."""

    def __init__(self, part: Any):
        self.part = part


pytree.register_pytree_node(Opaque, lambda o: ([o.part], None), lambda parts, _: Opaque(*parts))
V = torch.zeros(3, device="cpu")


@pytest.mark.parametrize(
    ("state", "returned", "error", "message"),
    [
        (V, V[:1], ValueError, "f must return the shape of y0: expected (3,), got (1,)"),
        (
            {"a": V, "b": {"c": V}},
            {"a": V, "b": {"c": V[:1]}},
            ValueError,
            "f must return the shape of y0: expected (3,) for y0['b']['c'], got (1,)",
        ),
        ((V, [V, V]), (V, [V, V.double()]), ValueError, "expected torch.float32 for y0[1][1], got torch.float64"),
        (Pair(V, V), Pair(V, V.to("meta")), ValueError, "expected cpu for y0.y, got meta"),
        ({"a": V, "b": V}, {"a": V, "b": 1.0}, TypeError, "f must return tensors, got a float as y0['b']"),
        (V, None, TypeError, "f must return tensors, got a NoneType"),
        ({"a": Opaque(V)}, {"a": Opaque(V[:1])}, ValueError, "expected (3,) for y0['a']<0>, got (1,)"),
    ],
)
def test_what_f_returns_in_a_wrong_way_is_named_as_users_write_it(state, returned, error, message):
    with pytest.raises(error, match=re.escape(message)):
        Layout.of(state, 0, "y0").check(returned, "y0")


@pytest.mark.parametrize(
    ("state", "returned", "message"),
    [
        ({"a": V, "b": V}, {"a": V}, "y0['b'] is missing"),
        ({"a": V}, {"a": V, "b": V}, "got y0['b'] besides"),
        ((V, {"a": V}), (V, {"b": V}), "y0[1]['a'] is missing, got y0[1]['b'] besides"),
        ((V, V), (V,), "y0[1] is missing"),
        ((V, V), [V, V], "expected a tuple for y0, got a list"),
        (V, (V,), "expected a tensor for y0, got a tuple"),
        ({"a": (V, V)}, {"a": V}, "expected a tuple for y0['a'], got a tensor"),
        ({"a": (V, V)}, {"a": None}, "expected a tuple for y0['a'], got a NoneType"),
        ({"a": V, "b": V}, {"b": V, "a": V}, "expected the order ['a'], ['b'] in y0, got ['b'], ['a']"),
        ({"a": Opaque(V)}, {"a": Opaque((V,))}, "expected a tensor for y0['a']<0>, got a tuple"),
    ],
)
def test_of_a_wrong_structure_the_first_difference_is_told(state, returned, message):
    with pytest.raises(ValueError, match=re.escape(f"f must return the structure of y0: {message}") + "$"):
        Layout.of(state, 0, "y0").check(returned, "y0")


@pytest.mark.parametrize(
    ("state", "batch_dims", "error", "message"),
    [
        ({"a": V, "b": 1.0}, 0, TypeError, "y0 must hold tensors only, got a float as y0['b']"),
        (
            [V, V.long()],
            0,
            TypeError,
            "y0[1] has dtype torch.int64: a solution is a real or complex number; pass ",
        ),
        ((V, V[0]), 1, ValueError, "y0 has a 0-d tensor as y0[1], but batch_dims=1"),
        ({"a": V, "b": V.double()}, 0, ValueError, "y0['b'] (3,) torch.float64 on cpu; convert"),
        (
            (V, V[:2]),
            1,
            ValueError,
            "disagree on the batch (dimension 0): y0[0] (3,) torch.float32 on cpu, y0[1] (2,)",
        ),
    ],
)
def test_what_cannot_be_part_of_a_state_is_named(state, batch_dims, error, message):
    with pytest.raises(error, match=re.escape(message)):
        Layout.of(state, batch_dims, "y0")


# --------------------------------------------------------------------------------------------- functions


class Holder:
    """A callable object that is no module, with a module as attribute."""

    def __init__(self, cell):
        self.cell = cell

    def __call__(self, z, x):
        return self.cell(z, x)

    def method(self, z, x):
        return self.cell(z, x)


CELL = Cell()


def _uses_a_global(z, x):
    return CELL(z, x)


def _calls_a_function_that_uses_a_global(z, x):
    return _uses_a_global(z, x)


def _has_a_default(z, x, cell=CELL):
    return cell(z, x)


def _takes_a_cell(cell, z, x):
    return cell(z, x)


def ways_to_reach(cell: nn.Module) -> dict:
    """Functions f(z, x) that reach the parameters of `cell`, each in another way."""
    cells = {"inner": [cell]}

    def nested(z, x):
        def inner():
            return cell(z, x)

        return inner()

    return {
        "the module itself": cell,
        "a bound method of it": cell.forward,
        "a closure": lambda z, x: cell(z, x),
        "a nested closure": nested,
        "a closure over a dict of lists": lambda z, x: cells["inner"][0](z, x),
        "a partial": functools.partial(_takes_a_cell, cell),
        "a partial of a bound method": functools.partial(cell.forward),
        "a callable object": Holder(cell),
        "a method of an object": Holder(cell).method,
        "a module of modules": nn.ModuleDict({"cell": cell})["cell"],
    }


GLOBAL_WAYS = {
    "a global": _uses_a_global,
    "a function that uses a global": _calls_a_function_that_uses_a_global,
    "a default argument": _has_a_default,
}
WAYS = {**dict.fromkeys(ways_to_reach(CELL)), **GLOBAL_WAYS}


def way(name: str, cell: nn.Module = CELL):
    """f of one of `WAYS`."""
    return GLOBAL_WAYS.get(name) or ways_to_reach(cell)[name]


@pytest.mark.parametrize("name", WAYS)
def test_parameters_are_found_however_f_reaches_its_module(name):
    found = open_function(way(name), (torch.zeros(1, 3),), CPU).theta[1:]
    assert {id(p) for p in found} == {id(p) for p in CELL.parameters()}
    assert len(found) == 2


@pytest.mark.parametrize("name", WAYS)
def test_a_call_with_other_parameters_uses_those(name):
    z, x = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    opened, theta, _ = open_function(way(name), (x,), CPU)
    zeros = [torch.zeros_like(p) for p in theta[1:]]
    assert torch.equal(opened(z, x, *zeros), torch.tanh(x))
    assert torch.equal(opened(z, *theta), CELL(z, x))


def test_only_what_a_derivative_reaches_counts_as_a_dependence():
    cell = Cell()
    cell.bias.requires_grad_(False)
    cell.register_buffer("offset", torch.zeros(3))
    assert [id(t) for t in open_function(cell, (), CPU).theta] == [id(cell.weight)]


def test_a_module_reached_twice_counts_once():
    cell = Cell()
    twice = lambda z, x, head=nn.Sequential(cell): cell(z, x)  # noqa: E731
    assert len(open_function(twice, (torch.zeros(1, 3),), CPU).theta) == 1 + 2


def test_modules_in_args_bring_their_parameters():
    cell = Cell()
    theta = open_function(lambda z, cell, x: cell(z, x), (cell, torch.zeros(1, 3)), CPU).theta
    assert {id(p) for p in theta[1:]} == {id(p) for p in cell.parameters()}


def test_args_may_be_pytrees_with_anything_in_them():
    x = torch.ones(2, 1)
    args = {"k": [x]}, "yes", 3
    opened = open_function(lambda z, d, s, n: z * d["k"][0] * (s == "yes") * n, args, CPU).opened
    assert torch.equal(opened(torch.ones(2, 1), 2 * x), 6 * x)


def test_what_is_not_callable_is_refused():
    with pytest.raises(TypeError, match="f must be callable, got a Tensor"):
        open_function(torch.zeros(2), (), CPU)
