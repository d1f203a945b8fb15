"""All metrics by name, each with its convention; a task, a command or a file names them.

To add one, write a function of (references, predictions) that gives scores and enter it below; or,
from a module of your own, ``register(Metric("mine", "how it is computed", function, ("mine",)))``.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from encdec.errors import ConfigError
from encdec.fields import did_you_mean
from encdec.metrics import syntax, text_metrics
from encdec.metrics.score import Metric, Score

# Metrics of plain files and of tasks that name none.
DEFAULT = ("exact_match", "rouge")

_BEST = "F1 of the best reference, mean over examples (Lin 2004, package rouge-score)"
_ASCII = "words of a to z and digits, lower case"


def _rouge_names(suffix: str = "") -> tuple[str, ...]:
    return tuple(name + suffix for name in text_metrics.ROUGE)


def _syntax(language: str) -> Metric:
    return Metric(
        f"syntax_{language}",
        "CodeBLEU's syntax match: subtrees of the reference found in the answer, over all "
        "examples (Ren et al. 2020, section 3.2)",
        functools.partial(syntax.code_syntax, language),
        ("syntax_match",),
        functools.partial(syntax.missing_grammar, language),
    )


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(
            "exact_match",
            "share equal to a reference except for white space at the ends, as CodeXGLUE's "
            "evaluators",
            text_metrics.exact_match,
            ("exact_match",),
        ),
        Metric(
            "squad_v2",
            "SQuAD 2.0's official evaluator (Rajpurkar et al. 2018); 'unanswerable': no answer",
            text_metrics.squad_v2,
            tuple(f"{part}{name}" for name in ("em", "f1") for part in text_metrics.SQUAD_PARTS),
        ),
        Metric(
            "rouge",
            f"{_BEST}; {_ASCII}; no stemming; Lsum takes lines as sentences. The convention of "
            "this project's tables; the paper (arXiv 2501.16273) states none",
            text_metrics.rouge,
            _rouge_names(),
        ),
        Metric(
            "rouge_stemmed",
            f"{_BEST}; {_ASCII}; Porter's stemmer. The convention of DialogSum's baseline "
            "script, and of most published summarization",
            text_metrics.rouge_stemmed,
            _rouge_names("_stemmed"),
        ),
        Metric(
            "rouge_unicode",
            f"{_BEST}; words of every script, of scripts without spaces each character, case "
            "folded; no stemming",
            text_metrics.rouge_unicode,
            _rouge_names("_unicode"),
        ),
        Metric(
            "bleu",
            "corpus BLEU-4 over words separated by white space, mteval's smoothing: sacrebleu with "
            "tokenize none",
            text_metrics.bleu,
            ("bleu",),
        ),
        Metric(
            "bleu_codexglue",
            "corpus BLEU-4 over words separated by white space, one added to the counts of every "
            "order: CodeXGLUE's evaluators of translation and refinement",
            text_metrics.bleu_codexglue,
            ("bleu_codexglue",),
        ),
        Metric(
            "chrf",
            "chrF2 of each example by sacrebleu, mean over examples: not the corpus chrF",
            text_metrics.chrf,
            ("mean_chrf",),
        ),
        _syntax("java"),
        _syntax("c_sharp"),
        Metric(
            "bands",
            "IELTS bands: mean absolute error, 9 for an answer without a number from 0 to 9; "
            "quadratic weighted kappa over half bands (Cohen 1968)",
            text_metrics.bands,
            ("band_error", "band_missing", "kappa"),
        ),
    )
}


def register(metric: Metric) -> Metric:
    """Registers a metric, so that tasks and ``--metrics`` may name it; returns it.

    Raises:
        ConfigError: another metric has its name.
    """
    if METRICS.setdefault(metric.name, metric) is not metric:
        raise ConfigError(
            f"a metric {metric.name!r} is already registered; give yours another name"
        )
    return metric


def metric_named(name: str) -> Metric:
    """A metric by its own name, or by that of one of its scores, limited to that score.

    Raises:
        ConfigError: there is none, or several metrics have a score of that name.
    """
    if name in METRICS:
        return METRICS[name]
    giving = [metric for metric in METRICS.values() if name in metric.gives]
    if len(giving) == 1:
        return giving[0].only(name)
    if giving:
        names = ", ".join(metric.name for metric in giving)
        raise ConfigError(f"{name!r} is a score of several metrics; name one of {names}")
    scores = [score for metric in METRICS.values() for score in metric.gives]
    hint = did_you_mean(name, [*METRICS, *scores])
    raise ConfigError(f"unknown metric {name!r}; known: {', '.join(METRICS)}{hint}")


def score_texts(
    metrics: Sequence[str], references: Sequence[Sequence[str]], predictions: Sequence[str]
) -> list[Score]:
    """All scores of the named metrics; a score that two of them give is computed once.

    Raises:
        ConfigError: no such metric.
    """
    found = {
        score.name: score
        for name in metrics or DEFAULT
        for score in metric_named(name).scores(references, predictions)
    }
    return list(found.values())


def not_measured(metrics: Sequence[str]) -> list[str]:
    """Metrics that this installation cannot compute, each with what to install."""
    return [needs for name in metrics or DEFAULT if (needs := metric_named(name).needs())]
