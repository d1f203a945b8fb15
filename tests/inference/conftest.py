"""Work directories of real training runs that learned four examples by heart."""

from __future__ import annotations

import pathlib

import pytest

from encdec.train.loop import train
from encdec.train.metrics import read_metrics
from tests.devices import one_device
from tests.train.conftest import DECAYING, small_run, write_records

LEARNED = [("one fish", "red."), ("two fish", "blue"), ("a hare", "x"), ("and a tortoise", "slow")]


@one_device()
def overfit(name: str, folder: pathlib.Path) -> pathlib.Path:
    records = write_records(folder / "records", [LEARNED[:2], LEARNED[2:]] * 4)
    overrides = {"vocab_size": 264, "d_model": 64}
    if name == "decoder_only":
        overrides |= {"architecture": name, "encoder_layers": 0, "decoder_layers": 2}
    train(
        small_run(
            records,
            steps=120,
            log_every=10,
            model_overrides=overrides,
            optimizer={"learning_rate": 5e-3},
            schedule=DECAYING,
        ),
        folder / "run",
    )
    assert read_metrics(folder / "run")[-1]["train/loss"] < 0.01
    return folder / "run"


@pytest.fixture(scope="session")
def encoder_decoder_run(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return overfit("encoder_decoder", tmp_path_factory.mktemp("encoder_decoder"))


@pytest.fixture(scope="session")
def decoder_only_run(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return overfit("decoder_only", tmp_path_factory.mktemp("decoder_only"))
