"""Runs whose work directory is in s3://, where steps are uploaded from this machine."""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
import pytest

from encdec import buckets, cli
from encdec.errors import CheckpointError, ConfigError, Preempted, StorageError
from encdec.files import write_text
from encdec.saved.saved_params import latest_step, saved_steps
from encdec.saved.uploaded_steps import MARKER, staging_folder
from encdec.train import session
from encdec.train.checkpoints import Checkpoints
from encdec.train.loop import Hook, train
from encdec.train.metrics import read_metrics
from encdec.train.run_fields import CheckpointConfig
from tests import devices
from tests.bucket_servers import Proxy
from tests.forks import Fork
from tests.test_buckets import (  # noqa: F401
    _run,
    _saved,
    _serve,
    _without_time,
    environment,
    gs,
    nothing_local,
)
from tests.train.conftest import records  # noqa: F401
from tests.train.test_checkpoints import restore, same, save_two, small_state

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
LIFE = "s3://bucket/life/run"
WRITES = ("POST", "PUT")


@pytest.fixture(scope="module")
def s3(environment) -> Iterator[Proxy]:
    yield from _serve("s3", environment)


@pytest.fixture(scope="module", autouse=True)
def of_one_device() -> Iterator[None]:
    """As a process has that a test starts."""
    with devices.one_device():
        yield


@pytest.fixture(autouse=True)
def no_fault(s3) -> Iterator[None]:
    yield
    s3.fault = None


@pytest.fixture(scope="module")
def life(s3, records, tmp_path_factory) -> dict[str, Any]:
    """A run that is killed while it uploads step 4, and resumed while the bucket is at times not
    to be had. What was seen at each; next to it the same run on this machine."""
    folder = tmp_path_factory.mktemp("life")
    seen: dict[str, Any] = {"here": folder / "run"}
    run = _run(str(records))
    train(run, seen["here"])

    def kill(method: str, path: str) -> int | None:
        if method in WRITES and "checkpoints/4/optimizer" in path:
            process.send_signal(signal.SIGKILL)
            return 503
        return None

    s3.fault = kill
    process = Fork(train, [run, LIFE], folder / "log")
    try:
        seen["code"] = process.wait(300)
    finally:
        s3.fault = None
        process.kill()
    seen["left"], seen["saved"] = list(buckets.objects(LIFE)), saved_steps(LIFE)

    further, begun, held = threading.Event(), [], []

    def busy(method: str, path: str) -> int | None:
        """Step 4 is held until the run has gone on; then the bucket is busy for a second."""
        if method in WRITES and "checkpoints/4/" in path:
            held.append(further.wait(timeout=60))
            begun.append(time.monotonic())
            return 503 if begun[-1] < begun[0] + 1 else None
        return None

    s3.fault = busy
    on = Hook(lambda session: further.set() if session.step == 5 else None, every=1)
    try:
        seen["summary"] = train(run, LIFE, hooks=[on])
    finally:
        s3.fault = None
    return seen | {"held": held}


def test_a_run_that_is_killed_while_it_uploads_ends_as_a_local_one(life):
    assert life["code"] == -signal.SIGKILL and life["saved"] == [2]
    assert any("checkpoints/4/" in name for name in life["left"])
    assert life["summary"].step == 6
    assert _saved(LIFE) == _saved(str(life["here"]))
    assert _without_time(read_metrics(LIFE)) == _without_time(read_metrics(life["here"]))
    assert not list(staging_folder(f"{LIFE}/checkpoints").glob("*"))


def test_steps_go_on_while_a_step_is_uploaded(life):
    assert len(life["held"]) > 4 and all(life["held"])


def test_what_is_done_with_a_model_takes_its_address(life, records):
    model, use = f"--checkpoint={LIFE}", "s3://bucket/use"
    assert cli.main(["generate", model, "00000012", "--max_tokens=4"]) == 0
    out = f"{LIFE}/evaluation"
    write_text(f"{use}/data/dialogsum/test.jsonl", '{"source": "00000001", "target": "1000"}\n' * 3)
    evaluate = ["evaluate", model, "--tasks=dialogsum", f"--out={out}", "--split=test"]
    evaluate += [f"--data_dir={use}/data", "--max_tokens=4", "--resamples=10"]
    assert cli.main(evaluate) == 0
    assert {"report.json", "report.md"} <= set(buckets.objects(out))
    more = f"{use}/more"
    assert train(_run(str(records), model=LIFE), more, stop_at=1).step == 1
    assert saved_steps(more) == [1]
    assert cli.main(["describe", LIFE]) == 0
    assert cli.main(["export", model, "--format=hf", f"--out={use}/hf"]) == 0
    assert "config.json" in buckets.objects(f"{use}/hf")


def test_a_signal_ends_a_run_once_its_step_is_uploaded(s3, records):
    place, told = "s3://bucket/told", []

    def slow(method: str, path: str) -> None:
        if method in WRITES and "checkpoints/" in path:
            if not told:
                told.append(os.kill(os.getpid(), signal.SIGTERM))
            time.sleep(0.02)

    s3.fault = slow
    with pytest.raises(Preempted, match=f"is saved in {place}/checkpoints") as error:
        train(_run(str(records)), place)
    assert error.value.exit_code == 75
    s3.fault = None
    last = saved_steps(place)[-1]
    assert f"step {last} is saved" in str(error.value) and last < 6
    assert train(_run(str(records)), place).step == 6


def test_a_bucket_that_denies_writing_is_told_before_anything_is_computed(
    s3, records, monkeypatch, capsys
):
    s3.fault = lambda method, path: 403 if method in WRITES else None
    monkeypatch.setattr(session, "_begin", lambda *arguments: pytest.fail("computed"))
    place = "s3://bucket/denied/run"
    command = ["train", f"--config={REPOSITORY}/configs/pretrain.py:test", f"--workdir={place}"]
    command += ["--config.model_overrides.vocab_size=264", f"--config.data.records={records}"]
    assert cli.main([*command, "--config.batch_size=8", "--config.steps=2"]) == 7
    said = capsys.readouterr().err
    assert f"{place}/vocabulary.json: permission denied" in said.splitlines()[-1]
    assert "Traceback" not in said and not buckets.objects("s3://bucket/denied")


@pytest.mark.parametrize(
    "command",
    [
        ["generate", "--checkpoint=java2cs", "--file=FILE", "--out=s3://none/x.jsonl"],
        ["average", "--checkpoint=s3://none/x", "--last=2", "--out=o"],
        ["paper", "table", "s3://none/x"],
        ["paper", "table", "gs://none/x"],
    ],
)
def test_a_bucket_that_is_not_there_is_named(command, s3, gs, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("x")
    command = [word.replace("FILE", f"{tmp_path}/a.txt") for word in command]
    assert cli.main(command) == 7
    said = capsys.readouterr().err
    assert "://none; create it" in said.splitlines()[-1]
    assert "Traceback" not in said


def test_only_one_process_can_save_there(records, monkeypatch):
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ConfigError, match="one process alone .* has 2.* or give gs://"):
        train(_run(str(records)), "s3://bucket/two")
    assert not buckets.objects("s3://bucket/two")


def test_a_machine_without_room_for_a_step_is_told_at_once(s3, records, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 1, 99))
    with pytest.raises(StorageError, match="staging.*0.0 GB are free.*ENCDEC_BUCKET_CACHE=DIR"):
        train(_run(str(records)), "s3://bucket/room")
    monkeypatch.setenv(buckets.CACHE, "s3://bucket/cache")
    with pytest.raises(ConfigError, match="expected a folder of this machine"):
        train(_run(str(records)), "s3://bucket/room")
    assert not buckets.objects("s3://bucket/room")


def test_a_step_is_whole_by_its_last_object_alone(s3, monkeypatch, tmp_path):
    place = "s3://bucket/steps"
    states, steps = save_two(place), f"{place}/checkpoints"
    names = [name for name in buckets.objects(f"{steps}/2") if name != MARKER]
    buckets.copy_objects(f"{steps}/2", f"{steps}/3", names)
    fs = buckets.file_system(steps)
    for key in ("steps/checkpoints/3/params/d/x", "other/x"):
        fs.call_s3("create_multipart_upload", Bucket="bucket", Key=key)
    assert saved_steps(place) == [1, 2]
    with pytest.raises(CheckpointError, match="does not have checkpoint 3"):
        latest_step(place, 3)
    state, step, said = restore(place, states[1])
    assert step == 2 and same(state, states[2]) and not said
    assert not buckets.objects(f"{steps}/3")
    assert [one["Key"] for one in fs.list_multipart_uploads("bucket")] == ["other/x"]

    real = buckets.send_file

    def send(source: pathlib.Path, address: str) -> None:
        if "checkpoints/4/params" in address:
            raise OSError("gone")
        real(source, address)

    later = Checkpoints(place, CheckpointConfig(keep=2))
    monkeypatch.setattr(buckets, "send_file", send)
    later.save(4, small_state(4))
    with pytest.raises(OSError, match="gone"):
        later.wait()
    assert saved_steps(place) == [1, 2] and buckets.objects(f"{steps}/4")
    monkeypatch.setattr(buckets, "send_file", real)
    later = Checkpoints(place, CheckpointConfig(keep=2))
    assert not buckets.objects(f"{steps}/4") and later.latest() == 2
    later.save(4, small_state(4))
    later.close()
    assert saved_steps(place) == [2, 4] and not buckets.objects(f"{steps}/1")

    def taken_away(source: pathlib.Path, address: str) -> None:
        real(source, address)
        if "checkpoints/6/params" in address:  # a second process that begins takes it for left over
            buckets.remove_objects(f"{steps}/6", [address.removeprefix(f"{steps}/6/")])

    later = Checkpoints(place, CheckpointConfig(keep=1))
    monkeypatch.setattr(buckets, "send_file", taken_away)
    later.save(6, small_state(6))
    with pytest.raises(StorageError, match="does another process work in this directory"):
        later.wait()
    monkeypatch.setattr(buckets, "send_file", real)
    assert saved_steps(place) == [2, 4]
    # Copied to a disk, it is what Orbax would have written there.
    shutil.copytree(buckets.cached(place), tmp_path / "copy")
    state, step, _ = restore(tmp_path / "copy", states[1])
    assert step == 4 and same(state, small_state(4))


def test_damage_in_the_bucket_is_told_from_damage_of_the_copy(s3):
    place = "s3://bucket/damage"
    states, params = save_two(place), f"{place}/checkpoints/2/params"
    assert restore(place, states[1])[1] == 2
    name = next(name for name in buckets.objects(params) if re.match("d/", name))
    copy = buckets.cached(f"{params}/{name}")
    copy.write_bytes(bytes(copy.stat().st_size))
    state, step, said = restore(place, states[1])
    assert step == 2 and same(state, states[2]) and not said
    s3.fault = lambda method, path: 403 if path.endswith(name) else None
    buckets.forget(f"{place}/checkpoints/2")
    with pytest.raises(CheckpointError, match="checkpoint s3://.*2 cannot be read now"):
        restore(place, states[1])
    s3.fault = None
    buckets.write_bytes(f"{params}/{name}", bytes(copy.stat().st_size if copy.exists() else 100))
    state, step, said = restore(place, states[1])
    assert step == 1 and same(state, states[1])
    assert any("checkpoint 2 is damaged" in line for line in said)
    assert saved_steps(place) == [1] and MARKER in buckets.objects(f"{place}/damaged/2")
