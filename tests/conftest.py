"""Shared test set-up: eight fake CPU devices, one compilation cache, and the optional corpora."""

from __future__ import annotations

import functools
import gc
import os
import pathlib
from collections.abc import Iterator

import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
CACHE = pathlib.Path(
    os.environ.get("ENCDEC_TEST_CACHE", pathlib.Path.home() / ".cache" / "encdec" / "jax-tests")
)

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Read by jax here and by every process a test starts.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
# Everything, however quickly compiled: each module's tests begin without programs (see below), and
# to read one takes a third of the time of compiling even the smallest.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# Most of the suite's time is XLA compiling tiny programs that run for milliseconds: without LLVM's
# optimizations that takes half as long. To test optimized programs, set it to 0.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(scope="session")
def corpora() -> pathlib.Path:
    """The folder of real corpora; skips the test, saying so, where it is absent."""
    path = pathlib.Path(os.environ.get("ENCDEC_CORPORA", REPOSITORY.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"real corpora not found at {path}; set ENCDEC_CORPORA to their folder")
    return path


@pytest.fixture(scope="module", autouse=True)
def _let_programs_go(request: pytest.FixtureRequest) -> Iterator[None]:
    """Frees what a module's tests compiled and cached, once they have run.

    A train step on eight fake devices holds some 1,150 memory maps, and Linux gives a process
    65,530 (vm.max_map_count): a worker that kept the programs of all its tests crashed with a
    segmentation fault at the next map that it asked for.
    """
    yield
    for value in vars(request.module).values():
        if isinstance(value, functools._lru_cache_wrapper):
            value.cache_clear()
    jax.clear_caches()
    gc.collect()
