"""Mixtures by rate: of records directories as they are read, of tasks as they are prepared.

At reading time the stream of rows is cut into blocks of BLOCK places; every block gives each part
its share of places and shuffles them. So a row's place follows from its position alone, as
`Batches` wants it, and rates hold exactly in every block. Each part is shuffled anew in each of
its own epochs, whatever the others do.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import pathlib
import re
import sys
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from encdec.data.objectives import Document
from encdec.data.readers import BadRows
from encdec.data.records import DatasetCard, Records, open_records
from encdec.data.shuffle import epoch_order_seed, permuted, shuffled_rows
from encdec.data.text_tasks import TextTask, text_task
from encdec.data.vocabulary import Vocabulary
from encdec.errors import ConfigError, DataError

BLOCK = 10_000
# The paper's four kinds of task, and its silence on pretraining data filled by two corpora.
MIXTURES: dict[str, tuple[str, ...]] = {
    "paper_tasks": ("squad_v2", "xsum", "code_java2cs", "ielts_band"),
    "pretraining": ("c4", "wikipedia"),
}


def mixing_rates(
    sizes: Sequence[int],
    rates: Sequence[float] | None = None,
    *,
    temperature: float = 1.0,
    maximum: int | None = None,
) -> np.ndarray:
    """Shares that sum to 1: of explicit `rates`, else proportional to `sizes`.

    Sizes are first cut at `maximum` examples and then taken to the power 1 / `temperature`
    (Raffel et al. 2020, 3.5.2): a temperature of 1 is proportional mixing, a large one equal.
    """
    if temperature <= 0:
        raise ConfigError(f"the mixture's temperature is {temperature}; wanted more than 0")
    if rates is not None:
        weights = np.asarray(rates, np.float64)
        if len(weights) != len(sizes) or not np.all(np.isfinite(weights) & (weights > 0)):
            raise ConfigError(
                f"the mixture's rates are {list(rates)}; wanted {len(sizes)} numbers above 0"
            )
    else:
        cut = np.minimum(sizes, maximum) if maximum else np.asarray(sizes)
        weights = cut.astype(np.float64) ** (1 / temperature)
    return weights / weights.sum()


def block_quotas(shares: Sequence[float], block: int = BLOCK) -> np.ndarray:
    """Places of each part in a block, by largest remainders, at least one."""
    exact = np.asarray(shares) * block
    quotas = np.maximum(np.floor(exact).astype(np.int64), 1)
    by_remainder = np.argsort(np.floor(exact) - exact, kind="stable")
    for part in itertools.islice(itertools.cycle(by_remainder), max(block - quotas.sum(), 0)):
        quotas[part] += 1
    quotas[quotas.argmax()] += block - quotas.sum()
    return quotas


@functools.lru_cache(maxsize=16)
def _block_order(block: int, seed: int) -> np.ndarray:
    order_seed = epoch_order_seed(seed, f"mixture block {block}")
    return permuted(np.arange(BLOCK), BLOCK, order_seed)


class MixedRecords:
    """Several records directories read as one, each at its share; made for `Batches`.

    Rows are numbered part after part. Raises ConfigError where the parts' vocabularies, lengths
    or decoder start ids differ.
    """

    def __init__(self, parts: Sequence[Records], shares: Sequence[float]):
        self.parts = tuple(parts)
        self.shares = tuple(float(share) for share in shares)
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
        self.card = _mixed_card(self.parts, self.shares)
        self._offsets = np.cumsum([0] + [len(part) for part in self.parts])
        self._quotas = block_quotas(self.shares)
        self._ends = np.cumsum(self._quotas)

    def __len__(self) -> int:
        return int(self._offsets[-1])

    def rows_at(self, positions: np.ndarray, seed: int, shuffle: bool) -> np.ndarray:
        """Numbers, int64, of the rows at positions of the endless stream."""
        blocks, places = np.divmod(np.asarray(positions, np.int64), BLOCK)
        for block in np.unique(blocks):
            where = blocks == block
            places[where] = _block_order(int(block), seed)[places[where]]
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
        """The rows' bytes in the order asked for; errors as `Records.read`."""
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


def _mixed_card(parts: Sequence[Records], shares: Sequence[float]) -> DatasetCard:
    cards = [part.card for part in parts]
    first = cards[0]
    content = [(card.fingerprint, share) for card, share in zip(cards, shares)]
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
        for card, share in zip(cards, shares)
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
    """Open several records directories as a mixture; rates as in `mixing_rates`, by rows."""
    parts = [open_records(directory) for directory in directories]
    sizes = [len(part) for part in parts]
    shares = mixing_rates(sizes, rates, temperature=temperature, maximum=maximum)
    return MixedRecords(parts, shares)


def parse_mixture(text: str) -> tuple[list[str], list[float] | None, float]:
    """Directories, explicit rates or None, temperature of "A=3,B=1" or "A,B;temperature=2"."""
    body, _, setting = text.partition(";")
    temperature = 1.0
    if setting:
        found = re.fullmatch(r"\s*temperature\s*=\s*([0-9.]+)\s*", setting)
        if not found:
            raise ConfigError(f"mixture {text!r}: wanted ;temperature=NUMBER, got ;{setting}")
        temperature = float(found[1])
    names, rates = [], []
    for part in body.split(","):
        name, equals, rate = part.strip().rpartition("=")
        if not equals:
            name, rate = part.strip(), ""
        try:
            rates.append(float(rate) if rate else None)
        except ValueError:
            raise ConfigError(f"mixture {text!r}: the rate {rate!r} is no number") from None
        names.append(name)
    if not all(names):
        raise ConfigError(f"mixture {text!r} has an empty part; write DIR=RATE,DIR=RATE")
    given = [rate is not None for rate in rates]
    if any(given) and (not all(given) or setting):
        raise ConfigError(
            f"mixture {text!r}: give every part a rate, or none of them and a temperature"
        )
    return names, rates if all(given) else None, temperature


def task_or_mixture(
    name: str,
    data_dir: str | None = None,
    *,
    rates: Sequence[float] | None = None,
    temperature: float = 1.0,
    maximum: int | None = None,
) -> TextTask:
    """A task or a mixture by name, over the files below `data_dir` if given."""
    if name not in MIXTURES:
        return text_task(name, data_dir)
    tasks = [text_task(part, data_dir) for part in MIXTURES[name]]
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
    then. Without explicit `rates` the documents are counted first, which reads them twice.
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

    splits = set.intersection(*(set(task.splits) for task in tasks))
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
        tuple(split for split in tasks[0].splits if split in splits),
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
        yield held[part]
        read[part] += 1
        held[part] = next(streams[part], None)
        if held[part] is None:
            unread.discard(part)
            # Faults were counted on the first pass.
            streams[part] = tasks[part].documents(split, BadRows(sys.maxsize))
            held[part] = next(streams[part])
