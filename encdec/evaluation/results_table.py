"""The paper's Table 1 with our models: its figures next to ours, never mixed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from encdec.markup import markdown_table
from encdec.metrics.intervals import Interval, t_interval

# The paper's columns: (task, our score, heading).
COLUMNS = (
    ("squad_v2", "rougeL", "SQuAD 2.0"),
    ("ielts_feedback", "rougeL", "IELTS"),
    ("code_java2cs", "rougeL", "CodeXGLUE"),
    ("xsum", "rougeL", "XSum"),
)
# Scores without figures in the paper, in a separate table: (task, our score, heading).
OTHERS = (
    ("squad_v2", "has_answer_f1", "SQuAD F1, answerable"),
    ("squad_v2", "f1", "SQuAD F1"),
    ("ielts_band", "band_error", "IELTS band, error"),
    ("ielts_band", "kappa", "IELTS band, kappa"),
    ("code_java2cs", "bleu", "Java to C#, BLEU"),
    ("code_java2cs", "bleu_codexglue", "Java to C#, BLEU as CodeXGLUE"),
    ("code_java2cs", "exact_match", "Java to C#, exact match"),
    ("code_java2cs", "syntax_match", "Java to C#, syntax"),
    ("code_refine_small", "bleu_codexglue", "refinement, BLEU as CodeXGLUE"),
    ("code_refine_small", "exact_match", "refinement, exact match"),
    ("dialogsum", "rougeL", "DialogSum, Rouge-L"),
    ("dialogsum", "rougeL_stemmed", "DialogSum, Rouge-L stemmed"),
    ("squad_v2", "bits_per_byte", "SQuAD, bits per byte"),
    ("ielts_feedback", "bits_per_byte", "IELTS, bits per byte"),
    ("code_java2cs", "bits_per_byte", "Java to C#, bits per byte"),
    ("xsum", "bits_per_byte", "XSum, bits per byte"),
    ("dialogsum", "bits_per_byte", "DialogSum, bits per byte"),
    ("code_refine_small", "bits_per_byte", "refinement, bits per byte"),
)
# arXiv 2501.16273, Table 1: (Rouge-L, Ragas) at 330M in the order of COLUMNS, from 0 to 1. The
# paper gives neither seeds nor intervals.
PAPER: Mapping[str, tuple[tuple[float, float], ...]] = {
    "teacher": ((0.85, 0.96), (0.31, 0.70), (0.93, 0.74), (0.36, 0.28)),
    "DEC": ((0.55, 0.90), (0.30, 0.29), (0.91, 0.61), (0.19, 0.14)),
    "DEC+KD": ((0.57, 0.90), (0.31, 0.40), (0.93, 0.63), (0.24, 0.19)),
    "ED 1/3-2/3": ((0.61, 0.91), (0.31, 0.29), (0.93, 0.65), (0.23, 0.15)),
    "ED 1/2-1/2": ((0.64, 0.92), (0.31, 0.28), (0.93, 0.66), (0.24, 0.17)),
    "ED 2/3-1/3": ((0.67, 0.93), (0.31, 0.26), (0.93, 0.66), (0.25, 0.19)),
    "ED 1/3-2/3+KD": ((0.62, 0.93), (0.32, 0.40), (0.93, 0.70), (0.26, 0.19)),
    "ED 1/2-1/2+KD": ((0.60, 0.91), (0.32, 0.45), (0.93, 0.73), (0.27, 0.20)),
    "ED 2/3-1/3+KD": ((0.69, 0.94), (0.32, 0.46), (0.93, 0.74), (0.27, 0.20)),
}
# Its last column, which the paper rounds from unrounded figures.
PAPER_MEANS: Mapping[str, tuple[float, float]] = {
    "teacher": (0.61, 0.67),
    "DEC": (0.49, 0.49),
    "DEC+KD": (0.51, 0.53),
    "ED 1/3-2/3": (0.52, 0.50),
    "ED 1/2-1/2": (0.53, 0.51),
    "ED 2/3-1/3": (0.54, 0.51),
    "ED 1/3-2/3+KD": (0.53, 0.56),
    "ED 1/2-1/2+KD": (0.53, 0.57),
    "ED 2/3-1/3+KD": (0.55, 0.59),
}


@dataclasses.dataclass(frozen=True)
class Cell:
    """A model's score on a task.

    Attributes:
        interval: of 95 %: over seeds (Student's t) where there are several, else over examples.
        seeds: number of training seeds.
    """

    interval: Interval
    seeds: tuple[int, ...]

    def plain(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self.interval), "seeds": self.seeds}


def cell(reports: Sequence[Mapping[str, Any]], task: str, score: str) -> Cell | None:
    """The mean over the reports that hold the task's score; None if none does."""
    held = [
        (report["model"]["seed"], report["tasks"][task]["scores"][score])
        for report in reports
        if score in report["tasks"].get(task, {}).get("scores", {})
    ]
    held = [(seed, found) for seed, found in held if found["value"] is not None]
    if not held:
        return None
    seeds = tuple(sorted(seed for seed, _ in held))
    if len(held) == 1:
        found = held[0][1]
        bound = lambda value: math.nan if value is None else value
        return Cell(Interval(bound(found["low"]), bound(found["high"]), found["value"]), seeds)
    return Cell(t_interval([found["value"] for _, found in held]), seeds)


def table(models: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Plain values: each row of the paper's table and each model of ours that is not in it.

    Args:
        models: row's name to the reports of its runs, one a seed and task.
    """
    rows = []
    for name in [*PAPER, *(name for name in models if name not in PAPER)]:
        reports = models.get(name, ())
        row: dict[str, Any] = {"model": name, "ours": {}, "paper": {}}
        for number, (task, score, _) in enumerate(COLUMNS):
            if found := cell(reports, task, score):
                row["ours"][task] = found.plain()
            if name in PAPER:
                rouge, judge = PAPER[name][number]
                row["paper"][task] = {"rougeL": 100 * rouge, "ragas": 100 * judge}
        row["mean"] = None
        if len(row["ours"]) == len(COLUMNS):
            row["mean"] = sum(found["value"] for found in row["ours"].values()) / len(COLUMNS)
        row["others"] = {
            heading: found.plain()
            for task, score, heading in OTHERS
            if (found := cell(reports, task, score))
        }
        for field in ("parameters", "training_flops"):
            row[field] = sorted({report["model"].get(field) for report in reports} - {None})
        rows.append(row)
    return {"columns": [task for task, _, _ in COLUMNS], "rows": rows, "judges": _judges(models)}


def _judges(models: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Each judge's mean opinion of every model and task, one entry per judge."""
    judges = []
    for report in (report for found in models.values() for report in found):
        if report.get("judge") and report["judge"] not in judges:
            judges.append(report["judge"])
    found = []
    for judge in judges:
        theirs = {
            name: [report for report in of_model if report.get("judge") == judge]
            for name, of_model in models.items()
        }
        asked = [report for of_model in theirs.values() for report in of_model]
        tasks = list(dict.fromkeys(task for report in asked for task in report["tasks"]))
        rows = [
            {
                "model": name,
                "tasks": {
                    task: one.plain()
                    | {
                        "missing": sum(
                            report["tasks"][task]["judge_missing"] or 0
                            for report in of_model
                            if task in report["tasks"]
                        )
                    }
                    for task in tasks
                    if (one := cell(of_model, task, "judge"))
                },
            }
            for name, of_model in theirs.items()
            if of_model
        ]
        found.append({"judge": judge, "tasks": tasks, "rows": rows})
    return found


def table_markdown(content: Mapping[str, Any]) -> str:
    """The table as Markdown: our Rouge-L with its interval, then the paper's in a separate
    table."""
    headings = [heading for _, _, heading in COLUMNS]
    ours, papers = [], []
    for row in content["rows"]:
        cells = [_ours(row["ours"].get(task)) for task in content["columns"]]
        sizes = " / ".join(f"{value:,}" for value in row["parameters"]) or "–"
        # One run per task: each has its own cost.
        flops = [f"{value:.2e}" for value in row["training_flops"]]
        cost = "–" if not flops else flops[0] if len(flops) == 1 else f"{flops[0]} to {flops[-1]}"
        mean = "–" if row["mean"] is None else f"{row['mean']:.1f}"
        ours.append((row["model"], *cells, mean, sizes, cost))
        if row["paper"]:
            cells = [
                f"{row['paper'][task]['rougeL']:.0f} / {row['paper'][task]['ragas']:.0f}"
                for task in content["columns"]
            ]
            mean = " / ".join(f"{100 * value:.0f}" for value in PAPER_MEANS[row["model"]])
            papers.append((row["model"], *cells, mean))
    lines = [
        "## Measured here",
        "",
        "Rouge-L without stemming, 0 to 100, with 95 % intervals: over seeds where a cell has "
        "several (n), else over examples. A dash was not measured. "
        + (
            "A judge's opinions have a separate table."
            if content["judges"]
            else "No judge was asked."
        ),
        "",
        *markdown_table(("model", *headings, "mean", "parameters", "training FLOPs"), ours),
    ]
    lines += _other_scores(content["rows"])
    for found in content["judges"]:
        lines += _judge_table(found)
    lines += [
        "",
        "## The paper's figures",
        "",
        "arXiv 2501.16273, Table 1, 330M parameters: Rouge-L / Ragas, times 100; no seeds or "
        "intervals are given. Its sizes, data and training differ from ours: only orders "
        "can be compared.",
        "",
        *markdown_table(("model", *headings, "mean"), papers),
    ]
    return "\n".join(lines) + "\n"


def has_papers_tasks(content: Mapping[str, Any]) -> bool:
    """Whether some model has a score in each of the table's columns."""
    return all(any(row["ours"].get(task) for row in content["rows"]) for task in content["columns"])


def _other_scores(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A table of the OTHERS that some model has; empty if none has any."""
    headings = [
        heading for _, _, heading in OTHERS if any(heading in row["others"] for row in rows)
    ]
    if not headings:
        return []
    cells = [
        (row["model"], *(_ours(row["others"].get(heading), 2) for heading in headings))
        for row in rows
        if row["others"]
    ]
    title = "Other scores of the same models, intervals as above:"
    return ["", title, "", *markdown_table(("model", *headings), cells)]


def _judge_table(found: Mapping[str, Any]) -> list[str]:
    judge, tasks = found["judge"], found["tasks"]

    def opinion(one: Mapping[str, Any] | None) -> str:
        missing = f", {one['missing']:,} missing" if one and one["missing"] else ""
        return _ours(one) + missing

    rows = [
        (row["model"], *(opinion(row["tasks"].get(task)) for task in tasks))
        for row in found["rows"]
    ]
    return [
        "",
        f"## Opinion of {judge['model']} ({judge['endpoint']})",
        "",
        "Mean opinion of this judge, 0 to 100, over the examples with one (those "
        "without are counted), intervals as above. The prompt is this project's own, and "
        "is stored in report.json: the figures are not Ragas scores, and not comparable with the "
        "paper's or another judge's.",
        "",
        *markdown_table(("model", *tasks), rows),
    ]


def _ours(found: Mapping[str, Any] | None, digits: int = 1) -> str:
    if found is None:
        return "–"
    seeds = f" (n={len(found['seeds'])})" if len(found["seeds"]) > 1 else ""
    value, low, high = (f"{found[name]:.{digits}f}" for name in ("value", "low", "high"))
    return f"{value} [{low}, {high}]{seeds}"
