"""Several threads that solve with one module."""

import threading
import time

import pytest
import torch
from torch import nn

import implicitly as im
from implicitly import exchange


class Slow(nn.Module):
    """Gives other threads the time to come in between."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3, dtype=torch.float64)

    def forward(self, z, x):
        weight = self.linear.weight
        time.sleep(0.001)
        return 0.3 * torch.tanh(z @ weight.mT + self.linear.bias) + x


def run(work, count=4):
    """What `work` raised in so many threads."""
    raised = []

    def guarded():
        try:
            work()
        except Exception as error:
            raised.append(error)

    threads = [threading.Thread(target=guarded) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


@pytest.mark.parametrize("adjoint", [im.ImplicitAdjoint(), im.UnrolledAdjoint()], ids=["implicit", "unrolled"])
def test_threads_that_train_one_module_get_their_own_gradients_and_leave_it_as_it_was(adjoint):
    cell, x = Slow(), torch.randn(2, 3, dtype=torch.float64)
    own, solver = list(cell.parameters()), im.FixedPointIteration(rtol=1e-6)

    def gradients():
        value = im.fixed_point(cell, torch.zeros_like(x), x, solver=solver, adjoint=adjoint).value
        return torch.autograd.grad(value.square().sum(), own)

    expected, found = gradients(), []
    assert run(lambda: found.extend(gradients() for _ in range(2))) == []
    for some in found:
        torch.testing.assert_close(some, expected)
    assert all(a is b for a, b in zip(cell.parameters(), own))


def test_who_waits_too_long_for_another_thread_is_told(monkeypatch):
    monkeypatch.setattr(exchange, "PATIENCE", 0.01)
    held, entered, leave = {"weight": torch.ones(1)}, threading.Event(), threading.Event()

    def keep():
        with exchange.exchanged([((held, "weight"), torch.zeros(1))]):
            entered.set()
            leave.wait()

    with exchange.claimed([held]):
        pass
    thread = threading.Thread(target=keep)
    idle = threading.Thread(target=leave.wait)  # one more, as a thread alone looks for no other
    idle.start(), thread.start()
    try:
        entered.wait()
        with pytest.raises(RuntimeError, match=r"another thread .*copy\.deepcopy"), exchange.claimed([held]):
            pass
    finally:
        leave.set()
        thread.join(), idle.join()
    assert float(held["weight"]) == 1
    assert exchange._owners == {}
