"""Records with new targets: a model's answers to the sources of other records, in large batches.

With the student as the writer these are the on-policy targets of GKD (arXiv 2306.13649), which
the teacher then reads like any records; with the teacher as the writer it is sequence-level
distillation (arXiv 1606.07947). Training mixes them with gold targets by rate:
``--config.data.records=GOLD=1,WRITTEN=1 --config.distill.teacher=OF_GOLD,OF_WRITTEN``.

Each block of the records' rows becomes one shard; what a text is answered with depends on the seed
and its own place alone, so a killed rollout continues and ends with the same bytes.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from encdec.data.input_prefix import with_prefix
from encdec.data.mixing import MixedRecords
from encdec.data.packing import pack
from encdec.data.records import (
    DatasetCard,
    Records,
    Shard,
    content_fingerprint,
    decode_row,
    encode_row,
    open_records,
    read_card,
    write_shard,
)
from encdec.data.teacher_rows import short
from encdec.data.vocabulary import CARD_FILE, recorded_vocabulary
from encdec.errors import ConfigError, DataError
from encdec.inference.draft_model import check_draft_model
from encdec.inference.generation_settings import (
    AUTO,
    GenerationSettings,
    check_draft,
    check_numbers,
)
from encdec.inference.generator import TextGenerator
from encdec.inference.load_generator import load
from encdec.jobs import DirectoryJob, Notes, Tally, plain
from encdec.saved.saved_config import read_config
from encdec.saved.saved_params import step_to_read
from encdec.storage import absolute, as_path

BLOCK_ROWS = 256
PACKING = "best_fit"
ON_POLICY = GenerationSettings(temperature=0.9, top_k=128)
_SEGMENTS = 1 << 12  # the most texts in a row that random keys tell apart

Progress = Callable[["RolloutTally"], None]


@dataclasses.dataclass
class RolloutTally(Tally):
    """What was written; ``unfinished`` answers reached their length before EOS."""

    rows: int = 0
    examples: int = 0
    source_tokens: int = 0
    target_tokens: int = 0
    target_bytes: int = 0
    unfinished: int = 0


@dataclasses.dataclass(frozen=True)
class Answering:
    """How a model answers the sources of records.

    Attributes:
        settings: how to generate; by default as GKD's authors do on policy.
        rows: read no more than this many of the records' rows, from the first; None: all.
        batch_rows: texts answered together.
        block_rows: rows of the records that become one shard.
        draft: see ``encdec.inference.draft_model.load_draft``.
    """

    settings: GenerationSettings = ON_POLICY
    rows: int | None = None
    batch_rows: int = 64
    block_rows: int = BLOCK_ROWS
    draft: str = AUTO


def rollout(
    writer: str | pathlib.Path,
    records: str | pathlib.Path,
    out: str | pathlib.Path,
    *,
    answering: Answering = Answering(),
    step: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> DatasetCard:
    """Writes records whose sources are those of ``records`` and whose targets ``writer`` wrote.

    Args:
        writer: work directory of ``encdec train`` or ``encdec import``.
        records: directory of ``encdec prepare``.
        out: the records directory to write, or to finish; nothing is done where it is finished.
        answering: how to generate, and how much.
        step: the writer's checkpoint; by default the last.
        overwrite: replace finished records in ``out`` once the new ones are whole.
        progress: called after every block with what was written so far.

    Raises:
        ConfigError: several answers to a text, a mixture, records without sources, or a draft
            model that cannot be used.
        DataError: another vocabulary, or ``out`` holds something else.
        CheckpointError: no writer there.
    """
    opened = open_records(records)
    check_answering(opened, answering)
    check_writer(writer, opened)
    if absolute(out) == absolute(records):
        raise ConfigError(f"--out={out} is --records, whose sources are read; give another --out")
    # A run that is trained on meanwhile has another last step; one rollout is one checkpoint's.
    step = step_to_read(writer, step)
    rows = min(answering.rows or len(opened), len(opened))
    block_rows = answering.block_rows
    content = read_config(writer)
    longest = opened.card.targets_length
    settings = dataclasses.replace(
        answering.settings, max_tokens=answering.settings.max_tokens or longest
    )
    batch_rows = answering.batch_rows
    made_of = {"rows": rows, "batch_rows": batch_rows, "block_rows": block_rows}
    identity = _identity(content, step, opened, settings) | made_of
    job = DirectoryJob(
        as_path(out), "rollout", identity, CARD_FILE, RolloutTally, overwrite=overwrite
    )
    if job.finished:
        card = read_card(out)
        made = card.origin.get("written", {})
        # Earlier versions recorded no step for the last one.
        job.check_finished(made, identity | ({"step": None} if made.get("step", 0) is None else {}))
        return card
    with job.writing():
        blocks = range(-(-rows // block_rows))
        missing, total = job.notes.missing(blocks)
        if missing:
            generator = load(
                writer,
                step or None,
                max_input_tokens=_longest_input(content, opened.card),
                batch_rows=batch_rows,
                draft=answering.draft,
            )
        for number in missing:
            numbers = range(number * block_rows, min((number + 1) * block_rows, rows))
            total.add(_write_block(generator, settings, opened, job.notes, number, numbers))
            if progress:
                progress(total)
        opened.vocabulary().save(job.directory)
        shards = [job.notes.read(number)[0] for number in blocks]
        card = _card(opened.card, [shard for shard in shards if shard], total, identity)
        card.write(job.directory)
        job.end()
    return card


def _identity(
    content: Mapping[str, Any], step: int, records: Records, settings: GenerationSettings
) -> dict[str, Any]:
    """Whose answers to what: plain JSON values."""
    return plain(
        {
            "writer": content.get("imported")
            or [content[part] for part in ("run", "data", "averaged") if part in content],
            "step": step,
            "records": records.card.fingerprint,
            "settings": settings.to_dict(),
        }
    )


def check_answering(records: Records, answering: Answering) -> None:
    """Everything that ``rollout`` checks before it knows its writer; raises the same."""
    if isinstance(records, MixedRecords):
        raise ConfigError("--records is a mixture; generate answers for each part separately")
    if records.card.inputs_length == 0:
        raise ConfigError(
            f"{records.directory} holds targets without sources; expected records with sources"
        )
    if answering.settings.samples != 1:
        raise ConfigError(
            f"samples is {answering.settings.samples}; expected 1: repeat the rollout with another "
            "seed for more answers"
        )
    longest, asked = records.card.targets_length, answering.settings.max_tokens
    if asked is not None and asked > longest:
        raise ConfigError(
            f"max_tokens is {asked}, but the rows of {records.directory} hold {longest} target "
            "tokens; leave it out, or prepare them with a larger --targets_length"
        )
    check_draft(answering.draft, answering.settings)
    check_numbers(answering, rows=1, batch_rows=1, block_rows=1)
    check_draft_model(answering.draft, records.vocabulary())


def check_writer(writer: str | pathlib.Path, records: Records) -> None:
    """Raises DataError for a model of another vocabulary than the records'."""
    seen = recorded_vocabulary(read_config(writer), writer)["fingerprint"]
    if seen != records.card.vocabulary.fingerprint:
        raise DataError(
            f"the model in {writer} has the vocabulary {short(seen)}, but the records in "
            f"{records.directory} have {short(records.card.vocabulary.fingerprint)}; prepare "
            "records with the model's vocabulary"
        )


def _longest_input(content: Mapping[str, Any], card: DatasetCard) -> int:
    """Of the records' sources, with the writer's prefix in place of theirs."""
    added = len(content["data"].get("inputs_prefix", ())) - len(card.inputs_prefix)
    return card.inputs_length + max(0, added)


def _write_block(
    generator: TextGenerator,
    settings: GenerationSettings,
    records: Records,
    notes: Notes[RolloutTally],
    number: int,
    numbers: range,
) -> RolloutTally:
    """Answers the texts of some rows and packs them again into one shard."""
    dtype = records.card.token_dtype
    sources, asked, keys = [], [], []
    for row_number, data in zip(numbers, records.read(numbers)):
        found = decode_row(data, dtype)[0]
        sources += found
        asked += [
            with_prefix(ids, records.card.inputs_prefix, generator.prompts.inputs_prefix)
            for ids in found
        ]
        keys += [(row_number * _SEGMENTS + place) % 2**32 for place in range(len(found))]
    answers = [made[0] for made in generator.generate_from_tokens(asked, settings, numbers=keys)]
    targets = [np.asarray(answer.tokens) for answer in answers]
    lengths = [np.array([len(ids) for ids in side]) for side in (sources, targets)]
    rows = pack(
        lengths[0], lengths[1], records.card.inputs_length, records.card.targets_length, PACKING
    )
    shard = write_shard(
        notes.directory / f"rows-{number:06d}.arrayrecord",
        (encode_row([sources[i] for i in row], [targets[i] for i in row], dtype) for row in rows),
    )
    written = RolloutTally(
        len(rows),
        len(sources),
        sum(map(len, sources)),
        sum(map(len, targets)),
        sum(len(answer.text.encode()) for answer in answers),
        sum(answer.finish == "length" for answer in answers),
    )
    notes.write(number, shard, written)
    return written


def _card(
    card: DatasetCard, shards: list[Shard], total: RolloutTally, identity: dict[str, Any]
) -> DatasetCard:
    slots = total.rows * (card.inputs_length + card.targets_length)
    return dataclasses.replace(
        card,
        task=f"{card.task}, written by a model",
        origin={"written": identity, "sources": card.origin},
        packing=PACKING,
        rows=total.rows,
        examples=total.examples,
        documents=total.examples,
        source_tokens=total.source_tokens,
        target_tokens=total.target_tokens,
        target_bytes=total.target_bytes,
        non_padding_share=(total.source_tokens + total.target_tokens) / slots,
        truncated={"answers_without_eos": total.unfinished} if total.unfinished else {},
        dropped={},
        lost={},
        shards=tuple(shards),
        fingerprint=content_fingerprint(
            shards,
            card.vocabulary,
            card.inputs_length,
            card.targets_length,
            card.decoder_start_id,
            card.inputs_prefix,
        ),
    )
