"""opt-sudoku: a quadratic program that learns the rules of Sudoku from solved boards alone.

The network is a single layer, an optimisation problem (Amos and Kolter, "OptNet: Differentiable Optimization as a
Layer in Neural Networks", ICML 2017, section 4.4). Each entry of a 4x4 board is one of four digits, so a board is
64 numbers. The puzzle has a 1 for each clue, and the layer fills it in:

    z = argmin  ridge/2 |z|^2 - puzzle'z   subject to   A z = A z0,  z >= 0

Nobody tells the layer that rows, columns and blocks hold each digit once. These rules are linear equations, and
the weight A `(40, 64)`, random at first, comes to state them, or equivalent ones. With A z0 on the right-hand
side, for a learned z0 > 0, there is always a feasible point. The largest of the four numbers of an entry is read
as its digit.

For comparison an explicit network is trained, a stack of convolutions as in the paper. Both see the same boards,
and are tested with two sets of others:

    known     new puzzles, whose solutions were those of other puzzles in the training
    new       puzzles whose solutions were set aside: memory does not help, rules do
"""

from __future__ import annotations

import time
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
from implicitly.data import SudokuBoards, solutions4, sudoku4
from implicitly.recipes._options import (
    OptionError,
    check_at_least,
    check_each_once,
    check_positive,
    check_seed,
)
from implicitly.recipes._training import Batches, TrainingBar, quiet_lightning

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Network = Literal["optnet", "conv"]
CHUNK = 250  # boards that are tested at once


@dataclass(frozen=True)
class Config:
    """A quadratic program that learns the rules of 4x4 Sudoku from examples, compared with a convolutional net."""

    networks: tuple[Network, ...] = ("optnet", "conv")
    """Networks to train."""
    data: Path | None = None
    """Folder that contains sudoku4_optnet/. Default: the folder in the environment variable IMPLICITLY_DATA; if
    that is not set, boards are generated."""
    out: Path = Path("runs/opt-sudoku")
    """Output folder for pictures and weights; files of an earlier run are overwritten."""

    boards: int = 4000
    """Number of training boards; the others are for testing."""
    held_out: float = 0.1
    """Fraction of the 288 solutions that are held out, with all their puzzles, for testing."""
    batch_size: int = 100
    """Boards per training step."""
    epochs: int = 6
    """Passes over the training boards for the OptNet."""
    conv_epochs: int = 20
    """Passes over the training boards for the convolutional network, which trains faster."""
    learning_rate: float = 3e-2
    """Initial learning rate of Adam for the OptNet; a cosine schedule lowers it to 0."""
    conv_learning_rate: float = 3e-3
    """Initial learning rate of Adam for the convolutional network."""
    seed: int = 0
    """Random seed of the initial weights, the data split and the order of the batches."""
    progress: bool = True
    """Show a progress bar."""

    equations: int = 40
    """Rows of A. The rules of Sudoku have rank 40: fewer rows cannot express them; more exclude valid boards."""
    ridge: float = 0.1
    """Weight of |z|^2 in the objective; without it, z would not be a continuous function of A."""
    channels: int = 32
    """Channels in each hidden layer of the convolutional network."""
    layers: int = 5
    """Number of hidden layers in the convolutional network."""

    def __post_init__(self) -> None:
        check_at_least(self, 1, "boards", "batch_size", "epochs", "conv_epochs", "equations", "channels", "layers")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out must lie between 0 and 1; got {self.held_out}")
        check_positive(self, "learning_rate", "conv_learning_rate", "ridge")
        check_each_once(self, "networks")
        check_seed(self)


# --- The boards -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Splits:
    """Boards for training and testing: pairs of puzzles and solutions, each float32 `(count, 4, 4, 4)`."""

    train: TensorDataset
    known: TensorDataset  # other puzzles, whose solutions may be among those of the training
    new: TensorDataset  # puzzles whose solutions are not
    name: str


def split(boards: SudokuBoards, config: Config) -> Splits:
    """Set aside some solutions with all their puzzles, and take the training boards from the others.

    Raises:
        OptionError: there are no boards left to train or to test with.
    """
    generator = torch.Generator().manual_seed(config.seed)
    _, which = boards.solutions.flatten(1).unique(dim=0, return_inverse=True)
    solutions = int(which.max()) + 1
    aside = torch.randperm(solutions, generator=generator)[: max(1, round(config.held_out * solutions))]
    order = torch.randperm(len(boards), generator=generator)
    new = torch.isin(which[order], aside)
    train, known = order[~new][: config.boards], order[~new][config.boards :]
    if not len(train):
        raise OptionError(f"held_out={config.held_out:g} leaves no boards for training; try a smaller fraction")
    if not len(known):
        raise OptionError(
            f"boards must leave some of the {len(order[~new])} boards for testing; got {config.boards}"
        )
    train, known, new = (
        TensorDataset(boards.puzzles[rows], boards.solutions[rows]) for rows in (train, known, order[new])
    )
    return Splits(train, known, new, boards.name)


# --- The networks -----------------------------------------------------------------------------------------


class OptNet(nn.Module):
    """The quadratic program, with learned `A` `(equations, 64)` and `log_z0` `(64,)`; in float64."""

    Q: Tensor
    G: Tensor
    h: Tensor

    def __init__(self, equations: int, ridge: float) -> None:
        super().__init__()
        self.A = nn.Parameter(0.1 + 0.2 * torch.rand(equations, 64, dtype=torch.float64))
        self.log_z0 = nn.Parameter(torch.full((64,), 0.25, dtype=torch.float64).log())
        self.register_buffer("Q", ridge * torch.eye(64, dtype=torch.float64))
        self.register_buffer("G", -torch.eye(64, dtype=torch.float64))
        self.register_buffer("h", torch.zeros(64, dtype=torch.float64))
        self.programs, self.unsolved = 0, 0  # so far

    def forward(self, puzzles: Tensor) -> Tensor:
        """z for puzzles `(B, 4, 4, 4)`, in the same shape."""
        p = -puzzles.flatten(1).to(self.A.dtype)
        b = self.A @ self.log_z0.exp()
        # A program that ends a little short of the tolerance is counted, but is no reason to end the training.
        solution = im.qp(self.Q, p, self.G, self.h, self.A, b, on_failure="ignore")
        self.programs += len(p)
        self.unsolved += int((~solution.converged).sum())
        return solution.value.view_as(puzzles)


class Conv(nn.Module):
    """3x3 convolutions over the board, and a softmax over the digits of each entry."""

    def __init__(self, channels: int, layers: int) -> None:
        super().__init__()
        parts: list[nn.Module] = []
        width = 4
        for _ in range(layers):
            parts += [nn.Conv2d(width, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU()]
            width = channels
        self.body = nn.Sequential(*parts, nn.Conv2d(width, 4, 1))

    def forward(self, puzzles: Tensor) -> Tensor:
        """Weights of the digits for puzzles `(B, 4, 4, 4)`, in the same shape."""
        return self.body(puzzles.movedim(-1, 1)).softmax(dim=1).movedim(1, -1)


def are_wrong(z: Tensor, solutions: Tensor) -> Tensor:
    """Which boards `(B,)` have a wrong digit, where the largest number of an entry is read as its digit."""
    return (z.argmax(dim=-1) != solutions.argmax(dim=-1)).flatten(1).any(dim=1)


def rules_found(A: Tensor) -> float:
    """How much of the rules the rows of A span: the mean squared cosine of the principal angles between the two.

    It is 1 if A states the rules and nothing else. For random rows it is their number divided by 64.
    """
    solutions = solutions4().flatten(1).to(A)
    # The rules are all linear equations that hold for every solution: what is orthogonal to differences of
    # solutions.
    basis = torch.linalg.svd(solutions - solutions.mean(dim=0)).Vh
    rules = basis[torch.linalg.matrix_rank(solutions - solutions.mean(dim=0)) :]
    cosines = torch.linalg.svdvals(rules @ torch.linalg.qr(A.T).Q)
    return float(cosines.square().sum() / len(rules))


# --- The training -----------------------------------------------------------------------------------------


class Training(L.LightningModule):
    """Trains one network, and tests it now and then with boards whose solutions are new."""

    def __init__(self, name: Network, config: Config, splits: Splits) -> None:
        super().__init__()
        self.name: Network = name
        self.config = config
        self.splits = splits
        optnet = name == "optnet"
        self.model = OptNet(config.equations, config.ridge) if optnet else Conv(config.channels, config.layers)
        self.steps_per_epoch = -(-len(splits.train) // config.batch_size)
        self.epochs = config.epochs if optnet else config.conv_epochs
        self.learning_rate = config.learning_rate if optnet else config.conv_learning_rate
        self.curve: list[tuple[float, float]] = []
        self.seconds = 0.0  # in training steps
        self.next_test = 1  # the next step after which to test

    def train_dataloader(self) -> Batches:
        """The batches of one epoch, in an order of its own."""
        seed = 1_000_003 * self.config.seed + self.current_epoch
        train = self.splits.train
        return Batches(train, torch.arange(len(train)), self.config.batch_size, seed)

    def configure_optimizers(self) -> Any:
        """Adam, with a cosine schedule that lowers the learning rate to zero."""
        optimizer = torch.optim.Adam(self.parameters(), lr=self.learning_rate)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.epochs)]

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Lightning's hook."""
        self._start = time.perf_counter()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The mean squared error of one batch."""
        puzzles, solutions = batch
        z = self.model(puzzles)
        loss = F.mse_loss(z, solutions.to(z.dtype))
        self.log("train/loss", loss, on_step=False, on_epoch=True, batch_size=len(z), prog_bar=True)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Lightning's hook: at steps that grow by a fifth, count how many new boards are wrong."""
        self.seconds += time.perf_counter() - self._start
        steps = self.global_step
        if steps >= self.next_test or steps == self.epochs * self.steps_per_epoch:
            self.next_test = max(steps + 5, round(1.2 * steps))
            puzzles, solutions = (tensor[:CHUNK] for tensor in self.splits.new.tensors)
            self.curve.append((steps, test(self.model, TensorDataset(puzzles, solutions))[0]))


@torch.no_grad()
def test(model: nn.Module, boards: TensorDataset) -> tuple[float, float]:
    """The share of boards with a wrong digit, and the mean squared error."""
    was_training = model.training
    model.eval()
    wrong, squares = 0, 0.0
    for puzzles, solutions in Batches(boards, torch.arange(len(boards)), CHUNK):
        z = model(puzzles)
        wrong += int(are_wrong(z, solutions).sum())
        squares += F.mse_loss(z, solutions.to(z.dtype)).item() * len(puzzles)
    model.train(was_training)
    return wrong / len(boards), squares / len(boards)


@dataclass(frozen=True)
class Result:
    """One row of the table, and the trained network."""

    name: Network
    training: Training
    wrong: dict[str, float]  # share of boards that are wrong: of the training, and of the two tests
    loss: float  # mean squared error with new solutions
    parameters: int
    seconds_per_epoch: float
    rules: float | None  # how much of the rules A spans, of an OptNet


def fit(name: Network, config: Config, splits: Splits) -> Result:
    """Train one network, and test it."""
    L.seed_everything(config.seed, verbose=False)  # for each network, so that none depends on the others
    training = Training(name, config, splits)
    with quiet_lightning():
        trainer = L.Trainer(
            accelerator="cpu",  # a GPU would wait for programs as small as these
            max_epochs=training.epochs,
            reload_dataloaders_every_n_epochs=1,
            callbacks=[TrainingBar(name)] if config.progress else [],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=config.progress,
            enable_model_summary=False,
        )
        trainer.fit(training)
    model = training.model
    sets = {"train": splits.train, "known": splits.known, "new": splits.new}
    tests = {key: test(model, boards) for key, boards in sets.items()}
    return Result(
        name,
        training,
        {key: wrong for key, (wrong, _) in tests.items()},
        tests["new"][1],
        sum(parameter.numel() for parameter in model.parameters()),
        training.seconds / training.epochs,
        rules_found(model.A.detach()) if isinstance(model, OptNet) else None,
    )


# --- Pictures and table -----------------------------------------------------------------------------------


def draw_curves(results: list[Result]) -> Figure:
    """Draw the mistakes on new solutions against training steps."""
    curves = {result.name: result.training.curve for result in results}
    below = (
        f"fraction of {min(CHUNK, len(results[0].training.splits.new))} boards with solutions unseen in training"
    )
    return viz.plot_learning(curves, "Boards with a mistake", below, "wrong", "training step")


@torch.no_grad()
def draw_boards(results: list[Result], count: int = 3) -> Figure:
    """Draw some boards with new solutions, those with most mistakes first."""
    puzzles, solutions = (tensor[:CHUNK] for tensor in results[0].training.splits.new.tensors)
    outputs = {result.name: result.training.model.eval()(puzzles) for result in results}
    mistakes = sum((z.argmax(-1) != solutions.argmax(-1)).flatten(1).sum(dim=1) for z in outputs.values())
    assert isinstance(mistakes, Tensor)  # there is at least one network
    shown = mistakes.argsort(descending=True, stable=True)[:count]
    shown_outputs = {name: z[shown] for name, z in outputs.items()}
    note = f"those of {len(puzzles)} boards with the most mistakes; small: other digits with some weight"
    return viz.plot_boards(puzzles[shown], solutions[shown], shown_outputs, note)


def results_table(results: list[Result], splits: Splits) -> Table:
    """The comparison, as a table for `rich` to print."""
    caption = [
        f"{len(splits.train)} training boards; tests: {len(splits.known)} other puzzles (known) whose",
        f"solutions may occur in training, and {len(splits.new)} (new) whose solutions do not",
        "loss: mean squared error on boards with new solutions",
    ]
    for result in results:
        if result.rules is not None:
            caption.append(
                f"the learned equations span {100 * result.rules:.1f} % of the rules of Sudoku; random equations "
                f"would span {100 * result.training.config.equations / 64:.1f} %"
            )
        model = result.training.model
        if isinstance(model, OptNet) and model.unsolved:
            caption.append(f"{model.unsolved:,} of {model.programs:,} programs were not solved to the tolerance")
    table = Table(title=f"opt-sudoku: {splits.name}", caption="\n".join(caption))
    table.add_column("\nnetwork", no_wrap=True)
    headings = ("wrong in\ntraining", "wrong,\nknown", "wrong,\nnew", "\nloss", "para-\nmeters", "\nepochs")
    for heading in (*headings, "seconds\nper epoch"):
        table.add_column(heading, justify="right", no_wrap=True)
    for result in results:
        table.add_row(
            result.name,
            *(f"{100 * wrong:.2f} %" for wrong in result.wrong.values()),
            f"{result.loss:.4f}",
            f"{result.parameters:,}",
            str(result.training.epochs),
            f"{result.seconds_per_epoch:.2f}",
        )
    return table


def main(config: Config) -> list[Result]:
    """Train the networks that `config` names, draw how they learn, and print how they compare."""
    console = Console()
    splits = split(sudoku4(config.data, seed=config.seed), config)
    config.out.mkdir(parents=True, exist_ok=True)
    results = [fit(name, config, splits) for name in config.networks]
    for result in results:
        torch.save(result.training.model.state_dict(), config.out / f"{result.name}.pt")
    draw_curves(results).savefig(config.out / "curves.png")
    draw_boards(results).savefig(config.out / "boards.png")
    console.print(results_table(results, splits))
    console.print(f"pictures and weights are in {config.out.absolute()}", highlight=False, soft_wrap=True)
    return results
