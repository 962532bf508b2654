"""Pictures of Sudoku boards, and of how a network learns to fill them."""

import pytest

pytest.importorskip("matplotlib", reason="needs the extra: implicitly[viz]")

from implicitly.data import solutions4
from implicitly.viz import plot_boards, plot_learning
from implicitly.viz.style import COLOURS


def test_learning_draws_a_line_each_and_says_where_it_ends(tmp_path):
    curves = {"slow": [(1, 1.0), (10, 0.8)], "quick": [(1, 1.0), (5, 0.0)]}
    figure = plot_learning(curves, "title", "below", "wrong", "step")
    (axes,) = figure.axes
    lines = [line for line in axes.lines if len(line.get_xdata()) > 1]
    assert [line.get_ydata().tolist() for line in lines] == [[1.0, 0.8], [1.0, 0.0]]
    texts = [text.get_text() for text in axes.texts]
    assert {"slow, 80.0 %", "quick, 0.0 %"} <= set(texts)
    figure.savefig(tmp_path / "curves.png")


def test_boards_frame_what_is_wrong(tmp_path):
    solutions = solutions4()[[3, 100]]
    puzzles = solutions.clone()
    puzzles[:, 1:] = 0
    output = solutions.clone()
    output[0, 2, 2] = output[0, 2, 2].roll(1)
    output[1, 3, 3] = 0.6 * output[1, 3, 3] + 0.1
    figure = plot_boards(puzzles, solutions, {"network": output}, "note")
    panels = figure.axes
    assert len(panels) == 4
    framed = [[p for p in panel.patches if p.get_edgecolor() == _rgba(COLOURS.warm)] for panel in panels]
    assert [len(frames) for frames in framed] == [0, 1, 0, 0]
    assert framed[1][0].get_xy() == (2.06, 2.06)
    below = [panel.texts[-1].get_text() for panel in panels]
    assert below == ["4 clues", "1 wrong", "4 clues", "solved"]
    digits = [len(panel.texts) - 1 for panel in panels]
    assert digits == [4, 16, 4, 16 + 3]
    figure.savefig(tmp_path / "boards.png")


def _rgba(colour):
    from matplotlib.colors import to_rgba

    return to_rgba(colour)
