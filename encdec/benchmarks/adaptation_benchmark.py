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
    from encdec.benchmarks.adaptation_experiment import AdaptationExperiment

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
    preset = "preset that gives the widths"
    parser.add("--model", preset, default=AdaptationExperiment.model)
    for name, least, what in (
        ("layers", 3, "layers of the source, a multiple of 3"),
        ("steps", 1, "steps of the source's training"),
        ("further_steps", 1, "further steps of the source; every row gets their FLOPs"),
        ("inputs", 1, "source tokens per row"),
        ("targets", 2, "target tokens per row"),
        ("batch_size", 1, "rows per step"),
        ("vocabulary", 300, "ids without sentinels"),
        ("evaluations", 1, "points of each curve"),
        ("eval_rows", 1, "held-out rows of an evaluation"),
        ("document_bytes", 0, "text taken from each document; 0: all"),
        ("documents", 0, "documents of the text that are read; 0: all"),
        ("seeds", 1, "runs of each headline row"),
    ):
        default = getattr(AdaptationExperiment, name)
        flag = f"--{renamed.get(name, name)}"
        parser.add(flag, what, int, default, least=least, dest=name)
    peak, rate = "at the peak, from random parameters", AdaptationExperiment.learning_rate
    parser.add("--learning_rate", peak, float, rate, above=0)
    further = "from the source's parameters; 0: the same"
    parser.add("--further_learning_rate", further, float, 0.0, least=0)
    return parser
