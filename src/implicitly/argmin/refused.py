"""Objectives that torch cannot differentiate twice, or by `torch.func`: its errors explained to the user."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")

# Part of torch's message, what the function does that causes it, and what it may do instead.
REFUSALS = (
    (
        "would mutate a captured Tensor",
        "changes in place a tensor that it did not create",
        "do not modify it, or record what you need after the solve",
    ),
    (
        "setup_context staticmethod",
        "calls a torch.autograd.Function that torch.func cannot differentiate",
        "write forward without ctx, add setup_context(ctx, inputs, output), and use differentiable operations in "
        "backward",
    ),
    (
        "attempting to call Tensor.requires_grad_()",
        "calls requires_grad_(), or torch.autograd.functional",
        "leave out requires_grad_(), as z is tracked already; for a gradient inside, use torch.func.grad",
    ),
    (
        "Cannot access data pointer of Tensor",
        "leaves torch, for example for NumPy, where derivatives are lost",
        "write it in operations of torch, or as a torch.autograd.Function with a derivative of its own",
    ),
    (
        "Can't call numpy() on Tensor that requires grad",
        "converts a tensor to NumPy, where derivatives are lost",
        "write it in operations of torch, or as a torch.autograd.Function with a derivative of its own",
    ),
    (
        "that requires grad is being used in an in-place operation",
        "changes z or a parameter in place",
        "work on a copy, such as z.clone()",
    ),
    (
        "the derivative for '",
        "uses an operation that has no second derivative in torch",
        "write it with other operations, such as torch.cdist(x, y) as "
        "(x[:, None] - y[None]).square().sum(-1).sqrt()",
    ),
    (
        "calling .item() on a Tensor",
        "branches on the values of tensors, or reads them as numbers, inside torch.vmap over the samples",
        "use torch.where instead of a branch, and tensors instead of numbers",
    ),
    (
        "data-dependent control flow",
        "branches on the values of tensors inside torch.vmap over the samples",
        "use torch.where instead of a branch",
    ),
)


def explaining_refusals(entry: str, f: Callable[..., Any], solve: Callable[[], Result]) -> Result:
    """Return `solve()`; if torch cannot differentiate `f`, raise a ValueError with the cause and a remedy.

    All other errors pass unchanged, as do those of the tracer, which explains itself what it cannot trace.
    """
    if torch.compiler.is_dynamo_compiling():
        return solve()
    try:
        return solve()
    except RuntimeError as error:
        said = str(error)
        found = next(((does, instead) for part, does, instead in REFUSALS if part in said), None)
        if found is None:
            raise
        name = getattr(f, "__name__", type(f).__name__)
        raise ValueError(
            f"{entry} differentiates the function that it is given twice, but '{name}', or a "
            f"function that it calls, {found[0]}. Try: {found[1]}. torch says: {said}"
        ) from error
