"""Preparation on Beam's DirectRunner: the same bytes as without it, restarts, named errors."""

from __future__ import annotations

import importlib.util
import sys

import numpy as np
import pytest

from encdec.data.beam_prepare import BeamWriter
from encdec.data.prepare import prepare
from encdec.errors import ConfigError, DataError
from tests.data.conftest import write_jsonl

needs_beam = pytest.mark.skipif(
    importlib.util.find_spec("apache_beam") is None,
    reason="apache-beam is not installed (it conflicts with constraints.txt): the extra beam",
)


def _jsonl(tmp_path):
    rng = np.random.default_rng(0)
    words = ["alpha", "{x}", "\n", "\u00e9\u65e5"]
    rows = [
        {"source": " ".join(rng.choice(words, rng.integers(1, 40))), "target": "t" * int(n)}
        for n in rng.integers(0, 12, 300)
    ]
    return str(write_jsonl(tmp_path / "rows.jsonl", rows))


def _files(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


OPTIONS = dict(
    vocabulary="bytes", inputs_length=256, targets_length=96, block_bytes=4000, workers=1
)


@needs_beam
def test_shards_and_card_are_byte_identical(tmp_path):
    options = dict(jsonl=[_jsonl(tmp_path)], **OPTIONS)
    card = prepare(out=tmp_path / "plain", **options)
    beamed = prepare(out=tmp_path / "beam", writer=BeamWriter(), **options)
    assert card == beamed and len(card.shards) > 5
    assert _files(tmp_path / "plain") == _files(tmp_path / "beam")
    assert not [path for path in (tmp_path / "beam").iterdir() if path.is_dir()]


@needs_beam
def test_an_interrupted_run_goes_on_in_either_way(tmp_path):
    options = dict(jsonl=[_jsonl(tmp_path)], **OPTIONS)

    def stop(counts):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(out=tmp_path / "out", progress=stop, **options)
    first = tmp_path / "out" / "rows-000000.arrayrecord"
    written = first.stat().st_mtime_ns
    prepare(out=tmp_path / "out", writer=BeamWriter("--runner=DirectRunner"), **options)
    assert first.stat().st_mtime_ns == written
    prepare(out=tmp_path / "plain", **options)
    assert _files(tmp_path / "plain") == _files(tmp_path / "out")


@needs_beam
def test_bad_input_stops_it_and_leaves_nothing(tmp_path):
    path = _jsonl(tmp_path)
    with open(path, "a") as file:
        file.write("\n")
    with pytest.raises(DataError, match="rows.jsonl:301: the line is empty"):
        prepare(out=tmp_path / "out", jsonl=[path], writer=BeamWriter(), **OPTIONS)
    assert not (tmp_path / "out").exists()


def test_a_missing_beam_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(ConfigError, match=r"pip install -e .*\[beam\]"):
        BeamWriter()
