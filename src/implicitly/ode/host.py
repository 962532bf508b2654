"""Arithmetic of a few numbers a sample, where that is quickest.

Times, lengths and errors are arrays `(B,)`. On a CPU they are NumPy's, whose operations take a fifth of the time
of torch's; on an accelerator, under transforms and in a traced graph they are tensors. The functions used on both
have the same names there (`where`, `minimum`, `maximum`, `clip`, `sign`).
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from implicitly.iterate import happens
from implicitly.tree import is_wrapped, unwrapped

# A NumPy array or a tensor, `(B,)` or `(B, T)`.
Array = Any


def library(x: Array) -> ModuleType:
    """The module, numpy or torch, whose functions work on `x`."""
    return torch if isinstance(x, Tensor) else np


def on_host(*tensors: Tensor) -> bool:
    """Whether the numbers of all `tensors` can be looked at without waiting."""
    return not torch.compiler.is_compiling() and all(x.device.type == "cpu" and not is_wrapped(x) for x in tensors)


def to_host(x: Tensor) -> Array:
    """`x`, detached, as an array of the kind to be used where it lies."""
    if torch.compiler.is_compiling() or x.device.type != "cpu":
        return x.detach()
    x = unwrapped(x)
    with torch._C._DisableFuncTorch():  # pyright: ignore[reportPrivateUsage] - else a transform wraps it again
        return x.detach().numpy()


def to_tensor(x: Array) -> Tensor:
    """`x` as a tensor."""
    return x if isinstance(x, Tensor) else torch.from_numpy(x)


def some(mask: Array) -> bool:
    """Whether any entry is true where looking is cheap; True where it is not (tracing, an accelerator)."""
    return happens(mask) if isinstance(mask, Tensor) else bool(mask.any())
