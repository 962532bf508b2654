"""`qp`: solutions beside other solvers and by hand, and derivatives of every argument, order and mode."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, func
from torch.autograd import gradcheck, gradgradcheck

import implicitly as im
from tests.argmin.programs import NAMES, D, program, sample


def outputs(*args: Tensor, **options) -> tuple[Tensor, ...]:
    sol = im.qp(*args, **options)
    return sol.value, sol.dual_inequality, sol.dual_equality, sol.slack


def test_a_projection_onto_a_box():
    p = torch.tensor([[3.0, -0.2], [-5.0, 0.9]], dtype=D)
    eye = torch.eye(2, dtype=D)
    sol = im.qp(eye, -p, torch.cat([eye, -eye]), torch.ones(4, dtype=D))
    torch.testing.assert_close(sol.value, p.clamp(-1, 1), rtol=0, atol=1e-12)
    dual = torch.tensor([[2.0, 0, 0, 0], [0, 0, 4.0, 0]], dtype=D)
    torch.testing.assert_close(sol.dual_inequality, dual, rtol=0, atol=1e-12)
    assert sol.dual_equality.shape == (2, 0)
    assert sol.status.tolist() == [0, 0]
    assert sol.residual.max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_what_comes_in_goes_out(dtype):
    args = program(dtype=dtype)
    sol = im.qp(*args)
    for t, width in zip((sol.value, sol.dual_inequality, sol.dual_equality, sol.slack), (4, 5, 1, 5)):
        assert t.dtype == dtype
        assert t.shape == (3, width)
    assert sol.steps.shape == sol.status.shape == sol.residual.shape == (3,)
    assert bool(sol.converged.all())
    exact = im.qp(*(t.double() for t in args)).value
    torch.testing.assert_close(sol.value.double(), exact, rtol=0, atol=1e-3 if dtype == torch.float32 else 0)


@pytest.mark.parametrize("solver", [im.InteriorPoint(), im.ADMM()])
@pytest.mark.parametrize("smoothing", [0.0, 1e-2])
def test_autocast_changes_nothing(solver, smoothing):
    args = [t.detach().float().requires_grad_() for t in program(shared=("Q", "G", "A"))]
    options = {"solver": solver, "adjoint": im.KKTAdjoint(smoothing=smoothing)}
    exact = outputs(*args, **options)
    gradients = torch.autograd.grad(exact[0].square().sum(), args)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = outputs(*args, **options)
        within = torch.autograd.grad(found[0].square().sum(), args, retain_graph=True)
    after = torch.autograd.grad(found[0].square().sum(), args)
    # Up to what a sum of as many terms in another order makes of it.
    for ours, theirs in ((found, exact), (within, gradients), (after, gradients)):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_one_program_has_no_batch_anywhere():
    args = program(batch=None)
    sol = im.qp(*args)
    assert sol.value.shape == (4,)
    assert sol.status.shape == ()
    batched = im.qp(args[0].expand(2, -1, -1), *args[1:])
    torch.testing.assert_close(batched.value, sol.value.expand(2, -1))


@pytest.mark.parametrize("shared", [(), ("Q", "G", "A"), ("p", "h", "b"), NAMES[:5]])
def test_derivatives_of_everything_by_everything(shared):
    args = [t.requires_grad_() for t in program(batch=2, n=3, m=4, shared=shared, seed=1)]
    assert (im.qp(*args).dual_inequality > 0.01).any()
    assert gradcheck(outputs, args, check_forward_ad=True, fast_mode=True)
    # Random combinations of its entries, as all of them take seconds.
    assert gradgradcheck(outputs, args, fast_mode=True)


@pytest.mark.parametrize("seed", [1, 3])  # the first or the second of the inequalities is active
def test_every_entry_of_the_second_derivative_of_a_small_program(seed):
    args = [t.requires_grad_() for t in program(batch=1, n=2, m=2, q=1, seed=seed)]
    assert (im.qp(*args).dual_inequality > 0.01).sum() == 1
    assert gradgradcheck(outputs, args)


def test_third_derivative():
    args = program(batch=1, n=2, m=2, q=0, seed=5)

    def value(p: Tensor) -> Tensor:
        return im.qp(args[0], p, *args[2:4]).value.sum()

    third = func.jacrev(func.jacrev(func.jacrev(lambda p: value(p) ** 3)))(args[1])
    slope = func.jacrev(value)(args[1]).flatten()  # z is piecewise linear in p
    exact = 6 * torch.einsum("i,j,k->ijk", slope, slope, slope)
    torch.testing.assert_close(third.reshape(2, 2, 2), exact)


def test_shared_arguments_get_sums():
    args = [t.requires_grad_() for t in program(batch=3, shared=NAMES[:5], seed=3)]
    weights = torch.randn(3, 4, dtype=D)
    together = torch.autograd.grad((weights * im.qp(*args).value).sum(), args[:5])
    alone = [
        torch.autograd.grad((weights[i] * im.qp(*args[:5], args[5][i]).value).sum(), args[:5]) for i in range(3)
    ]
    for whole, parts in zip(together, zip(*alone)):
        torch.testing.assert_close(whole, sum(parts), rtol=1e-10, atol=1e-12)


def test_forward_mode_along_every_entry_alone():
    """A right-hand side of a single entry may be one on which the Jacobian and its transpose hardly differ."""
    generator = torch.Generator().manual_seed(1)
    M, p, G, z = (torch.randn(3, *s, generator=generator, dtype=D) for s in ((5, 5), (5,), (3, 5), (5, 1)))
    room = torch.rand(3, 3, generator=generator, dtype=D)
    A = torch.randn(3, 2, 5, generator=generator, dtype=D)
    args = [M @ M.mT + 0.5 * torch.eye(5, dtype=D), 2 * p, G, (G @ z)[..., 0] + room, A, (A @ z)[..., 0]]

    def value(G: Tensor) -> Tensor:
        return im.qp(*args[:2], G, *args[3:]).value

    directions = torch.eye(G.numel(), dtype=D).reshape(-1, *G.shape)
    forward = torch.stack([func.jvp(value, (G,), (d,))[1] for d in directions])
    torch.testing.assert_close(forward, func.jacrev(value)(G).reshape(15, -1).mT.reshape_as(forward))


def test_transforms_of_torch_func_agree():
    args = program(batch=2, seed=4)
    of_p = lambda p: torch.cat(outputs(args[0], p, *args[2:]), 1)  # noqa: E731
    reverse, forward = func.jacrev(of_p)(args[1]), func.jacfwd(of_p)(args[1])
    torch.testing.assert_close(reverse, forward)
    moved = func.jvp(of_p, (args[1],), (torch.ones_like(args[1]),))[1]
    torch.testing.assert_close(moved, forward.sum((2, 3)))
    loss = lambda Q: outputs(Q, *args[1:])[0].pow(2).sum()  # noqa: E731
    torch.testing.assert_close(
        func.grad(loss)(args[0]), torch.autograd.grad(loss(args[0].requires_grad_()), args[0])[0]
    )


@pytest.mark.parametrize("shared", [(), ("Q", "G")])
def test_vmap(shared):
    args = program(batch=3, shared=shared, seed=6)
    p = torch.randn(4, 3, 4, dtype=D)
    mapped = func.vmap(lambda p: outputs(args[0], p, *args[2:]))(p)
    slopes = func.vmap(func.grad(lambda p: outputs(args[0], p, *args[2:])[0].sin().sum()))(p)
    for i in range(4):
        alone = outputs(args[0], p[i], *args[2:])
        for whole, part in zip(mapped, alone):
            torch.testing.assert_close(whole[i], part)
        slope = func.grad(lambda x: outputs(args[0], x, *args[2:])[0].sin().sum())(p[i])
        torch.testing.assert_close(slopes[i], slope)


def test_vmap_over_single_programs_is_the_batch():
    args = program(batch=3, seed=7)
    for whole, mapped in zip(outputs(*args), func.vmap(outputs)(*args)):
        torch.testing.assert_close(mapped, whole)
    G = args[2].movedim(0, 1)
    mapped = func.vmap(outputs, in_dims=(0, 0, 1, 0, None, None))(*args[:2], G, args[3], args[4][0], args[5][0])
    whole = outputs(*args[:4], args[4][0], args[5][0])
    torch.testing.assert_close(mapped[0], whole[0])


def test_the_batch_does_not_matter():
    args = program(batch=6, n=6, m=9, q=2, seed=8)
    whole, order = outputs(*args), torch.tensor([4, 0, 5, 2, 1, 3])
    for t, permuted in zip(whole, outputs(*(t[order] for t in args))):
        torch.testing.assert_close(permuted, t[order], rtol=1e-11, atol=1e-12)
    for i in range(6):
        for t, alone in zip(whole, outputs(*sample(args, i))):
            torch.testing.assert_close(alone, t[i], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("m", "q"), [(0, 2), (0, 0), (4, 0)])
def test_without_some_constraints(m, q):
    args = program(m=m, q=q, seed=9)
    given = [None if t.shape[1] == 0 else t.requires_grad_() for t in args]
    sol = im.qp(*given)
    empty = im.qp(*args)
    torch.testing.assert_close(sol.value, empty.value, rtol=0, atol=0)
    if m == 0:
        KKT = torch.zeros(3, 4 + q, 4 + q, dtype=D)
        KKT[:, :4, :4], KKT[:, 4:, :4], KKT[:, :4, 4:] = args[0], args[4], args[4].mT
        exact = torch.linalg.solve(KKT, torch.cat([-args[1], args[5]], 1))
        torch.testing.assert_close(torch.cat([sol.value, sol.dual_equality], 1), exact)
    present = [t for t in given if t is not None]
    assert gradcheck(lambda *a: im.qp(*_placed(a, given)).value, present)


def _placed(tensors, pattern):
    tensors = iter(tensors)
    return [None if t is None else next(tensors) for t in pattern]
