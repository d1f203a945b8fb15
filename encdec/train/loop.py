"""The life of a run: check everything, start or resume, step, report, evaluate, save."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from encdec.data.records import DatasetCard, Records, open_records
from encdec.data.teacher_rows import TeacherRows, open_teacher
from encdec.errors import ConfigError, DataError, NonFiniteError, Preempted
from encdec.model import ModelConfig, parameter_count
from encdec.storage import local
from encdec.train.checkpoints import Checkpoints
from encdec.train.config import RunConfig, parse_config
from encdec.train.distillation_losses import check_divergence
from encdec.train.evaluate import Evaluator
from encdec.train.feed import on_devices, open_batches
from encdec.train.goodput import Goodput, last_report
from encdec.train.lineage import source_note
from encdec.train.metrics import METRICS_FILE, Console, Cost, Window, make_writer, read_metrics
from encdec.train.preemption import Notice
from encdec.train.processes import from_first
from encdec.train.program import Program, build_program
from encdec.train.sharding import make_mesh
from encdec.train.state import TrainState
from encdec.train.step import StepMetrics
from encdec.train.tensorboard import metric_writers, periodic_actions
from encdec.train.warm_start import StartPlan, plan_start, start_from, with_source_model
from encdec.train.workdir import (
    STARTED_NOTE,
    check_workdir,
    describe_run,
    note_source,
    notes,
    write_workdir,
)

OnReport = Callable[[int, Mapping[str, float]], None]


@dataclasses.dataclass(frozen=True)
class Summary:
    """How a run ended.

    Attributes:
        workdir: where its checkpoint and metrics lie.
        step: steps done in all.
        train: the last training report, names as in ``metrics.jsonl``; empty if no step was left.
        eval: the evaluation after the last step; empty without held-out records.
        seconds: wall time of this call.
    """

    workdir: str
    step: int
    train: dict[str, float]
    eval: dict[str, float]
    seconds: float


@dataclasses.dataclass(frozen=True)
class Job:
    """A run that passed every check; nothing has been computed or written yet."""

    run: RunConfig
    model: ModelConfig
    records: Records
    eval_records: Records | None
    teacher: TeacherRows | None
    program: Program
    description: dict[str, Any]
    start: StartPlan | None  # of a run that begins from another's parameters


def prepare_job(config: Any, workdir: epath.PathLike) -> Job:
    """Checks configuration, records, vocabulary, teacher, mesh, batch and work directory, in order.

    Raises:
        ConfigError: a field that is unknown, ill-typed, out of range or at odds with the devices.
        DataError: records that are missing, unfinished or do not fit the model, or a teacher's
            shards that do not belong to them.
        CheckpointError: a work directory that holds another run.
    """
    local("--workdir", workdir)
    run = with_source_model(parse_config(config), workdir)
    model = run.model_config()
    if not run.data.records:
        raise ConfigError(
            "config.data.records is empty; wanted a directory written by "
            "`encdec prepare`: --config.data.records=DIR"
        )
    records = open_records(run.data.records)
    eval_records = open_records(run.data.eval_records) if run.data.eval_records else None
    check_records(model, records.card, eval_records.card if eval_records else None)
    teacher = open_teacher(run.distill.teacher, records) if run.distill.teacher else None
    if teacher:
        check_teacher(run, teacher)
    mesh = make_mesh(run.mesh)
    program = build_program(run, model, mesh, records.card.targets_length)
    description = describe_run(
        run,
        model,
        records.card,
        eval_records.card if eval_records else None,
        teacher.fingerprint if teacher else None,
    )
    resumes = check_workdir(workdir, description)
    start = plan_start(run, model, records.card) if run.init_from and not resumes else None
    return Job(run, model, records, eval_records, teacher, program, description, start)


def check_teacher(run: RunConfig, teacher: TeacherRows) -> None:
    """Raises ConfigError unless the stored distributions can give the loss that is asked for."""
    stored = teacher.format
    check_divergence(run.distill.loss, stored.method)
    if stored.temperature != run.distill.temperature:
        raise ConfigError(
            f"config.distill.temperature is {run.distill.temperature}, but {run.distill.teacher} "
            f"was scored at {stored.temperature}; set the field to that, or score with "
            f"--temperature={run.distill.temperature}"
        )
    if stored.method == "full" and run.loss.vocab_tile:
        raise ConfigError(
            f"config.loss.vocab_tile is {run.loss.vocab_tile}, but the teacher's rows are full, "
            "which need all scores at once; set it to 0, or score with --method=sampled"
        )


def check_records(model: ModelConfig, card: DatasetCard, eval_card: DatasetCard | None) -> None:
    """Raises DataError unless the records fit the model and the held-out records fit both."""
    size = card.vocabulary.size
    if size > model.vocab_size:
        raise DataError(
            f"the records' vocabulary has {size:,} ids, but the model's table only "
            f"{model.vocab_size:,} rows; set --config.model_overrides.vocab_size={size} or more, "
            "or prepare with a smaller vocabulary"
        )
    if eval_card is None:
        return
    for name, pick in (
        ("vocabulary fingerprint", lambda c: c.vocabulary.fingerprint[:16]),
        ("inputs_length", lambda c: c.inputs_length),
        ("targets_length", lambda c: c.targets_length),
        ("decoder_start_id", lambda c: c.decoder_start_id),
    ):
        if pick(card) != pick(eval_card):
            raise DataError(
                f"held-out records have {name} {pick(eval_card)}, the training records "
                f"{pick(card)}; prepare both alike"
            )


def train(
    config: Any,
    workdir: epath.PathLike,
    *,
    stop_at: int | None = None,
    on_report: OnReport | None = None,
) -> Summary:
    """Trains a model, or continues where the work directory's last checkpoint ends.

    Args:
        config: a RunConfig, or a ConfigDict or mapping of its fields.
        workdir: receives configuration, vocabulary, parameter table, metrics and checkpoints.
        stop_at: stop and save after this many steps in all, before ``config.steps``.
        on_report: called with (step, numbers) at every report, on every process.

    Raises:
        ConfigError, DataError, CheckpointError: see ``prepare_job``; nothing was written.
        NonFiniteError: a loss, gradient or parameter is NaN or infinite.
        Preempted: the machine will be taken away (SIGTERM); everything is saved.
    """
    started, entered = time.monotonic(), time.time()
    if stop_at is not None and stop_at < 1:
        raise ConfigError(f"stop_at is {stop_at}; wanted a step of 1 or more")
    job = prepare_job(config, workdir)
    run = job.run
    kept = {STARTED_NOTE: entered} | notes(workdir)
    write_workdir(workdir, job.description | kept, job.records, job.program)
    stop = min(run.steps, stop_at or run.steps)
    with contextlib.ExitStack() as closing:
        notice = closing.enter_context(Notice())
        console = Console(run.steps)
        closing.callback(console.close)
        losses: dict[int, float] = {}
        checkpoints = Checkpoints(workdir, run.checkpoint, losses, console.say)
        closing.callback(checkpoints.close)
        _introduce(job, console)
        state, start = _begin(job, workdir, checkpoints, console)
        rows = _earlier_rows(workdir, start)
        losses |= {int(row["step"]): row["eval/loss"] for row in rows if "eval/loss" in row}
        goodput = Goodput(entered, kept[STARTED_NOTE], last_report(rows, start))
        console.advance(start)
        writer = make_writer(workdir, start, console)
        closing.callback(writer.close)
        reports = _Reports(job, checkpoints, writer, stop, on_report, goodput)
        done = _run_steps(
            job, workdir, state, start, stop, checkpoints, reports, console, losses, notice
        )
    return Summary(
        str(workdir),
        done,
        reports.last("train/"),
        reports.last("eval/"),
        time.monotonic() - started,
    )


def _begin(
    job: Job, workdir: epath.PathLike, checkpoints: Checkpoints, console: Console
) -> tuple[TrainState, int]:
    """The state to go on from, and its step: the last whole checkpoint's, or a new one."""
    restored = checkpoints.restore(job.program.abstract_state)
    if restored:
        console.say(f"resuming {workdir} after step {restored[1]:,}")
        return restored
    state = job.program.init()
    if job.run.init_from:
        start = job.start or plan_start(job.run, job.model, job.records.card)
        state, origin = start_from(state, start, job.model)
        origin.write(workdir)
        note_source(workdir, source_note(job.run.init_from, origin.step))
        console.say(str(origin))
    checkpoints.prepare(state)
    return state, 0


def _earlier_rows(workdir: epath.PathLike, start: int) -> list[dict[str, float]]:
    """What ``metrics.jsonl`` says of the steps up to ``start``, the same on every process."""
    rows = []
    if start and not jax.process_index() and (epath.Path(workdir) / METRICS_FILE).exists():
        rows = [row for row in read_metrics(workdir) if row["step"] <= start]
    return from_first(rows)


def _run_steps(
    job: Job,
    workdir: epath.PathLike,
    state: TrainState,
    start: int,
    stop: int,
    checkpoints: Checkpoints,
    reports: _Reports,
    console: Console,
    losses: dict[int, float],
    notice: Notice,
) -> int:
    """The loop itself: steps ``start + 1`` ... ``stop``, and what is due after each.

    Returns the steps done in all: fewer than ``stop`` where patience ended.

    Raises:
        Preempted: the machine will be taken away; everything is saved.
    """
    run, program = job.run, job.program
    evaluator = Evaluator(program, run, job.model, job.eval_records) if job.eval_records else None
    batches = open_batches(
        job.records,
        job.model,
        program.batch_sharding,
        run.batch_size,
        seed=run.seed,
        shuffle=run.data.shuffle,
        columns=[job.teacher] if job.teacher else [],
    )

    def save(step: int, t: float) -> None:
        reports.settle()  # a state is saved only when its metrics are known to be finite
        with reports.window.pause("checkpoint"):
            checkpoints.save(step, state)

    def evaluate(step: int, t: float) -> None:
        reports.settle()
        with reports.window.pause("evaluation"):
            report = evaluator(state.params, notice.reached)
        if report is None:
            leave(step)  # the next process finds the evaluation missing and makes up for it
        losses[step] = report["eval/loss"]
        reports.write(step, report | reports.goodput.report())

    def leave(step: int) -> None:
        reports.settle()
        if step and checkpoints.latest() != step:
            save(step, 0.0)
        checkpoints.wait()
        raise Preempted(
            f"the machine is being taken away: step {step:,} is saved in "
            f"{checkpoints.directory}; the same command goes on from there"
        )

    def patience_ended() -> bool:
        return out_of_patience([losses[step] for step in sorted(losses)], run.eval.patience)

    actions = [
        periodic_actions.PeriodicCallback(
            every_steps=run.checkpoint.every or None, on_steps=[stop], callback_fn=save
        )
    ]
    if evaluator:
        actions.append(
            periodic_actions.PeriodicCallback(
                every_steps=run.eval.every or None, on_steps=[run.steps], callback_fn=evaluate
            )
        )
    if run.profile.first_step and not jax.process_index():
        actions.append(
            periodic_actions.Profile(
                logdir=epath.Path(workdir) / "profile",
                first_profile=run.profile.first_step,
                num_profile_steps=run.profile.steps,
                profile_duration_ms=None,
                every_secs=None,
            )
        )

    # A finished run is evaluated again, to say how good it is; another where its last process
    # ended between saving and evaluating.
    due = (
        start == run.steps
        or run.eval.every
        and start % run.eval.every == 0
        and (start not in losses)
    )
    if evaluator and start and due:
        evaluate(start, 0.0)
    if start < stop and notice.reached():
        leave(start)
    if start < stop and patience_ended():
        console.say(f"no lower held-out loss in {run.eval.patience} evaluations: nothing to do")
        return start
    for step, batch in enumerate(
        on_devices(batches, program.batch_sharding, start, stop), start + 1
    ):
        with jax.transfer_guard("disallow"):
            state, metrics = program.train_step(state, batch)
        # Reads the metrics of the step before, while the device works on this one.
        reports.take(step, metrics)
        for action in actions:
            action(step)
        console.advance(step)
        if step < stop and patience_ended():
            reports.settle()
            console.say(f"no lower held-out loss in {run.eval.patience} evaluations: the run ends")
            if checkpoints.latest() != step:
                save(step, 0.0)
            checkpoints.wait()
            return step
        if step < stop and notice.reached():
            leave(step)
    reports.settle()
    checkpoints.wait()
    return max(start, stop)


def out_of_patience(losses: Sequence[float], patience: int) -> bool:
    """Whether the last ``patience`` held-out losses are all no lower than one before them."""
    return 0 < patience < len(losses) and min(losses[-patience:]) >= min(losses[:-patience])


class _Reports:
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
        self.window = Window(
            Cost.of(
                job.model,
                job.run.batch_size,
                card.inputs_length,
                card.targets_length,
                list(job.program.mesh.devices.flat),
            ),
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
            "longer warmup or config.loss.z_loss=1e-4 may help"
        )


def _introduce(job: Job, console: Console) -> None:
    """Says what is about to happen."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in job.program.mesh.shape.items())
    device = jax.devices()[0].device_kind
    console.say(
        f"{job.run.model}: {parameter_count(job.program.abstract_state.params):,} parameters, "
        f"{job.run.steps:,} steps of {job.run.batch_size} rows, {jax.device_count()} x {device} "
        f"({mesh})"
    )
    if job.teacher:
        console.say(job.teacher.describe())
    for item in job.program.unsharded:
        console.say(f"not split: {item}")
