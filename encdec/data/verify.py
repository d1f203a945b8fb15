"""Checks a records directory against its card: files, checksums, counts, rows."""

from __future__ import annotations

import collections
import dataclasses
import pathlib
from collections.abc import Callable

import numpy as np

from encdec.data.records import (
    DatasetCard,
    Records,
    Shard,
    content_fingerprint,
    decode_row,
    read_card,
)
from encdec.data.vocabulary import Vocabulary
from encdec.data.vocabulary_losses import Losses, count_unknown
from encdec.errors import DataError
from encdec.files import file_sha256, file_size
from encdec.storage import as_path

SAMPLE_ROWS = 2000
READ_ROWS = 512


@dataclasses.dataclass
class Verdict:
    """What was found: ``faults`` are sentences, each naming what is wrong and where.

    ``unknown_ids`` are those in the rows that were read, which are no fault of the records.
    """

    rows_read: int = 0
    unknown_ids: int = 0
    faults: list[str] = dataclasses.field(default_factory=list)


def verify_records(
    directory: str | pathlib.Path,
    *,
    sample_rows: int | None = SAMPLE_ROWS,
    progress: Callable[[str], None] | None = None,
) -> Verdict:
    """Check card, vocabulary, every shard's checksum, and rows: an even sample, or all (None).

    With all rows read, the card's counts of tokens and examples are checked too. Raises DataError
    only where there is no readable card.
    """
    directory = as_path(directory)
    card = read_card(directory)
    verdict = Verdict()
    say = progress or (lambda _: None)
    vocabulary = _check_card(directory, card, verdict)
    for shard in card.shards:
        say(f"checksum of {shard.name}")
        _check_shard(directory, shard, verdict)
    known = {shard.name for shard in card.shards}
    for path in sorted(directory.glob("*.arrayrecord*")):
        if path.name not in known:
            verdict.faults.append(f"{path.name} is not a shard of the card: remove it")
    if not verdict.faults and vocabulary:
        say("rows")
        _check_rows(Records(directory, card), vocabulary, sample_rows, verdict)
    return verdict


def _check_card(directory: pathlib.Path, card: DatasetCard, verdict: Verdict) -> Vocabulary | None:
    lengths = card.inputs_length, card.targets_length
    framing = card.decoder_start_id, card.inputs_prefix
    wanted = content_fingerprint(card.shards, card.vocabulary, *lengths, *framing)
    if wanted != card.fingerprint:
        verdict.faults.append(
            f"dataset.json states the fingerprint {card.fingerprint[:16]}, its own fields give "
            f"{wanted[:16]}: it was edited"
        )
    rows = sum(shard.rows for shard in card.shards)
    if rows != card.rows:
        verdict.faults.append(f"dataset.json states {card.rows:,} rows, its shards hold {rows:,}")
    try:
        return Records(directory, card).vocabulary()
    except DataError as error:
        verdict.faults.append(str(error))
        return None


def _check_shard(directory: pathlib.Path, shard: Shard, verdict: Verdict) -> None:
    path = directory / shard.name
    if not path.is_file():
        verdict.faults.append(f"{shard.name} is missing")
    elif (size := file_size(path)) != shard.bytes:
        verdict.faults.append(f"{shard.name} has {size:,} bytes, expected {shard.bytes:,}")
    elif (found := file_sha256(path)) != shard.sha256:
        verdict.faults.append(
            f"{shard.name} has the checksum {found[:16]}, expected {shard.sha256[:16]}"
        )


def _check_rows(
    records: Records, vocabulary: Vocabulary, sample_rows: int | None, verdict: Verdict
) -> None:
    card = records.card
    count = len(records) if sample_rows is None else min(sample_rows, len(records))
    everything = count == len(records)
    numbers = np.linspace(0, len(records) - 1, count).round().astype(np.int64)
    totals: collections.Counter[str] = collections.Counter()
    for start in range(0, count, READ_ROWS):
        part = numbers[start : start + READ_ROWS]
        for number, stored in zip(part, records.read(part)):
            if fault := _row_fault(stored, card, vocabulary, totals):
                verdict.faults.append(f"row {number}: {fault}")
                return
    verdict.rows_read, verdict.unknown_ids = count, totals["unknown_ids"]
    if everything:
        names = ("examples", "source_tokens", "target_tokens")
        stated = {name: getattr(card, name) for name in names}
        if Losses(**card.lost).texts:
            stated["unknown_ids"] = card.lost["unknown_ids"]
        for name, value in stated.items():
            if totals[name] != value:
                verdict.faults.append(
                    f"dataset.json states {value:,} {name}, the rows hold {totals[name]:,}"
                )


def _row_fault(
    stored: bytes, card: DatasetCard, vocabulary: Vocabulary, totals: collections.Counter[str]
) -> str | None:
    try:
        sources, targets = decode_row(stored, card.token_dtype)
    except (ValueError, IndexError) as error:
        return f"it cannot be decoded ({error})"
    lengths = [sum(map(len, side)) for side in (sources, targets)]
    if lengths[0] > card.inputs_length or lengths[1] > card.targets_length:
        most = f"{card.inputs_length} + {card.targets_length}"
        return f"{lengths[0]} + {lengths[1]} tokens, expected {most} at most"
    if not all(map(len, targets)) or (card.inputs_length and not all(map(len, sources))):
        return "a segment without tokens"
    prefix = card.inputs_prefix
    if not all(tuple(source[: len(prefix)]) == prefix for source in sources):
        return f"a source that does not begin with the card's inputs_prefix {list(prefix)}"
    largest = max(int(part.max()) for part in (*sources, *targets) if len(part))
    if largest >= vocabulary.size:
        return f"id {largest}, the vocabulary has {vocabulary.size}"
    totals["examples"] += len(targets)
    totals["source_tokens"] += lengths[0]
    totals["target_tokens"] += lengths[1]
    totals["unknown_ids"] += count_unknown(vocabulary, [*sources, *targets])
    return None
