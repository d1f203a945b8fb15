"""Metrics of generated text against references, from 0 to 100 (bands are in bands, kappa to 1).

Each function takes all references of every example and the predictions, and gives scores; each is
registered with its convention in ``encdec.metrics.metric_registry``.
"""

from __future__ import annotations

import collections
import functools
import math
import re
import string
import unicodedata
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from encdec.errors import DataError
from encdec.metrics.score import Score, best_of, mean_score

References = Sequence[Sequence[str]]
Texts = Sequence[str]

UNANSWERABLE = "unanswerable"
ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)
SQUAD_PARTS = ("", "has_answer_", "no_answer_")
ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")
NUMBER = re.compile(r"\d+(?:\.\d+)?")
BANDS = 9.0


def exact_match(references: References, predictions: Texts) -> list[Score]:
    """Share of predictions equal to a reference, ignoring white space at the ends."""
    equal = lambda one, text: 100.0 * (one.strip() == text.strip())
    return mean_score("exact_match", best_of(equal, references, predictions))


def squad_normal_form(text: str) -> str:
    """Lower case without punctuation, articles and extra space, as SQuAD's official script."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def squad_v2(references: References, predictions: Texts) -> list[Score]:
    """SQuAD 2.0's exact match and F1, of all questions and of those with and without an answer.

    As the official evaluator defines them (Rajpurkar et al. 2018): references that are empty after
    normalization are left out, a question without any is unanswerable, and its only right answer
    is an empty prediction. The text "unanswerable" stands for the empty one, on both sides.
    """
    wanted = [_gold_answers(texts) for texts in references]
    found = [_unless_unanswerable(text) for text in predictions]
    answerable = np.array([texts != [""] for texts in wanted], bool)
    exact = lambda one, text: float(squad_normal_form(one) == squad_normal_form(text))
    scores = []
    for name, score in (("em", exact), ("f1", _words_f1)):
        values = 100 * np.array(best_of(score, wanted, found), np.float64)
        everyone = np.ones_like(answerable)
        for part, of_it in zip(SQUAD_PARTS, (everyone, answerable, ~answerable)):
            scores += mean_score(f"{part}{name}", values[of_it])
    return scores


def _words_f1(wanted: str, found: str) -> float:
    words, guesses = squad_normal_form(wanted).split(), squad_normal_form(found).split()
    if not words or not guesses:
        return float(words == guesses)
    common = sum((collections.Counter(words) & collections.Counter(guesses)).values())
    return 2 * common / (len(words) + len(guesses))


def _unless_unanswerable(text: str) -> str:
    return "" if squad_normal_form(text) == UNANSWERABLE else text


def _gold_answers(texts: Texts) -> list[str]:
    kept = [text for text in map(_unless_unanswerable, texts) if squad_normal_form(text)]
    return kept or [""]


def rouge(references: References, predictions: Texts) -> list[Score]:
    """Rouge-1, -2, -L and -Lsum's F1 without stemming, each the best over the references.

    Rouge-Lsum takes lines as sentences, as rouge-score does.
    """
    return _rouge(references, predictions, "")


def rouge_stemmed(references: References, predictions: Texts) -> list[Score]:
    """The same with words of more than three letters reduced by Porter's stemmer."""
    return _rouge(references, predictions, "_stemmed", use_stemmer=True)


def rouge_unicode(references: References, predictions: Texts) -> list[Score]:
    """The same over ``unicode_words``, for text in any script."""
    return _rouge(references, predictions, "_unicode", tokenizer=UnicodeTokenizer)


# Written without spaces, so that a word cannot be told: each character with its marks is one.
UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\U0001b000-\U0001b16f\U00020000-\U000323af]"
)


def unicode_words(text: str) -> list[str]:
    """Words of any script: runs of letters, marks and digits, in case-folded NFKC.

    Of scripts written without spaces (Han, kana, Thai, Lao, Khmer, Burmese) each character, with
    the marks on it, is a word.
    """
    words: list[str] = []
    last = ""  # the last character's kind: in a word, a "single" one, or neither
    for character in unicodedata.normalize("NFKC", text).casefold():
        kind, single = unicodedata.category(character)[0], UNSPACED.match(character)
        if kind not in "LMN":
            last = ""
        elif last and (kind == "M" or last == "word" and not single):
            words[-1] += character
        else:
            words.append(character)
            last = "single" if single else "word"
    return words


class UnicodeTokenizer:
    """``unicode_words`` under the name that rouge-score calls."""

    tokenize = staticmethod(unicode_words)


@functools.cache
def _rouge_scorer(use_stemmer: bool = False, tokenizer: Any = None) -> Any:
    from rouge_score import rouge_scorer

    return rouge_scorer.RougeScorer(list(ROUGE), use_stemmer=use_stemmer, tokenizer=tokenizer)


def _rouge(references: References, predictions: Texts, suffix: str, **options: Any) -> list[Score]:
    scorer = _rouge_scorer(**options)
    remark = "" if "tokenizer" in options else _letters_not_read(references, f"rouge{suffix}")
    if remark:
        warnings.warn(remark, stacklevel=3)
    found = [
        [scorer.score(text, prediction) for text in texts]
        for texts, prediction in zip(references, predictions, strict=True)
    ]
    return [
        score
        for name in ROUGE
        for score in mean_score(
            f"{name}{suffix}",
            [100 * max(one[name].fmeasure for one in each) for each in found],
            remark,
        )
    ]


def _letters_not_read(references: References, name: str) -> str:
    """A remark on letters that rouge-score's tokenizer ignores; "" if the references have none."""
    read = re.compile("[a-z0-9]")
    foreign = lambda text: any(c.isalnum() and not c.isascii() for c in text)
    other = [texts for texts in references if any(map(foreign, texts))]
    if not other:
        return ""
    zero, nothing = "", sum(not any(read.search(x.lower()) for x in texts) for texts in other)
    if nothing:
        zero = f"; {nothing:,} have no other words, so that even an identical answer scores 0"
    return (
        f"{name} reads only the letters a to z and digits (rouge-score's tokenizer), and "
        f"{len(other):,} of {len(references):,} references have other letters{zero}. The metric "
        "rouge_unicode reads the words of every script"
    )


def _bleu_counts(references: References, predictions: Texts) -> np.ndarray:
    """Per example [matches of 1- to 4-grams, n-grams, length, closest, shortest reference].

    Words as white space parts them; an n-gram counts as often as the reference that has it most.
    """
    import sacrebleu

    scorer = sacrebleu.BLEU(tokenize="none", effective_order=True, force=True)
    counts = []
    for texts, prediction in zip(references, predictions, strict=True):
        row = scorer.sentence_score(prediction, list(texts))
        shortest = min(len(text.split()) for text in texts)
        counts.append([*row.counts, *row.totals, row.sys_len, row.ref_len, shortest])
    return np.array(counts, np.float64)


def bleu(references: References, predictions: Texts) -> list[Score]:
    """Corpus BLEU-4 over words as white space parts them: sacrebleu's with tokenize none."""
    counts_ExK = _bleu_counts(references, predictions)[:, :10]
    return [Score("bleu", counts_ExK, bleu_of_sums, _few_words(references))]


def _few_words(references: References) -> str:
    """A remark that few references have four words in a row; "" if most have."""
    short = sum(all(len(text.split()) < 4 for text in texts) for texts in references)
    if 2 * short < len(references):
        return ""
    return (
        f"bleu counts sequences of up to four words separated by white space, and {short:,} of "
        f"{len(references):,} references have fewer than four (one in scripts without spaces), so "
        "that even an identical answer scores 0 if all are so short. "
        "The metric chrf reads characters"
    )


def bleu_of_sums(sums_Nx10: np.ndarray) -> np.ndarray:
    """BLEU from matches and n-grams of the orders 1 to 4, and the lengths of answer and reference.

    Papineni et al. 2002, smoothed as NIST's mteval does: the first order without a match counts as
    half a match, the next as a quarter, and so on.
    """
    matches_Nx4, ngrams_Nx4 = sums_Nx10[:, :4], sums_Nx10[:, 4:8]
    with np.errstate(divide="ignore", invalid="ignore"):
        none = (matches_Nx4 == 0) & (ngrams_Nx4 > 0)
        smoothed = np.where(none, 0.5 ** np.cumsum(none, axis=1), matches_Nx4)
        score_N = _bleu(smoothed / ngrams_Nx4, sums_Nx10[:, 8:])
    return np.where(matches_Nx4.any(axis=1) & ngrams_Nx4.all(axis=1), score_N, 0.0)


def bleu_codexglue(references: References, predictions: Texts) -> list[Score]:
    """Corpus BLEU-4 as CodeXGLUE's evaluators of translation and refinement compute it.

    One is added to the matches and to the n-grams of every order (Lin and Och 2004), and of
    several references the shortest gives the length; answers without a word at all have 0.
    """
    counts_ExK = np.delete(_bleu_counts(references, predictions), 9, axis=1)

    def of_sums(sums_Nx10: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore"):
            return _bleu((sums_Nx10[:, :4] + 1) / (sums_Nx10[:, 4:8] + 1), sums_Nx10[:, 8:])

    return [Score("bleu_codexglue", counts_ExK, of_sums)]


def _bleu(precisions_Nx4: np.ndarray, lengths_Nx2: np.ndarray) -> np.ndarray:
    """The geometric mean, times the brevity penalty of lengths of answer and reference."""
    length_N, reference_N = lengths_Nx2.T
    brevity_N = np.minimum(0, 1 - reference_N / np.where(length_N > 0, length_N, np.nan))
    score_N = 100 * np.exp(np.log(precisions_Nx4).mean(axis=1) + brevity_N)
    return np.where(length_N > 0, score_N, 0.0)


def chrf(references: References, predictions: Texts) -> list[Score]:
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


def bands(references: References, predictions: Texts) -> list[Score]:
    """IELTS bands: mean absolute error and quadratic weighted kappa over half bands.

    A prediction without a number from 0 to 9 is 9 bands off; for kappa it is the band farthest
    from the right one. ``band_missing`` is their share.
    """
    wanted = np.array([_gold_band(texts[0]) for texts in references])
    numbers = [_band(text) for text in predictions]
    missing = np.array([number is None for number in numbers], bool)
    farthest = np.where(wanted > BANDS / 2, 0.0, BANDS)
    given = np.where(missing, farthest, np.array(numbers, np.float64))
    error = np.where(missing, BANDS, np.abs(given - wanted))
    gold_E, found_E = np.round(2 * wanted).astype(int), np.round(2 * given).astype(int)
    scores = mean_score("band_error", error)
    scores += mean_score("band_missing", 100.0 * missing)
    return [*scores, Score("kappa", kappa_parts(gold_E, found_E), kappa_of_sums)]


def _gold_band(text: str) -> float:
    try:
        band = float(text)
    except ValueError:
        band = math.nan
    if not 0 <= band <= BANDS:
        raise DataError(
            f"the metric bands cannot use the reference {text[:40]!r}; expected a number from 0 to "
            "9"
        )
    return band


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
    # Multiplied by the square of the count: whole numbers, so that 0 is exact.
    expected = count * (first_squares + second_squares) - 2 * first * second
    with np.errstate(divide="ignore", invalid="ignore"):
        return 1 - count * differences / np.where(expected > 0, expected, np.nan)
