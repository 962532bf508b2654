"""Taylor mode against nested forward mode, exact solutions and finite differences; its cost; what it refuses."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call, grad, jvp, vmap
from torch.utils._python_dispatch import TorchDispatchMode

from implicitly.taylor.jet import jet, trajectory_derivatives

ORDER = 5


def nested(f, primals, series):
    """The derivatives that `jet` gives, by as many nested jvps. Each doubles the work, so few terms are best."""

    def path(s):
        return (f(*(polynomial(s, x, terms) for x, terms in zip(primals, series))),)

    def with_one_more(g):
        def derivatives(s):
            known, slopes = jvp(g, (s,), (torch.ones_like(s),))
            return *known, slopes[-1]

        return derivatives

    for _ in series[0]:
        path = with_one_more(path)
    value, *terms = path(torch.zeros((), dtype=primals[0].dtype))
    return value, tuple(terms)


def polynomial(s, x, terms):
    """By Horner's rule, from the last term on that is not zero."""
    known = [c / math.factorial(k) for k, c in enumerate((x, *terms))]
    while not known[-1].any():
        known.pop()
    total = known.pop()
    for c in reversed(known):
        total = c + s * total
    return total


def random_inputs(shapes, order=ORDER, dtype=torch.float64, positive=False, terms=2):
    """Primals, and `terms` random derivatives of each, followed by zeros."""
    primals = [torch.randn(shape, dtype=dtype) for shape in shapes]
    if positive:
        primals = [x.abs() + 0.5 for x in primals]
    return primals, [
        [torch.randn_like(x) if k < terms else torch.zeros_like(x) for k in range(order)] for x in primals
    ]


def assert_same(found, expected, **tolerance):
    torch.testing.assert_close(found[0], expected[0], **tolerance)
    assert len(found[1]) == len(expected[1])
    for ours, theirs in zip(found[1], expected[1]):
        torch.testing.assert_close(ours, theirs, **tolerance)


W = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3)
MASK = torch.tensor([True, False, True])
ELEMENTWISE = {
    "add": lambda x: 1 + x + W,
    "sub": lambda x: 2 - x - W,
    "alpha": lambda x: torch.add(x, W, alpha=3) + torch.sub(W, x, alpha=2),
    "mul": lambda x: 2 * x * W * x,
    "addcmul": lambda x: torch.addcmul(W, x, x, value=3),
    "neg": lambda x: -x,
    "abs": lambda x: x.abs(),
    "pow 0": lambda x: x**0 + x,
    "pow 1": lambda x: x**1,
    "pow 2": lambda x: x**2,
    "pow 7": lambda x: x**7,
    "pow 2 as a tensor": lambda x: x ** torch.tensor(2.0) + x ** torch.tensor(3),
    "pow of each": lambda x: (
        x ** torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64) + x ** torch.tensor([2, 3, 4])
    ),
    "base": lambda x: 2**x + torch.pow(W.abs() + 1, x),
    "square": torch.square,
    "exp": torch.exp,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "expit": torch.special.expit,
    "softplus": F.softplus,
    "softplus beta": lambda x: F.softplus(x, beta=3.0, threshold=2.0),
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": torch.relu,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.2),
    "elu": lambda x: F.elu(x, alpha=0.7),
    "celu": lambda x: F.celu(x, alpha=0.5),
    "selu": F.selu,
    "mish": F.mish,
    "softsign": F.softsign,
    "log_sigmoid": F.logsigmoid,
    "tanhshrink": F.tanhshrink,
    "expm1": torch.expm1,
    "sinh": torch.sinh,
    "cosh": torch.cosh,
    "tan": lambda x: torch.tan(0.3 * x),
    "sin": torch.sin,
    "cos": torch.cos,
    "erf": torch.erf,
    "atan": torch.atan,
    "where": lambda x: torch.where(x > 0, x * x, 1.0) + torch.where(MASK, W, x),
    "where of itself": lambda x: (x * x).where(x > 0, x) + W.where(MASK, x),
    "keywords": lambda x: (
        torch.mul(input=x, other=x)
        + F.linear(input=x, weight=W[:3])
        + torch.where(condition=MASK, input=W, other=x)
        + x.where(condition=MASK, other=W)
    ),
}
POSITIVE = {
    "div": lambda x: W / x + x / 3 + x / (1 + x) + 1 / x,
    "reciprocal": torch.reciprocal,
    "pow -2": lambda x: x**-2,
    "pow 2.5": lambda x: x**2.5,
    "pow of entries": lambda x: x**W + x ** W.sum().exp(),
    "pow x": lambda x: x**x,
    "log": torch.log,
    "log1p": torch.log1p,
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
}
LINEAR = {
    "sum": lambda x: x.sum(1) + torch.sum(x) + x.mean(dim=1),
    "cumsum": lambda x: x.cumsum(0),
    "reshape": lambda x: x.reshape(2, 6).view(3, 4).flatten(),
    "squeeze": lambda x: x.unsqueeze(1).squeeze(1),
    "transpose": lambda x: x.T + x.mT + x.t() + x.transpose(0, 1) + x.permute(1, 0) + torch.movedim(x, 0, 1),
    "index": lambda x: (x[1:, 0], x[..., None], x[:, [0, 0, 2]], x[MASK.nonzero()[:, 0]]),
    "rows": lambda x: sum(x) + sum(x.unbind()),
    "split": lambda x: [*x.split(2), *torch.chunk(x, 2, dim=1)],
    "expand": lambda x: x[0].expand(4, 3) + x[0].expand_as(x) + x[:1].repeat(4, 1),
    "cat": lambda x: torch.cat([x, W, 2 * x], dim=1),
    "stack": lambda x: torch.stack((W, x)),
    "pad": lambda x: F.pad(x, (1, 2)),
    "to": lambda x: x.float().double() + x.to(torch.float32).to(x),
    "constants like it": lambda x: (
        x * W.expand_as(x) * W.to(x) * W.float().type_as(x) * W.view_as(x) * MASK.expand_as(x)
    ),
    "diff": lambda x: (x.diff(dim=0, prepend=W[:1]), W.diff(dim=0, append=x)),
    "flip": lambda x: x.flip(0) + x.roll(1, 0) + x.tril() + x.contiguous().clone(),
}
DENSE = {
    "softmax": lambda x: F.softmax(x, dim=1) + torch.softmax(x, 0),
    "log_softmax": lambda x: F.log_softmax(x, dim=1) + torch.log_softmax(x, 0),
    "logsumexp": lambda x: (torch.logsumexp(x, 1), x.logsumexp(0, keepdim=True)),
    "rms_norm": lambda x: F.rms_norm(x, (3,), W[0].abs() + 1, eps=0.1),
    "norm": lambda x: (torch.linalg.vector_norm(x, dim=1), x.norm(dim=0, keepdim=True), torch.norm(x)),
    "group_norm": lambda x: F.group_norm(x.reshape(2, 6), 2, torch.arange(6.0).double(), torch.ones(6).double()),
    "linear": nn.Linear(3, 2).double(),
    "mlp": nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 5), nn.Softplus(), nn.Linear(5, 2)).double(),
    "dropout": nn.Dropout().eval(),
}


@pytest.mark.parametrize("name", ELEMENTWISE | LINEAR | DENSE)
def test_rule_agrees_with_nested_forward_mode(name):
    f = (ELEMENTWISE | LINEAR | DENSE)[name]
    primals, series = random_inputs([(4, 3)])
    # Through float32 and back, nested mode rounds as jets do but in another order.
    tolerance = {"rtol": 1e-5, "atol": 1e-4} if name == "to" else {"rtol": 1e-9, "atol": 1e-9}
    assert_same(jet(f, primals, series), nested(f, primals, series), **tolerance)


@pytest.mark.parametrize("name", POSITIVE)
def test_rule_agrees_with_nested_forward_mode_at_positive_numbers(name):
    primals, series = random_inputs([(4, 3)], positive=True)
    f = POSITIVE[name]
    assert_same(jet(f, primals, series), nested(f, primals, series), rtol=1e-8, atol=1e-8)


PRODUCTS = {
    "mul": (torch.mul, [(4, 3), (3,)]),
    "sub": (lambda a, b: a - b, [(3,), (4, 3)]),
    "div": (lambda a, b: a / (2 + b * b), [(3,), (4, 1)]),
    "matmul": (torch.matmul, [(4, 3), (3, 2)]),
    "operator": (lambda a, b: a @ b @ W.T, [(2, 4, 3), (3, 3)]),
    "mm": (torch.mm, [(4, 3), (3, 2)]),
    "mv": (torch.mv, [(4, 3), (3,)]),
    "dot": (torch.dot, [(3,), (3,)]),
    "bmm": (torch.bmm, [(2, 4, 3), (2, 3, 2)]),
    "outer": (torch.outer, [(4,), (3,)]),
    "addmm": (lambda a, b, c: torch.addmm(a, b, c, beta=2, alpha=3), [(2,), (4, 3), (3, 2)]),
    "linear": (F.linear, [(4, 3), (2, 3), (2,)]),
    "einsum": (lambda a, b: torch.einsum("ij,kj->ik", a, b), [(4, 3), (2, 3)]),
    "einsum of one": (lambda a, b: torch.einsum("ij->ji", a) @ b, [(4, 3), (4,)]),
    "conv1d": (lambda x, w, b: F.conv1d(x, w, b, padding=1), [(2, 2, 5), (3, 2, 3), (3,)]),
    "conv2d": (lambda x, w, b: F.conv2d(x, w, b, stride=2), [(2, 2, 5, 5), (3, 2, 3, 3), (3,)]),
    "conv_transpose2d": (F.conv_transpose2d, [(1, 2, 3, 3), (2, 3, 3, 3), (3,)]),
    "where": (lambda a, b: torch.where(a > b, a, b), [(4, 3), (3,)]),
    "cat": (lambda a, b: torch.cat([a, b.expand(1, 3)]), [(4, 3), (3,)]),
    "broadcast": (lambda a, b: sum(torch.broadcast_tensors(a, b)), [(4, 3), (3,)]),
    "type": (lambda a, b: a.type_as(b) + a.to(b), [(3,), (4, 3)]),
    "einsum of a list": (lambda a, b: torch.einsum("ij,jk->ik", [a, b]), [(4, 3), (3, 2)]),
    "mm by name": (lambda a, b: torch.mm(input=a, mat2=b), [(4, 3), (3, 2)]),
    "mv by name": (lambda a, b: torch.mv(a, vec=b), [(4, 3), (3,)]),
    "dot by name": (lambda a, b: torch.dot(a, tensor=b), [(3,), (3,)]),
    "outer by name": (lambda a, b: torch.outer(a, vec2=b), [(4,), (3,)]),
    "addmm by name": (lambda a, b, c: torch.addmm(a, mat2=c, mat1=b), [(2,), (4, 3), (3, 2)]),
    "baddbmm by name": (lambda a, b, c: torch.baddbmm(a, batch1=b, batch2=c), [(2, 4, 2), (2, 4, 3), (2, 3, 2)]),
    "addcmul by name": (lambda a, b, c: torch.addcmul(a, tensor1=b, tensor2=c, value=2), [(3,), (4, 3), (3,)]),
    "pow by name": (lambda a, b: torch.pow(2 + a * a, exponent=b), [(4, 3), (3,)]),
    "linear by name": (lambda a, b, c: F.linear(input=a, weight=b, bias=c), [(4, 3), (2, 3), (2,)]),
    "conv2d by name": (lambda x, w, b: F.conv2d(x, bias=b, weight=w), [(2, 2, 5, 5), (3, 2, 3, 3), (3,)]),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_rule_of_several_arguments_agrees_with_nested_forward_mode(name):
    f, shapes = PRODUCTS[name]
    primals, series = random_inputs(shapes, order=3 if "conv" in name else ORDER)
    assert_same(jet(f, primals, series), nested(f, primals, series), rtol=1e-9, atol=1e-9)


@given(st.integers(1, 4), st.integers(0, 2**31), st.lists(st.sampled_from(sorted(ELEMENTWISE)), max_size=4))
def test_chains_of_rules_agree_with_nested_forward_mode(order, seed, names):
    torch.manual_seed(seed)
    primals, series = random_inputs([(4, 3)], order, terms=order)

    def f(x):
        for name in names:
            x = 0.5 * ELEMENTWISE[name](x).tanh()
        return x

    assert_same(jet(f, primals, series), nested(f, primals, series), rtol=1e-6, atol=1e-6)


def test_the_size_of_complex_numbers_is_real():
    primals, series = random_inputs([(4, 3)], dtype=torch.complex128, order=3)

    def f(z):
        return z.abs(), torch.linalg.vector_norm(z, dim=1)

    def of_parts(x, y):
        square = x * x + y * y
        return square.sqrt(), square.sum(1).sqrt()

    parts = [[c.real for c in series[0]], [c.imag for c in series[0]]]
    assert_same(jet(f, primals, series), nested(of_parts, (primals[0].real, primals[0].imag), parts))


def test_layer_norm_agrees_with_its_formula():
    # Nested forward mode of F.layer_norm itself is wrong from the second derivative on (PyTorch 2.13).
    def by_hand(x):
        centred = x - x.mean(1, keepdim=True)
        return centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt() * W + 2

    primals, series = random_inputs([(4, 3)], order=3)
    found = jet(lambda x: F.layer_norm(x, (3,)) * W + 2, primals, series)
    assert_same(found, nested(by_hand, primals, series), rtol=1e-9, atol=1e-9)
    weights = torch.randn(2, 3, dtype=torch.float64)
    found = jet(lambda x: F.layer_norm(x, (3,), *weights), primals, series)
    again = jet(lambda x: F.layer_norm(x, (3,)) * weights[0] + weights[1], primals, series)
    assert_same(found, again)


def test_convention_is_derivatives_not_divided_by_factorials():
    # x(s) = 1 + 2 s + 3 s^2, whose derivatives are 2 and 6; x^2 has 4 and 2 (2^2 + 6) = 20.
    one, two, six = (torch.tensor(v) for v in (1.0, 2.0, 6.0))
    value, terms = jet(torch.square, (one,), ((two, six),))
    assert (value.item(), *(x.item() for x in terms)) == (1.0, 4.0, 20.0)


def test_whole_powers_are_right_at_zero():
    zero, one, none = torch.zeros(()), torch.ones(()), torch.zeros(())
    _, terms = jet(lambda x: x**3, (zero,), ((one, none, none, none),))
    assert [x.item() for x in terms] == [0, 0, 6, 0]


def test_whole_powers_given_as_tensors_are_right_at_zero():
    x = torch.zeros(2, dtype=torch.float64)
    _, (first, second, third) = jet(lambda x: x ** torch.tensor(2.0), (x,), ((x + 1, x, x),))
    assert (first.tolist(), second.tolist(), third.tolist()) == ([0, 0], [2, 2], [0, 0])


def test_exponents_get_their_derivatives():
    x, terms = torch.rand(3, dtype=torch.float64) + 0.5, [torch.ones(3, dtype=torch.float64)] * 2
    for p in (torch.tensor(1.7, dtype=torch.float64), torch.rand(3, dtype=torch.float64)):
        f = lambda x, p: torch.stack([*jet(lambda x: x**p, (x,), (terms,))[1]])  # noqa: E731
        expected = lambda x, p: torch.stack([*nested(lambda x: x**p, (x,), (terms,))[1]])  # noqa: E731
        torch.testing.assert_close(torch.func.jacrev(f, 1)(x, p), torch.func.jacrev(expected, 1)(x, p))
        torch.testing.assert_close(torch.func.jacfwd(f, 1)(x, p), torch.func.jacfwd(expected, 1)(x, p))
        own = p.clone().requires_grad_()
        assert torch.autograd.gradcheck(f, (x, own), check_forward_ad=True)


SMALL = ["expm1", "log1p", "sinh", "cosh", "elu", "celu", "selu", "tanhshrink", "tanh", "softsign", "silu", "gelu",
         "mish", "atan", "erf", "sin", "tan", "log_sigmoid", "softplus", "log_softmax"]  # fmt: skip


@pytest.mark.parametrize("name", SMALL)
def test_digits_are_kept_near_zero(name):
    """Values and first derivatives in float32 are those of float64; so is PyTorch's own value."""
    rules = {**ELEMENTWISE, **POSITIVE, "log_softmax": lambda x: torch.log_softmax(torch.stack([x, 2 * x]), 0)}
    x = torch.tensor([-1e-1, -1e-3, -1e-5, -1e-9, 1e-9, 1e-5, 1e-3, 1e-1])
    found = jet(rules[name], (x,), ((torch.ones_like(x),),))
    exact = jet(rules[name], (x.double(),), ((torch.ones_like(x).double(),),))
    torch.testing.assert_close(found[1][0].double(), exact[1][0], rtol=1e-5, atol=1e-30)
    torch.testing.assert_close(exact[0], rules[name](x.double()), rtol=1e-12, atol=0)
    if name != "tanhshrink":  # which PyTorch takes for a difference
        torch.testing.assert_close(found[0].double(), exact[0], rtol=1e-5, atol=0)


@pytest.mark.parametrize("f", [F.logsigmoid, torch.expm1, lambda x: F.log_softmax(torch.stack([x, 2 * x]), 0)])
def test_digits_are_kept_far_from_zero(f):
    x = torch.tensor([-60.0, -25.0, 25.0, 60.0], dtype=torch.float64)
    value, (first, second) = jet(f, (x,), ((torch.ones_like(x), torch.zeros_like(x)),))
    expected = nested(f, (x,), ((torch.ones_like(x), torch.zeros_like(x)),))
    torch.testing.assert_close(value, expected[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(first, expected[1][0], rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(second, expected[1][1], rtol=1e-9, atol=1e-15)


def test_softplus_is_linear_beyond_its_threshold_as_in_torch():
    x = torch.tensor([25.0, 1.0])
    _, terms = jet(F.softplus, (x,), ((torch.ones(2), torch.zeros(2)),))
    assert terms[0][0] == 1
    assert terms[1][0] == 0
    assert 0 < terms[1][1] < 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_convolutional_network_keeps_its_dtype(dtype):
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.GroupNorm(2, 4),
        nn.SiLU(),
        nn.Conv2d(4, 2, 3),
        nn.GELU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(8, 3),
        nn.Sigmoid(),
    ).to(dtype)
    primals, series = random_inputs([(2, 2, 6, 6)], order=3, dtype=dtype)
    found = jet(net, primals, series)
    assert {x.dtype for x in (found[0], *found[1])} == {dtype}
    tolerance = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 1e-3, "atol": 1e-4}
    assert_same(found, nested(net, primals, series), **tolerance)


def test_pytrees_and_constants_go_in_and_out():
    x = torch.randn(3)
    state = {"a": x, "b": (2 * x,)}
    term = {"a": torch.ones(3), "b": (torch.zeros(3),)}
    value, (first,) = jet(lambda s: {"c": s["a"] * s["b"][0], "d": [x]}, (state,), ((term,),))
    assert torch.equal(value["c"], 2 * x * x)
    assert torch.equal(first["c"], 2 * x)
    assert torch.equal(first["d"][0], torch.zeros(3))


# --- Derivatives of jets ------------------------------------------------------------------------------------


def test_gradients_through_jets():
    net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2), nn.Softplus()).double()
    names, weights = zip(*net.named_parameters())
    inputs = [torch.randn(4, 2, dtype=torch.float64, requires_grad=True) for _ in range(3)]

    def terms(x, first, second, *weights):
        def f(x):
            return functional_call(net, dict(zip(names, weights)), (x,)) / (2 + x.sin())

        return jet(f, (x,), ((first, second),))[1]

    leaves = [w.detach().clone().requires_grad_() for w in weights]
    assert torch.autograd.gradcheck(terms, (*inputs, *leaves))
    assert torch.autograd.gradgradcheck(lambda x: terms(x, *inputs[1:], *leaves)[1], inputs[0])


def test_parameters_of_a_module_get_their_gradients():
    net = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))
    derivatives = trajectory_derivatives(lambda t, y: net(y), 0.0, torch.ones(5, 1), 3)
    derivatives[2].square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net[:2].parameters())


def test_jets_under_transforms():
    x = torch.randn(4, 3, dtype=torch.float64)

    def third(x):
        return jet(
            lambda x: (x.sin() * x.exp()).sum(), (x,), ((torch.ones(3).double(), *[torch.zeros_like(x)] * 2),)
        )[1][2]

    def by_hand(x):  # (e^x sin x)''' = 2 e^x (cos x - sin x)
        return (2 * x.exp() * (x.cos() - x.sin())).sum()

    torch.testing.assert_close(vmap(third)(x), vmap(by_hand)(x))
    torch.testing.assert_close(grad(third)(x[0]), grad(by_hand)(x[0]))
    torch.testing.assert_close(vmap(grad(third))(x), vmap(grad(by_hand))(x))
    v = torch.randn(3, dtype=torch.float64)
    torch.testing.assert_close(jvp(third, (x[0],), (v,)), jvp(by_hand, (x[0],), (v,)))


def test_jets_of_jets_do_not_mix():
    one, none = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    x, y = torch.tensor(0.3, dtype=torch.float64), torch.tensor(0.7, dtype=torch.float64)

    def second_by_y(x):
        return jet(lambda y: (x * y).sin() * x.exp(), (y,), ((one, none),))[1][1]

    def exact(x):
        return -(x**2) * (x * y).sin() * x.exp()

    found = jet(second_by_y, (x,), ((one, none, none),))
    assert_same(found, nested(exact, (x,), ((one, none, none),)), rtol=1e-12, atol=1e-12)


# --- Trajectories -------------------------------------------------------------------------------------------

# The name, f(t, y), y(t), and how many derivatives.
EXACT = {
    "square": (lambda t, y: y**2, lambda t: 1 / (2 - t)),
    "logistic": (lambda t, y: 3 * y * (1 - y), lambda t: torch.sigmoid(3 * t - 1)),
    "sine": (lambda t, y: (1 - y**2).sqrt(), torch.sin),
    "time": (lambda t, y: t.cos() * y, lambda t: t.sin().exp()),
    "time alone": (lambda t, y: t**2 + 0 * y, lambda t: 1 + t**3 / 3),
    "constant": (lambda t, y: torch.ones_like(y), lambda t: t),
}


@pytest.mark.parametrize("name", EXACT)
def test_derivatives_along_exact_solutions(name):
    f, solution = EXACT[name]
    t = torch.tensor([0.1, 0.4, 0.9], dtype=torch.float64)
    found = trajectory_derivatives(f, t, solution(t), 5)
    _, expected = nested(solution, (t,), [[torch.ones_like(t), *[torch.zeros_like(t)] * 4]])
    assert_same((found[0], found[1:]), (expected[0], expected[1:]), rtol=1e-10, atol=1e-10)


def test_derivatives_of_pytrees_and_of_a_system():
    # y'' = -y as a system.
    y = {"position": torch.tensor([1.0, 0.0]), "velocity": torch.tensor([0.0, 2.0])}

    def f(t, y):
        return {"position": y["velocity"], "velocity": -y["position"]}

    first, second, third = trajectory_derivatives(f, 0.0, y, 3)
    assert torch.equal(first["position"], y["velocity"])
    assert torch.equal(second["position"], -y["position"])
    assert torch.equal(third["velocity"], y["position"])


def test_derivatives_along_a_network_are_those_of_nested_forward_mode():
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    y, t = torch.randn(4, 2, dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64)

    def f(t, y):
        return net(torch.cat([y, t.expand(4, 1)], dim=1)) + t * y

    def total(g):  # dg/dt + dg/dy f
        return lambda t, y: jvp(g, (t, y), (torch.ones_like(t), f(t, y)))[1]

    g = f
    for found in trajectory_derivatives(f, t, y, 4):
        torch.testing.assert_close(found, g(t, y))
        g = total(g)


def test_gradcheck_of_derivatives_along_a_trajectory():
    t = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    y, a = (torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def derivatives(t, y, a):
        return trajectory_derivatives(lambda t, y: (a * y + t).tanh() * t, t, y, 3)

    assert torch.autograd.gradcheck(derivatives, (t, y, a))


# --- Cost and refusals --------------------------------------------------------------------------------------


class Count(TorchDispatchMode):
    """Counts products: of matrices, and of numbers."""

    def __init__(self):
        super().__init__()
        self.matrices = self.all = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.matrices += name in ("mm", "addmm")
        self.all += name in ("mm", "addmm", "mul", "addcmul")
        return func(*args, **(kwargs or {}))


def test_cost_grows_polynomially_with_the_order():
    net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2))
    y = torch.randn(3, 2)

    def counts(order):
        with Count() as count:
            trajectory_derivatives(lambda t, y: net(y), 0.0, y, order)
        return count

    # One product a layer and order; nested forward mode needs 2^order of them.
    assert [counts(k).matrices for k in (1, 2, 5, 10)] == [2, 4, 10, 20]
    # Products of series: quadratic, so that twice the order is less than five times the work.
    assert counts(20).all < 5 * counts(10).all < 25 * counts(5).all

    with Count() as count:
        jet(net, (y,), ([torch.ones_like(y)] * 7,))
    assert count.matrices == 2 * 8


def test_memory_is_freed_without_waiting_for_cycles_to_be_found():
    import gc
    import weakref

    gc.collect()
    gc.disable()
    try:
        held = []

        def f(t, y):
            value = (y.tanh() * y.sin()).exp() / (1 + F.softplus(y))
            held.append(weakref.ref(value))
            return value

        trajectory_derivatives(f, 0.0, torch.ones(3), 4)
        jet(lambda y: f(None, y), (torch.ones(3),), ([torch.ones(3)] * 3,))
        assert [ref() for ref in held] == [None, None]
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("f", "message"),
    [
        (lambda x: torch.lgamma(x), r"no rule for lgamma.*nest torch\.func\.jvp"),
        (lambda x: x * float(x.sum()), "no rule for __float__"),
        (lambda x: x.detach(), "no rule for detach"),
        (lambda x: x.add_(1), "add_ writes into a tensor"),
        (lambda x: F.silu(x, inplace=True), "silu writes into a tensor"),
        (lambda x: torch.exp(x, out=torch.zeros(3)), "exp writes into a tensor"),
        (lambda x: F.dropout(x), "a new mask in each call"),
        (lambda x: F.pad(x, (1, 1), value=2.0), "pad has a rule for the value 0 only, got 2.0"),
        (lambda x: torch.einsum("i,i,i", x, x, x), "one or two operands"),
        (lambda x: x.to(torch.int64), "torch.int64 has no derivatives"),
        (lambda x: torch.div(x, 2, rounding_mode="floor"), "div has no rule for rounding_mode='floor'"),
    ],
)
def test_what_has_no_rule_is_named(f, message):
    with pytest.raises(NotImplementedError, match=message):
        jet(f, (torch.ones(3),), ([torch.ones(3)],))


def test_setting_an_item_is_refused():
    def f(x):
        x[0] = 1.0
        return x

    with pytest.raises(NotImplementedError, match="setitem writes into a tensor"):
        jet(f, (torch.ones(3),), ([torch.ones(3)],))


def test_bad_input_is_refused():
    x = torch.ones(3)
    with pytest.raises(ValueError, match=r"2 primals and series of the lengths \[1\]"):
        jet(torch.add, (x, x), ([x],))
    with pytest.raises(ValueError, match=r"lengths \[1, 2\]"):
        jet(torch.add, (x, x), ([x], [x, x]))
    with pytest.raises(ValueError, match=r"lengths \[0\]"):
        jet(torch.exp, (x,), ([],))
    with pytest.raises(ValueError, match=r"like its primal, \(3,\) of torch.float32; got \(2,\)"):
        jet(torch.exp, (x,), ([x[:2]],))
    with pytest.raises(ValueError, match="structure of its primal"):
        jet(torch.exp, (x,), ([(x,)],))
    with pytest.raises(TypeError, match="must hold tensors, got a float"):
        jet(torch.exp, (1.0,), ([1.0],))
    with pytest.raises(TypeError, match="f must return tensors, got a float"):
        jet(lambda x: 1.0, (x,), ([x],))
    with pytest.raises(TypeError, match="y must hold tensors, got a float"):
        trajectory_derivatives(lambda t, y: y, 0.0, 1.0, 2)
    with pytest.raises(ValueError, match="y holds no tensor"):
        trajectory_derivatives(lambda t, y: y, 0.0, (), 2)
    with pytest.raises(ValueError, match="an int >= 1, got 0"):
        trajectory_derivatives(lambda t, y: y, 0.0, x, 0)
    with pytest.raises(ValueError, match=r"shapes of y, \[\(3,\)\]; got \[\(1,\)\]"):
        trajectory_derivatives(lambda t, y: y[:1], 0.0, x, 2)
