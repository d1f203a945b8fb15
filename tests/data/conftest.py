"""Shared pieces of the data tests: one small trained vocabulary, quick records."""

from __future__ import annotations

import json

import numpy as np
import pytest

from encdec.data.blocks import Counts, Recipe, make_card, pack_rows
from encdec.data.objectives import SequenceToSequence
from encdec.data.records import Records, open_records, write_shard
from encdec.data.vocabulary import load_vocabulary
from encdec.data.vocabulary_training import train_vocabulary

TRAINING_TEXT = """
def read_lines(path):
    with open(path) as file:
        for number, line in enumerate(file, 1):
            yield number, line.rstrip()

class Queue:
    def __init__(self, size=16):
        self.size = size
        self.items = []
"""


@pytest.fixture(scope="session")
def model_path(tmp_path_factory) -> str:
    """A small SentencePiece model trained on code."""
    path = tmp_path_factory.mktemp("vocabulary") / "code.model"
    train_vocabulary([TRAINING_TEXT * 20], path, size=400)
    return str(path)


@pytest.fixture
def make_records(tmp_path):
    """A function that writes token pairs as records, in shards of `rows_per_shard`."""

    def make(
        sources,
        targets,
        *,
        inputs_length,
        targets_length,
        packing="best_fit",
        rows_per_shard=1000,
        decoder_start_id=0,
        name="records",
    ) -> Records:
        directory = tmp_path / name
        directory.mkdir()
        vocabulary = load_vocabulary("bytes", extra_ids=1000)
        vocabulary.save(directory)
        recipe = Recipe(SequenceToSequence(), inputs_length, targets_length, packing)
        rows = pack_rows(recipe, sources, targets, vocabulary)
        starts = range(0, len(rows), rows_per_shard)
        shards = [
            write_shard(directory / f"rows-{i:06d}.arrayrecord", rows[s : s + rows_per_shard])
            for i, s in enumerate(starts)
        ]
        counts = Counts(
            rows=len(rows),
            examples=len(sources),
            documents=len(sources),
            source_tokens=sum(map(len, sources)),
            target_tokens=sum(map(len, targets)),
        )
        options = dict(task="made", split="train", origin={}, decoder_start_id=decoder_start_id)
        make_card(recipe, vocabulary, shards, counts, **options).write(directory)
        return open_records(directory)

    return make


def random_pairs(rng, count, longest_source, longest_target, low=1, high=1200):
    """Token pairs of random lengths."""
    sources, targets = [], []
    for _ in range(count):
        sources.append(rng.integers(low, high, rng.integers(1, longest_source + 1)))
        targets.append(rng.integers(low, high, rng.integers(1, longest_target + 1)))
    return [s.astype(np.int32) for s in sources], [t.astype(np.int32) for t in targets]


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
