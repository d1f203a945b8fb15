"""A run that starts from another's parameters, and one that ends when it no longer improves."""

from __future__ import annotations

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from encdec.data.vocabulary import ByteVocabulary
from encdec.errors import CheckpointError, ConfigError, DataError
from encdec.train.checkpoints import load_params_for_inference, saved_steps
from encdec.train.config import parse_config
from encdec.train.lineage import Lineage, lineage
from encdec.train.loop import out_of_patience, train
from encdec.train.metrics import read_metrics
from encdec.train.state import TrainState
from encdec.train.warm_start import start_from
from tests.train.conftest import random_pairs, small_run, write_records


def short_run(records, **changes):
    return small_run(records, schedule={"warmup_steps": 0}, **changes)


@pytest.fixture(scope="module")
def pretrained(records, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained") / "run"
    train(short_run(records, steps=2), folder)
    return folder


def test_a_run_starts_where_another_ended(pretrained, records, tmp_path):
    # At a learning rate of next to nothing the parameters stay what they were.
    train(
        short_run(
            records, steps=1, init_from=str(pretrained), seed=5, optimizer={"learning_rate": 1e-30}
        ),
        tmp_path / "run",
    )
    _, before, _ = load_params_for_inference(pretrained)
    _, after, _ = load_params_for_inference(tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, before, after)
    report = (tmp_path / "run" / "warm-start.txt").read_text()
    assert "0 left, 0 drawn anew" in report and "embedder/embedding" in report


def test_the_cost_is_of_the_step_that_was_taken(records, tmp_path):
    source, run = tmp_path / "source", tmp_path / "run"
    longer = dict(schedule={"name": "constant", "warmup_steps": 0}, seed=3)
    train(small_run(records, steps=2, **longer), source)
    tune = short_run(records, steps=1, init_from=str(source), seed=5)
    train(tune, run)
    before = lineage(run, 1)
    assert before.seeds == (5, 3)
    assert before.training_flops == pytest.approx(3 / 2 * lineage(source, 2).training_flops)
    train(small_run(records, steps=6, **longer), source)  # the source trains on
    train(tune, run)  # and the finished run is called again, which keeps what it noted
    assert lineage(run, 1) == before
    config = json.loads((run / "config.json").read_text())
    assert config["started_from"]["step"] == 2
    # Runs from before the note: the source's last step, as far as it is there.
    del config["started_from"]
    (run / "config.json").write_text(json.dumps(config))
    assert lineage(run, 1).training_flops == pytest.approx(7 / 3 * before.training_flops)
    shutil.rmtree(source)
    assert lineage(run, 1) == Lineage(None, None)


def test_what_does_not_fit_is_named(pretrained, records, tmp_path):
    train(
        short_run(records, steps=1, init_from=str(pretrained), model_overrides={"vocab_size": 280}),
        tmp_path / "run",
    )
    report = (tmp_path / "run" / "warm-start.txt").read_text()
    assert "1 left, 1 drawn anew" in report
    assert "embedder/embedding: shape (264, " in report
    state = TrainState(jnp.int32(0), {"other": jnp.zeros(3)}, None)
    with pytest.raises(CheckpointError, match="no parameter of the run's names and shapes"):
        start_from(state, str(pretrained))


def test_another_vocabulary_is_refused(pretrained, tmp_path):
    records = write_records(tmp_path / "other", random_pairs(8, 0), ByteVocabulary(extra_ids=4))
    with pytest.raises(DataError, match=r"prepare the records with --vocabulary="):
        train(short_run(records, steps=1, init_from=str(pretrained)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_patience_counts_evaluations_without_a_lower_loss():
    assert not out_of_patience([3, 2, 2], 2)
    assert out_of_patience([3, 2, 2, 2.5], 2)
    assert not out_of_patience([3, 2, 2.5, 1.9], 2)
    assert not out_of_patience([3, 4, 5], 0)


def test_a_run_ends_when_patience_does_and_keeps_its_best(records, eval_records, tmp_path):
    # A learning rate of next to nothing: no evaluation after the first is lower.
    config = small_run(
        records,
        steps=50,
        eval={"every": 1, "patience": 2},
        checkpoint={"every": 1, "keep": 3},
        data={"records": str(records), "eval_records": str(eval_records)},
        optimizer={"learning_rate": 1e-30},
    )
    assert train(config, tmp_path / "run").step == 3
    assert saved_steps(tmp_path / "run") == [1, 2, 3]
    assert train(config, tmp_path / "run").step == 3  # and has nothing more to do
    assert read_metrics(tmp_path / "run")[-1]["step"] == 3


def test_patience_without_evaluations_is_refused(records):
    with pytest.raises(ConfigError, match=r"config\.eval\.patience is 2"):
        parse_config(short_run(records, eval={"patience": 2}))
    with pytest.raises(ConfigError, match=r"config\.checkpoint\.keep is 2"):
        parse_config(
            {
                "data": {"eval_records": "x"},
                "eval": {"every": 5, "patience": 3},
                "checkpoint": {"every": 5, "keep": 2},
            }
        )
