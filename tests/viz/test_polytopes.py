"""Vertices and edges of polygons, and their picture."""

import pytest
import torch

from implicitly.viz import PolytopeStage, plot_polytopes, vertices

# |x| <= 1, |y| <= 2, and two that cut nothing off, one of which touches a corner; rows of any length.
G = torch.tensor([[1.0, 0.0], [-2.0, 0.0], [0.0, 1.0], [0.0, -3.0], [1.0, 1.0], [1.0, 1.0]])
h = torch.tensor([1.0, 2.0, 2.0, 6.0, 3.0, 5.0])


def test_vertices_of_a_rectangle():
    corners, edges = vertices(G, h)
    expected = torch.tensor([[-1.0, -2.0], [1.0, -2.0], [1.0, 2.0], [-1.0, 2.0]], dtype=torch.float64)
    distinct = corners[(corners - corners.roll(1, 0)).norm(dim=1) > 1e-9]
    assert distinct.shape == (4, 2)
    start = int((distinct - expected[0]).norm(dim=1).argmin())
    torch.testing.assert_close(distinct.roll(-start, 0), expected)
    torch.testing.assert_close(edges, torch.tensor([4.0, 4.0, 2.0, 2.0, 0.0, 0.0], dtype=torch.float64))


def test_an_empty_set_has_no_vertices():
    corners, edges = vertices(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]), -torch.ones(4))
    assert corners.shape == (0, 2)
    assert not edges.any()


def test_stages_are_drawn_in_a_grid(tmp_path):
    pytest.importorskip("matplotlib", reason="needs the extra: implicitly[viz]")
    x = torch.randn(20, 2)
    inside = (x @ G.T <= h).all(dim=1)
    empty = -torch.ones(len(h))
    stages = [PolytopeStage(f"stage {i}", "below", G, bounds, x) for i, bounds in enumerate((empty, h))]
    figure = plot_polytopes([stages] * 3, [(G, h)] * 3, [(x, inside)] * 3, reach=2.5)
    assert len(figure.axes) == 6
    assert [len(axes.patches) for axes in figure.axes] == [1, 3] * 3  # the true one; the learned, filled and edged
    moves, inner, outer = figure.axes[0].collections
    assert len(moves.get_paths()) == 20
    assert (len(inner.get_offsets()), len(outer.get_offsets())) == (int(inside.sum()), int((~inside).sum()))
    figure.savefig(tmp_path / "polytopes.png")
