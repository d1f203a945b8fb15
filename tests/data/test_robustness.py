"""Thousands of malformed lines, and kills at random moments, through the whole preparation."""

from __future__ import annotations

import collections
import gzip
import json
import random
import subprocess
import sys

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


KILLS = """
import os, pathlib, random, signal, sys, time
from encdec.data.prepare import prepare

path, folder = sys.argv[1], pathlib.Path(sys.argv[2])
draw = random.Random(0)

def start(name):
    # Forked before any writer's threads exist in this process.
    pid = os.fork()
    if pid == 0:
        prepare(out=folder / name, vocabulary="bytes", jsonl=[path], block_bytes=20_000, workers=1)
        os._exit(0)
    return pid

started = time.perf_counter()
os.waitpid(start("whole"), 0)
seconds = time.perf_counter() - started
kills = runs = 0
while kills < 20:
    pid = start(f"killed{runs}")
    time.sleep(draw.uniform(0, seconds / 2))
    os.kill(pid, signal.SIGKILL)
    kills += os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    if (folder / f"killed{runs}" / "dataset.json").exists():
        runs += 1
if not (folder / f"killed{runs}" / "dataset.json").exists():
    os.waitpid(start(f"killed{runs}"), 0)
print(kills, runs)
"""


@pytest.mark.slow
def test_twenty_kills_at_random_moments_change_no_byte(tmp_path):
    draw = random.Random(2)
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(
            json.dumps({"source": "s" * draw.randrange(1, 300), "target": "t" * draw.randrange(40)})
            + "\n"
            for _ in range(4000)
        )
    )
    command = [sys.executable, "-c", KILLS, str(path), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == "20"
    files = collections.defaultdict(dict)
    for folder in ["whole", *(p.name for p in tmp_path.glob("killed*"))]:
        if (tmp_path / folder / "dataset.json").exists():
            for file in (tmp_path / folder).iterdir():
                if file.is_file():
                    files[folder][file.name] = file.read_bytes()
    assert len(files) >= 2 and len(files["whole"]) > 10
    assert all(found == files["whole"] for found in files.values())
