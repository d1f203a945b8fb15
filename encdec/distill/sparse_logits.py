"""A teacher's distributions in a few bytes a token: what is kept, and how it lies on disk.

Three formats, chosen by ``SparseFormat.method``:

* ``sampled``: N draws with replacement, as unique ids and their counts (arXiv 2503.16870). Counts
  over N estimate the teacher's distribution without bias, so gradients of a cross entropy
  against them are unbiased too. Three bytes a unique id: 17 bits of id, 7 of count. Draws from a
  proposal (the distribution to the power ``proposal``, normalised) carry two more bytes, the
  logarithm of their importance ratio.
* ``top_k``: the k likeliest ids with their log probabilities (15 bits, steps of 2^-10 nats) and
  the mass of all others. Four bytes an id.
* ``full``: every log probability as float32; exact, for small vocabularies.

Vocabularies beyond 2^17 ids take one byte more a pair. Every token has, beside its pairs, the
log-normaliser of the teacher's scores and the entropy of its distribution (nats, float16).

A row's bytes: CRC-32 of the rest, number of tokens n, number of pairs P (uint32 each, little
endian); per token its number of pairs (uint8), log-normaliser, entropy and, for top_k, the tail
mass (float16 each); then the pairs as byte planes, lowest byte of every pair first, because equal
places resemble each other and compress. Full rows have n x V float32 in place of pairs.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from encdec.errors import ConfigError, DataError

COUNT_BITS = 7
MAX_PAIRS = 2**COUNT_BITS  # a token: draws of which each is unique
_HEADER = np.dtype("<u4")
_SCALAR = np.dtype("<f2")
_SMALL_ID_BITS, _LARGE_ID_BITS = 17, 24
# Log probability: 15 bits, downwards from 0. Log importance ratio: 16 bits around 0.
_LOG_PROB_BITS, _LOG_PROB_STEPS = 15, 2**10
_RATIO_BITS, _RATIO_STEPS = 16, 2**11


@dataclasses.dataclass(frozen=True)
class SparseFormat:
    """What is kept of each distribution ``softmax(logits / temperature)``.

    Attributes:
        method: "sampled", "top_k" or "full"; see the module.
        vocab_size: ids of the records' vocabulary; the distribution is normalised over these.
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
        def require(condition: bool, name: str, wanted: str) -> None:
            if not condition:
                raise ConfigError(f"--{name} is {getattr(self, name)!r}; wanted {wanted}")

        require(self.method in ("sampled", "top_k", "full"), "method",
                "'sampled', 'top_k' or 'full'")
        require(2 <= self.vocab_size <= 2**_LARGE_ID_BITS, "vocab_size",
                f"2 to {2**_LARGE_ID_BITS:,} ids")
        require(1 <= self.draws <= MAX_PAIRS, "draws", f"1 to {MAX_PAIRS}, as counts have 7 bits")
        require(1 <= self.k <= MAX_PAIRS, "k", f"1 to {MAX_PAIRS}")
        require(self.method != "top_k" or self.k < self.vocab_size, "k",
                f"less than the vocabulary's {self.vocab_size} ids; --method=full keeps them all")
        require(self.temperature > 0, "temperature", "a positive number")
        require(self.proposal > 0, "proposal", "a positive exponent; 1 draws from the teacher")
        require(self.proposal == 1 or self.method == "sampled", "proposal",
                "1, because only --method=sampled draws from a proposal")

    @property
    def weighted(self) -> bool:
        """Whether pairs carry an importance ratio."""
        return self.proposal != 1.0

    @property
    def id_bits(self) -> int:
        return _SMALL_ID_BITS if self.vocab_size <= 2**_SMALL_ID_BITS else _LARGE_ID_BITS

    @property
    def value_bits(self) -> int:
        """Bits beside the id in a pair."""
        if self.method == "top_k":
            return _LOG_PROB_BITS
        return COUNT_BITS + (_RATIO_BITS if self.weighted else 0)

    @property
    def pair_bytes(self) -> int:
        """Bytes of one id with its value, before compression."""
        return -(-(self.id_bits + self.value_bits) // 8)

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
            return np.exp(self.log_probs)
        weights = self.counts.astype(np.float32) / np.float32(fmt.draws)
        return weights * np.exp(self.log_ratios) if fmt.weighted else weights


def count_draws(draws_nxN: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Unique ids of every token's draws.

    Returns:
        sizes [n], ids [P] ascending within a token, counts [P], and where each pair's first draw
        lies, as an index into the flattened draws [P].
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
    return (fresh.sum(axis=1).astype(np.int32), ordered.reshape(-1)[starts].astype(np.int32),
            counts.astype(np.int32), first)


def encode_row(row: SparseLogits, fmt: SparseFormat) -> bytes:
    """One row's distributions as bytes; the inverse of ``decode_rows`` up to quantisation."""
    if row.sizes.size and row.sizes.max() > MAX_PAIRS:
        raise ValueError(f"a token has {row.sizes.max()} pairs; at most {MAX_PAIRS} can be stored")
    scalars = [row.log_normaliser, row.entropy] + ([row.tail] if fmt.method == "top_k" else [])
    parts = [np.array([len(row), len(row.ids)], _HEADER)]
    # Sizes minus one, so that MAX_PAIRS would fit; full rows have no pairs at all.
    if fmt.method != "full":
        parts.append((row.sizes - 1).astype(np.uint8))
    limit = np.finfo(_SCALAR).max
    parts += [np.clip(scalar, -limit, limit).astype(_SCALAR) for scalar in scalars]
    if fmt.method == "full":
        parts.append(row.log_probs.astype("<f4"))
    else:
        words = row.ids.astype(np.uint64) | _values(row, fmt) << np.uint64(fmt.id_bits)
        planes = words.astype("<u8").view(np.uint8).reshape(-1, 8).T[: fmt.pair_bytes]
        parts.append(np.ascontiguousarray(planes))
    body = b"".join(part.tobytes() for part in parts)
    return np.array([zlib.crc32(body)], _HEADER).tobytes() + body


def _values(row: SparseLogits, fmt: SparseFormat) -> np.ndarray:
    if fmt.method == "top_k":
        steps = np.rint(-row.log_probs.astype(np.float64) * _LOG_PROB_STEPS)
        return np.clip(steps, 0, 2**_LOG_PROB_BITS - 1).astype(np.uint64)
    values = (row.counts - 1).astype(np.uint64)
    if fmt.weighted:
        middle = 2 ** (_RATIO_BITS - 1)
        steps = np.rint(row.log_ratios.astype(np.float64) * _RATIO_STEPS) + middle
        values |= np.clip(steps, 0, 2**_RATIO_BITS - 1).astype(np.uint64) << np.uint64(COUNT_BITS)
    return values


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
    pieces = [_split(data, fmt, names[place] if names is not None else place)
              for place, data in enumerate(rows)]
    join = lambda key, empty: np.concatenate(
        [piece[key] for piece in pieces] or [empty])
    tokens = np.array([len(piece["entropy"]) for piece in pieces], np.int64)
    scalars = {name: join(name, np.empty(0, _SCALAR)).astype(np.float32)
               for name in ("log_normaliser", "entropy", *(("tail",) * (fmt.method == "top_k")))}
    none = np.empty(0, np.int32)
    if fmt.method == "full":
        sizes = np.zeros(int(tokens.sum()), np.int32)
        full = join("log_probs", np.empty((0, fmt.vocab_size), np.float32))
        return tokens, SparseLogits(sizes, none, log_probs=full, **scalars)
    sizes = join("sizes", none).astype(np.int32) + 1
    planes = np.concatenate([piece["planes"] for piece in pieces]
                            or [np.empty((fmt.pair_bytes, 0), np.uint8)], axis=1)
    words = np.zeros((planes.shape[1], 8), np.uint8)
    words[:, : fmt.pair_bytes] = planes.T
    words = words.view("<u8").reshape(-1)
    ids = (words & np.uint64(2**fmt.id_bits - 1)).astype(np.int32)
    if ids.size and ids.max() >= fmt.vocab_size:
        raise DataError(f"a teacher's id is {ids.max()}, but its vocabulary has {fmt.vocab_size} "
                        "ids; score the records again")
    values = words >> np.uint64(fmt.id_bits)
    if fmt.method == "top_k":
        log_probs = values.astype(np.float32) / np.float32(-_LOG_PROB_STEPS)
        return tokens, SparseLogits(sizes, ids, log_probs=log_probs, **scalars)
    counts = (values & np.uint64(2**COUNT_BITS - 1)).astype(np.int32) + 1
    log_ratios = None
    if fmt.weighted:
        steps = (values >> np.uint64(COUNT_BITS)).astype(np.float32) - 2 ** (_RATIO_BITS - 1)
        log_ratios = steps / np.float32(_RATIO_STEPS)
    return tokens, SparseLogits(sizes, ids, counts=counts, log_ratios=log_ratios, **scalars)


def _split(data: bytes, fmt: SparseFormat, name: object) -> dict[str, np.ndarray]:
    """The parts of one row, uninterpreted."""
    if not data:
        data = encode_row(_empty(fmt), fmt)
    broken = DataError(
        f"the teacher's row {name} is damaged (its checksum or its length does not fit); copy the "
        "shard again from where it was scored, or run encdec score again")
    if len(data) < 12:
        raise broken
    crc, n, pairs = (int(x) for x in np.frombuffer(data, _HEADER, 3))
    if zlib.crc32(memoryview(data)[4:]) != crc:
        raise broken
    layout: list[tuple[str, Any, tuple[int, ...]]] = []
    if fmt.method != "full":
        layout.append(("sizes", np.dtype(np.uint8), (n,)))
    layout += [("log_normaliser", _SCALAR, (n,)), ("entropy", _SCALAR, (n,))]
    if fmt.method == "top_k":
        layout.append(("tail", _SCALAR, (n,)))
    if fmt.method == "full":
        layout.append(("log_probs", np.dtype("<f4"), (n, fmt.vocab_size)))
    else:
        layout.append(("planes", np.dtype(np.uint8), (fmt.pair_bytes, pairs)))
    parts, start = {}, 12
    for key, dtype, shape in layout:
        count = int(np.prod(shape))
        end = start + count * dtype.itemsize
        if end > len(data):
            raise broken
        parts[key] = np.frombuffer(data, dtype, count, start).reshape(shape)
        start = end
    if start != len(data) or (
        "sizes" in parts and int(parts["sizes"].sum(dtype=np.int64)) + n != pairs
    ):
        raise broken
    return parts


def _empty(fmt: SparseFormat) -> SparseLogits:
    ints, floats = np.empty(0, np.int32), np.empty(0, np.float32)
    if fmt.method == "full":
        return SparseLogits(ints, ints, floats, floats,
                            log_probs=np.empty((0, fmt.vocab_size), np.float32))
    if fmt.method == "top_k":
        return SparseLogits(ints, ints, floats, floats, log_probs=floats, tail=floats)
    return SparseLogits(ints, ints, floats, floats, counts=ints,
                        log_ratios=floats if fmt.weighted else None)
