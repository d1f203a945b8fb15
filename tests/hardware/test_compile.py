"""The command on a machine without a TPU: names, errors, fitting, and a real compilation."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
import pathlib
import types

import jax
import pytest

from encdec.cost.chips import find_chip
from encdec.errors import ConfigError
from encdec.hardware import compile_command, topology
from encdec.hardware.compile import (
    CompiledProgram,
    CompiledStep,
    DoesNotFit,
    PeakMemory,
    checked,
    halved,
    nearest_fit,
    smaller,
)
from encdec.hardware.compile_command import main
from encdec.hardware.compile_report import model_name
from encdec.hardware.decode import CompiledDecoding
from encdec.hardware.predict import Collective, TimePrediction
from encdec.hardware.search import search, search_meshes
from encdec.hardware.topology import find_topology, generation_named, parse_name
from encdec.model import build_model, init_params, preset
from encdec.train.compiler_options import BY_DEVICE_KIND, compiler_options
from encdec.train.run_config import RunConfig, load_config, parse_config
from encdec.train.run_fields import MeshConfig
from encdec.train.sharding import make_mesh
from launch.slices import CHIPS, Slices

CONFIG = str(pathlib.Path(__file__).resolve().parents[2] / "configs" / "pretrain.py")
needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the TPU compiler, libtpu, is not installed"
)


def test_names():
    assert parse_name("v5e:4x4") == ("v5e", (4, 4), 1)
    assert parse_name("v5p:2x2x4*2") == ("v5p", (2, 2, 4), 2)
    for wrong in ("v5e", "v9:4x4", "v5e:4"):
        with pytest.raises(ConfigError, match="v5e:4x4"):
            parse_name(wrong)
    with pytest.raises(ConfigError, match="v5p has 1x1x1, 2x2x1, .* up to 6,144 chips"):
        parse_name("v5p:4x4")
    with pytest.raises(ConfigError, match="no slices"):
        parse_name("v5e:4x4*0")


@pytest.mark.parametrize("kind", CHIPS)
def test_a_topology_exists_where_the_launchers_know_its_slice(kind):
    """But for one chip, which is compiled for alone."""
    sides = (0, 1, 2, 3, 4, 5, 8, 12, 16, 24, 28, 32)
    for shape in itertools.product(sides, repeat=CHIPS[kind].sides):
        known = []
        for parse in (Slices.parse, parse_name):
            try:
                parse(f"{kind}:{'x'.join(map(str, shape))}")
                known.append(True)
            except (ValueError, ConfigError):
                known.append(False)
        assert known[0] == known[1] or shape == (1, 1, 1), shape


@pytest.mark.parametrize("option", ["--rows=-1", "--rows=0", "--layers=0", "--inputs_length=0"])
def test_numbers_that_cannot_be_are_refused(option):
    with pytest.raises(ConfigError, match=f"{option.partition('=')[0]} is .* 1 or more"):
        main([f"--config={CONFIG}:test", "--topology=v5e:2x2", option])


def test_clocks_follow_from_peak_rates():
    """GHz as the makers' matrix units and peak rates imply."""
    clocks = {"v4": 1.05, "v5e": 1.5, "v5p": 1.75, "v6e": 1.75, "tpu7x": 2.2}
    for name, ghz in clocks.items():
        assert generation_named(name).clock_hz / 1e9 == pytest.approx(ghz, rel=0.01)


def test_without_the_compiler_the_error_says_how_to_get_it(monkeypatch):
    find_topology.cache_clear()
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install -e .*\[tpu\]"):
        find_topology("v5e:2x2")
    find_topology.cache_clear()


def test_rows_of_a_device_are_a_micro_batch_s_in_training_alone():
    run = parse_config({"model": "test", "batch_size": 4, "accumulation": 4})
    where = types.SimpleNamespace(name="v5e:2x2", devices=range(4), slices=1)
    kind = types.SimpleNamespace(check=lambda run, topology: None)
    for what, rows in {"train": 64, "layer": 64, "decode": 16}.items():
        options = types.SimpleNamespace(rows=4, search=None, what=what)
        assert compile_command._plan(run, where, options, kind)[0].batch_size == rows


def test_nearest_fit_tries_remat_before_batches():
    run = parse_config({"model": "330m", "batch_size": 64})
    tried = []

    def attempt(variant):
        tried.append((variant.model_config().execution.remat, variant.batch_size))
        if variant.batch_size > 16:
            raise DoesNotFit("too large")
        return "compiled"

    variant, step = nearest_fit(smaller(run), attempt)
    assert (variant.batch_size, step) == (16, "compiled")
    assert tried == [("full", 64), ("full", 32), ("full", 16)]
    assert (
        nearest_fit(
            smaller(dataclasses.replace(run, batch_size=32)),
            lambda r: attempt(dataclasses.replace(r, batch_size=64)),
        )
        is None
    )
    assert [r.batch_size for r in smaller(RunConfig(batch_size=6))] == [6, 3]
    assert [r.batch_size for r in halved(RunConfig(batch_size=24, accumulation=4))] == [12]


@dataclasses.dataclass(frozen=True)
class Predicted:
    mfu: float
    step_seconds: float = 1.0


def test_search_goes_over_what_is_asked_and_stops_where_nothing_fits():
    """A made-up chip: each split of the state and each remat policy has its own largest batch."""
    room = {"none": 16, "dots": 32, "attention": 64, "full": 128}
    tried = []

    def attempt(run):
        remat, shards = run.model_config().execution.remat, run.mesh.fsdp
        tried.append((shards, remat, run.batch_size))
        if run.batch_size > room[remat] * (2 if shards > 1 else 1):
            raise DoesNotFit("out of memory")
        return Predicted(run.batch_size / 1000 - 0.001 * shards - 0.1 * (remat == "full"))

    run = parse_config({"model": "test", "batch_size": 16})
    divides = lambda run: run.batch_size % 8 == 0
    find = lambda run, over, meshes: search(run, attempt, divides, over, meshes)
    found = find(run, ("batch", "remat"), search_meshes(run.mesh, 32))
    rates = [step.mfu for step in found.steps]
    assert rates[0] == pytest.approx(0.256 - 0.016 - 0.1) and rates == sorted(rates)[::-1]
    assert len(found.steps) + len(found.unfit) == len(tried)
    assert {shards for shards, _, _ in tried} == {1, 16, 32}
    assert {remat for _, remat, _ in tried} == set(room)
    tried.clear()
    find(run, ("remat",), [run.mesh])
    assert [(shards, rows) for shards, _, rows in tried] == [(1, 16)] * 4
    # A batch that does not fit is halved until it does, or until it no longer divides.
    tried.clear()
    large = dataclasses.replace(run, batch_size=64)
    assert len(find(large, ("batch", "remat"), [run.mesh]).steps) == 5
    assert [rows for _, remat, rows in tried if remat == "dots"] == [64, 32]
    room = dict.fromkeys(room, 4)
    with pytest.raises(DoesNotFit, match="with 64 rows, nor with fewer, tried down to 8: out of"):
        find(large, ("batch", "remat"), [run.mesh])


def test_search_keeps_the_tensor_axis_and_splits_the_state_within_slices():
    meshes = search_meshes(MeshConfig(data=-1, tensor=2), 64)
    assert [(m.data, m.fsdp, m.tensor) for m in meshes] == [(32, 1, 2), (2, 16, 2), (1, 32, 2)]
    meshes = search_meshes(MeshConfig(), 64, slices=2)
    assert [(m.data, m.fsdp) for m in meshes] == [(64, 1), (4, 16), (2, 32)]
    with pytest.raises(ConfigError, match="tensor is 3"):
        search_meshes(MeshConfig(tensor=3), 16)


# The command with a made-up compiler for real topologies.


def part(**changes) -> dict:
    traffic = Collective("x", "all-gather", 2e6, 4, 0.002, 0.001, "")
    return {
        "memory": PeakMemory(1 << 30, 2 << 30, 3 << 30, 4 << 30, 0, 0, 16 << 30),
        "prediction": TimePrediction(0.1, 0.0, (traffic,), (), (), {"custom-call Eigh": 2}),
        "compile_seconds": 1.0,
        "text": "HloModule",
    } | changes


@pytest.fixture
def compiler(monkeypatch):
    """Steps fit with so many rows per device, by topology; the list holds what was compiled."""
    room, compiled = {"v5e:2x2": 8, "v5e:2x4": 1, "v5e:4x4": 8}, []

    def compile_step(run, topology, inputs, targets, compiler_options):
        compiled.append((topology.name, run.batch_size, run.model_config().execution.remat))
        if run.batch_size > room[topology.name] * len(topology.devices):
            raise DoesNotFit(f"{topology.name} is full.")
        return CompiledStep(
            **part(),
            run=run,
            topology=topology,
            mesh=(len(topology.devices), 1, 1),
            inputs=inputs,
            targets=targets,
            model_flops=1e12 * run.batch_size,
            unsharded=(),
        )

    def compile_decoding(run, topology, inputs, targets, compiler_options):
        compile_step(run, topology, inputs, targets, compiler_options)
        return CompiledDecoding(
            run,
            topology,
            (4, 1, 1),
            inputs,
            targets,
            CompiledProgram(**part()),
            CompiledProgram(**part()),
            (),
        )

    monkeypatch.setattr("encdec.hardware.compile.compile_step", compile_step)
    monkeypatch.setattr("encdec.hardware.decode.compile_decoding", compile_decoding)
    return compiled


def compile_for(topology: str, *more: str) -> int:
    return main([f"--config={CONFIG}:test", f"--topology={topology}", *more])


@needs_compiler
def test_a_topology_that_is_too_small_hides_none_of_the_others(compiler, tmp_path):
    file = tmp_path / "report.json"
    names = "v5e:2x2,v5e:2x4,v5e:4x4"
    with pytest.raises(DoesNotFit, match="^v5e:2x4: nothing fits"):
        compile_for(names, "--rows=4", "--search=remat", f"--out={file}")
    reports = json.loads(file.read_text())
    assert [report["topology"] for report in reports if report["best"]] == ["v5e:2x2", "v5e:4x4"]
    assert reports[0]["best"] and len(reports) == 8  # four remat policies on each


@needs_compiler
def test_a_searchs_report_holds_what_was_tried(compiler, tmp_path):
    file = tmp_path / "report.json"
    assert compile_for("v5e:2x4", "--rows=4", "--search=batch,remat", f"--out={file}") == 0
    best, *others = json.loads(file.read_text())
    assert best["best"] and best["batch_size"] == 8 and not any(o["best"] for o in others)
    assert best["mfu"] >= max(o["mfu"] for o in others)
    assert 1 + len(others) + len(best["does_not_fit"]) == len(compiler)
    assert best["does_not_fit"][0] == {
        "mesh": {"data": -1, "fsdp": 1, "tensor": 1},
        "remat": "none",
        "batch_size": 32,
        "reason": "v5e:2x4 is full.",
    }


@needs_compiler
def test_what_can_be_known_before_is_said_before_anything_is_compiled(compiler, tmp_path):
    with pytest.raises(ConfigError, match=r"v5e:4x4: .*batch_size is 8.*multiple of 16"):
        compile_for("v5e:2x2,v5e:4x4", "--config.batch_size=8")
    with pytest.raises(ConfigError, match=r"v5e:4x4: .*batch_size is 8.*multiple of 16"):
        compile_for("v5e:4x4", "--config.batch_size=8", "--what=decode")
    with pytest.raises(ConfigError, match="--out=.*none/report.json cannot be written: No such"):
        compile_for("v5e:2x2", f"--out={tmp_path}/none/report.json")
    with pytest.raises(ConfigError, match="--hlo=.* cannot be written: Is a directory"):
        compile_for("v5e:2x2", f"--hlo={tmp_path}")
    assert not compiler and not list(tmp_path.iterdir())


@needs_compiler
def test_the_figures_are_written_after_each_topology(compiler, tmp_path):
    file = tmp_path / "report.json"
    written = []

    def interrupted(steps, console):
        written.append(json.loads(file.read_text()))
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("encdec.hardware.compile_report.compare", interrupted)
        with pytest.raises(KeyboardInterrupt):
            compile_for("v5e:2x2,v5e:4x4", "--config.batch_size=16", f"--out={file}")
    assert [report["topology"] for report in written[0]] == ["v5e:2x2", "v5e:4x4"]


@needs_compiler
def test_decoding_reports_memory_collectives_and_the_nearest_fit(compiler, tmp_path, capsys):
    file = tmp_path / "report.json"
    assert compile_for("v5e:2x2", "--what=decode", "--rows=8", f"--out={file}") == 0
    said = capsys.readouterr().out
    for words in (
        "input keys and values",
        "activations",
        "Collectives of prefill",
        "Collectives of a later token",
        "all-gather of 4",
        "2 custom-call Eigh",
    ):
        assert words in said, said
    (report,) = json.loads(file.read_text())
    for name in ("prefill", "step"):
        assert report[name]["collectives"]["all-gather of 4"]["bytes"] == 2e6
        assert report[name]["operations_without_estimate"] == {"custom-call Eigh": 2}
    with pytest.raises(
        DoesNotFit, match=r"nearest settings that do: --config.batch_size=32 \(predicted"
    ):
        compile_for("v5e:2x2", "--what=decode", "--rows=32")


@pytest.mark.parametrize("model, remat", [("330m-tpu", "dots"), ("1b-tpu-dec", "attention")])
def test_configs_of_shaped_models_carry_the_fast_settings(model, remat):
    run = parse_config(load_config(f"{CONFIG}:{model}", []))
    config = run.model_config()
    assert (config.execution.remat, config.execution.scan_layers, run.mesh.data, run.mesh.fsdp) == (
        remat,
        False,
        -1,
        16,
    )
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
    assert (
        main(
            [
                f"--config={CONFIG}:{model}",
                "--topology=v5e:2x2",
                "--inputs_length=128",
                "--targets_length=128",
                "--config.batch_size=8",
                f"--out={file}",
            ]
        )
        == 0
    )
    (report,) = json.loads(file.read_text())
    memory = report["memory_bytes"]
    names = ("parameters", "optimizer", "batch", "temporary", "outputs", "code")
    assert sum(memory[name] for name in names) == memory["peak"] < memory["limit"]
    # AdamW's two moments and a step count next to the parameters, all whole on every device.
    assert 2 * memory["parameters"] <= memory["optimizer"] <= 2 * memory["parameters"] + 64
    assert 0 < report["mfu"] < 1
    assert report["step_seconds"] == pytest.approx(
        sum(
            report[k]
            for k in ("compute_seconds", "pallas_roofline_seconds", "collective_exposed_seconds")
        )
    )
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
    assert (
        main(
            [
                f"--config={CONFIG}:test",
                "--topology=v5e:2x2*2",
                "--inputs_length=128",
                "--targets_length=128",
                "--config.batch_size=16",
                "--config.mesh.data=-1",
                "--config.mesh.fsdp=4",
                f"--out={file}",
            ]
        )
        == 0
    )
    (report,) = json.loads(file.read_text())
    assert report["mesh"] == {"data": 2, "fsdp": 4, "tensor": 1}
    # Parameters are gathered within a slice; what goes over all devices or across is summed.
    kinds = set(report["collectives"])
    assert "all-gather of 4" in kinds
    assert {kind for kind in kinds if not kind.endswith("of 4")} <= {
        "all-reduce of 2",
        "all-reduce of 8",
        "reduce-scatter of 8",
    }


@pytest.mark.slow
@needs_compiler
def test_compiles_generation_a_layer_and_the_calibration(tmp_path, capsys):
    file = tmp_path / "report.json"

    def report(*arguments):
        assert (
            main(
                [
                    f"--config={CONFIG}:test",
                    "--topology=v5e:2x2",
                    "--config.batch_size=8",
                    f"--out={file}",
                    *arguments,
                ]
            )
            == 0
        )
        return json.loads(file.read_text())[0]

    decoding = report("--what=decode", "--inputs_length=128", "--targets_length=32")
    for part in ("prefill", "step"):
        memory = decoding[part]["memory_bytes"]
        assert 0 < memory["parameters"] < memory["peak"] < memory["limit"]
    assert 0 < decoding["step"]["seconds"] < decoding["prefill"]["seconds"]
    assert decoding["seconds"] == pytest.approx(
        decoding["prefill"]["seconds"] + 31 * decoding["step"]["seconds"]
    )
    layer = report("--what=layer", "--inputs_length=128", "--config.model_overrides.dtype=bfloat16")
    assert layer["rows"] == 2 and 0 < layer["share_of_peak"] < 1
    calibration = report("--what=calibrate")
    assert 0.8 < calibration["share_of_peak"] <= 1  # docs/pod.md has both
    assert 0.2 < calibration["share_of_bandwidth"] <= 1
    assert "% of the peak rate" in capsys.readouterr().out


def test_a_report_names_a_preset_alone_where_it_is_that_model():
    run = RunConfig(model="test", model_overrides={"remat": "full", "scan_layers": True})
    assert model_name(run) == "test"
    longer = dataclasses.replace(run, model_overrides={"decoder_layers": 3})
    shapes = jax.eval_shape(
        lambda: init_params(build_model(longer.model_config()), jax.random.key(0))
    )
    parameters = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert model_name(longer) == f"test with other fields ({parameters:,} parameters)"
