"""Faults of input files, each named by file, line and remedy."""

from __future__ import annotations

import gzip
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from encdec.data import readers
from encdec.data.readers import BadRows, Fault, pair_documents, parse_row, text_documents
from encdec.data.text_tasks import text_files_task
from encdec.errors import ConfigError, DataError

GOOD = b'{"source": "a", "target": "b"}'

BAD_LINES = {
    "the line is empty.*delete the line": b"",
    "the line is empty": b"   ",
    "invalid JSON": b'{"source": "a", ',
    "'source' is there twice": b'{"source": "a", "source": "b", "target": "c"}',
    "'targets' is there twice": b'{"source": "a", "targets": [], "target": "c", "targets": ["d"]}',
    "a JSON list, expected an object": b"[1]",
    r"no 'target' \(keys: 'source'\).*add the field 'target'": b'{"source": "a"}',
    r"no 'source' \(keys: none\)": b"{}",
    "'source' is int 3, expected a string": b'{"source": 3, "target": "b"}',
    "'target' is NoneType null, expected a string": b'{"source": "a", "target": null}',
    "invalid UTF-8: byte 0xff at position 12.*save the file as UTF-8": b'{"source": "\xff"}',
    "'source' has a lone surrogate at character 1": (b'{"source": "a\\ud800", "target": "b"}'),
    "'targets' is str \"b\", expected a list": b'{"source": "a", "target": "b", "targets": "b"}',
    "'targets' is int 1, expected a string": b'{"source": "a", "target": "b", "targets": ["b", 1]}',
    r"'targets' is list \[\], expected a list": b'{"source": "a", "target": "b", "targets": []}',
}


@pytest.mark.parametrize("message", BAD_LINES)
def test_a_bad_line_is_named(tmp_path, message):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join([GOOD, GOOD, BAD_LINES[message], GOOD]) + b"\n")
    with pytest.raises(DataError, match=rf"rows.jsonl:3: {message}.*--max_bad_rows="):
        list(pair_documents([path], BadRows(0)))
    bad_rows = BadRows(allowed=1)
    assert list(pair_documents([path], bad_rows)) == [("a", "b")] * 3
    assert bad_rows.count == 1 and "rows.jsonl:3" in bad_rows.named[0]


def test_more_bad_rows_than_allowed_stop_it(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join([GOOD, b"", b"x", b"{}"]) + b"\n")
    assert len(list(pair_documents([path], BadRows(allowed=3)))) == 1
    with pytest.raises(DataError, match=r"rows.jsonl:4: no 'source'.*3 bad rows, 2 allowed"):
        list(pair_documents([path], BadRows(allowed=2)))


def test_a_listing_names_every_row_up_to_a_bound(monkeypatch):
    monkeypatch.setattr(readers, "NAMED_BAD_ROWS", 2)
    bad_rows = BadRows(allowed=9)
    for number in range(1, 5):
        bad_rows.add(f"a.jsonl:{number}", "the line\nis empty", "delete it")
    assert bad_rows.listing() == (
        "a.jsonl:1: the line\\nis empty\na.jsonl:2: the line\\nis empty\nand 2 more\n"
    )


def test_gzip_is_read_and_a_truncated_one_named(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    lines = [json.dumps({"source": str(i) * 50, "target": "b"}) for i in range(2000)]
    data = gzip.compress("\n".join(lines).encode(), mtime=0)
    path.write_bytes(data)
    assert len(list(pair_documents([path], BadRows()))) == 2000
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=r"rows.jsonl.gz:\d+: the gzip stream is truncated"):
        list(pair_documents([path], BadRows()))
    path.write_bytes(b"no gzip at all")
    with pytest.raises(DataError, match=r"rows.jsonl.gz has the name of a gzip file"):
        list(pair_documents([path], BadRows()))
    path.write_bytes(data[:9])
    with pytest.raises(DataError, match=r"rows.jsonl.gz:1: the gzip stream is truncated"):
        list(pair_documents([path], BadRows()))


def test_empty_and_missing_files_are_named(tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.write_bytes(b"")
    for read in (pair_documents, text_documents):
        with pytest.raises(DataError, match=r"empty.jsonl:1: the file is empty"):
            list(read([empty], BadRows()))
    with pytest.raises(DataError, match=r"nowhere.jsonl not found"):
        readers.check_files([empty, tmp_path / "nowhere.jsonl"])
    with pytest.raises(DataError, match=r"no input file"):
        readers.check_files([])


def test_nul_and_very_long_lines_are_text_like_any_other(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [("a\0b", "c"), ("x" * 10_000_000, "y")]
    path.write_text("".join(json.dumps({"source": s, "target": t}) + "\n" for s, t in rows))
    assert list(pair_documents([path], BadRows())) == rows


def test_text_files_are_documents_and_long_ones_are_cut_at_line_ends(tmp_path, monkeypatch):
    plain = tmp_path / "a.txt"
    plain.write_text("one\n\ttwo\r\n\nthree", newline="")
    rows = tmp_path / "b.jsonl"
    rows.write_text('{"text": "four\\n"}\n')
    assert list(text_documents([plain, rows], BadRows())) == [
        ("one\n\ttwo\r\n\nthree",),
        ("four\n",),
    ]
    monkeypatch.setattr(readers, "DOCUMENT_BYTES", 5)
    parts = [text for (text,) in text_documents([plain], BadRows())]
    assert parts == ["one\n\ttwo\r\n", "\nthree"]
    plain.write_bytes(b"fine\n\xe9t\xe9\nfine\n")
    with pytest.raises(DataError, match=r"a.txt:2: invalid UTF-8: byte 0xe9 at position 0"):
        list(text_documents([plain], BadRows()))


def test_a_document_is_a_file_a_line_or_a_paragraph(tmp_path, monkeypatch):
    plain = tmp_path / "a.txt"
    plain.write_text("one\r\n two\n \n\nthree\nfour", newline="")

    def read(documents):
        return [text for (text,) in text_documents([plain], BadRows(), documents)]

    assert read("files") == ["one\r\n two\n \n\nthree\nfour"]
    assert read("lines") == ["one", " two", "three", "four"]
    assert read("paragraphs") == ["one\r\n two", "three\nfour"]
    monkeypatch.setattr(readers, "DOCUMENT_BYTES", 5)
    assert read("paragraphs") == ["one", " two", "three", "four"]
    with pytest.raises(ConfigError, match=r"is 'words'; expected one of files, lines, par"):
        read("words")
    assert text_files_task([str(plain)]).origin()["documents"] == "files"
    assert text_files_task([str(plain)], documents="lines").origin()["documents"] == "lines"
    rows = tmp_path / "b.jsonl"
    rows.write_text('{"text": "a\\n\\nb"}\n')
    assert "documents" not in text_files_task([str(rows)]).origin()
    with pytest.raises(ConfigError, match=r"--documents=lines is for plain text"):
        text_files_task([str(rows)], documents="lines")


encoded_text = st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass"))


@settings(max_examples=600, deadline=None)
@given(st.binary(max_size=80) | encoded_text)
def test_any_bytes_are_a_row_or_a_fault(line):
    row = parse_row(line, ("source", "target"))
    assert isinstance(row, Fault) or {"source", "target"} <= set(row)


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(["source", "target", "targets", "id"]), json_values))
def test_any_json_object_is_a_sound_row_or_a_fault(content):
    row = parse_row(json.dumps(content).encode(), ("source", "target"))
    if isinstance(row, Fault):
        assert row.reason and row.remedy
    else:
        row["source"].encode()
        row["target"].encode()
        assert all(isinstance(target, str) for target in row.get("targets", []))
