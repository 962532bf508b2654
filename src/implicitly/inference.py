"""Tensors made in inference mode, which autograd cannot save for a backward pass, and copies that it can."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakIdKeyDictionary

from implicitly.reached import modules_and_tensors


class Normal(TorchFunctionMode):
    """A mode that gives operations copies in place of inference tensors, which autograd cannot save."""

    def __init__(self):
        super().__init__()
        self._copies = WeakIdKeyDictionary()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = pytree.tree_map_only(Tensor, self._copy, (args, kwargs or {}))
        return func(*args, **kwargs)

    def _copy(self, x: Tensor) -> Tensor:
        if not x.is_inference():
            return x
        if x not in self._copies:
            self._copies[x] = copied(x)
        return self._copies[x]


def copied(x: Tensor) -> Tensor:
    """`x`, or if `x` was made in inference mode, a copy that autograd can save."""
    if torch.compiler.is_dynamo_compiling() or not x.is_inference():
        return x
    # Outside of every transform of torch.func, since the copy must outlive the first one that meets it.
    with torch.inference_mode(False), torch._C._DisableFuncTorch():  # pyright: ignore[reportPrivateUsage]
        return x.detach().clone()


def normal(f: Callable[..., Any], args: tuple[Any, ...]) -> AbstractContextManager[Any]:
    """A context in which autograd can record f(..., *args), even if f reaches tensors made in inference mode."""
    modules, tensors = modules_and_tensors(f, args)
    own = (x for module in modules for x in (*module.parameters(), *module.buffers()))
    return normal_if_needed((*own, *(x for _, x in tensors))) or nullcontext()


def normal_if_needed(tensors: Iterable[Tensor]) -> Normal | None:
    """`Normal()` if any of `tensors` was made in inference mode, else None."""
    return Normal() if any(map(Tensor.is_inference, tensors)) else None
