"""A run in progress: its state, and what is done between steps."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from math import inf, isnan
from typing import Any, NoReturn

import jax
from etils import epath

from encdec.errors import Preempted
from encdec.files import lines_exist, sole_writer
from encdec.machine import return_freed_memory
from encdec.model import parameter_count
from encdec.processes import done_by_first, from_first
from encdec.saved.lineage import source_record
from encdec.storage import as_path, make_directory
from encdec.train.checkpoints import Checkpoints
from encdec.train.evaluator import Evaluator
from encdec.train.feed import on_devices, open_batches
from encdec.train.goodput import Goodput, last_report
from encdec.train.job import Job
from encdec.train.metrics import METRICS_FILE, Console, make_writer, read_metrics
from encdec.train.preemption import Notice
from encdec.train.reports import OnReport, Reports
from encdec.train.run_config import to_dict
from encdec.train.state import TrainState
from encdec.train.trackers import make_trackers, tracker_names
from encdec.train.warm_start import architecture, plan_start, start_from
from encdec.train.workdir import STARTED_FIELD, record_source, start_of_run, write_workdir

# What a process needs at most, as a rule, from SIGTERM to its end: a step and a checkpoint.
PATIENCE_SECONDS = 60.0
# Parameters and moments, from which on a heap's holes matter more than the time of new pages.
_LARGE_STATE_BYTES = 1 << 30


@dataclasses.dataclass
class Session:
    """Everything that a running run needs. All processes do the same with theirs.

    Attributes:
        job: the run, checked.
        workdir: of the run.
        state: after ``step`` steps; donated to the next one, so that its arrays must be copied to
            be kept.
        step: steps done in all.
        stop: the step to end at.
        checkpoints, reports, console, notice: where things go, and whether to leave.
        evaluator: of the held-out records; None without.
        losses: held-out loss by step, as ``checkpoints`` sees it.
    """

    job: Job
    workdir: epath.PathLike
    state: TrainState
    step: int
    stop: int
    checkpoints: Checkpoints
    reports: Reports
    console: Console
    notice: Notice
    evaluator: Evaluator | None
    losses: dict[int, float]

    def batches(self) -> Iterable[Any]:
        """The batches of the steps to come, on the devices."""
        job, sharding = self.job, self.job.program.batch_sharding
        self.return_memory()
        batches = open_batches(
            job.records,
            job.model,
            sharding,
            job.run.batch_size,
            seed=job.run.seed,
            shuffle=job.run.data.shuffle,
            columns=[job.teacher] if job.teacher else [],
        )
        return on_devices(batches, sharding, self.step, self.stop)

    def save(self) -> None:
        """Begins to save the state, once its metrics are known to be finite."""
        self.reports.settle()
        with self.reports.window.pause("checkpoint"):
            # A run that continues from a checkpoint knows the metrics of all steps before it.
            self.reports.flush()
            self.checkpoints.save(self.step, self.state)
        self.return_memory()

    def evaluate(self) -> None:
        """Reports the held-out loss.

        Raises:
            Preempted: the notice came meanwhile; the next process makes up for the evaluation.
        """
        self.reports.settle()
        with self.reports.window.pause("evaluation"):
            assert self.evaluator is not None
            report = self.evaluator(self.state.params, self.notice.reached)
        if report is None:
            self.leave()
        self.losses[self.step] = report["eval/loss"]
        self.reports.write(self.step, report | self.reports.goodput.report())
        self.return_memory()

    def return_memory(self) -> None:
        """Returns to the system what start, evaluation or saving has left free in a large heap.

        ``startup.keep_memory`` keeps it for the next step, whose blocks do not fit where others
        were: at 267M parameters a step took 20 GB of which 9 GB were in use. A small model keeps
        its pages, which cost it more time than memory.
        """
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(self.state))
        if jax.default_backend() == "cpu" and size >= _LARGE_STATE_BYTES:
            return_freed_memory()

    def lacks_evaluation(self) -> bool:
        """Whether the current step is to be evaluated before anything else.

        A finished run is evaluated again, to say how good it is; another where its last process
        ended between saving and evaluating; a new one if ``eval.at_start``.
        """
        settings = self.job.run.eval
        if not self.evaluator:
            return False
        if not self.step:
            return settings.at_start
        missed = settings.every > 0 and not self.step % settings.every
        return self.step == self.job.run.steps or (missed and self.step not in self.losses)

    def leave_if_told(self) -> None:
        """Saves and raises Preempted if the machine will be taken away."""
        if self.notice.reached():
            self.leave()

    def leave(self) -> NoReturn:
        """Raises Preempted, once everything is saved."""
        kept = "before its first step"
        if self.step:
            self.finish()
            kept = f"step {self.step:,} is saved in {self.checkpoints.directory}"
        raise Preempted(f"the run was preempted: {kept}; repeat the command to continue")

    def finish(self) -> None:
        """Returns when the last step is reported and saved on disk."""
        self.reports.settle()
        if self.checkpoints.latest() != self.step:
            self.save()
        self.checkpoints.wait()

    def patience_ended(self) -> bool:
        """Whether the held-out loss has not fallen for too many evaluations."""
        losses = [self.losses[step] for step in sorted(self.losses)]
        return out_of_patience(losses, self.job.run.eval.patience)


@contextlib.contextmanager
def open_session(
    job: Job,
    workdir: epath.PathLike,
    *,
    stop: int,
    entered: float,
    on_report: OnReport | None = None,
) -> Iterator[Session]:
    """A session at the last whole checkpoint, or before the first step; closed at the end.

    Args:
        job: the run.
        workdir: receives everything.
        stop: the step to end at.
        entered: Unix time at which this process began with the run.
        on_report: called with (step, numbers) at every report.

    Raises:
        InUseError: another process trains there and does not end.
    """
    run = job.run
    with contextlib.ExitStack() as closing:

        def taken() -> dict[str, Any]:
            """What the directory keeps of the run's start, once it is this run's."""
            make_directory(as_path(workdir))
            closing.enter_context(sole_writer(as_path(workdir), patience=PATIENCE_SECONDS))
            kept = {STARTED_FIELD: entered} | start_of_run(workdir, job.description)
            write_workdir(workdir, job.description | kept, job.records, job.program)
            return kept

        kept = done_by_first(taken)
        notice = closing.enter_context(Notice())
        console = Console(run.steps)
        closing.callback(console.close)
        losses: dict[int, float] = {}
        checkpoints = Checkpoints(workdir, run.checkpoint, losses, console.warn)
        closing.callback(checkpoints.close)
        _introduce(job, console)
        state, start = _begin(job, workdir, checkpoints, console)
        rows = _earlier_rows(workdir, start)
        losses |= {int(row["step"]): row["eval/loss"] for row in rows if "eval/loss" in row}
        goodput = Goodput(entered, kept[STARTED_FIELD], last_report(rows, start))
        console.advance(start)
        trackers = lambda: make_trackers(
            tracker_names(run.trackers),
            workdir,
            {"run": to_dict(run), "model": job.model.to_dict()},
            console.warn,
        )
        writer = make_writer(workdir, start, console, trackers)
        closing.callback(writer.close)
        reports = Reports(job, checkpoints, writer, stop, on_report, goodput)
        evaluator = (
            Evaluator(job.program, run, job.model, job.eval_records) if job.eval_records else None
        )
        yield Session(
            job,
            workdir,
            state,
            start,
            stop,
            checkpoints,
            reports,
            console,
            notice,
            evaluator,
            losses,
        )


def _begin(
    job: Job, workdir: epath.PathLike, checkpoints: Checkpoints, console: Console
) -> tuple[TrainState, int]:
    """The state from which to continue, and its step: the last whole checkpoint's, or a new one."""
    restored = checkpoints.restore(job.program.abstract_state)
    if restored:
        console.say(f"resuming {workdir} after step {restored[1]:,}")
        return restored
    state = job.program.init()
    if job.run.init_from:
        start = job.start or plan_start(job.run, job.model, job.records.card)
        state, origin = start_from(state, start, job.model)
        assert origin.step is not None
        origin.write(workdir)
        record_source(workdir, source_record(job.run.init_from, origin.step))
        console.say(str(origin))
    checkpoints.prepare(state)
    return state, 0


def _earlier_rows(workdir: epath.PathLike, start: int) -> list[dict[str, float]]:
    """What ``metrics.jsonl`` says of the steps up to ``start``, the same on every process."""
    rows = []
    if start and not jax.process_index() and lines_exist(as_path(workdir) / METRICS_FILE):
        rows = [row for row in read_metrics(workdir) if row["step"] <= start]
    return from_first(rows)


def out_of_patience(losses: Sequence[float], patience: int) -> bool:
    """Whether the last ``patience`` held-out losses are all no lower than one before them."""
    losses = [inf if isnan(loss) else loss for loss in losses]
    return 0 < patience < len(losses) and min(losses[-patience:]) >= min(losses[:-patience])


def _introduce(job: Job, console: Console) -> None:
    """Prints what the run will do."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in job.program.mesh.shape.items())
    device = jax.devices()[0].device_kind
    model = job.run.model
    if job.run.init_architecture == "source":
        model = f"the model of {job.run.init_from}"
    elif architecture(job.model) != architecture(job.run.base_model()):
        model += ", changed by config.model_overrides"
    console.say(
        f"{model}: {parameter_count(job.program.abstract_state.params):,} parameters, "
        f"{job.run.steps:,} steps of {job.run.batch_size} rows, {jax.device_count()} x {device} "
        f"({mesh})"
    )
    if job.teacher:
        console.say(job.teacher.describe())
    rows = len(job.records)
    if rows < job.run.batch_size:
        console.warn(
            f"warning: a batch of {job.run.batch_size:,} rows is larger than the data, {rows:,} "
            f"rows: a step reads every row about {job.run.batch_size / rows:.1f} times; set "
            f"--config.batch_size={max(1, rows // 8)} or so, or prepare with shorter lengths"
        )
    for item in job.program.unsharded:
        console.say(f"not sharded: {item}")
