"""The results file: one JSON line for every run and evaluation, appended, never rewritten.

A line is written whole and flushed to the disk before the next run starts. A crash can truncate at
most the last line; readers skip it and the next writer removes it. Writers exclude each other by a
lock on the file, and a row that is there is not written again, so collecting twice changes nothing.
Of several rows of one (run, step) the last counts: the teacher's loss, or scores, may be known or
corrected later. In a bucket, which has no locks, every append is an object of its own, and a row
that two processes recorded at one time is read once.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import math
import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from encdec.buckets import is_address
from encdec.errors import DataError
from encdec.files import append_rows, lines_exist, whole_lines
from encdec.metrics.intervals import Interval
from encdec.scaling.fit import Observations
from encdec.scaling.planned_runs import PlannedRun
from encdec.storage import as_path

if TYPE_CHECKING:
    import pathlib

    from etils import epath

RESULTS_FILE = "results.jsonl"
METRICS_FILE = "metrics.jsonl"  # of a run's work directory
SCORES_FILE = "scores.json"  # of a run's work directory: {metric: value}, after the last step
TOKENS = ("target", "source", "both")
PARAMETERS = ("total", "non_embedding")
LOSSES = {"nats_per_token": "loss", "bits_per_byte": "bits_per_byte"}

Row = dict[str, Any]


class ResultsFile:
    """Appends to and reads one results file."""

    def __init__(self, path: str | os.PathLike):
        self.path = as_path(path)

    def read(self) -> list[Row]:
        """All whole lines, the last of each (run, step, kind).

        Raises:
            DataError: a line other than the last is damaged.
        """
        if not lines_exist(self.path):
            return []
        rows: dict[tuple, Row] = {}
        for row in self._parse(line for _, line in whole_lines(self.path)):
            rows[_key(row)] = row
        return list(rows.values())

    def append(self, rows: Iterable[Row]) -> int:
        """Appends the rows that are new or differ from the last of their (run, step, kind); returns
        how many."""
        if is_address(self.path):
            fresh = _fresh(self.read(), rows)
            append_rows(self.path, fresh)
            return len(fresh)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            content = file.read()
            whole = content.rfind(b"\n") + 1
            if whole < len(content):
                file.truncate(whole)
            fresh = _fresh(self._parse(content[:whole].splitlines()), rows)
            if fresh:
                file.seek(0, os.SEEK_END)
                file.write("".join(json.dumps(row) + "\n" for row in fresh).encode())
                file.flush()
                os.fsync(file.fileno())
            return len(fresh)

    def _parse(self, lines: Iterable[bytes]) -> list[Row]:
        rows = []
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                _key(row)
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(
                    f"{self.path}, line {number} is damaged ({error!r}); delete the "
                    "line to have `encdec scaling run` collect its run again"
                ) from None
            rows.append(row)
        return rows


def _fresh(known: Iterable[Row], rows: Iterable[Row]) -> list[Row]:
    """The rows that are not the last known of their key, the last of each."""
    last = {_key(row): _text(row) for row in known}  # as text, in which NaN equals itself
    fresh = {_key(row): row for row in rows}
    return [row for key, row in fresh.items() if last.get(key) != _text(row)]


def _text(row: Mapping[str, Any]) -> str:
    return json.dumps(row, sort_keys=True)


def _key(row: Mapping[str, Any]) -> tuple:
    return row["run"], row["step"], "scores" in row


def describe(run: PlannedRun) -> Row:
    """Fields shared by all rows of a run."""
    count = run.parameters
    return {
        "run": run.name,
        "digest": run.digest,
        "series": run.series,
        "architecture": run.model.architecture,
        "size": run.size,
        "budget": run.budget,
        "seed": run.seed,
        "parameters": count.total,
        "encoder_parameters": count.encoder,
        "decoder_parameters": count.decoder,
        "embedding_parameters": count.embedding + count.head,
        "batch_size": run.batch_size,
        "steps": run.steps,
        "learning_rate": run.learning_rate,
    } | ({"teacher_loss": run.teacher_loss} if run.teacher else {})


def collect(run: PlannedRun, workdir: str | os.PathLike) -> list[Row]:
    """The evaluations, and any scores, in a run's work directory so far."""
    folder = as_path(workdir)
    path = folder / METRICS_FILE
    if not lines_exist(path):
        return []
    rows: dict[int, Row] = {}
    for _, line in whole_lines(path):
        try:
            numbers = json.loads(line)
        except ValueError:
            continue  # truncated by a crash; the run writes it again when it resumes
        if "eval/loss" in numbers:
            # The last of equal steps: a resumed run repeats steps that it had not saved.
            rows[numbers["step"]] = _row(run, numbers)
    found = list(rows.values())
    scores = folder / SCORES_FILE
    if scores.exists() and run.steps in rows:
        found.append(rows[run.steps] | _read_scores(scores))
    return found


def _read_scores(path: pathlib.Path | epath.Path) -> Row:
    """Metrics of a scores file: numbers, or {"value", "low", "high"} with a 95 % interval."""
    try:
        content = {
            str(name): value if isinstance(value, Mapping) else {"value": value}
            for name, value in json.loads(path.read_text()).items()
        }
        values = {name: float(value["value"]) for name, value in content.items()}
        intervals = {
            name: [float(value["low"]), float(value["high"])]
            for name, value in content.items()
            if "low" in value
        }
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise DataError(
            f"{path} is malformed ({error!r}); expected {{metric: value}}, or {{metric: "
            '{"value": V, "low": L, "high": H}}'
        ) from None
    return {"scores": values} | ({"score_intervals": intervals} if intervals else {})


def _row(run: PlannedRun, numbers: Mapping[str, Any]) -> Row:
    step = int(numbers["step"])
    done = step / run.steps
    names = ("loss", "bits_per_byte", "accuracy")
    return describe(run) | {
        "step": step,
        "final": step == run.steps,
        "flops": run.flops * done,
        "source_tokens": run.source_tokens * done,
        "target_tokens": run.target_tokens * done,
        **{name: numbers[f"eval/{name}"] for name in names if f"eval/{name}" in numbers},
    }


def json_value(value: Any) -> Any:
    """Numbers, arrays and intervals in mappings and sequences as JSON has them; NaN is null."""
    if isinstance(value, Interval):
        value = value.low, value.high
    if isinstance(value, Mapping):
        return {name: json_value(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [json_value(inner) for inner in value]
    if isinstance(value, float):  # NumPy's float64 is one
        return float(value) if math.isfinite(value) else None
    return value


def final_rows(rows: Iterable[Row]) -> list[Row]:
    """The last evaluation of each finished run, where its schedule has ended."""
    return [row for row in rows if row["final"] and "scores" not in row]


def metrics_of(rows: Iterable[Row]) -> list[str]:
    """Names of the downstream metrics that any run has."""
    return sorted({name for row in rows for name in row.get("scores", {})})


@dataclasses.dataclass(frozen=True)
class Choices:
    """What is counted as D (a name in TOKENS), N (in PARAMETERS) and L (in LOSSES).

    ``draws``: bootstrap samples for intervals; 0: none.
    """

    tokens: str = "target"
    parameters: str = "total"
    loss: str = "nats_per_token"
    draws: int = 200


def observations(rows: list[Row], choices: Choices) -> Observations:
    """Rows of the results file as arrays."""

    def column(name: str) -> np.ndarray:
        return np.array([float(row.get(name, math.nan)) for row in rows])

    size = column("parameters")
    if choices.parameters == "non_embedding":
        size = size - column("embedding_parameters")
    counts = {"target": column("target_tokens"), "source": column("source_tokens")}
    counts["both"] = counts["target"] + counts["source"]
    return Observations(
        size,
        counts[choices.tokens],
        column(LOSSES[choices.loss]),
        column("encoder_parameters"),
        column("decoder_parameters"),
        column("flops"),
    )


def seed_noise(rows: list[Row], loss: str) -> tuple[float, int]:
    """Standard deviation of log loss between seeds, pooled, and its degrees of freedom."""
    groups: dict[tuple, list[float]] = {}
    for row in rows:
        groups.setdefault((row["series"], row["size"], row["budget"]), []).append(
            math.log(row[LOSSES[loss]])
        )
    squares = sum(np.var(values) * len(values) for values in groups.values())
    freedom = sum(len(values) - 1 for values in groups.values())
    return (math.sqrt(squares / freedom) if freedom else math.nan), freedom
