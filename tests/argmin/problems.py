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
    constraint: Any = None

    def solve(self, *args: Tensor, z0: Any = None, **options: Any) -> im.Solution:
        """The library's solution at `args` (default: the problem's own)."""
        constraint = {} if self.constraint is None else {"constraint": self.constraint}
        return super().solve(*args, z0=z0, **constraint, **options)

    def displacement(self, z: Any, *args: Tensor) -> Tensor:
        """What vanishes at the minimum, as one real vector: the gradient, its projection, or the KKT equations."""
        f = self.f if self.entry is im.argmin else lambda z, *args: self.f(z, *args).square().sum(1) / 2
        gradient = grad(lambda v: f(unflat(v, z), *args).sum())(flat(z))
        if self.constraint is None:
            return gradient
        if isinstance(self.constraint, im.Equality):
            return torch.cat([gradient, flat(self.constraint.h(z, *args))])
        return flat(self.constraint(z - unflat(gradient, z), *args)) - flat(z)

    def amplification(self) -> float:
        """|A^-1|, of KKT equations an upper bound for those below."""
        return 10.0 if isinstance(self.constraint, im.Equality) else super().amplification()


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


LABELS = draw(4, seed=61).sign()


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


# ---------------------------------------------------------------------------------------- over a set


def nearest(z, x, *args):
    return 0.5 * (z - x).square().sum(1)


def on_ball(z, x, radius):
    norm = z.norm(dim=1, keepdim=True)
    return z * torch.where(norm > radius, radius / torch.where(norm > 0, norm, 1.0), 1.0)


def on_box(z, A, p, low):
    return torch.maximum(z, low)


def bowl(z, A, p, low):
    return 0.5 * (z @ A.mT).square().sum(1) - (p * z).sum(1)


def bowl_exact(A, p, low):
    """The bound is active in the coordinates that a plain projected descent ends at; the others are free."""
    H = A.mT @ A
    z = torch.zeros_like(p)
    for _ in range(300):
        z = torch.maximum(z - (z @ H - p) / 4, low).detach()
    rows = []
    for i in range(len(p)):
        free = z[i] > low + 1e-6
        values = low.expand(z.shape[1])
        if bool(free.any()):
            inner = torch.linalg.inv(H[free][:, free]) @ (p[i][free] - H[free][:, ~free] @ values[~free])
            values = torch.zeros_like(z[i]).index_put((free,), inner) + torch.where(free, 0.0, values)
        rows.append(values)
    return torch.stack(rows)


def on_simplex(z, *args):
    u = z.sort(1, descending=True).values
    count = torch.arange(1, z.shape[1] + 1, dtype=z.dtype)
    excess = u.cumsum(1) - 1
    support = (u * count > excess).sum(1, keepdim=True).clamp(min=1)
    return (z - excess.gather(1, support - 1) / support).clamp(min=0)


def mixture(z, A, b):
    return 0.5 * (z @ A.mT - b).square().sum(1) + 0.05 * z.square().sum(1)


def mixture_exact(A, b):
    """Of every support, the stationary point on it; the best of those that are feasible (with 3 unknowns: 7)."""
    n = A.shape[1]
    H = A.mT @ A + 0.1 * torch.eye(n, dtype=A.dtype)
    rows = []
    for row in b:
        found = []
        for code in range(1, 2**n):
            S = [i for i in range(n) if code >> i & 1]
            inverse = torch.linalg.inv(H[S][:, S])
            linear = (row @ A)[S]
            dual = (inverse.sum(0) @ linear - 1) / inverse.sum()
            inner = inverse @ (linear - dual)
            z = torch.zeros(n, dtype=A.dtype).index_put((torch.tensor(S),), inner)
            if bool((inner > 0).all()):
                found.append((float(mixture(z[None], A, row[None]).detach()[0]), z))
        rows.append(min(found, key=lambda pair: pair[0])[1])
    return torch.stack(rows)


def slope(z, c, radius):
    return (c * z).sum(1)


def circle(z, c, radius):
    return z.square().sum(1) - radius**2


def parabola(z, p, b):
    return 0.5 * z.square().sum(1) + 0.25 * (p * z).sum(1)


def plane(z, p, b):
    return z[:, :1] + 2 * z[:, 1:2] - b


def plane_exact(p, b):
    """The projection of -p / 4 on the plane."""
    a = torch.tensor([1.0, 2.0, 0.0], dtype=p.dtype)
    return -p / 4 + (b + p @ a[:, None] / 4) * a / 5


# ------------------------------------------------------------------------------------ least squares

TIMES = torch.linspace(0, 1, 6, dtype=D)


def decay(z, y, weight):
    return weight * (z[:, :1] * torch.exp(-z[:, 1:] * TIMES.to(z.dtype)) - y)


def valley(z, a):
    return torch.stack([a - z[:, 0], 20**0.5 * (z[:, 1] - z[:, 0] ** 2)], 1) * 2**0.5


def _decay_data() -> Tensor:
    true = torch.tensor([[1.0, 1.0], [2.0, 0.3], [0.7, 1.5]], dtype=D)
    return true[:, :1] * torch.exp(-true[:, 1:] * TIMES) + draw(3, 6, seed=81, scale=0.02)


def _half_squares(residuals: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda z, *args: residuals(z, *args).square().sum(1) / 2


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
        dtypes=(D,),  # roundings of float32 count a thousandfold in its valley
    ),
    Minimum("quartic_0d", quartic, _zeros(3) + 1, (torch.tensor([3.0, -1.7, 0.5], dtype=D),), _cubic_exact, (0,)),
    Minimum(
        "logistic",
        logistic,
        _zeros(3, 2),
        (draw(3, 4, 2, seed=62), torch.tensor(-0.5, dtype=D)),
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

OVER_SETS = (
    Minimum(
        "ball",
        nearest,
        _zeros(3, 2),
        (draw(3, 2, seed=91) * 3, torch.tensor(0.8, dtype=D)),
        lambda x, radius: radius * x / x.norm(dim=1, keepdim=True),
        (0, None),
        constraint=on_ball,
    ),
    Minimum(
        "box",
        bowl,
        _zeros(3, 3),
        (torch.eye(3, dtype=D) + matrix(3, 0.5, 92), draw(3, 3, seed=93), torch.tensor(0.1, dtype=D)),
        bowl_exact,
        (None, 0, None),
        constraint=on_box,
        dtypes=_WIDE,
    ),
    Minimum(
        "simplex",
        mixture,
        _zeros(3, 3),
        (matrix(3, 2.0, 94), draw(3, 3, seed=95)),
        mixture_exact,
        (None, 0),
        constraint=on_simplex,
        dtypes=_WIDE,
    ),
)

EQUALITIES = (
    Minimum(
        "circle",
        slope,
        torch.tensor([[1.0, 0.5]], dtype=D).repeat(3, 1),
        (torch.tensor([[1.0, 2.0], [0.3, -1.0], [-1.0, 0.2]], dtype=D), torch.tensor([1.0, 2.0, 0.5], dtype=D)),
        lambda c, radius: -radius[:, None] * c / c.norm(dim=1, keepdim=True),
        (0, 0),
        constraint=im.Equality(circle),
        dtypes=_WIDE,
    ),
    Minimum(
        "plane",
        parabola,
        _zeros(3, 3),
        (draw(3, 3, seed=96), torch.tensor([[1.0], [-0.5], [2.0]], dtype=D)),
        plane_exact,
        (0, 0),
        constraint=im.Equality(plane),
    ),
)

LEAST_SQUARES = (
    Minimum(
        "decay",
        decay,
        _zeros(3, 2) + 0.5,
        (_decay_data(), torch.linspace(0.5, 1.5, 6, dtype=D)),
        stationary(_half_squares(decay), torch.tensor([[1.0, 1.0], [2.0, 0.3], [0.7, 1.5]], dtype=D)),
        (0, None),
        entry=im.least_squares,
        dtypes=_WIDE,
    ),
    Minimum(
        "valley",
        valley,
        torch.tensor([[-1.2, 1.0]], dtype=D).repeat(3, 1),
        (torch.tensor([1.0, 0.5, -0.7], dtype=D),),
        lambda a: torch.stack([a, a**2], 1),
        (0,),
        entry=im.least_squares,
        dtypes=_WIDE,
    ),
)

NAMED = {problem.name: problem for problem in (*PROBLEMS, *OVER_SETS, *EQUALITIES, *LEAST_SQUARES)}
