"""Two theorems of deep equilibrium models, as code.

Any feed-forward network is one equilibrium layer, and two stacked equilibrium layers are one. (Bai, Kolter and
Koltun 2019, theorems 1 and 2; chapter 4 of the NeurIPS 2020 tutorial "Deep Implicit Layers".)
"""

from __future__ import annotations

from dataclasses import replace
from functools import reduce
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from implicitly.adjoints import Adjoint, ImplicitAdjoint
from implicitly.fixed_point.picard import FixedPointIteration
from implicitly.iterate import Solver
from implicitly.linear import Neumann
from implicitly.nn.deq import DEQ, StartingCell, begin
from implicitly.nn.per_solve import PerSolve


def as_deq(sequential: nn.Sequential, *, compile: bool = False) -> DEQ:
    """One equilibrium layer that computes what `sequential` computes, with the same parameters.

    The state consists of the outputs of all layers, z = (z_1, ..., z_L). The cell applies every layer at once, to
    the last output of its predecessor: (l_1(x), l_2(z_1), ..., l_L(z_L-1)). Its Jacobian is nilpotent, so plain
    iteration is exact after L steps from any state that the layers are defined at, and so is the Neumann series of
    the backward solve. Exactly L steps are taken, and the status is MAX_STEPS: a tolerance relative to the whole
    state would stop before a small output, or a vanishing gradient, is right.

    The solve starts from the outputs of the layers applied one after the other. So they see the same inputs as in
    `sequential`, and a `BatchNorm` of this package takes the same statistics. This costs one more pass, besides
    the L steps. Other layers must be deterministic.

    Args:
        sequential: the layers, at least one; each maps a tensor `(B, ...)` to a tensor `(B, ...)`.
        compile: as in `implicitly.fixed_point`.

    Returns:
        A `DEQ` whose output is that of the last layer.

    Raises:
        TypeError: `sequential` is not an `nn.Sequential`, or is empty.
    """
    if not isinstance(sequential, nn.Sequential) or len(sequential) == 0:
        raise TypeError(f"as_deq needs an nn.Sequential with at least one layer, got {sequential!r}")
    depth, cell = len(sequential), _AllLayers(sequential)
    return DEQ(
        cell,
        FixedPointIteration(rtol=0, max_steps=depth),
        ImplicitAdjoint(Neumann(rtol=0, max_steps=depth)),
        compile=compile,
        init=cell.begin,
        readout=_last,
    )


def compose(first: DEQ, second: DEQ) -> DEQ:
    """One equilibrium layer that computes `second(first(x))`, with the parameters of both.

    The state is (z_1, z_2) and the cell is (f_1(z_1, x), f_2(z_2, z_1)): at its equilibrium both layers are at
    theirs. It is solved with the solver and adjoint of `second`; but if `second` takes a fixed number of steps
    (`rtol=0`, as from `as_deq`) and `first` does not, with those of `first`. Its `max_steps` is the sum of both.
    It has no warm start.

    Args:
        first, second: the layers, applied in this order. The result shares their parameters, and takes
            `on_failure` and `compile` from `second`; those of `first` have no effect. With `batch_dims=0` in
            either layer, the whole batch is one system.

    Returns:
        A `DEQ` whose input x is that of `first`, and whose output has the form of the output of `second`.

    Raises:
        TypeError: one is not a DEQ.
        ValueError: in a forward pass, if `second` takes statistics (`BatchNorm`) of the output of `first`, which
            is not known at the start, unless `as_deq` made `first`.
    """
    for name, layer in (("first", first), ("second", second)):
        if not isinstance(layer, DEQ):
            raise TypeError(
                f"compose: {name} must be a DEQ, got a {type(layer).__name__}; as_deq(nn.Sequential(...)) makes "
                "one of feed-forward layers"
            )
    cell = _Stacked(first, second)
    lead = first if second.solver.fixed_steps and not first.solver.fixed_steps else second
    return DEQ(
        cell,
        _with_steps_of_both(lead.solver, first, second),
        _differentiating_both(lead.adjoint, first, second),
        batch_dims=min(first.batch_dims, second.batch_dims),
        on_failure=second.on_failure,
        compile=second.compile_solve,
        init=cell.begin,
        readout=cell.output,
    )


def _with_steps_of_both(solver: Solver, first: DEQ, second: DEQ) -> Solver:
    return replace(solver, max_steps=first.solver.max_steps + second.solver.max_steps)


def _differentiating_both(adjoint: Adjoint, first: DEQ, second: DEQ) -> Adjoint:
    adjoints = [a for a in (first.adjoint, second.adjoint) if isinstance(a, ImplicitAdjoint)]
    if len(adjoints) < 2:
        return adjoint
    return replace(adjoint, max_steps=sum(a.max_steps or a.linear_solver.max_steps for a in adjoints))


class _AllLayers(StartingCell):
    def __init__(self, sequential: nn.Sequential):
        super().__init__()
        self.layers = sequential

    def forward(self, z: tuple[Tensor, ...], x: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(before) for layer, before in zip(self.layers, (x, *z[:-1])))

    def begin(self, x: Tensor) -> tuple[Tensor, ...]:
        """The outputs of the layers applied one after the other: the equilibrium."""
        _, *outputs = accumulate(self.layers, lambda z, layer: layer(z), initial=x)
        if torch.is_autocast_enabled(x.device.type):  # there each layer chooses a dtype, but a state has one
            widest = reduce(torch.promote_types, (z.dtype for z in (x, *outputs)))
            outputs = [z.to(widest) for z in outputs]
        return tuple(outputs)


def _last(z: tuple[Tensor, ...]) -> Tensor:
    return z[-1]


class _Stacked(StartingCell):
    def __init__(self, first: DEQ, second: DEQ):
        super().__init__()
        self.first, self.second = first.cell, second.cell
        self.inits = first.init, second.init
        self.readouts = first.readout, second.readout

    def forward(self, z: tuple[Any, Any], x: Any) -> tuple[Any, Any]:
        return self.first(z[0], x), self.second(z[1], self.readouts[0](z[0]))

    def begin(self, x: Any) -> tuple[Any, Any]:
        """The starts of both layers."""
        if not _starts_at_equilibrium(self.first) and any(
            isinstance(m, PerSolve) and m.reads_input for m in self.second.modules()
        ):
            raise ValueError(
                "compose: the second layer computes batch statistics (BatchNorm) of the output of the first, "
                "which is not known at the start of the joint solve: apply the layers one after the other, or "
                "evaluate with layer.eval()"
            )
        z1 = begin(self.first, self.inits[0], x)
        return z1, begin(self.second, self.inits[1], self.readouts[0](z1))

    def output(self, z: tuple[Any, Any]) -> Any:
        return self.readouts[1](z[1])


def _starts_at_equilibrium(cell: nn.Module) -> bool:
    """Whether the cell's own start is its equilibrium, so that everything is decided at the solution."""
    if isinstance(cell, _Stacked):
        return _starts_at_equilibrium(cell.first) and _starts_at_equilibrium(cell.second)
    return isinstance(cell, _AllLayers)
