"""Files that survive kills: written atomically, and JSON lines that are appended to."""

from __future__ import annotations

import contextlib
import fcntl
import fnmatch
import hashlib
import io
import json
import os
import pathlib
import secrets
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from encdec import buckets
from encdec.buckets import is_address
from encdec.errors import InUseError
from encdec.logs import logger

if TYPE_CHECKING:
    from etils import epath

_LOG = logger(__name__)

PARTIAL = ".partial"
PARTS = ".parts"  # a bucket's objects do not grow: lines are appended as objects of DIR/NAME.parts


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """A path to write to, which becomes ``path`` when the body ends: in full or not at all.

    Several processes may write the same file; the last one stays. What a killed one leaves ends
    in PARTIAL: ``clear_partial``.
    """
    if is_address(path):
        with tempfile.TemporaryDirectory(prefix="encdec-") as folder:
            partial = pathlib.Path(folder) / os.fspath(path).rpartition("/")[2]
            yield partial
            buckets.send_file(partial, path)
        return
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
    if is_address(path):
        buckets.write_bytes(path, content)
        return
    with whole_file(path) as partial:
        partial.write_bytes(content)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """``write_bytes`` of UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """``write_text`` of indented JSON."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def clear_partial(directory: pathlib.Path | epath.Path) -> None:
    """Delete what killed processes left unfinished; for when nobody writes into ``directory``.

    In a bucket nothing is: objects are whole.
    """
    if is_address(directory):
        return
    for path in directory.glob(f"*{PARTIAL}"):
        path.unlink(missing_ok=True)


def file_size(path: pathlib.Path | epath.Path) -> int:
    """Bytes of a file on this machine or in a bucket."""
    status: Any = path.stat()
    return status.length if is_address(path) else status.st_size


def file_sha256(path: str | os.PathLike[str]) -> str:
    """sha256 of a file's bytes, in hexadecimal."""
    with open_bytes(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_bytes(path: str | os.PathLike[str]) -> Any:
    """A file on this machine or in a bucket, open to be read."""
    if is_address(path):
        return buckets.file_system(path).open(os.fspath(path), "rb")
    return open(path, "rb")


def whole_lines(path: pathlib.Path | epath.Path) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, line with its end); what a killed process left of its last is left out.

    Lines end at line feeds alone: JSON may hold the separators that Unicode has as well.
    Of a file in a bucket, or copied from one, the lines that were appended follow its own.

    Raises FileNotFoundError where there are neither.
    """
    number = 0
    for content in _contents(path):
        for line in content:
            if line.endswith(b"\n"):
                number += 1
                yield number, line


def _contents(path: pathlib.Path | epath.Path) -> Iterator[Iterable[bytes]]:
    """The lines of a file and of what was appended to it in a bucket, in order."""
    text = os.fspath(path)
    if not is_address(path):
        files = sorted(pathlib.Path(text + PARTS).glob("*.jsonl"))
        for one in [path, *files] if os.path.exists(path) or not files else files:
            with open(one, "rb") as file:
                yield file
        return
    parts = sorted(buckets.objects(text + PARTS))
    try:
        yield io.BytesIO(buckets.read_bytes(text))
    except FileNotFoundError:
        if not parts:
            raise
    for content in buckets.read_many([f"{text}{PARTS}/{name}" for name in parts]):
        yield io.BytesIO(content)


def line_files(directory: pathlib.Path | epath.Path, pattern: str) -> list[Any]:
    """The files of a directory that ``whole_lines`` reads, whose names match, in order."""
    if is_address(directory):
        names = {name.partition("/")[0] for name in buckets.objects(directory)}
    else:
        names = {path.name for path in directory.iterdir()} if directory.is_dir() else set()
    names = {name.removesuffix(PARTS) for name in names}
    return [directory / name for name in sorted(names) if fnmatch.fnmatchcase(name, pattern)]


def lines_exist(path: pathlib.Path | epath.Path) -> bool:
    """Whether ``whole_lines`` has something to read."""
    text = os.fspath(path)
    if is_address(path):
        return bool(buckets.objects(text + PARTS)) or path.is_file()
    return os.path.exists(text) or any(pathlib.Path(text + PARTS).glob("*.jsonl"))


def append_rows(
    path: pathlib.Path | epath.Path, rows: Iterable[Any], *, held: bool = False
) -> None:
    """Appends JSON lines behind the last whole one; on disk on return.

    Several processes may do this at once; on a disk they take turns, unless the caller has ``held``
    the file by ``sole_writer``. In a bucket the lines become one object of their own.
    """
    content = b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)
    if is_address(path):
        if content:
            buckets.write_bytes(part_name(path), content)
        return
    with open(path, "a+b") as file:
        if not held:  # between the two another process's line would be cut off
            _lock(file.fileno(), wait=True)
        file.truncate(_whole_size(file))
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def part_name(path: str | os.PathLike[str]) -> str:
    """The address of a new part of ``path``, behind all that are there."""
    return f"{os.fspath(path)}{PARTS}/{time.time_ns():020d}-{secrets.token_hex(4)}.jsonl"


def keep_lines(path: pathlib.Path | epath.Path, keep: Callable[[bytes], bool]) -> None:
    """Drops the lines of a file, and of its parts, that ``keep`` refuses."""
    text = os.fspath(path)
    contents: Iterable[tuple[str, bytes]]
    if is_address(path):
        parts = [f"{text}{PARTS}/{name}" for name in buckets.objects(text + PARTS)]
        parts += [text] * path.is_file()
        contents = zip(parts, buckets.read_many(parts))
    else:
        files = [pathlib.Path(text), *pathlib.Path(text + PARTS).glob("*.jsonl")]
        contents = ((str(file), file.read_bytes()) for file in files if file.exists())
    for part, content in contents:
        lines = list(io.BytesIO(content))
        kept = [line for line in lines if line.endswith(b"\n") and keep(line)]
        if len(kept) == len(lines):
            continue
        if kept or part == text:
            write_bytes(part, b"".join(kept))
        elif is_address(part):
            buckets.remove_objects(part, [""])
        else:
            os.unlink(part)


class LineAppender:
    """Appends lines one at a time; each is on disk, or in the bucket, on return.

    In a bucket the lines since the last whole part are one object, which is written again with
    each line and closed at PART_LINES, so that a line costs one request of bounded size.
    """

    PART_LINES = 128

    def __init__(self, path: pathlib.Path | epath.Path):
        self._path, self._part = path, ""
        self._lines: list[bytes] = []

    def append(self, row: Any) -> None:
        line = json.dumps(row).encode() + b"\n"
        if not is_address(self._path):
            # Closed each time: in a mounted bucket a file's end is there only when it is closed.
            with open(self._path, "ab") as file:
                file.write(line)
            return
        if not self._part:
            self._part = part_name(self._path)
        self._lines.append(line)
        buckets.write_bytes(self._part, b"".join(self._lines))
        if len(self._lines) >= self.PART_LINES:
            self._part, self._lines = "", []


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


@contextlib.contextmanager
def sole_writer(
    path: str | os.PathLike[str],
    *,
    patience: float = 0.0,
    shown: str | os.PathLike[str] | None = None,
) -> Iterator[None]:
    """Holds a directory or file that the block writes and no other process may write meanwhile.

    The lock is on the directory or file itself, which exists, and ends with the process, however
    it ends. Buckets, and file systems without such locks (directories on NFS), are not protected.

    Args:
        path: what is written.
        patience: seconds to wait for a process that is about to end.
        shown: the path in messages; by default ``path``.

    Raises:
        InUseError: another process holds it.
    """
    if is_address(path):
        yield
        return
    shown, waits = shown or path, patience > 0
    end = time.monotonic() + patience
    while (descriptor := _locked(path)) is None:
        if time.monotonic() >= end:
            raise InUseError(
                f"{shown} is in use: another process is writing it; wait until that has ended, "
                "or give another path"
            )
        if waits:
            _LOG.info(f"{shown} is in use: waiting for the process that is writing it to end")
            waits = False
        time.sleep(0.1)
    try:
        if not _is_at(descriptor, path):
            raise InUseError(
                f"another process has just ended with {shown}, and moved or removed what it "
                "wrote; repeat the command"
            )
        yield
    finally:
        os.close(descriptor)


def _locked(path: str | os.PathLike[str]) -> int | None:
    """A descriptor that holds a directory or file; None where another process does."""
    descriptor = os.open(path, os.O_RDONLY if os.path.isdir(path) else os.O_RDWR)
    if _lock(descriptor):
        return descriptor
    os.close(descriptor)
    return None


def _is_at(descriptor: int, path: str | os.PathLike[str]) -> bool:
    """Whether what is open is still what has the path: a lock on anything else keeps nobody out."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _lock(descriptor: int, *, wait: bool = False) -> bool:
    """Whether an open file is locked now, or cannot be: some file systems have no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True
