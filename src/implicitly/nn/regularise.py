"""Measures of how contractive a cell is at an equilibrium, to monitor and to regularise."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.func import vjp
from torch.nn.attention import SDPBackend, sdpa_kernel

from implicitly.checks import check_count
from implicitly.inference import normal
from implicitly.transforms import out_of_inference_mode, under_transform
from implicitly.tree import Layout, row_norm


def jacobian_norm(
    f: Callable[..., Any], z: Any, *args: Any, samples: int = 1, generator: torch.Generator | None = None
) -> Tensor:
    """Hutchinson's estimate of |J|_F^2 for each sample, where J is the Jacobian of f at z.

    It is differentiable, to be added to a loss, and unbiased: |J|_F^2 = E |J' v|^2 for v ~ N(0, I). Bai, Koltun
    and Kolter, "Stabilizing Equilibrium Models by Jacobian Regularization", ICML 2021 (who divide it by the number
    of entries of z).

    Args:
        f: `f(z, *args)` returns a z. `scaled_dot_product_attention` in it is computed without a fused kernel,
            since those have no second derivative.
        z: a state, `(B, ...)` or a pytree of them, usually the equilibrium. Gradients flow to it too.
        samples: number of vectors v to average over; each costs one product with the transposed Jacobian.
        generator: draws the vectors, on the device of z; None: PyTorch's global generator of that device.

    Returns:
        `(B,)` estimates.
    """
    check_count("jacobian_norm", "samples", samples)
    with out_of_inference_mode((z, args)) as (z, args), normal(f, args):
        layout, matrix, pull = _pullback(f, z, args, create_graph=True)
        total = matrix.new_zeros(len(matrix))
        for _ in range(samples):
            v = torch.randn(matrix.shape, dtype=matrix.dtype, device=matrix.device, generator=generator)
            total = total + pull(v).square().sum(1)
        return layout.per_sample(total / samples)


def spectral_radius(
    f: Callable[..., Any], z: Any, *args: Any, steps: int = 50, generator: torch.Generator | None = None
) -> Tensor:
    """The spectral radius of the Jacobian of f at z for each sample; if it is below 1, plain iteration converges.

    It is found by power iteration with J', which has the eigenvalues of J, as the mean growth rate over the second
    half of the steps. This is right for complex pairs too, whose growth fluctuates from step to step.

    Args:
        f: `f(z, *args)` returns a z.
        z: a state, `(B, ...)` or a pytree of them, usually the equilibrium.
        steps: steps of the power iteration, at least 2; each is one product with the transposed Jacobian.
        generator: draws the start, on the device of z; None: PyTorch's global generator of that device.

    Returns:
        `(B,)` estimates, without gradient.
    """
    check_count("spectral_radius", "steps", steps, least=2)
    with out_of_inference_mode((z, args)) as (z, args), normal(f, args):
        layout, matrix, pull = _pullback(f, z, args, create_graph=False)
        v = torch.randn(matrix.shape, dtype=matrix.dtype, device=matrix.device, generator=generator)
        log_growth, (direction, _) = matrix.new_zeros(len(matrix)), _direction(v)
        for k in range(steps):
            direction, log_length = _direction(pull(direction))
            if k >= steps // 2:
                log_growth = log_growth + log_length
        return layout.per_sample((log_growth / (steps - steps // 2)).exp().detach())


def _direction(v: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of `v` `(B, n)` divided by their lengths, and the logarithms `(B,)` of these; zeros stay zeros."""
    tiny = torch.finfo(v.dtype).tiny
    size = torch.linalg.vector_norm(v, float("inf"), 1) if v.shape[1] else v.new_zeros(len(v))
    size = size.clamp_min(tiny)
    v = v / size[:, None]  # squares of large and small entries overflow and underflow
    length = row_norm(v)
    return v / length.clamp_min(tiny)[:, None], size.log() + length.log()


def _pullback(
    f: Callable[..., Any], z: Any, args: tuple[Any, ...], create_graph: bool
) -> tuple[Layout, Tensor, Callable[[Tensor], Tensor]]:
    """The layout of z as a matrix, that matrix, and the map v -> J' v on its shape."""
    layout = Layout.of(z, 1, "z")
    matrix = layout.pack(z)

    def packed(matrix: Tensor) -> Tensor:
        value = f(layout.unpack(matrix), *args)
        layout.check(value, "z")
        return layout.pack(value)

    # PyTorch's fused attention kernels have no second derivative, which the gradient of an estimate needs.
    attention = sdpa_kernel(SDPBackend.MATH) if create_graph else nullcontext()
    if under_transform():  # elsewhere use autograd, which also takes functions that torch.func refuses
        with attention:
            pull = vjp(packed, matrix)[1]
        return layout, matrix, lambda v: pull(v)[0]
    with torch.enable_grad(), attention:
        matrix = matrix.view_as(matrix) if matrix.requires_grad else matrix.detach().requires_grad_()
        value = packed(matrix)
        # If f ignores z, the Jacobian is zero: autograd finds that out as long as there is a graph at all.
        value = value if value.requires_grad else value + 0 * matrix

    def pull_recorded(v: Tensor) -> Tensor:
        return torch.autograd.grad(value, matrix, v, True, create_graph, materialize_grads=True)[0]

    return layout, matrix, pull_recorded
