"""Settings of ``prepare``, from whose fields flags, gin bindings and a job's identity follow."""

# ruff: noqa: RUF009 (`setting` gives a field, which ruff cannot see)

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from encdec.data import denoising  # noqa: F401 (enters its objectives)
from encdec.data.file_tasks import SPLIT_NAMES
from encdec.data.objectives import OBJECTIVES, Objective
from encdec.data.packing import METHODS
from encdec.data.readers import DOCUMENTS, PAIR_FIELDS, TEXT_FIELD
from encdec.data.task_mixtures import MIXTURES, task_or_mixture
from encdec.data.task_registry import TEXT_TASKS
from encdec.data.text_files import plain_name
from encdec.data.text_tasks import TextTask, jsonl_task, text_files_task
from encdec.data.vocabulary import Vocabulary, recorded_framing
from encdec.errors import ConfigError
from encdec.fields import did_you_mean
from encdec.hub import data_path
from encdec.settings import Settings, setting
from encdec.storage import any_path, as_path, user_place

# Small enough that two cores share a corpus of some megabytes, large enough that the last,
# half-full rows of a block do not matter (about a thousand rows).
BLOCK_BYTES = 4 << 20
MOST_LENGTH = 2**20  # tokens of a row: of longer ones no model's attention fits a device
FIELD_FLAGS = ("source_field", "target_field", "text_field")


@dataclasses.dataclass(frozen=True)
class PrepareSettings(Settings):
    """The settings of ``prepare``; lengths are tokens per row.

    In Python a ``vocabulary``, ``task`` or ``objective`` may be the object itself, and
    ``objective`` None is the task's own. ``passes`` follow one another, each with noise of its
    own. What is written does not depend on ``workers``.
    """

    task: str | TextTask | None = setting(
        None, f"a task or mixture by name: {', '.join([*TEXT_TASKS, *MIXTURES])}"
    )
    data_dir: str | None = setting(None, "where the task's files are", type=any_path, metavar="DIR")
    jsonl: Sequence[str] = setting(
        (),
        "rows with source and target: JSONL, CSV, TSV (also compressed), Parquet, Arrow; a folder, "
        "a pattern, hf://datasets/ORG/NAME/FILE, or - for standard input",
        type=data_path,
        nargs="+",
        metavar="FILE",
    )
    text: Sequence[str] = setting(
        (),
        "text files, or rows with text as for --jsonl, for pretraining",
        type=data_path,
        nargs="+",
        metavar="FILE",
    )
    source_field: str | None = setting(None, "the field of sources in --jsonl (source)")
    target_field: str | None = setting(None, "the field of targets in --jsonl (target)")
    text_field: str | None = setting(None, "the field of the text in rows of --text (text)")
    documents: str | None = setting(
        None,
        f"what a document is in a plain text file: {', '.join(DOCUMENTS)} (files); a row "
        "always is one",
    )
    objective: str | Objective | None = setting(
        None, f"what to learn from the text: {', '.join(OBJECTIVES)}"
    )
    vocabulary: str | os.PathLike[str] | Vocabulary | None = setting(
        None,
        "a .model, a tokenizer.json, 'bytes', or a directory of a model or of records",
        type=any_path,
    )
    extra_ids: int | None = setting(None, "sentinels at the vocabulary's end (0)", least=0)
    out: str | os.PathLike[str] | None = setting(
        None, "the records directory to write", type=any_path, metavar="DIR"
    )
    split: str | None = setting(
        None, "train, validation or test (train; for files: from their names)", identity=True
    )
    inputs_length: int | None = setting(
        None, "source tokens per row (the task's; for files 1024)", identity=True, least=0
    )
    targets_length: int | None = setting(
        None, "target tokens per row (the task's; for files 256)", identity=True, least=2
    )
    packing: str = setting(
        "best_fit", f"{', '.join(METHODS)}; greedy is seqio's order (best_fit)", identity=True
    )
    decoder_start_id: int | None = setting(
        None,
        "first decoder input (that of --vocabulary, if it is the directory of a model or of "
        "records, else 0)",
        identity=True,
        least=0,
    )
    inputs_prefix: Sequence[int] | None = setting(
        None,
        "ids in front of every source (those of --vocabulary, if it is the directory of a model or "
        "of records, else none; without ids: none)",
        type=int,
        nargs="*",
        metavar="ID",
        identity=True,
    )
    seed: int = setting(0, "seed of the objective (0)", identity=True, least=0)
    passes: int = setting(
        1, "passes over the text, each with new noise (1)", identity=True, least=1
    )
    max_examples: int | None = setting(
        None, "read no more than this many rows", identity=True, least=1
    )
    max_bad_rows: int = setting(0, "bad rows to leave out and count (0)", least=0)
    lossless: bool = setting(False, "reject a vocabulary that is not lossless on the text (warn)")
    block_bytes: int = setting(BLOCK_BYTES, "text of a shard (4 MiB)", identity=True, least=1)
    workers: int | None = setting(None, "processes (all cores)", least=1)
    overwrite: bool = setting(False, "replace existing records")

    @property
    def split_name(self) -> str:
        """The split that is read, and that the card names; "" of files whose names say none."""
        if self.split is not None or self.task:
            return self.split or "train"
        words = {
            word
            for path in (*self.jsonl, *self.text)
            for word in re.split(r"[\W_]+", plain_name(path).lower())
        }
        named = [split for split, spelled in SPLIT_NAMES.items() if words & set(spelled)]
        return named[0] if len(named) == 1 else ""

    @property
    def directory(self) -> pathlib.Path:
        """Where the records go."""
        assert self.out is not None
        return as_path(user_place("--out", self.out))

    def resolved(self) -> PrepareSettings:
        """These settings with the framing of texts that follows where none is given."""
        start_id, prefix = recorded_framing(self.vocabulary, self.extra_ids)
        if self.decoder_start_id is not None:
            start_id = self.decoder_start_id
        if self.inputs_prefix is not None:
            prefix = tuple(self.inputs_prefix)
        return dataclasses.replace(self, decoder_start_id=start_id or 0, inputs_prefix=prefix)

    def identity(self) -> dict[str, Any]:
        """The fields that decide what is written; no prefix is as before there was one."""
        fields = super().identity()
        if not fields["inputs_prefix"]:
            del fields["inputs_prefix"]
        return fields

    def check(self) -> None:
        """ConfigError for what is missing, out of range or at odds whatever the text is."""
        for name in ("out", "vocabulary"):
            if getattr(self, name) is None:
                raise ConfigError(f"--{name} is missing; give it, or bind prepare.{name} in gin")
        super().check()
        for name in ("inputs_length", "targets_length"):
            if (getattr(self, name) or 0) > MOST_LENGTH:
                raise ConfigError(
                    f"{name} is {getattr(self, name)}; expected up to {MOST_LENGTH} tokens"
                )
        if not self.task and self.split not in (None, *SPLIT_NAMES):
            hint = did_you_mean(str(self.split), SPLIT_NAMES)
            raise ConfigError(
                f"split is {self.split!r}; expected one of {', '.join(SPLIT_NAMES)}, which says "
                f"what the files are{hint}"
            )

    def text_task(self, **mixing: Any) -> TextTask:
        """The task that is named, or made of files; ``mixing`` as in ``task_or_mixture``.

        ConfigError unless exactly one is given.
        """
        fields = {name: getattr(self, name) for name in FIELD_FLAGS}
        return choose_task(
            self.task, self.jsonl, self.text, self.data_dir, self.documents, fields, **mixing
        )


def choose_task(
    task: str | TextTask | None,
    jsonl: Sequence[str] = (),
    text: Sequence[str] = (),
    data_dir: str | None = None,
    documents: str | None = None,
    fields: Mapping[str, str | None] | None = None,
    **mixing: Any,
) -> TextTask:
    """``PrepareSettings.text_task`` of these; ``fields`` are FIELD_FLAGS, None where not given."""
    named = {name: value for name, value in (fields or {}).items() if value is not None}
    given = [name for name, value in (("task", task), ("jsonl", jsonl), ("text", text)) if value]
    if len(given) != 1:
        raise ConfigError(
            f"give exactly one of --task, --jsonl and --text, got {', '.join(given) or 'none'}"
        )
    if data_dir is not None and not task:
        raise ConfigError(f"--data_dir={data_dir} is for --task; give files with their full path")
    if data_dir is not None and isinstance(task, TextTask):
        raise ConfigError(f"data_dir is {data_dir}, but the task {task.name} already has its files")
    if documents is not None and not text:
        raise ConfigError(f"--documents={documents} is for files of --text; leave it out")
    for name, value in named.items():
        if (name == "text_field" and not text) or (name != "text_field" and not jsonl):
            owner = "text" if name == "text_field" else "jsonl"
            raise ConfigError(f"--{name}={value} is for files of --{owner}; leave it out")
    if jsonl:
        default = dict(zip(FIELD_FLAGS, PAIR_FIELDS))
        return jsonl_task(jsonl, fields=[named.get(name, default[name]) for name in default])
    if text:
        return text_files_task(text, documents=documents, field=named.get("text_field", TEXT_FIELD))
    return task if isinstance(task, TextTask) else task_or_mixture(str(task), data_dir, **mixing)
