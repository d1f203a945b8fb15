"""``encdec paper``: pretrain, fine-tune, distil, evaluate, and write the paper's table."""

from __future__ import annotations

import argparse
import fractions
import functools
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import ml_collections

from encdec.buckets import is_address
from encdec.config_files import read_config_file, split_overrides, with_overrides
from encdec.errors import ConfigError, DataError
from encdec.fields import unknown_field
from encdec.flags import Parser
from encdec.hub import data_path
from encdec.logs import logger
from encdec.modules import add_module_flag, import_modules
from encdec.storage import any_path, as_path, local_path

_LOG = logger(__name__)

if TYPE_CHECKING:
    from etils import epath

    from encdec.paper.corpora import Corpora
    from encdec.paper.setting import Setting


def main(argv: list[str]) -> int:
    """``encdec paper --config=FILE:SIZE --data_dir=DIR --workdir=DIR``, ``search``, ``costs`` or
    ``table``.

    Raises:
        ConfigError: invalid settings, or a work directory with other settings.
        DataError: text or examples are missing.
    """
    parts = {"table": _table, "costs": _costs, "search": _search}
    if argv and argv[0] in parts:
        return parts[argv[0]](argv[1:])
    options, setting = _read(_parser(), argv)
    # Imported late, so that mistakes in the command line are reported at once.
    from encdec.paper.setting import table_rows

    columns = _chosen("columns", options.columns, [column.name for column in setting.columns])
    rows = _chosen("rows", options.rows, list(table_rows(setting)))
    work, corpora, results = _at_work(options, setting)
    from encdec.paper.runs import Experiment

    experiment = Experiment(setting, work, corpora, results, columns, rows, _say)
    print(experiment.run())
    return 0


def _at_work(
    options: argparse.Namespace, setting: Setting
) -> tuple[pathlib.Path, Corpora, pathlib.Path | epath.Path]:
    """The work directory, claimed for the setting, its corpora, made, and the results' file."""
    from encdec.files import sole_process
    from encdec.jobs import claim_settings
    from encdec.paper.corpora import Corpora

    work = _on_a_disk(options.workdir)
    work.mkdir(parents=True, exist_ok=True)
    from encdec.paper.result_rows import check_data

    path = work / "setting.json"
    claim_settings(
        path, setting.identity(), holder=work, remedy=f"give another --workdir, or those of {path}"
    )
    corpora = Corpora(setting, work, options.data_dir, options.text)
    with sole_process(work / "locks" / "corpora", wait=True):
        corpora.make(_say)
    results = as_path(options.results or work / "results.jsonl")
    settings = {setting.digest(with_teacher) for with_teacher in (False, True)}
    for data, count in check_data(results, settings, corpora.data).items():
        _say(
            f"{results} has {count} lines of these settings on other data ({data}; here it is "
            f"{corpora.data}), which count as other runs"
        )
    return work, corpora, results


def _on_a_disk(workdir: str) -> pathlib.Path:
    """Raises ConfigError for an address, where processes could not divide the runs."""
    if not is_address(workdir):
        return pathlib.Path(workdir)
    copy = "aws s3 sync" if workdir.startswith("s3:") else "gcloud storage rsync -r"
    raise ConfigError(
        f"--workdir is {workdir}; expected a directory on a disk: processes divide the runs by "
        "locked files, and neither a bucket nor its mount has locks that end with their process. "
        f"Give one on this machine, with --results={workdir}/results.jsonl, from which any other "
        f"machine continues, and copy what else is to be kept ({copy} DIR {workdir})"
    )


def _say(text: str) -> None:
    _LOG.info(f"paper: {text}")


def _read(parser: argparse.ArgumentParser, argv: list[str]) -> tuple[argparse.Namespace, Setting]:
    """The flags, and the experiment that --config and its overrides set."""
    overrides, rest = split_overrides(argv)
    options = parser.parse_args(rest)
    import_modules(getattr(options, "module", ()))
    config = load_config(options.config, overrides)
    from encdec.paper.setting import parse_setting

    return options, parse_setting(config.to_dict())


def _table(argv: list[str]) -> int:
    """``encdec paper table FILE …``: the comparison's tables from result rows alone."""
    parser = Parser(
        prog="encdec paper table",
        description="Prints the comparison's tables, with paired differences, from result rows.",
    )
    parser.add("results", "JSON lines of results", any_path, metavar="FILE", nargs="+")
    paths = [as_path(path) for path in parser.parse_args(argv).results]
    from encdec.files import lines_exist
    from encdec.paper.comparison import comparison_markdown
    from encdec.paper.result_rows import read_results

    for path in paths:
        if not lines_exist(path):
            raise DataError(f"{path} is not a file; give the --results of `encdec paper`")
    print(comparison_markdown([row for path in paths for row in read_results(path)]))
    return 0


def _costs(argv: list[str]) -> int:
    """``encdec paper costs --config=FILE:SIZE --results=FILE``: times every model."""
    parser = Parser(
        prog="encdec paper costs",
        description="Times the training step and generation of every model of the comparison, in "
        "a few minutes, and adds them to the result rows. Run it on a quiet machine.",
    )
    _add_config(parser)
    parser.add("--results", "result rows; these are added", any_path, required=True, metavar="FILE")
    remark = "remark on the machine and what else ran on it, for the table"
    parser.add("--remark", remark, default="", metavar="TEXT")
    options, setting = _read(parser, argv)
    from encdec.paper.costs import cost_rows
    from encdec.paper.result_rows import append_results

    for column in setting.columns:
        rows = cost_rows(setting, column, options.remark, _say)
        append_results(as_path(options.results), rows)
    return 0


def _search(argv: list[str]) -> int:
    """``encdec paper search``: short runs with each learning rate and dropout of a grid."""
    options, setting = _read(_search_parser(), argv)
    from encdec.paper.rate_search import Grid, Search
    from encdec.paper.search_tables import search_markdown
    from encdec.paper.setting import DEC, TEACHER, row_name, table_rows

    usual = [row_name(setting.splits[0]), DEC]
    rate = setting.optimizer.learning_rate
    grid = Grid(
        tuple(_chosen("rows", options.rows, [*table_rows(setting), TEACHER]) or usual),
        options.learning_rates or (rate / 2, rate, 2 * rate),
        options.dropouts or (setting.dropout,),
        options.fraction,
        options.seeds,
    )
    columns = _chosen("columns", options.columns, [column.name for column in setting.columns])
    tried = [column for column in setting.columns if not columns or column.name in columns]
    Search.check(setting)
    work, corpora, results = _at_work(options, setting)
    print(search_markdown(Search(setting, work, corpora, results, _say).run(grid, tried)))
    return 0


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}; expected numbers such as 1e-2,2e-2") from None


def _share(text: str) -> fractions.Fraction:
    try:
        return fractions.Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"{text!r}; expected a share such as 1/6") from None


def _search_parser() -> Parser:
    parser = Parser(
        prog="encdec paper search",
        description="Tries learning rates and dropouts in short runs, each with its whole "
        "schedule, on the comparison's records, the same for each model; the best evaluation in "
        "held-out bits per byte counts. Repeat the command to resume.",
        epilog="Example: encdec paper search --config=configs/paper.py:codexglue --data_dir=data "
        "--workdir=runs/codexglue --learning_rates=5e-3,1e-2,2e-2 --dropouts=0,0.1",
    )
    _add_places(parser)
    rows = "models, such as 'DEC,teacher' (default: the first split's ED and DEC)"
    parser.add("--rows", rows, metavar="A,B")
    rates = "peaks to try (default: half, once and twice config.optimizer.learning_rate)"
    parser.add("--learning_rates", rates, _numbers, metavar="A,B")
    parser.add("--dropouts", "to try (default: config.dropout)", _numbers, metavar="A,B")
    share = "share of a column's steps that a trial has"
    parser.add("--fraction", share, _share, fractions.Fraction(1, 6), metavar="1/N")
    parser.add("--seeds", "of each combination", int, 1, least=1)
    return parser


def _chosen(flag: str, given: str | None, names: Sequence[str]) -> list[str]:
    chosen = given.split(",") if given else []
    if unknown := sorted(set(chosen) - set(names)):
        raise ConfigError(f"--{flag} names {unknown[0]!r}; known: {', '.join(names)}")
    return chosen


def load_config(source: str, overrides: Sequence[str] = ()) -> ml_collections.ConfigDict:
    """The ConfigDict of ``FILE.py[:SIZE]`` with overrides applied.

    Raises:
        ConfigError: no such file, size or field, or a value that is not of the field's type.
    """
    unknown = functools.partial(unknown_field, what="the experiment")
    return with_overrides(read_config_file(source), overrides, unknown)


def _parser() -> Parser:
    parser = Parser(
        prog="encdec paper",
        description="Rebuilds the paper's comparison: pretrains DEC and ED at three splits at "
        "equal FLOPs, fine-tunes them on tasks, distils, evaluates. Repeat the command to "
        "resume. `encdec paper search --help`: learning rate and dropout; `encdec paper costs "
        "--help`: what each model costs; `encdec paper table --help`: tables from result rows.",
        epilog="Any field of the config is set by --config.FIELD=VALUE. Example: encdec paper "
        "--config=configs/paper.py:laptop --data_dir=data --text=data/books.jsonl "
        "--workdir=runs/paper",
    )
    _add_places(parser)
    parser.add(
        "--rows",
        "only these students, such as 'DEC,ED 2/3-1/3'; processes with one --workdir divide the "
        "runs",
        metavar="A,B",
    )
    return parser


def _add_config(parser: Parser) -> None:
    config = "configs/paper.py:codexglue, :dialogsum, :refinement, :laptop or :gpu, or your own"
    parser.add("--config", config, local_path, required=True, metavar="FILE.py[:SIZE]")


def _add_places(parser: Parser) -> None:
    """What is run, on what, and where."""
    _add_config(parser)
    files = "directory with the tasks' files, see `encdec data list`"
    parser.add("--data_dir", files, any_path, required=True)
    text = "text to pretrain on; may be repeated"
    parser.add("--text", text, data_path, default=[], metavar="FILE")
    work = "receives everything; a directory on a disk"
    parser.add("--workdir", work, any_path, required=True)
    parser.add(
        "--results",
        "receives a JSON line of every run, also in a bucket; runs that it has are not done again "
        "(default: results.jsonl in --workdir)",
        any_path,
        metavar="FILE",
    )
    add_module_flag(parser)
    parser.add("--columns", "only these columns (default: all)", metavar="A,B")
