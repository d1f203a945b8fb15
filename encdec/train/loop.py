"""The life of a run: start or resume, step, report, evaluate, save, end."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
from etils import epath

from encdec.errors import ConfigError
from encdec.train.job import prepare_job
from encdec.train.reports import OnReport
from encdec.train.session import Session, open_session
from encdec.train.tensorboard import periodic_actions


@dataclasses.dataclass(frozen=True)
class Summary:
    """How a run ended.

    Attributes:
        workdir: where its checkpoint and metrics are.
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
class Hook:
    """The user's own function, called between the steps of a run.

    Attributes:
        call: takes the ``Session`` between two steps, on every process; the step's metrics are
            known to be finite by then. What it returns is not looked at; what it raises ends the
            run. ``session.state`` is given to the next step, so copy what is to be kept.
        every: steps between two calls; it is called after the last step, too. 0: then alone.
    """

    call: Callable[[Session], object]
    every: int = 0


def train(
    config: Any,
    workdir: epath.PathLike,
    *,
    stop_at: int | None = None,
    on_report: OnReport | None = None,
    hooks: Sequence[Hook] = (),
) -> Summary:
    """Trains a model, or continues where the work directory's last checkpoint ends.

    Args:
        config: a RunConfig, or a ConfigDict or mapping of its fields.
        workdir: receives configuration, vocabulary, parameter table, metrics and checkpoints.
        stop_at: stop and save after this many steps in all, before ``config.steps``.
        on_report: called with (step, numbers) at every report, on every process.
        hooks: called between steps, in this order, after the run's own evaluation and saving.

    Raises:
        ConfigError, DataError, CheckpointError: see ``prepare_job``; nothing was written.
        NonFiniteError: a loss, gradient or parameter is NaN or infinite.
        Preempted: the machine will be taken away (SIGTERM); everything is saved.
    """
    started, entered = time.monotonic(), time.time()
    if stop_at is not None and stop_at < 1:
        raise ConfigError(f"stop_at is {stop_at}; expected a step of 1 or more")
    if bad := [hook.every for hook in hooks if hook.every < 0]:
        raise ConfigError(f"a hook's every is {bad[0]}; expected 0 (at the end) or more steps")
    job = prepare_job(config, workdir)
    stop = min(job.run.steps, stop_at or job.run.steps)
    with open_session(job, workdir, stop=stop, entered=entered, on_report=on_report) as session:
        _run(session, hooks)
    reports = session.reports
    seconds = time.monotonic() - started
    return Summary(
        str(workdir), session.step, reports.last("train/"), reports.last("eval/"), seconds
    )


def _run(session: Session, hooks: Sequence[Hook]) -> None:
    """The loop itself."""
    train_step, patience = session.job.program.train_step, session.job.run.eval.patience
    due = _due(session, hooks)
    if session.lacks_evaluation():
        session.evaluate()
    if session.step < session.stop:
        session.leave_if_told()
        if session.patience_ended():
            session.console.say(f"no lower held-out loss in {patience} evaluations: nothing to do")
            return
    for batch in session.batches():
        with jax.transfer_guard("disallow"):
            session.state, metrics = train_step(session.state, batch)
        session.step += 1
        # Reads the metrics of the step before, while the device works on this one.
        session.reports.take(session.step, metrics)
        for action in due:
            action(session.step)
        session.console.advance(session.step)
        if session.step == session.stop:
            break
        if session.patience_ended():
            session.console.say(f"no lower held-out loss in {patience} evaluations: the run ends")
            break
        session.leave_if_told()
    session.finish()


def _due(session: Session, hooks: Sequence[Hook]) -> list[Callable[[int], object]]:
    """What is done after the steps, each at its own: a list of functions of the step."""
    run = session.job.run

    def at(every: float, last: int, call: Callable[[], object]) -> Callable[[int], object]:
        return periodic_actions.PeriodicCallback(
            every_steps=int(every) or None, on_steps=[last], callback_fn=lambda step, t: call()
        )

    def hooked(hook: Hook) -> Callable[[], object]:
        def call() -> object:
            session.reports.settle()
            return hook.call(session)

        return call

    due = [at(run.checkpoint.every, session.stop, session.save)]
    if session.evaluator:
        due.append(at(run.eval.every, run.steps, session.evaluate))
    if run.profile.first_step and not jax.process_index():
        due.append(
            periodic_actions.Profile(
                logdir=epath.Path(session.workdir) / "profile",
                first_profile=run.profile.first_step,
                num_profile_steps=run.profile.steps,
                profile_duration_ms=None,
                every_secs=None,
            )
        )
    return due + [at(hook.every, session.stop, hooked(hook)) for hook in hooks]
