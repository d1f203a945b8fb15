"""Import layers: packages import downward only, and TensorFlow stays in the preparing part."""

from __future__ import annotations

import ast
import collections
import pathlib
import subprocess
import sys
from collections.abc import Container

PACKAGE = pathlib.Path(__file__).resolve().parents[1] / "encdec"

# Each package, or single file of one, and the packages it may import; docs/design.md explains them.
ALL_MAY_IMPORT = {
    "buckets",
    "config_files",
    "errors",
    "fields",
    "figures",
    "files",
    "flags",
    "hub",
    "jobs",
    "logs",
    "machine",
    "markup",
    "modules",
    "packages",
    "processes",
    "quiet",
    "result_lines",
    "settings",
    "shipped",
    "startup",
    "storage",
}
MAY_IMPORT = {
    "errors": set(),
    "fields": {"errors"},
    "packages": {"errors"},
    "config_files": {"errors"},
    "shipped": {"packages"},
    "processes": set(),
    "quiet": set(),
    "buckets": {"errors"},
    "figures": set(),
    "files": set(),
    "flags": set(),
    "logs": {"errors"},
    "jobs": {"errors"},
    "settings": {"errors"},
    "storage": {"errors"},
    "machine": set(),
    "result_lines": set(),
    "markup": set(),
    "model.execution": {"errors"},
    "model.model_config": {"errors", "model.execution"},
    "cost": {"errors", "model.model_config"},
    "model": {"errors", "cost"},
    "modules": {"errors"},
    "metrics": {"errors"},
    "data": {"errors", "metrics"},
    "tasks": {"data", "metrics"},
    "safetensors": {"errors"},
    "startup": set(),
    "pretrained": {"errors"},
    "saved": {"errors", "cost", "model", "data", "safetensors"},
    "train": {"errors", "cost", "model", "metrics", "data", "saved"},
    "inference": {"errors", "cost", "model", "data", "saved", "train"},
    "serving": {"errors", "cost", "model", "data", "saved", "inference"},
    "distill": {
        "errors",
        "cost",
        "model",
        "data",
        "saved",
        "train",
        "inference",
        "safetensors",
        "pretrained",
    },
    "evaluation": {
        "errors",
        "cost",
        "model",
        "metrics",
        "data",
        "saved",
        "train",
        "inference",
        "pretrained",
    },
    "hub": {"errors"},
    "interop": {"hub", "errors", "model", "data", "safetensors", "saved"},
    "adapt": {"errors", "model", "data", "saved", "interop"},
    "export": {
        "hub",
        "cost",
        "errors",
        "model",
        "data",
        "saved",
        "inference",
        "interop",
        "safetensors",
    },
    # Travels with exports; run by the library that loads them, in torch.
    "export.shipped": set(),
    "describe": {"errors", "cost", "model", "saved"},
    "config_command": {"model", "train"},
    "hardware": {"errors", "cost", "model", "train", "inference"},
    "scaling": {
        "errors",
        "cost",
        "model",
        "metrics",
        "data",
        "train",
        "inference",
        "evaluation",
        "hardware",
    },
    "benchmarks": {
        "errors",
        "adapt",
        "cost",
        "model",
        "metrics",
        "data",
        "saved",
        "train",
        "inference",
        "serving",
        "distill",
        "interop",
        "export",
    },
    "quickstart": {
        "errors",
        "cost",
        "model",
        "data",
        "saved",
        "train",
        "inference",
        "distill",
        "evaluation",
        "benchmarks",
    },
    "paper": {
        "errors",
        "cost",
        "model",
        "metrics",
        "data",
        "train",
        "inference",
        "distill",
        "evaluation",
        "scaling",
        "benchmarks",
    },
    "api": {"data", "train", "inference", "distill", "evaluation", "interop", "export"},
    "completion": {"cli", "train"},
    "cli": set(),  # and, by name and only when called, every command
    "__main__": {"cli"},
    "__init__": set(),
}
# The preparing side of the data package; everything else must run without TensorFlow.
TENSORFLOW_SIDE = {
    "encdec/data/seqio_registration.py",
    "encdec/data/gin_bindings.py",
    "encdec/data/prepare_command.py",
    "encdec/data/tfds_source.py",
}
# Travels with exports and imports torch, which is not a requirement here.
NOT_IMPORTED_HERE = "encdec/export/shipped/"
TENSORFLOW_PACKAGES = {"tensorflow", "tensorflow_text", "tensorflow_datasets", "seqio", "gin"}


def imports(path: pathlib.Path) -> set[str]:
    """Dotted names of everything that a file imports, at its top or inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
            if node.module == "encdec":
                names.update(f"encdec.{alias.name}" for alias in node.names)
    return names


def package_of(parts: tuple[str, ...]) -> str:
    """The package of a module, given the parts of its name after ``encdec``."""
    file = ".".join(parts[:2])
    return file if file in MAY_IMPORT else parts[0]


def test_imports_point_downward():
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        package = package_of(path.relative_to(PACKAGE).with_suffix("").parts)
        assert package in MAY_IMPORT, f"{path} is in no known package; add it to MAY_IMPORT"
        for name in imports(path):
            first, *parts = name.split(".")
            if first != "encdec" or not parts or package_of(tuple(parts)) == package:
                continue
            # A package may import all of its own files; one listed separately only its entry.
            allowed = (
                MAY_IMPORT[package] | ALL_MAY_IMPORT | ({package} - {package_of(tuple(parts))})
            )
            if not {parts[0], package_of(tuple(parts))} & allowed:
                wrong.append(f"{path.relative_to(PACKAGE.parent)} imports {name}")
    assert not wrong, "\n".join(wrong)


def import_graph() -> dict[str, set[str]]:
    """The files that each file imports, at its top or inside functions."""
    paths = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        paths[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return {name: imported_files(path, paths) - {name} for name, path in paths.items()}


def reached(graph: dict[str, set[str]], start: str) -> set[str]:
    """What can be reached from a node by one arrow or more."""
    found, todo = set(), [start]
    while todo:
        new = graph[todo.pop()] - found
        found |= new
        todo += new
    return found


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """The sets of two or more nodes that reach each other."""
    after = {node: reached(graph, node) for node in graph}
    rings = {
        frozenset(other for other in after[node] if node in after[other])
        for node in graph
        if node in after[node]
    }
    return sorted(map(set, rings), key=sorted)


def test_no_files_import_each_other_in_a_circle():
    """Late imports inside functions count, too: they only hide a circle."""
    graph = import_graph()
    assert graph["encdec.data.records"] >= {"encdec.data.mixing", "encdec.data.shards"}
    assert circles(graph) == []
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [{"b", "c"}]


def test_training_reads_records_and_knows_no_task():
    """Tasks, their readers and their metrics are for preparing and evaluation."""
    needed = reached(import_graph(), "encdec.train.loop")
    assert needed > {"encdec.data.mixing", "encdec.train.step", "encdec.model.attention"}
    others = ("task_registry", "readers", "objectives", "text_tasks", "seqio_tasks", "corpora")
    assert not needed & {f"encdec.data.{name}" for name in others}
    assert "encdec.metrics.text_metrics" not in needed


def imported_files(path: pathlib.Path, files: Container[str]) -> set[str]:
    """Which of these modules a file imports; of ``from package import name``, the module meant."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in files else node.module)
    return {name for name in found if name in files}


def test_commands_are_called_by_the_command_line_alone():
    """What other code needs of a command is a function in another file. Only ``cli`` calls its
    ``main``, by name, and a command that has one below it (``evaluate table``)."""
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE.parent).as_posix()
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom) or not node.module:
                continue
            if {alias.name for alias in node.names} & {"main"} or node.module.endswith("_command"):
                assert [alias.name for alias in node.names] == ["main"], name
                same_package = node.module.rpartition(".")[0] == ".".join(path.parts[-3:-1])
                assert same_package or path.stem == "__main__", f"{name} calls {node.module}"


def test_a_files_name_says_which_file_it_is():
    """Names that can be opened by name: only ``__init__`` stands for the package around it."""
    by_name = collections.defaultdict(list)
    for path in sorted(PACKAGE.rglob("*.py")):
        by_name[path.name].append(str(path.relative_to(PACKAGE.parent)))
    del by_name["__init__.py"]
    twice = [" and ".join(paths) for paths in by_name.values() if len(paths) > 1]
    assert not twice, "rename one, by what it holds: " + "; ".join(twice)


def test_tensorflow_stops_at_the_preparing_side():
    for path in PACKAGE.rglob("*.py"):
        if str(path.relative_to(PACKAGE.parent)) not in TENSORFLOW_SIDE:
            used = {name.split(".")[0] for name in imports(path)} & TENSORFLOW_PACKAGES
            assert not used, f"{path} imports {used}"


def test_every_package_but_preparing_runs_without_tensorflow():
    """In a fresh interpreter, so that what libraries import in their turn counts too."""
    modules = [
        str(path.relative_to(PACKAGE.parent).with_suffix("")).replace("/", ".")
        for path in sorted(PACKAGE.rglob("*.py"))
        if str(path.relative_to(PACKAGE.parent)) not in TENSORFLOW_SIDE
        and path.name not in ("__main__.py",)
        and not str(path.relative_to(PACKAGE.parent)).startswith(NOT_IMPORTED_HERE)
    ]
    code = (
        "import importlib, sys\n"
        f"for name in {modules!r}:\n"
        "    importlib.import_module(name)\n"
        "    assert 'tensorflow' not in sys.modules, name\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
