"""Memory moved onto huge pages keeps its contents, and is nobody else's."""

from __future__ import annotations

import mmap
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from encdec.inference.huge_pages import NewMemory, arrays_onto_huge_pages


def huge_bytes() -> int:
    lines = pathlib.Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("AnonHuge"))


def small_pages(size: int) -> mmap.mmap:
    area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    area.write(np.arange(size // 8).tobytes())
    return area


@pytest.mark.skipif(not pathlib.Path("/proc/self/smaps_rollup").exists(), reason="needs Linux")
def test_memory_written_since_is_moved_with_its_contents():
    size, other = 32 << 20, small_pages(16 << 20)
    memory = NewMemory()
    area = small_pages(size)
    moved = memory.onto_huge_pages()
    if not moved:
        pytest.skip("this kernel does not move memory onto huge pages")
    # Where large pages are scarce not all of it is moved; both ends may be within a block.
    assert huge_bytes() >= min(moved, size) - (4 << 20)
    assert moved < size + (8 << 20)
    for kept in (area, other):
        np.testing.assert_array_equal(np.frombuffer(kept, np.int64), np.arange(len(kept) // 8))


@pytest.mark.skipif(not pathlib.Path("/proc/self/smaps_rollup").exists(), reason="needs Linux")
def test_arrays_are_moved_with_their_contents():
    tree = jax.block_until_ready(
        {"a": jnp.arange(2**23, dtype=jnp.float32), "b": (jnp.ones((3, 2**20)),)}
    )
    moved = arrays_onto_huge_pages(tree)
    if not moved:
        pytest.skip("this kernel does not move memory onto huge pages")
    assert huge_bytes() >= min(moved, 2**25 + 3 * 2**22) - (8 << 20)
    np.testing.assert_array_equal(tree["a"], np.arange(2**23, dtype=np.float32))
    assert (tree["b"][0] == 1).all()


def test_no_arrays_are_no_work():
    assert arrays_onto_huge_pages({"a": np.ones(4), "b": None}) == 0
