"""Memory and chip-hours of a plan's runs on a named topology, by compiling their real steps.

A compilation takes minutes and depends on the model, the rows a step and how the run is set up, not
on how long it lasts. So each distinct step is compiled once, and its figures can be kept in a file:
one JSON line a step, appended, read again by the next call.
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
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from encdec.errors import ConfigError, DataError
from encdec.files import append_rows
from encdec.scaling.ladder import Ladder, PlannedRun, run_config
from encdec.train.config import RunConfig, to_dict

Say = Callable[[str], None]
# Of a run's configuration: what changes constants in its program, or nothing in it at all.
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
    """What ``encdec compile`` predicts of one training step on a topology.

    Attributes:
        topology: its name.
        chips: in it.
        peak_bytes: of one device's memory; NaN where the step does not fit.
        limit_bytes: of it, what the compiler lets a program use; NaN likewise.
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
        ladder: that the runs are of.
        runs: planned runs.
        topology: for example "v5e:16x16".
        kept: a file that figures are read from and appended to; None: none is kept.
        say: takes lines of progress.
        compile_: ``compile_figures``, or what stands for it.

    Raises:
        ConfigError: an unknown topology, no TPU compiler, or a batch that the mesh does not divide.
        DataError: a damaged file of kept figures.
    """
    if compile_ is None:
        compile_ = compile_figures
    found = read_kept(kept) if kept else {}
    keys = {run.name: step_key(ladder, run, topology) for run in runs}
    todo = {keys[run.name]: run for run in runs if keys[run.name] not in found}
    for number, (key, run) in enumerate(todo.items(), 1):
        say(f"[{number}/{len(todo)}] compiling {run.name}: {run.batch_size} rows on {topology}")
        found[key] = compile_(run_config(ladder, run), topology, run.inputs, run.targets)
        if kept:
            _append(pathlib.Path(kept), key, found[key])
    return {name: found[key] for name, key in keys.items()}


def step_key(ladder: Ladder, run: PlannedRun, topology: str) -> str:
    """Names everything that a step's figures depend on, the compiler's version too."""
    content = {k: v for k, v in to_dict(run_config(ladder, run)).items() if k not in _NO_COST}
    content["optimizer"] = {k: v for k, v in content["optimizer"].items() if k != "learning_rate"}
    content["distill"] = bool(content["distill"]["teacher"])
    # By the whole model: a preset may change under its name.
    content["model"], content["model_overrides"] = run.model.to_dict(), None
    text = json.dumps(
        [content, run.inputs, run.targets, topology, _versions()], sort_keys=True, default=str
    )
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def compile_figures(run: RunConfig, topology: str, inputs: int, targets: int) -> StepFigures:
    """Compiles one step; a step that does not fit is a result too."""
    import jax

    from encdec.hardware.compile import DoesNotFit, compile_step
    from encdec.hardware.topology import find_topology

    if not jax.config.jax_platforms:  # no accelerator of this machine is wanted
        jax.config.update("jax_platforms", "cpu")
    where = find_topology(topology)
    chips = math.prod(where.sides) * where.slices
    try:
        step = compile_step(run, where, inputs, targets)
    except DoesNotFit as error:
        return StepFigures(topology, chips, reason=str(error))
    finally:
        jax.clear_caches()  # dozens of programs would otherwise stay in memory
    return StepFigures(
        topology, chips, step.memory.peak, step.memory.limit, step.step_seconds, step.mfu
    )


def read_kept(path: str | os.PathLike) -> dict[str, StepFigures]:
    """Figures by key; a line that a crash cut short is passed over.

    Raises:
        DataError: another line is damaged.
    """
    path = pathlib.Path(path)
    found = {}
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            values = {k: math.nan if v is None else v for k, v in json.loads(line).items()}
            key = values.pop("key")
            found[key] = StepFigures(**values)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{path}, line {number} is no step's figures ({error!r}); delete the "
                "line, and its step is compiled again"
            ) from None
    return found


def _append(path: pathlib.Path, key: str, figures: StepFigures) -> None:
    values: Mapping[str, Any] = {
        name: None if isinstance(value, float) and math.isnan(value) else value
        for name, value in dataclasses.asdict(figures).items()
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        append_rows(path, [{"key": key, **values}])
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
