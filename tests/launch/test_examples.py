"""The examples in the documentation and in the launchers' help are taken by the launchers."""

from __future__ import annotations

import importlib
import pathlib
import re
import shlex

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
TRAIN = ["--config=configs/pretrain.py:1b", "--workdir=/mnt/my-bucket/runs/1b"]


def examples() -> list[str]:
    found = []
    for file in [
        *(ROOT / "docs").glob("*.md"),
        ROOT / "README.md",
        *(ROOT / "launch").glob("*.py"),
    ]:
        text = file.read_text()
        if file.suffix == ".py":
            text = importlib.import_module(f"launch.{file.stem}").__doc__
        text = re.sub(r"\\\n\s*", "", text)
        found += re.findall(r"^ *(python -m launch\.\w+ .*--.*)$", text, re.MULTILINE)
    return sorted(set(found))


def test_there_are_examples_of_each_launcher():
    named = {re.match(r"python -m launch\.(\w+)", line)[1] for line in examples()}
    assert named == {"gke", "local", "slurm", "tpu_vm"}


@pytest.mark.parametrize("line", examples())
def test_an_example_is_taken(line, capsys):
    _, _, module, *words = shlex.split(line, comments=True)
    left_out = ("…", "...")
    words = [word for word in words if word not in left_out and "=…" not in word]
    if "--" not in words:
        words.append("--")
    own, given = words[: words.index("--")], words[words.index("--") + 1 :]
    given = [word.replace("…", "x") for word in given] + [
        word for word in TRAIN if not any(g.startswith(word.split("=")[0]) for g in given)
    ]
    needs = module != "launch.gke" or "xpk-attach" not in own
    rest = ["--", *given] if needs else []
    launcher = importlib.import_module(module)
    assert launcher.main([*own, "--dry_run", *rest]) == 0
    assert capsys.readouterr().out
