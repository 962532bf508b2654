"""Hamiltonian and Lagrangian fields: against closed forms, as fields of `odeint`, and their derivatives."""

import pytest
import torch
from torch import nn

import implicitly as im
from implicitly.nn import HamiltonianField, LagrangianField
from tests.problems import seeded

D = torch.float64


def network(inputs=4, activation=nn.Softplus):
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(inputs, 4), activation(), nn.Linear(4, 1)).to(D)


class Regular(nn.Module):
    """A Lagrangian network whose d2L/dv2 is far from singular."""

    def __init__(self):
        super().__init__()
        self.network = network()

    def forward(self, y):
        v = y.chunk(2, dim=-1)[1]
        return self.network(y).squeeze(-1) + v.square().sum(-1)


FIELDS = {"hamiltonian": lambda: HamiltonianField(network()), "lagrangian": lambda: LagrangianField(Regular())}
fields = pytest.mark.parametrize("make", FIELDS.values(), ids=FIELDS)


def states(*batch, n=2):
    return torch.randn(*batch, 2 * n, dtype=D, generator=seeded(1))


def polar(y):
    """L of a unit mass under a central force, in polar coordinates: the momentum of the angle depends on r."""
    r, _, dr, dphi = y.unbind(-1)
    return (dr**2 + r**2 * dphi**2) / 2 + 1 / r


# --- Closed forms -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [(), (5,), (2, 3)])
def test_hamiltonian_field_of_a_pendulum_with_gravity_as_an_argument(batch):
    y, g = states(*batch, n=1), torch.tensor(9.81, dtype=D)
    field = HamiltonianField(lambda y, g: y[..., 1:] ** 2 / 2 - g * torch.cos(y[..., :1]))
    q, p = y.unbind(-1)
    torch.testing.assert_close(field(0.0, y, g), torch.stack([p, -9.81 * torch.sin(q)], -1))
    torch.testing.assert_close(field.energy(y, g), p**2 / 2 - 9.81 * torch.cos(q))


def test_lagrangian_field_in_bfloat16():
    y, field = states(3).abs() + 0.5, LagrangianField(polar)
    found = field(0.0, y.bfloat16())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.to(D), field(0.0, y.bfloat16().to(D)), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("batch", [(), (5,), (2, 3)])
def test_lagrangian_field_in_polar_coordinates(batch):
    y = states(*batch).abs() + 0.5
    field = LagrangianField(polar)
    r, _, dr, dphi = y.unbind(-1)
    expected = torch.stack([dr, dphi, r * dphi**2 - 1 / r**2, -2 * dr * dphi / r], -1)
    torch.testing.assert_close(field(0.0, y), expected)
    torch.testing.assert_close(field.momentum(y), torch.stack([dr, r**2 * dphi], -1))
    torch.testing.assert_close(field.energy(y), (dr**2 + r**2 * dphi**2) / 2 - 1 / r)


def test_lagrangian_field_of_a_charge_in_a_magnetic_field():
    """L has terms linear in v: d2L/dv dq is not symmetric, so its transpose would give another motion."""
    y = states(7)
    field = LagrangianField(lambda y: (y[..., 2] ** 2 + y[..., 3] ** 2) / 2 + 1.5 * y[..., 0] * y[..., 3])
    vx, vy = y[:, 2], y[:, 3]
    torch.testing.assert_close(field(0.0, y), torch.stack([vx, vy, 1.5 * vy, -1.5 * vx], -1))


# --- As fields of odeint ------------------------------------------------------------------------------------


@fields
@pytest.mark.parametrize("activation", [nn.Softplus, nn.Tanh])
def test_field_of_any_weights_conserves_its_own_energy(make, activation):
    field = make()
    if activation is nn.Tanh and isinstance(field, HamiltonianField):
        field = HamiltonianField(network(activation=activation))
    t = torch.linspace(0, 10, 11, dtype=D)
    found = im.odeint(field, states(6), t, solver=im.Dopri8(rtol=1e-10, atol=1e-10), batch_dims=1)
    energy = field.energy(found.value)
    assert energy.shape == (11, 6)
    assert (found.value - found.value[0]).abs().amax() > 1  # it does move
    assert (energy - energy[0]).abs().max() < 1e-8


@fields
def test_one_system_moves_as_the_same_system_in_a_batch(make):
    field, y0 = make(), states(3)
    solver = im.RK4(dt=0.1)
    batch = im.odeint(field, y0, (0.0, 1.0), solver=solver, batch_dims=1).value
    coupled = im.odeint(field, y0, (0.0, 1.0), solver=solver, batch_dims=0).value
    alone = torch.stack([im.odeint(field, y, (0.0, 1.0), solver=solver).value for y in y0], dim=1)
    torch.testing.assert_close(batch, alone, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(coupled, alone, rtol=1e-12, atol=1e-12)


@fields
@pytest.mark.parametrize("batch_dims", [0, 1])
@pytest.mark.parametrize("adjoint", [im.RecursiveCheckpointAdjoint(), im.UnrolledAdjoint()])
def test_gradient_by_weights_and_start_through_a_trajectory(make, batch_dims, adjoint):
    field, y0 = make(), states(2)
    names = [name for name, _ in field.named_parameters()]

    def end(y0, *weights):
        def f(t, y, *weights):
            return torch.func.functional_call(field, dict(zip(names, weights)), (t, y))

        solver = im.RK4(dt=0.25)
        trajectory = im.odeint(f, y0, (0.0, 0.5), *weights, solver=solver, adjoint=adjoint, batch_dims=batch_dims)
        return trajectory.value[-1]

    weights = [p.detach().requires_grad_() for p in field.parameters()]
    assert torch.autograd.gradcheck(end, (y0.requires_grad_(), *weights), fast_mode=True)
    # Parameters that odeint finds itself have the same gradients.
    expected = torch.autograd.grad(end(y0, *weights).square().sum(), weights, allow_unused=True)
    solver = im.RK4(dt=0.25)
    found = im.odeint(field, y0, (0.0, 0.5), solver=solver, adjoint=adjoint, batch_dims=batch_dims).value[-1]
    found.square().sum().backward()
    for name, parameter, gradient in zip(names, field.parameters(), expected):
        # The last bias moves nothing: of a constant, every slope is 0.
        gradient = torch.zeros_like(parameter) if gradient is None else gradient
        assert name.endswith("2.bias") or gradient.abs().max() > 1e-6
        actual = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(actual, gradient, rtol=1e-9, atol=1e-12)


@fields
def test_second_derivatives(make):
    field, y0 = make(), states(2).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda y: field(0.0, y), y0)
    t, solver = (0.0, 0.4), im.RK4(dt=0.2)
    assert torch.autograd.gradgradcheck(
        lambda y: im.odeint(field, y, t, solver=solver, batch_dims=1).value[-1], y0
    )
    (first,) = torch.autograd.grad(field(0.0, y0).square().sum(), next(field.parameters()), create_graph=True)
    assert first.requires_grad


@fields
def test_transforms_of_torch_func_go_through(make):
    field, y = make(), states(3)
    torch.testing.assert_close(torch.vmap(lambda y: field(0.0, y))(y), field(0.0, y))
    jacobian = torch.autograd.functional.jacobian(lambda y: field(0.0, y), y[0])
    torch.testing.assert_close(torch.func.jacrev(lambda y: field(0.0, y))(y[0]), jacobian)
    torch.testing.assert_close(torch.func.jacfwd(lambda y: field(0.0, y))(y[0]), jacobian)


# --- What is refused ----------------------------------------------------------------------------------------


@fields
def test_states_that_cannot_be_split_are_refused(make):
    field = make()
    for shape in [(3,), (2, 5), (), (2, 0)]:
        with pytest.raises(ValueError, match=r"an even number of components; got the shape"):
            field(0.0, torch.zeros(shape, dtype=D))


@pytest.mark.parametrize(("kind", "name"), [(HamiltonianField, "hamiltonian"), (LagrangianField, "lagrangian")])
def test_more_than_one_number_a_state_is_refused(kind, name):
    y = states(3)
    for value in (lambda y: y, lambda y: y.sum(), lambda y: y[..., None, :1]):
        with pytest.raises(
            ValueError, match=rf"{name} must return one number per state, of shape \(3,\) or \(3, 1\)"
        ):
            kind(value)(0.0, y)


def test_singular_mass_is_reported_and_harms_no_other_sample():
    field = LagrangianField(lambda y: y[..., 0] * y[..., 1] ** 2 / 2 - y[..., 0])  # M = q
    y0 = torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=D)
    assert field(0.0, y0)[0].isfinite().all()
    assert field(0.0, y0)[1, 1].isnan()
    found = im.odeint(field, y0, (0.0, 0.1), batch_dims=1, on_failure="ignore")
    assert found.status.tolist() == [im.Status.CONVERGED, im.Status.NON_FINITE]


# --- Pairs --------------------------------------------------------------------------------------------------


class Separable(nn.Module):
    """T(p) + V(q), both learnt."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList([network(2), network(2)])

    def forward(self, y):
        q, p = y.chunk(2, dim=-1)
        return self.parts[0](q) + self.parts[1](p) + (q.square() + p.square()).sum(-1, keepdim=True)


@pytest.mark.parametrize("batch", [(), (5,)])
def test_a_hamiltonian_field_of_pairs_moves_by_symplectic_methods(batch):
    field, y = HamiltonianField(Separable()), states(*batch).requires_grad_()
    options = {"batch_dims": 1} if batch else {}
    whole = im.odeint(field, y, (0.0, 2.0), solver=im.Dopri8(rtol=1e-10, atol=1e-12), **options).value[-1]
    q, p = im.odeint(field, y.chunk(2, -1), (0.0, 2.0), solver=im.Yoshida4(dt=0.01), **options).value
    pair = torch.cat([q[-1], p[-1]], -1)
    torch.testing.assert_close(pair, whole, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(field.energy((q[-1], p[-1])), field.energy(y), rtol=1e-6, atol=1e-6)
    given = (y, *field.parameters())
    gradients = (torch.autograd.grad(x.square().sum(), given, allow_unused=True) for x in (pair, whole))
    for found, wanted in zip(*gradients):
        if wanted is not None:  # an energy's own bias moves nothing
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sizes", [(2, 3), (2, 2, 2)])
def test_what_is_no_pair_is_refused(sizes):
    with pytest.raises(ValueError, match=r"a pair \(q, p\) of tensors \(\.\.\., n\), got \[\(2,\)"):
        HamiltonianField(network())(0.0, tuple(torch.zeros(n, dtype=D) for n in sizes))
