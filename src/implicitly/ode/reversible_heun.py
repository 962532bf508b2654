"""The reversible Heun method: one call of f a step, and each step can be undone exactly."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from implicitly.host import Array
from implicitly.ode.combine import advanced, as_length, weighted
from implicitly.ode.method import Memory, Method, Step, hermite
from implicitly.ode.problem import Field


@dataclass(frozen=True, kw_only=True)
class ReversibleHeun(Method):
    """The reversible Heun method, of order 2; one call of f a step.

    It carries a second state, at which f is evaluated, and the slope there. The same step with length -dt, from
    the end of a step and the memory there, leads back to its start up to rounding. The error estimate is the
    difference to an embedded method of order 1.

    The difference between the two states is not damped, and where solutions attract each other (dy/dt = -r y) it
    grows like exp(r t), so that constant steps lose accuracy there and adaptive ones become ever shorter. The
    method suits spans of a few 1 / r, and systems that oscillate. (In the plane of dt times eigenvalues it is
    stable on the imaginary axis between -i and i, and nowhere else.)

    Kidger, Foster, Li and Lyons, "Efficient and Accurate Gradients for Neural SDEs", NeurIPS 2021, algorithm 1,
    without noise; arXiv:2105.13493.

    The options are those of `implicitly.ode.method.Method`.
    """

    @property
    def order(self) -> int:
        """The order 2; the error estimate is O(dt^2)."""
        return 2

    @property
    def adaptive(self) -> bool:
        """Whether it estimates its error: yes."""
        return True

    @property
    def sees_end(self) -> bool:
        """Whether the error estimate uses the slope at the end: yes."""
        return True

    @property
    def nodes(self) -> tuple[float, ...]:
        """Only the end of a step."""
        return (1.0,)

    def start(self, F: Field, t: Array, y: Tensor, k: Tensor) -> Memory:
        """The second state and its slope, `(B, n)` each."""
        return (y, k)

    def slope(self, memory: Memory) -> Tensor:
        """The slope `(B, n)` at the state that goes with `memory`."""
        return memory[1]

    def step(self, F: Field, t: Array, dt: Array, y: Tensor, memory: Memory) -> Step:
        """One step from y `(B, n)` at t `(B,)`, of length dt `(B,)`."""
        (other, k), length = memory, as_length(dt)
        other = advanced(2 * y - other, length, (1.0,), (k,))
        k1 = F(F.stages(t, dt, self.nodes)[0], other)
        y1 = advanced(y, length, (0.5, 0.5), (k, k1))
        error = None
        if self.dt is None:
            with torch.no_grad():  # step-size control is not differentiated
                error = weighted(length, (-0.5, 0.5), (k, k1))
        return Step(t, dt, y, y1, (other, k1), k, k1, error)

    def dense_output(self, F: Field, step: Step, part: Tensor) -> Tensor:
        """The states `(B, W, n)` at t + part dt, for `part` `(B, W)`: the dense output.

        Its slopes are those of the second state, which is O(dt^2) away: the cubic through them is O(dt^3) off.
        """
        return hermite(step, part)
