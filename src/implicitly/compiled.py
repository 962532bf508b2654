"""`compile=True`: a whole solve as one graph of `torch.compile`, with the cache of graphs."""

from __future__ import annotations

import logging
import math
import re
import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._C import _autograd as autograd  # pyright: ignore[reportAttributeAccessIssue]

from implicitly.condition import Condition, Graphs, Map, is_usable, users_line
from implicitly.graph_break import REASON
from implicitly.host import LOOPS, carrying
from implicitly.implicit import search
from implicitly.iterate import DRIFTED, Found, Solver
from implicitly.keys import Key
from implicitly.linearised import CannotSplitError, split_pullback
from implicitly.transforms import is_cpu
from implicitly.tree import row_norm

_Shapes = tuple[tuple[tuple[int, ...], tuple[int, ...], torch.dtype, torch.device], ...]
_Places = tuple[tuple[int, int], ...]

# Most graphs kept, of which a trajectory has two; each keeps its function, and so its parameters, alive.
CAPACITY = 32
# After this many graphs of one function a warning says that too many are made, and after as many more again; the
# same for graphs that were dropped after one use.
MANY = 8
# Bytes of a state above which a backward solve on a CPU has no graph, since products take nearly all of its time.
LARGE = 2**18

_graphs: OrderedDict[Hashable, _Graph] = OrderedDict()
_problems: OrderedDict[Hashable, _Made] = OrderedDict()
_counts: OrderedDict[Hashable, _Count] = OrderedDict()
_reasons: OrderedDict[Hashable, str] = OrderedDict()  # why a function has no graphs
_dropped: list[str] = []  # names of graphs used only once, since the last warning about them
_lock = threading.Lock()


class CompileWarning(UserWarning):
    """A solve could not be compiled and runs eagerly, or is recompiled again and again."""


@dataclass(frozen=True)
class CompiledSolve:
    """A solve of which `compile=True` keeps a graph.

    Attributes:
        name: the name of the problem and its solver.
        shapes: shape and dtype of each tensor that enters the graph; None for sizes that may vary.
        first_call_s: seconds of the first call, nearly all spent on compilation; None until it has ended.
        calls: number of calls of the graph that gave a result.
        fallback: why there is no graph and the eager loop runs; None where there is a graph.
    """

    name: str
    shapes: tuple[tuple[tuple[int | None, ...], torch.dtype], ...]
    first_call_s: float | None
    calls: int
    fallback: str | None


class _NotTracedError(Exception):
    """The compiler did not trace a function that it was given."""


@dataclass(frozen=True)
class Make:
    """Makes the function of a graph, if that is costly, given the (tensor, dimension) of sizes left open."""

    make: Callable[[_Places], Callable[..., Any]]


@dataclass(frozen=True)
class Check:
    """A check to run before a graph is first used in a `mode`; it raises what is wrong.

    It also runs once after the graph was made anew because something that f is made of has changed.
    """

    of: Callable[[], Tensor]
    mode: Hashable


@dataclass
class _Graph:
    """A graph in the cache, with its statistics.

    `varying` holds the (tensor, dimension) of sizes left open; `checked` the modes in which its `Check` has run.
    """

    name: str
    index: tuple[Hashable, Hashable]  # its key in the cache
    shapes: _Shapes
    varying: _Places
    run: Callable[..., Any] | None = None  # None before the first call
    first_call_s: float | None = None
    calls: int = 0
    fallback: str | None = None
    abandoned: bool = False  # whether it was given up, perhaps while compiling
    anew: bool = False  # whether the compiler made one that is not yet counted
    checked: set[Hashable] = field(default_factory=set)
    making: threading.RLock = field(default_factory=threading.RLock)  # held through the first call

    def begin_anew(self) -> None:
        """Note that the compiler makes a graph, perhaps because something that f is made of changed."""
        self.checked.clear()
        self.anew = True

    def mark(self, tensors: Sequence[Tensor]) -> None:
        """Mark the sizes that vary, for the compiler."""
        for i, dim in self.varying:
            torch._dynamo.mark_dynamic(tensors[i], dim)

    def report(self) -> CompiledSolve:
        """This graph as the user sees it, in `compile_statistics`."""
        shapes = tuple((shape, dtype) for shape, _, dtype, _ in _opened(self.shapes, self.varying))
        return CompiledSolve(self.name, shapes, self.first_call_s, self.calls, self.fallback)


@dataclass
class _Made:
    """What is known of the graphs made for one key: the shapes of the last, and which sizes vary."""

    last: _Shapes | None = None
    varying: _Places = ()
    fixed: bool = False  # whether a graph of varying sizes failed
    carried: bool = False  # whether a graph with a loop that writes failed, see `host.Loops`


@dataclass
class _Count:
    """The number of graphs made for one function and solver, and the shapes of the last one."""

    made: int = 0
    last: _Shapes = ()


def compile_statistics() -> tuple[CompiledSolve, ...]:
    """The solves of which `compile=True` keeps graphs, from the least to the most recently used.

    It is a snapshot; later solves do not change it. A process keeps at most 32 graphs (`CAPACITY`).
    """
    with _lock:
        return tuple(graph.report() for graph in _graphs.values())


def run_as_graph(
    name: str,
    key: Hashable,
    function: Callable[..., Any] | Make,
    *tensors: Tensor,
    varies: bool = False,
    in_c: bool = True,
    is_right: Callable[[Any], bool] | None = None,
    check: Check | None = None,
) -> Any:
    """Run `function(*tensors)` as one graph, kept under `key` and the layouts and dtypes of `tensors`.

    Returns None where no graph can be made; a `CompileWarning` that begins with `name` says so once.

    `key` must identify everything else that decides what the graph computes: the user's function, its layout, its
    static arguments, the solver. A graph in the cache runs in place of any `function` of the same key; a `Make` is
    called only where there is no graph. If the batch `varies`, the graph for a second batch size leaves that size
    open. `in_c` says whether the graph may have a C++ wrapper: where a loop takes no step, as most nested loops do
    at some time, that of PyTorch 2.13 returns the loop's inputs as its outputs, and lets others write to them.
    Threads that need the same graph wait for the one of them that makes it.

    If `is_right` rejects the result of a graph, because of a change that `key` does not show, another graph is
    made; but if this one had given at most one right answer, none can be made. What `check` raises, this raises.
    """
    sparse = any(t.layout is not torch.strided for t in tensors)
    tensors = tensors if sparse else _plain(tensors)
    shapes = tuple((tuple(t.shape), () if sparse else t.stride(), t.dtype, t.device) for t in tensors)
    kinds = tuple(type(t) for t in tensors if type(t) is not Tensor)
    graph = _kept(name, (key, kinds) if kinds else key, shapes, varies)
    again = partial(run_as_graph, name, key, function, *tensors, in_c=in_c, is_right=is_right, check=check)
    with graph.making if graph.first_call_s is None else nullcontext():
        if graph.abandoned:
            return again(varies=varies)
        run = graph.run  # read first: the fallback is noted before the graph is released
        if graph.fallback is not None:
            return None
        if sparse:
            return _fall_back(graph, "f uses a sparse tensor, and the compiler knows none", 0.0)
        new = check is not None and check.mode not in graph.checked
        if check is not None and new:
            check.of()
        if run is None and (run := _begun(graph, function, in_c)) is None:
            return again() if graph.abandoned else None
        outcome = _outcome(graph, run, tensors, is_right)
    if outcome is _TRY_AGAIN:
        return again()  # this time without an open size
    if check is not None and check.mode not in graph.checked:
        if not new:
            check.of()
        graph.checked.add(check.mode)
    return outcome


def _plain(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """`tensors`, detached and each with memory of its own.

    Detached, so that whether a gradient is wanted is no reason to recompile. With their own memory, since a loop
    refuses tensors that are passed twice, or parts of one tensor.
    """
    tensors = tuple(t.detach() for t in tensors)
    tensors = tuple(t.resolve_conj().resolve_neg() if t.is_conj() or t.is_neg() else t for t in tensors)
    memory = [t.untyped_storage()._cdata for t in tensors]
    if len(set(memory)) == len(memory):  # the usual case
        return tensors
    return tuple(t.clone() if memory[i] in memory[:i] else t for i, t in enumerate(tensors))


# The outcome of a call of a graph that was dropped.
_TRY_AGAIN = object()


def _outcome(
    graph: _Graph,
    run: Callable[..., Any],
    tensors: tuple[Tensor, ...],
    is_right: Callable[[Any], bool] | None,
) -> Any:
    """The result of `graph`; None where there is no graph; or `_TRY_AGAIN`."""
    begin, done = time.perf_counter(), False
    refusal = autograd._saved_tensors_hooks_get_disabled_error_message()
    from torch._dynamo.exc import FailOnRecompileLimitHit

    try:
        graph.mark(tensors)
        with _quietly() if graph.varying else nullcontext():
            out = run(*tensors)
        if is_right is None or is_right(out):
            done = True
            _note_call(graph, time.perf_counter() - begin)
            return out
        if graph.calls < 2:
            done = True
            reason = "what f computes has changed in a way that the compiler does not see"
            reason = reason if graph.calls else "the result of the graph is wrong"
            _fall_back(graph, reason, time.perf_counter() - begin)
            return None
    except _NotTracedError:  # from now on the compiler skips this code, so the graph is dropped
        warnings.warn(
            f"{graph.name}: torch.compile is disabled here, for example by an active TorchDispatchMode; the eager "
            "loop runs instead of a graph",
            CompileWarning,
            stacklevel=users_line(),
        )
        return None
    except FailOnRecompileLimitHit:  # made anew for one attribute of f after another
        if not graph.calls:  # the user allows no recompilation
            raise
        return _TRY_AGAIN
    except _failures() as error:  # if f is wrong, the eager loop says so
        _allow_hooks(refusal)
        made = _problems.setdefault(graph.index[0], _Made())
        if not graph.varying and not made.carried and "TransformType::Functionalize" in str(error):
            made.carried = True  # f differentiates
            return _TRY_AGAIN
        if not graph.varying:
            done = True
            reason = f"{type(error).__name__}: {_reason(error)}"
            _fall_back(graph, reason, time.perf_counter() - begin, always=all(t.numel() for t in tensors))
            return None
        made.fixed = True
    finally:
        if not done:  # perhaps interrupted while compiling: it is not used again
            _abandon(graph)
    return _TRY_AGAIN


def _failures() -> tuple[type[Exception], ...]:
    """The exceptions that the compiler raises where it cannot make a graph."""
    # Imported on first use: the compiler takes as long to import as all of torch.
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import InductorError
    from torch.fx.experimental.symbolic_shapes import ConstraintViolationError, GuardOnDataDependentSymNode

    # Loops that it cannot nest raise a bare AssertionError.
    known = TorchDynamoException, InductorError, AssertionError
    return *known, ConstraintViolationError, GuardOnDataDependentSymNode


@contextmanager
def _quietly() -> Iterator[None]:
    """A context without what the compiler logs in this thread before it raises that a size cannot be left open."""
    log, thread = logging.getLogger("torch._guards"), threading.get_ident()
    others = lambda record: record.thread != thread  # noqa: E731
    log.addFilter(others)
    try:
        yield
    finally:
        log.removeFilter(others)


def _abandon(graph: _Graph) -> None:
    """Remove `graph` from use."""
    with _lock:
        graph.abandoned = True
        if _graphs.get(graph.index) is graph:
            del _graphs[graph.index]


def _note_call(graph: _Graph, seconds: float) -> None:
    """Count a call of `graph`, which took `seconds`, and any graph that the compiler made anew in it."""
    message = None
    with _lock:
        if graph.anew and graph.calls:
            message = _counted(graph.name, graph.index[0], graph.shapes)
        graph.anew = False
        graph.calls += 1
        graph.first_call_s = graph.first_call_s or seconds
    if message is not None:
        warnings.warn(message, CompileWarning, stacklevel=users_line())


def _allow_hooks(refusal: str | None) -> None:
    """Restore whether hooks on saved tensors are refused (with the message `refusal`) or allowed (None).

    Where the compiler fails in the middle of a transform, it leaves them refused for this thread.
    """
    if refusal is None:
        autograd._saved_tensors_hooks_enable()
    else:
        autograd._saved_tensors_hooks_disable(refusal)


def _kept(name: str, key: Hashable, shapes: _Shapes, varies: bool) -> _Graph:
    """The graph in the cache for `key` and `shapes`; it is put there first where it is missing."""
    messages = []
    with _lock:
        graph = _graphs.get((key, shapes))
        key = key if graph is None else graph.index[0]  # one object for equal keys is found faster
        made = _problems.setdefault(key, _Made())
        _problems.move_to_end(key)
        if graph is not None:  # the usual case
            _graphs.move_to_end(graph.index)
            return graph
        if made.last is not None and not made.varying:
            made.varying = _vary(made.last, shapes)
        fits = varies and not made.fixed and _can_vary(shapes, made.varying)
        varying = made.varying if fits else ()
        index = (key, _opened(shapes, varying))
        if index not in _graphs:
            made.last = shapes
            graph = _graphs[index] = _Graph(name, index, shapes, varying)
            if (reason := _reasons.get((name, _function_of(key, whole=True)))) is not None:
                graph.fallback, graph.first_call_s, graph.run = reason, 0.0, _released
            else:
                messages.append(_counted(name, key, shapes))
        _graphs.move_to_end(index)
        graph = _graphs[index]
        messages.append(_within_capacity())
    for message in filter(None, messages):
        warnings.warn(message, CompileWarning, stacklevel=users_line())
    return graph


def _function_of(key: Hashable, whole: bool = False) -> Hashable:
    """`key` with each `Key` reduced to its function; if `whole`, to everything but the layout of the state."""
    if isinstance(key, Key):
        return Key(key.parts[0], *key.parts[2:]) if whole else key.parts[0]
    return tuple(_function_of(part, whole) for part in key) if isinstance(key, tuple) else key


def _counted(name: str, key: Hashable, shapes: _Shapes) -> str | None:
    """Count a graph that is made under `key`; returns a warning message if there are many."""
    index = (name, _function_of(key))
    count = _counts.setdefault(index, _Count())
    _counts.move_to_end(index)
    count.made += 1
    last, count.last = count.last, shapes
    if count.made % MANY:
        return None
    return (
        f"{name}: compile=True makes graph {count.made} for the same function, as {_change(last, shapes)}; pad "
        "batches to a few sizes, pass numbers that change as tensors, or use compile=False"
    )


def _within_capacity() -> str | None:
    """Drop the least recently used graphs; returns a warning message if many of them were used only once."""
    while len(_graphs) > CAPACITY:
        _, graph = _graphs.popitem(last=False)
        if graph.calls == 1:
            _dropped.append(graph.name)
    for kept in (_problems, _counts, _reasons):
        while len(kept) > CAPACITY:
            kept.popitem(last=False)
    if len(_dropped) < MANY:
        return None
    name = _dropped[-1]
    _dropped.clear()
    return (
        f"{name}: compile=True keeps {CAPACITY} graphs, and {MANY} were dropped that had been used only "
        "once; a function that is created anew for each call, such as a lambda, needs a new graph each time: "
        "create it once and pass what changes in args, or use compile=False"
    )


def _begun(graph: _Graph, function: Callable[..., Any] | Make, in_c: bool) -> Callable[..., Any] | None:
    """The function to run as `graph`; None where none can be made, which is then noted, or it is abandoned."""
    made = _problems.setdefault(graph.index[0], _Made())
    if isinstance(function, Make):
        begin = time.perf_counter()
        try:
            function = function.make(graph.varying)
        except CannotSplitError as error:
            if graph.varying:
                made.fixed = True
                _abandon(graph)
            else:
                _fall_back(graph, str(error), time.perf_counter() - begin)
            return None
    function = carrying(function) if made.carried else function
    # The C++ wrapper of PyTorch 2.11 fails at loops.
    in_c = in_c and LOOPS.known and all(device.type == "cpu" for *_, device in graph.shapes)
    graph.run = _compile(function, None if graph.varying else False, in_c, graph.begin_anew)
    return graph.run


def _fall_back(graph: _Graph, reason: str, seconds: float, always: bool = False) -> None:
    """Note that `graph` cannot be made (if `always`, nor for other shapes of its function), and warn of it."""
    with _lock:
        if always:
            _reasons[graph.name, _function_of(graph.index[0], whole=True)] = reason
        told = graph.fallback is not None
        graph.fallback, graph.first_call_s = reason, seconds
        graph.run = _released
    if told:  # another thread has warned
        return
    warnings.warn(
        f"{graph.name}: compile=True could not make one graph ({reason}); the eager loop runs instead",
        CompileWarning,
        stacklevel=users_line(),
    )


def _vary(old: _Shapes, new: _Shapes) -> _Places:
    """The places of the batch size, if all that changed is one size that became another; else none."""
    if [(len(a[0]), *a[2:]) for a in old] != [(len(b[0]), *b[2:]) for b in new]:
        return ()
    changes = {
        (i, dim): (m, n)
        for i, (a, b) in enumerate(zip(old, new))
        for dim, (m, n) in enumerate(zip(a[0], b[0]))
        if m != n
    }
    return tuple(changes) if len(set(changes.values())) == 1 else ()


def _can_vary(shapes: _Shapes, varying: _Places) -> bool:
    """Whether sizes at `varying` can be left open.

    The compiler specialises on the sizes 0 and 1. For a tensor that is not contiguous, it would have to be told
    how strides follow from sizes, unless no stride does: where samples follow one another in memory.
    """

    def can(shape: tuple[int, ...], strides: tuple[int, ...], dim: int) -> bool:
        in_rows = dim == 0 and strides[0] > sum((n - 1) * stride for n, stride in zip(shape[1:], strides[1:]))
        return shape[dim] > 1 and (in_rows or _is_contiguous(shape, strides))

    return all(can(*shapes[i][:2], dim) for i, dim in varying)


def _is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    return strides == tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


def _opened(shapes: _Shapes, varying: _Places) -> tuple[tuple[Any, ...], ...]:
    """`shapes` with None for sizes at `varying`, and for strides that follow from them."""
    opened: list[tuple[Any, ...]] = list(shapes)
    for i, dim in varying:
        shape, strides, *rest = opened[i]
        strides = None if strides is None or _is_contiguous(*shapes[i][:2]) else strides
        opened[i] = ((*shape[:dim], None, *shape[dim + 1 :]), strides, *rest)
    return tuple(opened)


def _change(old: _Shapes, new: _Shapes) -> str:
    """A description of what differs between the tensors of two graphs."""
    pairs = enumerate(zip(old, new))
    changes = [f"its tensor {i} changed from {_shown(*a)} to {_shown(*b)}" for i, (a, b) in pairs if a != b]
    return ", ".join(changes) or "an argument or an attribute of f changed, or its graph was dropped for others"


def _shown(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> str:
    memory = "" if _is_contiguous(shape, strides) else f" with strides {strides}"
    return f"{shape}{memory}, {dtype} on {device}"


def _released(*tensors: Tensor) -> Any:
    """Stands for a graph that failed, which would keep its function alive."""
    raise RuntimeError("there is no graph")


def _reason(error: BaseException) -> str:
    """Why no graph can be made, in words: a known cause, or the first line of the error.

    The next line is added where the first one only announces it.
    """
    if nested := re.search(rf"{re.escape(REASON)} \((\w+)\)", str(error)):
        return f"f itself calls {nested[1]}, and a graph cannot hold one solve inside of another"
    if "Encountered aliasing" in str(error):
        return (
            "f returns, or takes from outside of args and parameters, two tensors that share memory, which a loop "
            "refuses; make one a copy by .clone()"
        )
    if "data-dependent expression" in str(error):
        return "f decides by a number of its tensors, or by a size that depends on their numbers"
    if "Expected FakeTensor, got" in str(error):
        return (
            "f takes .T, or the like, of a tensor that it closes over; pass it in args, or write transpose(-2, -1)"
        )
    if "_tensor_constant" in str(error):
        return "f makes a tensor of numbers, which the compiler forgets to declare in a loop; make it outside of f"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no reason given"]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])


def _compile(
    function: Callable[..., Any], dynamic: bool | None, in_c: bool, anew: Callable[[], None]
) -> Callable[..., Any]:
    """Compile `function` as one graph; `anew` is called each time that the compiler makes one."""
    from implicitly.known_views import KnownViews  # which imports the compiler

    def filtered(guards: Sequence[Any]) -> list[bool]:
        anew()
        return [_is_worth_a_look(guard.name) for guard in guards]

    def solve(*tensors: Tensor) -> Any:
        if not torch.compiler.is_dynamo_compiling():
            raise _NotTracedError
        return function(*tensors)

    # The compiler keeps its graphs on the code object, so each function needs one of its own.
    solve.__code__ = solve.__code__.replace(co_name="solve_as_graph")
    options: dict[str, Any] = {"guard_filter_fn": filtered, "post_grad_custom_pre_pass": KnownViews()}
    if in_c:
        # Compiled separately, with few optimisations, it takes half as long, and the graph runs as fast.
        options |= {"cpp_wrapper": True, "cpp_wrapper_build_separate": True}
    return torch.compile(solve, fullgraph=True, dynamic=dynamic, options=options)


# Guards that need no check in each call: a graph's key holds all that decides about its inputs and our own objects
# (the first input tells of modes that count operations), and no module of the compiler or of ours changes, except
# for the hooks of all modules.
_KNOWN = re.compile(
    r"(\w+\(|\.keys\()*((L\[')?tensors\b(?!('\])?\[0\]$)|__import__\('|G\['("
    r"__import_(torch|implicitly)_dot_(?!.*\._global_)|torch'|__builtins|___unnamed_scope_\w+'\]($|\['_tuple_new)))"
)
_OURS = re.compile(r"\b(args_\w+|spec|places|leaves|parameters|method(?!\.norm)|host\._(?!modules)\w+)\b")
# Where the user's part of a name begins: f, what is in args, a module, a norm, a global. What follows may have the
# same names as our own objects.
_USERS = re.compile(r"\.f\b|\.static\[|\._modules\[|\.norm\b|\bG\[")


def _is_worth_a_look(name: str) -> bool:
    """Whether the guard on the object of this name is checked in each call: only those on what f is made of.

    There are one or two thousand guards in all, and checking them takes as long as a short solve.
    """
    return not (_KNOWN.match(name) or _OURS.search(_USERS.split(name, maxsplit=1)[0]))


def as_graphs(condition: Condition, key: Hashable) -> Condition:
    """`condition`, solved as one graph, and with another graph for the linear solve of reverse mode.

    Graphs are kept under the condition's name, `key`, the solver, and the shapes and dtypes of the tensors. Where
    no graph, or no right one, can be made, a `CompileWarning` says why and the eager loop runs.
    """
    solves = _Solves(condition, key)
    return replace(condition, graphs=Graphs(solves.search, solves.pullback))


@dataclass
class _Solves:
    """The solves of the condition `own`; `eager` is set where it has no graph, so that no other one is tried."""

    own: Condition
    key: Hashable
    eager: bool = False

    def search(
        self, solver: Solver, condition: Condition, z0: Tensor, theta: tuple[Tensor, ...], r0: Tensor | None = None
    ) -> Found:
        """Like `implicit.search`, for `own`; eagerly for any other condition: `own` as mapped by `vmap`."""
        own = self.own
        if condition.graphs is None:
            return search(solver, condition, z0, theta, r0)
        r0 = own.residual(z0, *theta) if r0 is None else r0
        name = f"{own.name} with {solver.label or type(solver).__name__}"
        bare = own.bare()

        def solve(z0: Tensor, r0: Tensor, *theta: Tensor) -> Found:
            return search(solver, bare, z0, theta, r0)

        key = (own.name, self.key, solver)
        start = z0.contiguous(), r0.contiguous()  # so that a loop keeps their strides
        found = run_as_graph(name, key, solve, *start, *theta, varies=True, in_c=not solver.nests)
        self.eager = found is None
        return search(solver, own, z0, theta, r0) if found is None else Found(*found)

    def pullback(
        self, solver: Solver, condition: Condition, u0: Tensor, theta: tuple[Tensor, ...], b: Tensor
    ) -> Found:
        """Like `implicit.search`, for the linear `condition` of reverse mode, with `theta` (b, z, ...)."""
        found, name = None, f"{condition.name} with {solver.label or type(solver).__name__}"
        eager = partial(search, solver, condition, u0, theta, b)
        told: list[Found] = []  # by the eager loop, after a graph with samples without a solution

        def is_right(found: tuple[Any, ...]) -> bool:
            told.clear()
            if not is_as_claimed(solver, condition, theta, found):
                return False
            usable = is_usable(found[1])
            if bool(usable.all()):
                return True
            # No product can tell whether the system has no solution or the graph is that of another system.
            told.append(eager())
            return torch.equal(usable, is_usable(told[0].status))

        small = not is_cpu(b) or b.nbytes <= LARGE
        if small and not self.eager:
            make = Make(partial(_transposed_search, solver, condition, self.own.residual, theta[1:]))
            key = (self.own.name, self.key, solver, "pullback")
            tensors = (b.contiguous(), *theta[1:])  # so that a loop keeps its strides
            found = run_as_graph(name, key, make, *tensors, varies=True, in_c=not solver.nests, is_right=is_right)
        if told or found is None:
            return told[0] if told else eager()
        found = Found(*found)
        return found._replace(evaluations=found.evaluations + 1)  # plus the product in `is_as_claimed`


def _transposed_search(
    solver: Solver,
    condition: Condition,
    residual: Callable[..., Tensor],
    theta: tuple[Tensor, ...],
    varying: _Places,
) -> Callable[..., Found]:
    """The `search` for the linear `condition`, from zero, as a function of its tensors (b, z, ...).

    The operator is the pullback of `residual` at `theta` (z, ...). Sizes of the tensors at `varying` are open.
    """
    prepare, pull = split_pullback(residual, theta[0], theta[1:], [(i - 1, dim) for i, dim in varying if i > 0])

    def bind(*inputs: Tensor) -> Map:
        saved = prepare(*inputs)
        return lambda u: -pull(u, *saved)

    condition = replace(condition.bare(), bind=bind)
    return lambda b, *inputs: search(solver, condition, torch.zeros_like(b), (b, *inputs), b, verify=False)


def is_as_claimed(solver: Solver, condition: Condition, theta: tuple[Tensor, ...], found: tuple[Any, ...]) -> bool:
    """Whether the result `found` by a graph for the linear `condition` is right, by a product outside of it."""
    claimed, b = Found(*found), theta[0]
    residual = row_norm(condition.at(*theta)(claimed.z))
    least = max(solver.tolerances(condition.dtype)[0], 10 * torch.finfo(b.dtype).eps)
    limit = DRIFTED * torch.maximum(claimed.residual, least * row_norm(b))
    return not bool((is_usable(claimed.status) & ~(residual <= limit)).any())
