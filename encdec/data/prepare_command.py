"""The command line of ``encdec prepare``: flags, gin files and the final report."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import time
from typing import Any

import gin
from encdec.data.gin_bindings import choose_objective, mixture, parse_gin, refuse_unused
from encdec.data.objectives import FIT_LENGTHS
from encdec.data.prepare import BAD_ROWS_FILE, prepare
from encdec.data.prepare_progress import ProgressLine
from encdec.data.prepare_settings import FIELD_FLAGS, PrepareSettings
from encdec.data.records import DatasetCard
from encdec.data.vocabulary_losses import Losses
from encdec.errors import ConfigError
from encdec.flags import Parser
from encdec.logs import logger
from encdec.modules import add_module_flag, import_modules
from encdec.storage import local_path

_LOG = logger(__name__)

# A task that was made of files stands for them.
FILES: dict[str, Any] = {
    **{"jsonl": (), "text": (), "documents": None},
    **dict.fromkeys(FIELD_FLAGS),
}
SHOWN_BAD_ROWS = 5
# What was taken for a document, where a user may have meant something else.
DOCUMENTS_NOTES = {
    "files": ": each file is one, cut after each MiB; for its lines or paragraphs give "
    "--documents=lines or paragraphs",
    "lines": ": each line is one",
    "paragraphs": ": lines between blank ones are one",
}
# Of a side's texts that a suggested length holds whole.
ENOUGH = 0.99
# Fewer rows than a usual batch, each of many pairs: lengths were chosen for other data.
FEW_ROWS = 128
PAIRS_A_ROW = 8


# gin's copy of the class: what it binds are the defaults of those flags that are not given.
_bound_settings = gin.external_configurable(PrepareSettings, "prepare")


def parser() -> Parser:
    """A flag for each of ``PrepareSettings``; others keep what gin binds, else defaults."""
    flags = Parser(
        may_be_empty=("--beam_options",),
        prog="encdec prepare",
        description="Turn text into packed records for training.",
        epilog="Gin binds what an example is, e.g. --gin_bindings='prefix_lm.split = 0.3' or "
        "'sequence_to_sequence.inputs_eos = False'.",
        argument_default=argparse.SUPPRESS,
    )
    PrepareSettings.add_flags(flags)
    add_module_flag(flags)
    flags.add(
        "--beam_options",
        "prepare on Apache Beam with its flags, e.g. '--runner=DirectRunner'",
        metavar="FLAGS",
    )
    flags.add("--gin_file", "a gin file; may be repeated", local_path, [], metavar="FILE")
    flags.add("--gin_bindings", "a gin binding; may be repeated", default=[], metavar="BINDING")
    return flags


def main(argv: list[str]) -> int:
    """Parse the flags, prepare, print the report."""
    given = vars(parser().parse_args(argv))
    files, bindings = given.pop("gin_file"), given.pop("gin_bindings")
    beam_options = given.pop("beam_options", None)
    import_modules(given.pop("module", ()))
    parse_gin(files, bindings)
    settings = PrepareSettings(**vars(_bound_settings(**given)))
    settings.check()
    task = settings.text_task(**(mixture() if settings.task else {}))
    objective = choose_objective(settings.objective, task)
    refuse_unused(bindings)
    split = settings.split_name
    texts = {"operative_config.gin": gin.operative_config_str()}
    writer = None
    if beam_options is not None:
        if settings.workers is not None:
            raise ConfigError(
                f"--workers={settings.workers} has no effect with --beam_options, because Beam's "
                "runner starts its own workers; leave one out"
            )
        from encdec.data.beam_prepare import BeamWriter

        writer = BeamWriter(beam_options)
    progress = ProgressLine()
    started = time.perf_counter()
    try:
        card = prepare(
            dataclasses.replace(
                settings, objective=objective, task=task, split=split, data_dir=None, **FILES
            ),
            progress=progress,
            texts=texts,
            writer=writer,
        )
    finally:
        progress.close()
    print(report(card, time.perf_counter() - started))
    if left_out := card.dropped.get("bad_rows"):
        path = settings.directory / BAD_ROWS_FILE
        for line in itertools.islice(path.read_text(encoding="utf-8").splitlines(), SHOWN_BAD_ROWS):
            if line:
                _LOG.warning(f"prepare: left out {line.rstrip()}")
        _LOG.warning(f"prepare: {left_out:,} bad rows left out; {path} lists them")
    print(f"records: {settings.out}")
    return 0


def report(card: DatasetCard, seconds: float) -> str:
    """What was written and what was left out, for people."""
    tokens = card.source_tokens + card.target_tokens
    size = sum(shard.bytes for shard in card.shards)
    of = card.origin.get("documents")
    kind = f" (--documents={of}{DOCUMENTS_NOTES[of]})" if of else ""
    lines = [
        f"{_what(card)}: {card.documents:,} documents{kind}, {card.examples:,} "
        f"examples, {card.rows:,} rows of {card.inputs_length} + {card.targets_length} tokens",
        f"tokens: {card.source_tokens:,} source, {card.target_tokens:,} target "
        f"({card.target_bytes:,} target bytes); {100 * (1 - card.non_padding_share):.1f} % padding",
        f"disk: {size / 1e6:.1f} MB in {len(card.shards)} shards, {size / tokens:.2f} bytes per "
        "token",
        f"time: {seconds:.1f} s, {tokens / seconds:,.0f} tokens/s, "
        f"{card.documents / seconds:,.0f} documents/s",
    ]
    for what, counts in (("truncated", card.truncated), ("dropped", card.dropped)):
        shown = ", ".join(f"{name} {count:,}" for name, count in counts.items())
        lines.append(f"{what}: {shown or 'nothing'}")
    lines.append(f"lost by the vocabulary: {Losses(**card.lost).describe()}")
    return "\n".join(lines + lengths_report(card))


def _what(card: DatasetCard) -> str:
    """The task and split, or the files."""
    files = card.origin.get("files")
    name = card.task
    if isinstance(files, list):
        name = ", ".join(files[:3]) + (f" and {len(files) - 3:,} more" if len(files) > 3 else "")
    return f"{name}, split {card.split}" if card.split else name


def lengths_report(card: DatasetCard) -> list[str]:
    """Which share of pairs fits which lengths, and what to take where rows are far too long."""
    if not card.fits:
        return []
    lines, enough = [], {}
    for side, taken in (("sources", card.inputs_length), ("targets", card.targets_length)):
        counts = {length: card.fits.get(f"{side} {length}", 0) for length in FIT_LENGTHS}
        enough[side] = next(
            (length for length, count in counts.items() if count >= ENOUGH * card.examples), taken
        )
        shown = [
            f"{length:,}: {100 * count / card.examples:.0f} %"
            for length, count in counts.items()
            if length >= enough[side] // 4
        ]
        whole = next((n for n, text in enumerate(shown, 1) if text.endswith(" 100 %")), len(shown))
        lines.append(f"{side} that fit a length of {', '.join(shown[:whole])}")
    advice = f"--inputs_length={enough['sources']} --targets_length={enough['targets']}"
    shorter = enough["sources"] < card.inputs_length or enough["targets"] < card.targets_length
    if card.rows < FEW_ROWS and card.examples > PAIRS_A_ROW * card.rows and shorter:
        lines.append(
            f"warning: {card.examples:,} pairs fill only {card.rows:,} rows, about "
            f"{card.examples // card.rows} in each: a batch of that many rows contains all of "
            f"them; {advice} holds {100 * ENOUGH:.0f} % of the sources and targets and gives more "
            "rows"
        )
    return lines
