"""Distributed data parallel on two processes gives the gradient of one process with the whole batch."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

import implicitly as im
from tests.problems import Cell, draw

PROCESSES = 2


class Model(torch.nn.Module):
    """Two equilibria of one cell, one on top of the other, and a readout."""

    def __init__(self):
        super().__init__()
        self.cell = Cell()
        self.readout = torch.nn.Linear(3, 2).double()
        torch.nn.init.normal_(self.readout.weight, generator=torch.Generator().manual_seed(0))
        torch.nn.init.zeros_(self.readout.bias)

    def forward(self, x):
        for _ in range(2):
            x = im.fixed_point(self.cell, torch.zeros_like(x), x, solver=im.Anderson(rtol=1e-12)).value
        return self.readout(x)


def loss_of(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).sin().mean()


def batch() -> torch.Tensor:
    return draw(8, 3, seed=71)


def work(rank: int, folder: str) -> None:
    """One process: two steps of gradients on its half of the batch."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=PROCESSES)
    try:
        model = DistributedDataParallel(Model())
        half = batch().chunk(PROCESSES)[rank]
        for scale in (1.0, 0.5):  # the second step finds the buckets of the first rebuilt
            model.zero_grad()
            loss_of(model, scale * half).backward()
        torch.save([p.grad for p in model.parameters()], f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_two_processes_give_the_gradient_of_one(tmp_path):
    mp.spawn(work, args=(str(tmp_path),), nprocs=PROCESSES)
    model = Model()
    loss_of(model, 0.5 * batch()).backward()
    for rank in range(PROCESSES):
        gradients = torch.load(tmp_path / f"{rank}.pt")
        for actual, parameter in zip(gradients, model.parameters()):
            assert parameter.grad is not None
            assert bool(parameter.grad.any())
            torch.testing.assert_close(actual, parameter.grad, rtol=1e-9, atol=1e-12)
