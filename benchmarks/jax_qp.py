"""Quadratic programs by qpax: Q, p, G, h, A, b and weights, one entry per sample."""

from __future__ import annotations

import jax
import qpax

from benchmarks.jax_serve import problem, serve

jax.config.update("jax_enable_x64", True)


@jax.jit
def solutions(Q, p, G, h, A, b):
    """z of all programs, solved one after the other: under `vmap` qpax takes many times longer on a CPU."""
    return jax.lax.map(lambda program: qpax.solve_qp_primal(*program), (Q, p, A, b, G, h))


def loss(Q, p, G, h, A, b, weights):
    """A weighted sum of all z."""
    return (weights * solutions(Q, p, G, h, A, b)).sum()


def main() -> None:
    """Serve solutions, and the gradient by all arguments but Q."""
    given = problem()
    args = [given[name] for name in ("Q", "p", "G", "h", "A", "b")]
    # With the value, as in a training step.
    both = jax.jit(jax.value_and_grad(loss, argnums=tuple(range(1, 6))))
    calls = {
        "forward": lambda: solutions(*args),
        "forward and gradient": lambda: both(*args, given["weights"]),
    }
    serve(calls, ["qpax"])


if __name__ == "__main__":
    main()
