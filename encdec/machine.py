"""CPU cores and memory of this process."""

from __future__ import annotations

import ctypes
import os
import pathlib

_GROUP_LIMIT = pathlib.Path("/sys/fs/cgroup/memory.max")


def available_cores() -> int:
    """CPU cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def memory_bytes() -> int:
    """Of this machine, or what the control group of this process may use of it."""
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        return min(whole, int(_GROUP_LIMIT.read_text()))
    except (OSError, ValueError):  # no control group, or "max"
        return whole


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
