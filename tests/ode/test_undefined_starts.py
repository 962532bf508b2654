"""Samples at whose start f is NaN, and its derivative too: nobody else's gradient knows of them."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import func, nn

import implicitly as im

D = torch.float64
ADJOINTS = [
    im.RecursiveCheckpointAdjoint(),
    im.RecursiveCheckpointAdjoint(arc_length=True),
    im.BacksolveAdjoint(),
    im.BacksolveAdjoint(seminorm=False),
    im.UnrolledAdjoint(),
]
METHODS = [im.Dopri5(), im.RK4(dt=0.1), im.Kvaerno3(), im.Adams(), im.ReversibleHeun()]
T = (0.0, 0.5, 1.0)
ALONE = {"batch_dims": 1, "on_failure": "ignore"}


class Draining(nn.Module):
    """dy/dt = -sqrt(y - w), which no sample below w = 1 has."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(1, dtype=D))

    def forward(self, t, y, *args):
        return -torch.sqrt(y - self.w * sum(args, 1.0) / (1 + len(args)))


def starts(bad, batch=16):
    """`bad` of them undefined. Of sixteen, one is too few for others to be asked without it."""
    y0 = torch.linspace(2, 3, batch, dtype=D).unsqueeze(1)
    y0[bad] = 0.5
    return y0


def assert_unharmed(f, bad, *args, in_dims=None, through=lambda solution: solution.value, **options):
    """The gradients are those of the good samples alone, which `args` are not of, and 0 for the bad ones."""
    y0 = starts(bad).requires_grad_()
    good = [i for i in range(len(y0)) if i not in bad]
    inputs = (y0, f.w, *(x for x in args if x.requires_grad))
    solution = im.odeint(f, y0, T, *args, in_dims=in_dims, **ALONE, **options)
    assert solution.status[bad].tolist() == [im.Status.NON_FINITE] * len(bad)
    found = torch.autograd.grad(through(solution)[1:, good].sin().sum(), inputs)
    few = starts(bad)[good].requires_grad_()
    alone = through(im.odeint(f, few, T, *args, in_dims=in_dims, **ALONE, **options))
    right = torch.autograd.grad(alone[1:].sin().sum(), (few, *inputs[1:]))
    assert not found[0][bad].any()
    for x, y in zip((found[0][good], *found[1:]), right):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("adjoint", ADJOINTS, ids=lambda a: type(a).__name__)
def test_a_parameter_has_the_gradient_of_the_others(adjoint, method):
    assert_unharmed(Draining(), [3], adjoint=adjoint, solver=method)


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=lambda a: type(a).__name__)
@pytest.mark.parametrize("in_dims", [None, (None,)])
def test_a_shared_arg_needs_no_in_dims(adjoint, in_dims):
    shared = torch.ones(1, dtype=D, requires_grad=True)
    for bad in ([3], list(range(10))):
        assert_unharmed(Draining(), bad, shared, adjoint=adjoint, in_dims=in_dims)


@pytest.mark.parametrize("adjoint", [ADJOINTS[0], ADJOINTS[-1]], ids=lambda a: type(a).__name__)
def test_events_restarts_stops_and_interpolation(adjoint):
    def falls(t, y):
        return y[:, 0] - 1.9

    for event in (im.Event(falls), im.Event(falls, restart=lambda t, y: y + 0.3)):
        assert_unharmed(Draining(), [3], adjoint=adjoint, event=event)
    assert_unharmed(Draining(), [3], adjoint=adjoint, solver=im.Bosh3(tstops=(0.3,)))
    assert_unharmed(
        Draining(), [3], adjoint=adjoint, through=lambda solution: solution.interpolate((0.0, 0.3, 0.9))
    )


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=lambda a: type(a).__name__)
def test_an_arg_of_the_samples_has_no_gradient_where_they_failed(adjoint):
    y0, f = starts([]).requires_grad_(), Draining()
    rates = torch.ones(16, 1, dtype=D).index_fill(0, torch.tensor([3]), 9.0).requires_grad_()  # 5 is above y
    value = im.odeint(f, y0, T, rates, in_dims=0, adjoint=adjoint, **ALONE).value
    of_good = torch.arange(16) != 3
    found = torch.autograd.grad(value[-1, of_good].sum(), (y0, rates, f.w))
    assert found[2].isfinite()
    for x in found[:2]:
        assert x.isfinite().all()
        assert x.flatten().ne(0).tolist() == of_good.tolist()


@pytest.mark.parametrize("adjoint", [*ADJOINTS[:3], ADJOINTS[-1]], ids=lambda a: type(a).__name__)
def test_that_an_arg_of_unknown_dims_makes_a_gradient_nan_is_told(adjoint):
    def f(t, y, rate, shared):
        return -torch.sqrt(rate) * shared * y

    y0, shared = torch.ones(2, 1, dtype=D), torch.ones(1, dtype=D, requires_grad=True)
    rate = torch.tensor([[-1.0], [1.0]], dtype=D)
    options = {"adjoint": adjoint, "batch_dims": 1}
    with pytest.warns(im.ConvergenceWarning, match="NON_FINITE"):
        value = im.odeint(f, y0, T, rate, shared, on_failure="warn", **options).value
    with pytest.warns(im.ConvergenceWarning, match="in_dims"):
        value[-1, 1].sum().backward()
    assert shared.grad.isnan()
    value = im.odeint(f, y0, T, rate, shared, on_failure="ignore", **options).value
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.autograd.grad(value[-1, 1].sum(), shared)
    value = im.odeint(f, y0, T, rate, shared, on_failure="ignore", in_dims=(0, None), **options).value
    (found,) = torch.autograd.grad(value[-1, 1].sum(), shared)
    torch.testing.assert_close(found, -torch.exp(-shared.detach()), rtol=1e-4, atol=0)


@pytest.mark.parametrize("adjoint", [ADJOINTS[0], ADJOINTS[-1]], ids=lambda a: type(a).__name__)
@pytest.mark.parametrize("in_dims", [None, (None,)])
def test_transforms(adjoint, in_dims):
    def end(w, bad):
        y0 = starts(bad, 3)
        solution = im.odeint(
            lambda t, y, w: -torch.sqrt(y - w), y0, T, w, adjoint=adjoint, in_dims=in_dims, **ALONE
        )
        return solution.value[-1, 1:].sum()

    w = torch.tensor([1.0, 0.9], dtype=D)
    for transform in (func.grad, func.hessian, lambda f: lambda w: func.jvp(f, (w,), (torch.ones_like(w),))[1]):
        found, right = (
            torch.stack([transform(lambda w, bad=bad: end(w, bad))(x) for x in w]) for bad in ([0], [])
        )
        torch.testing.assert_close(found, right, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(func.vmap(transform(lambda w: end(w, [0])))(w), found, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=lambda a: type(a).__name__)
def test_where_all_failed_gradients_are_zero(adjoint):
    f, y0 = Draining(), starts(list(range(16))).requires_grad_()
    value = im.odeint(f, y0, T, adjoint=adjoint, **ALONE).value
    for gradient in torch.autograd.grad(value.nan_to_num().sum(), (y0, f.w)):
        assert gradient.isfinite().all()
    assert not gradient.any()


def test_a_delay_equation():
    class Delayed(Draining):
        def forward(self, t, y, delayed):
            return super().forward(t, delayed[0])

    f, found = Delayed(), []
    for bad in ([0], []):
        y0 = starts(bad, 3)
        for adjoint in (ADJOINTS[0], ADJOINTS[-1]):
            value = im.ddeint(f, y0, (0.0, 1.0), lags=(0.4,), adjoint=adjoint, **ALONE).value
            found.append(torch.autograd.grad(value[-1, 1:].sum(), f.w)[0])
    torch.testing.assert_close(found[:2], found[2:], rtol=1e-4, atol=1e-6)


def test_f_is_called_no_more_often_where_none_failed():
    """Those calls of a solve and of its derivative that the method needs."""
    calls = []

    def f(t, y):
        calls.append(len(y))
        return -torch.sqrt(y - 1)

    for adjoint, again in ((im.RecursiveCheckpointAdjoint(keep_bytes=0), 17), (ADJOINTS[0], 1), (ADJOINTS[-1], 0)):
        calls.clear()
        solution = im.odeint(
            f, starts([]).requires_grad_(), (0.0, 1.0), solver=im.RK4(dt=0.25), adjoint=adjoint, **ALONE
        )
        assert len(calls) == solution.evaluations
        solution.value[-1].sum().backward()
        assert solution.steps[0] == 4
        assert len(calls) == solution.evaluations + again


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("adjoint", [ADJOINTS[0], ADJOINTS[2]], ids=lambda a: type(a).__name__)
def test_a_graph(traced, adjoint):
    assert_unharmed(Draining(), [3], adjoint=adjoint, solver=im.Bosh3(rtol=1e-2), compile=True)
    assert traced
