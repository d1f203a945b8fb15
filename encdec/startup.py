"""Process-wide settings for computing: the compilation cache on disk, and kept memory.

Both change how long a command takes and nothing of what it computes.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import pathlib
import platform
import sys

from encdec.machine import memory_bytes, user_cache

# mallopt's parameters (malloc.h of glibc).
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8
_HUGE_PAGES = 14  # MADV_HUGEPAGE
_HUGE_PAGE = 2 << 20
_CACHE = "JAX_COMPILATION_CACHE_DIR"
KEEP_MEMORY = "ENCDEC_KEEP_MEMORY"


def use_compilation_cache() -> None:
    """Keeps compiled programs on disk, so that a second call starts at once.

    They are in ``$XDG_CACHE_HOME/encdec/jax`` (or ``~/.cache/encdec/jax``), in a folder of this
    kind of processor: programs for a CPU use whatever instructions it has, and a home directory
    may be shared by machines that differ. JAX_COMPILATION_CACHE_DIR names another folder;
    JAX_ENABLE_COMPILATION_CACHE=false keeps nothing. Said by the environment, which jax reads when
    it is imported, so that commands that need no jax stay without it.
    """
    if _CACHE not in os.environ:
        os.environ[_CACHE] = str(user_cache() / "jax" / processor_kind())
        # Of the programs of a short run most take less than jax's second.
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")


def processor_kind() -> str:
    """A name that differs where this machine's processor has other instructions."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    told = [line for line in lines if line.split("\t")[0] in ("flags", "Features")]
    flags = sorted(set(told[0].split(":", 1)[1].split())) if told else []
    digest = hashlib.sha256(" ".join([platform.machine(), *flags]).encode()).hexdigest()
    return f"{platform.machine()}-{digest[:12]}"


def has_accelerator() -> bool:
    """Whether jax may compute elsewhere than on the CPU, told without starting a backend."""
    if os.environ.get("JAX_PLATFORMS", "") == "cpu":
        return False
    devices = pathlib.Path("/dev")
    return any(any(devices.glob(name)) for name in ("nvidia[0-9]*", "accel*", "vfio/[0-9]*"))


def _strict_accounting() -> bool:
    """Whether Linux refuses memory beyond what it has, written to or not."""
    try:
        return pathlib.Path("/proc/sys/vm/overcommit_memory").read_text().strip() == "2"
    except OSError:
        return True


def keep_memory(reserve_bytes: int | None = None) -> bool:
    """On a CPU, keeps what a program has freed for its next call, on pages of 2 MiB.

    A training step asks for its activations at once and frees them at its end. glibc gives such
    blocks back to the system, which hands out zeros again, 4 KiB at a time: 45,000 page faults a
    step of ``quickstart``, a fifth of its time, and finding the small pages takes as much again.
    So nothing is given back, all is one heap, and its next ``reserve_bytes`` are marked as huge
    pages where the system leaves that to programs (``transparent_hugepage`` is ``madvise``). What
    is never written takes no memory.

    Nothing happens once jax is imported, since threads keep the heaps that they begin with, where
    an accelerator does the work, away from glibc, and with ENCDEC_KEEP_MEMORY=0.

    Args:
        reserve_bytes: default half of the machine's physical memory.

    Returns:
        Whether it was done.
    """
    off = os.environ.get(KEEP_MEMORY, "1") == "0" or "jax" in sys.modules or has_accelerator()
    if off or platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    # A threshold of -1 is none: what was reserved, too, would be given back at once.
    options = ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_TOP_PAD, 64 << 20))
    if not all([libc.mallopt(name, value) for name, value in options]):
        return False
    size = reserve_bytes or memory_bytes() // 2
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    # The heap's end moves that far and stays; a limit on memory (ulimit) makes it less. Where the
    # system counts what was asked for as used, nothing is reserved.
    while size >= _HUGE_PAGE and not _strict_accounting():
        if begin := libc.malloc(size):
            first = -(-begin // _HUGE_PAGE) * _HUGE_PAGE
            last = (begin + size) // _HUGE_PAGE * _HUGE_PAGE
            libc.madvise(first, last - first, _HUGE_PAGES)
            libc.free(begin)
            break
        size //= 2
    return True
