"""Proximal maps: the objective they minimise, Moreau's identity, known answers. (What all keep: test_project.)"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, func

import implicitly as im
from implicitly.argmin.sets.chain import jumps
from tests.argmin import projections as rows
from tests.argmin.projections import PROXIMAL, Row
from tests.problems import seeded

prox, project = im.prox, im.project
D = torch.float64


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=D, generator=seeded(seed))


@pytest.mark.parametrize("row", PROXIMAL, ids=repr)
@given(seed=st.integers(0, 10**6), scale=st.sampled_from([1e-3, 0.3, 1.0, 10.0, 1e3]))
@settings(max_examples=12, deadline=None, derandomize=True)
def test_it_is_the_minimiser(row: Row, seed: int, scale: float):
    rows.check_proximal(row, seed, scale)


@pytest.mark.parametrize("row", PROXIMAL, ids=repr)
def test_it_is_the_minimiser_in_single_precision(row: Row):
    for seed in range(3):
        rows.check_proximal(row, seed, 2.0, torch.float32)


@pytest.mark.parametrize(
    ("of_norm", "onto_ball"),
    [(prox.l1, project.linf_ball), (prox.l2, project.l2_ball), (prox.linf, project.l1_ball)],
)
def test_moreau_takes_the_point_apart(of_norm, onto_ball):
    z, radius = normal(20, 6), normal(20, seed=1).abs()
    weight = radius[:, None] if of_norm is prox.l1 else radius
    torch.testing.assert_close(of_norm(z, weight) + onto_ball(z, radius), z)


def test_the_nuclear_norm_lowers_singular_values():
    Z, weight = normal(7, 4, 6), 0.8
    U, S, V = torch.linalg.svd(Z, full_matrices=False)
    torch.testing.assert_close(prox.nuclear(Z, weight), (U * (S - weight).clamp(min=0).unsqueeze(-2)) @ V)
    repeated = torch.diag(torch.tensor([2.0, 2.0, 0.3], dtype=D)).requires_grad_()
    assert torch.autograd.gradcheck(prox.nuclear, (repeated, torch.tensor(1.0, dtype=D)), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(prox.nuclear, (repeated, torch.tensor(1.0, dtype=D)))


def test_without_a_weight_the_nuclear_norm_changes_nothing_whatever_the_rank():
    """One matrix of rank 1, one of rank 0, and one with a weight."""
    g = torch.Generator().manual_seed(0)
    u, v = torch.randn(3, 1, generator=g, dtype=D), torch.randn(1, 4, generator=g, dtype=D)
    Z, weight = torch.stack([u @ v, 0 * u @ v, u @ v]), torch.tensor([0.0, 0.0, 0.1], dtype=D)
    value, slopes = torch.func.vjp(prox.nuclear, Z, weight)
    torch.testing.assert_close(value[:2], Z[:2])
    cotangent = torch.randn(3, 3, 4, generator=g, dtype=D)
    of_Z, of_weight = slopes(cotangent)
    torch.testing.assert_close(of_Z[:2], cotangent[:2])
    direction = u @ v / (u.norm() * v.norm())
    torch.testing.assert_close(of_weight[[0, 2]], -(cotangent[[0, 2]] * direction).sum((1, 2)))
    along = torch.func.jvp(lambda Z: prox.nuclear(Z, weight), (Z,), (cotangent,))[1]
    torch.testing.assert_close(along[:2], cotangent[:2])


@pytest.mark.parametrize("weight", [1e308, float("inf")])
@pytest.mark.parametrize("f", [prox.l1, prox.l2, prox.linf, prox.nuclear])
def test_a_weight_beyond_everything_leaves_zeros_without_a_slope(f, weight: float):
    z, w = normal(2, 3, 4).requires_grad_(), torch.tensor(weight, dtype=D, requires_grad=True)
    x = f(z, w)
    slopes = torch.autograd.grad(x.sum(), (z, w))
    for t in (x, *slopes):
        assert torch.equal(t, torch.zeros_like(t))


@pytest.mark.parametrize("f", [prox.l1, prox.l2, prox.linf, prox.total_variation])
def test_without_a_weight_every_map_is_the_identity(f):
    for z in (torch.zeros(4, dtype=D), torch.tensor([0.0, 2.0, 2.0, -1.0], dtype=D)):
        torch.testing.assert_close(f(z, 0.0), z)
        for jacobian in (func.jacrev(f)(z, 0.0), func.jacfwd(f)(z, 0.0)):
            torch.testing.assert_close(jacobian, torch.eye(4, dtype=D))


@pytest.mark.parametrize("f", [prox.l1, prox.l2, prox.linf, prox.nuclear, prox.total_variation])
def test_a_weight_of_zero_has_the_slope_of_one_that_grows(f):
    z, weight = torch.tensor([[0.3, 2.0, -1.0]], dtype=D), torch.zeros((), dtype=D)
    slope = func.jacrev(lambda w: f(z, w))(weight)
    torch.testing.assert_close(slope, (f(z, weight + 1e-6) - f(z, weight)) / 1e-6, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------ total variation


def optimality_gap(z: Tensor, w: Tensor, x: Tensor) -> float:
    """How far x is from optimal: the dual u = cumsum(z - x) must be within +-w, at -w where x rises, +w where it
    falls, and end at 0."""
    u = (z - x).cumsum(-1)
    beyond = (u[..., :-1].abs() - w).amax()
    step = x.diff(dim=-1)
    wrong = (step.abs() * (u[..., :-1] + step.sign() * w).abs()).amax()
    return float(torch.stack([beyond, wrong, u[..., -1].abs().amax()]).max())


@given(
    seed=st.integers(0, 10**6),
    n=st.integers(2, 70),
    weight=st.sampled_from([0.0, 0.05, 0.7, 5.0, 1e3]),
    kind=st.sampled_from(["normal", "walk", "whole", "steps"]),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_total_variation_satisfies_its_optimality_conditions(seed: int, n: int, weight: float, kind: str):
    z, w = normal(3, n, seed=seed), weight * normal(3, n - 1, seed=seed + 1).abs()
    if kind == "walk":
        z = z.cumsum(-1)
    elif kind == "whole":  # ties
        z, w = (2 * z).round(), (2 * w).round()
    elif kind == "steps":
        z = (z > 0).to(D).cumsum(-1) * 10
    x = prox.total_variation(z, w)
    size = float(z.abs().sum() + w.max())
    assert optimality_gap(z, w, x) <= 1e-13 * size * max(1.0, float(z.abs().max()))


def test_total_variation_of_long_and_of_steep_signals():
    z = normal(2, 5000).cumsum(-1)
    assert optimality_gap(z, torch.tensor(3.0), prox.total_variation(z, 3.0)) < 1e-8
    steep = torch.exp(-torch.linspace(0, 60, 300, dtype=D))  # a division by the mean takes off few entries
    assert optimality_gap(steep, torch.tensor(1e-4, dtype=D), prox.total_variation(steep, 1e-4)) < 1e-12
    torch.testing.assert_close(prox.total_variation(steep, 0.0), steep)
    torch.testing.assert_close(prox.total_variation(steep, 1e3), steep.mean().expand(300))


def test_total_variation_agrees_with_a_cone_program():
    cp = pytest.importorskip("cvxpy", reason="needs the extra: implicitly[convex]")
    for seed in range(3):
        z, w = normal(20, seed=seed), normal(19, seed=seed + 9).abs()
        x = cp.Variable(20)
        distance = cp.sum_squares(x - z.numpy(force=True)) / 2
        cp.Problem(cp.Minimize(distance + w.numpy(force=True) @ cp.abs(cp.diff(x)))).solve(cp.CLARABEL)
        torch.testing.assert_close(prox.total_variation(z, w), torch.tensor(x.value), atol=1e-6, rtol=1e-6)


def test_total_variation_of_known_signals():
    z = torch.tensor([0.0, 0.0, 3.0, 3.0, 3.0], dtype=D, requires_grad=True)
    w = torch.tensor(0.6, dtype=D, requires_grad=True)
    x = prox.total_variation(z, w)
    torch.testing.assert_close(x, torch.tensor([0.3, 0.3, 2.8, 2.8, 2.8], dtype=D))
    # The step of the first part per unit of weight is one over its length.
    torch.testing.assert_close(torch.autograd.grad(x[0], w)[0], torch.tensor(0.5, dtype=D))
    assert jumps(z.detach()[None], torch.full((1, 4), 0.6, dtype=D)).tolist() == [[0, 1, 0, 0]]
    assert torch.equal(prox.total_variation(z[:1], 3.0), z[:1])
    assert prox.total_variation(z, torch.ones(2, 1)).shape == (2, 5)


# ---------------------------------------------------------------------------------------- beside a modeller


@pytest.mark.parametrize("seed", range(2))
def test_projections_agree_with_a_cone_program(seed: int):
    cp = pytest.importorskip("cvxpy", reason="needs the extra: implicitly[convex]")
    z, Z = 2 * normal(3, seed=seed), normal(3, 3, seed=seed)
    x, X = cp.Variable(3), cp.Variable((3, 3), symmetric=True)
    numbers, matrix = z.numpy(force=True), Z.numpy(force=True)
    cases = [
        (project.simplex(z, 1.5), x, numbers, [x >= 0, cp.sum(x) == 1.5]),
        (project.l1_ball(z), x, numbers, [cp.norm1(x) <= 1]),
        (project.second_order_cone(z), x, numbers, [cp.SOC(x[0], x[1:])]),
        (project.exponential_cone(z), x, numbers, [cp.ExpCone(x[0], x[1], x[2])]),
        (project.psd_cone(Z), X, (matrix + matrix.T) / 2, [X >> 0]),
        (prox.nuclear(Z, 0.5), Y := cp.Variable((3, 3)), matrix, []),
    ]
    for ours, variable, point, constraints in cases:
        extra = 0.5 * cp.normNuc(variable) if variable is Y else 0
        distance = cp.sum_squares(variable - point) / 2
        cp.Problem(cp.Minimize(distance + extra), constraints).solve(cp.CLARABEL)
        torch.testing.assert_close(ours, torch.tensor(np.array(variable.value)), atol=2e-5, rtol=2e-5)


def test_a_gradient_step_through_a_map_is_that_of_the_smooth_part():
    """func.grad through vmap through prox, as in unrolled or learned proximal gradient methods."""
    A, b, w = normal(5, 4), normal(3, 5, seed=1), torch.tensor(0.1, dtype=D)

    def loss(w: Tensor, b: Tensor) -> Tensor:
        x = torch.zeros(4, dtype=D)
        for _ in range(3):
            x = prox.l1(x - 0.1 * A.T @ (A @ x - b), 0.1 * w)
        return x.square().sum()

    each = func.vmap(func.grad(loss), in_dims=(None, 0))(w, b)
    torch.testing.assert_close(each, torch.stack([func.grad(loss)(w, row) for row in b]))
