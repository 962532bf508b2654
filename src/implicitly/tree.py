"""Pytrees as (batch, n) matrices, and functions with everything they depend on laid open."""

from __future__ import annotations

import functools
import math
import operator
import types
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._C import _functorch as functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch.autograd import forward_ad
from torch.func import functional_call, grad, vjp
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree

from implicitly.leaf_names import described, difference, leaf_names, placed

LOW_PRECISION = (torch.bfloat16, torch.float16)
_PARTS = {torch.complex32: torch.float16, torch.complex64: torch.float32, torch.complex128: torch.float64}


def real_dtype(dtype: torch.dtype) -> torch.dtype:
    """What the parts of complex numbers have; real dtypes are their own. (`dtype.to_real` cannot be traced.)"""
    return _PARTS.get(dtype, dtype)


def real_parts(x: Tensor, alone: bool = False) -> Tensor:
    """Complex `x` `(...)` as pairs `(..., 2)`; real tensors as they are. A view where it stays `alone`.

    Else it may be put behind others, and its cotangent begin at an odd place, where no complex number can: the
    derivative of `view_as_real` does not see to that.
    """
    if not x.is_complex():
        return x
    pairs = torch.view_as_real(x.resolve_conj())
    return pairs if alone else torch.stack(pairs.unbind(-1), -1)


def row_norm(matrix: Tensor) -> Tensor:
    """2-norm of each row: `(B, n)` to `(B,)`."""
    return torch.linalg.vector_norm(matrix, dim=1)


def columns_of(x: Tensor, index: Tensor) -> Tensor:
    """Columns of `x` `(B, n)` at `index` `(k,)`: `(B, k)`; quicker than `index_select`."""
    return x.gather(1, index.expand(len(x), -1))


# ------------------------------------------------------------------------------------------------ states


@dataclass(frozen=True)
class _Leaf:
    shape: tuple[int, ...]  # of one sample
    order: tuple[int, ...]  # the dimensions of one sample, slowest stride first
    dtype: torch.dtype
    width: int  # columns it takes in the matrix
    in_order: bool  # whether memory follows the dimensions, so that nothing needs permuting


@dataclass(frozen=True)
class Layout:
    """How a pytree of tensors lies in a matrix `(B, n)` with one sample a row.

    A single tensor whose samples are dense in memory, in any order of dimensions (`channels_last` too), becomes
    a matrix without a copy. bfloat16 and float16 are computed with in float32; complex numbers as pairs.
    """

    spec: pytree.TreeSpec
    leaves: tuple[_Leaf, ...]
    batch: int
    batch_dims: int
    dtype: torch.dtype  # real dtype of the leaves
    device: torch.device

    @property
    def work_dtype(self) -> torch.dtype:
        """The dtype that solvers compute in."""
        return torch.float32 if self.dtype in LOW_PRECISION else self.dtype

    @property
    def computed_dtype(self) -> torch.dtype:
        """The dtype that f computes in, which decides what can be reached: autocast's where that is on."""
        kind = self.device.type
        return torch.get_autocast_dtype(kind) if casts(kind) else self.dtype

    @classmethod
    def of(cls, state: Any, batch_dims: int, name: str = "z0") -> Layout:
        """The layout of `state`; raises TypeError / ValueError for what cannot be a state."""
        if batch_dims not in (0, 1):
            raise ValueError(f"batch_dims must be 0 (one system) or 1 (a batch of samples), got {batch_dims}")
        flat, spec = pytree.tree_flatten(state)
        if not flat:
            raise ValueError(f"{name} holds no tensor")
        for i, leaf in enumerate(flat):
            if not isinstance(leaf, Tensor):
                place = placed(spec, i, "as", name)
                raise TypeError(f"{name} must hold tensors only, got a {type(leaf).__name__}{place}")
            if not (leaf.is_floating_point() or leaf.is_complex()):
                of = leaf_names(spec, name)[i]
                raise TypeError(
                    f"{of} has dtype {leaf.dtype}: a solution is a real or complex number; "
                    f"pass {of}.float() or {of}.double()"
                )
            if leaf.ndim < batch_dims:
                place = placed(spec, i, "as", name)
                raise ValueError(
                    f"{name} has a 0-d tensor{place}, but batch_dims=1 takes dimension 0 as the batch; "
                    "pass batch_dims=0 for one system"
                )
        dtypes = {real_dtype(leaf.dtype) for leaf in flat}
        devices = {leaf.device for leaf in flat}
        if len(dtypes) > 1 or len(devices) > 1:
            raise ValueError(f"{name} mixes dtypes or devices: {described(state, name)}; convert them to one")
        batches = {leaf.shape[0] for leaf in flat} if batch_dims else {1}
        if len(batches) > 1:
            raise ValueError(
                f"the tensors of {name} disagree on the batch (dimension 0): {described(state, name)}"
            )
        leaves = tuple(_leaf(leaf, batch_dims) for leaf in flat)
        return cls(spec, leaves, batches.pop(), batch_dims, dtypes.pop(), flat[0].device)

    def pack(self, state: Any) -> Tensor:
        """A state of this layout as a matrix `(B, n)` of the work dtype."""
        if isinstance(state, Tensor):  # the usual case; flattening a pytree takes longer than a small f
            packed = self._pack_leaf(state, self.leaves[0])
        else:
            flat = pytree.tree_leaves(state)
            rows = [self._pack_leaf(x, leaf) for x, leaf in zip(flat, self.leaves)]
            packed = rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)
        return packed if packed.dtype == self.work_dtype else packed.to(self.work_dtype)

    def unpack(self, matrix: Tensor) -> Any:
        """A matrix `(B, n)`, of any B, as a state of this layout."""
        if self.spec.is_leaf():
            return self._unpack_leaf(matrix, self.leaves[0])
        columns = [matrix] if len(self.leaves) == 1 else matrix.split([x.width for x in self.leaves], dim=1)
        flat = [self._unpack_leaf(x, leaf) for x, leaf in zip(columns, self.leaves)]
        return pytree.tree_unflatten(flat, self.spec)

    def per_sample(self, vector: Tensor) -> Tensor:
        """`(B,)` as users see it: 0-d where the whole state is one system."""
        return vector if self.batch_dims else vector[0]

    def check(self, state: Any, given: str, f: str = "f") -> None:
        """Raise ValueError / TypeError unless `state`, which `f` returned for `given`, has this layout."""
        flat, spec = pytree.tree_flatten(state)
        if spec != self.spec:
            differs = difference(self.spec.unflatten(range(len(self.leaves))), state, given)
            raise ValueError(f"{f} must return the structure of {given}: {differs}")
        lead = (self.batch,) if self.batch_dims else ()
        for i, (x, leaf) in enumerate(zip(flat, self.leaves)):
            expected = (*lead, *leaf.shape)
            if not isinstance(x, Tensor):
                place = placed(spec, i, "as", given)
                raise TypeError(f"{f} must return tensors, got a {type(x).__name__}{place}")
            if tuple(x.shape) != expected:
                place = placed(spec, i, "for", given)
                raise ValueError(
                    f"{f} must return the shape of {given}: expected {expected}{place}, got {tuple(x.shape)}"
                )
            if x.dtype != leaf.dtype and not casts(self.device.type):
                place = placed(spec, i, "for", given)
                raise ValueError(
                    f"{f} must return the dtype of {given}: expected {leaf.dtype}{place}, got {x.dtype}; mixed "
                    "dtypes usually come from an argument or parameter of another dtype"
                )
            if x.device != self.device:
                place = placed(spec, i, "for", given)
                raise ValueError(
                    f"{f} must return the device of {given}: expected {self.device}{place}, got {x.device}"
                )

    def _pack_leaf(self, x: Tensor, leaf: _Leaf) -> Tensor:
        batch = x.shape[0] if self.batch_dims else 1
        if not leaf.in_order:
            x = torch.permute(x, (*range(self.batch_dims), *(d + self.batch_dims for d in leaf.order)))
        if leaf.dtype.is_complex:
            x = real_parts(x, alone=len(self.leaves) == 1)
        return x.reshape(batch, leaf.width)

    def _unpack_leaf(self, x: Tensor, leaf: _Leaf) -> Tensor:
        lead = (x.shape[0],) if self.batch_dims else ()
        shape = (*lead, *(leaf.shape if leaf.in_order else [leaf.shape[d] for d in leaf.order]))
        if leaf.dtype.is_complex:
            x = x.reshape(*shape, 2)
            # Columns of a larger matrix may begin at an odd place, where no complex number can.
            x = torch.view_as_complex(x) if len(self.leaves) == 1 else torch.complex(*x.unbind(-1))
        if leaf.in_order:
            return x.reshape(shape) if x.dtype == leaf.dtype else x.reshape(shape).to(leaf.dtype)
        inverse = [leaf.order.index(d) + self.batch_dims for d in range(len(leaf.shape))]
        return torch.permute(x.reshape(shape), (*range(self.batch_dims), *inverse)).to(leaf.dtype)


def _leaf(x: Tensor, batch_dims: int) -> _Leaf:
    shape, strides = tuple(x.shape[batch_dims:]), x.stride()[batch_dims:]
    # Stable, and only strides of dimensions that have any extent say something about the memory order.
    order = tuple(range(len(shape)))
    if all(shape):
        thin = [d for d in order if shape[d] == 1]
        order = (*thin, *sorted((d for d in order if shape[d] > 1), key=lambda d: -strides[d]))
    width = math.prod(shape) * (2 if x.is_complex() else 1)
    return _Leaf(shape, order, x.dtype, width, order == tuple(range(len(shape))))


# --------------------------------------------------------------------------------------------- functions


class Key:
    """A tuple that is hashed once; raises TypeError where it cannot be."""

    __slots__ = ("_hash", "parts")

    def __init__(self, *parts: Any):
        self.parts, self._hash = parts, hash(parts)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Key) and self.parts == other.parts)


@dataclass(frozen=True)
class Opened:
    """A function of its state and everything it depends on: `opened(z, *theta)` is `f(z, *args)`.

    `theta` holds the tensors of `args` first, then those in place of the `parameters` (and buffers, where a
    derivative reaches them) of every module that f is, is bound to, closes over or refers to. No tensor of `args`
    is kept here, so that this may outlive them.
    """

    f: Callable[..., Any]
    parameters: tuple[Tensor, ...]
    modules: tuple[nn.Module, ...]  # that f uses
    places: tuple[tuple[str, int], ...]  # where in `host` each parameter goes; tied ones go to several
    args_spec: pytree.TreeSpec
    static: tuple[Any, ...]  # the leaves of args, with a gap where a tensor goes
    device_type: str  # of the state
    autocast: torch.dtype | None
    default_device: torch.device | None  # where it is not the CPU
    parts: tuple[nn.Module, ...] = ()  # the modules, with all that they consist of
    constants: tuple[tuple[str, Tensor, int], ...] = ()  # what else it uses: name, version at first

    def kept(self) -> Callable[[], AbstractContextManager[None]]:
        """Notes what f is now: gives a context in which it is so again, for a derivative that calls it later.

        Entering it raises RuntimeError where a tensor without a derivative that f uses was changed in place, as
        autograd does for those that it saved. What f changes itself is its own affair.
        """
        modes = tuple(part.training for part in self.parts)
        own = tuple((name, x, version) for name, x, version in self.constants if _version(x) == version)
        return functools.partial(_as_then, self.parts, modes, own)

    @functools.cached_property
    def host(self) -> _Host:
        """All modules as one."""
        return _Host(self.modules)

    def buffers(self) -> Iterator[Tensor]:
        """Those of all modules."""
        return (b for module in self.modules for b in module.buffers())

    def key(self, f: Callable[..., Any], layout: Layout) -> Hashable:
        """What a compiled solve by f depends on besides tensors; raises TypeError where it cannot be compared."""
        self.__dict__["host"] = _host_of(self.modules)  # made now: a trace cannot
        # With their types, and signs of zeros, as 2, 2.0 and True are equal but do not compute the same.
        static = tuple((type(s), s, repr(s) if isinstance(s, float | complex) else None) for s in self.static)
        # Of the batch only the size varies, which the tensors' shapes tell.
        of_layout = (layout.spec, layout.leaves, layout.batch_dims, layout.dtype, layout.device)
        try:
            return Key(f, of_layout, str(self.args_spec), static, self.places, self.autocast)
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
        args, exchanged = self._placed(theta)
        own = all(map(operator.is_, theta[len(theta) - len(self.parameters) :], self.parameters))
        default = self.default_device

        def call(state: Any) -> Any:
            caches = parametrize._cache_enabled
            if self.autocast is None and default is None and not (caches or casts(self.device_type)):
                return self._call(own, exchanged, state, args)
            # The backward pass must see the arithmetic and the default device of the forward pass, wherever it is
            # called from; an accelerator's is a thread of autograd's own, which has no default device.
            with self._arithmetic(), default or nullcontext(), _uncached() if caches else nullcontext():
                return self._call(own, exchanged, state, args)

        return call

    def _traced(self, theta: tuple[Tensor, ...], state: Any) -> Any:
        # In the loop that calls: where W.T is asked for inside of it, the tracer looks for W there.
        args, exchanged = self._placed(tuple(x.view_as(x) for x in theta))
        if self.autocast is None and not casts(self.device_type):
            return self._call(False, exchanged, state, args)
        with self._arithmetic():
            return self._call(False, exchanged, state, args)

    def _placed(self, theta: tuple[Tensor, ...]) -> tuple[tuple[Any, ...], dict[str, Tensor]]:
        """The args of f, and what is to be exchanged in its modules."""
        count = len(theta) - len(self.parameters)
        tensors, given = iter(theta[:count]), theta[count:]
        flat = [next(tensors) if leaf is _GAP else leaf for leaf in self.static]
        return pytree.tree_unflatten(flat, self.args_spec), {name: given[i] for name, i in self.places}

    def _arithmetic(self) -> AbstractContextManager[Any]:
        if self.autocast is None:
            return full_precision(self.device_type)
        return torch.autocast(self.device_type, self.autocast, cache_enabled=False)

    def _call(self, own: bool, exchanged: dict[str, Tensor], state: Any, args: tuple[Any, ...]) -> Any:
        transformed = not torch.compiler.is_dynamo_compiling() and under_transform()
        if own and not transformed:
            return self.f(state, *args)
        if transformed:  # torch.func refuses to change buffers in place, and a derivative should not count in them
            exchanged = {n: b.clone() for n, b in self.host.named_buffers()} | exchanged
        if not exchanged:
            return self.f(state, *args)
        # `places` holds every one, once: with tie_weights a module of two names would not be restored.
        return functional_call(self.host, exchanged, (self.f, state, *args), tie_weights=False)


@contextmanager
def _uncached() -> Iterator[None]:
    """Without torch's cache of parametrised weights: those of a solve have no derivative for others to use, and
    those of others are not at the parameters exchanged here."""
    depth, parametrize._cache_enabled = parametrize._cache_enabled, 0
    try:
        yield
    finally:
        parametrize._cache_enabled = depth


@contextmanager
def _as_then(
    parts: tuple[nn.Module, ...], modes: tuple[bool, ...], constants: tuple[tuple[str, Tensor, int], ...]
) -> Iterator[None]:
    for name, x, version in constants:
        if _version(x) != version:
            raise RuntimeError(
                f"f uses '{name}' of shape {tuple(x.shape)}, which was changed in place since the solve, and the "
                "derivative of the solve calls f again. Call backward before the change, or pass a copy in args"
            )
    moved = [(part, mode) for part, mode in zip(parts, modes) if part.training is not mode]
    for part, mode in moved:
        part.training = mode
    try:
        yield
    finally:
        for part, mode in moved:
            part.training = not mode


_GAP = object()


class Opening(NamedTuple):
    """What a function is found to depend on when it is `opened` with some args.

    Attributes:
        theta: `opened(z, *theta)` is `f(z, *args)`.
        captured: tensors that f reaches in another way, each with what leads there.
    """

    opened: Opened
    theta: tuple[Tensor, ...]
    captured: tuple[tuple[str, Tensor], ...]


class _Host(nn.Module):
    """Holds the modules that f uses, so that one `functional_call` exchanges all their parameters."""

    def __init__(self, modules: Sequence[nn.Module]):
        super().__init__()
        self.modules_of_f = nn.ModuleList(modules)

    def forward(self, f: Callable[..., Any], *args: Any) -> Any:
        return f(*args)


@functools.lru_cache(maxsize=32)
def _host_of(modules: tuple[nn.Module, ...]) -> _Host:
    """That of a function of which graphs are kept, for its next calls."""
    return _Host(modules)


def open_function(f: Callable[..., Any], args: tuple[Any, ...], device: torch.device) -> Opening:
    """Find what `f(z, *args)` depends on. `device` is the state's, whose autocast setting is kept.

    In a traced graph that is `args` alone: there autograd reaches all the rest by itself.
    """
    if not callable(f):
        raise TypeError(f"f must be callable, got a {type(f).__name__}")
    flat, spec = pytree.tree_flatten(args)
    tensors = tuple(leaf for leaf in flat if isinstance(leaf, Tensor))
    static = tuple(_GAP if isinstance(leaf, Tensor) else leaf for leaf in flat)
    autocast = torch.get_autocast_dtype(device.type) if casts(device.type) else None
    if torch.compiler.is_dynamo_compiling():  # what else f depends on is the tracer's to find
        own = functools.partial(_on_a_copy, f)
        return Opening(Opened(own, (), (), (), spec, static, device.type, autocast, None), tensors, ())
    default = torch.get_default_device()
    modules: dict[int, nn.Module] = {}
    captured: list[tuple[str, Tensor]] = []
    for name, value in _reached(f, args):
        if isinstance(value, nn.Module):
            modules.setdefault(id(value), value)
        elif not any(value is t for t in tensors):
            captured.append((name, value))
    parameters, places, constants = _tensors_of(parts := _parts_of(tuple(modules.values())))
    constants += [(name, x, _version(x)) for name, x in captured if not is_tracked(x)]
    opened = Opened(
        f,
        parameters,
        tuple(modules.values()),
        places,
        spec,
        static,
        device.type,
        autocast,
        None if default.type == "cpu" else default,
        tuple(parts.values()),
        tuple(constants),
    )
    return Opening(opened, (*tensors, *parameters), tuple(captured))


def _parts_of(modules: tuple[nn.Module, ...]) -> dict[str, nn.Module]:
    """The `modules` and all that they consist of, each once, by the name that it has in their host."""
    seen: set[nn.Module] = set()
    return {n: m for i, top in enumerate(modules) for n, m in top.named_modules(seen, f"modules_of_f.{i}")}


def _tensors_of(
    parts: dict[str, nn.Module],
) -> tuple[tuple[Tensor, ...], tuple[tuple[str, int], ...], list[tuple[str, Tensor, int]]]:
    """Of modules by name: what a derivative reaches, where each of it goes, and what else f may read.

    Buffers of a module that trains are for it to change.
    """
    index: dict[int, int] = {}
    parameters: list[Tensor] = []
    places: list[tuple[str, int]] = []
    constants: list[tuple[str, Tensor, int]] = []
    for prefix, module in parts.items():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None:
                continue
            if is_tracked(tensor):
                if id(tensor) not in index:
                    index[id(tensor)] = len(parameters)
                    parameters.append(tensor)
                places.append((f"{prefix}.{name}", index[id(tensor)]))
            elif not module.training or name in module._parameters:
                constants.append((name, tensor, _version(tensor)))
    return tuple(parameters), tuple(places), constants


def _on_a_copy(f: Callable[..., Any], state: Any, *args: Any) -> Any:
    """`f(state, *args)`, which may write into its state: the tracer cannot tell whether it does."""
    return f(pytree.tree_map_only(Tensor, torch.clone, state), *args)


def _reached(f: Any, args: Any) -> Iterator[tuple[str, Any]]:
    """Every module and tensor that `f` reaches: itself, bound, partial, closed over, global or an attribute."""
    seen: set[int] = set()
    stack: list[tuple[str, Any]] = [("f", f)]
    stack += [("args", a) for a in pytree.tree_leaves(args) if isinstance(a, nn.Module)]
    while stack:
        name, value = stack.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, nn.Module | Tensor):
            yield name, value
        elif isinstance(value, functools.partial):
            stack += [(name, value.func), (name, value.args), (name, value.keywords)]
        elif isinstance(value, types.MethodType):
            stack += [(name, value.__self__), (name, value.__func__)]
            if not callable(value.__self__):  # its own attributes are what a method works with
                stack += [(f"{name}.{k}", v) for k, v in getattr(value.__self__, "__dict__", {}).items()]
        elif isinstance(value, types.FunctionType):
            stack += _function_scope(value)
        elif isinstance(value, dict):
            stack += [(f"{name}[{k!r}]", v) for k, v in value.items()]
        elif isinstance(value, list | tuple | set):
            stack += [(f"{name}[{i}]", v) for i, v in enumerate(value)]
        elif callable(value) and not isinstance(value, type) and hasattr(value, "__dict__"):
            stack += [(f"{name}.{k}", v) for k, v in vars(value).items()]


def _function_scope(function: types.FunctionType) -> list[tuple[str, Any]]:
    scope: list[tuple[str, Any]] = []
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or ()):
        try:
            scope.append((name, cell.cell_contents))
        except ValueError:  # a variable that is assigned only later
            continue
    # Of the globals only modules, tensors and plain functions: other packages' objects are none of f's state.
    kinds = (nn.Module, Tensor, types.FunctionType, functools.partial)
    for name in function.__code__.co_names:
        value = function.__globals__.get(name)
        foreign = isinstance(value, types.FunctionType) and (value.__module__ or "").partition(".")[0] == "torch"
        if isinstance(value, kinds) and not foreign:
            scope.append((name, value))
    scope += [("a default", value) for value in function.__defaults__ or ()]
    scope += list((function.__kwdefaults__ or {}).items())
    return scope


def pullback(f: Callable[..., Tensor], *primals: Tensor) -> tuple[Tensor, Callable[..., tuple[Tensor, ...]]]:
    """f at `primals`, and the linear map from a cotangent of its value to those of `primals`."""
    if not (torch.compiler.is_dynamo_compiling() or under_transform()) and is_plain(*primals):
        places = list(range(len(primals)))
        value, pull = _recorded(f, primals, places)
        return value, lambda cotangent: pull(cotangent, places)
    if not any(is_wrapped(p) for p in primals):
        value, pull = vjp(f, *primals)[:2]
        return value, pull

    return f(*primals), functools.partial(pull_within, f, primals)


def pull_within(f: Callable[..., Tensor], primals: tuple[Tensor, ...], cotangent: Tensor) -> tuple[Tensor, ...]:
    """The cotangents of `primals`, under a transform.

    There the map from cotangents must not outlive the level of its own `vjp`: deeper transforms would meet tensors
    of a level that is gone. So each product differentiates afresh, inside of its level.
    """

    def paired(*inputs: Tensor) -> Tensor:
        # Through none of its entries, every input is used: torch.func makes zeros for others on a wrong level.
        unused = sum(real_parts(x).flatten()[:0].sum() for x in inputs)
        return (f(*inputs) * cotangent).sum() + unused

    return grad(paired, argnums=tuple(range(len(primals))))(*primals)


def of_places(f: Callable[..., Tensor], inputs: Sequence[Tensor], places: list[int]) -> Callable[..., Tensor]:
    """`f(*inputs)` as a function of those inputs at `places`."""

    def of(*chosen: Tensor) -> Tensor:
        full = list(inputs)
        for i, x in zip(places, chosen):
            full[i] = x
        return f(*full)

    return of


def is_near(x: Tensor) -> bool:
    """Whether `x` lies in the host's own memory, and not on an accelerator that it would wait for."""
    return x.is_cpu


def merge_rows(x: Tensor, dim: int | None, size: int) -> Tensor:
    """A `(B, ...)` tensor that `vmap` maps over dimension `dim`, of `size`, as `(size * B, ...)`."""
    x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    return x.flatten(0, 1)


def is_plain(*tensors: Tensor) -> bool:
    """Whether what is computed from `tensors` now is for nobody to differentiate: no autograd, no transform."""
    return (
        not torch.is_grad_enabled() and forward_ad._current_level < 0 and not any(is_wrapped(t) for t in tensors)
    )


def recorded(
    f: Callable[..., Tensor], primals: tuple[Tensor, ...], wanted: list[int]
) -> Callable[[Tensor, list[int]], tuple[Tensor, ...]]:
    """Call f at `primals` once and give the linear map from a cotangent of its value to those of some primals.

    For `is_plain` tensors; `wanted` says which primals any call of the map may ask for. A graph of autograd serves
    both many products for one primal and a last one for the others, and products cost less than in torch.func.
    """
    return _recorded(f, primals, wanted)[1]


def _recorded(
    f: Callable[..., Tensor], primals: tuple[Tensor, ...], wanted: list[int]
) -> tuple[Tensor, Callable[[Tensor, list[int]], tuple[Tensor, ...]]]:
    leaves = [p.detach().requires_grad_(i in wanted) for i, p in enumerate(primals)]
    with torch.enable_grad():
        value = f(*leaves)

    def pull(cotangent: Tensor, places: list[int]) -> tuple[Tensor, ...]:
        asked = [leaves[i] for i in places]
        if not value.requires_grad:
            return tuple(torch.zeros_like(x) for x in asked)
        # Where this is differentiated in turn, it is recorded, too.
        create = torch.is_grad_enabled()
        return torch.autograd.grad(value, asked, cotangent, True, create, materialize_grads=True)

    return value.detach(), pull


def refuse_captured(outputs: Tensor, known: tuple[Tensor, ...], captured: tuple[tuple[str, Tensor], ...]) -> None:
    """Raise ValueError where `outputs`, computed from detached inputs, still depends on a tracked tensor.

    `known` are the inputs it was computed from; a level of `torch.func` that only the output has comes from a
    tensor that f reached by itself.
    """
    tracked = outputs.requires_grad or _has_tangent(outputs)
    if not tracked and _levels(outputs) <= set().union(*map(_levels, known)):
        return
    named = [f"'{name}' of shape {tuple(t.shape)}" for name, t in captured if is_tracked(t)]
    if not named:
        named = [f"a tensor of shape {shape}" for shape in _leaf_shapes(outputs)] or ["a tensor"]
    raise ValueError(
        f"f uses {', '.join(named)}, which requires gradients (or belongs to a torch.func transform) but is "
        "neither in args nor a parameter of a module that f is or closes over, so its gradient would be lost. "
        "Pass it in args, which f gets after the unknown; or .detach() it if no gradient is wanted"
    )


def like(value: Tensor, x: Tensor) -> Tensor:
    """`value`, which f returned for `x`, both `(B, n)`; raises ValueError where it has other shapes than at first.

    Else a single row, say, would stand for all samples.
    """
    if value.shape != x.shape:
        raise ValueError(
            f"f returned {value.shape[0]} samples of {value.shape[1]} numbers for {x.shape[0]} of {x.shape[1]}; "
            "in its first call it returned as many as it was given. What it returns must not depend on the call"
        )
    return value


def watched(call: Callable[[Tensor], Any], x: Tensor) -> Any:
    """`call(x)`; raises ValueError where it changes `x` in place, as far as that can be seen."""
    if torch.compiler.is_dynamo_compiling():
        return call(x)
    before = _version(x)
    value = call(x)
    if _version(x) != before:
        raise ValueError(
            "f changes its input in place, which would change the solver's iterates; use operations that return "
            "new tensors (nn.ReLU() instead of nn.ReLU(inplace=True), z + x instead of z += x)"
        )
    return value


def _version(x: Tensor) -> int:
    """How often `x` was changed in place; inference mode does not count."""
    return 0 if x.is_inference() else x._version


def _knows_autocast(device_type: str) -> bool:
    """Some, such as `meta`, do not."""
    return torch.amp.is_autocast_available(device_type)


# As `torch.compiler.assume_constant_result` does, which imports the whole compiler. PyTorch 2.11 cannot trace it.
_knows_autocast._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


@contextmanager
def unhooked() -> Iterator[None]:
    """Without the hooks that pack what is saved for a backward pass, as activation checkpointing sets them.

    They are for what outlives a solve; torch.func refuses them, and what is unpacked within it would be computed
    again in the middle of being computed.
    """
    # Private, as PyTorch has no other way to set hooks aside.
    hooks, autograd = [], torch._C._autograd  # pyright: ignore[reportAttributeAccessIssue]
    while (top := autograd._top_saved_tensors_default_hooks(False)) is not None:
        hooks.append(top)
        autograd._pop_saved_tensors_default_hooks()
    try:
        yield
    finally:
        for pack, unpack in reversed(hooks):
            autograd._push_saved_tensors_default_hooks(pack, unpack)


def casts(device_type: str) -> bool:
    """Whether autocast is on for such devices."""
    return (device_type == "cpu" or _knows_autocast(device_type)) and torch.is_autocast_enabled(device_type)


def full_precision(device_type: str) -> AbstractContextManager[Any]:
    """A context without autocast, for the arithmetic of solvers."""
    if casts(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def under_transform() -> bool:
    """Whether a transform of `torch.func` is active."""
    return functorch.peek_interpreter_stack() is not None


def is_wrapped(x: Tensor) -> bool:
    """Whether `x` belongs to a `torch.func` transform."""
    return not torch.compiler.is_dynamo_compiling() and functorch.is_functorch_wrapped_tensor(x)


def is_batched(x: Tensor) -> bool:
    """Whether `x` is mapped by `torch.func.vmap`, at any level."""
    while is_wrapped(x):
        if functorch.is_batchedtensor(x):
            return True
        x = functorch.get_unwrapped(x)
    return False


def unwrapped(x: Tensor) -> Tensor:
    """`x` without the `torch.func` transforms around it: under vmap, the whole batch."""
    while is_wrapped(x):
        x = functorch.get_unwrapped(x)
    return x


def is_tracked(x: Tensor) -> bool:
    """Whether a derivative or a transform may reach `x`."""
    return x.requires_grad or is_wrapped(x) or _has_tangent(x)


def records() -> bool:
    """Whether a derivative or a transform may follow what is computed now."""
    if torch.compiler.is_dynamo_compiling():
        return True
    return torch.is_grad_enabled() or forward_ad._current_level >= 0 or under_transform()


def loses(recording: bool) -> bool:
    """Whether the derivative of a tensor that f reaches by itself would be lost, unless a solve is `recording`."""
    return not (recording or torch.compiler.is_dynamo_compiling()) and records()


def is_recorded(x: Tensor) -> bool:
    """Whether a derivative by `x` may be asked for of what is computed from it now."""
    return (x.requires_grad and torch.is_grad_enabled()) or is_wrapped(x) or _has_tangent(x)


def _has_tangent(x: Tensor) -> bool:
    if forward_ad._current_level < 0:
        return False
    while is_wrapped(x):
        if functorch.is_gradtrackingtensor(x) and forward_ad.unpack_dual(x).tangent is not None:
            return True
        x = functorch.get_unwrapped(x)
    return forward_ad.unpack_dual(x).tangent is not None


def _levels(x: Tensor) -> set[int]:
    levels = set()
    while is_wrapped(x):
        levels.add(functorch.maybe_get_level(x))
        x = functorch.get_unwrapped(x)
    return levels


def _leaf_shapes(x: Tensor) -> list[tuple[int, ...]]:
    """Shapes of the leaves of the autograd graph behind `x`."""
    shapes, seen, stack = [], set(), [x.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (variable := getattr(node, "variable", None)) is not None:
            shapes.append(tuple(variable.shape))
        stack += [parent for parent, _ in node.next_functions]
    return shapes
