"""What happens between a solve and its derivative, and around both: modes, changes in place, hooks, caches."""

from __future__ import annotations

import contextlib
import pickle

import pytest
import torch
import torch.nn.utils.parametrizations
import torch.utils.checkpoint
from torch import nn
from torch.nn.utils import parametrize

import implicitly as im
from tests.problems import draw

# PyTorch's compiler uses what PyTorch deprecates.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

D = torch.float64
X = draw(6, 4, seed=11)
Z0 = torch.zeros(6, 4, dtype=D)


class Cell(nn.Module):
    def __init__(self, norm: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 4, dtype=D)
        nn.init.orthogonal_(self.linear.weight, 0.7)
        self.norm = nn.BatchNorm1d(4, dtype=D) if norm else nn.Identity()

    def forward(self, z, x):
        return torch.tanh(0.3 * self.norm(self.linear(z)) + x)


def fixed(f, x, **options):
    return im.fixed_point(f, Z0, x, **options).value


def trajectory(f, x, adjoint):
    return im.odeint(lambda t, y, x: f(y, x) - y, x, (0.0, 1.0), x, adjoint=adjoint).value[-1]


SOLVES = {
    "fixed_point": fixed,
    "one_system": lambda f, x: fixed(f, x, batch_dims=0),
    "compiled": lambda f, x: fixed(f, x, compile=True, batch_dims=0),
    "odeint": lambda f, x: trajectory(f, x, im.RecursiveCheckpointAdjoint()),
    "backsolve": lambda f, x: trajectory(f, x, im.BacksolveAdjoint()),
}
EAGER = [name for name in SOLVES if name != "compiled"]


def x_with_gradient():
    return X.clone().requires_grad_()


# ------------------------------------------------------------------------------------- changes in place


@pytest.mark.parametrize("name", EAGER)
def test_a_frozen_weight_changed_before_the_derivative_is_refused(name):
    cell, x = Cell().requires_grad_(False), x_with_gradient()
    value = SOLVES[name](cell, x)
    with torch.no_grad():
        cell.linear.weight.mul_(0.5)
    with pytest.raises(RuntimeError, match=r"'weight' of shape \(4, 4\), which was changed in place"):
        value.sum().backward()


@pytest.mark.parametrize("name", EAGER)
def test_a_captured_tensor_changed_before_the_derivative_is_refused(name):
    W, x = 0.1 * draw(4, 4, seed=12), x_with_gradient()
    value = SOLVES[name](lambda z, x: torch.tanh(z @ W + x), x)
    W.zero_()
    with pytest.raises(RuntimeError, match="'W' of shape"):
        value.sum().backward()


def test_a_buffer_changed_before_the_derivative_is_refused_unless_its_module_trains():
    cell, x = Cell(norm=True).eval(), x_with_gradient()
    value = fixed(cell, x)
    cell.norm.running_mean.add_(1)
    with pytest.raises(RuntimeError, match="'running_mean'"):
        value.sum().backward()
    cell.train()
    value = fixed(cell, x, batch_dims=0)
    cell.norm.running_mean.add_(1)  # as another call of the layer does
    value.sum().backward()


def test_what_f_changes_itself_is_its_own_affair():
    calls, x = torch.zeros(()), x_with_gradient()

    def f(z, x):
        calls.add_(1)
        return torch.tanh(0.5 * z + x)

    fixed(f, x).sum().backward()
    assert calls > 3
    assert x.grad is not None


def test_the_second_derivative_refuses_changes_too():
    cell, x = Cell().requires_grad_(False), x_with_gradient()
    (gradient,) = torch.autograd.grad(fixed(cell, x).sum(), x, create_graph=True)
    with torch.no_grad():
        cell.linear.weight.mul_(0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradient.square().sum().backward()


# ------------------------------------------------------------------------------------------------- modes


@pytest.mark.parametrize(
    ("name", "train"),
    [
        *((name, train) for name in EAGER[1:] for train in (True, False)),
        pytest.param("compiled", True, marks=pytest.mark.slow),
    ],
)
def test_the_derivative_is_that_of_the_mode_of_the_solve(name, train, request):
    if name == "compiled":
        request.getfixturevalue("traced")
    gradients = []
    for switched in (False, True):
        cell, x = Cell(norm=True).train(train), x_with_gradient()
        value = SOLVES[name](cell, x)
        if switched:
            cell.train(not train)
        value.sum().backward()
        gradients.append(x.grad)
        assert cell.norm.training is (not train if switched else train)
    torch.testing.assert_close(*gradients)


# ------------------------------------------------------------------------------------------------- hooks


def from_root(x, solver=None):
    return im.root(lambda z, x: z - torch.tanh(0.5 * z) - x, Z0, x, solver=solver or im.Newton()).value


@pytest.mark.parametrize("solver", [im.Newton(), im.NewtonKrylov(), im.Broyden()], ids=lambda s: type(s).__name__)
def test_checkpointing_around_a_solve_and_within_f(solver):
    x = x_with_gradient()
    (expected,) = torch.autograd.grad(from_root(x, solver).sum(), x)
    around = torch.utils.checkpoint.checkpoint(from_root, x, solver, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(around.sum(), x)[0], expected)

    def residual(z, x):
        return torch.utils.checkpoint.checkpoint(
            lambda z, x: z - torch.tanh(0.5 * z) - x, z, x, use_reentrant=False
        )

    within = im.root(residual, Z0, x, solver=solver).value
    torch.testing.assert_close(torch.autograd.grad(within.sum(), x)[0], expected)


def test_second_derivatives_while_saved_tensors_are_packed():
    x, seconds = x_with_gradient(), []
    for around in (contextlib.nullcontext(), torch.autograd.graph.save_on_cpu()):
        with around:
            (first,) = torch.autograd.grad(from_root(x).sum(), x, create_graph=True)
            seconds.append(torch.autograd.grad(first.square().sum(), x)[0])
    torch.testing.assert_close(*seconds)


@pytest.mark.parametrize("solver", [im.Dopri5(), im.Kvaerno5()], ids=lambda s: type(s).__name__)
def test_checkpointing_around_a_trajectory(solver):
    def solve(y):
        return im.odeint(lambda t, y: -(y**3), y, (0.0, 1.0), solver=solver).value[-1]

    x = x_with_gradient()
    (expected,) = torch.autograd.grad(solve(x).sum(), x)
    around = torch.utils.checkpoint.checkpoint(solve, x, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(around.sum(), x)[0], expected)


def distance(z, x):
    return (z - x).square().sum(1) / 2


def minimum(x, **options):
    return im.argmin(distance, Z0, x, **options).value


def until_an_event(x):
    event = im.Event(lambda t, y: torch.func.grad(lambda y: y.square().sum())(y)[:, 0] - 0.1)
    return im.odeint(lambda t, y: -y, x, (0.0, 1.0), batch_dims=1, event=event).value[-1]


# What differentiates within the solve, or before it.
DIFFERENTIATING = {
    "argmin": minimum,
    "argmin, unrolled": lambda x: minimum(x, solver=im.GradientDescent(), adjoint=im.UnrolledAdjoint()),
    "argmin in a set": lambda x: minimum(x, constraint=lambda z, x: im.project.simplex(z)),
    "argmin under equations": lambda x: minimum(x, constraint=im.Equality(lambda z, x: z.sum(1, keepdim=True))),
    "least_squares": lambda x: im.least_squares(lambda z, x: z - x, Z0, x).value,
    "events": until_an_event,
    "forces": lambda x: im.nn.NeuralODE(im.nn.HamiltonianField(nn.Linear(4, 1, dtype=D)))(x),
    "backsolve": lambda x: trajectory(lambda y, x: torch.tanh(y) + x, x, im.BacksolveAdjoint()),
}


@pytest.mark.parametrize("name", DIFFERENTIATING)
def test_hooks_for_saved_tensors_around_what_differentiates(name):
    def gradient(solve):
        torch.manual_seed(0)
        x = x_with_gradient()
        return torch.autograd.grad(solve(x).square().sum(), x)[0]

    expected, solve = gradient(DIFFERENTIATING[name]), DIFFERENTIATING[name]
    found = gradient(lambda x: torch.utils.checkpoint.checkpoint(solve, x, use_reentrant=False))
    torch.testing.assert_close(found, expected)
    with torch.autograd.graph.save_on_cpu():
        torch.testing.assert_close(gradient(solve), expected)


# ----------------------------------------------------------------------------------------- sparse tensors


KNOWN = draw(6, 6, seed=12).relu()  # with many zeros


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr], ids=["COO", "CSR"])
@pytest.mark.parametrize("solver", [im.Anderson(), im.Newton()], ids=lambda s: type(s).__name__)
def test_a_sparse_tensor_among_args(layout, solver):
    def f(z, A, x):
        return torch.tanh(0.1 * torch.mm(A, z) + x)

    def gradients(A):
        x, A = x_with_gradient(), A.clone().requires_grad_()
        z = im.fixed_point(f, Z0, A, x, solver=solver, batch_dims=0).value
        by_A, by_x = torch.autograd.grad(z.sum(), (A, x))
        return torch.where(KNOWN > 0, by_A.to_dense(), 0.0), by_x

    torch.testing.assert_close(gradients(KNOWN.to_sparse(layout=layout)), gradients(KNOWN))


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr], ids=["COO", "CSR"])
def test_a_failure_beside_a_sparse_arg(layout):
    def f(z, A, x):
        return torch.tanh(0.1 * (A @ z.T).T + x) / (x[:, :1] < 5)

    sparse = KNOWN.to_sparse(layout=layout).requires_grad_()
    for failed in ([0, 1, 2], [1]):
        x = draw(3, 6, seed=13)
        x[failed] = 9.0
        x.requires_grad_()
        found = im.fixed_point(f, torch.zeros_like(x), sparse, x, in_dims=(None, 0), on_failure="ignore")
        assert (~found.converged).nonzero().flatten().tolist() == failed
        by_A, by_x = torch.autograd.grad(found.value.sum(), (sparse, x))
        assert by_A.to_dense().isfinite().all()
        assert not by_x[failed].any()


def test_sparse_data_of_a_minimum():
    x = x_with_gradient()

    def ridge(z, A, x):
        return (torch.mm(A, z) - x).square().sum() / 2 + z.square().sum() / 2

    z = im.argmin(ridge, Z0, KNOWN.to_sparse_coo(), x, batch_dims=0).value
    exact = torch.linalg.solve(KNOWN.T @ KNOWN + torch.eye(6, dtype=D), KNOWN.T @ x)
    torch.testing.assert_close(z, exact)
    torch.testing.assert_close(*(torch.autograd.grad(z.sum(), x)[0] for z in (z, exact)))


# ------------------------------------------------------------------------------- the cache of parametrisations


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize(
    "adjoint",
    [im.ImplicitAdjoint(), im.PhantomAdjoint(), im.JacobianFreeAdjoint(), im.UnrolledAdjoint()],
    ids=lambda a: type(a).__name__,
)
def test_parametrised_weights_get_gradients_under_torchs_cache(adjoint, create_graph):
    cell = Cell()
    torch.nn.utils.parametrizations.weight_norm(cell.linear)
    found = []
    for around in (contextlib.nullcontext(), parametrize.cached()):
        with around:
            loss = fixed(cell, X, adjoint=adjoint).square().sum() + cell.linear.weight.square().sum()
            found.append(torch.autograd.grad(loss, list(cell.parameters()), create_graph=create_graph))
    for uncached, cached in zip(*found):
        torch.testing.assert_close(uncached, cached)


# ----------------------------------------------------------------------------------------------- processes


def test_a_failure_goes_from_one_process_to_another():
    with pytest.raises(im.SolverError) as raised:
        im.root(lambda z: z**2 + 1, torch.ones(2, 1))
    there = pickle.loads(pickle.dumps(raised.value))
    assert str(there) == str(raised.value)
    assert torch.equal(there.solution.status, raised.value.solution.status)
