"""ode-circles: the points, the bound, what is trained, measured, drawn and written."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("lightning", reason="needs the extra: implicitly[recipes]")
pytest.importorskip("matplotlib", reason="needs the extra: implicitly[viz]")

from implicitly.recipes import ode_circles
from implicitly.recipes.ode_circles import Config, Model, fit, held_out, least_loss_of_increasing

SMALL = Config(epochs=4, points=400, batch_size=100, progress=False)


def test_the_points_are_a_disc_in_a_ring():
    x, target = held_out("circles", Config())
    radius, disc = x.norm(dim=1), target[:, 0] == 1
    assert int(disc.sum()) == len(x) // 2
    assert radius[disc].max() < 0.5 < 1.0 < radius[~disc].min() < radius[~disc].max() < 1.5
    assert not torch.equal(x, held_out("circles", Config(seed=1))[0])
    x, target = held_out("square", Config())
    assert -2 < x.min() < -1.9 < 1.9 < x.max() < 2
    assert torch.equal(target, x**2)


def test_the_bound_is_the_integral():
    # The best increasing map is 1 up to x = 1, then x^2: the mean of (x^2 - 1)^2 over -2 .. 1, times 3/4, is 0.9.
    x = torch.linspace(-2, 2, 4001).unsqueeze(1)
    assert least_loss_of_increasing(x, x**2) == pytest.approx(0.9, abs=2e-3)
    assert least_loss_of_increasing(x, x**3) == 0


@pytest.mark.parametrize("name", ["plain", "augmented", "resnet"])
def test_paths_lead_from_the_points_to_the_output(name):
    x, _ = held_out("square", SMALL)
    model = Model("square", name, SMALL)
    times, states = model.paths(x)
    assert (times[0], times[-1], len(times)) == (0.0, 1.0, len(states))
    assert torch.equal(states[0, :, :1], x)
    torch.testing.assert_close(model(x)[0], states[-1, :, :1])
    assert states.shape[2] == (2 if name == "augmented" else 1)


def test_a_plain_flow_on_the_line_keeps_the_order_whatever_its_weights():
    x = torch.linspace(-2, 2, 101).unsqueeze(1)
    for seed in range(3):
        torch.manual_seed(seed)
        model = Model("square", "plain", replace(SMALL, rtol=1e-6))
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(2)
            assert (model(x)[0].diff(dim=0) > 0).all()


def test_training_separates_the_circles_once_there_is_a_third_dimension():
    result = fit("circles", "augmented", replace(SMALL, epochs=30))
    assert result.accuracy == 1.0
    assert result.epochs < 30  # it stopped early
    assert result.forward_calls > 10 < result.backward_calls
    assert result.energy > 0


def test_training_can_be_repeated():
    config = replace(SMALL, epochs=2)
    first, second = (fit("square", "augmented", config) for _ in range(2))
    assert first.loss == second.loss
    assert fit("square", "augmented", replace(config, seed=1)).loss != first.loss


def test_the_energy_is_part_of_the_loss_of_the_circles():
    config = replace(SMALL, epochs=6)
    free, held = (fit("circles", "plain", replace(config, energy=weight)).energy for weight in (0.0, 1.0))
    assert held < 0.5 * free


def test_main_leaves_a_table_pictures_and_weights(tmp_path, capsys):
    config = replace(SMALL, epochs=1, out=tmp_path)
    results = ode_circles.main(config)
    text = capsys.readouterr().out
    assert [(r.task, r.name) for r in results] == [(t, n) for t in config.tasks for n in config.networks]
    for result in results:
        assert f"{result.loss:.4f}" in text
        weights = torch.load(tmp_path / f"{result.task}-{result.name}.pt")
        assert weights.keys() == result.model.state_dict().keys()
    assert "no increasing function" in text
    for name in ("circles.png", "square.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("wrong", [{"epochs": 0}, {"augment": 0}, {"tasks": ()}, {"networks": ("plain", "plain")}])
def test_options_that_cannot_be_meant_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Config(**wrong)
