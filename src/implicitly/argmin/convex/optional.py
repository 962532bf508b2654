"""Packages that only some layers need."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(name: str) -> ModuleType:
    """Import the optional package `name`; raises an ImportError that says what to install."""
    try:
        return importlib.import_module(name)
    except ImportError as missing:
        raise ImportError(
            f'ConvexLayer needs the package {name.partition(".")[0]}: pip install "implicitly[convex]" (cvxpy, '
            "clarabel and scipy)"
        ) from missing
