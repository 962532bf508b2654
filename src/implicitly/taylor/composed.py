"""Operations composed of others that have a rule, so that they take tensors and jets alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def _gelu(x: Tensor, approximate: str = "none") -> Tensor:
    if approximate == "tanh":
        return 0.5 * x * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh())
    return 0.5 * x * (1 + (x / math.sqrt(2)).erf())


def _group_norm(x: Tensor, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Tensor:
    value = _standardised(x.reshape(len(x), num_groups, -1), (-1,), eps).reshape(x.shape)
    shape = (-1, *(1 for _ in x.shape[2:]))
    value = value if weight is None else value * weight.reshape(shape)
    return value if bias is None else value + bias.reshape(shape)


def _layer_norm(
    x: Tensor, normalized_shape: Sequence[int], weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Tensor:
    value = _standardised(x, tuple(range(-len(normalized_shape), 0)), eps)
    value = value if weight is None else value * weight
    return value if bias is None else value + bias


def _standardised(x: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    centred = x - x.mean(dims, keepdim=True)
    return centred / (centred.square().mean(dims, keepdim=True) + eps).sqrt()


def _rms_norm(x: Tensor, normalized_shape: Sequence[int], weight: Any = None, eps: float | None = None) -> Tensor:
    dims = tuple(range(-len(normalized_shape), 0))
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    value = x / (x.square().mean(dims, keepdim=True) + eps).sqrt()
    return value if weight is None else value * weight


def _norm(x: Tensor, ord: Any = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Tensor:
    if ord not in (None, 2, "fro"):
        raise NotImplementedError(f"jet: norm has a rule for the 2-norm only, got ord={ord!r}")
    x = x if dtype is None else x.to(dtype)
    dims = tuple(range(x.ndim)) if dim is None else dim
    return _squared_size(x).sum(dims, keepdim=keepdim).sqrt()


def _squared_size(x: Tensor) -> Tensor:
    return (x * x.conj()).real if x.is_complex() else x.square()


def _abs(x: Tensor) -> Tensor:
    return _squared_size(x).sqrt() if x.is_complex() else x * x.sign()


def _elu(x: Tensor, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Tensor:
    below = torch.where(x > 0, 0.0, x)  # elsewhere exp could overflow
    return scale * torch.where(x > 0, x, alpha * (input_scale * below).expm1())


def _dropout(x: Tensor, p: float = 0.5, training: bool = True) -> Tensor:
    if training and p > 0:
        raise NotImplementedError(
            "jet: dropout draws a new mask in each call, so f is not a fixed function; call eval(), or use "
            "implicitly.nn.Dropout"
        )
    return x


def _addmm(input: Any, mat1: Any, mat2: Any, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return beta * input + alpha * torch.matmul(mat1, mat2)


COMPOSED: dict[str, Callable[..., Any]] = {
    "addmm": _addmm,
    "baddbmm": _addmm,
    "addcmul": lambda x, a, b, value=1: x + value * (a * b),
    "gelu": _gelu,
    "group_norm": _group_norm,
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "linalg_vector_norm": _norm,
    "norm": lambda x, p="fro", dim=None, keepdim=False, dtype=None: _norm(x, p, dim, keepdim, dtype=dtype),
    "dropout": _dropout,
    "relu": lambda x: torch.where(x > 0, x, 0.0),
    "abs": _abs,
    "leaky_relu": lambda x, negative_slope=0.01: torch.where(x > 0, x, negative_slope * x),
    "elu": _elu,
    "celu": lambda x, alpha=1.0: _elu(x, alpha, input_scale=1 / alpha),
    "selu": lambda x: _elu(x, 1.6732632423543772, 1.0507009873554805),  # Klambauer et al. 2017
    "mish": lambda x: x * F.softplus(x).tanh(),
    "softsign": lambda x: x / (1 + x.abs()),
    "tan": lambda x: x.sin() / x.cos(),
    "iter": lambda x: iter(x.unbind()),
}
