"""opt-tv: the signals, what is learned, the table and the picture."""

from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("lightning", reason="needs the extra: implicitly[recipes]")
pytest.importorskip("matplotlib", reason="needs the extra: implicitly[viz]")

from implicitly.recipes import opt_tv
from implicitly.recipes.opt_tv import FLOW, Config, Denoiser, best_weight, fit, signals

SMALL = Config(days=32, epochs=4, batch_size=8, channels=4, learning_rate=3e-2, progress=False)


def test_made_up_days_are_constant_between_few_jumps():
    train, test = signals(SMALL)
    noisy, clean = test.tensors
    assert noisy.shape == clean.shape == (32, 96)
    assert opt_tv.jumps_of(clean) < 9
    assert float((noisy - clean).std()) == pytest.approx(SMALL.noise, rel=0.1)
    assert not torch.equal(train.tensors[1], clean)
    assert torch.equal(signals(SMALL)[0].tensors[0], train.tensors[0])


def test_the_best_single_weight_is_best():
    train, test = signals(SMALL)
    weight = best_weight(train)
    errors = [opt_tv.evaluate(Denoiser("one weight", w * weight, SMALL), train, test) for w in (0.8, 1.0, 1.25)]
    assert min(errors, key=lambda result: result.train_error) is errors[1]
    assert errors[1].train_error < 0.4


@pytest.mark.parametrize("name", ["per place", "network"])
def test_training_through_the_solution_improves_on_one_weight(name: opt_tv.Name):
    train, test = signals(SMALL)
    weight = best_weight(train)
    single, learned = (fit(n, train, test, weight, SMALL) for n in ("one weight", name))
    assert learned.train_error < 0.98 * single.train_error
    weights = learned.model.weights(test.tensors[0])
    assert weights.shape == (32, 95)
    assert float(weights.detach().std()) > 0.01 * weight


def test_all_start_at_the_best_single_weight():
    noisy = signals(SMALL)[1].tensors[0]
    plain, *learned = (Denoiser(name, 0.5, SMALL)(noisy) for name in ("one weight", "per place", "network"))
    for x in learned:
        torch.testing.assert_close(x, plain)
    assert torch.equal(Denoiser("convolution", 0.5, SMALL)(noisy), noisy)


def test_training_can_be_repeated():
    config = replace(SMALL, epochs=1)
    train, test = signals(config)
    first, second = (fit("network", train, test, 0.5, config).test_error for _ in range(2))
    assert first == second
    assert fit("network", train, test, 0.5, replace(config, seed=1)).test_error != first


def test_main_leaves_a_table_a_picture_and_weights(tmp_path, capsys):
    results = opt_tv.main(replace(SMALL, epochs=1, out=tmp_path))
    text = capsys.readouterr().out
    assert [r.model.name for r in results] == list(SMALL.models)
    for result in results:
        assert f"{100 * result.test_error:.1f} %" in text
        assert (tmp_path / f"{result.model.name.replace(' ', '-')}.pt").exists()
    assert (tmp_path / "day.png").read_bytes().startswith(b"\x89PNG")


def test_days_of_a_building_are_read(tmp_path, monkeypatch):
    monkeypatch.delenv("IMPLICITLY_DATA", raising=False)
    with pytest.raises(ValueError, match="data has no effect: the days of the signal 'steps' are synthetic"):
        replace(SMALL, data=tmp_path)
    with pytest.raises(FileNotFoundError, match="--data"):
        signals(replace(SMALL, signal="hvac"))
    with pytest.raises(FileNotFoundError, match=r"there is no file .*hvac/Sim-TMY2.npz; give the folder"):
        signals(replace(SMALL, signal="hvac", data=tmp_path))
    (tmp_path / "hvac").mkdir()
    values = np.random.default_rng(0).normal(size=(3 * 96 + 1, 2))
    for file in opt_tv.FILES:
        np.savez(tmp_path / "hvac" / file, columns=np.array(["other", FLOW]), values=values)
    monkeypatch.setenv("IMPLICITLY_DATA", str(tmp_path))
    clean = signals(replace(SMALL, signal="hvac"))[0].tensors[1]
    expected = torch.from_numpy(values[:288, 1]).float().view(3, 96)
    torch.testing.assert_close(clean, (expected - expected.mean()) / expected.std())


@pytest.mark.parametrize("wrong", [{"epochs": 0}, {"noise": 0.0}, {"models": ()}, {"learning_rate": -1.0}])
def test_options_that_cannot_be_meant_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Config(**wrong)
