"""Bad configurations are answered by name, before anything is computed."""

from __future__ import annotations

import pathlib
import textwrap

import pytest
from ml_collections import ConfigDict

from encdec.errors import ConfigError
from encdec.train.config import RunConfig, complete, differences, parse_config, to_dict
from encdec.train.sharding import mesh_shape
from encdec.train.train_command import load_config, split_overrides

PRETRAIN = str(pathlib.Path(__file__).resolve().parents[2] / "configs" / "pretrain.py")


def test_defaults_survive_the_round_trip():
    assert parse_config({}) == RunConfig()
    run = parse_config({"model": "test", "optimizer": {"learning_rate": 1}})
    assert run.optimizer.learning_rate == 1.0 and type(run.optimizer.learning_rate) is float
    assert parse_config(to_dict(run)) == run
    assert parse_config(complete(ConfigDict({"model": "test"}))) == parse_config({"model": "test"})


@pytest.mark.parametrize(
    "values, words",
    [
        ({"batchsize": 3}, ["batchsize", "batch_size"]),
        (
            {"optimizer": {"lerning_rate": 1e-3}},
            ["optimizer.lerning_rate", "optimizer.learning_rate"],
        ),
        ({"learning_rate": 1e-3}, ["learning_rate", "optimizer.learning_rate"]),
        ({"batch_size": "many"}, ["config.batch_size", "'many'", "int"]),
        ({"batch_size": 8.0}, ["config.batch_size", "8.0", "int"]),
        ({"data": {"shuffle": 1}}, ["config.data.shuffle", "bool"]),
        ({"mesh": 8}, ["config.mesh", "8", "group"]),
        ({"optimizer": {"name": "adam"}}, ["optimizer.name", "'adam'", "did you mean 'adamw'"]),
        ({"batch_size": 0}, ["config.batch_size", "0", "positive"]),
        ({"batch_size": 10, "accumulation": 4}, ["config.batch_size", "10", "accumulation", "4"]),
        ({"steps": 10, "schedule": {"warmup_steps": 10}}, ["schedule.warmup_steps", "10", "steps"]),
        ({"schedule": {"name": "rsqrt"}}, ["schedule.warmup_steps", "rsqrt"]),
        ({"loss": {"label_smoothing": 1.0}}, ["loss.label_smoothing", "1.0"]),
        ({"optimizer": {"b2": 1.0}}, ["optimizer.b2", "1.0"]),
        ({"mesh": {"data": -1, "fsdp": -1}}, ["config.mesh", "-1", "one axis"]),
        ({"mesh": {"tensor": 0}}, ["config.mesh.tensor", "0"]),
        ({"seed": -1}, ["config.seed", "-1"]),
        ({"model": "330"}, ["'330'", "330m"]),
        ({"model_overrides": {"d_modle": 32}}, ["d_modle", "d_model"]),
        ({"model_overrides": {"d_model": "wide"}}, ["d_model", "wide", "int"]),
        ({"model_overrides": {"cpu_shards": 2}}, ["model_overrides.cpu_shards", "inference"]),
    ],
)
def test_bad_values_name_themselves_and_what_is_wanted(values, words):
    with pytest.raises(ConfigError) as error:
        parse_config(values)
    for word in words:
        assert word in str(error.value), str(error.value)


def test_overrides_of_every_type():
    config = load_config(
        f"{PRETRAIN}:test",
        [
            "--config.batch_size=16",
            "--config.optimizer.learning_rate=1",
            "--noconfig.data.shuffle",
            "--config.model_overrides.dtype=bfloat16",
            "--config.model_overrides.scan_layers=false",
            "--config.mesh.data=-1",
            "--config.data.records=a=b",
        ],
    )
    run = parse_config(config)
    assert (run.model, run.batch_size, run.optimizer.learning_rate) == ("test", 16, 1.0)
    assert run.data.shuffle is False and run.data.records == "a=b"
    assert run.model_config().dtype == "bfloat16" and not run.model_config().execution.scan_layers


def test_overrides_may_follow_a_space():
    argv = ["--workdir", "w", "--config.mesh.data", "-1", "--config", "f.py", "--noconfig.x", "--a"]
    assert split_overrides(argv) == (
        ["--config.mesh.data=-1", "--noconfig.x"],
        ["--workdir", "w", "--config", "f.py", "--a"],
    )


@pytest.mark.parametrize(
    "override, words",
    [
        (
            "--config.optimizer.learning_rat=1",
            ["optimizer.learning_rat", "optimizer.learning_rate"],
        ),
        ("--config.model_overrides.d_modell=8", ["d_modell", "model_overrides.d_model"]),
        ("--config.model_overrides.kernel_parts=2", ["kernel_parts", "inference chooses it"]),
        ("--config.batch_size=many", ["config.batch_size", "'many'"]),
        ("--config.steps=1e3", ["config.steps", "'1e3'"]),
        ("--config.optimizer.learning_rate=fast", ["config.optimizer.learning_rate", "'fast'"]),
        ("--config.data.shuffle=perhaps", ["config.data.shuffle", "'perhaps'"]),
        ("--config.model_overrides.d_model=wide", ["model_overrides.d_model", "'wide'"]),
        ("--config.optimizer=adamw", ["config.optimizer", "group"]),
        ("--config.batch_size", ["batch_size"]),
    ],
)
def test_bad_overrides(override, words):
    with pytest.raises(ConfigError) as error:
        load_config(f"{PRETRAIN}:test", [override])
    for word in words:
        assert word in str(error.value), str(error.value)


@pytest.mark.parametrize(
    "content, words",
    [
        (None, ["does not exist", "configs/pretrain.py"]),
        ("x = 1", ["get_config"]),
        ("def get_config(): return {}", ["dict", "ConfigDict"]),
        ("def get_config(: return", ["invalid syntax"]),
        (
            """
     from ml_collections import ConfigDict
     def get_config(): return ConfigDict({"stepps": 3})
     """,
            ["stepps", "steps"],
        ),
        (
            """
     from ml_collections import ConfigDict
     def get_config(): return ConfigDict({"steps": "three"})
     """,
            ["steps", "three"],
        ),
    ],
)
def test_bad_config_files(tmp_path, content, words):
    path = tmp_path / "config.py"
    if content is not None:
        path.write_text(textwrap.dedent(content))
    with pytest.raises(ConfigError) as error:
        parse_config(load_config(str(path)))
    for word in words:
        assert word in str(error.value), str(error.value)


def test_the_shipped_config_lists_every_field():
    full = complete(ConfigDict())
    listed = load_config(PRETRAIN).to_dict()
    from encdec.train.train_command import read_config_file

    shipped = read_config_file(PRETRAIN).to_dict()
    missing = [
        name
        for name in differences(full.to_dict(), shipped)
        if not name.startswith("model_overrides") and _get(shipped, name) is None
    ]
    assert not missing and listed["model"] == "330m"


def _get(values, name):
    for part in name.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values


@pytest.mark.parametrize(
    "mesh, devices, shape",
    [
        ({}, 8, (8, 1, 1)),
        ({"data": 2, "fsdp": -1, "tensor": 2}, 8, (2, 2, 2)),
        ({"data": 1, "fsdp": 8}, 8, (1, 8, 1)),
    ],
)
def test_mesh_shapes(mesh, devices, shape):
    assert mesh_shape(parse_config({"mesh": mesh}).mesh, devices) == shape


@pytest.mark.parametrize("mesh", [{"data": 4}, {"tensor": 3}, {"data": 16}])
def test_meshes_that_do_not_fit_the_devices(mesh):
    with pytest.raises(ConfigError, match="8 devices|are 8"):
        mesh_shape(parse_config({"mesh": mesh}).mesh, 8)
