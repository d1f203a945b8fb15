"""Small records, runs and models that the training tests share."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
import pytest

from encdec.data.records import (
    DatasetCard,
    content_fingerprint,
    encode_row,
    token_dtype,
    write_shard,
)
from encdec.data.vocabulary import ByteVocabulary, Vocabulary

INPUTS, TARGETS = 24, 12
DECAYING = {"name": "cosine", "warmup_steps": 2}
# Of commands that train in a process: without the number of steps, so that all compile one step.
SHARED = ("--config.schedule.name=constant", "--config.schedule.warmup_steps=0")
# Of runs whose processes each trace and compile it: the model in which they do so soonest.
ONE_LAYER = {"scan_layers": False, "encoder_layers": 1}


def write_records(
    directory: pathlib.Path,
    pairs: list[list[tuple[str, str]]],
    vocabulary: Vocabulary | None = None,
    inputs_length: int = INPUTS,
    targets_length: int = TARGETS,
    start_id: int = 0,
) -> pathlib.Path:
    """A records directory whose rows hold the given (source, target) texts as segments."""
    vocabulary = vocabulary or ByteVocabulary()
    directory.mkdir(parents=True)
    spec = vocabulary.save(directory)
    dtype = token_dtype(spec.size, inputs_length, targets_length)
    ids = lambda text: np.array(vocabulary.encode(text) + [spec.eos_id])
    rows = [([ids(s) for s, _ in row], [ids(t) for _, t in row]) for row in pairs]
    shard = write_shard(
        directory / "rows-00000-of-00001.arrayrecord", (encode_row(s, t, dtype) for s, t in rows)
    )
    source_tokens = sum(len(x) for sources, _ in rows for x in sources)
    target_tokens = sum(len(x) for _, targets in rows for x in targets)
    slots = len(rows) * (inputs_length + targets_length)
    DatasetCard(
        task="test",
        split="train",
        vocabulary=spec,
        inputs_length=inputs_length,
        targets_length=targets_length,
        packing="first_fit",
        inputs_eos=True,
        objective={},
        seed=0,
        decoder_start_id=start_id,
        token_dtype=dtype,
        rows=len(rows),
        origin={},
        examples=sum(map(len, pairs)),
        documents=sum(map(len, pairs)),
        source_tokens=source_tokens,
        target_tokens=target_tokens,
        target_bytes=sum(len(t.encode()) for row in pairs for _, t in row),
        non_padding_share=(source_tokens + target_tokens) / slots,
        truncated={},
        dropped={},
        shards=(shard,),
        fingerprint=content_fingerprint([shard], spec, inputs_length, targets_length, start_id),
    ).write(directory)
    return directory


def random_pairs(rows: int, seed: int) -> list[list[tuple[str, str]]]:
    """Rows of one or two segments: letters, and the same letters reversed and cut."""
    random = np.random.default_rng(seed)
    letters = np.array(list("abcdefgh"))

    def pair(length: int) -> tuple[str, str]:
        source = "".join(letters[random.integers(0, len(letters), length)])
        return source, source[::-1][: max(1, length // 2)]

    return [
        [pair(random.integers(4, 11)) for _ in range(random.integers(1, 3))] for _ in range(rows)
    ]


@pytest.fixture(scope="session")
def records(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return write_records(tmp_path_factory.mktemp("records") / "train", random_pairs(100, 0))


@pytest.fixture(scope="session")
def eval_records(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return write_records(tmp_path_factory.mktemp("records") / "eval", random_pairs(19, 1))


def small_run(records: pathlib.Path | str = "", **changes: Any) -> dict[str, Any]:
    """A run of the `test` preset in float32 on one device; groups in ``changes`` are merged."""
    run: dict[str, Any] = {
        "model": "test",
        "model_overrides": {"vocab_size": 264},
        "batch_size": 8,
        "steps": 20,
        "log_every": 5,
        "data": {"records": str(records)},
        "optimizer": {"learning_rate": 1e-2, "weight_decay": 0.1, "b2": 0.95},
        # Without the number of steps in it, so that runs of any length share a compiled step.
        "schedule": {"name": "constant", "warmup_steps": 0},
        "loss": {"z_loss": 0.0},
        "eval": {"every": 0},
        "checkpoint": {"every": 0},
    }
    for name, value in changes.items():
        run[name] = run[name] | value if isinstance(run.get(name), dict) else value
    if run["optimizer"].get("name") == "adafactor":
        del run["optimizer"]["b2"]  # not read by it
    return run
