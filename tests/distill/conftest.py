"""A tiny teacher and its records, for the tests of stored logits and of distilled students."""

from __future__ import annotations

import pathlib

import pytest

from encdec.distill.teacher_logits import store_teacher_logits
from encdec.train.loop import train
from tests.devices import one_device
from tests.train.conftest import DECAYING, random_pairs, small_run, write_records

ROWS = 42


@pytest.fixture(scope="session")
def records(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return write_records(tmp_path_factory.mktemp("records") / "train", random_pairs(ROWS, 0))


@pytest.fixture(scope="session")
@one_device()
def teacher(records, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A decoder-only model that has begun to learn, so that its distributions are not flat."""
    workdir = tmp_path_factory.mktemp("teacher") / "work"
    train(
        small_run(
            records,
            model="test-dec",
            steps=12,
            schedule=DECAYING,  # at a constant rate it would be nearly sure of every token
            model_overrides={"init_std": 0.1, "scan_layers": False},
        ),
        workdir,
    )
    return workdir


@pytest.fixture(scope="session")
@one_device()
def stored(records, teacher, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """20 draws of every token."""
    out = tmp_path_factory.mktemp("stored") / "sampled"
    store_teacher_logits(teacher=teacher, records=records, out=out, draws=20, shard_rows=16)
    return out
