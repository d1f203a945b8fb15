"""The parser of every command: its flags in one form, ``--quiet``, ``--verbose``, former names."""

from __future__ import annotations

import argparse
import math
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
    ("--examples", "--max_examples", "scaling evaluate"),
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
        may_be_empty: flags to which "" says something.
        options: of ``argparse.ArgumentParser``; flags are not abbreviated.
    """

    def __init__(self, may_be_empty: Sequence[str] = (), **options: Any):
        options.setdefault("allow_abbrev", False)
        super().__init__(**options)
        self._may_be_empty = may_be_empty
        self._needs: list[tuple[argparse.Action, str]] = []
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
        least: float | None = None,
        *,
        above: float | None = None,
        most: float | None = None,
        needs: str = "",
        **options: Any,
    ) -> argparse.Action:
        """``add_argument`` of one flag, or of one argument without dashes.

        Args:
            name: with its dashes.
            about: the help; states the default at its end, unless it says something of it.
            type: of the value; paths and numbers have a metavar unless ``options`` give one.
            default: of the value; False makes a switch, [] a flag that may be repeated.
            least: the smallest number that may be given; ConfigError for a smaller one.
            above: what a number must be larger than.
            most: the largest number that may be given.
            needs: the flag without which this one has no effect, or that flag's value or values
                ("--format=hf", "--what=train|decode"); ConfigError where this one alone is given.
            options: what else ``add_argument`` takes.
        """
        if default is False:
            options["action"] = "store_true"
            return self._needing(self.add_argument(name, help=about, **options), needs)
        if type in _METAVARS and "choices" not in options:
            options.setdefault("metavar", _METAVARS[type])
        if default not in (None, "", (), []) and "default" not in about:
            several = isinstance(default, tuple)
            shown = ",".join(map(str, default)) if several else "%(default)s"
            about = f"{about} (default {shown})"
        if default == []:
            options["action"] = "append"
        if (least, above, most) != (None, None, None):
            type = bounded(name, type, least=least, above=above, most=most)
        given = {"type": type, "default": default}
        options |= {key: value for key, value in given.items() if value is not None}
        return self._needing(self.add_argument(name, help=about, **options), needs)

    def _needing(self, action: argparse.Action, needs: str) -> argparse.Action:
        if needs:
            self._needs.append((action, needs))
        return action

    def parse_known_args(  # type: ignore[override]  # argparse's stubs overload it
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """argparse's, which also parses each action's part of a command line by it."""
        given = self._today(sys.argv[1:] if args is None else args)
        found, rest = super().parse_known_args(given, namespace)
        self._refuse_empty(_before_dashes(given))
        self._refuse_unused(_before_dashes(given), found)
        return found, rest

    def _refuse_empty(self, args: Sequence[str]) -> None:
        """ConfigError for a flag with an empty value, which most would take for none at all."""
        for place, argument in enumerate(args):
            name, equals, value = argument.partition("=")
            action = self._option_string_actions.get(name)
            if action is None or action.nargs is not None or name in self._may_be_empty:
                continue
            if not (value if equals else "".join(args[place + 1 : place + 2])):
                raise ConfigError(
                    f"{name} is empty; give a value, or leave it out. Is a variable of the shell "
                    "unset?"
                )

    def _refuse_unused(self, args: Sequence[str], found: argparse.Namespace) -> None:
        """ConfigError for a flag that needs another which is not given."""
        given = {argument.partition("=")[0] for argument in args}
        for action, needs in self._needs:
            if not given & set(action.option_strings):
                continue
            flag, equals, wanted = needs.partition("=")
            needed = self._option_string_actions[flag]
            value = getattr(found, needed.dest, needed.default)
            if str(value) not in wanted.split("|") if equals else value in (None, "", [], False):
                name, chosen = action.option_strings[-1], getattr(found, action.dest)
                shown = name if action.nargs == 0 else f"{name}={chosen}"
                state = f", and {flag} is {value}" if equals else ""
                raise ConfigError(
                    f"{shown} has no effect without {needs}{state}; give both, or leave {name} out"
                )

    def _today(self, args: Sequence[str]) -> list[str]:
        """The arguments with former names of flags replaced."""
        found = list(args)
        for place, argument in enumerate(_before_dashes(found)):
            name, equals, value = argument.partition("=")
            if name in self.former:
                _LOG.info("%s: %s is now called %s", self.prog, name, self.former[name])
                found[place] = self.former[name] + equals + value
        return found


def _before_dashes(args: Sequence[str]) -> Sequence[str]:
    """The arguments before ``--``, after which nothing is a flag."""
    return args[: args.index("--")] if "--" in args else args


def bounded(
    name: str,
    number: Callable[[str], float],
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
) -> Callable[[str], float]:
    """The type of a flag whose numbers have bounds; infinity and NaN are none."""
    low = f"{least} or more" if above is None else f"more than {above}"
    if least is None and above is None:
        expected = f"{most} or less"
    elif most is None:
        expected = low
    else:
        expected = f"{least} to {most}" if above is None else f"{low}, up to {most}"

    def checked(text: str) -> float:
        value = number(text)
        fits = (
            math.isfinite(value)
            and (least is None or value >= least)
            and (above is None or value > above)
            and (most is None or value <= most)
        )
        if not fits:
            raise ConfigError(f"{name} is {text}; expected {expected}")
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
    coordinator = "address of process 0"
    parser.add("--coordinator", coordinator, needs="--distributed", metavar="HOST:PORT")
    parser.add("--num_processes", "processes in all", int, least=1, needs="--distributed")
    process = "this process, from 0"
    parser.add("--process_id", process, int, least=0, needs="--distributed", metavar="I")


def join_processes(options: argparse.Namespace) -> None:
    """Makes this process one of several, if the command line says so."""
    if not options.distributed:
        return
    import jax

    jax.distributed.initialize(options.coordinator, options.num_processes, options.process_id)
