"""Optimality conditions, their structured linear systems, and derivatives of the central path."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import implicitly as im
from implicitly.argmin.programs.condensed import Condensed
from implicitly.argmin.programs.kkt import ACTIVE_SET, RELAXED, Factors, base_matrix, jacobian_product, plus_gram
from implicitly.argmin.programs.program import QuadraticProgram, equilibrate, natural_residual
from implicitly.viz import peak_bytes
from tests.argmin.programs import D, program
from tests.problems import seeded


def dense(pr: QuadraticProgram, alpha: Tensor, beta: Tensor) -> Tensor:
    width = sum(pr.sizes)
    eye = torch.eye(width, dtype=D).expand(len(alpha), width, width)
    return jacobian_product(pr, alpha, beta, eye).mT


def parts(kind: str, m: int, seed: int) -> tuple[Tensor, Tensor]:
    g = seeded(seed)
    draw = torch.rand(3, m, generator=g, dtype=D)
    if kind == "active":
        alpha = (draw > 0.7).to(D)
        return alpha, (1 - alpha) * (0.5 + draw) - 1e-3 * alpha
    return (torch.ones_like(draw), -draw) if kind == "interior" else (0.1 + draw, -draw.flip(1))


@pytest.mark.parametrize("kind", ["active", "interior", "relaxed"])
@pytest.mark.parametrize("shared", [(), ("Q", "G", "A")])
@pytest.mark.parametrize("q", [0, 2])
@pytest.mark.parametrize("condensed", [False, True])
def test_solves_with_the_factors_are_those_with_the_matrix(kind, shared, q, condensed):
    scaled, _ = equilibrate(QuadraticProgram(*program(n=5, m=4, q=q, shared=shared, seed=1)))
    alpha, beta = parts(kind, 4, 2)
    if condensed:
        whole = Condensed.of(scaled)
        assert whole is not None
        factors = whole.factorise(alpha, beta)
    else:
        factors = Factors.of(scaled, base_matrix(scaled), alpha, beta)
    assert bool(factors.usable.all())
    J = dense(scaled, alpha, beta)
    r = torch.randn(3, 2, J.shape[1], generator=seeded(3), dtype=D)
    tolerance = {"rtol": 1e-10, "atol": 1e-10} if condensed else {"rtol": 1e-6, "atol": 1e-6}
    for transposed in (False, True):
        exact = torch.linalg.solve(J.mT if transposed else J, r.mT).mT
        torch.testing.assert_close(factors.solve(r, transposed), exact, **tolerance)
        again = jacobian_product(scaled, alpha, beta, exact, transposed)
        torch.testing.assert_close(again, r)


def test_the_jacobian_is_that_of_the_condition():
    pr = QuadraticProgram(*program(n=5, m=4, q=2, seed=1))
    w = torch.randn(3, 11, generator=seeded(1), dtype=D)
    alpha = (torch.rand(3, 4, generator=seeded(2), dtype=D) > 0.5).to(D)
    v = torch.randn(3, 11, generator=seeded(3), dtype=D)
    moved = torch.func.jvp(ACTIVE_SET.bind(alpha, *pr.tensors), (w,), (v,))[1]
    torch.testing.assert_close(jacobian_product(pr, alpha, 1 - alpha, v.unsqueeze(1)).squeeze(1), moved)
    lam = w[:, 7:]
    gap = (pr.G @ w[:, :5].unsqueeze(2)).squeeze(2) - pr.h
    moved = torch.func.jvp(RELAXED.bind(torch.tensor(0.1, dtype=D), *pr.tensors), (w,), (v,))[1]
    torch.testing.assert_close(jacobian_product(pr, lam, gap, v.unsqueeze(1)).squeeze(1), moved)


@pytest.mark.parametrize("conditions", [ACTIVE_SET, RELAXED])
@pytest.mark.parametrize("shared", [(), ("Q", "G", "A"), ("p", "h", "b"), ("Q", "h")])
@pytest.mark.parametrize("q", [0, 2])
def test_the_pullback_is_that_of_autograd(conditions, shared, q):
    pr = QuadraticProgram(*program(n=5, m=4, q=q, shared=shared, seed=1))
    w, u = torch.randn(2, 3, 9 + q, generator=seeded(1), dtype=D)
    own = (torch.rand(3, 4, generator=seeded(2), dtype=D) > 0.5).to(D)
    own = own if conditions is ACTIVE_SET else torch.tensor(0.1, dtype=D)
    leaves = [t.clone().requires_grad_() for t in (w, *pr.tensors)]
    value = conditions.bind(own, *leaves[1:])(leaves[0])
    expected = torch.autograd.grad(value, leaves, u)
    pull = conditions.pull(w, own, *pr.tensors)
    for place, exact in enumerate(expected):
        torch.testing.assert_close(pull(u, place), exact)


def test_scaling_changes_no_solution():
    args = list(program(n=5, m=4, q=2, seed=1))
    args[2] = args[2] * torch.logspace(-4, 4, 4, dtype=D).unsqueeze(1)
    args[3] = args[3] * torch.logspace(-4, 4, 4, dtype=D)
    scaled, scaling = equilibrate(QuadraticProgram(*args))
    assert scaled.G.abs().amax(2).max() < 10
    assert scaled.G.abs().amax(2).min() > 0.01
    sol = im.qp(*args)
    w = torch.cat([sol.value, sol.dual_equality, sol.dual_inequality], 1) / scaling.w
    _, residual = natural_residual(scaled, scaling, w)
    torch.testing.assert_close(residual, sol.residual, rtol=0.5, atol=1e-11)
    assert residual.max() < 1e-10


def test_smoothing_is_the_derivative_of_the_central_path():
    # min z^2/2 + p z subject to z <= h: on the path (z + p)(z - h) + kappa = 0, z < h.
    p, h = torch.tensor([[-2.0], [1.0]], dtype=D), torch.tensor([1.0], dtype=D)
    p.requires_grad_(), h.requires_grad_()
    kappa = 0.3
    sol = im.qp(torch.eye(1, dtype=D), p, torch.ones(1, 1, dtype=D), h, adjoint=im.KKTAdjoint(smoothing=kappa))
    torch.testing.assert_close(sol.value, torch.tensor([[1.0], [-1.0]], dtype=D))
    z = ((h - p) - ((h + p) ** 2 + 4 * kappa).sqrt()) / 2
    for ours, exact in zip(
        torch.autograd.grad(sol.value.sin().sum(), (p, h), retain_graph=True),
        torch.autograd.grad((sol.value.detach().cos() * z).sum(), (p, h), retain_graph=True),
    ):
        torch.testing.assert_close(ours, exact)
    dual = z.detach() * 0 - (z + p)
    torch.testing.assert_close(
        torch.autograd.grad(sol.dual_inequality.sum(), h)[0], torch.autograd.grad(dual.sum(), h)[0]
    )


KAPPA = 0.01


def on_the_path(Q: Tensor, p: Tensor, G: Tensor, h: Tensor, A: Tensor, b: Tensor) -> Tensor:
    """z of the central path of one program, the minimiser of its barrier function."""
    Q = (Q + Q.T) / 2
    z, nu = torch.zeros_like(p), torch.zeros_like(b)
    for _ in range(40):
        s = h - G @ z
        gradient = Q @ z + p + KAPPA * G.T @ (1 / s)
        H = Q + KAPPA * G.T @ (G / s.unsqueeze(1) ** 2)
        K = torch.cat([torch.cat([H, A.T], 1), torch.cat([A, A.new_zeros(len(A), len(A))], 1)])
        step = torch.linalg.solve(K, -torch.cat([gradient, A @ z - b]))
        d, nu = step[: len(p)], step[len(p) :]
        limit = float(((G @ d) / s).max())
        z = z + min(1.0, 0.9 / max(limit, 1e-9)) * d
    assert float((Q @ z + p + KAPPA * G.T @ (1 / (h - G @ z)) + A.T @ nu).norm()) < 1e-11
    return z


def test_smoothing_of_any_order_and_towards_zero():
    args = [t.requires_grad_() for t in program(batch=None, n=3, m=4, seed=1)]

    def smoothed(*args: Tensor) -> Tensor:
        return im.qp(*args, adjoint=im.KKTAdjoint(smoothing=KAPPA)).value

    def path(*args: Tensor) -> Tensor:  # has the derivative of the one and the value of the other
        value = smoothed(*args)
        return value - value.detach() + on_the_path(*(t.detach() for t in args))

    assert gradcheck(path, args)
    assert gradgradcheck(smoothed, args, fast_mode=True)
    exact = torch.autograd.grad(im.qp(*args).value.sum(), args)
    small = im.qp(*args, adjoint=im.KKTAdjoint(smoothing=1e-10)).value
    for a, b in zip(torch.autograd.grad(small.sum(), args), exact):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_smoothing_with_failed_samples():
    h = torch.tensor([[-1.0, -1.0], [1.0, 2.0]], dtype=D, requires_grad=True)
    G = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=D)
    adjoint = im.KKTAdjoint(smoothing=0.1)
    sol = im.qp(torch.eye(2, dtype=D), torch.ones(2, dtype=D), G, h, adjoint=adjoint, on_failure="ignore")
    assert sol.status.tolist()[0] == im.Status.INFEASIBLE
    (gradient,) = torch.autograd.grad(sol.value.nan_to_num().sum(), h)
    assert gradient[0].tolist() == [0, 0]
    assert bool((gradient[1] != 0).all())
    with pytest.raises(ValueError, match="smoothing must be"):
        im.KKTAdjoint(smoothing=-1.0)


@pytest.mark.parametrize("bound", [5.0, 1e20, float("inf")])
def test_smoothing_beside_rows_that_bound_nothing(bound):
    Q, p, G, h, *_ = program(batch=2, n=3, m=4, q=0, seed=1)
    p, h = 100 * p, 100 * h  # whose size is scaled to one
    adjoint = im.KKTAdjoint(smoothing=30.0)

    def gradients(G: Tensor, h: Tensor) -> tuple[Tensor, ...]:
        args = [t.clone().requires_grad_() for t in (Q, p, G, h)]
        sol = im.qp(*args, adjoint=adjoint)
        loss = sol.value.sin().sum() + sol.dual_inequality.sin().sum()
        return torch.autograd.grad(loss, args)

    expected = gradients(G, h)
    padding = torch.full_like(G[..., :1, :], 0.0 if bound == 5.0 else 1.0)
    got = gradients(torch.cat([G, padding], -2), torch.cat([h, torch.full_like(h[..., :1], bound)], -1))
    for x, y in zip((got[0], got[1], got[2][..., :4, :], got[3][..., :4]), expected):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-8)


def test_smoothing_in_small_units():
    Q, p, G, h, *_ = (t.float() for t in program(batch=2, n=3, m=4, q=0, seed=1))

    def gradient(unit: float) -> Tensor:
        x = (unit * p).requires_grad_()
        value = im.qp(Q, x, G, unit * h, adjoint=im.KKTAdjoint(smoothing=100 * unit**2)).value
        return torch.autograd.grad((value / unit).sin().sum(), x)[0] * unit

    torch.testing.assert_close(gradient(1e-6), gradient(1.0), rtol=1e-3, atol=1e-4)


def test_smoothing_where_inequalities_leave_no_room_says_what_to_try():
    G, h = torch.tensor([[1.0], [-1.0]], dtype=D), torch.tensor([1.0, -1.0], dtype=D)  # z = 1
    with pytest.raises(im.SolverError, match=r"1 of 1 samples.*less smoothing, and A z = b in place of"):
        im.qp(torch.eye(1, dtype=D), G[0], G, h, adjoint=im.KKTAdjoint(smoothing=0.1))


def test_with_smoothing_the_slack_is_that_of_the_exact_point_with_the_derivative_of_the_other():
    Q, p, G, h, _, _ = program(batch=2, n=3, m=5, q=0, seed=3)
    adjoint = im.KKTAdjoint(smoothing=KAPPA)

    def slacks(G, h):
        sol = im.qp(Q, p, G, h, adjoint=adjoint)
        return sol.slack, h - (G @ sol.value.unsqueeze(2)).squeeze(2)

    ours, written = slacks(G, h)
    assert torch.equal(ours, im.qp(Q, p, G, h).slack)
    torch.testing.assert_close(ours, written)
    for place in (0, 1):
        ours, written = torch.func.jacrev(slacks, argnums=place)(G, h)
        torch.testing.assert_close(ours, written)


def test_a_tolerance_that_the_dtype_cannot_reach_is_refused_before_the_solve():
    with pytest.raises(ValueError, match=r"KKTAdjoint: torch.float64 cannot reach rtol=1e-20"):
        im.qp(torch.eye(1, dtype=D), torch.ones(1, dtype=D), adjoint=im.KKTAdjoint(rtol=1e-20))


def test_products_of_columns_are_formed_for_many_samples_only():
    """For a few they would take many times the memory, and the time, of the matrices that are asked for."""
    G, base = torch.randn(50, 40, generator=seeded(1), dtype=D), torch.eye(40, dtype=D)
    few, many = (torch.rand(batch, 50, generator=seeded(2), dtype=D) for batch in (4, 200))
    for d in (few, many):
        expected = base + torch.einsum("mi,bm,mj->bij", G, d, G)
        torch.testing.assert_close(plus_gram(base, G, d), expected, rtol=1e-12, atol=1e-12)
    of_columns = 50 * 40 * 40 * D.itemsize
    assert peak_bytes(lambda: plus_gram(base, G, few)) < of_columns < peak_bytes(lambda: plus_gram(base, G, many))


def test_a_derivative_that_falls_short_is_told_with_the_options_of_the_adjoint():
    torch.manual_seed(0)
    p = torch.randn(20, dtype=torch.float64, requires_grad=True)
    G, h = torch.randn(30, 20, dtype=torch.float64), 1e-6 * torch.rand(30, dtype=torch.float64)
    adjoint = im.KKTAdjoint(max_steps=1, rtol=3e-16)
    z = im.qp(torch.eye(20, dtype=torch.float64), p, G, h, adjoint=adjoint).value
    message = r"backward solve of qp: the linear solver of KKTAdjoint did not.*Try: raise max_steps of KKTAdjoint"
    with pytest.raises(im.SolverError, match=message):
        z.sum().backward()
