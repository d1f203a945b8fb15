"""Uncertainty of scores: bootstrap intervals, and paired tests between two models."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

# Maps indices of examples (repeats allowed), [N, E], to the score of each such sample, [N].
Statistic = Callable[[np.ndarray], np.ndarray]

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
    value = statistic(np.arange(count)[None])[0]
    at_once = max(1, 100_000 // count)
    drawn = [
        statistic(rng.integers(0, count, (min(at_once, resamples - begin), count)))
        for begin in range(0, resamples, at_once)
    ]
    return Interval.of(np.concatenate(drawn), value=float(value))


def compare(
    first: Statistic, second: Statistic, count: int, *, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """``second - first`` with its paired bootstrap interval (Koehn 2004): both on one sample."""
    return bootstrap(
        lambda indices: second(indices) - first(indices), count, resamples=resamples, seed=seed
    )


def randomisation_test(
    first: np.ndarray,
    second: np.ndarray,
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

    Of several training seeds, a model's score is the mean of theirs, as the difference shown is. A
    trial swaps an example's outputs of all seeds, and its score is the mean over all pairs of a
    seed of one model and a seed of the other.

    Args:
        first: what each example adds to the first model's sums, [E, K], or, of several seeds,
            [S, E, K].
        second: the same for the second model, on the same examples; its seeds may be more or fewer.
        score_of: sums [N, K] to scores [N].
        trials: how many.
        seed: of the swaps.

    Returns:
        The p-value; NaN where the observed difference is not defined.
    """
    sides = [np.asarray(side, np.float64) for side in (first, second)]
    sides = [side if side.ndim == 3 else side[None] for side in sides]
    if sides[0].shape[1:] != sides[1].shape[1:]:
        raise ValueError(
            f"parts of shape {sides[0].shape[1:]} against {sides[1].shape[1:]}; expected the same "
            "examples"
        )
    sums = [side_SxExK.sum(axis=1) for side_SxExK in sides]
    observed = abs(score_of(sums[1]).mean() - score_of(sums[0]).mean())
    if not np.isfinite(observed):
        return float("nan")

    def mean_scores(kept_SxTxK: np.ndarray, moved_RxTxK: np.ndarray) -> np.ndarray:
        """[T]: of what is left of one model's outputs with what comes from the other's."""
        sums_SxRxTxK = kept_SxTxK[:, None] + moved_RxTxK
        scores_N = score_of(sums_SxRxTxK.reshape(-1, sums_SxRxTxK.shape[-1]))
        return scores_N.reshape(-1, kept_SxTxK.shape[1]).mean(axis=0)

    rng = np.random.default_rng(seed)
    hits = 0
    for begin in range(0, trials, 500):
        count = min(500, trials - begin)
        swaps_TxE = rng.integers(0, 2, (count, sides[0].shape[1])).astype(np.float64)
        moved = [swaps_TxE @ side_SxExK for side_SxExK in sides]
        kept = [whole[:, None] - part for whole, part in zip(sums, moved, strict=True)]
        found_T = mean_scores(kept[1], moved[0]) - mean_scores(kept[0], moved[1])
        hits += int((~(np.abs(found_T) < observed * (1 - 1e-9) - 1e-12)).sum())
    return (hits + 1) / (trials + 1)
