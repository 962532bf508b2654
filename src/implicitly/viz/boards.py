"""Sudoku boards, and how a network that fills them learns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from implicitly.viz.style import COLOURS, SERIES, label_ends, new_figure, title

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_learning(
    curves: Mapping[str, Sequence[tuple[float, float]]], heading: str, below: str, label: str, unit: str
) -> Figure:
    """Draw the share of mistakes against training steps, one line per network.

    Args:
        curves: by name, `(training step from 1 on, share between 0 and 1)`.
        heading, below: title, and a line of grey text.
        label: label of the vertical axis.
        unit: unit of the horizontal axis.

    Returns:
        A matplotlib figure; `figure.savefig(path)` writes it.
    """
    figure, axes = new_figure(7.4, 4.2)
    ends = []
    for (name, curve), colour in zip(curves.items(), SERIES):
        axes.plot(*zip(*curve), color=colour, linewidth=2, clip_on=False)
        axes.plot(*curve[-1], "o", color=colour, markersize=6, clip_on=False, zorder=4)
        ends.append((*curve[-1], f"{name}, {100 * curve[-1][1]:.1f} %", colour))
    axes.set_ylim(-0.03, 1)
    axes.set_xlim(left=0)
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
    axes.set_xlabel(unit)
    axes.set_ylabel(label)
    title(axes, heading, below)
    label_ends(figure, axes, ends)
    return figure


def plot_boards(puzzles: Tensor, solutions: Tensor, outputs: Mapping[str, Tensor], note: str = "") -> Figure:
    """Draw puzzles and what networks make of them: one row per board, one column per network.

    Each digit of an output is as dark as its weight. A cell whose heaviest digit is wrong is framed.

    Args:
        puzzles: `(count, n, n, n)`, one-hot; four zeros where blank.
        solutions: the same, without blanks.
        outputs: by name, the weight of each digit in each cell, `(count, n, n, n)` between 0 and 1.
        note: a line of grey text below.

    Returns:
        A matplotlib figure; `figure.savefig(path)` writes it.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    columns = {"puzzle": puzzles, **outputs}
    count = len(puzzles)
    layout = ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.1)
    figure = Figure(figsize=(2.6 * len(columns), 2.95 * count), dpi=150, layout=layout, facecolor="white")
    grid = figure.subplots(count, len(columns), squeeze=False)
    for i, row in enumerate(grid):
        for axes, (name, weights) in zip(row, columns.items()):
            wrong = weights[i].argmax(dim=-1) != solutions[i].argmax(dim=-1)
            clues = puzzles[i].sum(dim=-1) == 1
            _draw_board(axes, weights[i], clues, wrong & (name != "puzzle"))
            if name == "puzzle":
                below = f"{int(clues.sum())} clues"
            else:
                below = f"{int(wrong.sum())} wrong" if wrong.any() else "solved"
            title(axes, name, below)
    if note:
        figure.supxlabel(note, fontsize=9.5, color=COLOURS.grey)
    return figure


def _draw_board(axes: Axes, weights: Tensor, clues: Tensor, wrong: Tensor) -> None:
    """Draw one board: `weights` `(n, n, n)`; which cells are clues, and which are wrong, bool `(n, n)`."""
    from matplotlib.patches import Rectangle

    n = len(weights)
    block = round(n**0.5)
    axes.set(xlim=(-0.04, n + 0.04), ylim=(n + 0.04, -0.04), aspect="equal")
    axes.axis("off")
    for row, column in torch.cartesian_prod(torch.arange(n), torch.arange(n)).tolist():
        clue, framed = bool(clues[row, column]), bool(wrong[row, column])
        face = COLOURS.faint if clue else "white"
        axes.add_patch(Rectangle((column, row), 1, 1, facecolor=face, edgecolor=COLOURS.grey, linewidth=0.6))
        if framed:
            axes.add_patch(
                Rectangle((column + 0.06, row + 0.06), 0.88, 0.88, fill=False, edgecolor=COLOURS.warm, linewidth=2)
            )
        _write_digits(axes, weights[row, column].clamp(0, 1).tolist(), row, column, clue, framed)
    for line in range(0, n + 1, block):
        for ends in (([0, n], [line, line]), ([line, line], [0, n])):
            axes.plot(*ends, color=COLOURS.ink, linewidth=1.6, solid_capstyle="round")


def _write_digits(axes: Axes, weights: list[float], row: int, column: int, clue: bool, wrong: bool) -> None:
    """Write the heaviest digit in the middle of a cell, the others small, each in its own corner."""
    chosen = max(range(len(weights)), key=weights.__getitem__)
    for digit, weight in enumerate(weights):
        if weight < 0.03:
            continue
        if digit == chosen:
            x, y, size = 0.5, 0.5, 15
            colour = COLOURS.ink if clue else COLOURS.warm if wrong else COLOURS.main
        else:
            x, y, size = 0.17 + 0.66 * (digit % 2), 0.2 + 0.62 * (digit // 2 % 2), 8.5
            colour = COLOURS.grey
        place = (column + x, row + y, f"{digit + 1}")
        axes.text(*place, fontsize=size, alpha=weight**0.6, color=colour, ha="center", va="center")
