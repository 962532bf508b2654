"""Conditions with exact answers, which are found without the library.

`exact(*args)` is differentiable as often as one likes: in closed form, by an inverse, by recording plain
iterations (`unrolled`), or by recorded Newton steps at the answer (`polished`). By an inverse and never by
`torch.linalg.solve`, whose forward mode over forward mode is wrong in PyTorch 2.13.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d
from torch.utils import _pytree as pytree

import implicitly as im

COMPLEX = {torch.float64: torch.complex128, torch.float32: torch.complex64}


@dataclass(frozen=True)
class Problem:
    """A condition on z; `f` is a map for `im.fixed_point`, a residual for `im.root`; all tensors are float64."""

    name: str
    f: Callable[..., Any]
    z0: Any
    args: tuple[Tensor, ...]
    exact: Callable[..., Any]
    in_dims: tuple[int | None, ...] | None  # which args hold the samples; None: one system
    entry: Callable[..., im.Solution] = im.fixed_point
    contracts: bool = True  # whether plain iteration converges
    dtypes: tuple[torch.dtype, ...] = (torch.float64, torch.float32, torch.bfloat16)

    @property
    def batch_dims(self) -> int:
        return 0 if self.in_dims is None else 1

    @property
    def batch(self) -> int:
        return pytree.tree_leaves(self.z0)[0].shape[0] if self.batch_dims else 1

    def solve(self, *args: Tensor, z0: Any = None, **options: Any) -> im.Solution:
        """The library's solution at `args` (default: the problem's own)."""
        options = {"on_failure": "raise", "batch_dims": self.batch_dims} | options
        return self.entry(self.f, self.z0 if z0 is None else z0, *(args or self.args), **options)

    def to(self, dtype: torch.dtype) -> Problem:
        """The same problem in another dtype (complex where it is complex)."""
        f = copy.deepcopy(self.f).to(dtype) if isinstance(self.f, nn.Module) else self.f
        cast = functools.partial(pytree.tree_map, lambda t: t.to(COMPLEX[dtype] if t.is_complex() else dtype))
        return replace(self, f=f, z0=cast(self.z0), args=cast(self.args))

    def displacement(self, z: Any, *args: Tensor) -> Tensor:
        """What vanishes at the answer, as one real vector."""
        value = flat(self.f(z, *args))
        return value - flat(z) if self.entry is im.fixed_point else value

    def amplification(self) -> float:
        """|A^-1| with A the Jacobian of the displacement: the error of z is at most this times the residual."""
        value = self.exact(*self.args)
        jacobian = torch.func.jacrev(lambda v: self.displacement(unflat(v, value), *self.args))(flat(value))
        return float(torch.linalg.matrix_norm(torch.linalg.inv(jacobian.detach()), 2))


def flat(state: Any) -> Tensor:
    """A pytree of tensors as one real vector."""
    # Not by `view_as_real` and back: parts of a vector may begin at an odd place, where no complex number can.
    leaves = [torch.stack([t.real, t.imag], -1) if t.is_complex() else t for t in pytree.tree_leaves(state)]
    return torch.cat([t.reshape(-1) for t in leaves])


def unflat(vector: Tensor, like: Any) -> Any:
    """The inverse of `flat`."""
    leaves, spec = pytree.tree_flatten(like)
    parts = vector.split([t.numel() * (2 if t.is_complex() else 1) for t in leaves])
    shaped = [
        torch.complex(*p.reshape(*t.shape, 2).unbind(-1)) if t.is_complex() else p.reshape(t.shape)
        for p, t in zip(parts, leaves)
    ]
    return pytree.tree_unflatten(shaped, spec)


def unrolled(f: Callable[..., Any], z0: Any, steps: int = 90) -> Callable[..., Any]:
    """The fixed point of a contraction by plain iterations that autograd records."""

    def exact(*args: Tensor) -> Any:
        z = z0
        for _ in range(steps):
            z = f(z, *args)
        return z

    return exact


def polished(F: Callable[..., Tensor], z0: Tensor) -> Callable[..., Tensor]:
    """The root of F by recorded Newton steps from z0; each doubles the orders of derivative that are exact."""

    def step(z: Tensor, *args: Tensor) -> Tensor:
        jacobian = torch.func.jacrev(lambda v: F(v.reshape(z.shape), *args).reshape(-1))(z.reshape(-1))
        return z - (torch.linalg.inv(jacobian) @ F(z, *args).reshape(-1)).reshape(z.shape)

    def exact(*args: Tensor) -> Tensor:
        z = z0
        for _ in range(20):
            z = step(z, *args)
        return z

    return exact


def seeded(seed: int) -> torch.Generator:
    """A generator where tensors of the tests live."""
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def draw(*shape: int, seed: int, scale: float = 1.0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal numbers of a fixed seed; from numpy, since `torch.vmap` refuses to draw."""
    parts = 2 if dtype.is_complex else 1
    numbers = torch.as_tensor(
        np.random.default_rng(seed).standard_normal((*shape, parts)), device=torch.get_default_device()
    )
    return scale * (torch.view_as_complex(numbers) if dtype.is_complex else numbers[..., 0]).to(dtype)


def matrix(n: int, norm: float, seed: int, *lead: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random n x n matrices of a given 2-norm."""
    W = draw(*lead, n, n, seed=seed, dtype=dtype)
    return W * (norm / torch.linalg.matrix_norm(W, 2, keepdim=True))


# --------------------------------------------------------------------------------------------- conditions


def _affine(z, W, x):
    return z @ W.mT + x


def _affine_exact(W, x):
    return x @ torch.linalg.inv(torch.eye(len(W), dtype=W.dtype) - W).mT


def _affine_each(z, W, x):
    return (W @ z.unsqueeze(-1)).squeeze(-1) + x


def _affine_each_exact(W, x):
    return (torch.linalg.inv(torch.eye(W.shape[-1], dtype=W.dtype) - W) @ x.unsqueeze(-1)).squeeze(-1)


def _tanh(z, W, x):
    return torch.tanh(z @ W.mT + x)


def _tanh_residual(z, W, x):
    return z - _tanh(z, W, x)


def _cosine(z, a):
    return a * torch.cos(z)


def _cubic(z, a):
    return z**3 + z - a


def _cubic_exact(a):
    """Cardano's formula."""
    big = (a.abs() / 2 + (a**2 / 4 + 1 / 27).sqrt()) ** (1 / 3)
    return a.sign() * (big - 1 / (3 * big))


def _stretched(z, A, x):
    return z @ A.mT + z**3 - x


def _tree(z, W, x):
    vector, image = z["vector"], z["image"]
    return {
        "vector": torch.tanh(vector @ W.mT + image.mean((1, 2, 3)).unsqueeze(1)),
        "image": torch.sin(0.5 * image.roll(1, 3) + 0.3 * vector.mean(1)[:, None, None, None] + x),
    }


def _system(z, W, x):
    return torch.tanh(W @ z @ W.mT + x)


def _image(z, kernel, x):
    return torch.tanh(conv2d(z, kernel, padding=1) + x)


def _sequence(z, W, x):
    length = torch.arange(1, z.shape[1] + 1, dtype=z.dtype).unsqueeze(1)
    return torch.tanh(z.cumsum(1) / length @ W.mT + x)


def _repelled(z, slope, x):
    return x - slope * z


class Cell(nn.Module):
    """tanh(W z + b + x), a contraction."""

    def __init__(self, n: int = 3, norm: float = 0.6, seed: int = 0):
        super().__init__()
        self.weight = nn.Parameter(matrix(n, norm, seed))
        self.bias = nn.Parameter(draw(n, seed=seed + 1, scale=0.1))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(z @ self.weight.mT + self.bias + x)


def _unrolled_problem(name: str, f: Callable[..., Any], z0: Any, args: tuple, in_dims: tuple | None) -> Problem:
    return Problem(name, f, z0, args, unrolled(f, z0), in_dims)


def _zeros(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def _kernel() -> Tensor:
    kernel = draw(2, 2, 3, 3, seed=14)
    return 0.6 * kernel / kernel.abs().sum((1, 2, 3), keepdim=True)


def _rotation() -> Tensor:
    angle = torch.tensor(1.2, dtype=torch.float64)
    return 1.5 * torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])


_COMPLEX_MATRIX = matrix(2, 0.6, 18, dtype=torch.complex128)
_STRETCH = torch.eye(2, dtype=torch.float64) + matrix(2, 0.5, 20)

PROBLEMS = (
    Problem("affine", _affine, _zeros(3, 3), (matrix(3, 0.6, 1), draw(3, 3, seed=2)), _affine_exact, (None, 0)),
    Problem(
        "affine_each",
        _affine_each,
        _zeros(3, 2),
        (matrix(2, 0.6, 3, 3), draw(3, 2, seed=4)),
        _affine_each_exact,
        (0, 0),
    ),
    _unrolled_problem("tanh", _tanh, _zeros(3, 3), (matrix(3, 0.7, 5), draw(3, 3, seed=6)), (None, 0)),
    _unrolled_problem(
        "cosine_0d", _cosine, _zeros(3), (torch.tensor([0.7, -0.5, 0.2], dtype=torch.float64),), (0,)
    ),
    _unrolled_problem(
        "tree",
        _tree,
        {"vector": _zeros(2, 2), "image": _zeros(2, 1, 2, 2)},
        (matrix(2, 0.5, 9), draw(2, 1, 2, 2, seed=10)),
        (None, 0),
    ),
    _unrolled_problem("one_number", _cosine, _zeros(), (torch.tensor(0.7, dtype=torch.float64),), None),
    _unrolled_problem("one_system", _system, _zeros(2, 2), (matrix(2, 0.8, 11), draw(2, 2, seed=12)), None),
    _unrolled_problem("image", _image, _zeros(2, 2, 2, 2), (_kernel(), draw(2, 2, 2, 2, seed=13)), (None, 0)),
    _unrolled_problem(
        "sequence", _sequence, _zeros(2, 3, 2), (matrix(2, 0.6, 15), draw(2, 3, 2, seed=16)), (None, 0)
    ),
    _unrolled_problem("module", Cell(), _zeros(3, 3), (draw(3, 3, seed=17),), (0,)),
    Problem(
        "complex",
        _affine,
        _zeros(2, 2, dtype=torch.complex128),
        (_COMPLEX_MATRIX, draw(2, 2, seed=19, dtype=torch.complex128)),
        _affine_exact,
        (None, 0),
        dtypes=(torch.float64, torch.float32),
    ),
    Problem(
        "tanh_root",
        _tanh_residual,
        _zeros(3, 2),
        (matrix(2, 0.7, 22), draw(3, 2, seed=23)),
        unrolled(_tanh, _zeros(3, 2)),
        (None, 0),
        entry=im.root,
    ),
    # Plain iteration diverges on the rest.
    Problem(
        "cubic_root_0d",
        _cubic,
        _zeros(3) + 1,
        (torch.tensor([3.0, -1.7, 0.5], dtype=torch.float64),),
        _cubic_exact,
        (0,),
        entry=im.root,
        contracts=False,
    ),
    Problem(
        "stretched_root",
        _stretched,
        _zeros(2, 2),
        (_STRETCH, draw(2, 2, seed=21)),
        polished(_stretched, _zeros(2, 2)),
        (None, 0),
        entry=im.root,
        contracts=False,
    ),
    Problem(
        "repelled",
        _repelled,
        _zeros(3, 2),
        (torch.tensor([[2.0], [3.0], [1.5]], dtype=torch.float64), draw(3, 2, seed=24)),
        lambda slope, x: x / (1 + slope),
        (0, 0),
        contracts=False,
    ),
    Problem(
        "rotation",
        _affine,
        _zeros(3, 2),
        (_rotation(), draw(3, 2, seed=25)),
        _affine_exact,
        (None, 0),
        contracts=False,
    ),
)

NAMED = {problem.name: problem for problem in PROBLEMS}


class Watched(torch.autograd.Function):
    """A tensor, and a note of each time that the gradient by it is computed."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, notes: list[int]) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.notes = inputs[1]

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor, None]:
        ctx.notes.append(1)
        return g, None
