"""What a run reports: numbers from steps' sums, and the places they are written to."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

import jax
import numpy as np
from etils import epath

from encdec.cost.flops import model_flops_utilisation
from encdec.files import LineAppender, keep_lines, whole_lines
from encdec.logs import shows_progress
from encdec.metrics.score import bits_per_byte
from encdec.storage import as_path
from encdec.train.goodput import Goodput
from encdec.train.step import Metrics, StepMetrics
from encdec.train.tensorboard import SummaryWriter, metric_writers

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"


class Window:
    """The steps since the last report: their sums, and the time they took.

    Time is taken where a step's metrics arrive, so that the device's work is in it; what is
    done under ``pause`` (evaluation, waiting for a checkpoint) is not, nor is compilation, which
    ends when the first step's metrics arrive.

    Args:
        step_flops: of one step, forward and backward over whole rows, padding included.
        peak: FLOP/s of all devices; None on chips without a published figure.
        goodput: takes the time by what it was spent on.
    """

    def __init__(self, step_flops: float, peak: float | None, goodput: Goodput):
        self._step_flops, self._peak, self._goodput = step_flops, peak, goodput
        self._clock: float | None = None
        self._reset()

    def _reset(self) -> None:
        self._sums: Metrics | None = None
        self._last: StepMetrics | None = None
        self._timed_tokens = np.zeros(2)
        self._timed_steps = 0
        self._seconds = 0.0

    def add(self, metrics: StepMetrics) -> None:
        """Takes one step's metrics, already on the host."""
        sums = jax.tree.map(lambda x: np.asarray(x, np.float64), metrics.sums)
        # In numpy: a device would add them only after the step that it is working on.
        self._sums = sums if self._sums is None else jax.tree.map(np.add, self._sums, sums)
        self._last = metrics
        now = time.monotonic()
        if self._clock is None:
            self._goodput.started_up()
        else:
            self._seconds += now - self._clock
            self._goodput.add("step", now - self._clock)
            self._timed_steps += 1
            self._timed_tokens += (sums.source_tokens, sums.target_tokens)
        self._clock = now

    @contextmanager
    def pause(self, part: str) -> Iterator[None]:
        """Keeps what is done inside out of the throughput; ``part``: of ``goodput.PARTS``."""
        started = time.monotonic()
        running = self._clock is not None
        if self._clock is not None:
            self._seconds += started - self._clock
            self._goodput.add("step", started - self._clock)
        yield
        now = time.monotonic()
        self._goodput.add(part, now - started)
        self._clock = now if running else None

    def report(self, steps_done: int) -> dict[str, float]:
        """The window's numbers by name; starts the next window. Losses are nats per token."""
        assert self._sums is not None and self._last is not None
        losses, last = self._sums.losses, self._last
        weight = max(float(losses.weight), 1.0)
        report = {
            "train/loss": float(losses.cross_entropy) / weight,
            "train/objective": float(losses.objective) / weight,
            "train/z_loss": float(losses.z_loss) / weight,
            "train/accuracy": float(losses.correct) / weight,
            "train/gradient_norm": float(last.gradient_norm),
            "train/param_norm": float(last.param_norm),
            "train/learning_rate": float(last.learning_rate),
            "train/flops": self._step_flops * steps_done,
        }
        if losses.teacher is not None and last.alpha is not None:
            report |= {
                "train/distill_loss": float(losses.teacher.divergence) / weight,
                "train/teacher_entropy": float(losses.teacher.entropy) / weight,
                "train/alpha": float(last.alpha),
            }
        if self._timed_steps and self._seconds:
            source, target = self._timed_tokens / self._seconds
            step_seconds = self._seconds / self._timed_steps
            report |= {
                "train/step_seconds": step_seconds,
                "train/source_tokens_per_second": float(source),
                "train/target_tokens_per_second": float(target),
            }
            if self._peak:
                report["train/mfu"] = model_flops_utilisation(
                    self._step_flops, step_seconds, self._peak
                )
        self._reset()
        return report | self._goodput.report()


def eval_report(sums: Metrics, target_bytes: float, target_tokens: float) -> dict[str, float]:
    """Loss per target token and per byte of target text.

    Args:
        sums: over the evaluated rows, on the host.
        target_bytes: UTF-8 bytes of all target text in the records.
        target_tokens: target tokens in the records; where fewer were evaluated, bytes are
            scaled by the share.
    """
    losses, tokens = sums.losses, float(sums.target_tokens)
    weight = max(float(losses.weight), 1.0)
    text_bytes = target_bytes * tokens / max(target_tokens, 1)
    per_byte = float(losses.cross_entropy) / max(text_bytes, 1.0)
    return {
        "eval/loss": float(losses.cross_entropy) / weight,
        "eval/loss_per_byte": per_byte,
        "eval/bits_per_byte": bits_per_byte(float(losses.cross_entropy), max(text_bytes, 1.0)),
        "eval/accuracy": float(losses.correct) / weight,
        "eval/target_tokens": tokens,
    }


class ScalarWriter(metric_writers.MetricWriter):
    """A clu writer that takes scalars and leaves everything else to the other writers."""

    def _ignore(self, *arguments: Any, **more: Any) -> None:
        """Nothing but scalars is written here."""

    write_summaries = write_images = write_videos = write_audios = write_texts = _ignore
    write_histograms = write_hparams = _ignore

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


class JsonLinesWriter(ScalarWriter):
    """One JSON object a line: step, wall-clock time, and the numbers by name."""

    def __init__(self, path: epath.PathLike, start_step: int = 0):
        """Continues the file; lines after ``start_step`` were written by a process that ended
        before it saved, and are dropped, because this one will write them again. So are all where
        nothing was saved, with the evaluation before the first step."""
        path = as_path(path)
        keep_lines(path, lambda line: _step_of(line) < _first_step(start_step))
        self._lines = LineAppender(path)

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        record = {"step": step, "time": round(time.time(), 3)}
        record |= {name: float(value) for name, value in scalars.items()}
        self._lines.append(record)


def _first_step(start_step: int) -> int:
    """The first step whose numbers a process that starts at ``start_step`` writes again."""
    return start_step + 1 if start_step else 0


def _step_of(line: bytes) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return math.inf  # a line cut short when its process was killed


def read_metrics(workdir: epath.PathLike) -> list[dict[str, float]]:
    """All lines of a work directory's ``metrics.jsonl``, but for one that a kill cut short."""
    lines = whole_lines(as_path(workdir) / METRICS_FILE)
    return [json.loads(line) for _, line in lines if _step_of(line) < math.inf]


class Console(ScalarWriter):
    """A progress bar on a terminal, plain lines elsewhere; nothing but on the first process."""

    def __init__(
        self, steps: int, start_step: int = 0, stream: TextIO | None = None, what: str = "train"
    ):
        self._steps, self._stream, self._bar = steps, stream or sys.stderr, None
        self._others = jax.process_index() > 0
        self._quiet = self._others or not shows_progress()
        if self._stream.isatty() and not self._quiet:
            from rich.console import Console as RichConsole
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                Progress,
                TextColumn,
                TimeElapsedColumn,
                TimeRemainingColumn,
            )

            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=RichConsole(file=self._stream),
                transient=True,
            )
            self._task = self._bar.add_task(what, total=steps, completed=start_step)
            self._bar.start()

    def advance(self, step: int) -> None:
        """Moves the bar; without a terminal only the reports say where the run is."""
        if self._bar:
            self._bar.update(self._task, completed=step)

    def say(self, text: str) -> None:
        """One line about the run."""
        if not self._quiet:
            self._line(text)

    def warn(self, text: str) -> None:
        """The same of what must be known, which ``--quiet`` shows, too."""
        if not self._others:
            self._line(text)

    def _line(self, text: str) -> None:
        if self._bar:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=self._stream, flush=True)

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        parts = [f"step {step:,}/{self._steps:,}"]
        parts += [
            f"{label} {form(float(scalars[name]))}"
            for name, label, form in _SHOWN
            if name in scalars
        ]
        if "train/step_seconds" in scalars and not self._bar and step < self._steps:
            parts.append(f"left {_duration(scalars['train/step_seconds'] * (self._steps - step))}")
        self.say("  ".join(parts))

    def close(self) -> None:
        if self._bar:
            self._bar.stop()


_SHOWN = (
    ("train/loss", "loss", "{:.4f}".format),
    ("train/distill_loss", "distill", "{:.4f}".format),
    ("train/learning_rate", "lr", "{:.2e}".format),
    ("train/gradient_norm", "grad", "{:.2f}".format),
    ("train/source_tokens_per_second", "source tok/s", "{:,.0f}".format),
    ("train/target_tokens_per_second", "target tok/s", "{:,.0f}".format),
    ("train/mfu", "MFU", "{:.1%}".format),
    ("goodput/share", "goodput", "{:.0%}".format),
    ("eval/loss", "eval loss", "{:.4f}".format),
    ("eval/bits_per_byte", "bits/byte", "{:.4f}".format),
    ("eval/accuracy", "accuracy", "{:.1%}".format),
)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"


def make_writer(
    workdir: epath.PathLike,
    start_step: int,
    console: Console,
    trackers: Callable[[], Sequence[metric_writers.MetricWriter]] = tuple,
) -> metric_writers.MetricWriter:
    """Writes to ``metrics.jsonl``, to TensorBoard events, to trackers and to the console.

    Files are written by process 0 alone, in a thread of their own.
    """
    if jax.process_index():
        return metric_writers.MultiWriter([])
    workdir = as_path(workdir)
    files = metric_writers.AsyncMultiWriter(
        [
            JsonLinesWriter(workdir / METRICS_FILE, start_step),
            SummaryWriter(os.fspath(workdir / TENSORBOARD_FOLDER), _first_step(start_step)),
            *trackers(),
        ]
    )
    return metric_writers.MultiWriter([files, console])
