"""Short functions of the standard library with small faults, and their originals.

What a faulty function becomes follows from its text alone, so the same interpreter gives the same
examples. Most faults can be seen in the line itself (another language's word, a misspelt name, a
bracket that is missing), so that a small model can find them; nothing but the fault differs between
source and target.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import random
import re
import textwrap
from collections.abc import Callable, Iterator

from encdec.data.corpora.stdlib import check_split, functions_of, library_files, read_module

LINES = (2, 8)  # of a function
MOST_BYTES = 200  # of a function
VERSIONS = {"train": 3}  # faulty versions of each function; other splits have one
FAULTS = (1, 2)  # put into one function, at least and at most

# A text, and what stands in its place: words and operators of other languages.
FOREIGN = {
    " == ": " = ",
    " != ": " <> ",
    " and ": " && ",
    " or ": " || ",
    " not in ": " in not ",
    " is not ": " not is ",
    "elif ": "else if ",
    "None": "null",
    "True": "true",
    "False": "false",
    "self": "this",
    "def ": "function ",
    "raise ": "throw ",
    "except ": "catch ",
    "import ": "include ",
    "len(": "length(",
    " += ": " =+ ",
    " >= ": " => ",
    "return ": "retrun ",
}
NAME = re.compile(r"[A-Za-z_]{4,}")
Corruption = Callable[[str, random.Random], str | None]


def foreign_word(text: str, draw: random.Random) -> str | None:
    """One word or operator as another language has it; None if there is none to change."""
    places = [
        (match.start(), word)
        for word in FOREIGN
        for match in re.finditer(r"(?<![A-Za-z_])" * word[0].isalpha() + re.escape(word), text)
    ]
    if not places:
        return None
    place, word = draw.choice(sorted(places))
    return text[:place] + FOREIGN[word] + text[place + len(word) :]


def misspelt_name(text: str, draw: random.Random) -> str | None:
    """Two neighbouring letters of a name exchanged; None if no name has two different ones."""
    places = [
        place
        for match in NAME.finditer(text)
        for place in range(match.start(), match.end() - 1)
        if text[place] != text[place + 1]
    ]
    if not places:
        return None
    place = draw.choice(places)
    return text[:place] + text[place + 1] + text[place] + text[place + 2 :]


def missing_mark(text: str, draw: random.Random) -> str | None:
    """A colon, comma, bracket or full stop left out; None if there is none."""
    places = [place for place, mark in enumerate(text) if mark in ":,()[]."]
    if not places:
        return None
    place = draw.choice(places)
    return text[:place] + text[place + 1 :]


def lost_layout(text: str, draw: random.Random) -> str | None:
    """The line break and indentation before a line lost; None for a single line."""
    places = [match.span() for match in re.finditer(r"\n +", text)]
    if not places:
        return None
    begin, end = draw.choice(places)
    return text[:begin] + " " + text[end:]


def exchanged_arguments(text: str, draw: random.Random) -> str | None:
    """The first two parameters of the function exchanged; None if it has fewer."""
    match = re.search(r"def \w+\((\w+), (\w+)", text)
    if not match:
        return None
    (a, b), (c, d) = match.span(1), match.span(2)
    return text[:a] + match[2] + text[b:c] + match[1] + text[d:]


KINDS: tuple[Corruption, ...] = (
    foreign_word,
    foreign_word,
    misspelt_name,
    missing_mark,
    lost_layout,
    exchanged_arguments,
)


def with_faults(text: str, version: int = 0) -> str:
    """The function with faults, which its text and the version's number decide."""
    seed = hashlib.sha256(f"{version} {text}".encode()).digest()[:8]
    draw = random.Random(int.from_bytes(seed, "big"))
    faulty = text
    for _ in range(draw.randint(*FAULTS)):
        made = draw.choice(KINDS)(faulty, draw)
        faulty = faulty if made is None else made
    return misspelt_name(text, draw) or text if faulty == text else faulty


def short_functions(text: str) -> Iterator[str]:
    """Dedented source of a module's short functions, docstrings and decorators left out."""
    lines = text.splitlines(keepends=True)
    for node in functions_of(text):
        kept = lines[node.lineno - 1 : node.end_lineno]
        first = node.body[0]
        if ast.get_docstring(node, clean=False) is not None:
            if len(node.body) == 1 or first.lineno == node.lineno:
                continue
            assert first.end_lineno is not None
            cut = slice(first.lineno - node.lineno, first.end_lineno - node.lineno + 1)
            del kept[cut]
        source = textwrap.dedent("".join(kept)).strip("\n") + "\n"
        if LINES[0] <= source.count("\n") <= LINES[1] and len(source.encode()) <= MOST_BYTES:
            yield source


def repair_examples(split: str) -> list[tuple[str, str]]:
    """(faulty function, the function) of a split; a function met twice in the library comes once.

    Raises:
        DataError: no such split.
    """
    check_split(split)
    return [
        (with_faults(text, version), text)
        for part, text in _all_functions()
        if part == split
        for version in range(VERSIONS.get(split, 1))
    ]


@functools.cache
def _all_functions() -> tuple[tuple[str, str], ...]:
    found: dict[str, str] = {}
    for split, path in library_files():
        for source in short_functions(read_module(path) or ""):
            found.setdefault(source, split)
    return tuple((split, source) for source, split in found.items())
