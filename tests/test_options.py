"""Options that cannot be meant are refused where they are given, with whose they are and what came."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import implicitly as im

INF, NAN = float("inf"), float("nan")
Z = torch.zeros(2, 3)


def identity(z):
    return z


WRONG_KIND = {
    "InteriorPoint: max_steps must be an int, got 10.5": lambda: im.InteriorPoint(max_steps=10.5),
    "InteriorPoint: rtol must be a number, got a str": lambda: im.InteriorPoint(rtol="a"),
    "ADMM: max_steps must be an int, got True": lambda: im.ADMM(max_steps=True),
    "ADMM: rho must be a number, got a str": lambda: im.ADMM(rho="a"),
    "Clarabel: polish must be an int, got 1.5": lambda: im.Clarabel(polish=1.5),
    "Clarabel: threads must be an int, got 'a'": lambda: im.Clarabel(threads="a"),
    "Neumann: damping must be a number, got a str": lambda: im.Neumann(damping="a"),
    "Anderson: damping must be a number, got a str": lambda: im.Anderson(damping="a"),
    "Anderson: damping must be a number, got a Tensor": lambda: im.Anderson(damping=torch.tensor(0.5)),
    "Anderson: regularisation must be a number, got a str": lambda: im.Anderson(regularisation="a"),
    "FixedPointIteration: damping must be a number, got a NoneType": lambda: im.FixedPointIteration(damping=None),
    "LevenbergMarquardt: damping must be a number, got a str": lambda: im.LevenbergMarquardt(damping="a"),
    "DenseLU: limit_gib must be a number, got a str": lambda: im.DenseLU(limit_gib="x"),
    "Newton: limit_gib must be a number, got a bool": lambda: im.Newton(limit_gib=True),
    "GaussNewton: limit_gib must be a number, got a str": lambda: im.GaussNewton(limit_gib="x"),
    "Newton: rtol must be a number, got a bool": lambda: im.Newton(rtol=True),
    "ImplicitAdjoint: listen must be callable or None, got a int": lambda: im.ImplicitAdjoint(listen=3),
    "PhantomAdjoint: steps must be an int, got 2.5": lambda: im.PhantomAdjoint(steps=2.5),
    "PhantomAdjoint: damping must be a number, got 'a'": lambda: im.PhantomAdjoint(damping="a"),
    "check_independence: samples must be an int, got 2.5": lambda: im.check_independence(identity, Z, samples=2.5),
    "jacobian_norm: samples must be an int, got 2.5": lambda: im.nn.jacobian_norm(identity, Z, samples=2.5),
    "spectral_radius: steps must be an int, got 2.5": lambda: im.nn.spectral_radius(identity, Z, steps=2.5),
    "power_cone: exponents must be a tuple of numbers, one at least": lambda: im.project.power_cone(Z, ()),
    "power_cone: exponents must be numbers, got 'a'": lambda: im.project.power_cone(Z, ("a", 0.5)),
}
OUT_OF_RANGE = {
    "InteriorPoint: rtol must be between 0 and 1, got 1.0": lambda: im.InteriorPoint(rtol=1.0),
    "Clarabel: time_limit_s must be positive, got 0": lambda: im.Clarabel(time_limit_s=0),
    "Clarabel: polish must be at least 0, got -1": lambda: im.Clarabel(polish=-1),
    "Neumann: damping must be a positive number, got 0": lambda: im.Neumann(damping=0),
    "Neumann: damping must be a positive number, got nan": lambda: im.Neumann(damping=NAN),
    "LevenbergMarquardt: damping must be a positive number, got inf": lambda: im.LevenbergMarquardt(damping=INF),
    "DenseLU: limit_gib must be positive, got 0": lambda: im.DenseLU(limit_gib=0),
    "Newton: limit_gib must be positive, got nan": lambda: im.Newton(limit_gib=NAN),
    r"power_cone: exponents must be positive and sum to one": lambda: im.project.power_cone(Z, (0.5, NAN)),
    "Anderson: damping must be in .* got nan": lambda: im.Anderson(damping=NAN),
    "spectral_radius: steps must be at least 2, got 1": lambda: im.nn.spectral_radius(identity, Z, steps=1),
}


@pytest.mark.parametrize("message", WRONG_KIND)
def test_what_is_of_another_kind_is_refused(message):
    with pytest.raises(TypeError, match=message):
        WRONG_KIND[message]()


@pytest.mark.parametrize("message", OUT_OF_RANGE)
def test_what_is_out_of_range_is_refused(message):
    with pytest.raises(ValueError, match=message):
        OUT_OF_RANGE[message]()


def test_numbers_of_numpy_and_infinite_limits_are_fine():
    im.Anderson(damping=np.float32(0.5), history=np.int64(3), max_steps=np.int32(9))
    im.DenseLU(limit_gib=INF)
    im.Neumann(damping=3)
    im.InteriorPoint(rtol=np.float64(1e-8), max_steps=np.int64(9))
    im.PhantomAdjoint(steps=np.int64(2), damping=np.float32(0.5))
    im.ImplicitAdjoint(listen=print)
    assert im.project.power_cone(Z, [0.5, 0.5]).shape == Z.shape
