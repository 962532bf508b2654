"""Find modules that make f a different function in each call, while a solver assumes one function throughout."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from implicitly.condition import users_line
from implicitly.host import captured


class PerCallWarning(UserWarning):
    """f holds a module that makes it a different function in each call."""


def drops_out(module: nn.Module) -> bool:
    """Whether `module`, when in training mode, draws random numbers in each call, such as a dropout mask."""
    if isinstance(module, _DropoutNd):
        return module.p > 0
    if isinstance(module, nn.MultiheadAttention | nn.RNNBase):
        return module.dropout > 0
    if isinstance(module, nn.RReLU):  # its slopes are drawn
        return module.lower < module.upper
    return hasattr(type(module), "draws") and bool(module.draws)  # a failed lookup on an instance takes long


def any_drops_out(modules: Iterable[nn.Module]) -> bool:
    """Whether any of the modules is in training mode and drops out."""
    return any(module.training and drops_out(module) for module in modules)


def told_of_draws(
    f: Callable[..., Any], parts: Sequence[nn.Module], device: torch.device
) -> AbstractContextManager[None]:
    """A context that warns if f draws random numbers in it, while modules it may use, its `parts`, drop out.

    Layers, which know more, check for themselves.
    """
    idle = captured() or getattr(f, "looked_at", False) or not any_drops_out(parts)
    return nullcontext() if idle else _told_of_draws(parts, device)


@contextmanager
def _told_of_draws(parts: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    state = torch.cuda.get_rng_state if device.type == "cuda" else lambda device: torch.get_rng_state()
    before = state(device)
    yield
    if torch.equal(before, state(device)):
        return
    found = dict.fromkeys(type(part).__name__ for part in parts if part.training and drops_out(part))
    warnings.warn(
        f"in training mode, f draws new random numbers in every call ({', '.join(found)}), so the solver may not "
        "converge, and gradients are wrong. Use implicitly.nn.Dropout in an implicitly.nn.DEQ or NeuralODE, which "
        "draws once per solve; or f.eval(); or UnrolledAdjoint with a fixed number of steps, which differentiates "
        "the calls as they were made",
        PerCallWarning,
        stacklevel=users_line(),
    )
