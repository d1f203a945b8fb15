"""``encdec train``: reads a config file with overrides, and trains."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

from encdec.config_files import add_config_flag, split_overrides
from encdec.errors import ConfigError, EncdecError, Preempted
from encdec.flags import Parser, add_process_options, join_processes
from encdec.logs import show_error
from encdec.modules import add_module_flag, import_modules, named_function
from encdec.storage import any_path, refusals_explained
from encdec.train.run_config import load_config, parse_config


def main(argv: list[str]) -> int:
    """``encdec train --config=FILE.py[:ARGUMENT] --workdir=DIR [--config.FIELD=VALUE ...]``."""
    overrides, rest = split_overrides(argv)
    options = _parser().parse_args(rest)
    import_modules(options.module)
    config = load_config(options.config, overrides)
    parse_config(config)
    hooks = [_hook(target) for target in options.hook]
    on_report: Any = named_function("--on_report", options.on_report) if options.on_report else None
    join_processes(options)
    # Imported late, so that mistakes in the command line are reported at once.
    import jax

    from encdec.train.checkpoints import kept_state
    from encdec.train.loop import Hook, train

    try:
        with refusals_explained(lambda: kept_state(options.workdir)):
            summary = train(
                config,
                options.workdir,
                stop_at=options.stop_at,
                on_report=on_report,
                hooks=[Hook(call, every) for call, every in hooks],
            )
    except Preempted:
        raise  # all processes leave together, so each can wait for the others
    except Exception as error:
        if jax.distributed.is_initialized():
            leave_at_once(error)
        raise
    if not jax.process_index():
        print(
            f"{summary.step:,} steps done in {summary.seconds:,.1f} s; checkpoint, metrics.jsonl "
            f"and TensorBoard events are in {summary.workdir}"
        )
    return 0


def leave_at_once(error: Exception) -> None:
    """Ends this process without the final barrier, which the others may never reach.

    An error may be one process's own, such as a shard that only it reads. The others then wait
    for it in a step, and it for them at its end, for minutes. An error that is not the
    user's mistake is a bug: it keeps its traceback and gives 1.
    """
    code = 1
    if isinstance(error, EncdecError):
        code = show_error(error)
    else:
        traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _parser() -> Parser:
    parser = Parser(
        prog="encdec train",
        description="Trains a model on records, or resumes the run of the work directory.",
        epilog="Any field of the config is set by --config.FIELD=VALUE, for example "
        "--config.batch_size=64 --config.optimizer.name=muon; `encdec config --config=FILE.py` "
        "prints all of them with their meanings and values.",
    )
    add_config_flag(parser)
    parser.add(
        "--workdir",
        "receives checkpoints, metrics and all that inference needs",
        any_path,
        required=True,
    )
    parser.add(
        "--stop_at",
        "stop and save at this step; the same command continues later",
        int,
        least=1,
        metavar="STEP",
    )
    add_module_flag(parser)
    parser.add(
        "--on_report",
        "call a function of yours with (step, numbers) at every line of metrics",
        metavar="MODULE:FUNCTION",
    )
    parser.add(
        "--hook",
        "call a function of yours with the session every so many steps and after the last "
        "(docs/design.md, Hooks); may be repeated",
        default=[],
        metavar="MODULE:FUNCTION[:EVERY]",
    )
    add_process_options(parser)
    return parser


def _hook(target: str) -> tuple[Callable[..., object], int]:
    """(function, steps between two calls) of ``MODULE:FUNCTION[:EVERY]``."""
    name, _, every = target.rpartition(":")
    if ":" not in name:
        name, every = target, "0"
    if not every.isdecimal():
        raise ConfigError(f"--hook={target}; expected MODULE:FUNCTION:EVERY, EVERY in steps")
    return named_function("--hook", name), int(every)
