"""Slurm: the batch scripts, run with an srun and an scontrol that play the cluster."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from launch import slurm
from tests.launch.golden import AWKWARD, check_golden

TRAIN = ["--config=configs/pretrain.py:1b", "--workdir=/shared/runs/1b"]
LADDER = [
    "--ladder=configs/scaling.py:paper",
    "--ladder.records=/shared/a b",
    "--workdir=/shared/ladder",
]


@pytest.mark.parametrize(
    "name, arguments",
    [
        (
            "train",
            [
                "train",
                "--nodes=2",
                "--gpus_per_node=8",
                "--time=24:00:00",
                "--account=abc",
                "--partition=gpu",
                "--cpus_per_task=12",
                "--env=NCCL_DEBUG=WARN",
                "--sbatch=--constraint=h100",
                "--encdec=/shared/venv/bin/encdec",
                "--",
                *TRAIN,
            ],
        ),
        (
            "ladder",
            [
                "ladder",
                "--runs=72",
                "--at_once=6",
                "--time=12:00:00",
                "--logs=/shared/logs",
                "--",
                *LADDER,
            ],
        ),
    ],
)
def test_dry_runs_are_golden(name, arguments, capsys):
    assert slurm.main([arguments[0], "--dry-run", *arguments[1:]]) == 0
    check_golden(f"slurm-{name}.txt", capsys.readouterr().out)


def test_one_process_needs_no_others():
    options = slurm.parse(["train", "--time=1:00:00", "--", *TRAIN])
    assert options.arguments == TRAIN


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """Runs a batch script as Slurm would; returns exit code, what srun got, what scontrol got."""
    programs = tmp_path / "bin"
    programs.mkdir()
    record = (
        "import json, os, sys\n"
        "with open(os.environ['FAKE_LOG'], 'a') as file:\n"
        "    file.write(json.dumps(sys.argv) + '\\n')\n"
    )
    for name, end in (("srun", "sys.exit(int(os.environ['FAKE_CODE']))"), ("scontrol", "")):
        path = programs / name
        path.write_text(f"#!{sys.executable}\n{record}{end}\n")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")

    def run(arguments, code, **environment):
        log = tmp_path / "log"
        log.write_text("")
        text = slurm.script(slurm.parse(arguments))
        done = subprocess.run(
            ["bash", "-s"],
            input=text,
            text=True,
            capture_output=True,
            env=os.environ
            | {"FAKE_CODE": str(code), "FAKE_LOG": str(log), "SLURM_JOB_ID": "7"}
            | environment,
        )
        calls = [json.loads(line) for line in log.read_text().splitlines()]
        return done, calls[0][1:], [call[1:] for call in calls[1:]]

    return run


def test_arguments_arrive_unchanged(cluster):
    done, srun, _ = cluster(["train", "--nodes=2", "--time=1:00:00", "--", *TRAIN, *AWKWARD], 0)
    assert done.returncode == 0, done.stderr
    assert srun == [
        "--kill-on-bad-exit=1",
        "--label",
        "encdec",
        "train",
        *TRAIN,
        *AWKWARD,
        "--distributed",
    ]
    assert done.stderr == ""


@pytest.mark.parametrize(
    "code, restarts, requeued",
    [
        (0, 0, False),
        (2, 0, False),
        (3, 0, False),
        (4, 0, False),
        (5, 0, False),
        (75, 0, True),
        (75, 999, True),
        (137, 0, True),
        (137, 10, False),
        (1, 3, True),
    ],
)
def test_exit_codes(cluster, code, restarts, requeued):
    done, _, scontrol = cluster(
        ["train", "--time=1:00:00", "--", *TRAIN], code, SLURM_RESTART_COUNT=str(restarts)
    )
    assert scontrol == ([["requeue", "7"]] if requeued else [])
    assert done.returncode == (0 if requeued else code)


def test_a_ladders_task_runs_the_planned_run_of_its_number(cluster):
    environment = {"SLURM_ARRAY_JOB_ID": "9", "SLURM_ARRAY_TASK_ID": "41"}
    arguments = ["ladder", "--runs=72", "--time=1:00:00", "--", *LADDER]
    done, srun, scontrol = cluster(arguments, 75, **environment)
    assert srun[2:] == ["encdec", "scaling", "run", *LADDER, "--index=41"]
    assert scontrol == [["requeue", "9_41"]] and done.returncode == 0
    done, _, scontrol = cluster(arguments, 6, **environment)
    assert scontrol == [] and done.returncode == 6


def test_a_ladders_array_counts_as_the_plan_does():
    from encdec.scaling.scaling_command import _parser

    text = slurm.script(slurm.parse(["ladder", "--runs=72", "--time=1", "--", *LADDER]))
    assert "#SBATCH --array=0-71%8\n" in text
    overrides = [argument for argument in LADDER if argument.startswith("--ladder.")]
    rest = [argument for argument in LADDER if argument not in overrides]
    assert _parser().parse_args(["run", *rest, "--index=71"]).index == 71


def test_it_is_given_to_sbatch(tmp_path, monkeypatch):
    fake = tmp_path / "sbatch"
    fake.write_text(
        f"#!{sys.executable}\nimport pathlib, sys\n"
        f"pathlib.Path({str(tmp_path / 'got')!r}).write_text(sys.stdin.read())\n"
    )
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    arguments = ["train", "--time=1:00:00", "--", *TRAIN]
    assert slurm.main(arguments) == 0
    assert (tmp_path / "got").read_text() == slurm.script(slurm.parse(arguments))


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["ladder", "--time=1", "--", *LADDER], "--runs is None"),
        (["train", "--time=1"], "arguments after `--`"),
        (["train", "--time=1", "--nodes=0", "--", *TRAIN], "--nodes is 0"),
        (["train", "--time=1", "--", "--config=c.py"], "--workdir is missing"),
        (["train", "--time=1", "--", *TRAIN, "a\nb"], "spans several lines"),
    ],
)
def test_mistakes_are_refused(arguments, words, capsys):
    with pytest.raises(SystemExit) as error:
        slurm.main(arguments)
    assert words in capsys.readouterr().err + str(error.value)


SHELLCHECK = shutil.which("shellcheck") or shutil.which(
    "shellcheck", path=str(pathlib.Path(sys.executable).parent)
)


@pytest.mark.skipif(not SHELLCHECK, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing(tmp_path):
    files = [pathlib.Path(slurm.__file__).with_name("worker.sh")]
    for kind, arguments in (("train", TRAIN), ("ladder", LADDER)):
        more = ["--runs=3"] if kind == "ladder" else ["--nodes=2"]
        options = slurm.parse([kind, "--time=1", *more, "--env=A=b c", "--", *arguments])
        files.append(tmp_path / f"{kind}.sh")
        files[-1].write_text(slurm.script(options))
    done = subprocess.run([SHELLCHECK, *map(str, files)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
