"""Examples to evaluate on, from tasks and the user's own files, with their metrics."""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
import random
import re
from collections.abc import Iterable, Iterator, Sequence

from encdec.data.readers import STDIN, BadRows, check_files, pair_documents
from encdec.data.task_mixtures import mixture_parts
from encdec.data.task_registry import text_task
from encdec.errors import DataError
from encdec.evaluation.evaluation_settings import EvaluationSettings
from encdec.metrics.metric_registry import DEFAULT, metric_named


@dataclasses.dataclass(frozen=True)
class Example:
    """A source and all its references."""

    source: str
    references: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Examples:
    """The examples of a task or file, and their metrics.

    Attributes:
        name: in reports, and of the folder of its predictions.
        examples: at least one.
        metrics: names of ``encdec.metrics.metric_registry``.

    Raises:
        ConfigError: no such metric.
    """

    name: str
    examples: tuple[Example, ...]
    metrics: tuple[str, ...] = DEFAULT

    def __post_init__(self) -> None:
        for name in self.metrics:
            metric_named(name)


def load_examples(settings: EvaluationSettings) -> list[Examples]:
    """The examples of all tasks and files that the settings name.

    Raises:
        DataError: no such task or file, a bad row, nothing in it, or two files of one name.
    """
    data = (settings.data_dir, settings.split, settings.metrics, settings.max_examples)
    # A mixture stands for its tasks.
    parts = [part for name in settings.tasks for part in mixture_parts(name) or (name,)]
    found = [of_task(name, *data, one_of_several=len(parts) > 1) for name in parts]
    found += [_of_files(path, settings) for path in settings.jsonl]
    names = [one.name for one in found]
    for name in names:
        if names.count(name) > 1:
            raise DataError(
                f"{names.count(name)} of the tasks and files are called {name}; rename a file, or "
                "evaluate them separately"
            )
    return found


def of_task(
    name: str,
    data_dir: str | None,
    split: str,
    metrics: Sequence[str] = (),
    limit: int | None = None,
    *,
    one_of_several: bool = False,
) -> Examples:
    """The first ``limit`` examples of a task's split, with its own metrics unless others are named.

    Raises:
        DataError: no such task, split or file, raw text, a bad row, or nothing in it.
    """
    task = text_task(name, data_dir, one_of_several=one_of_several)
    return _examples(
        name,
        f"the {split} split of {name} is empty; give another --split",
        itertools.starmap(Example, task.examples(split, BadRows())),
        metrics or task.metrics,
        limit,
    )


def _of_files(path: str, settings: EvaluationSettings) -> Examples:
    """The examples of a file, or of all files of a folder or pattern, under its name."""
    files = check_files([path])
    fields = (settings.source_field, settings.target_field)

    def read() -> Iterator[Example]:
        for source, *references in pair_documents(files, BadRows(), fields):
            yield Example(source, tuple(references))

    given = "standard_input" if path == STDIN else _file_name(path)
    name = re.sub(r"[^\w.-]+", "_", given.split(".")[0] or given)
    return _examples(name, f"{path} has no rows", read(), settings.metrics, settings.max_examples)


def _file_name(path: str) -> str:
    name = pathlib.Path(path).name
    return pathlib.Path(path).resolve().name if name in ("", "..") else name  # of "." and ".."


def _examples(
    name: str, empty: str, examples: Iterable[Example], metrics: Sequence[str], limit: int | None
) -> Examples:
    kept = tuple(itertools.islice(examples, limit))
    if not kept:
        raise DataError(empty)
    return Examples(name, kept, tuple(metrics) or DEFAULT)


def with_shuffled_sources(examples: Sequence[Example], seed: int = 0) -> tuple[Example, ...]:
    """The same references in the same order, each with the source of another example.

    The sources are permuted, so that their texts and lengths are the same set; the permutation
    follows from the sources and the seed alone. No example keeps its own source or gets an equal
    text, as far as possible: if more than half of the examples have the same text, the surplus
    keeps it.

    Raises:
        DataError: all sources are one text.
    """
    places: dict[str, list[int]] = {}
    for index, example in enumerate(examples):
        places.setdefault(example.source, []).append(index)
    if len(places) < 2:
        raise DataError(
            f"--shuffle_sources needs at least two different sources; there are {len(places)} in "
            f"{len(examples):,} examples"
        )
    draw = random.Random(seed)
    groups = list(places.values())
    draw.shuffle(groups)
    # Equal texts are adjacent, in groups of which none is longer than the first: rotated by that
    # length, each lands outside its own group, unless no other place is left.
    groups.sort(key=len, reverse=True)
    order = [index for group in groups for index in draw.sample(group, len(group))]
    step = len(groups[0])
    given = {to: order[(place + step) % len(order)] for place, to in enumerate(order)}
    return tuple(
        dataclasses.replace(example, source=examples[given[index]].source)
        for index, example in enumerate(examples)
    )
