"""Uncertainty of scores: bootstrap intervals, and paired tests between two models."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

# Maps indices of examples (repeats allowed) to the score of that sample.
Statistic = Callable[[np.ndarray], float]

# Maps sums over examples, [N, K], to the score of each row, [N]; NaN where it is not defined.
ScoreOfSums = Callable[[np.ndarray], np.ndarray]

RESAMPLES = 1000
TRIALS = 10_000
LEVEL = 0.95


@dataclasses.dataclass(frozen=True)
class Interval:
    """An interval, with the point estimate if there is one (else NaN)."""

    low: float
    high: float
    value: float = math.nan

    @classmethod
    def of(cls, values: np.ndarray, level: float = LEVEL, value: float = math.nan) -> Interval:
        """The central percentile interval of draws.

        Undefined draws are left out; with fewer than two left, the bounds are NaN.
        """
        values = np.asarray(values, np.float64)
        values = values[np.isfinite(values)]
        if values.size < 2:
            return cls(math.nan, math.nan, value)
        tail = (1 - level) / 2
        low, high = np.quantile(values, (tail, 1 - tail))
        return cls(float(low), float(high), value)

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


def t_interval(values: Sequence[float], level: float = LEVEL) -> Interval:
    """Student's interval of a mean; its bounds are NaN with fewer than two values."""
    mean = float(np.mean(values)) if len(values) else math.nan
    if len(values) < 2:
        return Interval(math.nan, math.nan, mean)
    from scipy import stats  # takes half a second

    half = (
        stats.t.ppf((1 + level) / 2, len(values) - 1)
        * np.std(values, ddof=1)
        / math.sqrt(len(values))
    )
    return Interval(mean - float(half), mean + float(half), mean)


def bootstrap(
    statistic: Statistic, count: int, *, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """A statistic of ``count`` examples with its percentile bootstrap interval.

    Efron (1979): examples are drawn with replacement. Samples on which the statistic is not
    defined (a kappa of one class) are left out; with fewer than two left, the bounds are NaN.
    """
    rng = np.random.default_rng(seed)
    value = statistic(np.arange(count))
    drawn = np.array([statistic(rng.integers(0, count, count)) for _ in range(resamples)])
    return Interval.of(drawn, value=value)


def compare(
    first: Statistic, second: Statistic, count: int, *, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """``second - first`` with its paired bootstrap interval (Koehn 2004): both on one sample."""
    return bootstrap(
        lambda indices: second(indices) - first(indices), count, resamples=resamples, seed=seed
    )


def randomisation_test(
    first_ExK: np.ndarray,
    second_ExK: np.ndarray,
    score_of: ScoreOfSums,
    *,
    trials: int = TRIALS,
    seed: int = 0,
) -> float:
    """Two-sided p-value that two models' scores of a set of examples differ.

    Approximate randomisation (Noreen 1989; Riezler and Maxwell 2005): each trial swaps the two
    models' outputs of every example with probability 1/2 and scores both sets again; the p-value is
    the share of trials with a difference at least as large, the observed one counted among them.
    A swap moves an example's part of the sums, so that a trial is one row of a matrix product. A
    trial whose score is not defined counts as large.

    Args:
        first_ExK: what each example adds to the first model's sums.
        second_ExK: the same for the second model, on the same examples.
        score_of: sums [N, K] to scores [N].
        trials: how many.
        seed: of the swaps.

    Returns:
        The p-value; NaN where the observed difference is not defined.
    """
    first, second = np.asarray(first_ExK, np.float64), np.asarray(second_ExK, np.float64)
    if first.shape != second.shape:
        raise ValueError(
            f"parts of shape {first.shape} against {second.shape}; expected the same examples"
        )
    sums_K, moves_ExK = np.stack([first.sum(axis=0), second.sum(axis=0)]), second - first
    low, high = score_of(sums_K)
    observed = abs(high - low)
    if not np.isfinite(observed):
        return float("nan")
    rng = np.random.default_rng(seed)
    hits = 0
    for begin in range(0, trials, 500):
        swaps_TxE = rng.integers(0, 2, (min(500, trials - begin), len(first)))
        moved_TxK = swaps_TxE.astype(np.float64) @ moves_ExK
        found_T = score_of(sums_K[1] - moved_TxK) - score_of(sums_K[0] + moved_TxK)
        hits += int((~(np.abs(found_T) < observed * (1 - 1e-9) - 1e-12)).sum())
    return (hits + 1) / (trials + 1)
