"""What a method for trajectories is: tolerances, one step, and what is known between its ends."""

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

# What a method carries from one step to the next besides the state: tensors with one row a sample.
Memory = tuple[Tensor, ...]


class Step(NamedTuple):
    """One step from y `(B, n)` at t `(B,)`, of length dt `(B,)`."""

    t: Array
    dt: Array
    y: Tensor
    y1: Tensor  # the state it ends with
    memory: Memory  # what the next step needs
    k: Tensor  # the slope at y
    k1: Tensor  # the slope at y1
    error: Tensor | None  # the local error estimate `(B, n)`
    stages: tuple[Tensor, ...] = ()  # slopes `(B, n)`
    error_low: Tensor | None = None  # a second estimate, of lower order


_LENGTH = "a number, got a {type}; of a tensor pass float(...), as no derivative goes through the lengths of steps"
_CONTROLLER = Controller()


def _controller() -> Controller:
    """The default; the tracer of `torch.compile` cannot take up an object, but can make one."""
    return Controller() if torch.compiler.is_dynamo_compiling() else _CONTROLLER


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """A method for trajectories, with its tolerances.

    A step is accepted where the norm of (error / (atol + rtol * max(|y|, |y1|))) is at most 1, sample by sample.

    Args:
        rtol, atol: relative and absolute tolerance of the local error; numbers, or tensors that broadcast over one
            flattened sample.
        dt: constant step size; the last step is shortened to end at t[-1], and tolerances are not used.
        dt0: the length of the first step; None: found from f, for one more call.
        dt_min: a sample whose steps would have to be shorter ends as `Status.STEP_UNDERFLOW`; 0: as short as the
            dtype resolves.
        dt_max: steps are at most that long.
        max_steps: attempted steps after which a sample ends as `Status.MAX_STEPS`.
        controller: how the next length follows from the error.
        norm: maps `(B, n)` to `(B,)`; the root mean square unless given.
        tstops: times between the first and the last at which a step must end, because f jumps there. Steps up to
            one ask for f before it only, those from one after it only.
        progress: is told after each step tried how far the solve has come: the part from 0 to 1 of the way of the
            sample that is furthest behind, 1 at the end. It is waited for, and so is an accelerator; with it no
            graph of `compile=True` can be had. With tqdm: `progress=lambda part: bar.update(part - bar.n)` of a
            `bar = tqdm(total=1.0)`.
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
                f"{name}: progress must be a function of a number, got a {type(self.progress).__name__}"
            )
        if not isinstance(self.tstops, tuple | list):
            raise TypeError(f"{name}: tstops must be a tuple of numbers, got a {type(self.tstops).__name__}")
        if not all(isinstance(s, NUMBERS) and abs(s) < float("inf") for s in self.tstops):
            raise ValueError(f"{name}: tstops must hold finite numbers, got {self.tstops}")
        for which in ("rtol", "atol"):
            value = getattr(self, which)
            check_kind(name, which, value, (*NUMBERS, Tensor), "a number or a tensor, got {value!r}")
            if isinstance(value, NUMBERS):  # the usual case; a tensor of it takes longer to make
                right = 0 <= value < float("inf")
            else:
                right = bool((value.isfinite() & (value >= 0)).all())
            if not right:
                raise ValueError(f"{name}: {which} must be finite and >= 0, got {value}")

    def _check_lengths(self, name: str) -> None:
        """Raise TypeError / ValueError for lengths that steps cannot have."""
        for which in ("dt", "dt0", "dt_min", "dt_max"):
            value = getattr(self, which)
            if value is None and which in ("dt", "dt0"):
                continue
            check_kind(name, which, value, NUMBERS, _LENGTH)
            assert value is not None
            if which in ("dt", "dt0") and not 0 < value < float("inf"):
                raise ValueError(
                    f"{name}: {which} must be a finite number > 0 (t says the direction), got {value}"
                )
        if self.dt is not None and (self.dt0 is not None or self.dt_min > 0):
            idle = "dt_min" if self.dt0 is None else "dt0"
            raise ValueError(
                f"{name}: dt makes all steps equally long, so {idle} would count for nothing; pass one of them"
            )
        if not 0 <= self.dt_min <= self.dt_max:
            raise ValueError(f"{name}: 0 <= dt_min <= dt_max, got {self.dt_min} and {self.dt_max}")

    @property
    @abstractmethod
    def order(self) -> int:
        """The order p of the method; its error estimate is O(dt^p)."""

    @property
    @abstractmethod
    def adaptive(self) -> bool:
        """Whether it estimates its error."""

    @property
    def sees_end(self) -> bool:
        """Whether NaN in the slope at the end of a step shows in the error."""
        return False

    @property
    def differentiates(self) -> bool:
        """Whether a step asks for derivatives of f."""
        return False

    @property
    def nodes(self) -> tuple[float, ...] | None:
        """The nodes c of the times t + c dt at which any step calls f, in that order; None: steps differ.

        A method with nodes has steps that say with NaN or inf in the state that there was some before.
        """
        return None

    @property
    def output_calls(self) -> int:
        """How often it calls f for the outputs that a step passes."""
        return 0

    @property
    def found_slopes(self) -> int:
        """How many slopes of a step, if it is told them, save the search for them, see `Field.found`."""
        return 0

    @property
    def ungraphed(self) -> str | None:
        """What of it no graph of `torch.compile` has; None: nothing."""
        return "tstops" if self.tstops else "progress" if self.progress is not None else None

    @property
    def degree(self) -> int:
        """The degree in time of the dense output of a step."""
        return 3

    @property
    def weights(self) -> tuple[float, ...] | None:
        """What the slopes weigh in what a step adds to the state, where these are the slope it begins with and
        those of its calls of f at its `nodes`, in that order; None: they are not."""
        return None

    @property
    def splits(self) -> bool:
        """Whether a state must be a pair (q, p), halves of equal width of which each moves by the other alone."""
        return False

    @property
    def stability(self) -> float | None:
        """The largest step times rate with which what decays at that rate does so in the method too; inf: any;
        None: not known."""
        return None

    def check(self, problem: Problem) -> None:
        """Raise TypeError / ValueError for tolerances and lengths that do not suit the `problem`, or that its
        dtype cannot resolve."""
        if self.dt is None:
            self._check_tolerances(problem.y0.shape[1], problem.dtype)
            self._check_norm(problem.y0.detach())
        elif not captured():  # there `unroll` has looked at the times
            self._check_length(problem.times)

    def _check_tolerances(self, width: int, dtype: torch.dtype) -> None:
        """Raise ValueError for tolerances of a state of `width` numbers a sample."""
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
                f"smallest rtol it can is {2 * eps:.2g}. Loosen rtol, pass y0, t and the arguments in a wider "
                "dtype, or leave torch.autocast, under which f computes in another one than they have"
            )

    def _check_norm(self, y: Tensor) -> None:
        """Raise TypeError / ValueError for a norm that is not one number a row of y `(B, n)`."""
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
        """Raise ValueError for constant steps that do not move the `times` `(B, T)`."""
        assert self.dt is not None
        length, seen = min(self.dt, self.dt_max), to_host(times) if on_host(times) else times.detach()
        begin, end = seen[:, 0], seen[:, -1]
        if all_now((begin == end) | ~stands_still(begin, length, end)):
            return
        far = float(unwrapped(times.detach()).abs().max())
        raise ValueError(
            f"{type(self).__name__}: {times.dtype} does not resolve a step of dt={length:g} at t = {far:g}; the "
            f"smallest it does is {torch.finfo(times.dtype).eps * far:.2g}. Pass t and y0 in float64, times that "
            "are measured from the start, or a longer dt"
        )

    def checked(self, problem: Problem) -> Problem:
        """`problem`, with the calls of f that it took to see that the method applies to it.

        Raises TypeError / ValueError where it does not; called before any step.
        """
        return problem

    @abstractmethod
    def start(self, F: Field, t: Array, y: Tensor, k: Tensor) -> Memory:
        """What to carry from y `(B, n)`, whose slope is k, at t `(B,)`."""

    def slope(self, memory: Memory) -> Tensor:
        """The slope `(B, n)` of the state beside which it carries `memory`."""
        return memory[0]

    @abstractmethod
    def step(self, F: Field, t: Array | tuple[Tensor, ...], dt: Array, y: Tensor, memory: Memory) -> Step:
        """One step from y `(B, n)` at t `(B,)`, of length dt `(B,)`.

        Of a method with `nodes` dt may be a float, the length for all samples, and t the times of the nodes, a
        tuple of what f sees.
        """

    @abstractmethod
    def dense_output(self, F: Field, step: Step, part: Tensor) -> Tensor:
        """The states `(B, W, n)` at t + part dt, for `part` `(B, W)`: the dense output."""

    def dense_output_at(self, F: Field, step: Step, parts: tuple[float, ...]) -> Sequence[Tensor]:
        """The states `(B, n)` at t + part dt for each of `parts`."""
        # Number by number: the compiler forgets to declare a constant tensor of a loop's body.
        part = torch.cat([torch.full_like(step.y[:, :1], c) for c in parts], dim=1)
        return self.dense_output(F, step, part).unbind(1)

    def error_ratio(self, step: Step, tolerance: Tensor) -> Tensor:
        """The local error of a step over the tolerance `(B, n)`, as a norm `(B,)`."""
        assert step.error is not None
        return self.norm(step.error / tolerance)

    def tolerance(self, y: Tensor, y1: Tensor | None = None) -> Tensor:
        """What the error of each component may be, `(B, n)`."""
        size = y.abs() if y1 is None else torch.maximum(y.abs(), y1.abs())
        allowed, tiny = size * self.rtol + self.atol, torch.finfo(size.dtype).tiny
        if isinstance(self.atol, float) and self.atol >= tiny:
            return allowed
        return torch.clamp(allowed, min=tiny)  # where both are 0, so is the error: 0 / tiny is 0


def hermite(step: Step, part: Tensor) -> Tensor:
    """The cubic through both ends and both slopes, `(B, W, n)`."""
    x, dt = part.unsqueeze(2), to_tensor(step.dt)[:, None, None]
    y, y1, k, k1 = (v.unsqueeze(1) for v in (step.y, step.y1, step.k, step.k1))
    bend = (1 - 2 * x) * (y1 - y) + (x - 1) * dt * k + x * dt * k1
    return (1 - x) * y + x * y1 + x * (x - 1) * bend
