"""Code blocks of the pages: each says which test runs it, or why none does.

A comment in the line above a block is ``<!-- run: tests/test_walk.py -->`` (that test takes all of
them by ``run_by(__file__)``), ``<!-- checked, not run: hours of training -->``, or, for what cannot
even be checked, ``<!-- not run: needs gcloud -->``. Checking a line of shell is done by the parser
and the configuration of its command (``check_shell``), Python by calling stand-ins of the API that
take what it takes (``check_python``). Output is ``text``.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import importlib
import io
import itertools
import json
import pathlib
import re
import runpy
import shlex
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import setuptools

from encdec import cli
from encdec.errors import EncdecError

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
# Files whose docstring has command lines, indented by four.
SOURCES = [*sorted((ROOT / "configs").glob("*.py")), *sorted((ROOT / "launch").glob("*.py"))]
SHELL = ("sh", "bash")
_FENCE = re.compile(r"( *)```(\w*)\s*")
CHECKED = "checked, not run"
_MARK = re.compile(rf"<!-- (run|not run|{CHECKED}): (.+) -->")
_MORE = ("…", "...")  # a line that continues, or a value of the reader's


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block: ``line`` is its first, ``mark`` what the comment above it says."""

    page: str  # from the repository's top
    line: int
    language: str
    text: str
    mark: str  # "run", CHECKED, "not run", "" for none
    about: str  # the test that runs it, or the reason that none does

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


class Unchecked(AssertionError):
    """A line that is neither run nor checked, or that its command does not take."""


def blocks(path: pathlib.Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    found, lines = [], path.read_text("utf-8").splitlines()
    page, number = str(path.relative_to(ROOT)), 0
    while number < len(lines):
        fence = _FENCE.fullmatch(lines[number])
        if not fence:
            number += 1
            continue
        indent, end = fence[1], number + 1
        while lines[end].rstrip() != f"{indent}```":
            end += 1
        mark = _MARK.fullmatch(lines[number - 1].strip()) if number else None
        text = "".join(line.removeprefix(indent) + "\n" for line in lines[number + 1 : end])
        found.append(
            Block(page, number + 2, fence[2], text, *(mark.groups() if mark else ("", "")))
        )
        number = end + 1
    return found


def source_examples(path: pathlib.Path) -> Block:
    """The command lines in a Python file's docstring, as a block of shell."""
    text = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    chosen = [line.strip() for line in lines if re.match(r"    (encdec |python -m .* --)", line)]
    return Block(str(path.relative_to(ROOT)), 1, "sh", "\n".join(chosen), CHECKED, "a docstring")


def spans(path: pathlib.Path) -> list[str]:
    """Command lines in the prose of a page, or in the strings of a Python file.

    They are in backticks, or follow "Example:".
    """
    text = path.read_text("utf-8")
    if path.suffix == ".py":
        tree = ast.parse(text)
        inner = {id(v) for n in ast.walk(tree) if isinstance(n, ast.JoinedStr) for v in n.values}
        nodes = [node for node in ast.walk(tree) if id(node) not in inner]
        text = "\n\0".join(map(_text, nodes))
    else:
        text = re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)
    found = re.findall(r"`(encdec [^`\0]*)`|Examples?[^:`\0]*: (encdec [^;`\0]*)", text)
    return [" ".join("".join(pair).split()) for pair in found]


def _text(node: ast.AST) -> str:
    """A string as it is written, X for what is put into it; of other nodes nothing."""
    if isinstance(node, ast.JoinedStr):
        return "".join(map(_text, node.values))
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    return "X" if isinstance(node, ast.FormattedValue) else ""


def check_span(text: str) -> None:
    """Unchecked for a command, an action or a flag that is not; values are anybody's."""
    words = text.split()[1:]
    lead = list(itertools.takewhile(re.compile(r"[a-z]+").fullmatch, words))
    if lead in ([], ["benchmark"]):
        return
    try:
        parser = parsed([*lead, *_MORE])
    except (Unchecked, EncdecError) as error:
        raise Unchecked(f"`{text}` {error}") from None
    flags = set(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction) and lead[1:]:
            flags |= set(action.choices[lead[1]]._option_string_actions)
    for word in words:
        name = word.strip("[]'").partition("=")[0]
        if name.startswith("--") and not re.match(r"--(config|ladder)\.", name):
            if name not in flags:
                raise Unchecked(f"`{text}` names {name}, which encdec {' '.join(lead)} lacks")


def run_by(file: str) -> list[Block]:
    """The blocks that a test file is said to run; it has to run every one."""
    name = str((ROOT / file).relative_to(ROOT))
    found = [block for page in PAGES for block in blocks(page)]
    return [block for block in found if block.mark == "run" and block.about == name]


def commands(text: str) -> list[tuple[int, list[str]]]:
    """The simple commands of shell text as (line from 0, words), the last word ``&`` where one is.

    Comments and the words of loops are left out; the commands of a pipe are so many commands.
    """
    found: list[tuple[int, list[str]]] = []
    lines, number = text.splitlines(), 0
    while number < len(lines):
        first, line = number, lines[number]
        while line.endswith("\\"):
            number += 1
            line = f"{line[:-1]} {lines[number].strip()}"
        number += 1
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|;&()<>")
        lexer.whitespace_split, lexer.commenters = True, "#"
        words: list[str] = []
        for word in [*lexer, ";"]:
            if not set(word) <= set("|;&"):
                words.append(word)
                continue
            if words[:1] == ["do"]:
                words = words[1:]
            while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                words = words[1:]
            if words and words[0] not in ("for", "done"):
                found.append((first, [*words, "&"] if word == "&" else words))
            words = []
    return found


def check_shell(block: Block) -> None:
    """Unchecked for a line that no parser here knows, or that its own parser refuses."""
    for line, words in commands(block.text):
        words = words[:-1] if words[-1] == "&" else words
        check = CHECKS.get(words[0])
        # Optional words are in brackets; a variable may stand for a number.
        words = [re.sub(r"^\[(-.*)\]$", r"\1", re.sub(r"\$\w+", "1", word)) for word in words]
        try:
            if check is None:
                raise Unchecked("is neither run nor checked: mark the block (tests/pages.py)")
            check(words)
        except (Unchecked, EncdecError, SystemExit) as error:
            place = f"{block.page}:{block.line + line}"
            raise Unchecked(f"{place}: `{' '.join(words)}` {error}") from None


class _Parsed(Exception):
    def __init__(self, parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
        self.parser, self.options = parser, options


@contextlib.contextmanager
def _only_parsed(incomplete: bool) -> Iterator[None]:
    """Commands end, as ``_Parsed``, when their arguments have been parsed."""
    real = argparse.ArgumentParser.parse_args

    def parse_args(self, args=None, namespace=None):
        if incomplete:
            _need_nothing(self)
        raise _Parsed(self, real(self, args, namespace))

    with mock.patch.object(argparse.ArgumentParser, "parse_args", parse_args):
        yield


def _need_nothing(parser: argparse.ArgumentParser) -> None:
    for part in [*parser._actions, *parser._mutually_exclusive_groups]:
        part.required = False
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for part in set(action.choices.values()):
                _need_nothing(part)


def _command(words: list[str]) -> tuple[Callable[[list[str]], Any], list[str]]:
    table = cli.COMMANDS
    if words[0] == "benchmark":
        table, words = cli.BENCHMARKS, words[1:]
    if not words or words[0] not in table:
        raise Unchecked("is no command")
    return cli.load(table[words[0]][0]), words[1:]


def parsed(words: list[str]) -> argparse.ArgumentParser:
    """The parser that took the words after ``encdec``, whose configuration was read too."""
    incomplete = any(word in _MORE for word in words)
    command, rest = _command([word for word in words if word not in _MORE])
    said = io.StringIO()
    try:
        with _only_parsed(incomplete), contextlib.redirect_stderr(said):
            command(rest)
    except _Parsed as found:
        _check_configuration(found.options, words[0], rest)
        return found.parser
    except SystemExit:
        raise Unchecked(said.getvalue().strip().rpartition("error: ")[2]) from None
    raise AssertionError(f"encdec {words} parsed nothing")


def _check_configuration(options: argparse.Namespace, command: str, words: list[str]) -> None:
    """ConfigError for a configuration, or a field of it, that the command would refuse."""
    from encdec.config_files import split_overrides
    from encdec.paper import paper_command
    from encdec.paper.setting import parse_setting
    from encdec.scaling import scaling_command
    from encdec.train import run_config
    from encdec.train.run_config import parse_config

    given = vars(options)
    if given.get("ladder"):
        overrides, _ = split_overrides(words, "ladder")
        scaling_command.load_ladder(given["ladder"], overrides)
    elif given.get("config") and command == "paper":
        overrides, _ = split_overrides(words)
        parse_setting(paper_command.load_config(given["config"], overrides).to_dict())
    elif given.get("config"):
        overrides, _ = split_overrides(words)
        # A preset of the reader's stands for any.
        overrides = [word.replace("=PRESET", "=test") for word in overrides]
        parse_config(run_config.load_config(given["config"], overrides))


def _check_encdec(words: list[str]) -> None:
    if words[1:] and words[1] not in ("--help", "--version", "COMMAND", "NAME"):
        parsed(words[1:])


# What a launcher's trainer needs, where an example leaves it out.
_TRAIN = ["--config=configs/pretrain.py:1b", "--workdir=/mnt/my-bucket/runs/1b"]


def _check_python(words: list[str]) -> None:
    """The launcher takes the line with --dry_run, and the trainer what follows ``--``."""
    module = words[2]
    if words[1] != "-m" or not module.startswith("launch."):
        raise Unchecked("is neither run nor checked: mark the block (tests/pages.py)")
    words = [word for word in words[3:] if word not in _MORE and "=…" not in word]
    middle = words.index("--") if "--" in words else len(words)
    own, given = words[:middle], [word.replace("…", "x") for word in words[middle + 1 :]]
    if not any(word.startswith("--ladder") for word in given):
        names = {word.partition("=")[0] for word in given}
        given += [word for word in _TRAIN if word.partition("=")[0] not in names]
        parsed(["train", *given])
    else:
        parsed(["scaling", "run", *given])
    after = [] if "xpk-attach" in own else ["--", *given]
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        code = importlib.import_module(module).main([*own, "--dry_run", *after])
    if code or not shown.getvalue():
        raise Unchecked(f"gave {code} with --dry_run")


def _check_make(words: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    phony = re.search(r"\.PHONY: ((?:.*\\\n)*.*)", makefile)
    for word in words[1:]:
        name, equals, _ = word.partition("=")
        known = re.search(rf"^{name} *\?=", makefile, re.MULTILINE) if equals else phony
        if not known or not equals and name not in phony[1].split():
            raise Unchecked(f"names {name}, which the Makefile lacks")


def _check_pip(words: list[str]) -> None:
    """Of this project alone: another one has its name on the public index."""
    arguments: dict[str, Any] = {}
    with mock.patch.object(setuptools, "setup", lambda **given: arguments.update(given)):
        runpy.run_path(str(ROOT / "setup.py"))
    for word in words[2:]:
        place = re.fullmatch(r"\.(?:\[(.+)\])?", word)
        unknown = (
            set((place[1] or "").split(",")) - {"", *arguments["extras_require"]} if place else ()
        )
        if unknown or not (place or word.startswith("-") or (ROOT / word).is_file()):
            raise Unchecked(f"names {word}, which is not this project's")


def _check_curl(words: list[str]) -> None:
    """An address of the server, and JSON."""
    app = (ROOT / "encdec/serving/app.py").read_text("utf-8")
    options = argparse.ArgumentParser()
    options.add_argument("url")
    options.add_argument("-d", type=json.loads)
    path = urllib.parse.urlsplit(options.parse_args(words[1:]).url).path
    if f'Route("{path}"' not in app:
        raise Unchecked(f"asks for {path}, which the server does not know")


CHECKS: dict[str, Callable[[list[str]], None]] = {
    "curl": _check_curl,
    "encdec": _check_encdec,
    "python": _check_python,
    "make": _check_make,
    "pip": _check_pip,
}


def check_python(block: Block) -> None:
    """Runs a block of Python; calls of ``encdec.api`` are only compared with what it takes."""
    from encdec import api
    from encdec.evaluation.evaluation_settings import EvaluationSettings
    from encdec.inference.generation_settings import GenerationSettings
    from encdec.train.run_config import load_config, parse_config

    def train(config, workdir, overrides=None, **_):
        given = [f"--config.{name}={value}" for name, value in (overrides or {}).items()]
        parse_config(load_config(config, given))

    stand_in = mock.create_autospec(api)
    stand_in.train.side_effect = train
    stand_in.generate.side_effect = lambda model, texts, **given: GenerationSettings(**given)
    stand_in.evaluate.side_effect = lambda model, out, **given: EvaluationSettings("", "", **given)
    import encdec
    from encdec.metrics.metric_registry import METRICS

    try:
        with (
            mock.patch.object(encdec, "api", stand_in),
            mock.patch.dict(METRICS),  # what a block registers ends with it
            contextlib.redirect_stdout(io.StringIO()),
        ):
            exec(compile(block.text, block.place, "exec"), {})
    except Exception as error:
        raise Unchecked(f"{block.place}: {type(error).__name__}: {error}") from error
