"""Vector fields of mechanics: the motion that a scalar, such as a network, is the energy or the Lagrangian of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad, vjp, vmap

from implicitly.tree import LOW_PRECISION


class HamiltonianField(nn.Module):
    """dq/dt = dH/dp, dp/dt = -dH/dq: whatever H is, it stays constant along the motion.

    A vector field for `odeint`, alike with `batch_dims` 0 and 1. Its parameters are those of H. Derivatives of any
    order go through it, so that H may be trained through a trajectory.

    Args:
        hamiltonian: `hamiltonian(y, *args)` maps states `(..., 2n)`, coordinates q before canonical momenta p, to
            energies `(...)` or `(..., 1)`, each state by itself. A network needs a smooth activation, such as
            tanh or softplus.

    Source: Greydanus, Dzamba and Yosinski, "Hamiltonian Neural Networks", NeurIPS 2019.
    """

    def __init__(self, hamiltonian: Callable[..., Tensor]):
        super().__init__()
        self.hamiltonian = hamiltonian

    def forward(self, t: Any, y: Tensor, *args: Any) -> Tensor:
        """(dq/dt, dp/dt) at `y` `(..., 2n)`; t counts for nothing.

        Raises:
            ValueError: y cannot be split in two, or the energy is not one number a state.
        """
        _check_state(y, "a coordinate q and a momentum p")
        slope = grad(lambda y: self.energy(y, *args).sum())(y)
        dq, dp = slope.chunk(2, dim=-1)
        return torch.cat([dp, -dq], dim=-1)

    def energy(self, y: Tensor, *args: Any) -> Tensor:
        """H `(...)` at `y` `(..., 2n)`."""
        return _scalar(self.hamiltonian(y, *args), y, "hamiltonian")


class LagrangianField(nn.Module):
    """dq/dt = v, and dv/dt from d/dt dL/dv = dL/dq: M dv/dt = dL/dq - (d2L/dv dq) v with M = d2L/dv2.

    A vector field for `odeint`, alike with `batch_dims` 0 and 1. Its parameters are those of L. It needs no
    canonical momenta: states are coordinates and their velocities. Where M is singular the acceleration is NaN,
    which `odeint` reports as `Status.NON_FINITE`.

    Args:
        lagrangian: `lagrangian(y, *args)` maps states `(..., 2n)`, coordinates q before velocities v, to `(...)`
            or `(..., 1)`, each state by itself. A network needs an activation with second derivatives, such as
            softplus or tanh; those of ReLU are zero.

    Source: Cranmer, Greydanus, Hoyer, Battaglia, Spergel and Ho, "Lagrangian Neural Networks", 2020, equation 6; a
    solve stands for their pseudo-inverse.
    """

    def __init__(self, lagrangian: Callable[..., Tensor]):
        super().__init__()
        self.lagrangian = lagrangian

    def forward(self, t: Any, y: Tensor, *args: Any) -> Tensor:
        """(dq/dt, dv/dt) at `y` `(..., 2n)`; t counts for nothing.

        Raises:
            ValueError: y cannot be split in two, or L is not one number a state.
        """
        _check_state(y, "a coordinate q and a velocity v")
        velocity = y.chunk(2, dim=-1)[1]
        n = velocity.shape[-1]
        slope, pull = vjp(lambda y: self._slope(y, *args), y)[:2]
        # Row i of the Jacobian of p = dL/dv, the second half of the slope: how p_i depends on q and v.
        directions = torch.eye(2 * n, dtype=y.dtype, device=y.device)[n:].reshape(
            n, *(1 for _ in y.shape[:-1]), 2 * n
        )
        (rows,) = vmap(pull)(directions.expand(n, *y.shape))
        mixed, mass = rows.movedim(0, -2).chunk(2, dim=-1)
        force = slope.chunk(2, dim=-1)[0]
        right = force - (mixed @ velocity.unsqueeze(-1)).squeeze(-1)
        wide = torch.float32 if mass.dtype in LOW_PRECISION else mass.dtype  # as a solve needs it
        acceleration, singular = torch.linalg.solve_ex(mass.to(wide), right.unsqueeze(-1).to(wide))
        acceleration = torch.where(singular[..., None] != 0, float("nan"), acceleration.squeeze(-1))
        return torch.cat([velocity, acceleration.to(y.dtype)], dim=-1)

    def momentum(self, y: Tensor, *args: Any) -> Tensor:
        """The canonical momenta p = dL/dv `(..., n)` at `y` `(..., 2n)`."""
        return self._slope(y, *args).chunk(2, dim=-1)[1]

    def energy(self, y: Tensor, *args: Any) -> Tensor:
        """p v - L `(...)` at `y` `(..., 2n)`, which stays constant along the motion."""
        velocity = y.chunk(2, dim=-1)[1]
        return (self.momentum(y, *args) * velocity).sum(-1) - self._value(y, *args)

    def _value(self, y: Tensor, *args: Any) -> Tensor:
        return _scalar(self.lagrangian(y, *args), y, "lagrangian")

    def _slope(self, y: Tensor, *args: Any) -> Tensor:
        """(dL/dq, dL/dv) `(..., 2n)`."""
        return grad(lambda y: self._value(y, *args).sum())(y)


def _check_state(y: Tensor, pairs: str) -> None:
    if y.ndim == 0 or y.shape[-1] == 0 or y.shape[-1] % 2:
        raise ValueError(
            f"the last dimension of y must hold {pairs} for each degree of freedom, an even number of components; "
            f"got the shape {tuple(y.shape)}"
        )


def _scalar(value: Tensor, y: Tensor, name: str) -> Tensor:
    """`value` `(...)` or `(..., 1)` of states `y` `(..., 2n)`, as `(...)`."""
    batch = y.shape[:-1]
    if value.shape == (*batch, 1):
        return value.squeeze(-1)
    if value.shape != batch:
        raise ValueError(
            f"{name} must return one number a state, of shape {tuple(batch)} or {(*batch, 1)} for states of shape "
            f"{tuple(y.shape)}; got {tuple(value.shape)}. Sum over the other dimensions"
        )
    return value
