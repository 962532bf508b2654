"""A trajectory as one graph: the same steps, values and derivatives as eagerly, traced once.

Most of these trace the graph and run it by PyTorch's own operations, which takes a tenth of the time that making
code of it takes; what the loop computes is the same.
"""

from __future__ import annotations

import gc
import warnings
import weakref
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import implicitly as im
from implicitly.host import LOOPS
from implicitly.ode import derivative, graph, graph_adjoint, record, work

D = torch.float64
# Of few stages and steps.
METHOD = im.Bosh3(rtol=1e-2)
# PyTorch's compiler imports and calls its own deprecated parts; nothing of ours is meant.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def turning(t, y, w):
    A = torch.tensor([[-0.1, 2.0], [-2.0, -0.1]], dtype=y.dtype)
    return (y**3) @ A * w + 0.1 * torch.sin(t)


def derivatives(f, y0, t, *args, compile, retained=False, **options):
    """The solution, and its derivatives by the start, the times and the args, of a random sum of all outputs."""
    inputs = [x.detach().clone().requires_grad_() for x in (y0, t, *args)]
    solution = im.odeint(f, *inputs, on_failure="ignore", compile=compile, **options)
    value = solution.value
    torch.manual_seed(1)
    total = (value.nan_to_num() * torch.randn_like(value)).sum()
    found = torch.autograd.grad(total, inputs, retain_graph=retained)
    if retained:
        for a, b in zip(found, torch.autograd.grad(total, inputs)):
            assert torch.equal(a, b)
    return solution, found


def assert_same(f, y0, t, *args, **options):
    """Values, derivatives and the course of the solve are those of the eager loop."""
    (graph, found), (eager, right) = (
        derivatives(f, y0, t, *args, compile=c, retained=c, **options) for c in (True, False)
    )
    torch.testing.assert_close(graph.value, eager.value, rtol=1e-11, atol=1e-11, equal_nan=True)
    for field in ("status", "steps", "rejected"):
        assert torch.equal(getattr(graph, field), getattr(eager, field)), field
    torch.testing.assert_close(graph.t, eager.t)
    torch.testing.assert_close(found, right, rtol=1e-11, atol=1e-11)
    return graph, found


def number(x):
    return torch.tensor(x, dtype=D)


@pytest.fixture(params=[True, pytest.param(False, marks=pytest.mark.slow)], ids=["in place", "carried"])
def buffers(request, monkeypatch):
    """Buffers of loops are written in place, and, as before PyTorch 2.13, carried."""
    monkeypatch.setattr(LOOPS, "writes", request.param)


SWEPT, ARC_LENGTH = im.RecursiveCheckpointAdjoint(), im.RecursiveCheckpointAdjoint(arc_length=True)


METHODS = [
    (im.Dopri5(), 2, 160),  # more outputs than a step writes at once, or a row of the graph backwards passes
    (im.Dopri8(), 4, 5),  # whose outputs between take stages of their own
    (im.Heun(rtol=1e-3, controller=im.Controller(integral=0.6, proportional=0.3, derivative=0.2)), 0.5, 2),
    (im.RK4(dt=0.3), 4, 2),
    (im.ReversibleHeun(rtol=1e-3), 1, 4),
    (im.Adams(order=4, rtol=1e-4), 2, 4),
]
SLOW = (im.Dopri8, im.ReversibleHeun, im.Adams, im.Heun, im.RK4)


@pytest.mark.parametrize(
    ("method", "end", "times"),
    [
        pytest.param(m, *how, id=type(m).__name__, marks=[pytest.mark.slow] * isinstance(m, SLOW))
        for m, *how in METHODS
    ],
)
def test_takes_the_steps_of_the_eager_loop(traced, method, end, times, monkeypatch):
    monkeypatch.setattr(graph, "WINDOW", 3)
    y0, t = torch.randn(3, 2, dtype=D), torch.linspace(0, end, times, dtype=D)
    assert_same(turning, y0, t, number(0.8), solver=method, batch_dims=1)
    kinds = [graph.name.startswith("the derivative") for graph in traced.values()]
    assert sorted(set(kinds)) == [False, True]
    assert kinds.count(False) <= 2  # the first steps, and all others


def test_steps_are_as_long_as_times_resolve(traced):
    """In float32, times beside 1e4 are a thousandth apart."""
    y0, moves = torch.zeros(2, 1), torch.tensor([[1.0], [0.0]])
    options = {"solver": im.Bosh3(max_steps=50), "batch_dims": 1, "in_dims": 0}
    graph, eager = (
        im.odeint(lambda t, y, m: m - (1 - m) * y, y0, (1e4, 1e4 + 1), moves, compile=c, **options)
        for c in (True, False)
    )
    assert torch.equal(graph.steps, eager.steps)
    torch.testing.assert_close(graph.value, eager.value)


def test_a_failure_names_the_component_that_is_to_blame(traced):
    options = {"solver": im.Bosh3(max_steps=20), "compile": True}
    with pytest.raises(im.SolverError, match=r"MAX_STEPS .*largest error in component 2\. Try"):
        im.odeint(lambda t, y, w: w * y, torch.ones(3), (0.0, 10.0), torch.tensor([0.0, 0.0, -50.0]), **options)


@pytest.mark.slow
def test_a_symplectic_method(traced):
    def swinging(t, state, w):
        q, p = state
        return p * w, -torch.sin(q)

    q, p, w = torch.randn(3, 1, dtype=D), torch.randn(3, 1, dtype=D), number(0.8)
    found = []
    for c in (True, False):
        inputs = [x.clone().requires_grad_() for x in (q, p, w)]
        options = {"solver": im.Leapfrog(dt=0.1), "batch_dims": 1, "compile": c}
        value = im.odeint(swinging, tuple(inputs[:2]), (0.0, 0.33, 1.0), inputs[2], **options).value
        found.append((*value, *torch.autograd.grad((value[0] * value[1].cos()).sum(), inputs)))
    torch.testing.assert_close(*found, rtol=1e-11, atol=1e-11)
    assert len(traced) == 2


def test_an_implicit_method_solves_its_stage_inside_of_the_graph(traced):
    # The graph computes the Jacobian anew where the eager loop keeps one: Newton ends elsewhere in its tolerance.
    y0, t, w = torch.randn(4, 2, dtype=D), torch.linspace(0, 0.2, 3, dtype=D), number(1.0).requires_grad_()
    options = {"solver": im.ImplicitEuler(dt=0.1), "batch_dims": 1}
    graph, eager = (im.odeint(turning, y0, t, w, compile=c, **options) for c in (True, False))
    torch.testing.assert_close(graph.value, eager.value, rtol=1e-4, atol=1e-5)
    found, right = (torch.autograd.grad(s.value.sum(), w)[0] for s in (graph, eager))
    torch.testing.assert_close(found, right, rtol=1e-3, atol=1e-4)
    assert sorted(graph.name.startswith("the derivative") for graph in traced.values()) == [False, True]


@pytest.mark.slow
def test_long_solves_and_times_of_each_sample_one_of_them_backwards(traced, monkeypatch):
    monkeypatch.setattr(graph, "CHUNK", 6)
    t = torch.tensor([[0.0, 1, 2], [1.5, 1, 0.5], [0, 0.1, 4]], dtype=D)
    y0, method = torch.randn(3, 2, dtype=D), im.Bosh3(rtol=1e-2)
    solution, _ = assert_same(turning, y0, t, number(1.0), solver=method, batch_dims=1)
    assert solution.steps.min() > 2 * graph.CHUNK
    assert len(traced) == 3


def driven(t, y, w):
    return y**2 + w * torch.cos(w * t)


@pytest.mark.slow
def test_ends_of_samples_are_those_of_the_eager_loop_and_what_failed_has_no_derivatives(traced, monkeypatch):
    monkeypatch.setattr(graph, "CHUNK", 512)  # in one run
    # The third blows up, the fourth takes a great many steps.
    y0 = torch.tensor([[0.3], [float("nan")], [1.0], [0.1], [0.2]], dtype=D)
    w, t = torch.tensor([[0.5], [0.5], [0.0], [1e4], [0.5]], dtype=D), torch.linspace(0, 1.5, 4, dtype=D)
    options = {"solver": im.Bosh3(max_steps=300, rtol=1e-2), "batch_dims": 1, "in_dims": 0}
    solution, (by_y0, _, by_w) = assert_same(driven, y0, t, w, **options)
    failures = [im.Status.NON_FINITE, im.Status.STEP_UNDERFLOW, im.Status.MAX_STEPS]
    assert solution.status.tolist() == [im.Status.CONVERGED, *failures, im.Status.CONVERGED]
    assert not torch.cat([by_w[1:4], by_y0[1:2]]).any()
    assert by_w[[0, 4]].all()
    with pytest.raises(im.SolverError, match="MAX_STEPS"):
        im.odeint(driven, y0, t, w, compile=True, **options)
    assert len(traced) == 2


@pytest.mark.slow
def test_samples_that_failed_have_no_part_in_derivatives_by_what_they_share(traced):
    def squared(t, y, w):
        return y**2 * w[:4] * w[4]

    y0 = torch.tensor([[0.3], [float("nan")], [1.0], [0.2]], dtype=D)  # the third blows up
    w, t = torch.tensor([[1.1]] * 4 + [[1.0]], dtype=D), torch.linspace(0, 1.5, 4, dtype=D)
    _, (by_y0, by_t, by_w) = assert_same(squared, y0, t, w, solver=im.Midpoint(dt=0.02), batch_dims=1)
    assert not torch.cat([by_w[1], by_w[2], by_y0[1]]).any()
    assert by_w[[0, 3, 4]].all()
    assert all(x.isfinite().all() for x in (by_y0, by_t, by_w))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2))
        self.factor = 1.0

    def forward(self, t, y):
        return self.net(y) * (self.factor if self.training else 2.0)


@pytest.mark.slow
def test_one_graph_serves_a_training_run(traced):
    net, y0 = Net(), torch.randn(6, 2)
    compiled_layer, eager = (im.nn.NeuralODE(net, solver=METHOD, compile=c) for c in (True, False))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(3):  # the parameters change, the graph does not
        torch.testing.assert_close(compiled_layer(y0), eager(y0))
        assert compiled_layer.evaluations == eager.evaluations
        optimizer.zero_grad()
        compiled_layer(y0).square().sum().backward()
        optimizer.step()
    assert compiled_layer.backward_evaluations > 0
    assert len(traced) == 2  # forwards and backwards
    net.eval()  # what f is made of decides about the graph, too
    torch.testing.assert_close(compiled_layer(y0), eager(y0))
    assert len(traced) == 2  # made anew in its place


@pytest.mark.slow
def test_a_layer_that_decides_once_and_regularises(traced):
    f = im.nn.TimeSequential(nn.Linear(2, 8), nn.Tanh(), im.nn.Dropout(0.5), nn.Linear(8, 2))
    options = {"solver": im.Bosh3(), "regularisers": (im.nn.KineticEnergy(),)}
    layer, graph = (im.nn.NeuralODE(f, compile=c, **options) for c in (False, True))
    y0, found = torch.randn(5, 2), []
    for which in (layer, graph):
        torch.manual_seed(3)
        value, (energy,) = which(y0)
        found.append((value, energy, *torch.autograd.grad(value.sum() + energy.sum(), tuple(f.parameters()))))
    torch.testing.assert_close(*found)


class Rates(nn.Module):
    """Robertson's reaction, whose parameters and state f takes apart."""

    def __init__(self):
        super().__init__()
        self.k = nn.Parameter(torch.tensor([0.04, 3e7, 1e4], dtype=D))

    def forward(self, t, y):
        (a, b, c), (k1, k2, k3) = y.unbind(-1), self.k
        slow, fast, back = k1 * a, k2 * b * b, k3 * b * c
        return torch.stack([back - slow, slow - fast - back, fast], dim=-1)


@pytest.mark.slow
@pytest.mark.parametrize("method", [im.ImplicitEuler(dt=1e-4), im.Bosh3()], ids=lambda m: type(m).__name__)
def test_a_field_that_takes_its_parameters_apart(traced, method):
    method = replace(method, rtol=1e-6, atol=1e-12)
    f, y0 = Rates(), torch.tensor([1.0, 0, 0], dtype=D)
    graph, eager = (im.odeint(f, y0, (0.0, 1e-3), solver=method, compile=c).value[-1] for c in (True, False))
    torch.testing.assert_close(graph, eager, rtol=1e-6, atol=1e-12)
    found, right = (torch.autograd.grad(value[1], f.k)[0] for value in (graph, eager))
    torch.testing.assert_close(found, right, rtol=1e-4, atol=0)


def test_pytrees_and_complex_states(traced):
    def f(t, y, w):
        return {"a": 1j * y["a"] * w, "b": y["a"].real - y["b"]}

    y0 = {"a": torch.randn(3, dtype=torch.complex64), "b": torch.randn(3)}
    graph, eager = (
        im.odeint(f, y0, (0.0, 0.5, 1.0), 2.0, solver=im.Bosh3(), compile=c).value for c in (True, False)
    )
    torch.testing.assert_close(graph, eager)


def test_forward_mode_and_second_derivatives(traced):
    y0 = torch.randn(2, 2, dtype=D)

    def end(w, c):
        return im.odeint(turning, y0, (0.0, 1.0), w, solver=METHOD, compile=c).value[-1].sum()

    w = number(0.7)
    for transform in (torch.func.jacfwd, torch.func.jacrev, torch.func.hessian):
        found, right = (transform(end)(w, c) for c in (True, False))
        torch.testing.assert_close(found, right)


# ------------------------------------------------------------------------------------------- the backward pass


def test_derivatives_are_those_of_finite_differences(traced):
    y0, w = (0.5 * torch.randn(2, 2, dtype=D)).requires_grad_(), number(0.8).requires_grad_()
    t = torch.tensor([1.0, 0.6, 0.33, 0.04], dtype=D, requires_grad=True)

    def solve(y0, t, w):
        return im.odeint(turning, y0, t, w, solver=im.Midpoint(dt=0.1), compile=True).value

    assert torch.autograd.gradcheck(solve, (y0, t, w))
    assert len(traced) == 2


@pytest.mark.slow
def test_a_backward_pass_of_several_blocks_from_states_far_apart(traced, buffers, monkeypatch):
    for module, name, value in ((record, "CHECKPOINTS", 2), (graph, "CHUNK", 8), (graph_adjoint, "BLOCK", 4)):
        monkeypatch.setattr(module, name, value)
    y0, w, method = torch.randn(2, 2, dtype=D), number(0.8), im.Midpoint(dt=0.022)
    for end, steps, states in ((0.1, 5, 1), (1, 46, 3)):  # of 1 and 6 runs of the graph
        t = torch.linspace(0, end, 6, dtype=D)
        solution, _ = assert_same(turning, y0, t, w, solver=method)
        assert solution.steps == steps
        value = im.odeint(turning, y0, t, w.clone().requires_grad_(), solver=method, compile=True).value
        assert len(trajectory_of(value).record.states) == states
    assert len(traced) == 3  # forwards, for steps after the first 8, and backwards


def trajectory_of(value):
    """What the solve behind a value left for its derivative."""
    node = value.grad_fn
    while not hasattr(node, "work"):
        node = node.next_functions[0][0]
    return node.work


@pytest.mark.slow
def test_graphs_keep_nothing_of_the_solve_that_made_them(traced):
    w = torch.tensor(0.8, dtype=D, requires_grad=True)
    value = im.odeint(turning, torch.randn(2, dtype=D), (0.0, 1.0), w, solver=im.Heun(dt=0.2), compile=True).value
    left = weakref.ref(trajectory_of(value).record)
    value.sum().backward()
    del value
    gc.collect()
    assert left() is None


@pytest.mark.slow
def test_derivatives_by_some_inputs_only(traced):
    net, y0 = Net(), torch.randn(4, 2)
    first, *others = net.parameters()
    first.requires_grad_(False)
    found, right = [], []
    for c, to in ((True, found), (False, right)):
        value = im.odeint(net, y0, (0.0, 0.4, 1.0), solver=im.Bosh3(), compile=c).value
        to += torch.autograd.grad(value.sum(), others[1:])
    torch.testing.assert_close(found, right)


@pytest.mark.slow
def test_a_derivative_of_the_backward_pass(traced):
    y0, t = torch.randn(2, dtype=D, requires_grad=True), (0.0, 0.5, 1.0)
    w, found = torch.tensor(0.7, dtype=D, requires_grad=True), []
    for c in (True, False):
        value = im.odeint(turning, y0, t, w, solver=METHOD, compile=c).value
        first = torch.autograd.grad(value.square().sum(), (y0, w), create_graph=True)
        found.append((*first, *torch.autograd.grad(first[0].sum() * first[1], (y0, w))))
    torch.testing.assert_close(*found)


@pytest.mark.slow
def test_a_backward_pass_of_an_implicit_method_is_that_of_its_noted_steps(traced, monkeypatch):
    for module, name, value in ((graph, "WINDOW", 2), (graph_adjoint, "BLOCK", 8)):
        monkeypatch.setattr(module, name, value)

    def pulled(t, y, w, shift):  # stiff towards a line, and each sample by itself
        return -w * (y - torch.sin(y.flip(-1)) - shift) + 0.1 * torch.cos(t) * y

    y0, t = torch.randn(3, 2, dtype=D), torch.tensor([0.0, 0.1, 0.101, 0.102, 0.103, 0.3], dtype=D)
    args = number([50.0, 1.0]), torch.randn(3, 2, dtype=D)
    options = {"solver": im.Kvaerno3(rtol=1e-5, stage_tolerance=1e-6), "batch_dims": 1}
    solution, found = derivatives(pulled, y0, t, *args, compile=True, **options)
    assert solution.steps.max() > 2 * graph_adjoint.BLOCK
    assert len(traced) == 2
    eager = im.odeint(pulled, y0, t, *args, **options)
    torch.testing.assert_close(solution.value, eager.value, rtol=1e-5, atol=1e-6)
    # The same steps, swept eagerly: what differs is where Newton's iterations end, within their tolerance.
    monkeypatch.setattr(work, "sweep_as_graph", lambda *args: None)
    _, right = derivatives(pulled, y0, t, *args, compile=True, **options)
    torch.testing.assert_close(found, right, rtol=1e-8, atol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [METHOD, im.Dopri8(), im.Adams(order=3, rtol=1e-3), im.ReversibleHeun(rtol=1e-3)],
    ids=lambda m: type(m).__name__,
)
def test_lengths_that_are_constant_in_arc_length(traced, method, monkeypatch):
    """Among samples that begin, move and end at times of their own, with more outputs than a row passes."""
    for module, name, value in ((graph, "WINDOW", 2), (graph_adjoint, "BLOCK", 3)):
        monkeypatch.setattr(module, name, value)
    y0 = torch.tensor([[0.3], [float("nan")], [0.1]], dtype=D)
    t = torch.tensor([[0.0, 0.3, 0.31, 0.32, 1.0], [0, 0.1, 0.2, 0.3, 0.4], [1.0, 0.9, 0.8, 0.1, -0.5]], dtype=D)
    options = {"solver": method, "adjoint": ARC_LENGTH, "batch_dims": 1}
    _, (by_y0, by_t, by_w) = assert_same(driven, y0, t, number(2.0), **options)
    assert by_y0[[0, 2]].all()
    assert by_t[[0, 2]].all()
    assert not by_y0[1].any()
    assert by_w.isfinite()
    both = method is METHOD  # adjoints as graphs, which one method tells of
    _, by_default = derivatives(driven, y0, t, number(2.0), compile=both, **(options | {"adjoint": SWEPT}))
    assert (by_default[2] - by_w).abs() > 1e-8
    kinds = [graph.name.startswith("the derivative") for graph in traced.values()]
    assert kinds.count(False) <= 2  # the solve is the same
    assert kinds.count(True) == 1 + both


@pytest.mark.slow
def test_an_implicit_method_with_lengths_constant_in_arc_length(traced, monkeypatch):
    monkeypatch.setattr(graph_adjoint, "BLOCK", 8)

    def oscillator(t, y, mu):
        x, v = y.unbind(-1)
        return torch.stack([v, mu * (1 - x * x) * v - x], -1)

    y0, t, mu = torch.tensor([2.0, 0.0], dtype=D), torch.tensor([0.0, 1.0, 2.0], dtype=D), number(5.0)
    options = {"solver": im.Trapezoid(rtol=1e-3, atol=1e-4, stage_tolerance=1e-6), "adjoint": ARC_LENGTH}
    solution, found = derivatives(oscillator, y0, t, mu, compile=True, **options)
    assert solution.steps.max() > 2 * graph_adjoint.BLOCK
    assert len(traced) == 2
    # The same steps, through all of them at once: what differs is where Newton's iterations end.
    monkeypatch.setattr(derivative, "is_plain", lambda *args: False)
    _, right = derivatives(oscillator, y0, t, mu, compile=True, **options)
    torch.testing.assert_close(found, right, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_derivatives_of_an_implicit_method_are_those_of_finite_differences(traced):
    y0, w = (0.5 * torch.randn(2, 2, dtype=D)).requires_grad_(), number(0.8).requires_grad_()
    t = torch.tensor([1.0, 0.6, 0.33, 0.04], dtype=D, requires_grad=True)

    def solve(y0, t, w):
        method = im.Trapezoid(dt=0.1, rtol=1e-10, atol=1e-12)
        return im.odeint(turning, y0, t, w, solver=method, compile=True).value

    assert torch.autograd.gradcheck(solve, (y0, t, w))
    assert len(traced) == 2


@pytest.mark.slow
def test_samples_that_failed_have_no_part_in_derivatives_of_an_implicit_method(traced):
    # The second cannot begin, and the third blows up.
    y0, w = torch.tensor([[0.3], [float("nan")], [2.0], [0.2]], dtype=D), number(1.0)
    options = {"solver": im.Trapezoid(rtol=1e-3, stage_tolerance=1e-6, max_steps=60), "batch_dims": 1}
    t = torch.tensor([0.0, 0.4, 1.5], dtype=D)
    found = []
    for c in (True, False):
        solution, (by_y0, _, by_w) = derivatives(lambda t, y, w: w * y**2, y0, t, w, compile=c, **options)
        assert (solution.status == 0).tolist() == [True, False, False, True]
        assert (by_y0[1:3] == 0).all()
        found.append((solution.value[:, ::3], by_y0, by_w))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_calls_of_an_implicit_backward_pass_are_counted_with_those_of_its_iterations(traced):
    told = []
    y0, w, t = torch.randn(3, 2, dtype=D), torch.tensor(0.8, dtype=D, requires_grad=True), (0.0, 0.5)
    adjoint = im.RecursiveCheckpointAdjoint(listen=told.append)
    method = im.Trapezoid(rtol=1e-3)
    solution = im.odeint(turning, y0, t, w, solver=method, adjoint=adjoint, compile=True)
    solution.value.sum().backward()
    steps = int(solution.steps)
    # Of each step, taken once more: a Jacobian and at least one iteration; then the slope and the Jacobian of its
    # derivative; and the slope at the start.
    assert steps * 4 + 1 <= sum(told) <= steps * (3 + method.stage_steps) + 1


@pytest.mark.slow
def test_a_layer_counts_the_calls_of_a_backward_pass_that_is_a_graph(traced):
    told = []
    layer = im.nn.NeuralODE(
        Net(), solver=im.Bosh3(), adjoint=im.RecursiveCheckpointAdjoint(listen=told.append), compile=True
    )
    value = layer(torch.randn(6, 2))
    assert layer.backward_evaluations == 0
    value.sum().backward()
    steps = int(layer.solution.steps)
    # All steps but the last one to know the states, all for their derivatives, and the slope at the start.
    assert layer.backward_evaluations == 3 * (2 * steps - 1) + 1 == sum(told)


def test_where_a_backward_pass_cannot_be_a_graph_it_is_swept(traced, monkeypatch):
    monkeypatch.setattr(graph_adjoint, "run_as_graph", lambda *args, varies: None)
    y0, w, t = torch.randn(3, 2, dtype=D), torch.tensor(0.8, dtype=D), torch.linspace(0, 2, 3, dtype=D)
    assert_same(turning, y0, t, w, solver=METHOD)
    assert len(traced) == 1


# --------------------------------------------------------------------------------------------- where none is had


@pytest.mark.slow
def test_code_is_generated_for_a_network():
    """Of samples with outputs between: traced alone, as above, a loop may hold a constant tensor, of which the
    compiler makes no valid code. The method has few stages, as the time that code takes grows with them; both
    adjoints go on from the same graph."""
    net, y0, t = Net().double(), torch.randn(6, 2, dtype=D), torch.linspace(0, 1, 4, dtype=D)
    net.net[0].weight.requires_grad_(False)
    parameters = [x for x in net.parameters() if x.requires_grad]
    solve = partial(im.odeint, net, t=t, solver=im.Heun(rtol=1e-3), batch_dims=1)
    back = partial(solve, adjoint=im.BacksolveAdjoint())
    with warnings.catch_warnings():
        warnings.simplefilter("error", im.CompileWarning)
        graph = solve(y0, compile=True)
        found = torch.autograd.grad(graph.value.square().sum(), parameters)
        continuous = [
            torch.autograd.grad(back(y0, compile=c).value.square().sum(), parameters) for c in (True, False)
        ]
    torch.testing.assert_close(*continuous)
    eager = solve(y0)
    torch.testing.assert_close(graph.value, eager.value, rtol=1e-11, atol=1e-11)
    assert torch.equal(graph.steps, eager.steps)
    assert graph.evaluations == eager.evaluations
    torch.testing.assert_close(found, torch.autograd.grad(eager.value.square().sum(), parameters))
    # The same graph serves tensors of other kinds, but of the same shapes.
    count = len(im.compile_statistics())
    with torch.inference_mode():
        torch.testing.assert_close(solve(y0.clone(), compile=True).value, eager.value)
        negated = torch._neg_view(-y0)  # which looks like y0, but in memory is not
        torch.testing.assert_close(solve(negated, compile=True).value, eager.value)
    assert len(im.compile_statistics()) == count


@pytest.mark.slow
def test_code_is_generated_for_a_method_of_several_steps():
    y0, t = torch.randn(3, 2, dtype=D), torch.linspace(0, 0.5, 4, dtype=D)
    with warnings.catch_warnings():
        warnings.simplefilter("error", im.CompileWarning)
        options = {"solver": im.Adams(order=3, rtol=1e-3), "batch_dims": 1}
        graph, eager = (im.odeint(driven, y0, t, number(0.8), compile=c, **options) for c in (True, False))
    torch.testing.assert_close(graph.value, eager.value, rtol=1e-11, atol=1e-11)
    assert torch.equal(graph.steps, eager.steps)


@pytest.mark.slow
def test_a_tensor_that_f_makes_of_numbers_is_named():
    with pytest.warns(im.CompileWarning, match="make it outside of f"):
        value = im.odeint(turning, torch.ones(1, 2), (0.0, 0.1), 0.8, solver=im.Euler(dt=0.1), compile=True).value
    eager = im.odeint(turning, torch.ones(1, 2), (0.0, 0.1), 0.8, solver=im.Euler(dt=0.1)).value
    assert torch.equal(value, eager)


def test_f_is_checked_when_a_graph_of_it_is_made_and_not_again(traced):
    class Counting:
        calls = 0

        def __call__(self, t, y):
            if not torch.compiler.is_dynamo_compiling():
                Counting.calls += 1
            return -y

    f, y0 = Counting(), torch.ones(3, dtype=D)
    times = (0.0, 1.0)
    first, second = (im.odeint(f, y0, times, solver=METHOD, compile=True) for _ in range(2))
    assert Counting.calls == 1
    eager = im.odeint(f, y0, times, solver=METHOD)
    assert first.evaluations == second.evaluations == eager.evaluations
    with pytest.raises(ValueError, match="shape of y0"):
        im.odeint(lambda t, y: y[:2], y0, times, solver=METHOD, compile=True)
    with pytest.raises(ValueError, match="in place"):
        im.odeint(lambda t, y: y.neg_(), y0, times, solver=METHOD, compile=True)
    assert torch.equal(y0, torch.ones(3, dtype=D))


def test_a_tensor_out_of_sight_that_comes_to_need_a_gradient_is_an_error_whenever_it_does(traced):
    held = SimpleNamespace(rate=torch.ones(3, dtype=D))

    def f(t, y):
        return -held.rate * y

    def solve():
        return im.odeint(f, torch.ones(3, dtype=D), (0.0, 1.0), solver=METHOD, compile=True).value

    solve(), solve()
    held.rate.requires_grad_()
    with pytest.raises(ValueError, match="requires gradients"):
        solve()
    with torch.no_grad():
        plain = solve()
    with pytest.raises(ValueError, match="requires gradients"):
        solve()
    held.rate = torch.zeros(3, dtype=D)
    assert torch.equal(solve()[-1], torch.ones(3, dtype=D))
    assert not torch.equal(plain[-1], torch.ones(3, dtype=D))


def test_events_run_eagerly_and_say_so():
    def growing(t, y, w):
        return y**2 * w

    event = im.Event(lambda t, y, w: y.sum() - 1)
    with pytest.warns(im.CompileWarning, match="events"):
        graph = im.odeint(growing, torch.tensor([0.5]), (0.0, 3.0), 1.0, event=event, compile=True)
    assert graph.status == im.Status.EVENT


def test_what_cannot_be_traced_runs_eagerly_and_says_so_once():
    def f(t, y):
        return -y if y.sum() > 0.5 else -2 * y

    y0 = torch.ones(2)
    with pytest.warns(im.CompileWarning, match="odeint with Dopri5"):
        graph = im.odeint(f, y0, (0.0, 1.0), compile=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", im.CompileWarning)
        again = im.odeint(f, y0, (0.0, 1.0), compile=True)
    torch.testing.assert_close(graph.value, im.odeint(f, y0, (0.0, 1.0)).value)
    assert torch.equal(graph.value, again.value)


def test_unrolling_a_graph_is_refused():
    with pytest.raises(ValueError, match="UnrolledAdjoint"):
        im.odeint(turning, torch.ones(2), (0.0, 0.5), 1.0, adjoint=im.UnrolledAdjoint(), compile=True)


def test_args_that_cannot_be_compared_are_refused():
    with pytest.raises(TypeError, match="hashable"):
        im.odeint(lambda t, y, s: -y, torch.ones(1), (0.0, 0.5), {1, 2}, compile=True)


@pytest.mark.parametrize(
    ("method", "what"),
    [
        (im.Trapezoid(dt=0.1, stage_solver=im.Newton(), rtol=1e-8), "a stage_solver"),
        (im.Dopri5(tstops=(0.1,)), "tstops"),
    ],
)
def test_options_of_methods_that_have_no_graph_are_told_of(traced, method, what):
    y0, w, t = torch.randn(3, 2, dtype=D), torch.tensor(0.8, dtype=D), torch.tensor([0.0, 0.2], dtype=D)
    with pytest.warns(im.CompileWarning, match=f"compile=True is not supported for {what}; the eager loop runs"):
        assert_same(turning, y0, t, w, solver=method)
    assert not traced
