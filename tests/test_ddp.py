"""Distributed data parallel on two processes gives the gradient of one process with the whole batch."""

from __future__ import annotations

import gc

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

import implicitly as im
from tests.problems import Cell, draw

PROCESSES = 2


def readout() -> torch.nn.Linear:
    linear = torch.nn.Linear(3, 2).double()
    torch.nn.init.normal_(linear.weight, generator=torch.Generator().manual_seed(0))
    torch.nn.init.zeros_(linear.bias)
    return linear


class Equilibria(torch.nn.Module):
    """Two equilibria of one cell, one on top of the other, and a readout."""

    def __init__(self):
        super().__init__()
        self.cell = Cell()
        self.readout = readout()

    def forward(self, x):
        for _ in range(2):
            x = im.fixed_point(self.cell, torch.zeros_like(x), x, solver=im.Anderson(rtol=1e-12)).value
        return self.readout(x)


class Flow(torch.nn.Module):
    """A vector field, whose parameters an equilibrium has, too."""

    def __init__(self):
        super().__init__()
        self.cell = Cell()

    def forward(self, t, y):
        return self.cell(y, torch.cos(t) + 0 * y)


class Trajectories(torch.nn.Module):
    """Two flows of one field, one after the other, and a readout."""

    def __init__(self, adjoint=im.RecursiveCheckpointAdjoint()):
        super().__init__()
        solver = im.Dopri5(rtol=1e-11, atol=1e-13)
        self.flow = im.nn.NeuralODE(Flow(), solver=solver, adjoint=adjoint, batch_dims=1)
        self.readout = readout()

    def forward(self, x):
        return self.readout(self.flow(self.flow(x)))


class Regularised(torch.nn.Module):
    """A flow whose parameters reach the loss by the energy of the motion, too."""

    def __init__(self):
        super().__init__()
        self.flow = im.nn.NeuralODE(Flow(), regularisers=[im.nn.KineticEnergy()], solver=im.RK4(dt=0.1))
        self.readout = readout()

    def forward(self, x):
        value, (energy,) = self.flow(x)
        return torch.cat([self.readout(value), energy.unsqueeze(1)], dim=1)


MODELS = {
    "fixed_point": Equilibria,
    "odeint": Trajectories,
    "odeint-Backsolve": lambda: Trajectories(im.BacksolveAdjoint()),
    "odeint-Unrolled": lambda: Trajectories(im.UnrolledAdjoint()),
    "odeint-regularised": Regularised,
}


def loss_of(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).sin().mean()


def batch() -> torch.Tensor:
    return draw(8, 3, seed=71)


def work(rank: int, folder: str) -> None:
    """One process: two steps of gradients of every model on its half of the batch."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=PROCESSES)
    try:
        for name, make in MODELS.items():
            model = DistributedDataParallel(make())
            half = batch().chunk(PROCESSES)[rank]
            for scale in (1.0, 0.5):  # the second step finds the buckets of the first rebuilt
                model.zero_grad()
                loss_of(model, scale * half).backward()
            torch.save([p.grad for p in model.parameters()], f"{folder}/{name}-{rank}.pt")
            # What still knows the group when it is destroyed would wait for its threads, and they for Python.
            del model
            gc.collect()
        dist.barrier()  # nor is one of the processes to end while the other still talks to it
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where both processes left their gradients."""
    path = tmp_path_factory.mktemp("ddp")
    mp.spawn(work, args=(str(path),), nprocs=PROCESSES)
    return path


@pytest.mark.parametrize("name", MODELS)
def test_two_processes_give_the_gradient_of_one(folder, name):
    model = MODELS[name]()
    loss_of(model, 0.5 * batch()).backward()
    for rank in range(PROCESSES):
        gradients = torch.load(folder / f"{name}-{rank}.pt")
        for actual, parameter in zip(gradients, model.parameters()):
            assert parameter.grad is not None
            assert bool(parameter.grad.any())
            torch.testing.assert_close(actual, parameter.grad, rtol=1e-8, atol=1e-12)
