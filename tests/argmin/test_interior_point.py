"""`InteriorPoint` beside Clarabel and HiGHS, and on programs that are hard in one way or another."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import implicitly as im
from implicitly.argmin.programs.polish import System
from implicitly.argmin.programs.program import QuadraticProgram, equilibrate
from implicitly.solution import Status
from tests.argmin.programs import D, program, sample
from tests.problems import seeded


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=D)


@pytest.mark.parametrize(("n", "m", "q"), [(8, 6, 2), (6, 20, 2), (10, 4, 0)])
def test_solutions_are_clarabels(n, m, q):
    clarabel = pytest.importorskip("clarabel")
    sparse = pytest.importorskip("scipy.sparse")
    args = program(batch=8, n=n, m=m, q=q, seed=1)
    sol = im.qp(*args)
    settings = clarabel.DefaultSettings()
    settings.verbose = False
    settings.tol_gap_abs = settings.tol_gap_rel = settings.tol_feas = 1e-11
    for i in range(8):
        Q, p, G, h, A, b = sample(args, i)
        cones = [clarabel.ZeroConeT(q), clarabel.NonnegativeConeT(m)]
        rows, right = sparse.csc_matrix(torch.cat([A, G]).numpy(force=True)), torch.cat([b, h]).numpy(force=True)
        Q, p = sparse.csc_matrix(Q.numpy(force=True)), p.numpy(force=True)
        other = clarabel.DefaultSolver(Q, p, rows, right, cones, settings).solve()
        torch.testing.assert_close(sol.value[i], torch.tensor(other.x, dtype=D), rtol=1e-6, atol=1e-7)
        duals = torch.cat([sol.dual_equality[i], sol.dual_inequality[i]])
        torch.testing.assert_close(duals, torch.tensor(other.z, dtype=D), rtol=1e-5, atol=1e-6)


def test_linear_programs_are_those_of_highs():
    optimize = pytest.importorskip("scipy.optimize")
    n, m = 6, 14
    G, c = draw(8, m, n, seed=1), draw(8, n, seed=2)
    h = draw(8, m, seed=3).abs() + 0.1
    box = torch.eye(n, dtype=D).expand(8, n, n)
    G, h = torch.cat([G, box, -box], 1), torch.cat([h, torch.ones(8, 2 * n, dtype=D)], 1)
    A, b = draw(8, 1, n, seed=4), torch.zeros(8, 1, dtype=D)
    c.requires_grad_(), h.requires_grad_()
    sol = im.qp(torch.zeros(n, n, dtype=D), c, G, h, A, b)
    assert sol.residual.max() < 1e-9
    for i in range(8):
        arrays = (t[i].detach().numpy(force=True) for t in (c, G, h, A, b))
        other = optimize.linprog(*arrays, bounds=(None, None), method="highs")
        torch.testing.assert_close((c[i] @ sol.value[i]).item(), other.fun, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(sol.value[i].detach(), torch.tensor(other.x, dtype=D), rtol=1e-7, atol=1e-7)
    # At a vertex z does not move with c, and the value moves with h as the multipliers say.
    (of_h,) = torch.autograd.grad((c.detach() * sol.value).sum(), h)
    torch.testing.assert_close(of_h, -sol.dual_inequality.detach(), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("power", [0, 3, 6])
def test_badly_scaled_programs(power):
    args = list(program(batch=6, n=6, m=8, q=1, seed=2))
    rows, columns = (torch.logspace(-power, power, k, dtype=D) for k in (8, 6))
    exact = im.qp(*args).value
    args[0] = args[0] * columns.unsqueeze(0) * columns.unsqueeze(1)
    args[1], args[4] = args[1] * columns, args[4] * columns
    args[2], args[3] = args[2] * columns * rows.unsqueeze(1), args[3] * rows
    sol = im.qp(*args)
    torch.testing.assert_close(sol.value * columns, exact, rtol=1e-6, atol=1e-6)
    assert sol.steps.max() < 20


def test_a_singular_Q_whose_solution_is_unique():
    args = list(program(batch=6, n=6, m=30, q=1, seed=3))
    L = draw(6, 6, 2, seed=4)
    args[0] = L @ L.mT  # of rank 2
    sol = im.qp(*args)
    assert sol.residual.max() < 1e-9
    assert bool(sol.converged.all())
    for t in args:
        t.requires_grad_()
    weights = draw(6, 6, seed=5)
    found = torch.autograd.grad((weights * im.qp(*args).value).sum(), args[1:4])
    directions = [draw(*t.shape, seed=6 + i) for i, t in enumerate(args[1:4])]
    ends = []
    for step in (1e-6, -1e-6):
        with torch.no_grad():
            moved = [t + step * d for t, d in zip(args[1:4], directions)]
            ends.append((weights * im.qp(args[0], *moved, *args[4:]).value).sum())
    along = sum((g * d).sum() for g, d in zip(found, directions))
    torch.testing.assert_close(along, (ends[0] - ends[1]) / 2e-6, rtol=1e-6, atol=1e-6)


def test_many_inequalities_through_one_corner():
    """More of them bind than there are unknowns."""
    G = draw(12, 3, seed=7)
    h = G @ torch.ones(3, dtype=D)
    sol = im.qp(torch.eye(3, dtype=D), -(torch.ones(3, dtype=D) + G[:5].sum(0)), G, h)
    torch.testing.assert_close(sol.value, torch.ones(3, dtype=D), rtol=1e-8, atol=1e-8)
    assert sol.status == Status.DEGENERATE


def test_all_that_can_happen_in_one_batch():
    n = 4
    Q, p = torch.eye(n, dtype=D).repeat(40, 1, 1), draw(40, n, seed=8)
    G, h = draw(40, 10, n, seed=9), draw(40, 10, seed=10).abs()
    Q[10:20] = 0  # bounded or not as the ten half-spaces have it
    G[20:30, 1] = -G[20:30, 0]
    h[20:30, 1] = -h[20:30, 0] - 0.1  # empty
    sol = im.qp(Q, p, G, h, on_failure="ignore")
    assert sol.status[:10].tolist() == [0] * 10
    assert sol.status[20:30].tolist() == [Status.INFEASIBLE] * 10
    assert sol.status[30:].tolist() == [0] * 10
    # A linear program has a solution where -p is a combination of the rows of G with factors >= 0.
    optimize = pytest.importorskip("scipy.optimize")
    for i in range(10, 20):
        dual = optimize.linprog(
            h[i].numpy(force=True), A_eq=G[i].mT.numpy(force=True), b_eq=-p[i].numpy(force=True), method="highs"
        )
        assert sol.status[i] == (0 if dual.status == 0 else Status.UNBOUNDED), i


def test_float32_solves_to_float32():
    args = program(batch=32, n=10, m=12, q=2, seed=11, dtype=torch.float32)
    sol = im.qp(*args)
    assert sol.value.dtype == torch.float32
    exact = im.qp(*(t.double() for t in args)).value
    torch.testing.assert_close(sol.value.double(), exact, rtol=2e-3, atol=2e-3)
    for t in args:
        t.requires_grad_()
    wide = [t.detach().double().requires_grad_() for t in args]
    ours = torch.autograd.grad(im.qp(*args).value.sum(), args)
    others = torch.autograd.grad(im.qp(*wide).value.sum(), wide)
    for a, b in zip(ours, others):
        assert float((a - b).norm()) < 1e-2 * float(b.norm())


def test_the_tolerance_can_be_chosen():
    args = program(batch=8, n=6, m=8, seed=12)
    exact = im.qp(*args).value
    assert float((im.qp(*args, solver=im.InteriorPoint(rtol=1e-12)).value - exact).norm()) < 1e-10
    loose = im.qp(*args, solver=im.InteriorPoint(rtol=1e-3))
    assert bool(loose.converged.all())


@pytest.mark.parametrize(("n", "m"), [(20, 40), (20, 24)])
def test_steps_go_on_where_the_active_set_cannot_be_told_yet(n, m, monkeypatch):
    def near(self, system, embedded, start=None, begin=None):
        calls.append((embedded, start, plain(self, system, embedded, start, begin)))
        return calls[-1][2]

    calls, plain = [], im.InteriorPoint._near
    monkeypatch.setattr(im.InteriorPoint, "_near", near)
    args = program(batch=512, n=n, m=m, q=0, seed=14)
    sol = im.qp(*args, solver=im.InteriorPoint(rtol=1e-6))
    assert float(sol.residual.max()) < 1e-10
    # Those on the embedding, which start again, are not needed.
    assert [(embedded, start is None) for embedded, start, _ in calls] == [(False, True), (False, False)]
    (_, _, first), (_, start, second) = calls
    assert 0 < len(start.w) < 512 / 4
    assert bool((start.status == Status.CONVERGED).all())
    further = sol.steps > first.steps
    assert sol.steps[further].tolist() == (start.steps + second.steps).tolist()
    assert sol.steps[~further].tolist() == first.steps[~further].tolist()


@pytest.mark.parametrize("condensed", [True, False])
def test_a_point_that_needs_no_step_tells_what_binds(condensed):
    args = [t.double() for t in program(batch=16, n=6, m=8, q=2, seed=3)]
    system = System.of(*equilibrate(QuadraticProgram(*args)))
    system = system if condensed else system.plain()
    solver = im.InteriorPoint(rtol=1e-6)
    near = im.InteriorPoint(rtol=1e-12)._near(system, False, solver._near(system, False))
    again = solver._near(system, False, near)
    assert again.steps.tolist() == [0] * 16
    assert again.binding.tolist() == (near.w[:, 8:] > near.slack).tolist()
    assert bool(again.binding.any())


@pytest.mark.parametrize("digits", [2, 4])
def test_steps_that_go_round_in_circles_do_so_not_forever(digits):
    # A projection onto eight half-planes, on which Mehrotra's steps with all of their second-order term cycle.
    G = [[0.7052, 0.4328, 0.2407, -0.4483, -0.3828, -0.41, -0.4718, 0.1073]]
    G += [[-0.1342, 0.4175, 0.6822, 0.4171, -0.5781, -0.7021, -0.6996, -0.1225]]
    h = [0.6329, 0.6734, 0.7105, 0.6497, 0.7547, 0.3984, 0.4597, 0.6934]
    G, h, p = (torch.tensor(t, dtype=D).mul(10**digits).round() / 10**digits for t in (G, h, [1.3736, 1.0883]))
    sol = im.qp(torch.eye(2, dtype=D), p, G.mT, h)
    assert sol.status == Status.CONVERGED
    assert float(sol.residual) < 1e-12


@pytest.mark.parametrize("seed", [1, 8, 14])
def test_multipliers_that_grow_without_end_do_not_pass_for_a_solution(seed):
    # The last row is minus a positive combination of others, its bound a little less than theirs.
    generator = seeded(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(64, *shape, generator=generator, dtype=D)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(64, *shape, generator=generator, dtype=D)

    L, p, G, A, z0 = normal(20, 20), normal(20), normal(30, 20), normal(4, 20), normal(20, 1)
    h = (G @ z0)[..., 0] + uniform(30)
    weights = uniform(29) * (uniform(29) < 0.5)
    G[:, -1], h[:, -1] = -(weights.unsqueeze(1) @ G[:, :-1])[:, 0], -(weights * h[:, :-1]).sum(1) - 0.1
    Q = L @ L.mT + 0.01 * torch.eye(20, dtype=D)
    sol = im.qp(Q, p, G, h, A, (A @ z0)[..., 0], on_failure="ignore")
    assert not sol.converged.any()
    assert (sol.status == Status.INFEASIBLE).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_only_proof_of_infeasibility_may_need_multipliers_of_all_sizes(dtype):
    # Half of the inequalities contradict each other in one way, the others leave room in every other direction.
    generator = seeded(0)
    L, A, G = (torch.randn(64, k, 50, generator=generator, dtype=dtype) for k in (50, 10, 50))
    p, b, h = (torch.randn(64, k, generator=generator, dtype=dtype) for k in (50, 10, 50))
    weights = 0.1 + torch.rand(64, 24, generator=generator, dtype=dtype)
    G[:, 24], h[:, 24] = -(weights.unsqueeze(1) @ G[:, :24])[:, 0], -(weights * h[:, :24]).sum(1) - 0.5
    sol = im.qp(L @ L.mT / 50 + 0.1 * torch.eye(50, dtype=dtype), p, G, h, A, b, on_failure="ignore")
    assert (sol.status == Status.INFEASIBLE).all()
    assert sol.steps.max() < 30


def test_a_slow_start_is_no_stagnation():
    # One of these 4,096 programs has an active set that cannot be told before the last steps, and τ grows slowly.
    generator = seeded(0)
    L = torch.rand(20, 20, generator=generator, dtype=D)
    G = torch.randn(40, 20, generator=generator, dtype=D)
    torch.randn(0, 20, generator=generator, dtype=D)
    z0, p = (torch.randn(4096, 20, generator=generator, dtype=D) for _ in range(2))
    h = z0 @ G.T + torch.rand(4096, 40, generator=generator, dtype=D)
    sol = im.qp(L @ L.mT + 0.1 * torch.eye(20, dtype=D), p[700:740], G, h[700:740])
    assert (sol.residual < 1e-9).all()
