"""The deep equilibrium layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from implicitly.adjoints import Adjoint, ImplicitAdjoint
from implicitly.changing import any_drops_out
from implicitly.condition import as_solution
from implicitly.fixed_point.adjoints import PhantomAdjoint
from implicitly.fixed_point.anderson import Anderson
from implicitly.fixed_point.solve import fixed_point, is_traceable
from implicitly.graph_break import one_break, one_break_unless
from implicitly.iterate import Found, Solver
from implicitly.nn.per_solve import decide_once, decided_in, decides
from implicitly.nn.suitable import check_takes_two, warn_of_changing
from implicitly.nn.warm_start import LastBatch, WarmStart
from implicitly.solution import Solution, SolverError
from implicitly.transforms import is_batched, under_transform, unwrapped
from implicitly.unrolled import UnrolledAdjoint


# Functions of the module, not lambdas, so that a layer can be pickled.
def _whole_state(z: Any) -> Any:
    return z


def _zeros_like(x: Any) -> Any:
    return pytree.tree_map(torch.zeros_like, x)


def _is_traceable(layer: DEQ, *args: Any, **options: Any) -> bool:
    # `LastEpoch` looks its samples up by index and checks them, which cannot be traced.
    if layer.training and not isinstance(layer.warm_start, LastBatch | None):
        return False
    return is_traceable(solver=layer.solver, adjoint=layer.adjoint, compile=layer.compile_solve)


class StartingCell(nn.Module, ABC):
    """A cell that computes the initial state itself, by applying its own layers."""

    @abstractmethod
    def begin(self, x: Any) -> Any:
        """The initial state for `x`; what the cell decides once per solve is decided here, with its gradient."""


def begin(cell: nn.Module, init: Callable[[Any], Any], x: Any) -> Any:
    """The initial state of a solve for `x`; the cell's `PerSolve` modules are applied, and so can decide."""
    if isinstance(cell, StartingCell):
        return cell.begin(x)
    z0 = init(x)
    if decides(cell):
        cell(pytree.tree_map(torch.detach, z0), x)
    return z0


class DEQ(nn.Module):
    """A layer whose output is the equilibrium z = cell(z, x) (Bai, Kolter and Koltun, NeurIPS 2019).

    Its parameters are the cell's. The random masks, statistics and weights of this package's `Dropout`,
    `BatchNorm`, `WeightNorm` and `SpectralNorm` are decided once, before the solve, and stay constant in it. Use
    these: with the dropout or batch norm of `torch.nn`, the cell would be a different function at each call, and
    have no equilibrium.

    Args:
        cell: `cell(z, x)` returns the next z; z is a tensor `(B, ...)` or a pytree of them, x likewise. Numbers
            (0-d tensors) in x apply to all samples. Anything else that samples share, such as a mask `(T, T)`,
            should be a buffer of the cell: in x it would count as one entry per sample if T happens to equal B.
        solver, adjoint, on_failure, compile: as in `implicitly.fixed_point`.
        batch_dims: 1: samples are independent, and finished ones are dropped from the calls of the cell. 0: the
            whole batch is one system, for cells that couple samples.
        init: maps x to the initial state z0, if no other is known; by default zeros like x, for all its tensors.
        warm_start: `LastBatch()` or `LastEpoch(size)`: where to start from instead in training. Under
            `torch.func.vmap` solves start cold, and are not remembered.
        readout: maps the equilibrium to the output of `forward`; by default the whole equilibrium.

    Attributes:
        solution: the `Solution` of the last forward pass, detached; `value` is the whole equilibrium, and shares
            memory with what `forward` returned.
        backward_solution: the same for the last backward solve (`ImplicitAdjoint` only), or None; also None if
            the solve is part of the graph of a compiled model.

    Raises:
        TypeError: for invalid arguments, such as a cell that does not take `(z, x)`.

    Warns:
        ConvergenceWarning: as `on_failure` says. If running out of steps is intended, as with few steps in
            training, it tells nothing new: pass "ignore" and look at `solution`, or take exactly `max_steps` with
            `rtol=0`.
        PerCallWarning: the cell contains a dropout or a batch norm of `torch.nn`, in training mode. Calls of
            `torch.nn.functional` are not detected.
    """

    def __init__(
        self,
        cell: nn.Module,
        solver: Solver = Anderson(),
        adjoint: Adjoint = ImplicitAdjoint(),
        *,
        batch_dims: int = 1,
        on_failure: str = "warn",
        compile: bool = False,
        init: Callable[[Any], Any] = _zeros_like,
        warm_start: WarmStart | None = None,
        readout: Callable[[Any], Any] = _whole_state,
    ):
        super().__init__()
        if not isinstance(cell, nn.Module):
            raise TypeError(f"DEQ: cell must be an nn.Module, got {cell!r}; for a function, use im.fixed_point")
        if not isinstance(warm_start, WarmStart | None):
            raise TypeError(
                "DEQ: warm_start must be None or an object such as LastBatch() or LastEpoch(size), "
                f"got {warm_start!r}"
            )
        check_takes_two(cell, "DEQ calls cell(z, x)", "Write a module whose forward puts x into the network of z")
        if not isinstance(solver, Solver):
            raise TypeError(f"DEQ: solver must be a solver such as im.Anderson(), got {solver!r}")
        self.cell = cell
        self.solver = solver
        self.adjoint = adjoint
        self.batch_dims = batch_dims
        self.on_failure = on_failure
        self.compile_solve = compile
        self.init = init
        self.warm_start = warm_start
        self.readout = readout
        self.solution: Solution | None = None
        self.backward_solution: Solution | None = None
        self._looked_for_changes = False

    @one_break_unless(_is_traceable)
    def forward(self, x: Any, z0: Any = None, *, index: Tensor | None = None) -> Any:
        """The equilibrium for `x` `(B, ...)`, found from `z0` if given.

        Args:
            index: `(B,)` int64, the indices of these samples in the data set; for `LastEpoch`. It raises
                ValueError for a layer without a warm start.
        """
        start, held = self._begin(x, z0, index)
        with self._hinting(x, z0):
            solution = self._solve(x, start, held, self.solver, self._listening(), self.on_failure)
        self._remember(solution, index)
        return self.readout(solution.value)

    @one_break
    def iterates(self, x: Any, at: Sequence[int], z0: Any = None, *, index: Tensor | None = None) -> list[Any]:
        """The states after the step counts `at` and, last, the equilibrium, for losses on intermediate states.

        Intermediate states carry the gradient of one application of the cell, the last one that of the layer. The
        solver restarts at each. Bai et al., "Deep Equilibrium Optical Flow Estimation", CVPR 2022.

        Args:
            at: increasing step counts, such as `(2, 5)`.
            index: as in `forward`.
        """
        if any(b <= a for a, b in zip((0, *at), at)):
            raise ValueError(f"at must contain increasing step counts, the first at least 1, got {tuple(at)}")
        z, held = self._begin(x, z0, index)
        states = []
        for steps in (b - a for a, b in zip((0, *at), at)):
            segment = replace(self.solver, max_steps=steps)
            with self._hinting(x, z0):
                z = self._solve(x, z, held, segment, PhantomAdjoint(steps=1), "ignore").value
            states.append(self.readout(z))
        solution = self._solve(x, z, held, self.solver, self._listening(), self.on_failure)
        self._remember(solution, index)
        return [*states, self.readout(solution.value)]

    def extra_repr(self) -> str:
        """The solver and the adjoint, for `repr`."""
        return f"solver={self.solver}, adjoint={type(self.adjoint).__name__}"

    def _solve(
        self, x: Any, z0: Any, held: tuple[dict, dict], solver: Solver, adjoint: Adjoint, on_failure: str
    ) -> Solution:
        tensors, dims = held
        of_samples = _of_samples(x, z0) if self.batch_dims else None
        f, args, in_dims = self.cell, (x,), (of_samples,)
        if tensors or any_drops_out(self.cell.modules()):  # the user has been warned of such dropout
            f, args, in_dims = _Held(self.cell), (x, tensors), (of_samples, dims)
        return fixed_point(
            f,
            z0,
            *args,
            solver=solver,
            adjoint=adjoint,
            batch_dims=self.batch_dims,
            in_dims=in_dims if self.batch_dims else None,
            on_failure=on_failure,
            compile=self.compile_solve,
        )

    def _hinting(self, x: Any, z0: Any) -> AbstractContextManager[None]:
        """A context that, if the cell raises an error, adds a note about the default initial state."""
        chosen = z0 is not None or self.init is not _zeros_like
        return nullcontext() if chosen or torch.compiler.is_dynamo_compiling() else _start_unlike_z(x)

    def _begin(self, x: Any, z0: Any, index: Tensor | None) -> tuple[Any, tuple[dict, dict]]:
        """The initial state of the solve, and the quantities that the cell holds constant during it."""
        if index is not None and self.warm_start is None:
            raise ValueError(
                "DEQ: index identifies samples for a warm start, which this layer does not have: leave it "
                "out, or build the layer with warm_start=LastEpoch(size)"
            )
        warn_of_changing(self, self.cell)
        deciding = decides(self.cell)
        if isinstance(self.cell, StartingCell) and (deciding or z0 is None):
            # What is decided has a gradient; the initial state needs one only if autograd sees the whole solve.
            unrolled = isinstance(self.adjoint, UnrolledAdjoint)
            with torch.set_grad_enabled(torch.is_grad_enabled() and (deciding or unrolled)):
                cold, held = decided_in(self.cell.begin, self.cell, x)
            cold = cold if unrolled else pytree.tree_map(torch.detach, cold)
            return self._warmed(cold, index) if z0 is None else z0, held
        with self._hinting(x, z0):
            start = self.init(x) if z0 is None else z0
        start = self._warmed(start, index) if z0 is None else start
        with self._hinting(x, z0):
            return start, decide_once(self.cell, pytree.tree_map(torch.detach, start), x)

    def _warmed(self, cold: Any, index: Tensor | None) -> Any:
        if self.warm_start is None or not self.training or _is_mapped(cold, index):
            return cold
        warm = self.warm_start.start(cold, index)
        return cold if warm is None else warm

    def _remember(self, solution: Solution, index: Tensor | None) -> None:
        tensors = (solution.value, solution.status, solution.residual, solution.steps)
        value, status, residual, steps = pytree.tree_map(lambda t: unwrapped(t.detach()), tensors)
        self.solution = Solution(value, status, residual, steps, solution.evaluations)
        if self.warm_start is None or not self.training or _is_mapped(solution.value, index):
            return
        if torch.compiler.is_dynamo_compiling() or not under_transform():
            self.warm_start.store(value, index)
        else:  # the stored state outlives the transform, which would otherwise wrap it
            with torch._C._DisableFuncTorch():  # pyright: ignore[reportPrivateUsage]
                self.warm_start.store(value, index)

    def _listening(self) -> Adjoint:
        self.backward_solution = None
        if not isinstance(self.adjoint, ImplicitAdjoint) or torch.compiler.is_dynamo_compiling():
            return self.adjoint

        def listen(found: Found) -> None:
            self.backward_solution = as_solution(found)
            if isinstance(self.adjoint, ImplicitAdjoint) and self.adjoint.listen is not None:
                self.adjoint.listen(found)

        return replace(self.adjoint, listen=listen)


def _is_mapped(*trees: Any) -> bool:
    """Whether tensors of the pytrees are mapped by `torch.func.vmap`; stored states lack the mapped dimension."""
    if torch.compiler.is_dynamo_compiling() or not under_transform():
        return False
    return any(isinstance(leaf, Tensor) and is_batched(leaf) for leaf in pytree.tree_leaves(trees))


def _of_samples(x: Any, z0: Any) -> Any:
    """For each tensor of x the dimension that holds the samples: 0, or None for a number."""
    # No sets and no `len`: both would specialise a size that the tracer leaves symbolic.
    sizes = [leaf.shape[0] for leaf in pytree.tree_leaves(z0) if isinstance(leaf, Tensor) and leaf.ndim]
    for leaf in pytree.tree_leaves(x):
        if isinstance(leaf, Tensor) and leaf.ndim and any(size != leaf.shape[0] for size in sizes):
            raise ValueError(
                f"DEQ: x has a tensor of shape {tuple(leaf.shape)}, but z0 has {min(sizes)} samples, and both "
                "need one entry per sample in dimension 0. What all samples share can be a 0-d tensor in x, or "
                "a parameter or buffer of the cell; with batch_dims=0, for a cell that couples samples, anything"
            )
    return pytree.tree_map(lambda leaf: 0 if isinstance(leaf, Tensor) and leaf.ndim else None, x)


# If z does not have the form that the cell expects, the message of the resulting error (raised by the cell, what
# it calls, or the solve) contains one of these words. The last ones are for attributes of a tensor, keys of a
# dict, and an x that holds more than tensors.
_OF_ITS_FORM = ["shape", "size", "dimension", "structure", "tuple", "dict", " list", "unpack", "z0"]
_OF_ITS_FORM += ["'Tensor' object", "data type 'str'", "zeros_like()"]


@contextmanager
def _start_unlike_z(x: Any) -> Iterator[None]:
    """Add a note to errors that a wrong form of z may have caused: the initial state was zeros like `x`."""
    try:
        yield
    except (RuntimeError, ValueError, TypeError, AttributeError, LookupError) as error:
        known = isinstance(error, SolverError) or hasattr(error, "__notes__")
        # A missing key or index may be one of z, whatever the message says.
        of_its_form = isinstance(error, LookupError) or any(word in str(error) for word in _OF_ITS_FORM)
        if of_its_form and not known:
            first = next(iter(x), 0) if isinstance(x, dict) else 0
            start = "x.new_zeros(len(x), size)" if isinstance(x, Tensor) else f"torch.zeros_like(x[{first!r}])"
            error.add_note(
                "DEQ: the start was zeros like x. Where z has another shape or structure than x, pass "
                f"init=lambda x: {start}, or z0"
            )
        raise


@dataclass(frozen=True)
class _Held:
    """The cell as a function that also takes the tensors that it holds constant during a solve."""

    cell: nn.Module

    looked_at: ClassVar[bool] = True  # by `warn_of_changing`

    def __call__(self, z: Any, x: Any, held: dict[str, Tensor]) -> Any:
        # Each name belongs to one module, so nothing is tied. With tie_weights, torch would fail to restore the
        # tensors of a module that the cell holds under two names.
        return functional_call(self.cell, held, (z, x), tie_weights=False)
