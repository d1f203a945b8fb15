"""Order of rows without state: the row at any position of the endless stream of shuffled epochs.

An epoch's order is a permutation computed by encryption: a four-round Feistel network of Simon's
round function (Beaulieu et al. 2013) over the smallest even number of bits, 16 at least, that
holds all row numbers, applied again while it leaves them (Black and Rogaway 2002, "cycle
walking"). It is that of grain's and TensorFlow's ``index_shuffle``, number for number, computed
for many positions at once; but those take one bit too few for 4^k + 1 rows (65,537, 262,145, ...),
where they give one row twice and another never.
"""

from __future__ import annotations

import functools
import hashlib

import numpy as np

ROUNDS = 4
LEAST_BITS = 16
# Up to here a whole epoch's order is computed at once and kept (2 MB). Small sets walk far, since
# 16 bits are many too many for them.
KEPT_ROWS = 1 << 18


def epoch_order_seed(seed: int | str, epoch: int | str) -> int:
    """32-bit seed of one epoch's order; hashed, so that no two runs share shifted epochs."""
    digest = hashlib.sha256(f"encdec epoch {seed} {epoch}".encode()).digest()
    return int.from_bytes(digest[:4], "little")


def shuffled_rows(positions: np.ndarray, rows: int, seed: int | str) -> np.ndarray:
    """The rows, int64, at positions (int64, 0 or more) of the endless stream of epochs."""
    if rows == 1:
        return np.zeros(len(positions), np.int64)
    epochs, places = np.divmod(np.asarray(positions, np.int64), rows)
    result = np.empty_like(places)
    for epoch in np.unique(epochs):
        where = epochs == epoch
        order_seed = epoch_order_seed(seed, int(epoch))
        if rows <= KEPT_ROWS:
            result[where] = _whole_order(rows, order_seed)[places[where]]
        else:
            result[where] = permuted(places[where], rows, order_seed)
    return result


@functools.lru_cache(maxsize=16)
def _whole_order(rows: int, seed: int) -> np.ndarray:
    width, keys = _word_bits(rows), _round_keys(seed)
    after = _encrypt(np.arange(1 << 2 * width, dtype=np.uint32), width, keys)
    # Where each value's walk ends, by doubling its length until all have arrived.
    arrival = after.copy()
    arrival[:rows] = np.arange(rows)
    order = after[:rows]
    while len(order) and order.max() >= rows:
        order, arrival = arrival[order], arrival[arrival]
    return order.astype(np.int64)


def permuted(places: np.ndarray, count: int, seed: int) -> np.ndarray:
    """The int64 numbers at ``places`` of a permutation of 0..count - 1 by a 32-bit seed."""
    width, keys = _word_bits(count), _round_keys(seed)
    values = np.asarray(places, np.int64).astype(np.uint32 if width <= 16 else np.uint64)
    outside = np.arange(len(values))
    while len(outside):
        encrypted = _encrypt(values[outside], width, keys)
        values[outside] = encrypted
        outside = outside[encrypted >= count]
    return values.astype(np.int64)


def _word_bits(count: int) -> int:
    return (max((count - 1).bit_length(), LEAST_BITS) + 1) // 2


def _encrypt(values: np.ndarray, width: int, keys: tuple[int, ...]) -> np.ndarray:
    """One pass of the cipher over unsigned values of two words of ``width`` bits."""
    kind = values.dtype.type
    mask, bits = kind((1 << width) - 1), kind(width)
    by = [kind(width - turns) for turns in (1, 8, 2)]

    def scrambled(words: np.ndarray) -> np.ndarray:
        # Two copies side by side hold every rotation of a word.
        twice = words << bits | words
        return ((twice >> by[0]) & (twice >> by[1]) ^ (twice >> by[2])) & mask

    left, right = values >> bits, values & mask
    for first, second in zip(keys[0::2], keys[1::2]):
        left = left ^ scrambled(right) ^ kind(first & int(mask))
        right = right ^ scrambled(left) ^ kind(second & int(mask))
    return left << bits | right


@functools.lru_cache(maxsize=256)
def _round_keys(seed: int) -> tuple[int, ...]:
    """Round keys of a seed: what C++'s ``std::seed_seq{seed}`` generates ([rand.util.seedseq])."""
    n, word = ROUNDS, 0xFFFFFFFF
    keys = [0x8B8B8B8B] * n
    # The standard's p = t and q - p = t for n below 7, with one seed given (s = 1).
    t = (n - 1) // 2
    p = (n - t) // 2
    q = p + t
    steps = max(2, n)

    def mixed(value: int) -> int:
        return value ^ (value >> 27)

    for k in range(steps):
        mix = 1664525 * mixed(keys[k % n] ^ keys[(k + p) % n] ^ keys[(k - 1) % n]) & word
        more = mix + (1 if k == 0 else k % n + (seed if k == 1 else 0)) & word
        keys[(k + p) % n] = keys[(k + p) % n] + mix & word
        keys[(k + q) % n] = keys[(k + q) % n] + more & word
        keys[k % n] = more
    for k in range(steps, steps + n):
        mix = 1566083941 * mixed(keys[k % n] + keys[(k + p) % n] + keys[(k - 1) % n] & word) & word
        less = mix - k % n & word
        keys[(k + p) % n] ^= mix
        keys[(k + q) % n] ^= less
        keys[k % n] = less
    return tuple(keys)
