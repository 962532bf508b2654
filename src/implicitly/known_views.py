"""Tells Inductor which tensors in the body of a loop are views of which others.

PyTorch 2.13 notes a storage of its own for some views in the body of a loop. A pass of Inductor then writes in
place into a tensor that such a view still reads. With `compile=True`, gradients through an f that assigns to
slices, `d[:, 0] = x`, would silently be wrong.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor.custom_graph_pass import CustomGraphPass


class KnownViews(CustomGraphPass):
    """Replaces, before Inductor's own passes, what is noted for views that do not share their base's storage."""

    def __call__(self, graph: fx.Graph) -> None:
        """Correct the values in `graph`."""
        for node in graph.nodes:
            base = node.args[0] if _is_view(node) and node.args else None
            if not isinstance(base, fx.Node):
                continue
            of, value = base.meta.get("val"), node.meta.get("val")
            if not (isinstance(of, Tensor) and isinstance(value, Tensor)) or _storage(of) == _storage(value):
                continue
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
            with of.fake_mode:  # pyright: ignore[reportAttributeAccessIssue]
                node.meta["val"] = node.target(*args, **kwargs)

    def uuid(self) -> str:
        """A name for Inductor's cache of graphs, to be changed with what this does."""
        return "implicitly.known_views.KnownViews 1"


def _is_view(node: fx.Node) -> bool:
    """Whether the result of an operation is a view of its first argument, or may be."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    aliases: list[Any] = [result.alias_info for result in node.target._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


def _storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata
