"""On real text: Java to C#, from gzipped lines to a loss that has fallen by over a third."""

from __future__ import annotations

import gzip
import itertools
import pathlib

import pytest

from encdec.cli import main
from encdec.data.records import read_card
from encdec.train.metrics import read_metrics

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]


# Of the corpus: as many as the steps read, not all there are.
PAIRS = {"train": 600, "dev": 60}


def first_lines(source: pathlib.Path, count: int, target: pathlib.Path) -> pathlib.Path:
    with gzip.open(source) as file, gzip.open(target, "wb") as copy:
        copy.writelines(itertools.islice(file, count))
    return target


@pytest.mark.corpora
@pytest.mark.slow
def test_a_small_encoder_decoder_learns_java_to_c_sharp(corpora, one_device, tmp_path, capsys):
    vocabulary = corpora / "tokenizers" / "mistral_v1_32000.model"
    for split, count in PAIRS.items():
        source = corpora / "t2t" / split / "code_java2cs.jsonl.gz"
        pairs = first_lines(source, count, tmp_path / f"{split}.jsonl.gz")
        arguments = [f"--jsonl={pairs}", f"--vocabulary={vocabulary}", f"--out={tmp_path / split}"]
        assert main(["prepare", *arguments, "--inputs_length=192", "--targets_length=192"]) == 0
    arguments = [
        f"--config={REPOSITORY}/configs/pretrain.py:micro-300k",
        f"--workdir={tmp_path / 'work'}",
        f"--config.data.records={tmp_path / 'train'}",
        f"--config.data.eval_records={tmp_path / 'dev'}",
        "--config.model_overrides.vocab_size=32000",
        "--config.batch_size=4",
        "--config.steps=60",
        "--config.log_every=20",
        "--config.eval.every=20",
        "--config.eval.batches=2",
        "--config.optimizer.learning_rate=1e-2",
        "--config.schedule.warmup_steps=5",
        "--config.checkpoint.every=0",
    ]
    assert main(["train", *arguments]) == 0
    lines = read_metrics(tmp_path / "work")
    dev = [line["eval/loss"] for line in lines if "eval/loss" in line]
    untrained = 10.37  # ln 32,000
    assert dev[-1] < 0.65 * untrained and dev == sorted(dev, reverse=True)
    card, last = read_card(tmp_path / "train"), [x for x in lines if "train/loss" in x][-1]
    with capsys.disabled():
        print(
            f"\njava2cs: {card.examples:,} examples in {card.rows:,} rows; dev loss "
            f"{untrained} -> {dev[-1]:.3f}; {last['train/source_tokens_per_second']:,.0f} source "
            f"and {last['train/target_tokens_per_second']:,.0f} target tokens/s"
        )
