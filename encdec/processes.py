"""What the processes of a run agree on."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from encdec import errors


def from_first(value: Any) -> Any:
    """Process 0's value, on every process; anything that JSON holds.

    What a process reads from a shared directory may differ from what another has read a moment
    before, and processes that decide differently wait for each other forever.
    """
    if jax.process_count() == 1:
        return value
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    mine = text if not jax.process_index() else np.zeros(length, np.uint8)
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(mine), np.uint8).tobytes())


def done_by_first(call: Callable[[], Any]) -> Any:
    """What ``call`` gives in process 0, the only one to call it, on every process.

    For what looks at a shared directory or changes it: a process that is late would see what
    process 0 has written meanwhile. The others wait until the call has ended.

    Raises:
        EncdecError, or another: what the call raised, on every process; one that is not
            an EncdecError is a RuntimeError with its text on the others.
    """
    if jax.process_count() == 1:
        return call()
    value, error = None, None
    if not jax.process_index():
        try:
            value = call()
        except Exception as raised:
            error = raised
    told = from_first([value, type(error).__name__, str(error)] if error else [value])
    if error:
        raise error
    if len(told) > 1:
        _, name, message = told
        kind = getattr(errors, name, None)
        raise kind(message) if kind else RuntimeError(f"process 0: {name}: {message}")
    return told[0]


def any_process(value: bool) -> bool:
    """Whether it is so on at least one process."""
    if jax.process_count() == 1:
        return value
    return bool(np.any(multihost_utils.process_allgather(np.asarray(value))))


def sum_over_processes(values: np.ndarray) -> np.ndarray:
    """The sum of every process's array, in the array's own arithmetic."""
    if jax.process_count() == 1:
        return values
    gathered = np.asarray(multihost_utils.process_allgather(values))
    return gathered.sum(axis=0, dtype=values.dtype)


def wait_for_all(name: str) -> None:
    """Returns when every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
