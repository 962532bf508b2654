"""States `(B, 0)`, such as those of a part of a model that is switched off, satisfy every condition."""

from __future__ import annotations

import re

import pytest
import torch

import implicitly as im

D = torch.float64
FINDING = [im.FixedPointIteration(), im.Anderson(), im.Broyden(), im.Broyden(line_search=True), im.Newton(),
           im.NewtonKrylov(), im.Newton(rtol=0), im.Anderson(rtol=0)]  # fmt: skip
LINEAR = [im.GMRES(), im.CG(), im.BiCGStab(), im.DenseLU(), im.Neumann(), im.GMRES(rtol=0), im.DenseLU(rtol=0)]
ADJOINTS = [im.UnrolledAdjoint(), im.ImplicitAdjoint(im.DenseLU()), im.ImplicitAdjoint(inverse="start"),
            im.ImplicitAdjoint(inverse="precondition")]  # fmt: skip
INEXACT = [im.PhantomAdjoint(), im.JacobianFreeAdjoint()]
DESCENDING = [
    im.LBFGS(),
    im.GradientDescent(),
    im.GradientDescent(accelerated=True),
    im.Newton(),
    im.NewtonKrylov(),
]


def scaled(z, x):
    return z * x.sum()


def squared(z, x):
    return scaled(z, x).square().sum(-1)


def itself(z, x):
    return z


def solving(entry, f, options):
    return [(entry, f, {name: value}) for name, values in options.items() for value in values]


CASES = [
    *solving(im.fixed_point, scaled, {"solver": FINDING, "compile": [True]}),
    *solving(im.root, scaled, {"solver": FINDING}),
    *((im.fixed_point, scaled, {"solver": im.Broyden(), "adjoint": a}) for a in (*ADJOINTS, *INEXACT)),
    *((im.root, scaled, {"solver": im.Broyden(), "adjoint": a}) for a in ADJOINTS),
    *solving(im.linear_solve, scaled, {"solver": LINEAR}),
    *((im.linear_solve, scaled, {"solver": s, "transpose": True}) for s in LINEAR),
    *solving(im.argmin, squared, {"solver": DESCENDING}),
    *solving(im.argmin, squared, {"constraint": [itself, im.Equality(itself)]}),
    *solving(im.least_squares, scaled, {"solver": [im.LevenbergMarquardt(), im.GaussNewton(), im.LBFGS()]}),
]


def named(case):
    entry, _, options = case
    shown = (re.sub(r" at 0x\w+|None", "", str(value))[:60] for value in options.values())
    return "-".join([entry.__name__, *shown])


@pytest.mark.parametrize("shape", [(2, 0), (0, 0)])
@pytest.mark.parametrize("case", CASES, ids=named)
def test_nothing_is_found_at_once(case, shape):
    entry, f, options = case
    x = torch.ones(3, dtype=D, requires_grad=True)
    solution = entry(f, torch.zeros(shape, dtype=D), x, **options)
    assert tuple(solution.value.shape) == shape
    assert solution.status.tolist() == [im.Status.CONVERGED] * shape[0]
    assert solution.residual.tolist() == solution.steps.tolist() == [0] * shape[0]
    (gradient,) = torch.autograd.grad(solution.value.sum(), x)
    assert gradient.tolist() == [0, 0, 0]


@pytest.mark.parametrize("entry", [im.fixed_point, im.root, im.linear_solve])
def test_transforms(entry):
    f = lambda x: entry(scaled, torch.zeros(2, 0), x).value.sum()  # noqa: E731
    x = torch.ones(3)
    assert torch.func.vmap(f)(torch.ones(4, 3)).tolist() == [0, 0, 0, 0]
    assert not torch.func.hessian(f)(x).any()
    assert torch.func.jvp(f, (x,), (x,))[1] == 0


@pytest.mark.parametrize(
    "solver", [im.Dopri5(), im.Adams(), im.Kvaerno5(), im.ImplicitEuler(dt=0.1)], ids=lambda m: type(m).__name__
)
def test_trajectories(solver):
    x = torch.ones(3, dtype=D, requires_grad=True)
    value = im.odeint(lambda t, y, x: scaled(y, x), torch.zeros(2, 0, dtype=D), (0.0, 1.0), x, solver=solver).value
    assert value.shape == (2, 2, 0)
    assert torch.autograd.grad(value.sum(), x)[0].tolist() == [0, 0, 0]
