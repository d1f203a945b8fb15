"""Every field that a run can set changes something that is seen, or is refused with a message.

Nothing is compiled: programs are compared as they are traced, and what is built by its values.
"""

from __future__ import annotations

import functools
import math
import re
import types
from typing import Any

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from encdec.data.records import open_records
from encdec.errors import ConfigError
from encdec.model import ModelConfig, build_model, preset
from encdec.train.checkpoints import kept_steps
from encdec.train.evaluator import Evaluator
from encdec.train.feed import open_batches
from encdec.train.loop import _due
from encdec.train.program import abstract_batch, build_program
from encdec.train.reports import Reports
from encdec.train.run_config import RunConfig, complete, parse_config, to_dict
from encdec.train.session import out_of_patience
from encdec.train.sharding import make_mesh
from encdec.train.warm_start import architecture
from tests.train import test_groups, test_loop, test_trackers, test_warm_start
from tests.train.conftest import DECAYING, INPUTS, TARGETS, small_run
from tests.train.test_identity import MODEL_CHANGES, leaves

TINY = {"encoder_layers": 1, "decoder_layers": 1, "vocab_size": 264, "scan_layers": False}


def run_of(*changes: dict[str, Any]) -> RunConfig:
    """A small run with dotted fields changed."""
    run = small_run("", model_overrides=TINY, schedule=DECAYING)
    for name, value in (item for change in changes for item in change.items()):
        group, _, field = name.rpartition(".")
        (run.setdefault(group, {}) if group else run)[field] = value
    return parse_config(run)


@functools.cache
def traced(run: RunConfig) -> str:
    """The training step as jax traces it, with the state's places on the mesh."""
    model = run.model_config()
    pairs = 30 if run.distill.teacher else 0
    program = build_program(run, model, make_mesh(run.mesh), TARGETS)
    batch = abstract_batch(program, run.batch_size, INPUTS, TARGETS, pairs)
    text = str(jax.make_jaxpr(program.train_step)(program.abstract_state, batch))
    places = [str(x.sharding) for x in jax.tree.leaves(program.abstract_state.params)]
    return re.sub(r"0x[0-9a-f]+", "", text) + "\n".join(places)


# So that a run can be looked up; its model_overrides are a dict.
RunConfig.__hash__ = lambda run: hash(repr(run))

ADAFACTOR, MUON = {"optimizer.name": "adafactor", "optimizer.b2": 0.98}, {"optimizer.name": "muon"}
TAUGHT = {"distill.teacher": "rows"}
RISING = TAUGHT | {"distill.alpha_schedule": "warmup", "distill.warmup_steps": 4}
# Field: another value, and what must be set with it.
TRACED: dict[str, tuple[Any, dict[str, Any]]] = {
    "model": ("test-dec", {"model_overrides": {"vocab_size": 264}}),
    "batch_size": (16, {}),
    "accumulation": (1, {"mesh.data": 4, "mesh.fsdp": 2, "batch_size": 32, "accumulation": 2}),
    "steps": (30, {}),
    "seed": (1, {}),
    "mesh.data": (4, {"mesh.fsdp": -1, "mesh.data": 8}),
    "mesh.fsdp": (2, {}),
    "mesh.tensor": (2, {}),
    "mesh.gather": ("use", {"mesh.fsdp": 2}),
    "mesh.reduce_dtype": ("float32", {"model_overrides": TINY | {"dtype": "bfloat16"}}),
    "optimizer.name": ("muon", {}),
    "optimizer.learning_rate": (0.3, {}),
    "optimizer.weight_decay": (0.3, {}),
    "optimizer.clip_norm": (0.3, {}),
    "optimizer.b1": (0.3, {}),
    "optimizer.b2": (0.3, {}),
    "optimizer.eps": (0.3, {}),
    "optimizer.momentum": (0.3, MUON),
    "optimizer.decay_rate": (0.3, ADAFACTOR),
    "schedule.name": ("linear", {}),
    "schedule.warmup_steps": (3, {}),
    "schedule.final_fraction": (0.3, {}),
    "schedule.decay_fraction": (0.3, {"schedule.name": "wsd"}),
    "loss.z_loss": (0.3, {}),
    "loss.label_smoothing": (0.3, {}),
    "loss.vocab_tile": (66, {}),
    "distill.teacher": ("rows", {}),
    "distill.loss": ("soft_cross_entropy", TAUGHT),
    "distill.alpha": (0.3, TAUGHT),
    "distill.alpha_schedule": ("learning_rate", TAUGHT),
    "distill.warmup_steps": (3, RISING),
    "distill.temperature": (3.0, TAUGHT),
}


@pytest.mark.parametrize("name", TRACED)
def test_a_field_of_the_step_changes_its_program(name):
    value, others = TRACED[name]
    assert traced(run_of(others)) != traced(run_of(others, {name: value}))


@pytest.mark.parametrize("name, value", [("data.shuffle", False), ("seed", 1)])
def test_a_field_of_the_rows_changes_their_order(name, value, records):
    def rows(run):
        program = build_program(run, run.model_config(), make_mesh(run.mesh), TARGETS)
        batches = open_batches(
            open_records(records),
            run.model_config(),
            program.batch_sharding,
            8,
            seed=run.seed,
            shuffle=run.data.shuffle,
        )
        return batches[0]["decoder_input_tokens"].tolist()

    assert rows(run_of()) != rows(run_of({name: value}))


def calls(run: RunConfig) -> list[Any]:
    """At which steps what is done, and how a profile is taken."""
    done: list[Any] = []
    session = types.SimpleNamespace(
        job=types.SimpleNamespace(run=run),
        stop=run.steps,
        workdir="",
        evaluator=object(),
        save=lambda: done.append("save"),
        evaluate=lambda: done.append("evaluate"),
    )
    due = _due(session, ())
    for action in due[2:]:
        done.append((action._first_profile, action._num_profile_steps))
    for step in range(1, run.steps + 1):
        done.append(step)
        for action in due[:2]:
            action(step)
    return done


@pytest.mark.parametrize(
    "name, value, others",
    [
        ("eval.every", 3, {}),
        ("checkpoint.every", 3, {}),
        ("profile.first_step", 3, {}),
        ("profile.steps", 3, {"profile.first_step": 2}),
    ],
)
def test_a_field_of_what_is_due_changes_when(name, value, others):
    assert calls(run_of(others)) != calls(run_of(others, {name: value}))


def test_fields_of_what_is_kept_change_it():
    steps, losses = range(2, 20, 2), {step: float(step) for step in range(2, 20, 2)}
    held = {"data.eval_records": "x", "eval.every": 2, "checkpoint.every": 2}
    kept = lambda *changes: kept_steps(steps, run_of(held, *changes).checkpoint, losses)
    for name in ("keep", "keep_best", "keep_every"):
        assert kept({f"checkpoint.{name}": 4}) != kept()
    assert out_of_patience([1, 2, 3], 2) != out_of_patience([1, 2, 3], 3)
    assert not out_of_patience([math.nan, 3, 2], 2) and out_of_patience([2, math.nan, 3], 2)


def test_fields_of_evaluation_change_its_batches(eval_records):
    def shape(*changes):
        run = run_of({"data.eval_records": str(eval_records)}, *changes)
        program = build_program(run, run.model_config(), make_mesh(run.mesh), TARGETS)
        evaluator = Evaluator(program, run, run.model_config(), open_records(eval_records))
        ((_, batches, steps, _, _),) = evaluator._parts
        return steps, len(batches[0]["decoder_input_tokens"])

    assert shape() == (3, 8)
    assert shape({"eval.batches": 1}) == (1, 8)
    assert shape({"eval.batch_size": 16}) == (2, 16)


def test_reports_come_as_often_as_asked(monkeypatch):
    def written(log_every):
        steps = []
        reports = object.__new__(Reports)
        run = run_of({"log_every": log_every})
        reports.__dict__ |= {
            "_job": types.SimpleNamespace(run=run),
            "_stop": 20,
            "_pending": None,
            "window": types.SimpleNamespace(add=lambda metrics: None, report=lambda step: {}),
            "write": lambda step, numbers: steps.append(step),
            "_require_finite": lambda step, metrics: None,
        }
        for step in range(1, 21):
            reports.take(step, 0)
        reports.settle()
        return steps

    assert written(5) == [5, 10, 15, 20] and written(8) == [8, 16, 20]


# Fields whose effect other tests show, or that nothing works without.
ELSEWHERE = {
    "data.records": test_loop.test_records_without_their_card_are_refused,
    "data.eval_records": test_loop.test_held_out_records_must_be_of_the_same_kind,
    "init_from": test_warm_start.test_a_run_starts_where_another_ended,
    "init_architecture": test_warm_start.test_the_sources_architecture_is_taken_over_where_asked,
    "init_partial": test_warm_start.test_a_partial_start_takes_all_but_what_its_patterns_name,
    "init_grow": test_warm_start.test_tables_grow_where_asked_and_extra_ids_keep_their_numbers,
    "eval.at_start": test_warm_start.test_a_start_can_be_evaluated_before_its_first_step,
    "eval.patience": test_warm_start.test_a_run_ends_when_patience_does_and_keeps_its_best,
    "freeze.parameters": test_groups.test_held_parameters_begin_as_new_when_they_are_let_go,
    "freeze.steps": test_groups.test_held_parameters_begin_as_new_when_they_are_let_go,
    "optimizer.factors": test_groups.test_factors_multiply_updates_of_layers_that_are_stacked_too,
    "trackers": test_trackers.test_a_tracker_gets_settings_and_metrics_and_is_continued,
    # Of other divergences and of stored formats that a traced batch of draws does not have.
    "distill.beta": None,
    "distill.tail": None,
}


def test_no_field_of_a_run_is_left_out():
    here = {
        *TRACED,
        *("data.shuffle", "eval.every", "eval.batches", "eval.batch_size", "log_every"),
        *("checkpoint.every", "checkpoint.keep", "checkpoint.keep_best", "checkpoint.keep_every"),
        *("profile.first_step", "profile.steps"),
    }
    assert set(leaves(to_dict(RunConfig()))) - {"model_overrides"} == here | set(ELSEWHERE)


# Models.


@functools.cache
def traced_model(config: ModelConfig, gradient: bool = False) -> str:
    """Drawing and running a model, or its gradient, as jax traces them."""
    model = build_model(config)
    sides = {"encoder": 24, "decoder": 16} if config.is_encoder_decoder else {"decoder": 16}
    batch = {
        f"{side}_{field}": jax.ShapeDtypeStruct((2, n), "int32")
        for side, n in sides.items()
        for field in ("input_tokens", "segment_ids", "positions")
    }

    def run(params, batch, key):
        return model.apply(params, batch, deterministic=False, rngs={"dropout": key}).sum()

    def step(key, batch):
        return (jax.grad(run) if gradient else run)(model.init(key, batch), batch, key)

    closed = jax.make_jaxpr(step)(jax.eval_shape(lambda: jax.random.key(0)), batch)
    constants = [np.asarray(x).tolist() for x in closed.consts]
    return re.sub(r"0x[0-9a-f]+", "", str(closed)) + str(constants)


# What else a field needs to have any effect at these sizes.
NEEDED = {
    "rope_max_length": {"rope_scaling": "ntk", "rope_factor": 2.0, "rope_length": 4096},
    "rope_length": {"rope_scaling": "ntk", "rope_factor": 2.0, "rope_length": 3000},
    "rope_magnitude": {"rope_scaling": "per_pair", "rope_divisors": (2.0,) * 4},
    "rope_divisors": {"rope_scaling": "per_pair", "rope_divisors": (3.0,) * 4},
    "norm_cast": {"dtype": "bfloat16"},
    "fuse_projections": {"mlp_gated": True},
    "global_layer_every": {"attention_window": 8, "scan_layers": False},
    "local_rope_theta": {"attention_window": 8, "scan_layers": False},
    "encoder_window": {"attention_window": 8, "scan_layers": False},
    "encoder_unrotated_layers": {"scan_layers": False},
    "decoder_unrotated_layers": {"scan_layers": False},
    "qk_norm_over_heads": {"qk_norm": True},
    "omit_pre_norms": {"post_norms": True},
}

AGAIN = {
    "rope_scaling": {"rope_scaling": "linear", "rope_factor": 2.0},
    "attention_kernel": {"attention_kernel": "cudnn", "attention_dropout": 0.0},
}


@pytest.mark.parametrize("name", MODEL_CHANGES)
def test_a_field_of_a_model_changes_its_program(name):
    decoder_only = name in test_warm_start.WINDOWS
    base = preset("test-dec" if decoder_only else "test").replace(**NEEDED.get(name, {}))
    changes = AGAIN.get(name, MODEL_CHANGES[name])
    if name == "attention_kernel":  # those of other machines are refused by name
        with pytest.raises(ConfigError, match="attention_kernel is 'cudnn' on cpu"):
            traced_model(base.replace(**changes))
    else:
        gradient = name == "remat"
        assert traced_model(base, gradient) != traced_model(base.replace(**changes), gradient)


def test_no_field_of_a_model_is_left_out():
    assert set(MODEL_CHANGES) == set(complete(ConfigDict()).model_overrides)
    assert set(architecture(preset("test"))) < set(MODEL_CHANGES)
