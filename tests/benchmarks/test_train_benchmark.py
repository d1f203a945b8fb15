"""The training benchmark at tiny shapes: PyTorch's step is an independent check of ours."""

from __future__ import annotations

import json

import numpy as np
import pytest

from encdec import cli
from encdec.benchmarks import step_profile, train_benchmark
from encdec.benchmarks.device_rates import DeviceRates, all_devices
from encdec.errors import ConfigError


@pytest.mark.parametrize(("model", "optimizer"), [("test", "adamw"), ("test-dec", "muon")])
def test_both_sides_take_the_same_steps(model, optimizer, tmp_path, capsys, monkeypatch):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    command = ["benchmark", "train", f"--models={model}", f"--optimizers={optimizer}"]
    command += [
        "--batch_size=8",
        "--inputs_length=12",
        "--targets_length=6",
        "--repeats=1",
        "--steps=1",
    ]
    assert cli.main([*command, "--no_compile", f"--out={tmp_path}"]) == 0
    assert "of matmul rate" in capsys.readouterr().out
    (row,) = json.loads((tmp_path / "train.json").read_text())
    ours, theirs = row["losses"]["ours"], row["losses"]["PyTorch"]
    # Muon's iterations run in bfloat16 there and in float32 here.
    np.testing.assert_allclose(ours, theirs, rtol=2e-6 if optimizer == "adamw" else 1e-4)
    assert ours[2] < ours[0]
    assert {"attention", "attention, backward", "MLP", "head and loss", "optimizer"} <= set(
        row["parts"]
    )
    assert row["ratio"]["PyTorch"] > 0
    assert row["data_seconds"] > 0
    monkeypatch.setattr(train_benchmark, "measure", None)  # what is in the file is kept
    assert cli.main([*command, "--no_compile", f"--out={tmp_path}"]) == 0
    assert model in capsys.readouterr().out
    assert json.loads((tmp_path / "train.json").read_text()) == [row]


def test_what_was_not_measured_before_is_measured(tmp_path, monkeypatch, capsys):
    """PyTorch after --no_torch, more steps than before; and each row shows its own MFU."""
    asked = []

    def measure(setting, *, rounds, steps, torch, compiled, matmul_flops):
        asked.append((torch, compiled))
        names = ("ours", "PyTorch", "PyTorch, compiled")[: 1 + torch * (1 + compiled)]
        seconds = {name: [1.0 + place] * (rounds * steps) for place, name in enumerate(names)}
        return train_benchmark.MeasuredStep(setting, 1.0, 1.0, seconds, {}, {}, {}, 0, 0, mfu=0.5)

    monkeypatch.setattr(train_benchmark, "measure", measure)
    monkeypatch.setattr(train_benchmark, "missing", lambda precision: "")
    monkeypatch.setattr(train_benchmark, "measure_rates", lambda dtype: DeviceRates(1.0, 1.0))
    command = ["--models=test", f"--out={tmp_path}", "--repeats=1", "--steps=2"]
    for more in (["--no_torch"], ["--no_torch"], ["--no_compile"], [], [], ["--steps=3"]):
        train_benchmark.main([*command, *more])
    assert asked == [(False, True), (True, False), (True, True), (True, True)]
    (row,) = json.loads((tmp_path / "train.json").read_text())
    assert row["seconds"]["PyTorch"] == [2.0] * 3
    shown = capsys.readouterr().out
    assert "MFU 50%" in shown and "MFU 25%" in shown and "MFU 17%" in shown


def test_parts_of_a_step_are_those_of_one_device(monkeypatch):
    """Of eight here, each of which has every operation in the profile."""
    text = '%dot.2 = f32[2] dot(%p, %p), metadata={op_name="jit(step)/jvp(Model.logits)/dot"}'
    monkeypatch.setattr(step_profile, "_events", lambda profiles: [("dot.2", 1e9)] * 16)
    assert step_profile.seconds_by_part(lambda: 1, text, steps=2) == {"head and loss": 1}


def test_several_accelerators_multiply_one_ones_rate(monkeypatch):
    assert all_devices(2.0) == 2  # those of a CPU share its cores
    monkeypatch.setattr("jax.default_backend", lambda: "gpu")
    assert all_devices(2.0) == 16


def test_an_operation_belongs_to_a_part():
    inner = "jit(step)/transpose(jvp(Model.hidden))/encoder/layers_0/mlp/up/dot_general"
    text = f"""HloModule jit_step

%fused (p: f32[2]) -> f32[2] {{
  %a = f32[2] add(%p, %p), metadata={{op_name="{inner}"}}
}}

ENTRY %main (p: f32[2]) -> f32[2] {{
  %fusion.1 = f32[2] fusion(%p), kind=kLoop, calls=%fused
  %dot.2 = f32[2] dot(%p, %p), metadata={{op_name="jit(step)/jvp(Model.logits)/dot_general"}}
  ROOT %mul.3 = f32[2] multiply(%p, %p), metadata={{op_name="jit(step)/mul"}}
}}
"""
    parts = step_profile.parts_of_program(text)
    assert parts["fusion.1"] == "MLP, backward"
    assert parts["dot.2"] == "head and loss"
    assert parts["mul.3"] == "optimizer"


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(ConfigError, match="unknown preset 'tset'"):
        train_benchmark.main(["--models=tset"])
    with pytest.raises(ConfigError, match="float16"):
        train_benchmark.main(["--dtypes=float16"])
    with pytest.raises(ConfigError, match="--repeats is 0; expected 1 or more"):
        train_benchmark.main(["--repeats=0"])
