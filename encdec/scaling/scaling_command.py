"""``encdec scaling {plan,run,evaluate,fit,plot}``."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import shlex
import sys
from collections.abc import Sequence
from typing import Any

import ml_collections
from rich.console import Console

from encdec.config_files import read_config_file, split_overrides, with_overrides
from encdec.errors import ConfigError, DataError, EncdecError
from encdec.fields import listed, unknown_field
from encdec.flags import Parser, bounded
from encdec.logs import logger
from encdec.modules import add_module_flag, import_modules
from encdec.storage import any_path, as_path, filled_directory, local_path

_LOG = logger(__name__)


def main(argv: list[str]) -> int:
    """Plans, runs, evaluates, fits or plots a ladder of runs.

    Raises:
        ConfigError: the ladder cannot be planned.
        DataError: the results cannot be fitted; the message gives the reason.
        CheckpointError: the directory belongs to another ladder.
    """
    overrides, rest = split_overrides(argv, "ladder")
    options = _parser().parse_args(rest)
    if overrides and not hasattr(options, "ladder"):
        raise ConfigError(
            f"{overrides[0]} has no effect on `encdec scaling {options.action}`, "
            "which only reads results; use it with plan, run and evaluate"
        )
    return options.function(options, overrides)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="encdec scaling",
        description="Scaling curves: a ladder of runs planned, run, evaluated, fitted, plotted.",
    )
    actions = parser.add_subparsers(
        dest="action", required=True, metavar="{plan,run,evaluate,fit,plot}"
    )
    for add in (_add_plan, _add_run, _add_evaluate, _add_fit, _add_plot):
        add(actions)
    return parser


def _add_plan(actions: Any) -> None:
    parser = _action(actions, "plan", _plan, "show every run of a ladder and the total cost")
    _ladder_options(parser)
    parser.add("--chip", "predict chip-hours on this chip, e.g. v5e", metavar="NAME")
    parser.add(
        "--mfu",
        "with --chip: assumed model FLOPs utilisation; `encdec compile` predicts it for a topology",
        float,
        0.4,
        above=0,
        most=1,
        needs="--chip",
        metavar="SHARE",
    )
    rate = "instead of --chip and --mfu: model FLOP/s of one machine"
    parser.add("--flops_per_second", rate, float, above=0, metavar="RATE")
    parser.add(
        "--topology",
        "compile every step for this TPU topology, e.g. v5e:16x16, as `encdec compile` does, and "
        "predict memory and chip-hours; takes minutes per distinct step",
        metavar="NAME",
    )
    kept = "keep the compiled steps' figures here, and read them again"
    parser.add("--compiled", kept, local_path, needs="--topology", metavar="FILE")
    only = "plan only this run (may be repeated)"
    parser.add("--only", only, default=[], metavar="NAME")
    parser.add("--json", "print JSON instead of a table", default=False)


def _add_run(actions: Any) -> None:
    parser = _action(actions, "run", _run, "train all unfinished runs and record them")
    _ladder_options(parser)
    parser.add("--workdir", "the ladder's directory", any_path, required=True)
    parser.add(
        "--alone",
        "no other process works on this ladder: for a --workdir in a bucket, which has no "
        "locks, unless --only or --index names the runs",
        default=False,
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="NAME",
        help="do only this run (may be repeated)",
    )
    which.add_argument(
        "--index",
        type=bounded("--index", int, least=0),
        metavar="I",
        help="do only the plan's run number I, as a task of an array job",
    )
    which.add_argument(
        "--collect",
        action="store_true",
        help="train nothing; record the results in the runs' directories",
    )
    which.add_argument(
        "--dry_run",
        action="store_true",
        help="train nothing; print one command for each unfinished run",
    )


def _add_evaluate(actions: Any) -> None:
    parser = _action(
        actions,
        "evaluate",
        _evaluate,
        "generate answers with every finished run and compute a task's metrics",
    )
    _ladder_options(parser)
    parser.add("--workdir", "the ladder's directory", any_path, required=True)
    parser.add("--alone", "no other process evaluates this ladder, as for run", default=False)
    task = "a task with metrics, see `encdec data list`"
    parser.add("--task", task, required=True, metavar="TASK")
    add_module_flag(parser)
    parser.add("--data_dir", "directory with the task's files", any_path)
    parser.add("--split", "split of the task", default="validation")
    parser.add(
        "--metrics",
        "metrics instead of the task's own, such as rougeL; see `encdec evaluate --help`",
        default="",
        metavar="A,B",
    )
    parser.add("--max_examples", "use the first N examples (default: all)", int, least=1)


def _add_fit(actions: Any) -> None:
    parser = _action(actions, "fit", _fit, "fit laws and compare the architectures")
    _fit_options(parser)
    parser.add("--out", "also write all numbers to this file", any_path, metavar="FILE")


def _add_plot(actions: Any) -> None:
    parser = _action(actions, "plot", _plot, "draw the curves and write the report")
    _fit_options(parser)
    out = "for the figures and report.html (default: `curves` next to the results)"
    parser.add("--out", out, any_path)


def _action(actions: Any, name: str, function: Any, text: str) -> Parser:
    parser = actions.add_parser(name, help=text, description=text.capitalize() + ".")
    parser.set_defaults(function=function)
    return parser


def _ladder_options(parser: Parser) -> None:
    parser.add(
        "--ladder",
        "config file and its argument, e.g. configs/scaling.py:micro; any field by "
        "--ladder.FIELD=VALUE",
        local_path,
        required=True,
        metavar="FILE.py[:NAME]",
    )


def _fit_options(parser: Parser) -> None:
    from encdec.scaling.results_file import LOSSES, PARAMETERS, TOKENS, Choices

    results = "a ladder's directory, or a results file"
    parser.add("--results", results, any_path, required=True, metavar="PATH")
    parser.add("--tokens", "tokens counted as D", default=Choices.tokens, choices=TOKENS)
    counted = "parameters counted as N"
    parser.add("--parameters", counted, default=Choices.parameters, choices=PARAMETERS)
    parser.add("--loss", "unit of L", default=Choices.loss, choices=sorted(LOSSES))
    sampled = "bootstrap samples for intervals; 0: none"
    parser.add("--resamples", sampled, int, Choices.draws, least=0)
    skip = "leave this run out, e.g. one that diverged (may be repeated)"
    parser.add("--skip", skip, default=[], metavar="RUN")


def load_ladder(source: str, overrides: Sequence[str]) -> ml_collections.ConfigDict:
    """The ConfigDict of ``FILE.py[:NAME]`` with overrides applied.

    Raises:
        ConfigError: no such file, ladder or field, or a value that is not of the field's type.
    """
    from encdec.scaling.ladder import complete

    unknown = functools.partial(unknown_field, what="the ladder")
    return with_overrides(complete(read_config_file(source)), overrides, unknown, "ladder")


def _planned(options: argparse.Namespace, overrides: Sequence[str]) -> Any:
    from encdec.data.records import read_card
    from encdec.scaling.ladder import parse_ladder
    from encdec.scaling.planned_runs import plan

    ladder = parse_ladder(load_ladder(options.ladder, overrides))
    return plan(ladder, read_card(ladder.records) if ladder.records else None)


def _console() -> Console:
    # If the width is unknown, as in a pipe, a wide table is better than a wrapped one.
    return Console(width=None if sys.stdout.isatty() else 180)


def _plan(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from encdec.cost.chips import chip_named
    from encdec.scaling.compiled import step_figures
    from encdec.scaling.plan_table import as_json, show

    if options.chip and options.flops_per_second:
        raise ConfigError("--chip and --flops_per_second cannot be combined; give one")
    if options.topology and (options.chip or options.flops_per_second):
        raise ConfigError(
            "--topology predicts the rate that --chip and --flops_per_second assume; give one"
        )
    rate, machine = options.flops_per_second, "machine"
    if options.chip:
        chip = chip_named(options.chip)
        rate, machine = options.mfu * chip.bf16_flops * chip.devices, chip.name
    plan = _planned(options, overrides)
    if options.only:
        plan = dataclasses.replace(plan, runs=tuple(plan.named(name) for name in options.only))
    figures = None
    if options.topology:
        figures = step_figures(
            plan.ladder, plan.runs, options.topology, options.compiled, say=_LOG.info
        )
    if options.json:
        print(json.dumps(as_json(plan, rate, figures), indent=2))
    else:
        show(plan, rate, machine, _console(), figures)
    return 0


def _run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from encdec.scaling.run import Workdir, check_division, index_of, run_plan

    plan = _planned(options, overrides)
    place = Workdir(options.workdir)
    if options.collect or options.dry_run:
        done = place.gather(plan, record=options.collect)
        if options.collect:
            print(
                f"{len(done)} of {len(plan.runs)} runs are done; recorded in {place.results.path}"
            )
            return 0
        base = [
            "encdec",
            "scaling",
            "run",
            f"--ladder={options.ladder}",
            *overrides,
            f"--workdir={options.workdir}",
        ]
        for run in plan.runs:
            if run.name not in done:
                print(shlex.join([*base, f"--only={run.name}"]))
        return 0
    check_division(options.workdir, options.index is not None or bool(options.only), options.alone)
    only = options.only if options.index is None else [index_of(plan, options.index).name]
    outcome = run_plan(plan, options.workdir, only=only)
    if outcome.busy:
        _LOG.info(
            f"{len(outcome.busy)} runs are held by other processes: {', '.join(outcome.busy)}"
        )
    if outcome.failed:
        raise RunsFailed(
            f"{len(outcome.failed)} runs failed: {', '.join(outcome.failed)}; all others are "
            "recorded; repeat the command to try again"
        )
    print(f"recorded in {place.results.path}")
    return 0


def _evaluate(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    import_modules(options.module)
    from encdec.evaluation.examples import of_task
    from encdec.scaling.evaluate_plan import evaluate_plan
    from encdec.scaling.run import check_division

    check_division(options.workdir, False, options.alone)
    plan = _planned(options, overrides)
    metrics = listed(options.metrics, "--metrics")
    task = of_task(options.task, options.data_dir, options.split, metrics, options.max_examples)
    evaluate_plan(plan, options.workdir, task)
    return 0


class RunsFailed(EncdecError):
    """Some runs of a ladder could not be finished."""

    exit_code = 6


def _analysed(options: argparse.Namespace) -> Any:
    from encdec.files import lines_exist
    from encdec.scaling.analysis import analyse
    from encdec.scaling.results_file import RESULTS_FILE, Choices, ResultsFile

    path = as_path(options.results)
    path = path / RESULTS_FILE if lines_exist(path / RESULTS_FILE) else path
    if not lines_exist(path) or path.is_dir():
        raise DataError(
            f"{path} does not exist; expected a directory of `encdec scaling run "
            "--workdir=`, or its results file"
        )
    rows = ResultsFile(path).read()
    unknown = sorted(set(options.skip) - {row["run"] for row in rows})
    if unknown:
        raise DataError(f"--skip={unknown[0]}: {path} has no such run")
    rows = [row for row in rows if row["run"] not in options.skip]
    choices = Choices(options.tokens, options.parameters, options.loss, options.resamples)
    return path, analyse(rows, choices)


def _fit(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from encdec.files import write_json
    from encdec.scaling.scaling_report import as_json, show

    _, analysis = _analysed(options)
    if options.out:
        write_json(options.out, as_json(analysis))
    show(analysis, _console())
    return 0


def _plot(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from encdec.scaling.plots import draw_all
    from encdec.scaling.scaling_report import write_html

    path, analysis = _analysed(options)
    out = as_path(options.out) if options.out else path.parent / "curves"
    with filled_directory(out) as folder:
        figures = draw_all(analysis, folder)
        report = write_html(analysis, figures, folder / "report.html")
    for name in (*(figure.path.name for figure in figures), report.name):
        print(out / name)
    return 0
