"""Queries and contexts for the state of autograd, `torch.func` and autocast around a tensor."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _functorch as functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode


def is_cpu(x: Tensor) -> bool:
    """Whether `x` is in the host's memory, not on an accelerator that the host would have to wait for."""
    return x.is_cpu


def version(x: Tensor) -> int:
    """How often `x` was changed in place; 0 for tensors of inference mode, which does not count."""
    return 0 if x.is_inference() else x._version


def merge_rows(x: Tensor, dim: int | None, size: int) -> Tensor:
    """A `(B, ...)` tensor that `vmap` maps over its dimension `dim`, of `size` entries, as `(size * B, ...)`."""
    x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    return x.flatten(0, 1)


def split_rows(x: Tensor, size: int) -> Tensor:
    """A `(size * B, ...)` tensor as `(size, B, ...)`: undoes `merge_rows`."""
    return x.reshape(size, len(x) // size, *x.shape[1:])


def is_plain(*tensors: Tensor) -> bool:
    """Whether nobody will differentiate what is computed from `tensors` now: no autograd, no transform."""
    return (
        not torch.is_grad_enabled() and forward_ad._current_level < 0 and not any(is_wrapped(t) for t in tensors)
    )


def is_tracked(x: Tensor) -> bool:
    """Whether a derivative or a transform may reach `x`."""
    return x.requires_grad or is_wrapped(x) or has_tangent(x)


def is_recorded(x: Tensor) -> bool:
    """Whether a derivative with respect to `x` may be taken of what is computed from it now."""
    return (x.requires_grad and torch.is_grad_enabled()) or is_wrapped(x) or has_tangent(x)


def records() -> bool:
    """Whether autograd, forward mode or a transform may record what is computed now."""
    if torch.compiler.is_dynamo_compiling():
        return True
    return torch.is_grad_enabled() or forward_ad._current_level >= 0 or under_transform()


def loses(recording: bool) -> bool:
    """Whether the gradient of a tensor that f reaches by itself would be lost, as the solve is not `recording`."""
    return not (recording or torch.compiler.is_dynamo_compiling()) and records()


def records_plainly(*tensors: Tensor | None) -> bool:
    """Whether autograd alone records what is computed from `tensors` now.

    That is, there is no transform, no forward mode, and there are no hooks on saved tensors.
    """
    if torch.compiler.is_dynamo_compiling() or not torch.is_grad_enabled() or forward_ad._current_level >= 0:
        return False
    autograd = torch._C._autograd  # pyright: ignore[reportAttributeAccessIssue]
    hooked = autograd._top_saved_tensors_default_hooks(False) is not None
    return not hooked and not any(x is not None and is_wrapped(x) for x in tensors)


def keeps_graph() -> bool:
    """Whether the backward pass that is under way is asked to retain the graph."""
    return torch._C._autograd._get_current_graph_task_keep_graph()  # pyright: ignore[reportAttributeAccessIssue]


def has_tangent(x: Tensor) -> bool:
    """Whether forward mode has a tangent for `x`, at any level."""
    if forward_ad._current_level < 0:
        return False
    while is_wrapped(x):
        if functorch.is_gradtrackingtensor(x) and forward_ad.unpack_dual(x).tangent is not None:
            return True
        x = functorch.get_unwrapped(x)
    return forward_ad.unpack_dual(x).tangent is not None


class Writing(TorchDispatchMode):
    """A mode that records operations, to repeat them later with other values."""


def written_down() -> bool:
    """Whether operations are recorded to be repeated with other values, so that no value may be read.

    A tracer does that, or a mode that is `Writing`.
    """
    if torch.compiler.is_dynamo_compiling():
        return True
    private: Any = torch
    return private._C._len_torch_dispatch_stack() > 0 and isinstance(_get_current_dispatch_mode(), Writing)


def under_transform() -> bool:
    """Whether a transform of `torch.func` is active."""
    return functorch.peek_interpreter_stack() is not None


def is_wrapped(x: Tensor) -> bool:
    """Whether `x` belongs to a `torch.func` transform."""
    return not torch.compiler.is_dynamo_compiling() and functorch.is_functorch_wrapped_tensor(x)


def is_batched(x: Tensor) -> bool:
    """Whether `x` is mapped by `torch.func.vmap`, at any level."""
    while is_wrapped(x):
        if functorch.is_batchedtensor(x):
            return True
        x = functorch.get_unwrapped(x)
    return False


def unwrapped(x: Tensor) -> Tensor:
    """`x` without the `torch.func` transforms around it: under vmap, the whole batch."""
    while is_wrapped(x):
        x = functorch.get_unwrapped(x)
    return x


def levels(x: Tensor) -> set[int]:
    """The levels of the `torch.func` transforms that `x` belongs to."""
    found = set()
    while is_wrapped(x):
        found.add(functorch.maybe_get_level(x))
        x = functorch.get_unwrapped(x)
    return found


def casts(device_type: str) -> bool:
    """Whether autocast is on for devices of this type."""
    return (device_type == "cpu" or _knows_autocast(device_type)) and torch.is_autocast_enabled(device_type)


def _knows_autocast(device_type: str) -> bool:
    """Whether autocast exists for devices of this type; for some, such as `meta`, it does not."""
    return torch.amp.is_autocast_available(device_type)


# Same effect as `torch.compiler.assume_constant_result`, which imports the whole compiler. PyTorch 2.11 cannot
# trace the function.
_knows_autocast._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def full_precision(device_type: str) -> AbstractContextManager[Any]:
    """A context without autocast, for the arithmetic of solvers."""
    if casts(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


@contextmanager
def unhooked() -> Iterator[None]:
    """A context without saved-tensor hooks (activation checkpointing).

    The hooks are meant for tensors that outlive the solve. torch.func refuses them, and unpacking inside the solve
    would recompute the very computation under way.
    """
    # Private functions, since PyTorch has no other way to set hooks aside.
    hooks, autograd = [], torch._C._autograd  # pyright: ignore[reportAttributeAccessIssue]
    while (top := autograd._top_saved_tensors_default_hooks(False)) is not None:
        hooks.append(top)
        autograd._pop_saved_tensors_default_hooks()
    try:
        yield
    finally:
        for pack, unpack in reversed(hooks):
            autograd._push_saved_tensors_default_hooks(pack, unpack)


class Operation(torch.autograd.Function):
    """Base of our autograd functions; keeps the signature, which every `apply` would look up anew."""

    def __init_subclass__(cls, **options: Any):
        super().__init_subclass__(**options)
        cls.forward.__signature__ = inspect.signature(cls.forward)  # pyright: ignore[reportFunctionMemberAccess]


def asked(ctx: Any) -> tuple[bool, ...]:
    """For each input of an autograd function, whether the current backward pass uses its gradient.

    `ctx.needs_input_grad` is true for all inputs that a gradient was recorded for. `torch.autograd.grad` with
    respect to some inputs leaves the others out, as autograd's own operations do.
    """
    needs = ctx.needs_input_grad
    if torch.compiler.is_dynamo_compiling() or under_transform():
        return needs
    nodes = [node for node, _ in ctx.next_functions if node is not None]
    if len(nodes) != sum(needs):  # not run by autograd itself
        return needs
    if all(type(getattr(node, "variable", None)) is nn.Parameter for node in nodes):  # usually wanted together
        return needs
    used = iter(_used(nodes))
    return tuple(needed and next(used) for needed in needs)


def _used(nodes: list[Any]) -> list[bool]:
    """Which of the `nodes` of a graph the current backward pass reaches."""
    private: Any = torch
    used, asked_leaf = [], None
    for node in reversed(nodes):  # parameters, which are last, are usually wanted all or not at all
        if type(node) is asked_leaf:
            used.append(True)
            continue
        try:
            used.append(private._C._will_engine_execute_node(node))
        except RuntimeError:  # its answer, a slow one, for a leaf that `torch.autograd.grad` was asked for
            used.append(True)
            asked_leaf = type(node)
    return used[::-1]


def one_by_one(backward: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """Make `backward` of an autograd function take one cotangent at a time where autograd passes several at once.

    `torch.autograd.grad(is_grads_batched=True)`, and what builds on it, passes several by a transform that is
    older than `torch.func` and supports few operations.
    """
    private: Any = torch

    @functools.wraps(backward)
    def of_each(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        if not any(g is not None and functorch.is_legacy_batchedtensor(g) for g in cotangents):
            return backward(ctx, *cotangents)
        outer = private._C._vmapmode_decrement_nesting()  # set aside: it may refuse operations of f
        try:
            if outer:
                raise NotImplementedError(
                    "is_grads_batched=True, itself mapped over a batch, asks a solve for cotangents of cotangents "
                    "at once; use torch.func.jacrev or torch.func.vmap, which may be nested"
                )
            known = [g if g is None else private._remove_batch_dim(g, 1, 1, 0) for g in cotangents]
            size = max(len(g) for g in known if g is not None)
            each = [
                backward(ctx, *(g if g is None else g.expand(size, *g.shape[1:])[i] for g in known))
                for i in range(size)
            ]
            whole = [None if parts[0] is None else torch.stack(parts) for parts in zip(*each)]
        finally:
            private._C._vmapmode_increment_nesting()
        return tuple(x if x is None else private._add_batch_dim(x, 0, 1) for x in whole)

    return of_each


@contextmanager
def out_of_inference_mode(inputs: Any) -> Iterator[Any]:
    """A context where autograd can record; yields the pytree `inputs`, with copies of inference-mode tensors."""
    recording = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(recording):  # the first alone would enable it
        yield pytree.tree_map_only(Tensor, lambda x: x.clone() if x.is_inference() else x, inputs)
