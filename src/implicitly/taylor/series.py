"""Power series whose coefficients are computed one after the other, and the sums that their rules are made of.

A function of x(s) = x_0 + x_1 s + x_2 s^2 + ... is computed coefficient by coefficient: products are Cauchy
products, and an elementary function v = phi(u) obeys an ordinary differential equation such as v' = v u', whose
k-th coefficient follows from those before it (Griewank and Walther, "Evaluating Derivatives", 2008, chapter 13).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

Coefficient = Tensor | None  # None is zero, which costs nothing


class Series:
    """The power series x_0 + x_1 s + x_2 s^2 + ...; each coefficient is computed on demand, from those before it.

    Args:
        first: x_0; all others have its shape and dtype. Constants of f are series too, and may be numbers.
        rule: `rule(x, k)` is x_k; called once for each k = 1, 2, ..., in this order. It is passed the series
            itself: a reference to it would be a cycle, which keeps tensors alive until Python collects cycles.
    """

    __slots__ = ("_known", "_rule")

    def __init__(self, first: Any, rule: Callable[[Series, int], Coefficient]):
        self._known: list[Any] = [first]
        self._rule = rule

    def __getitem__(self, k: int) -> Any:
        while len(self._known) <= k:
            self.append(self._rule(self, len(self._known)))
        return self._known[k]

    def append(self, coefficient: Coefficient) -> None:
        """Append the next coefficient, in the shape and dtype of the first."""
        first = self._known[0]
        if coefficient is not None and coefficient.shape != first.shape:
            coefficient = coefficient.expand(first.shape)
        if coefficient is not None and coefficient.dtype != first.dtype:
            coefficient = coefficient.to(first.dtype)
        self._known.append(coefficient)


def constant(value: Any) -> Series:
    """The series of a tensor or number that does not change with s."""
    return Series(value, lambda _, k: None)


def lifted(*operands: Any) -> tuple[Series, ...]:
    """Operands as series: tensors and numbers are constants."""
    return tuple(x if isinstance(x, Series) else constant(x) for x in operands)


def unknown(_: Series, k: int) -> Coefficient:
    """The rule of a series whose coefficients are appended from outside."""
    raise AssertionError(f"coefficient {k} was asked for before it was found")


def dense(x: Series, k: int) -> Tensor:
    """Coefficient k as a tensor, even where it is zero."""
    return torch.zeros_like(x[0]) if x[k] is None else x[k]


def scaled(x: Coefficient, factor: float) -> Coefficient:
    """x times a number."""
    return x if x is None or factor == 1 else x * factor


def add_up(terms: Iterable[Coefficient]) -> Coefficient:
    """The sum of the terms that are not zero."""
    total = None
    for term in terms:
        total = term if total is None else total if term is None else total + term
    return total


def sum_of_products(triples: Iterable[tuple[Coefficient, Coefficient, float]]) -> Coefficient:
    """The elementwise sum of a * b * factor over the triples (a, b, factor) in which nothing is zero."""
    total = None
    for a, b, factor in triples:
        if a is None or b is None or factor == 0:
            continue
        if total is None or not all(isinstance(x, Tensor) for x in (a, b)):
            total = add_up([total, scaled(a * b, factor)])
        else:
            total = torch.addcmul(total, a, b, value=factor)
    return total


def cauchy(a: Series, b: Series, k: int) -> Coefficient:
    """Coefficient k of the product a b."""
    return sum_of_products((a[i], b[k - i], 1.0) for i in range(k + 1))


def from_slope(u: Series, first: Tensor, slope: Callable[[Series, int], Coefficient]) -> Series:
    """The series v with v' = w u' and v_0 = `first`, where `slope(v, k)` computes w_k from v_0, ..., v_k.

    k v_k = sum_j j u_j w_{k-j}, j = 1..k.
    """
    w: list[Coefficient] = []

    def rule(v: Series, k: int) -> Coefficient:
        w.append(slope(v, k - 1))
        return sum_of_products((u[j], w[k - j], j / k) for j in range(1, k + 1))

    return Series(first, rule)


def each(op: Callable[[Tensor], Tensor], u: Series) -> Series:
    """Apply a linear operation to each coefficient."""
    return Series(op(u[0]), lambda _, k: None if u[k] is None else op(u[k]))


def jointly(op: Callable[[Any, Any], Tensor], a: Any, b: Any) -> Series:
    """Apply a bilinear operation: a Cauchy product in which it multiplies the coefficients."""
    a, b = lifted(a, b)

    def rule(_: Series, k: int) -> Coefficient:
        pairs = ((a[i], b[k - i]) for i in range(k + 1))
        return add_up(op(x, y) for x, y in pairs if x is not None and y is not None)

    return Series(op(a[0], b[0]), rule)
