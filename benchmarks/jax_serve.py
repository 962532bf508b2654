"""What the JAX programs share: they run their calls once, report the results, and then time what is asked for.

The other side is `elsewhere.py`. This file runs only in the JAX environment.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def problem() -> dict[str, jax.Array]:
    """The arrays in the file named on the command line."""
    with np.load(sys.argv[1]) as file:
        return {name: jnp.asarray(file[name]) for name in file.files}


def serve(calls: Mapping[str, Callable[[], Any]], packages: Sequence[str]) -> None:
    """Run each call once, save the leaves of its pytree next to the problem, and report.

    Then time the calls named on standard input, one line "NAME REPEATS" each, until it ends.
    """
    leaves, failed = {}, {}
    for name, call in calls.items():
        try:
            leaves[name] = jax.tree.leaves(jax.block_until_ready(call()))
        except Exception as error:  # it goes into the table, and the other calls still run
            failed[name] = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:100]}"
    arrays = {f"{name}/{i}": np.asarray(leaf) for name, found in leaves.items() for i, leaf in enumerate(found)}
    np.savez(sys.argv[1].replace(".npz", ".out.npz"), **arrays)
    versions = {name: importlib.metadata.version(name) for name in ("jax", *packages)}
    counts = {name: len(found) for name, found in leaves.items()}
    print(json.dumps({"versions": versions, "failed": failed, "leaves": counts}), flush=True)
    for line in sys.stdin:
        name, repeats = line.rsplit(" ", 1)
        start = time.perf_counter()
        for _ in range(int(repeats)):
            jax.block_until_ready(calls[name]())
        print(time.perf_counter() - start, flush=True)
