"""Runs a plan: all unfinished runs, one after the other; it can be killed and resumed.

    WORKDIR/ladder.json     the ladder as first run; a different one is refused
    WORKDIR/results.jsonl   one line per run and evaluation (``results_file``)
    WORKDIR/runs/NAME/      a work directory of ``encdec train``
    WORKDIR/locks/NAME      held while NAME is being run, released by the system if the process dies
                            (not in a bucket: see ``check_division``)

A run is done when its last step's evaluation is in its own ``metrics.jsonl``. So no two files have
to be written atomically together: after a kill between training and recording, the next call
collects the run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from encdec.buckets import is_address
from encdec.data.records import open_records
from encdec.errors import CheckpointError, ConfigError, DataError, EncdecError, Preempted
from encdec.files import sole_process, write_json
from encdec.logs import logger
from encdec.scaling.ladder import Ladder
from encdec.scaling.planned_runs import Plan, PlannedRun, run_config
from encdec.scaling.results_file import RESULTS_FILE, ResultsFile, collect
from encdec.storage import as_path, make_directory
from encdec.train.job import check_place
from encdec.train.run_config import OPERATIONAL

if TYPE_CHECKING:
    from etils import epath

_LOG = logger(__name__)

LADDER_FILE = "ladder.json"
CONTENTS_FIELD = "fingerprints of records and eval_records"

# Paths of records may change, their content may not. More budgets, sizes, seeds or
# teachers only add runs; the digests of old ones stay valid.
_FREE = ("records", "eval_records", "sizes", "budgets", "seeds", "distilled")
# Run settings that determine where and how runs compute, not what they compute.
_OPERATIONAL = {name.partition(".")[0] for name in OPERATIONAL if "." not in name.rstrip(".")}

Train = Callable[[Any, str], Any]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The outcome of one call: names of runs by result."""

    done_before: tuple[str, ...]
    done: tuple[str, ...]
    failed: dict[str, str]
    busy: tuple[str, ...]


class Workdir:
    """A ladder's directory."""

    def __init__(self, path: str | os.PathLike):
        self.path = as_path(path)
        self.results = ResultsFile(self.path / RESULTS_FILE)

    def run_directory(self, name: str) -> pathlib.Path | epath.Path:
        return self.path / "runs" / name

    def claim(self, ladder: Ladder) -> None:
        """Claims the directory for this ladder.

        Raises:
            CheckpointError: it belongs to another ladder; differing fields are named.
        """
        content = json.loads(json.dumps(dataclasses.asdict(ladder)))
        opened = [open_records(text) for text in (ladder.records, ladder.eval_records)]
        content[CONTENTS_FIELD] = [records.card.fingerprint for records in opened]
        path = self.path / LADDER_FILE
        if path.exists():
            try:
                old = json.loads(path.read_text())
            except ValueError as error:
                raise CheckpointError(f"{path} is not JSON ({error}); restore it") from None
            old.setdefault(CONTENTS_FIELD, content[CONTENTS_FIELD])  # of earlier versions
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
                    f"{self.path} holds another ladder: {shown}. Restore these "
                    "values, or give another --workdir"
                )
        make_directory(self.path)
        write_json(path, content)

    def gather(self, plan: Plan, record: bool = True) -> set[str]:
        """Collects results from the runs' directories; returns the names of finished runs.

        Without ``record`` nothing is written.

        Raises:
            DataError: a recorded run differs from the planned one of its name.
        """
        rows = self.results.read()
        known = {row["run"]: row["digest"] for row in rows}
        for run in plan.runs:
            if known.get(run.name, run.digest) != run.digest:
                raise DataError(
                    f"{self.results.path} has a run {run.name} of another plan (its model, data "
                    "or schedule differ); restore the ladder's settings, or give another --workdir"
                )
        found = [row for run in plan.runs for row in collect(run, self.run_directory(run.name))]
        if record:
            self.results.append(found)
        planned = {run.name for run in plan.runs}
        return {row["run"] for row in (*rows, *found) if row["final"]} & planned

    def lock(self, name: str) -> contextlib.AbstractContextManager[bool]:
        """Locks ``name``; false if another process holds it. True in a bucket."""
        if is_address(self.path):
            return contextlib.nullcontext(True)
        return sole_process(pathlib.Path(self.path) / "locks" / name)


def _comparable(name: str, value: Any) -> Any:
    if name == "run" and isinstance(value, dict):
        # Laws compare held-out losses, which are to be of the same rows in all runs.
        evaluation = value.get("eval", {})
        rows = [evaluation.get(name, 0) for name in ("batches", "batch_size")]
        return {k: v for k, v in value.items() if k not in _OPERATIONAL} | {
            "eval": rows if rows[0] else None
        }
    return value


def check_division(workdir: str | os.PathLike, named: bool, alone: bool) -> None:
    """Raises ConfigError where processes might work on one run of a bucket without knowing it.

    Processes that share a directory on a disk divide its runs by locks, which end with the process
    that holds them. A bucket has none: an object that marked a run as taken would stay after a
    kill, indistinguishable from that of a live process.
    """
    if is_address(workdir) and not (named or alone):
        raise ConfigError(
            f"--workdir is {workdir}, and processes cannot share runs in a bucket, which has no "
            "locks: give --alone if no other process works on this ladder, or give each process "
            "its own runs with --only or --index"
        )


def run_plan(
    plan: Plan, workdir: str | os.PathLike, *, only: Sequence[str] = (), train: Train | None = None
) -> Outcome:
    """Trains the unfinished runs, and records them.

    A run that fails is reported and left for the next call; the others continue. Runs that another
    process holds are skipped.

    Args:
        plan: of a ladder with records and held-out records.
        workdir: the ladder's directory.
        only: names of the runs to do; empty: all.
        train: ``encdec.train.loop.train``, or a replacement.

    Raises:
        DataError: no records given, or results of another plan.
        CheckpointError: the directory belongs to another ladder.
    """
    ladder = plan.ladder
    for field in ("records", "eval_records"):
        if not getattr(ladder, field):
            raise DataError(
                f"ladder.{field} is empty; expected a directory written by `encdec "
                f"prepare`: --ladder.{field}=DIR"
            )
    check_place(workdir)
    place = Workdir(workdir)
    wanted = [plan.named(name) for name in only] or list(plan.runs)
    place.claim(ladder)
    before = place.gather(plan)
    todo = [run for run in wanted if run.name not in before]
    _LOG.info(
        f"{len(wanted) - len(todo)} of {len(wanted)} runs are done; "
        f"{sum(run.flops for run in todo):.3g} FLOPs to go"
    )
    done: list[str] = []
    busy: list[str] = []
    failed: dict[str, str] = {}
    for number, run in enumerate(todo, 1):
        with place.lock(run.name) as mine:
            if not mine:
                _LOG.info(f"{run.name}: another process is running it")
                busy.append(run.name)
                continue
            # Another process may have finished it since the results were read.
            rows = collect(run, place.run_directory(run.name))
            if not any(row["final"] for row in rows):
                _LOG.info(
                    f"[{number}/{len(todo)}] {run.name}: {run.steps:,} steps of "
                    f"{run.batch_size} rows, {run.flops:.3g} FLOPs"
                )
                error = _train_one(ladder, run, place, train)
                if error:
                    failed[run.name] = error
                    _LOG.info(f"{run.name}: {error}")
                    continue
        place.results.append(collect(run, place.run_directory(run.name)))
        done.append(run.name)
    return Outcome(tuple(sorted(before)), tuple(done), failed, tuple(busy))


def _train_one(ladder: Ladder, run: PlannedRun, place: Workdir, train: Train | None) -> str | None:
    """Trains one run to its end; returns the reason of a failure, or None."""
    if train is None:
        import jax

        from encdec.train.loop import train as train_here

        train = train_here
        jax.clear_caches()  # otherwise dozens of programs would stay in memory
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
    """The run with index ``index`` of the plan, from 0, as in array jobs.

    Raises:
        DataError: no such run.
    """
    if not 0 <= index < len(plan.runs):
        raise DataError(f"--index={index}; the plan has runs 0 to {len(plan.runs) - 1}")
    return plan.runs[index]
