"""CPU cores and memory of this process."""

from __future__ import annotations

import ctypes
import os
import pathlib


def available_cores() -> int:
    """CPU cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def user_cache() -> pathlib.Path:
    """Where copies of ours are kept: ``$XDG_CACHE_HOME/encdec``, or ``~/.cache/encdec``.

    A variable that is not an absolute path counts as unset, as its standard says.
    """
    home = os.environ.get("XDG_CACHE_HOME", "")
    return pathlib.Path(home if os.path.isabs(home) else os.path.expanduser("~/.cache")) / "encdec"


def return_freed_memory() -> None:
    """Returns to the system freed memory that malloc keeps; only glibc supports this."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
