"""The parsers of all commands and of their actions, without running any."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterator

from encdec import cli
from encdec.flags import Parser

# Actions that a command looks for itself; those of argparse's subparsers are found there.
ACTIONS = {
    "evaluate": ("table", "compare"),
    "paper": ("table", "costs", "search"),
    "compile": ("table",),
}


class _Parsed(BaseException):
    pass


@functools.cache
def all_parsers() -> dict[str, Parser]:
    """By the words that call them, ``encdec data list``."""
    found: dict[str, Parser] = {}
    commands = {
        **{name: target for name, (target, _) in cli.COMMANDS.items() if name != "benchmark"},
        **{f"benchmark {name}": target for name, (target, _) in cli.BENCHMARKS.items()},
    }
    for name, target in commands.items():
        for action in ("", *ACTIONS.get(name, ())):
            words = f"encdec {name} {action}".strip()
            found |= dict(_with_actions(words, _parser_of(target, [action] if action else [])))
    return found


def _parser_of(target: str, words: list[str]) -> Parser:
    """The parser that a command makes before it does anything else."""
    seen: list[Parser] = []

    def stop(parser, args=None, namespace=None):
        seen.append(parser)
        raise _Parsed

    usual, Parser.parse_known_args = Parser.parse_known_args, stop  # type: ignore[method-assign]
    try:
        cli.load(target)([*words, "--help"])
    except _Parsed:
        pass
    finally:
        Parser.parse_known_args = usual  # type: ignore[method-assign]
    (parser,) = seen
    return parser


def _with_actions(words: str, parser: Parser) -> Iterator[tuple[str, Parser]]:
    nested = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    if not nested:
        yield words, parser
    for action in nested:
        for name, one in action.choices.items():
            yield from _with_actions(f"{words} {name}", one)
