"""`qp` whose loop is one graph: the answers of the eager loop, traced once a shape.

Most of these trace the graph and run it by PyTorch's own operations, which takes a tenth of the time that making
code of it takes; what the loop computes is the same.
"""

from __future__ import annotations

import gc
import warnings
from dataclasses import replace

import pytest
import torch
from torch import Tensor, func
from torch._dynamo.exc import Unsupported
from torch._dynamo.utils import counters

import implicitly as im
from implicitly import compiled
from implicitly.argmin.programs.condensed import CondensedLoop
from implicitly.argmin.programs.polish import System
from implicitly.argmin.programs.program import QuadraticProgram, equilibrate
from implicitly.argmin.programs.qp import ProgramSolution
from tests.argmin.programs import D, program
from tests.leaks import living_tensors

# PyTorch's compiler imports and calls its own deprecated parts; nothing of ours is meant.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*"),
    pytest.mark.filterwarnings("ignore::FutureWarning:torch.*"),
]
RESULTS = ("value", "dual_inequality", "dual_equality", "slack")


def assert_same(*args: Tensor, rtol=1e-11, atol=1e-12, **options) -> ProgramSolution:
    """Values, duals, statuses and gradients are those of the eager loop."""
    args = tuple(t.detach().clone().requires_grad_() for t in args)
    graph, eager = (im.qp(*args, compile=c, on_failure="ignore", **options) for c in (True, False))
    assert torch.equal(graph.status, eager.status)
    found, right = [], []
    for name in RESULTS:
        a, b = getattr(graph, name), getattr(eager, name)
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol, equal_nan=True)
        weights = torch.randn_like(b)
        found.append((weights * a.nan_to_num()).sum())
        right.append((weights * b.nan_to_num()).sum())
    found, right = (torch.autograd.grad(sum(s), args) for s in (found, right))
    torch.testing.assert_close(found, right, rtol=100 * rtol, atol=100 * atol)
    return graph


def loops(traced) -> list:
    """The graphs of solves, without those of their backward passes."""
    return [graph for graph in traced.values() if graph.name.startswith("qp")]


def linear_program(batch=6, n=5) -> tuple[Tensor, ...]:
    args = program(batch=batch, n=n, m=12, q=1, seed=11)
    box = torch.eye(n, dtype=D).expand(batch, n, n)
    G, h = torch.cat([args[2], box, -box], 1), torch.cat([args[3], torch.ones(batch, 2 * n, dtype=D)], 1)
    return torch.zeros(n, n, dtype=D), args[1], G, h, args[4], args[5]


def mixed(batch=16) -> tuple[Tensor, ...]:
    """Strictly convex, unbounded, empty."""
    Q, p, G, h, *_ = program(batch=batch, n=4, m=5, q=0, seed=12)
    quarter = batch // 4
    Q[quarter : 2 * quarter] = 0
    p[quarter : 2 * quarter] = -G[quarter : 2 * quarter].sum(1) + 30 * torch.randn(quarter, 4, dtype=D)
    G[2 * quarter : 3 * quarter, 1] = -G[2 * quarter : 3 * quarter, 0]
    h[2 * quarter : 3 * quarter, 1] = -h[2 * quarter : 3 * quarter, 0] - 0.1
    return Q, p, G, h


PROGRAMS = {
    "the multipliers are the unknowns": program(batch=5, n=6, m=8, q=2),
    "many inequalities": program(batch=5, n=5, m=20, q=2),
    "inequalities alone": program(batch=5, n=6, m=8, q=0)[:4],
    "shared matrices": program(batch=5, n=6, m=8, q=1, shared=("Q", "G", "A")),
    "many shared inequalities": program(batch=5, n=4, m=12, q=1, shared=("Q", "G", "A")),
    "one program": program(batch=None, n=6, m=8, q=1),
    "linear": linear_program(),
}


@pytest.mark.parametrize("args", PROGRAMS.values(), ids=PROGRAMS)
def test_the_answers_are_those_of_the_eager_loop(traced, args):
    solution = assert_same(*args)
    assert bool(solution.converged.all())
    assert len(traced) >= 1


def test_equalities_alone_have_no_loop(traced):
    assert_same(*program(batch=5, n=6, m=0, q=2))
    assert not loops(traced)


def test_all_that_can_happen_in_one_batch(traced):
    solution = assert_same(*mixed())
    assert {0, im.Status.UNBOUNDED, im.Status.INFEASIBLE} <= set(solution.status.tolist())
    with pytest.raises(im.SolverError, match="INFEASIBLE"):
        im.qp(*mixed(), compile=True)


def test_float32(traced):
    args = program(batch=5, n=6, m=8, q=1, dtype=torch.float32)
    solution = assert_same(*args, rtol=1e-4, atol=1e-5)
    assert solution.value.dtype == torch.float32


def test_one_graph_serves_all_calls_of_a_shape(traced):
    for seed in range(3):
        assert_same(*program(batch=5, n=6, m=8, q=1, seed=seed))
    assert len(traced) == 2  # forwards and backwards
    kept = list(traced.values())
    assert [graph.calls for graph in kept] == [3, 3]
    assert_same(*program(batch=4, n=5, m=7, q=1))
    assert len(traced) == 4
    assert all(graph in traced.values() for graph in kept)
    assert counters["stats"]["unique_graphs"] == 4


@pytest.mark.slow
def test_other_options_are_other_graphs(traced):
    args = program(batch=5, n=6, m=8, q=1)
    few = assert_same(*args, solver=im.InteriorPoint(max_steps=1, rtol=1e-12))
    many = assert_same(*args, solver=im.InteriorPoint(rtol=1e-12))
    assert len(traced) >= 2
    assert few.steps.max() <= 1 < many.steps.max()


def test_the_last_samples_are_left_to_steps_of_their_own(traced, monkeypatch):
    args, left, finished = program(batch=40, n=6, m=8, q=0, seed=3)[:4], [], im.InteriorPoint._finished

    def noted(self, loop, k, state):
        left.append(int((state.status == im.Status.RUNNING).sum()))
        return finished(self, loop, k, state)

    monkeypatch.setattr(im.InteriorPoint, "_finished", noted)
    solution = assert_same(*args)
    steps = im.qp(*args).steps
    assert torch.equal(solution.steps, steps)
    assert steps.max() > steps.min()
    assert 0 < left[0] <= 7 / 8 * len(steps)
    (graph,) = loops(traced)
    assert graph.fallback is None


@pytest.mark.slow
def test_how_many_samples_are_left_makes_no_other_graph(traced):
    """Of 16 samples, up to two are left to the graph for few, more to that for all."""
    Q, p, G, h = program(batch=16, n=4, m=5, q=0, seed=13)[:4]
    counts = []
    for empty in (1, 2, 3, 5, 16):
        bad = h.clone()
        bad[:empty, 1] = -h[:empty, 0] - 0.1
        G_bad = G.clone()
        G_bad[:empty, 1] = -G[:empty, 0]
        solution = assert_same(Q, p, G_bad, bad)
        assert solution.status.tolist() == [im.Status.INFEASIBLE] * empty + [0] * (16 - empty)
        counts.append(len(loops(traced)))
    assert counts == [2, 2, 3, 3, 3]


def test_a_start(traced):
    args = program(batch=6, n=6, m=9, q=1, seed=14)
    start = im.qp(*args)
    assert_same(*args, start=start)
    assert not loops(traced)  # the active set is right
    moved = (args[0], args[1] + torch.randn(6, 6, dtype=D), *args[2:])
    assert_same(*moved, start=start)


@pytest.mark.slow
def test_transforms_of_torch_func(traced):
    args = program(batch=2, n=4, m=5, q=1, seed=15)
    p = torch.randn(3, 2, 4, dtype=D)

    def value(p: Tensor, compile: bool) -> Tensor:
        return im.qp(args[0], p, *args[2:], compile=compile).value

    for transformed in (
        lambda f: func.vmap(f)(p),
        lambda f: func.vmap(func.grad(lambda p: f(p).sin().sum()))(p),
        lambda f: func.jacrev(f)(p[0]),
        lambda f: func.jacfwd(f)(p[0]),
        lambda f: func.hessian(lambda p: f(p).sin().sum())(p[0]),
    ):
        found, right = (transformed(lambda p: value(p, c)) for c in (True, False))
        torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-10)
    assert len(traced) == 2  # of the batch, and of that of vmap
    assert counters["stats"]["unique_graphs"] == 2
    value(p[0].requires_grad_(), True)
    with torch.no_grad():
        value(p[0], True)
    assert counters["stats"]["unique_graphs"] == 2


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # the compiler looks at it
@pytest.mark.parametrize("m", [6, 14])
def test_inside_of_what_the_user_compiles(m):
    """The compiler leaves the solve alone, and makes graphs of what is around it."""
    torch._dynamo.reset()
    args = [t.requires_grad_() for t in program(batch=5, n=6, m=m, q=1, seed=3)]

    def loss(*args):
        return (2 * im.qp(*args).value).sin().sum()

    found, right = (torch.autograd.grad(f(*args), args) for f in (torch.compile(loss, backend="eager"), loss))
    torch.testing.assert_close(found, right, rtol=1e-8, atol=1e-8)
    torch._dynamo.reset()


def test_a_backward_pass_by_factors_that_are_not_good_enough_is_solved_eagerly(traced):
    args = program(batch=5, n=6, m=8, q=1)
    solution = assert_same(*args, adjoint=im.KKTAdjoint(rtol=1e-15), rtol=1e-9, atol=1e-10)
    assert bool(solution.converged.all())
    assert len(traced) == 2


def test_the_backward_pass_at_degenerate_points_and_of_the_relaxed_problem(traced):
    Q, p = torch.eye(2, dtype=D).expand(2, 2, 2), torch.tensor([[0.0, 0.0], [-2.0, 0.0]], dtype=D)
    G, h = torch.tensor([[1.0, 0.0], [1.0, 0.0]], dtype=D), torch.zeros(2, dtype=D)  # the same row twice
    solution = assert_same(Q, p, G, h)
    assert (solution.status == im.Status.DEGENERATE).any()
    assert len(traced) == len(loops(traced))
    assert_same(*program(batch=5, n=6, m=8, q=1), adjoint=im.KKTAdjoint(smoothing=1e-2), rtol=1e-9, atol=1e-9)
    assert len(traced) == len(loops(traced)) + 1


@pytest.mark.usefixtures("only_what_the_test_makes")
@pytest.mark.parametrize(("solver", "shared"), [(im.InteriorPoint(), ()), (im.ADMM(), ("Q", "G", "A"))])
def test_graphs_keep_nothing_of_the_solve_that_made_them(traced, solver, shared):
    def of_programs() -> int:
        gc.collect()
        return sum(t.shape[-1:] == (8,) or t.shape[-2:] in ((8, 6), (9, 6)) for t in living_tensors())

    args = [t.requires_grad_() for t in program(batch=5, n=6, m=8, q=1, shared=shared)]
    before = of_programs()
    torch.autograd.grad(im.qp(*args, solver=solver, compile=True).value.sum(), args)
    assert len(traced) >= 2
    assert of_programs() == before


def test_second_derivatives(traced):
    args = [t.requires_grad_() for t in program(batch=2, n=3, m=4, seed=1)]
    assert torch.autograd.gradgradcheck(lambda *a: im.qp(*a, compile=True).value, args, fast_mode=True)


def test_a_finished_sample_stays_where_it_is_whatever_becomes_of_its_factor():
    """In a graph it is stepped on until the last sample has finished."""
    system = System.of(*equilibrate(QuadraticProgram(*program(batch=2, n=6, m=5, q=1))))
    assert system.condensed is not None
    loop = CondensedLoop.of(system.condensed, 1e-8, 5, 0.995)
    state = loop.start()._replace(status=torch.tensor([0, -1]))
    M = loop.M.clone()
    M[0] = float("nan")
    after = replace(loop, M=M).step(1, state)
    for before, now in zip(state[:2], after):
        assert torch.equal(now[0], before[0])
        assert not torch.equal(now[1], before[1])


# --------------------------------------------------------------------------------------------- code, and none


@pytest.mark.slow
def test_code_is_generated():
    with warnings.catch_warnings():
        warnings.simplefilter("error", im.CompileWarning)
        assert_same(*program(batch=3, n=6, m=14, q=1, seed=16))


def test_what_cannot_be_traced_runs_eagerly_and_says_so_once(monkeypatch):
    refused = Unsupported("no such graph")

    def compile(f, **how):
        def graph(*tensors):
            raise refused

        return graph

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(compiled, "_graphs", type(compiled._graphs)())
    args = program(batch=3, n=4, m=5)
    with pytest.warns(im.CompileWarning, match="qp with InteriorPoint: .*no such graph"):
        first = im.qp(*args, compile=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", im.CompileWarning)
        second = im.qp(*args, compile=True)
    for solution in (first, second):
        assert torch.equal(solution.value, im.qp(*args).value)


@pytest.mark.parametrize("q", [0, 1], ids=["in float32 at first", "equalities"])
@pytest.mark.parametrize("finish", [im.InteriorPoint(), None], ids=["finished", "to the end"])
def test_blocks_of_steps_of_admm_are_one_graph_for_every_number_of_samples(traced, q, finish):
    args = program(batch=64, n=6, m=12, q=q, shared=("Q", "G", "A"), seed=5)
    assert_same(*(args if q else args[:4]), solver=im.ADMM(finish=finish), rtol=1e-9, atol=1e-9)
    blocks = [graph for graph in traced.values() if graph.name == "qp with ADMM"]
    assert sum(graph.calls for graph in blocks) > 2
    assert len(blocks) <= 4  # in either dtype, for the first size and for all others
    assert all(graph.fallback is None for graph in blocks)


def test_admm_as_graphs_knows_programs_without_a_solution(traced):
    Q, p, G, h = program(batch=8, n=3, m=4, q=0, shared=("Q", "G", "A"), seed=7)[:4]
    G = torch.cat([G, -G[:1]])
    h = torch.cat([h, 5 - h[:, :1]], 1)
    h[:3, -1] = -h[:3, 0] - 1
    solution = assert_same(Q, p, G, h, solver=im.ADMM(finish=None), rtol=1e-9, atol=1e-9)
    assert (solution.status == im.Status.INFEASIBLE).tolist() == [True] * 3 + [False] * 5
