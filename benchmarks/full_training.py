"""`python -m benchmarks.full_training`: the recipe `deq-image` at full size, on an NVIDIA device if there is one.

Each network's numbers are written down as soon as it is trained, so that a run which is cut off leaves the rest.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tabulate import tabulate

from benchmarks.gpu import Machine, surroundings
from benchmarks.harness import write_between_markers
from implicitly.recipes._classification import Result, begin, percent
from implicitly.recipes.deq_image import Config, fit

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "full_training.json"
LEGEND = """\
The recipe `deq-image`, the same number of parameters each, Adam and no augmentation; the accuracy is that of the
last weights, so that nothing was chosen on the test set. Seconds are those of training alone."""


def numbers(result: Result) -> dict[str, Any]:
    """What is kept of a trained network."""
    costs = result.costs
    return {
        "name": result.name,
        "test_accuracy": result.test_accuracy,
        "parameters": result.parameters,
        "seconds_per_epoch": result.seconds_per_epoch,
        "costs": asdict(costs),
        "trained_on": result.device,
    }


def shown(content: dict[str, Any]) -> str:
    """The table of a run, and where it ran."""
    rows = [
        [
            r["name"],
            percent(r["test_accuracy"]),
            f"{r['parameters']:,}",
            f"{r['seconds_per_epoch']:.2f}",
            f"{r['costs']['peak_bytes'] / 2**20:.0f}",
        ]
        for r in content["networks"]
    ]
    headers = ["network", "test accuracy", "parameters", "s an epoch", "peak of a step, MiB"]
    table = tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)
    config = content["config"]
    how = f"{config['dataset']}, {config['epochs']} epochs, batches of {config['batch_size']}"
    where = f"{content['device']}, PyTorch {content['versions']['torch']}, {content['date'][:10]}"
    return f"{table}\n\n{LEGEND} {how}. `benchmarks/results/{RESULTS.name}`: {where}."


def main(arguments: list[str] | None = None) -> int:
    """Train them and write the numbers down."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.full_training", description=__doc__)
    parser.add_argument("--dataset", default="cifar10", choices=("digits", "mnist", "cifar10"))
    parser.add_argument("--data", type=Path, help="folder that holds the data set")
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--models", nargs="+", default=["resnet", "quick", "deq", "unrolled"])
    parser.add_argument("--run", type=Path, help="folder of checkpoints and logs")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--write-readme", action="store_true", help="only put the results into README.md")
    chosen = parser.parse_args(arguments)
    if chosen.write_readme:
        text = shown(json.loads(chosen.out.read_text(encoding="utf-8")))
        write_between_markers(HERE.parent / "README.md", "full_training", text)
        return 0
    config = Config(
        dataset=chosen.dataset,
        data=chosen.data,
        epochs=chosen.epochs,
        batch_size=chosen.batch_size,
        models=tuple(chosen.models),
        out=chosen.run,
        progress=False,
    )
    data, run = begin("deq-image", config, Console())
    machine = Machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"), smoke=False)
    kept = {name: getattr(config, name) for name in ("dataset", "epochs", "batch_size", "learning_rate", "seed")}
    content: dict[str, Any] = {**surroundings(machine), "config": kept, "networks": []}
    for name in config.models:
        content["networks"].append(numbers(fit(name, replace(config, models=(name,)), data, run / name)))
        chosen.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        print(f"{shown(content)}\n", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
