"""The pullback of a function as two graphs: what is computed once, and what each product with it takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx
from torch.func import functionalize, vjp
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class CannotSplitError(ValueError):
    """There are no such graphs."""


def split_pullback(
    f: Callable[..., Tensor], z: Tensor, theta: Sequence[Tensor]
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """`(prepare, pull)`: `pull(u, *prepare(z, *theta))` is the cotangent of z for that u of `f(z, *theta)`.

    A loop of `torch.compile` cannot pull back through what is recorded outside of it, and to record inside would
    call f for each product. The graphs have no derivative of their own. They hold the sizes and settings of this
    call, and other tensors that f uses, in which they see what is changed in place.

    Raises CannotSplitError where f looks at numbers, or leaves what can be written down.
    """

    def pulled(u: Tensor, z: Tensor, *theta: Tensor) -> Tensor:
        return vjp(lambda z: f(z, *theta), z)[1](u)[0]

    inputs = (torch.zeros_like(z), z, *theta)
    with torch.no_grad(), _Tape(inputs) as tape:
        try:
            value = functionalize(pulled)(*inputs)
        except RuntimeError as error:  # if f is wrong, the eager loop says so
            raise CannotSplitError(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}") from error
    u, *others = tape.inputs
    moving = {u}
    for node in tape.graph.nodes:
        if moving.intersection(node.all_input_nodes):
            moving.add(node)
    once = [x for node in tape.graph.nodes if node in moving for x in node.all_input_nodes if x not in moving]
    saved = list(dict.fromkeys(of for x in once for of in _without_views(x)))
    return tape.part(others, saved), tape.part([u, *saved], tape.node(value))


class _Tape(TorchDispatchMode):
    """Writes operations down as a graph. What PyTorch has for that is not for several threads."""

    def __init__(self, inputs: Sequence[Tensor]):
        super().__init__()
        self.graph, self.tensors = fx.Graph(), {}
        # By what they are, not by their values; held, so that none takes the place of another.
        self.nodes: dict[int, tuple[Tensor, fx.Node]] = {}
        self.inputs = [self.graph.placeholder(f"input_{i}") for i in range(len(inputs))]
        for x, node in zip(inputs, self.inputs):
            self.nodes[id(x)] = x, node

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            raise CannotSplitError("f looks at a number of its tensors, on which it may depend what it computes")
        value = func(*args, **kwargs)
        given = pytree.tree_map_only(Tensor, self.node, (args, kwargs))
        node = self.graph.call_function(func, *given)
        if isinstance(value, Tensor):
            self.nodes[id(value)] = value, node
            return value
        for i, x in enumerate(value if isinstance(value, tuple | list) else ()):
            if isinstance(x, Tensor):
                self.nodes[id(x)] = x, self.graph.call_function(getitem, (node, i))
        return value

    def node(self, x: Tensor) -> fx.Node:
        """Where `x` comes from; of what is no result it is the tensor itself."""
        if id(x) not in self.nodes:
            name = f"tensor_{len(self.tensors)}"
            self.tensors[name] = x
            self.nodes[id(x)] = x, self.graph.get_attr(name)
        return self.nodes[id(x)][1]

    def part(self, inputs: Sequence[fx.Node], outputs: Sequence[fx.Node] | fx.Node) -> fx.GraphModule:
        """From `inputs` to `outputs`."""
        several = isinstance(outputs, Sequence)
        graph, needed, stack = fx.Graph(), set(), list(outputs) if several else [outputs]
        copied = {node: graph.placeholder(node.name) for node in inputs}
        while stack:
            node = stack.pop()
            if node not in copied and node not in needed:
                needed.add(node)
                stack += node.all_input_nodes
        for node in self.graph.nodes:
            if node in needed:
                copied[node] = graph.node_copy(node, copied.__getitem__)
        graph.output(tuple(copied[node] for node in outputs) if several else copied[outputs])
        held = {node.target for node in graph.nodes if node.op == "get_attr"}
        return fx.GraphModule({name: x for name, x in self.tensors.items() if name in held}, graph)


def _without_views(node: fx.Node) -> Iterable[fx.Node]:
    """The nodes of which `node` is a view: a loop refuses tensors that share memory."""
    is_view = isinstance(node.target, torch._ops.OpOverload) and node.target.is_view
    return (of for x in node.all_input_nodes for of in _without_views(x)) if is_view else (node,)
