"""What is alive, and what autograd keeps."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def bytes_of(tensors: list[Tensor]) -> int:
    """Bytes of the distinct storages behind `tensors`."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def living_tensors() -> list[Tensor]:
    return [o for o in gc.get_objects() if type(o) in (Tensor, torch.nn.Parameter)]


@contextmanager
def saved_tensors() -> Iterator[list[Tensor]]:
    """A list that gets every tensor which autograd keeps for backward, within."""
    saved: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        yield saved
