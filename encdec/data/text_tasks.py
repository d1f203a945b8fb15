"""Tasks over text read in Python, without TensorFlow: what an example is, and where it is.

``tasks`` registers each of them with seqio. ``prepare`` reads them here, since checking every row
by file and line and encoding in batches is not what tf.data does well.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from encdec.data import readers
from encdec.data.corpora import repair, stdlib
from encdec.data.objectives import Document, Objective, PrefixLM, SequenceToSequence
from encdec.data.paper_tasks import PAPER_TASKS, PaperTask
from encdec.errors import ConfigError, DataError
from encdec.fields import did_you_mean
from encdec.storage import local

# (split, bad rows) to documents.
ReadDocuments = Callable[[str, readers.BadRows], Iterator[Document]]


@dataclasses.dataclass(frozen=True)
class TextTask:
    """Documents of some splits and the objective that makes examples of them.

    ``origin`` tells the card where the text came from. A task without ``splits`` takes any name.
    ``read`` may give a pair more texts than the objective wants: further references for the
    ``metrics``, which are names of ``encdec.metrics.registry``.
    """

    name: str
    read: ReadDocuments
    objective: Objective
    origin: Callable[[], dict[str, Any]]
    splits: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()

    def documents(self, split: str, bad_rows: readers.BadRows) -> Iterator[Document]:
        """Documents of a split in order; DataError where the split or a row is bad."""
        wanted = len(self.objective.document_fields)
        return (document[:wanted] for document in self._read(split, bad_rows))

    def examples(
        self, split: str, bad_rows: readers.BadRows
    ) -> Iterator[tuple[str, tuple[str, ...]]]:
        """(source, all references) of a split of pairs in order, for evaluation.

        DataError as for ``documents``, and where the task is raw text.
        """
        if self.objective.document_fields != ("source", "target"):
            raise DataError(f"task {self.name} is raw text; expected one with sources and targets")
        return ((document[0], document[1:]) for document in self._read(split, bad_rows))

    def _read(self, split: str, bad_rows: readers.BadRows) -> Iterator[Document]:
        if self.splits and split not in self.splits:
            raise DataError(f"split is {split!r}; task {self.name} has {', '.join(self.splits)}")
        return iter(self.read(split, bad_rows))


def jsonl_task(files: Sequence[str], objective: Objective | None = None) -> TextTask:
    """The user's own JSONL (``source``, ``target``, optional ``targets``)."""
    paths = readers.check_files(files)
    return TextTask(
        "jsonl",
        lambda split, bad_rows: readers.pair_documents(paths, bad_rows),
        objective or SequenceToSequence(),
        lambda: {"files": [path.name for path in paths]},
    )


def text_files_task(
    files: Sequence[str], objective: Objective | None = None, documents: str | None = None
) -> TextTask:
    """Plain text files, or JSONL with a ``text`` field, for pretraining.

    ``documents`` says what one is in a plain file (default "files"): ``readers.text_documents``.
    ConfigError where no file is plain and ``documents`` is given.
    """
    paths = readers.check_files(files)
    origin: dict[str, Any] = {"files": [path.name for path in paths]}
    if not all(map(readers.is_jsonl, paths)):
        origin["documents"] = documents or readers.DOCUMENTS[0]
    elif documents:
        raise ConfigError(
            f"--documents={documents} says what a document is in plain text, and all files are "
            "JSONL, where each row is one; leave it out"
        )
    return TextTask(
        "text",
        lambda split, bad_rows: readers.text_documents(
            paths, bad_rows, documents or readers.DOCUMENTS[0]
        ),
        objective or PrefixLM(),
        lambda: origin,
    )


def _stdlib_pairs(split: str, bad_rows: readers.BadRows) -> Iterator[Document]:
    for example in stdlib.stdlib_examples(split):
        yield example["source"], example["target"]


def _repair_pairs(split: str, bad_rows: readers.BadRows) -> Iterator[Document]:
    return iter(repair.repair_examples(split))


def _stdlib_text(split: str, bad_rows: readers.BadRows) -> Iterator[Document]:
    for text in stdlib.stdlib_text(split):
        yield (text,)


def bind_paper_task(task: PaperTask, data_dir: str | None = None) -> TextTask:
    """A task of the paper over the files below ``data_dir``, else over tensorflow-datasets."""
    return TextTask(
        task.name,
        lambda split, bad_rows: task.read(data_dir, split, bad_rows),
        task.objective,
        lambda: task.origin(data_dir),
        tuple(task.splits),
        task.metrics,
    )


EMBEDDED_TASKS: dict[str, TextTask] = {
    "stdlib_code_summarization": TextTask(
        "stdlib_code_summarization",
        _stdlib_pairs,
        SequenceToSequence(),
        stdlib.origin,
        stdlib.SPLITS,
        ("exact_match", "rouge", "rouge_stemmed"),
    ),
    "stdlib_repair": TextTask(
        "stdlib_repair",
        _repair_pairs,
        SequenceToSequence(),
        stdlib.origin,
        stdlib.SPLITS,
        ("exact_match", "rouge"),
    ),
    "stdlib_text": TextTask("stdlib_text", _stdlib_text, PrefixLM(), stdlib.origin, stdlib.SPLITS),
}
TEXT_TASKS: dict[str, TextTask] = {
    **EMBEDDED_TASKS,
    **{name: bind_paper_task(task) for name, task in PAPER_TASKS.items()},
}


def text_task(name: str, data_dir: str | None = None) -> TextTask:
    """A task by name, over its files below ``data_dir`` if given.

    DataError naming the nearest where there is none of that name.
    """
    if name not in TEXT_TASKS:
        hint = did_you_mean(name, TEXT_TASKS)
        raise DataError(f"no task {name!r}; there are {', '.join(TEXT_TASKS)}{hint}")
    if data_dir is None:
        return TEXT_TASKS[name]
    if name not in PAPER_TASKS:
        raise ConfigError(f"task {name} brings its own text; leave --data_dir={data_dir} out")
    data_dir = local("--data_dir", data_dir)
    if not pathlib.Path(data_dir).is_dir():
        raise DataError(f"--data_dir={data_dir} is no directory; give the one that holds {name}")
    return bind_paper_task(PAPER_TASKS[name], data_dir)
