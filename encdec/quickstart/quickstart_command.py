"""``encdec quickstart``: from the machine's own Python library to trained, compared models."""

from __future__ import annotations

import dataclasses
import datetime
import os
import pathlib
import platform
import shlex
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from encdec.benchmarks.device_rates import measure_rates
from encdec.benchmarks.generation import time_generation
from encdec.cost.flops import cache_bytes, count_parameters, training_flops, weight_bytes
from encdec.cost.peers import match_decoder_only
from encdec.data.corpora.stdlib import stdlib_text
from encdec.data.prepare import prepare
from encdec.data.prepare_progress import ProgressLine
from encdec.data.records import DatasetCard, read_card
from encdec.data.teacher_rows import TeacherCard
from encdec.data.vocabulary_training import train_vocabulary
from encdec.distill.logits_progress import LogitsProgress
from encdec.distill.teacher_logits import store_teacher_logits
from encdec.evaluation.evaluate import evaluate
from encdec.evaluation.evaluation_settings import EvaluationSettings
from encdec.evaluation.examples import Example, Examples, of_task
from encdec.evaluation.predictions import read_texts
from encdec.flags import Parser
from encdec.inference.generation_settings import GenerationSettings
from encdec.jobs import claim_settings
from encdec.logs import shows_progress
from encdec.model import ModelConfig, preset
from encdec.quickstart import quickstart_report as reports
from encdec.quickstart.quickstart_plan import TASKS, TRY, QuickTask, plan_text
from encdec.quickstart.quickstart_report import ModelReport, QuickstartReport, Timing
from encdec.saved.saved_params import load_params_for_inference
from encdec.storage import local_path
from encdec.train.loop import train
from encdec.train.metrics import read_metrics
from encdec.train.run_config import RunConfig, parse_config

OPTIMIZER, LEARNING_RATE = "muon", 1e-2  # reaches in 120 steps the loss of AdamW (2e-3) in 240
ALPHA = 0.5  # weight of the teacher, which is no better than its student
TIMED_TOKENS = 32  # generated for the timings
TIMED_INPUTS = (128, 256, 512, 1024, 2048)  # tokens
UNCACHED_INPUTS = (128, 512, 2048)
TABLE_INPUTS = 512  # the input length of the timings in the table
TITLES = {
    "encoder_decoder": "encoder-decoder",
    "decoder_only": "decoder-only",
    "distilled": "distilled encoder-decoder",
}
PARTS = 5

_console = Console()


def parser() -> Parser:
    result = Parser(
        prog="encdec quickstart",
        description="Prepare the Python standard library as a corpus of functions with and "
        "without small faults, train an encoder-decoder and a decoder-only peer at equal training "
        "FLOPs on the same examples, distil a second encoder-decoder from the peer, compare "
        "quality and speed. Repeat the command to resume.",
    )
    result.add("--workdir", "directory for all results", local_path, "runs/quickstart")
    result.add(
        "--task",
        "repair: undo small faults put into functions (default); summaries: write the first "
        "sentence of a function's docstring, which needs far more training to be right",
        default="repair",
        choices=TASKS,
    )
    steps = f"optimizer steps of each model (default {TASKS['repair'].steps})"
    result.add("--steps", steps, int, least=10)
    result.add("--seed", "seed of parameters and row order", int, 0, least=0)
    result.add("--max_examples", "use only N functions, for a quick trial", int, least=8)
    return result


def main(argv: list[str]) -> int:
    arguments = parser().parse_args(argv)
    task = TASKS[arguments.task]
    if arguments.steps is not None:
        task = dataclasses.replace(task, steps=arguments.steps)
    started = time.monotonic()
    workdir = pathlib.Path(arguments.workdir)
    _tell(plan_text(task, measure_rates("float32").flops_per_second), highlight=False)
    _say(1, f"Data: functions of this machine's Python library, for {task.does}")
    cards = prepare_data(workdir, task, arguments.max_examples)
    _say(2, "Training: two models, the same rows, equal FLOPs")
    runs = make_runs(workdir, cards, task, arguments.seed)
    train_seconds = {name: train_one(workdir / name, run) for name, run in runs.items()}
    _say(3, "Distillation: the decoder-only model's draws on every row, and a student on them")
    teacher, seconds = store_draws(workdir)
    runs["distilled"] = distilled_run(runs["encoder_decoder"], workdir)
    train_seconds["distilled"] = train_one(workdir / "distilled", runs["distilled"])
    _say(4, f"Quality: {task.does} that no model has seen, with their own and with other sources")
    count = min(task.held_out, arguments.max_examples or task.held_out)
    held_out = of_task(task.task, None, "test", task.metrics, count)
    answers = {name: answer(workdir / name, held_out, task.new_tokens) for name in runs}
    _say(5, "Speed: first token and whole answers, by input length")
    timings = time_models({name: workdir / name for name in ("encoder_decoder", "decoder_only")})
    examples = held_out.examples
    samples = pick_samples(examples)
    models = [
        model_report(
            name,
            workdir / name,
            runs[name],
            cards,
            train_seconds[name],
            answers[name],
            timings.get(name),
            samples,
        )
        for name in runs
    ]
    command = shlex.join(["encdec", "quickstart", *argv])
    result = QuickstartReport(
        models,
        describe_data(cards, workdir / "encoder_decoder") | {"answered": count},
        describe_teacher(teacher, seconds),
        [(examples[i].source, examples[i].references[0]) for i in samples],
        f"{os.cpu_count()} x {cpu_name()}, jax {jax.__version__}",
        datetime.date.today().isoformat(),
        command,
    )
    paths = reports.write(result, workdir, TABLE_INPUTS)
    show(result, paths, workdir, TRY[arguments.task], time.monotonic() - started)
    return 0


def prepare_data(
    workdir: pathlib.Path, task: QuickTask, max_examples: int | None
) -> Mapping[str, DatasetCard]:
    """Vocabulary and records, made unless they exist.

    Raises:
        ConfigError: those that exist are of another task, or of another number of functions.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    claim_settings(
        workdir / "data.json",
        {"task": task.task, "max_examples": max_examples},
        holder=workdir,
        remedy="give another --workdir, or these --task and --max_examples",
    )
    vocabulary = workdir / "vocabulary.model"
    if not vocabulary.exists():
        size = preset("quickstart").vocab_size
        _tell(f"training a vocabulary of {size:,} pieces on the library's source")
        train_vocabulary(stdlib_text("train"), vocabulary, size=size)
    cards = {}
    for split in ("train", "test"):
        out = workdir / "data" / split
        if not (out / "dataset.json").exists():
            progress = ProgressLine()
            prepare(
                out=out,
                vocabulary=vocabulary,
                task=task.task,
                split=split,
                inputs_length=task.inputs,
                targets_length=task.targets,
                max_examples=max_examples,
                progress=progress,
            )
            progress.close()
        card = cards[split] = read_card(out)
        _tell(
            f"{split}: {card.examples:,} functions in {card.rows:,} rows, {card.source_tokens:,} "
            f"source and {card.target_tokens:,} target tokens, "
            f"{card.non_padding_share:.1%} of the positions filled; shortened {card.truncated}"
        )
    return cards


def make_runs(
    workdir: pathlib.Path, cards: Mapping[str, DatasetCard], task: QuickTask, seed: int
) -> dict[str, RunConfig]:
    """The two runs: equal except for the model, with equal training FLOPs per row."""
    ours = preset("quickstart")
    steps = task.steps
    shape: dict[str, Any] = {"inputs": task.inputs, "targets": task.targets}
    peer = match_decoder_only(ours, by="training_flops", **shape)
    runs: dict[str, RunConfig] = {}
    for name, config in (("quickstart", ours), ("quickstart-dec", peer)):
        runs[config.architecture] = parse_config(
            {
                "model": name,
                "model_overrides": config.changes_from(preset(name)),
                "batch_size": task.batch_size,
                "steps": steps,
                "seed": seed,
                "log_every": 60,
                "data": {
                    "records": str(workdir / "data" / "train"),
                    "eval_records": str(workdir / "data" / "test"),
                },
                "optimizer": {
                    "name": OPTIMIZER,
                    "learning_rate": LEARNING_RATE,
                    "weight_decay": 0.1,
                    "b2": 0.95,
                },
                "schedule": {"name": "cosine", "warmup_steps": max(1, steps // 10)},
                "eval": {"every": max(1, steps // 8)},
                "checkpoint": {"every": max(1, steps // 2), "keep": 1},
            }
        )
    flops = [training_flops(c, batch_size=task.batch_size, **shape) for c in (ours, peer)]
    _tell(
        f"training FLOPs per step: {flops[0]:.4g} and {flops[1]:.4g} "
        f"(ratio {flops[1] / flops[0]:.4f})"
    )
    return runs


def store_draws(workdir: pathlib.Path) -> tuple[TeacherCard, float]:
    """The decoder-only model's draws on every training row, made unless they exist.

    Returns the card, and the seconds it took (0 if it existed).
    """
    out = workdir / "teacher"
    done = (out / "teacher.json").exists()
    records = workdir / "data" / "train"
    progress = LogitsProgress(str(records))
    begin = time.monotonic()
    card = store_teacher_logits(
        teacher=workdir / "decoder_only", records=records, out=out, progress=progress
    )
    progress.close()
    seconds = 0.0 if done else time.monotonic() - begin
    _tell(
        f"{card.tokens:,} target tokens: {card.format.draws} draws in "
        f"{card.bytes_per_token:.1f} bytes per token, {card.pairs / card.tokens:.1f} ids per token"
    )
    return card, seconds


def distilled_run(run: RunConfig, workdir: pathlib.Path) -> RunConfig:
    """The encoder-decoder's run, with the teacher's draws in addition to its targets."""
    return dataclasses.replace(
        run, distill=dataclasses.replace(run.distill, teacher=str(workdir / "teacher"), alpha=ALPHA)
    )


def train_one(workdir: pathlib.Path, run: RunConfig) -> float:
    """Trains or resumes one model; returns the seconds of its training steps."""
    config = run.model_config()
    title = TITLES["distilled" if run.distill.teacher else config.architecture]
    _tell(
        f"\n{title}: {layers_text(config)} layers, {count_parameters(config).total:,} parameters",
        style="bold",
    )
    train(run, workdir)
    seconds = [m["train/step_seconds"] for m in read_metrics(workdir) if "train/step_seconds" in m]
    return sum(seconds) / len(seconds) * run.steps


@dataclasses.dataclass(frozen=True)
class Answers:
    """A model's answers to held-out functions.

    Attributes:
        texts: one per function.
        scores: by metric.
        shuffled: the same metrics where each function is answered from another one.
    """

    texts: list[str]
    scores: dict[str, float]
    shuffled: dict[str, float]


def answer(workdir: pathlib.Path, held_out: Examples, new_tokens: int) -> Answers:
    """Greedy answers and their scores; functions are shortened to the row's length as in training.

    The sources are exchanged among the functions in a second pass: a model that reads its source
    loses its score by that.
    """
    out = workdir / "evaluation"
    report = evaluate(
        EvaluationSettings(
            checkpoint=str(workdir),
            out=str(out),
            generation=GenerationSettings(max_tokens=new_tokens),
            batch_rows=64,
            likelihood=False,
            shuffle_sources=0,
        ),
        [held_out],
    )
    assert report is not None, "one process alone answers every example"
    found = report["tasks"][held_out.name]
    values = lambda scores: {name: scores[name]["value"] for name in held_out.metrics}
    return Answers(
        read_texts(out / held_out.name),
        values(found["scores"]),
        values(found["shuffled_sources"]["scores"]),
    )


def time_models(workdirs: Mapping[str, pathlib.Path]) -> dict[str, dict[str, list[Timing]]]:
    """Timings of generation: both models cached, and the decoder-only model uncached too."""
    measured = time_generation(
        {name: load_params_for_inference(path)[:2] for name, path in workdirs.items()},
        TIMED_INPUTS,
        TIMED_TOKENS,
        repeats=3,
        uncached_lengths=UNCACHED_INPUTS,
        on_progress=lambda text: _tell(text, style="dim", highlight=False),
    )
    result: dict[str, dict[str, list[Timing]]] = {
        name: {"cached": [], "uncached": []} for name in workdirs
    }
    for one in measured:
        result[one.model]["cached" if one.cached else "uncached"].append(
            Timing(
                one.input_length,
                *(x.median for x in (one.first_token, one.total, one.tokens_per_second)),
            )
        )
    return result


def model_report(
    name: str,
    workdir: pathlib.Path,
    run: RunConfig,
    cards: Mapping[str, DatasetCard],
    train_seconds: float,
    answers: Answers,
    timings: dict[str, list[Timing]] | None,
    samples: list[int],
) -> ModelReport:
    """One model's figures, from its work directory and the measurements.

    ``timings`` is None for a model of the same shape as a timed one.
    """
    config = run.model_config()
    step_flops = training_flops(
        config,
        cards["train"].inputs_length,
        cards["train"].targets_length,
        batch_size=run.batch_size,
    )
    evaluations = [m for m in read_metrics(workdir) if "eval/loss" in m]
    timings = timings or {"cached": [], "uncached": []}
    return ModelReport(
        title=TITLES[name],
        layers=layers_text(config),
        parameters=count_parameters(config).total,
        training_flops=step_flops * run.steps,
        training_seconds=train_seconds,
        curve=[(m["step"] * step_flops, m["eval/loss"]) for m in evaluations],
        loss=evaluations[-1]["eval/loss"],
        bits_per_byte=evaluations[-1]["eval/bits_per_byte"],
        scores=answers.scores,
        shuffled=answers.shuffled,
        timings=timings["cached"],
        uncached=timings["uncached"],
        memory_bytes=weight_bytes(config) + cache_bytes(config, TIMED_INPUTS[-1], TIMED_TOKENS),
        samples=[answers.texts[i] for i in samples],
    )


def describe_data(cards: Mapping[str, DatasetCard], workdir: pathlib.Path) -> dict[str, Any]:
    """The data's figures in the report."""
    lines = [m for m in read_metrics(workdir) if "train/target_tokens_per_second" in m]
    rate = [m["train/target_tokens_per_second"] * m["train/step_seconds"] for m in lines]
    steps = max(m["step"] for m in lines)
    return {
        "task": cards["train"].task,
        "train_examples": cards["train"].examples,
        "held_out_examples": cards["test"].examples,
        "target_tokens_seen": round(sum(rate) / len(rate) * steps),
        "timed_new_tokens": TIMED_TOKENS,
    }


def describe_teacher(card: TeacherCard, seconds: float) -> dict[str, Any]:
    """The distillation's figures in the report."""
    return {
        "name": TITLES["decoder_only"],
        "draws": card.format.draws,
        "alpha": ALPHA,
        "tokens": card.tokens,
        "bytes_per_token": card.bytes_per_token,
        "ids_per_token": card.pairs / card.tokens,
        "entropy": card.entropy,
        "scoring_seconds": seconds,
    }


def pick_samples(examples: Sequence[Example]) -> list[int]:
    """Three functions, short ones if there are any, evenly spread over the held-out modules."""
    short = [i for i, example in enumerate(examples) if example.source.count("\n") <= 12]
    places = short or range(len(examples))
    return [places[k * len(places) // 6] for k in (1, 3, 5)]


def layers_text(config: ModelConfig) -> str:
    if config.is_encoder_decoder:
        return f"{config.encoder_layers} + {config.decoder_layers}"
    return str(config.decoder_layers)


def cpu_name() -> str:
    """The processor's name, if the system gives it."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def show(
    result: QuickstartReport,
    paths: list[pathlib.Path],
    workdir: pathlib.Path,
    sample: str,
    seconds: float,
) -> None:
    """Prints the table, the ratios, samples, and the paths of all results."""
    header, *rows = reports.table(result, TABLE_INPUTS)
    shown = Table(title="Equal training FLOPs, the same examples", title_justify="left")
    for place, title in enumerate(header):
        shown.add_column(title, justify="right" if place else "left")
    for row in rows:
        shown.add_row(*row)
    _console.print()
    _console.print(shown)
    for line in reports.ratios(result, TABLE_INPUTS):
        _console.print(line, highlight=False)
    _console.print("\nHeld-out functions and the models' answers:\n", style="bold")
    _console.print(reports.samples_text(result), markup=False, highlight=False)
    for path in paths:
        _console.print(f"{path}", highlight=False)
    _console.print(
        f"{workdir}/data: records; {workdir}/teacher: the draws; {workdir}/encoder_decoder, "
        "decoder_only and distilled: checkpoints, metrics, TensorBoard",
        highlight=False,
    )
    _console.print(
        f"\nDone in {seconds / 60:.1f} minutes. Try the model on a function of your own:\n"
        f"  encdec generate --checkpoint={workdir}/encoder_decoder "
        f'"$(printf {sample})"',
        markup=False,
        highlight=False,
    )


def _tell(text: str, **how: Any) -> None:
    """Progress, in the colours of the result."""
    if shows_progress():
        _console.print(text, **how)


def _say(number: int, text: str) -> None:
    _tell(f"\n[{number}/{PARTS}] {text}", style="bold cyan", markup=False)
