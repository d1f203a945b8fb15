"""``encdec evaluate``: predictions of a checkpoint on tasks, scored and reported."""

from __future__ import annotations

import argparse

from encdec import shipped
from encdec.errors import ConfigError
from encdec.evaluation.evaluation_settings import EvaluationSettings
from encdec.flags import Parser
from encdec.hub import data_path
from encdec.inference.generation_settings import GenerationSettings, add_draft_option
from encdec.metrics.metric_registry import METRICS
from encdec.modules import add_module_flag, import_modules
from encdec.storage import any_path, local_path


def main(argv: list[str]) -> int:
    """``encdec evaluate --checkpoint=DIR --tasks=A,B --out=DIR``, or one of its two actions.

    Raises:
        ConfigError: invalid settings, or an output directory with other settings.
        DataError: a task without data, or sources that are too long and refused.
        CheckpointError: the directory holds no trained model.
    """
    if argv and argv[0] == "table":
        from encdec.evaluation.results_table_command import main as table

        return table(argv[1:])
    if argv and argv[0] == "compare":
        from encdec.evaluation.compare_command import main as compare

        return compare(argv[1:])
    options = _parser().parse_args(argv)
    import_modules(options.module)
    settings = _settings(options)
    # Imported late, so that mistakes in the command line are reported at once.
    from encdec.evaluation.examples import load_examples

    tasks = load_examples(settings)
    from encdec.evaluation.evaluate import evaluate
    from encdec.evaluation.evaluation_report import markdown

    report = evaluate(settings, tasks)
    if report:
        print(markdown(report))
    return 0


def _settings(options: argparse.Namespace) -> EvaluationSettings:
    if not options.tasks and not options.jsonl:
        raise ConfigError("nothing to evaluate on; give --tasks=A,B or --jsonl=FILE")
    shard, shards = _shard(options.shard)
    return EvaluationSettings(
        checkpoint=options.checkpoint,
        out=options.out,
        tasks=_names(options.tasks),
        data_dir=options.data_dir,
        split=options.split,
        jsonl=tuple(options.jsonl),
        source_field=options.source_field,
        target_field=options.target_field,
        metrics=_names(options.metrics),
        max_examples=options.max_examples,
        step=options.step,
        too_long=options.too_long,
        max_input_tokens=options.max_input_tokens,
        generation=GenerationSettings(
            max_tokens=options.max_tokens,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            beams=options.beams,
            length_penalty=options.length_penalty,
            seed=options.seed,
        ),
        batch_rows=options.batch_rows,
        draft=options.draft,
        shard=shard,
        shards=shards,
        shuffle_sources=options.shuffle_sources,
        likelihood=not options.no_likelihood,
        resamples=options.resamples,
        judge_endpoint=options.judge_endpoint or "",
        judge_model=options.judge_model or "",
    )


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(",") if name)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="encdec evaluate",
        description="Answers the examples of tasks with a trained model, and scores the answers. "
        "Repeat the command to resume. `encdec evaluate compare --help`: how certain "
        "the difference of two models is; `encdec evaluate table --help`: many models in the "
        "form of the paper's table.",
        epilog="Example: encdec evaluate --checkpoint=runs/squad --tasks=squad_v2,xsum "
        "--data_dir=data --out=runs/squad/evaluation",
    )
    parser.add_argument(
        "--checkpoint",
        type=shipped.checkpoint,
        required=True,
        metavar="DIR",
        help="work directory of `encdec train` or `encdec import`",
    )
    parser.add_argument(
        "--step",
        metavar="N|best",
        help="checkpoint (default: the last; best: lowest held-out loss)",
    )
    _add_task_flags(parser)
    _add_answer_flags(parser)
    _add_work_flags(parser)
    return parser


def _add_task_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tasks", default="", metavar="A,B", help="names, see `encdec data list`")
    parser.add_argument(
        "--data_dir", type=any_path, metavar="DIR", help="directory with the tasks' files"
    )
    parser.add_argument("--split", default="validation", help="default %(default)s")
    parser.add_argument(
        "--jsonl",
        type=data_path,
        action="append",
        default=[],
        metavar="FILE",
        help="your own examples: rows of JSONL, CSV, TSV, Parquet or Arrow, a folder of them, a "
        "pattern, or - for standard input; may be repeated, each a task named like the file",
    )
    parser.add_argument(
        "--source_field",
        default="source",
        metavar="NAME",
        help="with --jsonl (default %(default)s)",
    )
    parser.add_argument(
        "--target_field",
        default="target",
        metavar="NAME",
        help="with --jsonl (default %(default)s); further references are a list in targets",
    )
    parser.add_argument(
        "--metrics",
        default="",
        metavar="A,B",
        help="metrics instead of the tasks' own, and for files (default exact_match,rouge): "
        + ", ".join(METRICS)
        + ", or one of their scores, such as rougeL_stemmed",
    )
    add_module_flag(parser)
    parser.add_argument(
        "--shuffle_sources",
        nargs="?",
        const=0,
        type=int,
        metavar="SEED",
        help="answer a second time with the sources permuted among the examples, and report "
        "these scores next to the plain ones (seed 0 unless given)",
    )
    add_draft_option(parser)
    parser.add_argument("--max_examples", type=int, metavar="N", help="the first N examples only")
    parser.add_argument(
        "--out",
        type=any_path,
        required=True,
        metavar="DIR",
        help="receives predictions, report.json and report.md",
    )


def _add_answer_flags(parser: argparse.ArgumentParser) -> None:
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
        "--temperature", type=float, default=0.0, metavar="X", help="0: greedy (default)"
    )
    parser.add_argument("--top_k", type=int, default=0, metavar="N")
    parser.add_argument("--top_p", type=float, default=1.0, metavar="X")
    parser.add_argument("--beams", type=int, default=1, metavar="N")
    parser.add_argument("--length_penalty", type=float, default=0.6, metavar="X")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="sampling seed")
    parser.add_argument(
        "--batch_rows",
        type=int,
        default=16,
        metavar="N",
        help="most answers generated at once (default %(default)s)",
    )


def _add_work_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shard",
        default="0/1",
        metavar="I/N",
        help="part I of N processes that divide the examples; the last to finish writes the report",
    )
    parser.add_argument(
        "--judge_endpoint",
        metavar="URL",
        help="OpenAI-compatible address up to /v1: ask its language model to judge every "
        "answer; replies are kept in DIR/judge, the key is read from OPENAI_API_KEY",
    )
    parser.add_argument(
        "--judge_model",
        type=local_path,
        metavar="NAME",
        help="name of the endpoint's model; without an endpoint, directory of a "
        "Hugging Face model to ask on this machine (needs the extra hf)",
    )
    parser.add_argument(
        "--no_likelihood",
        action="store_true",
        help="skip perplexity, bits per byte and calibration error, which read each reference once",
    )
    parser.add_argument(
        "--resamples",
        type=int,
        default=1000,
        metavar="N",
        help="number of bootstrap samples (default %(default)s)",
    )


def _shard(text: str) -> tuple[int, int]:
    shard, _, shards = text.partition("/")
    if not (shard.isdigit() and shards.isdigit() and int(shard) < int(shards)):
        raise ConfigError(f"--shard is {text!r}; expected I/N with I from 0 to N - 1")
    return int(shard), int(shards)
