"""Batches addressed by step: order, epochs, hosts, layouts, prefetch; no TensorFlow."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from encdec.data.batches import Batches
from encdec.data.features import DECODER_FIELDS, ENCODER_FIELDS
from encdec.errors import ConfigError, DataError
from tests.data.conftest import random_pairs

FIELDS = set(ENCODER_FIELDS + DECODER_FIELDS)


class _Rows:
    """Stands for records where only the number of rows matters."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return self.rows


def _stream(rows, batch, steps, **options):
    batches = Batches(_Rows(rows), global_batch=batch, **options)
    return np.concatenate([batches.row_numbers(step) for step in range(steps)])


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 130), st.integers(1, 40), st.integers(0, 2**40))
def test_every_epoch_is_a_permutation(rows, batch, seed):
    epochs = 3
    stream = _stream(rows, batch, -(-rows * epochs // batch), seed=seed)[: rows * epochs]
    orders = stream.reshape(epochs, rows)
    for order in orders:
        assert sorted(order) == list(range(rows))
    if rows >= 20:
        assert len({tuple(order) for order in orders}) == epochs


def test_seeds_and_epochs_share_no_order():
    streams = [_stream(50, 50, 4, seed=seed).reshape(4, 50) for seed in range(4)]
    assert len({tuple(order) for stream in streams for order in stream}) == 16


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 50),
    st.sampled_from([1, 2, 3, 4, 8]),
    st.integers(1, 3),
    st.integers(0, 20),
    st.booleans(),
)
def test_hosts_put_together_see_the_same_rows(rows, hosts, share, step, shuffle):
    options = dict(global_batch=24 * share, seed=5, shuffle=shuffle)
    whole = Batches(_Rows(rows), **options).row_numbers(step)
    parts = [
        Batches(_Rows(rows), **options, host_index=host, host_count=hosts).row_numbers(step)
        for host in range(hosts)
    ]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_without_shuffle_rows_come_in_order():
    assert _stream(5, 3, 4, shuffle=False).tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]


def test_one_epoch_without_repeat_ends_in_empty_rows(records):
    batches = Batches(records, global_batch=16, shuffle=False, repeat=False)
    found = list(batches.iterate())
    assert len(found) == len(batches) == -(-len(records) // 16)
    numbers = np.concatenate([batches.row_numbers(step) for step in range(len(batches))])
    assert numbers.tolist() == [*range(len(records))] + [-1] * (-len(records) % 16)
    assert sum(batch["decoder_loss_weights"].sum() for batch in found) == (
        records.card.target_tokens
    )
    with pytest.raises(IndexError):
        batches[len(batches)]


@pytest.fixture
def records(make_records):
    # Ids from 0: a real token may be 0.
    sources, targets = random_pairs(np.random.default_rng(0), 90, 30, 12, low=0)
    return make_records(
        sources, targets, inputs_length=40, targets_length=16, rows_per_shard=9, decoder_start_id=7
    )


@pytest.mark.parametrize("layout, width", [("encoder_decoder", 16), ("decoder_only", 56)])
def test_fields_shapes_and_types(records, layout, width):
    batch = Batches(records, global_batch=4, layout=layout)[3]
    assert set(batch) == (FIELDS if layout == "encoder_decoder" else set(DECODER_FIELDS))
    for name, values in batch.items():
        assert values.shape == (4, 40 if name in ENCODER_FIELDS else width)
        assert values.dtype == (np.float32 if name == "decoder_loss_weights" else np.int32)


def test_fields_follow_from_the_stored_rows(records):
    from encdec.data.records import decode_row

    batch = Batches(records, global_batch=len(records), shuffle=False)[0]
    for row, stored in enumerate(records.read(range(len(records)))):
        sources, targets = decode_row(stored, "uint16")
        for side, parts in (("encoder", sources), ("decoder", targets)):
            segment_ids = np.concatenate(
                [np.full(len(part), number) for number, part in enumerate(parts, 1)]
            )
            positions = np.concatenate([np.arange(len(part)) for part in parts])
            tokens = np.concatenate(parts)
            used = len(tokens)
            name = "encoder_input_tokens" if side == "encoder" else "decoder_target_tokens"
            for field, expected in (
                (name, tokens),
                (f"{side}_segment_ids", segment_ids),
                (f"{side}_positions", positions),
            ):
                np.testing.assert_array_equal(batch[field][row, :used], expected)
                assert not batch[field][row, used:].any()
        shifted = np.concatenate([[7, *part[:-1]] for part in targets])
        np.testing.assert_array_equal(batch["decoder_input_tokens"][row, : len(shifted)], shifted)
        weights = batch["decoder_loss_weights"][row]
        assert weights.sum() == len(shifted) and weights[: len(shifted)].all()


def test_decoder_only_layout_holds_the_same_segments(records):
    pairs = Batches(records, global_batch=8)[2]
    joined = Batches(records, global_batch=8, layout="decoder_only")[2]
    for row in range(8):
        for segment in range(1, pairs["encoder_segment_ids"][row].max() + 1):
            source = pairs["encoder_input_tokens"][row][
                pairs["encoder_segment_ids"][row] == segment
            ]
            target = pairs["decoder_target_tokens"][row][
                pairs["decoder_segment_ids"][row] == segment
            ]
            here = joined["decoder_segment_ids"][row] == segment
            tokens = np.concatenate([source, target])
            np.testing.assert_array_equal(joined["decoder_target_tokens"][row][here], tokens)
            np.testing.assert_array_equal(
                joined["decoder_input_tokens"][row][here], [7, *tokens[:-1]]
            )
            np.testing.assert_array_equal(
                joined["decoder_positions"][row][here], np.arange(len(tokens))
            )
            np.testing.assert_array_equal(
                joined["decoder_loss_weights"][row][here], [0] * len(source) + [1] * len(target)
            )


@pytest.mark.parametrize("hosts", [1, 2, 3, 4, 8])
def test_batches_do_not_depend_on_the_number_of_hosts(records, hosts):
    whole = Batches(records, global_batch=24, seed=3)
    parts = [
        Batches(records, global_batch=24, seed=3, host_index=host, host_count=hosts)
        for host in range(hosts)
    ]
    for step in (0, 5, 1000):
        for name, expected in whole[step].items():
            joined = np.concatenate([part[step][name] for part in parts])
            np.testing.assert_array_equal(joined, expected)


def test_prefetch_gives_the_same_batches_from_any_step(records):
    batches = Batches(records, global_batch=4, seed=1)
    steps = list(zip(range(17, 23), batches.iterate(17, 23), strict=True))
    assert len(steps) == 6
    for step, found in steps:
        for name, expected in batches[step].items():
            np.testing.assert_array_equal(found[name], expected)
    endless = batches.iterate(10**9)
    np.testing.assert_array_equal(
        next(endless)["decoder_target_tokens"], batches[10**9]["decoder_target_tokens"]
    )


def test_errors_of_reading_reach_the_consumer(records):
    batches = Batches(records, global_batch=4)
    shard = records.directory / records.card.shards[0].name
    shard.unlink()
    with pytest.raises(DataError, match=shard.name):
        for _ in batches.iterate(0, 50):
            pass


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(global_batch=6, host_count=4), "6 is not divisible by 4 hosts"),
        (dict(global_batch=0), "global batch is 0"),
        (dict(global_batch=4, layout="both"), "layout is 'both'"),
        (dict(global_batch=4, host_count=2, host_index=2), "host index 2"),
    ],
)
def test_impossible_batches_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        Batches(_Rows(10), **options)


def test_reading_imports_no_tensorflow(records):
    code = (
        "import sys; from encdec.data.batches import Batches;"
        "from encdec.data.records import open_records;"
        "from encdec.data.vocabulary import load_vocabulary;"
        f"records = open_records({str(records.directory)!r});"
        "next(Batches(records, global_batch=2).iterate()); records.vocabulary();"
        "print([name for name in sys.modules if name.split('.')[0] in "
        "('tensorflow', 'seqio', 'tensorflow_datasets', 'gin')])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr
