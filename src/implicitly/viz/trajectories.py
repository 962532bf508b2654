"""Where a flow takes points: paths in a plane, and paths over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from implicitly.viz.style import COLOURS, SERIES, new_figures, title

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def facing(paths: Tensor, normal: Tensor, offset: float = 0.0) -> Tensor:
    """Project paths in more dimensions onto two, as seen when looking along a plane.

    Args:
        paths: `(T, N, n)`.
        normal: `(n,)`, the normal of the plane normal . y + offset = 0.

    Returns:
        `(T, N, 2)`: the signed distance to the plane, and the coordinate along the direction within the plane in
        which the points spread the most.
    """
    length = normal.norm()
    unit = normal / length
    across = paths @ unit
    within = paths - across.unsqueeze(-1) * unit
    flat = within.reshape(-1, paths.shape[-1])
    direction = torch.linalg.svd(flat - flat.mean(0), full_matrices=False).Vh[0]
    # The sign from an SVD is arbitrary; this choice is not.
    direction = direction * direction[direction.abs().argmax()].sign()
    return torch.stack([across + offset / length, within @ direction], dim=-1)


def plot_flows(
    flows: Mapping[str, Tensor], labels: Tensor, subtitles: Mapping[str, str], boundary: bool = True
) -> Figure:
    """Draw paths in a plane, one panel per flow: thin lines with a dot at the end, coloured by class.

    Args:
        flows: by title, `(T, N, 2)`; with T = 1 only the dots are drawn.
        labels: `(N,)` int64 classes.
        subtitles: by title, a line of grey text.
        boundary: draw the line where the first coordinate is 0, in panels with paths.

    Returns:
        A matplotlib figure; `figure.savefig(path)` writes it.
    """
    figure, panels = new_figures(3.5 * len(flows), 4.1, len(flows))
    for axes, (name, paths) in zip(panels, flows.items()):
        axes.set_aspect("equal", adjustable="datalim")
        axes.margins(0.08)
        if boundary and len(paths) > 1:
            axes.axvline(0, color="black", linewidth=1, linestyle=(0, (4, 3)))
        for label in labels.unique().tolist():
            _draw_paths(axes, paths[:, labels == label], SERIES[label])
        title(axes, name, subtitles.get(name, ""))
    return figure


def _draw_paths(axes: Axes, paths: Tensor, colour: str) -> None:
    """Draw `paths` `(T, N, 2)` and their ends."""
    from matplotlib.collections import LineCollection

    if len(paths) > 1:
        lines = LineCollection(list(paths.transpose(0, 1).numpy()), colors=colour, linewidths=0.6, alpha=0.35)
        axes.add_collection(lines)
    axes.scatter(*paths[-1].T.numpy(), s=11, color=colour, linewidth=0, zorder=3)


def plot_trajectories(
    trajectories: Mapping[str, tuple[Sequence[float], Tensor]],
    targets: Tensor,
    subtitles: Mapping[str, str],
    label: str = "y(t)",
) -> Figure:
    """Draw one-dimensional states over time, one panel per flow, coloured by where they start.

    Args:
        trajectories: by title, the times `(T,)` and the states `(T, N)`.
        targets: `(N,)`, where they should end; drawn as grey rings.
        subtitles: by title, a line of grey text.
        label: label of the vertical axis.

    Returns:
        A matplotlib figure; `figure.savefig(path)` writes it.
    """
    from matplotlib.colors import LinearSegmentedColormap

    colours = LinearSegmentedColormap.from_list("start", [COLOURS.main, "#b9bcc2", COLOURS.warm])
    figure, panels = new_figures(3.8 * len(trajectories), 4.1, len(trajectories))
    for axes, (name, (times, states)) in zip(panels, trajectories.items()):
        start = states[0]
        place = (start - start.min()) / (start.max() - start.min())
        for i in range(states.shape[1]):
            axes.plot(times, states[:, i], color=colours(float(place[i])), linewidth=1.5)
        axes.scatter([times[-1]] * len(targets), targets, s=26, facecolor="none", edgecolor=COLOURS.grey, zorder=3)
        axes.set_xlabel("time")
        title(axes, name, subtitles.get(name, ""))
    panels[0].set_ylabel(label)
    for axes in panels[1:]:
        axes.sharey(panels[0])
    return figure
