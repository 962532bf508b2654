"""opt-hyper: learn thousands of hyperparameters through the training, on digits of which many are mislabelled.

A network with one hidden layer is trained on digits, 40 % of which carry a wrong label; a few clean ones are kept
for validation. What training converges to depends on its hyperparameters, and the implicit function theorem gives
the gradient of the validation loss with respect to all of them at once (Lorraine, Vicol and Duvenaud, "Optimizing
Millions of Hyperparameters by Implicit Differentiation", AISTATS 2020):

    inner   sum over images of s_i cross-entropy_i / n + 1/2 sum over parameters of d_k w_k^2, minimal over w
    outer   cross-entropy of validation images at that w, lowered over s (a weight per image) and d

    no tuning    one weight decay for all parameters, from which learning starts
    grid         the best of several such decays, by the accuracy on all clean images
    clean only   trained on the clean images instead, with the decay chosen on the held-out part of them
    decays       a weight decay for each parameter, learned
    weights      a weight for each training image, learned
    both         both

So many hyperparameters eventually overfit the validation images, so a part of the clean images is held out to tell
which step was the best. Nobody tells the weights which labels are wrong; how well they find out is measured
afterwards. Learning starts from a strong decay, under which no network can memorise wrong labels; from a weak one
(`--decay 1e-3`) it has to undo that, and does not get as far as the grid.

With the defaults, learned weights are one to three points more accurate than the grid and the clean images alone,
at half of their work, and rank right labels before wrong ones with an AUC of 0.93. A decay for each parameter
gains nothing that holds on other seeds: 150 images are too few to choose 1810 numbers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.metrics import roc_auc_score
from torch import Tensor

import implicitly as im
from implicitly.data import digits
from implicitly.iterate import Found
from implicitly.recipes._options import (
    check_at_least,
    check_not_negative,
    check_positive,
    check_seed,
)
from implicitly.viz.style import COLOURS, new_figures, title

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Params = dict[str, Tensor]
LEARNED = {"decays": ("decay",), "weights": ("weight",), "both": ("decay", "weight")}


@dataclass(frozen=True)
class Config:
    """Weight decays and per-image weights learned by implicit differentiation, on digits with wrong labels."""

    out: Path = Path("runs/opt-hyper")
    """Output folder for the picture and the table; files of an earlier run are overwritten."""
    noise: float = 0.4
    """Fraction of the training images that get a wrong label."""
    clean: int = 200
    """Number of images with correct labels, taken from the training set for validation."""
    held_out: int = 50
    """How many of the clean images are held out to choose the best step."""
    seeds: int = 3
    """Number of random seeds (for split, noise and initial weights) that the table averages over."""
    seed: int = 0
    """The first seed."""
    progress: bool = True
    """Show a progress bar."""

    hidden: int = 24
    """Units in the hidden layer of the network."""
    decay: float = 1e-2
    """Weight decay without tuning, and initial value of the learned decays."""
    grid: tuple[float, float, int] = (1e-4, 1e-1, 9)
    """Weight decays of the grid search: smallest, largest, and how many (evenly spaced in the logarithm)."""
    steps: int = 500
    """Maximum number of L-BFGS steps when training from scratch."""

    outer_steps: int = 30
    """Number of Adam steps for the hyperparameters."""
    inner_steps: int = 20
    """Maximum number of L-BFGS steps after each of --outer-steps; they continue from the last weights."""
    decay_rate: float = 0.07
    """Learning rate of the logarithms of the decays."""
    weight_rate: float = 0.2
    """Learning rate of the image weights, before the sigmoid."""
    rtol: float = 0.1
    """Relative tolerance of the conjugate gradient method."""
    damping: float = 1e-3
    """Multiple of the identity added to the Hessian, which is sometimes indefinite, as the loss is not convex."""

    def __post_init__(self) -> None:
        check_at_least(self, 1, "seeds", "hidden", "steps", "outer_steps", "inner_steps", "held_out")
        check_positive(self, "decay", "decay_rate", "weight_rate", "rtol")
        im.CG(rtol=self.rtol).tolerances(torch.float32)  # which knows what it can reach
        check_not_negative(self, "damping")
        check_seed(self)
        if not 0 <= self.noise < 1:
            raise ValueError(f"noise must be at least 0 and below 1; got {self.noise}")
        if not self.held_out < self.clean < 1400:
            raise ValueError(f"clean must be above held_out = {self.held_out} and below 1400; got {self.clean}")
        first, last, count = self.grid
        if not (0 < first <= last < math.inf and count >= 1):
            raise ValueError(
                f"grid must be a smallest decay > 0, a largest decay, and a count >= 1; got {self.grid}"
            )


# --- Data and network ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Data:
    """One split. Images are float32 `(count, 64)`, labels int64 `(count,)`."""

    train: tuple[Tensor, Tensor]
    wrong: Tensor  # bool, which training labels are wrong
    validation: tuple[Tensor, Tensor]
    held_out: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    @property
    def clean(self) -> tuple[Tensor, Tensor]:
        """Validation and held-out images together."""
        x, y = (torch.cat(pair) for pair in zip(self.validation, self.held_out))
        return x, y


def load(seed: int, config: Config) -> Data:
    """The digits, split at random, with noise in the training labels; the test set is always the same."""
    loaded = digits()
    (x, y), (x_test, y_test) = loaded.train.tensors, loaded.test.tensors
    x, x_test = x.flatten(1) / 4, x_test.flatten(1) / 4  # 64 inputs of about 1/16 each: |x| is about 2
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=generator)
    held_out, validation, train = order.tensor_split([config.held_out, config.clean])
    wrong = torch.rand(len(train), generator=generator) < config.noise
    shift = torch.randint(1, loaded.classes, (len(train),), generator=generator)
    noisy = torch.where(wrong, (y[train] + shift) % loaded.classes, y[train])
    judges = [(x[rows], y[rows]) for rows in (validation, held_out)]
    return Data((x[train], noisy), wrong, judges[0], judges[1], (x_test, y_test))


def first_weights(seed: int, config: Config) -> Params:
    """Initial weights of a network 64 - hidden - 10."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "weight1": torch.randn(64, config.hidden, generator=generator) / 8,
        "bias1": torch.zeros(config.hidden),
        "weight2": torch.randn(config.hidden, 10, generator=generator) / config.hidden**0.5,
        "bias2": torch.zeros(10),
    }


def network(w: Params, x: Tensor) -> Tensor:
    """Logits `(count, 10)`."""
    return (x @ w["weight1"] + w["bias1"]).tanh() @ w["weight2"] + w["bias2"]


@dataclass(frozen=True)
class Hyper:
    """Hyperparameters, unconstrained: decays are exp(decay), like the params; weights 2 sigmoid(weight)."""

    decay: Params
    weight: Tensor

    @classmethod
    def start(cls, w: Params, images: int, decay: float) -> Hyper:
        """One `decay` for all parameters, and the weight 1 for all images."""
        return cls({k: torch.full_like(v, math.log(decay)) for k, v in w.items()}, torch.zeros(images))


def inner_loss(w: Params, decay: Params, weight: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """What training minimises over `w`; see the top of this file."""
    losses = F.cross_entropy(network(w, x), y, reduction="none")
    penalty = sum((decay[k].exp() * w[k].square()).sum() for k in w)
    return (2 * weight.sigmoid() * losses).mean() + 0.5 * penalty


def accuracy(w: Params, images: tuple[Tensor, Tensor]) -> float:
    """The share of `images` that the network classifies correctly."""
    x, y = images
    return (network(w, x).argmax(1) == y).float().mean().item()


# --- Training, and learning how to --------------------------------------------------------------------------


@dataclass
class Costs:
    """The work done: gradients of the inner loss, products with its Hessian, and linear solves that fell short."""

    gradients: int = 0
    products: int = 0
    short: int = 0

    def count(self, found: Found) -> None:
        """Record a backward solve."""
        self.products += int(found.steps)
        self.short += int(found.status != im.Status.CONVERGED)


def train(start: Params, images: tuple[Tensor, Tensor], hyper: Hyper, steps: int, costs: Costs) -> Params:
    """Lower the inner loss from `start` by at most `steps` steps of L-BFGS."""
    w = {k: v.detach().clone().requires_grad_() for k, v in start.items()}
    decay, weight = {k: v.detach() for k, v in hyper.decay.items()}, hyper.weight.detach()
    optimizer = torch.optim.LBFGS(
        list(w.values()),
        max_iter=steps,
        tolerance_grad=1e-6,
        tolerance_change=1e-9,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        costs.gradients += 1
        optimizer.zero_grad()
        loss = inner_loss(w, decay, weight, *images)
        loss.backward()
        return loss

    optimizer.step(closure)  # pyright: ignore[reportArgumentType]  # torch's stub wants a float, its code a tensor
    return {k: v.detach() for k, v in w.items()}


@dataclass(frozen=True)
class Outcome:
    """The result of one method for one seed."""

    test: float  # accuracy
    seconds: float
    costs: Costs
    hyper: Hyper
    path: list[float] = field(default_factory=list)  # test accuracy after each outer step, for the picture alone


def learn(names: Sequence[str], data: Data, start: Params, config: Config) -> Outcome:
    """Learn the hyperparameters `names` ("decay", "weight") by implicit gradients of the validation loss."""
    began, costs = time.perf_counter(), Costs()
    hyper = Hyper.start(start, len(data.wrong), config.decay)
    groups = []
    if "decay" in names:
        groups.append({"params": list(hyper.decay.values()), "lr": config.decay_rate})
    if "weight" in names:
        groups.append({"params": [hyper.weight], "lr": config.weight_rate})
    for parameter in (p for group in groups for p in group["params"]):
        parameter.requires_grad_()
    optimizer = torch.optim.Adam(groups)
    w, best, path, chosen = start, math.inf, [], (start, hyper)
    for step in range(config.outer_steps):
        w = train(w, data.train, hyper, config.inner_steps if step else config.steps, costs)
        held_out = F.cross_entropy(network(w, data.held_out[0]), data.held_out[1]).item()
        if held_out < best:
            kept = Hyper({k: v.detach().clone() for k, v in hyper.decay.items()}, hyper.weight.detach().clone())
            best, chosen = held_out, (w, kept)
        answering = im.implicit_gradient(
            inner_loss,
            w,
            hyper.decay,
            hyper.weight,
            *data.train,
            linear_solver=im.CG(rtol=config.rtol),
            damping=config.damping,
            tolerance=None,  # with few steps after each change, w is only on its way to a stationary point
            on_failure="ignore",  # counted instead
            listen=costs.count,
        )
        optimizer.zero_grad()
        F.cross_entropy(network(answering, data.validation[0]), data.validation[1]).backward()
        optimizer.step()
        path.append(accuracy(w, data.test))
    return Outcome(accuracy(chosen[0], data.test), time.perf_counter() - began, costs, chosen[1], path)


def fixed(decay: float, data: Data, start: Params, config: Config) -> Outcome:
    """One training with one weight decay."""
    began, costs = time.perf_counter(), Costs()
    hyper = Hyper.start(start, len(data.wrong), decay)
    w = train(start, data.train, hyper, config.steps, costs)
    return Outcome(accuracy(w, data.test), time.perf_counter() - began, costs, hyper)


def search(
    images: tuple[Tensor, Tensor],
    judges: tuple[Tensor, Tensor],
    data: Data,
    start: Params,
    config: Config,
    again: tuple[Tensor, Tensor] | None = None,
) -> Outcome:
    """Train on `images` with each decay of the grid; train on `again` with the one most accurate on `judges`."""
    began, costs, best = time.perf_counter(), Costs(), (-1.0, start, Hyper({}, torch.empty(0)))
    first, last, count = config.grid
    for decay in torch.logspace(math.log10(first), math.log10(last), count).tolist():
        hyper = Hyper.start(start, len(images[1]), decay)
        w = train(start, images, hyper, config.steps, costs)
        if (right := accuracy(w, judges)) > best[0]:
            best = right, w, hyper
    _, w, hyper = best
    if again is not None:
        hyper = Hyper(hyper.decay, torch.zeros(len(again[1])))
        w = train(start, again, hyper, config.steps, costs)
    return Outcome(accuracy(w, data.test), time.perf_counter() - began, costs, hyper)


def fit(seed: int, config: Config) -> dict[str, Outcome]:
    """All methods, by name, on one split."""
    data, start = load(seed, config), first_weights(seed, config)
    outcomes = {
        "no tuning": fixed(config.decay, data, start, config),
        "grid": search(data.train, data.clean, data, start, config),
        "clean only": search(data.validation, data.held_out, data, start, config, again=data.clean),
    }
    return outcomes | {name: learn(what, data, start, config) for name, what in LEARNED.items()}


# --- Table and picture --------------------------------------------------------------------------------------


def separation(outcome: Outcome, wrong: Tensor) -> float:
    """The AUC of the learned weights: how often a right label has a larger weight than a wrong label."""
    return float(roc_auc_score(~wrong.numpy(), outcome.hyper.weight.numpy()))


def results_table(results: list[dict[str, Outcome]], wrongs: list[Tensor], config: Config) -> Table:
    """The comparison, as a table for `rich` to print."""
    short = sum(run[name].costs.short for run in results for name in LEARNED)
    solves = len(results) * len(LEARNED) * config.outer_steps
    parameters = sum(v.numel() for v in results[0]["grid"].hyper.decay.values())
    caption = (
        f"{len(wrongs[0])} training images, {config.noise:.0%} with wrong labels; {config.clean} clean images\n"
        f"{parameters} decays, {len(wrongs[0])} weights; mean ± standard deviation over {len(results)} seeds\n"
        f"gradients of the inner loss and products with its Hessian: per seed\n"
        f"AUC: how well the learned weights separate right from wrong labels; 0.5 is chance\n"
        f"{short} of {solves} linear solves did not reach their tolerance"
    )
    table = Table(title="opt-hyper: digits with wrong labels", caption=caption)
    table.add_column("\nhyperparameters", no_wrap=True)
    for heading in ("test\naccuracy", "\nseconds", "inner\ngradients", "Hessian\nproducts", "\nAUC"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name in results[0]:
        runs = [run[name] for run in results]
        tests = torch.tensor([run.test for run in runs], dtype=torch.float64)
        spread = f" ± {100 * tests.std().item():.1f}" if len(runs) > 1 else ""
        aucs = (
            [separation(run, wrong) for run, wrong in zip(runs, wrongs)]
            if "weight" in LEARNED.get(name, ())
            else []
        )
        table.add_row(
            name,
            f"{100 * tests.mean().item():.1f}{spread} %",
            f"{sum(run.seconds for run in runs) / len(runs):.1f}",
            f"{sum(run.costs.gradients for run in runs) / len(runs):.0f}",
            f"{sum(run.costs.products for run in runs) / len(runs):.0f}",
            f"{sum(aucs) / len(aucs):.3f}" if aucs else "",
        )
    return table


def draw(outcomes: dict[str, Outcome], wrong: Tensor) -> Figure:
    """Draw one seed: accuracy while the hyperparameters learn, the learned weights, and the learned decays."""
    figure, (first, second, third) = new_figures(13.5, 4.0, 3)
    for name, colour in zip(LEARNED, (COLOURS.main, COLOURS.warm, COLOURS.second)):
        first.plot(outcomes[name].path, color=colour, linewidth=2, label=name)
    for name, style in (("grid", "--"), ("clean only", ":")):
        first.axhline(outcomes[name].test, color=COLOURS.grey, linestyle=style, linewidth=1.5, label=name)
    first.set_xlabel("outer step")
    first.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
    first.legend(frameon=False, fontsize=9)
    title(first, "Test accuracy", "while the hyperparameters are learned")
    weights = 2 * outcomes["weights"].hyper.weight.sigmoid()
    bins = torch.linspace(0, 2, 41).tolist()
    for mask, name, colour in ((~wrong, "right label", COLOURS.main), (wrong, "wrong label", COLOURS.warm)):
        second.hist(weights[mask].numpy(), bins=bins, color=colour, alpha=0.65, label=name)
    second.set_xlabel("learned weight")
    second.set_ylabel("training images")
    second.legend(frameon=False, fontsize=9)
    title(second, "Weight of an image", f"AUC {separation(outcomes['weights'], wrong):.3f}; initial value 1")
    decays = outcomes["decays"].hyper.decay["weight1"].mean(1).exp().reshape(8, 8)
    third.grid(visible=False)
    third.set_xticks([])
    third.set_yticks([])
    image = third.imshow(decays.numpy(), cmap="Blues")
    figure.colorbar(image, ax=third, shrink=0.85)
    title(third, "Weight decay of a pixel", "geometric mean over hidden units")
    return figure


def main(config: Config) -> list[dict[str, Outcome]]:
    """Run all methods for each seed; print how they compare and draw the first seed."""
    config.out.mkdir(parents=True, exist_ok=True)
    seeds = range(config.seed, config.seed + config.seeds)
    results = [fit(seed, config) for seed in track(seeds, "seeds", disable=not config.progress, transient=True)]
    wrongs = [load(seed, config).wrong for seed in seeds]
    with (config.out / "table.txt").open("w", encoding="utf-8") as file:
        for console in (Console(), Console(file=file, width=100)):
            console.print(results_table(results, wrongs, config))
    draw(results[0], wrongs[0]).savefig(config.out / "hyper.png")
    Console().print(f"picture and table are in {config.out.absolute()}", highlight=False, soft_wrap=True)
    return results
