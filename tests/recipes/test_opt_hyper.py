"""opt-hyper: what is learned, what it costs, how it is drawn and written."""

import re
from dataclasses import replace

import pytest
import torch

pytest.importorskip("rich", reason="needs the extra: implicitly[recipes]")
pytest.importorskip("sklearn", reason="needs the extra: implicitly[recipes]")
pytest.importorskip("matplotlib", reason="needs the extra: implicitly[viz]")

from implicitly.recipes import opt_hyper
from implicitly.recipes.opt_hyper import (
    LEARNED,
    Config,
    Costs,
    Hyper,
    first_weights,
    fixed,
    inner_loss,
    learn,
    load,
    network,
    separation,
    train,
)

SMALL = Config(
    seeds=1,
    clean=100,
    held_out=30,
    hidden=6,
    grid=(1e-3, 1e-2, 2),
    steps=40,
    outer_steps=6,
    inner_steps=10,
    weight_rate=0.5,
    progress=False,
)
DATA, START = load(0, SMALL), first_weights(0, SMALL)


def test_labels_are_wrong_where_it_says_so_and_only_in_training():
    clean = load(0, replace(SMALL, noise=0.0))
    assert not clean.wrong.any()
    assert torch.equal(clean.train[0], DATA.train[0])
    assert torch.equal(clean.train[1] != DATA.train[1], DATA.wrong)
    assert 0.3 < DATA.wrong.float().mean() < 0.5
    assert [len(part[1]) for part in (DATA.train, DATA.validation, DATA.held_out)] == [1337, 70, 30]
    assert torch.equal(clean.validation[1], DATA.validation[1])
    assert not torch.equal(load(1, SMALL).train[0], DATA.train[0])


def test_the_inner_loss_is_the_weighted_one_with_its_penalty():
    hyper = Hyper.start(START, 2, 0.5)
    hyper.weight[:] = torch.tensor([30.0, 0.0])  # 2 and 1
    x, y = DATA.train[0][:2], DATA.train[1][:2]
    losses = -network(START, x).log_softmax(1)[torch.arange(2), y]
    expected = (2 * losses[0] + losses[1]) / 2 + 0.25 * sum(v.square().sum() for v in START.values())
    torch.testing.assert_close(inner_loss(START, hyper.decay, hyper.weight, x, y), expected)


def test_weights_learn_which_labels_are_wrong():
    outcome = learn(LEARNED["weights"], DATA, START, SMALL)
    assert separation(outcome, DATA.wrong) > 0.8
    assert outcome.test > fixed(SMALL.decay, DATA, START, SMALL).test
    assert outcome.costs.products > SMALL.outer_steps
    assert outcome.costs.gradients > SMALL.outer_steps
    for decay in outcome.hyper.decay.values():  # not among what is learned
        assert (decay == decay.flatten()[0]).all()


def test_decays_learn_apart_from_each_other():
    outcome = learn(LEARNED["decays"], DATA, START, SMALL)
    assert (outcome.hyper.weight == 0).all()
    assert outcome.hyper.decay["weight2"].std() > 0


def test_the_step_that_held_out_images_like_best_is_kept():
    one = learn(LEARNED["both"], DATA, START, replace(SMALL, outer_steps=1))
    assert (one.hyper.weight == 0).all()  # the first training, before any step
    assert one.test == one.path[0]


def test_training_counts_its_gradients_and_lowers_the_loss():
    costs, hyper = Costs(), Hyper.start(START, len(DATA.wrong), 1e-2)
    w = train(START, DATA.train, hyper, 5, costs)
    assert 5 <= costs.gradients <= 10
    losses = [float(inner_loss(v, hyper.decay, hyper.weight, *DATA.train)) for v in (START, w)]
    assert losses[1] < losses[0]


def test_main_leaves_a_table_and_a_picture_and_can_be_repeated(tmp_path, capsys):
    config = replace(SMALL, seeds=2, outer_steps=2, steps=10, inner_steps=3, out=tmp_path)
    (first, second) = opt_hyper.main(config)
    printed = capsys.readouterr().out
    for name in ("no tuning", "grid", "clean only", *LEARNED):
        assert f"│ {name} " in printed
    assert re.search(r"\d+ of 12 linear solves did not reach their tolerance", printed)
    assert "grid" in (tmp_path / "table.txt").read_text(encoding="utf-8")
    assert (tmp_path / "hyper.png").read_bytes().startswith(b"\x89PNG")
    again = opt_hyper.fit(1, config)
    assert {k: v.test for k, v in again.items()} == {k: v.test for k, v in second.items()}
    assert again["both"].path == second["both"].path != first["both"].path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": 0}, "seeds must be at least 1; got 0"),
        ({"decay": 0.0}, "decay must be positive; got 0.0"),
        ({"noise": 1.0}, "noise must be at least 0 and below 1; got 1.0"),
        ({"held_out": 200}, "clean must be above held_out = 200 and below 1400; got 200"),
        ({"grid": (1e-1, 1e-4, 3)}, "grid must be a smallest decay > 0, a largest decay"),
        ({"damping": -1.0}, "damping must be at least 0; got -1.0"),
    ],
)
def test_bad_options_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Config(**changes)
