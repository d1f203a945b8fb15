"""Sizes that programs are compiled for: few, so that most batches find theirs compiled."""

from __future__ import annotations

# Multiplications in a step that a smaller batch must save: about half a millisecond of two cores,
# where a program takes two seconds to compile.
WORTH = 5 * 10**7
FINE = 1024  # lengths from which on a step of two would cost more than compiling again


def bucket(length: int) -> int:
    """The least of 16, 24, 32, 48, 64, 96, ... that holds ``length``: few shapes, little waste."""
    size = 16
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


def coarse_bucket(length: int) -> int:
    """The least of 64, 128, ..., FINE that holds ``length``, above that its ``bucket``."""
    return max(64, 1 << (length - 1).bit_length()) if length <= FINE else bucket(length)


def row_count(count: int, multiple: int = 1) -> int:
    """The least of 1, 2, 3, 4, 6, 8, 12, ... times ``multiple`` that holds ``count`` rows."""
    size = 1
    while size * multiple < count:
        size = size + 1 if size < 3 else size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size * multiple


def rows_within(count: int) -> int:
    """The most rows, ``count`` at most, that fill a batch of ``row_count``."""
    rows = 1
    while (more := row_count(rows + 1)) <= count:
        rows = more
    return rows


def shrunk(rows: int, needed: int, multiplications: int, multiple: int = 1) -> int:
    """The size that a batch of ``rows`` should shrink to when so many are needed: a half or less,
    or the same.

    ``multiplications`` are those of one row's step. Each size is one program more to compile, so
    that small savings are left.
    """
    size = rows
    while size % (2 * multiple) == 0 and needed <= size // 2:
        if size // 2 * multiplications < WORTH:
            break
        size //= 2
    return size
