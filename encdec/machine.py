"""What this machine gives to this process."""

from __future__ import annotations

import ctypes
import os


def available_cores() -> int:
    """CPU cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def return_freed_memory() -> None:
    """Gives back to the system what malloc keeps of freed memory; glibc alone can."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
