"""The convolutional cell of `fixed_point.py`, solved and differentiated by jaxopt and optimistix.

jaxopt uses Anderson acceleration; optimistix uses plain iteration, its only fixed-point solver that holds no
matrix.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import lineax
import optimistix
from jaxopt import AndersonAcceleration
from jaxopt.linear_solve import solve_gmres

from benchmarks.jax_serve import problem, serve


def convolution(x, weight):
    """A padded 3x3 convolution without a bias."""
    return jax.lax.conv_general_dilated(x, weight, (1, 1), "SAME", dimension_numbers=("NCHW", "OIHW", "NCHW"))


def group_norm(x, weight, bias, groups):
    """Group normalisation as in PyTorch, with its epsilon."""
    apart = x.reshape(len(x), groups, -1)
    mean, variance = apart.mean(2, keepdims=True), apart.var(2, keepdims=True)
    normal = ((apart - mean) * jax.lax.rsqrt(variance + 1e-5)).reshape(x.shape)
    return normal * weight[:, None, None] + bias[:, None, None]


def cell(z, x, p, groups):
    """f(z, x) of `recipes/deq_image.py`."""
    y = group_norm(jax.nn.relu(convolution(z, p["conv_in.weight"])), *norm(p, "norm_inner"), groups)
    branch = group_norm(x + convolution(y, p["conv_out.weight"]), *norm(p, "norm_branch"), groups)
    return group_norm(jax.nn.relu(z + branch), *norm(p, "norm_sum"), groups)


def norm(p, name):
    """The weight and bias of the normalisation `name`."""
    return p[f"{name}.weight"], p[f"{name}.bias"]


def main() -> None:
    """Serve solutions, and gradients of a product with the cotangent."""
    p = problem()
    x, cotangent, groups = p.pop("x"), p.pop("cotangent"), int(p.pop("groups"))
    atol, rtol, max_steps = float(p.pop("atol")), float(p.pop("rtol")), int(p.pop("max_steps"))
    history = int(p.pop("history"))
    options = {"history_size": history, "tol": atol, "maxiter": max_steps}
    linear_solve = partial(solve_gmres, tol=rtol, maxiter=max_steps)
    anderson = AndersonAcceleration(partial(cell, groups=groups), implicit_diff_solve=linear_solve, **options)
    # It measures the error of z as the last step over the tolerance, in this norm; its GMRES does so entry by
    # entry.
    picard = optimistix.FixedPointIteration(rtol=0.0, atol=atol, norm=optimistix.two_norm)
    adjoint = optimistix.ImplicitAdjoint(lineax.GMRES(rtol=rtol, atol=rtol, max_steps=max_steps))

    def accelerated(x, p):
        return anderson.run(jnp.zeros_like(x), x, p)[0]

    def plain(x, p):
        f = lambda z, args: cell(z, *args, groups=groups)  # noqa: E731
        z0 = jnp.zeros_like(x)
        return optimistix.fixed_point(f, picard, z0, (x, p), max_steps=max_steps, adjoint=adjoint).value

    def gradient(solve):
        by_both = jax.jit(jax.grad(lambda x, p: jnp.vdot(cotangent, solve(x, p)), argnums=(0, 1)))

        def by_parameters():
            by_x, by_p = by_both(x, p)
            return by_x, [by_p[name] for name in p]  # in PyTorch's order

        return by_parameters

    calls = {}
    for name, solve in (("Anderson", accelerated), ("FixedPointIteration", plain)):
        calls[name] = partial(jax.jit(solve), x, p)
        calls[f"{name}, gradient"] = gradient(solve)
    serve(calls, ["jaxopt", "optimistix"])


if __name__ == "__main__":
    main()
