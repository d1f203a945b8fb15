"""``encdec evaluate``: predictions of a checkpoint on tasks, scored and reported."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import itertools
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from encdec.errors import ConfigError, DataError
from encdec.inference.progress import Progress
from encdec.inference.settings import GenerationSettings, check_numbers
from encdec.storage import local_path

if TYPE_CHECKING:
    from encdec.evaluation.judge import Judge
    from encdec.evaluation.likelihood import Likelihood
    from encdec.evaluation.predictions import Example, Prediction, Sources

NAMED = 10  # examples that a line on standard error lists


def main(argv: list[str]) -> int:
    """``encdec evaluate --checkpoint=DIR --tasks=A,B --out=DIR``, or one of its two actions.

    Raises:
        ConfigError: settings that cannot be, or an output directory of other settings.
        DataError: a task without data, or sources that are too long and refused.
        CheckpointError: no trained model there.
    """
    if argv and argv[0] == "table":
        from encdec.evaluation.results_table_command import main as table

        return table(argv[1:])
    if argv and argv[0] == "compare":
        from encdec.evaluation.compare_command import main as compare

        return compare(argv[1:])
    options = _parser().parse_args(argv)
    settings = GenerationSettings(
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        beams=options.beams,
        length_penalty=options.length_penalty,
        seed=options.seed,
    )
    shard, shards = _shard(options.shard)
    # An input is one token at least, and its EOS.
    check_numbers(options, limit=1, batch_rows=1, max_input_tokens=2, resamples=1)
    _check_judge(options)
    # Imported late: a mistake in the command line is answered at once.
    tasks = {name: _examples(name, options) for name in options.tasks.split(",")}
    from encdec.evaluation.evaluation_report import write_report
    from encdec.evaluation.likelihood import LikelihoodFiles, measure
    from encdec.evaluation.loading import load_models
    from encdec.evaluation.predictions import (
        PredictionFiles,
        check_sources,
        check_vocabulary,
        open_windows,
        predict,
    )

    generator, references, model = load_models(options)
    sources = {
        name: check_sources(generator.prompts, examples, options.too_long)
        for name, examples in tasks.items()
    }
    lost = {
        name: check_vocabulary(generator.prompts.vocabulary, examples, name)
        for name, examples in tasks.items()
    }
    out, judge = pathlib.Path(options.out), _judge(options)
    files = {
        name: (
            PredictionFiles(out / name, _identity(options, model, settings, examples), examples),
            LikelihoodFiles(out / name),
        )
        for name, examples in tasks.items()
    }
    how = {"too_long": options.too_long, "shard": shard, "shards": shards}
    for name, examples in tasks.items():
        answers, likelihoods = files[name]
        done = set(answers.read())
        _introduce(name, examples, len(done), sources[name], options)
        open_examples = sum(map(len, open_windows(len(examples), done, shard, shards)))
        with Progress(name, open_examples) as progress:
            predict(generator, answers, examples, settings, on_batch=progress, **how)
        if references:
            windows = open_windows(len(examples), set(likelihoods.read()), shard, shards)
            with Progress(f"{name}, references", sum(map(len, windows))) as progress:
                measure(references, likelihoods, examples, on_batch=progress, **how)
    # Only now: processes may finish the tasks in any order, and the last one sees them all.
    found = {
        name: (answers.read(), likelihoods.read() if references else None)
        for name, (answers, likelihoods) in files.items()
    }
    if not _is_complete(tasks, found):
        return 0
    reports = {
        name: _task_report(name, examples, *found[name], judge, options.resamples)
        | {"sources_empty": len(sources[name].empty), "references_not_writable": lost[name]}
        for name, examples in tasks.items()
    }
    write_report(
        out,
        {
            "model": model,
            "decoding": _decoding(settings, options),
            "tasks": reports,
            "resamples": options.resamples,
            "judge": judge and judge.describe(),
        },
    )
    print((out / "report.md").read_text())
    return 0


def _introduce(
    name: str, examples: Sequence[Example], done: int, sources: Sources, options: argparse.Namespace
) -> None:
    """Says what is to be done of a task, and which sources cannot be read as they are."""
    print(
        f"{name}: {len(examples):,} examples, {done:,} answered already, "
        f"{len(sources.long):,} sources too long ({options.too_long})",
        file=sys.stderr,
    )
    if sources.empty:
        more = ", ..." if len(sources.empty) > NAMED else ""
        print(
            f"{name}: the sources of {len(sources.empty):,} examples are empty and skipped, with "
            f"an empty answer: {', '.join(map(str, sources.empty[:NAMED]))}{more}",
            file=sys.stderr,
        )


def _is_complete(
    tasks: Mapping[str, Sequence[Example]],
    found: Mapping[str, tuple[Mapping[int, Any], Mapping[int, Any] | None]],
) -> bool:
    """Whether nothing is missing of any task; says what is."""
    complete = True
    for name, examples in tasks.items():
        have = min(len(part) for part in found[name] if part is not None)
        if have < len(examples):
            complete = False
            print(
                f"{name}: {have:,} of {len(examples):,} done; the call that finds all "
                "of them writes the report",
                file=sys.stderr,
            )
    return complete


def _task_report(
    name: str,
    examples: Sequence[Example],
    found: Mapping[int, Prediction],
    given: Mapping[int, Likelihood] | None,
    judge: Judge | None,
    resamples: int,
) -> dict[str, Any]:
    """All of one task's scores, the judge's and the likelihood's too where they were asked for."""
    from encdec.evaluation.evaluation_report import task_report
    from encdec.evaluation.likelihood import likelihood_scores
    from encdec.evaluation.scores import mean_score, not_measured, score_task

    texts = [found[index].text for index in range(len(examples))]
    scores = score_task(name, [example.references for example in examples], texts)
    if given is not None:
        scores += likelihood_scores([given[index] for index in range(len(examples))])
    missing = None
    if judge:
        opinions = [one for one in judge.opinions(examples, texts) if one is not None]
        scores += mean_score("judge", opinions)
        missing = len(texts) - len(opinions)
    report = task_report(scores, examples, found, resamples)
    return report | {"judge_missing": missing, "not_measured": not_measured(name)}


def _check_judge(options: argparse.Namespace) -> None:
    if bool(options.judge_endpoint) and not options.judge_model:
        raise ConfigError(
            f"--judge_endpoint is {options.judge_endpoint!r} and --judge_model "
            "empty; wanted the name of a model that the endpoint knows"
        )
    if options.judge_model and not options.judge_endpoint:
        if not pathlib.Path(options.judge_model, "config.json").is_file():
            raise ConfigError(
                f"--judge_model is {options.judge_model!r}, which holds no config.json; wanted a "
                "Hugging Face model's directory, or --judge_endpoint=URL beside a name"
            )


def _judge(options: argparse.Namespace) -> Judge | None:
    from encdec.evaluation.judge import CACHE, Judge, endpoint, local_model

    if not options.judge_model:
        return None
    cache = pathlib.Path(options.out) / CACHE
    if options.judge_endpoint:
        return Judge(
            options.judge_endpoint,
            options.judge_model,
            cache,
            endpoint(
                options.judge_endpoint, options.judge_model, os.environ.get("OPENAI_API_KEY", "")
            ),
        )
    return Judge(
        "local", options.judge_model, cache, local_model(options.judge_model), attempts=1, workers=1
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="encdec evaluate",
        allow_abbrev=False,
        description="Answers the examples of tasks with a trained model, and scores the answers. "
        "The same command continues after a stop. `encdec evaluate compare --help`: how sure "
        "the difference of two models is; `encdec evaluate table --help`: many models as the "
        "paper's table.",
        epilog="Example: encdec evaluate --checkpoint=runs/squad --tasks=squad_v2,xsum "
        "--data_dir=data --out=runs/squad/evaluation",
    )
    parser.add_argument(
        "--checkpoint",
        type=local_path,
        required=True,
        metavar="DIR",
        help="work directory of `encdec train` or `encdec import`",
    )
    parser.add_argument(
        "--step",
        metavar="N|best",
        help="checkpoint (default: the last; best: of least held-out loss)",
    )
    parser.add_argument(
        "--tasks", required=True, metavar="A,B", help="names, see `encdec data list`"
    )
    parser.add_argument("--data_dir", type=local_path, metavar="DIR", help="holds the tasks' files")
    parser.add_argument("--split", default="validation", help="default %(default)s")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N examples only")
    parser.add_argument(
        "--out",
        type=local_path,
        required=True,
        metavar="DIR",
        help="receives predictions, report.json and report.md",
    )
    parser.add_argument(
        "--too_long",
        choices=("refuse", "cut", "skip"),
        default="cut",
        help="sources longer than the model reads: refuse to begin, cut their end, "
        "or skip them with an empty answer (default %(default)s; always counted)",
    )
    parser.add_argument(
        "--max_input_tokens",
        type=int,
        metavar="N",
        help="longest source (default: the longest in training)",
    )
    parser.add_argument("--max_tokens", type=int, metavar="N", help="longest answer")
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="X", help="0 is greedy (default)"
    )
    parser.add_argument("--top_k", type=int, default=0, metavar="N")
    parser.add_argument("--top_p", type=float, default=1.0, metavar="X")
    parser.add_argument("--beams", type=int, default=1, metavar="N")
    parser.add_argument("--length_penalty", type=float, default=0.6, metavar="X")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of drawing")
    parser.add_argument(
        "--batch_rows",
        type=int,
        default=16,
        metavar="N",
        help="answers made together at most (default %(default)s)",
    )
    parser.add_argument(
        "--shard",
        default="0/1",
        metavar="I/N",
        help="this process of N that share the examples out; the last to finish writes the report",
    )
    parser.add_argument(
        "--judge_endpoint",
        metavar="URL",
        help="OpenAI-compatible, up to /v1: a language model's opinion of every "
        "answer, kept in DIR/judge; its key is read from OPENAI_API_KEY",
    )
    parser.add_argument(
        "--judge_model",
        metavar="NAME",
        help="name that the endpoint knows; without an endpoint, directory of a "
        "Hugging Face model to be asked on this machine (pip install encdec[hf])",
    )
    parser.add_argument(
        "--no_likelihood",
        action="store_true",
        help="leave out perplexity, bits a byte and calibration error, which read "
        "every reference once",
    )
    parser.add_argument(
        "--resamples",
        type=int,
        default=1000,
        metavar="N",
        help="of the bootstrap (default %(default)s)",
    )
    return parser


def _shard(text: str) -> tuple[int, int]:
    shard, _, shards = text.partition("/")
    if not (shard.isdigit() and shards.isdigit() and int(shard) < int(shards)):
        raise ConfigError(f"--shard is {text!r}; wanted I/N with I from 0 to N - 1")
    return int(shard), int(shards)


def _examples(name: str, options: argparse.Namespace) -> list[Example]:
    from encdec.data.readers import BadRows
    from encdec.data.text_tasks import text_task
    from encdec.evaluation.predictions import Example

    found = text_task(name, options.data_dir).examples(options.split, BadRows())
    examples = [Example(*one) for one in itertools.islice(found, options.limit)]
    if not examples:
        raise DataError(f"the {options.split} split of {name} is empty; give another --split")
    return examples


def _identity(
    options: argparse.Namespace,
    model: dict[str, Any],
    settings: GenerationSettings,
    examples: Sequence[Example],
) -> dict[str, Any]:
    digest = hashlib.sha256()
    for example in examples:
        digest.update(repr((example.source, example.references)).encode())
    return {
        "run": model["run"],
        "step": model["step"],
        "too_long": options.too_long,
        "max_input_tokens": model["max_input_tokens"],
        "examples": digest.hexdigest(),
        **dataclasses.asdict(settings),
        "stop": list(settings.stop),
    }


def _decoding(settings: GenerationSettings, options: argparse.Namespace) -> dict[str, Any]:
    kind = "beam" if settings.beams > 1 else "sampled" if settings.temperature else "greedy"
    return {
        "kind": kind,
        **dataclasses.asdict(settings),
        "stop": list(settings.stop),
        "too_long": options.too_long,
        "split": options.split,
        "limit": options.limit,
    }
