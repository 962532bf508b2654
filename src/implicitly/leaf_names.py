"""Names of the tensors of a pytree, as users write them; only for messages, as it takes longer than a small f."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree


def described(state: Any, name: str) -> str:
    """The shapes, dtypes and devices of the tensors of a pytree called `name`."""
    names = leaf_names(pytree.tree_structure(state), name)
    leaves = zip(names, pytree.tree_leaves(state))
    return ", ".join(f"{leaf} {tuple(t.shape)} {t.dtype} on {t.device}" for leaf, t in leaves)


def placed(spec: pytree.TreeSpec, i: int, preposition: str, name: str) -> str:
    """The name of leaf `i` after a preposition; an empty string if the tree is a single leaf."""
    return "" if spec.is_leaf() else f" {preposition} {leaf_names(spec, name)[i]}"


def leaf_names(spec: pytree.TreeSpec, name: str) -> list[str]:
    """What a user writes for each leaf, such as `z0['a'][1]` where `name` is `z0`."""

    def below(tree: Any, name: str) -> Iterator[str]:
        if pytree.tree_structure(tree).is_leaf():
            yield name
        else:
            for key, part in _parts_of(tree):
                yield from below(part, name + key)

    return list(below(spec.unflatten(range(spec.num_leaves)), name))


def _parts_of(node: Any) -> list[tuple[str, Any]]:
    """The children of a node of a pytree, each with what a user writes after the node to reach it."""

    def is_part(x: Any) -> bool:
        return x is not node

    try:
        return [(pytree.keystr(k), part) for k, part in pytree.tree_flatten_with_path(node, is_part)[0]]
    except ValueError:  # its type was registered without names for its children
        return [(f"<{i}>", part) for i, part in enumerate(pytree.tree_leaves(node, is_part))]


def difference(expected: Any, got: Any, name: str) -> str:
    """Describe the first place, under `name`, at which two pytrees differ in structure."""
    is_leaf, came_leaf = (pytree.tree_structure(x).is_leaf() for x in (expected, got))
    if is_leaf or came_leaf or type(expected) is not type(got):
        kind = "a tensor" if is_leaf else f"a {type(expected).__name__}"
        came = "a tensor" if isinstance(got, Tensor) else f"a {type(got).__name__}"
        return f"expected {kind} for {name}, got {came}"
    ours, theirs = dict(_parts_of(expected)), dict(_parts_of(got))
    missing = [f"{name}{key} is missing" for key in ours if key not in theirs]
    more = [f"got {name}{key} besides" for key in theirs if key not in ours]
    if missing or more:
        return ", ".join(missing + more)
    if list(ours) != list(theirs):
        return f"expected the order {', '.join(ours)} in {name}, got {', '.join(theirs)}"
    for key, part in ours.items():
        if pytree.tree_structure(part) != pytree.tree_structure(theirs[key]):
            return difference(part, theirs[key], name + key)
    return f"expected {pytree.tree_structure(expected)} for {name}, got {pytree.tree_structure(got)}"
