"""Functions with everything they depend on made explicit."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree

from implicitly.exchange import Home, claimed, exchanged
from implicitly.inference import Normal, copied, normal_if_needed
from implicitly.keys import Key, exact, hooks_of
from implicitly.reached import modules_and_tensors, parts_of
from implicitly.transforms import (
    casts,
    full_precision,
    has_tangent,
    is_tracked,
    is_wrapped,
    levels,
    records,
    under_transform,
    version,
)
from implicitly.tree import Layout

# Stands for a tensor among the leaves of args.
_GAP = object()
_NO_ARGS = pytree.tree_flatten(())


class _Slot(NamedTuple):
    """A place where a module holds a parameter or a buffer, and that tensor."""

    holder: dict[str, Any]
    name: str
    tensor: Tensor

    @property
    def now(self) -> Tensor | None:
        """The tensor that the module holds there now."""
        # The holder in a module of TorchScript has no `get`.
        return self.holder[self.name] if self.name in self.holder else None  # noqa: SIM401


@dataclass(frozen=True)
class Opened:
    """f as a function of its state and of all tensors it depends on: `opened(z, *theta)` is `f(z, *args)`.

    `theta` holds first the tensors of `args`, then tensors in place of the `parameters` (and of buffers, where a
    derivative reaches them) of every module that f is, is bound to, closes over or refers to. No tensor of `args`
    is kept here, so that this object may outlive them.
    """

    f: Callable[..., Any]
    parameters: tuple[Tensor, ...]
    modules: tuple[nn.Module, ...]  # that f uses
    places: tuple[tuple[str, int], ...]  # where in `host` each parameter goes; tied ones go to several
    homes: tuple[Home, ...]  # the dict that holds it there, and its name
    args_spec: pytree.TreeSpec
    static: tuple[Any, ...]  # the leaves of args, with a gap where a tensor goes
    device_type: str  # of the state
    autocast: torch.dtype | None
    default_device: torch.device | None  # where it is not the CPU
    parts: tuple[nn.Module, ...] = ()  # the modules with all their submodules
    constants: tuple[tuple[str, Tensor, int], ...] = ()  # other tensors used: name, first version
    args_are_leaves: bool = False  # whether args are their own leaves, so that no tracer must unflatten them
    normal: Normal | None = None  # if f uses tensors made in inference mode
    slots: tuple[_Slot, ...] = ()  # of all parts
    suspects: tuple[tuple[str, Tensor], ...] = ()  # tensors whose gradient would be lost if f uses them

    def snapshot(self) -> Callable[[], AbstractContextManager[None]]:
        """Record the state of f; returns a context that restores it, for a derivative that calls f later.

        Within the context the modules hold the parameters and buffers that they held at the snapshot: others may
        have taken their place since, and after `functional_call` always have. Entering the context raises
        RuntimeError where a tensor without a derivative that f uses was changed in place, as autograd does for
        tensors that it saved. Changes that f itself makes are not checked.
        """
        modes = tuple(part.training for part in self.parts)
        own = tuple((name, x, was) for name, x, was in self.constants if version(x) == was)
        with claimed(slot.holder for slot in self.slots):
            held = tuple(slot for slot in self.slots if slot.now is slot.tensor)
        return functools.partial(_as_then, self.parts, modes, own, held)

    @functools.cached_property
    def host(self) -> _Host:
        """All modules as one module."""
        return _Host(self.modules)

    def buffers(self) -> Iterator[Tensor]:
        """The buffers of all modules."""
        return (b for module in self.modules for b in module.buffers())

    def key(self, f: Callable[..., Any], layout: Layout) -> Hashable:
        """The cache key of a compiled solve: all that f depends on besides tensors. TypeError if not hashable."""
        self.__dict__["host"] = _host_of(self.modules)  # made now, as a trace cannot do it
        static = tuple(map(exact, self.static))
        # Hooks are told apart by unique numbers; the compiler would not notice one that is added or removed.
        hooks = tuple(number for part in self.parts for of in hooks_of(part) for number in of)
        # The batch size is left out; the tensors' shapes tell it.
        of_layout = (layout.spec, layout.leaves, layout.batch_dims, layout.dtype, layout.device)
        try:
            # Both: equal specs may have the keys 1 and True, and equal strings may name two classes of one name.
            args = (self.args_spec, str(self.args_spec), static)
            return Key(exact(f), of_layout, *args, self.modules, self.places, hooks, self.autocast)
        except TypeError as error:
            raise TypeError(
                "compile=True keeps the graph for calls with the same non-tensor args, so these must be hashable "
                f"({error}); pass tuples instead of arrays or lists, or compile=False"
            ) from error

    def __call__(self, state: Any, *theta: Tensor) -> Any:
        """f at `state`, with `theta` in place of the tensors it depends on."""
        return self.at(*theta)(state)

    def at(self, *theta: Tensor) -> Callable[[Any], Any]:
        """f with `theta` in place of the tensors it depends on, as a map of the state."""
        if torch.compiler.is_dynamo_compiling():
            return functools.partial(self._traced, theta)
        args, given = self._placed(theta)
        own = all(map(operator.is_, given, self.parameters))
        default, f = self.default_device, self.f
        usual = self.autocast is None and default is None and self.normal is None and not self.suspects

        def call(state: Any) -> Any:
            caches = parametrize._cache_enabled
            if usual and not (caches or casts(self.device_type)):
                if own and not (torch.is_grad_enabled() or under_transform()):  # the fast path to the same result
                    return f(state, *args)
                return self._call(own, given, state, args)
            # The backward pass must see the autocast state and the default device of the forward pass, wherever it
            # is called from. For an accelerator that is a thread of autograd's own, which has no default device.
            with (
                self._arithmetic(),
                default or nullcontext(),
                self.normal or nullcontext(),
                _uncached() if caches else nullcontext(),
            ):
                if self.suspects and not (torch.is_grad_enabled() or under_transform()):
                    return self._watched(own, given, state, args)
                return self._call(own, given, state, args)

        return call

    def _watched(self, own: bool, given: tuple[Tensor, ...], state: Any, args: tuple[Any, ...]) -> Any:
        """`_call` where nothing is recorded; ValueError if f uses a suspect, perhaps only in a later call."""
        with torch.enable_grad():
            value = self._call(own, given, state, args)
        nodes = set().union(*(_graph_of(x) for x in pytree.tree_leaves(value) if isinstance(x, Tensor)))
        variables = [x for node in nodes if (x := getattr(node, "variable", None)) is not None]
        used = [
            f"'{name}' of shape {tuple(x.shape)}"
            for name, x in self.suspects
            if x.grad_fn in nodes or any(x is v for v in variables)
        ]
        if used:
            _refuse(used)
        return pytree.tree_map_only(Tensor, torch.detach, value)

    def _traced(self, theta: tuple[Tensor, ...], state: Any) -> Any:
        # Views made inside the loop that calls this: where f takes W.T, the tracer looks for W in that loop.
        args, given = self._placed(tuple(x.view_as(x) for x in theta))
        exchanged = {name: given[i] for name, i in self.places}
        with nullcontext() if self.autocast is None and not casts(self.device_type) else self._arithmetic():
            if not exchanged:
                return self.f(state, *args)
            # `places` lists every place once. With tie_weights, a module that has two names would not be restored.
            return functional_call(self.host, exchanged, (self.f, state, *args), tie_weights=False)

    def _placed(self, theta: tuple[Tensor, ...]) -> tuple[tuple[Any, ...], tuple[Tensor, ...]]:
        """The args of f, and the tensors that take the place of its parameters."""
        count = len(theta) - len(self.parameters)
        tensors = iter(theta[:count])
        flat = tuple(next(tensors) if leaf is _GAP else leaf for leaf in self.static)
        return flat if self.args_are_leaves else pytree.tree_unflatten(flat, self.args_spec), theta[count:]

    def _arithmetic(self) -> AbstractContextManager[Any]:
        if self.autocast is None:
            return full_precision(self.device_type)
        return torch.autocast(self.device_type, self.autocast, cache_enabled=False)

    def _call(self, own: bool, given: tuple[Tensor, ...], state: Any, args: tuple[Any, ...]) -> Any:
        transformed = under_transform()
        if own and not transformed:
            if not torch.is_grad_enabled():
                return self.f(state, *args)
            with claimed(held for held, _ in self.homes):
                return self.f(state, *args)
        placed = [(home, given[i]) for home, (_, i) in zip(self.homes, self.places)]
        if transformed:  # torch.func refuses to change buffers in place, and derivatives should not update them
            placed += self._copied_buffers({(id(held), name) for held, name in self.homes})
        with exchanged(placed):
            return self.f(state, *args)

    def _copied_buffers(self, filled: set[tuple[int, str]]) -> list[tuple[Home, Tensor]]:
        """The places where the modules hold buffers, except those `filled`, with a copy of each buffer."""
        held = [
            (part._buffers, name, b)
            for part in self.parts
            for name, b in part._buffers.items()
            # A buffer that a transform maps is filled already, and where f is mapped anew, it cannot be copied.
            if b is not None and (id(part._buffers), name) not in filled
        ]
        copies = {id(b): b.clone() for *_, b in held}
        return [((home, name), copies[id(b)]) for home, name, b in held]


@contextmanager
def _uncached() -> Iterator[None]:
    """A context without torch's cache of parametrised weights.

    Weights cached in a solve have no derivative for others to use, and weights that others cached do not belong to
    the parameters exchanged here.
    """
    depth, parametrize._cache_enabled = parametrize._cache_enabled, 0
    try:
        yield
    finally:
        parametrize._cache_enabled = depth


@contextmanager
def _as_then(
    parts: tuple[nn.Module, ...],
    modes: tuple[bool, ...],
    constants: tuple[tuple[str, Tensor, int], ...],
    held: tuple[_Slot, ...],
) -> Iterator[None]:
    for name, x, was in constants:
        if version(x) != was:
            raise RuntimeError(
                f"f uses '{name}' of shape {tuple(x.shape)}, which was changed in place since the solve, and the "
                "derivative of the solve calls f again. Call backward before the change, or pass a copy in args"
            )
    moved = [(part, mode) for part, mode in zip(parts, modes) if part.training is not mode]
    with claimed(slot.holder for slot in held):
        replaced = [slot for slot in held if slot.now is not slot.tensor and slot.now is not None]
    for part, mode in moved:
        part.training = mode
    try:
        with exchanged([((slot.holder, slot.name), slot.tensor) for slot in replaced]):
            yield
    finally:
        for part, mode in moved:
            part.training = not mode


class Opening(NamedTuple):
    """The result of `open_function`: a function with everything it depends on.

    Attributes:
        theta: `opened(z, *theta)` is `f(z, *args)`.
        captured: tensors that f reaches in another way, each with the name by which it does.
    """

    opened: Opened
    theta: tuple[Tensor, ...]
    captured: tuple[tuple[str, Tensor], ...]


def open_function(
    f: Callable[..., Any], args: tuple[Any, ...], device: torch.device, inner: Callable[..., Any] | None = None
) -> Opening:
    """Find all that `f(z, *args)` depends on.

    If f calls only `inner`, that function is searched instead. `device` is the state's; its autocast setting is
    kept. In a traced graph only `args` are looked at, since autograd reaches all the rest by itself there.
    """
    if not callable(f):
        raise TypeError(f"f must be callable, got a {type(f).__name__}")
    flat, spec = pytree.tree_flatten(args) if args else _NO_ARGS
    args_are_leaves = len(flat) == len(args) and all(map(operator.is_, flat, args))
    given = tuple(leaf for leaf in flat if isinstance(leaf, Tensor))
    tensors = tuple(map(copied, given))
    static = tuple(_GAP if isinstance(leaf, Tensor) else leaf for leaf in flat)
    autocast = torch.get_autocast_dtype(device.type) if casts(device.type) else None
    if torch.compiler.is_dynamo_compiling():  # the tracer finds what else f depends on
        own = functools.partial(_on_a_copy, f)
        opened = Opened(
            own, (), (), (), (), spec, static, device.type, autocast, None, args_are_leaves=args_are_leaves
        )
        return Opening(opened, tensors, ())
    default = _default_device()
    modules, reached = modules_and_tensors(inner or f, args)
    captured = [(name, x) for name, x in reached if not any(x is t for t in given)]
    parts = parts_of(modules)
    with claimed(holder for part in parts.values() for holder in (part._parameters, part._buffers)):
        held = _held_by(parts)
    constants = (*held.constants, *((name, x, version(x)) for name, x in captured if not is_tracked(x)))
    suspects = tuple((name, x) for name, x in captured if is_tracked(x) and not is_wrapped(x)) if records() else ()
    opened = Opened(
        f,
        held.parameters,
        modules,
        held.places,
        held.homes,
        spec,
        static,
        device.type,
        autocast,
        default,
        tuple(parts.values()),
        constants,
        args_are_leaves,
        normal_if_needed((*(slot.tensor for slot in held.slots), *(x for _, x in reached))),
        held.slots,
        suspects,
    )
    return Opening(opened, (*tensors, *held.parameters), tuple(captured))


def _default_device() -> torch.device | None:
    """The default device of new tensors, or None if it is the CPU."""
    private: Any = torch
    # Setting a default device puts a mode on that stack. Asking torch for it takes a hundredth of a short solve.
    if not private._C._len_torch_function_stack():
        return None
    default = torch.get_default_device()
    return None if default.type == "cpu" else default


class _Held(NamedTuple):
    """What modules hold; see the fields of the same names in `Opened`."""

    parameters: tuple[Tensor, ...]
    places: tuple[tuple[str, int], ...]
    homes: tuple[Home, ...]
    constants: tuple[tuple[str, Tensor, int], ...]
    slots: tuple[_Slot, ...]


def _held_by(parts: dict[str, nn.Module]) -> _Held:
    """What the modules of these names hold; buffers of a module in training may change and are no constants."""
    index: dict[int, int] = {}
    parameters: list[Tensor] = []
    places: list[tuple[str, int]] = []
    homes: list[Home] = []
    constants: list[tuple[str, Tensor, int]] = []
    slots: list[_Slot] = []
    for prefix, module in parts.items():
        lazy: Any = module
        if isinstance(module, LazyModuleMixin) and lazy.has_uninitialized_params():
            raise ValueError(
                f"f contains a {type(module).__name__} whose parameters have no shapes yet; call f (or the cell "
                "of a layer) once before the first solve, as in cell(z, x)"
            )
        for home in (module._parameters, module._buffers):
            for name, tensor in home.items():
                if tensor is None:
                    continue
                slots.append(_Slot(home, name, tensor))
                if is_tracked(tensor):
                    if id(tensor) not in index:
                        index[id(tensor)] = len(parameters)
                        parameters.append(tensor)
                    places.append((f"{prefix}.{name}", index[id(tensor)]))
                    homes.append((home, name))
                elif not module.training or home is module._parameters:
                    constants.append((name, tensor, version(tensor)))
    return _Held(tuple(parameters), tuple(places), tuple(homes), tuple(constants), tuple(slots))


def _on_a_copy(f: Callable[..., Any], state: Any, *args: Any) -> Any:
    """`f(state, *args)` on a copy of the state: f may write into it, and the tracer cannot tell."""
    return f(pytree.tree_map_only(Tensor, torch.clone, state), *args)


class _Host(nn.Module):
    """Holds the modules that f uses, so that one `functional_call` exchanges all their parameters."""

    def __init__(self, modules: Sequence[nn.Module]):
        super().__init__()
        self.modules_of_f = nn.ModuleList(modules)

    def forward(self, f: Callable[..., Any], *args: Any) -> Any:
        return f(*args)


@functools.lru_cache(maxsize=32)
def _host_of(modules: tuple[nn.Module, ...]) -> _Host:
    """The `_Host` of a function whose graphs are kept, cached for its next calls."""
    return _Host(modules)


def refuse_captured(opening: Opening, outputs: Tensor, known: tuple[Tensor, ...], inputs: int = 1) -> None:
    """Raise ValueError where `outputs`, computed from detached inputs, still depends on a tracked tensor.

    `known` are the inputs it was computed from. A level of `torch.func` that only the output has must come from a
    tensor that f reached by itself. An f that takes derivatives may itself have made the first `inputs` of them
    (its state or time) tracked.
    """
    nodes = [] if is_wrapped(outputs) else _graph_of(outputs)
    leaves = [x for node in nodes if (x := getattr(node, "variable", None)) is not None]
    own = bool(leaves) and all(any(_share_memory(x, k) for k in known[:inputs]) for x in leaves)
    tracked = (outputs.requires_grad and not own) or has_tangent(outputs)
    if not tracked and levels(outputs) <= set().union(*map(levels, known)):
        return
    named = [f"'{name}' of shape {tuple(t.shape)}" for name, t in opening.captured if is_tracked(t)]
    unseen = ""
    if not named:
        named = [_described(x, opening.opened.parts) for x in leaves] or ["a tensor"]
        unseen = (
            " (of f's globals only modules, tensors and functions are looked at, not lists or other objects that "
            "hold them)"
        )
    _refuse(named, unseen)


def _refuse(named: list[str], unseen: str = "") -> None:
    raise ValueError(
        f"f uses {', '.join(named)}, which requires gradients (or belongs to a torch.func transform) but is "
        "neither in args nor a parameter of a module that f is or refers to, so its gradient would be lost. "
        f"Pass it in args, which f gets after the unknown{unseen}; or .detach() it if no gradient is wanted"
    )


def _described(x: Tensor, parts: tuple[nn.Module, ...]) -> str:
    """A description of a tensor that a module may hold as a plain attribute."""
    names = (f"'{type(m).__name__}.{name}'" for m in parts for name, value in vars(m).items() if value is x)
    return f"{next(names, 'a tensor')} of shape {tuple(x.shape)}"


def _graph_of(x: Tensor) -> set[Any]:
    """The nodes of the autograd graph behind `x`."""
    seen: set[Any] = set()
    stack = [x.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        stack += [parent for parent, _ in node.next_functions]
    return seen


def _share_memory(x: Tensor, y: Tensor) -> bool:
    return not is_wrapped(y) and x.untyped_storage()._cdata == y.untyped_storage()._cdata


def like(value: Tensor, x: Tensor) -> Tensor:
    """`value`, which f returned for `x`, both `(B, n)`; raises ValueError if the shapes differ.

    Otherwise a single row, for example, would be broadcast to all samples.
    """
    if value.shape != x.shape:
        raise ValueError(
            f"f returned {value.shape[0]} samples of {value.shape[1]} numbers for {x.shape[0]} of {x.shape[1]}; "
            "in its first call it returned as many as it was given. The number must not change between calls"
        )
    return value


def watched(call: Callable[[Tensor], Any], x: Tensor) -> Any:
    """The value of `call(x)`; raises ValueError if the call changes `x` in place, as far as that can be seen."""
    if torch.compiler.is_dynamo_compiling():
        return call(x)
    before = version(x)
    value = call(x)
    if version(x) != before:
        raise ValueError(
            "f changes its input in place, which would change the solver's iterates; use operations that return "
            "new tensors (nn.ReLU() instead of nn.ReLU(inplace=True), z + x instead of z += x)"
        )
    return value
