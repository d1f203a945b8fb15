"""Metrics: scores that are functions of sums over examples, each with its convention in words.

Every score is a function of sums over the examples, so that one bootstrap and one randomisation
test serve them all.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from encdec.errors import DataError
from encdec.metrics.intervals import RESAMPLES, Interval, ScoreOfSums, bootstrap


@dataclasses.dataclass(frozen=True)
class Score:
    """One named score of a set of predictions.

    Attributes:
        name: for example ``f1`` or ``has_answer_f1``.
        parts_ExK: what each of its examples adds to the sums; SQuAD's two halves have fewer than
            all examples.
        of_sums: the score of each row of sums.
        remark: a caveat about the value on these texts; usually "".
    """

    name: str
    parts_ExK: np.ndarray
    of_sums: ScoreOfSums
    remark: str = ""

    @property
    def count(self) -> int:
        """Number of examples."""
        return len(self.parts_ExK)

    def statistic(self, indices_NxE: np.ndarray) -> np.ndarray:
        """The score of the examples at each row of indices (repeats allowed)."""
        return self.of_sums(self.parts_ExK[indices_NxE].sum(axis=1))

    @property
    def value(self) -> float:
        """The score of all examples."""
        return float(self.statistic(np.arange(self.count)[None])[0])

    def interval(self, resamples: int = RESAMPLES) -> Interval:
        return bootstrap(self.statistic, self.count, resamples=resamples)


# Maps references of each example, and the predictions, to scores.
Sums = TypeVar("Sums", float, np.ndarray)
Scorer = Callable[[Sequence[Sequence[str]], Sequence[str]], list[Score]]


@dataclasses.dataclass(frozen=True)
class Metric:
    """A metric with its name.

    Attributes:
        name: used by tasks and commands.
        convention: how it is computed, and where that convention is published.
        scorer: computes its scores.
        gives: the names of these scores.
        needs: what must be installed first; "" if nothing is missing.
    """

    name: str
    convention: str
    scorer: Scorer
    gives: tuple[str, ...]
    needs: Callable[[], str] = lambda: ""

    def scores(
        self, references: Sequence[str | Sequence[str]], predictions: Sequence[str]
    ) -> list[Score]:
        """Scores of predictions; none without examples, or if packages are missing.

        Args:
            references: of each example, one text or several.
            predictions: one text per example.

        Raises:
            ValueError: the numbers of references and predictions differ.
            DataError: an example without a reference.
        """
        if len(references) != len(predictions):
            raise ValueError(f"{len(references)} references but {len(predictions)} predictions")
        if not predictions or self.needs():
            return []
        texts = [(one,) if isinstance(one, str) else tuple(one) for one in references]
        if () in texts:
            raise DataError(
                f"example {texts.index(())} has no reference for {self.name}; give each one or more"
            )
        return self.scorer(texts, predictions)

    def __call__(
        self, references: Sequence[str | Sequence[str]], predictions: Sequence[str]
    ) -> dict[str, float]:
        """The scores' values by name, as seqio's metric functions return them."""
        return {score.name: score.value for score in self.scores(references, predictions)}

    def only(self, name: str) -> Metric:
        """This metric, limited to one of its scores."""
        pick = lambda *texts: [score for score in self.scorer(*texts) if score.name == name]
        return dataclasses.replace(self, name=name, scorer=pick, gives=(name,))


def mean_score(name: str, values: Sequence[float] | np.ndarray, remark: str = "") -> list[Score]:
    """A mean over examples; None without examples."""
    return ratio_score(name, values, np.ones(len(values)), remark=remark)


def ratio_score(
    name: str,
    above_E: Sequence[float] | np.ndarray,
    below_E: Sequence[float] | np.ndarray,
    scale: float = 1.0,
    remark: str = "",
) -> list[Score]:
    """``scale`` times one sum over another, NaN where that is 0; None without examples."""
    if not len(above_E):
        return []
    parts_Ex2 = np.stack([np.asarray(above_E, np.float64), np.asarray(below_E, np.float64)], 1)

    def ratio(sums_Nx2: np.ndarray) -> np.ndarray:
        above, below = sums_Nx2.T
        with np.errstate(invalid="ignore"):
            return scale * above / np.where(below > 0, below, np.nan)

    return [Score(name, parts_Ex2, ratio, remark)]


def best_of(
    score: Callable[[str, str], float],
    references: Sequence[Sequence[str]],
    predictions: Sequence[str],
) -> list[float]:
    """Each example's best score of (reference, prediction) over its references."""
    return [
        max(score(one, text) for one in texts)
        for texts, text in zip(references, predictions, strict=True)
    ]


def bits_per_byte(nats: Sums, text_bytes: Sums) -> Sums:
    """Negative log-probability of texts, EOS included, in bits per UTF-8 byte."""
    return nats / text_bytes / math.log(2)
