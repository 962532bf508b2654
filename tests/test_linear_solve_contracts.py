"""What `linear_solve` keeps as all entries do: samples on their own, what f was, autocast, `in_dims`."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import implicitly as im
from tests.problems import draw, matrix

D = torch.float64
EACH = torch.eye(4, dtype=D) + matrix(4, 0.5, 1, 5)  # one matrix a sample
SCALE = 1 + draw(4, seed=2).abs()
B = draw(5, 4, seed=3)
TIGHT = im.GMRES(rtol=1e-13)
both_ways = pytest.mark.parametrize("transpose", [False, True])
with_and_without = pytest.mark.parametrize("in_dims", [None, (0, None)])


def apply(u, M, scale):
    return scale * (M @ u.unsqueeze(2)).squeeze(2)


def exact(b, M, scale, transpose=False):
    dense = scale.unsqueeze(1) * M
    return torch.linalg.solve(dense.mT if transpose else dense, b.unsqueeze(2)).squeeze(2)


def solved(b, M, scale, **options):
    return im.linear_solve(apply, b, M, scale, solver=TIGHT, **options)


def differentiated(f, *inputs):
    inputs = [x.clone().requires_grad_() for x in inputs]
    return torch.autograd.grad(f(*inputs).sin().sum(), inputs)


@both_ways
@pytest.mark.parametrize("in_dims", [(0, None), (-3, None)])
def test_value_and_gradients_with_in_dims(in_dims, transpose):
    options = {"in_dims": in_dims, "transpose": transpose}
    torch.testing.assert_close(solved(B, EACH, SCALE, **options).value, exact(B, EACH, SCALE, transpose))
    found = differentiated(lambda *x: solved(*x, **options).value, B, EACH, SCALE)
    expected = differentiated(lambda *x: exact(*x, transpose), B, EACH, SCALE)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@both_ways
def test_derivatives_of_every_order_with_in_dims(transpose):
    inputs = [x.clone().requires_grad_() for x in (B[:2], EACH[:2], SCALE)]
    f = lambda *x: solved(*x, in_dims=(0, None), transpose=transpose).value  # noqa: E731
    assert torch.autograd.gradcheck(f, inputs, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(f, inputs, fast_mode=True, check_fwd_over_rev=True)


@both_ways
@with_and_without
def test_vmap(in_dims, transpose):
    f = lambda b, scale: solved(b, EACH, scale, in_dims=in_dims, transpose=transpose).value  # noqa: E731
    b, scale = draw(3, 5, 4, seed=4), 1 + draw(3, 4, seed=5).abs()
    found = torch.func.vmap(f)(b, scale)
    torch.testing.assert_close(found, torch.stack([exact(*x, transpose) for x in zip(b, [EACH] * 3, scale)]))
    jacobian = torch.func.vmap(torch.func.jacrev(f, argnums=1))(b, scale)
    expected = [torch.func.jacrev(exact, argnums=2)(*x, transpose) for x in zip(b, [EACH] * 3, scale)]
    torch.testing.assert_close(jacobian, torch.stack(expected), rtol=0, atol=1e-9)


@both_ways
def test_finished_samples_are_dropped_from_the_calls(transpose):
    M = torch.stack([torch.eye(4, dtype=D)] * 4 + [EACH[0]])  # done at once, but for the last
    rows = []

    def recorded(u, M):
        rows.append(len(u))
        return apply(u, M, 1.0)

    whole = im.linear_solve(recorded, B, M, transpose=transpose)
    assert set(rows) == {5}
    rows.clear()
    found = im.linear_solve(recorded, B, M, transpose=transpose, in_dims=0)
    assert set(rows) == {5, 1}
    torch.testing.assert_close(found.value, whole.value)
    assert found.steps.tolist() == whole.steps.tolist()


def test_in_dims_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="must have 5 entries there"):
        solved(B, EACH, SCALE, in_dims=(0, 0))
    with pytest.raises(ValueError, match="batch_dims=0 means one system"):
        im.linear_solve(lambda u, a: a * u, B, SCALE, batch_dims=0, in_dims=0)


@both_ways
@with_and_without
def test_a_sample_of_nan_harms_no_shared_gradient(in_dims, transpose):
    M, options = EACH.clone(), {"in_dims": in_dims, "transpose": transpose, "on_failure": "ignore"}
    M[1] = float("nan")
    rest = [0, 2, 3, 4]
    inputs = [x.clone().requires_grad_() for x in (B, M, SCALE)]
    solution = solved(*inputs, **options)
    assert solution.status.tolist() == [0, im.Status.NON_FINITE, 0, 0, 0]
    found = torch.autograd.grad(solution.value[rest].sin().sum(), inputs)
    expected = differentiated(lambda *x: exact(*x, transpose), B[rest], EACH[rest], SCALE)
    torch.testing.assert_close([found[0][rest], found[1][rest], found[2]], list(expected), rtol=0, atol=1e-10)
    assert not found[0][1].any()
    assert not found[1][1].any()


@both_ways
def test_the_derivative_is_of_what_the_operator_was(transpose):
    class Switched(nn.Module):
        def forward(self, u):
            return u * (2.0 if self.training else 20.0)

    operator, b = Switched(), B.clone().requires_grad_()
    value = im.linear_solve(operator, b, transpose=transpose).value
    operator.eval()
    (gradient,) = torch.autograd.grad(value.sum(), b)
    torch.testing.assert_close(gradient, torch.full_like(B, 0.5))
    assert not operator.training


def test_a_tensor_of_the_operator_that_was_changed_since_is_told():
    W, b = 2 * torch.eye(4, dtype=D), B.clone().requires_grad_()
    value = im.linear_solve(lambda u: u @ W, b).value
    W.mul_(10)
    with pytest.raises(RuntimeError, match=r"'W' of shape .* changed in place since the solve"):
        value.sum().backward()


@both_ways
def test_autocast_decides_what_can_be_reached(transpose):
    M, b = torch.eye(4) + matrix(4, 0.3, 6).float(), B.float()
    with torch.autocast("cpu", torch.bfloat16):
        solution = im.linear_solve(lambda u, M: u @ M.mT, b, M, transpose=transpose)
    assert solution.value.dtype == torch.float32
    expected = torch.linalg.solve(M.mT if transpose else M, b.mT).mT
    torch.testing.assert_close(solution.value, expected, rtol=0.1, atol=0.1)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="bfloat16 cannot reach"):
        im.linear_solve(lambda u, M: u @ M.mT, b, M, solver=im.GMRES(rtol=1e-5))
