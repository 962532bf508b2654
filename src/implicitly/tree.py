"""Pytrees of tensors as matrices `(B, n)`, one sample per row."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from implicitly.leaf_names import described, difference, leaf_names, placed
from implicitly.transforms import casts

LOW_PRECISION = (torch.bfloat16, torch.float16)
_PARTS = {torch.complex32: torch.float16, torch.complex64: torch.float32, torch.complex128: torch.float64}


def real_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the parts of a complex dtype; a real dtype is its own. (`dtype.to_real` cannot be traced.)"""
    return _PARTS.get(dtype, dtype)


def real_parts(x: Tensor, alone: bool = False) -> Tensor:
    """Complex `x` `(...)` as pairs `(..., 2)`; real tensors as they are. A view if it stays `alone`, else a copy.

    If it does not, it may be concatenated behind other tensors. Its cotangent may then start at an odd offset,
    where no complex number can start, and the derivative of `view_as_real` does not handle that.
    """
    if not x.is_complex():
        return x
    pairs = torch.view_as_real(x.resolve_conj())
    return pairs if alone else torch.stack(pairs.unbind(-1), -1)


def row_norm(matrix: Tensor) -> Tensor:
    """The 2-norm of each row: `(B, n)` to `(B,)`."""
    return torch.linalg.vector_norm(matrix, dim=1)


def columns_of(x: Tensor, index: Tensor) -> Tensor:
    """The columns of `x` `(B, n)` at `index` `(k,)`, as `(B, k)`; faster than `index_select`."""
    return x.gather(1, index.expand(len(x), -1))


@dataclass(frozen=True)
class _Leaf:
    shape: tuple[int, ...]  # of one sample
    order: tuple[int, ...]  # the dimensions of one sample, slowest stride first
    dtype: torch.dtype
    width: int  # columns it takes in the matrix
    in_order: bool  # whether memory follows the order of dimensions, so that nothing needs permuting


@dataclass(frozen=True)
class Layout:
    """How a pytree of tensors is laid out in a matrix `(B, n)` with one sample per row.

    A single tensor whose samples are dense in memory, in any order of dimensions (also `channels_last`), becomes
    a matrix without a copy. bfloat16 and float16 are computed in float32; complex numbers become pairs of reals.
    """

    spec: pytree.TreeSpec
    leaves: tuple[_Leaf, ...]
    batch: int
    batch_dims: int
    dtype: torch.dtype  # real dtype of the leaves
    device: torch.device
    plain: tuple[int, ...] | None = None  # shape of a sample, if the state is one tensor in natural order

    @property
    def work_dtype(self) -> torch.dtype:
        """The dtype that solvers compute in."""
        return torch.float32 if self.dtype in LOW_PRECISION else self.dtype

    @property
    def computed_dtype(self) -> torch.dtype:
        """The dtype that f computes in, which limits the tolerances: autocast's where that is on."""
        kind = self.device.type
        return torch.get_autocast_dtype(kind) if casts(kind) else self.dtype

    @classmethod
    def of(cls, state: Any, batch_dims: int, name: str = "z0") -> Layout:
        """The layout of `state`; raises TypeError / ValueError if it cannot be a state."""
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
            if leaf.is_nested or leaf.layout is not torch.strided:
                of = leaf_names(spec, name)[i]
                kind, remedy = f"a tensor of {leaf.layout}", "to_dense()"
                if leaf.is_nested:
                    kind, remedy = "a nested tensor", "to_padded_tensor(0.0)"
                raise TypeError(f"{of} is {kind}, but solvers need dense tensors: pass {of}.{remedy}")
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
        batch = flat[0].shape[0] if batch_dims else 1
        # No set here: hashing would fix a size that a tracer leaves open.
        if batch_dims and any(leaf.shape[0] != batch for leaf in flat):
            raise ValueError(
                f"the tensors of {name} disagree on the batch (dimension 0): {described(state, name)}"
            )
        leaves, dtype = tuple(_leaf(leaf, batch_dims) for leaf in flat), dtypes.pop()
        is_plain = spec.is_leaf() and leaves[0].in_order and leaves[0].dtype == dtype not in LOW_PRECISION
        plain = leaves[0].shape if is_plain else None
        return cls(spec, leaves, batch, batch_dims, dtype, flat[0].device, plain)

    def pack(self, state: Any) -> Tensor:
        """Convert a state of this layout into a matrix `(B, n)` of the work dtype."""
        if isinstance(state, Tensor):  # flattening a pytree takes longer than a small f
            if self.plain is not None and state.dtype == self.dtype:  # the usual case
                return state.reshape(state.shape[0] if self.batch_dims else 1, self.leaves[0].width)
            packed = self._pack_leaf(state, self.leaves[0])
        else:
            flat = pytree.tree_leaves(state)
            rows = [self._pack_leaf(x, leaf) for x, leaf in zip(flat, self.leaves)]
            packed = rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)
        return packed if packed.dtype == self.work_dtype else packed.to(self.work_dtype)

    def unpack(self, matrix: Tensor) -> Any:
        """Convert a matrix `(B, n)`, with any B, into a state of this layout."""
        if self.plain is not None and matrix.dtype == self.dtype:  # the usual case
            return matrix.reshape((matrix.shape[0], *self.plain) if self.batch_dims else self.plain)
        if self.spec.is_leaf():
            return self._unpack_leaf(matrix, self.leaves[0])
        columns = [matrix] if len(self.leaves) == 1 else matrix.split([x.width for x in self.leaves], dim=1)
        flat = [self._unpack_leaf(x, leaf) for x, leaf in zip(columns, self.leaves)]
        return pytree.tree_unflatten(flat, self.spec)

    def per_sample(self, vector: Tensor) -> Tensor:
        """A `(B,)` vector as the user gets it: 0-d where the whole state is one system."""
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
            # Columns of a larger matrix may start at an odd offset, where no complex number can start.
            x = torch.view_as_complex(x) if len(self.leaves) == 1 else torch.complex(*x.unbind(-1))
        if leaf.in_order:
            return x.reshape(shape) if x.dtype == leaf.dtype else x.reshape(shape).to(leaf.dtype)
        inverse = [leaf.order.index(d) + self.batch_dims for d in range(len(leaf.shape))]
        return torch.permute(x.reshape(shape), (*range(self.batch_dims), *inverse)).to(leaf.dtype)


def _leaf(x: Tensor, batch_dims: int) -> _Leaf:
    shape, strides = tuple(x.shape[batch_dims:]), x.stride()[batch_dims:]
    order = tuple(range(len(shape)))
    if not x.is_contiguous() and all(shape):
        # The sort is stable; only strides of dimensions of size > 1 tell about the memory order.
        thick = sorted((d for d in order if shape[d] > 1), key=lambda d: -strides[d])
        if thick != sorted(thick):
            order = (*(d for d in order if shape[d] == 1), *thick)
    width = math.prod(shape) * (2 if x.is_complex() else 1)
    return _Leaf(shape, order, x.dtype, width, order == tuple(range(len(shape))))
