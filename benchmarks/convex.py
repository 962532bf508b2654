"""Convex programs written in cvxpy, as layers: solutions and gradients compared with cvxpylayers."""

from __future__ import annotations

import importlib.metadata
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import implicitly as im
from benchmarks.harness import Effort, Row, Spread, alternate, outcomes, ratios

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import cvxpy
    from cvxpylayers.torch import CvxpyLayer

PEER = f"cvxpylayers {importlib.metadata.version('cvxpylayers')}"
PACKAGES = ("implicitly", "torch", "cvxpylayers", "cvxpy", "clarabel", "diffcp")
D = torch.float64

CAPTION = """\
Float64; one cvxpy problem, as a layer of each. QP: 1/2 |Rz|^2 + p'z subject to Gz <= h, Az = b, with R the root of
LL' + I/10. SOCP: three cones |Cx + d| <= e'x + f and equations; SDP: tr(CX) with X semidefinite and three
equations. cvxpylayers at its own tolerances, and at 1e-9 for the same accuracy. Error: relative, of the gradient
along a random direction, against central differences. Medians of {rounds} rounds in alternation (least to
greatest)."""

Program = tuple[Any, list[Any], list[Any], list[Tensor]]


def draws(seed: int) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=D)


def times(M: Tensor, x: Tensor) -> Tensor:
    return (M @ x.unsqueeze(2)).squeeze(2)


def quadratic(batch: int) -> Program:
    """Quadratic programs, each sample with its own matrices."""
    n, m, q = 50, 50, 10
    z, p, root = cvxpy.Variable(n), cvxpy.Parameter(n), cvxpy.Parameter((n, n))
    G, h, A, b = cvxpy.Parameter((m, n)), cvxpy.Parameter(m), cvxpy.Parameter((q, n)), cvxpy.Parameter(q)
    objective = cvxpy.Minimize(cvxpy.sum_squares(root @ z) / 2 + p @ z)
    draw = draws(0)
    L = torch.rand(batch, n, n, generator=torch.Generator().manual_seed(0), dtype=D)
    R = torch.linalg.cholesky(L @ L.mT + 0.1 * torch.eye(n, dtype=D)).mT.contiguous()
    G_, A_, z0 = draw(batch, m, n), draw(batch, q, n), draw(batch, n)
    values = [R, draw(batch, n), G_, times(G_, z0) + draw(batch, m).abs(), A_, times(A_, z0)]
    return cvxpy.Problem(objective, [G @ z <= h, A @ z == b]), [root, p, G, h, A, b], [z], values


def second_order(batch: int) -> Program:
    """Second-order cone programs with three cones and three equations."""
    n, d, k = 10, 5, 3
    x, f = cvxpy.Variable(n), cvxpy.Parameter(n)
    C, c = [cvxpy.Parameter((d, n)) for _ in range(k)], [cvxpy.Parameter(d) for _ in range(k)]
    e, g = [cvxpy.Parameter(n) for _ in range(k)], [cvxpy.Parameter() for _ in range(k)]
    F, h = cvxpy.Parameter((3, n)), cvxpy.Parameter(3)
    cones = [cvxpy.norm(C[i] @ x + c[i]) <= e[i] @ x + g[i] for i in range(k)]
    problem = cvxpy.Problem(cvxpy.Minimize(f @ x + 0.1 * cvxpy.sum_squares(x)), [*cones, F @ x == h])
    draw = draws(1)
    x0, F_ = draw(batch, n), draw(batch, 3, n)
    C_, c_ = [draw(batch, d, n) for _ in range(k)], [draw(batch, d) for _ in range(k)]
    e_ = [draw(batch, n) for _ in range(k)]
    g_ = [(times(M, x0) + v).norm(dim=1) - (w * x0).sum(1) + 0.1 for M, v, w in zip(C_, c_, e_)]
    return problem, [f, *C, *c, *e, *g, F, h], [x], [draw(batch, n), *C_, *c_, *e_, *g_, F_, times(F_, x0)]


def semidefinite(batch: int) -> Program:
    """Semidefinite programs with one matrix and three equations."""
    n, k = 8, 3
    X, C = cvxpy.Variable((n, n), symmetric=True), cvxpy.Parameter((n, n))
    A, b = [cvxpy.Parameter((n, n)) for _ in range(k)], [cvxpy.Parameter() for _ in range(k)]
    equations = [cvxpy.trace(A[i] @ X) == b[i] for i in range(k)]
    problem = cvxpy.Problem(cvxpy.Minimize(cvxpy.trace(C @ X)), [X >> 0, *equations])
    draw = draws(2)
    X0, S = draw(batch, n, n), draw(batch, n, n)
    A_ = [M + M.mT for M in (draw(batch, n, n) for _ in range(k))]
    C_ = S @ S.mT + sum(draw(batch, 1, 1) * M for M in A_)
    return problem, [C, *A, *b], [X], [C_, *A_, *((M * (X0 @ X0.mT)).sum((1, 2)) for M in A_)]


def run(effort: Effort) -> list[Row]:
    """All rows of this benchmark."""
    full = effort.full
    print("convex programs ...", flush=True)
    cases = [
        ("QP, batch {}, 50 unknowns, 50 inequalities, 10 equalities", quadratic, 128 if full else 4, 15.0),
        ("SOCP, batch {}, 10 unknowns, 3 cones of 6, 3 equalities", second_order, 32 if full else 4, 2.0),
        ("SDP, batch {}, a matrix of 8 x 8, 3 equalities", semidefinite, 32 if full else 4, 2.0),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecation warnings inside the peer
        return [beside(effort, what.format(batch), make(batch), goal) for what, make, batch, goal in cases]


def beside(effort: Effort, what: str, program: Program, goal: float) -> Row:
    """One row for solution and gradient together."""
    problem, parameters, variables, values = program
    values = [v.requires_grad_() for v in values]
    ours = im.nn.ConvexLayer(problem, parameters, variables)
    tight = {"eps": 1e-9, "max_iters": 100_000}
    layers = {
        "ours": ours,
        "default": CvxpyLayer(problem, parameters, variables),
        "1e-9": CvxpyLayer(problem, parameters, variables, solver_args=tight),
    }
    weights = draws(3)(values[0].shape[0], *variables[0].shape)

    def gradient(layer: Any) -> tuple[Tensor, ...]:
        return torch.autograd.grad((weights * layer(*values)[0]).sum(), values)

    runs = {who: lambda layer=layer: gradient(layer) for who, layer in layers.items()}
    gradients, failed = outcomes(runs, ("ours",))
    runs = {who: runs[who] for who in gradients}
    errors = {who: gradient_error(found, ours, values, weights) for who, found in gradients.items()}
    seconds = alternate({who: runs[who] for who in ("ours", "default") if who in runs}, effort.rounds)
    seconds |= alternate({who: runs[who] for who in ("1e-9",) if who in runs}, min(effort.rounds, 3))
    shown = {w: f"{Spread.of(s).show(1e3, 0)}, error {errors[w]:.0e}" for w, s in seconds.items()} | failed
    with torch.no_grad():
        ours(*values)
    assert ours.solution is not None
    residual = float(ours.solution.residual.max())
    text, met = f"{shown['ours']}; residual {residual:.0e}", None
    if "default" in runs:
        faster = ratios(seconds["default"], seconds["ours"])
        text += f"; {faster.show(1, 1)} times faster"
        met = faster.median >= goal and errors["ours"] <= 1e-6
    numbers = {w: {"seconds": seconds[w], "error": errors[w]} for w in seconds}
    peer = f"{shown['default']}; at 1e-9 {shown['1e-9']}"
    return Row(f"{what}: forward and gradient, ms", text, peer, f"{goal:.0f} times faster, 1e-6", met, numbers)


def gradient_error(found: tuple[Tensor, ...], layer: Any, values: list[Tensor], weights: Tensor) -> float:
    """The relative error of a gradient along a random direction, against central differences."""
    draw = draws(4)
    direction = [draw(*v.shape) for v in values]
    ends = []
    with torch.no_grad():
        for step in (1e-6, -1e-6):
            moved = [v + step * d for v, d in zip(values, direction)]
            ends.append((weights * layer(*moved)[0]).sum())
    exact = float(ends[0] - ends[1]) / 2e-6
    return abs(float(sum((g * d).sum() for g, d in zip(found, direction))) - exact) / abs(exact)
