"""Prepare end to end: what is written, resumed, refused, and cleaned up."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from encdec.cli import main as encdec
from encdec.data.batches import Batches
from encdec.data.paper_tasks import PAPER_TASKS
from encdec.data.prepare import prepare
from encdec.data.records import decode_row, open_records, read_card
from encdec.data.task_mixtures import MIXTURES
from encdec.data.task_registry import text_task
from encdec.data.verify import verify_records
from encdec.data.vocabulary import copy_vocabulary, load_vocabulary
from encdec.errors import ConfigError, DataError
from tests.data.conftest import write_jsonl


def _rows(count, seed=0):
    rng = np.random.default_rng(seed)
    words = ["alpha", "beta", "gamma", "delta", "{x}", "\treturn", "\n", "\u00e9\u65e5"]
    return [
        {
            "source": " ".join(rng.choice(words, rng.integers(1, 40))),
            "target": " ".join(rng.choice(words, rng.integers(1, 12))),
        }
        for _ in range(count)
    ]


@pytest.fixture
def jsonl(tmp_path):
    return str(write_jsonl(tmp_path / "rows.jsonl", _rows(300)))


LENGTHS = dict(inputs_length=256, targets_length=96)


def _files(directory: pathlib.Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def test_every_example_is_in_the_records_once(tmp_path, jsonl, model_path):
    card = prepare(out=tmp_path / "out", vocabulary=model_path, jsonl=[jsonl], **LENGTHS)
    records = open_records(tmp_path / "out")
    vocabulary = records.vocabulary()
    assert vocabulary.fingerprint == load_vocabulary(model_path).fingerprint
    found, tokens = [], [0, 0]
    for stored in records.read(range(len(records))):
        for source, target in zip(*decode_row(stored, card.token_dtype)):
            assert source[-1] == target[-1] == vocabulary.eos_id
            found.append((vocabulary.decode(source), vocabulary.decode(target)))
            tokens[0] += len(source)
            tokens[1] += len(target)
    rows = _rows(300)
    assert sorted(found) == sorted((row["source"], row["target"]) for row in rows)
    assert [card.source_tokens, card.target_tokens] == tokens
    assert card.examples == card.documents == 300 and not card.truncated and not card.dropped
    assert card.target_bytes == sum(len(row["target"].encode()) for row in rows)
    assert card.non_padding_share == sum(tokens) / (card.rows * (256 + 96)) > 0.9
    assert card.inputs_eos and card.origin == {"files": ["rows.jsonl"]}
    batch = Batches(records, global_batch=len(records))[0]
    assert int((batch["encoder_segment_ids"] > 0).sum()) == tokens[0]
    assert batch["decoder_loss_weights"].sum() == tokens[1]


def test_result_does_not_depend_on_workers(tmp_path, jsonl):
    options = dict(vocabulary="bytes", jsonl=[jsonl], block_bytes=4000, **LENGTHS)
    one = prepare(out=tmp_path / "one", workers=1, **options)
    two = prepare(out=tmp_path / "two", workers=2, **options)
    assert len(one.shards) > 8 and one == two
    assert _files(tmp_path / "one") == _files(tmp_path / "two")


def test_truncation_and_drops_are_counted(tmp_path):
    rows = [*_rows(3), {"source": "s" * 500, "target": "t" * 200}, {"source": "s", "target": ""}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    with open(path, "a") as file:
        file.write("\n")
    options = dict(vocabulary="bytes", jsonl=[str(path)], max_bad_rows=1, **LENGTHS)
    card = prepare(out=tmp_path / "out", **options)
    assert card.truncated == {
        "source_tokens": 245,
        "sources": 1,
        "target_tokens": 105,
        "targets": 1,
    }
    assert card.dropped == {"bad_rows": 1, "empty_target": 1}
    assert card.examples == 4


def test_prefix_lm_records_rebuild_the_text(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("".join(f"line {i} of the text\n" for i in range(500)))
    options = dict(vocabulary="bytes", text=[str(text)], packing="none", workers=1)
    card = prepare(out=tmp_path / "out", inputs_length=64, targets_length=32, **options)
    records = open_records(tmp_path / "out")
    ids = []
    for stored in records.read(range(len(records))):
        sources, targets = decode_row(stored, card.token_dtype)
        ids += [*sources[0], *targets[0]]
    assert records.vocabulary().decode(ids) == text.read_text()
    assert card.target_bytes == card.target_tokens - 1
    assert not card.inputs_eos and card.objective == {"name": "PrefixLM", "split": 0.5}


def test_max_examples_and_seed(tmp_path, jsonl):
    options = dict(vocabulary="bytes", **LENGTHS)
    card = prepare(out=tmp_path / "few", jsonl=[jsonl], max_examples=7, **options)
    assert card.documents == 7
    text = tmp_path / "a.txt"
    text.write_text("words " * 4000)
    cards = [
        prepare(out=tmp_path / f"seed{i}", text=[str(text)], seed=seed, **options)
        for i, seed in enumerate((1, 1, 2))
    ]
    assert cards[0].fingerprint == cards[1].fingerprint != cards[2].fingerprint


def test_a_wide_vocabulary_is_stored_in_four_bytes(tmp_path, jsonl):
    options = dict(vocabulary="bytes", extra_ids=65_536, decoder_start_id=65_700)
    card = prepare(out=tmp_path / "out", jsonl=[jsonl], **options, **LENGTHS)
    assert card.token_dtype == "uint32"
    batch = Batches(open_records(tmp_path / "out"), global_batch=2)[0]
    assert batch["decoder_input_tokens"][0, 0] == 65_700


BAD_INPUT = {
    "an empty line": (b"\n", "rows.jsonl:301: the line is empty"),
    "a missing target": (b'{"source": "a"}\n', "rows.jsonl:301: no 'target'"),
    "invalid UTF-8": (b'{"source": "\xff", "target": "b"}\n', "rows.jsonl:301: invalid UTF-8"),
    "an ill-typed field": (b'{"source": 1, "target": "b"}\n', "rows.jsonl:301: 'source' is int 1"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_stops_it_and_leaves_nothing(tmp_path, jsonl, name, capsys):
    line, message = BAD_INPUT[name]
    with open(jsonl, "ab") as file:
        file.write(line)
    out = tmp_path / "out"
    arguments = ["--jsonl", jsonl, "--vocabulary=bytes", f"--out={out}", "--block_bytes=4000"]
    assert encdec(["prepare", *arguments, "--workers=1"]) == DataError.exit_code
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_rows_left_out_are_named_beside_the_records(tmp_path, jsonl, capsys):
    with open(jsonl, "a") as file:
        file.write('\n{"source": "a"}\n' * 4)
    command = ["prepare", "--jsonl", jsonl, "--vocabulary=bytes", f"--out={tmp_path / 'out'}"]
    assert encdec([*command, "--max_bad_rows=8"]) == 0
    shown = capsys.readouterr().err
    assert shown.count("prepare: left out ") == 5
    assert f"left out {jsonl}:302: no 'target' (keys: 'source')" in shown
    assert f"8 bad rows left out; {tmp_path / 'out' / 'bad_rows.txt'}" in shown
    named = (tmp_path / "out" / "bad_rows.txt").read_text().splitlines()
    assert len(named) == 8 and named[0] == f"{jsonl}:301: the line is empty"


def test_bad_input_loses_no_earlier_records(tmp_path, jsonl):
    out = tmp_path / "out"
    prepare(out=out, vocabulary="bytes", jsonl=[jsonl], **LENGTHS)
    before = _files(out)
    with open(jsonl, "a") as file:
        file.write("\n")
    options = dict(vocabulary="bytes", jsonl=[jsonl], block_bytes=4000, **LENGTHS)
    with pytest.raises(DataError, match=r"the line is empty"):
        prepare(out=out, overwrite=True, **options)
    assert _files(out) == before and sorted(os.listdir(tmp_path)) == ["out", "rows.jsonl"]


def test_existing_directories_are_refused(tmp_path, jsonl):
    out = tmp_path / "out"
    options = dict(out=out, vocabulary="bytes", jsonl=[jsonl], **LENGTHS)
    prepare(**options)
    before = _files(out)
    with pytest.raises(DataError, match=r"already holds .* rows of jsonl.*--overwrite"):
        prepare(**options)
    assert _files(out) == before
    card = prepare(**{**options, "max_examples": 5}, overwrite=True)
    assert card.documents == read_card(out).documents == 5
    assert sorted(os.listdir(tmp_path)) == ["out", "rows.jsonl"]
    other = tmp_path / "mine"
    other.mkdir()
    (other / "thesis.txt").write_text("")
    for overwrite in (False, True):
        with pytest.raises(DataError, match=r"not empty, but holds no preparation"):
            prepare(**{**options, "out": other}, overwrite=overwrite)
    assert (other / "thesis.txt").exists()


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(vocabulary="nowhere.model"), DataError, "vocabulary nowhere.model not found"),
        (dict(jsonl=["nowhere.jsonl"]), DataError, "nowhere.jsonl not found"),
        (dict(jsonl=(), task="stdlib_tekst"), DataError, "did you mean 'stdlib_text'"),
        (dict(jsonl=(), task="stdlib_text", split="dev"), DataError, "split is 'dev'"),
        (dict(jsonl=()), ConfigError, "exactly one of --task, --jsonl and --text, got none"),
        (dict(task="stdlib_text"), ConfigError, "got task, jsonl"),
        (dict(inputs_length=1), ConfigError, "inputs_length is 1"),
        (dict(packing="tight"), ConfigError, "packing is 'tight'"),
        (dict(decoder_start_id=259), ConfigError, r"decoder_start_id is 259.*0\.\.258"),
        (dict(inputs_prefix=[1, 259]), ConfigError, r"inputs_prefix is 259.*0\.\.258"),
        (dict(inputs_prefix=[1] * 255), ConfigError, "inputs_length is 256; give 257 or more"),
        (dict(workers=0), ConfigError, "workers is 0"),
        (dict(max_examples=0), ConfigError, "max_examples is 0"),
    ],
)
def test_wrong_settings_are_named_and_write_nothing(tmp_path, jsonl, change, error, message):
    options = dict(out=tmp_path / "out", vocabulary="bytes", jsonl=[jsonl], **LENGTHS)
    with pytest.raises(error, match=message):
        prepare(**{**options, **change})
    assert not (tmp_path / "out").exists()


def test_the_framing_is_that_of_the_directory_with_the_vocabulary(tmp_path, jsonl):
    """A directory of records, or of a model; what is given is obeyed."""
    prepare(
        out=tmp_path / "first", vocabulary="bytes", jsonl=[jsonl], decoder_start_id=5, **LENGTHS
    )
    model = tmp_path / "model"
    copy_vocabulary(tmp_path / "first", model)
    (model / "config.json").write_text('{"data": {"decoder_start_id": 7, "inputs_prefix": [7, 9]}}')
    spec = load_vocabulary("bytes").spec()
    cases = (("first", {}, 5), ("model", {}, 7), ("model", 0, 0), ("model+4", {}, 7), (spec, {}, 0))
    for vocabulary, given, expected in cases:
        card = prepare(
            out=tmp_path / "next",
            vocabulary=tmp_path / vocabulary if isinstance(vocabulary, str) else vocabulary,
            jsonl=[jsonl],
            overwrite=True,
            **LENGTHS,
            **({} if given == {} else {"decoder_start_id": given}),
        )
        assert card.decoder_start_id == expected
        prefix = (7, 9) if str(vocabulary).startswith("model") else ()
        rows = open_records(tmp_path / "next").read(range(card.rows))
        sources = [s for row in rows for s in decode_row(row, card.token_dtype)[0]]
        assert card.inputs_prefix == prefix
        assert {tuple(ids[:2]) == (7, 9) for ids in sources} == {bool(prefix)}
        assert card.source_tokens == sum(map(len, sources))
        assert not verify_records(tmp_path / "next", sample_rows=None).faults
        assert card.vocabulary.extra_ids == (4 if vocabulary == "model+4" else 0)


def test_sentinels_that_frame_texts_move_with_the_vocabulary_that_grows(tmp_path, jsonl):
    given = dict(jsonl=[jsonl], workers=1, **LENGTHS)
    framing = dict(decoder_start_id=260, inputs_prefix=[7, 259])
    before = prepare(out=tmp_path / "first", vocabulary="bytes+2", **framing, **given)
    assert before.inputs_prefix == (7, 259)
    for vocabulary, more in (
        (f"{tmp_path / 'first'}+5", {}),
        (tmp_path / "first", {"extra_ids": 5}),
    ):
        card = prepare(
            out=tmp_path / "next", vocabulary=vocabulary, overwrite=True, **given, **more
        )
        assert (card.decoder_start_id, card.inputs_prefix) == (263, (7, 262))
        old, new = (open_records(tmp_path / name).vocabulary() for name in ("first", "next"))
        assert old.piece(259) == new.piece(262) and old.piece(260) == new.piece(263)
    card = prepare(out=tmp_path / "third", vocabulary=vocabulary, extra_ids=5, **framing, **given)
    assert (card.decoder_start_id, card.inputs_prefix) == (260, (7, 259))  # as given


def test_text_without_examples_is_refused(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"source": "a", "target": ""}] * 3)
    with pytest.raises(DataError, match=r"gave no examples: 3 documents read.*empty_target"):
        prepare(out=tmp_path / "out", vocabulary="bytes", jsonl=[str(path)], **LENGTHS)
    assert not (tmp_path / "out").exists()


class _Stop(Exception):
    pass


def test_changed_input_is_not_mixed_with_finished_shards(tmp_path, jsonl):
    options = dict(vocabulary="bytes", jsonl=[jsonl], block_bytes=4000, workers=1, **LENGTHS)

    def stop(counts):
        raise _Stop

    with pytest.raises(_Stop):
        prepare(out=tmp_path / "out", **options, progress=stop)
    write_jsonl(pathlib.Path(jsonl), _rows(300, seed=9))
    prepare(out=tmp_path / "out", **options)
    prepare(out=tmp_path / "whole", **options)
    assert _files(tmp_path / "out") == _files(tmp_path / "whole")


def test_killed_workers_follow_and_the_next_call_ends_in_the_same_bytes(tmp_path):
    """kill -9 of the process with two workers; `tests/test_jobs.py` kills at every moment."""
    path = write_jsonl(tmp_path / "rows.jsonl", _rows(2000))
    options = dict(vocabulary="bytes", jsonl=[str(path)], block_bytes=10_000, **LENGTHS)
    prepare(out=tmp_path / "whole", workers=1, **options)
    out = tmp_path / "out"
    code = f"from encdec.data.prepare import prepare\nprepare(out={str(out)!r}, **{options!r})"
    guarded = f"if __name__ == '__main__':\n    import sys\n    {code.replace(chr(10), '; ')}"
    (tmp_path / "job.py").write_text(guarded.replace("prepare(out", "prepare(workers=2, out"))
    process = subprocess.Popen([sys.executable, tmp_path / "job.py"], start_new_session=True)
    while process.poll() is None and not list(out.glob("*.arrayrecord")):
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL and not (out / "dataset.json").exists()
    until = time.monotonic() + 30
    while alive := _running(process.pid):
        assert time.monotonic() < until, f"workers {alive} outlive the process they serve"
        time.sleep(0.05)
    prepare(out=out, workers=1, **options)
    assert _files(out) == _files(tmp_path / "whole")


def _running(group: int) -> list[str]:
    """Processes of a group that have not ended (Linux)."""
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, its_group = path.read_text().rpartition(")")[2].split()[:3]
            if int(its_group) == group and state != "Z":
                found.append(path.parent.name)
    return found


def test_command_reports_and_gin_binds(tmp_path, jsonl, capsys):
    config = tmp_path / "own.gin"
    config.write_text(
        f"prepare.jsonl = [{jsonl!r}]\nprepare.vocabulary = 'bytes'\n"
        "prepare.inputs_length = 128\nsequence_to_sequence.inputs_eos = False\n"
    )
    out = tmp_path / "out"
    arguments = [f"--gin_file={config}", "--gin_bindings=prepare.targets_length = 64"]
    assert encdec(["prepare", *arguments, f"--out={out}", "--inputs_length=160"]) == 0
    report = capsys.readouterr().out
    for part in ("300 documents", "% padding", "truncated:", "dropped:", "tokens/s", str(out)):
        assert part in report
    card = read_card(out)
    assert (card.inputs_length, card.targets_length) == (160, 64)
    assert not card.inputs_eos
    assert "inputs_eos = False" in (out / "operative_config.gin").read_text()
    assert encdec(["prepare", "--gin_bindings=prepare.wrong = 1"]) == ConfigError.exit_code
    assert "gin:" in capsys.readouterr().err


GIN = pathlib.Path(__file__).resolve().parents[2] / "gin"


@pytest.mark.parametrize("name", sorted(path.stem for path in (GIN / "mixtures").glob("*.gin")))
def test_every_mixture_in_gin_prepares(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = [f"--gin_file={GIN / 'mixtures' / name}.gin", "--vocabulary=bytes", "--out=out"]
    for part in MIXTURES[name]:
        raw = PAPER_TASKS[part].objective.document_fields == ("text",)
        row = {"text": "words " * 9} if raw else {"source": "s", "target": part}
        write_jsonl(tmp_path / f"{part}-train.jsonl", [row] * 4)
    assert encdec(["prepare", *arguments, "--data_dir=.", "--max_examples=4"]) == 0
    assert read_card("out").task == name and read_card("out").documents == 4


def test_missing_flags_are_named(capsys):
    assert encdec(["prepare", "--task=stdlib_text"]) == ConfigError.exit_code
    assert "--out is missing" in capsys.readouterr().err


def test_stdlib_tasks_prepare(tmp_path):
    for name in ("stdlib_code_summarization", "stdlib_text"):
        card = prepare(out=tmp_path / name, vocabulary="bytes", task=name, split="test", **LENGTHS)
        assert card.task == name and card.rows > 20
        assert card.origin["corpus"] == "Python standard library"
    assert text_task("stdlib_text").splits == ("train", "validation", "test")


def test_preparing_imports_no_tensorflow(tmp_path, jsonl):
    code = (
        "import sys; from encdec.cli import main;"
        f"main(['prepare', '--jsonl', {jsonl!r}, '--vocabulary=bytes', '--workers=1',"
        f"'--out={tmp_path / 'out'}']);"
        "print('tensorflow' in sys.modules, 'jax' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.splitlines()[-1] == "False False", result.stderr


@pytest.mark.corpora
def test_java_to_csharp_with_the_mistral_vocabulary(tmp_path, corpora, capsys):
    arguments = ["--jsonl", str(corpora / "t2t/train/code_java2cs.jsonl.gz")]
    arguments += [f"--vocabulary={corpora / 'tokenizers/mistral_v1_32000.model'}"]
    arguments += [f"--out={tmp_path / 'out'}", "--targets_length=912"]
    started = time.perf_counter()
    assert encdec(["prepare", *arguments]) == 0
    seconds = time.perf_counter() - started
    card = read_card(tmp_path / "out")
    assert card.documents == card.examples == 10_196
    assert card.non_padding_share > 0.95
    assert not card.dropped and not card.truncated
    rows = open_records(tmp_path / "out")
    vocabulary = rows.vocabulary()
    (source, *_), (target, *_) = decode_row(rows.read([0])[0], card.token_dtype)
    assert "(" in vocabulary.decode(source) and "(" in vocabulary.decode(target)
    with capsys.disabled():
        print(json.dumps({"documents_per_second": 10_196 / seconds, "rows": card.rows}))
