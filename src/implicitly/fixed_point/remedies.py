"""What to try if a fixed point or a root was not found, which depends on the direction of the solver's steps."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from implicitly.condition import LINEAR_REMEDY, REMEDY, explain
from implicitly.fixed_point.anderson import Anderson
from implicitly.fixed_point.broyden import Broyden
from implicitly.fixed_point.newton import Newton, NewtonKrylov
from implicitly.fixed_point.picard import FixedPointIteration
from implicitly.iterate import Found, Solver
from implicitly.solution import Status

# For roots only: the residual of a fixed point, f(z) - z, always has the right sign and units to step along.
_ALONG_RESIDUAL = (
    "change the sign of F or scale it: this solver steps along -F(z), which may lead away from the root or be too "
    "long; or use Newton or NewtonKrylov"
)
_OF_NEWTON = {
    Status.MAX_STEPS: "raise max_steps, loosen rtol, or start closer to a solution (z0), if there is one",
    Status.STAGNATED: "start closer to a solution (z0), if there is one, loosen rtol, or use a wider dtype: the "
    "residual has stopped decreasing",
    Status.DIVERGED: "start closer to a solution (z0), or use line_search=True",
}


def explained(name: str, solver: Solver, found: Found, failed: Tensor) -> str:
    """`explain` with the remedies for a fixed point, a root, or the linear solve of their derivatives."""
    remedy = {**REMEDY, **_remedy(name, solver)} if name in ("fixed_point", "root") else LINEAR_REMEDY
    return explain(name, solver, found, failed, remedy)


def _remedy(name: str, solver: Solver) -> Mapping[Status, str]:
    if isinstance(solver, Newton | NewtonKrylov):
        return _OF_NEWTON
    if name == "root" and isinstance(solver, FixedPointIteration | Anderson | Broyden):
        slow = "raise max_steps or loosen rtol; " + _ALONG_RESIDUAL
        return {Status.MAX_STEPS: slow, Status.STAGNATED: _ALONG_RESIDUAL, Status.DIVERGED: _ALONG_RESIDUAL}
    if isinstance(solver, Anderson | Broyden):
        return {Status.DIVERGED: "start closer to a solution (z0), or use Newton or NewtonKrylov"}
    return {}
