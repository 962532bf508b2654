"""Parameters of projections that are plain numbers are checked on the host, without waiting for an accelerator.

Tensors on `meta` stand for those of one: whatever asks for one of their numbers raises.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import implicitly as im

INF = float("inf")
CALLS = {
    "box": lambda z: im.project.box(z, -1.0, 2),
    "box without bounds": im.project.box,
    "simplex": lambda z: im.project.simplex(z, 2.0),
    "l1_ball": lambda z: im.project.l1_ball(z, 2.0),
    "l2_ball": lambda z: im.project.l2_ball(z, INF),
    "linf_ball": lambda z: im.project.linf_ball(z, np.float32(2.0)),
    "second_order_cone": im.project.second_order_cone,
    "l1": lambda z: im.prox.l1(z, 0.5),
    "l2": lambda z: im.prox.l2(z, 0.5),
    "linf": lambda z: im.prox.linf(z, 0.5),
    "sparsemax": im.sparsemax,
}
REFUSED = {
    "simplex: radius must be >= 0, got -1$": lambda z: im.project.simplex(z, -1.0),
    "simplex: radius must be finite, got inf$": lambda z: im.project.simplex(z, INF),
    "l1_ball: radius must be >= 0, got nan$": lambda z: im.project.l1_ball(z, float("nan")),
    "box: lower must be <= upper everywhere; lower - upper, got 1$": lambda z: im.project.box(z, 2.0, 1.0),
    "prox.l2: weight must be >= 0, got -0.5$": lambda z: im.prox.l2(z, -0.5),
    "soft_sort: strength must be positive and finite, got 0$": lambda z: im.soft_sort(z, 0.0),
    "soft_rank: strength must be positive and finite, got 0$": lambda z: im.soft_rank(z, 1e-60),  # in float32
    "sinkhorn: epsilon must be positive and finite, got inf$": lambda z: im.project.sinkhorn(
        z, torch.ones(3) / 3, torch.ones(4) / 4, INF
    ),
    "isotonic: weights must be positive and finite, got 0$": lambda z: im.project.isotonic(z, 0.0),
    "permutahedron: w must be finite, got inf$": lambda z: im.project.permutahedron(z, INF),
    "total_variation: weight must be >= 0 and finite, got -1$": lambda z: im.prox.total_variation(z, -1),
}


@pytest.mark.parametrize("name", CALLS)
def test_an_accelerator_is_not_waited_for(name):
    found = CALLS[name](torch.zeros(3, 4, device="meta"))
    assert found.device.type == "meta"
    assert found.shape == (3, 4)


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_meant_is_refused_all_the_same(message):
    with pytest.raises(ValueError, match=message):
        REFUSED[message](torch.zeros(3, 4))


def test_tensors_are_looked_at_where_they_are():
    with pytest.raises(ValueError, match=r"radius must be finite, got inf at index \[1, 0\]"):
        im.project.simplex(torch.zeros(2, 4), torch.tensor([1.0, INF]))
    with pytest.raises(RuntimeError, match="meta"):
        im.project.simplex(torch.zeros(2, 4, device="meta"), torch.ones(2, device="meta"))


@pytest.mark.parametrize("f", [im.project.l1_ball, im.project.l2_ball, im.project.linf_ball])
def test_balls_may_have_an_infinite_radius(f):
    z = torch.randn(3, 4, requires_grad=True)
    value = f(z, INF)
    torch.testing.assert_close(value, z.detach())
    (gradient,) = torch.autograd.grad(value.sum(), z)
    assert bool((gradient == 1).all())


def test_sparsemax_is_of_the_dimension_that_is_named():
    assert im.sparsemax(torch.zeros(3, 0), dim=0).shape == (3, 0)
    for dim in (1, -1):
        with pytest.raises(ValueError, match=rf"entries along dim={dim}, got \(3, 0\)"):
            im.sparsemax(torch.zeros(3, 0), dim=dim)
    with pytest.raises(TypeError, match="tensor of real floating numbers"):
        im.sparsemax(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"z must be \(\.\.\., n\)"):
        im.sparsemax(torch.zeros(()))
    for f in (im.soft_sort, im.soft_rank):
        assert f(torch.zeros(0, 3)).shape == (0, 3)
        with pytest.raises(ValueError, match="n >= 1"):
            f(torch.zeros(3, 0))
