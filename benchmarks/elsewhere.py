"""Peers on JAX: a process in an environment of its own that solves the same problem, timed in turn with ours."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import Elsewhere

ROOT = Path(__file__).parents[1]
# `make bench` sets it up.
JAX_PYTHON = ROOT / ".venv-jax" / "bin" / "python"


class PeerError(Exception):
    """A peer cannot run; the message says why."""


class JaxProcess:
    """One of the programs `benchmarks/jax_*.py`, for as long as the context lasts.

    It compiles and runs everything once, and then times what it is asked for, as `alternate` does.

    Attributes:
        versions: of the packages it names.
        failed: why a call of it could not run, by its name.

    Args:
        program: its module, such as "jax_ode".
        tensors: what it needs, handed over in a file.

    Raises:
        PeerError: on entering, where there is no such environment, or the program does not start.
    """

    versions: dict[str, str]
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
        if hasattr(os, "sched_setaffinity"):  # as many threads as PyTorch has
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
            self.process.stdin.close()  # it ends where its input does
        self.process.wait()
        self.process.stdout.close()
        self.errors.close()
        self.folder.cleanup()

    def result(self, name: str) -> Sequence[Tensor]:
        """What the call `name` returned, as the leaves of its pytree."""
        if name in self.failed:
            raise PeerError(self.failed[name])
        return self.found[name]

    def run(self, name: str) -> Elsewhere:
        """The call `name`, to be timed."""

        def seconds(repeats: int) -> float:
            assert self.process.stdin is not None
            with suppress(BrokenPipeError):  # where it has ended, the answer says why
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
