"""The efficient frontier of a law, and one architecture's frontier against another's.

FLOPs are not 6 N D for an encoder-decoder, whose two stacks read different tokens, nor at small
sizes, where attention and the head weigh. So the price of a run is itself fitted to the ladder,
C = k N^kappa D, and the frontier follows in closed form: at the cheapest way to a loss,

    alpha A / N^alpha = kappa beta B / D^beta.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from encdec.errors import DataError
from encdec.metrics.intervals import LEVEL, Interval
from encdec.scaling.fit import Law, Observations

_GRID_POINTS = 400


@dataclasses.dataclass(frozen=True)
class Cost:
    """Training FLOPs C = factor * N^exponent * D.

    Attributes:
        factor: k, FLOPs.
        exponent: kappa; 1 where attention and head are negligible.
        largest_error: of the ladder's runs, relative.
    """

    factor: float
    exponent: float
    largest_error: float = 0.0

    def flops(self, parameters: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        return self.factor * parameters**self.exponent * tokens

    def tokens(self, parameters: np.ndarray, flops: np.ndarray) -> np.ndarray:
        return flops / (self.factor * parameters**self.exponent)


def fit_cost(runs: Observations) -> Cost:
    """Least squares of log(C / D) on log N.

    Raises:
        DataError: the runs carry no FLOPs, or are of one size.
    """
    if runs.flops is None:
        raise DataError("the runs carry no FLOPs; a frontier wants them")
    sizes = np.log(runs.parameters)
    if np.ptp(sizes) == 0:
        raise DataError("all runs have one size; the price of another is not known")
    exponent, intercept = np.polyfit(sizes, np.log(runs.flops / runs.tokens), 1)
    cost = Cost(float(np.exp(intercept)), float(exponent))
    error = np.abs(cost.flops(runs.parameters, runs.tokens) / runs.flops - 1).max()
    return dataclasses.replace(cost, largest_error=float(error))


@dataclasses.dataclass(frozen=True)
class Frontier:
    """The best a law of the form "total" allows for each number of FLOPs.

    Attributes:
        law: the law.
        cost: FLOPs as a function of size and tokens.
        sizes: least and most N allowed; by default all. With the sizes of a ladder, nothing is
            claimed of models smaller or larger than any that was run.
    """

    law: Law
    cost: Cost
    sizes: tuple[float, float] = (0.0, math.inf)

    def parameters(self, flops: np.ndarray) -> np.ndarray:
        """N of the best run at ``flops``."""
        law, cost = self.law, self.cost
        rate = cost.exponent * law.beta
        per_token = np.asarray(flops, np.float64) / cost.factor  # N^kappa D
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            best = (law.alpha * law.A / (rate * law.B) * per_token**law.beta) ** (
                1 / (law.alpha + rate)
            )
        return np.clip(best, *self.sizes)  # the loss has one valley, so its edge is best

    def tokens(self, flops: np.ndarray) -> np.ndarray:
        """D of the best run at ``flops``."""
        return self.cost.tokens(self.parameters(flops), flops)

    def loss(self, flops: np.ndarray) -> np.ndarray:
        """The lowest loss at ``flops``."""
        size = self.parameters(flops)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            return self.law.loss(size, self.cost.tokens(size, flops))

    def flops(self, loss: np.ndarray) -> np.ndarray:
        """The fewest FLOPs that reach ``loss``; infinite where no data does."""
        law, kappa = self.law, self.cost.exponent
        above = np.asarray(loss, np.float64) - law.E
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            # At the optimum the size term is this share of what lies above E.
            share = kappa * law.beta / (law.alpha + kappa * law.beta)
            size = np.clip((law.A / (share * above)) ** (1 / law.alpha), *self.sizes)
            left = above - law.A * size**-law.alpha
            tokens = (law.B / left) ** (1 / law.beta)
            return np.where((above > 0) & (left > 0), self.cost.flops(size, tokens), np.inf)

    @property
    def size_exponent(self) -> float:
        """a in N_best ~ C^a, where no size is at its bound."""
        rate = self.cost.exponent * self.law.beta
        return self.law.beta / (self.law.alpha + rate)


@dataclasses.dataclass(frozen=True)
class Crossing:
    """Where two frontiers meet.

    Attributes:
        flops: C at which they do; None: nowhere in the range searched.
        interval: of C, over those draws that cross.
        share: of the draws that cross in the range.
        extrapolated: whether it lies outside the FLOPs that were run.
    """

    flops: float | None
    interval: Interval
    share: float
    extrapolated: bool


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two architectures along their frontiers; ``ratio`` above 1 means the first is cheaper.

    Attributes:
        flops: FLOPs at which both frontiers are given.
        first_loss, second_loss: lowest losses there.
        first_band, second_band: their intervals, arrays [2, points]; NaN without draws.
        losses: losses that both frontiers reach within the FLOPs that were run.
        ratio: FLOPs of the second over FLOPs of the first at these losses.
        ratio_band: its interval, [2, losses].
        crossing: where the frontiers meet.
        share_first_ahead: of the draws in which the first is lower at the largest FLOPs run.
    """

    flops: np.ndarray
    first_loss: np.ndarray
    second_loss: np.ndarray
    first_band: np.ndarray
    second_band: np.ndarray
    losses: np.ndarray
    ratio: np.ndarray
    ratio_band: np.ndarray
    crossing: Crossing
    share_first_ahead: float


def band(frontiers: Sequence[Frontier], flops: np.ndarray, level: float = LEVEL) -> np.ndarray:
    """Interval of the lowest loss at each of ``flops``, [2, points]; NaN without frontiers."""
    if not frontiers:
        return np.full((2, len(flops)), np.nan)
    return _percentiles(np.stack([frontier.loss(flops) for frontier in frontiers]), level)


def compare(
    first: Frontier,
    second: Frontier,
    flops: tuple[float, float],
    first_draws: Sequence[Frontier] = (),
    second_draws: Sequence[Frontier] = (),
    *,
    level: float = LEVEL,
    decades_beyond: float = 2.0,
) -> Comparison:
    """Sets two frontiers side by side.

    Args:
        first, second: fitted frontiers.
        flops: least and most FLOPs that both architectures were run at.
        first_draws, second_draws: bootstrap draws of them; they are independent, so any pairing
            serves.
        level: of the intervals.
        decades_beyond: how far outside ``flops`` a crossing is looked for.
    """
    if not 0 < flops[0] < flops[1]:
        raise DataError(
            f"the architectures share no range of FLOPs: from {flops[0]:.3g} to "
            f"{flops[1]:.3g}; run both on the same budgets"
        )
    grid = np.geomspace(*flops, _GRID_POINTS)
    pairs = list(zip(first_draws, second_draws))
    first_loss, second_loss = first.loss(grid), second.loss(grid)
    high, low = min(first_loss[0], second_loss[0]), max(first_loss[-1], second_loss[-1])
    losses = np.linspace(high, low, 50) if high > low else np.empty(0)
    ratio = second.flops(losses) / first.flops(losses)
    ratios = [b.flops(losses) / a.flops(losses) for a, b in pairs]
    ahead = [a.loss(grid[-1:])[0] < b.loss(grid[-1:])[0] for a, b in pairs]
    return Comparison(
        grid,
        first_loss,
        second_loss,
        band(first_draws, grid, level),
        band(second_draws, grid, level),
        losses,
        ratio,
        _percentiles(np.stack(ratios), level) if ratios else np.full((2, len(losses)), np.nan),
        _crossing(first, second, flops, pairs, level, decades_beyond),
        float(np.mean(ahead)) if ahead else float("nan"),
    )


def _percentiles(values: np.ndarray, level: float) -> np.ndarray:
    tail = 50 * (1 - level)
    # Infinite where a draw's floor lies above the loss; interpolating between infinities is NaN.
    return np.percentile(values, [tail, 100 - tail], axis=0, method="nearest")


def _crossing(
    first: Frontier,
    second: Frontier,
    flops: tuple[float, float],
    pairs: Sequence[tuple[Frontier, Frontier]],
    level: float,
    decades: float,
) -> Crossing:
    low, high = np.log10(flops[0]) - decades, np.log10(flops[1]) + decades
    grid = np.linspace(low, high, 4 * _GRID_POINTS)
    middle = (np.log10(flops[0]) + np.log10(flops[1])) / 2
    found = _root(first, second, grid, middle)
    roots = [_root(a, b, grid, middle if found is None else found) for a, b in pairs]
    crossed = [10**root for root in roots if root is not None]
    outside = found is not None and not np.log10(flops[0]) <= found <= np.log10(flops[1])
    return Crossing(
        None if found is None else float(10**found),
        Interval.of(np.array(crossed), level),
        len(crossed) / len(pairs) if pairs else float("nan"),
        outside,
    )


def _root(first: Frontier, second: Frontier, grid: np.ndarray, near: float) -> float | None:
    """log10 C where the frontiers meet, the meeting nearest to ``near``; None if there is none."""
    gap = first.loss(10**grid) - second.loss(10**grid)
    places = np.flatnonzero(np.sign(gap[:-1]) * np.sign(gap[1:]) < 0)
    if not places.size:
        return None
    i = places[np.argmin(np.abs(grid[places] - near))]
    return float(grid[i] + (grid[i + 1] - grid[i]) * gap[i] / (gap[i] - gap[i + 1]))
