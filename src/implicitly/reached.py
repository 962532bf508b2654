"""What a function reaches: the modules and tensors that it is, is bound to, closes over or refers to."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree


def modules_and_tensors(
    f: Callable[..., Any], args: tuple[Any, ...]
) -> tuple[tuple[nn.Module, ...], list[tuple[str, Tensor]]]:
    """The modules that f reaches, each once, and the tensors that it reaches outside of them, with names."""
    modules: dict[int, nn.Module] = {}
    tensors: list[tuple[str, Tensor]] = []
    for name, value in _reached(f, args):
        if isinstance(value, nn.Module):
            modules.setdefault(id(value), value)
        else:
            tensors.append((name, value))
    return tuple(modules.values()), tensors


def parts_of(modules: tuple[nn.Module, ...]) -> dict[str, nn.Module]:
    """The `modules` and all their submodules, each once, by the name that it has in the module that hosts them."""
    seen: set[nn.Module] = set()
    parts: dict[str, nn.Module] = {}
    # Like `named_modules`, in half the time.
    stack = [(f"modules_of_f.{i}", module) for i, module in enumerate(modules)][::-1]
    while stack:
        name, module = stack.pop()
        if module not in seen:
            seen.add(module)
            parts[name] = module
            stack += [(f"{name}.{k}", m) for k, m in reversed(module._modules.items()) if m is not None]
    return parts


def _reached(f: Any, args: Any) -> Iterator[tuple[str, Any]]:
    """Every module and tensor that `f` reaches: itself, bound, partial, closed over, global or an attribute."""
    seen: set[int] = set()
    stack: list[tuple[str, Any]] = [("f", f)]
    if args:
        stack += [("args", a) for a in pytree.tree_leaves(args) if isinstance(a, nn.Module)]
    while stack:
        name, value = stack.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, nn.Module | Tensor):
            yield name, value
        elif isinstance(value, functools.partial):
            stack += [(name, value.func), (name, value.args), (name, value.keywords)]
        elif isinstance(value, types.MethodType):
            stack += [(name, value.__self__), (name, value.__func__)]
            if not callable(value.__self__):  # a method works with the attributes of its object
                stack += [(f"{name}.{k}", v) for k, v in getattr(value.__self__, "__dict__", {}).items()]
        elif isinstance(value, types.FunctionType):
            stack += _function_scope(value)
        elif isinstance(value, dict):
            stack += [(f"{name}[{k!r}]", v) for k, v in value.items()]
        elif isinstance(value, list | tuple | set):
            stack += [(f"{name}[{i}]", v) for i, v in enumerate(value)]
        elif callable(value) and not isinstance(value, type) and hasattr(value, "__dict__"):
            stack += [(f"{name}.{k}", v) for k, v in vars(value).items()]


def _function_scope(function: types.FunctionType) -> list[tuple[str, Any]]:
    scope: list[tuple[str, Any]] = []
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or ()):
        try:
            scope.append((name, cell.cell_contents))
        except ValueError:  # a variable that is assigned only later
            continue
    # Of the globals only modules, tensors and plain functions: objects of other packages are not f's state.
    kinds = (nn.Module, Tensor, types.FunctionType, functools.partial)
    for name in dict.fromkeys(_names_in(function.__code__)):
        value = function.__globals__.get(name)
        foreign = isinstance(value, types.FunctionType) and (value.__module__ or "").partition(".")[0] == "torch"
        if isinstance(value, kinds) and not foreign:
            scope.append((name, value))
    scope += [("a default", value) for value in function.__defaults__ or ()]
    scope += list((function.__kwdefaults__ or {}).items())
    return scope


def _names_in(code: types.CodeType) -> Iterator[str]:
    """The global names and attributes in `code`, including the lambdas, comprehensions and generators in it."""
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from _names_in(inner)
