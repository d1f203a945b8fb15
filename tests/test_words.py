"""No page, docstring, comment or message has a word that CONTRIBUTING.md replaces."""

from __future__ import annotations

import ast
import json
import re

from tests.pages import PAGES, ROOT

TABLE = re.compile(r"^\| [^|]+ \| ([^|]+) \|$", re.MULTILINE)
SOURCES = [
    path
    for name in ("encdec", "launch", "configs", "tests")
    for path in sorted((ROOT / name).rglob("*.py"))
    if path.name != "test_words.py"
]
NOTEBOOK = ROOT / "docs" / "first-model.ipynb"
NAMES = re.compile(r"`[^`]*`|\{[^{}]*\}|```.*?^ *```", re.DOTALL | re.MULTILINE)  # and code


def avoided() -> re.Pattern[str]:
    """The second column of the table: words, where X is one of some units."""
    style = (ROOT / "CONTRIBUTING.md").read_text("utf-8").partition("| write | not |")[2]
    words = [word.strip() for cell in TABLE.findall(style) for word in cell.split(",")]
    assert len(words) > 20
    units = "(?:tokens?|steps?|seconds?|bytes?|rows?|chips?|devices?|parameters?|cores?)"
    patterns = [re.escape(word).replace("X", units) for word in words if word != "is no"]
    patterns.append(r"(?<!there )is no (?!longer|better|more|less)\w+")  # of a thing
    return re.compile(rf"\b(?:{'|'.join(patterns)})\b", re.IGNORECASE)


def prose(path) -> str:
    """A page but for code and the table, a module's comments and strings, a notebook's cells; of
    tests, whose strings are also data, comments and docstrings."""
    text = path.read_text("utf-8")
    if path == NOTEBOOK:
        return "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"])
    if path.suffix == ".md":
        return NAMES.sub(" ", text.partition("| write | not |")[0])
    nodes = list(ast.walk(ast.parse(text)))
    if path.is_relative_to(ROOT / "tests"):
        described = (ast.Module, ast.ClassDef, ast.FunctionDef)
        parts = [ast.get_docstring(node) for node in nodes if isinstance(node, described)]
    else:
        parts = [node.value for node in nodes if isinstance(node, ast.Constant)]
    parts = [part for part in parts if isinstance(part, str)] + re.findall(r"#(.*)", text)
    return NAMES.sub(" ", "\n".join(parts))


def test_words_to_avoid_are_avoided():
    pattern = avoided()
    found = {
        path: pattern.findall(" ".join(prose(path).split()))
        for path in [*PAGES, *SOURCES, NOTEBOOK]
    }
    assert {str(path.relative_to(ROOT)): words for path, words in found.items() if words} == {}


def test_words_to_avoid_are_found():
    found = lambda text: avoided().search(text) is not None
    assert found("It lies beside the rows") and found("50 bytes a token") and found("it is no file")
    assert not found("it is no longer there") and not found("bytes per token, next to the rows")


PACKAGE = {
    path.relative_to(ROOT / "encdec").as_posix(): ast.parse(path.read_text("utf-8"))
    for path in sorted((ROOT / "encdec").rglob("*.py"))
}


def names(tree: ast.Module) -> set[str]:
    keys = ("id", "arg", "attr", "name")
    found = {getattr(node, key, None) for node in ast.walk(tree) for key in keys}
    return {name for name in found if isinstance(name, str)}


def test_notes_are_those_of_the_finished_blocks_of_a_job():
    """One meaning a word: files that name something so have it from encdec.jobs."""
    for path, tree in PACKAGE.items():
        modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert "notes" not in names(tree) or "encdec.jobs" in modules or path == "jobs.py", path


def test_scores_are_those_of_metrics():
    """And of SentencePiece's pieces, whose field is called so."""
    pieces = ("export/tokenizer.py", "interop/llama2c.py")
    measured = ("metrics/", "evaluation/", "paper/", "scaling/", "quickstart/", "tasks.py")
    for path, tree in PACKAGE.items():
        if not path.startswith((*measured, *pieces, "data/seqio_tasks.py")):
            assert [name for name in names(tree) if "scor" in name.lower()] == [], path


def test_a_class_has_its_name_alone():
    classes: dict[str, list[str]] = {}
    others: set[str] = set()
    for path, tree in PACKAGE.items():
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                classes.setdefault(node.name, []).append(path)
            elif isinstance(node, ast.Assign):
                others |= {name.id for name in node.targets if isinstance(name, ast.Name)}
    public = {name: paths for name, paths in classes.items() if not name.startswith("_")}
    assert {name: paths for name, paths in public.items() if len(paths) > 1} == {}
    assert public.keys() & others == set()
