"""Files that processes may be killed over: JSON lines that grow, texts that are whole or absent."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any


def whole_lines(path: pathlib.Path) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, line with its end); what a killed process left of its last is left out.

    Lines end at line feeds alone: JSON may hold the separators that Unicode knows besides.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.endswith(b"\n"):
                yield number, line


def append_rows(path: pathlib.Path, rows: Iterable[Any]) -> None:
    """Appends JSON lines behind the last whole one; on disk on return."""
    with open(path, "a+b") as file:
        file.truncate(_whole_size(file))
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _whole_size(file: Any) -> int:
    """Bytes up to the end of the last whole line, read from the end."""
    size = file.seek(0, os.SEEK_END)
    while size:
        begin = max(0, size - (1 << 16))
        file.seek(begin)
        place = file.read(size - begin).rfind(b"\n")
        if place >= 0:
            return begin + place + 1
        size = begin
    return 0


def write_whole(path: pathlib.Path, text: str) -> None:
    """Writes a text file that is there in full or not at all, whoever else writes it meanwhile."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
