"""Shared test set-up: eight fake CPU devices, one compilation cache, and the optional corpora."""

from __future__ import annotations

import dataclasses
import functools
import gc
import importlib.util
import mmap
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
CACHE = pathlib.Path(
    os.environ.get("ENCDEC_TEST_CACHE", pathlib.Path.home() / ".cache" / "encdec" / "jax-tests")
)

MAPS, MANY_MAPS = pathlib.Path("/proc/self/maps"), 20_000

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Read by jax here and by every process a test starts.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
# Everything, however quickly compiled: workers share it and some modules' tests begin without
# programs (see below), and to read one takes a third of the time of compiling even the smallest.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# Most of the suite's time is XLA compiling tiny programs that run for milliseconds: without LLVM's
# optimizations that takes half as long. To test optimized programs, set it to 0.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# Four times sooner still by XLA's older way of writing loops (it has one program for each fusion,
# passes through no MLIR) and without cutting each small program into pieces for many cores.
SOON_COMPILED = {
    "xla_cpu_use_fusion_emitters": "false",
    "xla_cpu_parallel_codegen_split_count": "1",
}


def _known(flag: str) -> bool:
    """Whether this jaxlib has the flag; one that it has not would end the process.

    Names of flags stand there as C's strings; one that is but the name of a message's field, as
    those of flags that were taken away, does not.
    """
    folder = importlib.util.find_spec("jaxlib").submodule_search_locations[0]
    for library in pathlib.Path(folder).glob("*jax_common*"):
        with open(library, "rb") as file:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                if content.find(f"\0{flag}\0".encode()) >= 0:
                    return True
    return False


if os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1" and "XLA_FLAGS" not in os.environ:
    os.environ["XLA_FLAGS"] = " ".join(
        f"--{flag}={value}" for flag, value in SOON_COMPILED.items() if _known(flag)
    )
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax  # noqa: E402

from tests import devices  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)


# Until all is imported; see pytest_collection_finish.
gc.disable()


def pytest_collection_finish() -> None:
    """Importing and tracing make objects by the million, and Python's collector looked through all
    of them again and again, a tenth of the suite's time: what was imported is there to stay."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)
    gc.enable()


@pytest.fixture(scope="session")
def corpora() -> pathlib.Path:
    """The folder of real corpora; skips the test, saying so, where it is absent."""
    path = pathlib.Path(os.environ.get("ENCDEC_CORPORA", REPOSITORY.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"real corpora not found at {path}; set ENCDEC_CORPORA to their folder")
    return path


@pytest.fixture
def one_device() -> Iterator[None]:
    """Runs of the test take one device, where their configs name no mesh."""
    with devices.one_device():
        yield


@pytest.fixture(scope="session", autouse=True)
def _programs() -> Iterator[dict[Any, Any]]:
    """Runs of one configuration share their functions: a run that continues, or is done once more,
    would otherwise spend most of its time tracing what was traced before."""
    from encdec.train import job

    built, build = {}, job.build_program

    def build_once(run: Any, *more: Any) -> Any:
        # Of data, reports and checkpoints nothing is in the functions.
        data, checkpoint = type(run.data)(), type(run.checkpoint)()
        same = dataclasses.replace(
            run, data=data, checkpoint=checkpoint, log_every=1, init_from="", trackers=""
        )
        key = repr((same, *more))
        if key not in built:
            built[key] = build(run, *more)
        return built[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "build_program", build_once)
        yield built


@pytest.fixture(scope="module", autouse=True)
def _let_programs_go(request: pytest.FixtureRequest, _programs: dict[Any, Any]) -> Iterator[None]:
    """Frees what modules' tests compiled and cached, once that is much.

    A train step on eight fake devices holds some 1,150 memory maps, and Linux gives a process
    65,530 (vm.max_map_count): a worker that kept the programs of all its tests crashed with a
    segmentation fault at the next map that it asked for. What is freed is traced and read again.
    """
    yield
    for value in vars(request.module).values():
        if isinstance(value, functools._lru_cache_wrapper):
            value.cache_clear()
    if not MAPS.exists() or MAPS.read_bytes().count(b"\n") > MANY_MAPS:
        _programs.clear()
        jax.clear_caches()
        gc.collect()
