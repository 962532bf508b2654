"""Solvers whose steps have loops of their own, as one graph: they take the steps of the eager loop."""

import pytest
import torch

import implicitly as im

D = torch.float64
# PyTorch's compiler imports and calls its own deprecated parts; nothing of ours is meant.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def objective(z, x):
    """Convex, and far from quadratic, so that some line searches take the first length and others do not."""
    z = z - z.roll(1, 1) / 2
    return (z**4).sum(1) + (z**2).sum(1) / 2 - (x * z).sum(1)


def residuals(z, x):
    return torch.cat([z**3 + z - x, z.sin()], dim=1)


def root(z, x):
    return z + 0.3 * torch.tanh(3 * z.roll(1, 1)) - x


def steep(z, x):
    return 10 * (z - x).square().sum(1)


def below_one(z, x):
    return z.clamp(max=1)


CASES = {
    "LBFGS": lambda *given, **how: im.argmin(objective, *given, **how),
    "Newton": lambda *given, **how: im.argmin(objective, *given, solver=im.Newton(), **how),
    "GradientDescent": lambda *given, **how: im.argmin(objective, *given, solver=im.GradientDescent(), **how),
    "ProjectedGradient": lambda *given, **how: im.argmin(
        objective, *given, constraint=lambda z, x: z.clamp(-0.1, 0.1), **how
    ),
    "NewtonKKT": lambda *given, **how: im.argmin(
        objective, *given, constraint=im.Equality(lambda z, x: z.sum(1, keepdim=True) - 1), **how
    ),
    "LevenbergMarquardt": lambda *given, **how: im.least_squares(residuals, *given, **how),
    "Newton, root": lambda *given, **how: im.root(root, *given, solver=im.Newton(), **how),
    "NewtonKrylov": lambda *given, **how: im.root(root, *given, solver=im.NewtonKrylov(), **how),
    "Broyden": lambda *given, **how: im.root(root, *given, solver=im.Broyden(line_search=True, rtol=1e-8), **how),
}


# What reverse mode solves is told by the condition, whatever the solver: one of each.
DIFFERENTIATED = {"LBFGS", "ProjectedGradient", "NewtonKKT", "LevenbergMarquardt", "Newton, root"}


def assert_same(solve, differentiated):
    """Values, derivatives and steps of the graph are those of the eager loop."""
    found, steps = [], []
    for c in (True, False):
        torch.manual_seed(0)
        x = (3 * torch.randn(6, 4, dtype=D)).requires_grad_(differentiated)
        solution = solve(torch.zeros(6, 4, dtype=D), x, compile=c)
        derivative = torch.autograd.grad(solution.value.square().sum(), x) if differentiated else ()
        found.append((solution.value, *derivative))
        steps.append(solution.steps)
    torch.testing.assert_close(*found, rtol=1e-8, atol=1e-8)
    assert (steps[0] - steps[1]).abs().max() <= 1  # where rounding decides
    return steps[0]


# Left to the slow tests: what their graphs are made of is in others, too.
LONG = {"LevenbergMarquardt", "NewtonKrylov", "GradientDescent"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in LONG)) for n in CASES])
def test_takes_the_steps_of_the_eager_loop(traced, name):
    assert assert_same(CASES[name], name in DIFFERENTIATED).min() > 0
    assert any("backward" not in graph.name and graph.calls for graph in traced.values())


def test_what_LBFGS_remembers_of_one_sample_keeps_its_strides(traced):
    x = torch.randn(1, 4, dtype=D)
    graph, eager = (im.argmin(steep, 0 * x, x, solver=im.LBFGS(history=2), compile=c) for c in (True, False))
    torch.testing.assert_close(graph.value, eager.value)


@pytest.mark.slow
def test_a_start_of_other_strides_is_one_of_loops_in_loops_too(traced):
    x = torch.randn(4, 3, dtype=D).T
    graph, eager = (CASES["NewtonKrylov"](0 * x, x, compile=c) for c in (True, False))
    torch.testing.assert_close(graph.value, eager.value)


@pytest.mark.slow
def test_code_of_loops_in_loops_is_right():
    # With C++ around it, the graph of PyTorch 2.13 was wrong wherever a line search took its first length.
    x = 3 * torch.randn(6, 4, dtype=D)
    graph, eager = (CASES["Newton, root"](torch.zeros(6, 4, dtype=D), x, compile=c) for c in (True, False))
    torch.testing.assert_close(graph.value, eager.value, rtol=1e-10, atol=1e-10)
    assert (graph.steps - eager.steps).abs().max() <= 1
    (kept,) = (graph for graph in im.compile_statistics() if graph.name == "root with Newton")
    assert kept.fallback is None
    assert kept.calls == 1


def test_another_step_of_a_projection_is_another_graph(traced):
    x = torch.full((3, 2), 0.5, dtype=D)
    solver = im.FixedPointIteration(max_steps=60)
    for step in (1.0, 0.04):  # the curvature is 20, so that the first one leads nowhere
        constraint = im.Projection(below_one, step=step)
        graph, eager = (
            im.argmin(steep, 0 * x, x, constraint=constraint, solver=solver, on_failure="ignore", compile=c)
            for c in (True, False)
        )
        torch.testing.assert_close((graph.value, graph.status), (eager.value, eager.status))
    assert bool((graph.status == im.Status.CONVERGED).all())


BOUNDED = {
    "box": lambda z, x, u: im.project.box(z, -0.5 * u, 0.7 * u),
    "simplex": lambda z, x, u: im.project.simplex(z, u),
    "isotonic": lambda z, x, u: im.project.isotonic(z),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n != "box")) for n in BOUNDED])
def test_projections_have_a_graph_of_the_backward_solve(traced, name):
    x, found = torch.randn(4, 5, dtype=D, requires_grad=True), []
    u = torch.tensor(1.0, dtype=D, requires_grad=True)
    for c in (True, False):
        value = im.argmin(centred, torch.zeros_like(x), x, u, constraint=BOUNDED[name], compile=c).value
        found.append(torch.autograd.grad(value.square().sum() + 0 * u, [x, u]))
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)
    assert [graph.fallback for graph in im.compile_statistics()] == [None, None]


def centred(z, x, u):
    return (z - x).square().sum(1)
