"""The Python standard library of the running interpreter as a corpus: real text, no download.

Two views: every function with a docstring as (source without its docstring, first sentence of
the docstring), and every module as raw text. Both are split by top-level module with a stable
hash, so that no function, sibling or override crosses over. For one Python version the result is
always the same. Tests and the charmap tables of ``encodings`` are left out.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import os
import pathlib
import platform
import re
import sysconfig
import textwrap
from collections.abc import Iterator
from typing import Any

from encdec.errors import DataError

SPLITS = ("train", "validation", "test")
LEFT_OUT = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
LEFT_OUT_MODULES = {"encodings", "ensurepip", "antigravity.py", "this.py"}
SUMMARY_WORDS = (3, 60)
# A sentence ends at a stop followed by space and a capital, a quote or a bracket.
SENTENCE_END = re.compile(r"(?<!\be\.g)(?<!\bi\.e)(?<!\bcf)(?<!\bvs)[.!?](?=\s+[A-Z\"'`(\[])")


def origin() -> dict[str, Any]:
    """What decides the corpus, for the card."""
    return {"corpus": "Python standard library", "python": platform.python_version()}


def split_of(module: str) -> str:
    """The split of a top-level module: 88 % train, 6 % validation, 6 % test, by a stable hash."""
    digest = hashlib.sha256(f"stdlib {module}".encode()).digest()
    bucket = int.from_bytes(digest[:4], "big") % 100
    return "train" if bucket < 88 else "validation" if bucket < 94 else "test"


def library_files() -> list[tuple[str, pathlib.Path]]:
    """(split, source file) of the library, in the order of the files' names."""
    root = _root()
    found = []
    for folder, folders, names in os.walk(root):
        # Pruned in place: installed packages may be many times the library.
        folders[:] = [name for name in folders if name not in LEFT_OUT]
        parts = pathlib.Path(folder).relative_to(root).parts
        found += [(*parts, name) for name in names if name.endswith(".py")]
    files = []
    for parts in sorted(found):
        if parts[0] not in LEFT_OUT_MODULES and "-" not in parts[0]:
            files.append((split_of(parts[0].removesuffix(".py")), root.joinpath(*parts)))
    if not files:
        raise DataError(
            f"no standard library source under {root}; install Python with its .py files"
        )
    return files


def stdlib_text(split: str) -> list[str]:
    """Text of every module of a split ("train", "validation" or "test")."""
    check_split(split)
    texts = (read_module(path) for part, path in library_files() if part == split)
    return [text for text in texts if text is not None and text.strip()]


def stdlib_examples(split: str) -> list[dict[str, Any]]:
    """Function summaries of a split: dicts of ``id``, ``source``, ``target`` and ``targets``.

    A function whose source was already met anywhere in the library (a copied helper) comes once,
    so that none is in two splits. Some seconds at the first call.
    """
    check_split(split)
    return [
        {"id": name, "source": source, "target": summary, "targets": [summary]}
        for part, name, source, summary in _all_examples()
        if part == split
    ]


@functools.cache
def _all_examples() -> tuple[tuple[str, str, str, str], ...]:
    root = _root()
    met: set[str] = set()
    examples = []
    for split, path in library_files():
        text = read_module(path)
        if text is None:
            continue
        place = path.relative_to(root).as_posix()
        for name, source, summary in functions_with_summary(text):
            if source not in met:
                met.add(source)
                examples.append((split, f"{place}:{name}", source, summary))
    return tuple(examples)


def _root() -> pathlib.Path:
    return pathlib.Path(sysconfig.get_paths()["stdlib"])


def check_split(split: str) -> None:
    """Raises DataError for a name that is none of SPLITS."""
    if split not in SPLITS:
        raise DataError(f"split is {split!r}; the standard library has {', '.join(SPLITS)}")


def functions_of(text: str) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    """A module's functions in the order of its text; none where it is not Python."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return []
    functions = [
        node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    return sorted(functions, key=lambda node: (node.lineno, node.col_offset))


def functions_with_summary(text: str) -> Iterator[tuple[str, str, str]]:
    """(name, source without docstring, first sentence of the docstring) of a module's functions."""
    lines = text.splitlines(keepends=True)
    for node in functions_of(text):
        docstring = ast.get_docstring(node, clean=False)
        if not docstring:
            continue
        summary = first_sentence(docstring)
        low, high = SUMMARY_WORDS
        if not low <= len(summary.split()) <= high:
            continue
        source = _without_docstring(lines, node)
        if source is not None:
            yield node.name, source, summary


def first_sentence(docstring: str) -> str:
    """First sentence of a docstring's first paragraph, its white space collapsed."""
    paragraph = re.split(r"\n\s*\n", inspect.cleandoc(docstring), maxsplit=1)[0]
    text = " ".join(paragraph.split())
    end = SENTENCE_END.search(text)
    return text[: end.end()] if end else text


def _without_docstring(
    lines: list[str], node: ast.FunctionDef | ast.AsyncFunctionDef
) -> str | None:
    """The function's dedented source minus the docstring's lines; None where that cannot be."""
    first = min([node.lineno] + [decorator.lineno for decorator in node.decorator_list])
    docstring = node.body[0]
    if docstring.lineno == node.lineno or len(node.body) == 1:
        return None
    kept = lines[first - 1 : docstring.lineno - 1] + lines[docstring.end_lineno : node.end_lineno]
    source = textwrap.dedent("".join(kept)).strip("\n") + "\n"
    # Parsing tells whether the cut was clean: a docstring may share its line with code.
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return None
    function = tree.body[0]
    if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
        return None
    return None if ast.get_docstring(function) else source


def read_module(path: pathlib.Path) -> str | None:
    """Text of a module; None if it is not UTF-8."""
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError:
        return None
