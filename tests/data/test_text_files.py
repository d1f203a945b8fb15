"""Encodings, byte order marks and compressions, whatever a file is called."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import lzma

import pyarrow
import pytest

from encdec.data.readers import BadRows, has_rows, pair_documents, read_lines, text_documents
from encdec.data.text_files import plain_name, utf8_lines
from encdec.errors import DataError

TEXT = "Wörter, слова, 言葉 \N{GRINNING FACE}\nthe\ufeff second\r\n\nthird"
MARKED = {
    "utf-8": codecs.BOM_UTF8,
    "utf-16-le": codecs.BOM_UTF16_LE,
    "utf-16-be": codecs.BOM_UTF16_BE,
    "utf-32-le": codecs.BOM_UTF32_LE,
    "utf-32-be": codecs.BOM_UTF32_BE,
}


def zstd(data):
    """Two frames, the first one to be skipped, as parallel zstd writes them."""
    return b"\x50\x2a\x4d\x18\x02\0\0\0ab" + pyarrow.compress(data, "zstd", asbytes=True)


COMPRESSIONS = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "lzma": lambda data: lzma.compress(data, lzma.FORMAT_ALONE),
    "zst": zstd,
}


def lines_of(path):
    return [line for _, line in read_lines(path, BadRows())]


@pytest.mark.parametrize("encoding", MARKED)
def test_a_mark_is_no_text_and_tells_the_encoding(tmp_path, encoding):
    path = tmp_path / "a.txt"
    path.write_bytes(MARKED[encoding] + TEXT.encode(encoding))
    # A mark inside is the text's own character.
    assert lines_of(path) == TEXT.encode().splitlines(keepends=True)
    rows = [{"source": "ä", "target": f"{i}"} for i in range(3)]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(MARKED[encoding] + lines.encode(encoding))
    bad_rows = BadRows(9)
    assert len(list(pair_documents([path], bad_rows))) == 3 and bad_rows.count == 0


def test_marks_of_files_that_were_put_one_after_another_are_no_bad_rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    row = codecs.BOM_UTF8 + b'{"source": "a", "target": "b"}\n'
    path.write_bytes(codecs.BOM_UTF8 + row + row)
    assert list(pair_documents([path], BadRows())) == [("a", "b")] * 2


@pytest.mark.parametrize("encoding", [name for name in MARKED if name != "utf-8"])
@pytest.mark.parametrize("text", ["plain words and lines\n" * 9, "несколько слов и строк\n" * 9])
def test_wide_encodings_without_a_mark_are_named(tmp_path, encoding, text):
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode(encoding))
    wanted = encoding[:-3].upper()
    with pytest.raises(DataError, match=rf"a.txt .*{wanted}.* without a byte order mark"):
        list(text_documents([path], BadRows(99)))


def test_a_faulty_character_in_utf_16_is_a_bad_row_by_line(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(codecs.BOM_UTF16_LE + "a\n".encode("utf-16-le") + b"\0\xd8\x0a\0b\0")
    bad_rows = BadRows(1)
    assert list(text_documents([path], bad_rows)) == [("a\nb",)]
    assert "a.txt:2: invalid UTF-8" in bad_rows.named[0]
    path.write_bytes(codecs.BOM_UTF16_LE + "a\nb".encode("utf-16-le") + b"c")
    with pytest.raises(DataError, match=r"a.txt:\d: the utf-16-le text is truncated"):
        list(text_documents([path], BadRows()))


@pytest.mark.parametrize("ending", COMPRESSIONS)
def test_compressions_are_told_by_content(tmp_path, ending):
    data = ("line\n" * 3000 + TEXT).encode()
    packed = COMPRESSIONS[ending](data)
    for name in (f"a.txt.{ending}", "a.txt", "part-0001"):
        (tmp_path / name).write_bytes(packed)
        assert lines_of(tmp_path / name) == data.splitlines(keepends=True)
    # Frames one after another, a mark inside.
    twice = COMPRESSIONS[ending](codecs.BOM_UTF8 + b"one\n")
    if ending != "lzma":
        twice += COMPRESSIONS[ending](b"two\n")
        (tmp_path / "b").write_bytes(twice)
        assert lines_of(tmp_path / "b") == [b"one\n", b"two\n"]
        # What is neither a stream nor padding is a damaged one.
        (tmp_path / "b").write_bytes(twice + b"\0" * 512 * (ending not in ("gz", "zst")))
        assert lines_of(tmp_path / "b") == [b"one\n", b"two\n"]
    (tmp_path / "b").write_bytes(twice + b"damaged" + twice)
    with pytest.raises(DataError, match=r"b:\d+: the \w+ stream is truncated or damaged"):
        lines_of(tmp_path / "b")
    (tmp_path / "c").write_bytes(gzip.compress(packed))
    assert lines_of(tmp_path / "c") == data.splitlines(keepends=True)
    (tmp_path / "d").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(
        DataError, match=r"d:\d+: the \w+ stream is truncated or damaged .*copy it again"
    ):
        lines_of(tmp_path / "d")
    (tmp_path / f"e.{ending}").write_bytes(data)
    with pytest.raises(DataError, match=rf"e.{ending} has the name of a \w+ file, but its"):
        lines_of(tmp_path / f"e.{ending}")


OTHERS = {
    "a zip archive": b"PK\x03\x04rest",
    "compressed with lz4": b"\x04\x22\x4d\x18abc",
    "compressed with compress": b"\x1f\x9dabc",
    "a PDF document": b"%PDF-1.7\n",
    "a tar archive": gzip.compress(b"name".ljust(257, b"\0") + b"ustar\0"),
    "compressed 3 times over": gzip.compress(gzip.compress(gzip.compress(b"a"))),
}


@pytest.mark.parametrize("what", OTHERS)
def test_what_is_no_text_is_named(tmp_path, what):
    path = tmp_path / "a.txt"
    path.write_bytes(OTHERS[what])
    with pytest.raises(DataError, match=rf"a.txt is {what}"):
        lines_of(path)


def test_brotli_is_named_and_text_with_zeros_is_text(tmp_path):
    path = tmp_path / "a.txt.br"
    path.write_bytes(b"\x8b\x02\x80hello\x03")
    with pytest.raises(DataError, match=r"the name of a brotli file, .*; decompress it"):
        lines_of(path)
    assert list(utf8_lines(io.BytesIO(b"ab\0cd\0\0e\n"), "x")) == [b"ab\0cd\0\0e\n"]


def test_rows_are_told_by_name_or_by_the_first_line(tmp_path):
    assert plain_name("x/a.jsonl.zst") == "a.jsonl" and plain_name("b.txt.gz.gz") == "b.txt"
    row = b'{"text": "a"}\n'
    for name, content, wanted in (
        ("a.jsonl.xz", lzma.compress(row), True),
        ("a.ndjson", row, True),
        ("A.JSONL", b'{"content": "a"}\n', True),
        ("B.JSONL.XZ", lzma.compress(b'{"content": "a"}\n'), True),
        ("a.txt", codecs.BOM_UTF8 + row, True),
        ("b.json", b'{"source": "a", "target": "b"}\n', True),
        ("c.txt", b'{"license": "MIT"}\n', False),
        ("d.txt", b"{ braces }\n", False),
        ("e.txt", b"words\n" + row, False),
    ):
        (tmp_path / name).write_bytes(content)
        assert has_rows(tmp_path / name) == wanted, name
