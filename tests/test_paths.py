"""Every flag that names a path: it takes an address, or says what to do instead."""

from __future__ import annotations

import argparse
import functools
import re
import sys
from collections.abc import Iterator

import pytest

from encdec import cli
from encdec.storage import any_path, local_path
from launch import tpu_vm

ADDRESS = "gs://bucket/a/b"
PATHS = r"\b(DIR|FILE|PATH|RUN|RECORDS|IN|OUT|SOURCE|REPORT)\b|directory|folder|\bfiles?\b"
# Flags whose help speaks of files or directories, but whose value is none: why.
NO_PATHS = {
    ("encdec scaling fit", "skip"): "a run's name",
    ("encdec scaling plot", "skip"): "a run's name",
    ("encdec import", "name"): "for cards",
    ("encdec adapt", "name"): "for cards",
    ("encdec serve", "name"): "for clients",
    ("encdec benchmark train", "models"): "presets",
    ("encdec describe", "model"): "a preset, or read by as_path",
    ("encdec evaluate table", "model"): "NAME=DIR,DIR: each directory is read by user_place",
    ("encdec evaluate compare", "first"): "DIR,DIR: each directory is read by user_place",
    ("encdec evaluate compare", "second"): "DIR,DIR: each directory is read by user_place",
    ("encdec evaluate", "judge_endpoint"): "an address of the web",
    ("encdec evaluate", "metrics"): "names",
    ("encdec export", "push"): "a repository of the Hugging Face Hub",
    ("encdec prepare", "documents"): "a word",
    ("encdec prepare", "split"): "a word",
}


class Parsed(Exception):
    """Ends a command once its parser is known."""


@functools.cache
def parsers() -> dict[str, argparse.ArgumentParser]:
    found: dict[str, argparse.ArgumentParser] = {}

    def keep(parser: argparse.ArgumentParser, name: str) -> None:
        actions = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
        for action in actions:
            for word, child in action.choices.items():
                keep(child, f"{name} {word}")
        if not actions:
            found[name] = parser

    def parse(self: argparse.ArgumentParser, *arguments: object) -> None:
        keep(self, self.prog)
        raise Parsed

    targets = {name: target for name, (target, _) in cli.COMMANDS.items() if name != "benchmark"}
    targets |= {f"benchmark {name}": target for name, (target, _) in cli.BENCHMARKS.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse)
        patch.setattr(argparse.ArgumentParser, "parse_known_args", parse)
        for target in targets.values():
            command = cli.load(target)
            source = open(sys.modules[command.__module__].__file__).read()
            # Parts of a command that it finds itself: `if argv and argv[0] == "table"`, or a table.
            parts = re.findall(r'argv\[(?:0|:1)\] == \[?"(\w+)"', source)
            for table in re.findall(r"^    parts = \{(.*)\}$", source, re.MULTILINE):
                parts += re.findall(r'"(\w+)":', table)
            for argv in ([], *([part] for part in parts)):
                with pytest.raises(Parsed):
                    command(argv)
    return found


def path_flags() -> Iterator[tuple[str, argparse.Action]]:
    for name, parser in parsers().items():
        for action in parser._actions:
            # By its name, which a number with a smallest value has too.
            number = getattr(action.type, "__name__", "") in ("int", "float")
            if action.nargs == 0 or action.choices or number:
                continue
            text = f"{action.metavar or ''} {action.help or ''} {action.dest}"
            typed = action.type in (any_path, local_path)
            if typed or (re.search(PATHS, text) and (name, action.dest) not in NO_PATHS):
                yield name, action


def test_the_walk_sees_every_command():
    names = set(parsers())
    for name in (*cli.COMMANDS, *(f"benchmark {name}" for name in cli.BENCHMARKS)):
        assert name == "benchmark" or any(
            f"{found} ".startswith(f"encdec {name} ") for found in names
        )
    assert {"encdec paper table", "encdec paper search", "encdec scaling evaluate"} <= names
    assert {"encdec distill rounds", "encdec compile table"} <= names
    assert len(list(path_flags())) > 90


def test_no_flag_takes_an_address_for_a_local_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wrong = []
    for name, action in path_flags():
        if not action.type:
            wrong.append(f"{name} --{action.dest} has no type")
            continue
        try:
            if action.type(ADDRESS) != ADDRESS:
                wrong.append(f"{name} --{action.dest} makes {action.type(ADDRESS)!r} of {ADDRESS}")
        except argparse.ArgumentTypeError as error:
            if not re.search("copy it here, or mount the bucket", str(error)):
                wrong.append(f"{name} --{action.dest}: {error}")
    assert not wrong
    assert not list(tmp_path.iterdir())


def test_no_command_makes_a_local_path_of_what_may_be_an_address():
    """pathlib makes gs:/bucket of gs://bucket, a folder of the working directory."""
    wrong = []
    for name, action in path_flags():
        if action.type is local_path:
            continue
        words = name.split()[1:]
        table = cli.BENCHMARKS if words[0] == "benchmark" else cli.COMMANDS
        target, _ = table[words[1] if words[0] == "benchmark" else words[0]]
        source = open(sys.modules[cli.load(target).__module__].__file__).read()
        for match in re.finditer(rf"Path\((?:options|arguments)\.{action.dest}\b.*", source):
            if ".resolve().name" not in match[0]:
                wrong.append(f"{name} --{action.dest}: {match[0]}")
    assert not wrong


def test_launchers_keep_keys_on_this_machine(capsys):
    with pytest.raises(SystemExit):
        tpu_vm.parse(["state", "--name=a", "--zone=z", "--slice=v5e:4x4", f"--ssh_key={ADDRESS}"])
    assert "expected a file on this machine" in capsys.readouterr().err
