"""Each rung by itself, without a law: series side by side, with errors from seeds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

from encdec.metrics.intervals import Interval, t_interval
from encdec.scaling.matching import DECODER_ONLY
from encdec.scaling.results_file import LOSSES, Row


@dataclasses.dataclass(frozen=True)
class RungResult:
    """One series on one rung.

    Attributes:
        values: one per seed.
        ahead: decoder-only's value minus this series' (for scores the reverse), so that above 0
            this series is better; the mean over common seeds, NaN without any.
        interval: of ``ahead``, by Student's t over these seeds; NaN with fewer than two.
    """

    values: tuple[float, ...]
    ahead: float
    interval: Interval

    @property
    def mean(self) -> float:
        return float(np.mean(self.values))

    @property
    def deviation(self) -> float:
        """Standard deviation between seeds; NaN with fewer than two."""
        return float(np.std(self.values, ddof=1)) if len(self.values) > 1 else math.nan


@dataclasses.dataclass(frozen=True)
class Rung:
    """One size at one budget.

    Attributes:
        size: its name.
        budget: in the unit of the ladder's budgets.
        flops: of the first series' runs.
        cells: by series.
    """

    size: str
    budget: float
    flops: float
    cells: dict[str, RungResult]


def loss_rungs(final: Sequence[Row], loss: str) -> list[Rung]:
    """Held-out losses of finished runs; ``loss`` is a key of ``results_file.LOSSES``."""
    return _rungs(final, lambda row: row.get(LOSSES[loss], math.nan), -1.0)


def score_rungs(rows: Sequence[Row], metric: str) -> list[Rung]:
    """A task's metric (higher is better) of the runs that were scored."""
    scored = [row for row in rows if metric in row.get("scores", {})]
    return _rungs(scored, lambda row: row["scores"][metric], 1.0)


def _rungs(rows: Sequence[Row], value: Callable[[Row], float], sign: float) -> list[Rung]:
    groups: dict[tuple[str, float], dict[str, dict[int, Row]]] = {}
    for row in rows:
        rung = groups.setdefault((row["size"], row["budget"]), {})
        rung.setdefault(row["series"], {})[row["seed"]] = row
    found = []
    for (size, budget), series in groups.items():
        values = {
            name: {seed: float(value(row)) for seed, row in sorted(seeds.items())}
            for name, seeds in series.items()
        }
        other = values.get(DECODER_ONLY, {})
        first = next(iter(next(iter(series.values())).values()))
        found.append(
            Rung(
                size,
                budget,
                first["flops"],
                {
                    name: _cell(mine, {} if name == DECODER_ONLY else other, sign)
                    for name, mine in values.items()
                },
            )
        )
    smallest = {
        size: min(row["parameters"] for row in rows if row["size"] == size)
        for size in {rung.size for rung in found}
    }
    return sorted(found, key=lambda rung: (smallest[rung.size], rung.budget))


def _cell(mine: dict[int, float], other: dict[int, float], sign: float) -> RungResult:
    # Runs of one seed read the same rows in the same order, so they are compared in pairs.
    both = [sign * (mine[seed] - other[seed]) for seed in mine if seed in other]
    ahead = float(np.mean(both)) if both else math.nan
    return RungResult(tuple(mine.values()), ahead, t_interval(both))
