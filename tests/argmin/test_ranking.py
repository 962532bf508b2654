"""Sparsemax, soft sort and soft rank: their limits and the papers' examples. Derivatives: test_project."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import func

import implicitly as im
from tests.problems import seeded

D = torch.float64


def test_sparsemax_is_that_of_the_paper():
    """Of two entries (t, 0): clip((t + 1) / 2, 0, 1); and the Jacobian is diag(s) - s s' / |s| on the support."""
    t = torch.linspace(-2, 2, 41, dtype=D)
    z = torch.stack([t, torch.zeros_like(t)], dim=-1)
    torch.testing.assert_close(im.sparsemax(z)[:, 0], ((t + 1) / 2).clamp(0, 1))
    z = torch.tensor([0.3, -2.0, 0.1, 0.2], dtype=D)
    s = (im.sparsemax(z) > 0).to(D)
    torch.testing.assert_close(func.jacrev(im.sparsemax)(z), torch.diag(s) - torch.outer(s, s) / s.sum())


def test_sparsemax_along_any_dimension():
    z = torch.randn(3, 4, 5, generator=seeded(0))
    for dim in range(-3, 3):
        x = im.sparsemax(z, dim=dim)
        torch.testing.assert_close(x.sum(dim), torch.ones_like(x.sum(dim)))
        torch.testing.assert_close(x.movedim(dim, -1), im.sparsemax(z.movedim(dim, -1)))
    with pytest.raises(IndexError):
        im.sparsemax(z, dim=3)
    masked = torch.tensor([0.2, -float("inf"), 0.1])
    assert im.sparsemax(masked)[1] == 0


@given(seed=st.integers(0, 10**6), n=st.integers(1, 30), batch=st.integers(1, 3))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_soft_operators_become_hard_and_keep_the_sum(seed: int, n: int, batch: int):
    z = torch.randn(batch, n, dtype=D, generator=seeded(seed))
    order = z.argsort(-1)
    ranks = order.argsort(-1).to(D) + 1
    gap = z.sort(-1).values.diff(dim=-1).amin(-1) if n > 1 else torch.ones(batch, dtype=D)
    strength = 0.9 * gap.clamp(min=1e-9)
    torch.testing.assert_close(im.soft_rank(z, strength), ranks)
    torch.testing.assert_close(im.soft_rank(z, strength, descending=True), n + 1 - ranks)
    spread = (z.amax(-1) - z.amin(-1)).clamp(min=1)
    near = 0.9 / spread  # gaps of (1, ..., n) / strength are larger than those of z
    torch.testing.assert_close(im.soft_sort(z, near), z.sort(-1).values)
    torch.testing.assert_close(im.soft_sort(z, near, descending=True), z.sort(-1, descending=True).values)
    for strength in (0.1, 1.0, 100.0):
        soft, rank = im.soft_sort(z, strength), im.soft_rank(z, strength)
        torch.testing.assert_close(soft.sum(-1), z.sum(-1))
        torch.testing.assert_close(rank.sum(-1), torch.full((batch,), n * (n + 1) / 2, dtype=D))
        assert bool((soft.diff(dim=-1) >= -1e-12).all())
        assert bool((rank.gather(-1, order).diff(dim=-1) >= -1e-9).all())


def test_strong_regularisation_leaves_the_mean():
    z = torch.tensor([3.0, -1.0, 10.0], dtype=D)
    torch.testing.assert_close(im.soft_sort(z, 1e9), torch.full((3,), 4.0, dtype=D))
    torch.testing.assert_close(im.soft_rank(z, 1e9), torch.full((3,), 2.0, dtype=D))


def test_ranks_of_close_numbers_are_linear_in_them():
    """Closer than `strength`, two ranks move with the gap, by gradients that cancel."""
    z = torch.tensor([0.0, 0.25, 10.0], dtype=D)
    ranks = im.soft_rank(z, 1.0)
    torch.testing.assert_close(ranks, torch.tensor([1.375, 1.625, 3.0], dtype=D))
    J = func.jacrev(im.soft_rank)(z)
    torch.testing.assert_close(J, torch.tensor([[0.5, -0.5, 0], [-0.5, 0.5, 0], [0, 0, 0]], dtype=D))


def test_ranks_keep_their_digits_in_single_precision():
    z = torch.randn(200, generator=seeded(1))
    gap = float(z.sort().values.diff().amin())
    ranks = im.soft_rank(z, gap / 2)
    torch.testing.assert_close(ranks, z.argsort().argsort().float() + 1, rtol=0, atol=1e-3)


def test_a_ranking_can_be_learned():
    """Gradient descent on Spearman's distance finds scores in the order asked for."""
    wanted = torch.tensor([3.0, 1.0, 5.0, 2.0, 4.0], dtype=D)
    scores = torch.zeros(5, dtype=D, requires_grad=True)
    optimizer = torch.optim.SGD([scores], lr=0.1)
    for _ in range(60):
        loss = (im.soft_rank(scores, 1.0) - wanted).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert torch.equal(scores.argsort().argsort() + 1, wanted.long())


@pytest.mark.parametrize("dtype", [torch.float32, D])
@pytest.mark.parametrize("descending", [False, True])
def test_a_strength_of_next_to_nothing_sorts_and_ranks(dtype, descending):
    z = torch.tensor([[3.0, 2.0, 1e9, 0.1], [0.1, 0.1, 0.1, -7.0]], dtype=dtype, requires_grad=True)
    ranks = torch.tensor([[3.0, 2.0, 4.0, 1.0], [3.0, 3.0, 3.0, 1.0]], dtype=dtype)  # ties share their mean
    tiny = torch.finfo(dtype).tiny
    for strength in (1e3 * tiny, tiny / 64):
        found = im.soft_rank(z, strength, descending)
        torch.testing.assert_close(found, 5 - ranks if descending else ranks)
        ordered = im.soft_sort(z, strength, descending)
        torch.testing.assert_close(ordered, z.sort(-1, descending=descending).values)
        slope = torch.autograd.grad(ordered[:, 0].sum(), z)[0]
        torch.testing.assert_close(slope.sum(-1), torch.ones(2, dtype=dtype))


def test_ranks_keep_the_digits_of_small_differences():
    """Beside large numbers, of which a mean is not exact, and beside a strength that is small beside those."""
    z = 1e8 + torch.tensor([0.0, 1.0, 3.0, 1.5], dtype=D)
    torch.testing.assert_close(im.soft_rank(z, 2.0), im.soft_rank(z - 1e8, 2.0), atol=1e-12, rtol=0)
    ties = torch.full((10,), 0.1, dtype=D)
    torch.testing.assert_close(im.soft_rank(ties, 1e-18), torch.full((10,), 5.5, dtype=D))


def test_ties_share_their_rank_beside_numbers_much_larger_than_the_strength():
    z = torch.tensor([1e6, 1e6, 1e6, 2e6, -1e6, 0.0, 2e6])
    torch.testing.assert_close(im.soft_rank(z, 0.128), torch.tensor([4.0, 4, 4, 6.5, 1, 2, 6.5]))
    close = torch.tensor([2e-12, -1.75e-6, -2.95e-6, -1e-13, -3.3e-4, -9.4e-13, 6.5e-12])
    strength = 3e-12  # of which the last of these and the large ones are far, and three are near
    expected = im.soft_rank(close.double(), strength).float()
    torch.testing.assert_close(im.soft_rank(close, strength), expected)
