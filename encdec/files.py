"""Files that processes may be killed over: whole or absent, and JSON lines that grow."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
import secrets
from collections.abc import Iterable, Iterator
from typing import Any

PARTIAL = ".partial"


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """A path to write to, which becomes ``path`` when the body ends: in full or not at all.

    Several processes may write the same file; the last one stays. What a killed one leaves ends
    in PARTIAL: ``clear_partial``.
    """
    path = pathlib.Path(path)
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}{PARTIAL}")
    try:
        yield partial
        with open(partial, "r+b") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file that is there in full or not at all; on disk on return."""
    with whole_file(path) as partial:
        partial.write_bytes(content)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """``write_bytes`` of UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """``write_text`` of indented JSON."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def clear_partial(directory: pathlib.Path) -> None:
    """Delete what killed processes left unfinished; for when nobody writes into ``directory``."""
    for path in directory.glob(f"*{PARTIAL}"):
        path.unlink(missing_ok=True)


def file_sha256(path: str | os.PathLike[str]) -> str:
    """sha256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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


@contextlib.contextmanager
def sole_process(path: pathlib.Path, *, wait: bool = False) -> Iterator[bool]:
    """Whether this process alone holds the lock file ``path``; with ``wait``, once it does.

    The lock ends with the process, however it ends; the file stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True
