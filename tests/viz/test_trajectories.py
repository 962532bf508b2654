"""Pictures of flows: the view along a plane, and what is drawn."""

import pytest
import torch

from implicitly.viz import facing, plot_flows, plot_trajectories


def test_facing_gives_distances_to_the_plane_and_the_widest_direction_in_it():
    paths = torch.randn(7, 50, 3, dtype=torch.float64) * torch.tensor([1.0, 5.0, 0.1], dtype=torch.float64)
    seen = facing(paths, torch.tensor([2.0, 0.0, 0.0], dtype=torch.float64), offset=1.0)
    torch.testing.assert_close(seen[..., 0], paths[..., 0] + 0.5)
    torch.testing.assert_close(seen[..., 1], paths[..., 1], rtol=0, atol=0.05)


def test_facing_only_turns_a_plane():
    paths = torch.randn(4, 9, 2, dtype=torch.float64)
    seen = facing(paths, torch.tensor([1.0, 2.0], dtype=torch.float64))
    torch.testing.assert_close(torch.cdist(seen, seen), torch.cdist(paths, paths))


def test_flows_draw_every_path_and_end(tmp_path):
    pytest.importorskip("matplotlib", reason="needs the extra: implicitly[viz]")
    paths = torch.rand(5, 8, 2)
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1])
    figure = plot_flows({"start": paths[:1], "flow": paths}, labels, {"flow": "below"})
    start, flow = figure.axes
    assert [len(c.get_offsets()) for c in start.collections] == [3, 5]
    lines = [c for c in flow.collections if len(c.get_paths()) > 1]
    assert [len(c.get_paths()) for c in lines] == [3, 5]
    assert (len(start.lines), len(flow.lines)) == (0, 1)  # the boundary
    figure.savefig(tmp_path / "flows.png")


def test_trajectories_draw_a_line_each_and_share_their_scale(tmp_path):
    pytest.importorskip("matplotlib", reason="needs the extra: implicitly[viz]")
    states = torch.tensor([[-1.0, 0.0, 2.0], [0.0, 1.0, 8.0]])
    figure = plot_trajectories(
        {"a": ([0.0, 1.0], states), "b": ([0.0, 1.0], states / 2)}, torch.tensor([1.0, 0.0, 4.0]), {"a": "x"}
    )
    first, second = figure.axes
    assert [line.get_ydata().tolist() for line in first.lines] == states.T.tolist()
    assert first.get_ylim() == second.get_ylim()
    assert len({line.get_color() for line in first.lines}) == 3
    figure.savefig(tmp_path / "trajectories.png")
