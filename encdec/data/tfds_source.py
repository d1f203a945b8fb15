"""Rows of what tensorflow-datasets has prepared on this machine; nothing is downloaded."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

from encdec.errors import DataError
from encdec.packages import require
from encdec.quiet import quiet_stderr

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def tfds_rows(name: str, split: str, task: str) -> Iterator[dict[str, Any]]:
    """Rows of a split in their stored order, bytes as text.

    DataError where the data set or the split is not there, with the commands that fix it.
    """
    require("tensorflow_datasets", "seqio", f"the task {task} without --data_dir")
    with quiet_stderr():
        import tensorflow_datasets as tfds

    remedy = (
        f"build it with `tfds build {name}` (TFDS_DATA_DIR says where), or give its files with "
        f"--data_dir=DIR (DIR/{task}/{split}.jsonl)"
    )
    try:
        builder = tfds.builder(name)
    except Exception as error:
        raise DataError(f"tensorflow-datasets has no {name}: {error}; {remedy}") from error
    if not builder.is_prepared():
        raise DataError(f"{name} is not on this machine (looked in {builder.data_dir}); {remedy}")
    if split not in builder.info.splits:
        found = ", ".join(builder.info.splits)
        raise DataError(f"split is {split!r}; {name} has {found}")
    for row in builder.as_dataset(split=split, shuffle_files=False).as_numpy_iterator():
        yield _as_text(row)


def _as_text(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _as_text(part) for key, part in value.items()}
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if hasattr(value, "dtype") and value.dtype == object:
        return [_as_text(part) for part in value.tolist()]
    return value
