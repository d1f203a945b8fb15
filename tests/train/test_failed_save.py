"""Several processes of which one cannot write its part of a checkpoint."""

import pathlib

import jax
import numpy as np
import pytest
import tensorstore
from jax.sharding import NamedSharding, PartitionSpec

from encdec.train.checkpoints import Checkpoints
from encdec.train.state import TrainState
from encdec.train.train_command import leave_at_once
from launch.local import free_port
from tests.forks import Fork


def save_twice(workdir: pathlib.Path, address: str, index: int) -> None:
    """Process 1 cannot write the second time."""
    jax.distributed.initialize(address, 2, index)
    sharding = NamedSharding(jax.make_mesh((2,), ("data",)), PartitionSpec("data"))
    array = jax.make_array_from_callback((4,), sharding, lambda index: np.ones(4)[index])
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


def test_a_process_that_cannot_write_its_part_says_so_instead_of_waiting_for_the_others(tmp_path):
    address = f"localhost:{free_port()}"
    waits, fails = (
        Fork(save_twice, [tmp_path, address, index], tmp_path / f"{index}.log") for index in (0, 1)
    )
    try:
        assert fails.wait(150) == 1 and "the storage refused this" in fails.output()
    finally:
        waits.kill()
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
