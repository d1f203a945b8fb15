"""Everything but seqio's registry works where TensorFlow is not installed.

Run by ``make test-light`` in an environment with the plain requirements and pytest; elsewhere
TensorFlow is installed, and the tests say so and are skipped.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import pathlib

import pytest

from encdec.cli import COMMANDS, load, main

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("tensorflow") is not None,
    reason="TensorFlow is installed here: `make test-light` has an environment without it",
)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_answers_help(name, capsys):
    with pytest.raises(SystemExit) as stop:
        code = load(COMMANDS[name][0])(["--help"])
        raise SystemExit(code)  # lists of commands return
    assert not stop.value.code
    assert "usage" in capsys.readouterr().out


def test_text_becomes_an_answering_model(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [
        {"source": f"number {n} of {chr(97 + n % 26)}{chr(97 + n % 7)}", "target": f"{n * n} {n}"}
        for n in range(64)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lengths = ["--inputs_length=32", "--targets_length=32"]
    assert not main(["vocab", "--jsonl", "pairs.jsonl", "--size=300", "--out=v.model"])
    assert not main(
        ["prepare", "--jsonl", "pairs.jsonl", "--vocabulary=v.model", "--out=records", *lengths]
    )
    assert not main(["data", "verify", "records"])
    assert not main(["data", "list"])
    assert not main(
        [
            "train", f"--config={REPOSITORY}/configs/pretrain.py:test", "--workdir=run",
            "--config.data.records=records", "--config.model_overrides.vocab_size=300",
            "--config.batch_size=8", "--config.steps=2", "--config.schedule.warmup_steps=1",
        ]
    )  # fmt: skip
    capsys.readouterr()
    assert not main(["generate", "--checkpoint=run", "--max_tokens=4", "number 3"])
    assert main(["prepare", "--task=c4", "--vocabulary=bytes", "--out=c4"]) == 2
    assert "needs tensorflow_datasets" in capsys.readouterr().err
    with pytest.raises(Exception, match=r"needs seqio.*pip install"):
        importlib.import_module("encdec.data.seqio_registration")
