"""Where in a step an event happens: signs of g along the dense output, and the root of the first change.

Per-sample numbers that only drive decisions are host arrays; everything else here is tensors, outside autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from implicitly.host import Array, filled, library, to_host, to_tensor
from implicitly.implicit import push
from implicitly.ode.events import Event
from implicitly.ode.method import Method, Step
from implicitly.ode.problem import Field
from implicitly.pullback import recorded
from implicitly.transforms import is_plain, unwrapped

# The signs of g are checked at this many equal parts of a step.
PARTS = 6
# Numbers below this many rounding errors of g's size along a step count as 0 where a step starts at an event.
ROUNDING = 32
# Root finding on the dense output, which true steps then correct: evaluations of g, and the relative width of the
# bracket, or size of g, at which it ends.
LIMIT, NARROW, SMALL = 200, 1e-6, 1e-10
# At most this many steps are taken again to move an event from where the dense output has it to where the true
# step has it. The first is a Newton step, the others are secant steps; the limit ends a search that does not
# converge.
CORRECTIONS = 10

Map = Callable[[Tensor], Tensor]


class Watch(NamedTuple):
    """What is known of E events."""

    value: Array  # (B, E) g
    sign: Array  # (B, E) of g, the last one that was not 0
    fresh: Array  # (B, E) bool: at the start or after a restart, where g may leave 0 in either direction
    event: Array  # (B,) int, the event that happened last; -1: none
    event_count: Array  # (B,) int, events so far
    stuck: Array  # (B,) int, events since time last advanced


class Scan(NamedTuple):
    """g along a step: values `(B, P + 1, E)` at its start and P further points, the last of which is its end."""

    numbers: Array
    sign: Array  # (B, E) just after the start
    slope: Array  # (B, E) of g there, over the whole step, where `leaving`; else 0
    leaving: Array  # (B, E) the start is a 0 that does not count
    hit: Array  # (B, E) int, the point at or before which the event first happens; 0: it does not
    sick: Array  # (B,) g is NaN or inf before anything happens

    def sign_before(self, part: Array) -> Array:
        """The sign `(B, E)` of g, the last one that was not 0, before `part` `(B,)` of the step."""
        xp, sign = library(self.sign), self.sign
        for j in range(1, PARTS + 1):
            now = xp.sign(self.numbers[:, j])
            sign = xp.where((now != 0) & (j < PARTS * part)[:, None], now, sign)
        return sign


def values(F: Field, t: Tensor, y: Tensor, count: int) -> Tensor:
    """g of `count` events `(B, E)` at times `(B,)`."""
    assert F.watch is not None
    return torch.stack([F.watch(i, t, y) for i in range(count)], dim=1)


def any_now(mask: Array) -> bool:
    """Whether any entry is true; waits for an accelerator, as taking every step again would cost more."""
    return bool(unwrapped(mask).any()) if isinstance(mask, Tensor) else bool(mask.any())


def scan(method: Method, F: Field, step: Step, watch: Watch, events: Sequence[Event]) -> Scan:
    """Evaluate g along a step, and find which events happen."""
    t, dt = to_tensor(step.t), to_tensor(step.dt)
    part = torch.arange(1, PARTS, dtype=dt.dtype, device=dt.device) / PARTS
    inside = method.dense_output(F, step, part.expand(len(dt), -1)).unbind(1)
    times = [*(t + p * dt for p in part), t + dt]
    seen = torch.stack([values(F, s, y, len(events)) for s, y in zip(times, (*inside, step.y1))], dim=1)
    later = to_host(seen)
    xp = library(later)
    numbers = xp.concatenate((watch.value[:, None], later), 1)
    sign, slope, leaving = watch.sign, xp.zeros_like(watch.value), watch.fresh & False
    if any_now(watch.fresh):
        largest = abs(later).max(1) if xp is not torch else later.abs().amax(1)
        tiny = ROUNDING * torch.finfo(dt.dtype).eps * largest
        leaving = watch.fresh & ~(abs(watch.value) > tiny)
        slope = xp.where(leaving, to_host(slopes_of(F, t, dt, step.y, step.k, len(events))), slope)
        sign = xp.where(leaving, xp.sign(slope), sign)
    after = sign
    hit = filled(sign, 0, "int64")
    wanted = [e.direction for e in events]
    direction = xp.asarray(wanted, dtype=sign.dtype) if xp is not torch else sign.new_tensor(wanted)
    sick = filled(hit[:, 0], 0, "bool")
    for j in range(1, PARTS + 1):
        number = numbers[:, j]
        sick = sick | (~xp.isfinite(number) & ~(hit > 0).any(1)[:, None]).any(1)
        now = xp.sign(number)
        crossed = (sign != 0) & (sign * now <= 0) & (direction * sign <= 0) & (hit == 0)
        hit = xp.where(crossed, j, hit)
        sign = xp.where(now == 0, sign, now)
    return Scan(numbers, after, slope, leaving, hit, sick)


def slopes_of(F: Field, t: Tensor, dt: Tensor, y: Tensor, k: Tensor, count: int) -> Tensor:
    """dg/dt times dt `(B, E)`, along a trajectory with slope `k` `(B, n)`."""
    assert F.watch is not None
    watch, tangents = F.watch, (dt.detach(), (dt.unsqueeze(1) * k).detach())
    primals = (t.detach(), y.detach())
    each = []
    for i in range(count):
        g = partial(watch, i)
        if is_plain(*primals) and not torch.is_inference_mode_enabled():
            by_time, by_state = recorded(g, primals, [0, 1])(torch.ones_like(t), [0, 1])
            each.append(by_time * tangents[0] + (by_state * tangents[1]).sum(1))
        else:
            each.append(push(g, primals, tangents))
    return torch.stack(each, dim=1)


def first_root(method: Method, F: Field, step: Step, found: Scan) -> tuple[Tensor, Tensor]:
    """The index `(B,)` of the first event in a step (-1: none), and its relative position `(B,)` from 0 to 1."""
    t, dt = to_tensor(step.t), to_tensor(step.dt)
    where, first = torch.ones_like(dt), torch.full_like(dt, -1, dtype=torch.int64)
    hit = to_tensor(found.hit)
    assert F.watch is not None
    for i in range(hit.shape[1]):
        hits = hit[:, i] > 0
        if not any_now(hits):
            continue
        numbers, leaving = to_tensor(found.numbers)[:, :, i], to_tensor(found.leaving)[:, i]
        start, slope = numbers[:, 0], to_tensor(found.slope)[:, i]

        def deflated(g: Tensor, x: Tensor, start: Tensor = start, leaving: Tensor = leaving) -> Tensor:
            # The root at the start has been dealt with, so it is divided out.
            return torch.where(leaving, (g - start) / torch.where(x == 0, 1.0, x), g)

        def at(x: Tensor, i: int = i, deflated: Callable[..., Tensor] = deflated) -> Tensor:
            assert F.watch is not None
            return deflated(F.watch(i, t + x * dt, method.dense_output(F, step, x.unsqueeze(1))[:, 0]), x)

        right = hit[:, i].clamp(min=1)
        places = (right - 1, right)
        a, b = (place.to(dt.dtype) / PARTS for place in places)
        ga, gb = (deflated(numbers.gather(1, j.unsqueeze(1))[:, 0], x) for j, x in zip(places, (a, b)))
        ga = torch.where(leaving & (a == 0), slope, ga)
        # If another event stopped the sample just before this one, this one happens at the start of the step.
        passed = (a == 0) & (to_tensor(found.sign)[:, i] * ga <= 0)
        root = torch.where(passed, 0.0, root_between(at, a, b, ga, gb, hits & ~passed))
        sooner = hits & ((first < 0) | (root < where))
        where, first = torch.where(sooner, root, where), torch.where(sooner, i, first)
    return first, where


def root_between(f: Map, a: Tensor, b: Tensor, fa: Tensor, fb: Tensor, active: Tensor) -> Tensor:
    """A root `(B,)` of f between a and b, where f has different signs, for the `active` samples; b for others.

    The Illinois variant of regula falsi, with a bisection every third time: Dowell and Jarratt, BIT 11 (1971).
    """
    a, b = torch.where(active, a, b), b
    going = active & (fb != 0)
    a = torch.where(going, a, b)
    side, small = torch.zeros_like(a), SMALL * (fb - fa).abs()
    for i in range(LIMIT):
        if not any_now(going):
            break
        x = b - fb * (b - a) / torch.where(fb == fa, 1.0, fb - fa)
        within = (x > a) & (x < b)
        x = torch.where(within & (i % 3 != 2), x, (a + b) / 2)
        x = torch.where(going, x, b)
        fx = f(x)
        right = going & (fx * fb > 0)
        left = going & ~right
        # The value at an end point that stays for a second time is halved.
        fa = torch.where(right & (side > 0), fa / 2, fa)
        fb = torch.where(left & (side < 0), fb / 2, fb)
        a, fa = torch.where(left, x, a), torch.where(left, fx, fa)
        b, fb = torch.where(right, x, b), torch.where(right, fx, fb)
        exact = going & (fx.abs() <= small)
        a, b = torch.where(exact, x, a), torch.where(exact, x, b)
        side = torch.where(right, 1.0, -1.0)
        going = going & ((b - a) > NARROW * b)
    return b


def correct(
    retake: Callable[[Tensor], tuple[Tensor, Tensor]],
    F: Field,
    first: Tensor,
    t: Tensor,
    dt: Tensor,
    length: Tensor,
    resolved: Tensor,
) -> Tensor:
    """The length `(B,)` of the true step that ends where g of event `first` (-1: none) is 0, from `length`.

    Found by secant steps, the first one with the slope of g at the end. `retake` maps lengths to the end states
    and their slopes `(B, n)`. Lengths stay between 0 and `dt`, and are found to within `resolved`.
    """
    active = first >= 0
    best, least = length, torch.full_like(length, float("inf"))
    old = slope = torch.zeros_like(length)
    before = length
    for k in range(CORRECTIONS):
        y, k1 = retake(length)
        g = chosen(F, first, t + length, y)
        better = active & (g.abs() < least)
        best, least = torch.where(better, length, best), torch.where(better, g.abs(), least)
        if k == 0:
            slopes = slopes_of(F, t + length, torch.ones_like(t), y, k1, int(first.max()) + 1)
            slope = slopes.gather(1, first.clamp(min=0).unsqueeze(1))[:, 0]
        else:
            moved = length - before
            secant = (g - old) / torch.where(moved == 0, 1.0, moved)
            usable = (moved.abs() > 0) & secant.isfinite() & (secant * slope > 0)
            slope = torch.where(usable, secant, slope)
        move = -g / torch.where(slope == 0, float("inf"), slope)
        move = torch.where(active & move.isfinite(), move, 0.0)
        before, old = length, g
        ahead = length + move
        length = torch.where(dt > 0, torch.minimum(ahead.clamp(min=0), dt), torch.maximum(ahead.clamp(max=0), dt))
        if not any_now((length - before).abs() > resolved):
            break
    return best


def chosen(F: Field, first: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """g `(B,)` of event `first` `(B,)`; 0 where `first` is negative."""
    assert F.watch is not None
    g = torch.zeros_like(t)
    for i in range(int(unwrapped(first).max()) + 1):
        if any_now(first == i):
            g = torch.where(first == i, F.watch(i, t, y), g)
    return g
