"""No function is longer, or takes more parameters, than a reader holds in the head.

`make check` runs this too: ruff counts statements, which say little of a table of flags.
"""

from __future__ import annotations

import ast
import pathlib

ROOT = pathlib.Path(__file__).resolve().parents[1]
MOST_LINES, MOST_PARAMETERS = 80, 10

# transformers calls these by its own names, one for each field or input of a model.
ALLOWED = {
    "encdec/export/shipped/configuration_encdec.py: EncdecConfig.__init__",
    "encdec/export/shipped/modeling_encdec.py: EncdecDecoder.forward",
    "encdec/export/shipped/modeling_encdec.py: EncdecForConditionalGeneration.forward",
}


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


def test_functions_are_small():
    large = {}
    for path in (
        path for top in ("encdec", "launch", "configs") for path in ROOT.glob(f"{top}/**/*.py")
    ):
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
