"""The notice of a preemption, seen by all processes at the same moment.

Clouds, GKE and Slurm announce it by SIGTERM, often to one machine alone. Where processes have
joined, jax's coordination service takes the signal, spreads it, and names the moment at which all
of them save (``jax.experimental.multihost_utils.reached_preemption_sync_point``). A process on its
own takes the signal itself.
"""

from __future__ import annotations

import signal
import threading
from typing import Any

import jax
from jax.experimental import multihost_utils


class Notice:
    """Whether to save and exit. A context: signals are handled only inside it."""

    def __init__(self) -> None:
        self._calls, self._reached = 0, False
        self._previous: Any = None

    def __enter__(self) -> Notice:
        # Python allows handlers in the main thread only; elsewhere the signal acts as ever.
        if not jax.distributed.is_initialized() and (
            threading.current_thread() is threading.main_thread()
        ):
            self._previous = signal.signal(signal.SIGTERM, self._received)
        return self

    def __exit__(self, *_: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)

    def _received(self, number: int, frame: object) -> None:
        # Again and again, if it comes so: systemd, Slurm and wrappers may each send one.
        self._reached = True

    def reached(self) -> bool:
        """Whether this is the moment, or it has been.

        All processes must ask equally often: the coordination service compares how often each
        has asked, and picks a moment that is ahead of all of them.
        """
        self._calls += 1
        if jax.distributed.is_initialized() and multihost_utils.reached_preemption_sync_point(
            self._calls
        ):
            self._reached = True
        return self._reached
