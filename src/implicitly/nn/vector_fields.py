"""Networks as vector fields f(t, y): without time, with time as an input, with time as a gate.

The time t is as `odeint` passes it: 0-d, or `(B, 1, ..., 1)` if each sample has its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Autonomous(nn.Module):
    """f(t, y) = net(y): the same field at all times."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, t: Tensor, y: Any, *args: Any) -> Any:
        """`net(y, *args)`."""
        return self.net(y, *args)


class ConcatTime(nn.Module):
    """f(t, y) = net([y, t]): time is one more feature or channel of the net's input.

    Args:
        net: takes one more feature than y has, such as `nn.Linear(3, 2)` for a y of 2 features.
        dim: the dimension of y that holds the features; 1 fits `(B, n)` and images `(B, C, H, W)`, -1 sequences
            `(B, L, n)`.
    """

    def __init__(self, net: nn.Module, dim: int = 1):
        super().__init__()
        self.net = net
        self.dim = dim

    def forward(self, t: Tensor, y: Tensor, *args: Any) -> Tensor:
        """`net([y, t], *args)`."""
        shape = list(y.shape)
        if not -y.ndim <= self.dim < y.ndim:
            raise ValueError(
                f"ConcatTime: y of shape {tuple(shape)} has no dimension {self.dim} to which time can be added; "
                "pass ConcatTime(net, dim=-1) for features that come last"
            )
        shape[self.dim] = 1
        return self.net(torch.cat([y, t.to(y.dtype).expand(shape)], dim=self.dim), *args)

    def extra_repr(self) -> str:
        """The dimension that time is appended to."""
        return f"dim={self.dim}"


class GatedTime(nn.Module):
    """A layer gated by time: layer(y) * sigmoid(gate(t)) + bias(t), feature by feature.

    The gate is affine and the bias linear in t. This is the "concatsquash" layer of the code of Grathwohl et al.,
    "FFJORD", ICLR 2019.

    Args:
        layer: has `out_features` or `out_channels`, such as `nn.Linear` or `nn.Conv2d`.
    """

    def __init__(self, layer: nn.Module):
        super().__init__()
        channels = getattr(layer, "out_channels", None)
        features = getattr(layer, "out_features", channels)
        if not isinstance(features, int):
            raise TypeError(
                f"GatedTime needs a layer with out_features or out_channels, got a {type(layer).__name__}"
            )
        self.layer = layer
        self.dim = -1 if channels is None else 1
        self.gate = nn.Linear(1, features)
        self.bias = nn.Linear(1, features, bias=False)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        """The gated output of the layer."""
        value = self.layer(y)
        times = t.reshape(-1, 1).to(self.gate.weight.dtype)
        shape = [1] * value.ndim
        shape[0] = len(times)
        shape[self.dim] = value.shape[self.dim]
        return value * torch.sigmoid(self.gate(times)).reshape(shape) + self.bias(times).reshape(shape)


class TimeSequential(nn.Sequential):
    """A chain of modules: `ConcatTime`, `GatedTime`, `Autonomous` and chains like it get (t, y), others only y."""

    def forward(self, t: Tensor, y: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The output of the last module."""
        timed = (ConcatTime, GatedTime, Autonomous, TimeSequential)
        for module in self:
            y = module(t, y) if isinstance(module, timed) else module(y)
        return y
