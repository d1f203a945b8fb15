"""``encdec evaluate``: predictions of a checkpoint on tasks, scored and reported."""

from __future__ import annotations

import argparse

from encdec import shipped
from encdec.errors import ConfigError
from encdec.evaluation.evaluation_settings import EvaluationSettings
from encdec.fields import listed
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
        tasks=listed(options.tasks, "--tasks"),
        data_dir=options.data_dir,
        split=options.split,
        jsonl=tuple(options.jsonl),
        source_field=options.source_field,
        target_field=options.target_field,
        metrics=listed(options.metrics, "--metrics"),
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


def _parser() -> Parser:
    parser = Parser(
        prog="encdec evaluate",
        description="Answers the examples of tasks with a trained model, and scores the answers. "
        "Repeat the command to resume. `encdec evaluate compare --help`: how certain "
        "the difference of two models is; `encdec evaluate table --help`: many models in the "
        "form of the paper's table.",
        epilog="Example: encdec evaluate --checkpoint=runs/squad --tasks=squad_v2,xsum "
        "--data_dir=data --out=runs/squad/evaluation",
    )
    shipped.add_checkpoint_flag(parser)
    parser.add(
        "--step", "checkpoint (default: the last; best: lowest held-out loss)", metavar="N|best"
    )
    _add_task_flags(parser)
    _add_answer_flags(parser)
    _add_work_flags(parser)
    return parser


def _add_task_flags(parser: Parser) -> None:
    parser.add("--tasks", "names, see `encdec data list`", default="", metavar="A,B")
    parser.add("--data_dir", "directory with the tasks' files", any_path)
    parser.add("--split", "of the tasks", default="validation")
    parser.add(
        "--jsonl",
        "your own examples: rows of JSONL, CSV, TSV, Parquet or Arrow, a folder of them, a "
        "pattern, or - for standard input; may be repeated, each a task named like the file",
        data_path,
        [],
        metavar="FILE",
    )
    parser.add("--source_field", "with --jsonl", default="source", metavar="NAME")
    parser.add(
        "--target_field",
        "with --jsonl (default %(default)s); further references are a list in targets",
        default="target",
        metavar="NAME",
    )
    parser.add(
        "--metrics",
        "metrics instead of the tasks' own, and for files (default exact_match,rouge): "
        + ", ".join(METRICS)
        + ", or one of their scores, such as rougeL_stemmed",
        default="",
        metavar="A,B",
    )
    add_module_flag(parser)
    parser.add(
        "--shuffle_sources",
        "answer a second time with the sources permuted among the examples, and report "
        "these scores next to the plain ones (seed 0 unless given)",
        int,
        least=0,
        nargs="?",
        const=0,
        metavar="SEED",
    )
    add_draft_option(parser)
    parser.add("--max_examples", "the first N examples only", int, least=1)
    parser.add("--out", "receives predictions, report.json and report.md", any_path, required=True)


def _add_answer_flags(parser: Parser) -> None:
    parser.add(
        "--too_long",
        "sources longer than the model reads: refuse to begin, cut their end, "
        "or skip them with an empty answer (default %(default)s; always counted)",
        default="cut",
        choices=("refuse", "cut", "skip"),
    )
    longest = "longest source (default: the longest in training)"
    parser.add("--max_input_tokens", longest, int, least=2)  # a token and EOS
    parser.add("--max_tokens", "longest answer", int)
    parser.add("--temperature", "0: greedy (default)", float, 0.0)
    parser.add("--top_k", "sample from the k likeliest tokens; 0: all", int, 0)
    parser.add("--top_p", "nucleus sampling; 1: all tokens", float, 1.0)
    parser.add("--beams", "hypotheses of beam search; 1: none", int, 1)
    parser.add(
        "--length_penalty", "alpha of beam search; above 0 favours longer answers", float, 0.6
    )
    parser.add("--seed", "sampling seed", int, 0)
    parser.add("--batch_rows", "most answers generated at once", int, 16, least=1)


def _add_work_flags(parser: Parser) -> None:
    parser.add(
        "--shard",
        "part I of N processes that divide the examples; the last to finish writes the report",
        default="0/1",
        metavar="I/N",
    )
    parser.add(
        "--judge_endpoint",
        "OpenAI-compatible address up to /v1: ask its language model to judge every "
        "answer; replies are kept in DIR/judge, the key is read from OPENAI_API_KEY",
        metavar="URL",
    )
    parser.add(
        "--judge_model",
        "name of the endpoint's model; without an endpoint, directory of a "
        "Hugging Face model to ask on this machine (needs the extra hf)",
        local_path,
        metavar="NAME",
    )
    parser.add(
        "--no_likelihood",
        "skip perplexity, bits per byte and calibration error, which read each reference once",
        default=False,
    )
    parser.add("--resamples", "number of bootstrap samples", int, 1000, least=1)


def _shard(text: str) -> tuple[int, int]:
    shard, _, shards = text.partition("/")
    if not (shard.isdecimal() and shards.isdecimal() and int(shard) < int(shards)):
        raise ConfigError(f"--shard is {text!r}; expected I/N with I from 0 to N - 1")
    return int(shard), int(shards)
