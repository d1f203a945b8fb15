"""What an evaluation found, as JSON for programs and Markdown for people."""

from __future__ import annotations

import itertools
import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from encdec.data.appended import write_whole
from encdec.errors import DataError
from encdec.evaluation.predictions import Example, Prediction
from encdec.evaluation.scores import Score

REPORT_FILE = "report.json"


def task_report(
    scores: Sequence[Score],
    examples: Sequence[Example],
    found: Mapping[int, Prediction],
    resamples: int,
) -> dict[str, Any]:
    """Plain values of one task: scores with intervals, and what happened to its examples."""
    made = [found[index] for index in range(len(examples))]
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
        interval = score.interval(resamples)
        report["scores"][score.name] = {
            "value": _plain(interval.value),
            "low": _plain(interval.low),
            "high": _plain(interval.high),
            "examples": score.count,
        }
    return report


def _plain(value: float) -> float | None:
    return round(value, 6) if math.isfinite(value) else None


def write_report(directory: pathlib.Path, report: Mapping[str, Any]) -> None:
    """report.json and report.md, each whole or not at all."""
    for name, text in (
        (REPORT_FILE, json.dumps(report, indent=2) + "\n"),
        ("report.md", markdown(report)),
    ):
        write_whole(directory / name, text)


def read_report(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The report of ``encdec evaluate --out=DIRECTORY``.

    Raises:
        DataError: there is none.
    """
    path = pathlib.Path(directory) / REPORT_FILE
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read ({error}); give a directory that `encdec evaluate "
            "--out=` finished"
        ) from None


def check_distinct(evaluations: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    """Refuses evaluations of one model that would count one training as two seeds.

    Args:
        evaluations: (directory, report).

    Raises:
        DataError: two of one task are the same directory, of the same run, or of two runs with
            equal seeds all the way back, which are one experiment made twice.
    """
    for (first, one), (second, other) in itertools.combinations(evaluations, 2):
        if not (tasks := sorted(one["tasks"].keys() & other["tasks"].keys())):
            continue
        same = lambda name, one=one, other=other: (
            one["model"].get(name) is not None and one["model"][name] == other["model"].get(name)
        )
        model = one["model"]
        if pathlib.Path(first).resolve() == pathlib.Path(second).resolve():
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
            "two seeds of one model: leave one of them out, or give them two names"
        )


def markdown(report: Mapping[str, Any]) -> str:
    """The report as a page; intervals are of 95 % over examples."""
    model = report["model"]
    lines = [
        "# Evaluation",
        "",
        f"{model['name']} ({model['architecture']}, {model['parameters']:,} parameters), step "
        f"{model['step']:,}, {report['decoding']['kind']} decoding.",
        "",
        "| task | score | value | 95 % interval | examples |",
        "|---|---|---:|---:|---:|",
    ]
    for task, part in report["tasks"].items():
        for name, score in part["scores"].items():
            value, low, high = (shown(score[key]) for key in ("value", "low", "high"))
            lines.append(f"| {task} | {name} | {value} | {low} to {high} | {score['examples']:,} |")
    lines += [
        "",
        "| task | sources cut | skipped | answers without end | empty | mean tokens |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for task, part in report["tasks"].items():
        lines.append(
            f"| {task} | {part['sources_cut']:,} | {part['sources_skipped']:,} | "
            f"{part['answers_without_end']:,} | {part['empty_answers']:,} | "
            f"{part['mean_answer_tokens']:.1f} |"
        )
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
    judge = report["judge"]
    lines += [
        "",
        "No judge was asked; only what was measured is shown."
        if judge is None
        else f"Judge: {judge['model']} at {judge['endpoint']}; prompt in report.json. Opinions "
        "missing, and left out of the mean: "
        + ", ".join(f"{task} {part['judge_missing']:,}" for task, part in report["tasks"].items()),
    ]
    return "\n".join(lines) + "\n"


def shown(value: float | None) -> str:
    """Two decimals, or a dash for what is not there."""
    return "–" if value is None else f"{value:.2f}"
