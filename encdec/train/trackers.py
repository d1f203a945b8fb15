"""Weights & Biases and MLflow as further writers of a run's metrics, next to TensorBoard.

Where they write is their own environment's business: WANDB_MODE=offline, WANDB_PROJECT,
MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME and the rest. A run that is continued continues its
entry there. A tracker that fails does not end the run: it is reported and left out from then on.
"""

from __future__ import annotations

import importlib
import json
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

from etils import epath

from encdec.errors import ConfigError
from encdec.fields import flattened, listed
from encdec.files import write_json
from encdec.logs import Say
from encdec.packages import require
from encdec.storage import directory_name
from encdec.train.metrics import ScalarWriter

PROJECT = "encdec"  # where the environment names none
IDS_FILE = "trackers.json"  # which entry of a tracker is this run
PARAMETER_CHARACTERS = 500  # that every MLflow server takes
PARAMETERS_AT_ONCE = 100


def tracker_names(trackers: str) -> list[str]:
    """The trackers that ``config.trackers`` names.

    Raises:
        ConfigError: one that is unknown or named twice, or whose package is not installed.
    """
    names = list(listed(trackers, "config.trackers"))
    for name in names:
        if name not in TRACKERS or names.count(name) > 1:
            raise ConfigError(
                f"config.trackers is {trackers!r}; expected {' or '.join(TRACKERS)}, each once"
            )
        require(name, "trackers", f"config.trackers={name}")
    return names


def make_trackers(
    names: list[str], workdir: epath.PathLike, settings: Mapping[str, Any], say: Say
) -> list[ScalarWriter]:
    """A writer for each tracker; ``settings`` are what it shows as the run's configuration."""
    workdir = epath.Path(workdir)
    path = workdir / IDS_FILE
    ids = json.loads(path.read_text()) if path.exists() else {}
    flat = flattened(settings)
    writers: list[ScalarWriter] = []
    for name in names:
        try:
            tracker = TRACKERS[name](workdir, ids.get(name), flat)
        except Exception as error:  # of a library, its server or its network
            say(f"warning: {name} did not start ({_line(error)}); the run continues without it")
            continue
        ids[name] = tracker.id
        writers.append(_Guarded(name, tracker, say))
    if writers:
        write_json(path, ids)
    return writers


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


class _Guarded(ScalarWriter):
    """A tracker whose first failure is reported and ends it instead of the run."""

    def __init__(self, name: str, tracker: Any, say: Say):
        self._name, self._tracker, self._say = name, tracker, say

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        self._try(lambda tracker: tracker.log(step, {k: float(v) for k, v in scalars.items()}))

    def close(self) -> None:
        self._try(lambda tracker: tracker.close())

    def _try(self, action: Callable[[Any], None]) -> None:
        if self._tracker is None:
            return
        try:
            action(self._tracker)
        except Exception as error:  # of a library, its server or its network
            self._tracker = None
            self._say(
                f"warning: {self._name} failed ({_line(error)}); the run continues without it, and "
                "metrics.jsonl has everything"
            )


class WandbTracker:
    """A run of Weights & Biases; its files are in the work directory."""

    def __init__(self, workdir: epath.Path, known: str | None, settings: Mapping[str, Any]):
        wandb = importlib.import_module("wandb")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            name=os.environ.get("WANDB_NAME") or directory_name(workdir),
            dir=os.fspath(workdir),
            id=known,
            resume="allow" if known else None,
            config=dict(settings),
        )
        self.id = self._run.id

    def log(self, step: int, numbers: dict[str, float]) -> None:
        self._run.log(numbers, step=step)

    def close(self) -> None:
        self._run.finish()


class MlflowTracker:
    """A run of MLflow."""

    def __init__(self, workdir: epath.Path, known: str | None, settings: Mapping[str, Any]):
        mlflow = importlib.import_module("mlflow")
        self._entities = importlib.import_module("mlflow.entities")
        self._client = mlflow.MlflowClient()
        if known:
            self.id = known
            self._client.update_run(known, status="RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
        experiment = self._client.get_experiment_by_name(name)
        number = experiment.experiment_id if experiment else self._client.create_experiment(name)
        self.id = self._client.create_run(number, run_name=directory_name(workdir)).info.run_id
        parameters = [
            self._entities.Param(key, str(value)[:PARAMETER_CHARACTERS])
            for key, value in settings.items()
        ]
        for first in range(0, len(parameters), PARAMETERS_AT_ONCE):
            self._client.log_batch(self.id, params=parameters[first : first + PARAMETERS_AT_ONCE])

    def log(self, step: int, numbers: dict[str, float]) -> None:
        now = round(1000 * time.time())
        metrics = [self._entities.Metric(k, v, now, step) for k, v in numbers.items()]
        self._client.log_batch(self.id, metrics=metrics)

    def close(self) -> None:
        self._client.set_terminated(self.id)


TRACKERS: dict[str, Callable[..., Any]] = {"wandb": WandbTracker, "mlflow": MlflowTracker}
