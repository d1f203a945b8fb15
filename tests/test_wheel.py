"""A wheel works where there is no checkout: from an empty folder, with the configs by name."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import sysconfig
import venv

import pytest

import encdec

ROOT = pathlib.Path(__file__).resolve().parents[1]

# In the environment of the wheel, from an empty folder.
STORY = """
import importlib.metadata, json, pathlib, sys
import encdec
from encdec.cli import main
assert pathlib.Path(encdec.__file__).is_relative_to(sys.prefix), encdec.__file__
assert pathlib.Path(encdec.__file__).with_name("py.typed").exists()
assert importlib.metadata.version("encdec-slm") == encdec.__version__
from encdec import shipped
(model,) = shipped.models()
directory = pathlib.Path(shipped.model_directory(model))
assert directory.is_relative_to(sys.prefix) and [*directory.glob("params/*.safetensors")]
rows = [{"source": f"number {n} of {chr(97 + n % 26)}", "target": f"{n}"} for n in range(64)]
pathlib.Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
pathlib.Path("mine.gin").write_text('include "gin/objectives/prefix_lm.gin"\\n')
for arguments in (
    ["prepare", "--jsonl", "pairs.jsonl", "--vocabulary=bytes", "--out=records",
     "--gin_file=mine.gin", "--inputs_length=32", "--targets_length=32"],
    ["train", "--config=configs/pretrain.py:test", "--workdir=run", "--config.data.records=records",
     "--config.model_overrides.vocab_size=512", "--config.batch_size=8", "--config.steps=1",
     "--config.schedule.warmup_steps=0"],
):
    assert not main(arguments), arguments
assert main(["train", "--config=configs/pretrian.py:test", "--workdir=other"]) == 2
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> pathlib.Path:
    """An environment with the wheel; the packages that it needs are those of this one."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [
            *(sys.executable, "setup.py", "--quiet"),
            *("egg_info", f"--egg-base={folder}", "build", f"--build-base={folder}/build"),
            *("bdist_wheel", f"--dist-dir={folder}"),
        ],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (wheel,) = folder.glob("*.whl")
    environment = folder / "environment"
    venv.create(environment)
    python = environment / "bin" / "python"
    within = {"base": str(environment), "platbase": str(environment)}
    packages = pathlib.Path(sysconfig.get_path("purelib", "venv", within))
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check"]
    subprocess.run(
        [*pip, "install", "--quiet", "--no-index", "--no-deps", "--ignore-installed", str(wheel)],
        check=True,
        capture_output=True,
    )
    return environment


def test_it_prepares_and_trains_with_shipped_files_by_name(installed, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(installed / "bin" / "python"), "-c", STORY],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "Path not found" not in done.stderr
    assert "did you mean 'configs/pretrain.py'?" in done.stderr
    run = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert run["step"] == 1
    command = str(installed / "bin" / "encdec")
    version = subprocess.run(
        [command, "--version"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert version.stdout == f"encdec {encdec.__version__}\n"
