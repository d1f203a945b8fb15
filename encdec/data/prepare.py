"""``encdec prepare``: text to a records directory, all or nothing.

Documents are cut into blocks, each written as one shard by any worker. Finished shards are noted
under ``preparing/``, so that an interrupted preparation goes on where it was; the card comes last.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import functools
import itertools
import json
import multiprocessing
import os
import pathlib
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from encdec.data.blocks import Block, Counts, Recipe, cut_blocks, make_card, shard_name, write_block
from encdec.data.mixing import task_or_mixture
from encdec.data.objectives import Document, Objective, describe_objective
from encdec.data.readers import BadRows
from encdec.data.records import DatasetCard, Shard, file_sha256, read_card
from encdec.data.text_tasks import TextTask, jsonl_task, text_files_task
from encdec.data.vocabulary import CARD_FILE, Vocabulary, VocabularySpec, load_vocabulary
from encdec.errors import ConfigError, DataError, EncdecError
from encdec.machine import available_cores
from encdec.storage import local

# Small enough that two cores share a corpus of some megabytes, large enough that the last,
# half-full rows of a block do not matter (about a thousand rows).
BLOCK_BYTES = 4 << 20
NOTES = "preparing"
# Which rows --max_bad_rows left out: a line each, with file, line and reason.
BAD_ROWS_FILE = "bad_rows.txt"

Progress = Callable[[Counts], None]
# (recipe, directory, vocabulary, blocks) to each block's shard and counts, in order.
WriteBlocks = Callable[
    [Recipe, pathlib.Path, Vocabulary, Iterator[Block]], Iterator[tuple[Shard | None, Counts]]
]


def prepare(
    *,
    out: str | os.PathLike[str],
    vocabulary: str | os.PathLike[str] | Vocabulary,
    task: str | TextTask | None = None,
    jsonl: Sequence[str] = (),
    text: Sequence[str] = (),
    data_dir: str | None = None,
    documents: str | None = None,
    split: str = "train",
    inputs_length: int = 1024,
    targets_length: int = 256,
    objective: Objective | None = None,
    packing: str = "best_fit",
    extra_ids: int | None = None,
    decoder_start_id: int = 0,
    seed: int = 0,
    passes: int = 1,
    max_examples: int | None = None,
    max_bad_rows: int = 0,
    lossless: bool = False,
    block_bytes: int = BLOCK_BYTES,
    workers: int | None = None,
    overwrite: bool = False,
    notes: Mapping[str, str] | None = None,
    progress: Progress | None = None,
    writer: WriteBlocks | None = None,
) -> DatasetCard:
    """Write a records directory from one of `task`, `jsonl` files or `text` files.

    `passes` over the same documents follow one another, each with noise of its own.
    `data_dir` is where a named task's files lie; `documents` says what one is in plain `text`:
    `readers.text_documents`. Lengths are tokens a row; `max_examples` bounds
    the documents read, `lossless` refuses a vocabulary that loses any of their text (DataError),
    `block_bytes` the text of a shard, `workers` the processes (default: the
    cores at hand). The result does not depend on `workers`. `objective` replaces the
    task's own; `notes` are files (name to text) to lie beside the records;
    `writer` writes the blocks in place of this machine's processes (`beam_prepare`).

    Raises DataError for bad input, after removing what this call wrote; a call that is killed
    can be repeated and goes on.
    """
    out = pathlib.Path(local("--out", out))
    source = choose_task(task, jsonl, text, data_dir, documents)
    loaded = load_vocabulary(vocabulary, extra_ids=extra_ids)
    recipe = Recipe(objective or source.objective, inputs_length, targets_length, packing, seed)
    _check_objective(recipe, source, loaded)
    _check(loaded, decoder_start_id, passes, max_examples, max_bad_rows, block_bytes, workers)
    if passes > 1 and not recipe.objective.is_random:
        raise ConfigError(
            f"passes is {passes}, but {type(recipe.objective).__name__} draws no noise: every pass "
            "would repeat the first; leave --passes out and train for more epochs"
        )
    if seed and not recipe.objective.is_random:
        raise ConfigError(
            f"seed is {seed}, but {type(recipe.objective).__name__} draws nothing by it; leave "
            "--seed out"
        )
    bad_rows = BadRows(max_bad_rows)
    job = {
        "task": source.name,
        "split": split,
        "origin": source.origin() | ({"passes": passes} if passes > 1 else {}),
        "vocabulary": loaded.fingerprint,
        "recipe": {**dataclasses.asdict(recipe), "objective": describe_objective(recipe.objective)},
        "decoder_start_id": decoder_start_id,
        "max_examples": max_examples,
        "block_bytes": block_bytes,
    }
    # Reading starts before anything is written: a wrong split or a bad first row leaves nothing.
    documents = _peek(_passes(source, split, bad_rows, max_examples, passes))
    with _building(out, job, overwrite) as directory:
        loaded.save(directory)
        counts = Counts()
        shards: list[Shard] = []
        write = writer or _Processes(workers or available_cores())
        blocks = cut_blocks(documents, block_bytes)
        for shard, block_counts in write(recipe, directory, loaded, blocks):
            counts.add(block_counts)
            if lossless and counts.lost:
                raise DataError(
                    f"the vocabulary does not give this text back: {counts.lost.describe()}; take "
                    "one that does (encdec vocab trains one, 'bytes' is one), or leave "
                    "--lossless out"
                )
            if shard:
                shards.append(shard)
            if progress:
                progress(counts)
        if bad_rows.count:
            counts.dropped["bad_rows"] = bad_rows.count
            (directory / BAD_ROWS_FILE).write_text(bad_rows.listing(), encoding="utf-8")
        card = make_card(
            recipe,
            loaded,
            shards,
            counts,
            task=source.name,
            split=split,
            origin=job["origin"],
            decoder_start_id=decoder_start_id,
        )
        for name, content in (notes or {}).items():
            (directory / name).write_text(content)
        card.write(directory)
    return card


def choose_task(
    task: str | TextTask | None,
    jsonl: Sequence[str],
    text: Sequence[str],
    data_dir: str | None = None,
    documents: str | None = None,
) -> TextTask:
    """The task that is named, or made of files; ConfigError unless exactly one is given."""
    given = [name for name, value in (("task", task), ("jsonl", jsonl), ("text", text)) if value]
    if len(given) != 1:
        raise ConfigError(
            f"give exactly one of --task, --jsonl and --text, got {', '.join(given) or 'none'}"
        )
    if data_dir is not None and not task:
        raise ConfigError(f"--data_dir={data_dir} goes with --task; files are named in full")
    if documents is not None and not text:
        raise ConfigError(
            f"--documents={documents} says what a document is in the files of --text; leave it out"
        )
    if jsonl:
        return jsonl_task(jsonl)
    if text:
        return text_files_task(text, documents=documents)
    return task if isinstance(task, TextTask) else task_or_mixture(str(task), data_dir)


def _check_objective(recipe: Recipe, task: TextTask, vocabulary: Vocabulary) -> None:
    wanted, given = recipe.objective.document_fields, task.objective.document_fields
    if wanted != given:
        raise ConfigError(
            f"{type(recipe.objective).__name__} reads documents of {' and '.join(wanted)}, but "
            f"{task.name} has {' and '.join(given)}; choose another --objective or text"
        )
    recipe.objective.check(vocabulary, recipe.inputs_length, recipe.targets_length)


def _check(
    vocabulary: Vocabulary,
    decoder_start_id: int,
    passes: int,
    max_examples: int | None,
    max_bad_rows: int,
    block_bytes: int,
    workers: int | None,
) -> None:
    if not 0 <= decoder_start_id < vocabulary.size:
        raise ConfigError(
            f"decoder_start_id is {decoder_start_id}; wanted an id of the vocabulary, "
            f"0..{vocabulary.size - 1}"
        )
    bounds = (
        ("passes", passes, 1),
        ("max_examples", max_examples, 1),
        ("max_bad_rows", max_bad_rows, 0),
        ("block_bytes", block_bytes, 1),
        ("workers", workers, 1),
    )
    for name, value, least in bounds:
        if value is not None and value < least:
            raise ConfigError(f"{name} is {value}; wanted {least} or more")


def _passes(
    source: TextTask, split: str, bad_rows: BadRows, max_examples: int | None, passes: int
) -> Iterator[Document]:
    """The documents, `passes` times; their numbers go on, and with them the objective's noise."""
    for number in range(passes):
        # Faults were counted on the first pass.
        faults = BadRows(sys.maxsize) if number else bad_rows
        yield from itertools.islice(source.documents(split, faults), max_examples)


def _peek(documents: Iterator[Document]) -> Iterator[Document]:
    return itertools.chain(list(itertools.islice(documents, 1)), documents)


class _building:
    """The directory to write into: `out`, or beside it where `out` is to be replaced."""

    def __init__(self, out: pathlib.Path, job: dict[str, Any], overwrite: bool):
        self.out, self.job = out, job
        self.finished = (out / CARD_FILE).is_file()
        self.resumed = False
        self.directory = out
        notes = out / NOTES
        if out.exists() and not out.is_dir():
            raise DataError(f"{out} is a file; give another --out")
        if self.finished and not overwrite:
            card = read_card(out)
            raise DataError(
                f"{out} already holds {card.rows:,} rows of {card.task}; give another --out, or "
                "--overwrite to replace them"
            )
        if self.finished:
            self.directory = out.with_name(out.name + ".new")
            notes = self.directory / NOTES
        elif out.is_dir() and any(out.iterdir()) and not notes.is_dir():
            raise DataError(
                f"{out} is not empty and holds no records; give another --out (--overwrite "
                "replaces records only)"
            )
        if notes.is_dir():
            self._resume(notes, overwrite)

    def _resume(self, notes: pathlib.Path, overwrite: bool) -> None:
        path = notes / "job.json"
        same = path.is_file() and json.loads(path.read_text()) == _plain(self.job)
        if same:
            self.resumed = True
        elif overwrite or not path.is_file():
            shutil.rmtree(self.directory)
        else:
            raise DataError(
                f"{self.directory} holds the unfinished preparation of something else; repeat "
                "that command, give another --out, or --overwrite to discard it"
            )

    def __enter__(self) -> pathlib.Path:
        notes = self.directory / NOTES
        notes.mkdir(parents=True, exist_ok=True)
        _write_json(notes / "job.json", self.job)
        return self.directory

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        if kind is None:
            shutil.rmtree(self.directory / NOTES)
            if self.directory != self.out:
                old = self.out.with_name(self.out.name + ".old")
                os.rename(self.out, old)
                os.rename(self.directory, self.out)
                shutil.rmtree(old)
        elif issubclass(kind, EncdecError) and not self.resumed:
            shutil.rmtree(self.directory)


def _write_json(path: pathlib.Path, content: Any) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content))
    os.replace(partial, path)


def _plain(content: Any) -> Any:
    return json.loads(json.dumps(content))


class _Processes:
    """Writes blocks in order with any number of processes, a few blocks ahead."""

    def __init__(self, workers: int):
        self.workers = workers

    def __call__(
        self,
        recipe: Recipe,
        directory: pathlib.Path,
        vocabulary: Vocabulary,
        blocks: Iterator[Block],
    ) -> Iterator[tuple[Shard | None, Counts]]:
        task = functools.partial(write_noted, recipe, directory)
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
            (vocabulary.spec(), directory),
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


def _start_worker(spec: VocabularySpec, directory: pathlib.Path) -> None:
    global _worker_vocabulary
    # The parent decides on interrupts; a worker whose parent was killed has nobody to serve.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    watch = threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True)
    watch.start()
    _worker_vocabulary = load_vocabulary(spec, directory=directory)


def write_noted(
    recipe: Recipe, directory: pathlib.Path, block: Block, vocabulary: Vocabulary | None = None
) -> tuple[Shard | None, Counts]:
    """Write a block's shard and a note of it, or take the shard that is already there."""
    note = _note_path(directory, block.number)
    digest = block.digest()
    if note.is_file():
        shard, counts = read_note(directory, block.number)
        if json.loads(note.read_text())["digest"] == digest and _is_whole(directory, shard):
            return shard, counts
    shard, counts = write_block(recipe, vocabulary or _worker_vocabulary, block, directory)
    if shard is None:
        (directory / shard_name(block.number)).unlink(missing_ok=True)
    _write_json(
        note,
        {
            "digest": digest,
            "shard": dataclasses.asdict(shard) if shard else None,
            "counts": counts.to_dict(),
        },
    )
    return shard, counts


def _note_path(directory: pathlib.Path, number: int) -> pathlib.Path:
    return directory / NOTES / f"{number:06d}.json"


def read_note(directory: pathlib.Path, number: int) -> tuple[Shard | None, Counts]:
    """What a finished block left: its shard, or None where it gave no example, and counts."""
    content = json.loads(_note_path(directory, number).read_text())
    shard = Shard(**content["shard"]) if content["shard"] else None
    return shard, Counts.from_dict(content["counts"])


def _is_whole(directory: pathlib.Path, shard: Shard | None) -> bool:
    if shard is None:
        return True
    path = directory / shard.name
    return path.is_file() and file_sha256(path) == shard.sha256
