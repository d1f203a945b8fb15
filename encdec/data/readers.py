"""Local files to documents, every fault named by file and line.

A fault is a bad row: it is counted and, beyond the number allowed, stops the preparation before
anything is published. Compressions and byte order marks: ``text_files``.
"""

from __future__ import annotations

import atexit
import codecs
import dataclasses
import functools
import glob
import json
import os
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

from encdec import hub
from encdec.buckets import is_address
from encdec.data.objectives import Document
from encdec.data.tables import (
    DELIMITED,
    TABLE_ENDINGS,
    Fault,
    arrow_rows,
    dataset_shards,
    delimited_rows,
    table_kind,
)
from encdec.data.text_files import JSONL_ENDINGS, BrokenStream, open_lines, plain_name
from encdec.errors import ConfigError, DataError
from encdec.storage import as_path, on_this_machine, user_place

# Enough to fix a file by; further faults are only counted.
NAMED_BAD_ROWS = 10_000
# A plain text file is cut at a line's end about here, so that files of any size stream.
DOCUMENT_BYTES = 1 << 20
# What a document is in a plain text file; a row of JSONL always is one.
DOCUMENTS = ("files", "lines", "paragraphs")
STDIN = "-"
# What is taken of a folder that is named whole.
FOLDER_ENDINGS = (*JSONL_ENDINGS, *DELIMITED, *TABLE_ENDINGS, ".txt", ".text", ".md")
PAIR_FIELDS = ("source", "target")
TEXT_FIELD = "text"


@dataclasses.dataclass
class BadRows:
    """Counts and lists faults ("FILE:LINE: REASON"); raises an error above the number allowed.

    Attributes:
        allowed: by the command's --max_bad_rows; None where it has none, and no fault is allowed.
        count: of faults met.
        named: the first of them.
    """

    allowed: int | None = None
    count: int = 0
    named: list[str] = dataclasses.field(default_factory=list)

    def add(self, where: str, reason: str, remedy: str) -> None:
        """Note one fault; DataError naming it where more than ``allowed`` were met."""
        self.count += 1
        if len(self.named) < NAMED_BAD_ROWS:
            self.named.append(f"{where}: {reason}")
        if self.allowed is None:
            raise DataError(f"{where}: {reason}; {remedy}")
        if self.count > self.allowed:
            before = f" ({self.count} bad rows, {self.allowed} allowed)" if self.allowed else ""
            raise DataError(
                f"{where}: {reason}{before}; {remedy}, or let bad rows be "
                f"left out and counted with "
                f"--max_bad_rows={max(10, 2 * self.count)}"
            )

    def listing(self) -> str:
        """A line for each fault, for a file next to the records."""
        lines = [line.replace("\n", "\\n") for line in self.named]
        if more := self.count - len(lines):
            lines.append(f"and {more:,} more")
        return "".join(f"{line}\n" for line in lines)


def check_files(paths: Sequence[str | pathlib.Path]) -> list[pathlib.Path]:
    """The files that paths name: each a file, a folder of them, a pattern or "-".

    A folder gives what the datasets library saved in it, else its files of rows and text by name;
    a pattern is a shell's, "**" any depth; "-" is standard input, which is read to its end here.
    ``hf://`` addresses name files, folders and patterns of the Hub (``hub.data_files``).

    Raises:
        DataError: no file given, or none where a path says.
    """
    files: list[pathlib.Path] = []
    for path in paths:
        if hub.is_data(path):
            files += hub.data_files(os.fspath(path), lambda file: _ending(file) in FOLDER_ENDINGS)
            continue
        place = user_place("an input file", path)
        if is_address(place):
            try:
                place = os.fspath(on_this_machine(place))
            except FileNotFoundError:
                raise DataError(f"input file {place} not found; give an existing file") from None
        files += check_once(_expanded(place))
    if not files:
        raise DataError("no input files are given")
    return files


def check_once(files: list[pathlib.Path]) -> list[pathlib.Path]:
    """The files; DataError where one is there both compressed and not: its rows would be twice."""
    plain: dict[pathlib.Path, pathlib.Path] = {}
    for file in files:
        if (other := plain.setdefault(file.with_name(plain_name(file)), file)) != file:
            raise DataError(f"{other} and {file} are one file, compressed; remove one of them")
    return files


def _expanded(path: str) -> list[pathlib.Path]:
    place = pathlib.Path(path)
    if path == STDIN:
        return [_standard_input(sys.stdin)]
    if place.is_file():
        return [place]
    if place.is_dir():
        if (shards := dataset_shards(place)) is not None:
            return _existing(shards)
        found = sorted(
            file for file in place.iterdir() if file.is_file() and _ending(file) in FOLDER_ENDINGS
        )
        if not found:
            raise DataError(
                f"folder {place} holds no file of {', '.join(FOLDER_ENDINGS)} (also compressed); "
                "name files, or a pattern such as 'DIR/**/*.py'"
            )
        return found
    if glob.has_magic(path):
        found = sorted(
            file for file in map(pathlib.Path, glob.glob(path, recursive=True)) if file.is_file()
        )
        if not found:
            raise DataError(f"no file matches {path}; give a pattern of existing files")
        return found
    raise DataError(f"input file {place} not found; give existing files")


def _ending(file: str | pathlib.Path) -> str:
    return pathlib.PurePath(plain_name(file)).suffix.lower()


def _existing(files: Sequence[pathlib.Path]) -> list[pathlib.Path]:
    for file in files:
        if not file.is_file():
            raise DataError(f"input file {file} not found; copy the folder again")
    return list(files)


@functools.cache
def _standard_input(stream: TextIO) -> pathlib.Path:
    """A file with all of ``sys.stdin``, since text is read more than once; gone at the end."""
    folder = pathlib.Path(tempfile.mkdtemp(prefix="encdec-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    with open(folder / "standard_input", "wb") as file:
        shutil.copyfileobj(stream.buffer, file)
    return folder / "standard_input"


def read_lines(path: pathlib.Path, bad_rows: BadRows) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, line in UTF-8 with its end); a broken stream is one bad row at its end.

    Raises DataError for a file that holds no text: ``text_files.open_lines``.
    """
    number = 0
    try:
        for number, line in enumerate(open_lines(path), 1):
            yield number, line
    except BrokenStream as error:
        bad_rows.add(f"{path}:{number + 1}", str(error), "copy it again")
    else:
        if number == 0:
            bad_rows.add(f"{path}:1", "the file is empty", "give a file with text in it")


def has_rows(path: str | pathlib.Path, field: str = TEXT_FIELD) -> bool:
    """Whether a file holds rows, of JSONL or of a table: by its content or name, or its first line.

    That line must be an object with the ``field`` or with source and target, so that text with
    braces remains text.
    """
    if _ending(path) in JSONL_ENDINGS or table_kind(pathlib.Path(path)):
        return True
    first = next(read_lines(as_path(path), BadRows(1)), (1, b""))[1]
    try:
        row = json.loads(first) if first.lstrip().startswith(b"{") else None
    except (ValueError, RecursionError):
        return False
    return isinstance(row, dict) and (field in row or set(PAIR_FIELDS) <= row.keys())


def located_rows(
    path: pathlib.Path, wanted: Sequence[str] | None, bad_rows: BadRows
) -> Iterator[tuple[str, dict[str, Any] | Fault, bytes]]:
    """("FILE:LINE", row or what is wrong with it, the line it was) of a file of rows.

    Of Parquet and Arrow, which have no lines, a row's number stands for it and only the columns
    ``wanted`` (None: all), which must be there, and ``targets`` are read.
    """
    kind = table_kind(path)
    if kind is None:
        for number, line in read_lines(path, bad_rows):
            yield f"{path}:{number}", parse_row(line, ()), line
    elif kind in ("csv", "tsv"):
        lines = read_lines(path, bad_rows)
        for number, row in delimited_rows(lines, DELIMITED[f".{kind}"], str(path)):
            yield f"{path}:{number}", row, b""
    else:
        for number, row in arrow_rows(path, kind, wanted):
            yield f"{path}:row {number}", row, b""


def read_rows(
    path: pathlib.Path, fields: Sequence[str], bad_rows: BadRows
) -> Iterator[dict[str, Any]]:
    """Rows that have all ``fields`` as strings and, if there, ``targets`` as a list of strings."""
    for where, row, line in located_rows(path, fields, bad_rows):
        if isinstance(row, Fault):
            bad_rows.add(where, row.reason, row.remedy)
        elif fault := check_fields(row, fields, line):
            bad_rows.add(where, fault.reason, fault.remedy)
        else:
            yield row


class _Repeating(dict):
    """A JSON object with a name that comes twice, of which a dict keeps the last value alone."""

    def __init__(self, pairs: Sequence[tuple[str, Any]]):
        super().__init__(pairs)
        names = [name for name, _ in pairs]
        self.repeated = {name for name in self if names.count(name) > 1}


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    return row if len(row) == len(pairs) else _Repeating(pairs)


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def parse_row(line: bytes, fields: Sequence[str]) -> dict[str, Any] | Fault:
    """One JSONL line as a checked row, or what is wrong with it."""
    # Files with a mark each, put one after another, have marks inside.
    line = line.removeprefix(codecs.BOM_UTF8)
    if not line.strip():
        return Fault("the line is empty", "delete the line")
    try:
        row = _DECODER.decode(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return _bad_utf8(line, error)
    except (ValueError, RecursionError) as error:
        return Fault(f"invalid JSON: {error}", "write one JSON object per line")
    if not isinstance(row, dict):
        return Fault(f"a JSON {type(row).__name__}, expected an object", "write {...} on the line")
    return check_fields(row, fields, line) or row


def check_fields(row: dict[str, Any], fields: Sequence[str], line: bytes) -> Fault | None:
    """What is wrong with a row that needs ``fields`` as texts, read from ``line``."""
    # Half characters come by escapes alone: UTF-8 has none.
    escaped = b"\\u" in line
    repeated = row.repeated if isinstance(row, _Repeating) else ()
    for field in (*fields, "targets"):
        if field in repeated:
            return Fault(f"{field!r} is there twice in the object", "leave one of the two out")
    for field in fields:
        if field not in row:
            keys = ", ".join(sorted(map(repr, row))[:8]) or "none"
            return Fault(f"no {field!r} (keys: {keys})", f"add the field {field!r}")
        if fault := _check_text(field, row[field], escaped):
            return fault
    if "targets" in row:
        targets = row["targets"]
        if not isinstance(targets, list) or not targets:
            return Fault(
                f"'targets' is {_shown(targets)}, expected a list of strings", "give a list"
            )
        for target in targets:
            if fault := _check_text("targets", target, escaped):
                return fault
    return None


def _bad_utf8(line: bytes, error: UnicodeDecodeError) -> Fault:
    seen = f"0x{line[error.start]:02x}"
    return Fault(f"invalid UTF-8: byte {seen} at position {error.start}", "save the file as UTF-8")


def _check_text(field: str, value: Any, escaped: bool) -> Fault | None:
    if not isinstance(value, str):
        return Fault(f"{field!r} is {_shown(value)}, expected a string", f"give {field!r} as text")
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
    text = json.dumps(value, default=str)
    return f"{type(value).__name__} {text[:40]}{'...' if len(text) > 40 else ''}"


def pair_documents(
    paths: Sequence[pathlib.Path], bad_rows: BadRows, fields: Sequence[str] = PAIR_FIELDS
) -> Iterator[Document]:
    """(source, target, further references if any) of every row of files, from these ``fields``."""
    source, target = fields
    for path in paths:
        for row in read_rows(path, fields, bad_rows):
            yield with_references(row[source], row[target], row.get("targets", ()))


def with_references(source: str, target: str, references: Sequence[str]) -> Document:
    """The pair, then every other reference once."""
    others = dict.fromkeys(text for text in references if text != target)
    return source, target, *others


def text_documents(
    paths: Sequence[pathlib.Path],
    bad_rows: BadRows,
    documents: str = "files",
    field: str = TEXT_FIELD,
) -> Iterator[Document]:
    """(text,) of every document: each row's ``field``, in plain text as ``documents`` says.

    "files": a file is one, cut at a line's end after each DOCUMENT_BYTES. "lines": each line
    without its end. "paragraphs": lines between blank ones. Blank lines are no documents.
    """
    if documents not in DOCUMENTS:
        raise ConfigError(f"documents is {documents!r}; expected one of {', '.join(DOCUMENTS)}")
    for path in paths:
        if has_rows(path, field):
            for row in read_rows(path, (field,), bad_rows):
                yield (row[field],)
        else:
            for text in _plain_documents(path, bad_rows, documents):
                yield (text,)


def _plain_documents(path: pathlib.Path, bad_rows: BadRows, documents: str) -> Iterator[str]:
    held: list[str] = []
    size = 0
    for number, line in read_lines(path, bad_rows):
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            fault = _bad_utf8(line, error)
            bad_rows.add(f"{path}:{number}", fault.reason, fault.remedy)
            continue
        blank = documents != "files" and not text.strip()
        if not blank:
            held.append(text)
            size += len(line)
        if blank or documents == "lines" or size >= DOCUMENT_BYTES:
            yield from _joined(held, documents)
            held, size = [], 0
    yield from _joined(held, documents)


def _joined(lines: list[str], documents: str) -> Iterator[str]:
    if lines:
        text = "".join(lines)
        yield text if documents == "files" else text.removesuffix("\n").removesuffix("\r")
