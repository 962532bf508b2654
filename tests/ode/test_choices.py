"""Options that cannot be meant are refused where they are given."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import implicitly as im


@pytest.mark.parametrize("adjoint", ["backsolve", None, im.ImplicitAdjoint(), im.BacksolveAdjoint], ids=str)
def test_what_is_no_adjoint(adjoint):
    with pytest.raises(TypeError, match="adjoint must be one for trajectories"):
        im.odeint(lambda t, y: -y, torch.ones(1), (0.0, 1.0), adjoint=adjoint)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_steps": 10.5}, TypeError, "max_steps must be an int, got 10.5"),
        ({"max_steps": True}, TypeError, "max_steps must be an int, got True"),
        ({"max_steps": None}, TypeError, "max_steps must be an int, got None"),
        ({"dt": True}, TypeError, "dt must be a number, got a bool"),
        ({"dt_min": None}, TypeError, "dt_min must be a number, got a NoneType"),
        ({"controller": 3}, TypeError, "controller must be an im.Controller"),
        ({"controller": im.Controller}, TypeError, "controller must be an im.Controller"),
        ({"tstops": 0.5}, TypeError, "tstops must be a tuple of numbers, got a float"),
        ({"tstops": ("a",)}, ValueError, "tstops must hold finite numbers"),
        ({"rtol": "a"}, TypeError, "rtol must be a number or a tensor, got 'a'"),
        ({"atol": True}, TypeError, "atol must be a number or a tensor, got True"),
        ({"atol": None}, TypeError, "atol must be a number or a tensor, got None"),
    ],
)
def test_options_of_methods(options, error, message):
    with pytest.raises(error, match=f"^Dopri5: {message}"):
        im.Dopri5(**options)


def test_numbers_of_numpy_are_numbers():
    im.Dopri5(rtol=np.float32(1e-3), max_steps=np.int64(5), tstops=(np.float64(0.5),), dt0=np.float32(0.1))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"integral": -1.0}, ValueError, "integral must be > 0"),
        ({"proportional": float("nan")}, ValueError, "proportional must be finite"),
        ({"derivative": "a"}, TypeError, "derivative must be a number, got a str"),
        ({"safety": None}, TypeError, "safety must be a number, got a NoneType"),
    ],
)
def test_options_of_controllers(options, error, message):
    with pytest.raises(error, match=f"^Controller: {message}"):
        im.Controller(**options)


@pytest.mark.parametrize(
    ("adjoint", "options", "message"),
    [
        (im.BacksolveAdjoint, {"check": "a"}, "check must be a number, got 'a'"),
        (im.BacksolveAdjoint, {"listen": 3}, "listen must be a function of one number, got 3"),
        (im.RecursiveCheckpointAdjoint, {"listen": 3}, "listen must be a function of one number, got 3"),
        (im.RecursiveCheckpointAdjoint, {"arc_length": 1}, "arc_length must be True or False, got 1"),
    ],
)
def test_options_of_adjoints(adjoint, options, message):
    with pytest.raises(TypeError, match=f"^{adjoint.__name__}: {message}"):
        adjoint(**options)
