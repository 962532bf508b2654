"""What projections and proximal maps share: checks of their inputs, bad rows, averages over blocks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec

import torch
from torch import Tensor

from implicitly.checks import NUMBERS, Must, check_kind
from implicitly.host import maybe_any
from implicitly.implicit import Opaque
from implicitly.transforms import full_precision, unwrapped, written_down

Number = float | Tensor

NOT_NEGATIVE = Must(">= 0", lambda x: x >= 0)
NOT_NEGATIVE_AND_FINITE = Must(">= 0 and finite", lambda x: (x >= 0) & x.isfinite())
POSITIVE = Must("positive and finite", lambda x: (x > 0) & x.isfinite())
FINITE = Must("finite", lambda x: x.isfinite())

P = ParamSpec("P")


def in_full_precision(f: Callable[Concatenate[Tensor, P], Tensor]) -> Callable[Concatenate[Tensor, P], Tensor]:
    """Decorate `f`, a map of z, to run without autocast; for half precision it computes in float32."""

    @functools.wraps(f)
    def call(z: Tensor, *args: P.args, **kwargs: P.kwargs) -> Tensor:
        if not isinstance(z, Tensor):
            return f(z, *args, **kwargs)  # which says what is wrong
        with full_precision(z.device.type):
            if z.dtype in (torch.bfloat16, torch.float16):
                return f(z.float(), *args, **kwargs).to(z.dtype)
            return f(z, *args, **kwargs)

    return call


def check_state(name: str, z: Any, dims: int = 1, least: int = 1) -> None:
    """Raise TypeError / ValueError unless z is floating, with at least `dims` dimensions, the last >= `least`."""
    if not isinstance(z, Tensor) or not z.is_floating_point():
        came = z.dtype if isinstance(z, Tensor) else type(z).__name__
        raise TypeError(f"{name}: z must be a tensor of real floating numbers, got {came}; convert it with .to()")
    shape = "(..., n)" if dims == 1 else "(..., n, m)"
    if z.ndim < dims or z.shape[-1] < least:
        raise ValueError(f"{name}: z must be {shape} with n >= {least}, got {tuple(z.shape)}")


def as_parameter(name: str, parameter: str, value: Any, z: Tensor) -> Tensor:
    """`value`, a number or a tensor, as a tensor of z's dtype; raises TypeError / ValueError if it is neither."""
    if not isinstance(value, Tensor):
        check_kind(name, parameter, value, NUMBERS, "a number or a tensor, got {type}")
        return torch.full((), float(value), dtype=z.dtype, device=z.device)
    if value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{name}: {parameter} must hold real numbers, got {value.dtype}")
    if value.device != z.device:
        raise ValueError(f"{name}: {parameter} is on {value.device}, z on {z.device}; move one of them")
    return value.to(z.dtype)


def in_view(given: Any, value: Tensor) -> Tensor:
    """`value`, made from `given`, in a form to look at: a number on the host, where nobody waits for a device."""
    return value if isinstance(given, Tensor) else torch.full((), float(given), dtype=value.dtype, device="cpu")


def per_row(name: str, parameter: str, given: Any, z: Tensor, dims: int = 1, must: Must | None = None) -> Tensor:
    """One number per row of `z` `(..., n)` (per matrix with `dims=2`), with size one in the row's dimensions.

    Raises ValueError if a number is not what it `must` be.
    """
    value = as_parameter(name, parameter, given, z)
    lead = z.shape[: z.ndim - dims]
    check_broadcast(name, parameter, value.shape, lead, "one number a row")
    if value.ndim > len(lead) > 0 and value.shape[-1] == 1:
        raise ValueError(
            f"{name}: {parameter} must have one number per row of z {tuple(z.shape)}, so the shape {tuple(lead)} "
            f"without a dimension for the entries of a row, got {tuple(value.shape)}; use squeeze(-1)"
        )
    value = value[(..., *(None,) * dims)]
    check_all(name, parameter, given, value, must)
    return value


def per_entry(
    name: str,
    parameter: str,
    given: Any,
    z: Tensor,
    entries: tuple[int, ...] | None = None,
    must: Must | None = None,
) -> Tensor:
    """Numbers that broadcast against `z` `(..., n)`, or against `(..., *entries)` where these are given.

    Raises ValueError if a number is not what it `must` be.
    """
    value = as_parameter(name, parameter, given, z)
    wanted = z.shape if entries is None else (*z.shape[:-1], *entries)
    check_broadcast(name, parameter, value.shape, wanted, "its last dimensions being " + str(tuple(wanted[-1:])))
    keep = 1 if entries is None else len(entries)
    grown = torch.broadcast_shapes(value.shape, wanted)[-keep:]
    if tuple(grown) != tuple(wanted[-keep:]):  # a row of z never grows
        raise ValueError(f"{name}: {parameter} {tuple(value.shape)} does not fit z {tuple(z.shape)}")
    check_all(name, parameter, given, value, must)
    return value


def check_broadcast(name: str, parameter: str, came: Any, wanted: Any, meaning: str) -> None:
    """Raise ValueError unless the two shapes broadcast."""
    try:
        torch.broadcast_shapes(came, wanted)
    except RuntimeError as error:
        raise ValueError(
            f"{name}: {parameter} of shape {tuple(came)} must broadcast with {tuple(wanted)} ({meaning})"
        ) from error


def check_values(fine: Tensor, value: Tensor, message: str) -> None:
    """Raise ValueError if `fine` is false anywhere, with the first such entry of `value` and its index.

    The error starts with `message`; `value` has the shape of `fine`.
    Values are not looked at while a graph is traced.
    """
    if written_down():
        return
    fine = unwrapped(fine.detach())
    if bool(fine.all()):
        return
    place = tuple((~fine).nonzero()[0].tolist())
    wrong = unwrapped(value.detach()).expand_as(fine)[place]
    raise ValueError(f"{message}, got {float(wrong):g}" + (f" at index {list(place)}" if place else ""))


def check_all(name: str, parameter: str, given: Any, value: Tensor, must: Must | None) -> None:
    """Raise ValueError if an entry of `value`, made from `given`, is not what it `must` be."""
    if must is not None and not written_down():
        value = in_view(given, value)
        check_values(must.holds(value), value, f"{name}: {parameter} must be {must.words}")


def without_bad_rows(core: Callable[[Tensor], Tensor], z: Tensor, dims: int = 1, infinite: bool = False) -> Tensor:
    """`core(z)`, but NaN with zero derivative for rows (matrices with `dims=2`) that hold NaN.

    With `infinite`, also for rows that hold infinities.
    """
    places = tuple(range(-dims, 0))
    bad = (z.detach().isfinite().logical_not() if infinite else z.detach().isnan()).any(dim=places, keepdim=True)
    if not maybe_any(bad):
        return core(z)
    return torch.where(bad, float("nan"), core(torch.where(bad, 0.0, z)))


def block_means(x: Tensor, weights: Tensor | None, blocks: Tensor) -> Tensor:
    """The (weighted) mean of `x` `(..., n)` over each entry's block; `blocks` `(..., n)` int64 numbers these."""
    x, blocks = torch.broadcast_tensors(x, blocks)
    w = torch.ones_like(x) if weights is None else weights.expand_as(x)
    total = torch.zeros_like(x).scatter_add(-1, blocks, x if weights is None else w * x)
    size = torch.zeros_like(x).scatter_add(-1, blocks, w)
    return total.gather(-1, blocks) / size.gather(-1, blocks)


def mapped_first(size: int, in_dims: tuple[int | None, ...], tensors: tuple[Tensor, ...]) -> list[Tensor]:
    """`tensors`, each with the dimension that `vmap` maps moved to the front, or added there with `size`."""
    return [t.expand(size, *t.shape) if d is None else t.movedim(d, 0) for t, d in zip(tensors, in_dims)]


def outside(f: Callable[..., Any], *tensors: Tensor) -> Any:
    """`f(*tensors)` without derivatives and outside of every transform: f sees what `vmap` maps as dimension 0.

    All `tensors` must have the same leading dimensions; f returns tensors, or a tuple of them, that have them too.
    """
    detached = [t.detach() for t in tensors]
    if written_down():  # a graph has no transforms to step out of
        return f(*detached)
    return _Outside.apply(f, *detached)


class _Outside(Opaque):
    @staticmethod
    def forward(f, *tensors):
        return f(*tensors)

    @staticmethod
    def vmap(info, in_dims, *args):
        f, *tensors = args
        output = _Outside.apply(f, *mapped_first(info.batch_size, in_dims[1:], tuple(tensors)))
        return output, (0,) * len(output) if isinstance(output, tuple) else 0
