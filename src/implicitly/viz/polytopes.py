"""Pictures of how convex polygons are learned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from implicitly.viz.style import COLOURS, tidy, title

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class PolytopeStage(NamedTuple):
    """One panel: the polytope {z : G z <= h} of the plane at one time during its training."""

    title: str
    below: str  # a line in grey
    G: Tensor  # (m, 2)
    h: Tensor  # (m,)
    projections: Tensor  # (N, 2), where it maps the points of the picture


def vertices(G: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """Vertices of the bounded polygon {z : G z <= h}, in counter-clockwise order.

    Args:
        G: `(m, 2)`, no row of zeros.
        h: `(m,)`.

    Returns:
        The vertices `(k, 2)`, where k is 0 for an empty set; and for each row of G the length of its edge, `(m,)`,
        0 if it touches at most a vertex. Both in float64.
    """
    length = G.norm(dim=1)
    G, h = (G / length.unsqueeze(1)).double(), (h / length).double()
    m = len(G)
    first, second = torch.triu_indices(m, m, 1)
    determinant = G[first, 0] * G[second, 1] - G[first, 1] * G[second, 0]
    crossing = determinant.abs() > 1e-12
    first, second, determinant = first[crossing], second[crossing], determinant[crossing]
    x = (h[first] * G[second, 1] - h[second] * G[first, 1]) / determinant
    y = (G[first, 0] * h[second] - G[second, 0] * h[first]) / determinant
    corners = torch.stack([x, y], dim=1)
    inside = (corners @ G.T <= h + 1e-9).all(dim=1)
    corners, first, second = corners[inside], first[inside], second[inside]
    edges = torch.zeros(m, dtype=torch.float64)
    for i in range(m):
        own = corners[(first == i) | (second == i)]
        if len(own):
            along = own @ torch.stack([-G[i, 1], G[i, 0]])
            edges[i] = along.max() - along.min()
    centred = corners - corners.mean(dim=0)
    return corners[torch.atan2(centred[:, 1], centred[:, 0]).argsort()], edges


def plot_polytopes(
    rows: Sequence[Sequence[PolytopeStage]],
    truths: Sequence[tuple[Tensor, Tensor]],
    points: Sequence[tuple[Tensor, Tensor]],
    reach: float,
) -> Figure:
    """Draw how polygons are learned: one row per polygon, one panel per stage.

    The learned polygon is filled, the true one dashed; a faint line leads from each point to its projection.

    Args:
        rows: the stages of each polygon, the same number in each row.
        truths: `G` and `h` of each true polygon.
        points: for each polygon, points `(N, 2)`, and which lie inside, bool `(N,)`.
        reach: the panels show -reach to reach.

    Returns:
        A matplotlib figure; `figure.savefig(path)` writes it.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    columns = len(rows[0])
    layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.1)
    size = (2.75 * columns, 3.25 * len(rows))
    figure = Figure(figsize=size, dpi=150, layout=layout, facecolor="white")
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for panels, stages, truth, (x, inside) in zip(grid, rows, truths, points):
        for axes, stage in zip(panels, stages):
            tidy(axes)
            axes.grid(visible=False)
            axes.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal", xticks=[], yticks=[])
            _draw_stage(axes, stage, truth, x, inside)
            title(axes, stage.title, stage.below)
    note = (
        "blue: inside; orange: outside; dashed: the true polygon; a line leads from each point to its projection"
    )
    figure.supxlabel(note, fontsize=9.5, color=COLOURS.grey)
    return figure


def _draw_stage(axes: Axes, stage: PolytopeStage, truth: tuple[Tensor, Tensor], x: Tensor, inside: Tensor) -> None:
    from matplotlib.collections import LineCollection
    from matplotlib.patches import Polygon

    moves = torch.stack([x, stage.projections.to(x)], dim=1)
    axes.add_collection(LineCollection(list(moves.numpy()), colors=COLOURS.grey, linewidths=0.5, alpha=0.45))
    for side, colour in ((inside, COLOURS.main), (~inside, COLOURS.warm)):
        axes.scatter(*x[side].T.numpy(), s=7, color=colour, linewidth=0, zorder=3)
    learned, _ = vertices(stage.G, stage.h)
    if len(learned):
        axes.add_patch(Polygon(learned.numpy(), facecolor=COLOURS.main, alpha=0.16, linewidth=0))
        axes.add_patch(Polygon(learned.numpy(), fill=False, edgecolor=COLOURS.main, linewidth=2, zorder=4))
    true, _ = vertices(*truth)
    dashes = (0, (3, 2))
    axes.add_patch(
        Polygon(true.numpy(), fill=False, edgecolor=COLOURS.ink, linewidth=1.3, linestyle=dashes, zorder=5)
    )
