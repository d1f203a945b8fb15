"""No function or file is longer, and no function takes more parameters, than a reader holds in the
head; nor does the core path, from records to a trained model, take more than an afternoon.

`make check` runs this too: ruff counts statements, which say little of a table of flags.
"""

from __future__ import annotations

import ast
import io
import pathlib
import tokenize

ROOT = pathlib.Path(__file__).resolve().parents[1]
MOST_LINES, MOST_PARAMETERS = 80, 10
MOST_FILE_LINES = 500

# transformers calls these by its own names, one for each field or input of a model.
ALLOWED = {
    "encdec/export/shipped/configuration_encdec.py: EncdecConfig.__init__",
    "encdec/export/shipped/modeling_encdec.py: EncdecDecoder.forward",
    "encdec/export/shipped/modeling_encdec.py: EncdecForConditionalGeneration.forward",
}

ALLOWED_FILES = {
    # transformers loads a model's code from one file, which travels with every export.
    "encdec/export/shipped/modeling_encdec.py"
}

# The core path: what reads records, the model as it is trained, and training. Not in it: layouts
# of the model for CPUs; a teacher's column of the records and vocabularies, which have their own
# contracts (docs/data.md) and of which training needs only fingerprints; models that are read from
# disk (encdec/saved) and what all commands share (files, config files, flags).
CORE = (
    *("data/batches.py", "data/card.py", "data/features.py", "data/mixing.py"),
    *("data/records.py", "data/shards.py", "data/shuffle.py"),
    *("model/*.py", "train/*.py"),
)
NOT_CORE = ("model/cpu_*.py",)
MOST_CORE_LINES = 6000


def code_lines(source: str) -> int:
    """Lines that hold code: neither blank, nor comments, nor docstrings."""
    prose = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            if ast.get_docstring(node, clean=False) is not None:
                prose.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    empty = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    code = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in (*empty, tokenize.ENDMARKER):
            code.update(range(token.start[0], token.end[0] + 1))
    return len(code - prose)


def test_the_core_path_is_read_in_an_afternoon():
    assert code_lines('"""Doc."""\n\n# why\nx = (\n    1\n)  # so\n') == 3
    package = ROOT / "encdec"
    paths = {path for pattern in CORE for path in package.glob(pattern)}
    paths -= {path for pattern in NOT_CORE for path in package.glob(pattern)}
    lines = {
        path.relative_to(package).as_posix(): code_lines(path.read_text()) for path in sorted(paths)
    }
    assert len(lines) >= len(CORE)
    assert sum(lines.values()) <= MOST_CORE_LINES, (
        f"the core path has {sum(lines.values())} lines of code, expected {MOST_CORE_LINES} at "
        f"most; what only inference or one command needs goes elsewhere: {lines}"
    )


def functions(node: ast.AST, prefix: str = ""):
    """(qualified name, lines, parameters but self) of every function below a node."""
    for child in ast.iter_child_nodes(node):
        name = prefix
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            name = f"{prefix}{child.name}"
            if not isinstance(child, ast.ClassDef):
                arguments = child.args
                named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
                own = isinstance(node, ast.ClassDef) and named[0].arg in ("self", "cls")
                yield name, child.end_lineno - child.lineno + 1, len(named) - own
            name += "."
        yield from functions(child, name)


def sources() -> list[pathlib.Path]:
    return [path for top in ("encdec", "launch", "configs") for path in ROOT.glob(f"{top}/**/*.py")]


def test_files_are_small():
    lines = {
        path.relative_to(ROOT).as_posix(): len(path.read_text("utf-8").splitlines())
        for path in sources()
    }
    large = {name: count for name, count in lines.items() if count > MOST_FILE_LINES}
    new = {name: count for name, count in large.items() if name not in ALLOWED_FILES}
    assert not new, f"expected at most {MOST_FILE_LINES} lines a file; split by what it is about"
    assert large.keys() == ALLOWED_FILES, "ALLOWED_FILES names files that are small by now"


def test_functions_are_small():
    large = {}
    for path in sources():
        for name, lines, parameters in functions(ast.parse(path.read_text())):
            if lines > MOST_LINES or parameters > MOST_PARAMETERS:
                what = f"{path.relative_to(ROOT).as_posix()}: {name}"
                large[what] = f"{what} has {lines} lines and {parameters} parameters"
    new = [large[what] for what in sorted(large.keys() - ALLOWED)]
    assert not new, (
        f"expected at most {MOST_LINES} lines and {MOST_PARAMETERS} parameters; split it, group "
        "parameters in a dataclass, or add it to ALLOWED with the reason:\n" + "\n".join(new)
    )
    assert large.keys() == ALLOWED, "ALLOWED names functions that are small by now"
