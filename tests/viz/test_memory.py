"""Measured memory is what arithmetic says it should be."""

import pytest
import torch
from torch import nn

from implicitly.viz import peak_bytes, plot_memory, saved_bytes

MIB = 2**20


def mebibytes(count):
    return torch.ones(count * MIB // 4)


def test_peak_is_the_most_alive_at_once():
    def fn():
        five = [mebibytes(1) for _ in range(5)]
        del five[2:]
        return mebibytes(2)

    assert peak_bytes(fn) == 5 * MIB


def test_peak_is_beyond_what_was_alive_before_and_views_are_free():
    before = mebibytes(8)

    def fn():
        before.view(-1, 2).t()
        before.add_(1)
        return (before * 2)[::2]

    assert peak_bytes(fn) == 8 * MIB


def test_memory_freed_and_used_again_counts_once():
    def fn():
        for _ in range(50):
            mebibytes(1).sum()

    assert peak_bytes(fn) == pytest.approx(MIB, abs=64)


def test_peak_of_a_training_step():
    # tanh keeps its result for the backward pass: one of n for each call, and the last gradient on top.
    x = torch.ones(MIB // 4, requires_grad=True)

    def step(calls):
        z = x
        for _ in range(calls):
            z = z.tanh()
        z.sum().backward()

    few, many = (peak_bytes(lambda: step(calls)) for calls in (10, 30))
    assert many - few == pytest.approx(20 * MIB, rel=0.01)


def test_saved_bytes_of_known_cases():
    x = torch.ones(MIB // 4, requires_grad=True)
    assert saved_bytes(lambda: x + 1) == 0
    assert saved_bytes(lambda: x.tanh()) == MIB
    assert saved_bytes(lambda: x.tanh().tanh().tanh()) == 3 * MIB
    assert saved_bytes(lambda: (x.tanh() * x.exp()).sum()) == 2 * MIB  # both factors are saved twice
    with torch.no_grad():
        assert saved_bytes(lambda: x.tanh()) == 0


def test_parameters_are_not_counted_as_saved():
    linear = nn.Linear(64, 256, bias=False)
    x = torch.ones(32, 64)
    assert saved_bytes(lambda: linear(x)) == x.nbytes
    x.requires_grad_()  # now the backward pass needs the weight too, through a transposed view
    assert saved_bytes(lambda: linear(x)) == x.nbytes


def test_saved_bytes_sees_through_checkpointing():
    from torch.utils.checkpoint import checkpoint

    x = torch.ones(MIB // 4, requires_grad=True)

    def deep(z):
        for _ in range(10):
            z = z.tanh()
        return z

    assert saved_bytes(lambda: deep(x)) == 10 * MIB
    assert saved_bytes(lambda: checkpoint(deep, x, use_reentrant=False)) < 2 * MIB


@pytest.mark.cuda
def test_peak_on_cuda():
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA device")
    x = torch.ones(MIB, device="cuda")
    assert peak_bytes(lambda: [x * 2, x * 3], "cuda") == 8 * MIB


def test_plot_refuses_lines_of_another_length():
    pytest.importorskip("matplotlib", reason="needs the extra: implicitly[viz]")
    assert plot_memory([1, 2], {"a": [1.0, 2.0]}, 1.0, "bytes").axes
    with pytest.raises(ValueError, match="'a' must have one value per number of steps; got 1 values for 2"):
        plot_memory([1, 2], {"a": [1.0]}, 1.0, "bytes")
