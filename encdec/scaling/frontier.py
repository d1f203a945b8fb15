"""The efficient frontier of a law, and one architecture's frontier against another's.

FLOPs are not 6 N D for an encoder-decoder, whose two stacks read different tokens, nor at small
sizes, where attention and the head are significant. So the cost of a run is also fitted to the
ladder, C = k N^kappa D, and the frontier follows in closed form: at the lowest cost of a loss,

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
class CostLaw:
    """Training FLOPs C = factor * N^exponent * D.

    Attributes:
        factor: k, in FLOPs.
        exponent: kappa; 1 where attention and head are negligible.
        largest_error: largest relative error over the ladder's runs.
    """

    factor: float
    exponent: float
    largest_error: float = 0.0

    def flops(self, parameters: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        return self.factor * parameters**self.exponent * tokens

    def tokens(self, parameters: np.ndarray, flops: np.ndarray) -> np.ndarray:
        return flops / (self.factor * parameters**self.exponent)


def fit_cost(runs: Observations) -> CostLaw:
    """Least squares of log(C / D) on log N.

    Raises:
        DataError: the runs have no FLOPs, or only one size.
    """
    if runs.flops is None:
        raise DataError("the runs have no FLOPs; a frontier needs them")
    sizes = np.log(runs.parameters)
    if np.ptp(sizes) == 0:
        raise DataError("all runs have the same size, so the cost of other sizes is unknown")
    exponent, intercept = np.polyfit(sizes, np.log(runs.flops / runs.tokens), 1)
    cost = CostLaw(float(np.exp(intercept)), float(exponent))
    error = np.abs(cost.flops(runs.parameters, runs.tokens) / runs.flops - 1).max()
    return dataclasses.replace(cost, largest_error=float(error))


@dataclasses.dataclass(frozen=True)
class Frontier:
    """The lowest loss for each number of FLOPs, by a law of the form "total".

    Attributes:
        law: the law.
        cost: FLOPs as a function of size and tokens.
        sizes: smallest and largest N allowed; default: all. With the sizes of a ladder, the
            frontier says nothing about models smaller or larger than those that were run.
    """

    law: Law
    cost: CostLaw
    sizes: tuple[float, float] = (0.0, math.inf)

    def parameters(self, flops: np.ndarray) -> np.ndarray:
        """N of the best run at ``flops``."""
        law, cost = self.law, self.cost
        alpha, beta = _exponents(law)
        rate = cost.exponent * beta
        per_token = np.asarray(flops, np.float64) / cost.factor  # N^kappa D
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            best = (alpha * law.A / (rate * law.B) * per_token**beta) ** (1 / (alpha + rate))
        return np.clip(best, *self.sizes)  # the loss has one minimum, so the nearest bound is best

    def tokens(self, flops: np.ndarray) -> np.ndarray:
        """D of the best run at ``flops``."""
        return self.cost.tokens(self.parameters(flops), flops)

    def loss(self, flops: np.ndarray) -> np.ndarray:
        """The lowest loss at ``flops``."""
        size = self.parameters(flops)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            return self.law.loss(size, self.cost.tokens(size, flops))

    def flops(self, loss: np.ndarray) -> np.ndarray:
        """The fewest FLOPs that reach ``loss``; infinite if no amount of data does."""
        law, kappa = self.law, self.cost.exponent
        alpha, beta = _exponents(law)
        above = np.asarray(loss, np.float64) - law.E
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            # At the optimum the size term is this share of the loss above E.
            share = kappa * beta / (alpha + kappa * beta)
            size = np.clip((law.A / (share * above)) ** (1 / alpha), *self.sizes)
            left = above - law.A * size**-alpha
            tokens = (law.B / left) ** (1 / beta)
            return np.where((above > 0) & (left > 0), self.cost.flops(size, tokens), np.inf)

    @property
    def size_exponent(self) -> float:
        """a in N_best ~ C^a, away from the bounds of the sizes."""
        alpha, beta = _exponents(self.law)
        with np.errstate(invalid="ignore"):
            return float(beta / (alpha + self.cost.exponent * beta))


def _exponents(law: Law) -> tuple[np.float64, np.float64]:
    """alpha and beta, which are 0 at their bound: numpy then divides to infinity or NaN."""
    return np.float64(law.alpha), np.float64(law.beta)


@dataclasses.dataclass(frozen=True)
class Crossing:
    """Where two frontiers meet.

    Attributes:
        flops: C of the crossing; None: none in the range searched.
        interval: of C, over the draws that cross.
        share: fraction of draws that cross in the range.
        extrapolated: whether it is outside the FLOPs that were run.
    """

    flops: float | None
    interval: Interval
    share: float
    extrapolated: bool


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two architectures along their frontiers; ``ratio`` above 1 means the first is cheaper.

    Attributes:
        flops: FLOPs at which both frontiers are evaluated.
        first_loss, second_loss: lowest losses there.
        first_band, second_band: their intervals, arrays [2, points]; NaN without draws.
        losses: losses that both frontiers reach within the FLOPs that were run.
        ratio: FLOPs of the second over FLOPs of the first at these losses.
        ratio_band: its interval, [2, losses].
        crossing: where the frontiers meet.
        share_first_ahead: fraction of draws in which the first is lower at the largest FLOPs run.
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
    """Compares two frontiers.

    Args:
        first, second: fitted frontiers.
        flops: smallest and largest FLOPs at which both architectures were run.
        first_draws, second_draws: their bootstrap draws; independent, so any pairing is valid.
        level: of the intervals.
        decades_beyond: how far outside ``flops`` a crossing is searched.
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
    with np.errstate(divide="ignore", invalid="ignore"):
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
    # Infinite if a draw's floor is above the loss; interpolating between infinities gives NaN.
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
    """log10 C of the crossing nearest to ``near``; None if there is none."""
    gap = first.loss(10**grid) - second.loss(10**grid)
    unequal = np.flatnonzero(gap)  # where the frontiers meet, neither is the better
    signs = np.sign(gap[unequal])
    places = unequal[np.flatnonzero(signs[:-1] * signs[1:] < 0)]
    if not places.size:
        return None
    i = places[np.argmin(np.abs(grid[places] - near))]
    return float(grid[i] + (grid[i + 1] - grid[i]) * gap[i] / (gap[i] - gap[i + 1]))
