"""Tasks by name: ours, those that a user's own module registers, and seqio's."""

from __future__ import annotations

import contextlib
import os
import pathlib
import re

from encdec.buckets import is_address
from encdec.data.file_tasks import SPLIT_NAMES, FileTask
from encdec.data.paper_tasks import PAPER_TASKS
from encdec.data.seqio_tasks import seqio_task, seqio_task_names
from encdec.data.text_tasks import EMBEDDED_TASKS, TextTask, bind_file_task
from encdec.errors import ConfigError, DataError
from encdec.fields import did_you_mean
from encdec.storage import on_this_machine, user_place

TEXT_TASKS: dict[str, TextTask] = {
    **EMBEDDED_TASKS,
    **{name: bind_file_task(task) for name, task in PAPER_TASKS.items()},
}


# Those of TEXT_TASKS whose rows are files below a data_dir.
FILE_TASKS: dict[str, FileTask] = dict(PAPER_TASKS)


def register_task(task: TextTask | FileTask) -> None:
    """Enters a task of the user's own by its name, for every command that takes names of tasks.

    Raises:
        ConfigError: another task has its name, or the name is not a word.
    """
    if not re.fullmatch(r"[\w.-]*[\w-][\w.-]*", task.name):  # "." and ".." are folders
        raise ConfigError(
            f"a task is named {task.name!r}; expected letters, digits, '_', '-' and '.', and not "
            "dots alone"
        )
    known = FILE_TASKS.get(task.name, TEXT_TASKS.get(task.name))
    if known is not None and known is not task:
        raise ConfigError(f"a task {task.name!r} is already registered; give yours another name")
    if isinstance(task, FileTask):
        FILE_TASKS[task.name] = task
        TEXT_TASKS.setdefault(task.name, bind_file_task(task))
    else:
        TEXT_TASKS[task.name] = task


def text_task(name: str, data_dir: str | None = None, *, one_of_several: bool = False) -> TextTask:
    """A task by name: of ours, of the user's own or of seqio's registry once it is imported.

    Its rows come from files below ``data_dir`` if given: a task that brings its own text may have
    ready pairs there (as ``encdec paper`` writes them), and must unless it is ``one_of_several``,
    of which others may need the directory.

    DataError naming the nearest where there is none of that name.
    """
    found = TEXT_TASKS.get(name) or seqio_task(name)
    if found is None:
        known = list(dict.fromkeys([*TEXT_TASKS, *seqio_task_names()]))
        hint = did_you_mean(name, known)
        raise DataError(
            f"unknown task {name!r}{hint} (known: {', '.join(known)}); to use your own, give the "
            "module that registers it with --module"
        )
    if data_dir is None:
        return found
    given, data_dir = data_dir, user_place("--data_dir", data_dir)
    if is_address(data_dir):
        with contextlib.suppress(FileNotFoundError):
            data_dir = os.fspath(on_this_machine(data_dir))
    if not pathlib.Path(data_dir).is_dir():
        raise DataError(f"--data_dir={given} is not a directory; give the one that contains {name}")
    rows = FILE_TASKS.get(name) or _ready_pairs(found, data_dir)
    if rows is None and one_of_several:
        return found
    if rows is None:
        raise ConfigError(
            f"task {name} has its own text, and there is no file for it below "
            f"--data_dir={data_dir}; leave it out"
        )
    return bind_file_task(rows, data_dir)


def _ready_pairs(task: TextTask, data_dir: str) -> FileTask | None:
    """A task's examples as files with their sources and targets; None if none is there."""
    fields = task.objective.document_fields
    splits = dict.fromkeys(task.splits or tuple(SPLIT_NAMES))
    ready = FileTask(
        task.name,
        task.about,
        fields,
        lambda row: tuple(row[field] for field in fields),
        splits,
        task.objective,
        metrics=task.metrics,
        fine_tune_steps=task.fine_tune_steps,
        lengths=task.lengths,
    )
    there = any(ready.find_files(data_dir, split) for split in splits)
    return ready if there else None
