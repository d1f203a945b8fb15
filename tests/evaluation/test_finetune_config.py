"""``configs/finetune.py``: every run is valid, stops early by default, and says what it wants."""

from __future__ import annotations

import pathlib

import pytest

from encdec.data.task_registry import TEXT_TASKS
from encdec.errors import ConfigError
from encdec.train.run_config import load_config, parse_config

CONFIG = pathlib.Path(__file__).resolve().parents[2] / "configs" / "finetune.py"
TASKS = (
    "squad_v2",
    "ielts_feedback",
    "ielts_band",
    "code_java2cs",
    "code_refine_small",
    "code_refine_medium",
    "xsum",
    "dialogsum",
)
RECORDS = ["--config.data.records=train", "--config.data.eval_records=dev"]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("model", ["330m", "330m-dec-flops"])
def test_every_task_of_the_paper_for_both_architectures(task, model):
    assert task in TEXT_TASKS
    run = parse_config(
        load_config(
            f"{CONFIG}:{task}",
            [
                *RECORDS,
                f"--config.model={model}",
                "--config.init_from=runs/pre",
                "--config.distill.teacher=rows",
            ],
        )
    )
    assert run.eval.patience == 3 and run.checkpoint.keep > run.eval.patience
    assert run.eval.every == run.checkpoint.every < run.steps
    assert run.distill.alpha == 0.9 and run.init_from == "runs/pre"


def test_it_says_what_it_wants():
    with pytest.raises(ConfigError, match="unknown task 'squad'.*did you mean 'squad_v2'"):
        load_config(f"{CONFIG}:squad")
    with pytest.raises(ConfigError, match="config.eval.patience is 3; expected 0.*eval_records"):
        parse_config(load_config(f"{CONFIG}:xsum", RECORDS[:1]))
    assert (
        parse_config(
            load_config(f"{CONFIG}:xsum", [*RECORDS[:1], "--config.eval.patience=0"])
        ).eval.patience
        == 0
    )
