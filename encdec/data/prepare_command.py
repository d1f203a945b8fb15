"""The command line of ``encdec prepare``: flags, gin files, progress and the final report."""

from __future__ import annotations

import argparse
import difflib
import itertools
import pathlib
import re
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import gin
from encdec.data.blocks import Counts
from encdec.data.denoising import SETTINGS, Denoiser, MixtureOfDenoisers, SpanCorruption
from encdec.data.losses import Losses
from encdec.data.mixing import MIXTURES, task_or_mixture
from encdec.data.objectives import CausalLM, Objective, PrefixLM, SequenceToSequence
from encdec.data.prepare import BAD_ROWS_FILE, choose_task, prepare
from encdec.data.readers import DOCUMENTS
from encdec.data.records import DatasetCard
from encdec.data.text_tasks import TEXT_TASKS, TextTask
from encdec.data.vocabulary import load_vocabulary
from encdec.errors import ConfigError
from encdec.storage import local_path

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
LOG_SECONDS = 10.0
SHOWN_BAD_ROWS = 5
TERMINAL_SECONDS = 0.2


class ProgressLine:
    """Counts and rate: one line rewritten on a terminal, plain lines every ten seconds else."""

    def __init__(self):
        self.stream = sys.stderr
        self.terminal = self.stream.isatty()
        self.started = time.perf_counter()
        self.shown = self.started if not self.terminal else 0.0
        self.width = 0
        self.warned = False

    def __call__(self, counts: Counts) -> None:
        if counts.lost and not self.warned:
            # At once: hours of preparing may follow.
            self.close()
            self.stream.write(f"prepare: warning: {loss_warning(counts.lost)}\n")
            self.warned = True
        now = time.perf_counter()
        if now - self.shown < (TERMINAL_SECONDS if self.terminal else LOG_SECONDS):
            return
        self.shown = now
        seconds = max(now - self.started, 1e-9)
        line = (
            f"prepare: {counts.examples:,} examples, {counts.rows:,} rows, "
            f"{counts.tokens / 1e6:.1f}M tokens, {counts.tokens / seconds / 1e3:,.0f}k tokens/s"
        )
        self._write(line)

    def _write(self, line: str) -> None:
        if self.terminal:
            self.stream.write("\r" + line.ljust(self.width))
            self.width = len(line)
        else:
            self.stream.write(line + "\n")
        self.stream.flush()

    def close(self) -> None:
        if self.terminal and self.width:
            self.stream.write("\r" + " " * self.width + "\r")
            self.stream.flush()


def loss_warning(lost: Losses) -> str:
    """What the vocabulary loses and what to do about it."""
    return (
        f"this vocabulary does not give all text back: {lost.describe()}. Take one with byte "
        "fallback and without normalisation (encdec vocab trains one); --lossless refuses others"
    )


def parser() -> argparse.ArgumentParser:
    """Flags not given keep what gin binds, else the defaults of `prepare`."""
    flags = argparse.ArgumentParser(
        prog="encdec prepare",
        description="Turn text into packed records for training.",
        epilog="Gin binds what an example is, e.g. --gin_bindings='prefix_lm.split = 0.3' or "
        "'sequence_to_sequence.inputs_eos = False'.",
        argument_default=argparse.SUPPRESS,
    )
    tasks = ", ".join([*TEXT_TASKS, *MIXTURES])
    flags.add_argument("--task", help=f"a task or mixture by name: {tasks}")
    flags.add_argument(
        "--data_dir", type=local_path, metavar="DIR", help="where the task's files lie"
    )
    flags.add_argument(
        "--jsonl",
        type=local_path,
        nargs="+",
        metavar="FILE",
        help="JSONL with source and target, also compressed",
    )
    flags.add_argument(
        "--text",
        type=local_path,
        nargs="+",
        metavar="FILE",
        help="text files, or JSONL with text, for pretraining",
    )
    flags.add_argument(
        "--documents",
        help=f"what a document is in a plain text file: {', '.join(DOCUMENTS)} (files); a row of "
        "JSONL always is one",
    )
    flags.add_argument("--objective", help=f"what to learn from the text: {', '.join(OBJECTIVES)}")
    flags.add_argument(
        "--vocabulary", type=local_path, help="a .model, a tokenizer.json, or 'bytes'"
    )
    flags.add_argument("--extra_ids", type=int, help="sentinels at the vocabulary's end (0)")
    flags.add_argument(
        "--out", type=local_path, metavar="DIR", help="the records directory to write"
    )
    flags.add_argument("--split", help="train, validation or test (train)")
    flags.add_argument("--inputs_length", type=int, help="source tokens a row (1024)")
    flags.add_argument("--targets_length", type=int, help="target tokens a row (256)")
    flags.add_argument("--packing", help="best_fit, greedy (seqio's order) or none (best_fit)")
    flags.add_argument("--decoder_start_id", type=int, help="first decoder input (0)")
    flags.add_argument("--seed", type=int, help="seed of the objective (0)")
    flags.add_argument("--passes", type=int, help="times over the text, each with new noise (1)")
    flags.add_argument("--max_examples", type=int, help="read no more than this many rows")
    flags.add_argument("--max_bad_rows", type=int, help="bad rows to leave out and count (0)")
    flags.add_argument(
        "--lossless",
        action="store_true",
        help="refuse a vocabulary that does not give all text back (warn)",
    )
    flags.add_argument("--block_bytes", type=int, help="text of a shard (4 MiB)")
    flags.add_argument("--workers", type=int, help="processes (all cores)")
    flags.add_argument(
        "--beam_options",
        metavar="FLAGS",
        help="prepare on Apache Beam with its flags, e.g. '--runner=DirectRunner'",
    )
    flags.add_argument("--overwrite", action="store_true", help="replace existing records")
    flags.add_argument("--gin_file", type=local_path, action="append", default=[], metavar="FILE")
    flags.add_argument("--gin_bindings", action="append", default=[], metavar="BINDING")
    return flags


def parse_gin(files: Sequence[str], bindings: Sequence[str]) -> None:
    """Bind what gin files and bindings say and nothing else; ConfigError where they are wrong."""
    gin.clear_config()
    # `include` lines name paths from the repository's root, wherever the command is run.
    gin.add_config_file_search_path(str(REPOSITORY))
    try:
        gin.parse_config_files_and_bindings(list(files), list(bindings))
    except (ValueError, OSError, SyntaxError) as error:
        raise ConfigError(f"gin: {error}") from error


def refuse_unused(bindings: Sequence[str]) -> None:
    """ConfigError for a binding of something that this preparation does not use.

    Bindings in files are for several commands; one that is typed is meant for this one.
    """
    used = set(re.findall(r"^([\w./]+)\.\w+ =", gin.operative_config_str(), re.MULTILINE))
    used |= {name.rpartition(".")[2] for name in used}
    for binding in bindings:
        bound = re.match(r"\s*([\w./]+)\.(\w+)\s*=", binding)
        if bound and bound[1] not in used:
            raise ConfigError(
                f"--gin_bindings={binding!r} binds {bound[1]}, which is not used here; used are "
                f"{', '.join(sorted(name for name in used if '.' not in name))}"
            )


def main(argv: list[str]) -> int:
    """Parse the flags, prepare, print the report."""
    given = vars(parser().parse_args(argv))
    files, bindings = given.pop("gin_file"), given.pop("gin_bindings")
    beam_options = given.pop("beam_options", None)
    parse_gin(files, bindings)
    settings = {name: value for name, value in bound_settings(**given).items() if value is not None}
    for name in ("out", "vocabulary"):
        if name not in settings:
            raise ConfigError(f"--{name} is missing; give it, or bind prepare.{name} in gin")
    chosen = [settings.pop(name, None) for name in ("task", "jsonl", "text")]
    data_dir, documents = (settings.pop(name, None) for name in ("data_dir", "documents"))
    if isinstance(chosen[0], str) and not any((*chosen[1:], documents)):
        task = task_or_mixture(chosen[0], data_dir, **mixture())
    else:
        task = choose_task(chosen[0], chosen[1] or (), chosen[2] or (), data_dir, documents)
    extra_ids = settings.pop("extra_ids", None)
    vocabulary = load_vocabulary(settings.pop("vocabulary"), extra_ids=extra_ids)
    settings["objective"] = choose_objective(settings.get("objective"), task)
    refuse_unused(bindings)
    notes = {"operative_config.gin": gin.operative_config_str()}
    if beam_options is not None:
        if "workers" in settings:
            raise ConfigError(
                f"--workers={settings['workers']} is for this machine's processes, and with "
                "--beam_options Beam's runner has its own; leave one out"
            )
        from encdec.data.beam_prepare import BeamWriter

        settings["writer"] = BeamWriter(beam_options)
    progress = ProgressLine()
    started = time.perf_counter()
    try:
        card = prepare(task=task, vocabulary=vocabulary, progress=progress, notes=notes, **settings)
    finally:
        progress.close()
    print(report(card, time.perf_counter() - started))
    if left_out := card.dropped.get("bad_rows"):
        path = pathlib.Path(settings["out"]) / BAD_ROWS_FILE
        with open(path, encoding="utf-8") as lines:
            for line in itertools.islice(lines, SHOWN_BAD_ROWS):
                print(f"prepare: left out {line.rstrip()}", file=sys.stderr)
        print(f"prepare: {left_out:,} bad rows left out, all named in {path}", file=sys.stderr)
    print(f"records: {settings['out']}")
    return 0


@gin.configurable
def mixture(
    rates: Sequence[float] | None = None, temperature: float = 1.0, maximum: int | None = None
) -> dict[str, Any]:
    """How a mixture's tasks are mixed, as gin binds it: `mixing.mixing_rates`."""
    return {"rates": rates, "temperature": temperature, "maximum": maximum}


@gin.configurable(module="objectives")
def sequence_to_sequence(inputs_eos: bool = True) -> SequenceToSequence:
    """Supervised pairs, as gin binds them."""
    return SequenceToSequence(inputs_eos=inputs_eos)


@gin.configurable(module="objectives")
def prefix_lm(split: float = 0.5) -> PrefixLM:
    """Prefix LM over raw text, as gin binds it."""
    return PrefixLM(split=split)


@gin.configurable(module="objectives")
def span_corruption(density: float = 0.15, mean_span: float = 3.0) -> SpanCorruption:
    """T5's span corruption, as gin binds it."""
    return SpanCorruption(density=density, mean_span=mean_span)


@gin.configurable(module="objectives")
def ul2(
    denoisers: str | Sequence[Sequence[Any]] = "ul2", mode_tokens: bool = True
) -> MixtureOfDenoisers:
    """A mixture of denoisers, as gin binds it: "ul2", "t5gemma2", or a list of denoisers.

    A denoiser is (mode, mean_span, density, rate); mean_span None is a prefix LM.
    """
    if isinstance(denoisers, str):
        if denoisers not in SETTINGS:
            raise ConfigError(
                f"ul2.denoisers is {denoisers!r}; wanted one of {', '.join(SETTINGS)} or a list"
            )
        return MixtureOfDenoisers(SETTINGS[denoisers], mode_tokens)
    try:
        own = tuple(Denoiser(*denoiser) for denoiser in denoisers)
    except TypeError as error:
        raise ConfigError(
            f"ul2.denoisers is {denoisers!r}; wanted a list of (mode, mean_span, density, rate)"
        ) from error
    return MixtureOfDenoisers(own, mode_tokens)


@gin.configurable(module="objectives")
def causal_lm() -> CausalLM:
    """Causal LM over raw text, for decoder-only models."""
    return CausalLM()


OBJECTIVES: dict[str, Callable[[], Objective]] = {
    "sequence_to_sequence": sequence_to_sequence,
    "prefix_lm": prefix_lm,
    "span_corruption": span_corruption,
    "ul2": ul2,
    "causal_lm": causal_lm,
}
OWN_OBJECTIVES = {SequenceToSequence: "sequence_to_sequence", PrefixLM: "prefix_lm"}


def choose_objective(given: str | Objective | None, task: TextTask) -> Objective:
    """The objective named, else the task's own, with what gin binds of it."""
    if isinstance(given, Objective):
        return given
    name = given or OWN_OBJECTIVES[type(task.objective)]
    if name not in OBJECTIVES:
        near = difflib.get_close_matches(name, OBJECTIVES, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"no objective {name!r}; there are {', '.join(OBJECTIVES)}{hint}")
    return OBJECTIVES[name]()


@gin.configurable("prepare")
def bound_settings(
    task: str | None = None,
    jsonl: Sequence[str] | None = None,
    text: Sequence[str] | None = None,
    data_dir: str | None = None,
    documents: str | None = None,
    vocabulary: str | None = None,
    extra_ids: int | None = None,
    out: str | None = None,
    objective: str | Objective | None = None,
    split: str | None = None,
    inputs_length: int | None = None,
    targets_length: int | None = None,
    packing: str | None = None,
    decoder_start_id: int | None = None,
    seed: int | None = None,
    passes: int | None = None,
    max_examples: int | None = None,
    max_bad_rows: int | None = None,
    lossless: bool | None = None,
    block_bytes: int | None = None,
    workers: int | None = None,
    overwrite: bool | None = None,
) -> dict[str, Any]:
    """Settings of `prepare` as gin binds them and flags override; None where neither does.

    Apart from `prepare` itself, since gin rewrites the errors that pass through its functions.
    """
    return dict(locals())


def report(card: DatasetCard, seconds: float) -> str:
    """What was written and what was left out, for people."""
    tokens = card.source_tokens + card.target_tokens
    size = sum(shard.bytes for shard in card.shards)
    of = card.origin.get("documents")
    kind = f" (--documents={of})" if of else ""
    lines = [
        f"{card.task}, split {card.split}: {card.documents:,} documents{kind}, {card.examples:,} "
        f"examples, {card.rows:,} rows of {card.inputs_length} + {card.targets_length} tokens",
        f"tokens: {card.source_tokens:,} source, {card.target_tokens:,} target "
        f"({card.target_bytes:,} target bytes); {100 * (1 - card.non_padding_share):.1f} % padding",
        f"disk: {size / 1e6:.1f} MB in {len(card.shards)} shards, {size / tokens:.2f} bytes a "
        "token",
        f"time: {seconds:.1f} s, {tokens / seconds:,.0f} tokens/s, "
        f"{card.documents / seconds:,.0f} documents/s",
    ]
    for what, counts in (("truncated", card.truncated), ("dropped", card.dropped)):
        shown = ", ".join(f"{name} {count:,}" for name, count in counts.items())
        lines.append(f"{what}: {shown or 'nothing'}")
    lines.append(f"lost by the vocabulary: {Losses(**card.lost).describe()}")
    return "\n".join(lines)
