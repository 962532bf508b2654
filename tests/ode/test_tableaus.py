"""Runge-Kutta tableaus have the order, error estimate, dense output and stability that they claim.

Orders are proved by the order conditions, one a rooted tree: Hairer, Nørsett and Wanner, "Solving Ordinary
Differential Equations I", section II.2. A tree is the sorted tuple of the trees at its root.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest

from implicitly.ode import tableaus
from implicitly.ode.tableaus import Tableau

METHODS = {name: value for name, value in vars(tableaus).items() if isinstance(value, Tableau)}
ADAPTIVE = [name for name, m in METHODS.items() if m.error is not None]
DENSE = [name for name, m in METHODS.items() if m.dense is not None]
EXPLICIT = [name for name, m in METHODS.items() if not m.implicit]

TOLERANCE = 1e-12
THETAS = (0.0, 0.1, 1 / 3, 0.5, 0.77, 0.95, 1.0)


# ------------------------------------------------------------------------------------------------- rooted trees


@functools.cache
def trees(nodes: int) -> tuple:
    """All rooted trees with so many nodes: a smaller one, with one more branch at its root."""
    if nodes == 1:
        return ((),)
    grown = {
        tuple(sorted((*tree, branch)))
        for size in range(1, nodes)
        for branch in trees(size)
        for tree in trees(nodes - size)
    }
    return tuple(sorted(grown))


def size(tree: tuple) -> int:
    return 1 + sum(map(size, tree))


def gamma(tree: tuple) -> int:
    """The density of a tree."""
    return size(tree) * math.prod(map(gamma, tree))


def stage_weights(A: np.ndarray, tree: tuple) -> np.ndarray:
    """The elementary weight of the tree in every stage `(s,)`; its product with b is Phi(tree)."""
    return math.prod((A @ stage_weights(A, branch) for branch in tree), start=np.ones(len(A)))


def matrix(method: Tableau, extra: bool = False) -> np.ndarray:
    """`a` as a square matrix, with the rows of the extra stages too where asked for."""
    rows = [*method.a, *(method.extra if extra else ())]
    return np.array([(*row, *[0.0] * (len(rows) - len(row))) for row in rows])


def residual(A: np.ndarray, b: np.ndarray, nodes: int, theta: float = 1.0) -> float:
    """By how much the order conditions of the trees with so many nodes fail, at the worst."""
    return max(abs(stage_weights(A, t) @ b - theta**nodes / gamma(t)) for t in trees(nodes))


def worst(A: np.ndarray, b: np.ndarray, order: int, theta: float = 1.0) -> float:
    return max(residual(A, b, nodes, theta) for nodes in range(1, order + 1))


def embedded(method: Tableau) -> np.ndarray:
    return np.array(method.b) - np.array(method.error)


def dense_weights(method: Tableau, theta: float) -> np.ndarray:
    """b_i(theta) `(stages and extra stages,)`."""
    dense = np.array(method.dense)
    return dense @ theta ** np.arange(1, dense.shape[1] + 1)


def stability(method: Tableau, z: complex) -> complex:
    """R(z), by which one step multiplies the solution of y' = z y with dt = 1."""
    k = np.linalg.solve(np.eye(method.stages) - z * matrix(method), np.ones(method.stages))
    return 1 + z * (np.array(method.b) @ k)


def imaginary_axis(method: Tableau, end: float = 1e5) -> float:
    """The largest |R(i y)| for 0 < y <= end."""
    return max(abs(stability(method, 1j * y)) for y in np.geomspace(1e-3, end, 1000))


def test_the_trees_are_all_there():
    # Their numbers: table 2.1 of the book. The densities of those with four nodes: its table 2.2.
    assert [len(trees(n)) for n in range(1, 10)] == [1, 1, 2, 4, 9, 20, 48, 115, 286]
    assert sorted(map(gamma, trees(4))) == [4, 8, 12, 24]


# ------------------------------------------------------------------------------------------------ order


def test_every_method_is_there():
    explicit = {"EULER", "MIDPOINT", "HEUN", "RALSTON", "RK4", "BOSH3", "DOPRI5", "TSIT5", "DOPRI8"}
    implicit = {"IMPLICIT_EULER", "IMPLICIT_MIDPOINT", "TRAPEZOID", "KVAERNO3", "KVAERNO5"}
    assert set(METHODS) == explicit | implicit
    assert set(EXPLICIT) == explicit
    assert set(METHODS) - set(ADAPTIVE) == {"EULER", "RK4", "IMPLICIT_EULER", "IMPLICIT_MIDPOINT"}
    assert DENSE == ["DOPRI5", "TSIT5", "DOPRI8", "KVAERNO5"]
    orders = [1, 2, 2, 2, 4, 3, 5, 5, 8, 1, 2, 2, 3, 5]
    assert [m.order for m in METHODS.values()] == orders


@pytest.mark.parametrize("name", METHODS)
def test_shapes_and_nodes(name):
    method = METHODS[name]
    assert [len(row) for row in method.a] == [i + method.implicit for i in range(method.stages)]
    assert len(method.b) == len(method.c) == method.stages
    assert [len(row) for row in method.extra] == [method.stages + i for i in range(len(method.extra))]
    A = matrix(method, extra=True)
    np.testing.assert_allclose(A.sum(1), [*method.c, *method.extra_c], rtol=0, atol=1e-14)
    assert (method.error is None) == (method.error_order is None)
    for weights in (method.error, method.error_low):
        assert weights is None or len(weights) == method.stages
    assert method.dense is None or len(method.dense) == len(A)
    numbers = [*np.ravel(A), *method.b, *method.c, *np.ravel(method.dense or ())]
    assert all(isinstance(x, float) for row in (*method.a, *method.extra, method.b, method.c) for x in row)
    assert np.isfinite(numbers).all()


@pytest.mark.parametrize("name", METHODS)
def test_the_order_is_the_one_claimed(name):
    method = METHODS[name]
    A, b = matrix(method), np.array(method.b)
    assert worst(A, b, method.order) < TOLERANCE
    assert residual(A, b, method.order + 1) > 1e-5


@pytest.mark.parametrize("name", ADAPTIVE)
def test_the_order_of_the_error_estimate_is_the_one_claimed(name):
    method = METHODS[name]
    A, b = matrix(method), embedded(method)
    assert worst(A, b, method.error_order) < TOLERANCE
    assert residual(A, b, method.error_order + 1) > 1e-4
    assert method.error_order == (5 if name == "DOPRI8" else method.order - 1)


def test_the_low_estimate_of_dopri8_has_order_three():
    method = tableaus.DOPRI8
    A, b = matrix(method), np.array(method.b) - np.array(method.error_low)
    assert worst(A, b, 3) < TOLERANCE
    assert residual(A, b, 4) > 1e-4
    assert [name for name, m in METHODS.items() if m.error_low is not None] == ["DOPRI8"]
    # Both estimates together have the order of the method: dt^(2 * 6 - 4).
    assert 2 * (method.error_order + 1) - 4 == method.order


@pytest.mark.parametrize("name", METHODS)
def test_a_wrong_coefficient_breaks_the_order(name):
    # What the tests above rest on. The row sum of a stage is kept where it has two coefficients, so that the
    # trees of three nodes and more must notice; order 2 depends on row sums alone. A stage of weight 0 that no
    # other stage uses is no part of the method.
    method = METHODS[name]
    b = np.array(method.b)
    for i, j in zip(*np.nonzero(matrix(method))):
        A = matrix(method)
        if not b[i] and not A[:, i].any():
            continue
        A[i, j] += 1e-6
        if j and method.order > 2:
            A[i, 0] -= 1e-6
        caught = worst(A, b, method.order) > TOLERANCE or not np.allclose(A.sum(1), method.c, rtol=0, atol=1e-14)
        assert caught, (i, j)
    for i in range(method.stages):
        wrong = b + 1e-9 * np.eye(method.stages)[i]
        assert worst(matrix(method), wrong, method.order) > TOLERANCE


# ------------------------------------------------------------------------------------------------ dense output


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("theta", THETAS)
def test_dense_output_keeps_the_global_order_everywhere(name, theta):
    method = METHODS[name]
    assert worst(matrix(method, extra=True), dense_weights(method, theta), method.order - 1, theta) < TOLERANCE


@pytest.mark.parametrize("name", DENSE)
def test_dense_output_is_no_better_than_claimed(name):
    method = METHODS[name]
    assert residual(matrix(method, extra=True), dense_weights(method, 0.5), method.order, 0.5) > 1e-7


@pytest.mark.parametrize("name", DENSE)
def test_dense_output_has_state_and_slope_of_both_ends(name):
    method = METHODS[name]
    dense = np.array(method.dense)
    powers = np.arange(1, dense.shape[1] + 1)
    new = np.zeros(len(dense))
    new[: method.stages] = method.b
    first, last = np.eye(len(dense))[0], np.eye(len(dense))[method.stages - 1]
    np.testing.assert_allclose(dense.sum(1), new, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(dense[:, 0], first, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(dense @ powers, last, rtol=0, atol=TOLERANCE)


def test_two_ends_alone_give_the_cubic_hermite_interpolant():
    # theta (f0 + (1 - theta) (f1 + theta f2)) with a further row of zeros, for a method of two stages.
    rows = tableaus._dense((0.5, 0.5), 1, (0.0, 0.0))
    theta = 0.3
    slopes = theta * (1 - theta) ** 2, -(theta**2) * (1 - theta)
    change = theta**2 * (3 - 2 * theta)
    expected = [0.5 * change + slope for slope in slopes]
    np.testing.assert_allclose(np.array(rows) @ theta ** np.arange(1, 5), expected, atol=1e-15)


# ------------------------------------------------------------------------------------- the same as other codes


def step(method: Tableau, f, t: float, y: np.ndarray, dt: float) -> np.ndarray:
    """All stages of one step of an explicit method, the extra ones too `(stages, n)`."""
    k = []
    for row, c in zip((*method.a, *method.extra), (*method.c, *method.extra_c)):
        k.append(f(t + c * dt, y + dt * sum((a * k_j for a, k_j in zip(row, k)), start=np.zeros_like(y))))
    return np.stack(k)


def pendulum(t: float, y: np.ndarray) -> np.ndarray:
    return np.array([y[1], math.cos(t) - math.sin(y[0])])


@pytest.mark.parametrize(("name", "peer"), [("BOSH3", "RK23"), ("DOPRI5", "RK45"), ("DOPRI8", "DOP853")])
def test_a_step_and_its_dense_output_are_those_of_scipy(name, peer):
    integrate = pytest.importorskip("scipy.integrate")
    method, y, dt = METHODS[name], np.array([0.4, -1.2]), 0.3
    solver = getattr(integrate, peer)(pendulum, 0.5, y, 9.0, first_step=dt, max_step=dt, rtol=1e-1, atol=1e-1)
    solver.step()
    assert solver.t - 0.5 == pytest.approx(dt)
    k = step(method, pendulum, 0.5, y, dt)
    np.testing.assert_allclose(y + dt * np.array(method.b) @ k[: method.stages], solver.y, rtol=1e-13)
    interpolant = solver.dense_output()
    for theta in THETAS if method.dense else ():
        state = y + dt * dense_weights(method, theta) @ k
        np.testing.assert_allclose(state, interpolant(0.5 + theta * dt), rtol=0, atol=TOLERANCE)


def test_the_error_weights_have_the_scale_of_the_published_ones():
    # The order conditions hold for any multiple of an estimate: its scale needs other evidence. The weights of the
    # embedded methods as they are printed, and for order 8 those of the code of its authors, at stages 1 and 12.
    b5 = [5179 / 57600, 0, 7571 / 16695, 393 / 640, -92097 / 339200, 187 / 2100, 1 / 40]
    np.testing.assert_allclose(embedded(tableaus.DOPRI5), b5, rtol=0, atol=1e-15)
    np.testing.assert_allclose(embedded(tableaus.BOSH3), [7 / 24, 1 / 4, 1 / 3, 1 / 8], rtol=0, atol=1e-15)
    assert tableaus.TSIT5.error[6] == -1 / 66
    assert tableaus.DOPRI8.error[0] == 0.01312004499419488
    assert tableaus.DOPRI8.error[11] == -0.022355307863886294
    low = np.array(tableaus.DOPRI8.b) - np.array(tableaus.DOPRI8.error_low)
    np.testing.assert_allclose(low[[0, 8, 11]], [31 / 127, 12675 / 17272, 3 / 136], rtol=0, atol=1e-15)
    for name in ("MIDPOINT", "HEUN", "RALSTON"):
        np.testing.assert_array_equal(embedded(METHODS[name]), [1, 0])
    np.testing.assert_array_equal(embedded(tableaus.TRAPEZOID), [0, 1])
    for name in ("KVAERNO3", "KVAERNO5"):
        method = METHODS[name]
        np.testing.assert_allclose(embedded(method), [*method.a[-2], 0], rtol=0, atol=1e-15)


# ---------------------------------------------------------------------------------------- structure, stability


def test_last_stages():
    assert [name for name, m in METHODS.items() if m.fsal] == ["BOSH3", "DOPRI5", "TSIT5", "DOPRI8"]
    stiff = ["IMPLICIT_EULER", "TRAPEZOID", "KVAERNO3", "KVAERNO5"]
    assert [name for name, m in METHODS.items() if m.stiffly_accurate] == stiff
    for name in ("BOSH3", "DOPRI5", "TSIT5", "DOPRI8"):
        method = METHODS[name]
        k = step(method, pendulum, 0.5, np.array([0.4, -1.2]), 0.1)[: method.stages]
        new = np.array([0.4, -1.2]) + 0.1 * np.array(method.b) @ k
        np.testing.assert_allclose(k[-1], pendulum(0.6, new), rtol=1e-14)


@pytest.mark.parametrize("name", ["KVAERNO3", "KVAERNO5"])
def test_diagonals_are_constant_after_an_explicit_first_stage(name):
    first, *rest = np.diag(matrix(METHODS[name]))
    assert first == 0
    assert len(set(rest)) == 1
    assert rest[0] > 0


@pytest.mark.parametrize("name", ["IMPLICIT_EULER", "KVAERNO3", "KVAERNO5"])
def test_l_stable(name):
    # A-stable by the maximum principle: bounded by 1 on the axis, and no pole in the left half plane, since all
    # poles are at 1 / diagonal > 0.
    method = METHODS[name]
    assert imaginary_axis(method) <= 1 + 1e-9
    assert abs(stability(method, -1e8)) < 1e-6
    assert method.stiffly_accurate


@pytest.mark.parametrize(("name", "limit"), [("IMPLICIT_MIDPOINT", -1), ("TRAPEZOID", -1)])
def test_a_stable_but_not_l_stable(name, limit):
    assert imaginary_axis(METHODS[name]) == pytest.approx(1, abs=1e-9)
    assert stability(METHODS[name], -1e8) == pytest.approx(limit, abs=1e-6)


@pytest.mark.parametrize("name", EXPLICIT)
def test_explicit_methods_are_not_a_stable(name):
    assert imaginary_axis(METHODS[name], 100) > 1 + 1e-9


@pytest.mark.parametrize("name", ["KVAERNO3", "KVAERNO5"])
def test_embedded_states_do_not_grow(name):
    # Without this the estimate of a stiff component would exceed the component.
    method = METHODS[name]
    weights = embedded(method)
    axis = [1j * y for y in np.logspace(-3, 5, 1000)]
    identity, ones = np.eye(method.stages), np.ones(method.stages)
    growth = [abs(1 + z * weights @ np.linalg.solve(identity - z * matrix(method), ones)) for z in axis]
    assert max(growth) <= 1 + 1e-9


@pytest.mark.parametrize("z", [-0.7, 0.3 + 0.4j])
@pytest.mark.parametrize("name", METHODS)
def test_the_stability_function_approximates_the_exponential(name, z):
    order, dt = METHODS[name].order, np.array([0.2, 0.1])
    wrong = [abs(stability(METHODS[name], z * h) - np.exp(z * h)) for h in dt]
    rate = math.log2(wrong[0] / wrong[1]) if wrong[1] > 1e-15 else order + 1
    assert rate > order + 0.7
