"""A checkpoint's answers to examples, scored and reported: what ``encdec evaluate`` does.

Answers and likelihoods are stored as they are made, so that a call resumes where another stopped.
"""

from __future__ import annotations

import hashlib
import os
import pathlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from encdec.buckets import is_address
from encdec.errors import ConfigError
from encdec.evaluation.evaluation_report import shuffled_report, task_report, write_report
from encdec.evaluation.evaluation_settings import EvaluationSettings
from encdec.evaluation.examples import Example, Examples, load_examples, with_shuffled_sources
from encdec.evaluation.judge import CACHE, Judge, endpoint, local_model
from encdec.evaluation.likelihood import (
    Likelihood,
    LikelihoodFiles,
    LikelihoodModel,
    likelihood_scores,
    measure,
)
from encdec.evaluation.load_models import load_models
from encdec.evaluation.predictions import (
    Prediction,
    PredictionFiles,
    UnreadableSources,
    check_sources,
    check_vocabulary,
    open_windows,
    predict,
)
from encdec.inference.generation_settings import check_draft
from encdec.inference.generator import TextGenerator
from encdec.inference.progress import ProgressBar
from encdec.logs import logger
from encdec.metrics.metric_registry import not_measured, score_texts
from encdec.metrics.score import Score, mean_score
from encdec.storage import as_path, content_of

_LOG = logger(__name__)

NAMED = 10  # examples that a line on standard error lists
SHUFFLED = "shuffled_sources"  # folder, in the task's


def evaluate(
    settings: EvaluationSettings, tasks: Sequence[Examples] | None = None
) -> dict[str, Any] | None:
    """Answers the unanswered examples, scores all answers, and writes report.json and report.md.

    Args:
        settings: of the evaluation.
        tasks: examples instead of those that the settings name.

    Returns:
        The report, plain values; None where other processes (``settings.shards``) are not done.

    Raises:
        ConfigError: the output directory has other settings, or a metric is unknown.
        DataError: a task without data, or sources that are too long and refused.
        CheckpointError: no trained model there.
    """
    check_draft(settings.draft, settings.generation)
    _check_out(settings.out)
    tasks = load_examples(settings) if tasks is None else tasks
    generator, reader, model = load_models(
        settings.checkpoint,
        step=settings.step,
        max_input_tokens=settings.max_input_tokens,
        batch_rows=settings.batch_rows,
        likelihood=settings.likelihood,
        draft=settings.draft,
    )
    out = as_path(settings.out)
    passes: dict[str, list[_Pass]] = {}
    for task in tasks:
        versions = [(task.name, out / task.name, task.examples)]
        if settings.shuffle_sources is not None:
            sources = with_shuffled_sources(task.examples, settings.shuffle_sources)
            versions.append((f"{task.name}, sources shuffled", out / task.name / SHUFFLED, sources))
        passes[task.name] = [_Pass(*one, generator, reader, settings) for one in versions]
    # All of them are checked before the first file is written.
    everything = [one for found in passes.values() for one in found]
    for one in everything:
        one.open(model)
    for one in everything:
        one.make()
    # Only now: processes may finish the tasks in any order, and the last one finds all of them.
    if not all([one.is_whole() for one in everything]):
        return None
    judge = _judge(settings)
    report = {
        "model": model,
        "decoding": _decoding(settings),
        "tasks": {task.name: _report(task, passes[task.name], judge, settings) for task in tasks},
        "resamples": settings.resamples,
        "judge": judge and judge.describe(),
    }
    write_report(out, report)
    return report


def _check_out(out: str) -> None:
    """ConfigError where no directory of predictions can be, or something else's files are."""
    for place in () if is_address(out) else (as_path(out), *as_path(out).parents):
        if place.exists() and not place.is_dir():
            raise ConfigError(f"--out={out}: {place} is a file; give a directory")
    if what := content_of(out):
        raise ConfigError(
            f"--out={out} holds {what}; give a directory of its own, such as {out}/evaluation"
        )


class _Pass:
    """One task's examples, and their answers on disk.

    Args:
        name: shown in messages.
        directory: receives answers and likelihoods.
        examples: all of them.
        generator: answers.
        reader: reads references; None if no likelihoods are measured.
        settings: of the evaluation.

    Raises:
        DataError: sources that are too long and refused, or references that the vocabulary
            cannot express.
    """

    def __init__(
        self,
        name: str,
        directory: pathlib.Path,
        examples: Sequence[Example],
        generator: TextGenerator,
        reader: LikelihoodModel | None,
        settings: EvaluationSettings,
    ):
        self.name, self.examples, self._directory = name, examples, directory
        self._generator, self._reader, self._settings = generator, reader, settings
        self.sources = check_sources(generator.prompts, examples, settings.too_long)
        self.not_writable = check_vocabulary(generator.prompts.vocabulary, examples, name)

    def open(self, model: Mapping[str, Any]) -> None:
        """Claims the directory; raises if it holds answers of other settings."""
        identity = _identity(self._settings, model, self.examples)
        self._answers = PredictionFiles(self._directory, identity, self.examples)
        self._likelihoods = LikelihoodFiles(self._directory)

    def make(self) -> None:
        """Answers and reads the missing examples of this process's share."""
        settings, count = self._settings, len(self.examples)
        how: dict[str, Any] = {
            "too_long": settings.too_long,
            "shard": settings.shard,
            "shards": settings.shards,
        }
        left = lambda done: sum(
            len(window) for window in open_windows(count, done, settings.shard, settings.shards)
        )
        done = set(self._answers.read())
        _introduce(self.name, count, len(done), self.sources, settings.too_long)
        with ProgressBar(self.name, left(done)) as progress:
            predict(
                self._generator,
                self._answers,
                self.examples,
                settings.generation,
                on_batch=progress,
                **how,
            )
        if self._reader:
            read = left(set(self._likelihoods.read()))
            with ProgressBar(f"{self.name}, references", read) as progress:
                measure(self._reader, self._likelihoods, self.examples, on_batch=progress, **how)

    def is_whole(self) -> bool:
        """Whether all examples are done; prints how many are not."""
        self.found: Mapping[int, Prediction] = self._answers.read()
        self._given: Mapping[int, Likelihood] = self._likelihoods.read() if self._reader else {}
        have = min(len(self.found), len(self._given if self._reader else self.found))
        if have < len(self.examples):
            _LOG.info(
                f"{self.name}: {have:,} of {len(self.examples):,} done; the call that completes "
                "them writes the report"
            )
        return have >= len(self.examples)

    @property
    def texts(self) -> list[str]:
        return [self.found[index].text for index in range(len(self.examples))]

    def answer_scores(self, metrics: Sequence[str]) -> list[Score]:
        """Scores of the answers."""
        return score_texts(metrics, [one.references for one in self.examples], self.texts)

    @property
    def measured(self) -> set[int]:
        """Examples whose likelihood was requested and whose source was not skipped."""
        return {index for index, one in self._given.items() if one.tokens}

    def likelihoods(self, indices: Collection[int]) -> list[Score]:
        """Scores of the likelihoods of measured examples."""
        return likelihood_scores([self._given[index] for index in sorted(indices)])


def _report(
    task: Examples, passes: Sequence[_Pass], judge: Judge | None, settings: EvaluationSettings
) -> dict[str, Any]:
    """All of one task's scores, with the judge's and those of shuffled sources if requested."""
    plain, *shuffled = passes
    answers = plain.answer_scores(task.metrics)
    missing = None
    if judge:
        opinions = [one for one in judge.opinions(plain.examples, plain.texts) if one is not None]
        missing = len(plain.texts) - len(opinions)
        judged = mean_score("judge", opinions)
    else:
        judged = []
    report = task_report(
        [*answers, *plain.likelihoods(plain.measured), *judged], plain.found, settings.resamples
    ) | {
        "metrics": list(task.metrics),
        "judge_missing": missing,
        "not_measured": not_measured(task.metrics),
        "sources_empty": len(plain.sources.empty),
        "references_not_writable": plain.not_writable,
    }
    for one in shuffled:
        kept = sum(a.source == b.source for a, b in zip(plain.examples, one.examples))
        theirs = one.answer_scores(task.metrics)
        both = plain.measured & one.measured
        paired = [answers + plain.likelihoods(both), theirs + one.likelihoods(both)]
        report["shuffled_sources"] = {
            "seed": settings.shuffle_sources,
            "sources_kept": kept,
            "scores": shuffled_report(
                theirs + one.likelihoods(one.measured), paired, settings.resamples
            ),
        }
    return report


def _introduce(name: str, count: int, done: int, sources: UnreadableSources, too_long: str) -> None:
    """Prints how much of a task is left to do, and which sources cannot be read whole."""
    _LOG.info(
        f"{name}: {count:,} examples, {done:,} already answered, "
        f"{len(sources.long):,} sources too long ({too_long})"
    )
    if sources.empty:
        more = ", ..." if len(sources.empty) > NAMED else ""
        _LOG.warning(
            f"{name}: the sources of {len(sources.empty):,} examples are empty and skipped, with "
            f"an empty answer: {', '.join(map(str, sources.empty[:NAMED]))}{more}"
        )


def _judge(settings: EvaluationSettings) -> Judge | None:
    address, model = settings.judge_endpoint, settings.judge_model
    if not model:
        return None
    cache = as_path(settings.out) / CACHE
    if address:
        ask = endpoint(address, model, os.environ.get("OPENAI_API_KEY", ""))
        return Judge(address, model, cache, ask)
    return Judge("local", model, cache, local_model(model), attempts=1, workers=1)


def _identity(
    settings: EvaluationSettings, model: Mapping[str, Any], examples: Sequence[Example]
) -> dict[str, Any]:
    digest = hashlib.sha256()
    for example in examples:
        digest.update(repr((example.source, example.references)).encode())
    return {
        "run": model["run"],
        "step": model["step"],
        "too_long": settings.too_long,
        "max_input_tokens": model["max_input_tokens"],
        "examples": digest.hexdigest(),
        **settings.generation.to_dict(),
    }


def _decoding(settings: EvaluationSettings) -> dict[str, Any]:
    generation = settings.generation
    kind = "beam" if generation.beams > 1 else "sampled" if generation.temperature else "greedy"
    return {
        "kind": kind,
        **generation.to_dict(),
        "too_long": settings.too_long,
        "split": settings.split,
        "limit": settings.max_examples,
    }
