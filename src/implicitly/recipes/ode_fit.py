"""ode-fit: fit the rates of a predator-prey model by differentiating through an ODE solver.

In the model of Lotka and Volterra hares u multiply unless they are eaten, and lynxes v starve unless they eat:

    du/dt = (alpha - beta v) u        dv/dt = (delta u - gamma) v

The pelts that the Hudson's Bay Company bought from 1900 to 1920 show two and a half of these cycles. The rates,
the start and the noise are fitted by maximum likelihood. The Hessian of the likelihood, which is exact because the
solver can be differentiated twice, tells how well the record determines them. Then a small network is added to the
rates of growth, as in a universal differential equation (Rackauckas et al., 2020, arXiv:2001.04385), and years
that no fit has seen show whether what it learned holds beyond the data.

    rates             the four rates alone
    rates + network   the same, with a correction that is kept small

With the defaults the network follows the fitted years more closely, and predicts the held-out ones less well.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.distributions import Normal
from torch.func import grad, hessian, jacfwd

import implicitly as im
from implicitly.recipes._checkpoints import run_folder
from implicitly.recipes._options import (
    OptionError,
    check_at_least,
    check_positive,
    check_seed,
    check_tolerance,
)
from implicitly.viz.style import COLOURS, new_figures, title


@dataclass(frozen=True)
class Config:
    """A Lotka-Volterra model, with and without a neural correction, fitted to lynx and hare pelts (1900-1920)."""

    out: Path | None = None
    """Output folder for picture, tables and fits, which are overwritten. Default: runs/ode-fit/lynx-hare-N, with
    the next free number N."""
    fitted_years: int = 16
    """Number of years to fit, from the first of the 21; the others are held out."""
    guess: tuple[float, float, float, float] = (1.0, 0.1, 1.0, 0.1)
    """Initial guess of alpha, beta, gamma and delta."""
    steps: int = 200
    """Maximum number of L-BFGS steps for the rates."""
    network_steps: int = 100
    """Maximum number of L-BFGS steps for the rates and the network together."""
    hidden: int = 8
    """Units in the hidden layer of the network."""
    correction: float = 0.1
    """Prior standard deviation of the network's correction to the growth rates, per year."""
    rtol: float = 1e-6
    """Relative and absolute tolerance of the ODE solver, for the logarithms of the populations."""
    years_beyond: int = 10
    """How many years after 1920 the picture shows."""
    seed: int = 0
    """Random seed of the initial weights of the network."""

    def __post_init__(self) -> None:
        check_at_least(self, 1, "steps", "network_steps", "hidden")
        check_at_least(self, 0, "years_beyond")
        check_positive(self, "correction")
        check_tolerance(self, torch.finfo(torch.float64).eps, "rtol")
        check_seed(self)
        if not all(0 < rate < math.inf for rate in self.guess):
            raise ValueError(f"guess must be four positive rates; got {self.guess}")
        if not 8 <= self.fitted_years < len(HARES):
            raise ValueError(f"fitted_years must be 8 to {len(HARES) - 1}; got {self.fitted_years}")


# --- The record ---------------------------------------------------------------------------------------------

# Thousands of pelts a year, 1900 to 1920. C. G. Hewitt, "The Conservation of the Wild Life of Canada", 1921;
# E. P. Odum, "Fundamentals of Ecology". These digits: P. Howard, "Modeling Basics", Texas A&M University.
FIRST_YEAR = 1900
HARES = (30.0, 47.2, 70.2, 77.4, 36.3, 20.6, 18.1, 21.4, 22.0, 25.4, 27.1)
HARES += (40.3, 57.0, 76.6, 52.3, 19.5, 11.2, 7.6, 14.6, 16.2, 24.7)
LYNXES = (4.0, 6.1, 9.8, 35.2, 59.4, 41.7, 19.0, 13.0, 8.3, 9.1, 7.4)
LYNXES += (8.0, 12.3, 19.5, 45.7, 51.1, 29.7, 15.8, 9.7, 10.1, 8.6)


def log_record() -> Tensor:
    """Logarithms of the pelts, in thousands: `(21, 2)` float64, hares and lynxes."""
    return torch.tensor([HARES, LYNXES], dtype=torch.float64).T.log()


# --- The model ----------------------------------------------------------------------------------------------

# What is fitted, and the posterior mean and deviation of B. Carpenter, "Predator-Prey Population Dynamics: the
# Lotka-Volterra model in Stan", 2018, from the same 21 years with weak priors. All of them are positive: `theta`,
# `(8,)`, holds their logarithms in this order.
PUBLISHED = {
    "alpha": (0.545, 0.064),
    "beta": (0.028, 0.004),
    "gamma": (0.803, 0.092),
    "delta": (0.024, 0.004),
    "hares at the start": (33.956, 2.856),
    "lynxes at the start": (5.933, 0.535),
    "noise of hares": (0.250, 0.045),
    "noise of lynxes": (0.252, 0.044),
}
RATES, START, NOISE = slice(0, 4), slice(4, 6), slice(6, 8)


class Growth(nn.Module):
    """d/dt (log u, log v) = (alpha - beta v, delta u - gamma) + network(log u, log v).

    In logarithms no population can become negative, and the noise of the record is the same at all times.
    """

    def __init__(self, network: nn.Module | None = None) -> None:
        super().__init__()
        self.network = network

    def forward(self, t: Tensor, y: Tensor, log_rates: Tensor) -> Tensor:
        """Rates of growth `(..., 2)`, per year, at the logarithms `y` `(..., 2)` of hares and lynxes."""
        alpha, beta, gamma, delta = log_rates.exp()
        hares, lynxes = y.exp().unbind(-1)
        growth = torch.stack([alpha - beta * lynxes, delta * hares - gamma], dim=-1)
        return growth if self.network is None else growth + self.network(y)


class Correction(nn.Module):
    """A network with one hidden layer from logarithms `(..., 2)` to rates `(..., 2)`, which are 0 before training.

    `centre` `(2,)` is the middle of the logarithms, which spread by about 1 around it.
    """

    centre: Tensor

    def __init__(self, hidden: int, centre: Tensor) -> None:
        super().__init__()
        self.register_buffer("centre", centre)
        self.layers = nn.Sequential(nn.Linear(2, hidden), nn.Tanh(), nn.Linear(hidden, 2)).to(centre.dtype)
        for parameter in self.layers[2].parameters():
            nn.init.zeros_(parameter)

    def forward(self, y: Tensor) -> Tensor:
        """The correction, per year."""
        return self.layers(y - self.centre)


def simulate(growth: Growth, theta: Tensor, years: Tensor, rtol: float, on_failure: str = "raise") -> Tensor:
    """Logarithms of hares and lynxes `(T, 2)` at `years` `(T,)`, the first of which is the start."""
    solver = im.Dopri8(rtol=rtol, atol=rtol)
    return im.odeint(growth, theta[START], years, theta[RATES], solver=solver, on_failure=on_failure).value


def negative_log_likelihood(theta: Tensor, growth: Growth, logs: Tensor, rtol: float) -> Tensor:
    """The negative log-likelihood of `logs` `(T, 2)`, one row per year.

    Their noise is normal: that of the pelts is log-normal.
    """
    years = torch.arange(len(logs), dtype=logs.dtype)
    return -Normal(simulate(growth, theta, years, rtol), theta[NOISE].exp()).log_prob(logs).sum()


# --- The fits -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fit:
    """A fitted model."""

    name: str
    years: int  # that were fitted, from the first
    growth: Growth
    theta: Tensor  # (8,)
    covariance: Tensor | None  # (8, 8), of theta; None where a network takes part

    @property
    def standard_errors(self) -> Tensor:
        """`(8,)`, of exp(theta), to first order."""
        assert self.covariance is not None
        return self.theta.exp() * self.covariance.diagonal().sqrt()


def fit_rates(logs: Tensor, config: Config) -> Fit:
    """Maximum likelihood of theta, given `logs` `(T, 2)`, and the inverse of the Hessian there.

    Long trajectories depend on the rates in a complicated way: from the default guess, a search over all 21 years
    at once gets stuck where no trajectory follows the record. A single year is simple. So first all years are
    fitted as a batch, each starting at its own record and compared with the next.

    Six numbers fitted to T rows explain part of the noise: maximum likelihood underestimates the noise, and with
    it the standard errors, by a factor of about sqrt(1 - 6 / 2T), which is 0.93 for 21 rows.

    Raises:
        ValueError: the search did not end at a maximum, so that no standard errors exist.
    """
    growth = Growth()

    def one_year_ahead(log_rates: Tensor) -> Tensor:
        solver = im.Dopri8(rtol=config.rtol, atol=config.rtol)
        ahead = im.odeint(growth, logs[:-1], (0.0, 1.0), log_rates, solver=solver, batch_dims=1).value[-1]
        return (ahead - logs[1:]).square().sum()

    log_rates = logs.new_tensor(config.guess).log()
    minimise(functools.partial(one_year_ahead, log_rates), [log_rates], config.steps)
    theta = torch.cat([log_rates, logs[0], logs.new_full((2,), 0.5).log()])
    loss = functools.partial(negative_log_likelihood, growth=growth, logs=logs, rtol=config.rtol)
    minimise(functools.partial(loss, theta), [theta], config.steps)
    return Fit("rates", len(logs), growth, theta, covariance_at_optimum(loss, theta, config.steps))


def covariance_at_optimum(loss: Callable[[Tensor], Tensor], theta: Tensor, steps: int) -> Tensor:
    """The inverse of the Hessian `(8, 8)` of `loss` at `theta` `(8,)`; see `fit_rates` for what it raises."""
    slope, curvature = grad(loss)(theta), hessian(loss)(theta)
    factor, failed = torch.linalg.cholesky_ex(curvature)
    remedy = f"after {steps} steps. Try more --steps, another --guess or more --fitted-years"
    if failed:
        lowest = torch.linalg.eigvalsh(curvature)[0].item()
        raise OptionError(
            f"found no maximum of the likelihood: its Hessian has the eigenvalue {-lowest:.3g} {remedy}"
        )
    covariance = torch.cholesky_inverse(factor)
    gain = 0.5 * (slope @ covariance @ slope).item()  # of one more Newton step
    if gain > 1e-3:
        raise OptionError(
            f"found no maximum of the likelihood: its logarithm can still grow by {gain:.3g} {remedy}"
        )
    return covariance


def fit_correction(rates: Fit, logs: Tensor, config: Config) -> Fit:
    """Fit rates and network together, starting from `rates`; the correction has a normal prior around 0."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = Correction(config.hidden, centre=logs.mean(dim=0))
    growth, theta = Growth(network), rates.theta.clone()
    years = torch.arange(len(logs), dtype=logs.dtype)

    def loss() -> Tensor:
        y = simulate(growth, theta, years, config.rtol)
        likelihood = Normal(y, theta[NOISE].exp()).log_prob(logs).sum()
        return 0.5 * (network(y) / config.correction).square().sum() - likelihood

    minimise(loss, [theta, *network.parameters()], config.network_steps)
    return Fit("rates + network", len(logs), growth, theta, None)


def minimise(loss: Callable[[], Tensor], parameters: Sequence[Tensor], steps: int) -> None:
    """Change `parameters` in place until the gradient of `loss` vanishes, or for `steps` steps of L-BFGS."""
    leaves = [parameter.requires_grad_() for parameter in parameters]
    optimizer = torch.optim.LBFGS(
        leaves, max_iter=steps, tolerance_grad=1e-5, tolerance_change=1e-9, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)  # pyright: ignore[reportArgumentType]  # torch's stub wants a float, its code a tensor
    for leaf in leaves:
        leaf.requires_grad_(False)


# --- The tables ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Score:
    """How well a fit predicts some of the years."""

    rmse: float  # of the logarithms
    log_likelihood: float  # mean, of the logarithm of one number of the record


def score(fit: Fit, logs: Tensor, config: Config) -> tuple[Score, Score]:
    """The scores on the fitted years, and on the years of `logs` `(T, 2)` after them."""
    years = torch.arange(len(logs), dtype=logs.dtype)
    with torch.no_grad():
        y = simulate(fit.growth, fit.theta, years, config.rtol)
    likelihood = Normal(y, fit.theta[NOISE].exp()).log_prob(logs)
    parts = slice(None, fit.years), slice(fit.years, None)
    fitted, held_out = (
        Score((y - logs)[part].square().mean().sqrt().item(), likelihood[part].mean().item()) for part in parts
    )
    return fitted, held_out


def parameters_table(whole: Fit, part: Fit) -> Table:
    """Estimates and standard errors of the rates alone, next to the published ones."""
    table = Table(
        title="ode-fit: estimated parameters",
        caption="this run: maximum likelihood ± standard error, from the exact Hessian\n"
        "published: posterior mean ± standard deviation, all years (Carpenter 2018, Stan)\n"
        "rates are per year; beta and delta also per thousand pelts",
    )
    table.add_column("")
    for heading in (f"{whole.years} years", "published", f"{part.years} years"):
        table.add_column(heading, justify="right", no_wrap=True)
    columns = [zip(fit.theta.exp().tolist(), fit.standard_errors.tolist()) for fit in (whole, part)]
    for (name, published), one, other in zip(PUBLISHED.items(), *columns):
        table.add_row(name, *(f"{value:.3f} ± {error:.3f}" for value, error in (one, published, other)))
    return table


def scores_table(scores: dict[str, tuple[Score, Score]], years: int) -> Table:
    """RMSE and log-likelihood of each model, on the fitted years and on the held-out ones."""
    last = FIRST_YEAR + years - 1
    table = Table(
        title="ode-fit: errors on fitted and held-out years",
        caption="RMSE: of the logarithms; log-lik.: mean log-likelihood of one logarithm",
    )
    table.add_column("model\n", no_wrap=True)
    for span in (f"{FIRST_YEAR}-{last}", f"{last + 1}-{FIRST_YEAR + len(HARES) - 1}"):
        for quantity in ("RMSE", "log-lik."):
            table.add_column(f"{span}\n{quantity}", justify="right", no_wrap=True)
    for name, parts in scores.items():
        table.add_row(name, *(f"{x:.3f}" for part in parts for x in (part.rmse, part.log_likelihood)))
    return table


def verdict(scores: dict[str, tuple[Score, Score]]) -> str:
    """One sentence on whether the network predicts the held-out years better."""
    rates, corrected = (scores[name][1].rmse for name in ("rates", "rates + network"))
    finding = "extrapolates better" if corrected < rates else "does not extrapolate better"
    return f"The network {finding}: RMSE on the held-out years {corrected:.3f} with it, {rates:.3f} without."


# --- The picture --------------------------------------------------------------------------------------------


def plot_fits(fits: Sequence[Fit], logs: Tensor, config: Config) -> Figure:
    """Draw hares and lynxes over time, and against each other: the record, and the fits extended beyond it.

    Args:
        fits: rates alone, drawn with their 95 % band for a record, and rates with network.
        logs: the record, `(T, 2)`.
        config: its `years_beyond` are drawn after the last year.
    """
    figure, (hares, lynxes, plane) = new_figures(15, 4.6, 3)
    end = len(logs) - 1 + config.years_beyond
    years = torch.linspace(0, end, 10 * end + 1, dtype=logs.dtype)
    with torch.no_grad():  # a curve that cannot be extended ends where it fails
        curves = [simulate(fit.growth, fit.theta, years, config.rtol, "ignore").exp() for fit in fits]
    lower, upper = prediction_band(fits[0], years, config)
    pelts, styles = logs.exp(), ((COLOURS.main, "-"), (COLOURS.warm, "--"))
    for k, (axes, name) in enumerate(((hares, "Hares"), (lynxes, "Lynxes"))):
        axes.axvspan(
            FIRST_YEAR + fits[0].years - 0.5, FIRST_YEAR + len(logs) - 0.5, color=COLOURS.faint, alpha=0.5
        )
        axes.fill_between(
            FIRST_YEAR + years,
            lower[:, k],
            upper[:, k],
            color=COLOURS.main,
            alpha=0.12,
            linewidth=0,
            label="95 % band (rates)",
        )
        for curve, fit, (colour, style) in zip(curves, fits, styles):
            axes.plot(FIRST_YEAR + years, curve[:, k], style, color=colour, linewidth=1.8, label=fit.name)
        _dots(axes, FIRST_YEAR + torch.arange(len(logs)), pelts[:, k], fits[0].years)
        axes.set_xlim(FIRST_YEAR - 0.5, FIRST_YEAR + end)
        axes.set_yscale("log")
        axes.set_ylim(3, 120)
        axes.set_yticks([5, 10, 20, 50, 100], ["5", "10", "20", "50", "100"])
        axes.minorticks_off()
        title(axes, name, "thousands of pelts per year; shaded: held out")
    hares.legend(frameon=False, fontsize=9, loc="lower left", ncols=2)
    for curve, (colour, style) in zip(curves, styles):
        plane.plot(curve[:, 0], curve[:, 1], style, color=colour, linewidth=1.8)
    alpha, beta, gamma, delta = fits[0].theta[RATES].exp().tolist()
    plane.plot(gamma / delta, alpha / beta, "+", color=COLOURS.main, markersize=10, markeredgewidth=1.8)
    _dots(plane, pelts[:, 0], pelts[:, 1], fits[0].years)
    plane.set_xlabel("hares")
    plane.set_ylabel("lynxes")
    title(plane, "Phase plane", "+: equilibrium of the fitted rates")
    return figure


def _dots(axes: Axes, x: Tensor, y: Tensor, fitted: int) -> None:
    look = {"color": COLOURS.ink, "markersize": 4.5, "zorder": 3}
    axes.plot(x[:fitted], y[:fitted], "o", label="record", **look)
    axes.plot(x[fitted:], y[fitted:], "o", markerfacecolor="white", label="held out", **look)


def prediction_band(fit: Fit, years: Tensor, config: Config) -> tuple[Tensor, Tensor]:
    """The bounds `(T, 2)` of the 95 % band of a record, in pelts, if the model is right and theta nearly normal.

    The variance is that of theta, propagated along the trajectory by its exact derivative, plus that of the noise.
    """
    assert fit.covariance is not None
    theta = fit.theta
    y = simulate(fit.growth, theta, years, config.rtol)
    derivative = jacfwd(lambda theta: simulate(fit.growth, theta, years, config.rtol))(theta)  # (T, 2, 8)
    variance = torch.einsum("tki,ij,tkj->tk", derivative, fit.covariance, derivative)
    deviation = (variance + theta[NOISE].exp().square()).sqrt()
    return (y - 1.96 * deviation).exp(), (y + 1.96 * deviation).exp()


def main(config: Config) -> list[Fit]:
    """Fit the rates to all years, then rates and network to the first ones; print tables, draw the picture.

    The folder of the run receives `tables.txt`, `fits.png` and `fits.pt` (what was fitted, by model).
    """
    logs = log_record()
    run = run_folder(Path("runs") / "ode-fit", "lynx-hare", config.out, resume=False)
    run.mkdir(parents=True, exist_ok=True)
    first = logs[: config.fitted_years]
    whole, rates = fit_rates(logs, config), fit_rates(first, config)
    corrected = fit_correction(rates, first, config)
    scores = {fit.name: score(fit, logs, config) for fit in (rates, corrected)}
    with (run / "tables.txt").open("w", encoding="utf-8") as file:
        for console in (Console(), Console(file=file, width=100)):
            console.print(parameters_table(whole, rates), scores_table(scores, rates.years), verdict(scores))
    plot_fits([rates, corrected], logs, config).savefig(run / "fits.png")
    states = {fit.name: {"theta": fit.theta, "growth": fit.growth.state_dict()} for fit in (rates, corrected)}
    torch.save(states, run / "fits.pt")
    Console().print(f"picture, tables and fits are in {run}")
    return [whole, rates, corrected]
