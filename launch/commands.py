"""Command lines as data: shown in shell syntax, run without a shell."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from launch.slices import Slices

# Exit codes of `encdec` after which the same command would only fail again: configuration, data,
# checkpoint, NaN or infinity, storage errors. 75 means that the machine was preempted and
# everything is saved.
FINAL_CODES = {
    2: "configuration",
    3: "data",
    4: "checkpoint",
    5: "NaN or infinity",
    7: "storage: disk full, quota, permission or read-only",
}
PREEMPTED = 75
BROKEN_PIPE = 141  # as shells report a program that SIGPIPE ended


def run_main(main: Callable[[], int]) -> int:
    """Calls a launcher's ``main``; a reader that has seen enough ends it without a traceback."""
    try:
        code = main()
        sys.stdout.flush()  # a closed pipe shows itself here, not when Python exits
        return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE


class Runner:
    """Runs commands one by one, or only prints them.

    Attributes:
        dry_run: print only.
        environment: variables of the commands, next to this process's own.
    """

    def __init__(self, dry_run: bool = False, environment: Mapping[str, str] | None = None):
        self.dry_run = dry_run
        self.environment = dict(environment or {})

    def __call__(
        self, arguments: Sequence[str], *, stdin: str | None = None, quiet: bool = False
    ) -> subprocess.CompletedProcess[str]:
        """Runs one command to its end, whatever its exit code.

        Args:
            arguments: the program and its arguments, unquoted.
            stdin: text for its standard input; shown below the command.
            quiet: capture the output for the caller instead of showing it.
        """
        if self.dry_run:
            print(shlex.join(arguments))
            if stdin is not None:
                print(stdin, end="" if stdin.endswith("\n") else "\n")
            return subprocess.CompletedProcess(arguments, 0, "", "")
        if not quiet:
            print(f"+ {shlex.join(arguments)}", file=sys.stderr, flush=True)
        try:
            return subprocess.run(
                arguments,
                input=stdin,
                text=True,
                capture_output=quiet,
                check=False,
                stdin=None if stdin is not None else subprocess.DEVNULL,
                env=os.environ | self.environment,
            )
        except FileNotFoundError:
            raise SystemExit(f"{arguments[0]} is not installed or not on PATH") from None

    def all(self, commands: Sequence[Sequence[str]]) -> int:
        """Runs commands until one fails; its exit code, or 0."""
        for arguments in commands:
            if code := self(arguments).returncode:
                return code
        return 0


def split_arguments(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """A launcher's own arguments, and those after ``--``."""
    own = list(argv)
    if "--" not in own:
        return own, []
    place = own.index("--")
    return own[:place], own[place + 1 :]


def actions_parser(
    prog: str, description: str | None, actions: Mapping[str, str]
) -> argparse.ArgumentParser:
    """A parser whose first argument is an action, all of which its help explains."""
    width = max(map(len, actions)) + 1
    lines = ["actions:", *(f"  {name:{width}}{text}" for name, text in actions.items()), ""]
    parser = argparse.ArgumentParser(
        prog=prog,
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join([*lines, "After `--`: the arguments of `encdec train`."]),
    )
    parser.add_argument("action", choices=actions, metavar="ACTION", help="see below")
    return parser


def train_arguments(given: Sequence[str], *, alone: bool = False) -> list[str]:
    """``encdec train``'s arguments for one of several processes that connect to each other.

    ``alone``: for the only process of a run, which may train in s3://, too.

    Raises:
        SystemExit: an argument that launchers cannot pass on.
    """
    for argument in given:
        if "\n" in argument or "\0" in argument:
            raise SystemExit(
                f"argument {argument!r} spans several lines; put such a value into a config file"
            )
    places = [a.split("=", 1)[1] for a in given if a.startswith("--workdir=")]
    if not places or not places[-1].startswith(("/", "gs://", *["s3://"] * alone)):
        raise SystemExit(
            f"--workdir is {places[-1] if places else 'missing'}; expected "
            "--workdir=/DIR after `--`, a directory that every machine shares, such "
            "as one in a mounted bucket, or --workdir=gs://BUCKET/DIR"
            + " or --workdir=s3://BUCKET/DIR"
            * alone
        )
    return [*given, *["--distributed"] * (not alone)]


def slices_option(text: str) -> Slices:
    """``CHIP:AxB[xC][*N]`` on a command line."""
    try:
        return Slices.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def bucket_option(text: str) -> tuple[str, str]:
    """``BUCKET[=/DIR]`` on a command line: the bucket and where it is mounted."""
    bucket, _, directory = text.removeprefix("gs://").partition("=")
    bucket = bucket.rstrip("/")
    directory = directory or f"/mnt/{bucket}"
    # https://cloud.google.com/storage/docs/buckets#naming
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]", bucket):
        raise argparse.ArgumentTypeError(
            f"{bucket!r} is not a bucket's name; expected 3 or more lower-case letters, digits, "
            "dots, hyphens and underscores, with a letter or digit at both ends"
        )
    if not directory.startswith("/"):
        raise argparse.ArgumentTypeError(
            f"{text!r} mounts the bucket at {directory!r}; expected BUCKET or BUCKET=/DIR"
        )
    return bucket, directory


def repeated_option(
    parser: Any, name: str, text: str, kind: Callable[[str], Any], value: str
) -> None:
    """A flag that may be given several times; ``value`` stands for its value in the help."""
    parser.add_argument(name, action="append", default=[], type=kind, metavar=value, help=text)


def environment_option(parser: Any) -> None:
    text = "environment variable of the training (may be repeated)"
    repeated_option(parser, "--env", text, setting_option, "NAME=VALUE")


def tool_option(parser: Any, name: str, tool: str) -> None:
    """A flag that hands any other option to a tool."""
    text = f"any other option of {tool} (may be repeated)"
    repeated_option(parser, name, text, passed_option, "--OPTION=VALUE")


def parsed(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """``parse_args``, which also refuses empty texts and numbers below zero."""
    options = parser.parse_args(argv)
    for action in parser._actions:
        value, default = getattr(options, action.dest, None), action.default
        if value == "" and default != "":
            parser.error(f"{action.option_strings[0]} is empty; give a value, or leave it out")
        if action.type in (int, float) and value is not None and not value >= 0:
            parser.error(f"{action.option_strings[0]} is {value}; expected 0 or more")
    return options


def refuse_elsewhere(
    parser: argparse.ArgumentParser,
    options: argparse.Namespace,
    places: Mapping[Any, Sequence[str]],
) -> None:
    """Ends with an error for an option that the action does not use.

    ``places``: tuples of actions that use options, and these options' names.
    """
    for actions, names in places.items():
        for name in () if options.action in actions else names:
            if getattr(options, name) != parser.get_default(name):
                parser.error(f"--{name} is for {', '.join(actions)}, not for {options.action}")


def number_option(parser: Any, name: str, text: str, default: int, value: str = "N") -> None:
    """A flag with a whole number; the help ends in its default."""
    text += " (%(default)s)"
    parser.add_argument(name, type=int, default=default, metavar=value, help=text)


def dry_run_option(parser: argparse.ArgumentParser, text: str) -> None:
    """``--dry_run``, and hidden its former name."""
    parser.add_argument("--dry_run", action="store_true", help=text)
    former_option(parser, "--dry-run", dest="dry_run", action="store_true")


def former_option(parser: Any, name: str, **how: Any) -> None:
    """A flag's former name, which works and is in no help."""
    parser.add_argument(name, help=argparse.SUPPRESS, default=argparse.SUPPRESS, **how)


def setting_option(text: str) -> str:
    """``NAME=VALUE`` on a command line."""
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*=.*", text):
        raise argparse.ArgumentTypeError(f"{text!r}; expected NAME=VALUE")
    return text


def passed_option(text: str) -> str:
    """An option that is handed to a tool as it is: ``--OPTION`` or ``--OPTION=VALUE``."""
    if not re.fullmatch(r"--[A-Za-z][A-Za-z0-9-]*(=.*)?", text, re.DOTALL):
        raise argparse.ArgumentTypeError(f"{text!r}; expected --OPTION or --OPTION=VALUE")
    return text
