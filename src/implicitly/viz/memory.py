"""Measure and draw what differentiation costs in memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from implicitly.viz.style import COLOURS, label_ends, new_figure, title

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def saved_bytes(fn: Callable[[], object]) -> int:
    """Bytes that autograd saves for the backward pass while `fn` runs.

    Each storage counts once, however many operations save it, and as a whole, even if only a view is saved.
    Parameters (`nn.Parameter`, and views of one) exist anyway and don't count.

    Args:
        fn: runs the forward pass. Its result is discarded.

    Returns:
        Bytes, on all devices together.

    Raises:
        RuntimeError: `fn` enters `torch.func.grad` or `vjp`, which refuse the hooks that this needs.
    """
    saved: dict[int, torch.UntypedStorage] = {}  # holding a storage keeps its address from being used again

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor if tensor._base is None else tensor._base, nn.Parameter):
            storage = tensor.untyped_storage()
            saved[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        fn()
    return sum(storage.nbytes() for storage in saved.values())


def peak_bytes(fn: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """Peak memory of `fn` in bytes, beyond what was alive before.

    Args:
        fn: for instance a training step: forward and backward. Its result is discarded.
        device: where it runs. On CUDA the number comes from the caching allocator. Elsewhere the storages of
            tensors that PyTorch's operations return are tracked until they are freed; memory used only inside an
            operation, such as the workspace of a convolution, is not seen.

    Returns:
        Bytes.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        fn()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _LiveStorages() as storages:
        fn()
    return storages.peak


class _LiveStorages(TorchDispatchMode):
    """Counts the bytes of storages that were allocated while the mode is on, and are not freed yet."""

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        # A weak reference to a storage calls back once its last tensor, in Python or in C++, is gone.
        self._followed: dict[int, tuple[weakref.ref[torch.UntypedStorage], int]] = {}

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        for tensor in tree_leaves((args, kwargs)):
            self._follow(tensor, born=False)
        result = func(*args, **kwargs)
        for tensor in tree_leaves(result):
            self._follow(tensor, born=True)
        self.peak = max(self.peak, self.live)
        return result

    def _follow(self, tensor: object, born: bool) -> None:
        if not isinstance(tensor, torch.Tensor):
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._followed:
            size = storage.nbytes() if born else 0
            self._followed[key] = (weakref.ref(storage, lambda _: self._forget(key)), size)
            self.live += size

    def _forget(self, key: int) -> None:
        self.live -= self._followed.pop(key)[1]


def plot_memory(
    steps: Sequence[int],
    measured: Mapping[str, Sequence[float]],
    unit: float,
    unit_name: str,
    subtitle: str = "the same layer, differentiated in two ways",
    label: str = "solver steps",
) -> Figure:
    """Draw the memory of a training step against the number of solver steps, one line per adjoint or network.

    Args:
        steps: numbers of solver steps, ascending.
        measured: for each name, the bytes at each of `steps`. The first is drawn as the one to beat.
        unit: bytes that make one unit of the vertical axis, for instance those of one call of f.
        unit_name: what the unit is, for the axis label.
        subtitle: a line of grey text.
        label: label of the horizontal axis.

    Returns:
        A matplotlib figure; `figure.savefig(path)` writes it.

    Raises:
        ValueError: a line has another number of values than `steps`.
    """
    figure, axes = new_figure(7.2, 4.2)
    ends = []
    colours = [COLOURS.warm, COLOURS.main, COLOURS.second, COLOURS.grey]
    for (name, values), colour in zip(measured.items(), colours, strict=False):
        if len(values) != len(steps):
            raise ValueError(
                f"{name!r} must have one value per number of steps; got {len(values)} values for {len(steps)}"
            )
        heights = [value / unit for value in values]
        axes.plot(steps, heights, color=colour, marker="o", markersize=5, linewidth=2.2, clip_on=False)
        factor = f"{heights[-1]:.0f}" if heights[-1] >= 10 else f"{heights[-1]:.1f}"
        ends.append((steps[-1], heights[-1], f"{name}\n{factor} x", colour))
    axes.set_xlim(0, steps[-1])
    axes.set_ylim(bottom=0)
    label_ends(figure, axes, ends, gap=30)
    axes.set_xlabel(label)
    axes.set_ylabel(f"peak memory, in units of\n{unit_name}")
    title(axes, "Memory of one training step", subtitle)
    return figure
