"""Linear maps that are computed in one way, and differentiated in another."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import vmap

from implicitly.implicit import push
from implicitly.pullback import of_places, pullback
from implicitly.transforms import Operation, one_by_one, unhooked
from implicitly.tree import real_parts

# Splits the values of a merged batch, so that what was mapped is in their first dimension.
Split = Callable[[Sequence[Tensor]], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Linear(ABC):
    """A function of tensors, linear in those after the first `count`, that can be computed in two ways."""

    count: int

    @abstractmethod
    def fast(self, *tensors: Tensor) -> Sequence[Tensor]:
        """The values; the tensors after the first `count`, and all values, may have further last dimensions.

        It gets tensors without the levels of `torch.func` around them, so that autograd's usual graphs serve it.
        """

    @abstractmethod
    def exact(self, *tensors: Tensor) -> Sequence[Tensor]:
        """The values by operations that can be differentiated, and transformed by `torch.func`."""

    @abstractmethod
    def mapped(
        self, size: int, dims: Sequence[int | None], tensors: Sequence[Tensor]
    ) -> tuple[Linear, list[Tensor], Split]:
        """This function mapped over the dimensions `dims` of `size` entries, as one of merged `tensors`.

        Also a function that splits its values, so that they have the `size` entries in their first dimension.
        """


@dataclass(frozen=True)
class _Several(Linear):
    """`each`, for tensors after the first `count` that have a further last dimension."""

    each: Linear

    def fast(self, *tensors: Tensor) -> Sequence[Tensor]:
        return self.each.fast(*tensors)

    def exact(self, *tensors: Tensor) -> Sequence[Tensor]:
        dims = (None,) * self.count + (-1,) * (len(tensors) - self.count)

        def each(*tensors: Any) -> tuple[Tensor, ...]:
            return tuple(self.each.exact(*tensors))

        return [x.movedim(0, -1) for x in vmap(each, in_dims=dims, randomness="different")(*tensors)]

    def mapped(
        self, size: int, dims: Sequence[int | None], tensors: Sequence[Tensor]
    ) -> tuple[Linear, list[Tensor], Split]:
        each, merged, split = self.each.mapped(size, dims, tensors)
        return replace(self, each=each), merged, split


class Shortcut(Operation):
    """The values of `linear.fast(*tensors)`, with the derivatives of `linear.exact(*tensors)`."""

    @staticmethod
    @unhooked()
    def forward(linear: Linear, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The values."""
        return tuple(linear.fast(*tensors))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Save the tensors."""
        ctx.linear, *tensors = inputs
        ctx.likes = [x.detach() for x in output]
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    @one_by_one
    @unhooked()
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        """The cotangents of all tensors, by `linear.exact`."""
        tensors = ctx.saved_tensors
        places = [i for i, needed in enumerate(ctx.needs_input_grad[1:]) if needed]
        of = of_places(_flat(ctx.linear.exact), tensors, places)
        found = pullback(of, *(tensors[i] for i in places))[1](_joined(cotangents))
        gradients: list[Tensor | None] = [None] * len(tensors)
        for i, gradient in zip(places, found):
            gradients[i] = gradient
        return None, *gradients

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        """The tangents of the values, by `linear.exact`."""
        tensors = tuple(forward_ad.unpack_dual(x).primal for x in ctx.saved_tensors)
        given = {i: d for i, d in enumerate(tangents[1:]) if d is not None}
        of = of_places(_flat(ctx.linear.exact), tensors, list(given))
        with forward_ad._set_fwd_grad_enabled(True):  # autograd switches it off here; an enclosing jvp needs it
            moved = push(of, tuple(tensors[i] for i in given), tuple(given.values()))
            return tuple(_split(moved, ctx.likes))

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        """The values of all mapped samples: several for one point, or those of a merged batch."""
        linear, *tensors = args
        size, dims, count = info.batch_size, in_dims[1:], linear.count
        if all(d is None for d in dims[:count]):
            several = [
                x.unsqueeze(-1).expand(*x.shape, size) if d is None else x.movedim(d, -1)
                for x, d in zip(tensors[count:], dims[count:])
            ]
            output = Shortcut.apply(_Several(count, linear), *tensors[:count], *several)
            # With the usual strides for each of them, which complex numbers need.
            return tuple(x.movedim(-1, 0).contiguous() for x in output), (0,) * len(output)
        linear, merged, split = linear.mapped(size, dims, tensors)
        output = split(Shortcut.apply(linear, *merged))
        return output, (0,) * len(output)


def _joined(values: Sequence[Tensor]) -> Tensor:
    """The entries of all `values`, as one real vector."""
    return torch.cat([real_parts(x).flatten() for x in values])


def _flat(f: Callable[..., Sequence[Tensor]]) -> Callable[..., Tensor]:
    return lambda *tensors: _joined(f(*tensors))


def _split(vector: Tensor, likes: Sequence[Tensor]) -> list[Tensor]:
    """Undoes `_joined`, for tensors like these."""
    sizes = [x.numel() * (2 if x.is_complex() else 1) for x in likes]
    # Copies, since complex numbers can start neither at an odd offset nor at multiples of an odd stride.
    parts = (part.clone(memory_format=torch.contiguous_format) for part in vector.split(sizes))
    shaped = (
        torch.view_as_complex(part.reshape(*like.shape, 2)) if like.is_complex() else part.reshape(like.shape)
        for part, like in zip(parts, likes)
    )
    return [part.to(like.dtype) for part, like in zip(shaped, likes)]
