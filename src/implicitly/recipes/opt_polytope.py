"""opt-polytope: learn the faces of a convex polygon from points inside and outside.

The layer projects points onto a polygon whose faces are its weights:

    z = argmin 1/2 |z - x|^2   subject to   G z <= h

It is a quadratic program (a layer of Amos and Kolter, "OptNet", ICML 2017), and the implicit function theorem
gives the derivative of z with respect to G and h. The distance |z - x| that a point is moved is zero exactly if x
lies inside. All that is known of a training point is whether it does, and the loss compares the distance with
that:

    inside    |z - x| should be 0
    outside   |z - x| should be at least a margin

A point inside the learned polygon gives no gradient to its faces, which are elsewhere. So the polygon starts
small, among the inside points, and they pull it open; no outside point gets in as long as the margin pushes back.
The margin leaves gaps next to the outside points, so it shrinks to zero during training.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import implicitly as im
from implicitly import viz
from implicitly.recipes._options import check_at_least, check_positive, check_seed
from implicitly.recipes._training import Batches, TrainingBar, quiet_lightning

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REACH = 1.6  # points lie in the square from -REACH to REACH
EDGE = 0.1  # a face counts if it contributes an edge of this length; learned polygons have spare faces


@dataclass(frozen=True)
class Config:
    """A projection layer that learns a convex polygon from points inside and outside it."""

    polygons: tuple[int, ...] = (3, 5, 8)
    """Numbers of faces (edges) of the random polygons to learn."""
    out: Path = Path("runs/opt-polytope")
    """Output folder for the picture and weights; files of an earlier run are overwritten."""

    faces: int = 16
    """Rows of G, the most faces that can be learned; surplus rows become inactive."""
    margin: float = 0.5
    """Initial distance by which the projection should move an outside point; it decreases to 0 during training."""
    epochs: int = 50
    """Passes over the training points."""
    points: int = 2000
    """Number of training points; the test set has ten times as many."""
    batch_size: int = 250
    """Points per training step."""
    learning_rate: float = 3e-2
    """Initial learning rate of Adam; a cosine schedule lowers it to 0."""
    seed: int = 0
    """Random seed of the polygons, the points and the order of the batches."""
    progress: bool = True
    """Show a progress bar."""

    def __post_init__(self) -> None:
        check_at_least(self, 3, "faces")
        check_at_least(self, 1, "epochs", "batch_size")
        check_at_least(self, 10, "points")
        check_positive(self, "margin", "learning_rate")
        check_seed(self)
        if not self.polygons or min(self.polygons) < 3 or len(set(self.polygons)) < len(self.polygons):
            raise ValueError(f"polygons must be different numbers, each at least 3; got {self.polygons}")


def random_polygon(faces: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """G `(faces, 2)`, of unit rows, and h `(faces,)` of a polygon inscribed in a random ellipse around 0."""
    turn, flatness = torch.rand(2, generator=generator, dtype=torch.float64)
    steps = torch.arange(faces) + 0.5 * torch.rand(faces, generator=generator, dtype=torch.float64)
    angles = 2 * torch.pi * (steps / faces + turn)
    corners = torch.stack([1.4 * angles.cos(), (1 + 0.4 * flatness) * angles.sin()], dim=1)
    along = corners.roll(-1, 0) - corners
    G = torch.stack([along[:, 1], -along[:, 0]], dim=1)
    G = G / G.norm(dim=1, keepdim=True)
    return G, (G * corners).sum(dim=1)


def is_inside(x: Tensor, G: Tensor, h: Tensor) -> Tensor:
    """Which of the points `(N, 2)` satisfy G x <= h; bool `(N,)`."""
    return (x @ G.T <= h).all(dim=1)


def sample(count: int, generator: torch.Generator) -> Tensor:
    """Points `(count, 2)`, float64, evenly over the square."""
    return REACH * (2 * torch.rand(count, 2, generator=generator, dtype=torch.float64) - 1)


class Polytope(nn.Module):
    """The projection onto {z : G z <= h}, with learned G `(faces, 2)` and h `(faces,)`.

    It starts as a regular polygon of inner radius `radius` around `centre` `(2,)`.
    """

    identity: Tensor

    def __init__(self, faces: int, centre: Tensor, radius: float = 0.2) -> None:
        super().__init__()
        angles = 2 * torch.pi * torch.arange(faces, dtype=torch.float64) / faces
        G = torch.stack([angles.cos(), angles.sin()], dim=1)
        self.G = nn.Parameter(G)
        self.h = nn.Parameter(radius + G @ centre)
        self.register_buffer("identity", torch.eye(2, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        """The nearest points of the polytope to `x` `(B, 2)`."""
        return im.qp(self.identity, -x, self.G, self.h).value


def distance(x: Tensor, z: Tensor) -> Tensor:
    """|z - x| `(B,)`, rounded off at 1e-6, so that it has a derivative at 0."""
    return ((z - x).square().sum(dim=1) + 1e-12).sqrt() - 1e-6


# --- The training -----------------------------------------------------------------------------------------


class Training(L.LightningModule):
    """Learns one polygon."""

    def __init__(self, polygon: int, config: Config) -> None:
        super().__init__()
        self.config = config
        generator = torch.Generator().manual_seed(1000 * config.seed + polygon)
        self.truth = random_polygon(polygon, generator)
        x = sample(config.points, generator)
        inside = is_inside(x, *self.truth)
        self.points = TensorDataset(x, inside)
        self.test_points = sample(10 * config.points, generator)
        self.layer = Polytope(config.faces, x[inside].mean(dim=0))
        self.history = [self.faces()]

    def faces(self) -> tuple[Tensor, Tensor]:
        """The current G and h."""
        return self.layer.G.detach().clone(), self.layer.h.detach().clone()

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
        x, inside = batch
        moved = distance(x, self.layer(x))
        margin = self.config.margin * (1 - self.current_epoch / self.config.epochs) ** 2
        loss = torch.where(inside, moved, (margin - moved).relu()).mean()
        self.log("train/loss", loss, on_step=False, on_epoch=True, batch_size=len(x), prog_bar=True)
        return loss

    def on_train_epoch_end(self) -> None:
        """Lightning's hook: keep the faces for the picture."""
        self.history.append(self.faces())


@dataclass(frozen=True)
class Result:
    """One row of the table, and what was learned."""

    polygon: int
    training: Training
    iou: float  # area of the intersection by that of the union, on test points
    accuracy: float  # of telling inside from outside, on test points
    faces: int  # that contribute an edge
    seconds: float


def fit(polygon: int, config: Config) -> Result:
    """Learn one polygon, and test what was learned."""
    training = Training(polygon, config)
    start = time.perf_counter()
    with quiet_lightning():
        trainer = L.Trainer(
            accelerator="cpu",  # a GPU would mostly wait, with so few numbers
            max_epochs=config.epochs,
            reload_dataloaders_every_n_epochs=1,
            callbacks=[TrainingBar(f"{polygon} faces")] if config.progress else [],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=config.progress,
            enable_model_summary=False,
        )
        trainer.fit(training)
    seconds = time.perf_counter() - start
    G, h = training.faces()
    iou, accuracy = agreement(training, G, h)
    return Result(polygon, training, iou, accuracy, count_faces(G, h), seconds)


def count_faces(G: Tensor, h: Tensor) -> int:
    """The number of rows of G that contribute an edge worth the name."""
    _, edges = viz.vertices(G, h)
    return int((edges > EDGE).sum())


def agreement(training: Training, G: Tensor, h: Tensor) -> tuple[float, float]:
    """Intersection over union, and accuracy, of {z : G z <= h} on points that the training has not seen."""
    truth, learned = (is_inside(training.test_points, *faces) for faces in (training.truth, (G, h)))
    iou = (truth & learned).sum() / (truth | learned).sum()
    return float(iou), float((truth == learned).double().mean())


# --- Picture and table ------------------------------------------------------------------------------------


@torch.no_grad()
def draw(results: list[Result], stages: int = 5) -> Figure:
    """Draw how each polygon was learned, from start to end; the steps shown grow by about the same factor."""
    rows, truths, points = [], [], []
    for result in results:
        training = result.training
        x, inside = (tensor[:240] for tensor in training.points.tensors)
        last = len(training.history) - 1
        epochs = sorted({0, last, *(round(last ** (k / (stages - 1))) for k in range(1, stages - 1))})
        row = []
        for epoch in epochs:
            G, h = training.history[epoch]
            iou, _ = agreement(training, G, h)
            layer = Polytope(len(G), torch.zeros(2, dtype=G.dtype))
            layer.load_state_dict({"G": G, "h": h, "identity": layer.identity})
            name = "start" if epoch == 0 else f"epoch {epoch}"
            row.append(viz.PolytopeStage(name, f"overlap {100 * iou:.1f} %", G, h, layer(x)))
        rows.append(row)
        truths.append(training.truth)
        points.append((x, inside))
    return viz.plot_polytopes(rows, truths, points, 1.04 * REACH)


def results_table(results: list[Result], config: Config) -> Table:
    """The comparison, as a table for `rich` to print."""
    caption = (
        f"{config.points} training points, {10 * config.points} test points; {config.epochs} epochs; "
        f"seed {config.seed}\n"
        "overlap: area of intersection divided by area of union, on test points\n"
        "accuracy: of telling inside from outside, on test points\n"
        f"learned faces: how many of the {config.faces} contribute an edge longer than {EDGE:g}"
    )
    table = Table(title="opt-polytope", caption=caption)
    for heading in ("\nfaces", "learned\nfaces", "\noverlap", "\naccuracy", "\nseconds"):
        table.add_column(heading, justify="right", no_wrap=True)
    for result in results:
        table.add_row(
            str(result.polygon),
            str(result.faces),
            f"{100 * result.iou:.1f} %",
            f"{100 * result.accuracy:.1f} %",
            f"{result.seconds:.1f}",
        )
    return table


def main(config: Config) -> list[Result]:
    """Learn the polygons that `config` names, draw how, and print how well."""
    console = Console()
    results = run(config)
    console.print(results_table(results, config))
    console.print(f"picture and weights are in {config.out.absolute()}", highlight=False, soft_wrap=True)
    return results


def run(config: Config) -> list[Result]:
    """Learn the polygons that `config` names, and write a picture and the weights."""
    config.out.mkdir(parents=True, exist_ok=True)
    results = [fit(polygon, config) for polygon in config.polygons]
    for result in results:
        torch.save(result.training.layer.state_dict(), config.out / f"{result.polygon}.pt")
    draw(results).savefig(config.out / "polytopes.png")
    return results
