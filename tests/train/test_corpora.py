"""On real text: Java to C#, from gzipped lines to a loss that has fallen by nearly half."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest

from encdec.data.records import read_card
from encdec.train.metrics import read_metrics

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]


def encdec(*arguments: str) -> None:
    """One command as a user gives it, on one device."""
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-m", "encdec", *arguments],
        capture_output=True,
        text=True,
        timeout=900,
        env=environment,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.corpora
@pytest.mark.slow
def test_a_small_encoder_decoder_learns_java_to_c_sharp(corpora, tmp_path, capsys):
    vocabulary = corpora / "tokenizers" / "mistral_v1_32000.model"
    for split in ("train", "dev"):
        encdec(
            "prepare",
            f"--jsonl={corpora / 't2t' / split / 'code_java2cs.jsonl.gz'}",
            f"--vocabulary={vocabulary}",
            f"--out={tmp_path / split}",
            "--inputs_length=192",
            "--targets_length=192",
        )
    encdec(
        "train",
        f"--config={REPOSITORY}/configs/pretrain.py:micro-300k",
        f"--workdir={tmp_path / 'work'}",
        f"--config.data.records={tmp_path / 'train'}",
        f"--config.data.eval_records={tmp_path / 'dev'}",
        "--config.model_overrides.vocab_size=32000",
        "--config.batch_size=4",
        "--config.steps=200",
        "--config.log_every=50",
        "--config.eval.every=50",
        "--config.eval.batches=16",
        "--config.optimizer.learning_rate=5e-3",
        "--config.schedule.warmup_steps=20",
        "--config.checkpoint.every=0",
    )
    lines = read_metrics(tmp_path / "work")
    dev = [line["eval/loss"] for line in lines if "eval/loss" in line]
    untrained = 10.37  # ln 32,000
    assert dev[-1] < 0.6 * untrained and dev == sorted(dev, reverse=True)
    card, last = read_card(tmp_path / "train"), [x for x in lines if "train/loss" in x][-1]
    with capsys.disabled():
        print(
            f"\njava2cs: {card.examples:,} examples in {card.rows:,} rows; dev loss "
            f"{untrained} -> {dev[-1]:.3f}; {last['train/source_tokens_per_second']:,.0f} source "
            f"and {last['train/target_tokens_per_second']:,.0f} target tokens/s"
        )
