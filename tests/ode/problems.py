"""Differential equations with exact solutions, which are found without the library.

All rates and lengths of time are of size 1 (but the stiff one's), so that the error of a method of order p is of
size dt^p. `exact` is differentiable as often as one likes, in all that the solution depends on.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, func, nn
from torch.utils import _pytree as pytree

import implicitly as im
from tests.problems import COMPLEX, draw, matrix


@dataclass(frozen=True)
class Equation:
    """dy/dt = f(t, y, *args), y(times[0]) = y0; all tensors are float64.

    `solution(y0, t, *args, *parameters)` is the exact one of one sample at times `(T,)`: `(T, *y0.shape)`.
    `in_dims` tells which args hold the samples; None: one system.
    """

    name: str
    f: Callable[..., Any]
    y0: Any
    times: Tensor
    args: tuple[Tensor, ...]
    solution: Callable[..., Any]
    in_dims: tuple[int | None, ...] | None
    separable: bool = False  # whether y is (q, p), with dq/dt of p and dp/dt of q
    stiff: bool = False

    @property
    def batch_dims(self) -> int:
        return 0 if self.in_dims is None else 1

    @property
    def batch(self) -> int:
        return pytree.tree_leaves(self.y0)[0].shape[0]

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        return tuple(self.f.parameters()) if isinstance(self.f, nn.Module) else ()

    @property
    def inputs(self) -> tuple[Any, ...]:
        """What a solution depends on, without parameters."""
        return (self.y0, self.times, *self.args)

    def solve(self, y0: Any = None, t: Tensor | None = None, *args: Tensor, **options: Any) -> im.Trajectory:
        """The library's solution (default: of the problem's own inputs)."""
        y0, t = self.y0 if y0 is None else y0, self.times if t is None else t
        return im.odeint(self.f, y0, t, *(args or self.args), **({"batch_dims": self.batch_dims} | options))

    def exact(self, y0: Any, t: Tensor, *args: Tensor) -> Any:
        """The exact solution `(T, *y0.shape)` at y0, t, args and parameters."""
        if self.in_dims is None:
            return self.solution(y0, t, *args)
        dims = (*self.in_dims, *(None for _ in self.parameters))
        return func.vmap(self.solution, (0, t.ndim - 2 if t.ndim == 2 else None, *dims), 1)(y0, t, *args)

    def to(self, dtype: torch.dtype) -> Equation:
        """The same equation in another dtype (complex where it is complex)."""
        f = copy.deepcopy(self.f).to(dtype) if isinstance(self.f, nn.Module) else self.f
        y0, times, args = pytree.tree_map(
            lambda t: t.to(COMPLEX[dtype] if t.is_complex() else dtype), (self.y0, self.times, self.args)
        )
        return replace(self, f=f, y0=y0, times=times, args=args)

    def of_rows(self, rows: list[int]) -> Equation:
        """The equation of these samples, in this order."""
        index = torch.tensor(rows)
        args = tuple(a if d is None else a.index_select(d, index) for a, d in zip(self.args, self.in_dims or ()))
        y0 = pytree.tree_map(lambda t: t[index], self.y0)
        return replace(self, y0=y0, args=args, times=self.times[index] if self.times.ndim == 2 else self.times)

    def of_one(self, row: int) -> Equation:
        """Sample `row` as one system."""
        part = self.of_rows([row])
        y0 = pytree.tree_map(lambda t: t[0], part.y0)
        args = tuple(a if d is None else a.squeeze(d) for a, d in zip(part.args, self.in_dims or ()))
        return replace(part, y0=y0, args=args, times=part.times.reshape(-1), in_dims=None)


def _times(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _flow(A: Tensor, elapsed: Tensor, y: Tensor) -> Tensor:
    """exp(A elapsed) y `(T, n, ...)`."""
    return torch.einsum("tij,j...->ti...", torch.linalg.matrix_exp(A * elapsed[:, None, None]), y)


def _linear(t, y, A):
    return y @ A.mT


def _linear_solution(y0, t, A):
    return _flow(A, t - t[0], y0)


def _logistic(t, y, r, c):
    return r * y * (1 - y) * (1 + c * torch.cos(3 * t))


def _logistic_solution(y0, t, r, c):
    s = t - t[0] + c * (torch.sin(3 * t) - torch.sin(3 * t[0])) / 3
    return 1 / (1 + (1 / y0 - 1) * torch.exp(-r * s[:, None]))


def _tree(t, y, k):
    return {"a": -k * y["a"], "b": (y["a"].sum(-1), -y["b"][1])}


def _tree_solution(y0, t, k):
    s, (b0, b1) = t - t[0], y0["b"]
    a = y0["a"] * torch.exp(-k * s)[:, None]
    return {"a": a, "b": (b0 + (y0["a"] - a).sum(-1) / k, torch.exp(-s)[:, None] * b1)}


def _swirl(t, y, w):
    return w * torch.cos(t) * y


def _swirl_solution(y0, t, w):
    s = torch.sin(t) - torch.sin(t[0])
    return y0 * torch.exp(s.reshape(-1, *(1 for _ in w.shape)) * w)


class Mixing(nn.Module):
    """Diffusion between the channels of an image."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1, bias=False, dtype=torch.float64)
        with torch.no_grad():
            self.conv.weight.copy_((matrix(3, 0.8, 12) - 0.5 * torch.eye(3))[:, :, None, None])

    def forward(self, t, y):
        return self.conv(y)


def _mixing_solution(y0, t, weight):
    return _flow(weight[:, :, 0, 0], t - t[0], y0)


def _oscillator(t, y, w):
    q, p = y
    return p, -w.square() * q


def _oscillator_solution(y0, t, w):
    (q, p), s = y0, (t - t[0])[:, None]
    return torch.cos(w * s) * q + torch.sin(w * s) / w * p, torch.cos(w * s) * p - w * torch.sin(w * s) * q


def _driven(t, y, a):
    return [y[1], a * torch.cos(3 * t)]


def _driven_solution(y0, t, a):
    (q, p), s, start = y0, t - t[0], 3 * t[0]
    moved = s * (p - a * torch.sin(start) / 3) - a * (torch.cos(3 * t) - torch.cos(start)) / 9
    return [q + moved, p + a * (torch.sin(3 * t) - torch.sin(start)) / 3]


def _stiff_matrix() -> Tensor:
    """Of the eigenvalues -1 and -1000."""
    V = torch.tensor([[1.0, 1.0], [-0.5, 1.0]], dtype=torch.float64)
    return V @ torch.diag(_times(-1.0, -1000.0)) @ torch.linalg.inv(V)


C = torch.complex128
EQUATIONS = (
    Equation(
        "vector",
        _linear,
        draw(3, seed=1),
        _times(0.0, 0.3, 0.8),
        (matrix(3, 1.0, 2),),
        _linear_solution,
        None,
    ),
    Equation(
        "samples",
        _logistic,
        torch.sigmoid(draw(3, 2, seed=3)),
        _times(-0.2, 0.1, 0.5, 0.7),
        (torch.exp(draw(3, 1, seed=4, scale=0.4)), _times(0.5)[0]),
        _logistic_solution,
        (0, None),
    ),
    Equation(
        "own_times",
        _swirl,
        1 + draw(3, seed=5, scale=0.3),
        torch.stack([_times(0.0, 0.2, 1.0), _times(0.5, 0.6, 0.7), _times(-1.0, -0.2, -0.1)]),
        (1 + draw(3, seed=6, scale=0.3),),
        _swirl_solution,
        (0,),
    ),
    Equation(
        "short",
        _swirl,
        1 + draw(2, seed=16, scale=0.3),
        _times(0.0, 0.3, 0.7),
        (1 + draw(2, seed=17, scale=0.3),),
        _swirl_solution,
        (0,),
    ),
    Equation(
        "tree",
        _tree,
        {"a": draw(2, 2, seed=7), "b": (draw(2, seed=8), draw(2, 2, seed=9, dtype=C))},
        _times(0.0, 0.4, 1.0),
        (_times(0.8)[0],),
        _tree_solution,
        (None,),
    ),
    Equation(
        "complex",
        _swirl,
        draw(2, 2, seed=10, dtype=C),
        _times(0.0, 0.3, 0.9),
        (torch.tensor([0.3 + 1.0j, -0.2 - 0.9j], dtype=C),),
        _swirl_solution,
        (None,),
    ),
    Equation("number", _swirl, _times(1.3)[0], _times(1.0, 0.4, -0.1), (_times(0.9)[0],), _swirl_solution, None),
    Equation("image", Mixing(), draw(2, 3, 2, 2, seed=11), _times(0.0, 0.3, 0.8), (), _mixing_solution, ()),
    Equation(
        "oscillators",
        _oscillator,
        (draw(3, 2, seed=13), draw(3, 2, seed=14)),
        _times(0.0, 0.4, 1.0),
        (1 + draw(3, 2, seed=15, scale=0.1),),
        _oscillator_solution,
        (0,),
        separable=True,
    ),
    Equation(
        "driven",
        _driven,
        [_times(0.3)[0], _times(-0.5)[0]],
        _times(0.5, 0.2, -0.3),
        (_times(1.1)[0],),
        _driven_solution,
        None,
        separable=True,
    ),
    Equation(
        "stiff",
        _linear,
        _times(1.0, 0.3),
        _times(0.0, 0.4, 1.0),
        (_stiff_matrix(),),
        _linear_solution,
        None,
        stiff=True,
    ),
)

NAMED = {equation.name: equation for equation in EQUATIONS}
