"""``encdec benchmark prepare`` and ``encdec benchmark data``.

Processor time next to wall time: ratios of processor time hold on a machine that is shared.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import pathlib
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from encdec.buckets import CACHE, is_address
from encdec.data.batches import Batches
from encdec.data.features import LAYOUTS
from encdec.data.objectives import ENCODE_BATCH, Document
from encdec.data.prepare import prepare
from encdec.data.prepare_settings import choose_task
from encdec.data.readers import BadRows
from encdec.data.records import DatasetCard, open_records
from encdec.data.text_tasks import TextTask
from encdec.data.vocabulary import Vocabulary, load_vocabulary
from encdec.data.vocabulary_training import task_texts, train_vocabulary
from encdec.errors import DataError
from encdec.flags import Parser
from encdec.machine import available_cores
from encdec.storage import any_path, local_path

PREPARE_GOAL = 0.80
READ_GOAL_TOKENS_PER_SECOND = 3e6


@dataclasses.dataclass(frozen=True)
class Step:
    """The training step with which reading is compared, and the host that reads for it."""

    model: str
    topology: str
    seconds: float
    rows_per_chip: float
    positions: int
    chips_per_host: int
    host_cores: int

    def one_core_share(self, tokens_per_second: float) -> float:
        """Share of one core's time that reading takes, if every position holds a token."""
        tokens = self.rows_per_chip * self.chips_per_host * self.positions
        return tokens / tokens_per_second / self.seconds


# What ``encdec compile`` predicted (docs/prediction.md). A host of a v5e slice is a
# ct5lp-hightpu-4t: four chips, 112 cores.
PREDICTED = Step("330m-tpu", "v5e:4x4", 0.2036, 16, 1024 + 256, 4, 112)


def reported_step(path: str | pathlib.Path, chips_per_host: int, host_cores: int) -> Step:
    """The first step of a report by ``encdec compile --out``; DataError if it is not one."""
    try:
        report = json.loads(pathlib.Path(path).read_text())[0]
        return Step(
            str(report["model"]),
            str(report["topology"]),
            float(report["step_seconds"]),
            report["batch_size"] / report.get("chips", report["devices"]),
            report["inputs"] + report["targets"],
            chips_per_host,
            host_cores,
        )
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise DataError(
            f"{path} is not a report of a step ({error!r}); write one with encdec compile "
            f"--out={path}"
        ) from error


def _timed(work: Callable[[], Any]) -> tuple[float, float, Any]:
    """(wall seconds, processor seconds of this process and those it waited for, result)."""
    wall, processor = time.perf_counter(), _processor_seconds()
    result = work()
    return time.perf_counter() - wall, _processor_seconds() - processor, result


def _processor_seconds() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def measure_prepare(
    documents: list[Document],
    task: TextTask,
    vocabulary: Vocabulary,
    *,
    inputs_length: int = 1024,
    targets_length: int = 256,
    rounds: int = 3,
    workers: int = 1,
) -> dict[str, Any]:
    """Prepare's tokens per second on one core against the bare encoding of the same texts.

    ``documents`` are the first of ``task``'s training split. "Bare" is the batch call of the
    vocabulary's library on one thread with the texts in memory, nothing kept; prepare reads its
    files too and knows no word yet. Best of ``rounds``, the two taking turns. With ``workers`` > 1
    also the speed-up of so many processes and their processor time, over that of one.
    """
    texts = [text for document in documents for text in document]

    def bare() -> int:
        starts = range(0, len(texts), ENCODE_BATCH)
        return sum(
            sum(map(len, vocabulary.encode_by_library(texts[start : start + ENCODE_BATCH])))
            for start in starts
        )

    def prepared(processes: int) -> DatasetCard:
        with tempfile.TemporaryDirectory() as folder:
            return prepare(
                out=pathlib.Path(folder) / "records",
                vocabulary=load_vocabulary(spec, directory=saved),
                task=held,
                inputs_length=inputs_length,
                targets_length=targets_length,
                workers=processes,
            )

    # Read again from its files: parsing them is part of preparing.
    def read(split: str, bad_rows: BadRows) -> Iterator[Document]:
        return itertools.islice(task.documents(split, bad_rows), len(documents))

    held = TextTask(task.name, read, task.objective, task.origin)
    with tempfile.TemporaryDirectory() as saved:
        # Loaded again for every run: what one has remembered would help the next.
        spec = vocabulary.save(saved)
        runs = [(_timed(bare), _timed(lambda: prepared(1))) for _ in range(rounds)]
        shared = [_timed(lambda: prepared(workers)) for _ in range(rounds * (workers > 1))]
    tokens = runs[0][0][2]
    bare_seconds = min(bare_run[1] for bare_run, _ in runs)
    prepare_seconds = min(prepare_run[1] for _, prepare_run in runs)
    result = {
        "tokens": tokens,
        "text_megabytes": sum(len(text.encode()) for text in texts) / 1e6,
        "bare_tokens_per_second_per_core": tokens / bare_seconds,
        "prepare_tokens_per_second_per_core": tokens / prepare_seconds,
        "ratio": bare_seconds / prepare_seconds,
        "non_padding_share": runs[0][1][2].non_padding_share,
    }
    if shared:
        one = min(prepare_run[0] for _, prepare_run in runs)
        many = min(run[0] for run in shared)
        spent = min(run[1] for run in shared)
        result |= {
            "workers": workers,
            "speed_up": one / many,
            "workers_processor_seconds": spent / prepare_seconds,
        }
    return result


def measure_reading(directory: str | pathlib.Path, *, batch: int = 64, steps: int = 50) -> dict:
    """Tokens per second of shuffled batches, both layouts, and bytes per token on disk."""
    records = open_records(directory)
    card = records.card
    tokens = card.source_tokens + card.target_tokens
    result: dict[str, Any] = {
        "rows": card.rows,
        "bytes_per_token": sum(shard.bytes for shard in card.shards) / tokens,
        "stored_bytes_per_id": np.dtype(card.token_dtype).itemsize,
    }
    for layout in LAYOUTS if card.inputs_length else ("decoder_only",):
        batches = Batches(records, global_batch=batch, layout=layout)
        _ = batches[0]

        def read(batches: Batches = batches) -> int:
            fields = ("encoder_segment_ids", "decoder_segment_ids")
            return sum(
                int(np.count_nonzero(found[field]))
                for found in map(batches.__getitem__, range(steps))
                for field in fields
                if field in found
            )

        _, processor, read_tokens = _timed(read)
        result[f"{layout}_tokens_per_second_per_core"] = read_tokens / processor
    return result


def measure_fetching(address: str) -> dict[str, float]:
    """Megabytes a second by the wall clock from a bucket into an empty cache, every shard once."""
    with tempfile.TemporaryDirectory() as folder:
        before = os.environ.get(CACHE)
        os.environ[CACHE] = folder
        try:
            records = open_records(address)
            shards = records.card.shards
            firsts = [sum(shard.rows for shard in shards[:n]) for n in range(len(shards))]
            wall, processor, _ = _timed(lambda: records.read(firsts))
        finally:
            if before is None:
                del os.environ[CACHE]
            else:
                os.environ[CACHE] = before
    megabytes = sum(shard.bytes for shard in shards) / 1e6
    return {
        "fetched_megabytes": megabytes,
        "fetched_megabytes_per_second": megabytes / wall,
        "fetched_megabytes_per_processor_second": megabytes / processor,
    }


def _flags(name: str) -> Parser:
    flags = Parser(prog=f"encdec benchmark {name}")
    flags.add("--json", "print JSON alone", default=False)
    return flags


def _prepare_flags() -> Parser:
    flags = _flags("prepare")
    flags.add("--task", "a task by name (stdlib_text)")
    flags.add("--jsonl", "rows with source and target", local_path, nargs="+", metavar="FILE")
    flags.add("--text", "text, or rows with text", local_path, nargs="+", metavar="FILE")
    flags.add(
        "--vocabulary", "a .model; trained on the text if left out", local_path, metavar="FILE"
    )
    flags.add("--inputs_length", "source tokens per row", int, 1024, least=0)
    flags.add("--targets_length", "target tokens per row", int, 256, least=2)
    flags.add("--megabytes", "of text that are measured", float, 8.0, above=0)
    flags.add("--repeats", "timed runs of each", int, 3, least=1)
    flags.add("--workers", "processes that share the work", int, available_cores(), least=1)
    return flags


def prepare_main(argv: list[str]) -> int:
    """``encdec benchmark prepare``: prepare against the bare encoding of the same text."""
    flags = _prepare_flags().parse_args(argv)
    named = flags.task or (None if flags.jsonl or flags.text else "stdlib_text")
    task = choose_task(named, flags.jsonl or (), flags.text or ())
    documents, size = [], 0
    for document in task.documents("train", BadRows()):
        documents.append(document)
        size += sum(map(len, document))
        if size >= flags.megabytes * 1e6:
            break
    with tempfile.TemporaryDirectory() as folder:
        if flags.vocabulary:
            vocabulary = load_vocabulary(flags.vocabulary)
        else:
            path = pathlib.Path(folder) / "benchmark.model"
            vocabulary = train_vocabulary(task_texts([task]), path, sample_bytes=2 << 20)
        result = measure_prepare(
            documents,
            task,
            vocabulary,
            inputs_length=flags.inputs_length,
            targets_length=flags.targets_length,
            rounds=flags.repeats,
            workers=flags.workers,
        )
    if flags.json:
        print(json.dumps(result))
        return 0
    print(f"{result['tokens']:,} tokens, {result['text_megabytes']:.1f} MB of text")
    print(f"bare encoding: {result['bare_tokens_per_second_per_core']:,.0f} tokens/s per core")
    print(f"prepare:       {result['prepare_tokens_per_second_per_core']:,.0f} tokens/s per core")
    print(f"ratio:         {result['ratio']:.2f} (goal {PREPARE_GOAL:.2f} or more)")
    if "speed_up" in result:
        print(
            f"{result['workers']} processes: {result['speed_up']:.2f} times as fast by the wall "
            f"clock, {result['workers_processor_seconds']:.2f} times the processor time"
        )
    return 0


def read_main(argv: list[str]) -> int:
    """``encdec benchmark data``: reading shuffled batches of records."""
    flags = _flags("data")
    flags.add(
        "--records",
        "made of the standard library if left out; of those in a bucket, it is also measured "
        "how fast they come to this machine",
        any_path,
    )
    flags.add("--batch_size", "rows of a batch", int, 64, least=1)
    flags.add("--steps", "batches that are read", int, 50, least=1)
    flags.add(
        "--compile_report",
        "compare reading with this step, of encdec compile --out (default: the "
        "330m-tpu of docs/prediction.md)",
        local_path,
        metavar="FILE",
    )
    for name, text in (
        ("chips_per_host", "chips that the host reads for"),
        ("host_cores", "cores of the host"),
    ):
        flags.add(f"--{name}", text, int, getattr(PREDICTED, name), least=1)
    given = flags.parse_args(argv)
    host = given.chips_per_host, given.host_cores
    step = dataclasses.replace(PREDICTED, chips_per_host=host[0], host_cores=host[1])
    if given.compile_report:
        step = reported_step(given.compile_report, *host)
    with tempfile.TemporaryDirectory() as folder:
        records = given.records
        if not records:
            records = pathlib.Path(folder) / "records"
            prepare(out=records, vocabulary="bytes", task="stdlib_text")
        result: dict[str, Any] = measure_fetching(records) if is_address(records) else {}
        result |= measure_reading(records, batch=given.batch_size, steps=given.steps)
    speeds = {
        layout: result[f"{layout}_tokens_per_second_per_core"]
        for layout in LAYOUTS
        if f"{layout}_tokens_per_second_per_core" in result
    }
    share = step.one_core_share(next(iter(speeds.values())))
    result["step"] = dataclasses.asdict(step)
    result["step_share_of_one_core"] = share
    result["step_share_of_host"] = share / step.host_cores
    tokens = step.rows_per_chip * step.chips_per_host * step.positions
    if rate := result.get("fetched_megabytes_per_second"):
        megabytes = tokens * result["bytes_per_token"] / 1e6
        result["step_share_of_fetching"] = megabytes / rate / step.seconds
    if given.json:
        print(json.dumps(result))
        return 0
    for layout, speed in speeds.items():
        goal = READ_GOAL_TOKENS_PER_SECOND
        print(f"{layout}: {speed / 1e6:.1f}M tokens/s per core (goal {goal / 1e6:.0f}M or more)")
    print(
        f"disk: {result['bytes_per_token']:.2f} bytes per token, "
        f"{result['bytes_per_token'] / 2:.2f} of 2 bytes; {result['stored_bytes_per_id']} bytes "
        "per id before compression"
    )
    if rate:
        print(
            f"bucket: {result['fetched_megabytes']:.1f} MB fetched once at {rate:.0f} MB/s; "
            f"meanwhile fetching takes {100 * result['step_share_of_fetching']:.2f} % of each "
            "step, in the background"
        )
    print(
        f"for {step.model} on {step.topology}, whose step takes {1000 * step.seconds:.0f} ms as "
        f"predicted, a host of {step.chips_per_host} chips reads "
        f"{step.rows_per_chip * step.chips_per_host:g} rows of {step.positions:,} tokens per step: "
        f"{100 * share:.2f} % of one core (goal below 1 %), {100 * share / step.host_cores:.4f} % "
        f"of the host's {step.host_cores} cores"
    )
    return 0
