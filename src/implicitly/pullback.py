"""Pullbacks (vector-Jacobian products) of functions, computed in the fastest way there is."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward
from torch.func import grad, vjp, vmap

from implicitly.transforms import is_plain, is_wrapped, under_transform, unhooked
from implicitly.tree import real_parts

# Maps the cotangent of a value, and the places of some inputs, to the cotangents of those inputs.
Pull = Callable[[Tensor, list[int]], tuple[Tensor, ...]]


def pullback(f: Callable[..., Tensor], *primals: Tensor) -> tuple[Tensor, Callable[..., tuple[Tensor, ...]]]:
    """The value of f at `primals`, and the linear map from its cotangent to those of `primals`."""
    if not (torch.compiler.is_dynamo_compiling() or under_transform()) and is_plain(*primals):
        places = list(range(len(primals)))
        value, pull = _recorded(f, primals, places)
        return value, lambda cotangent: pull(cotangent, places)
    if not any(is_wrapped(p) for p in primals):
        # torch.func refuses hooks on saved tensors, which are active where autograd records the solve itself.
        with nullcontext() if torch.compiler.is_dynamo_compiling() else unhooked():
            value, pull = vjp(f, *primals)[:2]
        return value, pull

    return f(*primals), functools.partial(pull_within, f, primals)


def pull_within(f: Callable[..., Tensor], primals: tuple[Tensor, ...], cotangent: Tensor) -> tuple[Tensor, ...]:
    """The cotangents of `primals`, under a transform of `torch.func`.

    There a pullback must not outlive the level of its own `vjp`: deeper transforms would meet tensors of a level
    that has ended. So each product differentiates afresh, within its own level.
    """

    def paired(*inputs: Tensor) -> Tensor:
        # Every input is used, if only by an empty slice: for unused ones torch.func makes zeros on a wrong level.
        unused = sum(real_parts(x).flatten()[:0].sum() for x in inputs)
        return (f(*inputs) * cotangent).sum() + unused

    return grad(paired, argnums=tuple(range(len(primals))))(*primals)


def at_once(call: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """The linear map `call` applied to each of the `rows`, stacked.

    All rows are mapped at once, or one after the other where `call` has an operation that `vmap` does not support,
    such as the derivative of a product with a sparse matrix.
    """
    # Under a transform each product may call f anew, and f must not draw other random numbers for each row.
    if torch.compiler.is_dynamo_compiling() or under_transform():
        return vmap(call)(rows)
    try:
        return vmap(call)(rows)
    except RuntimeError:  # raised for all that vmap lacks; other errors occur again for a single row
        return torch.stack([call(row) for row in rows])


def of_places(f: Callable[..., Tensor], inputs: Sequence[Tensor], places: list[int]) -> Callable[..., Tensor]:
    """`f(*inputs)` as a function of only those inputs at `places`."""

    def of(*chosen: Tensor) -> Tensor:
        full = list(inputs)
        for i, x in zip(places, chosen):
            full[i] = x
        return f(*full)

    return of


def recorded(f: Callable[..., Tensor], primals: tuple[Tensor, ...], wanted: list[int]) -> Pull:
    """Call f at `primals` once and return its pullback: cotangents of some primals for a cotangent of the value.

    For `is_plain` tensors. `wanted` lists the primals that any call of the pullback may ask for. One autograd
    graph serves both many products for one primal and a last one for the others, and its products cost less than
    those of torch.func.
    """
    return _recorded(f, primals, wanted)[1]


def _recorded(f: Callable[..., Tensor], primals: tuple[Tensor, ...], wanted: list[int]) -> tuple[Tensor, Pull]:
    leaves = [p.detach().requires_grad_(i in wanted) for i, p in enumerate(primals)]
    with torch.enable_grad():
        value = f(*leaves)

    def pull(cotangent: Tensor, places: list[int]) -> tuple[Tensor, ...]:
        # Where the product is differentiated in turn, it is recorded, too.
        again = torch.is_grad_enabled()
        return pulled([value], [cotangent], [leaves[i] for i in places], retain=True, recorded=again)

    return value.detach(), pull


def pulled(
    outputs: Sequence[Tensor],
    bars: Sequence[Tensor],
    inputs: Sequence[Tensor],
    retain: bool = False,
    recorded: bool = False,
) -> tuple[Tensor, ...]:
    """The cotangents of `inputs` for the cotangents `bars` of `outputs`.

    They are 0 where no output depends on the input. `retain` keeps the graph; if `recorded`, the cotangents have a
    graph of their own.
    """
    pairs = [(o, b) for o, b in zip(outputs, bars) if o.requires_grad]
    if not (pairs and inputs):
        return tuple(torch.zeros_like(x) for x in inputs)
    # What `torch.autograd.grad` does after checking its arguments, which takes as long as a small f.
    what, by = (tuple(x) for x in zip(*pairs))
    found = _engine_run_backward(what, by, retain, recorded, tuple(inputs), True, accumulate_grad=False)
    return tuple(torch.zeros_like(x, requires_grad=recorded) if g is None else g for x, g in zip(inputs, found))


def pushed(outputs: Sequence[Tensor], inputs: Sequence[Tensor], tangents: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The tangents of `outputs` for the `tangents` of `inputs`, from the graph that autograd recorded.

    The cotangents of the inputs are linear in those of the outputs, with the transposed Jacobian; a second reverse
    pass, through this linear map, transposes it back. Tangents may have further dimensions, as in `pulled_each`.
    """
    bars = [torch.zeros_like(x, requires_grad=True) for x in outputs]
    with torch.enable_grad():
        found = pulled(outputs, bars, inputs, retain=True, recorded=True)
    return pulled_each(found, tangents, bars)


def pulled_each(
    outputs: Sequence[Tensor], bars: Sequence[Tensor], inputs: Sequence[Tensor], retain: bool = False
) -> tuple[Tensor, ...]:
    """As `pulled`; if the `bars` have further dimensions, for each of their slices along those."""
    if not bars or bars[0].ndim == outputs[0].ndim:
        return pulled(outputs, bars, inputs, retain)

    def pull(*bars: Tensor) -> tuple[Tensor, ...]:
        return pulled_each(outputs, bars, inputs, retain=True)

    return tuple(x.movedim(0, -1) for x in vmap(pull, in_dims=-1)(*bars))
