"""Hypergradients: exact ones, unrolled trainings, finite differences; and what is refused or reported."""

from __future__ import annotations

import functools
import time
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import func, nn
from torch.func import functional_call

import implicitly as im
from implicitly.viz import peak_bytes
from tests.problems import draw

D = torch.float64
X, Y = draw(20, 4, seed=1), draw(20, seed=2)
X_VAL, Y_VAL = draw(10, 4, seed=3), draw(10, seed=4)
LOG_DECAY = draw(4, seed=5)
TIGHT = im.CG(rtol=1e-13)
SOLVERS = [
    TIGHT,
    im.DenseLU(rtol=1e-13),
    im.GMRES(rtol=1e-13),
    im.Neumann(rtol=1e-13, damping=0.03, max_steps=2000),
]


def ridge_loss(w, log_decay, x=X, y=Y):
    return 0.5 * (x @ w - y).square().sum() + 0.5 * (log_decay.exp() * w * w).sum()


def ridge(log_decay, x=X, y=Y):
    """The minimiser; by the inverse, as `torch.linalg.solve` of a vector is wrong when pushed forward twice."""
    return torch.linalg.inv(x.mT @ x + torch.diag_embed(log_decay.exp())) @ (x.mT @ y)


W = ridge(LOG_DECAY)


def attached(log_decay, w=W, solver=TIGHT, **options):
    return im.implicit_gradient(ridge_loss, w, log_decay, linear_solver=solver, on_failure="raise", **options)


def validation_loss(w):
    return (X_VAL @ w - Y_VAL).square().mean()


def close(actual, expected, atol=1e-10):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


# -------------------------------------------------------------------------------------- against closed forms


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
def test_the_jacobian_of_ridge_regression_is_exact(solver):
    close(func.jacrev(lambda v: attached(v, solver=solver))(LOG_DECAY), func.jacrev(ridge)(LOG_DECAY))
    close(func.jacfwd(lambda v: attached(v, solver=solver))(LOG_DECAY), func.jacrev(ridge)(LOG_DECAY))


def test_the_value_is_what_came():
    state = {"b": W[:1].clone(), "a": (W[1:3].reshape(2, 1).clone(), W[3].clone())}

    def flat(w):
        return torch.cat([w["b"], w["a"][0].flatten(), w["a"][1][None]])

    out = im.implicit_gradient(lambda w, v: ridge_loss(flat(w), v), state, LOG_DECAY.requires_grad_())
    LOG_DECAY.requires_grad_(False)
    assert torch.equal(flat(out), W)
    assert out["a"][0].shape == (2, 1)
    assert out["a"][1].shape == ()


TRANSFORMS = {
    "hessian": lambda f: func.hessian(lambda v: validation_loss(f(v))),
    "jacrev-jacfwd": lambda f: func.jacrev(func.jacfwd(f)),
    "jacfwd-jacfwd": lambda f: func.jacfwd(func.jacfwd(f)),
    "jacfwd-jacrev": lambda f: func.jacfwd(func.jacrev(f)),
    "third": lambda f: func.jacrev(func.jacrev(func.jacrev(lambda v: validation_loss(f(v))))),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_higher_derivatives_are_exact(name):
    transform = TRANSFORMS[name]
    close(transform(attached)(LOG_DECAY), transform(ridge)(LOG_DECAY))


def test_vmap_maps_over_trained_problems():
    decays = LOG_DECAY + draw(3, 4, seed=6)
    w = ridge(decays)
    out = func.vmap(func.jacrev(attached))(decays, w)
    close(out, func.vmap(func.jacrev(ridge))(decays))


def test_differences_in_both_modes_and_of_second_order():
    def f(v):  # the point follows, as a training would
        return attached(v, w=ridge(v))

    v = LOG_DECAY.clone().requires_grad_()
    assert torch.autograd.gradcheck(f, v, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(f, v, check_fwd_over_rev=True)


def test_a_batch_of_problems_is_one_call():
    x, y, decays = draw(3, 20, 4, seed=7), draw(3, 20, seed=8), LOG_DECAY + draw(3, 4, seed=9)
    losses = func.vmap(ridge_loss)
    solutions = func.vmap(ridge)(decays, x, y)

    def batched(v):
        return im.implicit_gradient(
            losses, solutions, v, x, y, batch_dims=1, in_dims=0, linear_solver=TIGHT, on_failure="raise"
        )

    expected = func.vmap(func.jacrev(ridge))(decays, x, y)
    close(func.jacrev(batched)(decays).diagonal(dim1=0, dim2=2), expected.permute(1, 2, 0))


# ------------------------------------------------------------------------- against differences and unrolling


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).double()


MODEL = network()
TARGET = (X @ draw(4, seed=11)).sin()
START = {k: v.detach().clone() for k, v in MODEL.named_parameters()}


def network_loss(w, log_decay, weights):
    errors = (functional_call(MODEL, w, (X,))[:, 0] - TARGET).square()
    return (weights.sigmoid() * errors).mean() + 0.5 * sum((log_decay[k].exp() * w[k] ** 2).sum() for k in w)


HYPER = {k: torch.full_like(v, -3.5) for k, v in START.items()}, torch.zeros(20, dtype=D)


def flat_loss(v, hyper):
    return network_loss(_unflatten(v, START), *hyper)


@functools.cache
def trained():
    """The flat parameters of a minimum, by L-BFGS."""
    v = nn.utils.parameters_to_vector(START.values()).requires_grad_()
    optimizer = torch.optim.LBFGS([v], max_iter=500, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = flat_loss(v, HYPER)
        loss.backward()
        return loss

    optimizer.step(closure)
    return v.detach()


def train(hyper):
    """Recordable Newton steps to the minimum of other, near, hyperparameters."""
    v = trained()
    for _ in range(4):
        v = v - torch.linalg.inv(func.hessian(flat_loss)(v, hyper)) @ func.grad(flat_loss)(v, hyper)
    return _unflatten(v, START)


def _unflatten(v, like):
    return {k: part.view_as(t) for (k, t), part in zip(like.items(), v.split([t.numel() for t in like.values()]))}


def outer(w):
    return (functional_call(MODEL, w, (X_VAL,))[:, 0] - Y_VAL).square().mean()


def trained_and_leaves():
    hyper = ({k: v.clone().requires_grad_() for k, v in HYPER[0].items()}, HYPER[1].clone().requires_grad_())
    with torch.no_grad():
        return train(hyper), hyper, [*hyper[0].values(), hyper[1]]


def test_a_network_with_decay_per_parameter_and_data_weights_agrees_with_unrolling():
    w, hyper, leaves = trained_and_leaves()
    unrolled = torch.autograd.grad(outer(train(hyper)), leaves)
    for solver in (TIGHT, im.DenseLU(rtol=1e-13)):
        out = im.implicit_gradient(network_loss, w, *hyper, linear_solver=solver, on_failure="raise")
        for ours, theirs in zip(torch.autograd.grad(outer(out), leaves), unrolled):
            close(ours, theirs, 1e-9)
    assert all(p.grad is None for p in MODEL.parameters())


def test_a_network_agrees_with_differences_along_a_direction():
    w, hyper, leaves = trained_and_leaves()
    out = im.implicit_gradient(network_loss, w, *hyper, linear_solver=TIGHT, on_failure="raise")
    gradients = torch.autograd.grad(outer(out), leaves)
    directions = [draw(*t.shape, seed=i) for i, t in enumerate(leaves)]
    step, values = 1e-4, []
    for sign in (1, -1):
        moved = [t.detach() + sign * step * d for t, d in zip(leaves, directions)]
        values.append(float(outer(train((dict(zip(HYPER[0], moved)), moved[-1])))))
    expected = (values[0] - values[1]) / (2 * step)
    assert sum(float((g * d).sum()) for g, d in zip(gradients, directions)) == pytest.approx(expected, rel=1e-6)


def test_parameters_of_modules_count_where_they_are_used_and_only_there():
    """A feature extractor trained from outside, a head trained from inside whose module is closed over."""
    features, head = nn.Linear(4, 3).double(), nn.Linear(3, 1, bias=False).double()

    def loss(w, log_decay):
        prediction = functional_call(head, {"weight": w}, (features(X).tanh(),))[:, 0]
        return (prediction - Y).square().sum() + log_decay.exp() * w.square().sum()

    log_decay = torch.zeros((), dtype=D, requires_grad=True)

    def solution():
        f = features(X).tanh()
        return torch.linalg.inv(f.T @ f + log_decay.exp() * torch.eye(3, dtype=D)) @ f.T @ Y

    w = solution().detach()[None]
    for params in (w, nn.Parameter(w)):
        out = im.implicit_gradient(loss, params, log_decay, linear_solver=TIGHT)
        wanted = [log_decay, features.weight, features.bias]
        expected = torch.autograd.grad(solution().sin().sum(), wanted)
        for ours, theirs in zip(torch.autograd.grad(out.sin().sum(), wanted, retain_graph=True), expected):
            close(ours, theirs)
        out.sum().backward()
        assert params.grad is None
        assert head.weight.grad is None
        assert features.weight.grad is not None


def test_a_module_may_be_the_loss():
    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.log_decay = nn.Parameter(torch.zeros((), dtype=D))

        def forward(self, w):
            return (w - 1).square().sum() + self.log_decay.exp() * w.square().sum()

    loss = Loss()
    for f in (loss, loss.forward):
        loss.zero_grad()
        im.implicit_gradient(f, torch.full((3,), 0.5, dtype=D), on_failure="raise").sum().backward()
        close(loss.log_decay.grad, torch.tensor(-0.75, dtype=D))  # of 3 / (1 + exp(log_decay))


def test_running_statistics_stay_as_they_are():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 1)).double()
    before = {k: v.clone() for k, v in net.named_buffers()}

    def loss(w, log_decay):
        return F.mse_loss(functional_call(net, w, (X,))[:, 0], Y) + log_decay.exp() * w["3.weight"].square().sum()

    log_decay = torch.zeros((), dtype=D, requires_grad=True)
    params = {k: v.detach() for k, v in net.named_parameters()}
    out = im.implicit_gradient(loss, params, log_decay, tolerance=None, damping=100.0)
    out["0.weight"].sum().backward()
    assert log_decay.grad is not None
    assert log_decay.grad != 0
    assert all(torch.equal(v, before[k]) for k, v in net.named_buffers())
    assert net.training


def test_complex_params_and_low_precision():
    a, b = torch.complex(draw(6, 3, seed=61), draw(6, 3, seed=62)), draw(6, seed=63)

    def loss(w, v):
        return (a @ w - b).abs().square().sum() + v.exp() * (w * w.conj()).real.sum()

    def solution(v):
        return torch.linalg.inv(a.mH @ a + v.exp() * torch.eye(3, dtype=D)) @ (a.mH @ b.to(a.dtype))

    v = torch.zeros((), dtype=D, requires_grad=True)
    w = im.implicit_gradient(loss, solution(v).detach(), v, linear_solver=TIGHT)
    expected = torch.autograd.grad(solution(v).abs().sum(), v)
    close(torch.autograd.grad(w.abs().sum(), v), expected)

    half = LOG_DECAY.bfloat16().requires_grad_()
    x, y = X.bfloat16(), Y.bfloat16()
    w = im.implicit_gradient(lambda w, v: ridge_loss(w, v, x, y), W.bfloat16(), half, tolerance=0.1)
    (gradient,) = torch.autograd.grad(w.float().sum(), half)
    assert w.dtype == gradient.dtype == torch.bfloat16
    exact = func.grad(lambda v: ridge(v).sum())(LOG_DECAY)
    torch.testing.assert_close(gradient.double(), exact, rtol=0.1, atol=0.01)


def test_damping_is_the_gradient_of_params_held_back():
    damping = 0.7
    h = X.T @ X + torch.diag(LOG_DECAY.exp())
    expected = -torch.linalg.inv(h + damping * torch.eye(4, dtype=D)) @ torch.diag(LOG_DECAY.exp() * W)
    for f in (func.jacrev, func.jacfwd):
        close(f(lambda v: attached(v, damping=damping))(LOG_DECAY), expected)
    decays = LOG_DECAY.expand(2, 4)
    mapped = func.vmap(func.jacrev(lambda v, w: attached(v, w=w, damping=damping)))(decays, W.expand(2, 4))
    close(mapped, expected.expand(2, 4, 4))


def test_truncated_solves_are_the_partial_sums():
    h, g = X.T @ X + torch.diag(LOG_DECAY.exp()), func.grad(validation_loss)(W)
    u, term = torch.zeros_like(g), 0.02 * g
    for _ in range(5):
        u, term = u + term, term - 0.02 * h @ term
    neumann = im.Neumann(rtol=0, max_steps=5, damping=0.02)
    gradient = func.grad(lambda v: validation_loss(attached(v, solver=neumann)))(LOG_DECAY)
    close(gradient, -LOG_DECAY.exp() * W * u)
    seen = []
    v = LOG_DECAY.clone().requires_grad_()
    validation_loss(attached(v, solver=im.CG(rtol=0, max_steps=2), listen=seen.append)).backward()
    assert [int(f.steps) for f in seen] == [2]


@pytest.mark.parametrize("dtype", [torch.float32, D])
def test_a_million_hyperparameters_in_bounded_memory(dtype):
    """Least squares with a million unknowns and a decay for each, of which every gradient is known."""
    n = 1_000_000 if dtype == torch.float32 else 100_000
    scale = torch.linspace(1, 3, n, dtype=dtype)
    target = torch.linspace(-1, 1, n, dtype=dtype).sin()

    def loss(w, log_decay):
        return 0.5 * (scale * (w - target).square()).sum() + 0.5 * (log_decay.exp() * w * w).sum()

    log_decay = torch.zeros(n, dtype=dtype, requires_grad=True)
    w = scale * target / (scale + 1)

    def step(solver):
        log_decay.grad = None
        im.implicit_gradient(
            loss, w, log_decay, linear_solver=solver, on_failure="raise"
        ).square().sum().backward()

    start = time.perf_counter()
    memory = [peak_bytes(lambda k=k: step(im.CG(rtol=0, max_steps=k)), torch.device("cpu")) for k in (2, 12)]
    assert time.perf_counter() - start < 10
    exact = -2 * w * w / (scale + 1)
    torch.testing.assert_close(log_decay.grad, exact, rtol=1e-4, atol=1e-6)
    size = n * w.element_size()
    assert memory[1] <= memory[0] + size
    assert memory[1] < 60 * size


# ------------------------------------------------------------------------------------------ meta learning


def sinusoids(tasks, seed, points=10):
    amplitude, phase = 1 + 0.5 * draw(tasks, 1, seed=seed), draw(tasks, 1, seed=seed + 1)
    x = draw(tasks, points, seed=seed + 2)
    return x, amplitude * (x + phase).sin()


def features(w, x):
    hidden = (x[..., None] * w["in"] + w["shift"]).tanh()
    return (hidden * w["out"]).sum(-1)


def task_loss(w, x, y):
    """One task: w of shapes (5,), x and y (points,)."""
    return (features(w, x) - y).square().mean()


META = {"in": draw(5, seed=31), "shift": draw(5, seed=32), "out": draw(5, seed=33)}


def adapt(objective, w0, *args, steps=300, newton=5):
    """Gradient descent, then Newton steps, from w0; differentiable."""
    v = torch.cat([w0[k] for k in META])

    def loss(v):
        return objective(_unflatten(v, META), w0, *args)

    for _ in range(steps):
        v = v - 0.1 * func.grad(loss)(v)
    for _ in range(newton):
        v = v - torch.linalg.inv(func.hessian(loss)(v)) @ func.grad(loss)(v)
    return _unflatten(v, META)


def test_the_meta_gradient_of_sinusoids_agrees_with_unrolling():
    x, y = sinusoids(3, seed=40)
    x_test, y_test = sinusoids(3, seed=40, points=15)
    w0 = {k: v.clone().requires_grad_() for k, v in META.items()}
    weight = torch.tensor(2.0, dtype=D, requires_grad=True)
    leaves = [*w0.values(), weight]
    objective = im.proximal(task_loss)
    unrolled, losses, adapted = 0.0, [], []
    for task in range(3):
        w = adapt(objective, w0, weight, x[task], y[task], steps=100)
        unrolled = unrolled + task_loss(w, x_test[task], y_test[task])
        adapted.append({k: v.detach() for k, v in w.items()})
    expected = torch.autograd.grad(unrolled, leaves)

    for task, w in enumerate(adapted):  # one by one
        w = im.implicit_gradient(
            objective, w, w0, weight, x[task], y[task], linear_solver=TIGHT, on_failure="raise"
        )
        losses.append(task_loss(w, x_test[task], y_test[task]))
    one_by_one = torch.autograd.grad(sum(losses), leaves)

    stacked = {k: torch.stack([w[k] for w in adapted]) for k in META}

    def one(w, x, y, x_test, y_test):  # by vmap
        w = im.implicit_gradient(objective, w, w0, weight, x, y, linear_solver=TIGHT, on_failure="raise")
        return task_loss(w, x_test, y_test)

    mapped = torch.autograd.grad(func.vmap(one)(stacked, x, y, x_test, y_test).sum(), leaves)

    batched_loss = func.vmap(task_loss)  # as one batch
    w = im.implicit_gradient(
        im.proximal(batched_loss, batch_dims=1),
        stacked,
        w0,
        weight,
        x,
        y,
        linear_solver=TIGHT,
        batch_dims=1,
        in_dims=(None, None, 0, 0),
        on_failure="raise",
    )
    batched = torch.autograd.grad(batched_loss(w, x_test, y_test).sum(), leaves)
    for ours in (one_by_one, mapped, batched):
        for mine, theirs in zip(ours, expected):
            close(mine, theirs, 1e-9)


def test_meta_learning_helps_on_new_sinusoids():
    x, y = sinusoids(8, seed=50)
    new_x, new_y = sinusoids(8, seed=70)
    w0 = {k: v.clone().requires_grad_() for k, v in META.items()}
    weight = torch.tensor(0.5, dtype=D)
    objective = im.proximal(task_loss)
    options = {"in_dims": (0, 0)}

    def adapted(w0, x, y, steps):
        return func.vmap(lambda x, y: adapt(objective, w0, weight, x, y, steps=steps, newton=0), **options)(x, y)

    def test_error(x, y):
        with torch.no_grad():
            w = adapted(w0, x[:, :5], y[:, :5], 40)
        return func.vmap(task_loss)(w, x[:, 5:], y[:, 5:]).mean()

    before = float(test_error(new_x, new_y))
    optimizer = torch.optim.Adam(w0.values(), 0.05)
    for _ in range(25):
        with torch.no_grad():
            w = adapted(w0, x[:, :5], y[:, :5], 40)
        w = im.implicit_gradient(
            im.proximal(func.vmap(task_loss), batch_dims=1),
            w,
            w0,
            weight,
            x[:, :5],
            y[:, :5],
            batch_dims=1,
            in_dims=(None, None, 0, 0),
            tolerance=None,
            linear_solver=im.CG(rtol=1e-3),
        )
        optimizer.zero_grad()
        func.vmap(task_loss)(w, x[:, 5:], y[:, 5:]).mean().backward()
        optimizer.step()
    assert float(test_error(new_x, new_y)) < 0.5 * before


def test_proximal_is_the_loss_and_the_distance():
    w, w0 = {"a": draw(3, 2, seed=1), "b": draw(3, seed=2)}, {"a": draw(2, seed=3), "b": draw(seed=4)}
    objective = im.proximal(lambda w, x: w["b"] * x, batch_dims=1)
    expected = w["b"] * 2 + 0.25 * ((w["a"] - w0["a"]).square().sum(1) + (w["b"] - w0["b"]).square())
    close(objective(w, w0, 0.5, 2.0), expected)
    single = im.proximal(lambda w: w["b"].sum())
    close(single(w, w, 3.0), w["b"].sum())
    with pytest.raises(ValueError, match="the same structure"):
        objective(w, (w0["a"], w0["b"]), 0.5, 2.0)
    with pytest.raises(ValueError, match="batch_dims must be 0"):
        im.proximal(task_loss, batch_dims=2)


# ---------------------------------------------------------------------------------------------- bad input


def hypergradient(loss=ridge_loss, w=W, hyper=LOG_DECAY, **options):
    leaf = hyper.clone().requires_grad_()
    out = im.implicit_gradient(loss, w, leaf, **options)
    return torch.autograd.grad(out.square().sum(), leaf)[0]


@pytest.mark.parametrize("factor", [1e-6, 1.0, 1e6])
def test_params_that_are_not_stationary_are_reported_whatever_the_scale(factor):

    def loss(w, v):
        return factor * ridge_loss(w, v)

    with pytest.warns(im.ConvergenceWarning, match=r"not stationary .* would move them by 0\.\d+ of their norm"):
        hypergradient(loss, 1.5 * W)
    with pytest.raises(im.SolverError, match="train longer") as caught:
        hypergradient(loss, 1.5 * W, on_failure="raise")
    close(caught.value.solution.value, 1.5 * W)
    assert int(caught.value.solution.status) == im.Status.MAX_STEPS
    hypergradient(loss, 1.001 * W)
    hypergradient(loss, 1.5 * W, tolerance=1.0)
    hypergradient(loss, 1.5 * W, tolerance=None)
    hypergradient(loss, 1.5 * W, on_failure="ignore")


def test_without_gradients_nothing_is_tested():
    with torch.no_grad():
        assert torch.equal(im.implicit_gradient(ridge_loss, 1.5 * W, LOG_DECAY), 1.5 * W)


def test_hyperparameters_that_are_captured_are_refused_with_the_remedy():
    captured = LOG_DECAY.clone().requires_grad_()
    with pytest.raises(ValueError, match=r"'captured' of shape \(4,\), which requires gradients.*Pass it in args"):
        im.implicit_gradient(lambda w: ridge_loss(w, captured), W)
    with pytest.raises(ValueError, match="Pass it in args"):
        func.grad(lambda v: im.implicit_gradient(lambda w: ridge_loss(w, v), W).sum())(LOG_DECAY)


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (
            lambda w, v: (w - v).square(),
            ValueError,
            r"expected shape \(\), got torch.float64 of shape \(4,\).*mean",
        ),
        (lambda w, v: (w - v).sum()[None], ValueError, r"of shape \(1,\)"),
        (lambda w, v: 3.0, TypeError, "must return a tensor, got a float"),
        (lambda w, v: (w - v).sum().to(torch.complex128), ValueError, "one real value"),
        (lambda w, v: v.square().sum(), ValueError, "does not depend on its first argument"),
        (lambda w, v: torch.zeros(()), ValueError, "does not depend on its first argument"),
        (None, TypeError, "inner_loss must be callable, got a NoneType"),
    ],
)
def test_losses_that_cannot_be_meant_are_refused(loss, error, message):
    with pytest.raises(error, match=message):
        hypergradient(loss)


def test_a_loss_of_a_batch_must_have_one_value_a_problem():
    with pytest.raises(
        ValueError, match=r"one real value per problem: expected shape \(4,\).*sum over everything"
    ):
        hypergradient(lambda w, v: (w - v).square().sum(), batch_dims=1)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"linear_solver": "cg"}, TypeError, "linear_solver must be a solver such as im.GMRES"),
        ({"damping": -1.0}, ValueError, "damping must be a finite number >= 0, got -1.0"),
        ({"damping": float("nan")}, ValueError, "damping must be"),
        ({"tolerance": 0.0}, ValueError, "tolerance must be a positive number, or None"),
        ({"batch_dims": 2}, ValueError, "batch_dims must be 0"),
        ({"on_failure": "shout"}, ValueError, 'on_failure must be "raise"'),
        ({"w": W.int()}, TypeError, r"params has dtype torch.int32"),
        ({"w": (W, W.float())}, ValueError, "params mixes dtypes"),
        ({"linear_solver": im.CG(rtol=1e-20)}, ValueError, "cannot reach rtol"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        hypergradient(**options)


def test_a_hyperparameter_that_is_not_used_has_zero_gradient():
    close(hypergradient(lambda w, v: (w - 1).square().sum(), torch.ones(4, dtype=D)), torch.zeros(4, dtype=D))


def saddle(w, v):
    """Stationary at v, with curvature -1 along the last entry."""
    return 0.5 * ((w - v).square() * torch.tensor([1.0, 1.0, 1.0, -1.0], dtype=D)).sum()


def test_an_indefinite_hessian_is_reported_with_remedies_that_work():
    with pytest.warns(im.ConvergenceWarning, match="SINGULAR.*no strict minimum.*add damping"):
        assert (hypergradient(saddle, LOG_DECAY) == 0).all()
    with pytest.raises(im.SolverError, match="the backward solve of implicit_gradient"):
        hypergradient(saddle, LOG_DECAY, on_failure="raise")
    close(hypergradient(saddle, LOG_DECAY, linear_solver=im.GMRES()), 2 * LOG_DECAY)
    damped = hypergradient(saddle, LOG_DECAY, damping=2.0)
    close(damped, 2 * LOG_DECAY * torch.tensor([1 / 3, 1 / 3, 1 / 3, -1.0], dtype=D))


def test_a_step_of_the_series_that_is_too_long_is_reported():
    with pytest.warns(im.ConvergenceWarning, match=r"DIVERGED.*below 2 / \(largest eigenvalue"):
        assert (hypergradient(linear_solver=im.Neumann()) == 0).all()


def test_nan_is_reported_and_gives_a_zero_gradient():
    bad = W.clone()
    bad[0] = torch.nan
    with pytest.warns(im.ConvergenceWarning, match="are NaN or inf.*Check the training"):
        assert (hypergradient(w=bad) == 0).all()
    with pytest.warns(im.ConvergenceWarning, match="are NaN or inf"):
        assert (hypergradient(w=bad, tolerance=None) == 0).all()


@pytest.mark.parametrize("in_dims", [0, None])
@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_one_bad_problem_harms_no_other(in_dims, damping):
    decays = LOG_DECAY + draw(3, 4, seed=9)
    w = ridge(decays)
    bad = w.clone()
    bad[1] = torch.nan
    loss = func.vmap(ridge_loss)
    options = {"batch_dims": 1, "in_dims": in_dims, "damping": damping, "linear_solver": TIGHT}
    good = hypergradient(loss, w, decays, **options)
    leaf = decays.clone().requires_grad_()
    with pytest.warns(im.ConvergenceWarning, match="1 of 3 problems, worst number 1"):
        out = im.implicit_gradient(loss, bad, leaf, **options)
    gradient = torch.autograd.grad(out.square().nansum(), leaf)[0]
    close(gradient[[0, 2]], good[[0, 2]])
    assert (gradient[1] == 0).all()


def test_a_quiet_call_is_quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert hypergradient(F_loss, F_w, F_v).dtype == torch.float32


F_v = LOG_DECAY.float()
F_w = W.float()


def F_loss(w, v):
    return F.mse_loss(X.float() @ w, Y.float(), reduction="sum") / 2 + 0.5 * (v.exp() * w * w).sum()


def test_a_proximal_loss_that_adds_up_over_the_tasks_is_refused():
    """It would spread over the tasks, and give another meta-gradient."""
    w, w0 = torch.zeros(4, 3, dtype=D), torch.zeros(3, dtype=D)
    objective = im.proximal(lambda w, x: (w - x).square().mean(), batch_dims=1)
    with pytest.raises(ValueError, match=r"loss must return one real value per problem: expected shape \(4,\)"):
        im.implicit_gradient(objective, w, w0, 1.0, w + 1, batch_dims=1, in_dims=(None, None, 0))
    with pytest.raises(TypeError, match="loss must be callable, got a int"):
        im.proximal(3)


def test_a_w0_of_another_shape_than_w_is_refused():
    loss = lambda w: w.square().sum(-1)  # noqa: E731
    with pytest.raises(ValueError, match=r"w0 must have the shapes of w: expected \(3,\), got \(2, 3\)"):
        im.proximal(loss)(torch.zeros(3), torch.zeros(2, 3), 1.0)
    with pytest.raises(ValueError, match=r"expected \(4, 3\), or \(3,\) where the tasks share it, got \(1,\)"):
        im.proximal(loss, batch_dims=1)(torch.zeros(4, 3), torch.zeros(1), 1.0)
    for w0 in (torch.ones(3), torch.ones(4, 3)):
        assert im.proximal(loss, batch_dims=1)(torch.zeros(4, 3), w0, 2.0).tolist() == [3.0] * 4


@pytest.mark.parametrize("solver", [im.LBFGS(), im.NewtonKKT(), im.LevenbergMarquardt(), im.ProjectedGradient()])
def test_a_linear_solver_that_solves_no_linear_systems_is_refused_at_the_door(solver):
    with pytest.raises(TypeError, match=f"{type(solver).__name__} minimises.*linear_solver"):
        im.implicit_gradient(lambda w: w.square().sum(), torch.zeros(3), linear_solver=solver)


def test_options_of_another_kind_are_refused():
    loss = lambda w: w.square().sum()  # noqa: E731
    with pytest.raises(ValueError, match="damping must be a finite number"):
        im.implicit_gradient(loss, torch.zeros(3), damping=True)
    with pytest.raises(TypeError, match="listen must be callable or None, got a str"):
        im.implicit_gradient(loss, torch.zeros(3), listen="x")
