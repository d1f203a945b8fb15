"""Local files to documents, every fault named by file and line.

A fault is a bad row: it is counted and, beyond the number allowed, stops the preparation before
anything is published. gzip is told by the name's ``.gz``.
"""

from __future__ import annotations

import dataclasses
import gzip
import io
import json
import pathlib
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

from encdec.data.objectives import Document
from encdec.errors import DataError

# Enough to mend a file by; the count goes on.
NAMED_BAD_ROWS = 10_000
# A plain text file is cut at a line's end about here, so that files of any size stream.
DOCUMENT_BYTES = 1 << 20
READ_BYTES = 1 << 20


@dataclasses.dataclass
class BadRows:
    """Counts and names faults ("FILE:LINE: REASON") and refuses the one too many.

    Attributes:
        allowed: by the command's --max_bad_rows; None where it has none, and no fault is allowed.
        count: of faults met.
        named: the first of them.
    """

    allowed: int | None = None
    count: int = 0
    named: list[str] = dataclasses.field(default_factory=list)

    def add(self, where: str, reason: str, mend: str) -> None:
        """Note one fault; DataError naming it where more than `allowed` were met."""
        self.count += 1
        if len(self.named) < NAMED_BAD_ROWS:
            self.named.append(f"{where}: {reason}")
        if self.allowed is None:
            raise DataError(f"{where}: {reason}; {mend}")
        if self.count > self.allowed:
            before = f" ({self.count} bad rows, {self.allowed} allowed)" if self.allowed else ""
            raise DataError(
                f"{where}: {reason}{before}; {mend}, or let bad rows be left out and counted with "
                f"--max_bad_rows={max(10, 2 * self.count)}"
            )

    def listing(self) -> str:
        """A line for each fault, for a file beside the records."""
        lines = [line.replace("\n", "\\n") for line in self.named]
        if more := self.count - len(lines):
            lines.append(f"and {more:,} more")
        return "".join(f"{line}\n" for line in lines)


@dataclasses.dataclass(frozen=True)
class Fault:
    """Why a row is bad, and what mends it."""

    reason: str
    mend: str


def check_files(paths: Sequence[str | pathlib.Path]) -> list[pathlib.Path]:
    """The paths, each one an existing file; DataError for the first that is not."""
    files = [pathlib.Path(path) for path in paths]
    if not files:
        raise DataError("no input file given")
    for file in files:
        if not file.is_file():
            raise DataError(f"input file {file} not found; give existing files")
    return files


def read_lines(path: pathlib.Path, bad_rows: BadRows) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, line with its end); a truncated gzip is one bad row at its end."""
    number = 0
    with _open(path) as file:
        try:
            for number, line in enumerate(file, 1):
                yield number, line
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            bad_rows.add(
                f"{path}:{number + 1}", f"the gzip stream breaks off ({error})", "copy it again"
            )
    if number == 0:
        bad_rows.add(f"{path}:1", "the file is empty", "give a file with text in it")


def read_jsonl(
    path: pathlib.Path, fields: Sequence[str], bad_rows: BadRows
) -> Iterator[dict[str, Any]]:
    """Rows that have all `fields` as strings and, if there, `targets` as a list of strings."""
    for number, line in read_lines(path, bad_rows):
        row = parse_row(line, fields)
        if isinstance(row, Fault):
            bad_rows.add(f"{path}:{number}", row.reason, row.mend)
        else:
            yield row


def parse_row(line: bytes, fields: Sequence[str]) -> dict[str, Any] | Fault:
    """One JSONL line as a checked row, or what is wrong with it."""
    if not line.strip():
        return Fault("the line is empty", "delete the line")
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return _bad_utf8(line, error)
    except (ValueError, RecursionError) as error:
        return Fault(f"no valid JSON: {error}", "write one JSON object a line")
    if not isinstance(row, dict):
        return Fault(f"a JSON {type(row).__name__}, wanted an object", "write {...} on the line")
    return check_fields(row, fields, line) or row


def check_fields(row: dict[str, Any], fields: Sequence[str], line: bytes) -> Fault | None:
    """What is wrong with a row that wants `fields` as texts; `line` is what it was read from."""
    # Half characters come by escapes alone: UTF-8 has none.
    escaped = b"\\u" in line
    for field in fields:
        if field not in row:
            keys = ", ".join(sorted(map(repr, row))[:8]) or "none"
            return Fault(f"no {field!r} (keys: {keys})", f"add the field {field!r}")
        if fault := _check_text(field, row[field], escaped):
            return fault
    if "targets" in row:
        targets = row["targets"]
        if not isinstance(targets, list) or not targets:
            return Fault(f"'targets' is {_shown(targets)}, wanted a list of strings", "give a list")
        for target in targets:
            if fault := _check_text("targets", target, escaped):
                return fault
    return None


def _bad_utf8(line: bytes, error: UnicodeDecodeError) -> Fault:
    seen = f"0x{line[error.start]:02x}"
    return Fault(f"invalid UTF-8: byte {seen} at byte {error.start}", "save the file as UTF-8")


def _check_text(field: str, value: Any, escaped: bool) -> Fault | None:
    if not isinstance(value, str):
        return Fault(f"{field!r} is {_shown(value)}, wanted a string", f"give {field!r} as text")
    if not escaped:
        return None
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        return Fault(
            f"{field!r} has a lone surrogate at character {error.start}",
            "remove the half character",
        )
    return None


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return f"{type(value).__name__} {text[:40]}{'...' if len(text) > 40 else ''}"


def pair_documents(paths: Sequence[pathlib.Path], bad_rows: BadRows) -> Iterator[Document]:
    """(source, target, further references if any) of every row of JSONL files."""
    for path in paths:
        for row in read_jsonl(path, ("source", "target"), bad_rows):
            yield with_references(row["source"], row["target"], row.get("targets", ()))


def with_references(source: str, target: str, references: Sequence[str]) -> Document:
    """The pair, then every other reference once."""
    others = dict.fromkeys(text for text in references if text != target)
    return source, target, *others


def text_documents(paths: Sequence[pathlib.Path], bad_rows: BadRows) -> Iterator[Document]:
    """(text,) of every document: a plain text file is one, a ``.jsonl`` has one in `text` a row."""
    for path in paths:
        if path.name.removesuffix(".gz").endswith(".jsonl"):
            for row in read_jsonl(path, ("text",), bad_rows):
                yield (row["text"],)
        else:
            yield from _plain_documents(path, bad_rows)


def _plain_documents(path: pathlib.Path, bad_rows: BadRows) -> Iterator[Document]:
    held: list[str] = []
    size = 0
    for number, line in read_lines(path, bad_rows):
        try:
            held.append(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            fault = _bad_utf8(line, error)
            bad_rows.add(f"{path}:{number}", fault.reason, fault.mend)
        size += len(line)
        if size >= DOCUMENT_BYTES:
            yield ("".join(held),)
            held, size = [], 0
    if held:
        yield ("".join(held),)


def _open(path: pathlib.Path) -> BinaryIO:
    if not path.name.endswith(".gz"):
        return open(path, "rb")
    # gzip's own line reading is Python code; a buffer in front of it is not.
    return io.BufferedReader(gzip.open(path, "rb"), READ_BYTES)
