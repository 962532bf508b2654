"""Runge-Kutta methods as data: their coefficients, error estimates and dense outputs, nothing else.

One step of length `dt` from y at t evaluates k_i = f(t + c_i dt, y + dt sum_j a_ij k_j) and advances to
y + dt sum_i b_i k_i. Rational coefficients are written as fractions if these are short. The tests verify order,
nodes, error estimates, dense outputs and stability from these numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Tableau:
    """The coefficients of a Runge-Kutta method with s stages, explicit or diagonally implicit.

    Args:
        order: order p of the method, whose local error is O(dt^(p+1)).
        a: row i has the coefficients of the stages before i; for a diagonally implicit method, also that of stage
            i itself, which is 0 for an explicit first stage.
        b: weights `(s,)` of the new state.
        c: nodes `(s,)`, the sums of the rows of `a`.
        error: `(s,)`, `b` minus the weights of the embedded method, so that dt sum_i error_i k_i estimates the
            local error. None if there is no embedded method.
        error_order: order q of the embedded method; the estimate is O(dt^(q+1)). None where `error` is.
        error_low: `(s,)`, a second and coarser estimate, for use as e^2 / sqrt(e^2 + 0.01 e_low^2) with the norms
            of both, which is O(dt^p). None for all methods but `DOPRI8`.
        dense: row i has the coefficients of theta^1, theta^2, ... in b_i(theta), with which
            y(t + theta dt) = y + dt sum_i b_i(theta) k_i for theta in [0, 1], over the stages and then the extra
            ones. The derivative is continuous across steps, and the local error is O(dt^p). None: the cubic
            through both ends and their slopes is used instead.
        extra: rows of `a` for further stages that only the dense output needs; each may use all stages before it.
        extra_c: nodes of the extra stages.

    Source: Hairer, Nørsett and Wanner, "Solving Ordinary Differential Equations I", 2nd edition (1993), part II.
    """

    order: int
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    c: tuple[float, ...]
    error: tuple[float, ...] | None = None
    error_order: int | None = None
    error_low: tuple[float, ...] | None = None
    dense: tuple[tuple[float, ...], ...] | None = None
    extra: tuple[tuple[float, ...], ...] = ()
    extra_c: tuple[float, ...] = ()

    @property
    def stages(self) -> int:
        """The number of stages of a step, not counting those of the dense output."""
        return len(self.b)

    @property
    def call_nodes(self) -> tuple[float, ...]:
        """The nodes at which a step of an explicit method calls f: all but the first, and the end."""
        return self.c[1:] if self.fsal else (*self.c[1:], 1.0)

    @property
    def implicit(self) -> bool:
        """Whether stages depend on themselves."""
        return len(self.a[0]) == 1

    @property
    def fsal(self) -> bool:
        """Whether the last stage of an explicit method is f at the new state, and so the first stage of the next
        step."""
        return not self.implicit and self.c[-1] == 1 and self.a[-1] == self.b[:-1] and self.b[-1] == 0

    @property
    def stiffly_accurate(self) -> bool:
        """Whether the state in the last stage of an implicit method is the new state."""
        return self.implicit and self.c[-1] == 1 and self.a[-1] == self.b


def _minus(b: Sequence[float], embedded: Sequence[float]) -> tuple[float, ...]:
    """The weights of an error estimate, from those of both methods."""
    return tuple(x - y for x, y in zip(b, embedded))


def _dense(b: Sequence[float], end: int, *higher: Sequence[float]) -> tuple[tuple[float, ...], ...]:
    """The rows of `Tableau.dense`, from Hairer's form of it, which matches state and slope at both ends.

    There b_i(theta) = theta (f0 + (1 - theta) (f1 + theta (f2 + (1 - theta) (f3 + ...)))). The ends determine f0,
    f1 and f2, the cubic through both; `higher` has f3, f4, ..., one row each over all stages.

    Args:
        b: weights of the method.
        end: index of the stage at the new state.
        higher: rows over all stages, the extra ones too.
    """
    rows = []
    for i, row in enumerate(zip(*higher)):
        weight = b[i] if i < len(b) else 0.0
        first, last = float(i == 0), float(i == end)
        factors = (weight, first - weight, 2 * weight - first - last, *row)
        powers = [0.0]
        for n, factor in reversed(list(enumerate(factors))):
            powers[0] += factor
            times_theta = [0.0, *powers]
            powers = times_theta if n % 2 == 0 else [x - y for x, y in zip([*powers, 0.0], times_theta)]
        rows.append(tuple(powers[1:]))
    return tuple(rows)


# -------------------------------------------------------------------------------------------- explicit, low order

# The embedded method of the three methods of order 2 is Euler's, which needs only their first stage.

EULER = Tableau(order=1, a=((),), b=(1.0,), c=(0.0,))

MIDPOINT = Tableau(order=2, a=((), (1 / 2,)), b=(0.0, 1.0), c=(0.0, 1 / 2), error=(-1.0, 1.0), error_order=1)

HEUN = Tableau(order=2, a=((), (1.0,)), b=(1 / 2, 1 / 2), c=(0.0, 1.0), error=(-1 / 2, 1 / 2), error_order=1)

# The smallest bound on the local error among two-stage methods: Ralston, "Runge-Kutta methods with minimum error
# bounds", Mathematics of Computation 16 (1962).
RALSTON = Tableau(
    order=2, a=((), (2 / 3,)), b=(1 / 4, 3 / 4), c=(0.0, 2 / 3), error=(-3 / 4, 3 / 4), error_order=1
)

# Kutta, "Beitrag zur näherungsweisen Integration totaler Differentialgleichungen" (1901).
RK4 = Tableau(
    order=4,
    a=((), (1 / 2,), (0.0, 1 / 2), (0.0, 0.0, 1.0)),
    b=(1 / 6, 1 / 3, 1 / 3, 1 / 6),
    c=(0.0, 1 / 2, 1 / 2, 1.0),
)

# Bogacki and Shampine, "A 3(2) pair of Runge-Kutta formulas", Applied Mathematics Letters 2 (1989).
BOSH3 = Tableau(
    order=3,
    a=((), (1 / 2,), (0.0, 3 / 4), (2 / 9, 1 / 3, 4 / 9)),
    b=(2 / 9, 1 / 3, 4 / 9, 0.0),
    c=(0.0, 1 / 2, 3 / 4, 1.0),
    error=(-5 / 72, 1 / 12, 1 / 9, -1 / 8),
    error_order=2,
)

# ------------------------------------------------------------------------------------------------------- order 5

# fmt: off

_B5 = (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84)

# Dormand and Prince, "A family of embedded Runge-Kutta formulae", Journal of Computational and Applied
# Mathematics 6 (1980). The dense output of order 4 takes no further evaluation: Shampine, "Some practical
# Runge-Kutta formulas", Mathematics of Computation 46 (1986), in the form of Hairer, Nørsett and Wanner, section
# II.6.
DOPRI5 = Tableau(
    order=5,
    a=(
        (),
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        _B5,
    ),
    b=(*_B5, 0.0),
    c=(0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0),
    error=(71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40),
    error_order=4,
    dense=_dense(
        _B5, 6,
        (-12715105075 / 11282082432, 0.0, 87487479700 / 32700410799, -10690763975 / 1880347072,
         701980252875 / 199316789632, -1453857185 / 822651844, 69997945 / 29380423),
    ),
)

_BT = (0.09646076681806523, 1 / 100, 0.4798896504144996, 1.379008574103742, -3.290069515436081, 2.324710524099774)

# Tsitouras, "Runge-Kutta pairs of order 5(4) satisfying only the first column simplifying assumption", Computers
# and Mathematics with Applications 62 (2011), with its dense output of order 4, which takes no further evaluation.
# The last weight of the error estimate is negative, with which all of them sum to 0.
TSIT5 = Tableau(
    order=5,
    a=(
        (),
        (161 / 1000,),
        (-0.008480655492356989, 0.335480655492357),
        (2.8971530571054935, -6.359448489975075, 4.3622954328695815),
        (5.325864828439257, -11.748883564062828, 7.4955393428898365, -0.09249506636175525),
        (5.86145544294642, -12.92096931784711, 8.159367898576159, -0.071584973281401, -0.028269050394068383),
        _BT,
    ),
    b=(*_BT, 0.0),
    c=(0.0, 161 / 1000, 327 / 1000, 9 / 10, 0.9800255409045097, 1.0, 1.0),
    error=(0.0017800110522257714, 0.0008164344596567469, -0.007880878010261995, 0.1447110071732629,
           -0.5823571654525552, 0.45808210592918697, -1 / 66),
    error_order=4,
    dense=(
        (1.0, -2.763706197274826, 2.9132554618219126, -1.0530884977290216),
        (0.0, 0.1317, -0.2234, 0.1017),
        (0.0, 3.9302962368947516, -5.941033872131505, 2.490627285651253),
        (0.0, -12.411077166933676, 30.33818863028232, -16.548102889244902),
        (0.0, 37.50931341651104, -88.1789048947664, 47.37952196281928),
        (0.0, -27.896526289197286, 65.09189467479366, -34.87065786149661),
        (0.0, 3 / 2, -4.0, 5 / 2),
    ),
)

# ------------------------------------------------------------------------------------------------------- order 8

_B8 = (0.054293734116568765, 0.0, 0.0, 0.0, 0.0, 4.450312892752409, 1.8915178993145003, -5.801203960010585,
       0.3111643669578199, -0.1521609496625161, 0.20136540080403034, 0.04471061572777259)
_S6 = math.sqrt(6)

# DOP853, the method of Dormand and Prince of order 8 with Hairer's error estimates of orders 5 and 3, which are
# combined (see `error_low`), and a dense output of order 7 for three more evaluations: Hairer, Nørsett and Wanner,
# sections II.5, II.6 and II.10, and their code DOP853. The last of the 13 stages is f at the new state.
DOPRI8 = Tableau(
    order=8,
    a=(
        (),
        (0.05260015195876773,),
        (0.0197250569845379, 0.0591751709536137),
        (0.02958758547680685, 0.0, 0.08876275643042054),
        (0.2413651341592667, 0.0, -0.8845494793282861, 0.924834003261792),
        (1 / 27, 0.0, 0.0, 0.17082860872947386, 0.12546768756682242),
        (19 / 512, 0.0, 0.0, 0.17025221101954405, 0.06021653898045596, -9 / 512),
        (0.03709200011850479, 0.0, 0.0, 0.17038392571223998, 0.10726203044637328, -0.015319437748624402,
         0.008273789163814023),
        (0.6241109587160757, 0.0, 0.0, -3.3608926294469414, -0.868219346841726, 27.59209969944671,
         20.154067550477894, -43.48988418106996),
        (0.47766253643826434, 0.0, 0.0, -2.4881146199716677, -0.590290826836843, 21.230051448181193,
         15.279233632882423, -33.28821096898486, -0.020331201708508627),
        (-0.9371424300859873, 0.0, 0.0, 5.186372428844064, 1.0914373489967295, -8.149787010746927,
         -18.52006565999696, 22.739487099350505, 2.4936055526796523, -3.0467644718982196),
        (2.273310147516538, 0.0, 0.0, -10.53449546673725, -2.0008720582248625, -17.9589318631188,
         27.94888452941996, -2.8589982771350235, -8.87285693353063, 12.360567175794303, 0.6433927460157636),
        _B8,
    ),
    b=(*_B8, 0.0),
    c=(0.0, (12 - 2 * _S6) / 135, (6 - _S6) / 45, (6 - _S6) / 30, (6 + _S6) / 30, 1 / 3, 1 / 4, 4 / 13, 127 / 195,
       3 / 5, 6 / 7, 1.0, 1.0),
    error=(0.01312004499419488, 0.0, 0.0, 0.0, 0.0, -1.2251564463762044, -0.4957589496572502, 1.6643771824549864,
           -0.35032884874997366, 0.3341791187130175, 0.08192320648511571, -0.022355307863886294, 0.0),
    error_order=5,
    error_low=_minus((*_B8, 0.0), (31 / 127, *[0.0] * 7, 12675 / 17272, 0.0, 0.0, 3 / 136, 0.0)),
    dense=_dense(
        _B8, 12,
        (-8.428938276109013, 0.0, 0.0, 0.0, 0.0, 0.5667149535193777, -3.0689499459498917, 2.38466765651207,
         2.117034582445028, -0.871391583777973, 2.2404374302607883, 0.6315787787694688, -0.08899033645133331,
         18.148505520854727, -9.194632392478356, -4.436036387594894),
        (10.427508642579134, 0.0, 0.0, 0.0, 0.0, 242.28349177525817, 165.20045171727028, -374.5467547226902,
         -22.113666853125306, 7.733432668472264, -30.674084731089398, -9.332130526430229, 15.697238121770845,
         -31.139403219565178, -9.35292435884448, 35.81684148639408),
        (19.985053242002433, 0.0, 0.0, 0.0, 0.0, -387.0373087493518, -189.17813819516758, 527.8081592054236,
         -11.57390253995963, 6.8812326946963, -1.0006050966910838, 0.7777137798053443, -2.778205752353508,
         -60.19669523126412, 84.32040550667716, 11.99229113618279),
        (-25.69393346270375, 0.0, 0.0, 0.0, 0.0, -154.18974869023643, -231.5293791760455, 357.6391179106141,
         93.40532418362432, -37.45832313645163, 104.0996495089623, 29.8402934266605, -43.53345659001114,
         96.32455395918828, -39.17726167561544, -149.72683625798564),
    ),
    extra=(
        (0.056167502283047954, 0.0, 0.0, 0.0, 0.0, 0.0, 0.25350021021662483, -0.2462390374708025,
         -0.12419142326381637, 0.15329179827876568, 0.00820105229563469, 0.007567897660545699, -0.008298),
        (0.03183464816350214, 0.0, 0.0, 0.0, 0.0, 0.028300909672366776, 0.053541988307438566, -0.05492374857139099,
         0.0, 0.0, -0.00010834732869724932, 0.0003825710908356584, -0.00034046500868740456, 0.1413124436746325),
        (-0.42889630158379194, 0.0, 0.0, 0.0, 0.0, -4.697621415361164, 7.683421196062599, 4.06898981839711,
         0.3567271874552811, 0.0, 0.0, 0.0, -0.0013990241651590145, 2.9475147891527724, -9.15095847217987),
    ),
    extra_c=(1 / 10, 1 / 5, 7 / 9),
)
# fmt: on

# ------------------------------------------------------------------------------------------- diagonally implicit

IMPLICIT_EULER = Tableau(order=1, a=((1.0,),), b=(1.0,), c=(1.0,))

IMPLICIT_MIDPOINT = Tableau(order=2, a=((1 / 2,),), b=(1.0,), c=(1 / 2,))

# The embedded method has the weights of the implicit Euler method.
TRAPEZOID = Tableau(
    order=2,
    a=((0.0,), (1 / 2, 1 / 2)),
    b=(1 / 2, 1 / 2),
    c=(0.0, 1.0),
    error=(1 / 2, -1 / 2),
    error_order=1,
)


def _stiffly_accurate(order: int, *rows: tuple[float, ...], quartic: tuple[float, ...] = ()) -> Tableau:
    """A method whose last two stages hold the embedded and the new state, from the `rows` of its `a`; `quartic`
    `(s,)` is f3 of its dense output, see `_dense`."""
    c = tuple(math.fsum(row) for row in rows)
    error = _minus(rows[-1], (*rows[-2], 0.0))
    dense = _dense(rows[-1], len(rows) - 1, quartic) if quartic else None
    return Tableau(order=order, a=rows, b=rows[-1], c=c, error=error, error_order=order - 1, dense=dense)


# Both L-stable, with an explicit first stage, from Kværnø, "Singly diagonally implicit Runge-Kutta methods with an
# explicit first stage", BIT Numerical Mathematics 44 (2004). In the first, all is a function of the diagonal, for
# which the middle root of g^3 - 3 g^2 + 3/2 g - 1/6 makes the stability function vanish at infinity.
_G3 = 0.435866521508459

KVAERNO3 = _stiffly_accurate(
    3,
    (0.0,),
    (_G3, _G3),
    ((-4 * _G3**2 + 6 * _G3 - 1) / (4 * _G3), (1 - 2 * _G3) / (4 * _G3), _G3),
    (
        (6 * _G3 - 1) / (12 * _G3),
        1 / (12 * _G3 * (1 - 2 * _G3)),
        (-6 * _G3**2 + 6 * _G3 - 1) / (3 * (2 * _G3 - 1)),
        _G3,
    ),
)

_G5 = 13 / 50

# The dense output of the second has order 4 everywhere in a step, which leaves two numbers free. These are the
# least ones (in the sense of least squares) that also have a limit in the middle of infinitely stiff steps.
# fmt: off
KVAERNO5 = _stiffly_accurate(
    5,
    (0.0,),
    (_G5, _G5),
    (13 / 100, 0.8403332099679081, _G5),
    (0.22371961478320505, 0.476755323197997, -0.06470895363112615, _G5),
    (0.16648564323248321, 0.1045001884159172, 0.03631482272098715, -0.13090704451073998, _G5),
    (0.13855640231268224, 0.0, -0.04245337201752043, 0.02446657898003141, 0.6194303907248068, _G5),
    (0.1365975117764029, 0.0, -0.05496908796538376, -0.04118626728321046, 0.629933048990164, 0.06962479448202728,
     _G5),
    quartic=(-0.5273168450422333, 0.0, 0.717008463463586, -2.067528990952921, 1.6110082694021637,
             0.47536737860134715, -0.20853827547193532),
)
# fmt: on
