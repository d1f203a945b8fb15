"""Command lines as data: shown in shell syntax, run without a shell."""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence

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


class Runner:
    """Runs commands one by one, or only prints them."""

    def __init__(self, dry_run: bool = False):
        self.dry_run = dry_run

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
            )
        except FileNotFoundError:
            raise SystemExit(f"{arguments[0]} is not installed or not on PATH") from None

    def all(self, commands: Sequence[Sequence[str]]) -> int:
        """Runs commands until one fails; its exit code, or 0."""
        for arguments in commands:
            if code := self(arguments).returncode:
                return code
        return 0


def train_arguments(given: Sequence[str]) -> list[str]:
    """``encdec train``'s arguments for one of several processes that connect to each other.

    Raises:
        SystemExit: an argument that launchers cannot pass on.
    """
    for argument in given:
        if "\n" in argument or "\0" in argument:
            raise SystemExit(
                f"argument {argument!r} spans several lines; put such a value into a config file"
            )
    places = [a.split("=", 1)[1] for a in given if a.startswith("--workdir=")]
    if not places or not places[-1].startswith("/"):
        raise SystemExit(
            f"--workdir is {places[-1] if places else 'missing'}; expected "
            "--workdir=/DIR after `--`, a directory that every machine shares, such "
            "as one in a mounted bucket"
        )
    for argument in given:
        if "=gs://" in argument:
            raise SystemExit(
                f"{argument} is an address; mount its bucket (--bucket) and name the "
                "directory below the mount point"
            )
    return [*given, "--distributed"]


def slices_option(text: str) -> Slices:
    """``CHIP:AxB[xC][*N]`` on a command line."""
    try:
        return Slices.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def bucket_option(text: str) -> tuple[str, str]:
    """``BUCKET[=/DIR]`` on a command line: the bucket and where it is mounted."""
    bucket, _, directory = text.removeprefix("gs://").partition("=")
    directory = directory or f"/mnt/{bucket}"
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]+", bucket) or not directory.startswith("/"):
        raise argparse.ArgumentTypeError(f"{text!r}; expected BUCKET or BUCKET=/DIR")
    return bucket, directory


def setting_option(text: str) -> str:
    """``NAME=VALUE`` on a command line."""
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*=.*", text):
        raise argparse.ArgumentTypeError(f"{text!r}; expected NAME=VALUE")
    return text
