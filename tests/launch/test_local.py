"""Several processes on this machine: the commands they get, and how they end together."""

from __future__ import annotations

import importlib.util
import pathlib
import shlex
import signal
import subprocess
import sys
import time

import pytest

from encdec.config_files import split_overrides
from encdec.train.train_command import _parser as train_parser

PATH = pathlib.Path(__file__).resolve().parents[2] / "launch" / "local.py"
TRAIN = ["--config=configs/pretrain.py:330m", "--workdir=runs/a b", "--config.steps=3"]


@pytest.fixture(scope="module")
def local():
    spec = importlib.util.spec_from_file_location("launch_local", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def script(local, *programs: str):
    return [local.Command((sys.executable, "-c", program), {}) for program in programs]


def test_dry_run_prints_commands_that_the_shell_and_encdec_train_read(local, capsys):
    options = ["--processes=3", "--port=1234", "--cpu_devices=2", "--dry_run"]
    assert local.main([*options, "--", *TRAIN]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    for index, line in enumerate(lines):
        words = shlex.split(line)
        assert words[:2] == ["JAX_PLATFORMS=cpu", "JAX_NUM_CPU_DEVICES=2"]
        assert words[2:6] == [sys.executable, "-m", "encdec", "train"]
        overrides, rest = split_overrides(words[6:])
        assert overrides == ["--config.steps=3"]
        options = train_parser().parse_args(rest)
        assert (options.workdir, options.distributed) == ("runs/a b", True)
        assert options.coordinator == "127.0.0.1:1234"
        assert (options.num_processes, options.process_id) == (3, index)


@pytest.mark.parametrize(
    ("named", "dealt"),
    [(None, ["0,1", "2,3"]), ("4,5,6,7", ["4,5", "6,7"]), ("4,5,6", None), ("", None)],
)
def test_gpus_are_dealt_out(local, monkeypatch, named, dealt):
    """Those of CUDA_VISIBLE_DEVICES alone, where it is set."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if named is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    if not dealt:
        with pytest.raises(SystemExit, match=f"'{named}'; expected 4 GPUs"):
            local.commands(TRAIN, 2, 1, gpus=2)
        return
    run = local.commands(TRAIN, 2, 1, gpus=2)
    assert [command.environment["CUDA_VISIBLE_DEVICES"] for command in run] == dealt


def test_all_succeed_and_every_line_names_its_process(local, capfd):
    run = [
        local.Command(
            (sys.executable, "-c", "import os; print('hello', os.environ['N'])"),
            {"N": str(10 + index)},
        )
        for index in range(2)
    ]
    assert local.supervise(run) == 0
    assert sorted(capfd.readouterr().out.splitlines()) == ["[0] hello 10", "[1] hello 11"]


def test_a_failure_stops_the_others_and_gives_its_code(local):
    start = time.monotonic()
    assert local.supervise(script(local, "import time; time.sleep(60)", "raise SystemExit(4)")) == 4
    assert time.monotonic() - start < 30


def test_a_process_that_will_not_leave_is_killed(local, tmp_path):
    ready = tmp_path / "ready"
    stubborn = (
        "import signal, time, pathlib; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        f"pathlib.Path({str(ready)!r}).touch(); time.sleep(60)"
    )
    failing = (
        f"import pathlib, time\nwhile not pathlib.Path({str(ready)!r}).exists(): "
        "time.sleep(0.05)\nraise SystemExit(5)"
    )
    start = time.monotonic()
    assert local.supervise(script(local, stubborn, failing), grace_seconds=1) == 5
    assert time.monotonic() - start < 30


def test_a_termination_request_reaches_every_process(tmp_path):
    """As on preemption: each process saves and leaves with its own code."""
    program = (
        "import pathlib, signal, sys, time\n"
        "def save(*_):\n"
        "    pathlib.Path(sys.argv[1] + '.saved').touch(); sys.exit(75)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "pathlib.Path(sys.argv[1] + '.ready').touch(); time.sleep(60)\n"
    )
    driver = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('local', {str(PATH)!r})\n"
        "local = importlib.util.module_from_spec(spec); sys.modules['local'] = local\n"
        "spec.loader.exec_module(local)\n"
        f"run = [local.Command((sys.executable, '-c', {program!r}, {str(tmp_path)!r} + f'/{{i}}'), "
        "{}) for i in range(2)]\n"
        "sys.exit(local.supervise(run))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", driver])
    try:
        deadline = time.monotonic() + 30
        while len(list(tmp_path.glob("*.ready"))) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 75
    finally:
        process.kill()
    assert len(list(tmp_path.glob("*.saved"))) == 2
