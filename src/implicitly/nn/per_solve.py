"""Modules that decide something once per solve: a dropout mask, a batch statistic, a normalised weight.

An equilibrium or a trajectory exists only if every call of the cell applies the same function. What would change
from call to call, these modules therefore decide in one call of the cell before the solve (`decide_once`), and
hold during the solve. The decision is an explicit argument of the solve, so its gradient is exact, and finished
samples can be dropped. Outside of a `DEQ` or a `NeuralODE` they decide anew in every call, like their counterparts
in `torch.nn`. Only one thread at a time may use a cell that holds such modules.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional


class PerSolve(nn.Module, ABC):
    """Base class of modules that compute their output from their input and something decided once per solve."""

    # The dimension of the decided tensor that holds the samples, or None where it is shared.
    sample_dim: ClassVar[int | None] = None
    held: Tensor

    def __init__(self):
        super().__init__()
        # Empty means that nothing is held. As a buffer it can be exchanged by `functional_call`.
        self.register_buffer("held", torch.empty(0), persistent=False)
        self.recorded: list[Tensor] | None = None

    @abstractmethod
    def decide(self, x: Tensor) -> Tensor | None:
        """What to hold for input `x`; None if there is nothing to decide in this mode."""

    @abstractmethod
    def use(self, x: Tensor, held: Tensor) -> Tensor:
        """The output for input `x` with what is held."""

    @property
    def reads_input(self) -> bool:
        """Whether the decision depends on the values of the input, in this mode."""
        return False

    def check_shared(self, x: Tensor, held: Tensor) -> None:
        """Raise ValueError if one decision cannot serve a second place in the cell, whose input is `x`."""
        if self.reads_input:
            raise ValueError(
                f"a {type(self).__name__} is used twice in a cell, but during a solve it keeps what it computed "
                "from its first input: use a separate module at each place"
            )

    def forward(self, x: Tensor) -> Tensor:
        """The output for input `x`."""
        if self.held.numel():
            return self.use(x, self.held)
        if self.recorded:
            held = self.recorded[0]
            self.check_shared(x, held)
            return self.use(x, held)
        held = self.decide(x)
        if held is None:
            return x
        if self.recorded is not None:
            self.recorded.append(held)
        return self.use(x, held)


def decide_once(cell: nn.Module, *inputs: Any) -> tuple[dict[str, Tensor], dict[str, int | None]]:
    """What the cell's `PerSolve` modules decide in one call at the start, and the sample dimension of each.

    Keys are the buffer names that `functional_call(cell, held, ...)` exchanges. Without such modules the cell is
    not called.

    Args:
        inputs: the arguments of the call: `z0, x` for an equilibrium, `t0, y0, *args` for a trajectory.
    """
    return decided_in(cell, cell, *inputs)[1] if decides(cell) else ({}, {})


def decides(cell: nn.Module) -> bool:
    """Whether the cell holds `PerSolve` modules."""
    return any(isinstance(m, PerSolve) for m in cell.modules())


def decided_in(
    call: Callable[..., Any], cell: nn.Module, *inputs: Any
) -> tuple[Any, tuple[dict[str, Tensor], dict[str, int | None]]]:
    """`call(*inputs)`, which applies modules of the cell, and what these decide, as `decide_once` returns it."""
    modules = {name: m for name, m in cell.named_modules() if isinstance(m, PerSolve)}
    for module in modules.values():
        module.recorded = []
    try:
        value = call(*inputs)
        tensors = {_buffer(name): m.recorded[0] for name, m in modules.items() if m.recorded}
    finally:
        for module in modules.values():
            module.recorded = None
    return value, (tensors, {_buffer(n): m.sample_dim for n, m in modules.items() if _buffer(n) in tensors})


def has_buffers(module: nn.Module) -> bool:
    """Whether `module` has buffers, other than those of `PerSolve` modules, which are known to be of no sample."""
    if isinstance(module, PerSolve):
        return False
    return bool(module._buffers) or any(has_buffers(child) for child in module.children())


def _buffer(name: str) -> str:
    return f"{name}.held" if name else "held"


class Dropout(PerSolve):
    """Dropout with one mask for a whole solve.

    If a cell uses the module at several places, they share the mask. Outside of a `DEQ` or a `NeuralODE` it draws
    a mask in every call.

    Args:
        p: probability that an entry is zeroed; the others are scaled by 1 / (1 - p).
        shared_dims: dimensions along which the mask is constant: `(1,)` gives variational dropout of sequences
            `(B, T, C)` (Gal and Ghahramani 2016), `(2, 3)` drops whole channels of images. Negative ones count
            from the end.
    """

    sample_dim: ClassVar[int | None] = 0

    def __init__(self, p: float = 0.5, shared_dims: tuple[int, ...] = ()):
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"Dropout: p must be in [0, 1), got {p}")
        if 0 in shared_dims:
            raise ValueError(
                "Dropout: shared_dims must not contain dimension 0, the samples, as each sample has its own mask"
            )
        self.p = p
        self.shared_dims = shared_dims

    @property
    def draws(self) -> bool:
        """Whether calls in training mode draw a mask, unless one is held."""
        return self.p > 0

    def decide(self, x: Tensor) -> Tensor | None:
        """The scaled mask for `x`."""
        if not self.training or self.p == 0:
            return None
        if any(not -x.ndim < d < x.ndim for d in self.shared_dims):
            raise ValueError(
                f"Dropout: shared_dims={self.shared_dims} must be dimensions of the input other than 0, which "
                f"holds the samples; the input has shape {tuple(x.shape)}"
            )
        shared = {d % x.ndim for d in self.shared_dims}
        shape = [1 if d in shared else size for d, size in enumerate(x.shape)]
        keep = torch.full(shape, 1 - self.p, dtype=x.dtype, device=x.device)
        return torch.bernoulli(keep) / keep

    def check_shared(self, x: Tensor, held: Tensor) -> None:
        """Raise ValueError if the mask does not fit `x`."""
        fits = held.ndim == x.ndim and all(m in (1, size) for m, size in zip(held.shape, x.shape))
        if not fits:
            raise ValueError(
                f"a Dropout is used twice in a cell: its mask for this solve has shape {tuple(held.shape)}, from "
                f"the first place, but the input at the second has shape {tuple(x.shape)}: use a separate "
                "Dropout at each place"
            )

    def use(self, x: Tensor, held: Tensor) -> Tensor:
        """`x` masked."""
        return x * held


class BatchNorm(PerSolve):
    """Batch normalisation whose batch statistics are computed once per solve, at its start.

    With the statistics held, samples are independent during the solve, as the solvers require. Running statistics
    are updated once per solve. They are used in evaluation mode, and for an empty batch, which has no statistics.
    Outside of a `DEQ` or a `NeuralODE`, statistics are computed in every call.

    Args:
        features: size of dimension 1 of the input.
        eps: added to the variance, so that a constant feature is not divided by 0.
        momentum: weight of the newest statistics in the running ones.
    """

    def __init__(self, features: int, eps: float = 1e-5, momentum: float = 0.1):
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.ones(features))
        self.bias = nn.Parameter(torch.zeros(features))
        self.running_mean: Tensor
        self.running_var: Tensor
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_var", torch.ones(features))

    def decide(self, x: Tensor) -> Tensor | None:
        """Mean and variance `(2, features)` in the dtype of the running ones, even under autocast."""
        if not self.training or x.numel() == 0:
            return torch.stack([self.running_mean, self.running_var])
        dims = [d for d in range(x.ndim) if d != 1]
        variance, mean = torch.var_mean(x.to(self.running_mean.dtype), dims, correction=0)
        with torch.no_grad():
            count = x.numel() / x.shape[1]
            # Not `lerp_`, which vmap knows only as a slow loop, with a warning.
            self.running_mean += self.momentum * (mean.detach() - self.running_mean)
            unbiased = variance.detach() * count / max(count - 1, 1)
            self.running_var += self.momentum * (unbiased - self.running_var)
        return torch.stack([mean, variance])

    @property
    def reads_input(self) -> bool:
        """Whether it computes batch statistics."""
        return self.training

    def use(self, x: Tensor, held: Tensor) -> Tensor:
        """`x` normalised, scaled and shifted."""
        # Written out, since torch's batch norm has no derivative with respect to statistics that it is given.
        mean, variance = held
        scale = self.weight * (variance + self.eps).rsqrt()
        shift = self.bias - mean * scale
        shape = (-1, *([1] * (x.ndim - 2)))
        return torch.addcmul(shift.reshape(shape), x, scale.reshape(shape)).to(x.dtype)


class _Reparametrised(PerSolve):
    """A layer whose weight is computed once per solve."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        weight = getattr(layer, "weight", None)
        if not isinstance(weight, nn.Parameter):
            raise TypeError(f"{type(self).__name__} needs a layer with a weight, got {type(layer).__name__}")
        if weight.ndim < 2:
            raise ValueError(
                f"{type(self).__name__} needs a layer whose weight is a matrix or has more dimensions, as that of "
                f"nn.Linear; that of this {type(layer).__name__} has shape {tuple(weight.shape)}"
            )
        del layer.weight
        # A placeholder for the computed weight, which is never stored.
        layer.register_buffer("weight", torch.zeros_like(weight), persistent=False)
        self.layer = layer

    def use(self, x: Tensor, held: Tensor) -> Tensor:
        """The layer's output with weight `held`."""
        return functional_call(self.layer, {"weight": held}, (x,))


class WeightNorm(_Reparametrised):
    """Weight normalisation: a layer with the weight g v / |v|, normed over all dimensions but 0.

    Salimans and Kingma 2016.

    Args:
        layer: a layer with a parameter `weight` of at least two dimensions, such as `nn.Linear` or `nn.Conv2d`.

    Raises:
        TypeError, ValueError: for a layer without such a weight.
    """

    def __init__(self, layer: nn.Module):
        weight = getattr(layer, "weight", None)
        super().__init__(layer)
        assert isinstance(weight, Tensor)
        self.direction = nn.Parameter(weight.detach().clone())
        self.gain = nn.Parameter(torch.linalg.vector_norm(weight.detach().flatten(1), dim=1))

    def decide(self, x: Tensor) -> Tensor | None:
        """The weight."""
        shape = (-1, *([1] * (self.direction.ndim - 1)))
        length = torch.linalg.vector_norm(self.direction.flatten(1), dim=1)
        return self.direction * (self.gain / length).reshape(shape)


class SpectralNorm(_Reparametrised):
    """Spectral normalisation: a layer with the weight `bound` W / sigma(W).

    The spectral norm sigma is estimated by power iteration once per solve (Miyato et al. 2018).

    Args:
        layer: a layer with a parameter `weight` of at least two dimensions, such as `nn.Linear` or `nn.Conv2d`.
        bound: the spectral norm of the resulting weight, as a matrix `(out, -1)`.
        power_iterations: number per solve in training mode; each solve continues from the estimate of the last.

    Raises:
        TypeError, ValueError: for a layer without such a weight, `bound <= 0` or `power_iterations < 1`.
    """

    u: Tensor

    def __init__(self, layer: nn.Module, bound: float = 1.0, power_iterations: int = 1):
        if bound <= 0 or power_iterations < 1:
            raise ValueError(
                f"SpectralNorm: must have bound > 0 and power_iterations >= 1, got {bound}, {power_iterations}"
            )
        weight = getattr(layer, "weight", None)
        super().__init__(layer)
        assert isinstance(weight, Tensor)
        self.bound, self.power_iterations = bound, power_iterations
        self.raw = nn.Parameter(weight.detach().clone())
        matrix = self.raw.detach().flatten(1)
        # Start from a random vector, which no structure of the weight makes orthogonal to its leading direction,
        # without drawing from the global generator; then take enough steps to be near that direction.
        start = torch.randn(len(matrix), generator=torch.Generator().manual_seed(0), device="cpu").to(matrix)
        self.register_buffer("u", _power(matrix, start, 15))

    def decide(self, x: Tensor) -> Tensor | None:
        """The weight."""
        matrix = self.raw.flatten(1)
        with torch.autocast(matrix.device.type, enabled=False):
            with torch.no_grad():
                if self.training:
                    self.u.copy_(_power(matrix.detach(), self.u, self.power_iterations))
                u = self.u.clone()
                v = functional.normalize(matrix.detach().mT @ u, dim=0)
            return self.raw * (self.bound / torch.dot(u, matrix @ v))


def _power(matrix: Tensor, u: Tensor, steps: int) -> Tensor:
    for _ in range(steps):
        u = functional.normalize(matrix @ (matrix.mT @ u), dim=0)
    return u
