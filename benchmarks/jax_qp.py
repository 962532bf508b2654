"""Quadratic programs by qpax: run in an environment of its own, on the arrays of a file; prints JSON.

The command: jax_qp.py PROGRAMS.npz ROUNDS, where the file holds Q, p, G, h, A, b and weights, one entry a sample;
z and the gradients go beside it, into PROGRAMS.out.npz.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import qpax

jax.config.update("jax_enable_x64", True)


def solutions(Q, p, G, h, A, b):
    """z of all programs, one after the other: mapped over a batch, qpax takes many times longer on a CPU."""
    return jax.lax.map(lambda program: qpax.solve_qp_primal(*program), (Q, p, A, b, G, h))


def loss(Q, p, G, h, A, b, weights):
    """A weighted sum of all z."""
    return (weights * solutions(Q, p, G, h, A, b)).sum()


def timed(call, args, rounds):
    """The result and the seconds of each call after the first."""
    value = jax.block_until_ready(call(*args))
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        jax.block_until_ready(call(*args))
        seconds.append(time.perf_counter() - start)
    return value, seconds


def main() -> None:
    """Solve, differentiate, time and tell."""
    path, rounds = sys.argv[1], int(sys.argv[2])
    with np.load(path) as file:
        args = [jnp.asarray(file[name]) for name in ("Q", "p", "G", "h", "A", "b", "weights")]
    z, forward = timed(jax.jit(solutions), args[:-1], rounds)
    # The value too, as a training step has it.
    both = jax.jit(jax.value_and_grad(loss, argnums=tuple(range(1, 6))))
    (_, gradients), whole = timed(both, args, rounds)
    found = {"z": z, **{f"gradient{i}": g for i, g in enumerate(gradients)}}
    np.savez(path.replace(".npz", ".out.npz"), **{name: np.asarray(value) for name, value in found.items()})
    told = {"version": importlib.metadata.version("qpax"), "forward": forward, "forward and gradient": whole}
    print(json.dumps(told))


if __name__ == "__main__":
    main()
