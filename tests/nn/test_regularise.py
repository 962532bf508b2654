"""How contractive a cell is: estimates against exact Jacobians."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch.func import functional_call, jacrev, vmap
from torch.testing import assert_close

import implicitly as im
from tests.nn.cells import Conv, Dense, Tree
from tests.problems import seeded

DOUBLE = torch.float64


def jacobians(f, z, *args):
    """One a sample, as `(B, n, n)`."""

    def one(z, *args):
        def flat(v):
            return f(v.reshape(1, *z.shape), *(a[None] for a in args)).reshape(-1)

        return jacrev(flat)(z.reshape(-1))

    return vmap(one)(z, *args).detach()


def generator(seed=0):
    return seeded(seed)


def case(name):
    torch.manual_seed(1)
    if name == "dense":
        return Dense().double(), torch.randn(3, 4, dtype=DOUBLE), torch.randn(3, 4, dtype=DOUBLE)
    return Conv(2).double(), torch.randn(2, 2, 3, 3, dtype=DOUBLE), torch.randn(2, 2, 3, 3, dtype=DOUBLE)


@pytest.mark.parametrize("name", ["dense", "conv"])
def test_the_norm_is_unbiased_a_sample(name):
    f, z, x = case(name)
    exact = jacobians(f, z, x).square().sum((1, 2))
    samples = 2000
    estimate = im.nn.jacobian_norm(f, z, x, samples=samples, generator=generator())
    # Var |J'v|^2 = 2 |J J'|_F^2 for v ~ N(0, I); five standard errors.
    J = jacobians(f, z, x)
    error = (2 * (J @ J.mT).square().sum((1, 2)) / samples).sqrt()
    assert estimate.shape == exact.shape
    assert ((estimate - exact).abs() < 5 * error).all()


@pytest.mark.parametrize("transformed", [False, True])
def test_the_norm_of_attention_is_differentiable(transformed):
    class Attention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = torch.nn.Linear(4, 12)

        def forward(self, z, x):
            heads = [part.unflatten(-1, (2, 2)).transpose(1, 2) for part in (self.mix(z) + x).chunk(3, -1)]
            value = torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True)
            return value.transpose(1, 2).flatten(2)

    f, z = Attention().double(), torch.randn(2, 5, 4, dtype=DOUBLE, requires_grad=True)
    x = torch.randn(2, 5, 12, dtype=DOUBLE)

    def norm(z):
        return im.nn.jacobian_norm(f, z, x, generator=generator()).sum()

    (gradient,) = torch.autograd.grad(norm(z), z)
    if transformed:
        assert_close(torch.func.grad(norm)(z.detach()), gradient)
    direction = torch.randn_like(z)
    near = [norm(z + h * direction) for h in (1e-5, -1e-5)]
    assert_close((gradient * direction).sum(), (near[0] - near[1]) / 2e-5, rtol=1e-6, atol=1e-8)


def test_the_norm_is_differentiable():
    f, z, x = case("dense")
    z.requires_grad_()
    x.requires_grad_()
    weight = f.linear.weight

    def norm(z, x, weight):
        return torch.func.functional_call(Around(f), {"cell.linear.weight": weight}, (z, x))

    assert torch.autograd.gradcheck(norm, (z, x, weight))
    assert torch.autograd.gradgradcheck(norm, (z, x, weight))


class Around(torch.nn.Module):
    def __init__(self, cell):
        super().__init__()
        self.cell = cell

    def forward(self, z, x):
        return im.nn.jacobian_norm(self.cell, z, x, samples=3, generator=generator())


def test_samples_do_not_mix():
    f, z, x = case("dense")
    z.requires_grad_()
    (gradient,) = torch.autograd.grad(im.nn.jacobian_norm(f, z, x)[1], z)
    assert gradient[0].abs().sum() == gradient[2].abs().sum() == 0
    assert gradient[1].abs().sum() > 0


def test_the_norm_of_an_equilibrium_reaches_the_parameters():
    cell, _, x = case("dense")
    layer = im.nn.DEQ(cell, im.Anderson(rtol=1e-12), im.ImplicitAdjoint(rtol=1e-12))
    im.nn.jacobian_norm(cell, layer(x), x).sum().backward()
    through = cell.linear.weight.grad.clone()
    layer.zero_grad()
    im.nn.jacobian_norm(cell, layer.solution.value, x, generator=generator()).sum().backward()
    assert through.abs().min() > 0
    assert cell.linear.weight.grad.abs().min() > 0


@pytest.mark.host  # other weights are drawn elsewhere, for which Anderson may stagnate before they contract
def test_training_on_the_norm_makes_the_cell_contract_more():
    cell = Dense(8, norm=2.0)
    x = torch.randn(16, 8)
    layer = im.nn.DEQ(cell, im.Anderson(rtol=1e-4))
    before = im.nn.spectral_radius(cell, layer(x).detach(), x, generator=generator()).mean()
    optimizer = torch.optim.Adam(cell.parameters(), 0.01)
    for _ in range(40):
        optimizer.zero_grad()
        im.nn.jacobian_norm(cell, layer(x), x, generator=generator()).mean().backward()
        optimizer.step()
    after = im.nn.spectral_radius(cell, layer(x).detach(), x, generator=generator()).mean()
    assert after < 0.8 * before


@pytest.mark.parametrize("name", ["dense", "conv"])
def test_the_radius_is_that_of_the_eigenvalues(name):
    f, z, x = case(name)
    exact = torch.linalg.eigvals(jacobians(f, z, x)).abs().amax(1)
    got = im.nn.spectral_radius(f, z, x, steps=1000, generator=generator())
    # The mean over k steps has an error of order log(cond) / k.
    assert_close(got, exact, rtol=5e-3, atol=0)
    assert not got.requires_grad


@pytest.mark.parametrize("angle", [0.1, 1.2, math.pi / 2, 3.0])
def test_the_radius_of_complex_pairs(angle):
    c, s = math.cos(angle), math.sin(angle)
    rotation = 0.9 * torch.tensor([[c, -s], [s, c]], dtype=DOUBLE)
    z = torch.zeros(4, 2, dtype=DOUBLE)
    got = im.nn.spectral_radius(lambda z: z @ rotation.mT, z, generator=generator())
    assert_close(got, torch.full((4,), 0.9, dtype=DOUBLE))
    skew = torch.tensor([[3.0, 1.0], [0.0, 0.5]], dtype=DOUBLE)
    sheared = skew @ rotation @ torch.linalg.inv(skew)
    got = im.nn.spectral_radius(lambda z: z @ sheared.mT, z, steps=1500, generator=generator())
    assert_close(got, torch.full((4,), 0.9, dtype=DOUBLE), rtol=5e-3, atol=0)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-4), (DOUBLE, 1e-9)])
def test_the_radius_of_each_sample(dtype, rtol):
    """Also where squares of its size are beyond all numbers of the dtype."""
    slopes = torch.tensor([0.0, 0.3, 5.0, 1e-30, 1e30, 2**-130], dtype=dtype)  # the last beyond normal ones
    z = torch.ones(6, 3, dtype=dtype)
    got = im.nn.spectral_radius(lambda z, a: a[:, None] * z, z, slopes)
    assert_close(got, slopes, rtol=rtol, atol=0)


@pytest.mark.parametrize("estimate", [im.nn.jacobian_norm, im.nn.spectral_radius])
@pytest.mark.parametrize("shape", [(3, 0), (0, 2), (0, 0)])
def test_of_states_without_entries(estimate, shape):
    z = torch.zeros(shape)
    assert_close(estimate(lambda z: 2 * z, z), z.new_zeros(shape[0]))


@pytest.mark.parametrize(
    "f",
    [lambda z, x: x, lambda z, x: 0 * z + x, lambda z, x: torch.zeros_like(z), lambda z, x: z.detach() + x],
)
@pytest.mark.parametrize("grad", [True, False])
def test_a_cell_that_ignores_z_has_a_zero_jacobian(f, grad):
    z, x = torch.randn(3, 2), torch.randn(3, 2, requires_grad=grad)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(im.nn.spectral_radius(f, z, x), torch.zeros(3))
        norm = im.nn.jacobian_norm(f, z, x)
    assert torch.equal(norm, torch.zeros(3))


def test_a_nilpotent_jacobian_has_radius_zero():
    layer = im.nn.as_deq(torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2)))
    x = torch.randn(4, 3)
    layer(x)
    assert torch.equal(im.nn.spectral_radius(layer.cell, layer.solution.value, x), torch.zeros(4))


def test_the_generator_decides():
    f, z, x = case("dense")
    for estimate in (im.nn.jacobian_norm, lambda *a, **k: im.nn.spectral_radius(*a, steps=4, **k)):
        a, b, c = (estimate(f, z, x, generator=generator(s)) for s in (1, 1, 2))
        assert torch.equal(a, b)
        assert not torch.equal(a, c)
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    im.nn.spectral_radius(f, z, x, generator=generator())
    im.nn.jacobian_norm(f, z, x, generator=generator())
    assert torch.equal(torch.randn(3), expected)


def test_without_gradients():
    f, z, x = case("dense")
    with torch.no_grad():
        norm = im.nn.jacobian_norm(f, z, x)
        radius = im.nn.spectral_radius(f, z, x)
    assert not norm.requires_grad
    assert (radius < 0.6).all()
    assert all(p.grad is None for p in f.parameters())


def test_in_inference_mode():
    f, z, x = case("dense")
    expected = im.nn.spectral_radius(f, z, x, generator=generator())
    norm = im.nn.jacobian_norm(f, z, x, generator=generator())
    with torch.inference_mode():
        z, x = z.clone(), x.clone()
        assert z.is_inference()
        assert_close(im.nn.spectral_radius(f, z, x, generator=generator()), expected)
        found = im.nn.jacobian_norm(f, z, x, generator=generator())
    assert_close(found, norm.detach())
    assert not found.requires_grad


def test_the_norm_under_transforms():
    f, z, x = case("dense")

    def norm(z, x, weights=None):
        cell = f if weights is None else lambda z, x: functional_call(f, weights, (z, x))
        return im.nn.jacobian_norm(cell, z, x, generator=generator()).sum()

    z, x = z.detach().requires_grad_(), x.detach().requires_grad_()
    expected = torch.autograd.grad(norm(z, x), (z, x))
    assert_close(torch.func.grad(norm, (0, 1))(z, x), expected)
    weights = {k: p.detach() for k, p in f.named_parameters()}
    got = torch.func.grad(norm, 2)(z.detach(), x.detach(), weights)
    norm(z, x).backward()
    for key, p in f.named_parameters():
        assert_close(got[key], p.grad if p.grad is not None else torch.zeros_like(p))
    # A sample at a time, and with its own direction each.
    rows = vmap(lambda z, x: im.nn.jacobian_norm(f, z[None], x[None], samples=5000)[0], randomness="different")
    J = jacobians(f, z, x)
    assert_close(rows(z.detach(), x.detach()), J.square().sum((1, 2)), rtol=0.1, atol=0)


def test_the_radius_under_transforms():
    f, z, x = case("dense")
    expected = im.nn.spectral_radius(f, z, x, generator=generator())
    stacked = torch.stack([z, z])
    found = vmap(lambda z: im.nn.spectral_radius(f, z, x, generator=generator()), randomness="same")(stacked)
    assert_close(found, torch.stack([expected, expected]))
    assert not torch.func.grad(lambda x: im.nn.spectral_radius(f, z, x).sum())(x).any()


def test_cells_that_only_autograd_knows():
    class Half(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z):
            return z / 2

        @staticmethod
        def backward(ctx, g):
            return g / 2

    z = torch.randn(3, 2, dtype=DOUBLE)
    assert_close(im.nn.spectral_radius(Half.apply, z), torch.full((3,), 0.5, dtype=DOUBLE))


def test_of_pytrees():
    cell = Tree().double()
    z = {"p": torch.randn(2, 3, dtype=DOUBLE), "q": torch.randn(2, 2, dtype=DOUBLE)}
    x = (torch.randn(2, 3, dtype=DOUBLE), torch.randn(2, 2, dtype=DOUBLE))

    def flat(v, p, q):
        out = cell({"p": v[:, :3], "q": v[:, 3:]}, (p, q))
        return torch.cat([out["p"], out["q"]], 1)

    J = jacobians(flat, torch.cat([z["p"], z["q"]], 1), *x)
    got = im.nn.spectral_radius(cell, z, x, steps=1000, generator=generator())
    assert_close(got, torch.linalg.eigvals(J).abs().amax(1), rtol=5e-3, atol=0)
    norm = im.nn.jacobian_norm(cell, z, x, samples=2000, generator=generator())
    assert_close(norm, J.square().sum((1, 2)), rtol=0.1, atol=0)


@pytest.mark.parametrize("steps", [1, 0, -2])
def test_too_few_steps_are_refused(steps):
    with pytest.raises(ValueError, match="steps"):
        im.nn.spectral_radius(lambda z: z, torch.zeros(1, 1), steps=steps)


@pytest.mark.parametrize("samples", [0, -1])
def test_no_samples_are_refused(samples):
    with pytest.raises(ValueError, match="samples"):
        im.nn.jacobian_norm(lambda z: z, torch.zeros(1, 1), samples=samples)


def test_a_wrong_shape_is_refused():
    for estimate in (im.nn.jacobian_norm, im.nn.spectral_radius):
        with pytest.raises(ValueError, match="shape"):
            estimate(lambda z: z[:, :1], torch.zeros(2, 2))


# ------------------------------------------------------------------------------------- independence


def test_independent_cells():
    f, z, x = case("dense")
    assert im.check_independence(f, z, x) == []
    f, z, x = case("conv")
    assert im.check_independence(f, z, x) == []
    assert im.check_independence(lambda z, x: x, z, x) == []
    with torch.no_grad():
        assert im.check_independence(f, z, x) == []


def test_coupled_samples_are_named():
    z = torch.randn(4, 3)

    def third_sees_first(z):
        out = 0.5 * z
        return torch.cat([out[:2], out[2:3] + out[:1], out[3:]])

    assert im.check_independence(third_sees_first, z) == [(2, 0)]
    assert im.check_independence(lambda z: 0.5 * z.roll(1, 0), z) == [(0, 3), (1, 0), (2, 1), (3, 2)]
    everyone = [(i, j) for i in range(4) for j in range(4) if i != j]
    assert im.check_independence(lambda z: z - z.mean(0), z) == everyone
    assert im.check_independence(torch.nn.BatchNorm1d(3), z) == everyone
    assert im.check_independence(torch.nn.BatchNorm1d(3).eval(), z) == []


def test_it_looks_at_as_many_samples_as_asked():
    z = torch.randn(5, 2)
    assert im.check_independence(lambda z: z.roll(1, 0), z, samples=2) == [(0, 4), (1, 0)]
    assert im.check_independence(lambda z: z, torch.zeros(0, 2)) == []


@pytest.mark.parametrize("batch", [40, 41, 64])
def test_all_outputs_are_looked_at(batch):
    def late(z):
        return torch.cat([z[:30], z[30:31] + z[31:32], z[31:]])

    z = torch.randn(batch, 4)
    assert im.check_independence(late, z) == [(30, 31)]
    assert im.check_independence(lambda z: z + 0.1 * z[-1:], z, samples=2) == [(0, batch - 1), (1, batch - 1)]
    assert im.check_independence(lambda z: 0.5 * z, z) == []


def test_coupling_whose_derivative_vanishes_at_the_usual_start():
    everyone = [(i, j) for i in range(3) for j in range(3) if i != j]
    for f in (lambda z: z * z.mean(0), lambda z: z + z.square().mean(0), lambda z: torch.relu(z * z.sum())):
        assert im.check_independence(f, torch.zeros(3, 4)) == everyone
    assert im.check_independence(torch.tanh, torch.zeros(3, 4)) == []


def test_independence_in_inference_mode():
    with torch.inference_mode():
        z = torch.randn(3, 2)
        assert im.check_independence(lambda z: z.cumsum(0), z) == [(1, 0), (2, 0), (2, 1)]
        assert im.check_independence(torch.tanh, z) == []


def test_a_derivative_that_does_not_tell_is_refused():
    with pytest.raises(ValueError, match="no finite derivative by sample 1 of z"):
        im.check_independence(torch.sqrt, torch.tensor([[1.0], [0.0], [1.0]]))
    with pytest.raises(ValueError, match="samples must be at least 1"):
        im.check_independence(torch.tanh, torch.zeros(2, 1), samples=0)


def test_coupling_through_one_entry_of_a_pytree():
    z = {"p": torch.randn(3, 3), "q": torch.randn(3, 2)}

    def f(z):
        return {"p": z["p"], "q": z["q"] + z["p"].mean(0)[:2]}

    assert len(im.check_independence(f, z)) == 6


def test_it_leaves_statistics_and_gradients_alone():
    norm, z = torch.nn.BatchNorm1d(3), torch.randn(4, 3, requires_grad=True)
    im.check_independence(norm, z)
    assert z.grad is None
    assert all(p.grad is None for p in norm.parameters())
    assert norm.num_batches_tracked == 0
    assert torch.equal(norm.running_mean, torch.zeros(3))
