"""What the experiment on adaptation reads off its curves, and that every row can be run."""

from __future__ import annotations

import pathlib

import numpy as np
import pytest

from encdec.benchmarks.adaptation_experiment import (
    Setting,
    budget,
    crossing,
    run_experiment,
    source_model,
    steps_worth,
    summary,
    table_rows,
)
from encdec.cost.flops import training_flops
from encdec.errors import ConfigError
from encdec.train.run_config import parse_config
from encdec.train.train_command import load_config

FRESH = np.array([[10, 100.0, 6.0], [20, 200.0, 4.0], [40, 400.0, 2.0]])
ADAPTED = np.array([[10, 50.0, 3.0], [40, 200.0, 2.5], [80, 400.0, 2.4]])


def test_a_step_is_worth_as_many_as_reach_its_loss():
    # From 4.0 at step 20 to 2.0 at step 40: 3.0 halfway.
    assert steps_worth(ADAPTED, FRESH) == (10.0, 30.0)
    assert steps_worth(ADAPTED - [0, 0, 5], FRESH) is None
    assert steps_worth(ADAPTED + [0, 0, 9], FRESH) == (10.0, 10.0)


def test_curves_cross_between_evaluations_or_not_at_all():
    # At 200: 2.5 and 4.0; at 400: 2.4 and 2.0. The gap goes from -1.5 to 0.4.
    assert crossing(ADAPTED, FRESH) == pytest.approx(200 + 200 * 1.5 / 1.9)
    assert crossing(ADAPTED - [0, 0, 1], FRESH) is None
    run = lambda curve: {"parameters": 7, "curve": curve.tolist(), "loss": curve[-1, 2]}
    both = {"adapted all-all": [run(ADAPTED)] * 2, "scratch all-all": [run(FRESH)]}
    text = summary(both)
    assert "| adapted all-all | 7 | 80 | 2.400 ± 0.000 | 2 |" in text
    assert "after 10 steps the adapted model matches 30 steps from" in text
    assert "cross at 358 FLOPs" in text
    both["adapted all-all"] = [run(ADAPTED - [0, 0, 1])]
    assert "do not cross: the adapted model is ahead" in summary(both)


def test_the_budget_is_what_the_source_would_cost_further():
    setting = Setting(pathlib.Path("w"), model="test", layers=6, further_steps=10, batch_size=4)
    one = training_flops(source_model(setting), setting.inputs, setting.targets, batch_size=4)
    assert budget(setting) == 10 * one
    rows = table_rows(setting)
    assert len({row.folder for row in rows}) == len(rows)
    assert rows[1].layers == ("4", "2") and sum(row.headline for row in rows) == 5


@pytest.mark.parametrize(
    "changes, message",
    [({"layers": 4}, "multiple of 3"), ({"text": ("a",)}, "go together"), ({"seeds": 0}, "1 or")],
)
def test_settings_that_cannot_be_run_are_refused(changes, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        run_experiment(Setting(tmp_path / "work", **changes), print)
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    "argument", ["prefix_lm,smollm2-135m,hold", "ul2,gemma-3-1b", "ul2,hold,qwen3-0.6b"]
)
def test_shapes_of_public_models_are_models(argument):
    run = parse_config(load_config(f"configs/adapt.py:{argument}"))
    model = run.model_config()
    assert model.encoder_layers == model.decoder_layers > 20
    assert run.freeze.steps == 500 * ("hold" in argument) and not model.qkv_bias


@pytest.mark.parametrize("argument", ["x", "ul2,x", "ul2,qwen3-0.6b,smollm2-135m"])
def test_other_words_are_refused(argument):
    with pytest.raises(ConfigError, match="unknown objective 'x'|is not expected"):
        load_config(f"configs/adapt.py:{argument}")
