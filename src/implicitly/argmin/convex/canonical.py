"""Parametrised convex programs of cvxpy in canonical form, with coefficients that are affine in the parameters.

cvxpy turns a problem that follows its rules of disciplined parametrised programming (DPP) into

    minimise 1/2 x'Px + q'x  subject to  Ax + s = b,  s in K

where every entry of P, q, A and b is an affine function of the parameters (Agrawal, Amos, Barratt, Boyd, Diamond
and Kolter, "Differentiable Convex Optimization Layers", NeurIPS 2019). These functions are determined once. Then
one sparse product turns the values of the parameters into a program, without cvxpy.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from implicitly.argmin.convex.conic import Cones, Pattern
from implicitly.argmin.convex.optional import require
from implicitly.transforms import Operation, merge_rows
from implicitly.tree import columns_of

# What messages say about numbers that are not finite.
NOT_FINITE = "NaN or inf is in a parameter's value, or in what the problem makes of it"

# ------------------------------------------------------------------------------- from parameters to numbers


@dataclass(frozen=True, eq=False)
class SparseMap:
    """A sparse matrix M for products with batches of rows: it maps x `(B, columns)` to x M' `(B, size)`.

    Attributes:
        column, coefficient: `(size,)`, the first entry of each row of M.
        empty: the rows without entries.
        more: rows, columns and coefficients of all further entries.
    """

    column: Tensor
    coefficient: Tensor
    empty: Tensor
    more: tuple[Tensor, Tensor, Tensor]

    @classmethod
    def of(cls, matrix: Any, like: Tensor) -> SparseMap:
        """The map of a SciPy matrix, with the dtype and on the device of `like`."""
        matrix = matrix.tocsr()
        matrix.eliminate_zeros()
        counts, starts = np.diff(matrix.indptr), matrix.indptr[:-1]
        column, coefficient = np.zeros(len(counts), dtype=np.int64), np.zeros(len(counts))
        first = starts[counts > 0]
        column[counts > 0], coefficient[counts > 0] = matrix.indices[first], matrix.data[first]
        others = np.ones(matrix.nnz, dtype=bool)
        others[first] = False
        rows = np.repeat(np.arange(len(counts)), counts)[others]
        more = (
            torch.from_numpy(rows).to(like.device),
            torch.from_numpy(matrix.indices[others].astype(np.int64)).to(like.device),
            torch.from_numpy(matrix.data[others]).to(like),
        )
        empty = torch.from_numpy(np.flatnonzero(counts == 0)).to(like.device)
        return cls(torch.from_numpy(column).to(like.device), torch.from_numpy(coefficient).to(like), empty, more)

    def __call__(self, x: Tensor) -> Tensor:
        """The product x M'."""
        if x.shape[1] == 0:
            return x.new_zeros(len(x), len(self.column))
        product = columns_of(x, self.column).mul_(self.coefficient)
        if len(self.empty):  # zero times an infinite entry would not be zero
            product = product.index_fill_(1, self.empty, 0.0)
        rows, columns, coefficients = self.more
        return product.index_add_(1, rows, columns_of(x, columns).mul_(coefficients)) if len(rows) else product


class _Linear(Operation):
    """A product with a sparse matrix, whose derivative is a product with its transpose.

    That is faster than the derivative of indexing, which autograd would use.
    """

    @staticmethod
    def forward(x, M, transpose):
        return M(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.M, ctx.transpose = inputs

    @staticmethod
    def backward(ctx, *gradients):
        return _Linear.apply(gradients[0], ctx.transpose, ctx.M), None, None

    @staticmethod
    def jvp(ctx, *tangents):
        return _Linear.apply(tangents[0], ctx.M, ctx.transpose)

    @staticmethod
    def vmap(info, in_dims, *args):
        x, M, transpose = args
        product = _Linear.apply(merge_rows(x, in_dims[0], info.batch_size), M, transpose)
        return product.unflatten(0, (info.batch_size, -1)), 0


@dataclass(frozen=True, eq=False)
class AffineMap:
    """Numbers `(B, size)` that are affine in parameters `(B, N)`: `constant + M @ p`."""

    constant: Tensor
    M: SparseMap
    transpose: SparseMap
    fixed: bool  # whether M is zero, which makes the derivative zero without any computation

    @classmethod
    def of(cls, matrix: Any, like: Tensor) -> AffineMap:
        """The map of a SciPy matrix `(size, N + 1)` whose last column is the constant."""
        matrix = matrix.tocsc()
        constant = torch.from_numpy(matrix[:, [-1]].toarray()[:, 0].astype(np.float64))
        varying = matrix[:, :-1]
        fixed = varying.count_nonzero() == 0
        return cls(constant.to(like), SparseMap.of(varying, like), SparseMap.of(varying.T, like), fixed)

    def __call__(self, p: Tensor) -> Tensor:
        """The numbers for `p`."""
        if self.fixed:
            return self.constant.expand(len(p), -1)
        return self.constant + _Linear.apply(p, self.M, self.transpose)


@dataclass(frozen=True, eq=False)
class Assembly:
    """Several vectors of numbers, each affine in the parameters, computed with one sparse product.

    Attributes:
        matrices: SciPy matrices, `(size, N + 1)` each, whose last columns are the constants.
        parameters: where the N numbers come from.
    """

    matrices: tuple[Any, ...]
    parameters: tuple[ParameterSlot, ...]
    _plans: dict[Any, list[tuple[list[int], AffineMap]]] = field(default_factory=dict)

    def __call__(self, values: Sequence[Tensor], batch: int) -> list[Tensor]:
        """The vectors, each `(B, size)`, or `(1, size)` where it is shared by the batch.

        `values` has one tensor per parameter, `(B, ...)`, or without B where it is shared.
        """
        flat: list[tuple[int, Tensor]] = []
        for value, slot in zip(values, self.parameters):
            rows = slot.rows(value)
            flat += [(start, rows.log() if log else rows) for start, log in slot.places]
        parts = [rows for _, rows in sorted(flat, key=lambda place: place[0])]
        parts = parts or [values[0].new_zeros(1, 0)]  # parameters without entries
        flags = tuple(len(rows) > 1 for rows in parts)
        found: dict[int, Tensor] = {}
        for lead, (members, affine) in zip((1, batch), self._plan(flags, parts)):
            if members:
                p = torch.cat([rows.expand(lead, -1) if lead > 1 else rows[:1] for rows in parts], dim=1)
                sizes = [self.matrices[i].shape[0] for i in members]
                found |= dict(zip(members, affine(p).split(sizes, dim=1)))
        return [found[i] for i in range(len(self.matrices))]

    def _plan(self, flags: tuple[bool, ...], parts: list[Tensor]) -> list[tuple[list[int], AffineMap]]:
        """The vectors that the batch shares, and those that it does not, with one affine map for either group."""
        like = parts[0]
        key = (flags, like.dtype, like.device)
        if key not in self._plans:
            varying = np.concatenate([np.full(rows.shape[1], flag) for rows, flag in zip(parts, flags)])
            own = [bool((abs(M.tocsc()[:, :-1])[:, varying]).sum() > 0) for M in self.matrices]
            plan = []
            for wanted in (False, True):
                members = [i for i, o in enumerate(own) if o == wanted]
                stacked = [self.matrices[i] for i in members] or [self.matrices[0][:0]]
                # The maps are kept, and so outlive the transform of torch.func that may be active now.
                with torch._C._DisableFuncTorch():  # pyright: ignore[reportPrivateUsage]
                    plan.append((members, AffineMap.of(require("scipy.sparse").vstack(stacked), like)))
            self._plans[key] = plan
        return self._plans[key]


@dataclass(frozen=True)
class ParameterSlot:
    """Where the value of a parameter goes in the vector of all parameters.

    Attributes:
        name: the user's name for it.
        shape: the shape of a single value.
        source: `(width,)` positions, row-major, of the entries that are used.
        places: where the first of them goes, and whether the logarithm is stored there (in geometric programs,
            which may use both).
        symmetric: whether only a triangle of the value is read, so that it must be symmetric.
        sign: 1 if it must not be negative, -1 if not positive, else 0; `strict`: nor zero.
        definite: 1 if it must be positive semidefinite, -1 if negative semidefinite, else 0.
        absent: positions, row-major, of the entries that must be zero; `kind` says why.
        bounds: lower and upper bounds of the entries, row-major.
    """

    name: str
    shape: tuple[int, ...]
    source: Tensor
    places: tuple[tuple[int, bool], ...]
    symmetric: bool = False
    sign: int = 0
    strict: bool = False
    definite: int = 0
    absent: Tensor | None = None
    kind: str = ""
    bounds: tuple[Tensor, Tensor] | None = None

    @property
    def promises(self) -> bool:
        """Whether it declares anything that a value could violate."""
        declared = self.symmetric or self.sign or self.is_log
        return len(self.source) > 0 and bool(declared or self.absent is not None or self.bounds is not None)

    @property
    def is_log(self) -> bool:
        """Whether its logarithm is used."""
        return any(log for _, log in self.places)

    def rows(self, value: Tensor) -> Tensor:
        """The entries of a value that are used, `(B or 1, width)`."""
        if value.ndim == len(self.shape):
            value = value.unsqueeze(0)
        if self.symmetric:
            value = (value + value.mT) / 2
        return columns_of(value.reshape(len(value), math.prod(self.shape)), self.source.to(value.device))


@dataclass(frozen=True)
class VariableSlot:
    """Where the value of a variable comes from.

    Attributes:
        shape: the shape of a single value.
        dual: whether it comes from the multipliers instead of x.
        source: the position of each of its entries, row-major.
        scale: a factor for each entry.
        exp: whether to take the exponential (geometric programs).
    """

    shape: tuple[int, ...]
    source: Tensor
    scale: Tensor
    dual: bool = False
    exp: bool = False

    def take(self, x: Tensor) -> Tensor:
        """The value `(B, *shape)` of solutions `(B, n)`."""
        value = columns_of(x, self.source.to(x.device)) * self.scale.to(x)
        return (value.exp() if self.exp else value).reshape(len(x), *self.shape)


@dataclass(frozen=True, eq=False)
class CanonicalProgram:
    """A family of programs: the maps from parameters to P, q, A and b, and from solutions to variables."""

    pattern: Pattern
    cones: Cones
    numbers: Assembly
    parameters: tuple[ParameterSlot, ...]
    variables: tuple[VariableSlot, ...]

    def wanted(self) -> Tensor:
        """A mask `(n + m,)`: 1 for the entries of (x, multipliers) on which the variables depend, else 0."""
        entries = torch.zeros(self.pattern.n + self.pattern.m, dtype=torch.float64, device="cpu")
        for v in self.variables:
            entries[v.source + (self.pattern.n if v.dual else 0)] = 1.0
        return entries


# ------------------------------------------------------------------------------- the canonical form by cvxpy


def canonicalise(problem: Any, parameters: Sequence[Any], variables: Sequence[Any], gp: bool) -> CanonicalProgram:
    """The canonical form of a cvxpy `problem`; raises TypeError, ValueError or NotImplementedError.

    Args:
        parameters: all parameters of the problem, in the order in which values are passed.
        variables: the variables whose values to return, or dual variables of equalities and inequalities.
        gp: whether it is a geometric program.
    """
    cp = require("cvxpy")
    clarabel = require("clarabel")
    del clarabel  # cvxpy asks for it by name; here it only has to be installed
    _check(cp, problem, parameters, variables, gp)
    logs: dict[int, Any] = {}
    dcp, renamed = problem, {}
    if gp:
        reduction = cp.reductions.Dgp2Dcp(problem)
        dcp = reduction.apply(problem)[0]
        logs = {p.id: lowered for p, lowered in reduction.canon_methods._parameters.items()}
        renamed = {old: new[0] for old, new in reduction.var_id_map.items()}
    with warnings.catch_warnings(), cp.utilities.scopes.quad_form_dpp_scope():
        # cvxpy warns of its own code if a parameter is sparse.
        warnings.filterwarnings("ignore", message="Reading from a sparse CVXPY expression")
        data, chain, _ = dcp.get_problem_data(solver="CLARABEL")
    form = data[cp.settings.PARAM_PROB]
    names = _Names(form, chain, renamed, logs)
    (P_map, P_place), (A_map, b_map, A_place) = _quadratic(form), _constraints(form)
    cones = Cones.of(data["dims"])
    pattern = Pattern.of(form.x.size, cones.size, P_place, A_place)
    slots = tuple(_parameter_slot(p, names) for p in parameters)
    return CanonicalProgram(
        pattern,
        cones,
        Assembly((P_map, form.q.tocsr()[:-1], A_map, b_map), slots),
        slots,
        tuple(_variable_slot(v, problem, names, gp) for v in variables),
    )


@dataclass(frozen=True)
class _Names:
    """The places to which cvxpy's reductions have moved variables, parameters and constraints."""

    form: Any
    chain: Any
    renamed: dict[int, int]
    logs: dict[int, Any]

    def column(self, variable: Any) -> int:
        """The position in x of the first entry of `variable`."""
        key = self.renamed.get(variable.id, variable.id)
        return self.form.var_id_to_col[_latest(self.chain.compose_var_id_map(), key)]

    def places(self, parameter: Any) -> tuple[tuple[int, bool], ...]:
        """The positions in the vector of parameters of the first entry of `parameter`, and of its logarithm."""
        renamed, columns = self.chain.compose_param_id_map(), self.form.param_id_to_col
        keys = [(parameter.id, False)]
        if parameter.id in self.logs:
            keys.append((self.logs[parameter.id].id, True))
        latest = [(_latest(renamed, key), log) for key, log in keys]
        return tuple((columns[key], log) for key, log in latest if key in columns)

    def row(self, constraint: Any) -> int:
        """The first row of A that belongs to `constraint`."""
        key = _latest(self.chain.compose_constr_id_map(), constraint.id)
        row = 0
        for c in self.form.constraints:
            if c.id == key:
                return row
            row += c.size
        raise ValueError(f"cvxpy's canonical form has no constraint {constraint}")


def _latest(renamed: Any, key: Any) -> int:
    new = renamed.get(key, key)
    return new[0] if isinstance(new, list | tuple) else new


def _quadratic(form: Any) -> tuple[Any, tuple[Any, Any]]:
    """The map to the upper triangle of P, column by column, and the rows and columns of its entries."""
    reduced = form.reduced_P
    if reduced.problem_data_index is None:
        none = np.zeros(0, dtype=np.int64)
        return form.q.tocsr()[:0], (none, none)
    rows, columns = _places(reduced.problem_data_index)
    upper = rows <= columns
    return reduced.reduced_mat.tocsr()[upper], (rows[upper], columns[upper])


def _constraints(form: Any) -> tuple[Any, Any, tuple[Any, Any]]:
    """The maps to A, column by column, and to all of b, and the rows and columns of the entries of A.

    cvxpy stores -A and b side by side.
    """
    reduced, n, m = form.reduced_A, form.x.size, form.constr_size
    if reduced.problem_data_index is None:  # how cvxpy marks a matrix without any entries
        none = np.zeros(0, dtype=np.int64)
        zeros = require("scipy.sparse").csr_array((m, form.q.shape[1]))
        return zeros[:0], zeros, (none, none)
    rows, columns = _places(reduced.problem_data_index)
    matrix = reduced.reduced_mat.tocsr()
    of_b = columns == n
    lift = require("scipy.sparse").csr_array(
        (np.ones(of_b.sum()), (rows[of_b], np.arange(of_b.sum()))), shape=(m, int(of_b.sum()))
    )
    return -matrix[~of_b], lift @ matrix[of_b], (rows[~of_b], columns[~of_b])


def _places(index: Any) -> tuple[Any, Any]:
    """The rows and columns of a matrix's entries, from its `index` (row of each entry, column starts, shape)."""
    rows, starts, _ = index
    return np.asarray(rows, dtype=np.int64), np.repeat(np.arange(len(starts) - 1), np.diff(starts))


def _check(cp: Any, problem: Any, parameters: Sequence[Any], variables: Sequence[Any], gp: bool) -> None:
    """Raise TypeError or ValueError unless `problem` can be a layer that maps `parameters` to `variables`."""
    if not isinstance(problem, cp.Problem):
        raise TypeError(f"problem must be a cvxpy.Problem, got a {type(problem).__name__}")
    for name, given in (("parameters", parameters), ("variables", variables)):
        if not isinstance(given, list | tuple):
            raise TypeError(f"{name} must be a list or tuple of cvxpy objects, got a {type(given).__name__}")
    if problem.is_mixed_integer():
        raise ValueError(
            "the problem has boolean or integer variables: its solution is piecewise constant in the parameters, "
            "and has no derivative. Relax them: a continuous variable with bounds"
        )
    if not (problem.is_dpp("dgp") if gp else problem.is_dpp(quad_form_dpp="qp")):
        raise ValueError(_why_not_dpp(problem, gp))
    _check_members("parameters", parameters, problem.parameters(), "Parameter")
    for parameter in problem.parameters():
        if not any(parameter is p for p in parameters):
            raise ValueError(f"the problem's parameter {_named(parameter)} is missing from parameters")
    if not problem.parameters():
        raise ValueError("the problem has no parameters, so its solution is a constant: use problem.solve()")
    if not variables:
        raise ValueError(
            "variables is empty: name the variables of the problem whose values the layer is to return"
        )
    _check_members("variables", variables, problem.variables(), "Variable", _multipliers(problem))


def _check_members(
    name: str, given: Sequence[Any], own: Sequence[Any], kind: str, multipliers: Sequence[Any] = ()
) -> None:
    for i, x in enumerate(given):
        if not any(x is y for y in (*own, *multipliers)):
            known = ", ".join(_named(y) for y in own[:20]) or "none"
            duals = "; and the dual_variables of its constraints" if multipliers else ""
            raise ValueError(
                f"{name}[{i}], {_named(x)}, is not a {kind} of the problem, which has: {known}{duals}"
            )
        if any(x is y for y in given[:i]):
            raise ValueError(f"{name} contains {_named(x)} twice")


def _named(leaf: Any) -> str:
    shape = getattr(leaf, "shape", None)
    return f"{leaf} of shape {shape}" if shape is not None else repr(leaf)


def _why_not_dpp(problem: Any, gp: bool) -> str:
    """Why the problem is not DPP: a reason, with the parts of the problem that break the rules."""
    rules = "geometric programming (DGP)" if gp else "convex programming (DCP)"
    if not (problem.is_dgp() if gp else problem.is_dcp()):
        reason = f"the problem does not follow cvxpy's rules of {rules}"
        if not gp and problem.is_dgp():
            reason += "; it is a geometric program: pass gp=True"
    else:
        reason = (
            "the problem is convex, but not in the way that cvxpy can canonicalise once for all values of the "
            "parameters (DPP): products of parameters, or other functions of them, must be parameters of their own"
        )
    parts = [problem.objective, *problem.constraints]
    good = [(x.is_dgp(dpp=True) if gp else x.is_dcp(dpp=True)) for x in parts]
    named = "; ".join(str(x) for x, ok in zip(parts, good) if not ok)
    return f"{reason}. The parts that break the rules: {named}. See https://www.cvxpy.org/tutorial/dpp/index.html"


def _parameter_slot(parameter: Any, names: _Names) -> ParameterSlot:
    attributes, shape = parameter.attributes, tuple(parameter.shape)
    for kind in ("complex", "imag", "hermitian", "boolean", "integer"):
        if attributes.get(kind):
            raise NotImplementedError(
                f"parameter {_named(parameter)} is {kind}; ConvexLayer supports real parameters only"
            )
    source = _entries(parameter)
    sparse = next((kind for kind in ("diag", "sparsity") if attributes[kind]), None)
    absent = np.setdiff1d(np.arange(parameter.size), source) if sparse else None
    bounds = attributes.get("bounds")
    return ParameterSlot(
        str(parameter),
        shape,
        torch.from_numpy(source),
        names.places(parameter),
        symmetric=any(attributes[kind] for kind in ("symmetric", "PSD", "NSD")),
        sign=bool(attributes["nonneg"] or attributes["pos"]) - bool(attributes["nonpos"] or attributes["neg"]),
        strict=bool(attributes["pos"] or attributes["neg"]),
        definite=bool(attributes["PSD"]) - bool(attributes["NSD"]),
        absent=None if absent is None else torch.from_numpy(absent),
        kind={"diag": "diagonal", "sparsity": "sparse"}.get(sparse or "", ""),
        bounds=None if bounds is None else tuple(_flat(bound, shape) for bound in bounds),  # pyright: ignore
    )


def _flat(bound: Any, shape: tuple[int, ...]) -> Tensor:
    """The bound of every entry, row-major."""
    return torch.from_numpy(np.broadcast_to(np.asarray(bound, dtype=np.float64), shape).reshape(-1).copy())


def _entries(leaf: Any) -> Any:
    """Row-major positions of the entries of a parameter or variable that the canonical form uses, in its order."""
    positions = np.arange(leaf.size).reshape(leaf.shape)
    if any(leaf.attributes[kind] for kind in ("symmetric", "PSD", "NSD")):
        if leaf.ndim != 2:
            raise NotImplementedError(
                f"{_named(leaf)} is a stack of symmetric matrices, which is not supported; use one variable or "
                "parameter per matrix"
            )
        return positions[np.triu_indices(leaf.shape[0])]
    if leaf.attributes["diag"]:
        return np.diag(positions).copy()
    if leaf.attributes["sparsity"]:
        return positions[leaf.sparse_idx]
    return positions.flatten(order="F")


def _variable_slot(variable: Any, problem: Any, names: _Names, gp: bool) -> VariableSlot:
    shape = tuple(variable.shape)
    for constraint in problem.constraints:
        if any(variable is dual for dual in constraint.dual_variables):
            return _dual_slot(variable, constraint, names)
    if (
        variable.attributes.get("complex")
        or variable.attributes.get("imag")
        or variable.attributes.get("hermitian")
    ):
        raise NotImplementedError(
            f"variable {_named(variable)} is complex; ConvexLayer supports real variables only"
        )
    start, entries = names.column(variable), _entries(variable)
    source, scale = np.zeros(variable.size, dtype=np.int64), np.zeros(variable.size)
    source[entries], scale[entries] = start + np.arange(len(entries)), 1.0
    if any(variable.attributes[kind] for kind in ("symmetric", "PSD", "NSD")):
        mirrored = np.arange(variable.size).reshape(shape).T.reshape(-1)[entries]
        source[mirrored], scale[mirrored] = source[entries], 1.0
    return VariableSlot(shape, torch.from_numpy(source), torch.from_numpy(scale), exp=gp)


def _multipliers(problem: Any) -> list[Any]:
    return [dual for constraint in problem.constraints for dual in constraint.dual_variables]


def _dual_slot(variable: Any, constraint: Any, names: _Names) -> VariableSlot:
    kind = type(constraint).__name__
    if kind not in ("Equality", "Inequality", "Zero", "NonNeg", "NonPos"):
        raise NotImplementedError(
            f"ConvexLayer returns dual variables of equalities and inequalities only, not of the constraint type "
            f"{kind}"
        )
    places = names.row(constraint) + np.arange(variable.size).reshape(variable.shape, order="F").reshape(-1)
    return VariableSlot(
        tuple(variable.shape),
        torch.from_numpy(places),
        torch.ones(variable.size, dtype=torch.float64, device="cpu"),
        dual=True,
    )
