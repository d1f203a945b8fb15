"""What is stored about a task's examples: JSON rows in one directory, a file for each share."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from encdec.files import append_rows, line_files
from encdec.jobs import stored_rows, writing_rows

REMEDY = "delete the file, or give another --out"

Row = TypeVar("Row")


@dataclasses.dataclass(frozen=True)
class ShareFiles:
    """Files of rows, which processes write share by share and read all together.

    Attributes:
        directory: of the task.
        name: how the files' names begin.
        what: a row, in messages.
    """

    directory: pathlib.Path
    name: str
    what: str

    def read(self, parse: Callable[[Any], Row]) -> Iterator[tuple[str, Row]]:
        """(file and line, the row) of every share, however many wrote them; an unfinished last
        line is left out.

        Raises:
            DataError: a malformed line.
        """
        for path in line_files(self.directory, f"{self.name}-*.jsonl"):
            for where, _, row in stored_rows(path, parse, self.what, REMEDY):
                yield where, row

    def writing(self, shard: int) -> contextlib.AbstractContextManager[None]:
        """Keeps other processes from writing this share within the block.

        Raises:
            InUseError: another process writes it.
        """
        return writing_rows(self._file(shard))

    def append(self, shard: int, rows: Iterable[Any]) -> None:
        """Appends rows to a share, which is held; they are on disk on return."""
        append_rows(self._file(shard), rows, held=True)

    def _file(self, shard: int) -> pathlib.Path:
        return self.directory / f"{self.name}-{shard:05d}.jsonl"
