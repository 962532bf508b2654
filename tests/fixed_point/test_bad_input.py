"""Bad input is refused at the door, with what came and what to do; failures on the way sample by sample."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import grad, jacrev, jvp, vmap

import implicitly as im
from tests.problems import draw, matrix

D = torch.float64
Z0 = torch.zeros(4, 3, dtype=D)
X = draw(4, 3, seed=41)
W = matrix(3, 0.5, 42)
SOLVERS = [im.FixedPointIteration(), im.Anderson(), im.Broyden(), im.Newton(), im.NewtonKrylov()]
ENTRIES = [im.fixed_point, im.root]


def affine(z, x):
    return 0.5 * z + x


def refused(error, *parts, f=affine, z0=Z0, args=(X,), entry=im.fixed_point, **options):
    """The call raises `error`, whose message has all the parts; f is called once at most."""
    calls = []

    def counted(*inputs):
        calls.append(1)
        return f(*inputs)

    with pytest.raises(error) as caught:
        entry(counted, z0, *args, **options)
    for part in parts:
        assert part in str(caught.value)
    assert len(calls) <= 1


# ------------------------------------------------------------------------------------------------- states


@pytest.mark.parametrize("entry", ENTRIES)
def test_another_shape_than_z_is_refused_with_both(entry):
    refused(ValueError, "f must return the shape of z0", "(4, 3)", "(4, 2)", f=lambda z, x: z[:, :2], entry=entry)
    refused(ValueError, "expected (4, 3), got (3,)", f=lambda z, x: z.sum(0), entry=entry)


@pytest.mark.parametrize("entry", ENTRIES)
def test_another_structure_than_z_is_refused(entry):
    state = {"a": Z0, "b": Z0[:, 0]}
    refused(ValueError, "structure of z0", f=lambda z, x: {"a": z["a"]}, z0=state, entry=entry)
    refused(ValueError, "structure of z0", f=lambda z, x: (z, z), entry=entry)
    refused((ValueError, TypeError), "f must return", f=lambda z, x: None, entry=entry)
    refused(TypeError, "f must return tensors, got a float", f=lambda z, x: 1.0, entry=entry)


def test_another_dtype_than_z_is_refused_and_where_it_usually_comes_from():
    refused(
        ValueError,
        "f must return the dtype of z0",
        "expected torch.float32, got torch.float64",
        "an argument or parameter of another dtype",
        z0=Z0.float(),
    )
    refused(ValueError, "expected torch.float64, got torch.float32", f=lambda z, x: z.float())


def test_another_device_than_z_is_refused():
    expected = f"f must return the device of z0: expected {Z0.device}, got meta"
    refused(ValueError, expected, f=lambda z, x: z.to("meta"))


def test_a_state_of_several_dtypes_or_devices_is_refused():
    refused(ValueError, "z0 mixes dtypes or devices", "float32", "float64", z0=(Z0, Z0.float()))
    refused(ValueError, "z0 mixes dtypes or devices", str(Z0.device), "meta", z0=(Z0, Z0.to("meta")))


def test_a_state_whose_tensors_disagree_on_the_batch_is_refused():
    refused(ValueError, "disagree on the batch", "(4, 3)", "(2, 3)", z0=(Z0, Z0[:2]))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool])
def test_an_integer_state_is_refused_with_what_to_pass(dtype):
    refused(TypeError, f"z0 has dtype {dtype}", "z0.float()", z0=Z0.to(dtype))


def test_a_state_that_is_sparse_or_nested_is_refused_with_what_to_pass():
    refused(TypeError, "z0 is a tensor of torch.sparse_coo", "z0.to_dense()", z0=Z0.to_sparse())
    nested = torch.nested.nested_tensor([Z0[0], Z0[1, :1]], layout=torch.jagged)
    refused(TypeError, "z0 is a nested tensor", "z0.to_padded_tensor(0.0)", z0=nested)


def test_what_is_no_state_is_refused():
    refused(ValueError, "z0 holds no tensor", z0={})
    refused(TypeError, "z0 must hold tensors only, got a float", z0=0.0)
    refused(TypeError, "z0 must hold tensors only, got a str", z0={"a": Z0, "b": "b"})
    refused(ValueError, "0-d tensor", "batch_dims=0", z0=torch.tensor(0.0))


def test_what_is_no_function_is_refused():
    with pytest.raises(TypeError, match="f must be callable, got a Tensor"):
        im.fixed_point(Z0, Z0, X)


@pytest.mark.parametrize("entry", ENTRIES)
def test_an_f_that_writes_into_z_is_refused(entry):
    """Solvers keep their iterates where they hand them out."""
    z0 = Z0.clone()
    refused(ValueError, "in place", f=lambda z, x: z.mul_(0.5).add_(x), z0=z0, entry=entry)
    assert torch.equal(z0, Z0)


def test_an_error_inside_f_comes_through_as_it_is():
    def broken(z, x):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        im.fixed_point(broken, Z0, X)


# ------------------------------------------------------------------------------------------------ options


@pytest.mark.parametrize("batch_dims", [2, -1, None])
def test_batch_dims_is_zero_or_one(batch_dims):
    refused(ValueError, "batch_dims must be 0", "or 1", f"got {batch_dims}", batch_dims=batch_dims)


@pytest.mark.parametrize("on_failure", ["warning", None, True])
def test_on_failure_is_one_of_three(on_failure):
    refused(ValueError, 'on_failure must be "raise", "warn" or "ignore"', repr(on_failure), on_failure=on_failure)


@pytest.mark.parametrize(
    ("in_dims", "args", "parts"),
    [
        ((0, 0), (X,), ["in_dims=(0, 0) does not fit the 1 args"]),
        ((0,), (X, X), ["in_dims=(0,) does not fit the 2 args"]),
        (({"a": 0},), ({"b": X},), ["in_dims", "does not fit"]),
        (1, (X,), ["in_dims is 1 for an arg of shape (4, 3)", "must have 4 entries there", "it has 3"]),
        ((2,), (X,), ["in_dims is 2 for an arg of shape (4, 3), which has no such dimension"]),
        ((0,), (X[:2],), ["in_dims is 0 for an arg of shape (2, 3)", "must have 4 entries there", "it has 2"]),
        (("0",), (X,), ["in_dims is '0'"]),
        ((0,), (torch.tensor(1.0),), ["in_dims is 0 for an arg of shape ()"]),
    ],
)
def test_in_dims_that_do_not_fit_are_refused_with_the_shapes(in_dims, args, parts):
    refused(ValueError, *parts, f=lambda z, *args: 0.5 * z, args=args, in_dims=in_dims)


def test_in_dims_for_one_system_are_refused():
    refused(ValueError, "in_dims", "batch_dims=0 means one system", in_dims=0, batch_dims=0)


@pytest.mark.parametrize("make", [type(s) for s in SOLVERS])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rtol": -1e-3}, "rtol must be a finite number >= 0, got -0.001"),
        ({"rtol": float("nan")}, "rtol must be a finite number >= 0, got nan"),
        ({"atol": float("inf")}, "atol must be a finite number >= 0, got inf"),
        ({"max_steps": 0}, "max_steps must be at least 1, got 0"),
    ],
)
def test_wrong_tolerances_and_limits_are_refused_by_every_solver(make, options, message):
    with pytest.raises(ValueError, match=f"{make.__name__}: {message}"):
        make(**options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: im.FixedPointIteration(damping=0.0),
            r"Iteration: damping must be in \(0, 1\], got 0.0",
        ),
        (lambda: im.FixedPointIteration(damping=1.5), r"damping must be in \(0, 1\], got 1.5"),
        (lambda: im.Anderson(history=0), "Anderson: history must be at least 1, got 0"),
        (lambda: im.Anderson(damping=-1.0), r"Anderson: damping must be in \(0, 1\], got -1.0"),
        (lambda: im.Anderson(regularisation=-1.0), "Anderson: regularisation must be finite and >= 0, got -1.0"),
        (lambda: im.Anderson(regularisation=float("nan")), "finite and >= 0, got nan"),
        (lambda: im.Broyden(history=0), "Broyden: history must be at least 1, got 0"),
        (lambda: im.PhantomAdjoint(steps=0), "PhantomAdjoint: steps must be at least 1"),
        (lambda: im.PhantomAdjoint(damping=0.0), r"damping in \(0, 1\]"),
        (
            lambda: im.ImplicitAdjoint(inverse="yes"),
            'inverse must be "ignore", "start" or "precondition", got \'yes\'',
        ),
    ],
)
def test_wrong_options_of_solvers_and_adjoints_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_unknown_options_are_never_swallowed():
    for call in (lambda: im.Anderson(memory=3), lambda: im.ImplicitAdjoint(tol=1e-3)):
        with pytest.raises(TypeError, match="unexpected keyword"):
            call()
    refused(TypeError, "unexpected keyword", tol=1e-3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: im.Anderson(max_steps=2.5), "Anderson: max_steps must be an int, got 2.5"),
        (lambda: im.GMRES(max_steps=True), "GMRES: max_steps must be an int, got True"),
        (lambda: im.Anderson(history=2.5), "Anderson: history must be an int, got 2.5"),
        (lambda: im.Broyden(history=2.5), "Broyden: history must be an int, got 2.5"),
        (lambda: im.GMRES(restart=2.5), "GMRES: restart must be an int, got 2.5"),
        (lambda: im.Newton(rtol=torch.tensor(1e-3)), "Newton: rtol must be a number, got a Tensor"),
        (lambda: im.Newton(atol="1e-3"), "Newton: atol must be a number, got a str"),
    ],
)
def test_options_of_another_kind_are_refused(make, message):
    with pytest.raises(TypeError, match=message):
        make()


def of_linear_solver(solver):
    return im.linear_solve(lambda u, A: u @ A, Z0, torch.eye(3, dtype=D), solver=solver)


@pytest.mark.parametrize(
    "use",
    [im.ImplicitAdjoint, lambda s: im.NewtonKrylov(linear_solver=s), of_linear_solver],
    ids=["adjoint", "NewtonKrylov", "linear_solve"],
)
@pytest.mark.parametrize(
    ("solver", "message"),
    [
        ("gmres", "must be a solver such as im.GMRES"),
        (im.Dopri5(), "must be a solver such as im.GMRES"),
        (im.LBFGS(), "LBFGS minimises"),
        (im.LevenbergMarquardt(), "LevenbergMarquardt minimises"),
        (im.NewtonKKT(), "NewtonKKT minimises"),
    ],
    ids=lambda s: type(s).__name__,
)
def test_what_solves_no_linear_systems_is_refused(use, solver, message):
    with pytest.raises(TypeError, match=message):
        use(solver)


@pytest.mark.parametrize("solver", [im.GMRES(), im.CG(), im.BiCGStab(), im.DenseLU(), im.Neumann()])
def test_a_linear_solver_for_a_condition_that_is_not_linear_is_refused(solver):
    refused(
        (TypeError, ValueError), type(solver).__name__, "linear", f=lambda z, x: torch.tanh(z) + x, solver=solver
    )


@pytest.mark.parametrize("what", ["solver", "adjoint"])
@pytest.mark.parametrize("value", ["anderson", None, im.Anderson])
def test_what_is_no_solver_or_adjoint_is_refused_by_name(what, value):
    refused(TypeError, what, **{what: value})


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize(
    ("dtype", "rtol"), [(torch.float64, 1e-16), (torch.float32, 1e-8), (torch.bfloat16, 1e-3)]
)
def test_tolerances_that_the_dtype_cannot_reach_are_refused_with_the_number_it_can(solver, dtype, rtol):
    refused(
        ValueError,
        f"{type(solver).__name__}: {dtype} cannot reach rtol={rtol:g}",
        f"{torch.finfo(dtype).eps:.2g}",
        "wider dtype",
        f=lambda z, x: 0.5 * z + x,
        z0=Z0.to(dtype),
        args=(X.to(dtype),),
        solver=type(solver)(rtol=rtol),
    )


def test_a_backward_tolerance_that_the_dtype_cannot_reach_is_refused_before_any_work():
    for adjoint in (im.ImplicitAdjoint(rtol=1e-9), im.ImplicitAdjoint(linear_solver=im.GMRES(rtol=1e-9))):
        refused(
            ValueError,
            "cannot reach rtol=1e-09",
            z0=Z0.float(),
            args=(X.float().requires_grad_(),),
            adjoint=adjoint,
        )


def test_under_autocast_its_dtype_decides_what_tolerances_can_be_reached():
    with torch.autocast("cpu", torch.bfloat16):
        refused(
            ValueError,
            "GMRES: torch.bfloat16 cannot reach rtol=0.0001",
            f=lambda z, x: torch.tanh(z) + x,
            z0=Z0.float(),
            args=(X.float().requires_grad_(),),
            adjoint=im.ImplicitAdjoint(im.GMRES(rtol=1e-4)),
        )


@pytest.mark.parametrize("adjoint", [im.PhantomAdjoint(), im.JacobianFreeAdjoint()])
def test_adjoints_of_iterations_are_refused_for_a_root(adjoint):
    refused(ValueError, "which a root does not have", "ImplicitAdjoint", entry=im.root, adjoint=adjoint)


def test_starting_from_an_estimate_of_the_inverse_needs_broyden():
    adjoint = im.ImplicitAdjoint(inverse="start")
    refused(ValueError, "inverse='start' needs a solver that estimates the inverse", "Broyden", adjoint=adjoint,
            solver=im.Anderson())  # fmt: skip


def test_compiling_a_solve_that_autograd_is_to_record_is_refused():
    refused(ValueError, "UnrolledAdjoint", compile=True, adjoint=im.UnrolledAdjoint())


# ------------------------------------------------------------------------------------------- captured tensors


SCALE = draw(3, seed=43).requires_grad_()


class Captor:
    def __init__(self, scale):
        self.scale = scale

    def __call__(self, z, x):
        return 0.5 * z + x * self.scale


def captors(scale):
    """Functions that reach a tensor which is neither in args nor a parameter."""
    box = [scale]
    return {
        "a closure": lambda z, x: 0.5 * z + x * scale,
        "a closure over a list": lambda z, x: 0.5 * z + x * box[0],
        "a partial": functools.partial(lambda scale, z, x: 0.5 * z + x * scale, scale),
        "a default": lambda z, x, scale=scale: 0.5 * z + x * scale,
        "an attribute": Captor(scale),
        "inside z": lambda z, x: z * scale.sigmoid() * 0.5 + x,
    }


@pytest.mark.parametrize("way", captors(SCALE))
@pytest.mark.parametrize("entry", ENTRIES)
def test_a_captured_leaf_is_refused_naming_its_shape_and_the_remedy(way, entry):
    scale = SCALE.detach().requires_grad_()
    refused(ValueError, "(3,)", "requires gradients", "Pass it in args", f=captors(scale)[way], entry=entry)


@pytest.mark.parametrize("way", captors(SCALE))
def test_a_captured_tensor_of_a_graph_is_refused(way):
    refused(ValueError, "(3,)", "Pass it in args", f=captors((2 * SCALE).exp())[way])


def _with_global(z, x):
    return 0.5 * z + x * SCALE


def test_a_global_tensor_that_requires_grad_is_refused():
    refused(ValueError, "'SCALE' of shape (3,)", "Pass it in args", f=_with_global)


def test_a_parameter_beyond_the_reach_of_the_search_is_refused_not_lost():
    class Box:
        pass

    box = Box()
    box.cell = nn.Linear(3, 3).double()
    refused(ValueError, "(3, 3)", "Pass it in args", f=lambda z, x: 0.1 * box.cell(z) + x)


def test_a_captured_tensor_that_needs_no_gradient_is_fine():
    scale = SCALE.detach()
    value = im.fixed_point(lambda z, x: 0.5 * z + x * scale, Z0, X.requires_grad_()).value
    torch.testing.assert_close(value, 2 * X * scale)


def test_a_captured_tensor_that_is_also_in_args_is_refused_as_it_is_used_past_them():
    scale = SCALE.detach().requires_grad_()
    with pytest.raises(ValueError, match="Pass it in args"):
        im.fixed_point(lambda z, x, same: 0.5 * z + x * scale, Z0, X, scale)


def _captured(x, scale):
    return im.fixed_point(lambda z, x: 0.5 * z + x * scale, Z0, x).value


TRANSFORMED = {
    "grad": lambda: grad(lambda s: _captured(X, s).sum())(SCALE.detach()),
    "grad, with args of the same transform": lambda: grad(lambda s: _captured(X * s, s).sum())(SCALE.detach()),
    "jacrev": lambda: jacrev(lambda s: _captured(X, s))(SCALE.detach()),
    "jvp": lambda: jvp(lambda s: _captured(X, s), (SCALE.detach(),), (SCALE.detach(),)),
    "jvp, with args of the same transform": lambda: jvp(
        lambda s: _captured(X * s, s), (SCALE.detach(),), (SCALE.detach(),)
    ),
    "vmap": lambda: vmap(lambda s: _captured(X, s))(torch.ones(2, 3, dtype=D)),
}


@pytest.mark.parametrize("transform", TRANSFORMED)
def test_a_captured_tensor_of_a_transform_is_refused(transform):
    with pytest.raises(ValueError, match=r"'scale' of shape \(3,\).*Pass it in args"):
        TRANSFORMED[transform]()


def test_a_captured_tensor_of_vmap_is_right_where_args_are_mapped_too():
    scales = draw(2, 3, seed=45)
    values = vmap(lambda s: _captured(X * s, s))(scales)
    torch.testing.assert_close(values, 2 * X.detach() * scales.unsqueeze(1) ** 2)


@pytest.mark.parametrize("both", [False, True], ids=["captured", "captured, and args are dual too"])
def test_a_captured_dual_number_is_refused(both):
    with forward_ad.dual_level():
        scale = forward_ad.make_dual(SCALE.detach(), torch.ones(3, dtype=D))
        x = X.detach() * scale if both else X.detach()
        with pytest.raises(ValueError, match=r"'scale' of shape \(3,\).*Pass it in args"):
            _captured(x, scale)


def test_recording_the_solve_captures_whatever_f_uses():
    scale = SCALE.detach().requires_grad_()
    x = X.detach().requires_grad_()
    f = lambda z, x: 0.5 * z + x * scale  # noqa: E731
    value = im.fixed_point(f, Z0, x, adjoint=im.UnrolledAdjoint(), solver=im.Newton()).value
    gradients = torch.autograd.grad(value.sum(), (x, scale))
    torch.testing.assert_close(gradients[0], 2 * scale.detach().expand(4, 3))
    torch.testing.assert_close(gradients[1], 2 * X.detach().sum(0))


# ------------------------------------------------------------------------------ failures on the way


class BreaksAt:
    """tanh(W z + x), but NaN (or inf) for one sample from call k on."""

    def __init__(self, k, bad):
        self.calls, self.k, self.bad = 0, k, bad

    def __call__(self, z, x):
        value = torch.tanh(z @ W + x)
        if self.calls >= self.k:
            value = torch.where((torch.arange(len(z)) == 2)[:, None], self.bad, value)
        self.calls += 1
        return value


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("k", [0, 1, 3])
@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
def test_nan_from_f_at_some_call_ends_that_sample_and_no_other(solver, k, bad):
    x = X.detach().clone().requires_grad_()
    solution = im.fixed_point(BreaksAt(k, bad), Z0, x, solver=solver, on_failure="ignore")
    assert solution.converged.tolist() == [True, True, False, True]
    assert int(solution.status[2]) in (im.Status.NON_FINITE, im.Status.SINGULAR)
    good = [0, 1, 3]
    alone = im.fixed_point(BreaksAt(10**9, bad), Z0[good], x[good], solver=solver)
    torch.testing.assert_close(solution.value[good], alone.value, rtol=1e-9, atol=1e-9)
    (gradient,) = torch.autograd.grad(solution.value[good].sum(), x)
    assert bool(gradient.isfinite().all())
    assert not gradient[2].any()


def _root_of_negative(z, W, x):
    """NaN where x < 0, and so are its derivatives; z and x themselves are finite."""
    return torch.tanh(z @ W + x.sqrt())


def _undefined_for_one_sample(adjoint, in_dims, on_failure):
    """The solution with x < 0 in sample 1, the inputs, and what their gradients would be without it."""
    x = X.detach().abs()
    x[1] = -1.0
    x.requires_grad_()
    shared, good = W.clone().requires_grad_(), [0, 2, 3]
    options = {"solver": im.Anderson(), "adjoint": adjoint, "on_failure": on_failure}
    solution = im.fixed_point(_root_of_negative, Z0, shared, x, in_dims=in_dims, **options)
    alone = im.fixed_point(_root_of_negative, Z0[good], shared, x[good], **options)
    assert solution.converged.tolist() == [True, False, True, True]
    return solution, (shared, x), torch.autograd.grad(alone.value.sum(), (shared, x))


@pytest.mark.parametrize("adjoint", [im.ImplicitAdjoint(), im.PhantomAdjoint(), im.UnrolledAdjoint()])
def test_a_sample_where_f_is_undefined_spoils_no_gradient_where_in_dims_says_what_is_its_own(adjoint):
    solution, inputs, expected = _undefined_for_one_sample(adjoint, (None, 0), "ignore")
    actual = torch.autograd.grad(solution.value.nansum(), inputs)
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("adjoint", [im.ImplicitAdjoint(), im.PhantomAdjoint()])
@pytest.mark.filterwarnings("ignore:.*did not converge")
def test_without_in_dims_a_gradient_that_such_a_sample_spoils_is_announced_with_the_remedy(adjoint):
    solution, inputs, _ = _undefined_for_one_sample(adjoint, None, "warn")
    with pytest.warns(
        im.ConvergenceWarning, match="is NaN, because f has no finite derivative .* Use in_dims"
    ) as caught:
        torch.autograd.grad(solution.value.nansum(), inputs)
    assert any("tensor of shape (3, 3)" in str(warning.message) for warning in caught)


def test_all_samples_failing_gives_zero_gradients():
    x = X.detach().clone().requires_grad_()
    value = im.fixed_point(lambda z, x: (x - 10).sqrt() * z, Z0 + 1, x, on_failure="ignore").value
    (gradient,) = torch.autograd.grad(value.nansum(), x)
    assert not gradient.any()


# ---------------------------------------------------------------------------------- coupled samples


def test_coupled_samples_are_named():
    assert im.check_independence(affine, Z0, X) == []
    assert im.check_independence(lambda z, x: z - z.mean(0) + x, Z0[:3], X[:3]) == [
        (0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1),
    ]  # fmt: skip
    neighbours = im.check_independence(lambda z: z + 0.1 * z.roll(1, 0), Z0)
    assert sorted(neighbours) == [(0, 3), (1, 0), (2, 1), (3, 2)]


def test_batch_statistics_couple_samples_in_training_and_not_in_evaluation():
    cell = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).double()
    z = draw(4, 3, seed=44)
    assert len(im.check_independence(cell, z)) == 12
    assert im.check_independence(cell.eval(), z) == []


def test_coupling_is_found_in_pytrees():
    f = lambda z: {"a": z["a"] + z["b"].sum(0, keepdim=True), "b": z["b"]}  # noqa: E731
    coupled = im.check_independence(f, {"a": torch.zeros(2, 3), "b": torch.zeros(2, 3)})
    assert sorted(coupled) == [(0, 1), (1, 0)]


class OfEachSample(nn.Module):
    """Has a parameter of one entry a sample, which nobody can tell from a shared one."""

    def __init__(self):
        super().__init__()
        self.rate = nn.Parameter(torch.linspace(0.1, 0.9, 8).unsqueeze(1))

    def forward(self, *inputs):
        return self.rate * torch.cos(inputs[-1])


@pytest.mark.parametrize(
    "solve",
    [
        lambda f, z: im.fixed_point(f, z, solver=im.FixedPointIteration(rtol=1e-6)),
        lambda f, z: im.odeint(
            f, z, torch.linspace(0.1, 3, 8).unsqueeze(1) * torch.tensor([0.0, 1.0]), batch_dims=1
        ),
    ],
    ids=["fixed_point", "odeint"],
)
def test_a_parameter_of_each_sample_is_named_where_samples_were_dropped(solve):
    with pytest.raises(RuntimeError, match=r"must match the size .*\n.*had been dropped .* in args, with in_dims"):
        solve(OfEachSample(), torch.ones(8, 3))


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
def test_an_f_that_returns_fewer_samples_later_is_refused(solver):
    """One row would stand for all samples, and each would seem to have converged."""
    calls = []

    def f(z, x):
        calls.append(z)
        value = 0.5 * torch.tanh(z) + x
        return value if len(calls) < 3 else value[:1]

    with pytest.raises(ValueError, match="f returned 1 samples of 3 numbers for 4 of 3"):
        im.fixed_point(f, Z0, X, solver=solver)


def test_parameters_that_a_method_of_a_plain_object_uses_get_gradients():
    class Model:
        def __init__(self):
            self.linear = torch.nn.Linear(3, 3, dtype=D)

        def step(self, z, x):
            return torch.tanh(0.3 * self.linear(z) + x)

    model = Model()
    im.fixed_point(model.step, Z0, X).value.sum().backward()
    assert model.linear.weight.grad.abs().max() > 0
