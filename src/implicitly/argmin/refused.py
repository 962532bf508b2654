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
        "changes in place a tensor that is not its own",
        "compute without it, or copy what is to be kept after the solve",
    ),
    (
        "setup_context staticmethod",
        "calls a torch.autograd.Function that torch.func cannot differentiate",
        "write its forward without ctx, beside a setup_context(ctx, inputs, output), and a backward of operations "
        "that are differentiable in turn",
    ),
    (
        "attempting to call Tensor.requires_grad_()",
        "calls requires_grad_(), or torch.autograd.functional",
        "leave requires_grad_() out, as z is followed already; a gradient within is torch.func.grad's",
    ),
    (
        "Cannot access data pointer of Tensor",
        "leaves torch, for NumPy say, where no derivative follows",
        "write it in operations of torch, or as a torch.autograd.Function with a derivative of its own",
    ),
    (
        "Can't call numpy() on Tensor that requires grad",
        "leaves torch for NumPy, where no derivative follows",
        "write it in operations of torch, or as a torch.autograd.Function with a derivative of its own",
    ),
    (
        "that requires grad is being used in an in-place operation",
        "changes in place its z, or a parameter",
        "work on a copy, such as z.clone()",
    ),
    (
        "the derivative for '",
        "has an operation without a second derivative in torch",
        "write that by others, such as torch.cdist(x, y) as (x[:, None] - y[None]).square().sum(-1).sqrt()",
    ),
    (
        "calling .item() on a Tensor",
        "branches on the values of tensors, or reads them as numbers, where samples are mapped by torch.vmap",
        "use torch.where in place of a branch, and tensors in place of numbers",
    ),
    (
        "data-dependent control flow",
        "branches on the values of tensors where samples are mapped by torch.vmap",
        "use torch.where in place of a branch",
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
            f"{entry} differentiates the function it is given, and its gradient in turn; '{name}', or what it "
            f"calls, {found[0]}. Try: {found[1]}. torch says: {said}"
        ) from error
