"""One process or two: the same batches, the same losses."""

from __future__ import annotations

import pathlib
import signal
import time

import jax
import numpy as np
import pytest

from encdec.cli import main
from encdec.data.batches import Batches
from encdec.data.records import open_records
from encdec.errors import InUseError
from encdec.files import sole_writer
from encdec.saved.saved_params import load_params_for_inference, saved_steps
from encdec.train import job, session, workdir
from encdec.train.loop import train
from encdec.train.metrics import read_metrics
from launch.local import free_port
from tests.forks import Fork, finish, start_together
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
            "train",
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

    two = start_together([arguments("several", 100_000)] * 2, tmp_path, devices=2)
    deadline = time.monotonic() + 900
    while not (tmp_path / "several" / "metrics.jsonl").exists():
        assert time.monotonic() < deadline and two[0].poll() is None, two[0].output()
        time.sleep(0.01)
    two[1].send_signal(signal.SIGTERM)
    outputs = finish(two, code=75)
    (step,) = saved_steps(tmp_path / "several")
    for output in outputs:
        assert f"step {step:,} is saved" in output and "Traceback" not in output, output
    assert "step 1/" in outputs[0] and "step 1/" not in outputs[1]

    steps = step + 3
    alone = Fork(main, [arguments("one", steps)], tmp_path / "one.log", devices=2)
    outputs = finish(start_together([arguments("several", steps)] * 4, tmp_path))
    finish([alone])
    assert f"after step {step:,}" in outputs[0]
    assert not any(f"step {steps:,}/" in output for output in outputs[1:])

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
            "train",
            f"--config={REPOSITORY}/configs/pretrain.py:test",
            f"--workdir={tmp_path / 'run'}",
            f"--config.data.records={data}",
            "--config.model_overrides.vocab_size=264",
            "--config.batch_size=8",
            "--config.steps=3",
            "--config.schedule.warmup_steps=1",
        ]

    good, bad = start_together([arguments(records), arguments(tmp_path / "none")], tmp_path)
    try:
        assert bad.wait() == 3 and "none" in bad.output() and "Traceback" not in bad.output()
        assert good.poll() is None
    finally:
        good.kill()
        bad.kill()


def train_late(address: str, index: int, run: dict, free: pathlib.Path, held: pathlib.Path) -> None:
    """Trains in ``free``; then tries to in ``held``. Process 1 looks at the work directory, if it
    does, while process 0 is writing its first files."""
    wait = lambda call, seconds: lambda *given: (call(*given), time.sleep(seconds))[0]
    jax.distributed.initialize(address, 2, index)
    if index:
        job.build_program = wait(job.build_program, 1.5)
    else:
        workdir.copy_vocabulary = wait(workdir.copy_vocabulary, 3)
    assert train(run, free).step == 1
    session.PATIENCE_SECONDS = 0.1
    with pytest.raises(InUseError) as error:
        train(run, held)
    print(error.value)


@pytest.mark.slow
def test_what_process_0_finds_in_the_work_directory_holds_for_all(records, tmp_path):
    """A late process does not see files of its own run, and one that finds it taken is not alone
    in leaving."""
    free, held = tmp_path / "free", tmp_path / "held"
    held.mkdir()
    run = small_run(records, steps=1, model_overrides=ONE_LAYER)
    address = f"localhost:{free_port()}"
    with sole_writer(held):
        outputs = finish(
            [
                Fork(train_late, [address, index, run, free, held], tmp_path / f"{index}.log")
                for index in (0, 1)
            ]
        )
    assert all(f"{held} is in use" in output for output in outputs), outputs
    assert saved_steps(free) == [1] and not list(held.iterdir())
