"""Compares two models on the same examples: the difference of every score, with its interval."""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from encdec.data.task_registry import TEXT_TASKS
from encdec.errors import DataError
from encdec.evaluation.evaluation_report import check_distinct, read_report, shown
from encdec.evaluation.examples import Example
from encdec.evaluation.judge import kept_opinions
from encdec.evaluation.likelihood import Likelihood, LikelihoodFiles, likelihood_scores
from encdec.evaluation.predictions import read_answers
from encdec.markup import markdown_table
from encdec.metrics.intervals import TRIALS, Statistic, compare, randomisation_test
from encdec.metrics.metric_registry import DEFAULT, score_texts
from encdec.metrics.score import Score, mean_score
from encdec.storage import on_this_machine


def compare_evaluations(
    first: Sequence[str], second: Sequence[str], *, resamples: int, trials: int = TRIALS
) -> dict[str, Any]:
    """Plain values: for each task and score of both sides, second minus first.

    Args:
        first: --out directories of one model's evaluations, one a seed (or a task and seed).
        second: the other model's. A score is the mean of the seeds' scores, and an interval over
            examples, given these seeds. The randomisation test is of the same means, and swaps
            all seeds' outputs of an example together.
        resamples: of the bootstrap.
        trials: of the randomisation test.

    Raises:
        DataError: a directory without a finished evaluation, one of a side given twice, no task
            in common, or other examples.
    """
    sides = [_by_task(folders) for folders in (first, second)]
    tasks = [task for task in sides[0] if task in sides[1]]
    if not tasks:
        raise DataError(f"{', '.join(first)} and {', '.join(second)} have no task in common")
    rows = []
    for task in tasks:
        read = [[_read(folder, task, report) for folder, report in side[task]] for side in sides]
        examples = {one.examples for side in read for one in side}
        if len(examples) > 1:
            raise DataError(
                f"{sides[0][task][0][0]} and {sides[1][task][0][0]} answered other "
                f"examples of {task}; evaluate both with the same data, --split and "
                "--max_examples"
            )
        scored = [[{score.name: score for score in one} for one in side] for side in _scores(read)]
        for name in scored[0][0]:
            if all(name in one for side in scored for one in side):
                rows.append(
                    {"task": task, "score": name}
                    | compare_scores(
                        [[one[name] for one in side] for side in scored], resamples, trials
                    )
                )
    return {
        "first": list(first),
        "second": list(second),
        "resamples": resamples,
        "trials": trials,
        "rows": rows,
    }


def _by_task(folders: Sequence[str]) -> dict[str, list[tuple[pathlib.Path, dict[str, Any]]]]:
    """(directory, report) of each task's evaluations."""
    reports = [(folder, read_report(folder)) for folder in folders]
    check_distinct(reports)
    found: dict[str, list[tuple[pathlib.Path, dict[str, Any]]]] = {}
    for folder, report in reports:
        for task in report["tasks"]:
            found.setdefault(task, []).append((on_this_machine(folder), report))
    return found


@dataclasses.dataclass(frozen=True)
class _Evaluation:
    """What one evaluation stored for one task.

    Attributes:
        examples: all of them.
        texts: the answers.
        likelihoods: of the references, by the example's index; skipped examples have none.
        opinions: of the judge, by the example's index.
        judge: the judge, as the report describes it; None if none was asked.
        metrics: names of its metrics.
    """

    examples: tuple[Example, ...]
    texts: tuple[str, ...]
    likelihoods: Mapping[int, Likelihood]
    opinions: Mapping[int, float]
    judge: Mapping[str, str] | None
    metrics: tuple[str, ...]


def _read(folder: pathlib.Path, task: str, report: Mapping[str, Any]) -> _Evaluation:
    found = {
        index: (example, prediction.text)
        for _, index, example, prediction in read_answers(folder / task)
    }
    count = report["tasks"][task]["examples"]
    if found.keys() != set(range(count)):
        raise DataError(
            f"{folder / task} holds the answers to {len(found):,} examples but "
            f"{folder} reports {count:,}; repeat its `encdec evaluate`"
        )
    examples, texts = zip(*(found[index] for index in range(count)))
    judge = report.get("judge")
    opinions = kept_opinions(folder, judge, examples, texts) if judge else []
    of_task = TEXT_TASKS[task].metrics if task in TEXT_TASKS else DEFAULT
    return _Evaluation(
        examples,
        texts,
        {index: one for index, one in LikelihoodFiles(folder / task).read().items() if one.tokens},
        {index: one for index, one in enumerate(opinions) if one is not None},
        judge,
        # Reports of earlier versions do not list them.
        tuple(report["tasks"][task].get("metrics") or of_task),
    )


def _scores(sides: Sequence[Sequence[_Evaluation]]) -> list[list[list[Score]]]:
    """Each evaluation's scores, computed again from its stored answers.

    Likelihoods and opinions are limited to the examples that have one in all evaluations;
    opinions count only if all come from the same judge.
    """
    everyone = [one for side in sides for one in side]
    shared = [
        sorted(set.intersection(*(set(part) for part in parts)))
        for parts in ([one.likelihoods for one in everyone], [one.opinions for one in everyone])
    ]
    one_judge = all(one.judge == everyone[0].judge for one in everyone)

    def scores(one: _Evaluation) -> list[Score]:
        found = score_texts(
            one.metrics, [example.references for example in one.examples], one.texts
        )
        found += likelihood_scores([one.likelihoods[index] for index in shared[0]])
        if one_judge:
            found += mean_score("judge", [one.opinions[index] for index in shared[1]])
        return found

    return [[scores(one) for one in side] for side in sides]


def compare_scores(
    sides: Sequence[Sequence[Score]], resamples: int, trials: int = TRIALS
) -> dict[str, Any]:
    """Plain values of one score of two sides, each one Score a seed, on the same examples.

    A metric that leaves out answers has other examples on each side: nothing can be paired.
    """
    counts = {score.count for side in sides for score in side}
    if len(counts) > 1:
        means = (float(np.mean([score.value for score in side])) for side in sides)
        nothing = dict.fromkeys(("difference", "low", "high", "p_value"))
        return {"examples": min(counts)} | _finite(dict(zip(("first", "second"), means))) | nothing
    [count] = counts
    mean_of = lambda side: lambda rows: np.mean([s.statistic(rows) for s in side], axis=0)
    statistics: list[Statistic] = [mean_of(side) for side in sides]
    difference = compare(statistics[0], statistics[1], count, resamples=resamples)
    parts = [np.stack([score.parts_ExK for score in side]) for side in sides]
    p_value = randomisation_test(parts[0], parts[1], sides[0][0].of_sums, trials=trials)
    everything = np.arange(count)[None]
    values = {
        "first": float(statistics[0](everything)[0]),
        "second": float(statistics[1](everything)[0]),
        "difference": difference.value,
        "low": difference.low,
        "high": difference.high,
        "p_value": p_value,
    }
    return {"examples": count} | _finite(values)


def _finite(values: Mapping[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def compare_markdown(content: Mapping[str, Any], names: tuple[str, str]) -> str:
    """The comparison as Markdown; a difference whose interval excludes zero is in bold."""
    first, second = names
    rows = []
    for row in content["rows"]:
        low, high = row["low"], row["high"]
        sure = low is not None and high is not None and (low > 0 or high < 0)
        as_text = functools.partial(shown, score=row["score"])
        difference = as_text(row["difference"])
        difference = f"**{difference}**" if sure else difference
        p_value = "–" if row["p_value"] is None else f"{row['p_value']:.4f}"
        values = (as_text(row.get("first")), as_text(row.get("second")), difference)
        interval = f"{as_text(low)} to {as_text(high)}"
        rows.append((row["task"], row["score"], *values, interval, p_value, f"{row['examples']:,}"))
    columns = ("task", "score", first, second, "difference", "95 % interval", "p", "examples")
    lines = [
        f"{second} minus {first}, with paired bootstrap intervals of 95 % over examples and "
        f"two-sided p-values of a randomization test of {content['trials']:,} trials, which swaps "
        f"the two models' answers example by example (not corrected for the {len(content['rows'])} "
        "comparisons).",
        "",
        *markdown_table(columns, rows, left=2),
    ]
    return "\n".join(lines) + "\n"
