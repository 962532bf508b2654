"""The pullback of a function as two graphs: what is computed once, and what each product with it takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, fx
from torch.func import vjp


def split_pullback(
    f: Callable[..., Tensor], z: Tensor, theta: Sequence[Tensor]
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """`(prepare, pull)`: `pull(u, *prepare(z, *theta))` is the cotangent of z for that u of `f(z, *theta)`.

    A loop of `torch.compile` cannot pull back through what is recorded outside of it, and to record inside would
    call f for each product. The graphs have no derivative of their own. They hold the sizes and settings of this
    call, and other tensors that f uses, in which they see what is changed in place.
    """
    # Imported on first use: it takes as long to import as all of torch.
    from torch.fx.experimental.proxy_tensor import make_fx

    def pulled(u: Tensor, z: Tensor, *theta: Tensor) -> Tensor:
        return vjp(lambda z: f(z, *theta), z)[1](u)[0]

    with torch.no_grad():
        traced = make_fx(pulled)(torch.zeros_like(z), z, *theta)
    u, *inputs = (node for node in traced.graph.nodes if node.op == "placeholder")
    (end,) = (node for node in traced.graph.nodes if node.op == "output")
    moving = {u}
    for node in traced.graph.nodes:
        if moving.intersection(node.all_input_nodes):
            moving.add(node)
    once = [x for node in traced.graph.nodes if node in moving for x in node.all_input_nodes if x not in moving]
    saved = list(dict.fromkeys(of for x in once for of in _without_views(x)))
    prepare = _part(traced, inputs, saved, whole=True)
    return prepare, _part(traced, [u, *saved], end.all_input_nodes[:1], whole=False)


def _without_views(node: fx.Node) -> Iterable[fx.Node]:
    """The nodes of which `node` is a view: a loop refuses tensors that share memory."""
    is_view = isinstance(node.target, torch._ops.OpOverload) and node.target.is_view
    return (of for x in node.all_input_nodes for of in _without_views(x)) if is_view else (node,)


def _part(
    traced: fx.GraphModule, inputs: Sequence[fx.Node], outputs: Sequence[fx.Node], whole: bool
) -> fx.GraphModule:
    """From `inputs` to `outputs`: a tuple where `whole`, else the only one."""
    graph, copied = fx.Graph(), {}
    for node in inputs:
        copied[node] = graph.placeholder(node.name)
    needed, stack = set(), list(outputs)
    while stack:
        node = stack.pop()
        if node not in copied and node not in needed:
            needed.add(node)
            stack += node.all_input_nodes
    for node in traced.graph.nodes:
        if node in needed:
            copied[node] = graph.node_copy(node, copied.__getitem__)
    result = tuple(copied[node] for node in outputs)
    graph.output(result if whole else result[0])
    return fx.GraphModule(traced, graph)
