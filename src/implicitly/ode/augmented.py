"""The system that the continuous adjoint solves backwards: a state y and its cotangent a as one state z."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from implicitly.host import gauss, library, maybe_any, to_tensor
from implicitly.iterate import where_rows
from implicitly.ode.combine import nonzero, stage_times
from implicitly.ode.control import rms_norm
from implicitly.ode.integrate import Stepper
from implicitly.ode.method import Method, Step
from implicitly.ode.problem import Field
from implicitly.ode.record import Taken
from implicitly.pullback import of_places, pullback, pulled
from implicitly.transforms import is_plain
from implicitly.tree import real_parts


@dataclass(frozen=True)
class Packed:
    """The layout of y and a, both `(B, n)`, in the state z of a method.

    Attributes:
        batch, n: the shape of y.
        columns: None: a row of z has the y and the a of one sample, `(B, 2n)`. Otherwise z is one row
            `(1, 2 B n + P)`: all of y, all of a, and P = `columns` further numbers, the gradients by theta; then a
            0 if P is odd.
        pairs: whether z is a pair, as y = (q, p) is. With a = (u, v), q' depends on p, u' = -v dp'/dq on v and q,
            p' on q, v' = -u dq'/dp on u and p: so the pair is ((q, v), (p, u)).
        kept: for how many of the latest slopes of z the gradients by theta are kept; no column holds them then.
        weights: if they are kept, the weights of the slopes in the integral over a step, beginning at its start.
    """

    batch: int
    n: int
    columns: int | None = None
    pairs: bool = False
    kept: int = 0
    weights: tuple[float, ...] = ()

    def pack(self, y: Tensor, a: Tensor, others: Sequence[Tensor] = ()) -> Tensor:
        """z, or its slope."""
        if self.pairs:
            (q, p), (u, v) = y.chunk(2, dim=1), a.chunk(2, dim=1)
            return torch.cat([q, v, p, u], dim=1)
        if self.columns is None:
            return torch.cat([y, a], dim=1)
        # With rows of odd length, cotangents of complex slopes would begin at addresses where none can.
        even = [a.new_zeros(self.columns % 2)]
        return torch.cat([real_parts(x).flatten() for x in (y, a, *others, *even)]).unsqueeze(0)

    def split(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """y, a, and the further columns (None if there are none)."""
        if self.pairs:
            q, v, p, u = z.chunk(4, dim=1)
            return torch.cat([q, p], dim=1), torch.cat([u, v], dim=1), None
        if self.columns is None:
            y, a = z.chunk(2, dim=1)
            return y, a, None
        size = self.batch * self.n
        y, a, others = z[:, :size], z[:, size : 2 * size], z[:, 2 * size : 2 * size + self.columns]
        return y.reshape(-1, self.n), a.reshape(-1, self.n), others

    def method(self, method: Method, **options: Any) -> Method:
        """`method` for z, with other `options`; its norm and tolerances for y apply to both y and a."""

        def norm(rows: Tensor) -> Tensor:
            y, a, others = self.split(rows)
            larger = torch.maximum(method.norm(y), method.norm(a))
            return larger if others is None else torch.maximum(larger.amax(), rms_norm(others))

        tolerances = {"rtol": self._spread(method.rtol), "atol": self._spread(method.atol)}
        return replace(method, norm=norm, **tolerances, **options)

    def _spread(self, tolerance: float | Tensor) -> float | Tensor:
        if not isinstance(tolerance, Tensor) or tolerance.ndim == 0:
            return tolerance
        one = tolerance.reshape(-1).expand(self.n)
        if self.pairs:
            return self.pack(one[None], one[None])[0]
        rows = 1 if self.columns is None else self.batch
        columns = self.columns or 0
        return torch.cat([one.repeat(2 * rows), one.amin().expand(columns + columns % 2)])


@dataclass
class Augmented(Field):
    """The vector field of z.

    Attributes:
        base: the field of f itself.
        pulled: the cotangents of the wanted theta for the latest slopes, as many as `Packed.kept` says; none for a
            slope with weight 0.
        packed: the layout of z.

    The third argument of its `slope` says whether the result has a nonzero weight.
    """

    base: Field = field(kw_only=True)
    pulled: deque[list[Tensor]] = field(kw_only=True)
    packed: Packed = field(kw_only=True)

    def __call__(self, moment: Tensor, y: Tensor) -> Tensor:
        """The slopes at a moment."""
        self.calls += 1
        return self.slope(moment, y, self.weighs())

    def weighs(self) -> bool:
        """Whether the slope evaluated now has a nonzero weight in the integral by theta."""
        call, weights = self.calls - self.before, self.packed.weights
        if torch.compiler.is_dynamo_compiling():  # the compiler removes unused results by itself
            return True
        if self.last is None or not 0 < call <= self.packed.kept:  # of no step
            return True
        if call < len(weights) and weights[call]:
            return True
        return call == self.packed.kept and not bool(self.last.all())  # that at the end begins the next step


def augmented(
    plain: Callable[..., Field], packed: Packed, wanted: Sequence[int], finished: Tensor | None, *theta: Tensor
) -> Augmented:
    """The field of z for f = `plain(*theta)`, with gradients with respect to `theta[i]` for i in `wanted`.

    `finished` `(B,)` says which samples count if y and a of all samples are one row; None: all do.
    """
    traced = torch.compiler.is_dynamo_compiling()
    if not traced:
        for i in wanted:
            theta[i].requires_grad_()
    base, joint = plain(*theta), packed.columns is not None
    places = list(wanted) if joint or packed.kept else []
    latest: deque[list[Tensor]] = deque(maxlen=packed.kept)
    failed = None if not joint or finished is None or bool(finished.all()) else ~finished

    def show(times: Tensor) -> Sequence[Tensor]:
        return base.show(times.expand(-1, packed.batch) if joint else times)

    def slope(moment: Tensor, z: Tensor, weighs: bool) -> Tensor:
        y, a, _ = packed.split(z)
        if is_plain(z) and not traced:
            y = y.detach().requires_grad_()
            with torch.enable_grad():
                k = base(moment, y)
            sought = places if weighs else []
            da, *others = pulled([k], [-a], [y, *(theta[i] for i in sought)])
            k = k.detach()
        else:  # an implicit method needs the derivative of this, and in a graph there is no other way
            of_chosen = of_places(lambda y, *th: plain(*th)(moment, y), (y, *theta), [0, *(i + 1 for i in places)])
            k, pull = pullback(of_chosen, y, *(theta[i] for i in places))
            da, *others = pull(-a)
        if failed is not None:
            k, da = (torch.where(failed.unsqueeze(1), 0.0, x) for x in (k, da))
        latest.append(others)
        return packed.pack(k, da, others)

    bind = partial(augmented, plain, packed, wanted, finished)
    return Augmented(show, slope, bind, theta, base=base, pulled=latest, packed=packed)


def integrated(method: Method, length: Tensor, found: Sequence[list[Tensor]]) -> list[Tensor]:
    """The integral of a df/dtheta over a step of `length` `()`, by the weights of the method.

    `found` has the integrand at each slope: the one at the start of the step, and those of its calls.
    """
    assert method.weights is not None
    each: Any = torch  # whose functions of lists are public in all but their names
    (first, weight), *others = nonzero(method.weights)
    total = each._foreach_mul(found[first], weight)
    for i, weight in others:
        total = each._foreach_add(total, found[i], alpha=weight)
    return each._foreach_mul(total, length)


class QuadratureNodes(NamedTuple):
    """The nodes of Gauss' rule for the integral of a df/dtheta over a step.

    At S moments and states y `(B, n)`, pulling the cotangents `bars` `(B, n)` of the slopes back to theta, and
    adding up, gives the integral.
    """

    moments: Sequence[Tensor]
    states: tuple[Tensor, ...]
    bars: tuple[Tensor, ...]

    @classmethod
    def of(cls, packed: Packed, stepper: Stepper, step: Step, taken: Taken, scale: Tensor) -> QuadratureNodes:
        """The nodes of a step of z, with a in units of `scale`; bars are 0 for samples that did not accept it."""
        F, method, xp = stepper.bound.F, stepper.method, library(taken.dt)
        nodes, weights = gauss((method.order + 1) // 2)  # the shortest rule that has at least this order
        states = method.dense_output_at(F, step, nodes)
        if maybe_any(~taken.accepted):  # a rejected step may end anywhere, and 0 times its derivative must be 0
            states = [where_rows(to_tensor(taken.accepted), z, step.y) for z in states]
        length = -to_tensor(xp.where(taken.accepted, taken.dt, 0.0)).unsqueeze(1) * scale
        pairs = [packed.split(z)[:2] for z in states]
        moments = F.f_times(stage_times(taken.t, taken.dt, nodes))
        return cls(
            moments, tuple(y for y, _ in pairs), tuple(a * (length * w) for (_, a), w in zip(pairs, weights))
        )
