"""Whole runs: resumed bit for bit, refused in time, able to learn by heart."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest

from encdec.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    EncdecError,
    InUseError,
    NonFiniteError,
)
from encdec.model import build_model, preset
from encdec.saved.saved_config import read_config
from encdec.saved.saved_params import load_params_for_inference
from encdec.train.loop import Hook, train
from encdec.train.metrics import Console, JsonLinesWriter, make_writer, read_metrics
from tests.train.conftest import DECAYING, SHARED, random_pairs, small_run, write_records

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def straight(records, eval_records, tmp_path_factory):
    """Twenty steps without a break, with dropout and evaluations."""
    workdir = tmp_path_factory.mktemp("straight")
    return train(run_of(records, eval_records), workdir), workdir


def run_of(records, eval_records, **changes):
    return small_run(
        records,
        **{
            "data": {"eval_records": str(eval_records)},
            "eval": {"every": 10},
            "model_overrides": {"mlp_dropout": 0.1, "scan_layers": False},
            "mesh": {"data": 2, "fsdp": 2, "tensor": 2},
            "checkpoint": {"every": 5},
            "schedule": DECAYING,
        }
        | changes,
    )


def assert_same_params(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


def test_a_resumed_run_ends_in_the_same_bits(straight, records, eval_records, tmp_path):
    config = run_of(records, eval_records, checkpoint={"every": 0})
    first = train(config, tmp_path, stop_at=10)
    assert first.step == 10
    # Reporting and checkpointing may change on the way; what is computed may not.
    second = train(config | {"log_every": 3, "checkpoint": {"keep": 5, "every": 0}}, tmp_path)
    assert second.step == 20
    _, wanted, _ = load_params_for_inference(straight[1])
    _, got, step = load_params_for_inference(tmp_path)
    assert step == 20
    assert_same_params(got, wanted)
    assert second.eval == straight[0].eval
    _, halfway, _ = load_params_for_inference(tmp_path, step=10)
    with pytest.raises(AssertionError):
        assert_same_params(halfway, wanted)


def test_the_work_directory_is_enough_for_inference(straight, records):
    summary, workdir = straight
    names = {path.name for path in workdir.iterdir()}
    assert {
        "config.json",
        "model-info.txt",
        "vocabulary.json",
        "metrics.jsonl",
        "checkpoints",
        "tensorboard",
    } <= names
    config, params, step = load_params_for_inference(workdir)
    assert step == 20 and config == preset(
        "test", vocab_size=264, mlp_dropout=0.1, scan_layers=False
    )
    from encdec.data.batches import Batches
    from encdec.data.records import open_records

    logits = jax.jit(build_model(config).apply)(
        {"params": params}, Batches(open_records(records), global_batch=2)[0]
    )
    assert np.isfinite(logits).all()
    assert "total 46,464 parameters" in (workdir / "model-info.txt").read_text()


def test_metrics_are_complete(straight):
    summary, workdir = straight
    lines = read_metrics(workdir)
    assert [x["step"] for x in lines if "train/loss" in x] == [5, 10, 15, 20]
    assert [x["step"] for x in lines if "eval/loss" in x] == [10, 20]
    last = {k: v for line in lines for k, v in line.items()}
    for name in (
        "train/loss",
        "train/source_tokens_per_second",
        "train/gradient_norm",
        "train/target_tokens_per_second",
        "train/flops",
        "eval/bits_per_byte",
    ):
        assert np.isfinite(last[name]) and last[name] > 0, name
    assert summary.train["train/loss"] == last["train/loss"]
    first = next(x for x in lines if "train/loss" in x)
    assert last["train/loss"] < first["train/loss"]
    # Tokens include one EOS a segment, bytes do not: letters are single bytes here.
    tokens, segments = (
        last["eval/target_tokens"],
        120 - sum(len(t) for row in random_pairs(19, 1) for _, t in row),
    )
    np.testing.assert_allclose(
        last["eval/loss_per_byte"] * (tokens - segments), last["eval/loss"] * tokens, rtol=1e-6
    )


def test_tensorboard_reads_the_events(straight):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(straight[1] / "tensorboard")).Reload()
    loss = events.Tensors("train/loss")
    assert [event.step for event in loss] == [5, 10, 15, 20]
    wanted = [x["train/loss"] for x in read_metrics(straight[1]) if "train/loss" in x]
    got = [event.tensor_proto.float_val[0] for event in loss]
    np.testing.assert_allclose(got, wanted, rtol=1e-6)


def test_a_finished_run_is_not_trained_further(straight, records, eval_records):
    before = load_params_for_inference(straight[1])[1]
    again = train(run_of(records, eval_records), straight[1])
    assert again.step == 20 and again.train == {} and again.eval == straight[0].eval
    assert_same_params(load_params_for_inference(straight[1])[1], before)


def test_lines_after_the_last_checkpoint_are_written_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 5, "a": 1}\n{"step": 10, "a": 2}\n{"step": 15, "a": 3}\n{"st')
    writer = JsonLinesWriter(path, start_step=10)
    writer.write_scalars(15, {"a": 4})
    writer.close()
    assert [(x["step"], x["a"]) for x in read_metrics(tmp_path)] == [(5, 1), (10, 2), (15, 4)]


def test_evaluations_before_the_first_step_are_written_once(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for loss in (5.0, 6.0):  # of two processes, the first of which saved nothing
        writer = make_writer(tmp_path, 0, Console(9))
        writer.write_scalars(0, {"eval/loss": loss})
        writer.close()
    assert [(x["step"], x["eval/loss"]) for x in read_metrics(tmp_path)] == [(0, 6.0)]
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [x.tensor_proto.float_val[0] for x in events.Tensors("eval/loss")] == [6.0]


def test_killed_between_a_checkpoint_and_its_evaluation(straight, records, eval_records, tmp_path):
    config = run_of(records, eval_records)
    train(config, tmp_path, stop_at=10)
    path = tmp_path / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if "eval/loss" not in line))
    train(config, tmp_path)

    def evaluations(workdir):
        return {x["step"]: x["eval/loss"] for x in read_metrics(workdir) if "eval/loss" in x}

    assert list(evaluations(tmp_path)) == [10, 20]
    assert evaluations(tmp_path) == evaluations(straight[1])


def test_nan_stops_naming_step_and_last_good_checkpoint(
    straight, records, eval_records, tmp_path, monkeypatch
):
    from encdec.data.batches import Batches

    read = Batches.__getitem__

    def poisoned(self, step):
        batch = read(self, step)
        if step == POISONED and self.repeat:
            batch["decoder_loss_weights"][batch["decoder_loss_weights"] > 0] = np.inf
        return batch

    POISONED = 2
    monkeypatch.setattr(Batches, "__getitem__", poisoned)
    config = run_of(records, eval_records)
    with pytest.raises(NonFiniteError, match="step 3: .*no checkpoint had been saved") as error:
        train(config, tmp_path / "early")
    assert (error.value.exit_code, error.value.step) == (5, 3)
    POISONED = 7
    with pytest.raises(NonFiniteError, match="step 8: .*last good checkpoint is step 5 in"):
        train(config, tmp_path / "late")
    # What was good is kept, nothing after it is saved, and the run continues once that is fixed.
    assert load_params_for_inference(tmp_path / "late")[2] == 5
    monkeypatch.setattr(Batches, "__getitem__", read)
    train(config, tmp_path / "late")
    _, wanted, _ = load_params_for_inference(straight[1])
    assert_same_params(load_params_for_inference(tmp_path / "late")[1], wanted)


@pytest.mark.parametrize("model", ["test", "test-dec"])
def test_four_examples_are_learnt_by_heart(model, one_device, tmp_path):
    pairs = [
        [("the first", "one alpha")],
        [("another", "two betas")],
        [("a third", "gamma!")],
        [("last of all", "delta 4")],
    ]
    records = write_records(tmp_path / "records", pairs)
    summary = train(
        small_run(
            records,
            model=model,
            batch_size=8,
            steps=150,
            log_every=50,
            model_overrides={"scan_layers": False},
            schedule=DECAYING,
        ),
        tmp_path / "w",
    )
    assert summary.train["train/loss"] < 0.01 and summary.train["train/accuracy"] == 1.0


REFUSED = {
    "an unknown field": ({"batchsize": 8}, ConfigError, "batch_size"),
    "an ill-typed value": ({"batch_size": "many"}, ConfigError, "config.batch_size is 'many'"),
    "no records": ({"data": {"records": ""}}, ConfigError, "config.data.records"),
    "a directory that is not there": ({"data": {"records": "/nowhere"}}, DataError, "/nowhere"),
    "a vocabulary larger than the model's": (
        {"model_overrides": {"vocab_size": 258}},
        DataError,
        "259 ids.*258 rows.*vocab_size=259",
    ),
    "a batch that does not divide": ({"batch_size": 12}, ConfigError, "batch_size is 12.*of 8"),
    "accumulation that does not divide": (
        {"batch_size": 16, "accumulation": 4},
        ConfigError,
        "multiple of 32",
    ),
    "a mesh of other size": ({"mesh": {"data": 3}}, ConfigError, "there are 8"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_is_compiled_or_written(case, records, tmp_path, monkeypatch):
    changes, kind, words = REFUSED[case]
    _forbid_compilation(monkeypatch)
    with pytest.raises(kind, match=words):
        train(small_run(records, **changes), tmp_path / "w")
    assert not (tmp_path / "w").exists()


def test_records_without_their_card_are_refused(records, tmp_path, monkeypatch):
    _forbid_compilation(monkeypatch)
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "rows.arrayrecord").write_bytes(b"x")
    with pytest.raises(DataError, match="dataset.json"):
        train(small_run(unfinished), tmp_path / "w")
    with pytest.raises(DataError, match="dataset.json"):
        train(small_run(records, data={"eval_records": str(unfinished)}), tmp_path / "w")
    assert not (tmp_path / "w").exists()


def test_held_out_records_must_be_of_the_same_kind(records, tmp_path):
    other = write_records(tmp_path / "other", random_pairs(3, 2), inputs_length=30)
    with pytest.raises(DataError, match="inputs_length is 30 in the held-out records and 24"):
        train(small_run(records, data={"eval_records": str(other)}), tmp_path / "w")


def test_another_runs_work_directory_is_left_alone(
    straight, records, eval_records, tmp_path, monkeypatch
):
    _, workdir = straight
    before = {p: p.stat().st_mtime_ns for p in workdir.rglob("*")}
    _forbid_compilation(monkeypatch)
    for changes, words in (
        ({"seed": 1}, "config.seed is 0 there and 1 here"),
        ({"batch_size": 16, "optimizer": {"b2": 0.5}}, "batch_size.*optimizer.b2"),
        ({"model": "test-dec"}, "model.architecture"),
        ({"data": {"records": str(eval_records)}}, "records.fingerprint"),
        ({"steps": 40}, "config.steps is 20 there and 40 here"),
    ):
        with pytest.raises(CheckpointError, match=words):
            train(run_of(records, eval_records) | changes, workdir)
    assert {p: p.stat().st_mtime_ns for p in workdir.rglob("*")} == before
    with pytest.raises(CheckpointError, match="is a file"):
        train(small_run(records), records / "dataset.json")
    with pytest.raises(CheckpointError, match="holds records; give another --workdir"):
        train(small_run(records), records)
    assert not (records / "config.json").exists()


def test_fields_newer_than_a_work_directory_take_their_defaults(straight, tmp_path):
    from encdec.train.workdir import check_workdir

    description = read_config(straight[1])
    older = json.loads(json.dumps(description))
    del older["run"]["loss"]["label_smoothing"], older["model"]["qk_norm"]
    (tmp_path / "config.json").write_text(json.dumps(older))
    assert check_workdir(tmp_path, description)
    # Written before execution was a group of its own; how a model is run may change.
    older["model"] |= older["model"].pop("execution") | {"kernel_parts": 0}
    del older["model"]["cpu_shards"], older["model"]["accumulate_in_float32"]
    (tmp_path / "config.json").write_text(json.dumps(older))
    execution = description["model"]["execution"]
    execution |= {"remat": "full", "fuse_projections": True}
    assert check_workdir(tmp_path, description)
    execution["scan_layers"] = not execution["scan_layers"]
    with pytest.raises(CheckpointError, match="model.scan_layers is False there and True here"):
        check_workdir(tmp_path, description)
    execution["scan_layers"] = not execution["scan_layers"]
    description["model"]["qk_norm"] = True
    with pytest.raises(CheckpointError, match="model.qk_norm is False there and True here"):
        check_workdir(tmp_path, description)
    # An import or an export.
    imported = {"format_version": older["format_version"], "imported": {}, "data": {}}
    (tmp_path / "config.json").write_text(json.dumps(imported))
    with pytest.raises(CheckpointError, match="not trained there; start from it: --config.init"):
        check_workdir(tmp_path, description)


def test_inference_names_what_is_missing(straight, tmp_path):
    with pytest.raises(CheckpointError, match="config.json"):
        load_params_for_inference(tmp_path)
    with pytest.raises(CheckpointError, match=r"checkpoint 7 \(there are: 15, 20\)"):
        load_params_for_inference(straight[1], step=7)


def _forbid_compilation(monkeypatch):
    from jax._src import compiler

    def refuse(*arguments, **more):
        raise AssertionError("something was compiled")

    monkeypatch.setattr(compiler, "compile_or_get_cached", refuse)
    with pytest.raises(AssertionError, match="something was compiled"):
        jax.jit(lambda x: x * 2 + 1)(np.float32(1))


def test_training_imports_no_tensorflow(records, tmp_path):
    """The command itself, in a fresh interpreter, on one device."""
    script = textwrap.dedent("""
        import sys
        from encdec.cli import main
        code = main(sys.argv[1:])
        print([name for name in sys.modules if name.split(".")[0].startswith("tensorflow")])
        sys.exit(code)
    """)
    command = [
        "train",
        "--config",
        f"{REPOSITORY}/configs/pretrain.py:test",
        "--workdir",
        str(tmp_path / "w"),
        f"--config.data.records={records}",
        "--config.model_overrides.vocab_size=264",
        "--config.batch_size=8",
        "--config.steps=3",
        "--config.log_every=1",
        *SHARED,
    ]
    done = run_python(script, command)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    assert "step 3/3" in done.stderr and "target tok/s" in done.stderr


def test_the_command_answers_mistakes_without_a_traceback(records, tmp_path):
    from encdec.cli import main

    base = [
        "train",
        f"--config={REPOSITORY}/configs/pretrain.py:test",
        f"--workdir={tmp_path / 'w'}",
        f"--config.data.records={records}",
    ]
    for more, code in (
        ("--config.batch_sizes=3", 2),
        ("--config.steps=many", 2),
        ("--config.model_overrides.vocab_size=100", 3),
    ):
        assert main([*base, more]) == code
    assert not (tmp_path / "w").exists()


def run_python(script: str, arguments: list[str], **environment: str):
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)} | environment,
    )


def test_errors_are_told_apart_by_exit_code():
    codes = [kind.exit_code for kind in (ConfigError, DataError, CheckpointError, NonFiniteError)]
    assert len({EncdecError.exit_code, *codes}) == 5


def test_hooks_are_called_between_steps_and_see_the_state(
    records, one_device, tmp_path, monkeypatch
):
    seen = {"often": [], "end": []}
    monkeypatch.setattr("encdec.train.session.PATIENCE_SECONDS", 0.0)

    def often(session):
        assert int(session.state.step) == session.step
        if session.step == 3:  # as a second process would, which then leaves this one alone
            with pytest.raises(InUseError, match="run is in use: another process"):
                train(run, tmp_path / "run")
        seen["often"].append(session.step)

    hooks = [Hook(often, every=2), Hook(lambda session: seen["end"].append(session.step))]
    run = small_run(records, steps=5, checkpoint={"every": 2})
    train(run, tmp_path / "run", stop_at=3, hooks=hooks)
    train(run, tmp_path / "run", hooks=hooks)
    assert seen == {"often": [2, 3, 4, 5], "end": [3, 5]}
    with pytest.raises(ConfigError, match="every is -1"):
        train(run, tmp_path / "other", hooks=[Hook(often, every=-1)])
    assert not (tmp_path / "other").exists()
