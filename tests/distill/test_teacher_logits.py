"""Stored logits: what the teacher says alone it says in packed rows; kills and wrong pairs."""

from __future__ import annotations

import pathlib
import re
import shutil

import jax
import numpy as np
import pytest

from encdec import jobs
from encdec.cli import main
from encdec.data.records import decode_row, open_records
from encdec.data.teacher_rows import open_teacher, read_teacher_card
from encdec.data.vocabulary import ByteVocabulary
from encdec.distill.teacher_logits import store_teacher_logits
from encdec.distill.teachers import longest_segment, teacher_model
from encdec.errors import CheckpointError, ConfigError, DataError
from encdec.model import build_model
from encdec.saved.saved_params import load_params_for_inference
from tests.devices import one_device
from tests.forks import finish, start_together
from tests.train.conftest import random_pairs, write_records

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
@one_device()
def full(records, teacher, tmp_path_factory):
    """Every log probability of every token."""
    out = tmp_path_factory.mktemp("full") / "rows"
    store_teacher_logits(teacher=teacher, records=records, out=out, method="full", shard_rows=20)
    return open_teacher(out, open_records(records))


def alone(teacher, start_id):
    """(source, target) to the teacher's log probabilities of each target token, by itself."""
    config, params, _ = load_params_for_inference(teacher)
    model = build_model(config)

    @jax.jit
    def forward(tokens, segments, positions):
        batch = {
            "decoder_input_tokens": tokens,
            "decoder_segment_ids": segments,
            "decoder_positions": positions,
        }
        return jax.nn.log_softmax(model.apply({"params": params}, batch)[..., :259])

    def one(source, target):
        length = len(source) + len(target)
        tokens = np.zeros((1, 32), np.int32)
        tokens[0, :length] = [start_id, *source, *target[:-1]]
        places = np.arange(32)[None]
        log_probs = forward(tokens, (places < length).astype(np.int32), places)
        return np.asarray(log_probs)[0, len(source) : length]

    return one


def test_packed_rows_are_scored_as_each_text_alone(records, teacher, full):
    """Token by token and in the order of the encoder-decoder's row."""
    opened = open_records(records)
    size = opened.card.vocabulary.size
    assert size == 259
    one = alone(teacher, opened.card.decoder_start_id)
    several = 0
    for number in range(16):
        sources, targets = decode_row(opened.read([number])[0], opened.card.token_dtype)
        several += len(sources) > 1
        wanted = np.concatenate([one(s, t) for s, t in zip(sources, targets)])
        got = full.fields([number])["teacher_log_probs"][0]
        np.testing.assert_allclose(got[: len(wanted)], wanted, atol=1e-5)
        assert (got[len(wanted) :] == 0).all()
        entropy = -(np.exp(wanted) * wanted).sum(1)
        np.testing.assert_allclose(
            full.fields([number])["teacher_entropy"][0, : len(wanted)], entropy, rtol=1e-3
        )
    assert several > 4


def test_the_mesh_changes_nothing(records, teacher, full, tmp_path):
    store_teacher_logits(
        teacher=teacher,
        records=records,
        out=tmp_path / "split",
        method="full",
        fsdp=2,
        tensor=2,
        batch_rows=4,
    )
    split = open_teacher(tmp_path / "split", open_records(records))
    rows = np.arange(42)
    np.testing.assert_allclose(
        split.fields(rows)["teacher_log_probs"], full.fields(rows)["teacher_log_probs"], atol=1e-5
    )


def test_draws_follow_the_teacher_and_the_seed(records, teacher, full, stored, tmp_path):
    """Mean draws over all tokens and seeds, against the exact distribution."""
    rows = np.arange(42)
    exact = np.exp(full.fields(rows)["teacher_log_probs"])
    real = full.fields(rows)["teacher_entropy"] > 0

    def dense(directory):
        fields = open_teacher(directory, open_records(records)).fields(rows)
        weights = np.zeros(exact.shape)
        for row in rows:
            np.add.at(
                weights[row],
                (fields["teacher_positions"][row], fields["teacher_ids"][row]),
                fields["teacher_weights"][row],
            )
        return weights

    store_teacher_logits(teacher=teacher, records=records, out=tmp_path / "other", draws=20, seed=1)
    first, second = dense(stored), dense(tmp_path / "other")
    assert (first != second).any()
    np.testing.assert_allclose(first.sum(-1)[real], 1, rtol=1e-5)
    mean, wanted = ((first + second) / 2)[real].sum(0), exact[real].sum(0)
    error = np.sqrt((exact * (1 - exact))[real].sum(0) / 40) + 1e-6
    assert (np.abs(mean - wanted) < 5 * error + 0.05).all()


def test_the_card_counts_what_is_there(records, stored):
    card, wanted = read_teacher_card(stored), open_records(records).card
    assert (card.rows, card.tokens) == (wanted.rows, wanted.target_tokens)
    assert len(card.shards) == 3 and not (stored / jobs.NOTES).exists()
    fields = open_teacher(stored, open_records(records)).fields(np.arange(card.rows))
    assert (fields["teacher_weights"] > 0).sum() == card.pairs
    assert (fields["teacher_weights"] > 0).sum(1).max() == card.max_pairs
    size = sum(path.stat().st_size for path in stored.glob("*.arrayrecord"))
    assert card.bytes_per_token == size / card.tokens
    tokens = fields["teacher_entropy"] > 0
    np.testing.assert_allclose(fields["teacher_entropy"][tokens].mean(), card.entropy, rtol=1e-3)


def command(teacher, records, out, *more):
    return [
        "distill",
        "logits",
        f"--teacher={teacher}",
        f"--records={records}",
        f"--out={out}",
        *more,
    ]


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


@pytest.mark.slow
def test_two_processes_of_four_devices_store_as_one_process(records, teacher, full, tmp_path):
    """Each writes shards of its own; together they are the column that one process writes."""
    out = tmp_path / "two"
    wanted = ("--method=full", "--shard_rows=10", "--batch_rows=8", "--fsdp=2")
    arguments = command(teacher, records, out, *wanted)
    said = finish(start_together([arguments] * 2, tmp_path, devices=4))
    assert "tokens in 42 rows" in said[0] and "tokens in 42 rows" not in said[1]
    card, rows = read_teacher_card(out), np.arange(42)
    assert [shard.rows for shard in card.shards] == [10, 10, 10, 10, 2]
    got = open_teacher(out, open_records(records)).fields(rows)
    np.testing.assert_allclose(
        got["teacher_log_probs"], full.fields(rows)["teacher_log_probs"], atol=1e-5
    )
    assert card.tokens == open_records(records).card.target_tokens


def test_wrong_pairs_are_refused_with_both_sides_named(records, teacher, stored, tmp_path):
    other = write_records(tmp_path / "other", random_pairs(42, 5))
    ours, theirs = (open_records(x).card.fingerprint[:16] for x in (records, other))
    with pytest.raises(DataError, match=f"{ours} there and {theirs} here"):
        open_teacher(stored, open_records(other))
    longer = write_records(tmp_path / "longer", random_pairs(42, 0), inputs_length=30)
    with pytest.raises(DataError, match="inputs_length 24 there and 30 here"):
        open_teacher(stored, open_records(longer))
    words = write_records(tmp_path / "words", random_pairs(42, 0), ByteVocabulary(extra_ids=2))
    with pytest.raises(DataError, match="vocabulary fingerprint"):
        open_teacher(stored, open_records(words))
    with pytest.raises(DataError, match=r"of 259 ids, but the records in .* of 261"):
        teacher_model(teacher, open_records(words))


def test_damaged_shards_are_refused(records, stored, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(stored, broken)
    shard = broken / read_teacher_card(broken).shards[1].name
    data = bytearray(shard.read_bytes())
    shard.write_bytes(data[:-7])
    with pytest.raises(DataError, match=shard.name):
        open_teacher(broken, open_records(records))
    refused = 0
    for place in range(10, len(data), len(data) // 8):
        shard.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        intact = open_teacher(stored, open_records(records)).fields(range(16, 32))
        try:
            got = open_teacher(broken, open_records(records)).fields(range(16, 32))
        except DataError as error:
            refused += 1
            assert shard.name in str(error) or "row " in str(error)
        else:  # a byte that no reader looks at
            for name in intact:
                np.testing.assert_array_equal(got[name], intact[name])
    assert refused
    (broken / "teacher.json").unlink()
    with pytest.raises(DataError, match="is not finished"):
        open_teacher(broken, open_records(records))


def test_texts_too_long_for_the_teacher_are_refused(records, teacher, tmp_path):
    longer = write_records(
        tmp_path / "long",
        [[("a" * 40, "b" * 20)], [("a", "b")]],
        inputs_length=60,
        targets_length=30,
    )
    assert longest_segment(open_records(longer)) == 62
    with pytest.raises(DataError, match=r"has 62 tokens.*supports 36.*--max_length=62"):
        teacher_model(teacher, open_records(longer))
    teacher_model(teacher, open_records(longer), max_length=62)
    short = write_records(tmp_path / "short", [[("a", "b")]], inputs_length=60, targets_length=30)
    teacher_model(teacher, open_records(short))  # long rows of short texts are no trouble


def test_what_is_in_the_way_is_left_alone(records, teacher, stored, tmp_path):
    before = contents(stored)
    with pytest.raises(DataError, match="seed is 0 there and 3 here"):
        store_teacher_logits(teacher=teacher, records=records, out=stored, draws=20, seed=3)
    assert contents(stored) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("dear")
    with pytest.raises(DataError, match="not empty"):
        store_teacher_logits(
            teacher=teacher, records=records, out=tmp_path / "mine", overwrite=True
        )
    other = write_records(tmp_path / "other", random_pairs(3, 5))
    for changes, error, message in (
        ({"teacher": tmp_path / "nowhere"}, CheckpointError, "nowhere"),
        ({"step": 5}, CheckpointError, "checkpoint 5"),
        ({"draws": 300}, ConfigError, "--draws is 300"),
        ({"batch_rows": 3}, ConfigError, "multiple of the 8 data"),
        ({"records": f"{records},{other}"}, ConfigError, "store logits for each of them"),
    ):
        arguments = {"teacher": teacher, "records": records} | changes
        with pytest.raises(error, match=message):
            store_teacher_logits(out=tmp_path / "out", **arguments)
        assert not (tmp_path / "out").exists()


def test_progress_tells_rate_and_bytes_a_token_before_a_shard_is_whole(
    records, teacher, tmp_path, capsys, monkeypatch
):
    from encdec.distill import logits_progress

    monkeypatch.setattr(logits_progress, "REPORT_SECONDS", 0.0)
    progress = logits_progress.LogitsProgress(str(records))
    card = store_teacher_logits(
        teacher=teacher,
        records=records,
        out=tmp_path / "out",
        draws=20,
        batch_rows=8,
        progress=progress,
    )
    progress.close()
    lines = [line for line in capsys.readouterr().err.splitlines() if "target tokens/s" in line]
    assert len(lines) >= 4 and "16 of 42 rows" in lines[0] and len(card.shards) == 1
    told = [float(re.search(r", ([0-9.]+) bytes per token", line)[1]) for line in lines]
    pairs = card.pairs / card.tokens
    assert all(pairs < size < 5 + 3 * pairs + 12 for size in told)


def test_the_command_stores_and_says_what_it_costs(records, teacher, tmp_path, capsys):
    assert main(command(teacher, records, tmp_path / "out", "--dry_run", "--draws=20")) == 0
    said = capsys.readouterr().out
    tokens = open_records(records).card.target_tokens
    assert f"{tokens:,} target tokens" in said and "at most 65 bytes per token" in said
    assert not (tmp_path / "out").exists()
    assert main(command(teacher, records, tmp_path / "out", "--method=top_k", "--k=5")) == 0
    said = capsys.readouterr().out
    card = read_teacher_card(tmp_path / "out")
    assert f"{card.bytes_per_token:.1f} bytes per token, 5.0 ids per token" in said
    assert card.format.method == "top_k" and 0 < card.tail < 1
