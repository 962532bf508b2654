"""Two theorems of deep equilibrium models, as code.

Any feed-forward network is one equilibrium layer, and two stacked equilibrium layers are one. (Bai, Kolter and
Koltun 2019, theorems 1 and 2; chapter 4 of the NeurIPS 2020 tutorial "Deep Implicit Layers".)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from implicitly.fixed_point.adjoints import ImplicitAdjoint
from implicitly.fixed_point.picard import FixedPointIteration
from implicitly.linear import Neumann
from implicitly.nn.deq import DEQ


def as_deq(sequential: nn.Sequential) -> DEQ:
    """One equilibrium layer that computes what `sequential` computes, with the same parameters.

    The state is what all layers put out, z = (z_1, ..., z_L), and the cell applies every layer at once to what
    its predecessor put out the last time: (l_1(x), l_2(z_1), ..., l_L(z_L-1)). Its Jacobian is nilpotent, so
    plain iteration is exact after L steps from anywhere, and so is the Neumann series of the backward solve.
    Layers must treat samples independently.
    """
    if not isinstance(sequential, nn.Sequential) or len(sequential) == 0:
        raise TypeError(f"as_deq needs an nn.Sequential with at least one layer, got {sequential!r}")
    depth = len(sequential)
    return DEQ(
        _AllLayers(sequential),
        FixedPointIteration(max_steps=depth + 1),
        ImplicitAdjoint(Neumann(max_steps=depth + 1)),
        init=_Outputs(sequential),
        readout=_last,
    )


def compose(first: DEQ, second: DEQ) -> DEQ:
    """One equilibrium layer that computes `second(first(x))`, with the parameters of both.

    The state is (z_1, z_2) and the cell (f_1(z_1, x), f_2(z_2, z_1)): at its equilibrium both hold. It is solved
    as `second` is.
    """

    def init(x: Any) -> Any:
        z1 = first.init(x)
        return z1, second.init(first.readout(z1))

    return DEQ(
        _Stacked(first, second),
        second.solver,
        second.adjoint,
        batch_dims=min(first.batch_dims, second.batch_dims),
        on_failure=second.on_failure,
        compile=second.compile_solve,
        init=init,
        readout=lambda z: second.readout(z[1]),
    )


class _AllLayers(nn.Module):
    def __init__(self, sequential: nn.Sequential):
        super().__init__()
        self.layers = sequential

    def forward(self, z: tuple[Tensor, ...], x: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(before) for layer, before in zip(self.layers, (x, *z[:-1])))


class _Outputs:
    """Zeros of the shape of what each layer puts out, found on the meta device, where nothing is computed."""

    def __init__(self, sequential: nn.Sequential):
        self.sequential = sequential

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        shapeless, zeros = x.detach().to("meta"), []
        for layer in self.sequential:
            state = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
            shapeless = functional_call(layer, {k: v.detach().to("meta") for k, v in state.items()}, (shapeless,))
            zeros.append(torch.zeros(shapeless.shape, dtype=shapeless.dtype, device=x.device))
        return tuple(zeros)


def _last(z: tuple[Tensor, ...]) -> Tensor:
    return z[-1]


class _Stacked(nn.Module):
    def __init__(self, first: DEQ, second: DEQ):
        super().__init__()
        self.first, self.second = first.cell, second.cell
        self.read = first.readout

    def forward(self, z: tuple[Any, Any], x: Any) -> tuple[Any, Any]:
        return self.first(z[0], x), self.second(z[1], self.read(z[0]))
