"""``encdec benchmark adaptation``: the experiment of docs/adaptation.md by one command."""

from __future__ import annotations

import argparse
import pathlib
import time

from encdec.flags import Parser
from encdec.logs import logger
from encdec.storage import local_path

_LOG = logger(__name__)


def main(argv: list[str]) -> int:
    """Trains a decoder-only model and models adapted from it; a repeated call continues.

    Raises:
        ConfigError, DataError: settings or text that do not fit.
    """
    options = vars(_parser().parse_args(argv))
    # Imported late, so that mistakes in the command line are reported at once.
    from encdec.benchmarks.adaptation_experiment import (
        AdaptationExperiment,
        Results,
        run_experiment,
    )
    from encdec.benchmarks.adaptation_results import draw, summary

    for name in ("text", "eval_text", "rows"):
        options[name] = tuple(options[name])
    if options["results"]:
        options["results"] = pathlib.Path(options["results"])
    setting = AdaptationExperiment(pathlib.Path(options.pop("workdir")), **options)
    begin = time.monotonic()

    def say(text: str) -> None:
        _LOG.info(f"[{time.monotonic() - begin:,.0f} s] {text}")

    def report(results: Results) -> None:
        """Table and figure, current after every run and so after an interruption too."""
        if results:
            (setting.work / "table.md").write_text(summary(results) + "\n", encoding="utf-8")
            draw(results, setting.work / "loss.png")

    print(summary(run_experiment(setting, say, report)))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="encdec benchmark adaptation",
        description="Held-out loss at equal FLOPs after a decoder-only model's training: the "
        "same model trained further, encoder-decoders adapted from it, others from scratch.",
    )
    parser.add_argument(
        "--workdir", type=local_path, required=True, metavar="DIR", help="receives everything"
    )
    for name, what in (
        ("text", "to learn from (default: the standard library)"),
        ("eval_text", "held out (default: every 20th document of --text)"),
    ):
        parser.add_argument(
            f"--{name}",
            type=local_path,
            action="append",
            default=[],
            metavar="FILE",
            help=f"text {what}; may be repeated",
        )
    parser.add_argument(
        "--results",
        type=local_path,
        metavar="FILE",
        help="receives a JSON line of every run; runs that it has are not done again (default: "
        "results.jsonl in --workdir)",
    )
    parser.add_argument(
        "--row",
        dest="rows",
        action="append",
        default=[],
        metavar="NAME",
        help="only this row of the table; may be repeated",
    )
    parser.add_argument(
        "--optimizer", choices=("adamw", "muon"), default="adamw", help="of all (default: adamw)"
    )
    renamed = {
        "inputs": "inputs_length",
        "targets": "targets_length",
        "vocabulary": "vocabulary_size",
        "documents": "max_examples",
    }
    for name, kind, default, what in (
        ("model", str, "micro-3m", "preset that gives the widths"),
        ("layers", int, 6, "layers of the source, a multiple of 3"),
        ("steps", int, 3_000, "steps of the source's training"),
        ("further_steps", int, 1_500, "further steps of the source; every row gets their FLOPs"),
        ("inputs", int, 256, "source tokens per row"),
        ("targets", int, 64, "target tokens per row"),
        ("batch_size", int, 8, "rows per step"),
        ("vocabulary", int, 2_048, "ids without sentinels"),
        ("learning_rate", float, 1e-3, "at the peak, from random parameters"),
        ("further_learning_rate", float, 0.0, "from the source's parameters; 0: the same"),
        ("evaluations", int, 8, "points of each curve"),
        ("eval_rows", int, 512, "held-out rows of an evaluation"),
        ("document_bytes", int, 0, "text taken from each document; 0: all"),
        ("documents", int, 0, "documents of the text that are read; 0: all"),
        ("seeds", int, 3, "runs of each headline row"),
    ):
        parser.add_argument(
            f"--{renamed.get(name, name)}",
            dest=name,
            type=kind,
            default=default,
            help=f"{what} (default %(default)s)",
        )
    return parser
