"""The parser of every command: ``--quiet``, ``--verbose``, and flags' former names."""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import encdec
from encdec import logs

_LOG = logs.logger(__name__)


class Parser(argparse.ArgumentParser):
    """argparse's parser with what all commands have in common.

    Args:
        former: for each name that a flag had once, its name of today, ``{"--work": "--workdir"}``,
            or with a value what it meant, ``{"--truncate": "--too_long=cut"}``. Former names are
            accepted and in no help.
        options: of ``argparse.ArgumentParser``; flags are not abbreviated.
    """

    def __init__(self, *, former: Mapping[str, str] | None = None, **options: Any):
        options.setdefault("allow_abbrev", False)
        super().__init__(**options)
        self.former = dict(former or {})
        group = self.add_mutually_exclusive_group()
        for flag, level, text in (
            ("--quiet", logs.QUIET, "print errors, warnings and the result alone"),
            ("--verbose", logs.VERBOSE, "also say what is done in between, and where errors began"),
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
                _LOG.info("%s: %s is written %s now", self.prog, name, self.former[name])
                found[place] = self.former[name] + equals + value
        return found


class _SetLevel(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        logs.set_level(self.const)
        system = f"Python {platform.python_version()}, {platform.platform()}"
        _LOG.debug("encdec %s, %s, arguments %s", encdec.__version__, system, sys.argv[1:])
