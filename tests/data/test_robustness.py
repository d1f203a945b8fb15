"""Thousands of malformed lines, and truncated files, through the whole preparation."""

from __future__ import annotations

import gzip
import json
import random

import pytest

from encdec.data.prepare import prepare
from encdec.errors import DataError

GOOD = json.dumps({"source": "some source", "target": "its target"}).encode()


def _malformed(draw: random.Random) -> bytes:
    """A line that must be refused, of a kind drawn at random."""
    value = draw.choice([None, 3, 1.5, True, [], {}, ["a"], "\ud800"])
    field = draw.choice(["source", "target"])
    kinds = [
        GOOD[: draw.randrange(1, len(GOOD) - 1)],
        GOOD + b"}",
        b"\xff\xfe" + GOOD,
        GOOD.replace(b"some", b"so\xc3"),
        GOOD.replace(b"source", b"sauce", 1),
        json.dumps({**json.loads(GOOD), field: value}).encode(),
        json.dumps({**json.loads(GOOD), "targets": draw.choice([[], "t", [1], None])}).encode(),
        b"",
        b"   ",
        b"null",
        b"[]",
        b'"text"',
        b"nan",
        b"\0" * draw.randrange(1, 9),
        GOOD.replace(b"some", b"so\0me"),
        b"[" * 100_000,
        bytes(draw.randrange(128, 256) for _ in range(20)),
    ]
    return draw.choice(kinds).replace(b"\n", b"").replace(b"\r", b"")


def test_thousands_of_malformed_lines_are_counted_and_named(tmp_path):
    draw = random.Random(0)
    lines, bad = [], []
    for number in range(1, 6001):
        malformed = draw.random() < 0.5
        lines.append(_malformed(draw) if malformed else GOOD)
        if malformed:
            bad.append(number)
    # A line of 10 MB is text like any other, whole or broken.
    long = json.dumps({"source": "x" * 10_000_000, "target": "y\0z"}).encode()
    lines += [long, long[:-1]]
    bad.append(len(lines))
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n")
    options = dict(vocabulary="bytes", jsonl=[str(path)], workers=1)
    with pytest.raises(DataError, match=rf"rows.jsonl:{bad[0]}: .*--max_bad_rows"):
        prepare(out=tmp_path / "out", **options)
    with pytest.raises(DataError, match=rf"rows.jsonl:{bad[-1]}: .*{len(bad)} bad rows"):
        prepare(out=tmp_path / "out", max_bad_rows=len(bad) - 1, **options)
    assert not (tmp_path / "out").exists()
    card = prepare(out=tmp_path / "out", max_bad_rows=len(bad), **options)
    assert card.dropped == {"bad_rows": len(bad)}
    assert card.documents == card.examples == len(lines) - len(bad)
    named = (tmp_path / "out" / "bad_rows.txt").read_text().splitlines()
    assert [int(line.split("rows.jsonl:")[1].split(":")[0]) for line in named] == bad
    assert card.truncated["source_tokens"] == 10_000_001 - 1024


@pytest.mark.parametrize("cut", [0, 5, 15, 200, -1, -9])
def test_a_truncated_gzip_never_passes_for_a_whole_one(tmp_path, cut):
    draw = random.Random(1)
    texts = ["".join(draw.choices("abcdef {}\\n", k=40)) for _ in range(400)]
    rows = b"".join(json.dumps({"source": t, "target": t}).encode() + b"\n" for t in texts)
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(rows)[:cut])
    options = dict(vocabulary="bytes", jsonl=[str(path)], workers=1)
    with pytest.raises(DataError, match=r"rows.jsonl.gz:\d+: "):
        prepare(out=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
