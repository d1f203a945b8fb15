"""Mixtures by rate: of tasks, as they are prepared."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

import numpy as np

from encdec.data.mixing import check_once, mixing_rates
from encdec.data.objectives import Document
from encdec.data.readers import BadRows
from encdec.data.seqio_tasks import seqio_mixture, seqio_task
from encdec.data.task_registry import TEXT_TASKS, text_task
from encdec.data.text_tasks import TextTask
from encdec.errors import ConfigError, DataError

# The paper's four kinds of task, and its silence on pretraining data filled by two corpora.
MIXTURES: dict[str, tuple[str, ...]] = {
    "paper_tasks": ("squad_v2", "xsum", "code_java2cs", "ielts_band"),
    "pretraining": ("c4", "wikipedia"),
}
# Rates of those MIXTURES that were registered with some.
RATES: dict[str, tuple[float, ...]] = {}


def register_mixture(name: str, tasks: Sequence[str], rates: Sequence[float] | None = None) -> None:
    """Enters a mixture of registered tasks; without ``rates`` their sizes decide.

    Raises:
        ConfigError: another mixture or task has its name, no task, one twice, or rates that do
            not fit.
    """
    parts = tuple(tasks)
    if not parts:
        raise ConfigError(f"mixture {name!r} has no tasks; name one or more")
    check_once(parts, f"mixture {name!r}")
    if name in TEXT_TASKS or MIXTURES.get(name, parts) != parts:
        raise ConfigError(
            f"a mixture or task {name!r} is already registered; give yours another name"
        )
    if rates is not None:
        mixing_rates([1] * len(parts), rates)
    RATES.pop(name, None)  # of an earlier registration
    if rates is not None:
        RATES[name] = tuple(rates)
    MIXTURES[name] = parts


def mixture_parts(name: str) -> tuple[str, ...] | None:
    """The tasks of a mixture, ours or of seqio's registry; None where it is not a mixture."""
    if name in MIXTURES:
        return MIXTURES[name]
    found = None if name in TEXT_TASKS else seqio_mixture(name)
    return found[0] if found else None


def task_or_mixture(
    name: str,
    data_dir: str | None = None,
    *,
    rates: Sequence[float] | None = None,
    temperature: float = 1.0,
    maximum: int | None = None,
) -> TextTask:
    """A task or a mixture by name, over the files below ``data_dir`` if given."""
    parts = mixture_parts(name)
    if parts is None:
        if rates is not None or temperature != 1 or maximum is not None:
            raise ConfigError(
                f"mixture.rates, .temperature and .maximum are for {', '.join(MIXTURES)}, but the "
                f"task is {name}; leave them out"
            )
        return text_task(name, data_dir)
    tasks = [text_task(part, data_dir, one_of_several=True) for part in parts]
    if not all(task.objective.reads_text for task in tasks):
        # One of seqio's tasks is read as ids: so are the others, by their own pipelines.
        tasks = [seqio_task(part, as_ids=True) or task for part, task in zip(parts, tasks)]
    if rates is None and temperature == 1 and maximum is None:
        rates = RATES.get(name)
        if name not in MIXTURES and (found := seqio_mixture(name)):
            rates = found[1]
    return mixed_task(name, tasks, rates, temperature=temperature, maximum=maximum)


def mixed_task(
    name: str,
    tasks: Sequence[TextTask],
    rates: Sequence[float] | None = None,
    *,
    temperature: float = 1.0,
    maximum: int | None = None,
) -> TextTask:
    """Tasks mixed document by document, for preparing one records directory of all of them.

    Ends once every task was read in full; one whose rate outweighs its size starts over until
    then. Without explicit ``rates`` the documents are counted first, which reads them twice.
    Evenly interleaved and deterministic: at every place the task furthest behind its share.
    """
    fields = {task.name: " and ".join(task.objective.document_fields) for task in tasks}
    if len(set(fields.values())) != 1:
        kinds = ", ".join(f"{task} has {kind}" for task, kind in fields.items())
        raise ConfigError(
            f"mixture {name} has tasks with different kinds of documents: {kinds}; prepare them "
            "separately and mix them when reading"
        )

    def read(split: str, bad_rows: BadRows) -> Iterator[Document]:
        sizes = [1] * len(tasks)
        if rates is None:
            counted = BadRows(bad_rows.allowed)
            sizes = [sum(1 for _ in task.documents(split, counted)) for task in tasks]
        shares = mixing_rates(sizes, rates, temperature=temperature, maximum=maximum)
        return _interleave(tasks, shares, split, bad_rows)

    # A task without splits takes any name.
    limited = [task.splits for task in tasks if task.splits]
    splits = set.intersection(*map(set, limited)) if limited else set()
    if limited and not splits:
        raise ConfigError(
            f"the tasks of mixture {name} have no split in common: "
            + "; ".join(f"{task.name} has {', '.join(task.splits)}" for task in tasks)
        )
    return TextTask(
        name,
        read,
        tasks[0].objective,
        lambda: {
            "mixture": {task.name: task.origin() for task in tasks},
            "rates": list(rates) if rates else None,
            "temperature": temperature,
            "maximum": maximum,
        },
        tuple(split for split in limited[0] if split in splits) if limited else (),
        sized=lambda inputs, targets: mixed_task(
            name,
            [task.at_lengths(inputs, targets) for task in tasks],
            rates,
            temperature=temperature,
            maximum=maximum,
        ),
    )


def _interleave(
    tasks: Sequence[TextTask], shares: np.ndarray, split: str, bad_rows: BadRows
) -> Iterator[Document]:
    streams = [task.documents(split, bad_rows) for task in tasks]
    # One document ahead, so that the end of a task is known before it would start over.
    held = [next(stream, None) for stream in streams]
    for task, document in zip(tasks, held):
        if document is None:
            raise DataError(f"task {task.name}, split {split}, has no documents")
    read = np.zeros(len(tasks))
    unread = set(range(len(tasks)))
    while unread:
        part = int(np.argmax(shares * (read.sum() + 1) - read))
        document = held[part]
        assert document is not None
        yield document
        read[part] += 1
        held[part] = next(streams[part], None)
        if held[part] is None:
            unread.discard(part)
            # Faults were counted on the first pass.
            streams[part] = tasks[part].documents(split, BadRows(sys.maxsize))
            held[part] = next(streams[part])
