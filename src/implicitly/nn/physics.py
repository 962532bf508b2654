"""Vector fields of mechanics, derived from a scalar function such as a network: a Hamiltonian or a Lagrangian."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad, vjp, vmap
from torch.utils import _pytree as pytree

from implicitly.tree import LOW_PRECISION


class HamiltonianField(nn.Module):
    """Hamiltonian dynamics: dq/dt = dH/dp, dp/dt = -dH/dq, so that H stays constant along the motion.

    It is a vector field for `odeint`, with either value of `batch_dims`. Its parameters are those of H. It can be
    differentiated to any order, so H can be trained through a trajectory. A state may also be a pair (q, p) of
    tensors `(..., n)`, as symplectic methods such as `Leapfrog` need; these methods require H = T(p) + V(q).

    Args:
        hamiltonian: `hamiltonian(y, *args)` maps states `(..., 2n)`, coordinates q followed by canonical momenta
            p, to energies `(...)` or `(..., 1)`, each state independently. A network needs a smooth activation,
            such as tanh or softplus.

    Source: Greydanus, Dzamba and Yosinski, "Hamiltonian Neural Networks", NeurIPS 2019.
    """

    def __init__(self, hamiltonian: Callable[..., Tensor]):
        super().__init__()
        self.hamiltonian = hamiltonian

    def forward(self, t: Any, y: Any, *args: Any) -> Any:
        """(dq/dt, dp/dt) at `y`, `(..., 2n)` or a pair, in the form of `y`; t is not used.

        Raises:
            ValueError: y cannot be split in two, or the energy is not one number per state.
        """
        state = _joined(y)
        _check_state(state, "a coordinate q and a momentum p")
        slope = grad(lambda y: self.energy(y, *args).sum())(state)
        dq, dp = slope.chunk(2, dim=-1)
        if isinstance(y, Tensor):
            return torch.cat([dp, -dq], dim=-1)
        return pytree.tree_unflatten([dp, -dq], pytree.tree_structure(y))

    def energy(self, y: Any, *args: Any) -> Tensor:
        """H `(...)` at `y`, `(..., 2n)` or a pair."""
        state = _joined(y)
        return _scalar(self.hamiltonian(state, *args), state, "hamiltonian")


class LagrangianField(nn.Module):
    """Lagrangian dynamics: dq/dt = v, and dv/dt from the Euler-Lagrange equation d/dt dL/dv = dL/dq.

    That is M dv/dt = dL/dq - (d2L/dv dq) v with M = d2L/dv2. It is a vector field for `odeint`, with either value
    of `batch_dims`. Its parameters are those of L. It needs no canonical momenta: states are coordinates and their
    velocities. Where M is singular, the acceleration is NaN, which `odeint` reports as `Status.NON_FINITE`.

    Args:
        lagrangian: `lagrangian(y, *args)` maps states `(..., 2n)`, coordinates q followed by velocities v, to
            `(...)` or `(..., 1)`, each state independently. A network needs an activation with second derivatives,
            such as softplus or tanh; those of ReLU are zero.

    Source: Cranmer, Greydanus, Hoyer, Battaglia, Spergel and Ho, "Lagrangian Neural Networks", 2020, equation 6; a
    linear solve replaces their pseudo-inverse.
    """

    def __init__(self, lagrangian: Callable[..., Tensor]):
        super().__init__()
        self.lagrangian = lagrangian

    def forward(self, t: Any, y: Tensor, *args: Any) -> Tensor:
        """(dq/dt, dv/dt) at `y` `(..., 2n)`; t is not used.

        Raises:
            ValueError: y cannot be split in two, or L is not one number per state.
        """
        _check_state(y, "a coordinate q and a velocity v")
        velocity = y.chunk(2, dim=-1)[1]
        n = velocity.shape[-1]
        slope, pull = vjp(lambda y: self._slope(y, *args), y)[:2]
        # Row i of the Jacobian of p = dL/dv (the second half of the slope): the derivative of p_i by q and v.
        directions = torch.eye(2 * n, dtype=y.dtype, device=y.device)[n:].reshape(
            n, *(1 for _ in y.shape[:-1]), 2 * n
        )
        (rows,) = vmap(pull)(directions.expand(n, *y.shape))
        mixed, mass = rows.movedim(0, -2).chunk(2, dim=-1)
        force = slope.chunk(2, dim=-1)[0]
        right = force - (mixed @ velocity.unsqueeze(-1)).squeeze(-1)
        wide = torch.float32 if mass.dtype in LOW_PRECISION else mass.dtype  # as the linear solve needs
        acceleration, singular = torch.linalg.solve_ex(mass.to(wide), right.unsqueeze(-1).to(wide))
        acceleration = torch.where(singular[..., None] != 0, float("nan"), acceleration.squeeze(-1))
        return torch.cat([velocity, acceleration.to(y.dtype)], dim=-1)

    def momentum(self, y: Tensor, *args: Any) -> Tensor:
        """The canonical momenta p = dL/dv `(..., n)` at `y` `(..., 2n)`."""
        return self._slope(y, *args).chunk(2, dim=-1)[1]

    def energy(self, y: Tensor, *args: Any) -> Tensor:
        """The energy p v - L `(...)` at `y` `(..., 2n)`, which stays constant along the motion."""
        velocity = y.chunk(2, dim=-1)[1]
        return (self.momentum(y, *args) * velocity).sum(-1) - self._value(y, *args)

    def _value(self, y: Tensor, *args: Any) -> Tensor:
        return _scalar(self.lagrangian(y, *args), y, "lagrangian")

    def _slope(self, y: Tensor, *args: Any) -> Tensor:
        """(dL/dq, dL/dv) `(..., 2n)`."""
        return grad(lambda y: self._value(y, *args).sum())(y)


def _joined(y: Any) -> Tensor:
    """`y`, or the tensors of a pair (q, p) concatenated; raises ValueError for anything else."""
    if isinstance(y, Tensor):
        return y
    flat = pytree.tree_leaves(y)
    if len(flat) != 2 or not all(isinstance(x, Tensor) and x.ndim for x in flat) or flat[0].shape != flat[1].shape:
        shapes = [tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__ for x in flat]
        raise ValueError(f"y must be a tensor (..., 2n), or a pair (q, p) of tensors (..., n), got {shapes}")
    return torch.cat(flat, dim=-1)


def _check_state(y: Tensor, pairs: str) -> None:
    if y.ndim == 0 or y.shape[-1] == 0 or y.shape[-1] % 2:
        raise ValueError(
            f"the last dimension of y must hold {pairs} for each degree of freedom, an even number of components; "
            f"got the shape {tuple(y.shape)}"
        )


def _scalar(value: Tensor, y: Tensor, name: str) -> Tensor:
    """The `value` `(...)` or `(..., 1)` of states `y` `(..., 2n)`, reshaped to `(...)`."""
    batch = y.shape[:-1]
    if value.shape == (*batch, 1):
        return value.squeeze(-1)
    if value.shape != batch:
        raise ValueError(
            f"{name} must return one number per state, of shape {tuple(batch)} or {(*batch, 1)} for states of "
            f"shape {tuple(y.shape)}; got {tuple(value.shape)}. Sum over the other dimensions"
        )
    return value
