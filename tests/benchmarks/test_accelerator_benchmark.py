"""The accelerator's benchmark, whole, with tiny models on a CPU."""

from __future__ import annotations

import json

import pytest

from encdec import cli
from encdec.benchmarks import accelerator_benchmark
from encdec.errors import ConfigError

TINY = ["--models=test", "--generated=test", "--batches=2", "--batch_size=8", "--inputs_length=16"]
TINY += ["--targets_length=8", "--outputs=4", "--repeats=1", "--no_torch"]


def test_every_part_is_measured_and_what_is_done_stays(tmp_path, capsys, monkeypatch):
    command = ["benchmark", "accelerator", f"--out={tmp_path}", *TINY]
    assert cli.main(command) == 0, capsys.readouterr().err
    path = tmp_path / accelerator_benchmark.RESULTS
    parts = json.loads(path.read_text())["parts"]
    assert all(parts[f"attention test {kind}"]["agrees"] for kind in ("full", "causal"))
    assert parts["train test"]["sequences_per_second"] > 0
    assert parts["generation 2"]["measured"][0]["batch"] == 2
    assert parts["profile"]["files"] == 1
    # A second call takes up what is missing or failed, and nothing else.
    kept = json.loads(path.read_text())
    kept["parts"]["device"] = {"error": "the machine was taken away"}
    path.write_text(json.dumps(kept))
    capsys.readouterr()
    assert cli.main(command) == 0
    assert "train test:" not in capsys.readouterr().out
    again = json.loads(path.read_text())["parts"]
    assert again["device"]["devices"] == 8
    assert {k: v for k, v in again.items() if k != "device"} == {
        k: v for k, v in parts.items() if k != "device"
    }
    with pytest.raises(ConfigError, match="another --out"):
        accelerator_benchmark.main([*command[2:], "--repeats=2"])
    # Nor are parts with transformers, or of another machine, mixed with these.
    monkeypatch.setattr(accelerator_benchmark, "missing", lambda precision: "")
    with pytest.raises(ConfigError, match="'no_torch': True.*'no_torch': False"):
        accelerator_benchmark.main(command[2:-1])
    again = json.loads(path.read_text())
    again["settings"]["device"] = "1 x NVIDIA H200"
    path.write_text(json.dumps(again))
    with pytest.raises(ConfigError, match="1 x NVIDIA H200.*8 x cpu"):
        accelerator_benchmark.main(command[2:])


def test_large_models_are_refused_on_a_cpu(tmp_path):
    for chosen in ([], ["--models=test"]):
        with pytest.raises(ConfigError, match="no GPU or TPU here, and on a CPU .*330m.* hours"):
            accelerator_benchmark.main([f"--out={tmp_path}", "--minutes=0", "--no_torch", *chosen])
    assert not list(tmp_path.iterdir())


def test_a_part_that_fails_costs_no_other(tmp_path, capsys):
    def fails():
        raise RuntimeError("no such kernel")

    path = tmp_path / "results.json"
    parts = {"a": fails, "b": lambda: {"value": 1}}
    results = accelerator_benchmark.run_parts(parts, path, {}, 60)
    assert results["b"]["value"] == 1
    assert "no such kernel" in results["a"]["error"]
    assert json.loads(path.read_text())["parts"] == results
    results = accelerator_benchmark.run_parts(parts, path, {}, -1)
    assert "out of time" in capsys.readouterr().err
