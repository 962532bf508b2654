"""What all benchmarks share: turns, peers that cannot run, peers in another process."""

import sys

import pytest
import torch

import implicitly as im

pytest.importorskip("tabulate", reason="the benchmarks' own packages are not installed")

from benchmarks import elsewhere
from benchmarks.elsewhere import JaxProcess, Line, PeerError, beside
from benchmarks.harness import Elsewhere, Row, alternate, markdown, outcomes


def broken():
    raise NotImplementedError("batch | of one\nand more")


def test_runs_take_turns_here_and_elsewhere():
    order = []

    def seconds(repeats):
        order.append("there")
        return float(repeats)

    times = alternate({"here": lambda: order.append("here"), "there": Elsewhere(seconds)}, rounds=2)
    assert times["there"] == [1.0, 1.0]
    assert len(times["here"]) == 2
    turns = [who for i, who in enumerate(order) if order[i - 1] != who or i == 0]
    assert turns == ["here", "there", "here", "there", "here"]  # beforehand, there; then forwards and backwards


def test_where_all_are_slow_each_round_is_one_run():
    calls = []
    slow = {name: Elsewhere(lambda repeats, name=name: calls.append((name, repeats)) or 2.0) for name in "ab"}
    assert alternate(slow, rounds=2) == {"a": [2.0, 2.0], "b": [2.0, 2.0]}
    assert calls == [("a", 1), ("b", 1), ("b", 1), ("a", 1)]


def test_a_peer_that_cannot_run_says_why():
    values, failed = outcomes({"ours": lambda: 1, "peer": broken}, ours=("ours",))
    assert values == {"ours": 1}
    assert failed == {"peer": "NotImplementedError: batch / of one"}


def test_a_point_of_scaling_stands_without_its_peer():
    from benchmarks.scaling import Point

    runs = {"eager": lambda: [torch.ones(2)], "peer 1.0": broken}
    memory = ("peak", lambda who: 0.5 if who == "eager" else broken())
    row = Point("a size", "peer 1.0", runs, lambda found: float(found[0].sum()), memory).row(rounds=1)
    assert "error 2e+00, peak 0.5 MiB" in row.ours
    assert "faster" not in row.ours
    assert row.peer == "peer 1.0 NotImplementedError: batch / of one"


def test_an_error_of_ours_is_an_error():
    with pytest.raises(NotImplementedError):
        outcomes({"ours": broken, "peer": lambda: 1}, ours=("ours",))


def test_a_table_without_goals_has_no_columns_for_them():
    assert "goal" not in markdown([Row("a", "1", "2")], "peer")
    assert "goal" in markdown([Row("a", "1", "2"), Row("b", "1", "2", "faster", True)], "peer")


def test_without_its_environment_a_peer_on_jax_says_so(monkeypatch):
    monkeypatch.setattr(elsewhere, "JAX_PYTHON", elsewhere.ROOT / ".venv-none" / "bin" / "python")
    line = Line("forward", "forward", list, lambda found: 0.0, "faster", 1.0)
    (row,) = beside("jax_ode", "diffrax", {}, [line], rounds=1, digits=0)
    assert row.peer == "diffrax: there is no .venv-none/bin/python; `make bench` sets it up"
    assert row.met is None


def test_a_peer_on_jax_that_does_not_start_says_why(monkeypatch):
    monkeypatch.setattr(elsewhere, "JAX_PYTHON", elsewhere.Path(sys.executable))
    with pytest.raises(PeerError, match=r"jax_none ended with code 1: .*No module named benchmarks\.jax_none"):
        JaxProcess("jax_none", {}).__enter__()


@pytest.mark.slow
@pytest.mark.skipif(not elsewhere.JAX_PYTHON.exists(), reason="`make bench` has not set up JAX's environment")
def test_a_peer_on_jax_solves_the_same_problem_and_times_itself():
    f = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2))
    parameters, y0, t = list(f.parameters()), torch.tensor([[1.0, 0.5]]), torch.tensor([0.0, 1.0])
    y = im.odeint(lambda t, y: f(y), y0, t).value[-1]
    gradient = torch.autograd.grad(y.square().sum(), parameters)
    problem = {"y0": y0, "t": t, "tolerance": 1e-6, **{f"parameter{i}": p for i, p in enumerate(parameters)}}
    with JaxProcess("jax_ode", problem) as jax:
        assert jax.versions.keys() == {"jax", "diffrax"}
        torch.testing.assert_close(jax.found["forward"][0], y.detach(), atol=1e-4, rtol=1e-4)
        for adjoint in ("checkpointed", "backsolve"):
            _, *theirs = jax.found[adjoint]
            torch.testing.assert_close(theirs, list(gradient), atol=1e-4, rtol=1e-3)
        assert jax.run("forward").seconds(3) > 0
