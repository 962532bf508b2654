"""`ADMM`: the same answers as the interior point where the batch shares the matrices, and warm starts."""

from __future__ import annotations

import pytest
import torch

import implicitly as im
from implicitly.argmin.programs import admm
from implicitly.argmin.programs.polish import System
from implicitly.argmin.programs.program import QuadraticProgram, equilibrate
from tests.argmin.programs import D, program
from tests.problems import seeded

SHARED = ("Q", "G", "A")


@pytest.mark.parametrize("finish", [None, im.InteriorPoint()])
@pytest.mark.parametrize(("m", "q"), [(12, 2), (12, 0), (0, 2)])
def test_it_finds_what_the_interior_point_finds(m, q, finish):
    args = program(batch=16, n=6, m=m, q=q, shared=SHARED, seed=1)
    ours, other = im.qp(*args, solver=im.ADMM(finish=finish)), im.qp(*args)
    for name in ("value", "dual_inequality", "dual_equality", "slack"):
        torch.testing.assert_close(getattr(ours, name), getattr(other, name), rtol=1e-9, atol=1e-10)
    assert ours.residual.max() < 1e-10


def test_who_finishes_begins_where_it_ended(monkeypatch):
    def solve_from(self, system, near):
        found.append((self.solve(system), plain(self, system, near), near))
        return found[-1][1]

    found, plain = [], im.InteriorPoint.solve_from
    monkeypatch.setattr(im.InteriorPoint, "solve_from", solve_from)
    Q, p, G, _, A, b = program(batch=256, n=20, m=40, q=0, shared=SHARED, seed=5)
    h = torch.randn(256, 20, generator=seeded(5), dtype=D) @ G.mT + torch.rand(
        256, 40, generator=seeded(6), dtype=D
    )
    args = (Q, p, G, h, A, b)
    sol = im.qp(*args, solver=im.ADMM())
    ((cold, warm, near),) = found
    assert len(near.w) >= 10
    assert warm.steps.sum() < 0.8 * cold.steps.sum()
    torch.testing.assert_close(warm.w, cold.w, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(sol.value, im.qp(*args).value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -1e300, 0.0])
@pytest.mark.parametrize("condensed", [True, False])
def test_a_start_from_elsewhere_may_be_anything(number, condensed):
    system = System.of(*equilibrate(QuadraticProgram(*program(batch=4, n=6, m=8, q=2, seed=3, dtype=D))))
    system = system if condensed else system.plain()
    exact = im.InteriorPoint().solve(system)
    near = system.origin()
    near = near._replace(w=torch.full_like(near.w, number), slack=torch.full_like(near.slack, number))
    found = im.InteriorPoint().solve_from(system, near)
    assert (found.status == 0).all()
    torch.testing.assert_close(found.w, exact.w, rtol=1e-9, atol=1e-9)


def test_gradients_are_those_of_the_interior_point():
    args = [t.requires_grad_() for t in program(batch=5, n=6, m=12, shared=SHARED, seed=2)]
    ours = torch.autograd.grad(im.qp(*args, solver=im.ADMM()).value.pow(2).sum(), args)
    other = torch.autograd.grad(im.qp(*args).value.pow(2).sum(), args)
    for a, b in zip(ours, other):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def test_float32():
    args = program(batch=8, n=6, m=12, shared=SHARED, seed=3, dtype=torch.float32)
    exact = im.qp(*(t.double() for t in args)).value
    torch.testing.assert_close(im.qp(*args, solver=im.ADMM()).value.double(), exact, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("q", "early"), [(0, torch.float32), (2, D)])
def test_first_steps_are_in_float32_where_there_are_no_equalities(q, early, monkeypatch):
    def advance(self, at, steps, proves):
        dtypes[steps * (len(dtypes) + 1)] = at.x.dtype
        return plain(self, at, steps, proves)

    dtypes, plain = {}, admm._Splitting.advance
    monkeypatch.setattr(admm._Splitting, "advance", advance)
    args = program(batch=64, n=12, m=24, q=q, shared=SHARED, seed=7)
    slow = im.ADMM(finish=None, rho=1e-8)  # takes more steps than those in float32
    sol = im.qp(*args, solver=slow)
    torch.testing.assert_close(sol.value, im.qp(*args).value, rtol=1e-9, atol=1e-9)
    assert max(dtypes) > admm.EARLY
    first = [dtype for k, dtype in dtypes.items() if k <= admm.EARLY]
    assert first == [early] * (admm.EARLY // admm.STRIDE)
    assert {dtype for k, dtype in dtypes.items() if k > admm.EARLY} == {D}


@pytest.mark.parametrize("dtype", [torch.float32, D])
@pytest.mark.parametrize("finish", [None, im.InteriorPoint()])
def test_a_Q_of_low_rank_is_factorised_as_the_dtype_allows(dtype, finish):
    g = seeded(0)
    L, G = torch.randn(200, 50, generator=g, dtype=D), torch.randn(20, 200, generator=g, dtype=D)
    p = torch.randn(8, 200, generator=g, dtype=D) @ L @ L.T
    args = [t.to(dtype) for t in (L @ L.T, p, G, torch.ones(20, dtype=D))]
    sol = im.qp(*args, solver=im.ADMM(finish=finish))
    assert set(sol.status.tolist()) == {int(im.Status.DEGENERATE)}  # in all directions outside of the range of Q
    assert float(sol.residual.max()) < (1e-9 if dtype == D else 2e-3)


def test_what_overflows_in_float32_begins_again():
    Q, p, G, h, *_ = program(batch=8, n=6, m=12, q=0, shared=SHARED, seed=8)
    state = admm._State.of(admm.QuadraticProgram(Q, p, G, h, Q[:0], Q[:0, 0].expand(8, 0)), None, 1.0)
    state = state._replace(x=1e200 * torch.ones_like(state.x)).to(torch.float32)
    assert not state.x.isfinite().any()
    again = state.to(D)
    assert again.x.dtype == D
    for t in (again.x, again.u, again.y):
        assert t.abs().sum() == 0
    h[::2, 0] = 1e200  # inf in float32
    torch.testing.assert_close(im.qp(Q, p, G, h, solver=im.ADMM()).value, im.qp(Q, p, G, h).value)


@pytest.mark.parametrize("solver", [im.ADMM(), im.InteriorPoint()])
def test_a_start_saves_the_steps(solver):
    args = program(batch=8, n=6, m=12, shared=SHARED, seed=4)
    first = im.qp(*args, solver=solver)
    moved = (args[0], args[1] + 1e-4, *args[2:])
    again = im.qp(*moved, solver=solver, start=first)
    torch.testing.assert_close(again.value, im.qp(*moved).value, rtol=1e-9, atol=1e-10)
    assert first.steps.min() > 0
    assert again.steps.max() == 0
    assert again.evaluations < first.evaluations


@pytest.mark.parametrize("max_steps", [10, 40])
def test_what_is_left_is_finished_also_where_there_is_no_solution(max_steps):
    Q, p, G, h, *_ = program(batch=16, n=6, m=6, shared=SHARED, seed=6)
    G = torch.cat([G, torch.eye(6, dtype=D)[:1], -torch.eye(6, dtype=D)[:1]])
    h = torch.cat([h, torch.full((16, 2), 9.0, dtype=D)], 1)
    h[5, -2:] = -1.0  # z <= -1 and z >= 1
    args = [t.requires_grad_() for t in (Q, p, G, h)]
    ours = im.qp(*args, solver=im.ADMM(max_steps=max_steps), on_failure="ignore")
    other = im.qp(*args, on_failure="ignore")
    assert ours.status.tolist() == other.status.tolist()
    assert int((ours.status == im.Status.INFEASIBLE).sum()) == 1
    good = ours.converged
    torch.testing.assert_close(ours.value[good], other.value[good], rtol=1e-9, atol=1e-10)
    found = [torch.autograd.grad(sol.value[good].pow(2).sum(), args) for sol in (ours, other)]
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


def test_a_start_elsewhere_does_no_harm():
    args = program(batch=8, n=6, m=12, shared=SHARED, seed=5)
    far = im.qp(args[0], -args[1], *args[2:])
    for solver in (im.ADMM(), im.ADMM(finish=None), im.InteriorPoint()):
        sol = im.qp(*args, solver=solver, start=far)
        torch.testing.assert_close(sol.value, im.qp(*args).value, rtol=1e-9, atol=1e-10)
    with pytest.raises(ValueError, match="start must have"):
        im.qp(*program(batch=8, n=6, m=11, shared=SHARED), start=far)


def test_batched_matrices_are_refused():
    with pytest.raises(ValueError, match=r"must be shared by the batch.*InteriorPoint"):
        im.qp(*program(), solver=im.ADMM())


def test_one_program():
    args = program(batch=None, seed=6)
    torch.testing.assert_close(im.qp(*args, solver=im.ADMM()).value, im.qp(*args).value)
    sol = im.qp(torch.eye(2, dtype=D), torch.ones(2, dtype=D), solver=im.ADMM())
    torch.testing.assert_close(sol.value, -torch.ones(2, dtype=D))
