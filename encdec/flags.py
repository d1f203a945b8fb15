"""The parser of every command: its flags in one form, ``--quiet``, ``--verbose``, former names."""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Callable, Sequence
from typing import Any

import encdec
from encdec import logs
from encdec.errors import ConfigError
from encdec.storage import any_path, local_path

_LOG = logs.logger(__name__)

_METAVARS: dict[Any, str] = {any_path: "DIR", local_path: "DIR", int: "N", float: "X"}

# Names that flags had once: the former, today's (with a value what the former meant), and the
# commands. They are accepted and in no help.
FORMER = (
    (
        *("--inputs", "--inputs_length", "describe", "compile", "benchmark adaptation"),
        *("benchmark edge", "benchmark inference", "benchmark speculate"),
        *("benchmark accelerator", "benchmark train"),
    ),
    (
        *("--targets", "--targets_length", "describe", "compile", "benchmark adaptation"),
        *("benchmark accelerator", "benchmark train"),
    ),
    ("--writer", "--checkpoint", "distill rollout"),
    ("--json", "--out", "compile", "scaling fit"),
    ("--from", "--format", "import"),
    ("--truncate", "--too_long=cut", "generate"),
    ("--limit", "--max_examples", "evaluate", "benchmark speculate"),
    ("--work", "--workdir", "paper", "benchmark distill", "benchmark adaptation"),
    ("--print_jobs", "--dry_run", "scaling run"),
    ("--examples", "--max_examples", "scaling score"),
    ("--draws", "--resamples", "scaling fit", "scaling plot"),
    (
        *("--rounds", "--repeats", "benchmark prepare", "benchmark serving"),
        *("benchmark accelerator", "benchmark train", "benchmark loop"),
    ),
    ("--batch", "--batch_size", "benchmark data"),
    ("--images", "--out", "benchmark distill"),
    ("--vocabulary", "--vocabulary_size", "benchmark adaptation"),
    ("--documents", "--max_examples", "benchmark adaptation"),
    ("--rows", "--batches", "benchmark speculate"),
    ("--rows", "--batch_size", "benchmark accelerator", "benchmark train"),
)


class Parser(argparse.ArgumentParser):
    """argparse's parser with what all commands have in common.

    Args:
        options: of ``argparse.ArgumentParser``; flags are not abbreviated.
    """

    def __init__(self, **options: Any):
        options.setdefault("allow_abbrev", False)
        super().__init__(**options)
        self.former = {
            former: today
            for former, today, *commands in FORMER
            if self.prog.removeprefix("encdec ") in commands
        }
        group = self.add_mutually_exclusive_group()
        for flag, level, text in (
            ("--quiet", logs.QUIET, "print only errors, warnings and results"),
            ("--verbose", logs.VERBOSE, "also print details, and the traceback of an error"),
        ):
            group.add_argument(
                flag,
                action=_SetLevel,
                const=level,
                nargs=0,
                dest=argparse.SUPPRESS,
                default=argparse.SUPPRESS,
                help=text,
            )

    def add(
        self,
        name: str,
        about: str,
        type: Any = None,
        default: Any = None,
        least: int | None = None,
        **options: Any,
    ) -> argparse.Action:
        """``add_argument`` of one flag, or of one argument without dashes.

        Args:
            name: with its dashes.
            about: the help; states the default at its end, unless it says something of it.
            type: of the value; paths and numbers have a metavar unless ``options`` give one.
            default: of the value; False makes a switch, [] a flag that may be repeated.
            least: the smallest number that may be given; ConfigError for a smaller one.
            options: what else ``add_argument`` takes.
        """
        if default is False:
            options["action"] = "store_true"
            return self.add_argument(name, help=about, **options)
        if type in _METAVARS and "choices" not in options:
            options.setdefault("metavar", _METAVARS[type])
        if default not in (None, "", (), []) and "default" not in about:
            several = isinstance(default, tuple)
            shown = ",".join(map(str, default)) if several else "%(default)s"
            about = f"{about} (default {shown})"
        if default == []:
            options["action"] = "append"
        if least is not None:
            type = _at_least(least, name, type)
        given = {"type": type, "default": default}
        options |= {key: value for key, value in given.items() if value is not None}
        return self.add_argument(name, help=about, **options)

    def parse_known_args(  # type: ignore[override]  # argparse's stubs overload it
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """argparse's, which also parses each action's part of a command line by it."""
        given = None if args is None else self._today(args)
        return super().parse_known_args(given, namespace)

    def _today(self, args: Sequence[str]) -> list[str]:
        """The arguments with former names of flags replaced."""
        found = list(args)
        end = found.index("--") if "--" in found else len(found)
        for place, argument in enumerate(found[:end]):
            name, equals, value = argument.partition("=")
            if name in self.former:
                _LOG.info("%s: %s is now called %s", self.prog, name, self.former[name])
                found[place] = self.former[name] + equals + value
        return found


def _at_least(least: int, name: str, number: Callable[[str], float]) -> Callable[[str], float]:
    def checked(text: str) -> float:
        value = number(text)
        if not value >= least:
            raise ConfigError(f"{name} is {text}; expected {least} or more")
        return value

    checked.__name__ = number.__name__  # argparse names it where the text is not a number
    return checked


class _SetLevel(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        logs.set_level(self.const)
        system = f"Python {platform.python_version()}, {platform.platform()}"
        _LOG.debug("encdec %s, %s, arguments %s", encdec.__version__, system, sys.argv[1:])


def add_process_options(parser: Parser) -> None:
    """The options of ``join_processes``."""
    parser.add(
        "--distributed",
        "one of several processes; on TPU pods, Slurm and GKE they find each "
        "other, elsewhere the next three options say how",
        default=False,
    )
    parser.add("--coordinator", "address of process 0", metavar="HOST:PORT")
    parser.add("--num_processes", "processes in all", int)
    parser.add("--process_id", "this process, from 0", int, metavar="I")


def join_processes(options: argparse.Namespace) -> None:
    """Makes this process one of several, if the command line says so."""
    if not options.distributed:
        return
    import jax

    jax.distributed.initialize(options.coordinator, options.num_processes, options.process_id)
