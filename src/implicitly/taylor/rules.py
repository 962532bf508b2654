"""The rules of elementary operations: each gives the series of the result from those of the operands.

The rules of products, quotients, powers and elementary functions are tables 13.1 and 13.2 of Griewank and Walther,
"Evaluating Derivatives", 2008.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from implicitly.taylor.series import (
    Coefficient,
    Series,
    add_up,
    cauchy,
    constant,
    each,
    from_slope,
    jointly,
    lifted,
    scaled,
    sum_of_products,
)
from implicitly.transforms import is_tracked


def _add(a: Any, b: Any, *, alpha: float = 1) -> Series:
    a, b = lifted(a, b)
    return Series(a[0] + scaled(b[0], alpha), lambda _, k: add_up([a[k], scaled(b[k], alpha)]))


def _multiply(a: Any, b: Any) -> Series:
    a, b = lifted(a, b)
    return Series(a[0] * b[0], lambda _, k: cauchy(a, b, k))


def _divide(a: Any, b: Any, *, rounding_mode: str | None = None) -> Series:
    if rounding_mode is not None:
        raise NotImplementedError(
            f"jet: div has no rule for rounding_mode={rounding_mode!r}, as the result is discontinuous"
        )
    a, b = lifted(a, b)

    def rule(v: Series, k: int) -> Coefficient:  # from v b = a
        found = sum_of_products((b[j], v[k - j], -1.0) for j in range(1, k + 1))
        total = add_up([a[k], found])
        return None if total is None else total / b[0]

    return Series(a[0] / b[0], rule)


def _sqrt(u: Series) -> Series:
    def rule(v: Series, k: int) -> Coefficient:  # from v^2 = u
        total = add_up([u[k], sum_of_products((v[j], v[k - j], -1.0) for j in range(1, k))])
        return None if total is None else total / (2 * v[0])

    return Series(u[0].sqrt(), rule)


def _power(u: Series, r: float) -> Series:
    """u^r for a number r; integers r >= 0 by products, which are right at u = 0 too."""
    if float(r).is_integer() and r >= 0:
        return _whole_power(u, int(r))

    def rule(v: Series, k: int) -> Coefficient:  # from u v' = r u' v
        total = sum_of_products((u[j], v[k - j], (r * j - (k - j)) / k) for j in range(1, k + 1))
        return None if total is None else total / u[0]

    return Series(u[0] ** r, rule)


def _power_of_entries(u: Series, r: Tensor) -> Series:
    """u^r for a tensor r that does not change with s."""

    def rule(v: Series, k: int) -> Coefficient:  # from u v' = r u' v
        known = [(j, u[j], v[k - j]) for j in range(1, k + 1)]
        total = add_up((r * j - (k - j)) * x * y for j, x, y in known if x is not None and y is not None)
        return None if total is None else total / (k * u[0])

    return Series(u[0] ** r, rule)


def _whole_power(u: Series, r: int) -> Series:
    if r == 0:
        return constant(torch.ones_like(u[0]))
    if r == 1:
        return u
    half = _whole_power(u, r // 2)
    square = _multiply(half, half)
    return _multiply(square, u) if r % 2 else square


def _exp(u: Series) -> Series:
    return from_slope(u, u[0].exp(), lambda v, k: v[k])


def _expm1(u: Series) -> Series:
    return from_slope(u, u[0].expm1(), lambda v, k: u[0].exp() if k == 0 else v[k])


def _log(u: Series) -> Series:
    inverse = _divide(1.0, u)
    return from_slope(u, u[0].log(), lambda v, k: inverse[k])


def _log1p(u: Series) -> Series:
    inverse = _divide(1.0, _add(u, 1.0))
    return from_slope(u, u[0].log1p(), lambda v, k: inverse[k])


def _tanh(u: Series) -> Series:
    def slope(v: Series, k: int) -> Coefficient:  # 1 - v^2
        return 1 - v[0] * v[0] if k == 0 else scaled(cauchy(v, v, k), -1)

    return from_slope(u, u[0].tanh(), slope)


def _tanhshrink(u: Series) -> Series:
    t = _tanh(u)  # whose square is the slope
    return from_slope(u, F.tanhshrink(u[0]), lambda v, k: cauchy(t, t, k))


def _sigmoid(u: Series) -> Series:
    def slope(v: Series, k: int) -> Coefficient:  # v - v^2
        return v[0] * (1 - v[0]) if k == 0 else add_up([v[k], scaled(cauchy(v, v, k), -1)])

    return from_slope(u, u[0].sigmoid(), slope)


def _softplus(u: Series, beta: float = 1.0, threshold: float = 20.0) -> Series:
    slope = _sigmoid(Series(beta * u[0], lambda _, k: scaled(u[k], beta)))
    linear = beta * u[0] > threshold  # as in PyTorch
    return from_slope(
        u,
        F.softplus(u[0], beta, threshold),
        lambda v, k: None if slope[k] is None else slope[k].masked_fill(linear, float(k == 0)),
    )


def _log_sigmoid(u: Series) -> Series:
    slope = _sigmoid(Series(-u[0], lambda _, k: scaled(u[k], -1)))
    return from_slope(u, F.logsigmoid(u[0]), lambda v, k: slope[k])


def _erf(u: Series) -> Series:
    bell = _exp(Series(-u[0] * u[0], lambda _, k: scaled(cauchy(u, u, k), -1)))
    return from_slope(u, u[0].erf(), lambda v, k: scaled(bell[k], 2 / math.sqrt(math.pi)))


def _atan(u: Series) -> Series:
    below = Series(1 + u[0] * u[0], lambda _, k: cauchy(u, u, k))
    inverse = _divide(1.0, below)
    return from_slope(u, u[0].atan(), lambda v, k: inverse[k])


def _sine(which: int, u: Series, hyperbolic: bool = False) -> Series:
    # Each is the other's derivative up to sign, so both are found as one series of (sin, cos), or (sinh, cosh).
    first = [u[0].sinh(), u[0].cosh()] if hyperbolic else [u[0].sin(), u[0].cos()]

    def slope(v: Series, k: int) -> Coefficient:
        return None if v[k] is None else torch.stack([v[k][1], v[k][0] if hyperbolic else -v[k][0]])

    pair = from_slope(u, torch.stack(first), slope)
    return Series(pair[0][which], lambda _, k: None if pair[k] is None else pair[k][which])


def _where(condition: Any, a: Any, b: Any) -> Series:
    if isinstance(condition, Series) or condition.dtype not in (torch.bool, torch.uint8):  # a.where(condition, b)
        condition, a = a, condition
    a, b = lifted(a, b)

    def rule(_: Series, k: int) -> Coefficient:
        if a[k] is None and b[k] is None:
            return None
        return torch.where(condition, *(0.0 if x is None else x for x in (a[k], b[k])))

    return Series(torch.where(condition, a[0], b[0]), rule)


def _linear(x: Any, weight: Any, bias: Any = None) -> Series:
    product = jointly(F.linear, x, weight)
    return product if bias is None else _add(product, bias)


def _convolution(op: Callable[..., Tensor]) -> Callable[..., Series]:
    def convolve(input: Any, weight: Any, bias: Any = None, *args: Any, **kwargs: Any) -> Series:
        weight, bias = lifted(weight, bias)
        product = jointly(lambda x, w: op(x, w, None, *args, **kwargs), input, weight)
        shape = (-1, *(1 for _ in weight[0].shape[2:]))
        return product if bias[0] is None else _add(product, each(lambda b: b.reshape(shape), bias))

    return convolve


def _einsum(equation: str, *operands: Any) -> Series:
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = tuple(operands[0])
    if len(operands) > 2:
        raise NotImplementedError(
            "jet: einsum has a rule for one or two operands only; split it into several calls"
        )
    op = functools.partial(torch.einsum, equation)
    return each(op, operands[0]) if len(operands) == 1 else jointly(op, *operands)


def _pow(base: Any, exponent: Any) -> Series:
    if _is_number(exponent):
        return _power(base, float(exponent))
    if not isinstance(exponent, Series):
        return _power_of_entries(base, exponent)
    if not isinstance(base, Series | Tensor):
        base = torch.as_tensor(base, dtype=exponent[0].dtype, device=exponent[0].device)
    return _exp(_multiply(exponent, _log(lifted(base)[0])))


def _is_number(x: Any) -> bool:
    """Whether x is a number, or a 0-d tensor without derivatives of any kind, which a number would lose."""
    if isinstance(x, Tensor):
        return type(x) in (Tensor, torch.nn.Parameter) and x.ndim == 0 and x.is_cpu and not is_tracked(x)
    return isinstance(x, int | float)


def _softmax(u: Series, dim: int, *, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Series:
    u = _of_dtype(u, dtype)
    weights = _exp(_add(u, -u[0].amax(dim, keepdim=True)))  # this constant cancels
    return _divide(weights, each(lambda x: x.sum(dim, keepdim=True), weights))


def _log_softmax(u: Series, dim: int, *, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Series:
    u = _of_dtype(u, dtype)
    below = _add(u, -u[0].amax(dim, keepdim=True))
    return _add(below, _log(each(lambda x: x.sum(dim, keepdim=True), _exp(below))), alpha=-1)


def _logsumexp(u: Series, dim: Any, keepdim: bool = False) -> Series:
    largest = u[0].amax(dim, keepdim=True)
    total = each(lambda x: x.sum(dim, keepdim=True), _exp(_add(u, -largest)))
    found = _add(_log(total), largest)
    return found if keepdim else each(lambda x: x.squeeze(dim), found)


def _of_dtype(u: Series, dtype: torch.dtype | None) -> Series:
    return u if dtype is None else each(lambda x: x.to(dtype), u)


def _pad(u: Series, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Series:
    if value:
        raise NotImplementedError(
            f"jet: pad has a rule for the value 0 only, got {value}; use torch.cat to add other values"
        )
    return each(lambda x: F.pad(x, pad, mode), u)


# Keyed by the name of an operation, which is the same for the method, the function and the operator.
RULES: dict[str, Callable[..., Series]] = {
    "add": _add,
    "sub": lambda a, b, alpha=1: _add(a, b, alpha=-alpha),
    "rsub": lambda a, b, alpha=1: _add(b, a, alpha=-alpha),
    "mul": _multiply,
    "div": _divide,
    "rdiv": lambda a, b: _divide(b, a),
    "reciprocal": lambda u: _divide(1.0, u),
    "square": lambda u: _multiply(u, u),
    "matmul": functools.partial(jointly, torch.matmul),
    "outer": functools.partial(jointly, torch.outer),
    "linear": _linear,
    **{f"conv{n}d": _convolution(getattr(torch, f"conv{n}d")) for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": _convolution(getattr(torch, f"conv_transpose{n}d")) for n in (1, 2, 3)},
    "einsum": _einsum,
    "pow": _pow,
    "rpow": lambda exponent, base: _pow(base, exponent),
    "sqrt": _sqrt,
    "rsqrt": lambda u: _divide(1.0, _sqrt(u)),
    "exp": _exp,
    "expm1": _expm1,
    "log": _log,
    "log1p": _log1p,
    "tanh": _tanh,
    "tanhshrink": _tanhshrink,
    "sigmoid": _sigmoid,
    "log_sigmoid": _log_sigmoid,
    "silu": lambda u: _multiply(u, _sigmoid(u)),
    "softplus": _softplus,
    "erf": _erf,
    "atan": _atan,
    "sin": functools.partial(_sine, 0),
    "cos": functools.partial(_sine, 1),
    "sinh": functools.partial(_sine, 0, hyperbolic=True),
    "cosh": functools.partial(_sine, 1, hyperbolic=True),
    "where": _where,
    "softmax": _softmax,
    "log_softmax": _log_softmax,
    "logsumexp": _logsumexp,
    "pad": _pad,
}
