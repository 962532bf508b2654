"""Graphs of whole solves: which are kept, when they are made anew, and that none is stale.

Most of these trace graphs and run them by PyTorch's own operations, which takes a fraction of the time that making
code of them takes; which graphs there are is the same.
"""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from collections import namedtuple
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

import implicitly as im
from implicitly import compiled
from implicitly.host import LOOPS
from implicitly.keys import exact

# PyTorch's compiler imports and calls its own deprecated parts; nothing of ours is meant.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*"),
    pytest.mark.filterwarnings("ignore::FutureWarning:torch.*"),
]
PICARD = im.FixedPointIteration(rtol=1e-5)
GRADIENT = im.ImplicitAdjoint(rtol=1e-12)


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    counters.clear()
    compiled._graphs.clear()
    for kept in (compiled._problems, compiled._counts, compiled._reasons):
        kept.clear()


class Cell(nn.Module):
    def __init__(self, hidden=4):
        super().__init__()
        self.inner, self.outer = nn.Linear(4, hidden), nn.Linear(hidden, 4)
        self.scale, self.calls = 0.3, 0

    def forward(self, z, x):
        step = self.scale * torch.tanh(self.outer(torch.tanh(self.inner(z)))) + x
        return step if self.training else step + 1


def solve(f, *args, compile=True, solver=PICARD):
    return im.fixed_point(f, torch.zeros_like(args[0]), *args, solver=solver, compile=compile).value.detach()


def assert_right(f, *args, solver=PICARD):
    assert_close(
        solve(f, *args, solver=solver), solve(f, *args, solver=solver, compile=False), rtol=1e-4, atol=1e-5
    )


def assert_the_second_leaves_the_size_open(cell, solver):
    for batch in (32, 48, 7, 20, 32):
        assert_right(cell, torch.randn(batch, 4), solver=solver)
    assert counters["stats"]["unique_graphs"] == 2
    first, second = sorted(im.compile_statistics(), key=lambda kept: kept.calls)
    assert (first.calls, second.calls) == (2, 3)
    assert first.shapes[0] == ((32, 4), torch.float32)
    assert second.shapes[0] == ((None, 4), torch.float32)
    for kept in (first, second):
        assert kept.name == f"fixed_point with {type(solver).__name__}"
        assert kept.first_call_s is not None
        assert kept.first_call_s > 0
        assert kept.fallback is None


def test_the_second_batch_size_leaves_the_size_open(traced):
    cell = Cell()
    assert_the_second_leaves_the_size_open(cell, PICARD)
    # Of one sample, and of another dtype, there are graphs of their own.
    assert_right(cell, torch.randn(1, 4))
    assert_right(cell.double(), torch.randn(7, 4, dtype=torch.float64))
    assert len(im.compile_statistics()) == 4


def field(t, y, W):
    return torch.tanh(y @ W)


def trajectory(adjoint, x, W, compile):
    options = {"solver": im.Heun(rtol=1e-2), "adjoint": adjoint, "batch_dims": 1, "compile": compile}
    return im.odeint(field, x, (0.0, 0.5, 1.0), W, **options).value


def program(x, W, compile):
    Q = W @ W.T + torch.eye(4)
    return im.qp(Q.expand(len(x), -1, -1) * 1, x, W.expand(len(x), -1, -1) * 1, x * 0 + 1, compile=compile).value


def cell(z, x, W):
    return torch.tanh(z @ W / 8) + x


def equilibrium(x, W, compile):
    options = {"solver": im.FixedPointIteration(rtol=1e-12), "adjoint": im.ImplicitAdjoint(rtol=1e-11)}
    return im.fixed_point(cell, x, x, W, compile=compile, **options).value


@pytest.mark.slow
@pytest.mark.parametrize(
    "run",
    [
        equilibrium,
        partial(trajectory, im.RecursiveCheckpointAdjoint()),
        partial(trajectory, im.BacksolveAdjoint()),
        program,
    ],
    ids=["fixed_point", "odeint", "backsolve", "qp"],
)
def test_the_second_batch_size_leaves_the_size_open_backwards_too(traced, run):
    W = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    for batch in (5, 7, 3, 9):
        x = torch.randn(batch, 4, dtype=torch.float64, requires_grad=True)
        found, right = (
            torch.autograd.grad(run(x, W, compile).square().sum(), (x, W)) for compile in (True, False)
        )
        assert_close(found, right, rtol=1e-9, atol=1e-9)
    assert sorted(graph.calls for graph in im.compile_statistics()) in ([1, 1, 3, 3], [1, 2, 3, 6])
    assert all(graph.fallback is None for graph in im.compile_statistics())


@pytest.mark.slow
def test_a_size_that_cannot_be_left_open_is_no_error_in_the_log(traced, caplog):
    constant = torch.ones(7, 1)
    f = lambda z, x: 0.3 * torch.tanh(z) * (constant if len(z) == 7 else 1) + x  # noqa: E731
    for batch in (5, 3, 7):
        assert_right(f, torch.randn(batch, 4))
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.slow
def test_code_is_generated_for_a_size_that_is_open(monkeypatch):
    made = torch.compile

    def compile(f, dynamic, options, **how):
        """The graph of the first size is traced only."""
        return made(
            f, dynamic=dynamic, **how, **({"backend": "eager"} if dynamic is False else {"options": options})
        )

    monkeypatch.setattr(torch, "compile", compile)
    assert_the_second_leaves_the_size_open(Cell(), im.Anderson(rtol=1e-5))


def fake(function, *how):
    return function


def test_graphs_that_are_made_again_and_again_are_told_of(monkeypatch):
    monkeypatch.setattr(compiled, "_compile", fake)
    run = lambda a, b: compiled.run_as_graph("solve", "key", torch.add, a, b, varies=True)  # noqa: E731
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for size in range(1, compiled.MANY):
            run(torch.zeros(size + 1, size), torch.zeros(1))
    with pytest.warns(im.CompileWarning, match=r"graph 8 .* 0 changed from \(8, 7\), .*32.* to \(3, 3\).* pad"):
        run(torch.zeros(3, 3), torch.zeros(1))
    for size in range(10, 40):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run(torch.zeros(size + 1, size), torch.zeros(1))
    assert len(im.compile_statistics()) == compiled.CAPACITY


def test_states_of_another_width_count_as_the_same_function(monkeypatch):
    monkeypatch.setattr(compiled, "_compile", fake)
    f = scaled
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for width in range(1, compiled.MANY):
            solve(f, torch.randn(2, width), 2)
    with pytest.warns(im.CompileWarning, match=r"graph 8 for the same function, .* from \(2, 7\), .* to \(2, 8\)"):
        solve(f, torch.randn(2, 8), 2)
    for power in range(1, compiled.MANY):  # of what is no tensor, too
        solve(f, torch.randn(2, 8), float(power))
    with pytest.warns(im.CompileWarning, match="graph 16 .* an argument or an attribute of f changed"):
        solve(f, torch.randn(2, 8), 8.0)


def test_functions_made_for_one_call_each_are_told_of(monkeypatch):
    monkeypatch.setattr(compiled, "_compile", fake)
    monkeypatch.setattr(compiled, "_dropped", [])
    x, calls = torch.randn(2, 3), compiled.CAPACITY + compiled.MANY
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(calls - 1):
            solve(lambda z, x: 0.3 * z + x, x)
    with pytest.warns(
        im.CompileWarning, match="keeps 32 graphs, and 8 were dropped .* only once; .* lambda, .*: create it once"
    ):
        solve(lambda z, x: 0.3 * z + x, x)


@pytest.mark.slow
@torch._dynamo.config.patch(recompile_limit=3)
def test_a_number_of_f_that_keeps_changing_is_told_of_and_never_stale(traced, monkeypatch):
    monkeypatch.setattr(compiled, "MANY", 3)
    monkeypatch.setattr(compiled, "_dropped", [])
    cell, x = Cell(), torch.randn(3, 4)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", im.CompileWarning)
        for i in range(5):  # after three of them the compiler gives up
            cell.scale = 0.3 - 0.01 * i
            assert_right(cell, x)
    assert [re.search(r"makes graph (\d+) ", str(w.message))[1] for w in told] == ["3"]
    assert "attribute of f changed" in str(told[0].message)


def transposed(z, x, W):
    return z @ W.T + torch.sin(z) @ W.mT - x


@pytest.mark.parametrize(
    ("solver", "of"),
    [(im.Newton(), "args"), (im.Newton(), "parameters"), (im.NewtonKrylov(), "parameters"), (im.LBFGS(), "args")],
    ids=lambda s: s if isinstance(s, str) else type(s).__name__,
)
def test_transposes_by_attribute_are_part_of_graphs_that_differentiate_f(traced, solver, of):
    x, W = torch.randn(3, 4, dtype=torch.float64), torch.randn(4, 4, dtype=torch.float64) / 8 + torch.eye(4)
    module = nn.Linear(4, 4, bias=False).double()
    module.forward = lambda z, x: transposed(z, x, module.weight)
    f, args = (transposed, (x, W)) if of == "args" else (module, (x,))
    if isinstance(solver, im.LBFGS):
        solve = partial(im.argmin, lambda z, *args: f(z, *args).square().sum(1))
    else:
        solve = partial(im.root, f)
    found, right = (solve(torch.zeros_like(x), *args, solver=solver, compile=c).value for c in (True, False))
    assert_close(found, right, rtol=1e-9, atol=1e-9)
    assert [graph.fallback for graph in im.compile_statistics()] == [None]


def test_a_transpose_of_what_f_closes_over_is_named():
    x, W = torch.randn(3, 4), torch.eye(4)
    with pytest.warns(im.CompileWarning, match=r"closes over; pass it in args, or write transpose\(-2, -1\)"):
        im.root(lambda z, x: z @ W.T - x, torch.zeros_like(x), x, compile=True)


def test_a_backward_pass_through_numpy_runs_eagerly_and_says_so(traced):
    def f(z, x):
        return torch.tanh(0.3 * z + x) * torch.from_numpy(
            np.full(4, 0.9, np.float32) * z.detach().numpy().shape[0]
        )

    x = torch.randn(1, 4)
    gradients = []
    for compile in (False, True):
        given = x.clone().requires_grad_()
        value = im.fixed_point(f, torch.zeros_like(x), given, solver=PICARD, compile=compile).value
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            gradients += torch.autograd.grad(value.sum(), given)
    assert_close(*gradients, rtol=1e-4, atol=1e-5)
    assert any("backward" in str(w.message) and "RuntimeError" in str(w.message) for w in told)


@pytest.mark.slow
def test_what_is_interrupted_is_compiled_again(monkeypatch):
    from torch._inductor.graph import GraphLowering

    cell, x = Cell(), torch.randn(3, 4)

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(GraphLowering, "codegen", interrupted)
        patch.setattr(GraphLowering, "codegen_with_cpp_wrapper", interrupted)
        with pytest.raises(KeyboardInterrupt):
            solve(cell, x)
    assert im.compile_statistics() == ()
    made = torch.compile  # now the graph is traced only
    monkeypatch.setattr(torch, "compile", lambda f, options, **how: made(f, backend="eager", **how))
    assert_right(cell, x)
    (kept,) = im.compile_statistics()
    assert kept.calls == 1


def test_what_changes_in_f_is_not_stale(traced):
    cell, x = Cell(), torch.randn(3, 4)
    assert_right(cell, x)
    before = solve(cell, x)
    cell.eval()
    assert_right(cell, x)
    assert not torch.allclose(solve(cell, x), before)
    cell.train()
    assert_right(cell, x)
    cell.scale = 0.6
    assert_right(cell, x)
    cell.inner, cell.outer = nn.Linear(4, 6), nn.Linear(6, 4)
    assert_right(cell, x)
    cell.inner.weight = nn.Parameter(torch.randn(6, 4))
    assert_right(cell, x)


# As attributes of our own are called, which do not change.
method, spec, args_scale = 0.1, 0.2, 0.3


def with_names_of_ours(z, x, given):
    return method * torch.tanh(z) + spec * x + args_scale + given.method * x + given.leaves[0] + given(z, x)


@pytest.mark.slow
def test_what_the_user_calls_as_we_call_our_own_is_not_stale(traced, monkeypatch):
    given, x = Cell(), torch.randn(3, 4)
    given.method, given.leaves = 0.3, [0.1]
    assert_right(with_names_of_ours, x, given)
    for name in ("method", "spec", "args_scale"):
        monkeypatch.setitem(globals(), name, 0.35)
        assert_right(with_names_of_ours, x, given)
    given.method, given.leaves[0] = 0.6, 0.7
    assert_right(with_names_of_ours, x, given)
    scope = {"torch": torch, "k": 0.3}  # without a name
    exec("def f(z, x): return k * torch.tanh(z) + x", scope)
    assert_right(scope["f"], x)
    scope["k"] = 0.1
    assert_right(scope["f"], x)


@pytest.mark.slow
def test_hooks_that_are_added_and_removed_are_seen(traced):
    cell, x = Cell(), torch.randn(3, 4)
    assert_right(cell, x)
    first = cell.inner.register_forward_hook(lambda module, args, output: 0.2 * output)
    assert_right(cell, x)
    second = cell.register_forward_pre_hook(lambda module, args: (args[0], 2 * args[1]))
    assert_right(cell, x)
    first.remove()
    second.remove()
    assert_right(cell, x)
    assert len(traced) == 3


@pytest.mark.slow
def test_another_module_in_the_same_function_has_a_graph_of_its_own(traced):
    cell, x = Cell(), torch.randn(3, 4)
    f = lambda z, x: cell(z, x)  # noqa: E731
    assert_right(f, x)
    cell = Cell()
    assert_right(f, x)


@dataclass(frozen=True)
class Setting:
    number: float | tuple[float, ...]

    def __call__(self, z, x):
        return scaled(z, x, self.number)


def steep(z, x, cell):
    return cell.scale * z + x


def of_setting(z, x, setting):
    return setting(z, x)


def scaled(z, x, power):
    return 0.3 * torch.tanh(z) + x + (1 if isinstance(power, float) else 2)


@pytest.mark.parametrize(
    "writes", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["in place", "carried"]
)
@pytest.mark.parametrize("solver", [im.Anderson, im.Broyden])
def test_a_history_that_lies_outside_of_the_loop_is_that_of_the_eager_one(traced, monkeypatch, solver, writes):
    monkeypatch.setattr(LOOPS, "writes", writes)
    solver = solver(history=3, rtol=1e-12)
    f, x = Cell().double(), torch.randn(5, 4, dtype=torch.float64) * torch.tensor([0.1, 1, 3, 10, 0])[:, None]
    f.scale = 0.9
    made, eager = (
        im.fixed_point(f, torch.zeros_like(x), x, solver=solver, compile=compile, adjoint=GRADIENT)
        for compile in (True, False)
    )
    assert eager.steps.amax() > 6  # each place is written more than once
    assert torch.equal(made.steps, eager.steps)
    assert_close(made.value, eager.value, rtol=1e-11, atol=1e-11)
    parameters = list(f.parameters())
    found, right = (torch.autograd.grad(s.value.square().sum(), parameters) for s in (made, eager))
    assert_close(found, right, rtol=1e-10, atol=1e-10)


@pytest.mark.slow
def test_loops_of_what_differentiates_carry_what_they_remember():
    def energy(z, x):
        return (torch.cosh(z).log() + 0.5 * (z - x).square()).sum()

    def f(z, x):
        return z - 0.3 * torch.func.grad(energy)(z, x)

    x = torch.randn(3, 2, dtype=torch.float64)
    solver = im.Anderson(history=2, rtol=1e-10)
    with warnings.catch_warnings():
        warnings.simplefilter("error", im.CompileWarning)
        value = solve(f, x, solver=solver)
        solve(f, x + 1, solver=solver)
    assert_close(value, solve(f, x, compile=False, solver=solver), rtol=1e-9, atol=1e-9)
    (graph,) = im.compile_statistics()
    assert graph.fallback is None
    assert graph.calls == 2
    with torch.autograd.graph.save_on_cpu():  # which the compiler's first try would leave refused
        torch.ones(2, requires_grad=True).exp().sum().backward()


@pytest.mark.slow
def test_static_args_that_are_equal_but_not_the_same_have_graphs_of_their_own(traced):
    x = torch.randn(3, 4)
    for power in (2, 2.0):
        assert_right(scaled, x, power)
        assert_right(Setting(power), x)
        assert_right(of_setting, x, Setting(power))


@pytest.mark.parametrize("hold", [lambda x: (x,), lambda x: frozenset({x}), lambda x: Setting(((x,),))])
def test_what_holds_equal_numbers_that_are_not_the_same_is_told_apart(hold):
    held = [exact(hold(number)) for number in (2, 2.0, 0.0, -0.0, 1, True)]
    assert len(set(held)) == len(held)
    assert exact(hold(2.0)) == held[1]


def of_pair(z, x, pair):
    return 0.3 * torch.tanh(z) + x + 2 * pair.first - pair.second


def test_args_of_another_class_of_the_same_name_have_a_graph_of_their_own(traced):
    x, one, two = torch.randn(3, 4), torch.ones(3, 4), torch.full((3, 4), 2.0)
    for names in ("first second", "second first"):
        assert_right(of_pair, x, namedtuple("Pair", names)(one, two))


def test_a_backward_solve_that_once_had_no_solution_is_not_taken_to_have_none_ever_after(traced):
    cell, adjoint, x = Cell(), im.ImplicitAdjoint(im.Neumann()), torch.randn(3, 4, requires_grad=True)
    solver = im.FixedPointIteration(damping=0.3)

    def gradient(compile):
        how = {"solver": solver, "adjoint": adjoint, "on_failure": "ignore", "compile": compile}
        value = im.fixed_point(steep, torch.zeros_like(x), x, cell, **how).value
        return torch.autograd.grad(value.sum(), x)[0]

    cell.scale = -3.0  # at which the series of Neumann diverges
    assert_close(gradient(True), torch.zeros_like(x))
    cell.scale = 0.5
    with pytest.warns(im.CompileWarning, match="backward.*what f computes has changed"):
        assert_close(gradient(True), gradient(False))
    assert gradient(True).amin() > 1


def test_starts_and_cotangents_of_other_strides_have_the_same_graphs(traced):
    x, other = torch.randn(3, 4, requires_grad=True), torch.randn(4, 3).T
    ways = (other, other.contiguous(), torch.ones(1, 1).expand(3, 4))
    for way in ways:
        graph, eager = (im.fixed_point(scaled, way, x, 2, solver=PICARD, compile=c).value for c in (True, False))
        assert_close(graph, eager, rtol=1e-4, atol=1e-4)
        assert_close(*(torch.autograd.grad(value, x, way) for value in (graph, eager)), rtol=1e-4, atol=1e-4)
    assert [kept.calls for kept in im.compile_statistics()] == [len(ways)] * 2


def coupled(z, a, b):
    return 0.3 * torch.tanh(z * a) * b + a


def test_what_is_passed_twice_or_in_parts_of_one_tensor_is_no_hindrance(traced):
    whole = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    (a, b), z0 = whole.unbind(), torch.zeros(3, 4, dtype=torch.float64)
    solver, adjoint = im.FixedPointIteration(rtol=1e-10), im.ImplicitAdjoint(im.Neumann(rtol=1e-10))
    for args in ((a, a), (a, b), (b, a)):
        made, eager = (
            im.fixed_point(coupled, z0, *args, solver=solver, adjoint=adjoint, compile=c).value
            for c in (True, False)
        )
        found, right = (torch.autograd.grad(v.square().sum(), whole, retain_graph=True) for v in (made, eager))
        assert_close(made, eager, rtol=1e-8, atol=1e-8)
        assert_close(found, right, rtol=1e-8, atol=1e-8)
    assert [kept.calls for kept in im.compile_statistics() if kept.name.startswith("the backward")] == [3]


def test_tensors_out_of_sight_that_share_memory_are_told_of():
    first, second = torch.randn(2, 4).unbind()
    with pytest.warns(im.CompileWarning, match=r"two tensors that share memory.*clone"):
        solve(lambda z, x: 0.3 * torch.tanh(z) * first + second + x, torch.randn(3, 4))


def test_a_sparse_tensor_makes_the_solve_eager_and_is_named():
    x, A = torch.randn(3, 4), (0.1 * torch.eye(4)).to_sparse()

    def f(z, x, A):
        return (A @ z.T).T + x

    with pytest.warns(im.CompileWarning, match="fixed_point .*sparse"):
        assert_right(f, x, A)
    with warnings.catch_warnings():  # which is said once
        warnings.simplefilter("error")
        assert_right(f, x, A)


@pytest.mark.slow
def test_closures_of_the_same_code_and_functions_made_after_others_died(traced):
    x = torch.randn(3, 4)
    for shift in (1.0, 2.0, 3.0):
        assert_right(lambda z, x, shift=shift: 0.3 * torch.tanh(z) + x + shift, x)

    def closure(shift):
        return lambda z, x: 0.3 * torch.tanh(z) + x + shift

    for shift in (1.0, 2.0):
        assert_right(closure(shift), x)


class Effect(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind, self.calls, self.seen = kind, 0, []

    def forward(self, z, x):
        if self.kind == "count":
            self.calls += 1
        elif self.kind == "append":
            self.seen.append(1)
        elif self.kind == "print":
            print("called")
        elif z.detach().sum() > 1e9 if self.kind == "branch" else len(z.detach().gt(1e9).nonzero()):
            return z
        return 0.3 * torch.tanh(z) + x


@pytest.mark.parametrize("kind", ["count", "append", "print", "branch", "size"])
def test_side_effects_and_branches_run_eagerly_and_are_told_once(kind, capsys):
    x = torch.randn(3, 4)
    expected = solve(Effect(kind), x, compile=False)
    expected_effects = effects(Effect(kind), x, False, capsys)
    f = Effect(kind)
    with pytest.warns(im.CompileWarning, match="fixed_point .* eager"):
        assert effects(f, x, True, capsys) == expected_effects
    with warnings.catch_warnings():
        warnings.simplefilter("error", im.CompileWarning)
        assert effects(f, x, True, capsys) == expected_effects
        assert torch.equal(solve(f, x), expected)
        solve(f, torch.randn(5, 4))  # for another size it is not tried again
    assert len({kept.fallback for kept in im.compile_statistics()} - {None}) == 1


def effects(f, x, compile, capsys):
    """What a solve leaves behind."""
    f.calls, f.seen = 0, []
    capsys.readouterr()
    solve(f, x, compile=compile)
    return f.calls, len(f.seen), capsys.readouterr().out


SCRIPT = """
    import json, warnings
    from pathlib import Path
    import os, torch, implicitly as im

    def f(z, x):
        return 0.3 * torch.tanh(z) + x

    x = torch.ones(3, 4)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        value = im.fixed_point(f, torch.zeros(3, 4), x, solver=im.FixedPointIteration(), compile=True).value
    expected = im.fixed_point(f, torch.zeros(3, 4), x, solver=im.FixedPointIteration()).value
    (kept,) = im.compile_statistics()
    made = [str(p) for p in Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).rglob("*.so")]
    told = [str(w.message) for w in told if issubclass(w.category, im.CompileWarning)]
    print(json.dumps([torch.allclose(value, expected), kept.first_call_s, kept.fallback, sorted(made), told]))
"""


def in_a_process(tmp_path, **environment):
    import json

    out = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT)],
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(out.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_second_process_finds_what_the_first_compiled(tmp_path):
    # PyTorch 2.13 caches no graphs with a while_loop as a whole ("Can't cache HigherOrderOperator"); what the C++
    # compiler made, which takes most of the time, it finds again.
    right, first_s, fallback, made, _ = in_a_process(tmp_path)
    assert (right, fallback) == (True, None)
    assert made
    right, second_s, fallback, found, _ = in_a_process(tmp_path)
    assert (right, fallback) == (True, None)
    assert found == made
    assert second_s < first_s


@pytest.mark.slow
def test_without_a_compiler_the_eager_loop_runs_and_says_so(tmp_path):
    right, _, fallback, _, told = in_a_process(tmp_path, CXX="/nonexistent")
    assert right
    assert fallback is not None
    assert len(told) == 1
    assert "eager" in told[0]


# ------------------------------------------------------------------------------------------------------ threads


def in_threads(*work):
    """What each of `work` returns, or the exception that it raises, all begun at once."""
    go, results = threading.Barrier(len(work)), [None] * len(work)

    def run(i):
        go.wait()
        try:
            results[i] = work[i]()
        except BaseException as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)  # those that wait for each other are left
        assert not thread.is_alive()
    return results


@pytest.mark.slow
def test_threads_share_graphs_of_the_same_key_and_make_those_of_others(traced):
    def tanh(z, x, W):
        return torch.tanh(z @ W) + x

    def sine(z, x, W):
        return torch.sin(z @ W) + x

    W = 0.1 * torch.randn(4, 4)
    cases = [(f, torch.randn(batch, 4)) for f, batch in ((tanh, 3), (tanh, 3), (tanh, 5), (sine, 3), (sine, 3))]

    def gradients(f, x, compile):
        inputs = (x.clone().requires_grad_(), W.clone().requires_grad_())
        value = im.fixed_point(f, torch.zeros_like(x), *inputs, solver=PICARD, compile=compile).value
        return value.detach(), *torch.autograd.grad(value.sin().sum(), inputs)

    def repeatedly(case):
        return [gradients(*case, compile=True) for _ in range(3)]

    results = in_threads(*(lambda case=case: repeatedly(case) for case in cases))
    for case, result in zip(cases, results):
        if isinstance(result, BaseException):
            raise result
        expected = gradients(*case, compile=False)
        for actual in result:
            assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    kept = traced.values()
    assert len(kept) == 2 * 3  # forwards and backwards
    assert sum(graph.calls for graph in kept) == 2 * 3 * len(cases)


def test_of_a_graph_that_cannot_be_had_threads_tell_once(monkeypatch):
    begun = []

    def fails(*tensors):
        begun.append(1)
        time.sleep(0.05)
        raise AssertionError("no graph")

    monkeypatch.setattr(compiled, "_compile", lambda *how: fails)
    run = lambda: compiled.run_as_graph("solve", "key", torch.neg, torch.zeros(3))  # noqa: E731
    with pytest.warns(im.CompileWarning, match="no graph") as told:
        assert in_threads(*[run] * 5) == [None] * 5
    assert len(told) == len(begun) == 1


def test_a_thread_that_waits_for_a_graph_whose_compilation_is_interrupted_makes_its_own(monkeypatch):
    begun = []

    def interrupted_once(*tensors):
        begun.append(1)
        if len(begun) == 1:
            time.sleep(0.05)
            raise KeyboardInterrupt
        return "done"

    monkeypatch.setattr(compiled, "_compile", lambda *how: interrupted_once)
    run = lambda: compiled.run_as_graph("solve", "key", torch.neg, torch.zeros(3))  # noqa: E731
    results = in_threads(run, run, run)
    assert sum(isinstance(result, KeyboardInterrupt) for result in results) == 1
    assert results.count("done") == 2
    (kept,) = im.compile_statistics()
    assert kept.calls == 2


@pytest.mark.parametrize("again", [False, True])
def test_where_the_compiler_is_off_the_eager_loop_runs_and_says_so(traced, again):
    def f(t, y):
        return -y

    y0 = torch.randn(3)
    solve = partial(im.odeint, f, y0, (0.0, 1.0), solver=im.Bosh3(), compile=True)
    if again:  # a graph that is there is not run either
        solve()
    with FlopCounterMode(display=False), pytest.warns(im.CompileWarning, match="torch.compile is disabled here"):
        found = solve().value
    assert_close(found[-1], y0 * torch.tensor(-1.0).exp(), rtol=1e-3, atol=1e-5)
    solve()  # without a warning
    assert im.compile_statistics()[-1].calls == 1


def test_solves_of_other_threads_stay_eager_while_one_compiles():
    """`torch.compiler.is_compiling` is true in all threads then."""
    x, seen = torch.randn(3, 4), []
    expected = solve(scaled, x, 2, compile=False)

    def backend(graph, inputs):
        (result,) = in_threads(lambda: (torch.compiler.is_compiling(), solve(scaled, x, 2, compile=False)))
        seen.append(result)
        return graph

    assert torch.equal(torch.compile(torch.sin, backend=backend)(x), x.sin())
    ((compiling, value),) = seen
    assert compiling
    assert torch.equal(value, expected)
    # As a loop in a graph it would also be right, and have compiled one.
    assert counters["stats"]["unique_graphs"] == 1


# ------------------------------------------------------------------------------------- a solve inside of a solve

INNER_PICARD = im.FixedPointIteration(rtol=1e-12)
INNER = {
    "linear_solve": lambda z, A: im.linear_solve(lambda v, A: v @ A.mT, z, A),
    "fixed_point": lambda z, A: im.fixed_point(
        lambda y, z, A: 0.2 * torch.tanh(y @ A) + z, torch.zeros_like(z), z, A, solver=INNER_PICARD
    ),
    "argmin": lambda z, A: im.argmin(
        lambda y, z, A: ((y @ A.mT - z) ** 2).sum(1), torch.zeros_like(z), z, A, in_dims=(0, None)
    ),
    "qp": lambda z, A: im.qp(A @ A.mT, z),
    "odeint": lambda z, A: im.odeint(lambda t, y, A: -y @ A, z, torch.linspace(0, 1, 2).to(z), A),
}


def holds_a_solve(name):
    """An f whose value takes a solve by `name`, and which contracts."""

    def f(z, x, A):
        value = INNER[name](z + x, A).value
        return 0.3 * torch.tanh(value[-1] if name == "odeint" else value) + x

    return f


def as_field(f):
    return lambda t, y, x, A: f(y, x, A) - y


OUTER = {
    "fixed_point": lambda f, x, A, **how: im.fixed_point(f, torch.zeros_like(x), x, A, solver=INNER_PICARD, **how),
    "odeint": lambda f, x, A, **how: im.odeint(
        as_field(f), torch.zeros_like(x), torch.linspace(0, 1, 2).to(x), x, A, solver=im.Heun(dt=0.5), **how
    ),
}
# Each inside of a fixed point, and of a trajectory one whose derivative is another solve.
NESTED = [*(("fixed_point", inner) for inner in INNER), ("odeint", "argmin"), ("odeint", "odeint")]


@pytest.mark.parametrize(("outer", "inner"), NESTED)
def test_a_solve_inside_of_a_compiled_one_makes_it_eager_and_is_named(outer, inner):
    A, x = 3 * torch.eye(3).double() + 0.3 * torch.randn(3, 3).double(), torch.randn(2, 3).double()
    f = holds_a_solve(inner)

    def solved(**how):
        inputs = (x.clone().requires_grad_(), A.clone().requires_grad_())
        value = OUTER[outer](f, *inputs, **how).value
        return value, *torch.autograd.grad(value.sin().sum(), inputs)

    expected = solved()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", im.CompileWarning)
        actual = solved(compile=True)
    told = [str(w.message) for w in told if issubclass(w.category, im.CompileWarning)]
    assert len(told) == 1
    assert told[0].startswith(f"{outer} with")
    assert f"f itself calls {inner}, and a graph cannot hold one solve inside of another" in told[0]
    for a, b in zip(actual, expected):
        assert torch.equal(a, b)


@pytest.mark.parametrize("what", ["fixed_point", "odeint", "qp"])
def test_few_of_the_compilers_conditions_are_looked_at_in_each_call(what, traced, monkeypatch):
    """Which ones is told by how the compiler calls them: another version may do so in another way, and only time
    would show."""
    looked, told = [], compiled._is_worth_a_look
    monkeypatch.setattr(compiled, "_is_worth_a_look", lambda name: looked.append(told(name)) or looked[-1])
    f, x = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2)), torch.randn(4, 2)
    with torch.no_grad():
        if what == "fixed_point":
            im.fixed_point(lambda z, x: 0.1 * f(z) + x, torch.zeros(4, 2), x, solver=PICARD, compile=True)
        elif what == "odeint":
            im.odeint(lambda t, y: f(y), x, (0.0, 1.0), solver=im.Heun(), compile=True)
        else:
            eye, row = torch.eye(2).expand(4, 2, 2), torch.ones(4, 1, 2)
            im.qp(eye, x, row, torch.ones(4, 1), compile=True)
    assert len(looked) > 200
    assert 3 * sum(looked) < len(looked)
