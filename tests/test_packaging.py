"""Packaging: bounded requirements, pins that satisfy them, nothing used that is not declared."""

from __future__ import annotations

import ast
import os
import pathlib
import re
import runpy
import shutil
import subprocess
import sys

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import encdec

ROOT = pathlib.Path(__file__).resolve().parents[1]

# import name -> distribution, where the two differ
DISTRIBUTIONS = {
    "absl": "absl-py",
    "gin": "gin-config",
    "orbax": "orbax-checkpoint",
    "rouge_score": "rouge-score",
    "tensorflow_datasets": "tensorflow-datasets",
    "tensorflow_text": "tensorflow-text",
}


@pytest.fixture(scope="module")
def setup_arguments() -> dict:
    captured = {}
    original = setuptools.setup
    setuptools.setup = lambda **arguments: captured.update(arguments)
    folder = os.getcwd()
    os.chdir(ROOT)
    try:
        runpy.run_path(str(ROOT / "setup.py"))
    finally:
        setuptools.setup = original
        os.chdir(folder)
    return captured


@pytest.fixture(scope="module")
def pins() -> dict[str, Requirement]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(requirement.name): requirement for requirement in requirements}


def requirements_of(arguments: dict) -> list[Requirement]:
    groups = [arguments["install_requires"], *arguments["extras_require"].values()]
    return [Requirement(text) for group in groups for text in group]


def test_every_requirement_is_a_release_with_both_bounds(setup_arguments):
    for requirement in requirements_of(setup_arguments):
        operators = {specifier.operator for specifier in requirement.specifier}
        assert operators == {">=", "<"}, requirement
        assert requirement.url is None, requirement


def test_the_promised_extras_exist(setup_arguments):
    assert {"tpu", "cuda", "hf", "onnx", "serve", "test"} <= set(setup_arguments["extras_require"])


def test_the_jax_lines_are_admitted(setup_arguments):
    jax = [r for r in requirements_of(setup_arguments) if r.name == "jax"]
    assert len(jax) >= 3  # plain, TPU, CUDA
    for requirement in jax:
        for version in ("0.10.2", "0.11.2", "0.12.0.1"):
            assert version in requirement.specifier, requirement


def test_pins_are_exact_and_within_the_bounds(setup_arguments, pins):
    for pin in pins.values():
        assert [specifier.operator for specifier in pin.specifier] == ["=="], pin
    required = [Requirement(text) for text in setup_arguments["install_requires"]]
    required += [Requirement(text) for text in setup_arguments["extras_require"]["test"]]
    for requirement in required:
        pin = pins.get(canonicalize_name(requirement.name))
        assert pin is not None, f"constraints.txt does not pin {requirement.name}"
        (version,) = (specifier.version for specifier in pin.specifier)
        assert version in requirement.specifier, f"{pin} is outside {requirement}"


def test_one_tensorflow_only(pins):
    """``tensorflow`` and ``tensorflow-cpu`` hold the same files and overwrite each other."""
    assert "tensorflow" in pins and "tensorflow-cpu" not in pins


def test_everything_imported_is_declared(setup_arguments):
    declared = {canonicalize_name(Requirement(t).name) for t in setup_arguments["install_requires"]}
    extras = setup_arguments["extras_require"]
    optional = {
        canonicalize_name(Requirement(text).name)
        for name in ("hf", "onnx", "litert", "peers", "seqio", "serve", "code", "beam")
        for text in extras[name]
    }
    local = {"encdec", "configs", *sys.stdlib_module_names}
    for path in [*(ROOT / "encdec").rglob("*.py"), *(ROOT / "configs").glob("*.py")]:
        interop = any(
            path.is_relative_to(ROOT / "encdec" / name)
            for name in ("interop", "export", "serving", "benchmarks")
        )
        # These say themselves what to install where their package is missing.
        interop |= path.name in (
            "huggingface_vocabulary.py",
            "seqio_registration.py",
            "tfds_source.py",
            "beam_prepare.py",
            "onnx_runtime.py",
            "litert_runtime.py",
            "syntax.py",
            "judge.py",
            "torch_teacher.py",
            "pretrained.py",
            "hub.py",
            "transformers_runtime.py",
        )
        allowed = declared | optional if interop else declared
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            for name in {name.partition(".")[0] for name in names} - local:
                distribution = canonicalize_name(DISTRIBUTIONS.get(name, name))
                assert distribution in allowed, f"{path.relative_to(ROOT)} imports {name}"


def test_every_folder_of_modules_is_a_package(setup_arguments):
    folders = {path.parent for path in (ROOT / "encdec").rglob("*.py")}
    names = {str(folder.relative_to(ROOT)).replace(os.sep, ".") for folder in folders}
    assert set(setup_arguments["packages"]) == names


def test_configs_and_gin_travel_with_the_package(setup_arguments):
    packed = {
        f"{folder}/{pathlib.Path(file).name}": file
        for folder, files in setup_arguments["data_files"]
        for file in files
    }
    present = [*(ROOT / "configs").rglob("*.py"), *(ROOT / "gin").rglob("*.gin")]
    names = {str(path.relative_to(ROOT)) for path in present}
    assert names and packed == {f"share/encdec/{name}": name for name in names}


def test_one_version_that_the_changelog_knows(setup_arguments):
    version = setup_arguments["version"]
    assert version == encdec.__version__
    releases = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert next(name for name in releases if name != "Unreleased") == version


def test_each_python_that_may_install_it_is_a_classifier(setup_arguments):
    allowed = SpecifierSet(setup_arguments["python_requires"])
    named = [
        text.rpartition(" ")[2]
        for text in setup_arguments["classifiers"]
        if re.search(r":: 3\.\d+$", text)
    ]
    assert named == [f"3.{minor}" for minor in range(30) if f"3.{minor}.0" in allowed]
    assert (ROOT / "encdec" / "py.typed").exists()
    assert "py.typed" in setup_arguments["package_data"]["encdec"]
    assert "Typing :: Typed" in setup_arguments["classifiers"] and setup_arguments["author"]


def test_the_licence_is_apache_2(setup_arguments):
    # The expression alone: a classifier next to it is refused by package indexes.
    assert setup_arguments["license_expression"] == "Apache-2.0"
    assert not any(text.startswith("License ::") for text in setup_arguments["classifiers"])
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text


def make(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    # Without make's own variables, which are set when these tests run under `make test`.
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name
        not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "PYTHON", "ENV", "EXTRAS", "TESTS", "ARGS")
    }
    return subprocess.run(
        ["make", "--no-print-directory", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        env=inherited | environment,
        stdin=subprocess.DEVNULL,
    )


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
class TestMakefile:
    def test_quickstart_installs_with_the_pins_and_runs(self, tmp_path):
        result = make("-n", "quickstart", f"ENV={tmp_path}/env", f"PYTHON={sys.executable}")
        assert result.returncode == 0, result.stderr
        assert f'"{sys.executable}" -m venv {tmp_path}/env' in result.stdout
        assert "-e . -c constraints.txt" in result.stdout
        assert f"{tmp_path}/env/bin/encdec quickstart" in result.stdout

    def test_test_installs_the_test_tools_and_runs_pytest(self, tmp_path):
        result = make("-n", "test", f"ENV={tmp_path}/env", f"PYTHON={sys.executable}")
        assert result.returncode == 0, result.stderr
        assert '-e ".[test]" -c constraints.txt' in result.stdout
        assert f"{tmp_path}/env/bin/python -m pytest" in result.stdout

    def test_another_choice_of_extras_is_installed_beside_the_first(self, tmp_path):
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin" / "python").touch()
        (tmp_path / ".installed-test").touch()
        assert "pip install" not in make("-n", "test", f"ENV={tmp_path}").stdout
        more = make("-n", "test", f"ENV={tmp_path}", "EXTRAS=test,hf").stdout
        assert '-e ".[test,hf]" -c constraints.txt' in more

    def test_an_installation_is_renewed_only_when_requirements_change(self, tmp_path):
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin" / "python").touch()
        stamp = tmp_path / ".installed"
        stamp.touch()
        assert "pip install" not in make("-n", "install", f"ENV={tmp_path}").stdout
        os.utime(stamp, (0, 0))
        assert "pip install" in make("-n", "install", f"ENV={tmp_path}").stdout

    @pytest.mark.parametrize("broken", ["exit 127", "echo Python 3.10.1"])
    def test_an_interpreter_that_does_not_fit_is_refused_with_the_mend(self, tmp_path, broken):
        """A shim that exists but does not run, and one that runs but is too old."""
        fake = tmp_path / "python"
        fake.write_text(f"#!/bin/sh\n{broken}\nexit 1\n")
        fake.chmod(0o755)
        result = make("install", f"ENV={tmp_path}/env", f"PYTHON={fake}")
        assert result.returncode != 0
        assert "Python 3.11 to 3.14" in result.stderr and "PYTHON=/path" in result.stderr
        assert not (tmp_path / "env").exists()

    def test_a_shim_that_does_not_run_is_passed_over(self, tmp_path):
        for name, text in {
            "python3.11": "exit 127",
            "python3.12": f'exec "{sys.executable}" "$@"',
        }.items():
            (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
            (tmp_path / name).chmod(0o755)
        path = f"{tmp_path}:{os.environ['PATH']}"
        result = make("-n", "install", f"ENV={tmp_path}/env", PATH=path)
        assert '"python3.12" -m venv' in result.stdout

    def test_ci_runs_the_readmes_test_command(self):
        script = (ROOT / ".ci" / "run").read_text()
        assert "make test" in script and "set -euo pipefail" in script
        assert os.access(ROOT / ".ci" / "run", os.X_OK)
