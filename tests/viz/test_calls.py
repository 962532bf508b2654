"""Pictures of calls: what is drawn is what was given."""

import pytest

pytest.importorskip("matplotlib", reason="needs the extra: implicitly[viz]")

from implicitly.viz import plot_calls, plot_tolerances


def test_calls_are_drawn_with_the_mean_of_the_steps_before():
    (axes,) = plot_calls({"forward": [8, 14, 20], "backward": [7, 7, 7]}, window=2).axes
    each, mean, _, flat = (line.get_ydata().tolist() for line in axes.lines)
    assert each == [8, 14, 20]
    assert mean == [8, 11, 17]
    assert flat == [7, 7, 7]
    assert {text.get_text() for text in axes.texts} >= {"forward 17.0", "backward 7.0"}


def test_errors_and_calls_are_drawn_against_the_tolerance():
    figure = plot_tolerances([1e-3, 1e-2, 1e-1], [0.01, 0.02, 0.05], [26.0, 20.0, 14.0], trained=1e-2)
    for axes, values in zip(figure.axes, ([0.01, 0.02, 0.05], [26.0, 20.0, 14.0])):
        marked, line = axes.lines
        assert set(marked.get_xdata()) == {1e-2}
        assert line.get_xdata().tolist() == [1e-3, 1e-2, 1e-1]
        assert line.get_ydata().tolist() == values


def test_lines_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="equal lengths; got 2, 1 and 2"):
        plot_tolerances([0.1, 1.0], [0.5], [8.0, 8.0], trained=0.1)
    with pytest.raises(ValueError, match="window must be at least 1"):
        plot_calls({"forward": [1]}, window=0)
    with pytest.raises(ValueError, match="each line must have at least one step"):
        plot_calls({"forward": []}, window=1)
