"""Under `torch.inference_mode` autograd records nothing; every entry gives what it gives under `torch.no_grad`."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import implicitly as im
from tests.argmin.programs import program
from tests.argmin.projections import DERIVED, PROJECTIONS, PROXIMAL
from tests.contracts import SOLVERS
from tests.nn.cells import Dense
from tests.ode.contracts import METHODS
from tests.problems import draw, matrix, seeded

D = torch.float64
X = draw(3, 4, seed=1)
M = torch.eye(4, dtype=D) + matrix(4, 0.5, 2) @ matrix(4, 0.5, 2).mT
WEIGHT = matrix(4, 0.5, 3)
OBJECTIVE_SOLVERS = (im.LBFGS(), im.Newton(), im.NewtonKrylov(), im.GradientDescent(),
                     im.GradientDescent(accelerated=True))  # fmt: skip
LINEAR_SOLVERS = (im.GMRES(), im.BiCGStab(), im.CG(), im.DenseLU(), im.Neumann(damping=0.5), im.Anderson())


def contraction(z, x):
    return torch.tanh(z @ WEIGHT) + x


def residual(z, x):
    return z**3 + z @ M - x


def quartic(z, x):
    return ((z - x) ** 2).sum(1) + (z**4).sum(1)


def apply(u, M):
    return u @ M.mT


def rotate(t, y):
    return torch.tanh(y @ WEIGHT) - y * t


def swing(t, y):
    q, p = y
    return p, -q


def spring(y):
    return (y[..., 2:] ** 2 - y[..., :2] ** 4).sum(-1)


def zeros():
    return torch.zeros_like(X)


def named(prefix, solvers, solve):
    return {f"{prefix}-{i}-{type(s).__name__}": lambda s=s: solve(s) for i, s in enumerate(solvers)}


def minimum(**options):
    return im.argmin(quartic, zeros(), X, **options).value


def trajectory(solver, pair):
    return im.odeint(swing, (X, X.flip(0)), (0.0, 0.4, 1.0), solver=solver) if pair else im.odeint(
        rotate, X, (0.0, 0.4, 1.0), solver=solver, batch_dims=1
    )  # fmt: skip


def projected(row):
    z, parameters = row.draw((3,))
    return row.f(z, *parameters)


def regularised():
    field = nn.Sequential(nn.Linear(4, 4), nn.Tanh()).double()
    with torch.no_grad():
        field[0].weight.copy_(WEIGHT)
        field[0].bias.zero_()
    terms = (im.nn.KineticEnergy(), im.nn.JacobianFrobenius(seeded(7)), im.nn.TaylorPenalty(2))
    return im.nn.NeuralODE(im.nn.Autonomous(field), regularisers=terms)(X)


class Wave(nn.Module):
    def forward(self, y):
        return (y**2).sum(-1) + (y**4).sum(-1)


ENTRIES = {
    **named("fixed_point", [row.kind() for row in SOLVERS],
            lambda s: im.fixed_point(contraction, zeros(), X, solver=s)),
    **named("root", [row.kind() for row in SOLVERS[1:]], lambda s: im.root(residual, zeros(), X, solver=s)),
    **named("linear_solve", LINEAR_SOLVERS, lambda s: im.linear_solve(apply, X, M, solver=s)),
    **named("transposed", LINEAR_SOLVERS, lambda s: im.linear_solve(apply, X, M, solver=s, transpose=True)),
    **named("argmin", OBJECTIVE_SOLVERS, lambda s: minimum(solver=s)),
    "argmin-projection": lambda: minimum(constraint=lambda z, x: im.project.simplex(z)),
    "argmin-equality": lambda: minimum(constraint=im.Equality(lambda z, x: z.sum(1) - 1)),
    **named("least_squares", (im.LevenbergMarquardt(), im.GaussNewton()),
            lambda s: im.least_squares(residual, zeros(), X, solver=s)),
    **named("qp", (im.InteriorPoint(), im.ADMM()), lambda s: im.qp(*program(shared=("Q", "G", "A")), solver=s)),
    "qp-smoothed": lambda: im.qp(*program(), adjoint=im.KKTAdjoint(smoothing=0.1)),
    "implicit_gradient": lambda: im.implicit_gradient(lambda w, x: ((w - x) ** 2).sum(), X, X),
    **{f"odeint-{row.name}": lambda row=row: trajectory(row.make(), row.needs_pair) for row in METHODS},
    "interpolate": lambda: im.odeint(rotate, X, (0.0, 1.0), solver=im.Kvaerno3()).interpolate((0.3, 0.7)),
    "event": lambda: im.odeint(rotate, X, (0.0, 1.0), batch_dims=1, event=im.Event(lambda t, y: y[:, 0] - 0.3)),
    "ddeint": lambda: im.ddeint(lambda t, y, past: -past[0], X, (0.0, 1.0), lags=(0.3,)),
    **{f"project-{row.name}": lambda row=row: projected(row) for row in (*PROJECTIONS, *PROXIMAL, *DERIVED)},
    "jet": lambda: im.jet(torch.tanh, (X,), ((X, X),)),
    "trajectory_derivatives": lambda: im.trajectory_derivatives(rotate, 0.5, X, 3),
    "check_independence": lambda: torch.tensor(im.check_independence(lambda z: z + z.mean(0), X)),
    "DEQ": lambda: im.nn.DEQ(Dense().double(), im.Newton())(X),
    "DEQ.iterates": lambda: im.nn.DEQ(Dense().double()).iterates(X, (2, 5)),
    "NeuralODE": regularised,
    "HamiltonianField": lambda: im.nn.HamiltonianField(Wave())(0.0, X),
    "LagrangianField": lambda: im.nn.LagrangianField(spring)(0.0, X),
    "jacobian_norm": lambda: im.nn.jacobian_norm(contraction, X, X, generator=seeded(8)),
    "spectral_radius": lambda: im.nn.spectral_radius(contraction, X, X, generator=seeded(9)),
}  # fmt: skip


def tensors_of(found):
    if isinstance(found, im.Solution):
        found = (found.value, found.status, found.residual, found.steps)
    return pytree.tree_leaves(found)


@pytest.mark.parametrize("name", ENTRIES)
def test_inference_mode_equals_no_grad(name):
    found = []
    for mode in (torch.no_grad, torch.inference_mode):
        torch.manual_seed(0)
        with mode():
            found.append(tensors_of(ENTRIES[name]()))
    assert found[0]
    assert len(found[0]) == len(found[1])
    for plain, inferred in zip(*found):
        torch.testing.assert_close(inferred, plain, rtol=0, atol=0, equal_nan=True)
        with torch.inference_mode():
            inferred.zero_()  # nothing of a solve is looked after once it is given


def test_a_program_of_cvxpy():
    cvxpy = pytest.importorskip("cvxpy")
    x, c = cvxpy.Variable(4), cvxpy.Parameter(4)
    layer = im.nn.ConvexLayer(cvxpy.Problem(cvxpy.Minimize(cvxpy.sum_squares(x - c)), [x >= 0]), [c], [x])
    with torch.inference_mode():
        (value,) = layer(X)
    torch.testing.assert_close(value, X.clamp(min=0), rtol=0, atol=1e-8)


def made():
    """What f may reach: a tensor, a layer, and one without gradients."""
    torch.manual_seed(0)
    frozen = nn.Linear(4, 4).double().requires_grad_(False)
    return X.clone(), nn.Linear(4, 4).double(), frozen


PLAIN = made()
with torch.inference_mode():
    INFERRED = made()

REACHING = {
    "closure": lambda c, layer, frozen: lambda z, x: z**3 + z * c.exp() - x,
    "module": lambda c, layer, frozen: lambda z, x: z**3 + z + 0.1 * layer(z).tanh() - x,
    "frozen": lambda c, layer, frozen: lambda z, x: z**3 + z + 0.1 * frozen(z).tanh() - x,
    "args": lambda c, layer, frozen: lambda z, x: z**3 + z * x.exp() - x,
}
USES = {
    "Newton": lambda f, z, x: im.root(f, z, x).value,
    "NewtonKrylov": lambda f, z, x: im.root(f, z, x, solver=im.NewtonKrylov()).value,
    "Anderson": lambda f, z, x: im.fixed_point(lambda z, x: z - 0.1 * f(z, x), z, x).value,
    "argmin": lambda f, z, x: im.argmin(lambda z, x: f(z, x).square().sum(1) + (z**2).sum(1), z, x).value,
    "jacobian_norm": lambda f, z, x: im.nn.jacobian_norm(f, z, x, generator=seeded(8)),
    "check_independence": lambda f, z, x: torch.tensor(im.check_independence(f, z, x)),
}


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("reached", REACHING)
@pytest.mark.parametrize("use", USES)
def test_what_was_made_in_inference_mode_may_be_used(use, reached, mode):
    start = torch.full_like(X, 0.1)
    with torch.no_grad():
        expected = USES[use](REACHING[reached](*PLAIN), start, X)
    with mode():
        found = USES[use](REACHING[reached](*INFERRED), start.clone(), INFERRED[0])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_gradients_past_what_was_made_in_inference_mode():
    w = torch.ones(4, dtype=D, requires_grad=True)
    value = im.root(lambda z, w: z + z * w * INFERRED[0].exp() - 1, INFERRED[0], w).value
    (found,) = torch.autograd.grad(value.sum(), w)
    (expected,) = torch.autograd.grad((1 / (1 + w * X.exp())).sum(), w)
    torch.testing.assert_close(found, expected)


def test_a_layer_in_a_compiled_model():
    layer = im.nn.DEQ(Dense().double(), im.Newton())
    model = torch.compile(nn.Sequential(nn.Linear(4, 4).double(), layer), backend="eager")
    with torch.no_grad():
        expected = model(X)
    with torch.inference_mode():
        torch.testing.assert_close(model(X), expected)


def test_autocast_holds():
    found = []
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), torch.autocast("cpu", torch.bfloat16):
            found.append(im.fixed_point(contraction_in_float32, zeros().float(), X.float()).value)
    torch.testing.assert_close(*found, rtol=0, atol=0)


def contraction_in_float32(z, x):
    return torch.tanh(z @ WEIGHT.float()) + x
