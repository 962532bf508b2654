"""Taylor-mode differentiation: power series pushed through a function, at a cost polynomial in the order.

f runs once, on power series that look like tensors, and each of PyTorch's operations is replaced by its rule. The
series are in `series.py`, the rules of elementary operations in `rules.py`, and operations composed of those in
`composed.py`. Nested forward mode would do the same work 2^K times for order K (Bettencourt, Johnson and Duvenaud,
"Taylor-Mode Automatic Differentiation for Higher-Order Derivatives in JAX", 2019).

Internally x_k is the k-th derivative divided by k!; users pass and get derivatives, as in `jax.experimental.jet`.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from implicitly.taylor.composed import COMPOSED
from implicitly.taylor.rules import RULES
from implicitly.taylor.series import Series, constant, dense, scaled, unknown


def jet(f: Callable[..., Any], primals: Sequence[Any], series: Sequence[Sequence[Any]]) -> tuple[Any, tuple]:
    """Compute derivatives of any order of s -> f(x(s), ...) at s = 0 from those of s -> x(s), ....

    The result is differentiable by autograd and `torch.func` with respect to the primals, the series, and what f
    depends on. Memory and time grow with the square of the order; for products with constants, linearly.

    Args:
        f: takes as many arguments as there are `primals`, and uses only operations on tensors that have a rule.
        primals: x(0) for each argument: a tensor, or a pytree of them.
        series: for each argument the K derivatives x'(0), x''(0), ..., not divided by factorials, each like the
            primal in structure, shapes and dtypes.

    Returns:
        f(x(0), ...) and a tuple of its K derivatives, each a pytree of tensors like it.

    Raises:
        ValueError, TypeError: primals and series do not fit each other.
        NotImplementedError: f uses an operation that has no rule; the message names it.

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
    """The derivatives d^k y/dt^k, k = 1, ..., order, of the solution of dy/dt = f(t, y) through y at time t.

    This takes one call of f. Coefficient k of the solution is coefficient k - 1 of f over k, so each pass over the
    operations of f finds one more coefficient of every series, and none is computed twice. Differentiable like
    `jet`.

    Args:
        f: `f(t, y)` returns dy/dt, like y in structure, shapes and dtypes; uses only operations that have a rule.
        t: the time: a tensor that broadcasts with y as f expects it, or a number.
        y: the state at t: a tensor or a pytree of them.
        order: the number of derivatives, at least 1.

    Returns:
        `order` derivatives, each like y.

    Raises:
        TypeError: y holds anything but tensors.
        ValueError: order is below 1, or f returns another structure or shape than y's.
        NotImplementedError: f uses an operation that has no rule; the message names it.

    Source: Kelly, Bettencourt, Johnson and Duvenaud, "Learning Differential Equations that are Easy to Solve",
    NeurIPS 2020, appendix A.
    """
    if not isinstance(order, int) or order < 1:
        raise ValueError(f"order must be an int >= 1, got {order!r}")
    flat, spec = pytree.tree_flatten(y)
    if not flat:
        raise ValueError("y holds no tensor")
    for x in flat:
        if not isinstance(x, Tensor):
            raise TypeError(f"y must hold tensors, got a {type(x).__name__}")
    time = torch.as_tensor(t, dtype=flat[0].dtype.to_real(), device=flat[0].device)
    run = _Run(order - 1, known=0)
    t_jet = _Jet(Series(time, lambda _, k: torch.ones_like(time) if k == 1 else None), run)
    state = [Series(x, unknown) for x in flat]
    slope = f(t_jet, pytree.tree_unflatten([_Jet(x, run) for x in state], spec))
    slopes, slope_spec = pytree.tree_flatten(slope)
    shapes = [tuple(x.shape) for x in slopes], [tuple(x.shape) for x in flat]
    if slope_spec != spec or shapes[0] != shapes[1]:
        raise ValueError(f"f must return the structure and shapes of y, {shapes[1]}; got {shapes[0]}")
    outputs = [_series_of(x, run) for x in slopes]
    for k in range(1, order):
        for coefficients, derivative in zip(state, outputs):
            coefficients.append(scaled(derivative[k - 1], 1 / k))
        for made in run.made:  # in the order in which f made them, so that none needs what is not there yet
            made[k]
    derivatives = [[scaled(dense(x, k), float(math.factorial(k))) for x in outputs] for k in range(order)]
    return tuple(pytree.tree_unflatten(each, spec) for each in derivatives)


# ------------------------------------------------------------------------------------------------ operations


def _names(words: str) -> frozenset[str]:
    return frozenset(words.split())


# Linear in their first tensor, so that they act on each coefficient separately.
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
# Jointly linear in several tensors; those without a series are constants.
_JOINTLY_LINEAR = _names("cat stack hstack vstack broadcast_tensors diff")
# Functions of the value x(0) alone: what they return does not change with s, or jumps.
_OF_VALUE = _names(
    """
    shape size dim ndim ndimension dtype device layout numel nelement len stride is_contiguous requires_grad
    is_floating_point is_complex is_cuda is_inference zeros_like ones_like empty_like rand_like randn_like
    new_zeros new_ones new_empty gt lt ge le eq ne isnan isfinite isinf sign argmax argmin
    """
)
# Keyword names of operands, in the order in which operations take them.
_OPERANDS = (
    *(
        "condition",
        "input",
        "mat1",
        "batch1",
        "vec1",
        "tensor1",
        "mat2",
        "batch2",
        "vec",
        "vec2",
        "tensor",
        "tensor2",
    ),
    *("other", "exponent"),
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
        known: the last coefficient of f's arguments that is known while f runs; coefficients up to it are computed
            at once.
    """

    _count = itertools.count()

    def __init__(self, order: int, known: int):
        self.order = order
        self.known = known
        # The level of an inner call, whose coefficients are jets of the outer call, is higher.
        self.level = next(self._count)
        self.made: list[Series] = []


class _Jet(Tensor):
    """A series in the guise of a tensor, which every operation of PyTorch hands to `__torch_function__`."""

    series: Series
    run: _Run

    @staticmethod
    def __new__(cls, series: Series, run: _Run):
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
        args = (*args, *(kwargs.pop(which) for which in _OPERANDS if which in kwargs))
        if not kwargs.keys() & {"out", "inplace"}:
            if name in COMPOSED:
                return COMPOSED[name](*args, **kwargs)
            if name in RULES:
                return _apply(RULES[name], *args, **kwargs)
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
    """The innermost run that has a jet among the arguments; the jets of other runs are constants to it."""
    runs = [x.run for x in pytree.tree_leaves(arguments) if isinstance(x, _Jet)]
    return max(runs, key=lambda run: run.level)


def _series_of(x: Any, run: _Run) -> Any:
    """The series of a jet of this run; a constant series for anything else."""
    return x.series if isinstance(x, _Jet) and x.run is run else constant(x)


def _value(x: Any, run: _Run) -> Any:
    return x.series[0] if isinstance(x, _Jet) and x.run is run else x


def _apply(rule: Callable[..., Series], *args: Any, **kwargs: Any) -> Tensor:
    """Apply a rule for series to jets, and return a jet."""
    run = _run_of((args, kwargs))
    args, kwargs = pytree.tree_map(
        lambda x: x.series if isinstance(x, _Jet) and x.run is run else x, (args, kwargs)
    )
    return _Jet(rule(*args, **kwargs), run)


def _coefficientwise(func: Callable[..., Any], args: tuple, kwargs: dict[str, Any], jointly: bool = False) -> Any:
    """Apply a linear operation to each coefficient of its first tensor or, if `jointly`, of all its tensors."""
    run = _run_of((args, kwargs))
    flat, spec = pytree.tree_flatten((args, kwargs))
    tensors = [i for i, x in enumerate(flat) if isinstance(x, Tensor)]
    chosen = {i: _series_of(flat[i], run) for i in (tensors if jointly else tensors[:1])}
    values = [_value(x, run) for x in flat]  # all that counts of other tensors, such as that of `expand_as`

    def at(k: int) -> Any:
        if k and all(x[k] is None for x in chosen.values()):
            return None
        filled = [dense(chosen[i], k) if i in chosen else x for i, x in enumerate(values)]
        args, kwargs = pytree.tree_unflatten(filled, spec)
        return func(*args, **kwargs)

    first = at(0)
    if all(flat[i] is values[i] for i in chosen):  # all are constants
        return first
    if isinstance(first, Tensor):
        return _Jet(Series(first, lambda _, k: at(k)), run)
    several = functools.cache(at)

    def part(i: int, value: Tensor) -> _Jet:
        return _Jet(Series(value, lambda _, k: None if several(k) is None else several(k)[i]), run)

    return tuple(part(i, value) for i, value in enumerate(first))


def _input(run: _Run, primal: Any, terms: Sequence[Any]) -> Any:
    """A primal and its derivatives, as jets."""
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
        series = Series(first, unknown)
        for k, term in enumerate(given, 1):
            series.append(scaled(term, 1 / math.factorial(k)))
        jets.append(_Jet(series, run))
    return pytree.tree_unflatten(jets, spec)


def _output(value: Any, run: _Run, order: int) -> tuple[Any, tuple[Any, ...]]:
    """The value and the derivatives of what f returned."""
    flat, spec = pytree.tree_flatten(value)
    for x in flat:
        if not isinstance(x, Tensor):
            raise TypeError(f"f must return tensors, got a {type(x).__name__}")
    series = [_series_of(x, run) for x in flat]
    derivatives = [
        pytree.tree_unflatten([scaled(dense(x, k), float(math.factorial(k))) for x in series], spec)
        for k in range(order + 1)
    ]
    return derivatives[0], tuple(derivatives[1:])
