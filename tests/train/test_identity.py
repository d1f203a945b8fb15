"""What each fingerprint covers: every ingredient is changed once, by itself."""

from __future__ import annotations

import dataclasses
import itertools
import json
from typing import Any, get_args, get_type_hints

import pytest
from ml_collections import ConfigDict

from encdec.data.records import Shard, content_fingerprint
from encdec.data.sparse_logits import SparseFormat
from encdec.data.teacher_rows import teacher_fingerprint
from encdec.data.vocabulary import ByteVocabulary, VocabularySpec
from encdec.errors import CheckpointError
from encdec.model import ModelConfig, preset
from encdec.saved.saved_config import FORMAT_VERSION
from encdec.scaling.planned_runs import PlannedRun
from encdec.train.run_config import RunConfig, complete, to_dict
from encdec.train.workdir import check_workdir, start_of_run
from tests.train.test_warm_start import FUNCTION, WINDOWS

SHARDS = [Shard("a", 3, 100, "aa"), Shard("b", 4, 90, "bb")]


def other(value: Any, hint: Any = None) -> Any:
    """Another value of the same kind."""
    choices = [choice for choice in get_args(hint) if choice != value]
    if choices and not isinstance(choices[0], type):
        return choices[0]
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    return (value or "") + "x" if isinstance(value, str) or value is None else (*value, 1.0)


def vocabulary(**changes: Any) -> VocabularySpec:
    return VocabularySpec("bytes", 259, 1, 0, 0, changes.get("fingerprint", "ab"))


def records_print(**changes: Any) -> str:
    shards = changes.get("shards", SHARDS)
    return content_fingerprint(
        shards,
        vocabulary(**changes),
        changes.get("inputs_length", 8),
        changes.get("targets_length", 6),
        changes.get("decoder_start_id", 0),
        changes.get("inputs_prefix", ()),
    )


RECORDS = {
    "fingerprint": "ba",
    "inputs_length": 9,
    "targets_length": 7,
    "decoder_start_id": 1,
    "inputs_prefix": (1,),
    "shards": [SHARDS[1], SHARDS[0]],
}


@pytest.mark.parametrize("name", RECORDS)
def test_the_records_fingerprint(name):
    assert records_print(**{name: RECORDS[name]}) != records_print()


def test_fingerprints_cover_each_shards_rows_and_bytes_but_not_their_names():
    form = SparseFormat("sampled", 259)
    for change, same in (
        ({"sha256": "cc"}, False),
        ({"rows": 9}, False),
        ({"name": "c", "bytes": 7}, True),
    ):
        changed = [SHARDS[0], dataclasses.replace(SHARDS[1], **change)]
        assert (records_print(shards=changed) == records_print()) == same
        prints = [teacher_fingerprint("r", form, shards) for shards in (SHARDS, changed)]
        assert (prints[0] == prints[1]) == same
    assert records_print(shards=SHARDS[:1]) != records_print()


def test_a_vocabularys_fingerprint_covers_its_extra_ids():
    assert ByteVocabulary(extra_ids=2).fingerprint != ByteVocabulary().fingerprint


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "top_k"},
        {"vocab_size": 260},
        {"draws": 49},
        {"temperature": 2.0},
        {"proposal": 0.5},
        {"method": "top_k", "k": 11},
    ],
    ids=str,
)
def test_the_teachers_fingerprint(changes):
    plain = SparseFormat("sampled", 259)
    before = teacher_fingerprint("records", plain, SHARDS)
    assert teacher_fingerprint("records", dataclasses.replace(plain, **changes), SHARDS) != before
    assert teacher_fingerprint("others", plain, SHARDS) != before
    eleven = SparseFormat("top_k", 259, k=11)
    assert teacher_fingerprint("records", eleven, SHARDS) != teacher_fingerprint(
        "records", dataclasses.replace(eleven, k=12), SHARDS
    )


def leaves(values: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of the values."""
    groups = {k: v for k, v in values.items() if isinstance(v, dict) and v}
    return [prefix + k for k in values if k not in groups] + list(
        itertools.chain(*(leaves(v, f"{prefix}{k}.") for k, v in groups.items()))
    )


def changed(values: dict[str, Any], name: str, value: Any) -> dict[str, Any]:
    copy = json.loads(json.dumps(values))
    group = copy
    *path, last = name.split(".")
    for part in path:
        group = group[part]
    group[last] = value
    return copy


def description() -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION,
        "run": to_dict(RunConfig()),
        "model": ModelConfig().to_dict(),
        "data": {
            "fingerprint": "a",
            "eval_fingerprint": "b",
            "teacher_fingerprint": None,
            "inputs_length": 8,
        },
    }


@pytest.fixture(scope="module")
def owned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("owned")
    (folder / "config.json").write_text(json.dumps(description()))
    return folder


def run_hint(name: str) -> Any:
    kind: Any = RunConfig
    for part in name.split("."):
        kind = get_type_hints(kind)[part]
    return kind


# What may change when a run continues; records and teachers are compared by content instead.
FREE = (
    *("data.records", "data.eval_records", "distill.teacher", "log_every", "loss.vocab_tile"),
    *("mesh", "eval", "checkpoint", "profile", "trackers"),
)
FREE_OF_MODEL = ("remat", "attention_kernel", "fuse_projections")
# Every field of a model that a run can set, with another value than the preset's.
MODEL_CHANGES = (
    {
        "architecture": {"architecture": "decoder_only", "encoder_layers": 0},
        "vocab_size": {"vocab_size": 300},
        "encoder_layers": {"encoder_layers": 3},
        "decoder_layers": {"decoder_layers": 2},
        "d_model": {"d_model": 48},
        "num_heads": {"num_heads": 2},
        "num_kv_heads": {"num_kv_heads": 4},
        "head_dim": {"head_dim": 16},
        "mlp_dim": {"mlp_dim": 48},
        "attention_dropout": {"attention_dropout": 0.3},
        "mlp_dropout": {"mlp_dropout": 0.3},
        "residual_dropout": {"residual_dropout": 0.3},
        "init_std": {"init_std": 0.1},
        "dtype": {"dtype": "bfloat16"},
        "param_dtype": {"param_dtype": "bfloat16"},
        "scan_layers": {"scan_layers": False},
        "remat": {"remat": "full"},
        "attention_kernel": {"attention_kernel": "xla"},
        "fuse_projections": {"fuse_projections": True},
    }
    | FUNCTION
    | WINDOWS
)
RUN_NAMES = [
    name for name in leaves(to_dict(RunConfig())) if name not in ("model", "model_overrides")
]


def same_run(owned, changes: dict[str, Any]) -> bool:
    try:
        return check_workdir(owned, changes)
    except CheckpointError:
        return False


@pytest.mark.parametrize("name", RUN_NAMES)
def test_a_work_directorys_identity_has_every_field_that_is_not_operational(name, owned):
    value = description()["run"]
    for part in name.split("."):
        value = value[part]
    free = name in FREE or name.split(".")[0] in FREE
    changes = changed(description(), f"run.{name}", other(value, run_hint(name)))
    assert same_run(owned, changes) == (free and name != "eval.batches")


def test_every_field_of_a_model_that_a_run_can_set_is_tried():
    assert set(MODEL_CHANGES) == set(complete(ConfigDict()).model_overrides)


@pytest.mark.parametrize("name", MODEL_CHANGES)
def test_a_work_directorys_identity_has_every_field_of_the_model(name, tmp_path):
    base = preset("test-dec" if name in WINDOWS else "test")
    if name in WINDOWS:
        base = base.replace(attention_window=4, scan_layers=False)
    before, after = (
        description() | {"model": model.to_dict()}
        for model in (base, base.replace(**MODEL_CHANGES[name]))
    )
    (tmp_path / "config.json").write_text(json.dumps(before))
    assert same_run(tmp_path, before)
    assert same_run(tmp_path, after) == (name in FREE_OF_MODEL)


def test_a_work_directorys_identity_has_its_data(owned):
    for name, same in (
        ("fingerprint", False),
        ("teacher_fingerprint", False),
        ("eval_fingerprint", False),
    ):
        assert same_run(owned, changed(description(), f"data.{name}", "c")) == same
    assert same_run(owned, changed(description(), "data.eval_fingerprint", None))


def test_one_curve_of_held_out_loss_is_of_one_set_of_rows(tmp_path):
    """Also after the run was continued without held-out records."""
    sampled = changed(description(), "run.eval.batches", 3)
    (tmp_path / "config.json").write_text(json.dumps(sampled))
    for field, value, said in (
        ("run.eval.batches", 4, "eval.batches is 3 there and 4 here"),
        ("run.eval.batch_size", 16, "eval.batch_size is 128 there and 16 here"),
        ("data.eval_fingerprint", "c", "fingerprint is 'b' there and 'c' here"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(sampled))
        changes = changed(sampled, field, value)
        with pytest.raises(CheckpointError, match=f"held-out loss is of other rows: {said}"):
            check_workdir(tmp_path, changes)
        without = changed(sampled, "data.eval_fingerprint", None)
        assert check_workdir(tmp_path, without)
        assert start_of_run(tmp_path, sampled) == {}
        kept = without | start_of_run(tmp_path, without)
        (tmp_path / "config.json").write_text(json.dumps(kept))
        with pytest.raises(CheckpointError, match=said):
            check_workdir(tmp_path, changes)
        assert check_workdir(tmp_path, changed(sampled, "run.eval.every", 7.0))
    assert same_run(tmp_path, changed(sampled, "run.eval.batch_size", 128))  # as it was


PLANNED = PlannedRun(
    name="a",
    series="dec",
    size="s",
    budget=1.0,
    seed=0,
    preset="330m",
    model=preset("330m"),
    batch_size=8,
    steps=10,
    learning_rate=0.1,
    warmup_steps=1,
    eval_every=5,
    inputs=8,
    targets=4,
    source_tokens=1.0,
    target_tokens=2.0,
    epochs=1.0,
)


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(PlannedRun)])
def test_a_planned_runs_digest(name):
    value = getattr(PLANNED, name)
    values = (
        [dataclasses.replace(value, mlp_dim=8), dataclasses.replace(value, qk_norm=True)]
        if name == "model"
        else [other(value)]
    )
    # A name is its directory's, epochs follow from the records; a teacher's content is compared.
    free = name in ("name", "epochs", "teacher", "teacher_loss")
    for value in values:
        assert (dataclasses.replace(PLANNED, **{name: value}).digest == PLANNED.digest) == free
