"""Mixtures by rate: of records directories, as they are read.

The stream of rows is cut into blocks of BLOCK places, or of more where a share is
too small for that; every block gives each part its share of places and shuffles them. So a row's
place follows from its position alone, as ``Batches`` wants it, and rates hold in every block, to
PRECISION of each share. Each part is shuffled again in each of its own epochs, whatever the others
do.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from encdec.data.card import MUST_AGREE, DatasetCard
from encdec.data.shards import Records, open_directory
from encdec.data.shuffle import epoch_order_seed, permuted, shuffled_rows
from encdec.data.vocabulary import Vocabulary
from encdec.errors import ConfigError
from encdec.storage import as_path, user_place

BLOCK = 10_000
LARGEST_BLOCK = 10_000_000_000
# How far, relative to a part's share, the share that is read may be from the one that was asked.
PRECISION = 0.01
LEAST_SHARE = 1e-8


def check_once(parts: Sequence[str], mixture: str) -> None:
    """ConfigError where a mixture has a part twice."""
    if twice := next((part for n, part in enumerate(parts) if part in parts[:n]), ""):
        raise ConfigError(f"{mixture} has {twice!r} twice; give it once, at the sum of its rates")


def mixing_rates(
    sizes: Sequence[int],
    rates: Sequence[float] | None = None,
    *,
    temperature: float = 1.0,
    maximum: int | None = None,
) -> np.ndarray:
    """Shares that sum to 1: of explicit ``rates``, else proportional to ``sizes``.

    Sizes are first cut at ``maximum`` examples and then taken to the power 1 / ``temperature``
    (Raffel et al. 2020, 3.5.2): a temperature of 1 is proportional mixing, a large one equal.
    """
    if not temperature > 0:
        raise ConfigError(f"the mixture's temperature is {temperature}; expected more than 0")
    if maximum is not None and maximum < 1:
        raise ConfigError(f"the mixture's maximum is {maximum}; expected 1 example or more")
    if rates is not None:
        if temperature != 1 or maximum is not None:
            raise ConfigError(
                f"the mixture has rates and also temperature {temperature}, maximum {maximum}, "
                "which are for mixing by size; give one or the other"
            )
        weights = np.asarray(rates, np.float64)
        if len(weights) != len(sizes) or not np.all(np.isfinite(weights) & (weights > 0)):
            raise ConfigError(
                f"the mixture's rates are {list(rates)}; expected {len(sizes)} numbers above 0"
            )
    else:
        cut = np.minimum(sizes, maximum) if maximum else np.asarray(sizes)
        with np.errstate(over="ignore"):
            weights = cut.astype(np.float64) ** (1 / temperature)
        if not np.isfinite(weights.sum()):
            raise ConfigError(
                f"the mixture's temperature of {temperature:g} is too small for parts of "
                f"{', '.join(f'{size:,}' for size in sizes)}; raise it, or give rates"
            )
    return weights / weights.sum()


def block_quotas(shares: Sequence[float]) -> np.ndarray:
    """Places, int64, of each part in a block, by largest remainders.

    Their sum is the block: BLOCK, or the smallest power of ten times it in which every share is
    kept to PRECISION of itself. ConfigError, naming the least share, where none is large enough.
    """
    if min(shares) < LEAST_SHARE:
        raise ConfigError(
            f"a part of the mixture has a share of {min(shares):.3g} of the rows; the smallest "
            f"possible is {LEAST_SHARE:g}: raise its rate, or leave the part out"
        )
    block = BLOCK
    while True:
        quotas = _largest_remainders(np.asarray(shares), block)
        error = np.abs(quotas / block / np.asarray(shares) - 1).max()
        if error <= PRECISION or block == LARGEST_BLOCK:
            return quotas
        block *= 10


def _largest_remainders(shares: np.ndarray, block: int) -> np.ndarray:
    exact = shares * block
    quotas = np.floor(exact).astype(np.int64)
    by_remainder = np.argsort(quotas - exact, kind="stable")
    quotas[by_remainder[: block - quotas.sum()]] += 1
    return quotas


@functools.lru_cache(maxsize=16)
def _whole_order(order_seed: int) -> np.ndarray:
    return permuted(np.arange(BLOCK), BLOCK, order_seed)


def _in_order(places: np.ndarray, size: int, block: int, seed: int) -> np.ndarray:
    """Where ``places`` of block number ``block``, of ``size`` places, are after shuffling it."""
    order_seed = epoch_order_seed(seed, f"mixture block {block}")
    if size == BLOCK:
        return _whole_order(order_seed)[places]
    return permuted(places, size, order_seed)


class MixedRecords:
    """Several records directories read as one, each at its share; made for ``Batches``.

    Rows are numbered part after part. Raises ConfigError where the parts' vocabularies, lengths
    or decoder start ids differ.
    """

    def __init__(self, parts: Sequence[Records], shares: Sequence[float]):
        self.parts = tuple(parts)
        self._quotas = block_quotas(shares)
        self._ends = np.cumsum(self._quotas)
        self._block = int(self._ends[-1])
        self.shares = tuple(map(float, shares))
        # Quotas are whole numbers: what is read differs by up to PRECISION.
        self.read_shares = tuple(float(quota) / self._block for quota in self._quotas)
        self.by_rows = np.allclose(shares, [len(p) / sum(map(len, parts)) for p in parts])
        first = self.parts[0]
        self.directory = first.directory
        for part in self.parts[1:]:
            for name, read in MUST_AGREE.items():
                mine, other = read(first.card), read(part.card)
                if mine != other:
                    raise ConfigError(
                        f"records cannot be mixed: {name} is {mine} in {first.directory} but "
                        f"{other} in {part.directory}; prepare them with the same settings"
                    )
        self.card = _mixed_card(self.parts, self.shares, self.read_shares, self._block)
        self._offsets = np.cumsum([0] + [len(part) for part in self.parts])

    def __len__(self) -> int:
        return int(self._offsets[-1])

    def rows_at(self, positions: np.ndarray, seed: int, shuffle: bool) -> np.ndarray:
        """Numbers, int64, of the rows at positions of the endless stream."""
        blocks, places = np.divmod(np.asarray(positions, np.int64), self._block)
        for block in np.unique(blocks):
            where = blocks == block
            places[where] = _in_order(places[where], self._block, int(block), seed)
        part_of = np.searchsorted(self._ends, places, side="right")
        result = np.empty_like(places)
        for part in np.unique(part_of):
            where = part_of == part
            quota, rows = int(self._quotas[part]), len(self.parts[part])
            own = blocks[where] * quota + places[where] - int(self._ends[part]) + quota
            found = shuffled_rows(own, rows, f"{seed} part {part}") if shuffle else own % rows
            result[where] = self._offsets[part] + found
        return result

    def read(self, row_numbers: Sequence[int] | np.ndarray) -> list[bytes]:
        """The rows' bytes in the order asked for; errors as ``Records.read``."""
        numbers = np.asarray(row_numbers, np.int64)
        part_of = np.searchsorted(self._offsets, numbers, side="right") - 1
        result: list[bytes] = [b""] * len(numbers)
        for part in np.unique(part_of):
            where = np.flatnonzero(part_of == part)
            rows = self.parts[part].read(numbers[where] - self._offsets[part])
            for place, row in zip(where, rows):
                result[place] = row
        return result

    def vocabulary(self) -> Vocabulary:
        """The vocabulary that all parts share."""
        return self.parts[0].vocabulary()


def _mixed_card(
    parts: Sequence[Records], shares: Sequence[float], read_shares: Sequence[float], block: int
) -> DatasetCard:
    cards = [part.card for part in parts]
    first = cards[0]
    # Shares as asked for: the fingerprints of runs that are under way rest on them.
    content: list[Any] = [(card.fingerprint, share) for card, share in zip(cards, shares)]
    content += [block] * (block != BLOCK)
    sums = ("rows", "examples", "documents", "source_tokens", "target_tokens", "target_bytes")
    totals = {name: sum(getattr(card, name) for card in cards) for name in sums}
    tokens = totals["source_tokens"] + totals["target_tokens"]
    same = lambda name, other: (
        getattr(first, name) if len({str(getattr(c, name)) for c in cards}) == 1 else other
    )
    described = [
        {
            "task": card.task,
            "split": card.split,
            "rows": card.rows,
            "share": share,
            "fingerprint": card.fingerprint,
        }
        for card, share in zip(cards, read_shares)
    ]
    return dataclasses.replace(
        first,
        task="+".join(card.task for card in cards),
        split=same("split", "mixed"),
        origin={"mixture": described},
        packing=same("packing", "mixed"),
        objective=same("objective", {"name": "mixture"}),
        non_padding_share=tokens / (totals["rows"] * (first.inputs_length + first.targets_length)),
        truncated={},
        dropped={},
        lost={},
        shards=(),
        fingerprint=hashlib.sha256(json.dumps(["mixture", content]).encode()).hexdigest(),
        **totals,
    )


def mix_records(
    directories: Sequence[str | pathlib.Path],
    rates: Sequence[float] | None = None,
    *,
    temperature: float = 1.0,
) -> MixedRecords:
    """Open several records directories as a mixture; rates as in ``mixing_rates``, by rows."""
    if len(directories) < 2:
        raise ConfigError(f"a mixture of {list(directories)}; expected two directories or more")
    parts = [open_directory(directory) for directory in directories]
    sizes = [len(part) for part in parts]
    shares = mixing_rates(sizes, rates, temperature=temperature)
    return MixedRecords(parts, shares.tolist())


def parse_mixture(text: str) -> tuple[list[str], list[float] | None, float]:
    """Directories, explicit rates or None, temperature of "A=3,B=1" or "A,B;temperature=2".

    A part that exists under the whole of its name has no rate, whatever the name holds.
    """
    body, _, setting = text.partition(";")
    temperature = 1.0
    if setting:
        found = re.fullmatch(r"\s*temperature\s*=\s*(\S+)\s*", setting)
        if not found:
            raise ConfigError(f"mixture {text!r}: expected ;temperature=NUMBER, got ;{setting}")
        temperature = _number(found[1], "temperature", text)
    names: list[str] = []
    rates: list[float | None] = []
    for part in map(str.strip, body.split(",")):
        name, equals, rate = part.rpartition("=")
        if not equals or as_path(user_place("a part of the mixture", part or "?")).exists():
            name, equals = part, ""
        if not name:
            raise ConfigError(f"mixture {text!r} has an empty part; write DIR=RATE,DIR=RATE")
        names.append(user_place("a part of the mixture", name))
        rates.append(_number(rate, "rate", text) if equals else None)
    check_once([str(as_path(name)) for name in names], f"mixture {text!r}")
    given = [rate for rate in rates if rate is not None]
    if given and (len(given) < len(rates) or setting):
        raise ConfigError(
            f"mixture {text!r}: give every part a rate, or none of them and a temperature"
        )
    return names, given or None, temperature


def _number(text: str, what: str, mixture: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"mixture {mixture!r}: the {what} {text!r} is not a number") from None
