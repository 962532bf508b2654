"""ode-easy: what is trained, how it is tested, drawn and written."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("lightning", reason="needs the extra: implicitly[recipes]")
pytest.importorskip("matplotlib", reason="needs the extra: implicitly[viz]")

import implicitly as im
from implicitly.recipes import ode_easy
from implicitly.recipes.ode_easy import Config, Training, build, evaluate, fit

SMALL = Config(steps=30, points=16, width=8, dt=0.25, tolerance=1e-6, order=2, weight=0.1, progress=False)


def test_the_penalty_saves_calls_of_f():
    config = replace(SMALL, steps=40, gain=4.0, weight=0.03)
    free, penalised = (fit(name, config) for name in ("free", "penalised"))
    assert penalised.penalty < 0.7 * free.penalty
    assert penalised.calls < 0.9 * free.calls


def test_training_lowers_the_loss():
    torch.manual_seed(0)
    before = evaluate("free", build(SMALL), 0, SMALL)
    assert fit("free", SMALL).loss < 0.2 * before.loss


def test_training_ends_at_the_target():
    assert fit("free", replace(SMALL, steps=5)).steps == 5
    result = fit("free", replace(SMALL, target=0.1, steps=200))
    assert result.steps < 200
    assert result.loss < 0.15


def test_training_can_be_repeated():
    config = replace(SMALL, steps=3)
    first, again, other = (fit("penalised", replace(config, seed=seed)).loss for seed in (0, 0, 1))
    assert first == again != other


def test_both_start_from_the_same_weights():
    models = []
    for name in ("free", "penalised"):
        torch.manual_seed(0)
        models.append(Training(name, SMALL))
    for ours, theirs in zip(*(model.parameters() for model in models)):
        assert torch.equal(ours, theirs)
    assert [len(model.flow.regularisers) for model in models] == [0, 1]


def test_the_test_is_exact():
    class Known(torch.nn.Module):
        """y(1) = y(0) + 1, whose second derivative is -2."""

        def forward(self, t, y):
            return 2 - 2 * t + 0 * y

    result = evaluate("free", im.nn.NeuralODE(Known()), 7, replace(SMALL, points=1000))
    assert result.steps == 7
    assert result.penalty == pytest.approx(4)
    # The mean of (x + 1 - x^3)^2 over [-1, 1].
    assert result.loss == pytest.approx(1 + 1 / 3 - 2 / 5 + 1 / 7, rel=1e-4)
    assert result.calls == result.flow.solution.evaluations


def test_main_leaves_a_table_a_picture_and_weights(tmp_path, capsys):
    results = ode_easy.main(replace(SMALL, steps=2, out=tmp_path))
    printed = capsys.readouterr().out
    for result in results:
        assert f"{result.name} " in printed
        assert f"{result.loss:.2e}" in printed
        weights = torch.load(tmp_path / f"{result.name}.pt", weights_only=True)
        assert weights.keys() == result.flow.state_dict().keys()
    assert (tmp_path / "trajectories.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"order": 0}, "order must be at least 1; got 0"),
        ({"weight": 0.0}, "weight must be positive; got 0.0"),
        ({"target": -1.0}, "target must be positive"),
        ({"names": ()}, "names must contain at least one name"),
        ({"names": ("free", "free")}, "none twice"),
    ],
)
def test_bad_options_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Config(**changes)
