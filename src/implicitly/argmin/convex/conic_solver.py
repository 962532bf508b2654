"""`Clarabel`, the solver of conic programs, applied to a batch."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from implicitly.argmin.convex.conic import Cones, Pattern
from implicitly.argmin.convex.optional import require
from implicitly.checks import BELOW_ONE, POSITIVE_OR_INFINITE, check_count, check_number
from implicitly.solution import Status

# Settings without which a solver cannot be used again with other numbers.
_FIXED = {
    "verbose": False,
    "presolve_enable": False,
    "chordal_decomposition_enable": False,
    "input_sparse_dropzeros": False,
    "max_threads": 1,
}
_OWN = ("max_iter", "tol_gap_abs", "tol_gap_rel", "tol_feas", "time_limit")
# The tolerance of a solve to rounding errors.
TIGHT = 1e-14
# A certificate of this accuracy says that no feasible point is nearer than one over it, in suitable units.
CERTAIN = 1e-6


@dataclass(frozen=True, kw_only=True)
class Clarabel:
    """The interior-point solver Clarabel (Goulart and Chen 2024) for conic programs, in float64 on the CPU.

    The samples of a batch are divided among threads. Each thread keeps a solver, whose numbers are updated in
    place.

    Args:
        rtol: relative tolerance of feasibility and of the duality gap, in units in which the numbers of each
            program are about one.
        max_steps: number of iterations after which a sample ends as `Status.MAX_STEPS`.
        polish: maximal number of Newton steps on the optimality condition afterwards. They share one matrix, and
            reduce the residual to rounding errors: derivatives are only as exact as that. Where they do not, the
            matrix is computed anew; if that does not help either, the sample is solved again, to rounding errors.
            With 0, `Status.DEGENERATE` is not detected.
        time_limit_s: time limit for each sample, in seconds.
        threads: number of threads; None: as many as PyTorch uses.
        settings: other settings of Clarabel by name, such as `{"equilibrate_enable": False}`.

    Raises:
        ValueError, TypeError: an argument out of range, or a setting that Clarabel does not have or that must not
            be changed.
    """

    rtol: float = 1e-8
    max_steps: int = 200
    polish: int = 3
    time_limit_s: float = float("inf")
    threads: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    # For `Report`: this solver is never asked for a fixed number of steps alone, and messages name its class.
    fixed_steps: ClassVar[bool] = False
    label: ClassVar[str | None] = None

    def __post_init__(self):
        check_number("Clarabel", "rtol", self.rtol, BELOW_ONE)
        check_count("Clarabel", "max_steps", self.max_steps)
        check_count("Clarabel", "polish", self.polish, least=0)
        if self.threads is not None:
            check_count("Clarabel", "threads", self.threads)
        check_number("Clarabel", "time_limit_s", self.time_limit_s, POSITIVE_OR_INFINITE)
        for name in self.settings:
            if name in _FIXED or name in _OWN:
                raise ValueError(
                    f"Clarabel: settings must not contain {name}: its value is fixed, or set by an argument of "
                    "im.Clarabel"
                )

    def native_settings(self, quick: bool = False, tight: bool = False) -> Any:
        """The settings object of Clarabel; raises TypeError for settings that Clarabel does not have.

        If solutions are polished, a `quick` solver does not refine its steps, which saves a fifth of the time. A
        `tight` solver goes on to rounding errors.
        """
        settings = require("clarabel").DefaultSettings()
        tolerances = dict.fromkeys(("tol_gap_abs", "tol_gap_rel", "tol_feas"), TIGHT if tight else self.rtol)
        limits = {"max_iter": self.max_steps, "time_limit": self.time_limit_s}
        own = {"iterative_refinement_enable": False} if quick and self.polish else {}
        for name, value in {**_FIXED, **tolerances, **limits, **own, **self.settings}.items():
            if not hasattr(settings, name):
                raise TypeError(f"Clarabel has no setting {name!r}")
            try:
                setattr(settings, name, value)
            except TypeError as error:
                raise TypeError(f"Clarabel's setting {name} cannot be {value!r}: {error}") from error
        return settings


class Numbers(NamedTuple):
    """P, q, A and b of a batch, each a float64 array `(B or 1, ·)`."""

    P: Any
    q: Any
    A: Any
    b: Any

    def of(self, i: int) -> tuple[Any, ...]:
        """The numbers of sample i."""
        return tuple(x[i if len(x) > 1 else 0] for x in self)


class Solved(NamedTuple):
    """The solutions as NumPy arrays.

    x `(B, n)`, multipliers y and slack s `(B, m)`, `Status` codes and iterations `(B,)`.
    """

    x: Any
    y: Any
    s: Any
    status: Any
    steps: Any

    def put(self, i: int, solution: Any, status: Status) -> None:
        """Store Clarabel's solution of sample i."""
        self.x[i], self.y[i], self.s[i] = solution.x, solution.z, solution.s
        self.status[i], self.steps[i] = int(status), solution.iterations


class Workers:
    """The pool of Clarabel's solvers for one family of programs, kept between solves.

    Each is created from the same numbers, since its scaling, which never changes, must not depend on which thread
    solves which sample.
    """

    def __init__(self, pattern: Pattern, cones: Cones, solver: Clarabel):
        self._pattern, self._cones, self._solver = pattern, cones, solver
        self._idle: list[Any] = []
        self._first: tuple[Any, ...] | None = None
        self._settings, self._quick = solver.native_settings(), solver.native_settings(quick=True)
        self._tight = solver.native_settings(tight=True)

    def __getstate__(self) -> Any:
        """The state without the solvers, which can be neither copied nor pickled, and are created anew."""
        return self._pattern, self._cones, self._solver

    def __setstate__(self, state: Any) -> None:
        self.__init__(*state)

    def solve(self, numbers: Numbers, finite: Any, tight: bool = False) -> Solved:
        """The solutions of all samples, except those that are not `finite` `(B,)`.

        With `tight` each sample is solved to rounding errors, if possible, by a solver of its own.
        """
        batch, n, m = len(finite), self._pattern.n, self._pattern.m
        out = Solved(*(np.zeros((batch, k)) for k in (n, m, m)), *(np.zeros(batch, dtype=np.int64) for _ in "ab"))
        out.status[:] = int(Status.NON_FINITE)
        todo = np.flatnonzero(finite)
        if len(todo) == 0:
            return out
        if self._first is None:
            self._first = numbers.of(int(todo[0]))
        threads = min(self._solver.threads or torch.get_num_threads(), len(todo))
        work = self._work_tight if tight else self._work
        if threads == 1:
            work(numbers, todo, out)
            return out
        with ThreadPoolExecutor(threads) as pool:
            for done in [pool.submit(work, numbers, part, out) for part in np.array_split(todo, threads)]:
                done.result()
        return out

    def _work(self, numbers: Numbers, samples: Any, out: Solved) -> None:
        assert self._first is not None
        try:
            solver = self._idle.pop()  # lists are safe between threads
        except IndexError:
            solver = self._make(self._first, self._quick)
        for i in samples:
            own = numbers.of(i)
            solver.update(**dict(zip(Numbers._fields, own)))
            solution = solver.solve()
            status = self._judged(own, solution)
            if status == Status.STAGNATED:  # perhaps due to a scaling for other numbers, or to the quick settings
                solution = self._make(own, self._settings).solve()
                status = self._judged(own, solution)
            out.put(i, solution, status)
        self._idle.append(solver)

    def _work_tight(self, numbers: Numbers, samples: Any, out: Solved) -> None:
        for i in samples:
            own = numbers.of(i)
            solution = self._make(own, self._tight).solve()
            out.put(i, solution, self._judged(own, solution))

    def _judged(self, numbers: tuple[Any, ...], solution: Any) -> Status:
        """The status of a solution; a certificate counts if it proves to be one, whatever Clarabel calls it."""
        if (status := _KNOWN.get(str(solution.status))) is not None:
            return status
        x, y, s = (np.asarray(t) for t in (solution.x, solution.z, solution.s))
        with np.errstate(over="ignore", invalid="ignore"):  # the numbers of a solve that broke down
            if self._no_point(numbers, y):
                return Status.INFEASIBLE
            return Status.UNBOUNDED if self._no_limit(numbers, x, s) else Status.STAGNATED

    def _no_point(self, numbers: tuple[Any, ...], y: Any) -> bool:
        """Whether y, in the dual cone, is a certificate of infeasibility: A'y = 0 and b'y < 0."""
        _, _, A, b = numbers
        p = self._pattern
        pulled = np.bincount(p.A_columns.numpy(), A * y[p.A_rows.numpy()], minlength=p.n)
        return bool(np.linalg.norm(pulled) <= -CERTAIN * (b @ y) and -np.inf < b @ y < 0)

    def _no_limit(self, numbers: tuple[Any, ...], x: Any, s: Any) -> bool:
        """Whether x is a certificate of unboundedness: Ax + s = 0 with s in the cone, Px = 0 and q'x < 0."""
        P, q, A, _ = numbers
        p = self._pattern
        moved = np.bincount(p.A_rows.numpy(), A * x[p.A_columns.numpy()], minlength=p.m) + s
        index, rows, columns = (t.numpy() for t in p.full)
        curved = np.bincount(rows, P[index] * x[columns], minlength=p.n)
        off = np.hypot(np.linalg.norm(moved), np.linalg.norm(curved))
        return bool(off <= -CERTAIN * (q @ x) and -np.inf < q @ x < 0)

    def _make(self, numbers: tuple[Any, ...], settings: Any) -> Any:
        clarabel, sparse = require("clarabel"), require("scipy.sparse")
        P, q, A, b = numbers
        p, n, m = self._pattern, self._pattern.n, self._pattern.m
        P = sparse.csc_matrix((P, *_starts(p.P_rows, p.P_columns, n)), shape=(n, n))
        A = sparse.csc_matrix((A, *_starts(p.A_rows, p.A_columns, n)), shape=(m, n))
        return clarabel.DefaultSolver(P, q, A, b, native_cones(clarabel, self._cones), settings)


def native_cones(clarabel: Any, cones: Cones) -> list[Any]:
    """The cones as Clarabel's own objects."""
    native = [clarabel.ZeroConeT(cones.zero)] if cones.zero else []
    native += [clarabel.NonnegativeConeT(cones.nonnegative)] if cones.nonnegative else []
    native += [clarabel.SecondOrderConeT(d) for d in cones.second_order]
    native += [clarabel.PSDTriangleConeT(k) for k in cones.semidefinite]
    native += [clarabel.ExponentialConeT() for _ in range(cones.exponential)]
    native += [
        clarabel.PowerConeT(p[0]) if len(p) == 2 else clarabel.GenPowerConeT(list(p), 1) for p in cones.powers
    ]
    return native


def _starts(rows: Tensor, columns: Tensor, n: int) -> tuple[Any, Any]:
    counts = np.bincount(columns.numpy(), minlength=n)
    return rows.numpy(), np.concatenate([[0], np.cumsum(counts)])


# The statuses of Clarabel that are trusted; for all others, certificates decide.
_KNOWN = {"Solved": Status.CONVERGED, "MaxIterations": Status.MAX_STEPS, "MaxTime": Status.MAX_STEPS}
