"""Moves a runtime's memory to pages of 2 MiB, if Linux provides them.

A decoder at batch 1 reads all of its weights for each token, and with pages of 4 KiB the processor
spends much of that time on finding pages. Runtimes ask malloc, which leaves the choice to the
system's ``transparent_hugepage`` setting; most systems wait to be asked (``madvise``). So the
memory is moved once it is written (``MADV_COLLAPSE``, Linux 6.1 or later; elsewhere nothing
happens).
"""

from __future__ import annotations

import ctypes
import os
import pathlib
from typing import Any

import jax

_BLOCK = 2 << 20
_COLLAPSE = 25  # MADV_COLLAPSE, which Python's mmap module does not know
_MAPS = pathlib.Path("/proc/self/maps")


class NewMemory:
    """The memory that the process maps from now on."""

    def __init__(self) -> None:
        self._before = _blocks()

    def onto_huge_pages(self) -> int:
        """Moves it, contents and addresses kept; bytes that are then on huge pages.

        Blocks that cannot be moved, such as those never written to, stay as they are.
        """
        return _collapse(_blocks() - self._before)


def arrays_onto_huge_pages(tree: Any) -> int:
    """Moves a tree's jax arrays that are whole on one CPU device, contents and addresses kept.

    Returns:
        Bytes that are then on huge pages, of all blocks that hold part of an array.
    """
    held: set[int] = set()
    for array in jax.tree.leaves(tree):
        if isinstance(array, jax.Array) and [d.platform for d in array.devices()] == ["cpu"]:
            begin = array.unsafe_buffer_pointer()
            held.update(range(begin // _BLOCK, -(-(begin + array.nbytes) // _BLOCK)))
    return _collapse(held & _blocks())


def _collapse(blocks: set[int]) -> int:
    if not blocks:
        return 0
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return _BLOCK * sum(advise(block * _BLOCK, _BLOCK, _COLLAPSE) == 0 for block in blocks)


def _blocks() -> set[int]:
    """Numbers of the blocks that are in private anonymous memory; none outside Linux."""
    found: set[int] = set()
    if not _MAPS.exists() or os.sysconf("SC_PAGE_SIZE") != 4096:
        return found
    for line in _MAPS.read_text().splitlines():
        span, rights, _, _, inode, *name = line.split()
        if rights == "rw-p" and inode == "0" and name in ([], ["[heap]"]):
            begin, end = (int(x, 16) for x in span.split("-"))
            found.update(range(-(-begin // _BLOCK), end // _BLOCK))
    return found
