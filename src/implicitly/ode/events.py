"""Events: sign changes of a function along a trajectory, and what follows when one happens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from implicitly.transforms import casts
from implicitly.tree import Layout


@dataclass(frozen=True)
class Event:
    """An event that happens where a function g changes its sign along a trajectory.

    It happens where g reaches or crosses 0, after the first time. If g is 0 at the start or after a restart, its
    sign just afterwards counts: a ball that leaves the floor does not hit it. If a restart moves the g of another
    event across 0, that event does not happen. Sign changes are looked for at the ends of every accepted step and
    at a few points in between, so two of them much closer than a step can be missed; `dt_max` of the method
    shortens the steps. If restarts follow each other so fast that rounding cannot separate them, as the bounces of
    a ball finally do, the sample ends with `Status.STEP_UNDERFLOW` and has no gradient, not even through earlier
    events. To stop before that, let a component of y count the restarts: `restart` increases it, g of the bounce
    is `torch.where(count < 3, height, 1.0)`, and g of an event without restart is the opposite.

    Args:
        g: `g(t, y, *args)` returns one number per sample: 0-d for one system, `(B,)` with `batch_dims=1`, in the
            dtype of y. It must be differentiable at the event for the event's time to be differentiable.
        direction: +1: g changes from negative to positive as the solve goes on; -1: from positive to negative;
            0: both.
        restart: None: the sample ends there. Otherwise `restart(t, y, *args)` is the state, like y, from which it
            continues.

    Raises:
        TypeError, ValueError: for invalid arguments.
    """

    g: Callable[..., Any]
    direction: int = 0
    restart: Callable[..., Any] | None = None

    def __post_init__(self):
        if not callable(self.g):
            raise TypeError(f"Event: g must be callable, got a {type(self.g).__name__}")
        if self.direction not in (-1, 0, 1):
            raise ValueError(f"Event: direction must be -1, 0 or 1, got {self.direction!r}")
        if self.restart is not None and not callable(self.restart):
            raise TypeError(f"Event: restart must be None or callable, got a {type(self.restart).__name__}")


def events_of(event: Any) -> tuple[Event, ...]:
    """`event` (None, an `Event` or a sequence of them) as a tuple; raises TypeError / ValueError otherwise."""
    events = () if event is None else (event,) if isinstance(event, Event) else event
    if not isinstance(events, tuple | list) or not all(isinstance(e, Event) for e in events):
        raise TypeError(f"event must be an im.Event or a tuple of them, got {event!r}")
    if len(events) > 100:
        raise ValueError(f"at most 100 events are supported, got {len(events)}")
    return tuple(events)


def check_number(value: Any, i: int, layout: Layout) -> None:
    """Raise TypeError / ValueError unless `value`, which g of event `i` returned, is one number per sample."""
    if not isinstance(value, Tensor):
        raise TypeError(f"g of event {i} must return a tensor, got a {type(value).__name__}")
    lead = (layout.batch,) if layout.batch_dims else ()
    if value.shape[: len(lead)] != lead or any(d != 1 for d in value.shape[len(lead) :]):
        raise ValueError(
            f"g of event {i} must return one number per sample, of shape {lead}, got {tuple(value.shape)}"
        )
    if not value.is_floating_point():
        raise ValueError(
            f"g of event {i} must return a real number that changes sign at the event, got "
            f"{value.dtype}: for example y - 1 instead of y > 1"
        )
    if value.dtype != layout.dtype and not casts(layout.device.type):
        raise ValueError(f"g of event {i} must return the dtype of y0: expected {layout.dtype}, got {value.dtype}")
    if value.device != layout.device:
        raise ValueError(f"g of event {i} must return the device of y0, {layout.device}, got {value.device}")
