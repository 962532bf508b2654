"""Record and draw how fast solvers converge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from implicitly.viz.style import SERIES, label_ends, new_figure, title

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class ResidualRecorder(nn.Module):
    """Behaves like the map f that it wraps, and keeps the relative residual |f(z) - z| / |f(z)| of each call.

    Attributes:
        history: one tensor `(B,)` for each call so far: the residuals of the samples, dimension 0 of `z`.
    """

    def __init__(self, f: nn.Module) -> None:
        super().__init__()
        self.f = f
        self.history: list[Tensor] = []

    def forward(self, z: Tensor, *args: Any) -> Tensor:
        """f(z, *args)."""
        image = self.f(z, *args)
        difference = (image - z).detach().flatten(start_dim=1)
        self.history.append(difference.norm(dim=1) / image.detach().flatten(start_dim=1).norm(dim=1))
        return image


def plot_convergence(
    histories: Mapping[str, Sequence[Tensor]], tolerance: float | None = None, subtitle: str = ""
) -> Figure:
    """Draw relative residuals against calls of f: the median over the samples, and where 80 % of them lie.

    Args:
        histories: for each solver's name, what a `ResidualRecorder` kept: tensors `(B,)`, one per call.
        tolerance: drawn as a line, if given.
        subtitle: a line of grey text under the title.

    Returns:
        A matplotlib figure; `figure.savefig(path)` writes it.
    """
    figure, axes = new_figure(7.2, 4.2)
    axes.set_yscale("log")
    ends = []
    for (name, history), colour in zip(histories.items(), SERIES, strict=False):
        residuals = torch.stack(list(history)).double()
        low, median, high = residuals.quantile(torch.tensor([0.1, 0.5, 0.9]).double(), dim=1).tolist()
        calls = range(1, len(history) + 1)
        axes.fill_between(calls, low, high, color=colour, alpha=0.13, linewidth=0)
        axes.plot(calls, median, color=colour, linewidth=2.2, marker="o", markersize=3.5)
        ends.append((calls[-1], median[-1], name, colour))
    if tolerance is not None:
        axes.axhline(tolerance, color="black", linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate(
            f"tolerance in training: {tolerance:g}",
            (0.995, tolerance),
            xycoords=("axes fraction", "data"),
            xytext=(0, 4),
            textcoords="offset points",
            fontsize=9,
            ha="right",
        )
    label_ends(figure, axes, ends)
    axes.set_xlabel("calls of f")
    axes.set_ylabel("relative residual |f(z) - z| / |f(z)|")
    title(axes, "How solvers find the equilibrium", subtitle)
    return figure
