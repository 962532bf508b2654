"""Peers, called as their documentation says, with the settings that make the comparison fair."""

from __future__ import annotations

import importlib.metadata
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its docstrings contain invalid escapes
    import torchdeq

TORCHDEQ = f"torchdeq {importlib.metadata.version('torchdeq')}"


class TorchDEQ:
    """A fixed point by torchdeq, with its exact gradient (`ift=True`; its default is a phantom gradient).

    The tolerance is relative (`stop_mode="rel"`; its default is absolute): |f(z) - z| / |f(z)| of the worst
    sample. Ours asks the same of every sample. The backward solver is that of the forward solve, as in its
    examples; its Anderson keeps 6 iterates, its Broyden `max_steps` updates.

    Args:
        solver: "anderson" or "broyden".
        rtol, max_steps: for the forward and the backward solve; `rtol=0` takes all the steps.
    """

    def __init__(self, solver: str, rtol: float, max_steps: int):
        self.solver, self.rtol = solver, rtol
        self.deq = torchdeq.get_deq(
            core="sliced",
            ift=True,
            f_solver=solver,
            b_solver=solver,
            f_tol=rtol,
            b_tol=rtol,
            f_stop_mode="rel",
            b_stop_mode="rel",
            f_max_iter=max_steps,
            b_max_iter=max_steps,
        )

    def __call__(self, f: Callable[[Tensor], Tensor], z0: Tensor) -> Tensor:
        """The solution, like z0; differentiable if gradients are being recorded."""
        self.deq.train(torch.is_grad_enabled())  # in evaluation mode it only solves
        solutions, info = self.deq(f, z0)
        worst = float(info["rel_lowest"].max())
        if self.rtol > 0 and not worst < self.rtol:
            raise RuntimeError(f"torchdeq's {self.solver} did not converge: |f(z) - z| / |f(z)| = {worst:.3g}")
        return solutions[0]
