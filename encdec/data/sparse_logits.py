"""A teacher's distributions in a few bytes per token: what is kept, and how it is stored.

Three formats, chosen by ``SparseFormat.method``:

* ``sampled``: N draws with replacement, as unique ids and their counts (arXiv 2503.16870). Counts
  over N estimate the teacher's distribution without bias, so gradients of a cross entropy
  against them are unbiased too. Draws from a proposal (the distribution to the power ``proposal``,
  normalized) carry the logarithm of their importance ratio, too (16 bits).
* ``top_k``: the k likeliest ids with their log probabilities (15 bits, steps of 2^-10 nats) and
  the mass of all others.
* ``full``: every log probability as float32; exact, for small vocabularies.

In addition to its pairs of an id and a value, every token has the log-normalizer of the teacher's
logits and the entropy of its distribution (nats, float16).

A row's bytes: CRC-32 of the rest, number of tokens n, number of pairs P (uint32 each, little
endian), then a raw deflate stream. Deflated are byte planes, one after another, the most
significant byte of a field first: per token its number of pairs less one, log-normalizer, entropy
and, for top_k, the tail mass; per pair the gap from the token's id before (of its first pair the
id itself), and the count less one, log ratio or log probability. Full rows have n x V float32 in
place of pairs. Each plane is a Huffman block of its own: the bytes of a plane resemble each other
in how often they come, not in their order, so that a code for each is all that compression finds
(ids of a row in one code take a fifth more). Before that an id takes 2 bytes, 3 beyond 65,536 ids.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from encdec.errors import DataError
from encdec.fields import requirements

MAX_PAIRS = 256  # a token: draws of which each is unique; sizes and counts take a byte
MAX_VOCABULARY = 2**24
_HEADER = np.dtype("<u4")
_SCALAR = np.dtype("<f2")
# Log probability: 15 bits, downwards from 0. Log importance ratio: 16 bits around 0.
_LOG_PROB_BITS, _LOG_PROB_STEPS = 15, 2**10
_RATIO_BITS, _RATIO_STEPS = 16, 2**11


@dataclasses.dataclass(frozen=True)
class SparseFormat:
    """What is kept of each distribution ``softmax(logits / temperature)``.

    Attributes:
        method: "sampled", "top_k" or "full"; see the module.
        vocab_size: ids of the records' vocabulary; the distribution is normalized over these.
        draws: N of "sampled".
        k: ids kept by "top_k".
        temperature: of the stored distribution.
        proposal: exponent of the distribution that "sampled" draws from; 1 draws from the
            distribution itself.

    Raises:
        ConfigError: a value out of range.
    """

    method: Literal["sampled", "top_k", "full"]
    vocab_size: int
    draws: int = 50
    k: int = 12
    temperature: float = 1.0
    proposal: float = 1.0

    def __post_init__(self) -> None:
        require = requirements(self, "--")
        require(
            self.method in ("sampled", "top_k", "full"), "method", "'sampled', 'top_k' or 'full'"
        )
        require(
            2 <= self.vocab_size <= MAX_VOCABULARY, "vocab_size", f"2 to {MAX_VOCABULARY:,} ids"
        )
        require(1 <= self.draws <= MAX_PAIRS, "draws", f"1 to {MAX_PAIRS}, as a count has 8 bits")
        require(1 <= self.k <= MAX_PAIRS, "k", f"1 to {MAX_PAIRS}")
        require(
            self.method != "top_k" or self.k < self.vocab_size,
            "k",
            f"less than the vocabulary's {self.vocab_size} ids; --method=full keeps them all",
        )
        finite = math.isfinite(self.temperature)
        require(finite and self.temperature > 0, "temperature", "a positive number")
        finite = math.isfinite(self.proposal)
        wanted = "a positive exponent; 1 draws from the teacher"
        require(finite and self.proposal > 0, "proposal", wanted)
        require(
            self.proposal == 1 or self.method == "sampled",
            "proposal",
            "1, because only --method=sampled draws from a proposal",
        )

    @property
    def weighted(self) -> bool:
        """Whether pairs carry an importance ratio."""
        return self.proposal != 1.0

    @property
    def id_bytes(self) -> int:
        return 2 if self.vocab_size <= 2**16 else 3

    @property
    def pair_bytes(self) -> int:
        """Bytes of one id with its value, before compression."""
        values = 2 if self.method == "top_k" else 3 if self.weighted else 1
        return self.id_bytes + values

    @property
    def pairs_limit(self) -> int:
        """The most pairs that a token can have."""
        if self.method == "full":
            return 0
        return self.k if self.method == "top_k" else min(self.draws, self.vocab_size)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class SparseLogits:
    """Distributions of n tokens, pairs of all tokens one after another.

    Attributes:
        sizes: pairs of each token, int32 [n].
        ids: int32 [P], ascending within a token.
        counts: draws that gave the id, int32 [P]; "sampled" only.
        log_ratios: log(teacher / proposal) of the id, float32 [P]; with a proposal only.
        log_probs: float32 [P] for "top_k", [n, V] for "full".
        log_normaliser: logsumexp(logits / temperature), float32 [n].
        entropy: nats, float32 [n].
        tail: mass of the ids left out, float32 [n]; "top_k" only.
    """

    sizes: np.ndarray
    ids: np.ndarray
    log_normaliser: np.ndarray
    entropy: np.ndarray
    counts: np.ndarray | None = None
    log_ratios: np.ndarray | None = None
    log_probs: np.ndarray | None = None
    tail: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.sizes)

    def weights(self, fmt: SparseFormat) -> np.ndarray:
        """Teacher mass that each pair stands for, float32 [P].

        "sampled": count / N times the importance ratio, of which the expectation is the
        teacher's probability. "top_k": the probability itself.
        """
        if fmt.method == "top_k":
            return np.exp(there(self.log_probs))
        weights = there(self.counts).astype(np.float32) / np.float32(fmt.draws)
        return weights * np.exp(there(self.log_ratios)) if fmt.weighted else weights


def there(values: np.ndarray | None) -> np.ndarray:
    """A field that this format has."""
    assert values is not None
    return values


def count_draws(draws_nxN: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Unique ids of every token's draws.

    Returns:
        sizes [n], ids [P] ascending within a token, counts [P], and where each pair's first draw
        is, as an index into the flattened draws [P].
    """
    n, draws = draws_nxN.shape
    order = np.argsort(draws_nxN, axis=1, kind="stable")
    ordered = np.take_along_axis(draws_nxN, order, axis=1)
    fresh = np.ones((n, draws), bool)
    fresh[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    starts = np.flatnonzero(fresh)
    # A token's first draw is always fresh, so runs never cross from one token into the next.
    counts = np.diff(starts, append=n * draws)
    first = (np.arange(n)[:, None] * draws + order).reshape(-1)[starts]
    return (
        fresh.sum(axis=1).astype(np.int32),
        ordered.reshape(-1)[starts].astype(np.int32),
        counts.astype(np.int32),
        first,
    )


def encode_row(row: SparseLogits, fmt: SparseFormat) -> bytes:
    """One row's distributions as bytes; the inverse of ``decode_rows`` up to quantization.

    Raises:
        ValueError: more pairs of a token than can be stored, or ids that do not ascend.
    """
    n, pairs = len(row), len(row.ids)
    starts = (np.cumsum(row.sizes) - row.sizes)[row.sizes > 0]
    gaps = np.diff(row.ids.astype(np.int64), prepend=0)
    gaps[starts] = row.ids[starts]
    if pairs and (row.sizes.min() < 1 or row.sizes.max() > MAX_PAIRS):
        raise ValueError(
            f"a token has {row.sizes.min()} to {row.sizes.max()} pairs; 1 to "
            f"{MAX_PAIRS} can be stored"
        )
    later = np.ones(pairs, bool)
    later[starts] = False
    if (gaps[later] < 1).any():
        raise ValueError("the ids of a token are not in ascending order")
    limit = np.finfo(_SCALAR).max
    scalar = lambda x: np.clip(x, -limit, limit).astype(_SCALAR)
    values = {
        "sizes": lambda: row.sizes - 1,
        "log_normaliser": lambda: scalar(row.log_normaliser).view("<u2"),
        "entropy": lambda: scalar(row.entropy).view("<u2"),
        "tail": lambda: scalar(there(row.tail)).view("<u2"),
        "gaps": lambda: gaps,
        "counts": lambda: there(row.counts) - 1,
        "log_ratios": lambda: _steps(
            there(row.log_ratios), _RATIO_STEPS, 2 ** (_RATIO_BITS - 1), 2**_RATIO_BITS
        ),
        "log_probs": lambda: (
            there(row.log_probs).astype("<f4").reshape(-1).view("<u4")
            if fmt.method == "full"
            else _steps(there(row.log_probs), -_LOG_PROB_STEPS, 0, 2**_LOG_PROB_BITS)
        ),
    }
    deflate = zlib.compressobj(6, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    parts = [np.array([n, pairs], _HEADER).tobytes()]
    for name, _, width in _fields(fmt, n, pairs):
        planes = values[name]().astype("<u4").view(np.uint8).reshape(-1, 4).T
        for plane in planes[:width][::-1]:
            parts += [deflate.compress(plane.tobytes()), deflate.flush(zlib.Z_BLOCK)]
    body = b"".join([*parts, deflate.flush()])
    return np.array([zlib.crc32(body)], _HEADER).tobytes() + body


def _fields(fmt: SparseFormat, n: int, pairs: int) -> list[tuple[str, int, int]]:
    """Name, number of values and bytes a value of all that a row of n tokens holds, in order."""
    scalars = ["log_normaliser", "entropy", *(["tail"] if fmt.method == "top_k" else [])]
    fields = [(name, n, 2) for name in scalars]
    if fmt.method == "full":
        return [*fields, ("log_probs", n * fmt.vocab_size, 4)]
    fields = [("sizes", n, 1), *fields, ("gaps", pairs, fmt.id_bytes)]
    if fmt.method == "top_k":
        return [*fields, ("log_probs", pairs, 2)]
    return [*fields, ("counts", pairs, 1), *([("log_ratios", pairs, 2)] if fmt.weighted else [])]


def _steps(values: np.ndarray, size: int, middle: int, count: int) -> np.ndarray:
    """Which of ``count`` steps each value is nearest to; those beyond the ends at the ends."""
    return np.clip(np.rint(values.astype(np.float64) * size) + middle, 0, count - 1)


def decode_rows(
    rows: Sequence[bytes], fmt: SparseFormat, names: Sequence[object] | None = None
) -> tuple[np.ndarray, SparseLogits]:
    """Rows of bytes to distributions.

    Args:
        rows: from ``encode_row``; b"" is a row without tokens.
        fmt: the format they were written in.
        names: what to call each row in an error, by default its place.

    Returns:
        The number of tokens of each row, and all tokens' distributions one after another.

    Raises:
        DataError: a row is cut short, altered, or of another format.
    """
    pieces = [
        _split(data, fmt, names[place] if names is not None else place)
        for place, data in enumerate(rows)
    ]
    joined = {
        name: np.concatenate([piece[name] for piece in pieces] or [np.empty(0, np.uint32)])
        for name, _, _ in _fields(fmt, 0, 0)
    }
    tokens = np.array([len(piece["entropy"]) for piece in pieces], np.int64)
    scalars = {
        name: joined[name].astype("<u2").view(_SCALAR).astype(np.float32)
        for name in ("log_normaliser", "entropy", "tail")
        if name in joined
    }
    if fmt.method == "full":
        full = joined["log_probs"].view("<f4").reshape(-1, fmt.vocab_size)
        return tokens, SparseLogits(
            np.zeros(len(full), np.int32), np.empty(0, np.int32), log_probs=full, **scalars
        )
    sizes = joined["sizes"].astype(np.int32) + 1
    # Sums of gaps, less what the sum had come to before the token began.
    sums = np.cumsum(joined["gaps"], dtype=np.int64)
    starts = np.cumsum(sizes) - sizes
    ids = (sums - np.repeat(sums[starts] - joined["gaps"][starts], sizes)).astype(np.int32)
    if ids.size and ids.max() >= fmt.vocab_size:
        raise DataError(
            f"a teacher's id is {ids.max()}, but its vocabulary has {fmt.vocab_size} "
            "ids; store the logits again"
        )
    if fmt.method == "top_k":
        log_probs = joined["log_probs"].astype(np.float32) / np.float32(-_LOG_PROB_STEPS)
        return tokens, SparseLogits(sizes, ids, log_probs=log_probs, **scalars)
    log_ratios = None
    if fmt.weighted:
        steps = joined["log_ratios"].astype(np.float32) - 2 ** (_RATIO_BITS - 1)
        log_ratios = steps / np.float32(_RATIO_STEPS)
    return tokens, SparseLogits(
        sizes, ids, counts=joined["counts"].astype(np.int32) + 1, log_ratios=log_ratios, **scalars
    )


def _split(data: bytes, fmt: SparseFormat, name: object) -> dict[str, np.ndarray]:
    """The fields of one row as uint32, uninterpreted."""
    if not data:
        return {field: np.empty(0, np.uint32) for field, _, _ in _fields(fmt, 0, 0)}
    broken = DataError(
        f"the teacher's row {name} is damaged (its checksum or length is wrong); copy the shard "
        "again, or run encdec distill logits again"
    )
    if len(data) < 12:
        raise broken
    crc, n, pairs = (int(x) for x in np.frombuffer(data, _HEADER, 3))
    if zlib.crc32(memoryview(data)[4:]) != crc:
        raise broken
    fields = _fields(fmt, n, pairs)
    try:
        planes = np.frombuffer(zlib.decompress(memoryview(data)[12:], -15), np.uint8)
    except zlib.error as error:  # the checksum fits, so that it was written like this
        raise broken from error
    if len(planes) != sum(count * width for _, count, width in fields):
        raise broken
    parts, start = {}, 0
    for field, count, width in fields:
        values = np.zeros((count, 4), np.uint8)
        values[:, :width] = planes[start : start + count * width].reshape(width, count)[::-1].T
        parts[field] = values.reshape(-1).view("<u4")
        start += count * width
    if "sizes" in parts and int(parts["sizes"].sum(dtype=np.int64)) + n != pairs:
        raise broken
    return parts
