"""Tasks whose rows are files below a ``data_dir``, each made into a document by a preprocessor.

Files are looked for in the layouts of ``FileTask.find_files``; without a ``data_dir`` rows come
from what tensorflow-datasets has on this machine. Nothing is ever downloaded.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from encdec.data.objectives import Document, Objective, SequenceToSequence
from encdec.data.readers import (
    BadRows,
    check_fields,
    check_once,
    located_rows,
    read_lines,
    with_references,
)
from encdec.data.tables import DELIMITED, TABLE_ENDINGS, Fault
from encdec.data.text_files import ENDINGS, BrokenStream, open_lines, plain_name
from encdec.errors import DataError

# How files spell the three splits.
SPLIT_NAMES = {
    "train": ("train",),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test",),
}
COMPRESSED = ("", *ENDINGS)
# Files of rows, in the order in which they are looked for.
ROWS = (".jsonl", *DELIMITED, *TABLE_ENDINGS)

Row = dict[str, Any]
PAIRS = SequenceToSequence()
LENGTHS = (1024, 256)
_NAMES: set[str] = set()  # of all tasks below, so that none takes another's files


@dataclasses.dataclass(frozen=True)
class FileTask:
    """A data set: where its files are, what they hold and what an example of it is.

    ``fields`` are the row's own keys that ``document`` turns into a document. ``splits`` are the
    official ones with their examples (None: not fixed). ``tfds`` is its tensorflow-datasets name;
    ``pairs`` names the two parallel files of a split, "{split}" standing for its name.
    ``metrics`` are names of ``encdec.metrics.metric_registry``. ``fine_tune_steps`` are the most
    that configs/finetune.py takes (0: it has a default). ``lengths`` are the source and target
    tokens per row where ``prepare`` is given none.
    """

    name: str
    about: str
    fields: tuple[str, ...]
    document: Callable[[Row], Document | Fault]
    splits: Mapping[str, int | None]
    objective: Objective = PAIRS
    tfds: str | None = None
    tfds_splits: Mapping[str, str] = dataclasses.field(default_factory=dict)
    pairs: tuple[str, str] | None = None
    squad_json: bool = False
    metrics: tuple[str, ...] = ()
    fine_tune_steps: int = 0
    lengths: tuple[int, int] = LENGTHS

    def __post_init__(self) -> None:
        _NAMES.add(self.name)

    def origin(self, data_dir: str | None) -> dict[str, Any]:
        """Where the rows come from, for the card."""
        if data_dir is None:
            return {"tensorflow_datasets": self.tfds}
        found = {split: self.find_files(data_dir, split) for split in self.splits}
        return {"files": {split: [path.name for path in paths] for split, paths in found.items()}}

    def find_files(self, data_dir: str | pathlib.Path, split: str) -> list[pathlib.Path]:
        """Files of a split below ``data_dir``, in the first layout that has any; else none.

        Layouts: TASK/SPLIT.jsonl, TASK/SPLIT-*.jsonl, SPLIT/TASK.jsonl, SPLIT/TASK[._-]*.jsonl,
        TASK-SPLIT.jsonl, each also compressed or as CSV, TSV, Parquet or Arrow, and the data set's
        official files in TASK/.
        """
        return check_once(self._found(pathlib.Path(data_dir), split))

    def _found(self, root: pathlib.Path, split: str) -> list[pathlib.Path]:
        # train/qa_long.jsonl is not part of the task qa where there is a task qa_long.
        longer = tuple(one for one in _NAMES if one != self.name and one.startswith(self.name))
        for spelled in SPLIT_NAMES.get(split, (split,)):
            stems = [
                f"{self.name}/{spelled}",
                f"{self.name}/{spelled}-*",
                f"{spelled}/{self.name}",
                f"{spelled}/{self.name}[._-]*",
                f"{self.name}-{spelled}",
            ]
            for stem in stems:
                for kind in ROWS:
                    if found := sorted(
                        p
                        for end in COMPRESSED
                        for p in root.glob(f"{stem}{kind}{end}")
                        if p.parent.name == self.name or not p.name.startswith(longer)
                    ):
                        return found
            if self.squad_json and (
                found := sorted(
                    p
                    for end in COMPRESSED
                    for p in root.glob(f"{self.name}/{spelled}-v2.0*.json{end}")
                )
            ):
                return found
            if self.pairs:
                paths = [root / self.name / name.format(split=spelled) for name in self.pairs]
                if all(path.is_file() for path in paths):
                    return paths
        return []

    def read(self, data_dir: str | None, split: str, bad_rows: BadRows) -> Iterator[Document]:
        """Documents of a split; DataError naming what to put where if it has none."""
        if data_dir is None:
            return self._read_tfds(split)
        files = self.find_files(data_dir, split)
        if not files:
            others = [name for name in self.splits if self.find_files(data_dir, name)]
            raise DataError(
                f"no {split} split of {self.name} below {data_dir}; put it at "
                f"{self.name}/{split}.jsonl or {split}/{self.name}.jsonl (or compressed) with the "
                f"fields {', '.join(self.fields)}, or source and target"
                + (f"; there is {', '.join(others)} (--split)" if others else "")
            )
        kind = pathlib.Path(plain_name(files[0])).suffix
        if kind in ROWS:
            return self._read_rows(files, bad_rows)
        return self._read_squad(files) if kind == ".json" else self._read_pairs(files, bad_rows)

    def _read_rows(self, files: Sequence[pathlib.Path], bad_rows: BadRows) -> Iterator[Document]:
        for path in files:
            for where, row, line in located_rows(path, None, bad_rows):
                made = row if isinstance(row, Fault) else self._made(row, line)
                if isinstance(made, Fault):
                    bad_rows.add(where, made.reason, made.remedy)
                else:
                    yield made

    def _made(self, row: Row, line: bytes) -> Document | Fault:
        ready = self.objective.document_fields
        made = all(field in row for field in ready)
        # Answers are a list, which `document` checks.
        wanted = ready if made else [field for field in self.fields if field != "answers"]
        if fault := check_fields(row, wanted, line):
            return fault
        if not made:
            return self.document(row)
        document = tuple(row[field] for field in ready)
        if "targets" not in row:
            return document
        source, target = document
        return with_references(source, target, row["targets"])

    def _read_pairs(self, files: Sequence[pathlib.Path], bad_rows: BadRows) -> Iterator[Document]:
        lines = (read_lines(path, bad_rows) for path in files)
        for (number, first), (other, second) in itertools.zip_longest(*lines, fillvalue=(0, b"")):
            if number != other:
                raise DataError(
                    f"{files[0]} and {files[1]} have different numbers of lines "
                    f"(only one has line {number or other}); copy both again"
                )
            try:
                texts = [line.decode("utf-8").rstrip("\r\n") for line in (first, second)]
            except UnicodeDecodeError as error:
                bad_rows.add(
                    f"{files[0]}:{number}", f"invalid UTF-8: {error}", "save the files as UTF-8"
                )
            else:
                made = self.document(dict(zip(self.fields, texts)))
                if isinstance(made, Fault):
                    bad_rows.add(f"{files[0]}:{number}", made.reason, made.remedy)
                else:
                    yield made

    def _read_squad(self, files: Sequence[pathlib.Path]) -> Iterator[Document]:
        for path in files:
            try:
                articles = json.loads(b"".join(open_lines(path)))["data"]
                for article in articles:
                    for paragraph in article["paragraphs"]:
                        for question in paragraph["qas"]:
                            made = self.document({**question, "context": paragraph["context"]})
                            if isinstance(made, Fault):
                                raise ValueError(f"{made.reason}; {made.remedy}")
                            yield made
            except (ValueError, KeyError, TypeError, BrokenStream) as error:
                message = f"{path} is not in SQuAD's format ({error!r}); copy it again"
                raise DataError(message) from error

    def _read_tfds(self, split: str) -> Iterator[Document]:
        if not self.tfds:
            raise DataError(
                f"{self.name} is not in tensorflow-datasets; give its files with --data_dir=DIR "
                f"(DIR/{self.name}/{split}.jsonl with the fields {', '.join(self.fields)})"
            )
        from encdec.data.tfds_source import tfds_rows

        for row in tfds_rows(self.tfds, self.tfds_splits.get(split, split), self.name):
            made = self.document(row)
            if isinstance(made, Fault):
                raise DataError(
                    f"{self.tfds} has a row that {self.name} cannot read: {made.reason}"
                )
            yield made
