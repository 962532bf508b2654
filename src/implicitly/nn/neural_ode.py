"""The neural ODE layer."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from implicitly.checks import check_on_failure
from implicitly.condition import users_line
from implicitly.graph_break import one_break_unless
from implicitly.nn.ode_regularisers import Regulariser
from implicitly.nn.per_solve import PerSolve, decide_once, has_buffers
from implicitly.nn.suitable import check_takes_two, warn_of_changing
from implicitly.ode.adjoints import RecursiveCheckpointAdjoint, TrajectoryAdjoint
from implicitly.ode.backsolve import BacksolveAdjoint
from implicitly.ode.control import Norm
from implicitly.ode.method import Method
from implicitly.ode.runge_kutta import Dopri5, RungeKutta
from implicitly.ode.solve import Trajectory, odeint
from implicitly.ode.unroll import is_unrollable
from implicitly.solution import Solution
from implicitly.transforms import unwrapped
from implicitly.tree import LOW_PRECISION, real_dtype
from implicitly.unrolled import UnrolledAdjoint

Times = Sequence[float] | Sequence[Sequence[float]] | np.ndarray | Tensor

_KINKED = (
    nn.ReLU,
    nn.LeakyReLU,
    nn.PReLU,
    nn.RReLU,
    nn.Hardtanh,  # ReLU6 is one
    nn.Hardsigmoid,
    nn.Hardswish,
    nn.Hardshrink,
    nn.Softshrink,
    nn.SELU,
    nn.Threshold,
)


# The names of the corresponding functions in PyTorch.
_KINKED_FUNCTIONS = (
    *("relu", "relu_", "relu6", "leaky_relu", "leaky_relu_", "prelu", "rrelu", "selu"),
    *("hardtanh", "hardsigmoid", "hardswish", "hardshrink", "softshrink", "threshold"),
)


class SmoothnessWarning(UserWarning):
    """A vector field is not smooth, so that solvers need more steps than their order promises."""


def _is_traceable(layer: NeuralODE, x: Any, *args: Any, t: Any = None) -> bool:
    return not layer.compile_solve and is_unrollable(layer.solver, layer.adjoint, layer.t if t is None else t)


class NeuralODE(nn.Module):
    """A layer whose output is the solution of dy/dt = f(t, y), y(t[0]) = x (Chen et al., NeurIPS 2018).

    Its parameters are those of f. The random masks, statistics and weights of this package's `Dropout`,
    `BatchNorm`, `WeightNorm` and `SpectralNorm` are decided once, at the start of the solve, and stay constant in
    it. Use these: the dropout and batch norm of `torch.nn` would change f from call to call.

    Args:
        f: `f(t, y, *args)` returns dy/dt, of y's shape; y is a tensor or, without `augment` and `regularisers`, a
            pytree of them. `Autonomous`, `ConcatTime` and `TimeSequential` turn networks of y into such an f.
            Derivatives within f, such as forces, are taken with `torch.func` (`grad`, `vjp`), or with autograd
            under `torch.enable_grad()` and with `create_graph=True`.
        t: the times, increasing or decreasing; x is the state at the first.
        solver, adjoint, on_failure: as in `implicitly.odeint`. The solver may be replaced at any time, as in
            `layer.solver = dataclasses.replace(layer.solver, rtol=1e-2)`.
        augment: how many zeros to append to x along dimension 1: features of `(B, n)`, channels of `(B, C, H, W)`.
            The output keeps these entries; a readout uses all, or `y[:, :n]`. Dupont, Doucet and Teh, "Augmented
            Neural ODEs", NeurIPS 2019.
        batch_dims: 0: the whole batch is one system with common steps, and t reaches f 0-d. 1: samples have their
            own steps, and t reaches f as `(B, 1, ..., 1)`; t may then be `(B, T)`, as in `implicitly.odeint`.
        in_dims: which of `forward`'s `args` have one entry per sample, as in `implicitly.odeint`. Finished samples
            are dropped from the calls of f if it is given, or if args contain no tensor and f no buffer (not
            counting buffers of this package's modules that decide once per solve).
        regularisers: rates to integrate along the trajectory, such as `(KineticEnergy(),)`. They take no part in
            the error control: steps and states are the same as without them. May be replaced at any time, too.
        compile: solve as one graph of `torch.compile`, as in `implicitly.odeint`.

    Attributes:
        solution: the `Solution` of the last forward pass, detached; `value` has all times, `(T, *y.shape)`.
        evaluations: the number of calls of f in the last forward pass, including those of regularisers and the one
            that decides what stays constant in a solve; for a graph, the calls of its steps.
        backward_evaluations: the number of calls of f in backward passes through the last forward pass; 0 before
            the first, and if the solve is part of the graph of a compiled model.

    Raises:
        TypeError, ValueError: for invalid arguments, at construction where possible; under autocast also for
            tolerances that its dtype does not resolve, such as the default ones: loosen them, or call the layer
            under `torch.autocast(device_type, enabled=False)`.

    Warns:
        SmoothnessWarning: f contains an activation with a kink, or calls one as a function.
        PerCallWarning: f contains a dropout or a batch norm of `torch.nn`, in training mode. Calls of
            `torch.nn.functional` are not detected.
    """

    def __init__(
        self,
        f: nn.Module,
        t: Times = (0.0, 1.0),
        solver: RungeKutta = Dopri5(),
        adjoint: TrajectoryAdjoint | UnrolledAdjoint = RecursiveCheckpointAdjoint(),
        *,
        augment: int = 0,
        batch_dims: int = 0,
        in_dims: Any = None,
        on_failure: str = "raise",
        regularisers: Sequence[Regulariser] = (),
        compile: bool = False,
    ):
        super().__init__()
        if not isinstance(f, nn.Module):
            raise TypeError(
                f"f must be an nn.Module whose forward takes (t, y), got a {type(f).__name__}; "
                "odeint takes any callable"
            )
        remedy = "Autonomous(f) is a vector field of a network of y, ConcatTime(f) of one of [y, t]"
        check_takes_two(f, "NeuralODE calls f(t, y)", remedy)
        if not isinstance(augment, int) or augment < 0:
            raise ValueError(f"augment must be a whole number of features >= 0, got {augment!r}")
        if batch_dims not in (0, 1):
            raise ValueError(f"batch_dims must be 0 (one system) or 1 (a batch of samples), got {batch_dims}")
        if in_dims is not None and batch_dims == 0:
            raise ValueError(
                "in_dims says which args have one entry per sample, but batch_dims=0 means one system; leave "
                "in_dims out"
            )
        check_on_failure(on_failure)
        for regulariser in regularisers:
            if not isinstance(regulariser, Regulariser):
                raise TypeError(f"regularisers must contain objects such as KineticEnergy(), got {regulariser!r}")
        _check_times(t, batch_dims)
        self.f = f
        self.t = t
        self.solver = solver
        self.adjoint = adjoint
        self.augment = augment
        self.batch_dims = batch_dims
        self.in_dims = in_dims
        self.on_failure = on_failure
        self.regularisers = tuple(regularisers)
        self.compile_solve = compile
        self.solution: Solution | None = None
        self._calls = _Calls()
        self._may_have_kinks = not _warn_of_kinked_modules(f)
        self._looked_for_changes = False

    @one_break_unless(_is_traceable)
    def forward(self, x: Any, *args: Any, t: Times | None = None) -> Any:
        """The solution that starts at `x` `(B, ...)`.

        Args:
            args: passed on to f; gradients flow to their tensors.
            t: times to use in this call instead of the layer's.

        Returns:
            If there are two times, the state at the last one; otherwise the states at all, `(T, *y.shape)`, where
            y is x with the augmented entries. With regularisers, a pair of this and a tuple of their integrals
            from the first time to the last, `(B,)` each, differentiable.
        """
        if t is not None and not torch.compiler.is_dynamo_compiling():  # the layer's own times have been checked
            _check_times(t, self.batch_dims)
        warn_of_changing(self, self.f)
        times = _like(self.t if t is None else t, x)
        y = self._start(x)
        self._calls = calls = _Calls(looks_for_kinks=self._may_have_kinks)
        held, held_dims = self._held(times, y, args, calls)
        rates = _Field(self.f, tuple(self.regularisers), calls)
        drawn = tuple(r.draw(y) for r in rates.regularisers)
        start, solver = y, self.solver
        if rates.regularisers:
            none = torch.zeros(len(y), dtype=real_dtype(y.dtype), device=y.device)
            start = (y, *(none for _ in rates.regularisers))
            solver = _controlled_by(y, self.batch_dims, solver)
        solution = odeint(
            rates,
            start,
            times,
            held,
            drawn,
            *args,
            solver=solver,
            adjoint=self._counting(calls),
            batch_dims=self.batch_dims,
            in_dims=self._samples_in(args, held_dims),
            on_failure=self.on_failure,
            compile=self.compile_solve,
        )
        calls.after_forward(solution.evaluations)
        self._may_have_kinks = calls.looks_for_kinks
        value, integrals = (solution.value[0], solution.value[1:]) if rates.regularisers else (solution.value, ())
        self._remember(solution, value)
        if _count(times) == 2:
            value = pytree.tree_map(lambda v: v[-1], value)
        return (value, tuple(p[-1] for p in integrals)) if rates.regularisers else value

    @property
    def evaluations(self) -> int:
        """The number of calls of f in the last forward pass."""
        return self._calls.forward

    @property
    def backward_evaluations(self) -> int:
        """The number of calls of f in backward passes through the last forward pass."""
        return self._calls.total - self._calls.before

    def extra_repr(self) -> str:
        """The times, the solver and the adjoint, for `repr`."""
        augment = f", augment={self.augment}" if self.augment else ""
        return f"t={self.t}, solver={self.solver}, adjoint={type(self.adjoint).__name__}{augment}"

    def _start(self, x: Any) -> Any:
        needs = 2 if self.augment else 1 if self.regularisers else 0
        if needs and not (isinstance(x, Tensor) and x.ndim >= needs):
            option, shape = ("augment", "(B, n, ...)") if self.augment else ("regularisers", "(B, ...)")
            got = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
            raise ValueError(f"{option} needs x to be one tensor {shape}, got {got}")
        if not self.augment:
            return x
        return torch.cat([x, x.new_zeros(len(x), self.augment, *x.shape[2:])], dim=1)

    def _samples_in(self, args: tuple[Any, ...], held_dims: dict[str, int | None]) -> Any:
        """For all that f depends on, the dimension that holds the samples; None: not known."""
        if self.batch_dims == 0:
            return None
        dims = self.in_dims
        if dims is None:
            if has_buffers(self.f) or any(isinstance(x, Tensor | nn.Module) for x in pytree.tree_leaves(args)):
                return None
            dims = (None,) * len(args)
        elif isinstance(dims, int):
            dims = (dims,) * len(args)
        elif len(dims) != len(args):
            raise ValueError(
                f"in_dims={dims!r} has {len(dims)} entries, but f gets {len(args)} args after t and y"
            )
        return (held_dims, tuple(r.sample_dim for r in self.regularisers), *dims)

    def _held(
        self, times: Times, y: Any, args: tuple[Any, ...], calls: _Calls
    ) -> tuple[dict[str, Tensor], dict[str, int | None]]:
        """What f decides once per solve, by one call at the start if it decides anything, and its sample dims."""
        if not any(isinstance(m, PerSolve) for m in self.f.modules()):
            return {}, {}
        first = pytree.tree_leaves(y)[0]
        t0 = times[..., 0] if isinstance(times, Tensor) else torch.tensor(times[0], device="cpu")
        t0 = t0.to(device=first.device, dtype=_time_dtype(first))
        if self.batch_dims:
            t0 = t0.expand(len(first)).reshape(-1, *(1 for _ in first.shape[1:]))
        # Not detached, unlike the initial state of an equilibrium: here the initial state is the input.
        calls.total += 1
        return decide_once(self.f, t0, y, *args)

    def _counting(self, calls: _Calls) -> TrajectoryAdjoint | UnrolledAdjoint:
        """The adjoint; if it runs compiled graphs, their calls of f are added to `calls`."""
        adjoint = self.adjoint
        if not (self.compile_solve and isinstance(adjoint, RecursiveCheckpointAdjoint | BacksolveAdjoint)):
            return adjoint
        listen = adjoint.listen

        def told(count: int) -> None:
            calls.total += count
            if listen is not None:
                listen(count)

        return replace(adjoint, listen=told)

    def _remember(self, solution: Trajectory, value: Any) -> None:
        tensors = (value, solution.status, solution.residual, solution.steps)
        value, status, residual, steps = pytree.tree_map(lambda x: unwrapped(x.detach()), tensors)
        self.solution = Solution(value, status, residual, steps, solution.evaluations)


@dataclass
class _Calls:
    """Counts the calls of f: in total, those of them before the backward pass, and those in the forward pass.

    `looks_for_kinks` says whether to check the next call, the first of its layer, for functions with kinks.
    """

    total: int = 0
    before: int = 0
    forward: int = 0
    looks_for_kinks: bool = False

    def after_forward(self, evaluations: int) -> None:
        """Note the end of the solve, which counted `evaluations`: the only count there is for calls in a graph."""
        self.before, self.forward = self.total, max(self.total, evaluations)


@dataclass(frozen=True)
class _Field:
    """f with the rates of the regularisers, as a function of everything they depend on; counts the calls of f."""

    f: nn.Module
    regularisers: tuple[Regulariser, ...]
    calls: _Calls = field(compare=False)  # a graph made for one forward pass serves the next

    looked_at: ClassVar[bool] = True  # by `warn_of_changing`

    def __call__(self, t: Tensor, state: Any, held: dict[str, Tensor], drawn: tuple[Any, ...], *args: Any) -> Any:
        def call(t: Tensor, y: Any) -> Any:
            if not held:
                return self.f(t, y, *args)
            # As in `DEQ`: each name belongs to one module, and torch would not restore tied ones.
            return functional_call(self.f, held, (t, y, *args), tie_weights=False)

        def f(t: Tensor, y: Any) -> Any:
            if torch.compiler.is_dynamo_compiling():
                return call(t, y)
            self.calls.total += 1
            if not self.calls.looks_for_kinks:
                return call(t, y)
            self.calls.looks_for_kinks = False
            with _Kinks() as kinks:
                value = call(t, y)
            kinks.warn()
            return value

        if not self.regularisers:
            return f(t, state)
        y = state[0]
        dy = f(t, y)
        return dy, *(r.rate(f, t, y, dy, noise) for r, noise in zip(self.regularisers, drawn))


@dataclass(frozen=True)
class _Leading:
    """A norm of the first `width` columns only."""

    norm: Norm
    width: int

    def __call__(self, rows: Tensor) -> Tensor:
        return self.norm(rows[:, : self.width])


def _controlled_by(y: Tensor, batch_dims: int, solver: RungeKutta) -> RungeKutta:
    """The solver for a state of y and the regularisers' integrals, with error control on y alone."""
    if not isinstance(solver, Method):  # `odeint` raises the error
        return solver
    if solver.splits:
        raise ValueError(
            "regularisers add a number per sample to the state, so it is no longer a pair (q, p), which "
            f"{type(solver).__name__} needs; use a solver for general states, such as im.Dopri5()"
        )
    samples = len(y) if batch_dims else 1
    width = y.numel() // max(samples, 1) * (2 if y.is_complex() else 1)
    for name in ("rtol", "atol"):
        value = getattr(solver, name)
        if isinstance(value, Tensor) and value.ndim:
            raise ValueError(
                f"with regularisers, {name} must be a single number, got a tensor of shape {tuple(value.shape)}"
            )
    return replace(solver, norm=_Leading(solver.norm, width))


def _count(t: Times) -> int:
    return t.shape[-1] if isinstance(t, Tensor) else len(t)


def _time_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which `odeint` keeps times, given a state of x's dtype."""
    return torch.float32 if x.dtype in LOW_PRECISION else real_dtype(x.dtype)


def _like(t: Times, x: Any) -> Times:
    """`t` in the dtype and on the device that x needs; a tuple of times that all samples share stays as it is."""
    first = pytree.tree_leaves(x)[0]
    if isinstance(t, np.ndarray):
        t = torch.from_numpy(t)
    elif not isinstance(t, Tensor):  # with times per sample, rows of numbers or tensors
        if isinstance(t[0], Sequence):
            t = torch.tensor(t, dtype=torch.float64, device="cpu")
        elif isinstance(t[0], Tensor) and t[0].ndim:
            t = torch.stack(tuple(t))  # pyright: ignore[reportCallIssue, reportArgumentType]
    if not isinstance(t, Tensor) or not isinstance(first, Tensor):
        return t
    return t.to(device=first.device, dtype=_time_dtype(first))


def _check_times(t: Any, batch_dims: int) -> None:
    """Raise TypeError / ValueError for times that are invalid, whatever x will be."""
    if not isinstance(t, Tensor | np.ndarray | Sequence) or isinstance(t, str):
        raise TypeError(f"t must be a tensor, an array or a sequence of times, got a {type(t).__name__}")
    if not isinstance(t, Tensor):  # only the numbers are checked; derivatives reach the original tensors, not this
        t = torch.tensor(
            [x.tolist() if isinstance(x, Tensor | np.ndarray) else x for x in t], dtype=torch.float64, device="cpu"
        )
    times = t.detach().to(torch.float64)
    if times.ndim not in (1, 1 + batch_dims) or times.shape[-1] < (2 if times.ndim == 1 else 1):
        allowed = "(T,) with T >= 2, or (B, T)" if batch_dims else "(T,) with T >= 2"
        raise ValueError(f"t must have the shape {allowed}, got {tuple(times.shape)}")
    gaps = times.diff(dim=-1)
    ends = (gaps == 0) if times.ndim == 2 else torch.zeros_like(gaps, dtype=torch.bool)  # where a series has ended
    if not bool(times.isfinite().all() & ((ends | (gaps > 0)).all(-1) | (ends | (gaps < 0)).all(-1)).all()):
        raise ValueError(f"t must be finite, and increase throughout or decrease throughout, got {t}")


class _Kinks(TorchFunctionMode):
    """Records which functions with a kink (a jump of the derivative) are called."""

    def __init__(self):
        super().__init__()
        self.seen: dict[str, None] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in _KINKED_FUNCTIONS:
            self.seen[name.rstrip("_")] = None
        return func(*args, **(kwargs or {}))

    def warn(self) -> None:
        """Warn of the functions seen."""
        if self.seen:
            _warn_of("calls " + ", ".join(self.seen))


def _warn_of_kinked_modules(f: nn.Module) -> bool:
    """Warn of modules of f whose derivative jumps; returns whether there are any."""
    kinked = [(name, type(m).__name__) for name, m in f.named_modules() if isinstance(m, _KINKED)]
    if kinked:
        _warn_of("contains " + ", ".join(f"{kind} ({name})" if name else kind for name, kind in kinked))
    return bool(kinked)


def _warn_of(what: str) -> None:
    warnings.warn(
        f"NeuralODE: f {what}, whose derivative is discontinuous. A solver of high order loses its order there "
        "and takes shorter steps, and the flow is not smooth. Use nn.Softplus, nn.Tanh, nn.SiLU or nn.GELU "
        "instead",
        SmoothnessWarning,
        stacklevel=users_line(),
    )
