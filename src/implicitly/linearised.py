"""The pullback (vector-Jacobian product) of a function as two graphs: one to run once, one for each product."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from operator import getitem
from typing import Any

import torch
from torch import SymFloat, SymInt, Tensor, fx
from torch.func import functionalize, vjp
from torch.utils import _pytree as pytree

from implicitly.transforms import Writing


class CannotSplitError(ValueError):
    """The pullback of a function cannot be written as two graphs."""


def split_pullback(
    f: Callable[..., Tensor], z: Tensor, theta: Sequence[Tensor], varying: Sequence[tuple[int, int]] = ()
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Split the pullback of f by z into two graphs `(prepare, pull)`.

    `pull(u, *prepare(z, *theta))` is the cotangent of z that belongs to the cotangent u of `f(z, *theta)`.

    A loop of `torch.compile` cannot pull back through what is recorded outside of it, and recording inside would
    call f for each product. The graphs have no derivative of their own. They hold the settings of this call; the
    other tensors that f uses, whose in-place changes they see; and the sizes of this call, except for the size of
    the batch where it is `varying`: pairs (i, dim) of `(z, *theta)`, that of z among them.

    Raises CannotSplitError if f looks at values, or at that size, or does what cannot be traced.
    """

    def pulled(u: Tensor, z: Tensor, *theta: Tensor) -> Tensor:
        return vjp(lambda z: f(z, *theta), z)[1](u)[0]

    # Each input is a separate tensor, even where one is passed twice: a later call may pass two.
    inputs = (torch.zeros_like(z), z, *(x.view_as(x) for x in theta))
    sizes = _Sizes(inputs, varying) if varying else None
    opened = inputs if sizes is None else sizes.opened
    with torch.no_grad(), nullcontext() if sizes is None else sizes.within, _Tape(opened, sizes) as tape:
        try:
            value = functionalize(pulled)(*opened)
        except RuntimeError as error:  # if f itself is wrong, the eager loop says so
            raise CannotSplitError(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}") from error
    if sizes is not None and sizes.are_looked_at:
        raise CannotSplitError("f looks at the size of the batch")
    u, *others = tape.inputs
    moving = {u}
    for node in tape.graph.nodes:
        if moving.intersection(node.all_input_nodes):
            moving.add(node)
    once = [x for node in tape.graph.nodes if node in moving for x in node.all_input_nodes if x not in moving]
    saved = list(dict.fromkeys(of for x in once for of in tape.without_views(x)))
    return tape.part(others, saved), tape.part([u, *saved], tape.node(value))


class _Sizes:
    """Fake tensors `opened`, like `inputs` but with symbolic sizes; compute with them in the mode `within`.

    The first of `inputs`, a cotangent, has the symbolic sizes of the second.
    """

    def __init__(self, inputs: Sequence[Tensor], varying: Sequence[tuple[int, int]]):
        # Imported on first use, since importing them takes long.
        from torch._subclasses.fake_tensor import FakeTensorMode
        from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

        if (0, 0) not in varying:
            raise CannotSplitError("what varies is not the batch")
        self._env, self._unseen = ShapeEnv(), 0
        self.within = FakeTensorMode(shape_env=self._env, allow_non_fake_inputs=True)
        opened = []
        for i, x in enumerate(inputs):
            of = max(i - 1, 0)
            sizes = [DimDynamic.DUCK if (of, dim) in varying else DimDynamic.STATIC for dim in range(x.ndim)]
            how = StatelessSymbolicContext(dynamic_sizes=sizes)
            opened.append(self.within.from_tensor(x.detach(), symbolic_context=how))
        self.opened = tuple(opened)

    @contextmanager
    def operation(self) -> Iterator[None]:
        """A context to compute one operation in: how it computes may depend on sizes, what it computes may not."""
        before = len(self._env.guards)
        yield
        self._unseen += len(self._env.guards) - before

    @property
    def are_looked_at(self) -> bool:
        """Whether f may compute something else for other sizes, or no other size is possible."""
        return len(self._env.guards) > self._unseen or self.opened[1].shape[0].node.expr.is_number


class _Tape(Writing):
    """Records operations as a graph, since PyTorch's own tools for that are not thread-safe."""

    def __init__(self, inputs: Sequence[Tensor], sizes: _Sizes | None):
        super().__init__()
        self.operation = nullcontext if sizes is None else sizes.operation
        self.graph, self.tensors = fx.Graph(), {}
        # Tensors are told apart by identity, not by value, and kept alive, so that no id is used twice.
        self.nodes: dict[int, tuple[Tensor, fx.Node]] = {}
        self.inputs = [self.graph.placeholder(f"input_{i}") for i in range(len(inputs))]
        for x, node in zip(inputs, self.inputs):
            self.nodes[id(x)] = x, node
        # The size of the batch, where it is symbolic, and the nodes that compute it and what follows from it.
        self.batch: Any = inputs[0].shape[0]
        self.sizes = [_batch_of(self.graph, self.inputs[1])]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            raise CannotSplitError("f looks at a number of its tensors, on which it may depend what it computes")
        with self.operation():
            value = func(*args, **kwargs)
        given = pytree.tree_map_only(Tensor, self.node, (args, kwargs))
        given = pytree.tree_map_only((SymInt, SymFloat), self.size, given)
        node = self.graph.call_function(func, *given)
        if isinstance(value, Tensor):
            self.nodes[id(value)] = value, node
            return value
        for i, x in enumerate(value if isinstance(value, tuple | list) else ()):
            if isinstance(x, Tensor):
                self.nodes[id(x)] = x, self.graph.call_function(getitem, (node, i))
        return value

    def node(self, x: Tensor) -> fx.Node:
        """The node that `x` comes from; a tensor that is not the result of an operation is held by the graph."""
        if id(x) not in self.nodes:
            name = f"tensor_{len(self.tensors)}"
            self.tensors[name] = x
            self.nodes[id(x)] = x, self.graph.get_attr(name)
        return self.nodes[id(x)][1]

    def size(self, number: SymInt | SymFloat) -> Any:
        """The node that computes `number` from the size of the batch, or its value if it does not depend on it."""
        from torch.utils._sympy.interp import sympy_interp
        from torch.utils._sympy.reference import PythonReferenceAnalysis

        known = len(self.graph.nodes)
        batch = {self.batch.node.expr: fx.Proxy(self.sizes[0])}
        value = sympy_interp(PythonReferenceAnalysis, batch, number.node.expr)
        self.sizes += list(self.graph.nodes)[known:]
        return value.node if isinstance(value, fx.Proxy) else value

    def without_views(self, node: fx.Node) -> Iterable[fx.Node]:
        """The nodes that `node` is a view of, as a loop refuses tensors that share memory; none for a size."""
        if node in self.sizes:
            return ()
        is_view = isinstance(node.target, torch._ops.OpOverload) and node.target.is_view
        return (of for x in node.all_input_nodes for of in self.without_views(x)) if is_view else (node,)

    def part(self, inputs: Sequence[fx.Node], outputs: Sequence[fx.Node] | fx.Node) -> fx.GraphModule:
        """The part of the graph from `inputs`, the first of which has one row per sample, to `outputs`."""
        several = isinstance(outputs, Sequence)
        graph, needed, stack = fx.Graph(), set(), list(outputs) if several else [outputs]
        copied = {node: graph.placeholder(node.name) for node in inputs}
        copied[self.sizes[0]] = _batch_of(graph, copied[inputs[0]])
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


def _batch_of(graph: fx.Graph, node: fx.Node) -> fx.Node:
    return graph.call_function(torch.ops.aten.sym_size.int, (node, 0))
