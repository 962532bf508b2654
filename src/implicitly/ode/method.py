"""The base class of ODE methods: tolerances, a single step, and its dense output."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from implicitly.checks import NUMBERS, check_count, check_kind
from implicitly.host import Array, all_now, captured, on_host, to_host, to_tensor
from implicitly.ode.control import Controller, Norm, rms_norm, stands_still
from implicitly.ode.problem import Field, Problem
from implicitly.transforms import unwrapped

# What a method carries from one step to the next besides the state: tensors with one row per sample.
Memory = tuple[Tensor, ...]


class Step(NamedTuple):
    """One step from y `(B, n)` at t `(B,)`, of length dt `(B,)`."""

    t: Array
    dt: Array
    y: Tensor
    y1: Tensor  # the state at its end
    memory: Memory  # what the next step needs
    k: Tensor  # the slope at y
    k1: Tensor  # the slope at y1
    error: Tensor | None  # the local error estimate `(B, n)`
    stages: tuple[Tensor, ...] = ()  # slopes `(B, n)`
    error_low: Tensor | None = None  # a second estimate, of lower order


_LENGTH = "a number, got a {type}; of a tensor pass float(...), as no derivative goes through the lengths of steps"
_CONTROLLER = Controller()


def _controller() -> Controller:
    """The default controller; `torch.compile` cannot trace a reference to an existing object, but can make one."""
    return Controller() if torch.compiler.is_dynamo_compiling() else _CONTROLLER


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """Base class of ODE methods, with their tolerances and step sizes.

    A step is accepted if the norm of error / (atol + rtol * max(|y|, |y1|)) is at most 1, for each sample on its
    own.

    Args:
        rtol, atol: relative and absolute tolerance of the local error; numbers, or tensors that broadcast over one
            flattened sample.
        dt: constant step size; the last step is shortened to end at t[-1], and tolerances are not used.
        dt0: the length of the first step; None: estimated, with one more call of f.
        dt_min: a sample that needs shorter steps ends with `Status.STEP_UNDERFLOW`; 0: the shortest steps that the
            dtype resolves.
        dt_max: the maximal length of a step.
        max_steps: number of attempted steps after which a sample ends with `Status.MAX_STEPS`.
        controller: the step-size controller, which computes the next step length from the error.
        norm: the norm of the error, which maps `(B, n)` to `(B,)`; by default the root mean square.
        tstops: times between the first and the last at which a step must end because f jumps there. A step that
            ends at such a time evaluates f only before it, a step that begins there only after it.
        progress: a function that is called after each attempted step with the fraction, from 0 to 1, of the
            interval that the slowest sample has covered; 1 at the end. The solve waits for it, and for an
            accelerator; with it, `compile=True` makes no graph. With tqdm:
            `progress=lambda part: bar.update(part - bar.n)` for a `bar = tqdm(total=1.0)`.
    """

    rtol: float | Tensor = 1e-5
    atol: float | Tensor = 1e-7
    dt: float | None = None
    dt0: float | None = None
    dt_min: float = 0.0
    dt_max: float = float("inf")
    max_steps: int = 100_000
    controller: Controller = field(default_factory=_controller)
    norm: Norm = rms_norm
    tstops: tuple[float, ...] = ()
    progress: Callable[[float], object] | None = None

    def __post_init__(self):
        name = type(self).__name__
        if self.dt is None and not self.adaptive:
            raise ValueError(f"{name} does not estimate its error, so its steps cannot adapt: pass {name}(dt=...)")
        self._check_lengths(name)
        check_count(name, "max_steps", self.max_steps)
        if not isinstance(self.controller, Controller):
            raise TypeError(f"{name}: controller must be an im.Controller(...), got {self.controller!r}")
        if not callable(self.norm):
            raise TypeError(f"{name}: norm must map (B, n) to (B,), got a {type(self.norm).__name__}")
        if self.progress is not None and not callable(self.progress):
            raise TypeError(
                f"{name}: progress must be a function of one number, got a {type(self.progress).__name__}"
            )
        if not isinstance(self.tstops, tuple | list):
            raise TypeError(f"{name}: tstops must be a tuple of numbers, got a {type(self.tstops).__name__}")
        if not all(isinstance(s, NUMBERS) and abs(s) < float("inf") for s in self.tstops):
            raise ValueError(f"{name}: tstops must hold finite numbers, got {self.tstops}")
        for which in ("rtol", "atol"):
            value = getattr(self, which)
            check_kind(name, which, value, (*NUMBERS, Tensor), "a number or a tensor, got {value!r}")
            if isinstance(value, NUMBERS):  # the usual case, for which a tensor would be slower
                right = 0 <= value < float("inf")
            else:
                right = bool((value.isfinite() & (value >= 0)).all())
            if not right:
                raise ValueError(f"{name}: {which} must be finite and >= 0, got {value}")

    def _check_lengths(self, name: str) -> None:
        """Raise TypeError / ValueError for invalid step lengths."""
        for which in ("dt", "dt0", "dt_min", "dt_max"):
            value = getattr(self, which)
            if value is None and which in ("dt", "dt0"):
                continue
            check_kind(name, which, value, NUMBERS, _LENGTH)
            assert value is not None
            if which in ("dt", "dt0") and not 0 < value < float("inf"):
                raise ValueError(
                    f"{name}: {which} must be a finite number > 0 (the direction comes from t), got {value}"
                )
        if self.dt is not None and (self.dt0 is not None or self.dt_min > 0):
            idle = "dt_min" if self.dt0 is None else "dt0"
            raise ValueError(
                f"{name}: with dt all steps have the same length, so {idle} would have no effect; pass only one "
                "of them"
            )
        if not 0 <= self.dt_min <= self.dt_max:
            raise ValueError(
                f"{name}: dt_min and dt_max must satisfy 0 <= dt_min <= dt_max, got {self.dt_min} and "
                f"{self.dt_max}"
            )

    @property
    @abstractmethod
    def order(self) -> int:
        """The order p of the method; its error estimate is O(dt^p)."""

    @property
    @abstractmethod
    def adaptive(self) -> bool:
        """Whether it estimates its error, so that its steps can adapt."""

    @property
    def sees_end(self) -> bool:
        """Whether NaN in the slope at the end of a step shows up in the error estimate."""
        return False

    @property
    def differentiates(self) -> bool:
        """Whether a step needs derivatives of f."""
        return False

    @property
    def nodes(self) -> tuple[float, ...] | None:
        """The nodes c of the times t + c dt at which every step calls f, in that order; None: steps differ.

        In a method with nodes, NaN or inf during a step always shows up in the state after it.
        """
        return None

    @property
    def output_calls(self) -> int:
        """How many calls of f it makes for the outputs that a step passes."""
        return 0

    @property
    def found_slopes(self) -> int:
        """How many slopes of a step need not be solved for if they are given in `Field.found`."""
        return 0

    @property
    def ungraphed(self) -> str | None:
        """The feature of this method that `torch.compile` cannot have in a graph; None if there is none."""
        return "tstops" if self.tstops else "progress" if self.progress is not None else None

    @property
    def degree(self) -> int:
        """The degree in time of the dense output of a step."""
        return 3

    @property
    def weights(self) -> tuple[float, ...] | None:
        """The quadrature weights of the slopes in y1 - y.

        They belong to the slope at the start of a step and those at its `nodes`, in that order; None: y1 - y is
        not such a sum.
        """
        return None

    @property
    def splits(self) -> bool:
        """Whether a state must be a pair (q, p) of equal widths, the slope of each depending on the other only."""
        return False

    @property
    def stability(self) -> float | None:
        """The stability limit on the negative real axis: the largest step times decay rate that is stable.

        inf: every step is; None: not known.
        """
        return None

    def check(self, problem: Problem) -> None:
        """Raise TypeError / ValueError for tolerances and lengths that do not fit the `problem` or its dtype."""
        if self.dt is None:
            self._check_tolerances(problem.y0.shape[1], problem.dtype)
            self._check_norm(problem.y0.detach())
        elif not captured():  # during a capture, `unroll` has checked the times
            self._check_length(problem.times)

    def _check_tolerances(self, width: int, dtype: torch.dtype) -> None:
        """Raise ValueError for tolerances that do not fit states of `width` numbers per sample or the `dtype`."""
        name, eps, tiny = type(self).__name__, torch.finfo(dtype).eps, torch.finfo(dtype).tiny
        for which, value in (("rtol", self.rtol), ("atol", self.atol)):
            if isinstance(value, Tensor) and value.shape not in ((), (1,), (width,)):
                raise ValueError(
                    f"{name}: {which} must be a number or one for each of the {width} components of a flattened "
                    f"sample, of shape ({width},), got the shape {tuple(value.shape)}"
                )
        if isinstance(self.rtol, float) and self.rtol >= 2 * eps:
            return
        rtol, atol = (torch.as_tensor(x, device=getattr(x, "device", "cpu")) for x in (self.rtol, self.atol))
        if bool(((rtol < 2 * eps) & ((rtol > 0) | (atol < tiny / eps))).any()):
            raise ValueError(
                f"{name}: {dtype} cannot resolve rtol={float(rtol.min()):g} with atol={float(atol.min()):g}; the "
                f"smallest possible rtol is {2 * eps:.2g}. Loosen rtol, pass y0, t and the arguments in a wider "
                "dtype, or disable torch.autocast, under which f computes in a lower precision"
            )

    def _check_norm(self, y: Tensor) -> None:
        """Raise TypeError / ValueError for a norm that does not return one number per row of y `(B, n)`."""
        if self.norm is rms_norm:
            return
        with torch.no_grad():
            size = self.norm(y)
        if not isinstance(size, Tensor):
            raise TypeError(f"{type(self).__name__}: norm must return a tensor (B,), got a {type(size).__name__}")
        if size.shape != y.shape[:1]:
            raise ValueError(
                f"{type(self).__name__}: norm must map (B, n) to (B,), one number a sample, but maps "
                f"{tuple(y.shape)} to {tuple(size.shape)}; reduce dimension 1 alone, as r.norm(dim=1) does"
            )

    def _check_length(self, times: Tensor) -> None:
        """Raise ValueError for constant steps too short to be resolved at the `times` `(B, T)`."""
        assert self.dt is not None
        length, seen = min(self.dt, self.dt_max), to_host(times) if on_host(times) else times.detach()
        begin, end = seen[:, 0], seen[:, -1]
        if all_now((begin == end) | ~stands_still(begin, length, end)):
            return
        far = float(unwrapped(times.detach()).abs().max())
        raise ValueError(
            f"{type(self).__name__}: {times.dtype} does not resolve a step of dt={length:g} at t = {far:g}; the "
            f"smallest it resolves is {torch.finfo(times.dtype).eps * far:.2g}. Pass t and y0 in float64, times "
            "measured from the start, or a longer dt"
        )

    def checked(self, problem: Problem) -> Problem:
        """Check, before any step, that the method applies to the `problem`.

        Returns the problem, with the calls of f that this took added to its count; raises TypeError / ValueError.
        """
        return problem

    @abstractmethod
    def start(self, F: Field, t: Array, y: Tensor, k: Tensor) -> Memory:
        """The memory with which to start from y `(B, n)`, whose slope is k, at t `(B,)`."""

    def slope(self, memory: Memory) -> Tensor:
        """The slope `(B, n)` at the state that goes with `memory`."""
        return memory[0]

    @abstractmethod
    def step(self, F: Field, t: Array | tuple[Tensor, ...], dt: Array, y: Tensor, memory: Memory) -> Step:
        """One step from y `(B, n)` at t `(B,)`, of length dt `(B,)`.

        For a method with `nodes`, dt may be a float, the length for all samples, and t a tuple of the times of the
        nodes, as f sees them.
        """

    @abstractmethod
    def dense_output(self, F: Field, step: Step, part: Tensor) -> Tensor:
        """The states `(B, W, n)` at t + part dt, for `part` `(B, W)`: the dense output."""

    def dense_output_at(self, F: Field, step: Step, parts: tuple[float, ...]) -> Sequence[Tensor]:
        """The states `(B, n)` at t + part dt for each of `parts`."""
        # One number at a time: the compiler fails to declare a constant tensor inside a loop's body.
        part = torch.cat([torch.full_like(step.y[:, :1], c) for c in parts], dim=1)
        return self.dense_output(F, step, part).unbind(1)

    def error_ratio(self, step: Step, tolerance: Tensor) -> Tensor:
        """The local error of a step over the tolerance `(B, n)`, as a norm `(B,)`."""
        assert step.error is not None
        return self.norm(step.error / tolerance)

    def tolerance(self, y: Tensor, y1: Tensor | None = None) -> Tensor:
        """The tolerance for the error of each component, `(B, n)`."""
        size = y.abs() if y1 is None else torch.maximum(y.abs(), y1.abs())
        allowed, tiny = size * self.rtol + self.atol, torch.finfo(size.dtype).tiny
        if isinstance(self.atol, float) and self.atol >= tiny:
            return allowed
        return torch.clamp(allowed, min=tiny)  # where the tolerance is 0, so is the error, and 0 / tiny is 0


def hermite(step: Step, part: Tensor) -> Tensor:
    """The cubic Hermite interpolant `(B, W, n)` of the states and slopes at both ends."""
    x, dt = part.unsqueeze(2), to_tensor(step.dt)[:, None, None]
    y, y1, k, k1 = (v.unsqueeze(1) for v in (step.y, step.y1, step.k, step.k1))
    bend = (1 - 2 * x) * (y1 - y) + (x - 1) * dt * k + x * dt * k1
    return (1 - x) * y + x * y1 + x * (x - 1) * bend
