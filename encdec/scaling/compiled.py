"""Memory and chip-hours of a plan's runs on a named topology, by compiling their real steps.

A compilation takes minutes and depends on the model, the rows per step and the run's settings, not
on its length. So each distinct step is compiled once, and its figures can be kept in a file:
one JSON line per step, appended, read again by the next call.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

from encdec.errors import ConfigError, DataError
from encdec.files import append_rows
from encdec.logs import Say
from encdec.scaling.ladder import Ladder
from encdec.scaling.planned_runs import PlannedRun, run_config
from encdec.scaling.results_file import json_value
from encdec.train.run_config import RunConfig, to_dict

# Fields of a run that change only constants of its program, or nothing in it.
_NO_COST = (
    "steps",
    "seed",
    "log_every",
    "init_from",
    "data",
    "eval",
    "checkpoint",
    "profile",
    "schedule",
)


@dataclasses.dataclass(frozen=True)
class StepFigures:
    """Predictions of ``encdec compile`` for one training step on a topology.

    Attributes:
        topology: its name.
        chips: in it.
        peak_bytes: of one device's memory; NaN if the step does not fit.
        limit_bytes: memory that the compiler lets a program use; NaN likewise.
        step_seconds: predicted; NaN likewise.
        mfu: predicted model FLOPs utilisation; NaN likewise.
        reason: why the step does not fit; "" if it does.
    """

    topology: str
    chips: int
    peak_bytes: float = math.nan
    limit_bytes: float = math.nan
    step_seconds: float = math.nan
    mfu: float = math.nan
    reason: str = ""

    def chip_hours(self, steps: int) -> float:
        return steps * self.step_seconds * self.chips / 3600


Compile = Callable[[RunConfig, str, int, int], StepFigures]


def compile_figures(run: RunConfig, topology: str, inputs: int, targets: int) -> StepFigures:
    """Compiles one step; a step that does not fit is a result too."""
    import jax

    from encdec.hardware.compile import DoesNotFit, compile_step
    from encdec.hardware.topology import find_topology

    if not jax.config.values["jax_platforms"]:  # do not use this machine's accelerators
        jax.config.update("jax_platforms", "cpu")
    where = find_topology(topology)
    try:
        step = compile_step(run, where, inputs, targets)
    except DoesNotFit as error:
        return StepFigures(topology, where.chips, reason=str(error))
    finally:
        jax.clear_caches()  # otherwise dozens of programs would stay in memory
    return StepFigures(
        topology, where.chips, step.memory.peak, step.memory.limit, step.step_seconds, step.mfu
    )


def step_figures(
    ladder: Ladder,
    runs: Iterable[PlannedRun],
    topology: str,
    kept: str | os.PathLike | None = None,
    say: Say = print,
    compile_: Compile | None = None,
) -> dict[str, StepFigures]:
    """The figures of every run's step, by the run's name.

    Args:
        ladder: the runs' ladder.
        runs: planned runs.
        topology: for example "v5e:16x16".
        kept: a file from which figures are read and to which new ones are appended; None: no file.
        say: takes lines of progress.
        compile_: ``compile_figures``, or a replacement.

    Raises:
        ConfigError: an unknown topology, no TPU compiler, or a batch not divisible by the mesh.
        DataError: a damaged file of kept figures.
    """
    found = read_kept(kept) if kept else {}
    keys = {run.name: step_key(ladder, run, topology) for run in runs}
    todo = {keys[run.name]: run for run in runs if keys[run.name] not in found}
    for number, (key, run) in enumerate(todo.items(), 1):
        say(f"[{number}/{len(todo)}] compiling {run.name}: {run.batch_size} rows on {topology}")
        found[key] = (compile_ or compile_figures)(
            run_config(ladder, run), topology, run.inputs, run.targets
        )
        if kept:
            _append(pathlib.Path(kept), key, found[key])
    return {name: found[key] for name, key in keys.items()}


def step_key(ladder: Ladder, run: PlannedRun, topology: str) -> str:
    """A key of everything that a step's figures depend on, including the compiler's version."""
    content = {k: v for k, v in to_dict(run_config(ladder, run)).items() if k not in _NO_COST}
    content["optimizer"] = {k: v for k, v in content["optimizer"].items() if k != "learning_rate"}
    loss = {k: v for k, v in content["distill"].items() if k != "teacher"}
    content["distill"] = loss if content["distill"]["teacher"] else None
    # The whole model: a preset may change while keeping its name.
    content["model"], content["model_overrides"] = run.model.to_dict(), None
    text = json.dumps(
        [content, run.inputs, run.targets, topology, _versions()], sort_keys=True, default=str
    )
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_kept(path: str | os.PathLike) -> dict[str, StepFigures]:
    """Figures by key; a line truncated by a crash is skipped.

    Raises:
        DataError: another line is damaged.
    """
    path = pathlib.Path(path)
    found: dict[str, StepFigures] = {}
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            content: dict[str, Any] = json.loads(line)
            values: dict[str, Any] = {
                k: math.nan if v is None else v for k, v in content.items() if k != "key"
            }
            found[str(content["key"])] = StepFigures(**values)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{path}, line {number} does not hold a step's figures ({error!r}); delete the "
                "line to have its step compiled again"
            ) from None
    return found


def _append(path: pathlib.Path, key: str, figures: StepFigures) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        append_rows(path, [json_value({"key": key, **dataclasses.asdict(figures)})])
    except OSError as error:
        raise ConfigError(f"--compiled={path} cannot be written: {error}") from None


@functools.cache
def _versions() -> tuple[str, ...]:
    found = []
    for name in ("jax", "jaxlib", "libtpu"):
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"no {name}")
    return tuple(found)
