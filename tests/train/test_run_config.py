"""Bad configurations are answered by name, before anything is computed."""

from __future__ import annotations

import dataclasses
import pathlib
import textwrap

import pytest
from ml_collections import ConfigDict

from encdec.config_files import field_names, read_config_file, split_overrides
from encdec.errors import ConfigError
from encdec.fields import differing_fields
from encdec.train.run_config import RunConfig, complete, load_config, parse_config, to_dict
from encdec.train.sharding import mesh_shape

PRETRAIN = str(pathlib.Path(__file__).resolve().parents[2] / "configs" / "pretrain.py")


def test_paths_are_what_users_mean(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    run = parse_config({"init_from": "~/a", "distill": {"teacher": "~/b"}})
    assert (run.init_from, run.distill.teacher) == (f"{tmp_path}/a", f"{tmp_path}/b")
    for change in ({"init_from": "hf://b/x"}, {"distill": {"teacher": "gs:/b/x"}}):
        with pytest.raises(ConfigError, match=r"config\.(init_from|distill\.teacher) is .*address"):
            parse_config(change)


def test_defaults_survive_the_round_trip():
    assert parse_config({}) == parse_config(RunConfig())
    assert parse_config(parse_config({})) == parse_config({})
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
        ({"schedule": {"name": "rsqrt", "warmup_steps": 0}}, ["schedule.warmup_steps", "rsqrt"]),
        ({"loss": {"label_smoothing": 1.0}}, ["loss.label_smoothing", "1.0"]),
        ({"optimizer": {"b2": 1.0}}, ["optimizer.b2", "1.0"]),
        ({"mesh": {"data": -1, "fsdp": -1}}, ["config.mesh", "-1", "one axis"]),
        ({"mesh": {"tensor": 0}}, ["config.mesh.tensor", "0"]),
        ({"seed": -1}, ["config.seed", "-1"]),
        ({"model": "330"}, ["'330'", "330m"]),
        ({"optimizer": {"momentum": 0.5}}, ["optimizer.momentum", "0.5", "'muon'"]),
        ({"optimizer": {"decay_rate": 0.5}}, ["optimizer.decay_rate", "'adafactor'"]),
        ({"schedule": {"decay_fraction": 0.5}}, ["schedule.decay_fraction", "'wsd'"]),
        ({"distill": {"beta": 0.3}}, ["distill.beta", "'jensen_shannon'"]),
        ({"optimizer": {"name": "adafactor", "b2": 0.9}}, ["optimizer.b2", "'adamw' or 'muon'"]),
        ({"schedule": {"name": "constant", "final_fraction": 0.1}}, ["final_fraction", "'wsd'"]),
        ({"distill": {"temperature": 2.0}}, ["distill.temperature", "distill.teacher set"]),
        ({"distill": {"loss": "reverse_kl", "tail": "dropped"}}, ["distill.tail", "'reverse_kl'"]),
        ({"eval": {"batches": 2}}, ["eval.batches", "data.eval_records set"]),
        ({"eval": {"every": float("nan")}}, ["eval.every is nan", "a finite number"]),
        ({"optimizer": {"learning_rate": float("inf")}}, ["learning_rate is inf", "finite"]),
        ({"checkpoint": {"every": 1.5}}, ["checkpoint.every is 1.5", "a whole number"]),
        ({"distill": {"warmup_steps": 9}}, ["distill.warmup_steps", "'warmup'"]),
        ({"profile": {"steps": 9}}, ["profile.steps", "profile.first_step set"]),
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


CONFIGS = pathlib.Path(PRETRAIN).parent
LESS = ["optimizer.learning_rate", "schedule.warmup_steps", "steps"]
# All that each shipped config changes of the recipe.
SHIPPED = {
    "pretrain.py:330m": [],
    "pretrain.py:330m-dec-flops": ["model"],
    "pretrain.py:330m-tpu": ["batch_size", "mesh.fsdp", "model"]
    + ["model_overrides.mlp_dropout", "model_overrides.remat", "model_overrides.scan_layers"],
    "distill.py:330m": LESS,
    "finetune.py:xsum": ["checkpoint.keep", "eval.patience", "log_every", *LESS],
}


@pytest.mark.parametrize("source", SHIPPED)
def test_a_shipped_config_is_the_recipe_but_for_what_it_states(source):
    stated = read_config_file(str(CONFIGS / source)).to_dict()
    changed = differing_fields(to_dict(RunConfig()), load_config(str(CONFIGS / source)).to_dict())
    overrides = [name for name in changed if name.startswith("model_overrides.")]
    set_ones = {f"model_overrides.{name}" for name in stated.get("model_overrides", {})}
    kept = [name for name in changed if name not in overrides or name in set_ones]
    assert sorted(kept) == sorted(SHIPPED[source])
    # Nothing is stated that is the default.
    leaves = field_names(ConfigDict(stated))
    groups = {name.rsplit(".", 1)[0] for name in leaves if "." in name}
    assert set(leaves) - groups <= {*SHIPPED[source], "model", "mesh.data"}


def test_a_baseline_and_its_students_train_with_the_same_losses():
    runs = [
        parse_config(load_config(f"{CONFIGS / name}", more))
        for name, more in (
            ("pretrain.py", []),
            ("distill.py", []),
            ("finetune.py", ["--config.eval.patience=0"]),
        )
    ]
    assert len({run.loss for run in runs}) == 1 and runs[0].loss.z_loss == 1e-4
    assert len({dataclasses.replace(run.optimizer, learning_rate=1.0) for run in runs}) == 1


@pytest.mark.parametrize("name", ["pretrain.py", "distill.py", "finetune.py"])
@pytest.mark.parametrize("steps", [1, 2, 20, 100_000])
def test_any_number_of_steps_is_a_run(name, steps):
    """Warmup, evaluations and checkpoints follow; those that are set in steps stay."""
    changes = [f"--config.steps={steps}", "--config.data.eval_records=dev"]
    run = parse_config(load_config(f"{CONFIGS / name}", changes))
    assert 0 <= run.schedule.warmup_steps < steps or steps == 1 == run.schedule.warmup_steps + 1
    assert run.eval.every == run.checkpoint.every == max(1, steps // 20)
    if name == "pretrain.py" and steps == 100_000:
        assert run.schedule.warmup_steps == 1_000
    fixed = ["--config.eval.every=7", "--config.checkpoint.every=7"]
    assert parse_config(load_config(f"{CONFIGS / name}", changes + fixed)).eval.every == 7
    for field in ("eval.every", "checkpoint.every", "schedule.warmup_steps"):
        with pytest.raises(ConfigError, match=rf"config.{field} is 2.5; expected a whole number"):
            parse_config(load_config(f"{CONFIGS / name}", [f"--config.{field}=2.5"]))


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
