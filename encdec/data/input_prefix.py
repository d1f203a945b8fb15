"""Ids in front of sources: another model's in place of those with which records were prepared."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence

import numpy as np

from encdec.data.records import Records, decode_row, encode_row


def with_prefix(source: np.ndarray, theirs: Sequence[int], ours: Sequence[int]) -> np.ndarray:
    """A source [S] that begins with ``theirs``, with ``ours`` in place of them."""
    return np.concatenate([np.asarray(ours, source.dtype), source[len(theirs) :]])


def with_prefixes(records: Records, prefix: Sequence[int]) -> Records:
    """The same rows, every source beginning with ``prefix`` in place of the records' own.

    Sources may become longer; ``inputs_length`` of its card is large enough for every row then.
    """
    card = records.card
    if tuple(prefix) == card.inputs_prefix or not card.inputs_length:
        return records
    changed = copy.copy(records)
    added = len(prefix) - len(card.inputs_prefix)
    length = card.inputs_length
    if added > 0:
        length = max(length, _most_source_tokens(records, added))

    def read(row_numbers: Sequence[int] | np.ndarray) -> list[bytes]:
        rows = []
        for data in records.read(row_numbers):
            sources, targets = decode_row(data, card.token_dtype)
            sources = [with_prefix(source, card.inputs_prefix, prefix) for source in sources]
            rows.append(encode_row(sources, targets, card.token_dtype))
        return rows

    changed.read = read  # type: ignore[method-assign]
    changed.card = dataclasses.replace(card, inputs_prefix=tuple(prefix), inputs_length=length)
    return changed


def _most_source_tokens(records: Records, added: int, at_once: int = 4096) -> int:
    """Source tokens of the fullest row if each source had ``added`` more."""
    most = 0
    dtype = np.dtype(records.card.token_dtype).newbyteorder("<")
    for first in range(0, len(records), at_once):
        for data in records.read(range(first, min(first + at_once, len(records)))):
            row = np.frombuffer(data, dtype)
            count = int(row[0])
            most = max(most, int(row[1 : 1 + count].sum(dtype=np.int64)) + added * count)
    return most
