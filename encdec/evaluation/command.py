"""``encdec evaluate``: predictions of a checkpoint on tasks, scored and reported."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import itertools
import os
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from encdec.errors import ConfigError, DataError
from encdec.inference.settings import GenerationSettings

if TYPE_CHECKING:
    from encdec.evaluation.judge import Judge
    from encdec.evaluation.likelihood import Likelihood, LikelihoodModel
    from encdec.evaluation.predictions import Example, Prediction
    from encdec.inference.generator import Generator


def main(argv: list[str]) -> int:
    """``encdec evaluate --checkpoint=DIR --tasks=A,B --out=DIR``, or one of its two actions.

    Raises:
        ConfigError: settings that cannot be, or an output directory of other settings.
        DataError: a task without data, or sources that are too long and refused.
        CheckpointError: no trained model there.
    """
    if argv and argv[0] == "table":
        from encdec.evaluation.table_command import main as table

        return table(argv[1:])
    if argv and argv[0] == "compare":
        from encdec.evaluation.compare_command import main as compare

        return compare(argv[1:])
    options = _parser().parse_args(argv)
    settings = GenerationSettings(
        max_tokens=options.max_tokens, temperature=options.temperature, top_k=options.top_k,
        top_p=options.top_p, beams=options.beams, length_penalty=options.length_penalty,
        seed=options.seed)
    shard, shards = _shard(options.shard)
    _check_judge(options)
    # Imported late: a mistake in the command line is answered at once.
    tasks = {name: _examples(name, options) for name in options.tasks.split(",")}
    generator, references, model = _load(options)
    from encdec.evaluation.likelihood import LikelihoodFiles, measure
    from encdec.evaluation.predictions import (
        PredictionFiles,
        check_lengths,
        check_vocabulary,
        open_windows,
        predict,
    )
    from encdec.evaluation.report import write_report

    long = {name: check_lengths(generator, examples, options.too_long)
            for name, examples in tasks.items()}
    lost = {name: check_vocabulary(generator.prompts.vocabulary, examples, name)
            for name, examples in tasks.items()}
    out, reports = pathlib.Path(options.out), {}
    judge = _judge(options, out)
    how = {"too_long": options.too_long, "shard": shard, "shards": shards}
    for name, examples in tasks.items():
        files = PredictionFiles(
            out / name, _identity(options, model, settings, examples), examples)
        likelihoods = LikelihoodFiles(out / name)
        done = len(files.read())
        print(f"{name}: {len(examples):,} examples, {done:,} answered already, {long[name]:,} "
              f"sources too long ({options.too_long})", file=sys.stderr)
        windows = open_windows(len(examples), set(files.read()), shard, shards)
        with contextlib.closing(Progress(name, sum(map(len, windows)))) as progress:
            predict(generator, files, examples, settings, on_batch=progress, **how)
        if references:
            windows = open_windows(len(examples), set(likelihoods.read()), shard, shards)
            with contextlib.closing(
                    Progress(f"{name}, references", sum(map(len, windows)))) as progress:
                measure(references, likelihoods, examples, on_batch=progress, **how)
        found, given = files.read(), likelihoods.read() if references else None
        have = len(found) if given is None else min(len(found), len(given))
        if have < len(examples):
            print(f"{name}: {have:,} of {len(examples):,} done; the call that finds all "
                  "of them writes the report", file=sys.stderr)
            continue
        reports[name] = _task_report(name, examples, found, given, judge, options.resamples)
        reports[name]["references_not_writable"] = lost[name]
    if len(reports) == len(tasks):
        report = {"model": model, "decoding": _decoding(settings, options), "tasks": reports,
                  "resamples": options.resamples, "judge": judge and judge.describe()}
        write_report(out, report)
        print((out / "report.md").read_text())
    return 0


def _task_report(
    name: str, examples: Sequence[Example], found: Mapping[int, Prediction],
    given: Mapping[int, Likelihood] | None, judge: Judge | None, resamples: int,
) -> dict[str, Any]:
    """All of one task's scores, the judge's and the likelihood's too where they were asked for."""
    from encdec.evaluation.likelihood import likelihood_scores
    from encdec.evaluation.report import task_report
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
        raise ConfigError(f"--judge_endpoint is {options.judge_endpoint!r} and --judge_model "
                          "empty; wanted the name of a model that the endpoint knows")
    if options.judge_model and not options.judge_endpoint:
        if not pathlib.Path(options.judge_model, "config.json").is_file():
            raise ConfigError(
                f"--judge_model is {options.judge_model!r}, which holds no config.json; wanted a "
                "Hugging Face model's directory, or --judge_endpoint=URL beside a name")


def _judge(options: argparse.Namespace, out: pathlib.Path) -> Judge | None:
    from encdec.evaluation.judge import Judge, endpoint, local_model

    if not options.judge_model:
        return None
    if options.judge_endpoint:
        return Judge(options.judge_endpoint, options.judge_model, out / "judge", endpoint(
            options.judge_endpoint, options.judge_model, os.environ.get("OPENAI_API_KEY", "")))
    return Judge("local", options.judge_model, out / "judge", local_model(options.judge_model),
                 attempts=1, workers=1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="encdec evaluate", allow_abbrev=False,
        description="Answers the examples of tasks with a trained model, and scores the answers. "
        "The same command continues after a stop. `encdec evaluate compare --help`: how sure "
        "the difference of two models is; `encdec evaluate table --help`: many models as the "
        "paper's table.",
        epilog="Example: encdec evaluate --checkpoint=runs/squad --tasks=squad_v2,xsum "
        "--data_dir=data --out=runs/squad/evaluation")
    parser.add_argument("--checkpoint", required=True, metavar="DIR",
                        help="work directory of `encdec train` or `encdec import`")
    parser.add_argument("--step", metavar="N|best",
                        help="checkpoint (default: the last; best: of least held-out loss)")
    parser.add_argument("--tasks", required=True, metavar="A,B",
                        help="names, see `encdec data list`")
    parser.add_argument("--data_dir", metavar="DIR", help="holds the tasks' files")
    parser.add_argument("--split", default="validation", help="default %(default)s")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N examples only")
    parser.add_argument("--out", required=True, metavar="DIR",
                        help="receives predictions, report.json and report.md")
    parser.add_argument("--too_long", choices=("refuse", "cut", "skip"), default="cut",
                        help="sources longer than the model reads: refuse to begin, cut their end, "
                        "or skip them with an empty answer (default %(default)s; always counted)")
    parser.add_argument("--max_input_tokens", type=int, metavar="N",
                        help="longest source (default: the longest in training)")
    parser.add_argument("--max_tokens", type=int, metavar="N", help="longest answer")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="X",
                        help="0 is greedy (default)")
    parser.add_argument("--top_k", type=int, default=0, metavar="N")
    parser.add_argument("--top_p", type=float, default=1.0, metavar="X")
    parser.add_argument("--beams", type=int, default=1, metavar="N")
    parser.add_argument("--length_penalty", type=float, default=0.6, metavar="X")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of drawing")
    parser.add_argument("--batch_rows", type=int, default=16, metavar="N",
                        help="answers made together at most (default %(default)s)")
    parser.add_argument("--shard", default="0/1", metavar="I/N",
                        help="this process of N that share the examples out; the last to finish "
                        "writes the report")
    parser.add_argument("--judge_endpoint", metavar="URL",
                        help="OpenAI-compatible, up to /v1: a language model's opinion of every "
                        "answer, kept in DIR/judge; its key is read from OPENAI_API_KEY")
    parser.add_argument("--judge_model", metavar="NAME",
                        help="name that the endpoint knows; without an endpoint, directory of a "
                        "Hugging Face model to be asked on this machine (pip install encdec[hf])")
    parser.add_argument("--no_likelihood", action="store_true",
                        help="leave out perplexity, bits a byte and calibration error, which read "
                        "every reference once")
    parser.add_argument("--resamples", type=int, default=1000, metavar="N",
                        help="of the bootstrap (default %(default)s)")
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


def _load(
    options: argparse.Namespace
) -> tuple[Generator, LikelihoodModel | None, dict[str, Any]]:
    """What answers and what reads references, on all devices of this process; about the model."""
    import jax

    from encdec.evaluation.likelihood import LikelihoodModel
    from encdec.inference.generator import Generator, read_prompt_format
    from encdec.model import parameter_count
    from encdec.train.checkpoints import load_params_for_inference
    from encdec.train.workdir import read_config

    prompts, max_tokens = read_prompt_format(
        options.checkpoint, max_input_tokens=options.max_input_tokens)
    content = read_config(options.checkpoint)
    if "export" in content:
        return _load_export(options, content)
    config, params, step = load_params_for_inference(
        options.checkpoint, chosen_step(options.checkpoint, options.step))
    model = {
        "checkpoint": str(options.checkpoint), "step": step,
        "name": content["run"]["model"], "architecture": config.architecture,
        "encoder_layers": config.encoder_layers, "decoder_layers": config.decoder_layers,
        "parameters": parameter_count(params),
        "training_flops": flops_so_far(options.checkpoint, step), "seed": content["run"]["seed"],
        "max_input_tokens": prompts.max_input_tokens,
        "run": hashlib.sha256(repr(sorted(content.items())).encode()).hexdigest(),
    }
    generator = Generator(
        config, params, prompts, max_tokens=max_tokens, batch_rows=options.batch_rows,
        devices=jax.local_devices())
    references = None if options.no_likelihood else LikelihoodModel(
        config, params, prompts, batch_rows=options.batch_rows, devices=jax.local_devices())
    return generator, references, model


def _load_export(
    options: argparse.Namespace, content: dict[str, Any]
) -> tuple[Generator, None, dict[str, Any]]:
    """The same of a directory that ``encdec export`` wrote, which reads no references.

    Its training is not known to it.
    """
    from encdec.inference.exported import load_exported_generator
    from encdec.model.flops import count_parameters

    if options.step is not None:
        raise ConfigError(f"{options.checkpoint} is an export, which has no checkpoints; leave "
                          "--step out")
    generator = load_exported_generator(
        options.checkpoint, max_input_tokens=options.max_input_tokens,
        batch_rows=options.batch_rows)
    config, export = generator.config, content["export"]
    return generator, None, {
        "checkpoint": str(options.checkpoint), "step": 0,
        "name": f"{export['format']} {export['precision']}", "architecture": config.architecture,
        "encoder_layers": config.encoder_layers, "decoder_layers": config.decoder_layers,
        "parameters": count_parameters(config).total, "training_flops": None, "seed": 0,
        "max_input_tokens": generator.prompts.max_input_tokens,
        "run": hashlib.sha256(repr(sorted(content.items())).encode()).hexdigest(),
    }


def flops_so_far(workdir: str, step: int) -> float | None:
    """Training FLOPs of a run up to a step and, before it, of the run that it started from.

    Forward and backward over whole rows, padding included; a teacher's are not in it. None for
    an imported model, whose training is not known.
    """
    from encdec.model.flops import training_flops
    from encdec.train.checkpoints import latest_step
    from encdec.train.workdir import model_config_of, read_config

    if not step:
        return None
    content = read_config(workdir)
    run, data = content["run"], content["data"]
    flops = step * training_flops(
        model_config_of(content), data["inputs_length"], data["targets_length"],
        batch_size=run["batch_size"])
    if not (source := run.get("init_from")):
        return flops
    if not pathlib.Path(source).is_dir():
        return None
    before = flops_so_far(source, latest_step(source))
    return None if before is None else before + flops


def chosen_step(workdir: str, step: str | None) -> int | None:
    """A checkpoint's step from what --step says.

    Raises:
        ConfigError: no number and not "best", or "best" of a run without held-out loss.
    """
    if step is None:
        return None
    if step.isdigit():
        return int(step)
    from encdec.train.checkpoints import saved_steps
    from encdec.train.metrics import read_metrics

    if step != "best":
        raise ConfigError(f"--step is {step!r}; wanted a number, or best")
    saved = set(saved_steps(workdir))
    losses = [(row["eval/loss"], int(row["step"])) for row in read_metrics(workdir)
              if "eval/loss" in row and int(row["step"]) in saved]
    if not losses:
        raise ConfigError(f"--step=best, but no checkpoint in {workdir} has a held-out loss; "
                          "train with --config.data.eval_records, or give a number")
    return min(losses)[1]


def _identity(
    options: argparse.Namespace, model: dict[str, Any], settings: GenerationSettings,
    examples: Sequence[Example],
) -> dict[str, Any]:
    digest = hashlib.sha256()
    for example in examples:
        digest.update(repr((example.source, example.references)).encode())
    return {"run": model["run"], "step": model["step"], "too_long": options.too_long,
            "max_input_tokens": model["max_input_tokens"], "examples": digest.hexdigest(),
            **dataclasses.asdict(settings), "stop": list(settings.stop)}


def _decoding(settings: GenerationSettings, options: argparse.Namespace) -> dict[str, Any]:
    kind = "beam" if settings.beams > 1 else "sampled" if settings.temperature else "greedy"
    return {"kind": kind, **dataclasses.asdict(settings), "stop": list(settings.stop),
            "too_long": options.too_long, "split": options.split, "limit": options.limit}


class Progress:
    """Examples done, tokens a second and time left, on a line now and then."""

    SECONDS = 10.0

    def __init__(self, name: str, total: int):
        self._clock = time.perf_counter
        self._name, self._total, self._done = name, total, 0
        self._tokens, self._begin = 0, self._clock()
        self._said = self._begin

    def __call__(self, examples: int, tokens: int) -> None:
        self._done += examples
        self._tokens += tokens
        if self._clock() - self._said > self.SECONDS:
            self._say()

    def _say(self) -> None:
        self._said = self._clock()
        seconds = self._said - self._begin
        left = seconds / self._done * (self._total - self._done)
        print(f"{self._name}: {self._done:,} of {self._total:,} examples, "
              f"{self._tokens / seconds:,.0f} tokens/s, {left:,.0f} s left",
              file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._done:
            self._say()
