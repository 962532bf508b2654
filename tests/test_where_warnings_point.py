"""Warnings are of the user's line, in whatever folder that is."""

from __future__ import annotations

import os
import pickle
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


LOOP = """
def train(values, **options):
    for value in values:
        x = torch.full((3, 2), value)
        im.fixed_point(lambda z, x: torch.tanh(1.5 * z) + x, torch.zeros(3, 2), x, **options)
"""


def loop(file):
    """A training's loop in a module of its own."""
    names = {"im": im, "torch": torch}
    exec(compile(LOOP, file, "exec"), names)
    return names["train"]


def test_a_loop_whose_steps_run_out_is_told_of_once_with_numbers():
    train, few = loop("train.py"), im.FixedPointIteration(max_steps=3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        train([0.1, 0.2, 0.3], solver=few)
        assert len(caught) == 1
        assert "residual norm" in str(caught[0].message)
        train([0.1, 0.2], solver=im.FixedPointIteration(max_steps=4))  # of what was changed it is told anew
        assert len(caught) == 2
        loop("other.py")([0.1, 0.2], solver=few)  # and elsewhere
        assert len(caught) == 3
        warnings.simplefilter("always")
        train([0.1, 0.2], solver=few)
        assert len(caught) == 5


def test_a_graver_status_is_told_of_too():
    train = loop("train.py")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        train([0.1, float("nan"), 0.2, float("nan")], solver=im.FixedPointIteration(max_steps=3))
    assert ["NON_FINITE" in str(w.message) for w in caught] == [False, True]


def test_the_warning_can_be_pickled():
    warning = im.ConvergenceWarning("17 samples", ("a.py", 1))
    again = pickle.loads(pickle.dumps(warning))
    assert (again.args, again.kind) == (warning.args, warning.kind)
