"""`implicitly tour`: a demonstration of implicit layers that takes two minutes on two CPU cores.

Each part measures something, explains the result and draws a picture. The tour fails (exit status 1) if a result
is not as expected.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import implicitly as im
from implicitly import viz
from implicitly.recipes._options import check_at_least

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console

    from implicitly.data import ImageData
    from implicitly.recipes.deq_image import Result

GRADIENT_TOLERANCE = 1e-7  # relative; central differences in float64 reach about ten digits here
MEMORY_STEPS = (1, 25, 50, 100, 150, 200)  # numbers of solver steps for which memory is measured
# Short trainings, so that the tour takes two minutes, and what they must reach at least (at most: FLOW_ERROR).
FLOW_EPOCHS = 10
FLOW_ACCURACY = 0.97  # of the augmented neural ODE on the circles
FLOW_ERROR = 0.2  # mean squared error of the augmented neural ODE on the square
POLYTOPE_EPOCHS = 40
POLYTOPE_OVERLAP = 0.95  # intersection over union of learned and true polygons


@dataclass(frozen=True)
class Config:
    """Demonstration of implicit layers: training, memory and gradients, neural ODEs, quadratic programs."""

    out: Path = Path("out/tour")
    """Output folder for pictures, checkpoints and logs."""
    epochs: int = 4
    """Passes over the training digits in part 1."""
    accuracy: float = 0.97
    """Test accuracy on the digits below which the tour fails, from 0 to 1."""

    def __post_init__(self) -> None:
        check_at_least(self, 1, "epochs")
        if not 0 <= self.accuracy <= 1:
            raise ValueError(f"accuracy must lie between 0 and 1; got {self.accuracy}")


@dataclass
class Journey:
    """What the parts of a tour share: the console, the folder, the findings and the files."""

    console: Console
    out: Path
    findings: list[tuple[str, str, bool]] = field(default_factory=list)  # what, how much, as promised?
    files: dict[str, str] = field(default_factory=dict)

    def say(self, text: str) -> None:
        """Print a paragraph."""
        self.console.print(text, highlight=False, width=min(self.console.width, 96))
        self.console.print()

    def find(self, what: str, how_much: str, kept: bool) -> None:
        """Note a finding for the summary, and whether it keeps the promise."""
        self.findings.append((what, how_much, kept))

    def draw(self, name: str, figure: Figure, shows: str) -> None:
        """Write a picture into the folder."""
        figure.savefig(self.out / name)
        self.files[name] = shows


class TanhLayer(nn.Module):
    """f(z, x) = tanh(W z + x), with 0.9 times an orthogonal W: a contraction, whose fixed point is unique."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        nn.init.orthogonal_(self.linear.weight, gain=0.9)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """`z` and `x`: `(batch, width)`."""
        return torch.tanh(self.linear(z) + x)


def main(config: Config) -> int:
    """Take the tour.

    Returns:
        0, or 1 if a finding is not what was promised.
    """
    from rich.console import Console

    start = time.perf_counter()
    config.out.mkdir(parents=True, exist_ok=True)
    journey = Journey(Console(), config.out)
    journey.say(
        "\n[bold]implicitly[/bold]: layers whose output is defined by a [italic]condition[/italic] and computed "
        "by a [italic]solver[/italic]. This tour trains such a layer, measures its memory, checks its gradient, "
        "trains neural ODEs, and trains a layer that solves quadratic programs. It takes about two minutes."
    )
    with one_thread():
        train(journey, config)
        weigh(journey)
        check(journey)
        flow(journey)
        project(journey)
    return summarise(journey, time.perf_counter() - start)


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one core.

    Tensors this small gain little from two, and where other programs use the cores too, threads that wait for each
    other take ten times as long.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


# --- 1. Train ----------------------------------------------------------------------------------------------


def train(journey: Journey, config: Config) -> None:
    """Train the deep equilibrium model of the recipe deq-image on handwritten digits."""
    journey.console.rule("[bold]1  A network of infinitely many identical layers", align="left")
    journey.say(
        "A residual network is a stack of blocks. If the same block f is repeated indefinitely, the activations "
        "can converge to an equilibrium z = f(z, x). A deep equilibrium model computes this z with a solver "
        "instead of building the stack. Here one learns to classify handwritten digits of 8x8 pixels."
    )
    # Lightning takes seconds to import; by now there is something to read meanwhile.
    from implicitly.data import digits
    from implicitly.recipes import deq_image

    folder = journey.out / "deq"
    for log in (folder / "logs").glob("events.out.tfevents.*"):
        log.unlink()  # of an earlier tour: TensorBoard would draw both as one
    data = digits()
    options = deq_image.Config(models=("deq",), epochs=config.epochs, out=journey.out)
    result = deq_image.fit("deq", options, data, folder)
    steps = result.costs.forward_calls / result.costs.steps
    journey.console.print()
    journey.say(
        f"It classifies [bold]{100 * result.test_accuracy:.1f} %[/bold] of {len(data.test)} unseen digits "
        f"correctly, with {result.parameters:,} parameters. A batch took {steps:.0f} calls of f on average. "
        "The depth of the network is not fixed: the solver stops for each digit as soon as it has converged."
    )
    kept = result.test_accuracy >= config.accuracy
    journey.find(
        "test accuracy on the digits",
        f"{100 * result.test_accuracy:.1f} %" + ("" if kept else f", below {100 * config.accuracy:g} %"),
        kept,
    )
    journey.files["deq/last.ckpt, best.ckpt"] = "checkpoints of the last and the best epoch"
    journey.files["deq/logs/"] = f"TensorBoard: tensorboard --logdir {folder}"
    draw_training(journey, result, data, options.rtol)


def draw_training(journey: Journey, result: Result, data: ImageData, rtol: float) -> None:
    """Draw how the training went, what the network reads, and how solvers find one of its equilibria."""
    curves = read_scalars(result.folder / "logs")
    journey.draw(
        "training.png",
        viz.plot_training(curves["train/loss"], curves["val/accuracy"], curves["train/solver_steps"]),
        "loss, accuracy and solver steps during training",
    )
    network = result.training.model.eval()
    images, labels = data.test.tensors
    with torch.no_grad():
        predictions = network(images).argmax(dim=1)
    # The mistakes come first, then other images in the order of the set.
    shown = (predictions == labels).long().argsort(stable=True)[:36]
    journey.draw(
        "digits.png",
        viz.plot_predictions(images[shown, 0], labels[shown], predictions[shown]),
        "predictions of the network, mistakes first",
    )
    assert isinstance(network.body, im.nn.DEQ)  # that is what was trained
    cell = network.body.cell
    histories = {}
    solvers = {
        "plain iteration": im.FixedPointIteration(rtol=0, max_steps=25),
        "Anderson": im.Anderson(rtol=0, max_steps=25),
        "Broyden": im.Broyden(rtol=0, max_steps=25),
    }
    with torch.no_grad():
        x = network.stem(images[:64])
        for name, solver in solvers.items():
            recorder = viz.ResidualRecorder(cell)
            im.fixed_point(recorder, torch.zeros_like(x), x, solver=solver, on_failure="ignore")
            histories[name] = recorder.history
    journey.draw(
        "solvers.png",
        viz.plot_convergence(histories, rtol, "64 test digits and the trained cell: median, and range of 80 %"),
        "convergence of three solvers for the trained network",
    )


def read_scalars(folder: Path) -> dict[str, list[tuple[float, float]]]:
    """Everything in a folder of TensorBoard logs: for each name, `(step, value)` in order."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {
        name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]
    }


# --- 2. Weigh ----------------------------------------------------------------------------------------------


def weigh(journey: Journey) -> None:
    """Measure the memory of a training step, unrolled and implicit, against the number of solver steps."""
    from rich.progress import track
    from rich.table import Table

    journey.console.rule("[bold]2  Memory that does not grow with the number of steps", align="left")
    journey.say(
        "There are two ways to differentiate the result of 200 solver steps. Unrolling lets autograd record "
        "every step. The implicit function theorem needs only the solution, where dz/dx = (I - df/dz)^-1 df/dx, "
        "however the solver got there. The layer here is z = tanh(W z + x), 64 wide, on a batch of 512."
    )
    torch.manual_seed(0)
    layer, x = TanhLayer(64), torch.randn(512, 64)
    adjoints = {
        "unrolled": im.UnrolledAdjoint(),
        "implicit": im.ImplicitAdjoint(linear_solver=im.BiCGStab()),
    }

    def solve(steps: int, adjoint: Any) -> Tensor:
        solver = im.FixedPointIteration(rtol=0, max_steps=steps)
        return im.fixed_point(
            layer, torch.zeros_like(x), x, solver=solver, adjoint=adjoint, in_dims=0, on_failure="ignore"
        ).value

    with torch.no_grad():
        forward = viz.peak_bytes(lambda: solve(MEMORY_STEPS[-1], adjoints["implicit"]))
    measured: dict[str, list[int]] = {name: [] for name in adjoints}
    for steps in track(MEMORY_STEPS, "measuring", console=journey.console):
        for name, adjoint in adjoints.items():
            layer.zero_grad()
            measured[name].append(viz.peak_bytes(lambda: solve(steps, adjoint).square().sum().backward()))  # noqa: B023 (called at once)

    table = Table(
        caption=f"peak memory of forward and backward pass; the forward pass alone: {forward / 2**20:.1f} MiB"
    )
    table.add_column("solver steps", justify="right")
    for name in adjoints:
        table.add_column(name, justify="right")
    for row, steps in enumerate(MEMORY_STEPS):
        table.add_row(str(steps), *(f"{measured[name][row] / 2**20:.1f} MiB" for name in adjoints))
    journey.console.print(table)
    unrolled, implicit = (measured[name][-1] / forward for name in adjoints)
    journey.say(
        f"\nAfter {MEMORY_STEPS[-1]} steps, unrolling takes [bold]{unrolled:.0f} times[/bold] the memory of "
        f"the forward pass alone. Implicit differentiation takes [bold]{implicit:.1f} times[/bold] as much, "
        "however many steps the solver takes."
    )
    flat = max(measured["implicit"]) <= 1.1 * min(measured["implicit"])
    journey.find("memory when unrolled", f"{unrolled:.0f} x forward", unrolled > 10)
    journey.find("memory when implicit", f"{implicit:.1f} x forward, " + ("flat" if flat else "NOT flat"), flat)
    journey.draw(
        "memory.png",
        viz.plot_memory(MEMORY_STEPS, measured, forward, "the forward pass alone"),
        "memory against solver steps, unrolled and implicit",
    )


# --- 3. Check ----------------------------------------------------------------------------------------------


def check(journey: Journey) -> None:
    """Compare the implicit gradient with central finite differences, entry by entry."""
    from rich.table import Table

    journey.console.rule("[bold]3  A gradient that you can check", align="left")
    journey.say(
        "The implicit gradient does not differentiate the steps of the solver. To check it, we change each weight "
        "of a small layer by +-0.00001, solve again to a relative tolerance of 1e-13, and compare the change of "
        "the loss with the gradient."
    )
    torch.manual_seed(0)
    layer = TanhLayer(8).double()
    x, weight = torch.randn(16, 8).double(), layer.linear.weight
    solver = im.Broyden(rtol=1e-13, max_steps=200)
    adjoint = im.ImplicitAdjoint(linear_solver=im.GMRES(rtol=1e-13))

    def loss() -> Tensor:
        z = im.fixed_point(
            layer, torch.zeros_like(x), x, solver=solver, adjoint=adjoint, in_dims=0, on_failure="raise"
        ).value
        return (z**3).sum()

    loss().backward()
    assert weight.grad is not None  # backward has just put it there
    differences = central_differences(loss, weight, 1e-5, journey.console)
    relative = viz.relative_difference(weight.grad, differences)

    table = Table(caption="relative difference: relative to the largest entry of the gradient")
    for heading in ("weight", "finite difference", "implicit", "relative difference"):
        table.add_column(heading, justify="right")
    for i, j in [(0, 0), (1, 5), (3, 2), (4, 7), (6, 1), (7, 7)]:
        row = (differences[i, j], weight.grad[i, j])
        table.add_row(f"W({i}, {j})", *(f"{value:+.9f}" for value in row), f"{relative[i, j]:.0e}")
    journey.console.print(table)
    worst = float(relative.max())
    journey.say(
        f"\nFor all {weight.numel()} weights, the relative difference is at most [bold]{worst:.0e}[/bold]."
    )
    journey.find("gradient against finite differences", f"differ by {worst:.0e}", worst < GRADIENT_TOLERANCE)
    journey.draw(
        "gradient.png",
        viz.plot_gradient_check(weight.grad, differences, "central finite difference"),
        "every entry of the gradient against finite differences",
    )


def central_differences(loss: Callable[[], Tensor], parameter: Tensor, step: float, console: Console) -> Tensor:
    """(loss(p + step) - loss(p - step)) / (2 step) for each entry p of `parameter`, in its shape."""
    from rich.progress import track

    result = torch.zeros_like(parameter)
    entries, slots = parameter.data.view(-1), result.data.view(-1)
    for index in track(range(len(entries)), "differencing", console=console):
        original = entries[index].item()
        values = []
        for nudged in (original + step, original - step):
            entries[index] = nudged
            with torch.no_grad():
                values.append(loss().item())
        entries[index] = original
        slots[index] = (values[0] - values[1]) / (2 * step)
    return result.detach()


# --- 4. Flow -----------------------------------------------------------------------------------------------


def flow(journey: Journey) -> None:
    """Show what a neural ODE cannot represent, and what one more dimension changes."""
    from implicitly.recipes import ode_circles

    journey.console.rule("[bold]4  What a neural ODE cannot represent", align="left")
    journey.say(
        "A neural ODE moves points along dy/dt = f(y), where f is a network. Its trajectories never cross. So in "
        "one dimension it keeps points in order and cannot learn x -> x²; in the plane it cannot separate a disc "
        "from the ring around it. A residual network can, as its steps are finite. An augmented neural ODE can, "
        "too: it has one more dimension, which starts at zero, so that trajectories can pass each other."
    )
    config = ode_circles.Config(epochs=FLOW_EPOCHS, out=journey.out / "ode")
    results = ode_circles.run(config)
    found = {(result.task, result.name): result for result in results}
    journey.console.print()
    journey.console.print(ode_circles.results_table(results, config))

    least = ode_circles.least_loss_of_increasing(*ode_circles.held_out("square", config))
    plain, augmented = found["square", "plain"].loss, found["square", "augmented"].loss
    circles = found["circles", "augmented"]
    assert circles.accuracy is not None  # the circles have one
    journey.say(
        f"\nOn x -> x², no increasing function has an error below {least:.2f}. The plain neural ODE reaches "
        f"[bold]{plain:.2f}[/bold], the augmented one [bold]{augmented:.3f}[/bold]. The augmented one also "
        f"classifies [bold]{100 * circles.accuracy:.1f} %[/bold] of the points of the circles correctly, with "
        f"{circles.forward_calls} calls of f."
    )
    journey.find(
        "augmented neural ODE: accuracy on circles",
        f"{100 * circles.accuracy:.1f} %",
        circles.accuracy >= FLOW_ACCURACY,
    )
    journey.find(
        "error on x²",
        f"plain {plain:.2f} (lower bound {least:.2f}), augmented {augmented:.3f}",
        plain >= least and augmented <= FLOW_ERROR,
    )
    journey.files["ode/circles.png"] = "how three networks move a disc and the ring around it"
    journey.files["ode/square.png"] = "trajectories of three networks that learn x²"


# --- 5. Project --------------------------------------------------------------------------------------------


def project(journey: Journey) -> None:
    """Learn the faces of polygons by projecting points onto them, a quadratic program each."""
    from implicitly.recipes import opt_polytope

    journey.console.rule("[bold]5  An optimisation problem as a layer", align="left")
    journey.say(
        "The output of a layer can also be the solution of an optimisation problem: here z minimises |z - x|² "
        "subject to G z <= h. It is the point of a polygon that is nearest to x; the weights G and h are the "
        "faces of the polygon. The layer learns an unknown polygon from points that are labelled as inside or "
        "outside: it should not move points inside, and should move points outside."
    )
    config = opt_polytope.Config(polygons=(3, 5), epochs=POLYTOPE_EPOCHS, out=journey.out / "opt")
    results = opt_polytope.run(config)
    journey.console.print()
    journey.console.print(opt_polytope.results_table(results, config))
    steps = POLYTOPE_EPOCHS * -(-config.points // config.batch_size)
    programs = len(results) * POLYTOPE_EPOCHS * config.points
    journey.say(
        f"\nAfter {steps} training steps each, the overlap of true and learned polygons is "
        + " and ".join(f"[bold]{100 * result.iou:.1f} %[/bold]" for result in results)
        + f". The training solved and differentiated {programs:,} quadratic programs."
    )
    worst = min(result.iou for result in results)
    journey.find(
        "overlap of learned and true polygons",
        " and ".join(f"{100 * result.iou:.1f} %" for result in results),
        worst >= POLYTOPE_OVERLAP,
    )
    journey.files["opt/polytopes.png"] = "two polygons at several stages of training"


# --- Summary -----------------------------------------------------------------------------------------------


def summarise(journey: Journey, seconds: float) -> int:
    """Print what was found and where the files are; 1 if a promise was broken, else 0."""
    from rich.table import Table

    broken = [(what, how_much) for what, how_much, kept in journey.findings if not kept]
    journey.console.rule("[bold]Summary", align="left")
    table = Table(show_header=False)
    for what, how_much, kept in journey.findings:
        table.add_row("[green]ok[/green]" if kept else "[bold red]no[/bold red]", what, how_much)
    table.add_row("", "time", f"{seconds:.0f} s")
    journey.console.print(table)
    journey.console.print(f"\nfiles are in {journey.out.absolute()}", highlight=False)
    files = Table(show_header=False, box=None)
    for name, shows in journey.files.items():
        files.add_row(f"  {name}", shows)
    journey.console.print(files)
    journey.console.print()
    if broken:
        for what, how_much in broken:
            journey.console.print(f"[bold red]The tour failed:[/bold red] {what}: {how_much}.", highlight=False)
        return 1
    journey.say("Next: [bold]implicitly list[/bold], and [bold]implicitly fit deq-image --help[/bold].")
    return 0
