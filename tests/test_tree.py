"""States as matrices, and what a function depends on."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils import _pytree as pytree

from implicitly.tree import Layout, open_function
from tests.problems import Cell

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
