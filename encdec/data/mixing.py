"""Mixtures by rate: of records directories as they are read, of tasks as they are prepared.

At reading time the stream of rows is cut into blocks of BLOCK places, or of more where a share is
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
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from encdec.data.card import DatasetCard
from encdec.data.objectives import Document
from encdec.data.readers import BadRows
from encdec.data.registry import TEXT_TASKS, text_task
from encdec.data.seqio_tasks import seqio_mixture
from encdec.data.shards import Records, open_directory
from encdec.data.shuffle import epoch_order_seed, permuted, shuffled_rows
from encdec.data.text_tasks import TextTask
from encdec.data.vocabulary import Vocabulary
from encdec.errors import ConfigError, DataError
from encdec.storage import as_path, user_place

BLOCK = 10_000
LARGEST_BLOCK = 10_000_000_000
# How far, relative to a part's share, the share that is read may be from the one that was asked.
PRECISION = 0.01
LEAST_SHARE = 1e-8
# The paper's four kinds of task, and its silence on pretraining data filled by two corpora.
MIXTURES: dict[str, tuple[str, ...]] = {
    "paper_tasks": ("squad_v2", "xsum", "code_java2cs", "ielts_band"),
    "pretraining": ("c4", "wikipedia"),
}
# Rates of those MIXTURES that were registered with some.
RATES: dict[str, tuple[float, ...]] = {}


def register_mixture(name: str, tasks: Sequence[str], rates: Sequence[float] | None = None) -> None:
    """Enters a mixture of registered tasks; without ``rates`` their sizes decide.

    Raises:
        ConfigError: another mixture or a task has its name, no task, or rates that do not fit.
    """
    parts = tuple(tasks)
    if not parts:
        raise ConfigError(f"mixture {name!r} has no tasks; name one or more")
    if name in TEXT_TASKS or MIXTURES.get(name, parts) != parts:
        raise ConfigError(
            f"a mixture or task {name!r} is already registered; give yours another name"
        )
    if rates is not None:
        mixing_rates([1] * len(parts), rates)
        RATES[name] = tuple(rates)
    MIXTURES[name] = parts


def mixture_parts(name: str) -> tuple[str, ...] | None:
    """The tasks of a mixture, ours or of seqio's registry; None where it is no mixture."""
    if name in MIXTURES:
        return MIXTURES[name]
    found = None if name in TEXT_TASKS else seqio_mixture(name)
    return found[0] if found else None


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
    if temperature <= 0:
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
        weights = cut.astype(np.float64) ** (1 / temperature)
    return weights / weights.sum()


def block_quotas(shares: Sequence[float]) -> np.ndarray:
    """Places, int64, of each part in a block, by largest remainders.

    Their sum is the block: BLOCK, or the smallest power of ten times it in which every share is
    kept to PRECISION of itself. ConfigError, naming the least share, where none is large enough.
    """
    if min(shares) < LEAST_SHARE:
        raise ConfigError(
            f"a part of the mixture has a share of {min(shares):.3g} of the rows; the least one is "
            f"{LEAST_SHARE:g}: raise its rate, or leave the part out"
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
            for name, read in _MUST_AGREE.items():
                mine, other = read(first.card), read(part.card)
                if mine != other:
                    raise ConfigError(
                        f"records cannot be mixed: {name} is {mine} in {first.directory} but "
                        f"{other} in {part.directory}; prepare them alike"
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


_MUST_AGREE: dict[str, Callable[[DatasetCard], object]] = {
    "the vocabulary's fingerprint": lambda card: card.vocabulary.fingerprint[:16],
    "inputs_length": lambda card: card.inputs_length,
    "targets_length": lambda card: card.targets_length,
    "decoder_start_id": lambda card: card.decoder_start_id,
}


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
    maximum: int | None = None,
) -> MixedRecords:
    """Open several records directories as a mixture; rates as in ``mixing_rates``, by rows."""
    if len(directories) < 2:
        raise ConfigError(f"a mixture of {list(directories)}; expected two directories or more")
    parts = [open_directory(directory) for directory in directories]
    sizes = [len(part) for part in parts]
    shares = mixing_rates(sizes, rates, temperature=temperature, maximum=maximum)
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
        raise ConfigError(f"mixture {mixture!r}: the {what} {text!r} is no number") from None


def task_or_mixture(
    name: str,
    data_dir: str | None = None,
    *,
    rates: Sequence[float] | None = None,
    temperature: float = 1.0,
    maximum: int | None = None,
) -> TextTask:
    """A task or a mixture by name, over the files below ``data_dir`` if given."""
    parts = mixture_parts(name)
    if parts is None:
        if rates is not None or temperature != 1 or maximum is not None:
            raise ConfigError(
                f"mixture.rates, .temperature and .maximum are for {', '.join(MIXTURES)}, and the "
                f"task is {name}; leave them out"
            )
        return text_task(name, data_dir)
    tasks = [text_task(part, data_dir, one_of_several=True) for part in parts]
    if rates is None and temperature == 1 and maximum is None:
        rates = RATES.get(name)
        if name not in MIXTURES and (found := seqio_mixture(name)):
            rates = found[1]
    return mixed_task(name, tasks, rates, temperature=temperature, maximum=maximum)


def mixed_task(
    name: str,
    tasks: Sequence[TextTask],
    rates: Sequence[float] | None = None,
    *,
    temperature: float = 1.0,
    maximum: int | None = None,
) -> TextTask:
    """Tasks mixed document by document, for preparing one records directory of all of them.

    Ends once every task was read in full; one whose rate outweighs its size starts over until
    then. Without explicit ``rates`` the documents are counted first, which reads them twice.
    Evenly interleaved and deterministic: at every place the task furthest behind its share.
    """
    fields = {task.objective.document_fields for task in tasks}
    if len(fields) != 1:
        raise ConfigError(
            f"mixture {name} joins tasks of pairs and of raw text: "
            f"{', '.join(task.name for task in tasks)}; prepare them apart, mix when reading"
        )

    def read(split: str, bad_rows: BadRows) -> Iterator[Document]:
        sizes = [1] * len(tasks)
        if rates is None:
            counted = BadRows(bad_rows.allowed)
            sizes = [sum(1 for _ in task.documents(split, counted)) for task in tasks]
        shares = mixing_rates(sizes, rates, temperature=temperature, maximum=maximum)
        return _interleave(tasks, shares, split, bad_rows)

    # A task without splits takes any name.
    limited = [task.splits for task in tasks if task.splits]
    splits = set.intersection(*map(set, limited)) if limited else set()
    if limited and not splits:
        raise ConfigError(
            f"the tasks of mixture {name} have no split in common: "
            + "; ".join(f"{task.name} has {', '.join(task.splits)}" for task in tasks)
        )
    return TextTask(
        name,
        read,
        tasks[0].objective,
        lambda: {
            "mixture": {task.name: task.origin() for task in tasks},
            "rates": list(rates) if rates else None,
            "temperature": temperature,
            "maximum": maximum,
        },
        tuple(split for split in limited[0] if split in splits) if limited else (),
    )


def _interleave(
    tasks: Sequence[TextTask], shares: np.ndarray, split: str, bad_rows: BadRows
) -> Iterator[Document]:
    streams = [task.documents(split, bad_rows) for task in tasks]
    # One document ahead, so that the end of a task is known before it would start over.
    held = [next(stream, None) for stream in streams]
    for task, document in zip(tasks, held):
        if document is None:
            raise DataError(f"task {task.name}, split {split}, has no documents")
    read = np.zeros(len(tasks))
    unread = set(range(len(tasks)))
    while unread:
        part = int(np.argmax(shares * (read.sum() + 1) - read))
        document = held[part]
        assert document is not None
        yield document
        read[part] += 1
        held[part] = next(streams[part], None)
        if held[part] is None:
            unread.discard(part)
            # Faults were counted on the first pass.
            streams[part] = tasks[part].documents(split, BadRows(sys.maxsize))
            held[part] = next(streams[part])
