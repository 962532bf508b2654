"""ode-mnist: the networks, their calls, memory and tolerances; what a run leaves, and how it is resumed."""

from dataclasses import replace

import pytest
import torch
from torch.utils.data import TensorDataset

import implicitly as im

pytest.importorskip("lightning", reason="needs the extra: implicitly[recipes]")
pytest.importorskip("matplotlib", reason="needs the extra: implicitly[viz]")

from implicitly.cli import main as command
from implicitly.data import ImageData, digits
from implicitly.recipes._checkpoints import BEST, LAST, CheckpointError
from implicitly.recipes._classification import count_parameters
from implicitly.recipes.ode_mnist import Config, Training, build, fit, loosen, main, memory_against_depth

SMALL = Config(
    channels=8,
    downsamplings=2,
    groups=2,
    blocks=2,
    epochs=2,
    batch_size=256,
    learning_rate=2e-2,
    tolerances=(1e-4, 1.0),
    depths=(1, 4),
    accelerator="cpu",
    progress=False,
)


@pytest.fixture(scope="module")
def data():
    return digits()


def blank(size):
    empty = TensorDataset(torch.zeros(0, 1, size, size), torch.zeros(0, dtype=torch.int64))
    return ImageData(empty, empty, 1, size, size, classes=10, name="blank")


def weights(result):
    return torch.cat([p.detach().flatten() for p in result.training.model.parameters()])


# --- The networks -------------------------------------------------------------------------------------------


def test_networks_have_the_size_of_the_paper():
    config = Config(dataset="mnist")
    counts = {name: count_parameters(build(name, config, blank(28))) for name in config.models}
    assert 0.2e6 < counts["odenet"] < 0.22e6
    assert 0.55e6 < counts["resnet"] < 0.6e6
    assert (Config().width, Config().downsamplings) == (32, 1)
    assert (Config(channels=16).width, Config(dataset="mnist", downsamplings=1).downsamplings) == (16, 1)


def test_networks_differ_in_the_body_alone(data):
    odenet, resnet = (build(name, SMALL, data) for name in ("odenet", "resnet"))
    for part in ("stem", "head"):
        shapes = [{n: p.shape for n, p in getattr(net, part).named_parameters()} for net in (odenet, resnet)]
        assert shapes[0] == shapes[1]


def test_body_of_the_odenet_is_a_flow_that_sees_the_time(data):
    layer = build("odenet", SMALL, data).double().body
    y = torch.randn(3, 8, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    f = layer.f
    assert not torch.allclose(f(torch.tensor(0.0), y), f(torch.tensor(1.0), y))
    layer.solver = im.Dopri5(rtol=1e-9, atol=1e-9)
    expected = y
    for i in range(40):  # the classical method, written out
        t, h = torch.tensor(i / 40, dtype=torch.float64), 1 / 40
        k1 = f(t, expected)
        k2 = f(t + h / 2, expected + h / 2 * k1)
        k3 = f(t + h / 2, expected + h / 2 * k2)
        k4 = f(t + h, expected + h * k3)
        expected = expected + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    torch.testing.assert_close(layer(y), expected, rtol=0, atol=1e-5)


def test_residual_body_adds_what_its_blocks_put_out(data):
    body = build("resnet", SMALL, data).body
    y = torch.randn(3, 8, 2, 2, generator=torch.Generator().manual_seed(0))
    first, second = body.blocks
    expected = y + first(y)
    torch.testing.assert_close(body(y), expected + second(expected))


# --- What is measured ---------------------------------------------------------------------------------------


def test_memory_grows_with_blocks_and_unrolled_steps_and_less_with_steps_taken_again(data):
    measured, forward = memory_against_depth(replace(SMALL, depths=(2, 4, 8)), data)
    for name in ("ODE, unrolled", "residual blocks"):
        two, four, eight = measured[name]
        assert eight - four == pytest.approx(2 * (four - two), rel=0.05), name  # a straight line
        assert four - two > 0
    again = measured["ODE, steps recomputed"]
    unrolled = measured["ODE, unrolled"]
    assert again[2] - again[0] < 0.1 * (unrolled[2] - unrolled[0])
    assert 0 < forward < unrolled[0]


def test_memory_is_that_of_as_many_steps_as_it_says(data):
    layer = build("odenet", SMALL, data).body
    for depth in Config().depths:
        layer.solver = im.Dopri5(dt=1 / depth)
        layer(torch.zeros(1, 8, 2, 2))
        assert int(layer.solution.steps) == depth


def test_a_looser_tolerance_takes_fewer_calls_and_is_taken_back(data, tmp_path):
    training = fit("odenet", replace(SMALL, epochs=1), data, tmp_path).training
    own = training.model.body.solver
    tight, same, loose = loosen(training, (1e-5, SMALL.tolerance, 1.0))
    assert tight.calls > same.calls > loose.calls >= 8  # f at the start, for the first step, and one step
    assert training.model.body.solver == own
    (again,) = loosen(training, (SMALL.tolerance,))
    assert again == same


# --- Training -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_both_learn_the_digits(data, tmp_path):
    config = replace(SMALL, channels=16, downsamplings=1, groups=4, batch_size=64, epochs=3, learning_rate=1e-2)
    config = replace(config, tolerance=0.1)
    for name in config.models:
        assert fit(name, config, data, tmp_path / name).test_accuracy > 0.7, name


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of the command line: its results are read from what it left."""
    folder = tmp_path_factory.mktemp("ode-mnist") / "run"
    options = ["--channels", "8", "--groups", "2", "--blocks", "2", "--batch-size", "256", "--max-steps", "3"]
    options += ["--tolerances", "1e-4", "1", "--depths", "1", "4", "--accelerator", "cpu", "--no-progress"]
    command_line = ["fit", "ode-mnist", *options, "--out", str(folder)]
    assert command(command_line) == 0
    return folder, command_line


@pytest.mark.slow
def test_command_line_leaves_pictures_table_and_checkpoints(run):
    folder, _ = run
    for name in ("memory.png", "calls.png", "tolerances.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    table = (folder / "table.txt").read_text()
    for text in (
        "ode-mnist on digits",
        "stopped after 3 steps",
        "odenet",
        "resnet",
        "2.0 + 0.0",
        "at 0.0001",
        "at 1",
    ):
        assert text in table
    for name in ("odenet", "resnet"):
        checkpoint = torch.load(folder / name / LAST, weights_only=True)
        assert checkpoint["global_step"] == len(checkpoint["calls"]) == 3
        assert checkpoint["identity"]["recipe"] == "ode-mnist"
    forward, backward = zip(*torch.load(folder / "odenet" / LAST, weights_only=True)["calls"])
    assert min(forward) > 8
    assert min(backward) > 6


@pytest.mark.slow
def test_command_line_does_not_overwrite_and_resumes(run, capsys):
    folder, command_line = run
    assert command(command_line) == 1
    assert "contains the checkpoints of another run" in capsys.readouterr().err
    assert command([*command_line, "--resume", "--max-steps", "4"]) == 0
    assert "stopped after 4 steps" in " ".join(capsys.readouterr().out.split())
    assert len(torch.load(folder / "odenet" / LAST, weights_only=True)["calls"]) == 4


class PowerCut(RuntimeError):
    pass


def test_resumed_training_is_the_uninterrupted_one(data, tmp_path, monkeypatch):
    config = replace(SMALL, epochs=2)
    whole = fit("odenet", config, data, tmp_path / "whole")
    batches = whole.training.batches_per_epoch

    def cut(self):
        if self.current_epoch == 1:
            raise PowerCut

    with monkeypatch.context() as patch:
        patch.setattr(Training, "on_train_epoch_start", cut, raising=False)
        with pytest.raises(PowerCut):
            fit("odenet", config, data, tmp_path / "parts")
    resumed = fit("odenet", replace(config, resume=True), data, tmp_path / "parts")
    assert torch.equal(weights(resumed), weights(whole))
    assert resumed.training.calls == whole.training.calls
    assert len(whole.training.calls) == whole.costs.steps == 2 * batches
    assert {path.name for path in resumed.folder.iterdir()} >= {LAST, BEST, "logs"}
    with pytest.raises(CheckpointError, match=r"its tolerance is 0\.001, this run's is 0\.1"):
        fit("odenet", replace(config, resume=True, tolerance=0.1), data, tmp_path / "parts")


def test_mixed_precision_solves_in_full_precision(data, tmp_path):
    training = fit(
        "odenet",
        replace(SMALL, max_steps=2, precision="bf16-mixed", tolerance=0.02, tolerances=(0.1,)),
        data,
        tmp_path,
    ).training
    assert training.model.body.solution.value.dtype == torch.float32


# --- Options ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "cifar10"}, "dataset must be"),
        ({"groups": 5}, "groups must divide channels; got 5 and 32"),
        ({"channels": 0}, "channels must be at least 1; got 0"),
        ({"blocks": 0}, "blocks must be at least 1"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"models": ("resnet", "resnet")}, "models must contain at least one name, and none twice"),
        ({"tolerance": 0.0}, "tolerance and tolerances must be finite and at least 1e-06, .* 32-true; got 0.0"),
        ({"tolerances": ()}, "tolerances must be one or more numbers"),
        ({"tolerances": (1.0, 0.1)}, "tolerances must be one or more numbers in increasing order"),
        ({"tolerances": (float("nan"),)}, "must be finite"),
        ({"precision": "bf16-mixed"}, "at least 0.016, for the precision bf16-mixed; got 0.001"),
        ({"depths": (2, 1)}, "depths must be one or more numbers in increasing order"),
        ({"depths": (0, 1)}, "depths must be at least 1"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Config(**changes)


def test_a_resnet_alone_has_no_tolerances(tmp_path, capsys):
    config = replace(SMALL, models=("resnet",), max_steps=1, depths=(1,), out=tmp_path / "run")
    (result,) = main(config)
    assert result.costs.forward_calls == 2
    assert "at 1" not in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"resnet", "memory.png", "table.txt"}
