"""Scores of predictions, example by example where the metric is a mean, else of the whole set.

Every score is a function of sums over the examples, so that one bootstrap and one randomisation
test serve them all. Shares and BLEU go from 0 to 100; bands are in bands, kappa from -1 to 1.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from encdec.data import metrics
from encdec.data.paper_tasks import UNANSWERABLE
from encdec.evaluation import syntax
from encdec.evaluation.intervals import Interval, ScoreOfSums, bootstrap

ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")
NUMBER = re.compile(r"\d+(?:\.\d+)?")
BANDS = 9.0


@dataclasses.dataclass(frozen=True)
class Score:
    """One named score of a set of predictions.

    Attributes:
        name: for example ``f1`` or ``has_answer_f1``.
        parts_ExK: what each of its examples adds to the sums: fewer examples than all for SQuAD's
            two halves.
        of_sums: the score of each row of sums.
    """

    name: str
    parts_ExK: np.ndarray
    of_sums: ScoreOfSums

    @property
    def count(self) -> int:
        """Examples it is taken over."""
        return len(self.parts_ExK)

    def statistic(self, indices: np.ndarray) -> float:
        """The score of the examples at these places, which may return."""
        return float(self.of_sums(self.parts_ExK[indices].sum(axis=0)[None])[0])

    def interval(self, resamples: int) -> Interval:
        return bootstrap(self.statistic, self.count, resamples=resamples)


Scorer = Callable[[Sequence[Sequence[str]], Sequence[str]], list[Score]]


def mean_score(name: str, values: Sequence[float]) -> list[Score]:
    """A mean over examples; no score of no example."""
    return ratio_score(name, values, np.ones(len(values)))


def ratio_score(
    name: str, above_E: Sequence[float], below_E: Sequence[float], scale: float = 1.0
) -> list[Score]:
    """``scale`` times one sum over another, NaN where that is 0; no score of no example."""
    if not len(above_E):
        return []
    parts_Ex2 = np.stack([np.asarray(above_E, np.float64), np.asarray(below_E, np.float64)], 1)

    def ratio(sums_Nx2: np.ndarray) -> np.ndarray:
        above, below = sums_Nx2.T
        with np.errstate(invalid="ignore"):
            return scale * above / np.where(below > 0, below, np.nan)

    return [Score(name, parts_Ex2, ratio)]


def squad_v2(references: Sequence[Sequence[str]], predictions: Sequence[str]) -> list[Score]:
    """SQuAD 2.0's exact match and F1, of all questions and of those with and without an answer.

    As the official evaluator defines them (Rajpurkar et al. 2018): references that are empty in
    normal form are left out, a question without any is unanswerable, and there only an empty
    prediction is right. The text "unanswerable" stands for the empty one, on both sides.
    """
    wanted = [_gold_answers(texts) for texts in references]
    found = [_unless_unanswerable(text) for text in predictions]
    pairs = [metrics.squad([texts], [text]) for texts, text in zip(wanted, found, strict=True)]
    answerable = np.array([texts != [""] for texts in wanted], bool)
    scores = []
    for name in ("em", "f1"):
        values = np.array([pair[name] for pair in pairs], np.float64)
        scores += mean_score(name, values)
        scores += mean_score(f"has_answer_{name}", values[answerable])
        scores += mean_score(f"no_answer_{name}", values[~answerable])
    return scores


def _unless_unanswerable(text: str) -> str:
    return "" if metrics.squad_normal_form(text) == UNANSWERABLE else text


def _gold_answers(texts: Sequence[str]) -> list[str]:
    kept = [text for text in map(_unless_unanswerable, texts) if metrics.squad_normal_form(text)]
    return kept or [""]


@functools.cache
def _rouge_scorer() -> Any:
    from rouge_score import rouge_scorer

    return rouge_scorer.RougeScorer(list(ROUGE), use_stemmer=False)


def rouge(references: Sequence[Sequence[str]], predictions: Sequence[str]) -> list[Score]:
    """Rouge-1, -2, -L and -Lsum's F1 without stemming, each the best over the references.

    Rouge-Lsum takes lines as sentences, as rouge-score does.
    """
    found = [
        [_rouge_scorer().score(text, prediction) for text in texts]
        for texts, prediction in zip(references, predictions, strict=True)
    ]
    return [
        score
        for name in ROUGE
        for score in mean_score(
            name, [100 * max(one[name].fmeasure for one in each) for each in found]
        )
    ]


def bleu(references: Sequence[Sequence[str]], predictions: Sequence[str]) -> list[Score]:
    """Corpus BLEU-4 over words as white space parts them (sacrebleu, tokenize none).

    Each example's counts come from sacrebleu, and of all examples the score is its corpus BLEU.
    """
    import sacrebleu

    scorer = sacrebleu.BLEU(tokenize="none", effective_order=True, force=True)
    rows = [
        scorer.sentence_score(prediction, list(texts))
        for texts, prediction in zip(references, predictions, strict=True)
    ]
    counts_ExK = np.array(
        [[*row.counts, *row.totals, row.sys_len, row.ref_len] for row in rows], np.float64
    )
    return [Score("bleu", counts_ExK, bleu_of_sums)] if rows else []


def bleu_of_sums(sums_Nx10: np.ndarray) -> np.ndarray:
    """BLEU of matches and n-grams of the orders 1 to 4, and the lengths of answer and reference.

    Papineni et al. 2002, smoothed as NIST's mteval does: each order without a match counts as half
    a match, the next such as a quarter, and so on.
    """
    matches_Nx4, ngrams_Nx4 = sums_Nx10[:, :4], sums_Nx10[:, 4:8]
    length_N, reference_N = sums_Nx10[:, 8:].T
    with np.errstate(divide="ignore", invalid="ignore"):
        none = (matches_Nx4 == 0) & (ngrams_Nx4 > 0)
        smoothed = np.where(none, 0.5 ** np.cumsum(none, axis=1), matches_Nx4)
        log_N = np.log(smoothed / ngrams_Nx4).mean(axis=1)
        score_N = 100 * np.exp(log_N + np.minimum(0, 1 - reference_N / length_N))
    return np.where(matches_Nx4.any(axis=1) & ngrams_Nx4.all(axis=1), score_N, 0.0)


def chrf(references: Sequence[Sequence[str]], predictions: Sequence[str]) -> list[Score]:
    """chrF2 of each example by sacrebleu (Popović 2015), and its mean: not the corpus chrF."""
    import sacrebleu

    scorer = sacrebleu.CHRF()
    return mean_score(
        "mean_chrf",
        [
            scorer.sentence_score(prediction, list(texts)).score
            for texts, prediction in zip(references, predictions, strict=True)
        ],
    )


def code_syntax(
    language: str, references: Sequence[Sequence[str]], predictions: Sequence[str]
) -> list[Score]:
    """CodeBLEU's syntax match over all examples (``encdec.evaluation.syntax``), 0 to 100.

    Of several references the one that is matched best counts. No score where the grammar is not
    installed: `pip install encdec[code]`.
    """
    if not syntax.can_parse(language):
        return []
    counts = [
        max(
            (syntax.syntax_match(one, text, language) for one in texts),
            key=lambda pair: pair[0] / max(pair[1], 1),
        )
        for texts, text in zip(references, predictions, strict=True)
    ]
    return ratio_score(
        "syntax_match", [matched for matched, _ in counts], [total for _, total in counts], 100
    )


def exact_match(references: Sequence[Sequence[str]], predictions: Sequence[str]) -> list[Score]:
    """Predictions equal to a reference, white space at the ends aside."""
    return mean_score(
        "exact_match",
        [
            metrics.exact_match([texts], [text])["exact_match"]
            for texts, text in zip(references, predictions, strict=True)
        ],
    )


def bands(references: Sequence[Sequence[str]], predictions: Sequence[str]) -> list[Score]:
    """IELTS bands: mean absolute error and quadratic weighted kappa over half bands.

    A prediction without a number from 0 to 9 is 9 bands off; for kappa it is the band farthest
    from the right one. ``band_missing`` is their share.
    """
    wanted = np.array([float(texts[0]) for texts in references])
    numbers = [_band(text) for text in predictions]
    error = [
        BANDS if number is None else abs(number - gold)
        for number, gold in zip(numbers, wanted, strict=True)
    ]
    given = np.array(
        [
            (0.0 if gold > BANDS / 2 else BANDS) if number is None else number
            for number, gold in zip(numbers, wanted)
        ]
    )
    gold_E, found_E = np.round(2 * wanted).astype(int), np.round(2 * given).astype(int)
    scores = mean_score("band_error", error)
    scores += mean_score("band_missing", [100.0 * (number is None) for number in numbers])
    return [*scores, Score("kappa", kappa_parts(gold_E, found_E), kappa_of_sums)] if error else []


def _band(text: str) -> float | None:
    number = NUMBER.search(text)
    return float(number[0]) if number and float(number[0]) <= BANDS else None


def kappa_parts(first_E: np.ndarray, second_E: np.ndarray) -> np.ndarray:
    """What each pair of two raters' whole numbers adds to the sums of ``kappa_of_sums``."""
    first, second = np.asarray(first_E, np.float64), np.asarray(second_E, np.float64)
    return np.stack(
        [np.ones_like(first), first, second, first**2, second**2, (first - second) ** 2], axis=1
    )


def kappa_of_sums(sums_Nx6: np.ndarray) -> np.ndarray:
    """Cohen's kappa of two raters' whole numbers, disagreement weighted by its square.

    Cohen (1968): one minus the mean squared difference over what it would be were the two raters
    independent: both variances and the squared difference of the means. NaN where both always give
    one and the same number.
    """
    count, first, second, first_squares, second_squares, differences = sums_Nx6.T
    # Times the count's square; whole numbers, so that 0 is 0.
    expected = count * (first_squares + second_squares) - 2 * first * second
    with np.errstate(divide="ignore", invalid="ignore"):
        return 1 - count * differences / np.where(expected > 0, expected, np.nan)


_CODE: tuple[Scorer, ...] = (bleu, chrf, exact_match, rouge)
SCORERS: Mapping[str, tuple[Scorer, ...]] = {
    "squad_v2": (squad_v2, rouge),
    "xsum": (rouge,),
    "dialogsum": (rouge,),
    "ielts_feedback": (rouge,),
    "ielts_band": (bands, exact_match),
    "code_java2cs": (*_CODE, functools.partial(code_syntax, "c_sharp")),
    "code_refine_small": (*_CODE, functools.partial(code_syntax, "java")),
    "code_refine_medium": (*_CODE, functools.partial(code_syntax, "java")),
}
DEFAULT_SCORERS: tuple[Scorer, ...] = (exact_match, rouge)


def score_task(
    task: str, references: Sequence[Sequence[str]], predictions: Sequence[str]
) -> list[Score]:
    """All scores of a task: its own, or exact match and Rouge for a task of no kind of its own."""
    return [
        score
        for scorer in SCORERS.get(task, DEFAULT_SCORERS)
        for score in scorer(references, predictions)
    ]


def not_measured(task: str) -> list[str]:
    """Scores of a task that this installation cannot give, each with what to install."""
    languages = [
        scorer.args[0]
        for scorer in SCORERS.get(task, ())
        if isinstance(scorer, functools.partial) and scorer.func is code_syntax
    ]
    return [
        f"syntax_match of {language}: pip install encdec[code]"
        for language in languages
        if not syntax.can_parse(language)
    ]
