"""Taylor-mode differentiation: power series pushed through a function, at a cost polynomial in the order.

A function of x(s) = x_0 + x_1 s + x_2 s^2 + ... is worked out coefficient after coefficient: products are Cauchy
products, and an elementary function v = phi(u) obeys an ordinary differential equation such as v' = v u', whose
k-th coefficient follows from those before it (Griewank and Walther, "Evaluating Derivatives", 2008, chapter 13;
Bettencourt, Johnson and Duvenaud, "Taylor-Mode Automatic Differentiation for Higher-Order Derivatives in JAX",
2019).
Nested forward mode does the same work 2^K times for the order K.

Inside, x_k is the k-th derivative over k!; what users pass and get are derivatives, as in `jax.experimental.jet`.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from implicitly.transforms import is_tracked

Coefficient = Tensor | None  # None is zero, which costs nothing


def jet(f: Callable[..., Any], primals: Sequence[Any], series: Sequence[Sequence[Any]]) -> tuple[Any, tuple]:
    """The derivatives of s -> f(x(s), ...) at s = 0 from those of s -> x(s), ..., to any order.

    The result is differentiable by autograd and `torch.func`: with respect to the primals, the series, and what f
    depends on. Memory and time grow with the square of the order, for products with constants linearly.

    Args:
        f: takes as many arguments as there are `primals`; made of operations on tensors that have a rule.
        primals: x(0) for each argument: a tensor, or a pytree of them.
        series: for each argument the K derivatives x'(0), x''(0), ..., not divided by factorials, like the primal
            in structure, shapes and dtypes.

    Returns:
        f(x(0), ...) and a tuple of its K derivatives, each a pytree of tensors like it.

    Raises:
        ValueError, TypeError: primals and series do not fit each other.
        NotImplementedError: f uses an operation that has no rule; it is named.

    Source: the convention of `jax.experimental.jet`; rules of Griewank and Walther 2008, tables 13.1 and 13.2.
    """
    orders = {len(terms) for terms in series}
    if len(primals) != len(series) or len(orders) != 1 or orders == {0}:
        raise ValueError(
            f"jet needs one series for each primal, all of the same length >= 1; got {len(primals)} primals and "
            f"series of the lengths {[len(terms) for terms in series]}"
        )
    order = orders.pop()
    run = _Run(order, known=order)
    inputs = [_input(run, primal, terms) for primal, terms in zip(primals, series)]
    return _output(f(*inputs), run, order)


def trajectory_derivatives(f: Callable[..., Any], t: Any, y: Any, order: int) -> tuple[Any, ...]:
    """The derivatives d^k y/dt^k, k = 1, ..., order, of the solution of dy/dt = f(t, y) that passes y at t.

    From one call of f: as coefficient k of the solution is coefficient k - 1 of f over k, each pass over the
    operations of f finds one more coefficient of all, and none is computed twice. Differentiable like `jet`.

    Args:
        f: `f(t, y)` returns dy/dt, like y in structure, shapes and dtypes; of operations that have a rule.
        t: the time: a tensor that broadcasts with y as f expects it, or a number.
        y: the state at t: a tensor or a pytree of them.
        order: how many derivatives, at least 1.

    Returns:
        `order` derivatives, each like y.

    Raises:
        TypeError: y holds anything but tensors.
        ValueError: order is below 1, or f returns another structure or shape than y's.
        NotImplementedError: f uses an operation that has no rule; it is named.

    Source: Kelly, Bettencourt, Johnson and Duvenaud, "Learning Differential Equations that are Easy to Solve",
    NeurIPS 2020, appendix A.
    """
    if not isinstance(order, int) or order < 1:
        raise ValueError(f"order must be a whole number >= 1, got {order!r}")
    flat, spec = pytree.tree_flatten(y)
    if not flat:
        raise ValueError("y holds no tensor")
    for x in flat:
        if not isinstance(x, Tensor):
            raise TypeError(f"y must hold tensors, got a {type(x).__name__}")
    time = torch.as_tensor(t, dtype=flat[0].dtype.to_real(), device=flat[0].device)
    run = _Run(order - 1, known=0)
    t_jet = _Jet(_Series(time, lambda _, k: torch.ones_like(time) if k == 1 else None), run)
    state = [_Series(x, _unknown) for x in flat]
    slope = f(t_jet, pytree.tree_unflatten([_Jet(x, run) for x in state], spec))
    slopes, slope_spec = pytree.tree_flatten(slope)
    shapes = [tuple(x.shape) for x in slopes], [tuple(x.shape) for x in flat]
    if slope_spec != spec or shapes[0] != shapes[1]:
        raise ValueError(f"f must return the structure and shapes of y, {shapes[1]}; got {shapes[0]}")
    outputs = [_series_of(x, run) for x in slopes]
    for k in range(1, order):
        for coefficients, derivative in zip(state, outputs):
            coefficients.append(_scaled(derivative[k - 1], 1 / k))
        for made in run.made:  # in the order of f, so that none asks for what is not there yet
            made[k]
    derivatives = [[_scaled(_dense(x, k), float(math.factorial(k))) for x in outputs] for k in range(order)]
    return tuple(pytree.tree_unflatten(each, spec) for each in derivatives)


# ------------------------------------------------------------------------------------------------ series


class _Series:
    """x_0 + x_1 s + x_2 s^2 + ...: each coefficient is found when it is asked for, from those before it.

    Args:
        first: x_0; all others have its shape and dtype. Constants of f are series too, and may be numbers.
        rule: `rule(x, k)` is x_k; called once for each k = 1, 2, ..., in this order. It is handed the series
            itself, as a reference to it would be a cycle that keeps its tensors until Python looks for cycles.
    """

    __slots__ = ("_known", "_rule")

    def __init__(self, first: Any, rule: Callable[[_Series, int], Coefficient]):
        self._known: list[Any] = [first]
        self._rule = rule

    def __getitem__(self, k: int) -> Any:
        while len(self._known) <= k:
            self.append(self._rule(self, len(self._known)))
        return self._known[k]

    def append(self, coefficient: Coefficient) -> None:
        """Take the next coefficient, in the shape and dtype of the first."""
        first = self._known[0]
        if coefficient is not None and coefficient.shape != first.shape:
            coefficient = coefficient.expand(first.shape)
        if coefficient is not None and coefficient.dtype != first.dtype:
            coefficient = coefficient.to(first.dtype)
        self._known.append(coefficient)


def _constant(value: Any) -> _Series:
    return _Series(value, lambda _, k: None)


def _lifted(*operands: Any) -> tuple[_Series, ...]:
    """Operands as series: tensors and numbers are constants."""
    return tuple(x if isinstance(x, _Series) else _constant(x) for x in operands)


def _unknown(_: _Series, k: int) -> Coefficient:
    raise AssertionError(f"coefficient {k} was asked for before it was found")


def _dense(x: _Series, k: int) -> Tensor:
    return torch.zeros_like(x[0]) if x[k] is None else x[k]


def _scaled(x: Coefficient, factor: float) -> Coefficient:
    return x if x is None or factor == 1 else x * factor


def _sum(terms: Iterable[Coefficient]) -> Coefficient:
    total = None
    for term in terms:
        total = term if total is None else total if term is None else total + term
    return total


def _sum_of_products(triples: Iterable[tuple[Coefficient, Coefficient, float]]) -> Coefficient:
    """The sum of a * b * factor, elementwise, over the triples (a, b, factor) in which nothing is zero."""
    total = None
    for a, b, factor in triples:
        if a is None or b is None or factor == 0:
            continue
        if total is None or not all(isinstance(x, Tensor) for x in (a, b)):
            total = _sum([total, _scaled(a * b, factor)])
        else:
            total = torch.addcmul(total, a, b, value=factor)
    return total


def _cauchy(a: _Series, b: _Series, k: int) -> Coefficient:
    """Coefficient k of a b."""
    return _sum_of_products((a[i], b[k - i], 1.0) for i in range(k + 1))


def _solve(u: _Series, first: Tensor, slope: Callable[[_Series, int], Coefficient]) -> _Series:
    """The v with v' = w u' and v_0 = `first`, where `slope(v, k)` is w_k, found from v_0 to v_k.

    k v_k = sum_j j u_j w_{k-j}, j = 1..k.
    """
    w: list[Coefficient] = []

    def rule(v: _Series, k: int) -> Coefficient:
        w.append(slope(v, k - 1))
        return _sum_of_products((u[j], w[k - j], j / k) for j in range(1, k + 1))

    return _Series(first, rule)


# ------------------------------------------------------------------------------------------------ rules of series


def _add(a: Any, b: Any, *, alpha: float = 1) -> _Series:
    a, b = _lifted(a, b)
    return _Series(a[0] + _scaled(b[0], alpha), lambda _, k: _sum([a[k], _scaled(b[k], alpha)]))


def _bilinear(op: Callable[[Any, Any], Tensor]) -> Callable[[Any, Any], _Series]:
    def product(a: Any, b: Any) -> _Series:
        a, b = _lifted(a, b)

        def rule(_: _Series, k: int) -> Coefficient:
            pairs = ((a[i], b[k - i]) for i in range(k + 1))
            return _sum(op(x, y) for x, y in pairs if x is not None and y is not None)

        return _Series(op(a[0], b[0]), rule)

    return product


def _multiply(a: Any, b: Any) -> _Series:
    a, b = _lifted(a, b)
    return _Series(a[0] * b[0], lambda _, k: _cauchy(a, b, k))


def _divide(a: Any, b: Any, *, rounding_mode: str | None = None) -> _Series:
    if rounding_mode is not None:
        raise NotImplementedError(f"jet: div has no rule for rounding_mode={rounding_mode!r}, as the result jumps")
    a, b = _lifted(a, b)

    def rule(v: _Series, k: int) -> Coefficient:  # of v b = a
        found = _sum_of_products((b[j], v[k - j], -1.0) for j in range(1, k + 1))
        total = _sum([a[k], found])
        return None if total is None else total / b[0]

    return _Series(a[0] / b[0], rule)


def _sqrt(u: _Series) -> _Series:
    def rule(v: _Series, k: int) -> Coefficient:  # of v^2 = u
        total = _sum([u[k], _sum_of_products((v[j], v[k - j], -1.0) for j in range(1, k))])
        return None if total is None else total / (2 * v[0])

    return _Series(u[0].sqrt(), rule)


def _power(u: _Series, r: float) -> _Series:
    """u^r for a number r; whole r >= 0 by products, which are right at u = 0 too."""
    if float(r).is_integer() and r >= 0:
        return _whole_power(u, int(r))

    def rule(v: _Series, k: int) -> Coefficient:  # of u v' = r u' v
        total = _sum_of_products((u[j], v[k - j], (r * j - (k - j)) / k) for j in range(1, k + 1))
        return None if total is None else total / u[0]

    return _Series(u[0] ** r, rule)


def _power_of_entries(u: _Series, r: Tensor) -> _Series:
    """u^r for a tensor r that is constant along s."""

    def rule(v: _Series, k: int) -> Coefficient:  # of u v' = r u' v
        known = [(j, u[j], v[k - j]) for j in range(1, k + 1)]
        total = _sum((r * j - (k - j)) * x * y for j, x, y in known if x is not None and y is not None)
        return None if total is None else total / (k * u[0])

    return _Series(u[0] ** r, rule)


def _whole_power(u: _Series, r: int) -> _Series:
    if r == 0:
        return _constant(torch.ones_like(u[0]))
    if r == 1:
        return u
    half = _whole_power(u, r // 2)
    square = _multiply(half, half)
    return _multiply(square, u) if r % 2 else square


def _exp(u: _Series) -> _Series:
    return _solve(u, u[0].exp(), lambda v, k: v[k])


def _expm1(u: _Series) -> _Series:
    return _solve(u, u[0].expm1(), lambda v, k: u[0].exp() if k == 0 else v[k])


def _log(u: _Series) -> _Series:
    inverse = _divide(1.0, u)
    return _solve(u, u[0].log(), lambda v, k: inverse[k])


def _log1p(u: _Series) -> _Series:
    inverse = _divide(1.0, _add(u, 1.0))
    return _solve(u, u[0].log1p(), lambda v, k: inverse[k])


def _tanh(u: _Series) -> _Series:
    def slope(v: _Series, k: int) -> Coefficient:  # 1 - v^2
        return 1 - v[0] * v[0] if k == 0 else _scaled(_cauchy(v, v, k), -1)

    return _solve(u, u[0].tanh(), slope)


def _tanhshrink(u: _Series) -> _Series:
    t = _tanh(u)  # whose square is the slope
    return _solve(u, F.tanhshrink(u[0]), lambda v, k: _cauchy(t, t, k))


def _sigmoid(u: _Series) -> _Series:
    def slope(v: _Series, k: int) -> Coefficient:  # v - v^2
        return v[0] * (1 - v[0]) if k == 0 else _sum([v[k], _scaled(_cauchy(v, v, k), -1)])

    return _solve(u, u[0].sigmoid(), slope)


def _softplus(u: _Series, beta: float = 1.0, threshold: float = 20.0) -> _Series:
    slope = _sigmoid(_Series(beta * u[0], lambda _, k: _scaled(u[k], beta)))
    linear = beta * u[0] > threshold  # as PyTorch has it
    return _solve(
        u,
        F.softplus(u[0], beta, threshold),
        lambda v, k: None if slope[k] is None else slope[k].masked_fill(linear, float(k == 0)),
    )


def _log_sigmoid(u: _Series) -> _Series:
    slope = _sigmoid(_Series(-u[0], lambda _, k: _scaled(u[k], -1)))
    return _solve(u, F.logsigmoid(u[0]), lambda v, k: slope[k])


def _erf(u: _Series) -> _Series:
    bell = _exp(_Series(-u[0] * u[0], lambda _, k: _scaled(_cauchy(u, u, k), -1)))
    return _solve(u, u[0].erf(), lambda v, k: _scaled(bell[k], 2 / math.sqrt(math.pi)))


def _atan(u: _Series) -> _Series:
    below = _Series(1 + u[0] * u[0], lambda _, k: _cauchy(u, u, k))
    inverse = _divide(1.0, below)
    return _solve(u, u[0].atan(), lambda v, k: inverse[k])


def _sine(which: int, u: _Series, hyperbolic: bool = False) -> _Series:
    # Each is the other's slope, so that both are found as one series of (sin, cos), or (sinh, cosh).
    first = [u[0].sinh(), u[0].cosh()] if hyperbolic else [u[0].sin(), u[0].cos()]

    def slope(v: _Series, k: int) -> Coefficient:
        return None if v[k] is None else torch.stack([v[k][1], v[k][0] if hyperbolic else -v[k][0]])

    pair = _solve(u, torch.stack(first), slope)
    return _Series(pair[0][which], lambda _, k: None if pair[k] is None else pair[k][which])


def _where(condition: Any, a: Any, b: Any) -> _Series:
    if isinstance(condition, _Series) or condition.dtype not in (torch.bool, torch.uint8):  # a.where(condition, b)
        condition, a = a, condition
    a, b = _lifted(a, b)

    def rule(_: _Series, k: int) -> Coefficient:
        if a[k] is None and b[k] is None:
            return None
        return torch.where(condition, *(0.0 if x is None else x for x in (a[k], b[k])))

    return _Series(torch.where(condition, a[0], b[0]), rule)


# ------------------------------------------------------------------------------------------------ rules of tensors
# What users' operations become, in operations of which each has a rule already.


def _linear(x: Any, weight: Any, bias: Any = None) -> Tensor:
    product = _apply(_bilinear(F.linear), x, weight)
    return product if bias is None else product + bias


def _convolution(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def convolve(input: Any, weight: Any, bias: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        product = _apply(_bilinear(lambda x, w: op(x, w, None, *args, **kwargs)), input, weight)
        return product if bias is None else product + bias.reshape(-1, *(1 for _ in weight.shape[2:]))

    return convolve


def _einsum(equation: str, *operands: Any) -> Tensor:
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = tuple(operands[0])
    if len(operands) > 2:
        raise NotImplementedError("jet: einsum has a rule for one or two operands; split it into several")
    if len(operands) == 1:
        return _coefficientwise(torch.einsum, (equation, *operands), {})
    return _apply(_bilinear(functools.partial(torch.einsum, equation)), *operands)


def _addmm(input: Any, mat1: Any, mat2: Any, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return beta * input + alpha * torch.matmul(mat1, mat2)


def _pow(base: Any, exponent: Any) -> Tensor:
    if isinstance(exponent, Tensor) and exponent.ndim == 0 and exponent.is_cpu and not _is_variable(exponent):
        exponent = exponent.item()
    if isinstance(exponent, int | float):
        return _apply(_power, base, exponent)
    if not isinstance(exponent, _Jet):
        return _apply(_power_of_entries, base, exponent)
    if not isinstance(base, Tensor):
        base = torch.as_tensor(base, dtype=exponent.dtype, device=exponent.device)
    return (exponent * base.log()).exp()


def _is_variable(x: Tensor) -> bool:
    """Whether x has derivatives, of this or any other kind, that a number would lose."""
    return isinstance(x, _Jet) or is_tracked(x)


def _gelu(x: Tensor, approximate: str = "none") -> Tensor:
    if approximate == "tanh":
        return 0.5 * x * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh())
    return 0.5 * x * (1 + (x / math.sqrt(2)).erf())


def _softmax(x: Tensor, dim: int, *, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Tensor:
    x = x if dtype is None else x.to(dtype)
    largest = _primal_of(x).amax(dim, keepdim=True)  # a constant that drops out
    weights = (x - largest).exp()
    return weights / weights.sum(dim, keepdim=True)


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
        raise NotImplementedError(f"jet: norm has a rule for the 2-norm, got ord={ord!r}")
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


def _log_softmax(x: Tensor, dim: int, *, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Tensor:
    x = x if dtype is None else x.to(dtype)
    below = x - _primal_of(x).amax(dim, keepdim=True)
    return below - below.exp().sum(dim, keepdim=True).log()


def _logsumexp(x: Tensor, dim: Any, keepdim: bool = False) -> Tensor:
    largest = _primal_of(x).amax(dim, keepdim=True)
    found = (x - largest).exp().sum(dim, keepdim=True).log() + largest
    return found if keepdim else found.squeeze(dim)


def _dropout(x: Tensor, p: float = 0.5, training: bool = True) -> Tensor:
    if training and p > 0:
        raise NotImplementedError(
            "jet: dropout draws a new mask at each call, so that f is no function; call eval(), or use "
            "implicitly.nn.Dropout"
        )
    return x


def _pad(x: Tensor, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Tensor:
    if value:
        raise NotImplementedError(f"jet: pad has a rule for the value 0, got {value}; concatenate what to add")
    return _coefficientwise(F.pad, (x, pad), {"mode": mode})


# ------------------------------------------------------------------------------------------------ tables
# By the name of an operation, which is the same for the method, the function and the operator.

_RULES: dict[str, Callable[..., _Series]] = {
    "add": _add,
    "sub": lambda a, b, alpha=1: _add(a, b, alpha=-alpha),
    "rsub": lambda a, b, alpha=1: _add(b, a, alpha=-alpha),
    "mul": _multiply,
    "div": _divide,
    "rdiv": lambda a, b: _divide(b, a),
    "reciprocal": lambda u: _divide(1.0, u),
    "square": lambda u: _multiply(u, u),
    "matmul": _bilinear(torch.matmul),
    "outer": _bilinear(torch.outer),
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
}

_COMPOSED: dict[str, Callable[..., Any]] = {
    "linear": _linear,
    **{f"conv{n}d": _convolution(getattr(torch, f"conv{n}d")) for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": _convolution(getattr(torch, f"conv_transpose{n}d")) for n in (1, 2, 3)},
    "einsum": _einsum,
    "addmm": _addmm,
    "baddbmm": _addmm,
    "addcmul": lambda x, a, b, value=1: x + value * (a * b),
    "pow": _pow,
    "rpow": lambda exponent, base: _pow(base, exponent),
    "gelu": _gelu,
    "softmax": _softmax,
    "log_softmax": _log_softmax,
    "logsumexp": _logsumexp,
    "group_norm": _group_norm,
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "linalg_vector_norm": _norm,
    "norm": lambda x, p="fro", dim=None, keepdim=False, dtype=None: _norm(x, p, dim, keepdim, dtype=dtype),
    "dropout": _dropout,
    "pad": _pad,
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


def _names(words: str) -> frozenset[str]:
    return frozenset(words.split())


# Linear in their first tensor, so that they act on each coefficient alone.
_LINEAR = _names(
    """
    neg positive sum mean cumsum trace real imag conj
    getitem select narrow index_select gather take_along_dim diagonal unbind split chunk tensor_split
    view reshape flatten unflatten ravel squeeze unsqueeze expand broadcast_to expand_as view_as reshape_as
    transpose swapaxes permute movedim t T mT adjoint flip roll repeat tile repeat_interleave tril triu
    contiguous clone to float double type_as avg_pool1d avg_pool2d avg_pool3d
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d pixel_shuffle pixel_unshuffle
    """
)
# Linear in several tensors at once; those without a series are constants.
_JOINTLY_LINEAR = _names("cat stack hstack vstack broadcast_tensors diff")
# Of the value alone: what does not change with s, or jumps.
_OF_VALUE = _names(
    """
    shape size dim ndim ndimension dtype device layout numel nelement len stride is_contiguous requires_grad
    is_floating_point is_complex is_cuda is_inference zeros_like ones_like empty_like rand_like randn_like
    new_zeros new_ones new_empty gt lt ge le eq ne isnan isfinite isinf sign argmax argmin
    """
)
_SAME = {
    **dict.fromkeys(("mm", "bmm", "mv", "dot"), "matmul"),
    "subtract": "sub",
    "multiply": "mul",
    "divide": "div",
    "true_divide": "div",
    "negative": "neg",
    "special_expit": "sigmoid",
    "special_erf": "erf",
    "arctan": "atan",
    "concat": "cat",
    "concatenate": "cat",
}


# ------------------------------------------------------------------------------------------------ dispatch


class _Run:
    """One call of `jet`: the order, and all series that f made.

    Args:
        order: the last coefficient that is wanted.
        known: the last coefficient of f's arguments that is known while f runs; up to it, all are found at once.
    """

    _count = itertools.count()

    def __init__(self, order: int, known: int):
        self.order = order
        self.known = known
        self.level = next(
            self._count
        )  # an inner call, whose coefficients are jets of the outer one, has the higher
        self.made: list[_Series] = []


class _Jet(Tensor):
    """A series with the face of a tensor, which every operation of PyTorch hands to `__torch_function__`."""

    series: _Series
    run: _Run

    @staticmethod
    def __new__(cls, series: _Series, run: _Run):
        first = series[0]
        if not (first.is_floating_point() or first.is_complex()):
            raise NotImplementedError(f"jet: {first.dtype} has no derivatives; convert a constant in its place")
        jet = Tensor._make_wrapper_subclass(cls, first.shape, dtype=first.dtype, device=first.device)
        jet.series = series
        jet.run = run
        for k in range(1, run.known + 1):
            series[k]
        if run.known < run.order:
            run.made.append(series)
        return jet

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = {
            k: v for k, v in (kwargs or {}).items() if k not in ("out", "inplace") or not (v is None or v is False)
        }
        name = _name_of(func)
        args = (*args, *(kwargs.pop(which) for which in ("condition", "input", "other") if which in kwargs))
        if not kwargs.keys() & {"out", "inplace"}:
            if name in _COMPOSED:
                return _COMPOSED[name](*args, **kwargs)
            if name in _RULES:
                return _apply(_RULES[name], *args, **kwargs)
            if name in _LINEAR or name in _JOINTLY_LINEAR:
                return _coefficientwise(func, args, kwargs, jointly=name in _JOINTLY_LINEAR)
            if name in _OF_VALUE:
                run = _run_of((args, kwargs))
                return func(*pytree.tree_map(lambda x: _value(x, run), args), **kwargs)
        raise NotImplementedError(_refusal(func, name, kwargs))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        raise NotImplementedError(_refusal(func, str(func), {}))

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"jet({self.series[0]!r}, order={self.run.order})"


def _name_of(func: Any) -> str:
    name = getattr(func, "__name__", str(func))
    if name == "__get__":  # of a property
        return func.__self__.__name__
    if name.startswith("__") and name.endswith("__") and name != "__float__":  # which is not Tensor.float
        name = name[2:-2]
    return _SAME.get(name, name)


def _refusal(func: Any, name: str, kwargs: dict[str, Any]) -> str:
    in_place = name.endswith("_") and not name.startswith("_")
    if in_place or name in ("setitem", "set") or kwargs.keys() & {"out", "inplace"}:
        return f"jet: {name} writes into a tensor; write it so that it returns a new one"
    home = getattr(func, "__module__", None) or "torch.Tensor"
    return (
        f"jet: no rule for {name} (of {home}). Write f with operations that have one (arithmetic, matmul, "
        "convolutions, exp, log, sqrt, tanh, sigmoid, softplus, silu, gelu, sin, cos, erf, sums, indexing), or "
        "nest torch.func.jvp, whose cost doubles with each order"
    )


def _run_of(arguments: Any) -> _Run:
    """The innermost call that has a jet among the arguments; jets of others are constants to it."""
    runs = [x.run for x in pytree.tree_leaves(arguments) if isinstance(x, _Jet)]
    return max(runs, key=lambda run: run.level)


def _series_of(x: Any, run: _Run) -> Any:
    """The series of a jet of this run; a constant of anything else."""
    return x.series if isinstance(x, _Jet) and x.run is run else _constant(x)


def _value(x: Any, run: _Run) -> Any:
    return x.series[0] if isinstance(x, _Jet) and x.run is run else x


def _primal_of(x: Tensor) -> Tensor:
    return x.series[0] if isinstance(x, _Jet) else x


def _apply(rule: Callable[..., _Series], *args: Any, **kwargs: Any) -> Tensor:
    """The jet that a rule of series makes."""
    run = _run_of((args, kwargs))
    args = tuple(x.series if isinstance(x, _Jet) and x.run is run else x for x in args)
    return _Jet(rule(*args, **kwargs), run)


def _coefficientwise(func: Callable[..., Any], args: tuple, kwargs: dict[str, Any], jointly: bool = False) -> Any:
    """A linear operation, of each coefficient of its first tensor, or `jointly` of all."""
    run = _run_of((args, kwargs))
    flat, spec = pytree.tree_flatten((args, kwargs))
    tensors = [i for i, x in enumerate(flat) if isinstance(x, Tensor)]
    chosen = {i: _series_of(flat[i], run) for i in (tensors if jointly else tensors[:1])}
    values = [_value(x, run) for x in flat]  # of others, as that of `expand_as`, these are all that counts

    def at(k: int) -> Any:
        if k and all(x[k] is None for x in chosen.values()):
            return None
        filled = [_dense(chosen[i], k) if i in chosen else x for i, x in enumerate(values)]
        args, kwargs = pytree.tree_unflatten(filled, spec)
        return func(*args, **kwargs)

    first = at(0)
    if all(flat[i] is values[i] for i in chosen):  # of constants
        return first
    if isinstance(first, Tensor):
        return _Jet(_Series(first, lambda _, k: at(k)), run)
    several = functools.cache(at)

    def part(i: int, value: Tensor) -> _Jet:
        return _Jet(_Series(value, lambda _, k: None if several(k) is None else several(k)[i]), run)

    return tuple(part(i, value) for i, value in enumerate(first))


def _input(run: _Run, primal: Any, terms: Sequence[Any]) -> Any:
    """A primal with its derivatives as jets."""
    flat, spec = pytree.tree_flatten(primal)
    columns = []
    for term in terms:
        leaves, term_spec = pytree.tree_flatten(term)
        if term_spec != spec:
            raise ValueError(f"a derivative must have the structure of its primal, {spec}; got {term_spec}")
        columns.append(leaves)
    jets = []
    for i, first in enumerate(flat):
        given = [column[i] for column in columns]
        for x in (first, *given):
            if not isinstance(x, Tensor):
                raise TypeError(f"primals and series must hold tensors, got a {type(x).__name__}")
            if x.shape != first.shape or x.dtype != first.dtype:
                raise ValueError(
                    f"a derivative must be like its primal, {tuple(first.shape)} of {first.dtype}; got "
                    f"{tuple(x.shape)} of {x.dtype}"
                )
        series = _Series(first, _unknown)
        for k, term in enumerate(given, 1):
            series.append(_scaled(term, 1 / math.factorial(k)))
        jets.append(_Jet(series, run))
    return pytree.tree_unflatten(jets, spec)


def _output(value: Any, run: _Run, order: int) -> tuple[Any, tuple[Any, ...]]:
    """What f returned, as its value and derivatives."""
    flat, spec = pytree.tree_flatten(value)
    for x in flat:
        if not isinstance(x, Tensor):
            raise TypeError(f"f must return tensors, got a {type(x).__name__}")
    series = [_series_of(x, run) for x in flat]
    derivatives = [
        pytree.tree_unflatten([_scaled(_dense(x, k), float(math.factorial(k))) for x in series], spec)
        for k in range(order + 1)
    ]
    return derivatives[0], tuple(derivatives[1:])
