"""``encdec data table``: prepares files one after another and states each in a Markdown table."""

from __future__ import annotations

import argparse
import datetime
import os
import pathlib
import platform
import re
import time

from encdec.data.prepare import prepare
from encdec.data.readers import BadRows, check_files, has_rows, located_rows
from encdec.data.records import DatasetCard
from encdec.data.text_files import plain_name
from encdec.data.vocabulary import load_vocabulary
from encdec.data.vocabulary_losses import Losses
from encdec.errors import ConfigError
from encdec.flags import Parser
from encdec.logs import logger
from encdec.machine import available_cores
from encdec.markup import markdown_table
from encdec.storage import local_path

_LOG = logger(__name__)

COLUMNS = (
    "file",
    "examples",
    "row",
    "rows",
    "source tokens",
    "target tokens",
    "padding",
    "truncated",
    "seconds",
    "MB",
)


def split_lengths(file: str, inputs_length: int, targets_length: int) -> tuple[str, int, int]:
    """A file and its lengths: "a.jsonl:2048+128" has its own, "a.jsonl" the defaults."""
    if found := re.fullmatch(r"(.+):(\d+)\+(\d+)", file):
        return found[1], int(found[2]), int(found[3])
    return file, inputs_length, targets_length


def is_raw_text(path: pathlib.Path) -> bool:
    """Whether a file is for pretraining: plain text, or JSONL whose first row has ``text``."""
    if not has_rows(path):
        return True
    _, row, _ = next(located_rows(path, None, BadRows(1)), ("", None, b""))
    return isinstance(row, dict) and isinstance(row.get("text"), str)


def table_row(name: str, card: DatasetCard, seconds: float) -> str:
    """One line: truncation is the share of all tokens that were cut off."""
    tokens = card.source_tokens + card.target_tokens
    cut = card.truncated.get("source_tokens", 0) + card.truncated.get("target_tokens", 0)
    size = sum(shard.bytes for shard in card.shards)
    cells = (
        name,
        f"{card.examples:,}",
        f"{card.inputs_length} + {card.targets_length}",
        f"{card.rows:,}",
        f"{card.source_tokens:,}",
        f"{card.target_tokens:,}",
        f"{100 * (1 - card.non_padding_share):.1f} %",
        f"{100 * cut / (tokens + cut):.1f} %",
        f"{seconds:.1f}",
        f"{size / 1e6:.2f}",
    )
    return f"| {' | '.join(cells)} |"


def add_flags(flags: Parser) -> None:
    """The flags of ``encdec data table``."""
    flags.add(
        "files",
        "JSONL of pairs or text, or text; S+T for other lengths than the flags'",
        local_path,
        nargs="+",
        metavar="FILE[:S+T]",
    )
    flags.add(
        "--vocabulary",
        "a .model, tokenizer.json or 'bytes'",
        local_path,
        required=True,
        metavar="FILE",
    )
    flags.add("--out", "one directory a file below it", local_path, required=True)
    flags.add("--inputs_length", "source tokens per row", int, 1024, least=0)
    flags.add("--targets_length", "target tokens per row", int, 256, least=2)
    flags.add("--max_bad_rows", "bad rows to leave out and count", int, 0, least=0)
    flags.set_defaults(run=print_table)


def print_table(given: argparse.Namespace) -> int:
    """Prepare every file and print the table; DataError as of ``prepare``."""
    jobs = [split_lengths(file, given.inputs_length, given.targets_length) for file in given.files]
    for file, _, _ in jobs:
        if len(found := check_files([file])) != 1 or not found[0].samefile(file):
            raise ConfigError(
                f"{file} matches {len(found)} files; name each, for one line of the table per file"
            )
    vocabulary = load_vocabulary(given.vocabulary)
    print(
        f"{vocabulary.size:,} ids; {datetime.date.today()}, {available_cores()} cores "
        f"({platform.machine()}, load {os.getloadavg()[0]:.1f} at the start), "
        f"Python {platform.python_version()}\n"
    )
    print("\n".join(markdown_table(COLUMNS, ())), flush=True)
    for file, inputs_length, targets_length in jobs:
        path = pathlib.Path(file)
        name = pathlib.Path(plain_name(path)).stem
        raw = is_raw_text(path)
        started = time.perf_counter()
        card = prepare(
            out=pathlib.Path(given.out) / path.parent.name / name,
            vocabulary=vocabulary,
            inputs_length=inputs_length,
            targets_length=targets_length,
            max_bad_rows=given.max_bad_rows,
            text=[str(path)] if raw else (),
            jsonl=() if raw else [str(path)],
        )
        seconds = time.perf_counter() - started
        print(table_row(f"{path.parent.name}/{name}", card, seconds), flush=True)
        if lost := Losses(**card.lost):
            _LOG.warning(f"table: {path}: the vocabulary loses {lost.describe()}")
    return 0
