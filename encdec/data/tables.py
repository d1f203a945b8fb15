"""Rows of tables: CSV and TSV with a header line, Parquet, Arrow, a folder of the datasets library.

What a file is its content says; of CSV and TSV, which have no mark, its name.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import pathlib
import struct
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from encdec.data.text_files import plain_name
from encdec.errors import DataError

Row = dict[str, Any]
DELIMITED = {".csv": ",", ".tsv": "\t"}
TABLE_ENDINGS = (".parquet", ".arrow", ".feather")
BATCH_ROWS = 1024
_MARKS = ((b"PAR1", "parquet"), (b"ARROW1", "arrow"))
_STREAM_MARK = b"\xff\xff\xff\xff"  # of an Arrow stream, before each message's size
# What the datasets library writes: a folder of shards, and a folder of such folders by split.
DATASET_STATE = "state.json"
DATASET_SPLITS = "dataset_dict.json"


@dataclasses.dataclass(frozen=True)
class Fault:
    """Why a row is bad, and what fixes it."""

    reason: str
    remedy: str


def table_kind(path: pathlib.Path) -> str | None:
    """ "csv", "tsv", "parquet", "arrow" or "arrow stream"; None for a file that is not a table."""
    ending = pathlib.PurePath(plain_name(path)).suffix.lower()
    if ending in DELIMITED:
        return ending[1:]
    with open(path, "rb") as file:
        head = file.read(8)
    for mark, kind in _MARKS:
        if head.startswith(mark):
            return kind
    # A message's size follows; -1 of it would be text in no encoding.
    if head.startswith(_STREAM_MARK) and len(head) == 8 and struct.unpack("<i", head[4:])[0] > 0:
        return "arrow stream"
    return None


def delimited_rows(
    lines: Iterable[tuple[int, bytes]], delimiter: str, name: str
) -> Iterator[tuple[int, Row | Fault]]:
    """(number of its last line, row) of CSV or TSV, whose first line names the fields.

    ``lines``, of the file ``name``, are numbered, in UTF-8, with their ends. Quotes are CSV's: a
    quoted cell may hold the delimiter, line ends and doubled quotes.
    """
    csv.field_size_limit(sys.maxsize)
    # Half characters pass, to be found below in their row.
    texts = (line.decode("utf-8", "surrogateescape") for _, line in lines)
    reader = csv.reader(texts, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        before = reader.line_num
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if header is None:  # the next line is not a header
                raise DataError(f"{name}:1: the header line: {error}; quote as CSV does") from None
            # A quote that nothing closes takes the lines after it along: each is a row lost.
            first, last = before + 1, reader.line_num
            reason = f"invalid CSV: {error}"
            if last > first:
                reason += f" (a cell with line ends from line {first} to {last})"
            for number in range(first, last + 1):
                yield number, Fault(reason, "quote cells as CSV does")
            continue
        if header is None:
            header = _header(cells, name)
        elif not cells:
            yield reader.line_num, Fault("the line is empty", "delete the line")
        elif len(cells) != len(header):
            yield (
                reader.line_num,
                Fault(
                    f"{len(cells)} cells, expected the header's {len(header)}",
                    "quote cells that hold the delimiter or a line end",
                ),
            )
        elif any(not _is_utf8(cell) for cell in cells):
            yield reader.line_num, Fault("invalid UTF-8", "save the file as UTF-8")
        else:
            yield reader.line_num, dict(zip(header, cells))


def _header(cells: Sequence[str], file: str) -> list[str]:
    names = [cell.strip() for cell in cells]
    if len(set(names)) != len(names):
        raise DataError(
            f"{file}:1: the header line {names} has a name twice; give every field a different name"
        )
    return names


def _is_utf8(text: str) -> bool:
    return not any("\udc80" <= character <= "\udcff" for character in text)


def arrow_rows(
    path: pathlib.Path, kind: str, wanted: Sequence[str] | None
) -> Iterator[tuple[int, Row]]:
    """(row from 1, row) of a Parquet or Arrow file in its order.

    Only the columns ``wanted`` and, if there, ``targets`` are read (None: all).

    Raises:
        DataError: a file that breaks off, or without one of the columns.
    """
    import pyarrow

    try:
        names, batches = _batches(path, kind, wanted)
        if missing := [name for name in wanted or () if name not in names]:
            raise DataError(
                f"{path} has no column {missing[0]!r} (columns: {', '.join(names[:8])}); name "
                "yours with --source_field, --target_field or --text_field"
            )
        number = 0
        for batch in batches:
            taken = _columns(names, wanted)
            for row in batch.select(taken).to_pylist():
                number += 1
                # A row without further references.
                yield number, {k: v for k, v in row.items() if v is not None or k != "targets"}
    except (pyarrow.ArrowException, OSError) as error:
        if getattr(error, "errno", None) is not None:
            raise
        raise DataError(
            f"{path} cannot be read as a {kind} table ({error}); copy it again"
        ) from None


def _columns(names: Sequence[str], wanted: Sequence[str] | None) -> list[str]:
    return [name for name in names if wanted is None or name in wanted or name == "targets"]


def _batches(path: pathlib.Path, kind: str, wanted: Sequence[str] | None):
    import pyarrow
    import pyarrow.parquet

    if kind == "parquet":
        file = pyarrow.parquet.ParquetFile(path)
        names = file.schema_arrow.names
        return names, file.iter_batches(BATCH_ROWS, columns=_columns(names, wanted))
    source = pyarrow.memory_map(str(path))
    if kind == "arrow":
        opened = pyarrow.ipc.open_file(source)
        batches = (opened.get_batch(i) for i in range(opened.num_record_batches))
        return opened.schema.names, batches
    opened = pyarrow.ipc.open_stream(source)
    return opened.schema.names, opened


def dataset_shards(folder: pathlib.Path) -> list[pathlib.Path] | None:
    """The Arrow files, in order, of a folder that the datasets library saved; None for another.

    Raises:
        DataError: it has several splits, each a folder of its own, or holds a selection of rows.
    """
    if (folder / DATASET_SPLITS).is_file():
        splits = json.loads((folder / DATASET_SPLITS).read_text())["splits"]
        raise DataError(
            f"{folder} has the splits {', '.join(splits)}; name one of the folders, such as "
            f"{folder / splits[0]}"
        )
    if not (folder / DATASET_STATE).is_file():
        return None
    state = json.loads((folder / DATASET_STATE).read_text())
    if state.get("_indices_data_files"):
        raise DataError(
            f"{folder} is a selection of rows by indices; call flatten_indices() before "
            "save_to_disk()"
        )
    return [folder / file["filename"] for file in state["_data_files"]]
