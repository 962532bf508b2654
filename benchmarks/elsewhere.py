"""Peers in JAX: a process in a separate environment solves the same problem, timed in alternation with ours."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import Elsewhere, Row, Spread, alternate, ratios

ROOT = Path(__file__).parents[1]
# `make bench` sets it up.
JAX_PYTHON = ROOT / ".venv-jax" / "bin" / "python"


class PeerError(Exception):
    """A peer cannot run; the message says why."""


class JaxProcess:
    """One of the programs `benchmarks/jax_*.py`, running for as long as the context lasts.

    It compiles and runs everything once, and then times what it is asked for, as `alternate` does.

    Attributes:
        versions: versions of the packages that the program names.
        found: by name, what its calls returned, as the leaves of a pytree.
        failed: by name, why a call could not run.

    Args:
        program: its module, such as "jax_ode".
        tensors: the inputs, passed in a file.

    Raises:
        PeerError: on entering, if there is no such environment, or the program does not start.
    """

    versions: dict[str, str]
    found: dict[str, list[Tensor]]
    failed: dict[str, str]

    def __init__(self, program: str, tensors: Mapping[str, Tensor | float]):
        self.program = program
        self.arrays = {name: torch.as_tensor(value).detach().numpy() for name, value in tensors.items()}

    def __enter__(self) -> JaxProcess:
        if not JAX_PYTHON.exists():
            raise PeerError(f"there is no {JAX_PYTHON.relative_to(ROOT)}; `make bench` sets it up")
        self.folder = tempfile.TemporaryDirectory()
        path = Path(self.folder.name) / "problem.npz"
        np.savez(path, **self.arrays)
        self.errors = (Path(self.folder.name) / "errors").open("w+", encoding="utf-8")
        command = [str(JAX_PYTHON), "-m", f"benchmarks.{self.program}", str(path)]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.errors}
        self.process = subprocess.Popen(command, cwd=ROOT, text=True, **pipes)
        if hasattr(os, "sched_setaffinity"):  # as many threads as PyTorch uses
            cores = sorted(os.sched_getaffinity(0))[: torch.get_num_threads()]
            os.sched_setaffinity(self.process.pid, cores)
        try:
            told = json.loads(self._answer())
        except PeerError:
            self.__exit__()
            raise
        self.versions, self.failed, counts = told["versions"], told["failed"], told["leaves"]
        with np.load(path.with_suffix(".out.npz")) as file:
            self.found = {
                name: [torch.from_numpy(file[f"{name}/{i}"]) for i in range(counts[name])] for name in counts
            }
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()  # the program ends when its input does
        self.process.wait()
        self.process.stdout.close()
        self.errors.close()
        self.folder.cleanup()

    def run(self, name: str) -> Elsewhere:
        """The call `name`, to be timed."""

        def seconds(repeats: int) -> float:
            assert self.process.stdin is not None
            with suppress(BrokenPipeError):  # if it has ended, its answer says why
                self.process.stdin.write(f"{name} {repeats}\n")
                self.process.stdin.flush()
            return float(self._answer())

        return Elsewhere(seconds)

    def _answer(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.errors.seek(0)
            said = self.errors.read().strip().splitlines() or ["it says nothing"]
            raise PeerError(f"{self.program} ended with code {self.process.returncode}: {said[-1]}")
        return line


@dataclass(frozen=True)
class Line:
    """One line of a table: ours next to a call of a peer in JAX.

    Attributes:
        what: what is measured, in ms.
        call: the name of the peer's call.
        run: the same computation by ours.
        error: maps what either returns, a list of tensors, to its error; the peer may return further tensors
            before a gradient, and after a solution.
        goal, least: the goal in words, and as a factor by which to be faster than the peer.
        package: the peer, if it is not that of the other lines.
    """

    what: str
    call: str
    run: Callable[[], Sequence[Tensor]]
    error: Callable[[Sequence[Tensor]], float]
    goal: str = ""
    least: float | None = None
    package: str | None = None


def beside(
    program: str,
    package: str,
    tensors: Mapping[str, Tensor | float],
    lines: Sequence[Line],
    rounds: int,
    digits: int,
) -> list[Row]:
    """Rows for ours next to the program `benchmarks/jax_*.py`, whose calls are of `package`."""
    try:
        with JaxProcess(program, tensors) as jax:
            return [_row(jax, line.package or package, line, rounds, digits) for line in lines]
    except PeerError as failure:
        return [Row(line.what, "", f"{line.package or package}: {failure}", line.goal) for line in lines]


def _row(jax: JaxProcess, package: str, line: Line, rounds: int, digits: int) -> Row:
    peer = f"{package} {jax.versions[package]}"
    if line.call in jax.failed:
        return Row(line.what, "", f"{peer}: {jax.failed[line.call]}", line.goal)
    errors = {"ours": line.error(line.run()), package: line.error(jax.found[line.call])}
    seconds = alternate({"ours": line.run, package: jax.run(line.call)}, rounds)
    faster = ratios(seconds[package], seconds["ours"])
    ours, theirs = (f"{Spread.of(seconds[w]).show(1e3, digits)}, error {errors[w]:.0e}" for w in errors)
    met = None if line.least is None else faster.median >= line.least
    numbers = {"versions": jax.versions, "seconds": seconds, "error": errors}
    return Row(line.what, f"{ours}; {faster.show()} times faster", f"{peer}: {theirs}", line.goal, met, numbers)
