"""Records for ladders that are really run."""

from __future__ import annotations

import pathlib

import pytest

from tests.train.conftest import random_pairs, write_records


@pytest.fixture(scope="session")
def records(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return write_records(tmp_path_factory.mktemp("ladder") / "train", random_pairs(100, 0))


@pytest.fixture(scope="session")
def eval_records(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return write_records(tmp_path_factory.mktemp("ladder") / "eval", random_pairs(19, 1))
