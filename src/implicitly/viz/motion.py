"""Motions of mechanical systems: the drift of their energy, and their phase portraits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from implicitly.viz.style import COLOURS, SERIES, label_ends, new_figures, title

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_energy(
    times: Mapping[str, Tensor], errors: Mapping[str, Mapping[str, Tensor]], horizon: Mapping[str, float]
) -> Figure:
    """Draw how far energies have drifted by each time, one panel per system, one line per vector field.

    Args:
        times: for each system, `(T,)`.
        errors: for each system and each field, `(T,)`: the error of the energy relative to its scale, as the
            median of several motions. The line shows the largest so far, and ends where that is no longer finite.
        horizon: for each system, the length of the motions that were seen in training.

    Returns:
        A matplotlib figure; `figure.savefig(path)` writes it.
    """
    figure, panels = new_figures(5.4 * len(errors), 4.2, len(errors))
    so_far = {
        system: {name: e.cummax(0).values for name, e in fields.items()} for system, fields in errors.items()
    }
    lines = [e[e.isfinite() & (e > 0)] for fields in so_far.values() for e in fields.values()]
    lines = [line for line in lines if len(line)]
    # The first moments, before any field has drifted, would take up most of the height.
    bottom, top = min(float(line[len(line) // 50]) for line in lines), max(float(line[-1]) for line in lines)
    for axes, (system, fields) in zip(panels, so_far.items()):
        ends = []
        part = times[system] / horizon[system]
        for (name, error), colour in zip(fields.items(), (COLOURS.grey, *SERIES)):
            shown = error.isfinite() & (error > 0)
            if not shown.any():
                continue
            axes.semilogy(part[shown], error[shown], color=colour, linewidth=2)
            ends.append((float(part[shown][-1]), float(error[shown][-1]), name, colour))
        axes.set_xlim(0, float(part[-1]))
        axes.set_ylim(bottom / 2, 2 * top)
        label_ends(figure, axes, ends)
        axes.set_xlabel("time, in lengths of a training motion")
        title(axes, system.capitalize(), "largest relative error of the energy so far, median")
    return figure


def plot_phase(motions: Mapping[str, Tensor], name: str) -> Figure:
    """Draw the phase portraits of a system with one angle, one panel per vector field.

    Args:
        motions: for each field, `(T, B, 2)`: the angle and its velocity; NaN where a motion broke off.
        name: name of the system.

    Returns:
        A matplotlib figure; `figure.savefig(path)` writes it.
    """
    figure, panels = new_figures(3.6 * len(motions), 4.0, len(motions))
    first = next(iter(motions.values()))
    reach = 1.6 * float(first[..., 1].abs().max())
    for axes, (field, motion) in zip(panels, motions.items()):
        angle = torch.atan2(motion[..., 0].sin(), motion[..., 0].cos())
        for i, colour in zip(range(motion.shape[1]), SERIES * motion.shape[1]):
            axes.plot(angle[:, i], motion[:, i, 1], ".", markersize=1.5, color=colour)
            axes.plot(angle[0, i], motion[0, i, 1], "o", markersize=5, color=colour, markeredgecolor="white")
        axes.set_xlim(-torch.pi, torch.pi)
        axes.set_xticks([-torch.pi, 0, torch.pi], ["-π", "0", "π"])
        axes.set_ylim(-reach, reach)
        axes.set_xlabel("angle")
        title(axes, field.capitalize(), f"the {name}, {motion.shape[1]} starts")
    panels[0].set_ylabel("velocity")
    return figure
