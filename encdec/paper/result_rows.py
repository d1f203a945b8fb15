"""Result rows of the comparison: one JSON line per run, from which every table can be rebuilt.

A line holds the scores, and what each example adds to the sums of the scores that are compared
pairwise, so that another machine continues from the file alone: a run whose line is there is done.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from encdec.errors import DataError
from encdec.evaluation.evaluation_report import read_report
from encdec.evaluation.likelihood import LikelihoodFiles, likelihood_scores
from encdec.evaluation.predictions import read_answers
from encdec.files import append_rows, lines_exist, whole_lines
from encdec.metrics.metric_registry import score_texts
from encdec.metrics.score import Score, bits_per_byte
from encdec.result_lines import where_and_when
from encdec.storage import make_directory

if TYPE_CHECKING:
    from etils import epath

# Scores whose parts are kept by example where a task has them, and the metric of each.
PAIRED = {
    "bleu_codexglue": "bleu_codexglue",
    "exact_match": "exact_match",
    "rougeL_stemmed": "rouge_stemmed",
}
BITS = "bits_per_byte"
RUN, COSTS, SEARCH = "run", "costs", "search"  # kinds of lines


def read_results(path: pathlib.Path | epath.Path) -> list[dict[str, Any]]:
    """All whole lines; none where there is no file.

    Raises:
        DataError: a line that is not a result row.
    """
    rows: list[dict[str, Any]] = []
    if not lines_exist(path):
        return rows
    for number, line in whole_lines(path):
        try:
            row = json.loads(line)
            assert row["kind"] in (RUN, COSTS, SEARCH)
        except (ValueError, TypeError, KeyError, AssertionError):
            raise DataError(f"{path}:{number} is not a result row; remove the line") from None
        rows.append(row)
    return rows


def append_results(path: pathlib.Path | epath.Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Adds lines; they are on disk on return."""
    make_directory(path.parent)
    append_rows(path, rows)


def run_rows(
    *,
    digest: str,
    title: str,
    column: str,
    seed: int,
    training_flops: float,
    folders: Mapping[str, pathlib.Path],
) -> list[dict[str, Any]]:
    """The lines of one run, one per task.

    Args:
        digest: of the settings.
        title: the row's name.
        column: the fine-tuning's name.
        seed: of the fine-tuning.
        training_flops: of the run and of the pretraining behind it, whole.
        folders: finished evaluations by the name of their decoding, ``greedy`` first.
    """
    reports = {name: read_report(folder) for name, folder in folders.items()}
    model = reports["greedy"]["model"]
    lines = []
    for task in reports["greedy"]["tasks"]:
        scores = {name: report["tasks"][task]["scores"] for name, report in reports.items()}
        shuffled = reports["greedy"]["tasks"][task].get("shuffled_sources")
        lines.append(
            {
                "kind": RUN,
                "setting": digest,
                "row": title,
                "column": column,
                "task": task,
                "seed": seed,
                "architecture": model["architecture"],
                "layers": [model["encoder_layers"], model["decoder_layers"]],
                "parameters": model["parameters"],
                "training_flops": training_flops,
                "best_step": model["step"],
                "examples": reports["greedy"]["tasks"][task]["examples"],
                "scores": scores,
                "shuffled": shuffled["scores"] if shuffled else {},
                "parts": {
                    name: _parts(folder / task, [one for one in PAIRED if one in scores[name]])
                    for name, folder in folders.items()
                },
            }
            | where_and_when()
        )
    return lines


def _parts(folder: pathlib.Path, names: Sequence[str]) -> dict[str, list[list[float]]]:
    """What each example adds to the sums of the scores of these names, and of bits per byte."""
    answers = {index: (one, made.text) for _, index, one, made in read_answers(folder)}
    order = sorted(answers)
    references = [answers[i][0].references for i in order]
    found = [_scored(name, references, [answers[i][1] for i in order]) for name in names]
    read = LikelihoodFiles(folder).read()
    if read:
        found += [one for one in likelihood_scores([read[i] for i in order]) if one.name == BITS]
    return {score.name: _plain(score.parts_ExK) for score in found}


def _scored(name: str, references: list[Sequence[str]], texts: list[str]) -> Score:
    """One of the PAIRED scores."""
    [found] = [one for one in score_texts([PAIRED[name]], references, texts) if one.name == name]
    return found


def _plain(parts_ExK: np.ndarray) -> list[list[float]]:
    return [
        [int(value) if value == int(value) else round(float(value), 4) for value in row]
        for row in parts_ExK
    ]


def score_of(row: Mapping[str, Any], decoding: str, name: str) -> Score | None:
    """A paired score of a run row, rebuilt from its parts; None if it was not measured."""
    parts = row["parts"].get(decoding, {}).get(name)
    if parts is None:
        return None
    if name == BITS:
        return Score(name, np.array(parts, np.float64), lambda sums: bits_per_byte(*sums.T))
    # The function of the sums is the metric's own, whatever the texts.
    template = _scored(name, [["a"]], ["a"])
    return dataclasses.replace(template, parts_ExK=np.array(parts, np.float64))


def done_runs(rows: Iterable[Mapping[str, Any]]) -> set[tuple[str, str, str, int]]:
    """(digest of the settings, row, column, seed) of the runs."""
    return {
        (row["setting"], row["row"], row["column"], row["seed"])
        for row in rows
        if row["kind"] == RUN
    }


def by_row(rows: Sequence[Mapping[str, Any]], task: str) -> dict[str, list[Mapping[str, Any]]]:
    """Run rows of a task by the model's name, one per seed: the last where one is there twice."""
    found: dict[str, dict[int, Mapping[str, Any]]] = {}
    for row in rows:
        if row["kind"] == RUN and row["task"] == task:
            found.setdefault(row["row"], {})[row["seed"]] = row
    return {name: [of[seed] for seed in sorted(of)] for name, of in found.items()}
