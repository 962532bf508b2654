"""What is stored for backward does not grow with iterations, and nothing is kept for longer than needed."""

from __future__ import annotations

import gc
import resource
import weakref

import pytest
import torch
from torch import nn

import implicitly as im
from tests.contracts import ADJOINTS, SOLVERS
from tests.leaks import bytes_of, living_tensors, saved_tensors
from tests.problems import Cell, draw

D = torch.float64
X = draw(16, 32, seed=61)
Z0 = torch.zeros(16, 32, dtype=D)
pytestmark = pytest.mark.usefixtures("only_what_the_test_makes")


def wide_cell() -> Cell:
    return Cell(32, norm=0.9)


def saved_for_backward(iterations: int, adjoint, solver=im.FixedPointIteration) -> int:
    """Bytes that autograd keeps after a solve of exactly so many iterations."""
    cell = wide_cell()
    with saved_tensors() as saved:
        value = im.fixed_point(cell, Z0, X, solver=solver(rtol=0, max_steps=iterations), adjoint=adjoint).value
    assert value.requires_grad
    return bytes_of(saved)


def kept_alive(iterations: int, adjoint, solver=im.FixedPointIteration) -> int:
    """Bytes of all tensors alive beside those before, while only the value is held (closures count, too)."""
    cell = wide_cell()
    gc.collect()
    before = bytes_of(living_tensors())
    value = im.fixed_point(cell, Z0, X, solver=solver(rtol=0, max_steps=iterations), adjoint=adjoint).value
    gc.collect()
    assert value.requires_grad
    return bytes_of(living_tensors()) - before


INDEPENDENT = [im.ImplicitAdjoint(), im.PhantomAdjoint(steps=2), im.JacobianFreeAdjoint()]


@pytest.mark.parametrize("adjoint", INDEPENDENT, ids=lambda a: type(a).__name__)
@pytest.mark.parametrize("measure", [saved_for_backward, kept_alive])
def test_bytes_for_backward_do_not_depend_on_the_number_of_iterations(measure, adjoint):
    assert measure(5, adjoint) == measure(500, adjoint)


@pytest.mark.parametrize("solver", [im.Anderson, im.Broyden], ids=lambda s: s.__name__)
def test_bytes_for_backward_do_not_depend_on_the_history_of_the_solver(solver):
    # rtol=0 goes on where nothing is left to gain; what the iterates are does not matter here.
    few, many = (saved_for_backward(n, im.ImplicitAdjoint(), solver) for n in (5, 60))
    assert few == many
    plain = saved_for_backward(5, im.ImplicitAdjoint())
    assert kept_alive(30, im.ImplicitAdjoint(), solver) <= kept_alive(30, im.ImplicitAdjoint()) + plain


def test_the_implicit_adjoint_stores_less_than_two_recorded_iterations():
    one = saved_for_backward(2, im.UnrolledAdjoint()) - saved_for_backward(1, im.UnrolledAdjoint())
    shared = bytes_of([*wide_cell().parameters(), X])
    assert saved_for_backward(50, im.ImplicitAdjoint()) <= shared + 2 * one


def test_unrolling_stores_every_iteration():
    ten, twenty, forty = (saved_for_backward(n, im.UnrolledAdjoint()) for n in (10, 20, 40))
    assert forty - twenty == pytest.approx(2 * (twenty - ten), rel=0.01)
    assert forty > 3 * ten


def test_nothing_is_stored_where_nothing_requires_a_gradient():
    with torch.no_grad(), saved_tensors() as saved:
        im.fixed_point(wide_cell(), Z0, X)
    assert not saved


# ---------------------------------------------------------------------------------------------- leaks


def train(steps: int, cell: Cell, optimiser, call) -> None:
    for _ in range(steps):
        loss = call(cell).value.square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


def counts_over_training(call, steps: int) -> tuple[int, int, int]:
    """Living tensors after some training steps and after many more, and the growth of the peak in MiB."""
    cell = wide_cell()
    optimiser = torch.optim.SGD(cell.parameters(), lr=1e-3)
    train(10, cell, optimiser, call)
    gc.collect()
    early, peak = len(living_tensors()), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    train(steps, cell, optimiser, call)
    gc.collect()
    growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
    return early, len(living_tensors()), growth // 1024


FITTING = [a for a in ADJOINTS if a.needs_solver is None] + [a for a in ADJOINTS if a.needs_solver]


@pytest.mark.parametrize("adjoint", FITTING, ids=lambda a: a.name)
def test_training_leaks_no_tensor_whatever_the_adjoint(adjoint):
    options = {"solver": im.Broyden(rtol=1e-3), "adjoint": adjoint.make(1e-3)}
    early, late, _ = counts_over_training(lambda cell: im.fixed_point(cell, Z0, X, **options), 20)
    assert late == early


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: s.name)
def test_training_leaks_no_tensor_whatever_the_solver(solver):
    early, late, _ = counts_over_training(
        lambda cell: im.fixed_point(cell, Z0, X, solver=solver.make(rtol=1e-3), in_dims=0), 20
    )
    assert late == early


def test_memory_is_flat_over_a_thousand_training_steps():
    adjoint = im.ImplicitAdjoint(rtol=1e-2)
    call = lambda cell: im.fixed_point(cell, Z0, X, solver=im.Anderson(rtol=1e-2), adjoint=adjoint)  # noqa: E731
    early, late, growth = counts_over_training(call, 1000)
    assert late == early
    assert growth <= 4  # MiB; a leak of one call's graph a step would be 40 or more


@pytest.mark.parametrize("adjoint", FITTING, ids=lambda a: a.name)
def test_no_reference_cycle_keeps_a_solution_alive(adjoint):
    x = X.clone().requires_grad_()
    gc.collect()
    gc.disable()
    try:
        before = len(living_tensors())
        solution = im.fixed_point(wide_cell(), Z0, x, solver=im.Broyden(), adjoint=adjoint.make(1e-6))
        reference = weakref.ref(solution.value)
        torch.autograd.grad(solution.value.sum(), x)
        del solution
        assert reference() is None
        assert len(living_tensors()) == before
    finally:
        gc.enable()


def test_samples_that_failed_keep_nothing_alive():
    """Unless in_dims tells, a failed one might be in any tensor: gradients of all are watched."""
    cell = wide_cell()

    def solve() -> None:
        x = X.clone()
        x[1] = torch.nan
        im.fixed_point(cell, Z0, x, on_failure="ignore").value.nansum().backward()

    solve()
    gc.collect()
    before = len(living_tensors())
    solve()
    gc.collect()
    assert len(living_tensors()) == before


def test_a_failed_solve_frees_everything_once_its_error_is_gone():
    x = X.clone().requires_grad_()
    gc.collect()
    before = len(living_tensors())
    for _ in range(3):
        with pytest.raises(im.SolverError):
            im.fixed_point(lambda z, x: 3 * z + x, Z0, x, solver=im.FixedPointIteration(), on_failure="raise")
    gc.collect()
    assert len(living_tensors()) == before


class Slope(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, t, y):
        return torch.tanh(self.linear(y))


GRAPHS = {
    "fixed_point": lambda h: im.fixed_point(
        lambda z, x: 0.3 * torch.tanh(z) + x, torch.zeros(5, 3), h, compile=True
    ),
    "odeint": lambda h: im.odeint(Slope(), h, (0.0, 1.0), solver=im.Heun(rtol=1e-2), compile=True),
    "backsolve": lambda h: im.odeint(
        Slope(), h, (0.0, 1.0), solver=im.Heun(rtol=1e-2), adjoint=im.BacksolveAdjoint(), compile=True
    ),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "solve", [pytest.param(GRAPHS[n], id=n, marks=[pytest.mark.slow] * (n == "backsolve")) for n in GRAPHS]
)
def test_graphs_keep_nothing_of_what_their_first_input_was_computed_from(traced, solve):
    class Kept:
        """Lives as long as the tensor that it is an attribute of."""

    h = (torch.randn(5, 3) @ torch.randn(3, 3, requires_grad=True)).sin()
    h.kept = Kept()
    kept = weakref.ref(h.kept)
    value = solve(h).value
    value.sum().backward()
    del h, value
    gc.collect()
    assert len(traced) == 2
    assert kept() is None
