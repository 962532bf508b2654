"""The common look of all pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class _Colours(NamedTuple):
    main: str = "#1f5a92"
    warm: str = "#d9622b"
    second: str = "#3a8f6b"
    third: str = "#8a5ca8"
    grey: str = "#7a7f87"
    faint: str = "#d9dce1"
    ink: str = "#22262b"


COLOURS = _Colours()
SERIES = (COLOURS.main, COLOURS.warm, COLOURS.second, COLOURS.third, COLOURS.grey)


def new_figure(width: float, height: float, columns: int = 1) -> tuple[Figure, Axes]:
    """A figure of `width` x `height` inches at 150 dots per inch, and its one empty pair of axes."""
    figure, axes = new_figures(width, height, 1)
    return figure, axes[0]


def new_figures(width: float, height: float, columns: int) -> tuple[Figure, list[Axes]]:
    """A figure of `width` x `height` inches with `columns` pairs of axes side by side.

    It is made without pyplot, so it needs no display and leaves matplotlib's global state alone.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.15)
    figure = Figure(figsize=(width, height), dpi=150, layout=layout, facecolor="white")
    axes = [figure.add_subplot(1, columns, column + 1) for column in range(columns)]
    for one in axes:
        tidy(one)
    return figure, axes


def tidy(axes: Axes) -> None:
    """Give axes a light grid, two spines and dark grey text."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(COLOURS.faint)
    axes.grid(color=COLOURS.faint, linewidth=0.6, alpha=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", colors=COLOURS.grey, labelsize=9, length=0)
    axes.xaxis.label.set_color(COLOURS.ink)
    axes.yaxis.label.set_color(COLOURS.ink)


def label_ends(
    figure: Figure, axes: Axes, labels: Sequence[tuple[float, float, str, str]], gap: float = 15.0
) -> None:
    """Write labels to the right of where lines end, at least `gap` points apart.

    Args:
        figure, axes: the figure and axes with the lines.
        labels: `(x, y, text, colour)`, x and y in data coordinates.
        gap: in points, 1/72 inch.
    """
    figure.draw_without_rendering()  # settles limits and layout
    points_per_pixel = 72 / figure.dpi
    lowest_free = float("-inf")
    for x, y, text, colour in sorted(labels, key=lambda label: label[1]):
        height = axes.transData.transform((x, y))[1] * points_per_pixel
        place = max(height, lowest_free)
        lowest_free = place + gap
        axes.annotate(
            text,
            (x, y),
            xytext=(10, place - height),
            textcoords="offset points",
            color=colour,
            fontweight="bold",
            va="center",
        )


def title(axes: Axes, text: str, below: str = "") -> None:
    """Write a bold title at the left, and a grey line under it."""
    axes.set_title(text, loc="left", fontsize=13, fontweight="bold", color=COLOURS.ink, pad=26)
    axes.text(0, 1.04, below, transform=axes.transAxes, fontsize=9.5, color=COLOURS.grey, va="bottom")
