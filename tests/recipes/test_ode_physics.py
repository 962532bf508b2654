"""ode-physics: true systems, the networks of its description, and energies that are measured rightly."""

import dataclasses
import math

import pytest
import torch
from torch.func import jacfwd

import implicitly as im

pytest.importorskip("lightning", reason="needs the extra: implicitly[recipes]")
pytest.importorskip("matplotlib", reason="needs the extra: implicitly[viz]")

from implicitly.recipes._checkpoints import LAST, CheckpointError
from implicitly.recipes.ode_physics import (
    SYSTEMS,
    TRUE_FIELD,
    Config,
    Lagrangian,
    Network,
    Result,
    Rollout,
    Training,
    build,
    main,
    results_table,
    roll_out,
    simulate,
    train,
)
from implicitly.viz.motion import plot_energy, plot_phase

TINY = Config(
    systems=("spring",),
    motions=8,
    horizon=0.4,
    points=5,
    epochs=2,
    batch_size=16,
    width=8,
    rollouts=2,
    progress=False,
)
D = torch.float64
systems = pytest.mark.parametrize("name", SYSTEMS)


def tiny(**changes):
    return dataclasses.replace(TINY, **changes)


def states(system, count=5):
    return torch.randn(count, 2 * system.n, dtype=D, generator=torch.Generator().manual_seed(4))


def canonical(system, y):
    q, v = y.chunk(2, -1)
    return torch.cat([q, system.momentum(q, v)], -1)


# --- The systems --------------------------------------------------------------------------------------------


@systems
def test_equations_by_hand_are_those_of_lagrange_and_hamilton(name):
    system = SYSTEMS[name]
    y = states(system)

    def lagrangian(y):
        q, v = y.chunk(2, -1)
        return (system.momentum(q, v) * v).sum(-1) / 2 - system.potential(q)

    def hamiltonian(y):
        q, p = y.chunk(2, -1)
        return system.energy(torch.cat([q, system.velocity(q, p)], -1))

    of_lagrange = im.nn.LagrangianField(lagrangian)
    torch.testing.assert_close(system.field(0.0, y), of_lagrange(0.0, y))
    torch.testing.assert_close(system.energy(y), of_lagrange.energy(y))
    expected = torch.func.jvp(lambda y: canonical(system, y), (y,), (system.field(0.0, y),))[1]
    torch.testing.assert_close(im.nn.HamiltonianField(hamiltonian)(0.0, canonical(system, y)), expected)


@systems
def test_rest_has_no_energy_and_true_motions_keep_theirs(name):
    system = SYSTEMS[name]
    rest = torch.zeros(1, 2 * system.n, dtype=D)
    assert system.energy(rest).item() == 0
    assert system.field(0.0, rest).abs().max() == 0
    motions = simulate(system, 4, torch.linspace(0, 5, 6, dtype=D), seed=0)
    energy = system.energy(motions)
    assert (energy[0] > 0.01).all()
    assert (energy - energy[0]).abs().max() < 1e-8


def test_motions_depend_on_the_seed_alone():
    times, system = torch.linspace(0, 1, 3, dtype=D), SYSTEMS["double pendulum"]
    first = simulate(system, 3, times, seed=0)
    torch.manual_seed(99)
    assert torch.equal(simulate(system, 3, times, seed=0), first)
    assert not torch.equal(simulate(system, 3, times, seed=1)[0], first[0])


# --- The networks, and what they are trained on -------------------------------------------------------------


@systems
def test_networks_are_of_equal_size_and_do_not_notice_whole_turns(name):
    system = SYSTEMS[name]
    y = states(system)
    turned = y + torch.tensor([2 * math.pi] * system.n + [0.0] * system.n, dtype=D)
    sizes = {}
    for model in Config().models:
        field = build(model, system, 64).double()
        sizes[model] = sum(p.numel() for p in field.parameters())
        same = torch.allclose(field(0.0, y), field(0.0, turned), rtol=1e-9, atol=1e-9)
        assert same == system.angles
    assert max(sizes.values()) < 1.05 * min(sizes.values())


def test_mass_term_makes_fresh_lagrangians_regular():
    for name, system in SYSTEMS.items():
        torch.manual_seed(0)
        lagrangian = Lagrangian(Network(system, 64, 1)).double()
        hessians = torch.stack([jacfwd(jacfwd(lagrangian))(y)[system.n :, system.n :] for y in states(system)])
        assert torch.linalg.eigvalsh(hessians).min() > 0.5, name


@pytest.mark.parametrize("model", Config().models)
def test_data_are_the_derivatives_in_the_coordinates_of_the_field(model):
    training = Training(model, "double pendulum", tiny())
    inputs, slopes = training.test_set.tensors
    system, eps = training.system, 1e-6
    y = training.from_own(inputs)
    torch.testing.assert_close(training.to_own(y), inputs)
    ahead, behind = (training.to_own(y + e * system.field(0.0, y)) for e in (eps, -eps))
    torch.testing.assert_close(slopes, (ahead - behind) / (2 * eps), rtol=1e-6, atol=1e-8)
    assert (model == "hamiltonian") == (not torch.allclose(inputs, y))


def test_windows_are_what_follows_in_the_motions_and_the_true_field_predicts_them():
    training = Training("hamiltonian", "double pendulum", tiny(fit_to="windows", window=3))
    first, following = training.train_set.tensors
    assert first.shape == (2 * 8, 4)
    assert following.shape == (2 * 8, 3, 4)
    motions = training.to_own(simulate(training.system, 8, training.times, seed=0))
    torch.testing.assert_close(first, motions[:2].flatten(0, 1))
    for i in range(3):
        torch.testing.assert_close(following[:, i], motions[i + 1 : i + 3].flatten(0, 1))

    def hamiltonian(y):
        return training.system.energy(training.from_own(y))

    assert training._loss((first, following)) > 1e-4
    training.field = im.nn.HamiltonianField(hamiltonian)
    assert training._loss((first, following)) < 1e-10


def test_noise_is_on_the_training_data_only_and_as_large_as_asked():
    clean, noisy = (Training("plain", "pendulum", tiny(motions=200, noise=noise)) for noise in (0.0, 0.1))
    for a, b in zip(clean.train_set.tensors, noisy.train_set.tensors):
        torch.testing.assert_close((b - a).std(0) / a.std(0), torch.full((2,), 0.1, dtype=D), rtol=0.1, atol=0)
    for a, b in zip(clean.test_set.tensors, noisy.test_set.tensors):
        assert torch.equal(a, b)
    assert torch.equal(clean.scale, noisy.scale)


# --- What becomes of the energy -----------------------------------------------------------------------------


@pytest.mark.slow
@systems
def test_exact_field_keeps_the_energy_to_the_tolerance(name):
    config, system = tiny(tolerance=1e-9), SYSTEMS[name]
    times = torch.linspace(0, 10, 6, dtype=D)
    truth = simulate(system, 2, times, seed=2)
    rollout = roll_out(None, system, times, truth, config)
    assert rollout.drift.max() < 1e-6
    # A Hamiltonian network whose network is the true H: the way there and back by momenta changes nothing.
    training = Training("hamiltonian", name, config)
    training.field = im.nn.HamiltonianField(lambda y: system.energy(training.from_own(y)))
    by_hamilton = roll_out(training, system, times, truth, config)
    assert by_hamilton.drift.max() < 1e-6
    assert by_hamilton.state_error[:5].max() < 1e-5


def test_drift_and_errors_are_those_of_a_damped_spring():
    system, times = SYSTEMS["spring"], torch.linspace(0, 4, 5, dtype=D)
    truth = simulate(system, 3, times, seed=2)
    training = Training("plain", "spring", tiny(tolerance=1e-9))
    training.field = type("Decay", (torch.nn.Module,), {"forward": lambda self, t, y: -0.5 * y})()
    rollout = roll_out(training, system, times, truth, training.config)
    energy = truth[0].square().sum(-1) / 2
    torch.testing.assert_close(
        rollout.energy_error, (1 - torch.exp(-times))[:, None] * energy / energy.mean(), rtol=1e-6, atol=1e-8
    )
    torch.testing.assert_close(rollout.drift, (1 - math.exp(-4)) * energy / energy.mean(), rtol=1e-6, atol=0)
    difference = truth[0] * torch.exp(-times / 2)[:, None, None] - truth
    spread = (truth - truth.mean((0, 1))).square().sum(-1).mean()
    expected = (difference.square().sum(-1).mean(1) / spread).sqrt()
    torch.testing.assert_close(rollout.state_error, expected, rtol=1e-6, atol=1e-8)


def test_motion_that_blows_up_has_infinite_drift_and_leaves_the_others():
    system, times = SYSTEMS["spring"], torch.linspace(0, 4, 5, dtype=D)
    truth = torch.tensor([[2.0, 0.0], [0.1, 0.0]], dtype=D).expand(5, 2, 2)
    training = Training("plain", "spring", tiny())
    training.field = type("Blow", (torch.nn.Module,), {"forward": lambda self, t, y: y**2})()  # ends at t = 1 / y
    rollout = roll_out(training, system, times, truth, training.config)
    assert rollout.drift[0] == math.inf
    assert rollout.drift[1].isfinite()


# --- The whole ----------------------------------------------------------------------------------------------


def test_table_says_where_a_network_does_not_beat_the_plain_one():
    def result(system, name, drift):
        error = torch.tensor([[0.0], [drift]]).expand(2, 3)
        training = None if name == TRUE_FIELD else Training(name, system, tiny())
        rollout = Rollout(torch.arange(2.0), torch.zeros(2, 3, 2), error, torch.arange(12.0), calls=7)
        return Result(system, name, rollout, training, None if training is None else 0.5)

    rows = {
        "spring": {"plain": 0.01, "hamiltonian": 0.02, "lagrangian": 0.001, TRUE_FIELD: 0.1},
        "pendulum": {"plain": math.inf, "hamiltonian": 0.3, "lagrangian": math.inf},
    }
    results = [result(system, name, drift) for system, of in rows.items() for name, drift in of.items()]
    caption = results_table(results, tiny(systems=("spring", "pendulum"))).caption
    assert isinstance(caption, str)
    notes = [line for line in caption.splitlines() if line.startswith("Note")]
    assert notes == [
        "Note: on the spring, hamiltonian is no better than plain",
        "Note: on the pendulum, lagrangian is no better than plain",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("model", Config().models)
@pytest.mark.parametrize("fit_to", ["derivatives", "windows"])
def test_every_network_learns(model, fit_to, tmp_path):
    config = tiny(fit_to=fit_to, window=1, epochs=15, motions=32, learning_rate=5e-2)
    training, loss = train(model, "spring", config, tmp_path)
    fresh = Training(model, "spring", config)
    with torch.no_grad():
        assert loss < fresh._loss(fresh.test_set.tensors) / 4
        assert loss == pytest.approx(float(training._loss(training.test_set.tensors)), rel=1e-9)


def test_main_prints_a_row_each_writes_pictures_and_resumes_to_the_same_weights(tmp_path, capsys):
    config = tiny(systems=("pendulum",), models=("plain", "hamiltonian"), out=tmp_path / "run", tolerance=1e-3)
    results = main(config)
    table = capsys.readouterr().out
    assert [result.name for result in results] == ["plain", "hamiltonian", TRUE_FIELD]
    assert results[0].test_loss is not None
    assert all(f"{result.rollout.drift.max():.1e}" in table for result in results)
    assert f"{results[0].test_loss:.1e}" in table
    assert max(len(line) for line in table.splitlines() if line.startswith(("│", "┏"))) <= 80
    for name in ("energy.png", "pendulum.png"):
        assert (tmp_path / "run" / name).stat().st_size > 10_000
    assert (tmp_path / "run" / "pendulum-plain" / LAST).exists()
    with pytest.raises(CheckpointError, match="contains the checkpoints of another run"):
        main(config)

    config = dataclasses.replace(config, models=("plain",))
    whole, loss = train("plain", "pendulum", dataclasses.replace(config, epochs=4), tmp_path / "whole")
    # The cosine of a run of 4 epochs, stopped after 2: what an interruption leaves.
    folder = tmp_path / "parts"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "on_train_epoch_start", stop_before_epoch_2, raising=False)
        with pytest.raises(RuntimeError, match="power cut"):
            train("plain", "pendulum", dataclasses.replace(config, epochs=4), folder)
    resumed, again = train("plain", "pendulum", dataclasses.replace(config, epochs=4, resume=True), folder)
    assert again == loss
    for a, b in zip(whole.field.parameters(), resumed.field.parameters()):
        assert torch.equal(a, b)
    with pytest.raises(CheckpointError, match="a run of 4 epochs, which is more than 3"):
        train("plain", "pendulum", dataclasses.replace(config, epochs=3, resume=True), folder)
    with pytest.raises(CheckpointError, match="its width is 8, this run's is 16"):
        train("plain", "pendulum", dataclasses.replace(config, width=16, resume=True), folder)


def stop_before_epoch_2(training):
    if training.current_epoch == 2:
        raise RuntimeError("power cut")


def test_pictures_show_the_largest_error_so_far_and_leave_out_what_is_not_finite():
    times, error = torch.arange(5.0), torch.tensor([0.0, 2.0, 1.0, 4.0, math.nan])
    figure = plot_energy({"spring": times}, {"spring": {"plain": error}}, {"spring": 2.0})
    (line,) = figure.axes[0].lines
    assert line.get_xdata().tolist() == [0.5, 1.0, 1.5]
    assert line.get_ydata().tolist() == [2.0, 2.0, 4.0]
    motion = torch.tensor([[[0.0, 1.0]], [[1.5 * math.pi, -1.0]]])
    portrait = plot_phase({"plain": motion}, "pendulum").axes[0].lines[0]
    assert portrait.get_xdata().tolist() == pytest.approx([0.0, -0.5 * math.pi], abs=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1; got 0"),
        ({"horizon": math.inf}, "horizon must be finite; got inf"),
        ({"noise": -0.1}, "noise must be at least 0"),
        ({"fit_to": "windows", "window": 5}, "window must be smaller than points = 5, to fit windows; got 5"),
        ({"systems": ("spring", "spring")}, "systems must contain at least one name, and none twice"),
    ],
)
def test_bad_options_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)
