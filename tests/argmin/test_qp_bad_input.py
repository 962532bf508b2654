"""Programs without a solution, or with more than one, and input that cannot be meant."""

from __future__ import annotations

import pytest
import torch

import implicitly as im
from implicitly.solution import Status
from tests.argmin.programs import D, program

EYE = torch.eye(2, dtype=D)
SOLVERS = [im.InteriorPoint(), im.ADMM(), im.ADMM(finish=None)]
NAMES = ["InteriorPoint", "ADMM", "ADMM-alone"]
each_solver = pytest.mark.parametrize("solver", SOLVERS, ids=NAMES)


def of(*rows: float | list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=D)


@each_solver
def test_infeasible_samples_are_told_from_the_others(solver):
    h = of([-1.0, 2.0], [-1.0, -1.0], [0.5, 1.0])  # z <= h0 and -z <= h1: the middle one contradicts itself
    G = of([1.0, 0.0], [-1.0, 0.0])
    h.requires_grad_()
    with pytest.raises(im.SolverError, match=r"1 of 3 samples \(1 INFEASIBLE\).*sample 1.*relax") as error:
        im.qp(EYE, of(0.5, 1.0), G, h, solver=solver)
    assert error.value.solution.status.tolist() == [0, 8, 0]
    with pytest.warns(im.ConvergenceWarning, match="INFEASIBLE"):
        im.qp(EYE, of(0.5, 1.0), G, h, solver=solver, on_failure="warn")
    sol = im.qp(EYE, of(0.5, 1.0), G, h, solver=solver, on_failure="ignore")
    torch.testing.assert_close(sol.value[[0, 2]], of([-1.0, -1.0], [-0.5, -1.0]))
    for t in (sol.value, sol.slack, sol.dual_inequality):
        assert bool(t[1].isnan().all())
    (gradient,) = torch.autograd.grad(sol.value[:, 0].nan_to_num().sum(), h)
    assert gradient[1].tolist() == [0, 0]
    assert bool(gradient.isfinite().all())


@each_solver
def test_contradicting_equalities_and_redundant_ones(solver):
    A = of([1.0, 1.0], [1.0, 1.0])
    b = of([1.0, 2.0], [1.0, 1.0]).requires_grad_()
    sol = im.qp(EYE, of(0.0, 0.0), A=A, b=b, solver=solver, on_failure="ignore")
    assert sol.status.tolist() == [Status.INFEASIBLE, Status.DEGENERATE]
    torch.testing.assert_close(sol.value[1], of(0.5, 0.5))
    torch.testing.assert_close(sol.dual_equality[1].sum(), torch.tensor(-0.5, dtype=D))
    (gradient,) = torch.autograd.grad(sol.value[1, 0], b)
    torch.testing.assert_close(gradient, of([0.0, 0.0], [0.25, 0.25]))  # each may move it, by half of half


@each_solver
def test_unbounded_samples(solver):
    p = of([-1.0, -1.0], [1.0, 2.0])
    sol = im.qp(torch.zeros(2, 2, dtype=D), p, -EYE, torch.zeros(2, dtype=D), solver=solver, on_failure="ignore")
    assert sol.status.tolist() == [Status.UNBOUNDED, Status.CONVERGED]
    torch.testing.assert_close(sol.value[1], of(0.0, 0.0))
    with pytest.raises(im.SolverError, match=r"UNBOUNDED.*add constraints"):
        im.qp(torch.diag(of(1.0, 0.0)), of(0.0, 1.0), solver=solver)


@each_solver
def test_nan_harms_its_own_sample_alone(solver):
    args = program(shared=("Q", "G", "A"), seed=1)
    clean = im.qp(*args, solver=solver)
    args[1][1, 2] = float("nan")
    args[5][2, 0] = float("inf")
    for t in args:
        t.requires_grad_()
    sol = im.qp(*args, solver=solver, on_failure="ignore")
    assert sol.status.tolist() == [0, Status.NON_FINITE, Status.NON_FINITE]
    torch.testing.assert_close(sol.value[0], clean.value[0])
    gradients = torch.autograd.grad(sol.value.nan_to_num().sum() + sol.slack.nan_to_num().sum(), args)
    assert all(bool(g.isfinite().all()) for g in gradients)
    assert gradients[1][1].tolist() == [0] * 4
    everything = [torch.full_like(t, float("nan")) for t in args]
    assert set(im.qp(*everything, on_failure="ignore").status.tolist()) == {Status.NON_FINITE}


def test_what_is_not_finite_is_named():
    args = program(shared=("Q", "A"), seed=1)
    args[1][1, 2] = float("nan")
    args[5][2, 0] = -float("inf")
    args[3][0, 0] = float("inf")  # no bound at all
    with pytest.raises(im.SolverError, match=r"2 NON_FINITE.*Try: NaN or inf is in p of sample 1, b of sample 2"):
        im.qp(*args)
    args[0][0, 0] = float("nan")
    with pytest.raises(im.SolverError, match=r"3 NON_FINITE.*NaN or inf is in Q, p of sample 1, b of sample 2"):
        im.qp(*args)


def test_infinite_bounds():
    args = program(seed=2)
    h = args[3].clone()
    h[:, 1] = float("inf")
    h.requires_grad_()
    sol = im.qp(args[0], args[1], args[2], h, *args[4:])
    kept = [0, 2, 3, 4]
    without = im.qp(args[0], args[1], args[2][:, kept], args[3][:, kept], *args[4:])
    torch.testing.assert_close(sol.value, without.value)
    assert bool(sol.slack[:, 1].isinf().all())
    assert sol.dual_inequality[:, 1].tolist() == [0] * 3
    (gradient,) = torch.autograd.grad(sol.value.sum(), h)
    assert gradient[:, 1].tolist() == [0] * 3
    h = args[3].clone()
    h[0, 0] = -float("inf")
    assert im.qp(*args[:3], h, *args[4:], on_failure="ignore").status.tolist() == [Status.INFEASIBLE, 0, 0]


def test_a_constraint_that_binds_without_force():
    p, h = of(-1.0, 0.0).requires_grad_(), of(1.0).requires_grad_()
    sol = im.qp(EYE, p, of([1.0, 0.0]), h)  # without it, z = (1, 0)
    assert sol.status == Status.DEGENERATE
    assert bool(sol.converged)
    torch.testing.assert_close(sol.value, of(1.0, 0.0))
    gradient = torch.autograd.grad(sol.value.sum(), (p, h))
    torch.testing.assert_close(gradient[0], of(-1.0, -1.0))  # that of the side where it does not bind
    torch.testing.assert_close(gradient[1], of(0.0))


def test_constraints_that_say_the_same():
    p, h = of([-3.0]).requires_grad_(), of(1.0, 1.0).requires_grad_()
    sol = im.qp(torch.eye(1, dtype=D), p, torch.ones(2, 1, dtype=D), h)
    assert sol.status.tolist() == [Status.DEGENERATE]
    torch.testing.assert_close(sol.dual_inequality, of([1.0, 1.0]))
    of_z = torch.autograd.grad(sol.value.sum(), (p, h), retain_graph=True)
    torch.testing.assert_close(of_z[0], of([0.0]))
    torch.testing.assert_close(of_z[1], of(0.5, 0.5))  # the least of those that sum to 1
    of_dual = torch.autograd.grad(sol.dual_inequality.sum(), (p, h))
    torch.testing.assert_close(of_dual[0], of([-1.0]))
    torch.testing.assert_close(of_dual[1].sum(), torch.tensor(-1.0, dtype=D))


def test_a_linear_program_with_many_solutions():
    sol = im.qp(torch.zeros(2, 2, dtype=D), of(-1.0, -1.0), torch.cat([of([1.0, 1.0]), -EYE]), of(1.0, 0.0, 0.0))
    assert sol.status == Status.DEGENERATE
    torch.testing.assert_close(sol.value.sum(), torch.tensor(1.0, dtype=D))


def test_an_indefinite_Q_is_refused_with_its_eigenvalue():
    Q = torch.stack([EYE, torch.diag(of(1.0, -0.25))])
    with pytest.raises(ValueError, match=r"eigenvalue of sample 1 is -0.25.*1 of 2 samples"):
        im.qp(Q, of(0.0, 0.0))
    with pytest.raises(ValueError, match=r"positive semidefinite.* outside of torch\.autocast"):
        im.qp(-EYE, of(0.0, 0.0), EYE, of(1.0, 1.0))


def test_Q_is_symmetrised_and_so_is_its_gradient():
    Q = of([2.0, 1.0], [0.0, 2.0]).requires_grad_()
    p = of(1.0, -3.0)
    sol = im.qp(Q, p)
    torch.testing.assert_close(sol.value, torch.linalg.solve((Q + Q.T) / 2, -p))
    (gradient,) = torch.autograd.grad(sol.value[0], Q)
    torch.testing.assert_close(gradient, gradient.T)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"p": torch.zeros(3, dtype=D)}, r"p must be \(2,\), or \(B, 2\).*got \(3,\)"),
        ({"Q": torch.zeros(2, 3, dtype=D)}, r"Q must be \(n, n\) or \(B, n, n\), got \(2, 3\)"),
        ({"G": torch.zeros(4, 3, dtype=D)}, r"G must be \(4, 2\).*got \(4, 3\)"),
        ({"G": torch.zeros(2, dtype=D)}, r"G must be \(m, 2\) or \(B, m, 2\), got \(2,\)"),
        ({"h": torch.zeros(3, dtype=D)}, r"h must be \(1,\).*got \(3,\)"),
        ({"b": torch.zeros(2, 3, dtype=D)}, r"b must be \(1,\), or \(B, 1\).*got \(2, 3\)"),
        ({"h": None}, "G and h must be passed together: got only G"),
        ({"A": None}, "A and b must be passed together: got only b"),
        ({"p": torch.zeros(3, 2, dtype=D), "h": torch.zeros(4, 1, dtype=D)}, "disagree on the batch.*p 3, h 4"),
        ({"p": torch.zeros(2)}, "mix dtypes.*p torch.float32"),
        ({"p": torch.zeros(2, dtype=D, device="meta")}, "mix devices.*p meta"),
    ],
)
def test_what_does_not_fit_together(change, message):
    given = {
        "Q": EYE,
        "p": of(0.0, 0.0),
        "G": of([1.0, 0.0]),
        "h": of(1.0),
        "A": of([1.0, 1.0]),
        "b": of(1.0),
    } | change
    with pytest.raises(ValueError, match=message):
        im.qp(**given)


def test_what_is_no_program():
    with pytest.raises(TypeError, match="p must be a tensor, got a list"):
        im.qp(EYE, [0.0, 0.0])
    with pytest.raises(TypeError, match=r"p has dtype torch\.int64"):
        im.qp(EYE, torch.zeros(2, dtype=torch.int64))
    with pytest.raises(TypeError, match="bfloat16"):
        im.qp(EYE.bfloat16(), torch.zeros(2, dtype=torch.bfloat16))
    with pytest.raises(TypeError, match=r"Q is a tensor of torch\.sparse_coo.*pass Q\.to_dense\(\)"):
        im.qp(EYE.to_sparse(), of(0.0, 0.0))
    with pytest.raises(TypeError, match="solver must be InteriorPoint"):
        im.qp(EYE, of(0.0, 0.0), solver=im.Newton())
    with pytest.raises(TypeError, match="adjoint must be a KKTAdjoint"):
        im.qp(EYE, of(0.0, 0.0), adjoint=im.ImplicitAdjoint())
    with pytest.raises(TypeError, match=r"start must be a ProgramSolution that an earlier im\.qp returned"):
        im.qp(EYE, of(0.0, 0.0), start=of(0.0, 0.0))
    with pytest.raises(ValueError, match="on_failure"):
        im.qp(EYE, of(0.0, 0.0), on_failure="maybe")
    narrow = im.qp(EYE.float(), torch.zeros(2))
    with pytest.raises(ValueError, match=r"start has dtype torch\.float32, but the program has torch\.float64"):
        im.qp(EYE, of(0.0, 0.0), start=narrow)
    with pytest.raises(TypeError, match="finish must be a solver of programs"):
        im.ADMM(finish="InteriorPoint")
    with pytest.raises(TypeError, match="smoothing must be a number, got a Tensor"):
        im.KKTAdjoint(smoothing=of(0.1))


def test_options_out_of_range():
    with pytest.raises(ValueError, match="rtol must be between 0 and 1"):
        im.InteriorPoint(rtol=0.0)
    with pytest.raises(ValueError, match="max_steps"):
        im.ADMM(max_steps=0)
    with pytest.raises(ValueError, match="relaxation between 0 and 2"):
        im.ADMM(relaxation=2.0)
    with pytest.raises(ValueError, match="cannot reach rtol=1e-12"):
        im.qp(EYE.float(), torch.zeros(2), solver=im.InteriorPoint(rtol=1e-12))


@pytest.mark.parametrize("solver", [im.InteriorPoint(), im.ADMM()])
def test_an_empty_batch_and_no_unknowns(solver):
    shared = {"G": of([1.0, 0.0]), "h": of(1.0), "solver": solver}
    sol = im.qp(EYE, torch.zeros(0, 2, dtype=D), **shared)
    assert sol.value.shape == (0, 2)
    assert sol.status.shape == (0,)
    assert im.qp(EYE, torch.zeros(0, 2, dtype=D), solver=solver).value.shape == (0, 2)


def test_a_start_of_an_empty_batch():
    none = torch.zeros(0, 2, dtype=D)
    assert im.qp(EYE, none, start=im.qp(EYE, none)).value.shape == (0, 2)


def test_steps_that_run_out():
    with pytest.raises(im.SolverError, match=r"MAX_STEPS.*max_steps"):
        im.qp(*program(m=8, seed=3), solver=im.InteriorPoint(max_steps=1))


@pytest.mark.parametrize("name", ["G", "A"])
def test_an_empty_vector_in_place_of_a_matrix_is_refused_with_the_remedy(name):
    Q, p, none = torch.eye(3), torch.ones(3), torch.Tensor()
    args = (none, none) if name == "G" else (torch.eye(3), torch.ones(3), none, none)
    with pytest.raises(ValueError, match=f"{name} is an empty vector, not a matrix: leave {name} .* pass None"):
        im.qp(Q, p, *args)
