"""Minima with exact answers, which are found without the library."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad
from torch.nn.functional import softplus

import implicitly as im
from tests.problems import Problem, _cubic_exact, draw, flat, matrix, polished, unflat

D = torch.float64


@dataclass(frozen=True)
class Minimum(Problem):
    """A minimum; `f` is the objective."""

    entry: Callable[..., im.Solution] = im.argmin
    contracts: bool = False

    def displacement(self, z: Any, *args: Tensor) -> Tensor:
        """The gradient of the objective, as one real vector."""
        return grad(lambda v: self.f(unflat(v, z), *args).sum())(flat(z))


def stationary(objective: Callable[..., Tensor], z0: Tensor) -> Callable[..., Tensor]:
    """The minimum near z0 by recorded Newton steps on the gradient."""
    return polished(lambda z, *args: grad(lambda z: objective(z, *args).sum())(z), z0)


def quadratic(z, M, p):
    return 0.5 * (z @ M.mT).square().sum(1) + 0.5 * z.square().sum(1) - (p * z).sum(1)


def quadratic_exact(M, p):
    return p @ torch.linalg.inv(M.mT @ M + torch.eye(len(M), dtype=M.dtype))


def rosenbrock(z, a):
    return (a - z[:, 0]) ** 2 + 20 * (z[:, 1] - z[:, 0] ** 2) ** 2


def quartic(z, a):
    return z**4 / 4 + z**2 / 2 - a * z


LABELS = draw(6, seed=61).sign()


def logistic(z, X, log_decay):
    """Ridge logistic regression of fixed labels, one data set a sample."""
    margins = LABELS.to(z.dtype) * (X @ z.unsqueeze(2))[:, :, 0]
    return softplus(-margins).sum(1) + 0.5 * log_decay.exp() * z.square().sum(1)


def tree(z, A, x):
    bend = (z["vector"] @ A * z["image"].flatten(1)).sum(1)
    return (
        z["vector"].square().sum(1)
        + z["image"].square().sum((1, 2, 3))
        + 0.5 * bend.sin()
        - (x * z["vector"]).sum(1)
    )


def tree_gradient(z, A, x):
    like = {"vector": z[:, :2], "image": z[:, 2:].reshape(-1, 1, 1, 2)}
    shaped = lambda z: {"vector": z[:, :2], "image": z[:, 2:].reshape(like["image"].shape)}  # noqa: E731
    return grad(lambda z: tree(shaped(z), A, x).sum())(z)


def tree_exact(A, x):
    z = polished(tree_gradient, torch.zeros(2, 4, dtype=D))(A, x)
    return {"vector": z[:, :2], "image": z[:, 2:].reshape(-1, 1, 1, 2)}


def system(z, W, x):
    return softplus(W @ z).sum() + 0.5 * (z - x).square().sum()


class Energy(nn.Module):
    """A convex energy of z and x with parameters."""

    def __init__(self, n: int = 2, seed: int = 71):
        super().__init__()
        self.weight = nn.Parameter(matrix(n, 1.0, seed))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return softplus(z @ self.weight.mT + x).sum(1) + 0.5 * z.square().sum(1)


def complex_fit(z, A, b):
    misfit = z @ A.mT - b
    return 0.5 * (misfit * misfit.conj()).real.sum(1) + 0.5 * (z * z.conj()).real.sum(1)


def complex_exact(A, b):
    return b @ (torch.linalg.inv(A.mH @ A + torch.eye(2, dtype=A.dtype)) @ A.mH).mT


def _zeros(*shape: int, dtype: torch.dtype = D) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


_WIDE = (torch.float64, torch.float32)  # objectives whose bfloat16 gradient is all rounding
_ENERGY = Energy()

PROBLEMS = (
    Minimum(
        "quadratic", quadratic, _zeros(3, 3), (matrix(3, 2.0, 51), draw(3, 3, seed=52)), quadratic_exact, (None, 0)
    ),
    Minimum(
        "rosenbrock",
        rosenbrock,
        torch.tensor([[-1.2, 1.0]], dtype=D).repeat(3, 1),
        (torch.tensor([1.0, 0.5, -0.7], dtype=D),),
        lambda a: torch.stack([a, a**2], 1),
        (0,),
        dtypes=_WIDE,
    ),
    Minimum("quartic_0d", quartic, _zeros(3) + 1, (torch.tensor([3.0, -1.7, 0.5], dtype=D),), _cubic_exact, (0,)),
    Minimum(
        "logistic",
        logistic,
        _zeros(3, 2),
        (draw(3, 6, 2, seed=62), torch.tensor(-0.5, dtype=D)),
        stationary(logistic, _zeros(3, 2)),
        (0, None),
    ),
    Minimum(
        "tree",
        tree,
        {"vector": _zeros(2, 2), "image": _zeros(2, 1, 1, 2)},
        (matrix(2, 0.8, 63), draw(2, 2, seed=64)),
        tree_exact,
        (None, 0),
    ),
    Minimum(
        "one_system",
        system,
        _zeros(3),
        (matrix(3, 1.0, 65), draw(3, seed=66)),
        polished(lambda z, W, x: grad(system)(z, W, x), _zeros(3)),
        None,
    ),
    Minimum("module", _ENERGY, _zeros(3, 2), (draw(3, 2, seed=67),), stationary(_ENERGY, _zeros(3, 2)), (0,)),
    Minimum(
        "complex",
        complex_fit,
        _zeros(2, 2, dtype=torch.complex128),
        (matrix(2, 1.5, 68, dtype=torch.complex128), draw(2, 2, seed=69, dtype=torch.complex128)),
        complex_exact,
        (None, 0),
        dtypes=_WIDE,
    ),
)

NAMED = {problem.name: problem for problem in PROBLEMS}
