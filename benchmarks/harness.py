"""How benchmarks are measured and reported: alternating runs, medians with their spread, ratios."""

from __future__ import annotations

import contextlib
import datetime
import gc
import importlib.metadata
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from tabulate import tabulate

from implicitly.viz import peak_bytes

# The least seconds that a timing lasts.
LEAST = 0.03


@dataclass(frozen=True)
class Effort:
    """How much to measure."""

    rounds: int  # of each timing
    slow_samples: int  # samples in the batch of which one is slow
    iterations: int  # of the longer solve whose memory is measured
    training_steps: int

    @property
    def full(self) -> bool:
        """Whether the numbers are meant to be meaningful."""
        return self.iterations > 100


FULL = Effort(rounds=15, slow_samples=256, iterations=500, training_steps=1000)
SMOKE = Effort(rounds=1, slow_samples=16, iterations=20, training_steps=60)


@dataclass(frozen=True)
class Spread:
    """Median, minimum and maximum of several measurements."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))

    def show(self, scale: float = 1.0, digits: int = 2) -> str:
        median, least, most = (f"{scale * v:.{digits}f}" for v in (self.median, self.least, self.most))
        return f"{median} ({least} to {most})"


@dataclass(frozen=True)
class Row:
    """One line of the table; `met` is None if there is no goal."""

    what: str
    ours: str
    peer: str
    goal: str = ""
    met: bool | None = None
    numbers: dict[str, Any] = field(default_factory=dict)  # what the texts were made from


@dataclass(frozen=True)
class Elsewhere:
    """A run in another process, which has warmed up and times itself: returns the seconds of so many runs."""

    seconds: Callable[[int], float]


Run = Callable[[], object] | Elsewhere
T = TypeVar("T")


def alternate(runs: Mapping[str, Run], rounds: int, warm: bool = False) -> dict[str, list[float]]:
    """Seconds that each of `runs` takes, `rounds` times each, in alternation.

    Whatever else the machine does then affects all of them alike, so ratios within a round mean more than times.
    Every other round runs in reverse order. Each runs once beforehand, unmeasured, unless all are `warm` and have
    done so. What takes less than `LEAST` is run several times in a row, as it would be in a program, and the mean
    of these counts.
    """
    for run in runs.values():
        if not (warm or isinstance(run, Elsewhere)):
            run()
    with _young_garbage():
        once = {name: _seconds(run, 1) for name, run in runs.items()}
        repeats = {name: max(1, math.ceil(LEAST / seconds)) for name, seconds in once.items()}
        # If all are slow, that was the first round.
        times = {name: [once[name]] if max(repeats.values()) == 1 else [] for name in runs}
        for index in range(len(next(iter(times.values()))), rounds):
            for name in list(runs) if index % 2 == 0 else reversed(list(runs)):
                times[name].append(_seconds(runs[name], repeats[name]) / repeats[name])
    return times


@contextlib.contextmanager
def _young_garbage() -> Iterator[None]:
    """A context in which only objects made in it are garbage-collected.

    Looking through everything that compilers and peers have made would take longer than most timings last.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _seconds(run: Run, repeats: int) -> float:
    if isinstance(run, Elsewhere):
        return run.seconds(repeats)
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        return time.perf_counter() - start
    finally:
        gc.enable()


def outcomes(runs: Mapping[str, Callable[[], T]], ours: Collection[str]) -> tuple[dict[str, T], dict[str, str]]:
    """What each of `runs` returns, and the message of peers that raise an error instead; ours must run."""
    values, failed = {}, {}
    for name, run in runs.items():
        try:
            values[name] = run()
        except Exception as error:
            if name in ours:
                raise
            failed[name] = in_a_cell(error)
    return values, failed


def in_a_cell(error: Exception) -> str:
    """An error as one line that fits into a table."""
    first = str(error).strip().partition("\n")[0].replace("|", "/")
    return f"{type(error).__name__}: {first[:100]}"


def ratios(numerators: Sequence[float], denominators: Sequence[float], factor: float = 1.0) -> Spread:
    """The spread of the ratios within each round, times `factor`."""
    return Spread.of([factor * a / b for a, b in zip(numerators, denominators)])


def markdown(rows: Sequence[Row], peer: str, caption: str = "") -> str:
    """The table, with how it was made below it; without the last two columns if no row has a goal."""
    cells = [(r.what, r.ours, r.peer, r.goal, {None: "", True: "yes", False: "no"}[r.met]) for r in rows]
    headers = ["measured", "implicitly", peer, "goal", "met"]
    columns = 5 if any(r.goal for r in rows) else 3
    table = tabulate(
        [row[:columns] for row in cells],
        headers=headers[:columns],
        tablefmt="github",
        disable_numparse=True,
    )
    return f"{table}\n\n{caption}".strip()


def environment(packages: Sequence[str]) -> dict[str, Any]:
    """What the numbers depend on: versions, processor, threads, date."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def peak_mib(run: Callable[[], object]) -> float:
    """Peak memory of the tensors of `run`, in MiB, without memory used inside an operation or a graph."""
    return peak_bytes(run) / 2**20


def resident_mib() -> float:
    """The memory of this process in MiB; NaN if the system does not tell."""
    statistics_file = Path("/proc/self/statm")
    if not statistics_file.exists():
        return float("nan")
    return int(statistics_file.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def _cpu_name() -> str:
    """The system's name of the CPU, with family and model if known: names on virtual machines include neither."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    known = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if "model name" not in known:
        return platform.processor()
    numbers = f" (family {known['cpu family']}, model {known['model']})" if "cpu family" in known else ""
    return known["model name"] + numbers


def write_json(path: Path, rows: Sequence[Row], surroundings: Mapping[str, Any], effort: Effort) -> None:
    """Write everything measured, and where."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {**surroundings, "effort": asdict(effort), "rows": [asdict(r) for r in rows]}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def write_between_markers(path: Path, family: str, text: str) -> None:
    """Replace the text between the two markers of a family in a file."""
    begin, end = f"<!-- bench:begin {family} -->", f"<!-- bench:end {family} -->"
    content = path.read_text(encoding="utf-8")
    if content.count(begin) != 1 or content.count(end) != 1 or content.index(begin) > content.index(end):
        raise ValueError(f"{path} must hold {begin} and, after it, {end}, once each")
    before, _, rest = content.partition(begin)
    _, _, after = rest.partition(end)
    path.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")
