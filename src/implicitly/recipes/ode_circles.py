"""ode-circles: what the flow of a differential equation cannot do, and what extra dimensions change.

Trajectories of dy/dt = f(y) never cross. Hence a flow in the plane cannot pull a disc out of the ring around it,
and a flow on the line keeps points in order: it can become any increasing map, but x^2 is not increasing. Dupont,
Doucet and Teh, "Augmented Neural ODEs", NeurIPS 2019, append zeros to the state, so that trajectories can pass
each other in the extra dimensions. There are two tasks, and three networks are trained for each:

    circles    which points lie on the disc? The readout is linear, so the flow must separate the two
    square     x -> x^2 for x from -2 to 2; the readout is the state itself, so the flow must be that map

    plain      a neural ODE in the dimensions of the data
    augmented  the same with one more dimension, which starts at zero
    resnet     y <- y + f_k(y): a step of finite length may jump over another path
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EarlyStopping
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import implicitly as im
from implicitly import viz
from implicitly.recipes._options import (
    check_at_least,
    check_each_once,
    check_not_negative,
    check_positive,
    check_seed,
    check_tolerance,
)
from implicitly.recipes._training import Batches, TrainingBar, quiet_lightning

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Task = Literal["circles", "square"]
Network = Literal["plain", "augmented", "resnet"]


@dataclass(frozen=True)
class Config:
    """Maps that a neural ODE cannot represent but an augmented one can: separate a disc from a ring, square x."""

    tasks: tuple[Task, ...] = ("circles", "square")
    """Tasks to train on."""
    networks: tuple[Network, ...] = ("plain", "augmented", "resnet")
    """Networks to train."""
    out: Path = Path("runs/ode-circles")
    """Output folder for pictures and weights; files of an earlier run are overwritten."""

    epochs: int = 24
    """Maximum number of passes over the training points."""
    stop_circles: float = 0.05
    """On the circles, stop training when the mean cross-entropy of an epoch falls below this."""
    stop_square: float = 0.02
    """On the square, stop training when the mean squared error of an epoch falls below this."""
    energy: float = 0.01
    """Weight of the kinetic-energy penalty in the loss on the circles; it favours short, straight paths."""
    points: int = 2000
    """Number of training points; the test set has as many."""
    batch_size: int = 250
    """Points per training step."""
    learning_rate: float = 2e-2
    """Initial learning rate of Adam; a cosine schedule lowers it to 0."""
    seed: int = 0
    """Random seed of the points, the initial weights and the order of the batches."""
    progress: bool = True
    """Show a progress bar."""

    width: int = 32
    """Units in each of the two hidden layers of f."""
    augment: int = 1
    """Extra dimensions of the augmented network."""
    blocks: int = 5
    """Number of residual blocks in the ResNet."""
    rtol: float = 1e-3
    """Relative and absolute tolerance of the ODE solver in training and testing."""

    def __post_init__(self) -> None:
        check_at_least(self, 1, "epochs", "points", "batch_size", "width", "augment", "blocks")
        check_not_negative(self, "stop_circles", "stop_square", "energy")
        check_positive(self, "learning_rate")
        check_tolerance(self, torch.finfo(torch.float32).eps, "rtol")
        check_each_once(self, "tasks", "networks")
        check_seed(self)


def circles(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Points `(count, 2)` and their classes: half on the disc of radius 0.5, half on the ring between 1 and 1.5.

    The targets `(count, 1)` are 1 on the disc, 0 on the ring.
    """
    disc = torch.arange(count) % 2 == 0
    radius, angle = torch.rand(2, count, generator=generator)
    radius = torch.where(disc, 0.5 * radius.sqrt(), (1 + 1.25 * radius).sqrt())  # evenly over each area
    angle = 2 * torch.pi * angle
    return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1), disc.float().unsqueeze(1)


def square(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Points x `(count, 1)` between -2 and 2, and x^2."""
    x = 4 * torch.rand(count, 1, generator=generator) - 2
    return x, x**2


def held_out(task: Task, config: Config) -> tuple[Tensor, Tensor]:
    """Points and targets that training does not see."""
    return _points(task, config, 2 * config.seed + 1)


def _points(task: Task, config: Config, seed: int) -> tuple[Tensor, Tensor]:
    return (circles if task == "circles" else square)(config.points, torch.Generator().manual_seed(seed))


def least_loss_of_increasing(x: Tensor, y: Tensor) -> float:
    """The least mean squared error at the points `(N, 1)` that an increasing map of the line can have."""
    from sklearn.isotonic import IsotonicRegression

    x, y = x[:, 0].double(), y[:, 0].double()
    fitted = torch.from_numpy(IsotonicRegression().fit_transform(x.numpy(), y.numpy()))
    return float(F.mse_loss(fitted, y))


# --- The networks -----------------------------------------------------------------------------------------


def perceptron(dimensions: int, width: int) -> nn.Sequential:
    """f, with two hidden layers."""
    return nn.Sequential(
        nn.Linear(dimensions, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, dimensions)
    )


class ResNet(nn.Module):
    """y <- y + f_k(y), `blocks` times."""

    def __init__(self, dimensions: int, width: int, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(perceptron(dimensions, width) for _ in range(blocks))

    def states(self, x: Tensor) -> Tensor:
        """`(blocks + 1, B, n)`: x, and the state after each block."""
        states = [x]
        for f in self.blocks:
            states.append(states[-1] + f(states[-1]))
        return torch.stack(states)

    def forward(self, x: Tensor) -> Tensor:
        """The last state, of the shape of `x` `(B, n)`."""
        return self.states(x)[-1]


class First(nn.Module):
    """The first coordinate `(B, 1)`."""

    def forward(self, y: Tensor) -> Tensor:
        """`y[:, :1]`."""
        return y[:, :1]


class Model(nn.Module):
    """A flow and a readout."""

    def __init__(self, task: Task, name: Network, config: Config) -> None:
        super().__init__()
        dimensions = 2 if task == "circles" else 1
        extra = config.augment if name == "augmented" else 0
        if name == "resnet":
            self.flow = ResNet(dimensions, config.width, config.blocks)
        else:
            f = im.nn.Autonomous(perceptron(dimensions + extra, config.width))
            solver = im.Dopri5(rtol=config.rtol, atol=config.rtol)
            self.flow = im.nn.NeuralODE(f, solver=solver, augment=extra, regularisers=(im.nn.KineticEnergy(),))
        self.readout = nn.Linear(dimensions + extra, 1) if task == "circles" else First()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits or values `(B, 1)` for points `(B, n)`, and the kinetic energy `(B,)`, 0 for a ResNet."""
        if isinstance(self.flow, ResNet):
            return self.readout(self.flow(x)), x.new_zeros(len(x))
        end, (energy,) = self.flow(x)
        return self.readout(end), energy

    def paths(self, x: Tensor) -> tuple[list[float], Tensor]:
        """Times between 0 and 1, and the states `(T, B, n)` on the way from `x`."""
        if isinstance(self.flow, ResNet):
            states = self.flow.states(x)
            return torch.linspace(0, 1, len(states)).tolist(), states
        times = torch.linspace(0, 1, 41)
        return times.tolist(), self.flow(x, t=times)[0]

    def calls(self) -> tuple[int, int]:
        """Calls of f in the last forward pass and in its backward pass."""
        if isinstance(self.flow, ResNet):
            return len(self.flow.blocks), 0
        return self.flow.evaluations, self.flow.backward_evaluations


# --- The training -----------------------------------------------------------------------------------------


class Training(L.LightningModule):
    """Trains one network for one task."""

    def __init__(self, task: Task, name: Network, config: Config) -> None:
        super().__init__()
        self.task: Task = task
        self.config = config
        self.model = Model(task, name, config)
        self.points = TensorDataset(*_points(task, config, 2 * config.seed))

    def train_dataloader(self) -> Batches:
        """The batches of one epoch, in an order of its own."""
        seed = 1_000_003 * self.config.seed + self.current_epoch
        return Batches(self.points, torch.arange(len(self.points)), self.config.batch_size, seed)

    def configure_optimizers(self) -> Any:
        """Adam, with a cosine schedule that lowers the learning rate to zero."""
        optimizer = torch.optim.Adam(self.parameters(), lr=self.config.learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.config.epochs)
        return [optimizer], [schedule]

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of one batch."""
        output, energy = self.model(batch[0])
        loss = loss_of(self.task, output, batch[1])
        self.log("train/loss", loss, on_step=False, on_epoch=True, batch_size=len(batch[0]), prog_bar=True)
        return loss + self.config.energy * energy.mean() if self.task == "circles" else loss


def loss_of(task: Task, output: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy for the circles, mean squared error for the square."""
    if task == "circles":
        return F.binary_cross_entropy_with_logits(output, target)
    return F.mse_loss(output, target)


@dataclass(frozen=True)
class Result:
    """One row of the table, and the trained network."""

    task: Task
    name: Network
    model: Model
    epochs: int
    loss: float  # of test points
    accuracy: float | None  # of test points, on the circles
    energy: float  # mean over test points, 0 for a ResNet
    forward_calls: int  # of f, for all test points at once
    backward_calls: int


def fit(task: Task, name: Network, config: Config) -> Result:
    """Train one network for one task, and test it."""
    L.seed_everything(config.seed, verbose=False)  # for each network, so that none depends on the others
    training = Training(task, name, config)
    callbacks: list[L.Callback] = [
        EarlyStopping(
            "train/loss",
            stopping_threshold=config.stop_circles if task == "circles" else config.stop_square,
            patience=config.epochs,  # a loss that does not fall is a result here
            check_on_train_epoch_end=True,
        )
    ]
    if config.progress:
        callbacks.append(TrainingBar(f"{task} {name}".ljust(17)))
    with quiet_lightning():
        trainer = L.Trainer(
            accelerator="cpu",  # a GPU would mostly wait, with so few numbers
            max_epochs=config.epochs,
            reload_dataloaders_every_n_epochs=1,
            callbacks=callbacks,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=config.progress,
            enable_model_summary=False,
        )
        trainer.fit(training)
    return evaluate(task, name, training.model, trainer.current_epoch, config)


def evaluate(task: Task, name: Network, model: Model, epochs: int, config: Config) -> Result:
    """Measure a trained network on points that it has not seen."""
    x, target = held_out(task, config)
    if isinstance(model.flow, im.nn.NeuralODE):  # count the calls of a backward pass that takes the steps again
        model.flow.adjoint = im.RecursiveCheckpointAdjoint(keep_bytes=0)
    output, energy = model.eval()(x)
    loss = loss_of(task, output, target)
    loss.backward()
    accuracy = float(((output > 0) == (target > 0.5)).float().mean()) if task == "circles" else None
    return Result(task, name, model, epochs, loss.item(), accuracy, energy.mean().item(), *model.calls())


# --- Pictures and table -----------------------------------------------------------------------------------


def draw_circles(results: list[Result], config: Config) -> Figure:
    """Draw the data, and its flow through each network, seen along the plane that separates the classes."""
    x, target = (points[:600] for points in held_out("circles", config))
    flows, subtitles = {"data": x.unsqueeze(0)}, {"data": "a disc in a ring"}
    for result in results:
        readout = result.model.readout
        assert isinstance(readout, nn.Linear)  # that of this task
        with torch.no_grad():
            _, states = result.model.paths(x)
            flows[result.name] = viz.facing(states, readout.weight[0], float(readout.bias))
        assert result.accuracy is not None
        subtitles[result.name] = f"{_percent(result.accuracy)} right, {result.forward_calls} calls of f"
    return viz.plot_flows(flows, 1 - target[:, 0].long(), subtitles)


def draw_square(results: list[Result]) -> Figure:
    """Draw where each network takes points between -2 and 2, over time."""
    x = torch.linspace(-2, 2, 21).unsqueeze(1)
    trajectories, subtitles = {}, {}
    for result in results:
        with torch.no_grad():
            times, states = result.model.paths(x)
        trajectories[result.name] = times, states[:, :, 0]
        subtitles[result.name] = f"mean squared error {result.loss:.3g}"
    return viz.plot_trajectories(trajectories, x[:, 0] ** 2, subtitles, "y(t), from x to x² (rings)")


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def results_table(results: list[Result], config: Config) -> Table:
    """The comparison, as a table for `rich` to print."""
    caption = [f"{config.points} points, batch size {config.batch_size}, seed {config.seed}"]
    caption.append(
        f"training stops after {config.epochs} epochs, or at a loss of {config.stop_circles:g} (circles) or "
        f"{config.stop_square:g} (square)"
    )
    caption.append("calls of f: forward + backward, for all test points at once")
    caption.append("energy: the integral of |f|² along the path, mean over test points")
    if "square" in config.tasks:
        least = least_loss_of_increasing(*held_out("square", config))
        caption.append(f"no increasing function has a loss below {least:.3f} on the square")
    table = Table(title="ode-circles", caption="\n".join(caption))
    for heading in ("\ntask", "\nnetwork"):
        table.add_column(heading, no_wrap=True)
    for heading in ("test\nloss", "\naccuracy", "calls\nof f", "\nenergy", "\nepochs", "para-\nmeters"):
        table.add_column(heading, justify="right", no_wrap=True)
    for result in results:
        table.add_row(
            result.task,
            result.name,
            f"{result.loss:.4f}",
            "" if result.accuracy is None else _percent(result.accuracy),
            f"{result.forward_calls} + {result.backward_calls}",
            f"{result.energy:.1f}" if result.energy else "",
            str(result.epochs),
            f"{sum(p.numel() for p in result.model.parameters()):,}",
        )
    return table


def main(config: Config) -> list[Result]:
    """Train the networks that `config` names, draw their flows, and print how they compare."""
    console = Console()
    results = run(config)
    console.print(results_table(results, config))
    console.print(f"pictures and weights are in {config.out.absolute()}", highlight=False, soft_wrap=True)
    return results


def run(config: Config) -> list[Result]:
    """Train the networks that `config` names, and write a picture for each task and the weights."""
    config.out.mkdir(parents=True, exist_ok=True)
    results = [fit(task, name, config) for task in config.tasks for name in config.networks]
    for result in results:
        torch.save(result.model.state_dict(), config.out / f"{result.task}-{result.name}.pt")
    for task in config.tasks:
        of_task = [result for result in results if result.task == task]
        figure = draw_circles(of_task, config) if task == "circles" else draw_square(of_task)
        figure.savefig(config.out / f"{task}.png")
    return results
