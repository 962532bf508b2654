"""ode-physics: learn the motion of a mechanical system, and keep its energy.

A network can be the vector field of a differential equation directly, or define it through a scalar: the energy H
in a Hamiltonian network (Greydanus, Dzamba and Yosinski, 2019, arXiv:1906.01563), the Lagrangian L in a Lagrangian
one (Cranmer et al., 2020, arXiv:2003.04630). A scalar implies a conserved quantity, whatever the weights are.

Three networks of the same widths see short motions of a spring, a pendulum and a double pendulum. Then `odeint`
follows each for 100 times that length, and a table tells how far the true energy has drifted by then:

    plain        dy/dt is the network's output; y holds coordinates q and velocities v
    hamiltonian  y holds q and canonical momenta p = M(q) v; computing these takes the true mass matrix
    lagrangian   y holds q and v
    true field   the equations of the system, with the same solver: the part of the drift that is due to the solver

As in the papers, networks fit the derivatives dy/dt along the motions by default: a training step is one call of
the field, and all three train reliably. `--fit-to windows` fits the following states of the motions instead,
through `odeint`; it needs no derivatives, but a step takes some 15 times as long.

The double pendulum is chaotic: no motion can be followed for long, not even by the true field at another
tolerance. In the end the error of the states says nothing there, and the energy is the measure.

Results of the default run (seed 0, float64, a CPU): the largest |E(t) - E(0)| over the mean energy, median of 8
motions:

                     plain     hamiltonian   lagrangian   true field
    spring           8.0e-3    3.1e-3        2.3e-3       3.1e-5
    pendulum         9.1e-2    1.8e-3        7.6e-4       9.9e-5
    double pendulum  3.7e-1    1.1e-2        5.0e-2       5.1e-5

On the spring the plain network is not far behind, and fits test motions better than the Hamiltonian one. On the
double pendulum single motions drift far with every network (worst: 0.85, 0.61 and 0.40).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import implicitly as im
from implicitly.recipes._checkpoints import LAST, previous_of, read_checkpoint, refuse_shorter, run_folder
from implicitly.recipes._options import (
    check_at_least,
    check_each_once,
    check_not_negative,
    check_positive,
    check_seed,
    check_tolerance,
)
from implicitly.recipes._training import (
    AtomicCheckpointIO,
    Batches,
    LastAndBest,
    TrainingBar,
    quiet_lightning,
)
from implicitly.viz.motion import plot_energy, plot_phase

SystemName = Literal["spring", "pendulum", "double pendulum"]
ModelName = Literal["plain", "hamiltonian", "lagrangian"]
TRUE_FIELD = "true field"
REACH = 100  # rollouts are this many times as long as the motions seen in training


@dataclass(frozen=True)
class Config:
    """Energy drift of Hamiltonian, Lagrangian and plain networks that learn a spring and pendulums."""

    systems: tuple[SystemName, ...] = ("spring", "pendulum", "double pendulum")
    """Mechanical systems to learn. All masses, lengths, stiffnesses and the gravity are 1."""
    models: tuple[ModelName, ...] = ("plain", "hamiltonian", "lagrangian")
    """Networks to train."""
    out: Path | None = None
    """Output folder for checkpoints, logs and pictures. Default: runs/ode-physics/motion-N, the next
    free N."""
    resume: bool = False
    """Continue the run in --out, or the newest run if --out is not given, from its last checkpoints."""

    motions: int = 400
    """Number of training trajectories, each with its own initial state."""
    horizon: float = 2.0
    """Duration of a training trajectory; a small swing of the pendulum takes 6.3. Rollouts take 100 times
    as long."""
    points: int = 21
    """Observed states per trajectory, evenly spaced in time."""
    noise: float = 0.0
    """Standard deviation of the noise added to the training data, relative to that of the data."""
    fit_to: Literal["derivatives", "windows"] = "derivatives"
    """What to fit: the derivatives dy/dt, or windows of the next --window states."""
    window: int = 2
    """With --fit-to windows: how many states to predict from one state."""

    epochs: int = 60
    """Passes over the training set."""
    batch_size: int = 256
    """States (or windows) per training step."""
    learning_rate: float = 5e-3
    """Initial learning rate of Adam; a cosine schedule lowers it to 0."""
    width: int = 64
    """Units in each of the two hidden layers."""
    seed: int = 0
    """Random seed of the trajectories, the initial weights and the order of the batches."""
    rollouts: int = 8
    """Number of test trajectories, each simulated for 100 times --horizon."""
    tolerance: float = 1e-6
    """Relative and absolute tolerance of the ODE solver (Dopri8) in rollouts."""
    progress: bool = True
    """Show a progress bar."""

    def __post_init__(self) -> None:
        check_at_least(self, 1, "motions", "window", "epochs", "batch_size", "width", "rollouts")
        check_at_least(self, 2, "points")
        check_positive(self, "horizon", "learning_rate")
        check_tolerance(self, torch.finfo(torch.float64).eps, "tolerance")
        check_not_negative(self, "noise")
        check_seed(self)
        if self.fit_to == "windows" and self.window >= self.points:
            raise ValueError(
                f"window must be smaller than points = {self.points}, to fit windows; got {self.window}"
            )
        check_each_once(self, "systems", "models")


# --- The systems --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class System:
    """A system with kinetic energy v'M(q)v / 2 and a potential, at rest at q = 0; states are (q, v) `(..., 2n)`.

    It is written out by hand, without `im.nn.HamiltonianField`, so that what a network is measured with shares no
    code with it.
    """

    n: int
    angles: bool
    reach: tuple[float, float]  # of q and v at the start, uniform between these and their negatives
    mass: Callable[[Tensor], Tensor]  # q -> M(q) `(..., n, n)`
    potential: Callable[[Tensor], Tensor]
    acceleration: Callable[[Tensor, Tensor], Tensor]

    def field(self, t: Tensor | float, y: Tensor) -> Tensor:
        """dy/dt."""
        q, v = y.chunk(2, dim=-1)
        return torch.cat([v, self.acceleration(q, v)], dim=-1)

    def energy(self, y: Tensor) -> Tensor:
        """Kinetic and potential energy `(...)`."""
        q, v = y.chunk(2, dim=-1)
        return (self.momentum(q, v) * v).sum(-1) / 2 + self.potential(q)

    def momentum(self, q: Tensor, v: Tensor) -> Tensor:
        """p = M(q) v."""
        return (self.mass(q) @ v.unsqueeze(-1)).squeeze(-1)

    def velocity(self, q: Tensor, p: Tensor) -> Tensor:
        """v with p = M(q) v."""
        return torch.linalg.solve(self.mass(q), p.unsqueeze(-1)).squeeze(-1)


def _unit_mass(q: Tensor) -> Tensor:
    return torch.ones_like(q).unsqueeze(-1)


def _double_mass(q: Tensor) -> Tensor:
    c = torch.cos(q[..., 0] - q[..., 1])
    entries = torch.stack([torch.full_like(c, 2.0), c, c, torch.ones_like(c)], dim=-1)
    return entries.unflatten(-1, (2, 2))


def _double_acceleration(q: Tensor, v: Tensor) -> Tensor:
    (a, b), (va, vb) = q.unbind(-1), v.unbind(-1)
    c, s = torch.cos(a - b), torch.sin(a - b)
    # M(q) dv/dt = (left, right); the determinant of M is 2 - c^2.
    left, right = -s * vb**2 - 2 * torch.sin(a), s * va**2 - torch.sin(b)
    return torch.stack([left - c * right, 2 * right - c * left], dim=-1) / (2 - c**2).unsqueeze(-1)


SYSTEMS: dict[SystemName, System] = {
    "spring": System(1, False, (1.0, 1.0), _unit_mass, lambda q: q.square().sum(-1) / 2, lambda q, v: -q),
    "pendulum": System(
        1, True, (2.0, 0.5), _unit_mass, lambda q: 1 - torch.cos(q).sum(-1), lambda q, v: -torch.sin(q)
    ),
    "double pendulum": System(
        2,
        True,
        (math.pi / 2, 0.5),
        _double_mass,
        lambda q: 3 - 2 * torch.cos(q[..., 0]) - torch.cos(q[..., 1]),
        _double_acceleration,
    ),
}


def simulate(system: System, count: int, times: Tensor, seed: int) -> Tensor:
    """True motions `(len(times), count, 2n)` from starts drawn with `seed`."""
    generator = torch.Generator().manual_seed(seed)
    reach = torch.tensor(system.reach, dtype=torch.float64).repeat_interleave(system.n)
    starts = reach * (2 * torch.rand(count, 2 * system.n, generator=generator, dtype=torch.float64) - 1)
    return im.odeint(system.field, starts, times, solver=im.Dopri8(rtol=1e-11, atol=1e-11), batch_dims=1).value


# --- The networks -------------------------------------------------------------------------------------------


class Network(nn.Module):
    """A network of (q, v) or (q, p) `(..., 2n)`, which sees the cosine and sine of angles."""

    def __init__(self, system: System, width: int, outputs: int) -> None:
        super().__init__()
        self.angles = system.angles
        inputs = (3 if system.angles else 2) * system.n
        self.layers = nn.Sequential(
            nn.Linear(inputs, width),
            nn.Tanh(),
            nn.Linear(width, width),
            nn.Tanh(),
            nn.Linear(width, outputs),
        )

    def forward(self, y: Tensor) -> Tensor:
        """The output `(..., outputs)`."""
        return self.layers(embed(y) if self.angles else y)


def embed(y: Tensor) -> Tensor:
    """(q, v) `(..., 2n)` as (cos q, sin q, v) `(..., 3n)`."""
    q, v = y.chunk(2, dim=-1)
    return torch.cat([torch.cos(q), torch.sin(q), v], dim=-1)


class PlainField(nn.Module):
    """dy/dt = network(y)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, t: Tensor | float, y: Tensor) -> Tensor:
        """dy/dt, of the shape of `y`."""
        return self.network(y)


class Lagrangian(nn.Module):
    """L = network(y) + m |v|^2 / 2 with a learned m > 0.

    The second term keeps d2L/dv2 from being singular at first, where accelerations would be unbounded. It starts
    at m = 2, which is right for none of the systems.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.log_mass = nn.Parameter(torch.tensor(math.log(2.0)))

    def forward(self, y: Tensor) -> Tensor:
        """L `(...)`."""
        velocity = y.chunk(2, dim=-1)[1]
        return self.network(y).squeeze(-1) + self.log_mass.exp() * velocity.square().sum(-1) / 2


def build(name: ModelName, system: System, width: int) -> nn.Module:
    """The vector field called `name`, with fresh weights."""
    if name == "plain":
        return PlainField(Network(system, width, 2 * system.n))
    network = Network(system, width, 1)
    return im.nn.HamiltonianField(network) if name == "hamiltonian" else im.nn.LagrangianField(Lagrangian(network))


# --- The training -------------------------------------------------------------------------------------------


class Training(L.LightningModule):
    """Trains one vector field on the motions of one system."""

    def __init__(self, name: ModelName, of: SystemName, config: Config) -> None:
        super().__init__()
        self.name, self.of, self.config = name, of, config
        self.system = SYSTEMS[of]
        self.field = build(name, self.system, config.width).double()
        self.times = torch.linspace(0, config.horizon, config.points, dtype=torch.float64)
        self.train_set = self._data(config.motions, 0)
        self.val_set, self.test_set = self._data(32, 1), self._data(32, 2)
        # What errors are relative to; from training data without noise, so that noise does not shift any figure.
        self.scale = self.train_set.tensors[1].std(dim=tuple(range(self.train_set.tensors[1].ndim - 1)))
        if config.noise > 0:
            self.train_set = self._noisy(self.train_set)

    @property
    def identity(self) -> dict[str, Any]:
        """What a checkpoint must match to be resumed: all options but where, how long, and how it is measured."""
        free = {"systems", "models", "out", "resume", "epochs", "rollouts", "tolerance", "progress"}
        fields = {key: value for key, value in dataclasses.asdict(self.config).items() if key not in free}
        return {"recipe": "ode-physics", "model": self.name, "system": self.of} | fields

    def to_own(self, y: Tensor) -> Tensor:
        """(q, v) in the coordinates of the field: (q, p) for the Hamiltonian network."""
        q, v = y.chunk(2, dim=-1)
        return torch.cat([q, self.system.momentum(q, v)], dim=-1) if self.name == "hamiltonian" else y

    def from_own(self, y: Tensor) -> Tensor:
        """The inverse of `to_own`."""
        q, p = y.chunk(2, dim=-1)
        return torch.cat([q, self.system.velocity(q, p)], dim=-1) if self.name == "hamiltonian" else y

    def _data(self, count: int, split: int) -> TensorDataset:
        """States, and what to predict from them: derivatives, or the next `window` states `(..., window, 2n)`."""
        motions = simulate(self.system, count, self.times, seed=3 * self.config.seed + split)
        if self.config.fit_to == "windows":
            windows = self.to_own(motions).unfold(0, self.config.window + 1, 1).movedim(-1, 2).flatten(0, 1)
            return TensorDataset(windows[:, 0], windows[:, 1:])
        states = motions.flatten(0, 1)
        return TensorDataset(*torch.func.jvp(self.to_own, (states,), (self.system.field(0.0, states),))[:2])

    def _noisy(self, data: TensorDataset) -> TensorDataset:
        generator = torch.Generator().manual_seed(self.config.seed)

        def noisy(x: Tensor) -> Tensor:
            spread = x.std(dim=tuple(range(x.ndim - 1)))
            return x + self.config.noise * spread * torch.randn(x.shape, generator=generator, dtype=x.dtype)

        return TensorDataset(*(noisy(x) for x in data.tensors))

    def predict(self, states: Tensor) -> Tensor:
        """The field's prediction of what the data hold."""
        if self.config.fit_to == "derivatives":
            return self.field(0.0, states)
        step = self.config.horizon / (self.config.points - 1)
        times = tuple(i * step for i in range(self.config.window + 1))
        # For so few steps, recording all of them is fast.
        solver, adjoint = im.Dopri5(dt=step), im.UnrolledAdjoint()
        return im.odeint(self.field, states, times, solver=solver, adjoint=adjoint).value[1:].movedim(0, 1)

    def train_dataloader(self) -> Batches:
        """The batches of one epoch; their order depends on seed and epoch alone, in a resumed run too."""
        rows = torch.arange(len(self.train_set))
        seed = 1_000_003 * self.config.seed + self.current_epoch
        return Batches(self.train_set, rows, self.config.batch_size, seed)

    def val_dataloader(self) -> Batches:
        """Motions of other starts, without noise."""
        return Batches(self.val_set, torch.arange(len(self.val_set)), len(self.val_set))

    def test_dataloader(self) -> Batches:
        """Motions of yet other starts, without noise."""
        return Batches(self.test_set, torch.arange(len(self.test_set)), len(self.test_set))

    def configure_optimizers(self) -> Any:
        """Adam, with a cosine schedule that lowers the learning rate to zero."""
        optimizer = torch.optim.Adam(self.field.parameters(), lr=self.config.learning_rate)
        steps = self.config.epochs * len(self.train_dataloader())
        cosine = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * min(step / steps, 1)))
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cosine, "interval": "step"}}

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of one batch."""
        loss = self._loss(batch)
        self.log("train/loss", loss, batch_size=len(batch[0]))
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the number of correct digits, which grows as the loss falls."""
        self.log("val/digits", -self._loss(batch).log10() / 2, prog_bar=True)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the loss."""
        self.log("test/loss", self._loss(batch))

    def _loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        states, targets = batch
        return ((self.predict(states) - targets) / self.scale).square().mean()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the identity of the run."""
        checkpoint["identity"] = self.identity


def train(name: ModelName, of: SystemName, config: Config, folder: Path) -> tuple[Training, float]:
    """Train one network, or with `config.resume` continue from its checkpoint; also returns its test loss.

    Raises:
        CheckpointError: the checkpoint to resume from is damaged, or was made with other options.
    """
    L.seed_everything(config.seed, verbose=False)  # for each network, so that none depends on the others
    training = Training(name, of, config)
    last = folder / LAST
    resume = config.resume and (last.exists() or previous_of(last).exists())
    if resume:
        refuse_shorter(last, read_checkpoint(last, training.identity), config.epochs)
    callbacks: list[L.Callback] = [LastAndBest(folder, monitor="val/digits")]
    if config.progress:
        callbacks.append(TrainingBar(name))
    with quiet_lightning():
        trainer = L.Trainer(
            accelerator="cpu",
            precision="64-true",
            max_epochs=config.epochs,
            gradient_clip_val=1.0,
            reload_dataloaders_every_n_epochs=1,
            num_sanity_val_steps=0,
            inference_mode=False,  # the fields differentiate, in validation too
            log_every_n_steps=min(10, len(training.train_dataloader())),
            callbacks=callbacks,
            plugins=[AtomicCheckpointIO()],
            logger=TensorBoardLogger(folder, name="", version="logs"),
            default_root_dir=folder,
            enable_progress_bar=config.progress,
            enable_model_summary=False,
        )
        trainer.fit(training, ckpt_path=last if resume else None, weights_only=True)
        loss = trainer.test(training, verbose=False)[0]["test/loss"]
    return training, loss


# --- What becomes of the energy -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Rollout:
    """Motions far beyond the horizon, and how they differ from the true ones.

    Attributes:
        times: `(T,)`, up to 100 horizons.
        motions: states (q, v) `(T, B, 2n)`, NaN from where the solver gave up.
        energy_error: |E(t) - E(0)| of the true energy, relative to the mean energy of the starts, `(T, B)`; inf
            from where the solver gave up.
        state_error: root mean square error over the samples, relative to that of true states about their mean,
            `(T,)`; about 1.4 where motions are unrelated.
        calls: calls of f.
    """

    times: Tensor
    motions: Tensor
    energy_error: Tensor
    state_error: Tensor
    calls: int

    @property
    def drift(self) -> Tensor:
        """The largest error of the energy `(B,)`; inf for a sample that did not reach the end."""
        return self.energy_error.amax(0)


def true_motions(system: System, config: Config) -> tuple[Tensor, Tensor]:
    """Times `(T,)` up to 100 horizons, and true motions `(T, rollouts, 2n)` from starts of the test set."""
    times = torch.linspace(0, REACH * config.horizon, 10 * REACH + 1, dtype=torch.float64)
    return times, simulate(system, config.rollouts, times, seed=3 * config.seed + 2)


def roll_out(training: Training | None, system: System, times: Tensor, truth: Tensor, config: Config) -> Rollout:
    """Follow the motions `truth` `(T, B, 2n)` with a trained field, or with the true one if `training` is None."""
    field, start = (system.field, truth[0]) if training is None else (training.field, training.to_own(truth[0]))
    solver = im.Dopri8(rtol=config.tolerance, atol=config.tolerance, max_steps=30_000)
    with torch.no_grad():  # a sample that breaks off is a result, and goes into the table
        found = im.odeint(field, start, times, solver=solver, batch_dims=1, on_failure="ignore")
        motions = found.value if training is None else training.from_own(found.value)
    energy = system.energy(motions)
    error = (energy - energy[0]).abs() / energy[0].mean()
    error = error.masked_fill(error.isnan(), math.inf)
    seen, true = (embed(y) if system.angles else y for y in (motions, truth))
    spread = (true - true.mean((0, 1))).square().sum(-1).mean().sqrt()
    state_error = (seen - true).square().sum(-1).mean(1).sqrt() / spread
    return Rollout(times, motions, error, state_error, found.evaluations)


@dataclass(frozen=True)
class Result:
    """One row of the table; `training`, and what it gave, are None for the true field."""

    system: SystemName
    name: str
    rollout: Rollout
    training: Training | None = None
    test_loss: float | None = None

    @property
    def parameters(self) -> int:
        """The number of trainable parameters."""
        return 0 if self.training is None else sum(p.numel() for p in self.training.field.parameters())


def results_table(results: list[Result], config: Config) -> Table:
    """The comparison, as a table for `rich` to print."""
    table = Table(title="ode-physics", caption=_caption(results, config))
    table.add_column("\nnetwork", no_wrap=True)
    for heading in ("test\nloss", "drift,\nmedian", "drift,\nworst", "error\n1 x", "error\n100 x", "calls\nof f"):
        table.add_column(heading, justify="right", no_wrap=True)
    for system in config.systems:
        table.add_row(f"[bold]{system}")
        for result in (result for result in results if result.system == system):
            rollout = result.rollout
            numbers = (rollout.drift.median(), rollout.drift.max(), *rollout.state_error[[10, -1]])
            table.add_row(
                result.name,
                "" if result.test_loss is None else f"{result.test_loss:.1e}",
                *(f"{number:.1e}" for number in numbers),
                f"{rollout.calls:,}",
                end_section=result.name == TRUE_FIELD,
            )
    return table


def _caption(results: list[Result], config: Config) -> str:
    sizes = [result.parameters for result in results if result.training]
    lines = [
        f"fitted to {config.fit_to}, epochs: {config.epochs}, trajectories: {config.motions}, "
        f"noise: {config.noise:g}, seed: {config.seed}, parameters: {min(sizes):,} to {max(sizes):,}",
        "test loss: mean squared error, relative to the variance",
        f"drift: largest relative |E(t) - E(0)| up to t = {REACH * config.horizon:g}; inf: solver stopped early",
        f"error: relative error of the states at t = {config.horizon:g} and at the end; 1.4: unrelated states",
    ]
    drift = {(result.system, result.name): result.rollout.drift.median() for result in results}
    for (system, name), value in drift.items():
        if (
            name in ("hamiltonian", "lagrangian")
            and (system, "plain") in drift
            and value >= drift[system, "plain"]
        ):
            lines.append(f"Note: on the {system}, {name} is no better than plain")
    return "\n".join(lines)


def draw(results: list[Result], config: Config, folder: Path) -> list[Path]:
    """Write `energy.png`, and `pendulum.png` if there is a pendulum; returns their paths."""
    of: dict[str, dict[str, Rollout]] = {}
    for result in reversed(results):  # the true field comes first
        of.setdefault(result.system, {})[result.name] = result.rollout
    of = {system: of[system] for system in config.systems}
    times = {system: next(iter(fields.values())).times for system, fields in of.items()}
    errors = {
        system: {name: rollout.energy_error.median(1).values for name, rollout in fields.items()}
        for system, fields in of.items()
    }
    figures = {"energy": plot_energy(times, errors, dict.fromkeys(of, config.horizon))}
    if "pendulum" in of:
        motions = {name: rollout.motions for name, rollout in of["pendulum"].items()}
        figures["pendulum"] = plot_phase(motions, "pendulum")
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png")
    return [folder / f"{name}.png" for name in figures]


def main(config: Config) -> list[Result]:
    """Train the networks that `config` names on each system, follow them far, and print how they compare."""
    import matplotlib  # noqa: F401  if it is missing, say so now and not after the training

    console = Console()
    run = run_folder(Path("runs") / "ode-physics", "motion", config.out, config.resume)
    console.print(f"output in {run}")
    results = []
    for system in config.systems:
        console.print(f"{system}: {config.motions} training trajectories of duration {config.horizon:g}")
        of, (times, truth) = SYSTEMS[system], true_motions(SYSTEMS[system], config)
        for name in config.models:
            training, loss = train(name, system, config, run / f"{system.replace(' ', '-')}-{name}")
            results.append(Result(system, name, roll_out(training, of, times, truth, config), training, loss))
        results.append(Result(system, TRUE_FIELD, roll_out(None, of, times, truth, config)))
    console.print(results_table(results, config))
    for path in draw(results, config, run):
        console.print(f"picture: {path}", soft_wrap=True)
    return results
