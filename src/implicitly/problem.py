"""The user's input as matrices: the start, the tensors to differentiate, and f as a map on `(B, n)`."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from implicitly.changing import told_of_draws
from implicitly.condition import Condition, Map, Report
from implicitly.functions import Opened, Opening, like, open_function, refuse_captured, watched
from implicitly.inference import copied
from implicitly.iterate import Found
from implicitly.solution import Solution
from implicitly.transforms import loses, unhooked
from implicitly.tree import Layout


@dataclass(frozen=True)
class Problem:
    """The residual of a state, with its start and everything it depends on.

    Attributes:
        bind: maps theta to the residual, a function of matrices `(B, n)`.
        z0: the start `(B, n)`.
        r0: the residual at z0 `(B, n)`, evaluated once to check what f returns.
        theta: the tensors that f depends on.
        sample_dims: for each of theta the dimension that holds the samples, None where it is shared by all
            samples; None in place of the tuple: not known.
    """

    opened: Opened
    layout: Layout
    bind: Callable[..., Map]
    z0: Tensor
    r0: Tensor
    theta: tuple[Tensor, ...]
    sample_dims: tuple[int | None, ...] | None

    @classmethod
    def of(
        cls,
        f: Callable[..., Any],
        z0: Any,
        args: tuple[Any, ...],
        displacement: Callable[[Tensor, Tensor], Tensor],
        *,
        layout: Layout,
        in_dims: Any,
        recording: bool,
    ) -> Problem:
        """The problem of an f that returns a value like its state; raises TypeError / ValueError if it does not.

        `displacement` maps z and f(z) to the residual; z + displacement is the plain iteration. With `recording`,
        autograd records the solve itself, so nothing is detached.
        """
        opening = open_function(f, args, layout.device)
        opened = opening.opened

        def bind(*theta: Tensor) -> Map:
            call = opened.at(*theta)
            return lambda z: displacement(z, like(layout.pack(call(layout.unpack(z))), z))

        def first(z: Tensor, *theta: Tensor) -> Tensor:
            value = opened(layout.unpack(z), *theta)
            layout.check(value, "z0")
            return displacement(z, layout.pack(value))

        sample_dims = sample_dims_of(opening, args, layout, in_dims)
        return cls.stated(opening, layout, z0, bind, first, sample_dims=sample_dims, recording=recording)

    @classmethod
    def stated(
        cls,
        opening: Opening,
        layout: Layout,
        z0: Any,
        bind: Callable[..., Map],
        first: Callable[..., Tensor],
        *,
        sample_dims: tuple[int | None, ...] | None,
        recording: bool,
    ) -> Problem:
        """The problem of any residual of an opened function.

        `first(z, *theta)` is the residual, too, and checks what f returns. Raises ValueError where f changes z in
        place, or depends on a tracked tensor that is not in theta.
        """
        start, theta = copied(layout.pack(z0)), opening.theta
        checking = loses(recording)
        start = start if recording else start.detach()
        theta = tuple(t.detach() for t in theta) if checking else theta
        # Where lost gradients are checked for, no input requires a gradient, so the result must not either.
        with (
            torch.set_grad_enabled(checking or (recording and torch.is_grad_enabled())),
            told_of_draws(opening.opened.f, () if recording else opening.opened.parts, layout.device),
            nullcontext() if recording or torch.compiler.is_dynamo_compiling() else unhooked(),
        ):
            probe = start if recording else start.clone()  # if f writes into z, the user's z0 must not change
            r0 = watched(lambda z: first(z, *theta), probe)
        if checking:
            refuse_captured(opening, r0, (probe, *theta))
        return cls(opening.opened, layout, bind, start, r0, opening.theta, sample_dims)

    def condition(self, name: str, on_failure: str, relative_to_iterate: bool = False) -> Condition:
        """The condition that the residual vanishes."""
        report = Report(on_failure, self.solution)
        # Under autocast the precision of f limits the tolerances that can be reached, whatever the state's dtype.
        dtype = self.opened.autocast or self.layout.dtype
        return Condition(
            self.bind,
            name,
            dtype,
            report,
            relative_to_iterate=relative_to_iterate,
            sample_dims=self.sample_dims,
            snapshot=self.opened.snapshot,
        )

    @property
    def key(self) -> Hashable:
        """The cache key of a compiled solve: all that it depends on besides tensors. TypeError if not hashable."""
        return self.opened.key(self.opened.f, self.layout)

    def solution(self, found: Found, attached: Tensor | None = None) -> Solution:
        """The `Solution` that the user gets; `attached` `(B, n)` is the found point with its derivative."""
        per_sample = self.layout.per_sample
        return Solution(
            self.layout.unpack(found.z if attached is None else attached),
            per_sample(found.status),
            per_sample(found.residual),
            per_sample(found.steps),
            int(found.evaluations) + 1,
        )


def sample_dims_of(
    opening: Opening, args: tuple[Any, ...], layout: Layout, in_dims: Any
) -> tuple[int | None, ...] | None:
    """For each of theta the dimension that holds the samples, None where it is shared; None if not known.

    `in_dims` are as in `torch.vmap`; raises ValueError where they do not fit the args.
    """
    opened, theta, captured = opening
    shared = (None,) * len(opened.parameters)
    count = len(theta) - len(shared)
    if in_dims is None:
        # No tensor args, and nothing else that might hold one entry per sample: all of theta is shared.
        alone = layout.batch_dims and count == 0 and not captured and not any(True for _ in opened.buffers())
        return shared if alone else None
    if layout.batch_dims == 0:
        raise ValueError(
            "in_dims says which args have one entry per sample, but batch_dims=0 means one system; leave "
            "in_dims out"
        )
    flat = pytree._broadcast_to_and_flatten(
        list(in_dims) if isinstance(in_dims, list) else in_dims, opened.args_spec
    )
    if flat is None:
        raise ValueError(
            f"in_dims={in_dims!r} does not fit the {len(args)} args: pass an int or None for all, or a tuple with "
            "one entry (or a pytree of them) for each"
        )
    tensors = iter(theta)
    dims: list[int | None] = []
    for dim, leaf in zip(flat, pytree.tree_leaves(args)):
        if not isinstance(leaf, Tensor):
            continue
        shape = tuple(next(tensors).shape)
        if dim is not None and not (isinstance(dim, int) and -len(shape) <= dim < len(shape)):
            raise ValueError(f"in_dims is {dim!r} for an arg of shape {shape}, which has no such dimension")
        if dim is not None and shape[dim] != layout.batch:
            raise ValueError(
                f"in_dims is {dim} for an arg of shape {shape}, which must have {layout.batch} entries there, "
                f"one per sample of z0; it has {shape[dim]}"
            )
        dims.append(dim)
    return (*dims, *shared)
