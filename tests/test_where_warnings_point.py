"""Warnings are of the user's line, in whatever folder that is."""

from __future__ import annotations

import os
import warnings

import pytest
import torch

import implicitly as im

CALL = """
def solve():
    return im.fixed_point(
        lambda z, x: 2 * z + x, torch.zeros(1, 2), torch.ones(1, 2), solver=im.FixedPointIteration())
"""
OURS, TORCHS = os.path.dirname(im.__file__), os.path.dirname(torch.__file__)


@pytest.mark.parametrize("folder", ["/home/me", OURS + "_extensions", TORCHS + "vision"])
def test_a_warning_names_the_users_file(folder):
    file, names = os.path.join(folder, "model.py"), {"im": im, "torch": torch}
    exec(compile(CALL, file, "exec"), names)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        names["solve"]()
    assert [(w.category, w.filename) for w in caught] == [(im.ConvergenceWarning, file)]


@pytest.mark.parametrize("folder", [OURS, os.path.join(TORCHS, "nn")])
def test_what_is_in_the_package_or_in_torch_is_not_the_users(folder):
    names = {"im": im, "torch": torch}
    exec(compile(CALL, os.path.join(folder, "model.py"), "exec"), names)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        names["solve"]()
    assert [w.filename for w in caught] == [__file__]
