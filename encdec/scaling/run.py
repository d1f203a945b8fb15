"""Runs a plan: whatever is not done yet, one run after the other, safe against being killed.

    WORKDIR/ladder.json     the ladder as first run; another one is refused
    WORKDIR/results.jsonl   one line per run and evaluation (``results``)
    WORKDIR/runs/NAME/      a work directory of ``encdec train``
    WORKDIR/locks/NAME      held while NAME is being run, released by the system at any death

A run is done when its last step's evaluation stands in its own ``metrics.jsonl``. So nothing has
to be written at the same moment: killed between training and recording, the next call collects.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from encdec.errors import CheckpointError, DataError, EncdecError, Preempted
from encdec.files import write_json
from encdec.scaling.ladder import Ladder, Plan, PlannedRun, run_config
from encdec.scaling.results import RESULTS_FILE, ResultsFile, collect
from encdec.train.config import OPERATIONAL

LADDER_FILE = "ladder.json"

# Where the records lie may change; their content is compared by every run. More budgets, sizes,
# seeds or teachers only add runs; the digests of old ones still hold.
_FREE = ("records", "eval_records", "sizes", "budgets", "seeds", "distilled")
# Of the runs' settings: where and how they run, not what they compute.
_OPERATIONAL = {name.partition(".")[0] for name in OPERATIONAL if "." not in name.rstrip(".")}

Say = Callable[[str], None]
Train = Callable[[Any, str], Any]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one call did: names of runs by what became of them."""

    done_before: tuple[str, ...]
    done: tuple[str, ...]
    failed: dict[str, str]
    busy: tuple[str, ...]


class Workdir:
    """A ladder's directory."""

    def __init__(self, path: str | os.PathLike):
        self.path = pathlib.Path(path)
        self.results = ResultsFile(self.path / RESULTS_FILE)

    def run_directory(self, name: str) -> pathlib.Path:
        return self.path / "runs" / name

    def claim(self, ladder: Ladder) -> None:
        """Makes the directory this ladder's.

        Raises:
            CheckpointError: it is another's; the fields that differ are named.
        """
        content = json.loads(json.dumps(dataclasses.asdict(ladder)))
        path = self.path / LADDER_FILE
        if path.exists():
            try:
                old = json.loads(path.read_text())
            except ValueError as error:
                raise CheckpointError(f"{path} is not JSON ({error}); restore it") from None
            names = [
                name
                for name in content
                if name not in _FREE
                and _comparable(name, content[name]) != _comparable(name, old.get(name))
            ]
            if names:
                shown = "; ".join(
                    f"{n} is {old.get(n)!r} there and {content[n]!r} here" for n in names
                )
                raise CheckpointError(
                    f"{self.path} holds another ladder: {shown}. Set these as "
                    "they were, or give another --workdir"
                )
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(path, content)

    def gather(self, plan: Plan) -> set[str]:
        """Collects what lies in the runs' directories; returns the names of finished runs.

        Raises:
            DataError: a recorded run differs from the planned one of its name.
        """
        known = {row["run"]: row["digest"] for row in self.results.read()}
        for run in plan.runs:
            if known.get(run.name, run.digest) != run.digest:
                raise DataError(
                    f"{self.results.path} has a run {run.name} of another plan (its model, data "
                    "or schedule differ); set the ladder as it was, or give another --workdir"
                )
        self.results.append(
            row for run in plan.runs for row in collect(run, self.run_directory(run.name))
        )
        planned = {run.name for run in plan.runs}
        return {row["run"] for row in self.results.read() if row["final"]} & planned

    @contextlib.contextmanager
    def lock(self, name: str) -> Iterator[bool]:
        """Whether this process now has ``name`` for itself."""
        path = self.path / "locks" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True


def _comparable(name: str, value: Any) -> Any:
    if name == "run" and isinstance(value, dict):
        return {k: v for k, v in value.items() if k not in _OPERATIONAL}
    return value


def run_plan(
    plan: Plan,
    workdir: str | os.PathLike,
    *,
    only: Sequence[str] = (),
    say: Say = print,
    train: Train | None = None,
) -> Outcome:
    """Trains what is not done, and records it.

    A run that fails is reported and left for the next call; the others go on. Runs that another
    process holds are passed over.

    Args:
        plan: of a ladder with records and held-out records.
        workdir: the ladder's directory.
        only: names of the runs to do; none: all.
        say: takes lines of progress.
        train: ``encdec.train.loop.train``, or what stands for it.

    Raises:
        DataError: no records given, or results of another plan.
        CheckpointError: the directory of another ladder.
    """
    ladder = plan.ladder
    for field in ("records", "eval_records"):
        if not getattr(ladder, field):
            raise DataError(
                f"ladder.{field} is empty; wanted a directory written by `encdec "
                f"prepare`: --ladder.{field}=DIR"
            )
    place = Workdir(workdir)
    wanted = [plan.named(name) for name in only] or list(plan.runs)
    place.claim(ladder)
    before = place.gather(plan)
    todo = [run for run in wanted if run.name not in before]
    say(
        f"{len(wanted) - len(todo)} of {len(wanted)} runs are done; "
        f"{sum(run.flops for run in todo):.3g} FLOPs to go"
    )
    done: list[str] = []
    busy: list[str] = []
    failed: dict[str, str] = {}
    for number, run in enumerate(todo, 1):
        with place.lock(run.name) as mine:
            if not mine:
                say(f"{run.name}: another process is at it")
                busy.append(run.name)
                continue
            # Another process may have finished it since the directory was read.
            rows = collect(run, place.run_directory(run.name))
            if not any(row["final"] for row in rows):
                say(
                    f"[{number}/{len(todo)}] {run.name}: {run.steps:,} steps of "
                    f"{run.batch_size} rows, {run.flops:.3g} FLOPs"
                )
                error = _train_one(ladder, run, place, train)
                if error:
                    failed[run.name] = error
                    say(f"{run.name}: {error}")
                    continue
        place.results.append(collect(run, place.run_directory(run.name)))
        done.append(run.name)
    return Outcome(tuple(sorted(before)), tuple(done), failed, tuple(busy))


def _train_one(ladder: Ladder, run: PlannedRun, place: Workdir, train: Train | None) -> str | None:
    """Trains one run to its end; the reason if it could not."""
    if train is None:
        import jax

        from encdec.train.loop import train

        jax.clear_caches()  # dozens of programs would otherwise stay in memory
    try:
        train(run_config(ladder, run), str(place.run_directory(run.name)))
    except Preempted:
        raise
    except EncdecError as error:
        return str(error)
    if not any(row["final"] for row in collect(run, place.run_directory(run.name))):
        return "training ended without an evaluation after its last step"
    return None


def index_of(plan: Plan, index: int) -> PlannedRun:
    """The run with number ``index`` of the plan, from 0, as array jobs count.

    Raises:
        DataError: no such run.
    """
    if not 0 <= index < len(plan.runs):
        raise DataError(f"--index={index}; the plan has runs 0 to {len(plan.runs) - 1}")
    return plan.runs[index]
