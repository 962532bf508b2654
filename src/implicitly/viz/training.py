"""How training went, and what the trained classifier predicts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from implicitly.viz.style import COLOURS, new_figures, title

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Points = Sequence[tuple[float, float]]  # (step, value)


def plot_training(loss: Points, accuracy: Points, solver_steps: Points) -> Figure:
    """Draw the loss, the accuracy on held-out data, and the solver's steps during training.

    Args:
        loss: `(training step, loss)`.
        accuracy: `(training step, accuracy between 0 and 1)`.
        solver_steps: `(training step, mean number of solver steps)`.

    Returns:
        A matplotlib figure; `figure.savefig(path)` writes it.
    """
    figure, (first, second, third) = new_figures(11.4, 3.6, 3)
    first.semilogy(*zip(*loss), color=COLOURS.main, linewidth=1.8)
    title(first, "Loss", "cross-entropy of the training batches")
    second.plot(*zip(*accuracy), color=COLOURS.second, linewidth=2.2, marker="o", markersize=5)
    second.set_ylim(top=1)
    second.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
    title(second, "Accuracy", f"on held-out images, in the end {100 * accuracy[-1][1]:.1f} %")
    third.plot(*zip(*solver_steps), color=COLOURS.warm, linewidth=1.8)
    third.set_ylim(bottom=0)
    title(third, "Solver steps", "that an equilibrium takes, mean of a batch")
    for axes in (first, second, third):
        axes.set_xlabel("training step")
        axes.set_xlim(left=0)
    return figure


def plot_predictions(images: Tensor, labels: Tensor, predictions: Tensor, columns: int = 12) -> Figure:
    """Draw images in a grid, each with its predicted class, and the true one where that is wrong.

    Args:
        images: `(count, height, width)` of grey values, or `(count, 3, height, width)` of colours in [0, 1].
        labels: `(count,)` int64, the true classes.
        predictions: `(count,)` int64.
        columns: images in a row.

    Returns:
        A matplotlib figure; `figure.savefig(path)` writes it.
    """
    from matplotlib.figure import Figure

    rows = -(-len(images) // columns)
    width, height = 0.8 * columns, 1.06 * rows + 0.5
    figure = Figure(figsize=(width, height), dpi=150, facecolor="white")
    grid = figure.subplots(rows, columns, squeeze=False)
    figure.subplots_adjust(
        left=0.015, right=0.985, bottom=0.14 / height, top=1 - 0.72 / height, hspace=0.38, wspace=0.15
    )
    for axes in grid.flat:
        axes.axis("off")
    for axes, image, label, prediction in zip(grid.flat, images, labels.tolist(), predictions.tolist()):
        axes.imshow((image if image.ndim == 2 else image.permute(1, 2, 0)).numpy(), cmap="Greys")
        right = label == prediction
        axes.set_title(
            f"{prediction}" if right else f"{prediction}, not {label}",
            fontsize=10,
            fontweight="normal" if right else "bold",
            color=COLOURS.grey if right else COLOURS.warm,
            pad=3,
        )
    wrong = int((labels != predictions).sum())
    figure.suptitle(
        "What it reads", x=0.015, y=1 - 0.12 / height, ha="left", va="top", fontsize=13, fontweight="bold"
    )
    figure.text(
        0.985,
        1 - 0.15 / height,
        f"{len(images)} test images, of which it misreads {wrong}",
        fontsize=9.5,
        color=COLOURS.grey,
        ha="right",
        va="top",
    )
    return figure
