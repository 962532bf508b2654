"""The memory of solvers: kept for the next solve of a thread, and never shared by two."""

from __future__ import annotations

import threading

import pytest
import torch

import implicitly as im
from implicitly import history
from implicitly.history import KEPT, empty_slots, with_room, write
from tests.problems import seeded


def test_the_next_solve_of_a_thread_gets_the_memory_of_the_last():
    like = torch.zeros(4, 1000)
    first, second = empty_slots(like, 5)
    places = {first.data_ptr(), second.data_ptr()}
    del first, second
    assert {x.data_ptr() for x in empty_slots(like, 5)} == places


@pytest.mark.parametrize("view", [lambda x: x, lambda x: x[:, 2], lambda x: x.unbind(1)[3][1:]])
def test_memory_that_is_still_held_is_not_handed_out(view):
    like = torch.zeros(4, 1000, dtype=torch.float64)
    first, second = empty_slots(like, 5)
    held = view(first.fill_(7.0))
    del first, second
    for other in empty_slots(like, 5):
        other.fill_(-1.0)
    assert (held == 7.0).all()


def test_two_solves_at_once_do_not_meet():
    # One solve inside of the other: the inner one writes its history while the outer one is under way.
    def inner(z, x):
        return im.fixed_point(lambda w, z: 0.3 * torch.cos(w + z), torch.zeros_like(z), z).value + 0.2 * x

    x = torch.randn(3, 50, generator=seeded(0), dtype=torch.float64)
    with torch.no_grad():
        z = im.fixed_point(inner, torch.zeros_like(x), x, solver=im.Anderson(rtol=1e-10)).value
        torch.testing.assert_close(inner(z, x), z, rtol=1e-8, atol=1e-8)


def test_threads_have_memory_of_their_own():
    like, places = torch.zeros(4, 1000), []

    def take():
        places.append(empty_slots(like, 5))

    threads = [threading.Thread(target=take) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({x.data_ptr() for pair in places for x in pair}) == 6


def test_no_more_is_kept_than_the_limit(monkeypatch):
    monkeypatch.setattr(history, "KEPT", 1000)
    monkeypatch.setattr(history, "_workspace", history._Workspace())
    empty_slots(torch.zeros(4, 1000), 5)
    assert history._workspace.block.nbytes == 0
    empty_slots(torch.zeros(1, 10), 5)
    assert 0 < history._workspace.block.nbytes <= 1000 < KEPT


def test_room_grows_and_keeps_what_was_written():
    like, slots = torch.zeros(2, 3), history.ROOM + 4
    buffer, _ = empty_slots(like, slots)
    with torch.no_grad():
        for i in range(slots):
            buffer = with_room(buffer, i, slots)
            buffer = write(buffer, i, torch.full_like(like, float(i)))
    assert buffer.shape == (2, slots, 3)
    assert buffer[1, :, 2].tolist() == list(range(slots))
