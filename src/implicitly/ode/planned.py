"""Constant steps through times that the host knows, all planned before the solve.

No step has to be judged then. On an accelerator, the host reads the times before the first step, and checks after
the last one that all is finite; in between it never has to wait.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from implicitly.host import all_now, finite_rows, on_host, remembered
from implicitly.ode.combine import stage_times
from implicitly.ode.control import stands_still
from implicitly.ode.integrate import Integrated, step_length
from implicitly.ode.method import Memory, Method
from implicitly.ode.problem import Field
from implicitly.ode.record import Record, State, Taken
from implicitly.solution import Status
from implicitly.transforms import is_tracked

# The times of this many steps are prepared at once, and NaN or inf is checked for only after each such block: once
# in a state, it stays there.
BLOCK = 16


class Planned(NamedTuple):
    """A step from t, of length dt, that passes the outputs from `first` up to `stop` (exclusive)."""

    t: float
    dt: float
    first: int
    stop: int


class Plan(NamedTuple):
    """N planned steps: start times, signed lengths, and the index of the first output that each does not pass.

    These have the shape `(N,)`; `length` is the length that a next step would have.
    """

    t: np.ndarray
    dt: np.ndarray
    stop: np.ndarray
    length: float

    def steps(self) -> Iterator[Planned]:
        """The steps, one after the other."""
        stop = self.stop.tolist()
        return map(Planned, self.t.tolist(), self.dt.tolist(), [1, *stop[:-1]], stop)

    def stages(self, nodes: tuple[float, ...], like: Tensor) -> Tensor:
        """The times `(N * S, B)` of the stages of all steps, on the device of `like` `(B, n)`."""
        times = stage_times(self.t, self.dt, nodes).T.reshape(-1, 1)
        return torch.from_numpy(times).to(like.device).expand(-1, len(like))

    def taken(self, batch: int, device: torch.device) -> Taken:
        """The steps as accepted by all samples, each field `(N, B)`."""
        t, dt = (torch.from_numpy(x).to(device).unsqueeze(1).expand(-1, batch) for x in (self.t, self.dt))
        last = torch.zeros_like(t, dtype=torch.bool)
        last[-1] = True
        return Taken(t, dt, last, torch.ones_like(last), torch.zeros_like(t, dtype=torch.int8))


@remembered(16)
def plan(times: tuple[float, ...], length: float, limit: int, single: bool) -> Plan | None:
    """Plan steps of `length` through `times`.

    None if the times are invalid, or too far from 0 to resolve such steps, or if it takes more than `limit` steps.
    `single`: in float32, else in float64.
    """
    seen = np.array([times], dtype=np.float32 if single else np.float64)
    sign = np.sign(seen[:, -1:] - seen[:, :1])
    if seen.shape[1] < 2 or not np.isfinite(seen).all() or not (sign * np.diff(seen) > 0).all():
        return None
    t, end, steps, last = seen[:, 0], seen[:, -1], [], False
    if abs(end - t) > (limit + 1) * length or stands_still(t, length, end):
        return None
    while not last and len(steps) <= limit:
        last, dt = step_length(t, np.full_like(t, length), end)
        steps.append((t[0], dt[0]))
        t = t + dt
    if len(steps) > limit:
        return None
    begin, dt = np.array(steps, dtype=seen.dtype).T.copy()
    stop = 1 + np.searchsorted(sign[0] * seen[0, 1:-1], sign[0] * (begin + dt), side="right")
    return Plan(begin, dt, stop, length)


def planned(method: Method, times: Tensor) -> Plan | None:
    """The planned steps of a solve through `times` `(B, T)`; None if they cannot be known in advance.

    Waits for times on an accelerator.
    """
    shared = len(times) == 1 or (len(times) > 1 and times.stride(0) == 0)
    if method.dt is None or method.nodes is None or method.tstops or method.progress is not None:
        return None
    if not shared or is_tracked(times):
        return None
    known = tuple(times[0].tolist())
    return plan(known, min(method.dt, method.dt_max), method.max_steps, times.dtype == torch.float32)


def take(
    method: Method, F: Field, times: Tensor, step: Planned, moments: Iterable[Tensor], y: Tensor, memory: Memory
) -> tuple[Tensor, Memory, tuple[Tensor, ...]]:
    """Take a step that calls f at `moments`.

    Returns the state and the memory after it, and the outputs `(B, W, n)` that it passes, if any, among those at
    `times` `(B, T)` or `(1, T)`.
    """
    found = method.step(F, tuple(moments), step.dt, y, memory)
    if step.first == step.stop:
        return found.y1, found.memory, ()
    part = (times[:, step.first : step.stop] - step.t) / step.dt
    t, dt = (times.new_full((len(y),), x) for x in (step.t, step.dt))
    outputs = method.dense_output(F, found._replace(t=t, dt=dt), part.expand(len(y), -1))
    return found.y1, found.memory, (outputs,)


def integrate_planned(
    plan: Plan, method: Method, F: Field, times: Tensor, y0: Tensor, k0: Tensor, record: Record | None
) -> tuple[Integrated, Tensor] | None:
    """Like `integrate`, by the steps of a `plan`, which are noted in `record`; None if a sample met NaN or inf.

    In that case it is not known which sample did, and when.
    """
    nodes, near, count = method.nodes, on_host(times), len(plan.t)
    assert nodes is not None
    if near and not all_now(finite_rows(k0.detach())):
        return None
    y, memory = y0, method.start(F, times[:, 0], y0, k0)
    outputs, steps, stages = [y0.unsqueeze(1)], plan.steps(), plan.stages(nodes, y0).split(BLOCK * len(nodes))
    for begin, block in zip(range(0, count, BLOCK), stages):
        moments = iter(F.f_times(block))
        for i, step in enumerate(islice(steps, BLOCK), begin):
            if record is not None and record.wants(i):
                record.keep(i, State(y.detach(), tuple(m.detach() for m in memory)))
            y, memory, passed = take(method, F, times, step, islice(moments, len(nodes)), y, memory)
            outputs += passed
        # k0 is checked too: NaN in the slope at the start may not show in the state, if f is finite again later.
        if (near or begin + BLOCK >= count) and not all_now(finite_rows(y.detach(), k0.detach())):
            return None
    if record is not None:
        record.note_all(plan.taken(len(y0), y0.device))
    values = torch.cat([*outputs, y.unsqueeze(1)], dim=1)
    return arrived(values, times[:, -1].expand(len(y0)), Status.CONVERGED, count, plan.length), y


def arrived(values: Tensor, t: Tensor, status: int | Tensor, count: int, length: float) -> Integrated:
    """The result of a solve that reached times `t` `(B,)` in `count` constant steps."""
    none = torch.zeros(t.shape, dtype=torch.int64, device=t.device)
    number = torch.zeros_like(t)
    ended, steps = (none + status, number, none + count, none + count), (t.clone(), number + length)
    return Integrated(values, *ended, *steps, none - 1, none)
