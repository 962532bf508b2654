"""`qp` in any units: data large and small, bounds far away, and constraints that say nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, func

import implicitly as im
from implicitly.argmin.programs.program import QuadraticProgram, equilibrate
from implicitly.solution import Status
from tests.argmin.programs import D, program
from tests.problems import seeded

EYE, NONE = torch.eye(2, dtype=D), torch.zeros(2, 2, dtype=D)
# A corner at (1.6, 1.2).
G = torch.tensor([[1.0, 2], [3, 1], [-1, 0], [0, -1]], dtype=D)
H = torch.tensor([4.0, 6, 0, 0], dtype=D)
SOLVERS = [im.InteriorPoint(), im.ADMM(), im.ADMM(finish=None)]
NAMES = ["InteriorPoint", "ADMM", "ADMM-alone"]
each_solver = pytest.mark.parametrize("solver", SOLVERS, ids=NAMES)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def of(*rows: float | list[float], dtype=D) -> Tensor:
    return torch.tensor(rows, dtype=dtype)


def close(found: Tensor, right: Tensor) -> None:
    error = 1e-8 if found.dtype == D else 1e-4
    torch.testing.assert_close(found, right.to(found.dtype), rtol=error, atol=error * float(right.abs().max()))


@each_dtype
@pytest.mark.parametrize("size", [1e-14, 1e-4, 3e3, 1e5, 1e8])
def test_a_cost_of_any_size(size, dtype):
    G_, h = G.to(dtype), H.to(dtype)
    linear = im.qp(NONE.to(dtype), size * of(-1.0, -1.0, dtype=dtype), G_, h)
    close(linear.value, of(1.6, 1.2))
    close(linear.dual_inequality / size, of(0.4, 0.2, 0.0, 0.0))
    assert linear.status == Status.CONVERGED
    close(im.qp(size * EYE.to(dtype), size * of(-1.0, -2.0, dtype=dtype), G_, h).value, of(0.8, 1.6))


@each_dtype
@pytest.mark.parametrize("size", [1e-14, 1e-4, 3e3, 1e8])
def test_solutions_of_any_size(size, dtype):
    sol = im.qp(EYE.to(dtype), size * of(-3.0, -2.0, dtype=dtype), G.to(dtype), size * H.to(dtype))
    close(sol.value / size, of(1.6, 1.2))
    assert sol.status == Status.CONVERGED


def test_a_large_cost_where_Q_is_singular():
    close(im.qp(torch.diag(of(1.0, 0.0)), 1e7 * of(-1.0, -1.0), G, H).value, of(1.6, 1.2))


def test_units_of_powers_of_two_change_no_bit():
    args = program(batch=4, n=6, m=14, q=1, seed=1)
    plain = im.qp(*args)
    for unit in (2.0**-60, 2.0**60):
        Q, p, G, h, A, b = args
        scaled = im.qp(Q, unit * p, G, unit * h, A, unit * b)
        for name in ("value", "dual_inequality", "dual_equality"):
            assert torch.equal(getattr(scaled, name), unit * getattr(plain, name))
        assert torch.equal(scaled.steps, plain.steps)


@each_dtype
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e4, 1e8])
def test_bounded_linear_programs_are_not_taken_for_unbounded_ones(size, dtype):
    generator = seeded(0)
    G, x, room = (torch.randn(50, *s, generator=generator, dtype=D) for s in ((12, 5), (5,), (12,)))
    lam = torch.rand(50, 12, generator=generator, dtype=D) * (room > -0.3)
    h, p = (G @ x.unsqueeze(2))[..., 0] + room.abs(), -(G.mT @ lam.unsqueeze(2))[..., 0]
    sol = im.qp(torch.zeros(5, 5, dtype=dtype), *(t.to(dtype) for t in (size * p, G, h)))
    assert bool(sol.converged.all())


def test_a_narrow_feasible_set_far_from_the_origin():
    sol = im.qp(torch.zeros(1, 1), torch.ones(1), torch.tensor([[1.0], [-1.0]]), torch.tensor([3001.0, -3000.0]))
    assert sol.value.dtype == torch.float32
    assert float(sol.value) == 3000


@pytest.mark.parametrize("size", [1e-30, 1e-11, 1e10])
def test_what_has_no_solution_in_any_units(size):
    b = size * of(1.0, 2.0)
    assert (
        im.qp(EYE, of(0.0, 0.0), A=of([1.0, 0.0], [1.0, 0.0]), b=b, on_failure="ignore").status
        == Status.INFEASIBLE
    )
    opposite = of([1.0, 0.0], [-1.0, 0.0])
    sol = im.qp(EYE, of(0.0, 0.0), opposite, size * of(1.0, -2.0), on_failure="ignore")
    assert sol.status == Status.INFEASIBLE
    sol = im.qp(NONE, size * of(-1.0, -1.0), -EYE, of(0.0, 0.0), on_failure="ignore")
    assert sol.status == Status.UNBOUNDED


@each_dtype
def test_the_derivative_of_an_objective_in_small_units(dtype):
    p = of(-1e-4, -2e-4, dtype=dtype).requires_grad_()
    sol = im.qp(1e-4 * EYE.to(dtype), p, G.to(dtype), H.to(dtype))
    (gradient,) = torch.autograd.grad(sol.value[0], p)
    close(1e-4 * gradient, of(-0.8, 0.4))


@each_dtype
@pytest.mark.parametrize("cost", [1e-10, 1.0, 1e4])
@pytest.mark.parametrize("rows", [1e-4, 1.0, 1e6])
def test_units_of_the_cost_and_of_the_inequalities_decide_nothing(cost, rows, dtype):
    """Of a batch, some samples of which need more steps than the others."""
    units = [torch.tensor(unit, dtype=dtype) for unit in (cost, cost, rows, rows, 1.0, 1.0)]
    args = [t.to(dtype) for t in program(batch=24, n=6, m=8, q=1, shared=("Q", "G", "A"), seed=2)]
    weights = torch.randn(24, 6, generator=seeded(3), dtype=D).to(dtype)
    exact = im.qp(*(t.double() for t in args))
    lam, slack = exact.dual_inequality, exact.slack  # where both nearly vanish, rounding tells what binds
    weights[torch.maximum(lam / lam.amax(), slack).amin(1) < 5e-3] = 0
    assert int(weights.any(1).sum()) > 18
    found = []
    for tensors in (args, [t * unit for t, unit in zip(args, units)]):
        leaves = [t.clone().requires_grad_() for t in tensors]
        sol = im.qp(*leaves)
        assert bool(sol.converged.all())
        found.append((sol.value.detach(), torch.autograd.grad((weights * sol.value).sum(), leaves)))
    (value, gradients), (scaled, others) = found
    close(scaled, value)
    for gradient, other, unit in zip(gradients, others, units):
        size = float(gradient.abs().max())
        torch.testing.assert_close(other * unit, gradient, rtol=0, atol=size * (1e-7 if dtype == D else 1e-2))


# -------------------------------------------------------------------------------------------- bounds far away


@each_solver
@each_dtype
@pytest.mark.parametrize("bound", [1e3, 1e9, 1e12, 1e20, 1e30])
def test_a_bound_far_away_changes_no_derivative(bound, dtype, solver):
    p, h = of(-1.0, -0.55, dtype=dtype).requires_grad_(), of(bound, 0.5, dtype=dtype).requires_grad_()
    sol = im.qp(EYE.to(dtype), p, EYE.to(dtype), h, solver=solver)
    assert sol.status == Status.CONVERGED
    close(sol.value, of(1.0, 0.5))
    gradients = torch.autograd.grad(sol.value.sum(), (p, h))
    close(gradients[0], of(-1.0, 0.0))
    close(gradients[1], of(0.0, 1.0))


@each_dtype
@pytest.mark.parametrize("bound", [1e6, 1e20, 1e30])
def test_a_linear_program_with_bounds_far_away(bound, dtype):
    rows, h = torch.cat([G, EYE, -EYE]), torch.cat([H, bound * torch.ones(4, dtype=D)])
    sol = im.qp(NONE.to(dtype), of(-1.0, -1.0, dtype=dtype), rows.to(dtype), h.to(dtype))
    close(sol.value, of(1.6, 1.2))
    assert sol.status == Status.CONVERGED


@each_dtype
@pytest.mark.parametrize("size", [1e-18, 1e-12, 1e-8])
def test_a_bound_that_rounding_has_left_of_zero_sets_no_unit(size, dtype):
    Q, p, rows, h = (t[0].to(dtype) for t in program(batch=1, n=4, m=6, q=0, seed=7)[:4])
    exact = im.qp(Q, p, torch.cat([rows, rows[:1]]), torch.cat([h, 0 * h[:1]])).value
    close(im.qp(Q, p, torch.cat([rows, rows[:1]]), torch.cat([h, 0 * h[:1] + size])).value, exact)


def rows_of_all_sizes(seed: int, n: int, m: int, q: int) -> tuple[Tensor, ...]:
    """Sixteen programs with a feasible point of size one, and nothing said of h yet: (Q, p, G, G z, A, b)."""
    Q, p, rows, _, A, _ = program(batch=16, n=n, m=m, q=q, shared=("Q", "G", "A"), seed=seed)
    z = torch.randn(16, n, generator=seeded(seed), dtype=D)
    return Q, p, rows, z @ rows.mT, A, z @ A.mT


SHAPES = [(3, 13, 0), (7, 14, 2), (8, 9, 1), (6, 29, 0)]


@pytest.mark.parametrize(("n", "m", "q"), SHAPES)
@pytest.mark.parametrize(("steep", "dtype"), [(1.0, torch.float32), (1.0, D), (1e5, D)])
def test_bounds_of_all_sizes_are_as_good_as_none_where_they_do_not_bind(n, m, q, steep, dtype):
    Q, p, rows, Gz, A, b = rows_of_all_sizes(n + m, n, m, q)
    generator = seeded(n)
    far = torch.rand(16, m, generator=generator, dtype=D) < 0.4
    most = 1e19 if dtype == D else 1e10
    bounds = 1e6 * (most / 1e6) ** torch.rand(16, m, generator=generator, dtype=D)
    h = Gz + torch.rand(16, m, generator=generator, dtype=D)
    with_, without = (
        im.qp(*(t.to(dtype) for t in (Q, steep * p, rows, torch.where(far, away, h), A, b)))
        for away in (bounds, of(float("inf")))
    )
    assert with_.status.tolist() == without.status.tolist()
    close(with_.value, without.value)
    close(with_.dual_inequality, without.dual_inequality)
    assert int((with_.steps - without.steps).max()) <= 6


@each_dtype
@pytest.mark.parametrize(("n", "m", "q"), SHAPES)
def test_slacks_of_all_sizes(n, m, q, dtype):
    Q, p, rows, Gz, A, b = rows_of_all_sizes(n + m, n, m, q)
    wide = 6 if dtype == D else 3
    h = Gz + 10 ** (wide * (2 * torch.rand(16, m, generator=seeded(n), dtype=D) - 1))
    sol = im.qp(*(t.to(dtype) for t in (Q, p, rows, h, A, b)))
    assert bool(sol.converged.all())
    assert float(sol.steps.double().mean()) < 12
    exact = im.qp(Q, p, rows, h, A, b).value
    torch.testing.assert_close(sol.value, exact.to(dtype), rtol=1e-3, atol=1e-3 * float(exact.abs().max()))


@each_solver
def test_a_solution_far_beyond_some_bounds_and_at_others(solver):
    # The closest bound, which sets the units, has no part in it; x = 1e8 is 1e11 times as far away.
    sol = im.qp(EYE, of(-1e9, 1.0), of([1.0, 0.0], [0.0, 1.0]), of(1e8, 1e-3), solver=solver)
    close(sol.value, of(1e8, -1.0))
    assert sol.status == Status.CONVERGED
    close(sol.dual_inequality, of(9e8, 0.0))


@each_dtype
@pytest.mark.parametrize("size", [1e-7, 1e-5, 1e-3])
def test_close_bounds_on_differences_of_what_is_large(size, dtype):
    # x1 <= x2 + size, x2 <= x3 + size, ...: the bounds are small, the solution is not.
    n = 6
    rows = torch.eye(n, dtype=D)[:-1] - torch.eye(n, dtype=D)[1:]
    wanted = torch.tensor([[3.0, 1, 4, 1, 5, 9], [2, 7, 1, 8, 2, 8]], dtype=D)
    sol = im.qp(*(t.to(dtype) for t in (torch.eye(n, dtype=D), -wanted, rows, size * torch.ones(5, dtype=D))))
    exact = im.qp(torch.eye(n, dtype=D), -wanted, rows, 0 * rows[:, 0]).value
    assert sol.status.tolist() == [0, 0]
    torch.testing.assert_close(sol.value, exact.to(dtype), rtol=0, atol=1e-4 + 5 * size)


def test_cancelling_terms_of_a_large_solution_bind_nothing():
    # x is of size 1e8, and the second row a difference of two such numbers that is just not binding.
    rows, h = of([1.0, 1.0], [1.0, -1.0]), of(2e8, 1.0)
    sol = im.qp(EYE, of(-2e8, -2e8), rows, h)
    torch.testing.assert_close(sol.value, of(1e8, 1e8))
    assert sol.status == Status.CONVERGED


# ------------------------------------------------------------------------------------------- rows without entries


@each_solver
@pytest.mark.parametrize("right", [0.0, 1.0, float("inf")])
def test_a_row_without_entries_has_no_force(right, solver):
    rows, h = of([0.0, 0.0], [1.0, 0.0]).requires_grad_(), of(right, 0.5).requires_grad_()
    p = of(-3.0, 1.0).requires_grad_()
    sol = im.qp(EYE, p, rows, h, solver=solver)
    assert sol.status == Status.CONVERGED
    close(sol.value, of(0.5, -1.0))
    close(sol.dual_inequality, of(0.0, 2.5))
    assert sol.slack[0] == right
    alone = im.qp(EYE, p, rows[1:], h[1:])
    gradients, right = (
        torch.autograd.grad(s.value.sum() + s.dual_inequality.sum(), (p, rows, h)) for s in (sol, alone)
    )
    torch.testing.assert_close(gradients, right)
    assert gradients[1][0].tolist() == [0, 0]


def test_a_row_without_entries_that_excludes_all():
    sol = im.qp(EYE, of(0.0, 0.0), of([0.0, 0.0]), of(-1e-9), on_failure="ignore")
    assert sol.status == Status.INFEASIBLE


def test_samples_with_different_numbers_of_constraints():
    args = list(program(batch=3, n=4, m=6, q=0, seed=5)[:4])
    args[2][0, 4:], args[3][0, 4:] = 0.0, 0.0
    args[2][1, 2:], args[3][1, 2:] = 0.0, 0.0
    for t in args:
        t.requires_grad_()
    sol = im.qp(*args)
    for i, m in enumerate((4, 2, 6)):
        alone = im.qp(args[0][i], args[1][i], args[2][i, :m], args[3][i, :m])
        torch.testing.assert_close(sol.value[i], alone.value)
        torch.testing.assert_close(sol.dual_inequality[i, :m], alone.dual_inequality)
    assert sol.dual_inequality[0, 4:].tolist() == [0, 0]
    assert sol.status.tolist() == [0, 0, 0]


# ---------------------------------------------------------------------------------------- linear programs, corners


@pytest.mark.parametrize(("p", "row"), [((-1.0, -1.0), (1.0, 1.0)), ((-2.0, 1.0), (2.0, -1.0))])
def test_a_linear_program_with_a_repeated_row(p, row):
    sol = im.qp(NONE, of(*p), of(list(row), list(row)), of(1.0, 1.0))
    assert sol.status == Status.DEGENERATE
    torch.testing.assert_close((of(*row) * sol.value).sum(), of(1.0)[0])


def test_linear_programs_of_small_integers():
    """Which have many solutions, many multipliers, or more rows through a corner than there are unknowns."""
    for seed in range(60):
        generator = seeded(seed)

        def draw(low: int, high: int, *shape: int, generator=generator) -> Tensor:
            return torch.randint(low, high, shape, generator=generator).to(D)

        n, m, q = (
            int(torch.randint(low, high, (), generator=generator)) for low, high in ((1, 8), (1, 14), (0, 3))
        )
        x, rows, A = draw(-2, 3, n), draw(-2, 3, m, n), draw(-2, 3, q, n)
        lam = draw(0, 3, m) * draw(0, 2, m)
        h, p = rows @ x + draw(0, 3, m) * (lam == 0), -(rows.mT @ lam) - A.mT @ draw(-2, 3, q)
        sol = im.qp(torch.zeros(n, n, dtype=D), p, rows, h, A, A @ x, on_failure="ignore")
        assert bool(sol.converged), seed
        torch.testing.assert_close(p @ sol.value, p @ x, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(("n", "m"), [(5, 20), (30, 60)])
def test_a_repeated_row_that_binds_leaves_the_multipliers_open(n, m):
    Q, p, rows, h, A, b = program(batch=48, n=n, m=m, q=1, seed=n)
    sol, sample = im.qp(Q, p, rows, h, A, b), torch.arange(48)
    assert sol.status.tolist() == [0] * 48
    which = sol.dual_inequality.argmax(1)
    binds = sol.dual_inequality.amax(1) > 0.05
    assert int(binds.sum()) > 40
    place = torch.randperm(m + 1, generator=seeded(1))
    rows, h = (
        torch.cat([rows, rows[sample, which].unsqueeze(1)], 1),
        torch.cat([h, h[sample, which].unsqueeze(1)], 1),
    )
    again = im.qp(Q, p, rows[:, place], h[:, place], A, b)
    assert set(again.status[binds].tolist()) == {int(Status.DEGENERATE)}
    torch.testing.assert_close(again.value, sol.value)


# -------------------------------------------------------------------------------------------------------- vmap


@pytest.mark.parametrize("solver", [im.InteriorPoint(), im.ADMM()])
def test_vmap_without_inequalities(solver):
    p = torch.randn(4, 2, generator=seeded(2), dtype=D)
    torch.testing.assert_close(func.vmap(lambda p: im.qp(EYE, p, solver=solver).value)(p), -p)

    def loss(p: Tensor) -> Tensor:
        return im.qp(EYE, p, A=of([1.0, 1.0]), b=of(1.0), solver=solver).value.pow(2).sum()

    slopes = func.vmap(func.grad(loss))(p)
    torch.testing.assert_close(slopes, torch.stack([func.grad(loss)(x) for x in p]))


@pytest.mark.parametrize("far", [1.0, float("inf")])
def test_vmap_over_a_program_without_a_solution_raises_what_it_is(far):
    h = of([far, 1.0], [1.0, -2.0])
    rows = of([1.0, 0.0], [-1.0, 0.0])
    with pytest.raises(im.SolverError, match=r"1 of 2 samples \(1 INFEASIBLE\)") as error:
        func.vmap(lambda h: im.qp(EYE, of(1.0, 1.0), rows, h).value)(h)
    solution = error.value.solution
    assert solution.status[1] == Status.INFEASIBLE
    torch.testing.assert_close(solution.value[0], of(-1.0, -1.0))
    torch.testing.assert_close(solution.slack[0], of(far + 1, 0.0))


# --------------------------------------------------------------------------------------------- empty programs


@pytest.mark.parametrize("lead", [(), (3,)])
@pytest.mark.parametrize("solver", [im.InteriorPoint(), im.ADMM()])
def test_no_unknowns(lead, solver):
    def zeros(*shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=D)

    p, h = zeros(*lead, 0), of(1.0).requires_grad_()
    assert im.qp(zeros(0, 0), p, solver=solver).value.shape == (*lead, 0)
    sol = im.qp(zeros(0, 0), p, zeros(1, 0), h, solver=solver)
    assert sol.slack.tolist() == zeros(*lead, 1).add(1).tolist()
    assert torch.autograd.grad(sol.slack.sum(), h)[0].tolist() == [len(sol.slack.reshape(-1))]
    empty = im.qp(zeros(0, 0), p, zeros(1, 0), of(-1.0), solver=solver, on_failure="ignore")
    assert set(empty.status.reshape(-1).tolist()) == {int(Status.INFEASIBLE)}


def test_the_scaled_program_has_a_solution_of_size_one():
    args = [t * s for t, s in zip(program(batch=3, n=4, m=6, q=1, seed=3), (1e-6, 1e3, 1.0, 1e9, 1.0, 1e9))]
    _, scaling = equilibrate(QuadraticProgram(*args))
    sol = im.qp(*args)
    w = torch.cat([sol.value, sol.dual_equality, sol.dual_inequality], 1) / scaling.w
    assert bool((w[:, :4].abs().amax(1) > 1e-2).all())
    assert w.abs().max() < 1e2


@pytest.mark.parametrize("low", [0.0, -1.0])
@pytest.mark.parametrize("high", [2.0, float("inf")])
@pytest.mark.parametrize("power", [4, 7, 10])
def test_bounds_on_unknowns_in_units_of_their_own(power, high, low):
    """Bounds are rows of one entry each, which say nothing on how the sizes of columns compare."""
    n = 6
    g, E = seeded(1), 0.1 ** torch.linspace(0, power, n, dtype=D)
    G_, A, p = (torch.randn(*shape, generator=g, dtype=D) for shape in ((3, n), (2, n), (8, n)))
    x, p = 1.8 * torch.rand(n, generator=g, dtype=D), p.abs() if high > 2 else p
    h, b = G_ @ x + 0.3, A @ x

    def solved(E: Tensor) -> list[Tensor]:
        bounds = torch.full((n,), high, dtype=D) / E, torch.full((n,), -low, dtype=D) / E
        right, equal = h.clone().requires_grad_(), b.clone().requires_grad_()
        rows = torch.cat([G_ * E, torch.eye(n, dtype=D), -torch.eye(n, dtype=D)])
        sol = im.qp(torch.zeros(n, n, dtype=D), p * E, rows, torch.cat([right, *bounds]), A * E, equal)
        assert (sol.status == Status.CONVERGED).all()
        weights = torch.arange(8.0 * n, dtype=D).view(8, n)
        return [sol.value.detach() * E, *torch.autograd.grad((sol.value * E * weights).sum(), (right, equal))]

    for found, right in zip(solved(E), solved(torch.ones(n, dtype=D))):
        close(found, right)


def test_of_bounds_that_samples_have_for_themselves_the_nearest_tell_the_units():
    """The matrices stay shared, so that the columns have one scaling for all."""
    E, bounds = of(1.0, 1e-8), of([1.0, 2.0, 0.0, 0.0], [2.0, 1.0, 0.0, 0.0], [1.0, 1e4, 0.0, 0.0])
    h = torch.cat([of([2.5]).expand(3, 1), bounds / E.repeat(2)], 1)
    sol = im.qp(NONE, of(-1.0, -2.0) * E, torch.cat([E.unsqueeze(0), EYE, -EYE]), h)
    close(sol.value * E, of([0.5, 2.0], [1.5, 1.0], [0.0, 2.5]))
