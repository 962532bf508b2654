"""ode-easy: of all fields that lead from x to x^3, learn one that is easy to solve.

Many vector fields have the same flow from t = 0 to 1, but their trajectories bend differently on the way. The loss
sees only the end; the solver pays for the bends. Kelly, Bettencourt, Johnson and Duvenaud, "Learning Differential
Equations that are Easy to Solve", NeurIPS 2020 (arXiv:2007.04504), add the integral of |d^K y/dt^K|^2 to the loss,
which Taylor mode computes at little cost. Two networks are trained to map x to x^3 on [-1, 1]:

    free      by the mean squared error alone
    penalised with the integral added

The hidden weights start large, so that the field has bends to lose: with the usual ones, this toy problem is easy
from the start. Both networks train with constant steps until the error falls below a target, and are tested with
an adaptive solver at a tight tolerance.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import lightning as L
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import implicitly as im
from implicitly import viz
from implicitly.recipes._options import (
    check_at_least,
    check_each_once,
    check_positive,
    check_seed,
    check_tolerance,
)
from implicitly.recipes._training import Batches, TrainingBar, quiet_lightning

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Name = Literal["free", "penalised"]


@dataclass(frozen=True)
class Config:
    """A neural ODE that learns x -> x^3, with and without a penalty that makes it cheaper to solve."""

    names: tuple[Name, ...] = ("free", "penalised")
    """Networks to train."""
    out: Path = Path("runs/ode-easy")
    """Output folder for the picture and weights; files of an earlier run are overwritten."""

    order: int = 3
    """Order K of the time derivative d^K y/dt^K that is penalised."""
    weight: float = 1e-3
    """Weight of the penalty in the loss."""
    target: float = 5e-4
    """Stop training when the mean squared error falls below this, to compare calls of f at equal loss."""
    steps: int = 600
    """Maximum number of training steps; each uses all points."""
    points: int = 64
    """Number of training points, evenly spaced."""
    learning_rate: float = 1e-2
    """Initial learning rate of Adam; a cosine schedule lowers it to 0."""
    seed: int = 0
    """Random seed of the initial weights."""
    progress: bool = True
    """Show a progress bar."""

    width: int = 32
    """Units in each of the two hidden layers of f."""
    gain: float = 6.0
    """Gain of the Xavier initialisation of the hidden layers."""
    dt: float = 0.125
    """Step size of the classical Runge-Kutta method (RK4) in training."""
    tolerance: float = 1e-8
    """Relative and absolute tolerance of Dopri5 in testing."""

    def __post_init__(self) -> None:
        check_at_least(self, 1, "order", "steps", "points", "width")
        check_positive(self, "weight", "target", "learning_rate", "gain", "dt")
        check_tolerance(self, torch.finfo(torch.float64).eps, "tolerance")
        check_each_once(self, "names")
        check_seed(self)


def build(config: Config) -> im.nn.NeuralODE:
    """dy/dt = f(t, y) on the line from t = 0 to 1, with fresh weights; solved as in training."""
    net = nn.Sequential(
        nn.Linear(2, config.width),
        nn.Tanh(),
        nn.Linear(config.width, config.width),
        nn.Tanh(),
        nn.Linear(config.width, 1),
    )
    for layer in net:
        if isinstance(layer, nn.Linear):
            nn.init.xavier_normal_(layer.weight, config.gain if layer is not net[-1] else 1.0)
    # With so few numbers memory is no concern, and recording all states is faster than computing them again.
    return im.nn.NeuralODE(im.nn.ConcatTime(net), solver=im.RK4(dt=config.dt), adjoint=im.UnrolledAdjoint())


class Training(L.LightningModule):
    """Trains one network."""

    def __init__(self, name: Name, config: Config) -> None:
        super().__init__()
        self.name: Name = name
        self.config = config
        self.flow = build(config)
        if name == "penalised":
            self.flow.regularisers = (im.nn.TaylorPenalty(config.order),)
        x = torch.linspace(-1, 1, config.points).unsqueeze(1)
        self.points = TensorDataset(x, x**3)

    def train_dataloader(self) -> Batches:
        """All points at once."""
        return Batches(self.points, torch.arange(len(self.points)), len(self.points))

    def configure_optimizers(self) -> Any:
        """Adam, with a cosine schedule that lowers the learning rate to zero."""
        optimizer = torch.optim.Adam(self.parameters(), lr=self.config.learning_rate)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.config.steps)]

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of all points."""
        x, target = batch
        if self.name == "free":
            loss = total = F.mse_loss(self.flow(x), target)
        else:
            end, (penalty,) = self.flow(x)
            loss = F.mse_loss(end, target)
            total = loss + self.config.weight * penalty.mean()
        if loss.item() < self.config.target:
            self.trainer.should_stop = True
        self.log("train/loss", loss, batch_size=len(x), prog_bar=True)
        return total


@dataclass(frozen=True)
class Result:
    """One row of the table, and the trained network."""

    name: Name
    flow: im.nn.NeuralODE
    steps: int  # of training
    loss: float  # mean squared error of test points
    penalty: float  # mean over test points
    calls: int  # of f, for all test points at once


def fit(name: Name, config: Config) -> Result:
    """Train one network, and test it."""
    L.seed_everything(config.seed, verbose=False)  # for each network: both start with the same weights
    training = Training(name, config)
    with quiet_lightning():
        trainer = L.Trainer(
            accelerator="cpu",  # a GPU would mostly wait, with so few numbers
            max_epochs=config.steps,
            callbacks=[TrainingBar(name.ljust(9))] if config.progress else [],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=config.progress,
            enable_model_summary=False,
        )
        trainer.fit(training)
    return evaluate(name, training.flow, trainer.global_step, config)


@torch.no_grad()
def evaluate(name: Name, flow: im.nn.NeuralODE, steps: int, config: Config) -> Result:
    """Measure a trained network, in double precision, on points between those of the training."""
    flow = flow.double().eval()
    flow.solver = im.Dopri5(rtol=config.tolerance, atol=config.tolerance)
    grid = torch.linspace(-1, 1, config.points + 1, dtype=torch.float64)
    x = (grid[1:] + grid[:-1]).unsqueeze(1) / 2
    flow.regularisers = (im.nn.TaylorPenalty(config.order),)
    end, (penalty,) = flow(x)
    flow.regularisers = ()
    flow(x)
    return Result(name, flow, steps, F.mse_loss(end, x**3).item(), penalty.mean().item(), flow.evaluations)


# --- Picture and table ------------------------------------------------------------------------------------


@torch.no_grad()
def draw(results: list[Result]) -> Figure:
    """Draw where each network takes points between -1 and 1, over time."""
    x = torch.linspace(-1, 1, 21, dtype=torch.float64).unsqueeze(1)
    times = torch.linspace(0, 1, 101).tolist()
    trajectories = {result.name: (times, result.flow(x, t=times)[:, :, 0]) for result in results}
    subtitles = {result.name: f"{result.calls} calls of f, loss {result.loss:.1e}" for result in results}
    return viz.plot_trajectories(trajectories, x[:, 0] ** 3, subtitles, "y(t), from x to x³ (rings)")


def results_table(results: list[Result], config: Config) -> Table:
    """The comparison, as a table for `rich` to print."""
    caption = (
        f"training stops at a loss of {config.target:g}, or after {config.steps} steps; seed {config.seed}\n"
        f"penalised: with weight {config.weight:g}\n"
        f"calls of f: by Dopri5 with tolerance {config.tolerance:g}, for all test points at once"
    )
    table = Table(title="ode-easy: x to x³", caption=caption)
    table.add_column("\nnetwork", no_wrap=True)
    for heading in (
        "test\nloss",
        f"mean of\n∫|d^{config.order}y/dt^{config.order}|²",
        "calls\nof f",
        "training\nsteps",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for result in results:
        table.add_row(
            result.name, f"{result.loss:.2e}", f"{result.penalty:.3g}", str(result.calls), str(result.steps)
        )
    return table


def main(config: Config) -> list[Result]:
    """Train the networks that `config` names, draw their trajectories, and print how they compare."""
    console = Console()
    config.out.mkdir(parents=True, exist_ok=True)
    results = [fit(name, config) for name in config.names]
    for result in results:
        torch.save(result.flow.state_dict(), config.out / f"{result.name}.pt")
    draw(results).savefig(config.out / "trajectories.png")
    console.print(results_table(results, config))
    console.print(f"picture and weights are in {config.out.absolute()}", highlight=False, soft_wrap=True)
    return results
