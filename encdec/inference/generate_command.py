"""``encdec generate``: text from a trained model, for a prompt, a file or standard input."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from encdec import shipped
from encdec.errors import ConfigError
from encdec.flags import Parser
from encdec.hub import data_path
from encdec.inference.generation_settings import GenerationSettings, add_draft_option, check_draft
from encdec.inference.progress import ProgressBar
from encdec.logs import logger
from encdec.storage import any_path, as_path

_LOG = logger(__name__)

if TYPE_CHECKING:
    from encdec.inference.generator import TextGenerator

# Inputs between two writes of the output file: enough for batches of like lengths.
WINDOW_BATCHES = 8

# Settings that are flags of the same name: (name, type, help).
_FLAGS = (
    ("max_tokens", int, "new tokens at most (default: as long as the training targets)"),
    ("temperature", float, "0 is greedy (default); above 0, tokens are drawn"),
    ("top_k", int, "draw from the k likeliest tokens only"),
    ("top_p", float, "draw from the likeliest tokens that together reach this probability"),
    ("repetition_penalty", float, "above 1, tokens of the answer become less likely to return"),
    ("no_repeat_ngram", int, "no n-gram of this length comes twice in an answer"),
    ("seed", int, "sampling seed (default 0)"),
    ("samples", int, "answers to each input"),
    ("beams", int, "hypotheses of beam search; 1 is none (default)"),
    ("length_penalty", float, "alpha of beam search; above 0 favours longer answers (default 0.6)"),
)


def main(argv: list[str]) -> int:
    """``encdec generate --checkpoint=DIR TEXT ...``, or ``--file=IN --out=OUT``.

    Raises:
        ConfigError: settings that cannot be.
        DataError: inputs that are missing, empty or too long.
        CheckpointError: no trained model there.
    """
    options = _parser().parse_args(argv)
    settings = _settings(options)
    check_draft(options.draft, settings)
    _check(options)
    # Imported late, so that mistakes in the command line are reported at once.
    from encdec.inference.answer_files import ResumableOutput, read_inputs
    from encdec.inference.generator import read_prompt_format
    from encdec.inference.load_generator import check_load, load
    from encdec.saved.saved_config import CONFIG_FILE

    prompts, _ = read_prompt_format(options.checkpoint, max_input_tokens=options.max_input_tokens)
    step = check_load(
        options.checkpoint, options.step, devices=options.devices, tensor=options.tensor
    )
    prompts = dataclasses.replace(prompts, keep_unknown=options.keep_unknown)
    texts = options.text if options.file is None else read_inputs(options.file, options.format)
    cut = 0
    for number, text in enumerate(texts):
        name = "the input" if len(texts) == 1 else f"input {number}"
        cut += prompts.encode(text, truncate=_cuts(options), name=name)[1]
    output = None
    if options.out:
        run = (as_path(options.checkpoint) / CONFIG_FILE).read_bytes()
        output = ResumableOutput(
            as_path(options.out),
            {
                "run": hashlib.sha256(run).hexdigest(),
                "step": step,
                "max_input_tokens": prompts.max_input_tokens,
                "truncate": _cuts(options),
                "logprobs": options.logprobs,
                **({"keep_unknown": True} if options.keep_unknown else {}),
                **settings.to_dict(),
            },
            texts,
        )
        output.done()  # refuses what cannot be written, or continued, before anything is loaded
    generator = load(
        options.checkpoint,
        step or None,  # what was recorded, though a run may have saved another meanwhile
        max_input_tokens=options.max_input_tokens,
        batch_rows=options.batch_rows,
        devices=options.devices,
        tensor=options.tensor,
        draft=options.draft,
    )
    generator.prompts = prompts
    if output:
        with output.held():
            if (done := output.done()) == len(texts):
                output.end()
                _LOG.info(f"{options.out} already has all {done:,} answers")
            else:
                _write_file(generator, settings, options, output, texts, done)
    elif options.json or options.logprobs or options.file is not None:
        for rows in _answer(generator, settings, options, texts, 0):
            for row in rows:
                print(json.dumps(row, ensure_ascii=False), flush=True)
    else:
        _print_texts(generator, settings, options, texts)
        if cut:
            _LOG.warning(f"{cut:,} of {len(texts):,} inputs were cut")
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="encdec generate",
        description="Generates text with a trained model, from texts given here or in a file.",
        epilog="Example: encdec generate --checkpoint=runs/mine --beams=4 'def add(a, b): ...'",
    )
    parser.add("text", "an input", nargs="*", metavar="TEXT")
    parser.add(
        "--checkpoint",
        "work directory of `encdec train`, what `encdec export` wrote in another format than "
        f"hf, or a model that comes with encdec: {', '.join(shipped.models())}",
        shipped.checkpoint,
        required=True,
        metavar="DIR",
    )
    parser.add("--step", "checkpoint (default: the last)", int, least=0)
    parser.add(
        "--file",
        "inputs, one per line: JSONL with the field 'source', or text; - is standard input",
        data_path,
        metavar="IN",
    )
    parser.add(
        "--format",
        "format of --file (default: as its name ends; text for -)",
        choices=("jsonl", "text"),
        needs="--file",
    )
    parser.add(
        "--out",
        "receives the answers; the same command continues it after a stop",
        any_path,
        metavar="OUT.jsonl",
    )
    _add_answer_flags(parser)
    return parser


def _add_answer_flags(parser: Parser) -> None:
    for name, kind, text in _FLAGS:
        parser.add(f"--{name}", text, kind)
    stop = "a string that ends an answer; may be given several times"
    parser.add("--stop", stop, default=[], metavar="TEXT")
    longest = "longest input allowed (default: the longest in training)"
    parser.add("--max_input_tokens", longest, int, least=2)  # a token and EOS
    parser.add(
        "--too_long",
        "inputs longer than that: refuse them, or cut their end",
        default="refuse",
        choices=("refuse", "cut"),
    )
    parser.add(
        "--keep_unknown",
        "read what the vocabulary cannot write as its unknown token instead of refusing it",
        default=False,
    )
    parser.add("--batch_rows", "answers made together at most", int, 16, least=1)
    parser.add("--devices", "devices that share the rows", int, 1, least=1)
    parser.add("--tensor", "devices over which each copy of the model is split", int, 1, least=1)
    add_draft_option(parser)
    parser.add("--logprobs", "JSON lines with every token's log-probability", default=False)
    parser.add("--json", "JSON lines instead of plain text", default=False)


def _settings(options: argparse.Namespace) -> GenerationSettings:
    given = {name: getattr(options, name) for name, _, _ in _FLAGS}
    given = {name: value for name, value in given.items() if value is not None}
    return GenerationSettings(**given, stop=options.stop)


def _cuts(options: argparse.Namespace) -> bool:
    return options.too_long == "cut"


def _check(options: argparse.Namespace) -> None:
    if options.file is None and not options.text:
        raise ConfigError("no input; give a text, or --file=IN (- for standard input)")
    if options.file is not None and options.text:
        raise ConfigError(
            f"both --file={options.file} and {len(options.text)} texts are given; "
            "leave one of the two out"
        )
    if options.out and options.file is None:
        raise ConfigError(
            f"--out={options.out} is for --file; for texts on the command line, redirect the "
            "output of --json"
        )
    if options.out and os.path.exists(options.out):
        if os.path.exists(options.file) and os.path.samefile(options.out, options.file):
            raise ConfigError(f"--out={options.out} is the file of inputs; give another --out")


def _answer(
    generator: TextGenerator,
    settings: GenerationSettings,
    options: argparse.Namespace,
    texts: Sequence[str],
    done: int,
    progress: ProgressBar | None = None,
) -> Iterator[list[dict[str, Any]]]:
    """Output rows a window of inputs at a time, in order, from input ``done`` on."""
    from encdec.inference.answer_files import rows_of

    window = WINDOW_BATCHES * options.batch_rows
    for begin in range(done, len(texts), window):
        part = texts[begin : begin + window]
        answers = generator.generate(
            part,
            settings,
            truncate=_cuts(options),
            first_number=begin,
            follow=len(texts) - begin - len(part),
            on_batch=progress,
        )
        yield [
            row
            for number, (text, made) in enumerate(zip(part, answers), begin)
            for row in rows_of(number, text, made, log_probs=options.logprobs)
        ]


def _write_file(
    generator: TextGenerator,
    settings: GenerationSettings,
    options: argparse.Namespace,
    output: Any,
    texts: Sequence[str],
    done: int,
) -> None:
    if done:
        _LOG.info(f"{options.out}: {done:,} of {len(texts):,} inputs are answered already")
    truncated = 0
    output.begin()
    with ProgressBar("generate", len(texts), done) as progress:
        for rows in _answer(generator, settings, options, texts, done, progress):
            output.append(rows)
            truncated += sum(
                row.get("source_truncated", False) for row in rows if not row["sample"]
            )
    output.end()
    cut = f"; {truncated:,} inputs were cut" if truncated else ""
    _LOG.info(f"{options.out}: {len(texts):,} inputs answered, {progress.rate()}{cut}")


def _print_texts(
    generator: TextGenerator,
    settings: GenerationSettings,
    options: argparse.Namespace,
    texts: Sequence[str],
) -> None:
    """Plain texts; a single answer on a terminal appears as it is made."""
    single = len(texts) == settings.samples == 1
    if single and settings.beams == 1 and sys.stdout.isatty():
        for piece in generator.stream(texts[0], settings, truncate=_cuts(options)):
            print(piece, end="", flush=True)
        print()
        return
    answers = generator.generate(texts, settings, truncate=_cuts(options))
    for number, made in enumerate(answers):
        for sample, answer in enumerate(made):
            if not single:
                label = f" {sample}" if settings.samples > 1 else ""
                print(f"--- {number}{label}")
            print(answer.text)
