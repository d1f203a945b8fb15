"""``encdec prepare``: text to a records directory, all or nothing.

Documents are cut into blocks, each written as one shard by any worker. An interrupted preparation
continues where it was (``encdec.jobs``).
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import fnmatch
import functools
import itertools
import multiprocessing
import os
import pathlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from encdec.data.blocks import (
    SHARDS,
    Counts,
    DocumentBlock,
    Recipe,
    cut_blocks,
    make_card,
    shard_name,
    write_block,
)
from encdec.data.objectives import Document, Objective, describe_objective
from encdec.data.prepare_settings import PrepareSettings
from encdec.data.readers import BadRows
from encdec.data.records import DatasetCard, Shard, read_card
from encdec.data.text_tasks import TextTask
from encdec.data.vocabulary import CARD_FILE, Vocabulary, VocabularySpec, load_vocabulary
from encdec.errors import ConfigError, DataError, EncdecError
from encdec.files import write_text
from encdec.jobs import DirectoryJob, Notes
from encdec.machine import available_cores
from encdec.storage import entries

# Which rows --max_bad_rows left out: a line each, with file, line and reason.
BAD_ROWS_FILE = "bad_rows.txt"

Progress = Callable[[Counts], None]
# (recipe, notes, vocabulary, blocks) to each block's shard and counts, in order.
WriteBlocks = Callable[
    [Recipe, Notes[Counts], Vocabulary, Iterator[DocumentBlock]],
    Iterator[tuple[Shard | None, Counts]],
]


def prepare(
    settings: PrepareSettings = PrepareSettings(),
    *,
    texts: Mapping[str, str] | None = None,
    progress: Progress | None = None,
    writer: WriteBlocks | None = None,
    **fields: Any,
) -> DatasetCard:
    """Write a records directory as ``settings`` say, or with these of its ``fields``.

    ``texts`` are files (name to text) to store with the records; ``writer`` writes the blocks in
    place of this machine's processes (``beam_prepare``).

    Raises ConfigError for settings that cannot work and DataError for bad input or, if asked for
    ``lossless``, a vocabulary that loses text, after removing what this call wrote. A call that is
    killed can be repeated and continues.
    """
    given = dataclasses.replace(settings, **fields)
    given.check()
    settings = given.resolved()
    source = settings.text_task()
    inputs, targets = source.row_lengths(settings.inputs_length, settings.targets_length)
    source = source.at_lengths(inputs, targets)
    if given.inputs_prefix is None and inputs == 0:  # nothing that it could be in front of
        settings = dataclasses.replace(settings, inputs_prefix=())
    assert settings.vocabulary is not None and settings.decoder_start_id is not None
    vocabulary = load_vocabulary(settings.vocabulary, extra_ids=settings.extra_ids)
    recipe = _recipe(settings, source, vocabulary, (inputs, targets))
    bad_rows = BadRows(settings.max_bad_rows)
    passes = {"passes": settings.passes} if settings.passes > 1 else {}
    job = settings.identity() | {
        "inputs_length": inputs,
        "targets_length": targets,
        "task": source.name,
        "origin": source.origin() | passes,
        "vocabulary": vocabulary.fingerprint,
        "objective": describe_objective(recipe.objective),
    }
    # Reading starts before anything is written: a wrong split or a bad first row leaves nothing.
    documents = _peek(_passes(source, settings, bad_rows))
    building = DirectoryJob(
        settings.directory, "preparation", job, CARD_FILE, Counts, overwrite=settings.overwrite
    )
    if building.finished:
        card = read_card(settings.directory)
        raise DataError(
            f"{settings.directory} already holds {card.rows:,} rows of {card.task}; give another "
            "--out, or --overwrite to replace them"
        )
    with building.writing():
        try:
            counts, shards = _write_shards(
                settings, recipe, vocabulary, documents, building.notes, writer, progress
            )
            if bad_rows.count:
                counts.dropped["bad_rows"] = bad_rows.count
                write_text(building.directory / BAD_ROWS_FILE, bad_rows.listing())
            card = make_card(
                recipe,
                vocabulary,
                shards,
                counts,
                task=source.name,
                split=settings.split_name,
                origin=job["origin"],
                decoder_start_id=settings.decoder_start_id,
            )
        except EncdecError:
            building.discard()
            raise
        for name, content in (texts or {}).items():
            write_text(building.directory / name, content)
        # Of a call that was interrupted, before the text became less.
        kept = {shard.name for shard in shards}
        for name in entries(building.directory) - kept:
            if fnmatch.fnmatchcase(name, SHARDS) or name == BAD_ROWS_FILE and not bad_rows.count:
                (building.directory / name).unlink(missing_ok=True)
        card.write(building.directory)
        building.end()
    return card


def _write_shards(
    settings: PrepareSettings,
    recipe: Recipe,
    vocabulary: Vocabulary,
    documents: Iterator[Document],
    notes: Notes[Counts],
    writer: WriteBlocks | None,
    progress: Progress | None,
) -> tuple[Counts, list[Shard]]:
    """The shards of all blocks, in order, and their totals."""
    vocabulary.save(notes.directory)
    counts = Counts()
    shards: list[Shard] = []
    write = writer or _Processes(settings.workers or available_cores())
    blocks = cut_blocks(documents, settings.block_bytes)
    for shard, block_counts in write(recipe, notes, vocabulary, blocks):
        counts.add(block_counts)
        if settings.lossless and counts.lost:
            raise DataError(
                f"the vocabulary is not lossless on this text: {counts.lost.describe()}; use one "
                "that is ('bytes', or one trained by encdec vocab), or leave --lossless out"
            )
        if shard:
            shards.append(shard)
        if progress:
            progress(counts)
    return counts, shards


def _recipe(
    settings: PrepareSettings, task: TextTask, vocabulary: Vocabulary, lengths: tuple[int, int]
) -> Recipe:
    """How documents become rows; ConfigError where text, vocabulary or settings do not suit it."""
    objective = settings.objective or task.objective
    if not isinstance(objective, Objective):
        raise ConfigError(f"objective is {objective!r}; expected an Objective (flags take names)")
    name = type(objective).__name__
    wanted, given = objective.document_fields, task.objective.document_fields
    if wanted != given:
        raise ConfigError(
            f"{name} reads documents of {' and '.join(wanted)}, but {task.name} has "
            f"{' and '.join(given)}; choose another --objective or text"
        )
    assert settings.decoder_start_id is not None and settings.inputs_prefix is not None  # resolved
    prefix = tuple(settings.inputs_prefix)
    for field, tokens in (
        ("decoder_start_id", [settings.decoder_start_id]),
        ("inputs_prefix", prefix),
    ):
        if wrong := [token for token in tokens if not 0 <= token < vocabulary.size]:
            raise ConfigError(
                f"{field} is {wrong[0]}; expected an id of the vocabulary, 0..{vocabulary.size - 1}"
            )
    recipe = Recipe(objective, *lengths, settings.packing, settings.seed, prefix)
    objective.check(recipe.form(vocabulary))
    if settings.passes > 1 and not objective.is_random:
        raise ConfigError(
            f"passes is {settings.passes}, but {name} has no noise: every pass would be the same; "
            "leave --passes out and train for more epochs"
        )
    if settings.seed and not objective.is_random:
        raise ConfigError(
            f"seed is {settings.seed}, but {name} has nothing random; leave --seed out"
        )
    return recipe


def _passes(source: TextTask, settings: PrepareSettings, bad_rows: BadRows) -> Iterator[Document]:
    """The documents, ``passes`` times; their numbers continue, so the objective's noise differs."""
    for number in range(settings.passes):
        # Faults were counted on the first pass.
        faults = BadRows(sys.maxsize) if number else bad_rows
        yield from itertools.islice(
            source.documents(settings.split_name, faults), settings.max_examples
        )


def _peek(documents: Iterator[Document]) -> Iterator[Document]:
    return itertools.chain(list(itertools.islice(documents, 1)), documents)


class _Processes:
    """Writes blocks in order with any number of processes, a few blocks ahead."""

    def __init__(self, workers: int):
        self.workers = workers

    def __call__(
        self,
        recipe: Recipe,
        notes: Notes[Counts],
        vocabulary: Vocabulary,
        blocks: Iterator[DocumentBlock],
    ) -> Iterator[tuple[Shard | None, Counts]]:
        task = functools.partial(write_noted, recipe, notes)
        first = list(itertools.islice(blocks, 2))
        blocks = itertools.chain(first, blocks)
        if self.workers == 1 or len(first) < 2:
            for block in blocks:
                yield task(block, vocabulary)
            return
        # Spawned, not forked: the caller may run JAX's or TensorFlow's threads.
        pool = concurrent.futures.ProcessPoolExecutor(
            self.workers,
            multiprocessing.get_context("spawn"),
            _start_worker,
            (vocabulary.spec(), notes.directory),
        )
        waiting: collections.deque[concurrent.futures.Future] = collections.deque()
        try:
            for block in blocks:
                waiting.append(pool.submit(task, block))
                while len(waiting) > self.workers + 1:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_worker_vocabulary: Vocabulary | None = None


def _die_with(parent: multiprocessing.process.BaseProcess) -> None:
    parent.join()
    os._exit(1)


def _start_worker(spec: VocabularySpec, directory: pathlib.Path) -> None:
    global _worker_vocabulary
    # The parent decides on interrupts; a worker whose parent was killed has nobody to serve.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None
    watch = threading.Thread(target=_die_with, args=(parent,), daemon=True)
    watch.start()
    _worker_vocabulary = load_vocabulary(spec, directory=directory)


def write_noted(
    recipe: Recipe, notes: Notes[Counts], block: DocumentBlock, vocabulary: Vocabulary | None = None
) -> tuple[Shard | None, Counts]:
    """Write a block's shard and a note of it, or take the shard that is already there."""
    digest = block.digest()
    found = notes.find(block.number, digest)
    if found is not None:
        return found
    vocabulary = vocabulary or _worker_vocabulary
    assert vocabulary is not None
    shard, counts = write_block(recipe, vocabulary, block, notes.directory)
    if shard is None:
        (notes.directory / shard_name(block.number)).unlink(missing_ok=True)
    notes.write(block.number, shard, counts, digest)
    return shard, counts
