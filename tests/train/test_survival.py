"""Kills, preemptions and what a run says of its time."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import pathlib
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable

import jax
import numpy as np
import pytest

from encdec.cli import main
from encdec.errors import CheckpointError, ConfigError, DataError, Preempted
from encdec.saved.saved_params import load_params_for_inference, saved_steps
from encdec.train.goodput import Goodput, last_report
from encdec.train.loop import train
from encdec.train.metrics import read_metrics
from launch.local import free_port
from tests.forks import Fork, finish
from tests.train.conftest import ONE_LAYER, SHARED, small_run

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
# What Compute Engine and Kubernetes leave between SIGTERM and SIGKILL.
GRACE_SECONDS = 30
pytestmark = pytest.mark.usefixtures("one_device")
STEPS, EVERY = 24, 2


def train_one_of(run: dict, workdir: pathlib.Path, address: str, processes: int, index: int):
    if processes > 1:
        jax.distributed.initialize(address, processes, index)
    train(run, workdir)


def attempt(records: pathlib.Path, workdir: pathlib.Path, processes: int, every: int) -> list[Fork]:
    """Starts the processes of one run."""
    several = processes > 1
    run = small_run(
        records,
        steps=STEPS,
        checkpoint={"every": every, "keep": 2},
        model_overrides=ONE_LAYER | {"mlp_dropout": 0.1},
        log_every=1 if several else 3,
        mesh={"data": -1, "fsdp": 2} if several else {},
    )
    together = [run, workdir, f"localhost:{free_port()}", processes]
    return [
        Fork(train_one_of, [*together, index], workdir.with_suffix(f".{index}.log"))
        for index in range(processes)
    ]


def wait_until(processes: list[Fork], happened: Callable[[], bool]) -> None:
    while not happened():
        assert all(p.poll() is None for p in processes), [p.output() for p in processes]
        time.sleep(0.0005)


def kill(processes: list[Fork], moment: str, workdir: pathlib.Path, chance: random.Random) -> None:
    """Kills one when the moment is there; the others are told to leave and insisted upon, as
    launchers do."""
    folder = workdir / "checkpoints"
    names = lambda: [path.name for path in folder.iterdir()] if folder.is_dir() else []
    committed = lambda: {name for name in names() if name.isdigit()}
    if moment == "starting":
        until = time.monotonic() + chance.uniform(0, 1.0)
        wait_until(processes, lambda: time.monotonic() > until)
    else:
        before = committed()
        wait_until(processes, lambda: bool(committed() - before))
        if moment == "saving":
            wait_until(processes, lambda: any("tmp" in name for name in names()))
        time.sleep(chance.uniform(0, 0.05))
    others = [*processes]
    others.pop(chance.randrange(len(others))).kill()
    for process in others:
        process.send_signal(signal.SIGTERM)
    time.sleep(chance.uniform(0, 1.0) if others else 0)
    for process in others:
        process.kill()


@pytest.mark.slow
@pytest.mark.parametrize(
    "processes, moments", [(1, ["starting", "running", "saving"]), (2, ["saving"])]
)
def test_a_run_killed_many_times_ends_in_the_bits_of_an_undisturbed_one(
    records, tmp_path, processes, moments
):
    """SIGKILL while starting, between steps and in the midst of saving; one continuing run. Of
    two processes, each with half of the state, one is killed and both are started again."""
    chance, killed = random.Random(processes), tmp_path / "killed"
    for moment in moments:
        kill(attempt(records, killed, processes, EVERY), moment, killed, chance)
    finish(attempt(records, killed, processes, EVERY))
    finish(attempt(records, tmp_path / "straight", processes, 0))

    _, wanted, step = load_params_for_inference(tmp_path / "straight")
    _, got, _ = load_params_for_inference(tmp_path / "killed")
    assert step == STEPS
    jax.tree.map(np.testing.assert_array_equal, got, wanted)
    # The metrics, too, are those of one run: each step once, the same losses.
    rows = {
        name: [
            (row["step"], row["train/loss"])
            for row in read_metrics(tmp_path / name)
            if "train/loss" in row
        ]
        for name in ("killed", "straight")
    }
    steps = [step for step, _ in rows["killed"]]
    assert steps == sorted(set(steps)) and steps[-1] == STEPS
    whole = dict(rows["straight"])
    # A report begun by one process and ended by the next has only the latter's steps in it.
    agree = sum(loss == whole[step] for step, loss in rows["killed"] if step in whole)
    assert agree >= len(steps) - len(moments) - 1
    assert not list((tmp_path / "killed" / "checkpoints").glob("*tmp*"))
    assert not (tmp_path / "killed" / "damaged").exists()


# SIGTERM, in one process.


def train_and_signal(config, workdir, when: str, tmp_path) -> BaseException | None:
    """Trains here; SIGTERM is sent when ``metrics.jsonl`` has a line with the name ``when``."""
    stop = threading.Event()

    def watch() -> None:
        file = workdir / "metrics.jsonl"
        while not stop.is_set():
            if file.exists() and f'"{when}"' in file.read_text():
                os.kill(os.getpid(), signal.SIGTERM)
                os.kill(os.getpid(), signal.SIGTERM)  # twice: some senders do
                return
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        train(config, workdir)
    except Preempted as error:
        return error
    finally:
        stop.set()
        watcher.join()
    return None


def test_sigterm_saves_in_time_and_the_run_goes_on(records, tmp_path):
    config = small_run(records, steps=160, log_every=20, checkpoint={"every": 0})
    error = train_and_signal(config, tmp_path / "run", "train/loss", tmp_path)
    assert isinstance(error, Preempted) and error.exit_code == 75
    (step,) = saved_steps(tmp_path / "run")
    assert 20 <= step < 160 and f"step {step:,} is saved" in str(error)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL  # as it was before
    assert train(config, tmp_path / "run").step == 160
    train(config, tmp_path / "straight")
    _, wanted, _ = load_params_for_inference(tmp_path / "straight")
    _, got, _ = load_params_for_inference(tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, got, wanted)


def test_the_command_leaves_within_the_grace_period_with_a_code_of_its_own(records, tmp_path):
    arguments = [
        f"--config={REPOSITORY}/configs/pretrain.py:test",
        f"--workdir={tmp_path}/w",
        f"--config.data.records={records}",
        "--config.model_overrides.vocab_size=264",
        "--config.batch_size=8",
        "--config.steps=1000000",
        "--config.log_every=5",
        *SHARED,
    ]
    process = Fork(main, [["train", *arguments]], tmp_path / "log")
    try:
        wait_until([process], lambda: "\nstep 5/" in process.output())
        asked = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 75
        assert time.monotonic() - asked < GRACE_SECONDS
    finally:
        process.kill()
    output = process.output()
    assert "encdec: error: the run was preempted" in output and "Traceback" not in output
    assert len(saved_steps(tmp_path / "w")) == 1


def test_nothing_is_said_to_be_saved_before_the_first_step(records, tmp_path, monkeypatch):
    monkeypatch.setattr("encdec.train.preemption.Notice.reached", lambda self: True)
    with pytest.raises(Preempted, match="before its first step; repeat"):
        train(small_run(records, steps=6), tmp_path / "run")
    assert not saved_steps(tmp_path / "run")


def test_an_evaluation_that_was_cut_short_is_made_up_for(
    records, eval_records, tmp_path, monkeypatch
):
    from encdec.train.preemption import Notice

    config = small_run(
        records,
        steps=6,
        log_every=1,
        eval={"every": 3},
        checkpoint={"every": 0},
        data={"eval_records": str(eval_records)},
    )
    train(config, tmp_path / "straight")
    # Three steps ask once each, the loop once before them; the fifth asker is the evaluation.
    reached = Notice.reached
    monkeypatch.setattr(Notice, "reached", lambda self: reached(self) or self._calls >= 4)
    with pytest.raises(Preempted, match="step 3 is saved"):
        train(config, tmp_path / "run")
    assert not any("eval/loss" in row for row in read_metrics(tmp_path / "run"))
    monkeypatch.setattr(Notice, "reached", reached)
    train(config, tmp_path / "run")
    evals = [
        [
            (row["step"], row["eval/loss"])
            for row in read_metrics(tmp_path / name)
            if "eval/loss" in row
        ]
        for name in ("run", "straight")
    ]
    assert evals[0] == evals[1] and [step for step, _ in evals[0]] == [3, 6]


# Goodput.


def test_goodput_counts_what_stands():
    now = [1000.0]
    clock = lambda: now[0]
    first = Goodput(1000, 1000, clock=clock)
    now[0] = 1030
    first.started_up()
    first.add("step", 50)
    now[0] = 1080
    half = first.report()
    assert half["goodput/share"] == 50 / 80 and half["goodput/startup_seconds"] == 30
    assert half["goodput/lost_seconds"] == 0
    first.add("checkpoint", 10)
    first.add("step", 10)  # killed before the next report: these seconds are lost
    now[0] = 1200
    second = Goodput(1200, 1000, last_report([half | {"step": 5}], 5), clock=clock)
    now[0] = 1220
    second.add("evaluation", 5)
    second.started_up()
    second.add("step", 80)
    now[0] = 1300
    report = second.report()
    assert report["goodput/step_seconds"] == 130 and report["goodput/share"] == 130 / 300
    assert report["goodput/startup_seconds"] == 30 + 15
    assert report["goodput/evaluation_seconds"] == 5
    # 1080 to 1200: work that was done again, and the time between the processes.
    assert report["goodput/lost_seconds"] == 120


def test_a_report_of_later_steps_is_not_gone_on_from():
    rows = [{"step": 5, "goodput/share": 0.5}, {"step": 7}, {"step": 10, "goodput/share": 0.7}]
    assert last_report(rows, 9) == rows[0] and last_report(rows, 4) is None


def test_a_runs_reports_add_up(records, eval_records, tmp_path):
    run = small_run(
        records,
        steps=8,
        log_every=2,
        checkpoint={"every": 4},
        eval={"every": 4},
        data={"eval_records": str(eval_records)},
    )
    train(run, tmp_path, stop_at=4)
    train(run, tmp_path)
    started = json.loads((tmp_path / "config.json").read_text())["started"]
    rows = [row for row in read_metrics(tmp_path) if "goodput/share" in row]
    assert [row["step"] for row in rows] == [2, 4, 4, 6, 8, 8]  # with the evaluations
    for row in rows:
        parts = {
            name: value
            for name, value in row.items()
            if name.endswith("_seconds") and name.startswith("goodput/")
        }
        assert all(value >= 0 for value in parts.values())
        # Lines are stamped a little later, by the thread that writes them.
        wall = row["time"] - started
        assert wall - 10 < sum(parts.values()) <= wall + 0.01
        share = row["goodput/step_seconds"] / sum(parts.values())
        assert row["goodput/share"] == pytest.approx(share, rel=1e-3)
    for earlier, later in itertools.pairwise(rows):
        assert later["goodput/step_seconds"] >= earlier["goodput/step_seconds"]
    assert rows[2]["goodput/evaluation_seconds"] > rows[1]["goodput/evaluation_seconds"] == 0
    assert rows[-1]["goodput/evaluation_seconds"] > rows[2]["goodput/evaluation_seconds"]
    assert rows[-1]["goodput/checkpoint_seconds"] > 0


# Ends.


def test_a_damaged_shard_is_an_error_of_the_data(records, tmp_path):
    """Met in the midst of a run, by a thread that reads ahead."""
    damaged = tmp_path / "records"
    shutil.copytree(records, damaged)
    (shard,) = damaged.glob("*.arrayrecord")
    content = bytearray(shard.read_bytes())
    written = np.flatnonzero(np.frombuffer(content, np.uint8))  # most of a small file is padding
    content[written[len(written) // 2]] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DataError, match="cannot be read") as error:
        train(small_run(damaged, steps=40), tmp_path / "run")
    assert error.value.exit_code == 3


# Places.


def test_addresses_where_no_run_can_be_are_refused(records, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    with pytest.raises(ConfigError, match="hf://b/x, an unsupported address"):
        train(small_run(records), "hf://b/x")
    profile = {"first_step": 2, "steps": 1}
    with pytest.raises(ConfigError, match=r"config\.profile\.first_step is 2"):
        train(small_run(records, profile=profile), "gs://b/x")


def test_a_source_that_is_gone_does_not_stop_a_run_that_has_begun(records, tmp_path):
    train(small_run(records, steps=1), tmp_path / "source")
    run = small_run(records, steps=2, init_from=str(tmp_path / "source"))
    train(run, tmp_path / "run", stop_at=1)
    (tmp_path / "source").rename(tmp_path / "moved")
    assert train(run, tmp_path / "run").step == 2
    with pytest.raises(CheckpointError, match="source"):
        train(run, tmp_path / "other")
