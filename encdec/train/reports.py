"""Metrics of steps on their way from the devices to the writers, one step behind."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import numpy as np

from encdec.cost.chips import peak_flops
from encdec.cost.flops import training_flops
from encdec.errors import NonFiniteError
from encdec.train.checkpoints import Checkpoints
from encdec.train.goodput import Goodput
from encdec.train.job import Job
from encdec.train.metrics import Window
from encdec.train.step import StepMetrics
from encdec.train.tensorboard import metric_writers

OnReport = Callable[[int, Mapping[str, float]], None]


class Reports:
    """Metrics of steps on their way from the devices to the writers, one step behind."""

    def __init__(
        self,
        job: Job,
        checkpoints: Checkpoints,
        writer: metric_writers.MetricWriter,
        stop: int,
        on_report: OnReport | None,
        goodput: Goodput,
    ):
        card = job.records.card
        lengths = card.inputs_length, card.targets_length
        self.window = Window(
            training_flops(job.model, *lengths, batch_size=job.run.batch_size),
            peak_flops(list(job.program.mesh.devices.flat)),
            goodput,
        )
        self.goodput = goodput
        self._job, self._checkpoints, self._writer = job, checkpoints, writer
        self._stop, self._on_report = stop, on_report
        self._pending: tuple[int, StepMetrics] | None = None
        self._last: dict[str, float] = {}

    def take(self, step: int, metrics: StepMetrics) -> None:
        """Accepts a step's metrics while they are still being computed."""
        self.settle()
        self._pending = step, metrics

    def settle(self) -> None:
        """Waits for the metrics that are still out, checks them, and writes what is due."""
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        metrics = jax.device_get(metrics)
        self._require_finite(step, metrics)
        self.window.add(metrics)
        if step % self._job.run.log_every == 0 or step == self._stop:
            self.write(step, self.window.report(step))

    def write(self, step: int, numbers: dict[str, float]) -> None:
        self._last |= numbers
        self._writer.write_scalars(step, numbers)
        if self._on_report:
            self._on_report(step, numbers)

    def flush(self) -> None:
        """Returns when all that was reported is in the files."""
        self._writer.flush()

    def last(self, prefix: str) -> dict[str, float]:
        return {name: value for name, value in self._last.items() if name.startswith(prefix)}

    def _require_finite(self, step: int, metrics: StepMetrics) -> None:
        values = {
            "loss": metrics.sums.losses.objective,
            "gradient norm": metrics.gradient_norm,
            "parameter norm": metrics.param_norm,
        }
        bad = [f"{name} is {value}" for name, value in values.items() if not np.isfinite(value)]
        if not bad:
            return
        self._checkpoints.wait()
        good = self._checkpoints.latest()
        where = (
            f"the last good checkpoint is step {good} in {self._checkpoints.directory}"
            if good is not None
            else "no checkpoint had been saved yet"
        )
        raise NonFiniteError(
            f"step {step}: {', '.join(bad)}; {where}. A lower config.optimizer.learning_rate, a "
            "longer warmup or config.loss.z_loss=1e-4 may help",
            step,
        )
