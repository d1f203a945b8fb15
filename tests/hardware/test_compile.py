"""The command on a machine without a TPU: names, errors, fitting, and a real compilation."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json
import pathlib

import pytest
from rich.console import Console

from encdec.errors import ConfigError
from encdec.hardware import topology
from encdec.hardware.command import _search, main, search_meshes
from encdec.hardware.compile import DoesNotFit, checked, nearest_fit, smaller
from encdec.hardware.topology import find_topology, generation_named, parse_name
from encdec.model import preset
from encdec.model.chips import find_chip
from encdec.train.command import load_config
from encdec.train.compiler_options import BY_DEVICE_KIND, compiler_options
from encdec.train.config import MeshConfig, RunConfig, parse_config
from encdec.train.sharding import make_mesh

CONFIG = str(pathlib.Path(__file__).resolve().parents[2] / "configs" / "pretrain.py")
needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the TPU compiler, libtpu, is not installed")


def test_names():
    assert parse_name("v5e:4x4") == ("v5e", (4, 4), 1)
    assert parse_name("v5p:2x2x4*2") == ("v5p", (2, 2, 4), 2)
    for wrong in ("v5e", "v9:4x4", "v5e:4"):
        with pytest.raises(ConfigError, match="v5e:4x4"):
            parse_name(wrong)
    with pytest.raises(ConfigError, match="wanted 3"):
        parse_name("v5p:4x4")


def test_clocks_follow_from_peak_rates():
    """GHz as the makers' matrix units and peak rates imply."""
    clocks = {"v4": 1.05, "v5e": 1.5, "v5p": 1.75, "v6e": 1.75, "tpu7x": 2.2}
    for name, ghz in clocks.items():
        assert generation_named(name).clock_hz / 1e9 == pytest.approx(ghz, rel=0.01)


def test_without_the_compiler_the_error_says_how_to_get_it(monkeypatch):
    find_topology.cache_clear()
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'encdec\[tpu\]'"):
        find_topology("v5e:2x2")
    find_topology.cache_clear()


def test_nearest_fit_tries_remat_before_batches():
    run = RunConfig(model="330m", batch_size=64)
    tried = []

    def attempt(variant):
        tried.append((variant.model_config().remat, variant.batch_size))
        if variant.batch_size > 16:
            raise DoesNotFit("too large")
        return "compiled"

    variant, step = nearest_fit(run, attempt)
    assert (variant.batch_size, step) == (16, "compiled")
    assert tried == [("full", 64), ("full", 32), ("full", 16)]
    assert nearest_fit(dataclasses.replace(run, batch_size=32), lambda r: attempt(
        dataclasses.replace(r, batch_size=64))) is None
    assert [r.batch_size for r in smaller(RunConfig(batch_size=6))] == [6, 3]


@dataclasses.dataclass(frozen=True)
class Predicted:
    mfu: float
    step_seconds: float = 1.0


def test_search_goes_over_what_is_asked_and_stops_where_nothing_fits(monkeypatch):
    """A made-up chip: each split of the state and each remat policy has its own largest batch."""
    monkeypatch.setattr("encdec.hardware.report.compare", lambda steps, console: None)
    quiet = Console(file=io.StringIO())
    room = {"none": 16, "dots": 32, "attention": 64, "full": 128}
    tried = []

    def attempt(run):
        remat, shards = run.model_config().remat, run.mesh.fsdp
        tried.append((shards, remat, run.batch_size))
        if run.batch_size > room[remat] * (2 if shards > 1 else 1):
            raise DoesNotFit("out of memory")
        return Predicted(run.batch_size / 1000 - 0.001 * shards - 0.1 * (remat == "full"))

    run = RunConfig(model="test", batch_size=16)
    best = _search(run, attempt, ("batch", "remat", "mesh"), 32, quiet)
    assert best.mfu == pytest.approx(0.256 - 0.016 - 0.1)
    assert {shards for shards, _, _ in tried} == {1, 16, 32}
    assert {remat for _, remat, _ in tried} == set(room)
    tried.clear()
    _search(run, attempt, ("remat",), 32, quiet)
    assert [(shards, rows) for shards, _, rows in tried] == [(1, 16)] * 4
    with pytest.raises(ConfigError, match="nothing fits, from 512 rows up: out of memory"):
        _search(dataclasses.replace(run, batch_size=512), attempt, ("batch",), 32, quiet)


def test_search_keeps_the_tensor_axis():
    meshes = search_meshes(MeshConfig(data=-1, tensor=2), 64)
    assert [(m.data, m.fsdp, m.tensor) for m in meshes] == [(32, 1, 2), (2, 16, 2), (1, 32, 2)]


@pytest.mark.parametrize("model, remat", [("330m-tpu", "dots"), ("1b-tpu-dec", "attention")])
def test_configs_of_shaped_models_carry_the_fast_settings(model, remat):
    run = parse_config(load_config(f"{CONFIG}:{model}", []))
    config = run.model_config()
    assert (config.remat, config.scan_layers, run.mesh.data, run.mesh.fsdp) == (
        remat, False, -1, 16)
    assert config.d_model % run.mesh.fsdp == 0
    assert parse_config(load_config(f"{CONFIG}:330m", [])).model_config() == preset("330m")


def test_every_option_of_the_compiler_is_for_a_chip_that_is_known():
    assert compiler_options("cpu") == {}
    for kind in BY_DEVICE_KIND:
        assert find_chip(kind), kind


def test_a_prediction_above_the_peak_rate_is_refused():
    assert checked(Predicted(0.6)).mfu == 0.6
    with pytest.raises(RuntimeError, match="137 %"):
        checked(Predicted(1.371))


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("model", ["test", "test-dec"])
def test_compiles_the_real_step_and_reports(model, tmp_path, capsys):
    file = tmp_path / "report.json"
    assert main([f"--config={CONFIG}:{model}", "--topology=v5e:2x2", "--inputs=128",
                 "--targets=128", "--config.batch_size=8", f"--json={file}"]) == 0
    (report,) = json.loads(file.read_text())
    memory = report["memory_bytes"]
    names = ("parameters", "optimizer", "batch", "temporary", "outputs", "code")
    assert sum(memory[name] for name in names) == memory["peak"] < memory["limit"]
    # AdamW's two moments and a step count beside the parameters, all whole on every device.
    assert 2 * memory["parameters"] <= memory["optimizer"] <= 2 * memory["parameters"] + 64
    assert 0 < report["mfu"] < 1
    assert report["step_seconds"] == pytest.approx(sum(report[k] for k in (
        "compute_seconds", "pallas_roofline_seconds", "collective_exposed_seconds")))
    assert not report["unknown_loops"]
    reduced = report["collectives"]["all-reduce of 4"]
    assert reduced["bytes"] >= memory["parameters"] / 2  # every gradient, bfloat16 at least
    assert any("encdec/" in c["source"] for c in report["costliest"])
    assert "MFU" in capsys.readouterr().out


@pytest.mark.slow
@needs_compiler
def test_slices_are_joined_by_sums_of_gradients_alone(tmp_path):
    two = find_topology("v5e:2x2*2")
    mesh = make_mesh(MeshConfig(data=-1, fsdp=4), two.devices)
    assert [{device.slice_index for device in copy.flat} for copy in mesh.devices] == [{0}, {1}]
    with pytest.raises(ConfigError, match="config.mesh.data to a multiple of 2"):
        make_mesh(MeshConfig(data=1, fsdp=-1), two.devices)
    file = tmp_path / "report.json"
    assert main([f"--config={CONFIG}:test", "--topology=v5e:2x2*2", "--inputs=128",
                 "--targets=128", "--config.batch_size=16", "--config.mesh.data=-1",
                 "--config.mesh.fsdp=4", f"--json={file}"]) == 0
    (report,) = json.loads(file.read_text())
    assert report["mesh"] == {"data": 2, "fsdp": 4, "tensor": 1}
    # Parameters are gathered within a slice; what goes over all devices or across is summed.
    kinds = set(report["collectives"])
    assert "all-gather of 4" in kinds
    assert {kind for kind in kinds if not kind.endswith("of 4")} <= {
        "all-reduce of 2", "all-reduce of 8", "reduce-scatter of 8"}


@pytest.mark.slow
@needs_compiler
def test_compiles_generation_a_layer_and_the_calibrating_product(tmp_path, capsys):
    file = tmp_path / "report.json"

    def report(*arguments):
        assert main([f"--config={CONFIG}:test", "--topology=v5e:2x2", "--config.batch_size=8",
                     f"--json={file}", *arguments]) == 0
        return json.loads(file.read_text())[0]

    decoding = report("--what=decode", "--inputs=128", "--targets=32")
    for part in ("prefill", "step"):
        memory = decoding[part]["memory_bytes"]
        assert 0 < memory["parameters"] < memory["peak"] < memory["limit"]
    assert 0 < decoding["step"]["seconds"] < decoding["prefill"]["seconds"]
    assert decoding["seconds"] == pytest.approx(
        decoding["prefill"]["seconds"] + 31 * decoding["step"]["seconds"])
    layer = report("--what=layer", "--inputs=128", "--config.model_overrides.dtype=bfloat16")
    assert layer["rows"] == 2 and 0 < layer["share_of_peak"] < 1
    product = report("--what=product")
    assert 0.8 < product["share_of_peak"] <= 1  # docs/pod.md: 87.8 %
    assert "% of the peak rate" in capsys.readouterr().out
