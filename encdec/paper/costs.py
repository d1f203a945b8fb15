"""What a model of the comparison costs: its training step, first token, rate and memory.

Measured apart from the runs, in a few minutes, so that it can wait for a quiet machine. Times
do not depend on what the parameters are, so they are drawn.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

from encdec.benchmarks.generation import time_generation
from encdec.benchmarks.train_benchmark import OurStep
from encdec.cost.flops import cache_bytes, weight_bytes
from encdec.model import build_model, init_params
from encdec.paper.result_rows import COSTS
from encdec.paper.setting import (
    TEACHER,
    Column,
    PretrainSetting,
    Setting,
    model_of,
    run_config,
    steps_of,
    table_rows,
)
from encdec.result_lines import where_and_when
from encdec.train.run_config import RunConfig

STEPS = 10  # timed
INPUTS, NEW_TOKENS = 64, 64  # about the task's median source and target
REPEATS = 7


@dataclasses.dataclass(frozen=True)
class _Shape:
    """A run's step, as ``OurStep`` wants it."""

    config: RunConfig
    rows: int
    inputs: int
    targets: int

    def run(self) -> RunConfig:
        return self.config


def step_seconds(setting: Setting, row: str, shape: Column | PretrainSetting, steps: int) -> float:
    """Median seconds of one of so many steps of a row's model on full rows of random tokens."""
    run = run_config(
        setting, row, records="", eval_records="", batch_size=shape.batch_size, steps=steps, seed=0
    )
    step = OurStep(_Shape(run, shape.batch_size, shape.inputs, shape.targets))
    step()
    taken = []
    for _ in range(STEPS):
        begin = time.perf_counter()
        step()
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken)


def cost_rows(
    setting: Setting, column: Column, remark: str, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """A result row for every model; generation timings alternate, one text at a time.

    Args:
        setting: of the comparison.
        column: whose rows' shape and steps count.
        remark: on the machine's state, for the table.
        say: takes lines of progress.
    """
    names = [*table_rows(setting), TEACHER]
    models = {}
    for name in names:
        config = model_of(setting, name)
        params = jax.jit(init_params, static_argnums=0)(build_model(config), jax.random.key(0))
        models[name] = (config, params)
    timings = {
        one.model: one
        for one in time_generation(
            models, (INPUTS,), NEW_TOKENS, repeats=REPEATS, uncached_lengths=()
        )
    }
    rows = []
    for name in names:
        config, steps = models[name][0], steps_of(setting, name, column)
        seconds = step_seconds(setting, name, column, steps)
        say(f"{name}: {1e3 * seconds:.0f} ms per step")
        before = {}
        if whole := setting.pretrain.steps:
            pretraining = step_seconds(setting, name, setting.pretrain, whole)
            before["pretraining_step_seconds"] = pretraining
            say(f"{name}: {1e3 * pretraining:.0f} ms per step of pretraining")
        rows.append(
            {
                "kind": COSTS,
                "setting": setting.digest(with_teacher=name == TEACHER),
                "row": name,
                "column": column.name,
                "step_seconds": seconds,
                # As training FLOPs: of pretraining, too.
                "training_seconds": seconds * steps + whole * sum(before.values()),
                "first_token_seconds": timings[name].first_token.median,
                "tokens_per_second": timings[name].tokens_per_second.median,
                "memory_bytes": weight_bytes(config) + cache_bytes(config, INPUTS, NEW_TOKENS),
                "inputs": INPUTS,
                "new_tokens": NEW_TOKENS,
                "remark": remark,
            }
            | before
            | where_and_when()
        )
        jax.clear_caches()
    return rows
