"""The network of `ode.py`, solved and differentiated by diffrax."""

from __future__ import annotations

import diffrax
import jax
import jax.numpy as jnp

from benchmarks.jax_serve import problem, serve


def field(t, y, parameters):
    """Linear layers with tanh between them; `parameters`: weight and bias of each in turn."""
    *inner, last = list(zip(parameters[::2], parameters[1::2]))
    for weight, bias in inner:
        y = jnp.tanh(y @ weight.T + bias)
    return y @ last[0].T + last[1]


def main() -> None:
    """Serve the forward solve, and the gradient by both adjoints."""
    given = problem()
    y0, t, tolerance = given.pop("y0"), given.pop("t"), float(given.pop("tolerance"))
    parameters = [given[f"parameter{i}"] for i in range(len(given))]
    control = diffrax.PIDController(rtol=tolerance, atol=tolerance)

    def solve(parameters, adjoint=diffrax.RecursiveCheckpointAdjoint()):
        options = {"stepsize_controller": control, "adjoint": adjoint}
        term, method = diffrax.ODETerm(field), diffrax.Dopri5()
        solution = diffrax.diffeqsolve(term, method, t[0], t[1], None, y0, parameters, **options)
        return solution.ys[-1], solution.stats["num_steps"]

    def gradient(adjoint):
        # With the value, as in a training step.
        compiled = jax.jit(jax.value_and_grad(lambda p: jnp.sum(solve(p, adjoint)[0] ** 2)))
        return lambda: compiled(parameters)

    forward = jax.jit(solve)
    calls = {
        "forward": lambda: forward(parameters),
        "checkpointed": gradient(diffrax.RecursiveCheckpointAdjoint()),
        "backsolve": gradient(diffrax.BacksolveAdjoint()),
    }
    serve(calls, ["diffrax"])


if __name__ == "__main__":
    main()
