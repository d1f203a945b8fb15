"""One process or two: the same batches, the same losses."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from encdec.cli import main
from encdec.data.batches import Batches
from encdec.data.records import open_records
from encdec.files import sole_writer
from encdec.saved.saved_params import load_params_for_inference, saved_steps
from encdec.train.metrics import read_metrics
from launch.local import free_port
from tests.train.conftest import ONE_LAYER, small_run

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("layout", ["encoder_decoder", "decoder_only"])
@pytest.mark.parametrize("step", [0, 1, 30])
def test_two_hosts_read_one_hosts_batch_in_halves(records, layout, step):
    opened = open_records(records)
    make = lambda index, count: Batches(
        opened, global_batch=8, layout=layout, seed=3, host_index=index, host_count=count
    )[step]
    whole, first, second = make(0, 1), make(0, 2), make(1, 2)
    for name, value in whole.items():
        np.testing.assert_array_equal(value, np.concatenate([first[name], second[name]]))


def start(arguments: list[str], devices: int) -> subprocess.Popen:
    environment = os.environ | {
        "JAX_NUM_CPU_DEVICES": str(devices),
        "PYTHONPATH": str(REPOSITORY),
        "JAX_PLATFORMS": "cpu",
    }
    return subprocess.Popen(
        [sys.executable, "-m", "encdec", "train", *arguments],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
    )


def finish(processes: list[subprocess.Popen], code: int = 0) -> list[str]:
    """Waits for all; fails unless each ends with ``code``."""
    try:
        outputs = [process.communicate(timeout=600)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs):
        assert process.returncode == code, output
    return outputs


def start_all(arguments: list[str], count: int, devices: int) -> list[subprocess.Popen]:
    """Processes that find each other on this machine."""
    port = free_port()
    return [
        start(
            [
                *arguments,
                "--distributed",
                f"--coordinator=localhost:{port}",
                f"--num_processes={count}",
                f"--process_id={index}",
            ],
            devices=devices,
        )
        for index in range(count)
    ]


def losses(workdir: pathlib.Path) -> dict[tuple[int, str], float]:
    return {
        (row["step"], name): row[name]
        for row in read_metrics(workdir)
        for name in ("train/loss", "train/gradient_norm", "eval/loss", "eval/target_tokens")
        if name in row
    }


@pytest.mark.slow
def test_one_two_or_four_processes_train_alike_and_take_over_from_each_other(
    records, eval_records, tmp_path
):
    """Two processes of two devices get the machine's notice in one of them: both save the same
    step and leave. Four of one device continue from there, so that parameters, too, are
    divided among processes. One process is the measure of both."""

    def arguments(name: str, steps: int) -> list[str]:
        # The constant schedule leaves the number of steps open until it is known.
        return [
            f"--config={REPOSITORY}/configs/pretrain.py:test",
            f"--workdir={tmp_path / name}",
            f"--config.data.records={records}",
            f"--config.data.eval_records={eval_records}",
            "--config.model_overrides.vocab_size=264",
            "--config.batch_size=8",
            "--config.mesh.data=-1",
            "--config.mesh.fsdp=2",
            f"--config.steps={steps}",
            "--config.schedule.name=constant",
            "--config.schedule.warmup_steps=1",
            "--config.log_every=1",
            "--config.eval.every=20",
            "--config.checkpoint.every=0",
            "--config.optimizer.learning_rate=1e-4",
            "--config.model_overrides.scan_layers=false",
            "--config.model_overrides.encoder_layers=1",
        ]

    two = start_all(arguments("several", 100_000), 2, devices=2)
    deadline = time.monotonic() + 900
    while not (tmp_path / "several" / "metrics.jsonl").exists():
        assert time.monotonic() < deadline and two[0].poll() is None, two[0].communicate()
        time.sleep(0.01)
    two[1].send_signal(signal.SIGTERM)
    outputs = finish(two, code=75)
    (step,) = saved_steps(tmp_path / "several")
    for output in outputs:
        assert f"step {step:,} is saved" in output and "Traceback" not in output, output
    assert "step 1/" in outputs[0] and "step 1/" not in outputs[1]

    steps = step + 3
    outputs = finish(start_all(arguments("several", steps), 4, devices=1))
    assert f"after step {step:,}" in outputs[0]
    assert not any(f"step {steps:,}/" in output for output in outputs[1:])

    assert main(["train", *arguments("one", steps)]) == 0
    one, several = (losses(tmp_path / name) for name in ("one", "several"))
    assert one.keys() == several.keys() and (steps, "eval/loss") in one
    for key, value in one.items():
        np.testing.assert_allclose(several[key], value, rtol=1e-4, err_msg=str(key))
    _, params_one, _ = load_params_for_inference(tmp_path / "one")
    _, params, _ = load_params_for_inference(tmp_path / "several")
    embeddings = [p["embedder"]["embedding"] for p in (params_one, params)]
    np.testing.assert_allclose(*embeddings, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_an_error_of_one_process_ends_it_at_once_with_its_own_code(records, tmp_path):
    """The other one is left waiting: what started them stops it."""

    def arguments(data: pathlib.Path) -> list[str]:
        return [
            f"--config={REPOSITORY}/configs/pretrain.py:test",
            f"--workdir={tmp_path / 'run'}",
            f"--config.data.records={data}",
            "--config.model_overrides.vocab_size=264",
            "--config.batch_size=8",
            "--config.steps=3",
            "--config.schedule.warmup_steps=1",
        ]

    together = ["--distributed", f"--coordinator=localhost:{free_port()}", "--num_processes=2"]
    good = start([*arguments(records), *together, "--process_id=0"], devices=1)
    bad = start([*arguments(tmp_path / "none"), *together, "--process_id=1"], devices=1)
    try:
        output, _ = bad.communicate(timeout=600)
        assert bad.returncode == 3 and "none" in output and "Traceback" not in output
        assert good.poll() is None
    finally:
        good.kill()
        bad.kill()
        good.communicate()


# Process 1 looks at the work directory, if it does, while process 0 is writing its first files.
LATE = """
import json, sys, time, jax
jax.config.update("jax_num_cpu_devices", 1)
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from encdec.errors import InUseError
from encdec.train import job, session, workdir
from encdec.train.loop import train
wait = lambda call, seconds: lambda *given: (call(*given), time.sleep(seconds))[0]
if jax.process_index():
    job.build_program = wait(job.build_program, 1.5)
else:
    workdir.copy_vocabulary = wait(workdir.copy_vocabulary, 3)
run, free, held = json.loads(sys.argv[3]), *sys.argv[4:]
assert train(run, free).step == 1
session.PATIENCE_SECONDS = 0.1
try:
    train(run, held)
except InUseError as error:
    print(error)
"""


@pytest.mark.slow
def test_what_process_0_finds_in_the_work_directory_holds_for_all(records, tmp_path):
    """A late process does not see files of its own run, and one that finds it taken is not alone
    in leaving."""
    held = tmp_path / "held"
    held.mkdir()
    run = json.dumps(small_run(records, steps=1, model_overrides=ONE_LAYER))
    command = [sys.executable, "-c", LATE, f"localhost:{free_port()}"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu"}
    piped = {"text": True, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with sole_writer(held):
        both = [
            subprocess.Popen(
                [*command, index, run, str(tmp_path / "free"), str(held)], env=environment, **piped
            )
            for index in "01"
        ]
        outputs = finish(both)
    assert all(f"{held} is in use" in output for output in outputs), outputs
    assert saved_steps(tmp_path / "free") == [1] and not list(held.iterdir())
