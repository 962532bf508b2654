"""Gradients compared with a reference."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from implicitly.viz.style import COLOURS, new_figures, title

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def relative_difference(gradient: Tensor, reference: Tensor) -> Tensor:
    """|gradient - reference| / max |reference|, elementwise, so that entries near zero have the same scale."""
    return (gradient - reference).abs() / reference.abs().max()


def plot_gradient_check(gradient: Tensor, reference: Tensor, reference_name: str) -> Figure:
    """Draw a gradient against a reference, entry by entry, and how much they differ.

    Args:
        gradient: any shape.
        reference: the same shape, for instance finite differences.
        reference_name: for the axis label.

    Returns:
        A matplotlib figure; `figure.savefig(path)` writes it.

    Raises:
        ValueError: the shapes differ.
    """
    if gradient.shape != reference.shape:
        raise ValueError(
            f"gradient and reference must have the same shape; got {tuple(gradient.shape)} and "
            f"{tuple(reference.shape)}"
        )
    differences = relative_difference(gradient, reference).flatten().sort().values.clamp(min=1e-17)
    figure, (left, right) = new_figures(9.6, 4.2, 2)
    ends = [float(reference.min()), float(reference.max())]
    left.plot(ends, ends, color=COLOURS.faint, linewidth=5, solid_capstyle="round", zorder=1)
    left.scatter(
        reference.flatten().tolist(),
        gradient.flatten().tolist(),
        s=22,
        color=COLOURS.main,
        linewidths=0,
        zorder=2,
    )
    left.set_xlabel(reference_name)
    left.set_ylabel("implicit differentiation")
    title(left, "The gradient, entry by entry", f"{gradient.numel()} entries, and the line of equality")
    right.set_yscale("log")
    right.scatter(range(1, len(differences) + 1), differences.tolist(), s=22, color=COLOURS.warm, linewidths=0)
    right.set_ylim(1e-16, 1.0)
    right.set_xlabel("entries, sorted by difference")
    right.set_ylabel("relative difference")
    title(right, "How much they differ", f"at most {differences[-1]:.0e}, relative to the largest entry")
    return figure
