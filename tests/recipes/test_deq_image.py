"""deq-image: the model of its description, training that can be repeated and resumed, checkpoints that last."""

import dataclasses
import math
import os
import re
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import TensorDataset

import implicitly as im

pytest.importorskip("lightning", reason="needs the extra: implicitly[recipes]")

from implicitly.data import ImageData, digits
from implicitly.recipes import deq_image
from implicitly.recipes._checkpoints import BEST, LAST, CheckpointError, previous_of, read_checkpoint, run_folder
from implicitly.recipes._classification import count_parameters
from implicitly.recipes._options import OptionError
from implicitly.recipes._training import AtomicCheckpointIO, Batches
from implicitly.recipes.deq_image import Cell, Config, Training, build, fit, main
from tests.data.test_images import write_jpeg_archive

SMALL = Config(
    channels=8,
    inner_channels=8,
    groups=2,
    stem_stride=2,
    pooled_size=2,
    unroll=3,
    blocks=2,
    epochs=3,
    batch_size=128,
    progress=False,
)


def small(**changes):
    return dataclasses.replace(SMALL, **changes)


@pytest.fixture(scope="module")
def data():
    return digits()


def blank(channels, size):
    """A set of the given shape, for building networks only."""
    empty = TensorDataset(torch.zeros(0, channels, size, size), torch.zeros(0, dtype=torch.int64))
    return ImageData(empty, empty, channels, size, size, classes=10, name="blank")


def weights(result):
    return torch.cat([p.detach().flatten() for p in result.training.model.state_dict().values()])


# --- The networks -------------------------------------------------------------------------------------------


def test_cell_is_the_one_described():
    cell = Cell(48, 64, groups=8)
    z, x = torch.randn(2, 48, 6, 6), torch.randn(2, 48, 6, 6)
    shapes = {name: tuple(parameter.shape) for name, parameter in cell.named_parameters()}
    assert shapes["conv_in.weight"] == (64, 48, 3, 3)
    assert shapes["conv_out.weight"] == (48, 64, 3, 3)
    assert not any(name.startswith("conv") and name.endswith("bias") for name in shapes)
    for conv in (cell.conv_in, cell.conv_out):
        assert conv.weight.std().item() == pytest.approx(0.01, rel=0.03)
        assert conv.weight.mean().abs() < 3e-4
    y = F.group_norm(F.relu(F.conv2d(z, cell.conv_in.weight, padding=1)), 8)
    branch = F.group_norm(x + F.conv2d(y, cell.conv_out.weight, padding=1), 8)
    torch.testing.assert_close(cell(z, x), F.group_norm(F.relu(z + branch), 8))


@pytest.mark.parametrize("shape", [(1, 8), (1, 28), (3, 32)])
@pytest.mark.parametrize("config", [Config(), Config(blocks=2), SMALL, Config(channels=32, inner_channels=32)])
def test_networks_have_equal_parameters(shape, config):
    counts = {name: count_parameters(build(name, config, blank(*shape))) for name in config.models}
    assert counts["deq"] == counts["unrolled"]
    assert counts["resnet"] == pytest.approx(counts["deq"], rel=0.05)


def test_body_of_deq_is_an_equilibrium_with_the_gradient_of_deep_unrolling(data):
    config = small(rtol=1e-10, precision="64-true", solver_steps=200, unroll=150)
    torch.manual_seed(0)
    deq = build("deq", config, data).double()
    unrolled = build("unrolled", config, data).double()
    unrolled.load_state_dict(deq.state_dict())
    images, labels = (tensor[:4] for tensor in data.train.tensors)
    losses = [F.cross_entropy(network(images.double()), labels) for network in (deq, unrolled)]
    torch.testing.assert_close(*losses, rtol=1e-8, atol=0)
    for loss in losses:
        loss.backward()
    assert (deq.body.solution.status == im.Status.CONVERGED).all()
    for (name, ours), theirs in zip(deq.named_parameters(), unrolled.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-8, msg=name)


def test_batches_cover_every_row_once_and_depend_on_the_seed_alone(data):
    rows = torch.arange(100, 200)

    def read(seed):
        batches = Batches(TensorDataset(torch.arange(1437)), rows, batch_size=32, seed=seed)
        found = [chunk for (chunk,) in batches]
        assert len(found) == len(batches) == 4
        return torch.cat(found)

    assert torch.equal(read(None), rows)
    assert torch.equal(read(1).sort().values, rows)
    assert torch.equal(read(1), read(1))
    assert not torch.equal(read(1), read(2))


# --- Training -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_all_learn_the_digits_and_one_table_compares_them(tmp_path, capsys):
    config = small(out=tmp_path / "run", learning_rate=1e-2, epochs=5)
    results = main(config)
    table = capsys.readouterr().out
    assert [result.name for result in results] == ["deq", "quick", "unrolled", "resnet"]
    for result in results:
        # Of five epochs the quick one begins the first at zero, where its steps lead not far.
        assert result.test_accuracy > (0.5 if result.name == "quick" else 0.75), result.name
        assert f"{100 * result.test_accuracy:.2f} %" in table
        assert f"{result.parameters:,}" in table
        assert result.costs.peak_bytes > 0
        assert result.seconds_per_epoch > 0
        assert result.costs.steps == config.epochs * result.training.batches_per_epoch
        assert {path.name for path in result.folder.iterdir()} >= {LAST, BEST, "logs"}
    deq, quick, unrolled, resnet = (result.costs for result in results)
    # At its start and after each step; the last call is the recorded one.
    assert (quick.forward_calls, quick.backward_calls) == (4 * quick.steps, quick.steps)
    assert unrolled.forward_calls == unrolled.backward_calls == 3 * unrolled.steps
    assert resnet.forward_calls == resnet.backward_calls == 2 * resnet.steps
    assert 2 * deq.steps < deq.forward_calls <= 26 * deq.steps
    assert deq.backward_calls > 0
    check_logs(results[0])
    with pytest.raises(CheckpointError, match=r"contains the checkpoints of another run.*--resume"):
        main(small(out=tmp_path / "run"))


def check_logs(result):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(result.folder / "logs"))
    events.Reload()
    scalars = events.Tags()["scalars"]
    for name in ("loss", "accuracy", "solver_steps", "relative_residual", "status_converged", "status_max_steps"):
        assert f"train/{name}" in scalars
        assert f"val/{name}" in scalars
    samples = len(result.training.validation_rows)
    statuses = [name for name in scalars if name.startswith("val/status_")]
    assert sum(events.Scalars(name)[-1].value for name in statuses) == samples
    assert events.Scalars("test/accuracy")[0].value == pytest.approx(result.test_accuracy)


def test_same_seed_same_weights(data, tmp_path):
    config = small(max_steps=4, epochs=1)
    first, again = (weights(fit("deq", config, data, tmp_path / name)) for name in ("a", "b"))
    other = weights(fit("deq", dataclasses.replace(config, seed=1), data, tmp_path / "c"))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_unrolled_step_needs_more_memory_the_more_it_unrolls(data, tmp_path):
    def peak(name, **changes):
        return fit(
            name, small(max_steps=2, epochs=1, **changes), data, tmp_path / f"{name}{changes}"
        ).costs.peak_bytes

    assert peak("unrolled", unroll=20) > 3 * peak("unrolled", unroll=5)
    # Implicit differentiation: the same memory, whatever the number of steps.
    few, many = (peak("deq", solver_steps=steps, rtol=1e-6) for steps in (12, 24))
    assert many == pytest.approx(few, rel=0.1)


def test_mixed_precision_has_the_gradient_of_full_precision(data):
    images, labels = (tensor[:64] for tensor in data.train.tensors)
    network = build("deq", SMALL, data)
    gradients = []
    for mixed in (False, True):
        network.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            loss = F.cross_entropy(network(images), labels)
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in network.body.parameters()]))
    full, half = gradients
    assert (half - full).norm() < 0.25 * full.norm()


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "dtype"), [("bf16-mixed", torch.float32), ("64-true", torch.float64)])
def test_precisions_train(data, tmp_path, precision, dtype):
    for name in SMALL.models:
        config = small(epochs=1, learning_rate=1e-2, precision=precision)
        result = fit(name, config, data, tmp_path / name)
        assert {p.dtype for p in result.training.model.parameters()} == {dtype}
        assert result.test_accuracy > 0.3


def test_note_about_jpeg_stands_under_the_table(tmp_path, capsys):
    for split in ("train", "test"):
        write_jpeg_archive(tmp_path / "cifar10" / f"cifar10_jpg_{split}.tar.gz", split, per_class=2)
    config = small(dataset="cifar10", data=tmp_path, cache=tmp_path / "cache", out=tmp_path / "run")
    main(dataclasses.replace(config, models=("resnet",), max_steps=1, epochs=1, stem_stride=2))
    printed = " ".join(capsys.readouterr().out.split())
    assert "Note: images stored as JPEG, quality ~75" in printed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1; got 0"),
        ({"max_steps": 0}, "max_steps must be at least 1"),
        ({"validation": 1.0}, "validation must lie between 0 and 1"),
        ({"groups": 5}, r"groups must divide channels and inner_channels; got 5, 48 and 64"),
        ({"models": ()}, "models must contain at least one name"),
        ({"models": ("deq", "deq")}, "none twice"),
        ({"inner_channels": 0}, "inner_channels must be at least 1"),
        ({"accelerator": "foo"}, "accelerator must be one of auto, cpu, gpu, cuda, mps; got foo"),
        ({"accelerator": "cpu", "precision": "16-mixed"}, "precision must be one that a CPU supports"),
        ({"cache": Path("elsewhere")}, "cache has no effect: the digits come with scikit-learn"),
        ({"rtol": math.inf}, "rtol must be a finite number"),
    ],
)
def test_bad_options_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Config(**changes)


@pytest.mark.skipif(torch.cuda.is_available() or torch.backends.mps.is_available(), reason="there is one")
@pytest.mark.parametrize("accelerator", ["gpu", "cuda", "mps"])
def test_an_accelerator_that_is_not_there_is_refused(accelerator):
    with pytest.raises(
        ValueError,
        match=f"accelerator must be one that PyTorch finds on this machine: auto, cpu; got {accelerator}",
    ):
        Config(accelerator=accelerator)


def test_a_validation_set_of_everything_is_refused(data):
    with pytest.raises(OptionError, match=r"validation=0\.9999 holds out all 1,437 images"):
        Training("resnet", small(validation=0.9999), data)


# --- Checkpoints --------------------------------------------------------------------------------------------


class PowerCut(RuntimeError):
    pass


def interrupted(config, data, folder, epoch, monkeypatch, name="deq"):
    """Train until `epoch` (from 0) begins, and no further."""

    def cut(self):
        if self.current_epoch == epoch:
            raise PowerCut

    with monkeypatch.context() as patch:
        patch.setattr(Training, "on_train_epoch_start", cut, raising=False)
        with pytest.raises(PowerCut):
            fit(name, config, data, folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deq", "quick"])
def test_resumed_training_is_the_uninterrupted_one(data, tmp_path, monkeypatch, name):
    config = small(epochs=4, batch_size=256)
    whole = fit(name, config, data, tmp_path / "whole")
    interrupted(config, data, tmp_path / "parts", 2, monkeypatch, name)
    before = torch.load(tmp_path / "parts" / LAST, weights_only=True)
    assert before["epoch"] == 1
    resumed = fit(name, dataclasses.replace(config, resume=True), data, tmp_path / "parts")

    assert torch.equal(weights(resumed), weights(whole))
    assert resumed.test_accuracy == whole.test_accuracy
    assert resumed.costs.steps == whole.costs.steps
    assert resumed.costs.forward_calls == whole.costs.forward_calls
    ours, theirs = (torch.load(tmp_path / run / LAST, weights_only=True) for run in ("parts", "whole"))
    assert ours["epoch"] == theirs["epoch"] == 3
    assert ours["global_step"] == theirs["global_step"] == 2 * before["global_step"]
    assert ours["lr_schedulers"] == theirs["lr_schedulers"]
    for slot, state in theirs["optimizer_states"][0]["state"].items():
        for key, value in state.items():
            assert torch.equal(ours["optimizer_states"][0]["state"][slot][key], value)


def test_equilibria_too_large_for_a_checkpoint_start_from_zero_again(data, tmp_path, monkeypatch):
    monkeypatch.setattr(deq_image, "KEPT", 1000)
    config = small(epochs=1, batch_size=256)
    fit("quick", config, data, tmp_path)
    assert "equilibria" not in torch.load(tmp_path / LAST, weights_only=True)
    with pytest.warns(UserWarning, match="starts the next epoch from zero"):
        resumed = fit("quick", dataclasses.replace(config, resume=True, epochs=2), data, tmp_path)
    assert resumed.costs.steps == 2 * resumed.training.batches_per_epoch


def test_run_stopped_within_an_epoch_resumes_with_the_next_batch(data, tmp_path, monkeypatch):
    config = small(epochs=2, batch_size=256)
    batches = Training("resnet", config, data).batches_per_epoch
    seen = []
    monkeypatch.setattr(
        Training, "on_train_batch_start", lambda self, batch, _: seen.append(batch[1].tolist()), raising=False
    )
    fit("resnet", config, data, tmp_path / "whole")
    whole = seen.copy()
    assert len(whole) == 2 * batches
    seen.clear()
    for steps in (2, batches + 1, 2 * batches):
        fit("resnet", dataclasses.replace(config, max_steps=steps, resume=True), data, tmp_path / "parts")
        assert len(seen) == steps
        assert torch.load(tmp_path / "parts" / LAST, weights_only=True)["costs"]["steps"] == steps
    assert seen == whole


def test_finished_training_resumes_to_the_same_result(data, tmp_path):
    config = small(epochs=1, models=("resnet",), out=tmp_path / "run")
    (first,) = main(config)
    (again,) = main(dataclasses.replace(config, resume=True))
    assert again.test_accuracy == first.test_accuracy
    assert again.costs == first.costs
    (longer,) = main(dataclasses.replace(config, resume=True, epochs=2))
    assert longer.costs.steps == 2 * first.costs.steps


def test_truncated_checkpoint_names_the_intact_one_and_leaves_it_alone(data, tmp_path, monkeypatch):
    config = small(epochs=4, batch_size=256)
    interrupted(config, data, tmp_path, 3, monkeypatch)
    last = tmp_path / LAST
    content = last.read_bytes()
    last.write_bytes(content[: len(content) // 2])
    previous = previous_of(last).read_bytes()
    resume = dataclasses.replace(config, resume=True)
    with pytest.raises(CheckpointError) as failure:
        fit("deq", resume, data, tmp_path)
    message = str(failure.value)
    assert f"cannot read the checkpoint {last} ({len(content) // 2:,} bytes)" in message
    assert f"The checkpoint {previous_of(last)}, of epoch 2, is intact" in message
    assert f"copy it to {last} and resume again" in message
    assert previous_of(last).read_bytes() == previous

    shutil.copy(previous_of(last), last)  # what the message says
    assert fit("deq", resume, data, tmp_path).costs.steps == 4 * Training("deq", config, data).batches_per_epoch


@pytest.fixture(scope="module")
def checkpoint(data, tmp_path_factory):
    """A real checkpoint and its identity."""
    folder = tmp_path_factory.mktemp("checkpoint")
    result = fit("resnet", small(max_steps=1, epochs=1), data, folder)
    return (folder / LAST).read_bytes(), result.training.identity


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.9, 0.999])
def test_checkpoint_cut_anywhere_is_refused(checkpoint, tmp_path, share):
    content, identity = checkpoint
    path = tmp_path / LAST
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(
        CheckpointError, match=rf"cannot read the checkpoint {re.escape(str(path))} .*no other intact"
    ):
        read_checkpoint(path, identity)


@pytest.mark.parametrize("foreign", [b"\x80\x04garbage", b"PK\x03\x04" + bytes(500), b"some text\n" * 50])
def test_file_that_is_no_checkpoint_is_refused(checkpoint, tmp_path, foreign):
    content, identity = checkpoint
    path = tmp_path / LAST
    path.write_bytes(foreign)
    (tmp_path / BEST).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"The checkpoint {re.escape(str(tmp_path / BEST))}, of epoch 1"):
        read_checkpoint(path, identity)


@pytest.mark.parametrize("place", [0.2, 0.5, 0.8])
def test_checkpoint_with_changed_bytes_is_refused(checkpoint, tmp_path, place):
    content, identity = checkpoint
    path = tmp_path / LAST
    path.write_bytes(content)
    with zipfile.ZipFile(path) as archive:
        tensors = [info for info in archive.infolist() if "/data/" in info.filename]
        largest = max(tensors, key=lambda info: info.file_size)
        begin = content.index(archive.read(largest)) + int(place * (largest.file_size - 64))
    changed = bytes(255 - b for b in content[begin : begin + 64])
    path.write_bytes(content[:begin] + changed + content[begin + 64 :])
    torch.load(path, weights_only=True)  # sees nothing
    with pytest.raises(
        CheckpointError, match=rf"checksum of {re.escape(largest.filename)} in the file is wrong.*no other intact"
    ):
        read_checkpoint(path, identity)
    previous_of(path).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"The checkpoint {re.escape(str(previous_of(path)))}, of epoch 1"):
        read_checkpoint(path, identity)


@pytest.mark.parametrize("part", ["state_dict", "optimizer_states", "global_step", "costs"])
def test_incomplete_checkpoint_is_refused(checkpoint, tmp_path, part):
    content, identity = checkpoint
    path = tmp_path / LAST
    path.write_bytes(content)
    parts = torch.load(path, weights_only=True)
    del parts[part]
    torch.save(parts, path)
    with pytest.raises(CheckpointError, match=rf"{LAST} lacks {part}\. There is no other intact"):
        read_checkpoint(path, identity, Training.kept)


def test_a_run_cannot_end_before_where_it_is(data, tmp_path):
    config = small(epochs=2, batch_size=256)
    steps = 2 * fit("resnet", config, data, tmp_path).training.batches_per_epoch
    resumed = dataclasses.replace(config, resume=True)
    with pytest.raises(
        CheckpointError, match="a run of 2 epochs, which is more than 1: resume with --epochs 2 or more"
    ):
        fit("resnet", dataclasses.replace(resumed, epochs=1), data, tmp_path)
    with pytest.raises(
        CheckpointError, match=f"a run of {steps} steps, which is more than 3: .* --max-steps {steps}"
    ):
        fit("resnet", dataclasses.replace(resumed, max_steps=3), data, tmp_path)


def test_checkpoint_of_another_recipe_or_shape_is_refused(checkpoint, tmp_path):
    content, identity = checkpoint
    path = tmp_path / LAST
    path.write_bytes(content)
    assert read_checkpoint(path, identity)["global_step"] == 1
    with pytest.raises(
        CheckpointError, match=r"another run: its recipe is deq-image, this run's is other-recipe\. Resume"
    ):
        read_checkpoint(path, {**identity, "recipe": "other-recipe"})
    with pytest.raises(
        CheckpointError, match=r"its seed is 0, this run's is 3; its channels is 8, this run's is 16\."
    ):
        read_checkpoint(path, {**identity, "channels": 16, "seed": 3})
    torch.save({"state_dict": {}}, path)
    with pytest.raises(CheckpointError, match="does not name a recipe, and this is deq-image"):
        read_checkpoint(path, identity)
    torch.save(torch.zeros(3), path)
    with pytest.raises(CheckpointError, match="does not name a recipe"):
        read_checkpoint(path, identity)


def test_interrupted_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / LAST
    write = AtomicCheckpointIO().save_checkpoint
    write({"epoch": 0}, path)

    class Unwritable:
        def __reduce__(self):
            raise PowerCut

    with pytest.raises(PowerCut):  # in the middle of the write
        write({"epoch": 1, "tensor": torch.zeros(10_000), "bad": Unwritable()}, path)
    assert torch.load(path) == {"epoch": 0}

    def full(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            write({"epoch": 1}, path)
    assert torch.load(path) == {"epoch": 0}

    write({"epoch": 1}, path)
    write({"epoch": 2}, path)
    assert torch.load(path) == {"epoch": 2}
    assert torch.load(previous_of(path)) == {"epoch": 1}
    assert {file.name for file in tmp_path.iterdir()} == {LAST, previous_of(path).name}
    with pytest.raises(TypeError, match="storage_options must be None"):
        write({}, path, storage_options={"a": 1})


def test_run_folders_are_numbered_and_never_mixed(tmp_path):
    assert run_folder(tmp_path, "digits", None, resume=False) == tmp_path / "digits-1"
    with pytest.raises(CheckpointError, match="nothing to resume"):
        run_folder(tmp_path, "digits", None, resume=True)
    for name in ("digits-2", "digits-10", "mnist-30", "digits-x"):
        (tmp_path / name).mkdir()
    assert run_folder(tmp_path, "digits", None, resume=False) == tmp_path / "digits-11"
    assert run_folder(tmp_path, "digits", None, resume=True) == tmp_path / "digits-10"
    out = tmp_path / "mine"
    assert run_folder(tmp_path, "digits", out, resume=False) == out
    with pytest.raises(CheckpointError, match=r"mine contains no MODEL/last\.ckpt"):
        run_folder(tmp_path, "digits", out, resume=True)
    (out / "deq").mkdir(parents=True)
    (out / "deq" / LAST).touch()
    assert run_folder(tmp_path, "digits", out, resume=True) == out
    with pytest.raises(CheckpointError, match="contains the checkpoints of another run"):
        run_folder(tmp_path, "digits", out, resume=False)
