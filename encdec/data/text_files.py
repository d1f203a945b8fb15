"""Any text file as lines of UTF-8: compression, byte order mark and encoding are detected.

What is not text, or text in an encoding that can only be guessed, is refused by name: a guess
would become training data.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import pathlib
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from encdec.errors import DataError
from encdec.files import open_bytes

READ_BYTES = 1 << 20
# A look at this much tells what a file is.
HEAD_BYTES = 4096
# A compressed file in a compressed file is somebody's slip; deeper nesting is something else.
NESTED = 3
# Text in UTF-16 has a zero in every ASCII character, so in every space and line end.
ZEROS_OF_UTF16 = 0.05
ZEROS_OF_UTF32 = 0.5

# gzip's own line reading is Python code; the buffer that `_buffered` puts in front is not.
_OPENERS: dict[str, Callable[[BinaryIO], Any]] = {
    "gzip": lambda stream: gzip.GzipFile(fileobj=stream, mode="rb"),
    "bzip2": lambda stream: _Streams(stream, bz2.BZ2Decompressor),
    "xz": lambda stream: _Streams(stream, lzma.LZMADecompressor),
    "zstd": lambda stream: _zstd(stream),
}
_COMPRESSIONS = (
    (b"\x1f\x8b", "gzip"),
    (b"BZh", "bzip2"),
    (b"\xfd7zXZ\x00", "xz"),
    (b"\x5d\x00\x00", "xz"),  # lzma's older format, which the same decompressor reads
    (b"\x28\xb5\x2f\xfd", "zstd"),
)
ENDINGS = {
    ".gz": "gzip",
    ".bz2": "bzip2",
    ".xz": "xz",
    ".lzma": "xz",
    ".zst": "zstd",
    ".zstd": "zstd",
}
JSONL_ENDINGS = (".jsonl", ".ndjson", ".jsonlines")
# (first bytes, what it is): refused by name.
_OTHERS = (
    (b"PK\x03\x04", "a zip archive (.zip, .docx, .xlsx, .npz)"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"Rar!\x1a\x07", "a RAR archive"),
    (b"\x04\x22\x4d\x18", "compressed with lz4"),
    (b"LZIP\x01", "compressed with lzip"),
    (b"\x89LZO", "compressed with lzop"),
    (b"\x1f\x9d", "compressed with compress (.Z)"),
    (b"\xff\x06\x00\x00sNaPpY", "compressed with Snappy"),
    (b"%PDF-", "a PDF document"),
    (b"SQLite format 3\x00", "an SQLite database"),
    (b"\x89HDF", "an HDF5 file"),
    (b"\x80\x04\x95", "a Python pickle"),
)
# UTF-32's mark begins with UTF-16's.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


class BrokenStream(Exception):
    """A compressed stream, or a character, that breaks off or is corrupt; says which."""


def plain_name(path: str | pathlib.Path) -> str:
    """A file's name without the endings of compressions: "a.jsonl" for "x/a.jsonl.zst"."""
    name = pathlib.Path(path).name
    while (ending := pathlib.PurePath(name).suffix).lower() in ENDINGS:
        name = name.removesuffix(ending)
    return name


def open_lines(path: pathlib.Path) -> Iterator[bytes]:
    """Lines of a file in UTF-8, each with its end and none with a byte order mark.

    Read are UTF-8, UTF-16 and UTF-32 (the last two by their mark), plain or compressed with gzip,
    bzip2, xz or zstd, whatever the name.

    Raises:
        DataError: the content is not such text, or not what the name's ending says.
        BrokenStream: it breaks off; lines before were given.
    """
    if path.suffix.lower() == ".br":
        # Brotli's content begins with no mark.
        raise DataError(
            f"{path} has the name of a brotli file, which cannot be read; decompress it"
        )
    with open_bytes(path) as file:
        yield from utf8_lines(file, str(path), ENDINGS.get(path.suffix.lower()))


def utf8_lines(stream: BinaryIO, name: str, named: str | None = None) -> Iterator[bytes]:
    """``open_lines`` of an open stream; ``named`` is the compression that its name promises."""
    kind = None
    try:
        for depth in range(NESTED):
            stream = _buffered(stream)
            head = stream.peek(HEAD_BYTES)[:HEAD_BYTES]
            if depth == 0 and named and head and _compression(head) != named:
                raise DataError(
                    f"{name} has the name of a {named} file, but its content is not {named}; copy "
                    "it again, or rename it"
                )
            if not (found := _compression(head)):
                break
            kind, stream = found, _OPENERS[found](stream)
        else:
            raise DataError(f"{name} is compressed {NESTED} times over; decompress it")
        yield from _decoded(stream, head, name)
    except UnicodeDecodeError as error:
        raise BrokenStream(f"the {error.encoding} text is truncated ({error.reason})") from error
    except (EOFError, lzma.LZMAError, OSError, zlib.error) as error:
        # An error of the operating system has a number, one of a decompressor has none.
        if kind is None or getattr(error, "errno", None) is not None:
            raise
        raise BrokenStream(f"the {kind} stream is truncated or damaged ({error})") from error


class _Streams(io.RawIOBase):
    """The content of compressed streams one after another, with zeros between and behind them.

    The standard library's own files take anything else behind a stream for the end of the file,
    so that they lose what follows a damaged place. Here it raises the decompressor's error.
    """

    def __init__(self, file: BinaryIO, decompressor: Callable[[], Any]):
        self._file, self._make, self._now = file, decompressor, decompressor()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content = b""
        while not content:
            data = b""
            if self._now.eof:
                data = self._now.unused_data
                while not (data := data.lstrip(b"\0")):
                    if not (data := self._file.read(READ_BYTES)):
                        return 0
                self._now = self._make()
            elif self._now.needs_input and not (data := self._file.read(READ_BYTES)):
                raise EOFError("it ends before the mark of its end")
            content = self._now.decompress(data, len(buffer))
        buffer[: len(content)] = content
        return len(content)


def _buffered(stream: Any) -> io.BufferedReader:
    if isinstance(stream, io.BufferedReader):
        return stream
    return io.BufferedReader(stream, READ_BYTES)


def _compression(head: bytes) -> str | None:
    for mark, kind in _COMPRESSIONS:
        if head.startswith(mark):
            return kind
    # Parallel zstd writes a frame to be skipped first: 0x184D2A50 to 5F.
    return "zstd" if head[1:4] == b"\x2a\x4d\x18" and head[0] & 0xF0 == 0x50 else None


def _decoded(stream: io.BufferedReader, head: bytes, name: str) -> Iterator[bytes]:
    for mark, encoding in _MARKS:
        if head.startswith(mark):
            stream.read(len(mark))
            # Half characters pass, to be named by line as the invalid UTF-8 that they become.
            text = io.TextIOWrapper(stream, encoding, "surrogatepass", newline="\n")
            return (line.encode("utf-8", "surrogatepass") for line in text)
    _refuse_other(head, name)
    while head.startswith(codecs.BOM_UTF8):
        stream.read(len(codecs.BOM_UTF8))
        head = head.removeprefix(codecs.BOM_UTF8)
    return iter(stream)


def _refuse_other(head: bytes, name: str) -> None:
    what = next((what for mark, what in _OTHERS if head.startswith(mark)), None)
    if head[257:262] == b"ustar":
        what = "a tar archive"
    if what:
        raise DataError(
            f"{name} is {what}; give text or JSONL, plain or compressed with gzip, bzip2, xz or "
            "zstd"
        )
    zeros = head.count(0)
    if zeros < ZEROS_OF_UTF16 * len(head) or not zeros:
        return
    if zeros > ZEROS_OF_UTF32 * len(head):
        raise DataError(
            f"{name} is UTF-32 without a byte order mark, or not text; save it as UTF-8"
        )
    odd = head[1::2].count(0)
    if max(odd, zeros - odd) > 0.95 * zeros:
        order = "LE" if odd > zeros - odd else "BE"
        raise DataError(
            f"{name} looks like UTF-16{order} without a byte order mark; save it as UTF-8 (iconv "
            f"-f UTF-16{order} -t UTF-8)"
        )


def _zstd(stream: BinaryIO) -> Any:
    try:
        # With tensorflow-datasets; nothing lighter that all supported Pythons have reads zstd.
        import pyarrow
    except ImportError as error:
        raise DataError(
            "the file is compressed with zstd; install pyarrow to read it, or decompress it with "
            "unzstd"
        ) from error
    return pyarrow.CompressedInputStream(pyarrow.PythonFile(stream, mode="r"), "zstd")
