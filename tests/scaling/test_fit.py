"""Fits recover planted laws, say how sure they are, and refuse what cannot be fitted."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from encdec.errors import DataError
from encdec.metrics.intervals import Interval
from encdec.scaling.fit import Law, Observations, _Problem, fit_law, residuals
from encdec.scaling.law_uncertainty import constant_intervals, hold_out_largest, refitted_draws
from tests.scaling.synthetic import ladder, random_law

PLANTED = Law("total", 1.7, 400.0, 410.0, (0.34,), 0.28)
PARTS = Law("parts", 1.6, 300.0, 410.0, (0.12, 0.21), 0.3)
SHARES = (0.4, 0.6, 0.75)


def test_recovers_a_law_without_noise():
    law = fit_law(ladder(PLANTED))
    for name, value in PLANTED.constants().items():
        assert law.constants()[name] == pytest.approx(value, rel=1e-5), name
    assert law.bounds_hit == ()


def test_recovers_encoder_and_decoder_exponents():
    law = fit_law(ladder(PARTS, shares=SHARES), "parts")
    for name, value in PARTS.constants().items():
        assert law.constants()[name] == pytest.approx(value, rel=1e-4), name


def test_is_indifferent_to_units():
    runs = ladder(PLANTED, noise=0.005)
    in_bits = fit_law(dataclasses.replace(runs, loss=runs.loss / np.log(2)))
    law = fit_law(runs)
    assert in_bits.E == pytest.approx(law.E / np.log(2), rel=1e-3)
    assert in_bits.alpha == pytest.approx(law.alpha, rel=1e-3)


@pytest.mark.parametrize("form", ["total", "parts"])
def test_gradient_is_the_objectives(form):
    law = PLANTED if form == "total" else PARTS
    problem = _Problem(ladder(law, noise=0.01, shares=SHARES), form)
    theta = problem.from_law(law) + 0.02
    _, gradient = problem.objective(theta)
    for i, slope in enumerate(gradient):
        step = np.eye(len(theta))[i] * 1e-7
        rise = problem.objective(theta + step)[0] - problem.objective(theta - step)[0]
        assert slope == pytest.approx(rise / 2e-7, rel=1e-4)


def test_one_spoilt_run_hardly_moves_the_fit():
    runs = ladder(PLANTED, noise=0.001)
    loss = runs.loss.copy()
    loss[7] *= 1.5  # diverged
    law = fit_law(dataclasses.replace(runs, loss=loss))
    assert law.alpha == pytest.approx(PLANTED.alpha, rel=0.05)
    assert residuals(law, dataclasses.replace(runs, loss=loss))[7] == pytest.approx(
        np.log(1.5), abs=0.01
    )


@pytest.mark.slow
def test_planted_exponents_lie_in_their_intervals():
    """In at least 34 of 40 noisy ladders, for each exponent (38 are expected of 95 % intervals)."""
    inside = {"alpha": 0, "beta": 0}
    for seed in range(40):
        planted = random_law(seed)
        runs = ladder(planted, noise=0.005, seed=seed)
        law = fit_law(runs)
        intervals = constant_intervals(refitted_draws(runs, law, draws=50, seed=seed))
        for name in inside:
            inside[name] += planted.constants()[name] in intervals[name]
    assert min(inside.values()) >= 34, inside


def test_intervals_narrow_with_less_noise():
    widths = []
    for noise in (0.01, 0.001):
        runs = ladder(PLANTED, noise=noise)
        found = constant_intervals(refitted_draws(runs, fit_law(runs), draws=30))["alpha"]
        widths.append(found.high - found.low)
    assert widths[1] < widths[0] / 3


def test_interval_leaves_equal_tails():
    found = Interval.of(np.arange(101.0), 0.9)
    assert (found.low, found.high) == (pytest.approx(5.0), pytest.approx(95.0))
    assert np.isnan(Interval.of(np.array([np.nan])).low)


def test_extrapolates_to_the_size_held_out():
    runs = ladder(PLANTED, noise=0.001, sizes=6)
    held = hold_out_largest(runs)
    assert held.parameters == pytest.approx(3e7)
    assert len(held.errors) == 5
    assert held.mean_absolute_error < 0.01
    # The law must not have seen them: spoiling them changes nothing but the error.
    spoilt = np.where(runs.parameters > 2e7, 2 * runs.loss, runs.loss)
    assert hold_out_largest(dataclasses.replace(runs, loss=spoilt)).law == held.law


def refused(runs: Observations, form: str = "total") -> str:
    with pytest.raises(DataError) as caught:
        fit_law(runs, form)
    return str(caught.value)


def test_refuses_what_cannot_be_fitted():
    runs = ladder(PLANTED)
    assert "4 runs" in refused(runs.select(np.arange(4)))
    one_size = refused(runs.select(runs.parameters == runs.parameters[0]).select(np.arange(5)))
    assert "5 runs" in one_size
    many = ladder(PLANTED, budgets=9)
    assert "1 model size;" in refused(many.select(many.parameters == many.parameters[0]))
    wide = ladder(PLANTED, sizes=9)
    assert "1 token count;" in refused(wide.select(wide.tokens == wide.tokens[0]))
    nan = runs.loss.copy()
    nan[3] = np.nan
    assert "row 3: nan" in refused(dataclasses.replace(runs, loss=nan))
    zero = dataclasses.replace(runs, tokens=np.where(runs.tokens == 1e6, 0, runs.tokens))
    assert "tokens is not a positive finite number in 5 of 25 rows" in refused(zero)


def test_refuses_tokens_in_proportion_to_size():
    """A ladder at 20 tokens per parameter says nothing about either exponent alone."""
    runs = ladder(PLANTED, sizes=9)
    bound = dataclasses.replace(runs, tokens=20 * runs.parameters)
    assert "fixed proportion" in refused(bound)


def test_refuses_parts_of_a_single_split():
    assert "fixed proportion" in refused(ladder(PARTS), "parts")
    whole = dataclasses.replace(ladder(PARTS, shares=SHARES), encoder_parameters=None)
    assert "encoder and decoder" in refused(whole, "parts")


def test_refuses_to_hold_out_one_of_three_sizes():
    with pytest.raises(DataError, match="without the largest size there remain 2 model sizes"):
        hold_out_largest(ladder(PLANTED, sizes=3))
