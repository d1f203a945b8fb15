"""Scores of a ladder's finished runs on a downstream task, for ``results_file`` to collect."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from typing import TYPE_CHECKING

import jax

from encdec.evaluation.evaluate import evaluate
from encdec.evaluation.evaluation_settings import EvaluationSettings
from encdec.evaluation.examples import Examples
from encdec.files import write_text
from encdec.inference.generation_settings import GenerationSettings
from encdec.jobs import claim_settings
from encdec.logs import logger
from encdec.scaling.planned_runs import Plan
from encdec.scaling.results_file import RESULTS_FILE, SCORES_FILE
from encdec.scaling.run import Workdir

if TYPE_CHECKING:
    import pathlib

    from etils import epath

_LOG = logger(__name__)

EVALUATION = "evaluation"  # folder of a run's work directory
TASK_FILE = "evaluation.json"  # of the ladder's: by what all runs are scored


def evaluate_plan(plan: Plan, workdir: str | os.PathLike, task: Examples) -> list[str]:
    """Evaluates every finished run without scores; returns their names.

    A run generates greedily, up to the ladder's target length, with inputs cut like its training
    rows. Scores are written atomically, then collected into the results.

    Args:
        plan: of the ladder in ``workdir``.
        workdir: the ladder's directory.
        task: examples that no run was trained on, and the metrics.

    Raises:
        ConfigError: the ladder's runs are scored on other examples or by other metrics.
    """
    place = Workdir(workdir)
    place.claim(plan.ladder)
    path = place.path / TASK_FILE
    examples = json.dumps([dataclasses.astuple(example) for example in task.examples])
    claim_settings(
        path,
        {"task": task.name, "metrics": task.metrics, "examples": len(task.examples)}
        | {"fingerprint": hashlib.sha256(examples.encode()).hexdigest()[:12]},
        holder=path,
        remedy="give the task, metrics and examples by which the other runs are scored, or, to "
        f"score all again, remove this file, runs/*/{SCORES_FILE}, runs/*/{EVALUATION} and the "
        f"lines with scores in {RESULTS_FILE}",
    )
    finished = place.gather(plan)
    todo = [
        run
        for run in plan.runs
        if run.name in finished and not (place.run_directory(run.name) / SCORES_FILE).exists()
    ]
    _LOG.info(
        f"{len(finished)} of {len(plan.runs)} runs are finished; {len(todo)} to evaluate on "
        f"{len(task.examples)} examples of {task.name}"
    )
    done = []
    for number, run in enumerate(todo, 1):
        with place.lock(run.name) as mine:
            if not mine:
                _LOG.info(f"{run.name}: another process evaluates it")
                continue
            folder = place.run_directory(run.name)
            scores = _scores(folder, run.targets, task)
            write_text(folder / SCORES_FILE, json.dumps(scores) + "\n")
        text = ", ".join(f"{name} {value['value']:.2f}" for name, value in scores.items())
        _LOG.info(f"[{number}/{len(todo)}] {run.name}: {text}")
        done.append(run.name)
    place.gather(plan)
    return done


def _scores(
    directory: pathlib.Path | epath.Path, tokens: int, task: Examples
) -> dict[str, dict[str, float]]:
    """Each defined score as {"value", "low", "high"}."""
    jax.clear_caches()  # each run has its own shapes, and programs stay in memory
    settings = EvaluationSettings(
        checkpoint=str(directory),
        out=str(directory / EVALUATION),
        generation=GenerationSettings(max_tokens=tokens),
        likelihood=False,
    )
    report = evaluate(settings, [task])
    assert report is not None, "one process alone answers every example"
    return {
        name: {
            bound: score[bound] for bound in ("value", "low", "high") if score[bound] is not None
        }
        for name, score in report["tasks"][task.name]["scores"].items()
        if score["value"] is not None
    }
