"""The row codec, the card, and shards that are missing, cut short or corrupt."""

from __future__ import annotations

import json
import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from encdec.data.prepare import prepare
from encdec.data.records import decode_row, encode_row, open_records, read_card, token_dtype
from encdec.errors import ConfigError, DataError
from tests.data.conftest import random_pairs

ids = st.lists(st.integers(0, 65535), max_size=20)
segments = st.lists(st.tuples(ids, ids), min_size=1, max_size=6)


@given(segments, st.sampled_from(["uint16", "uint32"]))
def test_codec_gives_every_row_back(pairs, dtype):
    sources, targets = ([np.array(side, np.int32) for side in sides] for sides in zip(*pairs))
    data = encode_row(sources, targets, dtype)
    width = np.dtype(dtype).itemsize
    assert len(data) == width * (1 + 2 * len(pairs) + sum(len(s) + len(t) for s, t in pairs))
    for expected, seen in zip((sources, targets), decode_row(data, dtype)):
        assert [part.tolist() for part in expected] == [part.tolist() for part in seen]


def test_token_dtype_widens_only_where_it_must():
    assert token_dtype(65_536, 1024, 256) == "uint16"
    assert token_dtype(65_537, 1024, 256) == "uint32"
    assert token_dtype(32_000, 65_536, 256) == "uint32"
    row = encode_row([np.array([65_535, 0])], [np.array([70_000])], "uint32")
    assert decode_row(row, "uint32")[1][0].tolist() == [70_000]


@pytest.fixture
def records(make_records):
    sources, targets = random_pairs(np.random.default_rng(0), 60, 30, 10)
    return make_records(sources, targets, inputs_length=32, targets_length=16, rows_per_shard=7)


def test_rows_are_read_in_the_order_asked_across_shards(records):
    assert len(records.card.shards) > 3
    everything = records.read(range(len(records)))
    order = np.random.default_rng(1).permutation(len(records))
    assert records.read(order) == [everything[i] for i in order]
    with pytest.raises(IndexError):
        records.read([len(records)])


def test_card_round_trip(records):
    assert read_card(records.directory) == records.card
    content = json.loads((records.directory / "dataset.json").read_text())
    assert content["packed"] is True and content["vocabulary"]["kind"] == "bytes"
    assert records.vocabulary().fingerprint == records.card.vocabulary.fingerprint


def test_directory_without_a_card_is_said_to_be_unfinished(records):
    (records.directory / "dataset.json").unlink()
    with pytest.raises(DataError, match=r"did not finish.*encdec prepare --out="):
        open_records(records.directory)
    with pytest.raises(DataError, match=r"does not exist"):
        open_records(records.directory / "nowhere")


def test_addresses_that_nothing_opens_are_refused(tmp_path):
    with pytest.raises(
        ConfigError, match="gs:/bucket/x, an unsupported address.*did you mean gs://bucket/x"
    ):
        open_records("gs:/bucket/x")
    with pytest.raises(ConfigError, match="hf://b, an unsupported address"):
        prepare(out="hf://b", vocabulary="bytes", task="stdlib_text")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"format_version": 99}, "format_version 99"),
        ({"inputs_lenght": 3}, "unknown field 'inputs_lenght'; did you mean 'inputs_length'"),
        ({"rows": None}, "lacks"),
        ({"shards": [{"name": "x"}]}, "malformed"),
    ],
)
def test_broken_cards_are_named(records, change, message):
    path = records.directory / "dataset.json"
    content = {**json.loads(path.read_text()), **change}
    path.write_text(json.dumps({key: v for key, v in content.items() if v is not None}))
    with pytest.raises(DataError, match=message):
        open_records(records.directory)


def test_card_that_is_no_json_is_named(records):
    (records.directory / "dataset.json").write_text("{")
    with pytest.raises(DataError, match=r"dataset.json is not readable JSON"):
        open_records(records.directory)


def test_missing_and_truncated_shards_are_named_at_opening(records):
    shard = records.directory / records.card.shards[1].name
    data = shard.read_bytes()
    shard.write_bytes(data[:-100])
    with pytest.raises(DataError, match=f"{shard.name}.*bytes.*copy it again"):
        open_records(records.directory)
    shard.unlink()
    with pytest.raises(DataError, match=f"{shard.name}.*missing"):
        open_records(records.directory)


def test_corrupt_shard_is_named_when_its_rows_are_read(records):
    shard = records.directory / records.card.shards[1].name
    data = bytearray(shard.read_bytes())
    for place in range(200, 400):
        data[place] ^= 0xFF
    shard.write_bytes(bytes(data))
    again = open_records(records.directory)
    again.read(range(7))
    with pytest.raises(DataError, match=f"{shard.name} cannot be read"):
        again.read(range(len(again)))


def test_slow_storage_is_read_by_threads_and_gives_the_same_rows(records, monkeypatch):
    everything = records.read(range(len(records)))
    order = np.random.default_rng(1).permutation(len(records))
    used = []
    read_shard = records._read_shard

    def slow(index, positions):
        used.append(threading.current_thread().name)
        time.sleep(0.005)
        return read_shard(index, positions)

    monkeypatch.setattr(records, "_read_shard", slow)
    assert records.read(order) == [everything[i] for i in order]
    # The first shard showed that it is slow; the others were read side by side.
    assert used[0] == threading.main_thread().name
    assert len(used) == len(records.card.shards)
    assert all(name.startswith("records") for name in used[1:])
