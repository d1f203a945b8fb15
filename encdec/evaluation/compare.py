"""Two models on the same examples: the difference of every score, and how sure it is."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from encdec.errors import DataError
from encdec.evaluation.intervals import Comparison, Interval, Statistic, compare, compare_means
from encdec.evaluation.likelihood import LikelihoodFiles, likelihood_scores
from encdec.evaluation.predictions import Example
from encdec.evaluation.report import read_report, shown
from encdec.evaluation.scores import Score, score_task


def compare_evaluations(
    first: Sequence[str], second: Sequence[str], *, resamples: int
) -> dict[str, Any]:
    """Plain values: for each task and score of both sides, second minus first.

    Args:
        first: --out directories of one model's evaluations, one a seed (or a task and seed).
        second: the other model's. Seeds are averaged example by example first, so that an
            interval is over examples, given these seeds.
        resamples: of the bootstrap.

    Raises:
        DataError: a directory without a finished evaluation, no task in common, or other examples.
    """
    sides = [_by_task(folders) for folders in (first, second)]
    tasks = [task for task in sides[0] if task in sides[1]]
    if not tasks:
        raise DataError(f"{', '.join(first)} and {', '.join(second)} have no task in common")
    rows = []
    for task in tasks:
        scored = [[_scores(folder, task) for folder in side[task]] for side in sides]
        examples = {one.examples for side in scored for one in side}
        if len(examples) > 1:
            raise DataError(f"{sides[0][task][0]} and {sides[1][task][0]} answered other examples "
                            f"of {task}; evaluate both with the same data, --split and --limit")
        for name in scored[0][0].scores:
            if all(name in one.scores for side in scored for one in side):
                rows.append({"task": task, "score": name} | _row(
                    [[one.scores[name] for one in side] for side in scored], resamples))
    return {"first": list(first), "second": list(second), "resamples": resamples, "rows": rows}


def _by_task(folders: Sequence[str]) -> dict[str, list[pathlib.Path]]:
    found: dict[str, list[pathlib.Path]] = {}
    for folder in folders:
        for task in read_report(folder)["tasks"]:
            found.setdefault(task, []).append(pathlib.Path(folder))
    return found


@dataclasses.dataclass(frozen=True)
class _Scored:
    """One evaluation of one task."""

    examples: tuple[Example, ...]
    scores: Mapping[str, Score]


def _scores(folder: pathlib.Path, task: str) -> _Scored:
    """A finished evaluation's scores, made again from its predictions."""
    examples, texts = [], []
    rows: dict[int, dict[str, Any]] = {}
    for path in sorted((folder / task).glob("predictions-*.jsonl")):
        for row in map(json.loads, path.read_text().splitlines()):
            rows[row["index"]] = row
    for index in sorted(rows):
        examples.append(Example(rows[index]["source"], tuple(rows[index]["references"])))
        texts.append(rows[index]["prediction"])
    scores = score_task(task, [one.references for one in examples], texts)
    given = LikelihoodFiles(folder / task).read()
    if len(given) == len(examples):
        scores += likelihood_scores([given[index] for index in range(len(examples))])
    return _Scored(tuple(examples), {score.name: score for score in scores})


def _row(sides: Sequence[Sequence[Score]], resamples: int) -> dict[str, Any]:
    counts = {score.count for side in sides for score in side}
    if len(counts) > 1:
        return {"examples": min(counts), "difference": None, "low": None, "high": None,
                "p_value": None}
    [count] = counts
    statistics = [_mean_of(side) for side in sides]
    if all(score.values is not None for side in sides for score in side):
        means = [np.mean([score.values for score in side], axis=0) for side in sides]
        found = compare_means(*means, resamples=resamples)
    else:
        found = Comparison(compare(*statistics, count, resamples=resamples), math.nan)
    everything = np.arange(count)
    return {"examples": count, "first": statistics[0](everything),
            "second": statistics[1](everything), **_plain(found.difference),
            "p_value": None if math.isnan(found.p_value) else found.p_value}


def _mean_of(scores: Sequence[Score]) -> Statistic:
    return lambda indices: float(np.mean([score.statistic(indices) for score in scores]))


def _plain(interval: Interval) -> dict[str, float | None]:
    values = {"difference": interval.value, "low": interval.low, "high": interval.high}
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def compare_markdown(content: Mapping[str, Any], names: tuple[str, str]) -> str:
    """The comparison as Markdown; a difference whose interval leaves zero out is in bold."""
    first, second = names
    lines = [
        f"{second} minus {first}, with paired bootstrap intervals of 95 % over examples and "
        "two-sided p-values of a randomisation test (for means over examples; not corrected for "
        f"the {len(content['rows'])} comparisons).", "",
        f"| task | score | {first} | {second} | difference | 95 % interval | p | examples |",
        "|---|---|---:|---:|---:|---:|---:|---:|"]
    for row in content["rows"]:
        low, high = row["low"], row["high"]
        sure = low is not None and high is not None and (low > 0 or high < 0)
        difference = f"**{shown(row['difference'])}**" if sure else shown(row["difference"])
        p_value = "–" if row["p_value"] is None else f"{row['p_value']:.4f}"
        lines.append(
            f"| {row['task']} | {row['score']} | {shown(row.get('first'))} | "
            f"{shown(row.get('second'))} | {difference} | {shown(low)} to {shown(high)} | "
            f"{p_value} | {row['examples']:,} |")
    return "\n".join(lines) + "\n"
