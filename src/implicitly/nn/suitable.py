"""Checks whether a module can be the cell of an equilibrium or the vector field of a trajectory.

A solver calls it many times and assumes that all calls are the same function of two inputs.
"""

from __future__ import annotations

import inspect
import warnings
from typing import Protocol

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

from implicitly.changing import PerCallWarning, drops_out
from implicitly.condition import users_line
from implicitly.nn.per_solve import PerSolve


def check_takes_two(module: nn.Module, takes: str, remedy: str) -> None:
    """Raise TypeError if `module` cannot be called with two arguments, as `takes` says, like a plain network."""
    try:
        signature = inspect.signature(module.forward)
    except (TypeError, ValueError):  # not written in Python, such as that of a scripted module: cannot be checked
        return
    try:
        signature.bind_partial(None, None)
    except TypeError:
        forward = f"{type(module).__name__}.forward({', '.join(signature.parameters)})"
        raise TypeError(f"{takes}, but {forward} does not take two. {remedy}") from None


class Layer(Protocol):
    """A layer that solves, and remembers whether it has checked its module for changes in training."""

    batch_dims: int
    training: bool
    _looked_for_changes: bool


def warn_of_changing(layer: Layer, module: nn.Module) -> None:
    """Warn, when a layer first trains, of submodules that make `module` another function in every call.

    These drop out or take power iterations anew in every call or, if samples are solved one by one, couple them.
    """
    if torch.compiler.is_dynamo_compiling() or not layer.training or layer._looked_for_changes:
        return
    layer._looked_for_changes, per_sample = True, layer.batch_dims == 1
    named = [(name, m) for name, m in module.named_modules() if m.training]
    changing = [(name, m) for name, m in named if _changes(m, per_sample)]
    if changing:
        listed = ", ".join(f"{_kind(m)} ({name})" if name else _kind(m) for name, m in changing)
        warnings.warn(
            f"{type(layer).__name__}: in training mode, {listed} changes the function in every call, so the "
            "solver may not converge and gradients may be wrong. Use Dropout, BatchNorm or SpectralNorm of "
            "implicitly.nn, which stay fixed during a solve (and dropout=0 in attention and recurrent layers), "
            "or .eval()",
            PerCallWarning,
            stacklevel=users_line(),
        )


def _changes(module: nn.Module, per_sample: bool) -> bool:
    """Whether `module` changes from call to call; a `PerSolve` does not, as it decides once per solve."""
    if isinstance(module, PerSolve):
        return False
    couples = per_sample and isinstance(module, _BatchNorm)
    return couples or isinstance(module, _SpectralNorm) or _iterates_by_hook(module) or drops_out(module)


def _iterates_by_hook(module: nn.Module) -> bool:
    """Whether its weight comes from `torch.nn.utils.spectral_norm`, which is a hook rather than a module."""
    return any(isinstance(hook, SpectralNorm) for hook in module._forward_pre_hooks.values())


def _kind(module: nn.Module) -> str:
    name = type(module).__name__
    return f"spectral_norm of {name}" if _iterates_by_hook(module) else name
