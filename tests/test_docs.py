"""The documentation: its links lead somewhere, and its commands and flags exist."""

from __future__ import annotations

import contextlib
import functools
import io
import pathlib
import re
import shlex

import pytest

from encdec import cli

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
# Fields of a configuration, whose names tests of the configurations check.
FIELDS = re.compile(r"--(config|ladder)\.")


def code_lines(text: str) -> list[str]:
    """Lines of code blocks, with continued lines joined."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return re.sub(r"\\\n\s*", " ", "".join(blocks)).splitlines()


def calls(text: str) -> list[list[str]]:
    """The words after ``encdec`` of every call in a code block, comments left out."""
    found = []
    for line in code_lines(text):
        call = re.match(r"\s*(?:\$ )?(?:[A-Z_]+=\S+ )*encdec (.*)", line)
        if call is None:
            continue
        lexer = shlex.shlex(call[1], posix=True, punctuation_chars="|;&()<>")
        lexer.whitespace_split, lexer.commenters = True, "#"
        words = []
        for word in lexer:
            if set(word) <= set("|;&()<>"):
                break
            words.append(word)
        found.append(words)
    return found


@functools.cache
def flags_of(*words: str) -> frozenset[str]:
    """The flags that ``encdec WORDS --help`` lists."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        cli.main([*words, "--help"])
    return frozenset(re.findall(r"--[\w-]+", shown.getvalue()))


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_relative_links_lead_to_files(page):
    targets = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    local = [target.partition("#")[0] for target in targets if "://" not in target]
    assert [target for target in local if target and not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_and_flags_exist(page):
    for words in calls(page.read_text()):
        if not words or words[0].startswith("-") or words[0].isupper():
            continue
        assert words[0] in cli.COMMANDS, " ".join(words)
        flags = [word.partition("=")[0] for word in words if word.startswith("--")]
        flags = [flag for flag in flags if not FIELDS.match(flag + ".")]
        action = [word for word in words[1:2] if re.fullmatch(r"[a-z]+", word)]
        known = flags_of(words[0], *action) if words[0] in ACTIONS else flags_of(words[0])
        assert [flag for flag in flags if flag not in known] == [], " ".join(words)


# Commands whose second word chooses among parsers.
ACTIONS = ("benchmark", "compile", "data", "distill", "evaluate", "paper", "scaling")


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_nothing_is_installed_by_a_name_of_others(page):
    assert not re.search(r"pip install (-U |--upgrade )?[\"']?encdec\b(?!-)", page.read_text())
