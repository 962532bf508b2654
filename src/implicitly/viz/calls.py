"""How often a solver calls f: during training, and at other tolerances afterwards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from implicitly.viz.style import COLOURS, SERIES, label_ends, new_figure, new_figures, title

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_calls(calls: Mapping[str, Sequence[float]], window: int, subtitle: str = "") -> Figure:
    """Draw the calls of f in each training step, faint, and their running mean, bold.

    Args:
        calls: by name, such as "forward", the calls in each training step from the first on.
        window: number of previous steps in a mean; at the start, as many as there are.
        subtitle: a line of grey text.

    Returns:
        A matplotlib figure; `figure.savefig(path)` writes it.

    Raises:
        ValueError: a line or the window has no steps.
    """
    if window < 1 or not all(len(values) for values in calls.values()):
        raise ValueError(
            f"window must be at least 1, and each line must have at least one step; got window={window}"
        )
    figure, axes = new_figure(7.2, 4.2)
    ends = []
    for (name, values), colour in zip(calls.items(), SERIES):
        steps = range(1, len(values) + 1)
        recent = [values[max(0, step - window) : step] for step in steps]
        means = [sum(part) / len(part) for part in recent]
        axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.3)
        axes.plot(steps, means, color=colour, linewidth=2.2)
        ends.append((steps[-1], means[-1], f"{name} {means[-1]:.1f}", colour))
    axes.set_xlim(left=0, right=max(end[0] for end in ends))
    axes.set_ylim(0, 1.15 * max(max(values) for values in calls.values()))
    label_ends(figure, axes, ends)
    axes.set_xlabel("training step")
    axes.set_ylabel("calls of f")
    title(axes, "Calls of f in a training step", subtitle)
    return figure


def plot_tolerances(
    tolerances: Sequence[float], errors: Sequence[float], calls: Sequence[float], trained: float
) -> Figure:
    """Draw the test error and the calls of f against the tolerance of the solver.

    Args:
        tolerances: of the solver, ascending.
        errors: at each, the share of wrong answers, between 0 and 1.
        calls: at each, the mean number of calls of f in a forward pass.
        trained: the tolerance in training; marked.

    Returns:
        A matplotlib figure; `figure.savefig(path)` writes it.

    Raises:
        ValueError: the three are not equally long.
    """
    if not len(tolerances) == len(errors) == len(calls):
        raise ValueError(
            f"tolerances, errors and calls must have equal lengths; got {len(tolerances)}, {len(errors)} and "
            f"{len(calls)}"
        )
    figure, (first, second) = new_figures(9.6, 4.0, 2)
    _against_tolerance(first, tolerances, errors, COLOURS.main, trained)
    first.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
    first.set_ylim(0, max(1.25 * max(errors), 0.01))
    title(first, "Test error", "of the same weights, solved less and less exactly")
    _against_tolerance(second, tolerances, calls, COLOURS.warm, trained)
    second.set_ylim(0, 1.25 * max(calls))
    title(second, "Calls of f", "in a forward pass, mean over test batches")
    return figure


def _against_tolerance(
    axes: Axes, tolerances: Sequence[float], values: Sequence[float], colour: str, trained: float
) -> None:
    axes.set_xscale("log")
    axes.axvline(trained, color=COLOURS.grey, linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate(
        "training",
        (trained, 0),
        xytext=(5, 6),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        color=COLOURS.grey,
        fontsize=9,
    )
    axes.plot(tolerances, values, color=colour, marker="o", markersize=5, linewidth=2.2, clip_on=False)
    axes.set_xlabel("tolerance of the solver")
