"""Files of inputs, and files of answers that a later call of the same command continues."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from encdec.buckets import is_address, objects, remove_objects
from encdec.data.readers import STDIN, BadRows, check_fields, check_files, located_rows, read_lines
from encdec.data.tables import Fault, table_kind
from encdec.data.text_files import ENDINGS, JSONL_ENDINGS, plain_name
from encdec.errors import ConfigError, DataError
from encdec.files import PARTS, append_rows, lines_exist, whole_lines, write_bytes, write_json
from encdec.inference.generator import Generation
from encdec.jobs import check_settings, stored_rows, writing_rows

if TYPE_CHECKING:
    from etils import epath


def read_inputs(path: str, file_format: str | None = None) -> list[str]:
    """The texts of a file, one per line or row; ``-`` is standard input.

    Args:
        path: rows with the field ``source`` (JSONL, CSV, TSV, Parquet, Arrow), or plain text; a
            folder or pattern of such files.
        file_format: "jsonl" (rows) or "text"; by default as the file's name and content say, text
            for ``-``.

    Raises:
        DataError: no such file, a line that is empty, not UTF-8 or without ``source``.
    """
    texts = []
    for file in check_files([path]):
        for where, text in _texts(file, file_format, "standard input" if path == STDIN else None):
            if not text.strip():
                raise DataError(f"{where}: the text is empty; delete the line")
            texts.append(text)
    if not texts:
        raise DataError(f"{path} has no text; write one input per line")
    return texts


def _texts(
    file: pathlib.Path, file_format: str | None, shown: str | None
) -> Iterator[tuple[str, str]]:
    """(where it is, text) of each input of a file, which messages call ``shown``."""
    if file_format is None:
        named = plain_name(file).lower().endswith((*JSONL_ENDINGS, ".json"))
        file_format = "jsonl" if named or table_kind(file) else "text"
    if file_format == "jsonl":
        for where, row, line in located_rows(file, ("source",), BadRows()):
            where = where.replace(str(file), shown, 1) if shown else where
            if isinstance(row, Fault):
                raise DataError(f"{where}: {row.reason}; {row.remedy}")
            if fault := check_fields(row, ("source",), line):
                raise DataError(f"{where}: {fault.reason}; {fault.remedy}")
            yield where, row["source"]
        return
    for number, line in read_lines(file, BadRows()):
        where = f"{shown or file}:{number}"
        try:
            yield where, line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{where}: invalid UTF-8: byte 0x{line[error.start]:02x} at position "
                f"{error.start}; save it as UTF-8"
            ) from None


def rows_of(
    number: int, source: str, answers: Sequence[Generation], *, log_probs: bool
) -> list[dict[str, Any]]:
    """The output lines of one input: one for each answer."""
    rows = []
    for sample, answer in enumerate(answers):
        row = {
            "index": number,
            "sample": sample,
            "of": len(answers),
            "source": source,
            "text": answer.text,
            "finish": answer.finish,
            "tokens": len(answer.tokens),
            "log_prob": round(sum(answer.log_probs), 6),
        }
        if answer.normalized_log_prob is not None:
            row["score"] = round(answer.normalized_log_prob, 6)
        if answer.truncated:
            row["source_truncated"] = True
        if log_probs:
            row["token_ids"] = answer.tokens
            row["token_log_probs"] = [round(value, 6) for value in answer.log_probs]
        rows.append(row)
    return rows


@dataclasses.dataclass
class ResumableOutput:
    """A JSONL file of answers in the order of the inputs, written a window at a time.

    Next to it, ``FILE.settings.json`` says which model and settings made it: a later call continues
    where the file ends if they are the same, and is refused if not. In a bucket the answers are
    objects of FILE.parts until all are there (``encdec.files``), and FILE at the end.

    Attributes:
        path: the file.
        identity: what must be equal for the file to be continued; plain JSON values.
        sources: all inputs.
    """

    path: pathlib.Path | epath.Path
    identity: dict[str, Any]
    sources: Sequence[str]

    @property
    def settings_path(self) -> pathlib.Path | epath.Path:
        return self.path.parent / f"{self.path.name}.settings.json"

    def done(self) -> int:
        """Inputs that are answered already; writes nothing.

        Raises:
            ConfigError: other settings or another model made the file.
            DataError: it answers other inputs, or is not a file of answers.
        """
        if self.path.suffix.lower() in ENDINGS:
            raise ConfigError(
                f"--out={self.path} cannot be continued when compressed; give a name without "
                f"{self.path.suffix}"
            )
        if not is_address(self.path) and not self.path.parent.is_dir():
            raise ConfigError(
                f"--out={self.path}: the directory {self.path.parent} does not exist; create it "
                "first"
            )
        if self.path.is_dir():
            raise ConfigError(f"--out={self.path} is a directory; give a file's name")
        if not self._begun():
            return 0
        remedy = "give another --out, or delete the file to start over"
        if not self.settings_path.exists():
            raise DataError(
                f"{self.path} exists, but not {self.settings_path.name}, which records its "
                f"settings; {remedy}"
            )
        check_settings(self.settings_path, self.identity, holder=self.path, remedy=remedy)
        answered = self._complete()[0]
        if answered > len(self.sources):
            raise DataError(
                f"{self.path} answers {answered} inputs, but there are only "
                f"{len(self.sources)}; {remedy}"
            )
        return answered

    def _complete(self) -> tuple[int, int]:
        """Inputs of which every answer is in the file, and the bytes that hold these answers."""
        answered = size = place = rows = 0
        answer = lambda row: (row["index"], row["source"], row["of"])
        for where, length, (index, source, of) in stored_rows(
            self.path, answer, "an answer written by this command", "give another --out"
        ):
            place += length
            if index == 0 and answered == len(self.sources) and is_address(self.path):
                break  # the parts that ``end`` had put together when it was killed
            if index != answered or (index < len(self.sources) and source != self.sources[index]):
                raise DataError(
                    f"{where} answers input {index} with source {source[:40]!r}, "
                    "which is not what the input has there; give another --out, or the input with "
                    "which the file was started"
                )
            rows += 1
            if rows == of:
                answered, size, rows = answered + 1, place, 0
        return answered, size

    def _begun(self) -> bool:
        """Whether there are answers: a process makes an empty file to hold it."""
        if is_address(self.path):
            return lines_exist(self.path)
        return self.path.exists() and self.path.stat().st_size > 0

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keeps other processes from writing the file within the block; ``done`` is asked in it.

        Raises:
            InUseError: another process writes it.
        """
        if not is_address(self.path):
            self.done()  # refuses what cannot be written before a file is made
        with writing_rows(self.path):
            yield

    def begin(self) -> None:
        """Makes the file ready to be appended to: settings next to it, no incomplete answers."""
        if not self._begun():
            write_json(self.settings_path, self.identity)
        elif not is_address(self.path):  # an object of a bucket holds whole answers
            os.truncate(self.path, self._complete()[1])

    def append(self, rows: Sequence[dict[str, Any]]) -> None:
        """Writes all rows of some inputs, on disk when this returns."""
        append_rows(self.path, rows, held=True)

    def end(self) -> None:
        """Makes one object of all answers in a bucket; nothing for a file, which is one."""
        if is_address(self.path) and (parts := objects(f"{self.path}{PARTS}")):
            content = b"".join(line for _, line in whole_lines(self.path))
            write_bytes(self.path, content[: self._complete()[1]])
            remove_objects(f"{self.path}{PARTS}", list(parts))
