"""opt-tv: total-variation denoising with weights that are learned through the solution.

Total variation recovers a signal that is constant between jumps from a noisy signal z:

    x = argmin 1/2 sum_i (x_i - z_i)^2 + sum_i w_i |x_(i+1) - x_i|

A single weight has to compromise: a large one removes the noise but also flattens the jumps, a small one keeps
both. With a weight for each edge there is no need to. `im.prox.total_variation` finds x exactly and differentiates
it, so the weights can be learned from pairs of noisy and clean signals by the error of x itself. That is a bilevel
problem (Kunisch and Pock, "A bilevel optimization approach for parameter learning in variational models", SIAM J.
Imaging Sci. 6, 2013).

    one weight    the best of a fine grid, for the training signals
    per place     a weight for each edge, the same in every signal: learns at what time of the day jumps come
    network       a small convolution reads the noisy signal and sets its weights: learns what a jump looks like
    convolution   the same network without total variation; it outputs the signal itself

Each signal is one day. The default signals are synthetic, with few levels and most changes around two times of the
day. With `--signal hvac` they are the supply air flow of a simulated office building (from EnergyPlus, every 15
minutes): trained on the days of one weather year, tested on those of another. Noise is added to both kinds, so
that the truth is known.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import implicitly as im
from implicitly.recipes._options import (
    check_at_least,
    check_each_once,
    check_positive,
    check_seed,
    check_unused,
)
from implicitly.recipes._training import Batches, TrainingBar, quiet_lightning
from implicitly.viz.style import COLOURS, new_figures, title

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Name = Literal["one weight", "per place", "network", "convolution"]

QUARTER_HOURS = 96
FLOW = "Sys In Mdot"  # supply air, kg/s
RANGE = 3.0  # a weight is learned within a factor of exp(RANGE) of the best single one
FILES = ("Sim-TMY2.npz", "Sim-TMY3.npz")  # of the years to train with and to test with


@dataclass(frozen=True)
class Config:
    """Total-variation denoising of a 1-d signal with learned weights, compared with the best single weight."""

    signal: Literal["steps", "hvac"] = "steps"
    """Signals to denoise: synthetic days (steps), or the air flow of a simulated building (hvac)."""
    data: Path | None = None
    """Folder that contains hvac/. Default: the folder in the environment variable IMPLICITLY_DATA."""
    out: Path = Path("runs/opt-tv")
    """Output folder for the picture and weights; files of an earlier run are overwritten."""
    models: tuple[Name, ...] = ("one weight", "per place", "network", "convolution")
    """Denoisers to compare."""

    noise: float = 0.4
    """Standard deviation of the noise, relative to that of the signals."""
    days: int = 256
    """Number of synthetic training days; the test set has as many."""
    epochs: int = 50
    """Passes over the training days."""
    batch_size: int = 32
    """Days per training step."""
    learning_rate: float = 1e-2
    """Initial learning rate of Adam; a cosine schedule lowers it to 0."""
    channels: int = 16
    """Channels in the hidden layers of the networks."""
    seed: int = 0
    """Random seed of the days, the noise, the initial weights and the order of the batches."""
    progress: bool = True
    """Show a progress bar."""

    def __post_init__(self) -> None:
        check_at_least(self, 1, "days", "epochs", "batch_size", "channels")
        check_positive(self, "noise", "learning_rate")
        check_each_once(self, "models")
        check_seed(self)
        if self.signal == "steps":
            check_unused(self, "the days of the signal 'steps' are synthetic", "data")


# --- The signals ------------------------------------------------------------------------------------------


def made_up(days: int, generator: torch.Generator) -> Tensor:
    """Synthetic days `(days, 96)`: a night level, a day level, and up to three steps anywhere.

    The day level lasts from about 7 h to about 18 h.
    """
    hours = torch.arange(QUARTER_HOURS) / 4
    start, end = (torch.tensor([[7.0], [18.0]]) + 0.5 * torch.randn(2, days, generator=generator)).unsqueeze(2)
    height = 1.5 + torch.rand(days, 1, generator=generator)
    x = height * ((hours >= start) & (hours < end))
    for _ in range(3):
        begin, length = torch.rand(2, days, 1, generator=generator) * torch.tensor([22.0, 6.0]).view(2, 1, 1)
        x = x + torch.randn(days, 1, generator=generator) * ((hours >= begin) & (hours < begin + length + 0.5))
    return x


def building(folder: Path | None) -> tuple[Tensor, Tensor]:
    """The air flow on the days of two weather years, each `(364, 96)`, in kg/s; may raise FileNotFoundError."""
    chosen = folder or (Path(os.environ["IMPLICITLY_DATA"]) if os.environ.get("IMPLICITLY_DATA") else None)
    if chosen is None:
        raise FileNotFoundError(
            f"--signal hvac needs hvac/{FILES[0]} and hvac/{FILES[1]}: "
            "give the folder that contains hvac/ with --data"
        )
    years = []
    for file in FILES:
        path = chosen / "hvac" / file
        if not path.exists():
            raise FileNotFoundError(
                f"there is no file {path.absolute()}; give the folder that contains hvac/{file} with --data"
            )
        table = np.load(path)
        flow = table["values"][:, table["columns"].tolist().index(FLOW)]
        whole = len(flow) // QUARTER_HOURS * QUARTER_HOURS
        years.append(torch.from_numpy(flow[:whole]).float().view(-1, QUARTER_HOURS))
    return years[0], years[1]


def signals(config: Config) -> tuple[TensorDataset, TensorDataset]:
    """Noisy and clean days `(N, 96)` for training and for testing, both scaled by the training days."""
    generator = torch.Generator().manual_seed(config.seed)
    if config.signal == "hvac":
        train, test = building(config.data)
    else:
        train, test = (made_up(config.days, generator) for _ in range(2))
    mean, scale = train.mean(), train.std()
    sets = []
    for clean in (train, test):
        clean = (clean - mean) / scale
        sets.append(TensorDataset(clean + config.noise * torch.randn(clean.shape, generator=generator), clean))
    return sets[0], sets[1]


# --- The models -------------------------------------------------------------------------------------------


def best_weight(data: TensorDataset) -> float:
    """The single weight with the least mean squared error, from a grid with steps of 5 %."""
    noisy, clean = data.tensors
    weights = torch.logspace(-2, 1.5, 166, base=10)
    errors = [F.mse_loss(im.prox.total_variation(noisy, w), clean) for w in weights]
    return float(weights[torch.stack(errors).argmin()])


def convolutions(channels: int) -> nn.Sequential:
    """A network from a signal `(B, 1, n)` to one number per edge, `(B, 1, n - 1)`, which is 0 at first.

    It sees 12 entries on each side of an edge.
    """
    last = nn.Conv1d(channels, 1, 2)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)  # pyright: ignore[reportArgumentType]
    return nn.Sequential(
        nn.Conv1d(1, channels, 9, padding=4, padding_mode="replicate"),
        nn.SiLU(),
        nn.Conv1d(channels, channels, 9, padding=4, padding_mode="replicate"),
        nn.SiLU(),
        nn.Conv1d(channels, channels, 9, padding=4, padding_mode="replicate"),
        nn.SiLU(),
        last,
    )


class Denoiser(nn.Module):
    """Total variation with learned weights, which start at the best single one; or a network without it."""

    def __init__(self, name: Name, weight: float, config: Config) -> None:
        super().__init__()
        self.name: Name = name
        self.weight = weight
        if name == "per place":
            self.places = nn.Parameter(torch.zeros(QUARTER_HOURS - 1))
        elif name != "one weight":
            self.network = convolutions(config.channels)

    def weights(self, noisy: Tensor) -> Tensor:
        """The weight of each edge, `(B, n - 1)`, positive."""
        change = torch.zeros_like(noisy[:, 1:])
        if self.name == "per place":
            change = change + self.places
        elif self.name == "network":
            change = self.network(noisy.unsqueeze(1)).squeeze(1)
        return self.weight * (RANGE * torch.tanh(change / RANGE)).exp()

    def forward(self, noisy: Tensor) -> Tensor:
        """The signal without noise, of the shape of `noisy` `(B, n)`."""
        if self.name == "convolution":
            padded = F.pad(noisy.unsqueeze(1), (0, 1), mode="replicate")
            return noisy + self.network(padded).squeeze(1)
        return im.prox.total_variation(noisy, self.weights(noisy))


# --- The training -----------------------------------------------------------------------------------------


class Training(L.LightningModule):
    """Trains one denoiser."""

    def __init__(self, model: Denoiser, data: TensorDataset, config: Config) -> None:
        super().__init__()
        self.model = model
        self.days = data
        self.config = config
        self.noise = torch.Generator().manual_seed(config.seed)

    def train_dataloader(self) -> Batches:
        """The batches of one epoch, in an order of its own."""
        seed = 1_000_003 * self.config.seed + self.current_epoch
        return Batches(self.days, torch.arange(len(self.days)), self.config.batch_size, seed)

    def configure_optimizers(self) -> Any:
        """Adam, with a cosine schedule that lowers the learning rate to zero."""
        optimizer = torch.optim.Adam(self.parameters(), lr=self.config.learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.config.epochs)
        return [optimizer], [schedule]

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The mean squared error of one batch, with freshly drawn noise."""
        clean = batch[1]
        noisy = clean + self.config.noise * torch.randn(clean.shape, generator=self.noise)
        loss = F.mse_loss(self.model(noisy), clean)
        self.log("train/loss", loss, on_step=False, on_epoch=True, batch_size=len(noisy), prog_bar=True)
        return loss


@dataclass(frozen=True)
class Result:
    """One row of the table, and the trained denoiser."""

    model: Denoiser
    train_error: float  # mean squared error, relative to that of the noisy signal
    test_error: float
    jumps: float  # mean number in a test day


def fit(name: Name, train: TensorDataset, test: TensorDataset, weight: float, config: Config) -> Result:
    """Train one denoiser, and test it."""
    L.seed_everything(config.seed, verbose=False)
    model = Denoiser(name, weight, config)
    if name != "one weight":
        with quiet_lightning():
            trainer = L.Trainer(
                accelerator="cpu",  # a GPU would mostly wait, with so few numbers
                max_epochs=config.epochs,
                reload_dataloaders_every_n_epochs=1,
                callbacks=[TrainingBar(name.ljust(11))] if config.progress else [],
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=config.progress,
                enable_model_summary=False,
            )
            trainer.fit(Training(model, train, config))
    return evaluate(model, train, test)


@torch.no_grad()
def evaluate(model: Denoiser, train: TensorDataset, test: TensorDataset) -> Result:
    """Measure a denoiser on both sets."""
    model = model.eval()
    errors = []
    for data in (train, test):
        noisy, clean = data.tensors
        errors.append(float(F.mse_loss(model(noisy), clean) / F.mse_loss(noisy, clean)))
    return Result(model, errors[0], errors[1], jumps_of(model(test.tensors[0])))


def jumps_of(x: Tensor) -> float:
    """The mean number of neighbours that differ by more than 0.01 in the signals `(B, n)`."""
    return float((x.diff(dim=1).abs() > 0.01).float().sum(1).mean())


# --- Picture and table ------------------------------------------------------------------------------------


@torch.no_grad()
def draw(results: list[Result], test: TensorDataset) -> Figure:
    """Draw one test day as each denoiser sees it, with the weights of its edges under it."""
    noisy, clean = (tensor[:1] for tensor in test.tensors)
    hours = torch.arange(QUARTER_HOURS) / 4
    figure, panels = new_figures(3.9 * len(results), 4.2, len(results))
    top, bottom = float(noisy.max()), float(noisy.min())
    band = 0.4 * (top - bottom)  # under the signal, for the weights
    for axes, result in zip(panels, results):
        name = result.model.name
        axes.plot(hours, noisy[0], ".", color=COLOURS.grey, markersize=3, alpha=0.6)
        axes.step(hours, clean[0], where="mid", color=COLOURS.ink, linewidth=1, linestyle=(0, (4, 3)))
        axes.step(hours, result.model(noisy)[0], where="mid", color=COLOURS.main, linewidth=2)
        if name != "convolution":
            exponent = (result.model.weights(noisy)[0] / result.model.weight).log() / RANGE  # -1 to 1
            base = bottom - 1.1 * band
            axes.fill_between(
                hours[1:] - 0.125, base, base + band / 2 * (1 + exponent), color=COLOURS.warm, alpha=0.5
            )
            axes.axhline(base + band / 2, color=COLOURS.warm, linewidth=1)
        axes.set_xlim(0, 24)
        axes.set_ylim(bottom - 1.15 * band, top + 0.1 * band)
        axes.set_xticks(range(0, 25, 6))
        axes.set_yticks([tick for tick in axes.get_yticks() if bottom <= tick <= top])
        axes.set_xlabel("hour" if name == "convolution" else "hour; orange: log weight; line: best single weight")
        title(axes, name, f"{_percent(result.test_error)} of the noise remains")
    return figure


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def results_table(results: list[Result], test: TensorDataset, weight: float, config: Config) -> Table:
    """The comparison, as a table for `rich` to print."""
    caption = (
        f"error: mean squared error, relative to that of the noisy signal (noise {config.noise:g} of the signal)\n"
        f"the best single weight is {weight:.3g}; training: {config.epochs} epochs, seed {config.seed}\n"
        f"jumps: mean number per test day; the clean days have {jumps_of(test.tensors[1]):.1f}"
    )
    table = Table(title=f"opt-tv: {config.signal}", caption=caption)
    table.add_column("\nweights", no_wrap=True)
    for heading in ("training\nerror", "test\nerror", "\njumps", "para-\nmeters"):
        table.add_column(heading, justify="right", no_wrap=True)
    for result in results:
        count = sum(p.numel() for p in result.model.parameters()) or 1
        errors = _percent(result.train_error), _percent(result.test_error)
        table.add_row(result.model.name, *errors, f"{result.jumps:.1f}", f"{count:,}")
    return table


def main(config: Config) -> list[Result]:
    """Fit the denoisers that `config` names, draw one day of each, and print how they compare."""
    console = Console()
    train, test = signals(config)
    config.out.mkdir(parents=True, exist_ok=True)
    weight = best_weight(train)
    results = [fit(name, train, test, weight, config) for name in config.models]
    for result in results:
        torch.save(result.model.state_dict(), config.out / f"{result.model.name.replace(' ', '-')}.pt")
    draw(results, test).savefig(config.out / "day.png")
    console.print(results_table(results, test, weight, config))
    console.print(f"picture and weights are in {config.out.absolute()}", highlight=False, soft_wrap=True)
    return results
