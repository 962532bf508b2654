"""The one loop, isolated from solvers: a scripted solver plays given iterates of the root problem F(z) = z."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import implicitly as im
from implicitly.iterate import BLOW_UP, PATIENCE, Proposal, Solver
from tests.problems import draw, matrix

NAN = math.nan


@dataclass(frozen=True)
class Scripted(Solver):
    """Proposes the iterates it is given, `path[k][sample]`; each is its own residual."""

    path: Sequence[Sequence[float]] = ()
    singular_at: tuple[int, int] | None = None  # (step, sample)

    def start(self, F, z, r):
        iterates = torch.tensor(self.path, dtype=z.dtype).T
        singular = torch.zeros(iterates.shape, dtype=torch.bool)
        if self.singular_at is not None:
            singular[self.singular_at[1], self.singular_at[0]] = True
        return iterates, singular

    def propose(self, F, k, z, r, memory):
        iterates, singular = memory
        return Proposal(iterates[:, k : k + 1], memory, singular=singular[:, k])


def play(*samples: Sequence[float], rtol: float | None = 1e-3, **options) -> im.Solution:
    """The solution after the first entry of each sample as its start and the others as its iterates."""
    length = max(map(len, samples))
    padded = [[*s, *[s[-1]] * (length - len(s))] for s in samples]
    path = tuple(zip(*padded))
    z0 = torch.tensor(path[0], dtype=torch.float64).unsqueeze(1)
    solver = Scripted(path=path[1:], rtol=rtol, atol=0.0, max_steps=length - 1, **options)
    return im.root(lambda z: z, z0, solver=solver, on_failure="ignore")


def names(solution: im.Solution) -> list[str]:
    return [im.Status(int(s)).name for s in solution.status]


# ----------------------------------------------------------------------------------- how samples end


def test_a_sample_converges_at_the_step_at_which_it_meets_the_tolerance():
    solution = play([1.0, 0.5, 1e-4, 1e-9])
    assert names(solution) == ["CONVERGED"]
    assert solution.steps.tolist() == [2]
    assert solution.value.tolist() == [[1e-4]]
    assert solution.residual.tolist() == [1e-4]
    assert solution.converged.tolist() == [True]


def test_a_start_that_is_the_answer_takes_no_step():
    solution = play([0.0, 1.0, 1.0])
    assert names(solution) == ["CONVERGED"]
    assert solution.steps.tolist() == [0]
    assert solution.evaluations == 1


def test_a_sample_out_of_steps_says_so_and_keeps_its_best_iterate():
    solution = play([5.0, 3.0, 1.0, 4.0, 2.0])
    assert names(solution) == ["MAX_STEPS"]
    assert solution.steps.tolist() == [4]
    assert solution.value.tolist() == [[1.0]]
    assert solution.residual.tolist() == [1.0]


def test_the_best_iterate_may_be_the_start():
    solution = play([1.0, 3.0, 2.0])
    assert solution.value.tolist() == [[1.0]]
    assert solution.residual.tolist() == [1.0]


def test_a_sample_without_progress_stagnates_after_some_patience():
    solution = play([4.0, 2.0, *[3.0] * (PATIENCE + 20)])
    assert names(solution) == ["STAGNATED"]
    assert solution.steps.tolist() == [1 + PATIENCE]
    assert solution.value.tolist() == [[2.0]]


def test_slow_progress_is_no_stagnation():
    solution = play([0.99**k for k in range(90)])
    assert names(solution) == ["MAX_STEPS"]


@pytest.mark.parametrize(("factor", "status"), [(2 * BLOW_UP, "DIVERGED"), (BLOW_UP / 2, "MAX_STEPS")])
def test_a_sample_that_blows_up_has_diverged_and_keeps_its_best_iterate(factor, status):
    solution = play([2.0, 1.0, 2.0 * factor, 1.5])
    assert names(solution) == [status]
    assert solution.steps.tolist() == [2 if status == "DIVERGED" else 3]
    assert solution.value.tolist() == [[1.0]]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("step", [0, 1, 3])
def test_a_sample_that_meets_nan_or_inf_ends_there_while_the_others_finish(bad, step):
    broken = [1.0, 0.5, 0.25, 0.1, 0.05, 1e-4]
    broken[step] = bad
    solution = play(broken, [1.0, 0.5, 0.25, 0.1, 0.05, 1e-4], [1.0, 1e-4])
    assert names(solution) == ["NON_FINITE", "CONVERGED", "CONVERGED"]
    assert solution.steps.tolist() == [step, 5, 1]
    assert solution.value[1:].tolist() == [[1e-4], [1e-4]]
    if step:  # the best before it broke
        assert solution.value[0].tolist() == [broken[step - 1]]
        assert solution.residual[0] == broken[step - 1]


def test_a_sample_whose_solver_cannot_go_on_is_singular():
    solution = play([1.0, 0.5, 0.25, 0.1], [1.0, 0.5, 0.25, 1e-4], singular_at=(1, 0))
    assert names(solution) == ["SINGULAR", "CONVERGED"]
    assert solution.steps.tolist() == [2, 3]


def test_a_sample_that_converges_at_a_singular_point_has_converged():
    assert names(play([1.0, 1e-5], singular_at=(0, 0))) == ["CONVERGED"]


def test_finished_samples_are_frozen():
    solution = play([1.0, 1e-4, 7.0, 7.0, 7.0], [1.0, 0.5, 0.2, 0.1, 1e-4])
    assert solution.value.tolist() == [[1e-4], [1e-4]]
    assert solution.residual.tolist() == [1e-4, 1e-4]
    assert solution.steps.tolist() == [1, 4]


# ------------------------------------------------------------------------------------- tolerances


def test_zero_rtol_runs_exactly_max_steps_and_returns_the_last_iterate():
    solution = play([1.0, 0.0, 2.0, 3.0], rtol=0)
    assert names(solution) == ["MAX_STEPS"]
    assert solution.steps.tolist() == [3]
    assert solution.value.tolist() == [[3.0]]
    assert solution.residual.tolist() == [3.0]


def test_zero_rtol_is_no_failure_but_nan_is():
    f = lambda z, x: 0.5 * z + x  # noqa: E731
    solver = im.FixedPointIteration(rtol=0, max_steps=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        im.fixed_point(f, torch.zeros(2, 1), torch.ones(2, 1), solver=solver, on_failure="raise")
    with pytest.raises(im.SolverError, match="NON_FINITE"):
        im.fixed_point(f, torch.zeros(2, 1), torch.full((2, 1), NAN), solver=solver, on_failure="raise")


def test_zero_rtol_with_an_absolute_tolerance_tests_for_convergence():
    solver = im.FixedPointIteration(rtol=0, atol=0.3)
    solution = im.fixed_point(lambda z, x: 0.5 * z + x, torch.zeros(1, 1), torch.ones(1, 1), solver=solver)
    assert names(solution) == ["CONVERGED"]
    assert solution.residual.tolist() == [0.25]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_default_tolerance_follows_from_the_dtype_of_the_state(dtype):
    limit = torch.finfo(dtype).eps ** (2 / 3)
    zero, one = torch.zeros(1, 1, dtype=dtype), torch.ones(1, 1, dtype=dtype)
    solution = im.fixed_point(lambda z, x: 0.5 * z + x, zero, one, solver=im.FixedPointIteration(atol=0.0))
    # |r| = 2^-k after k steps, and |z| is nearly 2.
    assert names(solution) == ["CONVERGED"]
    assert limit / 2 <= float(solution.residual) / 2 <= limit


def test_the_scale_is_the_iterate_for_a_fixed_point_and_the_first_residual_for_a_root():
    solver = im.FixedPointIteration(rtol=1e-3, atol=0.0)
    x = torch.tensor([[1.0], [1e6], [1e-6]], dtype=torch.float64)
    fixed = im.fixed_point(lambda z, x: 0.5 * z + x, torch.zeros_like(x), x, solver=solver)
    assert bool((fixed.residual <= 1e-3 * fixed.value[:, 0]).all())
    assert len(set(fixed.steps.tolist())) == 1
    root = im.root(lambda z, x: 0.5 * z - x, torch.zeros_like(x), x, solver=solver)
    assert bool((root.residual <= 1e-3 * x[:, 0]).all())
    assert len(set(root.steps.tolist())) == 1


# ------------------------------------------------------------------------------- steps, calls, batches


class Recorder:
    """tanh(W z + x), which notes the batch of every call."""

    def __init__(self, n: int = 4):
        self.W = matrix(n, 0.95, 3)
        self.batches: list[int] = []

    def __call__(self, z: Tensor, x: Tensor, *rest: Tensor) -> Tensor:
        self.batches.append(len(z))
        assert len(z) == len(x)
        return torch.tanh(z @ self.W + x)


ONE_CALL_A_STEP = [im.FixedPointIteration(max_steps=500), im.Anderson(), im.Broyden()]


@pytest.mark.host  # elsewhere some steps are taken before it is asked whether there is still one to take
@pytest.mark.parametrize("solver", ONE_CALL_A_STEP, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("dropping", [False, True])
def test_evaluations_are_the_calls_of_f_and_steps_the_iterations(solver, dropping):
    f, x = Recorder(), draw(5, 4, seed=1)
    solution = im.fixed_point(f, torch.zeros_like(x), x, solver=solver, in_dims=0 if dropping else None)
    assert solution.evaluations == len(f.batches)
    # One call before the first step, and one a step until the last sample is done.
    assert int(solution.steps.max()) == solution.evaluations - 1
    for i in range(5):
        alone = im.fixed_point(Recorder(), torch.zeros(1, 4, dtype=x.dtype), x[i : i + 1], solver=solver)
        assert int(alone.steps) == int(solution.steps[i])


@pytest.mark.parametrize("solver", [im.Newton(), im.NewtonKrylov()], ids=lambda s: type(s).__name__)
def test_evaluations_of_newton_count_products_with_the_jacobian_too(solver):
    f, x = Recorder(), draw(5, 4, seed=1)
    solution = im.fixed_point(f, torch.zeros_like(x), x, solver=solver)
    assert solution.evaluations > len(f.batches)


def _one_hard_sample(count: int) -> tuple[Recorder, Tensor]:
    """Samples that saturate tanh, so need few steps, but for one."""
    x = draw(count, 16, seed=2).sign() * 6.0
    x[count // 3] = 0.5 * draw(16, seed=3)
    return Recorder(16), x


@pytest.mark.parametrize("solver", ONE_CALL_A_STEP, ids=lambda s: type(s).__name__)
def test_finished_samples_cost_nothing_where_in_dims_says_which_args_hold_them(solver):
    f, x = _one_hard_sample(256)
    solution = im.fixed_point(f, torch.zeros_like(x), x, torch.ones(16, 16), solver=solver, in_dims=(0, None))
    assert bool(solution.converged.all())
    needed = int(solution.steps.sum()) + 256
    assert sum(f.batches) <= 1.3 * needed
    assert f.batches[-1] == 1
    easy, hard = int(solution.steps.median()), int(solution.steps.max())
    assert hard >= 3 * easy  # else the test would say nothing


def test_without_in_dims_every_call_has_the_whole_batch():
    f, x = _one_hard_sample(16)
    im.fixed_point(f, torch.zeros_like(x), x)
    assert set(f.batches) == {16}


def test_without_tensor_args_finished_samples_are_dropped_as_well():
    batches = []

    def f(z):
        batches.append(len(z))
        return 0.5 * z

    z0 = torch.ones(16, 1, dtype=torch.float64)
    z0[0] = 0.0
    z0[1:8] = 0.0
    im.fixed_point(f, z0, solver=im.FixedPointIteration(atol=1e-9))
    assert batches[0] == 16
    assert batches[-1] == 8


def test_in_dims_may_name_another_dimension_and_reach_into_pytrees():
    W = matrix(3, 0.7, 4)
    x, shift = draw(3, 6, seed=5), draw(6, seed=6)
    x[:, 2:] *= 5
    seen = []

    def f(z, data, scale):
        seen.append((len(z), data["x"].shape[1], len(data["shift"])))
        return torch.tanh(z @ W + data["x"].T + data["shift"].unsqueeze(1)) * scale

    args = ({"x": x, "shift": shift}, torch.tensor(0.9, dtype=torch.float64))
    z0 = torch.zeros(6, 3, dtype=torch.float64)
    dropping = im.fixed_point(f, z0, *args, in_dims=({"x": 1, "shift": 0}, None))
    assert all(len(set(sizes)) == 1 for sizes in seen)
    assert seen[-1][0] < 6
    whole = im.fixed_point(f, z0, *args)
    torch.testing.assert_close(dropping.value, whole.value, rtol=1e-10, atol=1e-10)
    assert dropping.steps.tolist() == whole.steps.tolist()


def test_statistics_of_one_system_are_numbers():
    solution = im.fixed_point(lambda z: 0.5 * z + 1, torch.zeros(3, 2), batch_dims=0)
    assert solution.status.shape == solution.residual.shape == solution.steps.shape == ()
    assert bool(solution.converged)


def test_status_and_steps_are_integers_and_the_residual_has_the_dtype_solved_in():
    solution = play([1.0, 1e-4], [1.0, 0.5])
    assert solution.status.dtype == solution.steps.dtype == torch.int64
    assert solution.residual.dtype == torch.float64
    assert isinstance(solution.evaluations, int)
