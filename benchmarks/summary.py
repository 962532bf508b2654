"""The table in the README: the cases that most readers ask about, from the numbers of the last runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tabulate import tabulate

from benchmarks.harness import Spread, ratios


class Case(NamedTuple):
    """A case, and where to find its seconds and those of a peer."""

    case: str
    row: str  # its name in the family, without the ending that all names share
    ours: str  # the key in the numbers of that row, like `theirs`
    theirs: str
    peer: str = ""  # its name, if the numbers use another


QP = "batch 128, 50 unknowns, 50 inequalities, 10 equalities"
SHARED = "batch 4096 of the same matrices, 20 unknowns, 40 inequalities"
SOCP = "SOCP, batch 32, 10 unknowns, 3 cones of 6, 3 equalities"
SDP = "SDP, batch 32, a matrix of 8 x 8, 3 equalities"
BOTH = "solve and gradient"
ALL = "forward and gradient"
GRADIENT, CHECKPOINTED = "exact gradient, by default", "exact gradient, checkpointed"
SLOPE = "Anderson: exact gradient"

CASES = {
    "fixed_point": (
        Case(
            "DEQ, Anderson: solve",
            "Anderson: overhead of the forward solve",
            "Anderson",
            "torchdeq Anderson",
            "torchdeq",
        ),
        Case(f"DEQ, Anderson: {BOTH}", SLOPE, "Anderson", "torchdeq Anderson", "torchdeq"),
        Case(f"DEQ, Anderson: {BOTH}", SLOPE, "ours", "jaxopt"),
        Case(f"DEQ, Broyden: {BOTH}", "Broyden: exact gradient", "Broyden", "torchdeq Broyden", "torchdeq"),
    ),
    "ode": (
        Case("ODE: solve", "forward", "ours", "theirs", "torchdiffeq"),
        Case("ODE: solve, compile=True", "forward", "compiled", "theirs", "torchdiffeq"),
        Case("ODE: solve, compile=True", "forward, compile=True", "ours", "diffrax"),
        Case(f"ODE: {BOTH}", GRADIENT, "by default", "theirs", "torchdiffeq"),
        Case(
            f"ODE: {BOTH}, compile=True",
            f"{CHECKPOINTED}, compile=True",
            "checkpointed, compile=True",
            "theirs",
            "torchdiffeq",
        ),
        Case(f"ODE: {BOTH}, compile=True", "exact gradient, compile=True", "ours", "diffrax"),
        Case(
            "ODE: solve and continuous adjoint", "continuous adjoint", "backsolve", "their adjoint", "torchdiffeq"
        ),
    ),
    "stiff": (
        Case("Stiff ODE (Robertson): solve", "Robertson, eager", "eager", "LSODA", "SciPy's LSODA"),
        Case(
            "Stiff ODE: solve, compile=True", "Robertson, compile=True", "compile=True", "LSODA", "SciPy's LSODA"
        ),
        Case("Stiff ODE: solve, compile=True", "Robertson, compile=True", "ours", "diffrax"),
    ),
    "qp": (
        Case("128 QPs: solve", f"{QP}: forward", "ours", "qpth"),
        Case(f"128 QPs: {BOTH}", f"{QP}: {ALL}", "ours", "qpth"),
        Case(f"128 QPs: {BOTH}", f"{QP}: {ALL}", "ours", "cvxpylayers"),
        Case(f"128 QPs: {BOTH}", f"{QP}: {ALL}", "ours", "qpax"),
        Case(f"4096 QPs that share matrices: {BOTH}", f"{SHARED}: {ALL}", "ours", "qpth"),
    ),
    "convex": (
        Case(f"32 second-order cone programs: {BOTH}", f"{SOCP}: {ALL}", "ours", "default", "cvxpylayers"),
        Case(f"32 semidefinite programs: {BOTH}", f"{SDP}: {ALL}", "ours", "default", "cvxpylayers"),
    ),
}


def summary(results: Path) -> str:
    """The table, from the numbers of each family in a folder."""
    lines = []
    for family, cases in CASES.items():
        rows = json.loads((results / f"{family}.json").read_text(encoding="utf-8"))["rows"]
        for case in cases:
            ours, theirs = seconds(rows, case)
            mine, other = (_ms(1e3 * Spread.of(s).median) for s in (ours, theirs))
            lines.append((case.case, mine, case.peer or case.theirs, other, f"{ratios(theirs, ours).median:.2g}"))
    headers = ["measured", "implicitly, ms", "beside", "its ms", "times faster"]
    return tabulate(lines, headers=headers, tablefmt="github", disable_numparse=True)


def _ms(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def seconds(rows: list[Mapping[str, Any]], case: Case) -> tuple[list[float], list[float]]:
    """The seconds of each round, ours and theirs; raises KeyError if no row has both."""
    for row in rows:
        if row["what"].removesuffix(", ms") != case.row:
            continue
        numbers = row["numbers"]
        # What ran in a separate process has all seconds together, the others each next to its errors.
        each = numbers["seconds"] if "versions" in numbers else {w: of["seconds"] for w, of in numbers.items()}
        if case.ours in each and case.theirs in each:
            return each[case.ours], each[case.theirs]
    raise KeyError(f"no row {case.row!r} has the seconds of {case.ours!r} and {case.theirs!r}")
