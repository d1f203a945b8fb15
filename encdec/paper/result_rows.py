"""Result rows of the comparison: one JSON line per run, from which every table can be rebuilt.

A line holds the scores, and what each example adds to the sums of the scores that are compared
pairwise, so that another machine continues from the file alone: a run whose line is there is done.
A run is named by its settings, the data it read, and its row, column and seed. A run that diverged
has a line without scores.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import pathlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from encdec.cost.flops import count_parameters
from encdec.errors import DataError
from encdec.evaluation.evaluation_report import read_report, task_report
from encdec.evaluation.examples import Examples
from encdec.evaluation.likelihood import LikelihoodFiles, likelihood_scores
from encdec.evaluation.predictions import read_answers
from encdec.files import append_rows, lines_exist, whole_lines
from encdec.metrics.intervals import RESAMPLES
from encdec.metrics.metric_registry import not_measured, score_texts
from encdec.metrics.score import Score, bits_per_byte
from encdec.model import ModelConfig
from encdec.paper.divergence import Divergence
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
RUN, COSTS, SEARCH, COPY = "run", "costs", "search", "copy"  # kinds of lines


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
            assert row["kind"] in (RUN, COSTS, SEARCH, COPY)
        except (ValueError, TypeError, KeyError, AssertionError):
            raise DataError(f"{path}:{number} is not a result row; remove the line") from None
        rows.append(row)
    return rows


def check_data(
    path: pathlib.Path | epath.Path, settings: Collection[str], data: str
) -> dict[str, int]:
    """How many runs of these settings the file has on other data, by that data.

    They are other runs than those on this data.

    Args:
        path: of the results.
        settings: digests of one comparison's settings.
        data: fingerprint of its data.

    Raises:
        DataError: lines of these settings do not say on which data.
    """
    rows = [row for row in read_results(path) if row["kind"] in (RUN, SEARCH)]
    rows = [row for row in rows if row["setting"] in settings]
    if unknown := [row["row"] for row in rows if "data" not in row]:
        raise DataError(
            f"{path} has {len(unknown)} lines of these settings, the first of {unknown[0]}, that "
            f'do not name their data; if it was the data given here, add "data": "{data}" to each '
            "of them, else give another --results"
        )
    return collections.Counter(row["data"] for row in rows if row["data"] != data)


def append_results(path: pathlib.Path | epath.Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Adds lines; they are on disk on return."""
    make_directory(path.parent)
    append_rows(path, rows)


@dataclasses.dataclass(frozen=True)
class Identity:
    """What names a run in the results.

    Attributes:
        setting: digest of the settings that decide it.
        data: fingerprint of the data.
        row: its name in the table.
        column: the fine-tuning's name.
        seed: of the fine-tuning.
    """

    setting: str
    data: str
    row: str
    column: str
    seed: int


def run_rows(
    identity: Identity,
    *,
    comparison: str,
    training_flops: float,
    folders: Mapping[str, pathlib.Path],
) -> list[dict[str, Any]]:
    """The lines of one run, one per task.

    Args:
        identity: of the run.
        comparison: digest of the settings of students without a teacher.
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
                **dataclasses.asdict(identity),
                "comparison": comparison,
                "task": task,
                **Divergence().fields(),
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


def diverged_rows(
    identity: Identity,
    noted: Divergence,
    *,
    comparison: str,
    tasks: Sequence[str],
    model: ModelConfig,
    training_flops: float,
) -> list[dict[str, Any]]:
    """The lines of a run that diverged: as ``run_rows``, without scores.

    Args:
        identity: of the run.
        noted: why it counts as diverged.
        comparison: digest of the settings of students without a teacher.
        tasks: that it would have been scored on.
        model: what was trained.
        training_flops: until it diverged, with the pretraining before it.
    """
    return [
        {
            "kind": RUN,
            **dataclasses.asdict(identity),
            "comparison": comparison,
            "task": task,
            **noted.fields(),
            "architecture": model.architecture,
            "layers": [model.encoder_layers, model.decoder_layers],
            "parameters": count_parameters(model).total,
            "training_flops": training_flops,
            "scores": {},
            "shuffled": {},
            "parts": {},
        }
        | where_and_when()
        for task in tasks
    ]


def copy_row(task: Examples, *, setting: str, data: str, column: str) -> dict[str, Any]:
    """The line with the scores of answers that are the sources themselves, less instructions.

    Args:
        task: the examples that the models are scored on.
        setting: digest of the settings of students without a teacher.
        data: fingerprint of the data.
        column: the fine-tuning's name.
    """
    sources = without_instructions([example.source for example in task.examples])
    metrics = [name for name in task.metrics if not not_measured([name])]
    scores = score_texts(metrics, [example.references for example in task.examples], sources)
    line = {"kind": COPY, "setting": setting, "data": data, "column": column, "task": task.name}
    report = task_report(scores, {}, RESAMPLES)
    return (
        line
        | {"examples": len(sources)}
        | {"scores": {"greedy": report["scores"]}}
        | where_and_when()
    )


def without_instructions(sources: Sequence[str]) -> list[str]:
    """The sources without the lines with which all of them begin, and those with which all end.

    At least one line of each stays.
    """
    lines = [source.split("\n") for source in sources]
    most = min(map(len, lines)) - 1
    begin = _common_lines(lines, most)
    end = _common_lines([one[::-1] for one in lines], most - begin)
    return ["\n".join(one[begin : len(one) - end]) for one in lines]


def _common_lines(lines: Sequence[Sequence[str]], most: int) -> int:
    """How many lines, up to ``most``, are the same at the beginning of all."""
    same = (len({one[place] for one in lines}) == 1 for place in range(most))
    return sum(itertools.takewhile(bool, same))


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


def _scored(name: str, references: Sequence[Sequence[str]], texts: list[str]) -> Score:
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


def done_runs(rows: Iterable[Mapping[str, Any]]) -> dict[Identity, Mapping[str, Any]]:
    """The runs that have a line, each with one of its lines; those that diverged too."""
    names = [field.name for field in dataclasses.fields(Identity)]
    identity_of = lambda row: Identity(**{name: row.get(name) for name in names})
    return {identity_of(row): row for row in rows if row["kind"] == RUN}


def by_row(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """A task's run rows by the model's name, one per seed: the last where one is there twice."""
    found: dict[str, dict[int, Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["row"], {})[row["seed"]] = row
    return {name: [of[seed] for seed in sorted(of)] for name, of in found.items()}
