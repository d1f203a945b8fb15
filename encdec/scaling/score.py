"""Scores of a ladder's finished runs on a downstream task, left where ``results`` collects them."""

from __future__ import annotations

import itertools
import json
import math
import os
import pathlib
from collections.abc import Callable, Sequence

import numpy as np

from encdec.data.readers import BadRows
from encdec.data.text_tasks import TextTask
from encdec.errors import DataError
from encdec.inference.generator import load_generator
from encdec.inference.settings import GenerationSettings
from encdec.scaling.intervals import Interval
from encdec.scaling.ladder import Plan
from encdec.scaling.results import SCORES_FILE
from encdec.scaling.run import Workdir

Example = tuple[str, tuple[str, ...]]


def task_examples(task: TextTask, split: str, limit: int | None = None) -> list[Example]:
    """(source, references) of a split, the first ``limit`` of them.

    Raises:
        DataError: the task has no pairs, no metrics, or no such split.
    """
    if not task.metrics:
        raise DataError(
            f"--task={task.name} has no metrics; wanted one of `encdec data list` that names some"
        )
    examples = list(itertools.islice(task.examples(split, BadRows()), limit))
    if not examples:
        raise DataError(f"split {split!r} of {task.name} is empty")
    return examples


def score_plan(
    plan: Plan,
    workdir: str | os.PathLike,
    task: TextTask,
    examples: Sequence[Example],
    say: Callable[[str], None] = print,
) -> list[str]:
    """Scores every finished run that has no scores yet; returns their names.

    A run generates greedily, up to the ladder's target length, with inputs cut as its training
    rows were. The scores are written whole or not at all, then collected into the results.

    Args:
        plan: of the ladder in ``workdir``.
        workdir: the ladder's directory.
        task: gives the metrics.
        examples: (source, references) that no run was trained on.
        say: takes lines of progress.
    """
    place = Workdir(workdir)
    place.claim(plan.ladder)
    finished = place.gather(plan)
    todo = [
        run
        for run in plan.runs
        if run.name in finished and not (place.run_directory(run.name) / SCORES_FILE).exists()
    ]
    say(
        f"{len(finished)} of {len(plan.runs)} runs are finished; {len(todo)} to score on "
        f"{len(examples)} examples of {task.name}"
    )
    done = []
    for number, run in enumerate(todo, 1):
        with place.lock(run.name) as mine:
            if not mine:
                say(f"{run.name}: another process is at it")
                continue
            answers = _answers(place.run_directory(run.name), run.targets, examples)
            scores = with_intervals(task, examples, answers)
            _write(place.run_directory(run.name) / SCORES_FILE, scores)
        text = ", ".join(f"{name} {value['value']:.2f}" for name, value in scores.items())
        say(f"[{number}/{len(todo)}] {run.name}: {text}")
        done.append(run.name)
    place.gather(plan)
    return done


def _answers(directory: pathlib.Path, tokens: int, examples: Sequence[Example]) -> list[str]:
    import jax

    jax.clear_caches()  # each run's shape is its own; dozens of programs would stay in memory
    generator = load_generator(directory)
    answers = generator.generate(
        [source for source, _ in examples], GenerationSettings(max_tokens=tokens), truncate=True
    )
    return [answer[0].text for answer in answers]


def with_intervals(
    task: TextTask, examples: Sequence[Example], answers: Sequence[str], draws: int = 1000
) -> dict[str, dict[str, float]]:
    """The task's metrics as {"value", "low", "high"}, with 95 % bootstrap intervals over examples.

    A metric that is no mean over examples (a corpus BLEU) has a value alone.
    """
    references = [found for _, found in examples]
    scores = {}
    for metric in task.metrics:
        whole = metric(references, answers)
        single = [metric([wanted], [text]) for wanted, text in zip(references, answers)]
        for name, value in whole.items():
            scores[name] = {"value": float(value)}
            each = np.array([one.get(name, math.nan) for one in single], np.float64)
            if len(each) > 1 and math.isclose(each.mean(), value, rel_tol=1e-6, abs_tol=1e-9):
                drawn = np.random.default_rng(0).integers(0, len(each), (draws, len(each)))
                interval = Interval.of(each[drawn].mean(1))
                scores[name] |= {"low": interval.low, "high": interval.high}
    return scores


def _write(path: pathlib.Path, scores: dict[str, dict[str, float]]) -> None:
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    partial.write_text(json.dumps(scores) + "\n")
    os.replace(partial, path)
