"""``encdec benchmark inference``: settings, ratios and what is written."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import types

import pytest

from encdec.benchmarks import inference_benchmark, transformers_runtime
from encdec.benchmarks.device_rates import DeviceRates
from encdec.benchmarks.generation import GenerationTiming
from encdec.benchmarks.generation_memory import measure_peaks
from encdec.benchmarks.inference_benchmark import OURS, evaluate, main, ratios
from encdec.cost.flops import cache_bytes, generation_flops, weight_bytes
from encdec.errors import ConfigError
from encdec.model import preset


def test_every_setting_is_measured_and_written(tmp_path, capsys, monkeypatch):
    def peaks(models, settings, dtype):
        """Measured below, in processes of their own."""
        return {(name, one): 1000 + one[1] for name in models for one in settings}

    monkeypatch.setattr(inference_benchmark, "measure_peaks", peaks)
    assert (
        main(
            [
                "--model=test",
                "--inputs_length=4,8",
                "--outputs=3",
                "--batches=2",
                "--repeats=2",
                "--peers=parameters",
                "--uncached_inputs=8",
                f"--out={tmp_path}",
            ]
        )
        == 0
    )
    shown = capsys.readouterr().out
    assert "decoder-only, equal parameters, no cache" in shown and "4.7x" in shown
    report = json.loads((tmp_path / "inference.json").read_text())
    settings = {(m["model"], m["cached"], m["batch"], m["inputs"]) for m in report["measured"]}
    peer = "decoder-only, equal parameters"
    assert settings == {
        (OURS, True, 2, 4),
        (peer, True, 2, 4),
        (OURS, True, 2, 8),
        (peer, True, 2, 8),
        (peer, False, 2, 8),
    }
    assert all(m["first_token_seconds"]["low"] > 0 for m in report["measured"])
    # Not measured without a cache.
    peak = lambda m: 1000 + m["inputs"] if m["cached"] else 0
    assert all(m["peak_bytes"] == peak(m) for m in report["measured"])
    # Each ratio is that of the two medians it names.
    found = {(m["model"], m["cached"], m["batch"], m["inputs"]): m for m in report["measured"]}
    for row in report["ratios"]:
        other = found[row["peer"], row["cached"], row["batch"], row["inputs"]]
        mine = found[OURS, True, row["batch"], row["inputs"]]
        assert row["FLOPs"] == pytest.approx(mine["flops"] / other["flops"] - 1)
        assert row["first token"] == pytest.approx(
            mine["first_token_seconds"]["median"] / other["first_token_seconds"]["median"] - 1
        )
    for ending in ("png", "svg"):
        assert (tmp_path / f"inference-batch2-out3.{ending}").stat().st_size > 5000


@pytest.mark.slow
def test_peaks_grow_with_what_is_generated_and_are_of_one_model_each():
    small = preset("test")
    wide = small.replace(d_model=512, mlp_dim=8192, vocab_size=4096)
    peaks = measure_peaks({"small": small, "wide": wide}, [(4, 512, 2), (1, 4, 2)], "float32")
    # Weights, and the hidden layer of the MLP for 4 x 512 tokens next to them. Each model has a
    # process of its own, whose compiler's memory differs by some tens of MB from run to run.
    weights = weight_bytes(wide, "float32") - weight_bytes(small, "float32")
    assert peaks["wide", (1, 4, 2)] > peaks["small", (1, 4, 2)] + weights / 2
    assert peaks["wide", (4, 512, 2)] > peaks["wide", (1, 4, 2)] + 4 * 512 * 8192 * 4


def test_rates_are_shares_of_what_the_machine_can_do():
    config = preset("test")
    timing = GenerationTiming(OURS, True, 16, 5, 2, (0.5,), (2.5,))
    rates = DeviceRates(bytes_per_second=1e6, flops_per_second=1e7)
    found = evaluate(timing, config, rates, "float32")
    flops = generation_flops(config, 16, 5)
    assert found.flops == 2 * flops.total
    assert found.first_token_rate == pytest.approx(2 * flops.first_token.total / 0.5 / 1e7)
    assert found.memory_bytes == (
        weight_bytes(config, "float32") + cache_bytes(config, 16, 5, batch_size=2, dtype="float32")
    )
    # Four later tokens: each reads the decoder's and the head's weights, and the cache so far.
    weights = 4 * (flops.later_tokens.decoder + flops.later_tokens.head) / 2
    cache = 4 * cache_bytes(config, 16, 2, batch_size=2, dtype="float32")
    assert found.decode_floor_share == pytest.approx((weights + cache) / 1e6 / 2.0)
    assert found.bytes_moved == pytest.approx(weight_bytes(config, "float32") + weights + cache)
    assert found.cache_bytes == found.memory_bytes - weight_bytes(config, "float32")
    # Half the weights' bytes, a quarter of the floor less the cache's half.
    half = evaluate(timing, config, rates, "bfloat16")
    assert half.decode_floor_share == pytest.approx(found.decode_floor_share / 2)


def test_each_precision_has_its_own_rates(monkeypatch, tmp_path):
    """Of bfloat16 on a CPU, which ``measure_rates`` leaves out, float32's read rate."""
    config, peer = preset("test"), "transformers-bfloat16"
    timing = lambda name: GenerationTiming(name, True, 4, 3, 1, (1.0,), (2.0,))
    fakes = {
        "random_params": lambda config: None,
        "time_generation": lambda *_, **__: [timing(OURS), timing(peer)],
        "measure_rates": lambda dtype: DeviceRates(*{"float32": (4, 1), "bfloat16": (0, 2)}[dtype]),
        "ReadRate": lambda: types.SimpleNamespace(best=lambda tries: 5.0),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(inference_benchmark, name, fake)
    for name in ("TransformersModel", "artefact"):
        monkeypatch.setattr(transformers_runtime, name, lambda *given: None)
    rates, (ours, theirs) = inference_benchmark.measure(
        {OURS: config}, (4,), (3,), (1,), precisions={peer: "bfloat16"}, folder=tmp_path
    )
    assert rates == DeviceRates(4, 1)
    assert theirs.first_token_rate == ours.first_token_rate / 2
    assert theirs.decode_floor_share == pytest.approx(ours.decode_floor_share / 2 * 4 / 5)


def test_ratios_are_of_equal_settings():
    config, rates = preset("test"), DeviceRates(1e6, 1e7)
    make = lambda name, inputs, first: evaluate(
        GenerationTiming(name, True, inputs, 5, 1, (first,), (first + 1.0,)),
        config,
        rates,
        "float32",
    )
    rows = ratios(
        [make(OURS, 4, 1.0), make("peer", 4, 2.0), make(OURS, 8, 3.0), make("peer", 8, 2.0)]
    )
    assert [(row["inputs"], row["first token"]) for row in rows] == [(4, -0.5), (8, 0.5)]
    assert all(row["tokens per second"] == 1 and row["memory"] == 0 for row in rows)
    assert all(row["peak memory"] is None for row in rows)
    big, small = (
        dataclasses.replace(make(name, 4, 1.0), peak_bytes=peak)
        for name, peak in (("peer", 400), (OURS, 300))
    )
    assert ratios([small, big])[0]["peak memory"] == -0.25


@pytest.mark.slow
def test_transformers_generates_beside_ours_for_every_batch(tmp_path):
    for package in ("torch", "transformers"):
        pytest.importorskip(package, reason=f"needs {package}: the extra hf of setup.py")
    # In a process of its own: torch's threads stay with the process that has loaded it.
    subprocess.run(
        [
            sys.executable,
            "-m",
            "encdec",
            "benchmark",
            "inference",
            "--model=test",
            "--inputs_length=8",
            "--outputs=3",
            "--batches=1,2",
            "--repeats=1",
            "--peers=transformers",
            f"--out={tmp_path}",
        ],
        check=True,
    )
    report = json.loads((tmp_path / "inference.json").read_text())
    wanted = {(name, batch, 3) for name in (OURS, "transformers") for batch in (1, 2)}
    assert {(m["model"], m["batch"], m["outputs"]) for m in report["measured"]} == wanted
    assert {row["peer"] for row in report["ratios"]} == {"transformers"}
    for one in report["measured"]:
        assert one["first_token_seconds"]["low"] > 0 and 2**26 < one["peak_bytes"] < 2**33
    assert len(list(tmp_path.glob("inference-batch*.png"))) == 2


def test_transformers_is_refused_where_it_cannot_run(monkeypatch):
    monkeypatch.setattr(transformers_runtime, "missing", lambda *_: "torch is not installed")
    with pytest.raises(ConfigError, match="'transformers', but torch is not installed"):
        main(["--model=test", "--peers=parameters,transformers"])


@pytest.mark.parametrize(
    "argument, message",
    [
        ("--inputs_length=4,x", "not a list of numbers"),
        ("--outputs=0", "below 1"),
        ("--uncached_inputs=7", "expected some of --inputs"),
        ("--peers=size", "expected some of parameters, flops, transformers"),
        ("--model=330m-dec", "expected an encoder-decoder"),
    ],
)
def test_bad_settings_are_refused(argument, message):
    with pytest.raises(ConfigError, match=message):
        main([argument])
