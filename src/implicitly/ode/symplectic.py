"""Symplectic methods for separable Hamiltonian systems: alternating kicks and drifts."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import ClassVar

import torch
from torch import Tensor

from implicitly.host import Array, maybe_any
from implicitly.ode.combine import advanced, as_length, stage_times
from implicitly.ode.method import Memory, Method, Step, hermite
from implicitly.ode.problem import Field, Problem
from implicitly.transforms import unwrapped


@dataclass(frozen=True)
class Splitting:
    """The coefficients of a symmetric composition of kicks (of p, by a force) and drifts (of q, by a velocity).

    A step is kick, drift, kick, ..., kick, of the lengths `kicks[0] dt`, `drifts[0] dt`, `kicks[1] dt`, ...
    If the velocity or the force also depends on time, a kick uses the time that the drifts before it reached, and
    a drift that of the kicks: this treats time as one more variable in each half, so the order is preserved.

    Args:
        order: order p of the method.
        kicks: `(s + 1,)`, of sum 1.
        drifts: `(s,)`, of sum 1.
    """

    order: int
    kicks: tuple[float, ...]
    drifts: tuple[float, ...]

    @property
    def call_nodes(self) -> tuple[float, ...]:
        """The nodes at which a step calls f: for a drift, for the kick after it, and so on."""
        drifts, kicks = tuple(accumulate(self.kicks)), tuple(accumulate(self.drifts))
        pairs = zip(drifts, (*kicks[:-1], 1.0))
        return tuple(node for pair in pairs for node in pair)


def _symmetric(order: int, kicks: tuple[float, ...], drifts: tuple[float, ...], odd: str) -> Splitting:
    """From the first halves; the sequence with a coefficient in the middle, "kicks" or "drifts", gets that too."""
    middle = (1 - 2 * sum(kicks if odd == "kicks" else drifts),)
    whole = {"kicks": kicks + kicks[::-1], "drifts": drifts + drifts[::-1]}
    half = {"kicks": kicks, "drifts": drifts}[odd]
    whole[odd] = half + middle + half[::-1]
    return Splitting(order, **whole)


LEAPFROG = Splitting(2, (0.5, 0.5), (1.0,))
_W = 1 / (2 - 2 ** (1 / 3))
YOSHIDA4 = _symmetric(4, (_W / 2, (1 - _W) / 2), (_W,), "drifts")
BLANES_MOAN4 = _symmetric(
    4,
    (0.0792036964311957, 0.353172906049774, -0.0420650803577195),
    (0.209515106613362, -0.143851773179818, 0.434336666566456),
    "kicks",
)


@dataclass(frozen=True, kw_only=True)
class Symplectic(Method):
    """Base class of symplectic splitting methods with constant steps; the memory is the force at the state.

    The state is a pair (q, p) of tensors of equal shape, and f(t, (q, p)) returns (dq/dt, dp/dt): dq/dt may depend
    on p (and t) only, dp/dt on q (and t) only, as for a Hamiltonian T(p) + V(q). A step calls f twice for each
    drift. A step that passes output times calls it twice more, for the slopes at its ends: the outputs are
    interpolated by the cubic through them.

    `odeint` raises TypeError / ValueError if the state is not such a pair or if, at the start, one half of the
    field changes with what it must not depend on (two calls of f check that).
    """

    splitting: ClassVar[Splitting]

    @property
    def order(self) -> int:
        """The order p of the method."""
        return self.splitting.order

    @property
    def adaptive(self) -> bool:
        """False: with steps of varying length the method would lose its long-time conservation."""
        return False

    @property
    def output_calls(self) -> int:
        """Two calls, one for each end of the step."""
        return 2

    @property
    def splits(self) -> bool:
        """True: the state is always a pair (q, p)."""
        return True

    @property
    def nodes(self) -> tuple[float, ...]:
        """The nodes of drifts and kicks in turn."""
        return self.splitting.call_nodes

    def checked(self, problem: Problem) -> Problem:
        """Check that the `problem` is separable."""
        name, layout = type(self).__name__, problem.layout
        kind, count = layout.spec.type, len(layout.leaves)
        if kind not in (tuple, list, namedtuple) or layout.spec.num_children != 2 or count != 2:
            held = f"a {getattr(kind, '__name__', 'tensor')} of {count} tensors" if kind else "a tensor"
            raise TypeError(
                f"{name}: the state must be a pair (q, p) of tensors, got {held}; pass y0 = (q, p), and let f "
                "return (dq/dt, dp/dt)"
            )
        q, p = (leaf.shape for leaf in layout.leaves)
        if q != p or layout.leaves[0].width != layout.leaves[1].width:
            raise ValueError(f"{name}: q and p must have the same shape and dtype, got {q} and {p} in a sample")
        problem = problem.evaluated
        if problem.y0.shape[1] == 0:  # states without entries
            return problem
        _refuse_coupled(name, problem)
        return replace(problem, calls=problem.calls + 2)

    def start(self, F: Field, t: Array, y: Tensor, k: Tensor) -> Memory:
        """The force `(B, n / 2)`."""
        return (halves(k)[1],)

    def step(self, F: Field, t: Array, dt: Array, y: Tensor, memory: Memory) -> Step:
        """One step from y `(B, n)` at t `(B,)`, of length dt `(B,)`."""
        (q, p), (force,), length = halves(y), memory, as_length(dt)
        kicks, drifts = self.splitting.kicks, self.splitting.drifts
        moments = iter(F.stages(t, dt, self.nodes))
        p, k = advanced(p, length, kicks[:1], (force,)), None
        for drift, kick in zip(drifts, kicks[1:]):
            velocity, _ = halves(F(next(moments), torch.cat([q, p], dim=1)))
            q = advanced(q, length, (drift,), (velocity,))
            k = F(next(moments), torch.cat([q, p], dim=1))
            force = halves(k)[1]
            p = advanced(p, length, (kick,), (force,))
        assert k is not None
        # The slopes at the ends are needed by `dense_output` only; a step does without them.
        return Step(t, dt, y, torch.cat([q, p], dim=1), (force,), k, k, None)

    def dense_output(self, F: Field, step: Step, part: Tensor) -> Tensor:
        """The states `(B, W, n)` at t + part dt, for `part` `(B, W)`: the dense output."""
        begin, end = F.f_times(stage_times(step.t, step.dt, (0.0, 1.0)))
        return hermite(step._replace(k=F(begin, step.y), k1=F(end, step.y1)), part)


def halves(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The columns `(B, n / 2)` of q and of p."""
    q, p = rows.chunk(2, dim=1)
    return q, p


def _refuse_coupled(name: str, problem: Problem) -> None:
    """Raise ValueError if, at the start, dq/dt changes with q or dp/dt with p.

    A field that is not separable would be solved with order 1 at best, and nothing would reveal it.
    """
    with torch.no_grad():
        assert problem.k0 is not None
        F, y, k = problem.field(*problem.theta), problem.y0.detach(), problem.k0.detach()
        (moment,) = F.f_times(problem.rows(problem.times)[:, 0].detach()[None])
        (q, p), (velocity, force) = halves(y), halves(k)
        for half, before, moved, place in (
            ("dq/dt", velocity, torch.cat([_elsewhere(q), p], dim=1), 0),
            ("dp/dt", force, torch.cat([q, _elsewhere(p)], dim=1), 1),
        ):
            change = (halves(F(moment, moved))[place] - before).abs()
            # If f is undefined at the start or next to it, this cannot be checked.
            rounding = 100 * torch.finfo(problem.dtype).eps * before.abs().amax(1, keepdim=True).clamp(min=1e-30)
            wrong = (change > rounding) & change.isfinite()
            if maybe_any(wrong) and bool(unwrapped(wrong).any()):
                raise ValueError(
                    f"{name} needs a separable field: dq/dt must depend only on p and t, and dp/dt only on q and "
                    f"t, but {half} changed by {float(unwrapped(change.nan_to_num(0, 0, 0)).max()):.3g} when "
                    f"{half[1]} did. Use a method for general fields, such as im.Dopri5()"
                )


def _elsewhere(x: Tensor) -> Tensor:
    """`x` `(B, m)` moved by about a tenth of its size, by a different fraction in each column."""
    size = x.square().mean(1, keepdim=True).sqrt()
    bend = torch.arange(x.shape[1], dtype=x.dtype, device=x.device).add(0.5).cos()
    return x + 0.1 * torch.where(size > 0, size, 1.0) * bend


@dataclass(frozen=True, kw_only=True)
class Leapfrog(Symplectic):
    """The leapfrog of Störmer and Verlet (kick, drift, kick), of order 2; constant steps.

    For separable Hamiltonians: see `Symplectic` for what the state and f must be. Two calls of f a step.
    Verlet, "Computer 'Experiments' on Classical Fluids", Phys. Rev. 159 (1967), equation 4.
    The options are those of `implicitly.ode.method.Method`.
    """

    splitting: ClassVar[Splitting] = LEAPFROG


@dataclass(frozen=True, kw_only=True)
class Yoshida4(Symplectic):
    """Three leapfrogs, the middle one backwards, of order 4; constant steps.

    For separable Hamiltonians: see `Symplectic` for what the state and f must be. Six calls of f a step.
    Yoshida, "Construction of higher order symplectic integrators", Phys. Lett. A 150 (1990), equation 2.11.
    The options are those of `implicitly.ode.method.Method`.
    """

    splitting: ClassVar[Splitting] = YOSHIDA4


@dataclass(frozen=True, kw_only=True)
class BlanesMoan4(Symplectic):
    """Six drifts between seven kicks, of order 4 with a small error constant; constant steps.

    For separable Hamiltonians: see `Symplectic` for what the state and f must be. Twelve calls of f a step, which
    may be several times as long as those of `Yoshida4` at equal error. Blanes and Moan, "Practical symplectic
    partitioned Runge-Kutta and Runge-Kutta-Nyström methods", J. Comput. Appl. Math. 142 (2002), table 2 (S6).
    The options are those of `implicitly.ode.method.Method`.
    """

    splitting: ClassVar[Splitting] = BLANES_MOAN4
