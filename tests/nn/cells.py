"""Cells that the tests of layers share; all of them contractions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from implicitly import nn as inn


class Dense(nn.Module):
    """tanh(W z + b + x) with |W| = norm."""

    def __init__(self, n: int = 4, norm: float = 0.6):
        super().__init__()
        self.linear = nn.Linear(n, n)
        with torch.no_grad():
            self.linear.weight.mul_(norm / torch.linalg.matrix_norm(self.linear.weight, 2))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(z) + x)


class Conv(nn.Module):
    """A convolution and group norm."""

    def __init__(self, channels: int = 4):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.GroupNorm(2, channels)
        nn.init.constant_(self.norm.weight, 0.3)
        nn.init.normal_(self.conv.weight, std=0.05)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.norm(self.conv(z) + x))


class Tree(nn.Module):
    """Two tensors that see each other, driven by two others."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 2), nn.Linear(2, 3)

    def forward(self, z: dict[str, Tensor], x: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        return {"p": 0.5 * torch.tanh(self.b(z["q"]) + x[0]), "q": 0.5 * torch.sin(self.a(z["p"]) + x[1])}


class Around(nn.Module):
    """0.4 tanh(module(W z + x)): `module` decides something."""

    def __init__(self, module: nn.Module, n: int = 4):
        super().__init__()
        self.linear, self.module = nn.Linear(n, n), module

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return 0.4 * torch.tanh(self.module(self.linear(0.5 * z) + x))


class Weighted(nn.Module):
    """0.7 tanh(layer(z) + x), the layer reparametrised."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return 0.7 * torch.tanh(self.layer(z) + x)


PER_SOLVE = {
    "dropout": lambda: Around(inn.Dropout(0.4)),
    "batch_norm": lambda: Around(inn.BatchNorm(4)),
    "weight_norm": lambda: Weighted(inn.WeightNorm(contracting(nn.Linear(4, 4)))),
    "spectral_norm": lambda: Weighted(inn.SpectralNorm(nn.Linear(4, 4))),
}


def contracting(layer: nn.Linear, norm: float = 0.6) -> nn.Linear:
    with torch.no_grad():
        layer.weight.mul_(norm / torch.linalg.matrix_norm(layer.weight, 2))
    return layer


def iterated(f, z: Tensor, steps: int = 200) -> Tensor:
    """The equilibrium by plain iterations that autograd records."""
    for _ in range(steps):
        z = f(z)
    return z


def gradients(output: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Gradients of one fixed, generic function of `output`."""
    weight = torch.linspace(-1, 2, output.numel(), dtype=output.dtype).reshape(output.shape)
    return torch.autograd.grad((output * weight).sin().sum(), inputs)
