"""A run before it starts: all checks, and what they return."""

from __future__ import annotations

import dataclasses
import shutil
from typing import Any

import jax
from etils import epath

from encdec.buckets import CACHE, is_address
from encdec.data.card import MUST_AGREE
from encdec.data.records import DatasetCard, Records, open_records
from encdec.data.sparse_logits import SparseFormat
from encdec.data.teacher_rows import TeacherRows, open_teacher
from encdec.errors import ConfigError, DataError, StorageError
from encdec.model import ModelConfig
from encdec.processes import done_by_first
from encdec.saved.uploaded_steps import are_uploaded, staging_folder
from encdec.storage import user_place
from encdec.train.distillation_losses import check_divergence, check_tail
from encdec.train.program import Program, build_program
from encdec.train.run_config import RunConfig, parse_config
from encdec.train.sharding import make_mesh
from encdec.train.trackers import tracker_names
from encdec.train.warm_start import StartPlan, plan_start, with_source_model
from encdec.train.workdir import check_workdir, describe_run


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
    check_place(workdir)
    run = with_source_model(parse_config(config), workdir)
    if run.profile.first_step and is_address(workdir):
        raise ConfigError(
            f"config.profile.first_step is {run.profile.first_step}, but the profiler writes only "
            f"to this machine's disks and --workdir is {workdir}; profile a run with a local "
            "--workdir"
        )
    model = run.model_config()
    tracker_names(run.trackers)
    if not run.data.records:
        raise ConfigError(
            "config.data.records is empty; expected a directory written by "
            "`encdec prepare`: --config.data.records=DIR"
        )
    records = open_records(run.data.records)
    eval_records = open_records(run.data.eval_records) if run.data.eval_records else None
    check_records(model, records.card, eval_records.card if eval_records else None)
    teacher = open_teacher(run.distill.teacher, records) if run.distill.teacher else None
    if teacher:
        check_teacher(run, teacher.format)
    mesh = make_mesh(run.mesh)
    program = build_program(run, model, mesh, records.card.targets_length)
    check_room(workdir, program)
    description = describe_run(
        run,
        model,
        records.card,
        eval_records.card if eval_records else None,
        teacher.fingerprint if teacher else None,
    )
    resumes = done_by_first(lambda: check_workdir(workdir, description))
    start = plan_start(run, model, records.card) if run.init_from and not resumes else None
    return Job(run, model, records, eval_records, teacher, program, description, start)


def check_place(workdir: epath.PathLike) -> None:
    """Raises ConfigError for a work directory where this run cannot save its checkpoints."""
    address = user_place("--workdir", workdir)
    processes = jax.process_count() if jax.distributed.is_initialized() else 1
    if are_uploaded(address) and processes > 1:
        raise ConfigError(
            f"--workdir is {address}, which one process alone can save its checkpoints to; this "
            f"run has {processes}. Train in one process, which uses all devices of its machine, "
            "or give gs://BUCKET/PATH or a directory that all machines share (such as EFS, FSx "
            "for Lustre) and copy it (aws s3 sync)"
        )


def check_room(workdir: epath.PathLike, program: Program) -> None:
    """Raises StorageError where this machine has no space for a checkpoint on its way to s3://."""
    if not are_uploaded(workdir):
        return
    state = program.abstract_state
    arrays = jax.tree.leaves((state.params, state.opt_state))
    needed = sum(array.size * array.dtype.itemsize for array in arrays)
    folder = staging_folder(workdir)
    there = next(path for path in folder.parents if path.exists())
    left = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())  # to be removed
    if (free := shutil.disk_usage(there).free + left) < needed:
        raise StorageError(
            f"{folder}: a checkpoint of {needed / 1e9:,.1f} GB is written there before it is "
            f"uploaded, and {free / 1e9:,.1f} GB are free; free some space, or name a folder of "
            f"another disk: {CACHE}=DIR"
        )


def check_teacher(run: RunConfig, stored: SparseFormat) -> None:
    """Raises ConfigError unless distributions stored so can give the loss that is asked for."""
    check_divergence(run.distill.loss, stored.method)
    check_tail(run.distill.tail, stored.method)
    if stored.temperature != run.distill.temperature:
        raise ConfigError(
            f"config.distill.temperature is {run.distill.temperature}, but {run.distill.teacher} "
            f"was stored at {stored.temperature}; set the field to that, or store it with "
            f"--temperature={run.distill.temperature}"
        )
    if stored.method == "full" and run.loss.vocab_tile:
        raise ConfigError(
            f"config.loss.vocab_tile is {run.loss.vocab_tile}, but the teacher's rows are full, "
            "which need all logits at once; set it to 0, or store with --method=sampled"
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
    for name, read in MUST_AGREE.items():
        if read(card) != read(eval_card):
            raise DataError(
                f"{name} is {read(eval_card)} in the held-out records and {read(card)} in the "
                "training records; prepare both with the same settings"
            )
