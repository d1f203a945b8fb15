"""Stored rows to fields: a whole batch at once gives what one position after another would."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from encdec.data.features import decoder_only_features, encoder_decoder_features
from encdec.data.records import encode_row
from encdec.errors import DataError

S, T, START = 11, 7, 3
ids = st.integers(0, 60_000)


@st.composite
def batches(draw):
    """Rows of (source, target) pairs that fit, empty sides and empty rows among them."""
    rows = []
    for _ in range(draw(st.integers(1, 5))):
        pairs, room = [], [S, T]
        for _ in range(draw(st.integers(0, 4))):
            sides = [draw(st.lists(ids, max_size=left)) for left in room]
            room = [left - len(side) for left, side in zip(room, sides)]
            pairs.append(sides)
        rows.append(pairs)
    return rows


def _one_by_one(pieces, length, learned):
    """Fields of a row whose k-th segment is `pieces[k]`, the first unlearned[k] without loss."""
    fields = {name: [0] * length for name in ("input", "target", "weights", "segment", "position")}
    place = 0
    for number, (tokens, skip) in enumerate(zip(pieces, learned), 1):
        for position, token in enumerate(tokens):
            fields["input"][place] = tokens[position - 1] if position else START
            fields["target"][place] = token
            fields["weights"][place] = float(position >= skip)
            fields["segment"][place] = number
            fields["position"][place] = position
            place += 1
    return fields


def _stored(rows, dtype):
    return [
        encode_row(*([np.array(side, np.int64) for side in sides] for sides in zip(*pairs)), dtype)
        if pairs
        else b""
        for pairs in rows
    ]


DECODER = {
    "decoder_input_tokens": "input",
    "decoder_target_tokens": "target",
    "decoder_loss_weights": "weights",
    "decoder_segment_ids": "segment",
    "decoder_positions": "position",
}
ENCODER = {
    "encoder_input_tokens": "target",
    "encoder_segment_ids": "segment",
    "encoder_positions": "position",
}


@settings(max_examples=120, deadline=None)
@given(batches(), st.sampled_from(["uint16", "uint32"]))
def test_both_layouts_equal_a_loop_over_positions(rows, dtype):
    options = dict(inputs_length=S, targets_length=T, dtype=dtype, start_id=START)
    pairs = encoder_decoder_features(_stored(rows, dtype), **options)
    joined = decoder_only_features(_stored(rows, dtype), **options)
    for number, row in enumerate(rows):
        sources, targets = ([pair[side] for pair in row] for side in (0, 1))
        nothing = [0] * len(row)
        found = [
            (pairs, ENCODER, _one_by_one(sources, S, nothing)),
            (pairs, DECODER, _one_by_one(targets, T, nothing)),
            (
                joined,
                DECODER,
                _one_by_one([s + t for s, t in row], S + T, [len(source) for source in sources]),
            ),
        ]
        for fields, names, expected in found:
            for name, key in names.items():
                assert fields[name][number].tolist() == expected[key], name
    assert all(v.dtype == (np.float32 if "weights" in k else np.int32) for k, v in pairs.items())


@pytest.mark.parametrize("convert", [encoder_decoder_features, decoder_only_features])
def test_rows_that_contradict_their_lengths_are_refused(convert):
    options = dict(inputs_length=S, targets_length=T, dtype="uint16", start_id=START)
    row = encode_row([np.arange(4)], [np.arange(3)], "uint16")
    convert([row], **options)
    for broken in (row[:-2], row + b"\0\0", b"\xff\xff" + row[2:], row[:2], b"\x02\x00" + row[2:]):
        with pytest.raises(DataError, match=r"does not match its \d+ segment lengths"):
            convert([row, broken], **options)
    with pytest.raises(DataError, match=r"holds 9\d* tokens, but its card allows"):
        convert(
            [encode_row([np.arange(90)], [np.arange(9)], "uint16")],
            **{**options, "inputs_length": 95 if convert is encoder_decoder_features else 2},
        )
