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


@dataclasses.dataclass(frozen=True)
class _Stored:
    """A batch as stored: all values of all rows, and where each segment's tokens are among them.

    ``values`` begins with a 0, which is what padding reads. The other arrays have one entry for
    every segment.
    """

    values: np.ndarray
    row: np.ndarray
    number: np.ndarray
    source_lengths: np.ndarray
    target_lengths: np.ndarray
    source_starts: np.ndarray
    target_starts: np.ndarray


def _parse(rows: Sequence[bytes], dtype: str) -> _Stored:
    stored = np.dtype(dtype).newbyteorder("<")
    sizes = np.fromiter(map(len, rows), np.int64, len(rows)) // stored.itemsize
    values = np.frombuffer(b"".join((bytes(stored.itemsize), *rows)), stored)
    begins = 1 + np.cumsum(sizes) - sizes
    last = len(values) - 1
    count = np.where(sizes > 0, values[np.minimum(begins, last)], 0).astype(np.int64)
    row = np.repeat(np.arange(len(rows)), count)
    first = np.cumsum(count) - count
    number = np.arange(len(row)) - first[row]
    # A row's lengths follow its count: all sources, then all targets.
    heads = begins[row] + 1 + number
    source_lengths = values[np.minimum(heads, last)].astype(np.int64)
    target_lengths = values[np.minimum(heads + count[row], last)].astype(np.int64)
    source_total = np.bincount(row, source_lengths, len(rows)).astype(np.int64)
    target_total = np.bincount(row, target_lengths, len(rows)).astype(np.int64)
    wrong = np.flatnonzero((sizes > 0) & (1 + 2 * count + source_total + target_total != sizes))
    if wrong.size:
        raise DataError(
            f"a row of {sizes[wrong[0]]} values does not match its {count[wrong[0]]} segment "
            "lengths; the records are corrupt: prepare them again"
        )
    tokens = begins + 1 + 2 * count
    return _Stored(
        values=values,
        row=row,
        number=number + 1,
        source_lengths=source_lengths,
        target_lengths=target_lengths,
        source_starts=tokens[row] + _within(source_lengths, source_total, row),
        target_starts=(tokens + source_total)[row] + _within(target_lengths, target_total, row),
    )


def _within(lengths: np.ndarray, totals: np.ndarray, row: np.ndarray) -> np.ndarray:
    """Where each segment starts within its row, all rows' totals known."""
    return np.cumsum(lengths) - lengths - (np.cumsum(totals) - totals)[row]


class _Canvas:
    """Padded [rows, length] fields made of runs: stretches of a row that begin from scratch.

    A run is a piece of a segment or, after a row's last one, its padding. Fields constant or
    rising by one within each run are sums of what changes between neighbouring positions: two
    passes over the batch, whatever the number of segments.
    """

    def __init__(self, row: np.ndarray, lengths: np.ndarray, rows: int, length: int):
        self.shape = (rows, length)
        totals = np.bincount(row, lengths, rows).astype(np.int64)
        if totals.size and int(totals.max()) > length:
            raise DataError(f"a row holds {int(totals.max())} tokens, but its card allows {length}")
        # Pieces without tokens are no runs.
        self._real = np.flatnonzero(lengths)
        starts = (row * length + _within(lengths, totals, row))[self._real]
        padded = np.flatnonzero(totals < length)
        places = np.concatenate([starts, padded * length + totals[padded]])
        self._order = np.argsort(places, kind="stable")
        self._places = places[self._order]
        self._sizes = np.diff(self._places, append=rows * length)
        self._is_real = self._order < len(starts)
        self.starts = starts
        self._padding_starts = places[len(starts) :]

    def _per_run(self, per_piece: np.ndarray) -> np.ndarray:
        """A value for every run in order; padding's is 0."""
        padding = np.zeros(len(self._padding_starts), per_piece.dtype)
        return np.concatenate([per_piece[self._real], padding])[self._order]

    def steps(self, per_piece: np.ndarray, dtype: type = np.int32) -> np.ndarray:
        """A field with one value a piece; 0 on padding."""
        changes: np.ndarray = np.zeros(self.shape[0] * self.shape[1], dtype)
        changes[self._places] = np.diff(self._per_run(per_piece), prepend=0)
        return np.add.accumulate(changes, out=changes).reshape(self.shape)

    def ramps(self, first: np.ndarray, real: np.ndarray) -> np.ndarray:
        """A field that rises by one from each piece's ``first``; 0 where ``real`` is 0."""
        changes = (real != 0).reshape(-1).astype(np.int32)
        first = self._per_run(first)
        last = first + np.where(self._is_real, self._sizes - 1, 0)
        changes[self._places] = first - np.concatenate([[0], last[:-1]])
        return np.add.accumulate(changes, out=changes).reshape(self.shape)

    def shifted(self, tokens: np.ndarray, start_id: int, starts: np.ndarray) -> np.ndarray:
        """``tokens`` moved right by one, ``start_id`` at flat places ``starts``; 0 on padding."""
        shifted = np.empty(tokens.size, tokens.dtype)
        shifted[1:] = tokens.reshape(-1)[:-1]
        shifted[self._padding_starts] = 0
        shifted[starts] = start_id
        return shifted.reshape(self.shape)


def _copied(stored: _Stored, starts: np.ndarray, lengths: np.ndarray, shape: tuple[int, int]):
    """The tokens of one side: a row's segments are adjacent, as in the field."""
    field = np.zeros(shape, np.int32)
    totals = np.bincount(stored.row, lengths, shape[0]).astype(np.int64)
    first = np.flatnonzero(np.diff(stored.row, prepend=-1))
    for row, begin in zip(stored.row[first].tolist(), starts[first].tolist()):
        total = totals[row]
        field[row, :total] = stored.values[begin : begin + total]
    return field


def encoder_decoder_features(
    rows: Sequence[bytes], *, inputs_length: int, targets_length: int, dtype: str, start_id: int
) -> dict[str, np.ndarray]:
    """The eight fields, int32 [rows, S] and [rows, T]; loss weights float32.

    An empty row (b"") is all padding. Raises DataError for a row that contradicts its lengths.
    """
    stored = _parse(rows, dtype)
    source = _Canvas(stored.row, stored.source_lengths, len(rows), inputs_length)
    target = _Canvas(stored.row, stored.target_lengths, len(rows), targets_length)
    nothing = np.zeros(len(stored.row), np.int64)
    source_ids, target_ids = source.steps(stored.number), target.steps(stored.number)
    tokens = _copied(stored, stored.target_starts, stored.target_lengths, target.shape)
    return {
        "encoder_input_tokens": _copied(
            stored, stored.source_starts, stored.source_lengths, source.shape
        ),
        "encoder_segment_ids": source_ids,
        "encoder_positions": source.ramps(nothing, source_ids),
        "decoder_input_tokens": target.shifted(tokens, start_id, target.starts),
        "decoder_target_tokens": tokens,
        "decoder_loss_weights": (target_ids != 0).astype(np.float32),
        "decoder_segment_ids": target_ids,
        "decoder_positions": target.ramps(nothing, target_ids),
    }


def decoder_only_features(
    rows: Sequence[bytes], *, inputs_length: int, targets_length: int, dtype: str, start_id: int
) -> dict[str, np.ndarray]:
    """The five decoder fields, [rows, S + T]: each segment as [source; target], loss on targets.

    Same rows, tokens and errors as ``encoder_decoder_features``.
    """
    stored = _parse(rows, dtype)
    length = inputs_length + targets_length
    whole = stored.source_lengths + stored.target_lengths
    canvas = _Canvas(stored.row, whole, len(rows), length)
    # Every segment is two pieces, since its sides are apart in the stored row.
    sides = lambda sources, targets: np.stack([sources, targets], 1).reshape(-1)
    lengths = sides(stored.source_lengths, stored.target_lengths)
    halves = _Canvas(np.repeat(stored.row, 2), lengths, len(rows), length)
    segment_ids = canvas.steps(stored.number)
    # Where each position's token is stored; padding's is the 0 in front.
    places = halves.ramps(sides(stored.source_starts, stored.target_starts), segment_ids)
    tokens = stored.values.take(places).astype(np.int32)
    is_target = np.tile([0, 1], len(stored.row))
    return {
        "decoder_input_tokens": canvas.shifted(tokens, start_id, canvas.starts),
        "decoder_target_tokens": tokens,
        "decoder_loss_weights": halves.steps(is_target, np.int8).astype(np.float32),
        "decoder_segment_ids": segment_ids,
        "decoder_positions": canvas.ramps(np.zeros(len(stored.row), np.int64), segment_ids),
    }


# By the architecture that reads them.
LAYOUTS = {"encoder_decoder": encoder_decoder_features, "decoder_only": decoder_only_features}
