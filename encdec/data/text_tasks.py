"""Tasks over text read in Python, without TensorFlow: what an example is, and where it is.

``seqio_registration`` registers each of them with seqio. ``prepare`` reads them here, since
checking every row by file and line and encoding in batches is not what tf.data does well.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from encdec.data import readers
from encdec.data.corpora import repair, stdlib
from encdec.data.file_tasks import LENGTHS, FileTask
from encdec.data.objectives import Document, Objective, PrefixLM, SequenceToSequence
from encdec.errors import ConfigError, DataError

PAIRS = SequenceToSequence()
# (split, bad rows) to documents.
ReadDocuments = Callable[[str, readers.BadRows], Iterator[Document]]


@dataclasses.dataclass(frozen=True)
class TextTask:
    """Documents of some splits and the objective that makes examples of them.

    ``origin`` tells the card where the text came from. A task without ``splits`` takes any name.
    ``read`` may give a pair more texts than the objective wants: further references for the
    ``metrics``, which are names of ``encdec.metrics.metric_registry``. ``fine_tune_steps`` are the
    most that configs/finetune.py takes (0: it has a default). ``lengths`` are the source and target
    tokens per row where ``prepare`` is given none. ``sized`` gives the task as it is for rows of
    (inputs, targets) tokens, where its documents depend on that.
    """

    name: str
    read: ReadDocuments
    objective: Objective = PAIRS
    origin: Callable[[], dict[str, Any]] = dict
    splits: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()
    about: str = ""
    fine_tune_steps: int = 0
    lengths: tuple[int, int] = LENGTHS
    sized: Callable[[int, int], TextTask] | None = None

    def row_lengths(self, inputs: int | None, targets: int | None) -> tuple[int, int]:
        """Source and target tokens per row, the task's own where they are not given."""
        return (
            self.lengths[0] if inputs is None else inputs,
            self.lengths[1] if targets is None else targets,
        )

    def at_lengths(self, inputs_length: int, targets_length: int) -> TextTask:
        """The task for rows of these lengths, in tokens."""
        return self.sized(inputs_length, targets_length) if self.sized else self

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


def jsonl_task(files: Sequence[str], fields: Sequence[str] = readers.PAIR_FIELDS) -> TextTask:
    """The user's own rows (``fields`` for source and target, optional ``targets``)."""
    paths = readers.check_files(files)
    named = {} if tuple(fields) == readers.PAIR_FIELDS else {"fields": list(fields)}
    return TextTask(
        "jsonl",
        lambda split, bad_rows: readers.pair_documents(paths, bad_rows, fields),
        PAIRS,
        lambda: {"files": [path.name for path in paths]} | named,
    )


def text_files_task(
    files: Sequence[str],
    objective: Objective | None = None,
    documents: str | None = None,
    field: str = readers.TEXT_FIELD,
) -> TextTask:
    """Plain text files, or rows with a text in ``field``, for pretraining.

    ``documents`` says what one is in a plain file (default "files"): ``readers.text_documents``.
    ConfigError where no file is plain and ``documents`` is given.
    """
    paths = readers.check_files(files)
    origin: dict[str, Any] = {"files": [path.name for path in paths]}
    if field != readers.TEXT_FIELD:
        origin["fields"] = [field]
    if not all(readers.has_rows(path, field) for path in paths):
        origin["documents"] = documents or readers.DOCUMENTS[0]
    elif documents:
        raise ConfigError(
            f"--documents={documents} is for plain text, but in these files each row is a "
            "document; leave it out"
        )
    return TextTask(
        "text",
        lambda split, bad_rows: readers.text_documents(
            paths, bad_rows, documents or readers.DOCUMENTS[0], field
        ),
        objective or PrefixLM(),
        lambda: origin,
    )


def bind_file_task(task: FileTask, data_dir: str | None = None) -> TextTask:
    """A task over the files below ``data_dir``, else over tensorflow-datasets."""
    return TextTask(
        task.name,
        lambda split, bad_rows: task.read(data_dir, split, bad_rows),
        task.objective,
        lambda: task.origin(data_dir),
        tuple(task.splits),
        task.metrics,
        task.about,
        task.fine_tune_steps,
        task.lengths,
    )


EMBEDDED_TASKS: dict[str, TextTask] = {
    task.name: task
    for task in (
        TextTask(
            "stdlib_code_summarization",
            lambda split, _: ((x["source"], x["target"]) for x in stdlib.stdlib_examples(split)),
            PAIRS,
            stdlib.origin,
            stdlib.SPLITS,
            ("exact_match", "rouge", "rouge_stemmed"),
            lengths=(512, 64),
        ),
        TextTask(
            "stdlib_repair",
            lambda split, _: iter(repair.repair_examples(split)),
            PAIRS,
            stdlib.origin,
            stdlib.SPLITS,
            ("exact_match", "rouge"),
        ),
        TextTask(
            "stdlib_text",
            lambda split, _: ((text,) for text in stdlib.stdlib_text(split)),
            PrefixLM(),
            stdlib.origin,
            stdlib.SPLITS,
            lengths=(512, 128),
        ),
    )
}
