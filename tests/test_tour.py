"""A shorter tour keeps the promises of the long one, and fails where one is broken."""

import re

import pytest
import torch

pytest.importorskip("lightning", reason="needs the extra: implicitly[recipes]")
pytest.importorskip("matplotlib", reason="needs the extra: implicitly[viz]")

from implicitly import tour


@pytest.fixture(autouse=True)
def shorter(monkeypatch):
    monkeypatch.setattr(tour, "MEMORY_STEPS", (1, 30, 60))
    monkeypatch.setattr(tour, "FLOW_EPOCHS", 8)
    monkeypatch.setattr(tour, "FLOW_ERROR", 0.5)
    monkeypatch.setattr(tour, "POLYTOPE_EPOCHS", 8)
    monkeypatch.setattr(tour, "POLYTOPE_OVERLAP", 0.7)


@pytest.mark.slow
def test_tour_leaves_what_its_summary_names(tmp_path, capsys):
    status = tour.main(tour.Config(out=tmp_path, epochs=1, accuracy=0.7))
    text = capsys.readouterr().out
    assert status == 0, text
    for name in (
        "training.png",
        "digits.png",
        "solvers.png",
        "memory.png",
        "gradient.png",
        "ode/circles.png",
        "ode/square.png",
        "opt/polytopes.png",
    ):
        assert name in text
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / name).stat().st_size > 10_000
    assert (tmp_path / "deq" / "last.ckpt").is_file()
    assert list((tmp_path / "deq" / "logs").glob("events.out.tfevents.*"))
    assert text.count(" ok ") == 7
    unrolled = float(re.search(r"memory when unrolled\D+(\d+)", text)[1])
    implicit = float(re.search(r"memory when implicit\D+([\d.]+) x forward, flat", text)[1])
    assert unrolled > 15
    assert implicit < 5


@pytest.mark.slow
def test_tour_fails_where_a_promise_is_broken(tmp_path, capsys, monkeypatch):
    from rich.console import Console

    journey = tour.Journey(Console(), tmp_path)
    journey.find("test accuracy on the digits", "12.0 %, below 97 %", kept=False)
    assert tour.summarise(journey, 1.0) == 1
    assert "The tour failed: test accuracy on the digits: 12.0 %, below 97 %." in capsys.readouterr().out

    # A derivative that is wrong by a millionth is found out.
    original = tour.TanhLayer.forward

    def slightly_wrong(self, z, x):
        y = original(self, z, x)
        return y + 1e-6 * (self.linear.weight.sum() - self.linear.weight.sum().detach())

    monkeypatch.setattr(tour.TanhLayer, "forward", slightly_wrong)
    journey = tour.Journey(Console(), tmp_path)
    tour.check(journey)
    assert [kept for _, _, kept in journey.findings] == [False]


def test_tour_fails_where_trajectories_cross_or_do_not(tmp_path, monkeypatch):
    from rich.console import Console

    from implicitly.recipes import ode_circles

    def kept(plain, augmented, accuracy):
        losses = {"plain": plain, "augmented": augmented}
        results = [
            ode_circles.Result(task, name, None, 1, losses[name], accuracy, 1.0, 20, 19)
            for task in ("circles", "square")
            for name in losses
        ]
        monkeypatch.setattr(ode_circles, "run", lambda config: results)
        monkeypatch.setattr(ode_circles, "results_table", lambda *_: "")
        journey = tour.Journey(Console(), tmp_path)
        tour.flow(journey)
        return [kept for _, _, kept in journey.findings]

    assert kept(1.4, 0.03, 1.0) == [True, True]
    assert kept(1.4, 0.03, 0.96) == [False, True]
    assert kept(1.4, 0.60, 1.0) == [True, False]
    assert kept(0.8, 0.03, 1.0) == [True, False]  # below what an increasing map can reach


def test_tour_fails_where_a_polygon_is_not_found(tmp_path, monkeypatch):
    from rich.console import Console

    from implicitly.recipes import opt_polytope

    def kept(*overlaps):
        results = [opt_polytope.Result(polygon, None, iou, 1.0, 3, 1.0) for polygon, iou in zip((3, 5), overlaps)]
        monkeypatch.setattr(opt_polytope, "run", lambda config: results)
        journey = tour.Journey(Console(), tmp_path)
        tour.project(journey)
        return [kept for _, _, kept in journey.findings]

    assert kept(0.8, 0.9) == [True]
    assert kept(0.8, 0.6) == [False]
    assert kept(float("nan"), 0.9) == [False]


def test_central_differences_of_a_known_function():
    from rich.console import Console

    parameter = torch.nn.Parameter(torch.tensor([[1.0, -2.0], [0.5, 3.0]], dtype=torch.float64))
    found = tour.central_differences(lambda: (parameter**3).sum(), parameter, 1e-5, Console())
    torch.testing.assert_close(found, 3 * parameter.detach() ** 2, rtol=1e-9, atol=0)
    assert parameter[0, 1].item() == -2.0  # left as it was
