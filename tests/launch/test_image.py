"""The image: what is rebuilt when, who it runs as, and what a linter says."""

from __future__ import annotations

import fnmatch
import pathlib
import shlex
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
DOCKERFILE = ROOT / "launch" / "Dockerfile"
HADOLINT = shutil.which("hadolint") or shutil.which(
    "hadolint", path=str(pathlib.Path(sys.executable).parent)
)


def instructions() -> list[list[str]]:
    """Each instruction's words."""
    lines = DOCKERFILE.read_text().replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if not line.startswith("#")]


@pytest.mark.skipif(not HADOLINT, reason="hadolint is not installed")
def test_hadolint_finds_nothing():
    done = subprocess.run([HADOLINT, str(DOCKERFILE)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def requirements(folder: pathlib.Path, out: pathlib.Path) -> str:
    out.mkdir()
    subprocess.run(
        [sys.executable, "setup.py", "--quiet", "egg_info", f"--egg-base={out}"],
        cwd=folder,
        check=True,
        capture_output=True,
    )
    (file,) = out.glob("*/requires.txt")
    return file.read_text()


def test_requirements_are_installed_before_the_sources_are_copied(tmp_path):
    """From files that alone say all of them: a change of code does not install them again."""
    words = instructions()
    everything = words.index(["COPY", ".", "."])
    installs = [n for n, line in enumerate(words) if line[:3] == ["RUN", "pip", "install"]]
    assert installs[0] < everything < installs[1]
    assert "--constraint" in words[installs[0]] and ".[${EXTRA}]" in words[installs[0]]
    assert "--no-deps" in words[installs[1]]
    few = tmp_path / "few"
    for _, *files, where in (line for line in words[: installs[0]] if line[:1] == ["COPY"]):
        (few / where).mkdir(parents=True, exist_ok=True)
        for file in files:
            shutil.copy(ROOT / file, few / where)
    assert requirements(few, tmp_path / "a") == requirements(ROOT, tmp_path / "b")


def test_nobody_runs_as_root_unless_asked_and_output_is_unbuffered():
    words = instructions()
    assert words[-1] == ["USER", "${RUN_AS}"] and ["ARG", "RUN_AS=1000"] in words
    assert ["ENV", "PYTHONUNBUFFERED=1"] in words


def test_what_is_left_out_is_nothing_that_runs():
    ignored = (ROOT / "launch" / "Dockerfile.dockerignore").read_text().split()
    assert ".git" in ignored and "tests" in ignored
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    for file in listed.stdout.split():
        if file.startswith(("encdec/", "configs/", "gin/", "launch/")) or "/" not in file:
            parents = [str(p) for p in (pathlib.PurePath(file), *pathlib.PurePath(file).parents)]
            hidden = [i for i in ignored if any(fnmatch.fnmatch(p, i) for p in parents)]
            assert not hidden, (file, hidden)
