"""Quadratic programs by qpax: Q, p, G, h, A, b and weights, one entry a sample."""

from __future__ import annotations

import jax
import qpax

from benchmarks.jax_serve import problem, serve

jax.config.update("jax_enable_x64", True)


@jax.jit
def solutions(Q, p, G, h, A, b):
    """z of all programs, one after the other: mapped over a batch, qpax takes many times longer on a CPU."""
    return jax.lax.map(lambda program: qpax.solve_qp_primal(*program), (Q, p, A, b, G, h))


def loss(Q, p, G, h, A, b, weights):
    """A weighted sum of all z."""
    return (weights * solutions(Q, p, G, h, A, b)).sum()


def main() -> None:
    """Solutions, and the gradient by all but Q."""
    given = problem()
    args = [given[name] for name in ("Q", "p", "G", "h", "A", "b")]
    # The value too, as a training step has it.
    both = jax.jit(jax.value_and_grad(loss, argnums=tuple(range(1, 6))))
    calls = {
        "forward": lambda: solutions(*args),
        "forward and gradient": lambda: both(*args, given["weights"]),
    }
    serve(calls, ["qpax"])


if __name__ == "__main__":
    main()
