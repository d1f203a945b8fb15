"""Slurm: the batch scripts, run with an srun and an scontrol that play the cluster."""

from __future__ import annotations

import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys

import pytest

from launch import slurm
from launch.commands import FINAL_CODES
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
                "--memory=0",
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
    assert slurm.main([arguments[0], "--dry_run", *arguments[1:]]) == 0
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
    srun = (
        "sys.stderr.write(os.environ.get('FAKE_ENDS', ''))\nsys.exit(int(os.environ['FAKE_CODE']))"
    )
    for name, end in (("srun", srun), ("scontrol", "")):
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
            cwd=tmp_path,
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
        "--kill-on-bad-exit=0",
        "--wait=120",
        "--label",
        "encdec",
        "train",
        *TRAIN,
        *AWKWARD,
        "--distributed",
    ]
    assert done.stderr == ""


@pytest.mark.parametrize("code", [0, *FINAL_CODES])
def test_an_end_that_would_recur_is_final(cluster, code):
    done, _, scontrol = cluster(["train", "--time=1:00:00", "--", *TRAIN], code)
    assert scontrol == [] and done.returncode == code


def test_a_planned_end_is_resumed_without_limit_and_a_crash_a_few_times(cluster, tmp_path):
    arguments = ["train", "--time=1:00:00", "--max_restarts=2", "--", *TRAIN]
    for code, requeued in ((75, 1), (137, 1), (1, 1), (134, 0), (75, 1)):
        done, _, scontrol = cluster(arguments, code, SLURM_RESTART_COUNT="999")
        assert scontrol == [["requeue", "7"]] * requeued
        assert done.returncode == (0 if requeued else code)
    assert len((tmp_path / "encdec-7.crashes").read_text().splitlines()) == 3


@pytest.mark.parametrize(
    "codes, srun, said",
    [
        ([5], 137, "exit code 5: it would fail again"),  # and the others were killed
        ([75, 3], 75, "exit code 3: it would fail again"),
        ([75, 75], 137, "everything is saved"),
    ],
)
def test_the_code_that_explains_the_others_decides(cluster, codes, srun, said):
    ends = [f"srun: error: n{i}: task {i}: Exited with exit code {c}" for i, c in enumerate(codes)]
    kept = "srun: error: n9: tasks 8-9: Killed"
    done, _, scontrol = cluster(
        ["train", "--nodes=2", "--time=1:00:00", "--", *TRAIN],
        srun,
        FAKE_ENDS="\n".join([*ends, kept]) + "\n",
    )
    assert bool(scontrol) == (said == "everything is saved")
    assert said in done.stdout + done.stderr
    # Said once, not once for each task; all else that srun says stays.
    assert "Exited with" not in done.stderr and kept in done.stderr


def test_what_is_asked_of_the_cluster():
    def lines(*more, action="train", given=TRAIN):
        text = slurm.script(slurm.parse([action, "--time=1", *more, "--", *given]))
        return text, next(line for line in text.splitlines() if line.startswith("{ srun"))

    text, _ = lines("--gpus_per_node=0", "--tasks_per_node=4", "--memory=200G")
    assert "gpus" not in text and "#SBATCH --ntasks-per-node=4\n" in text
    assert "#SBATCH --mem=200G\n" in text and "--distributed" in text
    text, _ = lines("--runs=3", "--gpus_per_node=0", action="ladder", given=LADDER)
    assert "gpus" not in text and "#SBATCH --ntasks-per-node=1\n" in text
    text, srun = lines("--cpus_per_task=6", "--srun=--cpu-bind=cores", "--sbatch=--exclusive")
    assert "--cpus-per-task=6 --cpu-bind=cores encdec" in srun
    assert "#SBATCH --cpus-per-task=6\n" in text and "#SBATCH --exclusive\n" in text
    mounts = ("--container_mount=/shared", "--container_mount=/a b:/data:ro")
    _, srun = lines("--container=registry.io#p/encdec:1", *mounts)
    words = shlex.split(srun)
    assert "--container-image=registry.io#p/encdec:1" in words
    assert "--container-mounts=/shared:/shared,/a b:/data:ro" in words


def test_a_ladders_task_runs_the_planned_run_of_its_number(cluster):
    environment = {"SLURM_ARRAY_JOB_ID": "9", "SLURM_ARRAY_TASK_ID": "41"}
    arguments = ["ladder", "--runs=72", "--time=1:00:00", "--", *LADDER]
    done, srun, scontrol = cluster(arguments, 75, **environment)
    assert srun[3:] == ["encdec", "scaling", "run", *LADDER, "--index=41"]
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


@pytest.mark.parametrize("action", [["train"], ["ladder", "--runs=3"]])
def test_a_single_process_may_work_in_s3(action):
    where = "--workdir=s3://bucket/run"
    text = slurm.script(slurm.parse([*action, "--time=1", "--", where]))
    assert where in text and "--distributed" not in text


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
        (["train", "--time=1", "--gpus_per_node=-1", "--", *TRAIN], "--gpus_per_node is -1"),
        (["train", "--time=1", "--tasks_per_node=0", "--", *TRAIN], "--tasks_per_node is 0"),
        (["train", "--time=1", "--runs=3", "--", *TRAIN], "--runs is for ladder, not for train"),
        (["ladder", "--time=1", "--runs=3", "--nodes=2", "--", *LADDER], "--nodes is for train"),
        (["train", "--time=soon", "--", *TRAIN], "--time is 'soon'; expected HH:MM:SS"),
        (["train", "--time=1", "--name=", "--", *TRAIN], "--name is empty"),
        (["train", "--time=1", "--sbatch=mem=1", "--", *TRAIN], "expected --OPTION"),
        (["train", "--time=1", "--container=i", "--", *TRAIN], "is not mounted"),
        (["train", "--time=1", "--container_mount=/shared", "--", *TRAIN], "needs --container"),
        (
            ["train", "--time=1", "--container=i", "--container_mount=data:/d", "--", *TRAIN],
            "expected /DIR",
        ),
        (["train", "--time=1", "--", "--config=c.py"], "--workdir is missing"),
        (["train", "--nodes=2", "--time=1", "--", "--workdir=s3://b/a"], "expected --workdir=/DIR"),
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
