"""``encdec data``: what it lists, shows and finds wrong."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from encdec.cli import main as encdec
from encdec.data.blocks import Counts
from encdec.data.prepare import prepare
from encdec.data.records import encode_row, read_card, write_shard
from encdec.data.task_mixtures import MIXTURES
from encdec.data.task_registry import TEXT_TASKS
from encdec.data.verify import verify_records
from encdec.errors import ConfigError, DataError
from tests.data.conftest import random_pairs, write_jsonl


def test_list_names_every_task_its_sizes_and_where_its_data_is(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    info = tmp_path / "tfds" / "squad" / "v2.0" / "3.0.0"
    info.mkdir(parents=True)
    (info / "dataset_info.json").write_text("{}")
    assert encdec(["data", "list"]) == 0
    printed = capsys.readouterr().out
    for name in [*TEXT_TASKS, *MIXTURES]:
        assert f"{name}:" in printed
    assert "train 130,319, validation 11,873; data: tensorflow-datasets squad/v2.0, present" in (
        printed
    )
    assert "xsum, absent (tfds build xsum)" in printed
    assert "splits: train 344,664 without ielts_band, validation 23,705 without" in printed
    assert "data of c4: tensorflow-datasets c4/en, absent" in printed
    monkeypatch.setenv("TFDS_DATA_DIR", "gs://bucket/tfds")
    assert encdec(["data", "list"]) == 0
    assert "tensorflow-datasets c4/en, if it is in gs://bucket/tfds" in capsys.readouterr().out
    (tmp_path / "xsum").mkdir()
    write_jsonl(tmp_path / "xsum" / "dev.jsonl", [{"source": "a", "target": "b"}])
    assert encdec(["data", "list", f"--data_dir={tmp_path}"]) == 0
    printed = capsys.readouterr().out
    assert f"data: validation below {tmp_path}" in printed and "data: none below" in printed


def test_show_prints_text_and_tokens_of_tasks_and_rows(tmp_path, capsys, model_path):
    (tmp_path / "xsum").mkdir()
    rows = [{"document": f"Long {i} [x].", "summary": f"Short {i}."} for i in range(4)]
    path = write_jsonl(tmp_path / "xsum" / "train.jsonl", rows)
    command = ["data", "show", "xsum", f"--data_dir={tmp_path}", f"--vocabulary={model_path}"]
    assert encdec([*command, "--count=2"]) == 0
    printed = capsys.readouterr().out
    assert "###Text\nLong 1 [x].\n###Summary" in printed and "Short 1." in printed
    assert "segment 2 target" in printed and "Long 2" not in printed
    assert "</s>:1" in printed and "\x1b" not in printed
    prepare(out=tmp_path / "out", vocabulary="bytes", task="xsum", data_dir=str(tmp_path))
    assert encdec(["data", "show", str(tmp_path / "out"), "--count=1"]) == 0
    printed = capsys.readouterr().out
    assert "row 0" in printed and "segment 4 target" in printed and "Short 3." in printed
    assert "S:86" in printed
    text = write_jsonl(tmp_path / "c4-train.jsonl", [{"text": "words of a text " * 20}])
    arguments = ["data", "show", "c4", f"--data_dir={tmp_path}", "--objective=span_corruption"]
    assert encdec([*arguments, "--extra_ids=99", "--inputs_length=64"]) == 0
    assert "<extra_id_0>" in capsys.readouterr().out
    assert encdec([*command, "--count=0"]) == ConfigError.exit_code
    assert encdec([*command, "--objective=prefix_lm"]) == ConfigError.exit_code
    assert "prefix_lm reads text, but xsum has source and target" in capsys.readouterr().err
    assert path.exists() and text.exists()


def test_show_colours_each_segment_on_a_terminal(tmp_path, capsys, monkeypatch):
    (tmp_path / "xsum").mkdir()
    rows = [{"document": f"Long {i}.", "summary": f"Short {i}."} for i in range(2)]
    write_jsonl(tmp_path / "xsum" / "train.jsonl", rows)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes the output for a terminal
    monkeypatch.delenv("NO_COLOR", raising=False)
    command = ["data", "show", "xsum", f"--data_dir={tmp_path}", "--count=2"]
    assert encdec(command) == 0
    printed = capsys.readouterr().out
    # Cyan for the first example, green for the second; tokens are dim.
    assert "\x1b[36mShort 0.\x1b[0m" in printed and "\x1b[32mShort 1.\x1b[0m" in printed
    assert "\x1b[1;36msegment 1 source\x1b[0m" in printed
    assert "\x1b[2mS:86 h:107" in printed


@pytest.fixture
def records(make_records):
    sources, targets = random_pairs(np.random.default_rng(0), 60, 20, 9)
    made = make_records(sources, targets, inputs_length=32, targets_length=12, rows_per_shard=9)
    return made.directory


def test_sound_records_pass(records, capsys):
    assert encdec(["data", "verify", str(records), "--full"]) == 0
    printed = capsys.readouterr()
    assert f"sound; {read_card(records).rows:,} rows of made" in printed.out
    assert "checksum of rows-000000" in printed.err
    assert verify_records(records, sample_rows=7).rows_read == 7


def _fault(records, capsys) -> str:
    assert encdec(["data", "verify", str(records), "--full"]) == DataError.exit_code
    return capsys.readouterr().err


def test_damaged_files_are_named(records, capsys):
    shard = records / "rows-000001.arrayrecord"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    assert "rows-000001.arrayrecord has the checksum" in _fault(records, capsys)
    shard.write_bytes(data[:-1])
    assert "rows-000001.arrayrecord has" in _fault(records, capsys)
    shard.unlink()
    assert "rows-000001.arrayrecord is missing" in _fault(records, capsys)
    (records / "vocabulary.json").unlink()
    (records / "dataset.json").unlink()
    assert "no dataset.json" in _fault(records, capsys)


def test_strangers_and_edited_cards_are_named(records, capsys):
    (records / "rows-000099.arrayrecord").write_bytes(b"")
    assert "rows-000099.arrayrecord is not a shard of the card" in _fault(records, capsys)
    (records / "rows-000099.arrayrecord").unlink()
    path = records / "dataset.json"
    content = json.loads(path.read_text())
    for change, message in (
        ({"targets_length": 13}, "its own fields give"),
        ({"rows": 3}, "states 3 rows"),
        ({"examples": 61}, "states 61 examples, the rows hold 60"),
        ({"target_tokens": 1}, "states 1 target_tokens"),
    ):
        path.write_text(json.dumps({**content, **change}))
        assert message in _fault(records, capsys)


@pytest.mark.parametrize(
    "row, message",
    [
        (encode_row([np.arange(33)], [np.arange(2)], "uint16"), "33 + 2 tokens, expected 32 + 12"),
        (encode_row([np.arange(3)], [np.array([1, 1259])], "uint16"), "id 1259, the vocabulary"),
        (encode_row([np.arange(3)], [np.arange(0)], "uint16"), "a segment without tokens"),
        (b"\x05", "cannot be decoded"),
    ],
)
def test_unsound_rows_are_named(records, capsys, row, message):
    from encdec.data.records import content_fingerprint

    card = read_card(records)
    shard = write_shard(records / card.shards[0].name, [row] * card.shards[0].rows)
    shards = (shard, *card.shards[1:])
    lengths = card.inputs_length, card.targets_length
    print_ = content_fingerprint(shards, card.vocabulary, *lengths, card.decoder_start_id)
    dataclasses.replace(card, shards=shards, fingerprint=print_).write(records)
    found = _fault(records, capsys)
    assert "row 0: " in found and message in found
    assert Counts().rows == 0


def test_table_prepares_files_and_states_them(tmp_path, capsys):
    pairs = write_jsonl(tmp_path / "pairs.jsonl", [{"source": "ab" * 9, "target": "c" * 9}] * 8)
    raw = write_jsonl(tmp_path / "raw.jsonl", [{"text": "words " * 30}])
    plain = tmp_path / "plain.txt"
    plain.write_text("words " * 30)
    files = [str(pairs), f"{raw}:32+16", str(plain)]
    out = tmp_path / "out"
    command = ["data", "table", *files, "--vocabulary=bytes", f"--out={out}"]
    assert encdec([*command, "--inputs_length=16", "--targets_length=12"]) == 0
    lines = capsys.readouterr().out.splitlines()[-3:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    folder = tmp_path.name
    assert [row[0] for row in cells] == [f"{folder}/{name}" for name in ("pairs", "raw", "plain")]
    # 16 of 19 source tokens are kept, and all 10 target tokens.
    assert cells[0][1:8] == ["8", "16 + 12", "8", "128", "80", "7.1 %", "10.3 %"]
    assert cells[1][2] == "32 + 16" and cells[1][7] == "0.0 %"
    card = read_card(out / folder / "raw")
    assert int(cells[1][4]) + int(cells[1][5]) == card.source_tokens + card.target_tokens == 181
