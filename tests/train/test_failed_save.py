"""Several processes of which one cannot write its part of a checkpoint."""

import os
import pathlib
import subprocess
import sys

import jax
import pytest

from encdec.train.checkpoints import Checkpoints
from encdec.train.state import TrainState
from launch.local import free_port

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]

CHILD = """
import sys, jax, numpy, tensorstore
workdir, port, index = sys.argv[1], sys.argv[2], int(sys.argv[3])
jax.config.update("jax_num_cpu_devices", 1)
jax.distributed.initialize(f"localhost:{port}", 2, index)
from jax.sharding import NamedSharding, PartitionSpec
from encdec.train.checkpoints import Checkpoints
from encdec.train.state import TrainState
from encdec.train.train_command import leave_at_once
sharding = NamedSharding(jax.make_mesh((2,), ("data",)), PartitionSpec("data"))
array = jax.make_array_from_callback((4,), sharding, lambda index: numpy.ones(4)[index])
state = TrainState(array, {"a": array}, {"b": array})
checkpoints = Checkpoints(workdir)
checkpoints.save(1, state)
checkpoints.wait()
def refuse(*arguments, **options):
    raise OSError("the storage refused this")
if index == 1:
    tensorstore.open = refuse
try:
    checkpoints.save(2, state)
    checkpoints.wait()
except Exception as error:
    leave_at_once(error)
"""


def test_a_process_that_cannot_write_its_part_says_so_instead_of_waiting_for_the_others(tmp_path):
    command = [sys.executable, "-c", CHILD, str(tmp_path), str(free_port())]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu"}
    waits = subprocess.Popen([*command, "0"], env=environment, stderr=subprocess.DEVNULL)
    try:
        fails = subprocess.run(
            [*command, "1"], env=environment, stderr=subprocess.PIPE, text=True, timeout=150
        )
    finally:
        waits.kill()
        waits.wait()
    assert fails.returncode == 1 and "the storage refused this" in fails.stderr
    assert [p.name for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()] == ["1"]


def test_after_a_save_that_was_refused_nothing_is_waited_for(tmp_path, monkeypatch):
    array = jax.numpy.ones(4)
    checkpoints = Checkpoints(tmp_path)
    state = TrainState(array, {"a": array}, {"b": array})

    def refuse(*args, **kwargs):
        raise OSError("the storage refused this")

    monkeypatch.setattr(checkpoints._manager._checkpointer, "save", refuse)
    with pytest.raises(OSError, match="refused"):
        checkpoints.save(1, state)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    checkpoints.wait()
