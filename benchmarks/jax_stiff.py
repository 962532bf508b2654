"""Robertson's reaction by diffrax."""

from __future__ import annotations

import diffrax
import jax
import jax.numpy as jnp

from benchmarks.jax_serve import problem, serve

jax.config.update("jax_enable_x64", True)


def slope(t: float, y: jax.Array, k: jax.Array) -> jax.Array:
    """dy/dt of the three concentrations."""
    a, b, c = y
    slow, fast, back = k[0] * a, k[1] * b * b, k[2] * b * c
    return jnp.stack([back - slow, slow - fast - back, fast])


def main() -> None:
    """Serve the state at the end, and the number of steps taken."""
    given = problem()
    y0, t, k = given["y0"], given["t"], given["k"]
    control = diffrax.PIDController(rtol=float(given["rtol"]), atol=float(given["atol"]))

    @jax.jit
    def solve(y0: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
        term, method = diffrax.ODETerm(slope), diffrax.Kvaerno5()
        options = {"stepsize_controller": control, "max_steps": 100_000}
        solution = diffrax.diffeqsolve(term, method, t[0], t[1], None, y0, k, **options)
        return solution.ys[-1], solution.stats["num_steps"]

    serve({"forward": lambda: solve(y0, k)}, ["diffrax"])


if __name__ == "__main__":
    main()
