"""Rungs side by side: means, deviations, and paired intervals over seeds."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from encdec.metrics.intervals import t_interval
from encdec.scaling.rungs import loss_rungs, score_rungs


def row(series: str, size: str, budget: float, seed: int, loss: float, parameters: int = 100):
    return {
        "series": series,
        "size": size,
        "budget": budget,
        "seed": seed,
        "loss": loss,
        "flops": budget,
        "parameters": parameters,
    }


ROWS = [
    *(row("ed-2of3", "big", 1e12, seed, loss, 900) for seed, loss in enumerate((4.0, 4.2, 4.1))),
    *(row("dec", "big", 1e12, seed, loss, 700) for seed, loss in enumerate((4.3, 4.4, 4.5))),
    row("ed-2of3", "small", 1e12, 0, 5.0),
    row("dec", "small", 1e12, 0, 4.5),
    row("ed-2of3", "small", 1e11, 0, 6.0),
]


def test_series_are_compared_in_pairs_of_seeds():
    small_first, small, big = loss_rungs(ROWS, "nats_per_token")
    assert [(r.size, r.budget) for r in (small_first, small, big)] == [
        ("small", 1e11),
        ("small", 1e12),
        ("big", 1e12),
    ]
    cell = big.cells["ed-2of3"]
    assert (cell.mean, cell.deviation) == (pytest.approx(4.1), pytest.approx(0.1))
    assert cell.ahead == pytest.approx(0.3)
    found = stats.ttest_rel([4.3, 4.4, 4.5], [4.0, 4.2, 4.1]).confidence_interval(0.95)
    assert (cell.interval.low, cell.interval.high) == pytest.approx((found.low, found.high))
    assert math.isnan(big.cells["dec"].ahead)


def test_one_seed_has_no_error_and_no_opponent_no_gap():
    first, second, _ = loss_rungs(ROWS, "nats_per_token")
    assert math.isnan(first.cells["ed-2of3"].ahead)
    cell = second.cells["ed-2of3"]
    assert cell.ahead == pytest.approx(-0.5) and math.isnan(cell.interval.low)
    assert math.isnan(cell.deviation)


def test_more_of_a_score_is_better():
    scored = [r | {"scores": {"rouge_l": 10 - r["loss"]}} for r in ROWS] + ROWS
    *_, big = score_rungs(scored, "rouge_l")
    assert big.cells["ed-2of3"].ahead == pytest.approx(0.3)
    assert score_rungs(ROWS, "rouge_l") == []


def test_intervals_cover_the_mean():
    random = np.random.default_rng(0)
    inside = [0.0 in t_interval(list(random.standard_normal(3))) for _ in range(2000)]
    assert np.mean(inside) == pytest.approx(0.95, abs=0.015)
