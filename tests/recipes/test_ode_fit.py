"""ode-fit: known rates are found again, their errors are right, and the command writes what it says."""

import csv
import math
import os
import re
from pathlib import Path

import pytest
import torch
from torch.func import grad, hessian

pytest.importorskip("rich", reason="needs the extra: implicitly[recipes]")
pytest.importorskip("matplotlib", reason="needs the extra: implicitly[viz]")

from implicitly.cli import main as cli
from implicitly.recipes.ode_fit import (
    FIRST_YEAR,
    NOISE,
    RATES,
    START,
    Config,
    Correction,
    Growth,
    Score,
    covariance_at_optimum,
    fit_correction,
    fit_rates,
    log_record,
    negative_log_likelihood,
    prediction_band,
    score,
    simulate,
    verdict,
)

TRUE = torch.tensor([0.55, 0.028, 0.8, 0.024, 34.0, 5.9, 0.1, 0.1], dtype=torch.float64).log()
YEARS = torch.arange(21, dtype=torch.float64)
CONFIG = Config(rtol=1e-4)


class Crowded(Growth):
    """Hares that also hinder each other: a term which the four rates cannot express."""

    def forward(self, t, y, log_rates):
        crowding = torch.stack([-0.005 * y[..., 0].exp(), torch.zeros_like(y[..., 0])], dim=-1)
        return super().forward(t, y, log_rates) + crowding


@pytest.fixture(scope="module")
def simulated():
    """As many years as the record has, at known rates, noise included."""
    noise = torch.randn(21, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return simulate(Growth(), TRUE, YEARS, CONFIG.rtol) + TRUE[NOISE].exp() * noise


@pytest.fixture(scope="module")
def fitted(simulated):
    return fit_rates(simulated, CONFIG)


# --- The record and the model -------------------------------------------------------------------------------


def test_record_is_that_of_the_file():
    path = Path(os.environ.get("IMPLICITLY_DATA", "")) / "lynx_hare" / "hudson-bay-lynx-hare.csv"
    if not path.is_file():
        pytest.skip("needs lynx_hare/hudson-bay-lynx-hare.csv in the folder that IMPLICITLY_DATA names")
    rows = list(csv.reader(line for line in path.read_text().splitlines() if line[0] in "12"))
    assert [int(year) for year, _, _ in rows] == list(range(FIRST_YEAR, FIRST_YEAR + 21))
    pelts = torch.tensor([[float(hare), float(lynx)] for _, lynx, hare in rows], dtype=torch.float64)
    torch.testing.assert_close(log_record(), pelts.log(), rtol=0, atol=0)


def test_field_is_that_of_lotka_and_volterra():
    alpha, beta, gamma, delta = 0.5, 0.02, 0.8, 0.03
    u, v = 40.0, 10.0
    y, log_rates = torch.tensor([u, v]).log(), torch.tensor([alpha, beta, gamma, delta]).log()
    growth = Growth()(torch.tensor(0.0), y, log_rates)
    expected = torch.tensor([(alpha - beta * v) * u, (delta * u - gamma) * v])
    torch.testing.assert_close(growth * y.exp(), expected)
    # Before training, the network changes nothing.
    torch.testing.assert_close(Growth(Correction(4, torch.zeros(2)))(torch.tensor(0.0), y, log_rates), growth)


def test_trajectory_keeps_what_the_equations_conserve():
    y = simulate(Growth(), TRUE, YEARS, rtol=1e-9)
    alpha, beta, gamma, delta = TRUE[RATES].exp()
    conserved = delta * y[:, 0].exp() - gamma * y[:, 0] + beta * y[:, 1].exp() - alpha * y[:, 1]
    torch.testing.assert_close(conserved, conserved[0].expand(21), rtol=1e-6, atol=0)
    torch.testing.assert_close(y[0], TRUE[START])


# --- The fits -----------------------------------------------------------------------------------------------


def test_known_rates_are_found_again_within_their_errors(fitted):
    off = fitted.theta - TRUE
    assert (off.abs() < 3 * fitted.covariance.diagonal().sqrt()).all()
    assert (fitted.standard_errors / fitted.theta.exp())[RATES].max() < 0.1
    six = slice(0, 6)  # rates and start; the noise of so few years is no normal variable
    squares = off[six] @ torch.linalg.solve(fitted.covariance[six, six], off[six])
    assert 0.87 < squares < 16.81  # all but 1 % of a chi-square variable of 6 degrees on either side


@pytest.mark.slow
def test_the_guess_does_not_decide(simulated):
    guesses = (CONFIG.guess, (0.2, 0.01, 2.0, 0.05))
    one, other = (fit_rates(simulated[:8], Config(guess=guess, rtol=1e-4)).theta for guess in guesses)
    torch.testing.assert_close(one, other, rtol=0, atol=1e-3)


def test_hessian_at_the_optimum_is_positive_definite_and_exact(simulated, fitted):
    def loss(theta):
        return negative_log_likelihood(theta, Growth(), simulated, CONFIG.rtol)

    theta = fitted.theta
    curvature = hessian(loss)(theta)
    torch.testing.assert_close(curvature, curvature.T, rtol=1e-10, atol=1e-8)
    assert torch.linalg.eigvalsh(curvature)[0] > 1
    torch.testing.assert_close(fitted.covariance @ curvature, torch.eye(8, dtype=torch.float64), rtol=0, atol=1e-8)
    slope = grad(loss)(theta)
    assert slope.abs().max() < 1e-2 * curvature.diagonal().sqrt().min()
    for i in (0, 5):
        step = 1e-4 * torch.eye(8, dtype=torch.float64)[i]
        difference = (grad(loss)(theta + step) - grad(loss)(theta - step)) / 2e-4
        torch.testing.assert_close(curvature[i], difference, rtol=1e-3, atol=1e-3 * curvature.abs().max().item())


def test_search_that_ends_too_early_has_no_errors(simulated, fitted):
    with pytest.raises(
        ValueError, match=r"no maximum .* its Hessian has the eigenvalue \d.* after 1 steps. Try more"
    ):
        fit_rates(simulated[:8], Config(steps=1, rtol=1e-4))

    def loss(theta):
        return negative_log_likelihood(theta, Growth(), simulated, CONFIG.rtol)

    # Half a standard error off in alpha alone: the likelihood is still convex there, but no maximum.
    off = 0.5 * fitted.covariance[0, 0].sqrt() * torch.eye(8, dtype=torch.float64)[0]
    with pytest.raises(
        ValueError, match=r"found no maximum .* can still grow by \d.* after 7 steps. Try more --steps"
    ):
        covariance_at_optimum(loss, fitted.theta + off, steps=7)


@pytest.mark.slow
def test_correction_learns_what_the_rates_cannot_say_and_foretells_with_it(simulated):
    noise = simulated - simulate(Growth(), TRUE, YEARS, CONFIG.rtol)
    logs = (simulate(Crowded(), TRUE, YEARS, CONFIG.rtol) + 0.1 * noise)[:13]
    config = Config(network_steps=25, rtol=1e-4)
    rates = fit_rates(logs[:10], config)
    before = torch.random.get_rng_state()
    corrected = fit_correction(rates, logs[:10], config)
    assert torch.equal(torch.random.get_rng_state(), before)
    (fitted, held_out), (fitted_corrected, held_out_corrected) = (
        score(fit, logs, config) for fit in (rates, corrected)
    )
    assert fitted_corrected.rmse < 0.7 * fitted.rmse
    assert held_out_corrected.rmse < 0.7 * held_out.rmse
    assert held_out_corrected.log_likelihood > held_out.log_likelihood

    # The smaller the correction is expected to be, the less it changes.
    tight = fit_correction(rates, logs[:10], Config(network_steps=5, correction=1e-4, rtol=1e-4))
    assert score(tight, logs, config)[0].rmse == pytest.approx(fitted.rmse, rel=0.02)


def test_scores_are_those_of_the_definition(simulated, fitted):
    part = fitted.__class__("rates", 9, fitted.growth, fitted.theta, fitted.covariance)
    scores = score(part, simulated, CONFIG)
    off = simulate(Growth(), fitted.theta, YEARS, CONFIG.rtol) - simulated
    sigma = fitted.theta[NOISE].exp()
    likelihood = -0.5 * (off / sigma) ** 2 - sigma.log() - 0.5 * math.log(2 * math.pi)
    for found, rows in zip(scores, (slice(0, 9), slice(9, 21))):
        assert found.rmse == pytest.approx((off[rows] ** 2).mean().sqrt().item())
        assert found.log_likelihood == pytest.approx(likelihood[rows].mean().item())


@pytest.mark.slow
def test_band_widens_with_what_is_not_known(fitted):
    years = torch.linspace(0, 30, 31, dtype=torch.float64)
    lower, upper = prediction_band(fitted, years, CONFIG)
    deviation = (upper.log() - lower.log()) / (2 * 1.96)
    noise = fitted.theta[NOISE].exp()
    start = (fitted.covariance.diagonal()[START] + noise**2).sqrt()
    torch.testing.assert_close(deviation[0], start)
    assert (deviation > noise).all()
    assert deviation[21:].max() > deviation[:21].max()
    # Variance at the end, along the eigenvectors of the covariance, by differences.
    ends = torch.tensor([0.0, 30.0], dtype=torch.float64)
    variances, directions = torch.linalg.eigh(fitted.covariance)
    expected = noise**2
    for variance, d in zip(variances, 1e-4 * directions.T):
        there, back = (simulate(fitted.growth, fitted.theta + x, ends, 1e-10)[1] for x in (d, -d))
        expected = expected + variance * ((there - back) / 2e-4) ** 2
    torch.testing.assert_close(deviation[30] ** 2, expected, rtol=1e-3, atol=0)


def test_verdict_says_what_the_numbers_say():
    better, worse = (Score(0.1, 0.5), Score(0.2, 0.0)), (Score(0.1, 0.5), Score(0.3, -1.0))
    assert "does not extrapolate better: RMSE on the held-out years 0.300 with it, 0.200 without" in verdict(
        {"rates": better, "rates + network": worse}
    )
    assert "extrapolates better: RMSE on the held-out years 0.200" in verdict(
        {"rates": worse, "rates + network": better}
    )


# --- The command --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_command_writes_tables_picture_and_fits(tmp_path, capsys):
    pytest.importorskip("tyro", reason="needs the extra: implicitly[recipes]")
    options = ["--steps", "25", "--network-steps", "2", "--hidden", "2", "--rtol", "1e-4", "--years-beyond", "1"]
    assert cli(["fit", "ode-fit", "--out", str(tmp_path / "run"), *options]) == 0
    printed, tables = capsys.readouterr().out, (tmp_path / "run" / "tables.txt").read_text()
    for text in (printed, tables):
        assert re.search(r"alpha +│ +0\.5[34]\d ± 0\.05\d │ +0\.545 ± 0\.064", text)
        assert "1900-1915" in text
        assert "rates + network" in text
        assert "The network" in text
    assert (tmp_path / "run" / "fits.png").read_bytes().startswith(b"\x89PNG")
    states = torch.load(tmp_path / "run" / "fits.pt", weights_only=True)
    assert states["rates"]["theta"].shape == (8,)
    growth = Growth(Correction(2, torch.zeros(2, dtype=torch.float64)))
    growth.load_state_dict(states["rates + network"]["growth"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fitted_years": 21}, "fitted_years must be 8 to 20; got 21"),
        ({"fitted_years": 4}, "fitted_years must be 8 to 20; got 4"),
        ({"guess": (1.0, 0.1, -1.0, 0.1)}, "guess must be four positive rates"),
        ({"steps": 0}, "steps must be at least 1; got 0"),
        ({"hidden": 0}, "hidden must be at least 1"),
        ({"years_beyond": -1}, "years_beyond must be at least 0"),
        ({"correction": 0.0}, "correction must be positive; got 0.0"),
        ({"rtol": math.nan}, "rtol must be finite and at least 4.4e-16, .* got nan"),
    ],
)
def test_bad_options_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Config(**changes)
