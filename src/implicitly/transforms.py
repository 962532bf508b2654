"""What autograd, `torch.func` and autocast make of a tensor that is computed with now."""

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
    """Whether `x` lies in the host's own memory, and not on an accelerator that it would wait for."""
    return x.is_cpu


def version(x: Tensor) -> int:
    """How often `x` was changed in place; inference mode does not count."""
    return 0 if x.is_inference() else x._version


def merge_rows(x: Tensor, dim: int | None, size: int) -> Tensor:
    """A `(B, ...)` tensor that `vmap` maps over dimension `dim`, of `size`, as `(size * B, ...)`."""
    x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    return x.flatten(0, 1)


def is_plain(*tensors: Tensor) -> bool:
    """Whether what is computed from `tensors` now is for nobody to differentiate: no autograd, no transform."""
    return (
        not torch.is_grad_enabled() and forward_ad._current_level < 0 and not any(is_wrapped(t) for t in tensors)
    )


def is_tracked(x: Tensor) -> bool:
    """Whether a derivative or a transform may reach `x`."""
    return x.requires_grad or is_wrapped(x) or has_tangent(x)


def is_recorded(x: Tensor) -> bool:
    """Whether a derivative by `x` may be asked for of what is computed from it now."""
    return (x.requires_grad and torch.is_grad_enabled()) or is_wrapped(x) or has_tangent(x)


def records() -> bool:
    """Whether a derivative or a transform may follow what is computed now."""
    if torch.compiler.is_dynamo_compiling():
        return True
    return torch.is_grad_enabled() or forward_ad._current_level >= 0 or under_transform()


def loses(recording: bool) -> bool:
    """Whether the derivative of a tensor that f reaches by itself would be lost, unless a solve is `recording`."""
    return not (recording or torch.compiler.is_dynamo_compiling()) and records()


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
    """A mode that writes operations down, to be done again with other numbers."""


def written_down() -> bool:
    """Whether operations are done again with other numbers, so that none may be looked at: by a tracer, or a mode
    that is `Writing`."""
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
    """Those of the `torch.func` transforms that `x` belongs to."""
    found = set()
    while is_wrapped(x):
        found.add(functorch.maybe_get_level(x))
        x = functorch.get_unwrapped(x)
    return found


def casts(device_type: str) -> bool:
    """Whether autocast is on for such devices."""
    return (device_type == "cpu" or _knows_autocast(device_type)) and torch.is_autocast_enabled(device_type)


def _knows_autocast(device_type: str) -> bool:
    """Some, such as `meta`, do not."""
    return torch.amp.is_autocast_available(device_type)


# As `torch.compiler.assume_constant_result` does, which imports the whole compiler. PyTorch 2.11 cannot trace it.
_knows_autocast._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def full_precision(device_type: str) -> AbstractContextManager[Any]:
    """A context without autocast, for the arithmetic of solvers."""
    if casts(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


@contextmanager
def unhooked() -> Iterator[None]:
    """Saved-tensor hooks (activation checkpointing) set aside: they are meant for tensors that outlive the solve.

    torch.func refuses them, and unpacking inside the solve would recompute the very computation under way.
    """
    # Private, as PyTorch has no other way to set hooks aside.
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
    """One operation to autograd, with its signature at hand, for which every `apply` would look anew."""

    def __init_subclass__(cls, **options: Any):
        super().__init_subclass__(**options)
        cls.forward.__signature__ = inspect.signature(cls.forward)  # pyright: ignore[reportFunctionMemberAccess]


def asked(ctx: Any) -> tuple[bool, ...]:
    """For each input of an autograd function, whether the backward pass under way has a use for its gradient.

    `ctx.needs_input_grad` is true of all that a gradient was recorded for; `torch.autograd.grad` by some inputs
    leaves the others out, as it does in autograd's own operations.
    """
    needs = ctx.needs_input_grad
    if torch.compiler.is_dynamo_compiling() or under_transform():
        return needs
    nodes = [node for node, _ in ctx.next_functions if node is not None]
    if len(nodes) != sum(needs):  # autograd does not run this itself
        return needs
    if all(type(getattr(node, "variable", None)) is nn.Parameter for node in nodes):  # wanted together as a rule
        return needs
    used = iter(_used(nodes))
    return tuple(needed and next(used) for needed in needs)


def _used(nodes: list[Any]) -> list[bool]:
    """Which of the `nodes` of a graph the backward pass under way reaches."""
    private: Any = torch
    used, asked_leaf = [], None
    for node in reversed(nodes):  # parameters, which are last, are usually wanted all or not at all
        if type(node) is asked_leaf:
            used.append(True)
            continue
        try:
            used.append(private._C._will_engine_execute_node(node))
        except RuntimeError:  # what it has for a leaf that `torch.autograd.grad` was asked for, and takes long
            used.append(True)
            asked_leaf = type(node)
    return used[::-1]


def one_by_one(backward: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """`backward` of an autograd function, for one cotangent at a time where autograd hands it several at once.

    `torch.autograd.grad(is_grads_batched=True)`, and what builds on it, do so by a transform that is older than
    `torch.func`, and knows few operations.
    """
    private: Any = torch

    @functools.wraps(backward)
    def of_each(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        if not any(g is not None and functorch.is_legacy_batchedtensor(g) for g in cotangents):
            return backward(ctx, *cotangents)
        outer = private._C._vmapmode_decrement_nesting()  # set aside, as f may have operations it refuses
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
    """Where autograd can record; gives the pytree `inputs` with copies of tensors that no graph can hold."""
    recording = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(recording):  # the first alone would enable it
        yield pytree.tree_map_only(Tensor, lambda x: x.clone() if x.is_inference() else x, inputs)
