"""Warm starts: a solve starts at the equilibrium of the last batch, or of the same sample an epoch ago."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


class WarmStart(ABC):
    """Base class of warm starts, which remember equilibria and return starting points."""

    @abstractmethod
    def start(self, like: Any, index: Tensor | None) -> Any:
        """A start like the pytree `like`, which holds cold starts, or None if nothing is known."""

    @abstractmethod
    def store(self, value: Any, index: Tensor | None) -> None:
        """Remember a detached equilibrium."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs, so that after resuming, training starts solves where this one would."""

    @abstractmethod
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""


class LastBatch(WarmStart):
    """Start from the last batch's equilibrium if it has the same shapes; for data that changes slowly."""

    def __init__(self):
        self.value: Any = None

    def start(self, like: Any, index: Tensor | None) -> Any:
        """The last equilibrium, or None if shapes, dtypes or devices changed."""
        if self.value is None or not _alike(self.value, like):
            return None
        return self.value

    def store(self, value: Any, index: Tensor | None) -> None:
        """Remember a copy of the whole batch, as the layer's output shares memory with `value`."""
        self.value = pytree.tree_map(torch.clone, value)

    def state_dict(self) -> dict[str, Any]:
        """The last equilibrium."""
        return {"value": self.value}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the last equilibrium."""
        self.value = state_dict["value"]


class LastEpoch(WarmStart):
    """Start each sample from its own equilibrium of the last epoch.

    Args:
        size: number of samples in the data set; as many states are kept in memory, on the device of the
            equilibria.
    """

    def __init__(self, size: int):
        if not isinstance(size, int) or isinstance(size, bool):
            raise TypeError(f"LastEpoch: size must be an int, the number of samples in the data set, got {size!r}")
        if size < 1:
            raise ValueError(
                f"LastEpoch: size must be at least 1, the number of samples in the data set, got {size}"
            )
        self.size = size
        self._leaves: list[Tensor] | None = None
        self._known = torch.zeros(size, dtype=torch.bool, device="cpu")

    def start(self, like: Any, index: Tensor | None) -> Any:
        """Each sample's last equilibrium if it was seen before, else its cold start."""
        cold, spec = pytree.tree_flatten(like)
        index = self._checked(index, len(cold[0]))
        if self._leaves is None or any(s.shape[1:] != c.shape[1:] for s, c in zip(self._leaves, cold)):
            return None
        known = self._known[index.cpu()]
        leaves = [s.index_select(0, index.to(s.device)).to(c) for s, c in zip(self._leaves, cold)]
        if not known.all():  # as in the first epoch
            leaves = [
                torch.where(known.to(c.device).reshape(-1, *([1] * (c.ndim - 1))), s, c)
                for s, c in zip(leaves, cold)
            ]
        return pytree.tree_unflatten(leaves, spec)

    def store(self, value: Any, index: Tensor | None) -> None:
        """Remember each sample under its index."""
        leaves = pytree.tree_leaves(value)
        index = self._checked(index, len(leaves[0]))
        if self._leaves is None or any(s.shape[1:] != v.shape[1:] for s, v in zip(self._leaves, leaves)):
            self._leaves = [v.new_zeros(self.size, *v.shape[1:]) for v in leaves]
            self._known.zero_()
        for store, v in zip(self._leaves, leaves):
            store[index.to(store.device)] = v.to(store.dtype)
        self._known[index.cpu()] = True

    def state_dict(self) -> dict[str, Any]:
        """The equilibria, one tensor for each tensor of a state, and which samples were seen, `(size,)`."""
        return {"leaves": self._leaves, "known": self._known}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the equilibria; raises ValueError if they are of another number of samples."""
        known = state_dict["known"]
        if len(known) != self.size:
            raise ValueError(
                f"LastEpoch(size={self.size}) cannot load the equilibria of {len(known)} samples; use the same "
                "size"
            )
        leaves = state_dict["leaves"]
        self._leaves, self._known = None if leaves is None else [x.clone() for x in leaves], known.clone()

    def _checked(self, index: Tensor | None, batch: int) -> Tensor:
        if index is None:
            raise ValueError(
                "LastEpoch needs the index of each sample in the data set: call layer(x, index=index)"
            )
        if not isinstance(index, Tensor) or index.dtype != torch.int64:
            got = index.dtype if isinstance(index, Tensor) else f"a {type(index).__name__}: torch.tensor(index)?"
            raise TypeError(f"LastEpoch needs an index, a tensor of dtype torch.int64, got {got}")
        if index.shape != (batch,):
            raise ValueError(
                f"LastEpoch needs one index per sample, of shape ({batch},), got {tuple(index.shape)}"
            )
        if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < self.size:
            raise ValueError(
                f"LastEpoch(size={self.size}) needs indices from 0 to {self.size - 1}, got {int(index.min())} to "
                f"{int(index.max())}"
            )
        return index


def _alike(a: Any, b: Any) -> bool:
    (x, s), (y, t) = pytree.tree_flatten(a), pytree.tree_flatten(b)
    return s == t and all(p.shape == q.shape and p.dtype == q.dtype and p.device == q.device for p, q in zip(x, y))
