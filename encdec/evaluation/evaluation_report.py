"""Reports of evaluations, as JSON for programs and Markdown for people."""

from __future__ import annotations

import itertools
import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from encdec.errors import DataError
from encdec.evaluation.predictions import Prediction
from encdec.files import write_json, write_text
from encdec.markup import markdown_table
from encdec.metrics.intervals import Interval, compare
from encdec.metrics.metric_registry import metric_named
from encdec.metrics.score import Score
from encdec.storage import absolute, as_path

REPORT_FILE = "report.json"


def task_report(
    scores: Sequence[Score], found: Mapping[int, Prediction], resamples: int
) -> dict[str, Any]:
    """Plain values of one task: scores with intervals, and counts of its examples."""
    made = list(found.values())
    report: dict[str, Any] = {
        "examples": len(made),
        "sources_cut": sum(one.cut for one in made),
        "sources_skipped": sum(one.finish == "skipped" for one in made),
        "answers_without_end": sum(one.finish == "length" for one in made),
        "empty_answers": sum(not one.text for one in made),
        "mean_answer_tokens": sum(one.tokens for one in made) / max(len(made), 1),
        "scores": {},
    }
    for score in scores:
        report["scores"][score.name] = _bounds(score.interval(resamples)) | {
            "examples": score.count
        }
    report["remarks"] = sorted({score.remark for score in scores if score.remark})
    return report


def shuffled_report(
    shuffled: Sequence[Score], paired: Sequence[Sequence[Score]], resamples: int
) -> dict[str, Any]:
    """Each score with shuffled sources, and its paired difference from the plain score.

    ``paired`` are the scores of both passes, plain first, on the examples that both have: the
    shuffled one skips other examples than the plain one. Without any there is no difference.
    """
    before, after = ({score.name: score for score in side} for side in paired)
    report = {}
    for score in shuffled:
        difference = Interval(math.nan, math.nan)
        first, second = (side.get(score.name) for side in (before, after))
        if first and second and first.count == second.count:
            difference = compare(
                first.statistic, second.statistic, first.count, resamples=resamples
            )
        report[score.name] = _bounds(score.interval(resamples)) | {
            "examples": score.count,
            "difference": _bounds(difference),
        }
    return report


def _bounds(interval: Interval) -> dict[str, float | None]:
    return {name: _plain(getattr(interval, name)) for name in ("value", "low", "high")}


def _plain(value: float) -> float | None:
    return round(value, 6) if math.isfinite(value) else None


def write_report(directory: pathlib.Path, report: Mapping[str, Any]) -> None:
    """Writes report.json and report.md, each atomically."""
    write_json(directory / REPORT_FILE, report)
    write_text(directory / "report.md", markdown(report))


def read_report(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The report of ``encdec evaluate --out=DIRECTORY``.

    Raises:
        DataError: there is none.
    """
    path = as_path(directory) / REPORT_FILE
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read ({error}); give a directory that `encdec evaluate "
            "--out=` finished"
        ) from None


def check_distinct(evaluations: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    """Raises if evaluations of one model would count one training run as two seeds.

    Args:
        evaluations: (directory, report).

    Raises:
        DataError: two evaluations of one task are the same directory, the same run, or two runs
            with equal seeds back to the first, which are one experiment made twice.
    """
    for (first, one), (second, other) in itertools.combinations(evaluations, 2):
        if not (tasks := sorted(one["tasks"].keys() & other["tasks"].keys())):
            continue
        same = lambda name, one=one, other=other: (
            one["model"].get(name) is not None and one["model"][name] == other["model"].get(name)
        )
        model = one["model"]
        if absolute(first) == absolute(second):
            reason = "are the same directory"
        elif same("run"):
            reason = f"evaluate the same run, {model['checkpoint']}"
        elif same("seeds"):
            reason = (
                f"evaluate {model['checkpoint']} and {other['model']['checkpoint']}, trained "
                f"from the same seeds ({', '.join(map(str, model['seeds']))})"
            )
        else:
            continue
        raise DataError(
            f"{first} and {second} both have {tasks[0]} and {reason}; they are not "
            "two seeds of one model: leave one out, or give them two names"
        )


def markdown(report: Mapping[str, Any]) -> str:
    """The report as a page; intervals are of 95 % over examples."""
    model = report["model"]
    facts = (
        model["architecture"].replace("_", "-"),
        f"{model['parameters']:,} parameters",
        model["origin"],
        f"step {model['step']:,}" if model["step"] else "",
    )
    scores = [
        (task, name, shown(score["value"], name), _range(score, name), f"{score['examples']:,}")
        for task, part in report["tasks"].items()
        for name, score in part["scores"].items()
    ]
    counts = ("sources_cut", "sources_skipped", "answers_without_end", "empty_answers")
    answers = [
        (task, *(f"{part[name]:,}" for name in counts), f"{part['mean_answer_tokens']:.1f}")
        for task, part in report["tasks"].items()
    ]
    lines = [
        f"# Evaluation of {model['name']}",
        "",
        f"{', '.join(filter(None, facts))}; {report['decoding']['kind']} decoding.",
        "",
        *markdown_table(("task", "score", "value", "95 % interval", "examples"), scores, left=2),
        "",
        *markdown_table(
            ("task", "sources cut", "skipped", "answers without end", "empty", "mean tokens"),
            answers,
        ),
    ]
    lines += [
        f"\nEmpty sources of {task}, skipped with an empty answer: {part['sources_empty']:,}"
        for task, part in report["tasks"].items()
        if part.get("sources_empty")
    ]
    lines += [
        f"\nNot measured on {task}: {one}"
        for task, part in report["tasks"].items()
        for one in part.get("not_measured", ())
    ]
    lines += [
        f"\nOn {task}: {one}." for task, part in report["tasks"].items() for one in part["remarks"]
    ]
    lines += _shuffled_table(report["tasks"])
    lines += ["", "How the scores are computed:", ""]
    names = dict.fromkeys(name for part in report["tasks"].values() for name in part["metrics"])
    lines += [f"- {name}: {metric_named(name).convention}" for name in names]
    judge = report["judge"]
    lines += [
        "",
        "No judge was asked."
        if judge is None
        else f"Judge: {judge['model']} at {judge['endpoint']}; prompt in report.json. Opinions "
        "missing (left out of the mean): "
        + ", ".join(f"{task} {part['judge_missing']:,}" for task, part in report["tasks"].items()),
    ]
    return "\n".join(lines) + "\n"


def _shuffled_table(tasks: Mapping[str, Any]) -> list[str]:
    """Table of scores with shuffled sources; empty if they were not requested."""
    passes = {
        task: part["shuffled_sources"] for task, part in tasks.items() if "shuffled_sources" in part
    }
    if not passes:
        return []
    rows = []
    for task, part in passes.items():
        for name, score in part["scores"].items():
            own, other = shown(tasks[task]["scores"][name]["value"], name), score["difference"]
            values = (
                *(shown(score["value"], name), _range(score, name)),
                *(shown(other["value"], name), _range(other, name)),
            )
            rows.append((task, name, own, *values))
    head = ("task", "score", "own", "shuffled", "95 % interval", "difference", "95 % interval")
    lines = [
        "",
        "The same references, each with the source of another example: a model that uses its "
        "source loses most of its score, a model that ignores it does not. Differences are paired "
        "by example.",
        "",
        *markdown_table(head, rows, left=2),
    ]
    lines += [
        f"\nOf {task} {part['sources_kept']:,} examples kept a source of the same text, since more "
        "than half of them have it."
        for task, part in passes.items()
        if part["sources_kept"]
    ]
    return lines


def _range(score: Mapping[str, Any], name: str) -> str:
    return f"{shown(score['low'], name)} to {shown(score['high'], name)}"


def shown(value: float | None, score: str, sign: str = "") -> str:
    """A value of a score, or a difference: two decimals, or a dash for a missing value.

    Models differ by thousandths of a bit per byte: of that score it is three significant digits.
    """
    if value is None:
        return "–"
    return f"{value:{sign}{'#.3g' if score == 'bits_per_byte' else '.2f'}}"
