"""``encdec data``: available tasks and mixtures, examples, verification of records, a table."""

from __future__ import annotations

import argparse
import itertools
import os
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.markup import escape
from rich.text import Text

from encdec.buckets import is_address
from encdec.data import corpus_table as table
from encdec.data.blocks import DocumentBlock, Recipe, encode_block
from encdec.data.file_tasks import FileTask
from encdec.data.readers import BadRows
from encdec.data.records import decode_row, open_records
from encdec.data.seqio_tasks import seqio_mixture, seqio_mixture_names, seqio_task_names
from encdec.data.task_mixtures import MIXTURES, task_or_mixture
from encdec.data.task_registry import FILE_TASKS, TEXT_TASKS
from encdec.data.text_tasks import EMBEDDED_TASKS, TextTask
from encdec.data.verify import SAMPLE_ROWS, verify_records
from encdec.data.vocabulary import CARD_FILE, Vocabulary, load_vocabulary, recorded_framing
from encdec.data.vocabulary_losses import Losses
from encdec.errors import ConfigError, DataError
from encdec.flags import Parser
from encdec.logs import logger
from encdec.modules import add_module_flag, import_modules
from encdec.storage import any_path, as_path

_LOG = logger(__name__)

# Flags of `show` that say how a task becomes examples, and mean nothing for finished rows.
OF_TASKS = (
    *("data_dir", "split", "vocabulary", "extra_ids", "objective"),
    *("inputs_length", "targets_length"),
)
STYLES = ("cyan", "green", "magenta", "yellow", "blue", "red")
SHOWN_TOKENS = 400


def main(argv: list[str]) -> int:
    """``encdec data``."""
    given = parser().parse_args(argv)
    import_modules(getattr(given, "module", ()))
    return given.run(given)


def parser() -> Parser:
    flags = Parser(prog="encdec data", description=__doc__)
    commands = flags.add_subparsers(metavar="list | show | verify | table", required=True)
    listing = commands.add_parser("list", help="every task and mixture, and where its data is")
    listing.add("--data_dir", "look for files below this directory", any_path)
    add_module_flag(listing)
    listing.set_defaults(run=list_tasks)
    show = commands.add_parser("show", help="examples of a task, or rows of a records directory")
    show.add("what", "a task, or a records directory", any_path, metavar="TASK|DIR")
    show.add("--data_dir", "where the task's files are", any_path)
    show.add("--split", "train, validation or test (train)")
    show.add("--vocabulary", "a .model or tokenizer.json (bytes)", any_path, metavar="FILE")
    show.add("--extra_ids", "sentinels at the vocabulary's end", int, least=0)
    show.add("--objective", "another objective than the task's own")
    show.add("--inputs_length", "source tokens per row (the task's)", int, least=0)
    show.add("--targets_length", "target tokens per row (the task's)", int, least=2)
    show.add("--count", "examples, or rows of records", int, 3, least=1)
    add_module_flag(show)
    show.set_defaults(run=show_examples)
    verify = commands.add_parser("verify", help="check a records directory against its card")
    verify.add("directory", "a records directory", any_path)
    verify.add("--full", "read every row, not a sample", default=False)
    verify.add("--rows", f"rows of the sample ({SAMPLE_ROWS})", int, least=1)
    verify.set_defaults(run=verify_directory)
    table.add_flags(commands.add_parser("table", help="prepare files, with a table of them"))
    return flags


def list_tasks(given: argparse.Namespace) -> int:
    """Print every task: what it is, its official splits and sizes, whether its data is here."""
    for name, task in TEXT_TASKS.items():
        print(f"{name}: {_about(task)}")
        sizes: Mapping[str, int | None] = dict.fromkeys(task.splits)
        there = "present"
        if name in FILE_TASKS:
            sizes, there = FILE_TASKS[name].splits, _presence(FILE_TASKS[name], given.data_dir)
        shown = (split if size is None else f"{split} {size:,}" for split, size in sizes.items())
        print(f"  splits: {', '.join(shown) or 'any name'}; data: {there}")
    for name in seqio_task_names():
        if name not in TEXT_TASKS:
            splits = task_or_mixture(name).splits
            print(f"{name}: a task of seqio's registry\n  splits: {', '.join(splits)}")
    for name, tasks in MIXTURES.items():
        _list_mixture(name, tasks, given.data_dir)
    for name in seqio_mixture_names():
        if name not in MIXTURES:
            found = seqio_mixture(name)
            assert found is not None
            print(f"{name}: mixture of {', '.join(found[0])}, of seqio's registry")
    return 0


def _about(task: TextTask) -> str:
    if task.name in EMBEDDED_TASKS:
        return "from the Python standard library of this interpreter"
    return task.about or "registered without a description"


def _list_mixture(name: str, tasks: Sequence[str], data_dir: str | None) -> None:
    print(f"{name}: mixture of {', '.join(tasks)}")
    parts = [FILE_TASKS[task] for task in tasks if task in FILE_TASKS]
    if len(parts) == len(tasks):
        splits = [split for split in parts[0].splits if all(split in p.splits for p in parts)]
        sizes = (_mixture_size(split, parts) for split in splits)
        print(f"  splits: {', '.join(sizes)}")
    for part in parts:
        print(f"  data of {part.name}: {_presence(part, data_dir)}")


def _mixture_size(split: str, parts: list[FileTask]) -> str:
    known = [part.splits[split] for part in parts]
    total = sum(size or 0 for size in known)
    unknown = ", ".join(part.name for part in parts if part.splits[split] is None)
    return f"{split} {total:,}" + (f" without {unknown}" if unknown else "")


def _presence(task: FileTask, data_dir: str | None) -> str:
    if data_dir is not None:
        found = [split for split in task.splits if task.find_files(data_dir, split)]
        return f"{', '.join(found)} below {data_dir}" if found else f"none below {data_dir}"
    if not task.tfds:
        return "give --data_dir (not in tensorflow-datasets)"
    # By its folder alone: importing tensorflow-datasets takes seconds.
    place = os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    if is_address(place):
        return f"tensorflow-datasets {task.tfds}, if it is in {place}"
    root = pathlib.Path(os.path.expanduser(place))
    if any(root.glob(f"{task.tfds}/*/dataset_info.json")):
        return f"tensorflow-datasets {task.tfds}, present"
    return f"tensorflow-datasets {task.tfds}, absent (tfds build {task.tfds}), or give --data_dir"


def show_examples(given: argparse.Namespace) -> int:
    """Print examples as text and as tokens, one colour a segment on a terminal."""
    console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
    if (as_path(given.what) / CARD_FILE).is_file():
        for name in OF_TASKS:
            if (value := getattr(given, name)) is not None:
                raise ConfigError(
                    f"--{name}={value} is for tasks, but {given.what} is a records directory with "
                    "its own setting; leave it out"
                )
        _show_rows(console, given)
        return 0
    # gin and its bindings come with the objectives; showing records needs neither.
    from encdec.data.gin_bindings import choose_objective

    task = task_or_mixture(given.what, given.data_dir)
    vocabulary = load_vocabulary(given.vocabulary or "bytes", extra_ids=given.extra_ids)
    objective = choose_objective(given.objective, task)
    if objective.document_fields != task.objective.document_fields:
        raise ConfigError(
            f"{given.objective} reads {' and '.join(objective.document_fields)}, but {task.name} "
            f"has {' and '.join(task.objective.document_fields)}; give another task, such as "
            "stdlib_text, or another --objective"
        )
    inputs_length, targets_length = task.row_lengths(given.inputs_length, given.targets_length)
    if given.inputs_length and not objective.has_source:
        raise ConfigError(f"--inputs_length={inputs_length}, but {given.objective} has no sources")
    inputs_length *= objective.has_source
    prefix = recorded_framing(given.vocabulary, given.extra_ids)[1] if inputs_length else ()
    recipe = Recipe(objective, inputs_length, targets_length, inputs_prefix=prefix)
    objective.check(recipe.form(vocabulary))
    sized = task.at_lengths(inputs_length, targets_length)
    documents = itertools.islice(sized.documents(given.split or "train", BadRows()), given.count)
    shown = 0
    for number, document in enumerate(documents):
        encoded = encode_block(recipe, vocabulary, DocumentBlock(number, number, [document]))
        for source, target in zip(encoded.sources, encoded.targets):
            if shown == given.count:
                return 0
            shown += 1
            _show_example(console, vocabulary, shown, source, target)
    return 0


def _show_rows(console: Console, given: argparse.Namespace) -> None:
    records = open_records(given.what)
    vocabulary = records.vocabulary()
    for row, stored in enumerate(records.read(range(min(given.count, len(records))))):
        console.print(f"[bold]row {row}[/bold]")
        for segment, (source, target) in enumerate(
            zip(*decode_row(stored, (records.card.token_dtype))), 1
        ):
            _show_example(console, vocabulary, segment, source, target)


def _show_example(console: Console, vocabulary: Vocabulary, segment: int, source, target) -> None:
    style = STYLES[(segment - 1) % len(STYLES)]
    for side, ids in (("source", source), ("target", target)):
        console.print(f"[bold {style}]segment {segment} {side}[/], {len(ids)} tokens")
        console.print(Text(vocabulary.decode(ids), style=style))
        tokens = " ".join(f"{vocabulary.piece(int(i))}:{i}" for i in ids[:SHOWN_TOKENS])
        more = f" ... {len(ids) - SHOWN_TOKENS} more" if len(ids) > SHOWN_TOKENS else ""
        console.print(f"[dim]{escape(tokens)}{more}[/dim]")


def verify_directory(given: argparse.Namespace) -> int:
    """Print what is wrong with a records directory; DataError if anything is."""
    if given.full and given.rows is not None:
        raise ConfigError(
            f"--rows={given.rows} reads a sample and --full all rows; give one of them"
        )
    started = time.perf_counter()
    verdict = verify_records(
        given.directory,
        sample_rows=None if given.full else given.rows or SAMPLE_ROWS,
        progress=lambda what: _LOG.info(f"verify: {what}"),
    )
    if verdict.faults:
        raise DataError(
            f"{given.directory} failed verification: "
            + "; ".join(verdict.faults)
            + f"; copy it again, or run encdec prepare --out={given.directory} --overwrite"
        )
    card = open_records(given.directory).card
    print(
        f"{given.directory}: sound; {card.rows:,} rows of {card.task}, {len(card.shards)} shards, "
        f"{verdict.rows_read:,} rows read, {time.perf_counter() - started:.1f} s"
    )
    print(f"lost by the vocabulary: {Losses(**card.lost).describe()}")
    if verdict.unknown_ids:
        print(f"unknown ids in the rows that were read: {verdict.unknown_ids:,}")
    return 0
