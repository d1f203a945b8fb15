"""Stored rows to model fields, a batch at once, in numpy alone.

Names and values are those of seqio's ``EncDecFeatureConverter(pack=True)`` and, for the
decoder-only layout, of its ``PrefixLMFeatureConverter(pack=True)`` on the same examples.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from encdec.errors import DataError

ENCODER_FIELDS = ("encoder_input_tokens", "encoder_segment_ids", "encoder_positions")
DECODER_FIELDS = (
    "decoder_input_tokens",
    "decoder_target_tokens",
    "decoder_loss_weights",
    "decoder_segment_ids",
    "decoder_positions",
)
LAYOUTS = ("encoder_decoder", "decoder_only")


@dataclasses.dataclass(frozen=True)
class _Segments:
    """All segments of a batch in order: row, number within the row (from 1), lengths, ids."""

    row: np.ndarray
    number: np.ndarray
    source_lengths: np.ndarray
    target_lengths: np.ndarray
    source_ids: np.ndarray
    target_ids: np.ndarray


def _parse(rows: Sequence[bytes], dtype: str) -> _Segments:
    stored = np.dtype(dtype).newbyteorder("<")
    sources, targets, source_ids, target_ids, counts = [], [], [], [], []
    for data in rows:
        row = np.frombuffer(data, stored)
        count = int(row[0]) if len(row) else 0
        source = row[1 : 1 + count].astype(np.int64)
        target = row[1 + count : 1 + 2 * count].astype(np.int64)
        start = 1 + 2 * count
        middle = start + int(source.sum())
        if len(row) != middle + int(target.sum()) and count:
            raise DataError(
                f"a row of {len(row)} values does not match its {count} segment lengths; the "
                "records are corrupt: prepare them again"
            )
        counts.append(count)
        sources.append(source)
        targets.append(target)
        source_ids.append(row[start:middle])
        target_ids.append(row[middle:])
    count = np.asarray(counts, np.int64)
    return _Segments(
        row=np.repeat(np.arange(len(rows)), count),
        number=_ranges(count) + 1,
        source_lengths=np.concatenate(sources),
        target_lengths=np.concatenate(targets),
        source_ids=np.concatenate(source_ids).astype(np.int32),
        target_ids=np.concatenate(target_ids).astype(np.int32),
    )


def _ranges(lengths: np.ndarray) -> np.ndarray:
    """0..n-1 for each length n, one after another."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total) - np.repeat(ends - lengths, lengths)


def _offsets(lengths: np.ndarray, row: np.ndarray) -> np.ndarray:
    """Where each segment starts within its row."""
    starts = np.cumsum(lengths) - lengths
    first = np.flatnonzero(np.diff(row, prepend=-1))
    return starts - np.repeat(starts[first], np.diff(first, append=len(row)))


class _Canvas:
    """Padded [rows, length] fields that share the places of their tokens."""

    def __init__(self, segments: _Segments, lengths: np.ndarray, rows: int, length: int):
        self.shape = (rows, length)
        self.positions = _ranges(lengths)
        starts = segments.row * length + _offsets(lengths, segments.row)
        self.places = np.repeat(starts, lengths) + self.positions
        used = _offsets(lengths, segments.row) + lengths
        if used.size and int(used.max()) > length:
            raise DataError(f"a row holds {int(used.max())} tokens, its card allows {length}")
        self.segment_ids = np.repeat(segments.number, lengths)

    def paint(self, values: np.ndarray, dtype: type = np.int32) -> np.ndarray:
        field = np.zeros(self.shape, dtype)
        field.reshape(-1)[self.places] = values
        return field


def _shift_right(tokens: np.ndarray, positions: np.ndarray, start_id: int) -> np.ndarray:
    shifted = np.empty_like(tokens)
    shifted[1:] = tokens[:-1]
    shifted[positions == 0] = start_id
    return shifted


def encoder_decoder_features(
    rows: Sequence[bytes], *, inputs_length: int, targets_length: int, dtype: str, start_id: int
) -> dict[str, np.ndarray]:
    """The eight fields, int32 [rows, S] and [rows, T]; loss weights float32.

    An empty row (b"") is all padding. Raises DataError for a row that contradicts its lengths.
    """
    segments = _parse(rows, dtype)
    source = _Canvas(segments, segments.source_lengths, len(rows), inputs_length)
    target = _Canvas(segments, segments.target_lengths, len(rows), targets_length)
    tokens = segments.target_ids
    return {
        "encoder_input_tokens": source.paint(segments.source_ids),
        "encoder_segment_ids": source.paint(source.segment_ids),
        "encoder_positions": source.paint(source.positions),
        "decoder_input_tokens": target.paint(_shift_right(tokens, target.positions, start_id)),
        "decoder_target_tokens": target.paint(tokens),
        "decoder_loss_weights": target.paint(np.float32(1), np.float32),
        "decoder_segment_ids": target.paint(target.segment_ids),
        "decoder_positions": target.paint(target.positions),
    }


def decoder_only_features(
    rows: Sequence[bytes], *, inputs_length: int, targets_length: int, dtype: str, start_id: int
) -> dict[str, np.ndarray]:
    """The five decoder fields, [rows, S + T]: each segment as [source; target], loss on targets.

    Same rows, tokens and errors as `encoder_decoder_features`.
    """
    segments = _parse(rows, dtype)
    lengths = segments.source_lengths + segments.target_lengths
    canvas = _Canvas(segments, lengths, len(rows), inputs_length + targets_length)
    in_target = canvas.positions >= np.repeat(segments.source_lengths, lengths)
    tokens = np.empty(len(canvas.positions), np.int32)
    tokens[~in_target] = segments.source_ids
    tokens[in_target] = segments.target_ids
    return {
        "decoder_input_tokens": canvas.paint(_shift_right(tokens, canvas.positions, start_id)),
        "decoder_target_tokens": canvas.paint(tokens),
        "decoder_loss_weights": canvas.paint(in_target, np.float32),
        "decoder_segment_ids": canvas.paint(canvas.segment_ids),
        "decoder_positions": canvas.paint(canvas.positions),
    }
