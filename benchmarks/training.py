"""Training: steps and accuracy of equilibrium models, compared with a residual network with as many parameters."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F

from benchmarks.harness import Effort, Row, Spread
from implicitly.data import ImageData, digits
from implicitly.recipes._classification import Classifier
from implicitly.recipes._training import Batches
from implicitly.recipes.deq_image import Config, ModelName, Quick, build

PEER = "ResNet"
PACKAGES = ("implicitly", "torch")
GOAL = 1.5

CAPTION = """\
The recipe `deq-image` on the 8x8 digits: batches of 64, Adam, 12 epochs; the equilibrium of one cell beside a
ResNet of 4 blocks and as many parameters (64 thousand). Times are medians over all steps, taken in alternation;
accuracies are those on 360 test images, one for each seed. `deq`: to relative tolerance 1e-2, exact gradient.
`quick`: in training so many steps of the solver on from an image's last equilibrium, gradient through one call."""


@dataclass
class Runner:
    """Trains one network, step by step."""

    model: Classifier
    steps: int  # of the whole training
    optimizer: torch.optim.Optimizer = field(init=False)
    seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=Config.learning_rate)

    def step(self, images: torch.Tensor, labels: torch.Tensor, index: torch.Tensor) -> None:
        """Take and time one step of Adam, with the cosine learning-rate schedule of the recipe."""
        for group in self.optimizer.param_groups:
            group["lr"] = 0.5 * Config.learning_rate * (1 + math.cos(math.pi * len(self.seconds) / self.steps))
        start = time.perf_counter()
        self.optimizer.zero_grad()
        known = {"index": index} if isinstance(self.model.body, Quick) else {}
        F.cross_entropy(self.model(images, **known), labels).backward()
        self.optimizer.step()
        self.seconds.append(time.perf_counter() - start)

    @torch.no_grad()
    def accuracy(self, data: ImageData) -> float:
        """The accuracy on the test images."""
        images, labels = data.test.tensors
        return float((self.model.eval()(images).argmax(1) == labels).float().mean())


NETWORKS: dict[str, tuple[ModelName, int]] = {
    "resnet": ("resnet", 3),
    "deq": ("deq", 3),
    "quick, 2 steps": ("quick", 2),
    "quick, 3 steps": ("quick", 3),
    "quick, 4 steps": ("quick", 4),
}


def run(effort: Effort) -> list[Row]:
    """All rows of this benchmark."""
    print("training ...", flush=True)
    data, config = digits(), Config()
    limit = None if effort.full else 3
    accuracies: dict[str, list[float]] = {name: [] for name in NETWORKS}
    seconds: dict[str, list[float]] = {name: [] for name in NETWORKS}
    for seed in range(min(3, effort.rounds)):
        for name, runner in train(data, config, seed, limit).items():
            accuracies[name].append(runner.accuracy(data))
            seconds[name] += runner.seconds
    return [row(name, seconds, accuracies) for name in NETWORKS if name != "resnet"]


def train(data: ImageData, config: Config, seed: int, limit: int | None) -> dict[str, Runner]:
    """Train all networks, one step of each in turn, for all epochs or up to a `limit` of steps."""
    rows = torch.arange(len(data.train))
    images = torch.utils.data.TensorDataset(*data.train.tensors, rows)
    batches = -(-len(rows) // config.batch_size)
    runners = {}
    for name, (model, steps) in NETWORKS.items():
        torch.manual_seed(seed)
        runners[name] = Runner(build(model, replace(config, quick_steps=steps), data), config.epochs * batches)
    epochs = (Batches(images, rows, config.batch_size, seed=1000 * seed + epoch) for epoch in range(config.epochs))
    for batch in itertools.islice(itertools.chain.from_iterable(epochs), limit):
        for runner in runners.values():
            runner.step(*batch)
    return runners


def row(name: str, seconds: dict[str, list[float]], accuracies: dict[str, list[float]]) -> Row:
    """The row that compares a network with the ResNet."""
    medians = {who: statistics.median(seconds[who]) for who in (name, "resnet")}
    ratio = medians[name] / medians["resnet"]
    mine, theirs = (statistics.mean(accuracies[who]) for who in (name, "resnet"))
    texts = {
        who: f"{Spread.of([statistics.median(seconds[who])]).median * 1e3:.1f}, accuracy "
        + ", ".join(f"{100 * a:.1f}" for a in accuracies[who])
        for who in medians
    }
    return Row(
        f"training step, {name}, ms",
        f"{texts[name]} %; {ratio:.2f} times as long",
        f"{texts['resnet']} %",
        f"{GOAL:g} times as long, as accurate",
        ratio <= GOAL and mine >= theirs,
        {who: {"seconds": seconds[who], "accuracy": accuracies[who]} for who in medians},
    )
