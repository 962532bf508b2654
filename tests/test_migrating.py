"""The programs of MIGRATING.md run as they are written, and what it says of other packages holds."""

from __future__ import annotations

import copy
import functools
import importlib
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import implicitly as im

pytestmark = [pytest.mark.host, pytest.mark.filterwarnings("ignore")]

TEXT = (Path(__file__).parents[1] / "MIGRATING.md").read_text()
SECTIONS = {part.partition("\n")[0].partition(",")[0]: part for part in re.split(r"^## ", TEXT, flags=re.M)[1:]}


@functools.cache
def ran(section: str) -> dict[str, Any]:
    """What the programs of a section leave behind, run one after the other."""
    found: dict[str, Any] = {}
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("error")
        for block in re.findall(r"```python\n(.*?)```", SECTIONS[section], re.DOTALL):
            exec(block, found)
    return found


def peer(name: str) -> Any:
    """A package to compare with, or a skip."""
    pytest.importorskip(name.partition(".")[0], reason="needs the extra: implicitly[bench]")
    return importlib.import_module(name)


def off(x: torch.Tensor, y: torch.Tensor) -> float:
    return float((x - y).abs().max())


def gradients(value: torch.Tensor, by: Any) -> torch.Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(value.square().sum(), list(by))])


def test_every_section_has_a_program_and_lines_are_short():
    for name, text in SECTIONS.items():
        assert text.count("```python") == 1, name
    assert max(map(len, TEXT.splitlines())) <= 120


# --- The programs -----------------------------------------------------------------------------------------------


def test_the_spiral_is_learnt():
    found = ran("torchdiffeq")
    assert found["truth"].shape == (500, 2)
    assert np.mean(found["losses"][-5:]) < 0.5 * found["losses"][0]


def test_the_spiral_and_its_gradient_are_those_of_torchdiffeq():
    torchdiffeq = peer("torchdiffeq")
    found = ran("torchdiffeq")
    field, start, t = (
        copy.deepcopy(found["field"]).double(),
        found["truth"][::50].double(),
        found["t"][:10].double(),
    )
    parameters, tight = list(field.parameters()), im.Dopri5(rtol=1e-7, atol=1e-9)
    theirs = torchdiffeq.odeint(field, start, t)
    expected = gradients(theirs, parameters)
    for adjoint in (im.RecursiveCheckpointAdjoint(), im.UnrolledAdjoint(), im.BacksolveAdjoint()):
        ours = im.odeint(field, start, t, solver=tight, adjoint=adjoint).value
        assert off(theirs, ours) < 1e-5
        assert off(gradients(ours, parameters), expected) < 1e-4 * expected.abs().max()


def test_van_der_pol_has_its_own_steps_and_gradients():
    found = ran("torchode")
    sol, mu, t, y0 = (found[k] for k in ("sol", "mu", "t", "y0"))
    assert sol.value.shape == (7, 3, 2)
    assert len(sol.steps.unique()) == 3
    alone = [im.odeint(found["van_der_pol"], y0[i], t[i], mu[i], solver=im.Dopri8(rtol=1e-7)) for i in range(3)]
    assert off(sol.value, torch.stack([s.value for s in alone], 1)) < 1e-5
    expected = torch.autograd.grad(sum(s.value[-1].sum() for s in alone), mu)[0]
    assert off(found["gradient"], expected) < 1e-4


def test_the_equilibrium_is_one():
    found = ran("torchdeq")
    layer, x = found["layer"], found["x"]
    assert layer.solution.status.eq(im.Status.CONVERGED).all()
    assert layer.backward_solution.status.eq(im.Status.CONVERGED).all()
    assert all(p.grad.abs().sum() > 0 for p in layer.parameters())
    layer.eval()
    z = layer(x)
    again = layer.cell(z, x)
    assert off(z[0], again[0]) < 1e-2
    assert off(z[1], again[1]) < 1e-2
    assert z[0].requires_grad  # in evaluation too


def test_the_boards_solve_their_programs():
    found = ran("qpth")
    layer, answer = found["layer"], found["answer"]
    z = answer.flatten(1)
    assert z.min() > -1e-9
    assert off(z @ layer.A.T, (layer.A @ layer.log_z.exp()).expand(6, -1)) < 1e-8
    assert layer.A.grad.abs().max() > 0


def test_the_portfolio_is_the_projection_that_it_should_be():
    peer("cvxpy")
    found = ran("cvxpylayers")
    expected = im.project.simplex(found["r"].detach())  # max r'w - |w|^2 / 2
    assert off(found["weights"], expected) < 1e-8
    assert found["r"].grad.abs().max() > 0


def test_the_fits_find_the_rates():
    found = ran("jaxopt")
    assert off(found["sol"].value[:, 1:2], found["rate"]) < 1e-7
    assert off(found["sol"].value[:, ::2], torch.tensor([[2.5, 0.5]])) < 1e-6
    assert off(found["rate"].grad, torch.ones(5, 1)) < 1e-6


def test_the_irregular_series_ends_where_the_shorter_one_does():
    found = ran("diffrax")
    y = found["y"]
    assert y.shape == (12, 8, 2)
    assert off(y[8, 0], y[11, 0]) == 0
    assert all(p.grad.abs().sum() > 0 for p in found["field"].parameters())


def test_the_stone_falls_in_time():
    found = ran("SciPy")
    assert off(found["sol"].t, torch.tensor(40 / 9.8)) < 1e-6
    assert off(found["slope"], torch.tensor(-40 / 9.8**2)) < 1e-6
    assert found["sol"].status == im.Status.EVENT == 7


# --- What is said of all packages -------------------------------------------------------------------------------


def test_captured_tensors_and_inputs_changed_in_place_are_refused():
    k = torch.ones((), requires_grad=True)
    with pytest.raises(ValueError, match="Pass it in args"):
        im.odeint(lambda t, y: -k * y, torch.ones(2), (0.0, 1.0))
    module = Scaled(k)
    with pytest.raises(ValueError, match="Pass it in args"):
        im.odeint(module, torch.ones(2), (0.0, 1.0))
    with pytest.raises(ValueError, match="in place"):
        im.odeint(flipped, torch.ones(2), (0.0, 1.0))


def test_torchdiffeq_goes_wrong_where_f_changes_its_input_in_place():
    times, options = torch.tensor([0.0, 1.0]), {"step_size": 0.1}
    value = peer("torchdiffeq").odeint(flipped, torch.ones(1), times, method="rk4", options=options)[-1]
    assert abs(float(value) - np.exp(-1)) > 0.1


class Scaled(nn.Module):
    def __init__(self, k):
        super().__init__()
        self.k = [k]  # as an attribute that is no parameter

    def forward(self, t, y):
        return -self.k[0] * y


def flipped(t, y):
    y *= -1
    return y


# --- torchdiffeq ------------------------------------------------------------------------------------------------


def decay(t, y):
    return -y * t - y**2


START = torch.tensor([1.0, 0.5], dtype=torch.float64)
TIMES = torch.linspace(0, 1, 6, dtype=torch.float64)


def test_defaults_of_trajectories_are_those_of_the_tables():
    method = im.Dopri5()
    assert (method.rtol, method.atol, method.max_steps, method.dt_min) == (1e-5, 1e-7, 100_000, 0)
    assert im.Controller() == im.Controller(
        safety=0.9, shrink=0.2, grow=10.0, integral=1.0, proportional=0.0, derivative=0.0
    )
    assert im.BacksolveAdjoint().seminorm
    with pytest.raises(ValueError, match=r"smallest possible rtol is 2\.4e-07"):
        im.odeint(decay, START.float(), (0.0, 1.0), solver=im.Dopri5(rtol=1e-7))
    with pytest.raises(ValueError, match=re.escape("RK4(dt=...)")):
        im.RK4()
    with pytest.raises(ValueError, match=re.escape("pass t.to(y0)")):
        im.odeint(decay, START, TIMES.float())
    with pytest.raises(ValueError, match="a tuple for y0, got a list"):
        im.odeint(lambda t, y: [y[1], -y[0]], (START, START), (0.0, 1.0))


def test_methods_are_those_of_torchdiffeq():
    odeint = peer("torchdiffeq").odeint
    for name, method in (("euler", im.Euler), ("midpoint", im.Midpoint), ("heun2", im.Heun)):
        theirs = odeint(decay, START, TIMES, method=name, options={"step_size": 0.1})
        assert off(theirs, im.odeint(decay, START, TIMES, solver=method(dt=0.1)).value) < 1e-14
    theirs = odeint(decay, START, TIMES, method="rk4", options={"step_size": 0.1})
    assert 1e-9 < off(theirs, im.odeint(decay, START, TIMES, solver=im.RK4(dt=0.1)).value) < 1e-6
    exact = odeint(decay, START, TIMES, rtol=1e-10, atol=1e-10)
    named = {"dopri5": im.Dopri5, "dopri8": im.Dopri8, "bosh3": im.Bosh3, "adaptive_heun": im.Heun}
    for name, method in named.items():
        assert off(odeint(decay, START, TIMES, method=name, rtol=1e-5, atol=1e-7), exact) < 1e-2
        assert off(im.odeint(decay, START, TIMES, solver=method()).value, exact) < 1e-4


def test_bosh3_and_dopri8_keep_their_tolerance_here():
    exact = im.odeint(decay, START, TIMES, solver=im.Dopri8(rtol=1e-12, atol=1e-12)).value
    for method, least in ((im.Bosh3, 5e-6), (im.Dopri8, 5e-7)):
        assert off(im.odeint(decay, START, TIMES, solver=method(rtol=1e-8, atol=1e-8)).value, exact) < 1e-7
        name = method.__name__.lower()
        theirs = peer("torchdiffeq").odeint(decay, START, TIMES, method=name, rtol=1e-8, atol=1e-8)
        assert off(theirs, exact) > least


def test_steps_from_output_to_output_are_dt_and_tstops():
    uneven = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64)
    theirs = peer("torchdiffeq").odeint(decay, START, uneven, method="euler")
    assert off(theirs, im.odeint(decay, START, uneven, solver=im.Euler(dt=0.75, tstops=(0.25,))).value) < 1e-15
    theirs = peer("torchdiffeq").odeint(decay, START, uneven, method="rk4", options={"step_size": 0.3})
    ours = im.odeint(decay, START, uneven, solver=im.RK4(dt=0.3)).value
    exact = im.odeint(decay, START, uneven, solver=im.Dopri8(rtol=1e-10)).value
    assert off(theirs[1], exact[1]) > 20 * off(ours[1], exact[1])  # a straight line through the ends of the step


def test_options_that_differ():
    torchdiffeq, one = peer("torchdiffeq"), torch.ones(1, dtype=torch.float64)

    def stiff(t, y):
        return -1e6 * y

    theirs = torchdiffeq.odeint(stiff, one, torch.tensor([0.0, 0.01]), options={"min_step": 1e-3})
    assert theirs.abs().max() > 1e10
    sol = im.odeint(stiff, one, (0.0, 0.01), solver=im.Dopri5(dt_min=1e-3), on_failure="ignore")
    assert sol.status == im.Status.STEP_UNDERFLOW

    def jump(t, y):
        return torch.where(t < 0.5, 1.0, -1.0) * y

    theirs = torchdiffeq.odeint(jump, one, torch.tensor([0.0, 1.0]), options={"jump_t": torch.tensor([0.5])})
    assert off(theirs, im.odeint(jump, one, (0.0, 1.0), solver=im.Dopri5(tstops=(0.5,))).value) < 1e-5


def test_the_error_of_a_tuple_is_that_of_all_entries():
    def f(t, y):
        return (-y[0], -100 * y[1])

    y0 = torch.ones(1000, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    plain = im.odeint(f, y0, (0.0, 1.0)).evaluations

    def worst(r):
        return torch.maximum(r[:, :1000].square().mean(1), r[:, 1000:].square().mean(1)).sqrt()

    assert plain < im.odeint(f, y0, (0.0, 1.0), solver=im.Dopri5(norm=worst)).evaluations


def test_dropout_that_draws_in_every_call_is_told_of_in_a_layer():
    class Dropped(nn.Module):
        def __init__(self, drop):
            super().__init__()
            self.linear, self.drop = nn.Linear(2, 2), drop

        def forward(self, t, y):
            return self.drop(self.linear(y))

    with torch.random.fork_rng():
        torch.manual_seed(0)
        y, loose = torch.randn(5, 2), im.Dopri5(rtol=1e-3, atol=1e-4)
        with pytest.warns(im.nn.PerCallWarning):
            im.nn.NeuralODE(Dropped(nn.Dropout(0.5)), solver=loose)(y)
        layer = im.nn.NeuralODE(Dropped(im.nn.Dropout(0.5)), solver=loose)
        layer(y)
        bare = im.odeint(Dropped(im.nn.Dropout(0.5)), y, (0.0, 1.0), solver=loose)
    assert bare.steps > 20 * layer.solution.steps


def test_events_end_at_the_last_time_and_are_those_of_torchdiffeq():
    torchdiffeq = peer("torchdiffeq")

    def fall(t, y):
        return (y[1], torch.full_like(y[1], -9.8))

    y0 = torch.tensor([10.0], dtype=torch.float64), torch.tensor([0.0], dtype=torch.float64)
    t, _ = torchdiffeq.odeint_event(fall, y0, torch.tensor(0.0), event_fn=lambda t, y: y[0], rtol=1e-9, atol=1e-9)
    ground = im.Event(lambda t, y: y[0][0])
    assert off(t, im.odeint(fall, y0, (0.0, 10.0), event=ground).t) < 1e-6
    assert im.odeint(fall, y0, (0.0, 1.0), event=ground).status == im.Status.CONVERGED


def test_the_divergence_is_minus_the_change_of_density_of_the_cnf_example():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        field = im.nn.ConcatTime(nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)))
        x = torch.randn(4, 2)

    def augmented(t, states):
        with torch.enable_grad():
            y = states[0].requires_grad_(True)
            dy = field(t, y)
            trace = sum(torch.autograd.grad(dy[:, i].sum(), y, create_graph=True)[0][:, i] for i in range(2))
        return dy, -trace

    z, delta = im.odeint(augmented, (x, torch.zeros(4)), (1.0, 0.0)).value
    last, (log_det,) = im.nn.NeuralODE(field, (1.0, 0.0), regularisers=[im.nn.Divergence()])(x)
    assert off(z[-1], last) < 1e-5
    assert off(log_det, -delta[-1]) < 1e-5
    theirs = peer("torchdiffeq").odeint(augmented, (x, torch.zeros(4)), torch.tensor([1.0, 0.0]))
    assert off(theirs[1][-1], delta[-1]) < 1e-5


def test_a_batch_with_steps_of_its_own_sees_times_with_its_dimensions():
    seen = []
    im.odeint(lambda t, y: seen.append(t.shape) or -y, torch.ones(3, 2), (0.0, 1.0), batch_dims=1)
    assert set(seen) == {(3, 1)}


# --- torchode ---------------------------------------------------------------------------------------------------


def test_torchode_agrees():
    torchode, found = peer("torchode"), ran("torchode")
    seen = []

    def f(t, y, mu):
        seen.append(t.shape)
        return found["van_der_pol"](t[:, None], y, mu)

    theirs = torchode.solve_ivp(f, found["y0"], found["t"], args=found["mu"].detach())
    assert theirs.ys.shape == (3, 7, 2)
    assert set(seen) == {(3,)}
    assert off(theirs.ys.transpose(0, 1), found["sol"].value) < 1e-5
    controller = im.Controller(integral=0.7, proportional=0.2)
    solver = im.Tsit5(rtol=1e-7, atol=1e-7, controller=controller)
    ours = im.odeint(found["van_der_pol"], found["y0"], found["t"], found["mu"], batch_dims=1, solver=solver)
    assert off(ours.steps, theirs.stats["n_accepted"]) < 0.1 * ours.steps.max()


# --- torchdeq ---------------------------------------------------------------------------------------------------


class Tanh(nn.Module):
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.linear = nn.Linear(8, 8, dtype=torch.float64)
            self.x = torch.randn(4, 8, dtype=torch.float64)
        with torch.no_grad():
            self.linear.weight.mul_(0.8 / torch.linalg.matrix_norm(self.linear.weight, 2))

    def forward(self, z, x):
        return torch.tanh(self.linear(z) + x)


def test_defaults_of_fixed_points_are_those_of_the_tables():
    assert (im.Anderson().history, im.Anderson().max_steps, im.Broyden().history) == (5, 100, 10)
    assert im.Anderson().tolerances(torch.float32)[0] == pytest.approx(2.4e-5, rel=0.02)
    assert im.Anderson().tolerances(torch.float64)[0] == pytest.approx(3.7e-11, rel=0.02)
    cell = Tanh()
    z0 = torch.zeros_like(cell.x)
    absolute = im.fixed_point(cell, z0, cell.x, solver=im.FixedPointIteration(rtol=0, atol=1e-6))
    assert absolute.status.eq(im.Status.CONVERGED).all()
    assert absolute.residual.max() <= 1e-6
    relative = im.fixed_point(cell, z0, cell.x, solver=im.FixedPointIteration(rtol=1e-3, atol=0))
    assert (relative.residual <= 1e-3 * relative.value.norm(dim=1)).all()
    counted = im.fixed_point(
        cell, z0, cell.x, solver=im.FixedPointIteration(rtol=0, max_steps=7), on_failure="raise"
    )
    assert counted.steps.eq(7).all()
    assert counted.status.eq(im.Status.MAX_STEPS).all()


def test_gradients_are_those_of_torchdeq():
    get_deq, cell = peer("torchdeq").get_deq, Tanh()
    x, z0, exact = cell.x, torch.zeros_like(cell.x), im.FixedPointIteration(rtol=1e-13, max_steps=500)

    def theirs(**options):
        z, _ = get_deq(f_tol=1e-13, f_max_iter=500, **options)(lambda z: cell(z, x), z0)
        return gradients(z[-1], cell.parameters())

    def ours(adjoint):
        return gradients(im.fixed_point(cell, z0, x, solver=exact, adjoint=adjoint).value, cell.parameters())

    right = ours(im.ImplicitAdjoint())
    assert off(theirs(ift=True, b_tol=1e-12, b_max_iter=500), right) < 1e-9
    assert off(ours(im.ImplicitAdjoint(im.Anderson(rtol=1e-12))), right) < 1e-9
    assert off(theirs(), ours(im.JacobianFreeAdjoint())) < 1e-9
    assert off(theirs(grad=5, tau=0.5), ours(im.PhantomAdjoint(5, damping=0.5))) < 1e-9
    assert off(theirs(), right) > 0.1 * right.abs().max()
    deq = get_deq()
    assert (deq.f_max_iter, deq.f_tol, deq.f_stop_mode, deq.f_solver.__name__) == (
        40,
        1e-3,
        "abs",
        "fixed_point_iter",
    )
    assert not deq.eval()(lambda z: cell(z, x), z0)[0][-1].requires_grad


def test_jacobians_are_those_of_torchdeq_and_right_for_complex_pairs():
    loss = peer("torchdeq.loss")
    turn = 0.5 * torch.tensor([[0.5, -(0.75**0.5)], [0.75**0.5, 0.5]], dtype=torch.float64)
    z = torch.ones(1, 2, dtype=torch.float64, requires_grad=True)

    def f(z):
        return z @ turn.T

    assert off(im.nn.spectral_radius(f, z), torch.tensor([0.5])) < 1e-6
    assert off(loss.power_method(f(z), z)[1], torch.tensor([0.25])) < 1e-6
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs, ours = loss.jac_reg(f(z), z, vecs=2000), im.nn.jacobian_norm(f, z, samples=2000) / 2
    assert float(theirs) == pytest.approx(0.25, rel=0.1)
    assert float(ours) == pytest.approx(0.25, rel=0.1)


def test_dropout_of_torchdeq_shares_the_dimensions_named():
    dropout = peer("torchdeq.dropout")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for module in (dropout.VariationalDropout2d(0.5), im.nn.Dropout(0.5, shared_dims=(1, 2))):
            out = module(torch.ones(4, 3, 3, 8))
            assert off(out, out[:, :1, :1].expand_as(out)) == 0
            assert out.unique().tolist() == [0, 2]


def test_cells_see_fewer_rows_and_starts_are_like_x_unless_said():
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.put, self.inner, self.rows = nn.Linear(5, 8), nn.Linear(8, 8), set()

        def forward(self, z, x):
            self.rows.add(len(x))
            return torch.tanh(0.5 * self.inner(z) + self.put(x))

    with torch.random.fork_rng():
        torch.manual_seed(0)
        cell, x = Wide(), torch.randn(16, 5)
    with pytest.raises(RuntimeError, match="shapes"):
        im.nn.DEQ(cell)(x)
    layer = im.nn.DEQ(cell, init=lambda x: x.new_zeros(len(x), 8))
    z = layer(x)
    assert min(cell.rows) < 16
    layer(x, z.detach())
    assert layer.solution.status.eq(im.Status.CONVERGED).all()


# --- qpth and cvxpylayers ---------------------------------------------------------------------------------------


def test_qpth_averages_what_is_summed_here():
    QPFunction, found = peer("qpth.qp").QPFunction, ran("qpth")
    layer, boards = found["layer"], found["boards"]
    p, b, eye = -boards.flatten(1).double(), layer.A @ layer.log_z.exp(), layer.eye
    z = QPFunction(verbose=-1)(0.1 * eye, p, -eye, torch.zeros(64, dtype=torch.float64), layer.A, b)
    assert off(z, found["answer"].flatten(1)) < 1e-6
    theirs = gradients(z - boards.flatten(1), [layer.A])
    ours = gradients(layer(boards) - boards, [layer.A])
    assert off(6 * theirs, ours) < 1e-4 * ours.abs().max()


def test_programs_that_only_one_of_both_solves():
    two, none = torch.eye(2, dtype=torch.float64), torch.tensor([], dtype=torch.float64)
    G, h = torch.tensor([[1.0, 0.0], [-1.0, 0.0]]).double(), torch.tensor([[1.0, 1.0], [-2.0, -2.0]]).double()
    with pytest.raises(im.SolverError, match="1 INFEASIBLE"):
        im.qp(two, torch.zeros(2, 2).double(), G, h)
    sol = im.qp(two, torch.zeros(2, 2).double(), G, h, on_failure="ignore")
    assert sol.value[0].eq(0).all()
    assert sol.value[1].isnan().all()
    assert sol.status.tolist() == [im.Status.CONVERGED, im.Status.INFEASIBLE]
    with pytest.raises(ValueError, match="A is an empty vector"):
        im.qp(two, two[0], G, h[0], none, none)
    assert off(im.qp(0 * two, two.sum(0), -two, 0 * two[0]).value, torch.zeros(2)) < 1e-9
    assert off(im.qp(two, 0 * two[0], A=two[:1], b=two[0, :1]).value, two[0]) < 1e-9
    skew = torch.tensor([[2.0, 1.0], [0.0, 2.0]]).double()
    ours = [im.qp(Q, two.sum(0), G, h[0]).value for Q in (skew, (skew + skew.T) / 2)]
    assert off(*ours) < 1e-12
    assert im.InteriorPoint().max_steps == 50

    QPFunction = peer("qpth.qp").QPFunction
    z = QPFunction(verbose=-1)(two, torch.zeros(2, 2).double(), G, h, none, none)
    assert (z[1] @ G.T - h[1]).max() > 0.1
    assert z.isfinite().all()
    with pytest.raises(RuntimeError, match="not SPD"):
        QPFunction(verbose=-1)(0 * two, two[:1], G, h[0], none, none)
    with pytest.raises(ValueError, match="unpack"):
        QPFunction(verbose=-1)(two, two[:1], none, none, two[:1], two[0, :1])
    assert QPFunction(verbose=-1)(two, two[0], G, h[0], none, none).shape == (1, 2)
    assert off(QPFunction(verbose=-1)(skew, two.sum(0), G, h[0], none, none)[0], ours[0]) > 0.1


def test_second_derivatives_of_a_program():
    p, G, h, none = (
        torch.tensor([[-1.0, 0.5]]).double(),
        -torch.eye(2).double(),
        torch.zeros(2).double(),
        torch.Tensor(),
    )
    QPFunction = peer("qpth.qp").QPFunction

    def second(solve):
        Q = 2 * torch.eye(2, dtype=torch.float64)[None]
        Q.requires_grad_()
        (first,) = torch.autograd.grad(solve(Q).square().sum(), Q, create_graph=True)
        return float(torch.autograd.grad(first.sum(), Q)[0][0, 0, 0])

    # z = 1 / Q, so the second derivative of z^2 is 6 / Q^4.
    assert second(lambda Q: im.qp(Q, p, G, h).value) == pytest.approx(0.375, rel=1e-6)
    assert second(lambda Q: QPFunction(verbose=-1)(Q, p, G, h, none, none)) == pytest.approx(0.25, rel=1e-6)


def test_cvxpylayers_agrees_but_for_dtypes_and_failures():
    cp, torch_layers = peer("cvxpy"), peer("cvxpylayers.torch")
    x, A, b = cp.Variable(2), cp.Parameter((3, 2)), cp.Parameter(3)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(A @ x - b)), [x >= 0])
    theirs = torch_layers.CvxpyLayer(problem, parameters=[A, b], variables=[x])
    ours = im.nn.ConvexLayer(problem, parameters=[A, b], variables=[x])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        values = torch.randn(4, 3, 2, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    values = tuple(v.requires_grad_() for v in values)
    (x1,), (x2,) = theirs(*values), ours(*values)
    assert off(x1, x2) < 1e-3
    assert off(gradients(x1, values), gradients(x2, values)) < 1e-2  # that of b, which is shared, is a sum in both
    single = [v.detach().float() for v in values]
    assert theirs(*single)[0].dtype == torch.float64
    assert ours(*single)[0].dtype == torch.float32
    with pytest.raises(ValueError, match="mix dtypes"):
        ours(single[0], values[1])

    y, low = cp.Variable(1), cp.Parameter(1)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(y)), [y >= low, y <= 1])
    bad = torch.tensor([[0.5], [2.0]], dtype=torch.float64)
    with pytest.raises(Exception, match="infeasible"):
        torch_layers.CvxpyLayer(problem, [low], [y], solver_args={"n_jobs_forward": 1})(bad)
    (value,) = im.nn.ConvexLayer(problem, [low], [y], on_failure="ignore")(bad)
    assert value.isnan().flatten().tolist() == [False, True]


def test_values_must_keep_what_parameters_declare():
    peer("cvxpy")
    layer = ran("cvxpylayers")["layer"]
    r = torch.zeros(5, dtype=torch.float64)
    with pytest.raises(ValueError, match="declared not to be negative"):
        layer(r, torch.tensor(-1.0, dtype=torch.float64))
    with pytest.raises(TypeError, match="must be a tensor"):
        layer(r, 0.5)


# --- Optimisers, and SciPy --------------------------------------------------------------------------------------


def rosenbrock(z):
    return 100 * (z[1] - z[0] ** 2) ** 2 + (1 - z[0]) ** 2


def test_one_problem_is_batch_dims_0_and_scipy_agrees():
    optimize, z0 = peer("scipy.optimize"), torch.tensor([-1.2, 1.0], dtype=torch.float64)
    best = optimize.minimize(lambda x: rosenbrock(x), z0.numpy()).x
    assert off(im.argmin(rosenbrock, z0, batch_dims=0).value, torch.tensor(best)) < 1e-4
    with pytest.raises(ValueError, match="batch_dims=0"):
        im.argmin(rosenbrock, z0)

    def residuals(z):
        return torch.stack([10 * (z[1] - z[0] ** 2), 1 - z[0]])

    assert off(im.least_squares(residuals, z0, batch_dims=0).value, torch.ones(2)) < 1e-6

    def box(z):
        return im.project.box(z, torch.tensor([-2.0, -2.0]).double(), torch.tensor([0.5, 2.0]).double())

    bound = optimize.minimize(lambda x: rosenbrock(x), z0.numpy(), bounds=[(-2, 0.5), (-2, 2)]).x
    solver = im.ProjectedGradient(rtol=1e-6, max_steps=5000)
    assert (
        off(im.argmin(rosenbrock, z0, constraint=box, solver=solver, batch_dims=0).value, torch.tensor(bound))
        < 1e-3
    )
    cubes = im.root(lambda z: z**3 - 2, torch.ones(5, dtype=torch.float64)).value
    assert off(cubes, torch.tensor(optimize.brentq(lambda x: x**3 - 2, 0, 2))) < 1e-6


def test_scipy_has_the_components_first():
    integrate = peer("scipy.integrate")
    t = np.linspace(0, 6, 5)

    def prey(t, z):
        return [1.5 * z[0] - z[0] * z[1], -3 * z[1] + z[0] * z[1]]

    theirs = integrate.solve_ivp(prey, (0, 6), [10.0, 5.0], t_eval=t, rtol=1e-7, atol=1e-7).y
    y0 = torch.tensor([10.0, 5.0], dtype=torch.float64)
    for method in (im.Dopri5, im.Dopri8):
        ours = im.odeint(lambda t, z: torch.stack(prey(t, z)), y0, t, solver=method(rtol=1e-7, atol=1e-7)).value
        assert off(ours.T, torch.tensor(theirs)) < 1e-4


def test_projections_and_limits_are_as_the_table_says():
    z0, x = torch.full((1, 3), 1 / 3), torch.tensor([[0.1, 0.9, 0.4]])

    def objective(z, x):
        return 0.5 * (z - x).square().sum(1)

    sol = im.argmin(objective, z0, x, constraint=lambda z, *args: im.project.simplex(z))
    assert off(sol.value, torch.tensor([[0.0, 0.75, 0.25]])) < 1e-4
    scaled = im.argmin(lambda z, a: a * objective(z, x), z0, torch.tensor(2.0), constraint=im.project.simplex)
    assert off(scaled.value.sum(), torch.tensor(2.0)) < 1e-5  # the arg became the radius
    with pytest.raises(im.SolverError, match="NOT_MINIMUM"):
        im.argmin(lambda z: -(z**2) + z**4, torch.zeros(1), solver=im.Newton())


# --- diffrax ----------------------------------------------------------------------------------------------------


def test_controllers_and_outputs_are_as_the_table_says():
    for p, i, steps in ((0.0, 1.0, 16), (0.3, 0.4, 20), (0.4, 0.3, 22)):  # the steps are those diffrax took
        solver = im.Tsit5(rtol=1e-9, atol=1e-9, dt0=0.01, controller=im.Controller(integral=i + p, proportional=p))
        assert abs(int(im.odeint(decay, START, (0.0, 1.0), solver=solver).steps) - steps) <= 1
    sol = im.odeint(lambda t, y: y**2, torch.tensor([2.0]), (0.0, 0.25, 1.0), on_failure="ignore")
    assert sol.value.isnan().flatten().tolist() == [False, False, True]
    with pytest.raises(ValueError, match="NaN or inf"):
        im.odeint(decay, START, torch.tensor([0.0, torch.nan], dtype=torch.float64))
