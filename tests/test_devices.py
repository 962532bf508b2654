"""Every entry where its tensors lie, whatever PyTorch's default device is.

`meta` in place of the default holds no numbers: a tensor made inside without a device of its own would end there,
and whatever it met would raise. On an NVIDIA device the same calls must give the values of the CPU.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cached_property
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import implicitly as im
from tests.problems import draw

D, BATCH, N = torch.float64, 3, 4

pytestmark = pytest.mark.host  # names its devices itself


class Case:
    """`solve` of float64 inputs, which it differentiates, and any parameters of its own."""

    def __init__(self, name: str, solve: Callable[..., Tensor], *inputs: Tensor, tolerance: float = 1e-8):
        self.name, self.solve, self.inputs, self.tolerance = name, solve, inputs, tolerance

    def __repr__(self) -> str:
        return self.name

    def run(self, device: str) -> list[Tensor]:
        """The value and the gradients, on the CPU."""
        inputs = [x.to(device).requires_grad_() for x in self.inputs]
        value = self.solve(*inputs)
        assert value.device.type == device
        weights = torch.linspace(-1, 2, value.numel(), dtype=D, device=device)
        gradients = torch.autograd.grad(value.flatten() @ weights, inputs)
        assert {g.device.type for g in gradients} == {device}
        return [x.detach().cpu() for x in (value, *gradients)]

    @cached_property
    def expected(self) -> list[Tensor]:
        """What it gives on the CPU."""
        return self.run("cpu")


W = draw(N, N, seed=1) * 0.2
X = draw(BATCH, N, seed=2)
SPREAD = torch.linspace(0.5, 2, N, dtype=D).diag() + W @ W.mT


def cell(z: Tensor, x: Tensor, W: Tensor) -> Tensor:
    return torch.tanh(z @ W + x)


def fixed_point(**options) -> Callable[..., Tensor]:
    return lambda x, W: im.fixed_point(cell, torch.zeros_like(x), x, W, **options).value


def root(**options) -> Callable[..., Tensor]:
    return lambda x, W: im.root(lambda z, x, W: z + z**3 + z @ W - x, torch.zeros_like(x), x, W, **options).value


def decay(t: Tensor, y: Tensor, W: Tensor) -> Tensor:
    return torch.tanh(y @ W) - y * t


def trajectory(times: tuple[float, ...] = (0.0, 0.3, 1.0), **options) -> Callable[..., Tensor]:
    return lambda y, W: im.odeint(decay, y, times, W, batch_dims=1, **options).value


def motion(solver: im.Leapfrog) -> Callable[..., Tensor]:
    def solve(q: Tensor, W: Tensor) -> Tensor:
        def pull(t: Tensor, y: tuple[Tensor, Tensor], W: Tensor) -> tuple[Tensor, Tensor]:
            return y[1], -torch.sin(y[0]) @ (W @ W.mT)

        return im.odeint(pull, (q, torch.zeros_like(q)), (0.0, 0.5), W, solver=solver, batch_dims=1).value[0]

    return solve


def objective(z: Tensor, x: Tensor, W: Tensor) -> Tensor:
    return ((z - x) ** 2).sum(-1) + 0.1 * (z**4).sum(-1) + ((z @ W) ** 2).sum(-1)


def minimum(**options) -> Callable[..., Tensor]:
    return lambda x, W: im.argmin(objective, torch.zeros_like(x), x, W, **options).value


def squares(**options) -> Callable[..., Tensor]:
    def residuals(z: Tensor, x: Tensor, W: Tensor) -> Tensor:
        return torch.cat([z + z**3 - x, z @ W], -1)

    return lambda x, W: im.least_squares(residuals, torch.zeros_like(x), x, W, **options).value


def program(**options) -> Callable[..., Tensor]:
    def solve(p: Tensor, Q: Tensor) -> Tensor:
        G = torch.cat([torch.eye(N, dtype=D, device=p.device), -torch.eye(N, dtype=D, device=p.device)])
        A, b = torch.ones_like(G[:1]), torch.full_like(G[:1, 0], 0.3)
        return im.qp(Q, p, G, torch.full_like(G[:, 0], 0.5), A, b, **options).value

    return solve


def linear(solver: im.GMRES, symmetric: bool = False) -> Callable[..., Tensor]:
    def solve(b: Tensor, W: Tensor) -> Tensor:
        M = W + 2 * torch.eye(N, dtype=D, device=W.device)
        M = M @ M.mT if symmetric else M
        return im.linear_solve(lambda z, M: z @ M, b, M, solver=solver).value

    return solve


def arrival(y: Tensor, W: Tensor) -> Tensor:
    falls = im.Event(lambda t, y, W: y[..., 0] - 0.4)
    return im.odeint(decay, y, (0.0, 5.0), W, batch_dims=1, event=falls).t


class Cell(nn.Module):
    def __init__(self):
        super().__init__()
        self.inside = im.nn.SpectralNorm(nn.Linear(N, N, dtype=D), bound=0.5)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.inside(z) + x)


def made(module: Callable[[], nn.Module]) -> nn.Module:
    """A module on the CPU, the same each time."""
    with torch.device("cpu"), torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return module()


def deq(x: Tensor, W: Tensor) -> Tensor:
    memory = im.nn.LastEpoch(BATCH)
    layer = im.nn.DEQ(made(Cell).to(x.device), solver=im.Anderson(**TIGHT), warm_start=memory)
    index = torch.arange(BATCH, device=x.device)
    with torch.no_grad():
        layer(x @ W, index=index)
    return layer(x @ W, index=index)


def neural_ode(x: Tensor, W: Tensor) -> Tensor:
    f = made(lambda: im.nn.TimeSequential(im.nn.GatedTime(nn.Linear(N, N, dtype=D)), nn.Tanh()))
    return im.nn.NeuralODE(f.to(x.device), t=(0.0, 0.5, 1.0), solver=im.Dopri5(**CLOSE))(x @ W)


def convex_layer(p: Tensor, Q: Tensor) -> Tensor:
    cp = pytest.importorskip("cvxpy")
    z, centre = cp.Variable(N), cp.Parameter(N)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(z - centre) + cp.norm(z, 2)), [z >= 0])
    layer = im.nn.ConvexLayer(problem, parameters=[centre], variables=[z])
    return layer(p @ Q)[0]


TIGHT = {"rtol": 1e-11}
BALLS = (im.project.box, im.project.simplex, im.project.l1_ball, im.project.l2_ball, im.project.linf_ball)
PROXIMAL = (im.prox.l1, im.prox.l2, im.prox.linf, im.prox.total_variation)
FIXED_POINTS = (
    im.FixedPointIteration(**TIGHT),
    im.Anderson(**TIGHT),
    im.Broyden(**TIGHT),
    im.Broyden(line_search=True, **TIGHT),
    im.Newton(**TIGHT),
    im.NewtonKrylov(**TIGHT),
)
ADJOINTS = (
    *(im.ImplicitAdjoint(linear_solver=s(**TIGHT)) for s in (im.GMRES, im.BiCGStab, im.DenseLU, im.Neumann)),
    im.JacobianFreeAdjoint(),
    im.PhantomAdjoint(steps=3),
    im.UnrolledAdjoint(),
)
# Steps of another length have another error: it must be less than what is compared.
CLOSE = {"rtol": 1e-9, "atol": 1e-9}
METHODS = (
    im.Dopri5(**CLOSE),
    im.Dopri8(**CLOSE),
    im.Tsit5(**CLOSE),
    im.Bosh3(rtol=1e-7, atol=1e-7),
    im.RK4(dt=0.1),
    im.Adams(**CLOSE),
    im.Kvaerno3(rtol=1e-6, atol=1e-6),
    im.Kvaerno5(**CLOSE),
    im.ImplicitEuler(dt=0.1, **CLOSE),
    im.ImplicitMidpoint(dt=0.1, **CLOSE),
    im.Trapezoid(dt=0.1, **CLOSE),
    im.ReversibleHeun(dt=0.1),
)


def named(kind: str, things: tuple, make: Callable[..., Any], *inputs: Tensor, **options: float) -> list[Case]:
    return [Case(f"{kind}-{type(t).__name__}", make(t), *inputs, **options) for t in things]


CASES = [
    *named("fixed_point", FIXED_POINTS, lambda s: fixed_point(solver=s), X, W),
    *named("adjoint", ADJOINTS, lambda a: fixed_point(solver=im.Anderson(**TIGHT), adjoint=a), X, W),
    Case(
        "fixed_point-budget-JFB", fixed_point(solver=im.Anderson(rtol=0, max_steps=5), adjoint=ADJOINTS[4]), X, W
    ),
    Case("fixed_point-in_dims", fixed_point(solver=im.Anderson(**TIGHT), in_dims=(0, None)), X, W),
    *named(
        "root", (im.Broyden(**TIGHT), im.Newton(**TIGHT), im.NewtonKrylov(**TIGHT)), lambda s: root(solver=s), X, W
    ),
    *named("odeint", METHODS, lambda s: trajectory(solver=s), X, W, tolerance=1e-5),
    Case("odeint-BacksolveAdjoint", trajectory(adjoint=im.BacksolveAdjoint()), X, W, tolerance=1e-4),
    Case("odeint-UnrolledAdjoint", trajectory(adjoint=im.UnrolledAdjoint()), X, W, tolerance=1e-4),
    *named("odeint", (im.Leapfrog(dt=0.1), im.Yoshida4(dt=0.1), im.BlanesMoan4(dt=0.1)), motion, X, W),
    Case("odeint-event", arrival, X.abs() + 0.5, W, tolerance=1e-4),
    *named(
        "argmin",
        (
            im.GradientDescent(rtol=1e-9, max_steps=2000),
            im.LBFGS(rtol=1e-9),
            im.Newton(**TIGHT),
        ),
        lambda s: minimum(solver=s),
        X,
        W,
    ),
    Case("argmin-ball", minimum(constraint=lambda z, x, W: im.project.l2_ball(z)), X, W),
    Case("argmin-equality", minimum(constraint=im.Equality(lambda z, x, W: z.sum(-1, keepdim=True) - 1)), X, W),
    *named("least_squares", (im.GaussNewton(), im.LevenbergMarquardt()), lambda s: squares(solver=s), X, W),
    *named("qp", (im.InteriorPoint(), im.ADMM()), lambda s: program(solver=s), X, SPREAD),
    *named("linear_solve", (im.GMRES(**TIGHT), im.BiCGStab(**TIGHT), im.DenseLU()), linear, X, W),
    Case("linear_solve-CG", linear(im.CG(**TIGHT), symmetric=True), X, W),
    Case("ConvexLayer", convex_layer, X, SPREAD),
    Case("DEQ", deq, X, W),
    Case("NeuralODE", neural_ode, X, W),
    *(Case(f"project-{f.__name__}", lambda z, W, f=f: f(z @ W), X, W) for f in BALLS),
    *(Case(f"prox-{f.__name__}", lambda z, W, f=f: f(z @ W, 0.1), X, W) for f in PROXIMAL),
    *(Case(f.__name__, lambda z, W, f=f: f(z @ W), X, W) for f in (im.sparsemax, im.soft_sort, im.soft_rank)),
]


every_case = pytest.mark.parametrize("case", CASES, ids=repr)


@every_case
def test_tensors_made_inside_lie_where_the_inputs_do(case):
    expected = case.expected
    with torch.device("meta"):
        found = case.run("cpu")
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.fixture
def as_an_accelerator(monkeypatch):
    """The CPU taken for one, whose numbers are not to be looked at."""
    for name, module in list(sys.modules.items()):
        if name.startswith("implicitly.") and hasattr(module, "is_cpu"):
            monkeypatch.setattr(module, "is_cpu", lambda x: False)


@every_case
def test_the_ways_of_an_accelerator_lead_to_the_same(case, request):
    expected = case.expected
    request.getfixturevalue("as_an_accelerator")
    for one, other in zip(case.run("cpu"), expected):
        torch.testing.assert_close(one, other, rtol=case.tolerance, atol=case.tolerance)


@pytest.mark.usefixtures("as_an_accelerator")
def test_what_is_kept_of_a_solve_in_inference_mode_serves_autograd():
    solve = fixed_point(solver=im.Anderson(history=7, **TIGHT), adjoint=im.UnrolledAdjoint())
    with torch.inference_mode():
        solve(X, W)
    x = X.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(solve(x, W).sum(), x)
    assert bool(gradient.isfinite().all())


def test_f_finds_the_default_device_of_the_forward_pass_in_the_backward_pass():
    seen = []

    def f(z: Tensor, x: Tensor) -> Tensor:
        seen.append(torch.get_default_device().type)
        return 0.5 * torch.tanh(z) + x

    x = X.clone().requires_grad_()
    with torch.device("meta"):
        value = im.fixed_point(f, torch.zeros_like(x), x).value
    forward = len(seen)
    value.sum().backward()
    assert len(seen) > forward
    assert set(seen) == {"meta"}


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA device here")
@every_case
def test_an_accelerator_gives_what_a_cpu_gives(case):
    for one, other in zip(case.run("cuda"), case.expected):
        torch.testing.assert_close(one, other, rtol=case.tolerance, atol=case.tolerance)
