"""Robertson's reaction by diffrax: run in an environment of its own, prints JSON to standard output."""

from __future__ import annotations

import json
import statistics
import sys
import time

import diffrax
import jax
import jax.numpy as jnp

jax.config.update("jax_enable_x64", True)


def slope(t: float, y: jax.Array, k: jax.Array) -> jax.Array:
    a, b, c = y
    slow, fast, back = k[0] * a, k[1] * b * b, k[2] * b * c
    return jnp.stack([back - slow, slow - fast - back, fast])


def main() -> None:
    """For each relative tolerance of the arguments: the state at 1e5, seconds with and without compiling."""
    y0, k = jnp.array([1.0, 0.0, 0.0]), jnp.array([0.04, 3e7, 1e4])
    found = {}
    for rtol in map(float, sys.argv[1:]):
        control = diffrax.PIDController(rtol=rtol, atol=rtol * 1e-5)

        @jax.jit
        def solve(y0: jax.Array, k: jax.Array, control=control) -> tuple[jax.Array, jax.Array]:
            term, method = diffrax.ODETerm(slope), diffrax.Kvaerno5()
            options = {"stepsize_controller": control, "max_steps": 100_000}
            solution = diffrax.diffeqsolve(term, method, 0.0, 1e5, None, y0, k, **options)
            return solution.ys[-1], solution.stats["num_steps"]

        seconds = []
        for _ in range(21):
            start = time.perf_counter()
            y, steps = jax.block_until_ready(solve(y0, k))
            seconds.append(time.perf_counter() - start)
        found[rtol] = {
            "y": y.tolist(),
            "steps": int(steps),
            "first": seconds[0],
            "seconds": statistics.median(seconds[1:]),
        }
    print(json.dumps({"versions": {"diffrax": diffrax.__version__, "jax": jax.__version__}, "found": found}))


if __name__ == "__main__":
    main()
