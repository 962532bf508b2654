"""A backward solve of the continuous adjoint, from one output time to the one before, as one graph.

Its loop carries the state of the solve, and the gradients by theta, to which each step adds its integral.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import vjp

from implicitly.host import views
from implicitly.iterate import repeat
from implicitly.ode.augmented import Augmented, Packed, QuadratureNodes, integrated
from implicitly.ode.integrate import Stepper
from implicitly.ode.method import Method, Step
from implicitly.ode.problem import Field
from implicitly.ode.record import Taken
from implicitly.pullback import of_places
from implicitly.solution import Status, is_running


class Arrived(NamedTuple):
    """The result of a backward solve."""

    z: Tensor  # (B, N)
    slope: Tensor  # (B, N) where it began
    status: Tensor  # (B,), like those that follow
    t: Tensor
    tries: Tensor
    length: Tensor  # of a next step
    sums: tuple[Tensor, ...]  # the gradients by theta, of those that are wanted
    calls: Tensor | int  # of f


@dataclass(frozen=True)
class Back:
    """The function that the graph computes.

    Attributes:
        stepper: `stepper(ends, *theta)` returns the stepper of z.
        plain: maps theta to the field of f.
        packed: the layout of y and a in z.
        places: the indices of the theta by which gradients are wanted.
        guessed: whether the length of the first step is given.
    """

    stepper: Callable[..., Stepper]
    plain: Callable[..., Field]
    packed: Packed
    places: tuple[int, ...]
    guessed: bool

    def run(
        self, limit: Tensor, ends: Tensor, z: Tensor, scale: Tensor, length: Tensor, *theta: Tensor
    ) -> Arrived:
        """Solve from `z` `(B, N)`, whose a is in units of `scale` `(B, 1)`, between the times `ends` `(B, 2)`.

        `length` `(B,)` is that of the first step, if it is `guessed`; there are at most `limit` `()` steps.
        """
        stepper = self.stepper(ends, *theta)
        F: Any = stepper.bound.F
        slope = F.at(stepper.begin, z)
        first = tuple(F.pulled[-1]) if self.packed.kept else ()
        calls = torch.zeros((), dtype=torch.int64, device=z.device) + F.calls

        def step(k: int | Tensor, carried: Any) -> Any:
            carry, sums, first, calls = carried
            # Made here, since a loop may change nothing outside of it.
            ends_here, scale_here, *theta_here = views(ends, scale, *theta)
            stepper = self.stepper(ends_here, *theta_here)
            step, taken, _, new = stepper.advance(carry)
            F: Any = stepper.bound.F
            calls = calls + F.calls
            if self.packed.kept:
                parts, first = self.from_slopes(stepper.method, step, taken, scale_here, first, F)
            elif self.places:
                nodes = QuadratureNodes.of(self.packed, stepper, step, taken, scale_here)
                parts, calls = self.integral(nodes, theta_here), calls + len(nodes.states)
            else:
                parts = ()
            return new, tuple(s + p for s, p in zip(sums, parts)), first, calls

        sums = tuple(torch.zeros_like(theta[i]) for i in self.places)
        carried = (stepper.start(z, slope, length if self.guessed else None), sums, first, calls)
        _, (carry, sums, _, calls) = repeat(step, carried, lambda c: is_running(c[0].status).any(), limit)
        assert carry.status is not None
        status = torch.where(is_running(carry.status), int(Status.MAX_STEPS), carry.status)
        return Arrived(carry.y, slope, status, carry.t, carry.tries, carry.length, sums, calls)

    def from_slopes(
        self, method: Method, step: Step, taken: Taken, scale: Tensor, first: tuple[Tensor, ...], F: Augmented
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The integral for one system from the integrand kept at its slopes.

        Also the integrand at the start of the next step, as `first` is that at the start of this one.
        """
        accepted = taken.accepted.reshape(())
        parts = integrated(method, (step.dt * scale).reshape(()), [list(first), *F.pulled])
        return (
            tuple(torch.where(accepted, part, 0.0) for part in parts),
            tuple(torch.where(accepted, last, x) for last, x in zip(F.pulled[-1], first)),
        )

    def integral(self, nodes: QuadratureNodes, theta: list[Tensor]) -> tuple[Tensor, ...]:
        """The integral of a df/dtheta over a step, for those theta by which gradients are wanted."""

        def slopes(*theta: Tensor) -> tuple[Tensor, ...]:
            f = self.plain(*theta)
            return tuple(f(m, y) for m, y in zip(nodes.moments, nodes.states))

        chosen = of_places(slopes, theta, list(self.places))  # pyright: ignore[reportArgumentType]
        return vjp(chosen, *(theta[i] for i in self.places))[1](nodes.bars)
